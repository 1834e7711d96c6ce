"""The servers of one run: a private Valkey (or Redis) and a private PostgreSQL, which all lanes share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis

from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade
from tests.servers import PostgresServer, RedisServer

ROOT = Path(__file__).parents[1]
_STAGING = 63


class BenchmarkRedis(RedisServer):
    """The Redis or Valkey server of the tests, with a database for every fleet."""

    def command(self) -> list[str]:
        return [*super().command(), "--databases", str(_STAGING + 1)]


class BenchmarkPostgres(PostgresServer):
    """The PostgreSQL server of the tests, with the memory that a deployment would give it."""

    def command(self) -> list[str]:
        memory = {"shared_buffers": "512MB", "max_wal_size": "8GB", "work_mem": "16MB", "timezone": "UTC"}
        return [*super().command(), *(f"--{name}={value}" for name, value in memory.items())]


@dataclass(slots=True)
class Servers:
    """The running servers, with databases and URLs for the lanes."""

    redis: BenchmarkRedis
    postgres: BenchmarkPostgres
    directory: Path
    template: str
    _databases: int = field(default=0)

    def redis_url(self) -> str:
        """The URL of a Redis database that no other lane uses."""
        self._databases += 1
        assert self._databases < _STAGING
        return f"{self._redis_base}/{self._databases}"

    @property
    def staging_url(self) -> str:
        """The URL of the Redis database in which messages wait until `release` gives them to a fleet all at once."""
        return f"{self._redis_base}/{_STAGING}"

    def release(self, queue: str, redis_url: str) -> None:
        """Give the messages of a queue at `staging_url` to the fleet at `redis_url`."""
        with redis.Redis(port=self.redis.port, db=_STAGING) as client:
            assert client.move(queue, int(redis_url.rpartition("/")[2])), f"queue {queue} is not empty"
            client.flushdb()

    def database_url(self) -> str:
        """The URL of a new, migrated database."""
        return self.postgres.create_database(template=self.template)

    def cpu_seconds(self) -> dict[str, float]:
        """The CPU time that each server has used so far."""
        return {"redis": cpu_seconds(self.redis.pid), "postgres": cpu_seconds(self.postgres.pid)}

    def versions(self) -> dict[str, str]:
        """The versions of the servers."""
        with redis.Redis(port=self.redis.port) as client:
            info = client.info("server")
        with self.postgres.connect() as connection:
            row = connection.execute("SHOW server_version").fetchone()
        name = "Valkey" if "valkey_version" in info else "Redis"
        return {name: str(info.get("valkey_version", info["redis_version"])), "PostgreSQL": str(row[0] if row else "")}

    @property
    def _redis_base(self) -> str:
        return self.redis.url.rpartition("/")[0]


@contextmanager
def running_servers(*, fsync: bool) -> Iterator[Servers]:
    """Start the servers and stop them at the end. With `fsync=False` the disk does not affect the measurement."""
    directory = Path(tempfile.mkdtemp(prefix="benchmark-"))
    previous = Path.cwd()
    try:
        os.chdir(directory)  # so that no .env or .dispatcher of the current directory is used
        with BenchmarkRedis() as redis_server, BenchmarkPostgres(fsync=fsync) as postgres:
            template = postgres.create_database()
            database = Database(template)
            upgrade(database)
            database.dispose()
            yield Servers(redis_server, postgres, directory, template)
    finally:
        os.chdir(previous)
        shutil.rmtree(directory, ignore_errors=True)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, of its living children, and of the children that it has waited for."""
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total
