"""PostgreSQL's statements that commit by themselves: rerun after a deadlock, and never left half read."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import ProgrammingError

from dispatcher.storage.database import Database
from dispatcher.storage.models import ChainRow
from dispatcher.storage.rows import Found
from tests.servers import PostgresServer, wait_until

pytestmark = pytest.mark.integration

WAIT_SECONDS = 30
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event = 'PgSleep'"


class Interruption(BaseException):
    """What a signal's handler raises, as gevent and time limits do."""


@pytest.fixture
def rows(postgres_url: str) -> Iterator[Database]:
    """A database with the chains 1 and 2."""
    database = Database(postgres_url)
    now = datetime.now(UTC)
    chains = [
        {
            "id": number,
            "chain_type": "t",
            "resource_key": str(number),
            "state": "s",
            "created_at": now,
            "updated_at": now,
        }
        for number in (1, 2)
    ]
    database.write(lambda connection: connection.execute(insert(ChainRow), chains))
    yield database
    database.dispose()


def test_a_statement_that_was_interrupted_leaves_no_connection_that_still_waits_for_its_answer(
    rows: Database, postgres_server: PostgresServer
) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    def send_signal() -> None:
        with postgres_server.connect() as watching:
            wait_until(
                lambda: watching.execute(SLEEPING, [str(rows.url.database)]).fetchone() == (1,),
                seconds=WAIT_SECONDS,
                what="the statement runs",
            )
        os.kill(os.getpid(), signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with ThreadPoolExecutor() as pool:
            sent = pool.submit(send_signal)
            with pytest.raises(Interruption):
                rows.write_statement("SELECT pg_sleep(%(seconds)s)", {"seconds": WAIT_SECONDS})
            sent.result(WAIT_SECONDS)
    finally:
        signal.signal(signal.SIGALRM, previous)

    assert rows.write_statement("SELECT %(one)s::int", {"one": 1}) == Found(("int4",), [(1,)])


def test_a_statement_is_rerun_after_a_deadlock(rows: Database, postgres_server: PostgresServer) -> None:
    name = str(rows.url.database)
    lock = "SELECT id FROM chain_dispatcher_chain WHERE id = %(id)s FOR UPDATE"
    backwards = """
        WITH second AS MATERIALIZED (SELECT id FROM chain_dispatcher_chain WHERE id = 2 FOR UPDATE)
        UPDATE chain_dispatcher_chain c SET state = %(state)s FROM second WHERE c.id = second.id - 1 RETURNING c.id"""
    with (
        psycopg.connect(rows.url.set(drivername="postgresql").render_as_string(hide_password=False)) as other,
        postgres_server.connect() as watching,
        ThreadPoolExecutor() as pool,
    ):
        other.execute("SET deadlock_timeout = '30s'")  # so that it is the statement that is given up
        other.execute(lock, {"id": 1})
        written = pool.submit(rows.write_statement, backwards, {"state": "later"})
        wait_until(
            lambda: watching.execute(WAITING, [name]).fetchone() == (1,),
            seconds=WAIT_SECONDS,
            what="it waits for row 1",
        )
        other.execute(lock, {"id": 2})  # granted once the statement is given up
        other.commit()
        assert written.result(WAIT_SECONDS) == Found(("id",), [(1,)])

    with rows.read() as connection:
        assert connection.execute(select(ChainRow.state).where(ChainRow.id == 1)).scalar_one() == "later"


def test_an_error_of_the_driver_is_raised_as_sqlalchemy_s_without_parameters(rows: Database) -> None:
    with pytest.raises(ProgrammingError) as raised:
        rows.write_statement("SELECT no_such_column, %(secret)s::text", {"secret": "hunter2"})

    assert "hunter2" not in str(raised.value)
