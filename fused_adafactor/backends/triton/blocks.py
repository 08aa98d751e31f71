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
    k = k.to(INDEX)
    length = tl.load(row + f.BLOCK_LINE).to(INDEX)
    return k // length * ((length + BLOCK - 1) // BLOCK) + k % length // BLOCK


@triton.jit
def _one_of_blocks(k, mask, V: tl.constexpr):
    """[n, m] to [n, m / 32]: the number of an element of each block, below 0 where it has none."""
    INDEX: tl.constexpr = tl.int64 if V.LONG else tl.int32
    return _largest_of_blocks(tl.where(mask, k.to(INDEX), -1))


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
def larger(a, b):
    """What ``associative_scan`` combines by."""
    return tl.maximum(a, b)


@triton.jit
def _place_in_block(row, COUNT: tl.constexpr):
    """Where the elements of a tile of tiny matrices [1, COUNT] are in their blocks."""
    length = tl.load(row + f.BLOCK_LINE).to(tl.int32)
    return tl.arange(0, COUNT)[None, :] % length % BLOCK


@triton.jit
def _largest_of_rows(row, x):
    """For each element of tiny matrices [1, m] the largest of its block, which is in its row.

    Rows are of any length there. With the place of its block above the number itself (0 to 255),
    the largest so far is one of the same block; the other way round it is the largest from there.
    """
    COUNT: tl.constexpr = x.shape[1]
    begin = tl.arange(0, COUNT)[None, :] - _place_in_block(row, COUNT)
    so_far = tl.associative_scan((begin << 8) + x, 1, larger)
    from_here = tl.associative_scan(((-begin + COUNT) << 8) + x, 1, larger, reverse=True)
    return tl.maximum(so_far & 255, from_here & 255)


@triton.jit
def _scales(row, value, mask, TINY: tl.constexpr, V: tl.constexpr):
    """The scales of new values: of each block, or where TINY of the block of each element.

    That of a block is the largest of what the exponent of each number asks for, which for infinity
    and NaN is 255.
    """
    if V.MATH == tl.float64:
        exponent = ((value.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32)
        scale = tl.minimum(tl.maximum(exponent - (1023 - 127), 0), 254)
        scale = tl.where(exponent == 2047, POISONED, scale)
    else:
        scale = (value.to(tl.int32, bitcast=True) >> 23) & 255
    scale = tl.where(mask, scale, 0)
    if TINY:
        largest = _largest_of_rows(row, scale)
    else:
        largest = _largest_of_blocks(scale)
    return largest


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
        one = _one_of_blocks(k, mask, V)
        scale = tl.load(scales + _numbers(row, one, V), mask=one >= 0, other=0)
    return _from_units(units, scale.to(tl.int32), TINY)


@triton.jit
def stored_in_blocks(row, value, mask, TINY: tl.constexpr, V: tl.constexpr):
    """The first moment as it will be read back."""
    scale = _scales(row, value, mask, TINY, V)
    return _from_units(_to_units(value, scale, TINY), scale, TINY)


@triton.jit
def write_blocks(row, k, mask, value, TINY: tl.constexpr, V: tl.constexpr):
    """Store what ``stored_in_blocks`` has rounded: rounding it again changes nothing."""
    scale = _scales(row, value, mask, TINY, V)
    units = _to_units(value, scale, TINY)
    write(row, f.EXP_AVG, f.STATE_STRIDES, V.EXP_AVG, k, mask, units, V)
    scales = tl.load(row + f.EXP_AVG_SCALE).to(tl.pointer_type(tl.uint8))
    if TINY:
        begins = _place_in_block(row, value.shape[1]) == 0
        tl.store(scales + _numbers(row, k, V), scale.to(tl.uint8), mask=mask & begins)
    else:
        one = _one_of_blocks(k, mask, V)
        tl.store(scales + _numbers(row, one, V), scale.to(tl.uint8), mask=one >= 0)
