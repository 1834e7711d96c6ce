"""Databases at revision 0001, and what programs of that time write into them."""

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from alembic import command
from sqlalchemy import Column, MetaData, Table, insert, select, update
from sqlalchemy.engine import Connection

from dispatcher.domain.resources import Resource, resource_key
from dispatcher.storage.clock import clock_plus
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import configuration
from dispatcher.storage.models import Base
from dispatcher.storage.statements import new_id

_NEWER_TABLES = {"chain_dispatcher_suppression", "chain_dispatcher_action"}
_NEWER_COLUMNS = {
    "chain_dispatcher_chain": {"uid", "runs", "started_at", "entered_at"},
    "chain_dispatcher_delivery": {
        "begins",
        "waits_for",
        "waits_reason",
        "waits_since",
        "has_place",
        "rest_until",
        "request",
        "lapse_seen_at",
        "called_off",
        "uncalled",
    },
}


def _as_they_were() -> dict[str, Table]:
    metadata = MetaData()
    return {
        name.removeprefix("chain_dispatcher_"): Table(
            name,
            metadata,
            *(
                Column(column.name, column.type, primary_key=column.primary_key, server_default=column.server_default)
                for column in table.columns
                if column.name not in _NEWER_COLUMNS.get(name, ())
            ),
        )
        for name, table in Base.metadata.tables.items()
        if name not in _NEWER_TABLES
    }


OLD = _as_they_were()
"""The tables of revision 0001 by their short names, with the columns of that time."""

CHAIN, RESOURCE, EVENT, DELIVERY, TICK, TYPE = (
    OLD[name] for name in ("chain", "resource", "event", "delivery", "tick", "type")
)


def make(database: Database) -> None:
    """Make the tables of revision 0001 in an empty database."""
    database.write(lambda connection: command.upgrade(configuration(connection), "0001"))


class OldProgram:
    """A program of that time: its statements, which know no newer column."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, type_name: str, pairs: Sequence[Resource], *, now: datetime) -> int:
        """The id of a new chain that is due."""

        def work(connection: Connection) -> int:
            values = {"resource_key": resource_key(pairs), "chain_type": type_name, "state": "new"}
            made = insert(CHAIN).values(**values, due_at=now, created_at=now, updated_at=now)
            chain_id: int = connection.execute(made).inserted_primary_key[0]
            rows = [{"chain_id": chain_id, "resource_type": kind, "resource_id": name} for kind, name in pairs]
            connection.execute(insert(RESOURCE), rows)
            _event(connection, chain_id, "created", to_state="new", now=now)
            return chain_id

        return self._database.write(work)

    def plan(self, chain_id: int, transition: str, final_state: str, *, now: datetime) -> str:
        """The id of the delivery that is planned for a chain."""

        def work(connection: Connection) -> str:
            chain = connection.execute(select(CHAIN).where(CHAIN.c.id == chain_id).with_for_update()).one()
            delivery_id = new_id()
            connection.execute(
                insert(DELIVERY).values(
                    id=delivery_id,
                    idempotency_key=old_key(chain_id, chain.moves, transition),
                    chain_id=chain_id,
                    chain_version=chain.version + 1,
                    transition=transition,
                    from_state=chain.state,
                    final_state=final_state,
                    callback="type",
                    max_attempts=5,
                    status="pending",
                    attempt=0,
                    planned_at=clock_plus(0),
                    next_attempt_at=clock_plus(0),
                    publish_after=clock_plus(0),
                )
            )
            values = {"pending_delivery_id": delivery_id, "version": chain.version + 1, "due_at": None, "failures": 0}
            connection.execute(update(CHAIN).where(CHAIN.c.id == chain_id).values(**values, updated_at=now))
            _event(connection, chain_id, "planned", value=transition, to_state=final_state, now=now)
            return delivery_id

        return self._database.write(work)

    def begin(self, delivery_id: str) -> None:
        """Begin the next attempt."""
        lease = {"lease_until": clock_plus(75), "publish_after": clock_plus(75)}
        self._change(delivery_id, "pending", status="running", attempt=DELIVERY.c.attempt + 1, **lease)

    def defer(self, delivery_id: str, reason: str) -> None:
        """Give a begun attempt back: it may not be called now."""
        waits = {"next_attempt_at": clock_plus(0), "publish_after": clock_plus(0), "lease_until": None}
        back = {"status": "pending", "attempt": DELIVERY.c.attempt - 1, "last_error": f"deferred: {reason}"}
        self._change(delivery_id, "running", **back, **waits)

    def finish(self, delivery_id: str, *, now: datetime) -> None:
        """Record a begun attempt as delivered, and move its chain."""

        def work(connection: Connection) -> None:
            one = connection.execute(select(DELIVERY).where(DELIVERY.c.id == delivery_id).with_for_update()).one()
            assert one.status == "running"
            closed = dict.fromkeys(("lease_until", "next_attempt_at", "publish_after", "kwargs", "context"))
            connection.execute(
                update(DELIVERY)
                .where(DELIVERY.c.id == delivery_id)
                .values(status="delivered", finished_at=clock_plus(0), **closed)
            )
            self._move(connection, one.chain_id, one.transition, one.final_state, now=now)

        self._database.write(work)

    def move(self, chain_id: int, transition: str, to_state: str, *, now: datetime) -> None:
        """Move a chain without a delivery."""
        self._database.write(lambda connection: self._move(connection, chain_id, transition, to_state, now=now))

    def _move(self, connection: Connection, chain_id: int, transition: str, to_state: str, *, now: datetime) -> None:
        from_state = connection.execute(select(CHAIN.c.state).where(CHAIN.c.id == chain_id)).scalar_one()
        values = {"version": CHAIN.c.version + 1, "moves": CHAIN.c.moves + 1, "pending_delivery_id": None}
        moved = update(CHAIN).where(CHAIN.c.id == chain_id).values(**values, state=to_state, due_at=now, updated_at=now)
        connection.execute(moved.values(failures=0, next_update_at=None))
        _event(
            connection,
            chain_id,
            "state_transition",
            from_state=from_state,
            to_state=to_state,
            detail=transition,
            now=now,
        )

    def _change(self, delivery_id: str, before: str, **values: Any) -> None:
        change = update(DELIVERY).where(DELIVERY.c.id == delivery_id, DELIVERY.c.status == before).values(**values)
        assert self._database.write(lambda connection: connection.execute(change).rowcount) == 1


def old_key(chain_id: int, moves: int, transition: str) -> str:
    """The idempotency key that such a program gives."""
    return str(uuid.uuid5(uuid.UUID("6c7e1f0a-6f3c-5f0e-9d53-7b8a3c1e2d40"), f"{chain_id}:{moves}:{transition}"))


def _event(connection: Connection, chain_id: int, action: str, *, now: datetime, **facts: Any) -> None:
    version = connection.execute(select(CHAIN.c.version).where(CHAIN.c.id == chain_id)).scalar_one()
    move_version = version if action == "state_transition" else None
    values = {"chain_id": chain_id, "chain_version": version, "move_version": move_version, "action": action}
    connection.execute(insert(EVENT).values(**values, created_at=now, **facts))
