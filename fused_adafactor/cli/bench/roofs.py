"""The floor under every step: the time to read g, read p and write p, at the memory's speed.

It is a matter of bytes, not of dtypes: adding in bfloat16 keeps a CPU busy with converting, at a
quarter of the memory's speed, so the bytes are read as wider numbers. A case of many tensors is
one flat tensor here. There are several kinds, and the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_adafactor.cli.bench.peers import Step

_SMALL = 1e-3


def _add(p: Tensor, g: Tensor) -> Tensor:
    return torch.add(p, g, alpha=-_SMALL, out=p)


def _xor(p: Tensor, g: Tensor) -> Tensor:
    return torch.bitwise_xor(p, g, out=p)


_KINDS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
    "roof float32 add": (torch.float32, _add),
    "roof int64 xor": (torch.int64, _xor),
}
ROOFS = tuple(_KINDS)


def floor_bytes(parameter_bytes: int) -> int:
    """What the floor moves: read g, read p, write p."""
    return 3 * parameter_bytes


def roofs(parameter_bytes: int, device: torch.device, shared: bool) -> dict[str, Step]:
    """A step of each kind, by name.

    Args:
        parameter_bytes: Of all parameters of a case; rounded up to whole numbers.
        device: Where.
        shared: All kinds on the same memory, as where the candidates share theirs.
    """
    steps: dict[str, Step] = {}
    memory = _draw(parameter_bytes, device)
    for name, (dtype, kind) in _KINDS.items():
        p, g = (tensor.view(dtype) for tensor in memory)
        steps[name] = lambda kind=kind, p=p, g=g: kind(p, g)  # type: ignore[misc]
        if not shared:
            memory = _draw(parameter_bytes, device)
    return steps


def _draw(parameter_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ordinary float32 numbers, an even count of them, so that they are whole int64 too."""
    numbers = 2 * -(-parameter_bytes // 8)
    p, g = torch.rand(2, numbers, device=device).add_(1).unbind()
    return p.clone(), g.clone()
