"""Values from user code hurt their own chain only, and nothing that cannot be reaches a row, a message or a log."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from dispatcher import DONE, NEW, Chain, ConfigurationError, Dispatcher, NotSerializable, Transition
from dispatcher.bounds import LATEST
from dispatcher.domain.records import Owed
from dispatcher.retry import RetryPolicy
from tests.integration import shop

pytestmark = pytest.mark.integration


class Mute(Exception):  # noqa: N818 - it is about its text
    """An error whose text raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def new_chains(dispatcher: Dispatcher, count: int) -> list[Chain]:
    return [dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("cart", str(n))]) for n in range(count)]


def guarded(guard: Callable[[Any], Any], name: str = "Guarded", **attributes: Any) -> Any:
    """A transition whose guard is misbehaving for the cart "0" only."""

    def is_valid(transition: Any) -> Any:
        return guard(transition) if transition.chain.resources[0][1] == "0" else True

    return shop.transition(name, "reminded", valid=is_valid, **attributes)


def sets(**attributes: Any) -> Callable[[Any], bool]:
    def guard(transition: Any) -> bool:
        vars(transition).update(attributes)
        return True

    return guard


def raises(error: BaseException) -> Callable[[Any], bool]:
    def guard(_: Any) -> bool:
        raise error

    return guard


async def promise() -> bool:
    return True


class NotATime(datetime):
    """As pandas' NaT: neither before nor after any other moment."""

    def __lt__(self, other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__


class Endless(RetryPolicy):
    """A policy of one's own."""

    def __getattribute__(self, name: str) -> Any:
        return 10**20 if name == "max_attempts" else super().__getattribute__(name)


def steps() -> Iterator[bool]:
    yield False


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "an error without a text": raises(Mute()),
    "an error of 10 MB": raises(ValueError("x" * 10_000_000)),
    "no retry": sets(retry=None),
    "no final state": sets(final_state=None),
    "a final state of 300 characters": sets(final_state="x" * 300),
    "a final state of no configuration": sets(final_state="nowhere"),
    "a rest as text": sets(date_next_update="2030-01-01"),
    "a rest as number": sets(date_next_update=14),
    "reasons that are none": sets(errors=None),
    "a coroutine": lambda _: promise(),
    "a chain of its own": sets(chain="cart 0"),
    "a rest that is no moment": sets(date_next_update=NotATime(2030, 1, 1)),
    "a moment that is none": lambda transition: transition.not_before(NotATime(2030, 1, 1), "later"),
    "attempts without end": sets(retry=object.__new__(Endless)),
    "a generator": lambda _: steps(),
    "a reason without a text": lambda transition: bool(transition.errors.append(Mute())),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_guard_s_value_that_cannot_be_is_a_failure_of_its_chain_alone(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [guarded(HOSTILE[name])], "reminded": [shop.Never]}, callback=None))
    chains = new_chains(dispatcher, 5)

    results = dispatcher.execute_chains([chain.id for chain in chains if chain.id is not None])

    assert results[0].outcome == "guard_failed" and chains[0].refresh().state == NEW
    assert shop.row_of(dispatcher, chains[0].id).failures == 1
    assert shop.actions(chains[0]) == ["created", "guard_failed"]
    assert max(len(event.detail or "") for event in chains[0].events) < 3000
    assert [result.outcome for result in results[1:]] == ["moved"] * 4
    assert len(caplog.text) < 60_000


def test_a_million_reasons_stay_a_short_answer(make_dispatcher: shop.Make) -> None:
    def guard(transition: Any) -> bool:
        transition.errors = ["because"] * 1_000_000
        return False

    dispatcher = make_dispatcher(shop.cart({NEW: [guarded(guard)], "reminded": []}, callback=None))
    (chain,) = new_chains(dispatcher, 1)

    ((reasons),) = chain.execute()["errors"].values()

    assert len(reasons) == 51


@pytest.mark.parametrize("zone", [None, ZoneInfo("America/New_York"), ZoneInfo("Asia/Tokyo")])
def test_a_moment_without_end_is_the_latest_that_can_be_stored(
    make_dispatcher: shop.Make, zone: ZoneInfo | None
) -> None:
    moment = datetime.max.replace(tzinfo=zone)

    def never(transition: Any) -> bool:
        return bool(transition.not_before(moment, "never"))

    waits = shop.transition("Waits", "waited", valid=never)
    rests = shop.transition("Rests", "rested", date_next_update=moment)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [rests], "rested": [waits], "waited": []}, callback=None), clock=shop.Clock()
    )
    (chain,) = new_chains(dispatcher, 1)
    chain.execute()
    assert chain.refresh().next_update_at == chain.due_at == LATEST

    waiting = make_dispatcher(shop.cart({NEW: [waits], "waited": []}, callback=None), clock=shop.Clock())
    chain = waiting.get_or_create_resource_chain(shop.CHAIN_TYPE, [("cart", "waits")])
    chain.execute()
    assert chain.refresh().due_at == LATEST
    waiting.erase_resource(("cart", "waits"))


@pytest.mark.parametrize("size", [1, 10])
def test_a_callback_s_error_without_a_text_is_a_failed_attempt(make_dispatcher: shop.Make, size: int) -> None:
    def callback(transition: Any) -> None:
        called.append(transition.chain.id)
        if transition.chain.id == chains[0].id:
            raise Mute

    called: list[int] = []
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=callback))
    chains = new_chains(dispatcher, size)
    owed = [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["retrying", *["delivered"] * (size - 1)]
    assert "whose text raises" in (shop.delivery_of(dispatcher, chains[0]).last_error or "")
    assert len(called) == size


def test_a_guard_that_changes_a_request_s_nested_value_changes_only_its_own_copy(make_dispatcher: shop.Make) -> None:
    def is_valid(transition: Any) -> bool:
        transition.context["order"]["seen"] = {1, 2}
        transition.context["order"]["lines"].append(float("nan"))
        return True

    changes = shop.transition("Changes", "reminded", valid=is_valid)
    dispatcher = make_dispatcher(shop.cart({NEW: [changes], "reminded": []}, callback=shop.Sink()))
    chains = new_chains(dispatcher, 3)
    for chain in chains:
        chain.enqueue(initial_context={"order": {"lines": [1]}})

    results = dispatcher.execute_chains([chain.id for chain in chains if chain.id is not None])

    assert [str(result.outcome) for result in results] == ["planned"] * 3
    assert shop.delivery_of(dispatcher, chains[0]).context == {"order": {"lines": [1]}}


class Quits(BaseException):
    """As gevent's Timeout: not an Exception."""


def test_a_constructor_that_raises_what_is_no_exception_fails_its_own_attempt_only(make_dispatcher: shop.Make) -> None:
    broken: list[bool] = []

    def built(self: Any, chain: Any, *arguments: Any, **options: Any) -> None:
        Transition.__init__(self, chain, *arguments, **options)
        if broken and chain.resources[0][1] == "0":
            raise Quits

    candidate = shop.transition("Built", "reminded", __init__=built, retry=RetryPolicy(max_attempts=1))
    called: list[Any] = []
    dispatcher = make_dispatcher(
        shop.cart({NEW: [candidate], "reminded": []}, callback=called.append, on_dead="skip"),
        deliveries_per_task=5,
    )
    chains = new_chains(dispatcher, 5)
    owed = [Owed(shop.planned(dispatcher, chain).id, 1) for chain in chains]
    broken.append(True)

    results = dispatcher.deliver(owed)

    assert [str(result.outcome) for result in results] == ["skipped", *["delivered"] * 4]
    assert len(called) == 4


@pytest.mark.parametrize("look", [False, True])
def test_a_callback_is_told_the_state_in_the_row_or_none(make_dispatcher: shop.Make, *, look: bool) -> None:
    wanted = ["gold"]

    def is_valid(transition: Any) -> bool:
        transition.final_state = wanted[0]
        return True

    seen = []
    upgrade = shop.transition("Upgrade", "silver", valid=is_valid)
    dispatcher = make_dispatcher(
        shop.cart(
            {NEW: [upgrade], "gold": [shop.Never], "silver": [shop.Never]},
            callback=lambda transition: seen.append(transition.final_state),
        ),
        last_look_seconds=0 if look else 3600,
    )
    (chain,) = new_chains(dispatcher, 1)
    delivery = shop.planned(dispatcher, chain)
    wanted[:] = ["silver"]

    outcome = shop.attempt(dispatcher, delivery).outcome

    if look:
        assert (str(outcome), chain.refresh().state, seen) == ("cancelled", NEW, [])
        assert "leads to silver" in (chain.events[-1].detail or "")
    else:
        assert (str(outcome), chain.refresh().state, seen) == ("delivered", "gold", ["gold"])


def test_a_callback_that_replaces_its_chain_is_recorded(make_dispatcher: shop.Make) -> None:
    def callback(transition: Any) -> None:
        transition.chain = transition.date_next_update = "mine"

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=callback))
    (chain,) = new_chains(dispatcher, 1)

    chain.execute()

    assert (chain.refresh().state, shop.actions(chain)[-1]) == ("reminded", "guard_failed")
    assert shop.delivery_of(dispatcher, chain).status == "delivered"


@pytest.mark.parametrize("rest", ["2030-01-01", 14])
@pytest.mark.parametrize("here", [False, True])
def test_a_rest_that_a_callback_sets_and_that_is_none_is_a_day(
    make_dispatcher: shop.Make, caplog: pytest.LogCaptureFixture, rest: Any, *, here: bool
) -> None:
    def callback(transition: Any) -> None:
        transition.date_next_update = rest

    clock = shop.Clock()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=callback), clock=clock
    )
    (chain,) = new_chains(dispatcher, 1)

    if here:
        chain.execute()
    else:
        shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert (chain.refresh().state, chain.next_update_at) == ("reminded", clock.now + timedelta(days=1))
    assert shop.actions(chain) == ["created", "planned", "state_transition", "guard_failed"]
    assert [record.levelno for record in caplog.records if getattr(record, "action", "") == "rest_ignored"] == [
        logging.ERROR
    ]


@pytest.mark.parametrize("what", ["callback", "verify"])
def test_a_coroutine_from_user_code_is_a_failed_attempt(make_dispatcher: shop.Make, what: str) -> None:
    verifies = shop.transition("Verifies", "verified", verify=lambda _: promise())
    config = shop.cart(
        {NEW: [verifies], "verified": []}, callback=(lambda _: promise()) if what == "callback" else shop.Sink()
    )
    dispatcher = make_dispatcher(config)
    (chain,) = new_chains(dispatcher, 1)
    delivery = shop.planned(dispatcher, chain)
    if what == "verify":
        shop.change_delivery(dispatcher, delivery.id, unknown=True)

    assert shop.attempt(dispatcher, delivery).outcome == "retrying"
    assert "coroutine" in (shop.delivery_of(dispatcher, chain).last_error or "") and chain.refresh().state == NEW


class AsyncCall:
    async def __call__(self, transition: Any) -> None:
        await asyncio.sleep(0)


async def later(self: Any) -> bool:
    return True


@pytest.mark.parametrize("attributes", [{"verify": later}, {"build_context": later}, {"callback": AsyncCall()}])
def test_async_code_is_refused_when_the_configuration_is_made(attributes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="async"):
        Dispatcher(shop.cart({NEW: [shop.transition("Async", DONE, **attributes)], DONE: []}))
    with pytest.raises(ConfigurationError, match="async"):
        Dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=AsyncCall()))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]} if levels < 3 else [value]
    return value


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        ({"deep": deep(20)}, "levels deep"),
        ({"deep": deep(950)}, "levels deep"),
        ({"large": "x" * 1_000_001}, "1,000,000 bytes"),
    ],
)
def test_a_context_has_bounds_and_the_error_names_the_key(
    make_dispatcher: shop.Make, context: dict[str, Any], problem: str
) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink()))
    key = next(iter(context))
    with pytest.raises(NotSerializable, match=problem) as caught:
        dispatcher.enqueue(shop.CHAIN_TYPE, shop.BOOKING, initial_context=context)
    assert caught.value.key == key
    with pytest.raises(NotSerializable):
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING, initial_context=context)


def test_a_context_at_its_bounds_goes_through(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink()))
    context = {"deep": deep(19), "large": "x" * 990_000}
    chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING, initial_context=context)
    chain.execute()
    assert chain.refresh().state == "reminded"


def test_whoever_asks_has_a_name_that_fits(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    with pytest.raises(ConfigurationError, match="requested_by: must be text of at most 255 characters"):
        chain.disable("x" * 300)


def test_all_day_is_a_time_of_delivery() -> None:
    config = Dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=None, delivery_hours="00:00-24:00"))
    hours = config.config.get(shop.CHAIN_TYPE).hours
    assert hours is not None
    for hour in range(24):
        assert hours.wait(datetime(2026, 3, 29, hour, 59, tzinfo=UTC), ZoneInfo("Europe/Berlin")) == timedelta(0)
