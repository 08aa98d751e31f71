"""optax.adafactor as a torch optimizer; for matrices and vectors also the rule of T5X."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from fused_adafactor.arguments import (
    Extras,
    is_negative,
    momentum_of,
    require_given,
    require_numbers,
    rule_arguments,
)
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import (
    DecayFactor,
    Eps1Rule,
    Momentum,
    MomentumSite,
    Rule,
    StepCount,
    WeightDecay,
)
from fused_adafactor.schedule import Constant, Custom, PowerDecay, StepSize
from fused_adafactor.spec import TensorId
from fused_adafactor.state import StateLayout

_MIN_PARAM_SCALE = 1e-3  # optax has no argument for it
_GIVEN = ("min_dim_size_to_factor", "decay_rate", "decay_offset", "eps")
_AT_LEAST_ZERO = ("min_dim_size_to_factor", "decay_rate", "eps", "weight_decay_rate")


class Adafactor(AdafactorBase):
    """``optax.adafactor`` for torch parameters.

    Per tensor, with alpha_t = learning_rate max(1e-3, RMS(p)) and u clipped by its RMS::

        m ← momentum m + (1 - momentum) alpha_t u
        p ← (1 - weight_decay_rate) p - m

    v is factored over the two largest dimensions (of equal ones the later counts as the larger) if
    both are long enough. t counts the calls of ``step()`` in which any parameter had a gradient.

    Args:
        params: Parameters, named parameters or param groups.
        learning_rate: A number or one-element tensor, a function of the count of earlier steps (0
            at the first, as optax passes it), or None for 1. The param group keeps it under ``lr``,
            where torch's schedulers look for it; a group may be given either name.
        min_dim_size_to_factor: Least length of the two factored dimensions.
        decay_rate: c in beta2_t = 1 - (t - decay_offset)^-c.
        decay_offset: Steps to forget, as at the start of a fine-tuning.
        multiply_by_parameter_scale: Whether alpha_t holds max(1e-3, RMS(p)).
        clipping_threshold: Of RMS(u), above 0; None for no clipping.
        momentum: In [0, 1]; None for none.
        dtype_momentum: Of the momentum buffer, unless momentum_dtype is given, which every dialect
            takes and which knows 8 bits.
        weight_decay_rate: Fraction that each step takes, not times learning_rate: a number or a
            function of the count of earlier steps; None for none.
        eps: Added to g².
        factored: False keeps v in full.
        weight_decay_mask: Which parameters decay: None for all, a bool, or a function of (name,
            parameter) that returns one. name is None unless the optimizer was given named
            parameters. Not a tree as in optax: torch has param groups for that.
        **extras: See ``fused_adafactor.arguments.Extras``.

    State, by optax' names:
        v_row and v_col, the parameter's shape without its largest and without its second largest
        dimension; v, full shape, where v is not factored; ema, full shape, with momentum. The
        count is ``step`` of every param group. Entries that optax fills with a dummy of shape (1,)
        are left out.

    Raises:
        TypeError: A hyperparameter is no number, or dtype_momentum no dtype.
        ValueError: An argument out of range.

    Differs from ``optax.adafactor``:
        decay_offset > 0 keeps beta2_t at 0 until t has passed it, where optax raises a negative
        number to a power and returns NaN. With a dtype_momentum below the parameter's the step
        takes what the buffer holds, so that resuming is exact; optax takes the value before it is
        rounded. Second moments are float32 for bfloat16 and float16 parameters, and so is the
        arithmetic.

    References:
        Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithms 4 and 5.
    """

    layout = StateLayout(
        row_var="v_row",
        col_var="v_col",
        var="v",
        exp_avg="ema",
        exp_avg_scale="ema_scale",
        keepdim=False,
    )

    aliases: ClassVar[Mapping[str, str]] = {"learning_rate": "lr"}

    def __init__(
        self,
        params: ParamsT,
        learning_rate: float | Tensor | Callable[[int], float] | None = None,
        min_dim_size_to_factor: int = 128,
        decay_rate: float = 0.8,
        decay_offset: int = 0,
        multiply_by_parameter_scale: bool = True,
        clipping_threshold: float | None = 1.0,
        momentum: float | None = None,
        dtype_momentum: torch.dtype = torch.float32,
        weight_decay_rate: float | Callable[[int], float] | None = None,
        eps: float = 1e-30,
        factored: bool = True,
        weight_decay_mask: bool | Callable[[str | None, Tensor], bool] | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        """Check the arguments and build the param groups."""
        defaults = {
            "lr": learning_rate,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "decay_rate": decay_rate,
            "decay_offset": decay_offset,
            "multiply_by_parameter_scale": multiply_by_parameter_scale,
            "clipping_threshold": clipping_threshold,
            "momentum": momentum,
            "dtype_momentum": dtype_momentum,
            "weight_decay_rate": weight_decay_rate,
            "eps": eps,
            "factored": factored,
            "weight_decay_mask": weight_decay_mask,
        }
        _check(defaults)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        momentum, decay = group["momentum"], _decay_rate(group)
        return Rule(
            factoring=Factoring(
                View.LARGEST_TWO if group["factored"] else View.NONE,
                group["min_dim_size_to_factor"],
            ),
            eps1_rule=Eps1Rule.ADD,
            eps1=group["eps"],
            eps2=_MIN_PARAM_SCALE if group["multiply_by_parameter_scale"] else None,
            beta2=PowerDecay(group["decay_rate"], group["decay_offset"]),
            step_size=_step_size(group["lr"]),
            clip_threshold=group["clipping_threshold"],
            momentum=momentum_of(
                group,
                None
                if momentum is None
                else Momentum(MomentumSite.STEP, Constant(momentum), dtype=group["dtype_momentum"]),
            ),
            weight_decay=WeightDecay(decay, DecayFactor.ONE) if decay else None,
            step_count=StepCount.GLOBAL,
            **rule_arguments(group),
        )

    @override
    def _param_rule(self, rule: Rule, id: TensorId, param: Tensor) -> Rule:
        mask = self.param_groups[id.group]["weight_decay_mask"]
        if rule.weight_decay is None or mask is None:
            return rule
        decays = mask(id.name, param) if callable(mask) else mask
        return rule if decays else replace(rule, weight_decay=None)


def _step_size(lr: float | Tensor | Callable[[int], float] | None) -> StepSize:
    if lr is None:
        return StepSize(Constant(1.0))
    if not callable(lr):
        return StepSize()
    return StepSize(Custom(lr, "learning_rate", first=0))


def _decay_rate(group: Mapping[str, Any]) -> float:
    """The coefficient of this step; a rule has a number there, so a schedule is evaluated here."""
    rate = group["weight_decay_rate"]
    if not callable(rate):
        return float(rate or 0.0)
    count = group.get("step", 0.0)
    on_device = isinstance(count, Tensor) and count.device.type != "cpu"
    call = count if on_device or group["capturable"] else float(count)
    value = Custom(rate, "weight_decay_rate", first=0)(call + 1.0)
    assert isinstance(value, float)
    return value


def _check(group: Mapping[str, Any]) -> None:
    numbers = {
        "learning_rate": group["lr"],
        **{key: group[key] for key in _AT_LEAST_ZERO},
        "decay_offset": group["decay_offset"],
        "clipping_threshold": group["clipping_threshold"],
        "momentum": group["momentum"],
    }
    require_numbers(**numbers)
    require_given(**{key: group[key] for key in _GIVEN})
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor learning_rate must be 1-element")
    for name in ("learning_rate", *_AT_LEAST_ZERO):
        value = numbers[name]
        if value is not None and not callable(value) and is_negative(value):
            raise ValueError(f"{name} should be >= 0 but is: {value}")
    clip, momentum = group["clipping_threshold"], group["momentum"]
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clipping_threshold should be > 0 or None but is: {clip}")
    if momentum is not None and not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum should be in [0, 1] or None but is: {momentum}")
    _check_types(group["dtype_momentum"], group["weight_decay_mask"])


def _check_types(dtype: Any, mask: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype_momentum should be a floating point torch.dtype but is: {dtype!r}")
    if mask is not None and not isinstance(mask, bool) and not callable(mask):
        raise TypeError(
            "weight_decay_mask should be None, a bool or a function of (name, parameter) but is a "
            f"{type(mask).__name__}; to name parameters one by one, use param groups"
        )
