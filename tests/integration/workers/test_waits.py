"""Messages whose ETA a wrong clock has made."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from kombu.utils.imports import symbol_by_name

import workers
from dispatcher import Dispatcher
from dispatcher.messages.queues import CALLBACKS_QUEUE, DELIVER, MAX_COUNTDOWN

LONGEST = timedelta(seconds=MAX_COUNTDOWN)


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("waits", broker="memory://") as app:
        with Dispatcher({"chains": []}, database_url="sqlite://", celery_app=app) as dispatcher:
            workers.install(app, dispatcher)
        yield app


def received(app: Celery, **options: Any) -> Any:
    """What a worker makes of a message that was sent with these options."""
    task = app.tasks[DELIVER]
    task.apply_async(kwargs={"deliveries": []}, queue=CALLBACKS_QUEUE, **options)
    with app.connection_for_read() as connection:
        message = app.amqp.queues[CALLBACKS_QUEUE](connection.default_channel).get(no_ack=True)
        return symbol_by_name(task.Request)(message, app=app, task=task)


def test_all_our_tasks_are_received_that_way(app: Celery) -> None:
    ours = [task for name, task in app.tasks.items() if name.startswith("dispatcher.")]
    assert {task.Request for task in ours} == {"workers.waits:BoundedRequest"}


def test_a_message_without_a_wait_is_begun_at_once(app: Celery) -> None:
    assert received(app).eta is None


def test_a_wait_of_our_own_ends_when_it_should(app: Celery) -> None:
    now = datetime.now(UTC)
    eta = received(app, countdown=20).eta
    assert timedelta(seconds=20) <= eta - now < timedelta(seconds=25)


@pytest.mark.parametrize("wrong", [timedelta(days=2), timedelta(days=36_500), timedelta(seconds=62)])
def test_a_message_from_a_clock_that_was_ahead_waits_no_longer_than_the_longest_wait(
    app: Celery, wrong: timedelta
) -> None:
    request = received(app, eta=datetime.now(UTC) + wrong)
    assert request.eta - datetime.now(UTC) <= LONGEST


def test_a_message_from_a_clock_that_was_behind_is_begun_at_once(app: Celery) -> None:
    assert received(app, eta=datetime.now(UTC) - timedelta(days=2)).eta < datetime.now(UTC)
