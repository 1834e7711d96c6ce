"""Which chain types are paused, as of at most two seconds ago, because a query for every execution would cost much."""

import time
from typing import Final

from dispatcher.storage import chain_types
from dispatcher.storage.database import Database

_SECONDS: Final = 2.0


class PausedTypes:
    """The paused chain types of one deployment."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._names: frozenset[str] = frozenset()
        self._known_until = 0.0

    def __contains__(self, type_name: str) -> bool:
        asked_at = time.monotonic()  # before the query, because the answer may be slow
        if asked_at >= self._known_until:
            with self._database.read() as connection:
                self._names = frozenset(chain_types.paused_types(connection))
            self._known_until = asked_at + _SECONDS
        return type_name in self._names
