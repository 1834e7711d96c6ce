"""The vocabulary of the integration tests: a shop that reminds its customers of their carts, and what watches it.

It is used by its name: `shop.cart(...)`, `shop.new_chain(dispatcher)`, `shop.Sink()`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event
from typing import Any, Final

import pytest
import redis
from kombu import Connection, Exchange, Queue
from sqlalchemy import Row, func, select, update

from dispatcher import Chain, Dispatcher, Transition
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.states import OPEN_STATUSES
from dispatcher.storage.models import Base, ChainRow, DeliveryRow

CHAIN_TYPE = "cart"
BOOKING = [("online_booking", "123456")]
START = datetime(2024, 3, 1, 12, 30, 0, 250, tzinfo=UTC)
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
WAIT_SECONDS = 30
NOBODY = "redis://127.0.0.1:1/0"
"""The URL of a server that nobody runs."""

REQUESTS = "dispatcher.requests"
CHAINS = "dispatcher.chains"
CALLBACKS = "dispatcher.callbacks"
SWEEPS = "dispatcher.sweeps"

Make = Callable[..., Dispatcher]
"""What the fixture `make_dispatcher` gives."""


# --- configurations --------------------------------------------------------------------------------------------------


def transition(
    name: str, final_state: str, valid: bool | Callable[[Any], bool] = True, **attributes: Any
) -> type[Transition]:
    """A transition class; `valid` is its verdict, or the guard itself, called with the transition."""

    def is_valid(self: Transition) -> bool:
        if callable(valid):
            return valid(self)
        if not valid:
            self.errors.append(f"{name} is not wanted")
        return valid

    return type(name, (Transition,), {"final_state": final_state, "is_valid": is_valid, **attributes})


Remind = transition("Remind", "reminded")
Never = transition("Never", "never", valid=False)
OnRequest = transition("OnRequest", "asked", valid=False, recheck_seconds=None)


def cart(transitions: Mapping[str, Sequence[type[Transition]]], **options: Any) -> dict[str, Any]:
    """A configuration of one chain type."""
    return {"chains": [{"chain_type": CHAIN_TYPE, "transitions": transitions, **options}]}


class Clock:
    """A domain clock that stands still until it is told to go on."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **amount: float) -> None:
        """Go on by `timedelta(**amount)`."""
        self.now += timedelta(**amount)


class _Time:
    """The module `time` with another monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def set_monotonic(monkeypatch: pytest.MonkeyPatch, monotonic: Callable[[], float]) -> None:
    """Give the modules of attempts another monotonic clock. What others import meanwhile would keep it for ever."""
    for module in ("attempts", "ends", "groups", "marks", "recording"):
        monkeypatch.setattr(f"dispatcher.delivery.{module}.time", _Time(monotonic))


# --- observers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a callback."""

    chain_id: int | None
    name: str
    key: str | None
    context: dict[str, Any]
    kwargs: dict[str, Any]
    transition: Transition


class Sink:
    """A callback that keeps what it was called with, then does `effect(transition)`."""

    def __init__(self, effect: Callable[[Transition], Any] | None = None) -> None:
        self.calls: list[Call] = []
        self.effect = effect

    def __call__(self, transition: Transition, **kwargs: Any) -> None:
        self.calls.append(
            Call(
                transition.chain.id,
                type(transition).__name__,
                transition.idempotency_key,
                dict(transition.context),
                kwargs,
                transition,
            )
        )
        if self.effect is not None:
            self.effect(transition)

    @property
    def names(self) -> list[str]:
        """The transitions it was called for, in order."""
        return [call.name for call in self.calls]

    def __len__(self) -> int:
        return len(self.calls)


class Raises:
    """A function that raises `error`, `times` times (None: always), and then returns `value`."""

    def __init__(self, error: BaseException, *, times: int | None = None, value: Any = None) -> None:
        self.error = error
        self.left = times
        self.value = value

    def __call__(self, *_: Any, **__: Any) -> Any:
        if self.left is None:
            raise self.error
        if self.left > 0:
            self.left -= 1
            raise self.error
        return self.value


# --- interleavings ---------------------------------------------------------------------------------------------------


class Gate:
    """A place in user code where a thread waits until the test lets it go on; open, it lets everybody pass."""

    def __init__(self) -> None:
        self.reached = Event()
        self.opened = Event()

    def wait(self, *_: Any) -> bool:
        """Wait for the test; True, so that it can be a guard."""
        self.reached.set()
        assert self.opened.wait(WAIT_SECONDS), "the test did not open the gate"
        return True

    @contextmanager
    def during(self, work: Callable[[], Any]) -> Iterator["Future[Any]"]:
        """Run `work` in a thread, and the block while that thread waits at the gate; the future is done after it."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                while not self.reached.wait(0.05):
                    assert not future.done(), f"ended before the gate: {future.exception() or future.result()!r}"
                yield future
            finally:
                self.opened.set()


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What these give when they begin together in threads of their own: results, or the exceptions they raise."""
    barrier = Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait(WAIT_SECONDS)
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - it is the result
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


# --- rows, keys, messages --------------------------------------------------------------------------------------------


def new_chain(dispatcher: Dispatcher, number: int = 0, chain_type: str = CHAIN_TYPE, **options: Any) -> Chain:
    """The chain of booking `number`."""
    return dispatcher.get_or_create_resource_chain(chain_type, [("online_booking", f"b{number}")], **options)


def row_of(dispatcher: Dispatcher, chain_id: int | None) -> Row[Any]:
    """A chain's row, every column."""
    with dispatcher.database.read() as connection:
        return connection.execute(select(ChainRow.__table__).where(ChainRow.id == chain_id)).one()


def change_chain(dispatcher: Dispatcher, chain_id: int | None, **values: Any) -> None:
    """Write into a chain's row what another version of the code, or time, would have."""
    statement = update(ChainRow).where(ChainRow.id == chain_id).values(**values)
    assert dispatcher.database.write(lambda connection: connection.execute(statement).rowcount) == 1


def change_delivery(dispatcher: Dispatcher, delivery_id: str, **values: Any) -> None:
    """Write into a delivery's row what another version of the code, or time, would have."""
    statement = update(DeliveryRow).where(DeliveryRow.id == delivery_id).values(**values)
    assert dispatcher.database.write(lambda connection: connection.execute(statement).rowcount) == 1


def delivery_of(dispatcher: Dispatcher, chain: Chain) -> DeliveryRecord:
    """A chain's only delivery."""
    (delivery,) = dispatcher.find_deliveries(chain_id=chain.id)
    return delivery


def planned(dispatcher: Dispatcher, chain: Chain) -> DeliveryRecord:
    """The delivery that a worker's execution plans for a chain."""
    (result,) = dispatcher.execute_chains([chain.id])
    assert result.outcome == "planned", result
    (delivery,) = [one for one in dispatcher.find_deliveries(chain_id=chain.id) if one.id == result.delivery_id]
    return delivery


def attempt(dispatcher: Dispatcher, delivery: DeliveryRecord | str, number: int = 1) -> Any:
    """The result of one attempt at a delivery."""
    (result,) = dispatcher.deliver([Owed(delivery if isinstance(delivery, str) else delivery.id, number)])
    return result


def wait_over(dispatcher: Dispatcher, delivery: DeliveryRecord) -> None:
    """The wait of a pending delivery is over, and its message counts as lost."""
    change_delivery(dispatcher, delivery.id, next_attempt_at=LONG_AGO, publish_after=LONG_AGO)


LAPSED: Final[dict[str, Any]] = {"lease_until": LONG_AGO, "publish_after": LONG_AGO, "lapse_seen_at": LONG_AGO}
"""The columns of a running delivery whose lease has ended, as a relay saw long ago."""


def crashed(dispatcher: Dispatcher, delivery: DeliveryRecord, **values: Any) -> None:
    """The worker that began the delivery's next attempt died, and a relay has seen that the lease is over."""
    change_delivery(
        dispatcher,
        delivery.id,
        **{
            "status": "running",
            "attempt": delivery.attempt + 1,
            **LAPSED,
            **values,
        },
    )


def actions(chain: Chain) -> list[str]:
    """What a chain's history says, in order."""
    return [event.action for event in chain.events]


def dump_rows(dispatcher: Dispatcher) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with dispatcher.database.read() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for name, table in Base.metadata.tables.items()
        }


def dump_keys(url: str) -> dict[bytes, tuple[Any, Any]]:
    """Every key of a Redis database, with its value and when it expires."""
    with redis.Redis.from_url(url) as client:
        return {key: (client.dump(key), client.pexpiretime(key)) for key in client.scan_iter("*")}


def count_rows(dispatcher: Dispatcher, table: type[Base]) -> int:
    """How many rows a table has."""
    with dispatcher.database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


@dataclass(frozen=True)
class Message:
    """One task in a queue."""

    id: str
    task: str
    kwargs: dict[str, Any]


def take_messages(broker_url: str, queue: str, *, limit: int | None = None) -> list[Message]:
    """The messages of a queue, at most `limit`, taken out of it."""
    taken: list[Message] = []
    with Connection(broker_url) as connection, connection.channel() as channel:
        bound = Queue(queue, Exchange(queue, type="direct"), routing_key=queue)(channel)
        bound.declare()
        while len(taken) != limit and (message := bound.get(no_ack=True, accept=["json"])) is not None:
            args, kwargs, _ = message.payload
            assert args == []
            taken.append(Message(message.headers["id"], message.headers["task"], kwargs))
    return taken


def queue_length(broker_url: str, queue: str) -> int:
    """How many messages wait in a queue."""
    with Connection(broker_url) as connection, connection.channel() as channel:
        try:
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
        except connection.channel_errors:  # nothing was sent to it yet
            return 0


# --- the oracle ------------------------------------------------------------------------------------------------------


def assert_consistent(dispatcher: Dispatcher) -> None:
    """Every chain's history is a walk on its graph that ends in its state, and deliveries and moves match."""
    for chain in dispatcher.find_chains(limit=10_000):
        config = dispatcher.config.get(chain.chain_type)
        history = chain.events
        assert history[0].action == "created"
        state, moves = history[0].to_state, Counter()
        for event in history[1:]:
            if event.action == "state_transition":
                assert event.from_state == state
                edges = {(one.__name__, one.final_state) for one in config.candidates(state)}
                assert (event.detail, event.to_state) in edges
                moves[event.detail, event.from_state, event.to_state] += 1
            if event.action in ("state_transition", "reset", "moved", "mapped"):
                state = event.to_state
        assert chain.state == state
        delivered = [one for one in chain.deliveries if one.status in ("delivered", "skipped")]
        moves.subtract((one.transition, one.from_state, one.final_state) for one in delivered)
        assert min(moves.values(), default=0) >= 0, "a delivery without its move"
        open_ids = [one.id for one in chain.deliveries if one.status in OPEN_STATUSES]
        pending = row_of(dispatcher, chain.id).pending_delivery_id
        assert open_ids == ([pending] if pending else [])
