"""Records the end of an attempt, and tries again while the database is away."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dispatcher.domain.records import DeliveryRecord, Finished
from dispatcher.errors import ServiceUnavailable
from dispatcher.states import DeliveryStatus, EventAction
from dispatcher.storage import deliveries, history
from dispatcher.storage.database import Database
from dispatcher.storage.deliveries import LostChain
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RECORD_SECONDS: Final = 90.0
"""For how long the end of an attempt is tried to be recorded while the database is away."""

MAX_PAUSE_SECONDS: Final = 2.0


def recorded(
    database: Database,
    delivery: DeliveryRecord,
    write: Callable[[], bool],
    expected_statuses: Sequence[DeliveryStatus],
    *,
    finish_by: float | None = None,
    commit_may_have_succeeded: bool = False,
    attempt_after: int | None = None,
) -> bool:
    """Whether `write()` has committed; it is tried again while the database is away, until `finish_by` (monotonic s).

    By default it is tried for `RECORD_SECONDS`. Meanwhile the lease is renewed as soon as the database is back, and
    the relay leaves it time for that.

    A commit may succeed although its caller sees an error. After an error the row is read: if it has one of
    `expected_statuses` and the attempt `attempt_after` (None: this attempt), our earlier commit succeeded.
    `commit_may_have_succeeded` says that there was an error before this call. Raises the database's error when the time
    is over; the relay then settles the attempt as unknown.
    """
    failed = commit_may_have_succeeded

    def step() -> bool:
        nonlocal failed
        try:
            return write() or (failed and _is_ours(database, delivery, expected_statuses, attempt_after))
        except LostChain:  # the chain does not wait for this delivery any more
            return False
        except (ServiceUnavailable, DBAPIError) as error:
            failed = True
            emit(
                logger,
                Action.FINISH_FAILED,
                "delivery %s: could not record the end of its attempt (%s)",
                delivery.id,
                type(error).__name__,
                delivery_id=delivery.id,
            )
            raise

    return patiently(step, until=time.monotonic() + RECORD_SECONDS if finish_by is None else finish_by)


def patiently(step: Callable[[], Result], *, until: float) -> Result:
    """What `step()` gives. While the database is away it is called again, until `until` (monotonic seconds).

    It must be harmless to call it again after a commit that reported an error.
    """
    pause = 0.05
    while True:
        try:
            return step()
        except (ServiceUnavailable, DBAPIError):
            if time.monotonic() + pause >= until:
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _is_ours(
    database: Database,
    delivery: DeliveryRecord,
    expected_statuses: Sequence[DeliveryStatus],
    attempt_after: int | None,
) -> bool:
    with database.read() as connection:
        row = deliveries.read(connection, delivery.id)
    expected_attempt = delivery.attempt if attempt_after is None else attempt_after
    return (
        row is not None
        and (row.attempt, row.begins) == (expected_attempt, delivery.begins)
        and row.status in expected_statuses
    )


def note_problem(database: Database, finished: Finished, now: datetime) -> None:
    """Add the event of a delivery that has succeeded although its transition then asked for what cannot be.

    It is written after the move, because nothing about it may keep the move from being recorded.
    """
    if not finished.problem:
        return
    delivery = finished.delivery

    def work(connection: Connection) -> None:
        history.add_event_at_version(
            connection,
            delivery.chain_id,
            EventAction.GUARD_FAILED,
            value=delivery.final_state,
            from_state=delivery.final_state,
            to_state=delivery.final_state,
            detail=finished.problem,
            now=now,
        )

    with suppress(ServiceUnavailable, DBAPIError):  # the ERROR line has been logged
        database.write(work)
