"""The table of `docs/explanation/reliability.md`, made from the results of `make chaos`.

    python -m tests.chaos.report RESULTS... --into docs/explanation/reliability.md

Writes the table between the lines `<!-- chaos table -->` and `<!-- end of chaos table -->` of that file.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.chaos.faults import FAULTS

BEGIN: Final = "<!-- chaos table -->"
END: Final = "<!-- end of chaos table -->"
COMBINATIONS: Final = "combinations"
_SUMS: Final = {
    "chains": "chains",
    "moves": "moves",
    "callbacks": "callbacks",
    "lost": "lost",
    "phantom": "phantom",
    "doubled": "doubled",
    "untimely": "untimely",
    "guards_checked": "guards asked again",
    "mistaken": "mistaken for unknown",
    "repeated": "repeated within I5",
    "exits": "unexpected exits",
}
"""What is added up over the runs of a line, and its head. What no run has is left out."""


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """One line per fault that was run alone, and one for all combinations, as a Markdown table."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        name = result["faults"][0] if len(result["faults"]) == 1 else COMBINATIONS
        groups.setdefault(name, []).append(result)
    columns = [column for column in _SUMS if any(column in run for runs in groups.values() for run in runs)]
    head = ["fault", "how it is made", "runs", *(_SUMS[column] for column in columns), "rates", "healing / promise"]
    lines = [_row(head), _row(["---"] * 2 + ["---:"] * (len(columns) + 1) + ["---", "---:"])]
    lines += [_row(_cells(name, groups[name], columns)) for name in [*FAULTS, COMBINATIONS] if name in groups]
    return "\n".join(lines)


def _cells(name: str, runs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    how = "three to five of the above at once, drawn by the seed" if name == COMBINATIONS else FAULTS[name].how
    sums = [f"{sum(run.get(column, 0) for run in runs):,}" for column in columns]
    slowest = max(runs, key=lambda run: run["healing_seconds"] / (run["promised_seconds"] or 1))
    healing = f"{slowest['healing_seconds']:.1f} s / {slowest['promised_seconds']:.1f} s"
    return [f"`{name}`" if name in FAULTS else name, how, str(len(runs)), *sums, _rates(runs), healing]


def _rates(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many calls with a limit were checked, and of how many runs none could be."""
    checked = sum(run.get("rates_checked", 0) for run in runs)
    skipped = sum(bool(run.get("rates_skipped")) for run in runs)
    return f"{checked:,}" if not skipped else f"{checked:,}; skipped in {skipped} of {len(runs)}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(text: str, made: str) -> str:
    """`text` with the table between its two marks replaced; `ValueError` where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} to put the table in")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table from the command line."""
    parser = argparse.ArgumentParser(description="The table of the chaos suite's results.")
    parser.add_argument("results", nargs="+", type=Path, help="files with one JSON object per line")
    parser.add_argument("--into", type=Path, help="the Markdown file to put the table in; printed if not given")
    options = parser.parse_args(arguments)
    made = table(json.loads(line) for path in options.results for line in path.read_text().splitlines())
    if options.into is None:
        sys.stdout.write(made + "\n")
    else:
        options.into.write_text(put(options.into.read_text(), made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
