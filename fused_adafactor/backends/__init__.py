"""Backends: each executes the phases of a plan, and none imports another.

This file names them and chooses one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from fused_adafactor.binding import Binding
from fused_adafactor.plan import Activity, Facts, Phase

ENVIRONMENT = "FUSED_ADAFACTOR_BACKEND"
NAMES = ("reference", "cpp", "triton", "cuda")
REQUESTS = ("auto", *NAMES)

# Why a named backend cannot run; one that is absent here can.
_MISSING = {
    "cpp": "the C++ backend is not part of this version",
    "triton": "the Triton backend is not part of this version",
    "cuda": "the CUDA backend is not part of this version",
}


class Backend(Protocol):
    """What a backend module offers; see ``backends/reference.py``, which is the specification."""

    def run(self, phases: Sequence[Phase], bindings: Sequence[Binding]) -> None:
        """Run phases, in order, on tensors whose activity is an update."""

    def run_activity(self, activity: Activity, bindings: Sequence[Binding]) -> None:
        """Run an activity that has no update."""


def parse_request(backend: str) -> str:
    """Check a ``backend=`` argument.

    "auto" gives way to the environment variable ``FUSED_ADAFACTOR_BACKEND``.

    Raises:
        ValueError: The argument or the variable is not one of ``REQUESTS``.
    """
    source = "backend"
    if backend == "auto":
        source, backend = ENVIRONMENT, os.environ.get(ENVIRONMENT) or "auto"
    if backend not in REQUESTS:
        raise ValueError(f"{source} must be one of {', '.join(REQUESTS)}, got {backend!r}")
    return backend


def availability() -> dict[str, str | None]:
    """For every backend None if it can run here, or the reason why it cannot."""
    return {name: _MISSING.get(name) for name in NAMES}


def choose(request: str, device: torch.device) -> Facts:
    """Choose the backend for tensors on a device.

    Args:
        request: From ``parse_request``. A named backend is used or refused, never replaced.
        device: Where the tensors are.

    Raises:
        RuntimeError: The named backend cannot run.
    """
    if request == "auto":
        reasons = "; ".join(reason for reason in availability().values() if reason is not None)
        return Facts("reference", two_sweep=False, why=f"auto on {device.type}: {reasons}")
    missing = availability()[request]
    if missing is not None:
        raise RuntimeError(
            f"backend={request!r} was asked for, but {missing}. Use backend='auto', or see "
            "`python -m fused_adafactor info`"
        )
    return Facts(request, two_sweep=False, why="asked for")


def load(name: str) -> Backend:
    """Import a backend by its name."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
