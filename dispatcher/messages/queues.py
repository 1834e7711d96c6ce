"""The names of tasks and queues, and Celery's settings for a deployment."""

import math
from collections.abc import Sequence
from typing import Any, Final

from kombu import Exchange, Queue

from dispatcher.settings import Settings

SWEEP: Final = "dispatcher.sweep"
FAN_OUT: Final = "dispatcher.fan_out"
EXECUTE: Final = "dispatcher.execute_chain"
DELIVER: Final = "dispatcher.deliver_callback"
RELAY: Final = "dispatcher.relay"
PRUNE: Final = "dispatcher.prune"
REQUESTS_QUEUE: Final = "dispatcher.requests"
CHAINS_QUEUE: Final = "dispatcher.chains"
CALLBACKS_QUEUE: Final = "dispatcher.callbacks"
SWEEPS_QUEUE: Final = "dispatcher.sweeps"
QUEUES: Final = (REQUESTS_QUEUE, CHAINS_QUEUE, CALLBACKS_QUEUE, SWEEPS_QUEUE)
MAX_COUNTDOWN: Final = 60.0
"""The longest wait in the broker, in seconds. Longer waits are in rows."""

MAX_BEAT: Final = 60.0
"""The longest interval of a beat entry, in seconds."""

PRUNE_SECONDS: Final = 86_400.0
"""The interval of the prune."""

RETRY_POLICY: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2}


def celery_settings(settings: Settings, *, broker_url: str | None, queues: Sequence[str] = ()) -> dict[str, Any]:
    """Celery's settings for this deployment: broker, timeouts, queues, beat schedule. (Celery's lower-case names.)

    `queues` are the queues of the chain types, in addition to the four of this package.
    """
    seconds = settings.broker_seconds
    passes = {SWEEP: settings.sweep_seconds, RELAY: settings.relay_seconds}
    if settings.retention_days is not None:
        passes[PRUNE] = PRUNE_SECONDS
    schedule: dict[str, Any] = {
        name: {"task": name, "schedule": beat_seconds(interval), "options": {"queue": SWEEPS_QUEUE}}
        for name, interval in passes.items()
    }
    return {
        "broker_url": broker_url,
        "result_backend": None,
        "broker_connection_timeout": seconds,
        "broker_transport_options": transport_options(broker_url, seconds),
        "broker_connection_retry_on_startup": True,
        "task_publish_retry": True,
        "task_publish_retry_policy": RETRY_POLICY,
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        "task_default_queue": REQUESTS_QUEUE,
        "task_queues": declared_queues(queues),
        "task_routes": {
            EXECUTE: {"queue": CHAINS_QUEUE},
            DELIVER: {"queue": CALLBACKS_QUEUE},
            **{name: {"queue": SWEEPS_QUEUE} for name in (SWEEP, FAN_OUT, RELAY, PRUNE)},
        },
        "beat_schedule": schedule,
        "timezone": "UTC",
        "enable_utc": True,
    }


def beat_seconds(interval: float) -> float:
    """How often beat sends a pass with this interval: at most every 60 s, and so that the interval is met exactly.

    The tick's row decides whether the pass runs. So a pass with a long interval runs although beat, which may count
    from its own start, is restarted every few minutes.
    """
    return interval / math.ceil(interval / MAX_BEAT)


def declared_queues(type_queues: Sequence[str] = ()) -> list[Queue]:
    """The queues of this package and those of the chain types; on-demand requests come first."""
    names = dict.fromkeys([*QUEUES, *type_queues])
    return [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names]


def transport_options(broker_url: str | None, seconds: float) -> dict[str, Any]:
    """The broker's transport options: timeouts, so that a silent broker does not block for ever."""
    scheme = (broker_url or "").partition("://")[0]
    if scheme.startswith(("redis", "valkey", "sentinel")):
        return {
            "socket_timeout": seconds,
            "socket_connect_timeout": seconds,
            "socket_keepalive": True,
            "health_check_interval": 30,
            "max_retries": 1,
            "interval_start": 0,
            "visibility_timeout": 3600,
        }
    if scheme in ("amqp", "amqps", "pyamqp"):
        return {
            "confirm_publish": True,
            "max_retries": 1,
            "interval_start": 0,
            "read_timeout": seconds,
            "write_timeout": seconds,
        }
    return {}
