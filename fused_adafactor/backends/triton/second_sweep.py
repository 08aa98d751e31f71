"""The second sweep, and the third where it is needed: what reads g once all sums are known."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.blocks import write_blocks
from fused_adafactor.backends.triton.calls import sweep
from fused_adafactor.backends.triton.first_sweep import elements_of, flat_factors
from fused_adafactor.backends.triton.formulas import (
    inverse_root,
    is_finite,
    quotient,
    random16,
    random16_of_blocks,
    round_nearest,
    stored,
    to_bfloat16_stochastic,
)
from fused_adafactor.backends.triton.memory import (
    block_of,
    columns_of,
    element_of,
    hinted,
    in_scratch,
    lines_of,
    number,
    offset_of,
    pointer,
    read,
    read_grad,
    write,
)
from fused_adafactor.backends.triton.update import (
    new_exp_avg,
    numerator,
    update_of,
    write_tiny_factors,
)


@triton.jit
def _line_factors(row, scratch, line, mask, V: tl.constexpr):
    """1 / sqrt(line / norm) of lines, and the lines' second moments."""
    lines = in_scratch(row, scratch, f.LINES, V.MATH)
    norms = in_scratch(row, scratch, f.MATRICES, tl.float64) + f.MATRIX_NORM
    matrix = line // tl.load(row + f.ROWS)
    x = tl.load(lines + line, mask=mask, other=1.0)
    norm = tl.load(norms + matrix * f.MATRIX_FIELDS, mask=mask, other=1.0).to(V.MATH)
    return inverse_root(quotient(x, norm)), x


@sweep
def measure_lines(row, rule, grad, factor, scratch, unit, SPAN: tl.constexpr, V: tl.constexpr):
    """Σ u² of those lines of a slab for which it is not known, less what was counted for them."""
    TILE_LINES: tl.constexpr = (V.FLAT_TILE + SPAN - 1) // SPAN
    chunks = tl.load(row + f.CHUNKS)
    rows = tl.load(row + f.ROWS)
    cols = hinted(tl.load(row + f.COLS), V)
    begin, end, block = lines_of(row, unit // chunks, V)
    first_col, last_col = columns_of(row, unit % chunks)
    most = number(rule, f.MOST_ROOT, V)
    total = tl.zeros((TILE_LINES,), tl.float64)
    for first_of_block in range(begin, end, block):
        last = tl.minimum(first_of_block + block, end)
        matrix = first_of_block // rows
        record = in_scratch(row, scratch, f.MATRICES, tl.float64) + matrix * f.MATRIX_FIELDS
        clamp = tl.load(record + f.MATRIX_CLAMP).to(tl.int32)
        largest = tl.load(record + f.MATRIX_LARGEST).to(V.MATH)
        factors = in_scratch(row, scratch, f.FACTOR, V.MATH) + matrix * cols
        if (clamp == f.EVERY_LINE) | (clamp == f.SOME_LINES):
            for first in range(first_of_block, last, TILE_LINES):
                line = first + tl.arange(0, TILE_LINES)
                here = line < last
                line_factor, line_var = _line_factors(row, scratch, line, here, V)
                corrects = clamp == f.SOME_LINES
                clamped = (line_var > 0.0) & (line_factor * largest > most)
                here = here & tl.where(corrects, clamped, here)
                if tl.max(here.to(tl.int32), 0) > 0:
                    for column in range(first_col, last_col, SPAN):
                        col = hinted(column, V) + tl.arange(0, SPAN)
                        col_mask = col < hinted(last_col, V)
                        mask = here[:, None] & col_mask[None, :]
                        k = (line * cols)[:, None] + col[None, :]
                        g = read_grad(row, rule, grad, factor, k, mask, V)
                        col_factor = tl.load(factors + col, mask=col_mask, other=0.0)
                        inverse_v = line_factor[:, None] * col_factor[None, :]
                        u, _, _ = update_of(row, rule, g, inverse_v, k, mask, False, V)
                        total += tl.sum(u * u, 1).to(tl.float64)
                        if corrects:
                            num, _ = numerator(row, rule, g, k, mask, False, V)
                            # The identity has left out all-zero columns.
                            counted = tl.where(mask & is_finite(inverse_v), num * inverse_v, 0.0)
                            total -= tl.sum(counted * counted, 1).to(tl.float64)
    sums = in_scratch(row, scratch, f.SUMS, tl.float64) + unit * f.UNIT_SUMS
    tl.store(sums + f.UNIT_UPDATE_SQ, tl.sum(total, 0))


@sweep
def measure_flat(
    row, rule, integers, grad, factor, scratch, unit, TINY: tl.constexpr, V: tl.constexpr
):
    """Σ u² of elements that have no lines, where the norm to clip by is known only now."""
    TILE: tl.constexpr = V.TINY_TILE if TINY else V.FLAT_TILE
    total = tl.zeros((1, TILE), V.MATH)
    begin, end, step = elements_of(row, unit, V)
    for first in range(begin, end, step):
        k = hinted(first, V) + tl.arange(0, TILE)[None, :]
        mask = k < hinted(tl.minimum(first + step, end), V)
        g = read_grad(row, rule, grad, factor, k, mask, V)
        inverse_v, _, _ = flat_factors(
            row, rule, integers, grad, factor, g, first, k, mask, TINY, V
        )
        u, _, _ = update_of(row, rule, g, inverse_v, k, mask, TINY, V)
        total = tl.fma(u, u, total)
    sums = in_scratch(row, scratch, f.SUMS, tl.float64) + unit * f.UNIT_SUMS
    tl.store(sums + f.UNIT_UPDATE_SQ, tl.sum(tl.sum(total, 1), 0).to(tl.float64))


@sweep
def apply_lines(
    row, rule, integers, grad, factor, scratch, outcome, unit, SPAN: tl.constexpr, V: tl.constexpr
):
    """Write a slab of lines of matrices, and what else the tensor owns of them."""
    TILE_LINES: tl.constexpr = (V.APPLY_TILE + SPAN - 1) // SPAN
    chunks = tl.load(row + f.CHUNKS)
    rows = tl.load(row + f.ROWS)
    cols = hinted(tl.load(row + f.COLS), V)
    begin, end, block = lines_of(row, unit // chunks, V)
    first_col, last_col = columns_of(row, unit % chunks)
    for first_of_block in range(begin, end, block):
        last = tl.minimum(first_of_block + block, end)
        matrix = first_of_block // rows
        factors = in_scratch(row, scratch, f.FACTOR, V.MATH) + matrix * cols
        for first in range(first_of_block, last, TILE_LINES):
            line = first + tl.arange(0, TILE_LINES)
            here = line < last
            line_factor, line_var = _line_factors(row, scratch, line, here, V)
            if unit % chunks == 0:
                place = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V) + line
                tl.store(place, round_nearest(line_var, V.MOMENT), mask=here)
            for column in tl.range(first_col, last_col, SPAN, num_stages=V.STAGES):
                col = hinted(column, V) + tl.arange(0, SPAN)
                col_mask = col < hinted(last_col, V)
                mask = here[:, None] & col_mask[None, :]
                k = (line * cols)[:, None] + col[None, :]
                g = read_grad(row, rule, grad, factor, k, mask, V, True)
                col_factor = tl.load(factors + col, mask=col_mask, other=0.0)
                inverse_v = line_factor[:, None] * col_factor[None, :]
                _apply(
                    row, rule, integers, outcome, g, inverse_v, line * cols + column, k, mask,
                    SPAN, False, V,
                )  # fmt: skip
        if first_of_block == matrix * rows:
            _write_cross(row, scratch, matrix, first_col, last_col, SPAN, V)
    if V.SPLIT:
        if rows == 0:  # they are those of other processes' lines
            _write_cross(row, scratch, unit // chunks, first_col, last_col, SPAN, V)


@triton.jit
def _write_cross(row, scratch, matrix, first_col, last_col, SPAN: tl.constexpr, V: tl.constexpr):
    """Store second moments across the lines of a matrix, of some columns."""
    cols = hinted(tl.load(row + f.COLS), V)
    crossing = in_scratch(row, scratch, f.CROSS, V.MATH) + matrix * cols
    place = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V) + matrix * cols
    for column in range(first_col, last_col, SPAN):
        col = column + tl.arange(0, SPAN)
        cross = tl.load(crossing + col, mask=col < last_col)
        tl.store(place + col, round_nearest(cross, V.MOMENT), mask=col < last_col)


@sweep
def apply_flat(
    row, rule, integers, grad, factor, outcome, unit, TINY: tl.constexpr, V: tl.constexpr
):
    """Write elements that have no lines, and what else the tensor owns of them."""
    TILE: tl.constexpr = V.TINY_TILE if TINY else V.FLAT_TILE
    begin, end, step = elements_of(row, unit, V)
    for first in range(begin, end, step):
        k = hinted(first, V) + tl.arange(0, TILE)[None, :]
        mask = k < hinted(tl.minimum(first + step, end), V)
        g = read_grad(row, rule, grad, factor, k, mask, V, True)
        inverse_v, var, col_var = flat_factors(
            row, rule, integers, grad, factor, g, first, k, mask, TINY, V
        )
        base = tl.zeros((1,), tl.int64) + first
        if TINY and V.ACCUMULATES:
            # A matrix lies across warps, and every one of them reads all that it has accumulated,
            # which is set to zero next.
            tl.debug_barrier()
        _apply(row, rule, integers, outcome, g, inverse_v, base, k, mask, TILE, TINY, V)
        if TINY:
            write_tiny_factors(row, var, col_var, k, mask, V)
        else:
            write(row, f.VAR, f.STATE_STRIDES, V.MOMENT, k, mask, var, V)


@triton.jit
def measure_unit(row, rule, integers, grad, factor, scratch, unit, V: tl.constexpr):
    """The third sweep of a unit, whatever its form."""
    form = tl.load(row + f.FORM)
    if V.LINES:
        if form == f.FACTORED:
            span = tl.load(row + f.SPAN)
            for i in tl.static_range(len(V.SPANS)):
                if span == V.SPANS[i]:
                    measure_lines(row, rule, grad, factor, scratch, unit, V.SPANS[i], V)
    if V.UNFACTORED and V.NORM_CLIPPED:
        if form == f.UNFACTORED:
            measure_flat(row, rule, integers, grad, factor, scratch, unit, False, V)
    if V.TINY and V.NORM_CLIPPED:
        if form == f.TINY:
            measure_flat(row, rule, integers, grad, factor, scratch, unit, True, V)


@triton.jit
def apply_unit(row, rule, integers, grad, factor, scratch, outcome, unit, V: tl.constexpr):
    """The second sweep of a unit, whatever its form."""
    form = tl.load(row + f.FORM)
    if V.LINES:
        if form == f.FACTORED:
            span = tl.load(row + f.SPAN)
            for i in tl.static_range(len(V.SPANS)):
                if span == V.SPANS[i]:
                    apply_lines(
                        row, rule, integers, grad, factor, scratch, outcome, unit, V.SPANS[i], V
                    )
    if V.UNFACTORED:
        if form == f.UNFACTORED:
            apply_flat(row, rule, integers, grad, factor, outcome, unit, False, V)
    if V.TINY:
        if form == f.TINY:
            apply_flat(row, rule, integers, grad, factor, outcome, unit, True, V)


@triton.jit
def _apply(
    row,
    rule,
    integers,
    outcome,
    g,
    inverse_v,
    first,
    k,
    mask,
    SPAN: tl.constexpr,
    TINY: tl.constexpr,
    V: tl.constexpr,
):
    """p ← round(decay p - delta), and the moments, of a tile of elements."""
    u, exp_avg, var_max = update_of(row, rule, g, inverse_v, k, mask, TINY, V)
    alpha = tl.load(outcome + f.ALPHA).to(V.MATH)
    by_clip = tl.load(outcome + f.BY_CLIP).to(V.MATH)
    if V.MOMENTUM == 2:
        exp_avg = new_exp_avg(row, rule, u * by_clip, k, mask, TINY, V)
        delta = alpha * exp_avg
    elif V.MOMENTUM == 3:
        exp_avg = new_exp_avg(row, rule, u * (alpha * by_clip), k, mask, TINY, V)
        delta = exp_avg
    else:
        delta = u * (alpha * by_clip)
    p = read(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, V, True)
    if V.KAHAN:
        p += read(row, f.COMPENSATION, f.STATE_STRIDES, V.PARAM, k, mask, V)
    value = tl.fma(tl.zeros(k.shape, V.MATH) + tl.load(outcome + f.DECAYED).to(V.MATH), p, -delta)
    if V.MOMENTUM != 0:
        if V.EXP_AVG == tl.int8:
            write_blocks(row, k, mask, exp_avg, TINY, V)
        else:
            write(row, f.EXP_AVG, f.STATE_STRIDES, V.EXP_AVG, k, mask, exp_avg, V)
    if V.AMSGRAD:
        write(row, f.VAR_MAX, f.STATE_STRIDES, V.MOMENT, k, mask, var_max, V)
    if V.ACCUMULATES:
        zero = tl.zeros(k.shape, V.MATH)
        write(row, f.ACCUMULATOR, f.STATE_STRIDES, V.MATH, k, mask, zero, V)
    if V.STOCHASTIC:
        random = _random(row, integers, first, k, SPAN, V)
        kept = to_bfloat16_stochastic(value.to(tl.float32), random).to(V.MATH)
    else:
        kept = stored(value, V.PARAM)
    lost = tl.where(is_finite(kept), value - kept, 0.0)
    if V.AVERAGES:
        averaged = _average(row, rule, kept, k, mask, V)
        due = tl.load(rule + f.OVERWRITE) > 0
        kept = tl.where(due, averaged, kept)
        lost = tl.where(due, 0.0, lost)  # it belongs to the value that is overwritten
    write(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, kept, V)
    if V.KAHAN:
        write(row, f.COMPENSATION, f.STATE_STRIDES, V.PARAM, k, mask, lost, V)


@triton.jit
def _random(row, integers, first, k, SPAN: tl.constexpr, V: tl.constexpr):
    """The random bits of a tile, keyed by the row-major index in the parameter."""
    seed = tl.load(integers + f.SEED)
    step = tl.load(integers + f.STEP)
    index = tl.load(row + f.PARAM_INDEX)
    if V.WHOLE_BLOCKS:
        block = block_of(row, first, V)[:, None] + tl.arange(0, SPAN // 8)[None, :]
        random = random16_of_blocks(block, seed, index, step, f.PARAM_STREAM)
    else:
        random = random16(element_of(row, k, V), seed, index, step, f.PARAM_STREAM)
    return random


@triton.jit
def _average(row, rule, p, k, mask, V: tl.constexpr):
    """Store avg ← momentum avg + (1 - momentum) p, p as it is stored; returned in p's dtype."""
    old = read(row, f.AVERAGE, f.STATE_STRIDES, V.MATH, k, mask, V)
    momentum = number(rule, f.AVERAGE_MOMENTUM, V)
    value = tl.fma(tl.zeros(k.shape, V.MATH) + number(rule, f.AVERAGE_REST, V), p, momentum * old)
    write(row, f.AVERAGE, f.STATE_STRIDES, V.MATH, k, mask, value, V)
    return stored(value, V.PARAM)


@triton.jit
def _average_alone(row, rule, k, mask, V: tl.constexpr):
    """Move the EMA of the weights where there is no update."""
    averaged = _average(row, rule, read(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, V), k, mask, V)
    if tl.load(rule + f.OVERWRITE) > 0:
        write(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, averaged, V)
        if V.KAHAN:  # it belongs to the value that was overwritten
            zero = tl.zeros(k.shape, V.MATH)
            write(row, f.COMPENSATION, f.STATE_STRIDES, V.PARAM, k, mask, zero, V)


@triton.jit
def average_slab(row, rule, unit, V: tl.constexpr):
    """Move the EMA of a slab's weights, where there is no update."""
    begin, end = _elements(row, unit, V)
    for first in range(begin, end, V.FLAT_TILE):
        k = hinted(first, V) + tl.arange(0, V.FLAT_TILE)[None, :]
        _average_alone(row, rule, k, k < hinted(end, V), V)


@triton.jit
def accumulate_slab(row, rule, grad, unit, V: tl.constexpr):
    """Add a slab of g to the accumulator, between two updates."""
    begin, end = _elements(row, unit, V)
    for first in range(begin, end, V.FLAT_TILE):
        k = hinted(first, V) + tl.arange(0, V.FLAT_TILE)[None, :]
        mask = k < hinted(end, V)
        place = pointer(grad, V.GRAD, V) + offset_of(row, f.GRAD_STRIDES, k, V)
        g = tl.load(place, mask=mask, other=0.0).to(V.MATH) * number(rule, f.GRAD_SCALE, V)
        old = read(row, f.ACCUMULATOR, f.STATE_STRIDES, V.MATH, k, mask, V)
        write(row, f.ACCUMULATOR, f.STATE_STRIDES, V.MATH, k, mask, old + g, V)
        if V.AVERAGES:
            _average_alone(row, rule, k, mask, V)


@triton.jit
def _elements(row, unit, V: tl.constexpr):
    """Elements of a slab, whatever its form; the first unit of a slab takes them all."""
    chunks = tl.load(row + f.CHUNKS)
    begin, end, _ = lines_of(row, unit // chunks, V)
    cols = tl.load(row + f.COLS)
    first = begin * cols
    last = tl.minimum(end * cols, tl.load(row + f.NUMEL))
    return first, tl.where(unit % chunks == 0, last, first)
