"""Attempts whose process hangs: an operator gives them up, and their effect is unknown."""

import pytest

from dispatcher import NEW, Chain, DeliveryChanged, Dispatcher, DispatcherError
from dispatcher.domain.records import DeliveryRecord
from tests.integration import shop

pytestmark = pytest.mark.integration


def running(dispatcher: Dispatcher, chain: Chain) -> DeliveryRecord:
    return shop.delivery_of(dispatcher, chain)


@pytest.mark.parametrize(("on_unknown", "status"), [("retry", "pending"), ("hold", "held")])
def test_what_follows_is_as_after_a_crash_and_the_old_process_is_too_late(
    make_dispatcher: shop.Make, on_unknown: str, status: str
) -> None:
    gate = shop.Gate()
    sink = shop.Sink(gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=sink, on_unknown=on_unknown))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, delivery)) as future:
        dispatcher.abandon_delivery(running(dispatcher, chain), requested_by="ada", reason="hangs")
        row = running(dispatcher, chain)
        assert (row.status, row.unknown, row.attempt) == (status, True, 1)
        assert row.last_error == "attempt 1 was abandoned by ada (hangs): its effect is unknown"

    assert future.result().outcome == "stale"
    event = next(event for event in chain.refresh().events if event.action == "abandoned")
    assert (event.requested_by, event.detail, event.value) == ("ada", "hangs", "Remind")
    shop.assert_consistent(dispatcher)


def test_the_call_of_an_application_can_be_abandoned(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: chain.execute(callback=shop.Sink(gate.wait))) as future:
        dispatcher.abandon_delivery(running(dispatcher, chain))
        assert running(dispatcher, chain).status == "cancelled"

    assert future.result()["outcome"] == "stale"
    shop.assert_consistent(dispatcher)


def test_an_attempt_that_does_not_run_is_left_alone(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(DeliveryChanged, match="no attempt runs, it is pending"):
        dispatcher.abandon_delivery(delivery)

    assert shop.dump_rows(dispatcher) == before


def test_another_attempt_than_the_one_that_was_seen_is_left_alone(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    shop.crashed(dispatcher, shop.planned(dispatcher, chain))
    seen = running(dispatcher, chain)
    shop.change_delivery(dispatcher, seen.id, attempt=2, begins=2)

    with pytest.raises(DeliveryChanged, match="attempt 2 runs now"):
        dispatcher.abandon_delivery(seen)


def test_a_type_that_this_process_does_not_know_is_refused(make_dispatcher: shop.Make) -> None:
    theirs = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    ours = make_dispatcher({"chains": [{"chain_type": "basket", "transitions": {NEW: [shop.Remind]}}]})
    chain = shop.new_chain(theirs)
    shop.crashed(theirs, shop.planned(theirs, chain))

    with pytest.raises(DispatcherError, match="cart"):
        ours.abandon_delivery(running(ours, chain))
    assert running(theirs, chain).status == "running"


def test_the_doctor_names_an_attempt_that_runs_longer_than_its_task_may(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)
    delivery = shop.planned(dispatcher, chain)
    shop.crashed(dispatcher, delivery, publish_after=None, next_attempt_at=shop.LONG_AGO)

    (finding,) = [str(one) for one in dispatcher.examine() if delivery.id in str(one)]

    assert finding.startswith(f"delivery: attempt 1 at {delivery.id} has run ")
    assert finding.endswith(f"`dispatcher deliveries abandon {delivery.id}`")
