"""The operators' commands as processes: what they print, what they ask, and how they end."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dispatcher import Chain, Dispatcher
from dispatcher.domain.records import DeliveryRecord, Owed
from tests.acceptance.chainlib import SINK_VARIABLE
from tests.acceptance.nodes import Deployment, RedisNode, make_fifo, open_fifo

pytestmark = pytest.mark.acceptance


class CommandLine:
    """`dispatcher` beside a deployment, with answers to its questions."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def __call__(self, *arguments: str, answer: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "dispatcher", *arguments],
            cwd=self.deployment.directory,
            env={**self.deployment.env, **env},
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def says(self, *arguments: str, answer: str = "", code: int = 0) -> str:
        """What the command prints, ending with this code and nothing wrong."""
        done = self(*arguments, answer=answer)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout.strip()

    def problem(self, *arguments: str, **env: str) -> str:
        """The one line that the command fails with."""
        done = self(*arguments, **env)
        assert done.returncode == 1 and done.stdout == "", f"{done.stdout}\n{done.stderr}"
        (line,) = done.stderr.splitlines()
        assert line.startswith("dispatcher: ")
        return line.removeprefix("dispatcher: ")

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.says(*arguments, "--json", code=code))


@pytest.fixture
def here(
    make_deployment: Callable[..., Deployment], default_redis_broker: RedisNode, monkeypatch: pytest.MonkeyPatch
) -> Deployment:
    """A deployment of the test's own, without a worker: this process makes the attempts."""
    default_redis_broker.server.clear()
    made = make_deployment(redis_url=default_redis_broker.url, connect_seconds=2, sweep_seconds=5, relay_seconds=5)
    monkeypatch.setenv(SINK_VARIABLE, str(made.sink.path))
    return made


@pytest.fixture
def shop(here: Deployment) -> Iterator[Dispatcher]:
    with here.client() as dispatcher:
        yield dispatcher


@pytest.fixture
def run(here: Deployment) -> CommandLine:
    return CommandLine(here)


def chain_of(shop: Dispatcher, number: int, chain_type: str = "single", **context: Any) -> Chain:
    """The customer's chain for booking `number`."""
    resources = [("customer", "57844"), ("booking", str(number))]
    return shop.get_or_create_resource_chain(chain_type, resources, initial_context=context or None)


def planned(shop: Dispatcher, chain: Chain) -> DeliveryRecord:
    (result,) = shop.execute_chains([chain.id or 0])
    assert result.outcome == "planned"
    return chain.deliveries[0]


def attempt(shop: Dispatcher, delivery: DeliveryRecord) -> str:
    (result,) = shop.deliver([Owed(delivery.id, delivery.attempt + 1)])
    return str(result.outcome)


def dead(shop: Dispatcher, number: int, chain_type: str = "single") -> Chain:
    chain = chain_of(shop, number, chain_type, fail_for_good=True)
    assert attempt(shop, planned(shop, chain)) == "dead"
    return chain


def words(chain: Chain) -> str:
    return str(chain.id)


# --- deliveries ------------------------------------------------------------------------------------------------------


def test_deliveries_are_listed_by_chain_type_and_status(run: CommandLine, shop: Dispatcher) -> None:
    first, second, waiting = dead(shop, 1), dead(shop, 2, "sequence"), chain_of(shop, 3)
    owed = planned(shop, waiting)

    assert [one["chain_id"] for one in run.json("deliveries", "list")] == [waiting.id, second.id, first.id]
    (found,) = run.json("deliveries", "list", "--status", "dead", "--type", "sequence")
    assert (found["chain_id"], found["status"], found["attempt"]) == (second.id, "dead", 1)
    assert found["last_error"] == "PermanentFailure: no such address"
    assert "context" not in found and "kwargs" not in found
    (found,) = run.json("deliveries", "list", "--chain", words(waiting))
    assert found["id"] == owed.id
    assert len(run.json("deliveries", "list", "--limit", "1")) == 1

    table = run.says("deliveries", "list", "--status", "dead").splitlines()
    assert table[0].split()[:4] == ["id", "chain", "transition", "status"]
    assert len(table) == 3 and "no such address" in table[1]


@pytest.mark.parametrize(
    ("verb", "past", "status", "state"),
    [
        ("retry", "retried", "pending", "new"),
        ("cancel", "cancelled", "cancelled", "new"),
        ("skip", "skipped", "skipped", "first_sent"),
    ],
)
def test_one_delivery_is_decided_by_its_chain(
    run: CommandLine, shop: Dispatcher, verb: str, past: str, status: str, state: str
) -> None:
    chain, other = dead(shop, 1), dead(shop, 2)
    line = f"delivery {chain.deliveries[0].id} of chain {chain.id}: {chain.deliveries[0].transition}, dead"

    assert run.says("deliveries", verb, "--chain", words(chain), "--by", "ada") == f"{line}\n1 {past}"

    assert (chain.deliveries[0].status, chain.refresh().state) == (status, state)
    event = next(event for event in chain.events if event.action == past)
    assert event.requested_by == "ada"
    if verb != "retry":
        assert event.detail == f"{past} by hand"
        assert "has no open delivery" in run.problem("deliveries", verb, "--chain", words(chain))
    assert other.deliveries[0].status == "dead"


def test_deliveries_chosen_by_a_filter_are_counted_and_asked_for(run: CommandLine, shop: Dispatcher) -> None:
    chains = [dead(shop, number) for number in range(3)]
    others = [dead(shop, 10, "sequence"), chain_of(shop, 11)]
    planned(shop, others[1])
    choice = ["deliveries", "cancel", "--status", "dead", "--type", "single"]

    refused = run(*choice, answer="n\n")
    assert refused.returncode == 1 and "cancel 3 deliveries? [y/N]" in refused.stdout
    assert "Aborted" in refused.stderr and "Traceback" not in refused.stderr
    nobody = run(*choice)
    assert nobody.returncode == 1, "without an answer nothing is done"
    assert {chain.deliveries[0].status for chain in chains} == {"dead"}

    assert "cancel 1 (there may be more) deliveries?" in run(*choice, "--limit", "1", answer="n\n").stdout
    assert run.says(*choice, "--reason", "wrong address", answer="y\n").endswith("3 cancelled")
    assert {chain.deliveries[0].status for chain in chains} == {"cancelled"}
    assert {chain.events[-1].detail for chain in chains} == {"wrong address"}
    assert [chain.deliveries[0].status for chain in others] == ["dead", "pending"], "what was not chosen"
    assert run.says(*choice) == "no such delivery"
    assert run.says("deliveries", "retry", "--status", "dead", "--status", "held", "--yes") == "1 retried"
    assert others[0].deliveries[0].status == "pending"


def test_a_delivery_that_changes_while_the_question_waits_is_left_alone(
    run: CommandLine, shop: Dispatcher, here: Deployment
) -> None:
    changed, replaced, left = (dead(shop, number) for number in range(3))
    seen = {chain.id: chain.deliveries[0].id for chain in (changed, replaced)}
    command = [sys.executable, "-m", "dispatcher", "deliveries", "skip", "--status", "dead"]
    with subprocess.Popen(
        command,
        cwd=here.directory,
        env=here.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as asked:
        assert asked.stdin is not None and asked.stdout is not None
        question = ""
        while not question.endswith("skip 3 deliveries? [y/N]: "):
            character = asked.stdout.read(1)
            assert character, question
            question += character
        changed.refresh().retry_delivery("bob")
        replaced.refresh().cancel_delivery("bob")
        planned(shop, replaced)
        said, problems = asked.communicate("y\n", timeout=60)

    assert asked.returncode == 1 and said == "1 skipped\n"
    lines = sorted(problems.splitlines())
    assert lines == sorted(
        f"dispatcher: delivery {seen[chain.id]} of chain {chain.id} is left alone, because {why}: "
        "read it again, and decide about what is there now"
        for chain, why in (
            (changed, "it is pending now, and was dead when it was read"),
            (replaced, "it is cancelled"),
        )
    )
    assert [chain.refresh().state for chain in (changed, replaced, left)] == ["new", "new", "first_sent"]
    assert changed.deliveries[0].status == replaced.deliveries[0].status == "pending"


def test_under_a_dry_run_every_act_is_refused_in_one_line(run: CommandLine, shop: Dispatcher) -> None:
    chain = dead(shop, 1)
    number = words(chain)
    before = [(event.action, event.created_at) for event in chain.events]
    dry = {"DISPATCHER_DRY_RUN": "true"}
    for arguments, act in {
        ("chains", "disable", number): f"disable chain {number}",
        ("chains", "enable", number): f"enable chain {number}",
        ("chains", "reset", number, "--yes"): f"put chain {number} into state 'new'",
        (
            "chains",
            "move",
            number,
            "first_sent",
            "--reason",
            "by letter",
        ): f"put chain {number} into state 'first_sent'",
        ("deliveries", "retry", "--chain", number): f"retry the delivery of chain {number}",
        ("deliveries", "cancel", "--status", "dead", "--yes"): f"cancel the delivery of chain {number}",
        ("deliveries", "skip", chain.deliveries[0].id): f"skip the delivery of chain {number}",
        ("resources", "disable", "customer=57844"): "disable the chains of a resource",
        ("resources", "enable", "customer=57844"): "enable the chains of a resource",
        ("resources", "erase", "customer=57844", "--yes"): "erase the chains of a resource",
        ("chain-types", "pause", "single", "--reason", "mail is down"): "pause chain type single",
        ("chain-types", "resume", "single"): "resume chain type single",
        ("prune", "--days", "1"): "prune",
        ("doctor", "--repair"): "repair the deployment",
        ("db", "separate", "staging", "--yes"): "separate the chains as 'staging'",
    }.items():
        assert run.problem(*arguments, **dry) == (
            f"refused to {act}, because DISPATCHER_DRY_RUN is set; nothing was written: unset it to do this"
        )
    mapping = run("chains", "map", "--type", "single", "--from", "new", "--to", "first_sent", "--yes", **dry)
    assert mapping.returncode == 1 and mapping.stdout == "1 chains of single are in state new\n"
    (line,) = mapping.stderr.splitlines()
    assert line.startswith("dispatcher: refused to map the chains of single from state 'new' to 'first_sent'")
    assert [(event.action, event.created_at) for event in chain.events] == before


def test_acts_tell_the_history_who_and_why(run: CommandLine, shop: Dispatcher) -> None:
    chain = dead(shop, 1)
    number, who = words(chain), ["--by", "ada", "--reason", "as agreed"]

    for arguments in (
        ["deliveries", "retry", "--chain", number],
        ["chains", "disable", number],
        ["chains", "enable", number],
        ["chains", "reset", number, "--yes"],
        ["resources", "disable", "customer=57844"],
        ["resources", "enable", "customer=57844"],
        ["chains", "map", "--type", "single", "--from", "new", "--to", "first_sent", "--yes"],
        ["chain-types", "pause", "single"],
        ["chain-types", "resume", "single"],
    ):
        run.says(*arguments, *who)

    told = [event for event in chain.events if event.requested_by == "ada" and event.action != "cancelled"]
    assert [event.action for event in told] == [
        "retried", "disabled", "enabled", "reset", "disabled", "enabled", "mapped",
    ]  # fmt: skip
    assert {event.detail for event in told} == {"as agreed", "from new: as agreed"}
    assert run.says("resources", "erase", "customer=57844", "--yes", *who) == "1 chains deleted"


def test_a_running_delivery_is_never_decided(run: CommandLine, shop: Dispatcher, here: Deployment) -> None:
    fifo = make_fifo(here.directory)
    chain = chain_of(shop, 1, callback_fifo=str(fifo))
    planned(shop, chain)
    with here.running(here.worker()):
        try:
            shop._services.publisher.deliver([Owed(chain.deliveries[0].id, 1)])
            here.eventually(lambda: chain.deliveries[0].status == "running", "the attempt's begin")
            for arguments in (
                ["deliveries", "retry", "--chain", words(chain)],
                ["deliveries", "cancel", "--chain", words(chain)],
                ["chains", "reset", words(chain), "--yes"],
                ["chains", "move", words(chain), "first_sent", "--reason", "by letter"],
                ["resources", "erase", "customer=57844", "--yes"],
            ):
                assert "an attempt is running" in run.problem(*arguments)
            assert run("deliveries", "cancel", "--status", "running", "--yes").returncode == 2
            assert run.says("deliveries", "cancel", "--status", "pending", "--yes") == "no such delivery"
            assert run.says("resources", "disable", "customer=57844") == "1 chains disabled"
        finally:
            open_fifo(fifo)
        here.wait_for_state(chain, "first_sent")


@pytest.mark.parametrize(
    "arguments",
    [
        ["deliveries", "retry"],
        ["deliveries", "cancel", "--type", "single"],
        ["deliveries", "skip", "--chain", "1", "--status", "dead"],
        ["deliveries", "retry", "4711", "--status", "dead"],
        ["deliveries", "retry", "4711", "--chain", "1"],
        ["deliveries", "retry", "4711", "--type", "single"],
        ["deliveries", "cancel", "--status", "delivered"],
        ["deliveries", "list", "--status", "lost"],
        ["chains", "move", "1", "done"],
        ["chains", "map", "--type", "single", "--from", "new"],
        ["chain-types", "pause", "single"],
        ["chain-types", "resume", "single", "--spread", "2"],
        ["chain-types", "resume", "single", "--spread", "2w"],
        ["chain-types", "resume", "single", "--spread", "h"],
        ["chain-types", "resume", "single", "--spread", "1e999d"],
        ["chain-types", "resume", "single", "--spread", "nanh"],
        ["chain-types", "resume", "single", "--spread", ""],
        ["resources", "disable", "customer"],
    ],
)
def test_wrong_usage_ends_with_code_2(run: CommandLine, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


# --- chains ----------------------------------------------------------------------------------------------------------


def test_one_chain_is_disabled_enabled_reset_and_moved(run: CommandLine, shop: Dispatcher) -> None:
    chain = chain_of(shop, 1, "sequence")
    number = words(chain)

    assert run.says("chains", "disable", number, "--by", "ada") == f"chain {number} is disabled: state new"
    assert chain.refresh().disabled
    assert run.says("chains", "enable", number) == f"chain {number} is enabled: state new"
    moved = run.says("chains", "move", number, "second_sent", "--reason", "sent by letter")
    assert moved == f"chain {number} is moved: state second_sent"
    assert "unknown state" in run.problem("chains", "move", number, "lost", "--reason", "none")

    refused = run("chains", "reset", number, answer="n\n")
    assert refused.returncode == 1 and f"reset chain {number}, which is in state second_sent?" in refused.stdout
    assert chain.refresh().state == "second_sent"
    assert run.says("chains", "reset", number, answer="y\n").endswith(f"chain {number} is reset: state new")
    told = [(event.action, event.requested_by) for event in chain.events[1:]]
    assert told == [("disabled", "ada"), ("enabled", "cli"), ("moved", "cli"), ("reset", "cli")]
    assert run.problem("chains", "disable", "77") == "chain 77 does not exist"


def test_states_are_mapped_after_a_count_and_a_question(run: CommandLine, shop: Dispatcher) -> None:
    chains = [chain_of(shop, number, "sequence") for number in range(3)]
    mapping = ["chains", "map", "--type", "sequence", "--from", "new", "--to", "second_sent"]

    assert run.says(*mapping, "--dry-run") == "3 chains of sequence are in state new"
    assert run(*mapping, answer="n\n").returncode == 1
    assert {chain.refresh().state for chain in chains} == {"new"}

    assert run.says(*mapping, "--yes", "--by", "ada").endswith("3 mapped, 0 left because an attempt runs")
    assert {chain.refresh().state for chain in chains} == {"second_sent"}
    assert {(chain.events[-1].action, chain.events[-1].requested_by) for chain in chains} == {("mapped", "ada")}
    assert run.says(*mapping, "--yes") == "0 chains of sequence are in state new"
    assert "unknown state" in run.problem(*mapping[:-1], "lost")


# --- resources and chain types ---------------------------------------------------------------------------------------


def test_a_resource_is_disabled_enabled_and_erased(run: CommandLine, shop: Dispatcher) -> None:
    chains = [chain_of(shop, number) for number in range(3)]

    assert run.says("resources", "disable", "customer=57844", "--by", "unsubscribe") == "3 chains disabled"
    assert run.says("resources", "disable", "customer=57844") == "0 chains disabled"
    assert all(chain.refresh().disabled for chain in chains)
    assert chains[0].events[-1].requested_by == "unsubscribe"
    assert run.says("resources", "enable", "customer=57844") == "3 chains enabled"

    refused = run("resources", "erase", "customer=57844", answer="n\n")
    assert refused.returncode == 1 and "delete 3 chains for good?" in refused.stdout
    assert len(shop.find_chains()) == 3
    assert run.says("resources", "erase", "customer=57844", "--yes") == "3 chains deleted"
    assert shop.find_chains() == []
    assert run.says("resources", "erase", "customer=57844", "--yes") == "0 chains deleted"


def test_a_chain_type_is_paused_listed_and_resumed(run: CommandLine) -> None:
    assert set(run.json("chain-types", "list").values()) == {None}
    assert run.says("chain-types", "pause", "single", "--reason", "mail is down") == "single is paused"
    assert run.says("chain-types", "pause", "single", "--reason", "again") == "single was paused already"
    assert run.json("chain-types", "list")["single"] == "mail is down"
    assert "paused: mail is down" in run.says("chain-types", "list")
    assert run.says("chain-types", "resume", "single") == "single is resumed"
    assert run.says("chain-types", "resume", "single") == "single was not paused"
    assert run.says("chain-types", "resume", "single", "--spread", "2h") == "single was not paused"
    assert run.says("chain-types", "pause", "single", "--reason", "mail is down") == "single is paused"
    assert (
        run.says("chain-types", "resume", "single", "--spread", "1.5h", "--reason", "it is back")
        == "single is resumed; its work is spread over 1:30:00"
    )
    assert run.json("actions", "--type", "single")[0]["reason"] == "spread over 1:30:00: it is back"
    assert "spread: must be a timedelta" in run.problem("chain-types", "resume", "single", "--spread", "367d")
    assert "spread: must be a timedelta" in run.problem("chain-types", "resume", "single", "--spread=-1s")
    assert "'lost'" in run.problem("chain-types", "resume", "lost")


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_names_what_is_wrong_and_repairs_what_is_safe(run: CommandLine, shop: Dispatcher) -> None:
    dead(shop, 1)
    shop._services.locks._client.set("dispatcher:lock:77", "token")  # type: ignore[union-attr]

    lines = run.says("doctor", code=1).splitlines()
    assert "redis: dispatcher:lock:77 never expires; --repair deletes it" in lines
    assert any(line.startswith("delivery: 1 dead: a person must decide; ") for line in lines)
    assert any(line.startswith("worker: no worker answers for queue dispatcher.sweeps; ") for line in lines)

    told = run.json("doctor", "--repair", code=1)
    assert [one["problem"] for one in told if one["repaired"]] == ["dispatcher:lock:77 never expires"]
    assert all(set(one) == {"area", "problem", "remedy", "repaired"} for one in told)
    left = run.says("doctor", "--repair", code=1).splitlines()
    assert left == [line for line in lines if "lock:77" not in line]


def test_the_doctor_of_a_healthy_deployment_says_that_all_is_well(here: Deployment, run: CommandLine) -> None:
    with here.running(here.beat()), here.running(here.worker()), here.client() as shop:
        chain = chain_of(shop, 1)
        chain.enqueue()
        here.wait_for_state(chain, "first_sent")
        here.eventually(lambda: run("doctor").returncode == 0, "beat's first passes")
        assert run.says("doctor") == "all is well"
        assert run.says("doctor", "--repair") == "all is well"
        assert run.json("doctor") == []


def test_the_doctor_names_workers_whose_time_limits_do_not_fit(here: Deployment, run: CommandLine) -> None:
    worker = here.worker(DISPATCHER_LOCK_SECONDS="80", DISPATCHER_CALLBACK_SECONDS="1")
    with here.running(here.beat()), here.running(worker):
        here.eventually(lambda: "has never run" not in run("doctor").stdout, "beat's first passes")
        first, second = run.says("doctor", code=1).splitlines()

    assert (
        first.startswith("worker: worker@")
        and "ends dispatcher.deliver_callback after 111.0 s, not after 120 s or more" in first
    )
    assert "ends dispatcher.execute_chain after 64.0 s, not within 30 s" in second
    assert second.endswith("give all processes the same settings, and leave the time limits of these tasks alone")


def test_the_doctor_of_a_deployment_without_tables_or_services(run: CommandLine) -> None:
    env = {"DISPATCHER_REDIS_URL": "redis://127.0.0.1:1/0", "DISPATCHER_DATABASE_URL": "sqlite:///none.sqlite"}
    done = run("doctor", **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["database", "redis", "broker"]
    assert "run `dispatcher db upgrade`" in lines[0]


def test_separating_the_chains_of_a_copy_asks_first(run: CommandLine, shop: Dispatcher) -> None:
    shop.get_or_create_resource_chain("single", [("customer", "1")])
    refused = run("db", "separate", "staging", answer="n\n")
    assert refused.returncode == 1 and "separated" not in refused.stdout

    done = run("db", "separate", "staging", answer="y\n")

    assert done.stdout.endswith("1 chains separated, 0 separated before, 0 left because they wait for a delivery\n")
