"""Keras' variables: which there are, in which order, and what of them is saved and loaded."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fused_adafactor.counting import counter
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import Rule
from fused_adafactor.spec import TensorSpec, spec_of
from fused_adafactor.state import StateLayout, adopt, check_state, entries_of


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


class VariablesOfKeras(AdafactorBase):
    """The part of the optimizer that speaks of variables as Keras does.

    Attributes:
        name: Keras' name of the optimizer.
    """

    layout = StateLayout(
        row_var="r",
        col_var="c",
        var="velocity",
        accumulator="gradient_accumulator",
        keepdim=False,
    )
    name: str

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

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Put the state into a mapping as a Keras optimizer puts its own: arrays by '0', '1', ...

        A Keras optimizer of the same options over variables of the same shapes loads it. Where
        Keras has a velocity that it overwrites before it reads it, zeros are put. Needs numpy.
        """
        for number, variable in enumerate(self._variables()):
            store[str(number)] = self._saved(variable).numpy()

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Take the state from a mapping that ``save_own_variables`` here or in Keras has filled.

        The learning rate comes with it, in float32. Keras has only one, the first group's here: it
        becomes that of every group, also of those that had their own. It does not come where the
        first group's is a function, and groups whose own is a function keep that. Needs numpy.

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
        self.state.update(self._loaded_states(variables, values))
        for variable, value in zip(variables, values, strict=True):
            if variable.entry == _ITERATION:
                self._share_counter(counter(float(value), self.param_groups[0]["step"].device))
            elif variable.entry == _LEARNING_RATE:
                for group in self.param_groups:
                    if not callable(group["lr"]):
                        group["lr"] = float(value)

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

    def _loaded_states(
        self, variables: Sequence[_Variable], values: Sequence[Tensor]
    ) -> dict[Tensor, dict[str, Any]]:
        """The state of every parameter, of the values of Keras' variables, checked."""
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
        return states

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


def _from_numpy(array: Any) -> Tensor:
    """A copy of an array; float32 of a dtype that torch does not take (numpy's bfloat16)."""
    numpy = importlib.import_module("numpy")
    array = numpy.asarray(array)
    if array.dtype.name not in ("int32", "int64", "float16", "float32", "float64"):
        array = array.astype(numpy.float32)
    return torch.tensor(array)
