"""Keras' arguments: their checks, with Keras' texts, and the forms that a learning rate has."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fused_adafactor.arguments import is_negative, require_given, require_numbers

LearningRate: TypeAlias = float | Tensor | Callable[..., Any]

# Keras' arguments that are keys of a param group; learning_rate is the key 'lr'.
CONFIG = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "beta_2_decay",
    "epsilon_1",
    "epsilon_2",
    "clip_threshold",
    "relative_step",
)


def check_learning_rate(learning_rate: Any) -> None:
    """Check the form of the constructor's learning rate; its value is for ``check``.

    Raises:
        ValueError: None of Keras' forms, with Keras' text: an int is none.
    """
    if not isinstance(learning_rate, float | Tensor) and not callable(learning_rate):
        raise ValueError(
            "Argument `learning_rate` should be float, or an instance of LearningRateSchedule, "
            "or a callable (that takes in the current iteration value and returns the "
            "corresponding learning rate value). "
            f"Received instead: learning_rate={learning_rate}"
        )


def check(group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a param group.

    Raises:
        TypeError: One is no number where only a number will do.
        ValueError: One is out of range, with Keras' texts where Keras checks it.
    """
    lr = group["lr"]
    names = ("beta_2_decay", "epsilon_1", "epsilon_2", "clip_threshold")
    required = {"lr": lr, **{name: group[name] for name in names}}
    numbers = {**required, "lr": None if callable(lr) else lr}
    require_numbers(**numbers, weight_decay=group["weight_decay"])
    require_given(**required)
    if callable(lr):
        takes_iteration(lr)
    elif isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    elif is_negative(lr):
        raise ValueError(f"learning_rate should be >= 0 but is: {lr}")
    _check_ranges(group)


def _check_ranges(group: Mapping[str, Any]) -> None:
    if not group["beta_2_decay"] <= 0.0:
        raise ValueError(f"beta_2_decay should be <= 0 but is: {group['beta_2_decay']}")
    for name in ("epsilon_1", "epsilon_2"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} should be >= 0 but is: {group[name]}")
    if not group["clip_threshold"] > 0.0:
        raise ValueError(f"clip_threshold should be > 0 but is: {group['clip_threshold']}")
    if group["weight_decay"] is not None and not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay should be >= 0 or None but is: {group['weight_decay']}")


def is_schedule(lr: Any) -> bool:
    """Whether this is a ``LearningRateSchedule``, of whichever Keras, without importing one."""
    return any(base.__name__ == "LearningRateSchedule" for base in type(lr).__mro__)


def takes_iteration(lr: Callable[..., Any]) -> bool:
    """Whether a function is to be called with the iteration: it has one required parameter.

    Raises:
        ValueError: It has more.
    """
    if is_schedule(lr):
        return True
    try:
        parameters = inspect.signature(lr).parameters.values()
    except ValueError:  # a builtin that does not tell
        return True
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise ValueError(
            "learning_rate should take the iteration, or nothing, but takes "
            f"{len(required)} arguments: {', '.join(required)}"
        )
    return bool(required)


def value_of(lr: Callable[..., Any], iteration: int | None) -> float | Tensor:
    """The number that a function returns for this iteration; a tensor stays where it is.

    Args:
        lr: One that ``check`` has passed.
        iteration: Count of earlier calls; None where it is on a device, which is not waited for.

    Raises:
        TypeError: It returned no number.
        ValueError: It returned a negative number, NaN, or a tensor of more numbers than one; or it
            wants the iteration and that is on a device.
    """
    if not takes_iteration(lr):
        return _returned(lr(), iteration)
    if iteration is None:
        raise ValueError(
            "learning_rate is a Python function of the iteration, but capturable=True, "
            "fused=True and nonfinite='skip' keep the count of iterations on the device. Give "
            "learning_rate as a number, or switch these off"
        )
    return _returned(lr(iteration), iteration)


def _returned(value: Any, iteration: int | None) -> float | Tensor:
    """What a function returned, as a number, checked as a given number would be."""
    what = f"learning_rate returned {value!r}"
    if iteration is not None:
        what += f" for iteration {iteration}"
    if isinstance(value, Tensor):
        number: float | Tensor = value.detach()
        if value.numel() != 1:
            raise ValueError(f"{what}; expected one number")
        if value.is_complex():
            raise TypeError(f"{what}; expected a real number")
    else:
        try:
            # item() first: numpy and jax have scalars of one element that float() warns of.
            plain = value.item() if hasattr(value, "item") else value
            # float() would read text, and count True as 1.
            if isinstance(plain, str | bytes | bytearray | bool):
                raise TypeError("no number")
            number = float(plain)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what}; expected a number") from error
    if is_negative(number):
        raise ValueError(f"{what}; expected a number >= 0")
    return number


def _keras_schedules() -> Any:
    """Keras' module of schedules; imported only where a schedule of Keras is at hand."""
    return importlib.import_module("keras").optimizers.schedules


def saved_learning_rate(lr: LearningRate) -> Any:
    """A learning rate as Keras' configurations have it; a function stays as it is."""
    if is_schedule(lr):
        return _keras_schedules().serialize(lr)
    return float(lr) if isinstance(lr, Tensor) else lr


def loaded_learning_rate(saved: Any) -> Any:
    """The learning rate of a configuration of Keras.

    Raises:
        ImportError: It is a schedule of Keras and Keras is not installed.
    """
    return _keras_schedules().deserialize(saved) if isinstance(saved, dict) else saved
