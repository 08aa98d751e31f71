"""Times, taken in rounds: A B C, C A B, so that noise of the machine hits all alike.

The order is drawn anew for each round, the same in every run: who always came after the same one
would always find what that one leaves to be written back. Who is slow sits out rounds, evenly.

In between, everybody else's tensors have passed through the caches: what is left of one's own is
what a last-level cache holds of them all, and for a case that small the floor finds as much of it.
A GPU's cache is written over before every step.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fused_adafactor.cli.bench.cases import Case, draw
from fused_adafactor.cli.bench.peers import OURS, Candidate, Params, Step
from fused_adafactor.cli.bench.roofs import roofs

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 301
# A case above the first is no longer held by a cache that everybody's gradients pass through, and
# above the second not by one that everybody's parameters do. What is shared saves memory.
_SHARE_GRADS, _SHARE_PARAMS = 2**27, 2**29
_MORE_THAN_A_GPU_CACHE = 2**28


@dataclass(frozen=True)
class StepTime:
    """Wall time of a step in milliseconds, over all rounds that it took part in."""

    p20_ms: float
    median_ms: float
    p80_ms: float
    rounds: int


@dataclass(frozen=True)
class Times:
    """Who was timed, and who was not.

    Attributes:
        steps: By name, roofs included.
        absent: Optional candidates that failed or took too long, with the reason.
    """

    steps: dict[str, StepTime]
    absent: dict[str, str]


def time_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    contestants: Sequence[Candidate],
    seconds: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Times:
    """Time candidates and the roofs, each once a round.

    Args:
        case: What to step.
        dtype: Of parameters and gradients.
        device: Where.
        contestants: Who steps; all of them are installed.
        seconds: About how long. There are at least a few rounds whatever they take; an optional
            candidate for which these few take longer is left out.
        on_progress: Told the share that is done, from 0 to 1.
    """
    timed = _timer(device)
    steps, absent = _first_steps(case, dtype, device, contestants)
    optional = {candidate.name for candidate in contestants if candidate.optional}
    second = {name: timed(step) for name, step in steps.items()}
    for name in optional & second.keys():
        if _LEAST_ROUNDS * second[name] > seconds:
            absent[name] = f"{_LEAST_ROUNDS} steps of {second[name]:.2g} s exceed {seconds:g} s"
            del steps[name], second[name]
    share = seconds / len(steps)
    rounds = {name: _clamped(share / took) for name, took in second.items()}
    # A round that is taken by the roofs alone would find all of their memory in a cache.
    most = rounds.get(OURS, _MOST_ROUNDS)
    rounds = {name: min(count, most) for name, count in rounds.items()}
    ms: dict[str, list[float]] = {name: [] for name in steps}
    with _no_collecting():
        for done, names in enumerate(_in_turn(rounds), start=1):
            for name in names:
                ms[name].append(1e3 * timed(steps[name]))
            on_progress(done / max(rounds.values()))
    return Times({name: _summary(times) for name, times in ms.items()}, absent)


def _first_steps(
    case: Case, dtype: torch.dtype, device: torch.device, contestants: Sequence[Candidate]
) -> tuple[dict[str, Step], dict[str, str]]:
    """Everybody who can step, with the first one taken: it makes the state, or compiles."""
    parameter_bytes = case.elements * dtype.itemsize
    tensors = _Tensors(case, dtype, device)
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for candidate in contestants:
        reason = candidate.unfit(case)
        if reason is None:
            try:
                step = candidate.stepper(tensors.params())
                step()
            except Exception as error:
                if not candidate.optional:
                    raise
                reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
            else:
                steps[candidate.name] = step
        if reason is not None:
            absent[candidate.name] = reason
    steps |= roofs(parameter_bytes, device, shared=parameter_bytes >= _SHARE_PARAMS)
    return steps, absent


class _Tensors:
    """Parameters with gradients for one candidate after the other."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        parameter_bytes = case.elements * dtype.itemsize
        self._share_grads = parameter_bytes >= _SHARE_GRADS
        self._share_params = parameter_bytes >= _SHARE_PARAMS
        self._grads = draw(case, dtype, device, seed=1)
        self._params = self._with_grads([nn.Parameter(t) for t in draw(case, dtype, device, 0)])

    def params(self) -> Params:
        """Of a candidate's own, unless they are so large that it makes no difference."""
        if self._share_params:
            return self._params
        return self._with_grads([nn.Parameter(p.detach().clone()) for p in self._params])

    def _with_grads(self, params: Params) -> Params:
        for param, grad in zip(params, self._grads, strict=True):
            param.grad = grad if self._share_grads else grad.clone()
        return params


def _clamped(rounds: float) -> int:
    return int(min(max(rounds, _LEAST_ROUNDS), _MOST_ROUNDS))


def _in_turn(rounds: Mapping[str, int]) -> Iterator[list[str]]:
    """Who steps in each round, and in what order; who has fewer than others sits out evenly."""
    most = max(rounds.values())
    order = random.Random(0)
    last: list[str] = []
    for number in range(most):
        names = [
            name
            for name, wanted in rounds.items()
            if (number + 1) * wanted // most > number * wanted // most
        ]
        order.shuffle(names)
        while len(names) > 1 and names[:1] == last:  # its tensors would be in the caches still
            order.shuffle(names)
        last = names[-1:]
        yield names


def _timer(device: torch.device) -> Callable[[Step], float]:
    """What takes the seconds of a step, from an idle device to an idle device."""
    on_cuda = device.type == "cuda"
    cache = torch.empty(_MORE_THAN_A_GPU_CACHE if on_cuda else 0, dtype=torch.uint8, device=device)

    def timed(step: Step) -> float:
        cache.zero_()
        _wait_for(device)
        started = time.perf_counter()
        step()
        _wait_for(device)
        return time.perf_counter() - started

    return timed


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def _no_collecting() -> Iterator[None]:
    """Without garbage collection: whoever is stepping then would pay for what others left."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _summary(ms: list[float]) -> StepTime:
    p20, _, _, p80 = statistics.quantiles(ms, n=5, method="inclusive")
    return StepTime(p20, statistics.median(ms), p80, len(ms))
