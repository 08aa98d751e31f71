"""The check in front of every time: a step of ours against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_adafactor import Adafactor
from fused_adafactor.cli.bench.cases import Case, draw
from fused_adafactor.dialects import hf

_LR = 1.0  # moves a parameter by about its own size, so that rounding it hides little
_STEPS = 2  # the second is the first that reads old moments
# Roundings of the arithmetic, relative to the update: some ten operations on an element, and four
# sums of terms that are not negative. A sum over lanes, tiles and slabs loses a few units each.
_ROUNDINGS = 64
_ARITHMETIC_UNIT = torch.finfo(torch.float32).eps / 2  # arithmetic is float32 for all narrow dtypes


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


def check_parity(
    case: Case, dtype: torch.dtype, device: torch.device, backend: str, unscaled: bool = False
) -> Parity:
    """Step ours in its dtype, and the reference backend in float64.

    Both start every step from the same parameters, so that an error is one step's. The reference
    steps on the CPU, or on a GPU itself, where a gigabyte would take a CPU minutes.

    Args:
        case: What to step.
        dtype: Of parameters and gradients of ours.
        device: Where.
        backend: Of ours.
        unscaled: transformers' rule without the parameter's scale, in place of torch's.
    """
    home = device if device.type == "cuda" else torch.device("cpu")
    params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, seed=0)]
    # Left to itself, eps1 would be that of float64; and a tensor each saves memory.
    eps = (torch.finfo(dtype).eps, 1e-3)

    def make(params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
        if unscaled:
            return hf.Adafactor(
                params, lr=_LR, relative_step=False, scale_parameter=False, backend=backend
            )
        return Adafactor(params, lr=_LR, eps=eps, backend=backend)

    ours = make(params, backend)
    twins = [nn.Parameter(param.detach().to(home, torch.float64)) for param in params]
    oracles = [make([twin], "reference") for twin in twins]
    checks = []
    for step in range(_STEPS):
        for param, grad in zip(params, draw(case, dtype, device, seed=1 + step), strict=True):
            param.grad = grad
        ours.step()
        for param, twin, oracle in zip(params, twins, oracles, strict=True):
            assert param.grad is not None
            before = twin.detach().clone()
            twin.grad = param.grad.to(home, torch.float64)
            oracle.step()
            twin.grad = None
            got = param.detach().to(home, torch.float64)
            checks.append(compare(got, twin.detach(), before, dtype))
            twin.data.copy_(param.detach())
    return max(checks, key=lambda check: check.share)


def compare(got: Tensor, wanted: Tensor, before: Tensor, dtype: torch.dtype) -> Parity:
    """How far an update is from the true one, where the new parameter was rounded to a dtype."""
    update = wanted - before
    size = float(update.norm())
    rounding = wanted.abs().mul_(torch.finfo(dtype).eps / 2)
    bound = rounding.add_(update.abs_(), alpha=_ROUNDINGS * _ARITHMETIC_UNIT).norm()
    error = float((got - wanted).norm()) / size
    return Parity(error if math.isfinite(error) else None, float(bound) / size)
