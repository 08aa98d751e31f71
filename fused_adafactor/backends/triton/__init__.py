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

from fused_adafactor.binding import Binding
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.slabs import geometry_of
from fused_adafactor.spec import TensorSpec
from fused_adafactor.tickets import GPU_CUT

if TYPE_CHECKING:
    from fused_adafactor.backends.triton.executor import Executor

LAUNCH_ENVIRONMENT = "FUSED_ADAFACTOR_LAUNCH"
INTERPRETER_ENVIRONMENT = "TRITON_INTERPRET"
ENVIRONMENTS = (LAUNCH_ENVIRONMENT,)
LAUNCHES = ("persistent", "phases")
_MAX_DIMS = 8


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


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get(INTERPRETER_ENVIRONMENT) == "1"


def launch_form() -> tuple[str, str]:
    """How kernels are launched, ``persistent`` or ``phases``, and why.

    Raises:
        ValueError: FUSED_ADAFACTOR_LAUNCH names neither.
    """
    wanted = os.environ.get(LAUNCH_ENVIRONMENT)
    if wanted:
        if wanted not in LAUNCHES:
            accepted = ", ".join(LAUNCHES)
            raise ValueError(f"{LAUNCH_ENVIRONMENT} must be one of {accepted}, got {wanted!r}")
        return wanted, "asked for"
    if torch.version.hip is not None:
        return "phases", "not measured on AMD yet"
    return "persistent", "one launch for all tensors"


def describe() -> str:
    """How it launches."""
    form, why = launch_form()
    return f"{form} launch, {why}" + (", interpreted" if interprets() else "")


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements, or None."""
    dims = len(geometry_of(spec, GPU_CUT).sizes)
    if dims > _MAX_DIMS:
        return f"has {dims} dimensions that cannot be merged, more than {_MAX_DIMS}"
    if spec.mirror_dtype is not None:
        return "has a mirror, which only the steps of a CPU write"
    return None


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> Executor:
    """Make an executor for tensors of one device and one math dtype, none of them empty."""
    module = importlib.import_module(f"{__name__}.executor")
    executor: Executor = module.Executor(bindings, segments, launch_form()[0])
    if bindings[0].cohort.activity is Activity.UPDATE:
        executor.prepare()
    return executor
