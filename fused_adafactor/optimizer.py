"""The base of every dialect: the contract of ``torch.optim.Optimizer``, and the shared extras.

A dialect adds a constructor, a ``StateLayout`` and ``_rule(group)``; there is no arithmetic here
either.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.engine import Engine, Task
from fused_adafactor.plan import Activity
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import GradClip, GradClipKind, Nonfinite, Rule, Scalars, StepCount
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorId, TensorSpec, spec_of
from fused_adafactor.state import (
    StateLayout,
    adopt,
    check_count,
    check_state,
    counter,
    entries_of,
    init_state,
)


class TorchExtras(TypedDict, total=False):
    """Keyword-only arguments that every dialect takes beyond its peer's.

    Attributes:
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend is used or refused
            with the reason; "auto" chooses, and ``explain()`` says why. The environment variable
            FUSED_ADAFACTOR_BACKEND sets what "auto" means.
        rounding: How a bfloat16 or float16 parameter is written: "nearest", "stochastic" (bfloat16
            only) or "kahan".
        seed: Key of stochastic rounding; part of the state dict.
        state_dtype: Dtype of the second moments: None for float32 (float64 for float64
            parameters), or torch.float32, torch.float64 or torch.bfloat16. In bfloat16 an average
            stops moving once a step changes it by less than 1/256 of itself.
        max_grad_norm: Clip the gradients of all groups by their common norm inside the step, as
            ``torch.nn.utils.clip_grad_norm_`` before it, without rewriting them; None for no
            clipping.
        nonfinite: "propagate", or "skip" to leave parameter, state and step as they are when a
            gradient holds NaN or Inf, or values whose sum of squares overflows. With a step
            counter per parameter it is that parameter that is skipped, with a global one (Keras,
            optax) or a common norm it is the whole step.
        capturable: Keep the step counter on the device, so that a step never asks the host for its
            number.
        fused: True to take part in torch's GradScaler protocol (``grad_scale`` and ``found_inf``).
        differentiable: Refused: a fused step has no autograd graph.
    """

    backend: str
    rounding: str
    seed: int
    state_dtype: torch.dtype | None
    max_grad_norm: float | None
    nonfinite: str
    capturable: bool
    fused: bool | None
    differentiable: bool


class Extras(TorchExtras, total=False):
    """The extras of a dialect whose peer has no ``foreach`` of its own.

    Attributes:
        foreach: Accepted, changes nothing: tensors are always stepped together.
    """

    foreach: bool | None


_EXTRA_DEFAULTS: dict[str, Any] = {
    "rounding": "nearest",
    "seed": 0,
    "state_dtype": None,
    "max_grad_norm": None,
    "nonfinite": "propagate",
    "capturable": False,
    "fused": None,
    "foreach": None,
    "differentiable": False,
}
_STATE_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)


class AdafactorBase(torch.optim.Optimizer, abc.ABC):
    """What all dialects share. Not constructed directly.

    Args:
        params: Parameters, named parameters, or param groups, as for any torch optimizer.
        defaults: The dialect's own hyperparameters.
        extras: The arguments of ``Extras``.

    Raises:
        TypeError: An unknown extra, or a hyperparameter given as text.
        ValueError: A value out of range; the message names the argument.
    """

    layout: ClassVar[StateLayout] = StateLayout()
    lr_advice: ClassVar[str] = "Give lr as a number"

    def __init__(self, params: ParamsT, defaults: dict[str, Any], extras: TorchExtras) -> None:
        """Check the extras and build the param groups."""
        given = dict(extras)
        self.backend = cast(str, given.pop("backend", "auto"))
        self._engine = Engine(backends.parse_request(self.backend), self.layout)
        unknown = sorted(set(given) - set(_EXTRA_DEFAULTS))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}; "
                f"beyond its peer's arguments it takes {', '.join(['backend', *_EXTRA_DEFAULTS])}"
            )
        super().__init__(params, {**_EXTRA_DEFAULTS, **given, **defaults})

    @abc.abstractmethod
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """Turn a param group into a rule.

        Raises:
            ValueError: A hyperparameter is out of range.
        """

    def _param_rule(self, rule: Rule, id: TensorId, param: Tensor) -> Rule:
        """The rule of one parameter, where it differs from that of its group."""
        return rule

    def _group_lr(self, group: Mapping[str, Any]) -> float | Tensor | None:
        """The group's lr of this step, as given."""
        return cast("float | Tensor | None", group["lr"])

    @staticmethod
    def _shared(group: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a rule that comes from the extras, as arguments of ``Rule``."""
        norm = group["max_grad_norm"]
        return {
            "rounding": Rounding.parse(group["rounding"]),
            "state_dtype": group["state_dtype"],
            "nonfinite": Nonfinite(group["nonfinite"]),
            "grad_clip": None
            if norm is None
            else GradClip(GradClipKind.GLOBAL_NORM, float(norm), 1e-6),
        }

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            TypeError: A hyperparameter of the group is text.
            ValueError: A hyperparameter of the group is out of range.
        """
        if isinstance(param_group, dict):
            merged = {**self.defaults, **param_group}
            _check_extras(merged)
            if self._rule(merged).step_count is StepCount.GLOBAL:
                shared = self.param_groups[0]["step"] if self.param_groups else None
                param_group["step"] = (
                    counter(0.0, torch.device("cpu")) if shared is None else shared
                )
        super().add_param_group(param_group)

    def _ids(self) -> Iterable[tuple[dict[str, Any], Tensor, TensorId]]:
        """Every parameter once, with its group and its identity."""
        index = 0
        seen: set[int] = set()
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for place, param in enumerate(group["params"]):
                if id(param) not in seen:
                    seen.add(id(param))
                    yield group, param, TensorId(index, number, names[place] if names else None)
                index += 1

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

    def _draft(self) -> list[tuple[dict[str, Any], TensorSpec, Rule, Activity, Tensor]]:
        """Check everything that this step concerns, changing nothing."""
        for group in self.param_groups:
            _check_group(group)
        rules = [self._rule(group) for group in self.param_groups]
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
            drafts.append((group, spec, rule, activity, param))
        return drafts if any(draft[3] is Activity.UPDATE for draft in drafts) else []

    def _commit(
        self, drafts: list[tuple[dict[str, Any], TensorSpec, Rule, Activity, Tensor]]
    ) -> list[Task]:
        """Evaluate the schedules, then create missing state and advance the step counters."""
        evaluated: dict[Any, tuple[Scalars, bool]] = {}
        # Once a group: its lr may be a user's function.
        groups = {id(group): group for group, *_ in drafts}
        lrs = {key: self._group_lr(group) for key, group in groups.items()}
        numbers = []
        for group, _, rule, _, param in drafts:
            call = _next_call(group, self._counter(group, rule, param), param)
            key = (id(group), id(rule), call)
            if key not in evaluated:
                t, updates = rule.update_of(call)
                evaluated[key] = (rule.scalars(t, _number(lrs[id(group)], call)), updates)
            numbers.append(evaluated[key])
        tasks = []
        for (group, spec, rule, activity, param), (scalars, updates) in zip(
            drafts, numbers, strict=True
        ):
            state = self.state[param]
            init_state(state, spec, rule, self.layout, param, _counter_device(group, param))
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
        for task in tasks:
            if task.rule.step_count is StepCount.PER_PARAM and task.activity not in (
                Activity.AVERAGE,
                Activity.DROP,
            ):
                task.counter.add_(1)
        if tasks:
            for counted in {
                id(t.counter): t.counter for t in tasks if t.rule.step_count is StepCount.GLOBAL
            }.values():
                counted.add_(1)
        return tasks

    def _counter(self, group: dict[str, Any], rule: Rule, param: Tensor) -> Tensor | None:
        """The step counter that a parameter follows; None before its first step."""
        if rule.step_count is StepCount.GLOBAL:
            self._share_counter(group["step"].to(_counter_device(group, param)))
            return cast(Tensor, group["step"])
        return cast("Tensor | None", self.state.get(param, {}).get(self.layout.step))

    def _share_counter(self, shared: Tensor) -> None:
        """Let every group follow one counter tensor: the global count of steps."""
        for group in self.param_groups:
            group["step"] = shared

    def _is_phantom_step(
        self, drafts: list[tuple[dict[str, Any], TensorSpec, Rule, Activity, Tensor]]
    ) -> bool:
        """Whether ``get_optimizer_state_dict`` only wants a fresh optimizer to create its state.

        It calls step() with every lr and every gradient set to zero. State is created then, and
        nothing is counted: peers that ignore lr decay the weights there, and all of them start
        their schedules one step late.
        """
        if (
            any(self.state.values())  # a read of optimizer.state[p] leaves an empty one
            or not drafts
            or any(_known_nonzero(g["lr"]) for g in self.param_groups)
        ):
            return False
        if any(bool(param.grad.any()) for *_, param in drafts if param.grad is not None):
            return False
        for group, spec, rule, _, param in drafts:
            init_state(
                self.state[param], spec, rule, self.layout, param, _counter_device(group, param)
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
        rules = [self._rule(group) for group in self.param_groups]
        specs = []
        for _, param, id in self._ids():
            grad = param if param.grad is None else param.grad
            specs.append(spec_of(id, param, grad, self._param_rule(rules[id.group], id, param)))
        return self._engine.explain(specs, rules)

    @override
    def state_dict(self) -> StateDict:
        """As ``torch.optim.Optimizer.state_dict``, without Python functions.

        A schedule given as a function stays with the optimizer that has it, so that every state
        dict can be pickled and loaded with ``weights_only=True``.
        """
        state_dict = super().state_dict()
        state_dict["param_groups"] = [
            {key: value for key, value in group.items() if not callable(value)}
            for group in state_dict["param_groups"]
        ]
        return state_dict

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this dialect or of its peer.

        Each entry gets the dtype that its rule wants, not that of the parameter, so that resuming
        in bfloat16 is bit exact. Hyperparameters that the loaded groups lack (a peer knows no
        extras) stay as they are.

        Args:
            state_dict: From ``state_dict()`` of this dialect or its peer.

        Raises:
            ValueError: Groups or state that do not fit; parameters, groups and state are left as
                they were.
        """
        source: StateDict = {}

        def complete(_: torch.optim.Optimizer, loaded: StateDict) -> StateDict:
            source.update(self._completed(loaded))
            self._check_loaded(source)
            return source

        def restore(_: torch.optim.Optimizer) -> None:
            self._restore(source)

        # Registered now, so as to come after the user's own pre-hooks and before their post-hooks.
        handles = [
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _completed(self, loaded: StateDict) -> StateDict:
        """The state dict with every key that our groups have and the loaded groups lack."""
        groups = loaded["param_groups"]
        kept = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in self.param_groups
        ]
        if len(groups) == len(kept):  # otherwise the base class raises
            # A peer's live state dict may hold its schedules as functions; ours stay as they are.
            groups = [
                {**ours, **{key: value for key, value in theirs.items() if not callable(value)}}
                for ours, theirs in zip(kept, groups, strict=True)
            ]
        return {**loaded, "param_groups": groups}

    def _loaded_specs(
        self, source: StateDict
    ) -> Iterable[tuple[dict[str, Any], dict[str, Any], Tensor, TensorSpec, Rule]]:
        """(loaded group, loaded state, parameter, spec, rule) where there is loaded state."""
        for saved_group, group in zip(source["param_groups"], self.param_groups, strict=True):
            rule = self._rule({**saved_group, "params": group["params"]})
            ids = {id(param): tensor_id for g, param, tensor_id in self._ids() if g is group}
            for number, param in zip(saved_group["params"], group["params"], strict=True):
                if number in source["state"] and id(param) in ids:
                    tensor_id = ids[id(param)]
                    own = self._param_rule(rule, tensor_id, param)
                    spec = spec_of(tensor_id, param, param, own)
                    yield saved_group, source["state"][number], param, spec, own

    def _check_loaded(self, source: StateDict) -> None:
        fits = len(source["param_groups"]) == len(self.param_groups) and all(
            len(saved["params"]) == len(group["params"])
            for saved, group in zip(source["param_groups"], self.param_groups, strict=True)
        )
        if not fits:
            return  # the base class raises, with torch's texts
        for group in source["param_groups"]:
            _check_group(group)
        for _, saved, _, spec, rule in self._loaded_specs(source):
            numbers_as_tensors = {
                key: torch.as_tensor(value) if isinstance(value, int | float) else value
                for key, value in saved.items()
            }
            check_state(numbers_as_tensors, spec, rule, self.layout, any_device=True)

    def _restore(self, source: StateDict) -> None:
        """Replace what the base class has cast to the parameter's dtype."""
        for group, saved, param, spec, rule in self._loaded_specs(source):
            state = self.state[param]
            for name, entry in entries_of(spec, rule, self.layout).items():
                key = self.layout.key(name)
                if key not in saved:
                    continue
                state[key] = adopt(saved[key], name, entry, spec, self.layout)
                if name == "step":
                    state[key] = state[key].to(_counter_device(group, param))

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Dropped by the base class' __getstate__; a copy's step() on an accelerator wants it.
        self.__dict__.setdefault("_warned_capturable_if_run_uncaptured", True)
        self.__dict__.setdefault("backend", "auto")
        if "_engine" not in self.__dict__:
            self._engine = Engine(backends.parse_request(self.backend), self.layout)
        for group in self.param_groups:
            for key, value in {**_EXTRA_DEFAULTS, **self.defaults}.items():
                group.setdefault(key, value)
            for param in group["params"]:
                own = self.state.get(param, {})
                if self.layout.step in own and not isinstance(own[self.layout.step], Tensor):
                    value = float(own[self.layout.step])
                    own[self.layout.step] = counter(value, _counter_device(group, param))
        if "step" in self.param_groups[0]:
            # Copies and loaded state dicts have a counter per group, all of one value.
            shared = self.param_groups[0]["step"]
            self._share_counter(
                shared
                if isinstance(shared, Tensor)
                else counter(float(shared), torch.device("cpu"))
            )


def require_numbers(**arguments: Any) -> None:
    """Refuse hyperparameters that are text, as command lines and YAML files produce them.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, str):
                raise TypeError(f"{name} must be a number, got the text {part!r}")


def require_given(**arguments: Any) -> None:
    """Refuse None where only a number will do.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{name} must be a number, got None")


def require_pair(**arguments: Any) -> None:
    """Refuse what is no pair, such as the single eps of most other optimizers.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in arguments.items():
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"{name} must be a pair, got {value!r}")


def _check_group(group: Mapping[str, Any]) -> None:
    """Check what every param group has: the extras, and a step counter where it is shared."""
    _check_extras(group)
    if "step" in group:
        check_count(group["step"], "the 'step' of the param groups")


def _check_extras(group: Mapping[str, Any]) -> None:
    """Check the values of the extras in a param group."""
    if group["differentiable"]:
        raise ValueError(
            "differentiable=True is not available: the step is fused and writes in place, so "
            "autograd has nothing to go through. Use a functional optimizer for meta-learning"
        )
    Rounding.parse(group["rounding"])
    if group["nonfinite"] not in [member.value for member in Nonfinite]:
        raise ValueError(f"nonfinite must be 'propagate' or 'skip', got {group['nonfinite']!r}")
    if group["state_dtype"] not in _STATE_DTYPES:
        raise ValueError(
            "state_dtype must be None, torch.float32, torch.float64 or torch.bfloat16, got "
            f"{group['state_dtype']!r}"
            + (
                "; squared gradients leave float16's range"
                if group["state_dtype"] is torch.float16
                else ""
            )
        )
    if (
        isinstance(group["seed"], bool)
        or not isinstance(group["seed"], int)
        or not 0 <= group["seed"] < 2**63
    ):
        raise ValueError(f"seed must be an int from 0 to 2**63 - 1, got {group['seed']!r}")
    require_numbers(max_grad_norm=group["max_grad_norm"])
    if group["max_grad_norm"] is not None and not group["max_grad_norm"] > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {group['max_grad_norm']}")


def _counter_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Where a step counter lives: on the host, unless the host must not be asked for it."""
    on_device = group["capturable"] or group["fused"] or group["nonfinite"] == Nonfinite.SKIP.value
    return param.device if on_device else torch.device("cpu")


def _next_call(group: Mapping[str, Any], counted: Tensor | None, param: Tensor) -> Number:
    """Number of the coming call, from 1: a float, or a 0-d float64 tensor where t is one.

    The first call is no exception, so that what cannot follow a device counter is refused at once.
    """
    device = _counter_device(group, param) if counted is None else counted.device
    if device.type == "cpu" and not group["capturable"]:
        return 1.0 if counted is None else float(counted) + 1.0
    if counted is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return counted.double() + 1.0


def _number(lr: float | Tensor | None, call: Number) -> Number | None:
    """The lr as a number of float64; a device tensor stays one."""
    if not isinstance(lr, Tensor):
        return lr
    if lr.device.type == "cpu" and not isinstance(call, Tensor):
        return float(lr)
    return lr.reshape(()).double()


def _known_nonzero(lr: float | Tensor | Callable[..., Any] | None) -> bool:
    return lr is None or callable(lr) or bool(lr != 0)
