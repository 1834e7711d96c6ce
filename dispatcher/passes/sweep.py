"""The sweep: pages of due chains are marked and published. A sweep that runs out of time remembers where it stopped."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.records import DuePosition
from dispatcher.messages.publisher import Publisher
from dispatcher.messages.queues import CHAINS_QUEUE, SWEEP, SWEEPS_QUEUE
from dispatcher.passes.pages import Pages
from dispatcher.passes.turns import Turns, pass_seconds
from dispatcher.passes.waking import Waker
from dispatcher.settings import Settings
from dispatcher.storage import chain_types, chains, ticks
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_PAGE: Final = 1000
_WAITING_PAGES: Final = 16


@dataclass(slots=True)
class _Cursor:
    """One chain type's pages within a sweep."""

    chain_type: ChainType
    after: DuePosition | None
    resumed: bool = False
    exhausted: bool = False
    held_back: bool = False


@dataclass(slots=True)
class SweepCounts:
    """What one sweep saw and did."""

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
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._pages = pages
        self._publisher = publisher
        self._turns = turns
        self._waker = waker

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
        counts = SweepCounts()
        if dry_run:
            counts.would_wake = self._waker.count_resting()
        else:
            self._waker.wake_changed_states(stop_at - seconds / 2)
        with self._database.read() as connection:
            now = self._database.now(connection)
            paused = chain_types.paused_types(connection)
            positions = {} if dry_run else ticks.read_position(connection, SWEEP)
        cursors = [
            _Cursor(chain_type, _position(positions.get(type_name)), resumed=type_name in positions)
            for type_name, chain_type in self._config.by_type.items()
            if type_name not in paused
        ]
        going = cursors
        while going and time.monotonic() < stop_at:
            for cursor in going:
                self._sweep_page(cursor, counts, now, dry_run=dry_run)
            going = [cursor for cursor in going if not cursor.exhausted and not cursor.held_back]
        stopped = {
            cursor.chain_type.chain_type: [cursor.after.due_at.isoformat(), cursor.after.chain_id]
            for cursor in cursors
            if not cursor.exhausted and cursor.after is not None
        }
        if not dry_run and stopped != positions:
            self._database.write(lambda connection: ticks.write_position(connection, SWEEP, stopped))
        result = self._result(cursors, counts, now, dry_run=dry_run)
        emit(logger, Action.SWEPT, "sweep: %s", result, **{f"sweep_{name}": value for name, value in result.items()})
        return result

    def _result(
        self, cursors: Sequence[_Cursor], counts: SweepCounts, now: datetime, *, dry_run: bool
    ) -> dict[str, Any]:
        age = (now - counts.oldest).total_seconds() if counts.oldest is not None else 0.0
        result: dict[str, Any] = {
            "due": counts.due,
            "enqueued": counts.enqueued,
            **({"handed_over": counts.handed_over} if self._settings.sweep_fanout else {}),
            "already_queued": counts.already_queued,
            "oldest_due_seconds": round(max(age, 0.0), 3),
        }
        if dry_run:
            result |= {"would_wake": counts.would_wake, "dry_run": True}
        if any(cursor.held_back for cursor in cursors):
            result["held_back"] = sorted(cursor.chain_type.chain_type for cursor in cursors if cursor.held_back)
        return result

    def _sweep_page(self, cursor: _Cursor, counts: SweepCounts, now: datetime, *, dry_run: bool) -> None:
        type_name = cursor.chain_type.chain_type
        queue = cursor.chain_type.queue or CHAINS_QUEUE
        if queue not in counts.backlog:
            counts.backlog[queue] = self._publisher.backlog(queue)
        room = self._settings.max_backlog - counts.backlog[queue]
        if room <= 0:
            emit(
                logger,
                Action.QUEUE_FULL,
                "queue %s holds %s messages: the sweep adds none",
                queue,
                counts.backlog[queue],
                queue=queue,
                messages=counts.backlog[queue],
            )
            cursor.held_back = True
            return
        with self._database.read() as connection:
            page = chains.due_page(
                connection,
                type_name=type_name,
                now=now,
                after=cursor.after,
                limit=min(self._settings.sweep_fanout or _PAGE, room * self._settings.chains_per_task),
            )
        if not page:
            # This pass resumed in the middle; start again from the oldest due chain.
            cursor.exhausted = not cursor.resumed
            cursor.resumed, cursor.after = False, None
            return
        if counts.oldest is None or page[0].due_at < counts.oldest:
            counts.oldest = page[0].due_at
        ids = [position.chain_id for position in page]
        fresh = ids if dry_run else self._pages.mark(ids)
        if fresh and not dry_run and self._may_hand_over(counts):
            counts.backlog[queue] += self._pages.hand_over(type_name, fresh)
            counts.backlog[SWEEPS_QUEUE] += 1
            counts.handed_over += len(fresh)
        else:
            counts.backlog[queue] += self._pages.publish(fresh, queue, dry_run=dry_run)
            counts.enqueued += len(fresh)
        counts.due += len(page)
        counts.already_queued += len(page) - len(fresh)
        cursor.after = page[-1]

    def _may_hand_over(self, counts: SweepCounts) -> bool:
        """Whether other workers publish the next page.

        Not while many pages wait. A long queue means that the other workers are busy; publishing here is as fast.
        Relays and sweeps come through the same queue, and must not wait behind a million chains.
        """
        if not self._settings.sweep_fanout:
            return False
        if counts.backlog.get(SWEEPS_QUEUE, _WAITING_PAGES) >= _WAITING_PAGES:
            counts.backlog[SWEEPS_QUEUE] = self._publisher.backlog(SWEEPS_QUEUE)
        return counts.backlog[SWEEPS_QUEUE] < _WAITING_PAGES


def _position(raw: Any) -> DuePosition | None:
    if not raw:
        return None
    return DuePosition(datetime.fromisoformat(raw[0]), int(raw[1]))
