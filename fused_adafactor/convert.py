"""State dicts of one dialect as state dicts of another: exact, or refused with the reason.

Every entry goes through its meaning in the glossary: a factor is a mean over one dimension of the
source's matrix view, and the target stores that under its own key, in its own shape, as a mean or a
sum. Nothing is estimated: what the source does not know is an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fused_adafactor.counting import counter
from fused_adafactor.dialects import adafactor_pytorch, big_vision, hf, keras, optax
from fused_adafactor.dialects import torch as torch_optim
from fused_adafactor.factoring import Factoring, MatrixView, View
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rule import (
    Momentum,
    MomentumSite,
    Rule,
    StepCount,
    WeightAverage,
    structure_of,
)
from fused_adafactor.schedule import Constant
from fused_adafactor.spec import TensorId, TensorSpec
from fused_adafactor.state import REQUIRED, canonical, check_state, entries_of

_FACTORS = ("row_var", "col_var")
_OTHERS = ("exp_avg", "var_max", "compensation", "average", "accumulator")

# Keys of param groups that decide which entries a state has.
_SETTINGS = (
    *("beta1", "momentum", "ams_grad", "non_constant_decay"),
    *("enable_factorization", "factored", "min_dim_size_to_factor"),
    *("use_ema", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Form:
    """How a dialect keeps its state, beyond what its layout and its rules say.

    Attributes:
        dialect: Its class.
        view: Which dimensions it factors, where it does.
        site: What its first moment averages, where it has one.
        int_step: The peer's step counter is a Python int.
    """

    dialect: type[AdafactorBase]
    view: View = View.LAST_TWO
    site: MomentumSite | None = None
    int_step: bool = False

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a param group; settings that it lacks are the constructor's defaults.

        Nothing but settings is read, so that a peer's group that our dialect would refuse to step
        with can be converted all the same.
        """
        make: Callable[..., AdafactorBase] = self.dialect
        optimizer = make([torch.zeros(())], backend="reference")
        base = optimizer.param_groups[0]
        given = {key: group[key] for key in _SETTINGS if key in group and key in base}
        return optimizer._rule({**base, **given})


FORMS = {
    "torch": Form(torch_optim.Adafactor),
    "hf": Form(hf.Adafactor, site=MomentumSite.STEP, int_step=True),
    "keras": Form(keras.Adafactor),
    "adafactor_pytorch": Form(
        adafactor_pytorch.AdaFactor, View.RESHAPE, MomentumSite.GRAD, int_step=True
    ),
    "optax": Form(optax.Adafactor, View.LARGEST_TWO, MomentumSite.STEP),
    "big_vision": Form(big_vision.Adafactor, View.LARGEST_TWO, MomentumSite.UPDATE),
}


@dataclass(frozen=True)
class _Param:
    """One parameter as a state dict lists it: its key in ``state``, and its group's rule."""

    key: Any
    id: TensorId
    dialect: str
    form: Form
    rule: Rule
    group: Mapping[str, Any]


@dataclass(frozen=True)
class _Side:
    """One parameter of known shape and view, in the source or in the target."""

    param: _Param
    spec: TensorSpec


def convert_state_dict(
    state_dict: Mapping[str, Any],
    *,
    source: str,
    target: str,
    shapes: Sequence[tuple[int, ...]] | None = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert an optimizer's state dict from one dialect to another.

    A dialect stands for its torch-based peer too: "torch" is also the format of torch.optim, "hf"
    of transformers, "big_vision" of timm's AdafactorBigVision. Factors convert exactly where both
    factor the same dimensions. A second moment that is known in full, also that of a matrix with
    one row or one column, converts to everything. A first moment converts between "hf" and "optax"
    only: the others average something else. A parameter without state stays without.

    Args:
        state_dict: From ``state_dict()`` of the source or of its peer; it is not changed.
        source: "torch", "hf", "keras", "adafactor_pytorch", "optax" or "big_vision".
        target: Another of these, or the same with other settings.
        shapes: The parameters' shapes in the order of the groups, ``[tuple(p.shape) for p in
            model.parameters()]``. Needed where the source's state does not tell them:
            adafactor_pytorch does not tell the rank, optax not the order of two dimensions.
        like: ``state_dict()`` of the optimizer that the result is for. Its param groups become
            those of the result, because hyperparameters do not convert, and its settings decide
            which entries the result has. Without it these are the defaults of the target's
            constructor, and the groups are left without hyperparameters: our dialects then keep
            those that they were constructed with; a peer cannot. Within one dialect ``like`` is
            ``state_dict`` itself unless given.

    Returns:
        A state dict of the target; it shares no memory with ``state_dict`` or ``like``.

    Raises:
        ValueError: An unknown dialect, a state dict that is not the source's, or a state that the
            target cannot have exactly. The message names the parameter and says what to do.
    """
    for what, dialect in (("source", source), ("target", target)):
        if dialect not in FORMS:
            raise ValueError(f"{what} must be one of {', '.join(FORMS)}; got {dialect!r}")
    if like is None and source == target:
        like = state_dict
    groups = _target_groups(state_dict, like)
    state: dict[Any, dict[str, Any]] = {}
    result = {"state": state, "param_groups": groups}
    olds, news = _params(state_dict, source), _params(result, target)
    _check_lists(state_dict, olds, news, shapes)
    counts: dict[int, TensorId] = {}
    for place, (old, new) in enumerate(zip(olds, news, strict=True)):
        saved = state_dict["state"].get(old.key) or {}
        if saved or old.rule.step_count is StepCount.GLOBAL:
            count = _count(saved, old, new)
            counts.setdefault(count, old.id)
            if saved and new.key not in state:
                shape = None if shapes is None else tuple(shapes[place])
                state[new.key] = _convert(saved, old, new, count, shape)
    _set_global_count(groups, news, counts)
    return result


# --- the lists of parameters, and their counts ---------------------------------------------------


def _target_groups(
    state_dict: Mapping[str, Any], like: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    owners = {"state_dict": state_dict} | ({} if like is None else {"like": like})
    for what, owner in owners.items():
        if not isinstance(owner, Mapping) or not {"state", "param_groups"} <= owner.keys():
            raise ValueError(f"{what} must have 'state' and 'param_groups', as from state_dict()")
    if like is not None:
        return copy.deepcopy(list(like["param_groups"]))
    return [
        {key: list(group[key]) for key in ("params", "param_names") if key in group}
        for group in state_dict["param_groups"]
    ]


def _params(owner: Mapping[str, Any], dialect: str) -> list[_Param]:
    form = FORMS[dialect]
    params: list[_Param] = []
    for number, group in enumerate(owner["param_groups"]):
        rule, keys = form.rule_of(group), group["params"]
        for key, name in zip(keys, group.get("param_names") or [None] * len(keys), strict=True):
            tensor_id = TensorId(len(params), number, name)
            params.append(_Param(key, tensor_id, dialect, form, rule, group))
    return params


def _check_lists(
    state_dict: Mapping[str, Any],
    olds: Sequence[_Param],
    news: Sequence[_Param],
    shapes: Sequence[tuple[int, ...]] | None,
) -> None:
    for what, others in (("like", news), ("shapes", shapes)):
        if others is not None and len(others) != len(olds):
            raise ValueError(f"{what} has {len(others)} parameters, state_dict has {len(olds)}")
    for old, new in zip(olds, news, strict=True):
        if None not in (old.id.name, new.id.name) and old.id.name != new.id.name:
            raise ValueError(f"{old.id} is {new.id} in like; both must list them in one order")
    unlisted = state_dict["state"].keys() - {old.key for old in olds}
    if unlisted:
        raise ValueError(f"state_dict has state for {min(unlisted, key=str)!r}, in no param group")


def _count(saved: Mapping[str, Any], old: _Param, new: _Param) -> int:
    """The target's count of calls of step() for a parameter."""
    is_global = old.rule.step_count is StepCount.GLOBAL
    place, where = ("the param group", old.group) if is_global else ("the state", saved)
    value = where.get("step")
    number = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if not isinstance(number, int | float) or not number >= 0 or number % 1 != 0:
        raise ValueError(
            f"'step' in {place} of {old.id} is {value!r}; expected a count of steps. Is it a state "
            f"dict of {old.dialect}?"
        )
    calls, every, new_every = int(number), old.rule.accumulation_steps, new.rule.accumulation_steps
    if every == new_every:
        return calls
    if calls % every:
        raise ValueError(
            f"{old.id} is in the middle of an accumulation (call {calls % every} of {every}), "
            f"with which {new.dialect} cannot go on; save after the last call"
        )
    return calls // every * new_every


def _set_global_count(
    groups: Sequence[dict[str, Any]], news: Sequence[_Param], counts: Mapping[int, TensorId]
) -> None:
    """Put the one count into every group of a dialect that counts globally."""
    for new in news:
        if new.rule.step_count is StepCount.PER_PARAM:
            continue
        if len(counts) > 1:
            (count, one), (other_count, other), *_ = counts.items()
            raise ValueError(
                f"{one} is at step {count}, {other} at step {other_count}, but {new.dialect} has "
                "one count for all. Delete the state of those that may start anew"
            )
        groups[new.id.group]["step"] = counter(next(iter(counts), 0), torch.device("cpu"))


# --- what the source has -------------------------------------------------------------------------


def _known_entries(saved: Mapping[str, Any], old: _Param) -> set[str]:
    """Glossary names of the source's entries."""
    layout = old.form.dialect.layout
    names = [field.name for field in fields(layout) if field.name != "keepdim"]
    known = {layout.key(name): name for name in names if getattr(layout, name) is not None}
    advice = f"Is it a state dict of {old.dialect}?"
    for key, value in saved.items():
        if key not in known:
            raise ValueError(f"state {key!r} of {old.id} is unknown in {old.dialect}. {advice}")
        if not isinstance(value, Tensor) and known[key] not in ("step", "param_rms"):
            raise ValueError(
                f"state {key!r} of {old.id} is {type(value).__name__}; expected a tensor"
            )
    present = {known[key] for key in saved}
    if "exp_avg_scale" in present:
        raise ValueError(
            f"state {layout.exp_avg!r} of {old.id} is in blocks of 8 bits, which lie as its "
            "parameter does in memory, and that is not known here. Set momentum_dtype of the "
            "groups of state_dict to torch.float32, load it, and convert the new state_dict()"
        )
    if present & {"var", *_FACTORS} not in ({"var"}, set(_FACTORS)):
        raise ValueError(
            f"state of {old.id} must have either {layout.var!r} or both {layout.row_var!r} and "
            f"{layout.col_var!r}; it has {', '.join(map(repr, saved))}. {advice}"
        )
    return present


def _source_side(
    saved: Mapping[str, Any], old: _Param, new: _Param, given: tuple[int, ...] | None
) -> _Side:
    """The source's parameter as its entries show it; ``given`` is its shape if one knows it."""
    present = _known_entries(saved, old)
    candidates, is_certain = _candidates(saved, old, present)
    if given is not None:
        candidates, is_certain = [given], True
    rule = replace(
        old.rule,
        momentum=Momentum(MomentumSite.GRAD, Constant(0.0)) if "exp_avg" in present else None,
        amsgrad="var_max" in present,
        weight_average=WeightAverage(0.0) if "average" in present else None,
        accumulation_steps=2 if "accumulator" in present else 1,
    )
    tensors = {key: torch.as_tensor(value) for key, value in saved.items()}
    sides, errors = [], []
    for shape in candidates:
        side = _Side(old, _spec(saved, old, shape, "var" in present))
        try:
            check_state(tensors, side.spec, rule, old.form.dialect.layout, any_device=True)
        except ValueError as error:
            errors.append(error)
        else:
            sides.append(side)
    if not sides:
        raise errors[0]
    # Within a dialect all shapes that a factored state may have lead to the same result.
    stays = old.dialect == new.dialect and new.rule.factoring.view_of(sides[0].spec.shape)
    if (len(sides) > 1 or not is_certain) and not stays:
        found = " or ".join(str(side.spec.shape) for side in sides)
        raise ValueError(
            f"the factors of {old.id} do not tell its shape: {found}"
            f"{'' if is_certain else ', or of a higher rank'}. Give shapes="
            "[tuple(p.shape) for p in parameters]"
        )
    return sides[0]


def _candidates(
    saved: Mapping[str, Any], old: _Param, present: set[str]
) -> tuple[list[tuple[int, ...]], bool]:
    """The shapes that the entries allow, some of them perhaps wrongly; whether these are all."""
    layout, view = old.form.dialect.layout, old.form.view
    reshaped = view is View.RESHAPE and "var" not in present
    for name in ("var", *_OTHERS):
        if name in present and not (reshaped and name in ("exp_avg", "var_max")):
            return [tuple(saved[layout.key(name)].shape)], True
    row, col = (tuple(saved[layout.key(name)].shape) for name in _FACTORS)
    if layout.keepdim:
        return [tuple(c if r == 1 else r for r, c in zip(row, col, strict=False))], not reshaped
    if view is View.LAST_TWO:
        return [(*row, *col[-1:])], True
    places = product(range(len(row) + 1), dict.fromkeys(col))
    return list(dict.fromkeys((*row[:d], size, *row[d:]) for d, size in places)), True


def _spec(
    saved: Mapping[str, Any], old: _Param, shape: tuple[int, ...], unfactored: bool
) -> TensorSpec:
    """The parameter as the source's rule sees it; what only a step needs to know is made up."""
    layout = old.form.dialect.layout
    moment = saved[layout.var if unfactored else layout.row_var]
    return TensorSpec(
        id=old.id,
        shape=shape,
        param_strides=(),
        grad_strides=(),
        param_dtype=moment.dtype,
        grad_dtype=moment.dtype,
        math_dtype=moment.dtype,
        device=moment.device,
        view=None if unfactored else Factoring(old.form.view).view_of(shape),
        structure=structure_of(old.rule),
    )


# --- what the target gets ------------------------------------------------------------------------


def _convert(
    saved: Mapping[str, Any], old: _Param, new: _Param, count: int, shape: tuple[int, ...] | None
) -> dict[str, Any]:
    """The target's state of one parameter."""
    before = _source_side(saved, old, new, shape)
    view = new.rule.factoring.view_of(before.spec.shape)
    after = _Side(new, replace(before.spec, view=view, structure=structure_of(new.rule)))
    layout = new.form.dialect.layout
    wanted = entries_of(after.spec, new.rule, layout)
    values = {}
    for name in ("var", *_FACTORS, *_OTHERS):
        value = canonical(dict(saved), before.spec, old.form.dialect.layout, name)
        if value is not None:
            values[name] = value.detach()
    state: dict[str, Any] = {}
    if new.rule.step_count is StepCount.PER_PARAM:
        state[layout.step] = count if new.form.int_step else counter(count, torch.device("cpu"))
    for name, value in _second_moment(values, before, after).items():
        state[layout.key(name)] = value.reshape(wanted[name].shape).clone()
    for name in _OTHERS:
        if name in values and _is_kept(name, before, after, name in wanted):
            value = values[name]
            shaped = value.reshape(wanted[name].shape) if name in wanted else value
            state[layout.key(name)] = shaped.clone()
        elif name in wanted and name in REQUIRED:
            if count:
                raise ValueError(_lacks(name, before, after, count))
            state[layout.key(name)] = torch.zeros(
                wanted[name].shape, dtype=wanted[name].dtype, device=after.spec.device
            )
    return state


def _second_moment(values: Mapping[str, Tensor], before: _Side, after: _Side) -> dict[str, Tensor]:
    """``var``, or the factors in the target's order of dimensions.

    An element of a factor is the mean of v over a row or a column, and so are their EMAs: a v that
    is known in full gives all factors exactly, and factors give no others than themselves.
    """
    old, new, are_sums = before.spec.view, after.spec.view, before.param.rule.sums
    order = None if old is None or new is None else _same_dimensions(old, new)
    if order is None:
        var = values["var"] if old is None else _known_var(values, old)
        if var is None:
            raise ValueError(_impossible(before, after))
        if new is None:
            return {"var": var}
        matrices = new.to_matrices(_wide(var))
        row, col, are_sums = matrices.sum(-1), matrices.sum(-2), True
    else:
        row, col = (values[name] for name in order)
    assert new is not None
    if are_sums and not after.param.rule.sums:
        row, col = _wide(row) / max(new.cols, 1), _wide(col) / max(new.rows, 1)
    elif not are_sums and after.param.rule.sums:
        row, col = _wide(row) * new.cols, _wide(col) * new.rows
    row, col = row.reshape(new.row_shape).unsqueeze(-1), col.reshape(new.col_shape).unsqueeze(-2)
    if new.permutation is not None:
        row, col = new.from_matrices(row), new.from_matrices(col)
    return {"row_var": row, "col_var": col}


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better: arithmetic on a checkpoint must not round to bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _same_dimensions(old: MatrixView, new: MatrixView) -> tuple[str, ...] | None:
    """Which factors of ``old`` are row_var and col_var of ``new``; None if neither is."""
    if old == new:
        return _FACTORS
    ours, theirs = _dimensions(old), _dimensions(new)
    if ours is None or theirs is None:
        return None
    batch, row, col = ours
    if theirs == (batch, row, col):
        return _FACTORS
    return _FACTORS[::-1] if theirs == (batch, col, row) else None


def _dimensions(view: MatrixView) -> tuple[tuple[int, ...], ...] | None:
    """Dimensions longer than 1 that are batch, row and column; None where a reshape mixes them."""
    dims = tuple(range(len(view.shape)))
    if view.permutation is not None:
        *batch, row, col = view.permutation
        parts: tuple[Sequence[int], ...] = (batch, (row,), (col,))
    else:
        sizes = [(math.prod(view.shape[:d]), math.prod(view.shape[d:])) for d in dims]
        if view.matrices not in sizes:
            return None
        cut = sizes.index(view.matrices)
        parts = ((), dims[:cut], dims[cut:])
    return tuple(tuple(d for d in part if view.shape[d] != 1) for part in parts)


def _known_var(values: Mapping[str, Tensor], view: MatrixView) -> Tensor | None:
    """The second moment in full, where a factor is all of it: one row or one column."""
    if view.rows == 1:
        return view.from_matrices(values["col_var"].unsqueeze(-2))
    if view.cols == 1:
        return view.from_matrices(values["row_var"].unsqueeze(-1))
    return values["row_var"].new_zeros(view.shape) if 0 in view.shape else None


def _is_kept(name: str, before: _Side, after: _Side, wanted: bool) -> bool:
    """Whether an entry of the source is one of the target.

    Raises:
        ValueError: It is not, and dropping it would lose something.
    """
    old, new = before.param, after.param
    if name == "compensation":  # belongs to the parameter, whatever the rule
        return True
    if name == "accumulator" and not wanted:  # _count has made sure that it is empty
        return False
    sites = old.form.site, new.form.site
    if name == "exp_avg" and None not in sites and sites[0] is not sites[1]:
        averaged = [site.value for site in sites if site is not None]
        reason = f"it averages the {averaged[0]}, that of {new.dialect} the {averaged[1]}"
    elif name == "var_max" and wanted and (before.spec.view is None) != (after.spec.view is None):
        reason = "the maxima of v and of its factored estimate differ"
    elif wanted:
        return True
    else:
        reason = f"{new.dialect} has none {_BY_SETTINGS}"
    key = old.form.dialect.layout.key(name)
    raise ValueError(
        f"state {key!r} of {old.id} cannot be converted: {reason}. Delete {key!r} from the states "
        "first if it may be dropped"
    )


# --- what cannot be ------------------------------------------------------------------------------

_BY_SETTINGS = "with the settings of like (or else its defaults)"


def _impossible(before: _Side, after: _Side) -> str:
    old, new = before.param.dialect, after.param.dialect
    if after.spec.view is None:
        reason = f"{new} keeps it in full {_BY_SETTINGS}"
        advice = "give like= of a target that factors this parameter (min_dim_size_to_factor)"
    else:
        assert before.spec.view is not None
        reason = (
            f"{old} sees matrices {before.spec.view.matrices}, {new} {after.spec.view.matrices}"
        )
        advice = f"keep {old} for it"
    return (
        f"second moment of {before.spec.id} of shape {before.spec.shape} cannot be converted: "
        f"{reason}, and the factors do not tell its elements. Delete the state of this parameter "
        f"to let it start anew, or {advice}"
    )


def _lacks(name: str, before: _Side, after: _Side, count: int) -> str:
    key, dialect = after.param.form.dialect.layout.key(name), after.param.dialect
    off = "beta1=None, beta1=0, momentum=None" if name == "exp_avg" else "ams_grad=False"
    return (
        f"{dialect} needs {key!r} {_BY_SETTINGS}, but the state of {before.spec.id} has none, and "
        f"zeros would be wrong at step {count}. Give like= of a target without it ({off})"
    )
