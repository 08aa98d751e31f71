"""``bench --features``: what turning a feature on costs, in percent of a bare step.

Bare and featured steps take turns, so both numbers of a percentage are of the same minutes. Beside
it stands what the bytes say: gradient and parameter as the plan counts them, and everything else
that is as large as the parameter read and written once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fused_adafactor.cli.bench.cases import Case, draw
from fused_adafactor.cli.bench.measure import StepTime, time_case
from fused_adafactor.cli.bench.parity import Parity, compare
from fused_adafactor.cli.bench.peers import OURS, Candidate, Params, Step
from fused_adafactor.cli.bench.record import Record, empty_record
from fused_adafactor.dialects import hf
from fused_adafactor.offload import CPUOffload

_LR = 1e-3
_OPTIONS: dict[str, Any] = {"lr": _LR, "relative_step": False}
_MAX_NORM = 1e12  # above every norm: gradients are multiplied by 1, which takes as long
_ACCUMULATED = 4
_BACKWARD = "backward() and step()"
_HALF = torch.bfloat16


@dataclass(frozen=True)
class Feature:
    """What is turned on.

    Attributes:
        name: As a user writes it.
        options: Of the optimizer.
        over: Name of the feature whose step it is compared with.
        calls: Of ``step()`` that make a turn.
        drive: What takes a turn, given the optimizer and its parameters.
        only: The dtype of parameters that it is for; None for any.
        makes: Of optimizers.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    over: str = OURS
    calls: int = 1
    drive: Callable[[Any, Params], Step] = lambda optimizer, params: optimizer.step
    only: torch.dtype | None = None
    makes: Callable[..., Any] = hf.Adafactor

    def make(self, params: Params, backend: str) -> Any:
        """The optimizer."""
        return self.makes(params, **_OPTIONS, **self.options, backend=backend)


def _accumulate(optimizer: Any, params: Params) -> Step:
    def steps() -> None:
        for _ in range(_ACCUMULATED):
            optimizer.step()

    return steps


def _scaled(optimizer: Any, params: Params) -> Step:
    """As torch's GradScaler calls a fused optimizer."""
    scale, found_inf = (torch.full((), x, device=params[0].device) for x in (1.0, 0.0))

    def step() -> None:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    return step


def _with_metrics(optimizer: Any, params: Params) -> Step:
    def step() -> None:
        optimizer.step()
        optimizer.metrics()

    return step


def _compiled(optimizer: Any, params: Params) -> Step:
    """A compiled function that steps; what it is compiled by makes no difference to the step."""
    step: Step = torch.compile(lambda: optimizer.step(), backend="eager")
    return step


def _backward(optimizer: Any, params: Params) -> Step:
    """Gradients that arrive one by one, as copies of what the parameters have now."""
    grads = [param.grad.clone() for param in params if param.grad is not None]

    def step() -> None:
        for param in params:
            param.grad = None
        torch.autograd.backward(params, grads)
        optimizer.step()

    return step


def _in_backward(optimizer: Any, params: Params) -> Step:
    step = _backward(optimizer, params)
    optimizer.enable_backward_step()
    return step


def _offloaded(params: Params, **options: Any) -> Any:
    return CPUOffload(params, hf.Adafactor, **options)


FEATURES = (
    Feature(OURS),
    Feature("max_grad_norm", {"max_grad_norm": _MAX_NORM}),
    Feature("clipnorm", {"clipnorm": _MAX_NORM}),
    Feature("global_clipnorm", {"global_clipnorm": _MAX_NORM}),
    Feature("clipvalue", {"clipvalue": _MAX_NORM}),
    Feature("loss_scale_factor", {"loss_scale_factor": 8.0}),
    Feature("nonfinite='skip'", {"nonfinite": "skip"}),
    Feature("fused=True, with a scale", {"fused": True}, drive=_scaled),
    Feature("capturable=True", {"capturable": True}),
    Feature(
        f"gradient_accumulation_steps={_ACCUMULATED}",
        {"gradient_accumulation_steps": _ACCUMULATED},
        calls=_ACCUMULATED,
        drive=_accumulate,
    ),
    Feature("use_ema", {"use_ema": True}),
    Feature("rounding='stochastic'", {"rounding": "stochastic"}, only=_HALF),
    Feature("rounding='kahan'", {"rounding": "kahan"}, only=_HALF),
    Feature("state_dtype=bfloat16", {"state_dtype": _HALF}),
    Feature("beta1=0.9", {"beta1": 0.9}),
    Feature("beta1, momentum_dtype=bfloat16", {"beta1": 0.9, "momentum_dtype": _HALF}),
    Feature("beta1, momentum_dtype=int8", {"beta1": 0.9, "momentum_dtype": torch.int8}),
    Feature("param_rms='expected'", {"param_rms": "expected"}),
    Feature("metrics()", drive=_with_metrics),
    Feature("torch.compile", drive=_compiled),
    Feature(_BACKWARD, drive=_backward),
    Feature("enable_backward_step()", over=_BACKWARD, drive=_in_backward),
    Feature("CPUOffload", makes=_offloaded),
)


@dataclass(frozen=True)
class _Contestant(Candidate):
    """A feature, to be timed."""

    drive: Callable[[Any, Params], Step] = lambda optimizer, params: optimizer.step

    @override
    def stepper(self, params: Params) -> Step:
        return self.drive(self.make(params), params)


@dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """What a feature costs in a case and a dtype.

    Attributes:
        case: Its name.
        dtype: Of parameters and gradients.
        feature: Its name.
        over: That of what it is compared with.
        parity: Against the reference backend with the same options, from the same start.
        time: Of a call of ``step()``; None behind a failed check.
        cost: Of its median over that of ``over``, less one.
        bytes: That a call moves, by the model; None where it does not say.
        bytes_cost: The same by the model.
        peak_grads: Bytes of gradients that were there together at the worst moment of a backward
            pass, over those of all gradients; None where there is no backward pass.
    """

    case: str
    dtype: str
    feature: str
    over: str
    parity: Parity
    time: StepTime | None
    cost: float | None
    bytes: float | None
    bytes_cost: float | None
    peak_grads: float | None


def measure_features(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    seconds: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[FeatureRecord]:
    """Check every feature, then time them all in turn.

    Args:
        case: What to step.
        dtype: Of parameters and gradients.
        device: Where.
        backend: Of ours.
        seconds: Of rounds, about.
        on_progress: Told the share of the rounds that is done.
    """
    features = [f for f in FEATURES if f.only in (None, dtype)]
    checks = {f.name: _check(f, case, dtype, device, backend) for f in features}
    passed = [f for f in features if checks[f.name].passed]
    moved = {f.name: _bytes_moved(f, case, dtype, device, backend) for f in passed}
    contestants = [
        _Contestant(f.name, partial(f.make, backend=backend), drive=f.drive) for f in passed
    ]
    times = time_case(case, dtype, device, contestants, seconds, on_progress).steps
    per_call = {f.name: _of_a_call(times[f.name], f.calls) for f in passed}
    records = []
    for f in features:
        time, base = per_call.get(f.name), per_call.get(f.over)
        mine, others = moved.get(f.name), moved.get(f.over)
        records.append(
            FeatureRecord(
                case=case.name,
                dtype=str(dtype).removeprefix("torch."),
                feature=f.name,
                over=f.over,
                parity=checks[f.name],
                time=time,
                cost=None if time is None or base is None else time.median_ms / base.median_ms - 1,
                bytes=mine,
                bytes_cost=None if mine is None or others is None else mine / others - 1,
                peak_grads=_peak_grads(f, case, dtype, device, backend),
            )
        )
    return records


def _check(
    feature: Feature, case: Case, dtype: torch.dtype, device: torch.device, backend: str
) -> Parity:
    """A turn of ours and one of the reference, from the same parameters and gradients."""
    ours, reference = (_with_grads(case, dtype, device) for _ in range(2))
    before = [param.detach().double() for param in ours]
    feature.drive(feature.make(ours, backend), ours)()
    feature.drive(feature.make(reference, "reference"), reference)()
    checks = [
        compare(p.detach().double(), q.detach().double(), old, dtype)
        for p, q, old in zip(ours, reference, before, strict=True)
    ]
    return max(checks, key=lambda check: check.share)


def _with_grads(case: Case, dtype: torch.dtype, device: torch.device) -> Params:
    params = [nn.Parameter(tensor) for tensor in draw(case, dtype, device, seed=0)]
    for param, grad in zip(params, draw(case, dtype, device, seed=1), strict=True):
        param.grad = grad
    return params


def _bytes_moved(
    feature: Feature, case: Case, dtype: torch.dtype, device: torch.device, backend: str
) -> float | None:
    """By the model: what the plan says, and the full-size state read and written, for a call."""
    if feature.makes is not hf.Adafactor or feature.drive in (_backward, _in_backward):
        return None
    params = _with_grads(case, dtype, device)
    optimizer = feature.make(params, backend)
    feature.drive(optimizer, params)()
    moved = sum(planned.bytes for plan in optimizer.plans() for planned in plan.tensors)
    state = [(p, key, t) for p in params for key, t in optimizer.state[p].items()]
    kept = {key: 0 for _, key, _ in state}
    for param, key, tensor in state:
        if isinstance(tensor, Tensor) and 32 * tensor.numel() >= param.numel() > 1:
            kept[key] += 2 * tensor.nbytes
    sums = kept.pop(optimizer.layout.accumulator, 0)
    of_update = float(moved + sums + sum(kept.values()))
    gradients = sum(param.grad.nbytes for param in params if param.grad is not None)
    return (of_update + (feature.calls - 1) * (gradients + sums)) / feature.calls


def _peak_grads(
    feature: Feature, case: Case, dtype: torch.dtype, device: torch.device, backend: str
) -> float | None:
    """Looked at whenever a gradient arrives, before anything steps it."""
    if feature.drive not in (_backward, _in_backward):
        return None
    params = _with_grads(case, dtype, device)
    peak = 0

    def look(param: Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    step = feature.drive(feature.make(params, backend), params)
    step()
    return peak / sum(param.nbytes for param in params)


def _of_a_call(time: StepTime, calls: int) -> StepTime:
    return replace(
        time,
        p20_ms=time.p20_ms / calls,
        median_ms=time.median_ms / calls,
        p80_ms=time.p80_ms / calls,
    )


@dataclass(frozen=True)
class FeaturesRecord:
    """A run of ``bench --features``.

    Attributes:
        run: What ran where.
        features: In the order of measuring.
    """

    run: Record
    features: list[FeatureRecord]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def empty_features_record(device: torch.device, backend: str) -> FeaturesRecord:
    """What will be measured on what."""
    return FeaturesRecord(empty_record(device, backend, {}), [])


def feature_rows(features: Sequence[FeatureRecord]) -> list[tuple[str, ...]]:
    """A row for each feature: case, dtype, name, ms, cost, cost by the model."""
    return [
        (
            f.case,
            f.dtype,
            "bare" if f.feature == OURS else f.feature,
            "parity FAILED" if f.time is None else f"{f.time.median_ms:.3f}",
            _percent(f.cost) if f.feature != f.over else "",
            _percent(f.bytes_cost) if f.feature != f.over else "",
        )
        for f in features
    ]


def peak_lines(features: Sequence[FeatureRecord]) -> list[str]:
    """How much of the gradients is in memory together, where there is a backward pass."""
    return [
        f"gradients together in memory, {f.case} {f.dtype}: {f.feature} {f.peak_grads:.0%}"
        for f in features
        if f.peak_grads is not None
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{share:+.0%}"
