"""Delivery hours: from when to when on the wall clocks of a time zone callbacks may be called. Pure."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

_HOURS: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", re.ASCII)
_DAY: Final = timedelta(days=1)
_QUARTER: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class DeliveryHours:
    """A part of every day, from `start` until `end`; an `end` that is not after `start` is on the next day.

    What counts is what the wall clock of the time zone shows. An hour that is shown twice in autumn counts twice; where
    clocks are put forward over the start, the hours begin when they are.
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
        if hours.start == hours.end:
            raise ValueError("must begin and end at different times")
        return hours

    def __contains__(self, clock: time) -> bool:
        """Whether these are the hours when a wall clock shows `clock`."""
        if self.start < self.end:
            return self.start <= clock < self.end
        return clock >= self.start or clock < self.end

    def wait(self, now: datetime, zone: ZoneInfo) -> timedelta:
        """How long it takes from `now` (aware) until these are the hours in `zone`; zero while they are.

        Walks from one quarter of an hour to the next: clocks are put forward and back at no other times (IANA time zone
        database, since 1972), and between two of them a wall clock goes evenly.
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
        raise ValueError("must be the name of a time zone")  # noqa: TRY004 - one error for all that is no time zone
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError) as error:  # an unknown name, a directory, a path
        raise ValueError('must be the name of a time zone, such as "Europe/Berlin"') from error


def _since_midnight(clock: time) -> timedelta:
    return timedelta(hours=clock.hour, minutes=clock.minute, seconds=clock.second, microseconds=clock.microsecond)
