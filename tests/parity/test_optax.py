"""The optax dialect against optax.adafactor, the oracle and the golden numbers of T5X."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.dialects.optax import Adafactor
from tests import peers
from tests.oracle import Oracle, optax_knobs
from tests.parity.follow import (
    BF16,
    F16,
    F32,
    F64,
    KEPT,
    SHAPES,
    STEPS,
    TOLERANCES,
    assert_all_close,
    assert_close,
    assert_state_is,
    hard_grads,
    hard_params,
    step_with,
)
from tests.stepping import assert_same_optimizers, assert_untouched, clone_params, same_bits

LARGE = [(130, 140), (3, 130, 129), (128, 2, 128), (127, 300), (130, 130)]
MASK = [i % 2 == 0 for i in range(len(SHAPES))]


def halving(count: Any) -> Any:
    """A schedule of the count of earlier steps; float32, which optax computes in, holds it."""
    return 2.0 ** -(4 + count // 3)


SMALL: dict[str, Any] = {"learning_rate": 0.02, "min_dim_size_to_factor": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "learning_rate": {"learning_rate": 0.01},
    "factored": {"learning_rate": 0.01, "min_dim_size_to_factor": 0},
    "min_dim": {"learning_rate": 0.01, "min_dim_size_to_factor": 5},
    "not_factored": {"learning_rate": 0.01, "factored": False},
    "not_scaled": {**SMALL, "multiply_by_parameter_scale": False},
    "schedule": {**SMALL, "learning_rate": halving},
    "decay_rate": {**SMALL, "decay_rate": 0.6, "decay_offset": -3},
    "no_clipping": {**SMALL, "clipping_threshold": None},
    "clipping": {**SMALL, "clipping_threshold": 0.5, "eps": 1e-4},
    "momentum": {**SMALL, "momentum": 0.9},
    "weight_decay": {**SMALL, "weight_decay_rate": 0.01},
    "all": {
        **{"learning_rate": halving, "min_dim_size_to_factor": 3, "momentum": 0.8},
        **{"weight_decay_rate": 0.01, "clipping_threshold": 0.7, "decay_rate": 0.7},
    },
}


def knobs(variant: dict[str, Any], dtype: torch.dtype) -> Any:
    return optax_knobs(**{"dtype_momentum": dtype, **variant})


def make(params: Any, variant: dict[str, Any], dtype: torch.dtype) -> Adafactor:
    return Adafactor(params, **{"dtype_momentum": dtype, **variant})


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_follows_the_oracle(name: str, dtype: torch.dtype) -> None:
    params = hard_params(dtype=dtype)
    optimizer = make(params, VARIANTS[name], dtype)
    judge = Oracle(knobs(VARIANTS[name], dtype), params)
    for step in range(STEPS):
        grads = hard_grads(SHAPES, dtype, step)
        step_with(optimizer, grads)
        judge.step(grads)
        assert_all_close(params, judge.params, TOLERANCES[dtype], f"step {step + 1}")
    states = [optimizer.state[p] for p in params]
    assert_state_is(judge, states, KEPT["optax"], TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_follows_the_oracle_above_the_default_size(dtype: torch.dtype) -> None:
    params = hard_params(LARGE, dtype)
    variant = {"learning_rate": 0.02, "momentum": 0.9}
    optimizer, judge = make(params, variant, dtype), Oracle(knobs(variant, dtype), params)
    for step in range(12):
        grads = hard_grads(LARGE, dtype, step)
        step_with(optimizer, grads)
        judge.step(grads)
    assert_all_close(params, judge.params, TOLERANCES[dtype], "end")
    states = [optimizer.state[p] for p in params]
    assert [set(state) for state in states] == [
        {"v", "ema"} if 127 in shape else {"v_row", "v_col", "ema"} for shape in LARGE
    ]
    assert_state_is(judge, states, KEPT["optax"], TOLERANCES[dtype])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", VARIANTS)
def test_follows_optax(name: str, dtype: torch.dtype) -> None:
    # Also with 64-bit JAX optax computes beta2_t in float32, hence one tolerance for both.
    params = hard_params(dtype=dtype)
    variant = {"dtype_momentum": dtype, **VARIANTS[name]}
    peer, optimizer = peers.make_peer("optax", params, **variant), Adafactor(params, **variant)
    for step in range(STEPS):
        grads = hard_grads(SHAPES, dtype, step)
        step_with(optimizer, grads)
        peer.step(grads)
        assert_all_close(params, peer.params(), 3e-6, f"step {step + 1}")


@pytest.mark.parity
def test_state_is_that_of_optax() -> None:
    shapes = [*SHAPES, *LARGE[:2]]
    params = hard_params(shapes, F32)
    variant = {"learning_rate": 0.02, "min_dim_size_to_factor": 3, "momentum": 0.9}
    peer, optimizer = peers.make_peer("optax", params, **variant), Adafactor(params, **variant)
    for step in range(12):
        grads = hard_grads(shapes, F32, step)
        step_with(optimizer, grads)
        peer.step(grads)
    assert_all_close(params, peer.params(), 3e-6, "end")
    factored = next(state for state in peer._state if hasattr(state, "v_row"))
    assert optimizer.param_groups[0]["step"] == int(factored.count) == 12
    for i, param in enumerate(params):
        theirs = {key: getattr(factored, key)[i] for key in ("v_row", "v_col", "v")}
        theirs["ema"] = next(state.ema for state in peer._state if hasattr(state, "ema"))[i]
        state = optimizer.state[param]
        for key, value in theirs.items():
            if key in state:
                assert_close(state[key], torch.tensor(value.tolist()), 3e-6, f"{key} of #{i}")
            else:
                assert value.shape == (1,), "optax' dummy for what it does not keep"


@pytest.mark.parity
def test_mask_is_that_of_optax() -> None:
    params = hard_params()
    variant = {**SMALL, "weight_decay_rate": 0.05, "dtype_momentum": F64}
    peer = peers.make_peer("optax", params, **variant, weight_decay_mask=MASK)
    place = {id(p): i for i, p in enumerate(params)}
    optimizer = Adafactor(params, **variant, weight_decay_mask=lambda _, p: MASK[place[id(p)]])
    for step in range(STEPS):
        grads = hard_grads(SHAPES, F64, step)
        step_with(optimizer, grads)
        peer.step(grads)
    assert_all_close(params, peer.params(), 3e-6, "end")


@pytest.mark.parity
def test_weight_decay_schedule_is_that_of_optax() -> None:
    params = hard_params()
    variant = {**SMALL, "weight_decay_rate": halving, "dtype_momentum": F64}
    peer, optimizer = peers.make_peer("optax", params, **variant), Adafactor(params, **variant)
    for step in range(STEPS):
        grads = hard_grads(SHAPES, F64, step)
        step_with(optimizer, grads)
        peer.step(grads)
        assert_all_close(params, peer.params(), 3e-6, f"step {step + 1}")


@pytest.mark.parametrize("named", [True, False])
def test_mask_is_a_function_of_name_and_parameter(named: bool) -> None:
    bias = torch.nn.Parameter(torch.ones(2, dtype=F64))
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=F64))
    seen = []

    def mask(name: str | None, param: Tensor) -> bool:
        seen.append((name, param is bias))
        return param.ndim > 1

    params = [("bias", bias), ("weight", weight)] if named else [bias, weight]
    optimizer = Adafactor(params, 0.0, weight_decay_rate=0.1, weight_decay_mask=mask)
    optimizer.param_groups[0]["lr"] = 1e-30  # no step to speak of; 0 would be no step at all
    step_with(optimizer, [torch.ones(2), torch.ones(2, 2)])
    assert set(seen) == {("bias" if named else None, True), ("weight" if named else None, False)}
    assert bias[0].item() == 1.0
    assert weight[0, 0].item() == pytest.approx(0.9)


@pytest.mark.parametrize(("mask", "expected"), [(None, 0.9), (True, 0.9), (False, 1.0)])
def test_mask_of_a_group(mask: bool | None, expected: float) -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = Adafactor([{"params": [param], "weight_decay_mask": mask}], 1e-30)
    optimizer.param_groups[0]["weight_decay_rate"] = 0.1
    step_with(optimizer, [torch.ones(2)])
    assert param[0].item() == pytest.approx(expected)


# --- T5X' own test values ------------------------------------------------------------------------


def after_one_golden_step(
    state: dict[str, Tensor], **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """ones(3, 2) at step 2, learning rate 0.1, gradient ones, from a given state."""
    param = torch.nn.Parameter(torch.ones(3, 2, dtype=F64))
    optimizer = Adafactor([param], 0.1, dtype_momentum=F64, **kwargs)
    loaded = optimizer.state_dict()
    loaded["state"] = {0: state}
    loaded["param_groups"][0]["step"] = torch.tensor(1.0)
    optimizer.load_state_dict(loaded)
    step_with(optimizer, [torch.ones(3, 2)])
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize(
    ("max_grad_norm", "row", "col"),
    [(None, 0.9574349, 0.6169143), (1.0, 0.478811, 0.13829)],
    ids=["plain", "global_norm_clipped"],
)
def test_t5x_golden_factored(max_grad_norm: float | None, row: float, col: float) -> None:
    param, state = after_one_golden_step(
        {"v_row": torch.full((2,), 0.9, dtype=F64), "v_col": torch.full((3,), 0.1, dtype=F64)},
        min_dim_size_to_factor=0,
        max_grad_norm=max_grad_norm,
    )
    torch.testing.assert_close(param, torch.full((3, 2), 0.9, dtype=F64), rtol=1e-6, atol=0)
    # torch's norm clipping, which max_grad_norm is, adds 1e-6 to the norm; T5X adds nothing.
    for key, value in (("v_row", [row] * 2), ("v_col", [col] * 3)):
        torch.testing.assert_close(state[key], torch.tensor(value, dtype=F64), rtol=3e-6, atol=0)


def test_t5x_golden_unfactored_with_momentum() -> None:
    param, state = after_one_golden_step(
        {"v": torch.full((3, 2), 0.5, dtype=F64), "ema": torch.zeros(3, 2, dtype=F64)},
        min_dim_size_to_factor=32,
        momentum=0.0,
    )
    full = torch.ones(3, 2, dtype=F64)
    torch.testing.assert_close(param, 0.9 * full, rtol=1e-6, atol=0)
    torch.testing.assert_close(state["v"], 0.787174 * full, rtol=1e-6, atol=0)
    torch.testing.assert_close(state["ema"], 0.1 * full, rtol=1e-6, atol=0)


# --- what differs from optax, on purpose ---------------------------------------------------------


def test_decay_offset_gives_no_nan() -> None:
    # optax issue 1791: 0 to a negative power at t = offset, and a negative base before it.
    variant = {**SMALL, "decay_offset": 5}
    params = hard_params()
    optimizer, judge = make(params, variant, F64), Oracle(knobs(variant, F64), params)
    for step in range(STEPS):
        grads = hard_grads(SHAPES, F64, step)
        step_with(optimizer, grads)
        judge.step(grads)
        assert_all_close(params, judge.params, 1e-12, f"step {step + 1}")


@pytest.mark.parity
def test_momentum_in_bfloat16() -> None:
    # A value is rounded once when it is stored: 2^-9 of it. optax steps with what it had before
    # that, we with what is stored; both average what is stored. So the buffers are apart by e with
    # e <= momentum e + 2 * 2^-9 m, the steps by e + 2^-9 m, and m is at most alpha, for |u|'s RMS
    # is clipped to 1 and |u| <= sqrt(numel).
    lr, momentum, steps = 0.01, 0.5, 12
    params = hard_params(dtype=F32)
    before = clone_params(params)
    variant = {"learning_rate": lr, "min_dim_size_to_factor": 2, "momentum": momentum}
    variant |= {"dtype_momentum": BF16}
    peer, optimizer = peers.make_peer("optax", params, **variant), Adafactor(params, **variant)
    for step in range(steps):
        grads = hard_grads(SHAPES, F32, step)
        step_with(optimizer, grads)
        peer.step(grads)
    for p, q, start in zip(params, peer.params(), before, strict=True):
        assert optimizer.state[p]["ema"].dtype is BF16
        largest = lr * 1.5 * start.square().mean().sqrt().item() * math.sqrt(start.numel())
        bound = steps * 2**-9 * (2 / (1 - momentum) + 1) * largest
        difference = (p - q).abs().max().item()
        assert difference <= bound
        assert (p - start).abs().max().item() > 10 * difference, "the bound says something"


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("kwargs", [{}, {"eps": 0.0}])
def test_a_zero_gradient_moves_nothing(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params = hard_params(dtype=dtype)
    before = clone_params(params)
    optimizer = Adafactor(params, 0.01, min_dim_size_to_factor=0, momentum=0.9, **kwargs)
    for _ in range(3):
        step_with(optimizer, [torch.zeros_like(p) for p in params])
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    step_with(optimizer, hard_grads(SHAPES, dtype, 0))
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_parameters_have_float32_moments(dtype: torch.dtype) -> None:
    params = hard_params(dtype=dtype)
    optimizer = Adafactor(params, min_dim_size_to_factor=0, momentum=0.9)
    step_with(optimizer, hard_grads(SHAPES, dtype, 0))
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {F32}


# --- step count, learning rate -------------------------------------------------------------------


def test_steps_are_counted_globally() -> None:
    params = hard_params()
    groups = [{"params": params[::2]}, {"params": params[1::2], "learning_rate": 0.01}]
    optimizer = Adafactor(groups, 0.01, 0)
    judge = Oracle(knobs({"learning_rate": 0.01, "min_dim_size_to_factor": 0}, F64), params)
    for step in range(STEPS):
        grads = [
            None if (step + i) % 3 == 1 else g for i, g in enumerate(hard_grads(SHAPES, F64, step))
        ]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        judge.step(grads)
    assert_all_close(params, judge.params, 1e-12, "end")
    assert {int(group["step"]) for group in optimizer.param_groups} == {STEPS}
    assert all("step" not in state for state in optimizer.state.values())


def test_schedule_counts_from_zero() -> None:
    counts = []

    def schedule(count: int) -> float:
        counts.append(count)
        return 0.1

    optimizer = Adafactor([torch.nn.Parameter(torch.ones(2))], schedule)
    for _ in range(3):
        step_with(optimizer, [torch.ones(2)])
    assert counts == [0, 1, 2]
    assert all(type(count) is int for count in counts)


def test_torch_schedulers_find_the_learning_rate() -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = Adafactor([param], 0.5, multiply_by_parameter_scale=False)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    distances = []
    for _ in range(3):
        before = param.detach().clone()
        step_with(optimizer, [torch.ones(4)])
        scheduler.step()
        distances.append((before - param.detach())[0].item())
    assert distances == pytest.approx([0.5, 0.25, 0.125])


# --- arguments -----------------------------------------------------------------------------------

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr": ({"learning_rate": -1.0}, ValueError, "learning_rate should be >= 0 but is: -1.0"),
    "lr_nan": ({"learning_rate": math.nan}, ValueError, "learning_rate should be >= 0"),
    "lr_text": ({"learning_rate": "1"}, TypeError, "learning_rate must be a number"),
    "lr_tensor": ({"learning_rate": torch.ones(2)}, ValueError, "1-element"),
    "min_dim": ({"min_dim_size_to_factor": -1}, ValueError, "min_dim_size_to_factor should be"),
    "decay_rate": ({"decay_rate": -0.8}, ValueError, "decay_rate should be >= 0"),
    "eps_none": ({"eps": None}, TypeError, "eps must be a number, got None"),
    "decay_offset": ({"decay_offset": "3"}, TypeError, "decay_offset must be a number"),
    "clipping": ({"clipping_threshold": 0.0}, ValueError, "clipping_threshold should be > 0"),
    "momentum": ({"momentum": 1.1}, ValueError, r"momentum should be in \[0, 1\] or None"),
    "dtype": ({"dtype_momentum": torch.int32}, TypeError, "dtype_momentum should be a floating"),
    "dtype_text": ({"dtype_momentum": "float32"}, TypeError, "dtype_momentum should be"),
    "weight_decay": ({"weight_decay_rate": -0.1}, ValueError, "weight_decay_rate should be >= 0"),
    "eps": ({"eps": -1.0}, ValueError, "eps should be >= 0"),
    "mask": ({"weight_decay_mask": [True]}, TypeError, "weight_decay_mask should be None, a bool"),
    "unknown": ({"beta1": 0.9}, TypeError, "unexpected keyword argument 'beta1'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_argument_errors(name: str) -> None:
    kwargs, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        Adafactor(hard_params(), **kwargs)
    if name != "unknown":
        with pytest.raises(error, match=message):
            Adafactor([{"params": hard_params(), **kwargs}])


def test_a_group_has_one_learning_rate() -> None:
    group = {"params": hard_params(), "lr": 0.1, "learning_rate": 0.1}
    with pytest.raises(ValueError, match="both lr and learning_rate"):
        Adafactor([group])


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay_rate"])
def test_a_function_out_of_range_touches_nothing(argument: str) -> None:
    params = hard_params()
    optimizer = Adafactor(params, **{argument: lambda count: 0.1 if count < 2 else math.nan})
    for step in range(2):
        step_with(optimizer, hard_grads(SHAPES, F64, step))
    with (
        assert_untouched(optimizer),
        pytest.raises(ValueError, match=f"{argument} returned nan for step 2"),
    ):
        optimizer.step()


@pytest.mark.parametrize("argument", ["learning_rate", "weight_decay_rate"])
def test_a_function_needs_the_counter_on_the_host(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is a Python function of the step"):
        step_with(
            Adafactor(hard_params(), **{argument: halving}, capturable=True),
            hard_grads(SHAPES, F64, 0),
        )


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_resuming_is_bit_exact(dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    variant = {
        **{"learning_rate": halving, "min_dim_size_to_factor": 3, "momentum": 0.9},
        **{"weight_decay_rate": halving, "weight_decay_mask": lambda _, p: p.ndim > 1},
        "dtype_momentum": momentum_dtype,
    }
    params = hard_params(dtype=dtype)
    optimizer = Adafactor(params, **variant)
    for step in range(5):
        step_with(optimizer, hard_grads(SHAPES, dtype, step))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = Adafactor(clone_params(params), **variant)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(5, 9):
        for each in (optimizer, twin):
            step_with(each, hard_grads(SHAPES, dtype, step))
    assert_same_optimizers(optimizer, twin)


def test_a_copy_goes_on() -> None:
    params = hard_params()
    optimizer = Adafactor([{"params": params[:4]}, {"params": params[4:]}], 0.01, momentum=0.9)
    step_with(optimizer, hard_grads(SHAPES, F64, 0))
    twin = copy.deepcopy(optimizer)
    for step in range(1, 4):
        for each in (optimizer, twin):
            step_with(each, hard_grads(SHAPES, F64, step))
    assert_same_optimizers(optimizer, twin)
