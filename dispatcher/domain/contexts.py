"""Runs `load_context` and the guards of a chain. An error in this user code fails only that chain.

No database connection is in use while user code runs.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dispatcher.bounds import describe
from dispatcher.domain.config import ChainType
from dispatcher.domain.evaluation import GuardFailed, Plan, evaluate
from dispatcher.domain.records import ChainRecord
from dispatcher.domain.unreadable import unreadable
from dispatcher.errors import UnknownDefinition, ends_process


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of evaluating one chain: a plan, or an error.

    `GuardFailed` is the error of a guard or of a loader, `UnreadableRow` that of a row, `UnknownDefinition` that of a
    name.
    """

    plan: Plan | None
    error: Exception | None = None


def load_contexts(
    chain_type: ChainType, records: Sequence[ChainRecord]
) -> dict[int, Mapping[str, Any] | BaseException]:
    """`{chain_id: context}` from the type's `load_context`, with an exception instead where it failed for a chain.

    If the loader fails for the batch, it is called again for each chain alone, so that only the chain that causes the
    error fails.
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
    """The context for the guards; later arguments win. (Each transition adds the `initial_context` of its class.)"""
    return {**loaded, **(stored or {}), **(asked or {})}


def evaluate_record(
    record: ChainRecord,
    chain_type: ChainType | None,
    loaded: Mapping[str, Any] | BaseException,
    asked: Mapping[str, Any] | None,
    now: datetime,
) -> Evaluated:
    """The plan for one chain, or the error that prevented it. Runs user code.

    `asked` is the caller's context, or that of the chain's request: the guards get a copy of the latter, because it is
    written with the plan as it was.
    """
    if chain_type is None:
        return Evaluated(None, UnknownDefinition(record.id, f"chain type {record.chain_type!r}"))
    if record.state not in chain_type.states:
        return Evaluated(None, UnknownDefinition(record.id, f"state {record.state!r}"))
    if isinstance(loaded, BaseException):
        failure = GuardFailed("load_context", describe(loaded))
        failure.__cause__ = loaded
        return Evaluated(None, failure)
    problem = unreadable(record.context, asked)
    if problem is not None:
        return Evaluated(None, problem)
    if record.request is not None and asked is record.request.context:
        asked = deepcopy(asked)
    context = merged_context(loaded, record.context, asked)
    candidates = chain_type.candidates(record.state)
    try:
        plan = evaluate(
            record.snapshot(),
            candidates,
            context,
            now,
            recheck_seconds=chain_type.recheck_seconds,
            states=chain_type.states,
        )
    except GuardFailed as error:
        return Evaluated(None, error)
    return Evaluated(plan)
