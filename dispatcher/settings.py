"""The deployment's settings, from `DISPATCHER_*` environment variables, then `.env`, then defaults."""

import re
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dispatcher.errors import ConfigurationError

EMBEDDED_DIRECTORY = ".dispatcher"
"""Where `dispatcher dev` keeps its database, socket, pid and log files, below the current directory."""

_PLAIN_URL: Final = re.compile(
    r"(?P<scheme>[\w+.-]+)://(?:[^/?#\[\]]*@)?(?P<place>(?:\[[\w:.%]*\]|[^@/?#:\[\]]*)(?::\d*)?(?:/[^@?#]*)?)(?:[?#][^@]*)?"
)


class Settings(BaseSettings):
    """How this deployment runs. Every field is an environment variable `DISPATCHER_<FIELD>`.

    Raises `pydantic.ValidationError` (a `ValueError`) for values that do not fit; inputs are not shown in it.
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
    """Redis/Valkey URL of locks, markers and rate limits. Defaults to `dispatcher dev`'s server here, if any."""

    broker_url: str | None = Field(default=None, repr=False)
    """Celery broker URL. Defaults to the Redis URL."""

    prefix: str = Field(default="dispatcher", min_length=1, max_length=50, pattern=r"^[A-Za-z0-9_.-]+$")
    """First part of every Redis key. Defaults to "dispatcher"."""

    sweep_seconds: float = Field(default=60, gt=0, le=86400)
    """Seconds between sweeps over due chains. Defaults to 60."""

    relay_seconds: float = Field(default=10, gt=0, le=3600)
    """Seconds between passes over owed deliveries. Defaults to 10."""

    lock_seconds: float = Field(default=30, ge=1, le=3600)
    """Time to live of a chain's lock, in seconds. Defaults to 30."""

    callback_seconds: float = Field(default=60, ge=1, le=86400)
    """Hard time limit of one attempt, in seconds; its lease is 15 s longer. Defaults to 60."""

    last_look_seconds: float = Field(default=0, ge=0, le=86400 * 365)
    """An attempt that starts later than this after the plan asks the guards again. Defaults to 0 (always)."""

    queued_seconds: float = Field(default=60, ge=1, le=86400)
    """How long a published message counts as under way before it is published again. Defaults to 60."""

    sweep_fanout: int = Field(default=0, ge=0, le=10_000)
    """Chains in a page that a sweep hands to another worker for publishing; 0: it publishes itself. Defaults to 0."""

    max_backlog: int = Field(default=100_000, ge=1)
    """A sweep adds nothing while its queue holds more messages than this. Defaults to 100000."""

    chains_per_task: int = Field(default=1, ge=1, le=1000)
    """Chains in one `dispatcher.execute_chain` message. Defaults to 1."""

    deliveries_per_task: int = Field(default=1, ge=1, le=1000)
    """Deliveries in one `dispatcher.deliver_callback` message. Defaults to 1."""

    retention_days: float | None = Field(default=None, gt=0, le=36500)
    """Age in days at which events and closed deliveries are pruned. Defaults to none (kept)."""

    dry_run: bool = False
    """Log what would be done and do nothing, in every way in. Defaults to false."""

    clock: str | None = None
    """Domain time, as `package.module:callable` giving aware datetimes. Defaults to none (the database's clock)."""

    connect_seconds: float = Field(default=5, gt=0, le=9)
    """Connect and socket timeout for database, Redis and broker, in seconds. Defaults to 5."""

    @model_validator(mode="after")
    def _one_database_and_broker(self) -> Self:
        for name in ("database_url", "redis_url", "broker_url"):
            value = getattr(self, name)
            if value is not None and "://" not in value:
                raise ValueError(f"{name} is not a URL")
        return self

    @property
    def broker_seconds(self) -> float:
        """Timeout of one try at the broker. A message may take three: on the open connection, and twice on new ones."""
        return self.connect_seconds / 2

    @property
    def lease_seconds(self) -> float:
        """How long a begun attempt is left alone: the callback's hard limit plus 15 s."""
        return self.callback_seconds + 15

    @property
    def execute_seconds(self) -> float:
        """Hard time limit of one execution: below the lock's time to live."""
        return self.lock_seconds * 0.8


def broker_url_from_redis(redis_url: str) -> str:
    """The Celery broker URL of a redis-py URL: the same server, user and database in kombu's spelling.

    `unix:///path?db=1` becomes `redis+socket:///path?virtual_host=1`. Of the query, which kombu would refuse, only
    user, password, database and the `ssl_*` options are kept.
    """
    parts = urlsplit(redis_url)
    options = dict(parse_qsl(parts.query))
    user = parts.netloc.rpartition("@")[0]
    if not user and "password" in options:
        user = f"{quote(options.get('username', ''), safe='')}:{quote(options['password'], safe='')}"
    server = (f"{user}@" if user else "") + parts.netloc.rpartition("@")[2]
    if parts.scheme == "unix":
        return f"redis+socket://{server}{quote(unquote(parts.path))}?virtual_host={options.get('db', '0')}"
    path = f"/{options['db']}" if "db" in options else parts.path
    ssl_options = urlencode({name: value for name, value in options.items() if name.startswith("ssl_")})
    return f"{parts.scheme}://{server}{path}" + (f"?{ssl_options}" if ssl_options else "")


def without_password(url: str) -> str:
    """`url` as it may be logged: no user information and no query.

    Of a URL that is not plain (a password with an unquoted "/", "?" or "#" is cut elsewhere by every parser) only the
    scheme is shown.
    """
    plain = _PLAIN_URL.fullmatch(url)
    if plain is None:
        return f"{url.partition('://')[0] if '://' in url else ''}://..."
    return f"{plain['scheme']}://{plain['place']}"


def require_plain(url: str, what: str) -> str:
    """`url`, if every parser cuts it at the same places; `ConfigurationError` otherwise, which does not show it.

    An unquoted "/", "?", "#", "[", "]" or ";" in a password ends up in the host, port or database of some parser, and
    so in its errors and logs. Several brokers are separated by ";".
    """
    if not all(_PLAIN_URL.fullmatch(part) for part in url.split(";")):
        raise ConfigurationError(f"the {what} URL cannot be parsed: quote special characters, as in %2F for a /")
    return url


def embedded_directory() -> Path:
    """The directory of the embedded default, absolute; it need not exist."""
    return Path.cwd() / EMBEDDED_DIRECTORY
