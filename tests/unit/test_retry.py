"""Delays after failed attempts: exponential, capped, spread."""

import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.retry import (
    MAX_OWN_WAIT_SECONDS,
    MAX_WAIT_SECONDS,
    RetryPolicy,
    RetryWait,
    back_off,
    growing_interval,
    retry_wait,
    spread_of,
)

MIDDLE = 0.5
"""The random number at which jitter changes nothing."""

UNIT = st.floats(min_value=0, max_value=1, exclude_max=True)
POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(min_value=1, max_value=10**6),
    base_seconds=st.floats(min_value=0, max_value=1e6),
    factor=st.floats(min_value=1, max_value=1e300),
    cap_seconds=st.floats(min_value=0, max_value=MAX_WAIT_SECONDS),
    jitter=st.floats(min_value=0, max_value=1),
)


def middle() -> float:
    return MIDDLE


def test_the_default_policy_makes_five_attempts_within_minutes():
    policy = RetryPolicy()
    assert policy.max_attempts == 5
    assert [policy.delay(n, middle).total_seconds() for n in range(1, 5)] == [10, 30, 90, 270]


def test_a_delay_stops_growing_at_the_cap():
    policy = RetryPolicy(base_seconds=10, factor=10, cap_seconds=500)
    assert [policy.delay(n, middle).total_seconds() for n in (1, 2, 3, 4)] == [10, 100, 500, 500]


@pytest.mark.parametrize(("drawn", "seconds"), [(0.0, 80), (0.5, 100), (0.75, 110)])
def test_jitter_spreads_a_delay_evenly_around_its_value(drawn, seconds):
    assert RetryPolicy(base_seconds=100, jitter=0.2).delay(1, lambda: drawn) == timedelta(seconds=seconds)


def test_without_jitter_the_random_number_does_not_matter():
    policy = RetryPolicy(jitter=0)
    assert policy.delay(2, lambda: 0.0) == policy.delay(2, lambda: 0.999) == timedelta(seconds=30)


@given(policy=POLICIES, attempt=st.integers(min_value=1, max_value=10**6), drawn=UNIT)
def test_a_delay_lies_within_the_jitter_around_the_capped_formula(policy, attempt, drawn):
    try:
        plain = min(policy.base_seconds * policy.factor ** (attempt - 1), policy.cap_seconds)
    except OverflowError:
        plain = policy.cap_seconds if policy.base_seconds > 1e-200 else math.nan
    delay = policy.delay(attempt, lambda: drawn).total_seconds()
    assert delay >= 0
    assert delay <= policy.cap_seconds * (1 + policy.jitter) + 1e-6
    if not math.isnan(plain):
        assert plain * (1 - policy.jitter) - 1e-6 <= delay * (1 + 1e-12)
        assert delay <= plain * (1 + policy.jitter) * (1 + 1e-12) + 1e-6


@given(policy=POLICIES, attempt=st.integers(min_value=1, max_value=10**6))
def test_a_later_attempt_never_waits_less(policy, attempt):
    assert policy.delay(attempt, middle) <= policy.delay(attempt + 1, middle)


@given(policy=POLICIES, attempt=st.integers(min_value=1), drawn=UNIT)
def test_every_delay_can_be_added_to_a_date(policy, attempt, drawn):
    assert datetime(2200, 1, 1, tzinfo=UTC) + policy.delay(attempt, lambda: drawn)


@pytest.mark.parametrize("factor", [3, 3.0, 1e300])
@pytest.mark.parametrize("attempt", [1_000, 10**9, 10**400])
def test_an_attempt_number_beyond_all_floats_waits_for_the_cap(factor, attempt):
    assert RetryPolicy(factor=factor).delay(attempt, middle) == timedelta(hours=1)


def test_a_policy_without_waits_has_none_at_any_attempt():
    assert RetryPolicy(base_seconds=0).delay(10_000, middle) == timedelta(0)


def test_a_slowly_growing_policy_keeps_growing_after_many_attempts():
    policy = RetryPolicy(base_seconds=1, factor=1.001, cap_seconds=1e6, jitter=0)
    assert policy.delay(5001, middle).total_seconds() == pytest.approx(1.001**5000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 2.0},
        {"max_attempts": True},
        {"max_attempts": 2**31},
        {"base_seconds": -1},
        {"base_seconds": math.inf},
        {"base_seconds": math.nan},
        {"cap_seconds": -0.1},
        {"cap_seconds": math.inf},
        {"cap_seconds": math.nan},
        {"cap_seconds": 1e13},
        {"factor": 0.99},
        {"factor": math.inf},
        {"factor": math.nan},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
    ],
)
def test_numbers_that_make_no_policy_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


@pytest.mark.parametrize(("failures", "minutes"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (10**6, 60)])
def test_the_interval_of_a_failing_guard_doubles_up_to_an_hour(failures, minutes):
    assert growing_interval(failures) == timedelta(minutes=minutes)


def test_the_growing_interval_can_start_and_end_elsewhere():
    assert growing_interval(1, base_seconds=5, cap_seconds=8) == timedelta(seconds=5)
    assert growing_interval(2, base_seconds=5, cap_seconds=8) == timedelta(seconds=8)


def test_the_growing_interval_is_spread_downwards_so_that_its_cap_stays_a_cap():
    assert growing_interval(1, spread=0.0) == timedelta(seconds=48)
    assert growing_interval(9, spread=0.5) == timedelta(minutes=54)
    assert growing_interval(9, spread=spread_of(7, 9)) <= timedelta(hours=1)


def test_the_spread_of_a_chain_and_failure_is_always_the_same_and_covers_the_range():
    drawn = [spread_of(chain_id, 1) for chain_id in range(1000)]
    assert drawn == [spread_of(chain_id, 1) for chain_id in range(1000)]
    assert min(drawn) < 0.02 and max(drawn) > 0.98
    assert all(0 <= spread < 1 for spread in drawn)


def test_the_back_off_of_a_chain_is_the_growing_interval_spread_by_its_id_and_failures():
    assert back_off(7, 3) == growing_interval(3, spread=spread_of(7, 3)) == back_off(7, 3)
    assert back_off(7, 3) != back_off(8, 3)


class Answers(RetryPolicy):
    """A policy whose `delay()` gives `answer`, or raises it."""

    answer: object = None

    def delay(self, attempt, random):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer() if callable(self.answer) else self.answer


def answering(answer):
    return SimpleNamespace(
        retry=type("Own", (Answers,), {"answer": staticmethod(answer) if callable(answer) else answer})()
    )


async def promise():
    return timedelta(0)


class Lying(timedelta):
    """A wait that calls itself short."""

    def total_seconds(self):
        return math.nan


def test_the_wait_is_what_the_policy_gives():
    assert retry_wait(SimpleNamespace(retry=RetryPolicy(jitter=0)), 2, middle) == RetryWait(30)
    assert retry_wait(answering(timedelta(hours=5)), 2, middle) == RetryWait(5 * 3600)
    assert retry_wait(answering(Lying(seconds=7)), 2, middle) == RetryWait(7)


def test_a_configured_cap_of_a_year_is_kept():
    policy = RetryPolicy(base_seconds=365 * 86400, cap_seconds=365 * 86400, jitter=0)
    assert retry_wait(SimpleNamespace(retry=policy), 1, middle) == RetryWait(365 * 86400)


@pytest.mark.parametrize(
    "answer", [OSError("no network"), SystemExit(1), None, 10.0, math.nan, timedelta(seconds=-5), promise]
)
def test_a_policy_that_gives_no_wait_waits_as_the_default_policy_and_says_why(answer):
    wait = retry_wait(answering(answer), 2, middle)
    assert wait.seconds == 30 and wait.problem is not None
    if isinstance(answer, BaseException):
        assert wait.problem is answer


def test_a_transition_without_a_policy_waits_as_the_default_policy():
    assert isinstance(retry_wait(SimpleNamespace(), 1, middle).problem, AttributeError)


def test_a_wait_of_a_year_is_cut():
    wait = retry_wait(answering(timedelta(days=365)), 1, middle)
    assert wait.seconds == MAX_OWN_WAIT_SECONDS and "31536000 s" in str(wait.problem).replace("3.1536e+07", "31536000")


def test_a_policy_is_no_reason_to_live_on_when_the_process_must_end():
    with pytest.raises(KeyboardInterrupt):
        retry_wait(answering(KeyboardInterrupt()), 1, middle)
