"""What an execution would do, logged and not done."""

from dispatcher.domain.callbacks import NO_CALLBACK_FOUND, LocalCall, choose_for
from dispatcher.domain.config import ChainType
from dispatcher.domain.evaluation import Plan
from dispatcher.domain.records import ChainRecord, Request
from dispatcher.domain.results import ChainResult
from dispatcher.states import Outcome


def dry_result(
    record: ChainRecord, chain: ChainType, plan: Plan, asked: Request, local: LocalCall | None
) -> ChainResult:
    """What a dry run says of a plan."""
    chain_id = record.id or None
    if plan.winner is None:
        outcome = Outcome.TERMINAL if plan.terminal else Outcome.NONE
        return ChainResult(chain_id, outcome, record.state, errors=plan.errors)
    try:
        choice = choose_for(chain, plan.winner, asked, local)
    except KeyError as error:
        return ChainResult(
            chain_id, Outcome.UNKNOWN_DEFINITION, record.state, plan.winner, plan.errors, detail=f"callback {error}"
        )
    if choice is NO_CALLBACK_FOUND:
        return ChainResult(chain_id, Outcome.NO_CALLBACK, record.state, plan.winner, plan.errors, callback="missing")
    return ChainResult(
        chain_id, Outcome.DRY_RUN, record.state, plan.winner, plan.errors, callback=choice.kind or "none"
    )
