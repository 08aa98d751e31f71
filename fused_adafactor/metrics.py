"""What a step has found out of each parameter, for who asks: numbers that it needed anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_adafactor.rule import Rule


class Outcome(NamedTuple):
    """Of several tensors in their last update; one value for each, on their device.

    A value that the rule of a tensor does not ask for is left undefined.

    Attributes:
        param_rms: RMS(p) before the update.
        update_rms: RMS(u) before it is clipped.
        alpha: The absolute step size alpha_t.
    """

    param_rms: Tensor
    update_rms: Tensor
    alpha: Tensor


class Metrics(NamedTuple):
    """Of one parameter in its last update; None for what its rule does not measure.

    Attributes:
        param_rms: RMS(p) before the update: with a parameter scale.
        update_rms: RMS(u), the normalised gradient before clipping: with a clipping threshold.
        clip_factor: max(1, RMS(u) / clip_threshold), what u was divided by; likewise.
        step_size: alpha_t = rho_t max(eps2, RMS(p)), or rho_t without a parameter scale.
    """

    param_rms: float | None
    update_rms: float | None
    clip_factor: float | None
    step_size: float


def metrics_of(rules: Sequence[Rule], outcome: Outcome) -> list[Metrics]:
    """Read an outcome: one transfer from the device, for which the host waits."""
    columns = torch.stack([column.double() for column in outcome], dim=1).tolist()
    return [_metrics(rule, *values) for rule, values in zip(rules, columns, strict=True)]


def _metrics(rule: Rule, param_rms: float, update_rms: float, alpha: float) -> Metrics:
    clip_factor = None
    if rule.clip_threshold is not None:
        ratio = update_rms / rule.clip_threshold
        clip_factor = 1.0 if ratio < 1.0 else ratio  # so that NaN stays
    return Metrics(
        param_rms=param_rms if rule.measures_param_rms else None,
        update_rms=None if rule.clip_threshold is None else update_rms,
        clip_factor=clip_factor,
        step_size=alpha,
    )
