"""What ``bench`` measures, without what it prints: cases, candidates, a parity check, times.

A case's candidates step in turn, A B C A B C, each on tensors of its own, so that noise of the
machine hits all alike and none finds its tensors in the cache because it stepped last.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fused_adafactor import Adafactor

OURS, ROOF = "fused_adafactor", "roof"
TORCH_PATHS = ("torch.optim.Adafactor for-loop", "torch.optim.Adafactor foreach")
TRANSFORMERS = "transformers.Adafactor"
YARDSTICK = "torch.optim.AdamW fused"

_LR = 1e-3  # so small that hundreds of steps on one gradient leave ordinary numbers
_WARM_UP_ROUNDS = 2  # the first step makes the state, the second finds it
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 301

_PARITY_LR = 1.0  # moves a parameter by about its own size, so that rounding it hides little
_PARITY_STEPS = 2  # the second is the first that reads old moments
# Roundings of the arithmetic, relative to the update: some ten operations on an element, and four
# sums of terms that are not negative. A sum over lanes, tiles and slabs loses a few units each.
_ROUNDINGS = 64
_ARITHMETIC_UNIT = torch.finfo(torch.float32).eps / 2  # arithmetic is float32 for all narrow dtypes

_LOW_AND_FULL = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Parameters to step.

    Attributes:
        name: For ``--case`` and the table.
        shapes: One per tensor.
        dtypes: Measured one after the other.
        full: Too big for every day: measured where it is asked for.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    full: bool = False

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


_NORM = ((768,), (768,))
_GPT2_BLOCK = (
    *_NORM,
    *((768, 2304), (2304,), (768, 768), (768,)),
    *_NORM,
    *((768, 3072), (3072,), (3072, 768), (768,)),
)

CASES = (
    Case("1024x1024", ((1024, 1024),), _LOW_AND_FULL),
    Case("2048x2048", ((2048, 2048),), _LOW_AND_FULL),
    Case("stack-8x512x512", ((8, 512, 512),)),
    Case("300-vectors-1024", ((1024,),) * 300),
    Case("conv-320x320x3x3", ((320, 320, 3, 3),)),
    Case("lora-32-pairs", ((16, 4096), (4096, 16)) * 32),
    Case("4096x4096", ((4096, 4096),), _LOW_AND_FULL, full=True),
    Case(
        "gpt2-124m",
        ((50257, 768), (1024, 768), *_GPT2_BLOCK * 12, *_NORM),
        _LOW_AND_FULL,
        full=True,
    ),
)


@dataclass(frozen=True)
class Candidate:
    """An optimizer to time.

    Attributes:
        name: For the record.
        make: Makes it from the parameters.
        needs: A module that may not be installed; imported by ``make`` only.
    """

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    needs: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot run; None if it can."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"


def candidates(backend: str) -> tuple[Candidate, ...]:
    """Everything that is timed, with the backend asked for in ours."""
    for_loop, foreach = TORCH_PATHS
    return (
        Candidate(OURS, lambda params: Adafactor(params, lr=_LR, backend=backend)),
        Candidate(for_loop, lambda p: torch.optim.Adafactor(p, lr=_LR, foreach=False)),
        Candidate(foreach, lambda p: torch.optim.Adafactor(p, lr=_LR, foreach=True)),
        Candidate(TRANSFORMERS, _transformers, needs="transformers"),
        Candidate(YARDSTICK, lambda p: torch.optim.AdamW(p, lr=_LR, fused=True)),
    )


def _transformers(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    make = importlib.import_module("transformers.optimization").Adafactor
    options = {"relative_step": False, "scale_parameter": True, "warmup_init": False}
    return cast(torch.optim.Optimizer, make(params, lr=_LR, **options))


@dataclass(frozen=True)
class Parity:
    """How far ours is from float64, at the tensor and the step that come nearest to the bound.

    Attributes:
        error: Of the update: norm of the difference over the norm of the true update; None where
            that is no finite number.
        bound: Of the error: what rounding the new parameter to its dtype and float32 arithmetic
            can explain.
    """

    error: float | None
    bound: float

    @property
    def passed(self) -> bool:
        """Whether times may be reported."""
        return self.error is not None and self.error <= self.bound

    @property
    def share(self) -> float:
        """Error over bound."""
        return math.inf if self.error is None else self.error / self.bound


@dataclass(frozen=True)
class StepTime:
    """Wall time of a step in milliseconds, over all rounds."""

    p20_ms: float
    median_ms: float
    p80_ms: float
    rounds: int


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Normally distributed tensors of a case, the same for everybody who gives this seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in case.shapes]


def check_parity(case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> Parity:
    """Step ours in its dtype, and the reference backend on the CPU in float64.

    Both start every step from the same parameters, so that an error is one step's.
    """
    params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, seed=0)]
    ours = Adafactor(params, lr=_PARITY_LR, backend=backend)
    # Left to itself, eps1 would be that of float64; and a tensor each saves memory.
    eps = (torch.finfo(dtype).eps, 1e-3)
    twins = [nn.Parameter(param.detach().cpu().double()) for param in params]
    oracles = [Adafactor([t], lr=_PARITY_LR, eps=eps, backend="reference") for t in twins]
    checks = []
    for step in range(_PARITY_STEPS):
        for param, grad in zip(params, draw(case, dtype, device, seed=1 + step), strict=True):
            param.grad = grad
        ours.step()
        for param, twin, oracle in zip(params, twins, oracles, strict=True):
            assert param.grad is not None
            before = twin.detach().clone()
            twin.grad = param.grad.cpu().double()
            oracle.step()
            twin.grad = None
            checks.append(_compare(param.detach().cpu().double(), twin.detach(), before, dtype))
            twin.data.copy_(param.detach())
    return max(checks, key=lambda check: check.share)


def _compare(got: Tensor, wanted: Tensor, before: Tensor, dtype: torch.dtype) -> Parity:
    update = wanted - before
    size = float(update.norm())
    rounding = wanted.abs().mul_(torch.finfo(dtype).eps / 2)
    bound = rounding.add_(update.abs_(), alpha=_ROUNDINGS * _ARITHMETIC_UNIT).norm()
    error = float((got - wanted).norm()) / size
    return Parity(error if math.isfinite(error) else None, float(bound) / size)


def time_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    contestants: Sequence[Candidate],
    seconds: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, StepTime]:
    """Time candidates and the roof in turn.

    Args:
        case: What to step.
        dtype: Of parameters and gradients.
        device: Where.
        contestants: Who steps; all of them can run.
        seconds: About how long; there are at least a few rounds whatever they take.
        on_progress: Told the share that is done, from 0 to 1.

    Returns:
        Times by name; the roof's is under ``ROOF``.
    """
    steps = {c.name: _stepper(c, case, dtype, device) for c in contestants}
    steps[ROOF] = _roof(case, dtype, device)
    warm = 0.0
    for _ in range(_WARM_UP_ROUNDS):
        warm = sum(_timed(step, device) for step in steps.values())
    rounds = min(max(int(seconds / warm), _LEAST_ROUNDS), _MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in steps}
    collects = gc.isenabled()
    gc.disable()  # whoever is stepping when it sets in would pay for what others left
    try:
        for done in range(1, rounds + 1):
            for name, step in steps.items():
                times[name].append(1e3 * _timed(step, device))
            on_progress(done / rounds)
    finally:
        if collects:
            gc.enable()
    return {name: _summary(ms) for name, ms in times.items()}


def _stepper(
    candidate: Candidate, case: Case, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, seed=0)]
    for param, grad in zip(params, draw(case, dtype, device, seed=1), strict=True):
        param.grad = grad
    return candidate.make(params).step


def _roof(case: Case, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Read g, read p, write p: the least that any optimizer does, as one call on one tensor."""
    flat = Case(ROOF, ((case.elements,),))
    (param,), (grad,) = draw(flat, dtype, device, seed=0), draw(flat, dtype, device, seed=1)
    return lambda: torch.add(param, grad, alpha=-_LR, out=param)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds, from an idle device to an idle device."""
    _wait_for(device)
    started = time.perf_counter()
    step()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(ms: list[float]) -> StepTime:
    p20, _, _, p80 = statistics.quantiles(ms, n=5, method="inclusive")
    return StepTime(p20, statistics.median(ms), p80, len(ms))
