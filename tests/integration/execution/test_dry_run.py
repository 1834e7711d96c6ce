"""A dry run says what would happen, and leaves every row and every key as it was."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest

from dispatcher import DONE, NEW, Chain, Dispatcher
from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.records import Owed
from dispatcher.storage.models import ChainRow
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory
from workers.tasks import _plan

pytestmark = pytest.mark.integration


class World:
    """Chains in every condition, and all that may be done with them."""

    def __init__(self, make: DispatcherFactory, redis_url: str) -> None:
        self.sink = shop.Sink()
        self.redis_url = redis_url
        remind = shop.transition("Remind", "reminded", date_next_update=shop.START + timedelta(days=1))
        steps = {
            NEW: [shop.Never, remind],
            "reminded": [shop.transition("Finish", DONE)],
            "silent": [shop.transition("Silent", "parked", callback=None)],
            "early": [
                shop.transition(
                    "Early", "parked", lambda self: self.not_before(shop.START + timedelta(days=5), "early")
                )
            ],
            "parked": [],
        }
        self.config = shop.cart(steps, callback=self.sink, callbacks={"send": self.sink}, **{"continue": True})
        self.clock = shop.Clock()
        dispatcher = self.dispatcher = make(self.config, clock=self.clock)
        self.chains: dict[str, Chain] = {}
        for number, name in enumerate(
            ["new", "reminded", "silent", "early", "parked", "disabled", "resting", "pending", "crashed", "asked"]
        ):
            self.chains[name] = shop.new_chain(dispatcher, number)
            if name in self.config["chains"][0]["transitions"]:
                self.chains[name].move_to(name, "set up")
        self.chains["disabled"].disable()
        shop.change_chain(dispatcher, self.chains["resting"].id, next_update_at=shop.START + timedelta(days=3))
        self.owed = shop.planned(dispatcher, self.chains["pending"])
        shop.change_delivery(dispatcher, self.owed.id, publish_after=shop.LONG_AGO)
        shop.crashed(dispatcher, shop.planned(dispatcher, self.chains["crashed"]))
        self.chains["asked"].enqueue(initial_context={"a": 1})

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        rows, keys = shop.dump_rows(self.dispatcher), shop.dump_keys(self.redis_url)
        yield
        assert shop.dump_rows(self.dispatcher) == rows
        assert shop.dump_keys(self.redis_url) == keys
        assert len(self.sink) == 0


@pytest.fixture
def world(make_dispatcher: DispatcherFactory, redis_url: str, broker_url: str) -> World:
    """The world, with its queues emptied."""
    made = World(make_dispatcher, redis_url)
    for queue in (shop.REQUESTS, shop.CHAINS, "dispatcher.callbacks"):
        shop.take_messages(broker_url, queue)
    return made


OUTCOMES = {
    "new": "dry_run",
    "reminded": "dry_run",
    "silent": "dry_run",
    "early": "none",
    "parked": "terminal",
    "disabled": "disabled",
    "resting": "resting",
    "pending": "pending",
    "crashed": "pending",
    "asked": "dry_run",
}


def test_an_in_process_dry_run_leaves_every_row_and_key_as_it_was(world: World, broker_url: str) -> None:
    with world.unchanged():
        for name, chain in world.chains.items():
            result = chain.execute(dry_run=True, callback=world.sink, initial_context={"x": object()})
            assert (name, result["outcome"], result["dry_run"]) == (name, OUTCOMES[name], True)
            assert result["chain"] == {"id": chain.id, "state": chain.state}
    assert shop.take_messages(broker_url, shop.CHAINS) == []


def test_an_enqueued_dry_run_travels_in_its_message_and_is_planned_by_the_worker(world: World, broker_url: str) -> None:
    with world.unchanged():
        for chain in world.chains.values():
            chain.enqueue(initial_context={"a": 1}, callback="send", dry_run=True)
        world.dispatcher.enqueue(shop.CHAIN_TYPE, [("online_booking", "nobody's")], dry_run=True)
    messages = shop.take_messages(broker_url, shop.REQUESTS)
    assert len(messages) == len(world.chains) + 1
    assert all(message.kwargs["dry_run"] is True for message in messages)
    assert messages[0].kwargs["plan"]["context"] == {"a": 1}

    with world.unchanged():
        said = [
            _plan(world.dispatcher, message.kwargs["chain_ids"], message.kwargs["plan"])["outcome"]
            for message in messages
        ]
    assert said == [*OUTCOMES.values(), "dry_run"]


def test_a_dry_sweep_publishes_dry_executions_and_leaves_every_row_and_key_as_it_was(
    world: World, broker_url: str
) -> None:
    with world.unchanged():
        counts = world.dispatcher.sweep(dry_run=True, tick=True)
        again = world.dispatcher.sweep(dry_run=True, tick=True)
    assert counts == again and counts["dry_run"] is True
    messages = shop.take_messages(broker_url, shop.CHAINS)
    assert len(messages) == counts["enqueued"] * 2 > 0
    assert all(message.kwargs["dry_run"] is True for message in messages)


def test_a_deployment_on_dry_run_changes_nothing_in_any_way_in(
    world: World, make_dispatcher: DispatcherFactory, broker_url: str
) -> None:
    dry = make_dispatcher(world.config, clock=world.clock, dry_run=True)
    with world.unchanged():
        for name, chain in world.chains.items():
            mine = dry.chain(chain.id or 0)
            assert mine.execute(callback=world.sink)["outcome"] == OUTCOMES[name]
            mine.enqueue(initial_context={"b": 2})
        ids = [chain.id or 0 for chain in world.chains.values()]
        assert [str(one.outcome) for one in dry.execute_chains(ids)] == list(OUTCOMES.values())
        assert [str(one.outcome) for one in dry.deliver([Owed(world.owed.id, 1)])] == ["dry_run"]
        assert dry.sweep(tick=True)["dry_run"] is True
        assert dry.relay(tick=True)["relayed"] == dry.relay(tick=True)["settled"] == 0
        assert dry.prune(days=0.001, tick=True)["events"] == 0
        dry.enqueue(shop.CHAIN_TYPE, [("online_booking", "nobody's")])
        unsaved = dry.get_or_create_resource_chain(shop.CHAIN_TYPE, [("online_booking", "nobody's")])
        assert unsaved.id is None and unsaved.execute()["outcome"] == "dry_run"
        unsaved.enqueue()
    for queue in (shop.REQUESTS, shop.CHAINS):
        assert all(message.kwargs["dry_run"] is True for message in shop.take_messages(broker_url, queue))
    assert shop.take_messages(broker_url, shop.CALLBACKS) == []


def test_what_is_planned_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dispatcher.plan")

    for name in ("new", "reminded", "silent", "early", "parked", "disabled"):
        world.dispatcher.plan_chain(world.chains[name].id)

    lines = [record.getMessage() for record in caplog.records if record.name == "dispatcher.plan"]
    ids = {name: chain.id for name, chain in world.chains.items()}
    assert lines[0] == (
        f"planned chain_id={ids['new']} chain_type=cart from=new to=reminded transition=Remind callback=type"
    )
    assert lines[1].startswith(f"planned chain_id={ids['reminded']} chain_type=cart from=reminded to=done")
    assert "transition=Silent" in lines[2] and "callback=type" not in lines[2]
    assert (
        lines[3].startswith(f"nothing planned chain_id={ids['early']} ") and "early" in lines[3].partition("reasons")[2]
    )
    assert lines[4].startswith(f"nothing planned chain_id={ids['parked']} ")
    assert "transition=Remind" in lines[5] and "disabled" in lines[5]


def test_a_locked_chain_is_reported_and_its_lock_stays(world: World) -> None:
    locks = ChainLocks(world.redis_url, prefix="dispatcher", lock_seconds=30, connect_seconds=2)
    chain = world.chains["new"]
    held = locks.acquire([chain.id or 0])

    with world.unchanged():
        assert chain.execute(dry_run=True)["outcome"] == "locked"

    locks.release(held)
    locks.close()


def test_an_unknown_chain_is_planned_as_an_unsaved_new_one(world: World) -> None:
    with world.unchanged():
        result = world.dispatcher.plan_chain(None, chain_type=shop.CHAIN_TYPE, resources=shop.BOOKING, context={"a": 1})

    assert (result.outcome, result.chain_id, result.state) == ("dry_run", None, NEW)
    assert result.transition is not None
    assert result.transition.context == {"a": 1, "resources": shop.BOOKING}


def test_a_guard_that_raises_in_a_dry_run_counts_no_failure(make_dispatcher: Callable[..., Dispatcher]) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Bad", "bad", shop.Raises(LookupError("gone")))]}))
    chain = shop.new_chain(dispatcher)

    with pytest.raises(LookupError, match="gone"):
        chain.execute(dry_run=True)
    assert dispatcher.plan_chain(chain.id).outcome == "guard_failed"
    assert shop.row_of(dispatcher, chain.id).failures == 0


def test_a_dry_run_uses_the_request_that_waits(make_dispatcher: Callable[..., Dispatcher]) -> None:
    seen: list[Any] = []
    sees = shop.transition("Sees", "seen", lambda self: not seen.append(self.context.get("a")))
    dispatcher = make_dispatcher(shop.cart({NEW: [sees]}, callbacks={"send": shop.Sink()}))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": 1}, callback="send")

    result = dispatcher.plan_chain(chain.id)

    assert (seen, result.callback) == ([1], "named:send")
    assert shop.row_of(dispatcher, chain.id).request is not None


def test_a_dry_run_of_a_missing_chain_is_a_named_outcome(make_dispatcher: Callable[..., Dispatcher]) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never]}))

    assert dispatcher.plan_chain(999).outcome == "missing"
    assert shop.count_rows(dispatcher, ChainRow) == 0
