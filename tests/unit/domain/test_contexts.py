"""Loaders run for a batch; an error stays with its chain, and an order to end the process goes through."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from dispatcher import NEW, Transition
from dispatcher.domain.config import ChainType
from dispatcher.domain.contexts import evaluate_record, load_contexts
from dispatcher.domain.records import unsaved_record
from dispatcher.domain.unreadable import json_object
from dispatcher.errors import UnreadableRow


class Go(Transition):
    final_state = "gone"

    def is_valid(self) -> bool:
        return True


RECORD = unsaved_record("cart", (("cart", "1"),), None, datetime(2026, 1, 1, tzinfo=UTC))


def cart(loader: Any) -> ChainType:
    return ChainType(chain_type="cart", transitions={NEW: [Go], "gone": []}, load_context=loader)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(-241)])
def test_a_loader_does_not_keep_the_process_from_ending(error: BaseException) -> None:
    def loader(_: Any) -> Any:
        raise error

    with pytest.raises(type(error)):
        load_contexts(cart(loader), [RECORD])


def test_what_a_loader_raises_is_the_chain_s() -> None:
    def loader(_: Any) -> Any:
        raise SystemExit(3)

    assert isinstance(load_contexts(cart(loader), [RECORD])[RECORD.id], SystemExit)


def test_a_chain_that_a_loader_leaves_out_has_no_context() -> None:
    assert load_contexts(cart(lambda _: {}), [RECORD]) == {RECORD.id: {}}
    assert load_contexts(cart(None), [RECORD]) == {}


def test_a_chain_whose_context_or_request_cannot_be_read_is_not_evaluated() -> None:
    bad = json_object("[1]", "context")
    for record, asked in ((replace(RECORD, context=bad), None), (RECORD, bad)):
        evaluated = evaluate_record(record, cart(None), {}, asked, RECORD.created_at)
        assert evaluated.plan is None and isinstance(evaluated.error, UnreadableRow)
    assert evaluate_record(RECORD, cart(None), {}, {"a": 1}, RECORD.created_at).plan is not None
