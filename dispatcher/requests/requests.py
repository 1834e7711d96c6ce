"""On-demand requests: checked, written to the chain's row, and published."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL, Connection

from dispatcher.domain.config import ChainType
from dispatcher.domain.records import Request
from dispatcher.domain.resources import Resource
from dispatcher.errors import EnqueueNotPublished
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import REQUESTS_QUEUE
from dispatcher.states import NEW
from dispatcher.storage import chains, portable, store
from dispatcher.storage.database import Database

logger = logging.getLogger(__name__)


class Requests:
    """Writes and publishes the requests of one deployment."""

    def __init__(self, *, database: Database, publisher: Publisher) -> None:
        self._database = database
        self._publisher = publisher

    def create(
        self,
        connection: Connection,
        config: ChainType,
        resources: Sequence[Resource],
        context: Mapping[str, Any] | None,
    ) -> int:
        """The id of the chain with exactly these resources, made in NEW and due unless another caller was first."""
        now = self._database.now(connection)
        return chains.create(
            connection,
            chain_type=config.chain_type,
            resources=resources,
            context=context,
            due_at=now if config.candidates(NEW) else None,
            now=now,
        )

    def create_many(
        self, connection: Connection, *, config: ChainType, resources: Sequence[Sequence[Resource]]
    ) -> list[tuple[int, bool]]:
        """`(chain id, created here)` of the chain with exactly each of these resource sets, in their order."""
        now = self._database.now(connection)
        due_at = now if config.candidates(NEW) else None
        return portable.create_many(connection, config.chain_type, resources, due_at=due_at, now=now)

    def write(self, connection: Connection, config: ChainType, resources: Sequence[Resource], request: Request) -> int:
        """The id of the chain with these resources (created if absent), with the request in its row."""
        chain_id = chains.find_exact(connection, config.chain_type, resources)
        if chain_id is None:
            chain_id = self.create(connection, config, resources, None)
        chains.write_request(connection, chain_id, request, now=self._database.now(connection))
        return chain_id

    def write_committed(self, config: ChainType, resources: Sequence[Resource], request: Request) -> int:
        """As `write`, in a transaction of its own."""
        chain_id = store.write_request_if_exists(self._database, config.chain_type, resources, request)
        if chain_id is not None:
            return chain_id
        return self._database.write(lambda connection: self.write(connection, config, resources, request))

    def publish(self, chain_id: int, *, best_effort: bool) -> str | None:
        """The id of the task that executes the chain; `EnqueueNotPublished`, or None with `best_effort`."""
        try:
            return self._publisher.execute([chain_id], queue=REQUESTS_QUEUE)
        except PublishFailed as error:
            if best_effort:
                logger.warning(
                    "chain %s: request written, not published (%s)",
                    chain_id,
                    error,
                    extra={"action": "request_not_published", "chain_id": chain_id},
                )
                return None
            raise EnqueueNotPublished(chain_id, str(error)) from error

    def publish_dry_run(
        self, chain_id: int | None, chain_type: str, resources: Sequence[Resource], request: Request
    ) -> str:
        """The id of the task that plans the chain and changes nothing; what was asked travels in the message."""
        plan = {
            "chain_type": chain_type,
            "resources": [list(pair) for pair in resources],
            "context": request.context,
            "callback": request.callback,
        }
        ids = [] if chain_id is None else [chain_id]
        try:
            return self._publisher.execute(ids, queue=REQUESTS_QUEUE, dry_run=True, plan=plan)
        except PublishFailed as error:
            raise EnqueueNotPublished(chain_id or 0, str(error), written=False) from error

    def shares_database(self, theirs: URL) -> bool:
        """Whether the database at a caller's URL is the one that holds the chains."""
        ours = self._database.url
        if ours.get_backend_name() != theirs.get_backend_name():
            return False
        if self._database.dialect == "sqlite":
            return Path(str(ours.database)).absolute() == Path(str(theirs.database)).absolute()
        return (ours.host, ours.port, ours.database) == (theirs.host, theirs.port, theirs.database)
