"""What the hot paths send: SQL statements, Redis commands and messages, counted where they arrive.

A change of these numbers is a change of cost for every chain: it goes into the table here, where it is seen. Counted
are all statements, BEGIN and COMMIT included, by PostgreSQL's and MariaDB's own logs and SQLite's trace, and all
commands that Redis executes for a client (a script is one), by MONITOR. Whether they share a round trip is not counted.
"""

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from psycopg import sql
from sqlalchemy import Engine, NullPool, create_engine, event, text

from dispatcher import DONE, NEW, Dispatcher, rate_limit
from dispatcher.delivery import marks
from dispatcher.domain.records import Owed
from tests.conftest import running
from tests.integration import shop
from tests.servers import MariaDbServer, PostgresServer, RedisServer

pytestmark = pytest.mark.integration

COSTS = {
    # SQL statements on PostgreSQL, MariaDB and SQLite; Redis commands for locks, for the broker; messages among these
    "an evaluation that learns nothing": (1, 1, 3, 2, 0, 0),
    "an evaluation that learns when": (2, 5, 7, 2, 0, 0),
    "a move without callback": (2, 6, 8, 2, 0, 0),
    "a plan": (2, 7, 9, 2, 1, 1),
    "a delivered attempt": (3, 16, 16, 0, 0, 0),
    "a delivered attempt with two limits": (3, 16, 16, 2, 0, 0),
    "an enqueue of a chain": (2, 6, 5, 0, 1, 1),
    "an enqueue that makes the chain": (11, 10, 9, 0, 1, 1),
    "200 evaluations that learn nothing": (1, 1, 3, 2, 0, 0),
    "200 evaluations that learn when": (2, 5, 7, 2, 0, 0),
    "200 moves without callback": (2, 6, 8, 2, 0, 0),
    "200 plans": (2, 7, 9, 2, 4, 4),
    "10 delivered attempts": (3, 16, 16, 0, 0, 0),
}
_RUNS = 4
"""How often each is measured. The cheapest run counts, by its statements first, and it must have exactly these numbers:
the first opens connections, later ones may ping one that was idle."""


# --- what is counted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What arrived at the servers, one line each."""

    statements: list[str]
    locks: list[str]
    broker: list[str]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Statements, lock commands, broker commands, messages."""
        messages = sum(command.startswith("LPUSH") for command in self.broker)
        return len(self.statements), len(self.locks), len(self.broker), messages

    def __str__(self) -> str:
        lines = [*self.statements, *self.locks, *self.broker]
        return "\n".join(re.sub(r"\s+", " ", line)[:150] for line in lines[:50])


@pytest.fixture(scope="module")
def counted_redis() -> Iterator[RedisServer]:
    """A Redis that nobody but these tests talks to."""
    with running(RedisServer) as server:
        yield server


@pytest.fixture
def redis_url(counted_redis: RedisServer) -> str:
    counted_redis.clear()
    return counted_redis.url


Log = Callable[[], list[str]]


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def database_url(database_kind: str, request: pytest.FixtureRequest) -> str:
    name = {"postgresql": "postgres_url", "mariadb": "mariadb_url", "sqlite": "sqlite_url"}[database_kind]
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
def statements(database_kind: str, database_url: str, request: pytest.FixtureRequest) -> Iterator[Log]:
    """The statements that the database was sent, since the last call."""
    with {"postgresql": _postgresql_log, "mariadb": _mariadb_log, "sqlite": _sqlite_log}[database_kind](
        database_url, request
    ) as log:
        yield log


@contextmanager
def _postgresql_log(url: str, request: pytest.FixtureRequest) -> Iterator[Log]:
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = sql.Identifier(url.rpartition("/")[2])
    with server.connect() as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(name))
    place = server.log_path.stat().st_size

    def read() -> list[str]:
        nonlocal place
        with server.log_path.open("rb") as log:
            log.seek(place)
            lines = log.read().decode(errors="replace")
            place = log.tell()
        return re.findall(r"LOG:  (?:statement|execute [^:]+): (.*(?:\n\t.*)*)", lines)

    yield read


@contextmanager
def _mariadb_log(url: str, request: pytest.FixtureRequest) -> Iterator[Log]:
    server: MariaDbServer = request.getfixturevalue("mariadb_server")
    engine = create_engine(server.url("mysql"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    read_log = text(
        "SELECT CONVERT(argument USING utf8mb4) FROM mysql.general_log "
        "WHERE command_type IN ('Query', 'Execute', 'Ping') AND thread_id <> CONNECTION_ID()"
    )
    with engine.connect() as connection:
        for statement in ("SET GLOBAL log_output = 'TABLE'", "SET GLOBAL general_log = ON"):
            connection.execute(text(statement))
        try:

            def read() -> list[str]:
                found = list(connection.execute(read_log).scalars())
                connection.execute(text("TRUNCATE mysql.general_log"))
                return found

            yield read
        finally:
            for statement in ("SET GLOBAL general_log = OFF", "TRUNCATE mysql.general_log"):
                connection.execute(text(statement))


@contextmanager
def _sqlite_log(_: str, __: pytest.FixtureRequest) -> Iterator[Log]:
    found: list[str] = []

    def trace(connection: sqlite3.Connection, _: Any) -> None:
        connection.set_trace_callback(found.append)

    event.listen(Engine, "connect", trace)

    def read() -> list[str]:
        seen = [statement for statement in found if not statement.startswith("--")]  # a foreign key's or trigger's own
        found.clear()
        return seen

    yield read
    event.remove(Engine, "connect", trace)


@contextmanager
def commands(server: RedisServer) -> Iterator[list[tuple[int, str]]]:
    """The commands that clients send in the block: database number and text."""
    found: list[tuple[int, str]] = []
    with redis.Redis.from_url(server.url) as client, redis.Redis.from_url(server.url) as watcher:
        client.ping()
        with watcher.monitor() as monitor:
            yield found
            client.echo("the end")
            while (seen := monitor.next_command())["command"] != "ECHO the end":
                if seen["client_type"] != "lua":
                    found.append((int(seen["db"]), seen["command"]))


# --- what is measured ------------------------------------------------------------------------------------------------


later = datetime.now(UTC) + timedelta(days=9)
CONFIG = {
    "chains": [
        {"chain_type": name, "callback": shop.Sink(), "transitions": {NEW: [candidate], "sent": [], DONE: []}}
        for name, candidate in {
            "waits": shop.transition("Waits", "sent", valid=False),
            "learns": shop.transition("Learns", "sent", lambda self: self.not_before(later, "early")),
            "moves": shop.transition("Moves", DONE),
            "sends": shop.transition("Sends", "sent"),
        }.items()
    ]
}
CONFIG["chains"].append(
    {
        "chain_type": "limited",
        "callback": rate_limit("1000/s", name="sends")(shop.Sink()),
        "rate_limit": "9000/m",
        "transitions": {NEW: [shop.transition("Sends", "sent")], "sent": [], DONE: []},
    }
)
_numbers = iter(range(10**9))


def orders(count: int) -> list[list[tuple[str, str]]]:
    """The resources of so many chains that do not exist yet."""
    return [[("order", str(next(_numbers)))] for _ in range(count)]


def made(dispatcher: Dispatcher, chain_type: str, count: int) -> list[int]:
    """The ids of so many new chains of a type."""
    return [chain_id for chain_id, _ in dispatcher.bulk_get_or_create(chain_type, orders(count))]


def owed(dispatcher: Dispatcher, count: int, chain_type: str) -> list[Owed]:
    """So many deliveries that wait for their first attempt."""
    results = dispatcher.execute_chains(made(dispatcher, chain_type, count))
    return [Owed(result.delivery_id, 1) for result in results if result.delivery_id is not None]


@dataclass(frozen=True)
class Work:
    """What is measured: `do` with what `prepare` made, and the outcome that it must have."""

    prepare: Callable[[Dispatcher], Any]
    do: Callable[[Dispatcher, Any], Any]
    outcome: str | None = None


def executed(chain_type: str, count: int, outcome: str) -> Work:
    return Work(lambda one: made(one, chain_type, count), lambda one, ids: one.execute_chains(ids), outcome)


def delivered(count: int, chain_type: str = "sends") -> Work:
    return Work(lambda one: owed(one, count, chain_type), lambda one, deliveries: one.deliver(deliveries), "delivered")


def enqueued(*, exists: bool) -> Work:
    def prepare(dispatcher: Dispatcher) -> list[tuple[str, str]]:
        (order,) = orders(1)
        if exists:
            dispatcher.get_or_create_resource_chain("waits", order)
        return order

    return Work(prepare, lambda one, order: one.enqueue("waits", order, initial_context={"a": 1}))


WORK = {
    "an evaluation that learns nothing": executed("waits", 1, "none"),
    "an evaluation that learns when": executed("learns", 1, "none"),
    "a move without callback": executed("moves", 1, "moved"),
    "a plan": executed("sends", 1, "planned"),
    "a delivered attempt": delivered(1),
    "a delivered attempt with two limits": delivered(1, "limited"),
    "an enqueue of a chain": enqueued(exists=True),
    "an enqueue that makes the chain": enqueued(exists=False),
    "200 evaluations that learn nothing": executed("waits", 200, "none"),
    "200 evaluations that learn when": executed("learns", 200, "none"),
    "200 moves without callback": executed("moves", 200, "moved"),
    "200 plans": executed("sends", 200, "planned"),
    "10 delivered attempts": delivered(10),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_is_sent(
    make_dispatcher: Callable[..., Dispatcher],
    database_kind: str,
    statements: Log,
    counted_redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(marks, "_EXPOSED_SECONDS", 60)  # how many share a mark must not depend on the machine
    dispatcher = make_dispatcher(CONFIG, chains_per_task=200, deliveries_per_task=50)
    work = WORK[name]
    measured = []
    for _ in range(_RUNS):
        subject = work.prepare(dispatcher)
        statements()
        with commands(counted_redis) as redis_commands:
            result = work.do(dispatcher, subject)
        measured.append(
            Sent(
                statements(),
                locks=[command for database, command in redis_commands if database == 0],
                broker=[command for database, command in redis_commands if database == 1],
            )
        )
        if work.outcome is not None:
            assert {str(one.outcome) for one in result} == {work.outcome}
    postgresql, mariadb, sqlite, locks, broker, messages = COSTS[name]
    expected = {"postgresql": postgresql, "mariadb": mariadb, "sqlite": sqlite}[database_kind]
    cheapest = min(measured, key=lambda one: one.counts)

    assert cheapest.counts == (expected, locks, broker, messages), f"statements, locks, broker, messages:\n{cheapest}"


def test_the_counters_count(statements: Log, make_dispatcher: Callable[..., Dispatcher]) -> None:
    dispatcher = make_dispatcher(CONFIG)
    with dispatcher.database.read() as connection:
        connection.execute(text("SELECT 1"))
        statements()
        for number in range(5):
            connection.execute(text(f"SELECT {number} AS counted"))

    assert sum("AS counted" in statement for statement in statements()) == 5
