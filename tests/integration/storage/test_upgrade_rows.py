"""A database of revision 0001 full of rows is upgraded: nothing is lost, and the work goes on."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, MetaData, event, func, insert, select
from sqlalchemy.schema import Table

from dispatcher import DONE, NEW, Dispatcher, RetryPolicy
from dispatcher.domain.resources import resource_key
from dispatcher.storage import clock, dialects
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import current, head
from dispatcher.storage.migrations.runner import upgrade
from dispatcher.storage.models import CHAIN, DELIVERY
from dispatcher.storage.statements import insert_many, new_id
from tests.conftest import scaled
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from tests.integration.storage import old_tables as old
from tests.integration.storage.test_migrations import schema_of, statements_of

pytestmark = pytest.mark.integration

BEGAN = datetime(2024, 3, 1, 12, 30, 0, 250, tzinfo=UTC)
HOUR = timedelta(hours=1)
LONG_AGO = datetime(2023, 1, 1, tzinfo=UTC)

TRANSITIONS = {
    NEW: [shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=5))],
    "reminded": [shop.transition("Close", DONE)],
    "lost": [shop.Never],
    DONE: [],
}

WAITS = {
    "deferred: rate limit 3/h; before: OSError: no": ("rate", "rate limit 3/h", True, "OSError: no"),
    "deferred: rate limit 100/m": ("rate", "rate limit 100/m", True, None),
    "deferred: the line of rate limit 3/h is full": ("rate", "the line of rate limit 3/h is full", False, None),
    "deferred: Redis, which counts the calls for the rate limit, does not answer; before: Zähler: 📮\ufffd": (
        "rate",
        "Redis, which counts the calls for the rate limit, does not answer",
        False,
        "Zähler: 📮\ufffd",
    ),
    "deferred: delivery hours 08:00-20:00 UTC": ("hours", "delivery hours 08:00-20:00 UTC", False, None),
    "unknown definition: 'Gone'": ("definition", "unknown definition: 'Gone'", False, None),
    'unknown definition: "it\'s"': ("definition", 'unknown definition: "it\'s"', False, None),
}
"""The texts with which pending deliveries waited: `waits_for`, `waits_reason`, `has_place`, and the last real error."""

ERRORS = [
    None,
    "OSError: no",
    "deferred: my own",
    "Deferred: Rate limit exceeded",  # LIKE ignores case on SQLite and MariaDB
    "UNKNOWN DEFINITION: x",
    "Überlauf: \ufffd\nZeile 2 📮",
    "deferred",
]
"""What a user's own errors left there: it stays."""


class Rows:
    """Fills a database of revision 0001."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.entered: dict[int, datetime] = {}
        """When each chain came to its state."""
        self.errors: dict[str, str | None] = {}
        """The text in `last_error` of each delivery."""

    def chain(
        self, state: str, *history: tuple[str, dict[str, Any]], entered: datetime | None = None, **values: Any
    ) -> int:
        """A chain with one event an hour. `entered`: when it came to its state, if not with the first event."""
        number = len(self.entered)
        pairs = [("online_booking", f"b{number}"), ("customer", f"Zoë {number} ")]
        values = {"created_at": BEGAN, "updated_at": BEGAN + 9 * HOUR, "version": len(history), **values}
        row = {"chain_type": shop.CHAIN_TYPE, "resource_key": resource_key(sorted(pairs)), "state": state}
        chain_id: int = self._connection.execute(insert(old.CHAIN).values(**row, **values)).inserted_primary_key[0]
        rows = [{"chain_id": chain_id, "resource_type": kind, "resource_id": name} for kind, name in pairs]
        self._connection.execute(insert(old.RESOURCE), rows)
        for version, (action, facts) in enumerate((("created", {"value": NEW, "to_state": NEW}), *history)):
            self._connection.execute(
                insert(old.EVENT).values(
                    chain_id=chain_id,
                    chain_version=version,
                    move_version=version if action == "state_transition" else None,
                    action=action,
                    created_at=BEGAN + version * HOUR,
                    **facts,
                )
            )
        self.entered[chain_id] = entered if entered is not None else BEGAN
        return chain_id

    def delivery(self, chain_id: int, *, error: str | None = None, status: str = "pending", **values: Any) -> str:
        """A delivery of a chain, planned with its version 1."""
        delivery_id = new_id()
        self.errors[delivery_id] = error
        waits = {"next_attempt_at": LONG_AGO, "publish_after": LONG_AGO} if status == "pending" else {}
        row = {
            "id": delivery_id,
            "idempotency_key": old.old_key(chain_id, 0, "Remind"),
            "chain_id": chain_id,
            "chain_version": 1,
            "transition": "Remind",
            "from_state": NEW,
            "final_state": "reminded",
            "callback": "type",
            "status": status,
            "attempt": 0,
            "max_attempts": 5,
            "unknown": False,
            "planned_at": BEGAN + HOUR,
            "last_error": error,
        }
        self._connection.execute(insert(old.DELIVERY).values(**{**row, **waits, **values}))
        if "finished_at" not in values:
            waiting = old.CHAIN.update().where(old.CHAIN.c.id == chain_id)
            self._connection.execute(waiting.values(pending_delivery_id=delivery_id, due_at=None))
        return delivery_id

    def owing(self, **values: Any) -> str:
        """A chain with an open delivery."""
        return self.delivery(self.chain(NEW, PLANNED, version=values.pop("version", 1)), **values)


PLANNED = ("planned", {"value": "Remind", "from_state": NEW, "to_state": "reminded", "detail": "type"})
REMINDED = (
    "state_transition",
    {"value": "reminded", "from_state": NEW, "to_state": "reminded", "detail": "Remind", "requested_by": "Zoë"},
)


def put(action: str, from_state: str, to_state: str) -> tuple[str, dict[str, Any]]:
    return action, {"value": to_state, "from_state": from_state, "to_state": to_state, "detail": "by hand"}


def fill(connection: Connection) -> Rows:
    """Rows of every kind."""
    rows = Rows(connection)
    rows.chain(NEW, due_at=LONG_AGO, context={"größe": [1, None, {"a": "ж"}]}, failures=3)
    rows.chain(NEW, request={"context": {"n": 1}, "callback": None, "kwargs": {"k": "ü"}, "requested_by": "Zoë"})
    reminded = rows.chain("reminded", PLANNED, REMINDED, entered=BEGAN + 2 * HOUR, moves=1, due_at=LONG_AGO)
    rows.delivery(reminded, status="delivered", attempt=1, finished_at=BEGAN + 2 * HOUR)
    skipped = rows.chain("reminded", PLANNED, REMINDED, entered=BEGAN + 2 * HOUR, moves=1, next_update_at=BEGAN)
    rows.delivery(skipped, status="skipped", attempt=5, finished_at=BEGAN + 2 * HOUR, error="deferred: rate limit 3/h")
    rows.chain(
        NEW,
        put("moved", NEW, "lost"),
        put("reset", "lost", NEW),
        ("disabled", {"value": NEW}),
        entered=BEGAN + 2 * HOUR,
        moves=2,
        disabled=True,
    )
    rows.chain("lost", put("moved", NEW, "lost"), ("guard_failed", {}), entered=BEGAN + HOUR, moves=1)
    rows.chain(
        "lost", put("moved", NEW, "gone"), put("mapped", "gone", "lost"), entered=BEGAN + HOUR, moves=2, due_at=LONG_AGO
    )
    cancelled = rows.chain(NEW, PLANNED, ("cancelled", {"value": "Remind"}), due_at=LONG_AGO)
    rows.delivery(cancelled, status="cancelled", finished_at=BEGAN, error="deferred: delivery hours 08:00-20:00 UTC")
    for error in (*WAITS, *ERRORS):
        rows.owing(error=error, attempt=0 if error is None else 2, kwargs={"k": "ü"}, context={"n": 1})
    rows.owing(status="running", attempt=1, lease_until=LONG_AGO, publish_after=LONG_AGO, error="OSError: no")
    rows.owing(status="dead", attempt=5, error="deferred: rate limit 3/h; before: OSError: no", version=2)
    rows.owing(status="held", attempt=1, unknown=True, version=2)
    hidden = rows.chain(NEW, PLANNED, ("disabled", {"value": NEW}), disabled=True)
    rows.delivery(hidden, publish_after=None)
    pruned = rows.chain("lost", put("moved", NEW, "lost"), ("guard_failed", {}), entered=BEGAN + 9 * HOUR, moves=1)
    connection.execute(
        old.EVENT.delete().where(old.EVENT.c.chain_id == pruned, old.EVENT.c.action.in_(["created", "moved"]))
    )
    connection.execute(insert(old.TICK).values(name="sweep", last_at=LONG_AGO, position={"after": 3}))
    connection.execute(
        insert(old.TYPE).values(name=shop.CHAIN_TYPE, paused=False, fingerprints={"new": "f"}, window_plans=3)
    )
    return rows


def contents(database: Database, tables: dict[str, Table]) -> dict[str, list[dict[str, Any]]]:
    """Every row of these tables, in their order."""
    with database.read() as connection:
        return {
            name: [
                dict(row) for row in connection.execute(select(table).order_by(*table.primary_key.columns)).mappings()
            ]
            for name, table in tables.items()
        }


@pytest.fixture
def old_database(empty_database: Database) -> Database:
    old.make(empty_database)
    return empty_database


@pytest.fixture
def make(empty_url: str, redis_url: str, broker_url: str) -> Iterator[DispatcherFactory]:
    factory = DispatcherFactory(database_url=empty_url, redis_url=redis_url, broker_url=broker_url)
    yield factory
    for dispatcher in factory.made:
        dispatcher.close()


class TestRows:
    def test_are_all_there_and_only_the_texts_of_waits_have_become_columns(self, old_database: Database) -> None:
        rows = old_database.write(fill)
        before = contents(old_database, old.OLD)

        upgrade(old_database, workers_stopped=True)

        after = contents(old_database, old.OLD)
        waits, texts = {}, {}
        with old_database.read() as connection:
            for row in connection.execute(select(DELIVERY)):
                waits[row.id] = (row.waits_for, row.waits_reason, row.has_place, row.last_error)
                texts[row.id] = before_text = rows.errors[row.id]
                assert row.begins is row.waits_since is row.rest_until is row.request is row.lapse_seen_at is None
                expected = (None, None, False, before_text)
                assert waits[row.id] == (WAITS.get(before_text, expected) if row.status == "pending" else expected)
        assert {text for delivery_id, text in texts.items() if waits[delivery_id][0] is not None} == set(WAITS)
        for changed in (*before["delivery"], *after["delivery"]):
            del changed["last_error"]
        assert after == before

    def test_say_when_a_chain_came_to_its_state(self, old_database: Database) -> None:
        rows = old_database.write(fill)

        upgrade(old_database, workers_stopped=True)

        with old_database.read() as connection:
            chains = connection.execute(select(CHAIN)).all()
        assert {chain.id: chain.entered_at for chain in chains} == rows.entered
        assert {(chain.started_at, chain.uid, chain.runs) for chain in chains} == {(BEGAN, None, 1)}

    def test_do_not_change_what_the_tables_become(self, old_database: Database, tmp_path: Any) -> None:
        old_database.write(fill)
        upgrade(old_database, workers_stopped=True)
        full = schema_of(old_database)
        if old_database.dialect == "sqlite":
            new = Database(f"sqlite:///{tmp_path}/new.sqlite")
            upgrade(new)
            assert statements_of(old_database) == statements_of(new)
            new.dispose()
            return
        empty_again(old_database)
        upgrade(old_database)
        assert schema_of(old_database) == full


class TestWork:
    def test_goes_on_until_nothing_is_open_and_the_histories_are_walks(
        self, old_database: Database, make: shop.Make
    ) -> None:
        rows = old_database.write(fill)
        upgrade(old_database, workers_stopped=True)
        sink = shop.Sink()
        dispatcher = make(shop.cart(TRANSITIONS, callback=sink))
        pruned = max(rows.entered)  # the oracle reads whole histories
        assert dispatcher.erase_resource(dispatcher.chain(pruned).resources[0]) == 1
        assert dispatcher.relay()["settled"] == 0, "it is the first that sees the lease ended"
        with clock.shift(timedelta(seconds=dispatcher.settings.lapse_seconds + 1)):
            assert dispatcher.relay()["settled"] == 1
        for one in dispatcher.find_deliveries(statuses=["dead", "held"], limit=100):
            dispatcher.chain(one.chain_id).retry_delivery("ada")
        for chain in dispatcher.find_chains(limit=100):
            if chain.disabled:
                chain.enable("ada")

        owed = {one.chain_id: one for one in dispatcher.find_deliveries(statuses=["pending"], limit=100)}
        assert len(owed) == len(WAITS) + len(ERRORS) + 4
        for one in owed.values():
            shop.wait_over(dispatcher, one)
            assert shop.attempt(dispatcher, one, one.attempt + 1).outcome == "delivered"
        assert [call.key for call in sink.calls] == [old.old_key(chain_id, 0, "Remind") for chain_id in owed]
        run_to_the_end(dispatcher)

        assert {chain.state for chain in dispatcher.find_chains(limit=100)} == {DONE, "lost"}
        assert {one.status for one in dispatcher.find_deliveries(limit=100)} == {"delivered", "skipped", "cancelled"}
        shop.assert_consistent(dispatcher)


def run_to_the_end(dispatcher: Dispatcher) -> None:
    """Execute what is due, and deliver what that plans, until nothing moves any more."""
    moved = True
    while moved:
        chains = [chain for chain in dispatcher.find_chains(limit=100) if chain.state in (NEW, "reminded")]
        results = dispatcher.execute_chains([chain.id for chain in chains])
        for result in results:
            if result.delivery_id is not None:
                assert shop.attempt(dispatcher, result.delivery_id).outcome == "delivered"
        moved = any(result.outcome in ("moved", "planned") for result in results)


def empty_again(database: Database) -> None:
    """Remove every table."""
    tables = MetaData()
    tables.reflect(database.engine)
    tables.drop_all(database.engine)


def modifies(statement: str) -> bool:
    return statement.split(maxsplit=1)[0].upper() in {"ALTER", "CREATE", "DROP", "INSERT", "UPDATE", "DELETE"}


class PowerCutError(Exception):
    """The program ends in the middle of an upgrade."""


class TestInterrupted:
    @pytest.mark.parametrize("empty_url", ["sqlite", "postgresql"], indirect=True)
    def test_changes_nothing_where_changes_of_tables_belong_to_the_transaction(self, old_database: Database) -> None:
        old_database.write(fill)
        before, schema = contents(old_database, old.OLD), schema_of(old_database)
        for _ in cuts(old_database):
            assert contents(old_database, old.OLD) == before
            assert schema_of(old_database) == schema
            assert current(old_database) == "0001"
        assert current(old_database) == head()

    @pytest.mark.parametrize("empty_url", ["mariadb"], indirect=True)
    def test_can_be_run_again_where_each_change_of_a_table_commits(self, old_database: Database) -> None:
        rows = old_database.write(fill)
        before = contents(old_database, old.OLD)

        assert len(list(cuts(old_database))) > 20, "one for each statement"

        after = contents(old_database, old.OLD)
        for changed in (*before["delivery"], *after["delivery"]):
            del changed["last_error"]
        assert after == before
        interrupted = schema_of(old_database)
        with old_database.read() as connection:
            assert dict(connection.execute(select(CHAIN.c.id, CHAIN.c.entered_at)).all()) == rows.entered
            waits = connection.execute(select(DELIVERY.c.id, DELIVERY.c.waits_for, DELIVERY.c.last_error))
            for delivery_id, waits_for, error in waits:
                if waits_for is not None:
                    assert (waits_for, error) == (
                        WAITS[rows.errors[delivery_id]][0],
                        WAITS[rows.errors[delivery_id]][3],
                    )
        empty_again(old_database)
        upgrade(old_database)
        assert interrupted == schema_of(old_database)


@pytest.mark.parametrize("empty_url", ["mariadb"], indirect=True)
def test_a_statement_of_an_upgrade_may_take_longer_than_other_answers(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialects, "_MYSQL_ANSWER_SECONDS", 1)
    database = Database(empty_url)

    def slow(cursor: Any, statement: str) -> None:
        if statement.lstrip().startswith("CREATE TABLE chain_dispatcher_event"):
            cursor.execute("DO SLEEP(1.5)")

    with listening("before_cursor_execute", lambda _, cursor, statement, *__: slow(cursor, statement)):
        assert upgrade(database) == head()
    database.dispose()


@contextmanager
def listening(name: str, listener: Callable[..., None]) -> Iterator[None]:
    """Listen to every engine of this process, because an upgrade has connections of its own."""
    event.listen(Engine, name, listener)
    try:
        yield
    finally:
        event.remove(Engine, name, listener)


def cuts(database: Database) -> Iterator[str]:
    """Upgrade, and end after each statement in turn: after each such end, the statement. The last upgrade succeeds."""
    seen: set[str] = set()

    def cut(_: Any, __: Any, statement: str, *___: Any) -> None:
        if modifies(statement) and statement not in seen:
            seen.add(statement)
            raise PowerCutError(statement)

    with listening("after_cursor_execute", cut):
        while True:
            try:
                upgrade(database, workers_stopped=True)
            except PowerCutError as error:
                yield str(error)
            else:
                return


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_large_database_is_upgraded_in_little_memory(old_database: Database, empty_url: str) -> None:
    """300,000 chains, four in ten with a delivery that waits for its rate limit."""
    count = scaled(300_000, least=2000)
    for start in range(1, count + 1, 1000):
        numbers = range(start, min(start + 1000, count + 1))
        old_database.write(lambda connection, numbers=numbers: fill_page(connection, numbers))

    upgrading = [sys.executable, "-c", MEASURED_UPGRADE, empty_url]
    done = subprocess.run(upgrading, capture_output=True, text=True, check=True, timeout=1500)

    seconds, before, peak = map(float, done.stdout.split())
    print(f"{old_database.dialect}: {count} chains, {seconds:.1f} s, {before:.0f} to {peak:.0f} MB")  # noqa: T201
    assert peak - before < 50, "MB"
    with old_database.read() as connection:
        waiting = (DELIVERY.c.waits_for == "rate") & (DELIVERY.c.last_error == "OSError: no") & DELIVERY.c.has_place
        entered = CHAIN.c.entered_at == BEGAN + HOUR
        assert connection.execute(select(func.count()).where(waiting)).scalar_one() == count // 5 * 2
        assert connection.execute(select(func.count()).where(entered)).scalar_one() == count


MEASURED_UPGRADE = """
import re, sys, time
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade

def megabytes():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

database, began, before = Database(sys.argv[1]), time.monotonic(), megabytes()
upgrade(database, workers_stopped=True)
print(time.monotonic() - began, before, megabytes())
"""
"""Prints how long an upgrade took, and the peak memory of its process before and after it."""


def fill_page(connection: Connection, numbers: range) -> None:
    """Chains of revision 0001 with these ids, each with two events, two of five with a delivery."""
    chains = [
        {
            "id": number,
            "chain_type": shop.CHAIN_TYPE,
            "resource_key": f"{number:064}",
            "state": "lost",
            "version": 1,
            "created_at": BEGAN,
            "updated_at": BEGAN + 9 * HOUR,
        }
        for number in numbers
    ]
    events = [
        {"chain_id": number, "chain_version": version, "action": action, "created_at": BEGAN + version * HOUR}
        for number in numbers
        for version, action in enumerate(("created", "moved"))
    ]
    deliveries = [
        {
            "id": new_id(),
            "idempotency_key": new_id(),
            "chain_id": number,
            "chain_version": 1,
            "transition": "Remind",
            "from_state": "lost",
            "final_state": "reminded",
            "callback": "type",
            "status": "pending",
            "max_attempts": 5,
            "planned_at": BEGAN,
            "publish_after": BEGAN,
            "last_error": "deferred: rate limit 3/h; before: OSError: no",
        }
        for number in numbers
        if number % 5 < 2
    ]
    for table, rows in ((old.CHAIN, chains), (old.EVENT, events), (old.DELIVERY, deliveries)):
        insert_many(connection, table, rows)
