"""State layout: which tensors one parameter owns, and how each dialect names and shapes them.

A state entry has the shape and the key of the peer, so that checkpoints pass both ways; its memory
is laid out as the backends read it, [..., n] and [..., m] contiguous, and the peer's shape is a
view of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_adafactor.blocks import dequantise, quantise
from fused_adafactor.counting import check_count, counter, counter_dtype
from fused_adafactor.factoring import MatrixView
from fused_adafactor.rule import Rule, StepCount
from fused_adafactor.spec import TensorSpec, local_of, whole_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class StateLayout:
    """The peer's key of each entry, named as in the glossary.

    Attributes:
        row_var: Row second moment, [..., n].
        col_var: Column second moment, [..., m].
        var: Unfactored second moment, shape of the parameter.
        var_max: AMSGrad's running maximum, shape of the parameter.
        exp_avg: First moment, shape of the parameter.
        exp_avg_scale: Scales of its blocks, where it is kept in 8 bits: ``TensorSpec.scale_shape``.
        step: Step counter, 0-d; only where steps are counted per parameter.
        param_rms: RMS of the parameter before its last step, 0-d; None where the peer keeps none.
        compensation: What rounding='kahan' carries over, shape and dtype of the parameter.
        average: EMA of the weights, shape of the parameter, in the math dtype: in bfloat16 it would
            stop moving.
        accumulator: Sum of the gradients since the last update, shape of the parameter.
        keepdim: Whether the factors keep the reduced dimension with size 1.
    """

    row_var: str = "row_var"
    col_var: str = "col_var"
    var: str = "variance"
    var_max: str = "var_max"
    exp_avg: str = "exp_avg"
    exp_avg_scale: str = "exp_avg_scale"
    step: str = "step"
    param_rms: str | None = None
    compensation: str = "kahan"
    average: str = "average"
    accumulator: str = "accumulator"
    keepdim: bool = True

    def key(self, entry: str) -> str:
        """The peer's key of an entry."""
        key: str | None = getattr(self, entry)
        assert key is not None, entry
        return key


_ANOTHER_MOMENT = (
    ". Another momentum_dtype takes effect with load_state_dict: set it in the groups of a state "
    "dict, and load that"
)
# Entries that a state must have as soon as it has any; the others are added when they are first
# needed.
REQUIRED = ("step", "row_var", "col_var", "var", "var_max", "exp_avg", "exp_avg_scale")


@dataclass(frozen=True)
class Entry:
    """Shape and dtype that one state entry must have.

    Attributes:
        shape: Of the whole entry.
        dtype: Its dtype.
        part: Shape of what this process has of it: ``shape``, unless the parameter is distributed.
        split: By dimension of it, the dimensions of the mesh that it is split over.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: tuple[int, ...]
    split: tuple[tuple[int, ...], ...]


def entries_of(spec: TensorSpec, rule: Rule, layout: StateLayout) -> dict[str, Entry]:
    """The entries that a tensor owns under a rule, by glossary name."""
    entries: dict[str, Entry] = {}
    if rule.step_count is StepCount.PER_PARAM:
        entries["step"] = _scalar(counter_dtype())
    entries |= _moments_of(spec, rule, layout)
    if layout.param_rms is not None:
        entries["param_rms"] = _scalar(spec.math_dtype)
    if spec.keeps_compensation:
        entries["compensation"] = _full(spec, spec.param_dtype)
    if rule.weight_average is not None:
        entries["average"] = _full(spec, spec.math_dtype)
    if rule.accumulation_steps > 1:
        entries["accumulator"] = _full(spec, spec.math_dtype)
    return entries


def _moments_of(spec: TensorSpec, rule: Rule, layout: StateLayout) -> dict[str, Entry]:
    moment = rule.moment_dtype(spec.param_dtype)
    entries: dict[str, Entry] = {}
    if spec.view is None:
        entries["var"] = _matrices(spec, moment)
    else:
        for name in ("row_var", "col_var"):
            entries[name] = _factor(spec, name, moment, layout.keepdim)
    if rule.amsgrad:
        entries["var_max"] = _matrices(spec, moment)
    if rule.momentum is not None:
        dtype = rule.momentum_dtype(spec.param_dtype)
        entries["exp_avg"] = _matrices(spec, dtype)
        if dtype is torch.int8:
            entries["exp_avg_scale"] = _scales(spec)
    return entries


def _scalar(dtype: torch.dtype) -> Entry:
    return Entry((), dtype, (), ())


def _full(spec: TensorSpec, dtype: torch.dtype) -> Entry:
    """An entry of the parameter's shape."""
    return Entry(spec.whole, dtype, spec.shape, _split_of(spec))


def _matrices(spec: TensorSpec, dtype: torch.dtype) -> Entry:
    """An entry of the parameter's shape, or of the matrix that it is reshaped to.

    Of a distributed parameter it always has the parameter's, of which there are parts.
    """
    if spec.view is None or spec.view.permutation is not None or spec.shard is not None:
        return _full(spec, dtype)
    return Entry(spec.view.matrices, dtype, spec.view.matrices, ((), ()))


def _scales(spec: TensorSpec) -> Entry:
    """Scales of blocks, of which parts have their own: no part cuts a block."""
    split = _split_of(spec)
    if spec.view is None:
        split = (next((axes for axes in split if axes), ()),)
    elif spec.view.permutation is None:
        split = ((), ())
    else:
        split = tuple(split[dim] for dim in spec.view.permutation)
    whole, part = (each.scale_shape(spec.swapped) for each in (spec.of_whole(), spec))
    return Entry(whole, torch.uint8, part, split)


def _factor(spec: TensorSpec, name: str, dtype: torch.dtype, keepdim: bool) -> Entry:
    """Row or column second moments, in the shape in which the peer keeps them."""
    assert spec.view is not None
    assert spec.whole_view is not None
    if spec.view.permutation is None:
        shape = _without(spec.view.matrices, -1 if name == "row_var" else -2, 1, keepdim)
        return Entry(shape, dtype, shape, ((),) * len(shape))
    reduced = _reduced(spec.view, name)
    return Entry(
        _without(spec.whole, reduced, 1, keepdim),
        dtype,
        _without(spec.shape, reduced, 1, keepdim),
        _without(_split_of(spec), reduced, (), keepdim),
    )


def _split_of(spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
    return ((),) * len(spec.shape) if spec.shard is None else spec.shard.split


def _reduced(view: MatrixView, name: str) -> int:
    """Dimension of the parameter, or of the matrix that it is reshaped to, that a factor lacks."""
    place = -1 if name == "row_var" else -2
    return place if view.permutation is None else view.permutation[place]


def _without(of: Sequence[_T], dim: int, there: _T, keepdim: bool) -> tuple[_T, ...]:
    """What belongs to each dimension, with something else at one of them, or nothing."""
    kept = list(of)
    if keepdim:
        kept[dim] = there
    else:
        del kept[dim]
    return tuple(kept)


def init_state(
    state: dict[str, Any],
    spec: TensorSpec,
    rule: Rule,
    layout: StateLayout,
    param: Tensor,
    step_device: torch.device,
    join: Callable[[Tensor, Entry], Tensor],
) -> None:
    """Add every missing entry of a tensor to its state: zeros, the EMA as the weights are.

    Args:
        state: By the peer's keys.
        spec: The tensor.
        rule: Its rule.
        layout: The dialect's layout.
        param: The parameter, or the part of it that this process has.
        step_device: For its step counter.
        join: Makes an entry of what this process has of it.
    """
    for name, entry in entries_of(spec, rule, layout).items():
        key = layout.key(name)
        if key in state:
            continue
        if name == "step":
            state[key] = counter(0.0, step_device)
        elif name in ("row_var", "col_var"):
            assert spec.view is not None
            canonical = torch.zeros(
                _canonical_shape(spec.view, name), dtype=entry.dtype, device=spec.device
            )
            state[key] = join(_from_canonical(canonical, spec.view, name, layout.keepdim), entry)
        else:
            value = _empty(spec, name, entry).zero_()
            if name == "average":
                value.copy_(param)
            state[key] = join(value, entry)


def check_state(
    state: dict[str, Any],
    spec: TensorSpec,
    rule: Rule,
    layout: StateLayout,
    *,
    any_device: bool = False,
) -> None:
    """Check what a state has against what its tensor needs; an empty one is yet to be created.

    Args:
        state: By the peer's keys.
        spec: The tensor.
        rule: Its rule.
        layout: The dialect's layout.
        any_device: The state is about to be moved to its parameter.

    Raises:
        ValueError: An entry is missing, is no tensor, has another shape, or is a step that is no
            count; the message names parameter, entry, what was expected and what came.
        RuntimeError: An entry lies on another device than its parameter.
    """
    if not state:
        return
    for name, entry in entries_of(spec, rule, layout).items():
        key = layout.key(name)
        if key not in state:
            if name in REQUIRED:
                raise ValueError(
                    f"state of {spec.id} lacks {key!r}, which its param group's settings need; "
                    f"it has {', '.join(map(repr, state))}. Settings that decide what is kept "
                    "cannot be changed once there is state; for the checkpoint of another "
                    "optimizer there is fused_adafactor.convert_state_dict"
                )
            continue
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {key!r} of {spec.id} is {type(value).__name__}; expected a tensor"
            )
        _check_shape(f"state {key!r} of {spec.id}", value, entry, spec, any_device)
        if name not in ("step", "param_rms") and not _is_kind_of(value.dtype, entry.dtype):
            raise ValueError(
                f"state {key!r} of {spec.id} has dtype {value.dtype}; expected {entry.dtype}"
                + ("" if name != "exp_avg" else _ANOTHER_MOMENT)
            )
        if name == "step":
            check_count(value, f"state {key!r} of {spec.id}")
        if name not in ("step", "param_rms") and not any_device and value.device != spec.device:
            raise RuntimeError(
                f"state {key!r} of {spec.id} is on {value.device} but the parameter is on "
                f"{spec.device}; "
                "load_state_dict moves the state to the parameters"
            )


def _check_shape(what: str, value: Tensor, entry: Entry, spec: TensorSpec, loaded: bool) -> None:
    """The shape of the whole entry, and of what this process has, unless that is still to come."""
    if tuple(value.shape) != entry.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)}; expected "
            f"{entry.shape} for a parameter of shape {spec.whole}. Is this the checkpoint of "
            "another model or optimizer, or has the parameter's memory layout changed? "
            "load_state_dict lays state out as it must be"
        )
    part = tuple(local_of(value).shape)
    if part != entry.part and not loaded:
        raise ValueError(
            f"{what} has shape {part} on this process; expected {entry.part}, the part of "
            f"{entry.shape} that goes with the parameter's. load_state_dict distributes state as "
            "the parameters are"
        )


def canonical(
    state: dict[str, Any], spec: TensorSpec, layout: StateLayout, name: str
) -> Tensor | None:
    """The entry as backends use it: factors as [..., n] or [..., m], scales line by line.

    All else is as it is stored.
    """
    key: str | None = getattr(layout, name)
    value = None if key is None else state.get(key)
    if value is None:
        return None
    value = local_of(value)
    if name == "exp_avg_scale":
        return value.mT if spec.swapped else value
    if name not in ("row_var", "col_var") or spec.view is None:
        return value
    return _to_canonical(value, spec.view, name, layout.keepdim)


def adopt(value: Any, name: str, entry: Entry, spec: TensorSpec, layout: StateLayout) -> Tensor:
    """A copy of a loaded entry with the dtype, device and memory layout that the step wants.

    Args:
        value: A tensor, or a number where a peer keeps its step or RMS as one; of a distributed
            parameter, what this process has of it.
        name: Glossary name of the entry.
        entry: Shape and dtype wanted; a shape that differs is left for ``check_state`` to name.
        spec: The tensor it belongs to.
        layout: The dialect's layout.
    """
    tensor = torch.as_tensor(value)
    if (
        name in ("row_var", "col_var")
        and spec.view is not None
        and tuple(tensor.shape) == entry.part
    ):
        compact = _to_canonical(tensor, spec.view, name, layout.keepdim)
        compact = compact.to(spec.device, entry.dtype, copy=True).contiguous()
        return _from_canonical(compact, spec.view, name, layout.keepdim)
    if tuple(tensor.shape) != entry.part or not entry.part:
        return tensor.detach().to(spec.device, entry.dtype, copy=True)
    return _empty(spec, name, entry).copy_(tensor.detach())


def with_shapes_of(
    state: dict[str, Any], spec: TensorSpec, rule: Rule, layout: StateLayout
) -> dict[str, Any]:
    """A loaded state with what is full-size in the shape in which this process keeps it.

    Of a parameter that is reshaped to a matrix that is the parameter's shape where it is
    distributed, and the matrix' where it is not. Everything else passes as it is.
    """
    view = spec.whole_view
    if view is None or view.permutation is not None:
        return state
    entries = entries_of(spec, rule, layout)
    shaped = {}
    for name in ("exp_avg", "var_max"):
        value = state.get(layout.key(name))
        if name in entries and isinstance(value, Tensor):
            shape, wanted = tuple(value.shape), entries[name].shape
            if shape != wanted and shape in (view.shape, view.matrices):
                shaped[layout.key(name)] = whole_of(value).reshape(wanted)
    return {**state, **shaped}


def with_moment_of(
    state: dict[str, Any], spec: TensorSpec, rule: Rule, layout: StateLayout
) -> dict[str, Any]:
    """A loaded state with its first moment as the rule wants it: numbers, or blocks of 8 bits.

    Numbers are rounded to blocks, and blocks become the numbers that they stand for. Blocks that
    lie along rows where this parameter's lie along columns, or the other way round, are rounded
    once more. Everything else passes as it is, also what does not fit: ``check_state`` names it.
    """
    entry = entries_of(spec, rule, layout).get("exp_avg")
    spec = spec.of_whole()  # as it is saved; parts are taken of the result
    value, scale = state.get(layout.exp_avg), state.get(layout.exp_avg_scale)
    if entry is None or not isinstance(value, Tensor) or tuple(value.shape) != entry.shape:
        return state
    if value.dtype is torch.int8 and isinstance(scale, Tensor):
        lying = [way for way in (False, True) if tuple(scale.shape) == spec.scale_shape(way)]
        if not lying or (entry.dtype is torch.int8 and spec.swapped in lying):
            return state
        (swapped, *_) = lying
        lines, scale = _lines_of(whole_of(value), spec, swapped), whole_of(scale)
        value = dequantise(lines, scale.mT if swapped else scale, spec.math_dtype)
        value = _from_lines(value, spec, swapped).reshape(entry.shape)
    elif entry.dtype is not torch.int8 or not value.is_floating_point():
        return state
    loaded = {key: kept for key, kept in state.items() if key != layout.exp_avg_scale}
    if entry.dtype is torch.int8:
        value = whole_of(value).to(spec.math_dtype)
        value, scale = quantise(_lines_of(value, spec, spec.swapped))
        value = _from_lines(value, spec, spec.swapped).reshape(entry.shape)
        loaded[layout.exp_avg_scale] = scale.mT if spec.swapped else scale
    return {**loaded, layout.exp_avg: value}


def _lines_of(value: Tensor, spec: TensorSpec, swapped: bool) -> Tensor:
    """A full-size entry as the lines that blocks lie along."""
    return spec.to_lines(value if spec.view is None else spec.view.to_matrices(value), swapped)


def _from_lines(lines: Tensor, spec: TensorSpec, swapped: bool) -> Tensor:
    """The reverse, in the shape in which a state keeps it."""
    whole = spec.from_lines(lines, swapped)
    if spec.view is None or spec.view.permutation is None:
        return whole
    return spec.view.from_matrices(whole)


def _is_kind_of(dtype: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a state entry of a dtype will do: any floating point, or the very integers."""
    return dtype == wanted or (dtype.is_floating_point and wanted.is_floating_point)


def _empty(spec: TensorSpec, name: str, entry: Entry) -> Tensor:
    """Memory for an entry: scales line by line, what is full-size as the spec says."""
    if name == "exp_avg_scale" and spec.swapped:
        *batch, blocks, lines = entry.part
        return torch.empty((*batch, lines, blocks), dtype=entry.dtype, device=spec.device).mT
    if entry.part == spec.shape and name != "exp_avg_scale":
        return torch.empty_strided(
            spec.shape, spec.state_strides, dtype=entry.dtype, device=spec.device
        )
    return torch.empty(entry.part, dtype=entry.dtype, device=spec.device)


def _canonical_shape(view: MatrixView, name: str) -> tuple[int, ...]:
    return view.row_shape if name == "row_var" else view.col_shape


def _from_canonical(factor: Tensor, view: MatrixView, name: str, keepdim: bool) -> Tensor:
    """[..., n] or [..., m] as a view in the peer's shape."""
    reduced = -1 if name == "row_var" else -2
    full = factor.unsqueeze(reduced)
    if view.permutation is not None:
        full = view.from_matrices(full)
        reduced = view.permutation[reduced]
    return full if keepdim else full.squeeze(reduced)


def _to_canonical(factor: Tensor, view: MatrixView, name: str, keepdim: bool) -> Tensor:
    """The peer's shape as [..., n] or [..., m]."""
    reduced = -1 if name == "row_var" else -2
    place = reduced if view.permutation is None else view.permutation[reduced]
    full = factor if keepdim else factor.unsqueeze(place)
    if view.permutation is not None:
        full = full.permute(view.permutation)
    return full.squeeze(reduced)
