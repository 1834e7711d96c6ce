"""The tables: chains, their resources, events, deliveries, ticks, types, suppressions and operators' actions.

Timestamps are aware UTC with microseconds. No index contains a chain's `context` or `request`. `version` orders a
chain's history.

Events and deliveries have no foreign key to their chain. Each is written in the transaction of a guarded write of the
chain or of its delivery, so a foreign key would never find an error. Its check would add a fifth to the cost of a plan.
If somebody deletes a chain by hand, the doctor finds the rows that are left.
"""

from datetime import UTC, datetime
from typing import Any, Final, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    false,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator, TypeEngine

from dispatcher.domain.config import MAX_NAME
from dispatcher.domain.resources import MAX_RESOURCE_ID, MAX_RESOURCE_TYPE

MAX_REQUESTED_BY = 255
MAX_SUBJECT = 3 * MAX_RESOURCE_TYPE + 1 + MAX_RESOURCE_ID  # some characters of the type are written as three


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime with microseconds, on databases with and without time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime reached the database layer")
        value = value.astimezone(UTC)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Name(TypeDecorator[str]):
    """A string of at most `length` characters, compared byte by byte on every database, trailing spaces included."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name not in ("mysql", "mariadb"):
            return super().load_dialect_impl(dialect)
        # MySQL and MariaDB have no such collation in common, and a `mysql://` URL may lead to either server.
        collation = "utf8mb4_nopad_bin" if dialect.is_mariadb else "utf8mb4_0900_bin"  # type: ignore[attr-defined]
        return dialect.type_descriptor(mysql.VARCHAR(self.length, charset="utf8mb4", collation=collation))


class Prose(TypeDecorator[str]):
    """Text of any origin, such as an error. What some database cannot store (NUL, surrogates) is replaced."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.TEXT(charset="utf8mb4"))
        return super().load_dialect_impl(dialect)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


def storable(text: str) -> str:
    """`text` with the characters replaced that some database cannot store."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def _name(length: int = MAX_NAME) -> Name:
    return Name(length)


_BIG_ID = BigInteger().with_variant(Integer(), "sqlite")
_JSON = JSON(none_as_null=True)


class Base(DeclarativeBase):
    """The declarative base of all tables here."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class ChainRow(Base):
    """One entity's progress.

    `uid` is made at creation and never reused; a chain from before revision 0002 has none. `runs` is the number of the
    current run, which began at `started_at`; the chain is in its state since `entered_at` (both domain time, NULL only
    where a program from before revision 0002 has created the chain).
    """

    __tablename__ = "chain_dispatcher_chain"

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True, autoincrement=True)
    chain_type: Mapped[str] = mapped_column(_name())
    resource_key: Mapped[str] = mapped_column(_name(64))
    state: Mapped[str] = mapped_column(_name())
    disabled: Mapped[bool] = mapped_column(default=False, server_default=false())
    next_update_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    version: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    wake: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    moves: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    pending_delivery_id: Mapped[str | None] = mapped_column(Uuid(as_uuid=False))
    failures: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime())
    context: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    request: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    uid: Mapped[str | None] = mapped_column(Uuid(as_uuid=False))
    runs: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    entered_at: Mapped[datetime | None] = mapped_column(UtcDateTime())

    __table_args__ = (
        UniqueConstraint("chain_type", "resource_key"),
        Index(
            "ix_chain_dispatcher_chain_due",
            "chain_type",
            "due_at",
            "id",
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
        Index("ix_chain_dispatcher_chain_state", "chain_type", "state", "id"),
        {"sqlite_autoincrement": True},
    )


class ResourceRow(Base):
    """One `(resource_type, resource_id)` of a chain."""

    __tablename__ = "chain_dispatcher_resource"

    chain_id: Mapped[int] = mapped_column(
        _BIG_ID, ForeignKey("chain_dispatcher_chain.id", ondelete="CASCADE"), primary_key=True
    )
    resource_type: Mapped[str] = mapped_column(_name(MAX_RESOURCE_TYPE), primary_key=True)
    resource_id: Mapped[str] = mapped_column(_name(MAX_RESOURCE_ID), primary_key=True)

    __table_args__ = (Index("ix_chain_dispatcher_resource_lookup", "resource_type", "resource_id", "chain_id"),)


class EventRow(Base):
    """One line of a chain's history. `move_version` is `chain_version` for state transitions only, and unique."""

    __tablename__ = "chain_dispatcher_event"

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True, autoincrement=True)
    chain_id: Mapped[int] = mapped_column(_BIG_ID)
    chain_version: Mapped[int] = mapped_column(BigInteger)
    move_version: Mapped[int | None] = mapped_column(BigInteger)
    action: Mapped[str] = mapped_column(_name(32))
    value: Mapped[str | None] = mapped_column(_name())
    from_state: Mapped[str | None] = mapped_column(_name())
    to_state: Mapped[str | None] = mapped_column(_name())
    requested_by: Mapped[str | None] = mapped_column(_name(MAX_REQUESTED_BY))
    detail: Mapped[str | None] = mapped_column(Prose())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())

    __table_args__ = (
        Index(
            "ix_chain_dispatcher_event_move",
            "chain_id",
            "move_version",
            unique=True,
            postgresql_where=text("move_version IS NOT NULL"),
            sqlite_where=text("move_version IS NOT NULL"),
        ),
        Index("ix_chain_dispatcher_event_chain", "chain_id", "id"),
        Index("ix_chain_dispatcher_event_created", "created_at", "id"),
        {"sqlite_autoincrement": True},
    )


class DeliveryRow(Base):
    """One callback owed for one planned transition.

    `attempt` counts the attempts begun. `publish_after` is when the relay looks at the row: for a pending one the
    moment from which its message counts as lost, for a running one the end of its lease; NULL when the relay
    has nothing to do; a pending one is then parked (its chain is disabled, or its type is paused). `unknown` says that
    an attempt died and its effect may or may not have taken place.

    `begins` counts the begins and never goes back, as `attempt` does when an attempt is given back; NULL in deliveries
    from before revision 0002. `waits_for` is what a pending delivery waits for (a `WaitsFor`; NULL: only for a worker),
    `waits_reason` the same for people, `has_place` whether it has a place in the line of a rate limit. `waits_since` is
    when the wait (or the lease) began, by the database's clock. `rest_until` is the rest that the plan asked for.
    `request` is the request that the plan took, without its context and kwargs, which have columns of their own.
    `lapse_seen_at` is when a relay first saw that the lease had expired; NULL again with each renewal. `called_off`
    says that the last look has cancelled the delivery.

    `next_attempt_at` is, for a pending delivery, when its next attempt may begin, and for a running one, when its
    attempt began. `uncalled` is the number of the begin (see `begins`) whose callback has certainly not been called
    yet. With NULL or another number the callback may have been called. (A program from before revision 0003 does not
    write it, so that its begins are never taken for uncalled ones.)
    """

    __tablename__ = "chain_dispatcher_delivery"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(Uuid(as_uuid=False))
    chain_id: Mapped[int] = mapped_column(_BIG_ID)
    chain_version: Mapped[int] = mapped_column(BigInteger)
    transition: Mapped[str] = mapped_column(_name())
    from_state: Mapped[str] = mapped_column(_name())
    final_state: Mapped[str] = mapped_column(_name())
    callback: Mapped[str] = mapped_column(_name(MAX_NAME + 10))
    status: Mapped[str] = mapped_column(_name(16))
    attempt: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    max_attempts: Mapped[int] = mapped_column(Integer)
    unknown: Mapped[bool] = mapped_column(default=False, server_default=false())
    next_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    publish_after: Mapped[datetime | None] = mapped_column(UtcDateTime())
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime())
    planned_at: Mapped[datetime] = mapped_column(UtcDateTime())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    requested_by: Mapped[str | None] = mapped_column(_name(MAX_REQUESTED_BY))
    last_error: Mapped[str | None] = mapped_column(Prose())
    kwargs: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    context: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    begins: Mapped[int | None] = mapped_column(Integer)
    waits_for: Mapped[str | None] = mapped_column(_name(16))
    waits_reason: Mapped[str | None] = mapped_column(Prose())
    waits_since: Mapped[datetime | None] = mapped_column(UtcDateTime())
    has_place: Mapped[bool] = mapped_column(default=False, server_default=false())
    rest_until: Mapped[datetime | None] = mapped_column(UtcDateTime())
    request: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    lapse_seen_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    called_off: Mapped[bool] = mapped_column(default=False, server_default=false())
    uncalled: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (
        UniqueConstraint("chain_id", "chain_version"),
        Index(
            # `waits_since` stands last, so that waits which began in the future are found in the index alone.
            "ix_chain_dispatcher_delivery_relay",
            "publish_after",
            "id",
            "waits_since",
            postgresql_where=text("publish_after IS NOT NULL"),
            sqlite_where=text("publish_after IS NOT NULL"),
        ),
        # Not on the status alone. PostgreSQL may use a query plan from a time when few deliveries ran. With such an
        # index that plan would read all running deliveries, instead of looking up one delivery by its id.
        Index(
            "ix_chain_dispatcher_delivery_status",
            "status",
            "id",
            postgresql_where=text("finished_at IS NULL"),
            sqlite_where=text("finished_at IS NULL"),
        ),
        Index(
            "ix_chain_dispatcher_delivery_finished",
            "finished_at",
            "id",
            postgresql_where=text("finished_at IS NOT NULL"),
            sqlite_where=text("finished_at IS NOT NULL"),
        ),
    )


class TickRow(Base):
    """When a periodic pass last began, and where it stopped if its time ended."""

    __tablename__ = "chain_dispatcher_tick"

    name: Mapped[str] = mapped_column(_name(50), primary_key=True)
    last_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    position: Mapped[dict[str, Any] | None] = mapped_column(_JSON)


class TypeRow(Base):
    """What the deployment remembers of a chain type: whether it is paused, and the fingerprints of its states."""

    __tablename__ = "chain_dispatcher_type"

    name: Mapped[str] = mapped_column(_name(), primary_key=True)
    paused: Mapped[bool] = mapped_column(default=False, server_default=false())
    paused_reason: Mapped[str | None] = mapped_column(Prose())
    fingerprints: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    window_at: Mapped[datetime | None] = mapped_column(UtcDateTime())
    window_plans: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    chains_estimate: Mapped[int | None] = mapped_column(BigInteger)
    estimated_at: Mapped[datetime | None] = mapped_column(UtcDateTime())


class SuppressionRow(Base):
    """A resource for which nothing may begin: in one chain type, or in every type (`chain_type` is empty)."""

    __tablename__ = "chain_dispatcher_suppression"

    resource_type: Mapped[str] = mapped_column(_name(MAX_RESOURCE_TYPE), primary_key=True)
    resource_id: Mapped[str] = mapped_column(_name(MAX_RESOURCE_ID), primary_key=True)
    chain_type: Mapped[str] = mapped_column(_name(), primary_key=True)
    reason: Mapped[str | None] = mapped_column(Prose())
    requested_by: Mapped[str | None] = mapped_column(_name(MAX_REQUESTED_BY))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())


class ActionRow(Base):
    """What an operator did to a chain type or a resource: who, why and when. (Acts on chains are events.)"""

    __tablename__ = "chain_dispatcher_action"

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True, autoincrement=True)
    subject_kind: Mapped[str] = mapped_column(_name(16))
    subject: Mapped[str] = mapped_column(_name(MAX_SUBJECT))
    action: Mapped[str] = mapped_column(_name(32))
    requested_by: Mapped[str | None] = mapped_column(_name(MAX_REQUESTED_BY))
    reason: Mapped[str | None] = mapped_column(Prose())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())

    __table_args__ = (
        Index("ix_chain_dispatcher_action_subject", "subject_kind", "subject", "id"),
        Index("ix_chain_dispatcher_action_created", "created_at", "id"),
        {"sqlite_autoincrement": True},
    )


# The tables of the classes. Statements use these and not the ORM, because the ORM is slow and adds nothing there.
CHAIN: Final = cast("Table", ChainRow.__table__)
RESOURCE: Final = cast("Table", ResourceRow.__table__)
EVENT: Final = cast("Table", EventRow.__table__)
DELIVERY: Final = cast("Table", DeliveryRow.__table__)
TYPE: Final = cast("Table", TypeRow.__table__)
ACTION: Final = cast("Table", ActionRow.__table__)
