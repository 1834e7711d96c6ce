"""Every block of Python and shell of every page, run in reading order; what the pages show as output, compared."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Block, page_name, parts_of
from tests.docs.reader import FILE, Reader
from tests.servers import MariaDbServer, PostgresServer, RedisServer

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]  # a page is a sequence of commands and processes


@pytest.fixture
def services(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """The URL of an empty database or Redis of the run's own, always the same for one kind of URL."""
    made: dict[str, str] = {}

    def private(shown: str) -> str:
        kind = shown.partition("://")[0]
        if "127.0.0.1" in shown or kind == "amqp":
            return shown
        if kind not in made:
            if kind == "redis":
                server: RedisServer = request.getfixturevalue("redis_server")
                server.clear()
                made[kind] = server.url
            elif kind == "postgresql":
                postgres: PostgresServer = request.getfixturevalue("postgres_server")
                made[kind] = postgres.create_database().replace("+psycopg", "")
            else:
                mariadb: MariaDbServer = request.getfixturevalue("mariadb_server")
                made[kind] = mariadb.create_database().replace("mariadb+pymysql", kind)
        return made[kind]

    return private


def shown_files(page: str) -> dict[str, str]:
    """The Python files that a page shows, by name."""
    blocks = [part for part in parts_of((ROOT / page).read_text()) if isinstance(part, Block)]
    found = [(FILE.match(block.text), block.text) for block in blocks if block.language == "python"]
    return {match[1]: text for match, text in found if match is not None}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_a_page_does_what_it_says(path: Path, tmp_path: Path, services: Callable[[str], str]) -> None:
    directory = tmp_path / "page"
    directory.mkdir()
    reader = Reader(page_name(path), path.read_text(), directory, services=services, files=shown_files)
    reader.read()
    print(page_name(path), dict(reader.count))  # noqa: T201 - shown by -rP


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_hint_is_overlooked(path: Path) -> None:
    """A comment within a paragraph is no block of its own, and would do nothing."""
    text = path.read_text()
    found = [part for part in parts_of(text) if not isinstance(part, Block)]
    assert len(found) == text.count("docs-test:") + text.count("invisible-code-block:")
