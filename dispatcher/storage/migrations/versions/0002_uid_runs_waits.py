"""Chains get an identity and runs, deliveries say what they wait for; tables for suppressions and operators' actions.

Programs from before this revision must not work beside it (`migrations.revisions.STOP_WORKERS`): they would let
`entered_at` stand still, give other idempotency keys, and write waits into `last_error`.

The closed sets of actions and statuses are not CHECK constraints any more, because another action would rewrite the
largest table. Names and types stand here in full, because the models go on changing and this revision does not.

On MySQL and MariaDB each change of a table commits, so an interrupted upgrade leaves a part of this done. Each step
therefore looks first whether it is done, and the upgrade can be run again.
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
_RELAY_INDEX: Final = "ix_chain_dispatcher_delivery_relay"
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


def _now() -> sa.Inspector:
    """What is in the database at this moment."""
    return sa.inspect(op.get_bind())


def _missing(table: str, *columns: sa.Column[Any]) -> list[sa.Column[Any]]:
    found = {column["name"] for column in _now().get_columns(table)}
    return [column for column in columns if column.name not in found]


def _has_check(table: str, name: str) -> bool:
    return any(check["name"] == name for check in _now().get_check_constraints(table))


def _index_columns(table: str, name: str) -> list[str | None]:
    return next((index["column_names"] for index in _now().get_indexes(table) if index["name"] == name), [])


def _create_table(name: str, *parts: Any, **options: Any) -> None:
    if not _now().has_table(name):
        op.create_table(name, *parts, **options)


def _create_index(name: str, table: str, columns: list[str], **options: Any) -> None:
    if not _index_columns(table, name):
        op.create_index(name, table, columns, **options)


def upgrade() -> None:
    _widen_chains()
    _widen_events()
    _widen_deliveries()
    _read_waits_from_errors()
    _create_table(
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
    _create_table(
        "chain_dispatcher_action",
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("subject_kind", _name(16), nullable=False),
        sa.Column("subject", _name(556), nullable=False),
        sa.Column("action", _name(32), nullable=False),
        sa.Column("requested_by", _name(255)),
        sa.Column("reason", _prose()),
        sa.Column("created_at", _utc(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_dispatcher_action")),
        sqlite_autoincrement=True,
    )
    _create_index("ix_chain_dispatcher_action_subject", "chain_dispatcher_action", ["subject_kind", "subject", "id"])
    _create_index("ix_chain_dispatcher_action_created", "chain_dispatcher_action", ["created_at", "id"])


def _widen_chains() -> None:
    # Column by column. A new copy of the table would be needed for nothing, and dropping the old one would delete the
    # resources on SQLite (ON DELETE CASCADE).
    for column in _missing(
        "chain_dispatcher_chain",
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
    if _has_check(before.name, "ck_chain_dispatcher_event_action"):
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
    columns = _missing(
        before.name,
        sa.Column("begins", sa.Integer()),
        sa.Column("waits_for", _name(16)),
        sa.Column("waits_reason", _prose()),
        sa.Column("waits_since", _utc()),
        sa.Column("has_place", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("rest_until", _utc()),
        sa.Column("request", sa.JSON()),
        sa.Column("lapse_seen_at", _utc()),
        sa.Column("called_off", sa.Boolean(), server_default=sa.false(), nullable=False),
    )
    if _index_columns(before.name, _RELAY_INDEX) == ["publish_after", "id"]:
        op.drop_index(_RELAY_INDEX, before.name)
    with op.batch_alter_table(before.name, copy_from=before) as table:
        if _has_check(before.name, "ck_chain_dispatcher_delivery_status"):
            table.drop_constraint(op.f("ck_chain_dispatcher_delivery_status"), type_="check")
        for column in columns:
            table.add_column(column)
    _create_index(
        _RELAY_INDEX,
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
        delivery.c.waits_for.is_(None),
        sa.or_(*(delivery.c.last_error.startswith(prefix, autoescape=True) for prefix, _, _ in _WAITS)),
    )
    change = (
        delivery.update()
        .where(delivery.c.id == sa.bindparam("waiting"))
        .values(
            {name: sa.bindparam(f"new_{name}") for name in ("last_error", "waits_for", "waits_reason", "has_place")}
        )
    )
    page = waiting.order_by(delivery.c.id).limit(_PAGE)
    rows = connection.execute(page).all()
    while rows:
        found = [(row.id, _wait_of(row.last_error)) for row in rows]
        if changes := [{"waiting": delivery_id, **wait} for delivery_id, wait in found if wait is not None]:
            connection.execute(change, changes)
        rows = connection.execute(page.where(delivery.c.id > rows[-1].id)).all()


_DEFERRED: Final = "deferred: "
_WAITS: Final = (
    (f"{_DEFERRED}rate limit ", "rate", True),
    (f"{_DEFERRED}the line of rate limit ", "rate", False),
    (f"{_DEFERRED}Redis, which counts ", "rate", False),
    (f"{_DEFERRED}delivery hours ", "hours", False),
    ("unknown definition: ", "definition", False),
)
"""How the texts began, what the delivery waited for, and whether it had a place in a line."""


def _wait_of(text: str) -> dict[str, Any] | None:
    """The columns of a delivery with this last error; None if it is an error and no wait.

    LIKE ignores case on SQLite and MariaDB, so the query gives errors that only look like a wait.
    """
    known = [(wait, place) for prefix, wait, place in _WAITS if text.startswith(prefix)]
    if not known:
        return None
    waits_for, has_place = known[0]
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
    op.drop_index(_RELAY_INDEX, "chain_dispatcher_delivery")
    for name in (
        "called_off",
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
        _RELAY_INDEX,
        "chain_dispatcher_delivery",
        ["publish_after", "id"],
        **_where("publish_after IS NOT NULL"),
    )
    for name in ("entered_at", "started_at", "runs", "uid"):
        op.drop_column("chain_dispatcher_chain", name)
