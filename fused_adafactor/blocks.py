"""Numbers of 8 bits in blocks that share a scale: a first moment in a quarter of float32's memory.

This file is the specification. Every backend reproduces it bit for bit, and can: all that is done
is to multiply by powers of two, which is exact, and to round once. Imports torch and the standard
library only; no function reads a tensor on the host.

The format is MXINT8. A block is 32 neighbours of a line, the last one of a line perhaps fewer. It
has one byte of scale (E8M0: the power of two 2^(scale - 127), 0xFF for NaN), and its elements are
int8 q from -127 to 127, in 64ths of that power::

    x ≈ q 2^(scale - 127) / 64

Error of one rounding: with L the largest magnitude of the block, L in [2^e, 2^(e+1)), a unit is
2^(e-6) and x is off by at most half a unit, 2^(e-7) <= L / 128. Where x is more than 127.5 units,
which the range cuts off at 127, it is off by x / unit - 127 < 1 units, and as L is then nearly 128
units that is below L / 128 too. Below 2^-127 the scale ends, and x is off by at most 2^-134; only
float64 has numbers of 2^128 and more, which are cut off.

Error of an average m_t = beta1 m_(t-1) + (1 - beta1) x_t that is rounded in every step: what is
stored is m_t + E_t with E_t = beta1 E_(t-1) + d_t, |d_t| <= L / 128, L being the largest that the
block has been. So |E_t| <= (1 - beta1^t) / (1 - beta1) L / 128: for beta1 = 0.9 at most 8 % of the
block's largest. The bound is attained where roundings have one sign: an element stays where it is
once a step changes it by less than half a unit.

References:
    OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6: blocks of 32, E8M0, MXINT8.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # elements
POISONED = 0xFF  # the scale of a block that reads as NaN

_LARGEST = 127  # q; -128 is left out, so that the range has no sign
_UNITS = 64.0  # of a power of two
_FLOAT32_QUIET_NAN = 0x7FC0_0000
_POWER_MINUS_127 = 0x0040_0000  # 2^-127, subnormal in float32
# Of the math dtypes: their bits as integers, where the exponent begins, and what it is larger by
# than that of float32, which is the scale.
_EXPONENTS = {torch.float32: (torch.int32, 23, 0), torch.float64: (torch.int64, 52, 1023 - 127)}


def blocks_of(length: int) -> int:
    """Number of blocks of a line of so many elements."""
    return -(-length // BLOCK)


def quantise(value: Tensor) -> tuple[Tensor, Tensor]:
    """Round lines of numbers to blocks.

    ::

        scale = 127 + floor(log2(largest magnitude)), from 0 to 254; that of zeros is 0
        q     = value 2^(127 - scale) 64, to nearest, ties to even, cut off at ±127

    A block with a NaN or an infinity has the scale 0xFF, and every q is 0: it reads as NaN, because
    a poisoned moment must not look healthy.

    Args:
        value: float32 or float64, [..., length].

    Returns:
        (q, scale): int8 shaped as ``value``, and uint8 [..., blocks_of(length)].
    """
    blocks = _cut(value)
    scale = _scale_of(blocks)
    units = blocks * _power_of_two(254 - scale, value.dtype).unsqueeze(-1) * _UNITS
    q = units.clamp(-_LARGEST, _LARGEST).round().masked_fill(scale.unsqueeze(-1) == POISONED, 0.0)
    return _joined(q, value.shape).to(torch.int8), scale.to(torch.uint8)


def dequantise(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What lines of blocks stand for, exactly.

    Quantising the result gives the same numbers again, and the same bits wherever q and scale come
    from ``quantise``.

    Args:
        q: int8, [..., length].
        scale: uint8, [..., blocks_of(length)].
        dtype: float32 or float64.

    Returns:
        Tensor of ``dtype`` shaped as ``q``.
    """
    power = _power_of_two(scale.to(torch.int32), dtype)
    return _joined(_cut(q).to(dtype) / _UNITS * power.unsqueeze(-1), q.shape)


def _cut(lines: Tensor) -> Tensor:
    """[..., length] as [..., blocks, 32], with zeros for what the last block lacks."""
    length = lines.shape[-1]
    count = blocks_of(length)
    padded = torch.nn.functional.pad(lines, (0, count * BLOCK - length))
    return padded.reshape(*lines.shape[:-1], count, BLOCK)


def _joined(blocks: Tensor, shape: torch.Size) -> Tensor:
    """[..., blocks, 32] as [..., length], without what was added."""
    count = blocks_of(shape[-1])
    return blocks.reshape(*shape[:-1], count * BLOCK)[..., : shape[-1]]


def _scale_of(blocks: Tensor) -> Tensor:
    """Scale of each block, int32 [..., blocks], from the exponent bits of its largest magnitude."""
    integers, digits, offset = _EXPONENTS[blocks.dtype]
    # Bits of magnitudes are ordered as these are, with infinity and then NaN above all others.
    field = blocks.abs().view(integers).amax(-1) >> digits
    scale = (field - offset).clamp(0, 254)
    finite = blocks.isfinite().all(-1)
    return torch.where(finite, scale, POISONED).to(torch.int32)


def _power_of_two(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(scale - 127); NaN for 0xFF. Exact, subnormal or not."""
    bits = torch.where(scale == 0, _POWER_MINUS_127, scale << 23)
    bits = torch.where(scale == POISONED, _FLOAT32_QUIET_NAN, bits)
    return bits.to(torch.int32).view(torch.float32).to(dtype)
