"""The record of a run: what ran where, and what came out. It is what the JSON file holds."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fused_adafactor import backends
from fused_adafactor.cli.bench.cases import Case
from fused_adafactor.cli.bench.device_time import DeviceTime
from fused_adafactor.cli.bench.measure import StepTime, Times
from fused_adafactor.cli.bench.memory import Memory
from fused_adafactor.cli.bench.parity import Parity
from fused_adafactor.cli.bench.peers import OURS, TORCH_PATHS, YARDSTICK
from fused_adafactor.cli.bench.roofs import ROOFS, floor_bytes
from fused_adafactor.cli.bench.where import checkout, machine, versions

SCHEMA = 2
OVER_TORCH, OVER_ADAMW, OVER_FLOOR = "torch / ours", "ours / AdamW", "ours / floor"


@dataclass(frozen=True)
class Floor:
    """The least time that a step can take here: that of the fastest roof.

    Attributes:
        kind: Its name among the times.
        bytes: That it moves.
        median_ms: Its time.
        gb_per_s: The memory's speed by it.
        share: Of it that ours reaches: its time over ours.
    """

    kind: str
    bytes: int
    median_ms: float
    gb_per_s: float
    share: float


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """What was found out about a case in a dtype.

    Attributes:
        case: Its name.
        group: Of cases that it belongs to.
        dtype: Of parameters and gradients.
        tensors: How many.
        elements: Of all of them.
        parameter_bytes: Of all of them.
        plan: Backend and sweeps of ours, in a sentence.
        parity: Ours against float64. Where it failed, what follows is None or empty.
        times: By candidate and roof.
        absent: Who was not timed in this case, and why.
        floor: The fastest roof.
        ratios: From the medians: ``OVER_TORCH`` with the faster of torch's two paths,
            ``OVER_ADAMW``, ``OVER_FLOOR``, and "NAME / ours" of every other peer.
        memory: Of ours and torch's two paths.
        device_times: By candidate and roof, host and device apart, where they were asked for.
        failed: The error that ended the case, if one did.
    """

    case: str
    group: str
    dtype: str
    tensors: int
    elements: int
    parameter_bytes: int
    plan: str
    parity: Parity
    times: dict[str, StepTime] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    floor: Floor | None = None
    ratios: dict[str, float] | None = None
    memory: dict[str, Memory] | None = None
    device_times: dict[str, DeviceTime] | None = None
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run.

    Attributes:
        schema: Of this record.
        date: In UTC.
        versions: Of what was measured, by distribution; None for what is not installed.
        platform: System, device, instruction set and threads.
        commit: Of the checkout that the package is part of, if it is in one.
        dirty: Whether that had changes.
        backend_request: What was asked for.
        backend: What that comes to on the device.
        absent: Who is not installed.
        cases: In the order of measuring.
    """

    schema: int
    date: str
    versions: dict[str, str | None]
    platform: dict[str, str | int]
    commit: str | None
    dirty: bool | None
    backend_request: str
    backend: str
    absent: dict[str, str]
    cases: list[CaseRecord]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Record:
    """What ``Record.write`` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a record of this schema.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, expected {SCHEMA}; measure again")
    return Record(**found | {"cases": [_case_from(case) for case in found["cases"]]})


def _case_from(found: dict[str, Any]) -> CaseRecord:
    parts: dict[str, Any] = {"parity": Parity(**found["parity"])}
    if found["times"] is not None:
        parts["times"] = {name: StepTime(**time) for name, time in found["times"].items()}
        parts["floor"] = Floor(**found["floor"])
        parts["memory"] = {name: Memory(**memory) for name, memory in found["memory"].items()}
    if found.get("device_times") is not None:
        parts["device_times"] = {n: DeviceTime(**t) for n, t in found["device_times"].items()}
    return CaseRecord(**found | parts)


def case_record(
    case: Case,
    dtype: torch.dtype,
    plan: str,
    parity: Parity,
    times: Times | None,
    memory: dict[str, Memory] | None,
    device_times: dict[str, DeviceTime] | None = None,
    failed: str | None = None,
) -> CaseRecord:
    """Put together what was measured; no times and no memory behind a failed check."""
    parameter_bytes = case.elements * dtype.itemsize
    floor = None if times is None else _floor(times.steps, floor_bytes(parameter_bytes))
    return CaseRecord(
        case=case.name,
        group=case.group,
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(case.shapes),
        elements=case.elements,
        parameter_bytes=parameter_bytes,
        plan=plan,
        parity=parity,
        times=None if times is None else times.steps,
        absent={} if times is None else times.absent,
        floor=floor,
        ratios=None if times is None or floor is None else _ratios(times.steps, floor),
        memory=memory,
        device_times=device_times,
        failed=failed,
    )


def _floor(times: dict[str, StepTime], moved: int) -> Floor:
    kind = min(ROOFS, key=lambda name: times[name].median_ms)
    ms = times[kind].median_ms
    return Floor(kind, moved, ms, moved / ms / 1e6, ms / times[OURS].median_ms)


def _ratios(times: dict[str, StepTime], floor: Floor) -> dict[str, float]:
    median = {name: step_time.median_ms for name, step_time in times.items()}
    ours = median[OURS]
    named = {OURS, *TORCH_PATHS, YARDSTICK, *ROOFS}
    return {
        OVER_TORCH: min(median[path] for path in TORCH_PATHS) / ours,
        OVER_ADAMW: ours / median[YARDSTICK],
        OVER_FLOOR: ours / floor.median_ms,
        **{f"{name} / ours": ms / ours for name, ms in median.items() if name not in named},
    }


def empty_record(device: torch.device, request: str, absent: dict[str, str]) -> Record:
    """What will be measured on what; made before, since a checkout can move on in a long run."""
    backend_request = backends.parse_request(request)
    commit, dirty = checkout()
    return Record(
        schema=SCHEMA,
        date=f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M}",
        versions=versions(),
        platform=machine(device),
        commit=commit,
        dirty=dirty,
        backend_request=backend_request,
        backend=backends.choose(backend_request, device).backend,
        absent=absent,
        cases=[],
    )
