"""One test for each known defect of the ancestor: none of them may come back."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

import pytest
import redis

from dispatcher import (
    DONE,
    NEW,
    AmbiguousChain,
    ChainDisabled,
    ChainLocked,
    ChainNotDue,
    ConfigurationError,
    DeliveryPending,
    DispatcherError,
    InvalidResource,
    Transition,
)
from dispatcher.storage.models import ChainRow, ResourceRow
from tests.integration import shop

pytestmark = pytest.mark.integration


def test_a_lock_is_taken_by_one_of_many_has_an_owner_and_ends_by_itself(
    make_dispatcher: shop.Make, redis_url: str
) -> None:
    """It was a flag in the row, read and then set: two could take it, and nobody gave back a dead process's."""
    gate, asked = shop.Gate(), []
    guarded = shop.transition("Guarded", "guarded", lambda self: not asked.append(self) and gate.wait())
    config = shop.cart({NEW: [guarded]}, callback=shop.Sink())
    dispatchers = [make_dispatcher(config) for _ in range(5)]
    chain = shop.new_chain(dispatchers[0])

    with gate.during(lambda: dispatchers[0].execute_chains([chain.id])):
        works = [lambda one=one: one.execute_chains([chain.id]) for one in dispatchers[1:]]  # type: ignore[misc]
        outcomes = [str(result.outcome) for (result,) in shop.at_once(*works)]
        with redis.Redis.from_url(redis_url) as client:
            assert client.get(f"dispatcher:lock:{chain.id}")
            assert 0 < client.pttl(f"dispatcher:lock:{chain.id}") <= 30_000

    assert outcomes == ["locked"] * 4
    assert len(asked) == 1


def test_a_callback_is_never_called_for_a_state_that_is_lost(make_dispatcher: shop.Make) -> None:
    """It called back first and saved afterwards: whoever changed the chain meanwhile made a mail without a state."""
    gate, sink = shop.Gate(), shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Guarded", "guarded", gate.wait)], "parked": []}))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: chain.execute(callback=sink)) as future:
        shop.new_chain(dispatcher).move_to("parked", "the customer called")

    assert future.result()["outcome"] == "stale"
    assert (chain.refresh().state, len(sink)) == ("parked", 0)
    # And during the callback nobody can take the state away.
    other, calling = shop.new_chain(dispatcher, 2), shop.Gate()
    with (
        calling.during(lambda: other.execute(callback=shop.Sink(calling.wait))) as future,
        pytest.raises(DeliveryPending),
    ):
        shop.new_chain(dispatcher, 2).move_to("parked", "too late")
    assert future.result()["chain"]["state"] == "guarded"
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("can_be_subset", [False, True])
def test_a_lookup_keeps_chain_types_apart(make_dispatcher: shop.Make, can_be_subset: bool) -> None:
    """It looked for resources only, and gave the chain of any type."""
    types = [{"chain_type": name, "transitions": {NEW: [shop.Remind]}} for name in ("cart", "trial")]
    dispatcher = make_dispatcher({"chains": types})
    chains = [
        dispatcher.get_or_create_resource_chain(name, [("customer", "1")], can_be_subset=can_be_subset)
        for name in ("cart", "trial", "cart", "trial")
    ]

    assert [chain.chain_type for chain in chains] == ["cart", "trial"] * 2
    assert (chains[0], chains[1]) == (chains[2], chains[3]) and chains[0] != chains[1]


@pytest.mark.parametrize("can_be_subset", [False, True])
def test_resources_are_never_part_of_the_sql(make_dispatcher: shop.Make, can_be_subset: bool) -> None:
    """It wrote them into the text of its query."""
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    bystander = shop.new_chain(dispatcher)
    nasty = [
        "x' OR '1'='1",
        "x'; DELETE FROM chain_dispatcher_chain; --",
        'x"; DROP TABLE chain_dispatcher_resource; --',
        "100% %s %(name)s {0} :bind ?",
        "back\\slash\\' OR 1=1 #",
        "%",
        "_",
    ]

    chains = []
    for text in nasty:
        pair = (text[:100], text)
        made = dispatcher.get_or_create_resource_chain("cart", [pair], can_be_subset=can_be_subset)
        again = dispatcher.get_or_create_resource_chain("cart", [pair], can_be_subset=can_be_subset)
        assert made == again and made.refresh().resources == (pair,)
        assert dispatcher.find_chains(resource=pair) == [made]
        chains.append(made.id)

    assert len({bystander.id, *chains}) == len(nasty) + 1
    assert shop.count_rows(dispatcher, ResourceRow) == len(nasty) + 1


def test_a_race_makes_no_duplicate_chains(make_dispatcher: shop.Make) -> None:
    """It looked, and then inserted, with no constraint to stop the second."""
    dispatchers = [make_dispatcher(shop.cart({NEW: [shop.Remind]})) for _ in range(8)]

    found = shop.at_once(*(lambda one=one: shop.new_chain(one) for one in dispatchers))  # type: ignore[misc]

    assert len({chain.id for chain in found}) == shop.count_rows(dispatchers[0], ChainRow) == 1


def test_reasons_of_one_chain_do_not_leak_into_another(make_dispatcher: shop.Make) -> None:
    """Its `errors` were a dict and a list on the classes, shared by every chain of the process."""

    class Picky(Transition):
        final_state = "picked"

        def is_valid(self) -> bool:
            self.errors.append(f"not {self.context['resources'][0][1]}")
            return False

    dispatcher = make_dispatcher(shop.cart({NEW: [Picky]}))
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)

    results = [chain.execute() for chain in (first, second, first)]
    by_workers = dispatcher.execute_chains([first.id, second.id])

    reasons = [{"<Picky>": ["not b1"]}, {"<Picky>": ["not b2"]}, {"<Picky>": ["not b1"]}]
    assert [result["errors"] for result in results] == reasons
    assert [result.errors for result in by_workers] == reasons[:2]
    assert (first.errors, second.errors) == (reasons[0], reasons[1])


def test_a_disabled_chain_begins_nothing(make_dispatcher: shop.Make) -> None:
    """Its `disabled` was a column that no line of code read."""
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher).disable()
    shop.change_chain(dispatcher, chain.id, due_at=shop.row_of(dispatcher, chain.id).created_at)
    before = shop.dump_rows(dispatcher)["chain_dispatcher_chain"]

    with pytest.raises(ChainDisabled):
        chain.execute(callback=sink)
    assert [str(one.outcome) for one in dispatcher.execute_chains([chain.id])] == ["disabled"]
    assert dispatcher.sweep()["due"] == 0

    assert len(sink) == 0 and shop.dump_rows(dispatcher)["chain_dispatcher_chain"] == before


def test_times_are_kept_to_the_microsecond(make_dispatcher: shop.Make) -> None:
    """Its dates knew days only: a chain rested until midnight, and a history had no order."""
    clock = shop.Clock(datetime(2024, 3, 1, 23, 59, 59, 999_998, tzinfo=UTC))
    until = datetime(2024, 3, 2, 0, 0, 0, 1, tzinfo=UTC)
    rests = shop.transition("Rests", "rested", date_next_update=until)
    dispatcher = make_dispatcher(shop.cart({NEW: [rests], "rested": [shop.Remind]}, callback=None), clock=clock)
    chain = shop.new_chain(dispatcher)
    chain.execute()

    assert chain.created_at == clock.now and chain.next_update_at == until
    assert not isinstance(chain.next_update_at, date) or isinstance(chain.next_update_at, datetime)
    for microseconds in (1, 1):
        clock.forward(microseconds=microseconds)
        with pytest.raises(ChainNotDue):
            chain.execute()
        assert dispatcher.sweep()["due"] == 0
    clock.forward(microseconds=1)
    assert dispatcher.sweep()["due"] == 1
    assert chain.execute()["outcome"] == "moved"
    assert [event.created_at for event in chain.events] == [
        shop.START.replace(hour=23, minute=59, second=59, microsecond=999_998)
    ] * 2 + [until]


@pytest.mark.parametrize("by", ["application", "worker"])
def test_done_is_saved_and_has_its_event(make_dispatcher: shop.Make, by: str) -> None:
    """It set the state of a chain that was done in memory, and neither saved it nor wrote an event."""
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.transition("Finish", DONE)]}))
    chain = shop.new_chain(dispatcher)

    if by == "application":
        chain.execute(callback=shop.Raises(AssertionError("no callback on the way to DONE")))
    else:
        dispatcher.execute_chains([chain.id])

    assert dispatcher.chain(chain.id or 0).state == DONE
    assert [(event.action, event.value) for event in chain.events][1:] == [("state_transition", DONE)]


def test_each_reason_has_an_exception_of_its_own_and_all_have_one_root(
    make_dispatcher: shop.Make, redis_url: str
) -> None:
    """It raised `ValueError` for everything, with only the text to tell one reason from another."""
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Never], "sending": [shop.Remind]}, callback=shop.Sink()))
    locked, resting, disabled, waiting = (shop.new_chain(dispatcher, number) for number in range(4))
    with redis.Redis.from_url(redis_url) as client:
        client.set(f"dispatcher:lock:{locked.id}", "another's", px=30_000)
    shop.change_chain(dispatcher, resting.id, next_update_at=datetime.now(UTC) + timedelta(days=1))
    disabled.disable()
    waiting.move_to("sending", "set up")
    dispatcher.execute_chains([waiting.id])
    dispatcher.get_or_create_resource_chain("cart", [("online_booking", "b1"), ("customer", "1")])

    def lookup(chain_type: str, pairs: list[tuple[str, str]]) -> Callable[[], object]:
        return lambda: dispatcher.get_or_create_resource_chain(chain_type, pairs, can_be_subset=True)

    reasons = {
        ChainLocked: locked.execute,
        ChainNotDue: resting.execute,
        ChainDisabled: disabled.execute,
        DeliveryPending: waiting.execute,
        AmbiguousChain: lookup("cart", [("online_booking", "b1")]),
        ConfigurationError: lookup("basket", [("online_booking", "b1")]),
        InvalidResource: lookup("cart", []),
    }
    for expected, call in reasons.items():
        with pytest.raises(DispatcherError) as caught:
            call()
        assert type(caught.value) is expected
    # Those that the ancestor's users catch as `ValueError` still are.
    assert issubclass(ChainLocked, ValueError) and issubclass(ChainNotDue, ValueError)
    assert shop.actions(resting) == ["created"]


def test_what_the_ancestor_s_readme_gets_wrong_is_refused_at_once(make_dispatcher: shop.Make) -> None:
    """Step 1 has a class without a body, step 4 a chain type that the configuration does not know."""

    class Cart1WeekReminder(Transition): ...

    with pytest.raises(ConfigurationError, match="Cart1WeekReminder"):
        make_dispatcher({"chains": [{"chain_type": "cart", "transitions": {NEW: [Cart1WeekReminder]}}]})
    with pytest.raises(ConfigurationError, match="'chain_type'"):
        make_dispatcher(shop.cart({NEW: [shop.Remind]})).get_or_create_resource_chain(
            "chain_type", [("online_booking", "1")]
        )
