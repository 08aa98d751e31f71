"""Backends: each executes the phases of a plan, and none imports another.

This file names them and chooses one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch

from fused_adafactor.binding import Binding, Exchange
from fused_adafactor.metrics import Outcome
from fused_adafactor.plan import Activity, Facts, Phase
from fused_adafactor.spec import Sharing, TensorSpec

ENVIRONMENT = "FUSED_ADAFACTOR_BACKEND"
NAMES = ("reference", "cpp", "triton", "cuda")
REQUESTS = ("auto", *NAMES)

# Those that need more than torch, best first.
_NATIVE = ("triton", "cuda", "cpp")
# Those of them that step what is shared with other processes.
_ABLE = {
    Sharing.NONE: _NATIVE,
    Sharing.PARTS: _NATIVE,
    Sharing.ROUNDED: ("cpp",),
    Sharing.SCATTERED: (),
}
_warned: set[str] = set()  # reasons that have been told


class Executor(Protocol):
    """Steps the tensors that it was made for, as often as it is asked to.

    It holds what follows from the bindings; everything else is in the cohorts and the exchange.
    """

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        """Run phases, in order, of an update."""

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        """Run an activity that has no update."""

    def outcome(self) -> Outcome:
        """What the last update has found out; there has been one."""


class Backend(Protocol):
    """What a backend module offers; see ``backends/reference``, which is the specification."""

    def obstacle(self, spec: TensorSpec) -> str | None:
        """Why it cannot step a tensor that has elements, or None."""

    def bind(self, bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> Executor:
        """Make an executor for tensors of one device and one math dtype, none of them empty.

        Args:
            bindings: The tensors.
            segments: The phases of an update, as they will be run; see ``Plan``.

        Raises:
            ValueError: State that the backend cannot read.
        """


class _Native(Protocol):
    """What a backend offers besides that has to be built."""

    ENVIRONMENTS: tuple[str, ...]  # variables that ask for something the reference cannot do

    def steps_on(self, device: torch.device) -> bool:
        """Whether it steps tensors of a device."""

    def missing(self) -> str | None:
        """Why it cannot run, or None."""

    def refusal(self, device: torch.device) -> str | None:
        """Why it cannot run on one of these devices, or None; it can run somewhere."""

    def describe(self) -> str:
        """What it is, where it can run."""


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
    return {**dict.fromkeys(NAMES), **{n: _native(n).missing() for n in _NATIVE}}


def choose(request: str, device: torch.device, sharing: Sharing = Sharing.NONE) -> Facts:
    """Choose the backend for tensors on a device.

    Args:
        request: From ``parse_request``. A named backend is used or refused, never replaced.
        device: Where the tensors are.
        sharing: What they share with other processes. Refused here and not as an obstacle, so that
            processes with empty parts refuse it too.

    Raises:
        RuntimeError: The named backend cannot run, or native code was asked for by one of its
            environment variables and cannot be had.
    """
    reasons = availability()
    for name in _NATIVE:
        if reasons[name] is not None:
            continue
        if _native(name).steps_on(device):
            reasons[name] = _native(name).refusal(device)
        else:
            reasons[name] = f"the {name} backend does not step tensors on {device.type}"
    unable = {
        name: f"the {name} backend does not step {sharing.value} in this version"
        for name in _NATIVE
        if reasons[name] is None and name not in _ABLE[sharing]
    }
    if request == "auto":
        return _choose_auto(device, reasons, unable)
    missing = reasons[request] or unable.get(request)
    if missing is not None:
        raise RuntimeError(
            f"backend={request!r} was asked for, but {missing}. Use backend='auto', or see "
            "`python -m fused_adafactor info`"
        )
    return Facts(request, two_sweep=request != "reference", why="asked for")


def _choose_auto(
    device: torch.device, reasons: dict[str, str | None], unable: dict[str, str]
) -> Facts:
    """The fastest backend that can run, else the reference with the reasons why it is not.

    One that is only unable to step these tensors may be asked for by a variable: others can be.
    """
    wishes = []
    for name in _NATIVE:
        native = _native(name)
        if not native.steps_on(device) or name in unable:
            continue
        if reasons[name] is None:
            return Facts(name, two_sweep=True, why=f"auto on {device.type}: {native.describe()}")
        wishes += [(v, name) for v in native.ENVIRONMENTS if os.environ.get(v)]
    for variable, name in wishes:
        raise RuntimeError(f"{variable} asks for the {name} backend, but {reasons[name]}")
    others = "; ".join(reason for reason in {**reasons, **unable}.values() if reason is not None)
    if device.type == "cuda":
        _warn_of_reference(device, others)
    return Facts("reference", two_sweep=False, why=f"auto on {device.type}: {others}")


def _warn_of_reference(device: torch.device, reasons: str) -> None:
    """Say, once for all reasons, that tensors of a GPU are not stepped by any of its kernels."""
    if reasons in _warned:
        return
    warnings.warn(
        f"tensors on {device} are stepped by the reference backend, which is slow: {reasons}. "
        "backend='reference' asks for it and silences this; see also "
        "`python -m fused_adafactor info`",
        RuntimeWarning,
        stacklevel=4,
    )
    _warned.add(reasons)


def _native(name: str) -> _Native:
    return cast(_Native, importlib.import_module(f"{__name__}.{name}"))


def load(name: str) -> Backend:
    """Import a backend by its name."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
