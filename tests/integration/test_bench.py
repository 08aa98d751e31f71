"""The bench as a command, at toy size: what it records, shows and draws. No test is of a time."""

import importlib
import importlib.util
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_adafactor import __version__
from fused_adafactor.__main__ import main
from fused_adafactor.cli import bench
from fused_adafactor.cli.bench import peers, record, tables, where
from fused_adafactor.cli.bench.cases import Case
from fused_adafactor.cli.bench.parity import Parity
from fused_adafactor.cli.bench.peers import OURS, TORCH_PATHS, YARDSTICK
from fused_adafactor.cli.bench.roofs import ROOFS

TINY = (
    Case("tiny", "toy", ((6, 5), (7,)), (torch.float32, torch.bfloat16)),
    Case("stack", "toy", ((2, 4, 3),)),
    Case("big", "large", ((9, 8),), full=True),
)
NAMES = {OURS, *TORCH_PATHS, YARDSTICK, *ROOFS}
OPTIONAL = {c.name: c.needs for c in peers.candidates("reference") if c.needs is not None}


@pytest.fixture(autouse=True, scope="module")
def small_bench() -> Iterator[None]:
    """Tiny cases, and no peer that may or may not be installed."""
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CASES", TINY)
        patch.setattr(
            importlib.util, "find_spec", lambda n: None if n in OPTIONAL.values() else find(n)
        )
        yield


def run_bench(*options: str) -> int:
    return main(["bench", "--backend", "reference", "--seconds", "0.001", *options])


def measured(path: Path, *options: str) -> dict[str, Any]:
    assert run_bench("--json", str(path), *options) == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def found(small_bench: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record that a run has written."""
    return measured(tmp_path_factory.mktemp("new") / "deep" / "bench.json")


@pytest.fixture(scope="module")
def source(small_bench: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a record with a case timed in float32 and bfloat16, and one that failed."""
    right, path = bench.check_parity, tmp_path_factory.mktemp("source") / "bench.json"

    def wrong_for_the_stack(case: Case, *rest: Any) -> Parity:
        return wrong() if case.name == "stack" else right(case, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "check_parity", wrong_for_the_stack)
        assert run_bench("--json", str(path)) == 1
    return path


def wrong(*args: object) -> Parity:
    return Parity(error=0.5, bound=1e-6)


def test_record_says_what_ran_where(found: dict[str, Any]) -> None:
    assert found["schema"] == 2
    assert found["versions"]["fused_adafactor"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "timm", "pytorch_optimizer"} < set(found["versions"])
    assert found["platform"]["device"] not in ("", "cpu")
    assert found["platform"]["threads"] == torch.get_num_threads()
    assert found["backend"] == found["backend_request"] == "reference"


def test_absent_peers_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(tmp_path / "bench.json", "--case", "stack")
    assert found["absent"] == {n: f"{needs} is not installed" for n, needs in OPTIONAL.items()}
    printed = capsys.readouterr().out
    for name, needs in OPTIONAL.items():
        assert f"not measured: {name}: {needs} is not installed" in printed


def test_a_peer_that_fails_in_a_case_is_reported_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(params: object) -> torch.optim.Optimizer:
        raise RuntimeError("out of order")

    everybody = (*peers.candidates("reference"), peers.Candidate("broken", fail, needs="torch"))
    monkeypatch.setattr(bench, "candidates", lambda *options: everybody)
    (case,) = measured(tmp_path / "bench.json", "--case", "stack")["cases"]
    assert case["absent"] == {"broken": "RuntimeError: out of order"}
    told = "not measured in stack float32: broken: RuntimeError: out of order"
    assert told in capsys.readouterr().out


def test_record_of_a_case(found: dict[str, Any]) -> None:
    cases = found["cases"]
    assert [(case["case"], case["group"], case["dtype"]) for case in cases] == [
        ("tiny", "toy", "float32"),
        ("tiny", "toy", "bfloat16"),
        ("stack", "toy", "float32"),
    ]
    low = cases[1]
    assert (low["tensors"], low["elements"], low["parameter_bytes"]) == (2, 37, 74)
    assert "reference" in low["plan"]
    for case in cases:
        assert 0 < case["parity"]["error"] <= case["parity"]["bound"] < 0.02
        times = case["times"]
        assert set(times) == NAMES
        for step_time in times.values():
            assert 0 < step_time["p20_ms"] <= step_time["median_ms"] <= step_time["p80_ms"]
            assert step_time["rounds"] >= 5


def test_ratios_and_floor_follow_from_the_medians(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        median = {name: step_time["median_ms"] for name, step_time in case["times"].items()}
        roof = min(ROOFS, key=lambda name: median[name])
        assert case["ratios"] == {
            "torch / ours": min(median[path] for path in TORCH_PATHS) / median[OURS],
            "ours / AdamW": median[OURS] / median[YARDSTICK],
            "ours / floor": median[OURS] / median[roof],
        }
        moved = 3 * case["parameter_bytes"]
        assert case["floor"] == {
            "kind": roof,
            "bytes": moved,
            "median_ms": median[roof],
            "gb_per_s": pytest.approx(moved / (1e-3 * median[roof]) / 1e9),
            "share": median[roof] / median[OURS],
        }


def test_record_has_the_memory_of_ours_and_torchs(found: dict[str, Any]) -> None:
    case = found["cases"][0]
    assert set(case["memory"]) == {OURS, *TORCH_PATHS}
    for memory in case["memory"].values():
        # 6 rows, 5 columns and a vector of 7 in float32, and two step counts.
        assert memory["state_bytes"] == 4 * (6 + 5 + 7 + 2)
        assert memory["peak_bytes"] > 0


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench("--case", "big", "--case", "stack") == 0
    printed = capsys.readouterr()
    head, *rows = printed.out.split("\n\n", maxsplit=1)[0].splitlines()
    for words in ("case", "dtype", "ms ours", *tables._RATIOS, "state", "peak"):
        assert words in head
    assert [row.split()[:2] for row in rows] == [["stack", "float32"], ["big", "float32"]]
    assert printed.out.isascii()
    assert "measuring 20/20" in printed.err


def test_full_adds_the_big_cases(tmp_path: Path) -> None:
    cases = measured(tmp_path / "bench.json", "--full")["cases"]
    assert cases[-1]["case"] == "big"


def test_failed_parity_shows_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("measured behind a failed check")

    monkeypatch.setattr(bench, "check_parity", wrong)
    monkeypatch.setattr(bench, "time_case", never)
    monkeypatch.setattr(bench, "measure_memory", never)
    path, plots = tmp_path / "bench.json", tmp_path / "plots"
    assert run_bench("--case", "stack", "--json", str(path), "--plot", str(plots)) == 1
    (case,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert [case[key] for key in ("times", "floor", "ratios", "memory")] == [None] * 4
    assert "parity FAILED: error 5.0e-01, bound 1.0e-06; not timed" in capsys.readouterr().out
    assert list(plots.iterdir()) == []


def test_one_failed_parity_is_enough_to_fail(source: Path) -> None:
    passed = [case.parity.passed for case in record.read(source).cases]
    assert passed == [True, True, False]


def test_from_shows_a_record_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("measured")

    measured(tmp_path / "bench.json", "--case", "stack")
    shown = capsys.readouterr().out
    monkeypatch.setattr(bench, "_measure", never)
    assert main(["bench", "--from", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out == shown


def test_from_a_record_of_a_failed_check_fails(source: Path) -> None:
    assert main(["bench", "--from", str(source)]) == 1


def test_record_reads_what_it_wrote(source: Path, tmp_path: Path) -> None:
    record.read(source).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == source.read_bytes()


PROSE = "# Ours\r\n\n" + "{begin}old\nand older{end}  \n\nrest ×\n"


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    text = PROSE.format(begin=tables.README_BEGIN, end=tables.README_END)
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    return path


def test_readme_gets_the_table_and_nothing_else(source: Path, readme: Path) -> None:
    main(["bench", "--from", str(source), "--readme", str(readme)])
    written = readme.read_bytes().decode()
    before, after = tables.split_readme(readme)
    assert (before, after) == ("# Ours\r\n\n", "  \n\nrest ×\n")
    assert "old" not in written.removeprefix(before).removesuffix(after)
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [
        ["| tiny", "float32"],
        ["| tiny", "bfloat16"],
        ["| stack", "float32"],
    ]
    assert "parity FAILED" in rows[3]
    assert len({row.count("|") for row in rows}) == 1
    main(["bench", "--from", str(source), "--readme", str(readme)])
    assert readme.read_bytes().decode() == written


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        tables.README_BEGIN,
        tables.README_END + tables.README_BEGIN,
        tables.README_BEGIN + tables.README_END + tables.README_END,
        tables.README_BEGIN * 2 + tables.README_END,
    ],
)
def test_readme_without_its_markers_is_refused(
    text: str, source: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme.write_text(text)
    capsys.readouterr()
    assert main(["bench", "--from", str(source), "--readme", str(readme)]) == 1
    printed = capsys.readouterr()
    assert "<!-- bench:begin -->" in printed.err
    assert printed.out == ""
    assert readme.read_text() == text


def test_our_own_readme_has_its_markers() -> None:
    tables.split_readme(Path(__file__).parents[2] / "README.md")


def test_plot_draws_two_pictures(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = tmp_path / "deep" / "plots"
    main(["bench", "--from", str(source), "--plot", str(plots)])
    files = sorted(plots.iterdir())
    assert [file.name for file in files] == ["share-of-floor.png", "speed-up.png"]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_bench("--plot", str(tmp_path)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "fused-adafactor[plot]" in printed.err


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert run_bench("--case", "stack") == 0
    assert "10/10" in terminal.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "abacus"), "abacus"),
        (("--json", "/dev/null/bench.json"), "/dev/null"),
        (("--plot", "/dev/null/plots"), "/dev/null"),
        (("--from", "/dev/null/bench.json"), "/dev/null"),
        (("--from", "/dev/null"), "not a record"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(*options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("bench: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.parametrize("text", ['{"schema": 1, "cases": []}', "[]", '{"cases": []}'])
def test_a_record_of_another_schema_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text(text)
    assert main(["bench", "--from", str(tmp_path / "old.json")]) == 1
    assert "expected 2; measure again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--case", "none"),
        ("--seconds", "0"),
        ("--seconds", "nan"),
        ("--from", "x", "--full"),
        ("--from", "x", "--json", "y"),
    ],
)
def test_usage(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_bench(*options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_commit_is_none_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stray = tmp_path / "where.py"
    stray.touch()
    monkeypatch.setattr(where, "_HERE", stray)
    assert where.checkout() == (None, None)


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
    package = tmp_path / "where.py"
    package.touch()
    monkeypatch.setattr(where, "_HERE", package)
    assert where.checkout() == (None, None)
    git("add", "where.py")
    commit, dirty = where.checkout()
    assert commit is not None
    assert len(commit) == 40
    assert dirty is True


# --- in detail, and within a time ----------------------------------------------------------------


# So long that nothing of this size is left out for being slow.
DETAIL = ("--case", "stack", "--detail", "--seconds", "0.2")


def test_detail_has_host_and_device_apart_and_ours_with_other_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = measured(tmp_path / "bench.json", *DETAIL)["cases"]
    variants = {peers.UNSCALED, peers.CLIPPED, peers.TORCH_CLIPPED}
    assert set(case["times"]) == set(case["device_times"]) == NAMES | variants
    assert case["absent"] == {}
    for name, apart in case["device_times"].items():
        captured = name in (OURS, YARDSTICK, peers.UNSCALED, peers.CLIPPED, *ROOFS)
        assert (apart["graph_ms"] is not None) is captured
        assert min(time for time in apart.values() if time is not None) > 0
    assert "Ours, host and device apart, ms:" in capsys.readouterr().out
    read = record.read(tmp_path / "bench.json")
    assert read.cases[0].device_times is not None
    assert read.cases[0].device_times[OURS].host_ms == case["device_times"][OURS]["host_ms"]
    read.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "bench.json").read_bytes()


def test_detail_checks_the_rule_without_the_scale_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = bench.check_parity
    monkeypatch.setattr(
        bench, "check_parity", lambda *a, unscaled=False: wrong() if unscaled else right(*a)
    )
    path = tmp_path / "bench.json"
    assert run_bench("--case", "stack", "--json", str(path)) == 0
    assert run_bench("--case", "stack", "--detail", "--json", str(path)) == 1


def test_another_backend_is_timed_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = (*DETAIL, "--against", "reference")
    (case,) = measured(tmp_path / "bench.json", *options)["cases"]
    name = f"{peers.AGAINST}reference"
    assert case["times"][name]["median_ms"] > 0
    assert case["device_times"][name]["graph_ms"] > 0
    # Where it is wrong it is not timed, and ours is.
    right, seen = bench.check_parity, []

    def wrong_the_last_time(*args: Any, **options: Any) -> Parity:
        seen.append(args)
        return wrong() if len(seen) == 3 else right(*args, **options)

    monkeypatch.setattr(bench, "check_parity", wrong_the_last_time)
    (case,) = measured(tmp_path / "bench.json", *options)["cases"]
    assert name not in case["times"]
    assert OURS in case["times"]
    assert case["absent"] == {name: "parity: error 0.5, bound 1.0e-06"}


def test_who_fails_apart_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        bench, "measure_device", lambda *args: ({}, {OURS: "RuntimeError: out of order"})
    )
    (case,) = measured(tmp_path / "bench.json", *DETAIL)["cases"]
    assert case["absent"] == {f"{OURS}, apart": "RuntimeError: out of order"}


def test_a_case_that_fails_within_a_time_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, path = bench.time_case, tmp_path / "bench.json"

    def fail_for_the_stack(case: Case, *rest: Any) -> Any:
        if case.name == "stack":
            raise RuntimeError("out of memory\nwith details")
        return right(case, *rest)

    monkeypatch.setattr(bench, "time_case", fail_for_the_stack)
    with pytest.raises(RuntimeError):
        run_bench("--full")
    assert run_bench("--full", "--within", "60", "--json", str(path)) == 1
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert [(case["case"], case["failed"]) for case in cases] == [
        *[("tiny", None)] * 2,
        ("stack", "RuntimeError: out of memory"),
        ("big", None),
    ]
    assert "FAILED: RuntimeError: out of memory" in capsys.readouterr().out


def test_no_case_starts_after_the_time(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert len(measured(path, "--full", "--within", "1e-9")["cases"]) == 0


def test_cases_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, seen = tmp_path / "bench.json", []
    right = bench.check_parity

    def look(*args: Any) -> Parity:
        text = path.read_text(encoding="utf-8")
        seen.append(len(json.loads(text)["cases"]) if text else 0)
        return right(*args)

    monkeypatch.setattr(bench, "check_parity", look)
    measured(path, "--full")
    assert seen == [0, 1, 2, 3]


def test_gpu_cases_are_for_who_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_gpu = (Case("gpu-tiny", "gpu", ((3, 2),)),)
    monkeypatch.setattr(bench, "GPU_CASES", on_gpu)
    path = tmp_path / "bench.json"
    assert "gpu-tiny" not in {c["case"] for c in measured(path, "--full")["cases"]}
    assert [c["case"] for c in measured(path, "--case", "gpu")["cases"]] == ["gpu-tiny"]
