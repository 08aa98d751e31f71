"""The formulas of the rule on tiles: no loads, no loops. As in ``csrc/include``, in Triton's words.

Names are those of ``backends/reference``, which is the specification. Products that are added
are fused where it says so and nowhere else (kernels are compiled without contraction), so that a
formula gives the same bits wherever it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def new_moment(old, value, beta2, rest):
    """beta2 old + (1 - beta2) value; ``rest`` is 1 - beta2, subtracted in double on the host."""
    return tl.fma(rest, value, beta2 * old)


@triton.jit
def quotient(x, y):
    """x / y, correctly rounded: the fast one loses the last bits."""
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.div_rn(x, y)
    return result


@triton.jit
def root(x):
    """sqrt(x), correctly rounded: the fast one takes subnormal numbers for 0."""
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def inverse(x):
    """1 / x."""
    return quotient(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x)."""
    return inverse(root(x))


@triton.jit
def at_most(x, limit):
    """The smaller one; NaN stays."""
    return tl.where(x > limit, limit, x)


@triton.jit
def is_finite(x):
    """Whether x is a number."""
    return tl.abs(x) < INFINITY


@triton.jit
def to_bfloat16(value):
    """Round float32 to nearest, ties to even; a NaN becomes the quiet NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16_stochastic(value, random16):
    """Add 16 random bits below the result and cut; NaN stays NaN and Inf is exact."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    kept = (bits >> 16) | tl.where(magnitude > 0x7F800000, 0x40, 0).to(tl.uint32)
    rounded = tl.where(magnitude >= 0x7F800000, kept, (bits + random16) >> 16)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_nearest(value, DTYPE: tl.constexpr):
    """Round to a dtype; float64 goes to the 16-bit ones through float32, as torch's does."""
    if DTYPE == tl.bfloat16:
        result = to_bfloat16(value.to(tl.float32))
    elif DTYPE == tl.float16:
        result = value.to(tl.float32).to(tl.float16)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def stored(value, DTYPE: tl.constexpr):
    """A value as it is read back from memory of a dtype."""
    return round_nearest(value, DTYPE).to(value.dtype)


@triton.jit
def power_of_two(scale):
    """2^(scale - 127) in float32, NaN for 0xFF: the scale of a block of 8-bit numbers."""
    bits = tl.where(scale == 255, 0x7FC00000, scale << 23)
    return tl.where(scale == 0, 0x00400000, bits).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def whole(x):
    """The nearest whole number, ties to even, of numbers up to 2^22."""
    if x.dtype == tl.float64:
        result = (x + 6755399441055744.0) - 6755399441055744.0
    else:
        result = (x + 12582912.0) - 12582912.0
    return result


@triton.jit
def random16(element, seed, param_index, step, stream):
    """The 16 random bits of each element: one Philox-4x32-10 for each of them."""
    words = _rounding_block(element >> 3, seed, param_index, step, stream)
    pair = (element & 7) >> 1
    low = tl.where(pair == 0, words[0], words[1])
    high = tl.where(pair == 2, words[2], words[3])
    word = tl.where(pair < 2, low, high)
    return (word >> ((element & 1) << 4).to(tl.uint32)) & 0xFFFF


@triton.jit
def random16_of_blocks(block, seed, param_index, step, stream):
    """The same for whole blocks [n, m], of 8 elements each: [n, 8 m], one Philox for each block."""
    w0, w1, w2, w3 = _rounding_block(block, seed, param_index, step, stream)
    even = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(even & 0xFFFF, even >> 16)


@triton.jit
def _rounding_block(block, seed, param_index, step, stream):
    """Counter (block and stream, parameter, step), key the seed; see ``rounding.random_bits``."""
    c0 = block.to(tl.uint32)
    c1 = tl.full(c0.shape, 0, tl.int64) + (stream << 28)
    if block.dtype == tl.int64:  # one of int32 has no high half
        c1 = c1 | (block >> 32)
    c1 = c1.to(tl.uint32)
    c2 = tl.full(c0.shape, 0, tl.uint32) + param_index.to(tl.uint32)
    c3 = tl.full(c0.shape, 0, tl.uint32) + step.to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)
