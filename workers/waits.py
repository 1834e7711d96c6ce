"""How long a worker holds one of our messages at most.

Celery sends a wait as a moment of the sender's wall clock, and the receiver waits until its own clock shows it. If one
of the two is two days ahead or behind, the message stays in the worker for two days; Redis delivers it again every hour
meanwhile, and RabbitMQ closes the worker's channel after half an hour. The attempt itself is made by then: the relay
goes by the database's clock.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

from celery.worker.request import Request

from dispatcher.messages.queues import MAX_COUNTDOWN

_LONGEST: Final = timedelta(seconds=MAX_COUNTDOWN)


class BoundedRequest(Request):  # type: ignore[misc]
    """A request of one of our tasks: waits no longer than we ask for, whatever moment the message names."""

    @property
    def eta(self) -> datetime | None:
        """The moment at which to begin; None: at once."""
        eta: datetime | None = super().eta
        return None if eta is None else min(eta, datetime.now(UTC) + _LONGEST)
