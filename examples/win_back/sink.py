"""The sink, which records the effects of the callbacks: an append-only file to which several workers write.

Its path is in `WIN_BACK_SINK`. Each effect is one line, written by one `write` on a descriptor opened with `O_APPEND`.
The kernel executes such writes one after the other, so that lines of different processes never mix.
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
    """One callback that was called: for which customer, order (yyyymmdd), transition and simulated day."""

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
            raise OSError("only a part of the line was written to the sink")
    finally:
        os.close(descriptor)


def read_effects(path: Path) -> list[Effect]:
    """All effects in the order in which they were written; empty if there are none yet."""
    if not path.exists():
        return []
    raw = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return [Effect(**{**fields, "day": date.fromisoformat(fields["day"])}) for fields in raw]
