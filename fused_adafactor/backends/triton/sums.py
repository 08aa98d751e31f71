"""What the first sweep has left in the scratch, added up over units and slabs in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.memory import hinted, in_scratch


@triton.jit
def sum_of_units(row, scratch, FIELD: tl.constexpr, V: tl.constexpr):
    """A sum of all units of a tensor."""
    VECTOR: tl.constexpr = V.VECTOR
    sums = in_scratch(row, scratch, f.SUMS, tl.float64)
    units = tl.load(row + f.UNITS)
    total = tl.zeros((VECTOR,), tl.float64)
    for first in range(0, units, V.VECTOR):
        unit = first + tl.arange(0, V.VECTOR)
        total += tl.load(sums + unit * f.UNIT_SUMS + FIELD, mask=unit < units, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def total_grad_sq(row, scratch, outcome, V: tl.constexpr):
    """Σ g² of a tensor, before any clipping."""
    total = sum_of_units(row, scratch, f.UNIT_GRAD_SQ, V)
    tl.store(outcome + f.GRAD_SQ, total)
    return total


@triton.jit
def record_of_part(row, scratch, matrix, part):
    """The record of a part of a matrix."""
    number_of_part = matrix * tl.load(row + f.PARTS) + part
    return in_scratch(row, scratch, f.PART_SUMS, tl.float64) + number_of_part * f.PART_FIELDS


@triton.jit
def lines_of_part(row, part):
    """First line of a part of a matrix, and the end of them."""
    rows = tl.load(row + f.ROWS)
    lines = tl.load(row + f.PART_LINES)
    begin = tl.minimum(part * lines, rows)
    return begin, tl.minimum(begin + lines, rows)


@triton.jit
def over_slabs(row, scratch, matrix, part, V: tl.constexpr):
    """Columns of a part of a matrix, which there are, and their sums in the order of the slabs."""
    COLS: tl.constexpr = V.MERGE_COLS
    cols = hinted(tl.load(row + f.COLS), V)
    slabs = tl.load(row + f.SLABS_PER_MATRIX)
    column = part * V.MERGE_COLS + tl.arange(0, V.MERGE_COLS)
    mask = column < cols
    partial = in_scratch(row, scratch, f.PARTIAL, V.MATH) + 2 * matrix * slabs * cols
    if V.SPLIT:
        slabs = tl.where(tl.load(row + f.ROWS) == 0, 0, slabs)  # one of no lines has no sums
    square = tl.zeros((COLS,), V.MATH)
    weighted = tl.zeros((COLS,), V.MATH)
    for first in range(0, slabs, V.MERGE_SLABS):
        slab = first + tl.arange(0, V.MERGE_SLABS)
        place = partial + (2 * slab * cols)[:, None] + column[None, :]
        here = (slab < slabs)[:, None] & mask[None, :]
        square += tl.sum(tl.load(place, mask=here, other=0.0), 0)
        if V.WEIGHS:
            weighted += tl.sum(tl.load(place + cols, mask=here, other=0.0), 0)
    return column, mask, square, weighted
