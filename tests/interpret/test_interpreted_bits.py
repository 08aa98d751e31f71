"""Bits: of the roundings, in both launch forms, for any number of programs and in any company."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fused_adafactor import in_backward, joining
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from fused_adafactor.rounding import RoundingKey, round_kahan, round_nearest, round_stochastic
from tests.dialects import HF, KERAS
from tests.interpret.small import (
    BACKEND,
    FEW,
    SMALL,
    SOME,
    assert_same,
    built,
    of_triton,
    results,
    run,
    use,
)
from tests.kernels.biting import EVERY_RULE, RULES, draw
from tests.kernels.judged import BF16, F16, F32, F64, params_in
from tests.kernels.moments import (
    ROUNDED_RULES,
    assert_moments_of_the_reference,
    assert_moments_rounded_by_their_keys,
)
from tests.stepping import contiguous, misaligned, params_of, same_bits, strided, transposed

# --- rounding ------------------------------------------------------------------------------------

ROUNDINGS = ("nearest", "stochastic", "kahan")
# One that is aligned, and one that is a line of blocks, among those that are not.
ROUNDED = [(3, 3), (10, 13), (16, 16), (2, 272), (3, 9, 9), (1031,)]


@pytest.mark.parametrize(
    ("rounding", "dtype", "lay_out"),
    [
        *((r, BF16, how) for r in ROUNDINGS for how in (contiguous, transposed, strided)),
        ("nearest", F16, contiguous),
        ("kahan", F16, contiguous),
        ("stochastic", BF16, misaligned),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rounding_is_that_function_bit_for_bit(
    rounding: str, dtype: torch.dtype, lay_out: Any
) -> None:
    """The float32 twin, from the same numbers, has the value that is rounded.

    It is stepped by the same backend, and nothing is measured of a parameter, so that no sum
    differs. What Kahan's summation has kept is in the twin's start.
    """
    shapes = [s for s in ROUNDED if len(s) > 1] if lay_out is transposed else ROUNDED
    options: dict[str, Any] = {"lr": 2.0**-6, "scale_parameter": False, "weight_decay": 0.1}
    extras: dict[str, Any] = {} if rounding == "nearest" else {"rounding": rounding, "seed": 5}
    low = HF(params_in(shapes, dtype, lay_out), backend=BACKEND, **options, **extras)
    twin = HF(params_in(shapes, F32, lay_out), backend=BACKEND, **options)
    lost = [torch.zeros_like(p) for p in params_of(low)]
    for step in range(2):
        with torch.no_grad():
            for p, q, c in zip(params_of(low), params_of(twin), lost, strict=True):
                q.copy_(p.float() + c.float())
        grads = draw(shapes, 2 * step, dtype)
        for optimizer in (low, twin):
            for p, g in zip(params_of(optimizer), grads, strict=True):
                p.grad = lay_out(g).to(p.dtype)
            optimizer.step()
        for index, (p, q) in enumerate(zip(params_of(low), params_of(twin), strict=True)):
            value = q.detach()
            if rounding == "stochastic":
                expected = round_stochastic(value, dtype, RoundingKey(5, index, step + 1))
            elif rounding == "kahan":
                expected, compensation = round_kahan(value, dtype)
                lost[index] = low.state[p]["kahan"]
                assert same_bits(lost[index], compensation), (step, tuple(p.shape))
            else:
                expected = round_nearest(value, dtype)
            assert same_bits(p.detach(), expected), (step, tuple(p.shape))


def test_an_average_that_overwrites_a_parameter_takes_its_compensation_with_it() -> None:
    """What rounding lost belongs to the value that is gone."""
    params = params_in(FEW, BF16)
    optimizer = KERAS(
        params, backend=BACKEND, rounding="kahan", use_ema=True, ema_overwrite_frequency=2
    )
    for step in range(2):
        for p, g in zip(params, draw(FEW, step, BF16), strict=True):
            p.grad = g
        optimizer.step()
        for p in params:
            assert bool(optimizer.state[p]["kahan"].any()) == (step == 0), tuple(p.shape)


# Triton's interpreter itself reads subnormal bfloat16 numbers as others, which a GPU does not:
# tests/gpu has them. Around a power of two: where float16 is subnormal, where both are normal, and
# at the end.
@pytest.mark.parametrize("exponent", [-20, 0, 127])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_values_that_are_hard_to_round(rounding: str, dtype: torch.dtype, exponent: int) -> None:
    """Ties, what is next to them, subnormals, and what only just is or is not finite."""
    if (dtype, rounding) == (F16, "stochastic"):
        pytest.skip("float16 has no stochastic rounding")
    if (dtype, exponent) == (F16, 127):
        exponent = 15
    digits = torch.finfo(dtype).bits - {BF16: 9, F16: 6}[dtype]
    for shape in ((216,), (6, 36), (24, 3, 3)):
        generator = torch.Generator().manual_seed(0)
        start = (1 + torch.rand(shape, dtype=F64, generator=generator)) * 2.0**exponent
        start = start.clamp(max=torch.finfo(dtype).max).to(dtype)
        # Steps of sixteenths of the last digit, up and down: u = g / sqrt(g² + 1), g far below 1.
        sixteenths = torch.arange(math.prod(shape)).reshape(shape) % 33 - 16
        step = 2.0 ** (exponent - digits)
        options: dict[str, Any] = {"lr": step * 2**6, "eps": (1.0, 1e-3), "clip_threshold": 1e30}
        low, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
        for param, kwargs in ((low, {"rounding": rounding, "seed": 3}), (twin, {})):
            param.grad_dtype = None
            param.grad = sixteenths.float() * 2.0**-10
            HF([param], scale_parameter=False, backend=BACKEND, **options, **kwargs).step()
        value = twin.detach()
        assert (value != start.float()).any()
        if rounding == "stochastic":
            expected = round_stochastic(value, dtype, RoundingKey(3, 0, 1))
        else:
            expected = round_nearest(value, dtype)
        assert same_bits(low.detach(), expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("lines", [1, 3])
def test_numbers_of_every_kind_are_read_and_written_as_they_are(
    lines: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gradient of 0 nothing moves, subnormals of float16 least of all."""
    cut = replace(SMALL.cut, slab_elements=2**16, free_line=2**14)
    use(
        monkeypatch,
        replace(SMALL, cut=cut, tile=2**14, widest=2**14, chunk=2**13, flat_tile=2**14, span=2**13),
    )
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()][::9]
    if dtype is BF16:
        every = every[every.abs() >= torch.finfo(BF16).smallest_normal]
    every = every[: every.numel() // 3 * 3].reshape(lines, -1)
    for rounding in ("nearest", "kahan"):
        param = torch.nn.Parameter(every.clone())
        param.grad = torch.zeros_like(param)
        HF([param], scale_parameter=False, rounding=rounding, backend=BACKEND).step()
        assert torch.equal(param.detach(), every)


# --- second moments in bfloat16 ------------------------------------------------------------------

# Of every form: elements, tiny matrices, lines, chunked ones, several slabs; aligned, and not.
MOMENT_SHAPES = [(7,), (2050,), (3, 3), (30, 5, 5), (9, 13), (5, 257), (2, 9, 70), (16, 16)]


@pytest.mark.parametrize("rule", ROUNDED_RULES)
@pytest.mark.usefixtures("launch")
def test_second_moments_are_rounded_by_their_keys(rule: str) -> None:
    assert_moments_rounded_by_their_keys(rule, params_in(MOMENT_SHAPES, F32), BACKEND)


@pytest.mark.parametrize("lay_out", [transposed, strided, misaligned])
@pytest.mark.parametrize("rule", ["hf", "no_factors"])
def test_second_moments_of_any_layout_are_rounded_by_their_keys(rule: str, lay_out: Any) -> None:
    shapes = [s for s in MOMENT_SHAPES if len(s) > 1] if lay_out is transposed else MOMENT_SHAPES
    assert_moments_rounded_by_their_keys(rule, params_in(shapes, F32, lay_out), BACKEND)


@pytest.mark.parametrize("extras", [{"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("rule", ["hf", "no_factors"])
def test_second_moments_that_are_taken_late_are_rounded_by_their_keys(
    rule: str, extras: dict[str, Any]
) -> None:
    """Where they follow a norm, or where a step may be skipped."""
    assert_moments_rounded_by_their_keys(rule, params_in(MOMENT_SHAPES, F32), BACKEND, **extras)


@EVERY_RULE
def test_second_moments_are_those_of_the_reference_bit_for_bit(rule: str) -> None:
    assert_moments_of_the_reference(rule, params_in(MOMENT_SHAPES, F64), BACKEND)


@pytest.mark.parametrize("lay_out", [transposed, strided])
def test_second_moments_of_any_layout_are_those_of_the_reference(lay_out: Any) -> None:
    shapes = [s for s in MOMENT_SHAPES if len(s) > 1]
    assert_moments_of_the_reference("hf", params_in(shapes, F64, lay_out), BACKEND)


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtype", "extras"),
    [
        *((rule, F32, {}) for rule in RULES),
        *((rule, BF16, {"rounding": "stochastic"}) for rule in ("hf", "torch")),
        *((rule, F32, {"state_dtype": BF16}) for rule in ("hf", "no_factors")),
    ],
    ids=str,
)
def test_both_launch_forms_have_the_same_bits(
    rule: str, dtype: torch.dtype, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for form in LAUNCHES:
        monkeypatch.setenv(LAUNCH_ENVIRONMENT, form)
        runs.append(run(rule, SOME, dtype, **extras))
    assert_same(*runs)


def test_any_number_of_programs_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that find no ticket left leave, and the last of all sets the counters back."""
    runs = []
    for programs in (1, 3):
        use(monkeypatch, replace(SMALL, programs_per_processor=programs))
        runs.append(run("hf", SOME, F32))
    assert_same(*runs)


@EVERY_RULE
def test_a_tensor_does_not_feel_what_is_stepped_with_it(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among others, next to what takes over its scratch memory, or alone, launched otherwise."""
    if rule == "keras-everything":
        pytest.skip("it clips by the norm of all gradients")
    together = run(rule, SOME, F32)
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, "phases")
    for number, start in enumerate(params_in(SOME, F32)):
        optimizer = built(rule, [start])
        for step in range(2):
            start.grad = draw(SOME, step, F32)[number]
            optimizer.step()
        assert_same([together[number]], results(optimizer))


@pytest.mark.parametrize("rule", ["hf", "optax-momentum"])
def test_steps_in_the_backward_pass_have_the_bits_of_step(
    rule: str, launch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tensors by themselves, some together."""
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 2048)
    together = run(rule, SOME, BF16, rounding="stochastic")
    optimizer = built(rule, params_in(SOME, BF16), rounding="stochastic")
    optimizer.enable_backward_step()
    for step in range(2):
        grads = draw(SOME, step, BF16)
        terms = [(p * g).sum() for p, g in zip(params_of(optimizer), grads, strict=True)]
        torch.stack(terms).sum().backward()
        assert all(p.grad is None for p in params_of(optimizer))
        optimizer.step()
    assert 1 < len(optimizer._partial_steps) < len(SOME)
    assert_same(together, results(optimizer))


def test_a_compiled_step_is_not_looked_into() -> None:
    """Not even to the launch of a kernel, which the compiler knows how to trace."""
    eager = run("hf", FEW, F32)
    optimizer = built("hf", params_in(FEW, F32))
    compiled = torch.compile(optimizer.step, backend="eager")
    counters.clear()
    for step in range(2):
        for p, g in zip(params_of(optimizer), draw(FEW, step, F32), strict=True):
            p.grad = g
        compiled()
    assert_same(eager, results(optimizer))
    (reason,) = counters["graph_break"]
    assert reason.startswith("Skip calling `torch.compiler.disable()`d function")
    assert counters["frames"]["total"] == 1


def test_bits_do_not_depend_on_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wave for all tensors, one for each, and places in the scratch that many waves share."""
    runs = []
    for wave_bytes in (1, 4096, 2**30):
        use(monkeypatch, replace(SMALL, wave_bytes=wave_bytes))
        runs.append(run("hf", [*SOME, *reversed(FEW)], F32))
    for other in runs[1:]:
        assert_same(runs[0], other)


def test_a_pause_between_the_sweeps_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be known of all tensors parts the phases, and what is one item otherwise."""
    for rule, kept in (("hf", F32), ("hf", BF16), ("optax-momentum", F32), ("no_factors", F32)):
        whole = run(rule, FEW, F32, state_dtype=kept)
        with monkeypatch.context() as patch:
            patch.setattr(joining, "_skips_together", lambda rule: True)
            parted = run(rule, FEW, F32, state_dtype=kept)
        for mine, other in zip(whole, parted, strict=True):
            assert same_bits(mine["param"], other["param"]), (rule, tuple(mine["param"].shape))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_average_of_the_weights_changes_none_of_them(dtype: torch.dtype) -> None:
    runs = []
    for average in (False, True):
        optimizer = KERAS(params_in(FEW, dtype), backend=BACKEND, use_ema=average)
        for step in range(2):
            for p, g in zip(params_of(optimizer), draw(FEW, step, dtype), strict=True):
                p.grad = g
            optimizer.step()
        runs.append(params_of(optimizer))
    for mine, other in zip(*runs, strict=True):
        assert same_bits(mine.detach(), other.detach())


def test_gradients_that_move_to_another_address_change_no_bit() -> None:
    """What is told the compiler of an aligned gradient does not change what is computed."""
    shapes = [(16, 16), (10, 32), (2, 16, 32), (5, 272), (64,)]
    dialect, options = RULES["hf"]
    runs = []
    for lay_out in (contiguous, misaligned):
        optimizer: Any = dialect(
            params_in(shapes, BF16), backend=BACKEND, rounding="stochastic", **options
        )
        for step in range(2):
            for p, g in zip(params_of(optimizer), draw(shapes, step, BF16), strict=True):
                p.grad = lay_out(g)
            optimizer.step()
        runs.append(results(optimizer))
    assert_same(*runs)


@of_triton
def test_the_compiler_is_told_of_an_alignment_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter does not care, but a GPU must not be promised what does not hold."""
    told: list[bool] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Any:
            return record

    def record(*args: Any, **_: Any) -> None:
        (aligned,) = (v.ALIGNED for v in args if isinstance(v, Variant))
        told.append(aligned)
        addresses = args[3]
        assert not aligned or (addresses % 16 == 0).all()

    variants = importlib.import_module("fused_adafactor.backends.triton.variants")
    Variant = variants.Variant
    monkeypatch.setattr("fused_adafactor.backends.triton.launcher.step", Recorder())
    for shape, lay_param, expected in (
        ((16, 16), contiguous, [True, True, True]),
        ((16, 16), misaligned, [False, False, False]),
        ((16, 16), strided, [False, False, False]),
        ((16, 17), contiguous, [False, False, False]),
        ((17, 16), contiguous, [True, True, True]),
    ):
        told.clear()
        (param,) = params_in([shape], F32, lay_param)
        optimizer = HF([param], backend=BACKEND)
        for lay_grad in (contiguous, misaligned, contiguous):
            param.grad = lay_grad(torch.ones(shape))
            optimizer.step()
        assert told == expected, (shape, lay_param)


@of_triton
def test_a_kernel_that_cannot_be_compiled_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two dtypes are two launches, and the first must not have run when the second fails."""
    launcher = importlib.import_module("fused_adafactor.backends.triton.launcher")
    compiled: list[object] = []

    def compile_one(kernel: object, *_: object) -> None:
        compiled.append(kernel)
        if len(compiled) == 2:
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(launcher.TritonKernel, "compile", compile_one)
    params = [*params_in([(16, 16)], F32), *params_in([(16, 16)], BF16)]
    optimizer = HF(params, backend=BACKEND)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        optimizer.step()
    assert all(map(same_bits, params, before))


def test_autograd_sees_that_the_parameter_changed() -> None:
    (param,) = params_in([(3, 4)], F32)
    loss = (param * param).sum()
    optimizer = HF([param], backend=BACKEND)
    param.grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_byte_beside_a_tensor_is_written() -> None:
    """Parameter and state lie between guards."""
    guards: list[tuple[Tensor, Tensor]] = []

    def guarded(values: Tensor) -> Tensor:
        storage = torch.full((values.numel() + 64,), 7.0, dtype=values.dtype)
        inside = storage[32:-32].view(values.shape).copy_(values)
        guards.append((storage, inside))
        return inside

    for rule in ("hf-momentum", "adafactor_pytorch-amsgrad"):
        guards.clear()
        params = params_in(FEW, F32, guarded)
        optimizer = built(rule, params)
        for step in range(2):
            for p, g in zip(params, draw(FEW, step, F32), strict=True):
                p.grad = g
            optimizer.step()
            if step:
                continue
            for p in params:
                for key, value in optimizer.state[p].items():
                    if torch.is_tensor(value) and value.dim():
                        optimizer.state[p][key] = guarded(value)
        for storage, inside in guards:
            edges = torch.cat([storage[:32], storage[-32:]])
            assert (edges == 7.0).all(), (rule, tuple(inside.shape))
