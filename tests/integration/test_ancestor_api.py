"""The ancestor's API, as its users wrote it, with stubs for their domain."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest

from dispatcher import DONE, NEW, ChainNotDue, ConfigurationError, Dispatcher, Transition
from dispatcher.storage.models import ChainRow
from tests.integration import shop

pytestmark = pytest.mark.integration

CART_2_DAY_REMINDER_SENT = "cart_2_day_reminder_sent"
CART_1_WEEK_REMINDER_SENT = "cart_1_week_reminder_sent"
LONG_TIME_AGO = datetime(2017, 1, 1)  # noqa: DTZ001 - as the ancestor's users stored it


class OnlineBooking:
    """The application's model."""

    table: ClassVar[dict[str, "OnlineBooking"]] = {}

    def __init__(self, pk: str, date_updated: datetime = LONG_TIME_AGO, *, complete: bool = False) -> None:
        self.pk = pk
        self.date_updated = date_updated
        self.complete = complete
        self.table[pk] = self

    def to_dict(self) -> dict[str, str]:
        return {"pk": self.pk}


class BookingTransition(Transition):
    """What the application's transitions share."""

    @property
    def onlinebooking(self) -> OnlineBooking:
        return OnlineBooking.table[dict(self.context["resources"])["online_booking"]]


class CartBookingComplete(BookingTransition):
    final_state = DONE

    def is_valid(self) -> bool:
        if not self.onlinebooking.complete:
            self.errors.append("The booking is not complete")
        return self.onlinebooking.complete


class Cart2DayReminder(BookingTransition):
    final_state = CART_2_DAY_REMINDER_SENT

    def is_valid(self) -> bool:
        if self.onlinebooking.date_updated > datetime.now() - timedelta(days=2):  # noqa: DTZ005 - as above
            self.errors.append("The booking was updated less than 2 days ago")
            return False
        return True

    def build_context(self) -> dict[str, Any]:
        return {"booking": self.onlinebooking.to_dict()}


class Cart1WeekReminder(BookingTransition):
    final_state = CART_1_WEEK_REMINDER_SENT

    def is_valid(self) -> bool:
        self.errors.append("The first reminder was sent less than a week ago")
        return False


CONFIG = {
    "chains": [
        {
            "chain_type": "abandoned_cart",
            "transitions": {
                NEW: [CartBookingComplete, Cart2DayReminder],
                Cart2DayReminder.final_state: [CartBookingComplete, Cart1WeekReminder],
                Cart1WeekReminder.final_state: [CartBookingComplete],
            },
        }
    ]
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, database_url: str, redis_url: str) -> None:
    """`Dispatcher(CONFIG)` finds the rest in the environment."""
    monkeypatch.setenv("DISPATCHER_DATABASE_URL", database_url)
    monkeypatch.setenv("DISPATCHER_REDIS_URL", redis_url)
    OnlineBooking.table.clear()


@pytest.fixture
def dispatcher(_environment: None) -> Iterator[Dispatcher]:
    """The ancestor's way to make one."""
    dispatcher = Dispatcher(CONFIG)
    yield dispatcher
    dispatcher.close()


def make(config: dict[str, Any], request: pytest.FixtureRequest) -> Dispatcher:
    dispatcher = Dispatcher(config)
    request.addfinalizer(dispatcher.close)
    return dispatcher


def one_step(step: type[Transition]) -> dict[str, Any]:
    return {"chains": [{"chain_type": "abandoned_cart", "transitions": {NEW: [step], step.final_state: []}}]}


def test_the_whole_path_of_an_abandoned_cart(dispatcher: Dispatcher) -> None:
    booking = OnlineBooking("123456")
    sent: list[Any] = []

    def some_callback(transition: Transition, **callback_kwargs: Any) -> None:
        sent.append((str(transition), transition.build_context(), callback_kwargs))

    chain = dispatcher.get_or_create_resource_chain(
        chain_type="abandoned_cart", rsc_mappings=[("online_booking", "123456"), ("customer", "57844")]
    )
    assert chain.state == NEW
    result = chain.execute(callback=some_callback, callback_kwargs={"lang": "en"}, requested_by="cart_scripts")

    assert sent == [("<Cart2DayReminder>", {"booking": {"pk": "123456"}}, {"lang": "en"})]
    assert result == {
        "errors": {"<CartBookingComplete>": ["The booking is not complete"]},
        "dry_run": False,
        "transition": {
            "errors": [],
            "context": {"resources": [("customer", "57844"), ("online_booking", "123456")]},
            "final_state": CART_2_DAY_REMINDER_SENT,
        },
        "chain": {"id": chain.id, "state": CART_2_DAY_REMINDER_SENT},
        "outcome": "moved",
    }

    assert chain.execute(callback=some_callback)["transition"] is None
    assert chain.errors["<Cart1WeekReminder>"] == ["The first reminder was sent less than a week ago"]
    booking.complete = True
    assert chain.execute(callback=some_callback)["chain"]["state"] == DONE
    assert len(sent) == 1, "no callback on the way to DONE"
    assert chain.execute(callback=some_callback)["transition"] is None
    assert [(event.action, event.value) for event in chain.events if event.action == "state_transition"] == [
        ("state_transition", CART_2_DAY_REMINDER_SENT),
        ("state_transition", DONE),
    ]


def test_a_chain_that_never_validates_stays_where_it_is(dispatcher: Dispatcher) -> None:
    OnlineBooking("123456", datetime.now())  # noqa: DTZ005 - as above
    called: list[Any] = []
    chain = dispatcher.get_or_create_resource_chain("abandoned_cart", [("online_booking", "123456")])

    for _ in range(3):
        result = chain.execute(callback=called.append)

    assert result["errors"] == {
        "<CartBookingComplete>": ["The booking is not complete"],
        "<Cart2DayReminder>": ["The booking was updated less than 2 days ago"],
    }
    assert (result["transition"], result["outcome"], chain.state, called) == (None, "none", NEW, [])


def test_a_chain_is_found_by_a_subset_of_its_resources(dispatcher: Dispatcher) -> None:
    chain = dispatcher.get_or_create_resource_chain(
        chain_type="abandoned_cart", rsc_mappings=[("online_booking", "123456"), ("customer", "57844")]
    )
    found = dispatcher.get_or_create_resource_chain(
        chain_type="abandoned_cart", rsc_mappings=[("customer", "57844")], can_be_subset=True
    )
    exact = dispatcher.get_or_create_resource_chain(chain_type="abandoned_cart", rsc_mappings=[("customer", "57844")])

    assert found == chain != exact


def test_a_dry_run_neither_calls_nor_moves(dispatcher: Dispatcher) -> None:
    OnlineBooking("123456")
    called: list[Any] = []
    chain = dispatcher.get_or_create_resource_chain("abandoned_cart", [("online_booking", "123456")])

    result = chain.execute(callback=called.append, dry_run=True)

    assert result["dry_run"] is True
    assert result["transition"]["final_state"] == CART_2_DAY_REMINDER_SENT
    assert (result["chain"]["state"], chain.refresh().state, called) == (NEW, NEW, [])


def test_the_initial_context_reaches_guard_and_callback(request: pytest.FixtureRequest) -> None:
    seen: list[Any] = []

    class Wanted(Transition):
        final_state = "wanted"

        def is_valid(self) -> bool:
            return bool(self.context["wanted"])

    chain = make(one_step(Wanted), request).get_or_create_resource_chain("abandoned_cart", [("online_booking", "1")])
    assert chain.execute(initial_context={"wanted": False})["outcome"] == "none"

    chain.execute(initial_context={"wanted": True}, callback=lambda transition: seen.append(transition.context))

    assert seen == [{"wanted": True, "resources": [("online_booking", "1")]}]


def test_the_class_s_initial_context_wins_over_the_call_s(request: pytest.FixtureRequest) -> None:
    seen: list[Any] = []

    class Preset(Transition):
        final_state = "preset"
        initial_context: ClassVar[dict[str, str]] = {"template": "class"}

        def is_valid(self) -> bool:
            seen.append(self.context["template"])
            return True

    chain = make(one_step(Preset), request).get_or_create_resource_chain("abandoned_cart", [("online_booking", "1")])
    chain.execute(initial_context={"template": "call"})

    assert seen == ["class"]


def test_the_resources_may_be_given_in_the_initial_context(request: pytest.FixtureRequest) -> None:
    seen: list[Any] = []

    class Sees(Transition):
        final_state = "seen"

        def is_valid(self) -> bool:
            seen.append(self.context["resources"])
            return False

    chain = make(one_step(Sees), request).get_or_create_resource_chain("abandoned_cart", [("online_booking", "1")])
    chain.execute(initial_context={"resources": ["theirs"]})
    chain.execute()

    assert seen == [["theirs"], [("online_booking", "1")]]


def test_a_transition_s_own_callback_goes_before_the_given_one(request: pytest.FixtureRequest) -> None:
    called: list[Any] = []

    class HasOwn(Transition):
        final_state = "own"

        def is_valid(self) -> bool:
            return True

        def callback(self, lang: str) -> None:
            called.append(("own", lang))

    chain = make(one_step(HasOwn), request).get_or_create_resource_chain("abandoned_cart", [("online_booking", "1")])
    chain.execute(callback=lambda *_: called.append("given"), callback_kwargs={"lang": "en"})

    assert called == [("own", "en")]


def test_a_chain_rests_until_its_date_next_update(request: pytest.FixtureRequest) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=2)).date()

    class Rests(Transition):
        final_state = "rested"
        date_next_update = tomorrow

        def is_valid(self) -> bool:
            return True

    config = {
        "chains": [{"chain_type": "abandoned_cart", "transitions": {NEW: [Rests], "rested": [Cart1WeekReminder]}}]
    }
    chain = make(config, request).get_or_create_resource_chain("abandoned_cart", [("online_booking", "1")])
    chain.execute()

    assert chain.date_next_update is not None and chain.date_next_update.date() == tomorrow
    with pytest.raises(ValueError, match="rests") as caught:
        chain.execute()
    assert isinstance(caught.value, ChainNotDue)


def test_what_a_callback_raises_is_the_caller_s(dispatcher: Dispatcher) -> None:
    OnlineBooking("123456")
    chain = dispatcher.get_or_create_resource_chain("abandoned_cart", [("online_booking", "123456")])

    def fails(transition: Transition) -> None:
        raise KeyError("template")

    with pytest.raises(KeyError, match="template"):
        chain.execute(callback=fails)

    assert chain.refresh().state == NEW
    assert chain.execute(callback=lambda transition: None)["chain"]["state"] == CART_2_DAY_REMINDER_SENT


# --- bad input -------------------------------------------------------------------------------------------------------


class NoFinalState(Transition):
    """Step 1 of the ancestor's README, with its `...` for a body."""


class NoGuard(Transition):
    final_state = "no_guard"


def namesake() -> type[Transition]:
    return type("Cart2DayReminder", (Cart2DayReminder,), {"final_state": "another"})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, ["chains"]),
        ({"chains": "abandoned_cart"}, ["chains"]),
        ({"chains": [{"transitions": {}}]}, ["chain_type"]),
        ({"chains": [{"chain_type": "cart"}]}, ["cart", "transitions"]),
        ({"chains": [{"chain_type": "cart", "transitions": {NEW: [NoFinalState]}}]}, ["cart", NEW, "NoFinalState"]),
        ({"chains": [{"chain_type": "cart", "transitions": {NEW: [NoGuard]}}]}, ["cart", NEW, "NoGuard", "is_valid"]),
        ({"chains": [{"chain_type": "cart", "transitions": {NEW: [str]}}]}, ["cart", NEW, "str"]),
        ({"chains": [{"chain_type": "cart", "transitions": {NEW: Cart2DayReminder}}]}, ["cart", NEW]),
        (
            {"chains": [{"chain_type": "cart", "transitions": {NEW: [Cart2DayReminder], "later": [namesake()]}}]},
            ["cart", "later", "Cart2DayReminder"],
        ),
        ({"chains": [{"chain_type": "cart", "transitions": {}, "colour": "red"}]}, ["cart", "colour"]),
        ({"chains": [{"chain_type": "cart", "transitions": {}}] * 2}, ["cart", "twice"]),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_configuration_that_is_wrong_is_refused_at_construction(config: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Dispatcher(config)

    assert isinstance(caught.value, ValueError)
    for word in named:
        assert word in str(caught.value)


def test_a_lookup_with_a_type_that_is_not_configured_is_refused(dispatcher: Dispatcher) -> None:
    """Step 4 of the ancestor's README has `chain_type='chain_type'`."""
    with pytest.raises(ConfigurationError, match="'chain_type'"):
        dispatcher.get_or_create_resource_chain(chain_type="chain_type", rsc_mappings=[("online_booking", "123456")])

    assert shop.count_rows(dispatcher, ChainRow) == 0
