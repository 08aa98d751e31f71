"""What the parity tests of several dialects share: hard gradients, and comparison of state.

Parameters stay half a unit from zero, so that max|difference| / max|reference| hides nothing, and
gradients change by decades from step to step and from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


# --- state ---------------------------------------------------------------------------------------


def last_two(view: View, entry: str, factor: Tensor) -> Tensor:
    """The row factor lacks the last dimension and the column factor the one before, or has 1."""
    if factor.dim() < len(view.shape):
        factor = factor.unsqueeze(-1 if entry == "row_var" else -2)
    return factor.expand(view.shape)


def sums_to_full(view: View, entry: str, factor: Tensor) -> Tensor:
    """adafactor-pytorch's factors hold sums where the oracle has means."""
    n, m = view.work_shape
    assert factor.shape == ((n, 1) if entry == "row_var" else (1, m))
    return (factor / (m if entry == "row_var" else n)).expand(n, m)


def one_dim_missing(view: View, entry: str, factor: Tensor) -> Tensor:
    """v_row lacks the largest dimension (the oracle's last), v_col the second largest."""
    return factor.unsqueeze(view.dims[1 if entry == "row_var" else 0]).expand(view.shape)


def one_dim_reduced_to_1(view: View, entry: str, factor: Tensor) -> Tensor:
    """exp_avg_sq_r has the largest dimension (the oracle's last) reduced to 1, _c the second."""
    assert factor.shape[view.dims[1 if entry == "row_var" else 0]] == 1
    return factor.expand(view.shape)


@dataclass(frozen=True)
class Kept:
    """What a dialect keeps for a parameter.

    Attributes:
        keys: Its key of each of the oracle's entries.
        to_full: (view, entry, factor) -> its row or column factor, repeated to the full shape.
    """

    keys: Mapping[str, str]
    to_full: Callable[[View, str, Tensor], Tensor] = last_two


KEPT = {
    "torch": Kept({"step": "step", "row_var": "row_var", "col_var": "col_var", "var": "variance"}),
    "hf": Kept(
        {
            "step": "step",
            "row_var": "exp_avg_sq_row",
            "col_var": "exp_avg_sq_col",
            "var": "exp_avg_sq",
            "exp_avg": "exp_avg",
        }
    ),
    "keras": Kept({"row_var": "r", "col_var": "c", "var": "velocity", "average": "average"}),
    "adafactor_pytorch": Kept(
        {
            "step": "step",
            "row_var": "exp_avg_sq_C",
            "col_var": "exp_avg_sq_R",
            "var": "exp_avg_sq",
            "exp_avg": "exp_avg",
            "var_max": "exp_avg_sq_hat",
        },
        sums_to_full,
    ),
    "optax": Kept(
        {"row_var": "v_row", "col_var": "v_col", "var": "v", "exp_avg": "ema"}, one_dim_missing
    ),
    "big_vision": Kept(
        {
            "step": "step",
            "row_var": "exp_avg_sq_r",
            "col_var": "exp_avg_sq_c",
            "var": "exp_avg_sq",
            "exp_avg": "exp_avg",
        },
        one_dim_reduced_to_1,
    ),
}


def assert_state_is(
    judge: Oracle,
    states: Sequence[dict[str, Any]],
    kept: Kept,
    tolerance: float,
) -> None:
    """Compare second and first moments with the oracle's, in the parameter's shape.

    Args:
        judge: The oracle.
        states: Ours, one dict a parameter.
        kept: What the dialect keeps.
        tolerance: Relative.
    """
    for index, (expected, state) in enumerate(zip(judge.state, states, strict=True)):
        shape = judge.views[index].shape
        if "step" in kept.keys:
            assert float(state[kept.keys["step"]]) == expected["step"], shape
        for key, ours, value in moments(judge, index, state, kept):
            assert_close(ours, value, tolerance, f"{key} of {shape}")


def moments(
    judge: Oracle,
    index: int,
    state: dict[str, Any],
    kept: Kept,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, ours, the oracle's) of each moment of one parameter, in that parameter's shape."""
    view, expected = judge.views[index], judge.state[index]
    keys = kept.keys
    assert {keys[entry] for entry in expected if entry in keys} == set(state), view.shape
    for entry, key in keys.items():
        if entry == "step" or entry not in expected:
            continue
        ours, value = state[key].double(), expected[entry]
        if entry in ("row_var", "col_var"):
            value = spread(view, value, -1 if entry == "row_var" else -2)
            ours = kept.to_full(view, entry, ours)
        yield key, ours.reshape(view.shape), value


__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "KEPT",
    "SHAPES",
    "STEPS",
    "TOLERANCES",
    "assert_all_close",
    "assert_close",
    "assert_state_is",
    "hard_grads",
    "hard_params",
    "moments",
    "spread",
    "step_with",
]
