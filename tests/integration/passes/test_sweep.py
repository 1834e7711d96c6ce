"""The periodic passes: due chains published once, changes of the configuration noticed, old history deleted."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import select, update

from dispatcher import DONE, NEW, Chain, Dispatcher, RetryPolicy, ServiceUnavailable, Transition
from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.fingerprints import fingerprint
from dispatcher.storage.models import ChainRow, DeliveryRow, EventRow, TickRow, TypeRow
from tests.integration.transitions import (
    CHAIN_TYPE,
    LONG_AGO,
    START,
    Clock,
    Gate,
    Raises,
    Sink,
    at_once,
    attempt,
    cart,
    change_chain,
    change_delivery,
    count_rows,
    dump_keys,
    dump_rows,
    new_chain,
    planned,
    queue_length,
    row_of,
    take_messages,
    transition,
)
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

Make = Callable[..., Dispatcher]

CHAINS = "dispatcher.chains"
NOBODY = "redis://127.0.0.1:1/0"
Remind = transition("Remind", "reminded")
Never = transition("Never", "never", valid=False)
OnRequest = transition("OnRequest", "asked", valid=False, recheck_seconds=None)
CONFIG = cart({NEW: [Remind]}, callback=Sink())


def published(broker_url: str, queue: str = CHAINS) -> list[list[int]]:
    """The ids in the executions of a queue, taken out of it."""
    messages = take_messages(broker_url, queue)
    assert {message.task for message in messages} <= {"dispatcher.execute_chain"}
    return [message.kwargs["chain_ids"] for message in messages]


# --- due chains ------------------------------------------------------------------------------------------------------


def test_a_sweep_publishes_one_execution_per_due_chain_the_longest_due_first(
    make_dispatcher: Make, broker_url: str
) -> None:
    clock = Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    chains = []
    for number in range(3):
        chains.append(new_chain(dispatcher, number))
        clock.forward(minutes=10)
    change_chain(dispatcher, chains[2].id, due_at=START - timedelta(hours=1))

    counts = dispatcher.sweep()

    assert counts == {
        "due": 3,
        "enqueued": 3,
        "already_queued": 0,
        "oldest_due_seconds": timedelta(hours=1, minutes=30).total_seconds(),
    }
    assert published(broker_url) == [[chains[2].id], [chains[0].id], [chains[1].id]]


def test_a_sweep_takes_only_what_is_due_enabled_and_not_waiting(make_dispatcher: Make, broker_url: str) -> None:
    clock = Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    due, later, disabled, waiting, resting = (new_chain(dispatcher, number) for number in range(5))
    change_chain(dispatcher, later.id, due_at=START + timedelta(seconds=1))
    disabled.disable()
    planned(dispatcher, waiting)
    change_chain(dispatcher, resting.id, due_at=None)
    # As a worker that crashed between two versions of the code might leave them: due, and yet not to be taken.
    change_chain(dispatcher, disabled.id, due_at=START)
    change_chain(dispatcher, waiting.id, due_at=START)

    assert dispatcher.sweep()["due"] == 1
    assert published(broker_url) == [[due.id]]


def test_a_paused_type_is_not_swept(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    new_chain(dispatcher)
    dispatcher.sweep()
    published(broker_url)
    dispatcher.database.write(lambda connection: connection.execute(update(TypeRow).values(paused=True)))

    assert dispatcher.sweep()["due"] == 0


def test_chains_of_types_that_are_not_configured_here_are_left_to_others(make_dispatcher: Make) -> None:
    new_chain(make_dispatcher(CONFIG))
    other = make_dispatcher({"chains": [{"chain_type": "basket", "transitions": {NEW: [Remind]}}]})

    assert other.sweep()["due"] == 0


def test_each_type_s_executions_go_to_its_queue(make_dispatcher: Make, broker_url: str) -> None:
    config = {
        "chains": [
            {"chain_type": "cart", "transitions": {NEW: [Remind]}, "queue": "carts"},
            {"chain_type": "trial", "transitions": {NEW: [Remind]}},
        ]
    }
    dispatcher = make_dispatcher(config)
    cart_chain, trial = new_chain(dispatcher, chain_type="cart"), new_chain(dispatcher, chain_type="trial")

    assert dispatcher.sweep()["enqueued"] == 2
    assert published(broker_url, "carts") == [[cart_chain.id]]
    assert published(broker_url) == [[trial.id]]


def test_chains_are_grouped_as_the_setting_says(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, chains_per_task=2)
    ids = [new_chain(dispatcher, number).id for number in range(5)]

    dispatcher.sweep()

    assert published(broker_url) == [ids[:2], ids[2:4], ids[4:]]


def test_a_chain_that_is_queued_is_not_queued_again_until_its_execution_starts(
    make_dispatcher: Make, broker_url: str, redis_url: str
) -> None:
    dispatcher = make_dispatcher(cart({NEW: [Never]}), queued_seconds=60)
    first, second = new_chain(dispatcher, 1), new_chain(dispatcher, 2)
    assert dispatcher.sweep()["enqueued"] == 2

    again = dispatcher.sweep()
    assert (again["due"], again["enqueued"], again["already_queued"]) == (2, 0, 2)
    with redis.Redis.from_url(redis_url) as client:
        assert 0 < client.pttl(f"dispatcher:queued:{first.id}") <= 60_000

    dispatcher.execute_chains([first.id])
    again = dispatcher.sweep()
    assert (again["enqueued"], again["already_queued"]) == (1, 1)
    assert published(broker_url) == [[first.id], [second.id], [first.id]]


def test_without_a_lock_server_a_sweep_publishes_all_that_is_due(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, redis_url=NOBODY)
    chain = new_chain(dispatcher)

    assert dispatcher.sweep()["enqueued"] == dispatcher.sweep()["enqueued"] == 1
    assert published(broker_url) == [[chain.id]] * 2


def test_prefixes_keep_deployments_on_one_server_apart(make_dispatcher: Make, redis_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, prefix="shop")
    chain = new_chain(dispatcher)

    dispatcher.sweep()

    assert list(dump_keys(redis_url)) == [f"shop:queued:{chain.id}".encode()]


# --- as much as the queue takes --------------------------------------------------------------------------------------


def test_a_sweep_adds_nothing_to_a_queue_that_is_full(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=2)
    ids = [new_chain(dispatcher, number).id for number in range(5)]

    first = dispatcher.sweep()
    assert (first["enqueued"], first["held_back"]) == (2, [CHAIN_TYPE])
    second = dispatcher.sweep()
    assert (second["enqueued"], queue_length(broker_url, CHAINS)) == (0, 2)
    assert published(broker_url) == [[one] for one in ids[:2]]


def test_a_sweep_goes_on_where_the_last_one_stopped(make_dispatcher: Make, broker_url: str) -> None:
    # No lock server, so no markers: only the position keeps the first ones from being published again.
    dispatcher = make_dispatcher(CONFIG, max_backlog=2, redis_url=NOBODY)
    ids = [new_chain(dispatcher, number).id for number in range(5)]

    seen = []
    for _ in range(3):
        dispatcher.sweep()
        seen.append(published(broker_url))
    assert seen == [[[ids[0]], [ids[1]]], [[ids[2]], [ids[3]]], [[ids[4]], [ids[0]]]], "and begins anew at the end"


def test_a_full_queue_does_not_hold_back_the_types_of_another(make_dispatcher: Make, broker_url: str) -> None:
    config = {
        "chains": [
            {"chain_type": "cart", "transitions": {NEW: [Remind]}, "queue": "carts"},
            {"chain_type": "trial", "transitions": {NEW: [Remind]}, "queue": "trials"},
        ]
    }
    dispatcher = make_dispatcher(config, max_backlog=2)
    for number in range(3):
        new_chain(dispatcher, number, chain_type="cart")
    trial = new_chain(dispatcher, chain_type="trial")

    assert dispatcher.sweep()["held_back"] == ["cart"]
    assert published(broker_url, "trials") == [[trial.id]]


def test_the_relay_adds_nothing_to_a_queue_that_is_full(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, max_backlog=1)
    delivery = planned(dispatcher, new_chain(dispatcher))
    change_delivery(dispatcher, delivery.id, publish_after=LONG_AGO)
    assert queue_length(broker_url, "dispatcher.callbacks") == 1

    assert dispatcher.relay()["relayed"] == 0
    assert queue_length(broker_url, "dispatcher.callbacks") == 1

    take_messages(broker_url, "dispatcher.callbacks")
    change_delivery(dispatcher, delivery.id, publish_after=LONG_AGO)
    assert dispatcher.relay()["relayed"] == 1


def test_a_sweep_over_many_pages_publishes_every_chain_once(make_dispatcher: Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=Clock(), chains_per_task=100)
    rows = [
        {
            "chain_type": CHAIN_TYPE,
            "resource_key": f"{number:064}",
            "state": NEW,
            "due_at": START - timedelta(seconds=number % 3),
            "created_at": START,
            "updated_at": START,
        }
        for number in range(2500)
    ]
    dispatcher.database.write(lambda connection: connection.execute(ChainRow.__table__.insert(), rows))

    counts = dispatcher.sweep()

    assert (counts["due"], counts["enqueued"]) == (2500, 2500)
    ids = [chain_id for group in published(broker_url) for chain_id in group]
    assert len(ids) == len(set(ids)) == 2500


# --- the broker is away ----------------------------------------------------------------------------------------------


def test_a_sweep_that_cannot_publish_says_so_and_leaves_no_markers(make_dispatcher: Make, redis_url: str) -> None:
    cut_off, dispatcher = make_dispatcher(CONFIG, broker_url=NOBODY), make_dispatcher(CONFIG)
    new_chain(dispatcher)

    with pytest.raises(ServiceUnavailable, match=r"broker at redis://127\.0\.0\.1:1"):
        cut_off.sweep()

    assert dump_keys(redis_url) == {}
    assert dispatcher.sweep()["enqueued"] == 1


def test_a_sweep_whose_broker_dies_under_it_takes_its_markers_back(
    make_dispatcher: Make, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer() as broker:
        cut_off = make_dispatcher(CONFIG, broker_url=broker.url)
        chain = new_chain(cut_off)
        mark_queued = ChainLocks.mark_queued

        def mark_and_kill(self: ChainLocks, *arguments: Any, **options: Any) -> list[int]:
            marked = mark_queued(self, *arguments, **options)
            assert list(dump_keys(redis_url)) == [f"dispatcher:queued:{chain.id}".encode()]
            broker.kill()
            return marked

        monkeypatch.setattr(ChainLocks, "mark_queued", mark_and_kill)
        with pytest.raises(ServiceUnavailable):
            cut_off.sweep()

    assert dump_keys(redis_url) == {}


def test_without_a_broker_a_sweep_says_so(make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not ask a RabbitMQ on localhost, Celery's own default, which may be a stranger's."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection to a broker that nobody configured")

    monkeypatch.setattr("amqp.transport._AbstractTransport.connect", refuse)
    dispatcher = make_dispatcher(CONFIG, redis_url=None, broker_url=None)
    new_chain(dispatcher)

    with pytest.raises(ServiceUnavailable, match="broker"):
        dispatcher.sweep()
    assert dispatcher.relay()["relayed"] == 0


# --- ticks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sweep", "relay"])
def test_of_many_beats_one_claims_a_tick(make_dispatcher: Make, broker_url: str, name: str) -> None:
    dispatchers = [make_dispatcher(CONFIG) for _ in range(8)]
    chain = new_chain(dispatchers[0])

    results = at_once(*(lambda one=one: getattr(one, name)(tick=True) for one in dispatchers))  # type: ignore[misc]

    assert sum(result != {"claimed": False} for result in results) == 1, results
    if name == "sweep":
        assert published(broker_url) == [[chain.id]]


def test_a_tick_can_be_claimed_again_after_its_interval(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(CONFIG, sweep_seconds=60)
    new_chain(dispatcher)
    assert dispatcher.sweep(tick=True)["due"] == 1
    assert dispatcher.sweep(tick=True) == {"claimed": False}

    def age(seconds: float) -> None:
        last_at = datetime.now(UTC) - timedelta(seconds=seconds)
        dispatcher.database.write(lambda connection: connection.execute(update(TickRow).values(last_at=last_at)))

    age(40)
    assert dispatcher.sweep(tick=True) == {"claimed": False}
    age(60)
    assert dispatcher.sweep(tick=True)["due"] == 1


def test_sweeps_by_hand_claim_no_tick(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    new_chain(dispatcher)

    dispatcher.sweep()

    assert dispatcher.sweep(tick=True)["due"] == 1


# --- changed configurations ------------------------------------------------------------------------------------------


def rests(dispatcher: Dispatcher, *chains: Chain) -> list[bool]:
    return [row_of(dispatcher, chain.id).due_at is None for chain in chains]


def test_chains_that_rest_are_due_again_when_candidates_are_added_to_their_state(
    make_dispatcher: Make, broker_url: str
) -> None:
    old_config = cart({NEW: [OnRequest], "parked": [], "other": [OnRequest]}, callback=None)
    new_config = cart({NEW: [OnRequest], "parked": [Remind], "other": [OnRequest]}, callback=None)
    old, new = make_dispatcher(old_config), make_dispatcher(new_config)
    here, elsewhere = new_chain(old, 1), new_chain(old, 2)
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
def test_chains_that_rest_are_due_again_when_candidates_of_their_state_change(make_dispatcher: Make, what: str) -> None:
    options: dict[str, Any] = {}
    changed = OnRequest
    if what == "another candidate":
        changed = transition("Other", "asked", valid=False, recheck_seconds=None)
    elif what == "its final state":
        changed = transition("OnRequest", "elsewhere", valid=False, recheck_seconds=None)
    elif what == "its recheck":
        changed = transition("OnRequest", "asked", valid=False, recheck_seconds=5)
    else:
        options = {"callback": Sink()}
    old, new = make_dispatcher(cart({NEW: [OnRequest]})), make_dispatcher(cart({NEW: [changed]}, **options))
    chain = new_chain(old)
    old.execute_chains([chain.id])
    old.sweep()
    assert rests(old, chain) == [True]

    new.sweep()

    assert rests(new, chain) == [False]


def test_woken_chains_keep_their_rest_and_others_stay_as_they_are(make_dispatcher: Make) -> None:
    clock = Clock()
    old, new = (
        make_dispatcher(cart({NEW: [OnRequest]}), clock=clock),
        make_dispatcher(cart({NEW: [OnRequest, Remind]}), clock=clock),
    )
    chains = resting, disabled, waiting, later = [new_chain(old, number) for number in range(4)]
    old.execute_chains([chain.id for chain in chains])
    until = START + timedelta(days=1)
    change_chain(old, resting.id, next_update_at=until)
    disabled.disable()
    change_chain(old, later.id, due_at=START + timedelta(days=9))
    with_callback = make_dispatcher(cart({NEW: [Remind]}, callback=Sink()), clock=clock)
    planned(with_callback, waiting)
    old.sweep()

    new.sweep()

    assert [row_of(new, chain.id).due_at for chain in chains] == [until, None, None, START]


def test_a_first_sweep_wakes_nobody(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [OnRequest]}))
    chain = new_chain(dispatcher)
    dispatcher.execute_chains([chain.id])

    dispatcher.sweep()

    assert rests(dispatcher, chain) == [True]


def test_old_and_new_workers_that_take_turns_wake_a_state_once(make_dispatcher: Make) -> None:
    old = make_dispatcher(cart({NEW: [OnRequest]}))
    new = make_dispatcher(cart({NEW: [OnRequest, transition("More", "more", valid=False, recheck_seconds=None)]}))
    chain = new_chain(old)
    old.sweep()
    new.sweep()
    woken = row_of(new, chain.id).wake
    new.execute_chains([chain.id])

    for _ in range(3):
        old.sweep()
        new.sweep()

    assert row_of(new, chain.id).wake == woken
    assert rests(new, chain) == [True]


def test_a_state_is_woken_once_more_when_the_old_workers_are_gone(make_dispatcher: Make) -> None:
    """Until then one of them may have looked at a chain, and laid it to rest by its own candidates."""
    old, new = make_dispatcher(cart({NEW: [OnRequest]})), make_dispatcher(cart({NEW: [OnRequest, Remind]}))
    chain = new_chain(old)
    old.sweep()
    new.sweep()
    old.execute_chains([chain.id])
    assert rests(new, chain) == [True]

    with new.database.read() as connection:
        seen = connection.execute(select(TypeRow.fingerprints)).scalar_one()
    seen[NEW][fingerprint(old.config.get(CHAIN_TYPE), NEW)] = LONG_AGO.isoformat()
    new.database.write(lambda connection: connection.execute(update(TypeRow).values(fingerprints=seen)))
    new.sweep()
    assert rests(new, chain) == [False]

    woken = row_of(new, chain.id).wake
    change_chain(new, chain.id, due_at=None)
    new.sweep()
    assert row_of(new, chain.id).wake == woken, "and then no more"


def test_an_evaluation_during_the_waking_does_not_put_the_chain_to_rest_again(make_dispatcher: Make) -> None:
    gate = Gate()

    def waits(self: Transition) -> bool:
        gate.wait()
        return self.not_before(datetime.now(UTC) + timedelta(days=9), "early")

    early = transition("Early", "there", waits)
    old, new = make_dispatcher(cart({NEW: [early]})), make_dispatcher(cart({NEW: [early, Remind]}))
    chain = new_chain(old)
    old.sweep()
    change_chain(old, chain.id, due_at=None)

    with gate.during(lambda: old.execute_chains([chain.id])) as future:
        new.sweep()

    assert [str(one.outcome) for one in future.result()] == ["stale"]
    assert row_of(new, chain.id).due_at <= datetime.now(UTC)


def test_a_configuration_that_does_not_change_writes_nothing_at_a_sweep(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    new_chain(dispatcher)
    dispatcher.sweep()
    before = dump_rows(dispatcher)

    make_dispatcher(CONFIG).sweep()

    assert dump_rows(dispatcher) == before


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_deletes_old_history_and_closed_deliveries_and_never_chains(make_dispatcher: Make) -> None:
    clock = Clock(datetime.now(UTC) - timedelta(days=100))
    once = transition("Once", "once", retry=RetryPolicy(max_attempts=1))
    sink = Sink(Raises(OSError("no"), times=1))
    dispatcher = make_dispatcher(cart({NEW: [once], "once": [Remind], "reminded": []}, callback=sink), clock=clock)
    dead, done, fresh = (new_chain(dispatcher, number) for number in range(3))
    dead_delivery = planned(dispatcher, dead)
    attempt(dispatcher, dead_delivery)
    for _ in range(2):
        attempt(dispatcher, planned(dispatcher, done))
    old = datetime.now(UTC) - timedelta(days=100)
    dispatcher.database.write(
        lambda connection: connection.execute(update(DeliveryRow).values(planned_at=old, finished_at=old))
    )
    change_delivery(dispatcher, dead_delivery.id, finished_at=None)
    clock.now = datetime.now(UTC)
    attempt(dispatcher, planned(dispatcher, fresh))

    counts = dispatcher.prune(days=30)

    assert counts["deliveries"] == 2
    kept = {(one.chain_id, one.status) for one in dispatcher.find_deliveries()}
    assert kept == {(dead.id, "dead"), (fresh.id, "delivered")}
    assert count_rows(dispatcher, ChainRow) == 3
    assert [event.action for event in done.events] == ["state_transition"], "a chain's last line is kept"
    assert [event.action for event in dead.events] == ["dead"]
    assert [event.action for event in fresh.events][-2:] == ["planned", "state_transition"]
    assert done.refresh().state == "reminded"
    assert dispatcher.prune(days=30) == {"events": 0, "deliveries": 0}
    assert counts["events"] > 0


def test_without_a_retention_nothing_is_pruned(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=Clock())
    new_chain(dispatcher)
    before = dump_rows(dispatcher)

    assert dispatcher.prune() == {"events": 0, "deliveries": 0}
    assert dump_rows(dispatcher) == before


def test_a_prune_takes_more_than_one_batch(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = new_chain(dispatcher)
    rows = [
        {"chain_id": chain.id, "chain_version": 0, "action": "request_replaced", "created_at": LONG_AGO}
        for _ in range(1200)
    ]
    dispatcher.database.write(lambda connection: connection.execute(EventRow.__table__.insert(), rows))
    change = update(EventRow).values(created_at=LONG_AGO)
    dispatcher.database.write(lambda connection: connection.execute(change))

    assert dispatcher.prune(days=1)["events"] == 1200

    with dispatcher.database.read() as connection:
        assert len(connection.execute(select(EventRow.id)).all()) == 1


def test_terminal_chains_are_left_alone_by_every_pass(make_dispatcher: Make) -> None:
    dispatcher = make_dispatcher(cart({NEW: [transition("Finish", DONE)]}))
    chain = new_chain(dispatcher)
    dispatcher.execute_chains([chain.id])
    dispatcher.sweep()
    before = dump_rows(dispatcher)

    assert dispatcher.sweep()["due"] == 0
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}

    assert dump_rows(dispatcher) == before
