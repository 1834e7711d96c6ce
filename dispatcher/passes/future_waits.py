"""Waits that began in the future begin anew, because the database's clock was wrong when they were written."""

import logging
import time
from datetime import timedelta
from functools import partial
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.storage import moments, ticks
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

TICK: Final = "dispatcher.future_waits"
_INTERVAL: Final = timedelta(minutes=1)
_SOON: Final = timedelta(seconds=5)
_PASS_SECONDS: Final = 60.0
_PAGE: Final = 500


class FutureWaits:
    """Looks after the waits of one deployment's deliveries: leases, next attempts, and what the relay looks at."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def look(self, *, soon: bool = False) -> int:
        """Let waits that began in the future begin anew, with their own length; how many.

        Only one caller a minute looks, or with `soon` one in five seconds, because a tick has shown that the clock was
        wrong. What is left after a minute is found by the next look.
        """
        if not self._database.write(partial(self._claim, _SOON if soon else _INTERVAL)):
            return 0
        stop_at = time.monotonic() + _PASS_SECONDS
        after: moments.WaitPosition | None = None
        begun_anew = 0
        while time.monotonic() < stop_at:
            with self._database.read() as connection:
                page = moments.future_waits(connection, after=after, limit=_PAGE)
            if page:
                delivery_ids = [position.delivery_id for position in page]
                begun_anew += self._database.write(partial(self._begin_anew, delivery_ids))
            if len(page) < _PAGE:
                break
            after = page[-1]
        if begun_anew:
            emit(
                logger,
                Action.WAITS_BEGUN_ANEW,
                "%d waits of deliveries began in the future, because the database's clock was wrong: they begin anew",
                begun_anew,
                waits=begun_anew,
            )
        return begun_anew

    def _claim(self, interval: timedelta, connection: Connection) -> bool:
        now = self._database.machine_now(connection)
        return ticks.claim_tick(connection, TICK, machine_now=now, interval=interval)

    def _begin_anew(self, delivery_ids: list[str], connection: Connection) -> int:
        return moments.begin_anew(connection, delivery_ids, machine_now=self._database.machine_now(connection))
