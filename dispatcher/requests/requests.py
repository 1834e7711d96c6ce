"""`Requests`: writes on-demand requests to the chains' rows and publishes them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Protocol, Unpack

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from dispatcher.domain.config import ChainType, DispatcherConfig
from dispatcher.domain.records import ChainRecord, Request
from dispatcher.domain.resources import Resource, clean_resources
from dispatcher.domain.results import ChainResult
from dispatcher.errors import ChainMissing, EnqueueNotPublished, ServiceUnavailable
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import REQUESTS_QUEUE
from dispatcher.requests.checks import Asked, checked_request
from dispatcher.requests.on_commit import run_after_commit
from dispatcher.settings import Settings
from dispatcher.states import NEW, Outcome
from dispatcher.storage import chains
from dispatcher.storage.database import Database
from dispatcher.storage.identity import may_be_same
from dispatcher.storage.migrations.revisions import Migrated
from dispatcher.storage.store import Store
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)


class Planner(Protocol):
    """Plans a chain with a request as a worker would, and logs the plan; nothing changes."""

    def __call__(
        self,
        chain_id: int | None,
        *,
        type_name: str,
        resources: Sequence[Resource],
        stored_context: Mapping[str, Any] | None,
        asked: Request,
    ) -> ChainResult:
        """The plan for the chain with this id; None: for a new one of these resources and this stored context."""


class Requests:
    """The requests of one deployment. `**asked` are the arguments in `checks.Asked`; `plan` makes the dry runs."""

    def __init__(
        self,
        *,
        config: DispatcherConfig,
        settings: Settings,
        database: Database,
        store: Store,
        migrated: Migrated,
        publisher: Publisher,
        plan: Planner,
    ) -> None:
        self._config = config
        self._settings = settings
        self._database = database
        self._store = store
        self._migrated = migrated
        self._publisher = publisher
        self._plan = plan

    # --- requests of applications ------------------------------------------------------------------------------------

    def enqueue(
        self,
        type_name: str,
        rsc_mappings: Iterable[tuple[str, str]],
        *,
        dry_run: bool,
        best_effort: bool,
        **asked: Unpack[Asked],
    ) -> str | None:
        """Write and publish a request for the chain with these resources (created if absent); gives the task's id.

        A dry run plans and gives None.
        """
        chain_type = self._config.get(type_name)
        resources = clean_resources(rsc_mappings)
        request = checked_request(chain_type, asked)
        return self._enqueue(chain_type, resources, request, dry_run=dry_run, best_effort=best_effort)

    def enqueue_chain(
        self, record: ChainRecord, *, dry_run: bool, best_effort: bool, **asked: Unpack[Asked]
    ) -> str | None:
        """Write and publish a request for a chain that was read; gives the task's id. Raises `ChainMissing`.

        A dry run plans and gives None.
        """
        request = checked_request(self._config.get(record.chain_type), asked)
        chain_id = record.id or None  # None: a dry run has not created the chain
        if dry_run or self._settings.dry_run or chain_id is None:
            planned = self._plan(
                chain_id,
                type_name=record.chain_type,
                resources=record.resources,
                stored_context=record.context,
                asked=request,
            )
            if planned.outcome == Outcome.MISSING:
                raise ChainMissing(record.id)
            return None

        def write() -> int:
            self._store.write_request(chain_id, request)
            return chain_id

        self._write(write, request, lambda _: chain_id, chain_id=chain_id, wake=record.wake)
        return self._publish(chain_id, best_effort=best_effort)

    def enqueue_on_commit(
        self,
        session: Session | scoped_session[Session],
        type_name: str,
        rsc_mappings: Iterable[tuple[str, str]],
        *,
        dry_run: bool,
        **asked: Unpack[Asked],
    ) -> None:
        """Enqueue when the caller's session commits; arguments are checked now.

        If the session is certainly on the dispatcher's database, and sees its tables, the request is written in the
        caller's transaction.
        """
        if isinstance(session, scoped_session):
            session = session()
        chain_type = self._config.get(type_name)
        resources = clean_resources(rsc_mappings)
        request = checked_request(chain_type, asked)
        shared = None if dry_run or self._settings.dry_run else self._shared(session)
        if shared is not None:
            connection, now = shared
            chain_id = chains.request_chain(
                connection,
                chain_type.chain_type,
                resources,
                request,
                due=bool(chain_type.candidates(NEW)),
                now=now,
            )
            run_after_commit(session, partial(self._publish, chain_id, best_effort=True))
        else:
            enqueue = partial(self._enqueue, chain_type, resources, request, dry_run=dry_run, best_effort=True)
            run_after_commit(session, enqueue)

    # --- creation of chains ------------------------------------------------------------------------------------------

    def create(
        self,
        connection: Connection,
        chain_type: ChainType,
        resources: Sequence[Resource],
        context: Mapping[str, Any] | None,
    ) -> int:
        """The id of the chain with exactly these resources; created in NEW and due, unless another caller was first."""
        now = self._database.now(connection)
        return chains.create(
            connection,
            type_name=chain_type.chain_type,
            resources=resources,
            context=context,
            due_at=now if chain_type.candidates(NEW) else None,
            requested_by=None,
            now=now,
        )

    def create_many(self, chain_type: ChainType, resource_sets: Sequence[Sequence[Resource]]) -> list[tuple[int, bool]]:
        """Find or create one chain for each resource set; gives `(chain id, created now)`, in the order of the sets.

        Each chain has exactly the resources of its set.
        """
        clock = self._database.clock
        now = None if clock is None else clock()
        return self._store.create_many(
            chain_type.chain_type, resource_sets, now=now, due=bool(chain_type.candidates(NEW))
        )

    # --- inside ------------------------------------------------------------------------------------------------------

    def _enqueue(
        self,
        chain_type: ChainType,
        resources: Sequence[Resource],
        request: Request,
        *,
        dry_run: bool,
        best_effort: bool,
    ) -> str | None:
        self._migrated.require()
        type_name = chain_type.chain_type
        if dry_run or self._settings.dry_run:
            with self._database.read() as connection:
                found = chains.find_exact(connection, type_name, resources)
            self._plan(found, type_name=type_name, resources=resources, stored_context=None, asked=request)
            return None
        due = bool(chain_type.candidates(NEW))
        chain_id = self._write(
            lambda: self._store.request_chain(type_name, resources, request, due=due),
            request,
            lambda connection: chains.find_exact(connection, type_name, resources),
        )
        return self._publish(chain_id, best_effort=best_effort)

    def _write(
        self,
        write: Callable[[], int],
        request: Request,
        find: Callable[[Connection], int | None],
        *,
        chain_id: int | None = None,
        wake: int = 0,
    ) -> int:
        """The id that `write()` gives; `find` gives the same id, or None while there is no such chain.

        If the commit got no answer, the row is read. If it has the request, that was written. If it has the `wake` of
        before (0: nobody has ever enqueued it), nothing was written, and it is written once more. Otherwise the request
        may be answered already, or another one may have replaced it: `EnqueueNotPublished` says that it is not known.
        """
        try:
            return write()
        except ServiceUnavailable as error:
            if error.written is not None:
                raise
            cause: Exception = error
        problem = "its row has changed meanwhile"
        try:
            with self._database.read() as connection:
                chain_id = find(connection)
                record = None if chain_id is None else chains.read_many(connection, [chain_id]).get(chain_id)
            if record is not None and record.request == request:
                return record.id
            if record is None or record.wake == wake:
                return write()
        except (ServiceUnavailable, DBAPIError) as error:
            problem, cause = str(error) if isinstance(error, ServiceUnavailable) else type(error).__name__, error
        raise EnqueueNotPublished(chain_id, problem, written=None) from cause

    def _publish(self, chain_id: int, *, best_effort: bool) -> str | None:
        """Publish the task; gives its id. On failure raises `EnqueueNotPublished`, or gives None with `best_effort`."""
        try:
            return self._publisher.execute([chain_id], queue=REQUESTS_QUEUE)
        except Exception as error:
            # Whatever it is: the request is written, and the caller must not do it in another way. The text of an
            # unexpected error may contain the broker's URL.
            problem = str(error) if isinstance(error, PublishFailed) else type(error).__name__
            if best_effort:
                emit(
                    logger,
                    Action.REQUEST_NOT_PUBLISHED,
                    "chain %s: its request is written, but not published (%s); the next sweep does the work",
                    chain_id,
                    problem,
                    chain_id=chain_id,
                )
                return None
            raise EnqueueNotPublished(chain_id, problem) from error

    def _shared(self, session: Session) -> tuple[Connection, datetime] | None:
        """The connection of a caller's session and the domain time, if that is on the dispatcher's own database.

        It begins the session's transaction where the URLs say so.
        """
        try:
            theirs = session.get_bind().engine.url
        except UnboundExecutionError:  # its tables are on databases of their own
            return None
        if not may_be_same(self._database.url, theirs):
            return None
        self._migrated.require()
        connection = session.connection()
        now = self._database.now_if_shared(connection)
        return None if now is None else (connection, now)
