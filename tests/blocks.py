"""8-bit blocks once more, number by number: the oracle of ``fused_adafactor.blocks``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_adafactor.factoring import MatrixView


def round_block(values: Sequence[float]) -> tuple[int, list[int]]:
    """Scale and elements of one block of up to 32 numbers."""
    if not all(map(math.isfinite, values)):
        return 255, [0] * len(values)
    largest = max(map(abs, values))
    exponent = math.frexp(largest)[1] - 1 if largest else -127
    exponent = max(-127, min(127, exponent))
    unit = 2.0 ** (exponent - 6)
    # A division by a power of two is exact, and Python rounds ties to even.
    return exponent + 127, [max(-127, min(127, round(value / unit))) for value in values]


def round_lines(lines: Tensor) -> tuple[Tensor, Tensor]:
    """[lines, length] to q and scales [lines, blocks]."""
    q, scales = [], []
    for line in lines.double().tolist():
        blocks = [round_block(line[i : i + 32]) for i in range(0, len(line), 32)]
        scales.append([scale for scale, _ in blocks])
        q.append([element for _, elements in blocks for element in elements])
    return torch.tensor(q, dtype=torch.int8), torch.tensor(scales, dtype=torch.uint8)


def read_lines(q: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, in float64."""
    exponents = scales.double() - 127 - 6
    units = torch.where(scales == 255, math.nan, 2.0**exponents)
    return q.double() * units.repeat_interleave(32, -1)[..., : q.shape[-1]]


def lines_of(value: Tensor, view: MatrixView | None, columns: bool) -> Tensor:
    """A full-size entry as [lines, length]: the lines that blocks lie along."""
    if view is None:
        return value.reshape(1, -1)
    matrices = value.reshape(view.matrices)
    if view.permutation is not None:
        matrices = value.permute(view.permutation)
    matrices = matrices.mT if columns else matrices
    return matrices.reshape(-1, matrices.shape[-1])


def scales_of(scale: Tensor, view: MatrixView | None, columns: bool) -> Tensor:
    """Scales as a state keeps them, [lines, blocks]."""
    if view is None:
        return scale.reshape(1, -1)
    scale = scale.mT if columns else scale
    return scale.reshape(-1, scale.shape[-1])
