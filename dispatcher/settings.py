"""The deployment's settings: from `DISPATCHER_*` environment variables, else from `.env`, else the defaults."""

import importlib
import sys
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dispatcher.errors import ConfigurationError


class Settings(BaseSettings):
    """The settings of a deployment. Every field is an environment variable `DISPATCHER_<FIELD>`.

    Raises `pydantic.ValidationError` (a `ValueError`) for wrong values; it does not show them.
    """

    model_config = SettingsConfigDict(
        env_prefix="DISPATCHER_",
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
        frozen=True,
    )

    config: str | None = None
    """The configuration, as `package.module:ATTRIBUTE`. Defaults to none."""

    database_url: str | None = Field(default=None, repr=False)
    """SQLAlchemy URL of the rows. Defaults to an SQLite file in `./.dispatcher/`."""

    redis_url: str | None = Field(default=None, repr=False)
    """Redis/Valkey URL of locks, markers and rate limits. Defaults to the server of `dispatcher dev` here, if any."""

    broker_url: str | None = Field(default=None, repr=False)
    """Celery broker URL. Defaults to the Redis URL."""

    prefix: str = Field(default="dispatcher", min_length=1, max_length=50, pattern=r"^[A-Za-z0-9_.-]+$")
    """First part of every Redis key. Defaults to "dispatcher"."""

    sweep_seconds: float = Field(default=60, gt=0, le=86400)
    """Seconds between sweeps over due chains. Defaults to 60."""

    relay_seconds: float = Field(default=10, gt=0, le=3600)
    """Seconds between relays (passes over owed deliveries). Defaults to 10."""

    lock_seconds: float = Field(default=30, ge=1, le=3600)
    """Time to live of a chain's lock, in seconds. Defaults to 30."""

    callback_seconds: float = Field(default=60, ge=1, le=86400)
    """Time limit of one callback, in seconds. The process of a callback that runs longer is killed. Defaults to 60."""

    lease_seconds: float = Field(default=20, ge=2, le=3600)
    """An attempt counts as lost if its process has not renewed it for so many seconds. Defaults to 20."""

    last_look_seconds: float = Field(default=0, ge=0, le=86400 * 365)
    """Guards are asked again if an attempt starts more seconds than this after its plan. Defaults to 0 (always)."""

    queued_seconds: float = Field(default=60, ge=1, le=86400)
    """Seconds after which a published message that no worker has taken is published again. Defaults to 60."""

    sweep_fanout: int = Field(default=0, ge=0, le=10_000)
    """Chains per page that a sweep hands to another worker for publishing. Defaults to 0 (the sweep publishes)."""

    max_backlog: int = Field(default=100_000, ge=1)
    """A sweep adds nothing while its queue holds this many messages. Defaults to 100000."""

    chains_per_task: int = Field(default=1, ge=1, le=1000)
    """Chains in one `dispatcher.execute_chain` message. Defaults to 1."""

    deliveries_per_task: int = Field(default=1, ge=1, le=1000)
    """Deliveries in one `dispatcher.deliver_callback` message. Defaults to 1."""

    retention_days: float | None = Field(default=None, gt=0, le=36500)
    """Age in days at which events, closed deliveries and operators' actions are pruned. Defaults to none (kept)."""

    dry_run: bool = False
    """Log what sweeps, enqueues and executions would do. Operators' commands still write. Defaults to false."""

    clock: str | None = None
    """Domain time, as `package.module:callable` giving aware datetimes. Defaults to none (the database's clock)."""

    connect_seconds: float = Field(default=5, gt=0, le=9)
    """Connect timeout of the database in seconds; half of it for each try at Redis and the broker. Defaults to 5."""

    @model_validator(mode="after")
    def _urls_are_urls(self) -> Self:
        for name in ("database_url", "redis_url", "broker_url"):
            value = getattr(self, name)
            if value is not None and "://" not in value:
                raise ValueError(f"{name} is not a URL")
        return self

    @property
    def broker_seconds(self) -> float:
        """Timeout of one try at the broker. A message may need three: on the open connection, then on two new ones."""
        return self.connect_seconds / 2

    @property
    def lapse_seconds(self) -> float:
        """How long after a relay saw that a lease had ended another one may settle the attempt.

        Half of the lease, because a process renews every quarter of it and then waits at most 3 s for the database;
        and a tenth less, because beats are not exact. Never below 3 s, because a process whose database was away may be
        in a try to connect, which takes 2 s at least.
        """
        return max(self.lease_seconds * 0.45, 3.0)

    @property
    def attempt_seconds(self) -> float:
        """Hard time limit of a task that makes attempts: what comes before the call, the call, and what comes after."""
        return self.lock_seconds + self.callback_seconds + 30

    @property
    def execute_seconds(self) -> float:
        """Hard time limit of one execution, which is below the lock's time to live."""
        return self.lock_seconds * 0.8


def load_object(path: str, setting: str) -> Any:
    """The object that `path` names. The current directory is importable.

    Raises `ConfigurationError`, which names `setting`. An import error inside the module is raised unchanged.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"must be package.module:ATTRIBUTE, not {path!r}", setting)
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigurationError(f"there is no module {error.name!r}", setting) from error
        raise
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigurationError(f"module {module_name!r} has no {attribute!r}", setting) from error
