"""The names that the pages use are those of the code; reference pages that claim to be complete are."""

import inspect
import re
import shlex
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy import inspect as inspect_database

import dispatcher
import workers
from dispatcher import Chain, ChainType, Dispatcher, DispatcherError, RetryPolicy, Settings
from dispatcher.cli.main import cli
from dispatcher.states import AttemptOutcome, CallbackKind, DeliveryStatus, EventAction, Outcome
from tests.docs.pages import PAGES, ROOT, Block, code_of, page_name, parts_of, table_rows
from tests.docs.reader import split_commands, words_of

PREFIX = "DISPATCHER_"
SETTINGS = {f"{PREFIX}{name.upper()}": field for name, field in Settings.model_fields.items()}


def section(page: str, heading: str | None = None) -> str:
    """The text of a page, or of its section with this heading, subsections left out."""
    text = (ROOT / page).read_text()
    if heading is None:
        return text
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def spans(cell: str) -> list[str]:
    """The code spans of a table's cell."""
    return [code.replace("\\|", "|") for code in re.findall(r"`([^`]+)`", cell)]


def first_column(text: str) -> list[str]:
    """The code spans in the first cells of the tables of a text."""
    return [span for row in table_rows(text) if row for span in spans(row[0])]


def names(values: Iterable[Any]) -> set[str]:
    return {str(value) for value in values}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    assert set(re.findall(rf"{PREFIX}[A-Z_]+", path.read_text())) - set(SETTINGS) == set()


@pytest.mark.parametrize(("page", "heading"), [("README.md", "Settings"), ("docs/reference/settings.md", None)])
def test_tables_of_settings_are_complete_and_have_the_defaults(page: str, heading: str | None) -> None:
    rows = {spans(row[0])[0]: row[1] for row in table_rows(section(page, heading)) if row and PREFIX in row[0]}
    assert set(rows) == set(SETTINGS)
    for name, field in SETTINGS.items():
        if isinstance(field.default, bool | int | float):
            assert rows[name] == str(field.default).lower(), name


def test_ranges_of_settings_are_those_of_the_code() -> None:
    rows = {spans(row[0])[0]: row[2] for row in table_rows(section("docs/reference/settings.md")) if PREFIX in row[0]}
    for name, field in SETTINGS.items():
        limits = {key: getattr(one, key) for one in field.metadata for key in ("gt", "ge", "le") if hasattr(one, key)}
        known = {str(limit) for key, limit in limits.items()}
        shown = set(re.findall(r"\d+", rows[name].replace("a year", str(86400 * 365))))
        if limits:
            assert shown == known, name


# --- command line -----------------------------------------------------------------------------------------------------


def commands(group: click.Group = cli, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command of the command line that is no group, by its words."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        words = (*before, name)
        found.update(commands(command, words) if isinstance(command, click.Group) else {words: command})
    return found


def options(command: click.Command) -> set[str]:
    return {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}


def test_the_page_of_the_command_line_has_every_command_with_its_options() -> None:
    known, shown = commands(), set()
    for row in table_rows(section("docs/reference/cli.md")):
        found = spans(row[0])
        if not found or not found[0].startswith("dispatcher ") or found[0].startswith("dispatcher --"):
            continue
        first = tuple(word for word in found[0].split()[1:] if re.fullmatch(r"[a-z-]+", word) and word[0] != "-")
        row_commands = [first, *((*first[:-1], name) for name in found[1:])]
        expected = set().union(*(options(known[words]) for words in row_commands))
        written = {word for span in spans(f"{row[0]} {row[1]}") for word in span.split() if word.startswith("--")}
        assert written == expected, row[0]
        shown |= set(row_commands)
    assert shown == set(known)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_command_that_is_named_exists_with_its_options(path: Path) -> None:
    text = path.read_text()
    blocks = [part.text for part in parts_of(text) if isinstance(part, Block) and part.language == "sh"]
    lines = [command for block in blocks for command in split_commands(block)]
    lines += [code for code in code_of(text) if re.match(r"(?:[A-Z_]+=\S+ )*dispatcher ", code) and "\n" not in code]
    problems = [problem for line in lines for problem in problems_of_command(line)]
    assert problems == []


def problems_of_command(line: str) -> list[str]:
    """What is wrong with a command of `dispatcher`, as a page writes it: an upper-case word is anything."""
    words = words_of(line) if "'" not in line or line.count("'") % 2 == 0 else shlex.split(line.replace("'", ""))
    if not words or words[0] != "dispatcher":
        return []
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z-]+", rest[0]) and rest[0][0] != "-":
        found = command.commands.get(rest[0])
        if found is None:
            return [f"no such command: {line}"]
        command, rest = found, rest[1:]
    known = options(command) | {"--help", "--version", "--log-level"}
    return [f"no such option: {line}" for word in rest if word.startswith("--") and word.partition("=")[0] not in known]


# --- closed sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "closed_set"),
    [
        ("Outcomes of an execution", Outcome),
        ("Outcomes of an attempt", AttemptOutcome),
        ("Delivery statuses", DeliveryStatus),
        ("Event actions", EventAction),
    ],
)
def test_tables_of_closed_sets_are_complete(heading: str, closed_set: Any) -> None:
    shown = first_column(section("docs/reference/outcomes.md", heading))
    assert sorted(shown) == sorted(names(closed_set))


def test_callback_kinds_are_complete() -> None:
    shown = re.findall(r"`([a-z]+)(?::<name>)?` \(", section("docs/reference/outcomes.md", "Callback kinds"))
    assert sorted(shown) == sorted(names(CallbackKind))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_outcomes_events_and_statuses_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"\bevents? `(\w+)`", text)) - names(EventAction) == set()
    outcomes = set(re.findall(r"\boutcome (?:is |of an attempt is )?`(\w+)`", text))
    assert outcomes - names(Outcome) - names(AttemptOutcome) == set()
    assert set(re.findall(r"--status (\w+)", text)) - names(DeliveryStatus) == set()


# --- tasks, errors, API, tables ---------------------------------------------------------------------------------------


def test_the_page_of_tasks_names_every_task_and_queue() -> None:
    app = Celery("docs", set_as_current=False)
    workers.install(app, Dispatcher({"chains": []}, celery_app=app))
    rows = [row for row in table_rows(section("docs/reference/tasks-and-queues.md")) if row]
    assert set(first_column(section("docs/reference/tasks-and-queues.md"))) == {
        name for name in app.tasks if name.startswith("dispatcher.")
    }
    queues = {span for row in rows for span in spans(row[1]) if span.startswith("dispatcher.")}
    assert queues == {queue.name for queue in app.conf.task_queues if queue.name.startswith("dispatcher.")}


def test_the_page_of_errors_is_complete() -> None:
    rows = [row for row in table_rows(section("docs/reference/errors.md")) if row and spans(row[0])]
    public = {name: getattr(dispatcher, name) for name in dispatcher.__all__}
    errors = {name for name, one in public.items() if isinstance(one, type) and issubclass(one, DispatcherError)}
    assert {spans(row[0])[0] for row in rows if "." not in row[0]} == errors - {"DispatcherError"}
    for row in rows:
        module, _, name = spans(row[0])[0].rpartition(".")
        error = getattr(import_module(module or "dispatcher"), name)
        assert issubclass(error, DispatcherError), name
        assert {
            base for base in spans(row[1]) if base not in names(parent.__name__ for parent in error.__mro__)
        } == set()
        assert set(spans(row[2])) <= set(inspect.signature(error.__init__).parameters), name


@pytest.mark.parametrize(
    ("heading", "described", "left_out"),
    [
        ("Dispatcher", Dispatcher, {"from_settings"}),  # in the text above the table
        ("Chain", Chain, {"unsaved"}),  # made by the library only
    ],
)
def test_the_page_of_the_api_is_complete(heading: str, described: type, left_out: set[str]) -> None:
    text = section("docs/reference/dispatcher-and-chain.md", heading)
    shown = {re.split(r"\W", span)[0] for row in table_rows(text) for span in spans(row[0])}
    public = {name for name in vars(described) if not name.startswith("_")} | ({"errors"} & shown)  # not on the class
    assert shown | {"date_next_update"} == (public - left_out) | {"date_next_update"}  # an alias, in brackets


def test_signatures_on_the_page_of_the_api_are_those_of_the_code() -> None:
    for described in (Dispatcher, Chain):
        text = section("docs/reference/dispatcher-and-chain.md", described.__name__)
        for span in [span for row in table_rows(text) for span in spans(row[0]) if "(" in span and "..." not in span]:
            name, _, arguments = span.partition("(")
            parameters = list(inspect.signature(getattr(described, name)).parameters.values())[1:]
            plain = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
            code = str(inspect.Signature(plain)).replace("reason='cancelled by hand'", "reason=...")
            assert f"({arguments}" == code.replace("reason='skipped by hand'", "reason=..."), name


def test_options_of_a_chain_type_are_complete() -> None:
    shown = first_column(section("docs/reference/configuration.md", "Options of a chain type"))
    fields = ChainType.__dataclass_fields__.values()
    assert sorted(shown) == sorted(field.name.rstrip("_") for field in fields if field.init)


def test_the_table_of_the_retry_policy_has_its_fields_and_defaults() -> None:
    rows = [row for row in table_rows(section("docs/reference/transitions.md", "RetryPolicy")) if spans(row[0])]
    shown = {spans(row[0])[0]: row[1] for row in rows}
    assert shown == {field.name: str(field.default) for field in RetryPolicy.__dataclass_fields__.values()}


def test_the_page_of_tables_has_every_table_and_column(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    for table in inspect_database(engine).get_table_names():
        text = section("docs/reference/tables.md", table)
        columns = {column["name"] for column in inspect_database(engine).get_columns(table)}
        in_rows, in_text = set(first_column(text)), set(re.findall(r"`(\w+)`", text))
        if not table.endswith("_alembic_version"):
            assert columns - in_text == set(), table
            assert in_rows - columns == set(), table
    engine.dispose()
