"""`Stack`: server, worker and beat as processes of one directory, started and stopped together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from dispatcher.embedded.processes import die_with_parent, hold_lock, release_lock
from dispatcher.embedded.server import EmbeddedServer
from dispatcher.embedded.state import default_database_url
from dispatcher.errors import DispatcherError
from dispatcher.urls import broker_url_from_redis

POLL_SECONDS: Final = 0.05
_GRACE_SECONDS: Final = 15
READY_SECONDS: Final = 60
_READY: Final = re.compile(rb"@\S+ ready\.")


class StackError(DispatcherError):
    """The stack cannot start, or a part of it has ended unexpectedly; the text names the part and its log."""


class Child:
    """One process of the stack, in a separate session; it writes to a log file."""

    def __init__(self, name: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only the parent, which stops the parts in order
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - its docstring says why this is safe
            )

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its process group."""
        return self._process.pid

    def check(self) -> None:
        """Raise `StackError` if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise StackError(f"{self.name} ended with code {code}: {_last_line(self.log)} (see {self.log})")

    def ask_to_stop(self) -> None:
        """Send SIGTERM; a worker then finishes the tasks that it has begun."""
        self._process.terminate()

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the whole process group and wait for its leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Stack:
    """Worker and beat processes, and the embedded server if there is no Redis URL, for one directory.

    - `env`: more environment for the processes, such as `DISPATCHER_CONFIG`.
    - `redis_url`, `broker_url`, `database_url`: None means the embedded server or file in `directory`. The processes
      inherit the environment of the caller, except for these three URLs, which are always set.
    - `worker_args`, `beat_args`: more arguments of `celery worker` and `celery beat`.
    - `concurrency`: processes of the worker's pool. Defaults to Celery's choice.
    - `log_level`: what is logged, "DEBUG" or "INFO". Defaults to "INFO".

    Entering it starts the parts and waits until the worker is ready; leaving it stops them. Logs go to `worker.log`,
    `beat.log` and `server.log` in the directory. Raises `StackError` if the directory has a stack already, or if a
    part does not start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        env: Mapping[str, str] | None = None,
        redis_url: str | None = None,
        broker_url: str | None = None,
        database_url: str | None = None,
        worker_args: Sequence[str] = (),
        beat_args: Sequence[str] = (),
        concurrency: int | None = None,
        log_level: str = "INFO",
    ) -> None:
        self.directory = directory.absolute()
        self.children: list[Child] = []
        self.grace_seconds: float = _GRACE_SECONDS
        self._extra_env = dict(env or {})
        self._redis_url = redis_url
        self._broker_url = broker_url
        self._database_url = database_url
        pool = ["--concurrency", str(concurrency)] if concurrency is not None else []
        quick_start = ["--without-gossip", "--without-mingle"]  # both would leave lists behind in Redis
        self._worker_args = [*_celery("worker", log_level), "-E", *quick_start, *pool, *worker_args]
        schedule = str(self.directory / "beat-schedule")
        self._beat_args = [*_celery("beat", log_level), "--pidfile=", "--schedule", schedule, *beat_args]
        self._server: EmbeddedServer | None = None
        self._pid_file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.launch()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def redis_url(self) -> str:
        """The redis-py URL of locks and markers."""
        if self._redis_url is not None:
            return self._redis_url
        if self._server is None:
            raise StackError("the stack has not been started")
        return self._server.redis_url

    @property
    def broker_url(self) -> str:
        """The Celery broker URL."""
        return self._broker_url or broker_url_from_redis(self.redis_url)

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the rows."""
        return self._database_url or default_database_url(self.directory)

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which another process uses this stack."""
        return {
            **self._extra_env,
            "DISPATCHER_REDIS_URL": self.redis_url,
            "DISPATCHER_BROKER_URL": self.broker_url,
            "DISPATCHER_DATABASE_URL": self.database_url,
        }

    def launch(self) -> None:
        """Start all parts and return at once. Call `stop()` afterwards, even if this raises."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._pid_file = hold_lock(self.directory / "dev.pid")
        if self._pid_file is None:
            pid = (self.directory / "dev.pid").read_text(encoding="ascii").strip()
            raise StackError(f"`dispatcher dev` is already running in {self.directory} (process {pid})")
        if self._redis_url is None:
            server = EmbeddedServer(self.directory)
            server.start()
            self._server = server
        for name, arguments in (("worker", self._worker_args), ("beat", self._beat_args)):
            self.children.append(Child(name, arguments, self.env, self.directory / f"{name}.log"))

    def is_ready(self) -> bool:
        """Whether the worker takes tasks."""
        return any(_READY.search(child.log.read_bytes()) for child in self.children if child.name == "worker")

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the worker takes tasks. Raises `StackError` if a part ends, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"the worker is not ready after {seconds:.0f} s, see {self.directory / 'worker.log'}")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise `StackError` if a part has ended unexpectedly."""
        if self._server is not None and self._server.pid is None:
            raise StackError(f"the embedded server has ended (see {self.directory / 'server.log'})")
        for child in self.children:
            child.check()

    def stop(self) -> None:
        """Stop beat, then the worker, then the server. A process that does not end in `grace_seconds` is killed."""
        while self.children:
            child = self.children[-1]
            child.ask_to_stop()
            began = time.monotonic()
            while not child.has_ended() and time.monotonic() < began + self.grace_seconds:
                time.sleep(POLL_SECONDS)
            child.kill()
            self.children.pop()
        if self._server is not None:
            self._server.stop()
            self._server = None
        if self._pid_file is not None:
            release_lock(self._pid_file)
            self._pid_file = None


def _celery(command: str, log_level: str) -> list[str]:
    return ["-m", "celery", "--quiet", "-A", "workers", command, "--loglevel", log_level]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it wrote no log"
