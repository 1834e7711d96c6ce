"""The picture of the rooms: a staircase from the faces down to the words, with a dot for every import of today."""

from typing import Final

from tools.pictures.canvas import ACCENT, INK, LINE, SOFT, Canvas
from tools.pictures.house import Room, imports, rooms
from tools.pictures.main_path import rooms_on_the_way

_WIDTH: Final = 960
_TOP: Final = 22
_ROW: Final = 36
_STEP: Final = 40
_FIRST_RIGHT: Final = 188
_RAIL: Final = 16  # from a box's right edge to the line that comes down to it
_BOX_HEIGHT: Final = 24
_SIZE: Final = 13
_BANDS: Final = ("#f5f7fa", "#e9eef4")
_ON_THE_WAY: Final = "#dbeafb"
_LEGEND: Final = (
    ("A dot: the room at the left end of the line", INK),
    ("imports the room at its lower end.", None),
    ("Blue: the main path passes through both.", ACCENT),
    ("A crossing without a dot is no import.", None),
    ("Imports go down only, and never to a", None),
    ("neighbour in the same layer (shade).", None),
)


def picture() -> str:
    """The picture as SVG."""
    steps = _steps()
    height = _TOP + _ROW * len(steps) + 12
    canvas = Canvas(_WIDTH, height, "The rooms of the library, from the faces down to the words, and their imports")
    for row, step in enumerate(steps):
        canvas.panel(6, _TOP + row * _ROW, _WIDTH - 12, _ROW, fill=_BANDS[step[0].layer % 2])
    way = rooms_on_the_way()
    rows = {room.name: row for row, step in enumerate(steps) for room in step}
    joints = {(row, rows[name]) for row, step in enumerate(steps) for room in step for name in _targets(room, rows)}
    joints = {(row, column) for row, column in joints if row != column}
    on_way = {row for row, step in enumerate(steps) if any(room.name in way for room in step)}
    for row in range(len(steps)):
        columns = [column for importer, column in joints if importer == row]
        if columns:
            y = _middle(row)
            canvas.line([(_right(row), y), (_right(max(columns)) - _RAIL, y)], head=False, width=1.2)
    for column in range(len(steps)):
        importers = [row for row, target in joints if target == column]
        if importers:
            x = _right(column) - _RAIL
            bottom = _middle(column) - _BOX_HEIGHT / 2
            canvas.line([(x, _middle(min(importers))), (x, bottom)], width=1.2)
    for row, column in sorted(joints):
        both = row in on_way and column in on_way
        canvas.dot(_right(column) - _RAIL, _middle(row), colour=ACCENT if both else INK)
    for row, step in enumerate(steps):
        _draw_step(canvas, row, step, on_way=row in on_way)
    _draw_groups(canvas, steps)
    for number, (words, colour) in enumerate(_LEGEND):
        y = _middle(len(steps) - len(_LEGEND) - 3) + number * 21
        if colour:
            canvas.dot(168, y - 4.5, colour=colour)
        canvas.text(180, y, words, size=_SIZE, fill=SOFT)
    return canvas.svg()


def _steps() -> list[list[Room]]:
    """The rooms of each step. Folders have steps of their own; the words of one layer share one."""
    steps: list[list[Room]] = []
    for room in rooms():
        if room.name == "__main__":
            continue  # the same face as `cli`
        together = steps and room.group == "words" and steps[-1][0].layer == room.layer
        if together:
            steps[-1].append(room)
        else:
            steps.append([room])
    return steps


def _targets(room: Room, rows: dict[str, int]) -> set[str]:
    return {name for name in imports().get(room.name, ()) if name in rows}


def _right(row: int) -> float:
    return _FIRST_RIGHT + row * _STEP


def _middle(row: int) -> float:
    return _TOP + row * _ROW + _ROW / 2


def _draw_step(canvas: Canvas, row: int, step: list[Room], *, on_way: bool) -> None:
    words = ", ".join(room.name + ("/" if room.is_folder else ".py") for room in step)
    width = len(words) * _SIZE * 0.61 + 16
    fill, stroke = (_ON_THE_WAY, ACCENT) if on_way else ("#ffffff", LINE)
    top = _middle(row) - _BOX_HEIGHT / 2
    box = canvas.box(_right(row) - width, top, width, _BOX_HEIGHT, fill=fill, stroke=stroke, radius=4, name=words)
    canvas.text(_right(row) - width / 2, top + 16.5, words, size=_SIZE, anchor="middle", mono=True, within=box)


def _draw_groups(canvas: Canvas, steps: list[list[Room]]) -> None:
    """The name of each group, beside its first step."""
    named: set[str] = set()
    for row, (first, *_) in enumerate(steps):
        if first.group not in named:
            canvas.text(16, _middle(row) + 4.5, first.group, size=_SIZE, bold=True, fill=SOFT)
            named.add(first.group)
