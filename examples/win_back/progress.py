"""Shows the progress of the run: a bar on a terminal, otherwise one line for each simulated month."""

import time
from datetime import date
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from examples.win_back.purchases import FIRST_DAY, LAST_DAY


class DayProgress:
    """Shows the simulated day, the number of chains, and moves and callbacks per second (over the whole run)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._last_shown: date | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[day]}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=console,
                refresh_per_second=5,  # few, because drawing uses the cores that do the work
            )
            self._task = self._bar.add_task("", total=(LAST_DAY - FIRST_DAY).days + 1, day=FIRST_DAY, figures="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    def show(self, day: date, *, chains: int, moves: int, callbacks: int) -> None:
        """Show that `day` has ended."""
        rates = f"{moves / self.seconds:5.0f} moves/s {callbacks / self.seconds:5.0f} callbacks/s"
        figures = f"{chains:5} chains {rates}"
        if self._bar is not None:
            done = (day - FIRST_DAY).days + 1
            self._bar.update(self._task, completed=done, day=day, figures=figures)
        elif self._last_shown is None or (day.year, day.month) != (self._last_shown.year, self._last_shown.month):
            self._console.print(f"{day} {figures} {self.seconds:6.1f} s", highlight=False)
            self._last_shown = day
