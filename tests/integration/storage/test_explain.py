"""What the periodic passes read follows what is due or owed, on each kind of database: the plans of their statements.

The statements are those that are sent, taken on their way to the driver, with their parameters.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event

from dispatcher import NEW
from dispatcher.domain.records import DuePosition
from dispatcher.storage import chains, moments, overdue, pauses
from dispatcher.storage.database import Database
from dispatcher.storage.models import CHAIN, DELIVERY
from tests.integration import shop

pytestmark = pytest.mark.integration

RESTING = 12_000
DUE = 2_500
OVERDUE = 20
PAGE = 100
_PAGES_AT_ONCE = 10
SLACK = 10
"""Rows that may be read beyond what is asked for: the ends of ranges, and what a database reads ahead."""

DUE_INDEX = "ix_chain_dispatcher_chain_due"
RELAY_INDEX = "ix_chain_dispatcher_delivery_relay"
STATUS_INDEX = "ix_chain_dispatcher_delivery_status"


@dataclass(frozen=True)
class Plan:
    """How a statement is answered: the indexes it searches, and the rows it reads (None: the database tells no number).

    `text` is for a failure's message.
    """

    indexes: frozenset[str]
    conditions: str
    read: int | None
    sorts: bool
    scans: bool
    text: str


# --- rows ------------------------------------------------------------------------------------------------------------


def insert(database: Database, table: Any, rows: Sequence[dict[str, Any]]) -> None:
    """These rows, and statistics of their table."""
    database.write(lambda connection: connection.execute(table.insert(), rows))
    words = {"postgresql": f"ANALYZE {table.name}", "sqlite": "ANALYZE"}
    with database.engine.connect() as connection:
        connection.exec_driver_sql(words.get(database.dialect, f"ANALYZE TABLE {table.name}")).close()
        connection.commit()


def chain_row(number: int, due_at: datetime | None, **values: Any) -> dict[str, Any]:
    return {
        "chain_type": shop.CHAIN_TYPE,
        "resource_key": f"{number:064}",
        "state": NEW,
        "created_at": shop.LONG_AGO,
        "updated_at": shop.LONG_AGO,
        "due_at": due_at,
        "disabled": False,
        "pending_delivery_id": None,
        **values,
    }


def resting(number: int) -> dict[str, Any]:
    """A chain that no sweep has to look at: its guards said `not_before`, or it waits for somebody or something."""
    return (
        chain_row(number, shop.START + timedelta(minutes=1 + number)),
        chain_row(number, shop.START + timedelta(minutes=1 + number), chain_type="trial"),
        chain_row(number, None),
        chain_row(number, None, disabled=True),
        chain_row(number, None, pending_delivery_id=str(uuid.uuid4())),
    )[number % 5]


@pytest.fixture
def fill(database: Database) -> Callable[[Sequence[datetime]], None]:
    """Puts chains that are due at these moments among many that rest."""

    def make(due: Sequence[datetime]) -> None:
        numbers = range(RESTING, RESTING + len(due))
        rows = [chain_row(number, due_at) for number, due_at in zip(numbers, due, strict=True)]
        insert(database, CHAIN, [resting(number) for number in range(RESTING)] + rows)

    return make


# --- plans -----------------------------------------------------------------------------------------------------------


@contextmanager
def sent(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """The statements that the block sends, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def keep(_: Any, __: Any, statement: str, parameters: Any, ___: Any, many: bool) -> None:
        assert not many
        statements.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", keep)
    yield statements
    event.remove(database.engine, "before_cursor_execute", keep)


def explain(database: Database, statement: str, parameters: Any) -> Plan:
    """The plan of a statement that is carried out, and undone."""
    with database.engine.connect() as connection:
        found = _EXPLAINED[database.dialect](connection, statement, parameters)
        connection.rollback()
        return found


def _sqlite(connection: Connection, statement: str, parameters: Any) -> Plan:
    steps = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    steps = [step for step in steps if step not in ("SCALAR SUBQUERY 1", "SCAN CONSTANT ROW")]  # the clock
    found = [re.fullmatch(r"SEARCH \w+ USING (?:COVERING )?INDEX (\w+) (.*)", step) for step in steps]
    return Plan(
        indexes=frozenset(one[1] for one in found if one),
        conditions=" ".join(one[2] for one in found if one),
        read=None,
        sorts=any("TEMP B-TREE" in step for step in steps),
        scans=any(step.startswith("SCAN") for step in steps),
        text="\n".join(steps),
    )


def _postgresql(connection: Connection, statement: str, parameters: Any) -> Plan:
    explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
    nodes = list(_nodes(explained[0]["Plan"]))
    tables = [node for node in nodes if "Relation Name" in node]
    return Plan(
        indexes=frozenset(node["Index Name"] for node in nodes if "Index Name" in node),
        conditions=" ".join(node["Index Cond"] for node in nodes if "Index Cond" in node),
        read=sum(
            node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            for node in tables
        ),
        sorts=any(node["Node Type"] == "Sort" for node in nodes),
        scans=any(node["Node Type"] == "Seq Scan" for node in nodes),
        text=json.dumps(explained, indent=1),
    )


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", []):
        yield from _nodes(inner)


def _mariadb(connection: Connection, statement: str, parameters: Any) -> Plan:
    rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).mappings().all()
    rows = [row for row in rows if row["table"] is not None]  # the clock is read from none
    before = _handler_reads(connection)
    connection.exec_driver_sql(statement, parameters).close()
    read = _handler_reads(connection) - before
    extra = " ".join(row["Extra"] or "" for row in rows)
    return Plan(
        indexes=frozenset(row["key"] for row in rows if row["key"]),
        conditions=" ".join(f"{row['type']} of {row['key_len']} bytes" for row in rows),
        read=read,
        sorts="filesort" in extra or "temporary" in extra,
        scans=any(row["type"] in ("ALL", "index") for row in rows),
        text=f"{[dict(row) for row in rows]}, {read} read",
    )


def _handler_reads(connection: Connection) -> int:
    """Rows and index entries that this session has read or compared so far."""
    counts = {name: value for name, value in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler%%'", {})}
    entries = max(int(counts["Handler_read_next"]), int(counts["Handler_icp_attempts"]))
    return entries + int(counts["Handler_read_rnd_next"]) + int(counts["Handler_read_prev"])


_EXPLAINED: dict[str, Callable[[Connection, str, Any], Plan]] = {
    "sqlite": _sqlite,
    "postgresql": _postgresql,
    "mariadb": _mariadb,
}


def assert_range(plan: Plan, index: str, *, most: int, database: Database, conditions: Sequence[str]) -> None:
    """The statement searched this index alone, as a range, and read no more than `most` rows and the slack.

    PostgreSQL may prefer to read some pages' worth of the range at once and to sort it, where little more is there.
    """
    assert plan.indexes == {index}, plan.text
    assert not plan.scans, plan.text
    if database.dialect == "postgresql":
        assert plan.read is not None and plan.read <= max(most, _PAGES_AT_ONCE * PAGE), plan.text
    else:
        assert not plan.sorts, plan.text
        assert plan.read is None or plan.read <= most + SLACK, plan.text
    if database.dialect == "mariadb":
        assert plan.conditions.startswith("range of"), plan.text
    else:
        assert all(condition in plan.conditions for condition in conditions), plan.text


# --- due chains ------------------------------------------------------------------------------------------------------


def due_page(database: Database, after: DuePosition | None) -> tuple[list[DuePosition], Plan]:
    """A page as a sweep reads it, and its statement's plan."""
    with sent(database) as statements, database.read() as connection:
        page = chains.due_page(connection, type_name=shop.CHAIN_TYPE, now=shop.START, after=after, limit=PAGE)
    (found,) = [one for one in statements if "FROM chain_dispatcher_chain" in one[0]]
    return page, explain(database, *found)


def spread(count: int) -> list[datetime]:
    """Due at a moment of its own each."""
    return [shop.START - timedelta(seconds=number) for number in range(count)]


def together(count: int) -> list[datetime]:
    """Due at one moment: what rests until a date is due at midnight."""
    return [shop.START - timedelta(hours=5)] * count


@pytest.mark.parametrize(
    "due",
    [[], spread(30), spread(DUE), together(DUE), spread(DUE // 2) + together(DUE // 2)],
    ids=["none", "few", "many", "many at one moment", "some at one moment"],
)
def test_a_sweep_reads_what_is_due_and_nothing_of_what_rests(
    database: Database, fill: Callable[[Sequence[datetime]], None], due: Sequence[datetime]
) -> None:
    fill(due)
    seen: list[DuePosition] = []
    after = None
    while True:
        page, plan = due_page(database, after)
        assert_range(plan, DUE_INDEX, most=len(page), database=database, conditions=["chain_type", "due_at"])
        if not page:
            break
        seen += page
        after = page[-1]
    assert len(seen) == len(set(seen)) == len(due)
    assert [(one.due_at, one.chain_id) for one in seen] == sorted((one.due_at, one.chain_id) for one in seen)


def test_a_later_page_begins_in_the_index_where_the_last_one_ended(
    database: Database, fill: Callable[[Sequence[datetime]], None]
) -> None:
    fill(together(DUE))
    page, _ = due_page(database, None)
    page, _ = due_page(database, page[-1])

    _, plan = due_page(database, page[-1])

    if database.dialect == "postgresql":
        assert "ROW(due_at, id) > ROW(" in plan.conditions
    elif database.dialect == "mariadb":
        assert plan.conditions == "range of 419 bytes", "type, due_at and id"
    else:  # which goes over a moment's entries from the first one, in the index
        assert "due_at>? AND due_at<?" in plan.conditions


# --- owed deliveries -------------------------------------------------------------------------------------------------


@pytest.fixture
def owing(database: Database) -> Database:
    """Many deliveries that are closed, under way, or wait for a person, and few of each kind for the relay."""
    now = datetime.now(UTC)
    insert(database, CHAIN, [chain_row(number, None) for number in range(RESTING // 4)])
    with database.read() as connection:
        ids = list(connection.execute(CHAIN.select().with_only_columns(CHAIN.c.id)).scalars())
    rows = [
        delivery_row(number, ids, *not_owed(now + timedelta(hours=1, seconds=number), number))
        for number in range(RESTING)
    ]
    rows += [
        delivery_row(number, ids, ("pending", "running")[number % 2], now - timedelta(minutes=number % 7))
        for number in range(RESTING, RESTING + 2 * OVERDUE)
    ]
    insert(database, DELIVERY, rows)
    return database


def not_owed(later: datetime, number: int) -> tuple[str, datetime | None]:
    """Status and `publish_after` of a delivery that no relay has to look at."""
    return (
        ("delivered", None),
        ("pending", later),
        ("pending", None),  # of a disabled chain
        ("dead", None),
        ("running", later) if number < 5 * OVERDUE else ("pending", later),  # as many as there are processes
    )[number % 5]


def delivery_row(
    number: int, ids: Sequence[int], status: str, publish_after: datetime | None, **values: Any
) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "idempotency_key": str(uuid.uuid4()),
        "chain_id": ids[number % len(ids)],
        "chain_version": number // len(ids),
        "transition": "Remind",
        "from_state": NEW,
        "final_state": "reminded",
        "callback": "type",
        "status": status,
        "attempt": 1,
        "max_attempts": 5,
        "planned_at": shop.LONG_AGO,
        "publish_after": publish_after,
        **values,
    }


@pytest.mark.parametrize(("pending", "count"), [(True, 2 * OVERDUE), (False, OVERDUE)], ids=["all", "only settles"])
def test_a_relay_reads_what_is_overdue_and_nothing_of_what_is_under_way(
    owing: Database, pending: bool, count: int
) -> None:
    with sent(owing) as statements, owing.engine.connect() as connection:
        found = overdue.claim_overdue(connection, limit=PAGE, grace_seconds=60, lapse_seconds=9, pending=pending)
        connection.rollback()
    assert (len(found.lost), len(found.noted)) == (OVERDUE if pending else 0, OVERDUE)
    (statement,) = [one for one in statements if "FROM chain_dispatcher_delivery" in one[0]]

    plan = explain(owing, *statement)

    if pending:
        assert_range(plan, RELAY_INDEX, most=2 * OVERDUE, database=owing, conditions=["publish_after"])
    else:  # or those that run, which are as many as there are processes, and sorts them
        assert plan.indexes in ({RELAY_INDEX}, {STATUS_INDEX}) and not plan.scans, plan.text
        assert plan.read is None or plan.read <= 2 * OVERDUE + SLACK, plan.text


# --- waits that began in the future ----------------------------------------------------------------------------------

WAITING = 6_000
BEGUN_AHEAD = 250


@pytest.fixture
def waiting(database: Database) -> Database:
    """Many deliveries that wait in the relay's index, some of which began in the future, among others that do not."""
    now = datetime.now(UTC)
    insert(database, CHAIN, [chain_row(number, None) for number in range(RESTING // 4)])
    with database.read() as connection:
        ids = list(connection.execute(CHAIN.select().with_only_columns(CHAIN.c.id)).scalars())
    later, ahead = now + timedelta(hours=1), now + timedelta(days=2)
    statuses = ("pending", "running")
    rows = [
        delivery_row(number, ids, statuses[number % 2], later + timedelta(seconds=number), waits_since=now)
        for number in range(WAITING)
    ]
    rows += [
        delivery_row(number, ids, "running", now - timedelta(seconds=number), waits_since=shop.LONG_AGO)
        for number in range(WAITING, 2 * WAITING)  # overdue: not read
    ]
    rows += [
        delivery_row(number, ids, "delivered", None, waits_since=None) for number in range(2 * WAITING, 3 * WAITING)
    ]
    rows += [
        # Many end at one moment: a page may end among them.
        delivery_row(number, ids, statuses[number % 2], ahead + timedelta(seconds=number // 150), waits_since=ahead)
        for number in range(3 * WAITING, 3 * WAITING + BEGUN_AHEAD)
    ]
    insert(database, DELIVERY, rows)
    return database


def waits_page(
    database: Database, after: moments.WaitPosition | None
) -> tuple[list[moments.WaitPosition], Plan, tuple[str, Any]]:
    with sent(database) as statements, database.read() as connection:
        page = moments.future_waits(connection, after=after, limit=PAGE)
    (found,) = [one for one in statements if "FROM chain_dispatcher_delivery" in one[0]]
    return page, explain(database, *found), found


def test_waits_that_began_in_the_future_are_found_in_the_relay_s_index_alone(waiting: Database) -> None:
    seen: list[moments.WaitPosition] = []
    after = None
    while True:
        page, plan, found = waits_page(waiting, after)
        assert plan.indexes == {RELAY_INDEX} and not plan.scans, plan.text
        assert plan.read is None or plan.read <= WAITING + BEGUN_AHEAD + SLACK, "what is overdue or closed is not read"
        if waiting.dialect == "postgresql":
            # Both are asked of the index, so that of the table only what is found is read, or nothing at all.
            assert "publish_after" in plan.conditions and "waits_since" in plan.conditions, plan.text
            assert plan.read is not None and plan.read <= BEGUN_AHEAD, plan.text
        elif waiting.dialect == "mariadb":
            assert plan.conditions.startswith("range of") and "Using index" in plan.text, plan.text
        else:
            with waiting.engine.connect() as connection:
                steps = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {found[0]}", found[1]).all())
            assert f"USING COVERING INDEX {RELAY_INDEX} (publish_after>?" in steps
        seen += page
        if len(page) < PAGE:
            break
        after = page[-1]
    assert len(seen) == len({one.delivery_id for one in seen}) == BEGUN_AHEAD


def test_a_pause_reads_a_page_of_pending_deliveries_and_their_chains(owing: Database) -> None:
    after = pauses.FIRST_ID
    for _ in range(2):
        with sent(owing) as statements, owing.engine.connect() as connection:
            page = pauses.to_park(connection, shop.CHAIN_TYPE, after=after, limit=PAGE)
        (statement,) = [one for one in statements if "FROM chain_dispatcher_delivery" in one[0]]

        plan = explain(owing, *statement)

        # MariaDB may take the index of the open deliveries instead, which has the same order.
        assert plan.indexes & {STATUS_INDEX, "ix_chain_dispatcher_delivery_finished"}, plan.text
        assert not plan.scans and not plan.sorts, plan.text
        assert plan.read is None or plan.read <= 2 * PAGE + SLACK, plan.text
        assert page.next_after is not None
        after = page.next_after
