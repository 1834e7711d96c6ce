"""Requests of applications: written to the row, published as a hint, used by the worker, and never lost."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from tests.integration import shop

pytestmark = pytest.mark.integration

Remind2 = shop.transition("Remind2", "reminded twice")


def send(transition: Any, **kwargs: Any) -> None:
    """A registered callback."""


def executed(dispatcher: Dispatcher, chain: Chain) -> str:
    (result,) = dispatcher.execute_chains([chain.id])
    return str(result.outcome)


# --- written and published -------------------------------------------------------------------------------------------


def test_an_enqueue_writes_the_request_and_publishes_one_message_of_ids(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}, callbacks={"send": send}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    before = shop.row_of(dispatcher, chain.id)
    assert before.due_at is None

    task_id = chain.enqueue(
        initial_context={"a": 1}, callback="send", callback_kwargs={"b": [2]}, requested_by="the shop"
    )

    row = shop.row_of(dispatcher, chain.id)
    assert row.request == {
        "context": {"a": 1},
        "callback": "send",
        "kwargs": {"b": [2]},
        "requested_by": "the shop",
    }
    assert (row.due_at, row.wake, row.version) == (shop.START, before.wake + 1, before.version)
    (message,) = shop.take_messages(broker_url, shop.REQUESTS)
    assert (message.id, message.task) == (task_id, "dispatcher.execute_chain")
    assert message.kwargs == {"chain_ids": [chain.id]}


def test_an_enqueue_by_resources_makes_the_chain_if_there_is_none(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))

    first = dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
    second = dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})

    (chain,) = dispatcher.find_chains()
    assert chain.resources == tuple(shop.BOOKING)
    assert [(message.id, message.kwargs["chain_ids"]) for message in shop.take_messages(broker_url, shop.REQUESTS)] == [
        (first, [chain.id]),
        (second, [chain.id]),
    ]
    assert shop.row_of(dispatcher, chain.id).context is None, "a request's context is not the chain's"


def test_a_lost_message_is_made_good_by_the_next_sweep(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}))
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    assert dispatcher.sweep()["due"] == 0

    chain.enqueue()
    shop.take_messages(broker_url, shop.REQUESTS)

    assert dispatcher.sweep()["enqueued"] == 1


def test_a_resting_chain_is_due_after_its_rest(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    shop.change_chain(dispatcher, chain.id, next_update_at=shop.START + timedelta(hours=3))

    chain.enqueue(initial_context={"a": 1})

    row = shop.row_of(dispatcher, chain.id)
    assert row.due_at == shop.START + timedelta(hours=3) and row.request["context"] == {"a": 1}


def test_a_request_to_a_disabled_chain_waits_until_it_is_enabled(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}))
    chain = shop.new_chain(dispatcher).disable()

    chain.enqueue(initial_context={"a": 1})
    row = shop.row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (None, {"a": 1})

    assert chain.enable().due_at is not None


def test_a_later_request_replaces_an_earlier_one(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"k": 1}, requested_by="first")
    chain.enqueue(initial_context={"b": 2}, requested_by="second")

    assert shop.row_of(dispatcher, chain.id).request == {
        "context": {"b": 2},
        "callback": None,
        "kwargs": None,
        "requested_by": "second",
    }
    last = chain.events[-1]
    assert shop.actions(chain) == ["created", "request_replaced"]
    assert last.requested_by == "second"


def test_the_same_request_again_is_no_event(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    chain.enqueue(initial_context={"a": [1, {"x": None}]})
    chain.enqueue(initial_context={"a": [1, {"x": None}]})

    assert shop.actions(chain) == ["created"]
    assert shop.row_of(dispatcher, chain.id).wake == 2


# --- used ------------------------------------------------------------------------------------------------------------


def test_the_worker_uses_the_request_s_context_callback_and_arguments(make_dispatcher: shop.Make) -> None:
    named, of_type = shop.Sink(), shop.Sink()
    wants = shop.transition("Wants", "wanted", lambda self: self.context.get("wanted", False))
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callbacks={"send": named}, callback=of_type))
    chain = shop.new_chain(dispatcher)
    assert executed(dispatcher, chain) == "none"

    chain.enqueue(
        initial_context={"wanted": True}, callback="send", callback_kwargs={"lang": "de"}, requested_by="the shop"
    )
    delivery = shop.planned(dispatcher, chain)
    shop.attempt(dispatcher, delivery)

    assert delivery.callback == "named:send"
    (call,) = named.calls
    assert call.kwargs == {"lang": "de"} and call.context["wanted"] is True
    assert len(of_type) == 0
    said = {event.action: event.requested_by for event in chain.events}
    assert said["planned"] == said["state_transition"] == "the shop"


def test_a_request_survives_evaluations_without_a_winner(make_dispatcher: shop.Make) -> None:
    verdicts = [False, True, True]
    wants = shop.transition("Wants", "wanted", lambda _: verdicts.pop(0))
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [wants]}, callbacks={"send": sink}))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(callback="send", callback_kwargs={"a": 1})

    assert executed(dispatcher, chain) == "none"
    assert shop.row_of(dispatcher, chain.id).request is not None
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert sink.calls[0].kwargs == {"a": 1}


def test_a_request_survives_a_guard_that_raises(make_dispatcher: shop.Make) -> None:
    guard = shop.Raises(RuntimeError("once"), times=1, value=True)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Flaky", "there", guard)]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1})

    assert executed(dispatcher, chain) == "guard_failed"
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}


def test_a_request_is_consumed_by_the_plan(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [Remind2]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback_kwargs={"k": 1})

    delivery = shop.planned(dispatcher, chain)

    assert shop.row_of(dispatcher, chain.id).request is None
    assert (delivery.context, delivery.kwargs) == ({"a": 1}, {"k": 1})
    shop.attempt(dispatcher, delivery)
    assert shop.planned(dispatcher, chain).kwargs is None


def test_a_request_is_consumed_by_a_move(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=None))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(requested_by="the shop")

    assert executed(dispatcher, chain) == "moved"

    assert shop.row_of(dispatcher, chain.id).request is None
    assert chain.events[-1].requested_by == "the shop"


def test_a_request_to_a_terminal_chain_ends(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Finish", DONE)]}))
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)

    chain.enqueue(initial_context={"a": 1})
    assert executed(dispatcher, chain) == "terminal"

    row = shop.row_of(dispatcher, chain.id)
    assert (row.request, row.due_at) == (None, None)
    assert dispatcher.sweep()["due"] == 0


@pytest.mark.parametrize("callback", [shop.Sink(), shop.Raises(OSError("no")), None])
def test_an_in_process_execution_neither_reads_nor_takes_another_s_request(
    make_dispatcher: shop.Make, callback: Any
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart(
            {NEW: [shop.Remind, shop.Never], "reminded": [shop.transition("Later", "later")]}, callbacks={"send": sink}
        )
    )
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback="send", callback_kwargs={"k": 2}, requested_by="the shop")
    asked = shop.row_of(dispatcher, chain.id).request

    with suppress(OSError):
        chain.execute(callback=callback)

    row = shop.row_of(dispatcher, chain.id)
    assert row.request == asked and row.due_at is not None, "it is still to be answered"
    assert "a" not in (callback.calls[0].context if isinstance(callback, shop.Sink) else {})
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    assert [(call.context["a"], call.kwargs) for call in sink.calls] == [(1, {"k": 2})]


def test_an_in_process_execution_without_a_winner_leaves_the_chain_due_for_the_request(
    make_dispatcher: shop.Make,
) -> None:
    asked = shop.transition("Asked", "asked", lambda self: bool(self.context.get("please")), recheck_seconds=None)
    dispatcher = make_dispatcher(shop.cart({NEW: [asked], "asked": [shop.Never]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"please": True})

    assert chain.execute()["outcome"] == "none"

    assert dispatcher.sweep()["due"] == 1
    assert shop.planned(dispatcher, chain).context == {"please": True}


def test_a_last_look_that_cancels_puts_the_request_back(make_dispatcher: shop.Make) -> None:
    """With the name of its callback, which the delivery's row does not have where the transition has one of its own."""
    sink, valid = shop.Sink(), [True]
    own = shop.transition("Own", "owned", lambda _: valid[0], callback=lambda self: None)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [own, shop.transition("Other", "other", lambda _: not valid[0])]}, callbacks={"send": sink}),
    )
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback="send", callback_kwargs={"k": 2}, requested_by="the shop")
    asked = shop.row_of(dispatcher, chain.id).request
    delivery = shop.planned(dispatcher, chain)
    assert (delivery.callback, shop.row_of(dispatcher, chain.id).request) == ("own", None)

    valid[0] = False
    assert shop.attempt(dispatcher, delivery).outcome == "cancelled"

    assert shop.row_of(dispatcher, chain.id).request == asked
    closed = dispatcher.find_deliveries(chain_id=chain.id)[0]
    assert (closed.context, closed.kwargs, closed.request) == (None, None, None)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    assert [(call.name, call.context["a"], call.kwargs) for call in sink.calls] == [("Other", 1, {"k": 2})]


def test_a_request_is_not_put_back_before_a_newer_one(make_dispatcher: shop.Make) -> None:
    valid = [True]
    remind = shop.transition("Remind", "reminded", lambda _: valid[0])
    dispatcher = make_dispatcher(shop.cart({NEW: [remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"request": "older"})
    delivery = shop.planned(dispatcher, chain)
    chain.enqueue(initial_context={"request": "newer"})

    valid[0] = False
    assert shop.attempt(dispatcher, delivery).outcome == "cancelled"

    assert shop.row_of(dispatcher, chain.id).request["context"] == {"request": "newer"}


@pytest.mark.parametrize("newer", [False, True])
def test_after_a_second_last_look_only_a_newer_request_makes_the_chain_due_at_once(
    make_dispatcher: shop.Make, broker_url: str, *, newer: bool
) -> None:
    valid, clock = [True], shop.Clock()
    remind = shop.transition("Remind", "reminded", lambda _: valid[0])
    dispatcher = make_dispatcher(shop.cart({NEW: [remind]}, callback=shop.Sink()), clock=clock)
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1})
    for turn in range(2):
        valid[0] = True
        delivery = shop.planned(dispatcher, chain)
        if turn and newer:
            chain.enqueue(initial_context={"a": 2})
        shop.take_messages(broker_url, shop.CHAINS)
        valid[0] = False
        assert shop.attempt(dispatcher, delivery).outcome == "cancelled"

    row = shop.row_of(dispatcher, chain.id)
    assert row.request["context"] == {"a": 2 if newer else 1}
    assert (row.due_at == clock.now) is newer and row.due_at < clock.now + timedelta(minutes=5)
    assert [message.kwargs for message in shop.take_messages(broker_url, shop.CHAINS)] == (
        [{"chain_ids": [chain.id]}] if newer else []
    ), "a chain that is due at once is published at once"


def test_a_person_who_cancels_a_delivery_cancels_its_request(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1})
    shop.planned(dispatcher, chain)

    chain.refresh().cancel_delivery("me")

    assert shop.row_of(dispatcher, chain.id).request is None


# --- at the same time as ---------------------------------------------------------------------------------------------


def test_an_enqueue_during_an_evaluation_that_ends_in_a_rest_is_not_lost(make_dispatcher: shop.Make) -> None:
    gate, clock = shop.Gate(), shop.Clock()
    rejects = shop.transition("Rejects", "there", lambda _: not gate.wait(), recheck_seconds=None)
    dispatcher = make_dispatcher(shop.cart({NEW: [rejects]}), clock=clock)
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        clock.forward(minutes=1)
        make_dispatcher(shop.cart({NEW: [rejects]}), clock=clock).chain(chain.id).enqueue(initial_context={"a": 1})

    assert future.result() == "stale"
    row = shop.row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (clock.now, {"a": 1})
    assert dispatcher.sweep()["due"] == 1
    assert executed(dispatcher, chain) == "none"
    assert shop.row_of(dispatcher, chain.id).due_at is None


def test_an_enqueue_during_an_evaluation_that_fails_is_not_held_up_by_its_back_off(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()

    def fails(_: object) -> bool:
        gate.wait()
        raise RuntimeError("no")

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Fails", "there", fails)]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        shop.new_chain(dispatcher).enqueue()

    assert future.result() == "stale"
    assert shop.row_of(dispatcher, chain.id).due_at == shop.START


def test_an_enqueue_during_an_evaluation_without_callback_is_not_lost(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Wins", "won", gate.wait)]}, callbacks={"send": sink})
    )
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        shop.new_chain(dispatcher).enqueue(callback="send")

    assert future.result() == "stale"
    assert shop.row_of(dispatcher, chain.id).due_at is not None
    assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "delivered"


@pytest.mark.parametrize("ends_in", ["plan", "move"])
def test_an_enqueue_between_read_and_write_keeps_the_newer_request(make_dispatcher: shop.Make, ends_in: str) -> None:
    gate = shop.Gate()
    config = shop.cart({NEW: [shop.transition("Wins", "won", gate.wait)], "won": [shop.Never]}, callback=shop.Sink())
    if ends_in == "move":
        config["chains"][0]["callback"] = None
    dispatcher = make_dispatcher(config)
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"request": "older"}, requested_by="older")

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        shop.new_chain(dispatcher).enqueue(initial_context={"request": "newer"}, requested_by="newer")

    assert future.result() == ("planned" if ends_in == "plan" else "moved")
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"request": "newer"}
    if ends_in == "plan":
        delivery = shop.delivery_of(dispatcher, chain)
        assert (delivery.context, delivery.requested_by) == ({"request": "older"}, "older")
        assert shop.row_of(dispatcher, chain.id).due_at is None
        shop.attempt(dispatcher, delivery)
    row = shop.row_of(dispatcher, chain.id)
    assert row.request["context"] == {"request": "newer"} and row.due_at is not None
    shop.assert_consistent(dispatcher)


def test_an_enqueue_during_a_callback_does_not_hinder_the_move(make_dispatcher: shop.Make) -> None:
    gate, clock = shop.Gate(), shop.Clock()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.OnRequest]}, callback=shop.Sink(gate.wait)), clock=clock
    )
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        shop.new_chain(dispatcher).enqueue(initial_context={"a": 1})
        assert shop.row_of(dispatcher, chain.id).due_at is None, "not evaluated while its delivery is open"

    assert future.result().outcome == "delivered"
    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.request["context"]) == ("reminded", shop.START, {"a": 1})
    shop.assert_consistent(dispatcher)


def test_an_enqueue_during_an_in_process_callback_does_not_hinder_the_move(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.OnRequest]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: chain.execute(callback=shop.Sink(gate.wait))) as future:
        shop.new_chain(dispatcher).enqueue(initial_context={"a": 1})

    assert future.result()["outcome"] == "moved"
    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.request["context"]) == ("reminded", shop.START, {"a": 1})


def test_an_enqueue_while_a_delivery_waits_for_its_retry_makes_the_chain_due_when_it_ends(
    make_dispatcher: shop.Make,
) -> None:
    once = shop.transition("Once", "once", retry=RetryPolicy(base_seconds=0))
    sink = shop.Sink(shop.Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(shop.cart({NEW: [once], "once": [shop.OnRequest]}, callback=sink), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.attempt(dispatcher, delivery)

    chain.enqueue(initial_context={"a": 1})
    assert shop.row_of(dispatcher, chain.id).due_at is None

    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"
    row = shop.row_of(dispatcher, chain.id)
    assert (row.due_at, row.request["context"]) == (shop.START, {"a": 1})


def test_concurrent_enqueues_all_count(make_dispatcher: shop.Make) -> None:
    dispatchers = [make_dispatcher(shop.cart({NEW: [shop.Remind]})) for _ in range(8)]
    chain = shop.new_chain(dispatchers[0])

    def work(dispatcher: Dispatcher, number: int) -> Callable[[], Any]:
        return lambda: dispatcher.enqueue(shop.CHAIN_TYPE, [("online_booking", "b0")], initial_context={"n": number})

    ids = shop.at_once(*(work(dispatcher, number) for number, dispatcher in enumerate(dispatchers)))

    assert len(set(ids)) == 8 and all(isinstance(one, str) for one in ids)
    row = shop.row_of(dispatchers[0], chain.id)
    assert row.wake == 8 and row.request["context"]["n"] in range(8)
    assert shop.actions(chain).count("request_replaced") == 7


# --- refused ---------------------------------------------------------------------------------------------------------


def local() -> Callable[..., Any]:
    def send_mail(transition: Any) -> None:
        """Nobody else can find it."""

    return send_mail


def test_a_callback_that_no_worker_can_find_is_refused_with_what_to_do(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callbacks={"send": send}))
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    for callback, named in (
        (local(), "'send_mail'"),
        (lambda _: None, "register"),
        ("sned", "'send'"),
        (print, "'print'"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            chain.enqueue(callback=callback)
        with pytest.raises(ConfigurationError, match=named):
            dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, callback=callback)

    assert shop.dump_rows(dispatcher) == before


def test_a_registered_function_may_be_given_itself(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callbacks={"mail": send}))
    chain = shop.new_chain(dispatcher)

    chain.enqueue(callback=send)

    assert shop.row_of(dispatcher, chain.id).request["callback"] == "mail"


def test_values_that_cannot_travel_are_refused_by_key(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    before = shop.dump_rows(dispatcher)

    for value in (object(), {1, 2}, float("nan"), b"x", "a\x00b", "\ud800", {"deep": [object()]}):
        for where in ("initial_context", "callback_kwargs"):
            with pytest.raises(NotSerializable, match="booking") as caught:
                dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, **{where: {"fine": 1, "booking": value}})  # type: ignore[arg-type]
            assert isinstance(caught.value, DispatcherError) and where in str(caught.value)
    assert shop.dump_rows(dispatcher) == before


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
def test_an_enqueue_that_cannot_be_published_says_so_and_is_written(make_dispatcher: shop.Make, broker: str) -> None:
    config = shop.cart({NEW: [shop.OnRequest]})
    with silent_server() as silent:
        url = {"refuses": shop.NOBODY, "is silent": silent, "is not configured": None}[broker]
        dispatcher = make_dispatcher(config, broker_url=url, redis_url=None, connect_seconds=1)
        begun = time.monotonic()

        with pytest.raises(EnqueueNotPublished) as caught:
            dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})

        assert time.monotonic() - begun < 10
        (chain,) = dispatcher.find_chains()
        assert (caught.value.chain_id, caught.value.written) == (chain.id, True)
        assert isinstance(caught.value, DispatcherError)
        row = shop.row_of(dispatcher, chain.id)
        assert row.request["context"] == {"a": 1} and row.due_at is not None
    assert make_dispatcher(config).sweep()["enqueued"] == 1


def test_a_best_effort_enqueue_only_logs_that_it_was_not_published(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), broker_url=shop.NOBODY)
    chain = shop.new_chain(dispatcher)

    assert chain.enqueue(best_effort=True) is None
    assert shop.row_of(dispatcher, chain.id).request is not None
    assert "not published" in caplog.text


def test_a_password_of_the_broker_is_in_no_error_and_no_log(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), broker_url="redis://user:s3cret@127.0.0.1:1/0")
    chain = shop.new_chain(dispatcher)

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
def shop_engine(request: pytest.FixtureRequest) -> Engine:
    """The application's engine, on the dispatcher's database and on another."""
    name = {"same database": "application", "other database": "elsewhere"}[request.param]
    engine: Engine = request.getfixturevalue(name)
    return engine


@pytest.mark.parametrize("way", ["enqueue", "enqueue on commit", "enqueue on the commit of another database"])
def test_a_chain_that_an_enqueue_makes_names_who_asked(
    make_dispatcher: shop.Make, application: Engine, elsewhere: Engine, way: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))

    if way == "enqueue":
        dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, requested_by="the shop")
    else:
        with Session(application if way == "enqueue on commit" else elsewhere) as session:
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, requested_by="the shop")
            session.commit()

    (chain,) = dispatcher.find_chains()
    (created,) = chain.events
    assert (created.action, created.requested_by) == ("created", "the shop")


def test_a_chain_that_nobody_asked_for_by_name_is_created_by_nobody(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))

    shop.new_chain(dispatcher)
    dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING)
    list(dispatcher.bulk_get_or_create(shop.CHAIN_TYPE, [[("online_booking", "b9")]]))

    chains = dispatcher.find_chains()
    assert [chain.events[0].requested_by for chain in chains] == [None, None, None]


def test_an_enqueue_on_commit_takes_effect_with_the_commit(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        dispatcher.enqueue_on_commit(
            session, shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1}, requested_by="the shop"
        )

        assert shop.count_rows(dispatcher, ChainRow) == 0
        assert shop.queue_length(broker_url, shop.REQUESTS) == 0
        session.commit()

        (chain,) = dispatcher.find_chains()
        (message,) = shop.take_messages(broker_url, shop.REQUESTS)
        assert message.kwargs == {"chain_ids": [chain.id]}
        row = shop.row_of(dispatcher, chain.id)
        assert (row.request["context"], row.request["requested_by"]) == ({"a": 1}, "the shop")
        assert row.due_at is not None

        session.commit()
        assert shop.queue_length(broker_url, shop.REQUESTS) == 0, "once"


def test_an_enqueue_on_commit_is_forgotten_by_a_rollback(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        session.rollback()
        assert shop.count_rows(dispatcher, ChainRow) == 0

        session.begin()
        session.commit()

    assert shop.count_rows(dispatcher, ChainRow) == 0
    assert shop.queue_length(broker_url, shop.REQUESTS) == 0


def test_an_enqueue_on_commit_is_forgotten_when_the_session_is_closed(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    session = Session(shop_engine)
    dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
    session.close()

    with session:
        session.begin()
        session.commit()

    assert shop.count_rows(dispatcher, ChainRow) == 0
    assert shop.queue_length(broker_url, shop.REQUESTS) == 0


def test_a_savepoint_that_is_rolled_back_takes_its_enqueues_along_and_no_others(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", "kept")])
        savepoint = session.begin_nested()
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", "undone")])
        inner = session.begin_nested()
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", "undone too")])
        inner.commit()
        savepoint.rollback()
        session.commit()

    (chain,) = dispatcher.find_chains()
    assert chain.resources == (("online_booking", "kept"),)
    assert [message.kwargs for message in shop.take_messages(broker_url, shop.REQUESTS)] == [{"chain_ids": [chain.id]}]


def test_a_savepoint_that_is_committed_takes_effect_with_the_outer_commit_only(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        session.begin()
        with session.begin_nested():
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        assert shop.queue_length(broker_url, shop.REQUESTS) == 0
        assert shop.count_rows(dispatcher, ChainRow) == 0
        session.commit()

    assert len(shop.take_messages(broker_url, shop.REQUESTS)) == 1
    assert shop.count_rows(dispatcher, ChainRow) == 1


def test_a_committed_savepoint_is_forgotten_when_the_outer_transaction_rolls_back(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        session.begin()
        with session.begin_nested():
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING)
        session.rollback()
        session.begin()
        session.commit()

    assert shop.queue_length(broker_url, shop.REQUESTS) == 0
    assert shop.count_rows(dispatcher, ChainRow) == 0


def test_a_commit_on_the_dispatcher_s_own_database_loses_nothing_when_the_broker_is_away(
    make_dispatcher: shop.Make, application: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}), broker_url=shop.NOBODY)
    with Session(application) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
        session.commit()

    (chain,) = dispatcher.find_chains()
    assert shop.row_of(dispatcher, chain.id).request["context"] == {"a": 1}
    assert make_dispatcher(shop.cart({NEW: [shop.OnRequest]})).sweep()["enqueued"] == 1


def test_an_enqueue_on_commit_checks_its_arguments_at_once(make_dispatcher: shop.Make, shop_engine: Engine) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        with pytest.raises(ConfigurationError):
            dispatcher.enqueue_on_commit(session, "basket", shop.BOOKING)
        with pytest.raises(ConfigurationError):
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, callback=lambda _: None)
        with pytest.raises(NotSerializable):
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": object()})
        session.commit()
    assert shop.count_rows(dispatcher, ChainRow) == 0


def test_several_enqueues_in_one_transaction_all_take_effect(
    make_dispatcher: shop.Make, broker_url: str, shop_engine: Engine
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    with Session(shop_engine) as session:
        for number in range(3):
            dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", str(number))])
        session.commit()
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", "later")])
        session.commit()

    assert shop.count_rows(dispatcher, ChainRow) == 4
    assert len(shop.take_messages(broker_url, shop.REQUESTS)) == 4


def test_a_clock_that_gives_naive_moments_is_refused_on_every_database(make_dispatcher: shop.Make) -> None:
    naive = datetime(2030, 7, 1, 12)  # noqa: DTZ001 - on purpose
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Asked", "asked")]}), clock=lambda: naive)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(ValueError, match="naive"):
        dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, best_effort=True)

    assert shop.dump_rows(dispatcher) == before
