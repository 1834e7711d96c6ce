"""Log events: `emit` writes a log line with its `extra`, and calls the listeners (metrics, traces)."""

import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

from dispatcher.bounds import safe_text
from dispatcher.errors import ends_process

_logger = logging.getLogger(__name__)

_MAX_ERROR_TEXT: Final = 4_000
_MAX_TRACEBACK: Final = 20_000


class Action(StrEnum):
    """What happened, in a log line of level INFO or above. `docs/reference/logging.md` explains each action."""

    ATTEMPT_CANCELLED = "attempt_cancelled"
    ATTEMPT_DEAD = "attempt_dead"
    ATTEMPT_DEFERRED = "attempt_deferred"
    ATTEMPT_DELIVERED = "attempt_delivered"
    ATTEMPT_DISABLED = "attempt_disabled"
    ATTEMPT_FAILED = "attempt_failed"
    ATTEMPT_HELD = "attempt_held"
    ATTEMPT_MISSING = "attempt_missing"
    ATTEMPT_RETRYING = "attempt_retrying"
    ATTEMPT_SKIPPED = "attempt_skipped"
    ATTEMPT_STALE = "attempt_stale"
    ATTEMPT_UNKNOWN_DEFINITION = "attempt_unknown_definition"
    CALLBACK_IGNORED = "callback_ignored"
    CHAIN_MOVED = "chain_moved"
    CHAINS_NOT_PUBLISHED = "chains_not_published"
    DELIVERIES_NOT_PUBLISHED = "deliveries_not_published"
    DELIVERY_PLANNED = "delivery_planned"
    DRY_RUN = "dry_run"
    DRY_RUN_FAILED = "dry_run_failed"
    END_NOT_RECORDED = "end_not_recorded"
    ENQUEUE_ON_COMMIT_FAILED = "enqueue_on_commit_failed"
    FINISH_FAILED = "finish_failed"
    GUARD_FAILED = "guard_failed"
    LEASES_NOT_RENEWED = "leases_not_renewed"
    LOCK_SERVER_AWAY = "lock_server_away"
    MOVED_WITHOUT_CALLBACK = "moved_without_callback"
    NO_CALLBACK = "no_callback"
    ORPHAN_DELIVERY = "orphan_delivery"
    PRUNED = "pruned"
    QUEUE_FULL = "queue_full"
    RATE_LIMIT_ALONE = "rate_limit_alone"
    RATE_LIMIT_SERVER_AWAY = "rate_limit_server_away"
    RELAYED = "relayed"
    REPAIRED = "repaired"
    REQUEST_NOT_PUBLISHED = "request_not_published"
    RESOURCE_ERASED = "resource_erased"
    REST_IGNORED = "rest_ignored"
    RETRY_DELAY_IGNORED = "retry_delay_ignored"
    SETTLE_FAILED = "settle_failed"
    STATE_WOKEN = "state_woken"
    SWEPT = "swept"
    TASK_FAILED = "task_failed"
    TICK_AHEAD = "tick_ahead"
    TIME_ZONE_UNKNOWN = "time_zone_unknown"
    TYPE_PAUSED = "type_paused"
    UNKNOWN_DEFINITION = "unknown_definition"
    UNKNOWN_PAGE = "unknown_page"
    WAITS_BEGUN_ANEW = "waits_begun_anew"


ERRORS: Final = frozenset(
    {
        Action.ATTEMPT_DEAD,
        Action.ATTEMPT_HELD,
        Action.DRY_RUN_FAILED,
        Action.END_NOT_RECORDED,
        Action.ENQUEUE_ON_COMMIT_FAILED,
        Action.GUARD_FAILED,
        Action.ORPHAN_DELIVERY,
        Action.REST_IGNORED,
        Action.RETRY_DELAY_IGNORED,
        Action.SETTLE_FAILED,
        Action.TASK_FAILED,
        Action.TYPE_PAUSED,
    }
)
"""The actions after which a person must act: level ERROR."""

WARNINGS: Final = frozenset(
    {
        Action.ATTEMPT_FAILED,
        Action.ATTEMPT_UNKNOWN_DEFINITION,
        Action.CALLBACK_IGNORED,
        Action.CHAINS_NOT_PUBLISHED,
        Action.DELIVERIES_NOT_PUBLISHED,
        Action.FINISH_FAILED,
        Action.LEASES_NOT_RENEWED,
        Action.LOCK_SERVER_AWAY,
        Action.MOVED_WITHOUT_CALLBACK,
        Action.NO_CALLBACK,
        Action.QUEUE_FULL,
        Action.RATE_LIMIT_ALONE,
        Action.RATE_LIMIT_SERVER_AWAY,
        Action.REPAIRED,
        Action.REQUEST_NOT_PUBLISHED,
        Action.TICK_AHEAD,
        Action.TIME_ZONE_UNKNOWN,
        Action.UNKNOWN_DEFINITION,
        Action.UNKNOWN_PAGE,
        Action.WAITS_BEGUN_ANEW,
    }
)
"""The actions that the library retries or repairs by itself: level WARNING. All other actions are INFO."""


@dataclass(frozen=True, slots=True)
class LogEvent:
    """What a listener gets: the action, its level (of `logging`), the facts of its `extra`, and the error, if any."""

    action: Action
    level: int
    facts: Mapping[str, Any]
    error: BaseException | None = None


Listener: TypeAlias = Callable[[LogEvent], None]

_listeners: list[Listener] = []


def level_of(action: Action) -> int:
    """The level of `logging` at which an action is logged."""
    if action in ERRORS:
        return logging.ERROR
    return logging.WARNING if action in WARNINGS else logging.INFO


def emit(
    logger: logging.Logger,
    action: Action,
    message: str,
    *arguments: object,
    error: BaseException | None = None,
    level: int | None = None,
    **facts: Any,
) -> None:
    """Log `message % arguments` with `extra={"action": action, **facts}`, and call every listener.

    `error` is logged with its traceback. `level` replaces the level of the action, if it is less important this time.
    """
    level = level_of(action) if level is None else level
    if logger.isEnabledFor(level):
        shown = None if error is None else _bounded(error)
        logger.log(level, message, *arguments, exc_info=shown, extra={"action": action.value, **facts}, stacklevel=2)
    if _listeners:
        event = LogEvent(action, level, facts, error)
        for listener in tuple(_listeners):
            _call(listener, event)


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` with every `LogEvent` of this process, whatever the log level; returns a function that ends this.

    The listener must be quick, because it runs where the event happens, such as in a task or a request. If it raises
    an error, the error is logged.
    """
    _listeners.append(listener)

    def end() -> None:
        if listener in _listeners:
            _listeners.remove(listener)

    return end


def _bounded(error: BaseException) -> BaseException:
    """`error`, or a stand-in where it would be too long for a log.

    First each text is cut, also those of the errors that it came from. If the traceback is still too long, its middle
    is left out.
    """
    shown = _with_short_texts(error)
    text = "".join(traceback.format_exception(shown))
    if len(text) <= _MAX_TRACEBACK:
        return shown
    half = _MAX_TRACEBACK // 2
    left_out = f"\n... {len(text) - 2 * half} characters are left out ...\n"
    return _stand_in(error, f"a long traceback:\n{text[:half]}{left_out}{text[-half:]}")


def _with_short_texts(error: BaseException) -> BaseException:
    """`error`, or stand-ins for it and the errors that it came from, where one of their texts is too long."""
    chain: dict[int, BaseException] = {}  # by identity, because an error may call itself equal to another
    link: BaseException | None = error
    while link is not None and id(link) not in chain:
        chain[id(link)] = link
        link = _origin(link)
    if not any(map(_too_long, chain.values())):
        return error
    origin: BaseException | None = None
    for link in reversed(chain.values()):
        shown = _stand_in(link, safe_text(link, _MAX_ERROR_TEXT)).with_traceback(link.__traceback__)
        shown.__cause__ = origin if link.__cause__ is not None else None
        shown.__context__, shown.__suppress_context__ = origin, link.__suppress_context__
        origin = shown
    assert origin is not None  # the chain has the error itself
    return origin


def _origin(error: BaseException) -> BaseException | None:
    """The error from which this one came, as a traceback shows it."""
    if error.__cause__ is not None or error.__suppress_context__:
        return error.__cause__
    return error.__context__


def _too_long(error: BaseException) -> bool:
    """Whether the text of an error is too long for a log, or raises."""
    try:
        return len(str(error)) > _MAX_ERROR_TEXT
    except BaseException as problem:  # user code: the error's own __str__
        if ends_process(problem):
            raise
        return True


def _stand_in(error: BaseException, text: str) -> BaseException:
    """An error with the name of this error's type and another text."""
    kind = type(error)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    stand_in: BaseException = type(kind.__name__, (Exception,), names)(text)
    return stand_in


def _call(listener: Listener, event: LogEvent) -> None:
    try:
        listener(event)
    except Exception:
        # User code. `emit` is not used here, because it would call the same listener again.
        _logger.exception("a listener failed on %s", event.action, extra={"action": "listener_failed"})
