"""Wakes the chains that rest in a state whose candidates have changed, because the new ones were never asked.

A fingerprint of each state's candidates is remembered in the chain type's row, with the time at which it was last in
use.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy.engine import Connection

from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.fingerprints import fingerprint
from dispatcher.settings import Settings
from dispatcher.storage import chain_types, chains, pauses, ticks
from dispatcher.storage.clock import TOLERANCE
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_PAGE: Final = 1000
_POSITION: Final = "dispatcher.wake"
_DONE: Final = -1
"""The position of a state whose chains are all woken."""

_SWEEPS_OF_A_DEPLOY: Final = 10


@dataclass(frozen=True, slots=True)
class _Look:
    """A chain type, compared with what is remembered of it."""

    chain_type: ChainType
    changed: list[str]
    """The states whose chains must be woken."""

    fresh: Mapping[str, Mapping[str, str]]
    """The fingerprints to remember."""

    outdated: bool
    """Whether `fresh` must be written even if nothing has changed: the row has none, or old or impossible ones."""


class Waker:
    """Wakes the chains of changed states of one deployment."""

    def __init__(self, *, config: DispatcherConfig, settings: Settings, database: Database) -> None:
        self._config = config
        self._settings = settings
        self._database = database

    def wake_changed_states(self, stop_at: float) -> None:
        """Make the chains that rest in states whose candidates have changed due again, in batches.

        During a deploy old and new workers take turns, so a fingerprint that was in use within the last sweeps is no
        change. Once the old fingerprint is out of use the chains are made due again, because until then an old worker
        may have looked at them, and laid them to rest by its own candidates. The next sweep continues with what is left
        at `stop_at` (monotonic seconds).
        """
        with self._database.read() as connection:
            looks = self._look(connection)
        for look in looks:
            if not all(self._wake_state(look.chain_type, state, stop_at) for state in look.changed):
                continue
            if look.changed or look.outdated:
                self._database.write(partial(_remember, look.chain_type.chain_type, look.fresh))

    def count_resting(self) -> int:
        """How many chains `wake_changed_states` would make due now. Reads only: one query for each changed state."""
        with self._database.read() as connection:
            now = self._database.now(connection)
            positions = ticks.read_position(connection, _POSITION)
            changed = [
                (look.chain_type, state, positions.get(_key(look.chain_type, state), 0))
                for look in self._look(connection)
                for state in look.changed
            ]
            return sum(
                chains.count_resting(
                    connection, type_name=chain_type.chain_type, state=state, after_id=after_id, now=now
                )
                for chain_type, state, after_id in changed
                if after_id != _DONE
            )

    def _look(self, connection: Connection) -> list[_Look]:
        """Each chain type of the configuration, compared with what is remembered of it.

        A type whose chains are just being made due over a time is left out until that is over.
        """
        forget = timedelta(seconds=self._settings.sweep_seconds * _SWEEPS_OF_A_DEPLOY)
        known = chain_types.read_fingerprints(connection, list(self._config.by_type))
        now = self._database.machine_now(connection)
        spreading = pauses.spreading_types(connection, now=self._database.now(connection))
        looks = []
        for type_name, chain_type in self._config.by_type.items():
            if type_name in spreading:
                continue
            if not known.get(type_name):  # its row may have been made by a pause
                looks.append(_Look(chain_type, [], _seen_now(chain_type, {}, now, forget), outdated=True))
                continue
            states = known[type_name]
            changed = [state for state in sorted(chain_type.states) if _changed(chain_type, state, states, now, forget)]
            outdated = _needs_refresh(chain_type, states, now, forget)
            looks.append(_Look(chain_type, changed, _seen_now(chain_type, states, now, forget), outdated=outdated))
        return looks

    def _wake_state(self, chain_type: ChainType, state: str, stop_at: float) -> bool:
        """Whether all chains that rest in a state are due; continues where an earlier sweep stopped."""
        type_name, key = chain_type.chain_type, _key(chain_type, state)

        def work(connection: Connection) -> int:
            positions = ticks.read_position(connection, _POSITION)
            after_id: int = positions.get(key, 0)
            if after_id == _DONE:
                return _DONE
            now = self._database.now(connection)
            found = chains.make_due(
                connection, type_name=type_name, state=state, after_id=after_id, limit=_PAGE, now=now
            )
            after_id = _DONE if found is None else found
            ticks.write_position(connection, _POSITION, {**positions, key: after_id})
            return after_id

        emit(
            logger,
            Action.STATE_WOKEN,
            "the candidates of chain type %s, state %s have changed: its chains are made due",
            type_name,
            state,
            chain_type=type_name,
            state=state,
        )
        while time.monotonic() < stop_at:
            if self._database.write(work) == _DONE:
                return True
        return False


def _key(chain_type: ChainType, state: str) -> str:
    """The key under which the position of a state's waking is kept."""
    return f"{chain_type.chain_type}/{state}/{fingerprint(chain_type, state)}"


def _remember(type_name: str, fresh: Mapping[str, Mapping[str, str]], connection: Connection) -> None:
    chain_types.write_fingerprints(connection, type_name, fresh)
    positions = ticks.read_position(connection, _POSITION)
    left = {key: position for key, position in positions.items() if not key.startswith(f"{type_name}/")}
    if left != positions:
        ticks.write_position(connection, _POSITION, left)


def _seen_now(
    chain_type: ChainType, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> dict[str, dict[str, str]]:
    """The fingerprints to remember: those seen lately, and this configuration's own, as of now.

    One that was seen in the future counts as seen now, because the database's clock was wrong.
    """
    return {
        state: {
            **{
                mark: _text(min(_time(seen), now))
                for mark, seen in states.get(state, {}).items()
                if now - _time(seen) < forget
            },
            fingerprint(chain_type, state): _text(now),
        }
        for state in sorted(chain_type.states)
    }


def _changed(
    chain_type: ChainType, state: str, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> bool:
    seen = states.get(state, {})
    if fingerprint(chain_type, state) in seen and (
        len(seen) == 1 or all(now - _time(last) < forget for last in seen.values())
    ):
        return False
    return bool(seen) or bool(chain_type.candidates(state))


def _needs_refresh(
    chain_type: ChainType, states: Mapping[str, Mapping[str, str]], now: datetime, forget: timedelta
) -> bool:
    for state in chain_type.states:
        seen = states.get(state, {})
        last = seen.get(fingerprint(chain_type, state))
        if last is None or now - _time(last) > forget / 4:
            return True
        if any(_time(one) > now + TOLERANCE for one in seen.values()):
            return True
    return False


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()
