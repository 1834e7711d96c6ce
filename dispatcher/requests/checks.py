"""Checks the arguments of an enqueue, and gives the request to store."""

from collections.abc import Mapping
from typing import Any, TypedDict

from dispatcher.domain.config import Callback, ChainType
from dispatcher.domain.records import Request
from dispatcher.domain.resources import checked_json, is_text
from dispatcher.errors import ConfigurationError
from dispatcher.storage.models import MAX_REQUESTED_BY


class Asked(TypedDict):
    """The arguments of an enqueue, with the names of `Dispatcher.enqueue`."""

    initial_context: Mapping[str, Any] | None
    callback: str | Callback | None
    callback_kwargs: Mapping[str, Any] | None
    requested_by: str | None


def checked_request(chain_type: ChainType, asked: Asked) -> Request:
    """The request to store. Raises `NotSerializable`, `ConfigurationError` or `ValueError` for a wrong argument."""
    return Request(
        checked_json("initial_context", asked["initial_context"]),
        registered_name(chain_type, asked["callback"]),
        checked_json("callback_kwargs", asked["callback_kwargs"]),
        checked_requester(asked["requested_by"]),
    )


def registered_name(chain_type: ChainType, callback: str | Callback | None) -> str | None:
    """The name under which the chain type registers a callback. Raises `ConfigurationError` if it does not."""
    path = f"chain type {chain_type.chain_type!r}"
    if callback is None:
        return None
    if isinstance(callback, str):
        if callback not in chain_type.callbacks:
            names = ", ".join(map(repr, chain_type.callbacks)) or "none"
            raise ConfigurationError(f"no callback is registered as {callback!r} (registered: {names})", path)
        return callback
    for name, function in chain_type.callbacks.items():
        if function is callback:
            return name
    name = getattr(callback, "__name__", "")
    if not name.isidentifier():
        name = "a_name"
    raise ConfigurationError(
        f'another process cannot find this function: register it as "callbacks": {{{name!r}: <function>}} '
        f"and enqueue with callback={name!r}",
        path,
    )


def checked_requester(requested_by: str | None) -> str | None:
    """`requested_by`, if it is text that fits its column. Raises `ValueError` otherwise."""
    if requested_by is None:
        return None
    if not isinstance(requested_by, str) or len(requested_by) > MAX_REQUESTED_BY or not is_text(requested_by):
        raise ConfigurationError(f"must be text of at most {MAX_REQUESTED_BY} characters", "requested_by")
    return requested_by
