"""The bench at toy size: what it records is right and complete. No test is of a time."""

import argparse
import importlib
import io
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_adafactor import Adafactor, __version__
from fused_adafactor.__main__ import main
from fused_adafactor.cli import bench, measure

CPU = torch.device("cpu")
TINY = (
    measure.Case("tiny", ((6, 5), (7,)), (torch.float32, torch.bfloat16)),
    measure.Case("stack", ((2, 4, 3),)),
    measure.Case("big", ((9, 8),), full=True),
)
NAMES = {measure.OURS, *measure.TORCH_PATHS, measure.YARDSTICK}


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", TINY)


def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        measure.importlib.util, "find_spec", lambda n: None if n == "transformers" else find(n)
    )


def run_bench(*options: str) -> int:
    return main(["bench", "--backend", "reference", "--seconds", "0.001", *options])


def record_of(path: Path, *options: str) -> dict[str, Any]:
    assert run_bench("--json", str(path), *options) == 0
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def wrong(*args: object) -> measure.Parity:
    return measure.Parity(error=0.5, bound=1e-6)


def test_record_says_what_ran_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_transformers(monkeypatch)
    record = record_of(tmp_path / "new" / "bench.json")
    assert record["schema"] == 1
    assert record["versions"]["fused_adafactor"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] is None
    assert record["platform"]["device"] == "cpu"
    assert record["platform"]["threads"] == torch.get_num_threads()
    assert record["backend"] == record["backend_request"] == "reference"
    assert record["absent"] == {measure.TRANSFORMERS: "transformers is not installed"}


def test_record_of_a_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_transformers(monkeypatch)
    cases = record_of(tmp_path / "bench.json")["cases"]
    found = [(case["case"], case["dtype"]) for case in cases]
    assert found == [("tiny", "float32"), ("tiny", "bfloat16"), ("stack", "float32")]
    low = cases[1]
    assert (low["tensors"], low["elements"]) == (2, 37)
    assert (low["parameter_bytes"], low["roof_bytes"]) == (74, 222)
    assert "reference" in low["plan"]
    for case in cases:
        assert 0 < case["parity"]["error"] <= case["parity"]["bound"] < 0.02
        times = case["times"]
        assert set(times) == NAMES | {measure.ROOF}
        for step_time in times.values():
            assert 0 < step_time["p20_ms"] <= step_time["median_ms"] <= step_time["p80_ms"]
        assert len({step_time["rounds"] for step_time in times.values()}) == 1
        median = {name: step_time["median_ms"] for name, step_time in times.items()}
        faster = min(median[path] for path in measure.TORCH_PATHS)
        assert case["ratios"] == {
            "torch / ours": faster / median[measure.OURS],
            "ours / AdamW": median[measure.OURS] / median[measure.YARDSTICK],
            "ours / roof": median[measure.OURS] / median[measure.ROOF],
        }


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_transformers(monkeypatch)
    assert run_bench("--case", "big", "--case", "stack") == 0
    printed = capsys.readouterr()
    head, *rows = printed.out.split("\n\n", maxsplit=1)[0].splitlines()
    for words in ("case", "dtype", "ms ours", "torch / ours", "ours / AdamW", "ours / roof"):
        assert words in head
    assert [row.split()[:2] for row in rows] == [["stack", "float32"], ["big", "float32"]]
    assert f"not measured: {measure.TRANSFORMERS}" in printed.out
    assert printed.out.isascii()
    assert "measuring 20/20" in printed.err


def test_full_adds_the_big_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_transformers(monkeypatch)
    cases = record_of(tmp_path / "bench.json", "--full")["cases"]
    assert cases[-1]["case"] == "big"


@pytest.mark.parity
def test_transformers_is_measured_where_it_is_installed() -> None:
    pytest.importorskip("transformers")
    everybody = measure.candidates("reference")
    assert all(candidate.missing is None for candidate in everybody)
    times = measure.time_case(TINY[0], torch.float32, CPU, everybody, 1e-3)
    assert set(times) == NAMES | {measure.TRANSFORMERS, measure.ROOF}


def test_failed_parity_shows_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("timed behind a failed check")

    monkeypatch.setattr(bench, "check_parity", wrong)
    monkeypatch.setattr(bench, "time_case", never)
    path = tmp_path / "bench.json"
    assert run_bench("--case", "stack", "--json", str(path)) == 1
    (case,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert case["times"] is None
    assert case["ratios"] is None
    assert "parity FAILED: error 5.0e-01, bound 1.0e-06; not timed" in capsys.readouterr().out


def test_one_failed_parity_is_enough_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    without_transformers(monkeypatch)
    right = bench.check_parity

    def wrong_in_bfloat16(case: measure.Case, dtype: torch.dtype, *rest: Any) -> measure.Parity:
        return wrong() if dtype is torch.bfloat16 else right(case, dtype, *rest)

    monkeypatch.setattr(bench, "check_parity", wrong_in_bfloat16)
    assert run_bench() == 1


class Faulty(Adafactor):
    """Ours with an error in the parameters after a step; the oracle, in float64, is left alone."""

    relative_error = 0.0
    from_step = 1

    def step(self, closure: None = None) -> None:
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            if param.dtype != torch.float64 and self.state[param]["step"] >= self.from_step:
                param.data.mul_(1 + self.relative_error)


@pytest.mark.parametrize("case", [case for case in measure.CASES if case.elements < 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_holds(case: measure.Case, dtype: torch.dtype) -> None:
    parity = measure.check_parity(case, dtype, CPU, "reference")
    assert parity.passed
    # The bound is of the worst rounding of every element, and not far above that.
    assert parity.bound < 3 * torch.finfo(dtype).eps + 5e-6


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float32, math.nan)]
)
@pytest.mark.parametrize("from_step", [1, 2])
def test_parity_finds_an_error(
    dtype: torch.dtype, error: float, from_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "relative_error", error)
    monkeypatch.setattr(Faulty, "from_step", from_step)
    monkeypatch.setattr(measure, "Adafactor", Faulty)
    parity = measure.check_parity(TINY[0], dtype, CPU, "reference")
    assert not parity.passed
    assert (parity.error is None) is math.isnan(error)


def test_everybody_steps_in_turn() -> None:
    order: list[str] = []

    def candidate(name: str) -> measure.Candidate:
        class Recorder(torch.optim.SGD):
            def step(self, closure: object = None) -> None:
                order.append(name)

        return measure.Candidate(name, Recorder)

    progress: list[float] = []
    pair = [candidate("a"), candidate("b")]
    times = measure.time_case(TINY[0], torch.float32, CPU, pair, 1e-9, progress.append)
    rounds = times["a"].rounds
    assert order == ["a", "b"] * (rounds + 2)
    assert len(progress) == rounds
    assert progress[-1] == 1


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in measure.CASES]
    assert len(set(names)) == len(names)
    (gpt2,) = (case for case in measure.CASES if case.name == "gpt2-124m")
    assert (len(gpt2.shapes), gpt2.elements) == (148, 124_439_808)


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    without_transformers(monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert run_bench("--case", "stack") == 0
    assert "10/10" in terminal.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "abacus"), "abacus"),
        (("--json", "/dev/null/bench.json"), "/dev/null"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(*options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("bench: ")
    assert words in printed.err


@pytest.mark.parametrize("options", [("--case", "none"), ("--seconds", "0"), ("--seconds", "nan")])
def test_usage(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_bench(*options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_commit_is_none_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stray = tmp_path / "bench.py"
    stray.touch()
    args = argparse.Namespace(backend="reference", device="cpu")
    monkeypatch.setattr(bench, "__file__", str(stray))
    assert bench.header(args, {measure.TRANSFORMERS: "no"})["commit"] is None


def test_commit_of_somebody_elses_checkout_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    try:
        git("init")
    except OSError:
        pytest.skip("git is not installed")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-m", "theirs")
    package = tmp_path / "bench.py"
    package.touch()
    args = argparse.Namespace(backend="reference", device="cpu")
    monkeypatch.setattr(bench, "__file__", str(package))
    absent = {measure.TRANSFORMERS: "no"}
    assert bench.header(args, absent)["commit"] is None
    git("add", "bench.py")
    record = bench.header(args, absent)
    assert len(record["commit"]) == 40
    assert record["dirty"] is True
