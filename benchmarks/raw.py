"""The peer raw Celery: a task that does nothing, and a task that sends a second task."""

import os
from typing import Final

from celery import Celery

from benchmarks import progress

BROKER_VARIABLE: Final = "BENCHMARK_BROKER_URL"
QUEUE: Final = "raw"


def make_app(broker_url: str | None) -> Celery:
    """An app without a result backend on this broker."""
    celery = Celery("raw", broker=broker_url)
    celery.conf.update(task_ignore_result=True, task_default_queue=QUEUE, broker_connection_retry_on_startup=True)
    return celery


app = make_app(os.environ.get(BROKER_VARIABLE))


@app.task(name="raw.nothing")
def nothing(chain_id: int) -> int:
    """Count, and return the chain id."""
    progress.tick()
    return chain_id


@app.task(name="raw.first_hop")
def first_hop(chain_id: int) -> int:
    """Send the task of the second hop."""
    nothing.apply_async(kwargs={"chain_id": chain_id})
    return chain_id


@app.task(name="raw.first_hop_of_answer")
def first_hop_of_answer(chain_id: int) -> int:
    """Send the task of the second hop for which the lane waits."""
    answer.apply_async(kwargs={"chain_id": chain_id})
    return chain_id


@app.task(name="raw.answer")
def answer(chain_id: int) -> int:
    """Tell the waiting lane that the task was called."""
    progress.answer()
    return chain_id
