"""What an optimizer keeps and what its step allocates, counted by torch's allocators."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fused_adafactor.cli.bench.cases import Case, draw
from fused_adafactor.cli.bench.peers import Candidate

_STEPS = 2  # the first makes the state and what is kept beside it, the second is like all others


@dataclass(frozen=True)
class Memory:
    """Bytes of an optimizer.

    Attributes:
        state_bytes: Of all tensors in its state.
        peak_bytes: Of everything else that it had allocated at the worst moment since it was
            made, what it keeps between steps included.
    """

    state_bytes: int
    peak_bytes: int


def measure_memory(
    contestants: Sequence[Candidate], case: Case, dtype: torch.dtype, device: torch.device
) -> dict[str, Memory]:
    """Make and step optimizers, one by one, and count what they allocate above params and grads.

    What torch's allocators hand out is seen, and nothing else: not Python's objects, and not what
    a native library takes from malloc, which for ours is small buffers of every thread, about
    100 kB and sixteen lines of the widest tensor. On a GPU, bytes are counted as the allocator
    rounds them, to 512 a tensor, and step counts that lie on the CPU are state only.
    """
    params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, seed=0)]
    for param, grad in zip(params, draw(case, dtype, device, seed=1), strict=True):
        param.grad = grad

    def of(candidate: Candidate) -> Memory:
        optimizer: torch.optim.Optimizer | None = None

        def make_and_step() -> None:
            nonlocal optimizer
            optimizer = candidate.make(params)
            for _ in range(_STEPS):
                optimizer.step()

        peak = _peak_of(make_and_step, device)
        assert optimizer is not None
        state = _state_tensors(optimizer)
        counted = sum(t.nbytes for t in state if t.device.type == device.type)
        return Memory(sum(t.nbytes for t in state), peak - counted)

    gc.collect()  # what others left would be given back in between
    return {candidate.name: of(candidate) for candidate in contestants}


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return [entry for entry in entries if isinstance(entry, Tensor)]


def _peak_of(work: Callable[[], None], device: torch.device) -> int:
    """Bytes at the worst moment, above what there was before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    try:
        work()
    finally:
        with _quiet():
            profiler.stop()
    live = peak = 0
    for change in _allocations(profiler):
        live += change
        peak = max(peak, live)
    return peak


def _allocations(profiler: profile) -> Iterator[int]:
    """Bytes of each allocation, negative for those given back, as they came.

    Only the written trace has them one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    for change in sorted(changes, key=lambda event: event["ts"]):
        yield change["args"]["Bytes"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without standard error, where torch's profiler logs that it starts and stops."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
