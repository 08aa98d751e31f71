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
# A line of a tensor that has none of its own.
FREE_LINE = 16_384
# A tensor up to this size is one item, and a matrix in a stack need not keep its sums between the
# sweeps: gradient and parameter stay in a core's cache.
CACHED_ELEMENTS = 131_072
# Columns whose sums are added up over the slabs at a time; ``kMergeColumns`` of ``abi.h``.
MERGE_COLUMNS = 2048
# A matrix up to this size is tiny; ``kMaxTiny`` in the kernels.
TINY_ELEMENTS = 64


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
    MERGE = 8


class Form(IntEnum):
    """How the second moments of a tensor come about; the values are those of ``abi.h``."""

    UNFACTORED = 0  # one for each element
    FACTORED = 1  # matrices whose sums are kept between the sweeps
    SMALL = 2  # a slab holds whole matrices, and every sweep takes their sums anew
    TINY = 3  # matrices of a few elements, many at a time


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
        form: How its second moments come about.
        batch: Matrices; 1 where lines are not those of a matrix: unfactored, or tiny matrices.
        rows: Lines of each.
        cols: Elements of each line; where it is no matrix's, of each line but the last.
        matrix: Rows and columns of a tiny matrix, else zeros.
        swapped: Lines are the columns of the view: they are contiguous, and its rows are not.
        lines_per_slab: Lines of a slab; more than ``rows`` are whole matrices.
        slabs: Number of slabs.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    state_strides: tuple[int, ...]
    logical: tuple[int, ...]
    form: Form
    batch: int
    rows: int
    cols: int
    matrix: tuple[int, int]
    swapped: bool
    lines_per_slab: int
    slabs: int

    @property
    def merges(self) -> int:
        """Parts in which the sums of the slabs are added up, where a matrix has several slabs."""
        if self.form is not Form.FACTORED or self.lines_per_slab >= self.rows:
            return 0
        return self.batch * -(-self.cols // MERGE_COLUMNS)


def geometry_of(spec: TensorSpec) -> Geometry:
    """Cut a tensor that has elements."""
    order = tuple(range(len(spec.shape)))
    form = _form(spec)
    swapped = False
    if spec.view is not None and spec.view.permutation is not None:
        order = spec.view.permutation
        row, col = (spec.param_strides[d] for d in order[-2:])
        swapped = row == 1 and col != 1 and form is not Form.TINY
        if swapped:
            order = (*order[:-2], order[-1], order[-2])
    row_major = _row_major(spec.shape)
    kept = spec.state_strides
    dims = _merged([(spec.shape[d], (spec.param_strides[d], kept[d], row_major[d])) for d in order])
    sizes = tuple(size for size, _ in dims)
    strides, state_strides, logical = zip(*(stride for _, stride in dims), strict=True)
    batch, matrix = 1, (0, 0)
    if spec.view is None:
        cols = min(spec.numel, FREE_LINE)
        rows = -(-spec.numel // cols)
    elif form is Form.TINY:
        matrix = (spec.view.rows, spec.view.cols)
        size = math.prod(matrix)
        cols = min(spec.numel, FREE_LINE // size * size)
        rows = -(-spec.numel // cols)
    else:
        batch = math.prod(spec.view.matrices[:-2])
        rows, cols = spec.view.rows, spec.view.cols
        if swapped:
            rows, cols = cols, rows
    lines_per_slab, slabs = _slabs(form, batch, rows, cols)
    return Geometry(
        sizes=sizes,
        strides=strides,
        state_strides=state_strides,
        logical=logical,
        form=form,
        batch=batch,
        rows=rows,
        cols=cols,
        matrix=matrix,
        swapped=swapped,
        lines_per_slab=lines_per_slab,
        slabs=slabs,
    )


def _form(spec: TensorSpec) -> Form:
    if spec.view is None:
        return Form.UNFACTORED
    size = spec.view.rows * spec.view.cols
    if size <= TINY_ELEMENTS:
        return Form.TINY
    return Form.SMALL if size <= CACHED_ELEMENTS and size < spec.numel else Form.FACTORED


def _slabs(form: Form, batch: int, rows: int, cols: int) -> tuple[int, int]:
    """Lines of a slab, and slabs."""
    if form is Form.SMALL:
        matrices = max(1, SLAB_ELEMENTS // (rows * cols))
        return matrices * rows, -(-batch // matrices)
    # Only sums across lines have to stay small beside what is summed.
    least = SLAB_LINES if form is Form.FACTORED else 1
    lines = max(least, SLAB_ELEMENTS // cols)
    if rows <= lines:
        return rows, batch
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


def is_whole(geometry: Geometry) -> bool:
    """Whether a tensor that is stepped without a pause is one item."""
    return geometry.batch * geometry.rows * geometry.cols <= CACHED_ELEMENTS


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
        if everything and is_whole(geometry):
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
        merges = range(geometries[number].merges)
        yield from ((ItemKind.MERGE, number, part) for part in merges)
        yield ItemKind.FINALIZE, number, 0
        yield from ((ItemKind.UPDATE_RMS, number, slab) for slab in slabs)
        yield ItemKind.MEASURE, number, 0
        yield from ((ItemKind.APPLY, number, slab) for slab in reversed(slabs))
