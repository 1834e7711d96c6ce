"""The example as a user runs it: a real server, worker and beat, and a calendar of eighteen months."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 60


@contextmanager
def win_back(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The example's process, with its temporary files in `directory`; killed if it is still there at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.win_back", *options],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(directory), "DISPATCHER_DRY_RUN": "true"},  # the run must not listen to it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_small_run_does_what_the_file_says_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with win_back(tmp_path, "--customers", "10") as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), output
    assert "17 chains, 44 moves, 28 callbacks: 0 mismatches, 0 duplicates" in output
    assert max(map(len, output.splitlines())) <= 100
    assert list(tmp_path.iterdir()) == []


def test_a_day_that_does_not_end_is_an_error_with_the_end_of_the_workers_log(tmp_path: Path) -> None:
    with win_back(tmp_path, "--customers", "3", "--day-seconds", "0") as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "is not quiet after 0 s: 1 chains are due" in errors
    assert "worker.log:" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    with win_back(tmp_path, "--customers", "100") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        everything_runs = any(line.startswith("1997-") for line in process.stdout)  # the first line of progress
        assert everything_runs, process.stderr.read()
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3  # server, worker, beat
        process.send_signal(number)
        _, errors = process.communicate(timeout=STOP_SECONDS)
        _, alive = psutil.wait_procs(started, timeout=STOP_SECONDS)
    assert alive == []
    assert process.returncode == 130
    assert errors == "interrupted: all processes are stopped\n"
    assert list(tmp_path.iterdir()) == []
