"""What a step has found out: metrics() of each parameter, and the norm of all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_adafactor.metrics import Metrics
from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, OPTAX, TORCH, VARIANTS

SHAPES = ((6, 5), (7,), (4, 3, 5), (2, 3, 3, 3), (), (40, 300))
PLAIN = [d for d in DIALECTS if d.name in ("torch", "hf", "keras", "optax")]  # without momentum


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dialect", PLAIN, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_numbers_are_those_of_the_step(dialect, scale):
    """RMS(p before) and |step| = step_size · RMS(u) / clip, all of them in float64."""
    eps = {"eps": (1e-9, 1e-3)} if dialect is TORCH else {}
    optimizer = dialect(stepping.make_params(SHAPES, torch.float64), **eps)
    stepping.take_steps(optimizer, 2)
    before = [p.detach().clone() for p in stepping.params_of(optimizer)]
    stepping.take_steps(optimizer, 1, start=2, scale=scale)
    found = optimizer.metrics()
    assert list(found) == [f"#{index}" for index in range(len(SHAPES))]
    for (label, m), old, new in zip(
        found.items(), before, stepping.params_of(optimizer), strict=True
    ):
        assert m.param_rms == pytest.approx(rms(old), rel=1e-12), label
        assert m.clip_factor == pytest.approx(max(1.0, m.update_rms), rel=1e-12), label
        assert rms(new - old) == pytest.approx(m.step_size * m.update_rms / m.clip_factor, rel=1e-9)
        rho = 1e-2 if dialect.name in ("hf", "optax") else min(1e-2, 3**-0.5)
        assert m.step_size == pytest.approx(rho * max(1e-3, m.param_rms), rel=1e-9)


@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backends_agree(dialect, variant, dtype):
    """From equal parameters: those of a rule with lr 1 are differences of much larger numbers."""
    ours, reference = (
        dialect(stepping.make_params(SHAPES, dtype), **dialect.variants[variant], backend=backend)
        for backend in ("cpp", "reference")
    )
    for step in range(4):
        with torch.no_grad():
            torch._foreach_copy_(*map(stepping.params_of, (ours, reference)))
        for optimizer in (ours, reference):
            stepping.take_steps(optimizer, 1, start=step)
    metrics = reference.metrics()
    assert len(metrics) == len(SHAPES)
    stepping.assert_close_metrics(ours.metrics(), metrics, stepping.TOLERANCES[dtype])


def test_what_a_rule_does_not_measure_is_absent():
    options = {"multiply_by_parameter_scale": False, "clipping_threshold": None}
    optimizer = OPTAX(stepping.make_params([(6, 5)]), **options)
    stepping.take_steps(optimizer, 1)
    assert optimizer.metrics() == {"#0": Metrics(None, None, None, 1e-2)}


@pytest.mark.usefixtures("each_backend")
def test_names_and_missing_gradients():
    """A parameter keeps what its last update found; one that was never updated has nothing."""
    params = stepping.make_params([(6, 5), (7,), (3,)])
    optimizer = TORCH(list(zip("abc", params, strict=True)))
    assert optimizer.metrics() == {}
    params[0].grad, params[1].grad = map(torch.ones_like, params[:2])
    optimizer.step()
    first = optimizer.metrics()
    assert list(first) == ["a", "b"]
    optimizer.step()
    second = optimizer.metrics()
    assert list(second) == ["a", "b"]
    assert second["a"].param_rms != first["a"].param_rms


@pytest.mark.usefixtures("each_backend")
def test_a_call_that_only_accumulates_changes_nothing():
    optimizer = KERAS(stepping.make_params(SHAPES), gradient_accumulation_steps=2)
    stepping.take_steps(optimizer, 1)
    assert optimizer.metrics() == {}
    stepping.take_steps(optimizer, 1, start=1)
    updated = optimizer.metrics()
    assert len(updated) == len(SHAPES)
    stepping.take_steps(optimizer, 1, start=2)
    assert optimizer.metrics() == updated


@pytest.mark.usefixtures("each_backend")
def test_the_last_update_counts_whatever_else_is_updated_with_it():
    """One parameter updates in every call, its neighbour in every second one."""
    params = stepping.make_params([(6, 5), (7,)], torch.float64)
    optimizer = HF(params[:1])
    optimizer.add_param_group({"params": params[1:], "gradient_accumulation_steps": 2})
    for step in range(5):
        before = params[0].detach().clone()
        stepping.take_steps(optimizer, 1, start=step)
        assert optimizer.metrics()["#0"].param_rms == pytest.approx(rms(before), rel=1e-12)


# --- the norm of all gradients -------------------------------------------------------------------


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@pytest.mark.parametrize(
    "extras",
    [{"max_grad_norm": 0.5}, {"global_clipnorm": 0.5}, {"clipnorm": 0.5}],
    ids=str,
)
def test_the_norm_is_that_of_all_gradients(dialect, extras: dict[str, Any]):
    params = stepping.make_params(SHAPES, torch.float64)
    optimizer = dialect([{"params": params[:2]}, {"params": params[2:]}], **extras)
    assert optimizer.grad_norm is None
    for step in range(3):
        stepping.take_steps(optimizer, 1, start=step)
        expected = torch.cat([p.grad.flatten() for p in params]).norm()
        assert optimizer.grad_norm.shape == ()
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("each_backend")
def test_the_norm_is_that_of_the_unscaled_average():
    params = stepping.make_params(SHAPES, torch.float64)
    options = {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0, "max_grad_norm": 0.1}
    optimizer = KERAS(params, **options)
    stepping.take_steps(optimizer, 2)
    sums = [stepping.grad_values(params, step) for step in (0, 1)]
    mean = [(a + b) / 8 for a, b in zip(*sums, strict=True)]
    expected = torch.cat([g.flatten() for g in mean]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("each_backend")
def test_without_a_reason_no_norm_is_taken():
    optimizer = TORCH(stepping.make_params(SHAPES))
    stepping.take_steps(optimizer, 2)
    assert optimizer.grad_norm is None
