"""The only attempt at a delivery that an application's own process has begun with `chain.execute()`."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy.exc import DBAPIError

from dispatcher.bounds import describe, refuse_unstarted
from dispatcher.delivery.ends import finished_delivery
from dispatcher.delivery.leases import Leases
from dispatcher.delivery.recording import note_problem, recorded
from dispatcher.domain.config import Callback, ChainType, DispatcherConfig
from dispatcher.domain.records import DeliveryRecord
from dispatcher.domain.results import ChainResult
from dispatcher.errors import ServiceUnavailable, ends_process
from dispatcher.states import DeliveryStatus, Outcome
from dispatcher.storage import deliveries
from dispatcher.storage.database import Database
from dispatcher.storage.store import Store
from dispatcher.telemetry import Action, emit
from dispatcher.transition import Transition

logger = logging.getLogger(__name__)


class LocalAttempts:
    """Makes in-process attempts for one deployment."""

    def __init__(self, *, config: DispatcherConfig, database: Database, store: Store, leases: Leases) -> None:
        self._store = store
        self._config = config
        self._database = database
        self._leases = leases

    def deliver(self, result: ChainResult, callback: Callback, kwargs: Mapping[str, Any]) -> ChainResult:
        """Make the attempt at a delivery that `Executor.execute_locally` has begun; the chain's result after it.

        If the callback raises, the delivery is closed as cancelled, the chain is due, and the exception goes on
        unchanged.
        """
        assert result.delivery_id is not None and result.transition is not None
        with self._database.read() as connection:
            delivery = deliveries.read(connection, result.delivery_id)
            now = self._database.now(connection)
        if delivery is None or delivery.status != DeliveryStatus.RUNNING:  # this process was suspended meanwhile
            return replace(result, outcome=Outcome.STALE)
        transition = result.transition
        transition.idempotency_key = delivery.idempotency_key
        chain_type = self._config.get(transition.chain.chain_type)  # before the callback, which may replace the chain
        with self._leases.kept([delivery]):
            try:
                refuse_unstarted(callback(transition, **kwargs), "the callback")
            except BaseException as error:
                if isinstance(error, SystemExit) and ends_process(error):
                    raise  # a time limit: the effect is unknown, the lease ends, the relay settles it
                self._cancel(delivery, error, now)
                raise
            done = self._record_delivered(delivery, transition, chain_type, now)
        if not done:
            emit(
                logger,
                Action.END_NOT_RECORDED,
                "chain %s: its delivery %s was taken over by another process while the callback ran here",
                delivery.chain_id,
                delivery.id,
                chain_id=delivery.chain_id,
                delivery_id=delivery.id,
            )
            return replace(result, outcome=Outcome.STALE)
        return replace(result, outcome=Outcome.MOVED, state=delivery.final_state)

    def _record_delivered(
        self, delivery: DeliveryRecord, transition: Transition, chain_type: ChainType, now: datetime
    ) -> bool:
        finished = finished_delivery(delivery, transition, chain_type, now, looked=True)
        done = recorded(
            self._database,
            delivery,
            lambda: bool(self._store.finish([finished], now=now)),
            (DeliveryStatus.DELIVERED,),
        )
        if done:
            note_problem(self._database, finished, now)
        return done

    def _cancel(self, delivery: DeliveryRecord, error: BaseException, now: datetime) -> None:
        """Close the delivery as cancelled; what keeps that from being written is logged, not raised.

        The caller must see what its callback raised.
        """
        reason = describe(error)
        work = partial(
            self._database.write,
            lambda connection: deliveries.close_and_stay(connection, delivery, now=now, reason=reason),
        )
        try:
            recorded(self._database, delivery, work, (DeliveryStatus.CANCELLED,))
        except (ServiceUnavailable, DBAPIError) as problem:
            emit(
                logger,
                Action.END_NOT_RECORDED,
                "delivery %s: could not record its cancellation; the relay will settle it",
                delivery.id,
                error=problem,
                chain_id=delivery.chain_id,
                delivery_id=delivery.id,
            )
