"""The results of a run as a table, as JSON and as a chart."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.cases import Case
from benchmarks.lanes import Lane, Sample

Samples = Mapping[type[Lane], Sequence[Sample]]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the range of one number over several rounds."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The median and the range of these values."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.middle)} ± {_short((self.most - self.least) / 2)}"


@dataclass(frozen=True, slots=True)
class Line:
    """The result of one case.

    `ratio` is the value itself if there is no peer. `by_cpu` is the ratio of throughputs computed from CPU time only.
    Unlike `ratio` it does not change when other programs use the machine, but it does not include waiting.
    """

    case: str
    title: str
    measured: str
    peer: str
    ratio: Spread
    by_cpu: float | None
    required: str
    score: float | None

    @property
    def verdict(self) -> str:
        """`ok`, `missed`, or `report` if nothing is required."""
        if self.score is None:
            return "report"
        return "ok" if self.score >= 1 else "missed"


def line_of(case: Case, samples: Samples) -> Line | None:
    """The line of the table for a case; None if a lane of the case has no samples."""
    ours = samples.get(case.lane, ())
    theirs = samples.get(case.peer, ()) if case.peer is not None else ()
    if not ours or (case.peer is not None and len(theirs) != len(ours)):
        return None
    unit = case.lane.unit
    values = [sample.value if case.fact is None else sample.facts[case.fact] for sample in ours]
    ratios = values
    peer = ""
    if case.peer is not None:
        ratios = [value / sample.value for value, sample in zip(values, theirs, strict=True)]
        peer = f"{Spread.of([sample.value for sample in theirs])}{unit}"
    ratio = Spread.of(ratios)
    shown = f"{Spread.of(values)}{'' if case.fact else unit}"
    costs_of_both = _cpu_ms(ours), _cpu_ms(theirs)
    by_cpu = costs_of_both[1] / costs_of_both[0] if all(costs_of_both) else None
    return Line(case.key, case.title, shown, peer, ratio, by_cpu, case.required, case.score(ratio.middle))


def table(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table. The ratio is the median of the ratios of the rounds, with their range."""
    rows = [("case", "measured", "peer", "ratio (range)", "by CPU", "required", "")]
    for line in lines:
        ratio = line.ratio
        shown = f"{_short(ratio.middle)} ({_short(ratio.least)} to {_short(ratio.most)})" if line.score else ""
        by_cpu = "" if line.by_cpu is None else _short(line.by_cpu)
        rows.append((line.title, line.measured, line.peer, shown, by_cpu, line.required, line.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown_rows = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows
    ]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([shown_rows[0], rule, *shown_rows[1:]])


def _cpu_ms(samples: Sequence[Sample]) -> float:
    """The median CPU milliseconds per item of all parties; 0 if the CPU time of the worker was not measured."""
    if not samples or "worker_cpu_ms" not in samples[0].facts:
        return 0.0
    return median(
        sum(sample.facts[f"{party}_cpu_ms"] for party in ("worker", "postgres", "redis")) for sample in samples
    )


def costs(samples: Samples) -> str:
    """A Markdown table of the median costs per item of each lane: CPU milliseconds by party, Redis commands."""
    names = ("worker_cpu_ms", "postgres_cpu_ms", "redis_cpu_ms", "redis_commands")
    rows = ["| per item | worker CPU ms | PostgreSQL CPU ms | Redis CPU ms | Redis commands |", "|---|---|---|---|---|"]
    for lane, found in samples.items():
        if not found or names[1] not in found[0].facts:
            continue
        cells = [
            _short(median(sample.facts[name] for sample in found)) if name in found[0].facts else "" for name in names
        ]
        rows.append(f"| {lane.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def machine(servers: Mapping[str, str], *, fsync: bool) -> dict[str, Any]:
    """The machine, the packages and the servers of the run."""
    model = next((line for line in _cpu_lines() if line.startswith("model name")), "").partition(": ")[2]
    packages = ("celery", "kombu", "redis", "SQLAlchemy", "psycopg", "dbos")
    return {
        "processor": model.strip() or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "servers": dict(servers),
        "fsync": fsync,
    }


def as_json(
    lines: Sequence[Line],
    samples: Samples,
    *,
    environment: Mapping[str, Any],
    loads: Sequence[float],
    failures: Mapping[str, str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """All results, with the numbers of every round."""
    return {
        "machine": dict(environment),
        "load_average_before_each_round": list(loads),
        "cases": [{**asdict(line), "verdict": line.verdict} for line in lines],
        "lanes": {lane.name: [asdict(sample) for sample in found] for lane, found in samples.items()},
        "failures": dict(failures),
        "notes": list(notes),
    }


def chart(lines: Sequence[Line]) -> str:
    """An SVG bar chart with the score of each case; the dashed line is the requirement."""
    judged = [line for line in lines if line.score is not None]
    height, left, scale = 26, 430, 130.0
    parts = []
    for row, line in enumerate(judged):
        assert line.score is not None
        top = 10 + row * height
        width = min(line.score, 3) * scale
        colour = "#2f855a" if line.score >= 1 else "#c05621"
        label = f"{line.score:.2f} of the requirement ({escape(line.required)})"
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(line.title)}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="18" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 6:.1f}" y="{top + 14}" fill="#4a5568">{label}</text>')
    bottom = 10 + len(judged) * height
    ends = f'x1="{left + scale}" y1="4" x2="{left + scale}" y2="{bottom}"'
    rule = f'<line {ends} stroke="#1a202c" stroke-dasharray="4 3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1060" height="{bottom + 8}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}{rule}</svg>\n'
    )


def _short(value: float) -> str:
    if abs(value) >= 100:  # noqa: PLR2004 - three significant digits
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "not installed"
