"""A logic engine that determines what to execute next, on Celery.

The public names are below. Each is loaded when it is first asked for, because SQLAlchemy and Celery, which `Dispatcher`
needs, take longer to load than a configuration or a help text.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispatcher.chain import Chain
    from dispatcher.dispatcher import Dispatcher
    from dispatcher.domain.config import ChainType, DispatcherConfig
    from dispatcher.errors import (
        AmbiguousChain,
        ChainDisabled,
        ChainLocked,
        ChainMissing,
        ChainNotDue,
        ChainPaused,
        ConfigurationError,
        DatabaseNotMigrated,
        DeliveryChanged,
        DeliveryPending,
        DispatcherError,
        DryRunRefused,
        EnqueueNotPublished,
        InvalidResource,
        NoOpenDelivery,
        NotSerializable,
        PermanentFailure,
        ServiceRefused,
        ServiceUnavailable,
        WorkersNotStopped,
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
    "ChainPaused",
    "ChainType",
    "ConfigurationError",
    "DatabaseNotMigrated",
    "DeliveryChanged",
    "DeliveryPending",
    "Dispatcher",
    "DispatcherConfig",
    "DispatcherError",
    "DryRunRefused",
    "EnqueueNotPublished",
    "InvalidResource",
    "NoOpenDelivery",
    "NotSerializable",
    "PermanentFailure",
    "RetryPolicy",
    "ServiceRefused",
    "ServiceUnavailable",
    "Settings",
    "Transition",
    "WorkersNotStopped",
    "rate_limit",
]

_HOMES = {
    "Chain": "chain",
    "ChainType": "domain.config",
    "DONE": "states",
    "Dispatcher": "dispatcher",
    "DispatcherConfig": "domain.config",
    "NEW": "states",
    "RetryPolicy": "retry",
    "Settings": "settings",
    "Transition": "transition",
    "rate_limit": "rates",
}
"""The module of each public name; those not named here are errors."""


if not TYPE_CHECKING:  # type checkers must go on finding names that do not exist

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
