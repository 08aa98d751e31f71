"""One tensor in a step of the reference: its memory, its sums, and how both are read and written.

Everything is computed in the math dtype and in the matrix view, and stored in its own dtype and
shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_adafactor.binding import Binding
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorSpec


@dataclass
class Partials:
    """What passes from phase to phase; row and column sums only, never a full-size tensor."""

    row_sq: Tensor | None = None  # [..., n]  Σ_j g²
    col_sq: Tensor | None = None  # [..., m]  Σ_i g²
    param_sq: Tensor | None = None  # 0-d  Σ p²
    col_weighted: Tensor | None = None  # [..., m]  Σ_i num² / row_var_i, two sweeps only
    # Of distributed rows: the sum of the new row_var, or of the old one where row_sq_sum is there.
    row_var_sum: Tensor | None = None  # [...]  Σ_i row_var_i
    row_sq_sum: Tensor | None = None  # [...]  Σ_ij g²
    # Of distributed rows whose moments are rounded: of all rows, where the others are not yet.
    all_row_var: Tensor | None = None  # [..., whole n]  old row_var_i
    all_row_sq: Tensor | None = None  # [..., whole n]  Σ_j g²
    grad_sq: Tensor | None = None  # 0-d  Σ g² before any clipping
    update_sq: Tensor | None = None  # 0-d  Σ u², once known
    row_var: Tensor | None = None  # [..., n]  new row second moment, not yet stored
    col_var: Tensor | None = None  # [..., m]  new column second moment, not yet stored


@dataclass(kw_only=True, eq=False)
class Work(Binding):
    """A tensor in one step.

    Attributes:
        grad: Its gradient; None when only the average moves.
        grad_factor: What clipping by a norm multiplies it by, 0-d; else None.
        skip: 0-d bool, true if nothing may be written; None if that cannot be.
        param_rms: Set by ``finalize``: RMS(p), 0-d, if the rule needs it.
        alpha: Set by ``finalize``: the absolute step size alpha_t.
        update_rms: Set by ``apply``: RMS(u) before clipping, 0-d, if the rule clips.
        partials: Partial sums.
    """

    grad: Tensor | None
    grad_factor: Tensor | None = None
    skip: Tensor | None = None
    param_rms: Tensor | None = None
    alpha: Number = 0.0
    update_rms: Tensor | None = None
    partials: Partials | None = None


def partials_of(b: Work) -> Partials:
    """Its sums, once ``stats`` has run."""
    assert b.partials is not None
    return b.partials


def read(b: Work, tensor: Tensor) -> Tensor:
    """Something that it owns, in the math dtype."""
    return tensor.to(b.planned.spec.math_dtype)


def in_full(b: Work, value: Tensor) -> Tensor:
    """[..., n, m] in the shape of the parameter."""
    view = b.planned.spec.view
    return value if view is None else view.from_matrices(value)


def write(b: Work, target: Tensor, value: Tensor) -> None:
    """Store a value, unless the step of this tensor is skipped."""
    target.copy_(value if b.skip is None else torch.where(b.skip, target, value))


def write_full(b: Work, target: Tensor, value: Tensor) -> None:
    """Store [..., n, m] in the shape of the parameter, or in that of the matrix it reshapes to."""
    write(b, target, in_full(b, value).reshape(target.shape))


def write_if(b: Work, due: bool | Tensor, target: Tensor, value: Tensor) -> None:
    """Store a value where it is due, which may be known on a device only."""
    if isinstance(due, Tensor):
        value = torch.where(due, value, target)
    elif not due:
        return
    write(b, target, value)


def elements_of(
    spec: TensorSpec, device: torch.device, without: int | None = None
) -> Tensor | None:
    """Where the elements of a part are in the whole parameter, row-major; None if it is whole.

    Args:
        spec: The parameter.
        device: For the indices.
        without: Of a factor: the dimension of the matrix view that it lacks, -1 or -2.
    """
    if not spec.is_split or (without is not None and spec.is_scattered):
        return None
    assert spec.shard is not None
    dims = list(range(len(spec.shape)))
    if without is not None:
        assert spec.view is not None
        assert spec.view.permutation is not None
        dims = list(spec.view.permutation)
        del dims[without]
    index = torch.zeros((), dtype=torch.int64, device=device)
    for dim in dims:
        begin = spec.shard.offset[dim]
        along = torch.arange(begin, begin + spec.shape[dim], device=device)
        index = index.unsqueeze(-1) * spec.whole[dim] + along
    return index


def among_all_rows(b: Work, rows: Tensor) -> Tensor:
    """[..., n] as [..., whole n], with zeros for the rows of other processes."""
    spec = b.planned.spec
    assert spec.shard is not None
    assert spec.view is not None
    assert spec.view.permutation is not None
    among = rows.new_zeros(*rows.shape[:-1], spec.whole[spec.view.permutation[-2]])
    among.narrow(-1, spec.shard.offset[spec.view.permutation[-2]], rows.shape[-1]).copy_(rows)
    return among
