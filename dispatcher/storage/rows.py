"""How rows become values: the columns to read are the fields of the values, and everything is decoded by name.

JSON is read as text and decoded here, row by row. A driver would decode while it fetches, so that one row that cannot
be decoded would take all others of its statement with it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias

from sqlalchemy import JSON, Column, ColumnElement, CursorResult, Table, Text, Uuid
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from dispatcher.domain.records import ChainEvent, ChainRecord, DeliveryRecord, Request
from dispatcher.domain.resources import Resource
from dispatcher.domain.unreadable import json_object
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT, UtcDateTime

Row: TypeAlias = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Found:
    """The rows that a statement gave: the names of the columns, and of each row the values in the same order."""

    names: tuple[str, ...]
    rows: Sequence[Row]

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        place = self.names.index(name)
        return [row[place] for row in self.rows]


def found_of(result: CursorResult[Any]) -> Found:
    """The rows of a result of SQLAlchemy."""
    return Found(tuple(result.keys()), result.all())


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
_LABELS: Final = tuple(label for _, label in _CHAIN_LABELS)


def chain_columns() -> list[ColumnElement[Any]]:
    """The columns to select for `chains_of` and `joined_chains_of`."""
    return [json_text(CHAIN.c[name]).label(label) for name, label in _CHAIN_LABELS]


def delivery_columns() -> list[ColumnElement[Any]]:
    """The columns to select for `deliveries_of`."""
    return [json_text(DELIVERY.c[name]).label(name) for name in DELIVERY_FIELDS]


def light_delivery_columns() -> list[Column[Any]]:
    """The columns to select for `light_deliveries_of`."""
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
    """What a statement in the driver's words selects for `chains_of`; the table is called `alias`."""
    return ", ".join(f"{_raw(CHAIN, name, alias)} AS {label}" for name, label in _CHAIN_LABELS)


def delivery_list(alias: str) -> str:
    """What a statement in the driver's words selects for `deliveries_of`; the table is called `alias`."""
    return ", ".join(f"{_raw(DELIVERY, name, alias)} AS {name}" for name in DELIVERY_FIELDS)


def chains_of(found: Found) -> list[ChainRecord]:
    """The chains in rows of `chain_list`, a row for each chain with its resources in the column `RESOURCES`."""
    pick, resources = _picker(found.names, _LABELS), found.names.index(RESOURCES)
    return [_chain(pick(row), [(kind, identity) for kind, identity in row[resources]]) for row in found.rows]


def joined_chains_of(found: Found) -> dict[int, ChainRecord]:
    """The chains by id, in rows of `chain_columns` and of a resource: a row for each resource of each chain."""
    pick = _picker(found.names, _LABELS)
    resource = _picker(found.names, (f"{CHAIN_PREFIX}id", "resource_type", "resource_id"))
    first: dict[int, Row] = {}
    resources: dict[int, list[Resource]] = {}
    for row in found.rows:
        chain_id, kind, identity = resource(row)
        first.setdefault(chain_id, row)
        pairs = resources.setdefault(chain_id, [])
        if identity is not None:
            pairs.append((kind, identity))
    return {chain_id: _chain(pick(row), resources[chain_id]) for chain_id, row in first.items()}


def deliveries_of(found: Found) -> list[DeliveryRecord]:
    """The deliveries in rows of `delivery_columns` or `delivery_list`."""
    return [_delivery(values) for values in map(_picker(found.names, DELIVERY_FIELDS), found.rows)]


def light_deliveries_of(found: Found) -> list[DeliveryRecord]:
    """The deliveries in rows of `light_delivery_columns`, without their payload."""
    pick, without = _picker(found.names, LIGHT_DELIVERY_FIELDS), (None,) * len(_PAYLOAD)
    arrange = _picker((*LIGHT_DELIVERY_FIELDS, *_PAYLOAD), DELIVERY_FIELDS)
    return [_delivery(arrange((*pick(row), *without))) for row in found.rows]


def events_of(found: Found) -> list[ChainEvent]:
    """The events in rows of `event_columns`."""
    return [ChainEvent(*values) for values in map(_picker(found.names, EVENT_FIELDS), found.rows)]


@lru_cache(maxsize=100)
def _picker(names: tuple[str, ...], wanted: tuple[str, ...]) -> Callable[[Row], tuple[Any, ...]]:
    """Picks the wanted columns out of a row whose columns have these names. (Per row it is much faster than a dict.)"""
    return itemgetter(*(names.index(name) for name in wanted))


def _places(table: Table, fields: Sequence[str], kind: type) -> tuple[int, ...]:
    return tuple(place for place, name in enumerate(fields) if isinstance(table.c[name].type, kind))


_CHAIN_MOMENTS: Final = _places(CHAIN, CHAIN_FIELDS, UtcDateTime)
_CREATED, _UPDATED, _STARTED, _ENTERED, _CONTEXT, _REQUEST = map(
    CHAIN_FIELDS.index, ("created_at", "updated_at", "started_at", "entered_at", "context", "request")
)
_DELIVERY_MOMENTS: Final = _places(DELIVERY, DELIVERY_FIELDS, UtcDateTime)
_DELIVERY_OBJECTS: Final = _places(DELIVERY, DELIVERY_FIELDS, JSON)


def _chain(picked: Sequence[Any], resources: list[Resource]) -> ChainRecord:
    values = _in_utc(picked, _CHAIN_MOMENTS)
    # A program from before revision 0002 creates chains without these.
    if values[_STARTED] is None:
        values[_STARTED] = values[_CREATED]
    if values[_ENTERED] is None:
        values[_ENTERED] = values[_UPDATED]
    if values[_CONTEXT] is not None:
        values[_CONTEXT] = json_object(values[_CONTEXT], "context")
    if values[_REQUEST] is not None:
        values[_REQUEST] = Request.from_json(json_object(values[_REQUEST], "request"))
    resources.sort()
    # One for each column; the checks by type would have to count the list.
    return ChainRecord(*values, tuple(resources))  # type: ignore[call-arg]


def _delivery(picked: Sequence[Any]) -> DeliveryRecord:
    values = _in_utc(picked, _DELIVERY_MOMENTS)
    for place in _DELIVERY_OBJECTS:
        if values[place] is not None:
            values[place] = json_object(values[place], DELIVERY_FIELDS[place])
    return DeliveryRecord(*values)


def _in_utc(picked: Sequence[Any], moments: Iterable[int]) -> list[Any]:
    """The values with their moments in UTC: a driver gives them in the session's time zone."""
    values = list(picked)
    for place in moments:
        moment: datetime | None = values[place]
        if moment is not None and moment.tzinfo is not UTC:
            values[place] = moment.astimezone(UTC)
    return values


def _raw(table: Table, name: str, alias: str) -> str:
    as_text = "::text" if isinstance(table.c[name].type, JSON | Uuid) else ""
    return f"{alias}.{name}{as_text}"
