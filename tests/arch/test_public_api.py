"""What users hold on to: names, constructor arguments and defaults. A change here is a decision."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import get_args, get_type_hints

import pytest
import torch

import fused_adafactor
from fused_adafactor.arguments import EXTRA_DEFAULTS

CONSTRUCTORS = {
    "torch.Adafactor": (
        "params, lr=0.01, beta2_decay=-0.8, eps=(None, 0.001), d=1.0, weight_decay=0.0, *, "
        "foreach=None, maximize=False, **extras"
    ),
    "hf.Adafactor": (
        "params, lr=None, eps=(1e-30, 0.001), clip_threshold=1.0, decay_rate=-0.8, beta1=None, "
        "weight_decay=0.0, scale_parameter=True, relative_step=True, warmup_init=False, **extras"
    ),
    "keras.Adafactor": (
        "params, learning_rate=0.001, beta_2_decay=-0.8, epsilon_1=1e-30, epsilon_2=0.001, "
        "clip_threshold=1.0, relative_step=True, weight_decay=None, clipnorm=None, "
        "clipvalue=None, global_clipnorm=None, use_ema=False, ema_momentum=0.99, "
        "ema_overwrite_frequency=None, loss_scale_factor=None, gradient_accumulation_steps=None, "
        "name=None, **extras"
    ),
    "adafactor_pytorch.AdaFactor": (
        "params, lr=None, beta1=0.9, beta2=0.999, eps1=1e-30, eps2=0.001, cliping_threshold=1, "
        "non_constant_decay=True, enable_factorization=True, ams_grad=True, weight_decay=0, "
        "lr_decay_step=None, lr_decay_factor=None, *, clipping_threshold=None, **extras"
    ),
    "optax.Adafactor": (
        "params, learning_rate=None, min_dim_size_to_factor=128, decay_rate=0.8, decay_offset=0, "
        "multiply_by_parameter_scale=True, clipping_threshold=1.0, momentum=None, "
        "dtype_momentum=torch.float32, weight_decay_rate=None, eps=1e-30, factored=True, "
        "weight_decay_mask=None, **extras"
    ),
    "big_vision.Adafactor": (
        "params, lr=1.0, min_dim_size_to_factor=16, decay_rate=0.8, decay_offset=0, "
        "beta2_cap=0.999, momentum=0.9, momentum_dtype=torch.bfloat16, eps=None, "
        "weight_decay=0.0, clipping_threshold=None, unscaled_wd=False, caution=False, "
        "corrected_weight_decay=False, **extras"
    ),
}


def _class(name: str) -> type:
    module, attribute = name.split(".")
    found = getattr(importlib.import_module(f"fused_adafactor.dialects.{module}"), attribute)
    assert isinstance(found, type)
    return found


def _arguments(called: Callable[..., object]) -> str:
    parameters = list(inspect.signature(called).parameters.values())
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)).strip("()")


def test_the_front_door() -> None:
    assert fused_adafactor.__all__ == ["Adafactor", "convert_state_dict"]
    assert fused_adafactor.Adafactor is _class("torch.Adafactor")


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructor(name: str) -> None:
    assert _arguments(_class(name)) == CONSTRUCTORS[name]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_dialect_is_a_torch_optimizer_with_the_same_extras(name: str) -> None:
    optimizer = _class(name)([torch.zeros(2, requires_grad=True)], seed=3, rounding="kahan")
    assert isinstance(optimizer, torch.optim.Optimizer)
    (group,) = optimizer.param_groups
    assert set(EXTRA_DEFAULTS) <= set(group)
    assert (group["seed"], group["rounding"]) == (3, "kahan")
    assert optimizer.backend == "auto"
    assert isinstance(optimizer.explain(), str)


METHODS = {
    "step_param": "self, p, group=None",
    "step_parameter": "self, p, group, i",
    "enable_backward_step": "self, model=None",
    "explain": "self",
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_dialect_has_the_same_methods_beyond_torchs(name: str) -> None:
    assert {method: _arguments(getattr(_class(name), method)) for method in METHODS} == METHODS


def test_the_extras_have_the_documented_defaults() -> None:
    assert EXTRA_DEFAULTS == {
        "rounding": "nearest",
        "seed": 0,
        "state_dtype": None,
        "momentum_dtype": None,
        "max_grad_norm": None,
        "nonfinite": "propagate",
        "capturable": False,
        "fused": None,
        "foreach": None,
        "differentiable": False,
        "flat_parameters": "refuse",
        "param_rms": "read",
        "clipnorm": None,
        "clipvalue": None,
        "global_clipnorm": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "ema_overwrite_frequency": None,
        "loss_scale_factor": None,
        "gradient_accumulation_steps": None,
    }


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_extra_is_an_argument_of_every_dialect(name: str) -> None:
    """Each once: what its peer has too is an argument of its own."""
    parameters = inspect.signature(_class(name)).parameters
    (extras,) = get_args(get_type_hints(_class(name).__init__, include_extras=True)["extras"])
    assert set(parameters) & set(get_type_hints(extras)) == set()
    assert {"backend", *EXTRA_DEFAULTS} <= set(parameters) | set(get_type_hints(extras))


def test_torchs_own_arguments_and_defaults_are_ours() -> None:
    theirs = inspect.signature(torch.optim.Adafactor).parameters
    ours = inspect.signature(fused_adafactor.Adafactor).parameters
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
