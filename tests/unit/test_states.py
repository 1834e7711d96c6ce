"""The reserved states and the closed sets of words."""

from dispatcher.states import (
    CLOSED_STATUSES,
    DONE,
    NEW,
    OPEN_STATUSES,
    AttemptOutcome,
    CallbackKind,
    DeliveryStatus,
    EventAction,
    Outcome,
    WaitsFor,
)


def words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())


def test_the_reserved_states_differ():
    assert {NEW, DONE} == {"new", "done"}


def test_the_delivery_statuses_are_a_closed_set():
    assert set(DeliveryStatus) == words("pending, running, delivered, cancelled, dead, held, skipped")


def test_every_status_is_either_open_or_closed():
    assert sorted(OPEN_STATUSES + CLOSED_STATUSES) == sorted(DeliveryStatus)


def test_a_delivery_that_a_person_must_look_at_is_open():
    assert {DeliveryStatus.DEAD, DeliveryStatus.HELD} < set(OPEN_STATUSES)


def test_the_callback_kinds_are_a_closed_set():
    assert set(CallbackKind) == words("own type named local")


def test_the_event_actions_are_a_closed_set():
    assert set(EventAction) == words(
        "created, state_transition, planned, cancelled, dead, held, retried, abandoned, skipped, disabled, enabled, "
        "reset, moved, mapped, request_replaced, no_callback, unknown_definition, guard_failed"
    )


def test_what_a_delivery_waits_for_is_a_closed_set():
    assert set(WaitsFor) == words("retry, rate, hours, asked, paused, suppressed, definition")


def test_the_outcomes_of_an_execution_are_a_closed_set():
    assert set(Outcome) == words(
        "moved, planned, none, terminal, locked, stale, resting, disabled, paused, pending, no_callback, "
        "unknown_definition, guard_failed, out_of_time, missing, dry_run"
    )


def test_the_outcomes_of_an_attempt_contain_the_documented_ones():
    assert words("delivered, retrying, dead, cancelled, held, stale, missing") <= set(AttemptOutcome)


def test_words_are_written_as_they_are_stored():
    members = [*DeliveryStatus, *WaitsFor, *CallbackKind, *EventAction, *Outcome, *AttemptOutcome]
    assert [member for member in members if f"{member}" != member.name.lower()] == []
