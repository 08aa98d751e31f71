"""Threads that stand for processes, and parameters that are distributed over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.common_distributed import MultiThreadedTestCase

from tests.stepping import assert_close, params_of

WORLD = 4

# Which mesh, and how each of its dimensions splits a parameter.
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows": ((4,), (Shard(0),)),
    "second": ((4,), (Shard(1),)),
    "third": ((4,), (Shard(2),)),
    "replicated": ((4,), (Replicate(),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "rows_twice": ((2, 2), (Shard(0), Shard(0))),
    "rows_and_columns": ((2, 2), (Shard(0), Shard(1))),
    "columns_and_rows": ((2, 2), (Shard(1), Shard(0))),
    "columns_of_some": ((2, 2), (Shard(1), Replicate())),
    "one_process_a_row": ((1, 4), (Shard(0), Shard(1))),
}


class Ranks(MultiThreadedTestCase):
    """A test whose body runs in each of some threads, as in a process."""

    world = WORLD

    @property
    def world_size(self) -> int:
        return self.world

    def runTest(self) -> None:
        """What unittest asks for; the body is given to ``on_ranks``."""


def on_ranks(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in threads that stand for so many processes; all must pass."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(*args: Any, **kwargs: Any) -> None:
            class Case(Ranks):
                world = count

                def runTest(self) -> None:
                    try:
                        body(*args, **kwargs)
                    except pytest.fail.Exception as failure:  # no Exception: torch would drop it
                        raise AssertionError(str(failure)) from failure

            case = Case("runTest")
            case.setUp()
            try:
                case._spawn_threads()
                case.runTest()
            finally:
                case.tearDown()

        return test

    return decorate


on_every_rank = on_ranks(WORLD)


def mesh_of(sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("one", "two")[: len(sizes)])


def fitting(shapes: Sequence[tuple[int, ...]], placements: Sequence[Placement]) -> list[Any]:
    """Shapes that have the dimensions that are split."""
    dims = [getattr(placement, "dim", -1) for placement in placements]
    return [shape for shape in shapes if len(shape) > max(dims)]


def distribute(
    values: Sequence[Tensor], mesh: DeviceMesh, placements: Sequence[Placement]
) -> list[DTensor]:
    """The same values on all processes, each with its part of them."""
    return [distribute_tensor(v.detach().clone(), mesh, placements) for v in values]


def assert_close_parts(
    distributed: torch.optim.Optimizer, whole: torch.optim.Optimizer, tolerance: float
) -> None:
    """This process' parts of parameters and state against those of a single process."""
    for p, q in zip(params_of(distributed), params_of(whole), strict=True):
        what = f"of shape {tuple(q.shape)}, {getattr(p, 'placements', 'plain')}"
        compare = assert_close_part if isinstance(p, DTensor) else assert_close
        compare(p, q, tolerance, f"parameter {what}")
        assert list(distributed.state[p]) == list(whole.state[q])
        for key, value in whole.state[q].items():
            mine = distributed.state[p][key]
            if isinstance(mine, DTensor):
                if key in ("exp_avg", "exp_avg_sq_hat"):  # a single process keeps it as a matrix
                    value = value.reshape(mine.shape)
                assert_close_part(mine, value, tolerance, f"{key} {what}")
            else:  # one number, or of a plain parameter
                wanted = torch.as_tensor(value)
                assert_close(torch.as_tensor(mine), wanted, tolerance, f"{key} {what}")


def assert_close_part(mine: DTensor, whole: Tensor, tolerance: float, what: str) -> None:
    """By torch's own way of splitting; relative to the largest element of all parts."""
    assert mine.shape == whole.shape, what
    wanted = distribute_tensor(whole.detach().clone(), mine.device_mesh, mine.placements)
    part, wanted_part = mine.detach().to_local().double(), wanted.to_local().double()
    assert part.shape == wanted_part.shape, what
    size = whole.detach().abs().max().double()
    assert ((part - wanted_part).abs() <= tolerance * size).all(), what
