"""Which two dimensions of a parameter are factored (K1): a view [..., n, m] of it.

Rows i run over the second last dimension of the view and columns j over the last. "Row" statistics
are reduced over the columns: one value per row. Leaf: imports torch and the standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from torch import Tensor
from typing_extensions import override


class View(str, Enum):
    """How a parameter becomes a stack of matrices."""

    LAST_TWO = "last_two"  # torch, transformers, Keras
    LARGEST_TWO = "largest_two"  # optax, T5X, big_vision: rows = second largest, columns = largest
    RESHAPE = "reshape"  # adafactor-pytorch: any rank to one matrix, a row-major reshape
    NONE = "none"  # never factored


@dataclass(frozen=True)
class MatrixView:
    """A parameter of ``shape`` seen as matrices [..., n, m].

    Attributes:
        shape: The parameter's shape.
        matrices: Shape of the view, [..., n, m].
        permutation: Order in which the parameter's dimensions enter the view; None where the view
            is a reshape.
    """

    shape: tuple[int, ...]
    matrices: tuple[int, ...]
    permutation: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Rows n of each matrix."""
        return self.matrices[-2]

    @property
    def cols(self) -> int:
        """Columns m of each matrix."""
        return self.matrices[-1]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the row statistics, [..., n]."""
        return self.matrices[:-1]

    @property
    def col_shape(self) -> tuple[int, ...]:
        """Shape of the column statistics, [..., m]."""
        return (*self.matrices[:-2], self.matrices[-1])

    @cached_property
    def inverse(self) -> tuple[int, ...] | None:
        """Order in which the view's dimensions enter the parameter; None for a reshape."""
        if self.permutation is None:
            return None
        return tuple(self.permutation.index(d) for d in range(len(self.permutation)))

    def part(self, shape: tuple[int, ...], offset: tuple[int, ...]) -> MatrixView:
        """The same view of a part of the parameter: the same dimensions, however long they are.

        Args:
            shape: Of the part.
            offset: Index of its first element in the parameter.
        """
        if self.permutation is None:
            return ScatteredView(shape, self.matrices, None, self, offset)
        return MatrixView(shape, tuple(shape[d] for d in self.permutation), self.permutation)

    def to_matrices(self, tensor: Tensor) -> Tensor:
        """See a tensor shaped like the parameter as [..., n, m]; a copy only if it must be."""
        if self.permutation is None:
            return tensor.reshape(self.matrices)
        return tensor.permute(self.permutation)

    def from_matrices(self, tensor: Tensor) -> Tensor:
        """See a tensor [..., n, m] like the parameter; n or m may be 1 under a permutation."""
        if self.inverse is None:
            return tensor.reshape(self.shape)
        return tensor.permute(self.inverse)


@dataclass(frozen=True)
class ScatteredView(MatrixView):
    """A part of a parameter whose view is a reshape: its elements are scattered over the matrix.

    So the matrix is that of the whole parameter, ``shape`` that of the part.

    Attributes:
        whole: The view of the parameter.
        offset: Index of the first element of the part in the parameter, by dimension.
    """

    whole: MatrixView
    offset: tuple[int, ...]

    @override
    def to_matrices(self, tensor: Tensor) -> Tensor:
        """The whole matrix, a copy, with zeros where other processes have their parts."""
        whole = tensor.new_zeros(self.whole.shape)
        self._part_of(whole).copy_(tensor)
        return self.whole.to_matrices(whole)

    @override
    def from_matrices(self, tensor: Tensor) -> Tensor:
        """The part of a whole matrix."""
        return self._part_of(self.whole.from_matrices(tensor))

    def _part_of(self, whole: Tensor) -> Tensor:
        for dim, (begin, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            whole = whole.narrow(dim, begin, length)
        return whole


@dataclass(frozen=True)
class Factoring:
    """The rule that picks a parameter's view.

    Attributes:
        view: Which dimensions.
        min_dim_size: Both factored dimensions must be at least this long, otherwise the tensor is
            unfactored.
    """

    view: View
    min_dim_size: int = 0

    def view_of(self, shape: tuple[int, ...]) -> MatrixView | None:
        """Return the view of a parameter of ``shape``; None if it is not factored."""
        rank = len(shape)
        if self.view is View.NONE or rank < 2:
            return None
        if self.view is View.RESHAPE and rank > 2:
            return MatrixView(shape, _two_dimensional(shape), None)
        if self.view is View.LARGEST_TWO:
            # Stable sort: of equal lengths the later dimension counts as the larger, as in optax.
            *_, row, col = sorted(range(rank), key=lambda d: shape[d])
        else:
            row, col = rank - 2, rank - 1
        if min(shape[row], shape[col]) < self.min_dim_size:
            return None
        batch = tuple(d for d in range(rank) if d not in (row, col))
        order = (*batch, row, col)
        return MatrixView(shape, tuple(shape[d] for d in order), order)


def _two_dimensional(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of adafactor-pytorch's matrix for a tensor of rank 3 or more.

    Rank 3 joins the last two dimensions. Above that the first half of the trailing dimensions (the
    longer half) goes to the columns and the second half to the rows: a 4-D convolution (O, I, h,
    w) becomes (O w, I h). It is a row-major reshape, not a permutation, so indices mix; that is
    the rule of the peer.
    """
    tail = shape[2:]
    if len(tail) == 1:
        return shape[0], shape[1] * tail[0]
    half = (len(tail) + 1) // 2
    return shape[0] * math.prod(tail[half:]), shape[1] * math.prod(tail[:half])
