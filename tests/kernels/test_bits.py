"""Bits: of the three roundings, for any number of threads, any company, and either way through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import joining
from fused_adafactor.rounding import RoundingKey, round_kahan, round_nearest, round_stochastic
from tests import stepping
from tests.dialects import HF, KERAS, OPTAX, Dialect
from tests.kernels.biting import RULES, draw
from tests.kernels.judged import BF16, F16, F32, F64, params_in
from tests.kernels.moments import (
    ROUNDED_RULES,
    assert_moments_of_the_reference,
    assert_moments_rounded_by_their_keys,
)
from tests.stepping import params_of, same_bits

pytestmark = pytest.mark.usefixtures("isa")

# No long lines, of which a bfloat16 parameter has more in a slab than its float32 twin.
SHAPES = [
    (7,),
    (),
    (3, 3),
    (40, 3, 3),
    (40, 5, 5),
    (33, 9),
    (17, 23),
    (40, 60),
    (257, 509),
    (9, 16, 300),
]
# Beside these: what is one item, and one more element; several slabs, of a matrix and of a stack.
SLABBED = [
    (15_003, 3, 3),
    (256, 512),
    (257, 512),
    (700, 300),
    (3, 300, 500),
    (40_000,),
    (131_073,),
    (5000, 31),
]


# --- rounding ------------------------------------------------------------------------------------


def stepped_twins(
    dialect: Dialect, dtype: torch.dtype, rounding: str, lay_out: Any, **options: Any
) -> Any:
    """Step a low-precision optimizer and its float32 twin; (index, step, p, value, lost) of each.

    The twin has the value that is rounded: it starts each step from the same numbers, and both take
    the chunks' way, for their first moment.
    """
    low, twin = (
        dialect(params_in(SHAPES, kind, lay_out), backend="cpp", **options, **extra)
        for kind, extra in ((dtype, {"rounding": rounding, "seed": 5}), (F32, {}))
    )
    lost = [torch.zeros_like(p) for p in params_of(low)]
    for step in range(2):
        with torch.no_grad():
            for p, q, c in zip(params_of(low), params_of(twin), lost, strict=True):
                q.copy_(p.float() + c.float())
        grads = draw(SHAPES, 2 * step, dtype)
        for optimizer in (low, twin):
            for p, g in zip(params_of(optimizer), grads, strict=True):
                p.grad = lay_out(g).to(p.dtype)
            optimizer.step()
        lost = [low.state[p].get("kahan", c) for p, c in zip(params_of(low), lost, strict=True)]
        for index, (p, q) in enumerate(zip(params_of(low), params_of(twin), strict=True)):
            yield index, step + 1, p.detach(), q.detach(), lost[index]


def as_it_is(values: Tensor) -> Tensor:
    return values


def turned(values: Tensor) -> Tensor:
    return stepping.transposed(values) if values.dim() > 1 else values


def gapped(values: Tensor) -> Tensor:
    return stepping.strided(values) if values.dim() else values


LAYOUTS = pytest.mark.parametrize("lay_out", [as_it_is, turned, gapped])
# No scale by RMS(p), which lacks the compensation that the twin has in its p.
CHUNKED = {"momentum": 0.9, "multiply_by_parameter_scale": False, "weight_decay_rate": 1e-3}


@LAYOUTS
def test_stochastic_rounding_is_that_function_bit_for_bit(lay_out: Any) -> None:
    for index, t, p, value, _ in stepped_twins(OPTAX, BF16, "stochastic", lay_out, **CHUNKED):
        assert same_bits(p, round_stochastic(value, BF16, RoundingKey(5, index, t)))


@LAYOUTS
def test_kahan_rounding_is_that_function_bit_for_bit(lay_out: Any) -> None:
    for _, _, p, value, lost in stepped_twins(OPTAX, BF16, "kahan", lay_out, **CHUNKED):
        rounded, compensation = round_kahan(value, BF16)
        assert same_bits(p, rounded)
        assert same_bits(lost, compensation)


@LAYOUTS
@pytest.mark.parametrize("options", [CHUNKED, {}], ids=["chunks", "lines"])
def test_nearest_rounding_is_that_function_bit_for_bit(
    lay_out: Any, options: dict[str, Any]
) -> None:
    for _, _, p, value, _ in stepped_twins(OPTAX, BF16, "nearest", lay_out, **options):
        assert same_bits(p, round_nearest(value, BF16))


# Around a power of two: where bfloat16 is subnormal, float16 is, both are normal, and at the end.
@pytest.mark.parametrize("exponent", [-130, -20, 0, 127])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("shape", [(216,), (6, 36), (24, 3, 3)], ids=str)
def test_values_that_are_hard_to_round(
    shape: tuple[int, ...], rounding: str, dtype: torch.dtype, exponent: int
) -> None:
    """Ties, what is next to them, subnormals, and what only just is or is not finite."""
    if (dtype, rounding) == (F16, "stochastic"):
        pytest.skip("float16 has no stochastic rounding")
    if (dtype, exponent) == (F16, 127):
        exponent = 15
    digits = torch.finfo(dtype).bits - {BF16: 9, F16: 6}[dtype]
    generator = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(shape, dtype=torch.float64, generator=generator)) * 2.0**exponent
    start = start.clamp(max=torch.finfo(dtype).max).to(dtype)
    # Steps of sixteenths of the last digit, up and down: u = g / sqrt(g² + 1), g far below 1.
    sixteenths = torch.arange(math.prod(shape)).reshape(shape) % 33 - 16
    step = 2.0 ** (exponent - digits)
    options: dict[str, Any] = {"lr": step * 2**6, "eps": (1.0, 1e-3), "clip_threshold": 1e30}
    low, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    for param, kwargs in ((low, {"rounding": rounding, "seed": 3}), (twin, {})):
        param.grad_dtype = None
        param.grad = sixteenths.float() * 2.0**-10
        HF([param], scale_parameter=False, beta1=0.5, backend="cpp", **options, **kwargs).step()
    value = twin.detach()
    assert (value != start.float()).any()
    if rounding == "stochastic":
        expected = round_stochastic(value, dtype, RoundingKey(3, 0, 1))
    else:
        expected = round_nearest(value, dtype)
    assert same_bits(low.detach(), expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("lines", [1, 3])
def test_every_number_is_read_and_written_as_it_is(lines: int, dtype: torch.dtype) -> None:
    """With a gradient of 0 nothing moves, subnormals least of all."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    every = every[: every.numel() // 3 * 3].reshape(lines, -1)
    for rounding in ("nearest", "kahan"):
        param = torch.nn.Parameter(every.clone())
        optimizer = HF([param], scale_parameter=False, rounding=rounding, backend="cpp")
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param.detach(), every)


# --- second moments in bfloat16 ------------------------------------------------------------------

# Of every form: elements, tiny matrices, small ones in a stack, one of a slab and of several.
MOMENT_SHAPES = [(), (7,), (1025,), (3, 3), (40, 5, 5), (33, 9), (17, 23), (9, 16, 300), (700, 300)]


@LAYOUTS
@pytest.mark.parametrize("rule", ROUNDED_RULES)
def test_second_moments_are_rounded_by_their_keys(rule: str, lay_out: Any) -> None:
    assert_moments_rounded_by_their_keys(rule, params_in(MOMENT_SHAPES, F32, lay_out), "cpp")


@pytest.mark.parametrize("extras", [{"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_second_moments_that_are_taken_late_are_rounded_by_their_keys(
    extras: dict[str, Any],
) -> None:
    """Where they follow a norm, or where a step may be skipped."""
    for rule in ("hf", "no_factors"):
        assert_moments_rounded_by_their_keys(rule, params_in(MOMENT_SHAPES, F32), "cpp", **extras)


@LAYOUTS
@pytest.mark.parametrize("rule", RULES)
def test_second_moments_are_those_of_the_reference_bit_for_bit(rule: str, lay_out: Any) -> None:
    assert_moments_of_the_reference(rule, params_in(MOMENT_SHAPES, F64, lay_out), "cpp")


# --- the same bits -------------------------------------------------------------------------------


def run(
    rule: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **extras: Any
) -> list[dict[str, Tensor]]:
    """Parameters and state after a few steps."""
    dialect, options = RULES[rule]
    optimizer = dialect(params_in(shapes, dtype), backend="cpp", **options, **extras)
    for step in range(3):
        for p, g in zip(params_of(optimizer), draw(shapes, step, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return [{"param": p.detach(), **optimizer.state[p]} for p in params_of(optimizer)]


def assert_same(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(ours, others, strict=True):
        for key, value in mine.items():
            assert same_bits(value, other[key]), (key, tuple(value.shape))


@pytest.mark.parametrize(
    ("rule", "dtype", "extras"),
    [
        *((rule, F32, {}) for rule in RULES),
        *((rule, BF16, {}) for rule in ("hf", "torch")),
        *((rule, BF16, {"state_dtype": BF16}) for rule in ("hf", "no_factors")),
    ],
    ids=str,
)
def test_bits_are_the_same_for_any_number_of_threads_and_every_time(
    rule: str, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 4, 4):
            torch.set_num_threads(threads)
            runs.append(run(rule, SHAPES + SLABBED, dtype, **extras))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert_same(runs[0], other)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "keras-everything"])
def test_a_tensor_does_not_feel_what_is_stepped_with_it(rule: str) -> None:
    """Alone, before and after others, and next to what takes over its scratch memory."""
    shapes = SHAPES + SLABBED
    together = run(rule, shapes, F32)
    dialect, options = RULES[rule]
    drawn = [draw(shapes, step, F32) for step in range(3)]
    for number, start in enumerate(params_in(shapes, F32)):
        optimizer = dialect([start], backend="cpp", **options)
        for grads in drawn:
            start.grad = grads[number]
            optimizer.step()
        assert_same([together[number]], [{"param": start.detach(), **optimizer.state[start]}])


def assert_same_both_ways(
    shape: tuple[int, ...], dtype: torch.dtype = F32, small: int = 0, **options: Any
) -> None:
    """An average of the weights sends a tensor through the way for every rule; it changes none.

    Args:
        shape: Of the parameter.
        dtype: Of it and of its gradient.
        small: So many elements of each gradient, from the first on, have squares near 0.
        options: Of both optimizers.
    """
    built = [
        KERAS(params_in([shape], dtype), backend="cpp", use_ema=average, **options)
        for average in (False, True)
    ]
    for step in range(2):
        for optimizer in built:
            (param,) = params_of(optimizer)
            (param.grad,) = draw([shape], step, dtype)
            param.grad.view(-1)[:small] = 1e-25
            optimizer.step()
    assert same_bits(*(params_of(optimizer)[0].detach() for optimizer in built))


@pytest.mark.parametrize("shape", [*SHAPES, *SLABBED, (999, 33), (40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_both_ways_to_write_a_parameter_have_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for decay in (None, 0.125):
        assert_same_both_ways(shape, dtype, weight_decay=decay)


@pytest.mark.parametrize("shape", [(40, 3, 3), (6, 5, 5), (300,), (33, 40)], ids=str)
def test_a_scale_and_a_factor_are_one_number_both_ways(shape: tuple[int, ...]) -> None:
    assert_same_both_ways(shape, loss_scale_factor=3.0, clipnorm=0.5)


@pytest.mark.parametrize("shape", [(40, 3, 3), (6, 5, 5), (300,), (999, 9)], ids=str)
def test_what_is_extreme_does_not_touch_the_bits_of_its_neighbours(
    shape: tuple[int, ...],
) -> None:
    """Roots of such second moments are taken in another way, whatever else a vector holds."""
    assert_same_both_ways(shape, small=math.prod(shape[1:]), epsilon_1=1e-38)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=str)
def test_a_pause_between_the_sweeps_changes_no_bit(
    state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be known of all tensors parts the phases, and what is one item otherwise."""
    rules = ["hf", "optax-momentum", "no_factors"]
    for rule in rules:
        shapes = SHAPES + SLABBED
        whole = run(rule, shapes, F32, state_dtype=state_dtype)
        with monkeypatch.context() as patch:
            patch.setattr(joining, "_skips_together", lambda rule: True)
            parted = run(rule, shapes, F32, state_dtype=state_dtype)
        for mine, other in zip(whole, parted, strict=True):
            assert same_bits(mine["param"], other["param"]), (rule, tuple(mine["param"].shape))
