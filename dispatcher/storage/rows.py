"""How a row becomes a value: the columns that are read, in order, and what is made of them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Select, select

from dispatcher.domain.records import Begun, ChainRecord, DeliveryRecord, Request
from dispatcher.domain.resources import Resource
from dispatcher.storage.dialects import clock_plus
from dispatcher.storage.models import CHAIN, DELIVERY, RESOURCE

CHAIN_COLUMNS: Final = tuple(CHAIN.c[name] for name in ChainRecord.__dataclass_fields__ if name != "resources")
"""What `records_of` reads of a chain, `request` last."""


DELIVERY_COLUMNS: Final = tuple(DELIVERY.c[name] for name in DeliveryRecord.__dataclass_fields__)


DELIVERY_WIDTH: Final = len(DELIVERY_COLUMNS)


def records_of(rows: Sequence[Sequence[Any]]) -> dict[int, ChainRecord]:
    """The chains in rows of `CHAIN_COLUMNS` and a resource's type and id, one row for each resource."""
    values: dict[int, Sequence[Any]] = {}
    resources: dict[int, list[Resource]] = {}
    for row in rows:
        values[row[0]] = row
        pairs = resources.setdefault(row[0], [])
        if row[-1] is not None:
            pairs.append((row[-2], row[-1]))
    return {
        chain_id: ChainRecord(  # type: ignore[call-arg]  # the columns before the request, in order
            *row[:-3], Request.from_json(row[-3]), tuple(sorted(resources[chain_id]))
        )
        for chain_id, row in values.items()
    }


def with_chain() -> Select[Any]:
    """Deliveries with their chains, a row for each of the chain's resources, and the database's clock."""
    columns = (*DELIVERY_COLUMNS, *CHAIN_COLUMNS, RESOURCE.c.resource_type, RESOURCE.c.resource_id)
    joined = DELIVERY.join(CHAIN, CHAIN.c.id == DELIVERY.c.chain_id)
    return select(*columns, clock_plus(0).label("machine_now")).select_from(
        joined.outerjoin(RESOURCE, RESOURCE.c.chain_id == CHAIN.c.id)
    )


def begun_from(rows: Sequence[Sequence[Any]]) -> Begun:
    """The delivery and its chain in the rows of `with_chain` that are one delivery's."""
    width = len(DELIVERY_COLUMNS)
    (record,) = records_of([row[width:-1] for row in rows]).values()
    return Begun(DeliveryRecord(*rows[0][:width]), record, rows[0][-1])


def chain_of(row: Sequence[Any]) -> ChainRecord:
    return ChainRecord(
        row[0],
        row[1],
        row[2],
        row[3],
        _utc(row[4]),
        _utc(row[5]),
        row[6],
        row[7],
        row[8],
        row[9],
        row[10],
        row[11].astimezone(UTC),
        row[12].astimezone(UTC),
        row[13],
        Request.from_json(row[14]),
        tuple(sorted((kind, identity) for kind, identity in row[15])),
    )


def delivery_of(row: Sequence[Any]) -> DeliveryRecord:
    return DeliveryRecord(*row[:12], *map(_utc, row[12:17]), *row[17:DELIVERY_WIDTH])


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)
