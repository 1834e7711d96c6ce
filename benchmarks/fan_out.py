"""One process that publishes an execution for each due chain, by a sweep or by a loop, and prints its cost as JSON."""

import json
import re
import time
from pathlib import Path

import click
from celery import Celery

from benchmarks import chains
from dispatcher import Dispatcher, Settings
from dispatcher.messages.queues import CHAINS_QUEUE, EXECUTE, celery_settings

_STATUS = Path("/proc/self/status")


def _memory_mb(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@click.command()
@click.option("--what", type=click.Choice(["sweep", "loop"]), required=True)
@click.option("--database-url", required=True)
@click.option("--redis-url", required=True)
@click.option("--count", type=int, required=True)
def main(what: str, database_url: str, redis_url: str, count: int) -> None:
    """Publish `count` messages, and print the seconds and the growth of resident memory."""
    # Room for all due chains, because a sweep stops when its queue is full.
    settings = Settings(database_url=database_url, redis_url=redis_url, max_backlog=2 * count)
    app = Celery("fan-out", set_as_current=False)
    app.conf.update(celery_settings(settings, broker_url=redis_url))
    dispatcher = Dispatcher(chains.config("still"), settings=settings, celery_app=app)
    execute = app.signature(EXECUTE)
    # Open the connections and fill the caches of both ways before the measurement.
    dispatcher.check()
    execute.apply_async(kwargs={"chain_ids": [0]}, queue="warm-up")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM)
    before, began = _memory_mb("VmRSS"), time.monotonic()
    if what == "sweep":
        result = dispatcher.sweep()
        assert result["enqueued"] == count, result
    else:
        for chain_id in range(count):
            execute.apply_async(kwargs={"chain_ids": [chain_id]}, queue=CHAINS_QUEUE)
    seconds = time.monotonic() - began
    click.echo(json.dumps({"seconds": seconds, "growth_mb": _memory_mb("VmHWM") - before}))
    dispatcher.close()


if __name__ == "__main__":
    main()
