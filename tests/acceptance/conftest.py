"""pytest-celery's `celery_setup` over local processes: the project's own worker, and a Redis server of the run's own.

The processes are shared by the tests of one module (and one kind of database); the wrappers that pytest-celery puts
around them are each test's own. A module chooses its databases and settings by overriding `database_kind` and
`deployment_settings`.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryBrokerCluster, CeleryTestBroker, CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster

from dispatcher import Chain, Dispatcher
from tests.acceptance.fleet import SETTINGS, Fleet
from tests.acceptance.nodes import BeatNode, Deployment, RedisNode, WorkerNode
from tests.conftest import running
from tests.servers import PostgresServer, RedisServer

# --- shared by the tests of a module ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database_kind() -> str:
    """`sqlite` or `postgresql`."""
    return "sqlite"


@pytest.fixture(scope="module")
def deployment_settings() -> dict[str, Any]:
    """`DISPATCHER_*` settings, by field name."""
    return {}


@pytest.fixture(scope="module")
def make_database_url(database_kind: str, request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """Makes migrated databases of the module's kind; an SQLite file is made in the given directory."""
    if database_kind == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        yield lambda directory: f"sqlite:///{shutil.copy(template, directory / 'rows.sqlite')}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    made: list[str] = []

    def make(_: Path) -> str:
        made.append(server.create_database(template=request.getfixturevalue("postgres_template")))
        return made[-1]

    yield make
    for url in made:
        server.drop_database(url)


@pytest.fixture(scope="module")
def default_redis_broker() -> Iterator[RedisNode]:
    with running(RedisServer) as server:
        yield RedisNode(server)


@pytest.fixture(scope="module")
def make_deployment(
    make_database_url: Callable[[Path], str],
    default_redis_broker: RedisNode,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Deployment]:
    """Makes deployments with a database, a Redis database number and settings of their own."""
    numbers = iter(range(1, 128))

    def make(**settings: Any) -> Deployment:
        directory = tmp_path_factory.mktemp("deployment")
        if "redis_url" not in settings:
            settings["redis_url"] = f"{default_redis_broker.url.rpartition('/')[0]}/{next(numbers)}"
        if "database_url" not in settings:
            settings["database_url"] = make_database_url(directory)
        return Deployment(directory, **settings)

    return make


@pytest.fixture(scope="module")
def deployment(
    make_deployment: Callable[..., Deployment],
    default_redis_broker: RedisNode,
    deployment_settings: dict[str, Any],
) -> Deployment:
    """The module's deployment, whose worker is `celery_setup.worker`."""
    return make_deployment(redis_url=default_redis_broker.url, **deployment_settings)


@pytest.fixture(scope="module")
def default_worker_container(deployment: Deployment) -> Iterator[WorkerNode]:
    with deployment.running(deployment.worker()) as node:
        yield node


@pytest.fixture(scope="module")
def beat_node(deployment: Deployment) -> Iterator[BeatNode]:
    """The module's beat."""
    with deployment.running(deployment.beat()) as node:
        yield node


# --- each test's own --------------------------------------------------------------------------------------------------


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: CeleryTestBroker) -> CeleryBrokerCluster:
    """Redis only: the plugin would run each test on RabbitMQ as well."""
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster() -> None:
    """None: results are ignored."""


@pytest.fixture
def celery_worker_cluster(celery_setup_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    """The one worker, started again if a test before this one ended it."""
    if celery_setup_worker.container.status != "running":
        celery_setup_worker.restart()
    return CeleryWorkerCluster(celery_setup_worker)


@pytest.fixture
def celery_setup_app(
    celery_setup_cls: type[CeleryTestSetup], celery_setup_config: dict[str, Any], celery_setup_name: str
) -> Iterator[Celery]:
    """An app on the same broker, whose connections end with the test."""
    with celery_setup_cls.create_setup_app(
        celery_setup_config=celery_setup_config, celery_setup_app_name=celery_setup_name
    ) as app:
        yield app


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Dispatcher]:
    """The dispatcher of an application beside the module's workers."""
    with deployment.client() as dispatcher:
        yield dispatcher


@pytest.fixture
def new_chain(client: Dispatcher) -> Callable[..., Chain]:
    """Makes chains of the module's deployment: `new_chain("single", **context)`."""

    def make(chain_type: str, **context: Any) -> Chain:
        return client.get_or_create_resource_chain(
            chain_type, [("test", uuid.uuid4().hex)], initial_context=context or None
        )

    return make


@pytest.fixture
def make_fleet(make_deployment: Callable[..., Deployment], tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> Fleet:
            deployment = make_deployment(**{**SETTINGS, **settings})
            return Fleet(deployment, stack.enter_context(deployment.client()), stack, tmp_path)

        yield make


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet]) -> Fleet:
    return make_fleet()
