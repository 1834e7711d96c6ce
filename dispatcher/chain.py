"""`Chain`: what applications and operators use to look at one chain and to act on it."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

from dispatcher.domain.callbacks import LocalCall, choose_local
from dispatcher.domain.config import Callback
from dispatcher.domain.evaluation import GuardFailed
from dispatcher.domain.records import ChainEvent, ChainRecord, DeliveryRecord, Request, unsaved_record
from dispatcher.domain.resources import Resource
from dispatcher.domain.results import ChainResult
from dispatcher.errors import (
    ChainDisabled,
    ChainLocked,
    ChainMissing,
    ChainNotDue,
    ChainPaused,
    ConfigurationError,
    DeliveryPending,
)
from dispatcher.operators.operations import SeenDelivery
from dispatcher.requests.checks import checked_requester, registered_name
from dispatcher.services import Services
from dispatcher.states import NEW, EventAction, Outcome
from dispatcher.storage import deliveries, history, overview
from dispatcher.storage.store import read_one

_RAISED: Final = {
    Outcome.LOCKED: ChainLocked,
    Outcome.RESTING: ChainNotDue,
    Outcome.DISABLED: ChainDisabled,
    Outcome.PAUSED: ChainPaused,
    Outcome.PENDING: DeliveryPending,
    Outcome.MISSING: ChainMissing,
}


class Chain:
    """A chain as it was when it was read; `refresh()` reads it again. Chains with the same id are equal."""

    def __init__(self, services: Services, record: ChainRecord) -> None:
        self._services = services
        self._record = record
        self.errors: dict[str, list[str]] = {}

    @classmethod
    def unsaved(
        cls,
        services: Services,
        type_name: str,
        resources: tuple[Resource, ...],
        context: Mapping[str, Any] | None,
    ) -> "Chain":
        """A chain that is not in the database, for dry runs: its `id` is None."""
        with services.database.read() as connection:
            now = services.database.now(connection)
        return cls(services, unsaved_record(type_name, resources, context, now))

    @property
    def id(self) -> int | None:
        """The chain's id; None only for a chain that a dry run did not create."""
        return self._record.id or None

    @property
    def chain_type(self) -> str:
        """The name of the chain type."""
        return self._record.chain_type

    @property
    def state(self) -> str:
        """The state in which the chain was when it was read."""
        return self._record.state

    @property
    def resources(self) -> tuple[Resource, ...]:
        """The chain's `(resource_type, resource_id)` pairs, sorted."""
        return self._record.resources

    @property
    def disabled(self) -> bool:
        """Whether the chain is disabled."""
        return self._record.disabled

    @property
    def next_update_at(self) -> datetime | None:
        """The moment until which the chain rests (aware UTC), or None."""
        return self._record.next_update_at

    @property
    def date_next_update(self) -> datetime | None:
        """The ancestor's name for `next_update_at`."""
        return self._record.next_update_at

    @property
    def due_at(self) -> datetime | None:
        """The moment from which sweeps look at the chain (aware UTC), or None."""
        return self._record.due_at

    @property
    def created_at(self) -> datetime:
        """When the chain was created (aware UTC)."""
        return self._record.created_at

    @property
    def events(self) -> list[ChainEvent]:
        """The chain's history, oldest event first; read now."""
        with self._services.database.read() as connection:
            return history.events(connection, self._record.id)

    @property
    def deliveries(self) -> list[DeliveryRecord]:
        """The chain's deliveries, newest first, at most 1000; read now."""
        with self._services.database.read() as connection:
            return overview.listing(connection, chain_id=self._record.id, limit=1000)

    @property
    def open_delivery(self) -> DeliveryRecord | None:
        """The delivery that the chain waited for when it was read, as it is now; None if there was none."""
        if self._record.pending_delivery_id is None:
            return None
        with self._services.database.read() as connection:
            return deliveries.read(connection, self._record.pending_delivery_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and other.id is not None and other.id == self.id

    def __hash__(self) -> int:
        return hash((Chain, self._record.id))

    def __repr__(self) -> str:
        return f"<Chain {self.id} {self.chain_type} {self.state}>"

    def refresh(self) -> "Chain":
        """This chain, read again. Raises `ChainMissing`."""
        if self.id is not None:
            self._record = read_one(self._services.store, self.id)
        return self

    def execute(
        self,
        *,
        initial_context: Mapping[str, Any] | None = None,
        callback: Callback | str | None = None,
        callback_kwargs: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        requested_by: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate the chain in this process, call the callback of the winner, and move the chain.

        Returns `{"errors": {str(transition): [reasons]}, "dry_run": bool, "transition": transition.to_dict() or None,
        "chain": {"id", "state"}, "outcome": str}`. An error of a guard or of the callback is raised unchanged; the
        chain has then not moved, and it is due. Raises `ChainLocked`, `ChainNotDue`, `ChainDisabled` (`ChainPaused` if
        its chain type is paused), `DeliveryPending` or `ChainMissing`; a dry run does not raise these, it returns them
        as its outcome.
        """
        services = self._services
        chain_type = services.config.get(self.chain_type)
        if isinstance(callback, str):
            registered_name(chain_type, callback)
            callback = chain_type.callbacks[callback]
        elif callback is not None and not callable(callback):
            raise ConfigurationError(
                "a callback must be callable or a registered name", f"chain type {self.chain_type!r}"
            )
        call = LocalCall(callback, dict(callback_kwargs or {}))
        dry_run = dry_run or services.settings.dry_run or self.id is None
        try:
            result = self._plan(call, initial_context) if dry_run else self._run(call, initial_context, requested_by)
        except GuardFailed as error:
            raise error.__cause__ or error from None
        self.errors = dict(result.errors)
        if not dry_run:
            if result.outcome in _RAISED:
                raise _RAISED[result.outcome](self._record.id, result.detail)
            self.refresh()
        return self._result(result, dry_run=dry_run)

    def enqueue(
        self,
        *,
        initial_context: Mapping[str, Any] | None = None,
        callback: str | Callback | None = None,
        callback_kwargs: Mapping[str, Any] | None = None,
        requested_by: str | None = None,
        dry_run: bool = False,
        best_effort: bool = False,
    ) -> str | None:
        """Have the workers execute the chain; gives the task's id. See `Dispatcher.enqueue`. Raises `ChainMissing`."""
        return self._services.requests.enqueue_chain(
            self._record,
            initial_context=initial_context,
            callback=callback,
            callback_kwargs=callback_kwargs,
            requested_by=requested_by,
            dry_run=dry_run,
            best_effort=best_effort,
        )

    # The acts of operators. All raise `DryRunRefused` if `DISPATCHER_DRY_RUN` is set.

    def disable(self, requested_by: str | None = None, *, reason: str | None = None) -> "Chain":
        """Stop new plans and attempts, and return this chain, read again. A running attempt still ends and moves it."""
        operations = self._services.operations
        operations.set_disabled(self._record.id, disabled=True, requested_by=requested_by, reason=reason)
        return self.refresh()

    def enable(self, requested_by: str | None = None, *, reason: str | None = None) -> "Chain":
        """Undo `disable`, and return this chain, read again. The chain is due, or its open delivery continues."""
        operations = self._services.operations
        operations.set_disabled(self._record.id, disabled=False, requested_by=requested_by, reason=reason)
        return self.refresh()

    def reset(self, requested_by: str | None = None, *, reason: str | None = None) -> "Chain":
        """Put the chain back to NEW, and return it, read again.

        The delivery that the chain waits for now is cancelled, even if it was planned after this object was read.
        Raises `DeliveryPending` while an attempt runs.
        """
        operations = self._services.operations
        operations.put(self._record.id, NEW, EventAction.RESET, reason=reason, requested_by=requested_by)
        return self.refresh()

    def move_to(self, state: str, reason: str, requested_by: str | None = None) -> "Chain":
        """Put the chain into a state of its chain type, and return it, read again.

        The delivery that the chain waits for now is cancelled, as by `reset`. Raises `ConfigurationError` for an
        unknown state, `DeliveryPending` while an attempt runs.
        """
        if state not in self._services.config.get(self.chain_type).states:
            raise ConfigurationError("unknown state", f"chain type {self.chain_type!r}, state {state!r}")
        operations = self._services.operations
        operations.put(self._record.id, state, EventAction.MOVED, reason=reason, requested_by=requested_by)
        return self.refresh()

    def retry_delivery(self, requested_by: str | None = None, *, reason: str | None = None) -> "Chain":
        """Attempt the open delivery again at once, and return this chain, read again.

        A dead or held delivery gets further attempts: `max_attempts` is raised, `attempt` is never lowered. It acts on
        the delivery that the chain waited for when it was read; if it waits for another one now, that is left alone.
        Raises `NoOpenDelivery`, `DeliveryChanged`, or `DeliveryPending` while an attempt runs.
        """
        self._services.operations.retry_delivery(self._seen(), requested_by=requested_by, reason=reason)
        return self.refresh()

    def cancel_delivery(self, requested_by: str | None = None, reason: str = "cancelled by hand") -> "Chain":
        """Close the open delivery as cancelled, and return this chain, read again.

        The chain stays in its state and is due. Chooses the delivery and raises errors as `retry_delivery`.
        """
        self._services.operations.cancel_delivery(self._seen(), reason=reason, requested_by=requested_by)
        return self.refresh()

    def skip_delivery(self, requested_by: str | None = None, reason: str = "skipped by hand") -> "Chain":
        """Close the open delivery as skipped, and return this chain, read again.

        The chain moves as if the delivery had succeeded. Chooses the delivery and raises errors as `retry_delivery`.
        """
        self._services.operations.skip_delivery(self._seen(), reason=reason, requested_by=requested_by)
        return self.refresh()

    def explain(self) -> dict[str, Any]:
        """Why the chain does or does not move: its row, its open delivery and the answers of its candidates.

        Changes nothing.
        """
        services = self._services
        self.refresh()
        record, delivery = self._record, self.open_delivery
        result = services.dry_run.plan_as_worker(self.id, type_name=record.chain_type, resources=record.resources)
        winner = result.transition
        return {
            "id": self.id,
            "chain_type": record.chain_type,
            "state": record.state,
            "resources": [list(pair) for pair in record.resources],
            "outcome": str(result.outcome),
            "would_take": type(winner).__name__ if winner is not None else None,
            "would_reach": winner.final_state if winner is not None else None,
            "callback": result.callback,
            "errors": {label: list(reasons) for label, reasons in result.errors.items()},
            "detail": result.detail,
            "disabled": record.disabled,
            "due_at": record.due_at,
            "next_update_at": record.next_update_at,
            "failures": record.failures,
            "requested_by": record.request.requested_by if record.request else None,
            "has_request": record.request is not None,
            "delivery": None if delivery is None else _shown(delivery),
        }

    # --- inside ------------------------------------------------------------------------------------------------------

    def _seen(self) -> SeenDelivery:
        return SeenDelivery(self._record.id, self._record.pending_delivery_id)

    def _plan(self, call: LocalCall, context: Mapping[str, Any] | None) -> ChainResult:
        return self._services.dry_run.plan(
            self.id,
            type_name=self.chain_type,
            resources=self.resources,
            stored_context=self._record.context,
            asked=Request(context),
            local=call,
        )

    def _run(self, call: LocalCall, context: Mapping[str, Any] | None, requested_by: str | None) -> ChainResult:
        services = self._services
        asked = Request(context, requested_by=checked_requester(requested_by))
        result = services.executor.execute_locally(self._record.id, call=call, asked=asked)
        chain_type = services.config.get(self.chain_type)
        if result.outcome == Outcome.PLANNED:
            assert result.transition is not None
            choice = choose_local(chain_type, result.transition, call)
            assert choice.call is not None
            result = services.local_attempts.deliver(result, choice.call, call.kwargs)
        if chain_type.candidates(result.state):
            services.executor.publish_follow_ups([result], chain_type)
        return result

    def _result(self, result: ChainResult, *, dry_run: bool) -> dict[str, Any]:
        return {
            "errors": self.errors,
            "dry_run": dry_run,
            "transition": result.transition.to_dict() if result.transition is not None else None,
            "chain": {"id": self.id, "state": self.state},
            "outcome": str(result.outcome),
        }


def _shown(delivery: DeliveryRecord) -> dict[str, Any]:
    return {key: value for key, value in asdict(delivery).items() if key not in ("kwargs", "context")}
