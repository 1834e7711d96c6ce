"""Writes the results of executions, with at most `max_plans_per_hour` plans for each chain type.

The plans are counted and written in the same transaction.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy.engine import Connection

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.decisions import Decision
from dispatcher.domain.records import Budget, Timing, Write
from dispatcher.storage import chain_types, portable
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Written:
    """What was written, as `deliveries`: `{chain id: id of its new delivery, if any}`.

    `refused` has the chains whose plan was not written because of a budget. `paused` has the types that this write has
    paused.
    """

    deliveries: dict[int, str | None] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    paused: list[str] = field(default_factory=list)


class Budgets:
    """The budgets of one deployment's chain types."""

    def __init__(self, *, config: DispatcherConfig, database: Database) -> None:
        self._config = config
        self._database = database

    def limited_types(self, decisions: Sequence[Decision]) -> list[str]:
        """The names of the types that have a limit and for which these decisions plan a transition, sorted."""
        names = {decision.write.record.chain_type for decision in decisions if decision.write and decision.plans}
        return sorted(name for name in names if self._config.get(name).max_plans_per_hour is not None)

    def write(
        self, decisions: Sequence[Decision], limited_types: Sequence[str], *, now: datetime, timing: Timing
    ) -> Written:
        """Write these decisions, in one transaction; gives what was written.

        When the budget of a limited type is used up, or the type is paused, its further plans are not written. The ids
        of their chains are in `Written.refused`.
        """

        def work(connection: Connection) -> Written:
            return self._write(connection, decisions, limited_types, now=now, timing=timing)

        written = self._database.write(work)
        for type_name in written.paused:
            emit(
                logger,
                Action.TYPE_PAUSED,
                "chain type %s is paused, because its plans of this hour are used up",
                type_name,
                chain_type=type_name,
            )
        return written

    def _write(
        self,
        connection: Connection,
        decisions: Sequence[Decision],
        limited_types: Sequence[str],
        *,
        now: datetime,
        timing: Timing,
    ) -> Written:
        written = Written()
        budgets = self._lock(connection, limited_types)
        writes = [decision.write for decision in decisions if decision.write is not None]
        not_woken = portable.lock_unchanged(connection, [write.record for write in writes])
        spent: Counter[str] = Counter()
        wanted: Counter[str] = Counter()
        allowed: list[Write] = []
        for decision in decisions:
            if decision.write is None:
                continue
            record = decision.write.record
            type_name = record.chain_type
            if decision.plans and type_name in budgets and record.id in not_woken:
                budget = budgets[type_name]
                wanted[type_name] += 1
                if budget is None or spent[type_name] >= budget.left:
                    written.refused.add(record.id)
                    continue
                spent[type_name] += 1
            allowed.append(decision.write)
        written.deliveries = portable.write_locked(connection, allowed, not_woken, now=now, timing=timing)
        for type_name, budget in budgets.items():
            if budget is not None and not chain_types.spend_budget(
                connection, type_name, budget, spent=spent[type_name], wanted=wanted[type_name]
            ):
                written.paused.append(type_name)
        return written

    def _lock(self, connection: Connection, type_names: Sequence[str]) -> dict[str, Budget | None]:
        machine_now = self._database.machine_now(connection)
        return {
            type_name: chain_types.lock_budget(
                connection, type_name, self._config.get(type_name).plans_per_hour, machine_now=machine_now
            )
            for type_name in type_names
        }
