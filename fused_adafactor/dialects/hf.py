"""transformers.optimization.Adafactor: same signature, defaults, numbers and state keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from fused_adafactor.arguments import (
    Extras,
    is_negative,
    momentum_of,
    require_given,
    require_numbers,
    require_pair,
    rule_arguments,
)
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import DecayFactor, Eps1Rule, Momentum, MomentumSite, Rule, WeightDecay
from fused_adafactor.schedule import Constant, Linear, PowerDecay, StepSize
from fused_adafactor.state import StateLayout

_LARGEST_RELATIVE_STEP = 1e-2
_WARMUP_SLOPE = 1e-6


class Adafactor(AdafactorBase):
    """Drop-in for ``transformers.optimization.Adafactor``.

    Per tensor, with alpha_t = s rho_t and s = max(eps[1], RMS(p)), or 1 without scale_parameter::

        p ← (1 - weight_decay alpha_t) p - alpha_t u / max(1, RMS(u) / clip_threshold)

    u is g / sqrt(v), v factored over the last two dimensions of g² + eps[0]. With beta1 what is
    subtracted is the average of these steps, alpha_t included, without bias correction.

    Args:
        params: Parameters, named parameters or param groups.
        lr: rho_t where relative_step is off, and required there: a number or a one-element tensor.
            None otherwise; what a scheduler writes into the group's lr is then ignored.
        eps: (eps1, eps2): what is added to g², and the floor of RMS(p).
        clip_threshold: Clipping threshold of RMS(u), above 0.
        decay_rate: -c in beta2_t = 1 - t^-c, at most 0.
        beta1: Decay of the first moment in [0, 1); None for no first moment.
        weight_decay: Decoupled, times alpha_t.
        scale_parameter: Scale the step by RMS(p).
        relative_step: rho_t = min(1e-2, t^-1/2), whatever lr is.
        warmup_init: rho_t = min(1e-6 t, t^-1/2). Needs relative_step.
        **extras: See ``fused_adafactor.arguments.Extras``.

    State, by the peer's keys:
        step 0-d, a tensor where the peer has an int (it takes either); exp_avg_sq_row [..., n] and
        exp_avg_sq_col [..., m], or exp_avg_sq in full shape; exp_avg in full shape with beta1; RMS
        0-d, that of the parameter before its last step.

    Raises:
        ValueError: lr together with relative_step, warmup_init without it (transformers' texts), no
            lr where relative_step is off, or an argument out of range.

    Differs from ``transformers.optimization.Adafactor`` where that has a bug:
        The closure of step() runs with gradients enabled. Resuming in bfloat16 is exact. Complex
        parameters are refused. ``AdafactorSchedule`` can be asked for its lr before the first step,
        and another scheduler on lr=None is refused by name. A missing lr is found when the group
        is made. Tensors without elements keep an RMS of 0, not NaN. Creating a distributed state
        dict does not decay the weights.

    References:
        Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithms 4 and 5.
    """

    layout = StateLayout(
        row_var="exp_avg_sq_row",
        col_var="exp_avg_sq_col",
        var="exp_avg_sq",
        param_rms="RMS",
        keepdim=False,
    )
    lr_advice = (
        "Give lr as a number, with relative_step=False; transformers' AdafactorSchedule works with "
        "lr=None, but only reports the step size"
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        """Check the arguments as transformers does and build the param groups."""
        if lr is not None and relative_step:
            raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")
        if warmup_init and not relative_step:
            raise ValueError("`warmup_init=True` requires `relative_step=True`")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        _check(defaults)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        if not group["relative_step"] and group["lr"] is None:
            raise ValueError(
                "lr is None, but relative_step=False takes it as the step size: give lr as a number"
            )
        beta1, decay = group["beta1"], group["weight_decay"]
        return Rule(
            factoring=Factoring(View.LAST_TWO),
            eps1_rule=Eps1Rule.ADD,
            eps1=group["eps"][0],
            eps2=group["eps"][1] if group["scale_parameter"] else None,
            keep_param_rms=True,
            beta2=PowerDecay(-group["decay_rate"]),
            step_size=_step_size(group),
            clip_threshold=group["clip_threshold"],
            momentum=momentum_of(
                group, None if beta1 is None else Momentum(MomentumSite.STEP, Constant(beta1))
            ),
            weight_decay=WeightDecay(decay, DecayFactor.ALPHA) if decay else None,
            **rule_arguments(group),
        )

    # What transformers' AdafactorSchedule and other users of the peer's class call.

    @staticmethod
    def _get_lr(param_group: Mapping[str, Any], param_state: Mapping[str, Any]) -> float | Tensor:
        """alpha_t of a parameter's last step; of its first step, with scale eps2, before that.

        Args:
            param_group: A param group.
            param_state: State of one of its parameters.

        Returns:
            A float, or a 0-d tensor where RMS(p) or a tensor lr is one.
        """
        t = max(float(param_state.get("step", 0.0)), 1.0)
        rho = _step_size(param_group)(t, param_group["lr"])
        if not param_group["scale_parameter"]:
            return rho
        scale: float | Tensor = max(param_group["eps"][1], param_state.get("RMS", 0.0))
        return scale * rho

    @staticmethod
    def _get_options(
        param_group: Mapping[str, Any], param_shape: Sequence[int]
    ) -> tuple[bool, bool]:
        """Whether a parameter of this shape is factored, and whether it has a first moment."""
        return len(param_shape) >= 2, param_group["beta1"] is not None

    @staticmethod
    def _rms(tensor: Tensor) -> Tensor:
        """RMS of a tensor, 0-d."""
        rms: Tensor = tensor.norm(2) / math.sqrt(tensor.numel())
        return rms


def _step_size(group: Mapping[str, Any]) -> StepSize:
    if not group["relative_step"]:
        return StepSize()
    warmup = group["warmup_init"]
    base = Linear(_WARMUP_SLOPE) if warmup else Constant(_LARGEST_RELATIVE_STEP)
    return StepSize(base, inverse_sqrt=True)


def _check(group: Mapping[str, Any]) -> None:
    lr, eps, beta1 = group["lr"], group["eps"], group["beta1"]
    numbers = {key: group[key] for key in ("clip_threshold", "decay_rate", "weight_decay")}
    require_numbers(lr=lr, eps=eps, beta1=beta1, **numbers)
    require_given(**numbers)
    require_pair(eps=eps)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr is not None and is_negative(lr):
        raise ValueError(f"lr should be >= 0 or None but is: {lr}")
    for name, value in zip(("eps[0]", "eps[1]"), eps, strict=True):
        if value is None or not value >= 0.0:
            raise ValueError(f"{name} should be >= 0 but is: {value}")
    if not numbers["clip_threshold"] > 0.0:
        raise ValueError(f"clip_threshold should be > 0 but is: {numbers['clip_threshold']}")
    if not numbers["decay_rate"] <= 0.0:
        raise ValueError(f"decay_rate should be <= 0 but is: {numbers['decay_rate']}")
    if beta1 is not None and not 0.0 <= beta1 < 1.0:
        raise ValueError(f"beta1 should be None or in [0, 1) but is: {beta1}")
    if not numbers["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay should be >= 0 but is: {numbers['weight_decay']}")
