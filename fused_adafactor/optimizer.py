"""The base of every dialect: the contract of ``torch.optim.Optimizer``, and the shared extras.

A dialect adds a constructor, a ``StateLayout`` and ``_rule(group)``; there is no arithmetic here
either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.arguments import EXTRA_DEFAULTS, TorchExtras, check_extras
from fused_adafactor.counting import counter
from fused_adafactor.engine import Engine
from fused_adafactor.preparing import PreparingOptimizer
from fused_adafactor.rule import StepCount
from fused_adafactor.spec import spec_of


class AdafactorBase(PreparingOptimizer):
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
        if self._stepped:
            self._finish_call()
        else:
            self._step_all()
        return loss

    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """Step one parameter from its gradient, to the bit as ``step()`` would.

        For training loops that step every parameter as its gradient arrives and then free it, such
        as kohya's and OneTrainer's; ``enable_backward_step`` is such a loop. Step hooks do not run.

        All parameters that are stepped between two calls of ``step()`` belong to one call, that of
        the next ``step()``. It steps those that are left, or have another gradient by now, and
        never a parameter with a gradient that it was stepped with, even if that is still there.
        Where one counter serves all parameters (Keras, optax) they all get its next number, and
        ``step()`` counts once. Where nobody calls ``step()``, a parameter that comes for the second
        time begins the next call; averages of parameters without gradients then do not move.

        Args:
            p: A parameter of this optimizer. Nothing happens if it has no gradient; the gradient
                is left alone.
            group: The param group that it is in, or None to look for it.

        Raises:
            RuntimeError: torch's GradScaler is at work; or as ``step``.
            TypeError: As ``step``.
            ValueError: The parameter or the group is not of this optimizer, or it is not in that
                group; ``max_grad_norm`` or ``global_clipnorm`` is given; ``nonfinite="skip"`` where
                one counter serves all parameters; or as ``step``. Nothing has been changed.
        """
        (id,) = self._find([p])
        if group is not None and group is not self.param_groups[id.group]:
            ours = any(group is mine for mine in self.param_groups)
            raise ValueError(
                f"{id} is not in the group that was given"
                + ("" if ours else ", which is none of optimizer.param_groups")
                + ". Give optimizer.param_groups[i] (load_state_dict makes new ones), or no group"
            )
        if p.grad is None:
            return
        if self._stepped and p in self._stepped:
            self._count_call()
        self._step_some([p])

    def step_parameter(self, p: Tensor, group: dict[str, Any], i: int) -> None:
        """As ``step_param``, under the name and with the arguments that OneTrainer calls.

        Args:
            p: The parameter.
            group: The param group that it is in.
            i: Its place in the group, which is not needed.
        """
        self.step_param(p, group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by torch's GradScaler. Derived from the groups, so it survives deepcopy and pickle.
        return any(group.get("fused") for group in self.param_groups)

    def explain(self) -> str:
        """The plan of a step as a table: per tensor the backend, launch, sweeps, bytes, and why.

        Raises:
            RuntimeError: The backend asked for cannot run; the same as ``step()`` would raise.
        """
        rules = self._rules(range(len(self.param_groups)))
        specs = []
        for _, param, id in self._ids():
            grad = param if param.grad is None else param.grad
            rule = self._param_rule(rules[id.group], id, param)
            specs.append(spec_of(id, param, grad, rule, self._mirrors.get(param)))
        return self._engine.explain(specs, list(rules.values()))
