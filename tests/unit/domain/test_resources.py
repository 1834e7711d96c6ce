"""Values from applications: what can be stored and sent as JSON, and what is refused with the key that is wrong."""

from typing import Any

import pytest

from dispatcher import NotSerializable
from dispatcher.domain.resources import MAX_JSON_BYTES, MAX_JSON_DEPTH, checked_json


def nested(levels: int, *, lists: bool) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value] if lists else {"a": value, "b": 1}
    return value


@pytest.mark.parametrize("lists", [False, True])
def test_depth_is_bounded(*, lists: bool) -> None:
    fits = {"key": nested(MAX_JSON_DEPTH - 1, lists=lists), "other": []}
    assert checked_json("context", fits) == fits
    with pytest.raises(NotSerializable, match="more than 20 levels deep") as caught:
        checked_json("context", {"fine": 1, "key": nested(MAX_JSON_DEPTH, lists=lists)})
    assert caught.value.key == "key"


@pytest.mark.parametrize("value", [{}, [], [[]], [{}], {"a": []}])
def test_empty_levels_count_as_well(value: Any) -> None:
    assert checked_json("context", {"key": value}) == {"key": value}


def test_size_is_bounded_for_each_key_and_for_all() -> None:
    with pytest.raises(NotSerializable, match="is larger than") as caught:
        checked_json("context", {"small": 1, "large": "x" * MAX_JSON_BYTES})
    assert caught.value.key == "large"
    with pytest.raises(NotSerializable, match="all keys together") as caught:
        checked_json("context", {"a": "x" * 500_000, "b": "x" * 600_000})
    assert caught.value.key == "b"


@pytest.mark.parametrize(
    ("values", "key"),
    [(["a"], ""), ({1: "a"}, "1"), ({"a": object()}, "a"), ({"a": float("nan")}, "a"), ({"a": "\x00"}, "a")],
)
def test_what_is_no_json_is_refused(values: Any, key: str) -> None:
    with pytest.raises(NotSerializable) as caught:
        checked_json("context", values)
    assert caught.value.key == key


def test_nothing_stays_nothing() -> None:
    assert checked_json("context", None) is None
