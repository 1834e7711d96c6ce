"""pytest-celery's nodes as local processes, and the deployment that they are part of: no test needs Docker.

pytest-celery asks of a container what docker's Python API has; the classes here have as much of it as it uses.
"""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pytest_celery import CeleryTestContainer, CeleryWorkerContainer, RedisContainer
from pytest_docker_tools.exceptions import ContainerFailed, ContainerNotReady

from dispatcher import DONE, Chain, Dispatcher, Settings
from tests.acceptance.chainlib import CONFIG, SINK_VARIABLE, Sink
from tests.servers import RedisServer

ROOT = Path(__file__).parents[2]
MARK = "CHAIN_DISPATCHER_TEST_NODE"
START_SECONDS = 60
STOP_SECONDS = 20
_POLL_SECONDS = 0.02
_LOG_TAIL = 6000

# Has the process killed when the run dies, even from a SIGKILL. A program rather than a `preexec_fn`, which is unsafe
# in a process with threads.
_LAUNCHER = """
import ctypes, os, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit("the test run is gone")
os.execv(command[0], command)
"""

Found = TypeVar("Found")
Node = TypeVar("Node", bound="ProcessNode")


def eventually(condition: Callable[[], Found], what: str, *, seconds: float = 45) -> Found:
    """The first true value of `condition()`; `AssertionError` if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(_POLL_SECONDS)
    return found


class ProcessNode:
    """One process and its children, in place of a container. A mixin: it stands before the container's class.

    The processes are known by a mark in their environment, wherever they end up.
    """

    id: str = ""  # these two are read-only in the class behind
    env: dict[str, str] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, argv: Sequence[str], root: Path, env: dict[str, str]) -> None:
        # Not super().__init__(), which wants docker's container.
        self.id = uuid.uuid4().hex
        self.argv = [part.replace("%h", self.id[:12]) for part in argv]  # as in docker, where this is the host's name
        self.root = root
        self.env = {**env, MARK: self.id}
        self.log_path = root / f"{self.id}.log"
        self.log_path.touch()
        self._seen = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"{type(self).__name__}-{self.id[:12]}"

    @property
    def status(self) -> str:
        return "running" if self.process is not None and self.process.poll() is None else "exited"

    def start(self) -> None:
        """Start the process; its log goes on where it was."""
        with self.log_path.open("ab") as log:
            self._seen = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *self.argv],
                cwd=self.root,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ready(self) -> bool:
        """Whether it has said so since its start; `ContainerFailed` if it has ended instead."""
        if self.status != "running":
            raise ContainerFailed(self, f"{self.name} has ended:\n{self.tail()}")
        prompt = self.ready_prompt  # type: ignore[attr-defined]
        return prompt.encode() in self.log_path.read_bytes()[self._seen :]

    def wait_until_ready(self) -> None:
        """Return when it is ready; `ContainerNotReady` if that takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if time.monotonic() > deadline:
                raise ContainerNotReady(self, f"{self.name} is not ready in {START_SECONDS} s:\n{self.tail()}")
            time.sleep(_POLL_SECONDS)

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal to the process; SIGKILL goes to its children too, as when a container is killed."""
        if self.process is None:
            return
        number = _signal(signal)
        if number != _signal("SIGKILL"):
            self.process.send_signal(number)
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(STOP_SECONDS)

    def restart(self, timeout: float = STOP_SECONDS) -> None:
        """Stop it, the hard way after `timeout` seconds, and start it again."""
        if self.process is not None and self.status == "running":
            self.kill("SIGTERM")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()
        self.start()
        self.wait_until_ready()

    def reload(self) -> None:
        """Nothing: what is asked here is asked of the process itself."""

    def logs(self) -> str:
        """All that it has printed."""
        return self.log_path.read_text(errors="replace")

    def tail(self) -> str:
        """The last of what it has printed."""
        return f"--- {self.name}: {' '.join(self.argv[2:])}\n{self.logs()[-_LOG_TAIL:]}"

    def processes(self) -> list[psutil.Process]:
        """All living processes that it consists of."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.id and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


class RedisNode(RedisContainer):
    """The broker: one of the run's own servers. It has the same port after a restart, and forgets everything."""

    id: str = ""
    env: dict[str, str] = {}  # noqa: RUF012 - as above

    def __init__(self, server: RedisServer) -> None:
        self.id = uuid.uuid4().hex
        self.server = server

    @property
    def name(self) -> str:
        return f"{type(self).__name__}-{self.id[:12]}"

    @property
    def status(self) -> str:
        return "running" if self.server.process is not None else "exited"

    @property
    def hostname(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def host_url(self) -> str:
        return self.server.url

    def ready(self) -> bool:
        return self.status == "running" and self.server.is_ready()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        if _signal(signal) == _signal("SIGKILL"):
            self.server.kill()
        else:
            self.server.stop(_signal(signal))

    def restart(self, timeout: float = STOP_SECONDS) -> None:
        self.server.stop()
        self.server.start()

    def reload(self) -> None:
        """Nothing, as above."""

    def logs(self) -> str:
        return self.server.log_path.read_text(errors="replace")


class WorkerNode(ProcessNode, CeleryWorkerContainer):
    """`celery -A workers worker`, as users run it."""

    @classmethod
    def worker_name(cls) -> str:
        return "worker"

    @classmethod
    def command(cls, *args: str, app: str = "workers", **_: Any) -> list[str]:
        quick = ["--concurrency=2", "--without-gossip", "--without-mingle", "--loglevel=INFO", "--task-events"]
        return [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{cls.worker_name()}@%h", *quick, *args]


class BeatNode(ProcessNode, CeleryTestContainer):
    """`celery -A workers beat`."""

    @property
    def ready_prompt(self) -> str:
        return "beat: Starting..."

    @classmethod
    def command(cls, *args: str, **_: Any) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "workers", "beat", "--loglevel=INFO", *args]


class Deployment:
    """What the processes of one deployment share: directory, database, Redis, sink, settings."""

    def __init__(self, directory: Path, *, database_url: str, redis_url: str, **settings: Any) -> None:
        self.directory = directory
        self.redis_url = redis_url
        self.sink = Sink(directory / "sink.jsonl")
        self.options = {
            "config": "tests.acceptance.chainlib:CONFIG",
            "database_url": database_url,
            "redis_url": redis_url,
            **settings,
        }
        self.nodes: list[ProcessNode] = []

    @property
    def env(self) -> dict[str, str]:
        """The environment of its processes: nothing of the developer's but where programs are."""
        settings = {f"DISPATCHER_{name.upper()}": str(value) for name, value in self.options.items()}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        return {**kept, "PYTHONPATH": str(ROOT), SINK_VARIABLE: str(self.sink.path), **settings}

    def client(self, **settings: Any) -> Dispatcher:
        """The dispatcher of an application beside the workers; to be closed."""
        return Dispatcher(CONFIG, settings=Settings(**{**self.options, **settings}))

    def worker(self, *args: str, **env: str) -> WorkerNode:
        """A worker, not started."""
        return WorkerNode(WorkerNode.command(*args), self.directory, {**self.env, **env})

    def beat(self, *args: str, **env: str) -> BeatNode:
        """A beat with a schedule file of its own, not started."""
        schedule = self.directory / f"beat-{uuid.uuid4().hex}"
        return BeatNode(BeatNode.command("--schedule", str(schedule), *args), self.directory, {**self.env, **env})

    @contextmanager
    def running(self, node: Node) -> Iterator[Node]:
        """`node` while it runs. At the end none of its processes is left."""
        self.nodes.append(node)
        try:
            node.start()
            node.wait_until_ready()
            yield node
        finally:
            self.nodes.remove(node)
            node.kill()
            eventually(lambda: not node.processes(), f"the end of {node.name}", seconds=STOP_SECONDS)

    def eventually(self, condition: Callable[[], Found], what: str, *, seconds: float = 45) -> Found:
        """As the function of this name; its error shows the end of every log, and of the sink."""
        try:
            return eventually(condition, what, seconds=seconds)
        except AssertionError as error:
            logs = [node.tail() for node in self.nodes]
            sink = "\n".join(map(str, self.sink.lines()[-20:]))
            raise AssertionError("\n".join([str(error), *logs, "--- sink", sink])) from None

    def wait_for_state(self, chain: Chain, state: str, *, seconds: float = 45) -> None:
        """Return when `chain` is in `state`."""
        self.eventually(lambda: chain.refresh().state == state, f"{chain!r} in {state!r}", seconds=seconds)

    def assert_went_all_the_way_once(self, chains: Sequence[Chain]) -> None:
        """Each of these `sequence` chains gets to DONE by a contiguous history, each of its callbacks done once."""
        self.eventually(lambda: all(chain.refresh().state == DONE for chain in chains), f"{len(chains)} chains DONE")
        for chain in chains:
            moves = [event for event in chain.events if event.action == "state_transition"]
            assert [(event.from_state, event.to_state) for event in moves] == [
                ("new", "first_sent"),
                ("first_sent", "second_sent"),
                ("second_sent", DONE),
            ]
            assert len({event.chain_version for event in moves}) == len(moves)
            done = self.sink.lines("done", chain_id=chain.id)
            assert [line["transition"] for line in done] == ["First", "Second"], "nothing is called on the way to DONE"
            assert {line["key"] for line in done} == {delivery.idempotency_key for delivery in chain.deliveries}
            assert {delivery.status for delivery in chain.deliveries} == {"delivered"}

    def run(self, *arguments: str, **env: str) -> tuple["subprocess.CompletedProcess[str]", float]:
        """`python -m celery ARGUMENTS` to its end, and how many seconds that took."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "celery", *arguments],
            cwd=self.directory,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, time.monotonic() - began


def results(log: str, task: str) -> list[str]:
    """The return values of the runs of a task, as a worker's log shows them."""
    return re.findall(rf"Task {re.escape(task)}\[[\w-]+\] succeeded in [\d.e-]+s: (.*)", log)


def make_fifo(directory: Path) -> Path:
    """A FIFO at which a guard or callback waits."""
    path = directory / f"fifo-{uuid.uuid4().hex}"
    os.mkfifo(path)
    return path


def open_fifo(fifo: Path) -> None:
    """Let the process that waits at `fifo` go on, and every later one pass."""
    with fifo.open("wb"):
        fifo.unlink()


def _signal(name: str | int) -> signal.Signals:
    return signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
