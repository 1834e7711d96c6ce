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
| `in_load` | inside `load_context`, in an attempt | kills |
| `in_look` | inside a guard, in an attempt | kills |
| `before_call`, `after_call` | inside a callback, before and after its effect | kills |
| `before_finish` | the callback has returned, its end is not written | kills |
| `commit_lies` | such a commit succeeds | the caller gets an OperationalError |
| `drop`, `double`, `reorder` | a message is sent | it is not, it is twice, it is after the next one |

`database_away` is not drawn: where the driver has left the file `database-wanted`, the next callback that returns takes
it, says so in the sink, and goes on when the database does not answer any more.
"""

import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from dispatcher import Dispatcher, DispatcherError, retry
from dispatcher.coordination.locks import ChainLocks
from dispatcher.delivery import attempt as one_attempt
from dispatcher.delivery import recording
from dispatcher.delivery.ends import Ends
from dispatcher.domain.records import DeliveryRecord
from dispatcher.execution import executor
from dispatcher.messages.publisher import Publisher
from dispatcher.passes.pages import Pages
from dispatcher.states import AttemptOutcome
from dispatcher.storage import database
from dispatcher.storage.postgresql import PostgresqlStore
from tests.chaos.sink import DIRECTORY_VARIABLE, own_sink

FAILPOINTS_VARIABLE: Final = "CHAOS_FAILPOINTS"
SEED_VARIABLE: Final = "CHAOS_SEED"
VERSION_VARIABLE: Final = "CHAOS_VERSION"
NODE_VARIABLE: Final = "CHAOS_NODE"
FLAG: Final = "faults-on"
WANTED: Final = "database-wanted"
KILLING: Final = (
    "after_lock",
    "after_evaluation",
    "before_commit",
    "after_commit",
    "after_publish",
    "in_load",
    "in_look",
    "before_call",
    "after_call",
    "before_finish",
)
_WHOLE_WORKER: Final = 0.1
_AWAY_SECONDS: Final = 8.0


class _Thread(threading.local):
    """What this thread of a worker is doing."""

    def __init__(self) -> None:
        self.delivering = False
        """Whether it makes attempts, and does not execute chains."""

        self.begun: dict[str, dict[str, Any]] = {}
        """What the sink is told of the attempt that this thread has begun last, by idempotency key."""


class Failpoints:
    """The failpoints of this process."""

    def __init__(self, probabilities: dict[str, float], *, seed: str, flag: Path) -> None:
        self._probabilities = probabilities
        self._seed = seed
        self._flag = flag
        self._pid = 0
        self._random = random.Random()
        self.sink = own_sink()
        self.thread = _Thread()

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

    def facts_of(self, key: str) -> dict[str, Any]:
        """What the sink is told of the attempt that this thread makes under this key; no delivery if it began none."""
        return self.thread.begun.get(key, {"delivery": "", "attempt": 0, "begins": 0, "unknown": False, "state": ""})

    @contextmanager
    def asking(self, transition: Any) -> Iterator[None]:
        """Around a guard: in an attempt the sink is told when it is asked, and when it has answered."""
        if not self.thread.delivering:
            yield
            return
        facts = {"chain": transition.chain.id, "transition": type(transition).__name__}
        self.sink.write("looking", **facts)
        self.hit("in_look")
        yield
        self.sink.write("looked", **facts)

    def await_outage(self) -> None:
        """If the driver wants an outage at the return of a callback, ask for it, and return when it has begun."""
        try:
            (self._flag.parent / WANTED).unlink()
        except FileNotFoundError:
            return
        self.sink.write("struck", point="database_away")
        url = make_url(os.environ["DISPATCHER_DATABASE_URL"])
        deadline = time.monotonic() + _AWAY_SECONDS
        while time.monotonic() < deadline:
            try:
                with socket.create_connection((url.host, url.port), timeout=0.5) as connection:
                    connection.settimeout(0.1)
                    if connection.recv(1) == b"":  # a proxy that refuses takes the connection and closes it
                        return
            except TimeoutError:  # it waits for what a client says first: it is there
                time.sleep(0.02)
            except OSError:
                return

    def install(self) -> None:
        """Put the failpoints around the library's functions, and let its guards back off for seconds, not minutes."""
        self._wrap_locks()
        self._wrap_evaluation()
        self._wrap_commits()
        self._wrap_messages()
        self._wrap_begins()
        self._wrap_ends()
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

    def _wrap_begins(self) -> None:
        begin, deliver, make = PostgresqlStore.begin, Dispatcher.deliver, one_attempt.make_attempt

        def begun(store: PostgresqlStore, *arguments: Any, **options: Any) -> Any:
            found = begin(store, *arguments, **options)
            for one in found:
                self._note_begun(one)
            return found

        def delivered(dispatcher: Dispatcher, owed: Any) -> Any:
            self.thread.delivering, self.thread.begun = True, {}
            try:
                return deliver(dispatcher, owed)
            finally:
                self.thread.delivering = False

        def attempted(attempt: Any, *arguments: Any, **options: Any) -> Any:
            noted = self.thread.begun.get(attempt.delivery.idempotency_key, {})
            if noted.get("begins") != attempt.delivery.begins:  # begun anew, within its group
                self._note_begun(attempt.begun)
            return make(attempt, *arguments, **options)

        PostgresqlStore.begin = begun  # type: ignore[method-assign]
        Dispatcher.deliver = delivered  # type: ignore[method-assign]
        _replace("make_attempt", make, attempted)

    def _note_begun(self, begun: Any) -> None:
        row = begun.delivery
        facts = {
            "delivery": row.id,
            "attempt": row.attempt,
            "begins": row.begins,
            "unknown": row.unknown,
            "key": row.idempotency_key,
            "chain": row.chain_id,
            "type": begun.chain.chain_type,
            "state": row.from_state,
            "transition": row.transition,
        }
        self.thread.begun[row.idempotency_key] = facts
        self.sink.write("begun", **facts, at=begun.machine_now.isoformat())

    def _wrap_ends(self) -> None:
        record, record_called = recording.recorded, Ends.record_called

        def recorded(rows: Any, row: DeliveryRecord, *arguments: Any, **options: Any) -> bool:
            self.hit("before_finish")
            facts = {"delivery": row.id, "attempt": row.attempt, "begins": row.begins}
            try:
                ok = record(rows, row, *arguments, **options)
            except (DispatcherError, DBAPIError) as error:
                self.sink.write("finished", **facts, ok=False, error=type(error).__name__)
                raise
            self.sink.write("finished", **facts, ok=ok)
            return ok

        def all_recorded(recorder: Ends, called: Sequence[Any]) -> Any:
            if called:
                self.hit("before_finish")
            begins = {attempt.delivery.id: attempt.delivery.begins for attempt, *_ in called}
            results = record_called(recorder, called)
            for result in results:
                ok = result.outcome == AttemptOutcome.DELIVERED
                facts = {"attempt": result.attempt, "begins": begins[result.delivery_id]}
                self.sink.write("finished", delivery=result.delivery_id, **facts, ok=ok)
            return results

        Ends.record_called = all_recorded  # type: ignore[method-assign]
        _replace("recorded", record, recorded)


def shorten_backoff() -> None:
    """Let the growing interval after failed guards and unknown definitions begin at 2 s and end at 8 s."""
    grow = retry.growing_interval

    def shorter(failures: int, **options: Any) -> Any:
        return grow(failures, **{**options, "base_seconds": 2, "cap_seconds": 8})

    _replace("growing_interval", grow, shorter)


def _replace(name: str, function: Any, other: Any) -> None:
    """Put another function where modules of the library have imported this one."""
    modules = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("dispatcher.") and getattr(module, name, None) is function
    ]
    assert modules, f"the library has no {name}"
    for module in modules:
        setattr(module, name, other)
