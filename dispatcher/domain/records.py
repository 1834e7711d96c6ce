"""The frozen values that storage, decisions and faces exchange: rows as they were read, and writes to make.

Nothing here reads or writes anything.
"""

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeAlias

from dispatcher.domain.resources import Resource
from dispatcher.domain.unreadable import Unreadable
from dispatcher.states import NEW, CallbackKind, EventAction
from dispatcher.transition import ChainSnapshot

MAX_DETAIL: Final = 4000
"""The longest detail of an event, in characters."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request: what an application asked with `enqueue`."""

    context: Mapping[str, Any] | None = None
    callback: str | None = None
    kwargs: Mapping[str, Any] | None = None
    requested_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the chain's row stores."""
        return {
            "context": self.context,
            "callback": self.callback,
            "kwargs": self.kwargs,
            "requested_by": self.requested_by,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> "Request | None":
        """The request from the JSON object in a chain's row; None if the row has no request."""
        if raw is None:
            return None
        if isinstance(raw, Unreadable):
            return cls(context=raw, kwargs=raw)
        return cls(raw.get("context"), raw.get("callback"), raw.get("kwargs"), raw.get("requested_by"))


@dataclass(frozen=True, slots=True)
class ChainRecord:
    """A chain's row as it was read, with its resources."""

    id: int
    chain_type: str
    state: str
    disabled: bool
    next_update_at: datetime | None
    due_at: datetime | None
    version: int
    wake: int
    moves: int
    pending_delivery_id: str | None
    failures: int
    created_at: datetime
    updated_at: datetime
    context: Mapping[str, Any] | None
    request: Request | None
    uid: str | None
    started_at: datetime
    entered_at: datetime
    resources: tuple[Resource, ...]

    def snapshot(self) -> ChainSnapshot:
        """The read-only view of this chain that transitions get."""
        return ChainSnapshot(self.id, self.chain_type, self.state, self.resources, self.created_at)


def unsaved_record(
    type_name: str, resources: tuple[Resource, ...], context: Mapping[str, Any] | None, now: datetime
) -> ChainRecord:
    """The record of a chain in NEW that is not in the database; its id is 0."""
    return ChainRecord(
        id=0,
        chain_type=type_name,
        state=NEW,
        disabled=False,
        next_update_at=None,
        due_at=now,
        version=0,
        wake=0,
        moves=0,
        pending_delivery_id=None,
        failures=0,
        created_at=now,
        updated_at=now,
        context=dict(context) if context else None,
        request=None,
        uid=None,
        started_at=now,
        entered_at=now,
        resources=resources,
    )


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery's row as it was read."""

    id: str
    idempotency_key: str
    chain_id: int
    chain_version: int
    transition: str
    from_state: str
    final_state: str
    callback: str
    status: str
    attempt: int
    max_attempts: int
    unknown: bool
    next_attempt_at: datetime | None
    publish_after: datetime | None
    lease_until: datetime | None
    planned_at: datetime
    finished_at: datetime | None
    requested_by: str | None
    last_error: str | None
    kwargs: Mapping[str, Any] | None
    context: Mapping[str, Any] | None
    begins: int | None
    waits_for: str | None
    waits_reason: str | None
    waits_since: datetime | None
    has_place: bool
    rest_until: datetime | None
    request: Mapping[str, Any] | None
    lapse_seen_at: datetime | None
    uncalled: int | None

    @property
    def was_not_called(self) -> bool:
        """Whether the callback of the running attempt has certainly not been called."""
        return self.uncalled is not None and self.uncalled == self.begins

    @property
    def rest_is_known(self) -> bool:
        """Whether `rest_until` is what the plan asked for; a delivery from before revision 0002 does not say it."""
        return self.begins is not None

    @property
    def taken_request(self) -> dict[str, Any] | None:
        """The whole request that the plan took from the chain's row, as its JSON object; None if it took none."""
        return None if self.request is None else {**self.request, "context": self.context, "kwargs": self.kwargs}


def is_local(delivery: DeliveryRecord) -> bool:
    """Whether the callback exists only in the process that planned the delivery."""
    return delivery.callback == CallbackKind.LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Write a move of the chain to `to_state` without a callback."""

    record: ChainRecord
    transition: str
    to_state: str
    next_update_at: datetime | None
    due_at: datetime | None
    requested_by: str | None
    takes_request: bool = True
    """Whether this move answers the request in the row. An application's own `execute()` does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Write that the chain stays in its state and is due at `due_at` (None: never by itself)."""

    record: ChainRecord
    due_at: datetime | None
    failures: int = 0
    clear_request: bool = False
    event: EventAction | None = None
    detail: str | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether this write would change nothing that matters, so that it can be left out."""
        return (
            self.event is None
            and self.failures == self.record.failures
            and not (self.clear_request and self.record.request is not None)
            and self.due_at == self.record.due_at
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDelivery:
    """Write a new delivery for the transition that was planned for the chain."""

    record: ChainRecord
    transition: str
    final_state: str
    callback: str
    max_attempts: int
    kwargs: Mapping[str, Any] | None
    context: Mapping[str, Any] | None
    requested_by: str | None
    rest_until: datetime | None = None
    takes_request: bool = True
    """As in `Move`."""

    @property
    def stored_request(self) -> dict[str, Any] | None:
        """What goes into the delivery's column `request`: the request without its context and kwargs, or None."""
        asked = self.record.request
        if asked is None or not self.takes_request:
            return None
        return {name: value for name, value in asked.to_json().items() if name not in ("context", "kwargs")}


Write: TypeAlias = Move | Rest | PlannedDelivery
"""What an execution writes for one chain."""


def by_kind(writes: Iterable[Write]) -> tuple[list[Move], list[Rest], list[PlannedDelivery]]:
    """The moves, the rests and the planned deliveries among `writes`."""
    moves: list[Move] = []
    rests: list[Rest] = []
    planned: list[PlannedDelivery] = []
    for write in writes:
        if isinstance(write, Move):
            moves.append(write)
        elif isinstance(write, Rest):
            rests.append(write)
        else:
            planned.append(write)
    return moves, rests, planned


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of executions.

    `deliveries` has each chain that was written, with the id of its new delivery, if any. `refused` are the chains that
    a budget keeps from moving, `paused` the types whose budget is used up.
    """

    deliveries: Mapping[int, str | None] = field(default_factory=dict)
    refused: frozenset[int] = frozenset()
    paused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """When the relay looks at new deliveries: in `publish_seconds`, if they are still pending.

    With `lease_seconds` the caller begins their first attempt at once (an in-process execution).
    """

    publish_seconds: float
    lease_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Owed:
    """A message to publish: the delivery, and the number of the attempt that it expects."""

    delivery_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Begun:
    """An attempt that this process has begun, with the delivery and its chain as they are now."""

    delivery: DeliveryRecord
    chain: ChainRecord
    machine_now: datetime


@dataclass(frozen=True, slots=True)
class Finished:
    """A successful attempt to record, and the rest and due moment of its chain after the move."""

    delivery: DeliveryRecord
    next_update_at: datetime | None
    due_at: datetime | None
    problem: str = ""
    """What is wrong with the rest that was asked for; it becomes an event."""


@dataclass(frozen=True, slots=True)
class ChainEvent:
    """One line of a chain's history. `action` is an `EventAction`; only state transitions have a `move_version`."""

    id: int
    chain_id: int
    chain_version: int
    move_version: int | None
    action: str
    value: str | None
    from_state: str | None
    to_state: str | None
    requested_by: str | None
    detail: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class DuePosition:
    """The keyset position after which the next page of due chains begins."""

    due_at: datetime
    chain_id: int


@dataclass(frozen=True, slots=True)
class TypeRecord:
    """The row of a chain type as it was read: pause, fingerprints and plan budget."""

    name: str
    paused: bool
    paused_reason: str | None
    fingerprints: dict[str, dict[str, str]] | None
    window_at: datetime | None
    window_plans: int
    chains_estimate: int | None
    estimated_at: datetime | None


@dataclass(frozen=True, slots=True)
class ActionRecord:
    """What an operator did to a chain type or a resource; `created_at` is machine time.

    `subject` is the type's name, or `resource_type=resource_id`; of an erased resource it is `sha256:` and a digest.
    """

    id: int
    subject_kind: str
    subject: str
    action: str
    requested_by: str | None
    reason: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Budget:
    """How many more plans a chain type may have in the hour that began at `window_at`."""

    window_at: datetime
    plans: int
    limit: int

    @property
    def left(self) -> int:
        """How many more plans may be written."""
        return max(0, self.limit - self.plans)


_KEY_SPACE: Final = uuid.UUID("6c7e1f0a-6f3c-5f0e-9d53-7b8a3c1e2d40")


def idempotency_key(chain: ChainRecord, transition: str) -> str:
    """The UUID5 of the chain's `uid`, its number of moves so far and the transition.

    Every attempt, and a plan of the same transition after a cancelled one, gets the same key. Two deployments never
    give the same key, because the uid is random. A chain from before revision 0002 has none; its id stands for it.
    """
    return str(uuid.uuid5(_KEY_SPACE, f"{chain.uid or chain.id}:{chain.moves}:{transition}"))


def new_uid(mark: str = "") -> str:
    """A random UUID for a chain. It begins with `mark` (at most 12 hexadecimal digits)."""
    return str(uuid.UUID(mark + uuid.uuid4().hex[len(mark) :]))


def uid_mark(name: str) -> str:
    """12 hexadecimal digits made of the name of a copied database; the new uids of its chains begin with them.

    A uid has 20 more, so it stays random. 12 are enough that no other chain of a large database has them by chance.
    """
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def has_mark(uid: str | None, mark: str) -> bool:
    """Whether a chain's uid begins with this mark."""
    return uid is not None and uid.replace("-", "").startswith(mark)


def valid_id(value: object) -> str | None:
    """`value` as the canonical text of a delivery id, or None if it is not a UUID."""
    if not isinstance(value, str) or len(value) > 40:  # noqa: PLR2004 - a UUID with braces
        return None
    try:
        return str(uuid.UUID(value))
    except ValueError:
        return None
