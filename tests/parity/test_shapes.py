"""Every dialect against the oracle on the shapes and memory layouts that bite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import dialects, oracle
from tests.dialects import Dialect
from tests.oracle import Oracle
from tests.parity.follow import KEPT, assert_close, hard_grads, hard_params, moments
from tests.stepping import LAYOUTS, TOLERANCES, params_of, same_bits

STEPS = 5  # past every schedule, switch and second overwrite of the variants below

SHAPES: dict[str, Sequence[tuple[int, ...]]] = {
    "empty": [(0,), (0, 5), (3, 0), (2, 0, 3), (3, 4, 0, 2)],
    "empty_beside_others": [(0,), (6, 5), (0, 5), (), (3, 0)],
    "scalars_and_lines": [(), (1,), (1, 1), (1, 9), (9, 1), (1, 1, 7), (5, 1, 1, 3)],
    "primes": [(31,), (7, 13), (97, 2), (3, 11, 5)],
    "wide": [(16385,), (2, 16385), (16385, 2)],
    "many_dims": [(2, 3, 5, 2, 3), (3, 1, 4, 1, 5), (5, 4, 3, 2, 1), (2, 1, 3, 2, 2, 3)],
}


# Momentum in the parameter's dtype: what a low-precision buffer rounds is tested elsewhere. Keras
# holds its learning rate in float32, so it is a power of two.
CASES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "torch-defaults": (dialects.TORCH, {}),
    "torch-weight_decay": (dialects.TORCH, {"lr": 0.05, "weight_decay": 0.1}),
    "hf-relative": (dialects.HF, {"lr": None, "relative_step": True}),
    "hf-momentum": (dialects.HF, {"lr": 0.02, "beta1": 0.9, "weight_decay": 0.1}),
    "keras-global_clipnorm": (
        dialects.KERAS,
        {"learning_rate": 2.0**-5, "global_clipnorm": 0.5, "weight_decay": 0.125},
    ),
    "keras-average": (
        dialects.KERAS,
        {
            "learning_rate": 2.0**-5,
            "use_ema": True,
            "ema_momentum": 0.5,
            "ema_overwrite_frequency": 2,
        },
    ),
    "adafactor_pytorch-defaults": (dialects.ADAFACTOR_PYTORCH, {"lr": None}),
    "adafactor_pytorch-amsgrad": (
        dialects.ADAFACTOR_PYTORCH,
        {"non_constant_decay": False, "weight_decay": 0.1},
    ),
    "optax-small_matrices": (dialects.OPTAX, {}),
    "optax-momentum": (dialects.OPTAX, {"momentum": 0.9, "weight_decay_rate": 1e-3}),
    "big_vision-small_matrices": (dialects.BIG_VISION, {"weight_decay": 0.1}),
    "big_vision-clip": (dialects.BIG_VISION, {"clipping_threshold": 0.5, "momentum": None}),
}
MOMENTUM_DTYPE = {"optax": "dtype_momentum", "big_vision": "momentum_dtype"}

ALL_CASES = pytest.mark.parametrize(("dialect", "options"), CASES.values(), ids=CASES)
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def pair(
    dialect: Dialect, options: dict[str, Any], params: Sequence[Tensor], dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, Oracle]:
    """Ours over these parameters, and the oracle over copies of them."""
    options = {**dialect.plain, **options}
    if dialect.name in MOMENTUM_DTYPE:
        options[MOMENTUM_DTYPE[dialect.name]] = dtype
    knobs = getattr(oracle, f"{dialect.name}_knobs")(**options)
    return dialect(params, **options), Oracle(knobs, params, dtype)


def step_both(ours: torch.optim.Optimizer, judge: Oracle, grads: Sequence[Tensor]) -> None:
    """One step with these very gradients, strides and all, which ours must not write to."""
    judge.step(grads)
    before = [g.clone() for g in grads]
    for p, g in zip(params_of(ours), grads, strict=True):
        p.grad = g
        assert p.grad.stride() == g.stride()
    ours.step()
    assert all(map(same_bits, grads, before))


def assert_follows(
    ours: torch.optim.Optimizer,
    judge: Oracle,
    dialect: Dialect,
    tolerance: float,
    slice_by_slice: bool = False,
) -> None:
    """Compare parameters and state; `slice_by_slice` each slice relative to its own largest."""
    kept = KEPT[dialect.name]
    for index, (p, expected) in enumerate(zip(params_of(ours), judge.params, strict=True)):
        state = {key: value for key, value in ours.state[p].items() if key != "RMS"}
        if "step" in kept.keys:
            assert float(state[kept.keys["step"]]) == judge.state[index]["step"]
        assert not any(value.isnan().any() for value in state.values())
        compared = list(moments(judge, index, state, kept))
        for key, mine, wanted in [("parameter", p, expected), *compared]:
            pairs = zip(mine, wanted, strict=True) if slice_by_slice else [(mine, wanted)]
            for number, (a, b) in enumerate(pairs):
                assert_close(a, b, tolerance, f"slice {number} of {key} of {tuple(p.shape)}")


@ALL_CASES
@DTYPES
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(dialect, options, dtype, shapes):
    ours, judge = pair(dialect, options, hard_params(shapes, dtype), dtype)
    for step in range(STEPS):
        step_both(ours, judge, hard_grads(shapes, dtype, step))
        assert_follows(ours, judge, dialect, TOLERANCES[dtype])


@ALL_CASES
@DTYPES
@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 2, 5, 7)], ids=str)
def test_stacked_experts_of_very_different_gradients(dialect, options, dtype, shape):
    """Statistics that are 1e10 times smaller than their neighbours' are as exact as those."""
    ours, judge = pair(dialect, options, hard_params([shape], dtype), dtype)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        grad[0] *= 1e-5
        step_both(ours, judge, [grad.to(dtype)])
        assert_follows(ours, judge, dialect, TOLERANCES[dtype], slice_by_slice=True)


@ALL_CASES
@DTYPES
@pytest.mark.parametrize(("lay_param", "lay_grad"), LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layouts(dialect, options, dtype, lay_param, lay_grad):
    shapes = [(4, 6, 3, 2), (1, 5, 7, 3)]
    params = [torch.nn.Parameter(lay_param(p.detach())) for p in hard_params(shapes, dtype)]
    before = [(p.stride(), p.storage_offset(), p.data_ptr()) for p in params]
    gaps = [unused_storage(p) for p in params]
    ours, judge = pair(dialect, options, params, dtype)
    for step in range(STEPS):
        step_both(ours, judge, [lay_grad(g) for g in hard_grads(shapes, dtype, step)])
        assert_follows(ours, judge, dialect, TOLERANCES[dtype])
    assert [(p.stride(), p.storage_offset(), p.data_ptr()) for p in params] == before
    # The layouts that leave gaps fill them with NaN: nothing but the parameter is written.
    assert [unused_storage(p) for p in params] == gaps


def unused_storage(p: Tensor) -> int:
    """How many NaN lie in a parameter's storage."""
    storage = torch.tensor([], dtype=p.dtype).set_(p.untyped_storage())
    return int(storage.isnan().sum())
