"""From param groups to a prepared step, of all parameters or of some of them.

This is the half of an optimizer that no user calls. A step is checked before anything is changed,
then prepared; what was prepared is taken again for as long as nothing that it follows from changes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_adafactor.binding import Cohort
from fused_adafactor.checkpoint import CheckpointedOptimizer, check_group
from fused_adafactor.counting import Clock, counter_device, next_call, number_of
from fused_adafactor.engine import Prepared, Task
from fused_adafactor.fingerprint import Concern, Fingerprint, fingerprint_of, gradients_of
from fused_adafactor.plan import Activity
from fused_adafactor.rule import Rule, Scalars, StepCount
from fused_adafactor.schedule import Number
from fused_adafactor.sharding import (
    Given,
    anywhere,
    check_members,
    described,
    joiner,
    zeros_of,
)
from fused_adafactor.spec import TensorId, TensorSpec, local_of
from fused_adafactor.state import check_state, init_state

Placed = tuple[dict[str, Any], Tensor, TensorId]  # a parameter, with its group and identity
Ready = tuple[Prepared, list[Tensor]]  # a step, and the gradients that there are


class Draft(NamedTuple):
    """A tensor that a step concerns, checked; nothing of it has been changed.

    It has a gradient also where zeros stand for one of another process.
    """

    group: dict[str, Any]
    spec: TensorSpec
    rule: Rule
    has_grad: bool
    param: Tensor
    zeros: Tensor | None


class Known(NamedTuple):
    """A prepared step, and by what to tell whether it can be taken again.

    Attributes:
        prepared: The step.
        fingerprint: What it depends on.
        groups: Number of the param group of each of its cohorts.
        ids: Of all parameters.
        params: All parameters, likewise.
        group_rules: The rule of the group of each.
        own_rules: As ``_own_rules`` returned them.
    """

    prepared: Prepared
    fingerprint: Fingerprint
    groups: list[int]
    ids: list[TensorId]
    params: list[Tensor]
    group_rules: list[Rule]
    own_rules: list[Rule] | None


# Of these an object says the same for as long as it lives; a function or a tensor may not.
_CONSTANT = (bool, int, float, str, NoneType, torch.dtype)


class Settled(NamedTuple):
    """A rule, and all that its param group said when it was made."""

    keys: tuple[str, ...]
    values: tuple[Any, ...]
    rule: Rule

    def holds(self, group: Mapping[str, Any]) -> bool:
        """Whether the group says the same, in the same objects."""
        values = _said(group)
        return len(values) == len(self.values) and (
            all(map(operator.is_, values, self.values)) and tuple(group) == self.keys
        )


class PreparingOptimizer(CheckpointedOptimizer):
    """Prepares steps, and takes them."""

    # The rules of param groups, by number; like the next, never copied, pickled or saved.
    _settled: dict[int, Settled] | None = None
    # The last step of all parameters, kept for the next one; never copied, pickled or saved.
    _known: Known | None = None
    # What every new value of a parameter is written to besides, see ``Binding.mirror``; by
    # parameter. Set by whoever owns the optimizer, as CPUOffload does.
    _mirrors: Mapping[Tensor, Tensor] = MappingProxyType({})
    # What each param group was made of; a copy does not know it.
    _given: tuple[Given, ...] = ()

    def _group_lr(self, group: Mapping[str, Any]) -> float | Tensor | None:
        """The group's lr of this step; None where it is a function, which the rule then holds."""
        return None if callable(group["lr"]) else cast("float | Tensor | None", group["lr"])

    # --- steps ------------------------------------------------------------------------------------

    def _step_all(self) -> None:
        """Step every parameter that has a gradient."""
        rules = self._rules(range(len(self.param_groups)))
        known, self._known = self._known, None
        ready = self._recall(known, rules, None)
        if ready is None:
            known = None  # nothing stale is alive while a new one is made
            drafts = self._draft(rules, self._ids())
            if not any(draft.has_grad for draft in drafts):
                drafts = []
            if self._is_phantom_step(drafts):
                return
            ready, known = self._commit(drafts, rules, None)
        self._known = known
        self._run(ready)

    def _run(self, ready: Ready) -> None:
        self._engine.run(
            *ready, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )

    def _rules(self, numbers: Iterable[int]) -> dict[int, Rule]:
        """The rules of groups, by their numbers; a group that was replaced is completed."""
        shared = [group["step"] for group in self.param_groups if "step" in group]
        if self._settled is None:
            self._settled = {}
        known = self._settled
        rules: dict[int, Rule] = {}
        for number in numbers:
            group, settled = self.param_groups[number], known.get(number)
            if settled is not None and settled.holds(group):
                rules[number] = settled.rule
                continue
            known.pop(number, None)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if shared:
                group.setdefault("step", shared[0])
            check_group(group)
            rules[number] = self._rule(group)
            said = _said(group)
            if _is_constant(said):
                known[number] = Settled(tuple(group), said, rules[number])
        if any(rule.step_count is StepCount.GLOBAL for rule in rules.values()):
            self._check_agreement(list(rules.values()))
        return rules

    def _check_agreement(self, rules: list[Rule]) -> None:
        """Groups that follow one step counter must have it, and agree on what it counts."""
        if "step" not in self.param_groups[0]:
            raise ValueError(
                "no param group has 'step', the count of steps that all share; keep it when you "
                "replace a group"
            )
        counted = {(rule.nonfinite, rule.accumulation_steps) for rule in rules}
        if len(counted) > 1:
            raise ValueError(
                "all param groups of this optimizer follow one step counter, so they must agree on "
                "nonfinite and gradient_accumulation_steps; got "
                + " and ".join(f"({nonfinite.value!r}, {steps})" for nonfinite, steps in counted)
            )

    # --- preparing --------------------------------------------------------------------------------

    def _recall(
        self, known: Known | None, rules: Mapping[int, Rule], some: Sequence[Placed] | None
    ) -> Ready | None:
        """A step as it was prepared before, with the numbers of this one, and the gradients.

        None if anything else than the gradients' values has changed, which is then found out and
        checked as in a first step.

        Args:
            known: The step, or None.
            rules: Of the groups concerned.
            some: What it is a step of; None for everything.
        """
        if known is None:
            return None
        concern = self._concern(rules, some)
        grads = gradients_of(concern.params)
        if not known.fingerprint.matches(concern, grads):
            return None
        own_rules = self._own_rules(known.group_rules, known.ids, known.params)
        if own_rules != known.own_rules:
            return None
        calls = [clock.next_call() for clock in known.prepared.clocks]
        if any(call is None for call in calls):
            return None
        self._evaluate(known.prepared.cohorts, known.groups, cast("list[Number]", calls))
        return known.prepared, grads.parts

    def _concern(self, rules: Mapping[int, Rule], some: Sequence[Placed] | None) -> Concern:
        """What a step depends on."""
        if some is None:
            groups: Sequence[Mapping[str, Any]] = self.param_groups
            params = list(chain.from_iterable(group["params"] for group in groups))
            places: list[Any] = [(len(g["params"]), list(g.get("param_names", ()))) for g in groups]
            mirrors = list(self._mirrors.values())
            return Concern(params, places, groups, list(rules.values()), self.state, mirrors)
        groups = [self.param_groups[number] for number in rules]
        _, params, places = map(list, zip(*some, strict=True))
        state = {param: self.state[param] for param in params if param in self.state}
        mirrors = [self._mirrors[param] for param in params if param in self._mirrors]
        return Concern(params, places, groups, list(rules.values()), state, mirrors)

    def _own_rules(
        self, group_rules: list[Rule], ids: list[TensorId], params: list[Tensor]
    ) -> list[Rule] | None:
        """The rule of every parameter, from that of its group; None where they are the same."""
        if type(self)._param_rule is PreparingOptimizer._param_rule:
            return None
        return list(map(self._param_rule, group_rules, ids, params))

    def _draft(self, rules: Mapping[int, Rule], placed: Iterable[Placed]) -> list[Draft]:
        """Check everything that a step of these parameters concerns, changing nothing."""
        self._check_groups(rules)
        drafts = []
        for group, param, id in placed:
            rule = self._param_rule(rules[id.group], id, param)
            zeros = zeros_of(param)
            has_grad = param.grad is not None or zeros is not None
            if not has_grad and not (rule.moves_without_grad and self.state.get(param)):
                continue
            spec = described(id, param, rule, self._mirrors.get(param), self._stand_in(param))
            check_state(self.state.get(param, {}), spec, rule, self.layout)
            part = local_of(param)
            self._engine.check(spec, part, part if param.grad is None else local_of(param.grad))
            drafts.append(Draft(group, spec, rule, has_grad, param, zeros))
        return drafts

    def _check_groups(self, rules: Mapping[int, Rule]) -> None:
        """Refuse groups that do not have any more what they were made of."""
        if len(self._given) == len(self.param_groups):
            for number, rule in rules.items():
                params = self.param_groups[number]["params"]
                check_members(number, params, self._given[number], rule)

    def _stand_in(self, param: Tensor) -> Tensor | None:
        """What has the dtype of a step without a gradient: what such a step moves."""
        own = self.state.get(param, {})
        kept = own.get(self.layout.average, own.get(self.layout.accumulator))
        return None if kept is None else local_of(kept)

    def _commit(
        self, drafts: list[Draft], rules: Mapping[int, Rule], some: Sequence[Placed] | None
    ) -> tuple[Ready, Known | None]:
        """Evaluate the schedules, then create missing state.

        Returns:
            The step, and what to remember of it if it can be recalled at all.
        """
        groups: list[int] = []
        # Of each cohort, and the numbers of the call by its counters.
        members: dict[Any, tuple[Cohort, list[Draft], dict[int, Number]]] = {}
        equal: dict[Rule, Rule] = {}
        for draft in drafts:
            group, spec, rule, has_grad, param, _ = draft
            counted = self._counter(group, rule, param)
            call = next_call(group, counted, param)
            # What a device counts is not known here, so what follows from it is a vector.
            step = call.device if isinstance(call, Tensor) else call
            rule = equal.setdefault(rule, rule)
            key = (spec.id.group, id(rule), spec.device, has_grad, step)
            if key not in members:
                cohort = Cohort(
                    rule=rule, seed=group["seed"], device=spec.device, has_grad=has_grad
                )
                members[key] = cohort, [], {}
                groups.append(spec.id.group)
            members[key][1].append(draft)
            members[key][2].setdefault(id(param if counted is None else counted), call)
        cohorts = [cohort for cohort, *_ in members.values()]
        calls = [_call_of(cohort, list(each.values())) for cohort, _, each in members.values()]
        self._evaluate(cohorts, groups, calls)
        tasks: dict[int, Task] = {}
        clocks = []
        for (cohort, mine, _), call in zip(members.values(), calls, strict=True):
            counters: dict[int, tuple[int, Tensor]] = {}  # by id, each with its number
            for group, spec, rule, _, param, zeros in mine:
                device = counter_device(group, param)
                part, join = local_of(param), joiner(param)
                init_state(self.state[param], spec, rule, self.layout, part, device, join)
                counted = self._counter(group, rule, param)
                assert counted is not None
                number, _ = counters.setdefault(id(counted), (len(counters), counted))
                tasks[spec.id.index] = Task(
                    spec=spec,
                    cohort=cohort,
                    owner=param,
                    param=part,
                    state=self.state[param],
                    counter=counted,
                    count=number if isinstance(call, Tensor) else 0,
                    mirror=self._mirrors.get(param),
                    zeros=zeros,
                )
            each = [counter for _, counter in counters.values()]
            clocks.append(Clock(each, not isinstance(call, Tensor)))
        prepared = Prepared(
            tasks=[tasks[draft.spec.id.index] for draft in drafts],
            cohorts=cohorts,
            clocks=clocks,
            is_partial=some is not None,
        )
        concern = self._concern(rules, some)
        found = gradients_of(concern.params)
        fingerprint = fingerprint_of(concern, found)
        if fingerprint is None:
            return (prepared, found.parts), None
        placed = list(self._ids() if some is None else some)
        params, ids = [param for _, param, _ in placed], [id for *_, id in placed]
        group_rules = [rules[id.group] for id in ids]
        own_rules = self._own_rules(group_rules, ids, params)
        known = Known(prepared, fingerprint, groups, ids, params, group_rules, own_rules)
        return (prepared, found.parts), known

    def _evaluate(
        self, cohorts: Sequence[Cohort], groups: Sequence[int], calls: Sequence[Number]
    ) -> None:
        """Set the numbers of the coming step.

        Args:
            cohorts: Whose.
            groups: Number of the param group of each.
            calls: Number of the call, for each.
        """
        evaluated: dict[Any, tuple[Scalars, bool]] = {}
        # Once a group: its lr may be a user's function.
        lrs = {
            number: self._group_lr(self.param_groups[number]) for number in dict.fromkeys(groups)
        }
        for cohort, number, call in zip(cohorts, groups, calls, strict=True):
            rule, key = cohort.rule, (number, id(cohort.rule), call)
            if key not in evaluated:
                t, updates = rule.update_of(call)
                evaluated[key] = rule.scalars(t, number_of(lrs[number], call)), updates
            cohort.scalars, updates = evaluated[key]
            if cohort.has_grad:
                cohort.activity = Activity.UPDATE if updates else Activity.ACCUMULATE
            elif updates and rule.loses_without_grad:
                cohort.activity = Activity.DROP
            else:
                cohort.activity = Activity.AVERAGE

    def _counter(self, group: dict[str, Any], rule: Rule, param: Tensor) -> Tensor | None:
        """The step counter that a parameter follows; None before its first step."""
        if rule.step_count is StepCount.GLOBAL:
            self._share_counter(group["step"].to(counter_device(group, param)))
            return cast(Tensor, group["step"])
        return cast("Tensor | None", self.state.get(param, {}).get(self.layout.step))

    def _is_phantom_step(self, drafts: list[Draft]) -> bool:
        """Whether ``get_optimizer_state_dict`` only wants a fresh optimizer to create its state.

        It calls step() with every lr and every gradient set to zero. State is created then, and
        nothing is counted: peers that ignore lr decay the weights there, and all of them start
        their schedules one step late.
        """
        if (
            any(self.state.values())  # a read of optimizer.state[p] leaves an empty one
            or not drafts
            or any(not _is_zero(group["lr"]) for group in self.param_groups)
        ):
            return False
        params = [draft.param for draft in drafts]
        found = any(bool(local_of(p.grad).any()) for p in params if p.grad is not None)
        if anywhere(found, params):
            return False
        for draft in drafts:
            group, spec, rule, param = draft.group, draft.spec, draft.rule, draft.param
            part, device, join = local_of(param), counter_device(group, param), joiner(param)
            init_state(self.state[param], spec, rule, self.layout, part, device, join)
        return True


def _call_of(cohort: Cohort, calls: Sequence[Number]) -> Number:
    """The number of a call for a cohort, from that of each of its counters."""
    on_device = [call for call in calls if isinstance(call, Tensor)]
    if not on_device:
        return calls[0]  # all are the same
    cohort.counts = len(on_device)
    return torch.stack(on_device)


def _is_zero(lr: float | Tensor | Callable[..., Any] | None) -> bool:
    return lr is not None and not callable(lr) and not bool(lr != 0)


def _said(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a rule may be made from."""
    return tuple([value for key, value in group.items() if key not in ("params", "param_names")])


def _is_constant(values: Iterable[Any]) -> bool:
    """Whether none of them can change without becoming another object."""
    return all(
        all(type(part) in _CONSTANT for part in (value if type(value) is tuple else (value,)))
        for value in values
    )
