"""The dialects behind one table, for the tests of what they all share."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Dialect:
    """One dialect, and what a test that knows none of them needs to know.

    Attributes:
        name: Its module in `fused_adafactor.dialects`.
        class_name: Its class there.
        plain: Constructor arguments under which a step follows the lr of the param group.
        lr_argument: The constructor's name for that lr.
        variants: Constructor arguments that switch on what the rule has, by a readable name.
        counts_globally: Whether one counter serves all parameters.
        takes_tensor_lr: Whether the lr may be a tensor.
    """

    name: str
    class_name: str = "Adafactor"
    plain: Mapping[str, Any] = field(default_factory=dict)
    lr_argument: str = "lr"
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    counts_globally: bool = False
    takes_tensor_lr: bool = True

    @property
    def cls(self) -> type[torch.optim.Optimizer]:
        """The class itself, imported when asked for."""
        module = importlib.import_module(f"fused_adafactor.dialects.{self.name}")
        return getattr(module, self.class_name)

    def __call__(self, params: Iterable[Any], **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer, with `plain` arguments unless told otherwise; `lr=` whatever its name."""
        if "lr" in kwargs:
            kwargs[self.lr_argument] = kwargs.pop("lr")
        return self.cls(params, **{**self.plain, **kwargs})

    def __str__(self) -> str:
        return self.name


TORCH = Dialect(
    "torch",
    variants={
        "defaults": {},
        "weight_decay": {"lr": 0.05, "weight_decay": 0.1},
        "maximize": {"maximize": True, "weight_decay": 0.01},
        "beta2_decay": {"beta2_decay": -0.5},
        "clip_threshold": {"d": 1.5},
        "eps": {"eps": (1e-30, 1e-2)},
    },
)

HF = Dialect(
    "hf",
    plain={"lr": 1e-2, "relative_step": False},
    variants={
        "defaults": {"lr": None, "relative_step": True},
        "warmup": {"lr": None, "relative_step": True, "warmup_init": True},
        "no_parameter_scale": {"scale_parameter": False, "weight_decay": 0.1},
        "momentum": {"beta1": 0.9, "weight_decay": 0.1, "clip_threshold": 0.5},
        "eps": {"eps": (1e-6, 1e-2), "decay_rate": -0.5},
    },
)
ADAFACTOR_PYTORCH = Dialect(
    "adafactor_pytorch",
    class_name="AdaFactor",
    plain={"lr": 1e-2},
    variants={
        "defaults": {"lr": None},
        "no_momentum": {"beta1": 0.0, "weight_decay": 0.1},
        "amsgrad": {"non_constant_decay": False, "ams_grad": True},
        "constant_decay": {"non_constant_decay": False, "ams_grad": False, "weight_decay": 0.1},
        "unfactored": {"enable_factorization": False},
        "lr_decay_step": {"lr_decay_step": (2, 4), "lr_decay_factor": 0.5},
    },
)
OPTAX = Dialect(
    "optax",
    plain={"learning_rate": 1e-2, "min_dim_size_to_factor": 2},
    lr_argument="learning_rate",
    variants={
        "defaults": {"learning_rate": None, "min_dim_size_to_factor": 128},
        "small_matrices": {},
        "momentum": {"momentum": 0.9, "weight_decay_rate": 1e-3},
        "low_precision_momentum": {"momentum": 0.9, "dtype_momentum": torch.bfloat16},
        "no_clip_no_scale": {"clipping_threshold": None, "multiply_by_parameter_scale": False},
        "decay_offset": {"decay_offset": 2},
    },
    counts_globally=True,
)
BIG_VISION = Dialect(
    "big_vision",
    plain={"lr": 1e-2, "min_dim_size_to_factor": 2},
    variants={
        "defaults": {"min_dim_size_to_factor": 16, "lr": 1.0},
        "small_matrices": {"weight_decay": 0.1},
        "clip": {"clipping_threshold": 0.5, "momentum_dtype": torch.float32},
        "no_momentum": {"momentum": None, "clipping_threshold": 1.0, "unscaled_wd": True},
        "offset_and_cap": {"decay_offset": 2, "beta2_cap": 0.5, "clipping_threshold": 1.0},
    },
)

# Keras' arguments, which every dialect takes, by a readable name.
KERAS_EXTRAS: dict[str, dict[str, Any]] = {
    "clipnorm": {"clipnorm": 0.5, "loss_scale_factor": 4.0},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "average": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
}

KERAS = Dialect(
    "keras",
    plain={"learning_rate": 1e-2},
    lr_argument="learning_rate",
    variants={
        "defaults": {},
        "weight_decay": {"weight_decay": 0.1, "loss_scale_factor": 4.0},
        **KERAS_EXTRAS,
    },
    counts_globally=True,
)

DIALECTS = [TORCH, HF, KERAS, ADAFACTOR_PYTORCH, OPTAX, BIG_VISION]
VARIANTS = [(dialect, name) for dialect in DIALECTS for name in dialect.variants]
