"""Attempts that ended with their process, to the end: what is asked, what a person decides, what never loops.

The first answers of `verify()` and `on_unknown` are in `test_deliveries`.
"""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from dispatcher import NEW, Chain, Dispatcher, PermanentFailure, RetryPolicy, Transition
from dispatcher.domain.records import DeliveryRecord
from tests.integration import shop

pytestmark = pytest.mark.integration

MAX_ATTEMPTS = 2


def verifying(answer: Any, **attributes: Any) -> type[Transition]:
    """A transition whose `verify()` always gives this answer; an exception is raised."""

    def verify(_: Transition) -> bool | None:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    policy = RetryPolicy(max_attempts=MAX_ATTEMPTS)
    return shop.transition("Verifying", "verified", verify=verify, retry=policy, **attributes)


Plain = shop.transition("Plain", "verified", retry=RetryPolicy(max_attempts=MAX_ATTEMPTS))


def deployment(make_dispatcher: shop.Make, candidate: type[Transition], sink: shop.Sink, **options: Any) -> Dispatcher:
    return make_dispatcher(shop.cart({NEW: [candidate], "verified": [shop.Never]}, callback=sink, **options))


def crash(dispatcher: Dispatcher, broker_url: str, chain: Chain, number: int) -> list[Any]:
    """What the relay publishes after a worker died inside attempt `number` of the chain's delivery."""
    delivery = shop.delivery_of(dispatcher, chain)
    shop.change_delivery(dispatcher, delivery.id, attempt=number - 1)
    shop.crashed(dispatcher, delivery, attempt=number)
    shop.take_messages(broker_url, shop.CALLBACKS)
    assert dispatcher.relay()["settled"] == 1
    return [message.kwargs["deliveries"] for message in shop.take_messages(broker_url, shop.CALLBACKS)]


def owing(dispatcher: Dispatcher) -> tuple[Chain, DeliveryRecord]:
    chain = shop.new_chain(dispatcher)
    return chain, shop.planned(dispatcher, chain)


# --- the closing look ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_dead", ["hold", "skip"])
@pytest.mark.parametrize("on_unknown", ["retry", "hold"])
@pytest.mark.parametrize("answer", [True, False, None])
def test_after_the_last_attempt_verify_is_asked_and_nothing_is_called(
    make_dispatcher: shop.Make, broker_url: str, on_dead: str, on_unknown: str, answer: bool | None
) -> None:
    sink = shop.Sink()
    dispatcher = deployment(make_dispatcher, verifying(answer), sink, on_dead=on_dead, on_unknown=on_unknown)
    chain, delivery = owing(dispatcher)

    ((owed,),) = crash(dispatcher, broker_url, chain, MAX_ATTEMPTS)
    assert owed == [delivery.id, MAX_ATTEMPTS + 1]
    result = shop.attempt(dispatcher, *owed)

    out_of_attempts = {"hold": "dead", "skip": "skipped"}[on_dead]
    expected = {True: "delivered", False: out_of_attempts, None: "held" if on_unknown == "hold" else out_of_attempts}
    assert (result.outcome, shop.delivery_of(dispatcher, chain).status) == (expected[answer], expected[answer])
    assert len(sink) == 0
    assert chain.refresh().state == ("verified" if expected[answer] in ("delivered", "skipped") else NEW)
    assert shop.actions(chain)[-1] == ("state_transition" if chain.state == "verified" else expected[answer])
    shop.assert_consistent(dispatcher)


def test_a_verify_that_raises_after_the_last_attempt_leaves_the_delivery_dead(
    make_dispatcher: shop.Make, broker_url: str
) -> None:
    dispatcher = deployment(make_dispatcher, verifying(OSError("cannot ask")), shop.Sink())
    chain, _ = owing(dispatcher)

    ((owed,),) = crash(dispatcher, broker_url, chain, MAX_ATTEMPTS)

    assert shop.attempt(dispatcher, *owed).outcome == "dead"
    dead = shop.delivery_of(dispatcher, chain)
    assert dead.unknown and "cannot ask" in (dead.last_error or "")


@pytest.mark.parametrize(
    ("on_unknown", "on_dead", "status"),
    [("retry", "hold", "dead"), ("retry", "skip", "skipped"), ("hold", "hold", "held"), ("hold", "skip", "held")],
)
def test_a_verify_that_kills_its_process_is_not_asked_for_ever(
    make_dispatcher: shop.Make, broker_url: str, on_unknown: str, on_dead: str, status: str
) -> None:
    dispatcher = deployment(make_dispatcher, verifying(True), shop.Sink(), on_unknown=on_unknown, on_dead=on_dead)
    chain, _ = owing(dispatcher)

    for number in range(1, MAX_ATTEMPTS + 1):
        assert crash(dispatcher, broker_url, chain, number) == [[[shop.delivery_of(dispatcher, chain).id, number + 1]]]
    assert crash(dispatcher, broker_url, chain, MAX_ATTEMPTS + 1) == []

    assert shop.delivery_of(dispatcher, chain).status == status
    shop.assert_consistent(dispatcher)


# --- a person decides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [Plain, verifying(None)])
def test_a_held_delivery_that_is_retried_is_looked_at_again_and_not_held_again(
    make_dispatcher: shop.Make, broker_url: str, candidate: type[Transition]
) -> None:
    sink = shop.Sink()
    dispatcher = deployment(make_dispatcher, candidate, sink, on_unknown="hold")
    chain, delivery = owing(dispatcher)
    for owed in crash(dispatcher, broker_url, chain, 1):
        shop.attempt(dispatcher, *owed[0])
    held = shop.delivery_of(dispatcher, chain)
    assert (held.status, held.unknown) == ("held", True)

    chain.refresh().retry_delivery("ada")

    again = shop.delivery_of(dispatcher, chain)
    assert (again.attempt, again.unknown) == (held.attempt, False)
    assert again.max_attempts > held.attempt
    assert shop.attempt(dispatcher, delivery, held.attempt + 1).outcome == "delivered"
    assert sink.calls[0].key == delivery.idempotency_key
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize(("answer", "calls"), [(True, 0), (False, 1)])
def test_a_dead_delivery_with_an_unknown_effect_is_verified_when_it_is_retried(
    make_dispatcher: shop.Make, broker_url: str, answer: bool, calls: int
) -> None:
    answers: list[Any] = [OSError("cannot ask"), answer]

    def verify(_: Transition) -> bool:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return bool(given)

    candidate = shop.transition("Asks", "verified", verify=verify, retry=RetryPolicy(max_attempts=1))
    sink = shop.Sink()
    dispatcher = deployment(make_dispatcher, candidate, sink)
    chain, delivery = owing(dispatcher)
    ((owed,),) = crash(dispatcher, broker_url, chain, 1)
    assert shop.attempt(dispatcher, *owed).outcome == "dead"

    chain.refresh().retry_delivery("ada")

    assert shop.attempt(dispatcher, delivery, 3).outcome == "delivered" and len(sink) == calls
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("name", ["cancel", "skip"])
def test_a_held_delivery_can_be_cancelled_or_skipped(make_dispatcher: shop.Make, broker_url: str, name: str) -> None:
    sink = shop.Sink()
    dispatcher = deployment(make_dispatcher, Plain, sink, on_unknown="hold")
    chain, delivery = owing(dispatcher)
    crash(dispatcher, broker_url, chain, 1)

    if name == "cancel":
        chain.refresh().cancel_delivery("ada", "the customer has not got it")
        assert shop.planned(dispatcher, chain).idempotency_key == delivery.idempotency_key, (
            "whoever got it knows the key"
        )
    else:
        chain.refresh().skip_delivery("ada", "the customer got it")
        assert chain.state == "verified"
    assert len(sink) == 0
    shop.assert_consistent(dispatcher)


# --- out of attempts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("mail server is down"), PermanentFailure("no such address")])
def test_on_dead_skip_moves_on_and_says_so(make_dispatcher: shop.Make, error: Exception) -> None:
    sink = shop.Sink(shop.Raises(error))
    dispatcher = deployment(make_dispatcher, Plain, sink, on_dead="skip")
    chain, delivery = owing(dispatcher)
    number = 1
    while shop.attempt(dispatcher, delivery, number).outcome == "retrying":
        shop.wait_over(dispatcher, delivery)
        number += 1

    assert number == (1 if isinstance(error, PermanentFailure) else MAX_ATTEMPTS)
    assert chain.refresh().state == "verified" and chain.due_at is not None
    skipped = chain.events[-2]
    assert skipped.action == "skipped" and "out of attempts" in skipped.detail and str(error) in skipped.detail
    shop.assert_consistent(dispatcher)


# --- what the relay cannot settle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, MAX_ATTEMPTS])
def test_a_crash_in_a_transition_that_this_process_does_not_know_is_left_to_one_that_does(
    make_dispatcher: shop.Make, broker_url: str, attempts: int
) -> None:
    """An old worker's relay cannot know that the new code can verify, and must not hold what can be asked."""
    sink = shop.Sink()
    new = deployment(make_dispatcher, verifying(True), sink, on_unknown="hold")
    old = make_dispatcher(shop.cart({NEW: [shop.Never], "verified": [shop.Never]}, callback=sink, on_unknown="hold"))
    chain, delivery = owing(new)

    assert crash(old, broker_url, chain, attempts) == []

    again = shop.delivery_of(new, chain)
    assert (again.status, again.unknown) == ("pending", True)
    assert shop.attempt(old, delivery, attempts + 1).outcome == "unknown_definition"
    shop.wait_over(new, delivery)
    assert shop.attempt(new, delivery, attempts + 1).outcome == "delivered" and len(sink) == 0
    shop.assert_consistent(new)


@pytest.mark.parametrize("callback", ["type", "local"])
def test_one_that_no_chain_waits_for_does_not_keep_the_relay_from_the_others(
    make_dispatcher: shop.Make, broker_url: str, callback: str
) -> None:
    dispatcher = deployment(make_dispatcher, Plain, shop.Sink())
    orphan_of, other = shop.new_chain(dispatcher, 1), shop.new_chain(dispatcher, 2)
    orphan, delivery = shop.planned(dispatcher, orphan_of), shop.planned(dispatcher, other)
    for one in (orphan, delivery):
        shop.crashed(dispatcher, one)
    shop.change_delivery(dispatcher, orphan.id, callback=callback)
    shop.change_chain(dispatcher, orphan_of.id, pending_delivery_id=None)

    assert dispatcher.relay()["settled"] == 2

    assert shop.delivery_of(dispatcher, other).status == "pending"
    assert shop.delivery_of(dispatcher, orphan_of).status == "pending", "for the doctor to close"
    assert shop.attempt(dispatcher, orphan, 2).outcome == "stale"


# --- calls in an application's own process ---------------------------------------------------------------------------


def test_a_call_in_process_that_died_is_planned_anew_with_the_same_key(make_dispatcher: shop.Make) -> None:
    gate, sink = shop.Gate(), shop.Sink()
    dispatcher = deployment(make_dispatcher, Plain, sink)
    chain = shop.new_chain(dispatcher)
    with gate.during(lambda: chain.execute(callback=shop.Sink(gate.wait))):
        local = shop.delivery_of(dispatcher, chain)
        shop.change_delivery(dispatcher, local.id, **shop.LAPSED)
        dispatcher.relay()

        anew = shop.planned(dispatcher, chain)
        assert anew.idempotency_key == local.idempotency_key
        assert shop.attempt(dispatcher, anew).outcome == "delivered" and len(sink) == 1

    assert chain.refresh().state == "verified"
    shop.assert_consistent(dispatcher)


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_a_chain_that_an_application_holds_does_not_stop_the_relay(make_dispatcher: shop.Make, broker_url: str) -> None:
    sink = shop.Sink()
    dispatcher, application = (deployment(make_dispatcher, Plain, sink) for _ in range(2))
    held, free, lost = (shop.new_chain(dispatcher, number) for number in range(3))
    owed = {chain.id: shop.planned(dispatcher, chain) for chain in (held, free, lost)}
    for chain in (held, free):
        shop.crashed(dispatcher, owed[chain.id])
    shop.wait_over(dispatcher, owed[lost.id])
    shop.take_messages(broker_url, shop.CALLBACKS)

    with Session(application.database.engine.execution_options(isolation_level="READ COMMITTED")) as session:
        application.enqueue_on_commit(session, shop.CHAIN_TYPE, [("online_booking", "b0")])
        assert dispatcher.relay() == {"relayed": 2, "settled": 1}, "the next attempt of the settled one, too"
        session.commit()

    assert shop.delivery_of(dispatcher, free).unknown and not shop.delivery_of(dispatcher, held).unknown
    assert dispatcher.relay()["settled"] == 1
    shop.assert_consistent(dispatcher)
