"""The watchdog ends a process that it watches, whatever the stuck code has done, and never one that is in time."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

LIMIT_SECONDS = 1.0
END_SECONDS = 10
LOOK_SECONDS = 0.5
ROOT = Path(__file__).parents[3]

PREPARE = f"""
import os, signal, subprocess, sys, threading, time
from dispatcher.delivery.watchdog import Watchdog
watchdog = Watchdog(callback_seconds=float(os.environ.get("LIMIT", {LIMIT_SECONDS})))
watchdog.start()
"""

STUCK = """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


@pytest.fixture(autouse=True)
def _history_is_consistent() -> None:
    """No dispatcher here, hence no oracle."""


class Watched:
    """A process that is watched, and whose parent is this one."""

    def __init__(self, work: str, *, stderr: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREPARE + work],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def ended(self) -> tuple[int, str]:
        """How it ended, and what it has printed."""
        try:
            said = self.process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        self.said = said[0].decode()
        self.errors = (said[1] or b"").decode()
        return self.process.returncode, self.said

    def is_killed(self) -> bool:
        return self.ended()[0] == -signal.SIGKILL


def in_callback(work: str) -> str:
    return "with watchdog.watched():\n" + "".join(f"    {line}\n" for line in work.strip().splitlines())


def test_a_callback_that_swallows_everything_is_killed_at_its_limit_and_the_log_says_so() -> None:
    watched = Watched("print('begun', flush=True)\n" + in_callback(STUCK))
    assert watched.process.stdout is not None and watched.process.stdout.readline() == b"begun\n"
    began = time.monotonic()
    assert watched.is_killed()
    assert LIMIT_SECONDS - 0.1 <= time.monotonic() - began < LIMIT_SECONDS + 2 * LOOK_SECONDS + 2
    pid = watched.process.pid
    assert watched.errors == f"dispatcher: worker process {pid} is killed: a callback has run 1 s\n"


@pytest.mark.parametrize(
    "harm",
    ["os.close(2)", "sys.stderr.close()", "os.close(2); os.close(1)"],
)
def test_a_callback_that_closes_its_standard_error_is_killed(harm: str) -> None:
    assert Watched(in_callback(f"{harm}\n{STUCK}")).is_killed()


def test_nothing_is_written_into_a_file_that_has_got_the_number_of_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "orders"
    work = f"os.close(2)\nassert os.open({str(path)!r}, os.O_CREAT | os.O_WRONLY) == 2\n{STUCK}"
    process = Watched(in_callback(work))
    assert process.is_killed()
    assert path.read_bytes() == b""


def test_a_log_that_nobody_reads_does_not_keep_it_from_killing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 1024)
    os.set_blocking(writer, True)
    try:
        assert Watched(in_callback(STUCK), stderr=writer).is_killed()
    finally:
        os.close(reader)
        os.close(writer)


def test_a_log_whose_reader_has_gone_does_not_keep_it_from_killing() -> None:
    reader, writer = os.pipe()
    process = Watched(in_callback(STUCK), stderr=writer)
    os.close(reader)
    os.close(writer)
    assert process.is_killed()


def test_a_callback_that_ends_at_its_limit_is_recorded_or_killed_and_never_both() -> None:
    """The ends lie around the moments at which the watchdog looks."""
    work = """
with watchdog.watched():
    time.sleep({seconds})
print("recorded", flush=True)
time.sleep(1.5)
"""
    processes = [Watched(work.format(seconds=LIMIT_SECONDS + step * 0.05)) for step in range(-2, 12)]
    outcomes = {process.ended() for process in processes}
    assert outcomes <= {(-signal.SIGKILL, ""), (0, "recorded\n")}
    assert len(outcomes) == 2, "the ends do not lie around the limit"


def test_a_callback_may_start_processes_and_these_are_not_watched() -> None:
    """A child lives on although it takes longer than the limit; the callback itself ended in time."""
    process = Watched("""
with watchdog.watched():
    subprocess.run(["true"], check=True)
    subprocess.run(["true"], check=True, preexec_fn=lambda: None)
    child = os.fork()
    if child == 0:
        time.sleep(2.5)
        os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert process.ended() == (0, "7\n"), process.errors


def test_a_child_that_leaves_the_callback_does_not_wait_for_a_lock_of_its_parent() -> None:
    """`sys.exit` in a forked child goes through the block; the watchdog of the parent may hold its lock at the fork."""
    process = Watched("""
with watchdog.watched():
    watchdog._lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        sys.exit(3)
    watchdog._lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert process.ended() == (0, "3\n"), process.errors


def test_the_limit_of_a_callback_holds_beyond_one_that_it_contains() -> None:
    assert Watched(in_callback(f"with watchdog.watched():\n    pass\n{STUCK}")).is_killed()


@pytest.mark.parametrize("work", [in_callback("time.sleep(20)"), "time.sleep(20)"], ids=["in a callback", "idle"])
def test_the_death_of_the_parent_is_noticed_with_and_without_a_callback(work: str) -> None:
    """The parent of the watched process is a process between it and this one."""
    between = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()",
            PREPARE + "print('watched', flush=True)\n" + work,
        ],
        cwd=ROOT,
        env={**os.environ, "LIMIT": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert between.stdout is not None and between.stderr is not None
    assert between.stdout.readline() == b"watched\n"
    between.kill()
    between.wait(END_SECONDS)
    assert b"its parent has died" in between.stderr.read(), "it has ended by itself"
    between.stdout.close()
    between.stderr.close()


def test_a_process_whose_parent_had_died_before_it_began_to_watch_is_killed() -> None:
    """A pool's process may begin after the worker that made it was killed."""
    script = """
import os, subprocess, sys, time
made_by = os.getpid()
if os.fork() == 0:
    while os.getppid() == made_by:
        time.sleep(0.01)
    from dispatcher.delivery.watchdog import Watchdog
    Watchdog(callback_seconds=1).start(parent=made_by)
    time.sleep(5)
    print("lives on", flush=True)
    os._exit(0)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert b"its parent has died" in done.stderr and done.stdout == b""
