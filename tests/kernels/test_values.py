"""Values that bite: zeros, extremes, what is not finite, and torch's clamp wherever it reaches."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.dialects import HF, KERAS, OPTAX, TORCH
from tests.kernels.biting import EVERY_RULE, RULES, conditioning, draw, judged
from tests.kernels.judged import BF16, F16, F32, F64, Judged, eps_of, params_in

pytestmark = pytest.mark.usefixtures("isa")

# A vector, a tiny matrix and stacks of them, narrow, of one chunk and of several, of one slab and
# of several, and stacks of small matrices.
SHAPES = [
    (7,),
    (3, 3),
    (40, 3, 3),
    (40, 5, 5),
    (33, 9),
    (17, 23),
    (40, 60),
    (300, 513),
    (64, 16, 300),
]


# --- zeros ---------------------------------------------------------------------------------------


@EVERY_RULE
@pytest.mark.parametrize("zeros", ["all", "rows", "columns", "matrices"])
def test_zeros(rule: str, zeros: str) -> None:
    """From the first step on, and after steps that had none."""
    shapes = [(33, 9), (40, 3, 3), (4, 5, 5), (17, 23), (4, 40, 60), (300, 513), (7,)]
    for start in (0, 1):
        pair = judged(rule, params_in(shapes, F32))
        for step in range(start, 3):
            grads = [g.abs() + 0.1 for g in draw(shapes, 0, F32)]
            for g in grads if step != 0 else []:
                if zeros == "all":
                    g.zero_()
                elif zeros == "rows" and g.dim() > 1:
                    g[..., ::2, :] = 0.0
                elif zeros == "columns":
                    g[..., 1::3] = 0.0
                elif zeros == "matrices" and g.dim() > 2:
                    g[1:3] = 0.0
            pair.step(grads)


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e17])
@pytest.mark.parametrize("rule", ["hf", "torch", "optax-momentum", "no_factors"])
def test_gradients_of_any_scale(rule: str, scale: float, dtype: torch.dtype) -> None:
    """At 1e-20 the paper's eps1 is all there is; at 1e17 the squares of a line still sum up."""
    pair = judged(rule, params_in(SHAPES, dtype))
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, dtype=F64, generator=generator) for shape in SHAPES]
        pair.step([(g * scale).to(dtype) for g in drawn])


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_extremes_without_an_eps(scale: float) -> None:
    """1e18 squared is 1e36, and row_var * col_var far beyond float32's range, though v is not."""
    shapes = [(7,), (3, 3), (40, 5, 5), (9, 13), (5, 40)]
    eps = {"eps": (1e-30, 1e-3)}
    pair = Judged(HF, params_in(shapes, F32), **eps)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
        pair.step([(g * scale).to(F32) for g in drawn])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e15])
def test_parameters_of_any_scale(scale: float) -> None:
    for dialect in (HF, TORCH):
        eps = eps_of(F32) if dialect is TORCH else {}
        params = [torch.nn.Parameter((p * scale).detach()) for p in params_in(SHAPES, F32)]
        pair = Judged(dialect, params, **eps)
        pair.step(draw(SHAPES, 0, F32))


# --- not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 300)], ids=str)
@pytest.mark.parametrize("rule", [*RULES])
def test_poison_spreads_as_in_the_reference(
    rule: str, shape: tuple[int, ...], poison: float
) -> None:
    """Parameter and state are poisoned exactly where those of the reference are."""
    dialect, options = RULES[rule]
    runs = []
    for backend in ("cpp", "reference"):
        optimizer = dialect(params_in([shape], F32), backend=backend, **options)
        for step in (0, 2):
            (param,) = stepping.params_of(optimizer)
            (param.grad,) = draw([shape], step, F32)
            if step:
                param.grad.view(-1)[param.numel() // 2] = poison
            optimizer.step()
        state = optimizer.state[param]
        runs.append({"param": param.detach(), **{k: v for k, v in state.items() if v.dim()}})
    ours, wanted = runs
    for key, value in wanted.items():
        for kind in (Tensor.isnan, Tensor.isinf):
            differs = kind(ours[key]) != kind(value)
            assert not differs.any(), (key, kind, int(differs.sum()))


def test_amsgrad_maxima_keep_poison() -> None:
    """As torch.maximum does: NaN is larger than everything."""
    for shape in ((7,), (17, 23)):
        optimizer = RULES["adafactor_pytorch-amsgrad"][0](
            params_in([shape], F32),
            backend="cpp",
            **RULES["adafactor_pytorch-amsgrad"][1],
        )
        (param,) = stepping.params_of(optimizer)
        for step in range(3):
            (param.grad,) = draw([shape], 0, F32)
            if step == 1:
                param.grad.view(-1)[3] = math.nan
            optimizer.step()
        maxima = optimizer.state[param]["exp_avg_sq_hat"]
        assert maxima.isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@EVERY_RULE
def test_skip_writes_nothing(rule: str, poison: float) -> None:
    for shape in [*SHAPES, (700, 300)]:
        dialect, options = RULES[rule]
        optimizer = dialect(params_in([shape], BF16), backend="cpp", nonfinite="skip", **options)
        (param,) = stepping.params_of(optimizer)
        (param.grad,) = draw([shape], 0, BF16)
        optimizer.step()
        (param.grad,) = draw([shape], 2, BF16)
        param.grad.view(-1)[-1] = poison
        with stepping.assert_untouched(optimizer):
            optimizer.step()


# --- the clamp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("eps1", [None, 1e-7])
@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0], ids="decades{}".format)
def test_the_clamp_wherever_it_reaches(
    dtype: torch.dtype, eps1: float | None, spread: float
) -> None:
    """No element, some of some lines, all of some, some of every line, all of every line."""
    shapes = SHAPES
    smallest = torch.finfo(dtype).eps if eps1 is None else eps1
    eps = eps_of(dtype, smallest)
    for size in (1e-3, 0.1, 1.0, 10.0, 1e4):
        pair = Judged(TORCH, params_in(shapes, dtype), **eps)
        slack = functools.partial(conditioning, pair, eps1=smallest)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            grads = []
            for shape in shapes:
                g = torch.randn(shape, dtype=F64, generator=generator)
                for dim in range(max(0, len(shape) - 2), len(shape)):
                    sizes = [1] * len(shape)
                    sizes[dim] = shape[dim]
                    g *= 10 ** (spread * (torch.rand(sizes, dtype=F64, generator=generator) - 0.5))
                grads.append((g * size * smallest).clamp(-6e4, 6e4).to(dtype))  # float16's range
            pair.step(grads, slack=slack)


# --- clipping by a norm --------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@EVERY_RULE
def test_max_grad_norm(rule: str, max_norm: float) -> None:
    if rule.startswith("keras"):
        pytest.skip("keras takes one kind of clipping")
    shapes = [*SHAPES, (700, 300)]
    pair = judged(rule, params_in(shapes, F32), max_grad_norm=max_norm)
    for step in range(2):
        pair.step(draw(shapes, 2 * step, F32))


def test_a_loss_scale_is_divided_out() -> None:
    for dialect, options in ((HF, {}), (OPTAX, {"momentum": 0.9}), (KERAS, {"clipnorm": 0.5})):
        runs = []
        for scale in (1.0, 1024.0):
            extras: dict[str, Any] = {"fused": True, "backend": "cpp"}
            optimizer = dialect(params_in(SHAPES, F32), **options, **extras)
            for step in range(2):
                params = stepping.params_of(optimizer)
                for p, g in zip(params, draw(SHAPES, step, F32), strict=True):
                    p.grad = g * scale
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.step()
            runs.append(optimizer)
        for p, q in zip(*map(stepping.params_of, runs), strict=True):
            assert stepping.same_bits(p, q)  # by a power of two, so exactly
