"""What is to be stepped: one parameter and its gradient, described without pointers, and checked.

A spec is all that a plan may know of a tensor. Making one is also the only place where a parameter
and its gradient are checked, so that a step raises before it has touched anything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from fused_adafactor.blocks import blocks_of
from fused_adafactor.factoring import MatrixView, ScatteredView
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import GradClipKind, Rule, Structure, structure_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A matrix up to this size is tiny: its lines are its rows, however they lie. ``kMaxTiny`` in
# the kernels.
TINY_ELEMENTS = 64


@dataclass(frozen=True)
class TensorId:
    """Which parameter: what messages say and what stochastic rounding is keyed by.

    Attributes:
        index: Position among all parameters of the optimizer, in the order of its groups.
        group: Number of its param group.
        name: Its name when the optimizer was given named parameters, else None.
    """

    index: int
    group: int
    name: str | None

    @property
    def label(self) -> str:
        """Its name, or "#" and its position."""
        return f"#{self.index}" if self.name is None else self.name

    @override
    def __str__(self) -> str:
        """Name the parameter for a message."""
        place = f"#{self.index} in group {self.group}"
        return f"parameter {place}" if self.name is None else f"parameter {self.name!r} ({place})"


class Sharing(Enum):
    """What a tensor shares with other processes, which not every backend can step."""

    NONE = "tensors"
    PARTS = "distributed tensors"
    ROUNDED = "parts whose norm follows from rounded second moments of all rows"
    SCATTERED = "parts of what is reshaped to a matrix"


@dataclass(frozen=True)
class Shard:
    """Which part of a distributed parameter this process has.

    Attributes:
        whole: Shape of the parameter.
        strides: Of the parameter, as it says on all processes; parts may lie otherwise.
        offset: Index of the first element of the part, by dimension; the part is one block.
        split: By dimension, the dimensions of the mesh that it is split over, in the order in which
            they divide it.
        mesh: Whose processes have the parts; compared and hashed, never asked here.
    """

    whole: tuple[int, ...]
    strides: tuple[int, ...]
    offset: tuple[int, ...]
    split: tuple[tuple[int, ...], ...]
    mesh: Hashable

    @property
    def over(self) -> tuple[int, ...]:
        """Dimensions of the mesh that anything is split over."""
        return tuple(sorted({axis for axes in self.split for axis in axes}))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to step; no pointers, hashable.

    Of a distributed parameter it is the part that this process has.

    Attributes:
        id: Which parameter.
        shape: Shape of parameter and gradient.
        param_strides: In elements.
        grad_strides: In elements; may differ from the parameter's.
        param_dtype: One of ``DTYPES``.
        grad_dtype: One of ``DTYPES``.
        math_dtype: float64 if the parameter or the gradient is, else float32.
        device: Of both.
        view: The matrices that are factored, or None.
        structure: The switches of its rule.
        shard: Which part of the parameter it is; None for all of it.
        mirror_dtype: Of its mirror, one of ``DTYPES``; None where it has none.
    """

    id: TensorId
    shape: tuple[int, ...]
    param_strides: tuple[int, ...]
    grad_strides: tuple[int, ...]
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    math_dtype: torch.dtype
    device: torch.device
    view: MatrixView | None
    structure: Structure
    shard: Shard | None = None
    mirror_dtype: torch.dtype | None = None

    @property
    def is_split(self) -> bool:
        """Whether other processes have other parts of it; a copy is as good as a plain tensor."""
        return self.shard is not None and bool(self.shard.over)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the parameter, on all processes together."""
        return self.shape if self.shard is None else self.shard.whole

    @property
    def whole_numel(self) -> int:
        """Number of elements of the parameter, on all processes together."""
        return math.prod(self.whole)

    @property
    def whole_view(self) -> MatrixView | None:
        """The matrices that are factored, whole."""
        if self.view is None or not self.is_split:
            return self.view
        if isinstance(self.view, ScatteredView):
            return self.view.whole
        return self.view.part(self.whole, (0,) * len(self.whole))

    def of_whole(self) -> TensorSpec:
        """The whole parameter, as one process would have it."""
        if self.shard is None:
            return self
        return replace(
            self,
            shape=self.whole,
            param_strides=self.shard.strides,
            grad_strides=self.shard.strides,
            view=self.whole_view,
            shard=None,
        )

    @property
    def is_scattered(self) -> bool:
        """Whether it is a part of what is reshaped to a matrix, all of which each process sums."""
        return isinstance(self.view, ScatteredView)

    @property
    def rows_over(self) -> tuple[int, ...]:
        """Dimensions of the mesh that the rows of its matrices are split over."""
        return self._over(-2)

    @property
    def cols_over(self) -> tuple[int, ...]:
        """Dimensions of the mesh that the columns of its matrices are split over.

        Of what is reshaped, rows are whole where nothing but the first dimension is split.
        """
        return self._over(-1)

    @property
    def rounds_all_rows(self) -> bool:
        """Whether each process rounds the new row_var of all rows, its own and the others'.

        The norm of v is the mean of what is stored. Where that is rounded, and is only known once
        sums over all processes are (of parts of rows, or the norm of all gradients), every process
        learns those sums of all rows, and rounds them as their own processes do.
        """
        clips = self.structure.grad_clip in (GradClipKind.NORM, GradClipKind.GLOBAL_NORM)
        kept = self.structure.moment_dtype(self.param_dtype)
        return (
            bool(self.rows_over)
            and not self.is_scattered
            and (clips or bool(self.cols_over))
            and kept.itemsize < self.math_dtype.itemsize
        )

    @property
    def with_all_rows(self) -> TensorSpec:
        """The part that a process would have that had all rows of its matrices."""
        assert self.shard is not None
        assert self.view is not None
        assert self.view.permutation is not None
        shape, offset = list(self.shape), list(self.shard.offset)
        row = self.view.permutation[-2]
        shape[row], offset[row] = self.whole[row], 0
        return replace(
            self,
            shape=tuple(shape),
            view=self.view.part(tuple(shape), tuple(offset)),
            shard=replace(self.shard, offset=tuple(offset)),
        )

    @property
    def sharing(self) -> Sharing:
        """What a backend must be able to do to step it."""
        if self.is_scattered:
            return Sharing.SCATTERED
        if self.rounds_all_rows:
            return Sharing.ROUNDED
        return Sharing.PARTS if self.is_split else Sharing.NONE

    @property
    def has_first_row(self) -> bool:
        """Whether no other process has the first row of its matrices."""
        if self.shard is None or self.view is None:
            return True
        assert self.view.permutation is not None
        return self.shard.offset[self.view.permutation[-2]] == 0

    def _over(self, place: int) -> tuple[int, ...]:
        if self.shard is None or self.view is None:
            return ()
        if self.view.permutation is None:
            whole_rows = place == -1 and not any(self.shard.split[1:])
            return () if whole_rows else self.shard.over
        return tuple(sorted(self.shard.split[self.view.permutation[place]]))

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def state_strides(self) -> tuple[int, ...]:
        """Strides of full-size state and of a mirror: the parameter's if dense, else row-major."""
        dense, span = True, 1
        for stride, size in sorted(zip(self.param_strides, self.shape, strict=True)):
            if size > 1:
                dense = dense and stride == span
                span = stride * size
        if dense and (self.view is None or self.view.permutation is not None):
            return self.param_strides
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        return tuple(reversed(strides))

    @property
    def swapped(self) -> bool:
        """Whether lines are the columns of the view: they are contiguous, and its rows are not.

        Of a distributed parameter that is said by the whole, so that all processes agree. Never
        where the rows are on several processes: these have to know what is weighted by row.
        """
        view = self.whole_view
        if view is None or view.permutation is None or self.rows_over:
            return False
        strides = self.param_strides if self.shard is None else self.shard.strides
        row, col = (strides[d] for d in view.permutation[-2:])
        return row == 1 and col != 1 and view.rows * view.cols > TINY_ELEMENTS

    def scale_shape(self, swapped: bool) -> tuple[int, ...]:
        """Shape of the scales of blocks: [..., n, blocks of a row], or one for each block of all.

        Where lines are columns (``swapped``) it is [..., blocks of a column, m], so that the shape
        tells how the blocks lie.
        """
        if self.view is None:
            return (blocks_of(self.numel),)
        *batch, rows, cols = self.view.matrices
        return (*batch, blocks_of(rows), cols) if swapped else (*batch, rows, blocks_of(cols))

    def to_lines(self, tensor: Tensor, swapped: bool) -> Tensor:
        """[..., n, m] as the lines that blocks lie along; all elements of an unfactored tensor."""
        if self.view is None:
            return tensor.reshape(-1)
        return tensor.mT if swapped else tensor

    def from_lines(self, lines: Tensor, swapped: bool) -> Tensor:
        """The reverse of ``to_lines``."""
        if self.view is None:
            return lines.reshape(self.shape)
        return lines.mT if swapped else lines

    @property
    def keeps_compensation(self) -> bool:
        """Whether a Kahan compensation is kept: only low precision loses bits when written."""
        return self.structure.rounding is Rounding.KAHAN and self.param_dtype in (
            torch.bfloat16,
            torch.float16,
        )


def spec_of(
    id: TensorId,
    param: Tensor,
    grad: Tensor,
    rule: Rule,
    shard: Shard | None = None,
    mirror: Tensor | None = None,
) -> TensorSpec:
    """Check a parameter, its gradient and its mirror, and describe them.

    Args:
        id: Which parameter.
        param: It, or the part of it that this process has.
        grad: Its gradient, likewise.
        rule: Its rule.
        shard: Which part it is; None for all of it.
        mirror: What else it is written to, or None.

    Raises:
        RuntimeError: Sparse or complex (torch.optim.Adafactor's texts), on different devices, or
            overlapping memory.
        TypeError: A dtype that is not one of ``DTYPES``.
        ValueError: Shapes differ, a rounding that the dtype does not have, or a mirror that is not
            laid out as ``state_strides``.
    """
    check_kinds(id, param, grad)
    _check_pair(id, param, grad)
    _check_rounding(id, param.dtype, rule)
    shape = tuple(param.shape)
    double = torch.float64 in (param.dtype, grad.dtype)
    spec = TensorSpec(
        id=id,
        shape=shape,
        param_strides=param.stride(),
        grad_strides=grad.stride(),
        param_dtype=param.dtype,
        grad_dtype=grad.dtype,
        math_dtype=torch.float64 if double else torch.float32,
        device=param.device,
        view=_view_of(shape, rule, shard),
        structure=structure_of(rule),
        shard=shard,
        mirror_dtype=None if mirror is None else mirror.dtype,
    )
    if mirror is not None:
        _check_mirror(spec, mirror, rule)
    return spec


def _view_of(shape: tuple[int, ...], rule: Rule, shard: Shard | None) -> MatrixView | None:
    """What is factored is decided by the whole parameter."""
    whole = rule.factoring.view_of(shape if shard is None else shard.whole)
    if whole is None or shard is None or not shard.over:
        return whole
    return whole.part(shape, shard.offset)


def local_of(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: the tensor, unless it is distributed (a DTensor).

    A gradient that a collective is still bringing is waited for: it has no memory before.
    """
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part = to_local()
    wait = getattr(part, "wait", None)  # of torch's AsyncCollectiveTensor
    return cast(Tensor, part if wait is None else wait())


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor: what is distributed is gathered, by all processes."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else cast(Tensor, full_tensor())


def has_memory(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor that has elements.

    There is none behind a FakeTensor, nor behind a subclass that only wraps other tensors.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.data_ptr() != 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the question
        try:
            return tensor.data_ptr() != 0
        except RuntimeError:
            return False


def check_kinds(id: TensorId, param: Tensor, grad: Tensor) -> None:
    """Refuse a parameter or a gradient of a kind that is not stepped.

    Raises:
        RuntimeError: Sparse or complex.
        TypeError: A dtype that is not one of ``DTYPES``.
    """
    if param.is_complex() or grad.is_complex():
        raise RuntimeError(
            f"Adafactor does not support complex parameters: {id} is {param.dtype}; "
            "optimize torch.view_as_real of it instead"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"Adafactor does not support sparse gradients: that of {id} is {grad.layout}; "
            "use sparse=False in the embedding, or grad.to_dense()"
        )
    for what, tensor in (("", param), ("the gradient of ", grad)):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{what}{id} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or "
                "float64"
            )


def _check_pair(id: TensorId, param: Tensor, grad: Tensor) -> None:
    """Whether they fit together, and whether the parameter can be written in place."""
    if param.device != grad.device:
        raise RuntimeError(
            f"{id} is on {param.device} but its gradient is on {grad.device}; both must be on one "
            "device"
        )
    if param.device.type == "meta":
        raise RuntimeError(
            f"{id} is on the meta device and has no values; materialize it before step()"
        )
    if param.shape != grad.shape:
        raise ValueError(
            f"{id} has shape {tuple(param.shape)} but its gradient has shape {tuple(grad.shape)}"
        )
    if _overlaps(param):
        raise RuntimeError(
            f"{id} of shape {tuple(param.shape)} and strides {param.stride()} has overlapping "
            "memory: several of its elements share one location, so an in-place step is not "
            "defined. Use a .clone() of it as the parameter"
        )


def _check_mirror(spec: TensorSpec, mirror: Tensor, rule: Rule) -> None:
    """A backend writes it through a pointer, so it must lie as its spec says."""
    what = f"the mirror of {spec.id}"
    if mirror.dtype not in DTYPES:
        raise TypeError(
            f"{what} has dtype {mirror.dtype}; expected float32, bfloat16, float16 or float64"
        )
    if mirror.device != spec.device or (spec.numel and not has_memory(mirror)):
        raise RuntimeError(f"{what} must be plain memory on {spec.device}, like its parameter")
    if mirror.data_ptr() % mirror.dtype.itemsize:
        raise ValueError(f"{what} begins at an address that is no multiple of its element's size")
    found = {"shape": tuple(mirror.shape), "strides": mirror.stride()}
    for name, wanted in (("shape", spec.shape), ("strides", spec.state_strides)):
        if found[name] != wanted:
            raise ValueError(f"{what} has {name} {found[name]}; expected {wanted}")
    _check_rounding(spec.id, mirror.dtype, rule, "whose mirror is")


def _check_rounding(id: TensorId, dtype: torch.dtype, rule: Rule, which: str = "which is") -> None:
    if rule.rounding is Rounding.STOCHASTIC and dtype is torch.float16:
        raise ValueError(
            f"rounding='stochastic' is not available for {id}, {which} float16: its subnormals "
            "have no fixed number of spare bits. Use rounding='kahan' or 'nearest', or bfloat16 "
            "parameters"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: a stride does not clear the span of all smaller."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False
