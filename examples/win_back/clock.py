"""The simulated clock: a small file that the driver replaces and every process reads, so that all agree on the day.

The processes use it because of `DISPATCHER_CLOCK=examples.win_back.clock:now`; the file's path is in `WIN_BACK_CLOCK`.
"""

import os
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Final

VARIABLE: Final = "WIN_BACK_CLOCK"


def now() -> datetime:
    """The first moment of the simulated day, aware (UTC)."""
    day = date.fromisoformat(Path(os.environ[VARIABLE]).read_text(encoding="ascii"))
    return datetime.combine(day, time.min, tzinfo=UTC)


def set_day(day: date) -> None:
    """Set the day for every process. Replacing the file is atomic, so no process reads half a date."""
    path = Path(os.environ[VARIABLE])
    new = path.with_suffix(".new")
    new.write_text(day.isoformat(), encoding="ascii")
    new.replace(path)
