"""What an execution would do, logged and not done."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.callbacks import NO_CALLBACK_FOUND, LocalCall
from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.contexts import Evaluated, evaluate_record, load_contexts
from dispatcher.domain.decisions import Decision, decide, standing_of
from dispatcher.domain.evaluation import GuardFailed
from dispatcher.domain.records import ChainRecord, Request, unsaved_record
from dispatcher.domain.resources import Resource
from dispatcher.domain.results import ChainResult, reasons_text
from dispatcher.errors import UnreadableRow
from dispatcher.execution.paused import PausedTypes
from dispatcher.states import Outcome
from dispatcher.storage import chains
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)
plan_logger = logging.getLogger("dispatcher.plan")


class DryRun:
    """Plans chains of one deployment: nothing is locked, written, published or called."""

    def __init__(self, *, config: DispatcherConfig, database: Database, locks: ChainLocks, paused: PausedTypes) -> None:
        self._config = config
        self._database = database
        self._locks = locks
        self._paused = paused

    def plan(
        self,
        chain_id: int | None,
        *,
        type_name: str,
        resources: Sequence[Resource] = (),
        stored_context: Mapping[str, Any] | None = None,
        asked: Request | None = None,
        local: LocalCall | None = None,
    ) -> ChainResult:
        """Evaluate one chain, log the transition that would be planned, and return the result. Writes nothing.

        `asked` is evaluated instead of the request in the chain's row. With `chain_id=None` it evaluates an unsaved
        chain in NEW with these resources and this stored context. Raises `GuardFailed` if a guard raises an error, and
        `UnreadableRow` if the chain's context or request cannot be read.
        """
        with self._database.read() as connection:
            now = self._database.now(connection)
            record = chains.read_many(connection, [chain_id]).get(chain_id) if chain_id is not None else None
        if record is None:
            if chain_id is not None:
                return ChainResult(chain_id, Outcome.MISSING)
            record = unsaved_record(type_name, tuple(resources), stored_context, now)
        standing = standing_of(record, now)
        if standing is None and chain_id is not None and self._locks.locked([chain_id]):
            standing = Outcome.LOCKED
        if standing is None and record.chain_type in self._paused:
            standing = Outcome.PAUSED
        asked = asked or record.request or Request()
        chain_type = self._config.by_type.get(record.chain_type)
        evaluated = _evaluate(record, chain_type, asked.context, now)
        if isinstance(evaluated.error, GuardFailed | UnreadableRow):
            raise evaluated.error
        decision = decide(record, chain_type, evaluated, asked, now=now, call=local)
        result = _result_of(decision, record)
        _log_plan(record, result, standing)
        return replace(result, outcome=standing or result.outcome)

    def plan_as_worker(
        self,
        chain_id: int | None,
        *,
        type_name: str,
        resources: Sequence[Resource] = (),
        stored_context: Mapping[str, Any] | None = None,
        asked: Request | None = None,
    ) -> ChainResult:
        """Like `plan`, but an error that it raises is logged, and the outcome is `GUARD_FAILED`."""
        try:
            return self.plan(
                chain_id, type_name=type_name, resources=resources, stored_context=stored_context, asked=asked
            )
        except (GuardFailed, UnreadableRow) as error:
            emit(
                logger,
                Action.DRY_RUN_FAILED,
                "dry run of chain %s: %s",
                chain_id,
                error,
                error=error,
                chain_id=chain_id,
            )
            return ChainResult(chain_id, Outcome.GUARD_FAILED, error=error.__cause__, detail=str(error))


def _evaluate(
    record: ChainRecord, chain_type: ChainType | None, context: Mapping[str, Any] | None, now: datetime
) -> Evaluated:
    loaded: Mapping[str, Any] | BaseException = {}
    if chain_type is not None and record.id:
        loaded = load_contexts(chain_type, [record]).get(record.id, {})
    return evaluate_record(record, chain_type, loaded, context, now)


def _result_of(decision: Decision, record: ChainRecord) -> ChainResult:
    """The result of a dry run: that of the decision, for a chain that stays where it is."""
    result = replace(decision.result, chain_id=record.id or None, state=record.state)
    if decision.plans:
        return replace(result, outcome=Outcome.DRY_RUN, callback=result.callback or "none")
    if result.outcome == Outcome.NO_CALLBACK:
        return replace(result, callback=NO_CALLBACK_FOUND.kind)
    return result


def _log_plan(record: ChainRecord, result: ChainResult, standing: Outcome | None) -> None:
    """Log one line on `dispatcher.plan`: what would be planned, or why nothing would be."""
    chain_id = record.id or None
    blocked = f" blocked={standing}" if standing is not None else ""
    winner = result.transition
    if winner is not None:
        emit(
            plan_logger,
            Action.DRY_RUN,
            "planned chain_id=%s chain_type=%s from=%s to=%s transition=%s callback=%s%s",
            chain_id,
            record.chain_type,
            record.state,
            winner.final_state,
            type(winner).__name__,
            result.callback,
            blocked,
            chain_id=chain_id,
        )
    else:
        emit(
            plan_logger,
            Action.DRY_RUN,
            "nothing planned chain_id=%s chain_type=%s from=%s outcome=%s reasons=%s%s",
            chain_id,
            record.chain_type,
            record.state,
            result.outcome,
            reasons_text(result.errors),
            blocked,
            chain_id=chain_id,
        )
