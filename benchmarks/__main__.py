"""The command line of the benchmark."""

import json
import os
from pathlib import Path

import click

from benchmarks import report
from benchmarks.cases import CASES, KEYS, Case, count_of
from benchmarks.lanes import BulkCreation, Lane, Sample
from benchmarks.servers import Servers, running_servers
from dispatcher import Dispatcher


class Run:
    """The lanes of the chosen cases, their samples so far, and what went wrong."""

    def __init__(self, servers: Servers, cases: list[Case], *, quick: bool) -> None:
        wanted = dict.fromkeys(lane for case in cases for lane in (case.peer, case.lane) if lane is not None)
        self.lanes: dict[type[Lane], Lane] = {
            kind: kind(servers, count_of(kind, quick=quick)) for kind in wanted if is_there(kind)
        }
        self.samples: dict[type[Lane], list[Sample]] = {kind: [] for kind in self.lanes}
        self.failures = {
            kind.name: "this version of the library does not have it" for kind in wanted if not is_there(kind)
        }
        self.loads: list[float] = []

    def open(self) -> None:
        """Start every lane; a lane that does not start is left out."""
        for kind, lane in list(self.lanes.items()):
            click.echo(f"starting: {lane.name}", err=True)
            self._try(kind, lane.open)

    def round(self, number: int) -> None:
        """Measure every lane once. Each round begins with a different lane."""
        self.loads.append(round(os.getloadavg()[0], 2))
        kinds = list(self.lanes)
        shift = number % len(kinds) if kinds else 0
        for kind in kinds[shift:] + kinds[:shift]:
            self._try(kind, lambda kind=kind: self.samples[kind].append(self.lanes[kind].measure()))
            if kind in self.lanes:
                value = self.samples[kind][-1].value
                click.echo(f"round {number + 1}: {kind.name}: {value:.4g}{kind.unit}", err=True)

    def close(self) -> None:
        """Stop every lane."""
        for lane in self.lanes.values():
            lane.close()

    def _try(self, kind: type[Lane], step: object) -> None:
        assert callable(step)
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the failure of a lane must not lose the numbers of the others
            self.failures[kind.name] = str(error) or repr(error)
            click.echo(f"failed: {kind.name}: {error!r}", err=True)
            self.samples.pop(kind)
            self.lanes.pop(kind).close()


def is_there(kind: type[Lane]) -> bool:
    """Whether the library has the function that a lane measures."""
    return kind is not BulkCreation or hasattr(Dispatcher, "bulk_get_or_create")


@click.command()
@click.option("--cases", default="all", help=f"Comma-separated: {', '.join(KEYS)}.")
@click.option("--rounds", type=click.IntRange(1), help="How often each lane is measured. [default: 5; 1 with --quick]")
@click.option("--quick", is_flag=True, help="A tenth of the items, to see that it runs; the numbers mean nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every number to this file.")
@click.option("--svg", "svg_path", type=click.Path(path_type=Path), help="Write the chart to this file.")
@click.option("--fsync", is_flag=True, help="PostgreSQL waits for the disk at each commit.")
def main(
    *, cases: str, rounds: int | None, quick: bool, json_path: Path | None, svg_path: Path | None, fsync: bool
) -> None:
    """Measure this project and its peers on private servers; print medians over several rounds, and ratios."""
    keys = KEYS if cases == "all" else [key.strip() for key in cases.split(",")]
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise click.UsageError(f"no case is called {', '.join(unknown)}: there are {', '.join(KEYS)}")
    chosen = [case for case in CASES if case.key in keys]
    json_path, svg_path = (path.absolute() if path is not None else None for path in (json_path, svg_path))
    with running_servers(fsync=fsync) as servers:
        run = Run(servers, chosen, quick=quick)
        try:
            run.open()
            for number in range(rounds if rounds is not None else 1 if quick else 5):
                run.round(number)
            environment = report.machine(servers.versions(), fsync=fsync)
            notes = [note for lane in run.lanes.values() if (note := lane.note())]
        finally:
            run.close()
    found = [line for case in chosen if (line := report.line_of(case, run.samples)) is not None]
    if quick:
        click.echo("quick: only a tenth of the items that the lines below name, so do not quote these numbers\n")
    click.echo(report.table(found))
    click.echo(f"\n{report.costs(run.samples)}")
    for note in notes:
        click.echo(f"\n{note}")
    for name, reason in run.failures.items():
        click.echo(f"\nskipped: {name}: {reason}")
    click.echo(f"\nload average before each round: {run.loads}; fsync {'on' if fsync else 'off'}")
    if json_path is not None:
        whole = report.as_json(
            found, run.samples, environment=environment, loads=run.loads, failures=run.failures, notes=notes
        )
        json_path.write_text(json.dumps(whole, indent=2) + "\n")
    if svg_path is not None:
        svg_path.write_text(report.chart(found))


if __name__ == "__main__":
    main()
