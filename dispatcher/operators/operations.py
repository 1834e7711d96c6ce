"""`Operations`: what operators do to chains and deliveries, as guarded writes with an event each.

An act on a delivery names the delivery that the operator saw. When the rows are locked, it is compared with what is
there now; another delivery in its place, or one with another status, is left alone.

If a chain and its delivery are both locked, the delivery is locked first, as at the end of every attempt. Otherwise an
operator and a worker could deadlock.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from functools import partial
from typing import Final, TypeVar

from sqlalchemy.engine import Connection

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.decisions import due_after_move, rest_of_plan
from dispatcher.domain.records import ChainRecord, DeliveryRecord, is_local, uid_mark
from dispatcher.domain.resources import Resource, is_text
from dispatcher.errors import (
    ChainMissing,
    ConfigurationError,
    DeliveryChanged,
    DeliveryPending,
    DryRunRefused,
    NoOpenDelivery,
)
from dispatcher.passes.parking import Parking
from dispatcher.passes.unknown_effects import define, settle_lost
from dispatcher.requests.checks import checked_requester
from dispatcher.settings import Settings
from dispatcher.states import OPEN_STATUSES, DeliveryStatus, EventAction, OperatorAction, SubjectKind
from dispatcher.storage import actions, chain_types, chains, deliveries, overdue, overview, ticks
from dispatcher.storage.database import Database
from dispatcher.storage.pauses import Note
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_BATCH: Final = 500
_MAX_SPREAD: Final = timedelta(days=366)
_SEPARATED: Final = "dispatcher.separate"
_STOPPED: Final = (DeliveryStatus.DEAD, DeliveryStatus.HELD)
_PLANNED_AGAIN: Final = (
    "retried by hand: its callback exists only in the process that called execute(), so the chain will be planned again"
)


@dataclass(frozen=True, slots=True)
class MapCounts:
    """The result of a mapping of states: chains in the new state, and chains that wait because an attempt runs."""

    mapped: int
    waiting: int


@dataclass(frozen=True, slots=True)
class SeenDelivery:
    """What an operator saw of the delivery that a chain waits for.

    `delivery_id` is None where the chain waited for none. `status` is None where the operator saw only the chain. With
    `attempt`, a dead or held delivery must have had no further attempt since.
    """

    chain_id: int
    delivery_id: str | None
    status: str | None = None
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class SeparateCounts:
    """The chains of a copied database: separated now, separated before, and left because they wait for a delivery."""

    separated: int
    before: int
    waiting: int


class _MapOutcome(Enum):
    """What a mapping of states did with one chain."""

    MAPPED = auto()
    WAITING = auto()
    """An attempt runs, so the chain keeps its state."""
    GONE = auto()
    """The chain has left the old state meanwhile, or is erased."""


class Operations:
    """Operator actions of one deployment."""

    def __init__(self, *, config: DispatcherConfig, settings: Settings, database: Database, parking: Parking) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._parking = parking

    def refuse_dry_run(self, act: str) -> None:
        """Raise `DryRunRefused` if `DISPATCHER_DRY_RUN` is set: everything that an operator writes asks this first."""
        if self._settings.dry_run:
            raise DryRunRefused(act)

    def _write(self, act: str, work: Callable[[Connection], Result]) -> Result:
        """What `work` gives, in one transaction; `act` says what it does, for a refusal."""
        self.refuse_dry_run(act)
        return self._database.write(work)

    # --- one chain ---------------------------------------------------------------------------------------------------

    def set_disabled(self, chain_id: int, *, disabled: bool, requested_by: str | None, reason: str | None) -> bool:
        """Disable or enable a chain and its open delivery; False if that was so already."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> bool:
            now = self._database.now(connection)
            changed = chains.set_disabled(
                connection, chain_id, disabled=disabled, requested_by=requested_by, reason=reason, now=now
            )
            if changed:
                deliveries.follow_disabling(connection, [chain_id])
            return changed

        return self._write(f"{_verb(disabled)} chain {chain_id}", work)

    def put(
        self, chain_id: int, state: str, action: EventAction, *, reason: str | None, requested_by: str | None
    ) -> None:
        """Put a chain into a state and cancel the delivery that it waits for, whichever that is.

        Raises `DeliveryPending` while an attempt runs.
        """
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> None:
            now = self._database.now(connection)
            record, delivery = _lock(connection, chain_id)
            _require_idle(record, delivery)
            if delivery is not None:
                text = f"{action} to {state}" + (f": {reason}" if reason else "")
                deliveries.close_and_stay(connection, delivery, now=now, reason=text, requested_by=requested_by)
                record = chains.read_one(connection, chain_id, lock=True)
            chain_type = self._config.by_type.get(record.chain_type)
            chains.set_state(
                connection,
                record,
                state=state,
                action=action,
                due_at=now if chain_type is not None and chain_type.candidates(state) else None,
                requested_by=requested_by,
                reason=reason,
                now=now,
            )

        self._write(f"put chain {chain_id} into state {state!r}", work)

    # --- the open delivery of a chain --------------------------------------------------------------------------------
    # Each raises `NoOpenDelivery`, `DeliveryChanged` if it is not as it was seen, `DeliveryPending` while it runs.

    def retry_delivery(self, seen: SeenDelivery, *, requested_by: str | None, reason: str | None) -> None:
        """Make the next attempt at an open delivery due now.

        A dead or held delivery gets further attempts; the number of attempts is never lowered. The delivery of an
        in-process `execute()` is cancelled and its chain is due, because no other process has its callback.
        """
        requested_by = checked_requester(requested_by)

        def work(connection: Connection, record: ChainRecord, delivery: DeliveryRecord, now: datetime) -> None:
            if is_local(delivery):
                text = f"{_PLANNED_AGAIN}: {reason}" if reason else _PLANNED_AGAIN
                deliveries.close_and_stay(connection, delivery, now=now, reason=text, requested_by=requested_by)
                return
            chain_type = self._config.by_type.get(record.chain_type)
            transition = chain_type.by_name.get(delivery.transition) if chain_type is not None else None
            more = transition.retry.max_attempts if transition is not None else 1
            maximum = delivery.max_attempts
            if delivery.status in _STOPPED or delivery.attempt >= maximum:
                maximum = max(maximum, delivery.attempt + more)
            deliveries.reopen(
                connection,
                delivery,
                max_attempts=maximum,
                now=now,
                requested_by=requested_by,
                reason=reason,
            )

        self._on_delivery("retry", seen, work)

    def cancel_delivery(self, seen: SeenDelivery, *, reason: str, requested_by: str | None) -> None:
        """Close an open delivery as cancelled; its chain stays and is due."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection, _: ChainRecord, delivery: DeliveryRecord, now: datetime) -> None:
            deliveries.close_and_stay(connection, delivery, now=now, reason=reason, requested_by=requested_by)

        self._on_delivery("cancel", seen, work)

    def skip_delivery(self, seen: SeenDelivery, *, reason: str, requested_by: str | None) -> None:
        """Close an open delivery as skipped; its chain moves as if it had succeeded."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection, record: ChainRecord, delivery: DeliveryRecord, now: datetime) -> None:
            chain_type = self._config.get(record.chain_type)
            next_update_at = rest_of_plan(delivery, chain_type.by_name.get(delivery.transition))
            deliveries.skip(
                connection,
                delivery,
                next_update_at=next_update_at,
                due_at=due_after_move(chain_type, delivery.final_state, next_update_at, now),
                now=now,
                requested_by=requested_by,
                detail=reason,
            )

        self._on_delivery("skip", seen, work)

    def abandon_attempt(self, seen: SeenDelivery, *, requested_by: str | None, reason: str | None) -> None:
        """End the running attempt at a delivery as one whose effect is unknown; what follows is as after a crash.

        The process that makes it cannot record its end any more. Raises `NoOpenDelivery`, and `DeliveryChanged` if it
        does not run any more, or if another attempt runs.
        """
        requested_by = checked_requester(requested_by)
        while not self._abandon_as_read(seen, requested_by=requested_by, reason=reason):
            pass  # its callback was called since it was read, which happens once in an attempt

    def _abandon_as_read(self, seen: SeenDelivery, *, requested_by: str | None, reason: str | None) -> bool:
        """As `abandon_attempt`. False if the row says otherwise than when it was read whether the callback is called.

        What follows depends on that, and it is asked of user code, for which no connection may be in use.
        """
        if seen.delivery_id is None:
            raise NoOpenDelivery(seen.chain_id)
        delivery_id = seen.delivery_id
        with self._database.read() as connection:
            delivery = deliveries.read(connection, delivery_id)
            record = chains.read_one(connection, seen.chain_id)
        if delivery is None:
            raise DeliveryChanged(seen.chain_id, delivery_id, "it is deleted")
        definition = define(delivery, self._config.get(record.chain_type), random.random)
        by = f" by {requested_by}" if requested_by else ""
        cause = f"was abandoned{by}" + (f" ({reason})" if reason else "")

        def work(connection: Connection) -> bool:
            locked = deliveries.read(connection, delivery_id, lock=True)
            chains.read_one(connection, seen.chain_id, lock=True)
            if _require_same_attempt(seen, delivery, locked).uncalled != delivery.uncalled:
                return False
            now = self._database.now(connection)
            deliveries.note_abandoned(connection, delivery, now=now, requested_by=requested_by, reason=reason)
            waiting = overdue.waiting_chains(connection, [seen.chain_id]).get(seen.chain_id)
            settle_lost(connection, delivery, waiting, definition, now=now, grace_seconds=0.0, cause=cause)
            return True

        return self._write(f"abandon the attempt at delivery {delivery_id}", work)

    def _on_delivery(
        self, verb: str, seen: SeenDelivery, act: Callable[[Connection, ChainRecord, DeliveryRecord, datetime], None]
    ) -> None:
        def work(connection: Connection) -> None:
            record, delivery = _lock_seen(connection, seen)
            act(connection, record, delivery, self._database.now(connection))

        self._write(f"{verb} the delivery of chain {seen.chain_id}", work)

    # --- a resource --------------------------------------------------------------------------------------------------

    def set_resource_disabled(
        self, resource: Resource, *, disabled: bool, requested_by: str | None, reason: str | None
    ) -> int:
        """Disable or enable every chain that has this resource, in one transaction; gives how many changed."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> int:
            now = self._database.now(connection)
            ids = chains.set_resource_disabled(
                connection, resource, disabled=disabled, requested_by=requested_by, reason=reason, now=now
            )
            deliveries.follow_disabling(connection, ids)
            actions.add(
                connection,
                SubjectKind.RESOURCE,
                actions.resource_subject(resource),
                OperatorAction.DISABLED if disabled else OperatorAction.ENABLED,
                requested_by=requested_by,
                reason=reason,
            )
            return len(ids)

        return self._write(f"{_verb(disabled)} the chains of a resource", work)

    def erase_resource(self, resource: Resource, *, requested_by: str | None, reason: str | None) -> int:
        """Delete every chain that has this resource, with its history and deliveries; gives how many.

        What was noted about the resource is deleted too; that it was erased is noted under a digest of its name. While
        an attempt of one of these chains runs, deletes nothing and raises `DeliveryPending`.
        """
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> int:
            ids = chains.list_ids(connection, resource=resource, limit=None)
            batches = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
            found = [chain_id for batch in batches for chain_id in self._lock_for_erasing(connection, batch)]
            for start in range(0, len(found), _BATCH):
                chains.erase(connection, found[start : start + _BATCH])
            actions.forget_resource(connection, resource)
            actions.add(
                connection,
                SubjectKind.RESOURCE,
                actions.erased_subject(resource),
                OperatorAction.ERASED,
                requested_by=requested_by,
                reason=reason,
            )
            return len(found)

        count = self._write("erase the chains of a resource", work)
        emit(logger, Action.RESOURCE_ERASED, "%d chains of a resource are erased", count, chains=count)
        return count

    def _lock_for_erasing(self, connection: Connection, chain_ids: Sequence[int]) -> list[int]:
        """The ids of these chains that exist; they and their open deliveries are locked, so that no attempt begins."""
        found: dict[int, ChainRecord] = {}
        for lock in (False, True):  # again with the chains locked, because a delivery may have been planned meanwhile
            found = chains.read_many(connection, chain_ids, lock=lock)
            for record in found.values():
                if record.pending_delivery_id is not None:
                    with suppress(ChainMissing):  # another caller has erased it meanwhile
                        _, delivery = _lock(connection, record.id)
                        if delivery is not None and delivery.status == DeliveryStatus.RUNNING:
                            raise DeliveryPending(record.id, "an attempt is running")
        return sorted(found)

    # --- a chain type ------------------------------------------------------------------------------------------------

    def pause(self, type_name: str, *, requested_by: str | None, reason: str | None) -> bool:
        """Pause a chain type: nothing of it is planned, and no attempt begins; False if it was paused already.

        The pause holds as soon as it is committed. Then the pending deliveries are parked, also those that an
        interrupted pause, or the type's own plan budget, has left.
        """
        self._config.get(type_name)
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> bool:
            return chain_types.set_paused(connection, type_name, paused=True, requested_by=requested_by, reason=reason)

        changed = self._write(f"pause chain type {type_name}", work)
        self._parking.park(type_name)
        return changed

    def resume(
        self, type_name: str, *, spread: timedelta | float | None, requested_by: str | None, reason: str | None
    ) -> bool:
        """End the pause of a chain type; False if it was not paused: then its due chains are left as they are.

        With `spread` its due chains are due evenly over that time, and its parked deliveries are freed evenly over the
        same time. What an interrupted call has left parked is freed, too.
        """
        self._config.get(type_name)
        requested_by = checked_requester(requested_by)
        over = checked_spread(spread)
        act = f"resume chain type {type_name}"
        self.refuse_dry_run(act)
        note, left = self._parking.find_note(type_name)
        with self._database.read() as connection:
            is_paused = type_name in chain_types.paused_types(connection)
        if over and is_paused:
            self._parking.spread(type_name, over)

        def work(connection: Connection) -> Note | None:
            changed = chain_types.set_paused(
                connection, type_name, paused=False, requested_by=requested_by, reason=_with_spread(reason, over)
            )
            return self._parking.note(connection, type_name, over or timedelta(0)) if changed else None

        noted = self._write(act, work)
        self._parking.free(type_name, noted or note, left if over is None and noted is None else over or timedelta(0))
        return noted is not None

    def map_states(
        self,
        type_name: str,
        from_state: str,
        to_state: str,
        *,
        requested_by: str | None,
        reason: str | None,
        dry_run: bool,
    ) -> MapCounts:
        """Give a state another name, in every chain of a type that is in it, in batches; a dry run only counts.

        Its open delivery stays open, and its request, rest and keys stay. If nothing keeps it, it is due at once, and
        its failures count from 0, because the new state may have other candidates. The new state must be a different
        state of the configuration. A chain with a running attempt keeps its state and is counted as waiting.
        """
        requested_by = checked_requester(requested_by)
        where = f"chain type {type_name!r}, state {to_state!r}"
        if to_state not in self._config.get(type_name).states:
            raise ConfigurationError("unknown state", where)
        if to_state == from_state:
            raise ConfigurationError("is the old state; name another state", where)
        if not is_text(from_state):
            raise ConfigurationError("is not a state", f"chain type {type_name!r}, state {from_state!r}")
        if not dry_run:
            self.refuse_dry_run(f"map the chains of {type_name} from state {from_state!r} to {to_state!r}")
        what = f"from {from_state} to {to_state}" + (f": {reason}" if reason else "")
        mapped = waiting = after_id = 0
        while True:
            with self._database.read() as connection:
                ids = chains.list_ids(
                    connection, type_name=type_name, state=from_state, after_id=after_id, limit=_BATCH
                )
            if not ids:
                break
            if not after_id and not dry_run:
                self._database.write(partial(_note_mapping, type_name, what, requested_by))
            after_id = ids[-1]
            for chain_id in ids:
                outcome = _MapOutcome.MAPPED
                if not dry_run:
                    outcome = self._map_one(chain_id, from_state, to_state, requested_by=requested_by, reason=reason)
                mapped += outcome is _MapOutcome.MAPPED
                waiting += outcome is _MapOutcome.WAITING
        return MapCounts(mapped, waiting)

    def _map_one(
        self, chain_id: int, from_state: str, to_state: str, *, requested_by: str | None, reason: str | None
    ) -> _MapOutcome:
        def work(connection: Connection) -> _MapOutcome:
            record, delivery = _lock(connection, chain_id)
            if record.state != from_state:
                return _MapOutcome.GONE
            _require_idle(record, delivery)
            if delivery is not None:
                deliveries.rename_from_state(connection, delivery, to_state)
            chains.rename_state(
                connection,
                record,
                to_state,
                has_candidates=bool(self._config.get(record.chain_type).candidates(to_state)),
                reason=reason,
                requested_by=requested_by,
                now=self._database.now(connection),
            )
            return _MapOutcome.MAPPED

        try:
            return self._database.write(work)
        except DeliveryPending:
            return _MapOutcome.WAITING
        except ChainMissing:
            return _MapOutcome.GONE

    # --- a copy of a database ----------------------------------------------------------------------------------------

    def separate(self, name: str) -> SeparateCounts:
        """Give every chain of a copied database a new `uid`, in batches, so that its idempotency keys are others.

        `name` is the name of the copy. The new uids begin with digits made of it, so a second call with the same name
        knows them. It takes only the chains that are left, because they waited for a delivery or the first call was
        interrupted. Chains that were made since the first call are no copies, and are left alone.
        """
        if not is_text(name) or not name:
            raise ConfigurationError("give the copy a name, such as staging", "separate")
        mark = uid_mark(name)
        act = f"separate the chains as {name!r}"
        self.refuse_dry_run(act)
        last_id = self._write(act, partial(_last_copied, mark))
        seen = separated = waiting = after_id = 0
        while True:
            with self._database.read() as connection:
                ids = [one for one in chains.list_ids(connection, after_id=after_id, limit=_BATCH) if one <= last_id]
            if not ids:
                return SeparateCounts(separated, seen - separated - waiting, waiting)
            after_id = ids[-1]
            done, left = self._write(act, partial(chains.separate, chain_ids=ids, mark=mark))
            seen += len(ids)
            separated += len(done)
            waiting += len(left)

    def unknown_states(self) -> Mapping[tuple[str, str], int]:
        """`{(type name, state): chains}` for the states of chains that this configuration does not have."""
        with self._database.read() as connection:
            counts = overview.count_by_state(connection)
        return {
            (type_name, state): count
            for (type_name, state), count in counts.items()
            if (chain_type := self._config.by_type.get(type_name)) is None or state not in chain_type.states
        }


def _last_copied(mark: str, connection: Connection) -> int:
    """The id of the last chain that was in the copy when it was first separated with this mark."""
    last_ids = ticks.read_position(connection, _SEPARATED)
    if mark not in last_ids:
        last_ids = {**last_ids, mark: chains.last_id(connection)}
        ticks.write_position(connection, _SEPARATED, last_ids)
    return int(last_ids[mark])


def _note_mapping(type_name: str, what: str, requested_by: str | None, connection: Connection) -> None:
    actions.add(connection, SubjectKind.TYPE, type_name, OperatorAction.MAPPED, requested_by=requested_by, reason=what)


def _lock(connection: Connection, chain_id: int) -> tuple[ChainRecord, DeliveryRecord | None]:
    """A chain and its open delivery, or None, both locked. Raises `ChainMissing`."""
    while True:
        delivery_id = chains.read_one(connection, chain_id).pending_delivery_id
        delivery = deliveries.read(connection, delivery_id, lock=True) if delivery_id is not None else None
        record = chains.read_one(connection, chain_id, lock=True)
        if record.pending_delivery_id == delivery_id:
            return record, delivery


def _lock_seen(connection: Connection, seen: SeenDelivery) -> tuple[ChainRecord, DeliveryRecord]:
    """A chain and its open delivery, both locked.

    Raises `NoOpenDelivery`, `DeliveryChanged` if it is not as it was seen, `DeliveryPending` while an attempt runs.
    """
    delivery = None
    if seen.delivery_id is not None:
        delivery = deliveries.read(connection, seen.delivery_id, lock=True)
    record = chains.read_one(connection, seen.chain_id, lock=True)
    if seen.delivery_id is None:
        waits = record.pending_delivery_id is not None
        raise NoOpenDelivery(record.id, "none when it was read; it has one now: read it again" if waits else "")
    if record.pending_delivery_id != seen.delivery_id:
        raise DeliveryChanged(record.id, seen.delivery_id, _why_not_awaited(delivery))
    _require_idle(record, delivery)
    assert delivery is not None  # else it is not idle
    if seen.status is not None and delivery.status != seen.status:
        change = f"it is {delivery.status} now, and was {seen.status} when it was read"
        raise DeliveryChanged(record.id, delivery.id, change)
    if seen.attempt not in (None, delivery.attempt) and delivery.status in _STOPPED:
        raise DeliveryChanged(record.id, delivery.id, f"it is {delivery.status} again, after another attempt")
    return record, delivery


def _require_same_attempt(seen: SeenDelivery, read: DeliveryRecord, locked: DeliveryRecord | None) -> DeliveryRecord:
    """The locked row of the attempt that was seen and read. Raises `DeliveryChanged` unless that attempt still runs."""
    if locked is None:
        raise DeliveryChanged(seen.chain_id, read.id, "it is deleted")
    if locked.status != DeliveryStatus.RUNNING:
        raise DeliveryChanged(seen.chain_id, read.id, f"no attempt runs, it is {locked.status}")
    if (locked.attempt, locked.begins) != (read.attempt, read.begins) or seen.attempt not in (None, locked.attempt):
        raise DeliveryChanged(seen.chain_id, read.id, f"attempt {locked.attempt} runs now")
    return locked


def _why_not_awaited(delivery: DeliveryRecord | None) -> str:
    if delivery is None:
        return "it is deleted"
    if delivery.status in OPEN_STATUSES:
        return "its chain does not wait for it (see `dispatcher doctor`)"
    return f"it is {delivery.status}"


def _require_idle(record: ChainRecord, delivery: DeliveryRecord | None) -> None:
    """Raise `DeliveryPending` if an attempt runs, or if the delivery that the chain waits for is not open."""
    if delivery is not None and delivery.status == DeliveryStatus.RUNNING:
        raise DeliveryPending(record.id, "an attempt is running")
    if record.pending_delivery_id is not None and (delivery is None or delivery.status not in OPEN_STATUSES):
        raise DeliveryPending(record.id, "but that delivery is closed or missing: run `dispatcher doctor`")


def checked_spread(spread: timedelta | float | None) -> timedelta | None:
    """The time over which to spread, from a timedelta or seconds. Raises `ConfigurationError` for a wrong value."""
    if spread is None:
        return None
    over = spread
    if isinstance(spread, int | float) and not isinstance(spread, bool):
        over = timedelta(seconds=spread) if 0 < spread <= _MAX_SPREAD.total_seconds() else timedelta(0)
    if not isinstance(over, timedelta) or not timedelta(0) < over <= _MAX_SPREAD:
        days = _MAX_SPREAD.days
        raise ConfigurationError(f"must be a timedelta, or seconds, of more than 0 and at most {days} days", "spread")
    return over


def _with_spread(reason: str | None, over: timedelta | None) -> str | None:
    """The reason to note for the end of a pause, with the time over which its work is spread."""
    if over is None:
        return reason
    return f"spread over {over}" + (f": {reason}" if reason else "")


def _verb(disabled: bool) -> str:  # noqa: FBT001 - the only argument
    return "disable" if disabled else "enable"
