"""The base of every dialect: the contract of ``torch.optim.Optimizer``, and the shared extras.

A dialect adds a constructor, a ``StateLayout`` and ``_rule(group)``; there is no arithmetic here
either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.arguments import EXTRA_DEFAULTS, check_extras
from fused_adafactor.compiling import uncompiled
from fused_adafactor.counting import counter
from fused_adafactor.engine import Engine, metrics_of_steps
from fused_adafactor.in_backward import BackwardStep
from fused_adafactor.joining import joins
from fused_adafactor.metrics import Metrics
from fused_adafactor.partial import PartialOptimizer
from fused_adafactor.plan import Plan, describe
from fused_adafactor.rule import StepCount
from fused_adafactor.sharding import Given, described


class AdafactorBase(PartialOptimizer):
    """What all dialects share. Not constructed directly.

    Args:
        params: Parameters, named parameters, or param groups, as for any torch optimizer.
        defaults: The dialect's own hyperparameters.
        extras: The arguments of ``arguments.Extras``.

    Raises:
        TypeError: An unknown extra, or a hyperparameter given as text.
        ValueError: A value out of range; the message names the argument.
    """

    lr_advice: ClassVar[str] = "Give lr as a number"
    # Keys that a param group may be given, by the key that it is kept under.
    aliases: ClassVar[Mapping[str, str]] = {}
    # What steps in the backward pass, while something does; never copied, pickled or saved.
    _in_backward: BackwardStep | None = None

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], extras: Mapping[str, object]
    ) -> None:
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
            if self._in_backward is not None:
                self._in_backward.check_groups([merged], first=len(self.param_groups))
        super().add_param_group(param_group)
        self._given = (*self._given, Given.of(self.param_groups[-1]["params"]))
        if self._in_backward is not None:
            self._in_backward.watch()

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            self._check_schedulable()
        super().__setattr__(name, value)

    @override
    def _patch_step_function(self) -> None:
        """Wrap ``step`` as every optimizer does, and hide what steps from torch.compile."""
        super()._patch_step_function()
        cls = type(self)
        for name in ("step", "step_param", "zero_grad"):
            setattr(cls, name, uncompiled(getattr(cls, name)))

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
            TypeError: A dtype that cannot be stepped, or a DTensor whose sums are still to be
                taken, or that has another placement than its gradient.
            ValueError: State that does not fit its parameter, a parameter that was flattened to be
                distributed (FSDP1, ZeRO-3), or a hyperparameter out of range. In every case no
                parameter, state or step counter has been changed.
        """
        self._accelerator_graph_capture_health_check()
        if self._in_backward is not None or self._stepped:
            self._refuse_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._in_backward.flush()
        if self._stepped:
            self._finish_call()
        else:
            self._step_all()
        if self._in_backward is not None:
            self._in_backward.watch()
        return loss

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``.

        Gradients that were freed in the backward pass stay None, whatever ``set_to_none`` says.
        """
        if self._in_backward is not None:
            self._in_backward.drop_waiting()
        super().zero_grad(set_to_none)

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
        self._refuse_scaler()
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

    def enable_backward_step(self, model: torch.nn.Module | None = None) -> BackwardStep:
        """Step every parameter in the backward pass, as its gradient arrives, and free it there.

        The gradients of a model are then never in memory together, and the numbers are those of
        ``step()``, bit by bit. Small gradients are gathered to a megabyte before they are stepped,
        and at the end of the pass. The training loop stays as it is: ``step()`` still belongs after
        every ``backward()`` and does what is left (gradients that were assigned by hand, averages,
        counts, hooks, closures), and so does ``zero_grad()``::

            with optimizer.enable_backward_step(model):
                for batch in batches:
                    loss(model(batch)).backward()
                    optimizer.step()
                    optimizer.zero_grad()

        The lr is that of the time of ``backward()``. A step pre-hook finds no gradients. A
        parameter that gets its gradient from several re-entrant checkpoints is refused as one with
        a second gradient. Copies, pickles and state dicts of the optimizer know nothing of this.
        What accumulates several gradients in ``.grad`` cannot be done: use
        ``gradient_accumulation_steps``. ``torch.nn.utils.clip_grad_norm_`` and torch's GradScaler
        find no gradients. Distributed parameters must get their gradients in the same order on all
        processes, as under FSDP2.

        Args:
            model: What is trained, to find out whether something in it keeps gradients from being
                stepped as they arrive; None where nothing does.

        Returns:
            A handle: ``remove()``, or the end of a ``with`` block, ends it.

        Raises:
            RuntimeError: It is enabled already, here or by another optimizer; or the model or a
                module in it is wrapped in DistributedDataParallel, which sums gradients after they
                have arrived.
            ValueError: The model has none of this optimizer's parameters, a parameter is a flat one
                of FSDP1, or a param group has ``fused=True`` (torch's GradScaler), a common norm to
                clip by, or ``nonfinite="skip"`` where one counter serves all parameters.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                "parameters are stepped in the backward pass already; call remove() of the handle "
                "that enable_backward_step returned first"
            )

        reference = weakref.ref(self)

        def leave() -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer._in_backward = None

        self._in_backward = BackwardStep(self, model, leave)
        return self._in_backward

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by torch's GradScaler. Derived from the groups, so it survives deepcopy and pickle.
        return any(group.get("fused") for group in self.param_groups)

    @torch.no_grad()
    def finalize_variable_values(self, var_list: Iterable[Tensor] | None = None) -> None:
        """Write the averages of use_ema to the parameters, as Keras' ``fit`` does at its end.

        Args:
            var_list: These parameters only; None for all.

        Raises:
            ValueError: A parameter that is not this optimizer's.
        """
        layout = self.layout
        params = self._all_params() if var_list is None else list(var_list)
        for param, id in zip(params, self._find(params), strict=True):
            state = self.state.get(param, {})
            if self.param_groups[id.group]["use_ema"] and layout.average in state:
                param.copy_(state[layout.average])
                if layout.compensation in state:  # it belongs to the value that was overwritten
                    state[layout.compensation].zero_()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients together at the last update, before clipping; 0-d, on a device.

        None before an update under ``max_grad_norm``, ``clipnorm`` or ``global_clipnorm``, for
        which it is computed (as for ``nonfinite="skip"`` where all share a step count), and where
        parameters were stepped one by one. Of gradients of several devices it is on that of the
        first. After the replay of a CUDA graph it is that of the replay.
        """
        return None if self._engine.grad_sq is None else self._engine.grad_sq.sqrt()

    def metrics(self) -> dict[str, Metrics]:
        """What the last update of each parameter has found out of it; see ``Metrics``.

        By the parameter's name, or "#" and its position among all parameters. The numbers fall out
        of the step and are only read here, which waits for the device. A parameter is absent that
        has no elements, has not been updated yet, or whose update has been prepared anew since.
        """
        known = [self._known, *(self._partial_steps or {}).values()]
        found = metrics_of_steps([each.prepared for each in known if each is not None])
        return {id.label: found[param] for _, param, id in self._ids() if param in found}

    def explain(self) -> str:
        """The plan of a step as a table: per tensor the backend, launch, sweeps, bytes, and why.

        Raises:
            RuntimeError: The backend asked for cannot run; the same as ``step()`` would raise.
        """
        return "\n\n".join(map(describe, self.plans()))

    def plans(self) -> list[Plan]:
        """What a step would execute, as data: one plan for each backend.

        A parameter without a gradient stands for one.

        Raises:
            RuntimeError: As ``explain``.
        """
        rules = self._rules(range(len(self.param_groups)))
        self._check_groups(rules)
        specs = []
        for _, param, id in self._ids():
            rule = self._param_rule(rules[id.group], id, param)
            specs.append(described(id, param, rule, self._mirrors.get(param)))
        return self._engine.plan(specs, joins(list(rules.values())))
