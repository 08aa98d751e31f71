"""Every shape, layout and dtype on every instruction set, one step at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, HF, KERAS, OPTAX, TORCH, Dialect
from tests.kernels.judged import BF16, F16, F32, F64, Judged, eps_of, params_in
from tests.stepping import LAYOUTS

pytestmark = pytest.mark.usefixtures("isa")

# 64 elements and 131,072 elements are where slabs.py changes from one way to the other, 512 is a
# chunk, 32 columns are narrow, 16 float32 are the widest vector, a line of no matrix has 16,384.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty_and_scalars": [(), (1,), (0,), (0, 4), (3, 0), (2, 0, 3)],
    "lines": [(7,), (511,), (513,), (16385,), (1, 9), (9, 1), (1, 700), (700, 1), (131073,)],
    "tiny": [(2, 2), (2, 3), (3, 2), (3, 3), (5, 5), (7, 7), (8, 8), (4, 16), (1, 1), (64, 1)],
    "tiny_stacks": [(5, 1, 1), (37, 2, 3), (64, 3, 3), (19, 16, 3, 3), (7, 7, 7), (130, 8, 8)],
    "many_tiny": [(300, 64, 3, 3), (4099, 5, 5)],
    "past_tiny": [(5, 13), (8, 9), (13, 8, 9), (65, 1, 65), (5, 65, 1)],
    "primes": [(31,), (7, 13), (97, 2), (3, 11, 5), (17, 23), (31, 37), (2, 3, 5, 7, 11)],
    "one_past": [(15, 17), (17, 15), (33, 31), (65, 513), (9, 129), (129, 257), (257, 513)],
    "narrow": [(1000, 2), (999, 3), (1023, 9), (514, 16), (1001, 17), (777, 31), (513, 32)],
    "just_not_narrow": [(777, 33), (100, 64), (101, 65), (33, 255), (17, 257)],
    "narrow_and_long": [(70_001, 2), (9000, 17), (4099, 33)],
    "wide": [(2, 16385), (16385, 2), (3, 70_001), (1, 140_000)],
    "whole_or_slabs": [(256, 512), (257, 512), (2, 65_536), (2, 65_537), (363, 361), (362, 362)],
    "many_slabs": [(700, 300), (1025, 1031), (3, 300, 500)],
    "stacks": [(64, 16, 300), (3, 4, 37, 41), (5, 363, 361), (2, 256, 513)],
    "many_dims": [(2, 3, 5, 2, 3), (3, 1, 4, 1, 5), (5, 4, 3, 2, 1), (2, 1, 30, 2, 20, 3)],
}
EVERY_SHAPE = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)

# What sets the kernels on different ways: no clamp, with one, momentum on each of its sites, a
# maximum per element, no factors; weights and gradients that the plain loops do not take.
RULES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "hf": (HF, {"lr": None, "relative_step": True}),
    "torch": (TORCH, {"lr": 0.05, "weight_decay": 0.1}),
    "hf-momentum": (HF, {"beta1": 0.9, "weight_decay": 0.1}),
    "keras-everything": (
        KERAS,
        {"use_ema": True, "global_clipnorm": 0.5, "weight_decay": 0.125, "learning_rate": 0.125},
    ),
    "keras-clipvalue": (KERAS, {"clipvalue": 0.5, "learning_rate": 0.125}),
    "adafactor_pytorch-amsgrad": (
        ADAFACTOR_PYTORCH,
        {"non_constant_decay": False, "weight_decay": 0.1},
    ),
    "optax-momentum": (OPTAX, {"momentum": 0.9, "min_dim_size_to_factor": 1}),
    "big_vision": (BIG_VISION, {"weight_decay": 0.1, "clipping_threshold": 0.5}),
    "no_factors": (ADAFACTOR_PYTORCH, {"enable_factorization": False}),
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def judged(rule: str, params: list[Tensor], **extras: Any) -> Judged:
    dialect, options = RULES[rule]
    eps = eps_of(params[0].dtype) if dialect is TORCH else {}
    pair = Judged(dialect, params, **options, **eps, **extras)
    pair.normwise = rule in ("hf-momentum", "optax-momentum", "big_vision") or (
        dialect is ADAFACTOR_PYTORCH
    )
    return pair


def draw(shapes: Sequence[tuple[int, ...]], step: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients with rows, columns and slices of several scales, and some of nothing but zeros."""
    return [g.clone() for g in _drawn(tuple(shapes), step, dtype)]


@functools.lru_cache(maxsize=32)
def _drawn(shapes: tuple[tuple[int, ...], ...], step: int, dtype: torch.dtype) -> list[Tensor]:
    grads = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(97 * step + index)
        g = torch.randn(shape, dtype=F64, generator=generator)
        for dim in range(max(0, len(shape) - 2), len(shape)):
            sizes = [1] * len(shape)
            sizes[dim] = shape[dim]
            g = g * 10 ** torch.rand(sizes, dtype=F64, generator=generator)
        if len(shape) > 1 and g.numel() and step == 1:
            g[..., shape[-2] // 2, :] = 0.0
            g[..., shape[-1] // 3] = 0.0
        grads.append((g * 0.1**step).to(dtype))
    return grads


@EVERY_RULE
@EVERY_SHAPE
def test_every_rule_on_every_shape(rule: str, shapes: list[tuple[int, ...]]) -> None:
    pair = judged(rule, params_in(shapes, F32))
    for step in range(3):
        pair.step(draw(shapes, step, F32))


@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("rule", ["hf", "torch", "hf-momentum", "no_factors"])
def test_every_dtype_with_every_gradient(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    shapes = [(7,), (3, 3), (40, 2, 3), (17, 23), (33, 9), (9, 513), (3, 40, 70), (300, 513)]
    pair = judged(rule, params_in(shapes, dtype))
    for step in range(2):
        pair.step(draw(shapes, step, grad_dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_RULE
def test_every_layout(rule: str, layout: str, dtype: torch.dtype) -> None:
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (1, 5, 7, 3), (2, 3, 40, 50), (2, 16, 9, 9), (1, 2, 300, 513)]
    if layout == "gradient_expanded_scalar":
        shapes = shapes[:2]
    params = params_in(shapes, dtype, lay_param)
    before = [(p.stride(), p.data_ptr()) for p in params]
    pair = judged(rule, params)
    for step in range(2):
        grads = [lay_grad(g) for g in draw(shapes, 2 * step, dtype)]
        kept = [g.clone() for g in grads]
        pair.step(grads)
        assert all(map(torch.equal, grads, kept))
    assert [(p.stride(), p.data_ptr()) for p in params] == before


@pytest.mark.parametrize("permutation", [(1, 0, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("rule", ["hf", "torch", "optax-momentum", "no_factors"])
def test_dimensions_in_any_order(rule: str, permutation: tuple[int, ...]) -> None:
    def permuted(values: Tensor) -> Tensor:
        inverse = sorted(range(4), key=lambda d: permutation[d])
        return values.permute(permutation).contiguous().permute(inverse)

    shapes = [(4, 6, 3, 2), (3, 5, 40, 31), (20, 9, 7, 60)]
    pair = judged(rule, params_in(shapes, F32, permuted))
    for step in range(2):
        pair.step([permuted(g) for g in draw(shapes, 2 * step, F32)])


@pytest.mark.parametrize("rule", ["hf", "torch", "adafactor_pytorch-amsgrad", "optax-momentum"])
@pytest.mark.parametrize("shape", [(6, 8, 6), (4, 40, 50), (3, 300, 500), (4, 400, 9)], ids=str)
def test_experts_of_very_different_gradients(rule: str, shape: tuple[int, ...]) -> None:
    """Every element is held to its own size, so a slice at 1e-5 is as exact as its neighbours."""
    pair = judged(rule, params_in([shape], F32))
    for step in range(2):
        (g,) = draw([shape], 2 * step, F32)
        g[::2] *= 1e-5
        pair.step([g])


@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "torch"])
def test_gradients_that_are_negated_when_they_are_read(rule: str) -> None:
    """As the imaginary part of a conjugate is: its memory has the other sign."""
    shapes = [(7,), (17, 23), (300, 513), (3, 3)]
    pair = judged(rule, params_in(shapes, F32))
    for step in range(3):
        grads = draw(shapes, 2 * step, F32)
        if step != 1:
            grads = [torch.complex(g, -g).conj().imag for g in grads]
            assert all(g.is_neg() for g in grads)
        pair.step(grads)


SIZES = st.lists(st.integers(1, 80), min_size=0, max_size=4).map(tuple)


@hypothesis.given(
    shape=SIZES,
    rule=st.sampled_from(list(RULES)),
    dtypes=st.tuples(*[st.sampled_from([F32, BF16, F16, F64])] * 2),
    data=st.data(),
)
@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_shape_in_any_order_with_any_dtypes(
    shape: tuple[int, ...],
    rule: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    data: st.DataObject,
) -> None:
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(2)]

    def laid_out(values: Tensor, order: list[int]) -> Tensor:
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return values.permute(order).contiguous().permute(inverse)

    pair = judged(rule, params_in([shape], dtypes[0], lambda values: laid_out(values, orders[0])))
    for step in range(2):
        pair.step([laid_out(g, orders[1]) for g in draw([shape], 2 * step, dtypes[1])])
