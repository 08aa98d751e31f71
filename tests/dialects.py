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

DIALECTS = [TORCH]
