"""Delivery hours: the part of a day, in a time zone, in which callbacks may be called. Pure."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

_HOURS: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", re.ASCII)
_ALL_DAY: Final = "00:00-24:00"
_DAY: Final = timedelta(days=1)
_QUARTER: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class DeliveryHours:
    """A part of every day, from `start` until `end`. If `end` is earlier than `start`, it is a time of the next day.

    The wall clock of the time zone decides. When clocks are put back, the same wall-clock times come twice, and
    they count twice. When clocks are put forward past `start`, the hours begin at that moment.
    """

    start: time
    end: time

    @classmethod
    def parse(cls, text: object) -> "DeliveryHours":
        """The hours of "08:00-20:00", "22:00-06:00" or "18:00-24:00". Raises `ValueError` for anything else."""
        match = _HOURS.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('must be hours such as "08:00-20:00"')
        start_hour, start_minute, end_hour, end_minute = (int(part) for part in match.groups(default="0"))
        hours = cls(time(start_hour, start_minute), time(end_hour, end_minute))
        if hours.start == hours.end and text != _ALL_DAY:
            raise ValueError("must begin and end at different times")
        return hours

    def __contains__(self, clock: time) -> bool:
        """Whether the wall-clock time `clock` is within these hours."""
        if self.start < self.end:
            return self.start <= clock < self.end
        return clock >= self.start or clock < self.end

    def wait(self, now: datetime, zone: ZoneInfo) -> timedelta:
        """How long to wait from `now` (aware) until the wall clock of `zone` is within these hours; zero if it is.

        Steps from one quarter of an hour to the next, because clocks are put forward or back only at a quarter of an
        hour (IANA time zone database, since 1972).
        """
        moment = now.astimezone(UTC)
        while (clock := moment.astimezone(zone).time()) not in self:
            to_start = (_since_midnight(self.start) - _since_midnight(clock)) % _DAY
            to_quarter = _QUARTER - _since_midnight(moment.time()) % _QUARTER
            moment += min(to_start, to_quarter)
        return moment - now


def zone_of(name: object) -> ZoneInfo:
    """The time zone with this IANA name. Raises `ValueError` if there is none."""
    if not isinstance(name, str):
        raise ValueError("must be the name of a time zone")  # noqa: TRY004 - callers expect one kind of error
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError) as error:  # an unknown name, a directory, a path
        raise ValueError('must be the name of a time zone, such as "Europe/Berlin"') from error


def _since_midnight(clock: time) -> timedelta:
    return timedelta(hours=clock.hour, minutes=clock.minute, seconds=clock.second, microseconds=clock.microsecond)
