"""What the deployment remembers of its chain types: pauses, budgets, fingerprints.

On the caller's connection; nothing here commits.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import func, select, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import MAX_DETAIL, Budget, TypeRecord
from dispatcher.states import OperatorAction, SubjectKind
from dispatcher.storage import actions
from dispatcher.storage.clock import TOLERANCE
from dispatcher.storage.models import TYPE, ChainRow, TypeRow
from dispatcher.storage.statements import insert_or_ignore, one_row

_BUDGET_WINDOW: Final = timedelta(hours=1)
_ESTIMATE_AGE: Final = timedelta(hours=1)


def paused_types(connection: Connection) -> set[str]:
    """The names of the chain types that are paused."""
    return set(connection.execute(select(TypeRow.name).where(TypeRow.paused)).scalars())


def set_paused(
    connection: Connection, name: str, *, paused: bool, requested_by: str | None, reason: str | None
) -> bool:
    """Pause or resume a chain type, and note who did it and why; False when nothing had to change."""
    connection.execute(insert_or_ignore(connection, TypeRow).values(name=name))
    kept = reason[:MAX_DETAIL] if paused and reason else None
    done = connection.execute(
        update(TypeRow)
        .where(TypeRow.name == name, TypeRow.paused != paused)
        .values(paused=paused, paused_reason=kept, window_at=None, window_plans=0)
    )
    changed = one_row(done)
    if changed:
        action = OperatorAction.PAUSED if paused else OperatorAction.RESUMED
        actions.add(connection, SubjectKind.TYPE, name, action, requested_by=requested_by, reason=reason)
    return changed


_FIELDS: Final = tuple(TypeRecord.__dataclass_fields__)


def lock_budget(
    connection: Connection, name: str, limit_of: Callable[[int], int | None], *, machine_now: datetime
) -> Budget | None:
    """The budget of a chain type, its row locked until the transaction ends; None while the type is paused.

    `limit_of` gives the limit for an estimated number of chains; the estimate is refreshed once an hour.
    """
    query = select(TYPE).where(TypeRow.name == name).with_for_update()
    row = connection.execute(query).one_or_none()
    # Do not INSERT IGNORE every time: on MySQL it takes a shared lock, and two transactions that upgrade it deadlock.
    if row is None:
        connection.execute(insert_or_ignore(connection, TypeRow).values(name=name))
        row = connection.execute(query).one()
    if row.paused:
        return None
    estimate = row.chains_estimate
    if estimate is None or not _is_fresh(row.estimated_at, machine_now):
        estimate = connection.execute(select(func.count()).where(ChainRow.chain_type == name)).scalar_one()
        connection.execute(
            update(TypeRow).where(TypeRow.name == name).values(chains_estimate=estimate, estimated_at=machine_now)
        )
    limit = limit_of(estimate)
    assert limit is not None  # budgets are locked for types with a limit only
    if row.window_at is None or machine_now - row.window_at >= _BUDGET_WINDOW:
        return Budget(machine_now, 0, limit)
    # An hour that has begun in the future begins anew, with what was counted: the clock was wrong.
    return Budget(min(row.window_at, machine_now), row.window_plans, limit)


def _is_fresh(estimated_at: datetime | None, machine_now: datetime) -> bool:
    return estimated_at is not None and -TOLERANCE <= machine_now - estimated_at <= _ESTIMATE_AGE


def spend_budget(connection: Connection, name: str, budget: Budget, *, spent: int, wanted: int) -> bool:
    """Note the plans that were written; False when more were wanted: then the type is paused, with the reason."""
    enough = wanted <= budget.left
    reason = (
        None if enough else f"max_plans_per_hour: {budget.limit} used up in the hour from {budget.window_at:%H:%M} UTC"
    )
    connection.execute(
        update(TypeRow)
        .where(TypeRow.name == name)
        .values(window_at=budget.window_at, window_plans=budget.plans + spent, paused=not enough, paused_reason=reason)
    )
    if not enough:
        actions.add(connection, SubjectKind.TYPE, name, OperatorAction.PAUSED, requested_by=None, reason=reason)
    return enough


def read_types(connection: Connection) -> list[TypeRecord]:
    """What is remembered of each chain type, by name."""
    rows = connection.execute(select(*(TYPE.c[name] for name in _FIELDS)).order_by(TypeRow.name)).mappings()
    return [TypeRecord(**{name: row[name] for name in _FIELDS}) for row in rows]


def read_fingerprints(connection: Connection, names: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """`{chain type: {state: {fingerprint: when it was last seen}}}` as remembered."""
    rows = connection.execute(select(TypeRow.name, TypeRow.fingerprints).where(TypeRow.name.in_(names)))
    return {name: dict(fingerprints or {}) for name, fingerprints in rows}


def write_fingerprints(connection: Connection, name: str, fingerprints: Mapping[str, Mapping[str, str]]) -> None:
    """Remember the fingerprints of a chain type's states."""
    connection.execute(insert_or_ignore(connection, TypeRow).values(name=name))
    connection.execute(update(TypeRow).where(TypeRow.name == name).values(fingerprints=dict(fingerprints)))
