"""Prune: events, closed deliveries and actions that are older than the retention are deleted, and never chains."""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection

from dispatcher.messages.queues import PRUNE, PRUNE_SECONDS
from dispatcher.passes.turns import Turns, pass_seconds
from dispatcher.settings import Settings
from dispatcher.storage import actions, deliveries, history, ticks
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_PAGE: Final = 500
_CONTINUED_SECONDS: Final = 3600.0
_PASS_SECONDS: Final = 300.0
_UNFINISHED: Final = {"unfinished": True}
_NOTHING: Final = {"events": 0, "deliveries": 0, "actions": 0}


class Pruner:
    """Prunes one deployment."""

    def __init__(self, *, settings: Settings, database: Database, turns: Turns) -> None:
        self._settings = settings
        self._database = database
        self._turns = turns

    def prune(self, *, days: float | None, tick: bool) -> dict[str, Any]:
        """Delete events, closed deliveries and actions older than `days`: `{"events", "deliveries", "actions"}`.

        In batches; `days` None takes the setting. With `tick=True` only the first caller within a day does anything, or
        within an hour where the last prune ran out of time or was killed.
        """
        days = days if days is not None else self._settings.retention_days
        if days is None:
            return dict(_NOTHING)
        if not tick:
            return self._prune(days)[0]
        with self._database.read() as connection:
            unfinished = bool(ticks.read_position(connection, PRUNE))
        if not self._turns.claim(PRUNE, _CONTINUED_SECONDS if unfinished else PRUNE_SECONDS):
            return {"claimed": False}
        self._database.write(partial(ticks.write_position, name=PRUNE, position=_UNFINISHED))
        counts, finished = self._prune(days)
        if finished:
            self._database.write(partial(ticks.write_position, name=PRUNE, position=None))
        return counts

    def _prune(self, days: float) -> tuple[dict[str, Any], bool]:
        """What was deleted, and whether that was all."""
        with self._database.read() as connection:
            before = self._database.now(connection) - timedelta(days=days)
            machine_before = self._database.machine_now(connection) - timedelta(days=days)
        stop_at = time.monotonic() + pass_seconds(_PASS_SECONDS)
        counts = dict(_NOTHING)
        steps: Mapping[str, Callable[[Connection], int]] = {
            "events": lambda connection: history.prune_events(connection, before=before, limit=_PAGE),
            "deliveries": lambda connection: deliveries.prune(connection, before=machine_before, limit=_PAGE),
            "actions": lambda connection: actions.prune(connection, before=machine_before, limit=_PAGE),
        }
        finished = True
        for name, step in steps.items():
            deleted = _PAGE
            while deleted == _PAGE and time.monotonic() < stop_at:
                deleted = self._database.write(step)
                counts[name] += deleted
            finished = finished and deleted < _PAGE
        emit(logger, Action.PRUNED, "prune: %s", counts, pruned=counts)
        return counts, finished
