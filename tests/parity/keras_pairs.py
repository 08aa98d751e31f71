"""What the parity tests of the keras dialect share: ours beside Keras' and beside the oracle."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.dialects.keras import Adafactor
from tests import oracle, peers, stepping
from tests.stepping import SHAPES, TOLERANCES

STEPS = 14
F32, F64 = torch.float32, torch.float64
# Keras takes means and reads its scalars in float32, whatever the dtype of the variables. What is
# exact in float64 is compared with the oracle.
PEER_TOLERANCES = {F64: 2e-7, F32: 3e-6}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def halving(iteration: int) -> float:
    """A schedule whose values float32 holds exactly: Keras keeps learning rates in float32."""
    return 2.0 ** -(4 + int(iteration) // 3)


LR = {"learning_rate": 2.0**-6}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"learning_rate": 2.0**-10},
    "large_lr_is_capped": {"learning_rate": 0.5},
    "zero_lr": {"learning_rate": 0.0, "weight_decay": 0.5},
    "relative_step_off": {**LR, "relative_step": False},
    "weight_decay": {"learning_rate": 2.0**-5, "weight_decay": 0.125},
    "own_numbers": {
        **LR,
        "beta_2_decay": -0.6,
        "epsilon_1": 1e-4,
        "epsilon_2": 0.1,
        "clip_threshold": 0.75,
    },
    "schedule": {"learning_rate": halving, "weight_decay": 0.25},
    "clipnorm": {**LR, "clipnorm": 0.5},
    "clipnorm_off": {**LR, "clipnorm": 0.0},
    "clipvalue": {**LR, "clipvalue": 0.01},
    "global_clipnorm": {**LR, "global_clipnorm": 0.5, "epsilon_1": 1e-6},
    "loss_scale": {**LR, "loss_scale_factor": 1024.0, "epsilon_1": 1e-6},
    "accumulation": {
        "learning_rate": halving,
        "gradient_accumulation_steps": 3,
        "global_clipnorm": 0.5,
        "weight_decay": 0.25,
    },
    "ema": {"learning_rate": 2.0**-5, "use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite": {
        "learning_rate": 2.0**-5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
    },
    "ema_accumulation": {
        "learning_rate": 2.0**-5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
        "loss_scale_factor": 8.0,
        "clipvalue": 0.5,
    },
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
NAMES = {
    "r": "row_var",
    "c": "col_var",
    "velocity": "var",
    "average": "average",
    "gradient_accumulator": "accumulated",
}
EXCLUDED = [i % 2 == 1 for i in range(len(SHAPES))]


def keras_module() -> types.ModuleType:
    """Keras on torch; skips where it is not installed."""
    peers.require_peer("keras")
    import keras

    module: types.ModuleType = keras
    return module


def own_schedule(rate: Any) -> Any:
    """A LearningRateSchedule of Keras that returns `rate` of the iteration."""
    schedules = keras_module().optimizers.schedules

    class Schedule(schedules.LearningRateSchedule):
        # The default is a trap: a schedule gets the iteration whatever its signature says.
        def __call__(self, step: Any = 0) -> float:
            return rate(step)

    return Schedule()


def pair(params: list[torch.nn.Parameter], **options: Any) -> tuple[Any, Any]:
    """Ours and Keras' over copies of the same parameters."""
    return Adafactor(stepping.clone_params(params), **options), peers.make_peer(
        "keras", params, **options
    )


def some_grads(params: list[Tensor], step: int, with_none: bool = False) -> list[Tensor | None]:
    """Gradients of one step; with `with_none` every third is missing, another third each step."""
    grads = stepping.grad_values(params, step)
    return [None if with_none and (step + index) % 3 == 1 else g for index, g in enumerate(grads)]


def take(optimizer: Adafactor, grads: list[Tensor | None]) -> None:
    for p, g in zip(stepping.params_of(optimizer), grads, strict=True):
        p.grad = g
    optimizer.step()


def take_both(ours: Adafactor, theirs: Any, steps: range, with_none: bool = False) -> None:
    for step in steps:
        grads = some_grads(stepping.params_of(ours), step, with_none)
        take(ours, grads)
        theirs.step(grads)


def assert_agree(ours: Adafactor, theirs: Any, tolerance: float) -> None:
    """Compare parameters and all that Keras would save."""
    for p, q in zip(stepping.params_of(ours), theirs.params(), strict=True):
        stepping.assert_close(p, q, tolerance, str(tuple(p.shape)))
    mine, wanted = saved(ours), saved(theirs.optimizer)
    paths = [v.path for v in theirs.optimizer.variables]
    assert len(mine) == len(wanted) == len(paths)
    factored = {tuple(p.shape) for p in stepping.params_of(ours) if p.dim() > 1}
    for number, path in enumerate(paths):
        a, b = (torch.as_tensor(store[str(number)]).double() for store in (mine, wanted))
        assert a.shape == b.shape, path
        if path.endswith("velocity") and tuple(a.shape) in factored:
            assert not a.any()
        else:
            stepping.assert_close(a, b, tolerance, path)


def assert_follows(ours: Adafactor, judge: oracle.Oracle, dtype: torch.dtype) -> None:
    """Compare parameters and state with the oracle's."""
    tolerance = TOLERANCES[dtype]
    params = stepping.params_of(ours)
    for p, expected, wanted in zip(params, judge.params, judge.state, strict=True):
        what, state = str(tuple(p.shape)), ours.state.get(p, {})
        stepping.assert_close(p, expected, tolerance, what)
        if state:
            assert {NAMES[key] for key in state} == wanted.keys() - {"step"}
        for key, value in state.items():
            stepping.assert_close(value, wanted[NAMES[key]], tolerance, f"{key} of {what}")


def judge_from(ours: Adafactor, options: dict[str, Any], dtype: torch.dtype) -> oracle.Oracle:
    """An oracle that goes on from where an optimizer is."""
    knobs = {**options, "clipnorm": options.get("clipnorm") or None}  # 0 is off
    if not callable(options["learning_rate"]):
        knobs["learning_rate"] = float(ours.learning_rate)
    judge = oracle.Oracle(oracle.keras_knobs(**knobs), stepping.params_of(ours), dtype)
    judge.calls = int(ours.param_groups[0]["step"])
    for p, state in zip(stepping.params_of(ours), judge.state, strict=True):
        state |= {
            NAMES[key]: value.to(F64, copy=True) for key, value in ours.state.get(p, {}).items()
        }
    return judge


def saved(optimizer: Any) -> dict[str, Any]:
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    return store
