"""The migrations make what the models say, once, beside whatever else is in the database."""

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import ClauseElement, Column, Inspector, Integer, MetaData, String, Table, event, inspect, select
from sqlalchemy.engine import ExceptionContext

from dispatcher.errors import DatabaseNotMigrated, ServiceUnavailable
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import current, head, require_current
from dispatcher.storage.migrations.runner import OPTIONS, configuration, upgrade
from dispatcher.storage.models import Base

pytestmark = pytest.mark.integration

PROCESSES = 8
VERSION_TABLE = "chain_dispatcher_alembic_version"
OUR_TABLES = {*Base.metadata.tables, VERSION_TABLE}


def set_revision(database: Database, revision: str) -> None:
    """Pretend that the database is at `revision`."""
    version = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32)))
    database.write(lambda connection: connection.execute(version.update().values(version_num=revision)))


def tables_of(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names())


def schema_of(database: Database) -> dict[str, Any]:
    """All that the database says about our tables, type names as it writes them."""
    inspector = inspect(database.engine)
    facts: dict[str, Callable[[Inspector, str], Any]] = {
        "columns": Inspector.get_columns,
        "primary key": Inspector.get_pk_constraint,
        "foreign keys": Inspector.get_foreign_keys,
        "unique": Inspector.get_unique_constraints,
        "checks": Inspector.get_check_constraints,
        "indexes": Inspector.get_indexes,
        "options": Inspector.get_table_options,
    }
    return {
        f"{table} {what}": json.dumps(get(inspector, table), default=_plain, sort_keys=True)
        for table in sorted(set(Base.metadata.tables) & tables_of(database))
        for what, get in facts.items()
    }


def _plain(value: object) -> str:
    return str(value) if isinstance(value, ClauseElement) else repr(value)


def statements_of(database: Database) -> dict[str, list[str]]:
    """The parts of each statement that made one of our tables or indexes in SQLite, in any order.

    A column that was added later stands after the constraints there, and a table that was copied has its name quoted.
    """
    master = Table(
        "sqlite_master", MetaData(), Column("name", String), Column("tbl_name", String), Column("sql", String)
    )
    ours = select(master.c.name, master.c.sql).where(
        master.c.tbl_name.in_(Base.metadata.tables), master.c.sql.is_not(None)
    )
    with database.read() as connection:
        return {name: _parts_of(sql.replace(f'"{name}"', name)) for name, sql in connection.execute(ours)}


def _parts_of(statement: str) -> list[str]:
    """What stands before the outer parentheses, and each thing between their commas, sorted."""
    parts, depth = [""], 0
    for character in " ".join(statement.split()):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 1 and character in "(,":
            parts.append("")
        else:
            parts[-1] += character
    return sorted(part.strip() for part in parts)


class TestUpgrade:
    def test_makes_what_the_models_say_as_alembic_compares_it(self, empty_database: Database) -> None:
        upgrade(empty_database)

        with empty_database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=OPTIONS)
            assert compare_metadata(context, Base.metadata) == []

    def test_makes_what_create_all_makes(self, empty_database: Database) -> None:
        """Alembic compares no check constraints, index conditions and AUTOINCREMENT: the database itself does."""
        Base.metadata.create_all(empty_database.engine)
        created = schema_of(empty_database)
        Base.metadata.drop_all(empty_database.engine)

        upgrade(empty_database)

        assert schema_of(empty_database) == created

    def test_makes_the_very_statements_of_create_all_on_sqlite(self, tmp_path: Path) -> None:
        migrated, created = (Database(f"sqlite:///{tmp_path}/{name}.sqlite") for name in ("migrated", "created"))
        upgrade(migrated)
        Base.metadata.create_all(created.engine)

        assert statements_of(migrated) == statements_of(created)

        migrated.dispose()
        created.dispose()

    def test_says_the_revision_it_came_to(self, empty_database: Database) -> None:
        assert current(empty_database) is None
        assert upgrade(empty_database) == head() == current(empty_database)

    def test_is_seen_by_one_who_looks_while_it_commits(self, empty_database: Database, empty_url: str) -> None:
        other = Database(empty_url)

        def commit_meanwhile(_: ExceptionContext) -> None:
            upgrade(other)

        event.listen(empty_database.engine, "handle_error", commit_meanwhile, once=True)  # "no such table"

        assert current(empty_database) == head()
        other.dispose()

    def test_does_nothing_the_second_time(self, empty_database: Database) -> None:
        upgrade(empty_database)
        before = schema_of(empty_database)

        assert upgrade(empty_database) == head()

        assert schema_of(empty_database) == before

    def test_leaves_a_newer_database_as_it_is(self, empty_database: Database) -> None:
        upgrade(empty_database)
        set_revision(empty_database, "from_the_future")

        assert upgrade(empty_database) == "from_the_future"

    def test_says_in_one_line_that_the_server_is_away(self) -> None:
        database = Database("postgresql+psycopg://nobody@127.0.0.1:1/none", connect_seconds=2)

        with pytest.raises(ServiceUnavailable, match=r"^cannot reach the database at [^\n]+$"):
            upgrade(database)
        database.dispose()

    def test_leaves_the_applications_logging_alone(self, sqlite_url: str) -> None:
        application = logging.getLogger("application.of.the.user")
        handlers, level = list(logging.root.handlers), logging.root.level
        database = Database(sqlite_url)
        with database.engine.begin() as connection:
            command.downgrade(configuration(connection), "base")

        upgrade(database)
        database.dispose()

        assert not application.disabled
        assert (list(logging.root.handlers), logging.root.level) == (handlers, level)


class TestConcurrentProcesses:
    def test_upgrade_together(self, empty_database: Database, empty_url: str, processes: "Processes") -> None:
        assert processes.all_do(_upgrade, empty_url) == [head()] * PROCESSES
        assert tables_of(empty_database) == OUR_TABLES
        assert revision_rows(empty_database) == [head()]

    def test_create_an_sqlite_file_on_first_use_together(self, tmp_path: Path, processes: "Processes") -> None:
        url = f"sqlite:///{tmp_path}/below/rows.sqlite"

        assert processes.all_do(_require, url) == [head()] * PROCESSES

        database = Database(url)
        assert tables_of(database) == OUR_TABLES
        assert revision_rows(database) == [head()]
        database.dispose()


class TestRequireCurrent:
    def test_says_what_to_do_about_a_server_without_tables(self, empty_database: Database) -> None:
        if empty_database.dialect == "sqlite":  # its tables are created on first use
            require_current(empty_database)
            assert current(empty_database) == head()
            return

        with pytest.raises(DatabaseNotMigrated, match="dispatcher db upgrade") as caught:
            require_current(empty_database)

        assert (caught.value.found, caught.value.expected) == (None, head())
        assert "\n" not in str(caught.value)
        assert tables_of(empty_database) == set()

    def test_creates_sqlite_tables_on_first_use(self, tmp_path: Path) -> None:
        database = Database(f"sqlite:///{tmp_path}/below/rows.sqlite")

        require_current(database)

        assert current(database) == head()
        assert tables_of(database) == OUR_TABLES
        database.dispose()

    def test_is_satisfied_by_this_versions_tables(self, database: Database) -> None:
        require_current(database)

    def test_is_satisfied_by_a_newer_revision(self, database: Database) -> None:
        set_revision(database, "from_the_future")

        require_current(database)

        assert current(database) == "from_the_future"


class TestTheApplicationsTables:
    @pytest.fixture
    def shared(self, empty_database: Database) -> Database:
        """A database with an application's own table and Alembic version in it."""
        metadata = MetaData()
        Table("shop_order", metadata, Column("id", Integer, primary_key=True), Column("name", String(20)))
        version = Table("alembic_version", metadata, Column("version_num", String(32), primary_key=True))
        metadata.create_all(empty_database.engine)
        empty_database.write(lambda connection: connection.execute(version.insert().values(version_num="theirs")))
        return empty_database

    def theirs(self, database: Database) -> tuple[set[str], str]:
        version = Table("alembic_version", MetaData(), Column("version_num", String(32)))
        with database.read() as connection:
            revision = connection.execute(select(version.c.version_num)).scalar_one()
        return tables_of(database) - OUR_TABLES, revision

    def test_are_untouched_by_an_upgrade(self, shared: Database) -> None:
        upgrade(shared)

        assert self.theirs(shared) == ({"shop_order", "alembic_version"}, "theirs")
        assert tables_of(shared) > OUR_TABLES

    def test_are_not_seen_by_autogenerate(self, shared: Database) -> None:
        upgrade(shared)

        with shared.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=OPTIONS)
            assert compare_metadata(context, Base.metadata) == []

    def test_are_untouched_by_a_downgrade_which_drops_ours(self, shared: Database) -> None:
        upgrade(shared)

        with shared.engine.begin() as connection:
            command.downgrade(configuration(connection), "base")

        assert tables_of(shared) == {"shop_order", "alembic_version", VERSION_TABLE}
        assert self.theirs(shared)[1] == "theirs"
        assert current(shared) is None


def revision_rows(database: Database) -> list[str]:
    version = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32)))
    with database.read() as connection:
        return list(connection.execute(select(version.c.version_num)).scalars())


class Processes:
    """Processes that do the same thing at the same moment."""

    def __init__(self) -> None:
        fresh = multiprocessing.get_context("spawn")
        barrier = fresh.Barrier(PROCESSES)
        self.pool = ProcessPoolExecutor(PROCESSES, mp_context=fresh, initializer=_set_barrier, initargs=(barrier,))

    def all_do(self, work: Callable[[str], str | None], url: str) -> list[str | None]:
        """What `work(url)` returns in each process."""
        futures = [self.pool.submit(_do_together, work, url) for _ in range(PROCESSES)]
        return [future.result(timeout=100) for future in futures]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """`PROCESSES` processes, started once, because that takes longer than all they do."""
    processes = Processes()
    with processes.pool:
        yield processes


_barriers: list[Barrier] = []  # of this process, when it is one of `Processes`


def _set_barrier(barrier: Barrier) -> None:
    _barriers.append(barrier)


def _do_together(work: Callable[[str], str | None], url: str) -> str | None:
    _barriers[0].wait(timeout=90)
    return work(url)


def _upgrade(url: str) -> str:
    database = Database(url)
    revision = upgrade(database)
    database.dispose()
    return revision


def _require(url: str) -> str | None:
    database = Database(url)
    require_current(database)
    revision = current(database)
    database.dispose()
    return revision
