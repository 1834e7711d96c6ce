"""Pausing a chain type parks what it owes; resuming frees it, slowly if asked; whatever is written at the same time."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select, text, update

from dispatcher import NEW, Chain, ConfigurationError, Dispatcher, RetryPolicy
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.passes import parking
from dispatcher.states import WaitsFor
from dispatcher.storage import chain_types, database, deliveries, overdue, pauses
from dispatcher.storage.clock import shift
from dispatcher.storage.database import Database
from dispatcher.storage.models import ChainRow
from tests.integration import shop
from tests.servers import wait_until

pytestmark = pytest.mark.integration

Remind = shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=3))
REASON = "its chain type is paused"
TYPE, OTHER = shop.CHAIN_TYPE, "trial"

with_row_locks = pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
"""Where two transactions can write at the same time."""


class Died(BaseException):
    """The process dies."""


def config(**options: Any) -> dict[str, Any]:
    common = {"transitions": {NEW: [Remind], "reminded": [shop.Never]}, "callback": shop.Sink(), **options}
    return {"chains": [{"chain_type": TYPE, **common}, {"chain_type": OTHER, **common}]}


@pytest.fixture
def dispatcher(make_dispatcher: shop.Make) -> Dispatcher:
    return make_dispatcher(config())


def owed(dispatcher: Dispatcher, number: int = 0, **values: Any) -> DeliveryRecord:
    """The pending delivery of a new chain."""
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher, number))
    if values:
        shop.change_delivery(dispatcher, delivery.id, **values)
    return delivery


def read(dispatcher: Dispatcher, delivery: DeliveryRecord) -> DeliveryRecord:
    (found,) = dispatcher.find_deliveries(delivery_ids=[delivery.id])
    return found


def is_parked(dispatcher: Dispatcher, *wanted: DeliveryRecord) -> list[bool]:
    """Which of these are parked and say so; a delivery that is parked by half is an error."""
    found = [read(dispatcher, delivery) for delivery in wanted]
    for one in found:
        assert one.status == "pending"
        assert (one.publish_after is None) == (one.waits_for == "paused") == (one.waits_reason == REASON), one
    return [one.publish_after is None for one in found]


def begun(dispatcher: Dispatcher, delivery: DeliveryRecord) -> DeliveryRecord:
    """The delivery with an attempt that runs."""
    number = delivery.attempt + 1
    dispatcher._services.store.begin([Owed(delivery.id, number)], lease_seconds=60)
    found = read(dispatcher, delivery)
    assert (found.status, found.attempt) == ("running", number)
    return found


def fail(dispatcher: Dispatcher, running: DeliveryRecord, seconds: float = 30) -> bool:
    """The end of an attempt that failed, as a worker writes it."""
    return dispatcher.database.write(
        lambda connection: deliveries.retry(connection, running, seconds=seconds, grace_seconds=0, error="down")
    )


def refuse(dispatcher: Dispatcher, running: DeliveryRecord) -> bool:
    """What a worker writes that begins an attempt and then sees that its type is paused."""
    return dispatcher.database.write(
        lambda connection: deliveries.postpone(connection, running, what=WaitsFor.PAUSED, reason=REASON, seconds=0)
    )


def set_paused(dispatcher: Dispatcher, *, paused: bool) -> None:
    """The first or middle step of a pause or resume alone, as one that died behind it."""
    dispatcher.database.write(
        lambda connection: chain_types.set_paused(connection, TYPE, paused=paused, requested_by=None, reason="a test")
    )


# --- interleavings ---------------------------------------------------------------------------------------------------


@contextmanager
def uncommitted(work: Callable[[], Any]) -> Iterator["Future[Any]"]:
    """`work` in a thread, its first transaction written and not committed while the block runs."""
    gate, owner, commit = shop.Gate(), [], database.commit

    def halted(step: Callable[[], Any]) -> Any:
        if threading.get_ident() in owner:
            gate.wait()
        return commit(step)

    def run() -> Any:
        owner.append(threading.get_ident())
        return work()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "commit", halted)
        with gate.during(run) as future:
            yield future


_WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'",
    "mariadb": "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'",
}


@pytest.fixture
def blocked(database_url: str) -> Iterator[Callable[[Callable[[], Any]], "Future[Any]"]]:
    """`blocked(work)` begins it in a thread and returns when it is seen to wait for a row of another transaction."""
    watcher = Database(database_url)

    def waits() -> bool:
        with watcher.read() as connection:
            kind = "postgresql" if watcher.dialect == "postgresql" else "mariadb"
            return int(connection.execute(text(_WAITING[kind])).one()[-1]) > 0

    def begin(work: Callable[[], Any]) -> "Future[Any]":
        future = pool.submit(work)
        wait_until(lambda: future.done() or waits(), seconds=shop.WAIT_SECONDS, what="it waits for a row")
        assert not future.done(), f"did not wait: {future.exception() or future.result()!r}"
        return future

    with ThreadPoolExecutor() as pool:
        yield begin
    watcher.dispose()


def before(patch: pytest.MonkeyPatch, name: str, act: Callable[[], Any], *, call: int = 1) -> None:
    """Do `act` before the `call`-th transaction or page that a function of `pauses` gets."""
    function, write, calls = getattr(pauses, name), Database.write, []

    def count() -> None:
        calls.append(name)
        if len(calls) == call:
            act()

    def reading(*arguments: Any, **options: Any) -> Any:
        count()
        return function(*arguments, **options)

    def writing(rows: Database, work: Any) -> Any:
        if getattr(work, "func", None) is function:
            count()
        return write(rows, work)

    if name in ("to_park", "parked"):
        patch.setattr(pauses, name, reading)
    else:
        patch.setattr(Database, "write", writing)


def unaware(dispatcher: Dispatcher) -> Dispatcher:
    """A worker that has asked which types are paused, and asks no more."""
    paused = dispatcher._services.executor._paused
    assert TYPE not in paused
    paused._known_until = math.inf
    return dispatcher


def die() -> None:
    raise Died


# --- a pause ---------------------------------------------------------------------------------------------------------


def test_a_pause_parks_what_is_owed_of_its_type_and_a_resume_frees_it(
    dispatcher: Dispatcher, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "_PAGE", 3)
    monkeypatch.setattr(parking, "_BATCH", 2)
    mine = [owed(dispatcher, number) for number in range(8)]
    other = shop.planned(dispatcher, shop.new_chain(dispatcher, chain_type=OTHER))
    running = begun(dispatcher, mine[7])
    shop.take_messages(broker_url, shop.CALLBACKS)

    assert dispatcher.pause(TYPE, "mail is down") is True

    assert is_parked(dispatcher, *mine[:7], other) == [True] * 7 + [False]
    assert read(dispatcher, running).status == "running"
    for delivery in mine[:7]:
        assert shop.attempt(dispatcher, delivery).outcome == "deferred"
    with shift(timedelta(minutes=5)):
        assert dispatcher.relay()["relayed"] == 1, "the other type's, and none of what is parked"

    assert dispatcher.resume(TYPE) is True

    assert is_parked(dispatcher, *mine[:7]) == [False] * 7
    assert {read(dispatcher, delivery).waits_for for delivery in mine} == {None}
    assert dispatcher.relay()["relayed"] == 7
    assert {shop.attempt(dispatcher, delivery).outcome for delivery in mine[:7]} == {"delivered"}
    assert unfinished(dispatcher) == set()
    shop.assert_consistent(dispatcher)


def unfinished(dispatcher: Dispatcher) -> set[str]:
    """The types of which a resume has something left to free."""
    with dispatcher.database.read() as connection:
        return set(pauses.read_notes(connection, pauses.Notes.RESUMES))


def test_a_type_without_a_row_is_not_paused(dispatcher: Dispatcher) -> None:
    running = begun(dispatcher, owed(dispatcher))

    fail(dispatcher, running)

    found = read(dispatcher, running)
    assert (found.waits_for, is_parked(dispatcher, running)) == ("retry", [False])


def test_every_write_of_a_pending_delivery_of_a_paused_type_parks_it(dispatcher: Dispatcher) -> None:
    def wait(what: WaitsFor) -> Callable[[Any, DeliveryRecord], Any]:
        return lambda connection, one: deliveries.postpone(connection, one, what=what, reason="x", seconds=9)

    writes: list[Callable[[Any, DeliveryRecord], Any]] = [
        lambda connection, one: deliveries.retry(connection, one, seconds=9, grace_seconds=1, error="down"),
        wait(WaitsFor.RATE),
        wait(WaitsFor.HOURS),
        wait(WaitsFor.DEFINITION),
        lambda connection, one: deliveries.give_back(connection, one, grace_seconds=0),
    ]
    running = [begun(dispatcher, owed(dispatcher, number)) for number in range(len(writes) + 1)]
    lost = running.pop()
    shop.change_delivery(dispatcher, lost.id, uncalled=None, **shop.LAPSED)
    set_paused(dispatcher, paused=True)

    for write, one in zip(writes, running, strict=True):
        dispatcher.database.write(lambda connection, write=write, one=one: write(connection, one))
    dispatcher.relay()

    assert is_parked(dispatcher, *running, lost) == [True] * (len(writes) + 1)
    assert read(dispatcher, lost).unknown


def test_a_refused_begin_of_a_type_that_was_resumed_meanwhile_is_not_parked(dispatcher: Dispatcher) -> None:
    dispatcher.pause(TYPE, "mail is down")
    dispatcher.resume(TYPE)
    running = begun(dispatcher, owed(dispatcher))

    refuse(dispatcher, running)

    assert is_parked(dispatcher, running) == [False] and read(dispatcher, running).waits_for is None


def test_a_type_that_its_budget_has_paused_parks_what_is_refused_or_what_a_pause_finds(
    make_dispatcher: shop.Make,
) -> None:
    dispatcher = make_dispatcher(config(max_plans_per_hour=2))
    first, second = owed(dispatcher, 1), owed(dispatcher, 2)
    assert dispatcher.execute_chains([shop.new_chain(dispatcher, 3).id])[0].outcome == "paused"

    refuse(dispatcher, begun(dispatcher, first))
    assert is_parked(dispatcher, first, second) == [True, False]
    assert dispatcher.pause(TYPE, "by hand, too") is False
    assert is_parked(dispatcher, first, second) == [True, True]

    dispatcher.resume(TYPE)
    assert is_parked(dispatcher, first, second) == [False, False]


def test_workers_notice_a_pause_within_two_seconds_however_slow_the_answer(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, now = dispatcher._services.executor._paused, [100.0]
    asked: list[float] = []
    found = chain_types.paused_types

    def slowly(connection: Any) -> Any:
        asked.append(now[0])
        names = found(connection)
        now[0] += 1.5
        return names

    monkeypatch.setattr("dispatcher.execution.paused.time.monotonic", lambda: now[0])
    monkeypatch.setattr(chain_types, "paused_types", slowly)
    assert TYPE not in paused
    now[0] = 101.9
    assert TYPE not in paused
    set_paused(dispatcher, paused=True)
    now[0] = 102.0

    assert TYPE in paused and asked == [100.0, 102.0]


# --- a pause against what is written at the same time ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["retry", "plan", "refusal", "operator's retry", "enabling"])
def test_what_is_written_between_the_pause_and_its_parking_is_parked(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    dispatcher = unaware(make_dispatcher(config()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain) if what != "plan" else None
    if what in ("retry", "refusal"):
        running = begun(dispatcher, delivery)
    if what == "operator's retry":
        shop.change_delivery(dispatcher, delivery.id, status="dead", publish_after=None, next_attempt_at=None)
    if what == "enabling":
        chain.disable()
    acts: dict[str, Callable[[], Any]] = {
        "retry": lambda: fail(dispatcher, running),
        "plan": lambda: shop.planned(dispatcher, chain),  # by a worker that has not noticed the pause yet
        "refusal": lambda: refuse(dispatcher, running),
        "operator's retry": lambda: chain.refresh().retry_delivery("ada"),
        "enabling": chain.enable,
    }
    before(monkeypatch, "to_park", acts[what])

    dispatcher.pause(TYPE, "mail is down")

    found = shop.delivery_of(dispatcher, chain)
    assert is_parked(dispatcher, found) == [True]
    dispatcher.resume(TYPE)
    assert is_parked(dispatcher, found) == [False]


@with_row_locks
def test_a_failure_beside_a_pause_that_is_not_committed_is_parked_by_it(dispatcher: Dispatcher) -> None:
    running = begun(dispatcher, owed(dispatcher))
    dispatcher.resume(TYPE)
    set_paused(dispatcher, paused=False)

    with uncommitted(lambda: dispatcher.pause(TYPE, "mail is down")) as paused:
        assert fail(dispatcher, running), "it waits for nobody"
        assert is_parked(dispatcher, running) == [False]

    assert paused.result() is True
    assert is_parked(dispatcher, running) == [True]


def test_a_plan_behind_the_parking_is_parked_when_its_begin_is_refused(make_dispatcher: shop.Make) -> None:
    worker, person = unaware(make_dispatcher(config())), make_dispatcher(config())
    person.pause(TYPE, "mail is down")

    delivery = owed(worker)
    assert is_parked(worker, delivery) == [False]
    refuse(worker, begun(worker, delivery))

    assert is_parked(worker, delivery) == [True]


@with_row_locks
def test_a_delivery_that_a_relay_is_just_claiming_is_parked(
    dispatcher: Dispatcher, blocked: Callable[..., "Future[Any]"]
) -> None:
    delivery = owed(dispatcher, publish_after=shop.LONG_AGO)

    def claim() -> Any:
        return dispatcher.database.write(
            lambda connection: overdue.claim_overdue(connection, limit=9, grace_seconds=60, lapse_seconds=9)
        )

    with uncommitted(claim) as claimed:
        paused = blocked(lambda: dispatcher.pause(TYPE, "mail is down"))

    assert claimed.result() and paused.result() is True
    assert is_parked(dispatcher, delivery) == [True]
    assert shop.attempt(dispatcher, delivery).outcome == "deferred", "the message that the relay publishes"
    assert is_parked(dispatcher, delivery) == [True]


@with_row_locks
def test_a_relay_does_not_claim_what_is_just_being_parked(dispatcher: Dispatcher) -> None:
    delivery = owed(dispatcher, publish_after=shop.LONG_AGO)
    set_paused(dispatcher, paused=True)

    with uncommitted(lambda: dispatcher.pause(TYPE, "again")):
        pass
    shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO, waits_for=None, waits_reason=None)
    with uncommitted(lambda: dispatcher.database.write(lambda connection: pauses.park(connection, [delivery.id]))):
        assert dispatcher.relay()["relayed"] == 0

    assert is_parked(dispatcher, delivery) == [True]


# --- a resume against what is written at the same time ---------------------------------------------------------------


WRITES = ["retry", "refusal", "operator's retry", "enabling"]


def paused_with(dispatcher: Dispatcher, what: str) -> tuple[Chain, Callable[[], Any]]:
    """A chain of a type that is paused then, and the act that writes its delivery."""
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    if what in ("retry", "refusal"):
        delivery = begun(dispatcher, delivery)
    elif what == "operator's retry":
        shop.change_delivery(dispatcher, delivery.id, status="dead", publish_after=None, next_attempt_at=None)
    else:
        chain.disable()
    dispatcher.pause(TYPE, "mail is down")
    acts: dict[str, Callable[[], Any]] = {
        "retry": lambda: fail(dispatcher, delivery, 0),
        "refusal": lambda: refuse(dispatcher, delivery),
        "operator's retry": lambda: chain.refresh().retry_delivery("ada"),
        "enabling": chain.enable,
    }
    return chain, acts[what]


@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_while_the_type_is_paused_stays_parked_until_it_is_resumed(
    dispatcher: Dispatcher, what: str
) -> None:
    chain, act = paused_with(dispatcher, what)

    act()

    delivery = shop.delivery_of(dispatcher, chain)
    assert is_parked(dispatcher, delivery) == [True]
    dispatcher.resume(TYPE)
    assert is_parked(dispatcher, delivery) == [False]
    shop.assert_consistent(dispatcher)


@with_row_locks
@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_beside_a_resume_that_is_not_committed_is_not_parked_for_ever(
    dispatcher: Dispatcher, blocked: Callable[..., "Future[Any]"], what: str
) -> None:
    chain, act = paused_with(dispatcher, what)

    with uncommitted(lambda: dispatcher.resume(TYPE)) as resumed:
        written = blocked(act)

    assert resumed.result() is True
    written.result()
    assert is_parked(dispatcher, shop.delivery_of(dispatcher, chain)) == [False]


@with_row_locks
@pytest.mark.parametrize("what", WRITES)
def test_a_resume_waits_for_who_has_just_parked_a_delivery_and_frees_it(
    dispatcher: Dispatcher, blocked: Callable[..., "Future[Any]"], what: str
) -> None:
    chain, act = paused_with(dispatcher, what)

    with uncommitted(act) as written:
        resumed = blocked(lambda: dispatcher.resume(TYPE))

    written.result()
    assert resumed.result() is True
    assert is_parked(dispatcher, shop.delivery_of(dispatcher, chain)) == [False]


def test_the_delivery_of_a_disabled_chain_stays_parked_until_it_is_enabled(dispatcher: Dispatcher) -> None:
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    dispatcher.pause(TYPE, "mail is down")
    chain.disable()

    dispatcher.resume(TYPE)

    found = read(dispatcher, delivery)
    assert (found.publish_after, found.waits_for) == (None, None)
    assert shop.attempt(dispatcher, delivery).outcome == "disabled"
    chain.enable()
    assert shop.attempt(dispatcher, delivery).outcome == "delivered"


@with_row_locks
@pytest.mark.parametrize("disabled", [True, False])
def test_a_chain_that_is_just_disabled_or_enabled_while_its_delivery_is_freed(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """Its row is locked, so the delivery is left to the sweep, and is what the chain is then."""
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    if not disabled:
        chain.disable()
    dispatcher.pause(TYPE, "mail is down")
    set_paused(dispatcher, paused=False)

    def lock(connection: Any) -> None:
        values = update(ChainRow).where(ChainRow.id == chain.id).values(disabled=disabled)
        connection.execute(values)

    with uncommitted(lambda: dispatcher.database.write(lock)):
        assert dispatcher.resume(TYPE) is False
        assert read(dispatcher, delivery).waits_for == "paused"
    dispatcher.sweep()

    found = read(dispatcher, delivery)
    assert (found.publish_after is None, found.waits_for) == (disabled, None)


@pytest.mark.parametrize("call", [1, 2])
def test_a_pause_while_a_resume_frees_keeps_or_parks_everything(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    monkeypatch.setattr(parking, "_BATCH", 1)
    owing = [owed(dispatcher, number) for number in range(3)]
    dispatcher.pause(TYPE, "mail is down")
    before(monkeypatch, "free", lambda: dispatcher.pause(TYPE, "down again"), call=call)

    assert dispatcher.resume(TYPE) is True

    assert is_parked(dispatcher, *owing) == [True] * 3
    assert dispatcher.resume(TYPE) is True
    assert is_parked(dispatcher, *owing) == [False] * 3


def test_a_resume_while_a_pause_parks_leaves_nothing_parked(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "_BATCH", 1)
    owing = [owed(dispatcher, number) for number in range(3)]
    before(monkeypatch, "park", lambda: dispatcher.resume(TYPE), call=2)

    assert dispatcher.pause(TYPE, "mail is down") is True

    assert is_parked(dispatcher, *owing) == [False] * 3


def test_pauses_and_resumes_at_once_leave_what_the_last_of_them_means(make_dispatcher: shop.Make) -> None:
    dispatchers = [make_dispatcher(config()) for _ in range(4)]
    owing = [owed(dispatchers[0], number) for number in range(20)]

    results = shop.at_once(
        *(
            (lambda one=one: one.pause(TYPE, "down")) if number % 2 else (lambda one=one: one.resume(TYPE, spread=60))  # type: ignore[misc]
            for number, one in enumerate(dispatchers)
        )
    )

    assert not [one for one in results if isinstance(one, BaseException)], results
    (row,) = dispatchers[0].find_types()
    if not row.paused:
        assert is_parked(dispatchers[0], *owing) == [False] * 20
    dispatchers[0].pause(TYPE, "down")
    assert is_parked(dispatchers[0], *owing) == [True] * 20
    dispatchers[0].resume(TYPE)
    assert is_parked(dispatchers[0], *owing) == [False] * 20


# --- the rest of a wait ----------------------------------------------------------------------------------------------


def test_a_resume_keeps_the_rest_of_a_longer_wait(dispatcher: Dispatcher) -> None:
    soon, late = (begun(dispatcher, owed(dispatcher, number)) for number in range(2))
    fail(dispatcher, soon, 1)
    fail(dispatcher, late, 3000)
    wait = read(dispatcher, late).next_attempt_at
    dispatcher.pause(TYPE, "mail is down")

    with shift(timedelta(minutes=10)):
        dispatcher.resume(TYPE)

    found = read(dispatcher, late)
    assert found.next_attempt_at == found.publish_after == wait
    assert found.waits_since is not None and found.waits_since > datetime.now(UTC) + timedelta(minutes=9)
    found = read(dispatcher, soon)
    assert found.next_attempt_at is not None and abs(found.next_attempt_at - found.waits_since) < timedelta(seconds=1)


# --- spread ----------------------------------------------------------------------------------------------------------


def due_chains(dispatcher: Dispatcher, count: int) -> None:
    """So many due chains, each due at a moment of its own."""
    rows = [
        {
            "chain_type": TYPE,
            "resource_key": f"{number:064}",
            "state": NEW,
            "due_at": shop.START - timedelta(seconds=number),
            "created_at": shop.START,
            "updated_at": shop.START,
        }
        for number in range(count)
    ]
    dispatcher.database.write(lambda connection: connection.execute(ChainRow.__table__.insert(), rows))


def dues(dispatcher: Dispatcher) -> list[datetime]:
    """When the chains are due, those first that were due the longest."""
    with dispatcher.database.read() as connection:
        return list(connection.execute(select(ChainRow.due_at).order_by(ChainRow.resource_key.desc())).scalars())


@pytest.mark.parametrize("count", [1, 150, 1000])
def test_due_chains_are_spread_evenly_in_the_order_of_their_due_times(make_dispatcher: shop.Make, count: int) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(config(), clock=clock)
    due_chains(dispatcher, count)
    dispatcher.pause(TYPE, "mail is down")

    assert dispatcher.resume(TYPE, spread=timedelta(hours=2)) is True

    found = dues(dispatcher)
    steps = min(count, 200)
    assert found == sorted(found) and len(set(found)) == steps
    assert (found[0], found[-1]) == (shop.START + timedelta(hours=2) / steps, shop.START + timedelta(hours=2))
    gaps = {round((later - earlier).total_seconds()) for earlier, later in pairwise(sorted(set(found)))}
    assert gaps <= {round(7200 / steps)}
    assert dispatcher.sweep()["due"] == 0
    clock.forward(hours=1)
    assert abs(dispatcher.sweep()["due"] - count // 2) <= 1


def test_what_must_not_be_due_is_not_spread(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(config(), clock=clock)
    chains = due, disabled, pending, later, resting = [shop.new_chain(dispatcher, number) for number in range(5)]
    disabled.disable()
    shop.planned(dispatcher, pending)
    shop.change_chain(dispatcher, later.id, due_at=shop.START + timedelta(days=3))
    shop.change_chain(dispatcher, resting.id, due_at=None)
    other = shop.new_chain(dispatcher, chain_type=OTHER)
    kept = [shop.row_of(dispatcher, chain.id) for chain in (*chains[1:], other)]
    dispatcher.pause(TYPE, "mail is down")

    dispatcher.resume(TYPE, spread=3600)

    assert [shop.row_of(dispatcher, chain.id) for chain in (*chains[1:], other)] == kept
    assert due.refresh().due_at == shop.START + timedelta(hours=1)


def test_a_chain_that_is_enqueued_while_others_are_spread_stays_due(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(config(), clock=clock)
    due_chains(dispatcher, 3)
    first, *_ = dispatcher.find_chains(limit=1)
    dispatcher.pause(TYPE, "mail is down")

    def enqueue() -> None:
        clock.forward(seconds=1)
        first.enqueue()

    before(monkeypatch, "spread_due", enqueue, call=2)
    dispatcher.resume(TYPE, spread=3600)

    assert first.refresh().due_at == shop.START + timedelta(seconds=1)


@with_row_locks
def test_a_chain_that_an_application_holds_is_not_waited_for(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(config(), clock=shop.Clock())
    held, free = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    dispatcher.pause(TYPE, "mail is down")

    def hold(connection: Any) -> None:
        connection.execute(select(ChainRow.id).where(ChainRow.id == held.id).with_for_update())

    with uncommitted(lambda: dispatcher.database.write(hold)):
        dispatcher.resume(TYPE, spread=3600)

    assert (held.refresh().due_at, free.refresh().due_at) == (shop.START, shop.START + timedelta(hours=1))


def test_parked_deliveries_continue_evenly_over_the_same_time(dispatcher: Dispatcher) -> None:
    owing = [owed(dispatcher, number) for number in range(10)]
    waiting = begun(dispatcher, owed(dispatcher, 10))
    dispatcher.pause(TYPE, "mail is down")
    fail(dispatcher, waiting, 9000)

    dispatcher.resume(TYPE, spread=timedelta(hours=1.1))

    found = [read(dispatcher, one) for one in owing]
    waits = [(one.next_attempt_at - one.waits_since).total_seconds() for one in found]
    assert [round(wait) for wait in waits] == [360 * number for number in range(1, 11)]
    assert all(timedelta(0) <= one.publish_after - one.next_attempt_at < timedelta(seconds=1) for one in found)
    late = read(dispatcher, waiting)
    assert 8000 < (late.next_attempt_at - late.waits_since).total_seconds() <= 9000
    assert {one.outcome for one in dispatcher.deliver([Owed(one.id, 1) for one in owing])} == {"stale"}


def test_other_candidates_make_no_spread_chain_due_before_the_time_is_over(make_dispatcher: shop.Make) -> None:
    """A type is often paused for a wrong guard, and resumed when workers with another one run."""
    clock = shop.Clock()
    old = make_dispatcher(config(), clock=clock)
    due_chains(old, 10)
    old.sweep()
    old.pause(TYPE, "the guard is wrong")
    changed = {NEW: [Remind, shop.OnRequest], "reminded": [shop.Never]}
    new = make_dispatcher(config(transitions=changed), clock=clock)

    new.resume(TYPE, spread=3600)
    spread = dues(new)
    new.sweep()
    assert dues(new) == spread and max(spread) == shop.START + timedelta(hours=1)
    assert new.sweep(dry_run=True)["would_wake"] == 0
    shop.change_chain(new, new.find_chains(limit=1)[0].id, due_at=None)

    clock.forward(hours=1)
    assert new.sweep()["due"] == 10, "and then all are asked"
    with new.database.read() as connection:
        assert pauses.read_notes(connection, pauses.Notes.SPREADS) == {}


def test_a_note_of_a_spread_that_lies_too_far_ahead_is_not_believed(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock(shop.START + timedelta(days=2))
    old = make_dispatcher(config(), clock=clock)
    due_chains(old, 3)
    old.sweep()
    old.pause(TYPE, "the guard is wrong")
    old.resume(TYPE, spread=3600)
    clock.now = shop.START

    make_dispatcher(config(transitions={NEW: [Remind, shop.Never]}), clock=clock).sweep()

    assert dues(old) == [shop.START] * 3


def test_a_first_sweep_wakes_no_chains_of_a_type_that_was_paused_before_it(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(config(transitions={NEW: [shop.OnRequest]}))
    chain = shop.new_chain(dispatcher)
    dispatcher.execute_chains([chain.id])
    dispatcher.pause(TYPE, "mail is down")
    dispatcher.resume(TYPE)

    dispatcher.sweep()

    assert chain.refresh().due_at is None


def test_the_due_chains_of_a_type_that_is_not_paused_are_left_alone(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(config(), clock=shop.Clock())
    due_chains(dispatcher, 3)
    chains, actions = dues(dispatcher), dispatcher.find_actions()

    assert dispatcher.resume(TYPE, spread=3600) is False

    assert (dues(dispatcher), dispatcher.find_actions()) == (chains, actions)


@pytest.mark.parametrize("reason", [None, "it is back"])
def test_the_spread_is_noted_with_who_and_why(dispatcher: Dispatcher, reason: str | None) -> None:
    dispatcher.pause(TYPE, "mail is down")
    dispatcher.resume(TYPE, spread=timedelta(hours=2), requested_by="ada", reason=reason)

    latest, _ = dispatcher.find_actions()
    assert (latest.action, latest.requested_by) == ("resumed", "ada")
    assert latest.reason == "spread over 2:00:00" + (f": {reason}" if reason else "")


@pytest.mark.parametrize(
    "spread",
    [0, -1, 0.0, float("nan"), float("inf"), -0.5, True, "2h", 1e-9, timedelta(0), timedelta(seconds=-1),
     timedelta(days=366, microseconds=1), 366 * 86400 + 1, 1e300, 10**400, [], b"1"],
)  # fmt: skip
def test_a_spread_that_makes_no_sense_is_refused_by_name(dispatcher: Dispatcher, spread: Any) -> None:
    dispatcher.pause(TYPE, "mail is down")
    rows = shop.dump_rows(dispatcher)

    with pytest.raises(ConfigurationError, match="spread: must be a timedelta"):
        dispatcher.resume(TYPE, spread=spread)

    assert shop.dump_rows(dispatcher) == rows


@pytest.mark.parametrize("spread", [0.001, 366 * 86400, timedelta(days=366)])
def test_the_shortest_and_the_longest_spread(dispatcher: Dispatcher, spread: Any) -> None:
    owed(dispatcher, 1)
    shop.new_chain(dispatcher, 2)
    dispatcher.pause(TYPE, "mail is down")

    assert dispatcher.resume(TYPE, spread=spread) is True


# --- crashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "call"), [("to_park", 1), ("park", 1), ("park", 2), ("to_park", 2)])
def test_a_pause_that_died_is_finished_by_calling_it_again(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    monkeypatch.setattr(parking, "_PAGE", 2)
    owing = [owed(dispatcher, number) for number in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        before(patch, name, die, call=call)
        with pytest.raises(Died):
            dispatcher.pause(TYPE, "mail is down")
    assert not all(is_parked(dispatcher, *owing))
    (row,) = dispatcher.find_types()
    assert row.paused

    assert dispatcher.pause(TYPE, "mail is down") is False

    assert all(is_parked(dispatcher, *owing))


RESUME_CRASHES = [("parked", 1), ("free", 1), ("free", 3), ("parked", 2), ("remove_notes", 1)]


@pytest.mark.parametrize("by", ["resume", "sweep"])
@pytest.mark.parametrize(("name", "call"), RESUME_CRASHES)
@pytest.mark.parametrize("spread", [None, 3600])
def test_a_resume_that_died_behind_its_commit_is_finished_by_calling_it_again_or_by_the_sweep(
    dispatcher: Dispatcher, name: str, call: int, by: str, spread: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "_PAGE", 2)
    monkeypatch.setattr(parking, "_BATCH", 1)
    owing = [owed(dispatcher, number) for number in range(5)]
    dispatcher.pause(TYPE, "mail is down")
    with pytest.MonkeyPatch.context() as patch:
        before(patch, name, die, call=call)
        with pytest.raises(Died):
            dispatcher.resume(TYPE, spread=spread)
    (row,) = dispatcher.find_types()
    assert not row.paused
    left = sum(is_parked(dispatcher, *owing))
    assert left if name != "remove_notes" else not left

    with shift(timedelta(minutes=20)):
        if by == "sweep":
            dispatcher.sweep()
        else:
            assert dispatcher.resume(TYPE) is False

    assert is_parked(dispatcher, *owing) == [False] * 5
    assert unfinished(dispatcher) == set()
    moments = [one.next_attempt_at for one in (read(dispatcher, one) for one in owing)]
    end = datetime.now(UTC) + timedelta(seconds=spread or 1300)
    assert max(moments) <= end + timedelta(seconds=1)
    if spread and left:
        assert max(moments) > end - timedelta(minutes=1), "what was left of the time was used"


def test_a_resume_that_died_while_it_spread_is_finished_by_calling_it_again(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(config(), clock=clock)
    due_chains(dispatcher, 10)
    dispatcher.pause(TYPE, "mail is down")
    with pytest.MonkeyPatch.context() as patch:
        before(patch, "spread_due", die, call=5)
        with pytest.raises(Died):
            dispatcher.resume(TYPE, spread=3600)
    (row,) = dispatcher.find_types()
    assert row.paused, "nothing begins before all is spread"
    half = dues(dispatcher)
    assert sum(due_at > shop.START for due_at in half) == 4

    assert dispatcher.resume(TYPE, spread=3600) is True

    found = dues(dispatcher)
    assert found[:4] == half[:4], "what is spread already stays"
    assert found[4:] == [shop.START + timedelta(minutes=10 * number) for number in range(1, 7)]


def test_a_note_of_a_clock_that_was_wrong_makes_nobody_wait_longer_than_asked(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = owed(dispatcher)
    dispatcher.pause(TYPE, "mail is down")
    with pytest.MonkeyPatch.context() as patch, shift(timedelta(days=2)):
        before(patch, "free", die)
        with pytest.raises(Died):
            dispatcher.resume(TYPE, spread=60)

    dispatcher.sweep()

    found = read(dispatcher, delivery)
    assert found.next_attempt_at < datetime.now(UTC) + timedelta(minutes=2)


def test_a_dry_sweep_finishes_no_resume(dispatcher: Dispatcher) -> None:
    delivery = owed(dispatcher)
    dispatcher.pause(TYPE, "mail is down")
    with pytest.MonkeyPatch.context() as patch:
        before(patch, "free", die)
        with pytest.raises(Died):
            dispatcher.resume(TYPE)
    rows = shop.dump_rows(dispatcher)

    dispatcher.sweep(dry_run=True)

    assert shop.dump_rows(dispatcher) == rows
    assert read(dispatcher, delivery).waits_for == "paused"


def test_a_sweep_stops_freeing_when_its_time_ends_and_the_next_one_goes_on(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "_PAGE", 2)
    owing = [owed(dispatcher, number) for number in range(5)]
    dispatcher.pause(TYPE, "mail is down")
    with pytest.MonkeyPatch.context() as patch:
        before(patch, "free", die)
        with pytest.raises(Died):
            dispatcher.resume(TYPE)

    for freed in (2, 4):
        note, over = dispatcher._services.sweeper._parking.find_note(TYPE)
        assert note is not None
        dispatcher._services.sweeper._parking.free(TYPE, note, over, stop_at=0)
        assert is_parked(dispatcher, *owing).count(False) == freed
    dispatcher.sweep()
    assert unfinished(dispatcher) == set()
