"""Ranks that are threads of one process, whose sums are added up by hand.

What they step are plain tensors of one device that stand for the parts of a parameter. So nothing
is needed of torch.distributed, nor a device for each rank.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import launching, sharding
from fused_adafactor.spec import Shard
from tests.stepping import params_of

_identity = id


class Ranks:
    """Ranks on a mesh, each of whose dimensions splits one of all parameters.

    Args:
        sizes: Of the mesh.
        dims: Which dimension of a parameter each dimension of the mesh splits.
        monkeypatch: Has the optimizers see parts.
    """

    def __init__(
        self, sizes: Sequence[int], dims: Sequence[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.places = list(itertools.product(*map(range, sizes)))
        self.sizes, self.dims = sizes, dims
        self._shards: dict[int, Shard] = {}
        self._barrier = threading.Barrier(len(self.places), timeout=120)
        self._buffers: list[Sequence[Tensor]] = [() for _ in self.places]
        of_others = sharding.shard_of
        monkeypatch.setattr(
            sharding,
            "shard_of",
            lambda id, param: self._shards.get(_identity(param)) or of_others(id, param),
        )
        lock = threading.Lock()
        for name in ("prepare", "_launch"):  # Triton compiles one kernel after the other
            monkeypatch.setattr(launching.Executor, name, _alone(lock, name))

    def part(self, value: Tensor, place: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """What a rank has of a tensor, and its first element, by dimension."""
        offset = [0] * value.dim()
        for at, size, dim in zip(place, self.sizes, self.dims, strict=True):
            length = -(-value.shape[dim] // size)
            offset[dim] = min(at * length, value.shape[dim])
            value = value[(slice(None),) * dim + (slice(offset[dim], offset[dim] + length),)]
        return value.clone(), tuple(offset)

    def optimizers(
        self, build: Callable[[list[Tensor]], Any], values: Sequence[Tensor]
    ) -> list[Any]:
        """An optimizer of each rank, of its parts of these values."""
        made = []
        for rank, place in enumerate(self.places):
            params = []
            for value in values:
                part, offset = self.part(value.detach(), place)
                params.append(torch.nn.Parameter(part))
                split = [
                    tuple(axis for axis, on in enumerate(self.dims) if on == dim)
                    for dim in range(value.dim())
                ]
                self._shards[_identity(params[-1])] = Shard(
                    whole=tuple(value.shape),
                    strides=value.stride(),
                    offset=offset,
                    split=tuple(split),
                    mesh="by hand",
                )
            optimizer = build(params)
            optimizer._engine._processes = _Processes(functools.partial(self._sum, rank))
            made.append(optimizer)
        return made

    def step(self, optimizers: Sequence[Any], grads: Sequence[Tensor]) -> None:
        """One step of all ranks."""
        for optimizer, place in zip(optimizers, self.places, strict=True):
            for p, g in zip(params_of(optimizer), grads, strict=True):
                p.grad_dtype = None
                p.grad, _ = self.part(g, place)
        with ThreadPoolExecutor(len(optimizers)) as threads:
            for done in [threads.submit(optimizer.step) for optimizer in optimizers]:
                done.result()

    def _sum(self, rank: int, message: Any) -> None:
        """All-reduce: the first rank of a group adds up what all of them have, in their order."""
        self._buffers[rank] = message.buffers
        self._barrier.wait()
        group = [
            other
            for other, place in enumerate(self.places)
            if all(
                axis in message.over or at == mine
                for axis, (at, mine) in enumerate(zip(place, self.places[rank], strict=True))
            )
        ]
        if group[0] == rank:
            for buffers in zip(*(self._buffers[other] for other in group), strict=True):
                total = functools.reduce(torch.add, buffers)
                for buffer in buffers:
                    buffer.copy_(total)
        self._barrier.wait()


def _alone(lock: threading.Lock, name: str) -> Callable[..., None]:
    """A method of an executor, for one thread at a time."""
    method = getattr(launching.Executor, name)

    def alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            method(*args, **kwargs)

    return alone


class _Processes:
    """See ``sharding.Processes``."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take

    def start(self, message: Any) -> Callable[[], None]:
        return functools.partial(self._take, message)
