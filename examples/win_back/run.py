"""One run: starts real processes in a directory, walks through the days, and compares the result."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.console import Console

from dispatcher import Chain, Dispatcher
from dispatcher.embedded.stack import Stack
from dispatcher.states import EventAction
from examples.win_back import clock, sink
from examples.win_back.config import CONFIG
from examples.win_back.expected import Step, expected_steps
from examples.win_back.progress import DayProgress
from examples.win_back.purchases import DATA, LAST_DAY, Order, choose_customers, orders_of, read_purchases
from examples.win_back.report import Outcome
from examples.win_back.walk import Calendar, Shop

ROOT: Final = Path(__file__).parents[2]


def run(*, customers: int, directory: Path, day_seconds: float, console: Console) -> bool:
    """Whether everything happened as expected. Prints progress, the table and the first differences.

    All files are written to `directory`. Raises `DayNotQuiet`, and `StackError` if a process ends unexpectedly.
    """
    environment = prepare_environment(directory)
    purchases = read_purchases()
    chosen = choose_customers(purchases, customers)
    orders = [order for order in orders_of(purchases) if order.customer in chosen]
    console.print(f"{len(chosen)} customers, {len(orders)} orders; starting server, worker and beat", highlight=False)
    with Stack(directory, env=environment) as stack:
        dispatcher = Dispatcher(
            CONFIG,
            database_url=stack.database_url,
            redis_url=stack.redis_url,
            broker_url=stack.broker_url,
            clock=clock.now,
        )
        shop = Shop(dispatcher, orders)
        with DayProgress(console) as progress:
            Calendar(dispatcher, stack, day_seconds=day_seconds, progress=progress).walk(shop)
        outcome = Outcome(
            orders=len(orders),
            chains=dispatcher.stats()["chains"],
            expected=expected_steps(DATA, chosen, LAST_DAY),
            moves=moves_of(shop.chains),
            effects=sink.read_effects(Path(environment[sink.VARIABLE])),
        )
    outcome.print(console)
    console.print(f"{progress.seconds:.0f} s", highlight=False)
    return outcome.good


def prepare_environment(directory: Path) -> dict[str, str]:
    """The environment of the run's processes. Sets it in this process too, and changes to `directory`.

    The `DISPATCHER_*` variables of the caller are removed, so that the run does not touch another deployment.
    """
    environment = {
        "DISPATCHER_CONFIG": "examples.win_back.config:CONFIG",
        "DISPATCHER_CLOCK": "examples.win_back.clock:now",
        "DISPATCHER_SWEEP_SECONDS": "1",
        "DISPATCHER_RELAY_SECONDS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        clock.VARIABLE: str(directory / "clock"),
        sink.VARIABLE: str(directory / "sink.jsonl"),
    }
    for name in [name for name in os.environ if name.startswith("DISPATCHER_")]:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(directory)
    return environment


def moves_of(chains: Mapping[Order, Chain]) -> list[Step]:
    """All moves in the histories of `chains`."""
    return [
        Step(event.created_at.date(), order.customer, f"{order.bought_on:%Y%m%d}", str(event.detail))
        for order, chain in chains.items()
        for event in chain.events
        if event.action == EventAction.STATE_TRANSITION
    ]
