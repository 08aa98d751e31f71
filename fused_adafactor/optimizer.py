"""The base of every dialect: the contract of ``torch.optim.Optimizer``, and the shared extras.

A dialect adds a constructor, a ``StateLayout`` and ``_rule(group)``; there is no arithmetic here
either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.arguments import EXTRA_DEFAULTS, TorchExtras, check_extras
from fused_adafactor.binding import Cohort
from fused_adafactor.checkpoint import CheckpointedOptimizer, check_group
from fused_adafactor.counting import Clock, counter, counter_device, next_call, number_of
from fused_adafactor.engine import Engine, Prepared, Task
from fused_adafactor.fingerprint import Fingerprint, fingerprint_of
from fused_adafactor.plan import Activity
from fused_adafactor.rule import Rule, Scalars, StepCount
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorId, TensorSpec, spec_of
from fused_adafactor.state import check_state, init_state


class _Draft(NamedTuple):
    """A tensor that a step concerns, checked; nothing of it has been changed."""

    group: dict[str, Any]
    spec: TensorSpec
    rule: Rule
    has_grad: bool
    param: Tensor


class _Known(NamedTuple):
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


class AdafactorBase(CheckpointedOptimizer):
    """What all dialects share. Not constructed directly.

    Args:
        params: Parameters, named parameters, or param groups, as for any torch optimizer.
        defaults: The dialect's own hyperparameters.
        extras: The arguments of ``Extras``.

    Raises:
        TypeError: An unknown extra, or a hyperparameter given as text.
        ValueError: A value out of range; the message names the argument.
    """

    lr_advice: ClassVar[str] = "Give lr as a number"
    # Keys that a param group may be given, by the key that it is kept under.
    aliases: ClassVar[Mapping[str, str]] = {}
    # The last step, kept for the next one; never copied, pickled or saved.
    _known: _Known | None = None
    # What every new value of a parameter is written to besides, see ``Binding.mirror``; by
    # parameter. For whoever owns the optimizer, as CPUOffload does; never copied, pickled or saved.
    _mirrors: Mapping[Tensor, Tensor] = MappingProxyType({})

    def __init__(self, params: ParamsT, defaults: dict[str, Any], extras: TorchExtras) -> None:
        """Check the extras and build the param groups."""
        given = dict(extras)
        self.backend = cast(str, given.pop("backend", "auto"))
        self._engine = Engine(backends.parse_request(self.backend), self.layout)
        unknown = sorted(set(given) - set(EXTRA_DEFAULTS))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}; "
                f"beyond its peer's arguments it takes {', '.join(['backend', *EXTRA_DEFAULTS])}"
            )
        super().__init__(params, {**EXTRA_DEFAULTS, **given, **defaults})

    def _group_lr(self, group: Mapping[str, Any]) -> float | Tensor | None:
        """The group's lr of this step; None where it is a function, which the rule then holds."""
        return None if callable(group["lr"]) else cast("float | Tensor | None", group["lr"])

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            TypeError: A hyperparameter of the group is text.
            ValueError: A hyperparameter of the group is out of range.
        """
        if isinstance(param_group, dict):
            for alias, key in self.aliases.items():
                if alias in param_group:
                    if key in param_group:
                        raise ValueError(f"a param group has both {key} and {alias}")
                    param_group = {**param_group, key: param_group[alias]}
                    del param_group[alias]
            merged = {**self.defaults, **param_group}
            check_extras(merged)
            if self._rule(merged).step_count is StepCount.GLOBAL:
                shared = self.param_groups[0]["step"] if self.param_groups else None
                param_group["step"] = (
                    counter(0.0, torch.device("cpu")) if shared is None else shared
                )
        super().add_param_group(param_group)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            self._check_schedulable()
        super().__setattr__(name, value)

    def _check_schedulable(self) -> None:
        """Refuse a torch lr scheduler where there is no number that it could scale.

        A scheduler replaces ``step`` with a wrapper of it as soon as it has noted every group's lr
        as its ``initial_lr``; left alone, it would then multiply None or a function.
        """
        for number, group in enumerate(self.param_groups):
            noted = group.get("initial_lr", 0.0)
            if noted is None or callable(noted):
                for any_group in self.param_groups:
                    any_group.pop("initial_lr", None)
                raise ValueError(
                    f"an lr scheduler needs a number to scale, but the lr of param group {number} "
                    f"is {'None' if noted is None else 'a function of the step'}. {self.lr_advice}"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step.

        Args:
            closure: Re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A sparse or complex gradient, overlapping memory, or different devices.
            TypeError: A dtype that cannot be stepped, or a DTensor.
            ValueError: State that does not fit its parameter, or a hyperparameter out of range. In
                every case no parameter, state or step counter has been changed.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = self._rules()
        ready = self._recall(rules)
        if ready is None:
            drafts = self._draft(rules)
            if self._is_phantom_step(drafts):
                return loss
            ready = self._commit(drafts, rules)
        self._engine.run(
            *ready, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        )
        return loss

    def _rules(self) -> list[Rule]:
        """The rule of every group, the groups checked; a group that was replaced is completed."""
        shared = [group["step"] for group in self.param_groups if "step" in group]
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if shared:
                group.setdefault("step", shared[0])
            check_group(group)
        rules = [self._rule(group) for group in self.param_groups]
        if rules[0].step_count is StepCount.GLOBAL:
            self._check_agreement(rules)
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

    def _recall(self, rules: list[Rule]) -> tuple[Prepared, list[Tensor]] | None:
        """The step as it was prepared before, with this step's numbers, and the gradients.

        None if anything else than the gradients' values has changed, which is then found out and
        checked as in a first step.
        """
        known, self._known = self._known, None  # nothing stale is alive while a new one is made
        if known is None:
            return None
        found = fingerprint_of(self.param_groups, rules, self.state, self._mirrors)
        if found is None or not known.fingerprint.matches(found[0]):
            return None
        own_rules = self._own_rules(known.group_rules, known.ids, known.params)
        if own_rules != known.own_rules:
            return None
        calls = [clock.next_call() for clock in known.prepared.clocks]
        if any(call is None for call in calls):
            return None
        self._evaluate(known.prepared.cohorts, known.groups, cast("list[Number]", calls))
        self._known = known
        return known.prepared, found[1]

    def _own_rules(
        self, group_rules: list[Rule], ids: list[TensorId], params: list[Tensor]
    ) -> list[Rule] | None:
        """The rule of every parameter, from that of its group; None where they are the same."""
        if type(self)._param_rule is AdafactorBase._param_rule:
            return None
        return list(map(self._param_rule, group_rules, ids, params))

    def _draft(self, rules: list[Rule]) -> list[_Draft]:
        """Check everything that this step concerns, changing nothing."""
        drafts = []
        for group, param, id in self._ids():
            rule = self._param_rule(rules[id.group], id, param)
            moves_without_grad = rule.weight_average is not None or rule.accumulation_steps > 1
            if param.grad is None and (not moves_without_grad or param not in self.state):
                continue
            grad = param if param.grad is None else param.grad
            spec = spec_of(id, param, grad, rule, self._mirrors.get(param))
            check_state(self.state.get(param, {}), spec, rule, self.layout)
            self._engine.check(spec, param, grad)
            drafts.append(_Draft(group, spec, rule, param.grad is not None, param))
        return drafts if any(draft.has_grad for draft in drafts) else []

    def _commit(self, drafts: list[_Draft], rules: list[Rule]) -> tuple[Prepared, list[Tensor]]:
        """Evaluate the schedules, then create missing state; what comes of it is remembered."""
        groups: list[int] = []
        calls: list[Number] = []
        members: dict[Any, tuple[Cohort, list[_Draft]]] = {}
        equal: dict[Rule, Rule] = {}
        for draft in drafts:
            group, spec, rule, has_grad, param = draft
            counted = self._counter(group, rule, param)
            call = next_call(group, counted, param)
            # What a device counts is not known here: the counter itself stands for it.
            step = id(param if counted is None else counted) if isinstance(call, Tensor) else call
            rule = equal.setdefault(rule, rule)
            key = (spec.id.group, id(rule), spec.device, has_grad, isinstance(call, Tensor), step)
            if key not in members:
                cohort = Cohort(
                    rule=rule, seed=group["seed"], device=spec.device, has_grad=has_grad
                )
                members[key] = cohort, []
                groups.append(spec.id.group)
                calls.append(call)
            members[key][1].append(draft)
        cohorts = [cohort for cohort, _ in members.values()]
        self._evaluate(cohorts, groups, calls)
        tasks: dict[int, Task] = {}
        clocks = []
        for (cohort, mine), call in zip(members.values(), calls, strict=True):
            counters = {}
            for group, spec, rule, _, param in mine:
                device = counter_device(group, param)
                init_state(self.state[param], spec, rule, self.layout, param, device)
                counted = self._counter(group, rule, param)
                assert counted is not None
                counters[id(counted)] = counted
                tasks[spec.id.index] = Task(
                    spec=spec,
                    cohort=cohort,
                    param=param,
                    state=self.state[param],
                    counter=counted,
                    mirror=self._mirrors.get(param),
                )
            clocks.append(Clock(list(counters.values()), not isinstance(call, Tensor)))
        prepared = Prepared(
            tasks=[tasks[draft.spec.id.index] for draft in drafts], cohorts=cohorts, clocks=clocks
        )
        found = fingerprint_of(self.param_groups, rules, self.state, self._mirrors)
        if found is not None:
            _, params, ids = map(list, zip(*self._ids(), strict=True))
            group_rules = [rules[id.group] for id in ids]
            self._known = _Known(
                prepared,
                found[0],
                groups,
                ids,
                params,
                group_rules,
                self._own_rules(group_rules, ids, params),
            )
        return prepared, [draft.param.grad for draft in drafts if draft.param.grad is not None]

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
            elif updates and rule.accumulation_steps > 1:
                cohort.activity = Activity.DROP
            else:
                cohort.activity = Activity.AVERAGE

    def _counter(self, group: dict[str, Any], rule: Rule, param: Tensor) -> Tensor | None:
        """The step counter that a parameter follows; None before its first step."""
        if rule.step_count is StepCount.GLOBAL:
            self._share_counter(group["step"].to(counter_device(group, param)))
            return cast(Tensor, group["step"])
        return cast("Tensor | None", self.state.get(param, {}).get(self.layout.step))

    def _is_phantom_step(self, drafts: list[_Draft]) -> bool:
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
        if any(bool(param.grad.any()) for *_, param in drafts if param.grad is not None):
            return False
        for group, spec, rule, _, param in drafts:
            init_state(
                self.state[param], spec, rule, self.layout, param, counter_device(group, param)
            )
        return True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by torch's GradScaler. Derived from the groups, so it survives deepcopy and pickle.
        return any(group.get("fused") for group in self.param_groups)

    def explain(self) -> str:
        """The plan of a step as a table: per tensor the backend, launch, sweeps, bytes, and why.

        Raises:
            RuntimeError: The backend asked for cannot run; the same as ``step()`` would raise.
        """
        rules = self._rules()
        specs = []
        for _, param, id in self._ids():
            grad = param if param.grad is None else param.grad
            rule = self._param_rule(rules[id.group], id, param)
            specs.append(spec_of(id, param, grad, rule, self._mirrors.get(param)))
        return self._engine.explain(specs, rules)


def _is_zero(lr: float | Tensor | Callable[..., Any] | None) -> bool:
    return lr is not None and not callable(lr) and not bool(lr != 0)
