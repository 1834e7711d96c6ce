"""Where the callbacks' effects are counted: an append-only file that several workers write to at once.

Its path is in `WIN_BACK_SINK`. Each effect is one line, written by one `write` on a descriptor opened with `O_APPEND`:
the kernel puts such writes one after the other, so lines of different processes never mix.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Final

VARIABLE: Final = "WIN_BACK_SINK"


@dataclass(frozen=True, slots=True)
class Effect:
    """One callback that took place: to whom, for which order (yyyymmdd), what, on which simulated day."""

    customer: str
    order: str
    transition: str
    day: date
    idempotency_key: str


def append(effect: Effect) -> None:
    """Write `effect` to the end of the sink."""
    line = json.dumps({**asdict(effect), "day": effect.day.isoformat()}).encode() + b"\n"
    descriptor = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError("the sink took a part of a line only")
    finally:
        os.close(descriptor)


def read_effects(path: Path) -> list[Effect]:
    """All effects in the order in which they took place; none if nothing was written yet."""
    if not path.exists():
        return []
    raw = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return [Effect(**{**fields, "day": date.fromisoformat(fields["day"])}) for fields in raw]
