"""Executions: what a worker and an application make of an evaluation, and when a chain is due again."""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import delete

from dispatcher import (
    DONE,
    NEW,
    ChainDisabled,
    ChainLocked,
    ChainNotDue,
    ConfigurationError,
    DeliveryPending,
    Dispatcher,
    Transition,
)
from dispatcher.domain.results import ChainResult
from dispatcher.storage.models import ChainRow
from tests.integration import shop

pytestmark = pytest.mark.integration

PROCESSES = 8


def executed(dispatcher: Dispatcher, *chains: Any) -> Sequence[ChainResult]:
    return dispatcher.execute_chains([chain.id for chain in chains])


# --- at the same time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_redis", [True, False])
def test_concurrent_executions_in_applications_move_a_chain_once_and_call_back_once(
    make_dispatcher: shop.Make, with_redis: bool
) -> None:
    sink = shop.Sink()
    config = shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=sink)
    urls = {} if with_redis else {"redis_url": None, "broker_url": None}
    dispatchers = [make_dispatcher(config, **urls) for _ in range(PROCESSES)]
    chains = [shop.new_chain(dispatcher) for dispatcher in dispatchers]

    results = shop.at_once(*(chain.execute for chain in chains))

    moved = [result for result in results if isinstance(result, dict) and result["outcome"] == "moved"]
    others = [result for result in results if result not in moved]
    assert len(moved) == 1
    for other in others:
        # Those that came too late find the chain locked, planned, changed meanwhile, or moved and without a winner.
        late = isinstance(other, ChainLocked | DeliveryPending)
        assert late or other["outcome"] in ("stale", "none"), other
    assert len(sink) == 1
    assert shop.actions(chains[0]) == ["created", "planned", "state_transition"]
    shop.assert_consistent(dispatchers[0])


@pytest.mark.parametrize("with_redis", [True, False])
def test_concurrent_executions_on_workers_plan_a_chain_once(
    make_dispatcher: shop.Make, broker_url: str, with_redis: bool
) -> None:
    sink = shop.Sink()
    config = shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=sink)
    # Without a lock server the guarded writes alone keep them apart.
    urls = {"broker_url": broker_url} if with_redis else {"redis_url": None, "broker_url": broker_url}
    dispatchers = [make_dispatcher(config, **urls) for _ in range(PROCESSES)]
    chain = shop.new_chain(dispatchers[0])

    def work(dispatcher: Dispatcher) -> Callable[[], Any]:
        return lambda: dispatcher.execute_chains([chain.id])

    results = [result for (result,) in shop.at_once(*map(work, dispatchers))]

    outcomes = [str(result.outcome) for result in results]
    assert outcomes.count("planned") == 1
    assert set(outcomes) <= {"planned", "locked", "stale", "pending"}
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert shop.attempt(dispatchers[0], *message.kwargs["deliveries"][0]).outcome == "delivered"
    assert len(sink) == 1
    shop.assert_consistent(dispatchers[0])


def test_an_evaluation_that_was_overtaken_is_stale(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    passes: list[object] = []

    def first_waits(_: object) -> bool:
        passes.append(_)
        return gate.wait() if len(passes) == 1 else True

    config = shop.cart({NEW: [shop.transition("Guarded", "guarded", first_waits)]}, callback=sink)
    slow, fast = make_dispatcher(config, redis_url=None), make_dispatcher(config, redis_url=None)
    chain = shop.new_chain(slow)

    with gate.during(lambda: executed(slow, chain)) as future:
        delivery = shop.planned(fast, chain)

    (result,) = future.result()
    assert result.outcome == "stale" and result.delivery_id is None
    assert [one.id for one in slow.find_deliveries()] == [delivery.id]
    assert shop.actions(chain) == ["created", "planned"]


# --- what a worker moves, plans and leaves ---------------------------------------------------------------------------


def test_a_worker_moves_a_chain_to_done_without_any_callback(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Finish", DONE)]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert (result.outcome, result.state) == ("moved", DONE)
    assert chain.refresh().state == DONE and chain.due_at is None
    event = chain.events[-1]
    assert (event.action, event.value, event.from_state, event.detail) == ("state_transition", DONE, NEW, "Finish")
    assert len(sink) == 0 and dispatcher.find_deliveries() == []


@pytest.mark.parametrize("where", ["transition", "type"])
def test_a_worker_moves_a_chain_whose_callback_is_none(make_dispatcher: shop.Make, where: str) -> None:
    sink, clock = shop.Sink(), shop.Clock()
    silent = shop.transition("Silent", "silent", **({"callback": None} if where == "transition" else {}))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [silent], "silent": [shop.Never]}, callback=None if where == "type" else sink), clock=clock
    )
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert (result.outcome, chain.refresh().state, chain.due_at) == ("moved", "silent", shop.START)
    assert len(sink) == 0
    shop.assert_consistent(dispatcher)


def test_a_worker_does_not_move_a_chain_for_which_it_has_no_callback(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert (result.outcome, result.state) == ("no_callback", NEW)
    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.pending_delivery_id) == (NEW, None, None)
    assert shop.actions(chain) == ["created", "no_callback"]
    assert dispatcher.sweep()["due"] == 0


def test_a_chain_without_callback_is_moved_by_a_request_that_names_one(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callbacks={"send": sink}))
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)

    chain.enqueue(callback="send")
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert chain.refresh().state == "reminded" and len(sink) == 1


def test_a_winner_with_a_callback_is_planned_as_a_delivery(make_dispatcher: shop.Make, broker_url: str) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never, shop.Remind]}, callback=shop.Sink()), clock=clock)
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    delivery = shop.delivery_of(dispatcher, chain)
    assert (result.outcome, result.delivery_id, result.state) == ("planned", delivery.id, NEW)
    assert result.errors == {"<Never>": ["Never is not wanted"]}
    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.pending_delivery_id, row.version) == (NEW, None, delivery.id, 1)
    assert (delivery.status, delivery.attempt, delivery.callback) == ("pending", 0, "type")
    assert (delivery.transition, delivery.from_state, delivery.final_state) == ("Remind", NEW, "reminded")
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert (message.task, message.kwargs) == ("dispatcher.deliver_callback", {"deliveries": [[delivery.id, 1]]})
    event = chain.events[-1]
    assert (event.action, event.value, event.created_at) == ("planned", "Remind", shop.START)


def test_a_chain_that_waits_for_its_delivery_is_not_evaluated(make_dispatcher: shop.Make) -> None:
    asked: list[object] = []
    counted = shop.transition("Counted", "counted", lambda self: not asked.append(self))
    dispatcher = make_dispatcher(shop.cart({NEW: [counted]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    shop.planned(dispatcher, chain)

    (result,) = executed(dispatcher, chain)
    with pytest.raises(DeliveryPending):
        chain.execute()

    assert result.outcome == "pending" and len(asked) == 1


def test_a_plan_that_cannot_be_published_stays_planned(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()), broker_url=shop.NOBODY)
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert result.outcome == "planned"
    assert shop.delivery_of(dispatcher, chain).publish_after is not None
    assert "relay" in caplog.text


def test_an_execution_without_a_configured_broker_connects_to_nobody(
    make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery's own default is a RabbitMQ on localhost, which may be a stranger's."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection to a broker that nobody configured")

    monkeypatch.setattr("amqp.transport._AbstractTransport.connect", refuse)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()), redis_url=None, broker_url=None)
    chain = shop.new_chain(dispatcher)

    assert [str(result.outcome) for result in executed(dispatcher, chain)] == ["planned"]


def test_a_terminal_state_gives_no_transition(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    assert chain.refresh().due_at is None

    (result,) = executed(dispatcher, chain)

    assert (result.outcome, result.transition) == ("terminal", None)
    assert chain.execute()["outcome"] == "terminal"


def test_later_candidates_are_not_asked_once_one_has_won(make_dispatcher: shop.Make) -> None:
    asked: list[str] = []

    def asks(name: str, verdict: bool) -> Callable[[Any], bool]:
        return lambda _: asked.append(name) or verdict  # type: ignore[func-returns-value]

    candidates = [
        shop.transition(name, f"to_{name}", asks(name, verdict))
        for name, verdict in [("A", False), ("B", True), ("C", True)]
    ]
    dispatcher = make_dispatcher(shop.cart({NEW: candidates}, callback=None))
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert (asked, result.state) == (["A", "B"], "to_B")


def test_one_execution_takes_one_transition(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.transition("Finish", DONE)]}, callback=None)
    )
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    assert chain.refresh().state == "reminded"


def test_ids_that_are_named_twice_are_executed_once(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.transition("Finish", DONE)]}, callback=None)
    )
    chain = shop.new_chain(dispatcher)

    assert [str(result.outcome) for result in dispatcher.execute_chains([chain.id, chain.id])] == ["moved"]


def test_an_unknown_id_is_a_named_outcome(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)

    results = dispatcher.execute_chains([9_999_999, chain.id])

    assert [str(result.outcome) for result in results] == ["missing", "planned"]


def test_no_session_is_open_while_user_code_runs(make_dispatcher: shop.Make) -> None:
    seen: dict[str, int] = {}

    def watch(name: str) -> None:
        seen[name] = dispatcher.database.engine.pool.checkedout()  # type: ignore[attr-defined]

    def load(snapshots: Sequence[Any]) -> dict[int, dict[str, Any]]:
        watch("load_context")
        return {}

    watched = shop.transition("Watched", "watched", lambda _: watch("guard") is None)
    config = shop.cart({NEW: [watched]}, callback=lambda _: watch("callback"), load_context=load)
    dispatcher = make_dispatcher(config)
    chain = shop.new_chain(dispatcher)

    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    shop.new_chain(dispatcher, 2).execute(callback=lambda _: watch("local callback"))

    assert seen == {"load_context": 0, "guard": 0, "callback": 0, "local callback": 0}


# --- when it is due again --------------------------------------------------------------------------------------------


def waits(name: str, when: date | datetime, **attributes: Any) -> type[Transition]:
    return shop.transition(name, name.lower(), lambda self: self.not_before(when, f"{name} is early"), **attributes)


def test_a_rejected_chain_is_due_when_its_guard_may_say_otherwise(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [waits("Wait", shop.START + timedelta(days=2))]}, callback=None), clock=clock
    )
    chain = shop.new_chain(dispatcher)

    (result,) = executed(dispatcher, chain)

    assert (result.outcome, result.errors) == ("none", {"<Wait>": ["Wait is early"]})
    assert chain.refresh().due_at == shop.START + timedelta(days=2)
    assert dispatcher.sweep()["due"] == 0
    clock.forward(days=2)
    assert dispatcher.sweep()["due"] == 1
    assert executed(dispatcher, chain)[0].outcome == "moved"


def test_the_earliest_of_all_candidates_counts(make_dispatcher: shop.Make) -> None:
    candidates = [waits("Late", shop.START + timedelta(days=9)), waits("Soon", shop.START + timedelta(hours=1))]
    dispatcher = make_dispatcher(shop.cart({NEW: candidates}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    assert chain.refresh().due_at == shop.START + timedelta(hours=1)


def test_the_earliest_of_several_times_in_one_guard_counts(make_dispatcher: shop.Make) -> None:
    def guard(self: Transition) -> bool:
        times = [shop.START + timedelta(days=days) for days in (3, 1, 2)]
        verdicts = [self.not_before(when, "early") for when in times]
        return all(verdicts)

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Many", "many", guard)]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    assert chain.refresh().due_at == shop.START + timedelta(days=1)


@pytest.mark.parametrize(
    ("of_type", "of_transition", "due"),
    [
        (None, [{}], None),
        (60, [{}], 60),
        (60, [{"recheck_seconds": 5}], 5),
        (60, [{"recheck_seconds": None}], None),
        (None, [{"recheck_seconds": 5}], 5),
        (60, [{"recheck_seconds": None}, {}], 60),
        (None, [{"recheck_seconds": 7}, {"recheck_seconds": 3}], 3),
        (0, [{"recheck_seconds": None}], None),
    ],
)
def test_a_chain_is_due_again_after_the_recheck_of_its_candidates(
    make_dispatcher: shop.Make, of_type: float | None, of_transition: list[dict[str, Any]], due: float | None
) -> None:
    candidates = [
        shop.transition(f"Candidate{number}", "there", valid=False, **options)
        for number, options in enumerate(of_transition)
    ]
    dispatcher = make_dispatcher(shop.cart({NEW: candidates}, recheck_seconds=of_type), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    assert chain.refresh().due_at == (None if due is None else shop.START + timedelta(seconds=due))


def test_a_time_outweighs_the_recheck_of_the_same_candidate(make_dispatcher: shop.Make) -> None:
    candidate = waits("Wait", shop.START + timedelta(days=1), recheck_seconds=5)
    dispatcher = make_dispatcher(shop.cart({NEW: [candidate]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    assert chain.refresh().due_at == shop.START + timedelta(days=1)


def test_an_evaluation_that_learns_nothing_writes_nothing(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never]}), clock=clock)  # asked at every sweep
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    before = shop.dump_rows(dispatcher)
    clock.forward(hours=1)

    (result,) = executed(dispatcher, chain)

    assert result.outcome == "none"
    assert shop.dump_rows(dispatcher) == before
    assert chain.execute()["outcome"] == "none"
    assert shop.dump_rows(dispatcher) == before


def test_a_chain_that_waits_for_a_time_is_not_written_again_before_it(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart({NEW: [waits("Wait", shop.START + timedelta(days=2))]}), clock=clock)
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    before = shop.dump_rows(dispatcher)
    clock.forward(hours=1)

    executed(dispatcher, chain)

    assert shop.dump_rows(dispatcher) == before


@pytest.mark.parametrize("kind", ["date", "naive", "aware", "other zone"])
@pytest.mark.parametrize("on", ["class", "self"])
def test_a_chain_rests_until_its_date_next_update(make_dispatcher: shop.Make, kind: str, on: str) -> None:
    until = datetime(2024, 3, 5, tzinfo=UTC) if kind == "date" else shop.START + timedelta(days=4)
    given: Any = {
        "date": until.date(),
        "naive": until.replace(tzinfo=None),
        "aware": until,
        "other zone": until.astimezone(timezone(timedelta(hours=-5))),
    }[kind]

    def guard(self: Transition) -> bool:
        if on == "self":
            self.date_next_update = given
        return True

    resting = shop.transition("Resting", "resting", guard, **({"date_next_update": given} if on == "class" else {}))
    clock, sink = shop.Clock(), shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [resting], "resting": [shop.transition("Finish", DONE)]}), clock=clock)
    here, silent, sent = (shop.new_chain(dispatcher, number) for number in range(3))
    config = shop.cart({NEW: [resting], "resting": [shop.transition("Finish", DONE)]}, callback=None)
    without = make_dispatcher(config, clock=clock)
    with_sink = make_dispatcher({"chains": [{**config["chains"][0], "callback": sink}]}, clock=clock)

    here.execute(callback=sink)
    executed(without, silent)
    shop.attempt(with_sink, shop.planned(with_sink, sent))

    for chain in (here, silent, sent):
        chain.refresh()
        assert (chain.state, chain.next_update_at, chain.due_at) == ("resting", until, until)
        assert chain.date_next_update == until
        with pytest.raises(ChainNotDue) as caught:
            chain.execute()
        assert isinstance(caught.value, ValueError)
        assert executed(dispatcher, chain)[0].outcome == "resting"
    assert dispatcher.sweep()["due"] == 0
    clock.now = until
    assert dispatcher.sweep()["due"] == 3
    assert here.execute()["outcome"] == "moved"
    assert here.next_update_at is None


def test_a_chain_is_never_due_before_its_rest_is_over(make_dispatcher: shop.Make) -> None:
    until = shop.START + timedelta(days=1)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    shop.change_chain(dispatcher, chain.id, next_update_at=until)

    chain.enqueue()

    assert chain.refresh().due_at == until


def test_the_injected_clock_is_the_domain_s_and_leases_stay_on_the_database_s(make_dispatcher: shop.Make) -> None:
    clock, seen = shop.Clock(datetime(1997, 1, 1, tzinfo=UTC)), []
    gate = shop.Gate()
    keeps = shop.transition("Keeps", "kept", lambda self: not seen.append(self.now))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [keeps], "kept": [shop.Never]}, callback=shop.Sink(gate.wait)), clock=clock
    )
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    assert abs(delivery.planned_at - datetime.now(UTC)) < timedelta(minutes=5)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)):
        lease_until = shop.delivery_of(dispatcher, chain).lease_until
    assert lease_until is not None and timedelta(0) < lease_until - datetime.now(UTC) < timedelta(minutes=5)
    assert set(seen) == {clock.now}
    assert {event.created_at for event in chain.events} == {clock.now}
    assert chain.refresh().due_at == chain.created_at == clock.now


def test_without_a_clock_the_domain_s_time_is_the_database_s(make_dispatcher: shop.Make) -> None:
    seen: list[datetime] = []
    keeps = shop.transition("Keeps", "kept", lambda self: bool(seen.append(self.now)))
    dispatcher = make_dispatcher(shop.cart({NEW: [keeps]}))
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)

    (now,) = seen
    assert now.tzinfo is not None and abs(now - datetime.now(UTC)) < timedelta(minutes=5)


# --- failures --------------------------------------------------------------------------------------------------------


def assert_backs_off(waits_seen: list[timedelta]) -> None:
    """From a minute to an hour, each wait twice the one before, with a fifth of it drawn off at random."""
    for wait, minutes in zip(waits_seen, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60], strict=False):
        assert 0.8 * timedelta(minutes=minutes) <= wait <= timedelta(minutes=minutes)
    assert len(set(waits_seen)) == len(waits_seen), "chains that failed together are not asked again together"


def test_a_guard_that_raises_backs_off_further_each_time_and_is_one_event(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    bad = shop.transition("Bad", "bad", shop.Raises(RuntimeError("no such booking")))
    dispatcher = make_dispatcher(shop.cart({NEW: [bad]}), clock=clock)
    chain = shop.new_chain(dispatcher)
    waits_seen = []

    for failures in range(1, 12):
        (result,) = executed(dispatcher, chain)
        row = shop.row_of(dispatcher, chain.id)
        assert (result.outcome, row.failures, row.state) == ("guard_failed", failures, NEW)
        waits_seen.append(row.due_at - clock.now)
        clock.now = row.due_at

    assert_backs_off(waits_seen)
    assert shop.actions(chain) == ["created", "guard_failed"]
    assert "no such booking" in (chain.events[-1].detail or "")


def test_a_guard_that_recovers_ends_the_back_off(make_dispatcher: shop.Make) -> None:
    flaky = shop.transition("Flaky", "there", shop.Raises(RuntimeError("once"), times=2, value=False))
    dispatcher = make_dispatcher(shop.cart({NEW: [flaky]}), clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    executed(dispatcher, chain)

    (result,) = executed(dispatcher, chain)

    row = shop.row_of(dispatcher, chain.id)
    assert (result.outcome, row.failures, row.due_at) == ("none", 0, shop.START)


def test_a_guard_that_raises_again_later_is_a_new_series(make_dispatcher: shop.Make) -> None:
    guard = shop.Raises(RuntimeError("one"), times=1, value=False)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Flaky", "there", guard)]}))
    chain = shop.new_chain(dispatcher)
    executed(dispatcher, chain)
    executed(dispatcher, chain)
    guard.left = 1

    executed(dispatcher, chain)

    assert shop.actions(chain) == ["created", "guard_failed", "guard_failed"]


def test_a_guard_that_raises_fails_its_own_chain_alone(make_dispatcher: shop.Make) -> None:
    def guard(self: Transition) -> bool:
        if ("online_booking", "b1") in self.chain.resources:
            raise SystemExit("in user code")
        return True

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Some", "some", guard)]}, callback=None))
    chains = [shop.new_chain(dispatcher, number) for number in range(3)]

    results = executed(dispatcher, *chains)

    assert [str(result.outcome) for result in results] == ["moved", "guard_failed", "moved"]


def test_a_winner_after_a_failed_guard_is_not_asked(make_dispatcher: shop.Make) -> None:
    candidates = [shop.transition("Bad", "bad", shop.Raises(RuntimeError("no"))), shop.Remind]
    dispatcher = make_dispatcher(shop.cart({NEW: candidates}, callback=None))
    chain = shop.new_chain(dispatcher)

    assert executed(dispatcher, chain)[0].outcome == "guard_failed"
    assert chain.refresh().state == NEW


@pytest.mark.parametrize("what", ["state", "chain type"])
def test_a_name_that_this_worker_does_not_know_is_left_to_another(make_dispatcher: shop.Make, what: str) -> None:
    clock = shop.Clock()
    old = shop.cart({NEW: [shop.Remind]}, callback=None)
    new = shop.cart({NEW: [shop.Remind], "reminded": [shop.transition("Next", "next")]}, callback=None)
    if what == "chain type":
        new["chains"].append({"chain_type": "basket", "transitions": {NEW: [shop.Remind]}, "callback": None})
    old_worker, new_worker = make_dispatcher(old, clock=clock), make_dispatcher(new, clock=clock)
    chain = shop.new_chain(new_worker, chain_type=shop.CHAIN_TYPE if what == "state" else "basket")
    if what == "state":
        chain.move_to("reminded", "set up")
        chain.move_to("next", "set up")
    before = chain.refresh().state
    series = []

    for failures in range(1, 10):
        (result,) = executed(old_worker, chain)
        row = shop.row_of(old_worker, chain.id)
        assert (result.outcome, row.failures, row.state) == ("unknown_definition", failures, before)
        series.append(row.due_at - clock.now)
        clock.now = row.due_at

    assert_backs_off(series)
    assert shop.actions(chain).count("unknown_definition") == 1
    assert executed(new_worker, chain)[0].outcome in ("moved", "terminal")
    assert shop.row_of(new_worker, chain.id).failures == 0


def test_a_callback_name_that_this_worker_does_not_know_is_left_to_another(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    old_worker = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    new_worker = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callbacks={"send": sink}))
    chain = shop.new_chain(new_worker)
    chain.enqueue(callback="send")

    (result,) = executed(old_worker, chain)

    assert result.outcome == "unknown_definition" and "send" in result.detail
    assert shop.row_of(old_worker, chain.id).request is not None
    assert shop.attempt(new_worker, shop.planned(new_worker, chain)).outcome == "delivered"
    assert len(sink) == 1


# --- context ---------------------------------------------------------------------------------------------------------


def test_later_sources_of_context_win(make_dispatcher: shop.Make) -> None:
    seen: list[dict[str, Any]] = []
    sees = shop.transition(
        "Sees", "seen", lambda self: bool(seen.append(dict(self.context))), initial_context={"d": "class"}
    )
    layers = {"a": "load", "b": "load", "c": "load", "d": "load"}
    config = shop.cart({NEW: [sees]}, load_context=lambda snapshots: {one.id: layers for one in snapshots})
    dispatcher = make_dispatcher(config)
    chain = shop.new_chain(dispatcher, initial_context={"b": "stored", "c": "stored", "d": "stored"})
    chain.enqueue(initial_context={"c": "request", "d": "request"})

    executed(dispatcher, chain)
    chain.execute(initial_context={"c": "call", "d": "call"})
    chain.execute()

    assert [{key: one[key] for key in "abcd"} for one in seen] == [
        {"a": "load", "b": "stored", "c": "request", "d": "class"},
        {"a": "load", "b": "stored", "c": "call", "d": "class"},
        {"a": "load", "b": "stored", "c": "stored", "d": "class"},
    ]
    assert {tuple(map(tuple, one["resources"])) for one in seen} == {(("online_booking", "b0"),)}


def test_contexts_are_loaded_once_for_a_batch_of_one_type(make_dispatcher: shop.Make) -> None:
    asked: list[list[int]] = []

    def load(snapshots: Sequence[Any]) -> dict[int, dict[str, Any]]:
        asked.append([one.id for one in snapshots])
        return {one.id: {"wanted": one.id % 2 == 0} for one in snapshots}

    by_context = shop.transition("ByContext", "there", lambda self: self.context["wanted"])
    dispatcher = make_dispatcher(shop.cart({NEW: [by_context]}, callback=None, load_context=load))
    chains = [shop.new_chain(dispatcher, number) for number in range(4)]

    results = executed(dispatcher, *chains)

    assert asked == [[chain.id for chain in chains]]
    expected = ["moved" if (chain.id or 0) % 2 == 0 else "none" for chain in chains]
    assert [str(result.outcome) for result in results] == expected


def test_a_loader_that_fails_for_one_chain_fails_that_chain_alone(make_dispatcher: shop.Make) -> None:
    def load(snapshots: Sequence[Any]) -> dict[int, dict[str, Any]]:
        for one in snapshots:
            if ("online_booking", "b1") in one.resources:
                raise LookupError("b1 is gone")
        return {}

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=None, load_context=load))
    chains = [shop.new_chain(dispatcher, number) for number in range(3)]

    results = executed(dispatcher, *chains)

    assert [str(result.outcome) for result in results] == ["moved", "guard_failed", "moved"]
    assert shop.actions(chains[1]) == ["created", "guard_failed"]
    with pytest.raises(LookupError, match="b1 is gone"):
        chains[1].execute()


# --- in this process -------------------------------------------------------------------------------------------------


def test_context_and_arguments_of_an_in_process_call_are_never_serialised(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    booking, connection = object(), object()

    result = shop.new_chain(dispatcher).execute(
        initial_context={"booking": booking}, callback=sink, callback_kwargs={"connection": connection}
    )

    assert result["outcome"] == "moved"
    (call,) = sink.calls
    assert call.context["booking"] is booking and call.kwargs == {"connection": connection}
    assert shop.delivery_of(dispatcher, shop.new_chain(dispatcher)).kwargs is None


def test_an_in_process_callback_runs_on_the_winner_with_its_key(make_dispatcher: shop.Make) -> None:
    won: list[Transition] = []
    wins = shop.transition("Wins", "won", lambda self: not won.append(self))
    dispatcher = make_dispatcher(shop.cart({NEW: [wins]}))
    sink = shop.Sink()
    chain = shop.new_chain(dispatcher)

    chain.execute(callback=sink)

    (call,) = sink.calls
    assert call.transition is won[0] and call.key == shop.delivery_of(dispatcher, chain).idempotency_key is not None


def test_what_an_in_process_callback_raises_goes_on_unchanged(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), clock=clock)
    chain = shop.new_chain(dispatcher)
    error = OSError("mail server down")

    with pytest.raises(OSError, match="mail server down") as caught:
        chain.execute(callback=shop.Raises(error))

    assert caught.value is error
    assert chain.refresh().state == NEW and chain.due_at == shop.START
    delivery = shop.delivery_of(dispatcher, chain)
    assert delivery.status == "cancelled" and "mail server down" in (delivery.last_error or "")
    assert shop.actions(chain) == ["created", "planned", "cancelled"]
    assert chain.execute(callback=shop.Sink())["outcome"] == "moved"
    shop.assert_consistent(dispatcher)


def test_an_interrupted_in_process_callback_closes_its_delivery(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    with pytest.raises(KeyboardInterrupt):
        chain.execute(callback=shop.Raises(KeyboardInterrupt()))

    assert shop.delivery_of(dispatcher, chain).status == "cancelled"


def test_what_a_guard_raises_in_process_goes_on_unchanged(make_dispatcher: shop.Make) -> None:
    error = LookupError("no such booking")
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Bad", "bad", shop.Raises(error))]}))
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(LookupError) as caught:
        chain.execute()

    assert caught.value is error
    assert shop.dump_rows(dispatcher) == before
    with pytest.raises(LookupError):  # and the lock was given back
        chain.execute()


def test_without_any_callback_an_in_process_execution_moves_and_warns(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    result = chain.execute()

    assert (result["outcome"], chain.state) == ("moved", "reminded")
    assert [record.levelno for record in caplog.records if "moves without one" in record.message] == [logging.WARNING]


@pytest.mark.parametrize("where", ["transition", "type"])
def test_a_callback_that_is_none_on_purpose_is_no_warning(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    silent = shop.transition("Silent", "silent", **({"callback": None} if where == "transition" else {}))
    dispatcher = make_dispatcher(shop.cart({NEW: [silent]}, **({"callback": None} if where == "type" else {})))

    assert shop.new_chain(dispatcher).execute()["outcome"] == "moved"
    assert "moves without one" not in caplog.text


def test_the_call_s_callback_goes_before_the_type_s_and_after_the_transition_s_own(make_dispatcher: shop.Make) -> None:
    own, given, of_type = shop.Sink(), shop.Sink(), shop.Sink()

    def by_itself(self: Transition, **kwargs: Any) -> None:
        own(self, **kwargs)

    has_own = shop.transition("HasOwn", "own", callback=by_itself)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [has_own], "own": [shop.Never]}, callback=of_type)
    )
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)

    first.execute(callback=given)
    first.execute(callback=given, callback_kwargs={"a": 1})
    second.execute()

    assert (given.names, own.names, of_type.names) == (["Remind"], ["HasOwn"], ["Remind"])
    assert own.calls[0].kwargs == {"a": 1}


def test_a_registered_name_may_be_given_in_process_too(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callbacks={"send": sink}))
    chain = shop.new_chain(dispatcher)

    with pytest.raises(ConfigurationError, match="sent"):
        chain.execute(callback="sent")
    assert chain.execute(callback="send")["outcome"] == "moved"
    assert len(sink) == 1


def test_an_in_process_execution_needs_a_database_only(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), redis_url=None, broker_url=None)
    sink = shop.Sink()

    assert shop.new_chain(dispatcher).execute(callback=sink)["outcome"] == "moved"
    assert len(sink) == 1


def test_a_chain_disabled_during_an_in_process_evaluation_is_not_moved(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Guarded", "guarded", gate.wait)]}))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: chain.execute(callback=sink)) as future:
        shop.new_chain(dispatcher).disable()

    assert future.result()["outcome"] == "stale"
    assert len(sink) == 0
    with pytest.raises(ChainDisabled):
        chain.execute(callback=sink)


def test_the_lease_of_an_in_process_callback_is_renewed_while_it_runs(
    make_dispatcher: shop.Make,
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}), lease_seconds=2)
    chain = shop.new_chain(dispatcher)
    leases: list[datetime | None] = []

    def until_renewed_twice(_: object) -> None:
        deadline = time.monotonic() + shop.WAIT_SECONDS
        while len(set(leases)) < 3:
            assert time.monotonic() < deadline, "the lease was not renewed"
            leases.append(shop.delivery_of(dispatcher, chain).lease_until)
            dispatcher.relay()
            time.sleep(0.02)

    result = chain.execute(callback=shop.Sink(until_renewed_twice))

    assert result["outcome"] == "moved"
    assert all(lease is not None for lease in leases)


def test_an_in_process_callback_whose_lease_ended_does_not_move_the_chain(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    def suspended(_: object) -> None:
        shop.change_delivery(dispatcher, shop.delivery_of(dispatcher, chain).id, **shop.LAPSED)
        dispatcher.relay()

    result = chain.execute(callback=shop.Sink(suspended))

    assert (result["outcome"], chain.state) == ("stale", NEW)
    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert chain.due_at is not None
    assert "taken over" in caplog.text
    shop.assert_consistent(dispatcher)


def test_the_requester_of_an_in_process_call_is_in_the_history(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    chain.execute(callback=shop.Sink(), requested_by="cart_scripts")

    said = {event.action: event.requested_by for event in chain.events}
    assert said["planned"] == said["state_transition"] == "cart_scripts"
    for wrong in ("x" * 256, 5, "a\x00"):
        with pytest.raises(ValueError, match="requested_by"):
            chain.execute(requested_by=wrong)


# --- going on at once ------------------------------------------------------------------------------------------------


def test_a_type_that_continues_publishes_the_next_evaluation_after_each_move(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    steps = {
        NEW: [shop.transition("A", "a", callback=None)],
        "a": [shop.transition("B", "b")],
        "b": [shop.transition("C", "c")],
        "c": [shop.transition("Finish", DONE)],
    }
    dispatcher = make_dispatcher(shop.cart(steps, callback=shop.Sink(), queue="carts", **{"continue": True}))
    chain = shop.new_chain(dispatcher)

    executed(dispatcher, chain)
    (after_move,) = shop.take_messages(broker_url, "carts")
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    (after_delivery,) = shop.take_messages(broker_url, "carts")
    chain.execute()
    (after_call,) = shop.take_messages(broker_url, "carts")
    executed(dispatcher, chain)

    for message in (after_move, after_delivery, after_call):
        assert (message.task, message.kwargs) == ("dispatcher.execute_chain", {"chain_ids": [chain.id]})
    assert shop.take_messages(broker_url, "carts") == []
    assert chain.refresh().state == DONE


def test_a_type_that_does_not_continue_publishes_nothing_after_a_move(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=None))

    executed(dispatcher, shop.new_chain(dispatcher))

    assert shop.take_messages(broker_url, shop.CHAINS) == []


def test_a_follow_up_that_cannot_be_published_does_not_undo_the_move(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=None, **{"continue": True}),
        broker_url=shop.NOBODY,
    )
    chain = shop.new_chain(dispatcher)

    assert executed(dispatcher, chain)[0].outcome == "moved"
    assert chain.refresh().due_at is not None


# --- deleted meanwhile -----------------------------------------------------------------------------------------------


def test_a_chain_deleted_during_its_evaluation_is_a_named_outcome(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Guarded", "guarded", gate.wait)]}, callback=shop.Sink())
    )
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: executed(dispatcher, chain)) as future:
        dispatcher.database.write(
            lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id))
        )

    assert [str(result.outcome) for result in future.result()] == ["stale"]
