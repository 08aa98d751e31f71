"""big_vision's Adafactor, with the constructor of timm's ``AdafactorBigVision``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from fused_adafactor.arguments import (
    BigVisionExtras,
    is_negative,
    require_given,
    require_numbers,
    rule_arguments,
)
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import DecayFactor, Eps1Rule, Momentum, MomentumSite, Rule, WeightDecay
from fused_adafactor.schedule import Constant, PowerDecay, StepSize
from fused_adafactor.state import StateLayout

_EPS = 1e-30
_GIVEN = (
    *("lr", "min_dim_size_to_factor", "decay_rate", "decay_offset", "beta2_cap"),
    "weight_decay",
)
_OPTIONAL = ("momentum", "eps", "clipping_threshold")


class Adafactor(AdafactorBase):
    """Drop-in for timm's ``AdafactorBigVision``.

    Per tensor, with u = g / sqrt(v), divided by max(1, RMS(u) / clipping_threshold) if that is
    given::

        m ← momentum m + (1 - momentum) u
        p ← (1 - lr weight_decay) p - lr m

    v is factored over the two largest dimensions (of equal ones the later counts as the larger) if
    both are long enough. The step is not scaled by the parameter.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Step size; a number or one-element tensor.
        min_dim_size_to_factor: Least length of the two factored dimensions.
        decay_rate: c in beta2_t = min(beta2_cap, 1 - max(t - decay_offset, 1)^-c).
        decay_offset: Steps to forget.
        beta2_cap: Largest beta2_t, in [0, 1].
        momentum: In [0, 1]; None for none.
        momentum_dtype: Of the momentum buffer; a dtype, or "float32", "bfloat16" or "float16".
            "int8" or torch.int8, which timm does not take, is 8 bits in blocks of 32 that share a
            scale (``fused_adafactor.blocks``).
        eps: Added to g²; None for 1e-30.
        weight_decay: Decoupled, times lr.
        clipping_threshold: Of RMS(u), above 0; None for no clipping.
        unscaled_wd: Weight decay is not multiplied by lr, as in big_vision itself.
        caution: Refused.
        corrected_weight_decay: Weight decay is multiplied once more by lr / max_lr, max_lr being
            the lr given here, which must then be a positive peak (arXiv 2506.02285).
        **extras: See ``fused_adafactor.arguments.BigVisionExtras``.

    State, by timm's keys:
        step 0-d; exp_avg_sq_r and exp_avg_sq_c, the parameter's shape with its largest and with its
        second largest dimension reduced to 1; exp_avg_sq, full shape, where v is not factored;
        exp_avg, full shape, with momentum. Checkpoints pass both ways; timm casts second moments
        to the parameter's dtype.

    Raises:
        TypeError: A hyperparameter is text.
        ValueError: An argument out of range, with timm's texts where it has one; caution=True;
            corrected_weight_decay without a positive lr, or at the step with a lr that lives on
            an accelerator.

    Differs from ``AdafactorBigVision``:
        Second moments and arithmetic are float32 for bfloat16 and float16 parameters; therefore
        eps None is 1e-30 for those too, where timm takes 1e-7 for float16, whose least number is
        6e-8. The buffer is rounded to momentum_dtype once, when it is written, and the step takes
        what it then holds; timm rounds the incoming update too. clipping, tall matrices,
        decay_offset and eps of mixed dtypes are those of timm 1.0.31, which mended them.

    References:
        Zhai et al., Scaling Vision Transformers, arXiv 2106.04560, section 3.4.
    """

    layout = StateLayout(row_var="exp_avg_sq_r", col_var="exp_avg_sq_c", var="exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        min_dim_size_to_factor: int = 16,
        decay_rate: float = 0.8,
        decay_offset: int = 0,
        beta2_cap: float = 0.999,
        momentum: float | None = 0.9,
        momentum_dtype: str | torch.dtype = torch.bfloat16,
        eps: float | None = None,
        weight_decay: float = 0.0,
        clipping_threshold: float | None = None,
        unscaled_wd: bool = False,
        caution: bool = False,
        corrected_weight_decay: bool = False,
        **extras: Unpack[BigVisionExtras],
    ) -> None:
        """Check the arguments and build the param groups."""
        defaults = {
            "lr": lr,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "decay_rate": decay_rate,
            "decay_offset": decay_offset,
            "beta2_cap": beta2_cap,
            "momentum": momentum,
            "momentum_dtype": _parse_dtype(momentum_dtype),
            "eps": eps,
            "weight_decay": weight_decay,
            "clipping_threshold": clipping_threshold,
            "unscaled_wd": unscaled_wd,
            "caution": caution,
            "corrected_weight_decay": corrected_weight_decay,
        }
        _check(defaults)
        # A number, and not the tensor that lr may be: that one changes in place.
        defaults["max_lr_snapshot"] = float(lr)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        _check_max_lr(group["corrected_weight_decay"], group["max_lr_snapshot"])
        momentum, eps = group["momentum"], group["eps"]
        return Rule(
            factoring=Factoring(View.LARGEST_TWO, group["min_dim_size_to_factor"]),
            eps1_rule=Eps1Rule.ADD,
            eps1=_EPS if eps is None else eps,
            eps2=None,
            beta2=PowerDecay(group["decay_rate"], group["decay_offset"], group["beta2_cap"]),
            step_size=StepSize(),
            clip_threshold=group["clipping_threshold"],
            momentum=None
            if momentum is None
            else Momentum(
                MomentumSite.UPDATE,
                Constant(momentum),
                dtype=_parse_dtype(group["momentum_dtype"]),
            ),
            weight_decay=_weight_decay(group),
            **rule_arguments(group),
        )


def _weight_decay(group: Mapping[str, Any]) -> WeightDecay | None:
    coefficient, lr = group["weight_decay"], group["lr"]
    if not coefficient:
        return None
    if group["corrected_weight_decay"]:
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            raise ValueError(
                "corrected_weight_decay=True needs lr on the host, but it is a tensor on "
                f"{lr.device}: reading it would wait for the device. Give lr as a float"
            )
        coefficient = coefficient * (float(lr) / group["max_lr_snapshot"])
    return WeightDecay(coefficient, DecayFactor.ONE if group["unscaled_wd"] else DecayFactor.LR)


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not (
        parsed.is_floating_point or parsed is torch.int8
    ):
        raise ValueError(
            "momentum_dtype should be 'float32', 'bfloat16', 'float16', 'int8', or torch.int8 or a "
            f"floating point torch.dtype but is: {dtype!r}"
        )
    return parsed


def _check(group: Mapping[str, Any]) -> None:
    require_numbers(**{key: group[key] for key in (*_GIVEN, *_OPTIONAL)})
    require_given(**{key: group[key] for key in _GIVEN})
    lr, clip = group["lr"], group["clipping_threshold"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("learning rate must be a scalar or scalar tensor.")
    if is_negative(lr):
        raise ValueError(f"Invalid learning rate: {lr}")
    for name in ("weight_decay", "min_dim_size_to_factor", "decay_rate", "eps"):
        if group[name] is not None and not group[name] >= 0:
            raise ValueError(f"Invalid {name}: {group[name]}")
    for name in ("beta2_cap", "momentum"):
        if group[name] is not None and not 0.0 <= group[name] <= 1.0:
            raise ValueError(f"{name} should be in [0, 1] but is: {group[name]}")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clipping_threshold should be > 0 or None but is: {clip}")
    if group["caution"]:
        raise ValueError(
            "caution=True is not available: the mask of cautious optimizers needs its own mean "
            "over the whole update, one more pass over every tensor. Use timm's AdafactorBigVision"
        )


def _check_max_lr(corrected: bool, max_lr: float) -> None:
    if corrected and not max_lr > 0.0:
        raise ValueError(
            f"Corrected weight decay requires a positive max lr, got {max_lr}. "
            "Construct the optimizer with the peak lr."
        )
