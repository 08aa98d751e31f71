"""How low-precision parameters and second moments are written: one function of (value, key).

This file is the specification. Every backend reproduces it bit for bit, whatever its tiles, threads
or shards, so each bit is defined here and nothing depends on a launch, a device or a global
generator. Imports torch and the standard library only; no function reads a tensor on the host.

References:
    Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3:
    Philox-4x32-10.
    Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training (arXiv 2010.06192): stochastic
    rounding and Kahan summation of the parameter update.

A bfloat16 second moment is always rounded at random. One step of an average moves it by a share
1 - beta2 of what it lacks; where that is less than half a unit in the last place, rounding to
nearest takes it back, every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

import torch
from torch import Tensor

_MASK_16 = 0xFFFF
_MASK_32 = 0xFFFF_FFFF

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIER_0 = 0xD251_1F53
_PHILOX_MULTIPLIER_1 = 0xCD9E_8D57
_PHILOX_KEY_STEP_0 = 0x9E37_79B9
_PHILOX_KEY_STEP_1 = 0xBB67_AE85

_ELEMENTS_PER_BLOCK = 8
# Of the high word of a block's number, which is below 2**28 as an element's is below 2**63.
_STREAM_SHIFT = 28

# Rounded at a time: the int64 intermediates, some ten times the size of a bfloat16 parameter, stay
# a few tens of MB, and on a CPU near the cache.
_SLAB_ELEMENTS = 2**20

_FLOAT32_EXPONENT = 0x7F80_0000
_FLOAT32_MAGNITUDE = 0x7FFF_FFFF
_BFLOAT16_QUIET_BIT = 0x0040

_MATH_DTYPES = (torch.float32, torch.float64)
_PARAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Rounding(str, Enum):
    """How the new value of a parameter is rounded to the parameter's dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    KAHAN = "kahan"

    @classmethod
    def parse(cls, value: str | Rounding) -> Rounding:
        """Returns the member that ``value`` names.

        Args:
            value: A member, or its value: ``"nearest"``, ``"stochastic"`` or ``"kahan"``.

        Raises:
            ValueError: ``value`` is anything else; the message lists the valid values.
        """
        try:
            return cls(value)
        except ValueError:
            valid = ", ".join(repr(member.value) for member in cls)
            raise ValueError(f"rounding must be one of {valid}, got {value!r}") from None


class Stream(IntEnum):
    """Which value of a tensor is rounded: each has random bits of its own.

    A name goes with the meaning, not with the memory layout: ``row_var`` has one value for each row
    of the matrix view, whatever lies contiguous. The unfactored ``var`` takes the place of
    ``row_var``, as no tensor has both.
    """

    PARAM = 0
    ROW_VAR = 1
    VAR = 1
    COL_VAR = 2


@dataclass(frozen=True)
class RoundingKey:
    """What the random bits of one tensor in one step depend on, besides the element.

    Attributes:
        seed: 0 <= seed < 2**63, so that it also fits the int64 that scalars travel in. It is the
            Philox key: word 0 is the low, word 1 the high 32 bits.
        param_index: 0 <= param_index < 2**32. Position of the parameter in the optimizer, counted
            over all groups, the same on every rank. Counter word c2.
        step: The parameter's step count as an int >= 0, or a 0-d tensor of any real dtype, on the
            parameter's device or the CPU; a device tensor is never read on the host. Counter word
            c3 is its low 32 bits.
        stream: What is rounded. The top 4 bits of counter word c1.
    """

    seed: int
    param_index: int
    step: int | Tensor
    stream: Stream = Stream.PARAM

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        if not 0 <= self.param_index < 2**32:
            raise ValueError(
                f"param_index must be at least 0 and below 2**32, got {self.param_index}"
            )
        if isinstance(self.step, Tensor):
            if self.step.dim() != 0:
                raise ValueError(
                    f"step must be an int or a 0-d tensor, got shape {tuple(self.step.shape)}"
                )
        elif self.step < 0:
            raise ValueError(f"step must be at least 0, got {self.step}")


def philox_4x32(
    counter: tuple[int | Tensor, int | Tensor, int | Tensor, int | Tensor],
    key: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four counter words and two key words to four random words.

    One round, with all words and sums modulo 2**32::

        c0, c1, c2, c3 = (hi(0xCD9E8D57 * c2) ^ c1 ^ k0,  lo(0xCD9E8D57 * c2),
                          hi(0xD2511F53 * c0) ^ c3 ^ k1,  lo(0xD2511F53 * c0))
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85

    ten times. The same as ``tl.philox(seed, c0, c1, c2, c3)`` of Triton with
    ``key = (seed & 0xFFFFFFFF, seed >> 32)`` and counters of 32 bits; with 64-bit counters Triton
    runs another generator, Philox-4x64.

    Args:
        counter: c0 to c3, ints or int64 tensors that broadcast together. Only the low 32 bits of
            each count.
        key: k0, k1. Only the low 32 bits of each count.

    Returns:
        Words 0 to 3, int64 tensors holding values in [0, 2**32). Their shape is the counters'
        broadcast shape; 0-d on torch's default device where all counters are ints.
    """
    c0, c1, c2, c3 = (word & _MASK_32 for word in counter)
    k0, k1 = (word & _MASK_32 for word in key)
    for _ in range(_PHILOX_ROUNDS):
        high_0, low_0 = _multiply_32(c0, _PHILOX_MULTIPLIER_0)
        high_1, low_1 = _multiply_32(c2, _PHILOX_MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + _PHILOX_KEY_STEP_0) & _MASK_32
        k1 = (k1 + _PHILOX_KEY_STEP_1) & _MASK_32
    # No word needs expanding: ten rounds mix each counter into each of them.
    return torch.as_tensor(c0), torch.as_tensor(c1), torch.as_tensor(c2), torch.as_tensor(c3)


def random_bits(key: RoundingKey, elements: Tensor) -> Tensor:
    """The 16 random bits of each of the given elements.

    An element is known by its row-major index in the logical, global tensor, before sharding and
    whatever the memory layout: of a parameter or an unfactored second moment in the shape that the
    user sees, of ``row_var`` as [..., n], of ``col_var`` as [..., m]. One Philox block serves 8 of
    them::

        block    = element >> 3
        counter  = (low 32 bits of block, high 32 bits of block | stream << 28, param_index, step)
        key      = (seed & 0xFFFFFFFF, seed >> 32)
        word     = philox(counter, key)[(element & 7) >> 1]
        bits     = low 16 bits of word if element is even, high 16 bits if it is odd

    Args:
        key: Seed, parameter, step and stream.
        elements: Indices >= 0, int64, any shape and order.

    Returns:
        int64 tensor of values in [0, 2**16), shaped as ``elements``.
    """
    words = _block_words(key, elements >> 3)
    pair = (elements & 7) >> 1
    word = torch.where(
        pair < 2,
        torch.where(pair == 0, words[0], words[1]),
        torch.where(pair == 2, words[2], words[3]),
    )
    return (word >> ((elements & 1) << 4)) & _MASK_16


def random_bits_range(
    key: RoundingKey, count: int, start: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """``random_bits`` of the elements start, ..., start + count - 1, with one Philox per 8 of them.

    Args:
        key: Seed, parameter, step and stream.
        count: How many elements, 0 or more. A whole tensor is ``count = numel``, ``start = 0``.
        start: Index of the first one, 0 or more. It need not be a multiple of 8.
        device: Where the result lives; torch's default device if None.

    Returns:
        int64 tensor ``[count]`` of values in [0, 2**16).
    """
    first_block = start // _ELEMENTS_PER_BLOCK
    end_block = -(-(start + count) // _ELEMENTS_PER_BLOCK)
    blocks = torch.arange(first_block, end_block, dtype=torch.int64, device=device)
    words = torch.stack(_block_words(key, blocks), dim=-1)
    bits = torch.stack((words & _MASK_16, words >> 16), dim=-1).flatten()
    skipped = start - first_block * _ELEMENTS_PER_BLOCK
    return bits[skipped : skipped + count]


def round_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to ``dtype``: to nearest, ties to even.

    float64 goes to bfloat16 and float16 through float32, as torch's own conversion does: two
    roundings, each to nearest even. Inf and the sign of zero are kept, subnormals are not flushed,
    and what lies half a unit or more beyond the largest finite value becomes Inf. NaN stays NaN;
    which NaN is left to the device's conversion instruction.

    Args:
        value: float32 or float64, the math dtype. Any shape.
        dtype: bfloat16, float16, float32 or float64.

    Returns:
        Tensor of ``dtype`` shaped as ``value``. It is ``value`` itself if the dtype is the same.
    """
    _check_dtypes(value, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        return value.to(torch.float32).to(dtype)
    return value.to(dtype)


def round_stochastic(
    value: Tensor, dtype: torch.dtype, key: RoundingKey, elements: Tensor | None = None
) -> Tensor:
    """Rounds to ``dtype`` up or down at random, so that the expected result is the value.

    To bfloat16, on the 32 bits of the value as float32 (float64 is rounded to nearest float32
    first)::

        finite   (bits + random_bits) >> 16
        Inf      bits >> 16
        NaN      (bits >> 16) | 0x0040       sign and upper payload kept, quiet bit set

    The result is one of the two neighbours of the value and is the one away from zero with
    probability (bits & 0xFFFF) / 2**16, exactly. So a bfloat16 value is unchanged, -0.0 and
    subnormals included, and a value beyond the largest finite bfloat16 may become Inf, as it may
    with ``round_nearest``. To float32 and float64 it is ``round_nearest``, as these are
    fine enough for updates not to be lost.

    Args:
        value: float32 or float64, the math dtype. Any shape and memory layout.
        dtype: bfloat16, float32 or float64.
        key: Seed, parameter, step and stream.
        elements: Row-major index of each value in the logical global tensor, int64, shaped as
            ``value``. None where ``value`` is the whole tensor in its own shape.

    Returns:
        Tensor of ``dtype`` shaped as ``value``; contiguous if it is rounded to bfloat16.

    Raises:
        ValueError: ``dtype`` is float16, or ``elements`` is not shaped as ``value``.
    """
    _check_dtypes(value, dtype)
    if dtype == torch.float16:
        raise ValueError(
            "rounding 'stochastic' does not take float16 parameters: float16 is no prefix of "
            "float32 and has its own subnormals, so adding random bits and truncating does not "
            "round it without bias; use 'kahan' or 'nearest'"
        )
    if elements is not None and elements.shape != value.shape:
        raise ValueError(
            f"elements must be shaped as value, {tuple(value.shape)}, got {tuple(elements.shape)}"
        )
    if dtype != torch.bfloat16:
        return round_nearest(value, dtype)

    rounded = torch.empty(value.shape, dtype=dtype, device=value.device)
    flat_rounded, flat_value = rounded.view(-1), value.reshape(-1)
    flat_elements = None if elements is None else elements.reshape(-1)
    for start in range(0, value.numel(), _SLAB_ELEMENTS):
        slab = slice(start, start + _SLAB_ELEMENTS)
        part = flat_value[slab]
        if flat_elements is None:
            noise = random_bits_range(key, part.numel(), start=start, device=part.device)
        else:
            noise = random_bits(key, flat_elements[slab])
        flat_rounded[slab] = _add_and_truncate(part, noise)
    return rounded


def is_rounding_of(rounded: Tensor, value: Tensor, rounding: Rounding) -> Tensor:
    """Whether values may have been rounded to these, element by element.

    Args:
        rounded: bfloat16, float16, float32 or float64.
        value: Any of these. Shaped as ``rounded``.
        rounding: How; at random only to bfloat16, where either neighbour will do.

    Returns:
        Tensor of bool. False where ``value`` is NaN and rounded to nearest.
    """
    if value.dtype not in _MATH_DTYPES:
        value = value.to(torch.float32)
    nearest = rounded == round_nearest(value, rounded.dtype)
    if rounding is not Rounding.STOCHASTIC or rounded.dtype is not torch.bfloat16:
        return nearest
    bits = value.to(torch.float32).view(torch.int32)
    away = (rounded.view(torch.int16).to(torch.int32) - (bits >> 16)) & _MASK_16
    return nearest | (away == 0) | ((away == 1) & ((bits & _MASK_16) != 0))


def round_kahan(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds to nearest and keeps what was lost, to be added before the next rounding.

    ::

        rounded      = round_nearest(value, dtype)
        compensation = round_nearest(value - rounded, dtype)      0 where rounded is not finite

    with the subtraction, which is exact, in the dtype of ``value``. The parameter is
    ``rounded + compensation``: 17 bits or more in bfloat16, 23 or more in float16. What the
    compensation cannot hold is lost; that matters for float16, whose smallest step is 2**-24 at any
    size, so there a parameter resolves no changes below 2**-25.

    Args:
        value: parameter + old compensation + update, summed in the math dtype, float32 or float64.
            Any shape.
        dtype: bfloat16, float16, float32 or float64.

    Returns:
        ``(rounded, compensation)``, both of ``dtype`` and shaped as ``value``.
    """
    rounded = round_nearest(value, dtype)
    # NaN and Inf would poison the compensation for good, even once the parameter is repaired.
    lost = torch.where(torch.isfinite(rounded), value - rounded.to(value.dtype), 0.0)
    return rounded, round_nearest(lost, dtype)


def _multiply_32(word: int | Tensor, multiplier: int) -> tuple[int | Tensor, int | Tensor]:
    """High and low 32 bits of a 32 x 32-bit product."""
    # The product needs 64 unsigned bits and int64 has 63. In halves no term reaches 2**49.
    low_part = (word & _MASK_16) * multiplier
    upper = (word >> 16) * multiplier + (low_part >> 16)
    return upper >> 16, ((upper & _MASK_16) << 16) | (low_part & _MASK_16)


def _block_words(key: RoundingKey, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four Philox words of each block of 8 elements."""
    step = key.step.to(torch.int64) if isinstance(key.step, Tensor) else key.step
    counter = (blocks, (blocks >> 32) | (key.stream << _STREAM_SHIFT), key.param_index, step)
    return philox_4x32(counter, (key.seed, key.seed >> 32))


def _add_and_truncate(value: Tensor, noise: Tensor) -> Tensor:
    """The rule of ``round_stochastic``, with the random bits given."""
    # Sign extension turns the upper half of a negative value into the int16 of the same bits.
    bits = value.to(torch.float32).view(torch.int32).to(torch.int64)
    truncated = bits >> 16
    # In a NaN the sum could carry into the sign: 0x7FFFFFFF would come out as -0.0. Truncation
    # alone would make the NaN 0x7F800001 an Inf.
    is_nan = (bits & _FLOAT32_MAGNITUDE) > _FLOAT32_EXPONENT
    is_finite = (bits & _FLOAT32_EXPONENT) != _FLOAT32_EXPONENT
    kept = torch.where(is_nan, truncated | _BFLOAT16_QUIET_BIT, truncated)
    rounded = torch.where(is_finite, (bits + noise) >> 16, kept)
    return rounded.to(torch.int16).view(torch.bfloat16)


def _check_dtypes(value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype not in _MATH_DTYPES:
        raise ValueError(f"value must be float32 or float64, the math dtype, got {value.dtype}")
    if dtype not in _PARAM_DTYPES:
        valid = ", ".join(str(d) for d in _PARAM_DTYPES)
        raise ValueError(f"dtype must be one of {valid}, got {dtype}")
