"""The rooms of the house as the code has them: layers, docstrings, and which room imports which."""

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import grimp

ROOT: Final = Path(__file__).parents[2]

GROUPS: Final = {
    "faces": ("workers", "__main__", "cli", "web", "testing", "foresight", "contrib"),
    "façade": ("dispatcher", "chain"),
    "wiring": ("services", "addresses"),
    "doing": ("operators", "execution", "delivery", "passes", "requests"),
    "outside world": ("storage", "coordination", "messages", "embedded"),
    "deciding": ("domain", "settings"),
    "words": ("transition", "urls", "retry", "rates", "telemetry", "bounds", "errors", "states"),
}
"""What the layers are for, from the top to the ground."""


@dataclass(frozen=True, slots=True)
class Room:
    """A folder of `dispatcher/`, a module at its root, or `workers`. The top layer has number 1."""

    name: str
    layer: int
    path: Path

    @property
    def is_folder(self) -> bool:
        """Whether the room is a folder; else it is one module."""
        return self.path.name == "__init__.py"

    @property
    def label(self) -> str:
        """The room as a path below the repository's root: `dispatcher/passes/`, `dispatcher/chain.py`."""
        path = self.path.parent if self.is_folder else self.path
        return f"{path.relative_to(ROOT)}{'/' if self.is_folder else ''}"

    @property
    def group(self) -> str:
        """What its layer is for."""
        return next(group for group, names in GROUPS.items() if self.name in names)

    @property
    def docstring(self) -> str:
        """What its docstring says."""
        text = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8")))
        assert text, f"{self.label} has no docstring"
        return text


def layers() -> list[list[str]]:
    """The layers of the import-linter contract: the names in each, from the top; optional ones without parentheses."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts: list[dict[str, Any]] = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["id"] == "layers"]
    return [[name.strip(" ()") for name in layer.split("|")] for layer in contract["layers"]]


def rooms() -> list[Room]:
    """The rooms that exist, from the top to the ground, in the contract's order; `workers` stands on top."""
    return [
        Room(name, number, path)
        for number, names in enumerate([["workers"], *layers()], 1)
        for name in names
        for path in _places(name)
        if path.exists()
    ]


@cache
def imports() -> dict[str, frozenset[str]]:
    """`{room: the rooms that it imports}`; late imports and those for type checking count as well."""
    graph = grimp.build_graph("dispatcher", "workers", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"dispatcher"}:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = room_of(module), room_of(imported)
            if importer != target:
                found.setdefault(importer, set()).add(target)
    return {name: frozenset(targets) for name, targets in found.items()}


def room_of(module: str) -> str:
    """The room of a module: "passes" of "dispatcher.passes.sweep".

    The package `dispatcher` itself, which only names what users import, counts as the façade.
    """
    package, _, rest = module.partition(".")
    return package if package == "workers" else rest.partition(".")[0] or "dispatcher"


def _places(name: str) -> tuple[Path, Path]:
    """Where a room's docstring may stand: in a folder's `__init__.py`, or in a module."""
    base = ROOT / name if name == "workers" else ROOT / "dispatcher" / name
    return base / "__init__.py", base.with_suffix(".py")
