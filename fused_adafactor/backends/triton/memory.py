"""Elements in memory: where they lie, how a tile of them is read and written."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.formulas import quotient, round_nearest


@triton.jit
def number(rule, FIELD: tl.constexpr, V: tl.constexpr):
    """A number of this step, in the math dtype."""
    return tl.load(rule + FIELD).to(V.MATH)


@triton.jit
def in_scratch(row, scratch, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """A place in the scratch, where every array begins on a cache line of its own."""
    return tl.multiple_of((scratch + tl.load(row + FIELD)).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def whole_rows(row, V: tl.constexpr):
    """Lines of a matrix, those of other processes too."""
    return tl.load(row + (f.WHOLE_ROWS if V.SPLIT else f.ROWS))


@triton.jit
def whole_cols(row, V: tl.constexpr):
    """Elements of a line, likewise. Of a whole one it is a number that a sweep has at hand."""
    return tl.load(row + (f.WHOLE_COLS if V.SPLIT else f.COLS))


@triton.jit
def hinted(x, V: tl.constexpr):
    """A number of elements that is a multiple of 16 in this variant.

    The compiler is told by arithmetic: a hint does not leave the function that it is given in.
    """
    if V.ALIGNED:
        x = x // 16 * 16
    return x


@triton.jit
def pointer(address, DTYPE: tl.constexpr, V: tl.constexpr):
    """An address as a pointer, aligned to 16 bytes in this variant."""
    place = address.to(tl.pointer_type(DTYPE))
    if V.ALIGNED:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def in_message(row, FIELD: tl.constexpr, V: tl.constexpr):
    """A place in a message, where numbers begin anywhere."""
    return tl.load(row + FIELD).to(tl.pointer_type(V.MATH))


@triton.jit
def sums_of_lines(row, scratch, V: tl.constexpr):
    """Where the first sweep leaves what is known of lines: in a message, where they are split."""
    place = in_scratch(row, scratch, f.LINES, V.MATH)
    if V.SPLIT and V.RAW_LINES:
        sent = tl.load(row + f.SHARED_LINE_SQ)
        place = tl.where(sent == 0, place.to(tl.int64), sent).to(tl.pointer_type(V.MATH))
    return place


@triton.jit
def offset_of(row, STRIDES: tl.constexpr, k, V: tl.constexpr):
    """Where elements of these numbers lie."""
    if V.STRIDED:
        offset = _by_dims(row, f.DIMS, f.SIZES, STRIDES, k, tl.int64 if V.LONG else tl.int32)
    else:
        offset = k
    return offset


@triton.jit
def element_of(row, k, V: tl.constexpr):
    """Row-major index in the parameter, which this may be a part of, of elements of these numbers.

    Where it is split, they may lie one after the other and not be numbered so in the whole.
    """
    if V.SPLIT:
        INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
        element = _by_dims(row, f.DIMS, f.SIZES, f.LOGICAL, k, INDEX)
        element += tl.load(row + f.FIRST_ELEMENT).to(INDEX)
    else:
        element = offset_of(row, f.LOGICAL, k, V)
    return element


@triton.jit
def block_of(row, first, V: tl.constexpr):
    """The block of eight elements of the parameter that begins with this one."""
    if V.SPLIT:
        first += tl.load(row + f.FIRST_ELEMENT)
    return first >> 3


@triton.jit
def matrix_of(row, matrix, V: tl.constexpr):
    """Number in the parameter of matrices of this part of it."""
    if V.SPLIT:
        INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
        matrix = _by_dims(row, f.STACK_DIMS, f.STACK_SIZES, f.STACK_STRIDES, matrix, INDEX)
        matrix += tl.load(row + f.FIRST_MATRIX).to(INDEX)
    return matrix


@triton.jit
def moment_of(row, element, ACROSS: tl.constexpr, V: tl.constexpr):
    """Where second moments of lines, or across them, are in their entry of the whole parameter.

    ``element`` is where they are in that of this part.
    """
    INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
    element = element.to(INDEX)
    if V.SPLIT:
        count = tl.load(row + (f.COLS if ACROSS else f.ROWS)).to(INDEX)
        count = tl.maximum(count, 1)  # a part may have none
        first = tl.load(row + (f.FIRST_COL if ACROSS else f.FIRST_ROW)).to(INDEX)
        whole = tl.load(row + (f.WHOLE_COLS if ACROSS else f.WHOLE_ROWS)).to(INDEX)
        element = matrix_of(row, element // count, V) * whole + first + element % count
    return element


@triton.jit
def _by_dims(
    row,
    DIMS: tl.constexpr,
    SIZES: tl.constexpr,
    STRIDES: tl.constexpr,
    k,
    INDEX: tl.constexpr,
):
    """What the strides make of numbers that are row-major over these sizes."""
    offset = tl.zeros(k.shape, INDEX)
    rest = k.to(INDEX)
    dims = tl.load(row + DIMS)
    for back in range(1, dims + 1):
        size = tl.load(row + SIZES + dims - back).to(INDEX)
        offset += rest % size * tl.load(row + STRIDES + dims - back).to(INDEX)
        rest = rest // size
    return offset


@triton.jit
def read(
    row,
    FIELD: tl.constexpr,
    STRIDES: tl.constexpr,
    DTYPE: tl.constexpr,
    k,
    mask,
    V: tl.constexpr,
    LAST: tl.constexpr = False,
):
    """Elements in the math dtype, 0 where the mask is.

    What is read for the ``LAST`` time in a step makes room in the L2 cache for the next wave, and
    so does what is written.
    """
    place = pointer(tl.load(row + FIELD), DTYPE, V) + offset_of(row, STRIDES, k, V)
    return tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "").to(
        V.MATH
    )


@triton.jit
def write(
    row,
    FIELD: tl.constexpr,
    STRIDES: tl.constexpr,
    DTYPE: tl.constexpr,
    k,
    mask,
    value,
    V: tl.constexpr,
):
    """Store elements, rounded to nearest."""
    place = pointer(tl.load(row + FIELD), DTYPE, V) + offset_of(row, STRIDES, k, V)
    tl.store(place, round_nearest(value, DTYPE), mask=mask, eviction_policy="evict_first")


@triton.jit
def read_unclipped(row, rule, grad, k, mask, V: tl.constexpr, LAST: tl.constexpr = False):
    """The gradient: divided by the loss scale, then averaged over accumulated steps."""
    place = pointer(grad, V.GRAD, V) + offset_of(row, f.GRAD_STRIDES, k, V)
    g = tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "").to(
        V.MATH
    )
    g = g * number(rule, f.GRAD_SCALE, V)
    if V.ACCUMULATES:
        g += read(row, f.ACCUMULATOR, f.STATE_STRIDES, V.MATH, k, mask, V)
        steps = tl.zeros(k.shape, V.MATH) + number(rule, f.ACCUMULATION_STEPS, V)
        g = quotient(g, steps)
    return g


@triton.jit
def clipped(g, rule, factor, V: tl.constexpr):
    """The gradient, clipped by value or by a norm."""
    if V.VALUE_CLIP:
        limit = number(rule, f.CLIP_VALUE, V)
        g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))  # NaN passes
    if V.NORM_CLIPPED:
        g = g * factor
    return g


@triton.jit
def read_grad(row, rule, grad, factor, k, mask, V: tl.constexpr, LAST: tl.constexpr = False):
    """g: unscaled, averaged, clipped; in Keras' order."""
    return clipped(read_unclipped(row, rule, grad, k, mask, V, LAST), rule, factor, V)


@triton.jit
def lines_of(row, slab, V: tl.constexpr):
    """First line of a slab, the end of its lines, and how many of them are of one matrix.

    A matrix of a part without elements may have no lines; there is a slab of them all the same.
    """
    rows = tl.load(row + f.ROWS)
    length = tl.load(row + f.LINES_PER_SLAB)
    per_matrix = tl.load(row + f.SLABS_PER_MATRIX)
    first_of_matrix = slab // per_matrix * tl.where(per_matrix == 1, length, rows)
    begin = first_of_matrix + slab % per_matrix * length
    all_lines = rows * tl.load(row + f.BATCH)
    end = tl.minimum(begin + length, tl.where(per_matrix == 1, all_lines, first_of_matrix + rows))
    block = tl.minimum(length, rows)
    if V.SPLIT:
        block = tl.maximum(block, 1)
    return begin, end, block


@triton.jit
def columns_of(row, chunk):
    """First column of a chunk, and the end of its columns."""
    size = tl.load(row + f.CHUNK)
    begin = chunk * size
    return begin, tl.minimum(begin + size, tl.load(row + f.COLS))
