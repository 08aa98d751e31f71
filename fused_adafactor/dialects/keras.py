"""keras.optimizers.Adafactor as a torch optimizer: its arguments, numbers and checkpoints."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Self, Unpack, override

from fused_adafactor.arguments import Extras, require_numbers, rule_arguments
from fused_adafactor.counting import counter
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import (
    DecayFactor,
    Eps1Rule,
    GradClip,
    GradClipKind,
    Rule,
    StepCount,
    WeightAverage,
    WeightDecay,
)
from fused_adafactor.schedule import PowerDecay, StepSize
from fused_adafactor.spec import TensorId, TensorSpec, spec_of
from fused_adafactor.state import StateLayout, adopt, check_state, entries_of

LearningRate: TypeAlias = float | Tensor | Callable[..., Any]

# Keras' arguments that are keys of a param group; learning_rate is the key 'lr'.
_CONFIG = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "beta_2_decay",
    "epsilon_1",
    "epsilon_2",
    "clip_threshold",
    "relative_step",
)


class Adafactor(AdafactorBase):
    """``keras.optimizers.Adafactor`` for torch parameters.

    Per tensor, with rho_t = min(lr, t^-1/2) and u = g / sqrt(v), v factored over the last two
    dimensions of g² + epsilon_1; the parameter is decayed first and s is taken after that::

        p ← (1 - lr weight_decay) p
        p ← p - s rho_t u / max(1, RMS(u) / clip_threshold),  s = max(epsilon_2, RMS(p))

    t counts updates, for all parameters together: Keras' ``iterations`` plus one. Gradients are
    divided by loss_scale_factor, averaged over gradient_accumulation_steps, then clipped.

    Args:
        params: Parameters, named parameters or param groups. A group may have any of the
            hyperparameters below for itself; its lr is 'lr' or 'learning_rate'.
        learning_rate: A float; a schedule: a function of the count of earlier calls (micro-steps
            included), or a ``LearningRateSchedule`` of Keras; or a function without arguments. A
            tensor of one element too. It is the groups' 'lr', so torch's schedulers take a number.
        beta_2_decay: -c in beta2_t = 1 - t^-c, at most 0.
        epsilon_1: Added to g².
        epsilon_2: Floor of RMS(p).
        clip_threshold: Clipping threshold of RMS(u), above 0.
        relative_step: Changes nothing, as in Keras: rho_t is min(lr, t^-1/2) in any case.
        weight_decay: Decoupled, times lr; None for none. See ``exclude_from_weight_decay``.
        clipnorm: Clip each gradient to this norm. 0 or less is off, here and in the next two.
        clipvalue: Clip each element of the gradients to [-clipvalue, clipvalue].
        global_clipnorm: Clip all gradients to this common norm.
        use_ema: Keep a moving average of the parameters, updated by every call, for parameters
            without gradient too. ``finalize_variable_values`` writes it to the parameters.
        ema_momentum: Of that average, in [0, 1].
        ema_overwrite_frequency: The average is written to the parameters every so many updates.
        loss_scale_factor: What the loss was multiplied by, above 0; see ``scale_loss``.
        gradient_accumulation_steps: Update at every k-th call, with the average gradient; at least
            2, or None. A parameter without gradient in the k-th call loses what it gathered.
        name: For ``get_config``.
        **extras: See ``fused_adafactor.arguments.Extras``. max_grad_norm is one more way of
            clipping, so it excludes the three above.

    State, by Keras' names:
        r [..., n] and c [..., m], or velocity in full shape where nothing is factored; with the
        options average and gradient_accumulator in full shape. The count of calls is the 'step' of
        the groups, one tensor for all. Keras' full-size velocity of factored weights does not exist
        here. ``save_own_variables`` and ``load_own_variables`` pass checkpoints to Keras and back.

    Raises:
        ValueError: An argument out of range, with Keras' texts where Keras checks it.

    Differs from ``keras.optimizers.Adafactor`` where that has a bug or loses precision:
        State and arithmetic are float32 for bfloat16 and float16 parameters, so the count of steps
        does not stall, and an epsilon_1 below float16's range gives no NaN. A function of the
        iteration is taken as Keras' own message promises. lr is not rounded to float32. A call
        without any gradient is a no-op of ``step()``; ``apply`` raises as Keras does.

    References:
        Shazeer and Stern, Adafactor, arXiv 1804.04235, Algorithms 4 and 5.
    """

    layout = StateLayout(
        row_var="r",
        col_var="c",
        var="velocity",
        accumulator="gradient_accumulator",
        keepdim=False,
    )
    lr_advice = "Give learning_rate as a number, or let the schedule do all of it"

    def __init__(
        self,
        params: ParamsT,
        learning_rate: LearningRate = 0.001,
        beta_2_decay: float = -0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float = 1.0,
        relative_step: bool = True,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        """Check the arguments as Keras does and build the param groups."""
        if not isinstance(learning_rate, float | Tensor) and not callable(learning_rate):
            raise ValueError(
                "Argument `learning_rate` should be float, or an instance of LearningRateSchedule, "
                "or a callable (that takes in the current iteration value and returns the "
                "corresponding learning rate value). "
                f"Received instead: learning_rate={learning_rate}"
            )
        self.name = "adafactor" if name is None else name
        defaults = {
            "lr": learning_rate,
            "beta_2_decay": beta_2_decay,
            "epsilon_1": epsilon_1,
            "epsilon_2": epsilon_2,
            "clip_threshold": clip_threshold,
            "relative_step": relative_step,
            "weight_decay": weight_decay,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "use_ema": use_ema,
            "ema_momentum": ema_momentum,
            "ema_overwrite_frequency": ema_overwrite_frequency,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            # One flag a parameter of the group; None for no exclusion. Here, so that copies and
            # checkpoints have it.
            "excluded_from_weight_decay": None,
        }
        _check({**defaults, "max_grad_norm": extras.get("max_grad_norm")})
        super().__init__(params, defaults, extras)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "learning_rate" in param_group:
            param_group = dict(param_group)
            param_group["lr"] = param_group.pop("learning_rate")
        super().add_param_group(param_group)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        _check(group)
        shared = rule_arguments(group)
        decay = group["weight_decay"]
        return Rule(
            factoring=Factoring(View.LAST_TWO),
            eps1_rule=Eps1Rule.ADD,
            eps1=group["epsilon_1"],
            eps2=group["epsilon_2"],
            beta2=PowerDecay(-group["beta_2_decay"]),
            step_size=StepSize(inverse_sqrt=True),
            clip_threshold=group["clip_threshold"],
            weight_decay=WeightDecay(decay, DecayFactor.LR, before_rms=True) if decay else None,
            step_count=StepCount.GLOBAL,
            grad_divisor=group["loss_scale_factor"] or 1.0,
            accumulation_steps=group["gradient_accumulation_steps"] or 1,
            weight_average=WeightAverage(
                group["ema_momentum"], group["ema_overwrite_frequency"] or None
            )
            if group["use_ema"]
            else None,
            **{**shared, "grad_clip": _grad_clip(group) or shared["grad_clip"]},
        )

    @override
    def _param_rule(self, rule: Rule, id: TensorId, param: Tensor) -> Rule:
        excluded = self.param_groups[id.group]["excluded_from_weight_decay"]
        if excluded is None:
            return rule
        first = sum(len(group["params"]) for group in self.param_groups[: id.group])
        return _without_decay(rule) if excluded[id.index - first] else rule

    @override
    def _group_lr(self, group: Mapping[str, Any]) -> float | Tensor | None:
        lr = group["lr"]
        if not callable(lr):
            return cast("float | Tensor", lr)
        if not _takes_iteration(lr):
            return _lr_value(lr())
        calls = group["step"]
        if calls.device.type != "cpu" or group["capturable"]:
            raise ValueError(
                "learning_rate is a Python function of the iteration, but capturable=True, "
                "fused=True and nonfinite='skip' keep the count of iterations on the device. Give "
                "learning_rate as a number, or switch these off"
            )
        return _lr_value(lr(int(calls)))

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "name": self.name}

    # --- Keras' properties and methods -----------------------------------------------------------

    @property
    def learning_rate(self) -> float | Tensor:
        """The lr of the next call; the first group's, if groups differ. Set, it is every group's.

        Raises:
            TypeError: On setting a number where there is a ``LearningRateSchedule``, as Keras.
        """
        lr = self._group_lr(self.param_groups[0])
        assert lr is not None
        return lr

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        if not callable(learning_rate) and any(_is_schedule(g["lr"]) for g in self.param_groups):
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its "
                "`learning_rate` constructor argument, hence its learning rate is not settable. If "
                "you need the learning rate to be settable, you should instantiate the optimizer "
                "with a float `learning_rate` argument."
            )
        if not callable(learning_rate) and not isinstance(learning_rate, Tensor):
            learning_rate = float(learning_rate)
        for group in self.param_groups:
            group["lr"] = learning_rate

    @property
    def iterations(self) -> int:
        """Updates made so far; calls, where gradients are not accumulated. Waits for a device."""
        return int(self.param_groups[0]["step"]) // (
            self.param_groups[0]["gradient_accumulation_steps"] or 1
        )

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times loss_scale_factor, to be differentiated in its place."""
        factor = self.param_groups[0]["loss_scale_factor"]
        return loss if factor is None else loss * factor

    def exclude_from_weight_decay(
        self, var_list: Iterable[Tensor] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Switch weight decay off for some parameters; a second call replaces the first.

        Args:
            var_list: These parameters.
            var_names: And those whose name contains a match of one of these regular expressions.
                Needs an optimizer that was given named parameters.

        Raises:
            ValueError: After the first step, or names without named parameters.
        """
        if any(self.state.values()):
            raise ValueError(
                "`exclude_from_weight_decay()` can only be configured before the optimizer is "
                "built. It is built by its first step"
            )
        listed = {id(param) for param in var_list or ()}
        patterns = [var_names] if isinstance(var_names, str) else list(var_names or ())
        named = all("param_names" in group for group in self.param_groups)
        if patterns and not named:
            raise ValueError(
                "exclude_from_weight_decay(var_names=...) needs names: give the optimizer "
                "model.named_parameters() in place of model.parameters(), or use var_list"
            )
        found = re.compile("|".join(patterns)) if patterns else None
        for group in self.param_groups:
            names = group["param_names"] if named else [""] * len(group["params"])
            group["excluded_from_weight_decay"] = [
                id(param) in listed or (found is not None and found.search(name) is not None)
                for param, name in zip(group["params"], names, strict=True)
            ]

    @torch.no_grad()
    def finalize_variable_values(self, var_list: Iterable[Tensor] | None = None) -> None:
        """Write the averages of use_ema to the parameters, as Keras' ``fit`` does at its end.

        Args:
            var_list: These parameters only; None for all.

        Raises:
            ValueError: A parameter that is not this optimizer's.
        """
        layout = self.layout
        chosen = {id(param) for param in self._own(var_list)}
        for group, param, _ in self._ids():
            state = self.state.get(param, {})
            if group["use_ema"] and id(param) in chosen and layout.average in state:
                param.copy_(state[layout.average])
                if layout.compensation in state:  # it belongs to the value that was overwritten
                    state[layout.compensation].zero_()

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Tensor | Any | None, Tensor]]
    ) -> Tensor:
        """``apply`` for pairs of gradient and parameter; returns the count of calls, 0-d."""
        pairs = list(grads_and_vars)
        self.apply([grad for grad, _ in pairs], [param for _, param in pairs])
        return cast(Tensor, self.param_groups[0]["step"])

    def apply(
        self,
        grads: Sequence[Tensor | Any | None],
        trainable_variables: Iterable[Tensor] | None = None,
    ) -> None:
        """Step with given gradients; what the parameters have in ``.grad`` stays there, unused.

        Args:
            grads: Tensors or arrays, cast to the dtype of their parameters; None for no gradient.
            trainable_variables: Their parameters; None for all, in the order of the groups.

        Raises:
            ValueError: Not as many gradients as parameters, none at all, or a parameter that is not
                this optimizer's; Keras' texts.
        """
        if len(grads) == 0:
            return
        params = self._own(trainable_variables)
        if len(params) != len(grads):
            raise ValueError(
                "When passing `grads` as a list of gradient tensors, the gradients must match "
                f"`optimizer.variables` one-to-on. Received a list of {len(grads)} gradients, but "
                f"the optimizer is tracking {len(params)} trainable variables."
            )
        if all(grad is None for grad in grads):
            raise ValueError("No gradients provided for any variable.")
        before = [(param, param.grad) for _, param, _ in self._ids()]
        try:
            for param, _ in before:
                param.grad = None
            for param, grad in zip(params, grads, strict=True):
                if grad is not None:
                    param.grad = torch.as_tensor(grad, dtype=param.dtype, device=param.device)
            self.step()
        finally:
            for param, own in before:
                param.grad = own

    def get_config(self) -> dict[str, Any]:
        """Keras' configuration, of the first group; ``from_config`` of either side takes it.

        A ``LearningRateSchedule`` is serialized as Keras does it; another function stays as it is.
        """
        group = self.param_groups[0]
        lr = group["lr"]
        if _is_schedule(lr):
            lr = _keras_schedules().serialize(lr)
        elif isinstance(lr, Tensor):
            lr = float(lr)
        return {
            "name": self.name,
            "learning_rate": lr,
            **{key: group[key] for key in _CONFIG},
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], params: ParamsT, **extras: Unpack[Extras]
    ) -> Self:
        """An optimizer of ``params`` by a configuration, from here or from Keras.

        Raises:
            ImportError: The schedule in it is Keras' and Keras is not installed.
        """
        arguments = dict(config)
        if isinstance(arguments.get("learning_rate"), dict):
            arguments["learning_rate"] = _keras_schedules().deserialize(arguments["learning_rate"])
        return cls(params, **arguments, **extras)

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Put the state into a mapping as a Keras optimizer puts its own: arrays by '0', '1', ...

        A Keras optimizer of the same options over variables of the same shapes loads it. Where
        Keras has a velocity that it overwrites before it reads it, zeros are put. Needs numpy.
        """
        for number, variable in enumerate(self._variables()):
            store[str(number)] = self._saved(variable).numpy()

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Take the state from a mapping that ``save_own_variables`` here or in Keras has filled.

        The learning rate comes with it, in float32, unless it is a function. Needs numpy.

        Raises:
            ValueError: Not as many arrays as this optimizer's options and parameters make, or one
                of another shape; nothing has been changed then. (Keras warns, and starts anew.)
        """
        variables = self._variables()
        if len(store) != len(variables):
            raise ValueError(
                f"the saved optimizer has {len(store)} variables, but this one, {self.name!r}, has "
                f"{len(variables)}: parameters or options (use_ema, gradient_accumulation_steps, a "
                "learning_rate that is a function) differ"
            )
        values = [_from_numpy(store[str(number)]) for number in range(len(variables))]
        states: dict[Tensor, dict[str, Any]] = {param: {} for _, param, _ in self._ids()}
        for variable, value in zip(variables, values, strict=True):
            owner, name = variable.owner, variable.entry
            if owner is None and tuple(value.shape) != ():
                raise ValueError(f"saved {name} has shape {tuple(value.shape)}; expected ()")
            if owner is not None and name not in (_DUMMY, _UNUSED):
                entry = entries_of(owner.spec, owner.rule, self.layout)[name]
                states[owner.param][self.layout.key(name)] = adopt(
                    value, name, entry, owner.spec, self.layout
                )
        for owner in {id(v.owner): v.owner for v in variables if v.owner is not None}.values():
            state, names = states[owner.param], entries_of(owner.spec, owner.rule, self.layout)
            check_state(state, owner.spec, owner.rule, self.layout)
            ordered = {key: state[key] for key in map(self.layout.key, names) if key in state}
            states[owner.param] = ordered
        self.state.update(states)
        for variable, value in zip(variables, values, strict=True):
            if variable.entry == _ITERATION:
                self._share_counter(counter(float(value), self.param_groups[0]["step"].device))
            elif variable.entry == _LEARNING_RATE:
                self.learning_rate = float(value)

    # --- helpers ---------------------------------------------------------------------------------

    def _own(self, params: Iterable[Tensor] | None) -> list[Tensor]:
        """The given parameters, or all of them."""
        everything = [param for _, param, _ in self._ids()]
        if params is None:
            return everything
        given, known = list(params), {id(param) for param in everything}
        for param in given:
            if id(param) not in known:
                raise ValueError(
                    f"Unknown variable: of shape {tuple(param.shape)}. This optimizer can only be "
                    "called for the variables it was originally built with. When working with a "
                    "new set of variables, you should recreate a new optimizer instance."
                )
        return given

    def _variables(self) -> list[_Variable]:
        """What a Keras optimizer of these parameters and options tracks, in its order."""
        rules = [self._rule(group) for group in self.param_groups]
        owners = []
        for _, param, id in self._ids():
            rule = self._param_rule(rules[id.group], id, param)
            owners.append(_Owner(param, spec_of(id, param, param, rule), rule))
        variables = [_Variable(_ITERATION)]
        if not callable(self.param_groups[0]["lr"]):
            variables.append(_Variable(_LEARNING_RATE))
        variables += [_Variable("average", o) for o in owners if o.rule.weight_average]
        variables += [_Variable("accumulator", o) for o in owners if o.rule.accumulation_steps > 1]
        for owner in owners:
            entries = (_DUMMY, _DUMMY, "var") if owner.spec.view is None else _FACTORED
            variables += [_Variable(entry, owner) for entry in entries]
        return variables

    def _saved(self, variable: _Variable) -> Tensor:
        """The value of a variable of Keras, on the host; what it would be before it exists."""
        group, owner = self.param_groups[0], variable.owner
        if variable.entry == _ITERATION:
            return torch.tensor(int(group["step"]), dtype=torch.int32)
        if owner is None:
            return torch.tensor(float(group["lr"]), dtype=torch.float32)
        if variable.entry == _DUMMY:
            return torch.zeros((), dtype=torch.int32)
        if variable.entry == _UNUSED:
            return torch.zeros((), dtype=owner.spec.math_dtype).expand(owner.spec.shape)
        value = self.state.get(owner.param, {}).get(self.layout.key(variable.entry))
        if value is None and variable.entry == "average" and int(group["step"]):
            value = owner.param  # Keras averages from the first call on, with a gradient or not
        if value is None:
            entry = entries_of(owner.spec, owner.rule, self.layout)[variable.entry]
            value = torch.zeros(entry.shape, dtype=owner.spec.math_dtype)
        return cast(Tensor, value).detach().to("cpu", owner.spec.math_dtype)


@dataclass(frozen=True)
class _Owner:
    """A parameter that variables of Keras belong to."""

    param: Tensor
    spec: TensorSpec
    rule: Rule


@dataclass(frozen=True)
class _Variable:
    """A variable of a Keras optimizer: a glossary name or one of those below, and its parameter."""

    entry: str
    owner: _Owner | None = None


_ITERATION, _LEARNING_RATE = "iteration", "learning rate"
_DUMMY = "dummy"  # an int32 0, where an unfactored variable would have r and c
_UNUSED = "unused"  # a factored variable's velocity: overwritten by each step before it is read
_FACTORED = ("row_var", "col_var", _UNUSED)


def _check(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    names = ("beta_2_decay", "epsilon_1", "epsilon_2", "clip_threshold", "ema_momentum")
    clips = {key: group[key] for key in ("clipnorm", "clipvalue", "global_clipnorm")}
    require_numbers(
        lr=None if callable(lr) else lr,
        weight_decay=group["weight_decay"],
        loss_scale_factor=group["loss_scale_factor"],
        **{name: group[name] for name in names},
        **clips,
    )
    if callable(lr):
        _takes_iteration(lr)
    elif isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    elif not lr >= 0.0:
        raise ValueError(f"learning_rate should be >= 0 but is: {lr}")
    _check_ranges(group)
    _check_clips(clips, group["max_grad_norm"])
    _check_counts(group)


def _check_ranges(group: Mapping[str, Any]) -> None:
    if not group["beta_2_decay"] <= 0.0:
        raise ValueError(f"beta_2_decay should be <= 0 but is: {group['beta_2_decay']}")
    for name in ("epsilon_1", "epsilon_2"):
        if group[name] is None or not group[name] >= 0.0:
            raise ValueError(f"{name} should be >= 0 but is: {group[name]}")
    if group["clip_threshold"] is None or not group["clip_threshold"] > 0.0:
        raise ValueError(f"clip_threshold should be > 0 but is: {group['clip_threshold']}")
    if group["weight_decay"] is not None and not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay should be >= 0 or None but is: {group['weight_decay']}")
    scale = group["loss_scale_factor"]
    if scale is not None and not scale > 0.0:
        raise ValueError(f"loss_scale_factor should be > 0 or None but is: {scale}")


def _check_clips(clips: Mapping[str, float | None], max_grad_norm: float | None) -> None:
    if sum(value is not None for value in clips.values()) > 1:
        raise ValueError(
            "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: "
            + ", ".join(f"{key}={value}" for key, value in clips.items())
        )
    if max_grad_norm is not None and any(value is not None for value in clips.values()):
        raise ValueError(
            "max_grad_norm excludes clipnorm, clipvalue and global_clipnorm. Received: "
            + ", ".join(f"{key}={value}" for key, value in clips.items())
            + f", max_grad_norm={max_grad_norm}"
        )


def _check_counts(group: Mapping[str, Any]) -> None:
    """Keras' checks of gradient accumulation and of the average of the weights."""
    steps = group["gradient_accumulation_steps"]
    if steps and not (isinstance(steps, int) and steps >= 2):
        raise ValueError(
            "`gradient_accumulation_steps` must be an integer >= 2. Received: "
            f"gradient_accumulation_steps={steps}"
        )
    if not group["use_ema"]:
        return
    momentum, every = group["ema_momentum"], group["ema_overwrite_frequency"]
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"`ema_momentum` must be in the range [0, 1]. Received: ema_momentum={momentum}"
        )
    if every and (not isinstance(every, int) or every < 1):
        raise ValueError(
            "`ema_overwrite_frequency` must be an integer >= 1 or None. Received: "
            f"ema_overwrite_frequency={every}"
        )


def _grad_clip(group: Mapping[str, Any]) -> GradClip | None:
    """Keras clips by what is above 0; a global norm that is not finite makes every gradient NaN."""
    kinds = (
        ("clipnorm", GradClipKind.NORM),
        ("global_clipnorm", GradClipKind.GLOBAL_NORM),
        ("clipvalue", GradClipKind.VALUE),
    )
    for key, kind in kinds:
        if group[key] is not None and group[key] > 0:
            is_global = kind is GradClipKind.GLOBAL_NORM
            return GradClip(kind, float(group[key]), nan_if_not_finite=is_global)
    return None


@lru_cache(maxsize=64)
def _without_decay(rule: Rule) -> Rule:
    return replace(rule, weight_decay=None)


def _is_schedule(lr: Any) -> bool:
    """Whether this is a ``LearningRateSchedule``, of whichever Keras, without importing one."""
    return any(base.__name__ == "LearningRateSchedule" for base in type(lr).__mro__)


def _takes_iteration(lr: Callable[..., Any]) -> bool:
    """Whether a function is to be called with the iteration: it has one required parameter.

    Raises:
        ValueError: It has more.
    """
    if _is_schedule(lr):
        return True
    try:
        parameters = inspect.signature(lr).parameters.values()
    except ValueError:  # a builtin that does not tell
        return True
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise ValueError(
            "learning_rate should take the iteration, or nothing, but takes "
            f"{len(required)} arguments: {', '.join(required)}"
        )
    return bool(required)


def _lr_value(value: Any) -> float | Tensor:
    """What a schedule has returned, as a number; a tensor stays where it is."""
    return value.detach() if isinstance(value, Tensor) else float(value)


def _from_numpy(array: Any) -> Tensor:
    """A copy of an array; float32 of a dtype that torch does not take (numpy's bfloat16)."""
    numpy = importlib.import_module("numpy")
    array = numpy.asarray(array)
    if array.dtype.name not in ("int32", "int64", "float16", "float32", "float64"):
        array = array.astype(numpy.float32)
    return torch.tensor(array)


def _keras_schedules() -> Any:
    """Keras' module of schedules; imported only where a schedule of Keras is at hand."""
    return importlib.import_module("keras").optimizers.schedules
