"""Real workers and beats under faults, judged by the oracle.

`make slow` runs random combinations: one seed is always the same; without CI one is new each time. SLOW_SCALE makes
them smaller. `make chaos` sets CHAOS_MATRIX and runs every fault alone and more combinations. CHAOS_CHAINS, CHAOS_SEED,
CHAOS_SECONDS (how long the faults last at least), CHAOS_COMBINATIONS (how many) and CHAOS_RESULTS (a file for the
numbers) change what it does. A failure prints the command that does the same run again.

These tests need the machine for themselves, because the oracle holds the deployment to seconds.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.driver import Run, perform
from tests.chaos.faults import FAULTS, combination
from tests.chaos.oracle import Report
from tests.conftest import missing, scaled
from tests.servers import MissingBinaryError

MATRIX: Final = bool(os.environ.get("CHAOS_MATRIX"))
CHAINS: Final = int(os.environ.get("CHAOS_CHAINS") or (2000 if MATRIX else scaled(1500, least=100)))
SECONDS: Final = float(os.environ.get("CHAOS_SECONDS") or (30 if MATRIX else scaled(30, least=10)))
SEED: Final = int(os.environ.get("CHAOS_SEED") or 1)
COMBINATIONS: Final = int(os.environ.get("CHAOS_COMBINATIONS") or 6)
RESULTS: Final = Path(os.environ["CHAOS_RESULTS"]).absolute() if os.environ.get("CHAOS_RESULTS") else None
FIXED_SEED: Final = 3

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]


def check(run: Run) -> Report:
    """Do the run; its report. Fails with the seed, the command and what the oracle found."""
    said: list[str] = []
    try:
        outcome = perform(run, say=said.append)
    except MissingBinaryError as error:
        missing(str(error))
    if RESULTS is not None:
        with RESULTS.open("a") as file:
            file.write(json.dumps(outcome.to_json()) + "\n")
    violations = outcome.report.violations
    found = "\n".join([*map(str, violations[:20]), *said])
    assert not violations, f"seed {run.seed}: {len(violations)} violations; again: {run.command}\n{found}"
    assert not outcome.exits, f"seed {run.seed}: workers ended by themselves; again: {run.command}\n{outcome.exits}"
    return outcome.report


if MATRIX:

    @pytest.mark.parametrize("name", FAULTS)
    def test_a_fault_alone_loses_and_doubles_nothing(name: str) -> None:
        if name in ("clock_skew", "clock_steps") and shutil.which("cc") is None:
            pytest.skip("no C compiler: clocks cannot be shifted")
        assert check(Run([name], SEED, CHAINS, SECONDS)).chains == CHAINS

    @pytest.mark.parametrize("number", range(COMBINATIONS))
    def test_many_faults_at_once_lose_and_double_nothing(number: int) -> None:
        seed = SEED * 1000 + number
        assert check(Run(combination(seed), seed, CHAINS, SECONDS)).chains == CHAINS

else:
    # Dice are for people: where a build is at stake, each run is the same.
    SEEDS: Final = [FIXED_SEED] if os.environ.get("CI") else [FIXED_SEED, pytest.param(None, id="new")]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_random_combination_of_faults_loses_and_doubles_nothing(seed: int | None) -> None:
        seed = seed if seed is not None else random.SystemRandom().randrange(10**6)
        report = check(Run(combination(seed), seed, CHAINS, SECONDS))
        assert report.chains == CHAINS
        assert report.moves > 0 and report.callbacks > 0
