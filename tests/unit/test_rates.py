"""Rate limits as values, the decorator that gives them to a callback, and the keys of calls."""

import enum
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher import rate_limit
from dispatcher.errors import ConfigurationError
from dispatcher.rates import MAX_AMOUNT, MAX_KEY, Asked, RateLimit, asked_of, declared_limits, key_of


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
        assert declared_limits(send) == (RateLimit("callback/sms", 10, 1),)
    finally:
        del send._dispatcher_rate_limits
    assert declared_limits(send) == ()


def test_without_a_name_the_function_gives_it():
    @rate_limit("10/s", name="x")
    def inner(transition):
        return transition

    inner.__qualname__ = "send_sms"
    limits = declared_limits(rate_limit("100/m")(inner))
    assert limits == (RateLimit(f"callback/{__name__}.send_sms", 100, 60), RateLimit("callback/x", 10, 1))


def test_methods_wrappers_partials_and_objects_may_have_a_limit():
    class Own:
        @rate_limit("10/s", name="own")
        def callback(self):
            return self

    assert declared_limits(Own.callback) == declared_limits(Own().callback) == (RateLimit("callback/own", 10, 1),)

    @functools.wraps(Own.callback)
    def wrapper(*args):
        return Own.callback(*args)

    assert declared_limits(wrapper) == declared_limits(Own.callback)
    assert len(declared_limits(rate_limit("1/d", name="more")(wrapper))) == 2
    assert len(declared_limits(Own.callback)) == 1
    partial = rate_limit("10/s", name="partial")(functools.partial(send))
    assert declared_limits(partial) == (RateLimit("callback/partial", 10, 1),)
    assert declared_limits(rate_limit("1/s", name="object")(Callable())) == (RateLimit("callback/object", 1, 1),)


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


@pytest.mark.parametrize("other", [None, "10/s", 10, (), ("10/s",)])
def test_what_a_function_of_another_library_says_is_no_limit(other):
    def task(transition):
        return transition

    task.rate_limit = other  # Celery's tasks have that attribute
    assert declared_limits(task) == ()
    task._dispatcher_rate_limits = other
    assert declared_limits(task) == ()


# --- several limits, and keys ----------------------------------------------------------------------------------------


def customer(transition):
    return transition["customer"]


def household(transition):
    return transition["household"]


def function(transition):
    return transition


def keyed(key):
    """A limit with this function of keys."""
    return RateLimit.parse("key/mail", "1/d", key=key)


def test_a_callback_may_have_several_limits():
    @rate_limit("10/s", name="mail")
    @rate_limit("1000/d", name="mail")
    @rate_limit("1/d", key=customer, name="mail")
    def send_mail(transition):
        return transition

    limits = declared_limits(send_mail)
    assert limits == (
        RateLimit("callback/mail", 10, 1),
        RateLimit("callback/mail", 1000, 86400),
        RateLimit("key/mail", 1, 86400),
    )
    assert [limit.key for limit in limits] == [None, None, customer]


def test_a_limit_that_is_set_twice_counts_once():
    @rate_limit("1/d", key=customer, name="mail")
    @rate_limit("1/d", key=customer, name="mail")
    def send_mail(transition):
        return transition

    assert declared_limits(send_mail) == (RateLimit("key/mail", 1, 86400),)


def test_two_keys_under_one_name_and_rate_are_refused():
    once = rate_limit("1/d", key=customer, name="mail")(lambda transition: transition)
    with pytest.raises(ConfigurationError, match="two rate limits with different keys need different names"):
        rate_limit("1/d", key=household, name="mail")(once)
    assert len(declared_limits(rate_limit("1/d", key=household, name="household")(once))) == 2


def test_limits_that_two_functions_share_are_equal_whatever_gives_their_keys():
    assert keyed(customer) == keyed(household) and hash(keyed(customer)) == hash(keyed(household))


@pytest.mark.parametrize("key", ["customer", 7, ()])
def test_a_key_that_is_no_function_is_refused(key):
    with pytest.raises(ConfigurationError, match=r"test_rates\.function: the `key` of a rate limit must be a function"):
        rate_limit("1/d", key=key)(function)


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "another"


class Number(enum.IntEnum):
    SEVEN = 7

    def __str__(self):
        return "another"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("ada", "ada"), ("", ""), (7, "7"), (-7, "-7"), (0, "0"), ("x" * MAX_KEY, "x" * MAX_KEY), (None, None)),
        (10 ** (MAX_KEY - 1), "1" + "0" * (MAX_KEY - 1)),
        *((Text("ada"), "ada"), (Number.SEVEN, "7"), (enum.StrEnum("Word", ["ADA"]).ADA, "ada")),
    ],
)
def test_text_and_numbers_are_keys(key, text):
    assert key_of(keyed(lambda _: key), None) == text


def test_a_limit_without_keys_has_none():
    assert key_of(RateLimit.parse("type/cart", "1/d"), {"customer": 4711}) is None


@pytest.mark.parametrize("key", [True, 1.5, b"ada", ["ada"], object(), lambda: "ada"])
def test_what_is_no_key_is_refused_and_the_limit_named(key):
    with pytest.raises(
        ValueError, match=r"'key/mail' must be text or a whole number, not (bool|float|bytes|list|ob|fu)"
    ):
        key_of(keyed(lambda _: key), None)


@pytest.mark.parametrize("key", ["x" * (MAX_KEY + 1), 10**MAX_KEY, -(10**MAX_KEY), 10**5000], ids=range(4))
def test_a_key_that_is_too_long_is_refused_and_the_limit_named(key):
    with pytest.raises(ValueError, match="'key/mail' is longer than 200 characters"):
        key_of(keyed(lambda _: key), None)


@given(st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.binary(), st.booleans()))
def test_a_key_is_text_or_none_or_an_error(key):
    try:
        text = key_of(keyed(lambda _: key), None)
    except ValueError:
        return
    assert (text is None) == (key is None) and (text is None or text == str(key))


def test_what_a_key_function_raises_is_not_hidden():
    with pytest.raises(KeyError):
        key_of(keyed(customer), {})


def test_a_call_is_asked_about_the_limits_that_hold_for_it():
    free = RateLimit.parse("type/cart", "1/d")
    limits = (free, keyed(customer), keyed(household))
    assert asked_of(limits, {"customer": 4711, "household": None}) == (Asked(free), Asked(keyed(customer), "4711"))
