"""Where the identity for Σu² must not be trusted, and what a native library must not be given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import Adafactor
from fused_adafactor.dialects.hf import Adafactor as HfAdafactor

Optimizer = type[Adafactor] | type[HfAdafactor]
# Twelve operations on an element and sums of float32 squares in another order, on a whole tensor.
BOUND = 1e-4


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(dialect: Optimizer, grad: Tensor, backend: str, **options: Any) -> Tensor:
    """How far one step moves a parameter."""
    before = draw(tuple(grad.shape), seed=1)
    param = before.clone().requires_grad_()
    param.grad = grad.clone()
    dialect([param], backend=backend, **options).step()
    return param.detach() - before


def assert_moves_alike(dialect: Optimizer, grad: Tensor, **options: Any) -> None:
    got, wanted = (moved(dialect, grad, backend, **options) for backend in ("cpp", "reference"))
    assert torch.linalg.vector_norm(got - wanted) <= BOUND * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize("scale", [0.0, 1e-21, 3e-20, 1e-10, 1e-5])
def test_a_row_next_to_nothing_does_not_stop_the_others(scale: float) -> None:
    # Its second moment is below the normal numbers, and one over it beyond all range.
    grad = draw((64, 64)).sign() * (1 + draw((64, 64), seed=2).abs())
    grad[3] *= scale
    assert_moves_alike(Adafactor, grad)


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-6, 1e-8])
def test_what_the_clamp_cuts_off_does_not_drown_the_rest(scale: float) -> None:
    # Without the clamp the small block counts for more than the large one, by powers of ten.
    grad = torch.zeros(64, 64)
    grad[:32, :32] = draw((32, 32))
    grad[32:, 32:] = scale * draw((32, 32), seed=2)
    assert_moves_alike(Adafactor, grad)


@pytest.mark.parametrize("dialect", [Adafactor, HfAdafactor])
@pytest.mark.parametrize("shape", [(14, 3, 5), (10, 8, 1), (40, 37), (2, 22, 13)], ids=str)
def test_rows_of_very_different_scale(dialect: Optimizer, shape: tuple[int, ...]) -> None:
    scales = torch.logspace(-12, 3, shape[-2]).unsqueeze(-1)
    options = {"eps": (1e-30, 1e-3)} if dialect is Adafactor else {}
    assert_moves_alike(dialect, draw(shape) * scales, **options)


def test_a_default_device_is_not_where_the_sums_are() -> None:
    param = draw((5, 7)).requires_grad_()
    param.grad = draw((7, 5)).t()  # one that has to be copied
    optimizer = Adafactor([param], backend="cpp")
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    assert param.isfinite().all()


def test_too_many_dimensions_are_refused_before_anything_is_made() -> None:
    param = draw((2,) * 10).permute(9, 7, 5, 3, 1, 0, 2, 4, 6, 8).requires_grad_()
    param.grad = torch.ones_like(param)
    optimizer = Adafactor([param], backend="cpp")
    with pytest.raises(RuntimeError, match="parameter #0 in group 0 has 10 dimensions"):
        optimizer.step()
    assert not optimizer.state
