"""A float64 judge of Adafactor, written from the papers and the peers' documentation.

One readable step in three sweeps (statistics, RMS of the update, write), every tensor in float64,
nothing shared with the package under test. What distinguishes one Adafactor from another is a field
of `Knobs`; `torch_knobs`, `hf_knobs`, ... turn a peer's own constructor arguments into `Knobs`.

Where a peer has a bug the oracle does the sane thing: an all-zero gradient never gives NaN, a decay
offset never raises zero or less to a power, and `lr_decay_factor` multiplies the step instead of
being floored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Schedule = Callable[[int], float]


def pow_decay(decay: float, offset: int = 0, cap: float = 1.0) -> Schedule:
    """beta(t) = min(cap, 1 - (t - offset)^-decay), the time never before the first step."""
    return lambda t: min(cap, 1.0 - max(t - offset, 1) ** -decay)


def adam_decay(beta: float) -> Schedule:
    """beta(t) = beta (1 - beta^(t-1)) / (1 - beta^t): Adam's bias correction in the rate itself."""
    return lambda t: beta * (1.0 - beta ** (t - 1)) / (1.0 - beta**t)


def const_decay(beta: float) -> Schedule:
    """beta(t) = beta."""
    return lambda t: beta


def rho_lr(t: int, lr: float) -> float:
    """The learning rate itself."""
    return lr


def rho_capped(t: int, lr: float) -> float:
    """min(lr, t^-1/2)."""
    return min(lr, t**-0.5)


def rho_relative(t: int, lr: float) -> float:
    """min(1e-2, t^-1/2); the learning rate plays no part."""
    return min(1e-2, t**-0.5)


def rho_warmup(t: int, lr: float) -> float:
    """min(1e-6 t, t^-1/2); the learning rate plays no part."""
    return min(1e-6 * t, t**-0.5)


@dataclass(frozen=True)
class Knobs:
    """Every choice that separates one Adafactor from another; the defaults are the paper's.

    `t` is the number of this update, from 1. `lr` is a number, or a callable of the updates made so
    far (from 0; with `step_count="global"` of the calls of `step` so far, micro-steps included).
    """

    # K1: which two dimensions share statistics; the smaller of the two must be at least `min_dim`.
    view: Literal["last2", "largest2", "reshape2d", "none"] = "last2"
    min_dim: int = 0
    # K2: None is finfo(this parameter's dtype).eps for "clamp", 1e-30 (float16: 1e-7) for "add".
    eps1_rule: Literal["add", "clamp"] = "add"
    eps1: float | None = 1e-30
    # K3 to K6
    beta2: Schedule = field(default_factory=lambda: pow_decay(0.8))
    lr: float | Schedule = 1e-2
    rho: Callable[[int, float], float] = rho_capped
    param_scale: bool = True
    eps2: float = 1e-3
    clip_threshold: float | None = 1.0
    # K7: "grad" averages the raw gradient, "update" the clipped update, "step" alpha times that.
    momentum: Literal["none", "grad", "update", "step"] = "none"
    beta1: Schedule = field(default_factory=lambda: const_decay(0.9))
    debias: bool = False
    momentum_dtype: torch.dtype = torch.float64
    cautious: bool = False
    # K8
    amsgrad: bool = False
    # K9: the parameter is multiplied by 1 - weight_decay * (alpha | lr | 1) [* lr / max_lr].
    weight_decay: float = 0.0
    decay_times: Literal["alpha", "lr", "one"] = "lr"
    decay_mask: Sequence[bool] | None = None
    max_lr: float | None = None
    rms_after_decay: bool = False
    # K11 and K12
    step_count: Literal["param", "global"] = "param"
    maximize: bool = False
    loss_scale_factor: float | None = None
    accumulation_steps: int = 1
    clipnorm: float | None = None
    global_clipnorm: float | None = None
    clipvalue: float | None = None
    max_grad_norm: float | None = None
    ema_momentum: float | None = None
    ema_overwrite_frequency: int | None = None


def rms(x: Tensor) -> float:
    """Root mean square over all elements."""
    return math.sqrt(float(x.square().mean()))


def reshape2d(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that adafactor-pytorch makes of a tensor of three or more dimensions.

    The trailing dimensions (all but two) are cut in halves, the first half the larger one. The
    first half joins dimension 1 and the second dimension 0; the elements keep row-major order.
    """
    trailing = shape[2:]
    cut = math.ceil(len(trailing) / 2)
    return shape[0] * math.prod(trailing[cut:]), shape[1] * math.prod(trailing[:cut])


class View:
    """How one parameter's shape is seen as `[..., n, m]`: a reshape, then two dims moved last."""

    def __init__(self, shape: Sequence[int], kind: str, min_dim: int) -> None:
        self.shape = tuple(shape)
        self.work_shape = reshape2d(shape) if kind == "reshape2d" and len(shape) > 2 else self.shape
        order = list(range(len(self.work_shape)))
        if kind == "largest2":
            # The sort is stable: of equal dims the later counts as the larger.
            order.sort(key=lambda d: self.work_shape[d])
        self.dims = tuple(order[-2:])
        self.factored = (
            kind != "none"
            and len(self.dims) == 2
            and min(self.work_shape[d] for d in self.dims) >= min_dim
        )

    def canonical(self, x: Tensor) -> Tensor:
        """Parameter shape -> `[..., n, m]`."""
        return x.reshape(self.work_shape).movedim(self.dims, (-2, -1))

    def original(self, x: Tensor) -> Tensor:
        """`[..., n, m]` -> parameter shape."""
        return x.movedim((-2, -1), self.dims).reshape(self.shape)


class Oracle:
    """Adafactor over a list of parameters in float64.

    Attributes:
        knobs: may be replaced between steps (a scheduler that sets `lr`, say).
        params: float64 tensors; may be assigned between steps (to follow a rounded parameter).
        state: one dict a parameter: `step`; `row_var [..., n]` and `col_var [..., m]`, the means
            over m and over n in the canonical view `[..., n, m]`, or `var`; `exp_avg` (momentum),
            `var_max` (AMSGrad), `accumulated` and `average` (Keras), like `var` in the parameter's
            shape. What the knobs do not ask for is not there.
        calls: calls of `step` so far, micro-steps of gradient accumulation included.
    """

    def __init__(
        self,
        knobs: Knobs,
        params: Sequence[Any],
        param_dtypes: Sequence[torch.dtype] | torch.dtype = torch.float64,
    ) -> None:
        """Copies `params`. `param_dtypes` decides an `eps1` of None; nothing is rounded to it."""
        self.knobs = knobs
        self.params = [_as_float64(p) for p in params]
        if isinstance(param_dtypes, torch.dtype):
            param_dtypes = [param_dtypes] * len(self.params)
        self.dtypes = list(param_dtypes)
        self.views = [View(p.shape, knobs.view, knobs.min_dim) for p in self.params]
        self.state = [self._new_state(i) for i in range(len(self.params))]
        self.calls = 0

    def step(self, grads: Sequence[Any]) -> None:
        """One call of the optimizer; a gradient of None leaves its parameter alone."""
        k = self.knobs
        sign = -1.0 if k.maximize else 1.0
        scale = sign / (k.loss_scale_factor or 1.0)
        given = [None if g is None else scale * _as_float64(g) for g in grads]
        is_update = (self.calls + 1) % k.accumulation_steps == 0
        given = self._accumulate(given, is_update)
        if is_update:
            for i, g in enumerate(self._clip_gradients(given)):
                if g is not None:
                    self._step_param(i, g)
        self._update_average()
        self.calls += 1

    def finalize(self) -> None:
        """Keras' last act: the parameters become their moving averages."""
        if self.knobs.ema_momentum is not None:
            self.params = [s["average"].clone() for s in self.state]

    def _new_state(self, i: int) -> dict[str, Any]:
        k, p, view = self.knobs, self.params[i], self.views[i]
        state: dict[str, Any] = {"step": 0}
        if view.factored:
            shape = view.canonical(p).shape
            state["row_var"] = p.new_zeros(shape[:-1])
            state["col_var"] = p.new_zeros(shape[:-2] + shape[-1:])
        else:
            state["var"] = torch.zeros_like(p)
        wanted = {
            "exp_avg": k.momentum != "none",
            "var_max": k.amsgrad,
            "accumulated": k.accumulation_steps > 1,
            "average": k.ema_momentum is not None,
        }
        return state | {
            name: torch.zeros_like(p) for name, is_wanted in wanted.items() if is_wanted
        }

    def _step_param(self, i: int, g: Tensor) -> None:
        k, p, state = self.knobs, self.params[i], self.state[i]
        count = self.calls if k.step_count == "global" else state["step"]
        lr = float(k.lr(count)) if callable(k.lr) else float(k.lr)
        state["step"] += 1
        t = self.calls // k.accumulation_steps + 1 if k.step_count == "global" else state["step"]
        if p.numel() == 0:
            return

        rho = k.rho(t, lr)
        alpha = rho * self._scale(p)
        decayed = p * (1.0 - self._decay(i, lr, alpha))
        if k.rms_after_decay:
            alpha = rho * self._scale(decayed)

        v = self._second_moment(i, g, t)
        num = self._momentum(state, g, t) if k.momentum == "grad" else g
        update = self._normalise(state, num, v, t, self._eps1(i))
        if k.clip_threshold is not None:
            update = update / max(1.0, rms(update) / k.clip_threshold)
        if k.momentum == "update":
            update = self._momentum(state, update, t)
        if k.cautious:
            agrees = (update * g > 0).double()
            update = update * agrees / max(float(agrees.mean()), 1e-3)
        delta = alpha * update
        if k.momentum == "step":
            delta = self._momentum(state, delta, t)
        self.params[i] = decayed - delta

    def _scale(self, p: Tensor) -> float:
        return max(self.knobs.eps2, rms(p)) if self.knobs.param_scale else 1.0

    def _decay(self, i: int, lr: float, alpha: float) -> float:
        k = self.knobs
        if k.decay_mask is not None and not k.decay_mask[i]:
            return 0.0
        times = {"alpha": alpha, "lr": lr, "one": 1.0}[k.decay_times]
        return k.weight_decay * times * (1.0 if k.max_lr is None else lr / k.max_lr)

    def _eps1(self, i: int) -> float:
        k = self.knobs
        if k.eps1 is not None:
            return k.eps1
        if k.eps1_rule == "clamp":
            return torch.finfo(self.dtypes[i]).eps
        return 1e-7 if self.dtypes[i] == torch.float16 else 1e-30

    def _second_moment(self, i: int, g: Tensor, t: int) -> Tensor:
        """Moves the statistics on and returns the estimate v in the parameter's shape."""
        k, state, view = self.knobs, self.state[i], self.views[i]
        eps1, beta2 = self._eps1(i), k.beta2(t)
        clamp = k.eps1_rule == "clamp"
        squares = g * g if clamp else g * g + eps1
        if view.factored:
            squares = view.canonical(squares)
            row = beta2 * state["row_var"] + (1.0 - beta2) * squares.mean(-1)
            col = beta2 * state["col_var"] + (1.0 - beta2) * squares.mean(-2)
            state["row_var"], state["col_var"] = row, col
            row_mean = row.mean(-1, keepdim=True)
            if clamp:
                row_mean = row_mean.clamp(min=eps1)
            share = torch.where(row_mean == 0, 0.0, row / row_mean)
            v = view.original(share[..., None] * col[..., None, :])
        else:
            v = state["var"] = beta2 * state["var"] + (1.0 - beta2) * squares
        return v.clamp(min=eps1 * eps1) if clamp else v

    def _normalise(
        self, state: dict[str, Any], num: Tensor, v: Tensor, t: int, eps1: float
    ) -> Tensor:
        if self.knobs.amsgrad:
            v = state["var_max"] = torch.maximum(state["var_max"], v)
            denominator = (v / (1.0 - self.knobs.beta2(t) ** t)).sqrt() + eps1
        else:
            denominator = v.sqrt()
        # It is zero only where every gradient so far was: nothing to move, whatever 0 / 0 says.
        return torch.where(denominator == 0, 0.0, num / denominator)

    def _momentum(self, state: dict[str, Any], x: Tensor, t: int) -> Tensor:
        k, beta1 = self.knobs, self.knobs.beta1(t)
        incoming = x.to(k.momentum_dtype).double()
        mean = state["exp_avg"] + (1.0 - beta1) * (incoming - state["exp_avg"])
        state["exp_avg"] = mean = mean.to(k.momentum_dtype).double()
        return mean / (1.0 - beta1**t) if k.debias else mean

    def _accumulate(self, grads: list[Tensor | None], is_update: bool) -> list[Tensor | None]:
        """As Keras: a gradient of None on the updating call loses what was gathered before."""
        k = self.knobs
        if k.accumulation_steps == 1:
            return grads
        totals = [
            None if g is None else g + s["accumulated"]
            for g, s in zip(grads, self.state, strict=True)
        ]
        for total, state in zip(totals, self.state, strict=True):
            if is_update:
                state["accumulated"] = torch.zeros_like(state["accumulated"])
            elif total is not None:
                state["accumulated"] = total
        return [None if total is None else total / k.accumulation_steps for total in totals]

    def _clip_gradients(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        k = self.knobs
        norms = [0.0 if g is None else math.sqrt(float(g.square().sum())) for g in grads]
        total = math.sqrt(sum(norm * norm for norm in norms))
        coefs = [1.0] * len(grads)
        if k.clipnorm is not None:
            coefs = [k.clipnorm / max(norm, k.clipnorm) for norm in norms]
        if k.global_clipnorm is not None:
            # A total that is not finite has no sensible direction; Keras makes every gradient NaN.
            total_coef = k.global_clipnorm / max(total, k.global_clipnorm)
            coefs = [total_coef if math.isfinite(total) else math.nan] * len(grads)
        if k.max_grad_norm is not None:
            total_coef = k.max_grad_norm / (total + 1e-6)
            coefs = [1.0 if total_coef > 1.0 else total_coef] * len(grads)
        limit = math.inf if k.clipvalue is None else k.clipvalue
        return [
            None if g is None else (g * coef).clamp(-limit, limit)
            for g, coef in zip(grads, coefs, strict=True)
        ]

    def _update_average(self) -> None:
        k = self.knobs
        if k.ema_momentum is None:
            return
        # Keras counts updates here while this runs on every call: the average follows the parameter
        # exactly until one update has been counted.
        iterations = self.calls // k.accumulation_steps
        momentum = k.ema_momentum if iterations > 0 else 0.0
        for i, state in enumerate(self.state):
            state["average"] = momentum * state["average"] + (1.0 - momentum) * self.params[i]
            if k.ema_overwrite_frequency and (iterations + 1) % k.ema_overwrite_frequency == 0:
                self.params[i] = state["average"].clone()


def _as_float64(x: Any) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float64, copy=True)


def torch_knobs(
    *,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    foreach: bool | None = None,
    maximize: bool = False,
) -> Knobs:
    """torch.optim.Adafactor; `foreach` does not change the numbers."""
    return Knobs(
        eps1_rule="clamp",
        eps1=eps[0],
        eps2=eps[1],
        beta2=pow_decay(-beta2_decay),
        lr=lr,
        rho=rho_capped,
        clip_threshold=d,
        weight_decay=weight_decay,
        decay_times="lr",
        maximize=maximize,
    )


def hf_knobs(
    *,
    lr: float | None = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
) -> Knobs:
    """transformers.optimization.Adafactor."""
    relative = rho_warmup if warmup_init else rho_relative
    return Knobs(
        eps1=eps[0],
        eps2=eps[1],
        beta2=pow_decay(-decay_rate),
        lr=0.0 if lr is None else lr,
        rho=relative if relative_step else rho_lr,
        param_scale=scale_parameter,
        clip_threshold=clip_threshold,
        momentum="none" if beta1 is None else "step",
        beta1=const_decay(beta1 or 0.0),
        weight_decay=weight_decay,
        decay_times="alpha",
    )


def keras_knobs(
    *,
    learning_rate: float | Schedule = 0.001,
    beta_2_decay: float = -0.8,
    epsilon_1: float = 1e-30,
    epsilon_2: float = 1e-3,
    clip_threshold: float = 1.0,
    relative_step: bool = True,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
    ema_overwrite_frequency: int | None = None,
    loss_scale_factor: float | None = None,
    gradient_accumulation_steps: int | None = None,
    decay_mask: Sequence[bool] | None = None,
) -> Knobs:
    """keras.optimizers.Adafactor.

    A callable `learning_rate` takes the number of earlier `apply` calls, as a Keras schedule does.
    `relative_step` changes nothing there either. `decay_mask` is False for variables given to
    `exclude_from_weight_decay`.
    """
    return Knobs(
        eps1=epsilon_1,
        eps2=epsilon_2,
        beta2=pow_decay(-beta_2_decay),
        lr=learning_rate,
        rho=rho_capped,
        clip_threshold=clip_threshold,
        weight_decay=weight_decay or 0.0,
        decay_times="lr",
        decay_mask=decay_mask,
        rms_after_decay=True,
        step_count="global",
        loss_scale_factor=loss_scale_factor,
        accumulation_steps=gradient_accumulation_steps or 1,
        clipnorm=clipnorm,
        global_clipnorm=global_clipnorm,
        clipvalue=clipvalue,
        ema_momentum=ema_momentum if use_ema else None,
        ema_overwrite_frequency=ema_overwrite_frequency,
    )


def adafactor_pytorch_knobs(
    *,
    lr: float | Schedule | None = None,
    beta1: float | Schedule = 0.9,
    beta2: float | Schedule = 0.999,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    cliping_threshold: float = 1.0,
    non_constant_decay: bool = True,
    enable_factorization: bool = True,
    ams_grad: bool = True,
    weight_decay: float = 0.0,
    lr_decay_step: Sequence[int] | None = None,
    lr_decay_factor: float | None = None,
    scale_parameter: bool | None = None,
) -> Knobs:
    """adafactor-pytorch, and its fork with `lr_decay_step` and `lr_decay_factor`.

    Callables take t from 1. With both decay arguments the step is multiplied by the factor once for
    every entry of `lr_decay_step` that t has reached. `scale_parameter=None` is the original's
    rule, no parameter scale with a float `lr`; the fork always scales.
    """

    def rho(t: int, value: float) -> float:
        base = lr(t) if callable(lr) else rho_relative(t, value) if lr is None else value
        if lr_decay_step is None or lr_decay_factor is None:
            return base
        return base * lr_decay_factor ** sum(t >= step for step in lr_decay_step)

    def schedule(beta: float | Schedule) -> Schedule:
        if callable(beta):
            return beta
        return adam_decay(beta) if non_constant_decay else const_decay(beta)

    has_float_lr = not (lr is None or callable(lr))
    return Knobs(
        view="reshape2d" if enable_factorization else "none",
        eps1=eps1,
        eps2=eps2,
        beta2=schedule(beta2),
        lr=lr if has_float_lr else 0.0,
        rho=rho,
        param_scale=not has_float_lr if scale_parameter is None else scale_parameter,
        clip_threshold=cliping_threshold,
        momentum="grad" if callable(beta1) or beta1 != 0 else "none",
        beta1=schedule(beta1),
        debias=True,
        amsgrad=ams_grad and not non_constant_decay,
        weight_decay=weight_decay,
        decay_times="alpha",
    )


def optax_knobs(
    *,
    learning_rate: float | Schedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    dtype_momentum: torch.dtype = torch.float32,
    weight_decay_rate: float | None = None,
    eps: float = 1e-30,
    factored: bool = True,
    weight_decay_mask: Sequence[bool] | None = None,
) -> Knobs:
    """optax.adafactor; a callable `learning_rate` takes the number of earlier updates."""
    return Knobs(
        view="largest2" if factored else "none",
        min_dim=min_dim_size_to_factor,
        eps1=eps,
        beta2=pow_decay(decay_rate, decay_offset),
        lr=1.0 if learning_rate is None else learning_rate,
        rho=rho_lr,
        param_scale=multiply_by_parameter_scale,
        clip_threshold=clipping_threshold,
        momentum="none" if momentum is None else "step",
        beta1=const_decay(momentum or 0.0),
        momentum_dtype=dtype_momentum,
        weight_decay=weight_decay_rate or 0.0,
        decay_times="one",
        decay_mask=weight_decay_mask,
        step_count="global",
    )


def big_vision_knobs(
    *,
    lr: float = 1.0,
    min_dim_size_to_factor: int = 16,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    beta2_cap: float = 0.999,
    momentum: float | None = 0.9,
    momentum_dtype: torch.dtype = torch.bfloat16,
    eps: float | None = None,
    weight_decay: float = 0.0,
    clipping_threshold: float | None = None,
    unscaled_wd: bool = False,
    caution: bool = False,
    corrected_weight_decay: bool = False,
) -> Knobs:
    """big_vision's Adafactor with the arguments of timm's AdafactorBigVision."""
    return Knobs(
        view="largest2",
        min_dim=min_dim_size_to_factor,
        eps1=eps,
        beta2=pow_decay(decay_rate, decay_offset, beta2_cap),
        lr=lr,
        rho=rho_lr,
        param_scale=False,
        clip_threshold=clipping_threshold,
        momentum="none" if momentum is None else "update",
        beta1=const_decay(momentum or 0.0),
        momentum_dtype=momentum_dtype,
        cautious=caution and momentum is not None,
        weight_decay=weight_decay,
        decay_times="one" if unscaled_wd else "lr",
        max_lr=lr if corrected_weight_decay else None,
    )


def pytorch_optimizer_knobs(
    *,
    lr: float = 1e-3,
    betas: tuple[float | None, float] = (0.9, 0.999),
    decay_rate: float = -0.8,
    weight_decay: float = 0.0,
    fixed_decay: bool = False,
    clip_threshold: float = 1.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    momentum_dtype: torch.dtype = torch.bfloat16,
    foreach: bool | None = None,
    maximize: bool = False,
) -> Knobs:
    """pytorch_optimizer.AdaFactor without `ams_bound` and with decoupled decay."""
    beta1, cap = betas
    relative = rho_warmup if warmup_init else rho_relative
    return Knobs(
        eps1=eps1,
        eps2=eps2,
        beta2=pow_decay(-decay_rate, cap=cap),
        lr=lr,
        rho=relative if relative_step else rho_lr,
        param_scale=scale_parameter,
        clip_threshold=clip_threshold,
        momentum="none" if beta1 is None else "step",
        beta1=const_decay(beta1 or 0.0),
        momentum_dtype=momentum_dtype,
        weight_decay=weight_decay,
        decay_times="one" if fixed_decay else "alpha",
        step_count="global",
        maximize=maximize,
    )
