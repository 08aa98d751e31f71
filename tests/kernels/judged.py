"""Steps of a backend, each compared with the reference in float64 from the same start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.dialects import Dialect
from tests.stepping import make_params, params_of

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def growth(shape: Sequence[int]) -> float:
    """By how many units an update may differ, relatively: every element of it, large or small.

    A sum of k squares, in whatever order, is off by 4 sqrt(k) units: its rounding errors are as
    good as independent, so that more than that is one sum in thousands, and the worst case, k
    units, does not happen (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). A second moment takes
    such sums of at most max(rows, columns) elements one after the other. 1 / sqrt(v) halves the
    errors of three of them (row, column, norm); Σ u² has those of v and one of its own, and its
    root halves them: together 3/2 + 3/2 + 1/2 of 4 sqrt(k). What is no sum, from the raw gradient
    to the step, is fewer than 32 roundings.
    """
    return 32 + 14 * math.sqrt(max(shape, default=1))


class Judged:
    """Parameters stepped by a backend where they are, and by the reference in float64 on the CPU.

    Before each step the reference takes over all values, so that a bound is that of one step.

    Args:
        dialect: Which optimizer.
        params: The parameters, on the device of the backend.
        judge_kwargs: As kwargs, where the reference needs others.
        backend: Who is judged.
        kwargs: For the optimizer.
    """

    def __init__(
        self,
        dialect: Dialect,
        params: Sequence[Tensor],
        judge_kwargs: Mapping[str, Any] | None = None,
        backend: str = "cpp",
        **kwargs: Any,
    ) -> None:
        self.ours = dialect(params, backend=backend, **kwargs)
        twins = [torch.nn.Parameter(_taken_over(p).contiguous()) for p in params]
        self.judge = dialect(twins, backend="reference", **{**kwargs, **(judge_kwargs or {})})
        self.normwise = False

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter and its twin."""
        return list(zip(params_of(self.ours), params_of(self.judge), strict=True))

    def step(
        self,
        grads: Sequence[Tensor | None],
        slack: Callable[[Tensor], float] = lambda _: 1.0,
        state_slack: float = 1.0,
    ) -> None:
        """One step with these gradients, compared.

        Args:
            grads: In any dtype and layout.
            slack: Of a parameter's twin, after the step: by what the bound of its update is
                multiplied.
            state_slack: The same for its state.
        """
        before = []
        for (p, q), g in zip(self.pairs, grads, strict=True):
            p.grad_dtype = None  # any
            p.grad = g
            q.grad = None if g is None else _taken_over(g)
            state = {k: _taken_over(v) for k, v in self.ours.state.get(p, {}).items()}
            before.append((q.detach().clone(), state))
        self.ours.step()
        self.judge.step()
        for (p, q), g, (old, state) in zip(self.pairs, grads, before, strict=True):
            what = f"of {tuple(p.shape)}, {p.dtype}, gradient {None if g is None else g.dtype}"
            math_dtype = F64 if F64 in (p.dtype, None if g is None else g.dtype) else F32
            kept = self.ours.state[p]
            held = [v.dtype for v in kept.values() if v.is_floating_point() and v.dim() > 0]
            coarsest = max([unit(math_dtype), *map(unit, held)]) if held else unit(math_dtype)
            units = growth(p.shape) * unit(math_dtype) + 4 * coarsest
            averaged = torch.zeros(())
            if self._overwrites:
                averaged = state.get(self.ours.layout.average, averaged).abs()
            of_param = self._compare_param(p, q, old, averaged, units * slack(q), math_dtype, what)
            for key, wanted in self.judge.state[q].items():
                size = wanted.double().abs() + state.get(key, torch.zeros(())).abs()
                allowed = state_slack * units * size + unit(kept[key].dtype) * size
                # Below its normal numbers float32 is a fixed-point format.
                allowed += p.numel() * 2.0**-149 if math_dtype is F32 else 0.0
                if key == self.ours.layout.average:
                    allowed += of_param
                assert_within(kept[key], wanted, allowed, f"{key} {what}")
        self.follow()

    @property
    def _overwrites(self) -> bool:
        average = self.ours._rule(self.ours.param_groups[0]).weight_average
        return average is not None and average.overwrite_every is not None

    def _compare_param(
        self,
        p: Tensor,
        q: Tensor,
        old: Tensor,
        averaged: Tensor,
        units: float,
        math_dtype: torch.dtype,
        what: str,
    ) -> Tensor:
        delta = (q.detach() - old).abs()
        if self.normwise:  # a first moment averages steps of both signs
            delta = delta.max().expand(delta.shape) if delta.numel() else delta
        smallest = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
        written = (unit(p.dtype) + 3 * unit(math_dtype)) * (q.detach().abs() + delta) + smallest
        # An average that takes the place of a parameter may be far less than what it is made of.
        written = written + 2 * unit(math_dtype) * averaged
        allowed = units * delta + written
        assert_within(p.detach(), q.detach(), allowed, f"parameter {what}")
        return allowed

    def follow(self) -> None:
        """Let the reference take over every value."""
        with torch.no_grad():
            for p, q in self.pairs:
                q.copy_(p)
                for key, value in self.ours.state[p].items():
                    self.judge.state[q][key].copy_(value)


def _taken_over(values: Tensor) -> Tensor:
    """A copy in float64 on the CPU."""
    return values.detach().to("cpu", F64, copy=True)


def assert_within(ours: Tensor, wanted: Tensor, allowed: Tensor, what: str) -> None:
    """Every element within its own bound; what is not finite must be the same."""
    a, b = ours.detach().double().cpu(), wanted.detach().double()
    if a.numel() == 0:
        return
    same = (a == b) | (a.isnan() & b.isnan())
    excess = ((a - b).abs() / allowed.expand_as(b)).masked_fill(same, 0.0)
    worst = excess.nan_to_num(math.inf, math.inf).max().item()
    if not worst <= 1:
        place = int(excess.nan_to_num(math.inf, math.inf).argmax())
        raise AssertionError(
            f"{what}: {worst:.3g} times what is allowed, at {place}: "
            f"{a.flatten()[place].item():.9g}, expected {b.flatten()[place].item():.9g}"
        )


def params_in(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    lay_out: Callable[[Tensor], Tensor] = lambda values: values,
    seed: int = 0,
) -> list[Tensor]:
    """Normal parameters, laid out in some way."""
    drawn = [p.detach().to(dtype) for p in make_params(shapes, F64, seed)]
    return [torch.nn.Parameter(lay_out(p).detach()) for p in drawn]


def eps_of(dtype: torch.dtype, eps1: float | None = None) -> dict[str, Any]:
    """torch.optim's eps1 is the parameter's, which that of a float64 twin is not."""
    return {"eps": (torch.finfo(dtype).eps if eps1 is None else eps1, 1e-3)}
