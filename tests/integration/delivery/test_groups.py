"""Groups of attempts: in which order an attempt is made, how old its facts may be, and what a killed group leaves."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher import NEW, Dispatcher, Transition, rate_limit
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.transition import ChainSnapshot
from tests.integration import shop
from tests.servers import RedisServer

pytestmark = pytest.mark.integration

EVENING = datetime(2026, 7, 1, 19, 59, 58, tzinfo=UTC)


class Stopwatch:
    """Monotonic time that goes on only when the test says so, and a domain clock that goes on with it."""

    def __init__(self, now: datetime = EVENING) -> None:
        self.seconds = 1000.0
        self._start = now

    def forward(self, seconds: float) -> None:
        self.seconds += seconds

    def __call__(self) -> float:
        return self.seconds

    def domain(self) -> datetime:
        """Domain time."""
        return self._start + timedelta(seconds=self.seconds - 1000)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    stopwatch = Stopwatch()
    shop.set_monotonic(monkeypatch, stopwatch)
    return stopwatch


class Facts:
    """A `load_context` that notes when it was asked for which chains, and gives what the test has put into `paid`."""

    def __init__(self, watch: Stopwatch, *, seconds: float = 0) -> None:
        self.watch = watch
        self.seconds = seconds
        self.loads: list[list[int]] = []
        self.paid: set[int] = set()
        self.loaded_at: dict[int, float] = {}

    def __call__(self, chains: Sequence[ChainSnapshot]) -> Mapping[int, Mapping[str, Any]]:
        ids = [chain.id for chain in chains]
        self.loads.append(ids)
        facts = {chain_id: {"paid": chain_id in self.paid} for chain_id in ids}
        self.watch.forward(self.seconds)
        self.loaded_at |= dict.fromkeys(ids, self.watch())
        return facts


def unless_paid(transition: Transition) -> bool:
    return not transition.context["paid"]


Unpaid = shop.transition("Unpaid", "reminded", unless_paid)


def owed(dispatcher: Dispatcher, count: int) -> list[DeliveryRecord]:
    """New deliveries, as many as that, in the order of their ids."""
    chains = [shop.new_chain(dispatcher, number) for number in range(count)]
    return sorted((shop.planned(dispatcher, chain) for chain in chains), key=lambda delivery: delivery.id)


def owed_again(dispatcher: Dispatcher, first: int, count: int) -> list[DeliveryRecord]:
    """New deliveries of other chains."""
    return [shop.planned(dispatcher, shop.new_chain(dispatcher, first + number)) for number in range(count)]


def deliver(dispatcher: Dispatcher, deliveries: Sequence[DeliveryRecord], attempt: int = 1) -> list[str]:
    """The outcomes of one message with these deliveries."""
    return [str(one.outcome) for one in dispatcher.deliver([Owed(delivery.id, attempt) for delivery in deliveries])]


def again(dispatcher: Dispatcher, broker_url: str) -> list[str]:
    """The outcomes of what a worker makes of the messages that wait."""
    outcomes = []
    for message in shop.take_messages(broker_url, shop.CALLBACKS):
        pairs = [Owed(delivery_id, attempt) for delivery_id, attempt in message.kwargs["deliveries"]]
        outcomes += [str(one.outcome) for one in dispatcher.deliver(pairs)]
    return outcomes


# --- the age of facts ------------------------------------------------------------------------------------------------


def test_facts_are_at_most_a_second_old_when_an_attempt_has_its_turn(
    make_dispatcher: shop.Make, watch: Stopwatch, broker_url: str
) -> None:
    facts, ages = Facts(watch), []

    def call(transition: Transition) -> None:
        ages.append(watch() - facts.loaded_at[transition.chain.id])
        watch.forward(0.4)

    dispatcher = make_dispatcher(shop.cart({NEW: [Unpaid]}, callback=call, load_context=facts), deliveries_per_task=10)
    deliveries = owed(dispatcher, 10)
    facts.loads.clear()
    shop.take_messages(broker_url, shop.CALLBACKS)

    outcomes = deliver(dispatcher, deliveries)

    assert outcomes.count("delivered") == 6 and outcomes.count("deferred") == 4, outcomes
    assert [len(load) for load in facts.loads] == [10, 3]
    assert max(ages) < 1
    assert again(dispatcher, broker_url).count("delivered") == 4
    assert len(ages) == 10


def test_each_guard_gets_the_moment_of_its_turn(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    moments: list[datetime] = []

    def note(transition: Transition) -> bool:
        moments.append(transition.now)
        return True

    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Noting", "reminded", note)]}, callback=lambda _: watch.forward(0.25)),
        clock=watch.domain,
    )
    deliveries = owed(dispatcher, 2)
    moments.clear()

    assert deliver(dispatcher, deliveries) == ["delivered"] * 2
    assert moments[1] - moments[0] == timedelta(seconds=0.25)


def test_who_pays_while_another_s_callback_runs_is_not_called(
    make_dispatcher: shop.Make, watch: Stopwatch, broker_url: str
) -> None:
    facts = Facts(watch)
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [Unpaid]}, callback=sink, load_context=facts))
    deliveries = owed(dispatcher, 3)
    shop.take_messages(broker_url, shop.CALLBACKS)

    def the_others_pay(_: Transition) -> None:
        facts.paid = {delivery.chain_id for delivery in deliveries[1:]}
        watch.forward(1.0)

    sink.effect = the_others_pay
    outcomes = deliver(dispatcher, deliveries) + again(dispatcher, broker_url)

    assert len(sink) == 1
    assert sorted(outcomes) == ["cancelled", "cancelled", "deferred", "delivered"]


def test_a_slow_loader_lets_one_attempt_through_for_each_load(
    make_dispatcher: shop.Make, watch: Stopwatch, broker_url: str
) -> None:
    facts = Facts(watch, seconds=3)
    dispatcher = make_dispatcher(
        shop.cart({NEW: [Unpaid]}, callback=lambda _: watch.forward(1.1), load_context=facts), lock_seconds=600
    )
    deliveries = owed(dispatcher, 30)
    facts.loads.clear()
    shop.take_messages(broker_url, shop.CALLBACKS)

    outcomes = deliver(dispatcher, deliveries)

    assert outcomes.count("delivered") == 22, "of the first ten two, and then each by itself"
    assert [len(load) for load in facts.loads] == [10, 1, *([1] * 20)]
    assert sum(map(len, facts.loads)) <= 30 + 2, "nothing is loaded again and again"


def test_as_many_begin_together_as_a_second_holds(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    facts, seconds = Facts(watch), 0.0
    dispatcher = make_dispatcher(
        shop.cart({NEW: [Unpaid]}, callback=lambda _: watch.forward(seconds), load_context=facts)
    )
    deliveries = owed(dispatcher, 80)
    facts.loads.clear()

    deliver(dispatcher, deliveries[:60])
    seconds = 0.2
    deliver(dispatcher, deliveries[60:])

    assert [len(load) for load in facts.loads] == [10, 50, 20, 5]


# --- what may have changed meanwhile ---------------------------------------------------------------------------------


def test_what_is_disabled_during_another_s_callback_goes_back(
    make_dispatcher: shop.Make, watch: Stopwatch, broker_url: str
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    deliveries = owed(dispatcher, 2)
    shop.take_messages(broker_url, shop.CALLBACKS)

    def disable_the_other(_: Transition) -> None:
        dispatcher.chain(deliveries[1].chain_id).disable("ada")
        watch.forward(1.5)

    sink.effect = disable_the_other
    assert deliver(dispatcher, deliveries) == ["delivered", "deferred"]

    (row,) = dispatcher.find_deliveries(chain_id=deliveries[1].chain_id)
    assert (row.status, row.attempt, row.publish_after) == ("pending", 0, None)
    assert again(dispatcher, broker_url) == ["disabled"] and len(sink) == 1


def test_what_another_process_has_taken_meanwhile_is_not_called(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    deliveries = owed(dispatcher, 2)

    def lose_the_other(_: Transition) -> None:
        shop.change_delivery(dispatcher, deliveries[1].id, begins=7)
        watch.forward(1.5)

    sink.effect = lose_the_other
    assert deliver(dispatcher, deliveries) == ["delivered", "stale"]
    assert len(sink) == 1
    shop.crashed(dispatcher, deliveries[1])


@pytest.mark.parametrize("siblings", [0, 1], ids=["not marked yet", "marked with a sibling"])
def test_a_lease_that_is_not_fresh_is_renewed_before_the_call_or_it_is_not_called(
    make_dispatcher: shop.Make, watch: Stopwatch, siblings: int
) -> None:
    sink = shop.Sink()
    taken: list[str] = []

    def slow_guard(transition: Transition) -> bool:
        if taken and transition.chain.id == last.chain_id:
            shop.change_delivery(dispatcher, last.id, begins=7)
            watch.forward(6)
        return True

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Slow", "reminded", slow_guard)]}, callback=sink))
    deliveries = owed(dispatcher, 1 + siblings)
    last = deliveries[-1]
    for delivery in owed_again(dispatcher, 100, siblings):  # so that the pace of this process is known
        assert deliver(dispatcher, [delivery]) == ["delivered"]
    calls = len(sink)
    taken.append(last.id)

    assert deliver(dispatcher, deliveries) == ["delivered"] * siblings + ["stale"]
    assert len(sink) == calls + siblings
    shop.crashed(dispatcher, last)


def test_guards_and_facts_that_take_too_long_are_a_failed_attempt(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    sink, seconds = shop.Sink(), 0.0

    def slow_guard(_: Transition) -> bool:
        watch.forward(seconds)
        return True

    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.transition("Slow", "reminded", slow_guard)]}, callback=sink), lock_seconds=30
    )
    deliveries = owed(dispatcher, 3)
    seconds = 31

    assert deliver(dispatcher, deliveries) == ["retrying", "deferred", "deferred"], "the others waited for a sibling"

    (row,) = dispatcher.find_deliveries(delivery_ids=[deliveries[0].id])
    reason = "its facts and guards took too long: no callback may begin later than 30 s after the begin of its task"
    assert row.last_error == f"OutOfTime: {reason}"
    assert (row.attempt, row.unknown, len(sink)) == (1, False, 0)


# --- hours and rates hold for the call -------------------------------------------------------------------------------


def test_delivery_hours_hold_for_each_call_of_a_group(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    sink = shop.Sink(lambda _: watch.forward(0.9))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=sink, delivery_hours="08:00-20:00"), clock=watch.domain
    )
    deliveries = owed(dispatcher, 6)

    outcomes = deliver(dispatcher, deliveries)

    assert outcomes.count("delivered") == 3, "19:59:58.0, 58.9 and, begun anew, 59.8"
    assert set(outcomes) == {"delivered", "deferred"}


def test_delivery_hours_are_asked_after_a_slow_guard(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    sink, seconds = shop.Sink(), 0.0

    def slow_guard(_: Transition) -> bool:
        watch.forward(seconds)
        return True

    dispatcher = make_dispatcher(
        shop.cart(
            {NEW: [shop.transition("Slow", "reminded", slow_guard)]}, callback=sink, delivery_hours="08:00-20:00"
        ),
        clock=watch.domain,
    )
    (delivery,) = owed(dispatcher, 1)
    seconds = 20

    assert deliver(dispatcher, [delivery]) == ["deferred"]
    (row,) = dispatcher.find_deliveries()
    assert (row.waits_for, row.attempt, len(sink)) == ("hours", 0, 0)


@pytest.mark.parametrize("method", ["begin", "begin_anew"])
def test_a_begin_that_waits_for_a_lock_does_not_let_time_seem_later_than_it_is(
    make_dispatcher: shop.Make, watch: Stopwatch, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sink = shop.Sink(lambda _: watch.forward(1.5))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    deliveries = owed(dispatcher, 2)
    store = type(dispatcher._services.store)
    real = getattr(store, method)

    def waiting(*arguments: Any, **named: Any) -> Any:
        watch.forward(20)
        return real(*arguments, **named)

    monkeypatch.setattr(store, method, waiting)
    deliver(dispatcher, deliveries)

    assert len(sink) == 2
    assert max(abs(call.transition.now - datetime.now(UTC)) for call in sink.calls) < timedelta(seconds=15)


def test_a_loaded_time_zone_counts(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    sink, zones = shop.Sink(), {}

    def load(chains: Sequence[ChainSnapshot]) -> dict[int, dict[str, str]]:
        return {chain.id: {"time_zone": zones.get(chain.id, "UTC")} for chain in chains}

    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind]}, callback=sink, load_context=load, delivery_hours="08:00-19:00"),
        clock=watch.domain,
    )
    here, elsewhere = owed(dispatcher, 2)
    zones[elsewhere.chain_id] = "America/Halifax"

    assert deliver(dispatcher, [here, elsewhere]) == ["deferred", "delivered"]


def test_a_last_look_that_cancels_spends_nothing_of_the_limit(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    facts = Facts(watch)
    sink = shop.Sink()
    dispatcher = make_dispatcher(
        shop.cart({NEW: [Unpaid]}, callback=sink, load_context=facts, rate_limit="1/h"), deliveries_per_task=1
    )
    paid, unpaid = owed(dispatcher, 2)
    facts.paid = {paid.chain_id}

    assert deliver(dispatcher, [paid]) == ["cancelled"]
    assert deliver(dispatcher, [unpaid]) == ["delivered"]


def test_calls_of_a_limit_are_apart_although_their_guards_are_slow(
    make_dispatcher: shop.Make, redis_server: RedisServer
) -> None:
    calls: list[float] = []
    slow = False

    def guard(_: Transition) -> bool:
        if slow:
            time.sleep(0.7)  # what a guard that asks another service takes
        return True

    dispatcher = make_dispatcher(
        shop.cart(
            {NEW: [shop.transition("Slow", "reminded", guard)]},
            callback=lambda _: calls.append(time.monotonic()),
            rate_limit="1/s",
        )
    )
    first, second = owed(dispatcher, 2)
    slow = True

    def until_called(delivery: DeliveryRecord) -> None:
        deadline = time.monotonic() + shop.WAIT_SECONDS
        while deliver(dispatcher, [delivery]) != ["delivered"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    shop.at_once(lambda: until_called(first), lambda: until_called(second))

    assert abs(calls[0] - calls[1]) >= 0.99


def test_one_call_per_customer_and_day_whatever_the_type(make_dispatcher: shop.Make) -> None:
    def customer(transition: Transition) -> str | None:
        return transition.context.get("customer")

    sink = shop.Sink()
    send = rate_limit("1/d", key=customer, name="mail")(sink)
    types = [{"chain_type": name, "transitions": {NEW: [shop.Remind]}, "callback": send} for name in ("cart", "trial")]
    dispatcher = make_dispatcher({"chains": types})
    outcomes = []
    for number, (chain_type, who) in enumerate(
        [("cart", "ada"), ("trial", "ada"), ("trial", "bob"), ("cart", "bob"), ("cart", None), ("trial", None)]
    ):
        chain = shop.new_chain(dispatcher, number, chain_type, initial_context={"customer": who} if who else None)
        outcomes.append(str(shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome))

    assert outcomes == ["delivered", "deferred", "delivered", "deferred", "delivered", "delivered"]


def test_a_keyed_limit_does_not_refuse_a_further_attempt_of_what_it_has_counted(make_dispatcher: shop.Make) -> None:
    fails = shop.Raises(OSError("down"), times=1)
    send = rate_limit("1/d", key=lambda _: "ada", name="mail")(shop.Sink(fails))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=send))
    (delivery,) = owed(dispatcher, 1)

    assert deliver(dispatcher, [delivery]) == ["retrying"]
    shop.wait_over(dispatcher, delivery)
    assert deliver(dispatcher, [delivery], 2) == ["delivered"]


@pytest.mark.parametrize(
    "key", [lambda _: 1 / 0, lambda _: "x" * 201, lambda _: ["ada"]], ids=["raises", "too long", "no text"]
)
def test_a_key_that_cannot_be_used_is_a_failed_attempt(
    make_dispatcher: shop.Make, key: Callable[[Transition], Any]
) -> None:
    sink = shop.Sink()
    send = rate_limit("1/d", key=key, name="mail")(sink)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=send))
    (delivery,) = owed(dispatcher, 1)

    assert deliver(dispatcher, [delivery]) == ["retrying"] and len(sink) == 0


# --- what a killed group leaves --------------------------------------------------------------------------------------


class Killed(KeyboardInterrupt):
    """The process ends here."""


def test_a_killed_group_leaves_one_unknown_effect_and_the_others_are_looked_at_again(
    make_dispatcher: shop.Make, watch: Stopwatch
) -> None:
    facts = Facts(watch)
    sink = shop.Sink(lambda _: _die_second(sink, watch))
    dispatcher = make_dispatcher(shop.cart({NEW: [Unpaid]}, callback=sink, load_context=facts))
    deliveries = owed(dispatcher, 3)

    with pytest.raises(Killed):
        deliver(dispatcher, deliveries)

    rows = {row.id: row for row in dispatcher.find_deliveries()}
    assert [rows[delivery.id].status for delivery in deliveries] == ["delivered", "running", "running"]
    assert [rows[delivery.id].was_not_called for delivery in deliveries[1:]] == [False, True]
    for delivery in deliveries[1:]:
        shop.change_delivery(dispatcher, delivery.id, **shop.LAPSED)
    assert dispatcher.relay()["settled"] == 2

    rows = {row.id: row for row in dispatcher.find_deliveries()}
    assert [rows[delivery.id].unknown for delivery in deliveries[1:]] == [True, False]
    assert rows[deliveries[2].id].last_error == "attempt 1 ended with its process: its callback was not called"
    facts.paid = {delivery.chain_id for delivery in deliveries}
    sink.effect = None
    assert deliver(dispatcher, deliveries[1:], 2) == ["delivered", "cancelled"], "only the unknown one is not looked at"


def test_a_further_attempt_that_died_before_its_callback_waits_as_a_failed_one(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    (delivery,) = owed(dispatcher, 1)
    shop.crashed(dispatcher, delivery, attempt=2, begins=2, uncalled=2)

    assert dispatcher.relay() == {"relayed": 0, "settled": 1}, "only a first attempt is made again at once"

    (row,) = dispatcher.find_deliveries()
    assert (row.status, row.attempt, row.unknown) == ("pending", 2, False)


def _die_second(sink: shop.Sink, watch: Stopwatch) -> None:
    watch.forward(0.3)
    if len(sink) == 2:
        raise Killed


def test_quick_attempts_share_a_mark_and_slow_ones_get_one_each(make_dispatcher: shop.Make, watch: Stopwatch) -> None:
    seconds, uncalled = 0.0, []

    def call(_: Transition) -> None:
        rows = dispatcher.find_deliveries(statuses=["running"], limit=100)
        uncalled.append(sum(row.was_not_called for row in rows))
        watch.forward(seconds)

    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=call))
    deliveries = owed(dispatcher, 12)
    deliver(dispatcher, deliveries[:3])
    deliver(dispatcher, deliveries[3:6])
    seconds = 0.1
    deliver(dispatcher, deliveries[6:9])
    deliver(dispatcher, deliveries[9:])

    assert uncalled[:3] == [2, 0, 0], "the pace is not known"
    assert uncalled[3:6] == [0, 0, 0], "quick"
    assert uncalled[9:] == [2, 1, 0], "slow"
