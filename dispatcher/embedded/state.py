"""Tells where the files of the embedded default are, and whether its server is running."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.engine import URL

EMBEDDED_DIRECTORY = ".dispatcher"
"""Where `dispatcher dev` keeps its database, socket, pid and log files, below the current directory."""


_PROBE_SECONDS: Final = 1


@dataclass(frozen=True, slots=True)
class ServerState:
    """The content of `server.json`: the server's process id, the random id of this start, and its socket."""

    pid: int
    run_id: str
    socket: str

    @property
    def redis_url(self) -> str:
        """The redis-py URL."""
        return f"unix://{self.socket}?db=0"


def embedded_directory() -> Path:
    """The absolute path of the directory of the embedded default; it may not exist."""
    return Path.cwd() / EMBEDDED_DIRECTORY


def default_database_url(directory: Path) -> str:
    """The SQLAlchemy URL of the embedded SQLite file in that directory."""
    database = str(directory.absolute() / "dispatcher.db")
    return URL.create("sqlite", database=database).render_as_string(hide_password=False)


def find_running(directory: Path) -> str | None:
    """The redis-py URL of the server that is running for that directory, or None.

    Never raises; takes a second at most.
    """
    state = read_state(directory)
    return state.redis_url if state is not None and is_alive(state) else None


def state_file(directory: Path) -> Path:
    return directory / "server.json"


def read_state(directory: Path) -> ServerState | None:
    try:
        raw = json.loads(state_file(directory).read_text(encoding="utf-8"))
        return ServerState(int(raw["pid"]), str(raw["run_id"]), str(raw["socket"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_alive(state: ServerState) -> bool:
    info = server_info(state.redis_url)
    return info is not None and info["process_id"] == state.pid and info["run_id"] == state.run_id


def client_of(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_timeout=_PROBE_SECONDS,
        socket_connect_timeout=_PROBE_SECONDS,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


def server_info(url: str) -> dict[str, Any] | None:
    try:
        with client_of(url) as client:
            info: dict[str, Any] = client.info("server")
    except (RedisError, OSError, ValueError):
        return None
    return info if "process_id" in info and "run_id" in info else None
