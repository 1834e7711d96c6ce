"""Every store keeps the contract of `storage.store`, on each database that it can run on."""

import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import JSON, Text, cast, literal, select, update
from sqlalchemy.engine import Connection

from dispatcher.domain.records import (
    Begun,
    ChainRecord,
    Finished,
    Move,
    Owed,
    PlannedDelivery,
    Request,
    Rest,
    Timing,
    Write,
    idempotency_key,
)
from dispatcher.domain.resources import clean_resources
from dispatcher.domain.unreadable import Unreadable
from dispatcher.errors import ChainMissing
from dispatcher.states import CLOSED_STATUSES, DONE, NEW, DeliveryStatus, EventAction, WaitsFor
from dispatcher.storage import chain_types, chains, clock, deliveries, history, overdue
from dispatcher.storage.database import Database
from dispatcher.storage.migrations.runner import upgrade
from dispatcher.storage.models import CHAIN, DELIVERY, EVENT
from dispatcher.storage.portable import PortableStore
from dispatcher.storage.postgresql import PostgresqlStore
from dispatcher.storage.store import Store, read_one

pytestmark = pytest.mark.integration

TYPE: Final = "cart"
NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)
PENDING: Final = Timing(60)
BEGUN: Final = Timing(60, 75)
STORES: Final = {"portable": PortableStore, "postgresql": PostgresqlStore}
PAIRS: Final = ("portable-sqlite", "portable-postgresql", "portable-mariadb", "postgresql-postgresql")
HISTORY_STEPS: Final = 1200
HISTORY_SEEDS: Final = (1, 2)


class Bench:
    """One store on a database of its own, and what tests ask of its rows."""

    def __init__(self, store: Store, database: Database) -> None:
        self.store = store
        self.database = database
        self._made = 0

    def chain(self, *, due: bool = True) -> ChainRecord:
        """A new chain in NEW, as it was read."""
        self._made += 1
        ((chain_id, created),) = self.store.create_many(
            TYPE, [clean_resources([("cart", str(self._made))])], now=NOW, due=due
        )
        assert created
        return self.read(chain_id)

    def chains(self, count: int) -> list[ChainRecord]:
        return [self.chain() for _ in range(count)]

    def read(self, chain_id: int) -> ChainRecord:
        return read_one(self.store, chain_id)

    def delivery(self, chain_id: int) -> Any:
        with self.database.read() as connection:
            delivery = deliveries.read(connection, str(self.read(chain_id).pending_delivery_id))
        assert delivery is not None
        return delivery

    def actions(self, chain_id: int) -> list[str]:
        with self.database.read() as connection:
            return [event.action for event in history.events(connection, chain_id)]

    def change(self, record: ChainRecord, **values: Any) -> None:
        """Change a chain's row behind the store's back."""
        statement = update(CHAIN).where(CHAIN.c.id == record.id).values(**values)
        self.database.write(lambda connection: connection.execute(statement))

    def planned(self, *, timing: Timing = PENDING) -> Any:
        """A chain's new delivery."""
        record = self.chain()
        self.store.write([plan(record)], now=NOW, timing=timing)
        return self.delivery(record.id)

    def begun(self) -> Begun:
        """A chain's delivery, begun."""
        (begun,) = self.store.begin([Owed(self.planned().id, 1)], lease_seconds=75)
        return begun


@pytest.fixture(params=PAIRS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Each store on each database that it can run on."""
    implementation, kind = request.param.split("-")
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mariadb": "mariadb_url"}[kind]
    database = Database(request.getfixturevalue(fixture))
    yield Bench(STORES[implementation](database), database)
    database.dispose()


def move(record: ChainRecord, to_state: str = "paid", **changes: Any) -> Move:
    values = {"next_update_at": None, "due_at": NOW + HOUR, "requested_by": "checkout", **changes}
    return Move(record=record, transition="Paid", to_state=to_state, **values)


def plan(record: ChainRecord, **changes: Any) -> PlannedDelivery:
    values = {
        "final_state": "reminded",
        "callback": "type",
        "max_attempts": 5,
        "kwargs": {"template": "a"},
        "context": {"email": "a@example.com"},
        "requested_by": None,
        **changes,
    }
    return PlannedDelivery(record=record, transition="Remind", **values)


def rest(record: ChainRecord, **changes: Any) -> Rest:
    return Rest(record=record, **{"due_at": NOW + 2 * HOUR, **changes})


class TestRead:
    def test_gives_the_chains_that_exist_with_their_sorted_resources_and_the_clock(self, bench: Bench) -> None:
        ((chain_id, _),) = bench.store.create_many(
            TYPE, [clean_resources([("order", "9"), ("cart", "1")])], now=NOW, due=True
        )
        records, machine_now = bench.store.read([chain_id, chain_id + 1000])
        assert list(records) == [chain_id]
        record = records[chain_id]
        assert record.resources == (("cart", "1"), ("order", "9"))
        assert (record.state, record.version, record.due_at, record.created_at) == (NEW, 0, NOW, NOW)
        assert record.due_at is not None and record.due_at.tzinfo is UTC
        assert machine_now is not None and abs(datetime.now(UTC) - machine_now) < timedelta(seconds=30)
        assert machine_now.utcoffset() == timedelta(0)

    def test_gives_nothing_and_no_clock_where_there_is_nothing(self, bench: Bench) -> None:
        assert bench.store.read([]) == ({}, None)
        assert bench.store.read([4711]) == ({}, None)
        with pytest.raises(ChainMissing):
            read_one(bench.store, 4711)

    def test_the_clock_can_be_moved(self, bench: Bench) -> None:
        record = bench.chain()
        with clock.shift(timedelta(days=2)):
            machine_now = bench.store.read([record.id])[1]
        assert machine_now is not None
        assert abs(machine_now - datetime.now(UTC) - timedelta(days=2)) < timedelta(seconds=30)


class TestWrite:
    def test_a_move_moves(self, bench: Bench) -> None:
        record = bench.chain()
        written = bench.store.write([move(record, next_update_at=NOW + HOUR)], now=NOW, timing=PENDING)
        after = bench.read(record.id)
        assert written.deliveries == {record.id: None}
        assert (after.state, after.version, after.moves, after.failures) == ("paid", 1, 1, 0)
        assert (after.next_update_at, after.due_at, after.updated_at) == (NOW + HOUR, NOW + HOUR, NOW)
        assert bench.actions(record.id) == ["created", "state_transition"]

    def test_a_plan_writes_a_delivery_that_waits_for_its_message(self, bench: Bench) -> None:
        record = bench.chain()
        written = bench.store.write([plan(record)], now=NOW, timing=PENDING)
        after, delivery = bench.read(record.id), bench.delivery(record.id)
        assert written.deliveries == {record.id: delivery.id}
        assert (after.state, after.version, after.moves, after.due_at) == (NEW, 1, 0, None)
        assert (delivery.status, delivery.attempt, delivery.chain_version) == ("pending", 0, 1)
        assert (delivery.kwargs, delivery.context) == ({"template": "a"}, {"email": "a@example.com"})
        assert delivery.next_attempt_at is not None and delivery.lease_until is None
        assert delivery.publish_after - delivery.next_attempt_at >= timedelta(seconds=59)
        assert bench.actions(record.id) == ["created", "planned"]

    def test_a_plan_with_a_lease_is_begun(self, bench: Bench) -> None:
        record = bench.chain()
        bench.store.write([plan(record)], now=NOW, timing=BEGUN)
        delivery = bench.delivery(record.id)
        assert (delivery.status, delivery.attempt, delivery.uncalled) == ("running", 1, None)
        assert abs(delivery.next_attempt_at - delivery.planned_at) < timedelta(seconds=1), "when it began"
        assert abs(delivery.lease_until - delivery.publish_after) < timedelta(seconds=1)
        assert timedelta(seconds=74) < delivery.lease_until - delivery.planned_at < timedelta(seconds=76)

    @pytest.mark.parametrize("make", [move, plan])
    def test_another_s_request_can_be_left_in_its_row(self, bench: Bench, make: Callable[..., Write]) -> None:
        record = bench.chain()
        bench.store.write_request(record.id, Request({"n": 1}))
        bench.store.write([make(bench.read(record.id), takes_request=False)], now=NOW, timing=PENDING)
        assert bench.read(record.id).request == Request({"n": 1})

    def test_a_rest_keeps_the_version(self, bench: Bench) -> None:
        record = bench.chain()
        writes = [rest(record, failures=2, event=EventAction.GUARD_FAILED, detail="x" * 5000)]
        assert bench.store.write(writes, now=NOW, timing=PENDING).deliveries == {record.id: None}
        after = bench.read(record.id)
        assert (after.version, after.failures, after.due_at) == (0, 2, NOW + 2 * HOUR)
        assert bench.actions(record.id) == ["created", "guard_failed"]

    @pytest.mark.parametrize("change", [{"version": 9}, {"disabled": True}, {"pending_delivery_id": "0" * 32}])
    @pytest.mark.parametrize("make", [move, plan, rest])
    def test_what_has_changed_since_it_was_read_is_left_out(
        self, bench: Bench, make: Callable[[ChainRecord], Write], change: Mapping[str, Any]
    ) -> None:
        changed, unchanged = bench.chains(2)
        bench.change(changed, **change)
        written = bench.store.write([make(changed), make(unchanged)], now=NOW, timing=PENDING)
        assert set(written.deliveries) == {unchanged.id}
        assert bench.actions(changed.id) == ["created"]

    @pytest.mark.parametrize("make", [move, plan])
    def test_a_request_that_came_since_the_read_is_kept(
        self, bench: Bench, make: Callable[[ChainRecord], Write]
    ) -> None:
        early, late = bench.chains(2)
        for record in (early, late):
            bench.store.write_request(record.id, Request({"n": 1}))
        early, late = bench.read(early.id), bench.read(late.id)
        bench.store.write_request(late.id, Request({"n": 2}))
        bench.store.write([make(early), make(late)], now=NOW, timing=PENDING)
        assert bench.read(early.id).request is None
        assert bench.read(late.id).request == Request({"n": 2})

    def test_a_rest_never_loses_a_wake_up(self, bench: Bench) -> None:
        record = bench.chain()
        bench.store.write_request(record.id, Request())
        written = bench.store.write([rest(record)], now=NOW, timing=PENDING)
        assert written.deliveries == {}
        assert bench.read(record.id).due_at != NOW + 2 * HOUR

    def test_a_rest_clears_the_request_only_where_it_says_so(self, bench: Bench) -> None:
        kept, cleared = bench.chains(2)
        for record in (kept, cleared):
            bench.store.write_request(record.id, Request())
        kept, cleared = bench.read(kept.id), bench.read(cleared.id)
        bench.store.write([rest(kept), rest(cleared, clear_request=True)], now=NOW, timing=PENDING)
        assert bench.read(kept.id).request == Request() and bench.read(cleared.id).request is None

    def test_all_kinds_go_in_one_batch(self, bench: Bench) -> None:
        first, second, third, gone = bench.chains(4)
        bench.database.write(lambda connection: chains.erase(connection, [gone.id]))
        written = bench.store.write([rest(third), plan(first), move(second), move(gone)], now=NOW, timing=PENDING)
        assert set(written.deliveries) == {first.id, second.id, third.id}
        assert [bench.read(record.id).version for record in (first, second, third)] == [1, 1, 0]

    def test_two_that_write_the_same_chain_write_it_once(self, bench: Bench) -> None:
        records = bench.chains(10)
        with ThreadPoolExecutor(4) as pool:
            writes = [[make(record) for record in records] for make in (move, plan, move, plan)]
            results = list(pool.map(lambda batch: bench.store.write(batch, now=NOW, timing=PENDING), writes))
        written = [chain_id for result in results for chain_id in result.deliveries]
        assert sorted(written) == [record.id for record in records]
        assert all(bench.read(record.id).version == 1 for record in records)


class TestLimits:
    def test_what_goes_beyond_is_refused_and_the_type_is_paused(self, bench: Bench) -> None:
        records = bench.chains(5)
        writes: list[Write] = [rest(records[0]), move(records[1]), plan(records[2]), move(records[3]), plan(records[4])]
        written = bench.store.write(writes, now=NOW, timing=PENDING, limits={TYPE: lambda _: 3})
        assert set(written.deliveries) == {record.id for record in records[:4]}
        assert written.refused == {records[4].id} and written.paused == (TYPE,)
        assert bench.read(records[4].id) == records[4]
        with bench.database.read() as connection:
            assert chain_types.paused_types(connection) == {TYPE}

    def test_a_paused_type_plans_nothing_and_rests_all_the_same(self, bench: Bench) -> None:
        first, second = bench.chains(2)
        bench.database.write(
            lambda connection: chain_types.set_paused(connection, TYPE, paused=True, requested_by=None, reason="a test")
        )
        written = bench.store.write([rest(first), move(second)], now=NOW, timing=PENDING, limits={TYPE: lambda _: 3})
        assert set(written.deliveries) == {first.id}
        assert written.refused == {second.id} and written.paused == ()

    def test_a_chain_that_has_changed_uses_nothing_up(self, bench: Bench) -> None:
        changed, first, second = bench.chains(3)
        bench.change(changed, version=9)
        writes = [move(changed), move(first), move(second)]
        written = bench.store.write(writes, now=NOW, timing=PENDING, limits={TYPE: lambda _: 2})
        assert set(written.deliveries) == {first.id, second.id}
        assert written.refused == frozenset() and written.paused == ()


class TestRequests:
    def test_a_request_makes_the_chain_due_and_wakes_it(self, bench: Bench) -> None:
        record = bench.chain(due=False)
        bench.store.write_request(record.id, Request({"n": 1}, "send", {"a": 1}, "me"))
        after = bench.read(record.id)
        assert after.request == Request({"n": 1}, "send", {"a": 1}, "me")
        assert (after.wake, after.version) == (1, 0)
        assert after.due_at is not None and abs(datetime.now(UTC) - after.due_at) < timedelta(seconds=30)

    def test_a_rest_is_kept(self, bench: Bench) -> None:
        record, until = bench.chain(), datetime(2100, 1, 1, tzinfo=UTC)
        bench.change(record, next_update_at=until, due_at=until)
        bench.store.write_request(record.id, Request())
        assert bench.read(record.id).due_at == until

    def test_a_chain_that_waits_or_is_disabled_is_not_due(self, bench: Bench) -> None:
        disabled, waiting = bench.chains(2)
        bench.change(disabled, disabled=True, due_at=None)
        bench.store.write([plan(waiting)], now=NOW, timing=PENDING)
        for record in (disabled, waiting):
            bench.store.write_request(record.id, Request())
            after = bench.read(record.id)
            assert (after.due_at, after.wake, after.request) == (None, 1, Request())

    @pytest.mark.parametrize(
        ("earlier", "later", "replaced"),
        [
            ({"a": 1, "b": [2, {"c": 3}]}, {"b": [2, {"c": 3}], "a": 1}, False),
            ({"a": 2}, {"a": 2.0}, False),
            ({"a": 1}, {"a": True}, True),
            ({"a": 0}, {"a": False}, True),
            ({"a": [1, 2]}, {"a": [2, 1]}, True),
            ({"a": None}, {}, True),
            ({"a": "é"}, {"a": "\u00e9"}, False),
        ],
    )
    def test_a_different_request_leaves_a_trace(
        self, bench: Bench, earlier: dict[str, Any], later: dict[str, Any], *, replaced: bool
    ) -> None:
        record = bench.chain()
        for context in (earlier, later):
            bench.store.write_request(record.id, Request(context, requested_by="me"))
        assert bench.actions(record.id) == ["created", *(["request_replaced"] if replaced else [])]

    def test_there_must_be_a_chain(self, bench: Bench) -> None:
        with pytest.raises(ChainMissing):
            bench.store.write_request(4711, Request())

    def test_a_chain_that_is_asked_for_is_made_once(self, bench: Bench) -> None:
        resources = clean_resources([("cart", "77")])
        with ThreadPoolExecutor(4) as pool:
            ids = set(
                pool.map(
                    lambda number: bench.store.request_chain(TYPE, resources, Request({"n": number}), due=False),
                    range(8),
                )
            )
        (chain_id,) = ids
        record = bench.read(chain_id)
        assert record.wake == 8 and record.request is not None
        assert bench.actions(chain_id).count("created") == 1

    def test_a_new_chain_is_due_at_once(self, bench: Bench) -> None:
        chain_id = bench.store.request_chain(TYPE, clean_resources([("cart", "78")]), Request(), due=True)
        assert bench.read(chain_id).due_at is not None

    def test_takes_the_place_of_what_postgresql_s_jsonb_refuses(self, bench: Bench) -> None:
        record = bench.chain()
        stored: Any = literal('{"context": {"a": "\\u0000"}}', Text())
        stored = cast(stored, JSON) if bench.database.dialect == "postgresql" else stored
        raw = update(CHAIN).where(CHAIN.c.id == record.id).values(request=stored)
        bench.database.write(lambda connection: connection.execute(raw))
        bench.store.write_request(record.id, Request({"n": 1}))
        assert bench.read(record.id).request == Request({"n": 1})
        assert bench.actions(record.id) == ["created", "request_replaced"]


class TestBegin:
    def test_gives_the_rows_as_they_stand_after_it(self, bench: Bench) -> None:
        delivery = bench.planned()
        (begun,) = bench.store.begin([Owed(delivery.id, 1)], lease_seconds=75)
        assert begun.delivery == bench.delivery(delivery.chain_id)
        assert begun.chain == bench.read(delivery.chain_id)
        assert (begun.delivery.status, begun.delivery.attempt) == ("running", 1)
        assert begun.delivery.lease_until is not None
        assert abs(begun.delivery.lease_until - begun.machine_now - timedelta(seconds=75)) < timedelta(seconds=5)
        assert begun.delivery.publish_after is not None
        assert abs(begun.delivery.publish_after - begun.delivery.lease_until) < timedelta(seconds=1)

    def test_begins_a_row_whose_json_cannot_be_used_with_the_others(self, bench: Bench) -> None:
        planned = [bench.planned() for _ in range(3)]
        for table, row_id in ((DELIVERY, planned[0].id), (CHAIN, planned[1].chain_id)):
            bad: Any = literal("[1]", Text())  # which also MariaDB's own check lets pass
            bad = cast(bad, JSON) if bench.database.dialect == "postgresql" else bad
            statement = update(table).where(table.c.id == row_id).values(context=bad)
            bench.database.write(lambda connection, statement=statement: connection.execute(statement))

        begun = bench.store.begin([Owed(delivery.id, 1) for delivery in planned], lease_seconds=75)

        assert [row.delivery.id for row in begun] == sorted(delivery.id for delivery in planned)
        by_id = {row.delivery.id: row for row in begun}
        assert isinstance(by_id[planned[0].id].delivery.context, Unreadable)
        assert isinstance(by_id[planned[1].id].chain.context, Unreadable)
        assert isinstance(bench.read(planned[1].chain_id).context, Unreadable)
        assert by_id[planned[2].id].delivery.kwargs == {"template": "a"}

    def test_begins_each_attempt_once(self, bench: Bench) -> None:
        owed = [Owed(bench.planned().id, 1) for _ in range(6)]
        with ThreadPoolExecutor(4) as pool:
            rounds = list(pool.map(lambda _: bench.store.begin(owed, lease_seconds=75), range(4)))
        begun = [attempt.delivery.id for attempts in rounds for attempt in attempts]
        assert sorted(begun) == sorted(message.delivery_id for message in owed)
        assert all(
            [attempt.delivery.id for attempt in attempts] == sorted(attempt.delivery.id for attempt in attempts)
            for attempts in rounds
        ), "in the order of their ids"

    @pytest.mark.parametrize("attempt", [0, 2, 7])
    def test_asks_for_the_attempt_that_is_next(self, bench: Bench, attempt: int) -> None:
        assert bench.store.begin([Owed(bench.planned().id, attempt)], lease_seconds=75) == []

    @pytest.mark.parametrize(
        "status",
        [status for status in DeliveryStatus if status != DeliveryStatus.PENDING],
    )
    def test_asks_for_a_pending_one(self, bench: Bench, status: DeliveryStatus) -> None:
        delivery = bench.planned()
        bench.database.write(
            lambda connection: connection.execute(
                update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(status=status)
            )
        )
        assert bench.store.begin([Owed(delivery.id, 1)], lease_seconds=75) == []

    @pytest.mark.parametrize("change", [{"disabled": True}, {"pending_delivery_id": None}])
    def test_asks_the_chain(self, bench: Bench, change: Mapping[str, Any]) -> None:
        delivery = bench.planned()
        bench.change(bench.read(delivery.chain_id), **change)
        assert bench.store.begin([Owed(delivery.id, 1)], lease_seconds=75) == []

    def test_asks_whether_it_is_time_by_the_clock_of_the_rows(self, bench: Bench) -> None:
        begun = bench.begun()
        retry = deliveries.retry
        bench.database.write(
            lambda connection: retry(connection, begun.delivery, seconds=3600, grace_seconds=60, error="down")
        )
        owed = [Owed(begun.delivery.id, 2)]
        assert bench.store.begin(owed, lease_seconds=75) == []
        with clock.shift(timedelta(minutes=59)):
            assert bench.store.begin(owed, lease_seconds=75) == []
        with clock.shift(timedelta(minutes=61)):
            (again,) = bench.store.begin(owed, lease_seconds=75)
        assert again.delivery.attempt == 2

    def test_says_that_the_callback_is_not_called_yet(self, bench: Bench) -> None:
        begun = bench.begun()
        assert begun.delivery.begins == 1 and begun.delivery.was_not_called

    def test_a_begin_that_does_not_know_the_mark_is_not_taken_for_an_uncalled_one(self, bench: Bench) -> None:
        """A program of the version before has begun it again, and what an earlier begin said is still there."""
        owed = [Owed(bench.planned().id, 1)]
        (first,) = bench.store.begin(owed, lease_seconds=75)
        bench.database.write(lambda connection: deliveries.give_back(connection, first.delivery, grace_seconds=0))
        of_old = {"status": "running", "attempt": 1, "begins": 2}
        statement = update(DELIVERY).where(DELIVERY.c.id == first.delivery.id).values(of_old)
        bench.database.write(lambda connection: connection.execute(statement))
        assert not bench.delivery(first.chain.id).was_not_called

    def test_notes_when_the_attempt_began(self, bench: Bench) -> None:
        (begun,) = bench.store.begin([Owed(bench.planned().id, 1)], lease_seconds=75)
        assert begun.delivery.next_attempt_at is not None
        assert abs(begun.machine_now - begun.delivery.next_attempt_at) < timedelta(seconds=5)


def other_begin(bench: Bench, begun: Begun) -> None:
    """The attempt was given back, and another process has begun it again."""
    bench.database.write(lambda connection: deliveries.give_back(connection, begun.delivery, grace_seconds=0))
    bench.store.begin([Owed(begun.delivery.id, begun.delivery.attempt)], lease_seconds=75)


class TestMarkCalled:
    def test_marks_those_that_are_ours_and_gives_them_a_new_lease(self, bench: Bench) -> None:
        owed = sorted((Owed(bench.planned().id, 1) for _ in range(3)), key=lambda one: one.delivery_id)
        first, other, last = bench.store.begin(owed, lease_seconds=5)
        lapsed = update(DELIVERY).where(DELIVERY.c.id == last.delivery.id).values(lapse_seen_at=NOW)
        bench.database.write(lambda connection: connection.execute(lapsed))
        other_begin(bench, other)

        ours = bench.store.mark_called([one.delivery for one in (last, other, first)], lease_seconds=75)

        assert ours == {first.delivery.id, last.delivery.id}
        marked, left = bench.delivery(last.chain.id), bench.delivery(other.chain.id)
        assert not marked.was_not_called and left.was_not_called
        assert marked.lease_until - marked.waits_since > timedelta(seconds=70)
        assert marked.lapse_seen_at is None

    def test_can_be_called_again(self, bench: Bench) -> None:
        begun = bench.begun()
        for _ in range(2):
            assert bench.store.mark_called([begun.delivery], lease_seconds=75) == {begun.delivery.id}

    @pytest.mark.parametrize("status", [status for status in DeliveryStatus if status != DeliveryStatus.RUNNING])
    def test_asks_for_a_running_one(self, bench: Bench, status: DeliveryStatus) -> None:
        begun = bench.begun()
        statement = update(DELIVERY).where(DELIVERY.c.id == begun.delivery.id).values(status=status)
        bench.database.write(lambda connection: connection.execute(statement))
        assert bench.store.mark_called([begun.delivery], lease_seconds=75) == set()


class TestBeginAnew:
    def test_gives_chain_and_clock_as_they_are_now(self, bench: Bench) -> None:
        begun = bench.begun()
        bench.change(begun.chain, context={"paid": True})

        (anew,) = bench.store.begin_anew([begun.delivery], lease_seconds=200)

        assert anew.chain.context == {"paid": True} and anew.machine_now >= begun.machine_now
        assert (anew.delivery.attempt, anew.delivery.begins) == (begun.delivery.attempt, begun.delivery.begins)
        assert anew.delivery.lease_until is not None
        assert anew.delivery.lease_until - anew.machine_now > timedelta(seconds=190)
        assert anew.delivery == bench.delivery(begun.chain.id)

    @pytest.mark.parametrize("change", [{"disabled": True}, {"pending_delivery_id": None}])
    def test_asks_the_chain(self, bench: Bench, change: Mapping[str, Any]) -> None:
        begun = bench.begun()
        bench.change(begun.chain, **change)
        assert bench.store.begin_anew([begun.delivery], lease_seconds=75) == []

    def test_leaves_out_what_is_no_longer_ours(self, bench: Bench) -> None:
        ours, theirs = bench.begun(), bench.begun()
        other_begin(bench, theirs)
        anew = bench.store.begin_anew([theirs.delivery, ours.delivery], lease_seconds=75)
        assert [one.delivery.id for one in anew] == [ours.delivery.id]

    def test_of_nothing_is_nothing(self, bench: Bench) -> None:
        assert bench.store.begin_anew([], lease_seconds=75) == []


class TestRunning:
    def uncalled(self, bench: Bench, count: int = 1) -> list[Any]:
        owed = [Owed(bench.planned().id, 1) for _ in range(count)]
        return [row.delivery for row in bench.store.begin(owed, lease_seconds=75)]

    def test_the_row_says_that_a_begun_attempt_is_not_called_until_it_is_marked(self, bench: Bench) -> None:
        first, second = self.uncalled(bench, 2)
        assert first.was_not_called and second.was_not_called
        assert bench.delivery(first.chain_id).was_not_called
        assert bench.store.mark_called([first], lease_seconds=75) == {first.id}
        assert not bench.delivery(first.chain_id).was_not_called
        assert bench.delivery(second.chain_id).was_not_called

    def test_renewing_gives_a_new_lease_and_changes_nothing_else(self, bench: Bench) -> None:
        delivery, other = self.uncalled(bench, 2)
        statement = update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(lapse_seen_at=NOW)
        bench.database.write(lambda connection: connection.execute(statement))
        bench.store.renew([delivery], lease_seconds=3600)
        after = bench.delivery(delivery.chain_id)
        assert after.lease_until - delivery.lease_until > timedelta(minutes=50)
        assert after.lapse_seen_at is None and after.was_not_called
        assert bench.delivery(other.chain_id) == other

    @pytest.mark.parametrize("change", [{"attempt": 2}, {"begins": 2}, {"status": "pending"}])
    def test_neither_a_renewal_nor_a_mark_touches_another_begin(self, bench: Bench, change: Mapping[str, Any]) -> None:
        (delivery,) = self.uncalled(bench)
        statement = update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(**change)
        bench.database.write(lambda connection: connection.execute(statement))
        before = bench.delivery(delivery.chain_id)
        bench.store.renew([delivery], lease_seconds=3600)
        assert bench.store.mark_called([delivery], lease_seconds=3600) == set()
        assert bench.store.begin_anew([delivery], lease_seconds=3600) == []
        assert bench.delivery(delivery.chain_id) == before

    def test_a_renewal_does_not_wait_for_a_row_that_is_locked(self, bench: Bench) -> None:
        if bench.database.dialect == "sqlite":  # it has no locks of rows
            return
        locked, free = self.uncalled(bench, 2)

        def renew(connection: Connection) -> None:
            deliveries.read(connection, locked.id, lock=True)
            bench.store.renew([locked, free], lease_seconds=3600)

        bench.database.write(renew)
        assert bench.delivery(locked.chain_id).lease_until == locked.lease_until
        assert bench.delivery(free.chain_id).lease_until > free.lease_until


class TestFinish:
    def test_closes_the_delivery_and_moves_the_chain(self, bench: Bench) -> None:
        begun = bench.begun()
        ended = Finished(begun.delivery, NOW + HOUR, NOW + HOUR)
        assert bench.store.finish([ended], now=NOW) == {begun.delivery.id}
        after = bench.read(begun.chain.id)
        with bench.database.read() as connection:
            delivery = deliveries.read(connection, begun.delivery.id)
        assert (after.state, after.version, after.moves, after.pending_delivery_id) == ("reminded", 2, 1, None)
        assert (after.next_update_at, after.due_at) == (NOW + HOUR, NOW + HOUR)
        assert delivery is not None
        assert (delivery.status, delivery.kwargs, delivery.context) == ("delivered", None, None)
        assert delivery.finished_at is not None and delivery.lease_until is delivery.publish_after is None
        assert bench.actions(after.id) == ["created", "planned", "state_transition"]

    def test_records_each_once(self, bench: Bench) -> None:
        ended = [Finished(bench.begun().delivery, None, NOW) for _ in range(6)]
        with ThreadPoolExecutor(4) as pool:
            rounds = list(pool.map(lambda _: bench.store.finish(ended, now=NOW), range(4)))
        assert sorted(delivery_id for ids in rounds for delivery_id in ids) == sorted(end.delivery.id for end in ended)

    def test_leaves_out_what_is_not_running_or_another_attempt(self, bench: Bench) -> None:
        cancelled, other, fine = (bench.begun().delivery for _ in range(3))
        bench.database.write(
            lambda connection: deliveries.close_and_stay(connection, cancelled, now=NOW, reason="a test")
        )
        bench.database.write(
            lambda connection: connection.execute(update(DELIVERY).where(DELIVERY.c.id == other.id).values(attempt=2))
        )
        ended = [Finished(delivery, None, NOW) for delivery in (cancelled, other, fine)]
        assert bench.store.finish(ended, now=NOW) == {fine.id}

    def test_leaves_out_a_delivery_whose_chain_does_not_wait_for_it(self, bench: Bench) -> None:
        lost, fine = bench.begun(), bench.begun()
        bench.change(lost.chain, pending_delivery_id=None)
        ended = [Finished(begun.delivery, None, NOW) for begun in (lost, fine)]
        assert bench.store.finish(ended, now=NOW) == {fine.delivery.id}
        with bench.database.read() as connection:
            delivery = deliveries.read(connection, lost.delivery.id)
        assert delivery is not None and delivery.status == "running"

    @pytest.mark.parametrize("due_at", [NOW, None])
    def test_a_waiting_request_is_kept_except_where_the_state_is_terminal(
        self, bench: Bench, due_at: datetime | None
    ) -> None:
        begun = bench.begun()
        bench.store.write_request(begun.chain.id, Request({"n": 1}))
        bench.store.finish([Finished(begun.delivery, None, due_at)], now=NOW)
        assert bench.read(begun.chain.id).request == (None if due_at is None else Request({"n": 1}))

    def test_a_chain_that_was_disabled_meanwhile_moves_and_is_not_due(self, bench: Bench) -> None:
        begun = bench.begun()
        bench.change(begun.chain, disabled=True)
        bench.store.finish([Finished(begun.delivery, None, NOW)], now=NOW)
        after = bench.read(begun.chain.id)
        assert (after.state, after.due_at) == ("reminded", None)

    def test_leaves_out_an_earlier_begin_of_the_same_attempt(self, bench: Bench) -> None:
        """It was given back, and begun again with the same number: the process of the first begin is too late."""
        first = bench.begun()
        bench.database.write(lambda connection: deliveries.give_back(connection, first.delivery, grace_seconds=0))
        (second,) = bench.store.begin([Owed(first.delivery.id, 1)], lease_seconds=75)
        assert second.delivery.attempt == first.delivery.attempt
        late = first.delivery
        writes: dict[str, Callable[[Any], Any]] = {
            "renew": lambda connection: bool(deliveries.renew(connection, [late], lease_seconds=1)),
            "give back": lambda connection: deliveries.give_back(connection, late, grace_seconds=0),
            "postpone": lambda connection: deliveries.postpone(
                connection, late, what=WaitsFor.HOURS, reason="night", seconds=9
            ),
            "retry": lambda connection: deliveries.retry(connection, late, seconds=9, grace_seconds=9, error="down"),
            "stop": lambda connection: deliveries.stop(
                connection, late, status=DeliveryStatus.DEAD, error="down", now=NOW
            ),
            "cancel": lambda connection: deliveries.close_and_stay(connection, late, now=NOW, reason="no"),
            "call off": lambda connection: deliveries.call_off(connection, late, now=NOW, reason="no"),
            "skip": lambda connection: deliveries.skip(connection, late, next_update_at=None, due_at=None, now=NOW),
        }
        assert bench.store.finish([Finished(late, None, NOW)], now=NOW) == set()
        assert {how: bench.database.write(write) or False for how, write in writes.items()} == dict.fromkeys(
            writes, False
        )
        assert bench.store.finish([Finished(second.delivery, None, NOW)], now=NOW) == {late.id}

    def test_knows_a_delivery_from_before_begins_were_counted_by_its_attempt(self, bench: Bench) -> None:
        delivery = bench.planned()
        bench.database.write(
            lambda connection: connection.execute(
                update(DELIVERY).where(DELIVERY.c.id == delivery.id).values(begins=None)
            )
        )
        (begun,) = bench.store.begin([Owed(delivery.id, 1)], lease_seconds=75)
        assert (begun.delivery.attempt, begun.delivery.begins) == (1, None)
        assert bench.store.finish([Finished(begun.delivery, None, NOW)], now=NOW) == {delivery.id}


class TestIdentity:
    def test_every_chain_has_a_uid_of_its_own_and_its_keys_come_from_it(self, bench: Bench) -> None:
        made = [
            chain_id
            for chain_id, _ in bench.store.create_many(TYPE, [[("cart", "a")], [("cart", "b")]], now=None, due=True)
        ]
        made.append(bench.store.request_chain(TYPE, [("cart", "c")], Request(), due=True))
        records = [bench.read(chain_id) for chain_id in made]
        assert len({record.uid for record in records} - {None}) == 3
        keys = {idempotency_key(record, "Remind") for record in records}
        bench.store.write([plan(record) for record in records], now=NOW, timing=PENDING)
        assert {bench.delivery(record.id).idempotency_key for record in records} == keys
        assert keys.isdisjoint({idempotency_key(replace(record, uid=None), "Remind") for record in records})

    def test_a_chain_from_before_it_had_a_uid_keeps_the_key_by_its_id(self, bench: Bench) -> None:
        record = bench.chain()
        bench.change(record, uid=None, started_at=None, entered_at=None)
        old = bench.read(record.id)
        assert (old.uid, old.started_at, old.entered_at) == (None, old.created_at, old.updated_at)
        bench.store.write([plan(old)], now=NOW, timing=PENDING)
        key = str(uuid.uuid5(uuid.UUID("6c7e1f0a-6f3c-5f0e-9d53-7b8a3c1e2d40"), f"{old.id}:0:Remind"))
        assert bench.delivery(old.id).idempotency_key == key

    def test_says_since_when_a_chain_is_in_its_state(self, bench: Bench) -> None:
        record = bench.chain()
        bench.store.write([plan(record)], now=NOW + HOUR, timing=PENDING)
        assert bench.read(record.id).entered_at == record.entered_at, "a plan is no move"
        (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
        bench.store.finish([Finished(begun.delivery, None, NOW)], now=NOW + 2 * HOUR)
        moved = bench.read(record.id)
        assert (moved.started_at, moved.entered_at) == (record.started_at, NOW + 2 * HOUR)
        bench.store.write([move(moved)], now=NOW + 3 * HOUR, timing=PENDING)
        assert bench.read(record.id).entered_at == NOW + 3 * HOUR


def call_off(bench: Bench, begun: Begun) -> datetime | None:
    return bench.database.write(
        lambda connection: deliveries.call_off(connection, begun.delivery, now=NOW, reason="no")
    )


class TestCallOff:
    """A delivery that its last look has cancelled."""

    def test_the_first_makes_the_chain_due_and_the_next_ones_later_and_later(self, bench: Bench) -> None:
        record, waits = bench.chain(), []
        for _ in range(4):
            bench.store.write([plan(bench.read(record.id))], now=NOW, timing=PENDING)
            (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
            due_at = call_off(bench, begun)
            after = bench.read(record.id)
            assert after.due_at == due_at and after.failures == len(waits)
            waits.append((due_at - NOW).total_seconds())
        assert waits[0] == 0 and 40 <= waits[1] <= 60 and waits[1] < waits[2] < waits[3]

    def test_another_visit_of_a_state_begins_anew(self, bench: Bench) -> None:
        record = bench.chain()
        for visit in range(2):
            bench.store.write([plan(bench.read(record.id))], now=NOW, timing=PENDING)
            (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
            due_at = call_off(bench, begun)
            assert due_at == NOW, visit
            bench.store.write([move(bench.read(record.id))], now=NOW, timing=PENDING)

    @pytest.mark.parametrize("before", ["a person has cancelled one", "the chain was reset since"])
    def test_counts_only_what_was_called_off_in_this_visit(self, bench: Bench, before: str) -> None:
        record = bench.chain()
        bench.store.write([plan(record)], now=NOW, timing=PENDING)
        (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
        if before == "a person has cancelled one":
            first = begun.delivery
            by_hand = deliveries.close_and_stay
            bench.database.write(lambda connection: by_hand(connection, first, now=NOW, reason="by hand"))
        else:
            call_off(bench, begun)
            put = {"state": NEW, "action": EventAction.RESET, "due_at": NOW, "requested_by": None, "reason": None}
            now = bench.read(record.id)
            bench.database.write(lambda connection: chains.set_state(connection, now, now=NOW, **put))
        bench.store.write([plan(bench.read(record.id))], now=NOW, timing=PENDING)
        (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
        assert call_off(bench, begun) == NOW
        assert bench.read(record.id).failures == 0

    @pytest.mark.parametrize("newer", [None, Request({"n": 2})])
    def test_puts_the_request_back_unless_a_newer_one_is_there(self, bench: Bench, newer: Request | None) -> None:
        record = bench.chain()
        asked = Request({"n": 1}, "send", {"k": [1, None]}, "me")
        bench.store.write_request(record.id, asked)
        read = bench.read(record.id)
        bench.store.write([plan(read, context=asked.context, kwargs=asked.kwargs)], now=NOW, timing=PENDING)
        assert bench.read(record.id).request is None
        (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
        if newer is not None:
            bench.store.write_request(record.id, newer)
        call_off(bench, begun)
        assert bench.read(record.id).request == (newer or asked)
        with bench.database.read() as connection:
            closed = deliveries.read(connection, begun.delivery.id)
        assert closed is not None and (closed.status, closed.request) == ("cancelled", None)

    @pytest.mark.parametrize("taken", [None, Request({"n": 1})])
    @pytest.mark.parametrize("disabled", [False, True])
    def test_a_newer_request_makes_the_chain_due_at_once_however_often_it_was_called_off(
        self, bench: Bench, taken: Request | None, *, disabled: bool
    ) -> None:
        record = bench.chain()
        for visit in range(3):
            if taken is not None:
                bench.store.write_request(record.id, taken)
            bench.store.write([plan(bench.read(record.id))], now=NOW, timing=PENDING)
            (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
            if visit == 2:
                bench.store.write_request(record.id, Request({"n": 2}))
                if disabled:
                    bench.change(record, disabled=True)
            due_at = call_off(bench, begun)
        assert due_at == NOW
        after = bench.read(record.id)
        assert (after.due_at, after.request) == (None if disabled else NOW, Request({"n": 2}))
        assert after.failures == 2

    def test_a_request_that_is_called_off_again_and_again_waits_longer_and_longer(self, bench: Bench) -> None:
        record, asked, waits = bench.chain(), Request({"n": 1}), []
        bench.store.write_request(record.id, asked)
        for _ in range(3):
            bench.store.write(
                [plan(bench.read(record.id), context=asked.context, kwargs=asked.kwargs)], now=NOW, timing=PENDING
            )
            (begun,) = bench.store.begin([Owed(bench.delivery(record.id).id, 1)], lease_seconds=75)
            waits.append((call_off(bench, begun) - NOW).total_seconds())
            assert bench.read(record.id).request == asked
        assert waits[0] == 0 < waits[1] < waits[2]


class TestCreateMany:
    def test_says_for_each_set_whether_it_was_made_here(self, bench: Bench) -> None:
        sets = [clean_resources([("cart", name)]) for name in ("a", "b", "a", "c")]
        first = bench.store.create_many(TYPE, sets[:2], now=NOW, due=True)
        second = bench.store.create_many(TYPE, sets, now=NOW, due=False)
        assert [created for _, created in first] == [True, True]
        assert [created for _, created in second] == [False, False, False, True]
        assert second[0] == second[2] and second[0][0] == first[0][0]
        assert bench.read(second[3][0]).due_at is None and bench.read(second[0][0]).due_at == NOW

    def test_many_callers_make_each_chain_once(self, bench: Bench) -> None:
        sets = [clean_resources([("cart", str(number))]) for number in range(30)]
        with ThreadPoolExecutor(4) as pool:
            rounds = list(pool.map(lambda _: bench.store.create_many(TYPE, sets, now=NOW, due=True), range(4)))
        made = [chain_id for answers in rounds for chain_id, created in answers if created]
        assert len(made) == len(set(made)) == 30
        assert all(
            [chain_id for chain_id, _ in answers] == [chain_id for chain_id, _ in rounds[0]] for answers in rounds
        )


class TestHistories:
    """The same long random history leaves the same rows, whatever the store and the database."""

    @pytest.mark.parametrize("seed", HISTORY_SEEDS)
    @pytest.mark.parametrize("bench", PAIRS[1:], indirect=True)
    def test_leaves_the_same_rows_as_the_portable_store_on_sqlite(
        self, bench: Bench, seed: int, tmp_path: Path
    ) -> None:
        reference = Database(f"sqlite:///{tmp_path / 'reference.sqlite'}")
        upgrade(reference)
        try:
            expected = RandomHistory(Bench(PortableStore(reference), reference), seed).run()
        finally:
            reference.dispose()
        found = RandomHistory(bench, seed).run()
        for name in ("chains", "deliveries", "events"):
            assert found[name] == expected[name], name
        assert len(expected["events"]) > HISTORY_STEPS / 4, "a history in which something happens"
        assert {delivery["status"] for delivery in expected["deliveries"]} > set(CLOSED_STATUSES)


class RandomHistory:
    """Operations drawn at random, the same for the same seed, on a handful of chains."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench = bench
        self._store = bench.store
        self._database = bench.database
        self._random = random.Random(seed)
        self._now = NOW
        self._database.clock = lambda: self._now
        self._ids = [bench.chain(due=self._random.random() < 0.5).id for _ in range(12)]
        for number, chain_id in enumerate(self._ids):  # else the keys would differ between two histories
            uid = update(CHAIN).where(CHAIN.c.id == chain_id).values(uid=str(uuid.UUID(int=number)))
            self._database.write(lambda connection, uid=uid: connection.execute(uid))
        self._running: list[Begun] = []

    def run(self) -> dict[str, list[Any]]:
        """What the tables hold after the history."""
        steps = (
            self._write,
            self._write,
            self._write,
            self._request,
            self._begin,
            self._begin,
            self._end,
            self._person,
        )
        for _ in range(HISTORY_STEPS):
            self._now += timedelta(seconds=self._random.randrange(1, 600))
            self._random.choice(steps)()
        return self._rows()

    def _some(self, most: int = 5) -> list[ChainRecord]:
        records = self._store.read(self._random.sample(self._ids, self._random.randint(1, most)))[0]
        return [records[chain_id] for chain_id in sorted(records)]

    def _moment(self) -> datetime | None:
        return None if self._random.random() < 0.3 else self._now + timedelta(minutes=self._random.randrange(90))

    def _write(self) -> None:
        records = self._some()
        if self._random.random() < 0.2:  # something happens between the read and the write
            self._request()
        writes: list[Write] = []
        for record in records:
            kind = self._random.choice(("move", "rest", "plan"))
            if kind == "move":
                state = self._random.choice((NEW, "paid", "open", DONE))
                writes.append(
                    move(
                        record,
                        state,
                        next_update_at=self._moment(),
                        due_at=self._moment(),
                        takes_request=self._random.random() < 0.7,
                    )
                )
            elif kind == "rest":
                event = self._random.choice((None, EventAction.NO_CALLBACK, EventAction.GUARD_FAILED))
                clear, failures = self._random.random() < 0.5, self._random.randrange(3)
                writes.append(
                    rest(record, due_at=self._moment(), clear_request=clear, failures=failures, event=event, detail="x")
                )
            else:
                writes.append(
                    plan(
                        record,
                        max_attempts=self._random.randint(1, 5),
                        rest_until=self._moment(),
                        takes_request=self._random.random() < 0.7,
                    )
                )
        self._store.write(writes, now=self._now, timing=PENDING)

    def _request(self) -> None:
        context = self._random.choice((None, {"a": 1, "b": 2}, {"b": 2, "a": 1.0}, {"a": [1, {"é": None}]}))
        self._store.write_request(self._random.choice(self._ids), Request(context, requested_by="app"))

    def _begin(self) -> None:
        with self._database.read() as connection:
            rows = connection.execute(
                select(DELIVERY.c.id, DELIVERY.c.attempt)
                .where(DELIVERY.c.status == DeliveryStatus.PENDING)
                .order_by(DELIVERY.c.chain_id, DELIVERY.c.chain_version)
            ).all()
        owed = [Owed(row.id, row.attempt + self._random.choice((1, 1, 1, 2))) for row in rows[:4]]
        if owed:
            begun = self._store.begin(owed, lease_seconds=75)
            self._running += sorted(begun, key=lambda attempt: attempt.chain.id)

    def _end(self) -> None:
        if not self._running:
            return
        self._random.shuffle(self._running)
        ended, self._running = self._running[:3], self._running[3:]
        ended.sort(key=lambda attempt: attempt.chain.id)
        how = self._random.choice(("finish", "finish", *OTHER_ENDS))
        if how == "finish":
            self._store.finish(
                [Finished(attempt.delivery, self._moment(), self._moment()) for attempt in ended], now=self._now
            )
            return
        moments = [self._moment() for _ in ended]

        def work(connection: Any) -> None:
            for attempt, moment in zip(ended, moments, strict=True):
                end_otherwise(connection, attempt, how, now=self._now, due_at=moment)

        self._database.write(work)

    def _operator(self) -> None:
        """Cancel what is dead, or a waiting one, so that its chain goes on."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(DELIVERY.c.id)
                .where(DELIVERY.c.status.in_([DeliveryStatus.DEAD, DeliveryStatus.PENDING]))
                .order_by(DELIVERY.c.chain_id)
            )
            found = rows.scalars().all()
            delivery = deliveries.read(connection, self._random.choice(found)) if found else None
        if delivery is not None:
            self._database.write(
                lambda connection: deliveries.close_and_stay(connection, delivery, now=self._now, reason="by hand")
            )

    def _person(self) -> None:
        chain_id, disabled = self._random.choice(self._ids), self._random.random() < 0.2

        def work(connection: Any) -> None:
            if chains.set_disabled(
                connection, chain_id, disabled=disabled, requested_by="me", reason=None, now=self._now
            ):
                deliveries.follow_disabling(connection, [chain_id])

        self._database.write(work)

    def _rows(self) -> dict[str, list[Any]]:
        with self._database.read() as connection:
            records = chains.read_many(connection, self._ids)
            rows = list(connection.execute(select(DELIVERY)).mappings())
            events = [event for chain_id in self._ids for event in history.events(connection, chain_id)]
            assert connection.execute(select(EVENT.c.id)).all()
        place = {row["id"]: (row["chain_id"], row["chain_version"]) for row in rows}
        shown = []
        for record in records.values():
            values = asdict(record)
            values["pending_delivery_id"] = place.get(record.pending_delivery_id or "")
            shown.append(values)
        machine = {"next_attempt_at", "publish_after", "lease_until", "planned_at", "finished_at", "waits_since"}
        return {
            "chains": shown,
            "deliveries": [
                {
                    name: value if name not in machine else value is not None
                    for name, value in row.items()
                    if name != "id"
                }
                for row in sorted(rows, key=lambda row: place[row["id"]])
            ],
            "events": [{name: value for name, value in asdict(event).items() if name != "id"} for event in events],
        }


OTHER_ENDS = ("retry", "postpone", "give back", "cancel", "call off", "skip", "stop", "unknown")


def end_otherwise(connection: Any, attempt: Begun, how: str, *, now: datetime, due_at: datetime | None) -> None:
    """End an attempt in one of the ways that are no finish."""
    delivery = attempt.delivery
    if how == "retry":
        deliveries.retry(connection, delivery, seconds=-1, grace_seconds=60, error="down")
    elif how == "postpone":
        deliveries.postpone(connection, delivery, what=WaitsFor.RATE, reason="waits", seconds=-1, has_place=True)
    elif how == "give back":
        deliveries.give_back(connection, delivery, grace_seconds=0)
    elif how == "call off":
        deliveries.call_off(connection, delivery, now=now, reason="not valid any more")
    elif how == "cancel":
        deliveries.close_and_stay(connection, delivery, now=now, reason="not valid any more")
    elif how == "skip":
        deliveries.skip(connection, delivery, next_update_at=None, due_at=due_at, now=now)
    elif how == "stop":
        deliveries.stop(connection, delivery, status=DeliveryStatus.DEAD, error="no such address", now=now)
    else:
        with clock.shift(timedelta(hours=1)):
            overdue.open_next(
                connection, delivery, unknown=True, seconds=-3600, grace_seconds=0, error="its process died"
            )
