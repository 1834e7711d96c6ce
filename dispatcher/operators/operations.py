"""`Operations`: what operators do to chains and deliveries, as guarded writes with an event each.

If a chain and its delivery are both locked, the delivery is locked first, as at the end of every attempt. Otherwise an
operator and a worker could deadlock.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.decisions import due_after_move, rest_of_plan
from dispatcher.domain.records import ChainRecord, DeliveryRecord, is_local
from dispatcher.domain.resources import Resource, is_text
from dispatcher.errors import ChainMissing, ConfigurationError, DeliveryPending, NoOpenDelivery
from dispatcher.requests.checks import checked_requester
from dispatcher.states import OPEN_STATUSES, DeliveryStatus, EventAction
from dispatcher.storage import chain_types, chains, deliveries, overview
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_BATCH: Final = 500
_STOPPED: Final = (DeliveryStatus.DEAD, DeliveryStatus.HELD)
_PLANNED_AGAIN: Final = (
    "retried by hand: its callback exists only in the process that called execute(), so the chain will be planned again"
)


@dataclass(frozen=True, slots=True)
class MapCounts:
    """The result of a mapping of states: chains in the new state, and chains that wait because an attempt runs."""

    mapped: int
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

    def __init__(self, *, config: DispatcherConfig, database: Database) -> None:
        self._config = config
        self._database = database

    # --- one chain ---------------------------------------------------------------------------------------------------

    def set_disabled(self, chain_id: int, *, disabled: bool, requested_by: str | None) -> bool:
        """Disable or enable a chain and its open delivery; False if that was so already."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> bool:
            now = self._database.now(connection)
            changed = chains.set_disabled(connection, chain_id, disabled=disabled, requested_by=requested_by, now=now)
            if changed:
                deliveries.follow_disabling(connection, [chain_id], disabled=disabled)
            return changed

        return self._database.write(work)

    def put(
        self, chain_id: int, state: str, action: EventAction, *, reason: str | None, requested_by: str | None
    ) -> None:
        """Put a chain into a state and cancel its open delivery. Raises `DeliveryPending` while an attempt runs."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> None:
            self._put(connection, chain_id, state, action, reason=reason, requested_by=requested_by)

        self._database.write(work)

    def _put(
        self,
        connection: Connection,
        chain_id: int,
        state: str,
        action: EventAction,
        *,
        reason: str | None,
        requested_by: str | None,
        from_state: str | None = None,
    ) -> bool:
        """Whether the chain was put into the state; False if `from_state` is given and the chain is not in it."""
        now = self._database.now(connection)
        record, delivery = _lock(connection, chain_id)
        if from_state is not None and record.state != from_state:
            return False
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
        return True

    # --- the open delivery of a chain --------------------------------------------------------------------------------

    def retry_delivery(self, chain_id: int, *, requested_by: str | None) -> str:
        """Make the next attempt at a chain's open delivery due now; gives the delivery's id.

        A dead or held delivery gets further attempts; the number of attempts is never lowered. The delivery of an
        in-process `execute()` is cancelled and its chain is due, because no other process has its callback.
        """

        def work(connection: Connection, record: ChainRecord, delivery: DeliveryRecord, now: datetime) -> None:
            if is_local(delivery):
                deliveries.close_and_stay(
                    connection, delivery, now=now, reason=_PLANNED_AGAIN, requested_by=requested_by
                )
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
                disabled=record.disabled,
                now=now,
                requested_by=requested_by,
            )

        return self._on_delivery(chain_id, work)

    def cancel_delivery(self, chain_id: int, *, reason: str, requested_by: str | None) -> str:
        """Close a chain's open delivery as cancelled; the chain stays and is due. Gives the delivery's id."""

        def work(connection: Connection, _: ChainRecord, delivery: DeliveryRecord, now: datetime) -> None:
            deliveries.close_and_stay(connection, delivery, now=now, reason=reason, requested_by=requested_by)

        return self._on_delivery(chain_id, work)

    def skip_delivery(self, chain_id: int, *, reason: str, requested_by: str | None) -> str:
        """Close a chain's open delivery as skipped; the chain moves as if it had succeeded. Gives the delivery's id."""

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

        return self._on_delivery(chain_id, work)

    def _on_delivery(
        self, chain_id: int, act: Callable[[Connection, ChainRecord, DeliveryRecord, datetime], None]
    ) -> str:
        def work(connection: Connection) -> str:
            record, delivery = _lock(connection, chain_id)
            _require_idle(record, delivery)
            if delivery is None:
                raise NoOpenDelivery(chain_id)
            act(connection, record, delivery, self._database.now(connection))
            return delivery.id

        return self._database.write(work)

    # --- a resource --------------------------------------------------------------------------------------------------

    def set_resource_disabled(self, resource: Resource, *, disabled: bool, requested_by: str | None) -> int:
        """Disable or enable every chain that has this resource, in one transaction; gives how many changed."""
        requested_by = checked_requester(requested_by)

        def work(connection: Connection) -> int:
            now = self._database.now(connection)
            ids = chains.set_resource_disabled(
                connection, resource, disabled=disabled, requested_by=requested_by, now=now
            )
            deliveries.follow_disabling(connection, ids, disabled=disabled)
            return len(ids)

        return self._database.write(work)

    def erase_resource(self, resource: Resource) -> int:
        """Delete every chain that has this resource, with its history and deliveries; gives how many.

        While an attempt of one of these chains runs, deletes nothing and raises `DeliveryPending`.
        """

        def work(connection: Connection) -> int:
            ids = chains.list_ids(connection, resource=resource, limit=None)
            batches = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
            found = [chain_id for batch in batches for chain_id in self._lock_for_erasing(connection, batch)]
            for start in range(0, len(found), _BATCH):
                chains.erase(connection, found[start : start + _BATCH])
            return len(found)

        count = self._database.write(work)
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

    def set_paused(self, type_name: str, *, paused: bool, reason: str | None) -> bool:
        """Pause a chain type (no transition of it is planned) or resume it; False if that was so already."""
        self._config.get(type_name)
        return self._database.write(
            lambda connection: chain_types.set_paused(connection, type_name, paused=paused, reason=reason)
        )

    def map_states(
        self, type_name: str, from_state: str, to_state: str, *, requested_by: str | None, dry_run: bool
    ) -> MapCounts:
        """Put every chain of a type from one state into another, in batches; a dry run only counts.

        The new state must be a different state of the configuration. A chain with a running attempt keeps its state and
        is counted as waiting.
        """
        requested_by = checked_requester(requested_by)
        where = f"chain type {type_name!r}, state {to_state!r}"
        if to_state not in self._config.get(type_name).states:
            raise ConfigurationError("unknown state", where)
        if to_state == from_state:
            raise ConfigurationError("is the old state; name another state", where)
        if not is_text(from_state):
            raise ConfigurationError("is not a state", f"chain type {type_name!r}, state {from_state!r}")
        mapped = waiting = after_id = 0
        while True:
            with self._database.read() as connection:
                ids = chains.list_ids(
                    connection, type_name=type_name, state=from_state, after_id=after_id, limit=_BATCH
                )
            if not ids:
                return MapCounts(mapped, waiting)
            after_id = ids[-1]
            for chain_id in ids:
                outcome = _MapOutcome.MAPPED if dry_run else self._map_one(chain_id, from_state, to_state, requested_by)
                mapped += outcome is _MapOutcome.MAPPED
                waiting += outcome is _MapOutcome.WAITING

    def _map_one(self, chain_id: int, from_state: str, to_state: str, requested_by: str | None) -> _MapOutcome:
        def work(connection: Connection) -> bool:
            return self._put(
                connection,
                chain_id,
                to_state,
                EventAction.MAPPED,
                reason=f"from {from_state}",
                requested_by=requested_by,
                from_state=from_state,
            )

        try:
            was_put = self._database.write(work)
        except DeliveryPending:
            return _MapOutcome.WAITING
        except ChainMissing:
            return _MapOutcome.GONE
        return _MapOutcome.MAPPED if was_put else _MapOutcome.GONE

    def unknown_states(self) -> Mapping[tuple[str, str], int]:
        """`{(type name, state): chains}` for the states of chains that this configuration does not have."""
        with self._database.read() as connection:
            counts = overview.count_by_state(connection)
        return {
            (type_name, state): count
            for (type_name, state), count in counts.items()
            if (chain_type := self._config.by_type.get(type_name)) is None or state not in chain_type.states
        }


def _lock(connection: Connection, chain_id: int) -> tuple[ChainRecord, DeliveryRecord | None]:
    """A chain and its open delivery, or None, both locked. Raises `ChainMissing`."""
    while True:
        delivery_id = chains.read_one(connection, chain_id).pending_delivery_id
        delivery = deliveries.read(connection, delivery_id, lock=True) if delivery_id is not None else None
        record = chains.read_one(connection, chain_id, lock=True)
        if record.pending_delivery_id == delivery_id:
            return record, delivery


def _require_idle(record: ChainRecord, delivery: DeliveryRecord | None) -> None:
    """Raise `DeliveryPending` if an attempt runs, or if the delivery that the chain waits for is not open."""
    if delivery is not None and delivery.status == DeliveryStatus.RUNNING:
        raise DeliveryPending(record.id, "an attempt is running")
    if record.pending_delivery_id is not None and (delivery is None or delivery.status not in OPEN_STATUSES):
        raise DeliveryPending(record.id, "but that delivery is closed or missing: run `dispatcher doctor`")
