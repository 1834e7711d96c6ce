"""`Dispatcher` and `Chain`: what applications, workers, the command line and the web page call."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from dispatcher import chains, deliveries
from dispatcher.chains import ChainRecord, Request, Resource, checked_json, clean_resources
from dispatcher.config import Callback, ChainType, DispatcherConfig
from dispatcher.database import Database
from dispatcher.decisions import ChainResult, LocalCall, choose_local, unsaved_record
from dispatcher.deliveries import DeliveryRecord, Owed
from dispatcher.delivery import AttemptResult, Attempts
from dispatcher.embedded import default_database_url, find_running
from dispatcher.errors import (
    ChainDisabled,
    ChainLocked,
    ChainMissing,
    ChainNotDue,
    ConfigurationError,
    DeliveryPending,
    EnqueueNotPublished,
)
from dispatcher.evaluation import GuardFailed
from dispatcher.executor import Executor
from dispatcher.locks import ChainLocks
from dispatcher.migrations import require_current
from dispatcher.models import MAX_REQUESTED_BY, EventRow
from dispatcher.publisher import REQUESTS_QUEUE, CeleryApp, Publisher, PublishFailed
from dispatcher.settings import Settings, broker_url_from_redis, embedded_directory
from dispatcher.states import NEW, AttemptOutcome, DeliveryStatus, EventAction, Outcome
from dispatcher.sweep import Sweeper

logger = logging.getLogger(__name__)

_RAISED: Final = {
    Outcome.LOCKED: ChainLocked,
    Outcome.RESTING: ChainNotDue,
    Outcome.DISABLED: ChainDisabled,
    Outcome.PENDING: DeliveryPending,
    Outcome.MISSING: ChainMissing,
}
Clock = Callable[[], datetime]


class Dispatcher:
    """The chains of one deployment.

    `config` is the ancestor's dict `{"chains": [{"chain_type": ..., "transitions": {...}}, ...]}` or its typed form;
    it is validated here, and `ConfigurationError` names chain type, state and transition. URLs not given come from
    `settings`, else from `DISPATCHER_*` environment variables, else from the embedded default. `celery_app` publishes
    the messages (default: a bare app made from the settings). `clock` gives the domain time as aware datetimes
    (default: the database's clock). Nothing is connected before it is needed.
    """

    def __init__(
        self,
        config: DispatcherConfig | Mapping[str, Any] | Sequence[ChainType],
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
        broker_url: str | None = None,
        settings: Settings | None = None,
        celery_app: CeleryApp | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = DispatcherConfig.parse(config)
        self.settings = settings if settings is not None else Settings()
        directory = embedded_directory()
        if clock is None and self.settings.clock is not None:
            clock = _load(self.settings.clock, "DISPATCHER_CLOCK")
        redis_url = redis_url or self.settings.redis_url or find_running(directory)
        self.redis_url: str | None = redis_url
        broker_url = broker_url or self.settings.broker_url or (broker_url_from_redis(redis_url) if redis_url else None)
        self.broker_url: str | None = broker_url
        self.database = Database(
            database_url or self.settings.database_url or default_database_url(directory),
            connect_seconds=self.settings.connect_seconds,
            clock=clock,
        )
        self._locks = ChainLocks(
            redis_url,
            prefix=self.settings.prefix,
            lock_seconds=self.settings.lock_seconds,
            connect_seconds=self.settings.connect_seconds,
        )
        self._publisher = Publisher(self.settings, broker_url=broker_url, app=celery_app)
        parts: dict[str, Any] = {
            "config": self.config,
            "settings": self.settings,
            "database": self.database,
            "publisher": self._publisher,
        }
        self._executor = Executor(**parts, locks=self._locks)
        self._attempts = Attempts(**parts)
        self._sweeper = Sweeper(**parts, locks=self._locks)
        self._migrated = False

    def __repr__(self) -> str:
        return f"<Dispatcher {', '.join(self.config.by_type) or 'without chain types'} on {self.database.address}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def from_settings(cls, settings: Settings | None = None, *, celery_app: CeleryApp | None = None) -> "Dispatcher":
        """The dispatcher of the configuration that `DISPATCHER_CONFIG` names."""
        settings = settings if settings is not None else Settings()
        if settings.config is None:
            raise ConfigurationError(
                "is not set; it names the configuration as package.module:ATTRIBUTE", "DISPATCHER_CONFIG"
            )
        config = _load(settings.config, "DISPATCHER_CONFIG")
        return cls(config.config if isinstance(config, cls) else config, settings=settings, celery_app=celery_app)

    # --- chains ------------------------------------------------------------------------------------------------------

    def get_or_create_resource_chain(
        self,
        chain_type: str,
        rsc_mappings: Iterable[tuple[str, str]],
        can_be_subset: bool = False,  # noqa: FBT001, FBT002 - the ancestor's signature
        initial_context: Mapping[str, Any] | None = None,
    ) -> "Chain":
        """The chain of this type with exactly these resources, created in NEW if there is none.

        With `can_be_subset=True` the one chain that has at least these resources; several: `AmbiguousChain`.
        `initial_context` is stored at creation and ignored for an existing chain. Raises `ConfigurationError` for an
        unknown type, `InvalidResource` and `NotSerializable` for values that do not fit.
        """
        config = self.config.get(chain_type)
        resources = clean_resources(rsc_mappings)
        context = checked_json("initial_context", initial_context)

        def find(session: Session) -> int | None:
            look = chains.find_containing if can_be_subset else chains.find_exact
            return look(session, chain_type, resources)

        self._ready()
        with self.database.read() as session:
            chain_id = find(session)
            record = chains.read_many(session, [chain_id]).get(chain_id) if chain_id is not None else None
        if record is not None:
            return Chain(self, record)
        if self.settings.dry_run:
            return Chain.unsaved(self, chain_type, resources, context)

        def work(session: Session) -> ChainRecord:
            found = find(session)  # another caller may have been faster
            return chains.read_one(
                session, found if found is not None else self._create(session, config, resources, context)
            )

        return Chain(self, self.database.write(work))

    def chain(self, chain_id: int) -> "Chain":
        """The chain with this id; `ChainMissing` if there is none."""
        self._ready()
        with self.database.read() as session:
            return Chain(self, chains.read_one(session, chain_id))

    def find_chains(
        self,
        *,
        chain_type: str | None = None,
        state: str | None = None,
        resource: tuple[str, str] | None = None,
        after_id: int = 0,
        limit: int = 50,
    ) -> "list[Chain]":
        """Chains by type and state, or by one resource, in the order of their ids, at most `limit` after `after_id`."""
        self._ready()
        with self.database.read() as session:
            if resource is not None:
                (pair,) = clean_resources([resource])
                ids = chains.list_by_resource(session, pair, after_id=after_id, limit=limit)
            else:
                ids = chains.list_ids(session, chain_type=chain_type, state=state, after_id=after_id, limit=limit)
            records = chains.read_many(session, ids)
        found = [Chain(self, records[chain_id]) for chain_id in ids if chain_id in records]
        return [
            chain
            for chain in found
            if (chain_type is None or chain.chain_type == chain_type) and (state is None or chain.state == state)
        ]

    def find_deliveries(
        self,
        *,
        chain_id: int | None = None,
        chain_type: str | None = None,
        statuses: Sequence[DeliveryStatus] = (),
        limit: int = 100,
    ) -> list[DeliveryRecord]:
        """Deliveries by chain, chain type and status, newest first, at most `limit`."""
        self._ready()
        with self.database.read() as session:
            return deliveries.listing(session, chain_id=chain_id, chain_type=chain_type, statuses=statuses, limit=limit)

    def stats(self) -> dict[str, Any]:
        """Counts `{"chains", "due", "next_due_at", "open_deliveries", "deliveries": {status: n}}`; reads all chains."""
        self._ready()
        with self.database.read() as session:
            return chains.statistics(session, now=self.database.now(session))

    # --- on demand ---------------------------------------------------------------------------------------------------

    def enqueue(
        self,
        chain_type: str,
        rsc_mappings: Iterable[tuple[str, str]],
        *,
        initial_context: Mapping[str, Any] | None = None,
        callback: str | Callback | None = None,
        callback_kwargs: Mapping[str, Any] | None = None,
        requested_by: str | None = None,
        dry_run: bool = False,
        best_effort: bool = False,
    ) -> str | None:
        """Ask the workers to execute the chain with these resources (created if absent); the task's id.

        The request is written to the chain's row first: should the message get lost, the next sweep does the work.
        Raises `EnqueueNotPublished` when it could not be published (with `best_effort=True`: returns None).
        """
        config = self.config.get(chain_type)
        resources = clean_resources(rsc_mappings)
        request = self._request(config, initial_context, callback, callback_kwargs, requested_by)
        self._ready()
        if dry_run or self.settings.dry_run:
            with self.database.read() as session:
                chain_id = chains.find_exact(session, chain_type, resources)
            return self._publish_dry_run(chain_id, chain_type, resources, request)
        chain_id = self.database.write(lambda session: self._write_request(session, config, resources, request))
        return self._publish_request(chain_id, best_effort=best_effort)

    def enqueue_on_commit(
        self,
        session: Session,
        chain_type: str,
        rsc_mappings: Iterable[tuple[str, str]],
        *,
        initial_context: Mapping[str, Any] | None = None,
        callback: str | Callback | None = None,
        callback_kwargs: Mapping[str, Any] | None = None,
        requested_by: str | None = None,
        dry_run: bool = False,
    ) -> None:
        """Enqueue when the caller's SQLAlchemy session commits, and not at all if it rolls back.

        Where the session is on the dispatcher's own database the request is written in the caller's transaction, so
        that nothing is lost between its commit and the message. Arguments are checked now.
        """
        config = self.config.get(chain_type)
        resources = clean_resources(rsc_mappings)
        request = self._request(config, initial_context, callback, callback_kwargs, requested_by)
        options: dict[str, Any] = {
            "initial_context": request.context,
            "callback": request.callback,
            "callback_kwargs": request.kwargs,
            "requested_by": requested_by,
        }
        if dry_run or self.settings.dry_run:
            _after_commit(session, lambda: self.enqueue(chain_type, resources, dry_run=True, **options))
        elif self._shares_database(session):
            self._ready()
            chain_id = self._write_request(session, config, resources, request)
            _after_commit(session, lambda: self._publish_request(chain_id, best_effort=True))
        else:
            _after_commit(session, lambda: self.enqueue(chain_type, resources, best_effort=True, **options))

    # --- workers -----------------------------------------------------------------------------------------------------

    def execute_chains(self, chain_ids: Sequence[int]) -> list[ChainResult]:
        """Execute these chains as a worker does; one result for each."""
        self._ready()
        if self.settings.dry_run:
            return [self.plan_chain(chain_id) for chain_id in chain_ids]
        return self._executor.execute(chain_ids)

    def plan_chain(
        self,
        chain_id: int | None,
        *,
        chain_type: str = "",
        resources: Iterable[tuple[str, str]] = (),
        context: Mapping[str, Any] | None = None,
        callback: str | None = None,
    ) -> ChainResult:
        """Dry run one chain as a worker does: log what is planned, and do nothing. Unknown ones are planned as NEW."""
        self._ready()
        checked: tuple[Resource, ...] = ()
        if chain_id is None:
            self.config.get(chain_type)
            checked = clean_resources(resources)
        try:
            return self._executor.dry_run(
                chain_id, chain_type=chain_type, resources=checked, context=context, callback=callback
            )
        except GuardFailed as error:
            logger.error("dry run of chain %s: %s", chain_id, error, exc_info=error)  # noqa: TRY400 - with its cause
            return ChainResult(chain_id, Outcome.GUARD_FAILED, error=error.__cause__, detail=str(error))

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; one result for each."""
        self._ready()
        if self.settings.dry_run:
            return [AttemptResult(one.delivery_id, one.attempt, AttemptOutcome.DRY_RUN) for one in owed]
        return self._attempts.deliver(owed)

    def sweep(self, *, tick: bool = False, dry_run: bool = False) -> dict[str, Any]:
        """Publish one execution per due chain: `{"due", "enqueued", "already_queued", "oldest_due_seconds"}`.

        `tick=True` is for beats: only the first within the interval does anything. Raises `ServiceUnavailable`.
        """
        self._ready()
        try:
            return self._sweeper.sweep(tick=tick, dry_run=dry_run or self.settings.dry_run)
        except PublishFailed as error:
            raise self._publisher.unavailable(error) from error

    def relay(self, *, tick: bool = False) -> dict[str, Any]:
        """Publish deliveries whose message was lost, settle those whose worker died: `{"relayed", "settled"}`."""
        self._ready()
        if self.settings.dry_run:
            return {"relayed": 0, "settled": 0, "dry_run": True}
        return self._sweeper.relay(tick=tick)

    def prune(self, *, days: float | None = None, tick: bool = False) -> dict[str, Any]:
        """Delete events and closed deliveries older than `days` (default: the setting): `{"events", "deliveries"}`."""
        self._ready()
        if self.settings.dry_run:
            return {"events": 0, "deliveries": 0, "dry_run": True}
        return self._sweeper.prune(days=days, tick=tick)

    # --- operation ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ServiceUnavailable` or `DatabaseNotMigrated` unless database and broker can be used."""
        self.database.check()
        self._ready()
        self.check_broker()

    def check_broker(self) -> None:
        """Raise `ServiceUnavailable` unless the broker, if there is one, answers."""
        if self._publisher.configured:
            self._publisher.check()

    def check_locks(self) -> None:
        """Raise `ServiceUnavailable` unless the lock server, if there is one, answers."""
        self._locks.check()

    def after_fork(self) -> None:
        """Leave the parent process's connections alone: this process opens its own."""
        self.database.dispose(close=False)

    def close(self) -> None:
        """Close this process's connections; the dispatcher can be used again."""
        self.database.dispose()
        self._locks.close()
        self._publisher.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        if not self._migrated:
            require_current(self.database)
            self._migrated = True

    def _create(
        self,
        session: Session,
        config: ChainType,
        resources: Sequence[Resource],
        context: Mapping[str, Any] | None,
    ) -> int:
        now = self.database.now(session)
        return chains.create(
            session,
            chain_type=config.chain_type,
            resources=resources,
            context=context,
            due_at=now if config.candidates(NEW) else None,
            now=now,
        )

    def _write_request(
        self, session: Session, config: ChainType, resources: Sequence[Resource], request: Request
    ) -> int:
        chain_id = chains.find_exact(session, config.chain_type, resources)
        if chain_id is None:
            chain_id = self._create(session, config, resources, None)
        chains.write_request(session, chain_id, request, now=self.database.now(session))
        return chain_id

    def _request(
        self,
        config: ChainType,
        initial_context: Mapping[str, Any] | None,
        callback: str | Callback | None,
        callback_kwargs: Mapping[str, Any] | None,
        requested_by: str | None,
    ) -> Request:
        return Request(
            checked_json("initial_context", initial_context),
            registered_name(config, callback),
            checked_json("callback_kwargs", callback_kwargs),
            checked_requester(requested_by),
        )

    def _publish_request(self, chain_id: int, *, best_effort: bool) -> str | None:
        try:
            if not self._publisher.configured:
                raise PublishFailed("no broker is configured")
            return self._publisher.execute([chain_id], queue=REQUESTS_QUEUE)
        except PublishFailed as error:
            if best_effort:
                logger.warning("chain %s: request written, not published (%s)", chain_id, error)
                return None
            raise EnqueueNotPublished(chain_id, str(error)) from error

    def _publish_dry_run(
        self, chain_id: int | None, chain_type: str, resources: Sequence[Resource], request: Request
    ) -> str:
        plan = {
            "chain_type": chain_type,
            "resources": [list(pair) for pair in resources],
            "context": request.context,
            "callback": request.callback,
        }
        try:
            if not self._publisher.configured:
                raise PublishFailed("no broker is configured")
            ids = [] if chain_id is None else [chain_id]
            return self._publisher.execute(ids, queue=REQUESTS_QUEUE, dry_run=True, plan=plan)
        except PublishFailed as error:
            raise EnqueueNotPublished(chain_id or 0, str(error), written=False) from error

    def _shares_database(self, session: Session) -> bool:
        bind = session.get_bind()
        ours, theirs = self.database.url, bind.engine.url
        if self.database.dialect == "sqlite":
            files = {Path(str(url.database)).absolute() for url in (ours, theirs)}
            return theirs.get_backend_name() == "sqlite" and len(files) == 1
        same = ("host", "port", "database")
        return ours.get_backend_name() == theirs.get_backend_name() and all(
            getattr(ours, name) == getattr(theirs, name) for name in same
        )


class Chain:
    """One chain, as it was when it was read; `refresh()` reads it again. Chains with the same id are equal."""

    def __init__(self, dispatcher: Dispatcher, record: ChainRecord) -> None:
        self._dispatcher = dispatcher
        self._record = record
        self.errors: dict[str, list[str]] = {}

    @classmethod
    def unsaved(
        cls,
        dispatcher: Dispatcher,
        chain_type: str,
        resources: tuple[Resource, ...],
        context: Mapping[str, Any] | None,
    ) -> "Chain":
        """A chain that is not in the database, for dry runs: its `id` is None."""
        with dispatcher.database.read() as session:
            now = dispatcher.database.now(session)
        return cls(dispatcher, unsaved_record(chain_type, resources, context, now))

    @property
    def id(self) -> int | None:
        """The chain's id; None only for one that a dry run did not create."""
        return self._record.id or None

    @property
    def chain_type(self) -> str:
        """The name of its configuration."""
        return self._record.chain_type

    @property
    def state(self) -> str:
        """The state it was in when it was read."""
        return self._record.state

    @property
    def resources(self) -> tuple[Resource, ...]:
        """Its `(resource_type, resource_id)` pairs, sorted."""
        return self._record.resources

    @property
    def disabled(self) -> bool:
        """Whether it is disabled."""
        return self._record.disabled

    @property
    def next_update_at(self) -> datetime | None:
        """Until when it rests (aware UTC), or None."""
        return self._record.next_update_at

    @property
    def date_next_update(self) -> datetime | None:
        """The ancestor's name for `next_update_at`."""
        return self._record.next_update_at

    @property
    def due_at(self) -> datetime | None:
        """When a sweep looks at it next (aware UTC), or None."""
        return self._record.due_at

    @property
    def created_at(self) -> datetime:
        """When it was created (aware UTC)."""
        return self._record.created_at

    @property
    def events(self) -> list[EventRow]:
        """Its history, oldest first, read now."""
        with self._dispatcher.database.read() as session:
            return chains.events(session, self._record.id)

    @property
    def deliveries(self) -> list[DeliveryRecord]:
        """Its deliveries, newest first, read now."""
        return self._dispatcher.find_deliveries(chain_id=self._record.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and other.id is not None and other.id == self.id

    def __hash__(self) -> int:
        return hash((Chain, self._record.id))

    def __repr__(self) -> str:
        return f"<Chain {self.id} {self.chain_type} {self.state}>"

    def refresh(self) -> "Chain":
        """This chain, read again. Raises `ChainMissing`."""
        if self.id is not None:
            with self._dispatcher.database.read() as session:
                self._record = chains.read_one(session, self.id)
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
        """Evaluate the chain here and now, and take its transition, callback included.

        Returns `{"errors": {str(transition): [reasons]}, "dry_run": bool, "transition": transition.to_dict() or None,
        "chain": {"id", "state"}, "outcome": str}`. What a guard or the callback raises goes on unchanged: the state has
        then not moved and the chain is due. Raises `ChainLocked`, `ChainNotDue`, `ChainDisabled`, `DeliveryPending` or
        `ChainMissing`; a dry run reports these as its outcome.
        """
        dispatcher = self._dispatcher
        config = dispatcher.config.get(self.chain_type)
        if isinstance(callback, str):
            registered_name(config, callback)
            callback = config.callbacks[callback]
        elif callback is not None and not callable(callback):
            raise ConfigurationError(
                "a callback must be callable or a registered name", f"chain type {self.chain_type!r}"
            )
        call = LocalCall(callback, dict(callback_kwargs or {}))
        dry_run = dry_run or dispatcher.settings.dry_run or self.id is None
        try:
            result = self._plan(call, initial_context) if dry_run else self._run(call, initial_context, requested_by)
        except GuardFailed as error:
            raise error.__cause__ or error from None
        self.errors = dict(result.errors)
        if not dry_run:
            if result.outcome in _RAISED:
                raise _RAISED[result.outcome](self._record.id)
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
        """Ask the workers to execute the chain; the task's id. See `Dispatcher.enqueue`. Raises `ChainMissing`."""
        dispatcher = self._dispatcher
        config = dispatcher.config.get(self.chain_type)
        request = dispatcher._request(config, initial_context, callback, callback_kwargs, requested_by)
        if dry_run or dispatcher.settings.dry_run or self.id is None:
            return dispatcher._publish_dry_run(self.id, self.chain_type, self.resources, request)
        chain_id = self.id
        dispatcher.database.write(
            lambda session: chains.write_request(session, chain_id, request, now=dispatcher.database.now(session))
        )
        return dispatcher._publish_request(chain_id, best_effort=best_effort)

    def disable(self, requested_by: str | None = None) -> "Chain":
        """Stop new plans and new attempts; an attempt under way finishes and moves. This chain, read again."""
        return self._set_disabled(requested_by, disabled=True)

    def enable(self, requested_by: str | None = None) -> "Chain":
        """Undo `disable`: the chain is due, a delivery it owes goes on. This chain, read again."""
        return self._set_disabled(requested_by, disabled=False)

    def reset(self, requested_by: str | None = None) -> "Chain":
        """Put the chain back to NEW, cancelling a delivery it owes. Raises `DeliveryPending` while an attempt runs."""
        return self._put(NEW, EventAction.RESET, None, requested_by)

    def move_to(self, state: str, reason: str, requested_by: str | None = None) -> "Chain":
        """Put the chain into a state of its configuration, cancelling a delivery it owes.

        Raises `ConfigurationError` for an unknown state, `DeliveryPending` while an attempt runs.
        """
        if state not in self._dispatcher.config.get(self.chain_type).states:
            raise ConfigurationError("unknown state", f"chain type {self.chain_type!r}, state {state!r}")
        return self._put(state, EventAction.MOVED, reason, requested_by)

    def explain(self) -> dict[str, Any]:
        """Why the chain does or does not move: its row, open delivery, what each candidate says; nothing changes."""
        dispatcher = self._dispatcher
        self.refresh()
        record = self._record
        delivery = None
        if record.pending_delivery_id is not None:
            with dispatcher.database.read() as session:
                delivery = deliveries.read(session, record.pending_delivery_id)
        result = dispatcher.plan_chain(self.id, chain_type=record.chain_type, resources=record.resources)
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
            "delivery": _shown(delivery),
        }

    # --- inside ------------------------------------------------------------------------------------------------------

    def _plan(self, call: LocalCall, context: Mapping[str, Any] | None) -> ChainResult:
        return self._dispatcher._executor.dry_run(
            self.id,
            chain_type=self.chain_type,
            resources=self.resources,
            stored_context=self._record.context,
            context=context or {},
            local=call,
        )

    def _run(self, call: LocalCall, context: Mapping[str, Any] | None, requested_by: str | None) -> ChainResult:
        dispatcher = self._dispatcher
        result = dispatcher._executor.execute_locally(
            self._record.id, call=call, context=context or {}, requested_by=checked_requester(requested_by)
        )
        chain_type = dispatcher.config.get(self.chain_type)
        if result.outcome == Outcome.PLANNED:
            assert result.transition is not None
            choice = choose_local(chain_type, result.transition, call)
            assert choice.call is not None
            result = dispatcher._attempts.deliver_locally(result, choice.call, call.kwargs)
        if chain_type.candidates(result.state):
            dispatcher._executor.publish_follow_ups([result], chain_type)
        return result

    def _result(self, result: ChainResult, *, dry_run: bool) -> dict[str, Any]:
        return {
            "errors": self.errors,
            "dry_run": dry_run,
            "transition": result.transition.to_dict() if result.transition is not None else None,
            "chain": {"id": self.id, "state": self.state},
            "outcome": str(result.outcome),
        }

    def _set_disabled(self, requested_by: str | None, *, disabled: bool) -> "Chain":
        chain_id = self._record.id
        database = self._dispatcher.database

        def work(session: Session) -> None:
            now = database.now(session)
            if chains.set_disabled(session, chain_id, disabled=disabled, requested_by=requested_by, now=now):
                deliveries.follow_disabling(session, chain_id, disabled=disabled)

        database.write(work)
        return self.refresh()

    def _put(self, state: str, action: EventAction, reason: str | None, requested_by: str | None) -> "Chain":
        dispatcher = self._dispatcher
        config = dispatcher.config.get(self.chain_type)
        chain_id = self._record.id

        def work(session: Session) -> None:
            now = dispatcher.database.now(session)
            record = chains.read_one(session, chain_id, lock=True)
            if record.pending_delivery_id is not None:
                delivery = deliveries.read(session, record.pending_delivery_id, lock=True)
                if delivery is None or delivery.status == DeliveryStatus.RUNNING:
                    raise DeliveryPending(chain_id, "an attempt is running")
                text = f"{action} to {state}" + (f": {reason}" if reason else "")
                if not deliveries.close_and_stay(session, delivery, now=now, reason=text, requested_by=requested_by):
                    raise DeliveryPending(chain_id, "its delivery changed meanwhile")
                record = chains.read_one(session, chain_id, lock=True)
            chains.set_state(
                session,
                record,
                state=state,
                action=action,
                due_at=now if config.candidates(state) else None,
                requested_by=requested_by,
                reason=reason,
                now=now,
            )

        dispatcher.database.write(work)
        return self.refresh()


def registered_name(config: ChainType, callback: str | Callback | None) -> str | None:
    """The name under which a callback is registered with its chain type; `ConfigurationError` if it is not."""
    path = f"chain type {config.chain_type!r}"
    if callback is None:
        return None
    if isinstance(callback, str):
        if callback not in config.callbacks:
            known = ", ".join(map(repr, config.callbacks)) or "none"
            raise ConfigurationError(f"no callback is registered as {callback!r} (registered: {known})", path)
        return callback
    for name, function in config.callbacks.items():
        if function is callback:
            return name
    name = getattr(callback, "__name__", "")
    if not name.isidentifier():
        name = "a_name"
    raise ConfigurationError(
        f'another process cannot find this function: register it as "callbacks": {{{name!r}: <function>}} '
        f"and enqueue with callback={name!r}",
        path,
    )


def checked_requester(requested_by: str | None) -> str | None:
    """`requested_by`, if it is text that fits its column; `ValueError` otherwise."""
    if requested_by is None:
        return None
    if not isinstance(requested_by, str) or len(requested_by) > MAX_REQUESTED_BY or "\x00" in requested_by:
        raise ValueError(f"requested_by must be text of at most {MAX_REQUESTED_BY} characters")
    return requested_by


_AFTER_COMMIT: Final = "chain_dispatcher_after_commit"
_Waiting = list[tuple[SessionTransaction | None, Callable[[], Any]]]


def _after_commit(session: Session, action: Callable[[], Any]) -> None:
    """Run `action` once when the session's outermost transaction commits; forget it if its transaction rolls back."""
    if _AFTER_COMMIT not in session.info:
        session.info[_AFTER_COMMIT] = []
        event.listen(session, "after_commit", _run_waiting)
        event.listen(session, "after_soft_rollback", _forget_waiting)
    begun_in = session.get_nested_transaction() or session.get_transaction() or session.begin()
    session.info[_AFTER_COMMIT].append((begun_in, action))


def _run_waiting(session: Session) -> None:
    if session.in_nested_transaction():
        return
    waiting: _Waiting = session.info[_AFTER_COMMIT]
    session.info[_AFTER_COMMIT] = []
    for _, action in waiting:
        action()


def _forget_waiting(session: Session, rolled_back: SessionTransaction) -> None:
    waiting: _Waiting = session.info[_AFTER_COMMIT]
    session.info[_AFTER_COMMIT] = [(begun, action) for begun, action in waiting if not _within(begun, rolled_back)]


def _within(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer


def _load(path: str, setting: str) -> Any:
    """The object that `package.module:ATTRIBUTE` names, with the current directory importable."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"must be package.module:ATTRIBUTE, not {path!r}", setting)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigurationError(f"there is no module {error.name!r}", setting) from error
        raise
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigurationError(f"module {module_name!r} has no {attribute!r}", setting) from error


def _shown(delivery: DeliveryRecord | None) -> dict[str, Any] | None:
    if delivery is None:
        return None
    return {key: value for key, value in asdict(delivery).items() if key not in ("kwargs", "context")}
