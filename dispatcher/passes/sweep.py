"""The sweep: due chains are marked and published. A sweep that runs out of time remembers where it stopped.

The types that share a queue share its room. In each round every type gets the same part of the room that is left, so
that what one type does not need goes to the others. Where a part is less than one message, the types take turns, also
across sweeps. A page is read once, whatever the number of rounds.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.records import DuePosition
from dispatcher.messages.publisher import Publisher
from dispatcher.messages.queues import SWEEP, SWEEPS_QUEUE
from dispatcher.passes.cursors import Cursor, in_turn, shares, turns_of
from dispatcher.passes.pages import Pages
from dispatcher.passes.parking import Parking
from dispatcher.passes.turns import Turns, pass_seconds
from dispatcher.passes.waking import Waker
from dispatcher.settings import Settings
from dispatcher.storage import chain_types, chains, ticks
from dispatcher.storage.database import Database
from dispatcher.storage.statements import grouped
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_TURNS: Final = "dispatcher.sweep_turns"
_PAGE: Final = 1000
_FIRST_ROUND: Final = 100
"""The chains of each type in the first round, so that nobody's first chain stands behind a whole page of another."""

_WAITING_PAGES: Final = 16


@dataclass(slots=True)
class _Sweep:
    """One sweep: its moment (domain time), whether it is a dry run, and what it saw and did."""

    now: datetime
    dry_run: bool
    due: int = 0
    enqueued: int = 0
    handed_over: int = 0
    already_queued: int = 0
    would_wake: int = 0
    oldest: datetime | None = None
    backlog: dict[str, int] = field(default_factory=dict)


class Sweeper:
    """Sweeps over the due chains of one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        pages: Pages,
        publisher: Publisher,
        turns: Turns,
        waker: Waker,
        parking: Parking,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._pages = pages
        self._publisher = publisher
        self._turns = turns
        self._waker = waker
        self._parking = parking

    def sweep(self, *, tick: bool, dry_run: bool = False) -> dict[str, Any]:
        """Publish one execution per due chain: `{"due", "enqueued", "already_queued", "oldest_due_seconds"}`.

        With `sweep_fanout` also `"handed_over"`: the chains whose executions other workers publish. Each due chain is
        in one of these three counts. A dry run has `"dry_run"` and `"would_wake"`: the chains that are not due, and
        that a real sweep would make due first, because the candidates of their states have changed.

        With `tick=True` only the first caller within the interval does anything (`{"claimed": False}` for the others),
        because any number of beats may run. Raises `PublishFailed`.
        """
        if tick and not dry_run and not self._turns.claim(SWEEP, self._settings.sweep_seconds):
            return {"claimed": False}
        seconds = pass_seconds(self._settings.sweep_seconds)
        stop_at = time.monotonic() + seconds
        would_wake = 0
        if dry_run:
            would_wake = self._waker.count_resting()
        else:
            self._waker.wake_changed_states(stop_at - seconds / 2)
            self._parking.finish_resumes(stop_at - seconds / 2)
        with self._database.read() as connection:
            now = self._database.now(connection)
            paused = chain_types.paused_types(connection)
            positions = {} if dry_run else ticks.read_position(connection, SWEEP)
            turns = {} if dry_run else ticks.read_position(connection, _TURNS)
        sweep = _Sweep(now, dry_run, would_wake=would_wake)
        cursors = in_turn(
            [
                Cursor(chain_type, _position(positions.get(type_name)), turns.get(type_name, 0))
                for type_name, chain_type in self._config.by_type.items()
                if type_name not in paused
            ]
        )
        self._sweep_rounds(cursors, sweep, stop_at)
        if not dry_run:
            self._remember(cursors, positions, turns)
        result = self._result(cursors, sweep)
        emit(logger, Action.SWEPT, "sweep: %s", result, **{f"sweep_{name}": value for name, value in result.items()})
        return result

    def _remember(self, cursors: Sequence[Cursor], positions: Mapping[str, Any], turns: Mapping[str, Any]) -> None:
        """Write where this sweep has stopped, and whose turn it is, if that has changed."""
        stopped = {
            cursor.chain_type.chain_type: [cursor.after.due_at.isoformat(), cursor.after.chain_id]
            for cursor in cursors
            if not cursor.exhausted and cursor.after is not None
        }
        next_turns = turns_of(cursors)

        def work(connection: Connection) -> None:
            for name, before, after in ((SWEEP, positions, stopped), (_TURNS, turns, next_turns)):
                if after != before:
                    ticks.write_position(connection, name, after)

        if stopped != positions or next_turns != turns:
            self._database.write(work)

    def _result(self, cursors: Sequence[Cursor], sweep: _Sweep) -> dict[str, Any]:
        age = (sweep.now - sweep.oldest).total_seconds() if sweep.oldest is not None else 0.0
        result: dict[str, Any] = {
            "due": sweep.due,
            "enqueued": sweep.enqueued,
            **({"handed_over": sweep.handed_over} if self._settings.sweep_fanout else {}),
            "already_queued": sweep.already_queued,
            "oldest_due_seconds": round(max(age, 0.0), 3),
        }
        if sweep.dry_run:
            result |= {"would_wake": sweep.would_wake, "dry_run": True}
        if any(cursor.held_back for cursor in cursors):
            result["held_back"] = sorted(cursor.chain_type.chain_type for cursor in cursors if cursor.held_back)
        return result

    def _sweep_rounds(self, cursors: Sequence[Cursor], sweep: _Sweep, stop_at: float) -> None:
        """Take the due chains of all types round by round, as long as their queues have room."""
        most = max(_FIRST_ROUND, self._settings.chains_per_task)
        going = cursors
        while going and time.monotonic() < stop_at:
            for queue, group in grouped(going, lambda cursor: cursor.queue).items():
                if queue not in sweep.backlog:
                    sweep.backlog[queue] = self._publisher.backlog(queue)
                room = self._settings.max_backlog - sweep.backlog[queue]
                if room <= 0:
                    self._hold_back(queue, group, sweep.backlog[queue])
                    continue
                limit = self._page_size if len(group) == 1 else most
                for cursor, part in shares(group, room):
                    self._sweep_part(cursor, min(part * self._settings.chains_per_task, limit), sweep)
            going = [cursor for cursor in going if cursor.going]
            most = self._page_size

    def _hold_back(self, queue: str, cursors: Sequence[Cursor], messages: int) -> None:
        emit(
            logger,
            Action.QUEUE_FULL,
            "queue %s holds %s messages: the sweep adds none",
            queue,
            messages,
            queue=queue,
            messages=messages,
        )
        for cursor in cursors:
            cursor.held_back = True

    @property
    def _page_size(self) -> int:
        return self._settings.sweep_fanout or _PAGE

    def _sweep_part(self, cursor: Cursor, most: int, sweep: _Sweep) -> None:
        """Publish the executions of the next due chains of a type, at most `most`."""
        if not cursor.fill(partial(self._read_page, cursor, sweep), self._page_size):
            return
        if not sweep.dry_run and most < len(cursor.waiting) and cursor.queued is None:
            # Where there is little room, one look at all of them costs less than marking a few at a time.
            cursor.queued = self._pages.queued([position.chain_id for position in cursor.waiting])
        ids, passed = cursor.take(most)
        fresh = ids if sweep.dry_run else self._pages.mark(ids)
        type_name, queue = cursor.chain_type.chain_type, cursor.queue
        if fresh and not sweep.dry_run and self._may_hand_over(sweep):
            messages = self._pages.hand_over(type_name, fresh)
            sweep.backlog[SWEEPS_QUEUE] += 1
            sweep.handed_over += len(fresh)
        else:
            messages = self._pages.publish(fresh, queue, dry_run=sweep.dry_run)
            sweep.enqueued += len(fresh)
        sweep.backlog[queue] += messages
        cursor.got_room = cursor.got_room or messages > 0
        sweep.due += passed
        sweep.already_queued += passed - len(fresh)

    def _read_page(self, cursor: Cursor, sweep: _Sweep, after: DuePosition | None, limit: int) -> list[DuePosition]:
        with self._database.read() as connection:
            page = chains.due_page(
                connection, type_name=cursor.chain_type.chain_type, now=sweep.now, after=after, limit=limit
            )
        if page and (sweep.oldest is None or page[0].due_at < sweep.oldest):
            sweep.oldest = page[0].due_at
        return page

    def _may_hand_over(self, sweep: _Sweep) -> bool:
        """Whether other workers publish the next page.

        Not while many pages wait. A long queue means that the other workers are busy; publishing here is as fast.
        Relays and sweeps come through the same queue, and must not wait behind a million chains.
        """
        if not self._settings.sweep_fanout:
            return False
        if sweep.backlog.get(SWEEPS_QUEUE, _WAITING_PAGES) >= _WAITING_PAGES:
            sweep.backlog[SWEEPS_QUEUE] = self._publisher.backlog(SWEEPS_QUEUE)
        return sweep.backlog[SWEEPS_QUEUE] < _WAITING_PAGES


def _position(raw: Any) -> DuePosition | None:
    if not raw:
        return None
    return DuePosition(datetime.fromisoformat(raw[0]), int(raw[1]))
