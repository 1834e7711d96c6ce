"""Keyed limits: so many deliveries for each key, whatever the number of their attempts."""

import pytest
import redis

from dispatcher import rate_limit
from dispatcher.coordination.local_counter import LocalCounter
from dispatcher.rates import Asked, RateLimit, asked_of, declared_limits
from tests.integration import shop
from tests.integration.coordination.conftest import Counting, Make

pytestmark = pytest.mark.integration

DAY = 86400
ONCE = RateLimit.parse("key/mail", "1/d", key=lambda transition: transition)
THRICE = RateLimit.parse("key/mail", "3/d", key=lambda transition: transition)
ALL = RateLimit.parse("type/cart", "3/h")
ADA, BOB = Asked(ONCE, "ada"), Asked(ONCE, "bob")


def test_each_key_has_a_limit_of_its_own(counting: Counting) -> None:
    assert counting.count(ADA, delivery="d1") is None
    assert counting.count(BOB, delivery="d2") is None

    refusal = counting.count(ADA, delivery="d3")

    assert refusal is not None and refusal.reason == "rate limit 1/d of its key"
    assert "ada" not in refusal.reason


def test_a_refused_call_waits_until_there_is_room_and_has_no_place(counting: Counting) -> None:
    asked = Asked(THRICE, "ada")
    for number in range(3):
        assert counting.count(asked, delivery=f"d{number}") is None
        counting.wait(3600)

    refusals = [counting.count(asked, delivery=f"n{number}", has_place=True) for number in range(50)]

    assert {refusal.has_place for refusal in refusals if refusal} == {False}
    assert {round(refusal.seconds, 2) for refusal in refusals if refusal} == {DAY - 3 * 3600}, "there is no line"
    counting.wait(DAY - 3 * 3600 - 1)
    assert counting.count(asked, delivery="n1") is not None
    counting.wait(1.1)
    assert counting.count(asked, delivery="n1") is None
    assert counting.count(asked, delivery="n2") is not None


def test_a_further_attempt_of_a_counted_delivery_is_not_refused_and_not_counted_again(counting: Counting) -> None:
    asked = Asked(THRICE, "ada")
    for delivery in ("d1", "d1", "d2", "d1", "d3", "d1", "d2", "d3"):
        assert counting.count(asked, delivery=delivery) is None
    assert counting.count(asked, delivery="d4") is not None
    assert counting.count(asked, delivery="d3") is None


def test_no_window_has_more_deliveries_than_the_limit_when_attempts_fail(counting: Counting) -> None:
    """A late further attempt is a call, too: the next delivery waits a whole window from then."""
    assert counting.count(ADA, delivery="d1") is None
    counting.wait(0.9 * DAY)
    assert counting.count(ADA, delivery="d1") is None
    counting.wait(0.2 * DAY)
    refusal = counting.count(ADA, delivery="d2")
    assert refusal is not None and refusal.seconds == pytest.approx(0.8 * DAY, abs=0.01)
    counting.wait(0.9 * DAY)
    assert counting.count(ADA, delivery="d2") is None
    refused = counting.count(ADA, delivery="d1")
    assert refused is not None, "it is no longer counted, so it is asked like another"


def test_a_delivery_that_is_tried_again_keeps_no_other_in_the_window(counting: Counting) -> None:
    asked = Asked(THRICE, "ada")
    for delivery, wait in (("d1", 0.1), ("d2", 0.8), ("d1", 0.3)):
        assert counting.count(asked, delivery=delivery) is None
        counting.wait(wait * DAY)
    assert counting.allowed(asked, times=3) == 2


def test_the_same_delivery_counts_for_other_limits_each_time(counting: Counting) -> None:
    """An unkeyed limit counts calls."""
    answers = [counting.count(ALL, ADA, delivery="d1", has_place=True) for _ in range(4)]
    assert [answer is None for answer in answers] == [True, True, True, False]
    assert answers[3] is not None and answers[3].reason == "rate limit 3/h"


def test_a_refusal_by_one_limit_counts_nothing_at_another(counting: Counting) -> None:
    assert counting.count(ALL, ADA, delivery="d1") is None
    for _ in range(5):
        refusal = counting.count(ALL, ADA, delivery="d2")
        assert refusal is not None and not refusal.has_place
    assert counting.allowed(ALL, times=5) == 2

    for _ in range(5):
        assert counting.count(BOB, ALL, delivery="d2", has_place=True) is not None
    assert counting.count(BOB, delivery="d3") is None


def test_a_call_that_its_key_keeps_waiting_takes_no_place_in_a_line(counting: Counting) -> None:
    assert counting.count(ADA, delivery="d1") is None
    assert counting.allowed(ALL, times=3) == 3
    for _ in range(10):
        refusal = counting.count(ALL, ADA, delivery="d2")
        assert refusal is not None and refusal.seconds == pytest.approx(DAY, abs=0.01)
    first = counting.peek(ALL)
    assert first is not None and first.seconds == pytest.approx(3600, abs=0.01)


def test_of_several_keys_the_longest_wait_counts(counting: Counting) -> None:
    hourly = Asked(RateLimit.parse("key/sms", "1/h", key=lambda _: 1), "ada")
    assert counting.count(hourly, ADA, delivery="d1") is None
    refusal = counting.count(hourly, ADA, delivery="d2")
    assert refusal is not None and (refusal.reason, round(refusal.seconds)) == ("rate limit 1/d of its key", DAY)
    counting.wait(DAY + 1)
    assert counting.count(ADA, hourly, delivery="d2") is None


def test_a_peek_asks_no_keyed_limit(counting: Counting) -> None:
    assert counting.count(ADA, delivery="d1") is None
    assert counting.peek(ONCE) is None
    assert counting.peek(ONCE, ALL) is None


def test_a_call_without_a_key_is_not_limited(counting: Counting) -> None:
    assert counting.allowed(Asked(ONCE, None), times=10) == 10
    assert counting.allowed(Asked(ONCE, None), ALL, times=10) == 3


def test_workers_share_the_limit_of_a_key(make_limiter: Make) -> None:
    limiters = [make_limiter() for _ in range(8)]
    answers = shop.at_once(
        *(
            lambda one=one, number=number: one.count([ADA], delivery=f"d{number}", has_place=False)  # type: ignore[misc]
            for number, one in enumerate(limiters)
        )
    )
    assert answers.count(None) == 1


def test_one_name_is_one_limit_for_all_types_and_functions(counting: Counting) -> None:
    """One mail for each customer and day, whatever sends it."""
    functions = [
        rate_limit("1/d", key=lambda transition: transition["customer"], name="mail")(lambda _: None) for _ in range(2)
    ]
    first, second = (asked_of(declared_limits(function), {"customer": 4711}) for function in functions)
    assert counting.count(*first, delivery="d1") is None
    assert counting.count(*second, delivery="d2") is not None


def test_keys_are_hashed_and_end_by_themselves(make_limiter: Make, redis_url: str) -> None:
    limiter = make_limiter()
    keys = ["ada@example.org", "Zähler 📮", "\ud800", "a\0b", "", "x" * 200]
    for key in keys:
        assert limiter.count([Asked(ONCE, key)], delivery="d1", has_place=False) is None
        assert limiter.count([Asked(ONCE, key)], delivery="d2", has_place=False) is not None

    found = sorted(shop.dump_keys(redis_url))
    with redis.Redis.from_url(redis_url) as client:
        assert all((DAY - 10) * 1000 < client.pttl(key) <= (DAY + 1) * 1000 for key in found)
    assert len(found) == len(keys)
    assert all(key.startswith(b"test:rate:calls/key/mail/1/d/") and len(key) == 29 + 64 for key in found)
    assert b"ada" not in b"".join(found)


def test_a_process_on_its_own_forgets_keys_whose_window_is_over(
    monkeypatch: pytest.MonkeyPatch, make_limiter: Make
) -> None:
    """A customer comes once: memory is bounded by the keys of one window, not by all there ever were."""
    now = 1000.0
    monkeypatch.setattr("dispatcher.coordination.local_counter.time.monotonic", lambda: now)
    limiter = make_limiter(None)
    counter: LocalCounter = limiter._local
    sizes = []
    for day in range(10):
        for number in range(5000):
            key = Asked(ONCE, f"{day} {number}")
            assert limiter.count([key], delivery="d1", has_place=False) is None
        now += DAY + 1
        sizes.append(len(counter._windows))

    assert max(sizes) <= 2 * 5000 + 1000, "of 50,000"
