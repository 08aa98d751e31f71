"""What the parity tests of several dialects share: hard gradients, and comparison of state.

Parameters stay half a unit from zero, so that max|difference| / max|reference| hides nothing, and
gradients change by decades from step to step and from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracle import Oracle, View
from tests.stepping import SHAPES, TOLERANCES, assert_close

STEPS = 14
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Shapes = Sequence[tuple[int, ...]]
Grads = Sequence[Tensor | None]


def hard_params(
    shapes: Shapes = SHAPES, dtype: torch.dtype = F64, away: float = 0.5
) -> list[torch.nn.Parameter]:
    """Normal values, moved away from zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
    return [torch.nn.Parameter((p + torch.where(p < 0, -away, away)).to(dtype)) for p in drawn]


def hard_grads(shapes: Shapes, dtype: torch.dtype, step: int) -> list[Tensor]:
    """Normal values; the scale of a tensor spans five decades between steps, that of a row two."""
    generator = torch.Generator().manual_seed(step + 1)

    def decades(shape: tuple[int, ...], count: float) -> Tensor:
        return 10 ** (count * torch.rand(shape, dtype=F64, generator=generator))

    grads = []
    for shape in shapes:
        g = torch.randn(shape, dtype=F64, generator=generator)
        if len(shape) > 1:
            g = g * decades((*shape[:-1], 1), 2.0)
            if step == 5:
                g[..., 0, :] = 0.0  # a row without gradient
        grads.append((g * decades((), 5.0) * 1e-4).to(dtype))
    return grads


def step_with(optimizer: torch.optim.Optimizer, grads: Grads) -> None:
    """One step with copies of these gradients, one for every parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype, copy=True)
    optimizer.step()


def assert_all_close(
    ours: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float, when: str
) -> None:
    """Every tensor against its reference."""
    for a, b in zip(ours, reference, strict=True):
        assert_close(a, b, tolerance, f"{when}, shape {tuple(b.shape)}")


def spread(view: View, statistic: Tensor, reduced: int) -> Tensor:
    """The oracle's row (reduced = -1) or column (-2) means, repeated to the parameter's shape."""
    work = [view.work_shape[d] for d in range(len(view.work_shape)) if d not in view.dims]
    matrices = (*work, *(view.work_shape[d] for d in view.dims))
    return view.original(statistic.unsqueeze(reduced).expand(matrices))


def assert_state_is(
    judge: Oracle,
    states: Sequence[dict[str, Any]],
    keys: dict[str, str],
    to_full: Callable[[View, str, Tensor], Tensor],
    tolerance: float,
) -> None:
    """Compare second and first moments with the oracle's, in the parameter's shape.

    Args:
        judge: The oracle.
        states: Ours, one dict a parameter.
        keys: The dialect's key of each of the oracle's entries.
        to_full: (view, entry, factor) -> our row or column factor, repeated to the full shape.
        tolerance: Relative.
    """
    for view, expected, state in zip(judge.views, judge.state, states, strict=True):
        wanted = {keys[entry] for entry in expected if entry in keys}
        assert wanted == set(state), view.shape
        for entry, key in keys.items():
            if entry not in expected:
                continue
            ours, value = state[key].double(), expected[entry]
            if entry == "step":
                assert float(ours) == value
                continue
            if entry in ("row_var", "col_var"):
                value = spread(view, value, -1 if entry == "row_var" else -2)
                ours = to_full(view, entry, ours)
            assert_close(ours.reshape(view.shape), value, tolerance, f"{key} of {view.shape}")


__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "SHAPES",
    "STEPS",
    "TOLERANCES",
    "assert_all_close",
    "assert_close",
    "assert_state_is",
    "hard_grads",
    "hard_params",
    "spread",
    "step_with",
]
