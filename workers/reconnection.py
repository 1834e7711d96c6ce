"""What a worker needs to survive the loss of its Redis broker while it holds messages.

A worker holds the messages that it has prefetched and those that wait for their ETA, such as retries. On Redis it puts
them back when it closes its channel. But first the channel reads the answer that it waits for. If the connection is
broken, this read fails, and kombu 5.7 leaves the channel open. It tries again with all channels, but the first one that
cannot reach the server ends that. Then Celery closes the connection a second time. Now the channel does want to put the
messages back, over a connection that no longer knows its server: an `AttributeError`, for which the worker exits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from celery.bootsteps import StartStopStep


class CloseWhole(StartStopStep):  # type: ignore[misc]
    """A step of Celery's consumer: its channel closes whole, although the connection is broken.

    The messages are then put back as kombu means it: at once if the server can be reached by a new connection.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, consumer: Any) -> None:
        """Mind the channel of a new connection. Celery calls this after each connect."""
        if consumer.connection.transport.driver_type == "redis":
            channel = consumer.connection.default_channel
            channel.close = partial(_close_whole, channel, channel.close)


def _close_whole(channel: Any, close: Callable[[], None]) -> None:
    try:
        close()
    except channel.connection_errors:
        if channel.closed:
            raise
        close()  # the channel no longer waits for an answer
