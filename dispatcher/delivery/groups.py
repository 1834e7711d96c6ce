"""A group of attempts: begun together, called one after the other, recorded together.

    begin · peek · load · [last look · hours · mark · count · call] for each · finish

The facts of a group are loaded together, and are at most a second old when an attempt's turn comes. When the second has
passed, what was called is recorded. Then as many of the rest as that second held begin anew, with facts of their own;
the others go back and are published again, so that other workers take them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Protocol

from sqlalchemy.exc import DBAPIError

from dispatcher.delivery.attempt import (
    Attempt,
    Called,
    CannotBeRead,
    Deferred,
    End,
    Failed,
    Loaded,
    TakenOver,
    load_facts,
    make_attempt,
)
from dispatcher.delivery.ends import Ends
from dispatcher.delivery.leases import Leases
from dispatcher.delivery.marks import GrewOldError, Marks, Tempo
from dispatcher.delivery.pacing import Deferral, Pacing
from dispatcher.delivery.recording import patiently
from dispatcher.delivery.watchdog import Watchdog
from dispatcher.domain.callbacks import resolve_callback
from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.records import Begun, Owed
from dispatcher.domain.results import AttemptResult
from dispatcher.domain.unreadable import unreadable
from dispatcher.errors import ServiceUnavailable, ends_process
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome, WaitsFor
from dispatcher.storage import deliveries
from dispatcher.storage.database import Database
from dispatcher.storage.deliveries import NotBegun
from dispatcher.storage.store import Store
from dispatcher.transition import Transition

_SECOND: Final = 1.0
_PAUSED_SECONDS: Final = 3.0
"""Longer than what this process knows of pauses is old, so that a resumed type is not refused again and again."""


class PausedTypes(Protocol):
    """The names of the chain types that are paused."""

    def __contains__(self, type_name: str, /) -> bool: ...


class OutOfTime(Exception):  # noqa: N818 - its name is shown as the reason of a failed attempt
    """The facts and guards of an attempt took so long that its callback may not begin any more in this task."""


@dataclass(slots=True)
class _Turns:
    """The turns of one begun group: since when its facts are loaded, and how many turns there were since then."""

    marks: Marks
    call_by: float
    tempo: Tempo
    waiting: Sequence[Attempt] = ()
    since: float = field(default_factory=time.monotonic)
    taken: int = 0
    errors: list[Exception] = field(default_factory=list)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep an error of the database in the block for the end of the group: the other attempts go on."""
        try:
            yield
        except (ServiceUnavailable, DBAPIError) as error:
            self.errors.append(error)

    @property
    def are_over(self) -> bool:
        """Whether no further turn may begin. The first after each load always may."""
        now = time.monotonic()
        return self.taken > 0 and (now - self.since >= _SECOND or now >= self.call_by)

    @property
    def turn_seconds(self) -> float:
        """How long a turn takes: as those since the load, else as in the group before."""
        return (time.monotonic() - self.since) / self.taken if self.taken else self.tempo.turn_seconds


class Groups:
    """Makes groups of attempts for one deployment."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        store: Store,
        paused: PausedTypes,
        pacing: Pacing,
        leases: Leases,
        watchdog: Watchdog,
        ends: Ends,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._store = store
        self._paused = paused
        self._pacing = pacing
        self._leases = leases
        self._watchdog = watchdog
        self._ends = ends
        self._tempo = Tempo()

    @property
    def size(self) -> int:
        """How many attempts to begin together: as many as a second held lately."""
        return self._tempo.group_size

    def deliver(self, owed: Sequence[Owed], *, call_by: float) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries. No callback begins after `call_by` (monotonic seconds)."""
        begun = self._store.begin(owed, lease_seconds=self._leases.seconds)
        read_at = time.monotonic()
        with self._leases.kept(row.delivery for row in begun):
            turns = _Turns(Marks(self._store, self._leases.seconds), call_by, self._tempo)
            results = self._ready(turns, begun, read_at)
            while turns.waiting:
                results += self._call_for_a_second(turns)
                self._tempo.note(turns.turn_seconds)
                results += self._go_on(turns)
        if turns.errors:
            raise turns.errors[0]
        return results + self._not_begun(owed, begun)

    # --- begun -------------------------------------------------------------------------------------------------------

    def _ready(self, turns: _Turns, begun: Sequence[Begun], read_at: float) -> list[AttemptResult]:
        """Let the attempts that may go on wait for their turns; the results of the others."""
        results: list[AttemptResult] = []
        ready: list[Attempt] = []
        for row in begun:
            with turns.apart():
                made = self._ready_to_load(row, read_at, turns.call_by)
                if isinstance(made, Attempt):
                    ready.append(made)
                else:
                    results.append(made)
        turns.waiting = ready
        return results

    def _ready_to_load(self, begun: Begun, read_at: float, call_by: float) -> Attempt | AttemptResult:
        """The attempt with its definition; a result where that is unknown here, or where the attempt has to wait."""
        now = self._database.domain_now(begun.machine_now)
        delivery = begun.delivery
        try:
            chain_type = self._config.by_type[begun.chain.chain_type]
            transition_class = chain_type.by_name[delivery.transition]
            callback = resolve_callback(chain_type, transition_class, delivery.callback)
        except KeyError as error:
            return self._ends.unknown_definition(begun, error.args[0], now)
        attempt = Attempt(begun, chain_type, transition_class, callback, now, read_at)
        if patiently(lambda: chain_type.chain_type in self._paused, until=call_by):
            reason = f"chain type {chain_type.chain_type} is paused"
            return self._ends.record(attempt, Deferred(Deferral(WaitsFor.PAUSED, reason, _PAUSED_SECONDS)))
        problem = unreadable(begun.chain.context, delivery.context, delivery.kwargs, delivery.request)
        if problem is not None:
            return self._ends.record(attempt, CannotBeRead(problem))
        try:
            deferral = self._pacing.peek(chain_type, begun, now)
        except Exception as error:  # noqa: BLE001 - whatever it is, the attempt must not stay begun
            return self._ends.record(attempt, Failed(error))
        return attempt if deferral is None else self._ends.record(attempt, Deferred(deferral))

    def _not_begun(self, owed: Sequence[Owed], begun: Sequence[Begun]) -> list[AttemptResult]:
        """The results of attempts that did not begin. It is asked last, because an error here must not keep others."""
        begun_ids = {row.delivery.id for row in begun}
        refused = [message for message in owed if message.delivery_id not in begun_ids]
        if not refused:
            return []
        try:
            with self._database.read() as connection:
                reasons = deliveries.why_not_begun(connection, refused)
        except (ServiceUnavailable, DBAPIError):
            if not begun:
                raise
            reasons = {message.delivery_id: NotBegun(AttemptOutcome.STALE) for message in refused}
        return [self._ends.not_begun(message, reasons[message.delivery_id]) for message in refused]

    # --- turns -------------------------------------------------------------------------------------------------------

    def _call_for_a_second(self, turns: _Turns) -> list[AttemptResult]:
        """Load the facts, and give each attempt its turn while these are fresh; record callbacks that returned."""
        loaded = load_facts([attempt for attempt in turns.waiting if not attempt.delivery.unknown])
        turns.since, turns.taken = time.monotonic(), 0
        called: list[tuple[Attempt, Called]] = []
        results: list[AttemptResult] = []
        try:
            while turns.waiting and not turns.are_over:
                attempt, turns.waiting = self._at_its_turn(turns.waiting[0]), turns.waiting[1:]
                end = self._turn(turns, attempt, loaded)
                turns.taken += 1
                if end is None:
                    break
                if isinstance(end, Called):
                    called.append((attempt, end))
                    continue
                with turns.apart():
                    results.append(self._ends.record(attempt, end))
        finally:  # an error with one of the others must not make their effects unknown
            with turns.apart():
                results += self._ends.record_called(called)
        return results

    def _turn(self, turns: _Turns, attempt: Attempt, loaded: Mapping[int, Loaded]) -> End | None:
        """How an attempt ended at its turn. None: it was not called, and the turns of this second are over."""
        try:
            return make_attempt(
                attempt,
                None if attempt.delivery.unknown else loaded.get(attempt.begun.chain.id, {}),
                last_look_seconds=self._settings.last_look_seconds,
                mark_known=self._ends.mark_known,
                before_call=partial(self._before_call, turns),
                watched=self._watchdog.watched,
            )
        except GrewOldError:
            turns.waiting = [attempt, *turns.waiting]
        except (ServiceUnavailable, DBAPIError) as error:  # before the call: the relay settles it, the others go on
            turns.errors.append(error)
        return None

    def _before_call(self, turns: _Turns, attempt: Attempt, transition: Transition) -> End | None:
        """The end of an attempt whose callback may not be called now. None: it may, and is counted for its limits."""
        chain_type, delivery = attempt.chain_type, attempt.delivery
        if time.monotonic() >= turns.call_by:
            limit = f"no callback may begin later than {self._settings.lock_seconds:g} s after the begin of its task"
            return Failed(OutOfTime(f"its facts and guards took too long: {limit}"))
        try:
            hours = None
            if chain_type.hours is not None:
                now = self._domain_now(attempt)
                hours = self._pacing.hours(chain_type, delivery.chain_id, transition.context, now)
            asked = self._pacing.asked(chain_type, transition, delivery)
        except BaseException as error:  # the key of a limit is user code, and guards may replace the context
            if ends_process(error):
                raise
            return Failed(error)
        if hours is not None:
            return Deferred(hours)
        allow = partial(turns.marks.allow, attempt, turns.waiting, turn_seconds=turns.turn_seconds)
        asked_at = time.monotonic()
        if not patiently(allow, until=turns.call_by):
            return TakenOver()
        if time.monotonic() - asked_at >= _SECOND:
            raise GrewOldError
        deferral = self._pacing.count(asked, delivery)
        return None if deferral is None else Deferred(deferral)

    def _go_on(self, turns: _Turns) -> list[AttemptResult]:
        """Begin as many of the waiting attempts anew as the last second held; the results of the others, given back."""
        if not turns.waiting:
            return []
        kept = [] if turns.errors or time.monotonic() >= turns.call_by else list(turns.waiting[: turns.taken])
        rows: list[Begun] = []
        with turns.apart():
            rows = patiently(partial(self._begin_anew, kept), until=turns.call_by)
        read_at = time.monotonic()
        anew = {row.delivery.id: row for row in rows}
        back = [attempt for attempt in turns.waiting if attempt.delivery.id not in anew]
        turns.waiting = [
            replace(attempt, begun=anew[attempt.delivery.id], read_at=read_at)
            for attempt in kept
            if attempt.delivery.id in anew
        ]
        with turns.apart():
            return self._ends.give_back(back)
        return []

    def _begin_anew(self, attempts: Sequence[Attempt]) -> list[Begun]:
        unpaused = [attempt.delivery for attempt in attempts if attempt.chain_type.chain_type not in self._paused]
        return self._store.begin_anew(unpaused, lease_seconds=self._leases.seconds) if unpaused else []

    def _at_its_turn(self, attempt: Attempt) -> Attempt:
        return replace(attempt, now=self._domain_now(attempt))

    def _domain_now(self, attempt: Attempt) -> datetime:
        """Domain time at this moment, reckoned from the database's clock as of the begin, or of beginning anew."""
        elapsed = timedelta(seconds=time.monotonic() - attempt.read_at)
        return self._database.domain_now(attempt.begun.machine_now + elapsed)
