"""The hot reads and writes, for any number of rows at once: chains, executions, requests, attempts.

There are two ways to write. `portable` uses a transaction of several statements, on every database. `postgresql` uses
one statement that commits by itself, or one transaction if a batch has writes of several kinds. This module chooses
between them. Both lock rows in id order and compare them with what was read. A row that changed meanwhile is left out.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.domain.records import Begun, ChainRecord, Finished, Owed, Request, Timing, Write
from dispatcher.domain.resources import Resource
from dispatcher.errors import ChainMissing
from dispatcher.storage import chains, portable, postgresql
from dispatcher.storage.database import Database, run_statement

_POSTGRESQL: Final = "postgresql"


def read(database: Database, chain_ids: Sequence[int]) -> tuple[dict[int, ChainRecord], datetime | None]:
    """The chains with these ids, by id, and the database's clock (None without any row)."""
    with database.read() as connection:
        if database.dialect == _POSTGRESQL:
            return postgresql.read(partial(run_statement, connection), chain_ids)
        return chains.read_with_clock(connection, chain_ids)


def read_one(database: Database, chain_id: int) -> ChainRecord:
    """The chain with this id; `ChainMissing` if there is none."""
    record = read(database, [chain_id])[0].get(chain_id)
    if record is None:
        raise ChainMissing(chain_id)
    return record


def write(database: Database, writes: Sequence[Write], *, now: datetime, timing: Timing) -> dict[int, str | None]:
    """Write what came of executions, in one transaction: `{chain id: id of its new delivery, if any}`.

    Left out are chains that have changed since they were read, and chains that only rest and were enqueued meanwhile.
    """
    if database.dialect != _POSTGRESQL:

        def work(connection: Connection) -> dict[int, str | None]:
            not_woken = portable.lock_unchanged(connection, [change.record for change in writes])
            return portable.write_locked(connection, writes, not_woken, now=now, timing=timing)

        return database.write(work)
    if len({type(change) for change in writes}) == 1:
        return postgresql.write(database.write_statement, writes, now=now, timing=timing)

    def statements(connection: Connection) -> dict[int, str | None]:
        run = partial(run_statement, connection)
        # Moves, rests and plans are one statement each. Each of them locks its own rows in id order, but two such
        # batches could still deadlock. Therefore the rows of all chains are locked here first, in id order.
        postgresql.lock(run, [change.record.id for change in writes])
        return postgresql.write(run, writes, now=now, timing=timing)

    return database.write(statements)


def write_request(database: Database, chain_id: int, request: Request) -> None:
    """Write an application's request to the chain's row and make it due. Raises `ChainMissing`."""
    if database.dialect != _POSTGRESQL:
        database.write(
            lambda connection: chains.write_request(connection, chain_id, request, now=database.now(connection))
        )
        return
    now = database.clock() if database.clock is not None else None
    if not postgresql.write_request(database.write_statement, chain_id, request, now=now):
        raise ChainMissing(chain_id)


def write_request_if_exists(
    database: Database, type_name: str, resources: Sequence[Resource], request: Request
) -> int | None:
    """Write a request to the chain with exactly these resources; its id.

    None without such a chain, and on databases where the transaction that also creates a chain costs no more.
    """
    if database.dialect != _POSTGRESQL:
        return None
    with database.read() as connection:
        chain_id = chains.find_exact(connection, type_name, resources)
    if chain_id is not None:
        with suppress(ChainMissing):  # erased meanwhile
            write_request(database, chain_id, request)
            return chain_id
    return None


def begin(database: Database, owed: Sequence[Owed], *, lease_seconds: float) -> list[Begun]:
    """Begin those of these attempts that may begin, in id order; the other rows are not changed."""
    if database.dialect == _POSTGRESQL:
        return postgresql.begin(database.write_statement, owed, lease_seconds=lease_seconds)
    return database.write(lambda connection: portable.begin(connection, owed, lease_seconds=lease_seconds))


def finish(database: Database, finished: Sequence[Finished], *, now: datetime) -> set[str]:
    """Record delivered attempts and move their chains; the ids of the deliveries that this process still held."""
    if database.dialect == _POSTGRESQL:
        return postgresql.finish(database.write_statement, finished, now=now)
    return database.write(lambda connection: portable.finish(connection, finished, now=now))
