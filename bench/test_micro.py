"""Micro cases under pytest-benchmark, to compare two commits: ``python -m pytest bench``.

They watch what surrounds the arithmetic: how long a step takes where there is little to compute,
what a plan costs, and what a first step costs. ``python -m fused_adafactor bench`` measures the
arithmetic itself, against its peers.
"""

import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from fused_adafactor import Adafactor

# FUSED_ADAFACTOR_BACKEND chooses the backend, as everywhere.
BACKEND = os.environ.get("FUSED_ADAFACTOR_BACKEND", "auto")
CASES = {
    "one-element": ((1,),),
    "vector-1024": ((1024,),),
    "matrix-64x64": ((64, 64),),
    "matrix-512x512": ((512, 512),),
    "30-vectors-1024": ((1024,),) * 30,
    # Of as many tensors as a model has: what must be looked at in every step.
    "300-vectors-1": ((1,),) * 300,
    "300-vectors-1024": ((1024,),) * 300,
    "300-matrices-16x16": ((16, 16),) * 300,
    "stack-4x64x64": ((4, 64, 64),),
    "conv-16x16x3x3": ((16, 16, 3, 3),),
}


def make(case: str, dtype: torch.dtype = torch.float32, capturable: bool = False) -> Adafactor:
    """An optimizer whose parameters have gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in CASES[case]:
        start, grad = torch.randn(2, *shape, generator=generator).to(dtype)
        params.append(param := nn.Parameter(start))
        param.grad = grad
    return Adafactor(params, lr=1e-3, backend=BACKEND, capturable=capturable)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_step(benchmark: BenchmarkFixture, case: str, dtype: torch.dtype) -> None:
    """A step whose state is there."""
    optimizer = make(case, dtype)
    optimizer.step()
    benchmark(optimizer.step)


def test_step_of_new_gradients(benchmark: BenchmarkFixture) -> None:
    """A step as in a training loop, whose gradients lie elsewhere every time."""
    optimizer = make("300-vectors-1024")
    params = optimizer.param_groups[0]["params"]
    grads = [[p.grad.clone() for p in params] for _ in range(2)]
    optimizer.step()

    def replace() -> None:
        grads.reverse()
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad

    benchmark.pedantic(optimizer.step, setup=replace, rounds=200)


def test_capturable_step(benchmark: BenchmarkFixture) -> None:
    """A step whose counters are tensors of a device."""
    optimizer = make("300-vectors-1024", capturable=True)
    optimizer.step()
    benchmark(optimizer.step)


def test_first_step(benchmark: BenchmarkFixture) -> None:
    """A step that plans and makes its state."""
    benchmark.pedantic(
        lambda optimizer: optimizer.step(),
        setup=lambda: ((make("30-vectors-1024"),), {}),
        rounds=50,
    )


def test_explain(benchmark: BenchmarkFixture) -> None:
    """A plan in words."""
    benchmark(make("30-vectors-1024").explain)
