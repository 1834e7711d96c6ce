"""A logic engine that determines what to execute next, on Celery."""

from dispatcher.chain import Chain
from dispatcher.dispatcher import Dispatcher
from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.errors import (
    AmbiguousChain,
    ChainDisabled,
    ChainLocked,
    ChainMissing,
    ChainNotDue,
    ConfigurationError,
    DatabaseNotMigrated,
    DeliveryPending,
    DispatcherError,
    EnqueueNotPublished,
    InvalidResource,
    NoOpenDelivery,
    NotSerializable,
    PermanentFailure,
    ServiceUnavailable,
)
from dispatcher.rates import rate_limit
from dispatcher.retry import RetryPolicy
from dispatcher.settings import Settings
from dispatcher.states import DONE, NEW
from dispatcher.transition import Transition

__all__ = [
    "DONE",
    "NEW",
    "AmbiguousChain",
    "Chain",
    "ChainDisabled",
    "ChainLocked",
    "ChainMissing",
    "ChainNotDue",
    "ChainType",
    "ConfigurationError",
    "DatabaseNotMigrated",
    "DeliveryPending",
    "Dispatcher",
    "DispatcherConfig",
    "DispatcherError",
    "EnqueueNotPublished",
    "InvalidResource",
    "NoOpenDelivery",
    "NotSerializable",
    "PermanentFailure",
    "RetryPolicy",
    "ServiceUnavailable",
    "Settings",
    "Transition",
    "rate_limit",
]
