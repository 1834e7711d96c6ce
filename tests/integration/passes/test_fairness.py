"""The room of a queue is shared among the chain types that have due chains, within a sweep and across sweeps."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, select, update

from dispatcher import NEW, Dispatcher
from dispatcher.storage.models import ChainRow, TickRow
from tests.integration import shop

pytestmark = pytest.mark.integration


def config(*names: str, **queues: str) -> dict[str, Any]:
    """A configuration of these chain types."""
    return {
        "chains": [
            {"chain_type": name, "transitions": {NEW: [shop.Remind]}, **({"queue": queues[name]} if queues else {})}
            for name in names
        ]
    }


def due_chains(dispatcher: Dispatcher, counts: Mapping[str, int]) -> None:
    """So many due chains of each type, in one statement."""
    rows = [
        {
            "chain_type": name,
            "resource_key": f"{number:064}",
            "state": NEW,
            "due_at": shop.START,
            "created_at": shop.START,
            "updated_at": shop.START,
        }
        for name, count in counts.items()
        for number in range(count)
    ]
    dispatcher.database.write(lambda connection: connection.execute(ChainRow.__table__.insert(), rows))


def types_of(
    dispatcher: Dispatcher, broker_url: str, queue: str = shop.CHAINS, *, limit: int | None = None
) -> list[str]:
    """The chain types of the executions in a queue, in their order, at most `limit`; they are taken out of it."""
    messages = shop.take_messages(broker_url, queue, limit=limit)
    with dispatcher.database.read() as connection:
        types = {row.id: row.chain_type for row in connection.execute(select(ChainRow.id, ChainRow.chain_type))}
    return [types[chain_id] for message in messages for chain_id in message.kwargs["chain_ids"]]


@contextmanager
def counted(dispatcher: Dispatcher) -> Iterator[list[str]]:
    """The statements that read due chains while the block runs."""
    statements: list[str] = []

    def keep(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM chain_dispatcher_chain" in statement:
            statements.append(statement)

    event.listen(dispatcher.database.engine, "before_cursor_execute", keep)
    yield statements
    event.remove(dispatcher.database.engine, "before_cursor_execute", keep)


# --- within a sweep --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fanout", [0, 50])
def test_small_types_are_published_by_the_first_sweep_beside_a_big_one(
    make_dispatcher: shop.Make, broker_url: str, fanout: int
) -> None:
    names = ("big", "small", "tiny")
    dispatcher = make_dispatcher(config(*names), clock=shop.Clock(), max_backlog=100, sweep_fanout=fanout)
    due_chains(dispatcher, {"big": 5000, "small": 30, "tiny": 1})

    counts = dispatcher.sweep()
    for message in shop.take_messages(broker_url, shop.SWEEPS):
        dispatcher.fan_out(message.kwargs["chain_type"], message.kwargs["chain_ids"])

    published = types_of(dispatcher, broker_url)
    assert Counter(published) == {"big": 69, "small": 30, "tiny": 1}, "what one does not need goes to the others"
    assert counts["held_back"] == ["big"]


def test_a_small_type_does_not_stand_behind_a_whole_page_of_a_big_one(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(config("big", "small"), clock=shop.Clock())
    due_chains(dispatcher, {"big": 3000, "small": 5})

    dispatcher.sweep()

    published = types_of(dispatcher, broker_url)
    assert Counter(published) == {"big": 3000, "small": 5}
    assert published.index("small") <= 100
    assert published[-1] == "big"


def test_types_with_queues_of_their_own_share_no_room(make_dispatcher: shop.Make, broker_url: str) -> None:
    queues = {"big": "bulk", "other": "bulk", "small": "quick"}
    dispatcher = make_dispatcher(config(*queues, **queues), clock=shop.Clock(), max_backlog=10)
    due_chains(dispatcher, dict.fromkeys(queues, 50))

    dispatcher.sweep()

    assert Counter(types_of(dispatcher, broker_url, "bulk")) == {"big": 5, "other": 5}
    assert Counter(types_of(dispatcher, broker_url, "quick")) == {"small": 10}


def test_room_that_is_less_than_one_message_for_each_type_is_used_up(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    names = tuple("abcde")
    dispatcher = make_dispatcher(config(*names), clock=shop.Clock(), max_backlog=3)
    due_chains(dispatcher, dict.fromkeys(names, 4))

    counts = dispatcher.sweep()

    assert types_of(dispatcher, broker_url) == ["a", "b", "c"] and counts["held_back"] == list(names)


def test_room_is_shared_in_messages_and_messages_are_filled(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(config("big", "small"), clock=shop.Clock(), max_backlog=4, chains_per_task=10)
    due_chains(dispatcher, {"big": 500, "small": 7})

    dispatcher.sweep()

    sizes = [len(message.kwargs["chain_ids"]) for message in shop.take_messages(broker_url, shop.CHAINS)]
    assert sorted(sizes) == [7, 10, 10, 10]


def test_a_sweep_reads_each_page_once_however_little_room_there_is(make_dispatcher: shop.Make) -> None:
    names = tuple("abcdefgh")
    dispatcher = make_dispatcher(config(*names), clock=shop.Clock(), max_backlog=20)
    due_chains(dispatcher, {name: 3**number for number, name in enumerate(names)})  # some are used up in each round

    with counted(dispatcher) as statements:
        counts = dispatcher.sweep()

    assert counts["enqueued"] == 20
    assert len(statements) == len(names), statements


def test_chains_that_are_queued_already_use_no_room_and_few_statements(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(config("big"), clock=shop.Clock(), max_backlog=2500)
    due_chains(dispatcher, {"big": 2500})
    dispatcher.sweep()
    shop.take_messages(broker_url, shop.CHAINS)
    dispatcher.database.write(lambda connection: connection.execute(update(TickRow).values(position=None)))
    tight = make_dispatcher(config("big"), clock=shop.Clock(), max_backlog=3)

    with counted(tight) as statements:
        counts = tight.sweep()

    assert (counts["already_queued"], counts["enqueued"]) == (2500, 0)
    assert len(statements) == 3


# --- across sweeps ---------------------------------------------------------------------------------------------------


def test_no_type_starves_while_the_queue_never_empties(make_dispatcher: shop.Make, broker_url: str) -> None:
    """The consumer takes one message between two sweeps, so that each finds room for one."""
    names = ("big", "huge", "small")
    dispatcher = make_dispatcher(config(*names), clock=shop.Clock(), max_backlog=12, queued_seconds=3600)
    due_chains(dispatcher, {"big": 100, "huge": 100, "small": 2})
    dispatcher.sweep()
    published: list[str] = []

    for _ in range(12):
        published += types_of(dispatcher, broker_url, limit=1)
        dispatcher.sweep()
    published += types_of(dispatcher, broker_url, limit=24)

    assert published[:12].count("small") == 2 and published[:12].count("big") == 5
    assert Counter(published[12:]) == {"big": 6, "huge": 6}


def test_a_type_that_is_always_due_does_not_take_the_turns_of_others(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    names = ("always", "big", "huge")
    dispatcher = make_dispatcher(config(*names), clock=shop.Clock(), max_backlog=1, redis_url=shop.NOBODY)
    due_chains(dispatcher, {"always": 1, "big": 50, "huge": 50})  # without markers its chain is published each time
    published: list[str] = []

    for _ in range(9):
        dispatcher.sweep()
        published += types_of(dispatcher, broker_url, limit=1)

    assert Counter(published) == {"always": 3, "big": 3, "huge": 3}


def test_a_new_small_type_gets_its_share_of_the_room_that_is_left(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(config("big", "small"), clock=shop.Clock(), max_backlog=50)
    due_chains(dispatcher, {"big": 5000})
    assert dispatcher.sweep()["enqueued"] == 50
    due_chains(dispatcher, {"small": 3})
    assert dispatcher.sweep()["enqueued"] == 0, "the queue is full"
    types_of(dispatcher, broker_url, limit=6)

    assert dispatcher.sweep()["enqueued"] == 6

    assert Counter(types_of(dispatcher, broker_url, limit=50)[-6:]) == {"big": 3, "small": 3}


def test_where_nobody_is_held_back_no_turns_are_written(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(config("big", "small"), clock=shop.Clock(), max_backlog=3)
    due_chains(dispatcher, {"big": 5, "small": 5})
    for _ in range(6):
        dispatcher.sweep()
        shop.take_messages(broker_url, shop.CHAINS)
    before = shop.dump_rows(dispatcher)

    dispatcher.sweep()

    assert shop.dump_rows(dispatcher) == before
    with dispatcher.database.read() as connection:
        assert set(connection.execute(select(TickRow.position)).scalars()) <= {None}


def test_a_sweep_that_resumes_ends_where_it_resumed(make_dispatcher: shop.Make, broker_url: str) -> None:
    """Without a lock server there are no markers that would keep the rest from being published twice."""
    tight, wide = (
        make_dispatcher(config("big"), clock=shop.Clock(), max_backlog=room, redis_url=shop.NOBODY)
        for room in (5, 5000)
    )
    due_chains(tight, {"big": 1500})
    tight.sweep()
    first = [message.kwargs["chain_ids"][0] for message in shop.take_messages(broker_url, shop.CHAINS)]

    assert wide.sweep()["enqueued"] == 1500

    ids = [message.kwargs["chain_ids"][0] for message in shop.take_messages(broker_url, shop.CHAINS)]
    assert ids[-5:] == first and len(set(ids)) == 1500
