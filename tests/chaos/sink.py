"""The append-only file in which the processes under test say what they did: the effects, and the attempts around them.

One JSON object per line, one `write` per line, so that lines of several processes do not mix and a killed process
loses nothing it has written. `mono` is CLOCK_MONOTONIC, which all processes of a machine share and no fault shifts.
Each line has the process and the thread that wrote it.

*About an attempt*: delivery, attempt, begins (which of the delivery's begins it is), unknown (whether its row said so
at the begin), key, chain, type, state, transition.

| phase | facts | written |
|---|---|---|
| `ready` | node | when a worker consumes |
| `evaluated` | chain | after the candidates of a chain were asked by an execution |
| `begun` | about an attempt, at | after its begin is committed; `at`: the database's clock |
| `loading`, `loaded` | chains | around `load_context` |
| `looking`, `looked` | chain, transition | around a guard, in an attempt |
| `calling` | about an attempt | first thing in the callback |
| `effect` | about an attempt | by the callback: the one thing that must not happen twice |
| `raised` | delivery, attempt, begins, after_effect | when the callback raises |
| `returned` | delivery, attempt, begins | when the callback returns |
| `finished` | delivery, attempt, begins, ok, error | when the end of an attempt is committed, or known not to be |
| `struck` | point | before a failpoint does harm |
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

DIRECTORY_VARIABLE: Final = "CHAOS_DIRECTORY"


class Sink:
    """Appends lines; the file is opened once per process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._pid = 0

    def write(self, phase: str, **facts: Any) -> None:
        """Append one line."""
        if self._pid != os.getpid():
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._pid = os.getpid()
        who = {"pid": self._pid, "thread": threading.get_native_id()}
        line = {"phase": phase, **who, "mono": round(time.monotonic(), 4), **facts}
        os.write(self._file, json.dumps(line).encode() + b"\n")


class SinkReader:
    """Reads what was appended since the last time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines that are new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            yield json.loads(line)


def own_sink() -> Sink:
    """The sink of the run that this process belongs to."""
    return Sink(Path(os.environ[DIRECTORY_VARIABLE]) / "sink.jsonl")
