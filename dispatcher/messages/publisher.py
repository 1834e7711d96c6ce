"""`Publisher`: sends messages to the workers."""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from celery import Celery
from kombu import Connection, Producer, Queue, pools
from kombu.exceptions import KombuError

from dispatcher.domain.records import Owed
from dispatcher.errors import ServiceUnavailable
from dispatcher.messages.queues import (
    CALLBACKS_QUEUE,
    DELIVER,
    EXECUTE,
    FAN_OUT,
    RETRY_POLICY,
    SWEEPS_QUEUE,
    celery_settings,
)
from dispatcher.settings import Settings
from dispatcher.urls import require_plain, without_password

CeleryApp: TypeAlias = Celery
"""The type of the Celery app that an application may pass to `Dispatcher`."""


_MAX_REPR: Final = 1000
"""The longest text of a task's arguments, which Flower shows, in characters."""


NO_BROKER: Final = "set DISPATCHER_REDIS_URL or DISPATCHER_BROKER_URL, or run `dispatcher dev`"
"""The advice when no broker is configured."""


class PublishFailed(Exception):  # noqa: N818 - internal: callers turn it into an outcome or an error
    """A message may not have reached the broker; `__cause__` is the error."""


class Publisher:
    """Publishes the tasks of one deployment.

    `app` is the Celery app to publish with. With None, a bare app is made from the settings at first use.
    """

    def __init__(self, settings: Settings, *, broker_url: str | None, app: Celery | None = None) -> None:
        self._settings = settings
        self._broker_url = require_plain(broker_url, "broker") if broker_url is not None else None
        self._app = app
        self._owns_app = app is None
        self._errors: tuple[type[BaseException], ...] | None = None
        self._on_redis = False
        self._pid = os.getpid()

    @property
    def app(self) -> Celery:
        """The Celery app to publish with. A forked child does not use the connections of its parent."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            _leave_inherited_pools()
            if self._owns_app:
                self._app = None
            elif self._app is not None:  # Celery does this too, but only in children that billiard forked
                self._app._pool = self._app.amqp._producer_pool = None
        if self._app is None:
            self._app = Celery("chain-dispatcher", set_as_current=False)
            self._app.conf.update(celery_settings(self._settings, broker_url=self._broker_url))
        return self._app

    @property
    def address(self) -> str:
        """The broker's URL as it may be shown."""
        url = self.app.conf.broker_write_url or self.app.conf.broker_url or self._broker_url
        return without_password(url[0] if isinstance(url, list | tuple) else url or "")

    @property
    def configured(self) -> bool:
        """Whether there is a broker to publish to."""
        return not self._owns_app or self._broker_url is not None

    def execute(
        self,
        chain_ids: Sequence[int],
        *,
        queue: str,
        dry_run: bool = False,
        producer: Producer | None = None,
    ) -> str:
        """Publish one execution of these chains; gives the task's id. Raises `PublishFailed`."""
        kwargs: dict[str, Any] = {"chain_ids": list(chain_ids)}
        if dry_run:
            kwargs["dry_run"] = True
        return self._send(EXECUTE, kwargs, queue, producer)

    def deliver(self, owed: Sequence[Owed], *, producer: Producer | None = None) -> None:
        """Publish these attempts, at most `deliveries_per_task` in one message. Raises `PublishFailed`."""
        size = self._settings.deliveries_per_task
        if len(owed) > size and producer is None:
            with self.batch() as batch:
                self.deliver(owed, producer=batch)
            return
        for start in range(0, len(owed), size):
            group = owed[start : start + size]
            kwargs = {"deliveries": [[message.delivery_id, message.attempt] for message in group]}
            self._send(DELIVER, kwargs, CALLBACKS_QUEUE, producer)

    def fan_out(self, type_name: str, chain_ids: Sequence[int]) -> None:
        """Send these chains to another worker, which then publishes their executions. Raises `PublishFailed`."""
        self._send(FAN_OUT, {"chain_type": type_name, "chain_ids": list(chain_ids)}, SWEEPS_QUEUE, None)

    @contextmanager
    def batch(self) -> Iterator[Producer]:
        """A producer that sends its messages together at the end, if the transport can. Raises `PublishFailed`."""
        seconds = self._settings.connect_seconds
        with (
            self._failures(),
            self.app.producer_pool.acquire(block=True, timeout=seconds) as producer,
            producer.batch(),
        ):
            yield producer

    def backlog(self, queue: str) -> int:
        """How many messages wait in a queue. Raises `PublishFailed`."""
        with self._failures(), self._connected() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(queue=queue, passive=True).message_count)
            except connection.channel_errors:  # the queue does not exist before its first message
                return 0

    def consumed_queues(self, *, seconds: float = 2.0) -> set[str]:
        """The queues for which a worker answers within `seconds`. Raises `PublishFailed`."""
        with self._failures():
            answers = self.app.control.inspect(timeout=seconds).active_queues() or {}
        return {queue["name"] for queues in answers.values() for queue in queues}

    def check(self) -> None:
        """Raise `ServiceUnavailable` unless the broker answers within the connect timeout."""
        try:
            with self._failures(), self._connected() as connection:
                connection.default_channel  # noqa: B018 - opening a channel asks the server something
        except PublishFailed as error:
            raise self.unavailable(error) from error

    def require(self) -> None:
        """Raise `ServiceUnavailable` if no broker is configured, or if it does not answer."""
        if not self.configured:
            raise ServiceUnavailable("broker", "", NO_BROKER)
        self.check()

    def unavailable(self, error: PublishFailed) -> ServiceUnavailable:
        """The error to show for a message that could not be published."""
        if not self.configured:
            return ServiceUnavailable("broker", "", NO_BROKER)
        return ServiceUnavailable("broker", self.address, str(error))

    def close(self) -> None:
        """Close this process's connections, unless they belong to an app that was passed in."""
        if self._app is not None and self._owns_app:
            self._app.close()
            self._app = None

    def _send(self, name: str, kwargs: Mapping[str, Any], queue: str, producer: Producer | None) -> str:
        """Like `app.send_task`, with its signals and events, but without routing, because the queue is given."""
        with self._failures():
            if producer is None:
                seconds = self._settings.connect_seconds
                with self.app.producer_pool.acquire(block=True, timeout=seconds) as pooled:
                    return self._send_with(pooled, name, kwargs, queue, retry=True)
            return self._send_with(producer, name, kwargs, queue, retry=False)

    def _send_with(self, producer: Producer, name: str, kwargs: Mapping[str, Any], queue: str, *, retry: bool) -> str:
        app, task_id = self.app, str(uuid.uuid4())
        parent = app.current_worker_task
        message = app.amqp.as_task_v2(
            task_id,
            name,
            (),
            dict(kwargs),
            root_id=parent.request.root_id or parent.request.id if parent else None,
            parent_id=parent.request.id if parent else None,
            ignore_result=True,
            create_sent_event=app.conf.task_send_sent_event,
            argsrepr="()",
            kwargsrepr=repr(kwargs)[:_MAX_REPR],
        )
        app.amqp.send_task_message(
            producer,
            name,
            message,
            queue=queue,
            serializer="json",
            retry=retry,
            retry_policy=RETRY_POLICY,
            declare=self._to_declare(queue),
        )
        return task_id

    def _to_declare(self, queue: str) -> list[Queue] | None:
        """The queues to declare before a message; None: as Celery does.

        On Redis nothing needs to be declared for a direct queue, because a message creates it.
        """
        return [] if self._on_redis and self.app.amqp.queues[queue].exchange.type == "direct" else None

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """A new connection, with one try to connect."""
        with self.app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0)
            yield connection

    @contextmanager
    def _failures(self) -> Iterator[None]:
        if not self.configured:  # Celery would connect to a RabbitMQ on localhost
            raise PublishFailed("no broker is configured")
        if self._errors is None:
            transport = self.app.connection_for_write()
            # `recoverable_connection_errors` also contains the error that RabbitMQ raises when it rejects a message.
            refused = (*transport.recoverable_connection_errors, *transport.channel_errors)
            self._errors = (KombuError, OSError, *transport.connection_errors, *refused)
            self._on_redis = transport.transport.driver_type == "redis"
        try:
            yield
        except self._errors as error:
            raise PublishFailed(type(error).__name__) from error


_inherited: list[Any] = []
_pools_pid = os.getpid()


def _leave_inherited_pools() -> None:
    """Forget the connection pools of the parent process, once in each forked process.

    The pools belong to the process, not to an app, and kombu empties them only in children that billiard forked. The
    connections are kept in a list: garbage collection would close them, and with them those of the parent.
    """
    global _pools_pid  # noqa: PLW0603 - the pools are global too
    if _pools_pid != os.getpid():
        _pools_pid = os.getpid()
        for group in (pools.connections, pools.producers):
            _inherited.append(dict(group))
            group.clear()
