"""What is wrong with a deployment: rows, locks, queues and leases compared, each disagreement with what mends it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy.orm import Session

from dispatcher import bookkeeping, chains, deliveries, migrations
from dispatcher.config import DispatcherConfig
from dispatcher.database import Database
from dispatcher.errors import DispatcherError
from dispatcher.locks import ChainLocks
from dispatcher.operations import Operations
from dispatcher.publisher import QUEUES, RELAY, SWEEP, Publisher, PublishFailed
from dispatcher.settings import Settings

logger = logging.getLogger(__name__)

_CLOCK_SECONDS: Final = 5.0
_MISSED_TICKS: Final = 3
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One disagreement: where, what, what mends it, and whether `repair` may be called for it."""

    area: str
    problem: str
    remedy: str
    repair: Callable[[], None] | None = None

    def __str__(self) -> str:
        return f"{self.area}: {self.problem}; {self.remedy}"


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
        """Every disagreement found, the set-up first; empty when all is well. Reads only."""
        findings = list(self._database_findings())
        if not findings:
            findings += self._row_findings()
            findings += self._pass_findings()
        findings += self._redis_findings()
        findings += self._broker_findings()
        return findings

    # --- set-up ------------------------------------------------------------------------------------------------------

    def _database_findings(self) -> Iterator[Finding]:
        try:
            self._database.check()
            found, head = migrations.current(self._database), migrations.head()
            if found != head:
                yield Finding("database", f"at revision {found}, not at {head}", "run `dispatcher db upgrade`")
                return
            with self._database.read() as session:
                there = self._database.machine_now(session)
        except DispatcherError as error:
            yield Finding("database", str(error), "start it, or correct DISPATCHER_DATABASE_URL")
            return
        yield from self._clock_finding("database", there)

    def _clock_finding(self, area: str, there: datetime) -> Iterator[Finding]:
        apart = abs((datetime.now(UTC) - there).total_seconds())
        if apart > _CLOCK_SECONDS:
            yield Finding(area, f"its clock and this host's are {apart:.0f} s apart", "synchronise the clocks (NTP)")

    def _redis_findings(self) -> Iterator[Finding]:
        try:
            facts = self._locks.examine()
        except DispatcherError as error:
            yield Finding("redis", str(error), "start it, or correct DISPATCHER_REDIS_URL")
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
            yield Finding("broker", "none is configured", "set DISPATCHER_BROKER_URL, or run `dispatcher dev`")
            return
        try:
            self._publisher.check()
            consumed = self._publisher.consumed_queues()
        except (DispatcherError, PublishFailed) as error:
            yield Finding("broker", str(error), "start it, or correct DISPATCHER_BROKER_URL")
            return
        own = [chain.queue for chain in self._config.chains if chain.queue is not None]
        for queue in dict.fromkeys([*QUEUES, *own]):
            if queue not in consumed:
                yield Finding("worker", f"none answers for queue {queue}", "start one that consumes it")
        for queue in dict.fromkeys([*QUEUES, *own]):
            try:
                waiting = self._publisher.backlog(queue)
            except PublishFailed:
                continue
            if waiting > self._settings.max_backlog:
                yield Finding("broker", f"{waiting} messages wait in {queue}", "add workers for it")

    # --- rows --------------------------------------------------------------------------------------------------------

    def _row_findings(self) -> Iterator[Finding]:
        with self._database.read() as session:
            astray = deliveries.chains_astray(session, limit=_SHOWN)
            orphans = deliveries.orphans(session, limit=_SHOWN)
            stopped = deliveries.count_stopped(session)
            late = deliveries.late(session, seconds=self._late_seconds(), limit=_SHOWN)
            paused = [row for row in bookkeeping.read_types(session) if row.paused]
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
        for status, count in sorted(stopped.items()):
            yield Finding(
                "delivery",
                f"{count} {status}: a person must decide",
                f"`dispatcher deliveries list --status {status}`, then retry, cancel or skip",
            )
        for delivery_id in late:
            yield Finding("delivery", f"{delivery_id} is overdue for the relay", "is a worker on dispatcher.sweeps?")
        for row in paused:
            yield Finding(
                "chain type",
                f"{row.name} is paused: {row.paused_reason}",
                f"`dispatcher chain-types resume {row.name}`",
            )
        for (chain_type, state), count in self._operations.unknown_states().items():
            yield Finding(
                "chain type",
                f"{count} chains of {chain_type} are in state {state!r}, which this configuration does not know",
                f"`dispatcher chains map --type {chain_type} --from {state} --to STATE`",
            )

    def _pass_findings(self) -> Iterator[Finding]:
        with self._database.read() as session:
            now = self._database.machine_now(session)
            domain_now = self._database.now(session)
            ticks = bookkeeping.read_ticks(session)
            oldest = chains.oldest_due(session, now=domain_now)
        for name, seconds in ((SWEEP, self._settings.sweep_seconds), (RELAY, self._settings.relay_seconds)):
            last_at = ticks.get(name)
            if last_at is None:
                yield Finding("beat", f"{name} has never run", "start `celery -A workers beat`")
            elif now - last_at > timedelta(seconds=_MISSED_TICKS * seconds):
                age = (now - last_at).total_seconds()
                yield Finding("beat", f"{name} last ran {age:.0f} s ago, not every {seconds:g} s", "start beat")
        if oldest is not None and domain_now - oldest > timedelta(seconds=self._late_seconds()):
            age = (domain_now - oldest).total_seconds()
            yield Finding("sweep", f"the oldest due chain has waited {age:.0f} s", "add workers, or look at their logs")

    def _late_seconds(self) -> float:
        settings = self._settings
        return _MISSED_TICKS * (settings.sweep_seconds + settings.relay_seconds) + max(
            settings.lock_seconds, settings.queued_seconds
        )

    def _write(self, work: Callable[..., None], key: int | str) -> None:
        def transaction(session: Session) -> None:
            work(session, key, now=self._database.now(session))

        self._database.write(transaction)


def repaired(findings: Sequence[Finding]) -> list[Finding]:
    """Repair what is safe to repair; those findings that were."""
    done = []
    for finding in findings:
        if finding.repair is not None:
            finding.repair()
            logger.warning("repaired: %s", finding, extra={"action": "repaired"})
            done.append(finding)
    return done
