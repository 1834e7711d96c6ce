"""Pages of due chains that a sweep hands to other workers: nothing is lost, doubled or piled up on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import Celery

import workers
from dispatcher import DONE, NEW, Dispatcher, ServiceUnavailable
from dispatcher.coordination.locks import ChainLocks
from dispatcher.messages.publisher import Publisher
from dispatcher.messages.queues import FAN_OUT, celery_settings
from dispatcher.storage.models import ChainRow
from tests.integration import shop
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

WAITING_PAGES = 16
CONFIG = shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink())


def pages(broker_url: str) -> list[tuple[str, list[int]]]:
    """The pages that wait for a worker, type and ids, taken out of the queue."""
    messages = shop.take_messages(broker_url, shop.SWEEPS)
    assert {message.task for message in messages} <= {FAN_OUT}
    assert all(message.kwargs.keys() == {"chain_type", "chain_ids"} for message in messages)
    return [(message.kwargs["chain_type"], message.kwargs["chain_ids"]) for message in messages]


def executions(broker_url: str, queue: str = shop.CHAINS) -> list[list[int]]:
    """The ids in the executions of a queue, taken out of it."""
    messages = shop.take_messages(broker_url, queue)
    assert {message.task for message in messages} <= {"dispatcher.execute_chain"}
    return [message.kwargs["chain_ids"] for message in messages]


def many_chains(dispatcher: Dispatcher, count: int) -> None:
    """So many due chains, in one statement."""
    rows = [
        {
            "chain_type": shop.CHAIN_TYPE,
            "resource_key": f"{number:064}",
            "state": NEW,
            "due_at": shop.START,
            "created_at": shop.START,
            "updated_at": shop.START,
        }
        for number in range(count)
    ]
    dispatcher.database.write(lambda connection: connection.execute(ChainRow.__table__.insert(), rows))


def markers_end(redis_url: str) -> None:
    """The time of the queued-markers is over."""
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter("dispatcher:queued:*"):
            client.delete(key)


# --- handed over -----------------------------------------------------------------------------------------------------


def test_a_sweep_hands_over_pages_of_ids_and_publishes_no_execution(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock(), sweep_fanout=2)
    ids = [shop.new_chain(dispatcher, number).id for number in range(5)]

    counts = dispatcher.sweep()

    assert counts == {"due": 5, "enqueued": 0, "handed_over": 5, "already_queued": 0, "oldest_due_seconds": 0.0}
    assert pages(broker_url) == [(shop.CHAIN_TYPE, ids[:2]), (shop.CHAIN_TYPE, ids[2:4]), (shop.CHAIN_TYPE, ids[4:])]
    assert executions(broker_url) == []


def test_the_worker_that_gets_a_page_publishes_it_as_the_sweep_would(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    config = {
        "chains": [
            {"chain_type": "cart", "transitions": {NEW: [shop.Remind]}, "queue": "carts"},
            {"chain_type": "trial", "transitions": {NEW: [shop.Remind]}},
        ]
    }
    dispatcher = make_dispatcher(config, sweep_fanout=3, chains_per_task=2)
    carts = [shop.new_chain(dispatcher, number, chain_type="cart").id for number in range(3)]
    trial = shop.new_chain(dispatcher, chain_type="trial").id
    dispatcher.sweep()

    results = [dispatcher.fan_out(*page) for page in pages(broker_url)]

    assert results == [{"chain_type": "cart", "enqueued": 3}, {"chain_type": "trial", "enqueued": 1}]
    assert executions(broker_url, "carts") == [carts[:2], carts[2:]]
    assert executions(broker_url) == [[trial]]


def test_handed_over_chains_go_on_once(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=2)
    chains = [shop.new_chain(dispatcher, number) for number in range(5)]
    dispatcher.sweep()
    for page in pages(broker_url):
        dispatcher.fan_out(*page)
        dispatcher.fan_out(*page)  # a broker may give a message twice

    for ids in executions(broker_url):
        dispatcher.execute_chains(ids)

    assert [shop.actions(chain) for chain in chains] == [["created", "planned"]] * 5
    for chain in chains:
        assert shop.attempt(dispatcher, chain.deliveries[0]).outcome == "delivered"
    shop.assert_consistent(dispatcher)


def test_many_pages_are_handed_over_and_published_whole(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock(), sweep_fanout=200, chains_per_task=50)
    many_chains(dispatcher, 2500)

    counts = dispatcher.sweep()
    handed_over = pages(broker_url)
    for page in handed_over:
        dispatcher.fan_out(*page)

    assert (counts["due"], counts["handed_over"], len(handed_over)) == (2500, 2500, 13)
    assert max(len(ids) for _, ids in handed_over) == 200
    ids = [one for group in executions(broker_url) for one in group]
    assert len(ids) == len(set(ids)) == 2500


def test_sweeps_at_the_same_time_hand_over_a_chain_once(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatchers = [make_dispatcher(CONFIG, sweep_fanout=2) for _ in range(4)]
    ids = {shop.new_chain(dispatchers[0], number).id for number in range(10)}

    results = shop.at_once(*(one.sweep for one in dispatchers))

    assert sum(result["handed_over"] + result["enqueued"] for result in results) == 10, results
    found = [one for _, page in pages(broker_url) for one in page] + [one for (one,) in executions(broker_url)]
    assert sorted(found) == sorted(ids)


def test_a_page_of_chains_that_are_not_due_changes_nothing(make_dispatcher: shop.Make, broker_url: str) -> None:
    clock = shop.Clock()
    config = shop.cart({NEW: [shop.Remind], "reminded": [], DONE: []}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, clock=clock, sweep_fanout=10)
    waiting, resting, disabled, terminal = (shop.new_chain(dispatcher, number) for number in range(4))
    shop.planned(dispatcher, waiting)
    shop.change_chain(dispatcher, resting.id, next_update_at=clock.now.replace(year=2100), due_at=None)
    disabled.disable()
    terminal.move_to(DONE, "set up")
    before = shop.dump_rows(dispatcher)

    page = [waiting.id, resting.id, disabled.id, terminal.id, 2**40]
    assert dispatcher.fan_out(shop.CHAIN_TYPE, page)["enqueued"] == 5
    outcomes = [dispatcher.execute_chains(ids)[0].outcome for ids in executions(broker_url)]

    assert outcomes == ["pending", "resting", "disabled", "terminal", "missing"]
    assert shop.dump_rows(dispatcher) == before


# --- under way -------------------------------------------------------------------------------------------------------


def test_a_page_that_waits_for_a_worker_is_not_handed_over_again(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=2, queued_seconds=60)
    first = shop.new_chain(dispatcher, 1).id
    dispatcher.sweep()
    second = shop.new_chain(dispatcher, 2).id

    again = dispatcher.sweep()

    assert (again["due"], again["handed_over"], again["already_queued"]) == (2, 1, 1)
    assert dispatcher.sweep()["already_queued"] == 2, "and no page without chains"
    assert pages(broker_url) == [(shop.CHAIN_TYPE, [first]), (shop.CHAIN_TYPE, [second])]
    with redis.Redis.from_url(redis_url) as client:
        assert 0 < client.pttl(f"dispatcher:queued:{first}") <= 60_000


def test_a_page_whose_message_is_lost_is_found_again_when_its_markers_end(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=2)
    ids = [shop.new_chain(dispatcher, number).id for number in range(3)]
    dispatcher.sweep()
    shop.take_messages(broker_url, shop.SWEEPS)

    markers_end(redis_url)

    assert dispatcher.sweep()["handed_over"] == 3
    assert [page for _, page in pages(broker_url)] == [ids[:2], ids[2:]]


def test_a_sweep_publishes_itself_while_many_pages_wait(make_dispatcher: shop.Make, broker_url: str) -> None:
    """Else a relay's tick would wait behind a million chains."""
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock(), sweep_fanout=1)
    many_chains(dispatcher, WAITING_PAGES + 4)

    counts = dispatcher.sweep()

    assert (counts["due"], counts["handed_over"], counts["enqueued"]) == (WAITING_PAGES + 4, WAITING_PAGES, 4)
    handed_over, published = [ids for _, ids in pages(broker_url)], executions(broker_url)
    assert len(handed_over) == WAITING_PAGES and len(published) == 4
    assert len({one for (one,) in handed_over + published}) == WAITING_PAGES + 4


def test_without_a_lock_server_a_sweep_hands_over_all_that_is_due(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, redis_url=shop.NOBODY, sweep_fanout=10)
    chain = shop.new_chain(dispatcher)

    assert dispatcher.sweep()["handed_over"] == dispatcher.sweep()["handed_over"] == 1
    found = pages(broker_url)
    assert found == [(shop.CHAIN_TYPE, [chain.id])] * 2
    assert dispatcher.fan_out(*found[0])["enqueued"] == 1


# --- as much as the queue takes --------------------------------------------------------------------------------------


def test_handed_over_chains_count_as_messages_of_their_queue(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock(), max_backlog=3, chains_per_task=2, sweep_fanout=4)
    ids = [shop.new_chain(dispatcher, number).id for number in range(9)]

    counts = dispatcher.sweep()

    assert (counts["handed_over"], counts["held_back"]) == (6, [shop.CHAIN_TYPE])
    assert [page for _, page in pages(broker_url)] == [ids[:4], ids[4:6]]


def test_a_page_for_a_queue_that_has_become_full_is_left_to_a_later_sweep(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=3, sweep_fanout=3)
    ids = [shop.new_chain(dispatcher, number).id for number in range(3)]
    dispatcher.sweep()
    ((_, page),) = pages(broker_url)
    for _ in range(2):  # another's messages
        shop.new_chain(dispatcher, 9).enqueue()
    for message in shop.take_messages(broker_url, shop.REQUESTS):
        dispatcher._services.publisher.execute(message.kwargs["chain_ids"], queue=shop.CHAINS)

    assert dispatcher.fan_out(shop.CHAIN_TYPE, page) == {"chain_type": shop.CHAIN_TYPE, "enqueued": 1, "held_back": 2}

    assert shop.queue_length(broker_url, shop.CHAINS) == 3
    assert set(shop.dump_keys(redis_url)) == {f"dispatcher:queued:{ids[0]}".encode()}, "the others may be taken again"
    assert dispatcher.fan_out(shop.CHAIN_TYPE, ids[1:]) == {
        "chain_type": shop.CHAIN_TYPE,
        "enqueued": 0,
        "held_back": 2,
    }
    executions(broker_url)
    assert dispatcher.sweep()["handed_over"] == 3, "these two and the one that was enqueued"


def test_a_sweep_that_hands_over_goes_on_where_the_last_one_stopped(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    # No lock server, so no markers: only the position keeps the first ones from being handed over again.
    dispatcher = make_dispatcher(CONFIG, max_backlog=2, redis_url=shop.NOBODY, sweep_fanout=2)
    ids = [shop.new_chain(dispatcher, number).id for number in range(5)]

    seen = []
    for _ in range(3):
        dispatcher.sweep()
        seen.append([page for _, page in pages(broker_url)])
    assert seen == [[ids[:2]], [ids[2:4]], [ids[4:], ids[:1]]], "and begins anew at the end"


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_handed_over_leaves_no_markers(
    make_dispatcher: shop.Make, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer() as broker:
        cut_off = make_dispatcher(CONFIG, broker_url=broker.url, sweep_fanout=10)
        chain = shop.new_chain(cut_off)
        mark_queued = ChainLocks.mark_queued

        def mark_and_kill(self: ChainLocks, *arguments: Any, **options: Any) -> list[int]:
            marked = mark_queued(self, *arguments, **options)
            assert list(shop.dump_keys(redis_url)) == [f"dispatcher:queued:{chain.id}".encode()]
            return marked

        def kill_and_send(self: Publisher, *arguments: Any) -> None:
            broker.kill()
            fan_out(self, *arguments)

        fan_out = Publisher.fan_out
        monkeypatch.setattr(ChainLocks, "mark_queued", mark_and_kill)
        monkeypatch.setattr(Publisher, "fan_out", kill_and_send)
        with pytest.raises(ServiceUnavailable):
            cut_off.sweep()

    assert shop.dump_keys(redis_url) == {}


@pytest.mark.parametrize("dies", ["before it is asked", "while it is written to"])
def test_a_page_that_cannot_be_published_leaves_no_markers(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=10)
    chain = shop.new_chain(dispatcher)
    dispatcher.sweep()
    ((_, page),) = pages(broker_url)
    assert list(shop.dump_keys(redis_url)) == [f"dispatcher:queued:{chain.id}".encode()]
    with RedisServer() as broker:
        cut_off = make_dispatcher(CONFIG, broker_url=broker.url, sweep_fanout=10)
        if dies == "before it is asked":
            broker.kill()
        else:
            execute = Publisher.execute

            def kill_and_execute(self: Publisher, *arguments: Any, **options: Any) -> str:
                broker.kill()
                return execute(self, *arguments, **options)

            monkeypatch.setattr(Publisher, "execute", kill_and_execute)

        with pytest.raises(ServiceUnavailable, match="broker"):
            cut_off.fan_out(shop.CHAIN_TYPE, page)

    assert shop.dump_keys(redis_url) == {}
    assert dispatcher.sweep()["handed_over"] == 1


def test_a_page_of_an_unknown_type_is_left_to_a_worker_that_knows_it(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    new = make_dispatcher({"chains": [{"chain_type": "basket", "transitions": {NEW: [shop.Remind]}}]}, sweep_fanout=10)
    chain = shop.new_chain(new, chain_type="basket")
    new.sweep()
    ((name, page),) = pages(broker_url)
    before = shop.dump_rows(new)

    assert make_dispatcher(CONFIG).fan_out(name, page) == {"outcome": "unknown_definition", "enqueued": 0}

    assert executions(broker_url) == [] and shop.dump_rows(new) == before
    markers_end(redis_url)
    assert new.sweep()["handed_over"] == 1
    assert new.fan_out(*pages(broker_url)[0])["enqueued"] == 1
    assert executions(broker_url) == [[chain.id]]


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_sweep_hands_nothing_over(make_dispatcher: shop.Make, broker_url: str, redis_url: str) -> None:
    """Its executions are dry ones, and it has no markers that would keep them from being published twice."""
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=10)
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    counts = dispatcher.sweep(dry_run=True)

    assert (counts["dry_run"], counts["enqueued"], counts["handed_over"]) == (True, 1, 0)
    (message,) = shop.take_messages(broker_url, shop.CHAINS)
    assert message.kwargs == {"chain_ids": [chain.id], "dry_run": True}
    assert shop.take_messages(broker_url, shop.SWEEPS) == []
    assert shop.dump_rows(dispatcher) == before and shop.dump_keys(redis_url) == {}


@pytest.mark.parametrize("room", [1, 9])
def test_a_deployment_in_dry_run_publishes_a_page_dry_and_leaves_its_markers(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str, room: int
) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=10)
    chains = [shop.new_chain(dispatcher, number) for number in range(2)]
    dispatcher.sweep()
    ((name, page),) = pages(broker_url)
    rows, keys = shop.dump_rows(dispatcher), shop.dump_keys(redis_url)

    dry = make_dispatcher(CONFIG, dry_run=True, max_backlog=room)
    result = dry.fan_out(name, page)

    assert (result["dry_run"], result["enqueued"]) == (True, min(room, 2))
    messages = shop.take_messages(broker_url, shop.CHAINS)
    assert [message.kwargs for message in messages] == [
        {"chain_ids": [chain.id], "dry_run": True} for chain in chains[:room]
    ]
    cut_off = make_dispatcher(CONFIG, dry_run=True, broker_url=shop.NOBODY)
    with pytest.raises(ServiceUnavailable):
        cut_off.fan_out(name, page)
    assert (shop.dump_rows(dispatcher), shop.dump_keys(redis_url)) == (rows, keys)


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(make_dispatcher: shop.Make) -> Callable[..., Any]:
    """The task of a worker, with a message's keyword arguments."""
    settings = {"chains_per_task": 1000, "sweep_fanout": 10_000}
    app = Celery("fan-out", set_as_current=False)
    given = make_dispatcher(CONFIG, **settings)
    app.conf.update(celery_settings(given.settings, broker_url=given.broker_url))
    workers.install(app, make_dispatcher(CONFIG, celery_app=app, **settings))
    return app.tasks[FAN_OUT]


def test_the_task_takes_a_whole_page_and_no_more(task: Callable[..., Any], broker_url: str) -> None:
    result = task(chain_type=shop.CHAIN_TYPE, chain_ids=list(range(1, 10_100)))

    assert result == {"chain_type": shop.CHAIN_TYPE, "enqueued": 10_000}
    assert [one for ids in executions(broker_url) for one in ids] == list(range(1, 10_001))


@pytest.mark.parametrize(
    ("message", "result"),
    [
        ({}, {"outcome": "unknown_definition", "enqueued": 0}),
        ({"chain_type": "x\x00"}, {"outcome": "unknown_definition", "enqueued": 0}),
        ({"chain_type": ["cart"], "chain_ids": [1]}, {"outcome": "unknown_definition", "enqueued": 0}),
        ({"chain_type": shop.CHAIN_TYPE}, {"chain_type": shop.CHAIN_TYPE, "enqueued": 0}),
        ({"chain_type": shop.CHAIN_TYPE, "chain_ids": "1; DROP"}, {"chain_type": shop.CHAIN_TYPE, "enqueued": 0}),
        (
            {"chain_type": shop.CHAIN_TYPE, "chain_ids": [True, -1, None, 5, 5]},
            {"chain_type": shop.CHAIN_TYPE, "enqueued": 1},
        ),
    ],
)
def test_what_is_no_page_ends_in_a_named_outcome(
    task: Callable[..., Any], message: dict[str, Any], result: dict[str, Any]
) -> None:
    assert task(**message) == result


def test_a_worker_without_its_broker_says_so_by_name(make_dispatcher: shop.Make) -> None:
    app = Celery("fan-out", set_as_current=False, broker=shop.NOBODY)
    workers.install(app, make_dispatcher(CONFIG, celery_app=app, broker_url=shop.NOBODY))

    result = app.tasks[FAN_OUT](chain_type=shop.CHAIN_TYPE, chain_ids=[1])

    assert result.keys() == {"error"} and "broker" in result["error"]


def test_a_chain_stays_due_until_its_execution(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_fanout=1)
    chain = shop.new_chain(dispatcher)
    due_at = shop.row_of(dispatcher, chain.id).due_at

    dispatcher.sweep()
    dispatcher.fan_out(*pages(broker_url)[0])

    assert shop.row_of(dispatcher, chain.id).due_at == due_at
