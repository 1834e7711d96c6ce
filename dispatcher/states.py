"""The two reserved states, and the closed sets of words that rows, events and results use."""

from enum import StrEnum
from typing import Final

NEW: Final = "new"
"""The state in which every chain is created."""

DONE: Final = "done"
"""The terminal state: no transition leaves it, and a transition to it calls no callback."""


class DeliveryStatus(StrEnum):
    """The status of a delivery."""

    PENDING = "pending"
    RUNNING = "running"
    DELIVERED = "delivered"
    CANCELLED = "cancelled"
    DEAD = "dead"
    HELD = "held"
    SKIPPED = "skipped"


OPEN_STATUSES: Final = (DeliveryStatus.PENDING, DeliveryStatus.RUNNING, DeliveryStatus.DEAD, DeliveryStatus.HELD)
"""Statuses that keep the chain waiting (its `pending_delivery_id` is set)."""

CLOSED_STATUSES: Final = (DeliveryStatus.DELIVERED, DeliveryStatus.CANCELLED, DeliveryStatus.SKIPPED)
"""Statuses of a delivery that is finished."""


class CallbackKind(StrEnum):
    """Which callback a delivery calls, as its row says.

    OWN: the transition's method. TYPE: the chain type's callback. NAMED: the callback that the request names, stored as
    `named:<name>`. LOCAL: any callback of an in-process `execute()`; no other process can call it.
    """

    OWN = "own"
    TYPE = "type"
    LOCAL = "local"
    NAMED = "named"


class WaitsFor(StrEnum):
    """What a pending delivery waits for, where it waits for more than a worker.

    RETRY: the time between two attempts. RATE: a rate limit. HOURS: its delivery hours. DEFINITION: a worker that knows
    its chain type, transition and callback. PAUSED: the end of the pause of its chain type.

    Not written yet: ASKED (the moment that its callback asked for), SUPPRESSED (a resource of its chain is suppressed).
    """

    RETRY = "retry"
    RATE = "rate"
    HOURS = "hours"
    ASKED = "asked"
    PAUSED = "paused"
    SUPPRESSED = "suppressed"
    DEFINITION = "definition"


class EventAction(StrEnum):
    """What happened, in one line of a chain's history."""

    CREATED = "created"
    STATE_TRANSITION = "state_transition"
    PLANNED = "planned"
    CANCELLED = "cancelled"
    DEAD = "dead"
    HELD = "held"
    RETRIED = "retried"
    ABANDONED = "abandoned"
    SKIPPED = "skipped"
    DISABLED = "disabled"
    ENABLED = "enabled"
    RESET = "reset"
    MOVED = "moved"
    MAPPED = "mapped"
    REQUEST_REPLACED = "request_replaced"
    NO_CALLBACK = "no_callback"
    UNKNOWN_DEFINITION = "unknown_definition"
    GUARD_FAILED = "guard_failed"


class SubjectKind(StrEnum):
    """On what an operator acted, where it was no chain and no delivery."""

    TYPE = "type"
    RESOURCE = "resource"


class OperatorAction(StrEnum):
    """What an operator did to a chain type or a resource. (A chain type is also paused by its own plan budget.)"""

    PAUSED = "paused"
    RESUMED = "resumed"
    MAPPED = "mapped"
    DISABLED = "disabled"
    ENABLED = "enabled"
    ERASED = "erased"


class Outcome(StrEnum):
    """The outcome of executing one chain."""

    MOVED = "moved"
    PLANNED = "planned"
    NONE = "none"
    TERMINAL = "terminal"
    LOCKED = "locked"
    STALE = "stale"
    RESTING = "resting"
    DISABLED = "disabled"
    PAUSED = "paused"
    PENDING = "pending"
    NO_CALLBACK = "no_callback"
    UNKNOWN_DEFINITION = "unknown_definition"
    GUARD_FAILED = "guard_failed"
    OUT_OF_TIME = "out_of_time"
    MISSING = "missing"
    DRY_RUN = "dry_run"


class AttemptOutcome(StrEnum):
    """The outcome of one attempt at a delivery."""

    DELIVERED = "delivered"
    RETRYING = "retrying"
    DEFERRED = "deferred"
    DEAD = "dead"
    CANCELLED = "cancelled"
    HELD = "held"
    SKIPPED = "skipped"
    STALE = "stale"
    MISSING = "missing"
    DISABLED = "disabled"
    UNKNOWN_DEFINITION = "unknown_definition"
    DRY_RUN = "dry_run"
