"""Save and go on: N steps are k steps, a file, and N - k steps, in every bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

# A single process is all that these functions need here.
from torch.distributed.checkpoint import state_dict as checkpoint  # noqa: TID251

from tests import stepping
from tests.dialects import DIALECTS, VARIANTS, Dialect

SHAPES = ((6, 5), (17, 23), (4, 3, 5), (7,), (), (0, 3))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
EVERY_VARIANT = pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)


def build(dialect: Dialect, dtype: torch.dtype, **kwargs: Any) -> torch.optim.Optimizer:
    return dialect(stepping.make_params(SHAPES, dtype), **kwargs)


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(optimizer: Any, dialect: Dialect, **kwargs: Any) -> torch.optim.Optimizer:
    """A new optimizer over copies of the parameters, with the state of the old one."""
    other = dialect(stepping.clone_params(stepping.params_of(optimizer)), **kwargs)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


def assert_resumes(dialect: Dialect, dtype: torch.dtype, **kwargs: Any) -> None:
    optimizer = build(dialect, dtype, **kwargs)
    stepping.take_steps(optimizer, 4)
    other = resumed(optimizer, dialect)
    stepping.assert_same_optimizers(other, optimizer)
    for each in (optimizer, other):
        stepping.take_steps(each, 4, start=4)
    stepping.assert_same_optimizers(other, optimizer)


@EVERY_VARIANT
@DTYPES
def test_resume_is_exact(dialect, variant, dtype):
    assert_resumes(dialect, dtype, **dialect.variants[variant])


@EVERY_DIALECT
@pytest.mark.parametrize(
    "extras",
    [
        {"rounding": "kahan"},
        {"rounding": "stochastic", "seed": 11},
        {"state_dtype": torch.bfloat16},
        {"state_dtype": torch.float64},
        {"capturable": True},
        {"fused": True, "max_grad_norm": 0.5},
        {"nonfinite": "skip"},
    ],
    ids=lambda extras: "-".join(extras),
)
def test_resume_is_exact_with_extras_that_come_from_the_file(dialect, extras):
    """The new optimizer is built without them: they are in its loaded groups."""
    assert_resumes(dialect, torch.bfloat16, **extras)


@EVERY_DIALECT
@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_resume_is_exact_in_any_memory_layout(dialect, layout):
    values = stepping.make_params([(4, 6, 3, 2)], torch.bfloat16)[0].detach()
    laid_out = (
        values.mT.contiguous().mT
        if layout == "transposed"
        else values.contiguous(memory_format=torch.channels_last)
    )
    optimizer = dialect([torch.nn.Parameter(laid_out)])
    stepping.take_steps(optimizer, 3)
    other = resumed(optimizer, dialect)
    for each in (optimizer, other):
        stepping.take_steps(each, 3, start=3)
    stepping.assert_same_optimizers(other, optimizer)


@EVERY_DIALECT
def test_the_round_trip_that_accelerate_makes_at_once_keeps_float32_state(dialect):
    """`prepare` loads what it has just saved: before the first step, and again at any time."""
    optimizer, other = (build(dialect, torch.bfloat16) for _ in range(2))
    for start in (0, 2, 4):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each in (optimizer, other):
            stepping.take_steps(each, 2, start=start)
        stepping.assert_same_optimizers(optimizer, other)
    layout = optimizer.layout
    first = optimizer.state[stepping.params_of(optimizer)[0]]
    assert first[layout.row_var].dtype is torch.float32


@EVERY_DIALECT
def test_loading_does_not_share_memory_with_what_was_loaded(dialect):
    optimizer, other = (build(dialect, torch.float32) for _ in range(2))
    stepping.take_steps(optimizer, 2)
    state_dict = optimizer.state_dict()
    other.load_state_dict(state_dict)
    with stepping.assert_untouched(optimizer):
        grads = [p.grad for p in stepping.params_of(optimizer)]
        stepping.take_steps(other, 2)
        for p, g in zip(stepping.params_of(optimizer), grads, strict=True):
            p.grad = g


@EVERY_DIALECT
@pytest.mark.parametrize("fused", [False, True])
def test_loaded_counters_are_not_shared_between_parameters(dialect, fused):
    optimizer = build(dialect, torch.float32, fused=fused)
    stepping.take_steps(optimizer, 1)
    other = resumed(optimizer, dialect)
    if not dialect.counts_globally:
        steps = [other.state[p]["step"] for p in stepping.params_of(other)]
        assert len({step.data_ptr() for step in steps}) == len(steps)
    assert all(group["fused"] is fused for group in other.param_groups)


def model_and_optimizer(dialect: Dialect, **kwargs: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))
    return model, dialect(model.named_parameters(), **kwargs)


@EVERY_VARIANT
def test_asking_for_a_distributed_state_dict_first_changes_nothing(dialect, variant):
    """torch makes a step with a zero lr and zero gradients to see the state.

    Peers that ignore lr decay the weights there, and all of them count the step."""
    kwargs = dialect.variants[variant]
    model, optimizer = model_and_optimizer(dialect, **kwargs)
    _, other = model_and_optimizer(dialect, **kwargs)
    before = [p.detach().clone() for p in model.parameters()]
    saved = checkpoint.get_optimizer_state_dict(model, optimizer)
    assert all(map(stepping.same_bits, model.parameters(), before))
    assert saved["state"]["0.weight"]
    for each in (optimizer, other):
        stepping.take_steps(each, 3)
    stepping.assert_same_optimizers(optimizer, other)


@EVERY_DIALECT
def test_a_distributed_state_dict_resumes(dialect):
    model, optimizer = model_and_optimizer(dialect)
    stepping.take_steps(optimizer, 3)
    saved = checkpoint.get_optimizer_state_dict(model, optimizer)
    other_model, other = model_and_optimizer(dialect)
    other_model.load_state_dict(model.state_dict())
    checkpoint.set_optimizer_state_dict(other_model, other, saved)
    for each in (optimizer, other):
        stepping.take_steps(each, 2, start=3)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert stepping.same_bits(p, q)
        stepping.assert_same_values(other.state[q], optimizer.state[p])
