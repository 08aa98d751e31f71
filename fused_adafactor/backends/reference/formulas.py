"""The equations of the update, each once; numbered as in ``docs/rule.md``.

Functions of a tensor's memory and of its sums. None of them writes a parameter or its state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_adafactor.backends.reference.work import Work, elements_of, partials_of, read
from fused_adafactor.blocks import dequantise, quantise
from fused_adafactor.rounding import Stream, round_stochastic
from fused_adafactor.rule import DecayFactor, Eps1Rule, GradClipKind, MomentumSite
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorSpec


def read_unclipped(b: Work) -> Tensor:
    """The gradient in the math dtype, full: divided by the loss scale, then averaged."""
    assert b.grad is not None
    grad = read(b, b.grad) * b.grad_scale
    if b.accumulator is not None:
        grad = (grad + b.accumulator) / b.rule.accumulation_steps
    return grad


def read_grad(b: Work) -> Tensor:
    """The gradient in the math dtype and the matrix view: unscaled, averaged, clipped.

    In Keras' order: divide by the loss scale, average over the accumulated steps, clip.
    """
    spec = b.planned.spec
    grad = read_unclipped(b)
    clip = b.rule.grad_clip
    if clip is not None and clip.kind is GradClipKind.VALUE:
        grad = grad.clamp(-clip.threshold, clip.threshold)
    if b.grad_factor is not None:
        grad = grad * b.grad_factor
    return grad if spec.view is None else spec.view.to_matrices(grad)


def numerator(b: Work) -> Tensor:
    """What is divided by the root of v: g, or its average where momentum is on the gradient."""
    if b.rule.momentum is None or b.rule.momentum.site is not MomentumSite.GRAD:
        return read_grad(b)
    return new_exp_avg(b, read_grad(b)) * b.scalars.numerator_scale


def new_exp_avg(b: Work, value: Tensor) -> Tensor:
    """First moment after this step, rounded to its dtype and read back, [..., n, m] or full."""
    assert b.exp_avg is not None
    spec, beta1 = b.planned.spec, b.scalars.beta1
    old = b.exp_avg if spec.view is None else spec.view.to_matrices(b.exp_avg)
    if b.exp_avg_scale is None:
        return read(b, (beta1 * read(b, old) + (1 - beta1) * value).to(b.exp_avg.dtype))
    q = spec.to_lines(old, spec.swapped)
    old = spec.from_lines(dequantise(q, b.exp_avg_scale, spec.math_dtype), spec.swapped)
    new = spec.to_lines(beta1 * old + (1 - beta1) * value, spec.swapped)
    return spec.from_lines(dequantise(*quantise(new), spec.math_dtype), spec.swapped)


def new_exp_avg_of_update(b: Work, clipped: Tensor) -> Tensor:
    """The first moment after this step, wherever it is; the clipped update where there is none."""
    momentum = b.rule.momentum
    if momentum is None:
        return clipped
    if momentum.site is MomentumSite.GRAD:
        return new_exp_avg(b, read_grad(b))
    return new_exp_avg(b, clipped if momentum.site is MomentumSite.UPDATE else b.alpha * clipped)


def eps1(b: Work) -> float:
    """What keeps v from zero."""
    spec = b.planned.spec
    return b.rule.eps1_of(spec.param_dtype, spec.math_dtype)


def _mean_or_sum(b: Work, sums: Tensor, count: int, of: int = 1) -> Tensor:
    """What enters a second moment: the mean of ``count`` g², or their sum, with eps1 added.

    ``sums`` may be that of several, ``of``, such moments.
    """
    if b.grad_factor is not None:
        sums = sums * b.grad_factor.square()
    if b.rule.eps1_rule is Eps1Rule.ADD:
        sums = sums + of * count * eps1(b)
    return sums if b.rule.sums else sums / count


def new_moment(
    b: Work, old: Tensor, value: Tensor, stream: Stream, elements: Tensor | None
) -> Tensor:
    """beta2_t var + (1 - beta2_t) value in the dtype of var: at random to bfloat16, else nearest.

    Every sweep has the same random bits, and so the same result.
    """
    beta2 = b.scalars.beta2
    new = beta2 * read(b, old) + (1 - beta2) * value
    return round_stochastic(new, old.dtype, b.rounding_key(stream), elements)


def new_factor(
    b: Work, old: Tensor, sums: Tensor | None, reduced: int, part: TensorSpec | None = None
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
    elements = elements_of(spec, sums.device, without=reduced)
    return read(b, new_moment(b, old, _mean_or_sum(b, sums, count), stream, elements))


def norm(b: Work) -> Tensor:
    """The norm of v_ij = row_var_i col_var_j / norm, [..., 1, 1]: mean(row_var), or its sum."""
    partials, view = partials_of(b), b.planned.spec.whole_view
    assert partials.row_var is not None
    assert view is not None
    if partials.all_row_sq is not None:
        assert partials.all_row_var is not None
        assert b.row_var is not None
        old = partials.all_row_var.to(b.row_var.dtype)  # exact: it is what they are kept in
        every_row = b.planned.spec.with_all_rows
        total = new_factor(b, old, partials.all_row_sq, -1, every_row).sum(dim=-1)
    elif partials.row_var_sum is None:
        total = partials.row_var.sum(dim=-1)
    elif partials.row_sq_sum is None:
        total = partials.row_var_sum
    else:
        new = _mean_or_sum(b, partials.row_sq_sum, view.cols, of=view.rows)
        total = b.scalars.beta2 * partials.row_var_sum + (1 - b.scalars.beta2) * new
    norm = total if b.rule.sums else total / view.rows
    if b.rule.eps1_rule is Eps1Rule.CLAMP:
        norm = norm.clamp(min=eps1(b))
    return norm[..., None, None]


def new_var(b: Work) -> Tensor:
    """Unfactored second moment after this step, in its state dtype."""
    assert b.var is not None
    value = read_grad(b).square()
    if b.rule.eps1_rule is Eps1Rule.ADD:
        value = value + eps1(b)
    elements = elements_of(b.planned.spec, value.device)
    return new_moment(b, b.var, value, Stream.VAR, elements)


def inverse_root(b: Work) -> Tensor:
    """1 / sqrt(v), never above 1 / eps1 where eps1 clamps v from below by eps1².

    The factors are rooted before they meet: row_var_i col_var_j leaves float32's range long before
    v does.
    """
    if b.var is not None:
        root = read(b, new_var(b)).rsqrt()
    else:
        partials = partials_of(b)
        assert partials.row_var is not None
        assert partials.col_var is not None
        row_factor = (partials.row_var.unsqueeze(-1) / norm(b)).rsqrt()
        root = row_factor * partials.col_var.unsqueeze(-2).rsqrt()
    if b.rule.eps1_rule is Eps1Rule.CLAMP:
        root = root.clamp(max=1 / eps1(b))
    return root


def new_var_max(b: Work) -> Tensor:
    """AMSGrad: the largest v so far, in its state dtype.

    Rounded to nearest, in bfloat16 too: a maximum of values that are rounded at random would keep
    every one that came out too large.
    """
    assert b.var_max is not None
    view = b.planned.spec.view
    old = b.var_max if view is None else view.to_matrices(b.var_max)
    return torch.maximum(read(b, old), inverse_root(b).square().reciprocal()).to(old.dtype)


def update(b: Work) -> Tensor:
    """U before clipping, [..., n, m] or full."""
    if not b.rule.amsgrad:
        return numerator(b) * inverse_root(b)
    root = (read(b, new_var_max(b)) * b.scalars.amsgrad_scale).sqrt()
    return numerator(b) / (root + eps1(b))


def clip_factor(b: Work) -> Number:
    """max(1, RMS(u) / d)."""
    if b.rule.clip_threshold is None:
        return 1.0
    assert b.update_rms is not None
    return (b.update_rms / b.rule.clip_threshold).clamp(min=1.0)


def alpha(b: Work) -> Number:
    """alpha_t = max(eps2, RMS(p)) rho_t; sets RMS(p) too."""
    param_sq = partials_of(b).param_sq
    if param_sq is not None:
        b.param_rms = (param_sq / b.planned.spec.whole_numel).sqrt()
    if b.rule.eps2 is None:
        return b.scalars.rho
    scale = b.param_rms
    assert scale is not None
    if b.rule.weight_decay is not None and b.rule.weight_decay.before_rms:
        scale = (scale * decay(b)).abs()
    return scale.clamp(min=b.rule.eps2) * b.scalars.rho


def decay(b: Work) -> Number:
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
