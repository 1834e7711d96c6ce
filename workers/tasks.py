"""The Celery tasks, each a call of `Dispatcher`, and `install()`, which adds them to a Celery app.

A message has ids and the number of an attempt, but no decisions: a wrong message only makes a worker look at a chain.
"""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from billiard.process import current_process
from celery import Celery, Task, signals
from kombu import Exchange, Queue

from dispatcher import Dispatcher, DispatcherError
from dispatcher.domain.records import Owed
from dispatcher.domain.results import AttemptResult, ChainResult
from dispatcher.messages.queues import (
    CALLBACKS_QUEUE,
    DELIVER,
    EXECUTE,
    FAN_OUT,
    PRUNE,
    RELAY,
    REQUESTS_QUEUE,
    SWEEP,
    celery_settings,
    declared_queues,
    transport_options,
)
from dispatcher.states import Outcome
from dispatcher.telemetry import Action, emit
from workers.beat import follow_the_clock
from workers.reconnection import CloseWhole

logger = logging.getLogger(__name__)

MAX_IDS: Final = 1000
_MAX_PAGE: Final = 10_000  # the maximum of `sweep_fanout`
_BUSY_RETRIES: Final = 5
_BUSY_COUNTDOWN: Final = 2
_MAX_REASONS: Final = 10
_MAIN_PROCESS: Final = "MainProcess"

# No late acknowledgement and no redelivery, because the rows store what is owed. Set on each task, because an
# application's app may have other defaults.
_TASK_OPTIONS: Final[dict[str, Any]] = {
    "acks_late": False,
    "reject_on_worker_lost": False,
    "ignore_result": True,
    "serializer": "json",
    "rate_limit": None,
    "soft_time_limit": None,
    "Request": "workers.waits:BoundedRequest",
    "shared": False,  # else every app of the process would get these tasks, with the dispatcher of this one
}


def install(app: Celery, dispatcher: Dispatcher) -> None:
    """Add the dispatcher's tasks, queues and beat entries to an existing Celery app.

    The app keeps its settings, and its workers still consume its queues. The dispatcher publishes through `app` if it
    was made with `celery_app=app`.
    """
    _add_settings(app, dispatcher)
    _add_tasks(app, dispatcher)
    app.steps["consumer"].add(CloseWhole)
    signals.beat_init.connect(follow_the_clock)

    @signals.worker_process_init.connect(weak=False)
    def begin_process(**_: Any) -> None:
        dispatcher.after_fork()
        process = current_process()
        if process.name != _MAIN_PROCESS:  # a child of a pool; the signal is also sent in a solo worker
            dispatcher.watch_callbacks(parent=process._parent_pid)  # which may be dead already
        # Exclude inherited objects from garbage collection: faster, and their pages stay shared.
        gc.freeze()


def _add_settings(app: Celery, dispatcher: Dispatcher) -> None:
    type_queues = [chain_type.queue for chain_type in dispatcher.config.chains if chain_type.queue is not None]
    added = celery_settings(dispatcher.settings, broker_url=dispatcher.broker_url, queues=type_queues)
    queues = list(app.conf.task_queues or ())
    if not queues:
        name = app.conf.task_default_queue
        exchange = Exchange(app.conf.task_default_exchange or name, type=app.conf.task_default_exchange_type)
        queues = [Queue(name, exchange, routing_key=app.conf.task_default_routing_key or name)]
    names = {queue.name for queue in queues}
    app.conf.task_queues = [*queues, *(queue for queue in declared_queues(type_queues) if queue.name not in names)]
    routes = app.conf.task_routes or []
    app.conf.task_routes = [added["task_routes"], *(routes if isinstance(routes, list | tuple) else [routes])]
    # Timeouts, if the app sets none: a silent broker must not block an enqueue for ever.
    defaults = transport_options(app.conf.broker_url, dispatcher.settings.broker_seconds)
    app.conf.broker_transport_options = {**defaults, **(app.conf.broker_transport_options or {})}
    app.conf.beat_schedule = {**(app.conf.beat_schedule or {}), **added["beat_schedule"]}


def _add_tasks(app: Celery, dispatcher: Dispatcher) -> None:
    settings = dispatcher.settings

    def task(name: str, *, time_limit: float, **options: Any) -> Callable[[Callable[..., Any]], Task]:
        return app.task(name=name, time_limit=time_limit, **_TASK_OPTIONS, **options)  # type: ignore[no-any-return]

    @task(SWEEP, time_limit=600)
    def sweep(*_: Any, **__: Any) -> Any:
        return _named_outcome(lambda: dispatcher.sweep(tick=True))

    @task(FAN_OUT, time_limit=600)
    def fan_out(chain_type: Any = None, chain_ids: Any = ()) -> Any:
        type_name = chain_type if isinstance(chain_type, str) else ""
        ids = chain_ids_of(chain_ids, limit=_MAX_PAGE)
        return _named_outcome(lambda: dispatcher.fan_out(type_name, ids))

    @task(RELAY, time_limit=600)
    def relay(*_: Any, **__: Any) -> Any:
        return _named_outcome(lambda: dispatcher.relay(tick=True))

    @task(PRUNE, time_limit=600)
    def prune(*_: Any, **__: Any) -> Any:
        return _named_outcome(lambda: dispatcher.prune(tick=True))

    @task(EXECUTE, time_limit=settings.execute_seconds, bind=True, max_retries=_BUSY_RETRIES)
    def execute_chain(self: Task, chain_ids: Any = (), dry_run: Any = None) -> Any:
        ids = chain_ids_of(chain_ids)
        if dry_run:
            return _named_outcome(lambda: summary_of_chains([dispatcher.plan_chain(chain_id) for chain_id in ids]))
        results = dispatcher.execute_chains(ids)
        busy = [result.chain_id for result in results if result.outcome in (Outcome.LOCKED, Outcome.PENDING)]
        on_demand = self.request.delivery_info.get("routing_key") == REQUESTS_QUEUE
        if busy and on_demand and self.request.retries < _BUSY_RETRIES:
            raise self.retry(kwargs={"chain_ids": busy}, countdown=_BUSY_COUNTDOWN, queue=REQUESTS_QUEUE)
        return summary_of_chains(results)

    @task(DELIVER, time_limit=settings.attempt_seconds, bind=True, max_retries=None)
    def deliver_callback(self: Task, deliveries: Any = ()) -> Any:
        owed = owed_of(deliveries)
        results = dispatcher.deliver(owed)
        again = [result for result in results if result.retry_seconds is not None]
        if again and len(results) == 1:
            (result,) = again
            raise self.retry(
                args=(),
                kwargs={"deliveries": [[result.delivery_id, result.next_attempt]]},
                countdown=result.retry_seconds,
                exc=AttemptAgain(result.detail),
                throw=False,
                queue=CALLBACKS_QUEUE,
            )
        for result in again:
            deliver_callback.apply_async(
                kwargs={"deliveries": [[result.delivery_id, result.next_attempt]]},
                countdown=result.retry_seconds,
                queue=CALLBACKS_QUEUE,
            )
        return summary_of_attempts(results)


class AttemptAgain(Exception):  # noqa: N818 - Celery and Flower show this name as the reason of a retry
    """Another attempt follows. The text is the error in the delivery's row, or what the delivery waits for."""


def chain_ids_of(raw: Any, *, limit: int = MAX_IDS) -> list[int]:
    """The valid chain ids in a message: distinct positive numbers, at most `limit`; leaves out everything else."""
    if isinstance(raw, int):
        raw = [raw]
    if not isinstance(raw, list | tuple):
        return []
    ids = [
        chain_id
        for chain_id in raw[:limit]
        if isinstance(chain_id, int) and not isinstance(chain_id, bool) and 0 < chain_id < 2**63
    ]
    return list(dict.fromkeys(ids))


def owed_of(raw: Any) -> list[Owed]:
    """The valid pairs in a message `[[delivery id, attempt], ...]`, at most `MAX_IDS`; leaves out everything else."""
    if not isinstance(raw, list | tuple):
        return []
    return [
        Owed(pair[0], pair[1])
        for pair in raw[:MAX_IDS]
        if isinstance(pair, list | tuple)
        and len(pair) == 2  # noqa: PLR2004 - a pair
        and isinstance(pair[0], str)
        and isinstance(pair[1], int)
        and not isinstance(pair[1], bool)
    ]


def summary_of_chains(results: Sequence[ChainResult]) -> Any:
    """The result that Flower shows for an execution: one chain's outcome and reasons, or a count per outcome."""
    if len(results) != 1:
        return _counted(results)
    (result,) = results
    shown: dict[str, Any] = {"chain_id": result.chain_id, "outcome": str(result.outcome)}
    if result.state:
        shown["state"] = result.state
    if result.transition is not None:
        shown["transition"] = type(result.transition).__name__
    if result.delivery_id is not None:
        shown["delivery_id"] = result.delivery_id
    if result.errors:
        shown["reasons"] = dict(list(result.errors.items())[:_MAX_REASONS])
    if result.detail:
        shown["detail"] = result.detail[:500]
    return shown


def summary_of_attempts(results: Sequence[AttemptResult]) -> Any:
    """The result that Flower shows for attempts: one delivery's outcome, or a count per outcome."""
    if len(results) != 1:
        return _counted(results)
    (result,) = results
    shown: dict[str, Any] = {
        "delivery_id": result.delivery_id,
        "attempt": result.attempt,
        "outcome": str(result.outcome),
    }
    if result.chain_id is not None:
        shown.update(chain_id=result.chain_id, transition=result.transition)
    if result.detail:
        shown["detail"] = result.detail
    return shown


def _counted(results: Iterable[ChainResult | AttemptResult]) -> dict[str, int]:
    return dict(Counter(str(result.outcome) for result in results))


def _named_outcome(call: Callable[[], Any]) -> Any:
    """The result of `call`. A `DispatcherError` is logged as one line and returned as `{"error": text}`."""
    try:
        return call()
    except DispatcherError as error:
        emit(logger, Action.TASK_FAILED, "%s", error)  # without a traceback, because the error is expected
        return {"error": str(error)}
