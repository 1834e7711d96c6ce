"""What a row's JSON becomes: an object, nothing, or a value that nobody can use by mistake."""

import copy
import json

import pytest

from dispatcher.domain.records import Request
from dispatcher.domain.unreadable import MAX_READ_DEPTH, Unreadable, json_object, unreadable
from dispatcher.errors import UnreadableRow


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("text", [None, "null"])
def test_null_is_nothing(text: str | None) -> None:
    assert json_object(text, "context") is None


@pytest.mark.parametrize("value", [{}, {"a": [1, {"b": None}]}, {str(n): [] for n in range(1000)}])
def test_an_object_is_itself(value: object) -> None:
    assert json_object(json.dumps(value), "context") == value


def test_an_object_may_be_as_deep_as_the_limit() -> None:
    assert json_object(nested(MAX_READ_DEPTH), "context") == json.loads(nested(MAX_READ_DEPTH))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no JSON", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[1]", "not an object but a list"),
        ("5", "not an object but a int"),
        (5, "TypeError"),
        (nested(MAX_READ_DEPTH + 1), "more than 100 levels deep"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "RecursionError"),
    ],
)
def test_what_is_no_usable_object_raises_wherever_it_is_used(text: object, problem: str) -> None:
    value = json_object(text, "context")
    assert isinstance(value, Unreadable)
    for use in (
        dict,
        len,
        bool,
        list,
        lambda it: it["a"],
        lambda it: it.get("a"),
        lambda it: {**it},
        copy.copy(value).get,
    ):
        with pytest.raises(UnreadableRow, match=f"the row's context cannot be read: .*{problem}"):
            use(value)


def test_a_request_that_cannot_be_read_is_one_all_the_same() -> None:
    value = json_object("[1]", "request")
    request = Request.from_json(value)
    assert request is not None and request.callback is None
    assert unreadable(None, {}, request.context) is value.error  # type: ignore[union-attr]
    assert unreadable(request.kwargs) is not None


def test_readable_values_have_no_error() -> None:
    assert unreadable(None, {}, {"a": 1}) is None
