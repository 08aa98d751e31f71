"""The reference: the update in eager torch, and the specification of every other backend.

No cleverness: one tensor at a time, every formula once, in float64 for float64 tensors and in
float32 otherwise. Equations are numbered as in ``docs/rule.md``; arXiv 1804.04235, Algorithms 4
and 5, is their source.

Nothing here reads a value on the host, and only ``apply`` (and ``accumulate`` and ``average``, the
two activities that have no update) writes a parameter or its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_adafactor.binding import Binding, Exchange
from fused_adafactor.blocks import dequantise, quantise
from fused_adafactor.metrics import Outcome
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.rounding import (
    Rounding,
    Stream,
    round_kahan,
    round_nearest,
    round_stochastic,
)
from fused_adafactor.rule import DecayFactor, Eps1Rule, GradClipKind, MomentumSite, Nonfinite
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorSpec


@dataclass
class _Partials:
    """What passes from phase to phase; row and column sums only, never a full-size tensor."""

    row_sq: Tensor | None = None  # [..., n]  Σ_j g²
    col_sq: Tensor | None = None  # [..., m]  Σ_i g²
    param_sq: Tensor | None = None  # 0-d  Σ p²
    col_weighted: Tensor | None = None  # [..., m]  Σ_i num² / row_var_i, two sweeps only
    # Of distributed rows: the sum of the new row_var, or of the old one where row_sq_sum is there.
    row_var_sum: Tensor | None = None  # [...]  Σ_i row_var_i
    row_sq_sum: Tensor | None = None  # [...]  Σ_ij g²
    # Of distributed rows whose moments are rounded: of all rows, where the others are not yet.
    all_row_var: Tensor | None = None  # [..., whole n]  old row_var_i
    all_row_sq: Tensor | None = None  # [..., whole n]  Σ_j g²
    grad_sq: Tensor | None = None  # 0-d  Σ g² before any clipping
    update_sq: Tensor | None = None  # 0-d  Σ u², once known
    row_var: Tensor | None = None  # [..., n]  new row second moment, not yet stored
    col_var: Tensor | None = None  # [..., m]  new column second moment, not yet stored


@dataclass(kw_only=True, eq=False)
class _Work(Binding):
    """A tensor in one step.

    Attributes:
        grad: Its gradient; None when only the average moves.
        grad_factor: What clipping by a norm multiplies it by, 0-d; else None.
        skip: 0-d bool, true if nothing may be written; None if that cannot be.
        param_rms: Set by ``finalize``: RMS(p), 0-d, if the rule needs it.
        alpha: Set by ``finalize``: the absolute step size alpha_t.
        update_rms: Set by ``apply``: RMS(u) before clipping, 0-d, if the rule clips.
        partials: Partial sums.
    """

    grad: Tensor | None
    grad_factor: Tensor | None = None
    skip: Tensor | None = None
    param_rms: Tensor | None = None
    alpha: Number = 0.0
    update_rms: Tensor | None = None
    partials: _Partials | None = None


class _Executor:
    def __init__(self, bindings: Sequence[Binding]) -> None:
        self.bindings = bindings
        self.outcomes: list[tuple[Tensor | None, Tensor | None, Number]] = []

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        if Phase.STATS in phases:
            exchange.scratch = self._work(exchange)
        work: list[_Work] = exchange.scratch
        _tell(work, exchange)
        for phase in phases:
            for b in work:
                _PHASES[phase](b)
        if Phase.FINALIZE in phases:
            exchange.skip = _skips(work)
        if Phase.APPLY not in phases:
            if Phase.STATS in phases:
                grad_sqs = [_partials(b).grad_sq for b in work]
                exchange.grad_sq = torch.stack([sq for sq in grad_sqs if sq is not None])
            for b in work:
                _share(b, phases)
            return
        self.outcomes = [(b.param_rms, b.update_rms, b.alpha) for b in work]
        if exchange.wants_param_rms:
            exchange.param_rms = torch.stack([b.param_rms for b in work if b.param_rms is not None])

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        work = self._work(exchange)
        _tell(work, exchange)
        for b in work:
            if activity is Activity.ACCUMULATE:
                accumulate(b)
            elif activity is Activity.DROP and b.accumulator is not None:
                _write(b, b.accumulator, torch.zeros_like(b.accumulator))
            idle = activity in (Activity.AVERAGE, Activity.DROP)
            average(b, may_overwrite=not idle or b.rule.overwrites_without_grad)

    def outcome(self) -> Outcome:
        device = self.bindings[0].param.device
        columns = [
            [torch.zeros((), device=device) if value is None else value for value in column]
            for column in zip(*self.outcomes, strict=True)
        ]
        numbers = [
            torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in column])
            for column in columns
        ]
        return Outcome(*numbers)

    def _work(self, exchange: Exchange) -> list[_Work]:
        grads: Sequence[Tensor | None] = exchange.grads or [None] * len(self.bindings)
        pairs = zip(self.bindings, grads, strict=True)
        return [_Work(**vars(binding), grad=grad) for binding, grad in pairs]


def _skips(work: Sequence[_Work]) -> Tensor | None:
    """What is skipped, of all tensors; None if that cannot be."""
    if all(b.skip is None for b in work):
        return None
    never = torch.zeros((), dtype=torch.bool, device=work[0].param.device)
    return torch.stack([never if b.skip is None else b.skip for b in work])


def _share(b: _Work, phases: Sequence[Phase]) -> None:
    """Put what this process has of the sums of a split tensor where they are taken."""
    if not b.sums:
        return
    partials = _partials(b)
    wanted = b.sums[0 if Phase.STATS in phases else 1]
    for name, total in wanted.items():
        if name == "present":
            continue
        mine = getattr(partials, name)
        if name == "update_sq" and partials.col_weighted is not None:
            # What followed from sums over all rows is that of all rows: one process says it.
            mine = mine if b.planned.spec.has_first_row else torch.zeros_like(mine)
        total.copy_(mine)
        setattr(partials, name, total)


def _tell(work: Sequence[_Work], exchange: Exchange) -> None:
    """Give every tensor its part of what the engine has found out."""
    for number, b in enumerate(work):
        b.skip = None if exchange.skip is None else exchange.skip[number]
        b.grad_factor = None if exchange.grad_factor is None else exchange.grad_factor[number]


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements: there is nothing that it cannot."""
    return None


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> _Executor:
    """Make an executor for tensors of one device and one math dtype, none of them empty."""
    return _Executor(bindings)


def stats(b: _Work) -> None:
    """Sums over the gradient and the parameter.

    With two sweeps also Σ_i num²/row_var_i: row_var_i is final as soon as row i has been read.
    """
    spec = b.planned.spec
    partials = b.partials = _Partials()
    grad = _read_grad(b)
    grad_sq = grad.square()
    clip = b.rule.grad_clip
    if clip is not None and clip.kind is GradClipKind.VALUE:
        partials.grad_sq = _read_unclipped(b).square().sum()  # an Inf must not hide behind the clip
    else:
        partials.grad_sq = grad_sq.sum()
    if b.rule.measures_param_rms:
        partials.param_sq = b.param.to(grad.dtype).square().sum()
    if b.row_var is not None:
        partials.row_sq = grad_sq.sum(dim=-1)
        partials.col_sq = grad_sq.sum(dim=-2)
        if spec.rows_over and not spec.is_scattered:  # of what is scattered all rows are known
            _sum_rows(b, b.row_var, partials.row_sq)
    if b.planned.sweeps == 2 and b.rule.clip_threshold is not None:
        if b.row_var is None:
            partials.update_sq = _update(b).square().sum()
        elif spec.is_split and not spec.rows_over:
            # Whole matrices, though not all of them: each gives its share of Σu² at once.
            _set_factors(b)
            partials.update_sq = _update(b).square().sum()
        else:
            row_var = _new_factor(b, b.row_var, partials.row_sq, -1)
            weighted = _numerator(b).square() / row_var.unsqueeze(-1)
            partials.col_weighted = weighted.sum(dim=-2)


def _sum_rows(b: _Work, row_var: Tensor, row_sq: Tensor) -> None:
    """What the sum of row_var over all processes will follow from.

    Where a row is here as a whole, and its gradient is final, its new second moment is known now.
    Elsewhere the sum follows from two sums, as it is linear in them, or from all rows, where they
    are rounded (``state_dtype``).
    """
    partials = _partials(b)
    clip = b.rule.grad_clip
    if b.planned.spec.rounds_all_rows:
        partials.all_row_var = _among_all_rows(b, _read(b, row_var))
        partials.all_row_sq = _among_all_rows(b, row_sq)
    elif b.planned.spec.cols_over or (clip is not None and clip.kind is not GradClipKind.VALUE):
        partials.row_var_sum = _read(b, row_var).sum(dim=-1)
        partials.row_sq_sum = row_sq.sum(dim=-1)
    else:
        partials.row_var_sum = _new_factor(b, row_var, row_sq, -1).sum(dim=-1)


def _among_all_rows(b: _Work, rows: Tensor) -> Tensor:
    """[..., n] as [..., whole n], with zeros for the rows of other processes."""
    spec = b.planned.spec
    assert spec.shard is not None
    assert spec.view is not None
    assert spec.view.permutation is not None
    among = rows.new_zeros(*rows.shape[:-1], spec.whole[spec.view.permutation[-2]])
    among.narrow(-1, spec.shard.offset[spec.view.permutation[-2]], rows.shape[-1]).copy_(rows)
    return among


def finalize(b: _Work) -> None:
    """New row and column second moments, the step size, and Σu² where the first sweep gave it.

    Also whether the tensor is skipped, as its gradient is not finite.
    """
    partials = _partials(b)
    if b.rule.nonfinite is Nonfinite.SKIP:
        assert partials.grad_sq is not None
        broken = ~partials.grad_sq.isfinite()
        b.skip = broken if b.skip is None else b.skip | broken
    _set_factors(b)
    if partials.col_weighted is not None:
        # The two-sweep identity: v_ij = row_var_i col_var_j / norm, so that
        # Σ_ij num_ij² / v_ij = norm Σ_j (1 / col_var_j) Σ_i num_ij² / row_var_i,
        # and the inner sum needs no col_var.
        assert partials.col_var is not None
        by_col = partials.col_weighted / partials.col_var
        partials.update_sq = (_norm(b) * by_col.unsqueeze(-2)).sum()
    b.alpha = _alpha(b)


def update_rms(b: _Work) -> None:
    """Σu² by a sweep of its own."""
    if b.planned.sweeps == 3:
        _partials(b).update_sq = _update(b).square().sum()


def apply(b: _Work) -> None:
    """Write the parameter, p ← decay p - delta, and every state entry."""
    _set_update_rms(b)
    delta = _update(b) / _clip_factor(b)
    exp_avg = _new_exp_avg_of_update(b, delta)
    if b.rule.momentum is None or b.rule.momentum.site is MomentumSite.GRAD:
        delta = b.alpha * delta
    elif b.rule.momentum.site is MomentumSite.UPDATE:
        delta = b.alpha * exp_avg
    else:
        delta = exp_avg
    _write_moments(b, exp_avg)
    _write_param(b, _full(b, delta))
    if b.accumulator is not None:
        _write(b, b.accumulator, torch.zeros_like(b.accumulator))
    average(b)


def accumulate(b: _Work) -> None:
    """Add g to the accumulator, between two updates."""
    assert b.grad is not None
    assert b.accumulator is not None
    _write(b, b.accumulator, b.accumulator + b.grad.to(b.accumulator.dtype) * b.grad_scale)


def average(b: _Work, may_overwrite: bool = True) -> None:
    """Move the EMA of the weights: avg ← momentum avg + (1 - momentum) p, p as it is stored.

    momentum is 0 at t = 1, as in Keras.
    """
    rule = b.rule.weight_average
    if rule is None or b.average is None:
        return
    t = b.scalars.t
    momentum = rule.momentum_at(t)
    param = _read(b, b.param)
    _write(b, b.average, momentum * _read(b, b.average) + (1 - momentum) * param)
    if rule.overwrite_every is not None and may_overwrite:
        due = rule.overwrites_at(t)
        _write_if(b, due, b.param, b.average)
        if b.mirror is not None:
            _write_if(b, due, b.mirror, round_nearest(_read(b, b.param), b.mirror.dtype))
        if b.compensation is not None:  # it belongs to the parameter that was overwritten
            _write(b, b.compensation, b.compensation * (1.0 - due * 1.0))


_PHASES: dict[Phase, Callable[[_Work], None]] = {
    Phase.STATS: stats,
    Phase.FINALIZE: finalize,
    Phase.UPDATE_RMS: update_rms,
    Phase.APPLY: apply,
}


def _read(b: _Work, tensor: Tensor) -> Tensor:
    return tensor.to(b.planned.spec.math_dtype)


def _read_unclipped(b: _Work) -> Tensor:
    """The gradient in the math dtype, full: divided by the loss scale, then averaged."""
    assert b.grad is not None
    grad = _read(b, b.grad) * b.grad_scale
    if b.accumulator is not None:
        grad = (grad + b.accumulator) / b.rule.accumulation_steps
    return grad


def _read_grad(b: _Work) -> Tensor:
    """The gradient in the math dtype and the matrix view: unscaled, averaged, clipped.

    In Keras' order: divide by the loss scale, average over the accumulated steps, clip.
    """
    spec = b.planned.spec
    grad = _read_unclipped(b)
    clip = b.rule.grad_clip
    if clip is not None and clip.kind is GradClipKind.VALUE:
        grad = grad.clamp(-clip.threshold, clip.threshold)
    if b.grad_factor is not None:
        grad = grad * b.grad_factor
    return grad if spec.view is None else spec.view.to_matrices(grad)


def _numerator(b: _Work) -> Tensor:
    """What is divided by the root of v: g, or its average where momentum is on the gradient."""
    if b.rule.momentum is None or b.rule.momentum.site is not MomentumSite.GRAD:
        return _read_grad(b)
    return _new_exp_avg(b, _read_grad(b)) * b.scalars.numerator_scale


def _new_exp_avg(b: _Work, value: Tensor) -> Tensor:
    """First moment after this step, rounded to its dtype and read back, [..., n, m] or full."""
    assert b.exp_avg is not None
    spec, beta1 = b.planned.spec, b.scalars.beta1
    old = b.exp_avg if spec.view is None else spec.view.to_matrices(b.exp_avg)
    if b.exp_avg_scale is None:
        return _read(b, (beta1 * _read(b, old) + (1 - beta1) * value).to(b.exp_avg.dtype))
    q = spec.to_lines(old, spec.swapped)
    old = spec.from_lines(dequantise(q, b.exp_avg_scale, spec.math_dtype), spec.swapped)
    new = spec.to_lines(beta1 * old + (1 - beta1) * value, spec.swapped)
    return spec.from_lines(dequantise(*quantise(new), spec.math_dtype), spec.swapped)


def _write_exp_avg(b: _Work, exp_avg: Tensor) -> None:
    """Store the new first moment; what has been rounded is not changed by rounding it again."""
    assert b.exp_avg is not None
    spec = b.planned.spec
    if b.exp_avg_scale is not None:
        q, scale = quantise(spec.to_lines(exp_avg, spec.swapped))
        exp_avg = spec.from_lines(q, spec.swapped)
        _write(b, b.exp_avg_scale, scale)
    _write_full(b, b.exp_avg, exp_avg)


def _new_exp_avg_of_update(b: _Work, clipped: Tensor) -> Tensor:
    """The first moment after this step, wherever it is; the clipped update where there is none."""
    momentum = b.rule.momentum
    if momentum is None:
        return clipped
    if momentum.site is MomentumSite.GRAD:
        return _new_exp_avg(b, _read_grad(b))
    return _new_exp_avg(b, clipped if momentum.site is MomentumSite.UPDATE else b.alpha * clipped)


def _eps1(b: _Work) -> float:
    spec = b.planned.spec
    return b.rule.eps1_of(spec.param_dtype, spec.math_dtype)


def _new_factor(
    b: _Work, old: Tensor, sums: Tensor | None, reduced: int, part: TensorSpec | None = None
) -> Tensor:
    """Second moment of rows (reduced = -1) or columns (-2), rounded to its dtype and read back.

    var_t = beta2_t var + (1 - beta2_t) (mean of g² [+ eps1] over the reduced dimension, or sum).

    Args:
        b: The tensor.
        old: The second moment.
        sums: Σ g² over the reduced dimension.
        reduced: -1 or -2.
        part: Of which part of the parameter; None for that of this process.
    """
    spec = b.planned.spec if part is None else part
    assert sums is not None
    assert spec.whole_view is not None
    count = spec.whole_view.matrices[reduced]
    stream = Stream.ROW_VAR if reduced == -1 else Stream.COL_VAR
    elements = _elements(spec, sums.device, without=reduced)
    return _read(b, _new_moment(b, old, _mean_or_sum(b, sums, count), stream, elements))


def _mean_or_sum(b: _Work, sums: Tensor, count: int, of: int = 1) -> Tensor:
    """What enters a second moment: the mean of ``count`` g², or their sum, with eps1 added.

    ``sums`` may be that of several, ``of``, such moments.
    """
    if b.grad_factor is not None:
        sums = sums * b.grad_factor.square()
    if b.rule.eps1_rule is Eps1Rule.ADD:
        sums = sums + of * count * _eps1(b)
    return sums if b.rule.sums else sums / count


def _set_factors(b: _Work) -> None:
    partials = _partials(b)
    if b.row_var is not None and b.col_var is not None:
        partials.row_var = _new_factor(b, b.row_var, partials.row_sq, -1)
        partials.col_var = _new_factor(b, b.col_var, partials.col_sq, -2)


def _new_moment(
    b: _Work, old: Tensor, value: Tensor, stream: Stream, elements: Tensor | None
) -> Tensor:
    """beta2_t var + (1 - beta2_t) value in the dtype of var: at random to bfloat16, else nearest.

    Every sweep has the same random bits, and so the same result.
    """
    beta2 = b.scalars.beta2
    new = beta2 * _read(b, old) + (1 - beta2) * value
    return round_stochastic(new, old.dtype, b.rounding_key(stream), elements)


def _norm(b: _Work) -> Tensor:
    """The norm of v_ij = row_var_i col_var_j / norm, [..., 1, 1]: mean(row_var), or its sum."""
    partials, view = _partials(b), b.planned.spec.whole_view
    assert partials.row_var is not None
    assert view is not None
    if partials.all_row_sq is not None:
        assert partials.all_row_var is not None
        assert b.row_var is not None
        old = partials.all_row_var.to(b.row_var.dtype)  # exact: it is what they are kept in
        every_row = b.planned.spec.with_all_rows
        total = _new_factor(b, old, partials.all_row_sq, -1, every_row).sum(dim=-1)
    elif partials.row_var_sum is None:
        total = partials.row_var.sum(dim=-1)
    elif partials.row_sq_sum is None:
        total = partials.row_var_sum
    else:
        new = _mean_or_sum(b, partials.row_sq_sum, view.cols, of=view.rows)
        total = b.scalars.beta2 * partials.row_var_sum + (1 - b.scalars.beta2) * new
    norm = total if b.rule.sums else total / view.rows
    if b.rule.eps1_rule is Eps1Rule.CLAMP:
        norm = norm.clamp(min=_eps1(b))
    return norm[..., None, None]


def _new_var(b: _Work) -> Tensor:
    """Unfactored second moment after this step, in its state dtype."""
    assert b.var is not None
    value = _read_grad(b).square()
    if b.rule.eps1_rule is Eps1Rule.ADD:
        value = value + _eps1(b)
    elements = _elements(b.planned.spec, value.device)
    return _new_moment(b, b.var, value, Stream.VAR, elements)


def _inverse_root(b: _Work) -> Tensor:
    """1 / sqrt(v), never above 1 / eps1 where eps1 clamps v from below by eps1².

    The factors are rooted before they meet: row_var_i col_var_j leaves float32's range long before
    v does.
    """
    if b.var is not None:
        root = _read(b, _new_var(b)).rsqrt()
    else:
        partials = _partials(b)
        assert partials.row_var is not None
        assert partials.col_var is not None
        row_factor = (partials.row_var.unsqueeze(-1) / _norm(b)).rsqrt()
        root = row_factor * partials.col_var.unsqueeze(-2).rsqrt()
    if b.rule.eps1_rule is Eps1Rule.CLAMP:
        root = root.clamp(max=1 / _eps1(b))
    return root


def _new_var_max(b: _Work) -> Tensor:
    """AMSGrad: the largest v so far, in its state dtype.

    Rounded to nearest, in bfloat16 too: a maximum of values that are rounded at random would keep
    every one that came out too large.
    """
    assert b.var_max is not None
    view = b.planned.spec.view
    old = b.var_max if view is None else view.to_matrices(b.var_max)
    return torch.maximum(_read(b, old), _inverse_root(b).square().reciprocal()).to(old.dtype)


def _update(b: _Work) -> Tensor:
    """U before clipping, [..., n, m] or full."""
    if not b.rule.amsgrad:
        return _numerator(b) * _inverse_root(b)
    root = (_read(b, _new_var_max(b)) * b.scalars.amsgrad_scale).sqrt()
    return _numerator(b) / (root + _eps1(b))


def _set_update_rms(b: _Work) -> None:
    update_sq = _partials(b).update_sq
    if update_sq is not None:
        b.update_rms = (update_sq / b.planned.spec.whole_numel).sqrt()


def _clip_factor(b: _Work) -> Number:
    """max(1, RMS(u) / d)."""
    if b.rule.clip_threshold is None:
        return 1.0
    assert b.update_rms is not None
    return (b.update_rms / b.rule.clip_threshold).clamp(min=1.0)


def _alpha(b: _Work) -> Number:
    """alpha_t = max(eps2, RMS(p)) rho_t; sets RMS(p) too."""
    param_sq = _partials(b).param_sq
    if param_sq is not None:
        b.param_rms = (param_sq / b.planned.spec.whole_numel).sqrt()
    if b.rule.eps2 is None:
        return b.scalars.rho
    scale = b.param_rms
    assert scale is not None
    if b.rule.weight_decay is not None and b.rule.weight_decay.before_rms:
        scale = (scale * _decay(b)).abs()
    return scale.clamp(min=b.rule.eps2) * b.scalars.rho


def _decay(b: _Work) -> Number:
    """What the parameter is multiplied by before the update is subtracted."""
    decay = b.rule.weight_decay
    if decay is None:
        return 1.0
    factors: dict[DecayFactor, Number | None] = {
        DecayFactor.ALPHA: b.alpha,
        DecayFactor.LR: b.scalars.lr,
        DecayFactor.ONE: 1.0,
    }
    factor = factors[decay.factor]
    assert factor is not None
    return 1.0 - decay.coefficient * factor


def _write(b: _Work, target: Tensor, value: Tensor) -> None:
    """Store a value, unless the step of this tensor is skipped."""
    target.copy_(value if b.skip is None else torch.where(b.skip, target, value))


def _full(b: _Work, value: Tensor) -> Tensor:
    """[..., n, m] in the shape of the parameter."""
    view = b.planned.spec.view
    return value if view is None else view.from_matrices(value)


def _write_full(b: _Work, target: Tensor, value: Tensor) -> None:
    """Store [..., n, m] in the shape of the parameter, or in that of the matrix it reshapes to."""
    _write(b, target, _full(b, value).reshape(target.shape))


def _write_if(b: _Work, due: bool | Tensor, target: Tensor, value: Tensor) -> None:
    """Store a value where it is due, which may be known on a device only."""
    if isinstance(due, Tensor):
        value = torch.where(due, value, target)
    elif not due:
        return
    _write(b, target, value)


def _write_moments(b: _Work, exp_avg: Tensor) -> None:
    partials = _partials(b)
    # var_max is a function of the old second moments, so it goes first.
    if b.var_max is not None:
        _write_full(b, b.var_max, _new_var_max(b))
    if b.exp_avg is not None:
        _write_exp_avg(b, exp_avg)
    if b.var is not None:
        _write(b, b.var, _new_var(b))
    for target, factor in ((b.row_var, partials.row_var), (b.col_var, partials.col_var)):
        if target is not None and factor is not None:
            _write(b, target, factor)


def _write_param(b: _Work, delta: Tensor) -> None:
    """P ← round(decay p - delta), delta in full shape."""
    spec = b.planned.spec
    value = _read(b, b.param)
    if b.compensation is not None:
        value = value + _read(b, b.compensation)
    value = _decay(b) * value - delta
    if b.compensation is not None:
        rounded, compensation = round_kahan(value, spec.param_dtype)
        _write(b, b.compensation, compensation)
    elif b.rule.rounding is Rounding.STOCHASTIC:
        rounded = round_stochastic(
            value, spec.param_dtype, b.rounding_key(Stream.PARAM), _elements(spec, value.device)
        )
    else:
        rounded = round_nearest(value, spec.param_dtype)
    _write(b, b.param, rounded)
    if b.mirror is not None:
        stored, dtype = _read(b, b.param), b.mirror.dtype
        if b.rule.rounding is Rounding.STOCHASTIC:
            elements = _elements(spec, stored.device)
            mirrored = round_stochastic(stored, dtype, b.rounding_key(Stream.PARAM), elements)
        else:
            mirrored = round_nearest(stored, dtype)
        _write(b, b.mirror, mirrored)


def _elements(spec: TensorSpec, device: torch.device, without: int | None = None) -> Tensor | None:
    """Where the elements of a part are in the whole parameter, row-major; None if it is whole.

    Args:
        spec: The parameter.
        device: For the indices.
        without: Of a factor: the dimension of the matrix view that it lacks, -1 or -2.
    """
    if not spec.is_split or (without is not None and spec.is_scattered):
        return None
    assert spec.shard is not None
    dims = list(range(len(spec.shape)))
    if without is not None:
        assert spec.view is not None
        assert spec.view.permutation is not None
        dims = list(spec.view.permutation)
        del dims[without]
    index = torch.zeros((), dtype=torch.int64, device=device)
    for dim in dims:
        begin = spec.shard.offset[dim]
        along = torch.arange(begin, begin + spec.shape[dim], device=device)
        index = index.unsqueeze(-1) * spec.whole[dim] + along
    return index


def _partials(b: _Work) -> _Partials:
    assert b.partials is not None
    return b.partials
