"""The table at the end of ``make gpu``: every case beside what it is meant to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fused_adafactor.cli.bench.peers import (
    AGAINST,
    CLIPPED,
    OURS,
    TORCH_CLIPPED,
    TORCH_PATHS,
    UNSCALED,
    YARDSTICK,
)
from fused_adafactor.cli.bench.record import CaseRecord
from fused_adafactor.cli.bench.roofs import floor_bytes


@dataclass(frozen=True)
class Target:
    """Of one case on an H100, each a ratio in one run, but for the host's time.

    Attributes:
        over_floor: Ours over the floor, at most.
        unscaled_over_floor: The same without the parameter's scale.
        torch_over_ours: At least.
        host_ms: Until ``step()`` returns, at most.
    """

    over_floor: float | None = None
    unscaled_over_floor: float | None = None
    torch_over_ours: float | None = None
    host_ms: float | None = None


# Of every case: never slower than torch's fused AdamW.
ADAMW_OVER_OURS = 1.0
TARGETS = {
    "gpu-1mb": Target(1.25),
    "gpu-32mb": Target(1.25),
    "gpu-117mb": Target(1.9, 1.55),
    "gpu-1gb": Target(1.85, 1.5),
    "gpu-300x1mb": Target(1.25, torch_over_ours=30, host_ms=0.3),
    "gpu-300-vectors": Target(torch_over_ours=30, host_ms=0.3),
    "gpu-gpt2-124m": Target(1.6, torch_over_ours=10),
    "gpu-llama3-8b-layer": Target(1.6, torch_over_ours=10),
}


@dataclass(frozen=True)
class Row:
    """What a case has come to.

    Attributes:
        case: Its name.
        dtype: Of parameters and gradients.
        ours_ms: In a CUDA graph, on tensors that no cache holds; of the device where that failed.
        floor_ms: To read g, read p and write p at the bandwidth of a copy.
        over_floor: Ours over that.
        unscaled_over_floor: The same of transformers' rule without the parameter's scale.
        roof_over_floor: The same of the faster of two plain kernels that do nothing else.
        torch_over_ours: Whole steps: the faster of torch's two paths over ours.
        adamw_over_ours: The smaller ratio of whole steps and of steps in a graph.
        clipped_torch_over_ours: Whole steps of both, with clipping by the norm.
        against_over_ours: In a graph, ours with another backend over ours.
        host_ms: Until ``step()`` of ours returns.
        missed: Targets, with what was reached; None where there is nothing to reach.
        failed: Why there is nothing else.
    """

    case: str
    dtype: str
    ours_ms: float | None = None
    floor_ms: float | None = None
    over_floor: float | None = None
    unscaled_over_floor: float | None = None
    roof_over_floor: float | None = None
    torch_over_ours: float | None = None
    adamw_over_ours: float | None = None
    clipped_torch_over_ours: float | None = None
    against_over_ours: float | None = None
    host_ms: float | None = None
    missed: list[str] | None = None
    failed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def row_of(case: CaseRecord, copy_gb_per_s: float) -> Row:
    """One case, with the bandwidth of a copy on the same device."""
    if case.times is None:
        error, bound = case.parity.error, case.parity.bound
        reason = case.failed or f"parity: error {error}, bound {bound:.1e}"
        return Row(case.case, case.dtype, failed=reason)
    if case.device_times is None or OURS not in case.device_times:
        reason = case.absent.get(f"{OURS}, apart", "host and device were not timed apart")
        return Row(case.case, case.dtype, failed=reason)
    apart = case.device_times
    on_device = {n: t.device_ms if t.graph_ms is None else t.graph_ms for n, t in apart.items()}
    whole = {name: time.median_ms for name, time in case.times.items()}
    floor_ms = floor_bytes(case.parameter_bytes) / copy_gb_per_s / 1e6
    ours_ms = on_device[OURS]
    over_adamw = [t[YARDSTICK] / t[OURS] for t in (whole, on_device) if YARDSTICK in t]
    roofs = [ms for name, ms in on_device.items() if name.startswith("roof ")]
    others = [ms for name, ms in on_device.items() if name.startswith(AGAINST)]
    clips = CLIPPED in whole and TORCH_CLIPPED in whole
    row = Row(
        case.case,
        case.dtype,
        ours_ms=ours_ms,
        floor_ms=floor_ms,
        over_floor=ours_ms / floor_ms,
        unscaled_over_floor=on_device[UNSCALED] / floor_ms if UNSCALED in on_device else None,
        roof_over_floor=min(roofs) / floor_ms if roofs else None,
        torch_over_ours=min(whole[path] for path in TORCH_PATHS) / whole[OURS],
        adamw_over_ours=min(over_adamw) if over_adamw else None,
        clipped_torch_over_ours=whole[TORCH_CLIPPED] / whole[CLIPPED] if clips else None,
        against_over_ours=others[0] / ours_ms if others else None,
        host_ms=apart[OURS].host_ms,
    )
    return Row(**row.as_dict() | {"missed": _missed(row, TARGETS.get(case.case))})


def _missed(row: Row, target: Target | None) -> list[str]:
    wanted = target or Target()
    found = []
    for name, most in (
        ("over_floor", wanted.over_floor),
        ("unscaled_over_floor", wanted.unscaled_over_floor),
        ("host_ms", wanted.host_ms),
    ):
        value = getattr(row, name)
        if most is not None and (value is None or value > most):
            found.append(f"{name} {_cell(value)} > {most:g}")
    for name, least in (
        ("torch_over_ours", wanted.torch_over_ours),
        ("adamw_over_ours", ADAMW_OVER_OURS),
    ):
        value = getattr(row, name)
        if least is not None and (value is None or value < least):
            found.append(f"{name} {_cell(value)} < {least:g}")
    return found


_COLUMNS = {
    "ours ms": "ours_ms",
    "floor ms": "floor_ms",
    "ours/floor": "over_floor",
    "unscaled/floor": "unscaled_over_floor",
    "roof/floor": "roof_over_floor",
    "torch/ours": "torch_over_ours",
    "AdamW/ours": "adamw_over_ours",
    "clip+torch/ours": "clipped_torch_over_ours",
    "against/ours": "against_over_ours",
    "host ms": "host_ms",
}


def as_table(rows: Sequence[Row]) -> str:
    """For the terminal."""
    cells = [["case", "dtype", *_COLUMNS, "targets"]]
    for row in rows:
        verdict = row.failed or "; ".join(row.missed or []) or "met"
        verdict = verdict if row.failed or not row.missed else f"missed: {verdict}"
        values = [_cell(getattr(row, name)) for name in _COLUMNS.values()]
        cells.append([row.case, row.dtype, *values, verdict])
    widths = [max(len(line[n]) for line in cells) for n in range(len(cells[0]) - 1)]
    lines = []
    for line in cells:
        left = [f"{cell:<{w}}" for cell, w in zip(line[:2], widths[:2], strict=True)]
        right = [f"{cell:>{w}}" for cell, w in zip(line[2:-1], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right, line[-1]]))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1 else f"{value:.2f}"
