"""Databases of an older revision, with rows in them: what an upgrade asks for and does, and what goes on after it."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from dispatcher import NEW
from dispatcher.errors import DatabaseNotMigrated, WorkersNotStopped
from dispatcher.storage import clock, ticks
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.revisions import current, head, require_current
from dispatcher.storage.migrations.runner import upgrade
from dispatcher.storage.statements import new_id
from tests.integration import shop
from tests.integration.storage import old_tables as old

pytestmark = pytest.mark.integration

COMMAND = "run `dispatcher db upgrade --workers-stopped`"


@pytest.fixture
def old_database(empty_database: Database) -> Database:
    """A database at revision 0001 without rows."""
    old.make(empty_database)
    return empty_database


def add(database: Database, table: Any, *rows: dict[str, Any]) -> None:
    database.write(lambda connection: connection.execute(insert(table), list(rows)))


def machine_now(database: Database) -> datetime:
    with database.read() as connection:
        return database.machine_now(connection)


def delivery(chain_id: int, **values: Any) -> dict[str, Any]:
    """A delivery's row of revision 0001, pending for the first attempt unless `values` says otherwise."""
    moment = datetime(2024, 3, 1, 12, 30, tzinfo=UTC)
    return {
        "id": new_id(),
        "idempotency_key": new_id(),
        "chain_id": chain_id,
        "chain_version": 1,
        "transition": "Remind",
        "from_state": "new",
        "final_state": "reminded",
        "callback": "type",
        "status": "pending",
        "attempt": 0,
        "max_attempts": 5,
        "unknown": False,
        "next_attempt_at": moment,
        "publish_after": moment,
        "planned_at": moment,
        **values,
    }


class TestStoppedWorkers:
    """Revision 0002 is one beside which programs of the version before must not run."""

    def test_are_not_needed_for_a_database_without_tables(self, empty_database: Database) -> None:
        assert upgrade(empty_database) == head()

    def test_are_not_needed_where_nothing_is_to_do(self, database: Database) -> None:
        ran_now(database)
        assert upgrade(database) == head()

    def test_must_be_promised(self, old_database: Database) -> None:
        with pytest.raises(WorkersNotStopped) as refused:
            upgrade(old_database)
        assert str(refused.value).endswith(f": stop all workers, beats and applications, then {COMMAND}")
        assert (refused.value.found, refused.value.expected, refused.value.problem) == ("0001", head(), "")
        assert current(old_database) == "0001"

        assert upgrade(old_database, workers_stopped=True) == head()

    def test_are_not_believed_while_an_attempt_runs(self, old_database: Database) -> None:
        until = machine_now(old_database) + timedelta(seconds=70)
        running = delivery(1, status="running", attempt=1, lease_until=until, publish_after=until)
        add(old_database, old.DELIVERY, running)

        with pytest.raises(WorkersNotStopped, match=f"an attempt at delivery {running['id']} runs") as refused:
            upgrade(old_database, workers_stopped=True)
        assert str(refused.value).endswith(f"wait a minute, then {COMMAND}")
        assert current(old_database) == "0001"

        with clock.shift(timedelta(seconds=71)):  # its worker was killed, and the lease has ended
            assert upgrade(old_database, workers_stopped=True) == head()

    @pytest.mark.parametrize("name", ["sweep", "relay"])
    def test_are_not_believed_while_beat_ticks(self, old_database: Database, name: str) -> None:
        ran_now(old_database, name)

        with clock.shift(timedelta(seconds=59)), pytest.raises(WorkersNotStopped, match=f"the pass '{name}' began at"):
            upgrade(old_database, workers_stopped=True)
        assert current(old_database) == "0001"

        with clock.shift(timedelta(seconds=61)):
            assert upgrade(old_database, workers_stopped=True) == head()

    def test_a_tick_far_ahead_comes_of_a_wrong_clock_and_stops_no_upgrade(self, old_database: Database) -> None:
        with clock.shift(timedelta(hours=1)):
            ran_now(old_database)

        assert upgrade(old_database, workers_stopped=True) == head()


class TestFirstUse:
    """An application opens a database of the version before."""

    def test_upgrades_an_sqlite_file_beside_which_nothing_runs_and_names_the_command_elsewhere(
        self, old_database: Database
    ) -> None:
        if old_database.dialect == "sqlite":
            require_current(old_database)
            assert current(old_database) == head()
            return
        with pytest.raises(DatabaseNotMigrated, match="is at revision 0001"):
            require_current(old_database)

    @pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
    def test_never_upgrades_an_sqlite_file_under_workers(self, old_database: Database) -> None:
        ran_now(old_database, "relay")

        with pytest.raises(WorkersNotStopped, match=COMMAND):
            require_current(old_database)
        assert current(old_database) == "0001"


class TestProgramsOfTheVersionBefore:
    """They must not run on revision 0002. If some do, against the policy, nothing is lost."""

    @pytest.fixture
    def old_program(self, database: Database) -> old.OldProgram:
        return old.OldProgram(database)

    def test_create_chains_that_new_code_goes_on_with(
        self, make_dispatcher: shop.Make, old_program: old.OldProgram
    ) -> None:
        sink = shop.Sink()
        dispatcher = make_dispatcher(shop_with(sink), clock=shop.Clock())
        chain_id = old_program.create(shop.CHAIN_TYPE, shop.BOOKING, now=shop.START)

        chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING)
        assert chain.id == chain_id
        delivery = shop.planned(dispatcher, chain)
        assert shop.attempt(dispatcher, delivery).outcome == "delivered"

        assert [call.key for call in sink.calls] == [old.old_key(chain_id, 0, "Remind")]
        row = shop.row_of(dispatcher, chain_id)
        assert (row.state, row.uid, row.runs, row.started_at, row.entered_at) == ("reminded", None, 1, None, shop.START)
        shop.assert_consistent(dispatcher)

    def test_plan_and_begin_deliveries_that_new_code_settles(
        self, make_dispatcher: shop.Make, old_program: old.OldProgram
    ) -> None:
        sink = shop.Sink()
        dispatcher = make_dispatcher(shop_with(sink))
        chains = [shop.new_chain(dispatcher, number) for number in range(3)]
        planned, deferred, died = (old_program.plan(chain.id, "Remind", "reminded", now=shop.START) for chain in chains)
        old_program.begin(deferred)
        old_program.defer(deferred, "rate limit 3/h")
        old_program.begin(died)
        shop.change_delivery(dispatcher, died, **shop.LAPSED)

        assert dispatcher.relay()["settled"] == 1
        shop.change_delivery(dispatcher, died, next_attempt_at=shop.LONG_AGO)
        for delivery_id, number in ((planned, 1), (deferred, 1), (died, 2)):
            assert shop.attempt(dispatcher, delivery_id, number).outcome == "delivered"

        assert [chain.refresh().state for chain in chains] == ["reminded"] * 3
        assert [call.key for call in sink.calls] == [old.old_key(chain.id, 0, "Remind") for chain in chains]
        shop.assert_consistent(dispatcher)

    def test_begin_and_finish_what_new_code_has_planned_or_given_back(
        self, make_dispatcher: shop.Make, old_program: old.OldProgram
    ) -> None:
        sink = shop.Sink()
        dispatcher = make_dispatcher(shop_with(sink))
        chain, other = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
        delivery, begun = shop.planned(dispatcher, chain), shop.planned(dispatcher, other)
        old_program.begin(delivery.id)
        old_program.finish(delivery.id, now=shop.START)
        old_program.begin(begun.id)
        old_program.defer(begun.id, "delivery hours 08:00-20:00 UTC")

        assert shop.attempt(dispatcher, delivery).outcome == "stale"
        assert shop.attempt(dispatcher, begun).outcome == "delivered"

        assert (chain.refresh().state, other.refresh().state, len(sink)) == ("reminded", "reminded", 1)
        row = shop.row_of(dispatcher, chain.id)
        assert row.uid is not None and row.entered_at == row.started_at, "the one thing that is wrong"
        shop.assert_consistent(dispatcher)

    def test_move_a_chain_under_new_code_which_then_writes_nothing(
        self, make_dispatcher: shop.Make, old_program: old.OldProgram
    ) -> None:
        gate = shop.Gate()
        slow = shop.transition("Remind", "reminded", gate.wait)
        dispatcher = make_dispatcher(shop.cart({NEW: [slow], "reminded": [shop.Never]}, callback=shop.Sink()))
        chain = shop.new_chain(dispatcher)

        with gate.during(lambda: dispatcher.execute_chains([chain.id])) as future:
            old_program.move(chain.id, "Remind", "reminded", now=shop.START)

        (result,) = future.result()
        assert result.outcome == "stale"
        assert chain.refresh().state == "reminded" and dispatcher.find_deliveries() == []
        shop.assert_consistent(dispatcher)


def shop_with(sink: shop.Sink) -> dict[str, Any]:
    return shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=sink)


def ran_now(database: Database, name: str = "sweep") -> None:
    """A pass begins."""
    now = machine_now(database)
    assert database.write(lambda connection: ticks.claim_tick(connection, name, machine_now=now, interval=timedelta(0)))
