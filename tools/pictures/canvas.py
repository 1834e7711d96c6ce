"""A sheet for boxes, arrows and text that refuses what a reader could not read.

Texts must fit into their boxes and must not overlap; no line may pass through a box or a text. Widths are estimates on
the safe side, because every browser has its own fonts.
"""

from dataclasses import dataclass, field
from html import escape
from itertools import combinations, pairwise
from typing import Final, TypeAlias

INK: Final = "#1f2933"
SOFT: Final = "#52606d"
LINE: Final = "#7b8794"
ACCENT: Final = "#1c64a8"
SHEET: Final = "#ffffff"
SANS: Final = "ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"
MONO: Final = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

_HEAD: Final = 9
_EM_SANS: Final = 0.53
_EM_BOLD: Final = 0.58
_EM_MONO: Final = 0.61

Point: TypeAlias = tuple[float, float]


class UnreadableError(ValueError):
    """The picture would have overlapping parts; the text says which."""


@dataclass(frozen=True, slots=True)
class Area:
    """A rectangle that something takes on the sheet, with a name for messages."""

    left: float
    top: float
    right: float
    bottom: float
    name: str

    def overlaps(self, other: "Area", slack: float = 0.5) -> bool:
        """Whether the two share more than an edge, or more than `slack`."""
        return (
            self.left < other.right - slack
            and other.left < self.right - slack
            and self.top < other.bottom - slack
            and other.top < self.bottom - slack
        )

    def contains(self, other: "Area") -> bool:
        """Whether the other lies inside this one."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@dataclass(slots=True)
class Canvas:
    """A light sheet with round corners, so that it reads the same on a white and on a dark page."""

    width: int
    height: int
    title: str
    _parts: list[str] = field(default_factory=list)
    _boxes: list[Area] = field(default_factory=list)
    _texts: list[tuple[Area, Area]] = field(default_factory=list)  # with the box that each stands in
    _lines: list[Area] = field(default_factory=list)

    def panel(self, left: float, top: float, width: float, height: float, *, fill: str, radius: float = 0) -> None:
        """A coloured ground behind other things; it is in nobody's way."""
        self._parts.append(_rectangle(left, top, width, height, fill=fill, stroke="none", radius=radius))

    def box(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        *,
        fill: str,
        stroke: str = LINE,
        radius: float = 6,
        name: str = "box",
    ) -> Area:
        """A box that no line may pass through."""
        area = Area(left, top, left + width, top + height, name)
        self._boxes.append(area)
        self._parts.append(_rectangle(left, top, width, height, fill=fill, stroke=stroke, radius=radius))
        return area

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
        fill: str = INK,
        within: Area | None = None,
    ) -> None:
        """One line of text with its baseline at `y`; `within` is the box that it must fit into."""
        width = size * len(words) * (_EM_MONO if mono else _EM_BOLD if bold else _EM_SANS)
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        area = Area(left, y - size * 0.78, left + width, y + size * 0.22, repr(words))
        bounds = within or Area(0, 0, self.width, self.height, "the sheet")
        if area.left < bounds.left + 3 or area.right > bounds.right - 3:
            raise UnreadableError(f"{area.name} does not fit into {bounds.name}")
        self._texts.append((area, bounds))
        style = f' font-family="{MONO}"' if mono else ""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{style}{weight}>'
            f"{escape(words)}</text>"
        )

    def line(self, points: list[Point], *, colour: str = LINE, width: float = 1.6, head: bool = True) -> None:
        """A line along these points, each step straight up, down or to a side; with an arrow's head at its end."""
        for (x1, y1), (x2, y2) in pairwise(points):
            area = Area(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1, f"a line at {x1:g},{y1:g}")
            self._lines.append(area)
        (x1, y1), (x2, y2) = points[-2:]
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        shaft = [*points[:-1], (x2 - dx * (_HEAD - 1), y2 - dy * (_HEAD - 1))] if head else points
        path = " ".join(f"{x:g},{y:g}" for x, y in shaft)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')
        if head:
            base, half = (x2 - dx * _HEAD, y2 - dy * _HEAD), _HEAD / 2
            corners = [(x2, y2), (base[0] + dy * half, base[1] + dx * half), (base[0] - dy * half, base[1] - dx * half)]
            self._parts.append(
                f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in corners)}" fill="{colour}"/>',
            )

    def dot(self, x: float, y: float, *, colour: str, radius: float = 4) -> None:
        """A dot; on a crossing it joins the two lines."""
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>')

    def badge(self, x: float, y: float, number: int, *, within: Area | None = None) -> None:
        """A number in a disc; its middle is at `x`, `y`."""
        self.dot(x, y, colour=INK, radius=9)
        self.text(x, y + 4, str(number), size=11, anchor="middle", bold=True, fill=SHEET, within=within)

    def svg(self) -> str:
        """The picture. Raises `UnreadableError` when parts of it overlap."""
        texts = [text for text, _ in self._texts]
        problems = [(one, other) for one, other in combinations(texts, 2) if one.overlaps(other)]
        problems += [
            (text, box)
            for text, bounds in self._texts
            for box in self._boxes
            if text.overlaps(box) and not box.contains(bounds)
        ]
        problems += [(line, box) for line in self._lines for box in self._boxes if line.overlaps(box, slack=2)]
        problems += [(line, text) for line in self._lines for text in texts if line.overlaps(text)]
        if problems:
            raise UnreadableError("; ".join(f"{one.name} meets {other.name}" for one, other in problems))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="{SANS}" role="img">\n<title>{escape(self.title)}</title>\n'
            + _rectangle(0.5, 0.5, self.width - 1, self.height - 1, fill=SHEET, stroke="#cbd2d9", radius=10)
            + "\n"
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )


def _rectangle(left: float, top: float, width: float, height: float, *, fill: str, stroke: str, radius: float) -> str:
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )
