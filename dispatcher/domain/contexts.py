"""Runs `load_context` and the guards of one chain, so that a failure stays with its chain.

User code runs here. No database connection is in use meanwhile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dispatcher.domain.config import ChainType
from dispatcher.domain.evaluation import GuardFailed, Plan, evaluate
from dispatcher.domain.records import ChainRecord
from dispatcher.errors import UnknownDefinition, ends_process


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One chain's evaluation: a plan, or the error that a guard, a loader or an unknown name raised."""

    plan: Plan | None
    error: Exception | None = None


def load_contexts(
    chain_type: ChainType, records: Sequence[ChainRecord]
) -> dict[int, Mapping[str, Any] | BaseException]:
    """What the type's `load_context` gives for these chains; an exception for each chain it fails for.

    A loader that fails for the batch is asked once more per chain, so that one chain's failure is its own.
    """
    loader = chain_type.load_context
    if loader is None or not records:
        return {}
    try:
        loaded = loader([record.snapshot() for record in records])
        return {record.id: dict(loaded.get(record.id) or {}) for record in records}
    except BaseException as error:
        if ends_process(error):
            raise
        if len(records) == 1:
            return {records[0].id: error}
    results: dict[int, Mapping[str, Any] | BaseException] = {}
    for record in records:
        results.update(load_contexts(chain_type, [record]))
    return results


def merged_context(
    loaded: Mapping[str, Any], stored: Mapping[str, Any] | None, asked: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The context for the guards; later ones win. (A class's own `initial_context` is added per transition.)"""
    return {**loaded, **(stored or {}), **(asked or {})}


def evaluate_record(
    record: ChainRecord,
    chain_type: ChainType | None,
    loaded: Mapping[str, Any] | BaseException,
    asked: Mapping[str, Any] | None,
    now: datetime,
) -> Evaluated:
    """The plan for one chain, or what kept it from being made; user code runs here, with no connection in use."""
    if chain_type is None:
        return Evaluated(None, UnknownDefinition(record.id, f"chain type {record.chain_type!r}"))
    if record.state not in chain_type.states:
        return Evaluated(None, UnknownDefinition(record.id, f"state {record.state!r}"))
    if isinstance(loaded, BaseException):
        failure = GuardFailed("load_context", f"{type(loaded).__name__}: {loaded}")
        failure.__cause__ = loaded
        return Evaluated(None, failure)
    context = merged_context(loaded, record.context, asked)
    candidates = chain_type.candidates(record.state)
    try:
        plan = evaluate(record.snapshot(), candidates, context, now, recheck_seconds=chain_type.recheck_seconds)
    except GuardFailed as error:
        return Evaluated(None, error)
    return Evaluated(plan)
