"""What a transition sees, and what it can say about time."""

from datetime import UTC, date, datetime, timedelta, timezone
from types import MappingProxyType
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.bounds import EARLIEST, LATEST
from dispatcher.retry import RetryPolicy
from dispatcher.states import NEW
from dispatcher.transition import TYPE_DEFAULT, ChainSnapshot, Transition, as_utc

CREATED = datetime(2024, 1, 1, 12, tzinfo=UTC)
NOW = datetime(2024, 3, 10, 15, 30, tzinfo=UTC)
RESOURCES = (("online_booking", "123456"), ("customer", "7"))
CHAIN = ChainSnapshot(id=1, chain_type="cart", state=NEW, resources=RESOURCES, created_at=CREATED)
MOMENTS = st.datetimes(
    min_value=datetime(1990, 1, 1),  # noqa: DTZ001 - Hypothesis wants the bounds without a zone
    max_value=datetime(2100, 1, 1),  # noqa: DTZ001 - as above
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-11, minutes=-30))]),
)


class Reminder(Transition):
    final_state = "reminded"

    def is_valid(self):
        return True


class WithContext(Reminder):
    initial_context = MappingProxyType({"source": "class", "plan": "gold"})


def reminder(context=None, *, now=NOW, cls=Reminder):
    return cls(CHAIN, context, now=now)


def test_the_context_always_has_the_resources():
    assert reminder().context == {"resources": list(RESOURCES)}
    assert reminder({"cart": 1}).context == {"resources": list(RESOURCES), "cart": 1}


def test_the_given_context_may_replace_the_resources():
    assert reminder({"resources": [("a", "b")]}).context == {"resources": [("a", "b")]}


def test_the_context_of_the_class_wins_over_the_given_one():
    context = reminder({"source": "call", "other": 1}, cls=WithContext).context
    assert context == {"resources": list(RESOURCES), "source": "class", "plan": "gold", "other": 1}


def test_writing_into_the_context_changes_neither_the_callers_dict_nor_the_class():
    given_context = {"a": 1}
    transition = reminder(given_context, cls=WithContext)
    transition.context["a"] = 2
    transition.context["plan"] = "none"
    assert given_context == {"a": 1}
    assert WithContext.initial_context == {"source": "class", "plan": "gold"}


def test_reasons_do_not_leak_from_one_instance_to_the_next():
    reminder().errors.append("too early")
    assert reminder().errors == []


def test_without_a_time_the_chains_creation_is_now():
    assert Reminder(CHAIN).now == CREATED


def test_the_chain_is_read_only():
    with pytest.raises(AttributeError):
        reminder().chain.state = "elsewhere"


def test_the_idempotency_key_is_absent_outside_a_callback():
    assert reminder().idempotency_key is None


def test_a_class_leaves_most_options_to_its_type():
    assert Reminder.recheck_seconds is TYPE_DEFAULT
    assert repr(TYPE_DEFAULT) == "TYPE_DEFAULT"
    assert Reminder.retry == RetryPolicy()
    assert Reminder.date_next_update is None
    assert not hasattr(Reminder, "callback")
    assert not hasattr(Reminder, "verify")


def test_the_base_builds_no_context():
    assert reminder().build_context() == {}


def test_the_base_has_no_guard():
    class Unfinished(Transition):
        final_state = "x"

    with pytest.raises(NotImplementedError, match="Unfinished has no is_valid"):
        Unfinished(CHAIN).is_valid()


def test_before_the_time_it_is_not_valid_and_says_why():
    transition = reminder()
    assert transition.not_before(NOW + timedelta(microseconds=1), "too young") is False
    assert transition.errors == ["too young"]


@pytest.mark.parametrize("later", [timedelta(0), timedelta(microseconds=1), timedelta(days=400)])
def test_from_the_time_on_it_is_valid_without_a_reason(later):
    transition = reminder()
    assert transition.not_before(NOW - later, "too young") is True
    assert transition.errors == []
    assert transition._not_before is None


@pytest.mark.parametrize(
    ("when", "moment"),
    [
        (date(2024, 3, 11), datetime(2024, 3, 11, tzinfo=UTC)),
        (datetime(2024, 3, 10, 16), datetime(2024, 3, 10, 16, tzinfo=UTC)),  # noqa: DTZ001 - naive on purpose
        (datetime(2024, 3, 10, 16, tzinfo=timezone(timedelta(hours=-5))), datetime(2024, 3, 10, 21, tzinfo=UTC)),
    ],
)
def test_a_date_or_naive_datetime_means_utc_and_an_aware_one_its_moment(when, moment):
    transition = reminder()
    assert transition.not_before(when, "too young") is False
    assert transition._not_before == moment
    assert as_utc(when) == moment
    assert as_utc(when).tzinfo is UTC


def test_a_date_is_reached_at_its_first_moment():
    midnight = datetime(2024, 3, 11, tzinfo=UTC)
    assert reminder(now=midnight).not_before(date(2024, 3, 11), "too young") is True
    assert reminder(now=midnight - timedelta(microseconds=1)).not_before(date(2024, 3, 11), "too young") is False


def test_an_aware_time_in_another_zone_is_compared_by_its_moment():
    ahead = timezone(timedelta(hours=9))
    assert reminder().not_before(datetime(2024, 3, 11, 0, 29, tzinfo=ahead), "too young") is True
    assert reminder().not_before(datetime(2024, 3, 11, 0, 31, tzinfo=ahead), "too young") is False


@given(st.lists(MOMENTS, min_size=1, max_size=5), MOMENTS)
def test_of_several_times_in_one_guard_the_earliest_that_is_to_come_counts(moments, now):
    transition = reminder(now=now)
    answers = [transition.not_before(moment, str(number)) for number, moment in enumerate(moments)]
    assert answers == [moment <= now for moment in moments]
    assert transition._not_before == min((moment for moment in moments if moment > now), default=None)
    assert transition.errors == [str(number) for number, moment in enumerate(moments) if moment > now]


@given(MOMENTS)
def test_converting_to_utc_keeps_the_moment_and_is_idempotent(moment):
    assert as_utc(moment) == moment
    assert as_utc(as_utc(moment)) == as_utc(moment)


def test_the_dictionary_form_is_the_ancestors():
    transition = reminder({"cart": 1})
    transition.errors.append("no")
    assert transition.to_dict() == {
        "errors": ["no"],
        "context": {"resources": list(RESOURCES), "cart": 1},
        "final_state": "reminded",
    }


def test_a_transition_is_shown_by_its_class_and_where_it_leads():
    assert str(reminder()) == "<Reminder>"
    assert repr(reminder()) == "<Reminder: reminded>"


@pytest.mark.parametrize(
    ("year", "zone", "expected"),
    [
        (9999, "America/New_York", LATEST),
        (9999, "Asia/Tokyo", LATEST),
        (1, "Asia/Tokyo", EARLIEST),
        (1, "America/New_York", EARLIEST),
    ],
)
def test_the_ends_of_time_become_the_nearest_moments_that_can_be_stored(year, zone, expected):
    end = datetime(year, 12 if year > 1 else 1, 31 if year > 1 else 1, 23 * (year > 1), tzinfo=ZoneInfo(zone))
    assert as_utc(end) == as_utc(end.date()) == expected
