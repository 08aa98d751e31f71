"""The example runs as its users run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2_train.py"


@pytest.mark.slow
def test_it_resumes_on_another_number_of_ranks_and_stays_with_a_single_process(
    tmp_path: Path,
) -> None:
    for ranks, steps, before in ((3, 10, 0), (2, 15, 10)):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        arguments = ["--steps", str(steps), "--checkpoint", str(tmp_path / "run")]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(EXAMPLE), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found = re.search(r"(\d+) steps after (\d+); losses at most (\S+) apart", done.stdout)
        assert found is not None, done.stdout
        assert (int(found[1]), int(found[2])) == (steps - before, before)
        # Float32 sums in another order, 15 steps; a sum over one rank only is 1e-2 off.
        assert float(found[3]) < 2e-6
