"""Chooses the callback of a winner from its class, the request and its chain type. Pure."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dispatcher.domain.config import NOT_GIVEN, Callback, ChainType, NoCallbackGiven
from dispatcher.domain.records import Request
from dispatcher.rates import RateLimit, declared_limits
from dispatcher.states import DONE, CallbackKind
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallbackChoice:
    """The callback of a winner. `kind` is what a delivery's row stores; "" means a move without a callback.

    `call` is the function to call, with the transition as its first argument. It is None when nothing is called.
    """

    kind: str
    call: Callback | None


NO_CALLBACK_FOUND: Final = CallbackChoice("missing", None)
MOVE_WITHOUT: Final = CallbackChoice("", None)


@dataclass(frozen=True, slots=True)
class LocalCall:
    """The callback and kwargs that an application passes to `execute()`. They are never serialised."""

    callback: Callback | None
    kwargs: Mapping[str, Any]


def choose_callback(chain_type: ChainType, transition: type[Transition], requested: str | None) -> CallbackChoice:
    """The callback for `transition`: its method, else the callback that the request names, else the chain type's.

    Gives `MOVE_WITHOUT` for DONE and where the transition or the chain type has `callback = None`, and
    `NO_CALLBACK_FOUND` where there is no callback at all. Raises `KeyError` with the name when the request names a
    callback that this configuration does not register.
    """
    if transition.final_state == DONE:
        return MOVE_WITHOUT
    method = getattr(transition, "callback", NOT_GIVEN)
    if method is None:
        return MOVE_WITHOUT
    if method is not NOT_GIVEN:
        return CallbackChoice(CallbackKind.OWN, _call_method)
    if requested is not None:
        return CallbackChoice(f"{CallbackKind.NAMED}:{requested}", chain_type.callbacks[requested])
    if isinstance(chain_type.callback, NoCallbackGiven):
        return NO_CALLBACK_FOUND
    if chain_type.callback is None:
        return MOVE_WITHOUT
    return CallbackChoice(CallbackKind.TYPE, chain_type.callback)


def choose_for(chain_type: ChainType, winner: Transition, asked: Request, call: LocalCall | None) -> CallbackChoice:
    """The callback of a winner; with `call`, the callback of an in-process execution (see `choose_local`)."""
    if call is None:
        return choose_callback(chain_type, type(winner), asked.callback)
    return choose_local(chain_type, winner, call)


def choose_local(chain_type: ChainType, winner: Transition, call: LocalCall) -> CallbackChoice:
    """The callback of a winner in an in-process execution.

    `kind` is `local` for every callback, and "" for a move without one. Where there is no callback at all the chain
    moves without one, and a warning is logged.
    """
    choice = choose_callback(chain_type, type(winner), None)
    if choice.kind == CallbackKind.OWN:
        return CallbackChoice(CallbackKind.LOCAL, choice.call)
    wants_none = getattr(winner, "callback", choice) is None
    if call.callback is not None and winner.final_state != DONE and not wants_none:
        return CallbackChoice(CallbackKind.LOCAL, call.callback)
    if choice is NO_CALLBACK_FOUND:
        emit(
            logger,
            Action.MOVED_WITHOUT_CALLBACK,
            "chain %s: no callback is configured for %s, so it moves without one",
            winner.chain.id,
            winner,
            chain_id=winner.chain.id,
        )
        return CallbackChoice("", None)
    return CallbackChoice(CallbackKind.LOCAL if choice.kind else "", choice.call)


def resolve_callback(chain_type: ChainType, transition: type[Transition], kind: str) -> Callback:
    """The function that `kind` in a delivery's row stands for; `KeyError` when this configuration has none."""
    if kind == CallbackKind.OWN and callable(getattr(transition, "callback", None)):
        return _call_method
    if kind == CallbackKind.TYPE and callable(chain_type.callback):
        return chain_type.callback
    name = kind.removeprefix(f"{CallbackKind.NAMED}:")
    if name != kind:
        return chain_type.callbacks[name]
    raise KeyError(kind)


def limits_of(chain_type: ChainType, transition: type[Transition], kind: str) -> tuple[RateLimit, ...]:
    """The rate limits of a delivery: that of its chain type, then its callback's. `kind` is from the delivery's row."""
    is_method = kind == CallbackKind.OWN
    function = transition.callback if is_method else resolve_callback(chain_type, transition, kind)
    of_type = () if chain_type.rate is None else (chain_type.rate,)
    return (*of_type, *declared_limits(function))


def _call_method(transition: Transition, **callback_kwargs: Any) -> Any:
    method = transition.callback
    assert method is not None  # resolve_callback and choose_callback have checked it
    return method(**callback_kwargs)
