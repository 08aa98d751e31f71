"""FSDP2 and tensor parallelism in real processes, against a single process."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, TORCH, Dialect
from tests.distributed.processes import Model, backward, batch, on_processes, shard, train
from tests.distributed.ranks import assert_close_part

EACH = pytest.mark.parametrize("dialect", [TORCH, HF, KERAS], ids=str)


def whole_of(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to_local() if isinstance(value, DTensor) else value.detach()


def assert_same(mine: Any, whole: Any, tolerance: float = 1e-12) -> None:
    """Parameters and state of a distributed optimizer and of that of a single process."""
    for p, q in zip(*map(stepping.params_of, (mine, whole)), strict=True):
        state, wanted = mine.state.get(p, {}), whole.state.get(q, {})
        assert list(state) == list(wanted)
        for found, value in [(p, q), *((state[key], wanted[key]) for key in wanted)]:
            if isinstance(found, DTensor):
                assert_close_part(found, value, tolerance, str(tuple(value.shape)))
            else:
                torch.testing.assert_close(found, value, rtol=tolerance, atol=0)


@EACH
@on_processes(4)
def test_fsdp_is_a_single_process(dialect: Dialect) -> None:
    """Also uneven and empty parts, a parameter that is not distributed, and a frozen one."""
    model = Model()
    whole = copy.deepcopy(model)
    shard(model, init_device_mesh("cpu", (4,)))
    extras: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.01}, {"nonfinite": "skip"}]
    for extra in extras:
        mine, theirs = dialect(model.parameters(), **extra), dialect(whole.parameters(), **extra)
        train(model, mine)
        train(whole, theirs)
        assert_same(mine, theirs)
    assert not isinstance(model.scale, DTensor)
    assert model.last.bias.to_local().numel() == (torch.distributed.get_rank() < 2)
    assert model.frozen.weight not in mine.state


@on_processes(2)
def test_fsdp_with_parameters_offloaded_to_the_cpu() -> None:
    """On a CPU this is the same memory, but FSDP2 goes its other way: gradients are copied."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = Model()
    whole = copy.deepcopy(model)
    policy = CPUOffloadPolicy(pin_memory=False)  # pinning needs an accelerator
    shard(model, init_device_mesh("cpu", (2,)), offload_policy=policy)
    mine, theirs = TORCH(model.parameters()), TORCH(whole.parameters())
    train(model, mine)
    train(whole, theirs)
    assert_same(mine, theirs)


@EACH
@on_processes(4)
def test_fsdp_over_tensor_parallelism_is_a_single_process(dialect: Dialect) -> None:
    """Rows that tensor parallelism splits first and FSDP2 after it: a _StridedShard."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(3)
    sizes = {"dtype": torch.float64}
    layers = torch.nn.Linear(6, 12, **sizes), torch.nn.Tanh(), torch.nn.Linear(12, 6, **sizes)
    model = torch.nn.Sequential(*layers)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert "_StridedShard" in str([p.placements for p in model.parameters()])
    mine, theirs = dialect(model.parameters()), dialect(whole.parameters())
    train(model, mine)
    train(whole, theirs)
    assert_same(mine, theirs)


@EACH
@on_processes(4)
def test_hybrid_sharding_is_a_single_process(dialect: Dialect) -> None:
    model = Model()
    whole = copy.deepcopy(model)
    shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))
    mine, theirs = dialect(model.parameters()), dialect(whole.parameters())
    train(model, mine)
    train(whole, theirs)
    assert_same(mine, theirs)


@on_processes(4)
def test_a_gradient_that_is_not_finite_is_skipped_by_all() -> None:
    """One process has the Inf in its part. What was skipped was not counted either."""
    model = shard(Model(), init_device_mesh("cpu", (4,)))
    optimizer = HF(model.parameters(), nonfinite="skip")
    train(model, optimizer, range(2))
    before = [whole_of(p.detach()).clone() for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, 2)
    grad = model.first.weight.grad
    poisoned = grad.full_tensor()
    poisoned[-1, 0] = torch.inf
    model.first.weight.grad = distribute_tensor(poisoned, grad.device_mesh, grad.placements)
    optimizer.step()
    moved = [
        not torch.equal(whole_of(p), q) for p, q in zip(model.parameters(), before, strict=True)
    ]
    names = [name for name, _ in model.named_parameters()]
    still = {name for name, each in zip(names, moved, strict=True) if not each}
    assert still == {"first.weight", "frozen.weight", "frozen.bias"}
    assert optimizer.state[model.first.weight]["step"] == 2
    assert optimizer.state[model.second.weight]["step"] == 3


@on_processes(2)
def test_a_grad_scaler_skips_on_all_processes() -> None:
    """torch finds the Inf in the part of one process, and tells all."""
    model = shard(Model(torch.float32), init_device_mesh("cpu", (2,)))
    # Without the plain one: torch's scaler cannot read both kinds together.
    optimizer = HF([p for p in model.parameters() if isinstance(p, DTensor)], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(batch(step, torch.float32)).square().mean()).backward()
        if step == 1 and torch.distributed.get_rank() == 1:
            model.first.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[model.second.weight]["step"] == (1, 1, 2)[step]
    assert scaler.get_scale() == 4.0


# --- steps in the backward pass ------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"nonfinite": "skip"}], ids=str)
@on_processes(4)
def test_steps_in_the_backward_pass_have_the_bits_of_step(extra: dict[str, Any]) -> None:
    """Whatever is summed in one message with it: sums over processes are taken number by number."""
    mesh = init_device_mesh("cpu", (4,))
    for dialect in (TORCH, HF):
        one, other = shard(Model(), mesh), shard(Model(), mesh)
        plain, backwards = (dialect(m.parameters(), **extra) for m in (one, other))
        with backwards.enable_backward_step(other):
            train(one, plain)
            train(other, backwards)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole_of(p), whole_of(q))
            for key, value in plain.state.get(p, {}).items():
                assert torch.equal(whole_of(backwards.state[q][key]), whole_of(value)), key


@on_processes(2)
def test_gradients_are_freed_in_the_backward_pass() -> None:
    """Layers of more than a megabyte: each is freed before the next one comes."""
    from torch.distributed.fsdp import fully_shard

    layers = [torch.nn.Linear(640, 640, bias=False) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    parts = list(model.parameters())  # in the backward pass a layer has its whole ones
    most = 0

    def measure(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(part_of(p.grad).numel() for p in parts if p.grad is not None))

    for layer in layers:
        layer.register_full_backward_hook(measure)
    size = layers[0].weight.to_local().numel()
    data = torch.ones(4, 640, requires_grad=True)
    optimizer = HF(model.parameters())
    model(data).square().mean().backward()
    assert most >= 4 * size
    optimizer.step()
    optimizer.zero_grad()
    most = 0
    with optimizer.enable_backward_step(model):
        model(data).square().mean().backward()
        assert most <= size
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    assert optimizer.state[layers[0].weight]["step"] == 2


@on_processes(2)
def test_a_common_norm_is_refused_in_the_backward_pass() -> None:
    model = shard(Model(), init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="max_grad_norm"):
        HF(model.parameters(), max_grad_norm=1.0).enable_backward_step(model)


# --- other ways to distribute --------------------------------------------------------------------


@on_processes(2)
def test_ddp_has_the_bits_of_a_single_process() -> None:
    model = Model()
    whole = copy.deepcopy(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for dialect in DIALECTS:
        mine, theirs = dialect(model.parameters()), dialect(whole.parameters())
        train(wrapped, mine)
        train(whole, theirs)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q)


@on_processes(2)
def test_zero_redundancy_optimizer_has_the_bits_of_a_single_process() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Model()
    whole = copy.deepcopy(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for dialect in (TORCH, HF):
        params = [p for p in model.parameters() if p.requires_grad]
        mine = ZeroRedundancyOptimizer(params, dialect.cls, **dialect.plain)
        theirs = dialect(whole.parameters())
        train(wrapped, mine)
        train(whole, theirs)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q)


# --- what goes wrong -----------------------------------------------------------------------------


@on_processes(3, timeout=5.0, alive=2)
def test_a_process_that_dies_is_noticed_by_the_others() -> None:
    """The process group says so, at once or after its timeout; nothing of ours waits longer."""
    model = shard(Model(), init_device_mesh("cpu", (3,)))
    optimizer = HF(model.parameters())
    train(model, optimizer, range(2))
    backward(model, 2)
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    before = [part_of(p).clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"[Gg]loo|[Cc]onnection|[Tt]imed out"):
        optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(part_of(p), q)
    assert optimizer.state[model.first.weight]["step"] == 2
