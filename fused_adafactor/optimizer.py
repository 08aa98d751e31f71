"""The base of every dialect: the contract of ``torch.optim.Optimizer``, and the shared extras.

A dialect adds a constructor, a ``StateLayout`` and ``_rule(group)``; there is no arithmetic here
either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.arguments import EXTRA_DEFAULTS, TorchExtras, check_extras
from fused_adafactor.checkpoint import CheckpointedOptimizer, check_group
from fused_adafactor.counting import counter, counter_device, next_call, number_of
from fused_adafactor.engine import Engine, Task
from fused_adafactor.plan import Activity
from fused_adafactor.rule import Rule, Scalars, StepCount
from fused_adafactor.spec import TensorSpec, spec_of
from fused_adafactor.state import check_state, init_state


class _Draft(NamedTuple):
    """A tensor that a step concerns, checked; nothing of it has been changed."""

    group: dict[str, Any]
    spec: TensorSpec
    rule: Rule
    activity: Activity
    param: Tensor


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
        drafts = self._draft()
        if self._is_phantom_step(drafts):
            return loss
        self._engine.run(
            self._commit(drafts),
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
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

    def _draft(self) -> list[_Draft]:
        """Check everything that this step concerns, changing nothing."""
        rules = self._rules()
        drafts = []
        for group, param, id in self._ids():
            rule = self._param_rule(rules[id.group], id, param)
            moves_without_grad = rule.weight_average is not None or rule.accumulation_steps > 1
            if param.grad is None and (not moves_without_grad or param not in self.state):
                continue
            activity = Activity.AVERAGE if param.grad is None else Activity.UPDATE
            spec = spec_of(id, param, param if param.grad is None else param.grad, rule)
            check_state(self.state.get(param, {}), spec, rule, self.layout)
            self._engine.facts(spec.device)
            drafts.append(_Draft(group, spec, rule, activity, param))
        return drafts if any(draft.activity is Activity.UPDATE for draft in drafts) else []

    def _commit(self, drafts: list[_Draft]) -> list[Task]:
        """Evaluate the schedules, then create missing state."""
        evaluated: dict[Any, tuple[Scalars, bool]] = {}
        # Once a group: its lr may be a user's function.
        groups = {id(group): group for group, *_ in drafts}
        lrs = {key: self._group_lr(group) for key, group in groups.items()}
        numbers = []
        for group, _, rule, _, param in drafts:
            call = next_call(group, self._counter(group, rule, param), param)
            key = (id(group), id(rule), call)
            if key not in evaluated:
                t, updates = rule.update_of(call)
                evaluated[key] = (rule.scalars(t, number_of(lrs[id(group)], call)), updates)
            numbers.append(evaluated[key])
        tasks = []
        for (group, spec, rule, activity, param), (scalars, updates) in zip(
            drafts, numbers, strict=True
        ):
            state = self.state[param]
            init_state(state, spec, rule, self.layout, param, counter_device(group, param))
            if activity is Activity.UPDATE and not updates:
                activity = Activity.ACCUMULATE
            elif activity is Activity.AVERAGE and updates and rule.accumulation_steps > 1:
                activity = Activity.DROP
            counted = self._counter(group, rule, param)
            assert counted is not None
            tasks.append(
                Task(
                    spec=spec,
                    rule=rule,
                    activity=activity,
                    scalars=scalars,
                    param=param,
                    grad=param.grad,
                    state=state,
                    counter=counted,
                    seed=group["seed"],
                )
            )
        return tasks

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
            specs.append(spec_of(id, param, grad, self._param_rule(rules[id.group], id, param)))
        return self._engine.explain(specs, rules)


def _is_zero(lr: float | Tensor | Callable[..., Any] | None) -> bool:
    return lr is not None and not callable(lr) and not bool(lr != 0)
