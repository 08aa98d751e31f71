"""``make gpu`` tried out on the CPU: its parts, what they leave behind, and how they end."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, targets
from fused_adafactor import building, native
from fused_adafactor.backends import cpp, cuda
from fused_adafactor.cli.bench.cases import GPU_CASES
from fused_adafactor.cli.bench.device_time import DeviceTime
from fused_adafactor.cli.bench.measure import StepTime
from fused_adafactor.cli.bench.parity import Parity
from fused_adafactor.cli.bench.peers import (
    AGAINST,
    CLIPPED,
    OURS,
    TORCH_CLIPPED,
    TORCH_PATHS,
    UNSCALED,
    YARDSTICK,
)
from fused_adafactor.cli.bench.record import CaseRecord
from fused_adafactor.cli.bench.roofs import ROOFS


def new_run(out: Path, **options: Any) -> gpu.Run:
    options = {"seconds": 100.0, "shards": 1, "dry": True} | options
    return gpu.Run("cpu", "reference", None, out, **options)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dry-run", "--device", "cpu", "--backend", "reference", "--shards", "2"]
    assert gpu.main([*options, "--seconds", "300", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary-cpu.json").read_text(encoding="utf-8"))
    assert {part["part"]: part["status"] for part in summary["parts"]} == {
        "build": "skipped",
        "info": "passed",
        "correctness": "passed",
        "sanitizer": "skipped",
        "device": "passed",
        "targets": "passed",
        "everyday": "passed",
        "compiled": "skipped",
    }
    (row,) = summary["targets"]
    assert row["case"] == "gpu-1mb"
    assert row["failed"] is None
    assert row["ours_ms"] / row["floor_ms"] == row["over_floor"] > 0
    device = json.loads((tmp_path / "device-cpu.json").read_text(encoding="utf-8"))
    assert device["copy_gb_per_s"] > 0
    assert {"host_us", "there_and_back_us", "device_in_graph_us"} == set(device["launch"])
    assert {entry["streamed_mb"] for entry in device["rereads"]} == {0, 1}
    for part in ("correctness-reference-0", "correctness-reference-1"):
        lines = (tmp_path / f"{part}-cpu.jsonl").read_text(encoding="utf-8").splitlines()
        assert any(json.loads(line)["outcome"] == "passed" for line in lines)
    printed = capsys.readouterr().out
    assert "gpu-1mb" in printed
    assert "ours/floor" in printed


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "finds no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: gpu.Run) -> tuple[str, str]:
        raise OSError("no such thing")

    monkeypatch.setattr(
        gpu, "PARTS", {"first": broken, "second": lambda run: ("passed", "as it should")}
    )
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "summary-cpu.json").read_text(encoding="utf-8"))["parts"]
    assert [(part["status"], part["note"]) for part in parts] == [
        ("failed", "OSError: no such thing"),
        ("passed", "as it should"),
    ]
    capsys.readouterr()


def test_a_part_without_time_is_skipped(tmp_path: Path) -> None:
    run = new_run(tmp_path, seconds=-1.0)
    gpu.take(run, "info")
    assert (run.outcomes[0].status, run.outcomes[0].note) == ("skipped", "no time left")


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child holds the log open, and is gone too."""
    pid = tmp_path / "pid"
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    run = new_run(tmp_path)
    started = time.monotonic()
    assert run.command("info", [sys.executable, "-c", script], 3.0) is None
    assert time.monotonic() - started < 30
    child = int(pid.read_text())
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # one that has ended and that nobody has asked for is still there
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HARD_TESTS = """
import os
import time

import pytest


def test_first():
    pass


def test_wrong():
    assert 1 + 1 == 3, "sums are wrong"


def test_hangs():
    time.sleep(120)


def test_takes_the_process_with_it():
    os._exit(7)


@pytest.mark.parametrize("number", range(3))
def test_last(number):
    pass
"""


LOST_TESTS = """
import torch

from tests.gpu import device


def test_loses_the_device(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.ON_GPU, torch.cuda.synchronize = True, lost
    raise RuntimeError("CUDA error")


def test_behind_it():
    assert not device.ON_GPU
"""


def outcome_of(
    tests: str, monkeypatch: pytest.MonkeyPatch, folder: Path, against: str | None = None
) -> tuple[gpu.Run, str]:
    """Take tests of one's own as those of the GPU; the run, and the note of it."""
    file = folder / "tests" / "test_hard.py"
    file.parent.mkdir()
    file.write_text(tests, encoding="utf-8")
    command = [part for part in gpu._PYTEST if part != "tests/gpu"]
    plugin = ["-p", "tests.gpu.conftest", "--rootdir", str(file.parent), str(file)]
    monkeypatch.setattr(gpu, "_PYTEST", (*command, *plugin))
    monkeypatch.setattr(gpu, "_LONGEST_TEST", 2.0)
    run = new_run(folder, seconds=200.0, dry=False)
    run.against = against
    status, note = gpu.correctness(run)
    assert status == "failed"
    return run, note


def test_tests_are_taken_up_in_a_new_process_where_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What comes behind an illegal access fails in the same process, whatever it is."""
    _, note = outcome_of(LOST_TESTS, monkeypatch, tmp_path)
    head, failure = note.splitlines()
    assert head.endswith("1 failed, 1 passed")
    assert failure.endswith("test_loses_the_device: E       RuntimeError: CUDA error")


def test_tests_are_taken_up_behind_one_that_hangs_or_dies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, note = outcome_of(HARD_TESTS, monkeypatch, tmp_path)
    head, *failures = note.splitlines()
    assert head.endswith("3 failed, 4 passed")
    assert [failure.partition("::")[2] for failure in failures] == [
        "test_wrong: E       AssertionError: sums are wrong",
        "test_hangs: E the process ended in it: exit status 1",
        "test_takes_the_process_with_it: E the process ended in it: exit status 7",
    ]
    traces = run.file("correctness-reference-0", "jsonl.hung").read_text(encoding="utf-8")
    assert "test_hangs" in traces


OF_ONE_BACKEND = """
from tests.gpu import device


def test_of_one():
    assert device.BACKEND == "reference", "this one is wrong"
"""


def test_each_backend_has_processes_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, note = outcome_of(OF_ONE_BACKEND, monkeypatch, tmp_path, against="cpp")
    head, failure = note.splitlines()
    assert head.endswith("1 failed, 1 passed")
    assert failure.strip().startswith("cpp: ")
    assert "this one is wrong" in failure


NVCC = """#!/bin/sh
case "$1" in
  --version) exec echo 1 ;;
  --list-gpu-arch) exec echo compute_90 ;;
esac
for last; do :; done
echo "$@" > "$last"
exit {status}
"""


@pytest.mark.parametrize(
    ("compiler", "installed", "expected", "against"),
    [
        (0, False, ("passed", "for sm_90"), "cuda"),
        (3, True, ("failed", "exit status 1"), None),
        (None, True, ("passed", "installed"), "cuda"),
        (None, False, ("skipped", "there is no nvcc, and it was not built"), None),
    ],
)
def test_the_library_is_built_for_the_device_where_it_can_be(
    compiler: int | None,
    installed: bool,
    expected: tuple[str, str],
    against: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(status=compiler))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv(cuda.LIBRARY_ENVIRONMENT, raising=False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda: None if installed else "it was not built")
    monkeypatch.setattr(cpp, "missing", lambda: None)
    if compiler is None:
        monkeypatch.setattr(building, "nvcc_path", lambda: None)
    run = new_run(tmp_path / "out")
    name = building.LIBRARIES["cuda"]
    for folder in ("library", "library-sm_90"):  # of an earlier run, from other sources
        old = tmp_path / "out" / folder / "fused_adafactor" / f"cuda-x86_64-{'0' * 16}-90" / name
        old.parent.mkdir(parents=True)
        old.touch()
    run.against = "cuda"
    assert gpu.build(run) == expected
    assert run.against == against
    if compiler == 0:
        library = Path(run.env[cuda.LIBRARY_ENVIRONMENT])
        assert library.is_relative_to(tmp_path / "out")
        assert library.read_text()
    else:
        assert not run.env


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        (0, "nothing here needs the CUDA library; for C++"),
        (
            3,
            "nothing here needs the CUDA library; not for C++ (exit status 1), so CPUOffload is "
            "not tested",
        ),
    ],
)
def test_the_library_of_the_host_is_built_where_there_is_none(
    compiler: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cxx = tmp_path / "cxx"
    cxx.write_text(NVCC.format(status=compiler))
    cxx.chmod(0o755)
    monkeypatch.setenv(building.COMPILER_ENVIRONMENT, str(cxx))
    monkeypatch.setattr(cpp, "missing", lambda: "it was not built")
    run = new_run(tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert gpu.build(run) == ("skipped", expected)
    named = run.env.get(native.LIBRARY_ENVIRONMENT)
    assert (named is not None and Path(named).exists()) == (compiler == 0)


def test_the_sanitizer_is_found_beside_nvcc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(building, "nvcc_path", lambda: tmp_path / "nvcc")
    assert gpu._sanitizer_path() is None
    tool = tmp_path / "compute-sanitizer"
    tool.touch(0o755)
    assert gpu._sanitizer_path() == str(tool)


def test_tests_that_had_no_time_are_a_failure() -> None:
    late = {"outcome": "skipped", "message": "Skipped: out of time"}
    tests = {"a": {"outcome": "passed", "message": ""}, "b": late}
    assert gpu._verdict({"a": tests["a"]}) == ("passed", "1 passed")
    assert gpu._verdict(tests) == ("failed", "1 passed, 1 not run for lack of time")
    assert gpu._verdict({})[0] == "failed"


def test_tests_that_cannot_be_collected_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, note = outcome_of("import nothing_of_this_name", monkeypatch, tmp_path)
    assert "exit status 2, between two tests" in note
    capsys.readouterr()


TOOL = """#!{python}
import pathlib, sys, time
pathlib.Path({log!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
check = sys.argv[sys.argv.index("--tool") + 1]
sys.exit({memcheck} if check == "memcheck" else {racecheck})
"""


@pytest.mark.parametrize(
    ("memcheck", "racecheck", "expected"),
    [
        (0, 0, ("passed", "reference: memcheck: clean, racecheck: clean")),
        (9, 0, ("failed", "reference: memcheck: exit status 9, racecheck: clean")),
        (0, 9, ("failed", "reference: memcheck: clean, racecheck: exit status 9")),
        (0, "time.sleep(60)", ("passed", "reference: memcheck: clean, racecheck: out of time")),
    ],
)
def test_the_sanitizer_checks_a_few_steps(
    memcheck: Any,
    racecheck: Any,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    fields = {"python": sys.executable, "log": str(log)}
    tool.write_text(TOOL.format(memcheck=memcheck, racecheck=racecheck, **fields))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    right = gpu.Run.command
    monkeypatch.setattr(  # the steps by themselves are tried out elsewhere
        gpu.Run,
        "command",
        lambda self, part, command, *rest: (
            0 if command[0] == sys.executable else right(self, part, command, *rest)
        ),
    )
    assert gpu.sanitizer(new_run(tmp_path, seconds=50.0)) == expected
    assert all("tests.gpu.few_steps" in line for line in log.read_text().splitlines())


# --- the table -----------------------------------------------------------------------------------


def record(name: str = "gpu-117mb", **changes: Any) -> CaseRecord:
    """A case of 100 MB that takes 0.15 ms, where a copy at 3000 GB/s sets a floor of 0.1 ms."""
    whole = {OURS: 0.2, TORCH_PATHS[0]: 4.0, TORCH_PATHS[1]: 3.0, YARDSTICK: 0.4}
    whole |= {CLIPPED: 0.3, TORCH_CLIPPED: 6.0}
    graphs = {OURS: 0.15, UNSCALED: 0.12, YARDSTICK: 0.18, **dict.fromkeys(ROOFS, 0.11)}
    apart = {name: DeviceTime(0.05, 9.0, ms) for name, ms in graphs.items()}
    apart[TORCH_PATHS[0]] = DeviceTime(1.0, 3.0)
    case = CaseRecord(
        case=name,
        group="gpu",
        dtype="bfloat16",
        tensors=1,
        elements=50_000_000,
        parameter_bytes=100_000_000,
        plan="",
        parity=Parity(1e-7, 1e-6),
        times={name: StepTime(ms, ms, ms, 9) for name, ms in whole.items()},
        device_times=apart,
    )
    return dataclasses.replace(case, **changes)


def test_a_row_has_the_ratios_of_its_case() -> None:
    row = targets.row_of(record(), 3000.0)
    assert row == targets.Row(
        case="gpu-117mb",
        dtype="bfloat16",
        ours_ms=0.15,
        floor_ms=pytest.approx(0.1),
        over_floor=pytest.approx(1.5),
        unscaled_over_floor=pytest.approx(1.2),
        roof_over_floor=pytest.approx(1.1),
        torch_over_ours=pytest.approx(15.0),
        adamw_over_ours=pytest.approx(1.2),
        clipped_torch_over_ours=pytest.approx(20.0),
        host_ms=0.05,
        missed=[],
    )
    assert targets.as_table([row]).endswith("  met")
    assert row.against_over_ours is None


def test_a_row_compares_backends_in_a_graph() -> None:
    case = record()
    assert case.device_times is not None
    apart = case.device_times | {f"{AGAINST}cuda": DeviceTime(0.05, 9.0, 0.12)}
    row = targets.row_of(record(device_times=apart), 3000.0)
    assert row.against_over_ours == pytest.approx(0.8)


def test_what_is_missed_is_said() -> None:
    row = targets.row_of(record(), 6000.0)  # half the floor
    assert row.missed == ["over_floor 3.00 > 1.9", "unscaled_over_floor 2.40 > 1.55"]
    small = targets.row_of(record("gpu-300-vectors"), 3000.0)
    assert small.missed == ["torch_over_ours 15.00 < 30"]
    apart = {OURS: DeviceTime(0.4, 0.5, None), YARDSTICK: DeviceTime(0.1, 0.4, 0.4)}
    slow = targets.row_of(record("gpu-300x1mb", device_times=apart), 3000.0)
    assert slow.missed == [
        "over_floor 5.00 > 1.25",
        "host_ms 0.4 > 0.3",
        "torch_over_ours 15.00 < 30",
        "adamw_over_ours 0.8 < 1",
    ]
    assert "missed: over_floor 5.00 > 1.25; host_ms" in targets.as_table([slow])


def test_a_case_that_failed_has_its_reason() -> None:
    def reason(**changes: Any) -> str | None:
        return targets.row_of(record(**changes), 3000.0).failed

    assert reason(times=None, parity=Parity(0.5, 1e-6)) == "parity: error 0.5, bound 1.0e-06"
    assert reason(times=None, failed="RuntimeError: no") == "RuntimeError: no"
    assert reason(device_times={}, absent={f"{OURS}, apart": "E: no"}) == "E: no"
    failed = targets.row_of(record(times=None, failed="RuntimeError: no"), 3000.0)
    assert targets.as_table([failed]).endswith("  RuntimeError: no")


def test_every_target_is_of_a_case() -> None:
    assert set(targets.TARGETS) == {case.name for case in GPU_CASES}
