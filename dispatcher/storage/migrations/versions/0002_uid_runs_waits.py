"""Chains get an identity and runs, deliveries say what they wait for; tables for suppressions and operators' actions.

Programs from before this revision must not work beside it (`migrations.revisions.STOP_WORKERS`): they would let
`entered_at` stand still, give other idempotency keys, and write waits into `last_error`.

The closed sets of actions and statuses are not CHECK constraints any more, because another action would rewrite the
largest table. Names and types stand here in full, because the models go on changing and this revision does not.
"""

from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_PAGE: Final = 1000
_ENTERED: Final = ("created", "state_transition", "reset", "moved")
"""The actions that bring a chain into a state. (`mapped` renames the state in which the chain is.)"""


def _name(length: int = 100) -> TypeEngine[str]:
    # Byte by byte, trailing spaces included: the two servers have no such collation in common.
    collation = "utf8mb4_nopad_bin" if getattr(op.get_bind().dialect, "is_mariadb", False) else "utf8mb4_0900_bin"
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation=collation)
    return sa.String(length).with_variant(binary, "mysql", "mariadb")


def _prose() -> TypeEngine[str]:
    return sa.Text().with_variant(mysql.TEXT(charset="utf8mb4"), "mysql", "mariadb")


def _big_id() -> TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _utc() -> TypeEngine[datetime]:
    return sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    _widen_chains()
    _widen_events()
    _widen_deliveries()
    _read_waits_from_errors()
    op.create_table(
        "chain_dispatcher_suppression",
        sa.Column("resource_type", _name(), nullable=False),
        sa.Column("resource_id", _name(255), nullable=False),
        sa.Column("chain_type", _name(), nullable=False),
        sa.Column("reason", _prose()),
        sa.Column("requested_by", _name(255)),
        sa.Column("created_at", _utc(), nullable=False),
        sa.PrimaryKeyConstraint(
            "resource_type", "resource_id", "chain_type", name=op.f("pk_chain_dispatcher_suppression")
        ),
    )
    op.create_table(
        "chain_dispatcher_action",
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("subject_kind", _name(16), nullable=False),
        sa.Column("subject", _name(356), nullable=False),
        sa.Column("action", _name(32), nullable=False),
        sa.Column("requested_by", _name(255)),
        sa.Column("reason", _prose()),
        sa.Column("created_at", _utc(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_dispatcher_action")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_chain_dispatcher_action_subject", "chain_dispatcher_action", ["subject_kind", "subject", "id"])
    op.create_index("ix_chain_dispatcher_action_created", "chain_dispatcher_action", ["created_at", "id"])


def _widen_chains() -> None:
    # Column by column. A new copy of the table would be needed for nothing, and dropping the old one would delete the
    # resources on SQLite (ON DELETE CASCADE).
    for column in (
        sa.Column("uid", sa.Uuid()),
        sa.Column("runs", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("started_at", _utc()),
        sa.Column("entered_at", _utc()),
    ):
        op.add_column("chain_dispatcher_chain", column)
    chain = sa.table(
        "chain_dispatcher_chain", *map(sa.column, ("id", "created_at", "updated_at", "started_at", "entered_at"))
    )
    event = sa.table("chain_dispatcher_event", *map(sa.column, ("id", "chain_id", "action", "created_at")))
    newest = (
        sa.select(event.c.created_at)
        .where(event.c.chain_id == chain.c.id, event.c.action.in_(_ENTERED))
        .order_by(event.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    op.execute(
        chain.update().values(started_at=chain.c.created_at, entered_at=sa.func.coalesce(newest, chain.c.updated_at))
    )


def _widen_events() -> None:
    before = sa.Table(
        "chain_dispatcher_event",
        sa.MetaData(),
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("chain_id", _big_id(), nullable=False),
        sa.Column("chain_version", sa.BigInteger(), nullable=False),
        sa.Column("move_version", sa.BigInteger()),
        sa.Column("action", _name(32), nullable=False),
        sa.Column("value", _name()),
        sa.Column("from_state", _name()),
        sa.Column("to_state", _name()),
        sa.Column("requested_by", _name(255)),
        sa.Column("detail", _prose()),
        sa.Column("created_at", _utc(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_dispatcher_event")),
        sa.CheckConstraint("", name=op.f("ck_chain_dispatcher_event_action")),
        sa.Index(
            "ix_chain_dispatcher_event_move",
            "chain_id",
            "move_version",
            unique=True,
            **_where("move_version IS NOT NULL"),
        ),
        sa.Index("ix_chain_dispatcher_event_chain", "chain_id", "id"),
        sa.Index("ix_chain_dispatcher_event_created", "created_at", "id"),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table(before.name, copy_from=before) as table:
        table.drop_constraint(op.f("ck_chain_dispatcher_event_action"), type_="check")


def _widen_deliveries() -> None:
    before = sa.Table(
        "chain_dispatcher_delivery",
        sa.MetaData(),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("idempotency_key", sa.Uuid(), nullable=False),
        sa.Column("chain_id", _big_id(), nullable=False),
        sa.Column("chain_version", sa.BigInteger(), nullable=False),
        sa.Column("transition", _name(), nullable=False),
        sa.Column("from_state", _name(), nullable=False),
        sa.Column("final_state", _name(), nullable=False),
        sa.Column("callback", _name(110), nullable=False),
        sa.Column("status", _name(16), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("unknown", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("next_attempt_at", _utc()),
        sa.Column("publish_after", _utc()),
        sa.Column("lease_until", _utc()),
        sa.Column("planned_at", _utc(), nullable=False),
        sa.Column("finished_at", _utc()),
        sa.Column("requested_by", _name(255)),
        sa.Column("last_error", _prose()),
        sa.Column("kwargs", sa.JSON()),
        sa.Column("context", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_dispatcher_delivery")),
        sa.UniqueConstraint(
            "chain_id", "chain_version", name=op.f("uq_chain_dispatcher_delivery_chain_id_chain_version")
        ),
        sa.CheckConstraint("", name=op.f("ck_chain_dispatcher_delivery_status")),
        sa.Index("ix_chain_dispatcher_delivery_status", "status", "id", **_where("finished_at IS NULL")),
        sa.Index("ix_chain_dispatcher_delivery_finished", "finished_at", "id", **_where("finished_at IS NOT NULL")),
    )
    op.drop_index("ix_chain_dispatcher_delivery_relay", before.name)
    with op.batch_alter_table(before.name, copy_from=before) as table:
        table.drop_constraint(op.f("ck_chain_dispatcher_delivery_status"), type_="check")
        table.add_column(sa.Column("begins", sa.Integer()))
        table.add_column(sa.Column("waits_for", _name(16)))
        table.add_column(sa.Column("waits_reason", _prose()))
        table.add_column(sa.Column("waits_since", _utc()))
        table.add_column(sa.Column("has_place", sa.Boolean(), server_default=sa.false(), nullable=False))
        table.add_column(sa.Column("rest_until", _utc()))
        table.add_column(sa.Column("request", sa.JSON()))
        table.add_column(sa.Column("lapse_seen_at", _utc()))
    op.create_index(
        "ix_chain_dispatcher_delivery_relay",
        before.name,
        ["publish_after", "id", "waits_since"],
        **_where("publish_after IS NOT NULL"),
    )


def _read_waits_from_errors() -> None:
    """What pending deliveries wait for stood in their last error, before the error itself."""
    delivery = sa.table(
        "chain_dispatcher_delivery",
        sa.column("id", sa.Uuid()),
        sa.column("status", sa.String()),
        sa.column("last_error", sa.Text()),
        sa.column("waits_for", sa.String()),
        sa.column("waits_reason", sa.Text()),
        sa.column("has_place", sa.Boolean()),
    )
    connection = op.get_bind()
    waiting = sa.select(delivery.c.id, delivery.c.last_error).where(
        delivery.c.status == "pending",
        sa.or_(*(delivery.c.last_error.startswith(prefix, autoescape=True) for prefix, _, _ in _WAITS)),
    )
    changes = [{"waiting": row.id, **_wait_of(row.last_error)} for row in connection.execute(waiting)]
    change = (
        delivery.update()
        .where(delivery.c.id == sa.bindparam("waiting"))
        .values(
            {name: sa.bindparam(f"new_{name}") for name in ("last_error", "waits_for", "waits_reason", "has_place")}
        )
    )
    for start in range(0, len(changes), _PAGE):
        connection.execute(change, changes[start : start + _PAGE])


_DEFERRED: Final = "deferred: "
_WAITS: Final = (
    (f"{_DEFERRED}rate limit ", "rate", True),
    (f"{_DEFERRED}the line of rate limit ", "rate", False),
    (f"{_DEFERRED}Redis, which counts ", "rate", False),
    (f"{_DEFERRED}delivery hours ", "hours", False),
    ("unknown definition: '", "definition", False),
)
"""How the texts began, what the delivery waited for, and whether it had a place in a line."""


def _wait_of(text: str) -> dict[str, Any]:
    waits_for, has_place = next((wait, place) for prefix, wait, place in _WAITS if text.startswith(prefix))
    reason, _, error = text.removeprefix(_DEFERRED).partition("; before: ")
    return {
        "new_waits_for": waits_for,
        "new_waits_reason": reason,
        "new_has_place": has_place,
        "new_last_error": error or None,
    }


def downgrade() -> None:
    """Take the columns and tables away again; the CHECK constraints do not come back."""
    op.drop_table("chain_dispatcher_action")
    op.drop_table("chain_dispatcher_suppression")
    op.drop_index("ix_chain_dispatcher_delivery_relay", "chain_dispatcher_delivery")
    for name in (
        "lapse_seen_at",
        "request",
        "rest_until",
        "has_place",
        "waits_since",
        "waits_reason",
        "waits_for",
        "begins",
    ):
        op.drop_column("chain_dispatcher_delivery", name)
    op.create_index(
        "ix_chain_dispatcher_delivery_relay",
        "chain_dispatcher_delivery",
        ["publish_after", "id"],
        **_where("publish_after IS NOT NULL"),
    )
    for name in ("entered_at", "started_at", "runs", "uid"):
        op.drop_column("chain_dispatcher_chain", name)
