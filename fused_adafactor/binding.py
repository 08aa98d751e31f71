"""A planned tensor bound to the memory and the numbers of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_adafactor.plan import Activity, PlannedTensor
from fused_adafactor.rounding import RoundingKey
from fused_adafactor.rule import Rule, Scalars
from fused_adafactor.schedule import Number


@dataclass(kw_only=True)
class Binding:
    """What a backend gets of one tensor.

    Shapes: [..., n, m] is the matrix view of the spec; "full" is the shape of the parameter. A
    state entry that the rule does not have is None.

    Attributes:
        planned: The tensor in the plan.
        rule: Its rule.
        scalars: The numbers of this step.
        activity: What this call does to it.
        param: Full; written in place.
        grad: Full, never written; None when only the average moves.
        row_var: [..., n], contiguous.
        col_var: [..., m], contiguous.
        var: Unfactored second moment, full (or the matrix of a reshaped view).
        var_max: AMSGrad's maximum, likewise.
        exp_avg: First moment, likewise.
        compensation: Of Kahan's summation, full.
        average: EMA of the weights, full.
        accumulator: Sum of gradients since the last update, full.
        grad_scale: What the raw gradient is multiplied by when it is read: -1 for maximize, 1 /
            loss scale.
        rounding_key: Key of stochastic rounding, or None.
        grad_sq: Set by ``STATS``: Σ g² before any clipping, 0-d.
        grad_factor: Set between ``STATS`` and ``FINALIZE`` where gradients are clipped by a norm,
            0-d; else None.
        skip: Set there too: 0-d bool, true if nothing may be written; None if that cannot be.
        param_rms: Set by ``FINALIZE``: RMS(p), 0-d, if the rule needs it.
        alpha: Set by ``FINALIZE``: the absolute step size alpha_t.
        update_rms: Set by ``FINALIZE`` or ``UPDATE_RMS``: RMS(u) before clipping, 0-d, if the rule
            clips.
        scratch: The backend's own partial sums.
    """

    planned: PlannedTensor
    rule: Rule
    scalars: Scalars
    activity: Activity
    param: Tensor
    grad: Tensor | None
    row_var: Tensor | None
    col_var: Tensor | None
    var: Tensor | None
    var_max: Tensor | None
    exp_avg: Tensor | None
    compensation: Tensor | None
    average: Tensor | None
    accumulator: Tensor | None
    grad_scale: Number
    rounding_key: RoundingKey | None
    grad_sq: Tensor | None = None
    grad_factor: Tensor | None = None
    skip: Tensor | None = None
    param_rms: Tensor | None = None
    alpha: Number = 0.0
    update_rms: Tensor | None = None
    scratch: Any = None
