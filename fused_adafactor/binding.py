"""What a backend gets: planned tensors bound to memory, and what passes in one step.

Bindings are made once and kept for as long as nothing moves; what is new in every step is in the
cohorts, one record for many tensors, and in the exchange.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adafactor.plan import Activity, PlannedTensor
from fused_adafactor.rounding import RoundingKey, Stream
from fused_adafactor.rule import Rule, Scalars
from fused_adafactor.schedule import Number
from fused_adafactor.spec import TensorSpec


@dataclass(kw_only=True, eq=False)
class Cohort:
    """Tensors that a step is the same for; the last three are set in every step.

    Where a device counts the steps, the host does not know which tensors are at the same one. What
    follows from the step is then a vector, with one value for each counter.

    Attributes:
        rule: Their rule.
        seed: Key of stochastic rounding.
        device: Theirs.
        has_grad: Whether they have gradients; without one only the average of a tensor moves.
        counts: Of the counters of a device; 1 where the host counts.
        scalars: The numbers of this step.
        activity: What this call does to them.
        grad_scale: What the raw gradient is multiplied by when it is read: -1 for maximize, 1 /
            loss scale.
    """

    rule: Rule
    seed: int
    device: torch.device
    has_grad: bool
    counts: int = 1
    scalars: Scalars = field(init=False)
    activity: Activity = field(init=False)
    grad_scale: Number = field(init=False)

    def scalars_of(self, count: int) -> Scalars:
        """The numbers of this step for what follows one of the counters."""
        if not isinstance(self.scalars.t, Tensor):
            return self.scalars
        each: Any = (x[count] if isinstance(x, Tensor) and x.dim() > 0 else x for x in self.scalars)
        return Scalars(*each)

    def on_host(self) -> list[Scalars]:
        """The numbers of this step for each counter, as floats; waits for a device."""
        if not isinstance(self.scalars.t, Tensor):
            return [self.scalars]
        columns = [
            x.expand(self.counts).tolist() if isinstance(x, Tensor) else [x] * self.counts
            for x in self.scalars
        ]
        return list(itertools.starmap(Scalars, zip(*columns, strict=True)))


@dataclass(kw_only=True, eq=False)
class Binding:
    """One tensor.

    Shapes: [..., n, m] is the matrix view of the spec; "full" is the shape of the parameter. A
    state entry that the rule does not have is None.

    Attributes:
        planned: The tensor in the plan.
        cohort: Its rule, and the numbers of this step.
        count: Which counter of its cohort it follows.
        param: Full; written in place.
        row_var: [..., n], contiguous.
        col_var: [..., m], contiguous.
        var: Unfactored second moment, full (or the matrix of a reshaped view).
        var_max: AMSGrad's maximum, likewise.
        exp_avg: First moment, likewise.
        exp_avg_scale: Scales of its blocks, where it is kept in 8 bits: uint8, contiguous, [...,
            lines, blocks of a line]; [blocks] of an unfactored tensor.
        compensation: Of Kahan's summation, full.
        average: EMA of the weights, full.
        accumulator: Sum of gradients since the last update, full.
        mirror: Written with every new value of the parameter, full, and never read: the parameter
            as it is stored, rounded to the dtype of the mirror. To nearest; at random, with the
            parameter's own key, where bfloat16 mirrors what is wider and the rule rounds so.
        sums: Where its sums over processes lie, by their names in ``summing.py``: those that are
            taken after ``STATS``, and those before ``APPLY``. A run that ends there has written
            what this process has of each; the next one finds the sums. Empty where it is whole.
    """

    planned: PlannedTensor
    cohort: Cohort
    count: int
    param: Tensor
    row_var: Tensor | None
    col_var: Tensor | None
    var: Tensor | None
    var_max: Tensor | None
    exp_avg: Tensor | None
    exp_avg_scale: Tensor | None
    compensation: Tensor | None
    average: Tensor | None
    accumulator: Tensor | None
    mirror: Tensor | None
    sums: Sequence[Mapping[str, Tensor]] = ()

    @property
    def rule(self) -> Rule:
        """Its rule."""
        return self.cohort.rule

    @property
    def scalars(self) -> Scalars:
        """The numbers of this step."""
        return self.cohort.scalars_of(self.count)

    @property
    def grad_scale(self) -> Number:
        """What the raw gradient is multiplied by when it is read."""
        return self.cohort.grad_scale

    @property
    def says_update_sq(self) -> bool:
        """Whether it says what it knows of Σu²: what follows from all rows, one process says."""
        sent = self.sums and "col_weighted" in self.sums[0]
        return not sent or self.planned.spec.has_first_row

    def rounding_key(self, stream: Stream) -> RoundingKey:
        """Key of stochastic rounding in this step."""
        t = self.scalars.t
        step = t.to(torch.int64) if isinstance(t, Tensor) else int(t)
        return RoundingKey(self.cohort.seed, self.planned.spec.id.index, step, stream)


@dataclass(kw_only=True, eq=False)
class Exchange:
    """What passes between the engine and a backend in one step; gone when the step is over.

    A vector has one value for each tensor, in their order, in their math dtype and on their device.

    Attributes:
        grads: Gradients, never written; none where only averages move.
        skip: Vector of bool: nothing may be written; None if that cannot be. ``FINALIZE`` adds the
            tensors whose rule skips what is not finite, and whose Σ g² is not.
        absent: Vector of bool: no process has a gradient, and nothing is written. None where all
            have one here.
        grad_factor: Vector: what clipping by a norm multiplies the gradients by. Set between
            ``STATS`` and ``FINALIZE``; None where nothing is clipped by a norm.
        grad_sq: Vector: Σ g² before any clipping. Set by ``STATS`` where it runs without the rest;
            of tensors that are split by the engine, once it has been summed up.
        param_rms: Vector: RMS(p). Set by ``FINALIZE`` if ``wants_param_rms``.
        wants_param_rms: Whether somebody will read it; every rule then measures it.
        scratch: The backend's own, from one call to the next.
    """

    grads: Sequence[Tensor]
    skip: Tensor | None = None
    absent: Tensor | None = None
    grad_factor: Tensor | None = None
    grad_sq: Tensor | None = None
    param_rms: Tensor | None = None
    wants_param_rms: bool = False
    scratch: Any = None


def sums_of(b: Binding, swapped: bool) -> dict[str, Tensor]:
    """Where its sums over processes lie in an update, by the names that kernels know them by.

    Those of rows and columns are called ``line_sq``, ``cross_sq`` and ``weighted``, by what lines
    are; Σ u² is ``update_sq`` if it is taken after ``STATS``, ``measured_sq`` before ``APPLY``.

    Args:
        b: The tensor.
        swapped: Whether its lines are the columns of the matrix view.

    Returns:
        Nothing where it is whole, or not updated.
    """
    if len(b.sums) < 2:
        return {}
    names = {"row_sq": "line_sq", "col_sq": "cross_sq", "col_weighted": "weighted"}
    if swapped:
        names = {"row_sq": "cross_sq"}
    first, second = b.sums
    sums = {names.get(name, name): total for name, total in first.items() if name != "present"}
    if "update_sq" in second:
        sums["measured_sq"] = second["update_sq"]
    return sums


def memory_of(b: Binding, swapped: bool) -> dict[str, Tensor]:
    """State that a native backend is given pointers to, by the names that kernels know it by.

    A pointer is trusted blindly, so what it points to must be laid out as its spec says.

    Args:
        b: The tensor.
        swapped: Whether its lines are the columns of the matrix view.

    Raises:
        ValueError: An entry has another dtype or other strides.
    """
    spec, rule = b.planned.spec, b.rule
    moment = rule.moment_dtype(spec.param_dtype)
    line, cross = (b.col_var, b.row_var) if swapped else (b.row_var, b.col_var)
    entries = (
        ("line_var", line, moment),
        ("cross_var", cross, moment),
        ("var", b.var, moment),
        ("var_max", b.var_max, moment),
        ("exp_avg", b.exp_avg, rule.momentum_dtype(spec.param_dtype)),
        ("exp_avg_scale", b.exp_avg_scale, torch.uint8),
        ("compensation", b.compensation, spec.param_dtype),
        ("average", b.average, spec.math_dtype),
        ("accumulator", b.accumulator, spec.math_dtype),
        ("mirror", b.mirror, spec.mirror_dtype),
    )
    for name, tensor, dtype in entries:
        if tensor is not None:
            _check_memory(spec, name, tensor, dtype)
    return {name: tensor for name, tensor, _ in entries if tensor is not None}


def _check_memory(spec: TensorSpec, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    full = tensor.shape == spec.shape and name not in ("line_var", "cross_var", "exp_avg_scale")
    wanted = spec.state_strides if full else torch.empty(tensor.shape, device="meta").stride()
    strides = tuple(s for s, n in zip(wanted, tensor.shape, strict=True) if n > 1)
    if tensor.dtype != dtype or _strides(tensor) != strides:
        raise ValueError(
            f"state {name} of {spec.id} has dtype {tensor.dtype} and strides {tensor.stride()}; "
            f"expected {dtype} and {wanted}. load_state_dict lays state out as it must be"
        )


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides where they matter."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
