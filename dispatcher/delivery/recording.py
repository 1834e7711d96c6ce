"""Records the end of an attempt, and tries again while the database is away."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final

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

_MAX_PAUSE_SECONDS: Final = 2.0


def recorded(
    database: Database,
    delivery: DeliveryRecord,
    write: Callable[[], bool],
    expected_statuses: Sequence[DeliveryStatus],
    *,
    finish_by: float,
    commit_may_have_succeeded: bool = False,
    attempt_after: int | None = None,
) -> bool:
    """Whether `write()` has committed; it is tried again while the database is away, until `finish_by` (monotonic s).

    A commit may succeed although its caller sees an error. After an error the row is read: if it has one of
    `expected_statuses` and the attempt `attempt_after` (None: this attempt), our earlier commit succeeded.
    `commit_may_have_succeeded` says that there was an error before this call. Raises the database's error when the time
    is over; the relay then settles the attempt as unknown.
    """
    pause = 0.05
    while True:
        try:
            if write():
                return True
            return commit_may_have_succeeded and _is_ours(database, delivery, expected_statuses, attempt_after)
        except LostChain:  # the chain does not wait for this delivery any more
            return False
        except (ServiceUnavailable, DBAPIError) as error:
            if time.monotonic() + pause >= finish_by:
                raise
            emit(
                logger,
                Action.FINISH_FAILED,
                "delivery %s: could not record the end of its attempt (%s); trying again",
                delivery.id,
                type(error).__name__,
                delivery_id=delivery.id,
            )
            commit_may_have_succeeded = True
        time.sleep(pause)
        pause = min(pause * 2, _MAX_PAUSE_SECONDS)


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
