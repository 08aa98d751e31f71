"""Step counters: 0-d tensors, on the host unless the host must not be asked for them."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import add, attrgetter
from typing import Any

import torch
from torch import Tensor

from fused_adafactor.rule import Nonfinite
from fused_adafactor.schedule import Number


def counter(value: float, device: torch.device) -> Tensor:
    """A step counter: 0-d, float32 (float64 if that is the default dtype), as in torch.optim."""
    return torch.tensor(value, dtype=counter_dtype(), device=device)


def counter_dtype() -> torch.dtype:
    """Dtype of a counter: float32, or float64 if that is the default dtype."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def check_count(value: Any, what: str) -> None:
    """Check a step counter, unless that would wait for a device.

    Args:
        value: A tensor, or a number where a peer keeps its step as one.
        what: The counter, for the message.

    Raises:
        ValueError: It is not one number, or none that counts steps.
    """
    if not isinstance(value, Tensor | int | float) or torch.as_tensor(value).dim() > 0:
        raise ValueError(f"{what} is {value!r}; expected one number, the count of steps")
    if torch.as_tensor(value).device.type != "cpu":
        return
    if not 0 <= float(value) < math.inf or float(value) % 1:
        raise ValueError(f"{what} is {float(value)}; expected a count of steps")


def counter_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Where a step counter lives: on the host, unless the host must not be asked for it."""
    on_device = group["capturable"] or group["fused"] or group["nonfinite"] == Nonfinite.SKIP.value
    return param.device if on_device else torch.device("cpu")


def next_call(group: Mapping[str, Any], counted: Tensor | None, param: Tensor) -> Number:
    """Number of the coming call, from 1: a float, or a 0-d float64 tensor where t is one.

    The first call is no exception, so that what cannot follow a device counter is refused at once.
    """
    device = counter_device(group, param) if counted is None else counted.device
    if device.type == "cpu" and not group["capturable"]:
        return 1.0 if counted is None else float(counted) + 1.0
    if counted is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return counted.double() + 1.0


def number_of(lr: float | Tensor | None, call: Number) -> Number | None:
    """The lr in float64: a number, or a tensor where it lies on a device or beside the call's."""
    if not isinstance(lr, Tensor):
        return lr
    together = isinstance(call, Tensor) and call.device == lr.device
    if lr.device.type == "cpu" and not together:
        return float(lr)
    return lr.reshape(()).double()


_BOXES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Cells:
    """0-d tensors of one device that are read, counted up and written all at once.

    On the host that is done in their memory: torch takes longer to add 1 to a number than the step
    of a small tensor takes. So they must stay where they are for as long as this is used.

    Args:
        tensors: On one device, each once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Find their memory."""
        self.tensors = list(tensors)
        self._boxes: list[Any] | None = None
        self._row: Tensor | None = None
        self._views: list[Tensor] = []
        if all(map(_is_plain, tensors)):
            self._boxes = [_BOXES[t.dtype].from_address(t.data_ptr()) for t in tensors]

    def read(self) -> list[float]:
        """Their values; waits for a device."""
        if self._boxes is None:
            return list(map(float, self.tensors))
        return list(map(attrgetter("value"), self._boxes))

    def advance(self, amounts: Tensor | None) -> None:
        """Add 1 to all, or a vector of bool, without asking a device."""
        if amounts is not None:
            torch._foreach_add_(self.tensors, self._each_of(amounts))
        elif self._boxes is None:
            torch._foreach_add_(self.tensors, 1)
        else:
            ahead = map(add, self.read(), repeat(1.0))
            deque(map(setattr, self._boxes, repeat("value"), ahead), maxlen=0)
            torch.autograd.graph.increment_version(self.tensors)

    def write(self, values: Tensor) -> None:
        """Set them to a vector, without asking a device."""
        if self._boxes is not None and values.device.type == "cpu" and values.is_contiguous():
            numbers = (_BOXES[values.dtype] * len(self._boxes)).from_address(values.data_ptr())
            deque(map(setattr, self._boxes, repeat("value"), numbers), maxlen=0)
            torch.autograd.graph.increment_version(self.tensors)
            return
        torch._foreach_copy_(self.tensors, self._each_of(values))

    def _each_of(self, values: Tensor) -> list[Tensor]:
        """The elements of a vector, as tensors of the dtype that these here have.

        Of one dtype, a device takes all at once. Views take longer to make than to fill, so these
        are made once.
        """
        if self._row is None:
            self._row = values.to(self.tensors[0].dtype, copy=True)
            self._views = list(self._row.unbind())
        self._row.copy_(values)
        return self._views


class Clock:
    """What the tensors of a cohort read their step from.

    Args:
        counters: Theirs, each once.
        on_host: Whether they are at the same step, which is a Python number.
    """

    def __init__(self, counters: Sequence[Tensor], on_host: bool) -> None:
        """Find their memory."""
        self._cells = Cells(counters)
        self._on_host = on_host

    def next_call(self) -> Number | None:
        """Number of the coming call; None where the counters have parted, or count no steps.

        Where they are on a device, a vector with one value for each.
        """
        if not self._on_host:
            return torch.stack(self._cells.tensors).double() + 1.0
        counts = self._cells.read()
        count = counts[0]
        together = counts.count(count) == len(counts)
        return count + 1.0 if together and 0 <= count < math.inf and not count % 1 else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than a number in the host's memory."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype in _BOXES
        and not tensor.is_inference()
    )
