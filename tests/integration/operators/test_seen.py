"""Operators act on the delivery that they saw: another one in its place, or one that has changed, is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from dispatcher import NEW, Chain, DeliveryChanged, DeliveryPending, Dispatcher, NoOpenDelivery, RetryPolicy
from dispatcher.cli import operations as commands
from dispatcher.domain.records import DeliveryRecord
from dispatcher.operators.operations import Operations
from tests.integration import shop

pytestmark = pytest.mark.integration

Remind = shop.transition("Remind", "reminded", retry=RetryPolicy(max_attempts=1))
TRANSITIONS = {NEW: [Remind], "reminded": [shop.Never]}
VERBS = {"retry": "retried", "cancel": "cancelled", "skip": "skipped"}

every_verb = pytest.mark.parametrize("verb", VERBS)


def replaced(dispatcher: Dispatcher, chain: Chain) -> None:
    """Somebody cancels the chain's delivery, and a worker plans another one."""
    dispatcher.chain(chain.id or 0).cancel_delivery("bob")
    shop.planned(dispatcher, chain)


def reopened(dispatcher: Dispatcher, chain: Chain) -> None:
    """Somebody has the chain's delivery attempted again."""
    dispatcher.chain(chain.id or 0).retry_delivery("bob")


def closed(dispatcher: Dispatcher, chain: Chain) -> None:
    """Somebody skips the chain's delivery."""
    dispatcher.chain(chain.id or 0).skip_delivery("bob")


CHANGES = {change.__name__: change for change in (replaced, reopened, closed)}
every_change = pytest.mark.parametrize("change", CHANGES)


@pytest.fixture
def dispatcher(make_dispatcher: shop.Make) -> Dispatcher:
    return make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(shop.Raises(OSError("down")))))


def dead(dispatcher: Dispatcher, number: int = 0) -> Chain:
    """A chain whose delivery is out of attempts, as it is now."""
    chain = shop.new_chain(dispatcher, number)
    assert shop.attempt(dispatcher, shop.planned(dispatcher, chain)).outcome == "dead"
    return chain.refresh()


def act(dispatcher: Dispatcher, verb: str, delivery: DeliveryRecord) -> None:
    getattr(dispatcher, f"{verb}_delivery")(delivery, requested_by="ada", reason="as agreed")


def test_a_delivery_that_died_again_is_not_the_one_that_was_seen(dispatcher: Dispatcher) -> None:
    chain = dead(dispatcher)
    seen = shop.delivery_of(dispatcher, chain)
    chain.retry_delivery("bob")
    assert shop.attempt(dispatcher, seen, 2).outcome == "dead"

    with pytest.raises(DeliveryChanged, match="after another attempt"):
        dispatcher.skip_delivery(seen, requested_by="ada")


# --- chains ----------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize("change", ["replaced", "closed"])
def test_a_chain_acts_on_the_delivery_that_it_waited_for_when_it_was_read(
    dispatcher: Dispatcher, verb: str, change: str
) -> None:
    chain = dead(dispatcher)
    seen = shop.delivery_of(dispatcher, chain)
    CHANGES[change](dispatcher, chain)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(DeliveryChanged, match="left alone") as caught:
        getattr(chain, f"{verb}_delivery")("ada")

    assert (caught.value.chain_id, caught.value.delivery_id) == (chain.id, seen.id)
    assert shop.dump_rows(dispatcher) == before


@every_verb
def test_a_chain_that_waited_for_nothing_when_it_was_read_leaves_a_new_delivery_alone(
    dispatcher: Dispatcher, verb: str
) -> None:
    chain = shop.new_chain(dispatcher)
    shop.planned(dispatcher, chain)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(NoOpenDelivery, match="read it again"):
        getattr(chain, f"{verb}_delivery")("ada")

    assert shop.dump_rows(dispatcher) == before
    getattr(chain.refresh(), f"{verb}_delivery")("ada")
    assert VERBS[verb] in shop.actions(chain)


@pytest.mark.parametrize("name", ["reset", "move_to"])
def test_putting_a_chain_into_a_state_cancels_whatever_it_waits_for(dispatcher: Dispatcher, name: str) -> None:
    chain = dead(dispatcher)
    replaced(dispatcher, chain)

    _ = chain.reset("ada") if name == "reset" else chain.move_to("reminded", "by letter", "ada")

    assert {one.status for one in chain.deliveries} == {"cancelled"}
    assert shop.row_of(dispatcher, chain.id).pending_delivery_id is None


def test_a_chain_shows_the_delivery_that_it_waited_for(dispatcher: Dispatcher) -> None:
    chain = shop.new_chain(dispatcher)
    assert chain.open_delivery is None
    delivery = shop.planned(dispatcher, chain)
    assert chain.open_delivery is None, "it is that of the last reading"
    assert chain.refresh().open_delivery == delivery


# --- deliveries as they were listed ----------------------------------------------------------------------------------


@every_verb
@every_change
def test_a_delivery_that_was_listed_and_has_changed_is_left_alone(
    dispatcher: Dispatcher, verb: str, change: str
) -> None:
    chain = dead(dispatcher)
    (seen,) = dispatcher.find_deliveries(statuses=["dead"])
    CHANGES[change](dispatcher, chain)
    before = shop.dump_rows(dispatcher)

    with pytest.raises(DeliveryChanged, match=seen.id) as caught:
        act(dispatcher, verb, seen)

    assert (caught.value.chain_id, caught.value.delivery_id) == (chain.id, seen.id)
    said = {
        "replaced": "it is cancelled",
        "reopened": "it is pending now, and was dead when it was read",
        "closed": "it is skipped",
    }
    assert said[change] in str(caught.value)
    assert shop.dump_rows(dispatcher) == before


@every_verb
def test_a_delivery_that_was_listed_is_decided(dispatcher: Dispatcher, verb: str) -> None:
    chain, other = dead(dispatcher), dead(dispatcher, 1)
    seen = shop.delivery_of(dispatcher, chain)

    act(dispatcher, verb, seen)

    (event,) = [event for event in chain.events if event.action == VERBS[verb]]
    assert (event.requested_by, event.detail) == ("ada", "as agreed")
    status = "pending" if verb == "retry" else VERBS[verb]
    assert shop.delivery_of(dispatcher, chain).status == status
    assert shop.delivery_of(dispatcher, other).status == "dead"
    shop.assert_consistent(dispatcher)


@every_verb
def test_a_pending_delivery_that_runs_now_or_is_dead_now_is_left_alone(make_dispatcher: shop.Make, verb: str) -> None:
    gate = shop.Gate()

    def wait_and_fail(_: Any) -> None:
        gate.wait()
        raise OSError("down")

    dispatcher = make_dispatcher(shop.cart(TRANSITIONS, callback=shop.Sink(wait_and_fail)))
    chain = shop.new_chain(dispatcher)
    seen = shop.planned(dispatcher, chain)

    with gate.during(lambda: shop.attempt(dispatcher, seen)), pytest.raises(DeliveryPending, match="is running"):
        act(dispatcher, verb, seen)

    with pytest.raises(DeliveryChanged, match="it is dead now, and was pending"):
        act(dispatcher, verb, seen)
    assert shop.delivery_of(dispatcher, chain).status == "dead"


def test_a_delivery_whose_row_is_gone_is_named(dispatcher: Dispatcher) -> None:
    chain = dead(dispatcher)
    seen = shop.delivery_of(dispatcher, chain)
    chain.cancel_delivery()
    assert dispatcher.prune(days=1e-9)["deliveries"] == 1

    with pytest.raises(DeliveryChanged, match="it is deleted"):
        dispatcher.skip_delivery(seen)


def test_a_delivery_that_its_chain_does_not_wait_for_is_the_doctor_s(dispatcher: Dispatcher) -> None:
    chain = dead(dispatcher)
    seen = shop.delivery_of(dispatcher, chain)
    shop.change_chain(dispatcher, chain.id, pending_delivery_id=None)

    with pytest.raises(DeliveryChanged, match="`dispatcher doctor`"):
        dispatcher.skip_delivery(seen)


def test_deliveries_are_found_by_their_ids(dispatcher: Dispatcher) -> None:
    first, second, _ = (shop.delivery_of(dispatcher, dead(dispatcher, number)) for number in range(3))

    assert dispatcher.find_deliveries(delivery_ids=[first.id, second.id.upper()]) == [second, first]
    assert dispatcher.find_deliveries(delivery_ids=[first.id], statuses=["pending"]) == []
    assert dispatcher.find_deliveries(delivery_ids=["no id", "0" * 32]) == []


# --- on the command line ---------------------------------------------------------------------------------------------


class CommandLine:
    """`dispatcher deliveries` in this process, on a dispatcher of the test's."""

    def __init__(self, dispatcher: Dispatcher, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setattr(commands, "open_dispatcher", lambda: dispatcher)

    def __call__(self, *arguments: str, answer: str = "") -> Any:
        return CliRunner().invoke(commands.deliveries, arguments, input=answer)

    def between(self, verb: str, work: Callable[[], Any]) -> None:
        """Do `work` once, directly before the next act of this kind, after everything that the command reads."""
        original = getattr(Operations, f"{verb}_delivery")

        def late(operations: Operations, *arguments: Any, **options: Any) -> Any:
            self.patch.setattr(Operations, f"{verb}_delivery", original)
            work()
            return original(operations, *arguments, **options)

        self.patch.setattr(Operations, f"{verb}_delivery", late)


@pytest.fixture
def run(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(dispatcher, monkeypatch)


@every_verb
@every_change
@pytest.mark.parametrize("chosen", ["by filter", "by id", "by chain"])
def test_a_delivery_that_changes_between_the_list_and_the_act_is_left_alone_and_named(
    dispatcher: Dispatcher, run: CommandLine, verb: str, change: str, chosen: str
) -> None:
    chain = dead(dispatcher)
    seen, rows = shop.delivery_of(dispatcher, chain), []

    def race() -> None:
        CHANGES[change](dispatcher, chain)
        rows.append(shop.dump_rows(dispatcher))

    run.between(verb, race)
    choice = {"by filter": ["--status", "dead", "--yes"], "by id": [seen.id], "by chain": ["--chain", str(chain.id)]}

    done = run(verb, *choice[chosen])

    assert shop.dump_rows(dispatcher) == rows[0]
    if chosen == "by chain":  # the command line prints the error as one line
        assert isinstance(done.exception, DeliveryChanged) and done.exception.delivery_id == seen.id
    else:
        assert done.exit_code == 1 and done.stdout.splitlines()[-1] == f"0 {VERBS[verb]}"
        assert f"dispatcher: delivery {seen.id} of chain {chain.id} is left alone" in done.stderr


def test_the_others_are_done_when_one_has_changed(dispatcher: Dispatcher, run: CommandLine) -> None:
    chains = [dead(dispatcher, number) for number in range(3)]
    run.between("skip", lambda: replaced(dispatcher, chains[2]))  # the newest delivery is the first

    done = run("skip", "--status", "dead", answer="y\n")

    assert done.exit_code == 1 and done.stdout.endswith("2 skipped\n") and done.stderr.count("\n") == 1
    assert [chain.refresh().state for chain in chains] == ["reminded", "reminded", NEW]
    shop.assert_consistent(dispatcher)


def test_deliveries_are_decided_by_their_ids(dispatcher: Dispatcher, run: CommandLine) -> None:
    first, second, other = (dead(dispatcher, number) for number in range(3))
    ids = [shop.delivery_of(dispatcher, chain).id for chain in (first, second)]

    done = run("cancel", *ids, ids[0], "--by", "ada", "--reason", "no such address")

    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        f"delivery {ids[0]} of chain {first.id}: Remind, dead",
        f"delivery {ids[1]} of chain {second.id}: Remind, dead",
        "2 cancelled",
    ]
    assert {chain.events[-1].detail for chain in (first, second)} == {"no such address"}
    assert shop.delivery_of(dispatcher, other).status == "dead"


def test_a_delivery_id_that_is_none_is_named_and_the_others_are_done(dispatcher: Dispatcher, run: CommandLine) -> None:
    delivery = shop.delivery_of(dispatcher, dead(dispatcher))

    done = run("retry", "4711", delivery.id)

    assert (done.exit_code, done.stderr) == (1, "dispatcher: there is no delivery 4711\n")
    assert done.stdout.endswith("1 retried\n")


def test_the_open_delivery_of_a_chain_is_shown(dispatcher: Dispatcher, run: CommandLine) -> None:
    chain = dead(dispatcher)
    seen = shop.delivery_of(dispatcher, chain)

    done = run("retry", "--chain", str(chain.id))

    assert done.stdout.splitlines() == [f"delivery {seen.id} of chain {chain.id}: Remind, dead", "1 retried"]
    assert isinstance(run("skip", "--chain", str(shop.new_chain(dispatcher, 9).id)).exception, NoOpenDelivery)
