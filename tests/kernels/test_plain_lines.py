"""What the loop over lines does beside the bare rule, on every instruction set: bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, HF
from tests.stepping import params_of, same_bits

pytestmark = pytest.mark.usefixtures("isa")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Lines of whole vectors, of whole vectors and a rest, of less than one past a chunk; some in blocks
# of eight and some left over; stacked, and long enough to be cut in slabs.
SHAPES = ((8, 64), (13, 77), (3, 513), (40, 255), (5, 33, 48), (600, 300))
HUGE = 1e30


def stepped(dtype: torch.dtype, grad_dtype: torch.dtype, dialect: Any = HF, **options: Any) -> Any:
    params = stepping.make_params(SHAPES, dtype)
    for param in params:
        param.grad_dtype = None  # any
    optimizer = dialect(params, **options, backend="cpp")
    for step in range(3):
        for param, grad in zip(params, stepping.grad_values(params, step), strict=True):
            # What float16 holds, float32 holds too.
            param.grad = grad.to(F16).to(grad_dtype)
        optimizer.step()
    return optimizer


def assert_same_numbers(a: Any, b: Any) -> None:
    """Compare parameters, and what both have of state."""
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert same_bits(p, q), f"parameter of {tuple(p.shape)}"
        for key, value in a.state[p].items():
            if isinstance(value, Tensor) and key in b.state[q]:
                assert same_bits(value, b.state[q][key]), f"{key} of {tuple(p.shape)}"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "neutral", [{"clipvalue": HUGE}, {"use_ema": True}, {"loss_scale_factor": 1.0}], ids=str
)
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_what_changes_no_number_changes_no_bit(
    neutral: dict[str, Any], dtype: torch.dtype, beta1: float | None
) -> None:
    bare = stepped(dtype, F32, beta1=beta1)
    assert_same_numbers(stepped(dtype, F32, beta1=beta1, **neutral), bare)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"clipvalue": 0.05}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_gradient_of_float16_is_one_of_float32(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    assert_same_numbers(stepped(dtype, F16, **options), stepped(dtype, F32, **options))


def test_an_average_is_of_what_has_been_stored() -> None:
    momentum = 0.75
    optimizer = stepped(BF16, F32, use_ema=True, ema_momentum=momentum)
    for param in params_of(optimizer):
        before = optimizer.state[param][optimizer.layout.average].clone()
        param.grad = torch.ones_like(param, dtype=F32)
        optimizer.step()
        wanted = momentum * before + (1 - momentum) * param.detach().float()
        found = optimizer.state[param][optimizer.layout.average]
        stepping.assert_close(found, wanted, 2e-7, f"average of {tuple(param.shape)}")
        param.grad = None


@pytest.mark.parametrize("dialect", [HF, ADAFACTOR_PYTORCH], ids=str)
def test_kahan_keeps_what_rounding_loses(dialect: Any) -> None:
    """Parameter and compensation together are what a float32 parameter comes to."""
    options = {"beta1": 0.9} if dialect is HF else {}
    kept = stepped(BF16, F32, dialect, rounding="kahan", **options)
    for param in params_of(kept):
        lost = kept.state[param][kept.layout.compensation]
        assert bool(lost.count_nonzero())
        # Half of a step of bfloat16 at most: more would have been rounded away from.
        assert bool((lost.abs().float() <= param.detach().abs().float() * 2.0**-8).all())


def test_accumulated_gradients_are_their_mean() -> None:
    together = stepped(F32, F32, gradient_accumulation_steps=3)
    params = stepping.make_params(SHAPES, F32)
    alone = HF(params, backend="cpp")
    sums = [torch.zeros_like(p, dtype=F32) for p in params]
    for step in range(3):
        for total, grad in zip(sums, stepping.grad_values(params, step), strict=True):
            total += grad.to(F16).float()
    for param, total in zip(params, sums, strict=True):
        param.grad = total / 3
    alone.step()
    for p, q in zip(params_of(together), params, strict=True):
        stepping.assert_close(p, q, 1e-6, f"parameter of {tuple(p.shape)}")
        assert not bool(together.state[p][together.layout.accumulator].count_nonzero())
