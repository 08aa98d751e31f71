"""torch's own table of inputs and errors for Adafactor, and the promises that its tests hold.

`torch.testing._internal.common_optimizers` ships in the wheel; no entry of it is skipped here.
"""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
from typing import Any

import pytest
import torch

from fused_adafactor import Adafactor
from tests import peers, stepping

peers.require_module("expecttest")  # torch.testing._internal imports it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's own imports say is not about our code
    from torch.testing._internal import common_optimizers as torch_table

INFO = torch_table.OptimizerInfo(
    Adafactor,
    optim_inputs_func=torch_table.optim_inputs_func_adafactor,
    optim_error_inputs_func=torch_table.optim_error_inputs_func_adafactor,
    supported_impls=("foreach", "fused"),
    supports_fused_on=("cpu",),
    not_og_supported_flags=("foreach", "fused", "maximize", "capturable"),
    has_capturable_arg=True,
    supports_complex=False,
)
PLAIN = INFO.optim_inputs_func(device="cpu")
# torch adds the flags itself, but foreach only on a GPU; here it is one more accepted argument.
ALL = [
    torch_table.OptimizerInput(None, {**given.kwargs, **flags}, " & ".join([given.desc, *flags]))
    for given in PLAIN
    for flags in ({}, {"foreach": True}, {"fused": True})
]
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)

every_plain_input = pytest.mark.parametrize("given", PLAIN, ids=lambda i: i.desc)
every_input = pytest.mark.parametrize("given", ALL, ids=lambda i: i.desc)
SHAPES = ((10, 5), (10,), (3, 4, 2), (), (0, 3))


def build(given: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Adafactor:
    return Adafactor(stepping.make_params(SHAPES, dtype), **{**copy.deepcopy(given.kwargs), **more})


def test_the_table_is_not_empty():
    assert len(PLAIN) == 5
    assert len(ALL) == 15
    assert len(ERRORS) == 10


# --- construction and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ERRORS, ids=lambda c: c.optimizer_error_input.desc)
def test_errors_have_torchs_types_and_texts(case):
    params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
    params = stepping.make_params([(2, 3)]) if params is None else params
    if case.error_on is torch_table.OptimizerErrorEnum.STEP_ERROR:
        optimizer = Adafactor(params, **kwargs)
        with (
            stepping.assert_untouched(optimizer),
            pytest.raises(case.error_type, match=case.error_regex),
        ):
            optimizer.step()
    elif issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            Adafactor(params, **kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            Adafactor(params, **kwargs)


@every_input
def test_repr_can_be_read(given):
    text = repr(build(given))
    assert text.startswith("Adafactor (")
    for key in (*given.kwargs, "rounding", "nonfinite"):
        assert re.search(rf"^ +{key}: ", text, re.MULTILINE), key


@every_plain_input
def test_defaults_that_are_changed_later_serve_later_groups(given):
    optimizer = build(given)
    optimizer.defaults["lr"] = 0.125
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 2))]})
    assert optimizer.param_groups[0]["lr"] != 0.125
    assert optimizer.param_groups[1]["lr"] == 0.125


# --- what a step does ----------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_goes_downhill(given, layout):
    """A small least-squares fit; with maximize the loss rises instead."""
    weight, bias = stepping.make_params([(8, 4), (8,)])
    if layout == "transposed":
        weight = torch.nn.Parameter(weight.detach().mT.contiguous().mT)
    inputs = torch.ones(4)
    optimizer = Adafactor([weight, bias], **copy.deepcopy(given.kwargs))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight @ inputs + bias).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert (losses[-1] > losses[0]) is given.kwargs.get("maximize", False)


@every_plain_input
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_flags_change_no_bit(given, dtype, flag):
    optimizers = [build(given, dtype, **{flag: value}) for value in (False, True)]
    for optimizer in optimizers:
        stepping.take_steps(optimizer, 7)
    for p, q in zip(*map(stepping.params_of, optimizers), strict=True):
        assert stepping.same_bits(p, q)


@every_plain_input
def test_capturable_agrees(given):
    optimizers = [build(given, torch.float64, capturable=value) for value in (False, True)]
    for optimizer in optimizers:
        stepping.take_steps(optimizer, 7)
    stepping.assert_close_optimizers(*optimizers, 1e-12)


@every_input
@pytest.mark.parametrize("as_tensor", ["cpu_0d", "cpu_1_element", "float64"])
def test_tensor_lr_is_that_number(given, as_tensor):
    """It is not written to either, and a new value is used from the next step."""
    value = 0.03125  # exact in float32
    lr = {
        "cpu_0d": torch.tensor(value),
        "cpu_1_element": torch.tensor([value]),
        "float64": torch.tensor(value, dtype=torch.float64),
    }[as_tensor]
    with_tensor, with_float = build(given, lr=lr), build(given, lr=value)
    for optimizer in (with_tensor, with_float):
        stepping.take_steps(optimizer, 3)
    assert with_tensor.param_groups[0]["lr"] is lr
    assert (lr == value).all()
    lr.fill_(0.5)
    with_float.param_groups[0]["lr"] = 0.5
    for optimizer in (with_tensor, with_float):
        stepping.take_steps(optimizer, 3, start=3)
    for p, q in zip(*map(stepping.params_of, (with_tensor, with_float)), strict=True):
        assert stepping.same_bits(p, q)


@every_input
def test_lr_of_a_group(given):
    """Group options equal those of an optimizer of its own; a group of lr 0 stands still."""
    params, alone = (stepping.make_params([(4, 3), (5,), (3, 3)]) for _ in range(2))
    kwargs = {**copy.deepcopy(given.kwargs), "lr": 0.01}
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.1},
        {"params": params[2:], "lr": 0.0},
    ]
    still = params[2].detach().clone()
    optimizers = [
        Adafactor(groups, **kwargs),
        Adafactor(alone[:1], **kwargs),
        Adafactor(alone[1:2], **{**kwargs, "lr": 0.1}),
    ]
    for step in range(4):
        for both in (params, alone):
            for p, g in zip(both, stepping.grad_values(both, step), strict=True):
                p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    assert stepping.same_bits(params[0], alone[0])
    assert stepping.same_bits(params[1], alone[1])
    assert torch.equal(params[2], still)


@every_plain_input
def test_weight_decay_of_a_group(given):
    """With a zero gradient decay alone moves a parameter: by exactly 1 - lr * weight_decay."""
    params = stepping.make_params([(4, 3), (4, 3)])
    kwargs = {**copy.deepcopy(given.kwargs), "lr": 0.125, "weight_decay": 0.0}
    optimizer = Adafactor(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], **kwargs
    )
    before = [p.detach().clone() for p in params]
    stepping.take_steps(optimizer, 1, scale=0.0)
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1] * (1 - 0.125 * 0.5))


@every_input
def test_mixed_dtypes_in_one_group_are_as_apart(given):
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    together = [stepping.make_params([(6, 5)], dtype)[0] for dtype in dtypes]
    apart = [stepping.make_params([(6, 5)], dtype)[0] for dtype in dtypes]
    optimizers = [
        Adafactor(group, **copy.deepcopy(given.kwargs))
        for group in (together, *([p] for p in apart))
    ]
    for step in range(4):
        for p in (*together, *apart):
            p.grad = stepping.grad_values([p], step)[0]
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(stepping.same_bits, together, apart))


@every_input
def test_no_gradients_no_step(given):
    optimizer = build(given)
    for grad in (None, None):
        for p in stepping.params_of(optimizer):
            p.grad = grad
        with stepping.assert_untouched(optimizer):
            optimizer.step()
    assert not optimizer.state


@every_input
def test_zero_gradients_change_nothing_but_the_step(given):
    optimizer = build(given, weight_decay=0.0)
    before = stepping.clone_params(stepping.params_of(optimizer))
    stepping.take_steps(optimizer, 3, scale=0.0)
    for p, q in zip(stepping.params_of(optimizer), before, strict=True):
        assert stepping.same_bits(p, q)
        assert float(optimizer.state[p]["step"]) == 3


@every_input
def test_default_dtype_float64(given):
    torch.set_default_dtype(torch.float64)
    optimizer = build(given)
    stepping.take_steps(optimizer, 3)
    torch.set_default_dtype(torch.float32)
    other = build(given)
    stepping.take_steps(other, 3)
    for p, q in zip(*map(stepping.params_of, (optimizer, other)), strict=True):
        assert stepping.same_bits(p, q)
        assert optimizer.state[p]["step"].dtype is torch.float64


# --- state dicts and copies ----------------------------------------------------------------------


def reload(optimizer: torch.optim.Optimizer) -> Any:
    """The state dict after a trip through a file that may hold no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_input
def test_a_loaded_state_dict_goes_on_bit_by_bit(given):
    optimizer = build(given)
    stepping.take_steps(optimizer, 3)
    other = Adafactor(stepping.clone_params(stepping.params_of(optimizer)))
    other.load_state_dict(reload(optimizer))
    stepping.assert_same_optimizers(other, optimizer)
    for each in (optimizer, other):
        stepping.take_steps(each, 3, start=3)
    stepping.assert_same_optimizers(other, optimizer)


@every_input
def test_a_state_dict_before_the_first_step_is_deterministic(given):
    optimizer, other = build(given), build(given)
    assert not optimizer.state_dict()["state"]
    other.load_state_dict(reload(optimizer))
    assert not other.state
    for each in (optimizer, other):
        stepping.take_steps(each, 3)
    stepping.assert_same_optimizers(other, optimizer)


@every_input
def test_an_older_state_dict_lacks_newer_flags(given):
    optimizer = build(given)
    stepping.take_steps(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for flag in (*INFO.not_og_supported_flags, "rounding", "seed", "nonfinite", "state_dtype"):
        del saved["param_groups"][0][flag]
    other = build(given)
    with torch.no_grad():
        for p, q in zip(*map(stepping.params_of, (other, optimizer)), strict=True):
            p.copy_(q)
    other.load_state_dict(saved)
    for each in (optimizer, other):
        stepping.take_steps(each, 2, start=3)
    for p, q in zip(*map(stepping.params_of, (other, optimizer)), strict=True):
        assert stepping.same_bits(p, q)


@every_input
@pytest.mark.parametrize("number", [int, float])
def test_a_step_that_is_a_number_becomes_a_tensor(given, number):
    optimizer = build(given)
    stepping.take_steps(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = number(entry["step"])
    other = Adafactor(stepping.clone_params(stepping.params_of(optimizer)))
    other.load_state_dict(saved)
    stepping.assert_same_optimizers(other, optimizer)
    for p in stepping.params_of(other):
        other.state[p]["step"] = number(3)
    other.__setstate__(other.__getstate__())
    stepping.assert_same_optimizers(other, optimizer)


@every_input
def test_deepcopy_has_every_public_attribute_and_its_own_memory(given):
    optimizer = build(given)
    stepping.take_steps(optimizer, 3)
    copied = copy.deepcopy(optimizer)
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, copied)]
    assert public[0] == public[1]
    stepping.assert_same_optimizers(copied, optimizer)
    with stepping.assert_untouched(optimizer):
        stepping.take_steps(copied, 1, start=3)
        for p, q in zip(*map(stepping.params_of, (optimizer, copied)), strict=True):
            q.grad = None
            assert q.numel() == 0 or p.data_ptr() != q.data_ptr()
    assert copied.explain().splitlines()[1:-1] == optimizer.explain().splitlines()[1:-1]


@every_input
@pytest.mark.parametrize("names", [(True, False), (False, True), (True, True)], ids=str)
def test_names_and_their_absence_load_into_each_other(given, names):
    saved_named, own_named = names
    optimizers = []
    for prefix, named in (("saved", saved_named), ("own", own_named)):
        params = stepping.make_params(SHAPES)
        listed = [(f"{prefix}.{i}", p) for i, p in enumerate(params)] if named else params
        optimizers.append(Adafactor(listed, **copy.deepcopy(given.kwargs)))
    saved, own = optimizers
    stepping.take_steps(saved, 2)
    own.load_state_dict(saved.state_dict())
    expected = "saved.0" if saved_named else "own.0"
    assert own.param_groups[0]["param_names"][0] == expected
    for p, q in zip(*map(stepping.params_of, (own, saved)), strict=True):
        stepping.assert_same_values(own.state[p], saved.state[q])
    stepping.take_steps(own, 1)


@every_input
def test_every_parameter_has_state_after_a_step(given):
    optimizer = build(given)
    stepping.take_steps(optimizer, 1)
    for p in stepping.params_of(optimizer):
        assert all(isinstance(value, torch.Tensor) for value in optimizer.state[p].values())
        assert len(optimizer.state[p]) >= 2


# --- hooks ---------------------------------------------------------------------------------------


@every_plain_input
def test_hooks_of_a_step_run_around_it_in_order(given):
    optimizer = build(given)
    seen: list[str] = []
    before = stepping.params_of(optimizer)[0].detach().clone()

    def note(name: str) -> Any:
        def hook(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            moved = not torch.equal(stepping.params_of(opt)[0], before)
            seen.append(f"{name} {'after' if moved else 'before'}")

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    stepping.take_steps(optimizer, 1)
    assert seen == ["pre before", "post after"]
    for handle in handles:
        handle.remove()
    stepping.take_steps(optimizer, 1)
    assert len(seen) == 2


@every_plain_input
def test_hooks_of_state_dict_may_see_and_replace_it(given):
    optimizer = build(given)
    stepping.take_steps(optimizer, 1)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, sd: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda opt, sd: seen.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, sd: {**sd, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1
    assert seen == ["pre", "first", "post"]


def test_hooks_of_load_state_dict_see_what_was_restored():
    """The base class casts to bfloat16; a user's post-hooks, the prepended too, come after ours."""
    source = Adafactor(stepping.make_params(SHAPES, torch.bfloat16))
    stepping.take_steps(source, 2)
    optimizer = Adafactor(stepping.make_params(SHAPES, torch.bfloat16))
    seen: list[Any] = []

    def look(opt: torch.optim.Optimizer) -> None:
        seen.append(opt.state[stepping.params_of(opt)[0]]["row_var"].dtype)

    def replace(opt: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        groups = [{**group, "lr": 0.75} for group in loaded["param_groups"]]
        return {**loaded, "param_groups": groups}

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.register_load_state_dict_post_hook(look, prepend=True)
    optimizer.register_load_state_dict_pre_hook(replace)
    before = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(source.state_dict())
    assert seen == ["pre", torch.float32, torch.float32]
    assert optimizer.param_groups[0]["lr"] == 0.75
    stepping.assert_same_values(source.state_dict(), before)
    hooks = optimizer._optimizer_load_state_dict_post_hooks
    assert list(hooks.values()) == [look, look]


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"nonfinite": "skip"}], ids=str)
def test_steps_leave_nothing_behind(flags):
    """Not even what a reference cycle would keep until the collector comes."""
    optimizer = build(PLAIN[1], **flags)
    stepping.take_steps(optimizer, 3)
    gc.collect()
    gc.disable()
    try:
        before = count_objects()
        for _ in range(20):
            optimizer.step()
        tensors, objects = (now - then for now, then in zip(count_objects(), before, strict=True))
        assert tensors == 0
        assert objects < 20  # none a step; a few are what the counting itself leaves
    finally:
        gc.enable()


def count_objects() -> tuple[int, int]:
    """Live tensors, and live objects that the garbage collector knows."""
    alive = gc.get_objects()
    return sum(issubclass(type(thing), torch.Tensor) for thing in alive), len(alive)
