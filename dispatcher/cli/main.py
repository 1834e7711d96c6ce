"""The command `dispatcher`: each subcommand calls the library once and prints the result."""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dispatcher.cli.deployment import open_database, open_dispatcher, read_settings, setting_problems
from dispatcher.cli.operations import add_operations, confirm, yes_option
from dispatcher.cli.output import (
    dry_run_option,
    json_option,
    moment,
    pairs,
    print_counts,
    print_json,
    print_reasons,
    print_table,
    resource_words,
    text,
)
from dispatcher.errors import DispatcherError

if TYPE_CHECKING:
    from dispatcher.chain import Chain
    from dispatcher.domain.config import ChainType

_EVENT_FIELDS = ("created_at", "action", "value", "from_state", "to_state", "requested_by", "detail")
_LEVELS = ("debug", "info", "warning", "error")


def _json_object(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise click.BadParameter("must be a JSON object, such as '{\"order\": 1}'")
    return parsed


def main() -> NoReturn:
    """Run the command line. The exit code is 0, 1 after an error (printed as one line), or 2 for wrong usage."""
    try:
        cli(prog_name="dispatcher")
    except DispatcherError as error:
        _fail(str(error))
    except ValueError as error:  # also of the configuration's module, which may make its own `Settings`
        _fail(setting_problems(error))
    raise AssertionError("unreachable: click exits")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chain-dispatcher", prog_name="dispatcher")
@click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="Logs go to stderr.")
def cli(log_level: str) -> None:
    """Decide what happens next to each chain, and make it happen once.

    DISPATCHER_CONFIG=package.module:ATTRIBUTE names the configuration.
    """
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("dispatcher").setLevel(log_level.upper())


@cli.command()
@click.option("--concurrency", type=click.IntRange(min=1), help="Processes of the worker's pool.")
@click.option(
    "--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="The least level that is shown."
)
def dev(concurrency: int | None, log_level: str) -> None:
    """Run a server, a worker and beat here until Ctrl-C; files go to ./.dispatcher/."""
    from dispatcher.embedded.terminal import run_dev  # noqa: PLC0415 - late, as in `deployment`

    settings = read_settings()
    with open_dispatcher(settings) as dispatcher:  # so that a wrong configuration is reported before anything starts
        dispatcher.check()
    run_dev(settings, concurrency=concurrency, log_level=log_level.upper())


@cli.group()
def db() -> None:
    """Create, upgrade and inspect the tables."""


@db.command()
@click.option("--workers-stopped", is_flag=True, help="Say that no worker, beat or application runs.")
def upgrade(workers_stopped: bool) -> None:
    """Create the tables, or bring them to this version's revision.

    Some revisions need --workers-stopped. It is refused while an attempt runs or a pass began less than a minute ago.
    """
    from dispatcher.storage.migrations import runner  # noqa: PLC0415 - late, as in `deployment`

    click.echo(f"the database is at revision {runner.upgrade(open_database(), workers_stopped=workers_stopped)}")


@db.command()
@json_option
def current(as_json: bool) -> None:
    """Print the revision of the tables."""
    from dispatcher.storage.migrations import revisions  # noqa: PLC0415 - late, as in `deployment`

    found, head = revisions.current(open_database()), revisions.head()
    if as_json:
        print_json({"current": found, "head": head})
    else:
        click.echo(f"{found or 'no tables'} ({'up to date' if found == head else f'this version has {head}'})")


@db.command()
@click.argument("name")
@yes_option
def separate(name: str, yes: bool) -> None:
    """Give the chains of a copied database other idempotency keys.

    NAME is the name of the copy, such as staging. Run it on the copy, before its workers start; again with the same
    name for the chains that were left.
    """
    dispatcher = open_dispatcher()
    confirm(f"give every chain in {dispatcher.database.address} other idempotency keys, as {name}?", yes=yes)
    counts = dispatcher.separate(name)
    left = f"{counts.waiting} left because they wait for a delivery"
    click.echo(f"{counts.separated} chains separated, {counts.before} separated before, {left}")


@cli.command()
@dry_run_option
@json_option
def sweep(dry_run: bool, as_json: bool) -> None:
    """Publish the due chains now, even if beat has just done it."""
    dispatcher = open_dispatcher()
    dispatcher.require_broker()
    print_counts(dispatcher.sweep(dry_run=dry_run), as_json)


@cli.command()
@json_option
def relay(as_json: bool) -> None:
    """Publish the owed deliveries whose message was lost or whose worker died."""
    dispatcher = open_dispatcher()
    dispatcher.require_broker()
    print_counts(dispatcher.relay(), as_json)


@cli.command()
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="The age in days, instead of the setting.")
@json_option
def prune(days: float | None, as_json: bool) -> None:
    """Delete events, closed deliveries and actions older than DISPATCHER_RETENTION_DAYS; never chains."""
    dispatcher = open_dispatcher()
    if days is None and dispatcher.settings.retention_days is None:
        raise click.UsageError("give --days, or set DISPATCHER_RETENTION_DAYS")
    print_counts(dispatcher.prune(days=days), as_json)


@cli.command()
@click.argument("type_name", metavar="CHAIN_TYPE")
@click.argument("resources", metavar="TYPE=ID...", nargs=-1, required=True, callback=pairs)
@click.option("--callback", metavar="NAME", help="A callback that the configuration registers under this name.")
@click.option("--context", metavar="JSON", callback=_json_object, help="The initial context.")
@dry_run_option
@json_option
def enqueue(  # noqa: PLR0917 - click passes all of them by name
    type_name: str,
    resources: Sequence[tuple[str, str]],
    callback: str | None,
    context: dict[str, Any] | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Have the workers execute the chain of these resources; print the task's id. A dry run logs the plan only."""
    task_id = open_dispatcher().enqueue(
        type_name,
        resources,
        initial_context=context,
        callback=callback,
        requested_by="cli",
        dry_run=dry_run,
    )
    if as_json:
        print_json({"task_id": task_id})
    elif task_id is not None:  # a dry run has none; its plan is logged
        click.echo(task_id)


@cli.command()
@click.argument("type_name", metavar="CHAIN_TYPE")
@click.argument("resources", metavar="TYPE=ID...", nargs=-1, required=True, callback=pairs)
@dry_run_option
@json_option
def execute(type_name: str, resources: Sequence[tuple[str, str]], dry_run: bool, as_json: bool) -> None:
    """Execute the chain of these resources here and now, callback included."""
    settings = read_settings()
    if dry_run:  # set for the whole dispatcher, so that a missing chain is not created either
        settings = settings.model_copy(update={"dry_run": True})
    chain = open_dispatcher(settings).get_or_create_resource_chain(type_name, resources)
    # A callback may print. With --json its text goes to stderr, so that stdout has only the JSON.
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = chain.execute(requested_by="cli")
    if as_json:
        print_json(result)
        return
    click.echo(f"chain {chain.id or '(not created)'} is in state {chain.state}: {result['outcome']}")
    print_reasons(result["errors"])


@cli.group()
def chains() -> None:
    """Look at chains and act on them."""


@chains.command("list")
@click.option("--type", "type_name", help="Only this chain type.")
@click.option("--state", help="Only this state.")
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="The largest number of chains to list.",
)
@click.option("--after-id", type=click.IntRange(min=0), default=0, help="Begin after the chain with this id.")
@json_option
def list_chains(type_name: str | None, state: str | None, limit: int, after_id: int, as_json: bool) -> None:
    """List chains in the order of their ids."""
    found = open_dispatcher().find_chains(chain_type=type_name, state=state, limit=limit, after_id=after_id)
    if as_json:
        print_json([_chain_values(chain) for chain in found])
        return
    head = ("id", "type", "state", "due", "disabled", "resources")
    rows = [
        (
            str(chain.id),
            chain.chain_type,
            chain.state,
            moment(chain.due_at),
            "yes" if chain.disabled else "",
            resource_words(chain.resources),
        )
        for chain in found
    ]
    print_table([head, *rows])


@chains.command()
@click.argument("chain_id", type=int)
@json_option
def show(chain_id: int, as_json: bool) -> None:
    """Print one chain and its history."""
    chain = open_dispatcher().chain(chain_id)
    events = [{name: getattr(event, name) for name in _EVENT_FIELDS} for event in chain.events]
    if as_json:
        print_json({**_chain_values(chain), "events": events})
        return
    for name, value in _chain_values(chain).items():
        click.echo(f"{name:<15} {text(value)}")
    click.echo()
    print_table([_EVENT_FIELDS, *([text(value) for value in event.values()] for event in events)])


@chains.command()
@click.argument("chain_id", type=int)
@json_option
def explain(chain_id: int, as_json: bool) -> None:
    """Say why a chain moves, or why it does not."""
    explanation = open_dispatcher().chain(chain_id).explain()
    if as_json:
        print_json(explanation)
        return
    for name, value in explanation.items():
        click.echo(f"{name:<15} {text(value)}")


@cli.command()
@click.argument("type_name", metavar="[CHAIN_TYPE]", required=False)
def graph(type_name: str | None) -> None:
    """Print the states and transitions as Mermaid diagrams."""
    config = open_dispatcher().config
    for chain_type in [config.get(type_name)] if type_name is not None else config.chains:
        click.echo(f"%% {chain_type.chain_type}\n{chain_type.graph.mermaid()}")


@cli.command()
@click.option("--services", is_flag=True, help="Ask the database, Redis and the broker as well.")
@json_option
def check(services: bool, as_json: bool) -> None:
    """Validate the configuration; print types, states and warnings."""
    dispatcher = open_dispatcher()
    if services:
        dispatcher.check()
        dispatcher.check_locks()
    reports = {chain_type.chain_type: _report(chain_type) for chain_type in dispatcher.config.chains}
    if as_json:
        print_json(reports)
        return
    for type_name, report in reports.items():
        click.echo(f"{type_name}: {len(report['states'])} states, {len(report['transitions'])} transitions")
        for state, candidates in report["states"].items():
            click.echo(f"  {state}: {', '.join(candidates) or '(terminal)'}")
        for warning in report["warnings"]:
            click.echo(f"  warning: {warning}")


add_operations(cli, chains)


def _report(chain_type: "ChainType") -> dict[str, Any]:
    """The states of a chain type with their candidates, and warnings about probable mistakes."""
    from dispatcher.domain.callbacks import NO_CALLBACK_FOUND, choose_callback  # noqa: PLC0415 - late, as in `deployment`

    warnings = [f"no chain can reach state {state!r}" for state in chain_type.graph.unreachable()]
    warnings += [
        f"{name} has no callback unless a request names one"
        for name, transition in chain_type.by_name.items()
        if choose_callback(chain_type, transition, None) is NO_CALLBACK_FOUND
    ]
    return {
        "states": {
            state: [candidate.__name__ for candidate in chain_type.candidates(state)]
            for state in chain_type.graph.states
        },
        "transitions": list(chain_type.by_name),
        "warnings": warnings,
    }


def _chain_values(chain: "Chain") -> dict[str, Any]:
    return {
        "id": chain.id,
        "chain_type": chain.chain_type,
        "state": chain.state,
        "resources": chain.resources,
        "disabled": chain.disabled,
        "next_update_at": chain.next_update_at,
        "due_at": chain.due_at,
        "created_at": chain.created_at,
    }


def _fail(problem: str) -> NoReturn:
    click.echo(f"dispatcher: {' '.join(problem.split())}", err=True)
    sys.exit(1)
