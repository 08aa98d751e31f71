"""The Triton backend for GPUs: one launch steps all tensors of a device and a dtype.

Triton is imported when the first tensors are bound. Where ``TRITON_INTERPRET=1`` was set before
that, the same kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fused_adafactor import launching
from fused_adafactor.binding import Binding
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, launch_form
from fused_adafactor.plan import Phase
from fused_adafactor.spec import TensorSpec
from fused_adafactor.tickets import GPU_CUT

if TYPE_CHECKING:
    from fused_adafactor.backends.triton.launcher import TritonLauncher

INTERPRETER_ENVIRONMENT = "TRITON_INTERPRET"
ENVIRONMENTS = (LAUNCH_ENVIRONMENT,)


def missing() -> str | None:
    """Why this backend cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interprets() and not torch.cuda.is_available():
        return "torch sees no GPU (Triton's interpreter, TRITON_INTERPRET=1, does without)"
    try:
        launch_form()
    except ValueError as error:
        return str(error)
    return None


def steps_on(device: torch.device) -> bool:
    """Whether tensors of a device can be stepped: those of a GPU, or of a CPU if interpreted."""
    return device.type == ("cpu" if interprets() else "cuda")


def refusal(device: torch.device) -> str | None:
    """Why it cannot run on a device of these, or None: Triton says so when it compiles."""
    return None


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get(INTERPRETER_ENVIRONMENT) == "1"


def describe() -> str:
    """How it launches."""
    form, why = launch_form()
    return f"{form} launch, {why}" + (", interpreted" if interprets() else "")


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements, or None."""
    return launching.obstacle(spec, GPU_CUT)


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> launching.Executor:
    """Make an executor for tensors of one device and one math dtype, none of them empty."""
    module = importlib.import_module(f"{__name__}.launcher")
    launcher: TritonLauncher = module.TritonLauncher(bindings[0].planned.spec, launch_form()[0])
    return launching.bind(bindings, segments, launcher)
