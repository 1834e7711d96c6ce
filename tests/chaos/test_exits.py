"""The count of workers that ended by themselves, on real processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.exits import Exits
from tests.chaos.sink import Sink

SAY_READY = f"from pathlib import Path; from {Sink.__module__} import Sink; Sink(Path('sink.jsonl')).write('ready')"


@pytest.fixture
def ended(tmp_path: Path) -> Callable[[str], list[str]]:
    """What is counted after a process has run this code, in a directory with a sink."""

    def run(code: str) -> list[str]:
        exits = Exits(tmp_path / "sink.jsonl")
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root})
        process.wait(30)
        exits.note("worker0", process)
        return exits.found

    return run


def test_a_worker_that_ends_after_it_has_begun_to_consume_is_counted(ended: Callable[[str], list[str]]) -> None:
    assert ended(f"{SAY_READY}; raise SystemExit(1)") == ["worker0 ended with 1"]
    assert ended(SAY_READY) == ["worker0 ended with 0"]


def test_a_worker_whose_servers_were_away_when_it_started_is_not_counted(ended: Callable[[str], list[str]]) -> None:
    assert ended("raise SystemExit(1)") == []


def test_a_worker_that_was_killed_is_not_counted(ended: Callable[[str], list[str]]) -> None:
    assert ended(f"{SAY_READY}; import os; os.kill(os.getpid(), 9)") == []


def test_a_worker_that_runs_or_was_never_started_is_not_counted(tmp_path: Path) -> None:
    exits = Exits(tmp_path / "sink.jsonl")
    exits.note("worker0", None)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        exits.note("worker0", process)
        process.kill()
    assert exits.found == []
