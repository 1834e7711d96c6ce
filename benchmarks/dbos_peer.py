"""One process of the DBOS peer: runs as many workflows of one step as standard input says."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import click
from dbos import DBOS, DBOSConfig


@DBOS.step()
def step(number: int) -> int:
    return number


@DBOS.workflow()
def workflow(number: int) -> int:
    return step(number)


@click.command()
@click.option("--url", required=True)
@click.option("--name", required=True)
@click.option("--threads", type=int, required=True)
def main(url: str, name: str, threads: int) -> None:
    """Print "ready". Then, for each line of standard input, run that many workflows and print the seconds."""
    config: DBOSConfig = {
        "name": "benchmark",
        "system_database_url": url,
        "executor_id": name,
        "application_version": "1",
        "sys_db_pool_size": threads + 4,
        "max_executor_threads": threads,
        "use_listen_notify": False,
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.launch()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(workflow, range(threads * 4)))
        click.echo("ready")
        sys.stdout.flush()
        for line in sys.stdin:
            began = time.monotonic()
            list(pool.map(workflow, range(int(line))))
            click.echo(f"{time.monotonic() - began}")
            sys.stdout.flush()
    DBOS.destroy()


if __name__ == "__main__":
    main()
