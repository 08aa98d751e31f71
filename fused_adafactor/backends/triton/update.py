"""The update of a tile of elements: what every sweep computes, whatever the shape of the tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.blocks import read_blocks, stored_in_blocks
from fused_adafactor.backends.triton.formulas import (
    at_most,
    inverse,
    inverse_root,
    new_moment,
    quotient,
    root,
    stored,
)
from fused_adafactor.backends.triton.memory import number, pointer, read, read_grad


@triton.jit
def mean_or_sum(total, count, rule, V: tl.constexpr):
    """What enters a second moment: the mean of ``count`` g², or their sum, with eps1 added."""
    many = tl.zeros(total.shape, V.MATH) + count.to(V.MATH)
    total += many * number(rule, f.ADDED, V)
    return tl.where(number(rule, f.SUM_MOMENTS, V) > 0, total, quotient(total, many))


@triton.jit
def new_factor(old, total, count, rule, V: tl.constexpr):
    """Second moment of rows or columns, as it will be read back."""
    value = mean_or_sum(total, count, rule, V)
    new = new_moment(old, value, number(rule, f.BETA2, V), number(rule, f.REST2, V))
    return stored(new, V.MOMENT)


@triton.jit
def new_exp_avg(row, rule, value, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """First moment after this step, as it will be read back."""
    if V.EXP_AVG == tl.int8:
        old = read_blocks(row, k, mask, TINY, V)
    else:
        old = read(row, f.EXP_AVG, f.STATE_STRIDES, V.EXP_AVG, k, mask, V)
    new = tl.fma(number(rule, f.REST1, V), value, number(rule, f.BETA1, V) * old)
    if V.EXP_AVG == tl.int8:
        new = stored_in_blocks(row, new, mask, TINY, V)
    else:
        new = stored(new, V.EXP_AVG)
    return new


@triton.jit
def numerator(row, rule, grad, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """num and the new average of g: num is that average where momentum is on the gradient, or g."""
    exp_avg = grad
    num = grad
    if V.MOMENTUM == 1:
        exp_avg = new_exp_avg(row, rule, grad, k, mask, TINY, V)
        num = exp_avg * number(rule, f.NUMERATOR_SCALE, V)
    return num, exp_avg


@triton.jit
def new_var(row, rule, grad, k, mask, V: tl.constexpr):
    """Unfactored second moment after this step, as it will be read back."""
    old = read(row, f.VAR, f.STATE_STRIDES, V.MOMENT, k, mask, V)
    value = tl.fma(grad, grad, number(rule, f.ADDED, V))
    new = new_moment(old, value, number(rule, f.BETA2, V), number(rule, f.REST2, V))
    return stored(new, V.MOMENT)


@triton.jit
def tiny_factors(row, rule, grad, factor, k, mask, V: tl.constexpr):
    """The factors of tiny matrices, for each element: 1 / sqrt(v), row_var and col_var.

    Every element takes the sums of its own row, its own column and all rows, from the L1 cache.
    """
    rows = tl.load(row + f.MATRIX_ROWS)
    cols = tl.load(row + f.MATRIX_COLS)
    matrix = k // (rows * cols)
    own_row = (k // cols % rows).to(tl.int32)
    own_col = (k % cols).to(tl.int32)
    row_var = tl.zeros(k.shape, V.MATH)
    col_sq = tl.zeros(k.shape, V.MATH)
    total = tl.zeros(k.shape, V.MATH)
    line_var = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V)
    cross_var = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V)
    for i in range(0, rows):
        row_sq = tl.zeros(k.shape, V.MATH)
        for j in range(0, cols):
            x = read_grad(row, rule, grad, factor, (matrix * rows + i) * cols + j, mask, V)
            square = x * x
            row_sq += square
            col_sq += tl.where(own_col == j, square, 0.0)
        old = tl.load(line_var + matrix * rows + i, mask=mask, other=0.0).to(V.MATH)
        new = new_factor(old, row_sq, cols, rule, V)
        total += new
        row_var = tl.where(own_row == i, new, row_var)
    old = tl.load(cross_var + matrix * cols + own_col, mask=mask, other=0.0).to(V.MATH)
    col_var = new_factor(old, col_sq, rows, rule, V)
    many = tl.zeros(k.shape, V.MATH) + rows.to(V.MATH)
    mean = tl.where(number(rule, f.SUM_MOMENTS, V) > 0, total, quotient(total, many))
    least = number(rule, f.LEAST_NORM, V)
    norm = tl.where(mean < least, least, mean)
    inverse_v = inverse_root(quotient(row_var, norm)) * inverse_root(col_var)
    return inverse_v, row_var, col_var


@triton.jit
def write_tiny_factors(row, row_var, col_var, k, mask, V: tl.constexpr):
    """Store the second moments of tiny matrices, once nobody reads the old ones any more."""
    rows = tl.load(row + f.MATRIX_ROWS)
    cols = tl.load(row + f.MATRIX_COLS)
    matrix = k // (rows * cols)
    line_var = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V)
    cross_var = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V)
    own_row = k // cols % rows
    own_col = k % cols
    tl.debug_barrier()
    tl.store(line_var + matrix * rows + own_row, row_var.to(V.MOMENT), mask=mask & (own_col == 0))
    tl.store(cross_var + matrix * cols + own_col, col_var.to(V.MOMENT), mask=mask & (own_row == 0))


@triton.jit
def update_of(row, rule, grad, inverse_v, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """u before clipping, from g and 1 / sqrt(v); also the new average of g and maximum of v."""
    num, exp_avg = numerator(row, rule, grad, k, mask, TINY, V)
    inverse_v = at_most(inverse_v, number(rule, f.MOST_ROOT, V))
    var_max = inverse_v
    if V.AMSGRAD:
        var = inverse(inverse_v * inverse_v)
        old = read(row, f.VAR_MAX, f.STATE_STRIDES, V.MOMENT, k, mask, V)
        larger = (var > old) | (var != var)  # NaN of either stays
        var_max = stored(tl.where(larger, var, old), V.MOMENT)
        below = root(var_max * number(rule, f.AMSGRAD_SCALE, V)) + number(rule, f.EPS1, V)
        value = quotient(num, below)
    else:
        value = num * inverse_v
    return tl.where(mask, value, 0.0), exp_avg, var_max
