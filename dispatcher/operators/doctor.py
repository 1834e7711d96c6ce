"""`Doctor`: compares rows, locks, queues and leases of a deployment, and names each problem and its remedy."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from shlex import quote
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.errors import DispatcherError, ServiceRefused
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import DELIVER, EXECUTE, PRUNE, PRUNE_SECONDS, QUEUES, RELAY, SWEEP, SWEEPS_QUEUE
from dispatcher.operators.operations import Operations
from dispatcher.settings import Settings
from dispatcher.storage import chain_types, chains, deliveries, moments, overdue, overview, ticks
from dispatcher.storage.database import Database
from dispatcher.storage.migrations import revisions
from dispatcher.telemetry import Action, emit
from dispatcher.transition import TypeDefault

logger = logging.getLogger(__name__)

_CLOCK_SECONDS: Final = 5.0
_MISSED_TICKS: Final = 3
_SHOWN: Final = 20
_COUNTED: Final = 10_000
_PAGE: Final = 500
_ANSWER_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a deployment: where it is, what it is, its remedy, and a function that repairs it if that is safe.

    Findings compare by text, ignoring `repair`.
    """

    area: str
    problem: str
    remedy: str
    repair: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return " ".join(
            f"{self.area}: {self.problem}; {self.remedy}".split()
        )  # one line, even if the problem quotes a reason of several lines


class Doctor:
    """Examines one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        locks: ChainLocks,
        publisher: Publisher,
        operations: Operations,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._locks = locks
        self._publisher = publisher
        self._operations = operations

    def examine(self) -> list[Finding]:
        """All problems found, those of the set-up first; empty if all is well. Reads only."""
        findings = list(self._database_findings())
        if not findings:
            clock = list(self._database_clock_findings())
            findings += clock
            findings += self._row_findings()
            findings += self._moment_findings(clock_is_right=not clock or self._database.clock is not None)
            findings += self._delivery_findings()
            findings += self._type_findings()
            findings += self._pass_findings()
        findings += self._redis_findings()
        findings += self._broker_findings()
        return findings

    def repair(self) -> tuple[list[Finding], list[Finding]]:
        """Repair the findings that are safe to repair: `(repaired findings, findings that are left)`.

        Repeats until no such finding is left, or until a pass repairs nothing. Raises `DryRunRefused`.
        """
        self._operations.refuse_dry_run("repair the deployment")
        gone: list[Finding] = []
        left = self.examine()
        while any(finding.repair is not None for finding in left):
            before = left
            for finding in before:
                if finding.repair is not None:
                    finding.repair()
            left = self.examine()
            repaired = [finding for finding in before if finding.repair is not None and finding not in left]
            if not repaired:
                break
            for finding in repaired:
                emit(logger, Action.REPAIRED, "repaired: %s", finding, area=finding.area)
            gone += repaired
        return gone, left

    # --- set-up ------------------------------------------------------------------------------------------------------

    def _database_findings(self) -> Iterator[Finding]:
        try:
            self._database.check()
            found, head = revisions.current(self._database), revisions.head()
        except DispatcherError as error:
            if isinstance(error, ServiceRefused):
                yield Finding("database", error.problem, error.advice)
            else:
                yield Finding("database", str(error), "start the database, or correct DISPATCHER_DATABASE_URL")
            return
        if found != head:
            remedy = "run `dispatcher db upgrade`; if the database is ahead, use the newer version of this library"
            yield Finding("database", f"at revision {found}, not at {head}", remedy)

    def _database_clock_findings(self) -> Iterator[Finding]:
        with self._database.read() as connection:
            server_now = self._database.machine_now(connection)
        yield from self._clock_finding("database", server_now)

    def _clock_finding(self, area: str, server_now: datetime) -> Iterator[Finding]:
        difference = abs((datetime.now(UTC) - server_now).total_seconds())
        if difference > _CLOCK_SECONDS:
            yield Finding(
                area, f"its clock and this host's are {difference:.0f} s apart", "synchronise the clocks (NTP)"
            )

    def _redis_findings(self) -> Iterator[Finding]:
        try:
            facts = self._locks.examine()
        except DispatcherError as error:
            yield Finding("redis", str(error), "start Redis, or correct DISPATCHER_REDIS_URL")
            return
        if facts is None:
            yield Finding("redis", "no lock server is configured", "set DISPATCHER_REDIS_URL, or run `dispatcher dev`")
            return
        yield from self._clock_finding("redis", facts.time)
        if facts.eviction not in (None, "noeviction"):
            yield Finding("redis", f"maxmemory-policy is {facts.eviction}: messages may vanish", "set it to noeviction")
        for key in facts.without_ttl[:_SHOWN]:
            yield Finding(
                "redis",
                f"{key} never expires",
                "--repair deletes it",
                lambda key=key: self._locks.drop_without_ttl(key),  # type: ignore[misc]
            )

    def _broker_findings(self) -> Iterator[Finding]:
        if not self._publisher.configured:
            yield Finding("broker", "no broker is configured", "set DISPATCHER_BROKER_URL, or run `dispatcher dev`")
            return
        try:
            self._publisher.check()
            consumed = self._publisher.consumed_queues()
        except (DispatcherError, PublishFailed) as error:
            yield Finding("broker", str(error), "start the broker, or correct DISPATCHER_BROKER_URL")
            return
        type_queues = [chain_type.queue for chain_type in self._config.chains if chain_type.queue is not None]
        for queue in dict.fromkeys([*QUEUES, *type_queues]):
            if queue not in consumed:
                yield Finding("worker", f"no worker answers for queue {queue}", "start a worker that consumes it")
        if consumed:
            yield from self._limit_findings()
        for queue in dict.fromkeys([*QUEUES, *type_queues]):
            try:
                waiting = self._publisher.backlog(queue)
            except PublishFailed:
                continue
            if waiting > self._settings.max_backlog:
                yield Finding("broker", f"{waiting} messages wait in {queue}", "add workers that consume it")

    def _limit_findings(self) -> Iterator[Finding]:
        """Workers that end executions too late (two may then evaluate the same chain), or attempts too early."""
        allowed = {
            EXECUTE: (0.0, self._settings.lock_seconds, f"within {self._settings.lock_seconds:g} s"),
            DELIVER: (self._settings.attempt_seconds, math.inf, f"after {self._settings.attempt_seconds:g} s or more"),
        }
        inspect = self._publisher.app.control.inspect(timeout=_ANSWER_SECONDS)
        for worker, lines in sorted((inspect.registered("time_limit") or {}).items()):
            for line in sorted(lines):  # such as "dispatcher.execute_chain [time_limit=24.0]"
                name, _, limit = line.rstrip("]").partition(" [time_limit=")
                if name not in allowed:
                    continue
                least, most, wanted = allowed[name]
                if not limit or not least <= float(limit) < most:
                    ends = f"ends {name} after {limit} s" if limit else f"never ends {name}"
                    yield Finding(
                        "worker",
                        f"{worker} {ends}, not {wanted}",
                        "give all processes the same settings, and leave the time limits of these tasks alone",
                    )

    # --- rows --------------------------------------------------------------------------------------------------------

    def _row_findings(self) -> Iterator[Finding]:
        with self._database.read() as connection:
            astray = overview.chains_astray(connection, limit=_SHOWN)
            orphans = overview.orphans(connection, limit=_SHOWN)
        for chain_id in astray:
            yield Finding(
                "chain",
                f"{chain_id} waits for a delivery that is closed or missing",
                "--repair makes it due",
                lambda chain_id=chain_id: self._write(deliveries.free_chain, chain_id),  # type: ignore[misc]
            )
        for delivery_id in orphans:
            yield Finding(
                "delivery",
                f"{delivery_id} is open, but its chain does not wait for it",
                "--repair closes it as cancelled",
                lambda delivery_id=delivery_id: self._write(deliveries.close_orphan, delivery_id),  # type: ignore[misc]
            )

    def _moment_findings(self, *, clock_is_right: bool) -> Iterator[Finding]:
        """Chains to which something has happened in the future: they may wait until then, and nobody would know why."""
        with self._database.read() as connection:
            now = self._database.now(connection)
            found = moments.chains_ahead(connection, now=now, limit=_COUNTED)
        if found:
            count = f"{len(found)}" if len(found) < _COUNTED else f"{_COUNTED} or more"
            shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
            remedy = "--repair sets these moments to now and makes the chains due"
            yield Finding(
                "chain",
                f"{count} chains were created, moved or written in the future, while a clock was wrong: {shown}",
                remedy if clock_is_right else "synchronise the clocks first",
                self._set_right if clock_is_right else None,
            )

    def _set_right(self) -> None:
        after_id: int | None = 0
        while after_id is not None:
            after_id = self._database.write(partial(self._set_page_right, after_id))

    def _set_page_right(self, after_id: int, connection: Connection) -> int | None:
        return moments.set_right(connection, after_id=after_id, limit=_PAGE, now=self._database.now(connection))

    def _delivery_findings(self) -> Iterator[Finding]:
        with self._database.read() as connection:
            stopped = overview.count_stopped(connection)
            late = overdue.late(connection, seconds=self._late_seconds(), limit=_SHOWN)
            machine_now = self._database.machine_now(connection)
            long = overdue.beyond_limit(connection, seconds=self._settings.attempt_seconds, limit=_SHOWN)
        for status, count in sorted(stopped.items()):
            yield Finding(
                "delivery",
                f"{count} {status}: a person must decide",
                f"`dispatcher deliveries list --status {status}`, then retry, cancel or skip",
            )
        for attempt in long:
            began = attempt.next_attempt_at or attempt.planned_at
            yield Finding(
                "delivery",
                f"attempt {attempt.attempt} at {attempt.id} has run {(machine_now - began).total_seconds():.0f} s, "
                f"longer than {self._settings.attempt_seconds:g} s",
                f"end the process that makes it, or give it up with `dispatcher deliveries abandon {attempt.id}`",
            )
        for delivery_id in late:
            remedy = f"start beat and a worker on {SWEEPS_QUEUE}, or run `dispatcher relay`"
            yield Finding("delivery", f"{delivery_id} is overdue for the relay", remedy)

    def _type_findings(self) -> Iterator[Finding]:
        with self._database.read() as connection:
            paused = [
                row for row in chain_types.read_types(connection) if row.paused and row.name in self._config.by_type
            ]
        for row in paused:
            yield Finding(
                "chain type",
                f"{row.name} is paused: {row.paused_reason}",
                f"`dispatcher chain-types resume {quote(row.name)}`",
            )
        for (type_name, state), count in self._operations.unknown_states().items():
            if type_name in self._config.by_type:
                remedy = f"`dispatcher chains map --type {quote(type_name)} --from {quote(state)} --to STATE`"
            else:
                remedy = "put the chain type back into the configuration"
            yield Finding(
                "chain type",
                f"{count} chains of {type_name} are in state {state!r}, which this configuration does not know",
                remedy,
            )

    def _pass_findings(self) -> Iterator[Finding]:
        with self._database.read() as connection:
            now = self._database.machine_now(connection)
            domain_now = self._database.now(connection)
            last_ticks = ticks.read_ticks(connection)
            paused = chain_types.paused_types(connection)
            due = [
                position.due_at
                for type_name, chain_type in self._config.by_type.items()
                if type_name not in paused and not _asks_every_sweep(chain_type)
                for position in chains.due_page(connection, type_name=type_name, now=domain_now, after=None, limit=1)
            ]
        for name, moment in ticks.ahead(last_ticks, now).items():
            yield Finding(
                "beat",
                f"{name} last ran {(moment - now).total_seconds():.0f} s in the future, while the clock was wrong",
                "--repair lets it run again at once",
                lambda name=name: self._database.write(partial(self._forget_tick, name)),  # type: ignore[misc]
            )
        passes = {SWEEP: self._settings.sweep_seconds, RELAY: self._settings.relay_seconds}
        if self._settings.retention_days is not None:
            passes[PRUNE] = PRUNE_SECONDS
        for name, seconds in passes.items():
            last_at = last_ticks.get(name)
            if last_at is None:
                yield Finding("beat", f"{name} has never run", "start `celery -A workers beat`")
            elif now - last_at > timedelta(seconds=_MISSED_TICKS * seconds):
                age = (now - last_at).total_seconds()
                yield Finding("beat", f"{name} last ran {age:.0f} s ago, not every {seconds:g} s", "start beat")
        age = (domain_now - min(due, default=domain_now)).total_seconds()
        if age > self._late_seconds():
            yield Finding("sweep", f"the oldest due chain has waited {age:.0f} s", "add workers, or look at their logs")

    def _forget_tick(self, name: str, connection: Connection) -> None:
        ticks.forget(connection, name, machine_now=self._database.machine_now(connection))

    def _late_seconds(self) -> float:
        settings = self._settings
        return _MISSED_TICKS * (settings.sweep_seconds + settings.relay_seconds) + max(
            settings.lock_seconds, settings.queued_seconds
        )

    def _write(self, work: Callable[..., None], key: int | str) -> None:
        def transaction(connection: Connection) -> None:
            work(connection, key, now=self._database.now(connection))

        self._database.write(transaction)


def _asks_every_sweep(chain_type: ChainType) -> bool:
    """Whether some chains of the type are always due, because a rejection that changes nothing writes nothing."""
    rechecks = [candidate.recheck_seconds for candidate in chain_type.by_name.values()]
    return 0 in [chain_type.recheck_seconds if isinstance(recheck, TypeDefault) else recheck for recheck in rechecks]
