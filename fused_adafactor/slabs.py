"""How a tensor is cut for a compiled backend: lines, slabs of lines, and items in ticket order.

Everything here follows from one tensor's own shape and strides, never from what else is stepped,
so that its sums are always added in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice

from fused_adafactor.plan import Phase
from fused_adafactor.spec import TINY_ELEMENTS, TensorSpec


@dataclass(frozen=True)
class Cut:
    """How large a backend wants the pieces; the same for every machine that it runs on.

    Attributes:
        slab_elements: Of a slab, about: enough to be worth a ticket.
        slab_lines: Of a slab of a matrix, at least: the sums across them, two numbers for each
            column of each slab, must stay small beside the tensor.
        most_slabs: Of a matrix, about.
        free_line: Length of a line where a tensor has none of its own.
        whole_elements: A tensor up to this size is stepped in one go, by one thread or program.
        small_elements: A matrix in a stack, up to this size, does not keep its sums between the
            sweeps: gradient and parameter stay in a core's cache.
        merge_columns: Columns whose sums are added up over the slabs at a time.
        aligned_lines: Lines of tiny matrices hold a multiple of so many elements.
    """

    slab_elements: int
    slab_lines: int
    most_slabs: int
    free_line: int
    whole_elements: int
    small_elements: int
    merge_columns: int
    aligned_lines: int = 1


# A core's L2 cache holds the gradient and the parameter of so many elements. With so many lines the
# sums stay under 2 % of a parameter that is as wide as they are. ``kMergeColumns`` of ``abi.h``.
CPU_CUT = Cut(
    slab_elements=131_072,
    slab_lines=128,
    most_slabs=2**62,
    free_line=16_384,
    whole_elements=131_072,
    small_elements=131_072,
    merge_columns=2048,
)
# Of a parameter that is half as wide as its sums.
CPU_CUT_OF_HALVES = replace(CPU_CUT, slab_lines=256)


class ItemKind(IntEnum):
    """What an item does; the values are those of ``abi.h``, 9 and 10 are a GPU's.

    A CPU's ``SHARE`` puts all sums of a tensor into messages, a GPU's only those across lines.
    """

    WHOLE = 0
    STATS = 1
    FINALIZE = 2
    UPDATE_RMS = 3
    MEASURE = 4
    APPLY = 5
    ACCUMULATE = 6
    AVERAGE = 7
    MERGE = 8
    CHUNK = 9  # sums along very long lines, chunk by chunk
    TOTAL = 10  # sums of a tensor that something waits for: a norm, or a message
    SHARE = 11  # sums that go into a message
    SETTLE = 12  # RMS(u) from a message


Item = tuple[ItemKind, int, int]  # kind, tensor, slab or part or strip


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
        strides: Of the parameter, in elements.
        grad_strides: Of its gradient.
        state_strides: Of everything full-size that the state holds.
        logical: Theirs in the row-major numbering of the parameter, the whole one.
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
    grad_strides: tuple[int, ...]
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
    def slabs_per_matrix(self) -> int:
        """Slabs of one matrix; 1 where a slab holds whole matrices."""
        return 1 if self.lines_per_slab >= self.rows else -(-self.rows // self.lines_per_slab)


@dataclass(frozen=True)
class WholeParameter:
    """The parameter that a tensor is a part of, or is itself; lines are those of its geometry.

    Attributes:
        rows: Lines of a matrix of it.
        cols: Elements of such a line.
        first_row: Place of the part's first line in a matrix.
        first_col: Place of its first column.
        first_element: Row-major index of its first element.
        stack: Dimensions (size, stride) of the part's matrices, merged; the strides number them in
            the parameter.
        first_matrix: Number of its first matrix there.
    """

    rows: int
    cols: int
    first_row: int
    first_col: int
    first_element: int
    stack: tuple[tuple[int, int], ...]
    first_matrix: int


def geometry_of(spec: TensorSpec, cut: Cut) -> Geometry:
    """Cut a tensor; one without elements is a part of a parameter that has some."""
    order = tuple(range(len(spec.shape)))
    form, swapped = _form(spec, cut), spec.swapped
    if spec.view is not None and spec.view.permutation is not None:
        order = spec.view.permutation
        if swapped:
            order = (*order[:-2], order[-1], order[-2])
    row_major = _row_major(spec.whole)
    kept = spec.state_strides
    layouts = (spec.param_strides, spec.grad_strides, kept, row_major)
    dims = _merged([(spec.shape[d], tuple(strides[d] for strides in layouts)) for d in order])
    dims = dims or [(1, (1,) * len(layouts))]
    sizes = tuple(size for size, _ in dims)
    strides, grad_strides, state_strides, logical = zip(*(dim for _, dim in dims), strict=True)
    batch, matrix = 1, (0, 0)
    if spec.view is None:
        cols = max(1, min(spec.numel, cut.free_line))
        rows = -(-spec.numel // cols)
    elif form is Form.TINY:
        matrix = (spec.view.rows, spec.view.cols)
        unit = math.lcm(math.prod(matrix), cut.aligned_lines)
        cols = max(1, min(spec.numel, cut.free_line // unit * unit))
        rows = -(-spec.numel // cols)
    else:
        batch = math.prod(spec.view.matrices[:-2])
        rows, cols = spec.view.rows, spec.view.cols
        if swapped:
            rows, cols = cols, rows
    apart = _splits_matrices(spec) or spec.numel == 0
    lines_per_slab, slabs = _slabs(form, batch, rows, cols, cut, apart)
    return Geometry(
        sizes=sizes,
        strides=strides,
        grad_strides=grad_strides,
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


def whole_of(spec: TensorSpec, geometry: Geometry) -> WholeParameter:
    """Where a tensor is in its parameter."""
    offset = (0,) * len(spec.shape) if spec.shard is None else spec.shard.offset
    elements = zip(offset, _row_major(spec.whole), strict=True)
    first_element = sum(first * stride for first, stride in elements)
    if spec.view is None or spec.view.permutation is None:
        rows, cols = geometry.rows, geometry.cols
        return WholeParameter(rows, cols, 0, 0, first_element, ((geometry.batch, 1),), 0)
    *stacked, row, col = spec.view.permutation
    if geometry.swapped:
        row, col = col, row
    strides = _row_major(tuple(spec.whole[d] for d in stacked))
    return WholeParameter(
        rows=spec.whole[row],
        cols=spec.whole[col],
        first_row=offset[row],
        first_col=offset[col],
        first_element=first_element,
        stack=tuple(
            (size, stride)
            for size, (stride,) in _merged(
                [(spec.shape[d], (stride,)) for d, stride in zip(stacked, strides, strict=True)]
            )
        ),
        first_matrix=sum(offset[d] * stride for d, stride in zip(stacked, strides, strict=True)),
    )


def _splits_matrices(spec: TensorSpec) -> bool:
    """Whether the lines of a matrix are on several processes, or parts of each line."""
    return bool(spec.rows_over or spec.cols_over)


def _form(spec: TensorSpec, cut: Cut) -> Form:
    if spec.view is None:
        return Form.UNFACTORED
    if _splits_matrices(spec):
        return Form.FACTORED  # its sums are only known once they have been taken
    size = spec.view.rows * spec.view.cols
    if size <= TINY_ELEMENTS:
        return Form.TINY
    return Form.SMALL if size <= cut.small_elements and size < spec.numel else Form.FACTORED


def _slabs(form: Form, batch: int, rows: int, cols: int, cut: Cut, apart: bool) -> tuple[int, int]:
    """Lines of a slab, and slabs; ``apart`` where a slab must not have lines of two matrices."""
    # Only sums across lines have to stay small beside what is summed.
    least = cut.slab_lines if form is Form.FACTORED else 1
    lines = max(least, cut.slab_elements // max(1, cols), -(-rows // cut.most_slabs))
    if form is Form.SMALL or rows <= lines:
        matrices = 1 if apart else max(1, cut.slab_elements // (rows * cols))
        return matrices * rows, -(-batch // matrices)
    return lines, batch * -(-rows // lines)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _merged(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Dimensions (size, strides) with neighbours joined where all strides allow it."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(stride * size for stride in strides):
            size *= merged.pop()[0]
        merged.append((size, strides))
    return merged


def is_whole(geometry: Geometry, cut: Cut) -> bool:
    """Whether a tensor that is stepped without a pause is one piece of work."""
    return geometry.batch * geometry.rows * geometry.cols <= cut.whole_elements


def merges_of(geometry: Geometry, cut: Cut) -> int:
    """Parts in which the sums of the slabs are added up, where a matrix has several slabs."""
    if geometry.form is not Form.FACTORED or geometry.slabs_per_matrix == 1:
        return 0
    return geometry.batch * -(-geometry.cols // cut.merge_columns)


def strips_of(geometry: Geometry, cut: Cut) -> tuple[int, int]:
    """Strips of a slab, and lines of each: what an item of the last sweep takes.

    That sums nothing, so nothing asks for many lines, and whoever is done last is not far behind.
    """
    lines = max(1, cut.slab_elements // max(1, geometry.cols))
    if geometry.form is not Form.FACTORED or lines >= geometry.lines_per_slab or not geometry.cols:
        return 1, geometry.lines_per_slab
    return -(-geometry.lines_per_slab // lines), lines


@dataclass(frozen=True)
class Wave:
    """Tensors that are read one after the other, and then applied.

    Attributes:
        whole: Numbers of those that are stepped in one go.
        swept: Numbers of the others.
    """

    whole: tuple[int, ...]
    swept: tuple[int, ...]


def waves_of(geometries: Sequence[Geometry], threads: int, everything: bool) -> list[Wave]:
    """Waves of two slabs or more for each thread, so that all are at work until the last of them.

    They have no more than that, so that what fits the caches is still there for the last sweep.

    Args:
        geometries: Of the tensors.
        threads: That take items.
        everything: Whether the update runs in one go, without a pause for what is joined.
    """
    waves: list[Wave] = []
    whole: list[int] = []
    swept: list[int] = []
    slabs = 0
    for number, geometry in enumerate(geometries):
        if everything and is_whole(geometry, CPU_CUT):
            whole.append(number)
            continue
        if slabs >= 2 * threads:
            waves.append(Wave(tuple(whole), tuple(swept)))
            whole, swept, slabs = [], [], 0
        swept.append(number)
        slabs += geometry.slabs
    return [*waves, Wave(tuple(whole), tuple(swept))]


def items_of(
    geometries: Sequence[Geometry], phases: Sequence[Phase], threads: int
) -> Iterator[Item]:
    """Items in ticket order, for threads of a CPU.

    The last sweep of a wave goes backwards, latest read first, so that what fits the caches is
    still there. Some strips of it, three for each thread, are held back until the next wave has
    been read. They lie between sums and what waits for them, so that nobody waits while others are
    at work; tensors that are one item do too.
    """
    waves = waves_of(geometries, threads, len(phases) == len(Phase))
    held: list[Item] = []
    for wave in waves if Phase.STATS in phases else reversed(waves):
        if Phase.STATS in phases:
            yield from _of_slabs(ItemKind.STATS, geometries, wave.swept)
        yield from ((ItemKind.WHOLE, number, 0) for number in wave.whole)
        if Phase.APPLY not in phases:
            continue
        between, backwards = iter(held), wave.swept[::-1]
        yield from islice(between, threads)
        for number in wave.swept:
            merges = range(merges_of(geometries[number], CPU_CUT))
            yield from ((ItemKind.MERGE, number, part) for part in merges)
            yield ItemKind.FINALIZE, number, 0
        yield from islice(between, threads)
        yield from _of_slabs(ItemKind.UPDATE_RMS, geometries, backwards)
        yield from between
        yield from ((ItemKind.MEASURE, number, 0) for number in backwards)
        applying = [i for number in backwards for i in _applying(geometries[number], number)]
        now = len(applying) - min(3 * threads, len(applying) // 2)
        yield from applying[:now]
        held = applying[now:]
    yield from held


def _of_slabs(
    kind: ItemKind, geometries: Sequence[Geometry], numbers: Iterable[int]
) -> Iterator[Item]:
    return ((kind, number, slab) for number in numbers for slab in range(geometries[number].slabs))


def _applying(geometry: Geometry, number: int) -> Iterator[Item]:
    strips, _ = strips_of(geometry, CPU_CUT)
    return ((ItemKind.APPLY, number, strip) for strip in reversed(range(geometry.slabs * strips)))


def items_between_sums(geometries: Sequence[Geometry], phases: Sequence[Phase]) -> Iterator[Item]:
    """Items of tensors whose sums are taken over processes before FINALIZE and before APPLY.

    The last sweep begins with the tensor that was read last.
    """
    numbers = range(len(geometries))
    if Phase.STATS in phases:
        yield from _of_slabs(ItemKind.STATS, geometries, numbers)
        for number, geometry in enumerate(geometries):
            merges = range(merges_of(geometry, CPU_CUT))
            yield from ((ItemKind.MERGE, number, part) for part in merges)
            yield ItemKind.SHARE, number, 0
    elif Phase.FINALIZE in phases:
        yield from ((ItemKind.FINALIZE, number, 0) for number in numbers)
        yield from _of_slabs(ItemKind.UPDATE_RMS, geometries, numbers)
        yield from ((ItemKind.MEASURE, number, 0) for number in numbers)
    else:
        yield from ((ItemKind.SETTLE, number, 0) for number in numbers)
        for number in reversed(numbers):
            yield from _applying(geometries[number], number)
