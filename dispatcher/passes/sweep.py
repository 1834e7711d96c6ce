"""The periodic passes: due chains paged and published, owed deliveries relayed, old history pruned.

Ticks are rows, so that any number of beats is safe; a pass that runs out of its time remembers where it stopped.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.fingerprints import fingerprint
from dispatcher.domain.records import DeliveryRecord, DuePosition, Owed
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CALLBACKS_QUEUE, CHAINS_QUEUE, PRUNE, RELAY, SWEEP, SWEEPS_QUEUE
from dispatcher.passes.pages import Pages
from dispatcher.passes.unknown_effects import settle_crashed
from dispatcher.settings import Settings
from dispatcher.states import DeliveryStatus
from dispatcher.storage import chain_types, chains, deliveries, history, overdue, ticks
from dispatcher.storage.database import Database

logger = logging.getLogger(__name__)

_PAGE: Final = 1000
_WAITING_PAGES: Final = 16
_WAKE: Final = "dispatcher.wake"
_RELAY_PAGE: Final = 500
_PRUNE_PAGE: Final = 500
_SWEEPS_OF_A_DEPLOY: Final = 10


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
    oldest: datetime | None = None
    backlog: dict[str, int] = field(default_factory=dict)


class Sweeper:
    """Runs the periodic passes of one deployment. `random` draws the jitter of retries from [0, 1)."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        pages: Pages,
        publisher: Publisher,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._pages = pages
        self._publisher = publisher
        self._random = random

    # --- sweep -------------------------------------------------------------------------------------------------------

    def sweep(self, *, tick: bool, dry_run: bool = False) -> dict[str, Any]:
        """Publish one execution per due chain: `{"due", "enqueued", "already_queued", "oldest_due_seconds"}`.

        With `sweep_fanout` also `"handed_over"`: the chains whose executions other workers publish. Each due chain is
        in one of these three counts.

        With `tick=True` it is one of possibly many beats', and only the first within the interval does anything
        (`{"claimed": False}` for the others). Raises `PublishFailed`.
        """
        if tick and not dry_run and not self._claim(SWEEP, self._settings.sweep_seconds):
            return {"claimed": False}
        seconds = self._pass_seconds(self._settings.sweep_seconds)
        stop_at = time.monotonic() + seconds
        if not dry_run:
            self._wake_changed_states(stop_at - seconds / 2)
        with self._database.read() as connection:
            now = self._database.now(connection)
            paused = chain_types.paused_types(connection)
            positions = {} if dry_run else ticks.read_position(connection, SWEEP)
        cursors = [
            _Cursor(chain_type, _position(positions.get(name)), resumed=name in positions)
            for name, chain_type in self._config.by_type.items()
            if name not in paused
        ]
        counts = SweepCounts()
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
        age = (now - counts.oldest).total_seconds() if counts.oldest is not None else 0.0
        result: dict[str, Any] = {
            "due": counts.due,
            "enqueued": counts.enqueued,
            **({"handed_over": counts.handed_over} if self._settings.sweep_fanout else {}),
            "already_queued": counts.already_queued,
            "oldest_due_seconds": round(max(age, 0.0), 3),
        }
        if dry_run:
            result["dry_run"] = True
        if any(cursor.held_back for cursor in cursors):
            result["held_back"] = sorted(c.chain_type.chain_type for c in cursors if c.held_back)
        logger.info("sweep: %s", result, extra={"action": "swept", **{f"sweep_{k}": v for k, v in result.items()}})
        return result

    def _sweep_page(self, cursor: _Cursor, counts: SweepCounts, now: datetime, *, dry_run: bool) -> None:
        name = cursor.chain_type.chain_type
        queue = cursor.chain_type.queue or CHAINS_QUEUE
        if queue not in counts.backlog:
            counts.backlog[queue] = self._publisher.backlog(queue)
        room = self._settings.max_backlog - counts.backlog[queue]
        if room <= 0:
            logger.warning("queue %s holds %s messages: nothing is added", queue, counts.backlog[queue])
            cursor.held_back = True
            return
        with self._database.read() as connection:
            page = chains.due_page(
                connection,
                chain_type=name,
                now=now,
                after=cursor.after,
                limit=min(self._settings.sweep_fanout or _PAGE, room * self._settings.chains_per_task),
            )
        if not page:
            # A pass that began where the last one stopped still has what is due before that.
            cursor.exhausted = not cursor.resumed
            cursor.resumed, cursor.after = False, None
            return
        if counts.oldest is None or page[0].due_at < counts.oldest:
            counts.oldest = page[0].due_at
        ids = [position.chain_id for position in page]
        fresh = ids if dry_run else self._pages.mark(ids)
        if fresh and not dry_run and self._may_hand_over(counts):
            counts.backlog[queue] += self._pages.hand_over(name, fresh)
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

        Not while many pages wait: then they are busy, and this process is as good as they are. Relays and sweeps come
        through the same queue, and must not wait behind a million chains.
        """
        if not self._settings.sweep_fanout:
            return False
        if counts.backlog.get(SWEEPS_QUEUE, _WAITING_PAGES) >= _WAITING_PAGES:
            counts.backlog[SWEEPS_QUEUE] = self._publisher.backlog(SWEEPS_QUEUE)
        return counts.backlog[SWEEPS_QUEUE] < _WAITING_PAGES

    def _wake_changed_states(self, stop_at: float) -> None:
        """Make the chains resting in states whose candidates changed due again, in batches.

        A fingerprint that was in use within the last sweeps is no change: during a deploy old and new workers take
        turns. Once the old one is out of use they are made due again: until then an old worker may have looked at
        them, and laid them to rest by its own candidates. What is not done by `stop_at` (monotonic seconds), the next
        sweep goes on with.
        """
        forget = timedelta(seconds=self._settings.sweep_seconds * _SWEEPS_OF_A_DEPLOY)
        names = [chain_type.chain_type for chain_type in self._config.chains]
        with self._database.read() as connection:
            known = {
                name: {state: dict(seen) for state, seen in states.items()}
                for name, states in chain_types.read_fingerprints(connection, names).items()
            }
            machine_now = self._database.machine_now(connection)
        for chain_type in self._config.chains:
            states = known.get(chain_type.chain_type)
            fresh = _seen_now(chain_type, states or {}, machine_now, forget)
            changed = (
                []
                if states is None
                else [state for state in fresh if _changed(chain_type, state, states, machine_now, forget)]
            )
            if not all(self._wake_state(chain_type, state, stop_at) for state in changed):
                continue
            if states is None or changed or _needs_refresh(chain_type, states, machine_now, forget):
                self._database.write(partial(self._remember, chain_type.chain_type, fresh))

    def _remember(self, chain_type: str, fresh: Mapping[str, Mapping[str, str]], connection: Connection) -> None:
        chain_types.write_fingerprints(connection, chain_type, fresh)
        positions = ticks.read_position(connection, _WAKE)
        left = {key: position for key, position in positions.items() if not key.startswith(f"{chain_type}/")}
        if left != positions:
            ticks.write_position(connection, _WAKE, left)

    def _wake_state(self, chain_type: ChainType, state: str, stop_at: float) -> bool:
        """Whether all chains resting in a state are due; it goes on where an earlier sweep stopped."""
        name, done = chain_type.chain_type, -1
        key = f"{name}/{state}/{fingerprint(chain_type, state)}"

        def work(connection: Connection) -> int:
            positions = ticks.read_position(connection, _WAKE)
            after_id = positions.get(key, 0)
            if after_id == done:
                return done
            now = self._database.now(connection)
            found = chains.make_due(connection, chain_type=name, state=state, after_id=after_id, limit=_PAGE, now=now)
            after_id = done if found is None else found
            ticks.write_position(connection, _WAKE, {**positions, key: after_id})
            return after_id

        logger.info("candidates of %s/%s changed: its chains are due", name, state)
        while time.monotonic() < stop_at:
            if self._database.write(work) == done:
                return True
        return False

    # --- relay -------------------------------------------------------------------------------------------------------

    def relay(self, *, tick: bool) -> dict[str, Any]:
        """Publish deliveries whose message was lost, and settle those whose worker died: `{"relayed", "settled"}`.

        `tick` as in `sweep`. What cannot be published stays owed.
        """
        if tick and not self._claim(RELAY, self._settings.relay_seconds):
            return {"claimed": False}
        stop_at = time.monotonic() + self._pass_seconds(self._settings.relay_seconds)
        relayed = settled = 0
        try:
            room = self._settings.max_backlog - self._publisher.backlog(CALLBACKS_QUEUE)
        except PublishFailed as error:  # what needs no message is settled all the same
            logger.warning("relay: deliveries not published (%s), they stay owed", error)
            room = None
        while time.monotonic() < stop_at:
            page = partial(self._relay_page, pending=room is not None and room > 0)
            found, owed, page_settled = self._database.write(page)
            settled += page_settled
            try:
                if owed and room is not None:
                    self._publisher.deliver(owed)
                    relayed += len(owed)
                    room -= len(owed)
            except PublishFailed as error:
                logger.warning("relay: deliveries not published (%s), they stay owed", error)
                room = None
            if found < _RELAY_PAGE:
                break
        result = {"relayed": relayed, "settled": settled}
        level = logging.INFO if relayed or settled else logging.DEBUG
        logger.log(level, "relay: %s", result, extra={"action": "relayed", **result})
        return result

    def _relay_page(self, connection: Connection, *, pending: bool) -> tuple[int, list[Owed], int]:
        grace = self._settings.queued_seconds
        found = overdue.claim_overdue(connection, limit=_RELAY_PAGE, grace_seconds=grace, pending=pending)
        running = [delivery for delivery in found if delivery.status == DeliveryStatus.RUNNING]
        owed = [
            Owed(delivery.id, delivery.attempt + 1) for delivery in found if delivery.status == DeliveryStatus.PENDING
        ]
        if running:
            now = self._database.now(connection)
            records = chains.read_many(connection, [delivery.chain_id for delivery in running])
            for delivery in sorted(running, key=lambda one: one.chain_id):
                record = records.get(delivery.chain_id)
                if record is None:  # deleted by hand: no foreign key keeps it
                    logger.error(
                        "delivery %s: its chain %s is missing",
                        delivery.id,
                        delivery.chain_id,
                        extra={
                            "action": "orphan_delivery",
                            "chain_id": delivery.chain_id,
                            "delivery_id": delivery.id,
                        },
                    )
                    overdue.look_later(connection, delivery, seconds=grace)
                    continue
                chain_type = self._config.by_type.get(record.chain_type)
                settled = self._settle(connection, delivery, chain_type, now)
                if settled is not None:
                    owed.append(settled)
        return len(found), owed, len(running)

    def _settle(
        self, connection: Connection, delivery: DeliveryRecord, chain_type: ChainType | None, now: datetime
    ) -> Owed | None:
        grace = self._settings.queued_seconds
        if chain_type is None:  # a type of another version of the code: its workers settle it
            overdue.look_later(connection, delivery, seconds=grace)
            return None
        return settle_crashed(connection, delivery, chain_type, now=now, grace_seconds=grace, random=self._random)

    # --- prune -------------------------------------------------------------------------------------------------------

    def prune(self, *, days: float | None, tick: bool) -> dict[str, Any]:
        """Delete events and closed deliveries older than `days` in batches, never chains; returns the counts."""
        days = days if days is not None else self._settings.retention_days
        if days is None:
            return {"events": 0, "deliveries": 0}
        if tick and not self._claim(PRUNE, 3600):
            return {"claimed": False}
        with self._database.read() as connection:
            before = self._database.now(connection) - timedelta(days=days)
            machine_before = self._database.machine_now(connection) - timedelta(days=days)
        stop_at = time.monotonic() + self._pass_seconds(300)
        counts = {"events": 0, "deliveries": 0}
        steps: Mapping[str, Callable[[Connection], int]] = {
            "events": lambda connection: history.prune_events(connection, before=before, limit=_PRUNE_PAGE),
            "deliveries": lambda connection: deliveries.prune(connection, before=machine_before, limit=_PRUNE_PAGE),
        }
        for name, step in steps.items():
            deleted = _PRUNE_PAGE
            while deleted == _PRUNE_PAGE and time.monotonic() < stop_at:
                deleted = self._database.write(step)
                counts[name] += deleted
        logger.info("prune: %s", counts, extra={"action": "pruned", "pruned": counts})
        return counts

    # --- shared ------------------------------------------------------------------------------------------------------

    def _claim(self, name: str, interval_seconds: float) -> bool:
        def work(connection: Connection) -> bool:
            machine_now = self._database.machine_now(connection)
            not_after = machine_now - timedelta(seconds=interval_seconds * 0.9)  # beats are not exact
            return ticks.claim_tick(connection, name, machine_now=machine_now, not_after=not_after)

        return self._database.write(work)

    def _pass_seconds(self, interval_seconds: float) -> float:
        return min(max(interval_seconds, 10.0), 300.0)


def _position(raw: Any) -> DuePosition | None:
    if not raw:
        return None
    return DuePosition(datetime.fromisoformat(raw[0]), int(raw[1]))


def _seen_now(
    chain_type: ChainType, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> dict[str, dict[str, str]]:
    """The fingerprints to remember: those seen lately, and this configuration's own, as of now."""
    return {
        state: {
            **{mark: seen for mark, seen in states.get(state, {}).items() if now - _time(seen) < forget},
            fingerprint(chain_type, state): now.astimezone(UTC).isoformat(),
        }
        for state in sorted(chain_type.states)
    }


def _changed(
    chain_type: ChainType, state: str, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> bool:
    seen = states.get(state, {})
    if fingerprint(chain_type, state) in seen and (
        len(seen) == 1 or all(now - _time(last) < forget for last in seen.values())
    ):
        return False
    return bool(seen) or bool(chain_type.candidates(state))


def _needs_refresh(
    chain_type: ChainType, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> bool:
    for state in chain_type.states:
        own = states.get(state, {}).get(fingerprint(chain_type, state))
        if own is None or now - _time(own) > forget / 4:
            return True
    return False


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
