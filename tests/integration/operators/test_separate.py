"""The chains of a copied database get identities of their own."""

from typing import Any

import pytest

from dispatcher import NEW, ConfigurationError, Dispatcher
from dispatcher.domain.records import idempotency_key
from dispatcher.operators import operations
from dispatcher.operators.operations import SeparateCounts
from dispatcher.storage import chains
from dispatcher.storage.store import read_one
from tests.integration import shop

pytestmark = pytest.mark.integration

CONFIG = shop.cart({NEW: [shop.Remind], "reminded": [shop.Never]}, callback=shop.Sink())


@pytest.fixture
def copy(make_dispatcher: shop.Make, monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    """A copy with five chains, which are read two at a time. The first is from before chains had a uid."""
    monkeypatch.setattr(operations, "_BATCH", 2)
    dispatcher = make_dispatcher(CONFIG)
    first, *_ = (shop.new_chain(dispatcher, number) for number in range(5))
    shop.change_chain(dispatcher, first.id, uid=None)
    return dispatcher


def keys(dispatcher: Dispatcher) -> dict[int | None, str]:
    """The key that each chain's next step has."""
    store = dispatcher._services.store
    ids = [chain.id for chain in dispatcher.find_chains(limit=100)]
    return {one: idempotency_key(read_one(store, one), "Remind") for one in ids if one is not None}


def test_every_chain_gets_other_keys_and_nothing_else_changes(copy: Dispatcher) -> None:
    before = {one: dict(shop.row_of(copy, one)._mapping) for one in keys(copy)}
    old = keys(copy)

    assert copy.separate("staging") == SeparateCounts(separated=5, before=0, waiting=0)

    new = keys(copy)
    assert len(set(new.values())) == 5 and set(new.values()).isdisjoint(old.values())
    for one, row in before.items():
        after = dict(shop.row_of(copy, one)._mapping)
        assert after.pop("uid") not in (None, row.pop("uid"))
        assert after == {**row, "version": row["version"] + 1}


def test_the_same_name_changes_nothing_again_and_another_name_does(copy: Dispatcher) -> None:
    copy.separate("staging")
    first = keys(copy)

    assert copy.separate("staging") == SeparateCounts(separated=0, before=5, waiting=0)
    assert keys(copy) == first

    assert copy.separate("a copy of staging").separated == 5
    assert set(keys(copy).values()).isdisjoint(first.values())


def test_chains_that_wait_for_a_delivery_are_left_and_separated_later(copy: Dispatcher) -> None:
    chain = copy.find_chains()[2]
    delivery = shop.planned(copy, chain)

    assert copy.separate("staging") == SeparateCounts(separated=4, before=0, waiting=1)
    assert keys(copy)[chain.id] == delivery.idempotency_key == shop.delivery_of(copy, chain).idempotency_key

    assert shop.attempt(copy, delivery).outcome == "delivered"
    assert copy.separate("staging") == SeparateCounts(separated=1, before=4, waiting=0)
    shop.assert_consistent(copy)


def test_chains_that_were_made_since_are_no_copies(copy: Dispatcher) -> None:
    copy.separate("staging")
    made = shop.new_chain(copy, 99)
    delivery = shop.planned(copy, made)
    made.refresh().cancel_delivery("ada")

    assert copy.separate("staging") == SeparateCounts(separated=0, before=5, waiting=0)

    assert shop.planned(copy, made).idempotency_key == delivery.idempotency_key, "the same step has the same key"


def test_an_interrupted_run_is_gone_on_with(copy: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    separate, calls = chains.separate, []

    def cut(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 2:
            separate(*arguments, **options)
            raise KeyboardInterrupt
        return separate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(chains, "separate", cut)
        with pytest.raises(KeyboardInterrupt):
            copy.separate("staging")
    done = keys(copy)

    assert copy.separate("staging") == SeparateCounts(separated=3, before=2, waiting=0)
    assert [one for one, key in keys(copy).items() if key == done[one]] == list(done)[:2]


def test_what_was_about_to_be_planned_with_the_old_key_is_stale(make_dispatcher: shop.Make) -> None:
    gate = shop.Gate()
    slow = shop.transition("Remind", "reminded", gate.wait)
    dispatcher = make_dispatcher(shop.cart({NEW: [slow], "reminded": [shop.Never]}, callback=shop.Sink()))
    chain = shop.new_chain(dispatcher)

    with gate.during(lambda: dispatcher.execute_chains([chain.id])) as executed:
        assert dispatcher.separate("staging").separated == 1

    assert [result.outcome for result in executed.result()] == ["stale"]
    assert shop.planned(dispatcher, chain).idempotency_key == keys(dispatcher)[chain.id]


@pytest.mark.parametrize("name", ["", "\x00", "\ud800"])
def test_a_name_that_is_none_is_refused(copy: Dispatcher, name: str) -> None:
    before = keys(copy)
    with pytest.raises(ConfigurationError, match="give the copy a name"):
        copy.separate(name)
    assert keys(copy) == before
