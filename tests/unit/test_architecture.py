"""The architecture page and its pictures say what today's code is."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from sqlalchemy import Table

from dispatcher.domain.config import ChainType
from dispatcher.messages import queues
from dispatcher.settings import Settings
from dispatcher.states import AttemptOutcome, DeliveryStatus, EventAction, Outcome
from dispatcher.storage.models import Base
from tools.pictures import canvas, main_path
from tools.pictures.files import BEGIN, END, PAGE, made, with_table
from tools.pictures.house import GROUPS, ROOT, Room, layers, rooms

FOLDERS = sorted(path.parent for path in (ROOT / "dispatcher").glob("*/__init__.py"))
SOURCES = [path for folder in ("dispatcher", "workers") for path in sorted((ROOT / folder).rglob("*.py"))]
TEXT = PAGE.read_text()

# What is not this project's own, and what stands for a name of the reader's: commands, Celery's and Python's words.
FOREIGN = {"CI", "dispatcher dev", "lint-imports", "make pictures", "self.now", "verify()", "./.dispatcher/"}


@cache
def definitions() -> frozenset[str]:
    """The dotted names of all modules, classes, functions, methods and class attributes of the code."""
    found: set[str] = set()

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    found.add(f"{prefix}.{name}")
                    if isinstance(node, ast.ClassDef):
                        look(node.body, f"{prefix}.{name}")
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                    found.add(f"{prefix}.{name}")

    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.add(module)
        look(ast.parse(path.read_text()).body, module)
    return frozenset(found)


@cache
def ends_of_definitions() -> frozenset[str]:
    """Every way to write a definition short: `a.b.c`, `b.c`, `c`."""
    return frozenset(
        ".".join(parts[start:]) for parts in (name.split(".") for name in definitions()) for start in range(len(parts))
    )


@cache
def words() -> frozenset[str]:
    """Words that the code gives to its users: tasks, queues, columns, settings, options, statuses, outcomes."""
    tables: list[Table] = list(Base.metadata.tables.values())
    return frozenset(
        [
            *(value for value in vars(queues).values() if isinstance(value, str)),
            *(column.name for one in tables for column in one.columns),
            *(f"DISPATCHER_{name.upper()}" for name in Settings.model_fields),
            *(name.rstrip("_") for name in ChainType.__dataclass_fields__),
            *(str(member) for kind in (DeliveryStatus, EventAction, Outcome, AttemptOutcome) for member in kind),
        ]
    )


def exists(span: str) -> bool:
    """Whether a code span of the page names something: a file or folder, a definition, or a word of the code."""
    if span in FOREIGN or span in words() or span.removesuffix("()") in ends_of_definitions():
        return True
    if "/" in span or re.fullmatch(r"\.?[\w.]+\.(py|md|toml|example)", span):
        return (ROOT / span).exists() or any(path.match(span) for path in SOURCES)
    return False


def missing_of(text: str) -> list[str]:
    """The code spans of a text that name nothing; one that begins with a dot goes on from the span before it."""
    missing, before = [], ""
    for span in re.findall(r"`([^`\n]+)`", text):
        full = f"{before.rpartition('.')[0]}{span}" if re.fullmatch(r"\.\w+", span) else span
        if not exists(full):
            missing.append(full)
        before = full
    return missing


def of_each_folder() -> pytest.MarkDecorator:
    """A test for every folder."""
    return pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def docstring(folder: Path) -> str:
    """What a folder says about itself."""
    return Room(folder.name, 0, folder / "__init__.py").docstring


class TestWhatIsMade:
    @pytest.mark.parametrize("path", [ROOT / "docs/images/data-flow.svg", ROOT / "docs/images/rooms.svg", PAGE])
    def test_is_committed_as_today_s_code_makes_it(self, path):
        assert path.read_text() == made()[path], "run `make pictures`"

    def test_needs_its_place_on_the_page(self):
        with pytest.raises(ValueError, match="no place"):
            with_table(TEXT.replace(END, ""))


class TestThePage:
    def test_names_only_what_exists(self):
        before, _, rest = TEXT.partition(BEGIN)
        assert missing_of(before + rest.partition(END)[2]) == []

    def test_lists_the_five_files_of_the_picture_in_its_order(self):
        listed = re.findall(r"^\d\. \[`([^`]+)`\]", TEXT, re.MULTILINE)
        assert listed == [str(Path(module.__file__).relative_to(ROOT)) for module in main_path.FILES]

    def test_gives_the_settings_their_defaults(self):
        given = re.findall(r"`DISPATCHER_(\w+)` \((\d+)\)", TEXT)
        assert (
            given
            and [
                (name, number) for name, number in given if Settings.model_fields[name.lower()].default != float(number)
            ]
            == []
        )

    def test_says_how_often_the_relay_runs(self):
        assert f"every {Settings.model_fields['relay_seconds'].default} seconds" in TEXT


class TestEveryRoom:
    @of_each_folder()
    def test_says_in_two_to_four_sentences_what_lives_there(self, folder):
        assert 2 <= len(re.findall(r"[.!?](?=\s|$)", docstring(folder))) <= 4

    @of_each_folder()
    def test_names_only_what_exists(self, folder):
        assert missing_of(docstring(folder)) == []

    @of_each_folder()
    def test_has_its_layer(self, folder):
        assert folder.name in [name for layer in layers() for name in layer]

    def test_is_in_one_group_that_says_what_its_layer_is_for(self):
        names = [name for group in GROUPS.values() for name in group]
        assert sorted(names) == sorted(set(names))
        assert {room.name for room in rooms()} <= set(names)


class TestTheCanvas:
    def sheet(self) -> canvas.Canvas:
        return canvas.Canvas(200, 100, "a sheet")

    def test_draws_what_can_be_read(self):
        sheet = self.sheet()
        box = sheet.box(10, 10, 80, 30, fill="#fff")
        sheet.text(20, 30, "a < b", within=box)
        sheet.line([(90, 25), (150, 25), (150, 80)])
        assert "a &lt; b" in sheet.svg()

    def test_refuses_a_text_that_is_wider_than_its_box(self):
        sheet = self.sheet()
        with pytest.raises(canvas.UnreadableError, match="does not fit"):
            sheet.text(10, 30, "a long sentence", within=sheet.box(10, 10, 30, 30, fill="#fff"))

    def test_refuses_texts_on_each_other(self):
        sheet = self.sheet()
        sheet.text(10, 30, "one")
        sheet.text(14, 32, "two")
        with pytest.raises(canvas.UnreadableError, match="'one' meets 'two'"):
            sheet.svg()

    def test_refuses_a_text_on_a_box_that_it_does_not_belong_to(self):
        sheet = self.sheet()
        sheet.box(10, 10, 80, 30, fill="#fff", name="the box")
        sheet.text(70, 30, "words")
        with pytest.raises(canvas.UnreadableError, match="'words' meets the box"):
            sheet.svg()

    def test_refuses_a_line_through_a_box(self):
        sheet = self.sheet()
        sheet.box(60, 10, 80, 30, fill="#fff", name="the box")
        sheet.line([(10, 25), (190, 25)])
        with pytest.raises(canvas.UnreadableError, match="meets the box"):
            sheet.svg()

    def test_refuses_a_line_through_a_text(self):
        sheet = self.sheet()
        sheet.text(60, 30, "words")
        sheet.line([(10, 27), (190, 27)])
        with pytest.raises(canvas.UnreadableError, match="meets 'words'"):
            sheet.svg()
