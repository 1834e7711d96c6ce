"""Named failpoints, put around the library's own functions in a worker of the chaos suite; nothing in it knows them.

`CHAOS_FAILPOINTS` says which strike and how often: `after_lock=0.005,before_commit=0.002`. A point that kills sends
SIGKILL to its own process, and in a tenth of the cases to its whole worker. They strike only while the file `faults-on`
is in the run's directory, so that the driver ends all of them at one moment.

| point | where | what |
|---|---|---|
| `after_lock` | a chain's lock is taken | kills |
| `after_evaluation` | the candidates were asked | kills |
| `before_commit`, `after_commit` | around every COMMIT, and every statement that commits by itself | kills |
| `after_publish` | a message, or a sweep's batch of them, was sent | kills |
| `before_call`, `after_call` | around the effect of a callback | kills |
| `before_finish` | the callback has returned, its end is not written | kills |
| `commit_lies` | such a commit succeeds | the caller gets an OperationalError |
| `drop`, `double`, `reorder` | a message is sent | it is not, it is twice, it is after the next one |
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy.exc import OperationalError

from dispatcher import retry
from dispatcher.coordination.locks import ChainLocks
from dispatcher.delivery import attempts, ends, local
from dispatcher.delivery.ends import Ends
from dispatcher.domain.records import DeliveryRecord
from dispatcher.execution import executor
from dispatcher.messages.publisher import Publisher
from dispatcher.passes.pages import Pages
from dispatcher.states import AttemptOutcome
from dispatcher.storage import database
from tests.chaos.sink import DIRECTORY_VARIABLE, own_sink

FAILPOINTS_VARIABLE: Final = "CHAOS_FAILPOINTS"
SEED_VARIABLE: Final = "CHAOS_SEED"
VERSION_VARIABLE: Final = "CHAOS_VERSION"
NODE_VARIABLE: Final = "CHAOS_NODE"
FLAG: Final = "faults-on"
KILLING: Final = (
    "after_lock",
    "after_evaluation",
    "before_commit",
    "after_commit",
    "after_publish",
    "before_call",
    "after_call",
    "before_finish",
)
_WHOLE_WORKER: Final = 0.1


class Failpoints:
    """The failpoints of this process."""

    def __init__(self, probabilities: dict[str, float], *, seed: str, flag: Path) -> None:
        self._probabilities = probabilities
        self._seed = seed
        self._flag = flag
        self._pid = 0
        self._random = random.Random()
        self.sink = own_sink()
        self.attempt: tuple[str, int] | None = None
        """The delivery id and the attempt that this process has begun last."""

    @classmethod
    def from_environment(cls) -> "Failpoints":
        pairs = [pair.split("=") for pair in os.environ.get(FAILPOINTS_VARIABLE, "").split(",") if pair]
        return cls(
            {name: float(value) for name, value in pairs},
            seed=os.environ[SEED_VARIABLE],
            flag=Path(os.environ[DIRECTORY_VARIABLE]) / FLAG,
        )

    def strikes(self, point: str) -> bool:
        """Whether this point strikes now."""
        probability = self._probabilities.get(point)
        if probability is None:
            return False
        if self._pid != os.getpid():  # a forked child draws numbers of its own
            self._pid = os.getpid()
            self._random = random.Random(f"{self._seed}:{self._pid}")
        if self._random.random() >= probability or not self._flag.exists():
            return False
        self.sink.write("struck", point=point)
        return True

    def hit(self, point: str) -> None:
        """Kill this process if the point strikes."""
        if self.strikes(point):
            if self._random.random() < _WHOLE_WORKER:
                with suppress(ProcessLookupError):
                    os.killpg(os.getpgrp(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put the failpoints around the library's functions, and let its guards back off for seconds, not minutes."""
        self._wrap_locks()
        self._wrap_evaluation()
        self._wrap_commits()
        self._wrap_messages()
        self._wrap_attempts()
        shorten_backoff()

    def _wrap_locks(self) -> None:
        acquire = ChainLocks.acquire

        def acquired(locks: ChainLocks, chain_ids: Sequence[int]) -> Any:
            held = acquire(locks, chain_ids)
            self.hit("after_lock")
            return held

        ChainLocks.acquire = acquired  # type: ignore[method-assign]

    def _wrap_evaluation(self) -> None:
        evaluate = executor.evaluate_record

        def evaluated(record: Any, *arguments: Any, **options: Any) -> Any:
            result = evaluate(record, *arguments, **options)
            self.sink.write("evaluated", chain=record.id)
            self.hit("after_evaluation")
            return result

        executor.evaluate_record = evaluated

    def _wrap_commits(self) -> None:
        commit = database.commit

        def committed(step: Callable[[], Any]) -> Any:
            self.hit("before_commit")
            result = commit(step)
            self.hit("after_commit")
            if self.strikes("commit_lies"):
                cause = psycopg.OperationalError("server closed the connection unexpectedly")
                raise OperationalError("COMMIT", None, cause, connection_invalidated=True)
            return result

        database.commit = committed  # type: ignore[assignment]

    def _wrap_messages(self) -> None:
        send, publish_page = Publisher._send, Pages.publish
        held_back: list[tuple[Any, ...]] = []

        def sent(publisher: Publisher, name: str, kwargs: Any, queue: str, producer: Any) -> str:
            if self.strikes("drop"):
                return "dropped"
            if self.strikes("reorder"):
                held_back.append((name, kwargs, queue))
                return "held back"
            result = send(publisher, name, kwargs, queue, producer)
            if self.strikes("double"):
                send(publisher, name, kwargs, queue, producer)
            while held_back:
                send(publisher, *held_back.pop(), None)
            if producer is None:
                self.hit("after_publish")
            return result

        def page_published(pages: Pages, *arguments: Any, **options: Any) -> int:
            count = publish_page(pages, *arguments, **options)
            self.hit("after_publish")
            return count

        Publisher._send = sent  # type: ignore[method-assign]
        Pages.publish = page_published  # type: ignore[method-assign]

    def _wrap_attempts(self) -> None:
        make, record, record_called = attempts.make_attempt, ends.recorded, Ends.record_called

        def attempted(attempt: Any, *arguments: Any, **options: Any) -> Any:
            row = attempt.delivery
            self.attempt = (row.id, row.attempt)
            at = attempt.begun.machine_now.isoformat()
            facts = {"key": row.idempotency_key, "chain": row.chain_id, "at": at}
            self.sink.write("begun", delivery=row.id, attempt=row.attempt, **facts)
            return make(attempt, *arguments, **options)

        def recorded(rows: Any, row: DeliveryRecord, *arguments: Any, **options: Any) -> bool:
            self.hit("before_finish")
            ok = record(rows, row, *arguments, **options)
            self.sink.write("finished", delivery=row.id, attempt=row.attempt, ok=ok)
            return ok

        def all_recorded(recorder: Ends, called: Sequence[Any]) -> Any:
            if called:
                self.hit("before_finish")
            results = record_called(recorder, called)
            for result in results:
                ok = result.outcome == AttemptOutcome.DELIVERED
                self.sink.write("finished", delivery=result.delivery_id, attempt=result.attempt, ok=ok)
            return results

        attempts.make_attempt = attempted  # type: ignore[assignment]
        Ends.record_called = all_recorded  # type: ignore[method-assign]
        ends.recorded = recorded
        local.recorded = recorded


def shorten_backoff() -> None:
    """Let the growing interval after failed guards and unknown definitions begin at 2 s and end at 8 s."""
    grow = retry.growing_interval

    def shorter(failures: int) -> Any:
        return grow(failures, base_seconds=2, cap_seconds=8)

    for name, module in list(sys.modules.items()):
        if name.startswith("dispatcher.") and getattr(module, "growing_interval", None) is grow:
            module.growing_interval = shorter  # type: ignore[attr-defined]
