"""How workers and beats begin and end: one line where something is missing, no process left behind."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.nodes import Deployment, make_fifo, open_fifo
from tests.servers import PostgresServer, free_port

pytestmark = pytest.mark.acceptance


def test_a_worker_that_is_told_to_stop_finishes_its_callback_and_leaves_no_process_behind(
    make_deployment: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = make_deployment()
    fifo = make_fifo(tmp_path)
    with deployment.client() as client, deployment.running(deployment.worker()) as worker:
        chain = client.get_or_create_resource_chain(
            "single", [("test", "1")], initial_context={"callback_fifo": str(fifo)}
        )
        chain.enqueue()
        deployment.eventually(lambda: deployment.sink.lines("called"), "the callback")
        assert len(worker.processes()) == 3, "the worker and its pool"
        worker.kill("SIGTERM")
        deployment.eventually(lambda: "Warm shutdown" in worker.logs(), "the shutdown")
        open_fifo(fifo)
        assert worker.process is not None
        assert worker.process.wait(30) == 0
        assert worker.processes() == []
        assert chain.refresh().state == "first_sent"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def bare_deployment(make_deployment: Callable[..., Deployment]) -> Deployment:
    """A deployment in which everything is as it should be."""
    return make_deployment()


def assert_ends_with_one_line(deployment: Deployment, part: str, *words: str, **env: str) -> None:
    done, seconds = deployment.run("-A", "workers", part, **env)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()  # beat has printed its banner by then, on stdout
    assert "dispatcher: " in line
    for word in words:
        assert word in line
    assert "secret" not in done.stdout + line
    assert seconds < 10


@pytest.mark.alone
@pytest.mark.parametrize("part", ["worker", "beat"])
@pytest.mark.parametrize("silent", [False, True])
def test_without_its_broker_nothing_starts(
    bare_deployment: Deployment, silent_port: int, part: str, silent: bool
) -> None:
    port = silent_port if silent else free_port()
    url = f"redis://:secret@127.0.0.1:{port}/0"
    assert_ends_with_one_line(bare_deployment, part, "broker", str(port), DISPATCHER_BROKER_URL=url)


@pytest.mark.alone
@pytest.mark.parametrize("silent", [False, True])
def test_without_its_database_no_worker_starts(bare_deployment: Deployment, silent_port: int, silent: bool) -> None:
    port = silent_port if silent else free_port()
    url = f"postgresql://user:secret@127.0.0.1:{port}/rows"
    assert_ends_with_one_line(bare_deployment, "worker", "database", str(port), DISPATCHER_DATABASE_URL=url)


@pytest.mark.alone
def test_a_server_database_without_tables_is_left_alone(
    bare_deployment: Deployment, postgres_server: PostgresServer
) -> None:
    url = postgres_server.create_database()
    try:
        assert_ends_with_one_line(bare_deployment, "worker", "dispatcher db upgrade", DISPATCHER_DATABASE_URL=url)
    finally:
        postgres_server.drop_database(url)


@pytest.mark.alone
@pytest.mark.parametrize("part", ["worker", "beat"])
def test_a_wrong_configuration_is_told_in_one_line(bare_deployment: Deployment, part: str) -> None:
    assert_ends_with_one_line(bare_deployment, part, "no module", "nowhere", DISPATCHER_CONFIG="nowhere:CONFIG")


def test_a_module_of_celery_settings_is_laid_over_the_dispatcher_s(bare_deployment: Deployment) -> None:
    own = "timezone = 'Europe/Berlin'\nbroker_transport_options = {'priority_steps': [0, 5]}\n"
    (bare_deployment.directory / "own_settings.py").write_text(own)

    done, _ = bare_deployment.run("-A", "workers", "report", CELERY_CONFIG_MODULE="own_settings")

    assert done.returncode == 0, done.stderr
    assert "timezone: 'Europe/Berlin'" in done.stdout and "'priority_steps': [0, 5]" in done.stdout
    assert "'dispatcher.sweep'" in done.stdout, "and what it does not set stays"


@pytest.mark.alone
@pytest.mark.parametrize("part", ["worker", "beat"])
def test_a_missing_module_of_celery_settings_is_told_in_one_line(bare_deployment: Deployment, part: str) -> None:
    assert_ends_with_one_line(bare_deployment, part, "nowhere", CELERY_CONFIG_MODULE="nowhere")
