"""The deployment under fault: its own servers, its workers and beats, and a client beside them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from dispatcher import Dispatcher, Settings
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade
from tests.chaos import profile, skew, workload
from tests.chaos.exits import Exits
from tests.chaos.failpoints import FAILPOINTS_VARIABLE, FLAG, NODE_VARIABLE, SEED_VARIABLE, VERSION_VARIABLE, WANTED
from tests.chaos.observed import Later, Observed
from tests.chaos.operators import Operators
from tests.chaos.profile import Profile
from tests.chaos.proxy import Proxy
from tests.chaos.sink import DIRECTORY_VARIABLE, SinkReader
from tests.servers import _LAUNCHER, PostgresServer, RedisServer, wait_until

ROOT: Final = Path(__file__).parents[2]
MARK: Final = "CHAOS_MARK"
START_SECONDS: Final = 60
_KEPT: Final = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")

SETTINGS: Final = {
    "sweep_seconds": 1,
    "relay_seconds": 1,
    "lock_seconds": 3,
    "callback_seconds": 8,
    "lease_seconds": 12,
    "queued_seconds": 5,
    "connect_seconds": 2,
    "max_backlog": 150,
}
"""Short, so that a run is: the promises are made of these numbers."""


class CrashSafePostgres(PostgresServer):
    """A PostgreSQL whose commits survive an immediate stop. No power is cut here, so nothing is synced to disk."""

    def command(self) -> list[str]:
        return [*super().command(), "--synchronous_commit=on", "--wal_writer_delay=10ms"]


class Node:
    """A worker or a beat, with its children a process group of its own, dead when the driver is.

    Started by the driver's main thread only: the kernel ends it with the thread that started it.
    """

    def __init__(self, name: str, arguments: list[str], env: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.arguments = arguments
        self.env = {**env, NODE_VARIABLE: name}
        self.directory = directory
        self.log_path = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; nothing waits for it."""
        identity = [os.getpid(), os.getuid(), os.getgid(), int(signal.SIGKILL)]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, identity)]
        self.starts += 1
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-m", "celery", "-A", "workers", *self.arguments],
                cwd=self.directory,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to it and its children."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it and its children without warning."""
        if self.process is None:
            return
        self.signal_all(signal.SIGKILL)
        self.process.wait(30)

    def pids(self) -> list[int]:
        """The pids of it and its children."""
        return [] if self.process is None else [self.process.pid, *self.children()]

    def children(self) -> list[int]:
        """The pids of its pool's children."""
        if not self.alive:
            return []
        assert self.process is not None
        with suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.process.pid).children()]
        return []


class Deployment:
    """Servers, nodes and client of one run."""

    def __init__(self, run: Profile, *, failpoints: Mapping[str, float], proxied: bool, beats: int) -> None:
        self.profile = run
        self.seed = run.seed
        self.seen = Observed()
        self.failpoints = failpoints
        self.broker, self.locks = RedisServer(), RedisServer()
        self.postgres = CrashSafePostgres()
        self.directory = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.flag = self.directory / FLAG
        self.proxies: dict[str, Proxy] = {}
        self.proxied = proxied
        self.beat_count = beats
        self.workers: list[Node] = []
        self.beats: list[Node] = []
        self.library: Path | None = None
        self.operators: Operators | None = None
        """Who disables and pauses, once the driver has said so."""
        self.exits = Exits(self.sink_path)

    @property
    def nodes(self) -> list[Node]:
        return [*self.workers, *self.beats]

    @property
    def sink_path(self) -> Path:
        return self.directory / "sink.jsonl"

    @contextmanager
    def running(self) -> Iterator["Deployment"]:
        """Everything up; at the end nothing of it is left."""
        try:
            for server in (self.postgres, self.broker, self.locks):
                server.start()
            self.database_url = self.postgres.create_database()
            database = Database(self.database_url)
            upgrade(database)
            database.dispose()
            if self.proxied:
                self.proxies = {
                    "postgres": Proxy(self.postgres.port),
                    "broker": Proxy(self.broker.port),
                    "locks": Proxy(self.locks.port),
                }
            self._make_nodes()
            self.client = self.make_client()
            yield self
        finally:
            self.close()

    def make_client(self) -> Dispatcher:
        """The application's dispatcher: past the proxies, and with no failpoints in it."""
        types = workload.draw(self.seed)
        config = workload.configuration(self.profile, types, workload.Surroundings())
        options = {"database_url": self.database_url, "redis_url": self.locks.url, "broker_url": self.broker.url}
        own = self.profile
        clock = (lambda: own.domain_at(time.monotonic())) if own.own_clock else None
        return Dispatcher(config, settings=Settings(**options, **SETTINGS), clock=clock)  # type: ignore[arg-type]

    def close(self) -> None:
        """End every process of this run, whichever was reached."""
        for node in self.nodes:
            node.signal_all(signal.SIGCONT)
            node.kill()
        if hasattr(self, "client"):
            self.client.close()
        for proxy in self.proxies.values():
            proxy.close()
        for server in (self.postgres, self.broker, self.locks):
            server.close()

    def discard(self) -> None:
        """Remove the run's directory: logs and sink."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def leftovers(self) -> list[int]:
        """The pids of processes of this run that still live."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mark = process.environ().get(MARK)
                if mark == str(self.directory) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def _make_nodes(self) -> None:
        # Callbacks that outlast their lease occupy threads, and the relay needs one, too.
        concurrency = 8 if self.profile.long_seconds else 2
        quick = [f"--concurrency={concurrency}", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        for number, pool in enumerate(self.profile.pools):
            name = f"worker{number}"
            arguments = ["worker", "-n", f"{name}@chaos", f"--pool={pool}", *quick, "--loglevel=WARNING"]
            self.workers.append(Node(name, arguments, self.env(with_failpoints=True), self.directory))
        for number in range(self.beat_count):
            name = f"beat{number}"
            arguments = ["beat", "--schedule", str(self.directory / name), "--loglevel=WARNING"]
            self.beats.append(Node(name, arguments, self.env(), self.directory))

    def env(self, *, with_failpoints: bool = False) -> dict[str, str]:
        """The environment of a node: nothing of the developer's but where programs are."""

        def port(server: str, direct: int) -> int:
            return self.proxies[server].port if server in self.proxies else direct

        name = self.database_url.rpartition("/")[2]
        settings = {
            "config": "tests.chaos.config:CONFIG",
            "database_url": f"postgresql+psycopg://postgres@127.0.0.1:{port('postgres', self.postgres.port)}/{name}",
            "redis_url": f"redis://127.0.0.1:{port('locks', self.locks.port)}/0",
            "broker_url": f"redis://127.0.0.1:{port('broker', self.broker.port)}/0",
            **SETTINGS,
            "chains_per_task": profile.GROUP if self.profile.grouped else 1,
            "deliveries_per_task": profile.GROUP if self.profile.grouped else 1,
            **({"clock": profile.CLOCK} if self.profile.own_clock else {}),
        }
        return {
            **{name: os.environ[name] for name in _KEPT if name in os.environ},
            "PYTHONPATH": str(ROOT),
            MARK: str(self.directory),
            DIRECTORY_VARIABLE: str(self.directory),
            SEED_VARIABLE: str(self.seed),
            profile.PROFILE_VARIABLE: self.profile.to_text(),
            **{f"DISPATCHER_{key.upper()}": str(value) for key, value in settings.items()},
            **(
                {FAILPOINTS_VARIABLE: ",".join(f"{point}={share}" for point, share in self.failpoints.items())}
                if with_failpoints
                else {}
            ),
        }

    # --- what faults and the driver do to it -------------------------------------------------------------------------

    def start_nodes(self) -> None:
        """Start all nodes and return when the workers consume."""
        for node in self.nodes:
            node.start()
        self.wait_until_ready()

    def revive(self) -> int:
        """Start again what has ended, as a supervisor does; how many."""
        dead = [node for node in self.nodes if not node.alive]
        for node in dead:
            self.exits.note(node.name, node.process)
            node.kill()  # its children
            node.start()
        return len(dead)

    def wait_until_ready(self) -> None:
        """Return when every worker has said that it consumes, since its last start."""

        reader = SinkReader(self.sink_path)
        said: dict[str, int] = {}

        def ready() -> bool:
            self.revive()
            said.update((line["node"], line["pid"]) for line in reader.new_lines() if line["phase"] == "ready")
            return all(node.process is not None and said.get(node.name) == node.process.pid for node in self.workers)

        wait_until(ready, seconds=START_SECONDS, what=f"the workers are ready\n{self.log_tails()}")

    def set_version(self, worker: int, version: str) -> None:
        """Deploy a version of the code to a worker that is not running."""
        self.workers[worker].env[VERSION_VARIABLE] = version

    def set_clock(self, node: Node, seconds: int) -> None:
        """Shift the wall clock of a worker or a beat that is not running."""
        if self.library is None:
            self.library = skew.build_library(self.directory)
        node.env.update(skew.environment(self.library, seconds))

    def suspend(self, node: Node, pids: Sequence[int], seconds: float, later: Later) -> None:
        """Stop processes of a node by SIGSTOP for so long."""
        process = node.process
        self.seen.stopped(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

        def resume() -> None:
            if node.process is process:
                for pid in pids:
                    if pid in node.pids():
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGCONT)
            self.seen.resumed(pids)

        later(seconds, resume)

    def stop_database(self, seconds: float, later: Later) -> None:
        """Stop PostgreSQL as `stop -m immediate` does, for so long."""
        if self.postgres.process is None:
            return
        self.seen.outage.begin()
        self.postgres.stop(signal.SIGQUIT)
        later(seconds, self.start_database)

    def start_database(self) -> None:
        """Start PostgreSQL if it does not run."""
        if self.postgres.process is None:
            self.postgres.start()
        self.seen.outage.end()

    def want_outage(self) -> None:
        """Let the next callback that returns ask for an outage of the database."""
        (self.directory / WANTED).touch()

    def log_tails(self, size: int = 1500) -> str:
        """The end of every node's log."""
        tails = []
        for node in self.nodes:
            text = node.log_path.read_text(errors="replace") if node.log_path.exists() else ""
            tails.append(f"--- {node.name} ({node.starts} starts)\n{text[-size:]}")
        return "\n".join(tails)
