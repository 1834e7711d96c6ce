"""Pages of due chains on their way into a queue: marked once, then published here or by another worker."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dispatcher.coordination.locks import ChainLocks
from dispatcher.domain.config import DispatcherConfig
from dispatcher.messages.publisher import Publisher, PublishFailed
from dispatcher.messages.queues import CHAINS_QUEUE
from dispatcher.settings import Settings
from dispatcher.states import Outcome
from dispatcher.telemetry import Action, emit

logger = logging.getLogger(__name__)


class Pages:
    """Marks and publishes the pages of one deployment.

    The sweep that finds a chain marks it as queued before it hands the page over. The next sweep then skips chains that
    still wait for a worker. When the message of a page is lost, its markers end, and the next sweep finds the chains
    again, just as when the message of an execution is lost.
    """

    def __init__(
        self, *, config: DispatcherConfig, settings: Settings, locks: ChainLocks, publisher: Publisher
    ) -> None:
        self._config = config
        self._settings = settings
        self._locks = locks
        self._publisher = publisher

    def mark(self, chain_ids: Sequence[int]) -> list[int]:
        """Mark chains as queued; those that were not marked yet, in order."""
        return self._locks.mark_queued(chain_ids, seconds=self._settings.queued_seconds)

    def queued(self, chain_ids: Sequence[int]) -> set[int]:
        """Which of these chains are marked as queued; reads only."""
        return self._locks.queued(chain_ids, seconds=self._settings.queued_seconds)

    def publish(self, chain_ids: Sequence[int], queue: str, *, dry_run: bool = False) -> int:
        """Publish the executions of these marked chains; how many messages that took.

        Raises `PublishFailed`; then their markers are taken back. A dry run has none.
        """
        size = self._settings.chains_per_task
        if not chain_ids:
            return 0
        with self._taken_back(chain_ids, dry_run=dry_run), self._publisher.batch() as producer:
            for start in range(0, len(chain_ids), size):
                group = chain_ids[start : start + size]
                self._publisher.execute(group, queue=queue, dry_run=dry_run, producer=producer)
        return -(-len(chain_ids) // size)

    def hand_over(self, type_name: str, chain_ids: Sequence[int]) -> int:
        """Send these marked chains to another worker; how many messages `publish_handed_over` will make of them.

        Raises as `publish`.
        """
        with self._taken_back(chain_ids):
            self._publisher.fan_out(type_name, chain_ids)
        return -(-len(chain_ids) // self._settings.chains_per_task)

    def publish_handed_over(self, type_name: str, chain_ids: Sequence[int], *, dry_run: bool) -> dict[str, Any]:
        """Publish the executions of a page that a sweep handed over: `{"chain_type", "enqueued"}`.

        Chains for which the queue has no room are left to the next sweep and counted as `"held_back"`. Of a type that
        this configuration does not know nothing is published: `{"outcome": "unknown_definition", "enqueued": 0}`. Its
        chains stay due; when their markers have ended, another worker may know the type. Raises as `publish`.
        """
        chain_type = self._config.by_type.get(type_name)
        if chain_type is None:
            emit(
                logger,
                Action.UNKNOWN_PAGE,
                "a sweep handed over a page of chain type %.100r, which is not in this configuration",
                type_name,
                chain_type=type_name[:100],
            )
            return {"outcome": str(Outcome.UNKNOWN_DEFINITION), "enqueued": 0}
        queue = chain_type.queue or CHAINS_QUEUE
        with self._taken_back(chain_ids, dry_run=dry_run):
            room = max(self._settings.max_backlog - self._publisher.backlog(queue), 0)
        fits = room * self._settings.chains_per_task
        taken, left = chain_ids[:fits], chain_ids[fits:]
        if not dry_run:
            self._locks.unmark_queued(left)
        self.publish(taken, queue, dry_run=dry_run)
        result: dict[str, Any] = {"chain_type": type_name, "enqueued": len(taken)}
        if left:
            result["held_back"] = len(left)
        if dry_run:
            result["dry_run"] = True
        logger.debug("page: %s", result)
        return result

    @contextmanager
    def _taken_back(self, chain_ids: Sequence[int], *, dry_run: bool = False) -> Iterator[None]:
        """Take the markers of these chains back if the block cannot publish."""
        try:
            yield
        except PublishFailed:
            if not dry_run:
                self._locks.unmark_queued(chain_ids)
            raise
