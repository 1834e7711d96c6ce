"""Rate limits as values, and the decorator that gives one to a callback."""

import functools

import pytest

from dispatcher import rate_limit
from dispatcher.errors import ConfigurationError
from dispatcher.rates import MAX_AMOUNT, RateLimit, limit_of


def send(transition):
    return transition


class Callable:
    def __call__(self, transition):
        return transition


@pytest.mark.parametrize(
    ("rate", "amount", "seconds"),
    [
        ("10/s", 10, 1),
        ("100/m", 100, 60),
        ("5000/h", 5000, 3600),
        ("1/d", 1, 86400),
        (f"{MAX_AMOUNT}/d", MAX_AMOUNT, 86400),
    ],
)
def test_a_rate_is_read_and_shown_as_it_was_written(rate, amount, seconds):
    limit = RateLimit.parse("type/cart", rate)
    assert limit == RateLimit("type/cart", amount, seconds)
    assert str(limit) == rate


@pytest.mark.parametrize(
    "rate",
    [
        *("", "0/s", "-1/s", "1.5/s", "10", "10/min", "10 / s", "10/S", "1000001/d", "99999999/d", "10/s\n", 10, None),
        "\N{ARABIC-INDIC DIGIT ONE}/s",
    ],
)
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(ValueError, match="must be a rate such as"):
        RateLimit.parse("type/cart", rate)


def test_a_decorated_callback_is_the_same_function_with_a_limit():
    decorated = rate_limit("10/s", name="sms")(send)
    try:
        assert decorated is send
        assert limit_of(send) == RateLimit("callback/sms", 10, 1)
    finally:
        del send._dispatcher_rate_limit
    assert limit_of(send) is None


def test_without_a_name_the_function_gives_it():
    @rate_limit("10/s", name="x")
    def inner(transition):
        return transition

    inner.__qualname__ = "send_sms"
    limit = limit_of(rate_limit("100/m")(inner))
    assert limit == RateLimit(f"callback/{__name__}.send_sms", 100, 60)


def test_methods_wrappers_partials_and_objects_may_have_a_limit():
    class Own:
        @rate_limit("10/s", name="own")
        def callback(self):
            return self

    assert limit_of(Own.callback) == limit_of(Own().callback) == RateLimit("callback/own", 10, 1)

    @functools.wraps(Own.callback)
    def wrapper(*args):
        return Own.callback(*args)

    assert limit_of(wrapper) == limit_of(Own.callback)
    partial = rate_limit("10/s", name="partial")(functools.partial(send))
    assert limit_of(partial) == RateLimit("callback/partial", 10, 1)
    assert limit_of(rate_limit("1/s", name="object")(Callable())) == RateLimit("callback/object", 1, 1)


@pytest.mark.parametrize("function", [lambda _: None, functools.partial(send), Callable()])
def test_a_function_without_a_name_of_its_own_has_to_be_given_one(function):
    with pytest.raises(ConfigurationError, match="needs `name=`"):
        rate_limit("10/s")(function)


@pytest.mark.parametrize("name", ["", 7, "a\nb"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(ConfigurationError, match=r"test_rates\.send: the `name` of a rate limit must"):
        rate_limit("10/s", name=name)(send)


def test_a_bad_rate_is_refused_and_the_function_named():
    with pytest.raises(ConfigurationError, match=r"test_rates\.send: a rate limit must be a rate such as"):
        rate_limit("10 per second")(send)


@pytest.mark.parametrize("other", [None, "10/s", 10])
def test_what_a_function_of_another_library_says_is_no_limit(other):
    def task(transition):
        return transition

    task.rate_limit = other  # Celery's tasks have that attribute
    assert limit_of(task) is None
    task._dispatcher_rate_limit = other
    assert limit_of(task) is None
