"""Parts of parameters that adafactor-pytorch reshapes: they are no blocks of the matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fused_adafactor import backends
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH
from tests.distributed.processes import on_processes
from tests.distributed.ranks import assert_close_parts, distribute, mesh_of, on_every_rank
from tests.distributed.test_placements import counted
from tests.distributed.test_processes import whole_of

# A stack, convolutions of one to three dimensions, fewer of the first dimension than processes.
SHAPES = [(13, 7, 3), (6, 5, 3, 2), (3, 2, 3, 2, 5), (2, 3, 1, 2, 2, 2), (6, 4)]
AMSGRAD = {"non_constant_decay": False, "ams_grad": True}


def parts_of(
    values: list[Tensor], mesh: DeviceMesh, placements: list[Placement]
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p) for p in distribute(values, mesh, placements)]


def step(optimizer: Any, number: int, whole: list[Tensor]) -> None:
    """A step with the gradients that parameters of these shapes have in it."""
    grads = stepping.grad_values(whole, number)
    for p, g in zip(stepping.params_of(optimizer), grads, strict=True):
        placed = isinstance(p, DTensor)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if placed else g
    optimizer.step()


@pytest.mark.parametrize("dim", range(3))
@on_every_rank
def test_any_rank_and_dimension(dim: int) -> None:
    """The rows of the matrix are whole on each process only where the first dimension is split."""
    shapes = [shape for shape in SHAPES if len(shape) > dim]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        for extras in ({}, AMSGRAD, {"state_dtype": torch.bfloat16}):
            values = stepping.make_params(shapes, dtype)
            parts = parts_of(values, mesh_of((4,)), [Shard(dim)])
            whole = ADAFACTOR_PYTORCH(values, backend="reference", **extras)
            distributed = ADAFACTOR_PYTORCH(parts, **extras)
            for number in range(4 if "state_dtype" not in extras else 1):
                step(whole, number, values)
                step(distributed, number, values)
            assert_close_parts(distributed, whole, tolerance)


@pytest.mark.parametrize(("dim", "messages"), [(0, [13 + 2 * 21 + 2]), (1, [13 + 21 + 2, 1])])
@on_every_rank
def test_rows_and_columns_are_all_that_is_sent(dim: int, messages: list[int]) -> None:
    """Of [13, 7, 3] as [13, 21]; one message where rows are whole, and two elsewhere."""
    values = stepping.make_params([(13, 7, 3)])
    distributed = ADAFACTOR_PYTORCH(parts_of(values, mesh_of((4,)), [Shard(dim)]))
    with counted() as calls:
        step(distributed, 0, values)
    assert calls == messages


@on_every_rank
def test_native_code_is_refused_by_name_and_left_aside_by_auto() -> None:
    """By all processes, those with empty parts too; what is not reshaped is stepped natively."""
    mesh = mesh_of((4,))
    values = stepping.make_params([(2, 4, 6), (8, 4)])
    parts = parts_of(values, mesh, [Shard(0)])
    for p in parts:
        p.grad = torch.ones_like(p)
    before = [p.detach().to_local().clone() for p in parts]
    named: Any = ADAFACTOR_PYTORCH(parts, backend="cpp")
    with pytest.raises(RuntimeError, match=r"'cpp' was asked for, but"):
        named.step()
    assert not named.state
    assert all(torch.equal(p.to_local(), q) for p, q in zip(parts, before, strict=True))
    optimizer: Any = ADAFACTOR_PYTORCH(parts)
    found = {p.facts.backend: [t.spec.id.index for t in p.tensors] for p in optimizer.plans()}
    assert 0 in found["reference"]
    if backends.availability()["cpp"] is None:
        assert found == {"reference": [0], "cpp": [1]}
        assert "cpp backend does not step parts of what is reshaped" in optimizer.explain()
        copies: Any = ADAFACTOR_PYTORCH(parts_of(values, mesh, [Replicate()]), backend="cpp")
        step(copies, 0, values)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", [{}, AMSGRAD], ids=["defaults", "amsgrad"])
@on_processes(3)
def test_state_goes_from_one_process_to_several_and_back(extras: dict[str, Any]) -> None:
    """A single process keeps the first moment as the matrix, several in the parameter's shape."""
    mesh = init_device_mesh("cpu", (3,))
    for placement in (Shard(0), Shard(1), Replicate()):
        values = stepping.make_params(SHAPES, torch.float64)
        whole = ADAFACTOR_PYTORCH(values, backend="reference", **extras)
        for number in range(2):
            step(whole, number, values)
        parts = parts_of(values, mesh, [placement])
        several = ADAFACTOR_PYTORCH(parts, **extras)
        several.load_state_dict(whole.state_dict())
        assert_close_parts(several, whole, 0.0)
        single = ADAFACTOR_PYTORCH(stepping.clone_params(values), backend="reference", **extras)
        single.load_state_dict(several.state_dict())
        for p, q in zip(*map(stepping.params_of, (single, whole)), strict=True):
            for key, value in whole.state[q].items():
                assert single.state[p][key].shape == value.shape
                assert torch.equal(single.state[p][key], value), key
        for number in range(2, 4):
            step(whole, number, values)
            step(several, number, values)
        assert_close_parts(several, whole, 1e-12)


def saved_and_loaded(path: Path, world: int) -> None:
    torch.manual_seed(0)
    values = stepping.make_params(SHAPES)
    parts = parts_of(values, init_device_mesh("cpu", (world,)), [Shard(0)])
    optimizer = ADAFACTOR_PYTORCH([(f"p{number}", p) for number, p in enumerate(parts)])
    step(optimizer, 0, values)
    tensors = {
        f"{number} {key}": value
        for number, p in enumerate(parts)
        for key, value in optimizer.state[p].items()
    }
    if world == 3:
        step(optimizer, 1, values)
        dcp.save(tensors, checkpoint_id=path / "saved")
    else:
        dcp.load(tensors, checkpoint_id=path / "saved")
    found = {key: whole_of(value) for key, value in tensors.items()}
    if world == 3 and dist.get_rank() == 0:
        torch.save(found, path / "values")
    dist.barrier()
    for key, value in torch.load(path / "values").items():
        assert torch.equal(found[key], value), key


def test_a_distributed_checkpoint_loads_on_any_number_of_processes(tmp_path: Path) -> None:
    on_processes(3, 2, 1)(saved_and_loaded)(tmp_path, path=tmp_path)
