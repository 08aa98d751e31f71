"""From tensors to phases: plan cache, binding, the phase loop, and what happens between the phases.

The engine knows rules, specs and state layouts, but no dialect and no param group.

What follows from the tensors alone is in a ``Prepared`` step and its courses; it is made once and
used for as long as they stay as they are. What a step adds to it (the numbers in the cohorts, the
gradients, what is skipped) is set or made by ``Engine.run`` and gone with it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adafactor import backends
from fused_adafactor.binding import Binding, Cohort, Exchange
from fused_adafactor.counting import Cells, Clock
from fused_adafactor.joining import (
    Counters,
    Members,
    initial_skip,
    join,
    joins,
    shared_skips,
    skip_absent,
    unmoved,
)
from fused_adafactor.metrics import Metrics, metrics_of
from fused_adafactor.plan import (
    Activity,
    Facts,
    Launch,
    Phase,
    Plan,
    PlannedTensor,
    make_plan,
)
from fused_adafactor.rule import Nonfinite, StepCount
from fused_adafactor.schedule import Number
from fused_adafactor.sharding import Processes
from fused_adafactor.spec import Sharing, TensorSpec, has_memory
from fused_adafactor.state import StateLayout, canonical, entries_of
from fused_adafactor.summing import (
    Column,
    Message,
    Round,
    after_stats,
    after_update_rms,
    between_updates,
)
from fused_adafactor.tables import is_capturing

_PLANS_KEPT = 64
# Steps that a CUDA graph has the addresses of: it may be replayed as long as the process lives.
_captured: set[Prepared] = set()


@dataclass(kw_only=True, eq=False)
class Task:
    """One checked tensor that a step concerns.

    Attributes:
        spec: The tensor.
        cohort: Its rule, and the numbers of each step.
        owner: The parameter.
        param: It, or what this process has of it.
        state: Its state, complete.
        mirror: Its mirror, or None.
        counter: The step counter that it follows; advanced when the call is done.
        count: Which counter of its cohort that is, see ``Cohort.counts``.
        zeros: What stands for a gradient that is missing here, but maybe not on other processes.
    """

    spec: TensorSpec
    cohort: Cohort
    owner: Tensor
    param: Tensor
    state: dict[str, Any]
    counter: Tensor
    count: int
    mirror: Tensor | None
    zeros: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class _Batch:
    """Tensors of one plan, device, math dtype and activity: what one executor steps.

    Attributes:
        executor: Of the backend; None for tensors without elements, which are only counted.
        activity: What happens to them.
        segments: Of the plan.
        members: Where each belongs.
        grads: Places of theirs among all gradients, or zeros; None for all of them, in order.
        param_rms: Where RMS(p) is kept, if the dialect does.
        specs: Its tensors.
        owners: The parameters that they are, or are parts of.
        present: How many processes have a gradient of each; None where they are not split.
        grad_sq: Σ g² of each over all processes; None where it is not taken.
        messages: Those that are complete once it has run and those before it, by round of sums.
        updated: When they were last updated, counted in calls of ``Engine.run``; 0 for never.
    """

    executor: backends.Executor | None
    activity: Activity
    segments: tuple[tuple[Phase, ...], ...]
    members: Members
    grads: list[int | Tensor] | None
    param_rms: Cells | None
    specs: list[TensorSpec]
    owners: list[Tensor]
    present: Column | None
    grad_sq: Column | None
    messages: list[list[Message]] = field(default_factory=list)
    updated: int = 0

    def exchange(self, grads: Sequence[Tensor], found_inf: Tensor | None) -> Exchange:
        """What this step starts with."""
        return Exchange(
            grads=grads
            if self.grads is None
            else [at if isinstance(at, Tensor) else grads[at] for at in self.grads],
            skip=initial_skip(self.members, found_inf),
            wants_param_rms=self.param_rms is not None,
        )

    @property
    def without_grad(self) -> Activity | None:
        """What this call does to those of its tensors that have no gradient anywhere."""
        rules = self.members.rules
        if not any(rule.moves_without_grad for rule in rules):
            return None
        loses = any(rule.loses_without_grad for rule in rules)
        return Activity.DROP if loses and self.activity is Activity.UPDATE else Activity.AVERAGE

    def keep_param_rms(self, exchange: Exchange) -> None:
        """Store RMS(p) where the state of the dialect has it."""
        if self.param_rms is not None and exchange.param_rms is not None:
            rms = exchange.param_rms
            if exchange.skip is not None:
                kept = torch.stack([value.to(rms) for value in self.param_rms.tensors])
                rms = torch.where(exchange.skip, kept, rms)
            self.param_rms.write(rms)


_Part = tuple[_Batch, Exchange]  # of a call


@dataclass(kw_only=True, eq=False)
class _Course:
    """How a prepared step goes when every cohort has a certain activity.

    Attributes:
        batches: Those whose tensors are split over processes first: while these sum up, the others
            are at work. They are in the same order on all processes.
        counters: Those that advance.
    """

    batches: list[_Batch]
    counters: Counters


@dataclass(kw_only=True, eq=False)
class Prepared:
    """A step that can be taken as long as no tensor and no rule of it changes.

    Attributes:
        tasks: Its tensors.
        cohorts: Theirs; their numbers are set before each step.
        clocks: What the step of each cohort is read from.
        is_partial: Whether other tensors are stepped in the same call, so that a counter that they
            share is not advanced here.
        counters: Number of the counter of each task, by ``id``.
        courses: By the activities of the cohorts.
    """

    tasks: Sequence[Task]
    cohorts: Sequence[Cohort]
    clocks: Sequence[Clock]
    is_partial: bool
    counters: dict[int, int] = field(init=False)
    courses: dict[tuple[Activity, ...], _Course] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Number the counters."""
        unique = dict.fromkeys(id(task.counter) for task in self.tasks)
        self.counters = {key: number for number, key in enumerate(unique)}


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
        self.grad_sq: Tensor | None = None  # Σ g² of the last joined update, 0-d
        self._calls = 0
        self._processes = Processes()
        self._facts: dict[tuple[torch.device, Sharing], Facts] = {}
        self._plans: dict[tuple[tuple[TensorSpec, ...], Facts, bool], Plan] = {}

    def facts(self, spec: TensorSpec) -> Facts:
        """The backend that steps a tensor."""
        key = (spec.device, spec.sharing)
        if key not in self._facts:
            self._facts[key] = backends.choose(self.request, *key)
        return self._facts[key]

    def check(self, spec: TensorSpec, param: Tensor, grad: Tensor) -> None:
        """Refuse what the backend of a tensor cannot step, before anything is changed.

        Raises:
            RuntimeError: A native backend was asked to read what is not in plain memory, or laid
                out in too many dimensions.
        """
        backend = self.facts(spec).backend
        if backend == "reference" or spec.numel == 0:
            return
        reason = backends.load(backend).obstacle(spec)
        if reason is not None:
            raise RuntimeError(
                f"{spec.id} {reason}; the {backend} backend cannot step it. Use "
                "backend='reference', or a .contiguous() parameter"
            )
        for what, tensor in (("", param), ("the gradient of ", grad)):
            if not has_memory(tensor):
                raise RuntimeError(
                    f"{what}{spec.id} is a {type(tensor).__name__} without memory of its own, "
                    f"which the {backend} backend cannot read. Use backend='reference', or a plain "
                    "tensor with values"
                )
        if param.is_neg():
            raise RuntimeError(
                f"{spec.id} is negated whenever it is read (the imaginary part of a conjugate), "
                f"which the {backend} backend cannot write. Use backend='reference', or a "
                ".resolve_neg() of it as the parameter"
            )

    def plan(self, specs: Sequence[TensorSpec], joined: bool) -> list[Plan]:
        """One plan per backend, from the cache where the same tensors were planned before.

        What is split over processes has plans of its own: only that has to pause for sums. Which
        are in one follows from how they are shared, on all processes, whatever steps them here: a
        message is started once everything has run that it has sums of.
        """
        planned: dict[tuple[Facts, Sharing], list[TensorSpec]] = {}
        for spec in specs:
            planned.setdefault((self.facts(spec), spec.sharing), []).append(spec)
        return [self._cached(tuple(mine), facts, joined) for (facts, _), mine in planned.items()]

    def run(
        self,
        prepared: Prepared,
        grads: Sequence[Tensor],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Execute one call of step().

        Args:
            prepared: The tensors, all checked, with the numbers of this call.
            grads: Of those tasks that have one, in their order.
            grad_scale: Loss scale that the gradients still carry, 0-d, or None (torch's GradScaler
                protocol).
            found_inf: 0-d, nonzero if nothing may be written, or None.
        """
        for cohort in prepared.cohorts:
            cohort.grad_scale = _grad_scale(cohort, grad_scale)
        course = self._course(prepared)
        if any(is_capturing(batch.members.device) for batch in course.batches):
            _captured.add(prepared)
        parts = [(batch, batch.exchange(grads, found_inf)) for batch in course.batches]
        self._calls += 1
        working = [part for part in parts if part[0].executor is not None]
        self._update([p for p in working if p[0].activity is Activity.UPDATE])
        self._mark_accumulated([p for p in working if p[0].activity is Activity.ACCUMULATE])
        skips = shared_skips([(b.members, e) for b, e in parts], len(prepared.counters))
        for batch, exchange in parts:
            if batch.executor is None:
                continue
            if batch.activity is not Activity.UPDATE:
                if skips is not None and batch.activity is not Activity.ACCUMULATE:
                    # Tensors that had no gradient in this call learn here that it is skipped.
                    members = batch.members
                    skipped = skips.skipped.to(members.device)[members.counter_index]
                    exchange.skip = skipped | skips.all_absent.to(members.device)
                batch.executor.run_activity(batch.activity, exchange)
            if exchange.absent is not None and batch.without_grad is not None:
                assert skips is not None
                left = Exchange(grads=(), skip=unmoved(batch.members, exchange, skips, found_inf))
                batch.executor.run_activity(batch.without_grad, left)
        # Last, so that a backend that raises has counted nothing.
        course.counters.advance(None if skips is None else skips.uncounted)

    def _update(self, parts: list[_Part]) -> None:
        """Run the phases, and what must be known between them."""
        if not parts:
            return
        self.grad_sq = None
        last = max(len(batch.segments) for batch, _ in parts) - 1
        joined = any(batch.members.joined for batch, _ in parts)
        for number in range(last):

            def run(batch: _Batch, exchange: Exchange, number: int = number) -> None:
                if number < len(batch.segments) - 1:
                    assert batch.executor is not None
                    batch.executor.run(batch.segments[number], exchange)

            self._sum_while(run, parts, number)
            if number == 0 and joined:
                for batch, exchange in parts:
                    if batch.grad_sq is not None:
                        exchange.grad_sq = batch.grad_sq.read()
                self.grad_sq = join([(batch.members, exchange) for batch, exchange in parts])
        # All that writes comes last, after all sums: one that fails has changed nothing.
        for batch, exchange in parts:
            assert batch.executor is not None
            batch.executor.run(batch.segments[-1], exchange)
        for batch, exchange in parts:
            batch.keep_param_rms(exchange)
            batch.updated = self._calls

    def _sum_while(
        self, run: Callable[[_Batch, Exchange], None], parts: list[_Part], number: int
    ) -> None:
        """Run batches, and take the sums of a round over processes.

        A message is under way as soon as all have run that it has sums of, while others run.
        """
        if any(batch.messages for batch, _ in parts):
            _refuse_freed(parts)
        with contextlib.ExitStack() as under_way:  # left in an error too: memory is used again
            for batch, exchange in parts:
                run(batch, exchange)
                if number == 0 and batch.present is not None:
                    batch.present.write(batch.members.presence)
                for message in batch.messages[number] if batch.messages else ():
                    under_way.callback(self._processes.start(message))
        for batch, exchange in parts:
            if number == 0 and batch.present is not None:
                skip_absent(batch.members, exchange, batch.present)

    def _mark_accumulated(self, parts: list[_Part]) -> None:
        """Mark gradients that must not enter a sum: the call that brought them is then dropped."""
        skips = any(batch.members.skips for batch, _ in parts)

        def square(batch: _Batch, exchange: Exchange) -> None:
            if skips:
                dtype = batch.members.math_dtype
                squares = [grad.to(dtype).square().sum() for grad in exchange.grads]
                exchange.grad_sq = torch.stack(squares)
                if batch.grad_sq is not None:
                    batch.grad_sq.write(exchange.grad_sq)

        self._sum_while(square, parts, 0)
        if skips:
            for batch, exchange in parts:
                if batch.grad_sq is not None:
                    exchange.grad_sq = batch.grad_sq.read()
            join([(batch.members, exchange) for batch, exchange in parts])

    def _course(self, prepared: Prepared) -> _Course:
        """The course of a step, made when its activities first come up."""
        activities = tuple(cohort.activity for cohort in prepared.cohorts)
        course = prepared.courses.get(activities)
        if course is None:
            course = prepared.courses[activities] = self._make_course(prepared)
        return course

    def _make_course(self, prepared: Prepared) -> _Course:
        tasks = prepared.tasks
        updated = [t.cohort.rule for t in tasks if t.cohort.activity is Activity.UPDATE]
        plans = self.plan([task.spec for task in tasks], joins(updated))
        places = {p.spec.id.index: (plan, p) for plan in plans for p in plan.tensors}
        # By cohort, so that what is the same for many tensors is a slice of a vector.
        order = {id(cohort): number for number, cohort in enumerate(prepared.cohorts)}
        with_grads = [n for n, task in enumerate(tasks) if task.cohort.has_grad]
        given = [number for number in with_grads if tasks[number].zeros is None]
        grads: dict[int, int | Tensor] = {
            n: zeros for n in with_grads if (zeros := tasks[n].zeros) is not None
        }
        grads |= {number: place for place, number in enumerate(given)}
        batches: dict[Any, list[int]] = {}
        for number, task in sorted(enumerate(tasks), key=lambda pair: order[id(pair[1].cohort)]):
            plan, planned = places[task.spec.id.index]
            empty = planned.launch is Launch.EMPTY
            key = (id(plan), empty, task.spec.device, task.spec.math_dtype, task.cohort.activity)
            batches.setdefault(key, []).append(number)
        rounds = _rounds_of(tasks, places)

        def first_split(numbers: list[int]) -> float:
            split = [task.spec.id.index for n in numbers if (task := tasks[n]).spec.is_split]
            return min(split, default=math.inf)

        course = _Course(
            batches=[
                self._make_batch(prepared, numbers, places, grads, rounds)
                for numbers in sorted(batches.values(), key=first_split)
            ],
            counters=_counters(prepared),
        )
        for activity, sums in rounds.items():
            split = [b for b in course.batches if b.activity is activity and b.present is not None]
            for taken in sums:
                complete = taken.complete_after([batch.specs for batch in split])
                for batch, messages in zip(split, complete, strict=True):
                    batch.messages.append(messages)
        return course

    def _make_batch(
        self,
        prepared: Prepared,
        numbers: list[int],
        places: dict[int, tuple[Plan, PlannedTensor]],
        grads: dict[int, int | Tensor],
        rounds: dict[Activity, list[Round]],
    ) -> _Batch:
        tasks = [prepared.tasks[number] for number in numbers]
        specs = [task.spec for task in tasks]
        activity = tasks[0].cohort.activity
        sums = rounds.get(activity, [])
        bindings = [self.bind(task, places[task.spec.id.index][1], sums) for task in tasks]
        plan, planned = places[tasks[0].spec.id.index]
        executor = None
        if planned.launch is not Launch.EMPTY:
            executor = backends.load(plan.facts.backend).bind(bindings, plan.segments)
        mine = [grads[number] for number in numbers if number in grads]
        places_here = [place for place in mine if not isinstance(place, Tensor)]
        found = [canonical(task.state, task.spec, self.layout, "param_rms") for task in tasks]
        kept = [rms for rms in found if rms is not None]
        measured = activity is Activity.UPDATE and all(t.cohort.rule.keep_param_rms for t in tasks)
        return _Batch(
            executor=executor,
            activity=activity,
            segments=plan.segments,
            members=Members(
                cohorts=[task.cohort for task in tasks],
                given=[task.zeros is None for task in tasks],
                counters=[prepared.counters[id(task.counter)] for task in tasks],
                device=planned.spec.device,
                math_dtype=planned.spec.math_dtype,
            ),
            grads=None if places_here == list(range(len(grads))) else mine,
            param_rms=Cells(kept) if measured and len(kept) == len(tasks) else None,
            specs=specs,
            owners=[task.owner for task in tasks],
            present=sums[0].column("present", specs) if sums else None,
            grad_sq=sums[0].column("grad_sq", specs) if sums else None,
        )

    def _cached(self, specs: tuple[TensorSpec, ...], facts: Facts, joined: bool) -> Plan:
        key = (specs, facts, joined)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[key] = make_plan(specs, facts, joined)
        return plan

    def bind(self, task: Task, planned: PlannedTensor, sums: Sequence[Round] = ()) -> Binding:
        """Bind a tensor to its memory; what an option that is off has left stays out of it."""
        wanted = entries_of(task.spec, task.cohort.rule, self.layout)

        def entry(name: str) -> Tensor | None:
            if name not in wanted:
                return None
            return canonical(task.state, task.spec, self.layout, name)

        return Binding(
            planned=planned,
            cohort=task.cohort,
            count=task.count,
            param=task.param,
            row_var=entry("row_var"),
            col_var=entry("col_var"),
            var=entry("var"),
            var_max=entry("var_max"),
            exp_avg=entry("exp_avg"),
            exp_avg_scale=entry("exp_avg_scale"),
            compensation=entry("compensation"),
            average=entry("average"),
            accumulator=entry("accumulator"),
            mirror=task.mirror,
            sums=[taken.of(task.spec) for taken in sums],
        )


def _rounds_of(
    tasks: Sequence[Task], places: dict[int, tuple[Plan, PlannedTensor]]
) -> dict[Activity, list[Round]]:
    """The sums over processes, one round after the other, by what a call does to the tensors."""
    split: dict[Activity, list[Task]] = {Activity.UPDATE: [], Activity.ACCUMULATE: []}
    for task in tasks:
        if task.spec.is_split and task.spec.whole_numel and task.cohort.activity in split:
            split[task.cohort.activity].append(task)
    planned = {
        activity: [places[task.spec.id.index][1] for task in members]
        for activity, members in split.items()
    }
    rules = [task.cohort.rule for task in split[Activity.ACCUMULATE]]
    skips = any(rule.nonfinite is Nonfinite.SKIP for rule in rules)
    return {
        Activity.UPDATE: [
            Round((p.spec, taken(p)) for p in planned[Activity.UPDATE])
            for taken in (after_stats, after_update_rms)
        ],
        Activity.ACCUMULATE: [
            Round((p.spec, between_updates(p, skips)) for p in planned[Activity.ACCUMULATE])
        ],
    }


def metrics_of_steps(steps: Sequence[Prepared]) -> dict[Tensor, Metrics]:
    """What each parameter of these steps was found to be in its last update.

    Waits for the devices.
    """
    batches = [b for step in steps for course in step.courses.values() for b in course.batches]
    found: dict[Tensor, Metrics] = {}
    for batch in sorted(batches, key=lambda batch: batch.updated):
        if batch.updated and batch.executor is not None:
            rules = [cohort.rule for cohort in batch.members.cohorts]
            mine = metrics_of(rules, batch.executor.outcome())
            found |= zip(batch.owners, mine, strict=True)
    return found


def _refuse_freed(parts: Sequence[_Part]) -> None:
    """Refuse gradients without memory before the first message: the others would go on without us.

    Raises:
        RuntimeError: The storage of a gradient was freed.
    """
    for batch, exchange in parts:
        for spec, grad in zip(batch.specs, exchange.grads, strict=False):
            if grad.numel() and grad.untyped_storage().nbytes() == 0:
                raise RuntimeError(
                    f"the gradient of {spec.id} has no memory: its storage was freed"
                )


def _grad_scale(cohort: Cohort, grad_scale: Tensor | None) -> Number:
    scale = (-1.0 if cohort.rule.maximize else 1.0) / cohort.rule.grad_divisor
    return scale if grad_scale is None else scale / grad_scale.to(cohort.device, non_blocking=True)


def _counters(prepared: Prepared) -> Counters:
    """The counters that this call advances, by the activities of the cohorts."""
    counted = {
        id(task.counter): task.counter
        for task in prepared.tasks
        if (
            not prepared.is_partial
            if task.cohort.rule.step_count is StepCount.GLOBAL
            else task.cohort.activity in (Activity.UPDATE, Activity.ACCUMULATE)
        )
    }
    return Counters(list(counted.values()), [prepared.counters[key] for key in counted])
