"""One batch of chains executed: lock, read, evaluate, write guarded, unlock, publish.

User code (`load_context`, guards) runs with no connection in use. What each chain gets is decided by pure functions
from what was read (`decisions`); the decisions are written in one transaction, in id order, each guarded on its own.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy.engine import Connection

from dispatcher.coordination.locks import ChainLocks, Held
from dispatcher.domain.callbacks import LocalCall
from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.contexts import Evaluated, evaluate_record, load_contexts
from dispatcher.domain.decisions import Decision, decide, standing_of
from dispatcher.domain.evaluation import GuardFailed
from dispatcher.domain.records import Budget, ChainRecord, Owed, Request, Rest, Timing, Write, unsaved_record
from dispatcher.domain.resources import Resource
from dispatcher.domain.results import ChainResult, reasons_text
from dispatcher.execution.dry_run import dry_result
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CHAINS_QUEUE
from dispatcher.retry import growing_interval
from dispatcher.settings import Settings
from dispatcher.states import EventAction, Outcome
from dispatcher.storage import chain_types, chains, portable, store
from dispatcher.storage.database import Database

logger = logging.getLogger(__name__)
plan_logger = logging.getLogger("dispatcher.plan")

_CRASHES_BEFORE_BACKOFF: Final = 3
_PAUSED_SECONDS: Final = 2.0
_OUT_OF_TIME: Final = "half of the lock's time was used up: published again"
_TYPE_PAUSED: Final = "its chain type is paused"


class Executor:
    """Executes batches of chains for one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        locks: ChainLocks,
        publisher: Publisher,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._locks = locks
        self._publisher = publisher
        self._paused_types: frozenset[str] = frozenset()
        self._paused_until = 0.0

    def execute(self, chain_ids: Sequence[int]) -> list[ChainResult]:
        """Execute these chains as a worker does; one result for each, in their order."""
        distinct = list(dict.fromkeys(chain_ids))
        held = self._locks.acquire(distinct)
        again: list[Sequence[int]] = []
        try:
            if len(distinct) > 1 and held.crashes:  # one of these may kill the process: each is evaluated alone
                again += [[chain_id] for chain_id in held.crashes]
                held = self._locks.set_aside(held, list(held.crashes))
            results = self._execute_held(held, stop_at=time.monotonic() + self._settings.lock_seconds / 2)
        except Exception:
            self._locks.release(held)
            raise
        self._locks.release(held)  # not where the process is ending: its crash is counted, its locks expire
        late = [result.chain_id for result in results if result.detail == _OUT_OF_TIME and result.chain_id is not None]
        self._publish(results)
        self._publish_again([*again, late] if late else again)
        by_id = {result.chain_id: result for result in results}
        return [by_id.get(chain_id, ChainResult(chain_id, Outcome.LOCKED)) for chain_id in distinct]

    def execute_locally(
        self, chain_id: int, *, call: LocalCall, context: Mapping[str, Any] | None, requested_by: str | None
    ) -> ChainResult:
        """Execute one chain in this process; with a callback its delivery is begun, and the caller makes the attempt.

        Raises what a guard raises, unchanged.
        """
        held = self._locks.acquire([chain_id])
        if chain_id in held.locked:
            return ChainResult(chain_id, Outcome.LOCKED)
        try:
            (result,) = self._execute_held(held, call=call, context=context, requested_by=requested_by)
        finally:
            self._locks.release(held)
        return result

    def publish_follow_ups(self, results: Sequence[ChainResult], chain_type: ChainType) -> None:
        """Publish the next evaluation of moved chains, where their type says `continue`."""
        moved = [
            result.chain_id for result in results if result.chain_id is not None and result.outcome == Outcome.MOVED
        ]
        if chain_type.continue_ and moved and self._publisher.configured:
            try:
                self._publisher.execute(moved, queue=chain_type.queue or CHAINS_QUEUE)
            except PublishFailed as error:
                logger.warning("follow-up of %d chains not published (%s): the sweep does it", len(moved), error)

    # --- dry run ---------------------------------------------------------------------------------------------------

    def dry_run(
        self,
        chain_id: int | None,
        *,
        chain_type: str,
        resources: Sequence[Resource] = (),
        context: Mapping[str, Any] | None = None,
        stored_context: Mapping[str, Any] | None = None,
        callback: str | None = None,
        local: LocalCall | None = None,
    ) -> ChainResult:
        """Evaluate one chain and log the planned transition; nothing is locked, written, published or called.

        With `chain_id=None` an unsaved chain in NEW with these resources is planned. Raises what a guard raises.
        """
        with self._database.read() as connection:
            now = self._database.now(connection)
            record = chains.read_many(connection, [chain_id]).get(chain_id) if chain_id is not None else None
        if record is None:
            if chain_id is not None:
                return ChainResult(chain_id, Outcome.MISSING)
            record = unsaved_record(chain_type, tuple(resources), stored_context, now)
        standing = standing_of(record, now)
        if standing is None and chain_id is not None and self._locks.locked([chain_id]):
            standing = Outcome.LOCKED
        paused = standing is None and record.chain_type in self._paused()
        if paused:
            standing = Outcome.DISABLED
        asked = record.request or Request()
        if context is not None or callback is not None:
            asked = Request(context, callback, None, None)
        chain = self._config.by_type.get(record.chain_type)
        evaluated = self._evaluate_one(record, chain, asked.context, now)
        if isinstance(evaluated.error, GuardFailed):
            raise evaluated.error
        if evaluated.plan is None or chain is None:
            result = ChainResult(chain_id, Outcome.UNKNOWN_DEFINITION, record.state, detail=str(evaluated.error))
        else:
            result = dry_result(record, chain, evaluated.plan, asked, local)
        _log_plan(record, result, standing)
        outcome = standing or (Outcome.DRY_RUN if result.transition else result.outcome)
        return replace(result, outcome=outcome, detail=_TYPE_PAUSED if paused else result.detail)

    def plan(
        self,
        chain_id: int | None,
        *,
        chain_type: str,
        resources: Sequence[Resource] = (),
        context: Mapping[str, Any] | None = None,
        callback: str | None = None,
    ) -> ChainResult:
        """Dry run one chain as a worker does: what a guard raises is logged, and is the result's outcome."""
        try:
            return self.dry_run(
                chain_id, chain_type=chain_type, resources=resources, context=context, callback=callback
            )
        except GuardFailed as error:
            logger.error("dry run of chain %s: %s", chain_id, error, exc_info=error)  # noqa: TRY400 - with its cause
            return ChainResult(chain_id, Outcome.GUARD_FAILED, error=error.__cause__, detail=str(error))

    # --- the batch ---------------------------------------------------------------------------------------------------

    def _execute_held(
        self,
        held: Held,
        *,
        call: LocalCall | None = None,
        context: Mapping[str, Any] | None = None,
        requested_by: str | None = None,
        stop_at: float = math.inf,
    ) -> list[ChainResult]:
        records, machine_now = store.read(self._database, held.held)
        now = self._database.domain_now(machine_now)
        results: list[ChainResult] = []
        todo: list[ChainRecord] = []
        for chain_id in held.held:
            record = records.get(chain_id)
            standing = Outcome.MISSING if record is None else standing_of(record, now)
            if record is not None and standing is None and record.chain_type in self._paused():
                results.append(ChainResult(chain_id, Outcome.DISABLED, record.state, detail=_TYPE_PAUSED))
                continue
            if record is not None and standing is None:
                todo.append(record)
            else:
                assert standing is not None
                results.append(ChainResult(chain_id, standing, record.state if record else ""))
        if call is None:
            todo = self._back_off_crashers(todo, held, now)
        evaluated = self._evaluate(todo, context, now, stop_at)
        decisions = []
        late = todo[len(evaluated) :]
        results += [ChainResult(record.id, Outcome.LOCKED, record.state, detail=_OUT_OF_TIME) for record in late]
        todo = todo[: len(evaluated)]
        for record, outcome in zip(todo, evaluated, strict=True):
            asked = record.request or Request()
            if call is not None:
                asked = Request(context, None, None, requested_by)
                if isinstance(outcome.error, GuardFailed):
                    raise outcome.error
            decisions.append(
                decide(record, self._config.by_type.get(record.chain_type), outcome, asked, now=now, call=call)
            )
        written = self._write(decisions, now, lease=call is not None)
        for result in written:
            log_result(result)
        return results + written

    def _evaluate(
        self, records: Sequence[ChainRecord], context: Mapping[str, Any] | None, now: datetime, stop_at: float
    ) -> list[Evaluated]:
        """The evaluations of these chains, in order; fewer when `stop_at` (monotonic seconds) has passed."""
        loaded: dict[int, Mapping[str, Any] | BaseException] = {}
        by_type: dict[str, list[ChainRecord]] = {}
        for record in records:
            by_type.setdefault(record.chain_type, []).append(record)
        for name, group in by_type.items():
            chain = self._config.by_type.get(name)
            if chain is not None:
                loaded.update(load_contexts(chain, group))
        results: list[Evaluated] = []
        for record in records:
            if results and time.monotonic() >= stop_at:
                break
            asked = context if context is not None else record.request.context if record.request else None
            chain = self._config.by_type.get(record.chain_type)
            results.append(evaluate_record(record, chain, loaded.get(record.id, {}), asked, now))
        return results

    def _evaluate_one(
        self, record: ChainRecord, chain: ChainType | None, context: Mapping[str, Any] | None, now: datetime
    ) -> Evaluated:
        loaded: Mapping[str, Any] | BaseException = {}
        if chain is not None and record.id:
            loaded = load_contexts(chain, [record]).get(record.id, {})
        return evaluate_record(record, chain, loaded, context, now)

    def _paused(self) -> frozenset[str]:
        """The paused chain types, as of at most some seconds ago: a pause need not cost every execution a query."""
        if time.monotonic() >= self._paused_until:
            with self._database.read() as connection:
                self._paused_types = frozenset(chain_types.paused_types(connection))
            self._paused_until = time.monotonic() + _PAUSED_SECONDS
        return self._paused_types

    def _back_off_crashers(self, records: list[ChainRecord], held: Held, now: datetime) -> list[ChainRecord]:
        """Pay the back-off of a chain that keeps killing its process before it is evaluated once more."""
        crashers = [record for record in records if held.crashes.get(record.id, 0) >= _CRASHES_BEFORE_BACKOFF]
        if not crashers:
            return records
        kept = {record.id: record for record in records}
        rests = {
            record.id: Rest(
                record=record,
                due_at=now + growing_interval(record.failures + 1),
                failures=record.failures + 1,
                event=EventAction.GUARD_FAILED if record.failures == 0 else None,
                detail=f"{held.crashes[record.id]} evaluations ended with their process",
            )
            for record in crashers
        }
        written = store.write(self._database, list(rests.values()), now=now, timing=Timing(0))
        for chain_id, rest in rests.items():
            if chain_id in written:
                kept[chain_id] = replace(kept[chain_id], due_at=rest.due_at, failures=rest.failures)
            else:
                del kept[chain_id]
        return list(kept.values())

    def _write(self, decisions: Sequence[Decision], now: datetime, *, lease: bool) -> list[ChainResult]:
        """The results of what was decided, once it is written."""
        writes = [decision.write for decision in decisions if decision.write is not None]
        timing = Timing(self._settings.queued_seconds, self._settings.lease_seconds if lease else None)
        refused: set[int] = set()
        if not writes:
            written: dict[int, str | None] = {}
        elif limited := self._limited_types(decisions):

            def work(connection: Connection) -> tuple[dict[int, str | None], set[int]]:
                return self._write_within_budgets(connection, decisions, limited, now=now, timing=timing)

            written, refused = self._database.write(work)
        else:
            written = store.write(self._database, writes, now=now, timing=timing)
        return [_result_of(decision, written, refused) for decision in decisions]

    def _write_within_budgets(
        self,
        connection: Connection,
        decisions: Sequence[Decision],
        limited: Sequence[str],
        *,
        now: datetime,
        timing: Timing,
    ) -> tuple[dict[int, str | None], set[int]]:
        """As `batches.write`, and the chains that their type's budget keeps from planning."""
        budgets = self._lock_budgets(connection, limited)
        wished = [decision for decision in decisions if decision.write is not None]
        asleep = portable.lock_unchanged(connection, [one.write.record for one in wished if one.write is not None])
        spent: Counter[str] = Counter()
        wanted: Counter[str] = Counter()
        refused: set[int] = set()
        writes: list[Write] = []
        for decision in wished:
            assert decision.write is not None
            record = decision.write.record
            name = record.chain_type
            if decision.plans and name in budgets and record.id in asleep:
                budget = budgets[name]
                wanted[name] += 1
                if budget is None or spent[name] >= budget.left:
                    refused.add(record.id)
                    continue
                spent[name] += 1
            writes.append(decision.write)
        written = portable.write_locked(connection, writes, asleep, now=now, timing=timing)
        for name, budget in budgets.items():
            if budget is not None and not chain_types.spend_budget(
                connection, name, budget, spent=spent[name], wanted=wanted[name]
            ):
                logger.error(
                    "chain type %s is paused: its plans of this hour are used up",
                    name,
                    extra={"action": "type_paused", "chain_type": name},
                )
        return written, refused

    def _limited_types(self, decisions: Sequence[Decision]) -> list[str]:
        """The types with a limit that something is to be planned for, in the order of names."""
        names = {decision.write.record.chain_type for decision in decisions if decision.write and decision.plans}
        return sorted(name for name in names if self._config.get(name).max_plans_per_hour is not None)

    def _lock_budgets(self, connection: Connection, names: Sequence[str]) -> dict[str, Budget | None]:
        machine_now = self._database.machine_now(connection)
        return {
            name: chain_types.lock_budget(
                connection, name, self._config.get(name).plans_per_hour, machine_now=machine_now
            )
            for name in names
        }

    def _publish_again(self, groups: Sequence[Sequence[int]]) -> None:
        try:
            for chain_ids in groups:
                self._publisher.execute(chain_ids, queue=CHAINS_QUEUE)
        except PublishFailed as error:
            logger.warning("chains not published again (%s): the sweep does it", error)

    def _publish(self, results: Sequence[ChainResult]) -> None:
        owed = [Owed(result.delivery_id, 1) for result in results if result.delivery_id is not None]
        if owed:
            try:
                self._publisher.deliver(owed)
            except PublishFailed as error:
                logger.warning("%d deliveries not published (%s): the relay does it", len(owed), error)
        moved = [result for result in results if result.outcome == Outcome.MOVED and result.transition is not None]
        by_type: dict[str, list[ChainResult]] = {}
        for result in moved:
            assert result.transition is not None
            by_type.setdefault(result.transition.chain.chain_type, []).append(result)
        for name, group in by_type.items():
            chain = self._config.get(name)
            going_on = [result for result in group if chain.candidates(result.state)]
            self.publish_follow_ups(going_on, chain)


def _result_of(decision: Decision, written: Mapping[int, str | None], refused: Set[int]) -> ChainResult:
    if decision.write is None:
        return decision.result
    record = decision.write.record
    if record.id in refused:
        return ChainResult(record.id, Outcome.DISABLED, record.state, detail=_TYPE_PAUSED)
    if record.id not in written:
        return ChainResult(record.id, Outcome.STALE, record.state)
    delivery_id = written[record.id]
    return decision.result if delivery_id is None else replace(decision.result, delivery_id=delivery_id)


def log_result(result: ChainResult) -> None:
    """One log line for what came of a chain."""
    if result.outcome == Outcome.MOVED:
        logger.info(
            "chain %s moved to %s",
            result.chain_id,
            result.state,
            extra={"action": "chain_moved", "chain_id": result.chain_id},
        )
    elif result.outcome == Outcome.PLANNED:
        logger.info(
            "chain %s planned %s",
            result.chain_id,
            type(result.transition).__name__,
            extra={"action": "delivery_planned", "chain_id": result.chain_id, "delivery_id": result.delivery_id},
        )
    elif result.outcome == Outcome.GUARD_FAILED:
        logger.error(
            "chain %s: %s",
            result.chain_id,
            result.detail,
            exc_info=result.error,
            extra={"action": "guard_failed", "chain_id": result.chain_id},
        )
    elif result.outcome in (Outcome.UNKNOWN_DEFINITION, Outcome.NO_CALLBACK):
        logger.warning(
            "chain %s: %s %s",
            result.chain_id,
            result.outcome,
            result.detail,
            extra={"action": str(result.outcome), "chain_id": result.chain_id},
        )
    else:
        logger.debug("chain %s: %s", result.chain_id, result.outcome)


def _log_plan(record: ChainRecord, result: ChainResult, standing: Outcome | None) -> None:
    extra = {"action": "dry_run", "chain_id": record.id or None}
    blocked = f" blocked={standing}" if standing is not None else ""
    winner = result.transition
    if winner is not None:
        plan_logger.info(
            "planned chain_id=%s chain_type=%s from=%s to=%s transition=%s callback=%s%s",
            record.id or None,
            record.chain_type,
            record.state,
            winner.final_state,
            type(winner).__name__,
            result.callback,
            blocked,
            extra=extra,
        )
    else:
        plan_logger.info(
            "nothing planned chain_id=%s chain_type=%s from=%s outcome=%s reasons=%s%s",
            record.id or None,
            record.chain_type,
            record.state,
            result.outcome,
            reasons_text(result.errors),
            blocked,
            extra=extra,
        )
