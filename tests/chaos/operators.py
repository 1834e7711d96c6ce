"""The run's operators: they disable and enable chains, pause and resume types, and note when each act was committed."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy.exc import DBAPIError

from dispatcher import Dispatcher, DispatcherError
from tests.chaos import workload
from tests.chaos.history import Act, Resources
from tests.chaos.observed import Later

AWAY: Final = (DispatcherError, DBAPIError, OSError)
"""What an act raises while the database is away."""

_NAME: Final = "driver"
_AGAIN_SECONDS: Final = 1.0


class Operators:
    """Acts through a client of its own deployment; `numbers` are those of the workload's chains."""

    def __init__(self, client: Dispatcher, numbers: Sequence[int], later: Later, is_up: Callable[[], bool]) -> None:
        self._client = client
        self._numbers = numbers
        self._later = later
        self._is_up = is_up
        self.acts: list[Act] = []

    def disable_one(self, rng: random.Random, seconds: float | None) -> None:
        """Disable the chains of a resource, and enable them after so many seconds; None: never."""
        if not self._is_up():
            return
        (resource,) = workload.resources_of(rng.choice(self._numbers))
        before = time.monotonic()
        try:
            changed = self._client.disable_resource(resource, requested_by=_NAME)
        except AWAY:
            self._note("disable", (resource,), before, certain=False)
        else:
            if not changed:  # there is no such chain yet, or another call has disabled it
                return
            self._note("disable", (resource,), before)
        if seconds is not None:
            self._later(seconds, lambda: self._enable(resource))

    def _enable(self, resource: tuple[str, str]) -> None:
        before = time.monotonic()
        try:
            self._client.enable_resource(resource, requested_by=_NAME)
        except AWAY:
            self._note("enable", (resource,), before, certain=False)
            self._later(_AGAIN_SECONDS, lambda: self._enable(resource))
        else:
            self._note("enable", (resource,), before)

    def pause_one(self, rng: random.Random, seconds: float) -> None:
        """Pause a chain type, and resume it after so many seconds."""
        if not self._is_up():
            return
        type_name = f"type{rng.randrange(workload.TYPES)}"
        before = time.monotonic()
        try:
            changed = self._client.pause(type_name, "an operator of the chaos suite", requested_by=_NAME)
        except AWAY:
            self._note("pause", type_name, before, certain=False)
        else:
            if not changed:  # it is paused, and another call resumes it
                return
            self._note("pause", type_name, before)
        self._later(seconds, lambda: self._resume(type_name))

    def _resume(self, type_name: str) -> None:
        before = time.monotonic()
        try:
            self._client.resume(type_name, requested_by=_NAME)
        except AWAY:
            self._note("resume", type_name, before, certain=False)
            self._later(_AGAIN_SECONDS, lambda: self._resume(type_name))
        else:
            self._note("resume", type_name, before)

    def _note(self, kind: str, subject: Resources | str, before: float, *, certain: bool = True) -> None:
        self.acts.append(Act(kind, subject, before, time.monotonic(), certain))
