"""The turns of the periodic passes. Any number of beats may ask; the row of the tick lets one of them run the pass."""

from datetime import timedelta

from sqlalchemy.engine import Connection

from dispatcher.storage import ticks
from dispatcher.storage.database import Database


class Turns:
    """Decides which caller runs a periodic pass of one deployment: one caller per pass and interval."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, name: str, interval_seconds: float) -> bool:
        """True for one caller in each interval, False for all others. `name` is the name of the pass."""

        def work(connection: Connection) -> bool:
            machine_now = self._database.machine_now(connection)
            not_after = machine_now - timedelta(seconds=interval_seconds * 0.9)  # beats are not exact
            return ticks.claim_tick(connection, name, machine_now=machine_now, not_after=not_after)

        return self._database.write(work)


def pass_seconds(interval_seconds: float) -> float:
    """How long a pass with this interval may take, in seconds."""
    return min(max(interval_seconds, 10.0), 300.0)
