"""The time of a function by package. The profile is statistical, because a tracing profile exaggerates small calls."""

from collections import defaultdict
from collections.abc import Callable

from pyinstrument import Profiler
from pyinstrument.frame import Frame

_PACKAGES = ("dispatcher", "sqlalchemy", "redis", "celery", "kombu")
_DRIVER = "driver and database"
_DRIVERS = ("psycopg", "psycopg_binary", "sqlite3")
_DRIVER_CALLS = ("do_execute", "do_execute_no_params", "do_executemany", "do_commit", "do_rollback", "do_begin")
_HOTTEST = 12


def shares_of_packages(work: Callable[[], None]) -> str:
    """Lines of text: the share of the code of each package, then of the slowest functions including their calls."""
    profiler = Profiler(interval=0.0005)
    with profiler:
        work()
    session = profiler.last_session
    root = session.root_frame() if session is not None else None
    assert root is not None
    by_package: dict[str, float] = defaultdict(float)
    by_function: dict[str, float] = defaultdict(float)
    _add(root, by_package, by_function, frozenset(), "the rest")
    lines = [f"  {seconds / root.time:6.1%}  {package}" for package, seconds in _largest(by_package, 8)]
    lines += ["  functions, including their calls:"]
    lines += [f"  {seconds / root.time:6.1%}  {name}" for name, seconds in _largest(by_function, _HOTTEST)]
    return "\n".join(lines)


def _add(
    frame: Frame, by_package: dict[str, float], by_function: dict[str, float], above: frozenset[str], caller: str
) -> None:
    children = [child for child in frame.children if not child.is_synthetic]
    package = _package(frame, caller)
    by_package[package] += frame.time - sum(child.time for child in children)
    name = f"{package}: {frame.function} ({frame.file_path_short}:{frame.line_no})"
    if package == "dispatcher" and name not in above:
        by_function[name] += frame.time
    for child in children:
        _add(child, by_package, by_function, above | {name}, package)


def _package(frame: Frame, caller: str) -> str:
    path = (frame.file_path or "").replace("\\", "/")
    if path.startswith("<"):  # a built-in function counts for its caller
        return caller
    if frame.function in _DRIVER_CALLS or any(f"/{driver}/" in path for driver in _DRIVERS):
        return _DRIVER  # a driver written in C has no frames
    for package in _PACKAGES:
        if f"/{package}/" in path:
            return package
    return "the rest"


def _largest(found: dict[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(found.items(), key=lambda item: item[1], reverse=True)[:count]
