"""``bench --features`` at toy size: what it records and shows. No test is of a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_adafactor.__main__ import main
from fused_adafactor.cli import bench
from fused_adafactor.cli.bench import features, tables
from fused_adafactor.cli.bench.cases import Case
from fused_adafactor.cli.bench.features import FEATURES
from fused_adafactor.cli.bench.parity import Parity
from fused_adafactor.cli.bench.peers import OURS

TINY = (Case("4096x4096", "toy", ((64, 64), (64,)), (torch.float32, torch.bfloat16)),)


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "CASES", TINY)
        patch.setattr(bench, "GPU_CASES", ())
        yield


def run(*options: str) -> int:
    return main(["bench", "--features", "--backend", "cpp", "--seconds", "0.001", *options])


@pytest.fixture(scope="module")
def path(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "record.json"
    assert run("--json", str(path)) == 0
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))["features"]
    return {(row["dtype"], row["feature"]): row for row in rows}


def test_every_feature_is_measured_where_it_has_a_meaning(found: Any) -> None:
    wanted = {
        (str(dtype).removeprefix("torch."), feature.name)
        for dtype in (torch.float32, torch.bfloat16)
        for feature in FEATURES
        if feature.only in (None, dtype)
    }
    assert set(found) == wanted
    for row in found.values():
        assert row["parity"]["error"] <= row["parity"]["bound"]
        assert row["time"]["median_ms"] > 0
        assert row["cost"] is not None


def test_the_model_counts_what_a_feature_reads_and_writes(found: Any) -> None:
    """Of 64x64 and 64: gradient twice, parameter three times; and full-size state twice."""
    n = 64 * 64 + 64
    state = 2 * 4 * 64  # of the vector's second moment; the model counts no factors
    assert found["float32", OURS]["bytes"] == 5 * 4 * n + state
    assert found["bfloat16", OURS]["bytes"] == 5 * 2 * n + state
    assert found["float32", "max_grad_norm"]["bytes"] == 6 * 4 * n + state
    assert found["float32", "use_ema"]["bytes"] == 7 * 4 * n + state
    assert found["float32", "beta1=0.9"]["bytes"] == 7 * 4 * n + state
    int8 = found["float32", "beta1, momentum_dtype=int8"]["bytes"]
    assert 5 * 4 * n + state + 2 * n <= int8 <= 5 * 4 * n + state + 2 * n * 33 / 32 + 8
    k = features._ACCUMULATED
    update, between = 5 * 4 * n + state + 2 * 4 * n, 4 * n + 2 * 4 * n
    accumulated = found["float32", f"gradient_accumulation_steps={k}"]
    assert accumulated["bytes"] == (update + (k - 1) * between) / k
    assert accumulated["bytes_cost"] == pytest.approx(
        accumulated["bytes"] / found["float32", OURS]["bytes"] - 1
    )
    assert found["float32", "CPUOffload"]["bytes"] is None


def test_gradients_in_memory_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of eight tensors, each too large to wait for others, one is there at a time."""
    case = Case("4096x4096", "toy", ((512, 1024),) * 8)
    monkeypatch.setattr(bench, "CASES", (case,))
    monkeypatch.setattr(features, "FEATURES", tuple(f for f in FEATURES if "backward" in f.name))
    assert run("--json", str(tmp_path / "record.json")) == 0
    rows = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["features"]
    assert [row["peak_grads"] for row in rows] == [1.0, 0.125]


def test_the_table_is_shown_and_put_in_the_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{tables.FEATURES_BEGIN}\nold\n{tables.FEATURES_END}\nb\n")
    assert run("--readme", str(readme)) == 0
    shown, text = capsys.readouterr().out, readme.read_text(encoding="utf-8")
    for feature in FEATURES:
        assert (feature.name if feature.name != OURS else "bare") in shown
        assert f"| `{feature.name if feature.name != OURS else 'bare'}` |" in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    assert "old" not in text


def test_no_time_stands_behind_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = features.compare
    monkeypatch.setattr(
        features,
        "compare",
        lambda got, wanted, before, dtype: (
            Parity(error=0.5, bound=1e-6)
            if dtype is torch.bfloat16
            else right(got, wanted, before, dtype)
        ),
    )
    monkeypatch.setattr(features, "FEATURES", FEATURES[:2])
    assert run() == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if "4096x4096" in line]
    assert ["FAILED" in row for row in rows] == [False, False, True, True]


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(SystemExit):
        run("--full")
