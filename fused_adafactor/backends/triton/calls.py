"""Which functions of the kernel are called, and which are inlined, by the make of the GPU.

In one function, NVIDIA's compiler keeps the constants of every branch in registers through all
others. On AMD a call takes private memory for a frame, also where no register is spilled, and the
sweeps have the largest frames.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

_PACKAGE = __name__.rpartition(".")[0]
_sweeps: list[Any] = []


def sweep(function: Callable[..., Any]) -> Any:
    """A sweep over the elements of a unit: called on NVIDIA, inlined on AMD."""
    jitted = triton.jit(noinline=torch.version.hip is None)(function)
    _sweeps.append(jitted)
    return jitted


@contextlib.contextmanager
def calls_as_on(make: str) -> Iterator[None]:
    """Compile as for another make of GPU than that of the installed torch.

    Args:
        make: ``cuda`` or ``hip``.
    """
    before = [each.noinline for each in _sweeps]
    _decide([make == "cuda"] * len(_sweeps))
    try:
        yield
    finally:
        _decide(before)


def _decide(called: list[bool]) -> None:
    if called == [each.noinline for each in _sweeps]:
        return
    for each, is_called in zip(_sweeps, called, strict=True):
        each.noinline = is_called
    # Whoever calls a function has been hashed with what that was.
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            for each in vars(module).values():
                if isinstance(each, JITFunction):
                    each.hash = None
