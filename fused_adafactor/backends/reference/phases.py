"""The phases of the update, and two activities that have none: what is summed up, and stored.

Only ``apply``, ``accumulate`` and ``average`` write a parameter or its state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_adafactor.backends.reference.formulas import (
    alpha,
    clip_factor,
    decay,
    new_exp_avg_of_update,
    new_factor,
    new_var,
    new_var_max,
    norm,
    numerator,
    read_grad,
    read_unclipped,
    update,
)
from fused_adafactor.backends.reference.work import (
    Partials,
    Work,
    among_all_rows,
    elements_of,
    in_full,
    partials_of,
    read,
    write,
    write_full,
    write_if,
)
from fused_adafactor.blocks import quantise
from fused_adafactor.plan import Phase
from fused_adafactor.rounding import Rounding, Stream, round_kahan, round_nearest, round_stochastic
from fused_adafactor.rule import GradClipKind, MomentumSite, Nonfinite


def stats(b: Work) -> None:
    """Sums over the gradient and the parameter.

    With two sweeps also Σ_i num²/row_var_i: row_var_i is final as soon as row i has been read.
    """
    spec = b.planned.spec
    partials = b.partials = Partials()
    grad = read_grad(b)
    grad_sq = grad.square()
    clip = b.rule.grad_clip
    if clip is not None and clip.kind is GradClipKind.VALUE:
        partials.grad_sq = read_unclipped(b).square().sum()  # an Inf must not hide behind the clip
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
            partials.update_sq = update(b).square().sum()
        elif spec.is_split and not spec.rows_over:
            # Whole matrices, though not all of them: each gives its share of Σu² at once.
            _set_factors(b)
            partials.update_sq = update(b).square().sum()
        else:
            row_var = new_factor(b, b.row_var, partials.row_sq, -1)
            weighted = numerator(b).square() / row_var.unsqueeze(-1)
            partials.col_weighted = weighted.sum(dim=-2)


def _sum_rows(b: Work, row_var: Tensor, row_sq: Tensor) -> None:
    """What the sum of row_var over all processes will follow from.

    Where a row is here as a whole, and its gradient is final, its new second moment is known now.
    Elsewhere the sum follows from two sums, as it is linear in them, or from all rows, where they
    are rounded (``state_dtype``).
    """
    partials = partials_of(b)
    clip = b.rule.grad_clip
    if b.planned.spec.rounds_all_rows:
        partials.all_row_var = among_all_rows(b, read(b, row_var))
        partials.all_row_sq = among_all_rows(b, row_sq)
    elif b.planned.spec.cols_over or (clip is not None and clip.kind is not GradClipKind.VALUE):
        partials.row_var_sum = read(b, row_var).sum(dim=-1)
        partials.row_sq_sum = row_sq.sum(dim=-1)
    else:
        partials.row_var_sum = new_factor(b, row_var, row_sq, -1).sum(dim=-1)


def _set_factors(b: Work) -> None:
    partials = partials_of(b)
    if b.row_var is not None and b.col_var is not None:
        partials.row_var = new_factor(b, b.row_var, partials.row_sq, -1)
        partials.col_var = new_factor(b, b.col_var, partials.col_sq, -2)


def finalize(b: Work) -> None:
    """New row and column second moments, the step size, and Σu² where the first sweep gave it.

    Also whether the tensor is skipped, as its gradient is not finite.
    """
    partials = partials_of(b)
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
        partials.update_sq = (norm(b) * by_col.unsqueeze(-2)).sum()
    b.alpha = alpha(b)


def update_rms(b: Work) -> None:
    """Σu² by a sweep of its own."""
    if b.planned.sweeps == 3:
        partials_of(b).update_sq = update(b).square().sum()


def _set_update_rms(b: Work) -> None:
    update_sq = partials_of(b).update_sq
    if update_sq is not None:
        b.update_rms = (update_sq / b.planned.spec.whole_numel).sqrt()


def apply(b: Work) -> None:
    """Write the parameter, p ← decay p - delta, and every state entry."""
    _set_update_rms(b)
    delta = update(b) / clip_factor(b)
    exp_avg = new_exp_avg_of_update(b, delta)
    if b.rule.momentum is None or b.rule.momentum.site is MomentumSite.GRAD:
        delta = b.alpha * delta
    elif b.rule.momentum.site is MomentumSite.UPDATE:
        delta = b.alpha * exp_avg
    else:
        delta = exp_avg
    _write_moments(b, exp_avg)
    _write_param(b, in_full(b, delta))
    if b.accumulator is not None:
        write(b, b.accumulator, torch.zeros_like(b.accumulator))
    average(b)


def _write_moments(b: Work, exp_avg: Tensor) -> None:
    partials = partials_of(b)
    # var_max is a function of the old second moments, so it goes first.
    if b.var_max is not None:
        write_full(b, b.var_max, new_var_max(b))
    if b.exp_avg is not None:
        _write_exp_avg(b, exp_avg)
    if b.var is not None:
        write(b, b.var, new_var(b))
    for target, factor in ((b.row_var, partials.row_var), (b.col_var, partials.col_var)):
        if target is not None and factor is not None:
            write(b, target, factor)


def _write_exp_avg(b: Work, exp_avg: Tensor) -> None:
    """Store the new first moment; what has been rounded is not changed by rounding it again."""
    assert b.exp_avg is not None
    spec = b.planned.spec
    if b.exp_avg_scale is not None:
        q, scale = quantise(spec.to_lines(exp_avg, spec.swapped))
        exp_avg = spec.from_lines(q, spec.swapped)
        write(b, b.exp_avg_scale, scale)
    write_full(b, b.exp_avg, exp_avg)


def _write_param(b: Work, delta: Tensor) -> None:
    """P ← round(decay p - delta), delta in full shape."""
    spec = b.planned.spec
    value = read(b, b.param)
    if b.compensation is not None:
        value = value + read(b, b.compensation)
    value = decay(b) * value - delta
    if b.compensation is not None:
        rounded, compensation = round_kahan(value, spec.param_dtype)
        write(b, b.compensation, compensation)
    elif b.rule.rounding is Rounding.STOCHASTIC:
        rounded = round_stochastic(
            value, spec.param_dtype, b.rounding_key(Stream.PARAM), elements_of(spec, value.device)
        )
    else:
        rounded = round_nearest(value, spec.param_dtype)
    write(b, b.param, rounded)
    if b.mirror is not None:
        stored, dtype = read(b, b.param), b.mirror.dtype
        if b.rule.rounding is Rounding.STOCHASTIC:
            elements = elements_of(spec, stored.device)
            mirrored = round_stochastic(stored, dtype, b.rounding_key(Stream.PARAM), elements)
        else:
            mirrored = round_nearest(stored, dtype)
        write(b, b.mirror, mirrored)


def accumulate(b: Work) -> None:
    """Add g to the accumulator, between two updates."""
    assert b.grad is not None
    assert b.accumulator is not None
    write(b, b.accumulator, b.accumulator + b.grad.to(b.accumulator.dtype) * b.grad_scale)


def average(b: Work, may_overwrite: bool = True) -> None:
    """Move the EMA of the weights: avg ← momentum avg + (1 - momentum) p, p as it is stored.

    momentum is 0 at t = 1, as in Keras.
    """
    rule = b.rule.weight_average
    if rule is None or b.average is None:
        return
    t = b.scalars.t
    momentum = rule.momentum_at(t)
    param = read(b, b.param)
    write(b, b.average, momentum * read(b, b.average) + (1 - momentum) * param)
    if rule.overwrite_every is not None and may_overwrite:
        due = rule.overwrites_at(t)
        write_if(b, due, b.param, b.average)
        if b.mirror is not None:
            write_if(b, due, b.mirror, round_nearest(read(b, b.param), b.mirror.dtype))
        if b.compensation is not None:  # it belongs to the parameter that was overwritten
            write(b, b.compensation, b.compensation * (1.0 - due * 1.0))


PHASES: dict[Phase, Callable[[Work], None]] = {
    Phase.STATS: stats,
    Phase.FINALIZE: finalize,
    Phase.UPDATE_RMS: update_rms,
    Phase.APPLY: apply,
}
