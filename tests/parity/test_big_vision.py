"""The big_vision dialect against timm's AdafactorBigVision and against the oracle."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.dialects.big_vision import Adafactor
from tests import peers
from tests.oracle import Oracle, big_vision_knobs
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
    assert_state_is,
    hard_grads,
    hard_params,
    step_with,
)
from tests.stepping import (
    assert_close_optimizers,
    assert_same_optimizers,
    clone_params,
    same_bits,
)

# Above the default size: convolutions, equal dimensions, tall and wide, one just too short.
SHAPES_BV = [*SHAPES, (20, 17, 3, 3), (3, 3, 20, 33), (16, 2, 16), (40, 17), (15, 40)]
SMALL: dict[str, Any] = {"lr": 0.01, "min_dim_size_to_factor": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.01},
    "factored": {"lr": 0.01, "min_dim_size_to_factor": 0},
    "min_dim": {"lr": 0.01, "min_dim_size_to_factor": 5},
    "no_momentum": {**SMALL, "momentum": None},
    "momentum": {**SMALL, "momentum": 0.5},
    "clipping": {**SMALL, "clipping_threshold": 0.8},
    "decay_offset": {**SMALL, "decay_rate": 0.6, "decay_offset": 4},
    "beta2_cap": {**SMALL, "beta2_cap": 0.7},
    "eps": {**SMALL, "eps": 1e-4},
    "weight_decay": {**SMALL, "weight_decay": 0.5},
    "weight_decay_unscaled": {**SMALL, "weight_decay": 0.01, "unscaled_wd": True},
}
CORRECTED: dict[str, dict[str, Any]] = {
    "scaled": {**SMALL, "weight_decay": 0.5, "corrected_weight_decay": True},
    "unscaled": {
        **{**SMALL, "weight_decay": 0.01, "corrected_weight_decay": True},
        "unscaled_wd": True,
    },
}


def params_for(name: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """By default lr is 1: a parameter near zero would pass it, and its last digits with it."""
    return hard_params(SHAPES_BV, dtype, away=20.0 if name == "defaults" else 0.5)


def make(params: Any, variant: dict[str, Any], dtype: torch.dtype) -> Adafactor:
    return Adafactor(params, **{"momentum_dtype": dtype, **variant})


def make_peer(params: Any, variant: dict[str, Any], dtype: torch.dtype) -> Any:
    return peers.make_peer("big_vision", params, **{"momentum_dtype": dtype, **variant})


def make_oracle(params: Any, variant: dict[str, Any], dtype: torch.dtype) -> Oracle:
    return Oracle(big_vision_knobs(**{"momentum_dtype": dtype, **variant}), params)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_follows_the_oracle(name: str, dtype: torch.dtype) -> None:
    params = params_for(name, dtype)
    optimizer = make(params, VARIANTS[name], dtype)
    judge = make_oracle(params, VARIANTS[name], dtype)
    for step in range(STEPS):
        grads = hard_grads(SHAPES_BV, dtype, step)
        step_with(optimizer, grads)
        judge.step(grads)
        assert_all_close(params, judge.params, TOLERANCES[dtype], f"step {step + 1}")
    states = [optimizer.state[p] for p in params]
    assert_state_is(judge, states, KEPT["big_vision"], TOLERANCES[dtype])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", VARIANTS)
def test_follows_timm(name: str, dtype: torch.dtype) -> None:
    params = params_for(name, dtype)
    peer = make_peer(params, VARIANTS[name], dtype)
    optimizer = make(params, VARIANTS[name], dtype)
    for step in range(STEPS):
        # None now and then: timm counts the steps of each parameter.
        grads = [
            None if (step + i) % 5 == 4 else g
            for i, g in enumerate(hard_grads(SHAPES_BV, dtype, step))
        ]
        step_with(optimizer, grads)
        peer.step(grads)
        assert_all_close(params, peer.params(), TOLERANCES[dtype], f"step {step + 1}")
    assert_close_optimizers(optimizer, peer.optimizer, TOLERANCES[dtype])


@pytest.mark.parity
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", CORRECTED)
def test_corrected_weight_decay_is_that_of_timm(name: str, tensor_lr: bool) -> None:
    params = hard_params(SHAPES_BV)
    variant = dict(CORRECTED[name])
    peer = make_peer(params, variant, F64)
    if tensor_lr:
        variant["lr"] = torch.tensor(variant["lr"], dtype=F64)
    optimizer = make(params, variant, F64)
    for step in range(STEPS):
        grads = hard_grads(SHAPES_BV, F64, step)
        for each in (optimizer, peer.optimizer):
            lr = 0.01 * (1 - step / STEPS)
            for group in each.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        step_with(optimizer, grads)
        peer.step(grads)
        assert_all_close(params, peer.params(), 1e-12, f"step {step + 1}")
    assert optimizer.param_groups[0]["max_lr_snapshot"] == 0.01


# --- the default momentum buffer -----------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("momentum_dtype", [BF16, F16, "bfloat16", "float16"])
def test_low_precision_momentum(momentum_dtype: Any) -> None:
    # With unit roundoff h, a stored value is wrong by h of it. timm rounds the incoming update,
    # then the average; we only the average. Where |u| <= U, so that |m| <= U, the buffers are
    # apart by e <= momentum e + (1 - momentum) h U + 2 h U, and the parameters by lr e per step.
    lr, momentum, steps = 0.01, 0.8, 12
    unit = 2**-9 if momentum_dtype in (BF16, "bfloat16") else 2**-11
    params = hard_params(SHAPES_BV, F32)
    before = clone_params(params)
    variant = {"lr": lr, "momentum": momentum, "momentum_dtype": momentum_dtype}
    optimizer, peer = Adafactor(params, **variant), make_peer(params, variant, F32)
    bare = clone_params(params)
    updates = Adafactor(bare, lr=1.0, momentum=None)  # u itself, from zero
    largest = [0.0] * len(params)
    for step in range(steps):
        grads = hard_grads(SHAPES_BV, F32, step)
        step_with(optimizer, grads)
        peer.step(grads)
        for p in bare:
            p.detach().zero_()
        step_with(updates, grads)
        largest = [
            max(x, p.detach().abs().max().item()) for x, p in zip(largest, bare, strict=True)
        ]
    for p, q, start, update in zip(params, peer.params(), before, largest, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype in (BF16, F16)
        apart = unit * update * (1 + 2 / (1 - momentum))
        rounding = 2**-23 * start.abs().max().item()
        difference = (p - q).abs().max().item()
        assert difference <= steps * (lr * apart + rounding)
        assert (p - start).abs().max().item() > 10 * difference, "the bound says something"


def test_the_step_takes_what_the_buffer_holds() -> None:
    param = torch.nn.Parameter(torch.zeros(40, 17, dtype=F32))
    optimizer = Adafactor([param], lr=1.0)
    [grad] = hard_grads([(40, 17)], F32, 0)
    step_with(optimizer, [grad])
    assert same_bits(param, -optimizer.state[param]["exp_avg"].float())


# --- checkpoints ---------------------------------------------------------------------------------


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict that has been through a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parity
@pytest.mark.parametrize("to_timm", [False, True])
@pytest.mark.parametrize("name", ["defaults", "no_momentum", "weight_decay", "clipping"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_checkpoints_pass_both_ways(name: str, to_timm: bool, dtype: torch.dtype) -> None:
    params = params_for(name, dtype)
    peer = make_peer(params, VARIANTS[name], dtype)
    optimizer = make(params, VARIANTS[name], dtype)
    for step in range(6):
        grads = hard_grads(SHAPES_BV, dtype, step)
        step_with(optimizer, grads)
        peer.step(grads)

    source = optimizer if to_timm else peer.optimizer
    copies = clone_params(source.param_groups[0]["params"])
    # Other numbers, so that those of the checkpoint are seen to be taken.
    kwargs = {"lr": 0.5, "momentum_dtype": dtype, "momentum": VARIANTS[name].get("momentum", 0.9)}
    other = type(peer.optimizer) if to_timm else Adafactor
    resumed = other(copies, **kwargs)
    resumed.load_state_dict(saved(source))
    for step in range(6, STEPS):
        grads = hard_grads(SHAPES_BV, dtype, step)
        step_with(resumed, grads)
        step_with(source, grads)
        source_params = source.param_groups[0]["params"]
        assert_all_close(copies, source_params, TOLERANCES[dtype], f"step {step + 1}")
    if not to_timm:
        assert_close_optimizers(resumed, source, TOLERANCES[dtype])


@pytest.mark.parity
def test_timm_gets_the_momentum_buffer_exactly() -> None:
    params = hard_params(SHAPES_BV, F32)
    optimizer = Adafactor(params)
    for step in range(3):
        step_with(optimizer, hard_grads(SHAPES_BV, F32, step))
    peer = make_peer(params, {"momentum_dtype": BF16}, F32).optimizer
    peer.load_state_dict(saved(optimizer))
    for p, q in zip(params, peer.param_groups[0]["params"], strict=True):
        assert set(optimizer.state[p]) == set(peer.state[q])
        for key, value in optimizer.state[p].items():
            assert same_bits(value, peer.state[q][key]), key


@pytest.mark.parametrize("momentum_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_resuming_is_bit_exact(dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    params = hard_params(SHAPES_BV, dtype)
    optimizer = make(params, VARIANTS["weight_decay"], momentum_dtype)
    for step in range(5):
        step_with(optimizer, hard_grads(SHAPES_BV, dtype, step))
    twin = Adafactor(clone_params(params), momentum_dtype=momentum_dtype)
    twin.load_state_dict(saved(optimizer))
    for step in range(5, 9):
        for each in (optimizer, twin):
            step_with(each, hard_grads(SHAPES_BV, dtype, step))
    assert_same_optimizers(optimizer, twin)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_parameters_have_float32_moments(dtype: torch.dtype) -> None:
    params = hard_params(SHAPES_BV, dtype)
    optimizer = Adafactor(params)
    step_with(optimizer, hard_grads(SHAPES_BV, dtype, 0))
    for state in optimizer.state.values():
        assert {key: value.dtype for key, value in state.items() if key != "exp_avg"} == {
            key: F32 for key in state if key != "exp_avg"
        }
        assert state["exp_avg"].dtype is BF16


# --- bugs of timm before 1.0.31, and of float16 there --------------------------------------------


def one_update(
    grad: Tensor, dtype: torch.dtype = F64, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """u of a first step: from zero, with lr 1 and no momentum."""
    param = torch.nn.Parameter(torch.zeros_like(grad, dtype=dtype))
    optimizer = Adafactor([param], momentum=None, **kwargs)
    step_with(optimizer, [grad])
    return -param.detach().double(), optimizer.state[param]


def test_tall_matrices_have_a_row_factor() -> None:
    # timm issue 2749: rows scaled by 1 to 4 came out scaled, for (n > m) only.
    scales = torch.arange(1, 5, dtype=F64).repeat(10)
    for shape in ((40, 17), (17, 40)):
        grad = torch.ones(shape, dtype=F64)
        tall = grad.shape[0] == 40
        grad = grad * (scales[:, None] if tall else scales[None, :])
        update, _ = one_update(grad)
        torch.testing.assert_close(update, torch.ones(shape, dtype=F64))


@pytest.mark.parametrize(("threshold", "expected"), [(0.25, 0.25), (1.0, 1.0), (4.0, 1.0)])
def test_clipping_only_shrinks(threshold: float, expected: float) -> None:
    update, _ = one_update(torch.ones(6, dtype=F64), clipping_threshold=threshold)
    torch.testing.assert_close(update, torch.full((6,), expected, dtype=F64))


def test_eps_does_not_depend_on_the_neighbours() -> None:
    params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (F16, F32, BF16, F64)]
    optimizer = Adafactor(params)
    step_with(optimizer, [torch.zeros(4)] * 4)
    eps = [optimizer.state[p]["exp_avg_sq"][0].item() for p in params]
    assert eps == pytest.approx([1e-30] * 4)


def test_decay_offset_is_honoured() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=F64)) for _ in range(2)]
    optimizers = [Adafactor([p], decay_offset=o) for p, o in zip(params, (0, 2), strict=True)]
    for step in range(4):
        for optimizer in optimizers:
            step_with(optimizer, [torch.full((3,), float(step))])
    var = [o.state[p]["exp_avg_sq"][0].item() for o, p in zip(optimizers, params, strict=True)]
    # Beta is 0 up to t = 3, and 1 - 2^-0.8 at t = 4.
    assert var[1] == pytest.approx(4.0 * (1 - 2**-0.8) + 9.0 * 2**-0.8)
    assert abs(var[0] - var[1]) > 0.1


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_small_float16_gradients_are_normalised(scale: float) -> None:
    # timm squares in float16, where 1e-6² is 0, and adds 1e-7.
    update, _ = one_update(torch.full((4,), scale, dtype=F64), F16)
    torch.testing.assert_close(update, torch.ones(4, dtype=F64), rtol=2**-9, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("kwargs", [{}, {"eps": 0.0, "clipping_threshold": 1.0}])
def test_a_zero_gradient_moves_nothing(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params = hard_params(SHAPES_BV, dtype)
    before = clone_params(params)
    optimizer = Adafactor(params, lr=0.01, **kwargs)
    for _ in range(3):
        step_with(optimizer, [torch.zeros_like(p) for p in params])
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    step_with(optimizer, hard_grads(SHAPES_BV, dtype, 0))
    assert all(bool(p.isfinite().all()) for p in params)


# --- arguments -----------------------------------------------------------------------------------

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "lr_nan": ({"lr": math.nan}, ValueError, "Invalid learning rate"),
    "lr_text": ({"lr": "1"}, TypeError, "lr must be a number"),
    "lr_tensor": ({"lr": torch.ones(2)}, ValueError, "must be a scalar"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay: -1.0"),
    "min_dim": ({"min_dim_size_to_factor": -1}, ValueError, "Invalid min_dim_size_to_factor"),
    "decay_rate": ({"decay_rate": -0.8}, ValueError, "Invalid decay_rate"),
    "lr_none": ({"lr": None}, TypeError, "lr must be a number, got None"),
    "beta2_cap": ({"beta2_cap": 1.5}, ValueError, r"beta2_cap should be in \[0, 1\]"),
    "momentum": ({"momentum": -0.1}, ValueError, r"momentum should be in \[0, 1\]"),
    "eps": ({"eps": -1.0}, ValueError, "Invalid eps"),
    "clipping": ({"clipping_threshold": 0.0}, ValueError, "clipping_threshold should be > 0"),
    "dtype": ({"momentum_dtype": "int16"}, ValueError, "momentum_dtype should be 'float32'"),
    "dtype_unknown": ({"momentum_dtype": "fp8"}, ValueError, "momentum_dtype should be"),
    "caution": ({"caution": True}, ValueError, "caution=True is not available"),
    "max_lr": ({"lr": 0.0, "corrected_weight_decay": True}, ValueError, "positive max lr"),
    "unknown": ({"betas": (0.9,)}, TypeError, "unexpected keyword argument 'betas'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_argument_errors(name: str) -> None:
    kwargs, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        Adafactor(hard_params(), **kwargs)
    if name not in ("unknown", "max_lr"):
        with pytest.raises(error, match=message):
            Adafactor([{"params": hard_params(), **kwargs}])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lr", "weight_decay", "lr_tensor", "max_lr"])
def test_timm_says_the_same(name: str) -> None:
    kwargs, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        peers.make_peer("big_vision", hard_params(), **kwargs)


@pytest.mark.parity
def test_groups_have_the_keys_of_timm() -> None:
    theirs = make_peer(hard_params(), {}, BF16).optimizer.param_groups[0]
    ours = Adafactor(hard_params()).param_groups[0]
    assert {key: ours[key] for key in theirs if key != "params"} == {
        key: value for key, value in theirs.items() if key != "params"
    }


def test_a_copy_goes_on() -> None:
    optimizer = Adafactor(hard_params(SHAPES_BV), lr=0.01)
    step_with(optimizer, hard_grads(SHAPES_BV, F64, 0))
    twin = copy.deepcopy(optimizer)
    for step in range(1, 4):
        for each in (optimizer, twin):
            step_with(each, hard_grads(SHAPES_BV, F64, step))
    assert_same_optimizers(optimizer, twin)
