"""Keras' extras under every dialect, each against the slow way of doing the same thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.dialects import DIALECTS, Dialect

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.parametrize("dialect", DIALECTS, ids=str),
]

SHAPES = ((6, 5), (7,), (4, 3, 5), (2, 4, 3, 3), ())
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def pair(dialect: Dialect, dtype: torch.dtype = torch.float64, **extras: Any) -> tuple[Any, Any]:
    """One with the extras, one that does without; eps1 is of a size that makes g's size matter."""
    eps = {"torch": {"eps": (1e-3, 1e-3)}, "keras": {"epsilon_1": 1e-2}}
    eps |= {"hf": {"eps": (1e-2, 1e-3)}, "optax": {"eps": 1e-2}, "big_vision": {"eps": 1e-2}}
    options = eps.get(dialect.name, {"eps1": 1e-2})
    with_extras, without = (
        dialect(stepping.make_params(SHAPES, dtype), **options, **own) for own in (extras, {})
    )
    return with_extras, without


def set_grads(optimizer: Any, grads: list[Tensor]) -> None:
    for p, g in zip(stepping.params_of(optimizer), grads, strict=True):
        p.grad = g.clone()


def norm_of(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads]).norm()


CLIPS = {
    "clipnorm": lambda grads, c: [g * min(1.0, c / norm_of([g])) for g in grads],
    "clipvalue": lambda grads, c: [g.clamp(-c, c) for g in grads],
    "global_clipnorm": lambda grads, c: [g * min(1.0, c / norm_of(grads)) for g in grads],
}


@DTYPES
@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("threshold", [0.3, 1e6], ids=["clips", "does_not_clip"])
def test_clipping_is_clipping_before_the_step(dialect, dtype, kind, threshold):
    inside, outside = pair(dialect, dtype, **{kind: threshold})
    for step in range(4):
        grads = stepping.grad_values(stepping.params_of(outside), step)
        set_grads(inside, grads)
        inside.step()
        for p, g in zip(stepping.params_of(inside), grads, strict=True):
            assert stepping.same_bits(p.grad, g)
        set_grads(outside, CLIPS[kind](grads, threshold))
        outside.step()
    stepping.assert_close_optimizers(inside, outside, stepping.TOLERANCES[dtype])


def test_the_loss_scale_is_divided_by(dialect):
    """By a power of two: that is exact."""
    inside, outside = pair(dialect, loss_scale_factor=64.0)
    for step in range(3):
        grads = stepping.grad_values(stepping.params_of(outside), step)
        set_grads(inside, [64.0 * g for g in grads])
        set_grads(outside, grads)
        inside.step()
        outside.step()
    for p, q in zip(*map(stepping.params_of, (inside, outside)), strict=True):
        assert stepping.same_bits(p, q)


@DTYPES
@pytest.mark.parametrize("k", [2, 3])
def test_accumulation_is_a_step_on_the_average(dialect, dtype, k):
    """Between two updates nothing moves but the sum and the count; t is that of updates."""
    inside, outside = pair(dialect, dtype, gradient_accumulation_steps=k)
    for update in range(4):
        micro = [
            stepping.grad_values(stepping.params_of(outside), k * update + call)
            for call in range(k)
        ]
        for call, grads in enumerate(micro):
            before = [p.detach().clone() for p in stepping.params_of(inside)]
            set_grads(inside, grads)
            inside.step()
            moved = [
                not torch.equal(p, q)
                for p, q in zip(stepping.params_of(inside), before, strict=True)
            ]
            assert moved == [call == k - 1] * len(moved)
        set_grads(outside, [sum(g[1:], g[0]) / k for g in zip(*micro, strict=True)])
        outside.step()
    count = inside.layout.step
    for own, other in zip(inside.state.values(), outside.state.values(), strict=True):
        if count in own:
            assert float(own.pop(count)) == k * float(other.pop(count)) == 4 * k
        assert not own.pop(inside.layout.accumulator).any()
    stepping.assert_close_optimizers(inside, outside, stepping.TOLERANCES[dtype])


def test_a_call_without_a_gradient(dialect):
    """Where each parameter has its own count, it waits; else it is the call that is counted."""
    if dialect.counts_globally:
        pytest.skip("tests/parity/test_keras.py has what Keras does")
    inside, outside = pair(dialect, gradient_accumulation_steps=2)
    first, second, third = (
        stepping.grad_values(stepping.params_of(outside), step) for step in range(3)
    )
    for missing, grads in ((False, first), (True, second), (False, third)):
        set_grads(inside, grads)
        if missing:
            stepping.params_of(inside)[0].grad = None
        inside.step()
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    set_grads(outside, [(first[0] + third[0]) / 2, *means[1:]])
    outside.step()
    for p, q in zip(*map(stepping.params_of, (inside, outside)), strict=True):
        stepping.assert_close(p, q, 1e-12, "parameter")
    sums = [own[inside.layout.accumulator] for own in inside.state.values()]
    assert [bool(s.any()) for s in sums] == [False] + [True] * (len(sums) - 1)


@DTYPES
@pytest.mark.parametrize("every", [None, 2])
def test_the_average_is_that_of_a_pass_of_its_own(dialect, dtype, every):
    inside, outside = pair(
        dialect, dtype, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=every
    )
    averages = [p.detach().clone() for p in stepping.params_of(outside)]
    for step in range(5):
        for optimizer in (inside, outside):
            stepping.take_steps(optimizer, 1, start=step)
        momentum = 0.75 if step else 0.0
        for average, p in zip(averages, stepping.params_of(outside), strict=True):
            average.mul_(momentum).add_(p.detach(), alpha=1 - momentum)
            if every is not None and (step + 1) % every == 0:
                p.data.copy_(average)
    tolerance = stepping.TOLERANCES[dtype]
    for own, average in zip(inside.state.values(), averages, strict=True):
        stepping.assert_close(own[inside.layout.average], average, tolerance, "average")
    stepping.assert_close_optimizers(inside, outside, tolerance)
    inside.finalize_variable_values()
    for p, average in zip(stepping.params_of(inside), averages, strict=True):
        stepping.assert_close(p, average, tolerance, "finalized")


def test_the_average_moves_without_a_gradient(dialect):
    optimizer, _ = pair(dialect, use_ema=True, ema_momentum=0.5)
    stepping.take_steps(optimizer, 1)
    param = stepping.params_of(optimizer)[1]
    before = optimizer.state[param][optimizer.layout.average].clone()
    with torch.no_grad():
        param.fill_(3.0)
    param.grad = None
    optimizer.step()
    moved = optimizer.state[param][optimizer.layout.average]
    stepping.assert_close(moved, 0.5 * before + 1.5, 1e-12, "average")
    assert torch.equal(param, torch.full_like(param, 3.0))


@pytest.mark.parametrize(
    ("extras", "error", "text"),
    [
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "Only one of `clipnorm`"),
        ({"clipnorm": 1.0, "max_grad_norm": 1.0}, ValueError, "max_grad_norm excludes"),
        ({"global_clipnorm": "1"}, TypeError, "global_clipnorm must be a number"),
        ({"gradient_accumulation_steps": 1}, ValueError, "must be an integer >= 2"),
        ({"gradient_accumulation_steps": 2.5}, ValueError, "must be an integer >= 2"),
        ({"use_ema": True, "ema_momentum": 1.5}, ValueError, "must be in the range"),
        ({"use_ema": True, "ema_momentum": None}, TypeError, "ema_momentum must be a number"),
        ({"use_ema": True, "ema_overwrite_frequency": 0.5}, ValueError, "ema_overwrite_frequency"),
        ({"loss_scale_factor": 0.0}, ValueError, "loss_scale_factor should be > 0"),
    ],
    ids=str,
)
def test_what_will_not_do_is_named(dialect, extras, error, text):
    params = stepping.make_params(SHAPES)
    with pytest.raises(error, match=text):
        dialect(params, **extras)
    optimizer = dialect(params)
    optimizer.param_groups[0].update(extras)
    for p in params:
        p.grad = torch.ones_like(p)
    with stepping.assert_untouched(optimizer), pytest.raises(error, match=text):
        optimizer.step()


def test_resuming_within_an_accumulation_is_exact(dialect):
    extras = {"gradient_accumulation_steps": 3, "use_ema": True, "clipvalue": 0.5}
    optimizer, _ = pair(dialect, torch.float32, **extras)
    stepping.take_steps(optimizer, 4)
    resumed, _ = pair(dialect, torch.float32, **extras)
    with torch.no_grad():
        for p, q in zip(*map(stepping.params_of, (resumed, optimizer)), strict=True):
            p.copy_(q)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        stepping.take_steps(each, 4, start=4)
    stepping.assert_same_optimizers(optimizer, resumed)
