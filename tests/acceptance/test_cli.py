"""The command line as its users run it: a process in a directory, with a configuration and an exit code."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dispatcher
from dispatcher.storage.database import Database
from tests.integration.storage import old_tables
from tests.servers import PostgresServer

CONFIG = """
    from dispatcher import DONE, NEW, Transition

    class Remind(Transition):
        final_state = "reminded"

        def is_valid(self):
            return True

    class Close(Transition):
        final_state = DONE

        def is_valid(self):
            self.errors.append("not paid")
            return False

    def send(transition, **kwargs):
        print("sent to", transition.chain.resources[0][1])

    CONFIG = {"chains": [
        {"chain_type": "invoice", "callback": send, "callbacks": {"send": send},
         "transitions": {NEW: [Close, Remind], "reminded": [Close], DONE: []}},
        {"chain_type": "loose", "transitions": {NEW: [Remind], "lost": [Close]}},
    ]}
"""


class CommandLine:
    """`dispatcher` in a directory with a configuration module `shop`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("DISPATCHER_")}
        self.env["DISPATCHER_CONFIG"] = "shop:CONFIG"
        self.env["PYTHONPATH"] = str(Path(dispatcher.__file__).parents[1])
        self.configure(CONFIG)

    def configure(self, source: str) -> None:
        (self.directory / "shop.py").write_text(textwrap.dedent(source))

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dispatcher", *arguments],
            cwd=self.directory,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *arguments: str, **env: str) -> Any:
        done = self(*arguments, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def problem(self, *arguments: str, **env: str) -> str:
        """The one line that the command fails with."""
        done = self(*arguments, **env)
        assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("dispatcher: ")
        return line.removeprefix("dispatcher: ")


@pytest.fixture
def run(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.mark.parametrize("where", ["environment", "configuration"])
def test_a_setting_that_does_not_fit_is_one_line_without_its_value(run: CommandLine, where: str) -> None:
    if where == "environment":
        problem = run.problem("chains", "list", DISPATCHER_RELAY_SECONDS="-77")
    else:
        run.configure("from dispatcher import Settings\n\nCONFIG = Settings(relay_seconds=-77)\n")
        problem = run.problem("chains", "list")
    assert problem.startswith("DISPATCHER_RELAY_SECONDS: ") and "77" not in problem


# --- what it prints --------------------------------------------------------------------------------------------------


def test_a_chain_is_executed_shown_explained_and_listed(run: CommandLine) -> None:
    result = run.json("execute", "invoice", "customer=7", "invoice=a=b")
    assert result["outcome"] == "moved"
    chain_id = str(result["chain"]["id"])

    shown = run.json("chains", "show", chain_id)
    assert shown["state"] == "reminded"
    assert sorted(map(tuple, shown["resources"])) == [("customer", "7"), ("invoice", "a=b")]
    assert "state_transition" in [event["action"] for event in shown["events"]]

    assert run.json("chains", "explain", chain_id)["state"] == "reminded"
    assert [chain["id"] for chain in run.json("chains", "list", "--state", "reminded")] == [int(chain_id)]
    assert run.json("chains", "list", "--type", "loose") == []

    for command in (("chains", "show", chain_id), ("chains", "explain", chain_id), ("chains", "list")):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        assert "reminded" in done.stdout


def test_a_dry_run_logs_the_plan_and_creates_nothing(run: CommandLine) -> None:
    done = run("execute", "invoice", "customer=7", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "sent to" not in done.stdout
    assert "planned chain_id=None chain_type=invoice from=new to=reminded transition=Remind" in done.stderr
    assert run.json("chains", "list") == []


def test_a_dry_enqueue_logs_the_plan_and_needs_no_broker(run: CommandLine) -> None:
    done = run("enqueue", "invoice", "customer=7", "--dry-run")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "planned chain_id=None chain_type=invoice from=new to=reminded transition=Remind" in done.stderr
    assert run.json("enqueue", "invoice", "customer=7", "--dry-run") == {"task_id": None}
    assert run.json("chains", "list") == []


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_sweep_counts_the_due_chains(run: CommandLine, redis_url: str, option: list[str]) -> None:
    run.json("execute", "invoice", "customer=7")
    counts = run.json("sweep", *option, DISPATCHER_REDIS_URL=redis_url)
    assert (counts["due"], counts["enqueued"]) == (1, 1)


@pytest.mark.parametrize("command", [["sweep"], ["sweep", "--dry-run"], ["relay"]])
def test_a_pass_without_a_broker_says_what_to_set(run: CommandLine, command: list[str]) -> None:
    assert "set DISPATCHER_REDIS_URL" in run.problem(*command)


def test_pruning_needs_an_age(run: CommandLine) -> None:
    assert run("prune").returncode == 2
    assert run.json("prune", "--days", "30") == {"events": 0, "deliveries": 0, "actions": 0}


def test_check_reports_types_states_and_what_is_probably_not_meant(run: CommandLine) -> None:
    reports = run.json("check")
    assert reports["invoice"]["states"]["new"] == ["Close", "Remind"]
    assert reports["invoice"]["warnings"] == []
    assert reports["loose"]["warnings"] == [
        "no chain can reach state 'lost'",
        "Remind has no callback unless a request names one",
    ]
    done = run("check")
    assert done.returncode == 0, done.stderr
    assert "warning: no chain can reach state 'lost'" in done.stdout


def test_graph_prints_mermaid(run: CommandLine) -> None:
    assert run("graph").stdout.count("stateDiagram-v2") == 2
    one = run("graph", "loose")
    assert one.stdout.startswith("%% loose\nstateDiagram-v2\n")


def test_the_tables_are_made_and_their_revision_is_told(run: CommandLine) -> None:
    before = run.json("db", "current")
    assert before["current"] is None
    assert run("db", "upgrade").stdout == f"the database is at revision {before['head']}\n"
    assert run("db", "current").stdout == f"{before['head']} (up to date)\n"


def test_help_and_version_need_no_configuration(run: CommandLine) -> None:
    done = run("--help", DISPATCHER_CONFIG="")
    assert done.returncode == 0
    assert "enqueue" in done.stdout


# --- wrong usage: exit code 2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["enqueue", "invoice"],
        ["enqueue", "invoice", "customer"],
        ["enqueue", "invoice", "customer=7", "--context", "{"],
        ["enqueue", "invoice", "customer=7", "--context", "[1]"],
        ["chains", "show", "seven"],
        ["chains", "list", "--limit", "0"],
        ["dev", "--concurrency", "0"],
        ["--log-level", "loud", "check"],
    ],
)
def test_wrong_usage_ends_with_code_2(run: CommandLine, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


# --- wrong input: one line and exit code 1 ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["enqueue", "execute"])
def test_an_unknown_chain_type_is_named(run: CommandLine, command: str) -> None:
    assert "'invioce'" in run.problem(command, "invioce", "customer=7")
    assert run.json("chains", "list") == []


@pytest.mark.parametrize(
    ("resource", "part"),
    [("=7", "'7'"), ("customer=", "'customer'"), (f"customer={'7' * 1000}", "'customer'")],
)
@pytest.mark.parametrize("command", ["enqueue", "execute"])
def test_a_bad_resource_is_named_and_nothing_is_written(
    run: CommandLine, command: str, resource: str, part: str
) -> None:
    assert part in run.problem(command, "invoice", resource)
    assert run.json("chains", "list") == []


def test_a_callback_that_is_not_registered_is_named(run: CommandLine) -> None:
    assert "'sned'" in run.problem("enqueue", "invoice", "customer=7", "--callback", "sned")


def test_an_unknown_chain_is_one_line(run: CommandLine) -> None:
    assert run.problem("chains", "show", "77") == "chain 77 does not exist"
    assert run.problem("chains", "explain", "77") == "chain 77 does not exist"


@pytest.mark.parametrize(
    ("chains", "parts"),
    [
        ("{}", ["`chains`"]),
        ("{'chains': [{'chain_type': 'x', 'transitions': {'new': [Bare]}}]}", ["'x'", "'new'", "Bare", "final_state"]),
        ("{'chains': [{'chain_type': 'x', 'transitions': {'new': [Mute]}}]}", ["'x'", "'new'", "Mute", "is_valid"]),
        ("{'chains': [{'chain_type': 'x', 'transitions': {'new': [int]}}]}", ["'x'", "'new'", "int"]),
    ],
)
def test_a_wrong_configuration_names_type_state_and_transition(run: CommandLine, chains: str, parts: list[str]) -> None:
    run.configure(f"""
    from dispatcher import Transition

    class Bare(Transition):
        def is_valid(self):
            return True

    class Mute(Transition):
        final_state = "muted"

    CONFIG = {chains}
    """)
    problem = run.problem("check")
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("", "DISPATCHER_CONFIG"),
        ("shop", "shop"),
        ("no_such_shop:CONFIG", "no_such_shop"),
        ("shop.no_such_part:CONFIG", "shop"),
        ("shop:NO_SUCH_NAME", "NO_SUCH_NAME"),
    ],
)
def test_a_configuration_that_cannot_be_found_is_one_line(run: CommandLine, value: str, part: str) -> None:
    assert part in run.problem("check", DISPATCHER_CONFIG=value)


def test_a_mistake_inside_the_configuration_module_is_a_traceback(run: CommandLine) -> None:
    run.configure("import no_such_library")
    done = run("check")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "no_such_library" in done.stderr


def test_a_setting_that_does_not_fit_is_named_without_its_value(run: CommandLine) -> None:
    assert "DISPATCHER_SWEEP_SECONDS" in run.problem("check", DISPATCHER_SWEEP_SECONDS="-77")
    problem = run.problem("check", DISPATCHER_DATABASE_URL="hunter2")
    assert "database_url" in problem
    assert "hunter2" not in problem


# --- services that do not answer -------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("command", [["chains", "list"], ["db", "current"], ["db", "upgrade"], ["sweep"]])
@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_an_unreachable_database_is_one_line_within_ten_seconds(
    run: CommandLine, command: list[str], port: str, request: pytest.FixtureRequest, redis_url: str
) -> None:
    url = f"postgresql://shop:hunter2@127.0.0.1:{request.getfixturevalue(port)}/shop"
    began = time.monotonic()
    problem = run.problem(*command, DISPATCHER_DATABASE_URL=url, DISPATCHER_REDIS_URL=redis_url)
    assert time.monotonic() - began < 10
    assert problem.startswith("cannot reach the database at postgresql")
    assert "hunter2" not in problem


@pytest.mark.alone
@pytest.mark.parametrize("name", ["REDIS", "BROKER"])
@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_an_unreachable_redis_or_broker_is_one_line_within_ten_seconds(
    run: CommandLine, name: str, port: str, request: pytest.FixtureRequest, redis_url: str
) -> None:
    urls = {"DISPATCHER_REDIS_URL": redis_url, "DISPATCHER_BROKER_URL": redis_url}
    urls[f"DISPATCHER_{name}_URL"] = f"redis://:hunter2@127.0.0.1:{request.getfixturevalue(port)}/0"
    began = time.monotonic()
    problem = run.problem("check", "--services", **urls)
    assert time.monotonic() - began < 10
    assert f"cannot reach the {name.lower() if name == 'BROKER' else 'Redis'}" in problem
    assert "hunter2" not in problem


@pytest.mark.alone
@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
@pytest.mark.parametrize("command", [["enqueue", "invoice", "customer=7"], ["sweep"], ["relay"]])
def test_a_command_that_must_publish_tells_an_unreachable_broker_within_ten_seconds(
    run: CommandLine, command: list[str], port: str, request: pytest.FixtureRequest
) -> None:
    assert run("execute", "invoice", "customer=7").returncode == 0
    began = time.monotonic()
    problem = run.problem(*command, DISPATCHER_REDIS_URL=f"redis://127.0.0.1:{request.getfixturevalue(port)}/0")
    assert time.monotonic() - began < 10
    assert "publish" in problem or "cannot reach" in problem


def test_a_server_database_without_tables_says_what_to_run(run: CommandLine, postgres_server: PostgresServer) -> None:
    url = postgres_server.create_database()
    assert "dispatcher db upgrade" in run.problem("chains", "list", DISPATCHER_DATABASE_URL=url)
    assert run("db", "upgrade", DISPATCHER_DATABASE_URL=url).returncode == 0
    assert run("chains", "list", DISPATCHER_DATABASE_URL=url).returncode == 0
    postgres_server.drop_database(url)


def test_an_upgrade_that_needs_stopped_workers_is_refused_without_the_option(
    run: CommandLine, postgres_server: PostgresServer
) -> None:
    url = postgres_server.create_database()
    database = Database(url)
    old_tables.make(database)
    database.dispose()
    assert run.problem("db", "upgrade", DISPATCHER_DATABASE_URL=url).endswith(
        "`dispatcher db upgrade --workers-stopped`"
    )
    assert run("db", "upgrade", "--workers-stopped", DISPATCHER_DATABASE_URL=url).returncode == 0
    postgres_server.drop_database(url)
