"""The periodic passes: due chains published once, changes of the configuration noticed, old history deleted."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import delete, insert, select, update

from dispatcher import DONE, NEW, Chain, Dispatcher, RetryPolicy, ServiceUnavailable, Transition
from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.fingerprints import fingerprint
from dispatcher.storage.models import ChainRow, DeliveryRow, EventRow, TickRow, TypeRow
from tests.integration import shop
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.Remind]}, callback=shop.Sink())


def published(broker_url: str, queue: str = shop.CHAINS) -> list[list[int]]:
    """The ids in the executions of a queue, taken out of it."""
    messages = shop.take_messages(broker_url, queue)
    assert {message.task for message in messages} <= {"dispatcher.execute_chain"}
    return [message.kwargs["chain_ids"] for message in messages]


# --- due chains ------------------------------------------------------------------------------------------------------


def test_a_sweep_publishes_one_execution_per_due_chain_the_longest_due_first(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    chains = []
    for number in range(3):
        chains.append(shop.new_chain(dispatcher, number))
        clock.forward(minutes=10)
    shop.change_chain(dispatcher, chains[2].id, due_at=shop.START - timedelta(hours=1))

    counts = dispatcher.sweep()

    assert counts == {
        "due": 3,
        "enqueued": 3,
        "already_queued": 0,
        "oldest_due_seconds": timedelta(hours=1, minutes=30).total_seconds(),
    }
    assert published(broker_url) == [[chains[2].id], [chains[0].id], [chains[1].id]]


def test_a_sweep_takes_only_what_is_due_enabled_and_not_waiting(make_dispatcher: shop.Make, broker_url: str) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    due, later, disabled, waiting, resting = (shop.new_chain(dispatcher, number) for number in range(5))
    shop.change_chain(dispatcher, later.id, due_at=shop.START + timedelta(seconds=1))
    disabled.disable()
    shop.planned(dispatcher, waiting)
    shop.change_chain(dispatcher, resting.id, due_at=None)
    # As a worker that crashed between two versions of the code might leave them: due, and yet not to be taken.
    shop.change_chain(dispatcher, disabled.id, due_at=shop.START)
    shop.change_chain(dispatcher, waiting.id, due_at=shop.START)

    assert dispatcher.sweep()["due"] == 1
    assert published(broker_url) == [[due.id]]


def test_a_paused_type_is_not_swept(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    shop.new_chain(dispatcher)
    dispatcher.sweep()
    published(broker_url)
    dispatcher.database.write(lambda connection: connection.execute(update(TypeRow).values(paused=True)))

    assert dispatcher.sweep()["due"] == 0


def test_chains_of_types_that_are_not_configured_here_are_left_to_others(make_dispatcher: shop.Make) -> None:
    shop.new_chain(make_dispatcher(CONFIG))
    other = make_dispatcher({"chains": [{"chain_type": "basket", "transitions": {NEW: [shop.Remind]}}]})

    assert other.sweep()["due"] == 0


def test_each_type_s_executions_go_to_its_queue(make_dispatcher: shop.Make, broker_url: str) -> None:
    config = {
        "chains": [
            {"chain_type": "cart", "transitions": {NEW: [shop.Remind]}, "queue": "carts"},
            {"chain_type": "trial", "transitions": {NEW: [shop.Remind]}},
        ]
    }
    dispatcher = make_dispatcher(config)
    cart_chain, trial = shop.new_chain(dispatcher, chain_type="cart"), shop.new_chain(dispatcher, chain_type="trial")

    assert dispatcher.sweep()["enqueued"] == 2
    assert published(broker_url, "carts") == [[cart_chain.id]]
    assert published(broker_url) == [[trial.id]]


def test_chains_are_grouped_as_the_setting_says(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, chains_per_task=2)
    ids = [shop.new_chain(dispatcher, number).id for number in range(5)]

    dispatcher.sweep()

    assert published(broker_url) == [ids[:2], ids[2:4], ids[4:]]


def test_a_chain_that_is_queued_is_not_queued_again_until_its_execution_starts(
    make_dispatcher: shop.Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never]}), queued_seconds=60)
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    assert dispatcher.sweep()["enqueued"] == 2

    again = dispatcher.sweep()
    assert (again["due"], again["enqueued"], again["already_queued"]) == (2, 0, 2)
    with redis.Redis.from_url(redis_url) as client:
        assert 0 < client.pttl(f"dispatcher:queued:{first.id}") <= 60_000

    dispatcher.execute_chains([first.id])
    again = dispatcher.sweep()
    assert (again["enqueued"], again["already_queued"]) == (1, 1)
    assert published(broker_url) == [[first.id], [second.id], [first.id]]


def test_without_a_lock_server_a_sweep_publishes_all_that_is_due(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, redis_url=shop.NOBODY)
    chain = shop.new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == dispatcher.sweep()["enqueued"] == 1
    assert published(broker_url) == [[chain.id]] * 2


def test_prefixes_keep_deployments_on_one_server_apart(make_dispatcher: shop.Make, redis_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, prefix="shop")
    chain = shop.new_chain(dispatcher)

    dispatcher.sweep()

    assert list(shop.dump_keys(redis_url)) == [f"shop:queued:{chain.id}".encode()]


# --- as much as the queue takes --------------------------------------------------------------------------------------


def test_a_sweep_adds_nothing_to_a_queue_that_is_full(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=2)
    ids = [shop.new_chain(dispatcher, number).id for number in range(5)]

    first = dispatcher.sweep()
    assert (first["enqueued"], first["held_back"]) == (2, [shop.CHAIN_TYPE])
    second = dispatcher.sweep()
    assert (second["enqueued"], shop.queue_length(broker_url, shop.CHAINS)) == (0, 2)
    assert published(broker_url) == [[one] for one in ids[:2]]


def test_a_sweep_goes_on_where_the_last_one_stopped(make_dispatcher: shop.Make, broker_url: str) -> None:
    # No lock server, so no markers: only the position keeps the first ones from being published again.
    dispatcher = make_dispatcher(CONFIG, max_backlog=2, redis_url=shop.NOBODY)
    ids = [shop.new_chain(dispatcher, number).id for number in range(5)]

    seen = []
    for _ in range(3):
        dispatcher.sweep()
        seen.append(published(broker_url))
    assert seen == [[[ids[0]], [ids[1]]], [[ids[2]], [ids[3]]], [[ids[4]], [ids[0]]]], "and begins anew at the end"


def test_a_full_queue_does_not_hold_back_the_types_of_another(make_dispatcher: shop.Make, broker_url: str) -> None:
    config = {
        "chains": [
            {"chain_type": "cart", "transitions": {NEW: [shop.Remind]}, "queue": "carts"},
            {"chain_type": "trial", "transitions": {NEW: [shop.Remind]}, "queue": "trials"},
        ]
    }
    dispatcher = make_dispatcher(config, max_backlog=2)
    for number in range(3):
        shop.new_chain(dispatcher, number, chain_type="cart")
    trial = shop.new_chain(dispatcher, chain_type="trial")

    assert dispatcher.sweep()["held_back"] == ["cart"]
    assert published(broker_url, "trials") == [[trial.id]]


def test_the_relay_adds_nothing_to_a_queue_that_is_full(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=1)
    delivery = shop.planned(dispatcher, shop.new_chain(dispatcher))
    shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO)
    assert shop.queue_length(broker_url, shop.CALLBACKS) == 1

    assert dispatcher.relay()["relayed"] == 0
    assert shop.queue_length(broker_url, shop.CALLBACKS) == 1

    shop.take_messages(broker_url, shop.CALLBACKS)
    shop.change_delivery(dispatcher, delivery.id, publish_after=shop.LONG_AGO)
    assert dispatcher.relay()["relayed"] == 1


def test_a_sweep_over_many_pages_publishes_every_chain_once(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock(), chains_per_task=100)
    rows = [
        {
            "chain_type": shop.CHAIN_TYPE,
            "resource_key": f"{number:064}",
            "state": NEW,
            "due_at": shop.START - timedelta(seconds=number % 3),
            "created_at": shop.START,
            "updated_at": shop.START,
        }
        for number in range(2500)
    ]
    dispatcher.database.write(lambda connection: connection.execute(ChainRow.__table__.insert(), rows))

    counts = dispatcher.sweep()

    assert (counts["due"], counts["enqueued"]) == (2500, 2500)
    ids = [chain_id for group in published(broker_url) for chain_id in group]
    assert len(ids) == len(set(ids)) == 2500


# --- the broker is away ----------------------------------------------------------------------------------------------


def test_a_sweep_that_cannot_publish_says_so_and_leaves_no_markers(make_dispatcher: shop.Make, redis_url: str) -> None:
    cut_off, dispatcher = make_dispatcher(CONFIG, broker_url=shop.NOBODY), make_dispatcher(CONFIG)
    shop.new_chain(dispatcher)

    with pytest.raises(ServiceUnavailable, match=r"broker at redis://127\.0\.0\.1:1"):
        cut_off.sweep()

    assert shop.dump_keys(redis_url) == {}
    assert dispatcher.sweep()["enqueued"] == 1


def test_a_sweep_whose_broker_dies_under_it_takes_its_markers_back(
    make_dispatcher: shop.Make, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer() as broker:
        cut_off = make_dispatcher(CONFIG, broker_url=broker.url)
        chain = shop.new_chain(cut_off)
        mark_queued = ChainLocks.mark_queued

        def mark_and_kill(self: ChainLocks, *arguments: Any, **options: Any) -> list[int]:
            marked = mark_queued(self, *arguments, **options)
            assert list(shop.dump_keys(redis_url)) == [f"dispatcher:queued:{chain.id}".encode()]
            broker.kill()
            return marked

        monkeypatch.setattr(ChainLocks, "mark_queued", mark_and_kill)
        with pytest.raises(ServiceUnavailable):
            cut_off.sweep()

    assert shop.dump_keys(redis_url) == {}


def test_without_a_broker_a_sweep_says_so(make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not ask a RabbitMQ on localhost, Celery's own default, which may be a stranger's."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection to a broker that nobody configured")

    monkeypatch.setattr("amqp.transport._AbstractTransport.connect", refuse)
    dispatcher = make_dispatcher(CONFIG, redis_url=None, broker_url=None)
    shop.new_chain(dispatcher)

    with pytest.raises(ServiceUnavailable, match="broker"):
        dispatcher.sweep()
    assert dispatcher.relay()["relayed"] == 0


# --- ticks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sweep", "relay"])
def test_of_many_beats_one_claims_a_tick(make_dispatcher: shop.Make, broker_url: str, name: str) -> None:
    dispatchers = [make_dispatcher(CONFIG) for _ in range(8)]
    chain = shop.new_chain(dispatchers[0])

    results = shop.at_once(*(lambda one=one: getattr(one, name)(tick=True) for one in dispatchers))  # type: ignore[misc]

    assert sum(result != {"claimed": False} for result in results) == 1, results
    if name == "sweep":
        assert published(broker_url) == [[chain.id]]


def test_a_tick_can_be_claimed_again_after_its_interval(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_seconds=60)
    shop.new_chain(dispatcher)
    assert dispatcher.sweep(tick=True)["due"] == 1
    assert dispatcher.sweep(tick=True) == {"claimed": False}

    def age(seconds: float) -> None:
        last_at = datetime.now(UTC) - timedelta(seconds=seconds)
        dispatcher.database.write(lambda connection: connection.execute(update(TickRow).values(last_at=last_at)))

    age(40)
    assert dispatcher.sweep(tick=True) == {"claimed": False}
    age(60)
    assert dispatcher.sweep(tick=True)["due"] == 1


def test_sweeps_by_hand_claim_no_tick(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    shop.new_chain(dispatcher)

    dispatcher.sweep()

    assert dispatcher.sweep(tick=True)["due"] == 1


# --- changed configurations ------------------------------------------------------------------------------------------


def rests(dispatcher: Dispatcher, *chains: Chain) -> list[bool]:
    return [shop.row_of(dispatcher, chain.id).due_at is None for chain in chains]


def test_chains_that_rest_are_due_again_when_candidates_are_added_to_their_state(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    old_config = shop.cart({NEW: [shop.OnRequest], "parked": [], "other": [shop.OnRequest]}, callback=None)
    new_config = shop.cart({NEW: [shop.OnRequest], "parked": [shop.Remind], "other": [shop.OnRequest]}, callback=None)
    old, new = make_dispatcher(old_config), make_dispatcher(new_config)
    here, elsewhere = shop.new_chain(old, 1), shop.new_chain(old, 2)
    here.move_to("parked", "set up")
    elsewhere.move_to("other", "set up")
    old.execute_chains([elsewhere.id])
    old.sweep()
    assert rests(old, here, elsewhere) == [True, True]
    published(broker_url)

    assert new.sweep()["enqueued"] == 1

    assert rests(new, here, elsewhere) == [False, True]
    assert published(broker_url) == [[here.id]]
    assert [str(one.outcome) for one in new.execute_chains([here.id])] == ["moved"]


@pytest.mark.parametrize("what", ["another candidate", "its final state", "its recheck", "the type's callback"])
def test_chains_that_rest_are_due_again_when_candidates_of_their_state_change(
    make_dispatcher: shop.Make, what: str
) -> None:
    options: dict[str, Any] = {}
    changed = shop.OnRequest
    if what == "another candidate":
        changed = shop.transition("Other", "asked", valid=False, recheck_seconds=None)
    elif what == "its final state":
        changed = shop.transition("OnRequest", "elsewhere", valid=False, recheck_seconds=None)
    elif what == "its recheck":
        changed = shop.transition("OnRequest", "asked", valid=False, recheck_seconds=5)
    else:
        options = {"callback": shop.Sink()}
    old, new = (
        make_dispatcher(shop.cart({NEW: [shop.OnRequest]})),
        make_dispatcher(shop.cart({NEW: [changed]}, **options)),
    )
    chain = shop.new_chain(old)
    old.execute_chains([chain.id])
    old.sweep()
    assert rests(old, chain) == [True]

    new.sweep()

    assert rests(new, chain) == [False]


def test_woken_chains_keep_their_rest_and_others_stay_as_they_are(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    old, new = (
        make_dispatcher(shop.cart({NEW: [shop.OnRequest]}), clock=clock),
        make_dispatcher(shop.cart({NEW: [shop.OnRequest, shop.Remind]}), clock=clock),
    )
    chains = resting, disabled, waiting, later = [shop.new_chain(old, number) for number in range(4)]
    old.execute_chains([chain.id for chain in chains])
    until = shop.START + timedelta(days=1)
    shop.change_chain(old, resting.id, next_update_at=until)
    disabled.disable()
    shop.change_chain(old, later.id, due_at=shop.START + timedelta(days=9))
    with_callback = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()), clock=clock)
    shop.planned(with_callback, waiting)
    old.sweep()

    new.sweep()

    assert [shop.row_of(new, chain.id).due_at for chain in chains] == [until, None, None, shop.START]


def test_a_dry_run_sweep_counts_what_a_real_one_would_wake_and_writes_nothing(
    make_dispatcher: shop.Make, redis_url: str, broker_url: str
) -> None:
    clock = shop.Clock()
    old = make_dispatcher(shop.cart({NEW: [shop.OnRequest], "asked": [shop.OnRequest]}), clock=clock)
    chains = [shop.new_chain(old, number) for number in range(9)]
    old.execute_chains([chain.id for chain in chains])
    resting, disabled, waiting, later, due, elsewhere, *_ = chains
    shop.change_chain(old, resting.id, next_update_at=shop.START + timedelta(days=1))
    disabled.disable()
    shop.planned(make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()), clock=clock), waiting)
    shop.change_chain(old, later.id, due_at=shop.START + timedelta(days=9))
    shop.change_chain(old, elsewhere.id, state="asked")
    old.sweep()
    assert old.sweep(dry_run=True)["would_wake"] == 0, "nothing has changed"
    shop.change_chain(old, due.id, due_at=shop.START)
    config = shop.cart({NEW: [shop.OnRequest, shop.Remind], "asked": [shop.OnRequest]})
    new = make_dispatcher(config, clock=clock)
    published(broker_url)
    rows, keys = shop.dump_rows(new), shop.dump_keys(redis_url)

    counts = [new.sweep(dry_run=True), make_dispatcher(config, clock=clock, dry_run=True).sweep(tick=True)]

    assert [(one["due"], one["enqueued"], one["would_wake"]) for one in counts] == [(1, 1, 4)] * 2
    assert (shop.dump_rows(new), shop.dump_keys(redis_url)) == (rows, keys)
    published(broker_url)
    real = new.sweep()
    assert "would_wake" not in real and (real["due"], real["enqueued"]) == (5, 5)
    assert sorted(one for ids in published(broker_url) for one in ids) == [
        chain.id for chain in (later, due, *chains[6:])
    ]
    assert new.sweep(dry_run=True)["would_wake"] == 0


def test_a_dry_run_sweep_counts_what_is_left_of_a_wake_that_was_stopped(make_dispatcher: shop.Make) -> None:
    config = shop.cart({NEW: [shop.OnRequest], "asked": [shop.OnRequest]})
    old = make_dispatcher(config)
    chains = [shop.new_chain(old, number) for number in range(6)]
    old.execute_chains([chain.id for chain in chains])
    for chain in chains[4:]:
        shop.change_chain(old, chain.id, state="asked")
    old.sweep()
    changed = [shop.OnRequest, shop.Remind]
    new = make_dispatcher(shop.cart({NEW: changed, "asked": changed}))
    keys = {state: f"cart/{state}/{fingerprint(new.config.get(shop.CHAIN_TYPE), state)}" for state in (NEW, "asked")}
    assert new.sweep(dry_run=True)["would_wake"] == 6

    for positions, left in (({keys[NEW]: chains[2].id}, 3), ({keys[NEW]: -1, keys["asked"]: chains[4].id}, 1)):
        values = {"name": "dispatcher.wake", "position": positions}
        new.database.write(
            lambda connection, values=values: (
                connection.execute(delete(TickRow).where(TickRow.name == "dispatcher.wake")),
                connection.execute(insert(TickRow).values(values)),
            )
        )
        assert new.sweep(dry_run=True)["would_wake"] == left

    assert new.sweep()["due"] == 1


def test_a_dry_run_before_the_first_sweep_wakes_nobody(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}))
    dispatcher.execute_chains([shop.new_chain(dispatcher).id])
    before = shop.dump_rows(dispatcher)

    assert dispatcher.sweep(dry_run=True)["would_wake"] == 0
    assert shop.dump_rows(dispatcher) == before


def test_a_first_sweep_wakes_nobody(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}))
    chain = shop.new_chain(dispatcher)
    dispatcher.execute_chains([chain.id])

    dispatcher.sweep()

    assert rests(dispatcher, chain) == [True]


def test_old_and_new_workers_that_take_turns_wake_a_state_once(make_dispatcher: shop.Make) -> None:
    old = make_dispatcher(shop.cart({NEW: [shop.OnRequest]}))
    new = make_dispatcher(
        shop.cart({NEW: [shop.OnRequest, shop.transition("More", "more", valid=False, recheck_seconds=None)]})
    )
    chain = shop.new_chain(old)
    old.sweep()
    new.sweep()
    woken = shop.row_of(new, chain.id).wake
    new.execute_chains([chain.id])

    for _ in range(3):
        old.sweep()
        new.sweep()

    assert shop.row_of(new, chain.id).wake == woken
    assert rests(new, chain) == [True]


def test_a_state_is_woken_once_more_when_the_old_workers_are_gone(make_dispatcher: shop.Make) -> None:
    """Until then one of them may have looked at a chain, and laid it to rest by its own candidates."""
    old, new = (
        make_dispatcher(shop.cart({NEW: [shop.OnRequest]})),
        make_dispatcher(shop.cart({NEW: [shop.OnRequest, shop.Remind]})),
    )
    chain = shop.new_chain(old)
    old.sweep()
    new.sweep()
    old.execute_chains([chain.id])
    assert rests(new, chain) == [True]

    with new.database.read() as connection:
        seen = connection.execute(select(TypeRow.fingerprints)).scalar_one()
    seen[NEW][fingerprint(old.config.get(shop.CHAIN_TYPE), NEW)] = shop.LONG_AGO.isoformat()
    new.database.write(lambda connection: connection.execute(update(TypeRow).values(fingerprints=seen)))
    new.sweep()
    assert rests(new, chain) == [False]

    woken = shop.row_of(new, chain.id).wake
    shop.change_chain(new, chain.id, due_at=None)
    new.sweep()
    assert shop.row_of(new, chain.id).wake == woken, "and then no more"


def test_an_evaluation_during_the_waking_does_not_put_the_chain_to_rest_again(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()

    def waits(self: Transition) -> bool:
        gate.wait()
        return self.not_before(datetime.now(UTC) + timedelta(days=9), "early")

    early = shop.transition("Early", "there", waits)
    old, new = make_dispatcher(shop.cart({NEW: [early]})), make_dispatcher(shop.cart({NEW: [early, shop.Remind]}))
    chain = shop.new_chain(old)
    old.sweep()
    shop.change_chain(old, chain.id, due_at=None)

    with gate.during(lambda: old.execute_chains([chain.id])) as future:
        new.sweep()

    assert [str(one.outcome) for one in future.result()] == ["stale"]
    assert shop.row_of(new, chain.id).due_at <= datetime.now(UTC)


def test_a_configuration_that_does_not_change_writes_nothing_at_a_sweep(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    shop.new_chain(dispatcher)
    dispatcher.sweep()
    before = shop.dump_rows(dispatcher)

    make_dispatcher(CONFIG).sweep()

    assert shop.dump_rows(dispatcher) == before


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_deletes_old_history_and_closed_deliveries_and_never_chains(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock(datetime.now(UTC) - timedelta(days=100))
    once = shop.transition("Once", "once", retry=RetryPolicy(max_attempts=1))
    sink = shop.Sink(shop.Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [once], "once": [shop.Remind], "reminded": []}, callback=sink), clock=clock
    )
    dead, done, fresh = (shop.new_chain(dispatcher, number) for number in range(3))
    dead_delivery = shop.planned(dispatcher, dead)
    shop.attempt(dispatcher, dead_delivery)
    for _ in range(2):
        shop.attempt(dispatcher, shop.planned(dispatcher, done))
    old = datetime.now(UTC) - timedelta(days=100)
    dispatcher.database.write(
        lambda connection: connection.execute(update(DeliveryRow).values(planned_at=old, finished_at=old))
    )
    shop.change_delivery(dispatcher, dead_delivery.id, finished_at=None)
    clock.now = datetime.now(UTC)
    shop.attempt(dispatcher, shop.planned(dispatcher, fresh))

    counts = dispatcher.prune(days=30)

    assert counts["deliveries"] == 2
    kept = {(one.chain_id, one.status) for one in dispatcher.find_deliveries()}
    assert kept == {(dead.id, "dead"), (fresh.id, "delivered")}
    assert shop.count_rows(dispatcher, ChainRow) == 3
    assert [event.action for event in done.events] == ["state_transition"], "a chain's last line is kept"
    assert [event.action for event in dead.events] == ["dead"]
    assert [event.action for event in fresh.events][-2:] == ["planned", "state_transition"]
    assert done.refresh().state == "reminded"
    assert dispatcher.prune(days=30) == {"events": 0, "deliveries": 0, "actions": 0}
    assert counts["events"] > 0


def test_without_a_retention_nothing_is_pruned(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock())
    shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    assert dispatcher.prune() == {"events": 0, "deliveries": 0, "actions": 0}
    assert shop.dump_rows(dispatcher) == before


def test_a_prune_takes_more_than_one_batch(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    rows = [
        {"chain_id": chain.id, "chain_version": 0, "action": "request_replaced", "created_at": shop.LONG_AGO}
        for _ in range(1200)
    ]
    dispatcher.database.write(lambda connection: connection.execute(EventRow.__table__.insert(), rows))
    change = update(EventRow).values(created_at=shop.LONG_AGO)
    dispatcher.database.write(lambda connection: connection.execute(change))

    assert dispatcher.prune(days=1)["events"] == 1200

    with dispatcher.database.read() as connection:
        assert len(connection.execute(select(EventRow.id)).all()) == 1


def test_terminal_chains_are_left_alone_by_every_pass(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Finish", DONE)]}))
    chain = shop.new_chain(dispatcher)
    dispatcher.execute_chains([chain.id])
    dispatcher.sweep()
    dispatcher.relay()
    before = shop.dump_rows(dispatcher)

    assert dispatcher.sweep()["due"] == 0
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}

    assert shop.dump_rows(dispatcher) == before
