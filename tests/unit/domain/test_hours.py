"""Delivery hours on the wall clocks of time zones, and the two days a year on which clocks are changed."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.domain.hours import DeliveryHours, zone_of

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Chatham"]


def at(text: str, zone: ZoneInfo = BERLIN, *, fold: int = 0) -> datetime:
    """The moment at which the clocks of a zone show this, in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).astimezone(UTC)


def opens(hours: str, now: datetime, zone: ZoneInfo = BERLIN) -> datetime:
    return now + DeliveryHours.parse(hours).wait(now, zone)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("08:00-20:00", time(8), time(20)),
        ("22:00-06:00", time(22), time(6)),
        ("00:00-00:01", time(0), time(0, 1)),
        ("18:30-24:00", time(18, 30), time(0)),
        ("23:59-00:00", time(23, 59), time(0)),
        ("00:00-24:00", time(0), time(0)),
    ],
)
def test_hours_are_read(text, start, end):
    assert DeliveryHours.parse(text) == DeliveryHours(start, end)


@pytest.mark.parametrize(
    "text",
    [
        *("", "8:00-20:00", "08:00", "08:00 - 20:00", "24:00-08:00", "08:60-09:00", "08:00-25:00", "08:00-20:00\n", 8),
        *("08:00-08:00", "00:00-00:00", "\N{ARABIC-INDIC DIGIT ZERO}8:00-20:00", None),
    ],
)
def test_what_is_no_part_of_a_day_is_refused(text):
    with pytest.raises(ValueError, match=r"must be hours such as|must begin and end at different times"):
        DeliveryHours.parse(text)


@pytest.mark.parametrize(
    ("hours", "now", "then"),
    [
        ("08:00-20:00", "2026-07-01T12:00", "2026-07-01T12:00"),
        ("08:00-20:00", "2026-07-01T08:00", "2026-07-01T08:00"),
        ("08:00-20:00", "2026-07-01T19:59:59.999999", "2026-07-01T19:59:59.999999"),
        ("08:00-20:00", "2026-07-01T20:00", "2026-07-02T08:00"),
        ("08:00-20:00", "2026-07-01T07:59:59.5", "2026-07-01T08:00"),
        ("08:00-20:00", "2026-12-31T23:30", "2027-01-01T08:00"),
        ("22:00-06:00", "2026-07-01T23:00", "2026-07-01T23:00"),
        ("22:00-06:00", "2026-07-01T05:59", "2026-07-01T05:59"),
        ("22:00-06:00", "2026-07-01T06:00", "2026-07-01T22:00"),
        ("18:00-24:00", "2026-07-01T00:00", "2026-07-01T18:00"),
        ("08:07-08:08", "2026-07-01T08:08", "2026-07-02T08:07"),
    ],
)
def test_a_wait_ends_when_the_hours_begin(hours, now, then):
    assert opens(hours, at(now)) == at(then)


@pytest.mark.parametrize(
    ("hours", "now", "then"),
    [
        # 02:00 to 03:00 does not exist on 2026-03-29.
        ("08:00-20:00", at("2026-03-28T20:00"), at("2026-03-29T08:00")),  # 11 hours, not 12
        ("02:30-20:00", at("2026-03-28T20:00"), at("2026-03-29T03:00")),
        ("02:15-02:45", at("2026-03-28T20:00"), at("2026-03-30T02:15")),
        ("22:00-02:30", at("2026-03-29T03:00"), at("2026-03-29T22:00")),
        # 02:00 to 03:00 comes twice on 2026-10-25.
        ("08:00-20:00", at("2026-10-24T20:00"), at("2026-10-25T08:00")),  # 13 hours
        ("02:30-20:00", at("2026-10-24T20:00"), at("2026-10-25T02:30")),
        ("02:30-02:45", at("2026-10-25T02:45"), at("2026-10-25T02:30", fold=1)),
        ("20:00-02:30", at("2026-10-25T02:40"), at("2026-10-25T02:00", fold=1)),
        ("20:00-02:30", at("2026-10-25T02:30", fold=1), at("2026-10-25T20:00")),
    ],
)
def test_days_on_which_the_clocks_are_changed(hours, now, then):
    assert opens(hours, now) == then


def test_a_day_that_a_zone_left_out_is_waited_over():
    apia = ZoneInfo("Pacific/Apia")  # there was no 2011-12-30 in Samoa
    assert opens("08:00-20:00", at("2011-12-29T20:00", apia), apia) == at("2011-12-31T08:00", apia)


def test_each_zone_has_its_own_hours():
    noon = datetime(2026, 7, 1, 12, tzinfo=UTC)
    waits = {name: opens("08:00-13:00", noon, zone_of(name)) - noon for name in ("UTC", "Europe/Berlin", "Asia/Tokyo")}
    assert waits == {"UTC": timedelta(0), "Europe/Berlin": timedelta(hours=18), "Asia/Tokyo": timedelta(hours=11)}
    assert opens("08:00-13:00", noon.astimezone(ZoneInfo("Asia/Tokyo")), ZoneInfo("UTC")) == noon


@settings(deadline=None)
@given(
    elapsed=st.timedeltas(timedelta(0), timedelta(days=60 * 365)),
    start=st.integers(0, 1439),
    length=st.integers(1, 1439),
    name=st.sampled_from(ZONES),
)
def test_a_wait_ends_within_the_hours_and_not_a_minute_late(elapsed, start, length, name):
    moment, zone = datetime(1975, 1, 1, tzinfo=UTC) + elapsed, ZoneInfo(name)
    hours = DeliveryHours(*(time(*divmod(minute % 1440, 60)) for minute in (start, start + length)))
    then = moment + hours.wait(moment, zone)

    assert moment <= then <= moment + timedelta(hours=50)
    assert then.astimezone(zone).time() in hours
    if then > moment:
        just_before = then - timedelta(microseconds=1)
        assert just_before.astimezone(zone).time() not in hours
        minutes = range(int((just_before - moment) / timedelta(minutes=1)))
        assert not any((moment + timedelta(minutes=n)).astimezone(zone).time() in hours for n in minutes)


@pytest.mark.parametrize("name", ["", "Berlin", "Europe", "../../etc/passwd", "/etc/localtime", "a\x00b", "\ud800"])
def test_a_name_that_is_no_time_zone_is_refused(name):
    with pytest.raises(ValueError, match="must be the name of a time zone"):
        zone_of(name)


@pytest.mark.parametrize("name", [None, 1, b"UTC", ["UTC"], UTC])
def test_a_time_zone_is_named_by_a_string(name):
    with pytest.raises(ValueError, match="must be the name of a time zone"):
        zone_of(name)


def test_a_time_zone_has_its_iana_name():
    assert zone_of("Europe/Berlin").key == "Europe/Berlin"
