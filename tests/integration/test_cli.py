"""``python -m fused_adafactor``: what it prints, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fused_adafactor import __version__
from fused_adafactor.__main__ import main
from fused_adafactor.backends import cpp
from fused_adafactor.cli import info


def test_info_names_versions_backends_and_the_self_check(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "backend reference  available" in text
    assert "self check on cpu" in text
    if cpp.missing() is None:
        threads = torch.get_num_threads()
        assert f": libfused_adafactor.so, {cpp.facts()['isa']}, {threads} threads" in text
    assert "ok" in text


def test_info_json_is_one_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["fused_adafactor"] == __version__
    assert report["backends"]["reference"] == {"available": True, "reason": None}
    assert report["native"] == (cpp.facts() if cpp.missing() is None else None)
    for backend in report["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    (check,) = (c for c in report["self_checks"] if c["device"] == "cpu")
    assert check["passed"] is True
    assert 0 <= check["error"] <= info.SELF_CHECK_BOUND


def test_info_fails_when_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "SELF_CHECK_BOUND", -1.0)
    assert main(["info"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_info_reports_a_backend_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSED_ADAFACTOR_BACKEND", "cuda")
    assert main(["info", "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["self_checks"][:1]
    assert check["passed"] is False
    assert "cuda" in check["reason"]


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["info", "--no-such-option"]])
def test_a_command_line_that_cannot_be_understood(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: python -m fused_adafactor")


def test_version_from_a_process() -> None:
    """One real process, for what `main` called from here cannot show: that `-m` finds it."""
    command = [sys.executable, "-m", "fused_adafactor", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fused_adafactor {__version__}"
