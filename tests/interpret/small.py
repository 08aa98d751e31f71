"""Sizes of pieces at which small tensors have several of each, and tensors that do."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.backends import triton
from fused_adafactor.tickets import GPU_CUT, Tuning
from tests.dialects import TORCH
from tests.kernels import biting
from tests.kernels.biting import RULES, draw
from tests.kernels.judged import Judged, eps_of, params_in
from tests.stepping import params_of, same_bits

# Who is tested: what a process has set when it begins says so.
BACKEND = "triton" if triton.interprets() else "cuda"
of_triton = pytest.mark.skipif(BACKEND != "triton", reason="of Triton's launches only")

SMALL = Tuning(
    cut=replace(
        GPU_CUT,
        slab_elements=512,
        slab_lines=4,
        most_slabs=8,
        free_line=1024,
        whole_elements=128,
        merge_columns=64,
    ),
    tile=256,
    widest=256,
    chunk=128,
    flat_tile=1024,
    tiny_tile=1024,
    span=64,
    narrowest=16,
    wave_bytes=8192,
    rms_units=2,
    merges=2,
    programs_per_processor=2,
)

# By these sizes: one of each way to cut a tensor, and several waves. Whole ones; tiny matrices, of
# one slab and of several; lines that are chunked; matrices of several slabs, and slabs of several
# matrices; parts; vectors of several slabs. A few of them for the tests that are not about shapes.
MIXED = [
    *((7,), (), (3, 3), (60, 5, 5), (9, 13)),
    *((5, 257), (37, 9), (20, 5, 15), (2, 9, 70), (1025,)),
]
FEW = [(7,), (3, 3), (10, 13), (5, 270), (3, 9, 9)]
SOME = [(7,), (3, 3), (9, 13), (5, 257), (2, 9, 70), (1025,)]


def use(monkeypatch: pytest.MonkeyPatch, tuning: Tuning) -> None:
    """Cut tensors by other sizes."""
    name = "triton.launcher" if BACKEND == "triton" else BACKEND
    launcher = importlib.import_module(f"fused_adafactor.backends.{name}")
    monkeypatch.setattr(launcher, "TUNING", tuning)


judged = functools.partial(biting.judged, backend=BACKEND)


def judged_of(dialect: Any, params: Sequence[Tensor], **options: Any) -> Judged:
    return Judged(dialect, params, backend=BACKEND, **options)


def built(rule: str, params: Sequence[Tensor], **extras: Any) -> Any:
    """An optimizer of a rule; torch's eps1 is that of the dtype."""
    dialect, options = RULES[rule]
    eps = eps_of(params[0].dtype) if dialect is TORCH else {}
    return dialect(params, **{"backend": BACKEND, **options, **eps, **extras})


def run(
    rule: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, steps: int = 2, **extras: Any
) -> list[dict[str, Tensor]]:
    """Parameters and state after a few steps."""
    optimizer = built(rule, params_in(shapes, dtype), **extras)
    for step in range(steps):
        for p, g in zip(params_of(optimizer), draw(shapes, step, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return results(optimizer)


def results(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [{"param": p.detach(), **optimizer.state[p]} for p in params_of(optimizer)]


def assert_same(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(ours, others, strict=True):
        for key, value in mine.items():
            shape = tuple(mine["param"].shape)
            assert same_bits(torch.as_tensor(value), torch.as_tensor(other[key])), (key, shape)
