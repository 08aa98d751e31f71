"""Bits on the GPU: the same in both launch forms, in every run, in any company; and of rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.rounding import RoundingKey, round_kahan, round_nearest, round_stochastic
from tests.dialects import HF
from tests.gpu.device import (
    BACKEND,
    DEVICE,
    LAUNCH,
    LAUNCHES,
    built,
    built_of,
    give,
    grads_on_device,
    params_on_device,
)
from tests.kernels.biting import EVERY_RULE, RULES, SHAPES
from tests.kernels.judged import BF16, F16, F32
from tests.kernels.moments import ROUNDED_RULES, assert_moments_rounded_by_their_keys
from tests.stepping import contiguous, params_of, same_bits, strided, transposed

EVERY_SHAPE = [shape for shapes in SHAPES.values() for shape in shapes]
FEW = [(7,), (3, 3), (40, 5, 5), (33, 9), (17, 23), (150, 200), (257, 513), (3, 300, 500)]
STEPS = 2


def run(rule: str, shapes: Any, dtype: torch.dtype, **extras: Any) -> list[dict[str, Tensor]]:
    """Parameters and state after a few steps."""
    optimizer = built(rule, shapes, dtype, **extras)
    for step in range(STEPS):
        give(optimizer, grads_on_device(shapes, 2 * step, dtype))
        optimizer.step()
    return [{"param": p.detach(), **optimizer.state[p]} for p in params_of(optimizer)]


def assert_same(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(ours, others, strict=True):
        for key, value in mine.items():
            shape = tuple(mine["param"].shape)
            assert same_bits(torch.as_tensor(value), torch.as_tensor(other[key])), (key, shape)


@pytest.mark.parametrize(
    ("dtype", "extras"), [(F32, {}), (BF16, {}), (F32, {"state_dtype": BF16})], ids=str
)
@EVERY_RULE
def test_both_launch_forms_and_every_run_have_the_same_bits(
    rule: str, dtype: torch.dtype, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for launch in (*LAUNCHES, *LAUNCHES):
        monkeypatch.setenv(LAUNCH, launch)
        runs.append(run(rule, EVERY_SHAPE, dtype, **extras))
    for other in runs[1:]:
        assert_same(runs[0], other)


@EVERY_RULE
@pytest.mark.usefixtures("launch")
def test_a_tensor_does_not_feel_what_is_stepped_with_it(rule: str) -> None:
    if rule == "keras-everything":
        pytest.skip("it clips by the norm of all gradients")
    together = run(rule, FEW, F32)
    drawn = [grads_on_device(FEW, 2 * step, F32) for step in range(STEPS)]
    dialect, options = RULES[rule]
    for number, start in enumerate(params_on_device(FEW, F32)):
        optimizer = built_of(dialect, options, [start])
        for grads in drawn:
            give(optimizer, [grads[number]])
            optimizer.step()
        assert_same([together[number]], [{"param": start.detach(), **optimizer.state[start]}])


def test_many_tensors_step_like_few() -> None:
    """More items than there are programs, so that tickets decide who takes which."""
    shapes = FEW * 40
    dialect, options = RULES["hf"]
    starts = params_on_device(FEW, BF16)
    many = [torch.nn.Parameter(p.detach().clone()) for _ in range(40) for p in starts]
    crowd, few = built_of(dialect, options, many), built_of(dialect, options, starts)
    for step in range(STEPS):
        grads = grads_on_device(FEW, 2 * step, BF16)
        give(few, grads)
        give(crowd, grads * 40)
        few.step()
        crowd.step()
    assert len(many) == len(shapes)
    for number, p in enumerate(params_of(crowd)):
        assert same_bits(p, params_of(few)[number % len(FEW)]), number


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay_out", [contiguous, transposed, strided])
@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [("nearest", BF16), ("nearest", F16), ("stochastic", BF16), ("kahan", BF16), ("kahan", F16)],
    ids=str,
)
@pytest.mark.usefixtures("launch")
def test_rounding_is_that_function_bit_for_bit(
    rounding: str, dtype: torch.dtype, lay_out: Any
) -> None:
    """A gradient of zeros leaves the decay alone: one product, which no order of sums can change.

    So the float32 twin, stepped by the same backend from the same numbers, has the value that is
    rounded. The expected bits are made on the CPU.
    """
    shapes = [(3, 3), (40, 5, 5), (17, 23), (150, 200), (257, 513), (9, 16, 300), (2, 20_000)]
    options = {"lr": 0.5, "scale_parameter": False, "weight_decay": 0.1, "clip_threshold": 1e30}
    extras: dict[str, Any] = {} if rounding == "nearest" else {"rounding": rounding, "seed": 5}
    low = built_of(HF, options, params_on_device(shapes, dtype, lay_out), **extras)
    twin = built_of(HF, options, params_on_device(shapes, F32, lay_out))
    lost = [torch.zeros_like(p, dtype=F32) for p in params_of(low)]
    for t in (1, 2, 3):
        with torch.no_grad():
            for p, q, c in zip(params_of(low), params_of(twin), lost, strict=True):
                q.copy_(p.float() + c)
        for optimizer in (low, twin):
            give(optimizer, [torch.zeros_like(p) for p in params_of(optimizer)])
            optimizer.step()
        for index, (p, q) in enumerate(zip(params_of(low), params_of(twin), strict=True)):
            value, ours = q.detach().cpu(), p.detach().cpu()
            if rounding == "stochastic":
                expected = round_stochastic(value, dtype, RoundingKey(5, index, t))
            elif rounding == "kahan":
                expected, compensation = round_kahan(value, dtype)
                kept = low.state[p]["kahan"].cpu()
                assert same_bits(kept, compensation), (t, tuple(p.shape))
                lost[index] = low.state[p]["kahan"].float()
            else:
                expected = round_nearest(value, dtype)
            assert same_bits(ours, expected), (t, tuple(p.shape))


@pytest.mark.parametrize("lay_out", [contiguous, transposed, strided])
@pytest.mark.parametrize("rule", ROUNDED_RULES)
@pytest.mark.usefixtures("launch")
def test_bfloat16_second_moments_are_rounded_by_their_keys(rule: str, lay_out: Any) -> None:
    shapes = [s for s in FEW if len(s) > 1] if lay_out is transposed else FEW
    assert_moments_rounded_by_their_keys(rule, params_on_device(shapes, F32, lay_out), BACKEND)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("lines", [1, 3])
def test_every_number_is_read_and_written_as_it_is(lines: int, dtype: torch.dtype) -> None:
    """With a gradient of 0 nothing moves, subnormals least of all."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[: every.numel() // 3 * 3].reshape(lines, -1).to(DEVICE)
    for rounding in ("nearest", "kahan"):
        param = torch.nn.Parameter(every.clone())
        optimizer = built_of(HF, {"scale_parameter": False, "rounding": rounding}, [param])
        give(optimizer, [torch.zeros_like(param)])
        optimizer.step()
        assert torch.equal(param.detach(), every)


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    """Of a real update: never a neighbour but one, and the mean of many within five errors."""
    shape, copies = (96, 1024), 64
    start, grad = params_on_device([shape], BF16)[0], grads_on_device([shape], 0, BF16)[0]
    params = [torch.nn.Parameter(start.detach().clone()) for _ in range(copies)]
    low = built_of(HF, {"lr": 1e-3}, params, rounding="stochastic", seed=9)
    (wide,) = params_of(
        twin := built_of(HF, {"lr": 1e-3}, [torch.nn.Parameter(start.detach().float())])
    )
    give(low, [grad] * copies)
    give(twin, [grad])
    low.step()
    twin.step()
    value = wide.detach().double()
    rounded = torch.stack([p.detach().double() for p in params])
    unit = 2.0 ** (value.abs().log2().floor() - 7)
    # The twin's sums are ordered otherwise, so that a value may lie beside its own by a little.
    assert ((rounded - value).abs() <= unit * (1 + 1e-3)).all()
    off = ((rounded.mean(0) - value) / unit).mean().abs().item()
    assert off <= 5 * 0.5 / (copies * value.numel()) ** 0.5 + 1e-4
