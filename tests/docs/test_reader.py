"""What the test of the pages refuses: each of these pages is wrong, and a right one passes."""

from pathlib import Path

import pytest

from tests.docs.reader import PageError, Reader, normal, split_commands, words_of


def read(text: str, directory: Path) -> Reader:
    """A reader that has read this page, in this directory, with no services and no other pages."""
    reader = Reader(
        "page.md", text, directory, services=lambda url: url, files=lambda page: {"other.py": "VALUE = 1\n"}
    )
    reader.read()
    return reader


def block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def test_a_page_runs_in_reading_order_in_one_directory(tmp_path: Path) -> None:
    page = "\n".join(
        [
            block("python", "# shop.py", "import sys", "print('cart', sys.argv[1])"),
            block("python", "# carts.py", "CARTS = {'4711': 2}"),
            block("python", "from carts import CARTS", "print(CARTS)"),
            block("text", "{'4711': 2}"),
            block("sh", "export CART=4711", "python shop.py $CART  # shown"),
            block("text", "cart 4711"),
        ]
    )
    counts = read(page, tmp_path).count
    assert counts == {"Python run": 1, "Python file imported": 1, "command run": 2, "output compared": 2}


def test_hints_and_hidden_python_are_not_blocks_of_the_page(tmp_path: Path) -> None:
    page = "\n".join(
        [
            "<!-- docs-test: continue docs/other.md -->",
            "<!-- docs-test: env DISPATCHER_PREFIX=here -->",
            "<!-- docs-test: replace NUMBER with VALUE -->",
            "<!-- invisible-code-block: python",
            "import os",
            "from other import *",
            "-->",
            "",
            block("python", "print(NUMBER, os.environ['DISPATCHER_PREFIX'])"),
            block("text", "1 here"),
            "<!-- docs-test: exit 2 -->",
            "",
            block("sh", "dispatcher check --no-such-option"),
        ]
    )
    assert read(page, tmp_path).count["hidden Python run"] == 1


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (block("console", "$ dispatcher check"), "no rule for a block of language 'console'"),
        ("    indented()\n", "no rule for a block of language ''"),
        (block("sh", "rm -r carts"), "no rule for the command"),
        (block("sh", "cat nothing"), "ended with 1"),
        (block("sh", "make coffee"), "no such target: coffee"),
        (block("sh", "pip install '/path/to/chain-dispatcher[oracle]'"), "no such extra: oracle"),
        (block("sh", "pip install dispatcher"), "the distribution is called"),
        (block("sh", "docker compose up workers"), "no such service: workers"),
        (block("sh", "docker compose run --rm workers celery --version"), "no such service: workers"),
        (block("sh", "dispatcher chains lst"), "ended with 2"),
        (block("python", "print(undefined)"), "NameError"),
        (block("python", "def fragment(:"), "SyntaxError"),
        (block("python", "# job.py", "import sys", "sys.argv"), "job.py is shown and never run"),
        (block("python", "print(1)") + block("text", "2"), "this is printed:\n1"),
        (block("text", "said by nobody"), "there is no output to compare this text with"),
        ("<!-- docs-test: skip -->\n", "unknown hint: skip"),
        ("<!-- docs-test: exit 1 -->\n", "a hint that no block follows"),
        ("<!-- docs-test: shown-only: a layout -->\n\n" + block("python", "pass"), "a hint that no block follows"),
    ],
)
def test_a_wrong_page_is_refused(page: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises((PageError, SyntaxError)) as raised:
        read(page, tmp_path)
    assert problem in f"{type(raised.value).__name__}: {raised.value}"


def test_what_differs_from_run_to_run_is_not_compared() -> None:
    shown = "[2026-11-22 16:03:23,690: INFO/ForkPoolWorker-2] key c58ced4e-64b1-522b-af7f-7273a29b0fdb   3 due 0.702"
    real = "[2027-01-02 06:13:53,1: INFO/ForkPoolWorker-1] key 01a203ff-778c-7f3d-8927-09f8249287f8  3 due 12.1"
    assert normal(shown) == normal(real)
    assert normal(shown) != normal(real.replace("3 due", "4 due"))


def test_commands_are_lines_continued_lines_and_here_documents() -> None:
    text = "cat > .env <<'END'\nA=1\nEND\n# a comment\ncelery -A workers \\\n  worker  # one\n"
    assert split_commands(text) == ["cat > .env <<'END'\nA=1\nEND", "celery -A workers worker  # one"]
    assert words_of("A=1 B=2 celery -A workers  # comment") == ["celery", "-A", "workers"]
