"""Tensors that have one half on a device and one on the host, and the copies between these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Lane:
    """Copies in one direction between the host and a device, one after the other.

    On a CPU there is no device to go on meanwhile: a copy is done when it has been asked for.

    Args:
        device: Of the tensors that are not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        """Make a stream, where a device has streams."""
        self.device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def follow(self) -> None:
        """Let what is copied from now on come after all that the device has been told so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self.device))

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy, without waiting. Memory of the device is not reused before that is done."""
        if self._stream is None:
            to.copy_(source)
            return
        with self._stream:
            to.copy_(source, non_blocking=True)
        for tensor in (to, source):
            if tensor.device == self.device:
                tensor.record_stream(self._stream)

    def mark(self) -> torch.Event | None:
        """An event that has come when all copies so far are done; None if they are."""
        return None if self._stream is None else self._stream.record_event()

    def lead(self) -> None:
        """Let what the device is told from now on come after all copies so far."""
        if self._stream is not None:
            torch.accelerator.current_stream(self.device).wait_stream(self._stream)


def host_memory(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory of the host, of a kind that a device can copy to and from while others go on."""
    return torch.empty_strided(
        shape, strides, dtype=dtype, device="cpu", pin_memory=device.type != "cpu"
    )


def wait_for(event: torch.Event | None) -> None:
    """Make the host wait for an event; None has come already."""
    if event is not None:
        event.synchronize()


@dataclass(kw_only=True, eq=False)
class Pair:
    """A parameter and its master.

    Attributes:
        param: On its device.
        master: Of the optimizer on the CPU.
        mirror: Host memory, dtype of the parameter: what the parameter is to be, or is; None until
            the optimizer on the CPU can say how it is laid out.
        grad: Host memory for the gradient; None before there is one.
        late: The same, for one that comes while ``grad`` has another.
        has_grad: Whether there is a gradient in ``grad``.
        has_late: Whether there is one in ``late``, to be added to it.
        arrived: When what was last copied to either is there.
        sent: When the mirror has been copied to the parameter.
        seen: Address and version of the parameter when it and its master were last the same; None
            where that is not known.
        stepped: Version of the master at that time.
    """

    param: Tensor
    master: Tensor
    mirror: Tensor | None = None
    grad: Tensor | None = None
    late: Tensor | None = None
    has_grad: bool = False
    has_late: bool = False
    arrived: torch.Event | None = None
    sent: torch.Event | None = None
    seen: tuple[int, int] | None = None
    stepped: int = field(init=False)

    def __post_init__(self) -> None:
        """Nothing has been stepped yet."""
        self.stepped = self.master._version

    def note(self) -> None:
        """Parameter and master are the same now."""
        self.seen = (self.param.data_ptr(), self.param._version)
        self.stepped = self.master._version

    @property
    def has_changed(self) -> bool:
        """Whether somebody else has written the parameter, as far as autograd can tell."""
        return self.seen != (self.param.data_ptr(), self.param._version)

    def collect(self, lane: Lane, adds: bool) -> None:
        """Copy the gradient to the host.

        Args:
            lane: The way there.
            adds: To what there is already; otherwise it is replaced.
        """
        grad = self.param.grad
        assert grad is not None
        if adds and self.has_grad:
            self.settle()
            self.late = self._fitting(self.late, grad)
            lane.copy(self.late, grad)
            self.has_late = True
        else:
            self.grad = self._fitting(self.grad, grad)
            lane.copy(self.grad, grad)
            self.has_grad, self.has_late = True, False
        self.arrived = lane.mark()

    def settle(self) -> None:
        """Wait for the gradient, and add up what there is of it."""
        wait_for(self.arrived)
        if self.has_late:
            assert self.grad is not None
            assert self.late is not None
            self.grad.add_(self.late)
        self.arrived, self.has_late = None, False

    def _fitting(self, buffer: Tensor | None, grad: Tensor) -> Tensor:
        """Host memory for a gradient: the same as long as that will do."""
        if buffer is not None and (buffer.dtype, buffer.shape) == (grad.dtype, grad.shape):
            return buffer
        return host_memory(grad.shape, self.master.stride(), grad.dtype, grad.device)
