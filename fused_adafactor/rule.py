"""The one parameterised update rule: every axis on which the Adafactors in use differ, as data.

A dialect turns a param group into a ``Rule``; everything below it (state, plan, engine, backends)
reads the rule and knows no dialect. Knobs are numbered K1 to K11 as in ``docs/rule.md``. Formulas
are those of arXiv 1804.04235, Algorithms 4 (matrices) and 5 (vectors); the function that evaluates
them is ``backends/reference``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adafactor.factoring import Factoring
from fused_adafactor.rounding import Rounding
from fused_adafactor.schedule import Number, Schedule, StepSize


class Eps1Rule(str, Enum):
    """Where the regulariser of the squared gradient enters (K2)."""

    ADD = "add"  # mean(g² + eps1): the paper, transformers, Keras, optax
    CLAMP = "clamp"  # mean(row_var) >= eps1 and v >= eps1²: torch.optim


class MomentumSite(str, Enum):
    """What the first moment averages (K7)."""

    GRAD = "grad"  # the gradient, before normalisation: adafactor-pytorch
    UPDATE = "update"  # the clipped update, before the step size: big_vision
    STEP = "step"  # the clipped update times alpha_t: transformers, optax


class DecayFactor(str, Enum):
    """What the weight decay coefficient is multiplied by (K9)."""

    ALPHA = "alpha"  # the absolute step size: transformers, adafactor-pytorch
    LR = "lr"  # the given lr: torch.optim, Keras
    ONE = "one"  # nothing: optax, T5X


class StepCount(str, Enum):
    """Whose steps t counts (K11)."""

    PER_PARAM = "per_param"  # steps in which this parameter had a gradient
    GLOBAL = "global"  # calls of step(): Keras, optax


class Nonfinite(str, Enum):
    """What a NaN or Inf in a gradient does."""

    PROPAGATE = "propagate"
    SKIP = "skip"


class GradClipKind(str, Enum):
    """How gradients are clipped before the rule sees them."""

    VALUE = "value"  # each element to [-threshold, threshold]
    NORM = "norm"  # each tensor by its own norm
    GLOBAL_NORM = "global_norm"  # all tensors by their common norm


@dataclass(frozen=True)
class GradClip:
    """Gradient clipping; for the two norms g is multiplied by min(1, threshold / (norm + eps)).

    eps is 1e-6 for ``torch.nn.utils.clip_grad_norm_`` and 0 for Keras. A norm that is not finite
    makes every gradient that it clips NaN where ``nan_if_not_finite`` (Keras' global norm).
    """

    kind: GradClipKind
    threshold: float
    eps: float = 0.0
    nan_if_not_finite: bool = False


@dataclass(frozen=True)
class Momentum:
    """First moment m_t = beta1_t m + (1 - beta1_t) x, x as ``site`` says.

    Attributes:
        site: What is averaged.
        beta1: Schedule of beta1_t.
        debias: Divide m_t by 1 - beta1_t^t, as adafactor-pytorch.
        dtype: Of the buffer; None for float32 (float64 for float64 parameters), torch.int8 for the
            blocks of ``blocks.py``.
    """

    site: MomentumSite
    beta1: Schedule
    debias: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class WeightDecay:
    """Decoupled weight decay, p multiplied by 1 - coefficient * factor.

    Attributes:
        coefficient: 0 or more.
        factor: What multiplies it.
        before_rms: Keras decays first, so RMS(p) is that of the decayed parameter.
    """

    coefficient: float
    factor: DecayFactor
    before_rms: bool = False


@dataclass(frozen=True)
class WeightAverage:
    """Keras' ``use_ema``: avg = momentum avg + (1 - momentum) p after every call.

    Attributes:
        momentum: In [0, 1].
        overwrite_every: Every so many calls p takes the value of the average; None for never.
    """

    momentum: float
    overwrite_every: int | None = None

    def momentum_at(self, t: Number) -> Number:
        """0 at t = 1, as in Keras."""
        return self.momentum * (1.0 - (t == 1) * t)  # (t == 1) of a tensor would be float32

    def overwrites_at(self, t: Number) -> bool | Tensor:
        """Whether p takes the value of the average."""
        return self.overwrite_every is not None and t % self.overwrite_every == 0


class Scalars(NamedTuple):
    """The numbers of one step in float64: floats, or 0-d tensors where t or lr is on a device."""

    t: Number
    lr: Number | None
    rho: Number
    beta2: Number
    beta1: Number
    numerator_scale: Number  # 1 / (1 - beta1_t^t) where the first moment is debiased, else 1
    amsgrad_scale: Number  # 1 / (1 - beta2_t^t) where AMSGrad is on, else 1


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one step does to one tensor.

    Attributes:
        factoring: K1, the matrix view.
        sums: The second moments hold sums over the reduced dimension, not means
            (adafactor-pytorch's checkpoints).
        eps1_rule: K2, how eps1 enters.
        eps1: K2, its value; None for the machine epsilon of each parameter's own dtype, as
            torch.optim says it.
        beta2: K3.
        step_size: K4, rho_t.
        eps2: K5, the step is scaled by max(eps2, RMS(p)); None switches the parameter scale off.
        clip_threshold: K6, d: u is divided by max(1, RMS(u) / d); None for no clipping.
        momentum: K7, or None.
        amsgrad: K8, the running maximum of v, adafactor-pytorch's form.
        weight_decay: K9, or None.
        keep_param_rms: RMS(p) is measured for the state, even where the step is not scaled by it.
        state_dtype: K10, of the second moments; None for float32 (float64 for float64 parameters).
            To bfloat16 they are rounded at random, whatever ``rounding`` says, but for AMSGrad's
            maximum.
        rounding: K10, how a low-precision parameter is written.
        step_count: K11.
        maximize: Step along the gradient, not against it.
        grad_divisor: Keras' ``loss_scale_factor``: gradients are divided by it first.
        grad_clip: Clipping of the gradients, or None.
        accumulation_steps: Average this many gradients before each update (1: every call updates).
        weight_average: EMA of the weights, or None.
        nonfinite: What NaN or Inf in a gradient does.
        takes_flat: Whether parameters are stepped that were flattened to be distributed.
        expects_param_rms: Whether a backend may know RMS(p) from the step that wrote p.
    """

    factoring: Factoring
    eps1_rule: Eps1Rule
    eps1: float | None
    beta2: Schedule
    step_size: StepSize
    eps2: float | None
    clip_threshold: float | None
    momentum: Momentum | None = None
    amsgrad: bool = False
    weight_decay: WeightDecay | None = None
    sums: bool = False
    keep_param_rms: bool = False
    state_dtype: torch.dtype | None = None
    rounding: Rounding = Rounding.NEAREST
    step_count: StepCount = StepCount.PER_PARAM
    maximize: bool = False
    grad_divisor: float = 1.0
    grad_clip: GradClip | None = None
    accumulation_steps: int = 1
    weight_average: WeightAverage | None = None
    nonfinite: Nonfinite = Nonfinite.PROPAGATE
    takes_flat: bool = False
    expects_param_rms: bool = False

    @property
    def measures_param_rms(self) -> bool:
        """Whether ``FINALIZE`` has to know RMS(p)."""
        return self.eps2 is not None or self.keep_param_rms

    @property
    def loses_without_grad(self) -> bool:
        """Whether the k-th call drops what a tensor without gradient has accumulated: Keras.

        It counts calls for all of them; a count of a tensor's own is that of its gradients.
        """
        return self.accumulation_steps > 1 and self.step_count is StepCount.GLOBAL

    @property
    def moves_without_grad(self) -> bool:
        """Whether a call changes the state of a tensor that has no gradient."""
        return self.weight_average is not None or self.loses_without_grad

    @property
    def overwrites_without_grad(self) -> bool:
        """Whether the average can be due in a call in which a tensor has no gradient.

        Where it counts its own steps none is taken then, so nothing is due.
        """
        return self.step_count is StepCount.GLOBAL

    def eps1_of(self, param_dtype: torch.dtype, math_dtype: torch.dtype) -> float:
        """eps1 for one tensor, large enough that no formula divides by zero.

        Added eps1 stays a normal number of the math dtype. A clamp acts on v through eps1², so
        there eps1 itself stays above the root of the smallest normal number: with the paper's
        1e-30 torch.optim's float32 clamp underflows to 0 and an all-zero row becomes NaN.
        """
        tiny = torch.finfo(math_dtype).tiny
        value = torch.finfo(param_dtype).eps if self.eps1 is None else self.eps1
        return max(value, tiny if self.eps1_rule is Eps1Rule.ADD else math.sqrt(tiny))

    def moment_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the second moments of a parameter."""
        return structure_of(self).moment_dtype(param_dtype)

    def momentum_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the first moment of a parameter; torch.int8 stands for blocks."""
        if self.momentum is not None and self.momentum.dtype is not None:
            return self.momentum.dtype
        return torch.float64 if param_dtype is torch.float64 else torch.float32

    def scalars(self, t: Number, lr: Number | None) -> Scalars:
        """Evaluate every schedule at step t (from 1).

        Args:
            t: The step, a float or a 0-d float64 tensor.
            lr: The group's lr as given, or None where the rule does not use it.

        Raises:
            ValueError: A schedule needs what is not there: a lr that is None, a host t for a
                Python function.
        """
        beta1: Number = 0.0
        numerator_scale: Number = 1.0
        amsgrad_scale: Number = 1.0
        beta2 = self.beta2(t)
        if self.momentum is not None:
            beta1 = self.momentum.beta1(t)
            if self.momentum.debias:
                numerator_scale = 1.0 / (1.0 - beta1**t)
        if self.amsgrad:
            amsgrad_scale = 1.0 / (1.0 - beta2**t)
        rho = self.step_size(t, lr)
        return Scalars(t, lr, rho, beta2, beta1, numerator_scale, amsgrad_scale)

    def update_of(self, call: Number) -> tuple[Number, bool]:
        """The update t that call number ``call`` (from 1) is part of; whether it completes it."""
        k = self.accumulation_steps
        if k == 1:
            return call, True
        if isinstance(call, Tensor):
            raise ValueError(
                "gradient accumulation decides on the host whether a call updates, but the step "
                "counter is on a device; capturable=True, fused=True and nonfinite='skip' keep it "
                "there. Accumulate in .grad instead"
            )
        return float((int(call) - 1) // k + 1), int(call) % k == 0


@dataclass(frozen=True)
class Structure:
    """The part of a rule that shapes a plan and its kernels: switches, dtypes, and no numbers."""

    factored_by: str
    eps1_rule: Eps1Rule
    param_scale: bool
    param_rms: bool
    update_clip: bool
    momentum: MomentumSite | None
    amsgrad: bool
    weight_decay: DecayFactor | None
    rounding: Rounding
    grad_clip: GradClipKind | None
    accumulates: bool
    averages: bool
    skips: bool
    state_dtype: torch.dtype | None

    def moment_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the second moments of a parameter."""
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float64 if param_dtype is torch.float64 else torch.float32


def structure_of(rule: Rule) -> Structure:
    """Return the switches of a rule."""
    return Structure(
        factored_by=rule.factoring.view.value,
        eps1_rule=rule.eps1_rule,
        param_scale=rule.eps2 is not None,
        param_rms=rule.measures_param_rms,
        update_clip=rule.clip_threshold is not None,
        momentum=None if rule.momentum is None else rule.momentum.site,
        amsgrad=rule.amsgrad,
        weight_decay=None if rule.weight_decay is None else rule.weight_decay.factor,
        rounding=rule.rounding,
        grad_clip=None if rule.grad_clip is None else rule.grad_clip.kind,
        accumulates=rule.accumulation_steps > 1,
        averages=rule.weight_average is not None,
        skips=rule.nonfinite is Nonfinite.SKIP,
        state_dtype=rule.state_dtype,
    )
