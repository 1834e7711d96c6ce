"""How rows become values: the columns to read are the fields of the values, and everything is decoded by name.

JSON is read as text and decoded here, row by row. A driver would decode while it fetches, so that one row that cannot
be decoded would take all others of its statement with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from sqlalchemy import JSON, Column, ColumnElement, RowMapping, Table, Text, Uuid
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from dispatcher.domain.records import ChainEvent, ChainRecord, DeliveryRecord, Request
from dispatcher.domain.resources import Resource
from dispatcher.domain.unreadable import json_object
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT, UtcDateTime

Values: TypeAlias = Mapping[str, Any] | RowMapping
"""A row by column name, from a driver or from SQLAlchemy."""

CHAIN_FIELDS: Final = tuple(name for name in ChainRecord.__dataclass_fields__ if name != "resources")
"""The columns of a chain that are read."""

DELIVERY_FIELDS: Final = tuple(DeliveryRecord.__dataclass_fields__)
"""The columns of a delivery that are read."""

_PAYLOAD: Final = ("kwargs", "context", "request")

LIGHT_DELIVERY_FIELDS: Final = tuple(name for name in DELIVERY_FIELDS if name not in _PAYLOAD)
"""These columns without those for the callback."""

EVENT_FIELDS: Final = tuple(ChainEvent.__dataclass_fields__)
"""The columns of an event that are read."""

# In rows that hold a chain and its delivery the chain's columns have a prefix, because both have an id and a context.
CHAIN_PREFIX: Final = "chain__"
RESOURCES: Final = "resources"
MACHINE_NOW: Final = "machine_now"

_CHAIN_LABELS: Final = tuple((name, f"{CHAIN_PREFIX}{name}") for name in CHAIN_FIELDS)


def chain_columns() -> list[ColumnElement[Any]]:
    """The columns to select for `chain_of`."""
    return [json_text(CHAIN.c[name]).label(label) for name, label in _CHAIN_LABELS]


def delivery_columns() -> list[ColumnElement[Any]]:
    """The columns to select for `delivery_of`."""
    return [json_text(DELIVERY.c[name]).label(name) for name in DELIVERY_FIELDS]


def light_delivery_columns() -> list[Column[Any]]:
    """The columns to select for a `delivery_of` that has no kwargs and no context."""
    return [DELIVERY.c[name] for name in LIGHT_DELIVERY_FIELDS]


def event_columns() -> list[Column[Any]]:
    """The columns to select for `event_of`."""
    return [EVENT.c[name] for name in EVENT_FIELDS]


class _JsonText(FunctionElement[str]):
    """The text of a JSON column."""

    type = Text()
    inherit_cache = True


@compiles(_JsonText)
def _in_sql(element: _JsonText, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)  # a text already, or the driver gives it as one


@compiles(_JsonText, "postgresql")
def _in_postgresql(element: _JsonText, compiler: SQLCompiler, **options: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **options)} AS TEXT)"


def json_text(column: Column[Any]) -> ColumnElement[Any]:
    """A JSON column as its text; any other column as it is."""
    return _JsonText(column) if isinstance(column.type, JSON) else column


def chain_list(alias: str) -> str:
    """What a statement in the driver's words selects for `chain_of`; the table is called `alias`."""
    return ", ".join(f"{_raw(CHAIN, name, alias)} AS {label}" for name, label in _CHAIN_LABELS)


def delivery_list(alias: str) -> str:
    """What a statement in the driver's words selects for `delivery_of`; the table is called `alias`."""
    return ", ".join(f"{_raw(DELIVERY, name, alias)} AS {name}" for name in DELIVERY_FIELDS)


def chain_of(row: Values, resources: Iterable[Sequence[str]]) -> ChainRecord:
    """The chain in a row of `chain_columns` or `chain_list`, with its resources."""
    values = {name: row[label] for name, label in _CHAIN_LABELS}
    values["context"] = json_object(values["context"], "context")
    values["request"] = Request.from_json(json_object(values["request"], "request"))
    values["resources"] = tuple(sorted((kind, identity) for kind, identity in resources))
    # A program from before revision 0002 creates chains without these.
    if values["started_at"] is None:
        values["started_at"] = values["created_at"]
    if values["entered_at"] is None:
        values["entered_at"] = values["updated_at"]
    return ChainRecord(**_in_utc(values, CHAIN))


def delivery_of(row: Values) -> DeliveryRecord:
    """The delivery in a row of `delivery_columns` or `delivery_list`; of `light_delivery_columns`: without payload."""
    values = {name: row[name] for name in LIGHT_DELIVERY_FIELDS}
    for name in _PAYLOAD:
        values[name] = json_object(row.get(name), name)
    return DeliveryRecord(**_in_utc(values, DELIVERY))


def event_of(row: Values) -> ChainEvent:
    """The event in a row of `event_columns`."""
    return ChainEvent(**{name: row[name] for name in EVENT_FIELDS})


def chains_of(rows: Iterable[Values]) -> dict[int, ChainRecord]:
    """The chains by id, in rows of `chain_columns` and a resource's `resource_type` and `resource_id`."""
    first: dict[int, Values] = {}
    resources: dict[int, list[Resource]] = {}
    for row in rows:
        chain_id = row[f"{CHAIN_PREFIX}id"]
        first.setdefault(chain_id, row)
        pairs = resources.setdefault(chain_id, [])
        if row["resource_id"] is not None:
            pairs.append((row["resource_type"], row["resource_id"]))
    return {chain_id: chain_of(row, resources[chain_id]) for chain_id, row in first.items()}


_MOMENTS: Final = {
    table.name: tuple(column.name for column in table.columns if isinstance(column.type, UtcDateTime))
    for table in (CHAIN, DELIVERY)
}


def _in_utc(values: dict[str, Any], table: Table) -> dict[str, Any]:
    """`values` with its moments in UTC: a driver gives them in the session's time zone."""
    for name in _MOMENTS[table.name]:
        moment: datetime | None = values.get(name)
        if moment is not None and moment.tzinfo is not UTC:
            values[name] = moment.astimezone(UTC)
    return values


def _raw(table: Table, name: str, alias: str) -> str:
    as_text = "::text" if isinstance(table.c[name].type, JSON | Uuid) else ""
    return f"{alias}.{name}{as_text}"
