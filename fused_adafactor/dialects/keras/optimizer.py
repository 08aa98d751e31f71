"""The optimizer: Keras' constructor, what it makes of a param group, and Keras' methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Self, Unpack, override

from fused_adafactor.arguments import KerasExtras, require_numbers, rule_arguments
from fused_adafactor.dialects.keras.arguments import (
    CONFIG,
    LearningRate,
    check,
    check_learning_rate,
    is_schedule,
    loaded_learning_rate,
    saved_learning_rate,
    value_of,
)
from fused_adafactor.dialects.keras.variables import VariablesOfKeras
from fused_adafactor.factoring import Factoring, View
from fused_adafactor.rule import DecayFactor, Eps1Rule, Rule, StepCount, WeightDecay
from fused_adafactor.schedule import PowerDecay, StepSize
from fused_adafactor.spec import TensorId


class Adafactor(VariablesOfKeras):
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
        **extras: See ``fused_adafactor.arguments.KerasExtras``. max_grad_norm is one more way of
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

    lr_advice = "Give learning_rate as a number, or let the schedule do all of it"

    aliases: ClassVar[Mapping[str, str]] = {"learning_rate": "lr"}

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
        **extras: Unpack[KerasExtras],
    ) -> None:
        """Check the arguments as Keras does and build the param groups."""
        check_learning_rate(learning_rate)
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
        check(defaults)
        super().__init__(params, defaults, extras)

    @override
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        check(group)
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
            **rule_arguments(group),
        )

    @override
    def _param_rule(self, rule: Rule, id: TensorId, param: Tensor) -> Rule:
        group = self.param_groups[id.group]
        excluded = group["excluded_from_weight_decay"]
        if excluded is None:
            return rule
        if len(excluded) != len(group["params"]):
            raise ValueError(
                f"param group {id.group} has {len(group['params'])} parameters, but had "
                f"{len(excluded)} when exclude_from_weight_decay was called: call it again, or, "
                "after the first step, add new parameters as a group, with add_param_group"
            )
        first = sum(len(group["params"]) for group in self.param_groups[: id.group])
        return _without_decay(rule) if excluded[id.index - first] else rule

    @override
    def _group_lr(self, group: Mapping[str, Any]) -> float | Tensor | None:
        lr = group["lr"]
        if not callable(lr):
            return cast("float | Tensor", lr)
        calls = group["step"]
        is_on_host = calls.device.type == "cpu" and not group["capturable"]
        return value_of(lr, int(calls) if is_on_host else None)

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
        if not callable(learning_rate) and any(is_schedule(g["lr"]) for g in self.param_groups):
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its "
                "`learning_rate` constructor argument, hence its learning rate is not settable. If "
                "you need the learning rate to be settable, you should instantiate the optimizer "
                "with a float `learning_rate` argument."
            )
        if not callable(learning_rate) and not isinstance(learning_rate, Tensor):
            require_numbers(learning_rate=learning_rate)
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

        What is excluded are places in the groups, so that state dicts can say it: a tensor that is
        put in the place of another is treated as that one was. Groups that are added later exclude
        nothing. A group whose number of parameters has changed is refused by the next step.

        Args:
            var_list: These parameters.
            var_names: And those whose name contains a match of one of these regular expressions.
                Needs an optimizer that was given named parameters.

        Raises:
            ValueError: After the first step, or names without named parameters, or with a group
                that has not as many names as parameters.
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
        flags = []
        for number, group in enumerate(self.param_groups):
            params = group["params"]
            names = group["param_names"] if named else [""] * len(params)
            if len(names) != len(params):
                raise ValueError(
                    f"param group {number} has {len(params)} parameters, but {len(names)} names in "
                    "'param_names'"
                )
            flags.append(
                [
                    id(param) in listed or (found is not None and found.search(name) is not None)
                    for param, name in zip(params, names, strict=True)
                ]
            )
        for group, excluded in zip(self.param_groups, flags, strict=True):
            group["excluded_from_weight_decay"] = excluded

    def get_config(self) -> dict[str, Any]:
        """Keras' configuration, of the first group; ``from_config`` of either side takes it.

        A ``LearningRateSchedule`` is serialized as Keras does it; another function stays as it is.
        """
        group = self.param_groups[0]
        return {
            "name": self.name,
            "learning_rate": saved_learning_rate(group["lr"]),
            **{key: group[key] for key in CONFIG},
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], params: ParamsT, **extras: Unpack[KerasExtras]
    ) -> Self:
        """An optimizer of ``params`` by a configuration, from here or from Keras.

        Raises:
            ImportError: The schedule in it is Keras' and Keras is not installed.
        """
        arguments = dict(config)
        if "learning_rate" in arguments:
            arguments["learning_rate"] = loaded_learning_rate(arguments["learning_rate"])
        return cls(params, **arguments, **extras)


@lru_cache(maxsize=64)
def _without_decay(rule: Rule) -> Rule:
    return replace(rule, weight_decay=None)
