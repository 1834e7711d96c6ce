"""Checks resources and other values from outside, and gives the form in which they are stored."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from dispatcher.errors import InvalidResource, NotSerializable

Resource = tuple[str, str]
"""A `(resource_type, resource_id)` pair."""

MAX_JSON_DEPTH: Final = 20
"""How many levels of objects and lists a context or kwargs may have."""

MAX_JSON_BYTES: Final = 1_000_000
"""How long the JSON of a context or of kwargs may be, in bytes."""

MAX_RESOURCE_TYPE: Final = 100
MAX_RESOURCE_ID: Final = 255


def clean_resources(rsc_mappings: Iterable[Any]) -> tuple[Resource, ...]:
    """The sorted distinct `(resource_type, resource_id)` pairs. Raises `InvalidResource`, which shows the bad pair."""
    if isinstance(rsc_mappings, str | bytes) or not isinstance(rsc_mappings, Iterable):
        raise InvalidResource("resources must be a list of (type, id) pairs", _show(rsc_mappings))
    pairs = set()
    for pair in rsc_mappings:
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:  # noqa: PLR2004 - a pair
            raise InvalidResource("a resource must be a (type, id) pair", _show(pair))
        for value, what, limit in zip(
            pair, ("resource type", "resource id"), (MAX_RESOURCE_TYPE, MAX_RESOURCE_ID), strict=True
        ):
            if not isinstance(value, str) or not value:
                raise InvalidResource(f"a {what} must be a non-empty string", _show(pair))
            if len(value) > limit:
                raise InvalidResource(f"a {what} must have at most {limit} characters", _show(pair))
            if not is_text(value):
                raise InvalidResource(f"a {what} must be text without NUL or lone surrogates", _show(pair))
        pairs.add((pair[0], pair[1]))
    if not pairs:
        raise InvalidResource("a chain needs at least one resource", "[]")
    return tuple(sorted(pairs))


def resource_key(resources: Sequence[Resource]) -> str:
    """The SHA-256 (hex) of the canonical JSON of the sorted distinct pairs."""
    canonical = json.dumps(sorted(set(resources)), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def checked_json(what: str, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`values` as a plain JSON object. Raises `NotSerializable`, which names the key whose value is not JSON."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise NotSerializable(what, "", f"must be a dict, not {type(values).__name__}")
    checked = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise NotSerializable(what, _show(key), "keys must be strings")
        try:
            text = json.dumps(value, allow_nan=False)
            checked[key] = json.loads(text)
        except RecursionError as error:
            raise NotSerializable(what, key, f"is more than {MAX_JSON_DEPTH} levels deep") from error
        except (TypeError, ValueError) as error:
            raise NotSerializable(what, key, str(error)) from error
        if len(text) > MAX_JSON_BYTES:
            raise NotSerializable(what, key, f"is larger than {MAX_JSON_BYTES:,} bytes")
        if depth_of(checked[key]) >= MAX_JSON_DEPTH:
            raise NotSerializable(what, key, f"is more than {MAX_JSON_DEPTH} levels deep")
        if "\\u0000" in text or not is_text(json.dumps({key: checked[key]}, ensure_ascii=False)):
            raise NotSerializable(what, key, "text must not contain NUL or lone surrogates")
    if sum(len(json.dumps(value)) for value in checked.values()) > MAX_JSON_BYTES:
        largest = max(checked, key=lambda key: len(json.dumps(checked[key])))
        raise NotSerializable(what, largest, f"all keys together are larger than {MAX_JSON_BYTES:,} bytes")
    return checked


def same_json(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: 2 equals 2.0, but not True; the order of an object's keys does not matter."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def depth_of(value: Any) -> int:
    """How many objects and lists lie in each other at the deepest place; 0 for a number or a text."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values() or [None]
    return (value or [None]) if isinstance(value, list) else []


def is_text(text: str) -> bool:
    """Whether every database can store this text: it has no NUL and no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


def _show(value: object) -> str:
    return repr(value)[:200]
