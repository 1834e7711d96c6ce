"""The two reserved states, and the closed sets of words that rows, events and results use."""

from enum import StrEnum
from typing import Final

NEW: Final = "new"
"""The state in which every chain is created."""

DONE: Final = "done"
"""The terminal state: nothing leaves it, and no callback is called on the way into it."""


class DeliveryStatus(StrEnum):
    """Where a delivery stands."""

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
"""Statuses in which nothing is owed any more."""


class CallbackKind(StrEnum):
    """Which callback a delivery calls; a named one is stored as `named:<name>`."""

    OWN = "own"
    TYPE = "type"
    LOCAL = "local"
    NAMED = "named"


class EventAction(StrEnum):
    """What one line of a chain's history says."""

    CREATED = "created"
    STATE_TRANSITION = "state_transition"
    PLANNED = "planned"
    CANCELLED = "cancelled"
    DEAD = "dead"
    HELD = "held"
    RETRIED = "retried"
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


class Outcome(StrEnum):
    """What came of executing one chain."""

    MOVED = "moved"
    PLANNED = "planned"
    NONE = "none"
    TERMINAL = "terminal"
    LOCKED = "locked"
    STALE = "stale"
    RESTING = "resting"
    DISABLED = "disabled"
    PENDING = "pending"
    NO_CALLBACK = "no_callback"
    UNKNOWN_DEFINITION = "unknown_definition"
    GUARD_FAILED = "guard_failed"
    MISSING = "missing"
    DRY_RUN = "dry_run"


class AttemptOutcome(StrEnum):
    """What came of one attempt at a delivery."""

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
