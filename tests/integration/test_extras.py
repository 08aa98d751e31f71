"""What every dialect takes beyond its peer: rounding, skipping, clipping, dtypes, capturable."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import backends
from fused_adafactor.backends import cpp, reference, triton
from fused_adafactor.rounding import (
    RoundingKey,
    Stream,
    round_kahan,
    round_nearest,
    round_stochastic,
)
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, DIALECTS, HF, KERAS, TORCH, VARIANTS, Dialect

pytestmark = pytest.mark.usefixtures("each_backend")

EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
EVERY_VARIANT = pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
BOTH_HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# Gradient accumulation decides on the host whether a call updates.
UPDATING = [(d, v) for d, v in VARIANTS if "gradient_accumulation_steps" not in d.variants[v]]

SHAPES = ((6, 5), (7,), (4, 3, 5), ())


def build(dialect: Dialect, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    if dialect is TORCH:  # None would be the epsilon of the dtype, which tests here compare across
        kwargs.setdefault("eps", (1e-6, 1e-3))
    return dialect(stepping.make_params(SHAPES, dtype), **kwargs)


def set_grads(optimizer: Any, step: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Gradients that `dtype` holds, in the parameters' own dtypes."""
    params = stepping.params_of(optimizer)
    for p, g in zip(params, stepping.grad_values(params, step, scale), strict=True):
        p.grad = g.to(dtype).to(p.dtype)


def set_params(optimizer: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(stepping.params_of(optimizer), values, strict=True):
            p.copy_(value)


# --- rounding ------------------------------------------------------------------------------------


def assert_rounds_as(
    dialect: Dialect, dtype: torch.dtype, rounding: str, round_one: Any, steps: int = 4
) -> None:
    """A float32 twin computes the unrounded value; `round_one(index, value, t)` must round it."""
    low = build(dialect, dtype, rounding=rounding, seed=5)
    twin = build(dialect, torch.float32)
    stored = [(p.detach().clone(), torch.zeros_like(p)) for p in stepping.params_of(low)]
    for step in range(steps):
        set_params(twin, [p.float() + c.float() for p, c in stored])
        for optimizer in (low, twin):
            set_grads(optimizer, step, dtype)
            optimizer.step()
        values = [p.detach() for p in stepping.params_of(twin)]
        stored = [round_one(index, value, step + 1) for index, value in enumerate(values)]
        for p, (expected, lost) in zip(stepping.params_of(low), stored, strict=True):
            assert stepping.same_bits(p.detach(), expected)
            assert rounding != "kahan" or stepping.same_bits(low.state[p]["kahan"], lost)


# A parameter scale would be that of p, without the compensation that the twin has in its p.
def unscaled(dialect: Dialect, **kwargs: Any) -> Dialect:
    arguments = {
        "hf": {"scale_parameter": False},
        "optax": {"multiply_by_parameter_scale": False},
    }
    plain = {**dialect.plain, **arguments.get(dialect.name, {}), **kwargs}
    return Dialect(dialect.name, dialect.class_name, plain)


@EVERY_DIALECT
@BOTH_HALVES
def test_nearest_is_the_function_of_that_name(dialect, dtype):
    def expected(index: int, value: Tensor, t: int) -> tuple[Tensor, Tensor]:
        rounded = round_nearest(value, dtype)
        return rounded, torch.zeros_like(rounded)

    assert_rounds_as(dialect, dtype, "nearest", expected)


@EVERY_DIALECT
def test_stochastic_is_the_function_of_that_name(dialect):
    def expected(index: int, value: Tensor, t: int) -> tuple[Tensor, Tensor]:
        rounded = round_stochastic(value, torch.bfloat16, RoundingKey(5, index, t))
        return rounded, torch.zeros_like(rounded)

    assert_rounds_as(dialect, torch.bfloat16, "stochastic", expected)


@pytest.mark.parametrize(
    "dialect",
    [unscaled(d) for d in DIALECTS if d.name in ("hf", "optax", "adafactor_pytorch", "big_vision")],
    ids=str,
)
@BOTH_HALVES
def test_kahan_is_the_function_of_that_name(dialect, dtype):
    def expected(index: int, value: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return round_kahan(value, dtype)

    assert_rounds_as(dialect, dtype, "kahan", expected)


@EVERY_DIALECT
def test_stochastic_rounding_follows_its_seed_alone(dialect):
    """Not the global generator, which it also leaves where it is."""
    runs = {}
    for name, seed, global_seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        optimizer = build(dialect, torch.bfloat16, rounding="stochastic", seed=seed)
        stepping.take_steps(optimizer, 3)
        assert torch.equal(torch.get_rng_state(), before)
        runs[name] = stepping.params_of(optimizer)
    assert all(map(stepping.same_bits, runs["a"], runs["b"]))
    assert not all(map(stepping.same_bits, runs["a"], runs["c"]))


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if not d.counts_globally], ids=str)
@pytest.mark.parametrize(
    "extras",
    [
        *({"rounding": rounding} for rounding in ("nearest", "stochastic", "kahan")),
        {"state_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_parameters_result_does_not_depend_on_its_neighbours(dialect, extras):
    together = build(dialect, torch.bfloat16, **extras)
    alone = build(dialect, torch.bfloat16, **extras)
    stepping.take_steps(together, 4)
    for step in range(4):
        set_grads(alone, step, torch.bfloat16)
        grads = [p.grad for p in stepping.params_of(alone)]
        for index in range(len(SHAPES)):
            for place, p in enumerate(stepping.params_of(alone)):
                p.grad = grads[place] if place == index else None
            alone.step()
    for p, q in zip(*map(stepping.params_of, (together, alone)), strict=True):
        assert stepping.same_bits(p, q)


@BOTH_HALVES
def test_kahan_follows_float32_where_nearest_stands_still(dtype):
    """Steps of 1e-4 of the parameter: below half an ulp in both dtypes."""
    runs = {}
    for name, kind in (("exact", torch.float32), ("nearest", dtype), ("kahan", dtype)):
        p = torch.nn.Parameter(torch.full((4, 8), 1.75, dtype=kind))
        rounding = "nearest" if name == "exact" else name
        optimizer = TORCH([p], lr=1e-4, eps=(1e-6, 1e-3), rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        runs[name] = p.detach().float()
    assert torch.equal(runs["nearest"], torch.full((4, 8), 1.75))
    error = (runs["kahan"] - runs["exact"]).abs().max()
    assert error <= 1.75 * torch.finfo(dtype).eps


@EVERY_DIALECT
def test_the_compensation_is_state_of_low_precision_parameters_only(dialect):
    params = [*stepping.make_params([(6, 5)], torch.bfloat16), *stepping.make_params([(6, 5)])]
    optimizer = dialect(params, rounding="kahan")
    stepping.take_steps(optimizer, 1)
    state = optimizer.state_dict()["state"]
    assert state[0]["kahan"].dtype is torch.bfloat16
    assert state[0]["kahan"].any()
    assert "kahan" not in state[1]


# --- nonfinite -----------------------------------------------------------------------------------

POISON = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


@pytest.mark.parametrize(("dialect", "variant"), UPDATING, ids=str)
@POISON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skip_leaves_a_tensor_and_its_count_as_if_the_step_had_not_been(
    dialect, variant, poison, dtype
):
    """With a count per parameter the others step; with a shared one the whole step is skipped."""
    kwargs = {**dialect.variants[variant], "nonfinite": "skip"}
    optimizer, other = (build(dialect, dtype, **kwargs) for _ in range(2))
    for each in (optimizer, other):
        stepping.take_steps(each, 2)
        set_grads(each, 2, dtype)
    stepping.params_of(optimizer)[0].grad[3, 2] = poison
    stepping.params_of(other)[0].grad = None
    optimizer.step()
    if not dialect.counts_globally:
        other.step()
    stepping.assert_same_optimizers(optimizer, other)
    for each in (optimizer, other):
        stepping.take_steps(each, 2, start=3)
    stepping.assert_same_optimizers(optimizer, other)


@POISON
@pytest.mark.parametrize("call", [0, 1], ids=["accumulating", "updating"])
def test_skip_drops_one_call_of_an_accumulation(poison, call):
    """The gradients gathered before it stay, and the average of the weights stands still."""
    settings = {"gradient_accumulation_steps": 2, "nonfinite": "skip", "use_ema": True}
    optimizer, other = (build(KERAS, **settings) for _ in range(2))
    for each in (optimizer, other):
        stepping.take_steps(each, 2 + call)
    set_grads(optimizer, 9, torch.float32)
    stepping.params_of(optimizer)[0].grad[3, 2] = poison
    optimizer.step()
    stepping.assert_same_optimizers(optimizer, other)
    for each in (optimizer, other):
        stepping.take_steps(each, 3, start=4)
    stepping.assert_same_optimizers(optimizer, other)


def test_skip_keeps_what_was_gathered_for_a_tensor_that_has_no_gradient():
    """The call that would have dropped it (Keras') is skipped, so it is not dropped."""
    settings = {"gradient_accumulation_steps": 2, "nonfinite": "skip"}
    optimizer, other = (build(KERAS, **settings) for _ in range(2))
    for each in (optimizer, other):
        stepping.take_steps(each, 3)
    params = stepping.params_of(optimizer)
    assert optimizer.state[params[1]][optimizer.layout.accumulator].any()
    set_grads(optimizer, 9, torch.float32)
    params[0].grad[3, 2] = math.nan
    params[1].grad = None
    optimizer.step()
    stepping.assert_same_optimizers(optimizer, other)


def test_found_inf_drops_one_call_of_an_accumulation():
    optimizer, other = (build(KERAS, gradient_accumulation_steps=2, fused=True) for _ in range(2))
    for each in (optimizer, other):
        stepping.take_steps(each, 3)
    set_grads(optimizer, 9, torch.float32)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    stepping.assert_same_optimizers(optimizer, other)


@pytest.mark.parametrize("key", ["nonfinite", "gradient_accumulation_steps"])
def test_groups_of_one_counter_must_agree_on_what_it_counts(key):
    """Else some tensors would be skipped, or averaged over other calls, and the count be wrong."""
    params = stepping.make_params(SHAPES[:2])
    other = {key: "skip" if key == "nonfinite" else 2}
    optimizer = KERAS([{"params": params[:1], **other}, {"params": params[1:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="must agree on nonfinite and gradient_accumulation_steps"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_backend_that_raises_has_counted_nothing(backend, monkeypatch):
    if backend == "cpp" and cpp.missing() is not None:
        pytest.skip(f"needs the native library: {cpp.missing()}")
    optimizer = build(TORCH, backend=backend)
    stepping.take_steps(optimizer, 1)
    executor = {"reference": reference.Executor, "cpp": cpp._Executor}[backend]
    monkeypatch.setattr(executor, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stepping.take_steps(optimizer, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_the_average_of_bfloat16_weights_does_not_stall():
    (param,) = params = [torch.full((4,), 256.0, dtype=torch.bfloat16, requires_grad=True)]
    optimizer = KERAS(params, use_ema=True, learning_rate=1e-9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(300.0)
    for _ in range(1000):
        optimizer.step()
    average = optimizer.state[param][optimizer.layout.average]
    assert (average - 300).abs().max() < 0.01


@EVERY_DIALECT
def test_skip_at_the_first_step_leaves_a_tensor_new(dialect):
    optimizer = build(dialect, nonfinite="skip")
    before = [p.detach().clone() for p in stepping.params_of(optimizer)]
    for p in stepping.params_of(optimizer):
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(map(stepping.same_bits, stepping.params_of(optimizer), before))
    other = build(dialect, nonfinite="skip")
    for each in (optimizer, other):
        stepping.take_steps(each, 2)
    stepping.assert_same_optimizers(optimizer, other)


@EVERY_DIALECT
@POISON
def test_propagate_hides_nothing(dialect, poison):
    """The tensor becomes NaN; its neighbours do not."""
    optimizer = build(dialect)
    set_grads(optimizer, 0, torch.float32)
    params = stepping.params_of(optimizer)
    params[0].grad[3, 2] = poison
    optimizer.step()
    assert params[0].isnan().any()
    assert all(p.isfinite().all() for p in params[1:])


# --- clipping ------------------------------------------------------------------------------------


@EVERY_DIALECT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.25, 1e6], ids=["clips", "does_not_clip"])
def test_max_grad_norm_is_clip_grad_norm_before_the_step(dialect, dtype, max_norm):
    """Over all groups and whatever their lr; the gradients themselves are not rewritten."""
    built = []
    for kwargs in ({"max_grad_norm": max_norm}, {}):
        params = stepping.make_params(SHAPES, torch.float32 if dtype.itemsize == 2 else dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
        eps = {"eps": (1e-3, 1e-3)} if dialect is TORCH else {}  # where the size of g matters
        built.append(dialect(groups, **eps, **kwargs))
    inside, outside = built
    for step in range(5):
        for optimizer in built:
            set_grads(optimizer, step, dtype)
        torch.nn.utils.clip_grad_norm_(stepping.params_of(outside), max_norm)
        grads = [p.grad.clone() for p in stepping.params_of(inside)]
        inside.step()
        outside.step()
        assert all(
            stepping.same_bits(p.grad, g)
            for p, g in zip(stepping.params_of(inside), grads, strict=True)
        )
    tolerance = 1e-12 if dtype is torch.float64 else 3e-6
    stepping.assert_close_optimizers(inside, outside, tolerance)


@EVERY_DIALECT
def test_a_norm_that_is_not_finite_skips_every_tensor_it_clips(dialect):
    optimizer = build(dialect, max_grad_norm=1.0, nonfinite="skip")
    stepping.take_steps(optimizer, 2)
    set_grads(optimizer, 2, torch.float32)
    stepping.params_of(optimizer)[0].grad[0, 0] = math.nan
    with stepping.assert_untouched(optimizer):
        optimizer.step()


# --- dtypes and capturable -----------------------------------------------------------------------


@EVERY_DIALECT
@pytest.mark.parametrize(
    "state_dtype", [None, torch.float32, torch.float64, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_dtype_is_that_of_the_second_moments(dialect, state_dtype, dtype):
    optimizer = build(dialect, dtype, state_dtype=state_dtype)
    stepping.take_steps(optimizer, 3)
    default = torch.float64 if dtype is torch.float64 else torch.float32
    layout = optimizer.layout
    for own in optimizer.state.values():
        moments = [own[k] for k in (layout.row_var, layout.col_var, layout.var) if k in own]
        assert moments
        assert {moment.dtype for moment in moments} == {state_dtype or default}


@EVERY_DIALECT
def test_bfloat16_state_is_near_float32_state(dialect):
    low, full = build(dialect, state_dtype=torch.bfloat16), build(dialect)
    for optimizer in (low, full):
        stepping.take_steps(optimizer, 3)
    pairs = list(zip(*map(stepping.params_of, (low, full)), strict=True))
    assert not all(torch.equal(p, q) for p, q in pairs)
    for p, q in pairs:
        assert stepping.relative_error(p, q) < 1e-2


MOMENTS = {"row_var": Stream.ROW_VAR, "col_var": Stream.COL_VAR, "var": Stream.VAR}


def moments_of(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """The second moments that a parameter has, by glossary name."""
    keys = {name: optimizer.layout.key(name) for name in MOMENTS}
    state = optimizer.state[param]
    return {name: state[key] for name, key in keys.items() if key in state}


# Those that keep a factor's values in the order of its key: they factor the last two dimensions.
@pytest.mark.parametrize("dialect", [TORCH, HF, KERAS], ids=str)
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_bfloat16_second_moments_are_rounded_by_their_keys(dialect, extras):
    """A float32 twin, from the same moments in each step, has the value that is rounded."""
    low, twin = (
        build(dialect, state_dtype=kind, seed=5, **extras)
        for kind in (torch.bfloat16, torch.float32)
    )
    for step in range(3):
        for optimizer in (low, twin):
            set_grads(optimizer, step, torch.float32)
            optimizer.step()
        pairs = zip(*map(stepping.params_of, (low, twin)), strict=True)
        for index, (p, q) in enumerate(pairs):
            kept = moments_of(low, p)
            for name, value in moments_of(twin, q).items():
                key = RoundingKey(5, index, step + 1, MOMENTS[name])
                assert stepping.same_bits(kept[name], round_stochastic(value, torch.bfloat16, key))
                value.copy_(kept[name])


@pytest.mark.parametrize("factored", [True, False])
def test_bfloat16_second_moments_follow_float32_where_nearest_stands_still(factored):
    """They are right in the mean of all rows, columns or elements.

    An error of a step is 0 in the mean and lies within one unit in the last place, so its deviation
    is half of that, and those of many steps and elements are independent.
    """
    steps, beta2, share, unit = 50, 0.999, 3.0, 2**-7
    assert round_nearest(torch.tensor(beta2 + (1 - beta2) * share), torch.bfloat16) == 1.0
    runs = {}
    for kind in (torch.bfloat16, torch.float32):
        shape = (256, 256) if factored else (4096,)
        param = torch.nn.Parameter(torch.ones(shape))
        optimizer = ADAFACTOR_PYTORCH(
            [param], beta2=beta2, non_constant_decay=False, ams_grad=False, state_dtype=kind
        )
        for step in range(steps + 1):
            # Sums of g² along a line, or g² itself, of 3; the first step makes the state.
            param.grad = torch.full(shape, (share / (256 if factored else 1)) ** 0.5)
            optimizer.step()
            for moment in moments_of(optimizer, param).values() if step == 0 else ():
                moment.fill_(1.0)
        runs[kind] = {k: v.double() for k, v in moments_of(optimizer, param).items()}
    assert runs[torch.float32].keys() == ({"row_var", "col_var"} if factored else {"var"})
    for name, exact in runs[torch.float32].items():
        low = runs[torch.bfloat16][name]
        deviation = unit / 2 * (steps / low.numel()) ** 0.5
        assert low.max() < 2  # where a unit would be larger
        assert exact.mean() - 1.0 > 2 * 5 * deviation
        assert (low.mean() - exact.mean()).abs() < 5 * deviation


@EVERY_DIALECT
def test_bfloat16_second_moments_follow_their_seed_alone(dialect):
    runs = {}
    for name, seed, global_seed in (("a", 3, 0), ("b", 3, 1), ("c", 4, 0)):
        torch.manual_seed(global_seed)
        optimizer = build(dialect, state_dtype=torch.bfloat16, seed=seed)
        stepping.take_steps(optimizer, 3)
        runs[name] = optimizer
    stepping.assert_same_optimizers(runs["a"], runs["b"])
    for p, q in list(zip(*(stepping.params_of(runs[name]) for name in "ac"), strict=True))[:3]:
        for mine, other in zip(
            moments_of(runs["a"], p).values(), moments_of(runs["c"], q).values(), strict=True
        ):
            assert not stepping.same_bits(mine, other)


def test_the_maximum_of_bfloat16_second_moments_is_rounded_to_nearest():
    """Rounded at random, it would keep every value that came out too large."""
    optimizer = ADAFACTOR_PYTORCH(
        stepping.make_params([(60, 50)]), non_constant_decay=False, state_dtype=torch.bfloat16
    )
    stepping.take_steps(optimizer, 1)
    (param,) = stepping.params_of(optimizer)
    row, col = (moments_of(optimizer, param)[name].double() for name in ("row_var", "col_var"))
    v = row * col / row.sum()
    kept = optimizer.state[param][optimizer.layout.var_max].double()
    half = torch.ldexp(torch.ones_like(v), v.log2().floor().int() - 8)
    assert ((kept - v).abs() <= half * (1 + 1e-3)).all()  # v is made in float32


@EVERY_DIALECT
def test_bfloat16_second_moments_have_the_same_bits_with_a_counter_on_the_device(dialect):
    on_device, on_host = (
        build(dialect, state_dtype=torch.bfloat16, seed=7, capturable=c) for c in (True, False)
    )
    for optimizer in (on_device, on_host):
        stepping.take_steps(optimizer, 4)
    for p, q in zip(*map(stepping.params_of, (on_device, on_host)), strict=True):
        mine, other = moments_of(on_device, p), moments_of(on_host, q)
        assert all(map(stepping.same_bits, mine.values(), other.values()))


@pytest.mark.parametrize(("dialect", "variant"), UPDATING, ids=str)
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_capturable_gives_the_same_numbers(dialect, variant, extras):
    kwargs = {**dialect.variants[variant], **extras}
    if "max_grad_norm" in extras and "clip" in variant and dialect is KERAS:
        kwargs = extras  # Keras takes one kind of clipping
    on_device, on_host = (build(dialect, torch.float64, capturable=c, **kwargs) for c in (True, 0))
    for optimizer in (on_device, on_host):
        stepping.take_steps(optimizer, 6)
    stepping.assert_close_optimizers(on_device, on_host, 1e-12)


def test_capturable_refuses_accumulation_at_the_first_call():
    optimizer = build(KERAS, capturable=True, gradient_accumulation_steps=2)
    set_grads(optimizer, 0, torch.float32)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match="capturable=True"):
        optimizer.step()


@EVERY_DIALECT
def test_capturable_takes_its_lr_from_the_tensor_each_step(dialect):
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer, other = (build(dialect, torch.float64, capturable=c) for c in (True, False))
    optimizer.param_groups[0]["lr"] = lr
    for step, value in enumerate((0.5, 0.25, 0.0)):
        lr.fill_(value)
        other.param_groups[0]["lr"] = value
        for each in (optimizer, other):
            stepping.take_steps(each, 1, start=step)
    for p, q in zip(*map(stepping.params_of, (optimizer, other)), strict=True):
        stepping.assert_close(p, q, 1e-12, "lr from a tensor")


@EVERY_DIALECT
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_a_capturable_step_reads_nothing_on_the_host(dialect, state_dtype, monkeypatch):
    """From the second on; the first looks for the step that only creates state.

    Of a backend that serves devices, for which CPU tensors stand here: the C++ backend reads the
    numbers of a step, where that waits for nothing.
    """
    extras = {"nonfinite": "skip", "max_grad_norm": 1.0, "state_dtype": state_dtype}
    optimizer = build(dialect, capturable=True, backend="reference", **extras)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    stepping.take_steps(optimizer, 1)
    # Counter and lr are checked where that waits for nothing; here they stand for device tensors.
    for name, module in list(sys.modules.items()):
        for check, answer in (("check_count", None), ("is_negative", False)):
            if name.startswith("fused_adafactor") and hasattr(module, check):
                monkeypatch.setattr(module, check, lambda *_, answer=answer: answer)

    def refuse(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    optimizer.step()


# --- backend and plan ----------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [None, "the native library was not built"])
def test_auto_takes_native_code_where_there_is_any_and_says_why(reason, monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    for name in cpp.ENVIRONMENTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp, "missing", lambda: reason)
    monkeypatch.setattr(cpp, "describe", lambda: "libfused_adafactor.so, avx2")
    told = build(TORCH).explain().splitlines()[-1]
    if reason is None:
        assert "tensors on cpp (auto on cpu: libfused_adafactor.so, avx2)" in told
    else:
        assert f"tensors on reference (auto on cpu: {reason}; " in told
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="on cuda are stepped by the reference backend"):
        elsewhere = backends.choose("auto", torch.device("cuda"))
    assert elsewhere.backend == "reference"
    assert (reason or "the cpp backend does not step tensors on cuda") in elsewhere.why
    assert "triton is not installed" in elsewhere.why
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert backends.choose("auto", torch.device("cuda")).backend == "triton"


@pytest.mark.parametrize("name", cpp.ENVIRONMENTS)
def test_native_code_that_was_asked_for_is_used_or_refused(name, monkeypatch):
    """Never replaced by the reference in silence."""
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setenv(name, "avx9")
    monkeypatch.setattr(cpp, "missing", lambda: "there is no avx9")
    optimizer = build(TORCH)
    set_grads(optimizer, 0, torch.float32)
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match="is no avx9"):
        optimizer.step()


@EVERY_DIALECT
def test_the_reference_can_be_asked_for_by_argument_and_environment(dialect, monkeypatch):
    runs = [build(dialect, backend="reference")]
    monkeypatch.setenv("FUSED_ADAFACTOR_BACKEND", "reference")
    runs.append(build(dialect))
    for optimizer in runs:
        stepping.take_steps(optimizer, 2)
        assert "asked for" in optimizer.explain()
    stepping.assert_same_optimizers(*runs)


@EVERY_DIALECT
def test_explain_names_parameters_sweeps_and_why(dialect):
    params = stepping.make_params([(32, 24), (7,), (0, 3)])
    named = dialect(
        list(zip(("weight", "bias", "empty"), params, strict=True)), backend="reference"
    )
    with stepping.assert_untouched(named):
        lines = named.explain().splitlines()
    assert lines[0].startswith("parameter ")
    assert lines[0].endswith(" why")
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert list(rows) == ["weight", "bias", "empty"]
    assert rows["weight"].split()[1:5] == ["32x24", "float32", "reference", "factored"]
    assert rows["bias"].split()[1:5] == ["7", "float32", "reference", "unfactored"]
    assert rows["weight"].split()[5] in ("2", "3")
    assert "no elements" in rows["empty"]
    assert "3 tensors on reference (asked for)" in lines[-1]
    assert "stats > finalize > update_rms > apply" in lines[-1]
    assert "#0" in dialect(stepping.make_params([(3,)])).explain()
