"""Real processes that talk over gloo, and a small model that they train."""

from __future__ import annotations

import datetime
import functools
import importlib
import inspect
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# Imported once, by the process that all others are forked from.
_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "tests.dialects"]
_IMPORTED += ["fused_adafactor.dialects.torch", "fused_adafactor.dialects.hf", "pytest"]
# A test waits no longer than this for a process that hangs; seconds.
_PATIENCE = 120.0


def on_processes(*worlds: int, timeout: float = 60.0, alive: int | None = None) -> Any:
    """Run a test in as many processes, for each of these numbers one after the other; all must end.

    Args:
        worlds: How many processes. A body that has an argument ``world`` learns it.
        timeout: Of the process group; seconds.
        alive: How many must not die of themselves; None for all.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        names = list(inspect.signature(body).parameters)

        @functools.wraps(body)
        def test(tmp_path: Path, **kwargs: Any) -> None:
            if "tmp_path" in names:
                kwargs["tmp_path"] = tmp_path
            for number, world in enumerate(worlds):
                given = {**kwargs, "world": world} if "world" in names else kwargs
                store = tmp_path / f"store{number}"
                where = (body.__module__, body.__name__)
                run(where, world, store, timeout, given, world if alive is None else alive)

        wanted = [name for name in names if name not in ("world", "tmp_path")]
        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in wanted]
        fixture = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([fixture, *parameters])  # type: ignore[attr-defined]
        return test

    return decorate


def run(
    where: tuple[str, str],
    world: int,
    store: Path,
    timeout: float,
    kwargs: dict[str, Any],
    alive: int,
) -> None:
    """Start the processes, wait for them, and fail with what they have to say."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    pipes, children = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (where, rank, world, str(store), timeout, kwargs, alive == world, theirs)
        child = context.Process(target=_main, args=arguments, daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    said = []
    for rank, (pipe, child) in enumerate(zip(pipes, children, strict=True)):
        try:
            said.append(pipe.recv() if pipe.poll(_PATIENCE) else f"rank {rank} hangs")
        except EOFError:
            said.append(None)
        child.join(0 if said[-1] else _PATIENCE)
    for child in children:
        child.kill()
    reports = [f"rank {rank}:\n{text}" for rank, text in enumerate(said) if text]
    assert not reports, "\n".join(reports)
    assert said.count("") >= alive, f"ended well: {said.count('')} of {world}"


def _main(
    where: tuple[str, str],
    rank: int,
    world: int,
    store: str,
    timeout: float,
    kwargs: dict[str, Any],
    ends_together: bool,
    pipe: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        torch.manual_seed(0)
        body = getattr(importlib.import_module(where[0]), where[1])
        getattr(body, "__wrapped__", body)(**kwargs)
        if ends_together:
            dist.barrier()
    except BaseException:
        pipe.send(traceback.format_exc())
        os._exit(1)
    pipe.send("")
    os._exit(0)  # gloo's threads are not waited for


# --- what is trained -----------------------------------------------------------------------------


class Model(nn.Module):
    """Uneven parts, on four processes empty ones, a scale that is never split, a frozen layer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(6, 13, dtype=dtype)
        self.second = nn.Linear(13, 9, dtype=dtype)
        self.frozen = nn.Linear(9, 9, dtype=dtype).requires_grad_(False)
        self.last = nn.Linear(9, 2, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(3, 2, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.second(self.first(x).tanh()).tanh())
        return self.last(x) * self.scale.square().mean()


def batch(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The same on all processes, so that the mean of their gradients is that of one process."""
    return torch.randn(8, 6, dtype=dtype, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """One backward pass, of one batch."""
    dtype = next(model.parameters()).dtype
    (scale * model(batch(step, dtype)).square().mean()).backward()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int] = range(4)
) -> None:
    """Steps of these numbers."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def shard(model: Model, mesh: Any, **options: Any) -> Model:
    """FSDP2, each layer by itself; the scale stays whole on every process."""
    from torch.distributed.fsdp import fully_shard

    for layer in (model.first, model.second, model.frozen, model.last):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, ignored_params={model.scale}, **options)
    return model
