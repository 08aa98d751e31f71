"""From tensors to phases: plan cache, binding, the phase loop, and what happens between the phases.

The engine knows rules, specs and state layouts, but no dialect and no param group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_adafactor import backends
from fused_adafactor.binding import Binding
from fused_adafactor.plan import Activity, Facts, Plan, PlannedTensor, describe, make_plan
from fused_adafactor.rounding import Rounding, RoundingKey
from fused_adafactor.rule import GradClipKind, Nonfinite, Rule, Scalars, StepCount
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorSpec
from fused_adafactor.state import StateLayout, canonical

_PLANS_KEPT = 64


@dataclass(kw_only=True)
class Task:
    """One checked tensor that a call of step() concerns.

    Attributes:
        spec: The tensor.
        rule: Its rule.
        activity: What the call does to it.
        scalars: The numbers of this step.
        param: The parameter.
        grad: Its gradient; None if only the average moves.
        state: Its state, complete.
        counter: The step counter that it follows; advanced when the call is done.
        seed: Key of stochastic rounding.
    """

    spec: TensorSpec
    rule: Rule
    activity: Activity
    scalars: Scalars
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    counter: Tensor
    seed: int


class Engine:
    """Executes steps. Holds caches only, nothing that a checkpoint needs.

    Args:
        request: The backend, as ``backends.parse_request`` returns it.
        layout: Where the dialect keeps its state.
    """

    def __init__(self, request: str, layout: StateLayout) -> None:
        """Start with empty caches."""
        self.request = request
        self.layout = layout
        self._facts: dict[torch.device, Facts] = {}
        self._plans: dict[tuple[tuple[TensorSpec, ...], Facts, bool], Plan] = {}

    def facts(self, device: torch.device) -> Facts:
        """The backend that steps tensors on a device."""
        if device not in self._facts:
            self._facts[device] = backends.choose(self.request, device)
        return self._facts[device]

    def plan(self, specs: Sequence[TensorSpec], joined: bool) -> list[Plan]:
        """One plan per backend, from the cache where the same tensors were planned before."""
        by_facts: dict[Facts, list[TensorSpec]] = {}
        for spec in specs:
            by_facts.setdefault(self.facts(spec.device), []).append(spec)
        return [self._cached(tuple(members), facts, joined) for facts, members in by_facts.items()]

    def explain(self, specs: Sequence[TensorSpec], rules: Sequence[Rule]) -> str:
        """The plan of an update of these tensors, as a table."""
        return "\n\n".join(describe(plan) for plan in self.plan(specs, _joins(rules)))

    def run(
        self,
        tasks: Sequence[Task],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Execute one call of step().

        Args:
            tasks: The tensors, all checked.
            grad_scale: Loss scale that the gradients still carry, 0-d, or None (torch's GradScaler
                protocol).
            found_inf: 0-d, nonzero if nothing may be written, or None.
        """
        joined = _joins([task.rule for task in tasks if task.activity is Activity.UPDATE])
        plans = self.plan([task.spec for task in tasks], joined)
        places = {p.spec.id.index: (plan, p) for plan in plans for p in plan.tensors}
        bound: list[tuple[Plan, Binding]] = []
        for task in tasks:
            plan, planned = places[task.spec.id.index]
            binding = self._bind(task, planned, grad_scale)
            binding.skip = _initial_skip(binding, found_inf)
            bound.append((plan, binding))
        self._update(plans, [(p, b) for p, b in bound if b.activity is Activity.UPDATE])
        bindings = [binding for _, binding in bound]
        self._keep_param_rms(tasks, bindings)
        _mark_accumulated([b for b in bindings if b.activity is Activity.ACCUMULATE])
        skips = _share_skips(tasks, bindings)
        for plan in plans:
            backend = backends.load(plan.facts.backend)
            for activity in (Activity.ACCUMULATE, Activity.AVERAGE, Activity.DROP):
                mine = [b for owner, b in bound if owner is plan and b.activity is activity]
                backend.run_activity(activity, mine)
        # Last, so that a backend that raises has counted nothing.
        _advance(tasks, skips)

    def _update(self, plans: list[Plan], bound: list[tuple[Plan, Binding]]) -> None:
        if not bound:
            return
        for number in range(len(plans[0].segments)):
            if number:
                _join([binding for _, binding in bound])
            for plan in plans:
                mine = [binding for owner, binding in bound if owner is plan]
                backends.load(plan.facts.backend).run(plan.segments[number], mine)

    def _keep_param_rms(self, tasks: Sequence[Task], bindings: Sequence[Binding]) -> None:
        """Store RMS(p) where the state of the dialect has it."""
        for task, binding in zip(tasks, bindings, strict=True):
            kept = canonical(task.state, task.spec, self.layout, "param_rms")
            rms = binding.param_rms
            if kept is not None and rms is not None:
                kept.copy_(rms if binding.skip is None else torch.where(binding.skip, kept, rms))

    def _cached(self, specs: tuple[TensorSpec, ...], facts: Facts, joined: bool) -> Plan:
        key = (specs, facts, joined)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[key] = make_plan(specs, facts, joined)
        return plan

    def _bind(self, task: Task, planned: PlannedTensor, grad_scale: Tensor | None) -> Binding:
        def entry(name: str) -> Tensor | None:
            return canonical(task.state, task.spec, self.layout, name)

        scale: Number = (-1.0 if task.rule.maximize else 1.0) / task.rule.grad_divisor
        if grad_scale is not None:
            scale = scale / grad_scale.to(task.spec.device, non_blocking=True)
        key = None
        if task.rule.rounding is Rounding.STOCHASTIC:
            key = RoundingKey(task.seed, task.spec.id.index, _whole(task.scalars.t))
        return Binding(
            planned=planned,
            rule=task.rule,
            scalars=task.scalars,
            activity=task.activity,
            param=task.param.detach(),
            grad=None if task.grad is None else task.grad.detach(),
            row_var=entry("row_var"),
            col_var=entry("col_var"),
            var=entry("var"),
            var_max=entry("var_max"),
            exp_avg=entry("exp_avg"),
            compensation=entry("compensation"),
            average=entry("average"),
            accumulator=entry("accumulator"),
            grad_scale=scale,
            rounding_key=key,
        )


def _whole(t: Number) -> int | Tensor:
    return t.to(torch.int64) if isinstance(t, Tensor) else int(t)


def _joins(rules: Sequence[Rule]) -> bool:
    """Whether something must be known of the tensors between the sums and the factors."""
    return any(
        rule.nonfinite is Nonfinite.SKIP
        or (rule.grad_clip is not None and rule.grad_clip.kind is not GradClipKind.VALUE)
        for rule in rules
    )


def _initial_skip(b: Binding, found_inf: Tensor | None) -> Tensor | None:
    if found_inf is not None:
        return found_inf.to(b.param.device, non_blocking=True).reshape(()).bool()
    if b.rule.nonfinite is Nonfinite.SKIP:
        return torch.zeros((), dtype=torch.bool, device=b.param.device)
    return None


def _join(bindings: list[Binding]) -> None:
    """Between the sums and the factors: norms to clip by, and marks on what is to be skipped.

    The global norm is over every gradient of this call; each tensor is clipped by the threshold of
    its own rule. Tensors that share a step counter are skipped together, because the counter
    cannot advance for some of them; a tensor that is clipped by a norm that is not finite is
    skipped with it.
    """
    with_sums = [b for b in bindings if b.grad_sq is not None]
    if not with_sums:
        return
    total_sq = _sum_on_first_device([b.grad_sq for b in with_sums if b.grad_sq is not None])
    for b in with_sums:
        assert b.grad_sq is not None
        clip = b.rule.grad_clip
        finite = b.grad_sq.isfinite()
        if clip is not None and clip.kind is not GradClipKind.VALUE:
            norm_sq = b.grad_sq if clip.kind is GradClipKind.NORM else total_sq.to(b.grad_sq)
            b.grad_factor = (clip.threshold / (norm_sq.sqrt() + clip.eps)).clamp(max=1.0)
            if clip.nan_if_not_finite:
                b.grad_factor = b.grad_factor + (norm_sq - norm_sq)
            finite = finite & norm_sq.isfinite()
        if b.rule.nonfinite is Nonfinite.SKIP and b.rule.step_count is StepCount.GLOBAL:
            finite = finite & total_sq.isfinite().to(finite.device)
        if b.rule.nonfinite is Nonfinite.SKIP:
            assert b.skip is not None
            b.skip = b.skip | ~finite


def _mark_accumulated(bindings: list[Binding]) -> None:
    """Mark gradients that must not enter a sum: the call that brought them is then dropped."""
    if any(b.rule.nonfinite is Nonfinite.SKIP for b in bindings):
        for b in bindings:
            assert b.grad is not None
            b.grad_sq = b.grad.to(b.planned.spec.math_dtype).square().sum()
        _join(bindings)


def _sum_on_first_device(values: list[Tensor]) -> Tensor:
    first = values[0]
    dtype = torch.float64 if any(v.dtype is torch.float64 for v in values) else torch.float32
    return torch.stack([v.to(first.device, dtype, non_blocking=True) for v in values]).sum()


def _share_skips(tasks: Sequence[Task], bindings: Sequence[Binding]) -> dict[int, Tensor]:
    """By counter, whether its step is skipped: what shares a counter is skipped together.

    Tensors that had no gradient in this call learn it here.
    """
    skips: dict[int, Tensor] = {}
    for task, binding in zip(tasks, bindings, strict=True):
        if binding.skip is not None:
            before = skips.get(id(task.counter))
            skip = binding.skip.to(task.counter.device)
            skips[id(task.counter)] = skip if before is None else before | skip
    for task, binding in zip(tasks, bindings, strict=True):
        shared = skips.get(id(task.counter))
        if shared is not None and binding.activity in (Activity.AVERAGE, Activity.DROP):
            binding.skip = shared.to(binding.param.device)
    return skips


def _advance(tasks: Sequence[Task], skips: dict[int, Tensor]) -> None:
    """Count this call, unless it is skipped, without asking a device."""
    counters = {
        id(task.counter): task.counter
        for task in tasks
        if task.rule.step_count is StepCount.GLOBAL
        or task.activity in (Activity.UPDATE, Activity.ACCUMULATE)
    }
    for key, counted in counters.items():
        counted.add_((~skips[key]).to(counted) if key in skips else 1)
