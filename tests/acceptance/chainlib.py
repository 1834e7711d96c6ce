"""The configuration of the processes under test, and the sink that their guards and callbacks write to.

What guards and callbacks do to a chain is said in its stored context:

- `guard_fifo`, `callback_fifo`: a path; while it exists, wait until a writer opens and closes this FIFO;
- `guard_file`, `callback_file`: a path; wait as long as it exists, in small steps, so that pools of greenlets go on;
- `guard_from`: the guard waits from this time on that it is asked (1 is the first);
- `callback_seconds`: the callback takes so long; `callback_spins`: without ever waiting;
- `callback_deaf`: a path; as long as it exists, the callback takes no notice of any exception;
- `guard_exit`, `callback_exit`: a path; while it exists, end the process at once;
- `fail_times`: the callback raises that often; `fail_for_good`: it raises `PermanentFailure`.
"""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dispatcher import DONE, NEW, PermanentFailure, RetryPolicy, Transition

SINK_VARIABLE: Final = "CHAIN_DISPATCHER_TEST_SINK"
MAX_ATTEMPTS: Final = 3
GUARD_SECONDS: Final = 0.005
PATIENT_SECONDS: Final = 5.0
_STEP_SECONDS: Final = 0.02


class Sink:
    """An append-only file of JSON lines, one for each guard asked (`asked`), callback called and callback done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, what: str, transition: Transition, **facts: Any) -> None:
        """Append one line. One write: lines of several processes do not mix."""
        line = {
            "what": what,
            "chain_id": transition.chain.id,
            "transition": type(transition).__name__,
            "key": transition.idempotency_key,
            "pid": os.getpid(),
            "at": time.time(),
            **facts,
        }
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, json.dumps(line).encode() + b"\n")
        finally:
            os.close(file)

    def lines(self, what: str | None = None, *, chain_id: int | None = None) -> list[dict[str, Any]]:
        """What was written, in order, of one kind and chain."""
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [
            line
            for line in found
            if (what is None or line["what"] == what) and (chain_id is None or line["chain_id"] == chain_id)
        ]


class Obedient(Transition):
    """Valid, unless the context says otherwise."""

    retry = RetryPolicy(max_attempts=MAX_ATTEMPTS, base_seconds=0.2, factor=1, jitter=0)

    def is_valid(self) -> bool:
        if {"guard_fifo", "guard_file", "guard_exit"} & self.context.keys():
            _sink().write("asked", self)
        first = self.context.get("guard_from", 1)
        if first == 1 or len(_sink().lines("asked", chain_id=self.chain.id)) >= first:
            _wait_or_exit(self.context, "guard")
        return True


class First(Obedient):
    final_state = "first_sent"


class Second(Obedient):
    final_state = "second_sent"


class Patient(Obedient):
    """A failed attempt waits for long enough that a test can do something meanwhile."""

    final_state = "first_sent"
    retry = RetryPolicy(max_attempts=MAX_ATTEMPTS, base_seconds=PATIENT_SECONDS, factor=1, jitter=0)


class Finish(Obedient):
    final_state = DONE


class Asked(Transition):
    final_state = "answered"
    recheck_seconds = None

    def is_valid(self) -> bool:
        if "question" not in self.context:
            self.errors.append("nobody asked")
        return not self.errors


class Unready(Transition):
    """Never valid, and takes its time to say so."""

    final_state = "ready"

    def is_valid(self) -> bool:
        _sink().write("asked", self)
        time.sleep(GUARD_SECONDS)
        self.errors.append("not ready")
        return False


def deliver(transition: Transition, **kwargs: Any) -> None:
    """The callback of all chains here."""
    sink, context = _sink(), transition.context
    chain_id = transition.chain.id
    sink.write("called", transition, kwargs=kwargs, context={**context, "resources": None})
    _wait_or_exit(context, "callback")
    _take_time(context)
    if context.get("fail_for_good"):
        raise PermanentFailure("no such address")
    if len(sink.lines("called", chain_id=chain_id)) <= context.get("fail_times", 0):
        raise ConnectionError("mail server is down")
    sink.write("done", transition)


def _sink() -> Sink:
    return Sink(Path(os.environ[SINK_VARIABLE]))


def _take_time(context: Mapping[str, Any]) -> None:
    time.sleep(context.get("callback_seconds", 0))
    until = time.monotonic() + context.get("callback_spins", 0)
    while time.monotonic() < until:
        pass
    while "callback_deaf" in context and Path(context["callback_deaf"]).exists():
        with suppress(BaseException):
            time.sleep(_STEP_SECONDS)


def _wait_or_exit(context: Mapping[str, Any], who: str) -> None:
    fifo, file, mark = (context.get(f"{who}_{what}") for what in ("fifo", "file", "exit"))
    while file is not None and Path(file).exists():
        time.sleep(_STEP_SECONDS)
    if fifo is not None and Path(fifo).exists():
        Path(fifo).read_bytes()
    if mark is not None and Path(mark).exists():
        os._exit(1)


CONFIG = {
    "chains": [
        {
            "chain_type": "sequence",
            "callback": deliver,
            "transitions": {NEW: [First], "first_sent": [Second], "second_sent": [Finish], DONE: []},
        },
        {"chain_type": "single", "callback": deliver, "transitions": {NEW: [First], "first_sent": []}},
        {"chain_type": "patient", "callback": deliver, "transitions": {NEW: [Patient], "first_sent": []}},
        {
            "chain_type": "paced",
            "callback": deliver,
            "rate_limit": "1/s",
            "transitions": {NEW: [First], "first_sent": []},
        },
        {
            "chain_type": "careful",
            "callback": deliver,
            "on_unknown": "hold",
            "transitions": {NEW: [First], "first_sent": []},
        },
        {"chain_type": "unready", "callback": deliver, "transitions": {NEW: [Unready], "ready": []}},
        {
            "chain_type": "question",
            "callbacks": {"answer": deliver},
            "transitions": {NEW: [Asked], "answered": []},
        },
    ]
}
