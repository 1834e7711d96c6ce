"""The doctor: each disagreement produced on purpose is named in one line, and repaired where that is safe.

That a healthy deployment has none is shown with real worker and beat processes, in the acceptance tests.
"""

from datetime import UTC, datetime, timedelta

import pytest
import redis
from sqlalchemy import delete, select, update

from dispatcher import NEW, Chain, Dispatcher
from dispatcher.coordination.locks import ChainLocks, LockFacts
from dispatcher.passes.turns import Turns
from dispatcher.storage.models import ChainRow, EventRow, TickRow
from tests.integration import shop

pytestmark = pytest.mark.integration

NOBODY = "redis://:hunter2@127.0.0.1:1/0"
TRANSITIONS = {NEW: [shop.Remind], "reminded": [shop.Never]}
HOUR_AGO = timedelta(hours=1)

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Where the database makes no difference."""


@pytest.fixture
def dispatcher(make_dispatcher: shop.Make) -> Dispatcher:
    """A dispatcher whose passes have just run, with nobody to ask but the database."""
    made = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()), redis_url=None, broker_url=None)
    touch_ticks(made)
    return made


def touch_ticks(dispatcher: Dispatcher, ago: timedelta = timedelta(0)) -> None:
    """Beat's passes have last run `ago`."""
    for name in ("dispatcher.sweep", "dispatcher.relay"):
        Turns(dispatcher.database).claim(name, 1)
        set_tick(dispatcher, name, datetime.now(UTC) - ago)


def set_tick(dispatcher: Dispatcher, name: str, last_at: datetime) -> None:
    statement = update(TickRow).where(TickRow.name == name).values(last_at=last_at)
    assert dispatcher.database.write(lambda connection: connection.execute(statement).rowcount) == 1


def found(dispatcher: Dispatcher, *areas: str) -> list[str]:
    """The findings of these areas, as they are printed: each is one line that ends with what mends it."""
    lines = [str(one) for one in dispatcher.examine() if one.area in areas]
    assert all(len(line.splitlines()) == 1 and "; " in line for line in lines)
    return lines


def overdue(dispatcher: Dispatcher, chain: Chain) -> str:
    """The id of a delivery that the relay should have seen an hour ago."""
    delivery = shop.planned(dispatcher, chain)
    shop.change_delivery(dispatcher, delivery.id, publish_after=datetime.now(UTC) - HOUR_AGO)
    return delivery.id


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_agree_are_no_finding(dispatcher: Dispatcher) -> None:
    shop.planned(dispatcher, shop.new_chain(dispatcher, 1))
    shop.attempt(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher, 2)))
    shop.new_chain(dispatcher, 3)
    before = shop.dump_rows(dispatcher)

    assert found(dispatcher, "database", "chain", "delivery", "chain type", "beat", "sweep") == []

    assert shop.dump_rows(dispatcher) == before, "it only reads"


@pytest.mark.parametrize("closed", [False, True])
def test_a_chain_whose_delivery_is_missing_or_closed_is_named_and_made_due(
    dispatcher: Dispatcher, closed: bool
) -> None:
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    if closed:
        shop.attempt(dispatcher, delivery)
    pending = delivery.id if closed else "0" * 32
    shop.change_chain(dispatcher, chain.id, pending_delivery_id=pending, due_at=None)
    if not closed:
        shop.change_delivery(dispatcher, delivery.id, status="cancelled")

    expected = f"chain: {chain.id} waits for a delivery that is closed or missing; --repair makes it due"
    assert found(dispatcher, "chain", "delivery") == [expected]

    gone, left = dispatcher.repair()
    assert [str(one) for one in gone] == [expected]
    assert found(dispatcher, "chain", "delivery") == [] and gone[0] not in left
    row = shop.row_of(dispatcher, chain.id)
    assert row.pending_delivery_id is None and row.due_at is not None


def test_an_open_delivery_that_no_chain_waits_for_is_named_and_closed(dispatcher: Dispatcher) -> None:
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.change_chain(dispatcher, chain.id, pending_delivery_id=None, due_at=shop.LONG_AGO)

    expected = f"delivery: {delivery.id} is open, but its chain does not wait for it; --repair closes it as cancelled"
    assert found(dispatcher, "chain", "delivery") == [expected]

    gone, _ = dispatcher.repair()
    assert [str(one) for one in gone] == [expected]
    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert shop.actions(chain)[-1] == "cancelled"
    shop.assert_consistent(dispatcher)


def test_an_orphan_that_runs_is_closed_only_once_its_attempt_is_over(
    dispatcher: Dispatcher, make_dispatcher: shop.Make
) -> None:
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery)
    shop.change_chain(dispatcher, chain.id, pending_delivery_id=None)

    gone, left = dispatcher.repair()
    assert gone == [] and shop.delivery_of(dispatcher, chain).status == "running"
    assert f"delivery: {delivery.id} is open" in "\n".join(map(str, left))

    make_dispatcher(shop.cart(TRANSITIONS)).relay()
    gone, _ = dispatcher.repair()
    assert len(gone) == 1 and shop.delivery_of(dispatcher, chain).status == "cancelled"


def test_what_a_deletion_by_hand_leaves_behind_stops_no_relay_and_is_closed(
    dispatcher: Dispatcher, make_dispatcher: shop.Make
) -> None:
    """No foreign key keeps a delivery's chain."""
    others = [shop.new_chain(dispatcher, number) for number in range(2)]
    for chain in others:
        shop.crashed(dispatcher, shop.planned(dispatcher, chain))
    gone, owed = (shop.new_chain(dispatcher, number) for number in (2, 3))
    shop.crashed(dispatcher, shop.planned(dispatcher, gone))
    shop.change_delivery(dispatcher, shop.planned(dispatcher, owed).id, publish_after=shop.LONG_AGO)
    erased = [gone.id, owed.id]
    dispatcher.database.write(lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id.in_(erased))))

    worker = make_dispatcher(shop.cart(TRANSITIONS))
    assert worker.relay() == {"relayed": 3, "settled": 3}

    mended, _ = dispatcher.repair()
    assert len(mended) == 2 and {shop.delivery_of(dispatcher, chain).status for chain in (gone, owed)} == {"cancelled"}
    assert {shop.delivery_of(dispatcher, chain).status for chain in others} == {"pending"}
    dispatcher.database.write(lambda connection: connection.execute(update(EventRow).values(created_at=shop.LONG_AGO)))
    dispatcher.prune(days=1)
    with dispatcher.database.read() as connection:
        kept = connection.execute(select(EventRow.chain_id).order_by(EventRow.id)).scalars().all()
    assert kept == [chain.id for chain in others]


def test_repairing_does_not_end_with_the_first_page(dispatcher: Dispatcher) -> None:
    chains = [shop.new_chain(dispatcher, number) for number in range(45)]
    for chain in chains:
        shop.change_chain(dispatcher, chain.id, pending_delivery_id="0" * 32)

    gone, left = dispatcher.repair()

    assert len(gone) == len(chains)
    assert not [one for one in left if one.area == "chain"]


@pytest.mark.parametrize("status", ["dead", "held"])
def test_deliveries_that_wait_for_a_person_are_counted_and_left_alone(dispatcher: Dispatcher, status: str) -> None:
    for number in range(3):
        shop.change_delivery(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher, number)).id, status=status)
    before = shop.dump_rows(dispatcher)

    (line,) = found(dispatcher, "delivery")
    assert line.startswith(f"delivery: 3 {status}: a person must decide; ")
    assert f"dispatcher deliveries list --status {status}" in line

    gone, _ = dispatcher.repair()
    assert gone == [] and shop.dump_rows(dispatcher) == before


def test_a_delivery_that_the_relay_has_not_looked_at_is_named(dispatcher: Dispatcher) -> None:
    late = overdue(dispatcher, shop.new_chain(dispatcher, 1))
    ended = shop.new_chain(dispatcher, 2)
    shop.crashed(dispatcher, shop.planned(dispatcher, ended))

    assert sorted(found(dispatcher, "delivery")) == sorted(
        f"delivery: {delivery_id} is overdue for the relay; "
        "start beat and a worker on dispatcher.sweeps, or run `dispatcher relay`"
        for delivery_id in (late, shop.delivery_of(dispatcher, ended).id)
    )


def test_the_delivery_of_a_disabled_chain_is_not_overdue(dispatcher: Dispatcher) -> None:
    chain = shop.new_chain(dispatcher)
    overdue(dispatcher, chain)
    chain.disable()

    assert found(dispatcher, "delivery", "chain") == []


def test_a_paused_type_is_named_with_its_reason_in_one_line(dispatcher: Dispatcher) -> None:
    dispatcher.pause(shop.CHAIN_TYPE, "mail provider\nis down")
    shop.change_chain(dispatcher, shop.new_chain(dispatcher).id, due_at=shop.LONG_AGO)

    assert found(dispatcher, "chain type", "sweep") == [
        (
            f"chain type: {shop.CHAIN_TYPE} is paused: mail provider is down; "
            f"`dispatcher chain-types resume {shop.CHAIN_TYPE}`"
        )
    ]


def test_states_and_types_that_no_configuration_has_any_more_are_named_with_their_chains(
    dispatcher: Dispatcher, make_dispatcher: shop.Make
) -> None:
    for number in range(2):
        shop.change_chain(dispatcher, shop.new_chain(dispatcher, number).id, state="half way")
    other = {"chains": [{"chain_type": "old", "transitions": {NEW: [shop.Remind]}}]}
    shop.new_chain(make_dispatcher(other), 3, "old")

    unknown = "which this configuration does not know"
    mapped = f"`dispatcher chains map --type {shop.CHAIN_TYPE} --from 'half way' --to STATE`"
    assert found(dispatcher, "chain type") == [
        f"chain type: 2 chains of {shop.CHAIN_TYPE} are in state 'half way', {unknown}; {mapped}",
        f"chain type: 1 chains of old are in state 'new', {unknown}; put the chain type back into the configuration",
    ]

    dispatcher.map_states(shop.CHAIN_TYPE, "half way", "reminded")
    assert len(found(dispatcher, "chain type")) == 1


# --- passes ----------------------------------------------------------------------------------------------------------


@on_sqlite
def test_passes_that_never_ran_are_named(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS), redis_url=None, broker_url=None)

    assert found(dispatcher, "beat") == [
        "beat: dispatcher.sweep has never run; start `celery -A workers beat`",
        "beat: dispatcher.relay has never run; start `celery -A workers beat`",
    ]


def test_missed_ticks_are_named(dispatcher: Dispatcher) -> None:
    touch_ticks(dispatcher, timedelta(seconds=170))
    set_tick(dispatcher, "dispatcher.relay", datetime.now(UTC) - HOUR_AGO)

    (line,) = found(dispatcher, "beat")
    assert line.startswith("beat: dispatcher.relay last ran 360") and line.endswith("not every 10 s; start beat")

    touch_ticks(dispatcher, timedelta(seconds=190))
    assert "dispatcher.sweep last ran 19" in found(dispatcher, "beat")[0]


def test_chains_that_every_sweep_asks_again_are_not_late(dispatcher: Dispatcher) -> None:
    """A guard that says no again writes nothing: such a chain's `due_at` says nothing about the workers."""
    shop.change_chain(dispatcher, shop.new_chain(dispatcher).id, due_at=datetime.now(UTC) - timedelta(hours=1))

    assert found(dispatcher, "sweep") == []


def test_a_chain_that_has_been_due_for_long_is_told(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(), recheck_seconds=60))
    ages = [timedelta(hours=1), timedelta(hours=2), timedelta(0)]
    for number, age in enumerate(ages):
        shop.change_chain(dispatcher, shop.new_chain(dispatcher, number).id, due_at=datetime.now(UTC) - age)

    (line,) = found(dispatcher, "sweep")
    assert line.startswith("sweep: the oldest due chain has waited 720")
    assert line.endswith("add workers, or look at their logs")


# --- set-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["redis", "broker"])
@on_sqlite
def test_a_service_that_is_away_is_named_without_its_password(make_dispatcher: shop.Make, service: str) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink()), **{f"{service}_url": NOBODY})

    (line,) = found(dispatcher, service)

    assert line.startswith(f"{service}: cannot reach the ") and "127.0.0.1:1" in line
    assert line.endswith(f", or correct DISPATCHER_{service.upper()}_URL") and "hunter2" not in line
    assert found(dispatcher, "database") == []


@on_sqlite
def test_a_database_that_is_away_is_named_and_the_rest_is_examined(make_dispatcher: shop.Make) -> None:
    url = "postgresql://shop:hunter2@127.0.0.1:1/shop"
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS), database_url=url, redis_url=None, broker_url=None)

    lines = found(dispatcher, "database", "redis", "broker", "chain", "beat")

    assert [line.partition(":")[0] for line in lines] == ["database", "redis", "broker"]
    assert lines[0].startswith("database: cannot reach the database at postgresql") and "hunter2" not in lines[0]
    assert lines[0].endswith("start the database, or correct DISPATCHER_DATABASE_URL")


def test_a_database_that_is_not_migrated_is_named(make_dispatcher: shop.Make, empty_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS), database_url=empty_url, redis_url=None, broker_url=None)

    (line,) = found(dispatcher, "database", "chain", "beat")

    assert line.startswith("database: at revision None, not at ") and "run `dispatcher db upgrade`" in line


@on_sqlite
def test_services_that_are_not_configured_are_named(dispatcher: Dispatcher) -> None:
    assert found(dispatcher, "redis", "broker") == [
        "redis: no lock server is configured; set DISPATCHER_REDIS_URL, or run `dispatcher dev`",
        "broker: no broker is configured; set DISPATCHER_BROKER_URL, or run `dispatcher dev`",
    ]


@on_sqlite
@pytest.mark.parametrize("seconds", [-61, 61, 4])
def test_clocks_that_differ_are_named(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, redis_url: str, seconds: int
) -> None:
    def there() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=seconds)

    monkeypatch.setattr(dispatcher.database, "machine_now", lambda _: there())
    monkeypatch.setattr(ChainLocks, "examine", lambda _: LockFacts(there(), "noeviction", ()))
    shop.change_delivery(dispatcher, shop.planned(dispatcher, shop.new_chain(dispatcher)).id, status="dead")

    lines = found(dispatcher, "database", "redis")

    text = "its clock and this host's are 61 s apart; synchronise the clocks (NTP)"
    assert lines == ([] if abs(seconds) < 5 else [f"database: {text}", f"redis: {text}"])
    assert len(found(dispatcher, "delivery")) == 1, "the rows are looked at all the same"


@on_sqlite
def test_a_redis_that_may_evict_is_named(make_dispatcher: shop.Make, redis_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS))
    assert found(dispatcher, "redis") == []
    with redis.Redis.from_url(redis_url) as client:
        before = client.config_get("maxmemory-policy")["maxmemory-policy"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            lines = found(dispatcher, "redis")
        finally:
            client.config_set("maxmemory-policy", before)

    assert lines == ["redis: maxmemory-policy is allkeys-lru: messages may vanish; set it to noeviction"]


@on_sqlite
def test_keys_that_never_expire_are_named_and_deleted(make_dispatcher: shop.Make, redis_url: str) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS))
    with redis.Redis.from_url(redis_url) as client:
        client.set("dispatcher:lock:1", "token")
        client.set("dispatcher:lock:2", "token", ex=100)
        client.set("dispatcher:queued:3", "1")
        client.set("shop:lock:1", "another's")

    expected = [f"redis: dispatcher:{key} never expires; --repair deletes it" for key in ("lock:1", "queued:3")]
    assert found(dispatcher, "redis") == expected

    gone, _ = dispatcher.repair()
    assert [str(one) for one in gone] == expected
    left = {key for key in shop.dump_keys(redis_url) if b":" in key}
    assert left == {b"dispatcher:lock:2", b"shop:lock:1"}


# --- queues ----------------------------------------------------------------------------------------------------------


@on_sqlite
def test_queues_that_nobody_consumes_and_those_that_are_too_long_are_named(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(), queue="carts"), max_backlog=2)
    for number in range(3):
        shop.new_chain(dispatcher, number).enqueue()
    shop.planned(dispatcher, shop.new_chain(dispatcher, 4))

    queues = ["dispatcher.requests", "dispatcher.chains", "dispatcher.callbacks", "dispatcher.sweeps", "carts"]
    assert found(dispatcher, "worker", "broker") == [
        *(f"worker: no worker answers for queue {queue}; start a worker that consumes it" for queue in queues),
        "broker: 3 messages wait in dispatcher.requests; add workers that consume it",
    ]


# --- what mends it ---------------------------------------------------------------------------------------------------


def test_what_a_person_decided_is_no_finding_any_more(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink(shop.Raises(OSError()))
    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=sink), redis_url=None, broker_url=None)
    chains = [shop.new_chain(dispatcher, number) for number in range(3)]
    for chain in chains:
        delivery = shop.planned(dispatcher, chain)
        shop.change_delivery(dispatcher, delivery.id, max_attempts=1)
        assert shop.attempt(dispatcher, delivery).outcome == "dead"
    assert len(found(dispatcher, "delivery")) == 1

    chains[0].refresh().retry_delivery()
    chains[1].refresh().cancel_delivery()
    chains[2].refresh().skip_delivery()
    shop.wait_over(dispatcher, shop.delivery_of(dispatcher, chains[0]))
    sink.effect = None
    assert shop.attempt(dispatcher, shop.delivery_of(dispatcher, chains[0]), 2).outcome == "delivered"

    assert found(dispatcher, "delivery", "chain") == []
    shop.assert_consistent(dispatcher)
