"""What a database URL and `engine_options` ask of the engine and the driver, checked before anything is connected.

An option that the library must decide itself is refused. For all others the user's value wins over the library's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.engine import URL, make_url

from dispatcher.errors import ConfigurationError

DRIVERS: Final = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql", "sqlite": "pysqlite"}
"""The driver of each kind of database, as SQLAlchemy calls it; others are not supported."""

_POOL: Final = {"pool_size", "max_overflow", "pool_timeout", "pool_recycle"}
"""Options of the engine that a URL may have."""

_ENGINE: Final = _POOL | {
    "connect_args", "echo", "echo_pool", "logging_name", "pool_logging_name", "pool_use_lifo", "query_cache_size"
}  # fmt: skip
"""Options of the engine that `engine_options` may have."""

_OURS: Final = {
    "psycopg": {"autocommit", "context", "cursor_factory", "row_factory"},
    "pymysql": {"autocommit", "client_flag", "conv", "cursorclass", "use_unicode", "defer_connect"},
    "pysqlite": {"autocommit", "check_same_thread", "detect_types", "factory", "isolation_level"},
}
_ENCODINGS: Final = {"psycopg": ("client_encoding", "utf8"), "pymysql": ("charset", "utf8mb4")}


@dataclass(frozen=True, slots=True)
class Options:
    """A URL for the driver alone, the options of its engine, and those of its connections."""

    url: URL
    engine: Mapping[str, Any]
    connect: Mapping[str, Any]


def normal_url(url: str) -> URL:
    """`url` with the name of its driver. Raises `ArgumentError` or `ValueError` if it cannot be parsed safely."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" and url.count("@") > 1:
        # The rest of the password would be read as host or database, and be logged.
        raise ValueError("unquoted @")
    if parsed.drivername == "postgres":
        parsed = parsed.set(drivername="postgresql")
    driver = DRIVERS.get(parsed.drivername)
    if driver is not None and parsed.drivername != "sqlite":
        parsed = parsed.set(drivername=f"{parsed.drivername}+{driver}")
    return parsed


def read_options(url: URL, given: Mapping[str, Any] | None = None) -> Options:
    """The options in a URL's query and in `engine_options`. Raises `ConfigurationError` for what cannot be had.

    Where both have an option, that of `engine_options` is taken. The error shows names of options, and no values.
    """
    _require_supported(url)
    given = dict(given or {})
    unknown = sorted(given.keys() - _ENGINE)
    if unknown:
        known = ", ".join(sorted(_ENGINE))
        raise ConfigurationError(
            f"not an option that can be given: {', '.join(unknown)} (known: {known})", "engine_options"
        )
    connect = dict(given.pop("connect_args", None) or {})
    in_url = {name: _number(name, url.query[name]) for name in _POOL if name in url.query}
    rest = {name: value for name, value in url.query.items() if name not in _POOL}
    driver = DRIVERS[url.get_backend_name()]
    for where, options in (("database URL", rest), ("engine_options", connect)):
        _require_not_ours(driver, options, where)
    if driver == "psycopg" and "prepare_threshold" in rest:
        connect.setdefault("prepare_threshold", _threshold(rest.pop("prepare_threshold")))
    return Options(url.set(query=rest), in_url | given, {**connect})


def _require_supported(url: URL) -> None:
    backend, driver = url.get_backend_name(), url.drivername.partition("+")[2]
    ours = DRIVERS.get(backend)
    if ours is None:
        raise ConfigurationError(
            f"{backend!r} is not supported: use PostgreSQL, MySQL, MariaDB or SQLite", "database URL"
        )
    if driver not in ("", ours):
        use = "sqlite:///..." if backend == "sqlite" else f"{backend}+{ours}://..."
        raise ConfigurationError(f"the driver {driver!r} is not supported: use {use}", "database URL")


def _require_not_ours(driver: str, options: Mapping[str, Any], where: str) -> None:
    refused = sorted(options.keys() & _OURS[driver])
    if refused:
        raise ConfigurationError(f"the library decides this itself: {', '.join(refused)}", where)
    name, encoding = _ENCODINGS.get(driver, ("", ""))
    if name in options and str(options[name]).lower() != encoding:
        raise ConfigurationError(f"{name} must be {encoding}, which can hold every text", where)


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigurationError(f"{name} must be a whole number", "database URL") from None


def _threshold(value: object) -> int | None:
    return None if str(value).lower() == "none" else _number("prepare_threshold", value)
