"""Arguments that all dialects share: the extras, their checks, and checks of plain numbers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import GradClip, GradClipKind, Momentum, Nonfinite, WeightAverage


class _Shared(TypedDict, total=False):
    """Keyword-only arguments that no peer has.

    Attributes:
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend is used or refused
            with the reason; "auto" chooses, and ``explain()`` says why. The environment variable
            FUSED_ADAFACTOR_BACKEND sets what "auto" means.
        rounding: How a bfloat16 or float16 parameter is written: "nearest", "stochastic" (bfloat16
            only) or "kahan".
        seed: Key of stochastic rounding; part of the state dict.
        state_dtype: Dtype of the second moments: None for float32 (float64 for float64
            parameters), or torch.float32, torch.float64 or torch.bfloat16. In bfloat16 they are
            rounded at random, keyed by ``seed``: rounded to nearest, an average would stop moving
            once a step changes it by less than 1/256 of itself.
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
        flat_parameters: "refuse", or "unfactored" to step parameters that were flattened to be
            distributed: those of FSDP1, and the partitions of DeepSpeed's ZeRO. They are then
            vectors with a second moment for each element, as much memory as Adam's, and each rank
            steps its part as if that were a parameter: RMS(p) and RMS(u) are of the part (of all
            parts only where it is a DTensor), so the numbers depend on how many ranks there are.
        param_rms: "read", or "expected" for whoever writes parameters by this optimizer and by
            what torch counts (``load_state_dict``, in-place operations) alone: the C++ backend
            then knows RMS(p) of a large matrix from the step that wrote it, and reads a quarter
            less. It has the same bits. It finds out where a parameter was written by other means
            (``p.data``, a collective, a kernel of one's own): it warns and corrects the step, but
            what a step from a much larger RMS(p) has rounded away is lost.
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
    flat_parameters: str
    param_rms: str


class _Momentum(TypedDict, total=False):
    """An argument that big_vision's peer has too.

    Attributes:
        momentum_dtype: Dtype of the first moment: None as the dialect has it, torch.float32,
            torch.bfloat16, or torch.int8 for 8 bits in blocks of 32 that share a scale
            (``fused_adafactor.blocks``): 1 + 1/32 bytes an element, each of them rounded to 1/128
            of the largest of its block in every step. The state then has the scales beside the
            moment, under its key with ``_scale`` after it. Needs a first moment.
    """

    momentum_dtype: torch.dtype | None


class _Foreach(TypedDict, total=False):
    """torch.optim's own.

    Attributes:
        foreach: Accepted, changes nothing: tensors are always stepped together.
    """

    foreach: bool | None


class _Keras(TypedDict, total=False):
    """Arguments of Keras' base optimizer, with its defaults.

    At most one of the three kinds of clipping and max_grad_norm can be given.

    Attributes:
        clipnorm: Clip each gradient to this norm of its own; 0 does not clip, as in Keras.
        clipvalue: Clip each element of the gradients to [-clipvalue, clipvalue].
        global_clipnorm: Clip the gradients of all groups by their common norm.
        use_ema: Keep a moving average of the parameters, moved by every call of ``step()``, for
            parameters without gradient too. ``finalize_variable_values`` writes it to them.
        ema_momentum: Of that average, in [0, 1].
        ema_overwrite_frequency: The average is written to the parameters every so many updates;
            None for never.
        loss_scale_factor: What the loss was multiplied by, above 0: gradients are divided by it.
        gradient_accumulation_steps: Update at every k-th call of ``step()``, with the average of
            the gradients since the last one; at least 2, or None. Between two updates only the
            sum of the gradients and the count of steps change, and the count is that of calls;
            schedules see that of updates. Where each parameter has a count of its own, a call
            without a gradient of it is none of its k; with a global count (Keras, optax) it is, and
            a parameter without gradient in the k-th call loses what it gathered.
    """

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None


class TorchExtras(_Shared, _Momentum, _Keras, total=False):
    """The extras of torch's dialect, where ``foreach`` is an argument of its own."""


class BigVisionExtras(_Shared, _Foreach, _Keras, total=False):
    """The extras of big_vision's dialect, where ``momentum_dtype`` is an argument of its own."""


class KerasExtras(_Shared, _Momentum, _Foreach, total=False):
    """The extras of Keras' dialect, where those of Keras are arguments of its own."""


class Extras(_Shared, _Momentum, _Keras, _Foreach, total=False):
    """The extras of all other dialects."""


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
    "flat_parameters": "refuse",
    "param_rms": "read",
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
# Keys of a group that clip by a norm, or by value; one at most. Keras clips by what is above 0.
_CLIPS = {
    "clipnorm": GradClipKind.NORM,
    "clipvalue": GradClipKind.VALUE,
    "global_clipnorm": GradClipKind.GLOBAL_NORM,
}
_STATE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)
_MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)


def rule_arguments(group: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a rule that comes from the extras of a param group, as arguments of ``Rule``."""
    average = None
    if group["use_ema"]:
        average = WeightAverage(group["ema_momentum"], group["ema_overwrite_frequency"] or None)
    return {
        "rounding": Rounding.parse(group["rounding"]),
        "state_dtype": group["state_dtype"],
        "nonfinite": Nonfinite(group["nonfinite"]),
        "takes_flat": group["flat_parameters"] == "unfactored",
        "expects_param_rms": group["param_rms"] == "expected",
        "grad_divisor": group["loss_scale_factor"] or 1.0,
        "grad_clip": _grad_clip(group),
        "accumulation_steps": group["gradient_accumulation_steps"] or 1,
        "weight_average": average,
    }


def _grad_clip(group: Mapping[str, Any]) -> GradClip | None:
    """As torch clips, or as Keras: there a norm of all that is not finite makes all of them NaN."""
    if group["max_grad_norm"] is not None:
        return GradClip(GradClipKind.GLOBAL_NORM, float(group["max_grad_norm"]), 1e-6)
    for key, kind in _CLIPS.items():
        if group[key] is not None and group[key] > 0:
            is_global = kind is GradClipKind.GLOBAL_NORM
            return GradClip(kind, float(group[key]), nan_if_not_finite=is_global)
    return None


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
    if group["flat_parameters"] not in ("refuse", "unfactored"):
        raise ValueError(
            f"flat_parameters must be 'refuse' or 'unfactored', got {group['flat_parameters']!r}"
        )
    if group["param_rms"] not in ("read", "expected"):
        raise ValueError(f"param_rms must be 'read' or 'expected', got {group['param_rms']!r}")
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
    _check_clips(group)
    _check_counts(group)


def _check_clips(group: Mapping[str, Any]) -> None:
    """Keras' check, with its text, and that of what excludes all three."""
    clips = {key: group[key] for key in _CLIPS}
    require_numbers(**clips)
    received = ", ".join(f"{key}={value}" for key, value in clips.items())
    for key, value in clips.items():
        if value is not None and value != value:
            raise ValueError(f"{key} must be a number or None, got {value}")
    if sum(value is not None for value in clips.values()) > 1:
        raise ValueError(
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: "
            + received
        )
    norm = group["max_grad_norm"]
    if norm is not None and any(value is not None for value in clips.values()):
        raise ValueError(
            "max_grad_norm excludes clipnorm, clipvalue and global_clipnorm. Received: "
            f"{received}, max_grad_norm={norm}"
        )


def _check_counts(group: Mapping[str, Any]) -> None:
    """Keras' checks of gradient accumulation and of the average of the weights."""
    scale, steps = group["loss_scale_factor"], group["gradient_accumulation_steps"]
    momentum, every = group["ema_momentum"], group["ema_overwrite_frequency"]
    require_numbers(loss_scale_factor=scale, ema_momentum=momentum)
    if scale is not None and not scale > 0.0:
        raise ValueError(f"loss_scale_factor should be > 0 or None but is: {scale}")
    if steps and not (isinstance(steps, int) and steps >= 2):
        raise ValueError(
            "`gradient_accumulation_steps` must be an integer >= 2. Received: "
            f"gradient_accumulation_steps={steps}"
        )
    if not group["use_ema"]:
        return
    require_given(ema_momentum=momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"`ema_momentum` must be in the range [0, 1]. Received: ema_momentum={momentum}"
        )
    if every and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(
            "`ema_overwrite_frequency` must be an integer >= 1 or None. Received: "
            f"ema_overwrite_frequency={every}"
        )


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
