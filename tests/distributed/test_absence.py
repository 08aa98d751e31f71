"""Gradients that only some processes have, or none: no process waits, and what is absent stays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests import stepping
from tests.dialects import BIG_VISION, HF, KERAS, KERAS_EXTRAS, OPTAX, TORCH, Dialect
from tests.distributed.ranks import (
    PLACEMENTS,
    assert_close_parts,
    distribute,
    mesh_of,
    on_every_rank,
)
from tests.distributed.test_placements import counted

SHAPES = [(13, 7), (5, 4), (4, 6, 5), (1, 4)]
SPLIT = [name for name in PLACEMENTS if name not in ("replicated", "third")]
EACH = pytest.mark.parametrize("dialect", [TORCH, HF, KERAS, OPTAX, BIG_VISION], ids=str)
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "skip": {"nonfinite": "skip"},
    "norm": {"max_grad_norm": 0.5},
    "capturable": {"capturable": True},
    **KERAS_EXTRAS,
    "skip_accumulation": {"nonfinite": "skip", "gradient_accumulation_steps": 2},
}
# By step, which tensors have a gradient anywhere; on which ranks follows from both numbers.
PRESENT = [{0, 1, 2, 3}, {0, 2}, {1, 3}, {0, 1, 2}, {2}, {0, 1, 2, 3}]


def has_grad(step: int, index: int, part: int) -> bool:
    """Whether a process has a gradient of a tensor that there is one of; at least one does."""
    return (step + index + part) % 3 != 1


def kept(value: Tensor, placement: str, step: int, index: int) -> Tensor:
    """A gradient of all processes together: zeros where one has none."""
    sizes, placements = PLACEMENTS[placement]
    result = value.clone()
    for place in itertools.product(*map(range, sizes)):
        block = result
        for at, size, how in zip(place, sizes, placements, strict=True):
            if not how.is_replicate():
                chunks = torch.chunk(block, size, how.dim)
                block = chunks[at] if at < len(chunks) else block[:0]
        block.mul_(has_grad(step, index, part_number(place, placements)))
    return result


def part_number(place: Sequence[int], placements: Sequence[Placement]) -> int:
    """Copies of a part have the same gradients, as they do wherever these are summed up."""
    return sum(at for at, how in zip(place, placements, strict=True) if not how.is_replicate())


def pair(dialect: Dialect, placement: str, **kwargs: Any) -> tuple[Any, Any, Any]:
    """A single process, and many of which each lacks some gradients, zeros in the single one's."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(sizes)
    params = stepping.make_params(SHAPES, torch.float64)
    whole = dialect(params, backend="reference", **kwargs)
    parts = [torch.nn.Parameter(p) for p in distribute(params, mesh, placements)]
    distributed = dialect(parts, **kwargs)
    number = part_number(mesh.get_coordinate(), placements)

    def give(step: int) -> None:
        values = stepping.grad_values(params, step)
        for index, (p, q, value) in enumerate(zip(params, parts, values, strict=True)):
            p.grad = q.grad = None
            if index in PRESENT[step % len(PRESENT)]:
                p.grad = kept(value, placement, step, index)
                mine = distribute_tensor(value, mesh, placements)  # by all together
                q.grad = mine if has_grad(step, index, number) else None

    return whole, distributed, give


def assert_alike(distributed: Any, whole: Any) -> None:
    """Distributed state is there from the first step on; a single process' when it is needed."""
    for p, q in zip(*map(stepping.params_of, (distributed, whole)), strict=True):
        if q not in whole.state:
            del distributed.state[p]
    assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("extra", EXTRAS)
@EACH
@on_every_rank
def test_what_is_missing_here_is_zeros_and_what_is_absent_is_left_alone(
    dialect: Dialect, extra: str
) -> None:
    for placement in ("rows", "rows_and_columns") if extra != "none" else SPLIT:
        if EXTRAS[extra].get("capturable") and dialect is KERAS:
            continue
        whole, distributed, give = pair(dialect, placement, **EXTRAS[extra])
        for step in range(6):
            give(step)
            whole.step()
            distributed.step()
        assert_alike(distributed, whole)


@pytest.mark.parametrize("extra", [{}, {"use_ema": True, "ema_momentum": 0.5}], ids=str)
@pytest.mark.parametrize("dialect", [HF, KERAS], ids=str)
@on_every_rank
def test_without_any_gradient_nothing_changes(dialect: Dialect, extra: dict[str, Any]) -> None:
    """Neither parameters nor averages nor counts, on any process."""
    whole, distributed, give = pair(dialect, "rows", **extra)
    for step in (0, None, 1, None, None, 2):
        if step is not None:
            give(step)
        else:
            whole.zero_grad()
            distributed.zero_grad()
        whole.step()
        distributed.step()
    assert_alike(distributed, whole)
    if dialect is KERAS:
        assert distributed.param_groups[0]["step"] == whole.param_groups[0]["step"] == 3


@pytest.mark.parametrize("beside", ["plain", "replicated"])
@pytest.mark.parametrize(
    ("dialect", "extra", "calls"),
    [
        (HF, {"use_ema": True, "ema_momentum": 0.5}, (True, True, False, False)),
        (KERAS, {"gradient_accumulation_steps": 2}, (True, False, True)),
    ],
    ids=str,
)
@on_every_rank
def test_without_any_gradient_what_is_whole_here_stays_too(
    dialect: Dialect, extra: dict[str, Any], calls: tuple[bool, ...], beside: str
) -> None:
    """Its average, and what has been accumulated of it."""
    mesh = mesh_of((4,))
    params = stepping.make_params([(5, 3), (3, 3)], torch.float64)
    whole = dialect(params, backend="reference", **extra)
    placements = [[Shard(0)], [Replicate()]]
    parts = [
        torch.nn.Parameter(distribute([p], mesh, how)[0])
        for p, how in zip(params, placements, strict=True)
    ]
    if beside == "plain":
        parts[1] = torch.nn.Parameter(params[1].detach().clone())
    distributed = dialect(parts, **extra)
    for step, given in enumerate(calls):
        for p, q, grad in zip(params, parts, stepping.grad_values(params, step), strict=True):
            p.grad = q.grad = None
            if given:
                p.grad = grad
                q.grad = grad.clone()
                if isinstance(q, DTensor):
                    q.grad = distribute_tensor(grad, mesh, q.placements)
        whole.step()
        distributed.step()
    assert_close_parts(distributed, whole, 1e-12)


@on_every_rank
def test_a_norm_is_of_the_gradients_that_there_are() -> None:
    """What was accumulated of a tensor that no process has a gradient of now is none."""
    mesh = mesh_of((4,))
    params = stepping.make_params([(5, 3), (6, 3)], torch.float64)
    extra = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    parts = [torch.nn.Parameter(p) for p in distribute(params, mesh, [Shard(0)])]
    whole, distributed = KERAS(params, backend="reference", **extra), KERAS(parts, **extra)
    for step in range(2):
        for index, grad in enumerate(stepping.grad_values(params, step)):
            params[index].grad = parts[index].grad = None
            if step == 0 or index == 0:
                params[index].grad = grad
                parts[index].grad = distribute_tensor(grad, mesh, [Shard(0)])
        whole.step()
        distributed.step()
    assert whole.grad_norm is not None
    assert distributed.grad_norm is not None
    stepping.assert_close(distributed.grad_norm, whole.grad_norm, 1e-12, "norm")
    assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("dialect", [HF, KERAS], ids=str)
@on_every_rank
def test_a_call_between_two_updates_is_dropped_by_all(dialect: Dialect) -> None:
    """The NaN is in the part of one process only."""
    extra = {"nonfinite": "skip", "gradient_accumulation_steps": 3}
    whole, distributed, give = pair(dialect, "rows", **extra)
    for step in (0, 5, 0, 5, 0, 5, 0):
        give(step)
        params = stepping.params_of(whole), stepping.params_of(distributed)
        if step == 5:
            params[0][0].grad[0, 0] = torch.nan
            if dist.get_rank() == 0:
                assert params[1][0].grad is not None
                params[1][0].grad.to_local()[0, 0] = torch.nan
        whole.step()
        distributed.step()
    assert_alike(distributed, whole)
    assert all(bool(p.isfinite().all()) for p in params[0])


@pytest.mark.parametrize("dialect", [HF, KERAS], ids=str)
@on_every_rank
def test_a_process_without_any_gradient_takes_part(dialect: Dialect) -> None:
    mesh = mesh_of((4,))
    values = stepping.make_params(SHAPES, torch.float64)
    params = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(0)])]
    optimizer = dialect(params)
    before = [p.detach().to_local().clone() for p in params]
    if dist.get_rank() == 0:
        grads = stepping.grad_values(values, 0)
        for p, g in zip(params, grads, strict=True):
            part = g[: p.to_local().shape[0]].clone()
            p.grad = DTensor.from_local(part, mesh, [Shard(0)], shape=g.shape, stride=g.stride())
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        state = optimizer.state[p]
        if dialect is HF:
            assert state["step"] == 1
        moved = not torch.equal(p.detach().to_local(), q)
        assert moved == (dist.get_rank() == 0)


@on_every_rank
def test_missing_gradients_cost_no_message() -> None:
    _, distributed, give = pair(HF, "rows")
    for step in range(4):
        give(step)
        with counted() as calls:
            distributed.step()
        assert len(calls) == 1


@on_every_rank
def test_a_process_that_misses_nothing_asks_for_nothing() -> None:
    """What is absent is looked for only where something is missing."""
    values = stepping.make_params(SHAPES)
    mesh = mesh_of((4,))
    params = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(0)])]
    optimizer = HF(params)
    for p in params:
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 2:
        params[1].grad = None
    asked = []
    engine = optimizer._engine
    update = engine._update

    def watched(parts: Any) -> None:
        update(parts)
        asked.extend(exchange.absent is not None for _, exchange in parts)

    engine._update = watched
    optimizer.step()
    assert asked == [dist.get_rank() == 2]


@on_every_rank
def test_a_frozen_parameter_is_no_part_of_a_step() -> None:
    _, distributed, give = pair(HF, "rows")
    frozen = stepping.params_of(distributed)[0].requires_grad_(False)
    give(0)
    frozen.grad = None
    distributed.step()
    assert frozen not in distributed.state
    frozen.requires_grad_()
    if dist.get_rank() == 0:  # the others have prepared a step without it
        frozen.grad = torch.ones_like(frozen)
    distributed.step()
    assert distributed.state[frozen]["step"] == 1


@on_every_rank
def test_plain_parameters_may_differ_from_process_to_process() -> None:
    """As experts that one process has alone: what is sent is in one order all the same."""
    mesh, rank = mesh_of((4,)), dist.get_rank()
    values = stepping.make_params([(6, 5), (4, 3)], torch.float64)
    whole = HF(values, backend="reference")
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(0)])]
    (plain,) = stepping.make_params([(2, 2)], torch.float64)
    optimizer = HF([plain, *parts])
    for step in range(3):
        grads = stepping.grad_values(values, step)
        parted = distribute(grads, mesh, [Shard(0)])
        for index, (p, q) in enumerate(zip(values, parts, strict=True)):
            is_there = step > 0 or index == 0  # the second is one step behind
            p.grad, q.grad = (grads[index], parted[index]) if is_there else (None, None)
        # On two processes it is at the step of the first, on two at that of the second.
        plain.grad = torch.ones_like(plain) if step > 0 or rank < 2 else None
        whole.step()
        optimizer.step()
    optimizer.param_groups[0]["params"].remove(plain)
    assert_close_parts(optimizer, whole, 1e-12)


@on_every_rank
def test_a_process_without_parameters_and_one_with_empty_parts() -> None:
    """The mesh is of two of four processes; the others have nothing, and wait for nobody."""
    rank = dist.get_rank()
    mesh = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1])
    values = stepping.make_params([(1, 4), (1,)], torch.float64)
    whole = HF(values, backend="reference")
    mine = distribute(values, mesh, [Shard(0)]) if rank < 2 else []
    optimizer = HF([{"params": [torch.nn.Parameter(p) for p in mine]}])
    for step in range(3):
        grads = stepping.grad_values(values, step)
        for p, g in zip(values, grads, strict=True):
            p.grad = g
        parts = distribute(grads, mesh, [Shard(0)]) if rank < 2 else []
        for p, g in zip(stepping.params_of(optimizer), parts, strict=True):
            p.grad = g
        optimizer.step()
        whole.step()
    if rank < 2:
        assert_close_parts(optimizer, whole, 1e-12)
