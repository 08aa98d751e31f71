"""Steps on the GPU against the reference in float64 on the CPU, one step at a time."""

from __future__ import annotations

import pytest
import torch

from tests.dialects import HF, KERAS_EXTRAS, TORCH, VARIANTS, Dialect
from tests.gpu.device import (
    BACKEND,
    built,
    give,
    grads_on_device,
    judged_on_device,
    params_on_device,
)
from tests.kernels.biting import EVERY_RULE, EVERY_SHAPE
from tests.kernels.judged import BF16, F16, F32, F64, Judged, eps_of
from tests.stepping import LAYOUTS, assert_close_metrics, assert_untouched, params_of

# One of each way to cut a tensor, for the tests that are not about shapes.
MIXED = [(7,), (), (3, 3), (40, 5, 5), (33, 9), (17, 23), (150, 200), (257, 513), (9, 16, 300)]


@EVERY_RULE
@EVERY_SHAPE
@pytest.mark.usefixtures("launch")
def test_every_rule_on_every_shape(rule: str, shapes: list[tuple[int, ...]]) -> None:
    pair = judged_on_device(rule, shapes, F32)
    for step in range(2):
        pair.step(grads_on_device(shapes, 2 * step, F32))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
def test_every_variant_of_every_dialect(dialect: Dialect, variant: str, dtype: torch.dtype) -> None:
    """Averages, accumulation, schedules and every kind of clipping; a row of zeros on the way."""
    options = dict(dialect.variants[variant])
    if dialect is TORCH and "eps" not in options:
        options |= eps_of(dtype)
    if variant == "average" and dtype is BF16:
        # The average that overwrites a parameter has its rounding error in it: two for one bound.
        options["ema_overwrite_frequency"] = None
    pair = Judged(dialect, params_on_device(MIXED, dtype), backend=BACKEND, **options)
    pair.normwise = dialect.name in ("adafactor_pytorch", "big_vision") or "momentum" in variant
    for step in range(4):
        pair.step(grads_on_device(MIXED, step % 3, dtype))


@pytest.mark.parametrize(
    "rule", ["torch", "hf-momentum", "adafactor_pytorch-amsgrad", "big_vision"]
)
@pytest.mark.parametrize("extra", KERAS_EXTRAS)
def test_keras_extras_under_every_dialect(rule: str, extra: str) -> None:
    pair = judged_on_device(rule, MIXED, F32, **KERAS_EXTRAS[extra])
    pair.normwise = rule != "torch"
    for step in range(4):
        pair.step(grads_on_device(MIXED, step, F32))
    metrics = pair.judge.metrics()
    assert len(metrics) == len(MIXED)
    assert_close_metrics(pair.ours.metrics(), metrics, 1e-5)


@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("rule", ["hf", "torch", "hf-momentum", "no_factors"])
def test_every_dtype_with_every_gradient(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    pair = judged_on_device(rule, MIXED, dtype)
    for step in range(2):
        pair.step(grads_on_device(MIXED, step, grad_dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["hf", "torch", "hf-momentum", "no_factors"])
def test_every_layout(rule: str, layout: str, dtype: torch.dtype) -> None:
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (1, 5, 7, 3), (2, 3, 40, 50), (2, 16, 9, 9), (1, 2, 300, 513)]
    if layout == "gradient_expanded_scalar":
        shapes = shapes[:2]
    pair = judged_on_device(rule, shapes, dtype, lay_param)
    params = params_of(pair.ours)
    before = [(p.stride(), p.data_ptr()) for p in params]
    for step in range(2):
        grads = grads_on_device(shapes, 2 * step, dtype, lay_grad)
        kept = [g.clone() for g in grads]
        pair.step(grads)
        assert all(map(torch.equal, grads, kept))
    assert [(p.stride(), p.data_ptr()) for p in params] == before


@pytest.mark.parametrize("rule", ["hf", "torch", "adafactor_pytorch-amsgrad", "optax-momentum"])
@pytest.mark.parametrize("shape", [(6, 8, 6), (4, 40, 50), (3, 300, 500), (4, 400, 9)], ids=str)
def test_experts_of_very_different_gradients(rule: str, shape: tuple[int, ...]) -> None:
    pair = judged_on_device(rule, [shape], F32)
    for step in range(2):
        (g,) = grads_on_device([shape], 2 * step, F32)
        g[::2] *= 1e-5
        pair.step([g])


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e12])
@pytest.mark.parametrize("rule", ["hf", "torch", "optax-momentum", "no_factors"])
def test_gradients_of_any_scale(rule: str, scale: float) -> None:
    pair = judged_on_device(rule, MIXED, F32)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, dtype=F64, generator=generator) for shape in MIXED]
        pair.step([(g * scale).to(params_of(pair.ours)[0]) for g in drawn])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@EVERY_RULE
def test_max_grad_norm(rule: str, max_norm: float) -> None:
    if rule.startswith("keras"):
        pytest.skip("keras takes one kind of clipping")
    pair = judged_on_device(rule, MIXED, F32, max_grad_norm=max_norm)
    for step in range(2):
        pair.step(grads_on_device(MIXED, 2 * step, F32))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@EVERY_RULE
@pytest.mark.usefixtures("launch")
def test_skip_writes_nothing(rule: str, poison: float) -> None:
    for shape in [*MIXED, (700, 300)]:
        optimizer = built(rule, [shape], BF16, nonfinite="skip")
        give(optimizer, grads_on_device([shape], 0, BF16))
        optimizer.step()
        grads = grads_on_device([shape], 2, BF16)
        grads[0].view(-1)[-1] = poison
        give(optimizer, grads)
        with assert_untouched(optimizer):
            optimizer.step()


def test_tensors_of_all_dtypes_step_together() -> None:
    dtypes = (F32, BF16, F16, F64)
    params = [p for dtype in dtypes for p in params_on_device(MIXED, dtype)]
    pair = Judged(HF, params, backend=BACKEND)
    for step in range(2):
        pair.step([g for dtype in dtypes for g in grads_on_device(MIXED, step, dtype)])


def test_tensors_without_gradients_are_left_out() -> None:
    pair = judged_on_device("hf", MIXED, F32)
    for step in range(3):
        grads = grads_on_device(MIXED, step, F32)
        pair.step(grads)
    optimizer = pair.ours
    half = [g if n % 2 else None for n, g in enumerate(grads_on_device(MIXED, 0, F32))]
    before = [p.detach().clone() for p in params_of(optimizer)]
    give(optimizer, half)
    optimizer.step()
    for p, g, old in zip(params_of(optimizer), half, before, strict=True):
        assert torch.equal(p, old) == (g is None)
