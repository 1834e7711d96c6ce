"""The turns of the periodic passes. Any number of beats may ask; the row of the tick lets one of them run the pass."""

import logging
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from dispatcher.passes.future_waits import FutureWaits
from dispatcher.storage import ticks
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)


class Turns:
    """Decides which caller runs a periodic pass of one deployment: one caller per pass and interval."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waits = FutureWaits(database)

    def claim(self, name: str, interval_seconds: float) -> bool:
        """True for one caller in each interval, False for all others. `name` is the name of the pass.

        A tick in the future shows that the database's clock was wrong. Then the waits of deliveries are looked at, too.
        """
        interval = timedelta(seconds=interval_seconds)

        def work(connection: Connection) -> tuple[bool, dict[str, datetime], datetime]:
            now = self._database.machine_now(connection)
            ahead = ticks.ahead(ticks.read_ticks(connection), now)
            return ticks.claim_tick(connection, name, machine_now=now, interval=interval), ahead, now

        claimed, ahead, now = self._database.write(work)
        if claimed and name in ahead:
            seconds = (ahead[name] - now).total_seconds()
            emit(
                logger,
                Action.TICK_AHEAD,
                "%s had its last turn %.0f s in the future: the database's clock was wrong; it has its turn now",
                name,
                seconds,
                tick=name,
                seconds=round(seconds),
            )
        if ahead:
            self._waits.look(soon=True)
        return claimed

    def look_for_future_waits(self) -> None:
        """Once a minute: let the waits of deliveries that began in the future begin anew."""
        self._waits.look()


def pass_seconds(interval_seconds: float) -> float:
    """How long a pass with this interval may take, in seconds."""
    return min(max(interval_seconds, 10.0), 300.0)
