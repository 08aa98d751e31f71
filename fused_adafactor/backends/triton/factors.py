"""Between the sweeps: the sums of slabs become factors, and these the step size and RMS(u)."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.formulas import (
    INFINITY,
    inverse_root,
    is_finite,
    quotient,
    root,
)
from fused_adafactor.backends.triton.memory import (
    hinted,
    in_scratch,
    moment_of,
    number,
    pointer,
    sums_of_lines,
    whole_cols,
    whole_rows,
)
from fused_adafactor.backends.triton.messages import (
    from_message,
    put,
    sum_of_split_rows,
    taken,
)
from fused_adafactor.backends.triton.sums import (
    lines_of_part,
    over_slabs,
    record_of_part,
    sum_of_units,
    total_grad_sq,
)
from fused_adafactor.backends.triton.update import new_factor, random_of_factor


@triton.jit
def finish_columns(
    row,
    rule,
    integers,
    scratch,
    matrix,
    part,
    column,
    mask,
    square,
    weighted,
    grad_sq,
    V: tl.constexpr,
):
    """New second moments across the lines of a matrix, of some columns whose sums are complete.

    Args:
        row: The tensor.
        rule: Its numbers.
        integers: Seed and step.
        scratch: Where its sums are.
        matrix: Number of the matrix.
        part: Number of the part that these columns are.
        column: Their numbers [n], int64.
        mask: Which of them there are.
        square: Σ_i g² [n].
        weighted: Σ_i num² / line_var_i [n].
        grad_sq: Σ g² of what is here of them.
        V: The variant.
    """
    rows = whole_rows(row, V)
    cols = hinted(tl.load(row + f.COLS), V)
    place = pointer(tl.load(row + f.CROSS_VAR), V.MOMENT, V) + matrix * cols + column
    old = tl.load(place, mask=mask, other=0.0).to(V.MATH)
    of_whole = moment_of(row, matrix * cols + column, True, V)
    random = random_of_factor(row, integers, of_whole, True, V)
    cross = tl.where(mask, new_factor(old, square, rows, random, rule, V), 0.0)
    positive = cross > 0.0
    share = tl.where(positive, quotient(weighted, tl.where(positive, cross, 1.0)), 0.0)
    tl.store(in_scratch(row, scratch, f.CROSS, V.MATH) + matrix * cols + column, cross, mask=mask)
    factor = in_scratch(row, scratch, f.FACTOR, V.MATH) + matrix * cols + column
    tl.store(factor, inverse_root(cross), mask=mask)
    record = record_of_part(row, scratch, matrix, part)
    tl.store(record + f.PART_SHARE, tl.sum(share.to(tl.float64), 0))
    tl.store(record + f.PART_CROSS_SUM, tl.sum(cross.to(tl.float64), 0))
    least = tl.min(tl.where(positive, cross, INFINITY), 0)
    tl.store(record + f.PART_CROSS_MIN, least.to(tl.float64))
    tl.store(record + f.PART_CROSS_MAX, tl.max(cross, 0).to(tl.float64))
    tl.store(record + f.PART_GRAD_SQ, grad_sq)


@triton.jit
def finish_lines(row, rule, integers, scratch, factor, matrix, part, begin, end, V: tl.constexpr):
    """What the second moments of some lines of a matrix add up to, from begin to end."""
    VECTOR: tl.constexpr = V.VECTOR
    rows = tl.load(row + f.ROWS)
    sums = sums_of_lines(row, scratch, V) + matrix * rows
    lines = in_scratch(row, scratch, f.LINES, V.MATH) + matrix * rows
    old_lines = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V) + matrix * rows
    total = tl.zeros((VECTOR,), tl.float64)
    least = tl.full((VECTOR,), INFINITY, V.MATH)
    most = tl.zeros((VECTOR,), V.MATH)
    for first in range(begin, end, V.VECTOR):
        line = first + tl.arange(0, V.VECTOR)
        mask = line < end
        x = tl.load(sums + line, mask=mask, other=0.0)
        if V.RAW_LINES:
            # What was summed is the raw gradient: its norm was not known yet, or it is not all.
            old = tl.load(old_lines + line, mask=mask, other=0.0).to(V.MATH)
            of_whole = moment_of(row, matrix * rows + line, False, V)
            random = random_of_factor(row, integers, of_whole, False, V)
            x = new_factor(old, x * (factor * factor), whole_cols(row, V), random, rule, V)
            x = tl.where(mask, x, 0.0)
            tl.store(lines + line, x, mask=mask)
        total += x.to(tl.float64)
        least = tl.where((x > 0.0) & (x < least), x, least)
        most = tl.where(x > most, x, most)
    record = record_of_part(row, scratch, matrix, part)
    tl.store(record + f.PART_LINE_SUM, tl.sum(total, 0))
    tl.store(record + f.PART_LINE_MIN, tl.min(least, 0).to(tl.float64))
    tl.store(record + f.PART_LINE_MAX, tl.max(most, 0).to(tl.float64))


@triton.jit(noinline=True)
def merge(row, rule, integers, scratch, factor, item, V: tl.constexpr):
    """New second moments of some columns, and some lines, of a matrix, from sums over the slabs.

    Or from those of all processes, once they have come.
    """
    parts = tl.load(row + f.PARTS)
    matrix = item // parts
    part = item % parts
    column, mask, square, weighted = over_slabs(row, scratch, matrix, part, V)
    grad_sq = tl.sum(square.to(tl.float64), 0)
    if V.SPLIT:
        element = matrix * tl.load(row + f.COLS) + column
        square = from_message(row, f.SHARED_CROSS_SQ, element, mask, square, V)
        if V.WEIGHS:
            weighted = from_message(row, f.SHARED_WEIGHTED, element, mask, weighted, V)
    if V.NORM_CLIPPED:
        square = square * (factor * factor)
    finish_columns(
        row, rule, integers, scratch, matrix, part, column, mask, square, weighted, grad_sq, V
    )
    begin, end = lines_of_part(row, part)
    finish_lines(row, rule, integers, scratch, factor, matrix, part, begin, end, V)


@triton.jit(noinline=True)
def finalize(row, rule, scratch, outcome, factor, skip, V: tl.constexpr):
    """Norms, clamps, what is known of Σ u², the step size, and whether the tensor is skipped.

    Where it is split, and its sums have not come yet, only what is known of Σ u² counts.

    Returns:
        Whether that is all of it, or not wanted: the third sweep has nothing to do.
    """
    if V.SPLIT and V.JOINED:
        grad_sq = taken(row, f.SHARED_GRAD_SQ, V)
        tl.store(outcome + f.GRAD_SQ, grad_sq)
    else:
        grad_sq = total_grad_sq(row, scratch, outcome, V)
    if V.SKIPS:
        if not is_finite(grad_sq.to(V.MATH)):
            tl.store(skip, 1)
    update_sq = tl.zeros((), tl.float64)
    measured = tl.zeros((), tl.int32) + 1
    form = tl.load(row + f.FORM)
    if V.SPLIT and V.JOINED:
        if tl.load(row + f.SHARED_UPDATE_SQ) != 0:
            update_sq = taken(row, f.SHARED_UPDATE_SQ, V)
            form = tl.full((), -1, tl.int64)  # of its own sums nothing is left to be found out
    if V.LINES:
        if form == f.FACTORED:
            update_sq, unknown = _finalize_matrices(row, rule, scratch, factor, V)
            measured = tl.where(unknown, 0, 1)
    if V.UNFACTORED or V.TINY:
        if (form == f.UNFACTORED) | (form == f.TINY):
            if V.NORM_CLIPPED:
                measured = tl.zeros((), tl.int32)  # nothing has been taken of a clipped gradient
            else:
                update_sq = sum_of_units(row, scratch, f.UNIT_UPDATE_SQ, V)
    tl.store(outcome + f.UPDATE_SQ, update_sq)
    numel = tl.load(row + f.WHOLE_NUMEL).to(tl.float64)
    alpha = tl.load(rule + f.RHO)
    if V.PARAM_RMS:
        if V.SPLIT and V.JOINED:
            param_sq = taken(row, f.SHARED_PARAM_SQ, V)
        else:
            param_sq = sum_of_units(row, scratch, f.UNIT_PARAM_SQ, V)
        param_rms = root(param_sq / numel)
        tl.store(outcome + f.PARAM_RMS, param_rms)
        decay = tl.where(tl.load(rule + f.DECAY_BEFORE_RMS) > 0, tl.load(rule + f.DECAY), 0.0)
        scale = tl.abs(param_rms * (1.0 - decay))
        eps2 = tl.load(rule + f.EPS2)
        alpha = tl.where(eps2 < 0, alpha, tl.where(scale < eps2, eps2, scale) * alpha)
    tl.store(outcome + f.ALPHA, alpha)
    of_alpha = tl.load(rule + f.DECAY_OF_ALPHA) * alpha
    tl.store(outcome + f.DECAYED, 1.0 - (tl.load(rule + f.DECAY) + of_alpha))
    if V.MEASURES:
        if measured > 0:
            _tell(row, rule, outcome, update_sq, V)
    else:
        tl.store(outcome + f.BY_CLIP, tl.zeros((), tl.float64) + 1.0)
        measured = tl.zeros((), tl.int32) + 1
    tl.store(outcome + f.UNKNOWN, (1 - measured).to(tl.float64))
    return measured


@triton.jit(noinline=True)
def measure(row, rule, scratch, outcome, V: tl.constexpr):
    """RMS(u), or what is here of Σ u², once the third sweep is over."""
    rest = sum_of_units(row, scratch, f.UNIT_UPDATE_SQ, V)
    _tell(row, rule, outcome, tl.load(outcome + f.UPDATE_SQ) + rest, V)


@triton.jit
def settle(row, rule, outcome, V: tl.constexpr):
    """RMS(u) from Σ u² of all processes, where it was not known before."""
    if tl.load(row + f.SHARED_MEASURED_SQ) != 0:
        _set_clip(row, rule, outcome, taken(row, f.SHARED_MEASURED_SQ, V))


@triton.jit
def _tell(row, rule, outcome, update_sq, V: tl.constexpr):
    """Σ u²: all of it, or what is here of it, to where all processes' are added up."""
    if V.SPLIT:
        FIELD: tl.constexpr = f.SHARED_MEASURED_SQ if V.JOINED else f.SHARED_UPDATE_SQ
        if tl.load(row + FIELD) != 0:
            says = tl.load(row + f.SAYS_UPDATE_SQ) > 0
            put(row, FIELD, tl.where(says, update_sq, 0.0), V)
        else:
            _set_clip(row, rule, outcome, update_sq)
    else:
        _set_clip(row, rule, outcome, update_sq)


@triton.jit
def _set_clip(row, rule, outcome, update_sq):
    update_sq = tl.where(update_sq < 0, 0.0, update_sq)  # so that NaN stays
    update_rms = root(update_sq / tl.load(row + f.WHOLE_NUMEL).to(tl.float64))
    tl.store(outcome + f.UPDATE_RMS, update_rms)
    ratio = update_rms / tl.load(rule + f.CLIP_THRESHOLD)
    tl.store(outcome + f.BY_CLIP, 1.0 / tl.where(ratio < 1.0, 1.0, ratio))  # so that NaN stays


@triton.jit
def _finalize_matrices(row, rule, scratch, factor, V: tl.constexpr):
    """What is known of Σ u², and whether any of it is not."""
    MATRICES: tl.constexpr = V.MATRICES
    batch = tl.load(row + f.BATCH)
    parts = tl.load(row + f.PARTS)
    known = tl.zeros((MATRICES,), tl.float64)
    unknown = tl.zeros((MATRICES,), tl.int32)
    for first in range(0, batch, V.MATRICES):
        matrix = first + tl.arange(0, V.MATRICES)
        mask = matrix < batch
        share = tl.zeros((MATRICES,), tl.float64)
        grad_sq = tl.zeros((MATRICES,), tl.float64)
        line_sum = tl.zeros((MATRICES,), tl.float64)
        cross_sum = tl.zeros((MATRICES,), tl.float64)
        line_min = tl.full((MATRICES,), INFINITY, tl.float64)
        cross_min = tl.full((MATRICES,), INFINITY, tl.float64)
        line_max = tl.zeros((MATRICES,), tl.float64)
        cross_max = tl.zeros((MATRICES,), tl.float64)
        for first_part in range(0, parts, V.PARTS):
            part = first_part + tl.arange(0, V.PARTS)
            record = in_scratch(row, scratch, f.PART_SUMS, tl.float64)
            record += (matrix[:, None] * parts + part[None, :]) * f.PART_FIELDS
            here = mask[:, None] & (part < parts)[None, :]
            share += tl.sum(tl.load(record + f.PART_SHARE, mask=here, other=0.0), 1)
            grad_sq += tl.sum(tl.load(record + f.PART_GRAD_SQ, mask=here, other=0.0), 1)
            line_sum += tl.sum(tl.load(record + f.PART_LINE_SUM, mask=here, other=0.0), 1)
            cross_sum += tl.sum(tl.load(record + f.PART_CROSS_SUM, mask=here, other=0.0), 1)
            x = tl.load(record + f.PART_LINE_MIN, mask=here, other=INFINITY)
            line_min = tl.minimum(line_min, tl.min(x, 1))
            x = tl.load(record + f.PART_CROSS_MIN, mask=here, other=INFINITY)
            cross_min = tl.minimum(cross_min, tl.min(x, 1))
            x = tl.load(record + f.PART_LINE_MAX, mask=here, other=0.0)
            line_max = tl.maximum(line_max, tl.max(x, 1))
            x = tl.load(record + f.PART_CROSS_MAX, mask=here, other=0.0)
            cross_max = tl.maximum(cross_max, tl.max(x, 1))
        if V.SPLIT:
            line_sum = sum_of_split_rows(row, rule, factor, matrix, mask, line_sum, V)
        norm = _norm(row, rule, line_sum, cross_sum, V)
        value = share * norm.to(tl.float64)
        clamp, largest = _clamp(row, rule, norm, value, line_min, line_max, cross_min, cross_max, V)
        if V.SPLIT:
            # What is of all rows is no sum that others could be put beside.
            clamp = tl.where(tl.load(row + f.SHARED_WEIGHTED) != 0, f.NOWHERE, clamp)
        most = number(rule, f.MOST_ROOT, V).to(tl.float64)
        value = tl.where(clamp == f.EVERYWHERE, grad_sq * most * most, value)
        value = tl.where(mask & (clamp != f.EVERY_LINE), value, 0.0)
        known += value
        unknown |= (mask & ((clamp == f.EVERY_LINE) | (clamp == f.SOME_LINES))).to(tl.int32)
        place = in_scratch(row, scratch, f.MATRICES, tl.float64) + matrix * f.MATRIX_FIELDS
        tl.store(place + f.MATRIX_NORM, norm.to(tl.float64), mask=mask)
        tl.store(place + f.MATRIX_CLAMP, clamp.to(tl.float64), mask=mask)
        tl.store(place + f.MATRIX_LARGEST, largest.to(tl.float64), mask=mask)
    return tl.sum(known, 0), tl.max(unknown, 0) > 0


@triton.jit
def _norm(row, rule, line_sum, cross_sum, V: tl.constexpr):
    """Mean of row_var, or its sum; rows are the lines unless the matrix lies the other way."""
    swapped = tl.load(row + f.SWAPPED) > 0
    total = tl.where(swapped, cross_sum, line_sum)
    count = tl.where(swapped, whole_cols(row, V), whole_rows(row, V)).to(tl.float64)
    mean = tl.where(tl.load(rule + f.SUM_MOMENTS) > 0, total, total / count).to(V.MATH)
    least = number(rule, f.LEAST_NORM, V)
    return tl.where(mean < least, least, mean)


@triton.jit
def _clamp(row, rule, norm, known, line_min, line_max, cross_min, cross_max, V: tl.constexpr):
    """How far the clamp reaches, and the largest factor of a column.

    From the smallest and the largest second moments; a line of zeros is never clamped. Every line
    is measured, as if it were clamped, where the identity cannot be trusted or does not hold.
    """
    most = number(rule, f.MOST_ROOT, V)
    smallest_line = inverse_root(quotient(line_max.to(V.MATH), norm))
    largest_line = inverse_root(quotient(line_min.to(V.MATH), norm))
    smallest_factor = inverse_root(cross_max.to(V.MATH))
    largest_factor = inverse_root(cross_min.to(V.MATH))
    largest = largest_line * largest_factor
    # What has been counted without the clamp is taken off again. Its rounding must be small.
    numel = (tl.load(row + f.ROWS) * tl.load(row + f.COLS)).to(tl.float64)
    threshold = tl.load(rule + f.CLIP_THRESHOLD)
    trusted = known <= 16.0 * numel * threshold * threshold
    some = (smallest_line * largest_factor <= most) & trusted
    clamp = tl.where(some, f.SOME_LINES, f.EVERY_LINE)
    everywhere = smallest_line * smallest_factor >= most
    if V.MOMENTUM != 1:  # else Σ num² is not known
        clamp = tl.where(everywhere, f.EVERYWHERE, clamp)
    else:
        clamp = tl.where(everywhere, f.EVERY_LINE, clamp)
    clamp = tl.where(largest <= most, f.NOWHERE, clamp)
    clamp = tl.where(is_finite(largest_line), clamp, f.EVERY_LINE)
    # Without a clamp: where a root is so large, g² can be lost below all range while u² counts.
    plain = tl.where(largest > V.LOSSLESS, f.EVERY_LINE, f.NOWHERE)
    clamp = tl.where(most < INFINITY, clamp, plain)
    clamp = tl.where((clamp == f.NOWHERE) & ~is_finite(known), f.EVERY_LINE, clamp)
    clamp = tl.where(is_finite(norm), clamp, f.EVERY_LINE)  # no bounds hold
    if not V.WEIGHS:  # the identity does not hold, or the sums were taken before their time
        clamp = tl.full(clamp.shape, f.EVERY_LINE, tl.int32)
    return clamp, largest_factor
