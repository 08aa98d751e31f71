"""What of distributed tensors is summed up over processes: which sums, when, and where they lie.

All of it follows from plans, which are the same on all processes but for the parts themselves. So
every process sends the same messages, in the same order, with as many numbers, whatever steps its
tensors; and what a message takes lies together in memory from the start.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adafactor.plan import PlannedTensor
from fused_adafactor.rule import GradClipKind
from fused_adafactor.spec import TensorSpec

# In the order in which they lie; each is one number for a tensor, or has the shape behind it.
_NAMES = (
    "present",  # processes that have a gradient
    "grad_sq",  # Σ g² before any clipping
    "param_sq",  # Σ p²
    "update_sq",  # Σ u²
    "row_var_sum",  # [...]  Σ_i row_var_i: new ones, or the old ones where there is row_sq_sum
    "row_sq_sum",  # [...]  Σ_ij g²
    "all_row_var",  # [..., whole n]  old row_var_i, of all rows; each process has zeros for others'
    "all_row_sq",  # [..., whole n]  Σ_j g², likewise
    "row_sq",  # [..., n]  Σ_j g²
    "col_sq",  # [..., m]  Σ_i g²
    "col_weighted",  # [..., m]  Σ_i num² / row_var_i
)


class PartialSum(NamedTuple):
    """A sum of a tensor, of which each process has a part.

    Attributes:
        name: One of those above.
        shape: Of its numbers.
        over: Dimensions of the mesh that it is to be taken over.
    """

    name: str
    shape: tuple[int, ...]
    over: tuple[int, ...]


class Message(NamedTuple):
    """What is summed up in one all-reduce.

    Attributes:
        mesh: Whose processes take part.
        over: Those that differ in these dimensions of it.
        buffers: One for each dtype and device: the parts, then the sums.
        members: Index of every tensor that it has sums of.
    """

    mesh: Hashable
    over: tuple[int, ...]
    buffers: Sequence[Tensor]
    members: frozenset[int]


def after_stats(planned: PlannedTensor) -> list[PartialSum]:
    """The sums of a tensor that are to be taken once ``STATS`` has run.

    Where rows are whole, two sweeps need no more. A row that is split has to be summed up before
    anything can follow from it. Of what is reshaped every process learns all rows and columns.
    """
    spec, structure = planned.spec, planned.spec.structure
    if not spec.is_split:
        return []
    assert spec.shard is not None
    every = spec.shard.over
    sums = [PartialSum("present", (), every), PartialSum("grad_sq", (), every)]
    if structure.param_rms:
        sums.append(PartialSum("param_sq", (), every))
    knows_update = structure.update_clip and planned.sweeps == 2
    if knows_update and not spec.rows_over:
        sums.append(PartialSum("update_sq", (), every))
    if spec.view is not None:
        sums += _of_matrices(planned, knows_update)
    return sums


def _of_matrices(planned: PlannedTensor, knows_update: bool) -> list[PartialSum]:
    """What rows, columns and the norm of v follow from."""
    spec = planned.spec
    assert spec.view is not None
    assert spec.whole_view is not None
    rows, cols = spec.rows_over, spec.cols_over
    both = tuple(sorted((*rows, *cols)))
    *batch, n, m = spec.view.matrices
    sums = []
    if spec.rounds_all_rows:
        every_row = (*batch, spec.whole_view.rows)
        sums.append(PartialSum("all_row_var", every_row, rows))
        sums.append(PartialSum("all_row_sq", every_row, both))
    elif rows and not spec.is_scattered:
        sums.append(PartialSum("row_var_sum", (*batch,), rows))
        if cols or clips_by_norm(planned):
            sums.append(PartialSum("row_sq_sum", (*batch,), both))
    if rows:
        sums.append(PartialSum("col_sq", (*batch, m), rows))
    if cols or spec.is_scattered:
        sums.append(PartialSum("row_sq", (*batch, n), cols or rows))
    if knows_update and rows:
        sums.append(PartialSum("col_weighted", (*batch, m), rows))
    return sums


def after_update_rms(planned: PlannedTensor) -> list[PartialSum]:
    """The sums of a tensor that are to be taken before ``APPLY``.

    Σu² where a sweep of its own has found it, or where it is known of each of several matrices that
    are on different processes.
    """
    spec = planned.spec
    if not spec.is_split or not spec.structure.update_clip:
        return []
    assert spec.shard is not None
    every = spec.shard.over
    if planned.sweeps == 2 and (not spec.rows_over or spec.rows_over == every):
        return []
    return [PartialSum("update_sq", (), every)]


def between_updates(planned: PlannedTensor, with_grad_sq: bool) -> list[PartialSum]:
    """The sums of a tensor whose gradient is accumulated."""
    names = ("present", "grad_sq") if with_grad_sq else ("present",)
    return [s for s in after_stats(planned) if s.name in names]


def clips_by_norm(planned: PlannedTensor) -> bool:
    """Whether a tensor's gradient is only final once ``STATS`` has run."""
    return planned.spec.structure.grad_clip in (GradClipKind.NORM, GradClipKind.GLOBAL_NORM)


class _Place(NamedTuple):
    buffer: Tensor
    offset: int


class Round:
    """The sums that are taken between two segments, and where they lie.

    The sums of one name lie together, those of all tensors in the order of the optimizer.

    Args:
        tensors: With the sums of each.
    """

    def __init__(self, tensors: Iterable[tuple[TensorSpec, Sequence[PartialSum]]]) -> None:
        """Lay them out, in memory of zeros."""
        wanted: dict[tuple[Hashable, tuple[int, ...]], dict[object, list[_Wanted]]] = {}
        # In the order of the optimizer: what steps come together also depends on plain parameters,
        # which may be other ones on each process.
        for spec, sums in sorted(tensors, key=lambda pair: pair[0].id.index):
            for partial in sums:
                assert spec.shard is not None
                kinds = wanted.setdefault((spec.shard.mesh, partial.over), {})
                members = kinds.setdefault((spec.math_dtype, spec.device), [])
                members.append(_Wanted(_NAMES.index(partial.name), spec, partial))
        self._views: dict[int, dict[str, Tensor]] = {}
        self._places: dict[tuple[str, int], _Place] = {}
        self.messages = [
            Message(
                *group,
                [self._lay_out(members) for members in kinds.values()],
                frozenset(w.spec.id.index for members in kinds.values() for w in members),
            )
            for group, kinds in wanted.items()
        ]

    def _lay_out(self, members: list[_Wanted]) -> Tensor:
        spec = members[0].spec
        numbers = sum(math.prod(w.partial.shape) for w in members)
        buffer = torch.zeros(numbers, dtype=spec.math_dtype, device=spec.device)
        begin = 0
        for _, spec, partial in sorted(members, key=lambda w: (w.order, w.spec.id.index)):
            end = begin + math.prod(partial.shape)
            views = self._views.setdefault(spec.id.index, {})
            views[partial.name] = buffer[begin:end].view(partial.shape)
            self._places[partial.name, spec.id.index] = _Place(buffer, begin)
            begin = end
        return buffer

    def of(self, spec: TensorSpec) -> dict[str, Tensor]:
        """Where the sums of a tensor lie, by their names."""
        return self._views.get(spec.id.index, {})

    def column(self, name: str, specs: Sequence[TensorSpec]) -> Column | None:
        """A sum that is one number for each of some tensors; None if they have none such."""
        keys = [(name, spec.id.index) for spec in specs]
        if any(key not in self._places for key in keys):
            return None
        return Column([self._places[key] for key in keys])

    def complete_after(self, batches: Sequence[Sequence[TensorSpec]]) -> list[list[Message]]:
        """By batch, the messages that nothing is missing from once it has run, those before too."""
        last = {spec.id.index: number for number, specs in enumerate(batches) for spec in specs}
        complete: list[list[Message]] = [[] for _ in batches]
        for message in self.messages:
            complete[max(last[index] for index in message.members)].append(message)
        return complete


class _Wanted(NamedTuple):
    order: int
    spec: TensorSpec
    partial: PartialSum


class Column:
    """One number for each of some tensors, as a vector in their order.

    Args:
        places: Of them.
    """

    def __init__(self, places: Sequence[_Place]) -> None:
        """Sort them by buffer."""
        by_buffer: dict[int, tuple[Tensor, list[int], list[int]]] = {}
        for number, (buffer, offset) in enumerate(places):
            _, offsets, numbers = by_buffer.setdefault(id(buffer), (buffer, [], []))
            offsets.append(offset)
            numbers.append(number)
        self._parts = [
            (
                buffer,
                torch.tensor(offsets, device=buffer.device),
                torch.tensor(numbers, device=buffer.device),
            )
            for buffer, offsets, numbers in by_buffer.values()
        ]

    def read(self) -> Tensor:
        """The numbers, copied."""
        if len(self._parts) == 1:
            buffer, offsets, _ = self._parts[0]
            return buffer[offsets]
        buffer = self._parts[0][0]
        found = buffer.new_empty(sum(len(numbers) for *_, numbers in self._parts))
        for buffer, offsets, numbers in self._parts:
            found[numbers] = buffer[offsets]
        return found

    def write(self, vector: Tensor) -> None:
        """Set the numbers."""
        for buffer, offsets, numbers in self._parts:
            buffer[offsets] = vector[numbers]
