"""fused_adafactor.Adafactor against torch.optim.Adafactor, and without torch's bugs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import Adafactor
from tests import oracle, stepping
from tests.stepping import LAYOUTS, TOLERANCES

pytestmark = pytest.mark.parity

STEPS = 14
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
FOREACH = pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "large_lr_is_capped": {"lr": 0.9},
    "zero_lr": {"lr": 0.0, "weight_decay": 0.1},
    "tensor_lr": {"lr": torch.tensor(0.03, dtype=torch.float64)},  # torch rounds to its dtype
    "weight_decay": {"lr": 0.05, "weight_decay": 0.1},
    "clip_threshold": {"d": 1.5},
    "beta2_decay": {"beta2_decay": -0.5},
    "no_memory": {"beta2_decay": 0.0},
    "maximize": {"maximize": True, "weight_decay": 0.01},
    "eps_of_the_paper": {"eps": (1e-30, 1e-3)},
    "coarse_eps": {"eps": (1e-2, 0.5)},
    "zero_eps2": {"eps": (None, 0.0)},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(params: list[torch.nn.Parameter], foreach: bool, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's over copies of the same parameters."""
    ours = Adafactor(stepping.clone_params(params), **copy.deepcopy(options))
    theirs = torch.optim.Adafactor(
        stepping.clone_params(params), foreach=foreach, **copy.deepcopy(options)
    )
    return ours, theirs


def step_both(ours: Any, theirs: Any, steps: range, scale: float = 1.0) -> None:
    for optimizer in (ours, theirs):
        stepping.take_steps(optimizer, len(steps), steps.start, scale)


# --- the same numbers ----------------------------------------------------------------------------


@DTYPES
@FOREACH
@ALL_OPTIONS
def test_parameters_and_state_agree(dtype, foreach, options):
    ours, theirs = pair(stepping.make_params(dtype=dtype), foreach, **options)
    for start in range(0, STEPS, 2):
        step_both(ours, theirs, range(start, start + 2))
        stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


@DTYPES
@FOREACH
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e4])
def test_gradients_of_any_size_agree(dtype, foreach, scale):
    ours, theirs = pair(stepping.make_params(dtype=dtype), foreach)
    step_both(ours, theirs, range(STEPS), scale)
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


@FOREACH
def test_steps_without_a_gradient_count_per_parameter(foreach):
    ours, theirs = pair(stepping.make_params(dtype=torch.float64), foreach)
    for step in range(STEPS):
        for optimizer in (ours, theirs):
            params = stepping.params_of(optimizer)
            grads = stepping.grad_values(params, step)
            for index, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if (step + index) % 3 == 0 else g
            optimizer.step()
    stepping.assert_close_optimizers(ours, theirs, 1e-12)
    assert len({float(s["step"]) for s in ours.state.values()}) > 1


@DTYPES
@FOREACH
def test_stacked_experts_of_very_different_gradients(dtype, foreach):
    """The clamp by eps1 acts on the small slice only, and one RMS clips both."""
    ours, theirs = pair(stepping.make_params([(3, 8, 6), (2, 2, 5, 7)], dtype), foreach)
    for step in range(STEPS):
        for optimizer in (ours, theirs):
            params = stepping.params_of(optimizer)
            for p, g in zip(params, stepping.grad_values(params, step), strict=True):
                g[0] *= 1e-5
                p.grad = g
            optimizer.step()
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


@FOREACH
def test_groups_with_their_own_options(foreach):
    params = stepping.make_params([(6, 5), (7,), (4, 3, 5)], torch.float64)
    groups = [{"lr": 0.1}, {"weight_decay": 0.2}, {"eps": (1e-3, 1e-1), "d": 2.0}]
    built = []
    for cls, kwargs in ((Adafactor, {}), (torch.optim.Adafactor, {"foreach": foreach})):
        copies = stepping.clone_params(params)
        paired = [{**group, "params": [p]} for group, p in zip(groups, copies, strict=True)]
        built.append(cls(paired, lr=0.02, **kwargs))
    step_both(*built, range(STEPS))
    stepping.assert_close_optimizers(*built, 1e-12)


@DTYPES
@ALL_OPTIONS
def test_agrees_with_the_oracle(dtype, options):
    params = stepping.make_params(dtype=dtype)
    ours = Adafactor(params, **copy.deepcopy(options))
    judge = oracle.Oracle(oracle.torch_knobs(**options), params, dtype)
    for step in range(STEPS):
        judge.step(stepping.grad_values(params, step))
        stepping.take_steps(ours, 1, step)
    for p, expected, wanted in zip(params, judge.params, judge.state, strict=True):
        stepping.assert_close(p, expected, TOLERANCES[dtype], f"{tuple(p.shape)}")
        for key, theirs in (("row_var", "row_var"), ("col_var", "col_var"), ("variance", "var")):
            if key in ours.state[p]:
                mine = ours.state[p][key].reshape(wanted[theirs].shape)
                stepping.assert_close(mine, wanted[theirs], TOLERANCES[dtype], key)


# --- memory layouts ------------------------------------------------------------------------------


@DTYPES
@FOREACH
@pytest.mark.parametrize(("lay_param", "lay_grad"), LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layouts_agree(dtype, foreach, lay_param, lay_grad):
    shape = (4, 6, 3, 2)
    values = stepping.make_params([shape], dtype)[0].detach()
    ours, theirs = (torch.nn.Parameter(lay_param(values)) for _ in range(2))
    layout = (ours.stride(), ours.storage_offset(), ours.data_ptr())
    optimizers = Adafactor([ours]), torch.optim.Adafactor([theirs], foreach=foreach)
    for step in range(STEPS):
        for p in (ours, theirs):
            p.grad = lay_grad(stepping.grad_values([values], step)[0])
        for optimizer in optimizers:
            optimizer.step()
    stepping.assert_close_optimizers(*optimizers, TOLERANCES[dtype])
    assert (ours.stride(), ours.storage_offset(), ours.data_ptr()) == layout


# --- checkpoints ---------------------------------------------------------------------------------


@DTYPES
@FOREACH
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_checkpoint_of_torch_continues_in_ours(dtype, foreach, named):
    options = {"lr": 0.05, "weight_decay": 0.1}
    _, theirs = pair(stepping.make_params(dtype=dtype), foreach, **options)
    stepping.take_steps(theirs, 5)
    copies = stepping.clone_params(stepping.params_of(theirs))
    ours = Adafactor([(f"p{i}", p) for i, p in enumerate(copies)] if named else copies)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.05
    stepping.assert_close_optimizers(ours, theirs, 0.0)
    step_both(ours, theirs, range(5, 5 + STEPS))
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


@DTYPES
@FOREACH
def test_our_checkpoint_continues_in_torch(dtype, foreach):
    ours, _ = pair(stepping.make_params(dtype=dtype), foreach, lr=0.05, weight_decay=0.1)
    stepping.take_steps(ours, 5)
    copies = stepping.clone_params(stepping.params_of(ours))
    theirs = torch.optim.Adafactor(copies, foreach=foreach)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    stepping.assert_close_optimizers(theirs, ours, 0.0)
    step_both(ours, theirs, range(5, 5 + STEPS))
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


def test_state_keys_shapes_and_dtypes_are_torchs():
    ours, theirs = pair(stepping.make_params(), False)
    step_both(ours, theirs, range(1))
    for p, q in zip(*map(stepping.params_of, (ours, theirs)), strict=True):
        described = [
            {key: (value.shape, value.dtype, value.device) for key, value in o.state[x].items()}
            for o, x in ((ours, p), (theirs, q))
        ]
        assert described[0] == described[1]


def test_signature_and_defaults_are_torchs():
    ours, theirs = (cls([torch.ones(1)]).defaults for cls in (Adafactor, torch.optim.Adafactor))
    assert {key: ours[key] for key in theirs} == theirs


# --- what torch gets wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps1", [0.0, 1e-30, 1e-300])
@pytest.mark.parametrize("shape", [(6, 5), (7,), ()], ids=str)
def test_zero_rows_stay_finite_with_an_eps_whose_square_underflows(dtype, eps1, shape):
    params = stepping.make_params([shape], dtype)
    before = params[0].detach().clone()
    ours = Adafactor(params, eps=(eps1, 1e-3))
    for step in range(4):
        grad = stepping.grad_values(params, step)[0]
        if grad.dim() > 1:
            grad[2] = 0
            grad[:, 1] = 0
        elif grad.dim() == 1:
            grad[:3] = 0
        else:
            grad.zero_()
        params[0].grad = grad
        ours.step()
    moved = params[0].detach() != before
    assert params[0].isfinite().all()
    assert not moved[params[0].grad == 0].any()
    assert moved.any() or shape == ()


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_a_gradient_that_is_zero_from_the_start_changes_nothing(dtype):
    params = stepping.make_params(dtype=dtype)
    before = stepping.clone_params(params)
    ours = Adafactor(params, eps=(1e-30, 1e-3))
    stepping.take_steps(ours, 3, scale=0.0)
    for p, q in zip(params, before, strict=True):
        assert stepping.same_bits(p, q)


@FOREACH
def test_eps_none_is_each_parameters_own_whatever_its_neighbours(foreach):
    """Torch takes the first dtype for the group, or for foreach the first of another grouping."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    stepped: list[list[Tensor]] = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        params = [stepping.make_params([(2, 6, 5)], dtype)[0] for dtype in dtypes]
        ours = Adafactor([params[i] for i in order], foreach=foreach)
        for step in range(4):
            for p in params:
                p.grad = stepping.grad_values([p], step, 1e-4)[0]
            ours.step()
        stepped.append(params)
    alone = stepping.make_params([(2, 6, 5)], torch.float32)
    stepping.take_steps(Adafactor(alone), 4, scale=1e-4)
    for params in stepped:
        assert all(map(stepping.same_bits, params, stepped[0]))
        assert stepping.same_bits(params[1], alone[0])


@FOREACH
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 4), (0, 3, 4)], ids=str)
def test_tensors_without_elements_are_stepped(foreach, shape):
    params = stepping.make_params([shape, (6, 5)])
    before = params[1].detach().clone()
    ours = Adafactor(params, foreach=foreach, weight_decay=0.1)
    stepping.take_steps(ours, 3)
    assert float(ours.state[params[0]]["step"]) == 3
    assert params[1].isfinite().all()
    assert not torch.equal(params[1], before)
    assert all(not value.isnan().any() for value in ours.state[params[0]].values())


def test_large_float16_gradients_and_weights_stay_finite():
    """300² and the norm of 256 x 256 weights of 300 both leave float16's range."""
    p = torch.nn.Parameter(torch.full((256, 256), 300.0, dtype=torch.float16))
    p.grad = torch.full_like(p, 300.0)
    ours = Adafactor([p])
    ours.step()
    assert p.isfinite().all()
    assert p.max().item() == pytest.approx(297.0, abs=0.25)
    assert torch.allclose(ours.state[p]["row_var"], torch.tensor(9e4))


def test_copies_keep_what_a_step_on_an_accelerator_looks_up():
    ours = Adafactor(stepping.make_params([(6, 5)]))
    assert ours.param_groups[0]["capturable"] is False
    for other in (copy.deepcopy(ours), copy.copy(ours)):
        assert other._warned_capturable_if_run_uncaptured
        assert other.param_groups[0]["capturable"] is False


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_parameters_have_averages_that_do_not_stall(state_dtype):
    """Rounded to nearest, torch's choice, one that moves by less than 1/256 of itself stands.

    Rounded at random it is right in the mean, of a thousand rows. An error of a step is 0 in the
    mean and lies within one unit in the last place, 2**-7 here, so its deviation is half of that.
    """
    rows, steps, expected, t = 1024, 20, 1.0, 100_000
    p = torch.nn.Parameter(torch.ones(rows, 2, dtype=torch.bfloat16))
    ours = Adafactor([p], state_dtype=state_dtype)
    stepping.take_steps(ours, 1)
    ours.state[p]["row_var"].fill_(expected)
    ours.state[p]["step"].fill_(t)
    for _ in range(steps):
        p.grad = torch.full_like(p, 4.0)
        ours.step()
        t += 1
        change = t**-0.8 * (16.0 - expected)
        assert change < 2**-8  # half a unit: to nearest there would be none
        expected += change
    row_var = ours.state[p]["row_var"].double()
    assert expected > 1.02
    if state_dtype is torch.bfloat16:
        deviation = 2**-8 * (steps / rows) ** 0.5
        assert abs(row_var.mean().item() - expected) < 5 * deviation
        assert row_var.max() < 2  # where a unit would be larger
    else:
        assert row_var.flatten().tolist() == pytest.approx([expected] * rows, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "clamped_by_eps1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_the_oracle_up_to_the_rounding_of_the_parameter(dtype, scale):
    """No norm is rounded on the way: only the stored parameter is, so each step is off by half an
    ulp of it, and the oracle goes on from what was stored."""
    params = stepping.make_params(dtype=dtype)
    judge = oracle.Oracle(oracle.torch_knobs(lr=0.05, weight_decay=0.1), params, dtype)
    ours = Adafactor(params, lr=0.05, weight_decay=0.1)
    half_ulp = torch.finfo(dtype).eps / 2
    for step in range(STEPS):
        judge.step(stepping.grad_values(params, step, scale))
        stepping.take_steps(ours, 1, step, scale)
        for p, expected in zip(params, judge.params, strict=True):
            error = (p.double() - expected).abs()
            assert (error <= half_ulp * 1.001 * expected.abs() + 1e-7).all()
        judge.params = [p.detach().double() for p in params]
    for p, wanted in zip(params, judge.state, strict=True):
        for key, value in ours.state[p].items():
            if key in ("row_var", "col_var"):
                stepping.assert_close(value.reshape(wanted[key].shape), wanted[key], 3e-6, key)


def test_nothing_warns_where_torch_may():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepping.take_steps(Adafactor(stepping.make_params(), lr=torch.tensor(0.1)), 2)
