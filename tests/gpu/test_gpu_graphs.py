"""CUDA graphs: a replay is a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, built, captured, give, grads_on_device
from tests.kernels.biting import EVERY_RULE
from tests.kernels.judged import BF16, F32
from tests.stepping import assert_same_optimizers, params_of

SHAPES = [(7,), (), (3, 3), (40, 5, 5), (17, 23), (150, 200), (257, 513), (9, 16, 300), (0, 4)]


def pair_of(rule: str, dtype: torch.dtype, **extras: Any) -> tuple[Any, Any]:
    """Two optimizers that start alike: one for the graph, one that steps as ever."""
    graphed, eager = (built(rule, SHAPES, dtype, capturable=True, **extras) for _ in range(2))
    return graphed, eager


def grads_of(step: int, dtype: torch.dtype) -> list[Tensor]:
    return grads_on_device(SHAPES, step, dtype)


def refill(buffers: list[Tensor], grads: list[Tensor]) -> None:
    for buffer, grad in zip(buffers, grads, strict=True):
        buffer.copy_(grad)


def warm_up(*optimizers: Any, dtype: torch.dtype) -> list[Tensor]:
    """Two steps of each; the gradients of the last stay where they are."""
    grads: list[Tensor] = []
    for step in (0, 2):
        grads = grads_of(step, dtype)
        for optimizer in optimizers:
            give(optimizer, grads)
            optimizer.step()
    return grads


@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"max_grad_norm": 0.5},
        {"nonfinite": "skip"},
        {"rounding": "stochastic", "seed": 3},
        {"state_dtype": BF16, "seed": 3},
    ],
    ids=str,
)
@EVERY_RULE
@pytest.mark.usefixtures("launch")
def test_replays_are_steps(rule: str, extras: dict[str, Any]) -> None:
    if "max_grad_norm" in extras and rule.startswith("keras"):
        pytest.skip("keras takes one kind of clipping")
    dtype = BF16 if "rounding" in extras else F32
    graphed, eager = pair_of(rule, dtype, **extras)
    buffers = warm_up(graphed, eager, dtype=dtype)
    replay = captured(graphed)
    assert_same_optimizers(graphed, eager)
    for step in range(4):
        refill(buffers, grads_of(step, dtype))
        if "nonfinite" in extras and step == 1:
            buffers[0][3] = float("nan")
        replay()
        eager.step()
        assert_same_optimizers(graphed, eager)


@pytest.mark.usefixtures("launch")
def test_gradients_that_move_between_an_eager_step_and_a_replay() -> None:
    """The graph goes on reading the gradients that it was captured with."""
    graphed, eager = pair_of("hf", F32)
    buffers = warm_up(graphed, eager, dtype=F32)
    replay = captured(graphed)
    for step in range(3):
        graphed.zero_grad(set_to_none=True)
        moved = grads_of(step, F32)
        for optimizer in (graphed, eager):
            give(optimizer, moved)
            optimizer.step()
        assert_same_optimizers(graphed, eager)
        graphed.zero_grad(set_to_none=True)
        eager.zero_grad(set_to_none=True)
        del moved
        junk = [torch.full_like(b, float("nan")) for b in buffers]  # where the gradients were
        refill(buffers, grads_of(2 - step, F32))
        give(eager, buffers)
        replay()
        eager.step()
        assert_same_optimizers(graphed, eager)
        assert all(j.isnan().all() for j in junk)


@pytest.mark.parametrize("extras", [{}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.usefixtures("launch")
def test_a_graph_outlives_a_step_of_other_tensors(extras: dict[str, Any]) -> None:
    """A step that lacks a gradient makes new tables; the graph goes on with those it was given."""
    graphed, eager = pair_of("hf", F32, **extras)
    buffers = warm_up(graphed, eager, dtype=F32)
    replay = captured(graphed)
    for step in range(2):
        for optimizer in (graphed, eager):
            give(optimizer, grads_of(step, F32))
            params_of(optimizer)[0].grad = None
            optimizer.step()
        # Where tables were, and what has one number for each tensor.
        sizes = [*[2**16] * 64, *range(1, 65)]
        junk = [torch.full((size,), -1, dtype=torch.int64, device=DEVICE) for size in sizes]
        refill(buffers, grads_of(2 - step, F32))
        give(eager, buffers)
        replay()
        eager.step()
        assert_same_optimizers(graphed, eager)
        assert all((j == -1).all() for j in junk)


def test_two_graphs_of_one_optimizer() -> None:
    graphed, eager = pair_of("torch", F32)
    first = warm_up(graphed, eager, dtype=F32)
    second = [torch.zeros_like(g) for g in first]
    replays = []
    for buffers in (first, second):
        give(graphed, buffers)
        replays.append(captured(graphed))
    for step in (0, 1, 2, 1, 0):
        buffers = (first, second)[step % 2]
        refill(buffers, grads_of(step, F32))
        give(eager, buffers)
        give(graphed, buffers)
        replays[step % 2]()
        eager.step()
        assert_same_optimizers(graphed, eager)


def test_the_lr_is_read_in_every_replay() -> None:
    lr = torch.tensor(0.01, device=DEVICE)
    graphed, eager = pair_of("torch", F32)
    for optimizer in (graphed, eager):
        optimizer.param_groups[0]["lr"] = lr
    buffers = warm_up(graphed, eager, dtype=F32)
    replay = captured(graphed)
    for step, value in enumerate((0.02, 0.0, 0.005)):
        lr.fill_(value)
        refill(buffers, grads_of(step, F32))
        replay()
        eager.step()
        assert_same_optimizers(graphed, eager)


@pytest.mark.parametrize("rule", ["hf", "torch", "keras-everything", "no_factors"])
def test_a_loss_scale_and_an_overflow_are_read_in_every_replay(rule: str) -> None:
    graphed, eager = pair_of(rule, F32, fused=True)
    scale = torch.tensor(1024.0, device=DEVICE)
    found_inf = torch.tensor(0.0, device=DEVICE)
    for optimizer in (graphed, eager):
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
    buffers = warm_up(graphed, eager, dtype=F32)
    replay = captured(graphed)
    for step, (factor, overflow) in enumerate(((512.0, 0.0), (512.0, 1.0), (256.0, 0.0))):
        scale.fill_(factor)
        found_inf.fill_(overflow)
        refill(buffers, [g * factor for g in grads_of(step, F32)])
        before = [p.detach().clone() for p in params_of(graphed)]
        replay()
        eager.step()
        assert_same_optimizers(graphed, eager)
        still = [torch.equal(p, old) for p, old in zip(params_of(graphed), before, strict=True)]
        assert overflow == 0.0 or all(still)
