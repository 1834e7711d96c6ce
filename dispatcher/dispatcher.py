"""`Dispatcher`: the class that applications, workers and the command line call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Any, Self
from uuid import UUID

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, scoped_session

from dispatcher import addresses
from dispatcher.chain import Chain
from dispatcher.domain.config import Callback, ChainType, DispatcherConfig
from dispatcher.domain.records import ActionRecord, ChainRecord, DeliveryRecord, Owed, TypeRecord
from dispatcher.domain.resources import checked_json, clean_resources, is_text
from dispatcher.domain.results import AttemptResult, ChainResult
from dispatcher.errors import ConfigurationError
from dispatcher.messages.publisher import CeleryApp, PublishFailed
from dispatcher.operators.doctor import Finding
from dispatcher.operators.operations import MapCounts, SeenDelivery, SeparateCounts
from dispatcher.services import Clock, wire
from dispatcher.settings import Settings, load_object
from dispatcher.states import AttemptOutcome, DeliveryStatus
from dispatcher.storage import actions, chain_types, chains, overview
from dispatcher.storage.store import read_one


class Dispatcher:
    """The chains of one deployment, and everything that can be done with them.

    `config` is the ancestor's dict `{"chains": [{"chain_type": ..., "transitions": {...}}, ...]}` or its typed form.
    It is validated here; `ConfigurationError` names chain type, state and transition. A URL that is not given comes
    from `settings`, else from a `DISPATCHER_*` environment variable, else from the embedded default. `celery_app`
    publishes the messages (default: a bare app made from the settings). `clock` gives the domain time as aware
    datetimes (default: the database's clock). `engine_options` are SQLAlchemy's, such as `pool_size` and
    `connect_args`. Connections are opened when they are needed.
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
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = DispatcherConfig.parse(config)
        self.settings = settings if settings is not None else Settings()
        if clock is None and self.settings.clock is not None:
            clock = load_object(self.settings.clock, "DISPATCHER_CLOCK")
        self.redis_url = addresses.redis_url(self.settings, redis_url)
        self.broker_url = addresses.broker_url(self.settings, self.redis_url, broker_url)
        self._services = wire(
            self.config,
            self.settings,
            database_url=addresses.database_url(self.settings, database_url),
            redis_url=self.redis_url,
            broker_url=self.broker_url,
            celery_app=celery_app,
            clock=clock,
            engine_options=engine_options,
        )
        self.database = self._services.database

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
        config = load_object(settings.config, "DISPATCHER_CONFIG")
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

        With `can_be_subset=True`: the chain that has at least these resources, or `AmbiguousChain` if several have
        them. `initial_context` is stored at creation and ignored for an existing chain. Raises `ConfigurationError` for
        an unknown type, `InvalidResource` and `NotSerializable` for wrong values.
        """
        configured = self.config.get(chain_type)
        resources = clean_resources(rsc_mappings)
        context = checked_json("initial_context", initial_context)

        def find(connection: Connection) -> int | None:
            find_chain = chains.find_containing if can_be_subset else chains.find_exact
            return find_chain(connection, chain_type, resources)

        self._ready()
        with self.database.read() as connection:
            chain_id = find(connection)
            record = chains.read_many(connection, [chain_id]).get(chain_id) if chain_id is not None else None
        if record is not None:
            return Chain(self._services, record)
        if self.settings.dry_run:
            return Chain.unsaved(self._services, chain_type, resources, context)

        def work(connection: Connection) -> ChainRecord:
            found = find(connection)  # another caller may have created it meanwhile
            return chains.read_one(
                connection,
                found
                if found is not None
                else self._services.requests.create(connection, configured, resources, context),
            )

        return Chain(self._services, self.database.write(work))

    def bulk_get_or_create(
        self, chain_type: str, rsc_mappings: Iterable[Iterable[tuple[str, str]]], *, batch: int = 1000
    ) -> Iterator[tuple[int, bool]]:
        """`(chain id, created now)` for each resource set, in their order; streams, with `batch` sets per transaction.

        It may be run again after a failure, because it finds the chains that exist. An invalid set raises
        `InvalidResource` when its batch is reached; earlier batches are kept. A dry run raises `ConfigurationError`,
        because it creates nothing.
        """
        configured = self.config.get(chain_type)
        if self.settings.dry_run:
            raise ConfigurationError("a dry run creates no chains", "DISPATCHER_DRY_RUN")
        self._ready()
        waiting = iter(rsc_mappings)
        while group := [clean_resources(pairs) for pairs in islice(waiting, batch)]:
            yield from self._services.requests.create_many(configured, group)

    def chain(self, chain_id: int) -> "Chain":
        """The chain with this id. Raises `ChainMissing` if there is none."""
        self._ready()
        return Chain(self._services, read_one(self._services.store, chain_id))

    def find_chains(
        self,
        *,
        chain_type: str | None = None,
        state: str | None = None,
        resource: tuple[str, str] | None = None,
        after_id: int = 0,
        limit: int = 50,
    ) -> "list[Chain]":
        """Chains by type, state and one resource: at most `limit` with ids above `after_id`, in order of id."""
        self._ready()
        if not is_text(f"{chain_type}{state}"):  # no stored name contains such text
            return []
        pair = clean_resources([resource])[0] if resource is not None else None
        with self.database.read() as connection:
            ids = chains.list_ids(
                connection, type_name=chain_type, state=state, resource=pair, after_id=after_id, limit=limit
            )
            records = chains.read_many(connection, ids)
        return [Chain(self._services, records[chain_id]) for chain_id in ids if chain_id in records]

    def find_deliveries(
        self,
        *,
        delivery_ids: Sequence[str] | None = None,
        chain_id: int | None = None,
        chain_type: str | None = None,
        statuses: Sequence[DeliveryStatus] = (),
        limit: int = 100,
    ) -> list[DeliveryRecord]:
        """Deliveries by id, chain, chain type and status, newest first, at most `limit`."""
        self._ready()
        statuses = [DeliveryStatus(status) for status in statuses]
        ids = _uuids(delivery_ids) if delivery_ids is not None else None
        if not is_text(f"{chain_type}"):  # no stored name contains such text
            return []
        with self.database.read() as connection:
            return overview.listing(
                connection,
                delivery_ids=ids,
                chain_id=chain_id,
                type_name=chain_type,
                statuses=statuses,
                limit=limit,
            )

    def stats(self) -> dict[str, Any]:
        """Counts `{"chains", "due", "next_due_at", "open_deliveries", "deliveries": {status: n}}`; reads all chains."""
        self._ready()
        with self.database.read() as connection:
            return overview.statistics(connection, now=self.database.now(connection))

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
        """Ask the workers to execute the chain with these resources (created if absent); gives the task's id.

        The request is written to the chain's row first, so that the next sweep does the work if the message is lost.
        Raises `EnqueueNotPublished` if the message could not be published (with `best_effort=True`: returns None), or
        if the database did not answer to the commit; `ServiceUnavailable` if nothing could be written. A dry run plans
        here and now, logs the plan on `dispatcher.plan`, and returns None.
        """
        return self._services.requests.enqueue(
            chain_type,
            rsc_mappings,
            initial_context=initial_context,
            callback=callback,
            callback_kwargs=callback_kwargs,
            requested_by=requested_by,
            dry_run=dry_run,
            best_effort=best_effort,
        )

    def enqueue_on_commit(
        self,
        session: Session | scoped_session[Session],
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

        If the session is on the dispatcher's database and sees its tables, the request is written in the caller's
        transaction, so the commit cannot lose it. On another database, or in doubt, the request is written after the
        commit; it is lost if the process dies between the two. Arguments are checked now. What fails after the commit
        is logged, not raised. A dry run plans after the commit.
        """
        self._services.requests.enqueue_on_commit(
            session,
            chain_type,
            rsc_mappings,
            initial_context=initial_context,
            callback=callback,
            callback_kwargs=callback_kwargs,
            requested_by=requested_by,
            dry_run=dry_run,
        )

    # --- workers -----------------------------------------------------------------------------------------------------

    def execute_chains(self, chain_ids: Sequence[int]) -> list[ChainResult]:
        """Execute these chains as a worker does; gives one result for each."""
        self._ready()
        if self.settings.dry_run:
            return [self.plan_chain(chain_id) for chain_id in chain_ids]
        return self._services.executor.execute(chain_ids)

    def plan_chain(self, chain_id: int) -> ChainResult:
        """The plan for one chain, as a worker would make it. The plan is logged and nothing changes."""
        self._ready()
        return self._services.dry_run.plan_as_worker(chain_id, type_name="")

    def deliver(self, owed: Sequence[Owed]) -> list[AttemptResult]:
        """Make one attempt at each of these deliveries; gives one result for each."""
        self._ready()
        if self.settings.dry_run:
            return [AttemptResult(message.delivery_id, message.attempt, AttemptOutcome.DRY_RUN) for message in owed]
        return self._services.attempts.deliver(owed)

    def sweep(self, *, tick: bool = False, dry_run: bool = False) -> dict[str, Any]:
        """Publish one execution per due chain: `{"due", "enqueued", "already_queued", "oldest_due_seconds"}`.

        With `sweep_fanout` also `"handed_over"`: chains whose executions other workers publish (`fan_out`). A dry run
        adds `"dry_run"` and `"would_wake"`: the chains that a real sweep would make due first, because the candidates
        of their states have changed.
        `tick=True` is for beat: only the first call within the interval does anything. Raises `ServiceUnavailable`.
        """
        self._ready()
        try:
            return self._services.sweeper.sweep(tick=tick, dry_run=dry_run or self.settings.dry_run)
        except PublishFailed as error:
            raise self._services.publisher.unavailable(error) from error

    def fan_out(self, chain_type: str, chain_ids: Sequence[int]) -> dict[str, Any]:
        """Publish the executions of a page that a sweep handed over: `{"chain_type", "enqueued"}`.

        Chains for which the type's queue has no room are counted as `"held_back"` and left to the next sweep. For an
        unknown type nothing is published: `{"outcome": "unknown_definition", "enqueued": 0}`. Raises
        `ServiceUnavailable`.
        """
        try:
            return self._services.pages.publish_handed_over(chain_type, chain_ids, dry_run=self.settings.dry_run)
        except PublishFailed as error:
            raise self._services.publisher.unavailable(error) from error

    def relay(self, *, tick: bool = False) -> dict[str, Any]:
        """Publish deliveries whose message was lost, and settle those whose worker died: `{"relayed", "settled"}`.

        `"failed"` counts those that could not be settled, if there are any; they are logged, and tried again later.
        """
        self._ready()
        if self.settings.dry_run:
            return {"relayed": 0, "settled": 0, "dry_run": True}
        return self._services.relay.relay(tick=tick)

    def prune(self, *, days: float | None = None, tick: bool = False) -> dict[str, Any]:
        """Delete events, closed deliveries and operators' actions older than `days` (default: the setting).

        Gives `{"events", "deliveries", "actions"}`: how many of each. If `DISPATCHER_DRY_RUN` is set, nothing is
        deleted, and it raises `DryRunRefused` unless beat calls it (`tick=True`).
        """
        self._ready()
        if not tick:
            self._services.operations.refuse_dry_run("prune")
        if self.settings.dry_run:
            return {"events": 0, "deliveries": 0, "actions": 0, "dry_run": True}
        return self._services.pruner.prune(days=days, tick=tick)

    # --- operators ---------------------------------------------------------------------------------------------------
    # All that write raise `DryRunRefused` if `DISPATCHER_DRY_RUN` is set.

    def retry_delivery(
        self, delivery: DeliveryRecord, *, requested_by: str | None = None, reason: str | None = None
    ) -> None:
        """Attempt a delivery again at once, if it is still as it was when it was read.

        `delivery` is one that `find_deliveries` gave. If its chain does not wait for it any more, or if it has another
        status now, nothing is written and `DeliveryChanged` is raised. Raises `DeliveryPending` while an attempt runs,
        `ChainMissing` if its chain is erased. See `Chain.retry_delivery`.
        """
        self._ready()
        self._services.operations.retry_delivery(_seen(delivery), requested_by=requested_by, reason=reason)

    def cancel_delivery(
        self, delivery: DeliveryRecord, *, requested_by: str | None = None, reason: str = "cancelled by hand"
    ) -> None:
        """Close a delivery as cancelled, if it is still as it was when it was read.

        Its chain stays in its state and is due. Raises as `retry_delivery`.
        """
        self._ready()
        self._services.operations.cancel_delivery(_seen(delivery), reason=reason, requested_by=requested_by)

    def skip_delivery(
        self, delivery: DeliveryRecord, *, requested_by: str | None = None, reason: str = "skipped by hand"
    ) -> None:
        """Close a delivery as skipped, if it is still as it was when it was read.

        Its chain moves as if the delivery had succeeded. Raises as `retry_delivery`.
        """
        self._ready()
        self._services.operations.skip_delivery(_seen(delivery), reason=reason, requested_by=requested_by)

    def abandon_delivery(
        self, delivery: DeliveryRecord, *, requested_by: str | None = None, reason: str | None = None
    ) -> None:
        """Give up the running attempt at a delivery: its effect is unknown, and what follows is as after a crash.

        For an attempt whose process hangs and cannot be ended. If that process goes on after all, it cannot record the
        end of its attempt, but its callback may take effect. Raises `DeliveryChanged` if that attempt does not run.
        """
        self._ready()
        self._services.operations.abandon_attempt(_seen(delivery), requested_by=requested_by, reason=reason)

    def disable_resource(
        self, resource: tuple[str, str], requested_by: str | None = None, *, reason: str | None = None
    ) -> int:
        """Disable every chain that has this resource now, in one transaction; gives how many changed.

        For example after an unsubscribe. A chain that is created later is not disabled.
        """
        self._ready()
        (pair,) = clean_resources([resource])
        return self._services.operations.set_resource_disabled(
            pair, disabled=True, requested_by=requested_by, reason=reason
        )

    def enable_resource(
        self, resource: tuple[str, str], requested_by: str | None = None, *, reason: str | None = None
    ) -> int:
        """Enable every chain that has this resource; gives how many changed."""
        self._ready()
        (pair,) = clean_resources([resource])
        return self._services.operations.set_resource_disabled(
            pair, disabled=False, requested_by=requested_by, reason=reason
        )

    def erase_resource(
        self, resource: tuple[str, str], *, requested_by: str | None = None, reason: str | None = None
    ) -> int:
        """Delete every chain that has this resource, with its history and deliveries; gives how many.

        It is for a request to be forgotten. While an attempt of one of these chains runs, it deletes nothing and
        raises `DeliveryPending`.
        """
        self._ready()
        (pair,) = clean_resources([resource])
        return self._services.operations.erase_resource(pair, requested_by=requested_by, reason=reason)

    def pause(self, chain_type: str, reason: str, *, requested_by: str | None = None) -> bool:
        """Plan and attempt nothing more of a chain type until `resume`; False if it was paused already.

        Workers notice within two seconds. A callback that runs finishes, and its chain moves. Call it again if it was
        interrupted: it then parks the deliveries that are left.
        """
        self._ready()
        return self._services.operations.pause(chain_type, requested_by=requested_by, reason=reason)

    def resume(
        self,
        chain_type: str,
        *,
        spread: timedelta | float | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> bool:
        """End the pause of a chain type and begin a new plan budget; False if it was not paused.

        With `spread` (a timedelta or seconds, at most 366 days) the chains that are due now become due evenly over that
        time, and its parked deliveries continue evenly over the same time. The due chains of a type that is not paused
        are left as they are. Call it again if it was interrupted. Raises `ConfigurationError` for a wrong `spread`.
        """
        self._ready()
        return self._services.operations.resume(chain_type, spread=spread, requested_by=requested_by, reason=reason)

    def map_states(
        self,
        chain_type: str,
        from_state: str,
        to_state: str,
        *,
        requested_by: str | None = None,
        reason: str | None = None,
        dry_run: bool = False,
    ) -> MapCounts:
        """Give a state another name, in every chain of a type that is in it, in batches; a dry run only counts them.

        Open deliveries stay open. Chains with a running attempt are left and counted as waiting.
        """
        self._ready()
        return self._services.operations.map_states(
            chain_type,
            from_state,
            to_state,
            requested_by=requested_by,
            reason=reason,
            dry_run=dry_run,
        )

    def separate(self, name: str) -> SeparateCounts:
        """Give every chain of a copied database a new identity, so that its idempotency keys are others.

        For a copy that goes on as a deployment of its own, such as a staging system; `name` is its name. Call it before
        the copy's workers start. Chains that wait for a delivery are left and counted; a second call with the same name
        separates them, and whatever an interrupted call has left.
        """
        self._ready()
        return self._services.operations.separate(name)

    def find_types(self) -> list[TypeRecord]:
        """The rows of the chain types that were ever paused, limited or fingerprinted, by name."""
        self._ready()
        with self.database.read() as connection:
            return chain_types.read_types(connection)

    def find_actions(
        self, *, chain_type: str | None = None, resource: tuple[str, str] | None = None, limit: int = 100
    ) -> list[ActionRecord]:
        """What operators did to chain types and resources (who, why, when), newest first, at most `limit`.

        Of one chain type, of one resource, or of all. What they did to a chain is in its history (`chain.events`).
        """
        self._ready()
        if chain_type is not None and resource is not None:
            raise ConfigurationError("name a chain type or a resource, not both", "find_actions")
        if not is_text(f"{chain_type}"):  # no stored name contains such text
            return []
        pair = clean_resources([resource])[0] if resource is not None else None
        with self.database.read() as connection:
            return actions.listing(connection, type_name=chain_type, resource=pair, limit=limit)

    def examine(self) -> list[Finding]:
        """What is wrong with this deployment, each finding with its remedy; empty if all is well."""
        return self._services.doctor.examine()

    def repair(self) -> tuple[list[Finding], list[Finding]]:
        """Repair the findings that are safe to repair: `(repaired findings, findings that are left)`.

        Repeats until no such finding is left, or until a pass repairs nothing.
        """
        return self._services.doctor.repair()

    # --- operation ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ServiceUnavailable` or `DatabaseNotMigrated` unless the database and the broker can be used."""
        self.database.check()
        self._ready()
        self.check_broker()

    def check_broker(self) -> None:
        """Raise `ServiceUnavailable` if a broker is configured and does not answer."""
        if self._services.publisher.configured:
            self._services.publisher.check()

    def require_broker(self) -> None:
        """Raise `ServiceUnavailable` if no broker is configured, or if it does not answer."""
        self._services.publisher.require()

    def check_locks(self) -> None:
        """Raise `ServiceUnavailable` if a lock server is configured and does not answer."""
        self._services.locks.check()

    def after_fork(self) -> None:
        """Forget the connections of the parent process without closing them, so that this process opens new ones."""
        self.database.dispose(close=False)

    def watch_callbacks(self, *, parent: int | None = None) -> None:
        """Kill this process when a callback runs longer than `callback_seconds`, or when its parent has died.

        For worker processes that make one attempt at a time, and that another process replaces. `parent` is the id of
        the process that made this one (default: the parent that it has now).
        """
        self._services.watchdog.start(parent=parent)

    def close(self) -> None:
        """Close this process's connections; the dispatcher can be used again."""
        self._services.leases.close()
        self.database.dispose()
        self._services.locks.close()
        self._services.publisher.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        self._services.migrated.require()


def _seen(delivery: DeliveryRecord) -> SeenDelivery:
    return SeenDelivery(delivery.chain_id, delivery.id, delivery.status, delivery.attempt)


def _uuids(delivery_ids: Sequence[str]) -> list[str]:
    """Those of these texts that are UUIDs, as the rows have them; no delivery has another id."""
    found = []
    for delivery_id in delivery_ids:
        with suppress(ValueError):
            found.append(str(UUID(delivery_id)))
    return found
