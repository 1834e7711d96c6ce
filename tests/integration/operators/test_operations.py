"""What operators do to deliveries, chains, resources and chain types, while attempts begin and end."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, select, update

from dispatcher import (
    DONE,
    NEW,
    Chain,
    ChainDisabled,
    ChainPaused,
    ConfigurationError,
    DeliveryChanged,
    DeliveryPending,
    Dispatcher,
    NoOpenDelivery,
    RetryPolicy,
)
from dispatcher.domain.records import Owed, PlannedDelivery, Timing
from dispatcher.operators.operations import MapCounts
from dispatcher.storage import chains, database, deliveries, portable
from dispatcher.storage.database import Database
from dispatcher.storage.models import ChainRow, DeliveryRow, EventRow, ResourceRow
from tests.integration import shop
from tests.servers import PostgresServer, wait_until

pytestmark = pytest.mark.integration

Blocked = Callable[..., "Future[Any]"]

CUSTOMER = ("customer", "57844")
ROUNDS = 4
Remind = shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=2))
TRANSITIONS = {NEW: [Remind], "reminded": [shop.Never]}

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""Where another connection can be seen to wait for a row."""

OPERATIONS: dict[str, Callable[[Chain], Any]] = {
    "retry": lambda chain: chain.refresh().retry_delivery("ada"),
    "cancel": lambda chain: chain.refresh().cancel_delivery("ada"),
    "skip": lambda chain: chain.refresh().skip_delivery("ada"),
    "reset": lambda chain: chain.reset("ada"),
    "move_to": lambda chain: chain.move_to("reminded", "by letter", "ada"),
}
ENDING = [name for name in OPERATIONS if name != "retry"]


def customer_chain(dispatcher: Dispatcher, number: int) -> Chain:
    """The customer's chain for booking `number`."""
    return dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [CUSTOMER, ("online_booking", f"b{number}")])


def dead(dispatcher: Dispatcher, chain: Chain) -> Any:
    """The chain's delivery, out of attempts."""
    delivery = shop.planned(dispatcher, chain)
    for number in (1, 2):
        shop.attempt(dispatcher, delivery, number)
        if number == 1:
            shop.wait_over(dispatcher, delivery)
    delivery = shop.delivery_of(dispatcher, chain)
    assert delivery.status == "dead"
    return delivery


@contextmanager
def uncommitted(work: Callable[[], Any]) -> Iterator["Future[Any]"]:
    """`work` in a thread, its transaction written and not committed while the block runs."""
    gate, owner, commit = shop.Gate(), [], database.commit

    def halted(step: Callable[[], Any]) -> Any:
        if threading.get_ident() in owner:
            gate.wait()
        return commit(step)

    def in_a_transaction(rows: Database, statement: str, parameters: Any) -> Any:
        """As PostgreSQL itself does a statement that commits by itself, which nothing can halt in."""
        return rows.write(lambda connection: database.run_statement(connection, statement, parameters))

    def run() -> Any:
        owner.append(threading.get_ident())
        return work()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "commit", halted)
        patch.setattr(Database, "write_statement", in_a_transaction)
        with gate.during(run) as future:
            yield future


def then_open(gate: shop.Gate, work: Callable[[], Any]) -> Any:
    """What `work` gives; whoever waits at the gate goes on after it, however it ended."""
    try:
        return work()
    finally:
        gate.opened.set()


@pytest.fixture
def blocked(
    postgres_server: PostgresServer, database_url: str
) -> Iterator[Callable[[Callable[[], Any]], "Future[Any]"]]:
    """`blocked(work)` begins it in a thread and returns when it is seen to wait for another's row."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    name = database_url.rpartition("/")[2]

    def begin(work: Callable[[], Any], *, others: int = 0) -> "Future[Any]":
        future = pool.submit(work)
        with postgres_server.connect() as connection:
            wait_until(
                lambda: future.done() or connection.execute(query, [name]).fetchone() != (others,),
                seconds=shop.WAIT_SECONDS,
                what="it waits for a row",
            )
        assert not future.done(), f"did not wait: {future.exception() or future.result()!r}"
        return future

    with ThreadPoolExecutor() as pool:
        yield begin


# --- retry -----------------------------------------------------------------------------------------------------------


def test_retrying_a_dead_delivery_adds_attempts_and_never_takes_one_back(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    sink = shop.Sink(shop.Raises(OSError("mail server is down"), times=3))
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = dead(dispatcher, chain)
    version = shop.row_of(dispatcher, chain.id).version
    shop.take_messages(broker_url, shop.CALLBACKS)

    assert chain.refresh().retry_delivery("ada") is chain

    again = shop.delivery_of(dispatcher, chain)
    assert (again.status, again.attempt, again.max_attempts) == ("pending", 2, 4)
    assert shop.row_of(dispatcher, chain.id).version == version + 1
    last = chain.events[-1]
    assert (last.action, last.requested_by, last.value) == ("retried", "ada", "Remind")
    assert "mail server is down" in last.detail
    assert dispatcher.relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs["deliveries"] == [[delivery.id, 3]]
    assert shop.attempt(dispatcher, delivery, 3).outcome == "retrying"
    shop.wait_over(dispatcher, delivery)
    assert shop.attempt(dispatcher, delivery, 4).outcome == "delivered"
    assert {call.key for call in sink.calls} == {delivery.idempotency_key}
    shop.assert_consistent(dispatcher)


def test_retrying_one_that_waits_ends_the_wait_and_leaves_its_attempts(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError(), times=1))
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    assert shop.attempt(dispatcher, delivery).outcome == "retrying"
    assert shop.attempt(dispatcher, delivery, 2).outcome == "stale", "it waits"

    chain.refresh().retry_delivery()
    chain.refresh().retry_delivery()

    again = shop.delivery_of(dispatcher, chain)
    assert (again.status, again.attempt, again.max_attempts) == ("pending", 1, 2)
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def test_a_held_delivery_of_a_call_in_process_is_planned_anew_when_retried(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    """No worker has the function that an application called: a message for it would find nothing to call, for ever."""
    gate, sink = shop.Gate(), shop.Sink()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callbacks={"send": sink}, on_unknown="hold"))
    chain = shop.new_chain(dispatcher)
    with gate.during(lambda: chain.execute(callback=shop.Sink(gate.wait))):
        local = shop.delivery_of(dispatcher, chain)
        shop.change_delivery(dispatcher, local.id, **shop.LAPSED)
        dispatcher.relay()
        assert shop.delivery_of(dispatcher, chain).status == "held"
        dispatcher.chain(local.chain_id).retry_delivery("ada", reason="as agreed")

    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert chain.events[-1].detail.endswith("so the chain will be planned again: as agreed")
    row = shop.row_of(dispatcher, chain.id)
    assert row.pending_delivery_id is None and row.due_at is not None
    assert dispatcher.relay()["relayed"] == 0 and shop.take_messages(broker_url, shop.CALLBACKS) == []
    chain.enqueue(callback="send")
    anew = shop.planned(dispatcher, chain)
    assert anew.idempotency_key == local.idempotency_key
    assert shop.attempt(dispatcher, anew).outcome == "delivered" and len(sink) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_refused_and_writes_nothing_while_an_attempt_runs(
    make_dispatcher: shop.Make, name: str
) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(gate.wait)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        before = shop.dump_rows(dispatcher)
        with pytest.raises(DeliveryPending, match="an attempt is running"):
            OPERATIONS[name](chain)
        assert shop.dump_rows(dispatcher) == before

    assert future.result().outcome == "delivered"
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("name", ["retry", "cancel", "skip"])
def test_a_chain_that_owes_nothing_has_nothing_to_decide(make_dispatcher: shop.Make, name: str) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(NoOpenDelivery):
        OPERATIONS[name](chain)

    assert shop.dump_rows(dispatcher) == before


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_closed_delivery_is_never_opened_again(make_dispatcher: shop.Make, name: str) -> None:
    """A chain that waits for a delivered one is a case for the doctor, not a second effect."""
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.attempt(dispatcher, delivery)
    shop.change_chain(dispatcher, chain.id, pending_delivery_id=delivery.id)

    with pytest.raises(DeliveryPending, match="doctor"):
        OPERATIONS[name](chain)

    assert shop.delivery_of(dispatcher, chain).status == "delivered"


# --- cancel, skip, reset, move ---------------------------------------------------------------------------------------


def test_a_cancelled_delivery_leaves_the_chain_due_where_it_is(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError(), times=2))
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = dead(dispatcher, chain)

    chain.refresh().cancel_delivery("ada", "the address is wrong")

    assert chain.state == NEW and chain.due_at is not None
    closed = shop.delivery_of(dispatcher, chain)
    assert (closed.status, closed.kwargs, closed.context) == ("cancelled", None, None)
    last = chain.events[-1]
    assert (last.action, last.requested_by, last.detail) == ("cancelled", "ada", "the address is wrong")
    assert shop.planned(dispatcher, chain).idempotency_key == delivery.idempotency_key
    shop.assert_consistent(dispatcher)


def test_a_skipped_delivery_moves_the_chain_as_if_it_had_been_delivered(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError()))
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    dead(dispatcher, chain)
    called = len(sink)

    chain.refresh().skip_delivery("ada", "sent by letter")

    assert chain.state == "reminded" and chain.due_at is not None
    assert shop.delivery_of(dispatcher, chain).status == "skipped"
    skipped, moved = chain.events[-2:]
    assert (skipped.action, skipped.requested_by, skipped.detail) == ("skipped", "ada", "sent by letter")
    assert (moved.action, moved.requested_by, moved.to_state) == ("state_transition", "ada", "reminded")
    assert len(sink) == called
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("name", ["reset", "move_to"])
def test_putting_a_chain_into_a_state_cancels_what_it_owes(make_dispatcher: shop.Make, name: str) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    OPERATIONS[name](chain)

    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert shop.attempt(dispatcher, delivery).outcome == "stale" and len(sink) == 0
    assert chain.state == (NEW if name == "reset" else "reminded") and chain.due_at is not None
    assert shop.actions(chain)[-2:] == ["cancelled", "reset" if name == "reset" else "moved"]
    shop.assert_consistent(dispatcher)


# --- against an attempt that begins at the same time -----------------------------------------------------------------


@pytest.mark.parametrize("name", ENDING)
def test_an_operation_and_a_begin_at_once_have_exactly_one_winner(make_dispatcher: shop.Make, name: str) -> None:
    for number in range(ROUNDS):
        decided = shop.Gate()
        sink = shop.Sink(decided.wait)  # a begun attempt does not end before the operation has
        worker = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
        person = make_dispatcher(shop.cart(TRANSITIONS, callback=sink))
        chain = shop.new_chain(person, number)
        delivery = shop.planned(worker, chain)

        made, operated = shop.at_once(
            partial(shop.attempt, worker, delivery), partial(then_open, decided, partial(OPERATIONS[name], chain))
        )

        if isinstance(operated, DeliveryPending):
            assert made.outcome == "delivered" and len(sink) == 1
        else:
            assert operated == chain and made.outcome == "stale" and len(sink) == 0
        shop.assert_consistent(person)


@on_postgresql
@pytest.mark.parametrize("name", ENDING)
def test_an_attempt_that_waited_for_an_operation_does_not_begin(
    make_dispatcher: shop.Make, blocked: Blocked, name: str
) -> None:
    sink = shop.Sink()
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=sink)) for _ in range(2))
    chain = shop.new_chain(person)
    delivery = shop.planned(worker, chain)

    with uncommitted(lambda: OPERATIONS[name](chain)) as operated:
        made = blocked(lambda: shop.attempt(worker, delivery))

    operated.result()
    assert made.result().outcome == "stale" and len(sink) == 0
    shop.assert_consistent(person)


@on_postgresql
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_waited_for_a_begin_is_refused(
    make_dispatcher: shop.Make, blocked: Blocked, name: str
) -> None:
    gate = shop.Gate()
    sink = shop.Sink(gate.wait)
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=sink)) for _ in range(2))
    chain = shop.new_chain(person)
    delivery = shop.planned(worker, chain)

    with uncommitted(lambda: shop.attempt(worker, delivery)) as made:
        operated = blocked(lambda: then_open(gate, lambda: OPERATIONS[name](chain)))

    assert isinstance(operated.exception(), DeliveryPending)
    assert made.result().outcome == "delivered"
    shop.assert_consistent(person)


@on_postgresql
@pytest.mark.parametrize("name", ["cancel", "reset"])
def test_an_operation_waits_for_an_attempt_that_ends_without_a_deadlock(
    make_dispatcher: shop.Make, blocked: Blocked, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of an attempt locks the delivery, then the chain; an operation in another order would meet it halfway."""
    caplog.set_level(logging.DEBUG, "dispatcher.storage.database")
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink())) for _ in range(2))
    chain = shop.new_chain(person)
    delivery = shop.planned(worker, chain)

    engine = worker.database.engine.execution_options(isolation_level="READ COMMITTED")
    with engine.begin() as connection:
        connection.execute(select(ChainRow.id).where(ChainRow.id == chain.id).with_for_update())
        # Its callback has returned, and it has the delivery's row.
        made = blocked(lambda: shop.attempt(worker, delivery))
        operated = blocked(lambda: OPERATIONS[name](chain), others=1)

    assert made.result().outcome == "delivered"
    if name == "cancel":
        assert isinstance(operated.exception(), DeliveryChanged)
    else:
        assert operated.result().state == NEW
    assert "rerun" not in caplog.text
    shop.assert_consistent(person)


@on_postgresql
@pytest.mark.parametrize("name", ["retry", "cancel", "skip"])
def test_an_act_on_a_delivery_that_waited_for_another_person_s_looks_again(
    make_dispatcher: shop.Make, blocked: Blocked, name: str
) -> None:
    """Both have seen a dead delivery; the second one must not act on what the first one has opened again."""
    first, second = (make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError())))) for _ in "ab")
    chain = shop.new_chain(first)
    seen = dead(first, chain)

    with uncommitted(lambda: first.retry_delivery(seen)):
        acted = blocked(lambda: getattr(second, f"{name}_delivery")(seen))

    assert isinstance(acted.exception(), DeliveryChanged)
    assert shop.delivery_of(first, chain).status == "pending"
    shop.assert_consistent(first)


@on_postgresql
def test_an_end_whose_chain_was_taken_away_while_it_waited_is_not_written(
    make_dispatcher: shop.Make, blocked: Blocked
) -> None:
    """No writer here does that: a delivery must not be `delivered` without its move all the same."""
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    chain, other = (shop.new_chain(dispatcher, number) for number in range(2))
    owed = [Owed(shop.planned(dispatcher, one).id, 1) for one in (chain, other)]
    engine = dispatcher.database.engine.execution_options(isolation_level="READ COMMITTED")

    with engine.begin() as connection:
        connection.execute(update(ChainRow).where(ChainRow.id == chain.id).values(pending_delivery_id=None))
        made = blocked(lambda: dispatcher.deliver(owed))

    assert sorted(result.outcome for result in made.result()) == ["delivered", "stale"]
    assert shop.delivery_of(dispatcher, chain).status == "running" and chain.refresh().state == NEW
    assert shop.delivery_of(dispatcher, other).status == "delivered" and other.refresh().state == "reminded"


@on_postgresql
def test_a_chain_that_got_a_new_delivery_meanwhile_is_not_freed(make_dispatcher: shop.Make, blocked: Blocked) -> None:
    first, second = (make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink())) for _ in range(2))
    chain = shop.new_chain(first)
    shop.change_delivery(
        first, shop.planned(first, chain).id, status="cancelled", finished_at=shop.LONG_AGO, publish_after=None
    )
    now = datetime.now(UTC)

    def mend_and_plan() -> Any:
        def work(connection: Any) -> None:
            deliveries.free_chain(connection, chain.id, now=now)
            record = chains.read_one(connection, chain.id)
            plan = PlannedDelivery(
                record=record, transition="Remind", final_state="reminded", callback="type", max_attempts=5,
                kwargs=None, context=None, requested_by=None,
            )  # fmt: skip
            not_woken = portable._lock_unchanged(connection, [record])
            portable._write_locked(connection, [plan], not_woken, now=now, timing=Timing(60))

        return first.database.write(work)

    with uncommitted(mend_and_plan) as mended:
        freed = blocked(
            lambda: second.database.write(lambda connection: deliveries.free_chain(connection, chain.id, now=now))
        )

    mended.result()
    freed.result()
    row = shop.row_of(first, chain.id)
    assert row.pending_delivery_id is not None and row.due_at is None
    shop.assert_consistent(first)


# --- a resource: unsubscribe -----------------------------------------------------------------------------------------


def test_disabling_a_resource_stops_all_its_chains_in_one_statement(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    theirs = [customer_chain(dispatcher, number) for number in range(3)]
    others = shop.new_chain(dispatcher, 99)
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(dispatcher.database.engine, "before_cursor_execute", note)
    assert dispatcher.disable_resource(CUSTOMER, "unsubscribe") == 3
    event.remove(dispatcher.database.engine, "before_cursor_execute", note)

    assert len([one for one in statements if one.startswith("UPDATE chain_dispatcher_chain ")]) == 1
    assert dispatcher.disable_resource(CUSTOMER) == 0
    for chain in theirs:
        assert chain.refresh().disabled and chain.due_at is None
        last = chain.events[-1]
        assert (last.action, last.requested_by) == ("disabled", "unsubscribe")
        with pytest.raises(ChainDisabled):
            chain.execute(callback=shop.Sink())
    assert {result.outcome for result in dispatcher.execute_chains([chain.id for chain in theirs])} == {"disabled"}
    assert not others.refresh().disabled
    assert dispatcher.sweep()["due"] == 1

    assert dispatcher.enable_resource(CUSTOMER, "support") == 3
    assert dispatcher.enable_resource(CUSTOMER) == 0
    for chain in theirs:
        assert not chain.refresh().disabled and chain.due_at is not None
        assert shop.actions(chain)[-2:] == ["disabled", "enabled"]
    shop.assert_consistent(dispatcher)


def test_a_begun_attempt_of_a_disabled_resource_finishes_and_moves(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(gate.wait)))
    chain = customer_chain(dispatcher, 1)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        assert dispatcher.disable_resource(CUSTOMER) == 1

    assert future.result().outcome == "delivered"
    assert chain.refresh().state == "reminded" and chain.due_at is None
    assert dispatcher.enable_resource(CUSTOMER) == 1
    assert chain.refresh().due_at is not None
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("crash", [False, True])
def test_an_owed_delivery_of_a_disabled_resource_waits_and_is_given_back(
    make_dispatcher: shop.Make, broker_url: str, crash: bool
) -> None:
    sink = shop.Sink()
    remind = shop.transition("Remind", "reminded", verify=lambda _: False)
    dispatcher = make_dispatcher(shop.cart({NEW: [remind], "reminded": [shop.Never]}, callback=sink))
    chain = customer_chain(dispatcher, 1)
    delivery = shop.planned(dispatcher, chain)
    number = 1
    if crash:  # its worker dies after the unsubscribe
        shop.crashed(dispatcher, delivery)
        number = 2
    dispatcher.disable_resource(CUSTOMER)
    shop.take_messages(broker_url, shop.CALLBACKS)

    assert dispatcher.relay() == {"relayed": 0, "settled": int(crash)}
    assert shop.delivery_of(dispatcher, chain).publish_after is None
    assert shop.attempt(dispatcher, delivery, number).outcome == "disabled" and len(sink) == 0
    assert shop.take_messages(broker_url, shop.CALLBACKS) == []

    dispatcher.enable_resource(CUSTOMER)
    assert dispatcher.relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert shop.attempt(dispatcher, *message.kwargs["deliveries"][0]).outcome == "delivered" and len(sink) == 1
    shop.assert_consistent(dispatcher)


def test_a_failed_attempt_of_a_disabled_chain_is_given_back_too(make_dispatcher: shop.Make, broker_url: str) -> None:
    gate = shop.Gate()

    def fails(_: object) -> None:
        gate.wait()
        raise OSError("mail server is down")

    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(fails)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    with gate.during(lambda: shop.attempt(dispatcher, delivery)):
        dispatcher.chain(delivery.chain_id).disable("ada")

    assert shop.delivery_of(dispatcher, chain).publish_after is None
    chain.enable("ada")
    again = shop.delivery_of(dispatcher, chain)
    assert again.status == "pending" and again.publish_after is not None


# --- a resource: a request to be forgotten ---------------------------------------------------------------------------


def test_erasing_a_resource_deletes_all_that_belongs_to_its_chains(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError()))))
    theirs = [customer_chain(dispatcher, number) for number in range(3)]
    delivery = shop.planned(dispatcher, theirs[0])
    dead(dispatcher, theirs[1])
    other = shop.new_chain(dispatcher, 99)
    kept = shop.planned(dispatcher, other)

    assert dispatcher.erase_resource(CUSTOMER) == 3

    assert [chain.id for chain in dispatcher.find_chains()] == [other.id]
    assert [one.id for one in dispatcher.find_deliveries()] == [kept.id]
    assert shop.count_rows(dispatcher, ResourceRow) == 1
    assert shop.count_rows(dispatcher, EventRow) == len(other.events)
    assert dispatcher.find_chains(resource=CUSTOMER) == []
    results = dispatcher.execute_chains([chain.id for chain in theirs])
    assert {result.outcome for result in results} == {"missing"}
    assert shop.attempt(dispatcher, delivery).outcome == "missing"
    assert dispatcher.relay()["settled"] == 0
    assert dispatcher.erase_resource(CUSTOMER) == 0
    assert customer_chain(dispatcher, 1).id not in [chain.id for chain in theirs], "an id is not used twice"


def test_erasing_is_refused_and_deletes_nothing_while_an_attempt_runs(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(gate.wait)))
    theirs = [customer_chain(dispatcher, number) for number in range(3)]
    delivery = shop.planned(dispatcher, theirs[-1])

    with gate.during(lambda: shop.attempt(dispatcher, delivery)):
        before = shop.dump_rows(dispatcher)
        with pytest.raises(DeliveryPending) as refused:
            dispatcher.erase_resource(CUSTOMER)
        assert refused.value.chain_id == theirs[-1].id
        assert shop.dump_rows(dispatcher) == before

    assert dispatcher.erase_resource(CUSTOMER) == 3


def test_a_chain_whose_delivery_is_gone_can_still_be_erased(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    shop.change_chain(dispatcher, customer_chain(dispatcher, 1).id, pending_delivery_id="0" * 32)

    assert dispatcher.erase_resource(CUSTOMER) == 1


def test_a_resource_erased_twice_at_once_is_erased_once(make_dispatcher: shop.Make) -> None:
    dispatchers = [make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink())) for _ in range(4)]
    for number in range(6):
        shop.planned(dispatchers[0], customer_chain(dispatchers[0], number))

    erased = shop.at_once(*(lambda one=one: one.erase_resource(CUSTOMER) for one in dispatchers))

    assert sorted(erased) == [0, 0, 0, 6]


@on_postgresql
def test_erasing_waits_for_a_begin_and_is_refused(make_dispatcher: shop.Make, blocked: Blocked) -> None:
    gate = shop.Gate()
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(gate.wait))) for _ in range(2))
    chain = customer_chain(person, 1)
    delivery = shop.planned(worker, chain)

    with uncommitted(lambda: shop.attempt(worker, delivery)) as made:
        erased = blocked(lambda: then_open(gate, lambda: person.erase_resource(CUSTOMER)))

    assert isinstance(erased.exception(), DeliveryPending)
    assert made.result().outcome == "delivered"


@on_postgresql
def test_an_attempt_that_waited_for_the_erasing_is_missing(make_dispatcher: shop.Make, blocked: Blocked) -> None:
    sink = shop.Sink()
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=sink)) for _ in range(2))
    delivery = shop.planned(worker, customer_chain(person, 1))

    with uncommitted(lambda: person.erase_resource(CUSTOMER)) as erased:
        made = blocked(lambda: shop.attempt(worker, delivery))

    assert erased.result() == 1
    assert made.result().outcome == "missing" and len(sink) == 0
    assert shop.count_rows(person, DeliveryRow) == 0


# --- states that were renamed ----------------------------------------------------------------------------------------


def test_mapping_states_counts_first_and_then_puts_chains_into_the_new_one(make_dispatcher: shop.Make) -> None:
    old = make_dispatcher(
        shop.cart({NEW: [shop.transition("Old", "nudged")], "nudged": [Remind]}, callback=shop.Sink())
    )
    chains = [shop.new_chain(old, number).move_to("nudged", "to begin with") for number in range(3)]
    owing = shop.planned(old, chains[0])
    elsewhere = shop.new_chain(old, 99)
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    before = shop.dump_rows(dispatcher)

    assert dispatcher.map_states(shop.CHAIN_TYPE, "nudged", "reminded", dry_run=True) == MapCounts(3, 0)
    assert shop.dump_rows(dispatcher) == before

    assert dispatcher.map_states(shop.CHAIN_TYPE, "nudged", "reminded", requested_by="ada") == MapCounts(3, 0)

    for chain in chains:
        assert chain.refresh().state == "reminded"
        assert (chain.due_at is None) == (chain is chains[0]), "that one waits for its delivery"
        last = chain.events[-1]
        assert (last.action, last.from_state, last.to_state) == ("mapped", "nudged", "reminded")
        assert (last.requested_by, last.detail) == ("ada", "from nudged")
    assert [(one.id, one.status) for one in dispatcher.find_deliveries()] == [(owing.id, "pending")]
    assert elsewhere.refresh().state == NEW
    assert dispatcher.map_states(shop.CHAIN_TYPE, "nudged", "reminded") == MapCounts(0, 0)


def test_mapping_states_leaves_chains_with_a_running_attempt_and_counts_them(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(gate.wait)))
    busy, idle = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    delivery = shop.planned(dispatcher, busy)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        assert dispatcher.map_states(shop.CHAIN_TYPE, NEW, "never") == MapCounts(1, 1)

    assert future.result().outcome == "delivered"
    assert (busy.refresh().state, idle.refresh().state) == ("reminded", "never")


RENAMED = {NEW: [shop.transition("Nudge", "half way")], "old": [Remind], "half way": [Remind], "reminded": [shop.Never]}
"""A configuration in which the state `old` gets the name `half way`."""


def test_mapping_renames_the_state_and_nothing_else(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart(RENAMED, callback=shop.Sink()), clock=clock)
    chain = shop.new_chain(dispatcher, initial_context={"n": 1}).move_to("old", "to begin with")
    rest = clock.now + timedelta(days=2)
    chain.enqueue(initial_context={"asked": True}, requested_by="ada")
    shop.change_chain(dispatcher, chain.id, next_update_at=rest, due_at=rest, failures=3)
    before = shop.row_of(dispatcher, chain.id)
    clock.forward(hours=1)

    assert dispatcher.map_states(shop.CHAIN_TYPE, "old", "half way", requested_by="ada") == MapCounts(1, 0)

    changed = {"state": "half way", "version": before.version + 1, "failures": 0, "updated_at": clock.now}
    assert dict(shop.row_of(dispatcher, chain.id)._mapping) == {**before._mapping, **changed}
    assert [event.action for event in chain.events].count("mapped") == 1
    last = chain.events[-1]
    assert (last.action, last.value, last.from_state, last.to_state) == ("mapped", "half way", "old", "half way")
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("status", ["pending", "dead", "held"])
def test_an_open_delivery_stays_open_when_its_state_is_renamed(make_dispatcher: shop.Make, status: str) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart(RENAMED, callback=sink), last_look_seconds=0)
    chain = shop.new_chain(dispatcher).move_to("old", "to begin with")
    delivery = shop.planned(dispatcher, chain)
    if status != "pending":
        waits = {"next_attempt_at": None, "publish_after": None, "last_error": "down"}
        shop.change_delivery(dispatcher, delivery.id, status=status, attempt=1, unknown=status == "held", **waits)
    before = shop.delivery_of(dispatcher, chain)

    assert dispatcher.map_states(shop.CHAIN_TYPE, "old", "half way") == MapCounts(1, 0)

    assert shop.delivery_of(dispatcher, chain) == replace(before, from_state="half way")
    assert shop.row_of(dispatcher, chain.id).due_at is None
    if status != "pending":
        chain.refresh().retry_delivery("ada")
    assert shop.attempt(dispatcher, delivery, before.attempt + 1).outcome == "delivered"
    assert [call.key for call in sink.calls] == [before.idempotency_key]
    assert chain.refresh().state == "reminded"
    shop.assert_consistent(dispatcher)


def test_a_step_that_is_planned_again_after_a_mapping_has_its_old_key(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(RENAMED, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher).move_to("old", "to begin with")
    first = shop.planned(dispatcher, chain)
    chain.refresh().cancel_delivery("ada")

    dispatcher.map_states(shop.CHAIN_TYPE, "old", "half way")

    assert shop.planned(dispatcher, chain).idempotency_key == first.idempotency_key


@pytest.mark.parametrize(
    ("to_state", "values", "due"),
    [
        ("half way", {"due_at": None}, True),
        ("half way", {"disabled": True, "due_at": None}, False),
        (DONE, {"failures": 1}, False),
    ],
)
def test_a_mapped_chain_is_due_at_once_if_nothing_keeps_it(
    make_dispatcher: shop.Make, to_state: str, values: dict[str, Any], due: bool
) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart({**RENAMED, DONE: []}, callback=shop.Sink()), clock=clock)
    chain = shop.new_chain(dispatcher).move_to("old", "to begin with")
    shop.change_chain(dispatcher, chain.id, **values)

    dispatcher.map_states(shop.CHAIN_TYPE, "old", to_state)

    assert shop.row_of(dispatcher, chain.id).due_at == (clock.now if due else None)


@on_postgresql
def test_a_mapping_waits_for_a_begin_and_leaves_the_chain(make_dispatcher: shop.Make, blocked: Blocked) -> None:
    gate = shop.Gate()
    worker, person = (make_dispatcher(shop.cart(RENAMED, callback=shop.Sink(gate.wait))) for _ in range(2))
    chain = shop.new_chain(person).move_to("old", "to begin with")
    delivery = shop.planned(worker, chain)

    with uncommitted(lambda: shop.attempt(worker, delivery)) as made:
        mapped = blocked(lambda: then_open(gate, lambda: person.map_states(shop.CHAIN_TYPE, "old", "half way")))

    assert mapped.result() == MapCounts(0, 1)
    assert made.result().outcome == "delivered"
    shop.assert_consistent(person)


@on_postgresql
def test_an_attempt_that_waited_for_a_mapping_goes_on_from_the_new_state(
    make_dispatcher: shop.Make, blocked: Blocked
) -> None:
    seen = []
    look = shop.transition("Remind", "reminded", lambda self: seen.append(self.chain.state) or True)
    renamed = {**RENAMED, "old": [look], "half way": [look]}
    worker, person = (make_dispatcher(shop.cart(renamed, callback=shop.Sink()), last_look_seconds=0) for _ in range(2))
    chain = shop.new_chain(person).move_to("old", "to begin with")
    delivery = shop.planned(worker, chain)

    map_one = partial(person._services.operations._map_one, requested_by=None, reason=None)  # what map_states repeats
    with uncommitted(lambda: map_one(delivery.chain_id, "old", "half way")) as mapped:
        made = blocked(lambda: shop.attempt(worker, delivery))

    assert mapped.result().name == "MAPPED"
    assert made.result().outcome == "delivered"
    assert seen == ["old", "half way"], "by the plan, and by the last look"
    shop.assert_consistent(person)


def test_a_plan_of_the_old_name_is_stale_after_a_mapping(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    slow = shop.transition("Remind", "reminded", gate.wait)
    dispatcher = make_dispatcher(shop.cart({**RENAMED, "old": [slow], "half way": [slow]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher).move_to("old", "to begin with")

    with gate.during(lambda: dispatcher.execute_chains([chain.id])) as executed:
        assert dispatcher.map_states(shop.CHAIN_TYPE, "old", "half way") == MapCounts(1, 0)

    assert [result.outcome for result in executed.result()] == ["stale"]
    assert chain.refresh().state == "half way" and dispatcher.find_deliveries() == []
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize(("to_state", "problem"), [("nowhere", "unknown state"), (NEW, "is the old state")])
def test_mapping_to_a_state_that_makes_no_sense_is_refused(
    make_dispatcher: shop.Make, to_state: str, problem: str
) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(ConfigurationError, match=problem):
        dispatcher.map_states(shop.CHAIN_TYPE, NEW, to_state)

    assert shop.dump_rows(dispatcher) == before


# --- a chain type ----------------------------------------------------------------------------------------------------


def test_a_paused_type_is_not_planned_by_anybody_until_it_is_resumed(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    sink = shop.Sink()
    config = shop.cart(TRANSITIONS, callback=sink)
    config["chains"] += [{"chain_type": "other", "callback": sink, "transitions": TRANSITIONS}]
    first = make_dispatcher(config)
    chain, owing, other = shop.new_chain(first, 1), shop.new_chain(first, 2), shop.new_chain(first, 3, "other")
    delivery = shop.planned(first, owing)

    assert first.pause(shop.CHAIN_TYPE, "mail provider is down") is True
    assert first.pause(shop.CHAIN_TYPE, "once more") is False

    dispatcher = make_dispatcher(config)  # knows at once what others notice within two seconds
    (result,) = dispatcher.execute_chains([chain.id])
    assert (result.outcome, result.detail) == ("paused", "")
    with pytest.raises(ChainPaused, match="its chain type is paused"):
        dispatcher.chain(result.chain_id or 0).execute()
    assert dispatcher.chain(result.chain_id or 0).execute(dry_run=True)["outcome"] == "paused"
    assert dispatcher.chain(result.chain_id or 0).explain()["outcome"] == "paused"
    chain.enqueue(initial_context={"asked": 1}, requested_by="shop")
    assert dispatcher.execute_chains([chain.id])[0].outcome == "paused"
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"asked": 1}, "the request waits"
    shop.take_messages(broker_url, shop.CHAINS)
    assert dispatcher.sweep()["due"] == 1
    (message,) = shop.take_messages(broker_url, shop.CHAINS)
    assert message.kwargs["chain_ids"] == [other.id]
    assert shop.attempt(dispatcher, delivery).outcome == "deferred", "what is owed already is parked"
    assert dispatcher.chain(other.id or 0).execute()["outcome"] == "moved"
    (row,) = [row for row in dispatcher.find_types() if row.name == shop.CHAIN_TYPE]
    assert (row.paused, row.paused_reason) == (True, "mail provider is down")

    assert dispatcher.resume(shop.CHAIN_TYPE) is True
    assert dispatcher.resume(shop.CHAIN_TYPE) is False
    after = make_dispatcher(config)
    assert shop.attempt(after, shop.planned(after, chain)).outcome == "delivered"
    assert sink.calls[-1].context["asked"] == 1
    shop.assert_consistent(after)


def test_an_unknown_chain_type_is_neither_paused_nor_resumed(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()))
    for act in (lambda: dispatcher.pause("carts", "a typo"), lambda: dispatcher.resume("carts")):
        with pytest.raises(ConfigurationError, match="'carts'"):
            act()
    assert dispatcher.find_types() == []


# --- disabling, against what is just being written -------------------------------------------------------------------


@on_postgresql
@pytest.mark.parametrize("together", [1, 2])
def test_an_attempt_that_waited_for_the_disabling_does_not_begin(
    make_dispatcher: shop.Make, blocked: Blocked, together: int
) -> None:
    """A statement that waited for a row sees that row's new version, but the other tables as they were before."""
    sink = shop.Sink()
    worker, person = (make_dispatcher(shop.cart(TRANSITIONS, callback=sink)) for _ in range(2))
    owed = [Owed(shop.planned(worker, customer_chain(person, number)).id, 1) for number in range(together)]

    with uncommitted(lambda: person.disable_resource(CUSTOMER)) as disabled:
        made = blocked(lambda: worker.deliver(owed))

    assert disabled.result() == together
    assert {result.outcome for result in made.result()} <= {"disabled", "stale"} and len(sink) == 0
    assert {(one.status, one.attempt) for one in person.find_deliveries()} == {("pending", 0)}
    person.enable_resource(CUSTOMER)
    assert {one.outcome for one in worker.deliver(owed)} == {"delivered"} and len(sink) == together
    shop.assert_consistent(person)


@on_postgresql
@pytest.mark.parametrize("enabled", [True, False])
def test_a_delivery_that_fails_while_its_chain_is_enabled_or_disabled_is_the_relay_s_to_see_or_not(
    make_dispatcher: shop.Make, blocked: Blocked, enabled: bool
) -> None:
    """Otherwise one that has just been enabled would never be relayed again."""
    worker, person = (
        make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError())))) for _ in range(2)
    )
    chain = customer_chain(person, 1)
    delivery = shop.planned(worker, chain)
    change = person.disable_resource
    if enabled:
        shop.change_chain(person, chain.id, disabled=True)
        change = person.enable_resource
    shop.crashed(worker, delivery)
    shop.change_delivery(worker, delivery.id, lease_until=datetime.now(UTC) + timedelta(minutes=1), publish_after=None)
    running = shop.delivery_of(worker, chain)

    def fail() -> bool:
        return worker.database.write(
            lambda connection: deliveries.retry(connection, running, seconds=0, grace_seconds=0, error="down")
        )

    with uncommitted(lambda: change(CUSTOMER)) as changed:
        failed = blocked(fail)

    assert changed.result() == 1 and failed.result()
    assert (shop.delivery_of(worker, chain).publish_after is not None) == enabled
