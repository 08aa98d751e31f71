"""Shapes, rules and gradients that bite, for every backend that has kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.factoring import Factoring, View
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, HF, KERAS, OPTAX, TORCH, Dialect
from tests.kernels.judged import F64, Judged, eps_of

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


def conditioning(pair: Judged, q: Tensor, eps1: float) -> float:
    """How much of Σ u² cancels: what is summed and taken back, over what remains.

    Σ u² is what the identity says of all lines as if nothing were clamped, less that of the clamped
    ones, plus what they really have, and each part has the rounding errors of its own size.
    """
    state = pair.judge.state[q]
    if "row_var" not in state:
        return 1.0
    view = Factoring(View.LAST_TWO).view_of(tuple(q.shape))
    assert view is not None
    row, col = state["row_var"].double(), state["col_var"].double()
    v = row * col / row.mean(-2, keepdim=True).clamp(min=eps1)
    assert q.grad is not None
    free = (q.grad.square() / v).nan_to_num(0.0, 0.0).sum()
    clamped = (q.grad.square() / v.clamp(min=eps1**2)).sum()
    return 1.0 + 2.0 * float(free / clamped) if clamped else 1.0


def draw(
    shapes: Sequence[tuple[int, ...]], step: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """Gradients with rows, columns and slices of several scales, and some of nothing but zeros."""
    return [g.clone() for g in _drawn(tuple(shapes), step, dtype, seed)]


@functools.lru_cache(maxsize=32)
def _drawn(
    shapes: tuple[tuple[int, ...], ...], step: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    grads = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(1_000_003 * seed + 97 * step + index)
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
