"""The picture of the main path, from beat and application over queues and tasks to the tables.

Every function in it is imported here and every table and queue is looked up, so a rename breaks this module.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from dispatcher.chain import Chain
from dispatcher.coordination.locks import ChainLocks
from dispatcher.delivery import attempts
from dispatcher.delivery.attempt import make_attempt
from dispatcher.delivery.attempts import Attempts
from dispatcher.delivery.ends import Ends
from dispatcher.delivery.groups import Groups
from dispatcher.dispatcher import Dispatcher
from dispatcher.domain.contexts import evaluate_record
from dispatcher.domain.decisions import decide
from dispatcher.execution import executor
from dispatcher.execution.executor import Executor
from dispatcher.messages import queues
from dispatcher.messages.publisher import Publisher
from dispatcher.passes import sweep
from dispatcher.passes.relay import Relay
from dispatcher.passes.sweep import Sweeper
from dispatcher.settings import Settings
from dispatcher.storage import chains, overdue, store
from dispatcher.storage.models import Base
from dispatcher.storage.store import Store
from tools.pictures.canvas import ACCENT, INK, LINE, SOFT, Area, Canvas
from tools.pictures.house import room_of
from workers import tasks

Function = Callable[..., Any]

_WIDTH: Final = 1000
_HEIGHT: Final = 690
_PREFIX: Final = "chain_dispatcher_"

_SENDERS: Final = (30, 130)  # a lane: its left edge and its width
_QUEUES: Final = (196, 176)
_WORKERS: Final = (408, 284)
_TABLES: Final = (866, 108)

_GREY: Final = "#f5f7fa"
_BLUE: Final = "#dbeafb"
_AMBER: Final = "#fdf0d5"
_AMBER_LINE: Final = "#b7791f"
_USER: Final = "#e3f4e6"
_USER_LINE: Final = "#2f855a"


@dataclass(frozen=True, slots=True)
class _Task:
    """A task's box: its name, the function that does the work, and the steps in it."""

    name: str
    function: Function
    steps: tuple[str, ...]
    user_code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Boxes:
    """What the arrows lead to: senders, queues and tasks."""

    application: Area
    beat_sweeps: Area
    beat_relays: Area
    sweeps: Area
    chains: Area
    requests: Area
    callbacks: Area
    relays: Area
    sweep: Area
    execute: Area
    deliver: Area
    relay: Area


FILES: Final = (tasks, sweep, executor, attempts, store)
"""The five files to read, in order."""

_PATH: Final[tuple[Function, ...]] = (
    tasks.install,
    Dispatcher.sweep,
    Sweeper.sweep,
    Dispatcher.execute_chains,
    Executor.execute,
    ChainLocks.acquire,
    evaluate_record,
    decide,
    Publisher.deliver,
    Dispatcher.deliver,
    Attempts.deliver,
    Groups.deliver,
    make_attempt,
    Ends.record,
    Store.finish,
)
"""The functions of the main path, from beat to callback."""

_SWEEP: Final = _Task(queues.SWEEP, Sweeper.sweep, ("takes its turn, publishes due chains",))
_EXECUTE: Final = _Task(
    queues.EXECUTE,
    Executor.execute,
    ("lock, read", f"{evaluate_record.__name__}, {decide.__name__}", "write, unlock, publish"),
    "your guards",
)
_DELIVER: Final = _Task(
    queues.DELIVER,
    Attempts.deliver,
    ("begin", f"{make_attempt.__name__}: last look", "hours, rates", "finish and move"),
    "your callback",
)
_RELAY: Final = _Task(queues.RELAY, Relay.relay, ("finds lost messages and dead workers",))


def rooms_on_the_way() -> frozenset[str]:
    """The rooms that the main path passes through."""
    return frozenset(room_of(function.__module__) for function in _PATH)


def picture() -> str:
    """The picture as SVG."""
    canvas = Canvas(_WIDTH, _HEIGHT, "The main path: beat and application send ids, workers read and write rows")
    _draw_lanes(canvas)
    settings = celery_settings()
    every = {name: f"every {entry['schedule']:g} s" for name, entry in settings["beat_schedule"].items()}
    routes = {name: route["queue"] for name, route in settings["task_routes"].items()}

    boxes = _Boxes(
        application=_draw_sender(canvas, 62, "application", f"{short(Chain.enqueue)}()"),
        beat_sweeps=_draw_sender(canvas, 152, "celery beat", every[queues.SWEEP]),
        beat_relays=_draw_sender(canvas, 604, "celery beat", every[queues.RELAY]),
        sweeps=_draw_queue(canvas, 160, routes[queues.SWEEP]),
        chains=_draw_queue(canvas, 284, routes[queues.EXECUTE]),
        requests=_draw_queue(canvas, 344, queues.REQUESTS_QUEUE),
        callbacks=_draw_queue(canvas, 478, routes[queues.DELIVER]),
        relays=_draw_queue(canvas, 612, routes[queues.RELAY]),
        sweep=_draw_task(canvas, 140, 74, _SWEEP),
        execute=_draw_task(canvas, 268, 120, _EXECUTE),
        deliver=_draw_task(canvas, 438, 120, _DELIVER),
        relay=_draw_task(canvas, 592, 74, _RELAY),
    )
    _draw_messages(canvas, boxes)
    _draw_rows(canvas, boxes)
    return canvas.svg()


def celery_settings() -> dict[str, Any]:
    """Celery's settings of a deployment that has set nothing."""
    return queues.celery_settings(Settings.model_construct(), broker_url=None)


def short(function: Function) -> str:
    """A function's name as its callers write it: `Sweeper.sweep`, `Store.write`."""
    qualified = function.__qualname__
    return qualified if "." in qualified else f"{function.__module__.rpartition('.')[2]}.{qualified}"


def home(function: Function) -> str:
    """The file of a function, as a path; without the folder `dispatcher/`."""
    return function.__module__.removeprefix("dispatcher.").replace(".", "/") + ".py"


def number_of(module: ModuleType) -> int:
    """Which of the five files a module is, from 1."""
    return FILES.index(module) + 1


def tables() -> list[str]:
    """The tables, without their prefix."""
    return sorted(name.removeprefix(_PREFIX) for name in Base.metadata.tables)


def _draw_lanes(canvas: Canvas) -> None:
    titles = ("who sends", "queues: ids only", f"tasks: {home(tasks.install)}", "rows: the truth")
    for (left, width), title in zip((_SENDERS, _QUEUES, _WORKERS, _TABLES), titles, strict=True):
        canvas.text(left + width / 2, 34, title, bold=True, anchor="middle", fill=SOFT)
    left, width = _TABLES
    ground = canvas.box(left - 10, 50, width + 10, _HEIGHT - 74, fill=_AMBER, stroke=_AMBER_LINE, name="the database")
    middle = left + width / 2 - 5
    canvas.text(middle, 76, "database", bold=True, anchor="middle", within=ground)
    for number, name in enumerate(tables()):
        canvas.text(middle, 106 + number * 21, name, size=12, mono=True, anchor="middle", within=ground)
    canvas.badge(_WORKERS[0] + _WORKERS[1] / 2 + 108, 29.5, number_of(tasks))


def _draw_sender(canvas: Canvas, top: float, title: str, words: str) -> Area:
    left, width = _SENDERS
    box = canvas.box(left, top, width, 50, fill=_GREY, name=title)
    canvas.text(left + width / 2, top + 21, title, bold=True, anchor="middle", within=box)
    canvas.text(left + width / 2, top + 39, words, size=12, anchor="middle", within=box)
    return box


def _draw_queue(canvas: Canvas, top: float, name: str) -> Area:
    left, width = _QUEUES
    box = canvas.box(left, top, width, 34, fill="#ffffff", radius=17, name=name)
    canvas.text(left + width / 2, top + 21.5, name, size=12, mono=True, anchor="middle", within=box)
    return box


def _draw_task(canvas: Canvas, top: float, height: float, task: _Task) -> Area:
    left, width = _WORKERS
    box = canvas.box(left, top, width, height, fill=_BLUE, stroke=ACCENT, name=task.name)
    canvas.text(left + 12, top + 21, task.name, bold=True, within=box)
    canvas.text(left + 12, top + 40, f"{home(task.function)}  {short(task.function)}", size=11, mono=True, within=box)
    for number, step in enumerate(task.steps):
        canvas.text(left + 12, top + 61 + number * 21, step, size=12, within=box)
    module = sys.modules[task.function.__module__]
    if module in FILES:
        canvas.badge(left + width - 16, top + 16, number_of(module), within=box)
    if task.user_code:
        chip = canvas.box(left + width - 116, top + 69, 104, 26, fill=_USER, stroke=_USER_LINE, name=task.user_code)
        canvas.text(left + width - 64, top + 86.5, task.user_code, size=12, bold=True, anchor="middle", within=chip)
    return box


def _draw_messages(canvas: Canvas, boxes: _Boxes) -> None:
    for source, target in (
        (boxes.beat_sweeps, boxes.sweeps),
        (boxes.sweeps, boxes.sweep),
        (boxes.chains, boxes.execute),
        (boxes.requests, boxes.execute),
        (boxes.callbacks, boxes.deliver),
        (boxes.beat_relays, boxes.relays),
        (boxes.relays, boxes.relay),
    ):
        y = (source.top + source.bottom) / 2
        canvas.line([(source.right, y), (target.left, y)], colour=ACCENT)
    for begin, y, end, words in (
        (boxes.sweep.bottom, 248, boxes.chains.top, "one id per due chain"),
        (boxes.execute.bottom, 418, boxes.callbacks.top, "id of the delivery"),
        (boxes.relay.top, 575, boxes.callbacks.bottom, "owed, not under way"),
    ):
        task_x, queue_x = _WORKERS[0] + 30, _QUEUES[0] + _QUEUES[1] / 2
        canvas.line([(task_x, begin), (task_x, y), (queue_x, y), (queue_x, end)], colour=ACCENT)
        canvas.text(queue_x + 8, y - 7, words, size=12, fill=SOFT)
    margin, sender, queue = 16, boxes.application, boxes.requests
    out, back = (sender.top + sender.bottom) / 2, (queue.top + queue.bottom) / 2
    canvas.line([(sender.left, out), (margin, out), (margin, back), (queue.left, back)], colour=ACCENT)
    canvas.text(margin + 10, back - 8, "then its message: the id", size=12, fill=SOFT)


def _draw_rows(canvas: Canvas, boxes: _Boxes) -> None:
    application = boxes.application
    y = (application.top + application.bottom) / 2
    _draw_access(canvas, application, y, Store.write_request, "chain")
    canvas.text(application.right + 12, y - 8, "first the request, in the chain's row", size=12, fill=SOFT)
    _draw_access(canvas, boxes.sweep, boxes.sweep.top + 48, chains.due_page, "chain", reads=True)
    _draw_access(canvas, boxes.execute, boxes.execute.top + 36, Store.read, "chain", reads=True)
    _draw_access(canvas, boxes.execute, boxes.execute.top + 88, Store.write, "chain", "delivery", "event")
    _draw_access(canvas, boxes.deliver, boxes.deliver.top + 36, Store.begin, "delivery")
    _draw_access(canvas, boxes.deliver, boxes.deliver.top + 88, Store.finish, "delivery", "chain", "event")
    _draw_access(canvas, boxes.relay, boxes.relay.top + 48, overdue.claim_overdue, "delivery")


def _draw_access(canvas: Canvas, box: Area, y: float, function: Function, *names: str, reads: bool = False) -> None:
    """An arrow between a box and the database: the function above it, the tables below it."""
    for name in names:
        assert name in tables(), f"there is no table {name}"
    left, right = box.right, _TABLES[0] - 10
    canvas.line([(right, y), (left, y)] if reads else [(left, y), (right, y)], colour=LINE if reads else INK)
    name = short(function)
    canvas.text(right - 8, y - 8, name, size=11, mono=True, anchor="end")
    module = sys.modules[function.__module__]
    if module in FILES:
        canvas.badge(right - 24 - 6.7 * len(name), y - 12, number_of(module))
    canvas.text(right - 8, y + 16, " + ".join(names), size=12, anchor="end", fill=SOFT)
