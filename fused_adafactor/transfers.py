"""Copies between a device and the host, beside what the device does otherwise."""

from __future__ import annotations

from collections.abc import Sequence

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
