"""Saving and loading: the half of the ``torch.optim.Optimizer`` contract that concerns state dicts.

State keeps the dtype that its rule wants, whatever the dtype of the parameter; functions never
enter a state dict; a state dict that does not fit changes nothing.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict
from typing_extensions import override

from fused_adafactor import backends
from fused_adafactor.arguments import EXTRA_DEFAULTS, check_extras
from fused_adafactor.counting import check_count, counter, counter_device
from fused_adafactor.dividing import refuse_cut_blocks
from fused_adafactor.engine import Engine
from fused_adafactor.rule import Rule
from fused_adafactor.sharding import joiner, part_of, shard_of
from fused_adafactor.spec import TensorId, TensorSpec, local_of, spec_of
from fused_adafactor.state import (
    StateLayout,
    adopt,
    check_state,
    entries_of,
    with_moment_of,
    with_shapes_of,
)


class _Loaded(NamedTuple):
    """One parameter that has loaded state: its number, group and state, and what it should fit."""

    number: int
    group: dict[str, Any]
    state: dict[str, Any]
    param: Tensor
    spec: TensorSpec
    rule: Rule


class CheckpointedOptimizer(torch.optim.Optimizer, abc.ABC):
    """What a dialect must say for its state to be saved and loaded, and the saving and loading."""

    layout: ClassVar[StateLayout] = StateLayout()
    backend: str
    _engine: Engine

    @abc.abstractmethod
    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """Turn a param group into a rule.

        Raises:
            ValueError: A hyperparameter is out of range.
        """

    def _param_rule(self, rule: Rule, id: TensorId, param: Tensor) -> Rule:
        """The rule of one parameter, where it differs from that of its group."""
        return rule

    def _ids(self) -> Iterable[tuple[dict[str, Any], Tensor, TensorId]]:
        """Every parameter once, with its group and its identity."""
        return ids_of(self.param_groups)

    @override
    def state_dict(self) -> StateDict:
        """As ``torch.optim.Optimizer.state_dict``, without Python functions.

        A schedule given as a function stays with the optimizer that has it, so that every state
        dict can be pickled and loaded with ``weights_only=True``.
        """
        return without_functions(super().state_dict())

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this dialect or of its peer.

        Each entry gets the dtype that its rule wants, not that of the parameter, so that resuming
        in bfloat16 is bit exact. Hyperparameters that the loaded groups lack (a peer knows no
        extras) stay as they are. A first moment is rounded to blocks of 8 bits, or taken out of
        them, as the momentum_dtype of its group then says; blocks of a parameter that lay in
        memory the other way round are rounded once more.

        Args:
            state_dict: From ``state_dict()`` of this dialect or its peer.

        Raises:
            ValueError: Groups or state that do not fit; parameters, groups and state are left as
                they were.
        """
        source: StateDict = {}

        def complete(_: torch.optim.Optimizer, loaded: StateDict) -> StateDict:
            self._check_origin(loaded)
            source.update(self._completed(loaded))
            if self._fits(source):  # otherwise the base class raises, with torch's texts
                source["state"] = source["state"] | self._with_moments(source)
                self._check_loaded(source)
            return source

        def restore(_: torch.optim.Optimizer) -> None:
            self._restore(source)

        with hooked_load(self, complete, restore):
            super().load_state_dict(state_dict)

    def _check_origin(self, loaded: StateDict) -> None:
        """Refuse what state alone cannot tell: another optimizer's groups, or a lost counter.

        Unfactored state looks alike in many optimizers; their hyperparameters do not.
        """
        if not loaded["state"]:
            return
        common = {"params", "param_names", "step", "initial_lr"}
        common |= {"lr", "weight_decay", "eps", "maximize"}
        own = set(self.defaults) - set(EXTRA_DEFAULTS) - common
        for number, group in enumerate(loaded["param_groups"]):
            theirs = set(group) - set(EXTRA_DEFAULTS) - common
            if theirs and not own & theirs:
                raise ValueError(
                    f"param group {number} of the loaded state dict is that of another optimizer: "
                    f"it has {', '.join(sorted(map(repr, theirs)))} and nothing of "
                    f"{type(self).__name__}'s own"
                )
        counts = [group.get("step") for group in loaded["param_groups"]]
        counted = any("step" in group for group in self.param_groups)
        if counted and (None in counts or len({float(count) for count in counts}) > 1):
            raise ValueError(
                "every loaded param group needs 'step', the one count of steps that all share; "
                f"got {counts}"
            )

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
        return self._in_calls({**loaded, "param_groups": groups}, loaded["param_groups"])

    def _in_calls(self, completed: StateDict, theirs: list[dict[str, Any]]) -> StateDict:
        """Counts of updates as counts of calls, where the loaded groups accumulate nothing.

        A peer has counted updates; with ``gradient_accumulation_steps`` ours counts calls.
        """
        groups, state, key = [], dict(completed["state"]), self.layout.step
        for group, saved in zip(completed["param_groups"], theirs, strict=False):
            calls = group.get("gradient_accumulation_steps") or 1
            if calls == 1 or "gradient_accumulation_steps" in saved:
                groups.append(group)
                continue
            groups.append({**group, "step": group["step"] * calls} if "step" in saved else group)
            for number in saved["params"]:
                own = state.get(number, {})
                if key in own:
                    state[number] = {**own, key: own[key] * calls}
        return {**completed, "param_groups": groups, "state": state}

    def _loaded(self, source: StateDict) -> Iterable[_Loaded]:
        """Every parameter that has loaded state; the groups of ``source`` are complete."""
        for saved, group in zip(source["param_groups"], self.param_groups, strict=True):
            rule = self._rule({**saved, "params": group["params"]})
            ids = {id(param): tensor_id for g, param, tensor_id in self._ids() if g is group}
            for number, param in zip(saved["params"], group["params"], strict=True):
                if number in source["state"] and id(param) in ids:
                    own = self._param_rule(rule, ids[id(param)], param)
                    part, shard = local_of(param), shard_of(ids[id(param)], param)
                    spec = spec_of(ids[id(param)], part, part, own, shard)
                    refuse_cut_blocks(spec, own)
                    yield _Loaded(number, saved, source["state"][number], param, spec, own)

    def _fits(self, source: StateDict) -> bool:
        """Whether there are as many groups, and parameters of each, as here."""
        return len(source["param_groups"]) == len(self.param_groups) and all(
            len(saved["params"]) == len(group["params"])
            for saved, group in zip(source["param_groups"], self.param_groups, strict=True)
        )

    def _with_moments(self, source: StateDict) -> dict[int, dict[str, Any]]:
        """The loaded states, shaped as ours, with first moments as their rules want them."""
        for group in source["param_groups"]:
            check_group(group)
        fitted = {}
        for number, _, saved, _, spec, rule in self._loaded(source):
            shaped = with_shapes_of(saved, spec, rule, self.layout)
            fitted[number] = with_moment_of(shaped, spec, rule, self.layout)
        return fitted

    def _check_loaded(self, source: StateDict) -> None:
        for _, _, saved, _, spec, rule in self._loaded(source):
            numbers_as_tensors = {
                key: torch.as_tensor(value) if isinstance(value, int | float) else value
                for key, value in saved.items()
            }
            check_state(numbers_as_tensors, spec, rule, self.layout, any_device=True)

    def _restore(self, source: StateDict) -> None:
        """Replace what the base class has cast to the parameter's dtype."""
        for _, group, saved, param, spec, rule in self._loaded(source):
            state = self.state[param]
            for name, entry in entries_of(spec, rule, self.layout).items():
                key = self.layout.key(name)
                if key not in saved:
                    continue
                mine = part_of(torch.as_tensor(saved[key]), entry, spec, param)
                state[key] = joiner(param)(adopt(mine, name, entry, spec, self.layout), entry)
                if name == "step":
                    state[key] = state[key].to(counter_device(group, param))

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
            for key, value in {**EXTRA_DEFAULTS, **self.defaults}.items():
                group.setdefault(key, value)
            for param in group["params"]:
                own = self.state.get(param, {})
                if self.layout.step in own and not isinstance(own[self.layout.step], Tensor):
                    value = float(own[self.layout.step])
                    own[self.layout.step] = counter(value, counter_device(group, param))
        if "step" in self.param_groups[0]:
            # Copies and loaded state dicts have a counter per group, all of one value.
            shared = self.param_groups[0]["step"]
            self._share_counter(
                shared
                if isinstance(shared, Tensor)
                else counter(float(shared), torch.device("cpu"))
            )

    def _share_counter(self, shared: Tensor) -> None:
        """Let every group follow one counter tensor: the global count of steps."""
        for group in self.param_groups:
            group["step"] = shared


def ids_of(
    param_groups: Iterable[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], Tensor, TensorId]]:
    """Every parameter of param groups once, with its group and its identity."""
    index = 0
    seen: set[int] = set()
    for number, group in enumerate(param_groups):
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            if id(param) not in seen:
                seen.add(id(param))
                named = names[place] if names and place < len(names) else None
                yield group, param, TensorId(index, number, named)
            index += 1


def without_functions(state_dict: StateDict) -> StateDict:
    """A state dict whose param groups have no Python functions."""
    groups = [
        {key: value for key, value in group.items() if not callable(value)}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@contextlib.contextmanager
def hooked_load(
    optimizer: torch.optim.Optimizer,
    before: Callable[[torch.optim.Optimizer, StateDict], StateDict],
    after: Callable[[torch.optim.Optimizer], None],
) -> Iterator[None]:
    """A load of a state dict with something done next to torch's own loading, within user's hooks.

    Args:
        optimizer: What is loaded.
        before: Returns the state dict that torch loads.
        after: Follows it.
    """
    # Registered now, so as to come after the user's own pre-hooks and before their post-hooks.
    handles = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_group(group: Mapping[str, Any]) -> None:
    """Check what every param group has: the extras, and a step counter where it is shared."""
    check_extras(group)
    if "step" in group:
        check_count(group["step"], "the 'step' of the param groups")
