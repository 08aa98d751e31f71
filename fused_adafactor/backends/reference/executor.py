"""What runs the phases on one tensor after the other, and tells the engine what it asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_adafactor.backends.reference.phases import PHASES, accumulate, average
from fused_adafactor.backends.reference.work import Work, partials_of, write
from fused_adafactor.binding import Binding, Exchange
from fused_adafactor.metrics import Outcome
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.schedule import Number


class Executor:
    """See ``backends.Executor``.

    Args:
        bindings: Its tensors.
    """

    def __init__(self, bindings: Sequence[Binding]) -> None:
        """Have found out nothing yet."""
        self.bindings = bindings
        self.outcomes: list[tuple[Tensor | None, Tensor | None, Number]] = []

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        """Run phases, in order, of an update."""
        if Phase.STATS in phases:
            exchange.scratch = self._work(exchange)
        work: list[Work] = exchange.scratch
        _tell(work, exchange)
        for phase in phases:
            for b in work:
                PHASES[phase](b)
        if Phase.FINALIZE in phases:
            exchange.skip = _skips(work)
        if Phase.APPLY not in phases:
            if Phase.STATS in phases:
                grad_sqs = [partials_of(b).grad_sq for b in work]
                exchange.grad_sq = torch.stack([sq for sq in grad_sqs if sq is not None])
            for b in work:
                _share(b, phases)
            return
        self.outcomes = [(b.param_rms, b.update_rms, b.alpha) for b in work]
        if exchange.wants_param_rms:
            exchange.param_rms = torch.stack([b.param_rms for b in work if b.param_rms is not None])

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        """Run an activity that has no update."""
        work = self._work(exchange)
        _tell(work, exchange)
        for b in work:
            if activity is Activity.ACCUMULATE:
                accumulate(b)
            elif activity is Activity.DROP and b.accumulator is not None:
                write(b, b.accumulator, torch.zeros_like(b.accumulator))
            idle = activity in (Activity.AVERAGE, Activity.DROP)
            average(b, may_overwrite=not idle or b.rule.overwrites_without_grad)

    def outcome(self) -> Outcome:
        """What the last update has found out."""
        device = self.bindings[0].param.device
        columns = [
            [torch.zeros((), device=device) if value is None else value for value in column]
            for column in zip(*self.outcomes, strict=True)
        ]
        numbers = [
            torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in column])
            for column in columns
        ]
        return Outcome(*numbers)

    def _work(self, exchange: Exchange) -> list[Work]:
        grads: Sequence[Tensor | None] = exchange.grads or [None] * len(self.bindings)
        pairs = zip(self.bindings, grads, strict=True)
        return [Work(**vars(binding), grad=grad) for binding, grad in pairs]


def _skips(work: Sequence[Work]) -> Tensor | None:
    """What is skipped, of all tensors; None if that cannot be."""
    if all(b.skip is None for b in work):
        return None
    never = torch.zeros((), dtype=torch.bool, device=work[0].param.device)
    return torch.stack([never if b.skip is None else b.skip for b in work])


def _share(b: Work, phases: Sequence[Phase]) -> None:
    """Put what this process has of the sums of a split tensor where they are taken."""
    if not b.sums:
        return
    partials = partials_of(b)
    wanted = b.sums[0 if Phase.STATS in phases else 1]
    for name, total in wanted.items():
        if name == "present":
            continue
        mine = getattr(partials, name)
        if name == "update_sq" and partials.col_weighted is not None:
            # What followed from sums over all rows is that of all rows: one process says it.
            mine = mine if b.planned.spec.has_first_row else torch.zeros_like(mine)
        total.copy_(mine)
        setattr(partials, name, total)


def _tell(work: Sequence[Work], exchange: Exchange) -> None:
    """Give every tensor its part of what the engine has found out."""
    for number, b in enumerate(work):
        b.skip = None if exchange.skip is None else exchange.skip[number]
        b.grad_factor = None if exchange.grad_factor is None else exchange.grad_factor[number]
