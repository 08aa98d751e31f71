"""The two-sweep identity: Σu² from the first sweep is Σu² of the plain three-sweep form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import backends
from fused_adafactor.plan import Facts
from tests import stepping
from tests.dialects import TORCH, VARIANTS

# Each has a stack, whose identity sums over the slices, a matrix, and what is not factored. Every
# variant with every pattern runs on two of the three (one in each dtype), and meets all of them.
SHAPES = (
    ((7,), (6, 5), (4, 3, 5), (17, 23)),
    ((), (5, 9), (4, 6, 3, 2), (0, 3)),
    ((1, 9), (9, 1), (2, 3, 2, 3, 2), (33, 129)),
)
TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str
)


def as_drawn(g: Tensor) -> Tensor:
    return g


def zero_rows(g: Tensor) -> Tensor:
    return with_rows(g, 0.0)


def zero_columns(g: Tensor) -> Tensor:
    return with_rows(g.mT, 0.0).mT if g.dim() > 1 else g


def scaled_rows(g: Tensor) -> Tensor:
    return with_rows(g, 1e-6)


def scaled_rows_and_columns(g: Tensor) -> Tensor:
    return with_rows(with_rows(g, 1e-3).mT, 1e3).mT if g.dim() > 1 else g


def all_zero(g: Tensor) -> Tensor:
    return torch.zeros_like(g)


def tiny(g: Tensor) -> Tensor:
    return g * 1e-15


def with_rows(g: Tensor, factor: float) -> Tensor:
    """Every other row (of a vector: element) times a factor, but not the first."""
    if g.dim() == 0:
        return g
    row = torch.arange(g.shape[-2 if g.dim() > 1 else 0])
    factors = torch.where(row % 2 == 1, factor, 1.0).to(g.dtype)
    return g * (factors[:, None] if g.dim() > 1 else factors)


GRADIENTS: list[Callable[[Tensor], Tensor]] = [
    as_drawn,
    zero_rows,
    zero_columns,
    scaled_rows,
    scaled_rows_and_columns,
    all_zero,
    tiny,
]


@pytest.fixture
def two_sweeps(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether optimizers built from now on use the identity."""

    def use(two_sweep: bool) -> None:
        facts = Facts("reference", two_sweep=two_sweep, why="by this test")
        monkeypatch.setattr(backends, "choose", lambda *_: facts)

    return use


def run(make: Any, params: Any, shape_g: Callable[[Tensor], Tensor]) -> Any:
    optimizer = make(stepping.clone_params(params))
    params = stepping.params_of(optimizer)
    for step in range(5):
        for p, g in zip(params, stepping.grad_values(params, step), strict=True):
            p.grad = shape_g(g)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
@pytest.mark.parametrize("shape_g", GRADIENTS, ids=lambda f: f.__name__)
@TOLERANCES
def test_two_sweeps_are_three(dialect, variant, shape_g, dtype, tolerance, two_sweeps):
    def make(params: Any) -> Any:
        return dialect(params, **dialect.variants[variant])

    third = VARIANTS.index((dialect, variant)) + GRADIENTS.index(shape_g)
    third += dtype is torch.float32
    params = stepping.make_params(SHAPES[third % 3], dtype)
    built = []
    for two_sweep in (True, False):
        two_sweeps(two_sweep)
        built.append(run(make, params, shape_g))
    two, three = built
    if dtype is torch.float32 and "low_precision" in variant:
        tolerance = 2**-8  # a bfloat16 buffer: what rounds the other way is off by one ulp
    stepping.assert_close_optimizers(two, three, tolerance)
    assert all(p.isfinite().all() for p in stepping.params_of(two))


def test_no_shape_is_left_out():
    assert {shape for shapes in SHAPES for shape in shapes} >= set(stepping.SHAPES)


def test_the_plan_says_which_tensors_need_a_third_sweep(two_sweeps):
    """torch clamps each element of a factored v, so only unfactored tensors have two."""
    two_sweeps(True)
    rows = TORCH(stepping.make_params([(6, 5), (7,)])).explain().splitlines()[1:-1]
    assert [row.split()[5] for row in rows] == ["3", "2"]
    assert "clamp" in rows[0]
    clipped = TORCH(stepping.make_params([(7,)]), max_grad_norm=1.0).explain().splitlines()[1]
    assert clipped.split()[5] == "3"
    assert "norm" in clipped
