"""The benchmark runs: what it measures is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.nodes import ROOT

pytestmark = pytest.mark.acceptance


def test_a_quick_case_of_the_benchmark_gives_a_ratio(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--cases", "no-move", "--json", str(found)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole = json.loads(found.read_text())
    assert not whole["failures"]
    (line,) = whole["cases"]
    assert line["ratio"]["middle"] > 0
    assert line["title"] in done.stdout
