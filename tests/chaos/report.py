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
_HEAD: Final = (
    "fault", "how it is made", "runs", "chains", "moves", "callbacks", "lost", "phantom", "doubled",
    "repeated within I5", "longest healing / promise",
)  # fmt: skip


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """One line per fault that was run alone, and one for all combinations, as a Markdown table."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        name = result["faults"][0] if len(result["faults"]) == 1 else COMBINATIONS
        groups.setdefault(name, []).append(result)
    lines = [_row(_HEAD), _row(["---"] * 2 + ["---:"] * (len(_HEAD) - 2))]
    lines += [_row(_cells(name, groups[name])) for name in [*FAULTS, COMBINATIONS] if name in groups]
    return "\n".join(lines)


def _cells(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    how = "three to five of the above at once, drawn by the seed" if name == COMBINATIONS else FAULTS[name].how
    sums = [
        f"{sum(run[column] for run in runs):,}"
        for column in ("chains", "moves", "callbacks", "lost", "phantom", "doubled", "repeated")
    ]
    slowest = max(runs, key=lambda run: run["healing_seconds"] / (run["promised_seconds"] or 1))
    healing = f"{slowest['healing_seconds']:.1f} s / {slowest['promised_seconds']:.1f} s"
    return [f"`{name}`" if name in FAULTS else name, how, str(len(runs)), *sums, healing]


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
