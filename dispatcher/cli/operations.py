"""The operators' commands: chains, deliveries, resources, chain types, and the doctor."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from dispatcher.cli.deployment import open_dispatcher
from dispatcher.cli.output import dry_run_option, duration, json_option, moment, pairs, print_json, print_table
from dispatcher.errors import DispatcherError, DryRunRefused, NoOpenDelivery
from dispatcher.states import DeliveryStatus

if TYPE_CHECKING:
    from dispatcher.chain import Chain
    from dispatcher.dispatcher import Dispatcher
    from dispatcher.domain.records import DeliveryRecord

_STATUSES = [str(status) for status in DeliveryStatus]
_DECIDABLE = [str(status) for status in (DeliveryStatus.PENDING, DeliveryStatus.DEAD, DeliveryStatus.HELD)]
_SHOWN = 10_000

by_option = click.option("--by", "requested_by", default="cli", show_default=True, help="Your name, for the history.")
reason_option = click.option("--reason", help="The reason, for the history.")
needed_reason_option = click.option("--reason", required=True, help="The reason, for the history.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def add_operations(cli: click.Group, chains: click.Group) -> None:
    """Add these commands to the command line and to its group `chains`."""
    for command in (disable, enable, reset, move, map_states):
        chains.add_command(command)
    for group in (deliveries, resources, chain_types, list_actions, doctor):
        cli.add_command(group)


# --- chains ----------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("chain_id", type=int)
@reason_option
@by_option
def disable(chain_id: int, reason: str | None, requested_by: str) -> None:
    """Stop new plans and new attempts of a chain."""
    _say(open_dispatcher().chain(chain_id).disable(requested_by, reason=reason), "is disabled")


@click.command()
@click.argument("chain_id", type=int)
@reason_option
@by_option
def enable(chain_id: int, reason: str | None, requested_by: str) -> None:
    """Enable a disabled chain; it is due, or its open delivery continues."""
    _say(open_dispatcher().chain(chain_id).enable(requested_by, reason=reason), "is enabled")


@click.command()
@click.argument("chain_id", type=int)
@reason_option
@by_option
@yes_option
def reset(chain_id: int, reason: str | None, requested_by: str, yes: bool) -> None:
    """Put a chain back to NEW; cancels its open delivery."""
    chain = open_dispatcher().chain(chain_id)
    confirm(f"reset chain {chain_id}, which is in state {chain.state}?", yes=yes)
    _say(chain.reset(requested_by, reason=reason), "is reset")


@click.command()
@click.argument("chain_id", type=int)
@click.argument("state")
@needed_reason_option
@by_option
def move(chain_id: int, state: str, reason: str, requested_by: str) -> None:
    """Put a chain into another state; cancels its open delivery."""
    _say(open_dispatcher().chain(chain_id).move_to(state, reason, requested_by), "is moved")


@click.command("map")
@click.option("--type", "type_name", required=True, help="The chain type.")
@click.option("--from", "from_state", required=True, help="The old state.")
@click.option("--to", "to_state", required=True, help="The new state, which the configuration must have.")
@reason_option
@by_option
@dry_run_option
@yes_option
def map_states(  # noqa: PLR0917 - click passes them by name
    type_name: str, from_state: str, to_state: str, reason: str | None, requested_by: str, dry_run: bool, yes: bool
) -> None:
    """Give a state another name, in all chains of a type that are in it."""
    dispatcher = open_dispatcher()
    planned = dispatcher.map_states(type_name, from_state, to_state, dry_run=True)
    click.echo(f"{planned.mapped} chains of {type_name} are in state {from_state}")
    if dry_run or not planned.mapped:
        return
    confirm(f"put them into {to_state}?", yes=yes)
    done = dispatcher.map_states(type_name, from_state, to_state, requested_by=requested_by, reason=reason)
    click.echo(f"{done.mapped} mapped, {done.waiting} left because an attempt runs")


# --- deliveries ------------------------------------------------------------------------------------------------------


@click.group()
def deliveries() -> None:
    """Look at deliveries; retry, cancel or skip them."""


def _filters(statuses: Sequence[str], limit: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                "--limit",
                type=click.IntRange(1, _SHOWN),
                default=limit,
                show_default=True,
                help="The largest number of deliveries.",
            ),
            click.option("--type", "type_name", help="Only deliveries of this chain type."),
            click.option(
                "--status",
                "statuses",
                type=click.Choice(statuses),
                multiple=True,
                help="Only deliveries in this status.",
            ),
        ):
            command = option(command)
        return command

    return add


@deliveries.command("list")
@click.option("--chain", "chain_id", type=int, help="Only deliveries of this chain.")
@_filters(_STATUSES, 100)
@json_option
def list_deliveries(
    chain_id: int | None, statuses: Sequence[str], type_name: str | None, limit: int, as_json: bool
) -> None:
    """List deliveries, newest first."""
    found = open_dispatcher().find_deliveries(
        chain_id=chain_id, chain_type=type_name, statuses=_statuses(statuses), limit=limit
    )
    if as_json:
        print_json([_values(delivery) for delivery in found])
        return
    print_table(
        [
            ("id", "chain", "transition", "status", "attempt", "next attempt", "waits for", "last error"),
            *(
                (
                    delivery.id,
                    str(delivery.chain_id),
                    delivery.transition,
                    delivery.status + (" (effect unknown)" if delivery.unknown else ""),
                    f"{delivery.attempt}/{delivery.max_attempts}",
                    moment(delivery.next_attempt_at),
                    delivery.waits_reason or delivery.waits_for or "",
                    (delivery.last_error or "").split("\n", 1)[0][:60],
                )
                for delivery in found
            ),
        ]
    )


def _decision(verb: str, past: str, act: "Callable[[Dispatcher], Callable[..., None]]", text: str) -> None:
    """Add a command that retries, cancels or skips deliveries: those named, a chain's, or all that the filters choose.

    `act` gives the dispatcher's method. It gets each delivery as it was read, and leaves it alone if it has changed.
    """

    @click.argument("delivery_ids", metavar="[DELIVERY_ID]...", nargs=-1)
    @click.option("--chain", "chain_id", type=int, help="The open delivery of this chain.")
    @_filters(_DECIDABLE, _SHOWN)
    @click.option(
        "--reason",
        default=None if verb == "retry" else f"{past} by hand",
        show_default=True,
        help="The reason, for the history.",
    )
    @by_option
    @yes_option
    def decide(  # noqa: PLR0917 - click passes them by name
        delivery_ids: Sequence[str],
        chain_id: int | None,
        statuses: Sequence[str],
        type_name: str | None,
        limit: int,
        reason: str | None,
        requested_by: str,
        yes: bool,
    ) -> None:
        if [bool(delivery_ids), chain_id is not None, bool(statuses)].count(True) != 1:
            raise click.UsageError("give ids of deliveries, or --chain for a chain's, or --status for several")
        if type_name is not None and not statuses:
            raise click.UsageError("--type needs --status")
        dispatcher = open_dispatcher()
        decide_one = partial(act(dispatcher), requested_by=requested_by, reason=reason)
        if chain_id is not None:
            delivery = dispatcher.chain(chain_id).open_delivery
            if delivery is None:
                raise NoOpenDelivery(chain_id)
            decide_one(delivery)
            click.echo(f"{_line(delivery)}\n1 {past}")
            return
        if delivery_ids:
            ids = list(dict.fromkeys(delivery_ids))
            done, wanted = _decide_each(_named(dispatcher, ids), decide_one, shown=True), len(ids)
        else:
            found = dispatcher.find_deliveries(chain_type=type_name, statuses=_statuses(statuses), limit=limit)
            if not found:
                click.echo("no such delivery")
                return
            confirm(f"{verb} {_counted(found, limit)} deliveries?", yes=yes)
            done, wanted = _decide_each(found, decide_one, shown=False), len(found)
        click.echo(f"{done} {past}")
        if done < wanted:
            raise SystemExit(1)

    decide.__doc__ = text
    deliveries.command(verb)(decide)


_decision(
    "retry",
    "retried",
    lambda dispatcher: dispatcher.retry_delivery,
    "Attempt deliveries again at once; dead and held deliveries get further attempts.",
)
_decision(
    "cancel",
    "cancelled",
    lambda dispatcher: dispatcher.cancel_delivery,
    "Close deliveries as cancelled; their chains stay in their state and are evaluated again.",
)
_decision(
    "skip",
    "skipped",
    lambda dispatcher: dispatcher.skip_delivery,
    "Close deliveries as skipped; their chains move as if the callbacks had succeeded.",
)


@deliveries.command("abandon")
@click.argument("delivery_ids", metavar="DELIVERY_ID...", nargs=-1, required=True)
@click.option("--reason", help="The reason, for the history.")
@by_option
@yes_option
def abandon_deliveries(delivery_ids: Sequence[str], reason: str | None, requested_by: str, yes: bool) -> None:
    """Give up running attempts whose processes hang: their effects are unknown.

    End the process instead, if you can. What follows is as after a crash: a retry with the same idempotency key, a
    question to verify(), or held for a person.
    """
    ids = list(dict.fromkeys(delivery_ids))
    consequence = "their effects count as unknown, and callbacks may be called again"
    confirm(f"abandon the attempts at {len(ids)} deliveries? {consequence}", yes=yes)
    dispatcher = open_dispatcher()
    abandon = partial(dispatcher.abandon_delivery, requested_by=requested_by, reason=reason)
    done = _decide_each(_named(dispatcher, ids), abandon, shown=True)
    click.echo(f"{done} abandoned")
    if done < len(ids):
        raise SystemExit(1)


def _decide_each(
    found: "Iterable[DeliveryRecord]", decide_one: "Callable[[DeliveryRecord], None]", *, shown: bool
) -> int:
    """How many of these deliveries were decided; the others are named on stderr with the reason."""
    done = 0
    for delivery in found:
        try:
            decide_one(delivery)
        except DryRunRefused:
            raise
        except DispatcherError as error:  # it has changed just now: report it and continue with the others
            click.echo(f"dispatcher: {error}", err=True)
            continue
        done += 1
        if shown:
            click.echo(_line(delivery))
    return done


def _named(dispatcher: "Dispatcher", delivery_ids: Sequence[str]) -> "Iterator[DeliveryRecord]":
    """The deliveries with these ids, each read when its turn comes; ids that no delivery has are named on stderr."""
    for delivery_id in delivery_ids:
        found = dispatcher.find_deliveries(delivery_ids=[delivery_id])
        if not found:
            click.echo(f"dispatcher: there is no delivery {delivery_id}", err=True)
        yield from found


def _line(delivery: "DeliveryRecord") -> str:
    return f"delivery {delivery.id} of chain {delivery.chain_id}: {delivery.transition}, {delivery.status}"


def _statuses(words: Sequence[str]) -> list[DeliveryStatus]:
    return [DeliveryStatus(word) for word in words]


def _values(delivery: "DeliveryRecord") -> dict[str, Any]:
    names = ("id", "chain_id", "transition", "from_state", "final_state", "callback", "status", "attempt")
    more = ("max_attempts", "unknown", "next_attempt_at", "planned_at", "finished_at", "requested_by", "last_error")
    waits = ("waits_for", "waits_reason", "waits_since")
    return {name: getattr(delivery, name) for name in (*names, *more, *waits)}


# --- resources -------------------------------------------------------------------------------------------------------


@click.group()
def resources() -> None:
    """Act on every chain of a resource, such as customer=57844."""


_one_resource = click.argument(
    "resource", metavar="TYPE=ID", callback=lambda ctx, param, word: pairs(ctx, param, [word])[0]
)


@resources.command("disable")
@_one_resource
@reason_option
@by_option
def disable_resource(resource: tuple[str, str], reason: str | None, requested_by: str) -> None:
    """Disable every chain of a resource (an unsubscribe)."""
    click.echo(f"{open_dispatcher().disable_resource(resource, requested_by, reason=reason)} chains disabled")


@resources.command("enable")
@_one_resource
@reason_option
@by_option
def enable_resource(resource: tuple[str, str], reason: str | None, requested_by: str) -> None:
    """Enable every chain of a resource."""
    click.echo(f"{open_dispatcher().enable_resource(resource, requested_by, reason=reason)} chains enabled")


@resources.command("erase")
@_one_resource
@reason_option
@by_option
@yes_option
def erase_resource(resource: tuple[str, str], reason: str | None, requested_by: str, yes: bool) -> None:
    """Delete every chain of a resource, with its history and deliveries."""
    dispatcher = open_dispatcher()
    found = dispatcher.find_chains(resource=resource, limit=_SHOWN)
    confirm(f"delete {_counted(found, _SHOWN)} chains for good?", yes=yes)
    count = dispatcher.erase_resource(resource, requested_by=requested_by, reason=reason)
    click.echo(f"{count} chains deleted")


# --- chain types -----------------------------------------------------------------------------------------------------


@click.group("chain-types")
def chain_types() -> None:
    """Pause and resume whole chain types."""


@chain_types.command("list")
@json_option
def list_types(as_json: bool) -> None:
    """List the chain types of the configuration, and which are paused."""
    dispatcher = open_dispatcher()
    rows_by_name = {row.name: row for row in dispatcher.find_types()}
    paused = {
        name: row.paused_reason or "" if (row := rows_by_name.get(name)) is not None and row.paused else None
        for name in dispatcher.config.by_type
    }
    if as_json:
        print_json(paused)
        return
    rows = [(name, "" if reason is None else f"paused: {reason}") for name, reason in paused.items()]
    print_table([("chain type", "state"), *rows])


@chain_types.command()
@click.argument("name")
@needed_reason_option
@by_option
def pause(name: str, reason: str, requested_by: str) -> None:
    """Plan and attempt nothing more of a chain type until it is resumed."""
    changed = open_dispatcher().pause(name, reason, requested_by=requested_by)
    click.echo(f"{name} is paused" if changed else f"{name} was paused already")


@chain_types.command()
@click.argument("name")
@click.option(
    "--spread",
    metavar="TIME",
    callback=duration,
    help="Spread what is due, and what is parked, evenly over this time, such as 90s, 30m, 2h or 1d.",
)
@reason_option
@by_option
def resume(name: str, spread: timedelta | None, reason: str | None, requested_by: str) -> None:
    """End the pause of a chain type, and begin a new plan budget."""
    changed = open_dispatcher().resume(name, spread=spread, requested_by=requested_by, reason=reason)
    over = f"; its work is spread over {spread}" if spread is not None else ""
    click.echo(f"{name} is resumed{over}" if changed else f"{name} was not paused")


# --- actions ---------------------------------------------------------------------------------------------------------


@click.command("actions")
@click.option("--type", "type_name", help="Only what was done to this chain type.")
@click.option(
    "--resource",
    metavar="TYPE=ID",
    callback=lambda ctx, param, word: None if word is None else pairs(ctx, param, [word])[0],
    help="Only what was done to this resource.",
)
@click.option("--limit", type=click.IntRange(1, _SHOWN), default=100, show_default=True, help="The largest number.")
@json_option
def list_actions(type_name: str | None, resource: tuple[str, str] | None, limit: int, as_json: bool) -> None:
    """List what operators did to chain types and resources: who, why and when. Newest first."""
    if type_name is not None and resource is not None:
        raise click.UsageError("give --type or --resource, not both")
    found = open_dispatcher().find_actions(chain_type=type_name, resource=resource, limit=limit)
    if as_json:
        print_json([asdict(action) for action in found])
        return
    print_table(
        [
            ("when", "on", "action", "by", "reason"),
            *(
                (
                    moment(action.created_at),
                    f"{action.subject_kind} {action.subject}",
                    action.action,
                    action.requested_by or "",
                    " ".join((action.reason or "").split()),
                )
                for action in found
            ),
        ]
    )


# --- doctor ----------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--repair", is_flag=True, help="Repair what is safe to repair.")
@json_option
def doctor(repair: bool, as_json: bool) -> None:
    """Examine the deployment; print each problem and its remedy.

    Compares rows, queues, locks and leases. Exits with 0 if all is well.
    """
    dispatcher = open_dispatcher()
    repaired_findings, left = dispatcher.repair() if repair else ([], dispatcher.examine())
    if as_json:
        reported = [(finding, True) for finding in repaired_findings] + [(finding, False) for finding in left]
        print_json(
            [
                {"area": finding.area, "problem": finding.problem, "remedy": finding.remedy, "repaired": repaired}
                for finding, repaired in reported
            ]
        )
    else:
        for finding in repaired_findings:
            click.echo(f"repaired: {finding}")
        for finding in left:
            click.echo(str(finding))
        if not left:
            click.echo("all is well")
    if left:
        raise SystemExit(1)


# --- shared ----------------------------------------------------------------------------------------------------------


def confirm(question: str, *, yes: bool) -> None:
    """Ask, and abort without a "y"; `yes` answers."""
    if not yes:
        click.confirm(question, abort=True)


def _counted(found: Sequence[object], limit: int) -> str:
    return f"{len(found)}{' (there may be more)' if len(found) == limit else ''}"


def _say(chain: "Chain", what: str) -> None:
    click.echo(f"chain {chain.id} {what}: state {chain.state}")
