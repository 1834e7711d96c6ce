"""A worker and nothing else: what an application in another process asks for, and what a worker says and refuses."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

from dispatcher import Chain, Dispatcher
from tests.acceptance.chainlib import MAX_ATTEMPTS
from tests.acceptance.nodes import Deployment, make_fifo, open_fifo, results

pytestmark = pytest.mark.acceptance

EXECUTE, DELIVER = "dispatcher.execute_chain", "dispatcher.deliver_callback"
CALLBACKS = "dispatcher.callbacks"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


# --- on demand --------------------------------------------------------------------------------------------------------


def test_what_another_process_enqueues_is_called_long_before_a_sweep(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    worker = celery_setup.worker
    assert celery_setup.ready()
    assert len(celery_setup) == 2, "broker and worker"
    assert celery_setup.app.control.ping(timeout=20, limit=1) == [{worker.hostname(): {"ok": "pong"}}]
    chain = new_chain("single")
    began = time.monotonic()
    assert chain.enqueue(requested_by="shop")
    deployment.wait_for_state(chain, "first_sent", seconds=20)
    assert time.monotonic() - began < 20, "a sweep interval is 60 s"
    (called,) = deployment.sink.lines("called", chain_id=chain.id)
    assert called["pid"] != os.getpid()
    assert [(event.action, event.to_state, event.requested_by) for event in chain.events] == [
        ("created", "new", None),
        ("planned", "first_sent", "shop"),
        ("state_transition", "first_sent", "shop"),
    ]
    (delivery,) = chain.deliveries
    assert (delivery.status, delivery.attempt, delivery.idempotency_key) == ("delivered", 1, called["key"])


def test_a_named_callback_gets_its_kwargs_and_the_context_as_json_gives_them(
    celery_setup: CeleryTestSetup, deployment: Deployment, client: Dispatcher
) -> None:
    context = {"question": {"text": "naïve “quotes”", "numbers": [1, 2.5, None, True]}}
    kwargs = {"channel": "e-mail", "copies": 2}
    resources = [("customer", "7"), ("order", "19970101")]
    client.enqueue("question", resources, initial_context=context, callback="answer", callback_kwargs=kwargs)
    chain = client.get_or_create_resource_chain("question", resources)
    deployment.wait_for_state(chain, "answered")
    (called,) = deployment.sink.lines("called", chain_id=chain.id)
    assert called["kwargs"] == kwargs
    assert called["context"]["question"] == context["question"]
    assert chain.deliveries[0].callback == "named:answer"


# --- what a worker says -----------------------------------------------------------------------------------------------


def test_outcomes_are_readable_in_the_log_and_in_the_events(
    celery_setup: CeleryTestSetup, new_chain: Callable[..., Chain]
) -> None:
    chain = new_chain("single")
    asked: list[str | None] = []
    seen: dict[str, str] = {}
    deadline = time.monotonic() + 45

    def ask(_: dict[str, Any]) -> None:  # a heartbeat shows that the receiver hears something
        if not asked:
            asked.append(chain.enqueue())
        receiver.should_stop = time.monotonic() > deadline

    def remember(event: dict[str, Any]) -> None:
        if f"'chain_id': {chain.id}," in event["result"]:
            seen["attempt" if "'attempt'" in event["result"] else "execution"] = event["result"]
        receiver.should_stop = len(seen) == 2

    with celery_setup.app.connection_for_read() as connection:
        handlers = {"worker-heartbeat": ask, "task-succeeded": remember}
        receiver = celery_setup.app.events.Receiver(connection, handlers=handlers)
        receiver.capture(limit=None, timeout=45, wakeup=False)
    assert seen.keys() == {"execution", "attempt"}
    assert f"'chain_id': {chain.id}, 'outcome': 'planned', 'state': 'new', 'transition': 'First'" in seen["execution"]
    assert "'outcome': 'delivered'" in seen["attempt"]
    assert f"'chain_id': {chain.id}, 'transition': 'First'" in seen["attempt"]
    log = celery_setup.worker.logs()
    for task, shown in ((EXECUTE, seen["execution"]), (DELIVER, seen["attempt"])):
        assert shown in results(log, task)


def test_messages_about_nothing_end_in_a_named_outcome(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    chain = new_chain("single")
    chain.enqueue()
    deployment.wait_for_state(chain, "first_sent")
    known, unknown = chain.deliveries[0].id, "00000000-0000-7000-8000-000000000000"
    messages = [
        (EXECUTE, {"chain_ids": [2**40]}, "'outcome': 'missing'"),
        (EXECUTE, {"chain_ids": ["1; DROP TABLE", None, -1, True]}, "{}"),
        (EXECUTE, {"chain_ids": [chain.id]}, "'outcome': 'terminal'"),
        (DELIVER, {"deliveries": [[unknown, 1]]}, "'outcome': 'missing'"),
        (DELIVER, {"deliveries": [[known, 1]]}, "'outcome': 'stale'"),
        (DELIVER, {"deliveries": [[known, 7]]}, "'outcome': 'stale'"),
        (DELIVER, {"deliveries": "what is this"}, "{}"),
    ]
    for task, kwargs, outcome in messages:
        sent = celery_setup.app.send_task(task, kwargs=kwargs, queue="dispatcher.requests")
        line = deployment.eventually(
            lambda sent=sent: [line for line in celery_setup.worker.logs().splitlines() if f"{sent.id}] succ" in line],
            f"the end of {task} {kwargs}",
        )[0]
        assert outcome in line
    assert "Traceback" not in celery_setup.worker.logs().partition(messages[0][0])[2].partition(sent.id)[2]
    assert len(deployment.sink.lines("called", chain_id=chain.id)) == 1


# --- attempts ---------------------------------------------------------------------------------------------------------


def test_a_failing_callback_is_retried_by_celery_and_ends_delivered_under_the_same_key(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain]
) -> None:
    mark = len(celery_setup.worker.logs())
    chain = new_chain("single", fail_times=MAX_ATTEMPTS - 1)
    chain.enqueue()
    deployment.wait_for_state(chain, "first_sent")
    calls = deployment.sink.lines("called", chain_id=chain.id)
    assert len(calls) == MAX_ATTEMPTS
    assert len({call["key"] for call in calls}) == 1
    assert len(deployment.sink.lines("done", chain_id=chain.id)) == 1
    (delivery,) = chain.deliveries
    assert (delivery.status, delivery.attempt) == ("delivered", MAX_ATTEMPTS)
    retry = rf"Task {re.escape(DELIVER)}\[.*\] retry: Retry in 0.2s: .*mail server is down"
    assert len(re.findall(retry, celery_setup.worker.logs()[mark:])) == MAX_ATTEMPTS - 1


def test_what_is_over_a_rate_limit_is_deferred_and_delivered_in_its_first_attempt(
    celery_setup: CeleryTestSetup, deployment: Deployment, client: Dispatcher
) -> None:
    mark = len(celery_setup.worker.logs())
    count = 10  # at 1/s a slow machine has some to defer, too
    for number in range(count):
        client.enqueue("paced", [("customer", f"paced-{number}")])
    chains = client.find_chains(chain_type="paced")
    for chain in chains:
        deployment.wait_for_state(chain, "first_sent")
    assert [(one.status, one.attempt) for chain in chains for one in chain.deliveries] == [("delivered", 1)] * count
    retry = rf"Task {re.escape(DELIVER)}\[.*\] retry: Retry in .*: .*rate limit 1/s"
    assert re.search(retry, celery_setup.worker.logs()[mark:])


@pytest.mark.parametrize(
    ("context", "attempts", "error"),
    [
        ({"fail_times": 99}, MAX_ATTEMPTS, "ConnectionError: mail server is down"),
        ({"fail_for_good": True}, 1, "PermanentFailure: no such address"),
    ],
)
def test_a_callback_that_fails_for_good_ends_dead(
    celery_setup: CeleryTestSetup,
    deployment: Deployment,
    new_chain: Callable[..., Chain],
    context: dict[str, Any],
    attempts: int,
    error: str,
) -> None:
    chain = new_chain("single", **context)
    chain.enqueue()
    deployment.eventually(lambda: chain.deliveries and chain.deliveries[0].status == "dead", f"the death of {chain!r}")
    (delivery,) = chain.deliveries
    assert (delivery.attempt, delivery.last_error) == (attempts, error)
    assert len(deployment.sink.lines("called", chain_id=chain.id)) == attempts
    assert chain.refresh().state == "new"
    assert [event.action for event in chain.events] == ["created", "planned", "dead"]


def test_a_message_delivered_many_times_calls_back_once(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    fifo = make_fifo(tmp_path)
    chain = new_chain("single", callback_fifo=str(fifo))
    chain.enqueue()
    deployment.eventually(lambda: deployment.sink.lines("called", chain_id=chain.id), "the callback")
    (delivery,) = chain.deliveries
    copies = [_send_copy(celery_setup, delivery.id) for _ in range(5)]
    _wait_for_end(celery_setup, deployment, copies)
    open_fifo(fifo)
    deployment.wait_for_state(chain, "first_sent")
    _wait_for_end(celery_setup, deployment, [_send_copy(celery_setup, delivery.id) for _ in range(5)])
    assert len(deployment.sink.lines("called", chain_id=chain.id)) == 1
    assert [event.action for event in chain.events] == ["created", "planned", "state_transition"]


def _send_copy(celery_setup: CeleryTestSetup, delivery_id: str) -> str:
    sent = celery_setup.app.send_task(DELIVER, kwargs={"deliveries": [[delivery_id, 1]]}, queue=CALLBACKS)
    return str(sent.id)


def _wait_for_end(celery_setup: CeleryTestSetup, deployment: Deployment, task_ids: list[str]) -> None:
    def are_done() -> bool:
        log = celery_setup.worker.logs()
        return all(f"{task_id}] succeeded" in log for task_id in task_ids)

    deployment.eventually(are_done, "the end of the copies")


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_message_in_pickle_is_refused_unread(
    celery_setup: CeleryTestSetup, deployment: Deployment, new_chain: Callable[..., Chain], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    kwargs = {"chain_ids": [_Touch(made)]}
    celery_setup.app.send_task(EXECUTE, kwargs=kwargs, queue="dispatcher.requests", serializer="pickle")
    celery_setup.worker.assert_log_exists("Refusing to deserialize untrusted content of type pickle", timeout=45)
    chain = new_chain("single")
    chain.enqueue()
    deployment.wait_for_state(chain, "first_sent")
    assert not made.exists()
