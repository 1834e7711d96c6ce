"""How the command line reads resources and prints results."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NoReturn

import click

from dispatcher.bounds import bounded_text

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Log what would be done, and do nothing.")

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def pairs(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> list[tuple[str, str]]:
    """`type=id` arguments as pairs; the library checks types and ids."""
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not a resource: write it as type=id, such as customer=123")
    return [
        (resource_type, resource_id) for resource_type, _, resource_id in (value.partition("=") for value in values)
    ]


def duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> timedelta | None:
    """A time such as `90s`, `30m`, `2h` or `1d`; the library checks how long it is."""
    if value is None:
        return None
    number, unit = value[:-1], _UNITS.get(value[-1:])
    try:
        return timedelta(**{unit: float(number)}) if unit is not None else _no_duration(value)
    except (ValueError, OverflowError):
        return _no_duration(value)


def _no_duration(value: str) -> NoReturn:
    raise click.BadParameter(f"{value!r} is not a time: write a number and s, m, h or d, such as 90s or 2h")


def print_counts(counts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(counts)
    else:
        click.echo(", ".join(f"{name} {text(value)}" for name, value in counts.items()))


def print_reasons(errors: Mapping[str, Iterable[str]]) -> None:
    for transition, reasons in errors.items():
        click.echo(f"  {transition}: {'; '.join(reasons)}")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    # Rows hold texts of other programs: their control characters must not reach the terminal.
    rows = [[bounded_text(cell, 12 * len(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=json_form))


def json_form(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return moment(value)
    return json.dumps(value, default=json_form) if isinstance(value, list | tuple | dict) else str(value)


def moment(when: datetime | None) -> str:
    return when.isoformat(sep=" ", timespec="seconds") if when is not None else ""


def resource_words(resources: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"{resource_type}={resource_id}" for resource_type, resource_id in resources)
