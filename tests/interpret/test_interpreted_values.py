"""Steps in Triton's interpreter against the reference in float64, one step at a time."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import fields
from tests import stepping
from tests.dialects import HF, KERAS, KERAS_EXTRAS, OPTAX, TORCH, VARIANTS, Dialect
from tests.interpret.small import BACKEND, FEW, MIXED, SMALL, built, judged, judged_of, use
from tests.kernels.biting import EVERY_RULE, RULES, conditioning, draw
from tests.kernels.judged import BF16, F16, F32, F64, eps_of, params_in
from tests.stepping import LAYOUTS, assert_close_metrics, params_of


@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
def test_every_variant_of_every_dialect(dialect: Dialect, variant: str) -> None:
    """Averages, accumulation, schedules and every kind of clipping; a row of zeros on the way."""
    options = dict(dialect.variants[variant])
    if dialect is TORCH and "eps" not in options:
        options |= eps_of(F32)
    pair = judged_of(dialect, params_in(MIXED, F32), **options)
    pair.normwise = dialect.name in ("adafactor_pytorch", "big_vision") or "momentum" in variant
    for step in range(4 if variant in ("accumulation", "average") else 2):
        pair.step(draw(MIXED, step % 3, F32))


# One of each place that momentum has, AMSGrad, torch's clamp, and counts of both kinds.
RULES_OF_DIALECTS = (
    *("torch", "hf-momentum", "adafactor_pytorch-amsgrad", "optax-momentum", "big_vision"),
)


@pytest.mark.parametrize("rule", RULES_OF_DIALECTS)
@pytest.mark.parametrize("extra", KERAS_EXTRAS)
def test_keras_extras_under_every_dialect(rule: str, extra: str) -> None:
    pair = judged(rule, params_in(FEW, F32), **KERAS_EXTRAS[extra])
    pair.normwise = rule != "torch"
    for step in range(4 if extra in ("accumulation", "average") else 2):
        pair.step(draw(FEW, step, F32))


@pytest.mark.parametrize("rule", ["torch", "hf", "hf-momentum", "adafactor_pytorch-amsgrad"])
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5}], ids=["alone", "joined"])
def test_metrics(rule: str, extras: dict[str, Any]) -> None:
    pair = judged(rule, params_in(MIXED, F32), **extras)
    for step in range(2):
        pair.step(draw(MIXED, step, F32))
    metrics = pair.judge.metrics()
    assert len(metrics) == len(MIXED)
    assert_close_metrics(pair.ours.metrics(), metrics, 1e-5)
    if extras:
        assert float(pair.ours.grad_norm) == pytest.approx(float(pair.judge.grad_norm), rel=1e-6)


# By the sizes of ``small.py``; a matrix of 64 elements is tiny, one of 128 is one ticket.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty_and_scalars": [(), (1,), (0,), (0, 4), (3, 0), (2, 0, 3), (1, 1), (1, 1, 1)],
    "lines": [(2,), (511,), (1023,), (1024,), (1031,), (2049,), (1, 9), (9, 1), (1, 70), (70, 1)],
    "long_lines": [(1, 300), (300, 1), (1, 1200), (1200, 1)],
    "tiny": [(2, 2), (2, 3), (3, 2), (7, 9), (8, 8), (4, 16), (64, 1), (5, 1, 1), (37, 2, 3)],
    "tiny_slabs": [(19, 8, 3, 3), (7, 7, 7), (20, 8, 8), (257, 2, 2)],
    "past_tiny": [(5, 13), (8, 9), (13, 8, 9), (3, 1, 65), (3, 65, 1)],
    "primes": [(31,), (7, 13), (97, 2), (3, 11, 7), (17, 23), (31, 37), (2, 3, 5, 7)],
    "one_past": [(15, 17), (17, 15), (5, 33), (5, 65), (9, 129), (3, 257), (5, 256)],
    "narrow": [(700, 5), (333, 8), (300, 16), (200, 24), (150, 33), (99, 48), (70, 63), (70, 65)],
    "whole_or_slabs": [(8, 16), (129,), (3, 43), (4, 128), (5, 128), (33, 16), (32, 16)],
    "chunks": [(2, 257), (5, 385), (2, 3, 300)],
    "stacks": [(9, 4, 17), (3, 4, 7, 11), (2, 17, 16), (2, 9, 70), (33, 1, 65)],
    "many_dims": [(2, 3, 5, 2, 3), (3, 1, 4, 1, 5), (5, 4, 3, 2, 1), (2, 1, 13, 2, 9)],
}


@pytest.mark.parametrize("rule", ["hf", "torch"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_shape(rule: str, shapes: list[tuple[int, ...]]) -> None:
    pair = judged(rule, params_in(shapes, F32))
    for step in range(2):
        pair.step(draw(shapes, 2 * step, F32))


def test_more_pieces_than_are_added_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs, parts and matrices, more than 32 of each."""
    cut = replace(SMALL.cut, slab_elements=9, slab_lines=1, most_slabs=64, merge_columns=16)
    use(monkeypatch, replace(SMALL, cut=cut))
    shapes = [(40, 9), (2, 530), (34, 5, 13)]
    for rule in ("hf", "torch"):
        judged(rule, params_in(shapes, F32)).step(draw(shapes, 0, F32))


DTYPES = (F32, BF16, F16, F64)


@pytest.mark.parametrize(
    ("rule", "dtype", "grad_dtype"),
    [
        *(("hf-momentum", dtype, grad_dtype) for dtype in DTYPES for grad_dtype in DTYPES),
        *(("hf", dtype, dtype) for dtype in DTYPES),
        *(("adafactor_pytorch-amsgrad", dtype, dtype) for dtype in (BF16, F64)),
    ],
    ids=str,
)
def test_every_dtype_with_every_gradient(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    pair = judged(rule, params_in(FEW, dtype))
    for step in range(2):
        pair.step(draw(FEW, step, grad_dtype))


def test_tensors_of_all_dtypes_step_together() -> None:
    params = [p for dtype in DTYPES for p in params_in(FEW, dtype)]
    judged_of(HF, params).step([g for dtype in DTYPES for g in draw(FEW, 0, dtype)])


# --- layouts -------------------------------------------------------------------------------------


# One rule and dtype for every layout, and the others in turn.
OTHERS = [("no_factors", F32), ("hf-momentum", BF16), ("adafactor_pytorch-amsgrad", F32)]


@pytest.mark.parametrize(
    ("layout", "rule", "dtype"),
    [
        *((layout, "hf", F32) for layout in LAYOUTS),
        *((layout, *OTHERS[place % 3]) for place, layout in enumerate(LAYOUTS)),
    ],
    ids=str,
)
def test_every_layout(layout: str, rule: str, dtype: torch.dtype) -> None:
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (1, 5, 7, 3), (1, 2, 10, 13), (1, 1, 3, 270), (1, 2, 16, 32)]
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
def test_dimensions_in_any_order(permutation: tuple[int, ...]) -> None:
    def permuted(values: Tensor) -> Tensor:
        inverse = sorted(range(4), key=lambda d: permutation[d])
        return values.permute(permutation).contiguous().permute(inverse)

    shapes = [(4, 6, 3, 2), (3, 5, 10, 7)]
    for rule in ("hf", "optax-momentum"):
        pair = judged(rule, params_in(shapes, F32, permuted))
        for step in range(2):
            pair.step([permuted(g) for g in draw(shapes, 2 * step, F32)])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_in_a_flat_buffer_at_any_offset(dtype: torch.dtype) -> None:
    """As FSDP and DDP lay them out; in one step aligned, in the next one not, and back."""
    shapes = [(7,), (16, 16), (3, 3), (10, 32), (64,), (2, 16, 32), (5, 272)]
    pair = judged("hf", params_in(shapes, dtype))
    for step, offset in enumerate((0, 3, 8)):
        drawn = draw(shapes, step % 2, dtype)
        sizes = [g.numel() + (-g.numel() % 16 if offset == 0 else 0) for g in drawn]
        flat = torch.full((sum(sizes) + offset,), math.nan, dtype=dtype)
        grads = []
        for g, piece in zip(drawn, flat[offset:].split(sizes), strict=True):
            grads.append(piece[: g.numel()].view(g.shape).copy_(g))
        pair.step(grads)


def test_gradients_that_are_negated_when_they_are_read() -> None:
    pair = judged("hf-momentum", params_in(FEW, F32))
    for step in range(2):
        grads = draw(FEW, 2 * step, F32)
        if step:
            grads = [torch.complex(g, -g).conj().imag for g in grads]
            assert all(g.is_neg() for g in grads)
        pair.step(grads)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["hf", "torch", "adafactor_pytorch-amsgrad", "optax-momentum"])
def test_experts_of_very_different_gradients(rule: str) -> None:
    """Every element is held to its own size, so a slice at 1e-5 is as exact as its neighbours."""
    shapes = [(6, 8, 6), (4, 10, 13), (3, 17, 33), (4, 4, 270)]
    pair = judged(rule, params_in(shapes, F32))
    for step in range(2):
        grads = draw(shapes, 2 * step, F32)
        for g in grads:
            g[::2] *= 1e-5
        pair.step(grads)


@pytest.mark.parametrize("zeros", ["all", "rows", "columns", "matrices"])
@pytest.mark.parametrize("rule", ["hf", "torch", "no_factors"])
def test_zeros(rule: str, zeros: str) -> None:
    """From the first step on, and after steps that had none."""
    for start in (0, 1):
        pair = judged(rule, params_in(FEW, F32))
        for step in range(start, 2):
            grads = [g.abs() + 0.1 for g in draw(FEW, 0, F32)]
            for g in grads if step else []:
                if zeros == "all":
                    g.zero_()
                elif zeros == "rows" and g.dim() > 1:
                    g[..., ::2, :] = 0.0
                elif zeros == "columns":
                    g[..., 1::3] = 0.0
                elif zeros == "matrices" and g.dim() > 2:
                    g[1:3] = 0.0
            pair.step(grads)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e12, 1e17])
@pytest.mark.parametrize("rule", ["hf", "torch", "optax-momentum", "no_factors"])
def test_gradients_of_any_scale(rule: str, scale: float) -> None:
    """At 1e-20 the paper's eps1 is all there is; at 1e17 the squares of a line still sum up."""
    pair = judged(rule, params_in(FEW, F32))
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, dtype=F64, generator=generator) for shape in FEW]
        pair.step([(g * scale).to(F32) for g in drawn])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_parameters_of_any_scale(scale: float) -> None:
    for rule in ("hf", "torch"):
        params = [torch.nn.Parameter((p * scale).detach()) for p in params_in(FEW, F32)]
        judged(rule, params).step(draw(FEW, 0, F32))


@pytest.mark.parametrize(
    ("rule", "poison"), list(zip(RULES, itertools.cycle([math.nan, -math.inf]), strict=False))
)
def test_poison_spreads_as_in_the_reference(rule: str, poison: float) -> None:
    """Parameter and state are poisoned exactly where those of the reference are."""
    dialect, options = RULES[rule]
    runs = []
    for name in (BACKEND, "reference"):
        optimizer = dialect(params_in(FEW, F32), backend=name, **options)
        for step in (0, 2):
            for p, g in zip(params_of(optimizer), draw(FEW, step, F32), strict=True):
                p.grad = g
                if step:
                    p.grad.view(-1)[p.numel() // 2] = poison
            optimizer.step()
        runs.append(optimizer)
    for ours, wanted in zip(*map(params_of, runs), strict=True):
        entries = {"param": (ours.detach(), wanted.detach())}
        for key, value in runs[1].state[wanted].items():
            entries[key] = (torch.as_tensor(runs[0].state[ours][key]), torch.as_tensor(value))
        for key, (mine, other) in entries.items():
            for kind in (Tensor.isnan, Tensor.isinf):
                differs = int((kind(mine) != kind(other)).sum())
                assert not differs, (key, kind, tuple(wanted.shape), differs)


# --- the clamp -----------------------------------------------------------------------------------


def spread_out(shapes: list[tuple[int, ...]], decades: float) -> list[Tensor]:
    """Rows and columns of scales that lie so many decades apart, in float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for shape in shapes:
        g = torch.randn(shape, dtype=F64, generator=generator)
        for dim in range(max(0, len(shape) - 2), len(shape)):
            sizes = [1] * len(shape)
            sizes[dim] = shape[dim]
            g *= 10 ** (decades * (torch.rand(sizes, dtype=F64, generator=generator) - 0.5))
        drawn.append(g)
    return drawn


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0], ids="decades{}".format)
def test_the_clamp_wherever_it_reaches(dtype: torch.dtype, spread: float) -> None:
    """No element, some of some lines, all of some, some of every line, all of every line."""
    shapes = [(7,), (3, 3), (10, 13), (5, 270), (3, 9, 9)]
    smallest = torch.finfo(dtype).eps if dtype is not F64 else 1e-7
    for size in (1e-3, 0.1, 1.0, 10.0, 1e4):
        pair = judged_of(TORCH, params_in(shapes, dtype), **eps_of(dtype, smallest))
        slack = functools.partial(conditioning, pair, eps1=smallest)
        drawn = spread_out(shapes, spread)
        grads = [(g * size * smallest).clamp(-6e4, 6e4).to(dtype) for g in drawn]  # float16's range
        pair.step(grads, slack=slack)


def test_the_clamp_reaches_as_far_as_the_test_above_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of a matrix occurs, so that each of their ways to Σ u² has been compared."""
    executors: list[Any] = []
    module = importlib.import_module(f"fused_adafactor.backends.{BACKEND}")
    bind = module.bind
    monkeypatch.setattr(
        module, "bind", lambda *args: executors.append(bind(*args)) or executors[-1]
    )
    for spread in (0.0, 3.0, 6.0):
        for size in (1e-3, 0.1, 1.0, 10.0, 1e4):
            pair = judged_of(TORCH, params_in([(3, 10, 13)], F32), **eps_of(F32))
            pair.ours.param_groups[0]["params"][0].grad = (
                spread_out([(3, 10, 13)], spread)[0].float().mul(size * torch.finfo(F32).eps)
            )
            pair.ours.step()
    classes = set()
    for executor in executors:
        place = int(executor.table[0, fields.MATRICES])
        records = executor.scratch[place:].view(F64)[: 3 * fields.MATRIX_FIELDS].view(3, -1)
        classes |= set(records[:, fields.MATRIX_CLAMP].tolist())
    assert classes == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("dialect", [TORCH, HF], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-21, 3e-20, 1e-10, 1e-5])
def test_a_row_or_a_block_next_to_nothing_does_not_stop_the_others(
    dialect: Dialect, scale: float
) -> None:
    """Its second moment is below the normal numbers, and what is divided by it beyond all range.

    Without the clamp such a block counts for more than the rest, by powers of ten.
    """
    drawn = spread_out([(20, 40), (20, 40)], 0.0)
    row = drawn[0].sign() * (1 + drawn[1].abs())
    row[3] *= scale
    block = drawn[0].clone()
    block[:10, 20:] = block[10:, :20] = 0.0
    block[10:] *= scale
    for grad in (row.float(), block.float()):
        moves = []
        for name in (BACKEND, "reference"):
            (param,) = params_in([(20, 40)], F32)
            before = param.detach().clone()
            param.grad = grad.clone()
            dialect([param], backend=name).step()
            moves.append(param.detach() - before)
        # Twelve operations on an element and sums of squares in another order, on a whole tensor.
        error = torch.linalg.vector_norm(moves[0] - moves[1])
        assert error <= 1e-4 * torch.linalg.vector_norm(moves[1])


# --- clipping, skipping --------------------------------------------------------------------------


@EVERY_RULE
def test_max_grad_norm(rule: str, launch: str) -> None:
    if rule.startswith("keras"):
        pytest.skip("keras takes one kind of clipping")
    max_norm = 1e-3 if launch == "persistent" else 1e3
    pair = judged(rule, params_in(FEW, F32), max_grad_norm=max_norm)
    for step in range(2):
        pair.step(draw(FEW, 2 * step, F32))


@EVERY_RULE
def test_skip_writes_nothing(rule: str, launch: str) -> None:
    shapes = [(7,), (3, 3), (10, 13)]
    poison = math.nan if launch == "persistent" else math.inf
    optimizer = built(rule, params_in(shapes, BF16), nonfinite="skip")
    for step in (0, 2):
        for p, g in zip(params_of(optimizer), draw(shapes, step, BF16), strict=True):
            p.grad = g
            if step:
                p.grad.view(-1)[-1] = poison
        if step == 0:
            optimizer.step()
    with stepping.assert_untouched(optimizer):
        optimizer.step()


def test_one_that_is_not_finite_is_skipped_and_the_others_go_on() -> None:
    pair = judged("hf", params_in(FEW, F32), nonfinite="skip")
    pair.step(draw(FEW, 0, F32))
    grads = draw(FEW, 2, F32)
    grads[2].view(-1)[3] = math.nan
    pair.step(grads)


def test_a_loss_scale_is_divided_out() -> None:
    """By a power of two, so exactly."""
    cases: list[tuple[Dialect, dict[str, Any]]] = [
        (HF, {}),
        (OPTAX, {"momentum": 0.9}),
        (KERAS, {"clipnorm": 0.5}),
    ]
    for dialect, options in cases:
        runs = []
        for scale in (1.0, 1024.0):
            optimizer: Any = dialect(params_in(FEW, F32), fused=True, backend=BACKEND, **options)
            for p, g in zip(params_of(optimizer), draw(FEW, 0, F32), strict=True):
                p.grad = g * scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
            runs.append(optimizer)
        for p, q in zip(*map(params_of, runs), strict=True):
            assert stepping.same_bits(p, q)


def test_found_inf_leaves_everything_as_it_is() -> None:
    optimizer = built("hf-momentum", params_in(FEW, F32), fused=True)
    for found in (0.0, 1.0):
        for p, g in zip(params_of(optimizer), draw(FEW, 0, F32), strict=True):
            p.grad = g
        optimizer.found_inf = torch.tensor(found)
        if not found:
            optimizer.step()
            continue
        with stepping.assert_untouched(optimizer):
            optimizer.step()


def test_tensors_without_gradients_are_left_out() -> None:
    pair = judged("hf", params_in(FEW, F32))
    for step in range(3):
        grads: list[Tensor | None] = [
            None if (number + step) % 3 == 0 else g for number, g in enumerate(draw(FEW, step, F32))
        ]
        if step == 0:
            grads = list(draw(FEW, step, F32))
        pair.step(grads)


@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "no_factors"])
def test_low_precision_second_moments(rule: str) -> None:
    pair = judged(rule, params_in(FEW, BF16), state_dtype=BF16)
    for step in range(2):
        pair.step(draw(FEW, 2 * step, BF16))


def test_counters_that_are_tensors() -> None:
    pair = judged("hf-momentum", params_in(FEW, F32), capturable=True)
    for step in range(3):
        pair.step(draw(FEW, step, F32))
