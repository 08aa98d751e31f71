"""The AdaFactor of adafactor-pytorch (DeadAt0m), and of its fork with ``lr_decay_step``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

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
from fused_adafactor.rule import DecayFactor, Eps1Rule, Momentum, MomentumSite, Rule, WeightDecay
from fused_adafactor.schedule import BiasCorrected, Constant, Custom, Schedule, StepSize
from fused_adafactor.state import StateLayout


class AdaFactor(AdafactorBase):
    """Drop-in for ``AdaFactor`` of DeadAt0m/adafactor-pytorch and of its fork.

    Per tensor, viewed as one matrix [n, m], with s = max(eps2, RMS(p)), m_t the average of the raw
    gradient under beta1_t and v from row and column sums under beta2_t::

        u = m_t / (1 - beta1_t^t) / sqrt(v)
        p ← (1 - weight_decay alpha_t) p - alpha_t u / max(1, RMS(u) / cliping_threshold)

    alpha_t is s rho_t where lr is None or a function, and rho_t where it is a number. A tensor of
    rank 3 or more is reshaped, not permuted: (O, I, h, w) becomes [O w, I h].

    Args:
        params: Parameters, named parameters or param groups.
        lr: None for rho_t = min(1e-2, t^-1/2), a function of t = 1, 2, ..., or a number or
            one-element tensor, which is the absolute step size: not scaled by the parameter.
        beta1: Decay of the first moment: a number in [0, 1) or a function of t; 0 for no first
            moment.
        beta2: Decay of the second moment, likewise.
        eps1: Added to g².
        eps2: Floor of RMS(p).
        cliping_threshold: Clipping threshold of RMS(u), above 0. The spelling is the peer's.
        non_constant_decay: Correct betas that are numbers: beta_t = b (1 - b^(t-1)) / (1 - b^t).
            It switches ams_grad off.
        enable_factorization: False keeps v in full.
        ams_grad: Divide by the running maximum of v. Needs non_constant_decay=False.
        weight_decay: Decoupled, times alpha_t.
        lr_decay_step: Steps, counted as t, at each of which rho_t is multiplied once more by
            lr_decay_factor. They are optimizer steps, whatever the fork's README says of epochs.
        lr_decay_factor: 0 or more; given if and only if lr_decay_step is.
        clipping_threshold: cliping_threshold in its right spelling.
        **extras: See ``fused_adafactor.arguments.Extras``.

    State, by the peer's keys:
        step 0-d; exp_avg_sq_R [1, m] and exp_avg_sq_C [n, 1], column and row sums; exp_avg_sq, in
        full shape, where v is not factored; exp_avg, and exp_avg_sq_hat for ams_grad, in the shape
        of the matrix, or in that of the parameter where that is distributed. Functions stay with
        the optimizer and are not part of its state dict.

    Raises:
        TypeError: A hyperparameter is no number.
        ValueError: An argument out of range; one of the lr_decay pair without the other; both
            spellings of the clipping threshold.

    Differs from the peer where that has a bug:
        An all-zero gradient gives no NaN. Any memory format can be stepped. A lr that is an int is
        a number. State dicts can be pickled. Second moments of float64 parameters are float64. The
        fork's lr_decay has a floor, max(1e-2, ·), that contradicts its description; here rho_t is
        multiplied as described. The fork scales a float lr by the parameter, the original does
        not: neither do we; ``lr=lambda t: 1e-2`` is a constant that is scaled.

    References:
        Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithms 4 and 5; section 7.1 for
        non_constant_decay.
    """

    layout = StateLayout(
        row_var="exp_avg_sq_C",
        col_var="exp_avg_sq_R",
        var="exp_avg_sq",
        var_max="exp_avg_sq_hat",
    )

    aliases: ClassVar[Mapping[str, str]] = {"clipping_threshold": "cliping_threshold"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | Callable[[int], float] | None = None,
        beta1: float | Callable[[int], float] = 0.9,
        beta2: float | Callable[[int], float] = 0.999,
        eps1: float = 1e-30,
        eps2: float = 1e-3,
        cliping_threshold: float = 1,
        non_constant_decay: bool = True,
        enable_factorization: bool = True,
        ams_grad: bool = True,
        weight_decay: float = 0,
        lr_decay_step: Iterable[int] | None = None,
        lr_decay_factor: float | None = None,
        *,
        clipping_threshold: float | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        """Check the arguments and build the param groups."""
        if clipping_threshold is not None:
            if cliping_threshold != 1:
                raise ValueError(
                    "cliping_threshold and clipping_threshold are one argument in two spellings: "
                    f"got {cliping_threshold} and {clipping_threshold}"
                )
            cliping_threshold = clipping_threshold
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps1": eps1,
            "eps2": eps2,
            "cliping_threshold": cliping_threshold,
            "non_constant_decay": non_constant_decay,
            "enable_factorization": enable_factorization,
            "ams_grad": ams_grad,
            "weight_decay": weight_decay,
            "lr_decay_step": None if lr_decay_step is None else tuple(lr_decay_step),
            "lr_decay_factor": lr_decay_factor,
        }
        _check(defaults)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        lr, beta1, decay = group["lr"], group["beta1"], group["weight_decay"]
        corrected = group["non_constant_decay"]
        return Rule(
            factoring=Factoring(View.RESHAPE if group["enable_factorization"] else View.NONE),
            sums=True,
            eps1_rule=Eps1Rule.ADD,
            eps1=group["eps1"],
            eps2=group["eps2"] if lr is None or callable(lr) else None,
            beta2=_beta("beta2", group["beta2"], corrected),
            step_size=_step_size(group),
            clip_threshold=group["cliping_threshold"],
            momentum=momentum_of(
                group,
                None
                if not callable(beta1) and beta1 == 0
                else Momentum(MomentumSite.GRAD, _beta("beta1", beta1, corrected), debias=True),
            ),
            amsgrad=group["ams_grad"] and not corrected,
            weight_decay=WeightDecay(decay, DecayFactor.ALPHA) if decay else None,
            **rule_arguments(group),
        )


def _beta(name: str, value: float | Callable[[int], float], corrected: bool) -> Schedule:
    if callable(value):
        return Custom(value, name, below=1.0)
    return BiasCorrected(value) if corrected else Constant(value)


def _step_size(group: Mapping[str, Any]) -> StepSize:
    lr, milestones = group["lr"], group["lr_decay_step"] or ()
    factor = group["lr_decay_factor"] if milestones else 1.0
    if lr is None:
        return StepSize(Constant(1e-2), True, tuple(milestones), factor)
    return StepSize(Custom(lr, "lr") if callable(lr) else None, False, tuple(milestones), factor)


def _check(group: Mapping[str, Any]) -> None:
    lr, weight_decay = group["lr"], group["weight_decay"]
    numbers = {key: group[key] for key in ("eps1", "eps2", "cliping_threshold", "weight_decay")} | {
        key: group[key] for key in ("lr", "beta1", "beta2") if not callable(group[key])
    }
    require_numbers(**numbers)
    require_given(**{key: value for key, value in numbers.items() if key != "lr"})
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr is not None and not callable(lr) and is_negative(lr):
        raise ValueError(f"lr should be >= 0, None or a function of the step but is: {lr}")
    for name in ("beta1", "beta2"):
        if name in numbers and not 0.0 <= group[name] < 1.0:
            raise ValueError(
                f"{name} should be in [0, 1) or a function of the step but is: {group[name]}"
            )
    for name in ("eps1", "eps2"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} should be >= 0 but is: {group[name]}")
    if not group["cliping_threshold"] > 0.0:
        raise ValueError(f"cliping_threshold should be > 0 but is: {group['cliping_threshold']}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay should be >= 0 but is: {weight_decay}")
    _check_lr_decay(group["lr_decay_step"], group["lr_decay_factor"])


def _check_lr_decay(milestones: Any, factor: Any) -> None:
    if (milestones is None) != (factor is None):
        raise ValueError(
            "lr_decay_step and lr_decay_factor go together: "
            f"got {milestones} and {factor}; give both or neither"
        )
    if milestones is None:
        return
    require_numbers(lr_decay_factor=factor)
    if not factor >= 0.0:
        raise ValueError(f"lr_decay_factor should be >= 0 but is: {factor}")
    is_sequence = isinstance(milestones, tuple | list)
    if not is_sequence or any(isinstance(t, bool) or not isinstance(t, int) for t in milestones):
        raise TypeError(f"lr_decay_step should hold ints but is: {milestones!r}")
