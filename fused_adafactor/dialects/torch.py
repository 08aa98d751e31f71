"""torch.optim.Adafactor: same signature, defaults, numbers and state keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from fused_adafactor.arguments import (
    TorchExtras,
    is_negative,
    momentum_of,
    require_given,
    require_numbers,
    require_pair,
    rule_arguments,
)
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import DecayFactor, Eps1Rule, Rule, WeightDecay
from fused_adafactor.schedule import PowerDecay, StepSize


class Adafactor(AdafactorBase):
    """Drop-in for ``torch.optim.Adafactor``.

    Per tensor, with s = max(eps[1], RMS(p)) and rho_t = min(lr, t^-1/2)::

        p ← (1 - lr weight_decay) p - s rho_t u / max(1, RMS(u) / d)

    u is g / sqrt(v), v factored over the last two dimensions; eps[0] is not added to g² but clamps
    mean(row_var) and, squared, v.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Largest relative step size; it is a cap, so from t > 1 / lr² on it has no effect. Float
            or one-element tensor.
        beta2_decay: -c in beta2_t = 1 - t^-c, at most 0.
        eps: (eps1, eps2): floor of the second moments, and of RMS(p). eps1 None is the machine
            epsilon of each parameter's own dtype.
        d: Clipping threshold of RMS(u), at least 1.
        weight_decay: Decoupled, times lr.
        foreach: Accepted, changes nothing.
        maximize: Step along the gradient.
        **extras: See ``fused_adafactor.arguments.TorchExtras``.

    Raises:
        ValueError: An argument out of range, with torch's texts.

    Differs from ``torch.optim.Adafactor`` where that has a bug or loses precision:
        Second moments are float32 for bfloat16 and float16 parameters, and so is the arithmetic.
        eps1=None is resolved for each tensor, not for the first of a group. An eps1 whose square
        underflows gives no NaN. Tensors without elements are stepped. A copied optimizer can step
        on an accelerator.

    References:
        Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithms 4 and 5.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **extras: Unpack[TorchExtras],
    ) -> None:
        """Check the arguments as torch does and build the param groups."""
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        _check(defaults)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        eps1, eps2 = group["eps"]
        decay = group["weight_decay"]
        return Rule(
            factoring=Factoring(View.LAST_TWO),
            eps1_rule=Eps1Rule.CLAMP,
            eps1=eps1,
            eps2=eps2,
            beta2=PowerDecay(-group["beta2_decay"]),
            step_size=StepSize(inverse_sqrt=True),
            clip_threshold=group["d"],
            momentum=momentum_of(group, None),
            weight_decay=WeightDecay(decay, DecayFactor.LR) if decay else None,
            maximize=group["maximize"],
            **rule_arguments(group),
        )


def _check(group: Mapping[str, Any]) -> None:
    lr, beta2_decay, eps, d, weight_decay = (
        group[key] for key in ("lr", "beta2_decay", "eps", "d", "weight_decay")
    )
    require_numbers(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay)
    require_given(lr=lr, beta2_decay=beta2_decay, d=d, weight_decay=weight_decay)
    require_pair(eps=eps)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if is_negative(lr):
        raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
    if not beta2_decay <= 0.0:
        raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
    if eps[0] is not None and not eps[0] >= 0.0:
        raise ValueError(f"epsilon1 should be >= 0 but is: {eps[0]}")
    if not eps[1] >= 0.0:
        raise ValueError(f"epsilon2 should be >= 0 but is: {eps[1]}")
    if not d >= 1.0:
        raise ValueError(f"Clipping threshold d should be >= 1 but is: {d}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay should be >= 0 but is: {weight_decay}")
