"""What must be known of several tensors together: norms, what is skipped, and what is counted.

Everything here works on vectors with one value for each tensor and never asks a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adafactor.binding import Cohort, Exchange
from fused_adafactor.counting import Cells
from fused_adafactor.rule import GradClipKind, Nonfinite, Rule, StepCount
from fused_adafactor.summing import Column


@dataclass(kw_only=True, eq=False)
class Members:
    """The tensors of an exchange: of one device and one math dtype, cohort by cohort.

    Attributes:
        cohorts: Of each tensor.
        given: Whether there is a gradient of it here; other processes may have one all the same.
        counters: Number of the step counter that each tensor follows.
        device: Theirs.
        math_dtype: Theirs.
    """

    cohorts: Sequence[Cohort]
    given: Sequence[bool]
    counters: Sequence[int]
    device: torch.device
    math_dtype: torch.dtype

    def __post_init__(self) -> None:
        """Note where each cohort begins."""
        runs = [(cohort, len(list(run))) for cohort, run in groupby(self.cohorts)]
        self.sizes = [size for _, size in runs]
        self.rules = [cohort.rule for cohort, _ in runs]
        self.counter_index = torch.tensor(self.counters, device=self.device)
        self.presence = torch.tensor(self.given, dtype=self.math_dtype, device=self.device)
        self.joined = joins(self.rules)
        self.skips = any(rule.nonfinite is Nonfinite.SKIP for rule in self.rules)


def joins(rules: Sequence[Rule]) -> bool:
    """Whether something must be known of the tensors between the sums and the factors."""
    return any(_skips_together(rule) or _clips_by_norm(rule) for rule in rules)


def initial_skip(members: Members, found_inf: Tensor | None) -> Tensor | None:
    """What is skipped before a gradient has been looked at."""
    size = (len(members.cohorts),)
    if found_inf is not None:
        found = found_inf.to(members.device, non_blocking=True).reshape(()).bool()
        return found.repeat(size)  # a copy: what is skipped may grow
    if members.skips:
        return torch.zeros(size, dtype=torch.bool, device=members.device)
    return None


def join(parts: Sequence[tuple[Members, Exchange]]) -> Tensor:
    """Between the sums and the factors: norms to clip by, and marks on what is to be skipped.

    The global norm is over every gradient of this call; each tensor is clipped by the threshold of
    its own rule. Tensors that share a step counter are skipped together, because the counter
    cannot advance for some of them; a tensor that is clipped by a norm that is not finite is
    skipped with it.

    Args:
        parts: Tensors with Σ g² of each, at least one.

    Returns:
        Σ g² of all, 0-d, on the device of the first.
    """
    for _, exchange in parts:
        if exchange.absent is not None and exchange.grad_sq is not None:
            # What has been accumulated of it is no gradient of this call.
            exchange.grad_sq = exchange.grad_sq.masked_fill(exchange.absent, 0.0)
    total_sq = _sum_on_first_device([e.grad_sq for _, e in parts if e.grad_sq is not None])
    for members, exchange in parts:
        assert exchange.grad_sq is not None
        total = total_sq.to(exchange.grad_sq)
        split = zip(members.rules, torch.split(exchange.grad_sq, members.sizes), strict=True)
        norms = [(rule, grad_sq, _norm_sq(rule, grad_sq, total)) for rule, grad_sq in split]
        if any(map(_clips_by_norm, members.rules)):
            exchange.grad_factor = torch.cat([_factor(*norm) for norm in norms])
        if members.skips:
            finite = torch.cat([_finite(*norm, total) for norm in norms])
            assert exchange.skip is not None
            exchange.skip = exchange.skip | ~finite
    return total_sq


def skip_absent(members: Members, exchange: Exchange, present: Column) -> None:
    """Mark tensors that no process has a gradient of; where all are here, none is asked.

    Args:
        members: The tensors.
        exchange: Theirs.
        present: How many processes have a gradient of each.
    """
    if not all(members.given):
        exchange.absent = present.read() == 0
        skip = exchange.skip
        exchange.skip = exchange.absent if skip is None else skip | exchange.absent


class Skips(NamedTuple):
    """What becomes of the counters of a call; vectors of bool.

    Attributes:
        skipped: By counter, whether what follows it is skipped.
        uncounted: By counter, whether it stays where it is: also where nothing that follows it is
            present on any process.
        all_absent: Whether nothing at all is, 0-d: the call is then none.
    """

    skipped: Tensor
    uncounted: Tensor
    all_absent: Tensor


def shared_skips(parts: Sequence[tuple[Members, Exchange]], counters: int) -> Skips | None:
    """What shares a counter is skipped together; what is absent skips nothing else.

    Returns:
        None if nothing can be skipped.
    """
    if all(exchange.skip is None for _, exchange in parts):
        return None
    device = parts[0][0].device
    skipped = torch.zeros(counters, dtype=torch.int32, device=device)
    there = torch.zeros_like(skipped)
    for members, exchange in parts:
        present = members.counter_index.new_full(
            (len(members.cohorts),), members.cohorts[0].has_grad, dtype=torch.int32
        )
        if exchange.absent is not None:
            present = present * ~exchange.absent
        index = members.counter_index.to(device)
        there.index_add_(0, index, present.to(device))
        if exchange.skip is not None:
            skipped.index_add_(0, index, (present * exchange.skip).to(device))
    return Skips(skipped > 0, (skipped > 0) | (there == 0), there.sum() == 0)


def unmoved(members: Members, exchange: Exchange, skips: Skips, found_inf: Tensor | None) -> Tensor:
    """What does not move as a tensor without a gradient does: it has one, or all is skipped."""
    assert exchange.absent is not None
    stays = ~exchange.absent | skips.skipped.to(members.device)[members.counter_index]
    initial = initial_skip(members, found_inf)
    stays = stays | skips.all_absent.to(members.device)
    return stays if initial is None else stays | initial


class Counters:
    """Step counters that a call advances.

    Args:
        counters: On any devices, each once.
        numbers: Place of each in what ``shared_skips`` returns.
    """

    def __init__(self, counters: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Sort them by device."""
        by_device: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for counted, number in zip(counters, numbers, strict=True):
            by_device.setdefault(counted.device, []).append((counted, number))
        self._by_device = {
            device: (
                Cells([counted for counted, _ in members]),
                torch.tensor([number for _, number in members], device=device),
            )
            for device, members in by_device.items()
        }

    def advance(self, skipped: Tensor | None) -> None:
        """Count a call, unless it is skipped, without asking a device."""
        for device, (cells, numbers) in self._by_device.items():
            cells.advance(None if skipped is None else ~skipped.to(device)[numbers])


def _clips_by_norm(rule: Rule) -> bool:
    return rule.grad_clip is not None and rule.grad_clip.kind is not GradClipKind.VALUE


def _skips_together(rule: Rule) -> bool:
    """Whether others are skipped with a tensor; otherwise ``FINALIZE`` skips it by itself."""
    return rule.nonfinite is Nonfinite.SKIP and rule.step_count is StepCount.GLOBAL


def _norm_sq(rule: Rule, grad_sq: Tensor, total: Tensor) -> Tensor:
    """Square of the norm that each gradient is clipped by; its own where it is not clipped."""
    clip = rule.grad_clip
    return total if clip is not None and clip.kind is GradClipKind.GLOBAL_NORM else grad_sq


def _factor(rule: Rule, grad_sq: Tensor, norm_sq: Tensor) -> Tensor:
    """What a gradient is multiplied by to clip it."""
    clip = rule.grad_clip
    if clip is None or clip.kind is GradClipKind.VALUE:
        return torch.ones_like(grad_sq)
    factor = (clip.threshold / (norm_sq.sqrt() + clip.eps)).clamp(max=1.0)
    if clip.nan_if_not_finite:
        factor = factor + (norm_sq - norm_sq)
    return factor.expand_as(grad_sq)


def _finite(rule: Rule, grad_sq: Tensor, norm_sq: Tensor, total: Tensor) -> Tensor:
    """Whether the step of a tensor may be taken."""
    if rule.nonfinite is not Nonfinite.SKIP:
        return torch.ones_like(grad_sq, dtype=torch.bool)
    finite = grad_sq.isfinite() & norm_sq.isfinite()
    return finite & total.isfinite() if rule.step_count is StepCount.GLOBAL else finite


def _sum_on_first_device(vectors: Sequence[Tensor]) -> Tensor:
    first = vectors[0].device
    dtype = torch.float64 if any(v.dtype is torch.float64 for v in vectors) else torch.float32
    return torch.cat([v.to(first, dtype, non_blocking=True) for v in vectors]).sum()
