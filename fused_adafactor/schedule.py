"""Schedules of the step t: the moment decays beta_t (K3, K7) and the relative step size rho_t (K4).

A schedule is data: a frozen, hashable record that is called with t. t counts from 1 and is either
a Python float (the step counter lives on the host) or a 0-d float64 tensor (it lives on a device,
and nothing may wait for it); the same expression serves both. Leaf: imports torch and the standard
library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor


def minimum(a: Number, b: Number) -> Number:
    """Smaller of two numbers, without reading a device tensor on the host."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(*_as_tensors(a, b))
    return min(a, b)


def maximum(a: Number, b: Number) -> Number:
    """Larger of two numbers, without reading a device tensor on the host."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(*_as_tensors(a, b))
    return max(a, b)


def _as_tensors(a: Number, b: Number) -> tuple[Tensor, Tensor]:
    # torch wants one device: that of the step, of which a function may have made a host tensor.
    like = min((x for x in (a, b) if isinstance(x, Tensor)), key=lambda x: x.device.type == "cpu")
    first, second = (
        x if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)
        for x in (a, b)
    )
    return first.to(like.device), second.to(like.device)


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, t: Number) -> Number:
        """Return the value, whatever t is."""
        return self.value


@dataclass(frozen=True)
class PowerDecay:
    """beta_t = min(cap, 1 - max(t - offset, 1)^-exponent): arXiv 1804.04235, section 7.2.

    Attributes:
        exponent: c > 0 of the paper (0.8); torch, transformers and Keras spell it as -0.8.
        offset: Steps to forget, as optax' and big_vision's ``decay_offset``. Their code raises a
            negative number to a power while t <= offset and returns NaN; here beta stays 0 until
            then.
        cap: Largest value, as big_vision's ``beta2_cap``; None for no cap.
    """

    exponent: float
    offset: int = 0
    cap: float | None = None

    def __call__(self, t: Number) -> Number:
        """Return beta_t."""
        since = maximum(t - self.offset, 1.0) if self.offset else t
        beta = 1.0 - since**-self.exponent
        return beta if self.cap is None else minimum(beta, self.cap)


@dataclass(frozen=True)
class BiasCorrected:
    """beta_t = b (1 - b^(t-1)) / (1 - b^t): Adam's corrected decay, arXiv 1804.04235 section 7.1.

    beta_1 = 0, so the first average is the first value. It is the ``non_constant_decay`` of
    adafactor-pytorch.
    """

    beta: float

    def __call__(self, t: Number) -> Number:
        """Return beta_t."""
        return self.beta * (1.0 - self.beta ** (t - 1.0)) / (1.0 - self.beta**t)


@dataclass(frozen=True)
class Linear:
    """slope * t: the warm-up of transformers' ``warmup_init`` (slope 1e-6)."""

    slope: float

    def __call__(self, t: Number) -> Number:
        """Return slope * t."""
        return self.slope * t


@dataclass(frozen=True)
class Custom:
    """A user's Python function of the step, called with an int.

    Attributes:
        function: Takes ``first``, ``first + 1``, ... at t = 1, 2, ... and returns a number.
        argument: Name of the constructor argument that it came by, for messages.
        first: 1 where the peer passes t, 0 where it passes the count of earlier steps (optax).
        below: What it returns must be in [0, below).
    """

    function: Callable[[int], float]
    argument: str
    first: int = 1
    below: float = math.inf

    def __call__(self, t: Number) -> Number:
        """Return the function's value at step t.

        Raises:
            ValueError: t lives on a device, so that calling a Python function would wait for it; or
                the value is out of range.
        """
        if isinstance(t, Tensor):
            raise ValueError(
                f"{self.argument} is a Python function of the step, which needs the step counter "
                "on the host; capturable=True, fused=True and nonfinite='skip' keep the counter on "
                "the device. "
                f"Give {self.argument} as a number, or switch these off"
            )
        count = int(t) - 1 + self.first
        value = float(self.function(count))
        if not 0.0 <= value < self.below:
            raise ValueError(
                f"{self.argument} returned {value} for step {count}; expected a number in "
                f"[0, {self.below})"
            )
        return value


Schedule: TypeAlias = Constant | PowerDecay | BiasCorrected | Linear | Custom


@dataclass(frozen=True)
class StepSize:
    """rho_t = factor^k(t) * base_t, or factor^k(t) * min(base_t, t^-1/2) when ``inverse_sqrt``.

    k(t) is the number of milestones that t has reached: adafactor-pytorch's ``lr_decay_step`` and
    ``lr_decay_factor``, a piecewise-constant factor.

    Attributes:
        base: None for the group's lr, or a schedule of t.
        inverse_sqrt: Cap by t^-1/2, the relative step of arXiv 1804.04235 section 8.
        milestones: Steps at which the factor is applied once more.
        factor: What each milestone multiplies by.
    """

    base: Schedule | None = None
    inverse_sqrt: bool = False
    milestones: tuple[int, ...] = ()
    factor: float = 1.0

    def __call__(self, t: Number, lr: Number | None) -> Number:
        """Return rho_t.

        Raises:
            ValueError: The base is the group's lr and that is None.
        """
        base = lr if self.base is None else self.base(t)
        if base is None:
            raise ValueError("lr is None, but the step size is the given lr: pass a number")
        rho = minimum(base, t**-0.5) if self.inverse_sqrt else base
        for milestone in self.milestones:
            # t**0 turns the comparison into a number of t's own kind: a float, or a float64 tensor.
            rho = rho * self.factor ** ((t >= milestone) * t**0.0)
        return rho
