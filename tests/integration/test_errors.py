"""Bad input: a message that names the parameter, and nothing changed, whatever it was."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import backends
from tests import stepping
from tests.dialects import DIALECTS, TORCH, Dialect

EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)

# The bad one is in the middle: a step that checks as it goes would have moved the first.
NAMES = ("first", "block.0.weight", "last")
SHAPES = ((7,), (6, 5), (4, 3))
BAD = 1
Fault = Callable[[torch.optim.Optimizer, Tensor], None]


def build(dialect: Dialect, named: bool = True, steps: int = 2, **kwargs: Any) -> Any:
    params = stepping.make_params(SHAPES)
    listed = list(zip(NAMES, params, strict=True)) if named else params
    optimizer = dialect(listed, **kwargs)
    stepping.take_steps(optimizer, steps)
    for p, g in zip(params, stepping.grad_values(params, steps), strict=True):
        p.grad = g
    return optimizer


def replace_bad(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    """Put another tensor in the place of the bad parameter, with its state."""
    params = optimizer.param_groups[0]["params"]
    if params[BAD] in optimizer.state:
        optimizer.state[param] = optimizer.state.pop(params[BAD])
    params[BAD] = param


# --- parameters and gradients --------------------------------------------------------------------


class GradElsewhere(torch.nn.Parameter):
    """A parameter whose gradient is not where torch would let it be."""

    grad = property(lambda self: torch.zeros(self.shape, device="meta"))


def sparse_gradient(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    param.grad = torch.eye(6, 5).to_sparse()


def complex_parameter(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    replace_bad(optimizer, torch.nn.Parameter(torch.ones(6, 5, dtype=torch.complex64)))
    optimizer.param_groups[0]["params"][BAD].grad = torch.ones(6, 5, dtype=torch.complex64)


def meta_parameter(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    replace_bad(optimizer, torch.nn.Parameter(torch.ones(6, 5, device="meta")))
    optimizer.param_groups[0]["params"][BAD].grad = torch.ones(6, 5, device="meta")


def gradient_on_another_device(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    replace_bad(optimizer, GradElsewhere(torch.ones(6, 5)))


def expanded_parameter(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    param.data = torch.ones(1, 5).expand(6, 5)


def overlapping_windows(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    param.data = torch.ones(10).as_strided((6, 5), (1, 1))


def integer_parameter(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    bad = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.int8), requires_grad=False)
    bad.grad = torch.ones(6, 5, dtype=torch.int8)
    replace_bad(optimizer, bad)


def float8_parameter(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    param.data = param.data.to(torch.float8_e4m3fn)


def other_shape(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    param.data = torch.ones(5, 6)


def distributed_gradient(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    # As a DTensor has it: by its class.
    param.grad.__class__ = type("Distributed", (Tensor,), {"placements": ()})


FAULTS: dict[Fault, tuple[type[Exception], str]] = {
    sparse_gradient: (RuntimeError, "Adafactor does not support sparse gradients"),
    complex_parameter: (RuntimeError, "Adafactor does not support complex parameters"),
    meta_parameter: (RuntimeError, "meta device"),
    gradient_on_another_device: (RuntimeError, "is on cpu but its gradient is on meta"),
    expanded_parameter: (RuntimeError, "overlapping memory"),
    overlapping_windows: (RuntimeError, "overlapping memory"),
    integer_parameter: (TypeError, "int8"),
    float8_parameter: (TypeError, "float8_e4m3fn"),
    other_shape: (ValueError, r"shape \(5, 6\) but its gradient has shape \(6, 5\)"),
    distributed_gradient: (TypeError, "DTensor"),
}
EVERY_FAULT = pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)


@EVERY_DIALECT
@EVERY_FAULT
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_cannot_be_stepped_is_named_and_stops_the_step(dialect, fault, named, steps):
    optimizer = build(dialect, named, steps)
    fault(optimizer, stepping.params_of(optimizer)[BAD])
    error, text = FAULTS[fault]
    who = re.escape(f"{NAMES[BAD]!r} (#1 in group 0)" if named else "parameter #1 in group 0")
    with stepping.assert_untouched(optimizer), pytest.raises(error, match=text) as caught:
        optimizer.step()
    assert re.search(who, str(caught.value))


@EVERY_DIALECT
def test_the_second_group_is_named(dialect):
    optimizer = build(dialect)
    bad = torch.nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [("late", bad)]})
    bad.grad = torch.eye(3).to_sparse()
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(RuntimeError, match=r"'late' \(#3 in group 1\)"),
    ):
        optimizer.step()


@EVERY_DIALECT
def test_stochastic_rounding_of_float16_is_refused(dialect):
    params = stepping.make_params([(7,)], torch.bfloat16) + stepping.make_params(
        [(3,)], torch.float16
    )
    optimizer = dialect(params, rounding="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(ValueError, match=r"#1 in group 0.*float16"),
    ):
        optimizer.step()


# --- state ---------------------------------------------------------------------------------------

STATE_FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "missing_factor": ("row_var", lambda value: None),
    "other_model": ("col_var", lambda value: torch.zeros(2, 9)),
    "transposed_factor": ("row_var", lambda value: value.T if value.dim() > 1 else value[None]),
    "flat_step": ("step", lambda value: value.reshape(1)),
    "nan_step": ("step", lambda value: torch.tensor(math.nan)),
    "infinite_step": ("step", lambda value: torch.tensor(math.inf)),
    "negative_step": ("step", lambda value: torch.tensor(-1.0)),
    "missing_step": ("step", lambda value: None),
    "list_for_tensor": ("row_var", lambda value: [1.0, 2.0]),
    "text_for_tensor": ("step", lambda value: "three"),
    "integers": ("col_var", lambda value: value.to(torch.int32)),
    "complex": ("col_var", lambda value: value.to(torch.complex64)),
}
# A shared step is kept in the group; its own test is below.
EVERY_STATE_FAULT = pytest.mark.parametrize(
    ("dialect", "entry", "corrupt"),
    [
        pytest.param(dialect, entry, corrupt, id=f"{dialect}-{name}")
        for dialect in DIALECTS
        for name, (entry, corrupt) in STATE_FAULTS.items()
        if entry != "step" or not dialect.counts_globally
    ],
)


def corrupted(own: dict[str, Any], key: str, corrupt: Callable[[Any], Any]) -> dict[str, Any]:
    value = corrupt(own[key])
    return {k: value if k == key else v for k, v in own.items() if k != key or value is not None}


@EVERY_STATE_FAULT
def test_corrupt_state_stops_the_step(dialect, entry, corrupt):
    optimizer = build(dialect)
    bad = stepping.params_of(optimizer)[BAD]
    key = optimizer.layout.key(entry)
    optimizer.state[bad] = corrupted(optimizer.state[bad], key, corrupt)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=repr(key)) as caught:
        optimizer.step()
    assert NAMES[BAD] in str(caught.value)


@EVERY_STATE_FAULT
def test_corrupt_state_is_not_loaded(dialect, entry, corrupt):
    optimizer = build(dialect)
    state_dict = copy.deepcopy(optimizer.state_dict())
    key = optimizer.layout.key(entry)
    state_dict["state"][BAD] = corrupted(state_dict["state"][BAD], key, corrupt)
    state_dict["param_groups"][0]["lr"] = 0.75
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=repr(key)) as caught:
        optimizer.load_state_dict(state_dict)
    assert NAMES[BAD] in str(caught.value)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.counts_globally], ids=str)
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_shared_count_that_is_none_stops_the_step_and_is_not_loaded(dialect, value):
    optimizer = build(dialect)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["step"] = torch.tensor(value)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[0]["step"].fill_(value)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match="step"):
        optimizer.step()


@EVERY_DIALECT
def test_state_on_another_device_stops_the_step(dialect):
    optimizer = build(dialect)
    bad = stepping.params_of(optimizer)[BAD]
    key = optimizer.layout.row_var
    optimizer.state[bad][key] = optimizer.state[bad][key].to("meta")
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(RuntimeError, match=r"'block.0.weight'.*meta"),
    ):
        optimizer.step()


@EVERY_DIALECT
def test_a_state_dict_of_other_groups_is_not_loaded(dialect):
    """With torch's own texts, which its tests look for."""
    optimizer = build(dialect)
    one_more_group = copy.deepcopy(optimizer.state_dict())
    one_more_group["param_groups"].append(copy.deepcopy(one_more_group["param_groups"][0]))
    fewer_params = copy.deepcopy(optimizer.state_dict())
    fewer_params["param_groups"][0]["params"].pop()
    none_at_all = {**optimizer.state_dict(), "param_groups": []}
    for wrong, text in (
        (one_more_group, "different number of parameter groups"),
        (none_at_all, "different number of parameter groups"),
        (fewer_params, "doesn't match the size"),
    ):
        with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(wrong)


@EVERY_DIALECT
def test_the_checkpoint_of_another_optimizer_is_not_loaded(dialect):
    """Unfactored state looks alike, even in its keys; the hyperparameters give it away."""
    optimizer = build(dialect)
    other = torch.optim.AdamW(stepping.make_params(SHAPES))
    stepping.take_steps(other, 1)
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(
            (ValueError, TypeError), match=r"is that of another optimizer: it has .*'betas'"
        ),
    ):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.counts_globally], ids=str)
@pytest.mark.parametrize("damage", ["missing", "fractional", "unequal"])
def test_the_one_count_of_a_checkpoint_must_be_there_and_whole(dialect, damage):
    """Without it the first step would forget every second moment."""
    params = stepping.make_params(SHAPES)
    source = dialect([{"params": params[:1]}, {"params": params[1:]}])
    stepping.take_steps(source, 2)
    saved = copy.deepcopy(source.state_dict())
    if damage == "missing":
        for group in saved["param_groups"]:
            del group["step"]
    else:
        saved["param_groups"][0]["step"] = torch.tensor(2.5 if damage == "fractional" else 7.0)
    if damage == "fractional":
        saved["param_groups"][1]["step"] = torch.tensor(2.5)
    fresh = stepping.make_params(SHAPES)
    optimizer = dialect([{"params": fresh[:1]}, {"params": fresh[1:]}])
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(saved)


def test_an_adamw_checkpoint_of_unfactored_tensors_is_not_loaded():
    """Its state has the very keys and shapes of big_vision's."""
    other = torch.optim.AdamW([torch.ones(8, requires_grad=True)])
    stepping.take_steps(other, 1)
    (big_vision,) = (d for d in DIALECTS if d.name == "big_vision")
    optimizer = big_vision([torch.ones(8, requires_grad=True)], min_dim_size_to_factor=16)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match="'betas'"):
        optimizer.load_state_dict(other.state_dict())


@EVERY_DIALECT
@pytest.mark.parametrize("value", [-0.1, math.nan], ids=str)
def test_a_tensor_lr_is_held_to_the_range_of_a_number(dialect, value):
    with pytest.raises(ValueError, match=r"(?i)rate|lr"):
        dialect(stepping.make_params(SHAPES), **{dialect.lr_argument: torch.tensor(value)})


@EVERY_DIALECT
def test_a_group_that_was_replaced_takes_the_defaults(dialect):
    optimizer = build(dialect)
    stepping.take_steps(optimizer, 1)
    (group,) = optimizer.param_groups
    optimizer.param_groups[0] = {"params": group["params"], "lr": 0.5}
    if dialect.counts_globally:
        with pytest.raises(ValueError, match="no param group has 'step'"):
            optimizer.step()
        optimizer.param_groups[0]["step"] = group["step"]
    stepping.take_steps(optimizer, 1)
    assert optimizer.param_groups[0]["rounding"] == "nearest"


# --- hyperparameters -----------------------------------------------------------------------------

BAD_EXTRAS: dict[str, list[Any]] = {
    "rounding": ["up", None],
    "nonfinite": ["ignore", None],
    "state_dtype": [torch.float16, "bfloat16", torch.int32],
    "seed": [-1, 2**63, 1.5, "1", None, True],
    "max_grad_norm": [0.0, -1.0, math.nan],
    "differentiable": [True],
}
EXTRA_CASES = [(key, value) for key, values in BAD_EXTRAS.items() for value in values]


@EVERY_DIALECT
@pytest.mark.parametrize(("key", "value"), EXTRA_CASES, ids=str)
def test_extras_out_of_range_are_named_wherever_they_come_from(dialect, key, value):
    with pytest.raises(ValueError, match=key):
        build(dialect, **{key: value})
    optimizer = build(dialect)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0][key] = value
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[0][key] = value
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=key):
        optimizer.step()


TORCH_RANGES = [
    ("lr", -0.1, "Learning rate should be >= 0"),
    ("lr", math.nan, "Learning rate should be >= 0"),
    ("lr", torch.ones(2), "Tensor lr must be 1-element"),
    ("beta2_decay", 0.8, "beta2_decay should be <= 0"),
    ("eps", (-1e-30, 1e-3), "epsilon1 should be >= 0"),
    ("eps", (None, -1e-3), "epsilon2 should be >= 0"),
    ("d", 0.5, "Clipping threshold d should be >= 1"),
    ("weight_decay", -0.1, "weight_decay should be >= 0"),
]


@pytest.mark.parametrize(("key", "value", "text"), TORCH_RANGES, ids=str)
def test_hyperparameters_of_torch_out_of_range(key, value, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        build(TORCH, **{key: value})
    optimizer = build(TORCH)
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=re.escape(text)):
        optimizer.add_param_group({"params": [("late", torch.ones(2))], key: value})
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0][key] = value
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=re.escape(text)):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[0][key] = value
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=re.escape(text)):
        optimizer.step()


@pytest.mark.parametrize("key", ["lr", "beta2_decay", "d", "weight_decay", "eps"])
def test_text_in_a_group_is_named(key):
    optimizer = build(TORCH)
    optimizer.param_groups[0][key] = (None, "1e-3") if key == "eps" else "0.1"
    with stepping.assert_untouched(optimizer), pytest.raises(TypeError, match=f"^{key} "):
        optimizer.step()


@pytest.mark.parametrize("key", ["lr", "beta2_decay", "d", "weight_decay"])
def test_none_where_a_number_is_needed_is_named(key):
    with pytest.raises(TypeError, match=f"^{key} "):
        build(TORCH, **{key: None})


# --- backends ------------------------------------------------------------------------------------


@EVERY_DIALECT
def test_an_unknown_backend_is_refused(dialect, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference, .* got 'gpu'"):
        build(dialect, backend="gpu")
    monkeypatch.setenv("FUSED_ADAFACTOR_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"FUSED_ADAFACTOR_BACKEND must be one of .* got 'gpu'"):
        build(dialect)
    build(dialect, backend="reference")  # an explicit request does not ask the environment


@EVERY_DIALECT
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_a_backend_that_cannot_run_is_never_replaced(dialect, steps, source, monkeypatch):
    monkeypatch.setattr(
        backends,
        "availability",
        lambda: dict.fromkeys(backends.NAMES, None) | {"cpp": "no compiler"},
    )
    if source == "environment":
        monkeypatch.setenv("FUSED_ADAFACTOR_BACKEND", "cpp")
    optimizer = build(dialect, steps=0, backend="auto" if source == "environment" else "cpp")
    if steps:
        donor = build(dialect, backend="reference", steps=steps)
        optimizer.load_state_dict(donor.state_dict())
    for act in (optimizer.step, optimizer.explain):
        with (
            stepping.assert_untouched(optimizer),
            pytest.raises(RuntimeError, match=r"'cpp' was asked for, but no compiler"),
        ):
            act()


@pytest.mark.parametrize("name", [n for n, why in backends.availability().items() if why])
def test_what_is_not_available_says_why(name):
    optimizer = build(TORCH, steps=0, backend=name)
    reason = backends.availability()[name]
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match=re.escape(reason)):
        optimizer.step()
