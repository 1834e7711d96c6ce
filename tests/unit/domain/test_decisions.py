"""What is decided for a chain that was evaluated, and after its callback."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.contexts import Evaluated
from dispatcher.domain.decisions import decide, due_after_move, rest_after_call, rest_of_plan, seconds_to_retry
from dispatcher.domain.records import DeliveryRecord, Request, unsaved_record
from dispatcher.errors import UnreadableRow
from dispatcher.retry import RetryPolicy, back_off
from dispatcher.transition import ChainSnapshot, Transition

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


def asking(rest):
    class Asking(Transition):
        final_state = "asked"

        @property
        def date_next_update(self):
            if isinstance(rest, BaseException):
                raise rest
            return rest

        def is_valid(self):
            return True

    return Asking(ChainSnapshot(1, "cart", "new", (("cart", "1"),), NOW), {})


class TestRestAfterCall:
    """The effect has taken place, so the chain moves whatever its transition asks for; a process that ends, ends."""

    def test_it_is_the_rest_that_the_transition_asks_for(self):
        after = rest_after_call(asking(NOW + timedelta(days=2)), 1, NOW)
        assert (after.next_update_at, after.problem) == (NOW + timedelta(days=2), "")

    def test_a_rest_that_cannot_be_read_is_one_day(self):
        after = rest_after_call(asking(ZeroDivisionError("no such day")), 1, NOW)
        assert after.next_update_at == NOW + timedelta(days=1)
        assert "no such day" in after.problem

    @pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(-15)])
    def test_a_process_that_must_end_is_not_kept(self, end):
        with pytest.raises(type(end)):
            rest_after_call(asking(end), 1, NOW)


CART = DispatcherConfig.parse({"chains": [{"chain_type": "cart", "transitions": {"new": [], "done": []}}]}).get("cart")


class TestDueAfterMove:
    """When a chain is due that has moved."""

    def test_never_where_the_state_is_terminal(self):
        assert due_after_move(CART, "done", NOW, NOW) is None

    def test_at_once_or_after_its_rest_where_this_configuration_does_not_know_the_state(self):
        assert due_after_move(CART, "renamed", None, NOW) == NOW
        assert due_after_move(CART, "renamed", NOW + timedelta(1), NOW) == NOW + timedelta(1)


DELIVERY = DeliveryRecord(
    id="019ac0de-0000-7000-8000-000000000001",
    idempotency_key="6c7e1f0a-6f3c-5f0e-9d53-7b8a3c1e2d40",
    chain_id=7,
    chain_version=1,
    transition="Asking",
    from_state="new",
    final_state="asked",
    callback="type",
    status="running",
    attempt=2,
    max_attempts=5,
    unknown=False,
    next_attempt_at=None,
    publish_after=NOW,
    lease_until=NOW,
    planned_at=NOW,
    finished_at=None,
    requested_by=None,
    last_error=None,
    kwargs=None,
    context=None,
    begins=2,
    waits_for=None,
    waits_reason=None,
    waits_since=NOW,
    has_place=False,
    rest_until=NOW + timedelta(days=3),
    request=None,
    lapse_seen_at=None,
    uncalled=None,
)


class TestRestOfPlan:
    """Until when the chain rests after its delivery is skipped."""

    later = type("Later", (Transition,), {"date_next_update": date(2027, 1, 1)})

    def test_it_is_what_the_plan_asked_for(self):
        assert rest_of_plan(DELIVERY, self.later) == NOW + timedelta(days=3)
        assert rest_of_plan(replace(DELIVERY, rest_until=None), self.later) is None

    def test_a_delivery_from_before_its_row_said_it_has_that_of_its_class(self):
        old = replace(DELIVERY, begins=None, rest_until=None)
        assert rest_of_plan(old, self.later) == datetime(2027, 1, 1, tzinfo=UTC)
        assert rest_of_plan(old, type(asking(None))) is None, "a property says it for an object only"
        assert rest_of_plan(old, None) is None


class Broken(RetryPolicy):
    def delay(self, attempt, random):
        raise OSError("no network")


class TestSecondsToRetry:
    def test_they_are_those_of_the_policy_and_nothing_is_logged(self, caplog):
        transition = type("Asking", (Transition,), {"retry": RetryPolicy(base_seconds=7, factor=2, jitter=0)})
        assert seconds_to_retry(DELIVERY, transition, lambda: 0.5) == 14
        assert caplog.records == []

    def test_a_policy_that_fails_is_named_once(self, caplog):
        transition = type("Asking", (Transition,), {"retry": Broken()})
        assert seconds_to_retry(DELIVERY, transition, lambda: 0.5) == 30
        (record,) = caplog.records
        assert (record.action, record.delivery_id) == ("retry_delay_ignored", DELIVERY.id)
        assert "no network" in caplog.text


def test_a_chain_whose_row_cannot_be_read_backs_off():
    record = unsaved_record("cart", (("cart", "1"),), None, NOW)
    error = UnreadableRow("context", "it is not an object but a list")
    decision = decide(record, None, Evaluated(None, error), Request(), now=NOW, call=None)
    assert (decision.result.outcome, decision.result.detail) == ("guard_failed", str(error))
    assert (decision.write.due_at, decision.write.failures) == (NOW + back_off(0, 1), 1)
    assert decision.write.event == "guard_failed"
