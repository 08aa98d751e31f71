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
    random16,
    random16_of_blocks,
    root,
    round_nearest,
    stored,
    to_bfloat16_stochastic,
)
from fused_adafactor.backends.triton.memory import (
    block_of,
    element_of,
    matrix_of,
    number,
    pointer,
    read,
    read_grad,
)


@triton.jit
def mean_or_sum(total, count, rule, V: tl.constexpr):
    """What enters a second moment: the mean of ``count`` g², or their sum, with eps1 added."""
    many = tl.zeros(total.shape, V.MATH) + count.to(V.MATH)
    total += many * number(rule, f.ADDED, V)
    return tl.where(number(rule, f.SUM_MOMENTS, V) > 0, total, quotient(total, many))


@triton.jit
def random_of_factor(row, integers, element, ACROSS: tl.constexpr, V: tl.constexpr):
    """Random bits of second moments of lines, or of what lies across them; 0 where none are wanted.

    ``element`` is the number of each in its entry of the state of the whole parameter.
    """
    random = tl.zeros(element.shape, tl.uint32)
    if V.MOMENT == tl.bfloat16:
        # The stream follows the name: lines are columns where the matrix lies the other way.
        swapped = tl.load(row + f.SWAPPED)
        stream = f.COL_VAR_STREAM - swapped if ACROSS else f.ROW_VAR_STREAM + swapped
        seed = tl.load(integers + f.SEED)
        step = tl.load(integers + f.STEP)
        INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
        random = random16(element.to(INDEX), seed, tl.load(row + f.PARAM_INDEX), step, stream)
    return random


@triton.jit
def stored_moment(value, random, V: tl.constexpr):
    """A second moment as it will be read back.

    In bfloat16 it is rounded at random: an average that is rounded to nearest stalls.
    """
    if V.MOMENT == tl.bfloat16:
        result = to_bfloat16_stochastic(value.to(tl.float32), random).to(V.MATH)
    else:
        result = stored(value, V.MOMENT)
    return result


@triton.jit
def new_factor(old, total, count, random, rule, V: tl.constexpr):
    """Second moment of rows or columns, as it will be read back."""
    value = mean_or_sum(total, count, rule, V)
    new = new_moment(old, value, number(rule, f.BETA2, V), number(rule, f.REST2, V))
    return stored_moment(new, random, V)


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
def new_var(row, rule, integers, grad, first, k, mask, V: tl.constexpr):
    """Unfactored second moment after this step, as it will be read back.

    Its elements k [1, n] begin with ``first``, a multiple of 8, and are numbered row-major: there
    is no view. Those of a part need not be in the whole parameter.
    """
    old = read(row, f.VAR, f.STATE_STRIDES, V.MOMENT, k, mask, V)
    value = tl.fma(grad, grad, number(rule, f.ADDED, V))
    new = new_moment(old, value, number(rule, f.BETA2, V), number(rule, f.REST2, V))
    random = tl.zeros(k.shape, tl.uint32)
    if V.MOMENT == tl.bfloat16:
        seed = tl.load(integers + f.SEED)
        step = tl.load(integers + f.STEP)
        index = tl.load(row + f.PARAM_INDEX)
        if V.SPLIT and not V.WHOLE_BLOCKS:
            random = random16(element_of(row, k, V), seed, index, step, f.VAR_STREAM)
        else:
            BLOCKS: tl.constexpr = k.shape[1] // 8
            begin = block_of(row, tl.zeros((1,), tl.int64) + first, V)
            block = begin[:, None] + tl.arange(0, BLOCKS)[None, :]
            random = random16_of_blocks(block, seed, index, step, f.VAR_STREAM)
    return stored_moment(new, random, V)


@triton.jit
def _tiny_places(row, k, V: tl.constexpr):
    """Rows and columns of tiny matrices; for each element its matrix, and its row and column."""
    INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32  # the wide one takes twice the registers
    rows = tl.load(row + f.MATRIX_ROWS).to(INDEX)
    cols = tl.load(row + f.MATRIX_COLS).to(INDEX)
    k = k.to(INDEX)
    return rows, cols, k // (rows * cols), k // cols % rows, k % cols


@triton.jit
def tiny_factors(row, rule, integers, grad, factor, k, mask, V: tl.constexpr):
    """The factors of tiny matrices, for each element: 1 / sqrt(v), row_var and col_var.

    Every element takes the sums of its own row, its own column and all rows, from the L1 cache.
    """
    rows, cols, matrix, own_row, own_col = _tiny_places(row, k, V)
    row_var = tl.zeros(k.shape, V.MATH)
    col_sq = tl.zeros(k.shape, V.MATH)
    total = tl.zeros(k.shape, V.MATH)
    line_var = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V)
    cross_var = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V)
    of_whole = matrix_of(row, matrix, V)
    for i in range(0, rows):
        # Before registers are full.
        random = random_of_factor(row, integers, of_whole * rows + i, False, V)
        element = matrix * rows + i
        row_sq = tl.zeros(k.shape, V.MATH)
        for j in range(0, cols):
            x = read_grad(row, rule, grad, factor, (matrix * rows + i) * cols + j, mask, V)
            square = x * x
            row_sq += square
            col_sq += tl.where(own_col == j, square, 0.0)
        old = tl.load(line_var + element, mask=mask, other=0.0).to(V.MATH)
        new = new_factor(old, row_sq, cols, random, rule, V)
        total += new
        row_var = tl.where(own_row == i, new, row_var)
    element = matrix * cols + own_col
    old = tl.load(cross_var + element, mask=mask, other=0.0).to(V.MATH)
    random = random_of_factor(row, integers, of_whole * cols + own_col, True, V)
    col_var = new_factor(old, col_sq, rows, random, rule, V)
    many = tl.zeros(k.shape, V.MATH) + rows.to(V.MATH)
    mean = tl.where(number(rule, f.SUM_MOMENTS, V) > 0, total, quotient(total, many))
    least = number(rule, f.LEAST_NORM, V)
    norm = tl.where(mean < least, least, mean)
    inverse_v = inverse_root(quotient(row_var, norm)) * inverse_root(col_var)
    return inverse_v, row_var, col_var


@triton.jit
def write_tiny_factors(row, row_var, col_var, k, mask, V: tl.constexpr):
    """Store the second moments of tiny matrices, once nobody reads the old ones any more."""
    rows, cols, matrix, own_row, own_col = _tiny_places(row, k, V)
    line_var = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V)
    cross_var = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V)
    tl.debug_barrier()
    first_in_row = mask & (own_col == 0)
    first_in_col = mask & (own_row == 0)
    row_var = round_nearest(row_var, V.MOMENT)
    col_var = round_nearest(col_var, V.MOMENT)
    tl.store(line_var + matrix * rows + own_row, row_var, mask=first_in_row)
    tl.store(cross_var + matrix * cols + own_col, col_var, mask=first_in_col)


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
        # To nearest: a maximum of values that are rounded at random would keep every one that
        # came out too large.
        var_max = stored(tl.where(larger, var, old), V.MOMENT)
        below = root(var_max * number(rule, f.AMSGRAD_SCALE, V)) + number(rule, f.EPS1, V)
        value = quotient(num, below)
    else:
        value = num * inverse_v
    return tl.where(mask, value, 0.0), exp_avg, var_max
