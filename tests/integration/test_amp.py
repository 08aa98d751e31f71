"""torch's GradScaler: with fused=True the step unscales and skips by itself, without it as ever."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from tests import stepping
from tests.dialects import DIALECTS

pytestmark = pytest.mark.parametrize("dialect", DIALECTS, ids=str)

SHAPES = ((6, 5), (7,))
FUSED = pytest.mark.parametrize("fused", [True, False, None], ids=lambda v: f"fused={v}")


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def scaled_grads(optimizer: Any, amp: torch.amp.GradScaler, step: int, poison: float = 0.0) -> None:
    """Gradients as a scaled loss leaves them."""
    amp.scale(torch.ones(()))  # the scaler starts lazily, with its first loss
    params = stepping.params_of(optimizer)
    for p, g in zip(params, stepping.grad_values(params, step), strict=True):
        p.grad = g * amp.get_scale()
    if poison:
        params[1].grad[3] = poison


@FUSED
def test_a_scaled_step_is_the_unscaled_one(dialect, fused):
    scaled = dialect(stepping.make_params(SHAPES), fused=fused)
    plain = dialect(stepping.make_params(SHAPES))
    amp = scaler()
    for step in range(4):
        scaled_grads(scaled, amp, step)
        amp.step(scaled)
        amp.update()
        stepping.take_steps(plain, 1, step)
    # The state too: an update does not change with the scale of the gradients.
    stepping.assert_close_optimizers(scaled, plain, 0.0)
    assert not hasattr(scaled, "grad_scale")
    assert not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_fused_step_leaves_the_gradients_scaled(dialect, max_grad_norm):
    optimizer = dialect(stepping.make_params(SHAPES), fused=True, max_grad_norm=max_grad_norm)
    plain = dialect(stepping.make_params(SHAPES), max_grad_norm=max_grad_norm)
    amp = scaler()
    scaled_grads(optimizer, amp, 0)
    before = [p.grad.clone() for p in stepping.params_of(optimizer)]
    amp.step(optimizer)
    for p, grad in zip(stepping.params_of(optimizer), before, strict=True):
        assert stepping.same_bits(p.grad, grad)
    stepping.take_steps(plain, 1)
    stepping.assert_close_optimizers(optimizer, plain, 1e-6)


@FUSED
@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stepped", [0, 2])
def test_an_overflow_skips_the_step(dialect, fused, poison, stepped):
    """Parameters, state and counters stand, also of the tensors whose gradients are fine."""
    optimizer, other = (dialect(stepping.make_params(SHAPES), fused=fused) for _ in range(2))
    for each in (optimizer, other):
        stepping.take_steps(each, stepped)
    params = stepping.params_of(optimizer)
    before = [p.detach().clone() for p in params]
    amp = scaler()
    scaled_grads(optimizer, amp, stepped, poison)
    amp.step(optimizer)
    amp.update()
    assert all(map(stepping.same_bits, params, before))
    assert amp.get_scale() == 512.0
    for each in (optimizer, other):
        stepping.take_steps(each, 2, start=stepped)
    stepping.assert_same_optimizers(optimizer, other)


def test_unscaling_first_and_clipping_is_allowed(dialect):
    optimizer = dialect(stepping.make_params(SHAPES), fused=True)
    plain = dialect(stepping.make_params(SHAPES))
    amp = scaler()
    scaled_grads(optimizer, amp, 0)
    amp.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(stepping.params_of(optimizer), 0.5)
    amp.step(optimizer)
    params = stepping.params_of(plain)
    for p, g in zip(params, stepping.grad_values(params, 0), strict=True):
        p.grad = g
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    plain.step()
    for p, q in zip(stepping.params_of(optimizer), params, strict=True):
        assert stepping.same_bits(p, q)


def test_a_real_loss_in_autocast_goes_down(dialect):
    model = torch.nn.Linear(8, 4)
    optimizer = dialect(model.parameters(), fused=True)
    amp = scaler()
    inputs = torch.randn(16, 8)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs).float().square().mean()
        optimizer.zero_grad()
        amp.scale(loss).backward()
        amp.step(optimizer)
        amp.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@FUSED
def test_copies_and_loaded_optimizers_keep_the_protocol(dialect, fused):
    """torch's own fused AdamW forgets it in a copy, and the scaler unscales behind its back."""
    optimizer = dialect(stepping.make_params(SHAPES), fused=fused)
    loaded = dialect(stepping.make_params(SHAPES))
    loaded.load_state_dict(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), loaded):
        assert other._step_supports_amp_scaling is bool(fused)
