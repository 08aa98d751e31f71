"""Arguments that all dialects share: the extras, their checks, and checks of plain numbers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import GradClip, GradClipKind, Momentum, Nonfinite


class SharedExtras(TypedDict, total=False):
    """Keyword-only arguments that every dialect takes beyond its peer's, whatever that has.

    Attributes:
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend is used or refused
            with the reason; "auto" chooses, and ``explain()`` says why. The environment variable
            FUSED_ADAFACTOR_BACKEND sets what "auto" means.
        rounding: How a bfloat16 or float16 parameter is written: "nearest", "stochastic" (bfloat16
            only) or "kahan".
        seed: Key of stochastic rounding; part of the state dict.
        state_dtype: Dtype of the second moments: None for float32 (float64 for float64
            parameters), or torch.float32, torch.float64 or torch.bfloat16. In bfloat16 an average
            stops moving once a step changes it by less than 1/256 of itself.
        max_grad_norm: Clip the gradients of all groups by their common norm inside the step, as
            ``torch.nn.utils.clip_grad_norm_`` before it, without rewriting them; None for no
            clipping.
        nonfinite: "propagate", or "skip" to leave parameter, state and step as they are when a
            gradient holds NaN or Inf, or values whose sum of squares overflows. With a step
            counter per parameter it is that parameter that is skipped, with a global one (Keras,
            optax) or a common norm it is the whole step.
        capturable: Keep the step counter on the device, so that a step never asks the host for its
            number.
        fused: True to take part in torch's GradScaler protocol (``grad_scale`` and ``found_inf``).
        differentiable: Refused: a fused step has no autograd graph.
    """

    backend: str
    rounding: str
    seed: int
    state_dtype: torch.dtype | None
    max_grad_norm: float | None
    nonfinite: str
    capturable: bool
    fused: bool | None
    differentiable: bool


class TorchExtras(SharedExtras, total=False):
    """The extras of a dialect whose peer has a ``foreach`` of its own.

    Attributes:
        momentum_dtype: Dtype of the first moment: None as the dialect has it, torch.float32,
            torch.bfloat16, or torch.int8 for 8 bits in blocks of 32 that share a scale
            (``fused_adafactor.blocks``): 1 + 1/32 bytes an element, each of them rounded to 1/128
            of the largest of its block in every step. The state then has the scales beside the
            moment, under its key with ``_scale`` after it. Needs a first moment.
    """

    momentum_dtype: torch.dtype | None


class BigVisionExtras(SharedExtras, total=False):
    """The extras of a dialect whose peer has a ``momentum_dtype`` of its own.

    Attributes:
        foreach: Accepted, changes nothing: tensors are always stepped together.
    """

    foreach: bool | None


class Extras(TorchExtras, total=False):
    """The extras of a dialect whose peer has none of both.

    Attributes:
        foreach: Accepted, changes nothing: tensors are always stepped together.
    """

    foreach: bool | None


EXTRA_DEFAULTS: dict[str, Any] = {
    "rounding": "nearest",
    "seed": 0,
    "state_dtype": None,
    "momentum_dtype": None,
    "max_grad_norm": None,
    "nonfinite": "propagate",
    "capturable": False,
    "fused": None,
    "foreach": None,
    "differentiable": False,
}
_STATE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)
_MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)


def rule_arguments(group: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a rule that comes from the extras of a param group, as arguments of ``Rule``."""
    norm = group["max_grad_norm"]
    return {
        "rounding": Rounding.parse(group["rounding"]),
        "state_dtype": group["state_dtype"],
        "nonfinite": Nonfinite(group["nonfinite"]),
        "grad_clip": None
        if norm is None
        else GradClip(GradClipKind.GLOBAL_NORM, float(norm), 1e-6),
    }


def momentum_of(group: Mapping[str, Any], momentum: Momentum | None) -> Momentum | None:
    """The first moment of a dialect, in the dtype that the extra asks for.

    Args:
        group: A param group.
        momentum: As the dialect has it; None where it has none.

    Raises:
        ValueError: Another dtype than the extra takes, or one for a moment that is not there.
    """
    dtype = group["momentum_dtype"]
    if dtype not in _MOMENTUM_DTYPES:
        raise ValueError(
            "momentum_dtype must be None, torch.float32, torch.bfloat16 or torch.int8, got "
            f"{dtype!r}"
        )
    if dtype is None:
        return momentum
    if momentum is None:
        raise ValueError(
            f"momentum_dtype={dtype} is for a first moment, but with these arguments there is "
            "none: leave momentum_dtype out, or switch momentum on where the dialect has it (beta1 "
            "of hf and adafactor_pytorch, momentum of optax and big_vision)"
        )
    return replace(momentum, dtype=dtype)


def check_extras(group: Mapping[str, Any]) -> None:
    """Check the values of the extras in a param group."""
    if group["differentiable"]:
        raise ValueError(
            "differentiable=True is not available: the step is fused and writes in place, so "
            "autograd has nothing to go through. Use a functional optimizer for meta-learning"
        )
    for name in ("capturable", "fused", "foreach"):
        if isinstance(group[name], str):
            raise TypeError(f"{name} must be True or False, got the text {group[name]!r}")
    Rounding.parse(group["rounding"])
    if group["nonfinite"] not in [member.value for member in Nonfinite]:
        raise ValueError(f"nonfinite must be 'propagate' or 'skip', got {group['nonfinite']!r}")
    if group["state_dtype"] not in _STATE_DTYPES:
        raise ValueError(
            "state_dtype must be None, torch.float32, torch.float64 or torch.bfloat16, got "
            f"{group['state_dtype']!r}"
            + (
                "; squared gradients leave float16's range"
                if group["state_dtype"] is torch.float16
                else ""
            )
        )
    if (
        isinstance(group["seed"], bool)
        or not isinstance(group["seed"], int)
        or not 0 <= group["seed"] < 2**63
    ):
        raise ValueError(f"seed must be an int from 0 to 2**63 - 1, got {group['seed']!r}")
    require_numbers(max_grad_norm=group["max_grad_norm"])
    if group["max_grad_norm"] is not None and not group["max_grad_norm"] > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {group['max_grad_norm']}")


def require_numbers(**arguments: Any) -> None:
    """Refuse what is no number: text, as command lines and YAML files produce it, lists, bools.

    None and functions pass; whether they will do is the dialect's to say. eps may be a pair.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        pair = name == "eps" and isinstance(value, tuple | list)
        for part in value if pair else (value,):
            if isinstance(part, str):
                raise TypeError(f"{name} must be a number, got the text {part!r}")
            if part is None or callable(part) or isinstance(part, Tensor):
                continue
            if isinstance(part, bool) or not isinstance(part, numbers.Real):
                raise TypeError(f"{name} must be a number, got {part!r}")


def is_negative(lr: float | Tensor) -> bool:
    """Whether a lr is below 0 or NaN. A tensor on a device is not asked."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False
    return not bool(lr >= 0.0)


def require_given(**arguments: Any) -> None:
    """Refuse None where only a number will do.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{name} must be a number, got None")


def require_pair(**arguments: Any) -> None:
    """Refuse what is no pair, such as the single eps of most other optimizers.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{name} must be a pair, got {value!r}")
