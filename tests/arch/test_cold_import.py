"""What `import fused_adafactor` may not do, watched in an interpreter that does nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# None of these may be needed, nor even looked for: a search that fails in try/except costs time.
OPTIONAL = (
    "jax",
    "keras",
    "matplotlib",
    "optax",
    "pytorch_optimizer",
    "timm",
    "transformers",
    "triton",
)

IMPORT_AND_REPORT = """
import json
import sys
import sysconfig
import warnings

import torch

optional = json.loads(sys.argv[2])
looked_for = []


class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            looked_for.append(name)


def shared_libraries():
    if sys.platform != "linux":
        return set()
    standard = sysconfig.get_path("platstdlib") + "/lib-dynload/"
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip() for line in maps if ".so" in line}
    return {path for path in paths if not path.startswith(standard)}


sys.meta_path.insert(0, Watch())
warnings.simplefilter("error")
libraries, modules = shared_libraries(), set(sys.modules)
import fused_adafactor

report = {
    "modules": sorted(set(sys.modules) - modules),
    "libraries": sorted(shared_libraries() - libraries),
    "libraries_of_torch": sorted(libraries),
    "looked_for": looked_for,
}
with open(sys.argv[1], "w") as file:
    json.dump(report, file)
"""

STEP = """
import json
import sys

for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # importing it now raises ImportError

import torch

from fused_adafactor import Adafactor

weight = torch.nn.Parameter(torch.ones(4, 3))
optimizer = Adafactor([weight])
weight.sum().backward()
optimizer.step()
assert (weight < 1).all()
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter, without any setting of ours in its environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_ADAFACTOR", "PYTHON"))}
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=clean,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def cold_import(tmp_path_factory):
    """One cold import: what it printed, and what it loaded beyond `import torch`."""
    path: Path = tmp_path_factory.mktemp("cold_import") / "report.json"
    process = run(IMPORT_AND_REPORT, str(path), json.dumps(OPTIONAL))
    return process, json.loads(path.read_text())


def test_prints_nothing_and_warns_of_nothing(cold_import):
    process, _ = cold_import
    assert process.stdout == ""
    assert process.stderr == ""


def test_loads_only_itself_torch_and_the_standard_library(cold_import):
    _, report = cold_import
    roots = {name.partition(".")[0] for name in report["modules"]}
    # How an editable install finds the package is the installer's doing.
    roots = {root for root in roots if not root.startswith("__editable__")}
    assert "fused_adafactor" in roots
    assert roots <= {"fused_adafactor", "torch", *sys.stdlib_module_names}


def test_does_not_look_for_optional_packages(cold_import):
    _, report = cold_import
    assert report["looked_for"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_loads_no_shared_library(cold_import):
    _, report = cold_import
    assert any("libtorch" in path for path in report["libraries_of_torch"])
    assert report["libraries"] == []


def test_steps_where_only_torch_is_installed():
    """The first step is where lazy imports happen, so it is taken too."""
    run(STEP, json.dumps(OPTIONAL))
