"""Budgets of chain types: `max_plans_per_hour`, taken in the plan's own transaction."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, update

from dispatcher import DONE, NEW, Chain, ChainPaused, Dispatcher
from dispatcher.storage.models import TypeRow
from tests.integration import shop

pytestmark = pytest.mark.integration

EXECUTORS = 8
CHAINS = 24


def limited(limit: int | str | None, **options: Any) -> dict[str, Any]:
    transitions = {NEW: [shop.Remind], "reminded": [shop.Never]}
    return shop.cart(**{"transitions": transitions, "callback": shop.Sink(), "max_plans_per_hour": limit, **options})


def chains_of(dispatcher: Dispatcher, count: int = CHAINS) -> list[Chain]:
    return [shop.new_chain(dispatcher, number) for number in range(count)]


def ids(chains: Sequence[Chain]) -> list[int]:
    return [chain.id or 0 for chain in chains]


def outcomes(dispatcher: Dispatcher, chains: Sequence[Chain]) -> list[str]:
    return [str(result.outcome) for result in dispatcher.execute_chains(ids(chains))]


def type_row(dispatcher: Dispatcher) -> TypeRow:
    (row,) = dispatcher.find_types()
    return row


def change_type(dispatcher: Dispatcher, **values: Any) -> None:
    statement = update(TypeRow).where(TypeRow.name == shop.CHAIN_TYPE).values(**values)
    assert dispatcher.database.write(lambda connection: connection.execute(statement).rowcount) == 1


# --- exactly as many -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_redis", [True, False])
@pytest.mark.parametrize(("limit", "number"), [(7, 7), ("25%", 6)])
def test_concurrent_executors_plan_exactly_the_limit_and_then_the_type_is_paused(
    make_dispatcher: shop.Make, broker_url: str, limit: int | str, number: int, with_redis: bool
) -> None:
    urls = {} if with_redis else {"redis_url": None, "broker_url": broker_url}
    executors = [make_dispatcher(limited(limit), **urls) for _ in range(EXECUTORS)]
    chains = chains_of(executors[0])
    # Each begins elsewhere, so that all are at it until the end.
    orders = [ids(chains)[3 * number :] + ids(chains)[: 3 * number] for number in range(EXECUTORS)]

    def work(executor: Dispatcher, order: Sequence[int]) -> list[str]:
        return [str(result.outcome) for chain_id in order for result in executor.execute_chains([chain_id])]

    made = [
        outcome for result in shop.at_once(*map(partial, [work] * EXECUTORS, executors, orders)) for outcome in result
    ]

    assert made.count("planned") == number
    assert set(made) <= {"planned", "paused", "locked", "pending", "stale"}
    first = executors[0]
    assert len(first.find_deliveries()) == number
    row = type_row(first)
    assert row.paused and row.window_plans == number
    assert f"max_plans_per_hour: {number} used up" in (row.paused_reason or "")
    rest = [chain for chain in chains if chain.refresh().due_at is not None]
    assert len(rest) == CHAINS - number
    assert all(shop.actions(chain) == ["created"] for chain in rest), "what is not planned is left as it was"
    assert make_dispatcher(limited(limit)).sweep()["due"] == 0
    shop.assert_consistent(first)


@pytest.mark.parametrize("size", [1, 5, CHAINS])
def test_a_batch_is_planned_up_to_the_limit(make_dispatcher: shop.Make, size: int) -> None:
    dispatcher = make_dispatcher(limited(size), chains_per_task=CHAINS)
    chains = chains_of(dispatcher)

    made = outcomes(dispatcher, chains)

    assert made.count("planned") == size and made.count("paused") == CHAINS - size
    assert len(dispatcher.find_deliveries()) == size
    assert type_row(dispatcher).paused == (size < CHAINS)
    shop.assert_consistent(dispatcher)


def test_moves_without_a_callback_use_the_budget_and_evaluations_that_learn_nothing_do_not(
    make_dispatcher: shop.Make,
) -> None:
    picky = shop.transition("Picky", DONE, lambda self: "x" in self.context)
    dispatcher = make_dispatcher(limited(1, transitions={NEW: [picky]}))
    unmoved, moved, refused = chains_of(dispatcher, 3)
    for chain in (moved, refused):
        chain.enqueue(initial_context={"x": 1})

    assert outcomes(dispatcher, [unmoved]) == ["none"]
    assert outcomes(dispatcher, [moved]) == ["moved"]
    assert type_row(dispatcher).window_plans == 1 and not type_row(dispatcher).paused
    assert outcomes(dispatcher, [unmoved]) == ["none"]
    assert outcomes(dispatcher, [refused]) == ["paused"]
    assert type_row(dispatcher).paused


# --- what it is taken with -------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_committed_takes_nothing_of_the_budget(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(limited(1))
    (chain,) = chains_of(dispatcher, 1)
    before = shop.dump_rows(dispatcher)

    def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE chain_dispatcher_type SET window") or "window_plans=" in statement:
            raise RuntimeError("the worker dies here")

    engine = dispatcher.database.engine
    event.listen(engine, "after_cursor_execute", fail)
    with pytest.raises(RuntimeError, match="dies here"):
        dispatcher.execute_chains([chain.id])
    event.remove(engine, "after_cursor_execute", fail)

    assert shop.dump_rows(dispatcher) == before
    assert outcomes(dispatcher, [chain]) == ["planned"]
    assert type_row(dispatcher).window_plans == 1


@pytest.mark.parametrize("batched", [False, True])
def test_a_type_without_a_limit_never_touches_its_row(make_dispatcher: shop.Make, batched: bool) -> None:
    dispatcher = make_dispatcher(limited(None), chains_per_task=CHAINS)
    chains = chains_of(dispatcher, 3)
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if TypeRow.__tablename__ in statement:
            statements.append(statement)

    event.listen(dispatcher.database.engine, "before_cursor_execute", note)
    for group in [chains] if batched else [[chain] for chain in chains]:
        assert set(outcomes(dispatcher, group)) == {"planned"}
    event.remove(dispatcher.database.engine, "before_cursor_execute", note)

    # Which types are paused is read, without a lock, and not for each execution.
    assert len(statements) <= 1
    assert all(one.startswith("SELECT") and "FOR UPDATE" not in one for one in statements)
    assert dispatcher.find_types() == []


# --- used up ---------------------------------------------------------------------------------------------------------


def test_a_type_whose_budget_is_used_up_stands_still_until_a_person_resumes_it(
    make_dispatcher: shop.Make, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = limited(2)
    dispatcher = make_dispatcher(config)
    chains = chains_of(dispatcher, 5)

    with caplog.at_level(logging.ERROR, "dispatcher"):
        made = [outcomes(dispatcher, [chain])[0] for chain in chains]

    assert made == ["planned", "planned", "paused", "paused", "paused"]
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "type_paused"]
    assert record.chain_type == shop.CHAIN_TYPE  # type: ignore[attr-defined]
    shop.take_messages(broker_url, shop.CHAINS)

    after = make_dispatcher(config)
    assert after.sweep()["due"] == 0 and shop.take_messages(broker_url, shop.CHAINS) == []
    with pytest.raises(ChainPaused, match="its chain type is paused"):
        after.chain(chains[2].id or 0).execute()
    chains[3].enqueue(requested_by="shop")
    assert outcomes(after, [chains[3]]) == ["paused"]
    assert shop.row_of(after, chains[3].id).request["requested_by"] == "shop"
    delivered = [shop.attempt(after, one).outcome for one in after.find_deliveries()]
    assert delivered == ["deferred", "deferred"], "no attempt begins while it is paused"
    change_type(after, window_at=datetime.now(UTC) - timedelta(hours=2))
    assert make_dispatcher(config).sweep()["due"] == 0, "time alone does not resume it"

    assert after.resume(shop.CHAIN_TYPE) is True

    resumed = make_dispatcher(config)
    assert (type_row(resumed).paused, type_row(resumed).paused_reason) == (False, None)
    for one in resumed.find_deliveries():
        shop.wait_over(resumed, one)
    delivered = [shop.attempt(resumed, one).outcome for one in resumed.find_deliveries()]
    assert delivered == ["delivered", "delivered"]
    assert resumed.sweep()["due"] == 5
    again = [outcomes(resumed, [chain])[0] for chain in chains[2:]]
    assert again == ["planned", "planned", "paused"], "the budget is new"
    shop.assert_consistent(resumed)


def test_an_application_s_own_execution_uses_the_budget_too(make_dispatcher: shop.Make) -> None:
    sink = shop.Sink()
    dispatcher = make_dispatcher(limited(1, callback=sink))
    first, second = chains_of(dispatcher, 2)

    assert first.execute()["outcome"] == "moved"
    with pytest.raises(ChainPaused, match="its chain type is paused"):
        second.execute()

    assert len(sink) == 1 and second.refresh().state == NEW
    assert type_row(dispatcher).paused


def test_the_last_plan_of_a_budget_does_not_pause_the_type(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(limited(2))
    for chain in chains_of(dispatcher, 2):
        shop.planned(dispatcher, chain)

    assert not type_row(dispatcher).paused
    assert dispatcher.sweep()["due"] == 0


# --- windows and estimates -------------------------------------------------------------------------------------------


def test_an_hour_later_the_budget_begins_anew(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(limited(2))
    first, second, third, fourth, fifth = chains_of(dispatcher, 5)
    assert outcomes(dispatcher, [first, second]) == ["planned", "planned"]
    change_type(dispatcher, window_at=datetime.now(UTC) - timedelta(minutes=61))

    assert outcomes(dispatcher, [third, fourth]) == ["planned", "planned"]
    assert type_row(dispatcher).window_plans == 2 and not type_row(dispatcher).paused

    change_type(dispatcher, window_at=datetime.now(UTC) - timedelta(minutes=59))
    assert outcomes(dispatcher, [fifth]) == ["paused"]


def test_a_share_is_of_an_estimate_that_is_refreshed_every_hour(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(limited("50%"))
    chains = chains_of(dispatcher, 4)

    assert outcomes(dispatcher, chains[:1]) == ["planned"]
    assert type_row(dispatcher).chains_estimate == 4
    chains += [shop.new_chain(dispatcher, number) for number in range(4, 8)]
    assert outcomes(dispatcher, chains[1:2]) == ["planned"]
    assert type_row(dispatcher).chains_estimate == 4, "not counted for every plan"

    change_type(dispatcher, estimated_at=datetime.now(UTC) - timedelta(minutes=61))
    assert outcomes(dispatcher, chains[2:4]) == ["planned", "planned"]
    assert type_row(dispatcher).chains_estimate == 8
    assert outcomes(dispatcher, chains[4:5]) == ["paused"]


def test_a_share_of_few_chains_is_at_least_one(make_dispatcher: shop.Make) -> None:
    dispatcher = make_dispatcher(limited("1%"))

    assert outcomes(dispatcher, chains_of(dispatcher, 2)) == ["planned", "paused"]
