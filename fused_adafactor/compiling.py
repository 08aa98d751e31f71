"""What torch.compile does not look into: a step has nothing in it that could be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """A function that is always called as it is: where it is compiled, a call is a graph break.

    Loads torch's compiler, which every optimizer does when it is made, but ``import torch`` does
    not.
    """
    if hasattr(function, "_torchdynamo_disable"):
        return function
    disable = cast(Callable[..., _Function], torch.compiler.disable)
    return disable(function, reason="a step of fused_adafactor is native code already")
