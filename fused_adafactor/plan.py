"""The plan of a step: what is done to which tensor, in which phases, with how many sweeps.

A plan depends on specs and on what the backend can do, never on values, so it is made once and
reused until a shape, a dtype, a layout or a switch changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fused_adafactor.rule import Eps1Rule, GradClipKind
from fused_adafactor.spec import TensorSpec


class Phase(str, Enum):
    """The steps of one update, in order; the one contract of every backend.

    ``APPLY`` is the only phase that may write a parameter or its state, so that a step can be
    given up before it.
    """

    STATS = "stats"  # sums over the gradient and the parameter
    FINALIZE = "finalize"  # second moments of the factors, alpha_t, and Σu² where the sums give it
    UPDATE_RMS = "update_rms"  # Σu² by a sweep of its own, where the sums do not give it
    APPLY = "apply"  # parameter, moments, and what else the tensor owns


class Activity(str, Enum):
    """What a call of step() does to a tensor."""

    UPDATE = "update"
    ACCUMULATE = "accumulate"  # gradient accumulation between two updates
    AVERAGE = "average"  # no gradient: only the EMA of the weights moves
    DROP = "drop"  # no gradient when the others update: what was accumulated is lost (Keras)


class Launch(str, Enum):
    """How a tensor is stepped."""

    FACTORED = "factored"
    UNFACTORED = "unfactored"
    EMPTY = "empty"  # no elements: its step is counted, nothing else


@dataclass(frozen=True)
class Facts:
    """What a plan has to know of the backend that will execute it.

    Attributes:
        backend: Its name.
        two_sweep: Whether it uses the identity for Σu² where that is exact.
        why: Why this backend steps the tensor, for ``explain()``.
    """

    backend: str
    two_sweep: bool
    why: str


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a plan.

    Attributes:
        spec: The tensor.
        launch: How it is stepped.
        sweeps: How often its gradient is read in an update.
        bytes: Least traffic of those sweeps over gradient and parameter: sweeps reads of g, one
            read and one write of p, one more read of p for RMS(p), one write of its mirror. A
            backend that knows RMS(p) from the step before does without that second read.
        why: Reason for the number of sweeps.
    """

    spec: TensorSpec
    launch: Launch
    sweeps: int
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """Tensors that one backend steps together.

    Attributes:
        facts: The backend.
        tensors: In order.
        segments: Phases that run without anything between them. There is more than one where
            tensors must be joined first, by a global gradient norm or to skip a step together,
            and where sums are to be taken over processes.
    """

    facts: Facts
    tensors: tuple[PlannedTensor, ...]
    segments: tuple[tuple[Phase, ...], ...]


def make_plan(specs: tuple[TensorSpec, ...], facts: Facts, joined: bool) -> Plan:
    """Plan an update.

    Args:
        specs: What is to be stepped.
        facts: The backend.
        joined: Whether something must be known of all tensors together between ``STATS`` and
            ``FINALIZE``.
    """
    tensors = tuple(_plan_tensor(spec, facts) for spec in specs)
    stats, measured = (Phase.STATS,), (Phase.FINALIZE, Phase.UPDATE_RMS)
    segments: tuple[tuple[Phase, ...], ...] = ((*stats, *measured, Phase.APPLY),)
    if any(spec.is_split for spec in specs):
        segments = (stats, measured, (Phase.APPLY,))
    elif joined:
        segments = (stats, (*measured, Phase.APPLY))
    return Plan(facts, tensors, segments)


def _plan_tensor(spec: TensorSpec, facts: Facts) -> PlannedTensor:
    if spec.whole_numel == 0:
        return PlannedTensor(spec, Launch.EMPTY, 0, 0, "no elements")
    launch = Launch.UNFACTORED if spec.view is None else Launch.FACTORED
    obstacle = _third_sweep(spec, facts)
    sweeps = 2 if obstacle is None else 3
    traffic = spec.numel * (
        sweeps * spec.grad_dtype.itemsize
        + (3 if spec.structure.param_rms else 2) * spec.param_dtype.itemsize
        + (0 if spec.mirror_dtype is None else spec.mirror_dtype.itemsize)
    )
    return PlannedTensor(
        spec, launch, sweeps, traffic, obstacle or "Σu² follows from the first sweep"
    )


def _third_sweep(spec: TensorSpec, facts: Facts) -> str | None:
    """Why Σu² needs a sweep of its own, or None if the first sweep gives it."""
    structure = spec.structure
    if not structure.update_clip:
        return None
    if spec.cols_over:
        return "its columns are spread over processes, so a row is not known after one sweep"
    if not facts.two_sweep and not spec.is_split:
        return f"the {facts.backend} backend takes the sweeps one by one, as the papers write them"
    if structure.grad_clip in (GradClipKind.NORM, GradClipKind.GLOBAL_NORM):
        return "the gradient is clipped by a norm that is known only after the first sweep"
    if spec.view is not None and structure.amsgrad:
        return "AMSGrad takes a maximum per element"
    if spec.view is not None and structure.eps1_rule is Eps1Rule.CLAMP:
        return "the clamp by eps1² acts per element"
    return None


def describe(plan: Plan) -> str:
    """The plan as a table: per tensor the backend, the launch, the sweeps, the bytes, and why."""
    rows = [("parameter", "shape", "dtype", "backend", "launch", "sweeps", "bytes", "why")]
    for planned in plan.tensors:
        spec = planned.spec
        rows.append(
            (
                spec.id.label,
                "x".join(map(str, spec.shape)) or "scalar",
                str(spec.param_dtype).removeprefix("torch."),
                plan.facts.backend,
                planned.launch.value,
                str(planned.sweeps),
                f"{planned.bytes:,}",
                planned.why,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    total = sum(planned.bytes for planned in plan.tensors)
    phases = " | ".join(" > ".join(phase.value for phase in segment) for segment in plan.segments)
    lines.append(
        f"{len(plan.tensors)} tensors on {plan.facts.backend} ({plan.facts.why}); "
        f"{total:,} bytes a step; {phases}"
    )
    return "\n".join(lines)
