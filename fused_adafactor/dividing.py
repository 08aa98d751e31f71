"""How a dimension is divided over processes: where each has its part, and if that cuts a block.

As DTensor does it. Meshes are asked for sizes and coordinates only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from fused_adafactor.blocks import BLOCK, blocks_of
from fused_adafactor.rule import Rule
from fused_adafactor.spec import TensorSpec


def block_of(size: int, axes: Iterable[int], mesh: Any) -> tuple[int, int]:
    """Where the part of a dimension begins and ends that this process has.

    Each dimension of the mesh divides what the ones before it have left, as torch.chunk does.
    """
    block = 0, size
    for axis in axes:
        block = _divided(block, mesh.size(axis))[mesh.get_local_rank(axis)]
    return block


def _parts(size: int, axes: Iterable[int], mesh: Any) -> list[tuple[int, int]]:
    """Where the parts of all processes begin and end, in order."""
    parts = [(0, size)]
    for axis in axes:
        parts = [piece for part in parts for piece in _divided(part, mesh.size(axis))]
    return parts


def _divided(block: tuple[int, int], count: int) -> list[tuple[int, int]]:
    begin, end = block
    chunk = -(-(end - begin) // count)
    cuts = [min(begin + number * chunk, end) for number in range(count + 1)]
    return list(pairwise(cuts))


def refuse_cut_blocks(spec: TensorSpec, rule: Rule) -> None:
    """Refuse a first moment of 8 bits whose blocks would not be those of a single process.

    All processes do, also those whose own part begins and ends with a block.

    Raises:
        TypeError: Parts of a parameter cut a block.
    """
    if not spec.is_split or rule.momentum_dtype(spec.param_dtype) is not torch.int8:
        return
    reason = _cuts_blocks(spec)
    if reason is not None:
        raise TypeError(
            f"{spec.id} of shape {spec.whole} is distributed, and {reason}, so blocks of "
            "momentum_dtype=torch.int8 would not be those of a single process. Put it in a param "
            "group with momentum_dtype=torch.bfloat16, or distribute it in another way"
        )


def _cuts_blocks(spec: TensorSpec) -> str | None:
    """Why some process has a part of a block only, or None."""
    assert spec.shard is not None
    whole, split = spec.whole, spec.shard.split
    if spec.is_scattered:
        return "its parts are scattered over the rows of its matrix"
    if spec.view is None:
        # One line of all elements: of one dimension's parts if there is nothing before it.
        dims = [dim for dim, axes in enumerate(split) if axes]
        if math.prod(whole[: dims[-1]]) != 1:
            return "its parts are not in one piece of its elements"
        dim, step = dims[-1], math.prod(whole[dims[-1] + 1 :])
    else:
        assert spec.view.permutation is not None
        if spec.of_whole().swapped != spec.swapped:
            return "the dimension that lies together in memory is split"
        dim, step = spec.view.permutation[-2 if spec.swapped else -1], 1
    # Scales are distributed as DTensor divides so many of them.
    scales = blocks_of(whole[dim] * step)
    pairs = (_parts(size, split[dim], spec.shard.mesh) for size in (whole[dim], scales))
    for (begin, end), kept in zip(*pairs, strict=True):
        first, last = begin * step, end * step
        if first < last and (first % BLOCK or kept != (first // BLOCK, blocks_of(last))):
            return f"a part of its dimension {dim} does not begin with a block of {BLOCK} elements"
    return None
