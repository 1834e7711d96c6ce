"""`python -m examples.win_back`, from the root of the repository."""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn

from rich.console import Console

from dispatcher.errors import DispatcherError
from examples.win_back.run import run
from examples.win_back.walk import DayNotQuiet

DEFAULT_CUSTOMERS: Final = 500
_LOG_LINES: Final = 20
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if everything happened as expected, 1 if not, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parse(arguments)
    console = Console(soft_wrap=True)
    for number in _STOPPING:
        signal.signal(number, _interrupt)
    try:
        with _directory(keep=options.keep, console=console) as directory:
            return _run(options, directory, console)
    except KeyboardInterrupt:
        print("interrupted: all processes are stopped", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, directory: Path, console: Console) -> int:
    try:
        good = run(customers=options.customers, directory=directory, day_seconds=options.day_seconds, console=console)
    except (DayNotQuiet, DispatcherError) as error:
        print(error, *_last_lines(directory / "worker.log"), sep="\n", file=sys.stderr)
        return 1
    return 0 if good else 1


def _last_lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    return [f"the end of {log}:", *log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.win_back", description="The win-back example.")
    parser.add_argument(
        "--customers",
        type=_count,
        default=DEFAULT_CUSTOMERS,
        metavar="N",
        help="how many of the 2357 customers to follow (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the database, the sink and the logs")
    parser.add_argument(
        "--day-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="give up when a simulated day takes longer (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


@contextlib.contextmanager
def _directory(*, keep: bool, console: Console) -> Iterator[Path]:
    if not keep:
        with tempfile.TemporaryDirectory(prefix="win-back-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    directory = Path(tempfile.mkdtemp(prefix="win-back-"))
    console.print(f"database, sink and logs are kept in {directory}", highlight=False)
    yield directory


def _interrupt(number: int, frame: object) -> NoReturn:
    for stopping in _STOPPING:  # a second signal must not interrupt the stopping, which has time limits
        signal.signal(stopping, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
