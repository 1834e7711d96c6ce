"""The lanes: each measures one thing and gives one number per round, with its costs."""

import json
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from statistics import median
from typing import Any, Final

import redis

from benchmarks import chains, raw
from benchmarks.fleet import Fleet, StalledError
from benchmarks.population import RESOURCE_TYPE, add_chains, anything_in, bytes_per_chain, count_in
from benchmarks.servers import ROOT, Servers, cpu_seconds
from dispatcher import NEW, Dispatcher, Settings
from dispatcher.messages.queues import CHAINS_QUEUE
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade

_WAIT_SECONDS: Final = 180
_WARM_UP: Final = 400
_DBOS_PROCESSES: Final = 2
_DBOS_THREADS: Final = 8  # the fastest of 1, 2, 4, 8 and 16 on two cores


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of a lane in one round: the number to compare, and other facts."""

    value: float
    facts: dict[str, float] = field(default_factory=dict)


class Lane(ABC):
    """One thing to measure. In each round it runs alone."""

    name: str
    unit = "/s"

    def __init__(self, servers: Servers, count: int) -> None:
        self.servers = servers
        self.count = count
        self._stack = ExitStack()

    @abstractmethod
    def open(self) -> None:
        """Start what is measured, and warm it up."""

    @abstractmethod
    def measure(self) -> Sample:
        """Measure one round."""

    def close(self) -> None:
        """Stop everything that `open` started."""
        self._stack.close()

    def note(self) -> str:
        """Text to print below the table; empty for most lanes."""
        return ""

    @contextmanager
    def timed(self, facts: dict[str, float], worker: Callable[[], float] | None, count: int) -> Iterator[None]:
        """Put the seconds of the block into `facts`, and the CPU milliseconds per item of each party."""

        def used() -> dict[str, float]:
            parties = self.servers.cpu_seconds()
            return parties if worker is None else {**parties, "worker": worker()}

        before, began = used(), time.monotonic()
        yield
        facts["seconds"] = time.monotonic() - began
        after = used()
        facts.update({f"{name}_cpu_ms": (after[name] - before[name]) / count * 1e3 for name in before})


# --- throughput ------------------------------------------------------------------------------------------------------


class RawLane(Lane):
    """Raw Celery: messages of a task, which all arrive at once."""

    task: str

    def open(self) -> None:
        self._url = self.servers.redis_url()
        self._fleet = self._stack.enter_context(Fleet("benchmarks.raw", {raw.BROKER_VARIABLE: self._url}))
        self._app = raw.make_app(self.servers.staging_url)
        self._stack.callback(self._app.close)
        self._run(_WARM_UP, {})

    def measure(self) -> Sample:
        facts: dict[str, float] = {}
        self._run(self.count, facts)
        return Sample(self.count / facts["seconds"], facts)

    def _run(self, count: int, facts: dict[str, float]) -> None:
        with self._app.producer_pool.acquire(block=True) as producer, producer.batch():
            for number in range(count):
                self._app.send_task(self.task, kwargs={"chain_id": number}, queue=raw.QUEUE, producer=producer)
        target = self._fleet.progress.total() + count
        with self.timed(facts, self._fleet.cpu_seconds, count):
            self.servers.release(raw.QUEUE, self._url)
            self._fleet.wait_for_ticks(target, seconds=_WAIT_SECONDS)


class RawNothing(RawLane):
    name = "raw Celery, one hop"
    task = "raw.nothing"


class RawTwoHops(RawLane):
    name = "raw Celery, two hops"
    task = "raw.first_hop"


class ChainLane(Lane):
    """A fleet of this project's workers, and the chains of one type in a separate database."""

    type_name: str
    chains_per_task = 1
    deliveries_per_task = 1

    def open(self) -> None:
        self.redis_url = self.servers.redis_url()
        settings: dict[str, Any] = {
            "database_url": self.servers.database_url(),
            "chains_per_task": self.chains_per_task,
            "deliveries_per_task": self.deliveries_per_task,
        }
        environment = {f"DISPATCHER_{name.upper()}": value for name, value in settings.items()}
        environment |= {"DISPATCHER_CONFIG": "benchmarks.chains:CONFIG", "DISPATCHER_REDIS_URL": self.redis_url}
        self.fleet = self._stack.enter_context(Fleet("workers", environment))
        options = Settings(**settings, redis_url=self.servers.staging_url)
        self.dispatcher = self._stack.enter_context(Dispatcher(chains.config(self.type_name), settings=options))
        self.database = self.dispatcher.database
        self.warm_up()

    def warm_up(self) -> None:
        """Let every process of the fleet do some of the work that will be measured."""
        self.run(max(min(_WARM_UP, self.count), 4 * self.chains_per_task), {})

    def measure(self) -> Sample:
        facts: dict[str, float] = {}
        self.run(self.count, facts)
        return Sample(self.count / facts["seconds"], facts)

    def run(self, count: int, facts: dict[str, float]) -> None:
        """Let the fleet execute `count` chains. They are swept before, and their messages are released all at once."""
        self.prepare(count)
        swept = self.dispatcher.sweep()
        assert swept["enqueued"] == count, swept
        target = self.fleet.progress.total() + count
        with self.timed(facts, self.fleet.cpu_seconds, count), self._counted_commands(facts, count):
            self.servers.release(CHAINS_QUEUE, self.redis_url)
            self.fleet.wait_for_ticks(target, seconds=_WAIT_SECONDS)
            self.wait_until_written()
        if self.fleet.progress.total() != target:
            raise StalledError(f"{self.fleet.progress.total() - target + count} calls for {count} chains")

    @abstractmethod
    def prepare(self, count: int) -> None:
        """Make exactly `count` chains due."""

    def wait_until_written(self) -> None:
        """Wait until the work that was counted is committed."""

    @contextmanager
    def _counted_commands(self, facts: dict[str, float], count: int) -> Iterator[None]:
        with redis.Redis(port=self.servers.redis.port) as client:

            def calls() -> int:
                return int(client.info("stats")["total_commands_processed"])

            before = calls()
            yield
            facts["redis_commands"] = (calls() - before) / count


class Evaluations(ChainLane):
    """Chains that stay in their state, because every guard rejects."""

    type_name = "still"
    _due = 0

    def prepare(self, count: int) -> None:
        if self._due == 0:  # these evaluations write nothing, so the same chains are due in every round
            self._due = count
            add_chains(self.database, self.type_name, count, due_at=_long_ago())
        elif self._due < count:
            add_chains(self.database, self.type_name, count - self._due, due_at=_long_ago())
            self._due = count


class Evaluations1(Evaluations):
    name = "no move, 1 chain per task"


class Evaluations200(Evaluations):
    name = "no move, 200 chains per task"
    chains_per_task = 200


class Moves(ChainLane):
    """Chains that move with a callback. The round ends when the last move is committed."""

    type_name = "step"

    def prepare(self, count: int) -> None:
        add_chains(self.database, self.type_name, count, due_at=_long_ago())

    def wait_until_written(self) -> None:
        self.fleet.wait_for(
            lambda: not anything_in(self.database, self.type_name, NEW), seconds=_WAIT_SECONDS, what="moves committed"
        )

    def measure(self) -> Sample:
        before = count_in(self.database, self.type_name, chains.MOVED)
        sample = super().measure()
        assert count_in(self.database, self.type_name, chains.MOVED) == before + self.count
        return sample


class Moves1(Moves):
    name = "move + callback, 1 chain per task"


class Moves200(Moves):
    name = "move + callback, 200 chains, 1 delivery per task"
    chains_per_task = 200


class Moves200By50(Moves):
    name = "move + callback, 200 chains, 50 deliveries per task"
    chains_per_task = 200
    deliveries_per_task = 50

    def note(self) -> str:
        sizes = bytes_per_chain(self.database)
        lines = [f"  {table}: {rows:.0f} + {indexes:.0f}" for table, (rows, indexes) in sizes.items()]
        return "\n".join(["PostgreSQL bytes per chain that moved once, rows + indexes:", *lines])


class Dbos(Lane):
    """DBOS: workflows of one step, in two processes with threads, on the same PostgreSQL."""

    name = "DBOS, one workflow with one step"

    def open(self) -> None:
        url = self.servers.postgres.create_database()
        self._processes = [self._start(url, number) for number in range(_DBOS_PROCESSES)]

    def measure(self) -> Sample:
        share = self.count // len(self._processes)
        facts: dict[str, float] = {}
        with self.timed(facts, self._cpu_seconds, share * len(self._processes)):
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(f"{share}\n")
                process.stdin.flush()
            for process in self._processes:
                _answer_of(process)
        return Sample(share * len(self._processes) / facts["seconds"], facts)

    def _start(self, url: str, number: int) -> "subprocess.Popen[str]":
        options = ["--url", url, "--name", f"peer{number}", "--threads", str(_DBOS_THREADS)]
        process = _python_process("benchmarks.dbos_peer", *options)
        self._stack.callback(_end, process)
        if _answer_of(process) != "ready":
            raise StalledError("DBOS did not start; is the extra `bench` installed?")
        return process

    def _cpu_seconds(self) -> float:
        return sum(cpu_seconds(process.pid) for process in self._processes)


# --- sweeping --------------------------------------------------------------------------------------------------------


class Sweep(Lane):
    """One sweep over many chains, of which a thousand are due."""

    unit = " s"
    chains: int

    def open(self) -> None:
        self._redis_url = self.servers.redis_url()
        settings = Settings(database_url=self.servers.database_url(), redis_url=self._redis_url)
        self._dispatcher = self._stack.enter_context(Dispatcher(chains.config("still"), settings=settings))
        rest = max(self.chains * self.count // 1000 - self.count, 0)
        later = datetime.now(UTC) + timedelta(days=30)
        add_chains(self._dispatcher.database, "still", rest, due_at=later, with_resources=False)
        add_chains(self._dispatcher.database, "still", self.count, due_at=_long_ago(), with_resources=False)
        self.measure()

    def measure(self) -> Sample:
        with redis.Redis.from_url(self._redis_url) as client:
            client.flushdb()
        facts: dict[str, float] = {}
        with self.timed(facts, None, self.count):
            result = self._dispatcher.sweep()
        assert result["enqueued"] == self.count, result
        return Sample(facts["seconds"], facts)


class SweepOfMany(Sweep):
    name = "sweep of 1,000,000 chains, 1,000 due"
    chains = 1_000_000


class SweepOfFew(Sweep):
    name = "sweep of 10,000 chains, 1,000 due"
    chains = 10_000


class FanOutLane(Lane):
    """Messages published by a separate process, whose memory is measured."""

    what: str

    def open(self) -> None:
        self._redis_url = self.servers.redis_url()
        self._database_url = self.servers.database_url()
        database = Database(self._database_url)
        add_chains(database, "still", self.count, due_at=_long_ago(), with_resources=False)
        database.dispose()

    def measure(self) -> Sample:
        with redis.Redis.from_url(self._redis_url) as client:
            client.flushdb()
        options = ["--what", self.what, "--database-url", self._database_url, "--redis-url", self._redis_url]
        process = _python_process("benchmarks.fan_out", *options, "--count", str(self.count))
        try:
            facts: dict[str, float] = json.loads(_answer_of(process))
        finally:
            _end(process)
        with redis.Redis.from_url(self._redis_url) as client:
            assert client.llen(CHAINS_QUEUE) == self.count
            client.flushdb()
        return Sample(self.count / facts["seconds"], facts)


class FanOut(FanOutLane):
    name = "fan-out of 100,000 due chains"
    what = "sweep"


class ApplyAsyncLoop(FanOutLane):
    name = "loop of apply_async"
    what = "loop"


# --- latency ---------------------------------------------------------------------------------------------------------


class OnDemand(ChainLane):
    """The time from `chain.enqueue()` until the callback returns, one chain at a time on an idle fleet."""

    name = "enqueue to returned callback"
    unit = " ms"
    type_name = "on_demand"

    def warm_up(self) -> None:
        settings = Settings(database_url=self.database.url.render_as_string(), redis_url=self.redis_url)
        self._client = self._stack.enter_context(Dispatcher(chains.CONFIG, settings=settings))
        self._sample(20)

    def prepare(self, count: int) -> None:
        add_chains(self.database, self.type_name, count, due_at=None)

    def measure(self) -> Sample:
        return self._sample(self.count)

    def _sample(self, count: int) -> Sample:
        ids = add_chains(self.database, self.type_name, count, due_at=None)
        waited = []
        for chain_id in ids:
            chain = self._client.chain(chain_id)
            began = time.monotonic()
            chain.enqueue(callback="answer")
            waited.append((self.fleet.progress.wait_for_answer() - began) * 1e3)
            self.fleet.wait_for(partial(_moved, chain), seconds=_WAIT_SECONDS, what="the move")
        return Sample(median(waited), {"slowest": max(waited)})


class RawOnDemand(RawLane):
    """The same for a raw task that sends a second task."""

    name = "raw Celery, two hops, one at a time"
    unit = " ms"
    task = "raw.first_hop_of_answer"

    def open(self) -> None:
        self._url = self.servers.redis_url()
        self._fleet = self._stack.enter_context(Fleet("benchmarks.raw", {raw.BROKER_VARIABLE: self._url}))
        self._app = raw.make_app(self._url)
        self._stack.callback(self._app.close)
        self._sample(20)

    def measure(self) -> Sample:
        return self._sample(self.count)

    def _sample(self, count: int) -> Sample:
        waited = []
        for number in range(count):
            began = time.monotonic()
            self._app.send_task(self.task, kwargs={"chain_id": number}, queue=raw.QUEUE)
            waited.append((self._fleet.progress.wait_for_answer() - began) * 1e3)
        return Sample(median(waited), {"slowest": max(waited)})


# --- creation --------------------------------------------------------------------------------------------------------


class Creation(Lane):
    """Chains created through the public API."""

    def open(self) -> None:
        settings = Settings(database_url=self.servers.database_url(), redis_url=self.servers.redis_url())
        self._dispatcher = self._stack.enter_context(Dispatcher(chains.config("still"), settings=settings))
        self._made = 0
        self.create([self._mapping() for _ in range(100)])

    def measure(self) -> Sample:
        wanted = [self._mapping() for _ in range(self.count)]
        facts: dict[str, float] = {}
        with self.timed(facts, None, self.count):
            self.create(wanted)
        return Sample(self.count / facts["seconds"], facts)

    @abstractmethod
    def create(self, wanted: list[list[tuple[str, str]]]) -> None:
        """Create a chain for each of these sets of resources."""

    def _mapping(self) -> list[tuple[str, str]]:
        self._made += 1
        return [(RESOURCE_TYPE, str(self._made))]


class BulkCreation(Creation):
    name = "bulk_get_or_create"

    def create(self, wanted: list[list[tuple[str, str]]]) -> None:
        count = sum(1 for _, created in self._dispatcher.bulk_get_or_create("still", wanted) if created)
        assert count == len(wanted)


class CreationLoop(Creation):
    name = "loop of get_or_create_resource_chain"

    def create(self, wanted: list[list[tuple[str, str]]]) -> None:
        for mapping in wanted:
            self._dispatcher.get_or_create_resource_chain("still", mapping)


# --- in this process -------------------------------------------------------------------------------------------------


class InProcess(Lane):
    """Calls of `chain.execute()` without a callback, one after the other, without Redis."""

    profiled: str = ""

    @abstractmethod
    def database_url(self) -> str:
        """The URL of a migrated database."""

    def open(self) -> None:
        settings = Settings(database_url=self.database_url())
        self._dispatcher = self._stack.enter_context(Dispatcher(chains.config("silent"), settings=settings))
        self._made = 0
        self._execute(self._make(50))

    def measure(self) -> Sample:
        created = self._make(self.count)
        facts: dict[str, float] = {}
        with self.timed(facts, None, self.count):
            self._execute(created)
        if not self.profiled:
            self.profiled = self._profile(self._make(self.count))
        return Sample(self.count / facts["seconds"], facts)

    def note(self) -> str:
        return f"{self.name}: where the time goes\n{self.profiled}" if self.profiled else ""

    def _make(self, count: int) -> list[Any]:
        created = []
        for _ in range(count):
            self._made += 1
            mapping = [(RESOURCE_TYPE, str(self._made))]
            created.append(self._dispatcher.get_or_create_resource_chain("silent", mapping))
        return created

    def _execute(self, created: list[Any]) -> None:
        for chain in created:
            assert chain.execute()["outcome"] == "moved"

    def _profile(self, created: list[Any]) -> str:
        from benchmarks.profile import shares_of_packages  # noqa: PLC0415 - pyinstrument is part of the extra `bench`

        return shares_of_packages(lambda: self._execute(created))


class InProcessSqlite(InProcess):
    name = "chain.execute() on SQLite"

    def database_url(self) -> str:
        url = f"sqlite:///{self.servers.directory / 'rows.sqlite'}"
        database = Database(url)
        upgrade(database)
        database.dispose()
        return url


class InProcessPostgres(InProcess):
    name = "chain.execute() on PostgreSQL"

    def database_url(self) -> str:
        return self.servers.database_url()


# --- shared ----------------------------------------------------------------------------------------------------------


def _long_ago() -> datetime:
    return datetime.now(UTC) - timedelta(hours=1)


def _moved(chain: Any) -> bool:
    return bool(chain.refresh().state == chains.MOVED)


def _python_process(module: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )


def _answer_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _end(process: "subprocess.Popen[str]") -> None:
    """Close the standard input of the process, which ends it; kill it if it does not end in 20 s."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)
    process.stdout.close()
