"""What a step costs the host and what it costs the device, apart, and a step in a CUDA graph.

The time of ``measure.py`` is what a user waits for, from an idle device to an idle device. Here the
host is timed until ``step()`` returns, the device while the host is ahead of it, and steps that
were captured, on so many tensors in turn that no cache holds them from one step to the next. On a
CPU there is no queue and no graph, and all three are the time of the call.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_adafactor.cli.bench.cases import Case, draw
from fused_adafactor.cli.bench.peers import Candidate, Params, Step
from fused_adafactor.cli.bench.roofs import roofs

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_WARM_UP = 3  # steps: the first makes the state, the second is prepared, the third is like all
_FLUSH_BYTES = 2**28  # more than any cache holds
_FLUSHES = 12  # about a millisecond of work: the host gets ahead of the device meanwhile
_CACHES_BETWEEN = 4  # times the cache is written over before a tensor's turn comes again
_MOST_TENSORS = 2**14  # of all sets together


@dataclass(frozen=True)
class DeviceTime:
    """Medians, in milliseconds.

    Attributes:
        host_ms: Until ``step()`` returns, on an idle device.
        device_ms: From the start of its first kernel to the end of its last, the cache cold.
        graph_ms: Of a step in a CUDA graph; None for who cannot be captured.
    """

    host_ms: float
    device_ms: float
    graph_ms: float | None = None


def measure_device(
    contestants: Sequence[Candidate],
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> tuple[dict[str, DeviceTime], dict[str, str]]:
    """Time candidates and the roofs, one after the other.

    Args:
        contestants: Who steps.
        case: What to step.
        dtype: Of parameters and gradients.
        device: Where.
        seconds: About how long, together.

    Returns:
        Times by name, and who failed with the reason.
    """
    parameter_bytes = case.elements * dtype.itemsize
    copies = _sets(parameter_bytes, len(case.shapes), device)
    timed = _Timed(device, seconds / (3 * (len(contestants) + 2)))

    def sets(count: int) -> Iterator[Params]:
        for number in range(count):
            params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, number)]
            for param, grad in zip(params, draw(case, dtype, device, copies), strict=True):
                param.grad = grad
            yield params

    def apart(candidate: Candidate) -> DeviceTime | str:
        try:
            step = candidate.stepper(next(sets(1)))
            for _ in range(_WARM_UP):
                step()
            host_ms, device_ms, graph_ms = timed.host(step), timed.on_device(step), None
            if candidate.capturable is not None:
                del step
                graphed = [candidate.capturable(params).step for params in sets(copies)]
                graph_ms = timed.in_graph(graphed)
            return DeviceTime(host_ms, device_ms, graph_ms)
        except Exception as error:
            return traceback.format_exception_only(error)[-1].strip().splitlines()[0]

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        found = {candidate.name: apart(candidate) for candidate in contestants}
        memory = [roofs(parameter_bytes, device, shared=True) for _ in range(copies)]
        for name in memory[0]:
            kinds: list[Step] = [steps[name] for steps in memory]
            found[name] = DeviceTime(
                timed.host(kinds[0]), timed.on_device(kinds[0]), timed.in_graph(kinds)
            )
    return (
        {name: times for name, times in found.items() if isinstance(times, DeviceTime)},
        {name: reason for name, reason in found.items() if isinstance(reason, str)},
    )


def _sets(parameter_bytes: int, tensors: int, device: torch.device) -> int:
    """Of parameters and gradients, to step in turn."""
    cache = 0
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = math.ceil(_CACHES_BETWEEN * cache / (2 * max(1, parameter_bytes)))
    return max(2, min(wanted, _MOST_TENSORS // tensors))


class _Timed:
    """Takes times on one device.

    Args:
        device: Where.
        seconds: For each of them, about.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self._seconds = seconds
        flushed = _FLUSH_BYTES if self._on_cuda else 0
        self._cache = torch.empty(flushed, dtype=torch.uint8, device=device)

    def host(self, step: Step) -> float:
        """Until a step returns."""

        def once() -> float:
            self._wait()
            started = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - started)

        return self._median(once)

    def on_device(self, step: Step) -> float:
        """Between two events of its queue, which has something to do before the first."""

        def once() -> float:
            for _ in range(_FLUSHES):
                self._cache.zero_()
            return self._between(step)

        return self._median(once)

    def in_graph(self, steps: Sequence[Step]) -> float:
        """Each of the steps captured once, one after the other; the time of one."""
        for step in itertools.chain(steps, steps):
            step()
        replay = self._capture(steps)
        replay()
        return self._median(lambda: self._between(replay)) / len(steps)

    def _capture(self, steps: Sequence[Step]) -> Callable[[], object]:
        if not self._on_cuda:
            return lambda: [step() for step in steps]
        self._wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        return graph.replay

    def _between(self, work: Callable[[], object]) -> float:
        if not self._on_cuda:
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        make: Any = torch.cuda.Event  # which torch has not annotated
        first, last = make(enable_timing=True), make(enable_timing=True)
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def _median(self, once: Callable[[], float]) -> float:
        until = time.perf_counter() + self._seconds
        ms: list[float] = []
        while len(ms) < _LEAST_ROUNDS or (len(ms) < _MOST_ROUNDS and time.perf_counter() < until):
            ms.append(once())
        return statistics.median(ms)

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
