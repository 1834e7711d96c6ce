"""The package as users get it: built, installed from its wheel, and started far from this repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from tests.acceptance.nodes import ROOT, Deployment, WorkerNode

pytestmark = pytest.mark.acceptance

SHOP = """
    from pathlib import Path
    from dispatcher import NEW, Transition

    class Greet(Transition):
        final_state = "greeted"

        def is_valid(self):
            return True

    def greet(transition):
        Path("greeted").touch()

    CONFIG = {"chains": [{"chain_type": "greeting", "callback": greet, "transitions": {NEW: [Greet]}}]}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that belong into it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "celeryconfig.py"):
        shutil.copy(ROOT / name, source)
    for name in ("dispatcher", "workers", "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".dispatcher"))
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(source)])
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; what that depends on comes from this run's environment."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    target = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)])
    # Behind the environment's own directory, and without the .pth files in it: an editable install stays outside.
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with a user's configuration, which is not the one that things are started in."""
    directory = tmp_path / "code"
    directory.mkdir()
    (directory / "shop.py").write_text(textwrap.dedent(SHOP))
    return directory


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    directory = tmp_path / "empty"
    directory.mkdir()
    return directory


def _run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None, code: int = 0) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_package_is_the_wheels_and_nothing_of_the_repository_came_along(installed: Path, empty: Path) -> None:
    env = {"PATH": os.environ["PATH"]}
    found = _run([str(installed), "-c", "import dispatcher, workers; print(dispatcher.__file__)"], cwd=empty, env=env)
    assert found.startswith(str(installed.parents[1]))
    for name in ("celeryconfig", "tests", "examples"):
        assert "ModuleNotFoundError" in _run([str(installed), "-c", f"import {name}"], cwd=empty, env=env, code=1)
    usage = _run([str(installed.with_name("dispatcher")), "--help"], cwd=empty, env=env)
    assert usage.startswith("Usage: dispatcher")


def test_a_worker_with_its_beat_runs_from_an_empty_directory(
    installed: Path, empty: Path, shop: Path, deployment: Deployment
) -> None:
    env = {
        **deployment.env,
        "PYTHONPATH": str(shop),
        "DISPATCHER_CONFIG": "shop:CONFIG",
        "DISPATCHER_DATABASE_URL": f"sqlite:///{shop}/rows.sqlite",  # made on first use: migrations are in the wheel
        "DISPATCHER_SWEEP_SECONDS": "1",
    }
    command = [str(installed), "-m", "celery", "-A", "workers", "worker", "-B", "--loglevel=INFO", "--concurrency=1"]
    with deployment.running(WorkerNode(command, empty, env)):
        printed = _run([str(installed.with_name("dispatcher")), "enqueue", "greeting", "customer=7"], cwd=shop, env=env)
        deployment.eventually((empty / "greeted").exists, f"the callback after {printed!r}")
