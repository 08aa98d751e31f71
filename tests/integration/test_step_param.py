"""Parameters stepped one by one are stepped as ``step()`` steps them all, bit by bit."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.dialects import (
    DIALECTS,
    HF,
    KERAS,
    KERAS_EXTRAS,
    OPTAX,
    TORCH,
    VARIANTS,
    Dialect,
)
from tests.integration import test_prepared as prepared
from tests.stepping import params_of

pytestmark = pytest.mark.usefixtures("each_backend")

SHAPES = prepared.SHAPES
GLOBAL = [dialect for dialect in DIALECTS if dialect.counts_globally]
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
# A common norm is of all gradients together.
ALONE = [(d, v) for d, v in VARIANTS if "global_clipnorm" not in d.variants[v]]
# What a step of one parameter refuses; and two that share a counter count it twice.
TOGETHER = {"group_max_grad_norm", "counters_shared"}


def build(dialect: Dialect, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return dialect(stepping.make_params(SHAPES, dtype), **kwargs)


def set_grads(optimizer: Any, step: int, without: int | None = None) -> None:
    params = params_of(optimizer)
    for number, (p, g) in enumerate(zip(params, stepping.grad_values(params, step), strict=True)):
        p.grad = None if number == without else g


def step_apart(optimizer: Any, frees: bool = True, numbers: Any = None) -> None:
    """All parameters (or those of some numbers), the last first."""
    params = params_of(optimizer)
    for p in reversed(params if numbers is None else [params[number] for number in numbers]):
        optimizer.step_param(p)
        if frees:
            p.grad = None


@pytest.mark.parametrize(("dialect", "variant"), ALONE, ids=str)
@pytest.mark.parametrize("frees", [True, False], ids=["freed", "kept"])
def test_every_variant_is_stepped_to_the_same_bits(dialect, variant, frees):
    """Also where a parameter has no gradient for once."""
    apart, whole = (build(dialect, **dialect.variants[variant]) for _ in range(2))
    for step in range(7):
        for optimizer in (apart, whole):
            set_grads(optimizer, step, without=step if step > 2 else None)
        step_apart(apart, frees)
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


@pytest.mark.parametrize("extra", sorted(set(KERAS_EXTRAS) - {"global_clipnorm"}))
@EVERY_DIALECT
def test_every_extra_of_keras_is_that_of_a_whole_step(dialect, extra):
    """Also where a parameter has no gradient for once."""
    apart, whole = (build(dialect, **KERAS_EXTRAS[extra]) for _ in range(2))
    for step in range(7):
        for optimizer in (apart, whole):
            set_grads(optimizer, step, without=step if step > 2 else None)
        step_apart(apart)
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@EVERY_DIALECT
def test_every_rounding_is_that_of_a_whole_step(dialect, rounding):
    apart, whole = (build(dialect, torch.bfloat16, rounding=rounding, seed=3) for _ in range(2))
    for step in range(4):
        for optimizer in (apart, whole):
            set_grads(optimizer, step)
        step_apart(apart)
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


@pytest.mark.parametrize(
    "change", [c for c in prepared.CHANGES if c.__name__ not in TOGETHER], ids=lambda c: c.__name__
)
def test_a_change_is_followed(change: Callable[[Any], None]) -> None:
    """What is kept of each parameter's step is never stale."""
    apart, whole = (build(TORCH) for _ in range(2))
    for step in range(6):
        for optimizer in (apart, whole):
            set_grads(optimizer, step)
            if step == 3:
                change(optimizer)
        prepared.forget(whole)
        step_apart(apart, frees=False)
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


@EVERY_DIALECT
def test_what_has_not_changed_is_not_described_again(dialect, described):
    optimizer = build(dialect)
    set_grads(optimizer, 0)
    step_apart(optimizer)
    optimizer.step()
    assert len(described) == len(SHAPES)
    described.clear()
    for step in range(1, 4):
        optimizer.param_groups[0]["lr"] = 0.1 * step
        set_grads(optimizer, step)
        step_apart(optimizer)
        optimizer.step()
    assert described == []


described = prepared.described


def test_more_parameters_than_are_kept_by_default_are_all_kept(described):
    params = stepping.make_params(((2, 3),) * 100)
    optimizer = TORCH(params)
    for step in range(3):
        if step == 1:
            described.clear()
        set_grads(optimizer, step)
        step_apart(optimizer)
    assert described == []


@EVERY_DIALECT
def test_a_call_may_be_left_to_step(dialect):
    """Some parameters by themselves, step() does the others; the next time others."""
    apart, whole = (build(dialect) for _ in range(2))
    for step in range(5):
        for optimizer in (apart, whole):
            set_grads(optimizer, step)
        step_apart(apart, frees=False, numbers=[step, (step + 2) % len(SHAPES)])
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


@EVERY_DIALECT
def test_nobody_has_to_call_step(dialect):
    """As in kohya's fused backward pass; a saved state is that of whole steps all the same."""
    apart, whole = (build(dialect) for _ in range(2))
    for step in range(3):
        for optimizer in (apart, whole):
            set_grads(optimizer, step)
        for group in apart.param_groups:
            for number, p in enumerate(group["params"]):
                if number % 2:
                    apart.step_param(p, group)
                else:
                    apart.step_parameter(p, group, number)
                p.grad = None
        whole.step()
    saved, restored = io.BytesIO(), io.BytesIO()
    torch.save(apart.state_dict(), saved)
    torch.save(copy.deepcopy(apart).state_dict(), restored)
    assert saved.getvalue() == restored.getvalue()
    saved.seek(0)
    resumed = build(dialect)
    resumed.load_state_dict(torch.load(saved))
    with torch.no_grad():
        for p, q in zip(params_of(resumed), params_of(whole), strict=True):
            p.copy_(q)
    stepping.assert_same_optimizers(resumed, whole)
    for optimizer in (resumed, whole):
        set_grads(optimizer, 3)
        optimizer.step()
    stepping.assert_same_optimizers(resumed, whole)


@EVERY_DIALECT
def test_a_state_that_is_loaded_begins_a_call(dialect):
    """Its gradients have not been used by it."""
    apart, whole = (build(dialect) for _ in range(2))
    for optimizer in (apart, whole):
        stepping.take_steps(optimizer, 2)
    saved = copy.deepcopy(apart.state_dict())
    before = [p.detach().clone() for p in params_of(apart)]
    for optimizer in (apart, whole):
        set_grads(optimizer, 2)
    step_apart(apart, frees=False)
    apart.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params_of(apart), before, strict=True):
            p.copy_(value)
    for optimizer in (apart, whole):
        optimizer.step()
    stepping.assert_same_optimizers(apart, whole)


@pytest.mark.parametrize("dialect", GLOBAL, ids=str)
def test_a_shared_counter_counts_calls_of_step(dialect):
    optimizer = build(dialect)
    counts = []
    for step in range(2):
        set_grads(optimizer, step)
        step_apart(optimizer, frees=False)
        counts.append(float(optimizer.param_groups[0]["step"]))
        optimizer.step()
        counts.append(float(optimizer.param_groups[0]["step"]))
    assert counts == [0.0, 1.0, 1.0, 2.0]


@EVERY_DIALECT
def test_a_gradient_is_used_once_and_a_new_one_is_used(dialect):
    optimizer = build(dialect)
    p = params_of(optimizer)[0]

    def moves(change: Callable[[], object]) -> bool:
        set_grads(optimizer, 0)
        step_apart(optimizer, frees=False)
        before = p.detach().clone()
        change()
        optimizer.step()
        return not stepping.same_bits(p, before)

    assert not moves(lambda: None)
    assert moves(lambda: p.grad.add_(1))
    assert moves(lambda: setattr(p, "grad", p.grad.clone()))


def test_without_a_gradient_nothing_happens():
    optimizer = build(HF)
    set_grads(optimizer, 0, without=0)
    with stepping.assert_untouched(optimizer):
        optimizer.step_param(params_of(optimizer)[0])


def test_no_gradient_is_kept_alive():
    optimizer = build(TORCH)
    for step in range(2):
        set_grads(optimizer, step)
        step_apart(optimizer, frees=False)
        alive = [weakref.ref(p.grad) for p in params_of(optimizer)]
        gc.disable()
        try:
            optimizer.zero_grad()
            assert [ref() for ref in alive] == [None] * len(alive)
        finally:
            gc.enable()


@pytest.mark.parametrize("number", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("goes_on", ["apart", "whole"])
def test_what_has_left_is_let_go_of(number, goes_on):
    optimizer = build(TORCH)
    for step in range(2):
        set_grads(optimizer, step)
        step_apart(optimizer)
        optimizer.step()
    param = optimizer.param_groups[0]["params"].pop(number)
    alive = [weakref.ref(param), weakref.ref(optimizer.state.pop(param)["step"])]
    del param
    gc.disable()
    try:
        set_grads(optimizer, 2)
        if goes_on == "apart":
            step_apart(optimizer)
        optimizer.step()
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_nonfinite_gradients_are_skipped_where_each_parameter_counts_its_own_steps():
    apart, whole = (build(TORCH, nonfinite="skip") for _ in range(2))
    for step in range(4):
        for optimizer in (apart, whole):
            set_grads(optimizer, step)
            params_of(optimizer)[step % 2].grad[0] = torch.nan
        step_apart(apart)
        apart.step()
        whole.step()
        stepping.assert_same_optimizers(apart, whole)


def test_the_norm_of_some_gradients_is_not_told_as_that_of_all():
    optimizer = build(TORCH, clipnorm=1.0)
    set_grads(optimizer, 0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    set_grads(optimizer, 1)
    optimizer.step_param(params_of(optimizer)[0])
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_capturable_counters_are_followed():
    for dialect in (TORCH, KERAS):
        apart, whole = (build(dialect, capturable=True) for _ in range(2))
        for step in range(4):
            for optimizer in (apart, whole):
                set_grads(optimizer, step)
            step_apart(apart)
            apart.step()
            whole.step()
            stepping.assert_same_optimizers(apart, whole)


# --- errors --------------------------------------------------------------------------------------


def assert_refused(optimizer: Any, message: str, **arguments: Any) -> None:
    set_grads(optimizer, 0)
    arguments = {"p": params_of(optimizer)[0], **arguments}
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises((ValueError, RuntimeError), match=message),
    ):
        optimizer.step_param(**arguments)


def test_what_is_not_ours_is_refused():
    optimizer = build(TORCH)
    stranger = torch.nn.Parameter(torch.ones(5, 3))
    stranger.grad = torch.ones(5, 3)
    assert_refused(optimizer, r"shape \(5, 3\) and dtype torch.float32 is not a para", p=stranger)
    copied = dict(optimizer.param_groups[0])
    assert_refused(optimizer, r"parameter #0 in group 0.*none of optimizer.param_g", group=copied)
    optimizer.add_param_group({"params": [stranger]})
    other = optimizer.param_groups[1]
    assert_refused(optimizer, r"parameter #0 in group 0\) is not|is not in the group", group=other)


@pytest.mark.parametrize(
    ("dialect", "argument", "value"),
    [
        *((dialect, "max_grad_norm", 1.0) for dialect in DIALECTS),
        *((dialect, "global_clipnorm", 1.0) for dialect in DIALECTS),
        (KERAS, "nonfinite", "skip"),
        (OPTAX, "nonfinite", "skip"),
    ],
    ids=str,
)
def test_what_concerns_all_parameters_together_is_refused(dialect, argument, value):
    assert_refused(build(dialect, **{argument: value}), argument)


def test_a_norm_that_another_group_clips_by_is_refused():
    """Its gradients would be clipped by the norm of fewer."""
    params = stepping.make_params(SHAPES)
    optimizer = TORCH([{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 1.0}])
    assert_refused(optimizer, r"max_grad_norm=1.0 \(param group 1\)")


def test_a_gradient_that_cannot_be_stepped_is_refused_by_name():
    params: list[Tensor] = [torch.nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))]
    optimizer = TORCH([("weight", params[0])])
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="'weight'"):
        optimizer.step_param(params[0])


def test_a_grad_scaler_is_refused():
    optimizer = build(TORCH, fused=True)
    set_grads(optimizer, 0)
    step_apart(optimizer)
    set_grads(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_one_parameter_of_a_scaled_loss_is_refused():
    """What torch's GradScaler sets before it calls step()."""
    optimizer = build(TORCH, fused=True)
    optimizer.found_inf = torch.zeros(())
    assert_refused(optimizer, "GradScaler")


def test_a_refused_parameter_does_not_end_the_call():
    """The others can still be stepped, and are counted once."""
    optimizer = build(KERAS)
    set_grads(optimizer, 0)
    first, second = params_of(optimizer)[:2]
    optimizer.step_param(first)
    second.grad = second.grad.to_sparse()
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match="sparse"):
        optimizer.step_param(second)
    second.grad = second.grad.to_dense()
    optimizer.step()
    whole = build(KERAS)
    set_grads(whole, 0)
    whole.step()
    stepping.assert_same_optimizers(optimizer, whole)
