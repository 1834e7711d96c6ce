"""Drives one run: workload and faults together, then calm, then the wait until all is quiet, then the oracle.

python -m tests.chaos.driver --faults kill_after_commit,redis_flushall --seed 7 --chains 2000
"""

import argparse
import heapq
import itertools
import json
import logging
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import redis
from sqlalchemy import func, select

from dispatcher import DispatcherError, Settings
from dispatcher.messages.queues import QUEUES
from dispatcher.storage.database import Database
from dispatcher.storage.models import Base, ChainRow, DeliveryRow, EventRow, ResourceRow
from tests.chaos import faults as fault_list
from tests.chaos import workload
from tests.chaos.deployment import SETTINGS, Deployment
from tests.chaos.failpoints import WANTED
from tests.chaos.history import ChainLine, DeliveryLine, EventLine, Healing, History, Rules
from tests.chaos.observed import errors_of_tasks
from tests.chaos.operators import AWAY, Operators
from tests.chaos.oracle import Report, judge
from tests.chaos.repeats import LAPSE
from tests.chaos.sink import SinkReader
from tests.chaos.truth import GuardTruth

_POLL_SECONDS: Final = 0.1
_LEASE: Final = Settings(**SETTINGS).lease_seconds  # type: ignore[arg-type]
_DUE_PROMISE: Final = (
    max(float(SETTINGS["lock_seconds"]), float(SETTINGS["queued_seconds"]))
    + float(SETTINGS["sweep_seconds"])
    + float(SETTINGS["relay_seconds"])
)
_DELIVERY_PROMISE: Final = _LEASE * (1 + LAPSE) + 2 * float(SETTINGS["relay_seconds"])
_MAX_BACKOFF: Final = 9.6
"""Seconds: the longest wait that this workload's policies and shortened intervals ask for."""

_QUIET_SECONDS: Final = 240
_LONGEST_STORM: Final = 8
_UNDER_WAY: Final = 200
"""Chains: no more are created while so many are on their way, so that a slow machine does not pile up a queue."""

_FEW: Final = 100
_FEW_SHARE: Final = 0.2
"""Chains: with so few left on their way, or this share of them, the faults stop."""

_LOOK_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Run:
    """What one run is."""

    faults: Sequence[str]
    seed: int
    chains: int = 2000
    fault_seconds: float = 30.0

    @property
    def command(self) -> str:
        """How to do it again."""
        return (
            f"python -m tests.chaos.driver --faults {','.join(self.faults)} --seed {self.seed} "
            f"--chains {self.chains} --fault-seconds {self.fault_seconds:g}"
        )


@dataclass
class Outcome:
    """What came of a run."""

    run: Run
    report: Report
    strikes: int = 0
    restarts: int = 0
    exits: Sequence[str] = ()
    """Workers that ended by themselves. A run with one has failed."""
    seconds: float = 0.0
    calm_to_quiet_seconds: float = 0.0
    profile: str = ""
    struck: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    """Tasks that ended with an error that the library does not name, by its class."""

    def to_json(self) -> dict[str, Any]:
        """The numbers of the run, for the report."""
        report = self.report
        return {
            "faults": list(self.run.faults),
            "seed": self.run.seed,
            "profile": self.profile,
            "chains": report.chains,
            "moves": report.moves,
            "callbacks": report.callbacks,
            "repeated": report.repeated,
            "lost": report.lost,
            "phantom": report.phantom,
            "doubled": report.doubled,
            "untimely": report.untimely,
            "guards_checked": report.guards_checked,
            "unknown": report.unknown,
            "mistaken": report.mistaken,
            "hours_checked": report.hours_checked,
            "rates_checked": report.rates_checked,
            "rates_skipped": report.rates_skipped,
            "violations": [asdict(violation) for violation in report.violations],
            "healing_seconds": round(report.healing_seconds, 2),
            "promised_seconds": round(report.promised_seconds, 2),
            "strikes": self.strikes,
            "restarts": self.restarts,
            "exits": len(self.exits),
            "struck": dict(self.struck),
            "errors": dict(self.errors),
            "seconds": round(self.seconds, 1),
            "calm_to_quiet_seconds": round(self.calm_to_quiet_seconds, 1),
        }


class Schedule:
    """Calls that are due at their time, made by whoever asks."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (time.monotonic() + seconds, next(self._numbers), call))

    def run_due(self) -> None:
        while self._calls and self._calls[0][0] <= time.monotonic():
            heapq.heappop(self._calls)[2]()

    def run_all(self) -> None:
        """Make every call that is there now, whenever it is due."""
        calls, self._calls = self._calls, []
        for _, _, call in sorted(calls):
            call()


class Application(threading.Thread):
    """An application beside the workers: creates chains, two of ten twice at once, and goes on when that fails."""

    def __init__(self, deployment: Deployment, numbers: Sequence[int], *, seconds: float) -> None:
        super().__init__(daemon=True, name="application")
        self._deployment = deployment
        self._numbers = numbers
        self._seconds = seconds
        self.created: Counter[Any] = Counter()
        self.stopped = threading.Event()
        self.may_create = threading.Event()

    def run(self) -> None:
        client = self._deployment.make_client()
        began = time.monotonic()
        for done, number in enumerate(self._numbers):
            chain_type = workload.type_of(self._deployment.seed, number)
            resources = workload.resources_of(number)
            while not self.stopped.is_set():
                if not self.may_create.wait(0.2):
                    continue
                try:
                    client.get_or_create_resource_chain(chain_type, resources)
                except AWAY:
                    self.stopped.wait(0.2)
                    continue
                self.created[chain_type, tuple(resources)] += 1
                break
            ahead = began + self._seconds * (done + 1) / len(self._numbers) - time.monotonic()
            if ahead > 0:
                self.stopped.wait(ahead)
        client.close()


def run_seconds(faults: Sequence[fault_list.Fault]) -> float:
    """How long these faults last at least."""
    return max(fault.lasts for fault in faults)


def perform(run: Run, *, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Do a run; its outcome. Leaves no process behind, whatever happens."""
    faults, options = fault_list.merged(list(run.faults))
    began = time.monotonic()
    drawn = fault_list.drawn_profile(
        run.faults, run.seed, chains=run.chains, fault_seconds=max(run.fault_seconds, run_seconds(faults))
    )
    deployment = Deployment(drawn, **options)
    rng = random.Random(f"driver:{run.seed}")
    try:
        with deployment.running():
            for fault in faults:
                fault.prepare(deployment)
            outcome = _Driver(run, deployment, faults, rng, say).drive()
        left = deployment.leftovers()
        assert not left, f"processes left: {left}"
    except BaseException:
        say(f"failed: {run.command}\nlogs and sink: {deployment.directory}")
        raise
    outcome.seconds = time.monotonic() - began
    outcome.profile = (
        f"{'+'.join(drawn.pools)}, {'grouped' if drawn.grouped else 'single'}, "
        f"{'own' if drawn.own_clock else 'database'} clock, hours {drawn.hours}, {drawn.rate}/s"
    )
    outcome.exits = deployment.exits.found
    if outcome.report.violations or outcome.exits:
        say(f"violations: {run.command}\nlogs and sink: {deployment.directory}")
    else:
        deployment.discard()
    return outcome


class _Driver:
    def __init__(
        self,
        run: Run,
        deployment: Deployment,
        faults: Sequence[fault_list.Fault],
        rng: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self.run = run
        self.deployment = deployment
        self.faults = faults
        self.rng = rng
        self.say = say
        self.schedule = Schedule()
        self.database: Database = deployment.client.database
        self.reader = SinkReader(deployment.sink_path)
        self.sink: list[dict[str, Any]] = []
        self.profile = deployment.profile
        self.graph = workload.graph_of(workload.draw(run.seed))
        self.asked_states = _asked_states(run.seed)
        self.asked: set[tuple[int, int]] = set()
        self.look_at = 0.0
        self.operators = deployment.operators = Operators(
            deployment.client, range(run.chains), self.schedule.later, lambda: deployment.postgres.process is not None
        )
        self.strikes = self.restarts = 0
        numbers = list(range(run.chains))
        twice = [number for number in numbers if number % 5 == 0]
        self.applications = [
            Application(deployment, numbers, seconds=run.fault_seconds * 0.7),
            Application(deployment, twice, seconds=run.fault_seconds * 0.7),
        ]

    def drive(self) -> Outcome:
        self.deployment.start_nodes()
        self.deployment.wait_until_ready()
        self.deployment.flag.touch()
        for application in self.applications:
            application.start()
        self._storm()
        self._calm()
        calm_at = time.monotonic()
        healings = self._heal(calm_at)
        quiet = self._wait_until_quiet()
        quiet_seconds = time.monotonic() - calm_at
        if not quiet:
            self.say(f"not quiet after {quiet_seconds:.0f} s")
        dumps = self._dry_run() if quiet else None
        history = self._history(healings, dumps)
        outcome = Outcome(self.run, judge(history), self.strikes, self.restarts)
        self._show(outcome.report)
        outcome.struck = Counter(line["point"] for line in self.sink if line["phase"] == "struck")
        outcome.errors = errors_of_tasks(node.log_path for node in self.deployment.nodes)
        outcome.calm_to_quiet_seconds = quiet_seconds
        return outcome

    # --- while the faults last ---------------------------------------------------------------------------------------

    def _storm(self) -> None:
        """All faults, until most of the work is done under them; not for ever, because some let little through."""
        began = time.monotonic()
        least = began + max(self.run.fault_seconds, run_seconds(self.faults))
        end = max(least, began + self.run.fault_seconds * _LONGEST_STORM)
        few = min(_FEW, round(self.run.chains * _FEW_SHARE))
        for fault in self.faults:
            self._strike_later(fault)
        self._every(1.0, self._ask_on, until=end)
        self._every(2.0, self._disable_some, until=began + self.run.fault_seconds)
        self._every(6.0, lambda: self.operators.pause_one(self.rng, self.rng.uniform(3, 6)), until=least)
        look_at = began
        while time.monotonic() < end:
            self._attend()
            self.restarts += self.deployment.revive()
            time.sleep(_POLL_SECONDS)
            if time.monotonic() < look_at:
                continue
            look_at = time.monotonic() + 0.5
            with suppress(*AWAY):
                unfinished = self._unfinished()
                for application in self.applications:
                    (application.may_create.set if unfinished < _UNDER_WAY else application.may_create.clear)()
                created = not any(application.is_alive() for application in self.applications)
                if created and unfinished <= few and time.monotonic() >= least:
                    return

    def _attend(self) -> list[dict[str, Any]]:
        """Make the calls that are due, and note what the processes say and whether they live; new lines of the sink."""
        self.schedule.run_due()
        fresh = self._read_sink()
        if fresh or time.monotonic() >= self.look_at:
            self.deployment.seen.look_for(fresh)
            self.look_at = time.monotonic() + _LOOK_SECONDS
        asked = any(line["phase"] == "struck" and line["point"] == "database_away" for line in fresh)
        if asked and self.deployment.flag.exists():
            for fault in self.faults:
                if fault.asked is not None:
                    fault.asked(self.deployment, self.schedule.later)
        return fresh

    def _unfinished(self) -> int:
        """How many chains and deliveries are on their way."""
        if self.deployment.postgres.process is None:
            raise OSError("the database is down")
        with self.database.read() as connection:
            rows = connection.execute(
                select(ChainRow.chain_type, ChainRow.state, DeliveryRow.status)
                .outerjoin(DeliveryRow, DeliveryRow.id == ChainRow.pending_delivery_id)
                .where(~ChainRow.disabled)
            ).all()
            running = connection.execute(select(func.count()).where(DeliveryRow.status == "running")).scalar_one()
        on_their_way = sum(
            status in ("pending", "running") or (status is None and (chain_type, state) not in self.graph.terminal)
            for chain_type, state, status in rows
        )
        return max(on_their_way, running)

    def _strike_later(self, fault: fault_list.Fault) -> None:
        strike = fault.strike
        if strike is None:
            return

        def call() -> None:
            if self.deployment.flag.exists():
                self.strikes += 1
                strike(self.deployment, self.rng, self.schedule.later)
                self._strike_later(fault)

        self.schedule.later(self.rng.uniform(*fault.every), call)

    def _every(self, seconds: float, call: Callable[[], None], *, until: float) -> None:
        def again() -> None:
            with suppress(*AWAY):
                call()
            if time.monotonic() < until and self.deployment.flag.exists():
                self.schedule.later(seconds, again)

        self.schedule.later(seconds, again)

    def _ask_on(self) -> None:
        """Enqueue the chains that are where only a request helps, once per version."""
        if self.deployment.postgres.process is None or self.deployment.broker.process is None:
            return
        with self.database.read() as connection:
            rows = connection.execute(
                select(ChainRow.id, ChainRow.version, ChainRow.chain_type, ChainRow.state).where(
                    ChainRow.pending_delivery_id.is_(None), ~ChainRow.disabled
                )
            ).all()
        for chain_id, version, chain_type, state in rows:
            if (chain_type, state) in self.asked_states and (chain_id, version) not in self.asked:
                chain = self.deployment.client.chain(chain_id)
                try:
                    chain.enqueue(initial_context={workload.GO: True}, requested_by="driver")
                except DispatcherError as error:
                    if not getattr(error, "written", False):
                        raise
                self.asked.add((chain_id, version))

    def _disable_some(self) -> None:
        """Disable some chains, two of three for a while."""
        for _ in range(max(1, self.run.chains // 400)):
            self.operators.disable_one(self.rng, self.rng.uniform(3, 15) if self.rng.random() < 0.67 else None)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """End all faults; return when every server and worker is up."""
        self.deployment.flag.unlink()
        (self.deployment.directory / WANTED).unlink(missing_ok=True)
        for fault in self.faults:
            fault.calm(self.deployment)
        self.deployment.start_database()
        for server in (self.deployment.broker, self.deployment.locks):
            if server.process is None:
                server.start()
        for application in self.applications:
            application.may_create.set()
            application.join(30 + self.run.fault_seconds)
            application.stopped.set()
            application.join(10)
        self.schedule.run_all()
        for node in self.deployment.workers:
            node.signal_all(signal.SIGCONT)
        self.restarts += self.deployment.revive()
        self.deployment.wait_until_ready()

    def _heal(self, calm_at: float) -> list[Healing]:
        """How long what was due or open at the end of the faults takes to go on."""
        self._read_sink()
        with self.database.read() as connection:
            now, machine_now = self.database.now(connection), self.database.machine_now(connection)
            due = {
                row.id: row.version
                for row in connection.execute(
                    select(ChainRow.id, ChainRow.version).where(
                        ChainRow.due_at <= now, ChainRow.pending_delivery_id.is_(None), ~ChainRow.disabled
                    )
                )
            }
            open_rows = connection.execute(
                select(DeliveryRow.chain_id, *_PROGRESS)
                .join(ChainRow, ChainRow.id == DeliveryRow.chain_id)
                .where(DeliveryRow.status.in_(["pending", "running"]), ~ChainRow.disabled)
            ).all()
        owed = {row.id: _progress_of(row) for row in open_rows}
        # A delivery that waits for hours, for its place in a limit's line or for a backoff is due at the end of that.
        waits = {
            row.id: max(0.0, (row.next_attempt_at - machine_now).total_seconds())
            for row in open_rows
            if row.next_attempt_at is not None
        }
        waiting = len(due) + len(owed) + self._queued()
        lines_before = len(self.sink)
        due_left, owed_left = set(due), set(owed)
        seconds: dict[object, float] = {}
        limit = calm_at + _DELIVERY_PROMISE + _MAX_BACKOFF + 60 + max(waits.values(), default=0.0)
        while (due_left or owed_left) and time.monotonic() < limit:
            time.sleep(_POLL_SECONDS)
            passed = time.monotonic() - calm_at
            for line in self._attend():
                if line["phase"] == "evaluated" and line["chain"] in due_left:
                    due_left.discard(line["chain"])
                    seconds["due", line["chain"]] = max(0.0, line["mono"] - calm_at)
            with self.database.read() as connection:
                rows = connection.execute(
                    select(ChainRow.id, ChainRow.version, ChainRow.disabled).where(ChainRow.id.in_(due_left))
                ).all()
                for chain_id, version, disabled in rows:
                    if version != due[chain_id] or disabled:
                        due_left.discard(chain_id)
                        seconds["due", chain_id] = passed
                states = connection.execute(select(*_PROGRESS).where(DeliveryRow.id.in_(owed_left))).all()
                for row in states:
                    if _progress_of(row) != owed[row.id]:
                        owed_left.discard(row.id)
                        seconds["owed", row.id] = passed
        self._read_sink()
        passed = time.monotonic() - calm_at
        done = sum(line["phase"] in ("evaluated", "begun") for line in self.sink[lines_before:])
        # What waited before it: the promise is about healing, not about how many tasks two cores do in a second.
        drain = waiting / max(done / max(passed, 1.0), 20.0)
        found = [
            Healing("a due chain", chain_id, seconds.get(("due", chain_id)), _DUE_PROMISE + drain) for chain_id in due
        ]
        found += [
            Healing(
                f"{row.status} delivery {row.id}",
                row.chain_id,
                seconds.get(("owed", row.id)),
                _DELIVERY_PROMISE + _MAX_BACKOFF + drain + waits.get(row.id, 0.0),
            )
            for row in open_rows
        ]
        self.say(f"calm: {len(due)} due, {len(owed)} owed, {waiting} waiting, allowing {drain:.1f} s to drain")
        return found

    def _queued(self) -> int:
        with redis.Redis(port=self.deployment.broker.port, socket_timeout=10) as client:
            return sum(int(client.llen(queue)) for queue in QUEUES)

    def _wait_until_quiet(self) -> bool:
        """Whether every chain came to its end, or waits for a person."""
        deadline = time.monotonic() + _QUIET_SECONDS
        next_ask = 0.0
        while time.monotonic() < deadline:
            self._attend()
            self.deployment.revive()
            if time.monotonic() >= next_ask:
                self._ask_on()
                next_ask = time.monotonic() + 1
            if not self._unfinished():
                return True
            time.sleep(_POLL_SECONDS * 5)
        return False

    def _dry_run(self) -> tuple[object, object]:
        """All rows and keys before and after dry runs of some chains, with nothing else going on."""
        for node in self.deployment.nodes:
            node.kill()
        before = self._dump()
        client = self.deployment.client
        client.sweep(dry_run=True)
        with self.database.read() as connection:
            ids = list(connection.execute(select(ChainRow.id).order_by(ChainRow.id).limit(50)).scalars())
        for chain_id in ids:
            with suppress(ValueError):  # a guard of the workload that raises
                client.chain(chain_id).execute(dry_run=True)
        return before, self._dump()

    def _dump(self) -> dict[str, Any]:
        dump: dict[str, Any] = {}
        with self.database.read() as connection:
            for table in Base.metadata.sorted_tables:
                rows = connection.execute(select(table).order_by(*table.primary_key.columns)).all()
                dump[table.name] = [tuple(map(repr, row)) for row in rows]
        for name, server in (("broker", self.deployment.broker), ("locks", self.deployment.locks)):
            with redis.Redis(port=server.port, socket_timeout=10) as client:
                # Markers and crash counters end by themselves; what a dry run must not do is add one.
                dump[name] = {key: client.dump(key) for key in client.scan_iter() if client.ttl(key) < 0}
        return dump

    def _show(self, report: Report) -> None:
        """Keep the rows of the first chains with a violation beside the logs."""
        chain_ids = list(dict.fromkeys(one.chain_id for one in report.violations if one.chain_id is not None))[:10]
        if not chain_ids:
            return
        path = self.deployment.directory / "violations.txt"
        with self.database.read() as connection, path.open("w") as file:
            for chain_id in chain_ids:
                for column in (ChainRow.id, DeliveryRow.chain_id, EventRow.chain_id):
                    for row in connection.execute(select(column.class_.__table__).where(column == chain_id)):
                        file.write(f"{column.class_.__name__} {dict(row._mapping)}\n")
                file.writelines(f"{violation}\n" for violation in report.violations if violation.chain_id == chain_id)

    def _read_sink(self) -> list[dict[str, Any]]:
        fresh = list(self.reader.new_lines())
        self.sink += fresh
        return fresh

    def _history(self, healings: Sequence[Healing], dumps: tuple[object, object] | None) -> History:
        self._read_sink()
        expected: Counter[Any] = Counter()
        for application in self.applications:
            expected.update(application.created)
        with self.database.read() as connection:
            resources: dict[int, list[tuple[str, str]]] = {}
            for chain_id, kind, identity in connection.execute(
                select(ResourceRow.chain_id, ResourceRow.resource_type, ResourceRow.resource_id)
            ):
                resources.setdefault(chain_id, []).append((kind, identity))
            chains = [
                ChainLine(
                    row.id, row.chain_type, tuple(sorted(resources.get(row.id, ()))), row.state, row.version,
                    row.moves, row.disabled, row.pending_delivery_id, row.created_at,
                )
                for row in connection.execute(select(ChainRow.__table__))
            ]  # fmt: skip
            events = [
                EventLine(
                    row.id, row.chain_id, row.chain_version, row.action, row.from_state, row.to_state,
                    row.detail, self.profile.mono_at(row.created_at),
                )
                for row in connection.execute(select(EventRow.__table__))
            ]  # fmt: skip
            deliveries = [
                DeliveryLine(
                    row.id, row.idempotency_key, row.chain_id, row.chain_version, row.transition,
                    row.from_state, row.final_state, row.status, row.attempt,
                )
                for row in connection.execute(select(DeliveryRow.__table__))
            ]  # fmt: skip
        return History(
            self.graph, expected, chains, events, deliveries, self.sink, _LEASE, healings=healings, dumps=dumps,
            acts=self.operators.acts, rules=self._rules(), processes=self.deployment.seen.processes(),
        )  # fmt: skip

    def _rules(self) -> Rules:
        types = workload.draw(self.run.seed)
        versions = any(fault.name == "two_versions" for fault in self.faults)
        return Rules(
            truth=GuardTruth(self.profile, types, ordered=not versions),
            hours=workload.hours_of(self.profile),
            domain_at=self.profile.domain_at,
            mono_at_machine=self.profile.mono_at_machine,
            limits=workload.limits_of(self.profile),
            rates_lost=", ".join(sorted(self.deployment.seen.rates_lost)),
            late_seconds=max(fault.late_seconds for fault in self.faults),
        )


_PROGRESS: Final = (
    DeliveryRow.id,
    DeliveryRow.attempt,
    DeliveryRow.begins,
    DeliveryRow.status,
    DeliveryRow.waits_for,
    DeliveryRow.next_attempt_at,
)


def _progress_of(row: Any) -> tuple[Any, ...]:
    """What changes in a delivery's row whenever somebody has looked at it."""
    return row.attempt, row.begins, row.status, row.waits_for, row.next_attempt_at


def _asked_states(seed: int) -> frozenset[tuple[str, str]]:
    """The states that nothing but a request leads out of for good."""
    return frozenset(
        (drawn.name, state)
        for drawn in workload.draw(seed)
        for state, candidates in drawn.states.items()
        if candidates
        and all(candidate.back or candidate.kind in ("asked", "never", "paid") for candidate in candidates)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one run from the command line; 1 if the oracle found something."""
    parser = argparse.ArgumentParser(description="One run of the chaos suite.")
    parser.add_argument("--faults", default="none", help="comma-separated: " + ", ".join(fault_list.FAULTS))
    parser.add_argument("--combination", action="store_true", help="the combination of faults that the seed draws")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chains", type=int, default=2000)
    parser.add_argument("--fault-seconds", type=float, default=30)
    parser.add_argument("--results", type=Path, help="a file that a line of JSON is appended to")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # of the client, which notices the faults as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is ended and removed
    names = fault_list.combination(options.seed) if options.combination else options.faults.split(",")
    run = Run(names, options.seed, options.chains, options.fault_seconds)
    outcome = perform(run, say=lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    result = outcome.to_json()
    shown = {**result, "violations": f"{len(result['violations'])}"}
    print(json.dumps(shown))  # noqa: T201
    for violation in outcome.report.violations[:20]:
        print(violation)  # noqa: T201
    if options.results is not None:
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    for ended in outcome.exits:
        print(ended)  # noqa: T201
    return 1 if outcome.report.violations or outcome.exits else 0


if __name__ == "__main__":
    raise SystemExit(main())
