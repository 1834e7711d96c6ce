"""The relay: deliveries whose message was lost are published again, and those whose worker died are settled."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dispatcher.domain.config import DispatcherConfig
from dispatcher.domain.records import DeliveryRecord, Owed
from dispatcher.errors import ends_process
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CALLBACKS_QUEUE, RELAY
from dispatcher.passes.turns import Turns, pass_seconds
from dispatcher.passes.unknown_effects import Definition, Settlement, define, settle_lost
from dispatcher.settings import Settings
from dispatcher.states import DeliveryStatus
from dispatcher.storage import overdue
from dispatcher.storage.database import Database, alone, ends_transaction
from dispatcher.storage.overdue import Overdue, WaitingChain
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class _Claimed:
    """One page of overdue deliveries, and the chains of those whose attempt is to be settled, by id."""

    overdue: Overdue
    chains: dict[int, WaitingChain]

    @property
    def is_full(self) -> bool:
        """Whether there may be more."""
        return len(self.overdue.lost) + len(self.overdue.noted) + len(self.overdue.lapsed) >= _PAGE


@dataclass(frozen=True, slots=True)
class _Failed:
    """An attempt that could not be settled."""

    delivery: DeliveryRecord
    error: BaseException


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

        `"failed"` counts those that could not be settled, if there are any; each is logged, and tried again later.
        With `tick=True` only the first caller within the interval does anything (`{"claimed": False}` for the others).
        A delivery that cannot be published stays owed, and a later relay publishes it.
        """
        if tick and not self._turns.claim(RELAY, self._settings.relay_seconds):
            return {"claimed": False}
        self._turns.look_for_future_waits()
        stop_at = time.monotonic() + pass_seconds(self._settings.relay_seconds)
        relayed = settled = failed = 0
        try:
            room = self._settings.max_backlog - self._publisher.backlog(CALLBACKS_QUEUE)
        except PublishFailed as error:  # settling needs no broker, so it continues
            _log_not_published(error)
            room = None
        while time.monotonic() < stop_at:
            page = self._database.write(partial(self._claim, pending=room is not None and room > 0))
            lost = page.overdue.lost
            if room is not None:  # before anything else, because the claim hides them from the next relays
                room = self._publish(lost, room)
                relayed += len(lost) if room is not None else 0
            settlements, failures = self._settle(page)
            for settlement in settlements:
                _log_settlement(settlement)
            for failure in failures:
                _log_failure(failure)
            settled += len(settlements)
            failed += len(failures)
            owed = [settlement.delivery for settlement in settlements if settlement.again]
            if room is not None:
                room = self._publish(owed, room)
                relayed += len(owed) if room is not None else 0
            if not page.is_full or not (page.overdue.lost or page.overdue.noted or settlements):
                break
        result: dict[str, Any] = {"relayed": relayed, "settled": settled, **({"failed": failed} if failed else {})}
        level = None if any(result.values()) else logging.DEBUG
        emit(logger, Action.RELAYED, "relay: %s", result, level=level, **result)
        return result

    def _publish(self, deliveries: Sequence[DeliveryRecord], room: int) -> int | None:
        """Publish the next attempts at these deliveries; how many more messages the queue may take.

        None if none can be published. An attempt that was lost before its call may have killed its process, by a guard.
        The next one has a message of its own, so that it costs no other delivery an attempt.
        """
        groups: list[list[Owed]] = [[]]
        for delivery in deliveries:
            owed = Owed(delivery.id, delivery.attempt + 1)
            was_lost = delivery.status == DeliveryStatus.RUNNING or delivery.last_error is not None
            if delivery.was_not_called and was_lost:
                groups.append([owed])
            else:
                groups[0].append(owed)
        try:
            for group in filter(None, groups):
                self._publisher.deliver(group)
        except PublishFailed as error:
            _log_not_published(error)
            return None
        return room - len(deliveries)

    def _claim(self, connection: Connection, *, pending: bool) -> _Claimed:
        found = overdue.claim_overdue(
            connection,
            limit=_PAGE,
            grace_seconds=self._settings.queued_seconds,
            lapse_seconds=self._settings.lapse_seconds,
            pending=pending,
        )
        chain_ids = [delivery.chain_id for delivery in found.lapsed]
        return _Claimed(found, overdue.waiting_chains(connection, chain_ids) if chain_ids else {})

    def _settle(self, page: _Claimed) -> tuple[list[Settlement], list[_Failed]]:
        """Settle the lapsed attempts of a page. What fails for one is undone and logged for that one alone.

        Such a delivery is hidden from the relays of the next `queued_seconds`.
        """
        if not page.overdue.lapsed:
            return [], []
        definitions: dict[str, Definition] = {}
        failures: list[_Failed] = []
        for delivery in page.overdue.lapsed:
            chain = page.chains.get(delivery.chain_id)
            chain_type = None if chain is None else self._config.by_type.get(chain.chain_type)
            try:
                definitions[delivery.id] = define(delivery, chain_type, self._random)
            except BaseException as error:  # user code: the other deliveries must be settled all the same
                if ends_process(error):
                    raise
                failures.append(_Failed(delivery, error))
        settlements, more = self._database.write(partial(self._write, page.overdue.lapsed, definitions))
        return settlements, failures + more

    def _write(
        self, running: Sequence[DeliveryRecord], definitions: Mapping[str, Definition], connection: Connection
    ) -> tuple[list[Settlement], list[_Failed]]:
        grace = self._settings.queued_seconds
        expired = overdue.lock_expired(connection, running)
        chain_ids = [delivery.chain_id for delivery in running]
        free = overdue.lock_chains(connection, chain_ids)
        chains = overdue.waiting_chains(connection, chain_ids)
        now = self._database.now(connection)
        settlements: list[Settlement] = []
        failures: list[_Failed] = []
        for delivery in sorted(running, key=lambda delivery: delivery.chain_id):
            if delivery.id not in expired or (delivery.chain_id in chains and delivery.chain_id not in free):
                continue  # the attempt is just being ended, or somebody else holds the chain: the next relay sees it
            definition = definitions.get(delivery.id)
            if definition is None:
                self._set_aside(connection, delivery)
                continue
            chain = chains.get(delivery.chain_id)
            settle = partial(settle_lost, connection, delivery, chain, definition, now=now, grace_seconds=grace)
            try:
                settlements.append(alone(connection, settle))
            except Exception as error:  # whatever it is, the other deliveries must be settled all the same
                if ends_transaction(error):
                    raise
                failures.append(_Failed(delivery, error))
                self._set_aside(connection, delivery)
        return settlements, failures

    def _set_aside(self, connection: Connection, delivery: DeliveryRecord) -> None:
        """Hide a delivery from the relays of the next `queued_seconds`. Where that fails, each relay finds it again."""
        hide = partial(overdue.look_later, connection, delivery, seconds=self._settings.queued_seconds)
        try:
            alone(connection, hide)
        except DBAPIError as error:
            if ends_transaction(error):
                raise


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


def _log_failure(failure: _Failed) -> None:
    delivery = failure.delivery
    emit(
        logger,
        Action.SETTLE_FAILED,
        "chain %s: attempt %s of %s is lost and cannot be settled; a later relay will try again",
        delivery.chain_id,
        delivery.attempt,
        delivery.transition,
        error=failure.error,
        chain_id=delivery.chain_id,
        delivery_id=delivery.id,
    )


def _log_not_published(error: PublishFailed) -> None:
    emit(
        logger,
        Action.DELIVERIES_NOT_PUBLISHED,
        "relay: deliveries are not published (%s); the next relay will try again",
        error,
    )
