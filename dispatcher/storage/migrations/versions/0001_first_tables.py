"""The first tables: chain, resource, event, delivery, tick, type.

Names and types stand here in full, because the models go on changing and this revision does not.
"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


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


def upgrade() -> None:
    op.create_table(
        "chain_dispatcher_chain",
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("chain_type", _name(), nullable=False),
        sa.Column("resource_key", _name(64), nullable=False),
        sa.Column("state", _name(), nullable=False),
        sa.Column("disabled", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("next_update_at", _utc()),
        sa.Column("due_at", _utc()),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("wake", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("moves", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("pending_delivery_id", sa.Uuid()),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", _utc(), nullable=False),
        sa.Column("updated_at", _utc(), nullable=False),
        sa.Column("context", sa.JSON()),
        sa.Column("request", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_dispatcher_chain")),
        sa.UniqueConstraint(
            "chain_type", "resource_key", name=op.f("uq_chain_dispatcher_chain_chain_type_resource_key")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_chain_dispatcher_chain_due",
        "chain_dispatcher_chain",
        ["chain_type", "due_at", "id"],
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    )
    op.create_index("ix_chain_dispatcher_chain_state", "chain_dispatcher_chain", ["chain_type", "state", "id"])

    op.create_table(
        "chain_dispatcher_resource",
        sa.Column("chain_id", _big_id(), nullable=False),
        sa.Column("resource_type", _name(), nullable=False),
        sa.Column("resource_id", _name(255), nullable=False),
        sa.PrimaryKeyConstraint("chain_id", "resource_type", "resource_id", name=op.f("pk_chain_dispatcher_resource")),
        sa.ForeignKeyConstraint(
            ["chain_id"],
            ["chain_dispatcher_chain.id"],
            name=op.f("fk_chain_dispatcher_resource_chain_id"),
            ondelete="CASCADE",
        ),
    )
    op.create_index(
        "ix_chain_dispatcher_resource_lookup",
        "chain_dispatcher_resource",
        ["resource_type", "resource_id", "chain_id"],
    )

    op.create_table(
        "chain_dispatcher_event",
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
        sa.CheckConstraint(
            "action IN ('created', 'state_transition', 'planned', 'cancelled', 'dead', 'held', 'retried', 'skipped', "
            "'disabled', 'enabled', 'reset', 'moved', 'mapped', 'request_replaced', 'no_callback', "
            "'unknown_definition', 'guard_failed')",
            name=op.f("ck_chain_dispatcher_event_action"),
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_chain_dispatcher_event_move",
        "chain_dispatcher_event",
        ["chain_id", "move_version"],
        unique=True,
        postgresql_where=sa.text("move_version IS NOT NULL"),
        sqlite_where=sa.text("move_version IS NOT NULL"),
    )
    op.create_index("ix_chain_dispatcher_event_chain", "chain_dispatcher_event", ["chain_id", "id"])
    op.create_index("ix_chain_dispatcher_event_created", "chain_dispatcher_event", ["created_at", "id"])

    op.create_table(
        "chain_dispatcher_delivery",
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
        sa.CheckConstraint(
            "status IN ('pending', 'running', 'delivered', 'cancelled', 'dead', 'held', 'skipped')",
            name=op.f("ck_chain_dispatcher_delivery_status"),
        ),
    )
    op.create_index(
        "ix_chain_dispatcher_delivery_relay",
        "chain_dispatcher_delivery",
        ["publish_after", "id"],
        postgresql_where=sa.text("publish_after IS NOT NULL"),
        sqlite_where=sa.text("publish_after IS NOT NULL"),
    )
    op.create_index(
        "ix_chain_dispatcher_delivery_status",
        "chain_dispatcher_delivery",
        ["status", "id"],
        postgresql_where=sa.text("finished_at IS NULL"),
        sqlite_where=sa.text("finished_at IS NULL"),
    )
    op.create_index(
        "ix_chain_dispatcher_delivery_finished",
        "chain_dispatcher_delivery",
        ["finished_at", "id"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    )

    op.create_table(
        "chain_dispatcher_tick",
        sa.Column("name", _name(50), nullable=False),
        sa.Column("last_at", _utc()),
        sa.Column("position", sa.JSON()),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chain_dispatcher_tick")),
    )

    op.create_table(
        "chain_dispatcher_type",
        sa.Column("name", _name(), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("paused_reason", _prose()),
        sa.Column("fingerprints", sa.JSON()),
        sa.Column("window_at", _utc()),
        sa.Column("window_plans", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("chains_estimate", sa.BigInteger()),
        sa.Column("estimated_at", _utc()),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chain_dispatcher_type")),
    )


def downgrade() -> None:
    for table in ("type", "tick", "delivery", "event", "resource", "chain"):
        op.drop_table(f"chain_dispatcher_{table}")
