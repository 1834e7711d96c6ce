"""Requests of applications: written to the row, published as a hint, used by the worker, and never lost."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session

from dispatcher import (
    DONE,
    NEW,
    Chain,
    ConfigurationError,
    Dispatcher,
    DispatcherError,
    EnqueueNotPublished,
    NotSerializable,
    RetryPolicy,
)
from dispatcher.storage.models import ChainRow
from tests.integration.transitions import (
    BOOKING,
    CHAIN_TYPE,
    START,
    Clock,
    Gate,
    Raises,
    Sink,
    actions,
    assert_consistent,
    at_once,
    attempt,
    cart,
    change_chain,
    count_rows,
    delivery_of,
    dump_rows,
    new_chain,
    planned,
    queue_length,
    row_of,
    take_messages,
    transition,
)

pytestmark = pytest.mark.integration

Make = Callable[..., Dispatcher]

REQUESTS = "dispatcher.requests"
NOBODY = "redis://127.0.0.1:1/0"
Remind = transition("Remind", "reminded")
Never = transition("Never", "never", valid=False)
Remind2 = transition("Remind2", "reminded twice")
OnRequest = transition("OnRequest", "asked", valid=False, recheck_seconds=None)


def send(transition: Any, **kwargs: Any) -> None:
    """A registered callback."""


def executed(dispatcher: Dispatcher, chain: Chain) -> str:
    (result,) = dispatcher.execute_chains([chain.id])
    return str(result.outcome)


# --- written and published -------------------------------------------------------------------------------------------


def test_an_enqueue_writes_the_request_and_publishes_one_message_of_ids(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(cart({NEW: [OnRequest]}, callbacks={"send": send}), clock=Clock())
    chain = new_chain(dispatcher)
    executed(dispatcher, chain)
    before = row_of(dispatcher, chain.id)
    assert before.due_at is None

    task_id = chain.enqueue(
        initial_context={"a": 1}, callback="send", callback_kwargs={"b": [2]}, requested_by="the shop"
    )

    row = row_of(dispatcher, chain.id)
    assert row.request == {
        "context": {"a": 1},
        "callback": "send",
        "kwargs": {"b": [2]},
        "requested_by": "the shop",
    }
    assert (row.due_at, row.wake, row.version) == (START, before.wake + 1, before.version)
    (message,) = take_messages(broker_url, REQUESTS)
    assert (message.id, message.task) == (task_id, "dispatcher.execute_chain")
    assert message.kwargs == {"chain_ids": [chain.id]}


def test_an_enqueue_by_resources_makes_the_chain_if_there_is_none(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))

    first = dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1})
    second = dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1})

    (chain,) = dispatcher.find_chains()
    assert chain.resources == tuple(BOOKING)
    assert [(message.id, message.kwargs["chain_ids"]) for message in take_messages(broker_url, REQUESTS)] == [
        (first, [chain.id]),
        (second, [chain.id]),
    ]
    assert row_of(dispatcher, chain.id).context is None, "a request's context is not the chain's"


def test_a_lost_message_is_made_good_by_the_next_sweep(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(cart({NEW: [OnRequest]}))
    chain = new_chain(dispatcher)
    executed(dispatcher, chain)
    assert dispatcher.sweep()["due"] == 0

    chain.enqueue()
    take_messages(broker_url, REQUESTS)

    assert dispatcher.sweep()["enqueued"] == 1


def test_a_resting_chain_is_due_after_its_rest(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}), clock=Clock())
    chain = new_chain(dispatcher)
    change_chain(dispatcher, chain.id, next_update_at=START + timedelta(hours=3))

    chain.enqueue(initial_context={"a": 1})

    row = row_of(dispatcher, chain.id)
    assert row.due_at == START + timedelta(hours=3) and row.request["context"] == {"a": 1}


def test_a_request_to_a_disabled_chain_waits_until_it_is_enabled(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [OnRequest]}))
    chain = new_chain(dispatcher).disable()

    chain.enqueue(initial_context={"a": 1})
    row = row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (None, {"a": 1})

    assert chain.enable().due_at is not None


def test_a_later_request_replaces_an_earlier_one(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    chain = new_chain(dispatcher)

    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"k": 1}, requested_by="first")
    chain.enqueue(initial_context={"b": 2}, requested_by="second")

    assert row_of(dispatcher, chain.id).request == {
        "context": {"b": 2},
        "callback": None,
        "kwargs": None,
        "requested_by": "second",
    }
    last = chain.events[-1]
    assert actions(chain) == ["created", "request_replaced"]
    assert last.requested_by == "second"


def test_the_same_request_again_is_no_event(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    chain = new_chain(dispatcher)

    chain.enqueue(initial_context={"a": [1, {"x": None}]})
    chain.enqueue(initial_context={"a": [1, {"x": None}]})

    assert actions(chain) == ["created"]
    assert row_of(dispatcher, chain.id).wake == 2


# --- used ------------------------------------------------------------------------------------------------------------


def test_the_worker_uses_the_request_s_context_callback_and_arguments(make_dispatcher: Make) -> None:
    named, of_type = Sink(), Sink()
    wants = transition("Wants", "wanted", lambda self: self.context.get("wanted", False))
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callbacks={"send": named}, callback=of_type))
    chain = new_chain(dispatcher)
    assert executed(dispatcher, chain) == "none"

    chain.enqueue(
        initial_context={"wanted": True}, callback="send", callback_kwargs={"lang": "de"}, requested_by="the shop"
    )
    delivery = planned(dispatcher, chain)
    attempt(dispatcher, delivery)

    assert delivery.callback == "named:send"
    (call,) = named.calls
    assert call.kwargs == {"lang": "de"} and call.context["wanted"] is True
    assert len(of_type) == 0
    said = {event.action: event.requested_by for event in chain.events}
    assert said["planned"] == said["state_transition"] == "the shop"


def test_a_request_survives_evaluations_without_a_winner(make_dispatcher: Make) -> None:
    verdicts = [False, True, True]
    wants = transition("Wants", "wanted", lambda _: verdicts.pop(0))
    sink = Sink()
    dispatcher = make_dispatcher(cart({NEW: [wants]}, callbacks={"send": sink}))
    chain = new_chain(dispatcher)
    chain.enqueue(callback="send", callback_kwargs={"a": 1})

    assert executed(dispatcher, chain) == "none"
    assert row_of(dispatcher, chain.id).request is not None
    attempt(dispatcher, planned(dispatcher, chain))

    assert sink.calls[0].kwargs == {"a": 1}


def test_a_request_survives_a_guard_that_raises(make_dispatcher: Make) -> None:
    guard = Raises(RuntimeError("once"), times=1, value=True)
    dispatcher = make_dispatcher(cart({NEW: [transition("Flaky", "there", guard)]}, callback=Sink()))
    chain = new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1})

    assert executed(dispatcher, chain) == "guard_failed"
    assert row_of(dispatcher, chain.id).request["context"] == {"a": 1}


def test_a_request_is_consumed_by_the_plan(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [Remind2]}, callback=Sink()))
    chain = new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"k": 1})

    delivery = planned(dispatcher, chain)

    assert row_of(dispatcher, chain.id).request is None
    assert (delivery.context, delivery.kwargs) == ({"a": 1}, {"k": 1})
    attempt(dispatcher, delivery)
    assert planned(dispatcher, chain).kwargs is None


def test_a_request_is_consumed_by_a_move(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [Never]}, callback=None))
    chain = new_chain(dispatcher)
    chain.enqueue(requested_by="the shop")

    assert executed(dispatcher, chain) == "moved"

    assert row_of(dispatcher, chain.id).request is None
    assert chain.events[-1].requested_by == "the shop"


def test_a_request_to_a_terminal_chain_ends(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [transition("Finish", DONE)]}))
    chain = new_chain(dispatcher)
    executed(dispatcher, chain)

    chain.enqueue(initial_context={"a": 1})
    assert executed(dispatcher, chain) == "terminal"

    row = row_of(dispatcher, chain.id)
    assert (row.request, row.due_at) == (None, None)
    assert dispatcher.sweep()["due"] == 0


def test_an_in_process_move_consumes_the_request_that_it_saw(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [Never]}))
    chain = new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1})

    chain.execute(callback=Sink())

    assert row_of(dispatcher, chain.id).request is None


# --- at the same time as ---------------------------------------------------------------------------------------------


def test_an_enqueue_during_an_evaluation_that_ends_in_a_rest_is_not_lost(make_dispatcher: Make) -> None:
    gate, clock = Gate(), Clock()
    rejects = transition("Rejects", "there", lambda _: not gate.wait(), recheck_seconds=None)
    dispatcher = make_dispatcher(cart({NEW: [rejects]}), clock=clock)
    chain = new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        clock.forward(minutes=1)
        make_dispatcher(cart({NEW: [rejects]}), clock=clock).chain(chain.id).enqueue(initial_context={"a": 1})

    assert future.result() == "stale"
    row = row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (clock.now, {"a": 1})
    assert dispatcher.sweep()["due"] == 1
    assert executed(dispatcher, chain) == "none"
    assert row_of(dispatcher, chain.id).due_at is None


def test_an_enqueue_during_an_evaluation_that_fails_is_not_held_up_by_its_back_off(make_dispatcher: Make) -> None:
    gate = Gate()

    def fails(_: object) -> bool:
        gate.wait()
        raise RuntimeError("no")

    dispatcher = make_dispatcher(cart({NEW: [transition("Fails", "there", fails)]}), clock=Clock())
    chain = new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        new_chain(dispatcher).enqueue()

    assert future.result() == "stale"
    assert row_of(dispatcher, chain.id).due_at == START


def test_an_enqueue_during_an_evaluation_without_callback_is_not_lost(make_dispatcher: Make) -> None:
    gate, sink = Gate(), Sink()
    dispatcher = make_dispatcher(cart({NEW: [transition("Wins", "won", gate.wait)]}, callbacks={"send": sink}))
    chain = new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        new_chain(dispatcher).enqueue(callback="send")

    assert future.result() == "stale"
    assert row_of(dispatcher, chain.id).due_at is not None
    assert attempt(dispatcher, planned(dispatcher, chain)).outcome == "delivered"


@pytest.mark.parametrize("ends_in", ["plan", "move"])
def test_an_enqueue_between_read_and_write_keeps_the_newer_request(make_dispatcher: Make, ends_in: str) -> None:
    gate = Gate()
    config = cart({NEW: [transition("Wins", "won", gate.wait)], "won": [Never]}, callback=Sink())
    if ends_in == "move":
        config["chains"][0]["callback"] = None
    dispatcher = make_dispatcher(config)
    chain = new_chain(dispatcher)
    chain.enqueue(initial_context={"request": "older"}, requested_by="older")

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        new_chain(dispatcher).enqueue(initial_context={"request": "newer"}, requested_by="newer")

    assert future.result() == ("planned" if ends_in == "plan" else "moved")
    assert row_of(dispatcher, chain.id).request["context"] == {"request": "newer"}
    if ends_in == "plan":
        delivery = delivery_of(dispatcher, chain)
        assert (delivery.context, delivery.requested_by) == ({"request": "older"}, "older")
        assert row_of(dispatcher, chain.id).due_at is None
        attempt(dispatcher, delivery)
    row = row_of(dispatcher, chain.id)
    assert row.request["context"] == {"request": "newer"} and row.due_at is not None
    assert_consistent(dispatcher)


def test_an_enqueue_during_a_callback_does_not_hinder_the_move(make_dispatcher: Make) -> None:
    gate, clock = Gate(), Clock()
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [OnRequest]}, callback=Sink(gate.wait)), clock=clock)
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)

    with gate.during(lambda: attempt(dispatcher, delivery)) as future:
        new_chain(dispatcher).enqueue(initial_context={"a": 1})
        assert row_of(dispatcher, chain.id).due_at is None, "not evaluated while its delivery is open"

    assert future.result().outcome == "delivered"
    row = row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.request["context"]) == ("reminded", START, {"a": 1})
    assert_consistent(dispatcher)


def test_an_enqueue_during_an_in_process_callback_does_not_hinder_the_move(make_dispatcher: Make) -> None:
    gate = Gate()
    dispatcher = make_dispatcher(cart({NEW: [Remind], "reminded": [OnRequest]}), clock=Clock())
    chain = new_chain(dispatcher)

    with gate.during(lambda: chain.execute(callback=Sink(gate.wait))) as future:
        new_chain(dispatcher).enqueue(initial_context={"a": 1})

    assert future.result()["outcome"] == "moved"
    row = row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.request["context"]) == ("reminded", START, {"a": 1})


def test_an_enqueue_while_a_delivery_waits_for_its_retry_makes_the_chain_due_when_it_ends(
    make_dispatcher: Make,
) -> None:
    once = transition("Once", "once", retry=RetryPolicy(base_seconds=0))
    sink = Sink(Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(cart({NEW: [once], "once": [OnRequest]}, callback=sink), clock=Clock())
    chain = new_chain(dispatcher)
    delivery = planned(dispatcher, chain)
    attempt(dispatcher, delivery)

    chain.enqueue(initial_context={"a": 1})
    assert row_of(dispatcher, chain.id).due_at is None

    assert attempt(dispatcher, delivery, 2).outcome == "delivered"
    row = row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (START, {"a": 1})


def test_concurrent_enqueues_all_count(make_dispatcher: Make) -> None:
    dispatchers = [make_dispatcher(cart({NEW: [Remind]})) for _ in range(8)]
    chain = new_chain(dispatchers[0])

    def work(dispatcher: Dispatcher, number: int) -> Callable[[], Any]:
        return lambda: dispatcher.enqueue(CHAIN_TYPE, [("online_booking", "b0")], initial_context={"n": number})

    ids = at_once(*(work(dispatcher, number) for number, dispatcher in enumerate(dispatchers)))

    assert len(set(ids)) == 8 and all(isinstance(one, str) for one in ids)
    row = row_of(dispatchers[0], chain.id)
    assert row.wake == 8 and row.request["context"]["n"] in range(8)
    assert actions(chain).count("request_replaced") == 7


# --- refused ---------------------------------------------------------------------------------------------------------


def local() -> Callable[..., Any]:
    def send_mail(transition: Any) -> None:
        """Nobody else can find it."""

    return send_mail


def test_a_callback_that_no_worker_can_find_is_refused_with_what_to_do(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callbacks={"send": send}))
    chain = new_chain(dispatcher)
    before = dump_rows(dispatcher)

    for callback, named in (
        (local(), "'send_mail'"),
        (lambda _: None, "register"),
        ("sned", "'send'"),
        (print, "'print'"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            chain.enqueue(callback=callback)
        with pytest.raises(ConfigurationError, match=named):
            dispatcher.enqueue(CHAIN_TYPE, BOOKING, callback=callback)

    assert dump_rows(dispatcher) == before


def test_a_registered_function_may_be_given_itself(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}, callbacks={"mail": send}))
    chain = new_chain(dispatcher)

    chain.enqueue(callback=send)

    assert row_of(dispatcher, chain.id).request["callback"] == "mail"


def test_values_that_cannot_travel_are_refused_by_key(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    before = dump_rows(dispatcher)

    for value in (object(), {1, 2}, float("nan"), b"x", "a\x00b", "\ud800", {"deep": [object()]}):
        for where in ("initial_context", "callback_kwargs"):
            with pytest.raises(NotSerializable, match="booking") as caught:
                dispatcher.enqueue(CHAIN_TYPE, BOOKING, **{where: {"fine": 1, "booking": value}})  # type: ignore[arg-type]
            assert isinstance(caught.value, DispatcherError) and where in str(caught.value)
    assert dump_rows(dispatcher) == before


# --- the broker is away ----------------------------------------------------------------------------------------------


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        try:
            yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for one in kept:
                one.close()


@pytest.mark.parametrize("broker", ["refuses", "is silent", "is not configured"])
def test_an_enqueue_that_cannot_be_published_says_so_and_is_written(make_dispatcher: Make, broker: str) -> None:
    config = cart({NEW: [OnRequest]})
    with silent_server() as silent:
        url = {"refuses": NOBODY, "is silent": silent, "is not configured": None}[broker]
        dispatcher = make_dispatcher(config, broker_url=url, redis_url=None, connect_seconds=1)
        begun = time.monotonic()

        with pytest.raises(EnqueueNotPublished) as caught:
            dispatcher.enqueue(CHAIN_TYPE, BOOKING, initial_context={"a": 1})

        assert time.monotonic() - begun < 10
        (chain,) = dispatcher.find_chains()
        assert (caught.value.chain_id, caught.value.written) == (chain.id, True)
        assert isinstance(caught.value, DispatcherError)
        row = row_of(dispatcher, chain.id)
        assert row.request["context"] == {"a": 1} and row.due_at is not None
    assert make_dispatcher(config).sweep()["enqueued"] == 1


def test_a_best_effort_enqueue_only_logs_that_it_was_not_published(
    make_dispatcher: Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}), broker_url=NOBODY)
    chain = new_chain(dispatcher)

    assert chain.enqueue(best_effort=True) is None
    assert row_of(dispatcher, chain.id).request is not None
    assert "not published" in caplog.text


def test_a_password_of_the_broker_is_in_no_error_and_no_log(
    make_dispatcher: Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}), broker_url="redis://user:s3cret@127.0.0.1:1/0")
    chain = new_chain(dispatcher)

    with pytest.raises(EnqueueNotPublished) as caught:
        chain.enqueue()
    chain.enqueue(best_effort=True)

    assert "s3cret" not in f"{caught.value} {caught.value!r} {caplog.text} {dispatcher!r}"


# --- with the caller's transaction -----------------------------------------------------------------------------------


@pytest.fixture
def application(database_url: str) -> Iterator[Engine]:
    """The application's own engine on the dispatcher's database."""
    engine = create_engine(database_url)
    if engine.dialect.name == "sqlite":  # the driver's own transactions know no savepoints, see SQLAlchemy's manual
        event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    yield engine
    engine.dispose()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Engine]:
    """An application's engine on a database of its own."""
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.sqlite'}")
    yield engine
    engine.dispose()


@pytest.fixture(params=["same database", "other database"])
def shop(request: pytest.FixtureRequest) -> Engine:
    """The application's engine, on the dispatcher's database and on another."""
    name = {"same database": "application", "other database": "elsewhere"}[request.param]
    engine: Engine = request.getfixturevalue(name)
    return engine


def test_an_enqueue_on_commit_takes_effect_with_the_commit(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING, initial_context={"a": 1}, requested_by="the shop")

        assert count_rows(dispatcher, ChainRow) == 0
        assert queue_length(broker_url, REQUESTS) == 0
        session.commit()

        (chain,) = dispatcher.find_chains()
        (message,) = take_messages(broker_url, REQUESTS)
        assert message.kwargs == {"chain_ids": [chain.id]}
        row = row_of(dispatcher, chain.id)
        assert (row.request["context"], row.request["requested_by"]) == ({"a": 1}, "the shop")
        assert row.due_at is not None

        session.commit()
        assert queue_length(broker_url, REQUESTS) == 0, "once"


def test_an_enqueue_on_commit_is_forgotten_by_a_rollback(make_dispatcher: Make, broker_url: str, shop: Engine) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING)
        session.rollback()
        assert count_rows(dispatcher, ChainRow) == 0

        session.begin()
        session.commit()

    assert count_rows(dispatcher, ChainRow) == 0
    assert queue_length(broker_url, REQUESTS) == 0


def test_an_enqueue_on_commit_is_forgotten_when_the_session_is_closed(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    session = Session(shop)
    dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING)
    session.close()

    with session:
        session.begin()
        session.commit()

    assert count_rows(dispatcher, ChainRow) == 0
    assert queue_length(broker_url, REQUESTS) == 0


def test_a_savepoint_that_is_rolled_back_takes_its_enqueues_along_and_no_others(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, [("online_booking", "kept")])
        savepoint = session.begin_nested()
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, [("online_booking", "undone")])
        inner = session.begin_nested()
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, [("online_booking", "undone too")])
        inner.commit()
        savepoint.rollback()
        session.commit()

    (chain,) = dispatcher.find_chains()
    assert chain.resources == (("online_booking", "kept"),)
    assert [message.kwargs for message in take_messages(broker_url, REQUESTS)] == [{"chain_ids": [chain.id]}]


def test_a_savepoint_that_is_committed_takes_effect_with_the_outer_commit_only(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        session.begin()
        with session.begin_nested():
            dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING)
        assert queue_length(broker_url, REQUESTS) == 0
        assert count_rows(dispatcher, ChainRow) == 0
        session.commit()

    assert len(take_messages(broker_url, REQUESTS)) == 1
    assert count_rows(dispatcher, ChainRow) == 1


def test_a_committed_savepoint_is_forgotten_when_the_outer_transaction_rolls_back(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        session.begin()
        with session.begin_nested():
            dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING)
        session.rollback()
        session.begin()
        session.commit()

    assert queue_length(broker_url, REQUESTS) == 0
    assert count_rows(dispatcher, ChainRow) == 0


def test_a_commit_on_the_dispatcher_s_own_database_loses_nothing_when_the_broker_is_away(
    make_dispatcher: Make, application: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [OnRequest]}), broker_url=NOBODY)
    with Session(application) as session:
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING, initial_context={"a": 1})
        session.commit()

    (chain,) = dispatcher.find_chains()
    assert row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    assert make_dispatcher(cart({NEW: [OnRequest]})).sweep()["enqueued"] == 1


def test_an_enqueue_on_commit_checks_its_arguments_at_once(make_dispatcher: Make, shop: Engine) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        with pytest.raises(ConfigurationError):
            dispatcher.enqueue_on_commit(session, "basket", BOOKING)
        with pytest.raises(ConfigurationError):
            dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING, callback=lambda _: None)
        with pytest.raises(NotSerializable):
            dispatcher.enqueue_on_commit(session, CHAIN_TYPE, BOOKING, initial_context={"a": object()})
        session.commit()
    assert count_rows(dispatcher, ChainRow) == 0


def test_several_enqueues_in_one_transaction_all_take_effect(
    make_dispatcher: Make, broker_url: str, shop: Engine
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Remind]}))
    with Session(shop) as session:
        for number in range(3):
            dispatcher.enqueue_on_commit(session, CHAIN_TYPE, [("online_booking", str(number))])
        session.commit()
        dispatcher.enqueue_on_commit(session, CHAIN_TYPE, [("online_booking", "later")])
        session.commit()

    assert count_rows(dispatcher, ChainRow) == 4
    assert len(take_messages(broker_url, REQUESTS)) == 4


def test_a_clock_that_gives_naive_moments_is_refused_on_every_database(make_dispatcher: Make) -> None:
    naive = datetime(2030, 7, 1, 12)  # noqa: DTZ001 - on purpose
    dispatcher = make_dispatcher(cart({NEW: [transition("Asked", "asked")]}), clock=lambda: naive)
    before = dump_rows(dispatcher)

    with pytest.raises(ValueError, match="naive"):
        dispatcher.enqueue(CHAIN_TYPE, BOOKING, best_effort=True)

    assert dump_rows(dispatcher) == before
