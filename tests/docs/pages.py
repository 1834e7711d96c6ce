"""The pages of the documentation as values: their blocks, hints, headings and links, read by a CommonMark parser."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_COMMENT: Final = re.compile(r"<!--(.*?)-->", re.DOTALL)
_HINT: Final = "docs-test:"
_HIDDEN: Final = "invisible-code-block: python"
_PARSER: Final = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text without the fence, and the line of the file on which the text begins."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Hint:
    """What a comment `<!-- docs-test: ... -->` tells the test; readers do not see it."""

    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Hidden:
    """Python in a comment `<!-- invisible-code-block: python ... -->`: what a reader has in the own application."""

    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Link:
    """A link or image and the line of the paragraph or cell in which it is."""

    target: str
    line: int


def page_name(path: Path) -> str:
    """The path as it is written in the repository, such as `docs/tutorial.md`."""
    return path.relative_to(ROOT).as_posix()


def parts_of(text: str) -> list[Block | Hint | Hidden]:
    """The blocks and hints of a page, in reading order."""
    return [part for token in _PARSER.parse(text) for part in _parts(token)]


def links_of(text: str) -> list[Link]:
    """Every link and image of a page, in reading order."""
    return [
        Link(str(child.attrs["href" if child.type == "link_open" else "src"]), _line(token))
        for token in _PARSER.parse(text)
        for child in token.children or ()
        if child.type in ("link_open", "image")
    ]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page: `#text-of-the-heading`, then `-1`, `-2` for the same text.

    (github/html-pipeline, toc_filter: lower case, everything that is no word character, space or hyphen removed.)
    """
    anchors: dict[str, int] = {}
    tokens = _PARSER.parse(text)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            plain = "".join(child.content for child in inline.children or ())
            anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            anchors[anchor] = anchors.get(anchor, -1) + 1
            if anchors[anchor]:
                anchors[f"{anchor}-{anchors[anchor]}"] = 0
    return set(anchors)


def code_of(text: str) -> list[str]:
    """The text of every code span, and of every block, of a page."""
    tokens = _PARSER.parse(text)
    spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    return spans + [token.content for token in tokens if token.type == "fence"]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of every table of a page, as they are written."""
    rows: list[list[str]] = []
    for token in _PARSER.parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 1:
            rows[-1].append(token.content)
    return rows


def _parts(token: Token) -> Iterator[Block | Hint | Hidden]:
    if token.type == "fence":
        yield Block(token.info.strip(), token.content, _line(token) + 1)
    elif token.type == "code_block":
        yield Block("", token.content, _line(token))
    elif token.type == "html_block":
        for comment in _COMMENT.findall(token.content):
            stripped = comment.strip()
            if stripped.startswith(_HINT):
                yield Hint(stripped.removeprefix(_HINT).strip(), _line(token))
            elif stripped.startswith(_HIDDEN):
                code = comment.split(_HIDDEN, 1)[1].removeprefix("\n")
                yield Hidden(code, _line(token) + 1)


def _line(token: Token) -> int:
    return (token.map[0] if token.map else 0) + 1
