"""Chains: found or made once, and what a person may do with them."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import delete

from dispatcher import (
    DONE,
    NEW,
    AmbiguousChain,
    Chain,
    ChainDisabled,
    ChainMissing,
    ConfigurationError,
    DeliveryPending,
    Dispatcher,
    DispatcherError,
    InvalidResource,
    NotSerializable,
    PermanentFailure,
    RetryPolicy,
)
from dispatcher.storage.models import ChainRow, EventRow, ResourceRow
from tests.integration import shop

pytestmark = pytest.mark.integration

CALLERS = 8
Later = shop.transition("Later", "later", valid=False)
CONFIG = shop.cart({NEW: [shop.Remind], "reminded": [Later], "parked": []}, callback=shop.Sink())


# --- found or made ---------------------------------------------------------------------------------------------------


def test_concurrent_callers_get_the_same_new_chain(make_dispatcher: shop.Make) -> None:
    dispatchers = [make_dispatcher(CONFIG) for _ in range(CALLERS)]
    resources = [("online_booking", "1"), ("customer", "2")]

    def work(dispatcher: Dispatcher) -> Callable[[], Chain]:
        return lambda: dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, resources)

    found = shop.at_once(*map(work, dispatchers))

    assert len({chain.id for chain in found}) == 1
    assert {chain.resources for chain in found} == {(("customer", "2"), ("online_booking", "1"))}
    assert shop.count_rows(dispatchers[0], ChainRow) == 1
    assert shop.count_rows(dispatchers[0], ResourceRow) == 2
    assert shop.actions(found[0]) == ["created"]


def test_concurrent_lookups_of_a_subset_make_one_chain(make_dispatcher: shop.Make) -> None:
    dispatchers = [make_dispatcher(CONFIG) for _ in range(CALLERS)]

    def work(dispatcher: Dispatcher) -> Callable[[], Chain]:
        return lambda: dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, shop.BOOKING, can_be_subset=True)

    found = shop.at_once(*map(work, dispatchers))

    assert len({chain.id for chain in found}) == 1
    assert shop.count_rows(dispatchers[0], ChainRow) == 1


def test_neither_order_nor_repeats_of_resources_matter(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    first = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("a", "1"), ("b", "2")])

    again = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("b", "2"), ("a", "1"), ("b", "2")])

    assert again == first
    assert again.resources == (("a", "1"), ("b", "2"))


def test_other_resources_are_another_chain(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    first = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("a", "1"), ("b", "2")])

    for others in ([("a", "1")], [("a", "1"), ("b", "2"), ("c", "3")], [("a", "2"), ("b", "1")]):
        assert dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, others) != first


def test_resources_that_join_to_the_same_text_are_different_chains(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    pairs = [[("a", 'b","c')], [("a", "b"), ("a", "c")], [("ab", "c")], [("a", "bc")], [("A", "bc")], [("a", "bc ")]]

    found = [dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, one) for one in pairs]

    assert len({chain.id for chain in found}) == len(pairs)


def test_a_subset_finds_the_one_chain_that_has_at_least_these(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    both = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1"), ("online_booking", "2")])
    dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "9"), ("online_booking", "8")])

    assert dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1")], can_be_subset=True) == both
    assert dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1")] * 2, can_be_subset=True) == both


def test_a_subset_wants_all_of_its_resources_on_one_chain(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    first = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1")])
    second = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("online_booking", "2")])

    both = [("customer", "1"), ("online_booking", "2")]
    made = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, both, can_be_subset=True)

    assert made not in (first, second)
    assert made.resources == (("customer", "1"), ("online_booking", "2"))


def test_a_subset_that_fits_several_chains_is_ambiguous(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chains = [
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1"), ("online_booking", number)])
        for number in "ab"
    ]

    with pytest.raises(AmbiguousChain) as caught:
        dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [("customer", "1")], can_be_subset=True)

    assert isinstance(caught.value, ValueError)
    assert caught.value.chain_ids == [chain.id for chain in chains]
    assert shop.count_rows(dispatcher, ChainRow) == 2


def test_the_initial_context_is_stored_at_creation_and_ignored_afterwards(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)

    chain = shop.new_chain(dispatcher, initial_context={"lang": "de"})
    shop.new_chain(dispatcher, initial_context={"lang": "fr"})

    assert shop.row_of(dispatcher, chain.id).context == {"lang": "de"}


def test_a_new_chain_is_new_due_and_has_one_event(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock())

    chain = shop.new_chain(dispatcher)

    assert (chain.state, chain.chain_type, chain.disabled, chain.next_update_at) == (NEW, shop.CHAIN_TYPE, False, None)
    assert chain.due_at == chain.created_at == shop.START
    (event,) = chain.events
    assert (event.action, event.value, event.to_state, event.created_at) == ("created", NEW, NEW, shop.START)


def test_a_new_chain_without_candidates_is_not_due(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: []}))

    assert shop.new_chain(dispatcher).due_at is None


NO_RESOURCES: list[tuple[object, str]] = [
    ([], "[]"),
    ([("", "1")], "('', '1')"),
    ([("booking", "")], "('booking', '')"),
    ([("booking", 1)], "('booking', 1)"),
    ([(None, "1")], "(None, '1')"),
    ([("booking", "1", "2")], "('booking', '1', '2')"),
    (["ab"], "'ab'"),
    ("ab", "'ab'"),
    (5, "5"),
    ([("ok", "1"), ("booking", "x" * 256)], "('booking', 'xxx"),
    ([("t" * 101, "1")], "('ttt"),
    ([("booking", "a\x00b")], "a\\x00b"),
    ([("booking", "\ud800")], "\\ud800"),
]


def test_resources_that_are_none_are_refused_and_nothing_is_written(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    before = shop.dump_rows(dispatcher)

    for resources, named in NO_RESOURCES:
        for call in (dispatcher.get_or_create_resource_chain, dispatcher.enqueue):
            with pytest.raises(InvalidResource) as caught:
                call(shop.CHAIN_TYPE, resources)  # type: ignore[arg-type]
            assert isinstance(caught.value, ValueError)
            assert named in str(caught.value)
    assert shop.dump_rows(dispatcher) == before


def test_the_longest_resource_that_is_allowed_is_kept_whole(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    longest = ("ü" * 100, "\N{PARTY POPPER}" * 255)

    chain = dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [longest])

    assert chain.refresh().resources == (longest,)


def test_an_unknown_chain_type_is_refused_by_name(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)

    for call in (dispatcher.get_or_create_resource_chain, dispatcher.enqueue):
        with pytest.raises(ConfigurationError, match="basket") as caught:
            call("basket", shop.BOOKING)
        assert isinstance(caught.value, ValueError)
    assert shop.count_rows(dispatcher, ChainRow) == 0


def test_an_initial_context_that_cannot_be_stored_is_refused(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)

    with pytest.raises(NotSerializable, match="booking"):
        shop.new_chain(dispatcher, initial_context={"booking": object()})

    assert shop.count_rows(dispatcher, ChainRow) == 0


def test_chains_are_found_by_id_type_state_and_resource(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    first, second = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    second.move_to("reminded", "by hand")

    assert dispatcher.chain(first.id) == first
    assert dispatcher.find_chains() == [first, second]
    assert dispatcher.find_chains(state="reminded") == [second]
    assert dispatcher.find_chains(chain_type="basket") == []
    assert dispatcher.find_chains(resource=("online_booking", "b1")) == [first]
    assert dispatcher.find_chains(after_id=first.id) == [second]
    assert dispatcher.find_chains(limit=1) == [first]


def test_chains_of_a_resource_are_filtered_before_they_are_counted_against_the_limit(
    make_dispatcher: shop.Make,
) -> None:
    customer = ("customer", "57844")
    config = shop.cart({NEW: [shop.Remind], "reminded": []})
    config["chains"].append({"chain_type": "basket", "transitions": {NEW: [shop.Remind], "reminded": []}})
    dispatcher = make_dispatcher(config)
    closed, open_ones, baskets = [], [], []
    for number in range(9):
        chain_type = "basket" if number == 8 else shop.CHAIN_TYPE
        chain = dispatcher.get_or_create_resource_chain(chain_type, [customer, ("online_booking", f"b{number}")])
        (closed if number < 5 else open_ones if number < 8 else baskets).append(chain)
    for chain in closed:
        shop.change_chain(dispatcher, chain.id, state="reminded")

    assert dispatcher.find_chains(resource=customer, state=NEW, limit=4) == [*open_ones, *baskets]
    assert dispatcher.find_chains(resource=customer, chain_type="basket", limit=1) == baskets
    assert dispatcher.find_chains(resource=customer, chain_type=shop.CHAIN_TYPE, state=NEW, limit=2) == open_ones[:2]
    after = dispatcher.find_chains(resource=customer, state=NEW, limit=4, after_id=open_ones[0].id)
    assert after == [*open_ones[1:], *baskets]
    assert dispatcher.find_chains(resource=("customer", "5784"), state=NEW) == []


def test_a_deleted_chain_is_missing(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    dispatcher.database.write(lambda connection: connection.execute(delete(ChainRow).where(ChainRow.id == chain.id)))

    for call in (chain.refresh, chain.execute, chain.enqueue, chain.disable, chain.reset):
        with pytest.raises(ChainMissing) as caught:
            call()
        assert isinstance(caught.value, DispatcherError)
    with pytest.raises(ChainMissing):
        dispatcher.chain(chain.id)
    (result,) = dispatcher.execute_chains([chain.id])
    assert result.outcome == "missing"


# --- disabled --------------------------------------------------------------------------------------------------------


def test_a_disabled_chain_is_neither_executed_nor_swept(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher).disable("me")

    with pytest.raises(ChainDisabled):
        chain.execute()
    (result,) = dispatcher.execute_chains([chain.id])

    assert result.outcome == "disabled"
    assert chain.disabled and chain.due_at is None
    assert dispatcher.sweep()["due"] == 0
    assert len(sink) == 0
    assert [(event.action, event.requested_by) for event in chain.events][1:] == [("disabled", "me")]


def test_disabling_twice_is_one_event(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)

    chain.disable().disable()
    chain.enable().enable()

    assert shop.actions(chain) == ["created", "disabled", "enabled"]


def test_enabling_makes_a_chain_due(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    chain = shop.new_chain(dispatcher).disable()
    clock.forward(hours=1)

    chain.enable()

    assert chain.due_at == clock.now


def test_enabling_keeps_the_rest_of_a_chain(make_dispatcher: shop.Make) -> None:
    """A chain is never due before its `next_update_at`: it would be executed in every sweep, for nothing."""
    dispatcher = make_dispatcher(CONFIG, clock=shop.Clock())
    chain = shop.new_chain(dispatcher)
    shop.change_chain(
        dispatcher, chain.id, next_update_at=shop.START + timedelta(days=1), due_at=shop.START + timedelta(days=1)
    )

    chain.disable()
    chain.enable()

    assert chain.due_at == shop.START + timedelta(days=1)


def test_enabling_a_chain_with_an_open_delivery_gives_the_delivery_back_to_the_relay(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.take_messages(broker_url, shop.CALLBACKS)

    chain.disable()
    assert shop.attempt(dispatcher, delivery).outcome == "disabled"
    shop.wait_over(dispatcher, delivery)
    chain.refresh().disable()
    assert shop.row_of(dispatcher, chain.id).due_at is None

    chain.enable()
    assert dispatcher.relay()["relayed"] == 1
    (message,) = shop.take_messages(broker_url, shop.CALLBACKS)
    assert message.kwargs == {"deliveries": [[delivery.id, 1]]}
    assert chain.due_at is None
    assert shop.attempt(dispatcher, delivery).outcome == "delivered"
    assert len(sink) == 1
    shop.assert_consistent(dispatcher)


def test_the_relay_leaves_the_delivery_of_a_disabled_chain_alone(make_dispatcher: shop.Make, broker_url: str) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    shop.planned(dispatcher, chain)
    shop.take_messages(broker_url, shop.CALLBACKS)

    chain.disable()

    assert shop.delivery_of(dispatcher, chain).publish_after is None
    assert dispatcher.relay() == {"relayed": 0, "settled": 0}


def test_an_attempt_under_way_finishes_and_moves_a_chain_that_is_disabled_meanwhile(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [Later]}, callback=shop.Sink(gate.wait)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        chain.disable()

    assert future.result().outcome == "delivered"
    assert chain.refresh().state == "reminded"
    assert chain.disabled and chain.due_at is None
    shop.assert_consistent(dispatcher)


def test_a_failed_attempt_of_a_chain_that_was_disabled_meanwhile_waits_until_it_is_enabled(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    gate = shop.Gate()

    def fail(_: object) -> None:
        gate.wait()
        raise OSError("mail server down")

    sink = shop.Sink(fail)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        chain.disable()

    assert future.result().outcome == "retrying"
    assert shop.delivery_of(dispatcher, chain).publish_after is None

    sink.effect = None
    chain.enable()
    shop.wait_over(dispatcher, delivery)
    shop.take_messages(broker_url, shop.CALLBACKS)
    assert dispatcher.relay()["relayed"] == 1
    assert shop.attempt(dispatcher, delivery, 2).outcome == "delivered"


def test_a_chain_disabled_between_read_and_plan_is_not_planned(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    guarded = shop.transition("Guarded", "guarded", gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [guarded]}, callback=sink))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: dispatcher.execute_chains([chain.id])) as future:
        chain.disable()

    assert [result.outcome for result in future.result()] == ["stale"]
    assert chain.refresh().state == NEW
    assert dispatcher.find_deliveries() == []
    assert shop.row_of(dispatcher, chain.id).due_at is None


# --- reset and move --------------------------------------------------------------------------------------------------


def test_reset_puts_a_chain_back_to_new_and_makes_it_due(make_dispatcher: shop.Make) -> None:
    clock = shop.Clock()
    dispatcher = make_dispatcher(CONFIG, clock=clock)
    chain = shop.new_chain(dispatcher)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    chain.enqueue(initial_context={"a": 1})
    shop.change_chain(dispatcher, chain.id, next_update_at=shop.START + timedelta(days=9), failures=3)
    clock.forward(hours=1)

    chain.reset("me")

    row = shop.row_of(dispatcher, chain.id)
    assert (row.state, row.due_at, row.next_update_at, row.request, row.failures) == (NEW, clock.now, None, None, 0)
    event = chain.events[-1]
    assert (event.action, event.from_state, event.to_state, event.requested_by) == ("reset", "reminded", NEW, "me")
    shop.assert_consistent(dispatcher)


def test_a_chain_that_was_reset_gets_its_callback_again_under_another_key(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink))
    chain = shop.new_chain(dispatcher)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    chain.reset()
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))

    assert len({call.key for call in sink.calls}) == 2


def test_move_to_puts_a_chain_into_a_state_with_its_reason(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)

    chain.move_to("parked", "customer called", "me")

    assert chain.state == "parked" and chain.due_at is None
    event = chain.events[-1]
    assert (event.action, event.value, event.detail, event.requested_by) == ("moved", "parked", "customer called", "me")
    assert chain.move_to("reminded", "again").due_at is not None
    shop.assert_consistent(dispatcher)


def test_move_to_an_unknown_state_is_refused(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)

    with pytest.raises(ConfigurationError, match="nowhere"):
        chain.move_to("nowhere", "typo")

    assert chain.refresh().state == NEW and shop.actions(chain) == ["created"]


@pytest.mark.parametrize("act", [lambda chain: chain.reset(), lambda chain: chain.move_to("parked", "stop")])
def test_a_delivery_that_waits_is_cancelled_by_reset_and_move(
    make_dispatcher: shop.Make, act: Callable[..., Chain]
) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "parked": []}, callback=sink))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    act(chain)

    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert shop.row_of(dispatcher, chain.id).pending_delivery_id is None
    assert shop.attempt(dispatcher, delivery).outcome == "stale"
    assert len(sink) == 0
    assert "cancelled" in shop.actions(chain)
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("act", [lambda chain: chain.reset(), lambda chain: chain.move_to("reminded", "stop")])
def test_reset_and_move_are_refused_while_an_attempt_runs(
    make_dispatcher: shop.Make, act: Callable[..., Chain]
) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": []}, callback=shop.Sink(gate.wait)))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        before = shop.dump_rows(dispatcher)
        with pytest.raises(DeliveryPending):
            act(chain)
        assert shop.dump_rows(dispatcher) == before

    assert future.result().outcome == "delivered"


@pytest.mark.parametrize("status", ["dead", "held"])
def test_a_delivery_that_waits_for_a_person_is_cancelled_by_reset(make_dispatcher: shop.Make, status: str) -> None:
    effect = shop.Raises(PermanentFailure("no"))
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(effect), on_unknown="hold"))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    if status == "dead":
        shop.attempt(dispatcher, delivery)
    else:
        shop.crashed(dispatcher, delivery)
        dispatcher.relay()
    assert shop.delivery_of(dispatcher, chain).status == status

    chain.reset()

    assert shop.delivery_of(dispatcher, chain).status == "cancelled"
    assert chain.due_at is not None
    shop.assert_consistent(dispatcher)


def test_a_chain_moved_between_read_and_write_keeps_its_new_state(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    guarded = shop.transition("Guarded", "guarded", gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [guarded], "parked": []}, callback=sink))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: dispatcher.execute_chains([chain.id])) as future:
        chain.move_to("parked", "stop")

    assert [result.outcome for result in future.result()] == ["stale"]
    assert chain.refresh().state == "parked"
    assert dispatcher.find_deliveries() == []
    shop.assert_consistent(dispatcher)


def test_resetting_a_disabled_chain_leaves_it_disabled_and_not_due(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher).disable()

    chain.reset()

    assert chain.disabled and chain.due_at is None


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_explain_says_what_each_candidate_says_and_changes_nothing(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [Later, shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    before = shop.dump_rows(dispatcher)

    said = chain.explain()

    assert (said["would_take"], said["would_reach"], said["callback"]) == ("Remind", "reminded", "type")
    assert said["errors"] == {"<Later>": ["Later is not wanted"]}
    assert shop.dump_rows(dispatcher) == before


def test_explain_shows_the_open_delivery_without_its_payload(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(CONFIG)
    chain = shop.new_chain(dispatcher)
    chain.enqueue(initial_context={"secret": "s3cret"}, callback_kwargs={"token": "s3cret"})
    shop.planned(dispatcher, chain)

    said = chain.explain()

    assert said["outcome"] == "pending"
    assert said["delivery"]["status"] == "pending"
    assert "s3cret" not in repr(said)


def test_stats_count_chains_and_deliveries(make_dispatcher: shop.Make) -> None:
    once = shop.transition("Once", "once", retry=RetryPolicy(max_attempts=1))
    dispatcher = make_dispatcher(
        shop.cart({NEW: [once], "once": [Later]}, callback=shop.Sink(shop.Raises(OSError("no"), times=1)))
    )
    dead, delivered, pending = (shop.planned(dispatcher, shop.new_chain(dispatcher, number)) for number in range(3))
    shop.new_chain(dispatcher, 3)
    shop.attempt(dispatcher, dead)
    shop.attempt(dispatcher, delivered)

    said = dispatcher.stats()

    assert said["chains"] == 4
    assert said["due"] == 2  # the new one, and the one that was delivered
    assert said["open_deliveries"] == 2, "the pending one, and the dead one, for which its chain waits, too"
    assert {name: count for name, count in said["deliveries"].items() if count} == {
        "dead": 1,
        "delivered": 1,
        "pending": 1,
    }
    assert pending.status == "pending"


def test_chains_with_the_same_id_are_equal(make_dispatcher: shop.Make) -> None:
    first, again = shop.new_chain(make_dispatcher(CONFIG)), shop.new_chain(make_dispatcher(CONFIG))

    assert first == again and len({first, again}) == 1
    assert first != shop.new_chain(make_dispatcher(CONFIG), 2)


def test_the_events_of_a_chain_carry_its_version(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(
        shop.cart({NEW: [shop.Remind], "reminded": [shop.transition("Finish", DONE)]}, callback=shop.Sink())
    )
    chain = shop.new_chain(dispatcher)
    shop.attempt(dispatcher, shop.planned(dispatcher, chain))
    dispatcher.execute_chains([chain.id])

    versions = [(event.action, event.chain_version, event.move_version) for event in chain.events]

    assert versions == [
        ("created", 0, None),
        ("planned", 1, None),
        ("state_transition", 2, 2),
        ("state_transition", 3, 3),
    ]
    assert shop.row_of(dispatcher, chain.id).version == 3
    assert shop.count_rows(dispatcher, EventRow) == 4
