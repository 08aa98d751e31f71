"""First moments of 8 bits of distributed parameters: their blocks are those of a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, HF, OPTAX, Dialect
from tests.distributed.processes import on_processes
from tests.distributed.ranks import (
    PLACEMENTS,
    assert_close_parts,
    distribute,
    mesh_of,
    on_every_rank,
)
from tests.distributed.test_processes import whole_of

INT8 = {"momentum_dtype": torch.int8}
# A dialect with a first moment, by where it is kept, and what it is given for that.
WITH_MOMENTS: list[tuple[Dialect, dict[str, Any]]] = [
    (HF, {"beta1": 0.9}),
    (OPTAX, {"momentum": 0.9}),
    (BIG_VISION, {}),
    (ADAFACTOR_PYTORCH, {}),
]
# What no placement cuts: lines whole, or parts of 32 or 64 elements of them, uneven or empty ones.
FITTING: dict[str, list[tuple[int, ...]]] = {
    "rows": [(13, 70), (128,), (125,), (253,), (3, 40, 33), (5, 64)],
    "second": [(9, 128), (70, 125), (4, 253), (3, 9, 40)],
    "third": [(3, 9, 128), (2, 5, 125)],
    "replicated": [(13, 7), (5,), (3, 4, 5)],
    "hsdp": [(13, 7), (63,), (6, 4, 35)],
    "rows_twice": [(13, 70), (128,), (127,)],
    "rows_and_columns": [(13, 64), (7, 63)],
    "columns_and_rows": [(13, 64), (7, 63)],
    "columns_of_some": [(9, 64), (70, 63)],
}


def pair(dialect: Dialect, values: list[Tensor], placement: str, **kwargs: Any) -> tuple[Any, Any]:
    sizes, placements = PLACEMENTS[placement]
    whole = dialect(values, **{**kwargs, "backend": "reference"}, **INT8)
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh_of(sizes), placements)]
    return whole, dialect(parts, **kwargs, **INT8)


def optimizer_key(dialect: Dialect) -> str:
    """Where the first moment is kept."""
    return dialect.cls.layout.exp_avg  # type: ignore[attr-defined]


def step(optimizer: Any, number: int, values: list[Tensor]) -> None:
    grads = stepping.grad_values(values, number)
    for p, g in zip(stepping.params_of(optimizer), grads, strict=True):
        placed = isinstance(p, DTensor)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if placed else g
    optimizer.step()


@pytest.mark.parametrize("placement", FITTING)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@on_every_rank
def test_blocks_are_those_of_a_single_process(backend: str, placement: str) -> None:
    """In float64 no sum's order decides how an element is rounded."""
    values = stepping.make_params(FITTING[placement], torch.float64)
    whole, distributed = pair(HF, values, placement, beta1=0.9, backend=backend)
    for number in range(4):
        step(whole, number, values)
        step(distributed, number, values)
    assert_close_parts(distributed, whole, 1e-12)
    for p, q in zip(*map(stepping.params_of, (distributed, whole)), strict=True):
        assert distributed.state[p]["exp_avg_scale"].dtype is torch.uint8
        assert distributed.state[p]["exp_avg"].dtype is torch.int8
        assert whole.state[q]["exp_avg_scale"].any()


@pytest.mark.parametrize(("dialect", "momentum"), WITH_MOMENTS, ids=lambda given: str(given)[:10])
@on_every_rank
def test_every_dialect_whichever_dimension_is_a_line(
    dialect: Dialect, momentum: dict[str, Any]
) -> None:
    """(70, 40) and its like have lines of columns in the dialects that factor the two largest."""
    shapes = {"rows": [(70, 40), (128, 33), (64, 64), (125,)], "second": [(70, 128), (96, 125)]}
    for placement in shapes:
        for backend in ("cpp", "reference"):
            values = stepping.make_params(shapes[placement], torch.float64)
            whole, distributed = pair(dialect, values, placement, backend=backend, **momentum)
            for number in range(3):
                step(whole, number, values)
                step(distributed, number, values)
            assert_close_parts(distributed, whole, 1e-12)


CUT = [
    (HF, (20,), [Shard(0)], "dimension 0"),
    (HF, (9, 40), [Shard(1)], "dimension 1"),
    (HF, (3, 9, 40), [Shard(2)], "dimension 2"),
    (OPTAX, (300, 9), [Shard(0)], "dimension 0"),  # unfactored: 75 rows of 9
    (OPTAX, (3, 64), [Shard(1)], "not in one piece"),
    (ADAFACTOR_PYTORCH, (8, 4, 32), [Shard(0)], "scattered"),
]


@pytest.mark.parametrize(("dialect", "shape", "placements", "reason"), CUT, ids=str)
@on_every_rank
def test_a_block_that_would_be_cut_is_refused(
    dialect: Dialect, shape: tuple[int, ...], placements: list[Placement], reason: str
) -> None:
    """By every process, also by those whose own part begins with a block."""
    momentum = dict(WITH_MOMENTS[[d for d, _ in WITH_MOMENTS].index(dialect)][1])
    if dialect is OPTAX:
        momentum["min_dim_size_to_factor"] = 128
    (value,) = stepping.make_params([shape])
    (part,) = distribute([value], mesh_of((4,)), placements)
    optimizer: Any = dialect([torch.nn.Parameter(part)], **momentum, **INT8)
    with pytest.raises(TypeError, match=rf"parameter #0.*{reason}.*torch\.bfloat16"):
        step(optimizer, 0, [value])
    assert not optimizer.state


@on_every_rank
def test_lines_of_columns_whose_rows_are_split_are_refused() -> None:
    """A transposed parameter: a single process has its blocks along the rows' dimension."""
    (value,) = stepping.make_params([(40, 64)])
    part = distribute_tensor(value.detach(), mesh_of((4,)), [Shard(0)])
    turned = DTensor.from_local(
        part.to_local().mT.contiguous().mT,
        part.device_mesh,
        part.placements,
        run_check=False,
        shape=part.shape,
        stride=(1, 40),
    )
    optimizer: Any = HF([torch.nn.Parameter(turned)], beta1=0.9, **INT8)
    with pytest.raises(TypeError, match="lies together in memory is split"):
        step(optimizer, 0, [value])


@on_every_rank
def test_other_groups_may_have_other_moments() -> None:
    """What the message advises: bfloat16 where a block would be cut."""
    values = stepping.make_params([(20, 40), (20,)], torch.float64)
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh_of((4,)), [Shard(0)])]

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        dtypes = (torch.int8, torch.bfloat16)
        return [{"params": [p], "momentum_dtype": d} for p, d in zip(params, dtypes, strict=True)]

    whole, distributed = HF(groups(values), beta1=0.9), HF(groups(parts), beta1=0.9)
    for number in range(3):
        step(whole, number, values)
        step(distributed, number, values)
    assert_close_parts(distributed, whole, 1e-12)


# --- checkpoints ---------------------------------------------------------------------------------


@on_processes(2)
def test_blocks_load_from_one_process_to_several_and_back() -> None:
    """Also to numbers and from them; optax has lines of columns."""
    mesh = init_device_mesh("cpu", (2,))
    for dialect, momentum in WITH_MOMENTS[:2]:
        values = stepping.make_params([(70, 40), (128,), (64, 96)], torch.float64)
        given: dict[str, Any] = {**momentum, **INT8}
        whole: Any = dialect(values, backend="reference", **given)
        for number in range(2):
            step(whole, number, values)
        for placement in (Shard(0), Replicate()):
            parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, [placement])]
            several: Any = dialect(parts, **given)
            several.load_state_dict(whole.state_dict())
            assert_close_parts(several, whole, 0.0)
            again: Any = dialect(stepping.clone_params(values), backend="reference", **given)
            again.load_state_dict(several.state_dict())
            as_numbers: Any = dialect(parts, **{**given, "momentum_dtype": None})
            saved = several.state_dict()
            for group in saved["param_groups"]:
                group["momentum_dtype"] = None
            as_numbers.load_state_dict(saved)
            back: Any = dialect(parts, **given)
            saved = as_numbers.state_dict()
            for group in saved["param_groups"]:
                group["momentum_dtype"] = torch.int8
            back.load_state_dict(saved)
            for p, q, r in zip(parts, stepping.params_of(again), values, strict=True):
                for key, value in whole.state[r].items():
                    assert torch.equal(whole_of(back.state[p][key]), value), key
                    assert torch.equal(again.state[q][key], value), key
            single: Any = dialect(stepping.clone_params(values), **momentum)
            single.load_state_dict(as_numbers.state_dict())
            for p, q in zip(parts, stepping.params_of(single), strict=True):
                key = optimizer_key(dialect)
                assert torch.equal(whole_of(as_numbers.state[p][key]), single.state[q][key])


def saved_and_loaded(path: Path, world: int) -> None:
    values = stepping.make_params([(70, 40), (256,), (3, 40, 33)])
    mesh = init_device_mesh("cpu", (world,))
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(0)])]
    optimizer: Any = HF(parts, beta1=0.9, **INT8)
    step(optimizer, 0, values)
    tensors = {
        f"{number} {key}": value
        for number, p in enumerate(parts)
        for key, value in optimizer.state[p].items()
    }
    if world == 4:
        step(optimizer, 1, values)
        dcp.save(tensors, checkpoint_id=path / "saved")
    else:
        dcp.load(tensors, checkpoint_id=path / "saved")
    found = {key: whole_of(value) for key, value in tensors.items()}
    if world == 4 and dist.get_rank() == 0:
        torch.save(found, path / "values")
    dist.barrier()
    for key, value in torch.load(path / "values").items():
        assert torch.equal(found[key], value), key


def test_blocks_in_a_distributed_checkpoint_load_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    on_processes(4, 2, 1)(saved_and_loaded)(tmp_path, path=tmp_path)


@on_processes(4)
def test_a_whole_state_loads_where_one_dimension_is_split_twice_and_strided() -> None:
    """FSDP2 over tensor parallelism divides by the later dimension of the mesh first."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 24, dtype=torch.float64))
    whole = HF([p.detach().clone().requires_grad_() for p in model.parameters()])
    for p in stepping.params_of(whole):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(5))
    whole.step()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert "_StridedShard" in str([p.placements for p in model.parameters()])
    optimizer: Any = HF(model.parameters())
    optimizer.load_state_dict(whole.state_dict())
    for p, q in zip(model.parameters(), stepping.params_of(whole), strict=True):
        for key, value in whole.state[q].items():
            mine = optimizer.state[p][key]
            if isinstance(mine, DTensor):
                assert torch.equal(mine.full_tensor(), value), key
