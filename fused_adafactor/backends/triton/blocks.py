"""Numbers of 8 bits in blocks of a line that share a scale: tiles of them in memory.

The specification is ``fused_adafactor/blocks.py``; multiplying by powers of two is exact, so the
bits are those of every other backend. A tile begins at a multiple of a block in its line, or holds
whole lines, so no block is in two tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.formulas import power_of_two, whole
from fused_adafactor.backends.triton.memory import read, write

BLOCK = tl.constexpr(32)
POISONED = tl.constexpr(255)


@triton.jit
def _numbers(row, k, V: tl.constexpr):
    """Numbers of the blocks that elements are in."""
    INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
    length = tl.load(row + f.BLOCK_LINE).to(INDEX)
    k = k.to(INDEX)
    return k // length * ((length + BLOCK - 1) // BLOCK) + k % length // BLOCK


@triton.jit
def _largest_of_blocks(x):
    """[n, m] to [n, m / 32]: the largest of each block; of all, where there are fewer columns."""
    WIDTH: tl.constexpr = BLOCK if x.shape[1] > BLOCK else x.shape[1]
    return tl.max(tl.reshape(x, (x.shape[0], x.shape[1] // WIDTH, WIDTH)), 2)


@triton.jit
def _spread(x, COLUMNS: tl.constexpr):
    """The reverse: [n, m / 32] to [n, m], the same for all of a block."""
    WIDTH: tl.constexpr = COLUMNS // x.shape[1]
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], WIDTH))
    return tl.reshape(wide, (x.shape[0], COLUMNS))


@triton.jit
def _largest_of_rows(row, x, k, V: tl.constexpr):
    """For each element of tiny matrices [1, m] the largest of its block, which is in its row.

    Rows are of any length there, so each element takes a look at its neighbours.
    """
    length = tl.load(row + f.BLOCK_LINE)
    column = k % length
    first = column // BLOCK * BLOCK  # column where the block begins
    count = tl.minimum(length - first, BLOCK)
    begin = tl.arange(0, x.shape[1])[None, :] - (column - first).to(tl.int32)
    largest = x
    for i in range(0, tl.minimum(length, BLOCK).to(tl.int32)):
        place = tl.minimum(tl.maximum(begin + i, 0), x.shape[1] - 1)
        largest = tl.where(i < count, tl.maximum(largest, tl.gather(x, place, 1)), largest)
    return largest


@triton.jit
def _scales(row, value, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """The scales of new values: of each block, of each element where TINY; below 0 beyond the end.

    They follow from the exponents of the largest magnitudes, whose bits are ordered as these are,
    with infinity and then NaN above all others.
    """
    if V.MATH == tl.float64:
        bits = value.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(mask, bits, -1)
    if TINY:
        largest = _largest_of_rows(row, bits, k, V)
    else:
        largest = _largest_of_blocks(bits)
    if V.MATH == tl.float64:
        exponent = (largest >> 52).to(tl.int32)
        scale = tl.minimum(tl.maximum(exponent - (1023 - 127), 0), 254)
        scale = tl.where(exponent == 2047, POISONED, scale)
        scale = tl.where(exponent < 0, -1, scale)
    else:
        scale = largest >> 23
    return scale


@triton.jit
def _to_units(value, scale, TINY: tl.constexpr):
    """Whole 64ths of the power of two that the scale stands for; 0 in a poisoned block."""
    inverse = power_of_two(254 - scale)
    alive = tl.where(scale == POISONED, 0, 1)
    if not TINY:
        inverse = _spread(inverse, value.shape[1])
        alive = _spread(alive, value.shape[1])
    q = value * inverse.to(value.dtype) * 64.0
    q = tl.where(q > 127.0, 127.0, tl.where(q < -127.0, -127.0, q))
    return tl.where(alive == 1, whole(q), 0.0)


@triton.jit
def _from_units(units, scale, TINY: tl.constexpr):
    power = power_of_two(scale)
    if not TINY:
        power = _spread(power, units.shape[1])
    return units * (1.0 / 64) * power.to(units.dtype)


@triton.jit
def read_blocks(row, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """The first moment of elements, in the math dtype."""
    units = read(row, f.EXP_AVG, f.STATE_STRIDES, V.EXP_AVG, k, mask, V)
    scales = tl.load(row + f.EXP_AVG_SCALE).to(tl.pointer_type(tl.uint8))
    if TINY:
        scale = tl.load(scales + _numbers(row, k, V), mask=mask, other=0)
    else:
        last = _largest_of_blocks(tl.where(mask, k, -1))
        scale = tl.load(scales + _numbers(row, last, V), mask=last >= 0, other=0)
    return _from_units(units, scale.to(tl.int32), TINY)


@triton.jit
def stored_in_blocks(row, value, k, mask, TINY: tl.constexpr, V: tl.constexpr):
    """The first moment as it will be read back."""
    scale = _scales(row, value, k, mask, TINY, V)
    return _from_units(_to_units(value, scale, TINY), scale, TINY)


@triton.jit
def write_blocks(row, k, mask, value, TINY: tl.constexpr, V: tl.constexpr):
    """Store what ``stored_in_blocks`` has rounded: rounding it again changes nothing."""
    scale = _scales(row, value, k, mask, TINY, V)
    units = _to_units(value, scale, TINY)
    write(row, f.EXP_AVG, f.STATE_STRIDES, V.EXP_AVG, k, mask, units, V)
    scales = tl.load(row + f.EXP_AVG_SCALE).to(tl.pointer_type(tl.uint8))
    if TINY:
        begins = k % tl.load(row + f.BLOCK_LINE) % BLOCK == 0
        tl.store(scales + _numbers(row, k, V), scale.to(tl.uint8), mask=mask & begins)
    else:
        last = _largest_of_blocks(tl.where(mask, k, -1))
        tl.store(scales + _numbers(row, last, V), scale.to(tl.uint8), mask=last >= 0)
