"""Values from user code, made safe to store, to log and to send: bounded, printable, and never raising."""

import inspect
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice
from typing import Final

from dispatcher.errors import ends_process

MAX_REASONS: Final = 50
"""How many reasons of one candidate are kept."""

MAX_REASON: Final = 500
"""The longest reason, in characters."""

MAX_ERROR: Final = 2000
"""The longest description of an error, in characters; storage cuts at the same length."""

EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The range of moments that every database can store, whatever its time zone."""

_HARMLESS: Final = "\n\t\u200c\u200d"
"""Not printable to Python, but part of texts: line breaks, and the joiners of Persian and of emoji."""


def safe_text(value: object, limit: int) -> str:
    """The text of any value, at most `limit` characters, with control characters escaped.

    A value whose `str()` raises, or gives no string, is described instead.
    """
    try:
        text = value if type(value) is str else str(value)
    except BaseException as error:
        if ends_process(error):
            raise
        return f"<{type(value).__name__}, whose text raises {type(error).__name__}>"[:limit]
    return bounded_text(text, limit)


def bounded_text(text: str, limit: int) -> str:
    """At most `limit` characters of a text, with control characters escaped."""
    if len(text) <= limit and text.isprintable():
        return text
    cut = text[: limit + 1]
    if not cut.isprintable():
        cut = "".join(map(_printable, cut))
    return cut if len(cut) <= limit else f"{cut[: limit - 1]}\u2026"


def safe_reasons(reasons: Iterable[object]) -> tuple[str, ...]:
    """The first reasons of a candidate as texts; a last line says that there are more. Raises what a text raises."""
    if reasons == []:  # nearly always, for a winner
        return ()
    texts = [bounded_text(str(reason), MAX_REASON) for reason in islice(reasons, MAX_REASONS + 1)]
    if len(texts) > MAX_REASONS:
        texts[MAX_REASONS:] = [f"... more than {MAX_REASONS} reasons"]
    return tuple(texts)


def describe(error: BaseException) -> str:
    """An error as a row keeps it: its type and its text."""
    return safe_text(f"{type(error).__name__}: {safe_text(error, MAX_ERROR)}", MAX_ERROR)


def bounded(moment: datetime) -> datetime:
    """`moment`, or the nearest moment that every database can store. `TypeError` for one that has no place in time.

    (pandas' `NaT` is a datetime to Python, but is neither before nor after any other.)
    """
    if EARLIEST <= moment <= LATEST:
        return moment
    found = min(max(moment, EARLIEST), LATEST)
    if not EARLIEST <= found <= LATEST:
        raise TypeError(f"{safe_text(repr(moment), 150)} is no moment")
    return found


def refuse_unstarted(value: object, what: str) -> None:
    """Raise `TypeError` for a coroutine or a generator: nothing runs it, so its code has not even begun."""
    if value is None or type(value) is bool:
        return
    if inspect.iscoroutine(value):
        value.close()  # or Python would warn that it was never awaited
        raise TypeError(f"{what} gave a coroutine, which nothing awaits")
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        raise TypeError(f"{what} gave a generator, which nothing iterates: it must not contain `yield`")


def refuse_awaitable(value: object, what: str) -> None:
    """Raise `TypeError` for an answer that would have to be awaited or iterated first: it is always truthy."""
    refuse_unstarted(value, what)
    if inspect.isawaitable(value):
        raise TypeError(f"{what} gave an awaitable, which nothing awaits")


def _printable(character: str) -> str:
    if character.isprintable() or character in _HARMLESS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")
