"""The first moment in bfloat16, and in blocks of 8 bits, in every dialect that has one."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch

from fused_adafactor.convert import convert_state_dict
from fused_adafactor.spec import TINY_ELEMENTS
from tests import stepping
from tests.blocks import lines_of, read_lines, round_lines, scales_of
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, DIALECTS, HF, KERAS, OPTAX, TORCH, Dialect
from tests.moments import (
    RULES,
    SHAPES,
    Twins,
    exp_avg_of,
    grads_for,
    laid_out,
    lies_along_columns,
    read,
    scale_of,
    unrounded,
    view_of,
)
from tests.stepping import params_of

pytestmark = pytest.mark.usefixtures("each_backend")

F32, F64, BF16, I8 = torch.float32, torch.float64, torch.bfloat16, torch.int8
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=str)
LAYOUTS = {"contiguous": stepping.contiguous, "transposed": stepping.transposed}
BOTH_DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def build(rule: str, dtype: torch.dtype = F32, layout: str = "contiguous", **extras: Any) -> Any:
    dialect, options = RULES[rule]
    return dialect(laid_out(SHAPES, dtype, LAYOUTS[layout]), **{**options, **extras})


def take_steps(optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        params = params_of(optimizer)
        for p, g in zip(params, grads_for(params, step), strict=True):
            p.grad = g
        optimizer.step()


# --- numbers -------------------------------------------------------------------------------------


@EVERY_RULE
@EVERY_DTYPE
@EVERY_LAYOUT
def test_what_is_stored_and_used_is_the_rounded_moment(rule, dtype, layout):
    """To the bit, by the oracle's rounding of what a twin has without it."""
    twins = Twins(rule, laid_out(SHAPES, dtype, LAYOUTS[layout]))
    for step in range(3):
        twins.step(grads_for(params_of(twins.ours), step))


@EVERY_RULE
@pytest.mark.parametrize("extras", [{"max_grad_norm": 0.5}, {"rounding": "kahan"}], ids=str)
def test_other_extras_leave_the_rounding_as_it_is(rule, extras):
    twins = Twins(rule, laid_out(SHAPES, BF16, stepping.contiguous), **extras)
    for step in range(2):
        twins.step(grads_for(params_of(twins.ours), step))


# Rules in which what is averaged does not depend on the parameter, and a constant beta1: the
# moments of two runs then differ by their roundings alone.
FREE: dict[str, tuple[Dialect, dict[str, Any], float]] = {
    "hf": (HF, {"beta1": 0.9, "scale_parameter": False}, 1.0),
    "adafactor_pytorch": (ADAFACTOR_PYTORCH, {"non_constant_decay": False, "ams_grad": False}, 0.0),
    "optax": (OPTAX, {"momentum": 0.9, "multiply_by_parameter_scale": False}, 1.0),
    "big_vision": (BIG_VISION, {"lr": 0.01}, 0.01),
}


@pytest.mark.parametrize("rule", FREE)
def test_a_run_stays_within_the_bound_of_the_exact_run(rule):
    """The bound of ``blocks.py`` after every step, and its sum for the parameters.

    By the largest of each block of the unrounded moments, which is that of the exact run and its
    own bound at most; 127 / 128 is what is left of 1 where that is solved for it.
    """
    dialect, options, used = FREE[rule]
    ours, exact = (
        dialect(laid_out(SHAPES, F64, stepping.contiguous), **options, **kept)
        for kept in ({"momentum_dtype": I8}, unrounded(dialect, F64))
    )
    errors: dict[int, Any] = {}
    for step in range(15):
        take_steps(ours, 1, step)
        take_steps(exact, 1, step)
        for n, (p, q) in enumerate(zip(params_of(ours), params_of(exact), strict=True)):
            where = view_of(ours, p), lies_along_columns(ours, p)
            moment = exp_avg_of(exact, q)
            lines = lines_of(moment, *where).abs()
            width = lines.shape[-1]
            padded = torch.nn.functional.pad(lines, (0, -width % 32)).unflatten(-1, (-1, 32))
            largest = padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[:, :width]
            before, moved = errors.get(n, (torch.zeros_like(largest), torch.zeros_like(largest)))
            # |E| <= beta1 |E before| + L / 128, and L <= the exact run's + what |E before| adds.
            spread = torch.nn.functional.pad(before, (0, -width % 32)).unflatten(-1, (-1, 32))
            spread = spread.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[:, :width]
            bound = 0.9 * before + (largest + 0.9 * spread) / 128
            error = (lines_of(read(ours, p) - moment, *where)).abs()
            assert (error <= bound * (1 + 1e-9) + 1e-300).all(), (step, tuple(p.shape))
            moved = moved + used * bound
            errors[n] = bound, moved
            if used:
                apart = lines_of((p - q).detach(), *where).abs()
                slack = 1e-12 * (1 + lines_of(q.detach(), *where).abs())
                assert (apart <= moved + slack).all(), (step, tuple(p.shape))
    assert any((p != q).any() for p, q in zip(*map(params_of, (ours, exact)), strict=True))


@pytest.mark.parametrize("rule", [r for r in RULES if r != "big_vision"])
@EVERY_DTYPE
def test_bfloat16_is_that_of_the_unrounded_moment(rule, dtype):
    ours = build(rule, dtype, momentum_dtype=BF16)
    exact = build(rule, dtype, **unrounded(RULES[rule][0], dtype))
    take_steps(ours, 1)
    take_steps(exact, 1)
    for p, q in zip(params_of(ours), params_of(exact), strict=True):
        value = exp_avg_of(exact, q)
        assert value.dtype is (F64 if dtype is F64 else F32)
        assert stepping.same_bits(exp_avg_of(ours, p), value.to(BF16))


def test_the_extra_wins_over_optax_own_argument():
    optimizer = build("optax", dtype_momentum=torch.float16, momentum_dtype=BF16)
    take_steps(optimizer, 1)
    assert exp_avg_of(optimizer, params_of(optimizer)[0]).dtype is BF16
    optimizer = build("optax", dtype_momentum=torch.float16)
    take_steps(optimizer, 1)
    assert exp_avg_of(optimizer, params_of(optimizer)[0]).dtype is torch.float16


def test_big_vision_takes_text_as_ever():
    optimizer = build("big_vision", momentum_dtype="int8")
    take_steps(optimizer, 1)
    assert exp_avg_of(optimizer, params_of(optimizer)[0]).dtype is I8


@EVERY_RULE
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_and_is_seen(rule, poison):
    """A block with NaN in it reads as NaN, in later steps too."""
    optimizer = build(rule, momentum_dtype=I8)
    take_steps(optimizer, 1)
    params = params_of(optimizer)
    for p, g in zip(params, grads_for(params, 1), strict=True):
        p.grad = g
    params[9].grad[3, 40] = poison
    optimizer.step()
    take_steps(optimizer, 1, 2)
    scale = scale_of(optimizer, params[9])
    assert (scale == 255).any()
    assert read(optimizer, params[9]).isnan().any()
    assert params[9].isnan().any()
    assert not any((scale_of(optimizer, p) == 255).any() for p in params if p is not params[9])


@EVERY_RULE
def test_a_skipped_step_leaves_it_as_it_is(rule):
    optimizer = build(rule, momentum_dtype=I8, nonfinite="skip")
    take_steps(optimizer, 2)
    for p in params_of(optimizer):
        p.grad = torch.full_like(p, math.nan)
    with stepping.assert_untouched(optimizer):
        optimizer.step()


@EVERY_RULE
def test_found_inf_leaves_it_as_it_is(rule):
    optimizer = build(rule, momentum_dtype=I8, fused=True)
    take_steps(optimizer, 2)
    optimizer.found_inf = torch.ones(())
    with stepping.assert_untouched(optimizer):
        optimizer.step()


# --- memory --------------------------------------------------------------------------------------


@EVERY_RULE
def test_bytes_of_an_element(rule):
    """One, and a 32nd of one, where lines are of whole blocks."""
    dialect, options = RULES[rule]
    shapes = [(64, 96), (3, 32, 64), (128,)]
    params = laid_out(shapes, F32, stepping.contiguous)
    optimizer = dialect(params, **options, momentum_dtype=I8)
    take_steps(optimizer, 1)
    for p in params:
        kept = (exp_avg_of(optimizer, p), scale_of(optimizer, p))
        assert sum(t.untyped_storage().nbytes() for t in kept) == p.numel() + p.numel() // 32


# Parameter, its rule, and how many scales lie where: one row after the other, or column.
PLACES = [
    ("hf", (20, 70), "contiguous", (20, 3), (3, 1)),
    ("hf", (20, 70), "transposed", (1, 70), (1, 1)),
    ("hf", (70, 20), "transposed", (3, 20), (1, 3)),
    ("hf", (2, 5, 20, 70), "contiguous", (2, 5, 20, 3), (300, 60, 3, 1)),
    ("hf", (2, 5, 70, 20), "transposed", (2, 5, 3, 20), (300, 60, 1, 3)),
    ("hf", (8, 8), "transposed", (8, 1), (1, 1)),  # tiny
    ("hf", (70,), "contiguous", (3,), (1,)),
    ("hf", (), "contiguous", (1,), (1,)),
    ("optax", (70, 40), "contiguous", (2, 70), (1, 2)),  # its rows are the shorter dimension
    ("optax", (40, 70), "contiguous", (40, 3), (3, 1)),
    ("adafactor_pytorch", (7, 5, 9), "contiguous", (7, 2), (2, 1)),
    ("unfactored", (20, 70), "transposed", (44,), (1,)),
]


@pytest.mark.parametrize(("rule", "shape", "layout", "wanted", "strides"), PLACES, ids=str)
def test_blocks_lie_along_the_lines_of_the_kernels(rule, shape, layout, wanted, strides):
    dialect, options = RULES[rule]
    (param,) = laid_out([shape], F32, LAYOUTS[layout])
    optimizer = dialect([param], **options, momentum_dtype=I8)
    take_steps(optimizer, 1)
    assert tuple(scale_of(optimizer, param).shape) == wanted
    assert scale_of(optimizer, param).stride() == strides
    assert math.prod(shape[-2:]) > TINY_ELEMENTS or not lies_along_columns(optimizer, param)


# --- checkpoints ---------------------------------------------------------------------------------


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EVERY_RULE
@BOTH_DTYPES
@EVERY_LAYOUT
@pytest.mark.parametrize("kept", [BF16, I8], ids=str)
def test_resume_is_exact(rule, dtype, layout, kept):
    """Into an optimizer that is built without the extra: it is in the loaded groups."""
    optimizer = build(rule, dtype, layout, momentum_dtype=kept)
    other = build(rule, dtype, layout)
    take_steps(optimizer, 3)
    with torch.no_grad():
        for p, q in zip(*map(params_of, (optimizer, other)), strict=True):
            q.copy_(p)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    stepping.assert_same_optimizers(other, optimizer)
    for each in (optimizer, other):
        take_steps(each, 3, 3)
    stepping.assert_same_optimizers(other, optimizer)


@EVERY_RULE
@EVERY_LAYOUT
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_as_the_original(rule, layout, how):
    optimizer = build(rule, F32, layout, momentum_dtype=I8)
    take_steps(optimizer, 2)
    other = how(optimizer)
    for each in (optimizer, other):
        take_steps(each, 2, 2)
    stepping.assert_same_optimizers(other, optimizer)


def without_the_extra(state_dict: Any) -> Any:
    """As a peer's checkpoint, whose groups know no extras."""
    groups = [
        {k: v for k, v in group.items() if k != "momentum_dtype"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@EVERY_RULE
@BOTH_DTYPES
@EVERY_LAYOUT
def test_a_float_moment_is_rounded_when_it_is_loaded(rule, dtype, layout):
    source = build(rule, dtype, layout, momentum_dtype=F32)
    optimizer = build(rule, dtype, layout, momentum_dtype=I8)
    take_steps(source, 2)
    saved = without_the_extra(source.state_dict())
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    stepping.assert_same_values(saved, before)
    for p, q in zip(*map(params_of, (optimizer, source)), strict=True):
        where = view_of(optimizer, p), lies_along_columns(optimizer, p)
        wanted, scale = round_lines(lines_of(exp_avg_of(source, q), *where))
        assert torch.equal(lines_of(exp_avg_of(optimizer, p), *where), wanted)
        assert torch.equal(scales_of(scale_of(optimizer, p), *where), scale)
    take_steps(optimizer, 1, 2)


@EVERY_RULE
@BOTH_DTYPES
@EVERY_LAYOUT
def test_blocks_become_numbers_when_they_are_loaded(rule, dtype, layout):
    source = build(rule, dtype, layout, momentum_dtype=I8)
    take_steps(source, 2)
    saved = source.state_dict()
    for group in saved["param_groups"]:
        group["momentum_dtype"] = F32
    optimizer = build(rule, dtype, layout)
    optimizer.load_state_dict(saved)
    for p, q in zip(*map(params_of, (optimizer, source)), strict=True):
        assert optimizer.layout.exp_avg_scale not in optimizer.state[p]
        assert exp_avg_of(optimizer, p).dtype is F32
        assert torch.equal(exp_avg_of(optimizer, p).double(), read(source, q))
    take_steps(optimizer, 1, 2)


@EVERY_RULE
@pytest.mark.parametrize("way", [list(LAYOUTS), list(LAYOUTS)[::-1]], ids="-to-".join)
def test_blocks_that_lie_the_other_way_round_are_rounded_once_more(rule, way):
    source, optimizer = (build(rule, F32, layout, momentum_dtype=I8) for layout in way)
    take_steps(source, 2)
    optimizer.load_state_dict(source.state_dict())
    turned = 0
    for p, q in zip(*map(params_of, (optimizer, source)), strict=True):
        where = view_of(optimizer, p), lies_along_columns(optimizer, p)
        turned += lies_along_columns(optimizer, p) != lies_along_columns(source, q)
        wanted, scale = round_lines(lines_of(read(source, q), *where))
        assert torch.equal(read_lines(wanted, scale), lines_of(read(optimizer, p), *where))
    assert turned > (0 if rule != "unfactored" else -1)
    take_steps(optimizer, 1, 2)


@EVERY_RULE
def test_a_poisoned_state_loads_as_it_is(rule):
    optimizer = build(rule, momentum_dtype=I8)
    take_steps(optimizer, 1)
    p = params_of(optimizer)[9]
    scale_of(optimizer, p).fill_(255)
    other = build(rule)
    other.load_state_dict(optimizer.state_dict())
    stepping.assert_same_values(
        dict(other.state[params_of(other)[9]]), dict(optimizer.state[p]), "state"
    )


def test_blocks_are_not_converted():
    optimizer = build("hf", momentum_dtype=I8)
    take_steps(optimizer, 1)
    with pytest.raises(ValueError, match=r"'exp_avg' of .* is in blocks of 8 bits.*Set mom"):
        convert_state_dict(optimizer.state_dict(), source="hf", target="optax")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "options"),
    [(TORCH, {}), (KERAS, {}), (HF, {}), (OPTAX, {}), (ADAFACTOR_PYTORCH, {"beta1": 0.0})],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16, I8], ids=str)
def test_a_dtype_for_a_moment_that_is_not_there(dialect, options, dtype):
    message = f"momentum_dtype={dtype} is for a first moment, but .* there is none: leave"
    params = stepping.make_params([(3,), (4,)])
    with pytest.raises(ValueError, match=message):
        dialect(params, **options, momentum_dtype=dtype)
    optimizer = dialect(params[:1], **options)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], "momentum_dtype": dtype})
    assert len(optimizer.param_groups) == 1


def test_a_group_may_have_a_moment_that_others_do_not_have():
    params = stepping.make_params([(3,), (4,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "beta1": 0.9, "momentum_dtype": I8}]
    optimizer = HF(groups)
    stepping.take_steps(optimizer, 1)
    assert "exp_avg" not in optimizer.state[params[0]]
    assert exp_avg_of(optimizer, params[1]).dtype is I8


@pytest.mark.parametrize("dtype", [torch.float16, F64, "int8", torch.uint8, 8], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_other_dtypes_are_refused(dialect, dtype):
    if dialect is BIG_VISION and dtype in (torch.float16, F64, "int8"):
        pytest.skip("big_vision's own argument takes it")
    options = {"hf": {"beta1": 0.9}, "optax": {"momentum": 0.9}}.get(dialect.name, {})
    with pytest.raises(ValueError, match=r"momentum_dtype (must|should) be .*torch\.int8.*"):
        dialect(stepping.make_params([(3,)]), **options, momentum_dtype=dtype)


def broken(optimizer: Any, how: str) -> None:
    group, state = optimizer.param_groups[0], optimizer.state[params_of(optimizer)[9]]
    if how == "group":
        group["momentum_dtype"] = F32
    elif how == "scale_is_gone":
        del state["exp_avg_scale"]
    elif how == "scale_of_another_shape":
        state["exp_avg_scale"] = state["exp_avg_scale"][:-1]
    elif how == "scale_of_another_dtype":
        state["exp_avg_scale"] = state["exp_avg_scale"].to(torch.int32)
    else:
        state["exp_avg"] = state["exp_avg"].float()


BROKEN = {
    "group": r"'exp_avg' of .* has dtype torch.int8; expected torch.float32. Another momentum",
    "scale_is_gone": "lacks 'exp_avg_scale'",
    "scale_of_another_shape": r"'exp_avg_scale' of .* has shape \(19, 3\); expected \(20, 3\)",
    "scale_of_another_dtype": r"'exp_avg_scale' of .* dtype torch.int32; expected torch.uint8",
    "moment": r"'exp_avg' of .* has dtype torch.float32; expected torch.int8. Another momentum",
}


@pytest.mark.parametrize("how", BROKEN)
def test_state_that_does_not_fit(how):
    optimizer = build("hf", momentum_dtype=I8)
    take_steps(optimizer, 1)
    broken(optimizer, how)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=BROKEN[how]):
        optimizer.step()


@pytest.mark.parametrize("how", ["scale_is_gone", "scale_of_another_shape"])
@pytest.mark.parametrize("kept", [F32, I8], ids=str)
def test_a_checkpoint_that_does_not_fit(how, kept):
    source, optimizer = (build("hf", momentum_dtype=d) for d in (I8, kept))
    for each in (source, optimizer):
        take_steps(each, 1)
    broken(source, how)
    message = BROKEN[how] if kept is I8 else r"'exp_avg' of .* dtype torch.int8; expected torch.fl"
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(without_the_extra(source.state_dict()))
