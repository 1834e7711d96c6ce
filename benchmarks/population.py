"""Writes chains directly into a database, a million at a time, because creating them is not what is measured."""

from datetime import datetime
from typing import Final

from sqlalchemy import DateTime, Text, cast, func, insert, literal, null, select, text

from dispatcher.states import NEW, EventAction
from dispatcher.storage.database import Database
from dispatcher.storage.models import ChainRow, DeliveryRow, EventRow, ResourceRow

RESOURCE_TYPE: Final = "benchmark"


def add_chains(
    database: Database, type_name: str, count: int, *, due_at: datetime | None, with_resources: bool = True
) -> range:
    """Create `count` chains in NEW, due at `due_at`, each with a resource and its first event; gives their ids."""
    with database.engine.begin() as connection:
        before = connection.execute(select(func.coalesce(func.max(ChainRow.id), 0))).scalar_one()
        number = func.generate_series(before + 1, before + count).column_valued("number")
        moment = cast(null() if due_at is None else literal(due_at), DateTime(timezone=True))
        key = func.md5(cast(number, Text))
        rows = select(
            literal(type_name), func.concat(key, func.reverse(key)), literal(NEW), moment, func.now(), func.now()
        )
        columns = ["chain_type", "resource_key", "state", "due_at", "created_at", "updated_at"]
        connection.execute(insert(ChainRow).from_select(columns, rows))
        ids = range(before + 1, before + count + 1)
        last = connection.execute(select(func.max(ChainRow.id))).scalar_one()
        assert last == ids[-1], "another process creates chains in this database"
        if with_resources:
            new = ChainRow.id > before
            resource = select(ChainRow.id, literal(RESOURCE_TYPE), cast(ChainRow.id, Text)).where(new)
            connection.execute(insert(ResourceRow).from_select(["chain_id", "resource_type", "resource_id"], resource))
            event = select(ChainRow.id, literal(0), literal(EventAction.CREATED.value), literal(NEW), func.now())
            names = ["chain_id", "chain_version", "action", "to_state", "created_at"]
            connection.execute(insert(EventRow).from_select(names, event.where(new)))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))  # now, because autovacuum could run during the measurement
    return ids


def anything_in(database: Database, type_name: str, state: str) -> bool:
    """Whether any chain of a type is in a state; an index look-up, so its time does not grow with the chains."""
    query = select(ChainRow.id).where(ChainRow.chain_type == type_name, ChainRow.state == state).limit(1)
    with database.read() as connection:
        return connection.execute(query).one_or_none() is not None


def count_in(database: Database, type_name: str, state: str) -> int:
    """How many chains of a type are in a state."""
    query = select(func.count()).where(ChainRow.chain_type == type_name, ChainRow.state == state)
    with database.read() as connection:
        return connection.execute(query).scalar_one()


def bytes_per_chain(database: Database) -> dict[str, tuple[float, float]]:
    """`{table: (bytes of rows, bytes of indexes)}` per chain in the database, including dead rows of updates."""
    with database.read() as connection:
        count = connection.execute(select(func.count()).select_from(ChainRow)).scalar_one()
        return {
            table: (
                connection.execute(select(func.pg_table_size(table))).scalar_one() / count,
                connection.execute(select(func.pg_indexes_size(table))).scalar_one() / count,
            )
            for table in (row.__tablename__ for row in (ChainRow, ResourceRow, EventRow, DeliveryRow))
        }
