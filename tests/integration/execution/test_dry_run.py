"""A dry run says what would happen, and leaves every row and every key as it was."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from dispatcher import DONE, NEW, Chain, ChainMissing, ConfigurationError, Dispatcher, NotSerializable
from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.records import Owed
from dispatcher.storage.models import ChainRow
from tests.integration import shop
from tests.integration.conftest import DispatcherFactory

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


def plans(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines on `dispatcher.plan`."""
    return [record.getMessage() for record in caplog.records if record.name == "dispatcher.plan"]


def test_a_dry_enqueue_plans_here_and_publishes_nothing(
    world: World, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="dispatcher.plan")
    with world.unchanged():
        for chain in world.chains.values():
            assert chain.enqueue(initial_context={"a": 1}, callback="send", dry_run=True) is None
        nobodys = [("online_booking", "nobody's")]
        assert world.dispatcher.enqueue(shop.CHAIN_TYPE, nobodys, callback="send", dry_run=True) is None
        mine = world.chains["new"].resources
        assert world.dispatcher.enqueue(shop.CHAIN_TYPE, mine, dry_run=True) is None

    assert shop.take_messages(broker_url, shop.REQUESTS) == []
    lines = plans(caplog)
    for (name, chain), line in zip(world.chains.items(), lines, strict=False):
        assert f"planned chain_id={chain.id} chain_type=cart" in line
        outcome = OUTCOMES[name]
        if outcome in ("none", "terminal"):
            assert line.startswith("nothing planned") and f"outcome={outcome}" in line
        elif outcome != "dry_run":
            assert line.endswith(f" blocked={outcome}")
    assert lines[0].endswith("callback=named:send")
    assert lines[-2:] == [
        "planned chain_id=None chain_type=cart from=new to=reminded transition=Remind callback=named:send",
        lines[0].replace("callback=named:send", "callback=type"),
    ]


def test_a_dry_enqueue_needs_no_broker(
    make_dispatcher: Callable[..., Dispatcher], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="dispatcher.plan")
    config = shop.cart({NEW: [shop.transition("Remind", "reminded")]}, callback=shop.Sink())
    dispatcher = make_dispatcher(config, broker_url=None, redis_url=None)

    assert dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, dry_run=True) is None
    assert shop.new_chain(dispatcher).enqueue(dry_run=True) is None

    assert [line.startswith("planned") for line in plans(caplog)] == [True, True]
    assert [chain.resources for chain in dispatcher.find_chains()] == [(("online_booking", "b0"),)]


@pytest.mark.parametrize("by_resources", [True, False])
def test_a_dry_enqueue_plans_with_its_own_request_and_not_with_the_one_that_it_would_replace(
    make_dispatcher: Callable[..., Dispatcher], caplog: pytest.LogCaptureFixture, *, by_resources: bool
) -> None:
    caplog.set_level(logging.INFO, logger="dispatcher.plan")
    seen: list[Any] = []
    sees = shop.transition("Sees", "seen", lambda self: not seen.append(self.context.get("a")))
    dispatcher = make_dispatcher(shop.cart({NEW: [sees]}, callbacks={"send": shop.Sink()}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"a": "stored"}, callback="send")

    if by_resources:
        dispatcher.enqueue(shop.CHAIN_TYPE, chain.resources, dry_run=True)
    else:
        chain.enqueue(dry_run=True)

    assert seen == [None]
    assert plans(caplog)[0].endswith("callback=type")


def test_a_guard_that_raises_in_a_dry_enqueue_is_logged(
    make_dispatcher: Callable[..., Dispatcher], caplog: pytest.LogCaptureFixture
) -> None:
    """As nobody who enqueues gets a guard's error in a real run."""
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Bad", "bad", shop.Raises(LookupError("gone")))]}))

    assert dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, dry_run=True) is None
    assert shop.new_chain(dispatcher).enqueue(dry_run=True) is None

    said = [vars(record).get("action") for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["dry_run_failed", "dry_run_failed"] and "gone" in caplog.text


def test_a_dry_enqueue_refuses_what_a_real_one_would(make_dispatcher: Callable[..., Dispatcher]) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never]}))
    chain = shop.new_chain(dispatcher)
    for call in (chain.enqueue, partial(dispatcher.enqueue, shop.CHAIN_TYPE, shop.BOOKING)):
        with pytest.raises(ConfigurationError, match="registered"):
            call(callback="sned", dry_run=True)
        with pytest.raises(NotSerializable, match="'a'"):
            call(initial_context={"a": object()}, dry_run=True)
    dispatcher.erase_resource(("online_booking", "b0"))
    with pytest.raises(ChainMissing):
        chain.enqueue(dry_run=True)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("whole_deployment", [True, False])
def test_a_dry_enqueue_on_commit_plans_when_the_session_commits(
    make_dispatcher: Callable[..., Dispatcher],
    database_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    shares: bool,
    whole_deployment: bool,
) -> None:
    caplog.set_level(logging.INFO, logger="dispatcher.plan")
    config = shop.cart({NEW: [shop.transition("Remind", "reminded")]}, callbacks={"send": shop.Sink()})
    dispatcher = make_dispatcher(config, broker_url=None, redis_url=None, dry_run=whole_deployment)
    before = shop.dump_rows(dispatcher)
    engine = create_engine(database_url if shares else f"sqlite:///{tmp_path / 'shop.sqlite'}")
    asked: dict[str, Any] = {"callback": "send", "dry_run": not whole_deployment}
    with Session(engine) as session:
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, **asked)
        session.rollback()
        dispatcher.enqueue_on_commit(session, shop.CHAIN_TYPE, shop.BOOKING, **asked)
        assert plans(caplog) == []
        session.commit()
    engine.dispose()

    line = "planned chain_id=None chain_type=cart from=new to=reminded transition=Remind callback=named:send"
    assert plans(caplog) == [line]
    assert shop.dump_rows(dispatcher) == before


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
            assert mine.enqueue(initial_context={"b": 2}) is None
        ids = [chain.id or 0 for chain in world.chains.values()]
        assert [str(one.outcome) for one in dry.execute_chains(ids)] == list(OUTCOMES.values())
        assert [str(one.outcome) for one in dry.deliver([Owed(world.owed.id, 1)])] == ["dry_run"]
        assert dry.sweep(tick=True)["dry_run"] is True
        assert dry.relay(tick=True)["relayed"] == dry.relay(tick=True)["settled"] == 0
        assert dry.prune(days=0.001, tick=True)["events"] == 0
        assert dry.enqueue(shop.CHAIN_TYPE, [("online_booking", "nobody's")]) is None
        unsaved = dry.get_or_create_resource_chain(shop.CHAIN_TYPE, [("online_booking", "nobody's")])
        assert unsaved.id is None and unsaved.execute()["outcome"] == "dry_run"
        assert unsaved.enqueue() is None
    assert all(message.kwargs["dry_run"] is True for message in shop.take_messages(broker_url, shop.CHAINS))
    for queue in (shop.REQUESTS, shop.CALLBACKS):
        assert shop.take_messages(broker_url, queue) == []


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


def test_a_chain_that_does_not_exist_is_planned_as_a_new_one(make_dispatcher: Callable[..., Dispatcher]) -> None:
    seen: list[Any] = []
    sees = shop.transition("Sees", "seen", lambda self: not seen.append((self.chain, self.context)))
    dispatcher = make_dispatcher(shop.cart({NEW: [sees]}), dry_run=True)

    dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"a": 1})
    unsaved = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING, initial_context={"stored": 2})
    unsaved.enqueue(initial_context={"a": 3})

    assert [(chain.id, chain.state) for chain, _ in seen] == [(0, NEW)] * 2
    assert [context for _, context in seen] == [
        {"a": 1, "resources": shop.BOOKING},
        {"stored": 2, "a": 3, "resources": shop.BOOKING},
    ]


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


@pytest.mark.parametrize("requested", [None, "gone"])
def test_a_dry_run_has_the_outcome_of_a_real_one_where_no_transition_is_taken(
    make_dispatcher: Callable[..., Dispatcher], caplog: pytest.LogCaptureFixture, requested: str | None
) -> None:
    """The winner has no callback to call, or the request names one of an older configuration."""
    caplog.set_level(logging.INFO, logger="dispatcher.plan")
    config = shop.cart({NEW: [shop.Remind]}, callbacks={"gone": shop.Sink()})
    chain = shop.new_chain(make_dispatcher(config))
    if requested is not None:
        chain.enqueue(callback=requested)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))

    planned, explained = dispatcher.plan_chain(chain.id or 0), dispatcher.chain(chain.id or 0).explain()
    (real,) = dispatcher.execute_chains([chain.id or 0])

    assert real.outcome == ("no_callback" if requested is None else "unknown_definition")
    assert (planned.outcome, explained["outcome"]) == (real.outcome, real.outcome)
    line = "planned" if requested is None else "nothing planned"
    assert [said.startswith(f"{line} chain_id={chain.id}") for said in plans(caplog)] == [True, True]
    assert explained["callback"] == ("missing" if requested is None else None)
