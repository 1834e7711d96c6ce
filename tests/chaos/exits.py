"""Workers that ended by themselves. A supervisor starts them again, which would hide it."""

import signal
import subprocess
from pathlib import Path

from tests.chaos.sink import SinkReader


class Exits:
    """Counts the exits of the workers of one run. The suite ends them by SIGKILL only."""

    def __init__(self, sink: Path) -> None:
        self.found: list[str] = []
        self._reader = SinkReader(sink)
        self._ready: set[int] = set()

    def note(self, name: str, process: "subprocess.Popen[bytes] | None") -> None:
        """Keep the exit of a worker that had begun to consume. Before that it may end: its servers may be away."""
        if process is None or process.poll() in (None, -signal.SIGKILL):
            return
        self._ready.update(line["pid"] for line in self._reader.new_lines() if line["phase"] == "ready")
        if process.pid in self._ready:
            self.found.append(f"{name} ended with {process.returncode}")
