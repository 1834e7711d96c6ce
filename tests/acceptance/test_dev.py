"""`dispatcher dev` as a real process with its real children, in a temporary directory."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import dispatcher
from dispatcher.embedded.stack import Stack, StackError
from dispatcher.embedded.state import find_running

MARKER = "CHAIN_DISPATCHER_TEST_RUN"

CONFIG = """
    from pathlib import Path
    from dispatcher import Transition

    class Greet(Transition):
        final_state = "greeted"

        def is_valid(self):
            return True

    def greet(transition):
        (customer,) = [name for kind, name in transition.chain.resources if kind == "customer"]
        Path(f"greeted-{customer}").touch()

    CONFIG = {"chains": [{"chain_type": "greeting", "callback": greet, "transitions": {"new": [Greet]}}]}
"""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Project:
    """A directory with a configuration, and the processes started there.

    They are known by a mark in their environment, and by their directory: a Redis server writes over its environment.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = directory / "dev.out"
        self.mark = uuid.uuid4().hex
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
        self.env |= {
            MARKER: self.mark,
            "DISPATCHER_CONFIG": "shop:CONFIG",
            "DISPATCHER_SWEEP_SECONDS": "1",
            "DISPATCHER_RELAY_SECONDS": "1",
            "PYTHONPATH": str(Path(dispatcher.__file__).parents[1]),
        }
        (directory / "shop.py").write_text(textwrap.dedent(CONFIG))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dispatcher", *arguments],
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start_dev(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "dispatcher", "dev", "--concurrency", "2", *arguments],
                cwd=self.directory,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(lambda: "dev    | ready" in self.printed() or process.poll() is not None, "dev to be ready")
        assert process.poll() is None, self.printed()
        return process

    def printed(self) -> str:
        return self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                marked = process.environ().get(MARKER) == self.mark
                here = Path(process.cwd()).is_relative_to(self.directory)
                if (marked or here) and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def part(self, name: str) -> psutil.Process:
        """The process of one part; of a worker the one that the pool's processes come from."""
        if name == "embedded server":
            return next(one for one in self.processes() if one.name() in ("redis-server", "valkey-server"))
        return min((one for one in self.processes() if name in one.cmdline()), key=lambda one: one.create_time())


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path)
    yield project
    for process in project.processes():
        with suppress(psutil.Error):
            process.kill()


def test_ctrl_c_stops_everything_and_leaves_no_process_behind(project: Project) -> None:
    dev = project.start_dev()
    directory = project.directory / ".dispatcher"
    names = {process.name() for process in project.processes()}
    assert len(project.processes()) == 6, "dev, server, worker, its two pool processes, beat"
    assert names & {"redis-server", "valkey-server"}
    assert find_running(directory) is not None
    assert (directory / "dev.pid").read_text() == f"{dev.pid}\n"

    os.killpg(dev.pid, signal.SIGINT)  # what a terminal does

    assert dev.wait(40) == 0, project.printed()
    assert project.processes() == []
    assert find_running(directory) is None
    printed = project.printed()
    assert "worker | " in printed
    assert "beat   | " in printed
    assert printed.splitlines()[-1] == "dev    | stopped"
    assert "\x1b" not in printed, "no colours without a terminal"
    assert "ready." in (directory / "worker.log").read_text()
    assert (directory / "dev.pid").read_text() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_killed_dev_takes_everything_with_it_and_can_be_started_again(project: Project) -> None:
    dev = project.start_dev()
    dev.kill()
    dev.wait()
    wait_until(lambda: project.processes() == [], "the end of all processes", 10)

    dev = project.start_dev()
    dev.send_signal(signal.SIGTERM)
    assert dev.wait(40) == 0, project.printed()
    assert project.processes() == []


@pytest.mark.parametrize("part", ["worker", "beat", "embedded server"])
def test_a_part_that_dies_is_named_and_the_rest_stops(project: Project, part: str) -> None:
    dev = project.start_dev()
    project.part(part).kill()
    assert dev.wait(40) == 1, project.printed()
    assert project.processes() == []
    last = project.printed().splitlines()[-1]
    assert last.startswith("dispatcher: ")
    assert f"{part} {'has ended' if part == 'embedded server' else 'ended with code -9'}" in last


def test_a_second_dev_in_the_same_directory_is_refused(project: Project) -> None:
    dev = project.start_dev()
    before = {process.pid for process in project.processes()}
    second = project.run("dev")
    assert second.returncode == 1
    assert second.stderr.strip().endswith(f"(process {dev.pid})")
    assert len(second.stderr.splitlines()) == 1
    assert {process.pid for process in project.processes()} == before
    dev.send_signal(signal.SIGINT)
    assert dev.wait(40) == 0


def test_what_another_process_enqueues_in_this_directory_is_done(project: Project) -> None:
    dev = project.start_dev()
    done = project.run("enqueue", "greeting", "customer=7")
    assert done.returncode == 0, done.stderr
    wait_until((project.directory / "greeted-7").exists, "the callback")
    dev.send_signal(signal.SIGINT)
    assert dev.wait(40) == 0, project.printed()
    assert project.processes() == []


def test_the_level_chooses_what_is_shown_and_not_what_is_logged(project: Project) -> None:
    dev = project.start_dev("--log-level", "warning")
    dev.send_signal(signal.SIGINT)
    assert dev.wait(40) == 0
    assert "INFO" not in project.printed()
    assert "INFO" in (project.directory / ".dispatcher" / "worker.log").read_text()


def test_a_wrong_configuration_is_told_before_anything_starts(project: Project) -> None:
    (project.directory / "shop.py").write_text("CONFIG = {}")
    done = project.run("dev")
    assert done.returncode == 1
    assert done.stderr == "dispatcher: the configuration has no `chains`\n"
    assert not (project.directory / ".dispatcher" / "worker.log").exists()


def test_a_stack_gives_its_addresses_and_stops_with_its_block(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.directory)
    directory = project.directory / "stack"
    with Stack(directory, env=project.env, concurrency=1) as stack:
        stack.check()
        assert find_running(directory) == stack.redis_url
        assert stack.env["DISPATCHER_BROKER_URL"] == stack.broker_url
        assert stack.database_url == f"sqlite:///{directory}/dispatcher.db"
        with pytest.raises(StackError, match=f"already running .*process {os.getpid()}"):
            Stack(directory, env=project.env).__enter__()
        stack.check()
    assert project.processes() == []


def test_a_worker_that_cannot_start_is_told_with_its_last_words(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.directory)
    stack = Stack(project.directory / "stack", env=project.env, worker_args=["--no-such-option"])
    with pytest.raises(StackError, match=r"worker ended with code 2: .*no-such-option"):
        stack.__enter__()
    assert project.processes() == []
