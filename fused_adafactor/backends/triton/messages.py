"""Sums of a tensor that other processes have other parts of: what it says, and what it is told."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.memory import in_message, in_scratch, pointer
from fused_adafactor.backends.triton.sums import (
    lines_of_part,
    over_slabs,
    record_of_part,
    sum_of_units,
    total_grad_sq,
)


@triton.jit(noinline=True)
def share(row, scratch, item, V: tl.constexpr):
    """Put the sums of some columns of a matrix over the slabs where all processes' are added up.

    And keep what the sums of whole matrices that they wait for are made of, see ``total``.
    """
    VECTOR: tl.constexpr = V.VECTOR
    parts = tl.load(row + f.PARTS)
    matrix = item // parts
    part = item % parts
    column, mask, square, weighted = over_slabs(row, scratch, matrix, part, V)
    element = matrix * tl.load(row + f.COLS) + column
    tl.store(in_message(row, f.SHARED_CROSS_SQ, V) + element, square, mask=mask)
    if V.WEIGHS:
        if tl.load(row + f.SHARED_WEIGHTED) != 0:
            tl.store(in_message(row, f.SHARED_WEIGHTED, V) + element, weighted, mask=mask)
    rows = tl.load(row + f.ROWS)
    lines = in_scratch(row, scratch, f.LINES, V.MATH) + matrix * rows
    old_lines = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V) + matrix * rows
    total = tl.zeros((VECTOR,), tl.float64)
    begin, end = lines_of_part(row, part)
    for first in range(begin, end, V.VECTOR):
        line = first + tl.arange(0, V.VECTOR)
        here = line < end
        if tl.load(row + f.SHARED_ROW_SQ_SUM) == 0:
            x = tl.load(lines + line, mask=here, other=0.0)
        else:
            x = tl.load(old_lines + line, mask=here, other=0.0).to(V.MATH)
        total += x.to(tl.float64)
    record = record_of_part(row, scratch, matrix, part)
    tl.store(record + f.PART_GRAD_SQ, tl.sum(square.to(tl.float64), 0))
    tl.store(record + f.PART_LINE_SUM, tl.sum(total, 0))


@triton.jit
def total(row, scratch, outcome, V: tl.constexpr):
    """What of the first sweep is known of a tensor as a whole, where something waits for it."""
    grad_sq = total_grad_sq(row, scratch, outcome, V)
    if V.SPLIT:
        put(row, f.SHARED_GRAD_SQ, grad_sq, V)
        if V.PARAM_RMS:
            put(row, f.SHARED_PARAM_SQ, sum_of_units(row, scratch, f.UNIT_PARAM_SQ, V), V)
        if V.LINES:
            if tl.load(row + f.SHARED_ROW_VAR_SUM) != 0:
                _put_matrices(row, scratch, V)


@triton.jit
def _put_matrices(row, scratch, V: tl.constexpr):
    """Likewise for each matrix whose rows are split Σ row_var, or what it will follow from."""
    MATRICES: tl.constexpr = V.MATRICES
    batch = tl.load(row + f.BATCH)
    parts = tl.load(row + f.PARTS)
    for first in range(0, batch, V.MATRICES):
        matrix = first + tl.arange(0, V.MATRICES)
        mask = matrix < batch
        line_sum = tl.zeros((MATRICES,), tl.float64)
        grad_sq = tl.zeros((MATRICES,), tl.float64)
        for first_part in range(0, parts, V.PARTS):
            part = first_part + tl.arange(0, V.PARTS)
            record = in_scratch(row, scratch, f.PART_SUMS, tl.float64)
            record += (matrix[:, None] * parts + part[None, :]) * f.PART_FIELDS
            here = mask[:, None] & (part < parts)[None, :]
            line_sum += tl.sum(tl.load(record + f.PART_LINE_SUM, mask=here, other=0.0), 1)
            grad_sq += tl.sum(tl.load(record + f.PART_GRAD_SQ, mask=here, other=0.0), 1)
        tl.store(in_message(row, f.SHARED_ROW_VAR_SUM, V) + matrix, line_sum.to(V.MATH), mask=mask)
        if tl.load(row + f.SHARED_ROW_SQ_SUM) != 0:
            place = in_message(row, f.SHARED_ROW_SQ_SUM, V) + matrix
            tl.store(place, grad_sq.to(V.MATH), mask=mask)


@triton.jit
def put(row, FIELD: tl.constexpr, value, V: tl.constexpr):
    """Put one number where all processes' are added up."""
    tl.store(in_message(row, FIELD, V), value.to(V.MATH))


@triton.jit
def taken(row, FIELD: tl.constexpr, V: tl.constexpr):
    """Such a sum, once it has been taken."""
    return tl.load(in_message(row, FIELD, V)).to(tl.float64)


@triton.jit
def from_message(row, FIELD: tl.constexpr, element, mask, own, V: tl.constexpr):
    """Sums of all processes; its own where they are not taken."""
    if tl.load(row + FIELD) != 0:
        own = tl.load(in_message(row, FIELD, V) + element, mask=mask, other=0.0)
    return own


@triton.jit
def sum_of_split_rows(row, rule, factor, matrix, mask, own, V: tl.constexpr):
    """Σ row_var of matrices whose rows are split: a sum over processes, or it follows from two.

    It is linear in them, but for the rounding of moments. Lines are rows then.
    """
    if tl.load(row + f.SHARED_ROW_VAR_SUM) != 0:
        place = in_message(row, f.SHARED_ROW_VAR_SUM, V) + matrix
        own = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        if tl.load(row + f.SHARED_ROW_SQ_SUM) != 0:
            place = in_message(row, f.SHARED_ROW_SQ_SUM, V) + matrix
            grad_sq = tl.load(place, mask=mask, other=0.0).to(tl.float64)
            grad_sq = grad_sq * factor.to(tl.float64) * factor.to(tl.float64)
            cols = tl.load(row + f.WHOLE_COLS).to(tl.float64)
            grad_sq += tl.load(row + f.WHOLE_ROWS).to(tl.float64) * cols * tl.load(rule + f.ADDED)
            value = tl.where(tl.load(rule + f.SUM_MOMENTS) > 0, grad_sq, grad_sq / cols)
            own = tl.load(rule + f.BETA2) * own + tl.load(rule + f.REST2) * value
    return own
