"""The relay: deliveries whose message was lost are published again, and those whose worker died are settled."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CALLBACKS_QUEUE, RELAY
from dispatcher.passes.turns import Turns, pass_seconds
from dispatcher.passes.unknown_effects import Settlement, settle_unknown
from dispatcher.settings import Settings
from dispatcher.states import DeliveryStatus
from dispatcher.storage import chains, overdue
from dispatcher.storage.database import Database
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class _Page:
    """One page of overdue deliveries: how many were found, which are to be published, what was settled."""

    found: int
    owed: list[Owed]
    settled: list[Settlement]


class Relay:
    """Runs the relay of one deployment. `random` draws the jitter of retries from [0, 1)."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        publisher: Publisher,
        turns: Turns,
        random: Callable[[], float],
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._publisher = publisher
        self._turns = turns
        self._random = random

    def relay(self, *, tick: bool) -> dict[str, Any]:
        """Publish deliveries whose message was lost, and settle those whose worker died: `{"relayed", "settled"}`.

        With `tick=True` only the first caller within the interval does anything (`{"claimed": False}` for the others).
        A delivery that cannot be published stays owed, and a later relay publishes it.
        """
        if tick and not self._turns.claim(RELAY, self._settings.relay_seconds):
            return {"claimed": False}
        stop_at = time.monotonic() + pass_seconds(self._settings.relay_seconds)
        relayed = settled = 0
        try:
            room = self._settings.max_backlog - self._publisher.backlog(CALLBACKS_QUEUE)
        except PublishFailed as error:  # settling needs no broker, so it continues
            _log_not_published(error)
            room = None
        while time.monotonic() < stop_at:
            page = self._database.write(partial(self._page, pending=room is not None and room > 0))
            settled += len(page.settled)
            for settlement in page.settled:
                _log_settlement(settlement)
            try:
                if page.owed and room is not None:
                    self._publisher.deliver(page.owed)
                    relayed += len(page.owed)
                    room -= len(page.owed)
            except PublishFailed as error:
                _log_not_published(error)
                room = None
            if page.found < _PAGE:
                break
        level = None if relayed or settled else logging.DEBUG
        result = {"relayed": relayed, "settled": settled}
        emit(logger, Action.RELAYED, "relay: %s", result, level=level, relayed=relayed, settled=settled)
        return result

    def _page(self, connection: Connection, *, pending: bool) -> _Page:
        grace = self._settings.queued_seconds
        found = overdue.claim_overdue(connection, limit=_PAGE, grace_seconds=grace, pending=pending)
        running = [delivery for delivery in found if delivery.status == DeliveryStatus.RUNNING]
        owed = [
            Owed(delivery.id, delivery.attempt + 1) for delivery in found if delivery.status == DeliveryStatus.PENDING
        ]
        settled = self._settle(connection, running)
        owed += [settlement.owed for settlement in settled if settlement.owed is not None]
        return _Page(len(found), owed, settled)

    def _settle(self, connection: Connection, running: Sequence[DeliveryRecord]) -> list[Settlement]:
        if not running:
            return []
        grace = self._settings.queued_seconds
        now = self._database.now(connection)
        records = chains.read_many(connection, [delivery.chain_id for delivery in running])
        settled = []
        for delivery in sorted(running, key=lambda delivery: delivery.chain_id):
            record = records.get(delivery.chain_id)
            chain_type = self._config.by_type.get(record.chain_type) if record is not None else None
            if record is None:  # deleted by hand: no foreign key keeps it
                overdue.look_later(connection, delivery, seconds=grace)
                settled.append(Settlement(delivery, orphan=True))
            elif chain_type is None:  # a type of another version of the code: its workers settle it
                overdue.look_later(connection, delivery, seconds=grace)
                settled.append(Settlement(delivery))
            else:
                settled.append(
                    settle_unknown(connection, delivery, chain_type, now=now, grace_seconds=grace, random=self._random)
                )
        return settled


def _log_settlement(settlement: Settlement) -> None:
    """Log a settlement if a person must know of it. The other settlements are only in the deliveries' rows."""
    delivery = settlement.delivery
    if settlement.orphan:
        emit(
            logger,
            Action.ORPHAN_DELIVERY,
            "delivery %s: its chain %s is missing or does not wait for it",
            delivery.id,
            delivery.chain_id,
            chain_id=delivery.chain_id,
            delivery_id=delivery.id,
        )
    elif settlement.stopped is not None:
        emit(
            logger,
            Action(f"attempt_{settlement.stopped}"),
            "chain %s: delivery %s of %s is %s: %s",
            delivery.chain_id,
            delivery.id,
            delivery.transition,
            settlement.stopped,
            settlement.error,
            chain_id=delivery.chain_id,
            delivery_id=delivery.id,
            attempt=delivery.attempt,
            transition=delivery.transition,
        )


def _log_not_published(error: PublishFailed) -> None:
    emit(
        logger,
        Action.DELIVERIES_NOT_PUBLISHED,
        "relay: deliveries are not published (%s); the next relay will try again",
        error,
    )
