"""Poison in uninitialised memory: reading it before writing it then shows."""

import functools
from collections.abc import Callable

import pytest
import torch

# torch's own fill of uninitialised memory works in deterministic mode only, and that mode changes
# which kernels run.
UNINITIALISED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        has_nan = tensor.is_floating_point() or tensor.is_complex()
        if has_nan and tensor.layout is torch.strided:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every function that leaves memory uninitialised fill it with NaN, until undone."""
    for owner, name in UNINITIALISED:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
