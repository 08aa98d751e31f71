"""Steps of some of the parameters, between two calls of ``step()`` or within one.

A tensor's result depends on that tensor alone, so the parameters of a model can be stepped one
after the other, to the same bits. What such steps share is a call: the number that a common counter
has, and what ``step()`` still has to do at its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import StateDict
from typing_extensions import override

from fused_adafactor.preparing import Draft, Known, Placed, PreparingOptimizer, Ready
from fused_adafactor.rule import Nonfinite, Rule, StepCount
from fused_adafactor.spec import TensorId

# Steps of some parameters that are kept, where there are not more parameters than that.
_STEPS_KEPT = 64
# What clips by a norm of all gradients, which a step of some parameters cannot know.
_COMMON_NORMS = ("max_grad_norm", "global_clipnorm")


class _Taken(NamedTuple):
    """A gradient that a parameter was stepped with; it is not kept alive."""

    grad: weakref.ref[Tensor]
    version: int | None

    @classmethod
    def of(cls, grad: Tensor) -> _Taken:
        """Remember a gradient."""
        return cls(weakref.ref(grad), None if grad.is_inference() else grad._version)

    def is_all_of(self, grad: Tensor | None) -> bool:
        """Whether there is no gradient but this one: no other, and nothing was added to it."""
        return grad is None or (self.grad() is grad and self == _Taken.of(grad))


class PartialOptimizer(PreparingOptimizer):
    """Takes steps of some parameters."""

    # Nothing of this is ever copied, pickled or saved.
    # The last steps of some parameters, by the ids of these, the latest at the end.
    _partial_steps: dict[tuple[int, ...], Known] | None = None
    # Where each parameter was when it was last looked for.
    _places: dict[Tensor, TensorId] | None = None
    # Parameters that were stepped by themselves since the last call of step().
    _stepped: dict[Tensor, _Taken] | None = None

    @override
    def _commit(
        self, drafts: list[Draft], rules: Mapping[int, Rule], some: Sequence[Placed] | None
    ) -> tuple[Ready, Known | None]:
        if some is None:
            self._look_around()  # something has changed; maybe there are fewer parameters
        return super()._commit(drafts, rules, some)

    def _step_some(self, params: Sequence[Tensor]) -> None:
        """Step some parameters, each to the bit as a step of all would.

        A counter that all parameters share is read, and stays where it is until ``_finish_call``.
        Without a gradient only the average of a parameter moves, and gradients that were
        accumulated are dropped if this call updates. The same parameters are stepped as they were
        prepared the last time.

        Args:
            params: Parameters of this optimizer, each once.

        Raises:
            RuntimeError: As ``step``.
            TypeError: As ``step``.
            ValueError: A parameter is not of this optimizer, gradients are clipped by a common
                norm, or are skipped together; or as ``step``.
        """
        ids = self._find(params)
        rules = self._rules(dict.fromkeys(id.group for id in ids))
        self._refuse_what_joins(rules)
        some = [
            (self.param_groups[id.group], param, id)
            for param, id in zip(params, ids, strict=True)
            if param.grad is not None or rules[id.group].moves_without_grad
        ]
        if not some:
            return
        if self._partial_steps is None:
            self._partial_steps = {}
        key = tuple(id(param) for _, param, _ in some)
        known = self._partial_steps.pop(key, None)
        ready = self._recall(known, rules, some)
        if ready is None:
            known = None
            ready, known = self._commit(self._draft(rules, some), rules, some)
        if known is not None:
            self._partial_steps[key] = known
            if len(self._partial_steps) > max(_STEPS_KEPT, len(self._places or ())):
                del self._partial_steps[next(iter(self._partial_steps))]
        self._run(ready)
        self._engine.grad_sq = None  # that of some gradients is not that of all
        if self._stepped is None:
            self._stepped = {}
        for _, param, _ in some:
            if param.grad is not None:
                self._stepped[param] = _Taken.of(param.grad)

    def _finish_call(self) -> None:
        """Step what was not stepped since the last call was finished, and count the call.

        Parameters that have another gradient by now are stepped again.
        """
        params, stepped = self._all_params(), self._stepped or {}
        if len(params) != len(self._places or ()):
            self._look_around()
        self._step_some([p for p in params if p not in stepped or not stepped[p].is_all_of(p.grad)])
        self._count_call()

    def _count_call(self) -> None:
        """Count a call whose parameters have been stepped."""
        if "step" in self.param_groups[0]:
            self.param_groups[0]["step"].add_(1)
        self._stepped = None

    # --- what there is ----------------------------------------------------------------------------

    def _all_params(self) -> list[Tensor]:
        """Every parameter once."""
        return list(dict.fromkeys(chain.from_iterable(g["params"] for g in self.param_groups)))

    def _find(self, params: Sequence[Tensor]) -> list[TensorId]:
        """Where parameters are.

        Raises:
            ValueError: One is not of this optimizer.
        """
        places = self._places_of(params)
        for param in params:
            if param not in places:
                raise ValueError(
                    f"a tensor of shape {tuple(param.shape)} and dtype {param.dtype} is not a "
                    "parameter of this optimizer. Step its parameters, or add it by add_param_group"
                )
        return [places[param] for param in params]

    def _owns(self, param: Tensor) -> bool:
        """Whether it is a parameter of this optimizer."""
        return param in self._places_of([param])

    def _places_of(self, params: Sequence[Tensor]) -> dict[Tensor, TensorId]:
        """Where every parameter is; certainly up to date where it concerns these."""
        if self._places is None or not self._are_at(params, list(map(self._places.get, params))):
            self._look_around()
        assert self._places is not None
        return self._places

    def _are_at(self, params: Sequence[Tensor], ids: Sequence[TensorId | None]) -> bool:
        """Whether parameters are where they were, under the names that they had."""
        groups = [(group["params"], group.get("param_names")) for group in self.param_groups]
        starts = list(accumulate((len(members) for members, _ in groups), initial=0))
        for param, id in zip(params, ids, strict=True):
            if id is None or id.group >= len(groups):
                return False
            members, names = groups[id.group]
            place = id.index - starts[id.group]
            if not 0 <= place < len(members) or members[place] is not param:
                return False
            if id.name != (names[place] if names and place < len(names) else None):
                return False
        return True

    def _forget_steps(self) -> None:
        """Let go of prepared steps, and with them of the state that they were made for."""
        self._known = self._partial_steps = None

    def _look_around(self) -> None:
        """Note where every parameter is, and let go of what is not there any more."""
        self._places = {param: id for _, param, id in self._ids()}
        for key, step in list((self._partial_steps or {}).items()):
            assert self._partial_steps is not None
            if any(param not in self._places for param in step.params):
                del self._partial_steps[key]

    def _refuse_what_joins(self, rules: Mapping[int, Rule]) -> None:
        """Refuse a step of some parameters where it would have to know of all."""
        refuse_common_norms(self.param_groups)
        for number, rule in rules.items():
            if rule.nonfinite is Nonfinite.SKIP and rule.step_count is StepCount.GLOBAL:
                raise ValueError(
                    f"nonfinite='skip' (param group {number}) cannot be done while parameters are "
                    "stepped one by one: all parameters of this optimizer follow one step counter, "
                    "so they are skipped together. Use nonfinite='propagate', or call step() alone"
                )

    def _refuse_scaler(self) -> None:
        if getattr(self, "grad_scale", None) is not None or hasattr(self, "found_inf"):
            raise RuntimeError(
                "torch's GradScaler cannot be used while parameters are stepped one by one: it "
                "must see all gradients before any is used. Train in bfloat16 without it, or call "
                "step() alone"
            )

    # --- copies and state dicts -------------------------------------------------------------------

    @override
    def state_dict(self) -> StateDict:
        state_dict = super().state_dict()
        state_dict["param_groups"] = self._with_call_counted(state_dict["param_groups"])
        return state_dict

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "param_groups": self._with_call_counted(state["param_groups"])}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        self._stepped = None
        self._forget_steps()
        super().__setstate__(state)

    def _with_call_counted(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Param groups as they are once a call that is under way has been counted."""
        if not self._stepped or "step" not in self.param_groups[0]:
            return groups
        counted = self.param_groups[0]["step"] + 1
        return [{**group, "step": counted} for group in groups]


def refuse_common_norms(groups: Sequence[Mapping[str, Any]], first: int = 0) -> None:
    """Refuse to clip by a norm of all gradients.

    Args:
        groups: Param groups.
        first: Number of the first of them.

    Raises:
        ValueError: Names the argument and the group.
    """
    for number, group in enumerate(groups, first):
        for argument in _COMMON_NORMS:
            if (group.get(argument) or 0) > 0:
                raise ValueError(
                    f"{argument}={group[argument]} (param group {number}) cannot be done while "
                    "parameters are stepped one by one: it is a norm of all gradients, which are "
                    f"never there together. Use {argument}=None, or call step() alone"
                )
