"""Every link within the repository leads to a file that exists, and to a heading of it."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors_of, code_of, links_of, page_name

_OTHER_PAGES = tuple(sorted((ROOT / "examples").rglob("*.md")))
_PATH = re.compile(r"(?:tests|docs|examples|benchmarks)/[\w./-]*\w")


def broken_links(path: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere, with their lines. Links to other hosts are not followed."""
    broken = []
    for link in links_of(text):
        if re.match(r"https?://", link.target):
            continue
        file, _, anchor = link.target.partition("#")
        target = (path.parent / file).resolve() if file else path
        is_there = target.is_dir() if file.endswith("/") else target.is_file()
        if not is_there:
            broken.append(f"{page_name(path)}:{link.line}: no such file: {link.target}")
        elif anchor and anchor not in anchors_of(text if target == path else target.read_text()):
            broken.append(f"{page_name(path)}:{link.line}: no such heading: {link.target}")
    return broken


@pytest.mark.parametrize("path", [*PAGES, *_OTHER_PAGES], ids=page_name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text()) == []


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    named = {code for code in code_of(path.read_text()) if _PATH.fullmatch(code)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_page_is_linked_from_the_overview() -> None:
    overview = ROOT / "docs" / "README.md"
    linked = {(overview.parent / link.target.partition("#")[0]).resolve() for link in links_of(overview.read_text())}
    assert {page for page in PAGES if page.is_relative_to(overview.parent)} - linked == {overview}


def test_a_broken_link_is_found() -> None:
    text = "# A `heading()`: it's one\n\n## Twice\n\n## Twice\n\n[a](#a-heading-its-one) [b](#twice-1)\n"
    assert broken_links(PAGES[0], text) == []
    wrong = f"{text}\n[c](#twice-2) ![d](docs/images/none.svg) [e](docs/tutorial.md#no-such)\n"
    assert broken_links(PAGES[0], wrong) == [
        "README.md:9: no such heading: #twice-2",
        "README.md:9: no such file: docs/images/none.svg",
        "README.md:9: no such heading: docs/tutorial.md#no-such",
    ]
