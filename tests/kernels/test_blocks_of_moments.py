"""First moments in blocks of 8 bits, on every instruction set: the bits of oracle and reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.moments import RULES, SHAPES, Twins, exp_avg_of, grads_for, laid_out, scale_of
from tests.stepping import params_of, same_bits

pytestmark = pytest.mark.usefixtures("isa")

F32, F64, BF16, I8 = torch.float32, torch.float64, torch.bfloat16, torch.int8
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
# Around 512 elements, which are a chunk, half of it, and 131,072, which one item steps; lines of no
# matrix have 16,384.
LARGE = [
    *[(511,), (513,), (16_385,), (131_073,), (999, 33), (40, 255), (40, 257), (17, 513)],
    *[(257, 513), (1, 16_385), (30, 16, 300), (300, 7, 3, 3), (5000, 2)],
]


def turned(values: Tensor) -> Tensor:
    return stepping.transposed(values) if values.dim() > 1 else values


def gapped(values: Tensor) -> Tensor:
    return stepping.strided(values) if values.dim() else values


EVERY_LAYOUT = pytest.mark.parametrize("lay_out", [stepping.contiguous, turned, gapped])


@EVERY_RULE
@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_bits_are_the_oracles(
    rule: str, lay_out: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    twins = Twins(rule, laid_out(SHAPES, dtype, lay_out), backend="cpp")
    for step in range(2):
        twins.step(grads_for(params_of(twins.ours), step))


def stepped(rule: str, dtype: torch.dtype, lay_out: Any, backend: str, **extras: Any) -> Any:
    dialect, options = RULES[rule]
    params = laid_out(LARGE, dtype, lay_out)
    optimizer = dialect(params, **options, momentum_dtype=I8, backend=backend, **extras)
    for step in range(2):
        for p, g in zip(params, grads_for(params, step), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rule", ["hf", "adafactor_pytorch", "big_vision"])
@EVERY_LAYOUT
def test_the_bits_are_the_references(rule: str, lay_out: Callable[[Tensor], Tensor]) -> None:
    """In float64, in which no sum is so wrong that an element is rounded another way."""
    ours, wanted = (stepped(rule, F64, lay_out, backend) for backend in ("cpp", "reference"))
    for p, q in zip(*map(params_of, (ours, wanted)), strict=True):
        assert same_bits(scale_of(ours, p), scale_of(wanted, q)), tuple(p.shape)
        assert same_bits(exp_avg_of(ours, p), exp_avg_of(wanted, q)), tuple(p.shape)
        stepping.assert_close(p, q, 1e-12, f"parameter of {tuple(p.shape)}")


@pytest.mark.parametrize("rule", ["hf", "adafactor_pytorch"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_bits_are_the_same_for_any_number_of_threads_and_with_a_pause(
    rule: str, dtype: torch.dtype
) -> None:
    before, runs = torch.get_num_threads(), []
    try:
        for threads, extras in ((1, {}), (2, {}), (3, {}), (2, {"nonfinite": "skip"})):
            torch.set_num_threads(threads)
            runs.append(stepped(rule, dtype, stepping.contiguous, "cpp", **extras))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for p, q in zip(*map(params_of, (runs[0], other)), strict=True):
            stepping.assert_same_values(dict(runs[0].state[p]), dict(other.state[q]), "state")
            assert same_bits(p, q)


def test_a_tensor_does_not_feel_what_is_stepped_with_it() -> None:
    together = stepped("adafactor_pytorch", F32, stepping.contiguous, "cpp")
    dialect, options = RULES["adafactor_pytorch"]
    for number, p in enumerate(params_of(together)):
        params = laid_out(LARGE, F32, stepping.contiguous)
        grads = [grads_for(params, step)[number] for step in range(2)]
        alone = dialect([params[number]], **options, momentum_dtype=I8, backend="cpp")
        for params[number].grad in grads:
            alone.step()
        own = dict(alone.state[params[number]])
        stepping.assert_same_values(dict(together.state[p]), own, f"state of {tuple(p.shape)}")
