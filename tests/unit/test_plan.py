"""Plans: sweeps and their reasons, segments, bytes; made from specs alone, over any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_adafactor.factoring import Factoring, View
from fused_adafactor.plan import Facts, Launch, Phase, Plan, describe, make_plan
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import (
    Eps1Rule,
    GradClip,
    GradClipKind,
    Rule,
    structure_of,
)
from fused_adafactor.schedule import PowerDecay, StepSize
from fused_adafactor.spec import TensorId, TensorSpec

FAST = Facts("reference", two_sweep=True, why="a test")
PLAIN = Facts("reference", two_sweep=False, why="a test")
RULE = Rule(
    factoring=Factoring(View.LAST_TWO),
    eps1_rule=Eps1Rule.ADD,
    eps1=1e-30,
    beta2=PowerDecay(0.8),
    step_size=StepSize(),
    eps2=1e-3,
    clip_threshold=1.0,
)


def spec(
    shape: tuple[int, ...], rule: Rule = RULE, dtype: torch.dtype = torch.float32
) -> TensorSpec:
    strides = tuple(torch.empty(shape, device="meta").stride())
    return TensorSpec(
        id=TensorId(0, 0, "weight"),
        shape=shape,
        param_strides=strides,
        grad_strides=strides,
        param_dtype=dtype,
        grad_dtype=dtype,
        math_dtype=torch.float32,
        device=torch.device("cpu"),
        view=rule.factoring.view_of(shape),
        structure=structure_of(rule),
    )


def planned(rule: Rule, facts: Facts = FAST, shape: tuple[int, ...] = (4, 6)) -> Plan:
    return make_plan((spec(shape, rule),), facts, joined=False)


def test_two_sweeps_where_the_identity_holds() -> None:
    assert planned(RULE).tensors[0].sweeps == 2


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (replace(RULE, eps1_rule=Eps1Rule.CLAMP), "clamp"),
        (replace(RULE, amsgrad=True), "AMSGrad"),
        (replace(RULE, grad_clip=GradClip(GradClipKind.NORM, 1.0)), "norm"),
        (replace(RULE, grad_clip=GradClip(GradClipKind.GLOBAL_NORM, 1.0)), "norm"),
    ],
    ids=["clamp", "amsgrad", "clipnorm", "global-norm"],
)
def test_three_sweeps_where_it_does_not_and_the_reason(rule: Rule, reason: str) -> None:
    tensor = planned(rule).tensors[0]
    assert tensor.sweeps == 3
    assert reason in tensor.why


def test_clipping_by_value_keeps_two_sweeps() -> None:
    clip = GradClip(GradClipKind.VALUE, 1.0)
    assert planned(replace(RULE, grad_clip=clip)).tensors[0].sweeps == 2


def test_without_update_clipping_nothing_measures_the_update() -> None:
    rule = replace(RULE, clip_threshold=None, amsgrad=True)
    assert planned(rule).tensors[0].sweeps == 2


def test_an_unfactored_tensor_knows_its_update_after_one_sweep() -> None:
    rule = replace(RULE, eps1_rule=Eps1Rule.CLAMP)
    tensor = planned(rule, shape=(9,)).tensors[0]
    assert (tensor.launch, tensor.sweeps) == (Launch.UNFACTORED, 2)


def test_the_reference_is_planned_sweep_by_sweep() -> None:
    assert planned(RULE, PLAIN).tensors[0].sweeps == 3


def test_a_tensor_without_elements_has_nothing_to_do() -> None:
    tensor = planned(RULE, shape=(0, 5)).tensors[0]
    assert (tensor.launch, tensor.sweeps, tensor.bytes) == (Launch.EMPTY, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"]
)
def test_bytes_count_gradient_and_parameter(dtype: torch.dtype, size: int) -> None:
    plan = make_plan((spec((4, 6), dtype=dtype),), FAST, joined=False)
    # Two reads of g; p read for its RMS, read again and written.
    assert plan.tensors[0].bytes == 24 * size * 5
    unscaled = make_plan((spec((4, 6), replace(RULE, eps2=None), dtype),), FAST, joined=False)
    assert unscaled.tensors[0].bytes == 24 * size * 4


def test_bytes_of_more_than_two_to_the_31_elements() -> None:
    plan = make_plan((spec((65_537, 65_536), dtype=torch.bfloat16),), FAST, joined=False)
    assert plan.tensors[0].bytes == 65_537 * 65_536 * 2 * 5


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
def test_phases_break_where_tensors_are_joined(joined: bool) -> None:
    plan = make_plan((spec((4, 6)),), FAST, joined)
    assert [phase for segment in plan.segments for phase in segment] == list(Phase)
    assert len(plan.segments) == (2 if joined else 1)
    assert plan.segments[0][0] is Phase.STATS


def test_a_plan_is_a_function_of_its_specs() -> None:
    assert make_plan((spec((4, 6)),), FAST, False) == make_plan((spec((4, 6)),), FAST, False)
    assert spec((4, 6)) != spec((4, 6), replace(RULE, rounding=Rounding.KAHAN))


def test_numbers_that_change_between_steps_do_not_change_the_spec() -> None:
    assert spec((4, 6)) == spec((4, 6), replace(RULE, eps1=1e-8, clip_threshold=2.0, eps2=0.5))


def test_the_table_names_tensor_launch_sweeps_and_reason() -> None:
    text = describe(planned(replace(RULE, amsgrad=True)))
    row = next(line for line in text.splitlines() if line.startswith("weight"))
    assert row.split()[:6] == ["weight", "4x6", "float32", "reference", "factored", "3"]
    assert "AMSGrad" in row
    assert "a test" in text
