"""One bad row never stops a pass over many: what cannot be read or settled is set aside and named, the rest goes on.

The rows are written past this library, as an older version or another tool may have written them. MariaDB checks by
itself that its JSON columns are valid and at most 31 levels deep, so its tables here have lost that check.
"""

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest
from sqlalchemy import JSON, Connection, Row, Text, cast, insert, literal, select, text, update

from dispatcher import NEW, Chain, Dispatcher, RetryPolicy, Transition
from dispatcher.domain.records import Owed
from dispatcher.errors import UnreadableRow
from dispatcher.passes import relay
from dispatcher.storage.database import Database
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT
from tests.integration import shop

pytestmark = pytest.mark.integration

WAIT_SECONDS: Final = 30
COUNT: Final = 5
BAD: Final = {
    "more levels than Python decodes": '{"a":' * 5000 + "1" + "}" * 5000,
    "more levels than user code bears": '{"a":' * 400 + "1" + "}" * 400,
    "no object": "[1]",
    "no JSON": "{no JSON",
}
LOOSE: Final = (
    "ALTER TABLE chain_dispatcher_chain MODIFY context MEDIUMTEXT, MODIFY request MEDIUMTEXT",
    "ALTER TABLE chain_dispatcher_delivery MODIFY context MEDIUMTEXT, MODIFY kwargs MEDIUMTEXT",
)


@pytest.fixture
def database_url(database_url: str) -> str:
    """Each kind of database, without MariaDB's own check of JSON."""
    if database_url.startswith("mariadb"):
        database = Database(database_url)
        with database.engine.connect() as connection:
            for statement in LOOSE:
                connection.execute(text(statement))
        database.dispose()
    return database_url


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, database_url: str) -> str:
    """A text that is not the JSON object that a row should hold."""
    if request.param == "no JSON" and database_url.startswith("postgresql"):  # its type holds JSON only
        return '"a text"'
    return BAD[request.param]


def write_raw(dispatcher: Dispatcher, table: Any, row_id: Any, column: str, raw: str) -> None:
    """Write a text into a JSON column, past every check."""
    value: Any = literal(raw, Text())
    if dispatcher.database.dialect == "postgresql":
        value = cast(value, JSON)
    statement = update(table).where(table.c.id == row_id).values({column: value})
    assert dispatcher.database.write(lambda connection: connection.execute(statement).rowcount) == 1


def state_of(dispatcher: Dispatcher, chain: Chain) -> Row[Any]:
    """What a chain's row says, without its JSON."""
    columns = (CHAIN.c.state, CHAIN.c.failures, CHAIN.c.due_at, CHAIN.c.pending_delivery_id)
    with dispatcher.database.read() as connection:
        return connection.execute(select(*columns).where(CHAIN.c.id == chain.id)).one()


def delivery_row(dispatcher: Dispatcher, delivery_id: str) -> Row[Any]:
    """What a delivery's row says, without its JSON."""
    columns = (DELIVERY.c.status, DELIVERY.c.attempt, DELIVERY.c.last_error, DELIVERY.c.publish_after)
    with dispatcher.database.read() as connection:
        return connection.execute(select(*columns).where(DELIVERY.c.id == delivery_id)).one()


def lines(caplog: pytest.LogCaptureFixture, action: str) -> list[Any]:
    return [record for record in caplog.records if getattr(record, "action", "") == action]


def moving(make_dispatcher: shop.Make, **options: Any) -> tuple[Dispatcher, list[Chain]]:
    """Chains that move at once, without a callback."""
    transition = shop.transition("Moves", "moved")
    dispatcher = make_dispatcher(shop.cart({NEW: [transition], "moved": [shop.Never]}, callback=None), **options)
    return dispatcher, [shop.new_chain(dispatcher, number) for number in range(COUNT)]


def owing(
    make_dispatcher: shop.Make, candidate: type[Transition] = shop.Remind, **options: Any
) -> tuple[Dispatcher, shop.Sink, list[Chain], list[Any]]:
    """Chains that wait for a delivery each."""
    sink = shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [candidate], "reminded": [shop.Never]}, **{"callback": sink, **options})
    )
    chains = [shop.new_chain(dispatcher, number) for number in range(COUNT)]
    return dispatcher, sink, chains, [shop.planned(dispatcher, chain) for chain in chains]


# --- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["context", "request"])
def test_a_chain_whose_row_cannot_be_read_backs_off_alone(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, bad: str, column: str
) -> None:
    clock = shop.Clock()
    dispatcher, chains = moving(make_dispatcher, clock=clock)
    write_raw(dispatcher, CHAIN, chains[0].id, column, bad)
    waits: list[timedelta] = []

    for failures in (1, 2, 3):
        results = dispatcher.execute_chains([chain.id for chain in chains if chain.id is not None])

        assert [result.outcome for result in results] == ["guard_failed", *["moved" if failures == 1 else "none"] * 4]
        row = state_of(dispatcher, chains[0])
        assert (row.state, row.failures) == (NEW, failures)
        waits.append(row.due_at - clock())
        clock.now = row.due_at
    assert waits == sorted(waits) and timedelta(seconds=30) < waits[0] < timedelta(minutes=2) < waits[2]
    assert shop.actions(chains[0]) == ["created", "guard_failed"]
    failed = lines(caplog, "guard_failed")
    assert [line.chain_id for line in failed] == [chains[0].id] * 3
    assert column in failed[0].getMessage() and failed[0].levelno == logging.ERROR
    assert bad[:20] not in caplog.text and len(caplog.text) < 20_000


def test_a_chain_whose_row_was_repaired_goes_on(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher, chains = moving(make_dispatcher, clock=clock)
    write_raw(dispatcher, CHAIN, chains[0].id, "context", BAD["no object"])
    dispatcher.execute_chains([chains[0].id])
    write_raw(dispatcher, CHAIN, chains[0].id, "context", "{}")
    clock.forward(hours=1)

    assert [result.outcome for result in dispatcher.execute_chains([chains[0].id])] == ["moved"]
    assert state_of(dispatcher, chains[0]).failures == 0


def test_a_new_request_replaces_one_that_cannot_be_read(make_dispatcher: shop.Make, bad: str) -> None:
    dispatcher, chains = moving(make_dispatcher)
    write_raw(dispatcher, CHAIN, chains[0].id, "request", bad)

    chains[0].enqueue(initial_context={"a": 1})

    assert shop.actions(chains[0])[-1] == "request_replaced"
    assert [result.outcome for result in dispatcher.execute_chains([chains[0].id])] == ["moved"]


def test_a_json_null_is_nothing(make_dispatcher: shop.Make) -> None:
    dispatcher, chains = moving(make_dispatcher)
    write_raw(dispatcher, CHAIN, chains[0].id, "context", "null")
    write_raw(dispatcher, CHAIN, chains[0].id, "request", "null")

    assert [result.outcome for result in dispatcher.execute_chains([chains[0].id])] == ["moved"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_call_in_process_says_that_the_row_cannot_be_read(
    make_dispatcher: shop.Make, bad: str, dry_run: bool
) -> None:
    dispatcher, chains = moving(make_dispatcher)
    write_raw(dispatcher, CHAIN, chains[0].id, "context", bad)

    with pytest.raises(UnreadableRow, match="the row's context cannot be read"):
        chains[0].execute(dry_run=dry_run)

    assert chains[1].execute()["outcome"] == "moved"


@pytest.mark.parametrize("levels", [60, 99])
def test_what_is_deeper_than_what_is_accepted_now_is_still_read(make_dispatcher: shop.Make, levels: int) -> None:
    dispatcher, _, chains, deliveries = owing(make_dispatcher)
    deep = '{"a":' * levels + "1" + "}" * levels
    write_raw(dispatcher, CHAIN, chains[0].id, "context", deep)
    write_raw(dispatcher, DELIVERY, deliveries[0].id, "context", deep)

    assert shop.attempt(dispatcher, deliveries[0]).outcome == "delivered"
    assert [delivery.context for delivery in chains[0].deliveries] == [None]
    write_raw(dispatcher, CHAIN, chains[0].id, "request", json.dumps({"context": json.loads(deep)}))
    assert [result.outcome for result in dispatcher.execute_chains([chains[0].id])] == ["none"]


# --- deliveries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["context", "kwargs", "chain"])
@pytest.mark.parametrize("on_dead", ["hold", "skip"])
def test_a_delivery_whose_rows_cannot_be_read_is_held_alone(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, bad: str, place: str, on_dead: str
) -> None:
    dispatcher, sink, chains, deliveries = owing(make_dispatcher, on_dead=on_dead)
    table, row_id, column = DELIVERY, deliveries[0].id, place
    if place == "chain":
        table, row_id, column = CHAIN, chains[0].id, "context"
    write_raw(dispatcher, table, row_id, column, bad)

    results = dispatcher.deliver([Owed(delivery.id, 1) for delivery in deliveries])

    assert [result.outcome for result in results] == ["held", *["delivered"] * 4]
    assert len(sink) == 4
    row = delivery_row(dispatcher, deliveries[0].id)
    assert (row.status, row.publish_after) == ("held", None), "the relay leaves it to a person"
    assert "cannot be read" in row.last_error and column in row.last_error
    assert shop.actions(chains[0])[-1] == "held"
    (line,) = lines(caplog, "attempt_held")
    assert (line.chain_id, line.delivery_id) == (chains[0].id, deliveries[0].id)
    assert len(caplog.text) < 20_000

    write_raw(dispatcher, table, row_id, column, "{}")
    chains[0].refresh().retry_delivery("ada")
    assert shop.attempt(dispatcher, deliveries[0], 2).outcome == "delivered" and len(sink) == 5
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("name", ["cancel", "skip"])
def test_a_person_can_decide_about_rows_that_cannot_be_read(make_dispatcher: shop.Make, bad: str, name: str) -> None:
    dispatcher, _, chains, deliveries = owing(make_dispatcher)
    for column in ("context", "kwargs"):
        write_raw(dispatcher, DELIVERY, deliveries[0].id, column, bad)
    for column in ("context", "request"):
        write_raw(dispatcher, CHAIN, chains[0].id, column, bad)

    chains[0].disable("ada")
    chains[0].enable("ada")
    getattr(chains[0], f"{name}_delivery")("ada")
    chains[0].reset("ada")

    assert chains[0].state == NEW
    assert dispatcher.erase_resource(chains[0].resources[0]) == 1


# --- listings --------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_read_are_listed_with_the_others(make_dispatcher: shop.Make, bad: str) -> None:
    dispatcher, _, chains, deliveries = owing(make_dispatcher)
    for column in ("context", "kwargs"):
        write_raw(dispatcher, DELIVERY, deliveries[0].id, column, bad)
    for column in ("context", "request"):
        write_raw(dispatcher, CHAIN, chains[0].id, column, bad)
    shop.change_chain(dispatcher, chains[1].id, pending_delivery_id=None)

    assert [chain.id for chain in dispatcher.find_chains()] == [chain.id for chain in chains]
    assert {delivery.id for delivery in dispatcher.find_deliveries()} == {delivery.id for delivery in deliveries}
    assert [delivery.id for delivery in chains[0].deliveries] == [deliveries[0].id]
    assert dispatcher.chain(chains[0].id or 0).state == NEW
    explained = chains[0].explain()
    assert (explained["outcome"], explained["delivery"]["id"]) == ("guard_failed", deliveries[0].id)
    assert "cannot be read" in explained["detail"]
    dispatcher.examine()
    write_raw(dispatcher, CHAIN, chains[1].id, "context", bad)
    write_raw(dispatcher, DELIVERY, deliveries[1].id, "context", bad)
    dispatcher.repair()
    assert delivery_row(dispatcher, deliveries[1].id).status == "cancelled"


# --- the relay reads -------------------------------------------------------------------------------------------------


def test_the_relay_reads_no_json(make_dispatcher: shop.Make, broker_url: str, bad: str) -> None:
    dispatcher, _, chains, deliveries = owing(make_dispatcher)
    for chain, delivery in zip(chains, deliveries, strict=True):
        write_raw(dispatcher, CHAIN, chain.id, "context", bad)
        write_raw(dispatcher, CHAIN, chain.id, "request", bad)
        write_raw(dispatcher, DELIVERY, delivery.id, "context", bad)
        write_raw(dispatcher, DELIVERY, delivery.id, "kwargs", bad)
    for delivery in deliveries[:2]:
        shop.wait_over(dispatcher, delivery)
    for delivery in deliveries[2:]:
        shop.crashed(dispatcher, delivery)
    shop.take_messages(broker_url, shop.CALLBACKS)

    assert dispatcher.relay() == {"relayed": 5, "settled": 3}, "a first lost attempt is made again at once"

    assert [delivery_row(dispatcher, delivery.id).status for delivery in deliveries] == ["pending"] * COUNT


# --- the relay settles -----------------------------------------------------------------------------------------------


class Own(RetryPolicy):
    """A policy of a user's own; it gives what `wait()` gives."""

    wait: Callable[[], Any] = staticmethod(lambda: None)

    def delay(self, attempt: int, random: Callable[[], float]) -> timedelta:
        return type(self).wait()  # type: ignore[no-any-return]


def own_policy(wait: Callable[[], Any]) -> RetryPolicy:
    policy: RetryPolicy = type("Own", (Own,), {"wait": staticmethod(wait)})()
    return policy


async def promise() -> timedelta:
    return timedelta(0)


ANSWERS: Final[dict[str, Callable[[], Any]]] = {
    "raises": shop.Raises(OSError("no network")),
    "nothing": lambda: None,
    "a number": lambda: 10.0,
    "not a number": lambda: float("nan"),
    "negative": lambda: timedelta(seconds=-5),
    "a coroutine": promise,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_policy_that_gives_no_wait_does_not_keep_a_settlement_from_its_delivery(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    retrying = shop.transition("Retrying", "reminded", retry=own_policy(ANSWERS[name]))
    dispatcher, _, _, deliveries = owing(make_dispatcher, retrying)
    for delivery in deliveries:
        shop.crashed(dispatcher, delivery, attempt=2, unknown=True)  # an earlier one was lost, so this one waits

    assert dispatcher.relay() == {"relayed": 0, "settled": COUNT}

    waiting = dispatcher.find_deliveries()
    assert [delivery.status for delivery in waiting] == ["pending"] * COUNT
    with dispatcher.database.read() as connection:
        now = dispatcher.database.machine_now(connection)
    for delivery in waiting:  # the default policy's 30 s after the second attempt, spread by a fifth
        assert delivery.next_attempt_at is not None
        assert timedelta(seconds=10) < delivery.next_attempt_at - now < timedelta(seconds=40)
    assert len(lines(caplog, "retry_delay_ignored")) == COUNT


def test_a_settlement_that_fails_is_set_aside_and_the_others_are_written(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher, _, chains, deliveries = owing(make_dispatcher, on_dead="skip")
    for delivery in deliveries:
        shop.crashed(dispatcher, delivery, attempt=delivery.max_attempts)
    with dispatcher.database.read() as connection:
        version = connection.execute(select(CHAIN.c.version).where(CHAIN.c.id == chains[2].id)).scalar_one()
    history_of_another_tool = {
        "chain_id": chains[2].id,
        "chain_version": version + 1,
        "move_version": version + 1,  # which is unique
        "action": "state_transition",
        "created_at": shop.START,
    }
    dispatcher.database.write(lambda connection: connection.execute(insert(EVENT).values(history_of_another_tool)))

    assert dispatcher.relay() == {"relayed": 0, "settled": 4, "failed": 1}

    statuses = [delivery_row(dispatcher, delivery.id).status for delivery in deliveries]
    assert statuses == ["skipped", "skipped", "running", "skipped", "skipped"]
    assert state_of(dispatcher, chains[2]).pending_delivery_id == deliveries[2].id
    (line,) = lines(caplog, "settle_failed")
    assert (line.chain_id, line.delivery_id, line.levelno) == (chains[2].id, deliveries[2].id, logging.ERROR)
    assert line.exc_info is not None
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}, "looked at again after the grace"


class Trap:
    """An attribute that raises once it is armed, also when it is asked of the class."""

    armed = False

    def __get__(self, instance: object, owner: type) -> None:
        if self.armed:
            raise LookupError("this verify cannot even be read")


def test_a_definition_that_raises_is_set_aside(make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture) -> None:
    trap = Trap()
    trapped = shop.transition("Trapped", "reminded", verify=trap)
    dispatcher, _, chains, deliveries = owing(make_dispatcher, trapped)
    other = shop.new_chain(dispatcher, COUNT)
    lost = shop.planned(dispatcher, other)
    shop.wait_over(dispatcher, lost)
    shop.crashed(dispatcher, deliveries[0])
    trap.armed = True

    assert dispatcher.relay() == {"relayed": 1, "settled": 0, "failed": 1}

    assert [line.delivery_id for line in lines(caplog, "settle_failed")] == [deliveries[0].id]
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}
    trap.armed = False
    shop.change_delivery(dispatcher, deliveries[0].id, publish_after=shop.LONG_AGO)
    assert dispatcher.relay()["settled"] == 1
    assert delivery_row(dispatcher, deliveries[0].id).status == "pending" and chains[0].refresh().state == NEW


def test_no_connection_is_in_use_while_the_relay_asks_user_code(make_dispatcher: shop.Make) -> None:
    in_use: list[Any] = []

    def wait() -> timedelta:
        in_use.append(dispatcher.database.engine.pool.checkedout())  # type: ignore[attr-defined]
        return timedelta(seconds=7)

    retrying = shop.transition("Retrying", "reminded", retry=own_policy(wait))
    dispatcher, _, _, deliveries = owing(make_dispatcher, retrying)
    for delivery in deliveries:
        shop.crashed(dispatcher, delivery, unknown=True)

    dispatcher.relay()

    assert in_use == [0] * COUNT


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_conflict_reruns_the_settlements_and_sets_nothing_aside(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=shop.Sink(), on_dead="skip")
    dispatcher = make_dispatcher(config)
    chains = [shop.new_chain(dispatcher, number) for number in range(2)]
    for chain in chains:
        delivery = shop.planned(dispatcher, chain)
        shop.crashed(dispatcher, delivery, attempt=delivery.max_attempts)
    settle, calls = relay.settle_lost, []

    def meets_a_deadlock(connection: Connection, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:  # what the first has written is undone with it
            connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END $$"))
        return settle(connection, *arguments, **options)

    monkeypatch.setattr(relay, "settle_lost", meets_a_deadlock)

    assert dispatcher.relay() == {"relayed": 0, "settled": 2}

    assert len(calls) == 4, "both again"
    assert [chain.refresh().state for chain in chains] == ["reminded"] * 2
    shop.assert_consistent(dispatcher)


# --- failed attempts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ANSWERS, "a year"])
def test_a_policy_that_gives_no_wait_does_not_keep_a_failed_attempt_from_being_recorded(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    policy = own_policy({**ANSWERS, "a year": lambda: timedelta(days=365)}[name])
    retrying = shop.transition("Retrying", "reminded", retry=policy)
    callback = shop.Raises(OSError("mail server is down"), times=1)
    dispatcher, _, _, deliveries = owing(make_dispatcher, retrying, callback=callback)

    results = dispatcher.deliver([Owed(delivery.id, 1) for delivery in deliveries])

    assert [result.outcome for result in results] == ["retrying", *["delivered"] * 4]
    row = delivery_row(dispatcher, deliveries[0].id)
    assert row.status == "pending" and "mail server is down" in row.last_error
    assert results[0].retry_seconds is None if name == "a year" else 8 <= (results[0].retry_seconds or 0) <= 12
    (line,) = lines(caplog, "retry_delay_ignored")
    assert line.delivery_id == deliveries[0].id
