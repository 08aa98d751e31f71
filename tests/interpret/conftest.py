"""Tests of the Triton kernels without a GPU: in Triton's interpreter, on tensors of a CPU.

Triton reads ``TRITON_INTERPRET`` when it is imported, so these tests have a process of their own:
``make test-interpret``. Without the variable none of them is collected, and with it nothing else;
``tests/conftest.py`` sees to that.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_adafactor.backends import triton as backend
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from tests.interpret.small import SMALL, use

# A program that waits for what comes later waits for ever: one program runs after the other here.
_LONGEST = 120.0


def pytest_report_header() -> str:
    if backend.interprets():
        return "Triton's interpreter"
    return "needs TRITON_INTERPRET=1 and a process of its own: make test-interpret"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
            # NumPy tells of every 1 / 0 that a mask, or the rule itself, takes care of.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


if backend.interprets():
    from tests.interpret.quicker import patch_once_a_launch, patch_scans_for_the_largest

    patch_once_a_launch()
    patch_scans_for_the_largest()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which tensors of a few hundred elements have everything that large ones have."""
    use(monkeypatch, SMALL)


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
