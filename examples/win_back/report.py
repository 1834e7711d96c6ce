"""Compares what was expected with what happened: the table, the mismatches and the duplicates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from examples.win_back.expected import COMING_BACK, SENT, STEPS, Step
from examples.win_back.sink import Effect

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """The expected steps, the moves in the chains' histories, and the effects in the sink."""

    orders: int
    chains: int
    expected: Sequence[Step]
    moves: Sequence[Step]
    effects: Sequence[Effect]

    @property
    def callbacks(self) -> list[Step]:
        """The effects as steps."""
        return [Step(effect.day, effect.customer, effect.order, effect.transition) for effect in self.effects]

    @property
    def expected_callbacks(self) -> list[Step]:
        """The expected steps that send something to the customer."""
        return [step for step in self.expected if step.transition in SENT]

    def mismatches(self) -> list[str]:
        """One line for every expected step that is missing, and for every step that was not expected."""
        return [
            *([f"{self.orders} orders, but {self.chains} chains"] if self.orders != self.chains else []),
            *_differences("move", self.expected, self.moves),
            *_differences("callback", self.expected_callbacks, self.callbacks),
        ]

    def duplicates(self) -> list[str]:
        """One line for every move, callback or idempotency key that happened more than once."""
        moved = Counter((step.customer, step.order, step.transition) for step in self.moves)
        called = Counter((step.customer, step.order, step.transition) for step in self.callbacks)
        keys = Counter(effect.idempotency_key for effect in self.effects)
        return [
            *(f"move {' '.join(what)}: {times} times" for what, times in moved.items() if times > 1),
            *(f"callback {' '.join(what)}: {times} times" for what, times in called.items() if times > 1),
            *(f"idempotency key {key}: {times} callbacks" for key, times in keys.items() if times > 1),
        ]

    @property
    def good(self) -> bool:
        """Whether every expected step happened exactly once, and nothing else."""
        return not self.mismatches() and not self.duplicates()

    def print(self, console: Console) -> None:
        """Print the table, the first differences, and how many there are."""
        mismatches, duplicates = self.mismatches(), self.duplicates()
        console.print(self.table())
        for line in [*mismatches[:_SHOWN], *duplicates[:_SHOWN]]:
            console.print(line, highlight=False)
        console.print(
            f"{self.chains} chains, {len(self.moves)} moves, {len(self.effects)} callbacks: "
            f"{len(mismatches)} mismatches, {len(duplicates)} duplicates",
            highlight=False,
        )

    def table(self) -> Table:
        """A table with the expected and actual numbers, per transition and quarter."""
        quarters = sorted({_quarter(step.day) for step in [*self.expected, *self.moves, *self.callbacks]})
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("transition", no_wrap=True)
        table.add_column("", no_wrap=True)
        for heading in [*quarters, "total"]:
            table.add_column(heading, justify="right")
        for transition in [*(name for name, _ in STEPS), COMING_BACK]:
            table.add_row(transition, "expected", *_counts(transition, self.expected, quarters))
            table.add_row("", "moves", *_counts(transition, self.moves, quarters))
            if transition in SENT:
                table.add_row("", "callbacks", *_counts(transition, self.callbacks, quarters))
            table.add_section()
        return table


def _differences(what: str, expected: Iterable[Step], got: Iterable[Step]) -> list[str]:
    wanted, found = set(expected), set(got)
    return [
        *(f"{what} missing: {_line(step)}" for step in sorted(wanted - found)),
        *(f"{what} not expected: {_line(step)}" for step in sorted(found - wanted)),
    ]


def _line(step: Step) -> str:
    return f"{step.day} customer {step.customer} order {step.order} {step.transition}"


def _counts(transition: str, steps: Iterable[Step], quarters: Sequence[str]) -> list[str]:
    counts = Counter(_quarter(step.day) for step in steps if step.transition == transition)
    return [*(str(counts[quarter]) for quarter in quarters), str(counts.total())]


def _quarter(day: date) -> str:
    return f"{day.year}Q{(day.month + 2) // 3}"
