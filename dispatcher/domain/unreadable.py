"""What a record holds where a row's JSON cannot be used: whoever uses the value gets an error, not an empty value."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

from dispatcher.bounds import describe
from dispatcher.domain.resources import depth_of
from dispatcher.errors import UnreadableRow

MAX_READ_DEPTH: Final = 100
"""How many levels the JSON of a row may have: more than `MAX_JSON_DEPTH`, because an older version may have stored
more, and few enough to copy such a value without a `RecursionError`."""


class Unreadable(Mapping[str, Any]):
    """Stands for a JSON object that cannot be used. Every use raises `error`."""

    __slots__ = ("error",)

    def __init__(self, error: UnreadableRow) -> None:
        self.error = error

    def __getitem__(self, key: str) -> NoReturn:
        raise self.error

    def __iter__(self) -> Iterator[str]:
        raise self.error

    def __len__(self) -> int:
        raise self.error


def json_object(text: Any, column: str) -> Mapping[str, Any] | None:
    """The JSON object in the text of a column, or None for NULL; `Unreadable` where there is no usable object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:  # SQLite keeps a number as a number
        return Unreadable(UnreadableRow(column, describe(error)))
    if value is None:
        return None
    if not isinstance(value, dict):
        return Unreadable(UnreadableRow(column, f"it is not an object but a {type(value).__name__}"))
    # Counting brackets is quick. Where there are few, the object cannot be deep.
    if text.count("{") + text.count("[") > MAX_READ_DEPTH and depth_of(value) > MAX_READ_DEPTH:
        return Unreadable(UnreadableRow(column, f"it is more than {MAX_READ_DEPTH} levels deep"))
    return value


def unreadable(*values: Mapping[str, Any] | None) -> UnreadableRow | None:
    """The error of the first of these values that cannot be read, or None."""
    for value in values:
        if isinstance(value, Unreadable):
            return value.error
    return None
