"""First moments in blocks of 8 bits, interpreted: the oracle's bits, the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.blocks import lines_of
from tests.interpret.small import BACKEND
from tests.kernels.judged import growth
from tests.moments import (
    RULES,
    Twins,
    exp_avg_of,
    grads_for,
    laid_out,
    lies_along_columns,
    read,
    scale_of,
    unrounded,
    view_of,
)
from tests.stepping import params_of, same_bits

F32, F64, BF16, I8 = torch.float32, torch.float64, torch.bfloat16, torch.int8
# By the sizes of ``small.py``: tiny ones with a row of two blocks, and of several tiles; lines of
# one block, of a rest, and of several tiles; chunks; vectors of several tiles.
SHAPES = [
    *[(7,), (), (3, 3), (30, 5, 5), (1, 40), (9, 13), (5, 257), (37, 9), (2, 9, 70), (1031,)],
]


def turned(values: Tensor) -> Tensor:
    return stepping.transposed(values) if values.dim() > 1 else values


@pytest.mark.parametrize(
    ("rule", "lay_out"),
    [*((rule, stepping.contiguous) for rule in RULES), ("hf", turned), ("optax", turned)],
)
def test_the_bits_are_the_oracles(rule: str, lay_out: Callable[[Tensor], Tensor]) -> None:
    """In float64, in which no sum is so wrong that an element is rounded another way."""
    twins = Twins(rule, laid_out(SHAPES, F64, lay_out), backend=BACKEND, tolerance=1e-12)
    for step in range(2):
        twins.step(grads_for(params_of(twins.ours), step))


@pytest.mark.parametrize("rule", ["hf", "adafactor_pytorch"])
def test_a_third_sweep_has_the_same_moment(rule: str, launch: str) -> None:
    """Where a norm is known only after the first sweep; and launched in both ways."""
    params = laid_out(SHAPES, F64, stepping.contiguous)
    twins = Twins(rule, params, backend=BACKEND, tolerance=1e-12, max_grad_norm=0.5)
    for step in range(2):
        twins.step(grads_for(params_of(twins.ours), step))


def stepped(rule: str, dtype: torch.dtype, backend: str, **extras: Any) -> Any:
    dialect, options = RULES[rule]
    params = laid_out(SHAPES, dtype, stepping.contiguous)
    optimizer = dialect(params, **options, momentum_dtype=I8, backend=backend, **extras)
    for step in range(2):
        for p, g in zip(params, grads_for(params, step), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rule", ["hf", "adafactor_pytorch", "amsgrad", "big_vision"])
def test_the_bits_are_the_references(rule: str) -> None:
    """And so is RMS(u), also where a third sweep finds it."""
    ours, wanted = (stepped(rule, F64, backend) for backend in (BACKEND, "reference"))
    for p, q in zip(*map(params_of, (ours, wanted)), strict=True):
        assert same_bits(scale_of(ours, p), scale_of(wanted, q)), tuple(p.shape)
        assert same_bits(exp_avg_of(ours, p), exp_avg_of(wanted, q)), tuple(p.shape)
        stepping.assert_close(p, q, 1e-12, f"parameter of {tuple(p.shape)}")
    stepping.assert_close_metrics(ours.metrics(), wanted.metrics(), 1e-12)


@pytest.mark.parametrize(("rule", "dtype"), [("hf", BF16), ("adafactor_pytorch", F32)], ids=str)
def test_float32_is_rounded_as_well_as_float64(rule: str, dtype: torch.dtype) -> None:
    """From one start: off by a 128th of a block's largest, and by what float32 is off itself."""
    dialect, options = RULES[rule]
    params = laid_out(SHAPES, dtype, stepping.contiguous)
    ours = dialect(params, **options, momentum_dtype=I8, backend=BACKEND)
    twins = [torch.nn.Parameter(p.detach().double()) for p in params]
    exact = dialect(twins, **options, **unrounded(dialect, F64), backend="reference")
    for step in range(2):
        for p, q in zip(params, twins, strict=True):
            with torch.no_grad():
                q.copy_(p)
            for key, value in ours.state[p].items():
                if key in exact.state[q]:
                    kept = read(ours, p) if key == ours.layout.exp_avg else value
                    exact.state[q][key].copy_(kept)
        for p, q, g in zip(params, twins, grads_for(params, step), strict=True):
            p.grad, q.grad = g, g.double()
        ours.step()
        exact.step()
        for p, q in zip(params, twins, strict=True):
            where = view_of(ours, p), lies_along_columns(ours, p)
            wanted = lines_of(exp_avg_of(exact, q), *where)
            padded = torch.nn.functional.pad(wanted, (0, -wanted.shape[-1] % 32))
            largest = padded.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
            allowed = largest[:, : wanted.shape[-1]] / 128
            allowed = allowed + growth(p.shape) * 2.0**-24 * wanted.abs().max()
            error = (lines_of(read(ours, p), *where) - wanted).abs()
            assert (error <= allowed).all(), tuple(p.shape)


def test_both_launches_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for form in ("persistent", "phases"):
        monkeypatch.setenv("FUSED_ADAFACTOR_LAUNCH", form)
        runs.append(stepped("adafactor_pytorch", F32, BACKEND))
    for p, q in zip(*map(params_of, runs), strict=True):
        stepping.assert_same_values(dict(runs[0].state[p]), dict(runs[1].state[q]), "state")
        assert same_bits(p, q)


@pytest.mark.parametrize(
    ("rule", "poison"), [("hf", float("inf")), ("adafactor_pytorch", float("nan"))]
)
def test_poison_is_seen_where_the_reference_sees_it(rule: str, poison: float) -> None:
    dialect, options = RULES[rule]
    runs = []
    for backend in (BACKEND, "reference"):
        params = laid_out(SHAPES, F64, stepping.contiguous)
        optimizer = dialect(params, **options, momentum_dtype=I8, backend=backend)
        for step in range(2):
            for p, g in zip(params, grads_for(params, step), strict=True):
                p.grad = g
                if step and p.dim() != 1:
                    g.view(-1)[g.numel() // 2] = poison
            optimizer.step()
        runs.append(optimizer)
    for p, q in zip(*map(params_of, runs), strict=True):
        ours, wanted = (scale_of(o, x) for o, x in zip(runs, (p, q), strict=True))
        assert torch.equal(ours, wanted), tuple(p.shape)
        assert torch.equal(exp_avg_of(runs[0], p), exp_avg_of(runs[1], q)), tuple(p.shape)
        assert torch.equal(p.isnan(), q.isnan()), tuple(p.shape)
