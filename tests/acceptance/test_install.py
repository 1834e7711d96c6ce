"""`workers.install(app, dispatcher)` in a Celery app that a team already has."""

import sys
import textwrap
from typing import Any

import pytest
from celery import Celery

from dispatcher import Dispatcher, Settings
from tests.acceptance.chainlib import CONFIG
from tests.acceptance.nodes import Deployment, WorkerNode

pytestmark = pytest.mark.acceptance

THEIR_APP = """
    import os
    from pathlib import Path

    from celery import Celery

    import workers
    from dispatcher import Dispatcher
    from tests.acceptance.chainlib import CONFIG

    app = Celery("theirapp", broker=os.environ["THEIR_BROKER"])
    app.conf.beat_schedule = {"theirs": {"task": "theirapp.touch", "schedule": 1.0, "args": ["by-their-beat"]}}


    @app.task
    def touch(name):
        Path(name).touch()


    workers.install(app, Dispatcher(CONFIG, celery_app=app))
"""


@pytest.fixture(scope="module")
def deployment_settings() -> dict[str, Any]:
    return {"sweep_seconds": 1, "relay_seconds": 1, "queued_seconds": 2}


@pytest.fixture
def their_worker(deployment: Deployment) -> WorkerNode:
    """Their worker with its beat, started as they did before there was a dispatcher."""
    (deployment.directory / "theirapp.py").write_text(textwrap.dedent(THEIR_APP))
    env = {**deployment.env, "THEIR_BROKER": deployment.redis_url}
    del env["DISPATCHER_CONFIG"]
    return WorkerNode(
        [sys.executable, "-m", "celery", "-A", "theirapp", "worker", "-B", "--loglevel=INFO", "--concurrency=2"],
        deployment.directory,
        env,
    )


def test_their_tasks_and_the_dispatchers_work_side_by_side(deployment: Deployment, their_worker: WorkerNode) -> None:
    settings = Settings(**{**deployment.options, "config": None})
    with (
        Celery("client", broker=deployment.redis_url) as app,
        Dispatcher(CONFIG, settings=settings) as client,
        deployment.running(their_worker),
    ):
        chain = client.get_or_create_resource_chain("sequence", [("test", "1")])
        app.send_task("theirapp.touch", args=["by-hand"])
        for name in ("by-hand", "by-their-beat"):
            deployment.eventually((deployment.directory / name).exists, f"their task {name}")
        deployment.assert_went_all_the_way_once([chain])
        client.enqueue("question", [("test", "2")], initial_context={"question": "?"}, callback="answer")
        deployment.wait_for_state(client.get_or_create_resource_chain("question", [("test", "2")]), "answered")
        assert "Traceback" not in their_worker.logs()
