"""Tests that need a GPU: skipped where there is none, and run by ``make gpu``.

Its machine has torch and pytest, so nothing here needs more, ``tests/conftest.py`` least of all.
A kernel may hang or take the device with it. Then the process ends, what became of every test is
in a log, line by line, and the next process goes on behind the one that it ended with.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import device
from tests.poison import poison

# Set by `make gpu`.
_LOG = os.environ.get("FUSED_ADAFACTOR_TEST_LOG")
_UNTIL = float(os.environ.get("FUSED_ADAFACTOR_TEST_UNTIL", "inf"))
_DEVICE_LOST = 3
_SHARD = os.environ.get("FUSED_ADAFACTOR_TEST_SHARD")  # "number/count", of several processes
_LONGEST = float(os.environ.get("FUSED_ADAFACTOR_TEST_LONGEST", "0"))  # seconds; a hang beyond


def pytest_report_header() -> str:
    return f"FUSED_ADAFACTOR_TEST_SEED={device.SEED}, {device.BACKEND} on {device.DEVICE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests beside this file, skip them without a GPU, leave out those that are done."""
    done = {} if _LOG is None else _read(Path(_LOG))
    here, reason = Path(__file__).parent, device.missing()
    mine = [item for item in items if here in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if _SHARD is not None:
        number, count = map(int, _SHARD.split("/"))
        items[:] = [item for place, item in enumerate(items) if place % count == number]
    items[:] = [item for item in items if item.nodeid not in done]
    if math.isfinite(_UNTIL):
        items[:] = _in_turn(items)


def _in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first of every test function, then the second: so that each has its share of the time."""
    taken: Counter[str] = Counter()
    turns = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        turns.append(taken[function])
        taken[function] += 1
    return [item for _, item in sorted(zip(turns, items, strict=True), key=lambda pair: pair[0])]


def _read(log: Path) -> dict[str, str]:
    """The last word on every test of a log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {entry["test"]: entry["outcome"] for entry in map(json.loads, lines)}


def _write(**entry: Any) -> None:
    if _LOG is not None:
        with open(_LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="started")
    if _LONGEST and _LOG is not None:
        # Its thread needs no interpreter lock, so it also ends a wait for the device.
        traces = open(f"{_LOG}.hung", "a", encoding="utf-8")  # noqa: SIM115  (open until then)
        faulthandler.dump_traceback_later(_LONGEST, exit=True, file=traces)


def pytest_runtest_setup() -> None:
    if time.time() > _UNTIL:
        pytest.skip("out of time")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.passed else report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        _write(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 3),
            message=message[-4000:],
        )
    if report.failed and device.ON_GPU and _LOG is not None:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # Nothing works on the device in this process any more, not even taking fixtures down.
            os._exit(_DEVICE_LOST)


def pytest_runtest_logfinish() -> None:
    if _LONGEST:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in all other tests; here the memory of the device too."""
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def _done_with_the_device() -> Iterator[None]:
    """What a test has queued is done before the next one starts, and fails in that test."""
    yield
    if device.ON_GPU:
        torch.cuda.synchronize()


@pytest.fixture(params=device.LAUNCHES)
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to launch the kernels, one after the other."""
    monkeypatch.setenv(device.LAUNCH, request.param)
    return str(request.param)
