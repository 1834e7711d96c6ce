"""The Python in which the blocks of one page run: reads them as JSON lines, answers each with what it printed.

Started as a program, in the page's directory: `python session.py`.
"""

import ast
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any


def wait_until(condition: Callable[[], Any], seconds: float = 45) -> None:
    """For hidden blocks: return as soon as `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.02)


def run(text: str, page: str, line: int, namespace: dict[str, Any]) -> None:
    """Run a block. The values that it only shows, such as a dict, are then in the list `page_values`."""
    tree = ast.parse("\n" * (line - 1) + text, page)
    for statement in tree.body:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), page, "eval"), namespace)  # noqa: S307 - as exec
            namespace["page_values"].append(value)
        else:
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)  # noqa: S102 - running it is the point


def main() -> None:
    # As a program of the reader's would: modules come from the directory in which it is.
    sys.path[0] = str(Path.cwd())
    namespace: dict[str, Any] = {"__name__": "__page__", "wait_until": wait_until, "page_values": []}
    answers = sys.stdout
    for line in sys.stdin:
        block = json.loads(line)
        output = StringIO()
        handler = logging.StreamHandler(output)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.getLogger().handlers[:] = [handler]
        error = None
        with redirect_stdout(output), redirect_stderr(output):
            try:
                run(block["code"], block["page"], block["line"], namespace)
            except BaseException:  # noqa: BLE001 - told to the test
                error = traceback.format_exc()
        print(json.dumps({"output": output.getvalue(), "error": error}), file=answers, flush=True)


main()
