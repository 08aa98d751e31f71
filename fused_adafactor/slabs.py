"""How a tensor is cut for a compiled backend: lines, slabs of lines, and items in ticket order.

Everything here follows from one tensor's own shape and strides, never from what else is stepped,
so that its sums are always added in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fused_adafactor.plan import Phase
from fused_adafactor.spec import TensorSpec

# Of a slab: enough elements to be worth a ticket, and enough lines that the sums across them, two
# numbers for each column of a slab, stay under 2 % of a bfloat16 parameter.
SLAB_ELEMENTS = 131_072
SLAB_LINES = 256
# A line of an unfactored tensor, which has none of its own.
VECTOR_LINE = 16_384
# A tensor up to this size is one item: gradient and parameter stay in a core's cache.
WHOLE_ELEMENTS = 131_072


class ItemKind(IntEnum):
    """What an item does; the values are those of ``abi.h``."""

    WHOLE = 0
    STATS = 1
    FINALIZE = 2
    UPDATE_RMS = 3
    MEASURE = 4
    APPLY = 5
    ACCUMULATE = 6
    AVERAGE = 7


@dataclass(frozen=True)
class Geometry:
    """A tensor as lines of elements.

    Elements are numbered row-major over ``sizes``: the dimensions of the matrix view (of the
    parameter, where that is a reshape of it), merged where that changes nothing.

    Attributes:
        sizes: Merged dimensions.
        strides: Of the parameter and its gradient, in elements.
        state_strides: Of everything full-size that the state holds.
        logical: Theirs in the row-major numbering of the parameter.
        batch: Matrices.
        rows: Lines of each.
        cols: Elements of each line; of an unfactored tensor, of each line but the last.
        swapped: Lines are the columns of the view: they are contiguous, and its rows are not.
        lines_per_slab: Lines of a slab; more than ``rows`` are whole matrices.
        slabs: Number of slabs.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    state_strides: tuple[int, ...]
    logical: tuple[int, ...]
    batch: int
    rows: int
    cols: int
    swapped: bool
    lines_per_slab: int
    slabs: int


def geometry_of(spec: TensorSpec) -> Geometry:
    """Cut a tensor that has elements."""
    order = tuple(range(len(spec.shape)))
    swapped = False
    if spec.view is not None and spec.view.permutation is not None:
        order = spec.view.permutation
        row, col = (spec.param_strides[d] for d in order[-2:])
        swapped = row == 1 and col != 1
        if swapped:
            order = (*order[:-2], order[-1], order[-2])
    row_major = _row_major(spec.shape)
    kept = spec.state_strides
    dims = _merged([(spec.shape[d], (spec.param_strides[d], kept[d], row_major[d])) for d in order])
    sizes = tuple(size for size, _ in dims)
    strides, state_strides, logical = zip(*(stride for _, stride in dims), strict=True)
    if spec.view is None:
        cols = min(spec.numel, VECTOR_LINE)
        batch, rows = 1, -(-spec.numel // cols)
    else:
        batch = math.prod(spec.view.matrices[:-2])
        rows, cols = spec.view.rows, spec.view.cols
        if swapped:
            rows, cols = cols, rows
    lines_per_slab, slabs = _slabs(batch, rows, cols)
    return Geometry(
        sizes, strides, state_strides, logical, batch, rows, cols, swapped, lines_per_slab, slabs
    )


def _slabs(batch: int, rows: int, cols: int) -> tuple[int, int]:
    lines = max(SLAB_LINES, SLAB_ELEMENTS // cols)
    if rows <= lines:
        matrices = max(1, lines // rows)
        return matrices * rows, -(-batch // matrices)
    return lines, batch * -(-rows // lines)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _merged(
    dims: list[tuple[int, tuple[int, int, int]]],
) -> list[tuple[int, tuple[int, int, int]]]:
    """Dimensions (size, strides) with neighbours joined where all strides allow it."""
    merged: list[tuple[int, tuple[int, int, int]]] = []
    for size, strides in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(stride * size for stride in strides):
            size *= merged.pop()[0]
        merged.append((size, strides))
    return merged or [(1, (1, 1, 1))]


def items_of(
    geometries: Sequence[Geometry], phases: Sequence[Phase]
) -> Iterator[tuple[ItemKind, int, int]]:
    """Items (kind, tensor, slab) in ticket order.

    The second sweep of a tensor comes after the first sweep of the next one, so that nobody waits
    for sums that are still being taken, and goes through the slabs backwards, latest read first.
    """
    everything = len(phases) == len(Phase)
    waiting: list[int] = []
    for number, geometry in enumerate(geometries):
        if everything and geometry.batch * geometry.rows * geometry.cols <= WHOLE_ELEMENTS:
            yield ItemKind.WHOLE, number, 0
            continue
        if Phase.STATS in phases:
            yield from ((ItemKind.STATS, number, slab) for slab in range(geometry.slabs))
        if Phase.APPLY in phases:
            yield from _second_sweeps(geometries, waiting)
            waiting = [number]
    yield from _second_sweeps(geometries, waiting)


def _second_sweeps(
    geometries: Sequence[Geometry], tensors: list[int]
) -> Iterator[tuple[ItemKind, int, int]]:
    for number in tensors:
        slabs = range(geometries[number].slabs)
        yield ItemKind.FINALIZE, number, 0
        yield from ((ItemKind.UPDATE_RMS, number, slab) for slab in slabs)
        yield ItemKind.MEASURE, number, 0
        yield from ((ItemKind.APPLY, number, slab) for slab in reversed(slabs))
