"""What an error of a database means, decided by its code: psycopg's SQLSTATE, PyMySQL's number, SQLite's result code.

The class of an error says little: a deadlock, a full disk and a wrong password are all an `OperationalError`, and
drivers disagree about the rest.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from dispatcher.errors import ServiceRefused, ServiceUnavailable


class Fault(StrEnum):
    """What an error of a database means for its caller."""

    CONFLICT = "conflict"
    """Rerunning the whole transaction can help: deadlock, serialization failure, busy SQLite."""

    GONE = "gone"
    """The connection cannot be used any more, or none can be made."""

    READ_ONLY = "read-only"
    CROWDED = "crowded"
    NO_SPACE = "no space"
    NO_MEMORY = "no memory"
    TOO_LARGE = "too large"
    DAMAGED = "damaged"

    OTHER = "other"
    """None of these: the error is raised as it is."""


ADVICE: Final = {
    Fault.READ_ONLY: "it is a standby, or was made read-only; an SQLite file and its folder must be writable",
    Fault.CROWDED: "it has no connection left: let it have more, or lower the connections per process (pool_size)",
    Fault.NO_SPACE: "free or add disk space",
    Fault.NO_MEMORY: "give it more memory",
    Fault.TOO_LARGE: "ask for less at a time, or raise its limit",
    Fault.DAMAGED: "check its disk, and restore a backup if it is damaged",
}
"""What to do where the database answers and refuses."""

_LEAVE: Final = {Fault.GONE, Fault.READ_ONLY}
"""After these the connection is closed, with all others of its pool: a standby answers every `SELECT 1`."""

_SQLSTATES: Final = {
    "40001": Fault.CONFLICT,
    "40P01": Fault.CONFLICT,
    "57P01": Fault.GONE,  # the server stops, or an operator ends the session
    "57P02": Fault.GONE,
    "57P03": Fault.GONE,
    "57P04": Fault.GONE,
    "57P05": Fault.GONE,  # too long idle, as in the next two
    "25P03": Fault.GONE,
    "25P04": Fault.GONE,
    "3D000": Fault.GONE,
    "28000": Fault.GONE,
    "28P01": Fault.GONE,
    "25006": Fault.READ_ONLY,
    "53300": Fault.CROWDED,
    "53100": Fault.NO_SPACE,
    "53200": Fault.NO_MEMORY,
}
_SQLSTATE_CLASSES: Final = {"08": Fault.GONE, "54": Fault.TOO_LARGE}

_ERRNOS: Final = {
    **dict.fromkeys((1020, 1205, 1213), Fault.CONFLICT),
    # 0: PyMySQL's own, for a connection that is closed. 1044, 1045, 1049, 1698: no such user or database.
    **dict.fromkeys(
        (0, 1042, 1043, 1044, 1045, 1047, 1049, 1053, 1080, 1129, 1130, 1152, 1158, 1159, 1160), Fault.GONE
    ),
    **dict.fromkeys((1161, 1184, 1698, 1820, 1927, 4031), Fault.GONE),
    **dict.fromkeys((2002, 2003, 2004, 2005, 2006, 2012, 2013, 2014, 2026, 2027, 2045, 2055), Fault.GONE),
    **dict.fromkeys((1290, 1792, 1836), Fault.READ_ONLY),
    **dict.fromkeys((1040, 1135, 1203, 1226), Fault.CROWDED),
    **dict.fromkeys((20, 1021, 1114), Fault.NO_SPACE),
    **dict.fromkeys((5, 1037, 1038, 1041), Fault.NO_MEMORY),
    **dict.fromkeys((1118, 1153, 1162, 1390, 1436), Fault.TOO_LARGE),
    **dict.fromkeys((1033, 1034, 1035), Fault.DAMAGED),
}
_SQLITE_CODES: Final = {  # https://sqlite.org/rescode.html: the lowest byte is the primary code
    5: Fault.CONFLICT,  # busy
    6: Fault.CONFLICT,  # locked
    7: Fault.NO_MEMORY,
    8: Fault.READ_ONLY,
    10: Fault.DAMAGED,  # input or output
    11: Fault.DAMAGED,
    13: Fault.NO_SPACE,
    14: Fault.GONE,  # cannot open
    18: Fault.TOO_LARGE,
    26: Fault.DAMAGED,  # not a database
}
_LOCK_TIMEOUTS: Final = {"55P03", 1205}

_MANY_PARAMETERS: Final = 32_766  # SQLite's least limit; PostgreSQL's is 65,535
_CUT_OFF: Final = {2006, 2013}
"""MySQL closes the connection of a statement that is too large, often before its reason is read."""

_LARGE: Final = 900_000  # bytes, below the smallest limit that is usual

# libpq gives no code with an error of connecting, only the server's text. It decides the advice, and nothing else.
_CROWDED_TEXTS: Final = (
    "too many clients",
    "too many connections",
    "connection slots are reserved",
    "no more connections",
)


def code_of(error: BaseException | None) -> str | int | None:
    """A driver's code for its error: an SQLSTATE, a number of MySQL, a primary result code of SQLite."""
    if error is None:
        return None
    driver = type(error).__module__.partition(".")[0]
    if driver == "sqlite3":
        code: int | None = getattr(error, "sqlite_errorcode", None)
        return None if code is None else code & 0xFF
    if driver == "pymysql":
        first: Any = next(iter(error.args), None)
        return first if isinstance(first, int) else None
    state: str | None = getattr(error, "sqlstate", None)
    return state


def fault_of(error: BaseException | None) -> Fault:
    """What a driver's error means."""
    code = code_of(error)
    if isinstance(code, str):
        return _SQLSTATES.get(code) or _SQLSTATE_CLASSES.get(code[:2], Fault.OTHER)
    if code is None:
        # psycopg's own, without a code, and the only one that says by its type that there is no connection.
        return Fault.GONE if type(error).__name__ == "ConnectionTimeout" else Fault.OTHER
    codes = _SQLITE_CODES if type(error).__module__.startswith("sqlite3") else _ERRNOS
    return codes.get(code, Fault.OTHER)


def is_conflict(error: DBAPIError) -> bool:
    """Whether rerunning the whole transaction can help: deadlock, serialization failure, busy or locked SQLite."""
    return fault_of(error.orig) is Fault.CONFLICT


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether a statement has waited too long for a lock of another session."""
    return code_of(error.orig) in _LOCK_TIMEOUTS


def leaves_connection(error: BaseException) -> bool:
    """Whether after this error of a driver its connection must not be used again, although it may be open."""
    return fault_of(error) in _LEAVE


def unavailable(
    error: DBAPIError, address: str, *, written: bool | None, connecting: bool = False
) -> ServiceUnavailable | None:
    """The library's error for one that says that the database cannot be used; None for any other.

    `written` is what is known of a write if there was no answer. A refusal is an answer: nothing is written.
    `connecting` says that the error came while a connection was got, so that there is none, whatever the reason.
    """
    fault, problem = fault_of(error.orig), first_line(error.orig)
    if fault is Fault.OTHER and code_of(error.orig) in (None, 1) and _parameters(error) > _MANY_PARAMETERS:
        fault = Fault.TOO_LARGE  # psycopg has no code for what libpq does not send, and SQLite one for all statements
    if code_of(error.orig) in _CUT_OFF and (sent := _sent(error)) > _LARGE:
        problem = f"{problem}; {sent / 1_000_000:.0f} MB were sent, which may be more than its max_allowed_packet"
    if connecting and fault in (Fault.GONE, Fault.OTHER) and any(text in problem for text in _CROWDED_TEXTS):
        fault = Fault.CROWDED
    if fault in ADVICE:
        written = None if fault is Fault.DAMAGED and written is None else False
        return ServiceRefused("database", address, problem, written, ADVICE[fault])
    if fault is Fault.GONE or error.connection_invalidated or connecting:
        return ServiceUnavailable("database", address, problem, written)
    return None


def _values(error: DBAPIError) -> list[Any]:
    """The parameters of the statement that failed, of all its rows."""
    rows: Any = error.params if isinstance(error.params, list | tuple) else [error.params]
    found: list[Any] = []
    for row in rows:
        found.extend(row.values() if isinstance(row, Mapping) else row if isinstance(row, list | tuple) else [row])
    return found


def _parameters(error: DBAPIError) -> int:
    return 0 if error.params is None else len(_values(error))


def _sent(error: DBAPIError) -> int:
    """About how many bytes the statement that failed had."""
    return len(error.statement or "") + sum(len(value) for value in _values(error) if isinstance(value, str | bytes))


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text, at most 200 characters; the name of the error's type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
