"""What the native library does to its process: whose threads it takes, and how many of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from fused_adafactor.backends import cpp

# Tensors of many slabs, so that every thread of the pool finds one to take.
STEP_AND_REPORT = """
import json, os, sys
import torch
from fused_adafactor.dialects.hf import Adafactor

torch.set_num_threads(1)  # so that making tensors starts no threads


def tasks():
    return len(os.listdir("/proc/self/task"))


params = [torch.nn.Parameter(torch.ones(2000, 1000)) for _ in range(2)]
optimizer = Adafactor(params, backend="cpp")
for p in params:
    p.grad = torch.ones_like(p)
torch.set_num_threads(int(sys.argv[1]))
if sys.argv[2] == "torch first":
    torch.ones(4_000_000).sqrt()  # torch's pool, started by torch
before = tasks()
for _ in range(3):
    optimizer.step()
with open("/proc/self/maps") as maps:
    paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
print(json.dumps({
    "before": before,
    "after": tasks(),
    "pools": sorted(p for p in paths if "omp" in os.path.basename(p) and "torch_" not in p),
    "ours": sorted(p for p in paths if "fused_adafactor" in os.path.basename(p)),
}))
"""

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def report(threads: int, order: str) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", STEP_AND_REPORT, str(threads), order],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@needs_proc
def test_the_pool_is_torchs_and_the_only_one() -> None:
    """A second OpenMP runtime would bring threads of its own, which fight with torch's."""
    found = report(3, "torch first")
    assert len(found["ours"]) == 1
    assert len(found["pools"]) == 1, found["pools"]
    assert found["after"] == found["before"]  # not one thread more than torch had


@needs_proc
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_torch_says_how_many_threads_there_are(threads: int) -> None:
    found = report(threads, "native code first")
    assert found["after"] == found["before"] + threads - 1


def test_the_library_is_built_where_there_is_a_compiler() -> None:
    """Else a build that fails would only be seen as tests that are skipped."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    assert cpp.missing() is None
