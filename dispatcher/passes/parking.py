"""Parks the deliveries of a paused chain type, and lets its work begin again slowly, in batches of bounded statements.

A pause commits the type's row first and then parks the pending deliveries. If it dies between the two, or if a plan
budget has paused the type, the rest is parked by the workers, because a begin that is refused parks.

The end of a pause spreads the due chains first, then commits the type's row together with a note, then frees the parked
deliveries, and removes the note at last. If it dies, calling it again finishes it. The sweep frees the deliveries that
are left where there is a note.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.domain.records import DuePosition
from dispatcher.storage import pauses
from dispatcher.storage.database import Database
from dispatcher.storage.pauses import Note, Notes

_BATCH: Final = 500
_PAGE: Final = 1000
_STEPS: Final = 200


class Parking:
    """Parks and frees the work of the chain types of one deployment."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- a pause -----------------------------------------------------------------------------------------------------

    def park(self, type_name: str) -> None:
        """Park the pending deliveries of a type whose pause is committed."""
        for ids in self._pages(pauses.to_park, type_name):
            for start in range(0, len(ids), _BATCH):
                self._database.write(partial(pauses.park, delivery_ids=ids[start : start + _BATCH]))

    # --- its end -----------------------------------------------------------------------------------------------------

    def spread(self, type_name: str, over: timedelta) -> None:
        """Make the chains of a type that are due now due evenly over this time, in the order of their due times.

        It is noted first, because a sweep that finds other candidates would make them all due at once.
        """

        def work(connection: Connection) -> datetime:
            now = self._database.now(connection)
            pauses.write_note(connection, Notes.SPREADS, type_name, until=now + over, seconds=over.total_seconds())
            return now

        now = self._database.write(work)
        with self._database.read() as connection:
            steps = _Steps(pauses.count_due(connection, type_name, now=now))
        after: DuePosition | None = None
        for number in itertools.count(1):
            step = partial(
                pauses.spread_due,
                type_name=type_name,
                now=now,
                after=after,
                limit=steps.size,
                due_at=now + over * steps.share(number * steps.size),
            )
            after = self._database.write(step)
            if after is None:
                return

    def note(self, connection: Connection, type_name: str, over: timedelta) -> Note:
        """Note, in the transaction that ends the pause, that the parked deliveries are to be freed over this time."""
        until = self._database.machine_now(connection) + over
        return pauses.write_note(connection, Notes.RESUMES, type_name, until=until, seconds=over.total_seconds())

    def find_note(self, type_name: str) -> tuple[Note | None, timedelta]:
        """The note of a resume that is not finished, or None, and how much of its time is left."""
        with self._database.read() as connection:
            note = pauses.read_notes(connection, Notes.RESUMES).get(type_name)
            now = self._database.machine_now(connection)
        return note, timedelta(seconds=pauses.seconds_left(note, now) if note is not None else 0)

    def free(self, type_name: str, note: Note | None, over: timedelta, stop_at: float = math.inf) -> None:
        """Free the parked deliveries of a type, evenly over this time, in the order of their ids; then remove the note.

        A type that is paused again keeps them. The sweep continues with what is left at `stop_at` (monotonic seconds),
        and with deliveries whose chain somebody else has locked.
        """
        seconds, done, left = over.total_seconds(), 0, 0
        steps = _Steps(sum(map(len, self._pages(pauses.parked, type_name))) if seconds else 0)
        for ids in self._pages(pauses.parked, type_name):
            for start in range(0, len(ids), steps.size):
                batch = ids[start : start + steps.size]
                done += len(batch)
                step = partial(pauses.free, delivery_ids=batch, seconds=seconds * steps.share(done))
                left += self._database.write(step)
            if done and time.monotonic() >= stop_at:
                return
        if left and note is None:
            self._database.write(partial(self.note, type_name=type_name, over=over))
        elif not left and note is not None:
            self._database.write(partial(pauses.remove_notes, notes=Notes.RESUMES, old={type_name: note}))

    def finish_resumes(self, stop_at: float) -> None:
        """Free what unfinished resumes have left parked, until `stop_at` (monotonic seconds); remove old notes."""
        with self._database.read() as connection:
            resumes = pauses.read_notes(connection, Notes.RESUMES)
            spreads = pauses.read_notes(connection, Notes.SPREADS)
            now = self._database.now(connection) if spreads else None
        over = {name: note for name, note in spreads.items() if now is not None and not pauses.seconds_left(note, now)}
        if over:
            self._database.write(partial(pauses.remove_notes, notes=Notes.SPREADS, old=over))
        for type_name in sorted(resumes):
            note, left = self.find_note(type_name)
            if note is not None and time.monotonic() < stop_at:
                self.free(type_name, note, left, stop_at)

    def _pages(self, read: Callable[..., pauses.PendingPage], type_name: str) -> Iterator[list[str]]:
        """What a walk over all pending deliveries finds of a type, page by page; some pages may be empty."""
        after: str | None = pauses.FIRST_ID
        while after is not None:
            with self._database.read() as connection:
                page = read(connection, type_name, after=after, limit=_PAGE)
            yield page.ids
            after = page.next_after


class _Steps:
    """So many rows in steps of the same size: at least 200 steps where there are as many rows."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.size = min(max(count // _STEPS, 1), _BATCH) if count else _BATCH

    def share(self, done: int) -> float:
        """Which part of all rows `done` are; at most 1."""
        return min(done / self._count, 1.0) if self._count else 1.0
