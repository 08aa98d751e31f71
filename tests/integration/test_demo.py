"""The demo at toy size: what it measures is right, and what it writes is there and readable."""

import argparse
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_adafactor import Adafactor
from fused_adafactor.cli import demo, language_model, twin_training
from fused_adafactor.cli.progress import ProgressBar
from tests import peers

TINY = language_model.DemoConfig(
    steps=24,
    d_model=16,
    layers=1,
    heads=2,
    context=16,
    batch=4,
    corpus_bytes=1 << 20,
    heldout_batches=2,
    heldout_points=3,
    sample_bytes=20,
)


@pytest.fixture(scope="module")
def corpus() -> language_model.Corpus:
    return language_model.read_corpus(TINY.corpus_bytes)


@pytest.fixture(scope="module")
def twins(corpus: language_model.Corpus) -> twin_training.DemoRecord:
    return twin_training.train_both(TINY, corpus, torch.optim.Adafactor, torch.optim.Adafactor)


def run_demo(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    monkeypatch.setattr(demo, "FULL_SIZE", TINY)
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo", "--backend", "reference", "--out", str(out), *options])
    status: int = args.run(args)
    return status


def test_the_same_optimizer_twice_draws_the_same_curve(twins: twin_training.DemoRecord) -> None:
    assert twins.torch.train_loss == twins.ours.train_loss
    assert twins.largest_train_difference == 0
    assert twins.largest_heldout_difference == 0


def test_losses_are_finite_and_fall(twins: twin_training.DemoRecord) -> None:
    assert twins.is_finite
    for losses in (twins.ours.train_loss, twins.ours.heldout_loss):
        assert losses[0] == pytest.approx(math.log(256), abs=0.5)
        assert losses[-1] < losses[0] - 1


def test_every_step_is_kept(twins: twin_training.DemoRecord) -> None:
    assert twins.heldout_steps == [0, 8, 16, 24]
    for run in (twins.torch, twins.ours):
        assert len(run.train_loss) == len(run.optimizer_ms) == len(run.step_ms) == TINY.steps
        assert len(run.heldout_loss) == len(twins.heldout_steps)
        assert all(0 < ms < step for ms, step in zip(run.optimizer_ms, run.step_ms, strict=True))
        assert 0 < run.optimizer_share < 1
        assert run.end_train_loss == pytest.approx(sum(run.train_loss[-10:]) / 10)
    ratio = twins.torch.median_optimizer_ms / twins.ours.median_optimizer_ms
    assert twins.time_ratio == ratio


def test_ours_follows_torch(corpus: language_model.Corpus) -> None:
    def ours(parameters: object) -> Adafactor:
        return Adafactor(parameters, backend="reference")

    record = twin_training.train_both(TINY, corpus, torch.optim.Adafactor, ours)
    assert record.largest_train_difference < 1e-3
    assert record.largest_heldout_difference < 1e-3
    assert "reference" in record.plan


def test_a_loss_that_is_not_a_number_shows(twins: twin_training.DemoRecord) -> None:
    broken = replace(twins.ours, train_loss=[*twins.ours.train_loss[:-1], math.nan])
    assert not replace(twins, ours=broken).is_finite


def test_corpus_is_cut_to_size_and_repeats(corpus: language_model.Corpus) -> None:
    assert len(corpus.train) + len(corpus.heldout) == TINY.corpus_bytes
    assert corpus.describe() == language_model.read_corpus(TINY.corpus_bytes).describe()


def test_corpus_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(language_model.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="standard library"):
        language_model.read_corpus(100)


def test_sample_cannot_command_a_terminal() -> None:
    assert language_model.printable(b"\x1b[2Jok\r\n\xff") == "?[2Jok?\n?"


def test_command_writes_files_and_plain_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers.require_module("matplotlib")
    assert run_demo(monkeypatch, tmp_path / "new" / "out") == 0
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "new" / "out" / "demo.json").read_text(encoding="utf-8"))
    picture = (tmp_path / "new" / "out" / "demo.png").read_bytes()
    assert record["config"]["steps"] == TINY.steps
    assert len(record["ours"]["train_loss"]) == TINY.steps
    assert picture.startswith(b"\x89PNG")
    for stream in (printed.out, printed.err):
        assert stream.isascii()
        assert "\x1b" not in stream
        assert "\r" not in stream
    for words in ("held-out loss", "torch / ours", "tensors on reference", "def "):
        assert words in printed.out
    assert "training 24/24" in printed.err


def test_command_prints_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(monkeypatch, tmp_path, "--json", "--no-plot", "--steps", "2") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert printed["heldout_steps"] == [0, 1, 2]
    assert not (tmp_path / "demo.png").exists()


def test_command_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_demo(monkeypatch, tmp_path, "--steps", "2") == 0
    assert (tmp_path / "demo.json").exists()
    assert "fused-adafactor[plot]" in capsys.readouterr().err


def test_command_refuses_a_device_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(monkeypatch, tmp_path / "out", "--device", "abacus") == 1
    assert "abacus" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_command_refuses_a_number_of_steps(
    steps: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_demo(monkeypatch, tmp_path, "--steps", steps)
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_colour", [False, True])
def test_progress_on_a_terminal(no_colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1" if no_colour else "")
    stream = Terminal()
    with ProgressBar(3, "work", stream) as progress:
        for _ in range(3):
            progress.advance()
    assert "3/3" in stream.getvalue()
    assert stream.getvalue().endswith("\n")
    assert ("\x1b[36m" in stream.getvalue()) is not no_colour


def test_progress_in_a_log_is_a_few_lines() -> None:
    stream = io.StringIO()
    with ProgressBar(100, "work", stream) as progress:
        for _ in range(100):
            progress.advance("note")
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "work 100/100  note"
    assert len(lines) == 5
