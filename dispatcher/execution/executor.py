"""One batch of chains executed: lock, read, evaluate, write guarded, unlock, publish.

User code (`load_context`, guards) runs with no connection in use. What each chain gets is decided by pure functions
from what was read (`domain.decisions`); the decisions are written in one transaction, in id order, each with its own
guard.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from dispatcher.coordination.locks import ChainLocks, Held
from dispatcher.domain.callbacks import LocalCall
from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.contexts import Evaluated, evaluate_record, load_contexts
from dispatcher.domain.decisions import Decision, decide, standing_of
from dispatcher.domain.evaluation import GuardFailed
from dispatcher.domain.records import ChainRecord, Owed, Request, Rest, Timing, Written
from dispatcher.domain.results import ChainResult
from dispatcher.errors import ServiceUnavailable, UnreadableRow
from dispatcher.execution.paused import PausedTypes
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CHAINS_QUEUE
from dispatcher.retry import back_off
from dispatcher.settings import Settings
from dispatcher.states import EventAction, Outcome
from dispatcher.storage.database import Database
from dispatcher.storage.statements import grouped
from dispatcher.storage.store import Limit, Store
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_CRASHES_BEFORE_BACKOFF: Final = 3


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
        store: Store,
        paused: PausedTypes,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._locks = locks
        self._publisher = publisher
        self._store = store
        self._paused = paused

    def execute(self, chain_ids: Sequence[int]) -> list[ChainResult]:
        """Execute these chains as a worker does; one result for each, in their order."""
        distinct = list(dict.fromkeys(chain_ids))
        held = self._locks.acquire(distinct)
        alone: list[int] = []
        try:
            if len(distinct) > 1 and held.crashes:  # any of these may kill the process: each is evaluated alone
                alone = list(held.crashes)
                held = self._locks.set_aside(held, alone)
            results = self._execute_held(held, stop_at=time.monotonic() + self._settings.lock_seconds / 2)
        except Exception:
            self._locks.release(held)
            raise
        # Skipped when the process is being killed: the crash counter must stay raised, and the locks expire by
        # themselves.
        self._locks.release(held)
        late = [result.chain_id for result in results if result.outcome == Outcome.OUT_OF_TIME]
        self._publish(results)
        self._publish_again(alone, [chain_id for chain_id in late if chain_id is not None])
        by_id = {result.chain_id: result for result in results}
        return [by_id.get(chain_id, ChainResult(chain_id, Outcome.LOCKED)) for chain_id in distinct]

    def execute_locally(self, chain_id: int, *, call: LocalCall, asked: Request) -> ChainResult:
        """Execute one chain in this process; with a callback its delivery is begun, and the caller makes the attempt.

        `asked` is evaluated instead of the request in the chain's row. Raises `GuardFailed`, or `UnreadableRow` if the
        chain's context cannot be read.
        """
        held = self._locks.acquire([chain_id])
        if chain_id in held.locked:
            return ChainResult(chain_id, Outcome.LOCKED)
        try:
            (result,) = self._execute_held(held, call=call, asked=asked)
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
                _log_not_published(len(moved), error)

    # --- the batch ---------------------------------------------------------------------------------------------------

    def _execute_held(
        self,
        held: Held,
        *,
        call: LocalCall | None = None,
        asked: Request | None = None,
        stop_at: float = math.inf,
    ) -> list[ChainResult]:
        records, machine_now = self._store.read(held.held)
        now = self._database.domain_now(machine_now)
        waiting, results = self._standing(held, records, now)
        if call is None:
            waiting = self._back_off_crashers(waiting, held, now)
        evaluations = self._evaluate(waiting, asked, now, stop_at)
        late = waiting[len(evaluations) :]
        results += [ChainResult(record.id, Outcome.OUT_OF_TIME, record.state) for record in late]
        decisions = []
        for record, evaluated in zip(waiting, evaluations, strict=False):  # those that are late come last
            if call is not None and isinstance(evaluated.error, GuardFailed | UnreadableRow):
                raise evaluated.error
            chain_type = self._config.by_type.get(record.chain_type)
            request = asked or record.request or Request()
            decisions.append(decide(record, chain_type, evaluated, request, now=now, call=call))
        written = self._write(decisions, now, lease=call is not None)
        for result in written:
            _log(result)
        return results + written

    def _standing(
        self, held: Held, records: Mapping[int, ChainRecord], now: datetime
    ) -> tuple[list[ChainRecord], list[ChainResult]]:
        """The held chains that are to be evaluated, and the results of those that are not."""
        waiting: list[ChainRecord] = []
        results: list[ChainResult] = []
        for chain_id in held.held:
            record = records.get(chain_id)
            if record is None:
                results.append(ChainResult(chain_id, Outcome.MISSING))
                continue
            standing = standing_of(record, now)
            if standing is not None:
                results.append(ChainResult(chain_id, standing, record.state))
            elif record.chain_type in self._paused:
                results.append(ChainResult(chain_id, Outcome.PAUSED, record.state))
            else:
                waiting.append(record)
        return waiting, results

    def _evaluate(
        self, records: Sequence[ChainRecord], asked: Request | None, now: datetime, stop_at: float
    ) -> list[Evaluated]:
        """The evaluations of these chains, in order; fewer when `stop_at` (monotonic seconds) has passed.

        `asked` is evaluated instead of the requests in their rows.
        """
        loaded: dict[int, Mapping[str, Any] | BaseException] = {}
        groups: dict[str, list[ChainRecord]] = {}
        for record in records:
            groups.setdefault(record.chain_type, []).append(record)
        for type_name, group in groups.items():
            chain_type = self._config.by_type.get(type_name)
            if chain_type is not None:
                loaded.update(load_contexts(chain_type, group))
        evaluations: list[Evaluated] = []
        for record in records:
            if evaluations and time.monotonic() >= stop_at:
                break
            request = asked or record.request or Request()
            chain_type = self._config.by_type.get(record.chain_type)
            evaluations.append(evaluate_record(record, chain_type, loaded.get(record.id, {}), request.context, now))
        return evaluations

    def _back_off_crashers(self, records: list[ChainRecord], held: Held, now: datetime) -> list[ChainRecord]:
        """Postpone a chain whose evaluation has killed its process three times; the chains that may be evaluated.

        The pause is written *before* the next try, because that try may kill this process too.
        """
        crashers = [record for record in records if held.crashes.get(record.id, 0) >= _CRASHES_BEFORE_BACKOFF]
        if not crashers:
            return records
        kept = {record.id: record for record in records}
        rests = {
            record.id: Rest(
                record=record,
                due_at=now + back_off(record.id, record.failures + 1),
                failures=record.failures + 1,
                event=EventAction.GUARD_FAILED if record.failures == 0 else None,
                detail=f"{held.crashes[record.id]} evaluations ended with their process",
            )
            for record in crashers
        }
        written = self._store.write(list(rests.values()), now=now, timing=Timing(0)).deliveries
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
        written = Written()
        if writes:
            written = self._store.write(writes, now=now, timing=timing, limits=self._limits(decisions))
        for type_name in written.paused:
            emit(
                logger,
                Action.TYPE_PAUSED,
                "chain type %s is paused, because its plans of this hour are used up",
                type_name,
                chain_type=type_name,
            )
        return [_result_of(decision, written) for decision in decisions]

    def _limits(self, decisions: Sequence[Decision]) -> dict[str, Limit]:
        """The limits of plans per hour, by type name, of the types for which something is to be planned."""
        names = {decision.write.record.chain_type for decision in decisions if decision.write and decision.plans}
        types = [self._config.get(type_name) for type_name in sorted(names)]
        return {
            chain_type.chain_type: chain_type.plans_per_hour
            for chain_type in types
            if chain_type.max_plans_per_hour is not None
        }

    # --- messages ----------------------------------------------------------------------------------------------------

    def _publish_again(self, alone: Sequence[int], together: Sequence[int]) -> None:
        """Publish these chains again: each of `alone` in its own message, those `together` in one for each queue."""
        if not alone and not together:
            return
        try:
            records, _ = self._store.read([*alone, *together])
            queues = {chain_id: self._queue_of(record.chain_type) for chain_id, record in records.items()}
            groups = grouped((chain_id for chain_id in together if chain_id in queues), queues.__getitem__)
            messages = [(queues[chain_id], [chain_id]) for chain_id in alone if chain_id in queues]
            for queue, chain_ids in [*messages, *groups.items()]:
                self._publisher.execute(chain_ids, queue=queue)
        except (PublishFailed, ServiceUnavailable) as error:
            _log_not_published(len(alone) + len(together), error)

    def _queue_of(self, type_name: str) -> str:
        chain_type = self._config.by_type.get(type_name)
        return (chain_type.queue if chain_type is not None else None) or CHAINS_QUEUE

    def _publish(self, results: Sequence[ChainResult]) -> None:
        owed = [Owed(result.delivery_id, 1) for result in results if result.delivery_id is not None]
        if owed:
            try:
                self._publisher.deliver(owed)
            except PublishFailed as error:
                emit(
                    logger,
                    Action.DELIVERIES_NOT_PUBLISHED,
                    "%d deliveries are not published (%s); the relay will do it",
                    len(owed),
                    error,
                    deliveries=len(owed),
                )
        moved = [result for result in results if result.outcome == Outcome.MOVED and result.transition is not None]
        groups: dict[str, list[ChainResult]] = {}
        for result in moved:
            assert result.transition is not None
            groups.setdefault(result.transition.chain.chain_type, []).append(result)
        for type_name, group in groups.items():
            chain_type = self._config.get(type_name)
            going_on = [result for result in group if chain_type.candidates(result.state)]
            self.publish_follow_ups(going_on, chain_type)


def _result_of(decision: Decision, written: Written) -> ChainResult:
    if decision.write is None:
        return decision.result
    record = decision.write.record
    if record.id in written.refused:
        return ChainResult(record.id, Outcome.PAUSED, record.state)
    if record.id not in written.deliveries:
        return ChainResult(record.id, Outcome.STALE, record.state)
    delivery_id = written.deliveries[record.id]
    return decision.result if delivery_id is None else replace(decision.result, delivery_id=delivery_id)


def _log_not_published(count: int, error: PublishFailed | ServiceUnavailable) -> None:
    emit(
        logger,
        Action.CHAINS_NOT_PUBLISHED,
        "the next evaluation of %d chains is not published (%s); the sweep will do it",
        count,
        error,
        chains=count,
    )


def _log(result: ChainResult) -> None:
    """Write one log line for what came of a chain."""
    chain_id = result.chain_id
    match result.outcome:
        case Outcome.MOVED:
            emit(logger, Action.CHAIN_MOVED, "chain %s moved to %s", chain_id, result.state, chain_id=chain_id)
        case Outcome.PLANNED:
            emit(
                logger,
                Action.DELIVERY_PLANNED,
                "chain %s planned %s",
                chain_id,
                type(result.transition).__name__,
                chain_id=chain_id,
                delivery_id=result.delivery_id,
            )
        case Outcome.GUARD_FAILED:
            emit(
                logger,
                Action.GUARD_FAILED,
                "chain %s: %s",
                chain_id,
                result.detail,
                error=result.error,
                chain_id=chain_id,
            )
        case Outcome.UNKNOWN_DEFINITION | Outcome.NO_CALLBACK:
            action = Action(result.outcome.value)
            emit(logger, action, "chain %s: %s %s", chain_id, result.outcome, result.detail, chain_id=chain_id)
        case _:
            logger.debug("chain %s: %s", chain_id, result.outcome)
