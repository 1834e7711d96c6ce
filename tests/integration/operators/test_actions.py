"""Who did what to a chain type or a resource, why, and when."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from dispatcher import NEW, ConfigurationError, Dispatcher
from dispatcher.operators.operations import Operations
from dispatcher.storage.models import ACTION
from tests.integration import shop

pytestmark = pytest.mark.integration

CUSTOMER = ("customer", "57844")


def noted(dispatcher: Dispatcher, **of: Any) -> list[tuple[str, str, str, str | None, str | None]]:
    """The actions, oldest first, without ids and moments."""
    return [
        (row.subject_kind, row.subject, row.action, row.requested_by, row.reason)
        for row in reversed(dispatcher.find_actions(**of))
    ]


@pytest.fixture
def dispatcher(make_dispatcher: shop.Make) -> Dispatcher:
    return make_dispatcher(shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=shop.Sink()))


def test_a_pause_and_its_end_are_noted_once_each(dispatcher: Dispatcher) -> None:
    for _ in range(2):
        dispatcher.pause(shop.CHAIN_TYPE, "the mail provider is down", requested_by="ada")
    for _ in range(2):
        dispatcher.resume(shop.CHAIN_TYPE, requested_by="bob", reason="it is back")

    assert noted(dispatcher, chain_type=shop.CHAIN_TYPE) == [
        ("type", shop.CHAIN_TYPE, "paused", "ada", "the mail provider is down"),
        ("type", shop.CHAIN_TYPE, "resumed", "bob", "it is back"),
    ]
    (latest, _) = dispatcher.find_actions()
    assert latest.created_at.tzinfo is not None and abs(datetime.now(UTC) - latest.created_at) < timedelta(minutes=1)


def test_a_type_that_its_own_budget_pauses_is_noted_with_nobody(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(shop.cart({NEW: [shop.Remind]}, callback=shop.Sink(), max_plans_per_hour=1))
    dispatcher.execute_chains([shop.new_chain(dispatcher, number).id for number in range(3)])

    ((kind, subject, action, by, reason),) = noted(dispatcher)
    assert (kind, subject, action, by) == ("type", shop.CHAIN_TYPE, "paused", None)
    assert (reason or "").startswith("max_plans_per_hour: 1 used up")


def test_a_resource_that_is_disabled_and_enabled_is_noted_whatever_changed(dispatcher: Dispatcher) -> None:
    assert dispatcher.disable_resource(CUSTOMER, "ada", reason="unsubscribed") == 0
    dispatcher.enable_resource(CUSTOMER, "bob", reason="came back")

    assert noted(dispatcher, resource=CUSTOMER) == [
        ("resource", "customer=57844", "disabled", "ada", "unsubscribed"),
        ("resource", "customer=57844", "enabled", "bob", "came back"),
    ]
    assert noted(dispatcher, resource=("customer", "1")) == noted(dispatcher, chain_type=shop.CHAIN_TYPE) == []


def test_resources_whose_names_look_alike_are_not_taken_for_one_another(dispatcher: Dispatcher) -> None:
    dispatcher.disable_resource(("a=b", "c"), "ada")

    assert noted(dispatcher, resource=("a", "b=c")) == []
    dispatcher.erase_resource(("a", "b=c"))
    assert noted(dispatcher, resource=("a=b", "c")) == [("resource", "a%3Db=c", "disabled", "ada", None)]


@pytest.mark.parametrize("odd", ["a\x00b", "\ud800"])
def test_a_name_that_no_row_can_have_has_no_actions(dispatcher: Dispatcher, odd: str) -> None:
    assert dispatcher.find_actions(chain_type=odd) == []


def test_erasing_forgets_what_was_noted_and_leaves_no_name(dispatcher: Dispatcher) -> None:
    dispatcher.get_or_create_resource_chain(shop.CHAIN_TYPE, [CUSTOMER])
    dispatcher.disable_resource(CUSTOMER, "ada", reason="57844 asked for it")
    dispatcher.disable_resource(("customer", "1"), "ada")

    assert dispatcher.erase_resource(CUSTOMER, requested_by="bob", reason="a request to be forgotten") == 1

    ((kind, subject, action, by, reason),) = noted(dispatcher, resource=CUSTOMER)
    assert (kind, action, by, reason) == ("resource", "erased", "bob", "a request to be forgotten")
    assert subject.startswith("sha256:")
    assert "57844" not in repr(noted(dispatcher)) and len(noted(dispatcher)) == 2


def test_a_mapping_of_states_is_noted_before_it_begins(dispatcher: Dispatcher) -> None:
    for number in range(3):
        shop.change_chain(dispatcher, shop.new_chain(dispatcher, number).id, state="old")

    dispatcher.map_states(shop.CHAIN_TYPE, "old", "reminded", requested_by="ada", reason="renamed", dry_run=True)
    dispatcher.map_states(shop.CHAIN_TYPE, "old", "reminded", requested_by="ada", reason="renamed")

    assert noted(dispatcher) == [("type", shop.CHAIN_TYPE, "mapped", "ada", "from old to reminded: renamed")]


def test_a_mapping_that_is_interrupted_is_noted_too(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        shop.change_chain(dispatcher, shop.new_chain(dispatcher, number).id, state="old")
    monkeypatch.setattr(Operations, "_map_one", shop.Raises(KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        dispatcher.map_states(shop.CHAIN_TYPE, "old", "reminded", requested_by="ada", reason="renamed")

    assert [action for _, _, action, _, _ in noted(dispatcher)] == ["mapped"]


def test_old_ones_are_pruned(dispatcher: Dispatcher) -> None:
    for number in range(3):
        dispatcher.disable_resource(("customer", str(number)))
    newest, *old = dispatcher.find_actions()
    statement = update(ACTION).where(ACTION.c.id.in_([row.id for row in old])).values(created_at=shop.LONG_AGO)
    dispatcher.database.write(lambda connection: connection.execute(statement))

    assert dispatcher.prune(days=30)["actions"] == 2
    assert dispatcher.find_actions() == [newest]


def test_one_subject_is_asked_for(dispatcher: Dispatcher) -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        dispatcher.find_actions(chain_type=shop.CHAIN_TYPE, resource=CUSTOMER)


@pytest.mark.parametrize("name", ["\x00", "\ud800"])
def test_a_name_that_no_database_stores_has_no_actions(dispatcher: Dispatcher, name: str) -> None:
    assert dispatcher.find_actions(chain_type=name) == []
