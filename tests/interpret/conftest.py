"""Tests of the kernels of GPUs without a GPU, on tensors of a CPU: in either of two ways.

Triton's run in Triton's interpreter. It reads ``TRITON_INTERPRET`` when it is imported, so that is
a process of its own, ``make test-interpret``, where nothing else is collected;
``tests/conftest.py`` sees to that. Without the variable the same tests are of the CUDA kernels, in
their emulation: ``tests/emulated.py``.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_adafactor import launching
from fused_adafactor.backends import cuda
from fused_adafactor.backends import triton as backend
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from tests import emulated
from tests.interpret.small import SMALL, use

# A program that waits for what comes later waits for ever: one program runs after the other here.
_LONGEST = 120.0


def pytest_report_header() -> str:
    if backend.interprets():
        return "Triton's interpreter"
    return "CUDA kernels emulated; Triton's interpreter takes TRITON_INTERPRET=1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            if backend.interprets():
                item.add_marker(pytest.mark.interpreter)
            # NumPy tells of every 1 / 0 that a mask, or the rule itself, takes care of.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


if backend.interprets():
    from tests.interpret.quicker import patch_once_a_launch, patch_scans_for_the_largest

    patch_once_a_launch()
    patch_scans_for_the_largest()


@pytest.fixture(scope="session")
def library_of_host() -> Path:
    """The CUDA kernels, compiled for this machine."""
    return emulated.library()


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those that are tested, where Triton does not interpret its own."""
    if backend.interprets():
        yield
        return
    named = str(request.getfixturevalue("library_of_host"))
    monkeypatch.setenv(cuda.LIBRARY_ENVIRONMENT, named)
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which tensors of a few hundred elements have everything that large ones have."""
    use(monkeypatch, SMALL)


@pytest.fixture(autouse=True)
def _nan_in_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums that nobody has taken: those of a part without elements, say."""
    prepare = launching.Executor.prepare

    def poisoned(executor: launching.Executor) -> None:
        prepare(executor)
        executor.scratch.fill_(255)

    monkeypatch.setattr(launching.Executor, "prepare", poisoned)


@pytest.fixture(autouse=True)
def _not_for_ever() -> Iterator[None]:
    faulthandler.dump_traceback_later(_LONGEST, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=LAUNCHES)
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to launch the kernels, one after the other."""
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, request.param)
    return str(request.param)
