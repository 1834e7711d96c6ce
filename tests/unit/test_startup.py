"""What a start loads: a configuration, a help text and a completion stay without the heavy libraries.

Modules are counted and nothing is timed: a module that is loaded costs the same on every machine.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dispatcher

ROOT = Path(__file__).parents[2]
HEAVY = {"alembic", "celery", "kombu", "pydantic", "redis", "sqlalchemy"}


def run(*arguments: str, **environment: str) -> tuple[str, set[str]]:
    """What a fresh Python prints, and the heavy libraries that it loads."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    loaded = re.findall(r"^import time:.*\| +([\w.]+)$", process.stderr, re.MULTILINE)
    said = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 0, "\n".join(said)
    assert loaded, "the interpreter has to say what it loads"
    return process.stdout, HEAVY & {name.partition(".")[0] for name in loaded}


def command(*arguments: str, **environment: str) -> tuple[str, set[str]]:
    """What `dispatcher ...` prints, and the heavy libraries that it loads."""
    return run("-m", "dispatcher", *arguments, **environment)


class TestLoadsNothingHeavy:
    @pytest.mark.parametrize(
        "code",
        [
            "import dispatcher",
            "from dispatcher import DONE, NEW, RetryPolicy, Transition",
            "from dispatcher import ChainType, DispatcherConfig, DispatcherError, rate_limit",
            "import dispatcher; dir(dispatcher)",
        ],
    )
    def test_a_configuration(self, code):
        assert run("-c", code) == ("", set())

    @pytest.mark.parametrize("arguments", [("--help",), ("chains", "--help"), ("db", "--help"), ("--version",)])
    def test_a_help_text(self, arguments):
        printed, loaded = command(*arguments)
        assert printed.startswith(("Usage: dispatcher", "dispatcher, version"))
        assert loaded == set()

    def test_the_script_of_a_completion(self):
        printed, loaded = command(_DISPATCHER_COMPLETE="bash_source")
        assert "_DISPATCHER_COMPLETE=bash_complete" in printed
        assert loaded == set()

    def test_a_completion(self):
        printed, loaded = command(_DISPATCHER_COMPLETE="bash_complete", COMP_WORDS="dispatcher chai", COMP_CWORD="1")
        assert {"plain,chains", "plain,chain-types"} <= set(printed.split())
        assert loaded == set()


class TestLoadsWhatItNeeds:
    def test_a_dispatcher_needs_a_database_and_no_migrations(self):
        _, loaded = run("-c", "from dispatcher import Dispatcher")
        assert "sqlalchemy" in loaded, "or this test could not see what is loaded"
        assert "alembic" not in loaded


class TestPublicNames:
    @pytest.mark.parametrize("name", dispatcher.__all__)
    def test_can_be_imported_and_are_listed(self, name):
        printed, _ = run("-c", f"import dispatcher; assert {name!r} in dir(dispatcher); from dispatcher import {name}")
        assert printed == ""

    def test_are_all_taken_by_a_star(self):
        printed, _ = run(
            "-c", "from dispatcher import *; import dispatcher; print(*set(dispatcher.__all__) - {*dir()})"
        )
        assert printed == "\n"

    def test_are_listed_before_any_is_asked_for_and_after(self):
        code = "import dispatcher; print(dir(dispatcher) == sorted(dispatcher.__all__))"
        printed, _ = run("-c", f"{code}; from dispatcher import Transition; {code}")
        assert printed == "True\nTrue\n"

    @pytest.mark.parametrize("name", ["Unknown", "_private", "__unknown__"])
    def test_are_the_only_ones(self, name):
        with pytest.raises(AttributeError, match=f"'dispatcher' has no attribute '{name}'"):
            getattr(dispatcher, name)
        with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
            exec(f"from dispatcher import {name}")  # noqa: S102 - the statement is what is tested
