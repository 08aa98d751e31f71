"""What is stepped: shapes of models and of layers that people train, and their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]

_FULL = (torch.float32,)
_LOW = (torch.bfloat16,)
_BOTH = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Parameters to step.

    Attributes:
        name: For ``--case`` and the tables.
        group: Cases of a kind, which ``--case`` takes too.
        shapes: One per tensor.
        dtypes: Measured one after the other.
        full: Too big, or too like another, for every day: measured where it is asked for.
    """

    name: str
    group: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = _FULL
    full: bool = False

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Normally distributed tensors of a case, the same for everybody who gives this seed.

    A GPU draws its own: a gigabyte takes a CPU longer than all that is then measured.
    """
    home = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(home).manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, device=home) for shape in case.shapes)
    return [tensor.to(device, dtype) for tensor in drawn]


def _gpt2() -> tuple[Shape, ...]:
    norm = ((768,), (768,))
    attention = ((768, 2304), (2304,), (768, 768), (768,))
    mlp = ((768, 3072), (3072,), (3072, 768), (768,))
    block = (*norm, *attention, *norm, *mlp)
    return ((50257, 768), (1024, 768), *block * 12, *norm)


def _t5_base() -> tuple[Shape, ...]:
    norm = (768,)
    attention = ((768, 768),) * 4
    mlp = ((3072, 768), (768, 3072))
    encoder = (*attention, norm, *mlp, norm)
    decoder = (*attention, norm, *attention, norm, *mlp, norm)
    relative_positions = (32, 12)
    rest = (relative_positions, norm)
    return ((32128, 768), *encoder * 12, *rest, *decoder * 12, *rest)


def _llama_layer() -> tuple[Shape, ...]:
    attention = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096))
    mlp = ((14336, 4096), (14336, 4096), (4096, 14336))
    return (*attention, *mlp, (4096,), (4096,))


def _conv(out: int, into: int, kernel: int = 3) -> Shape:
    return (out, into, kernel, kernel)


def _sdxl_outer_convs() -> tuple[Shape, ...]:
    """The two outer levels of SDXL's UNet on their ways down and up, and their 1x1 skips."""
    down = (_conv(320, 4), *(_conv(320, 320),) * 5, _conv(640, 320), *(_conv(640, 640),) * 4)
    up = (_conv(320, 960), *(_conv(320, 640),) * 2, *(_conv(320, 320),) * 3, _conv(4, 320))
    skips = (_conv(640, 320, 1), _conv(320, 960, 1), *(_conv(320, 640, 1),) * 2)
    return (*down, *up, *skips)


CASES = (
    Case("512x512", "matrix", ((512, 512),), _BOTH, full=True),
    Case("1024x1024", "matrix", ((1024, 1024),), _BOTH),
    Case("2048x2048", "matrix", ((2048, 2048),), _BOTH, full=True),
    Case("4096x4096", "matrix", ((4096, 4096),), _BOTH),
    Case("4096x14336", "matrix", ((4096, 14336),), _LOW),
    Case("16384x16384", "matrix", ((16384, 16384),), _BOTH, full=True),
    Case("gpt2-124m", "model", _gpt2(), _BOTH),
    Case("t5-base", "model", _t5_base(), _BOTH, full=True),
    Case("llama3-8b-layer", "model", _llama_layer(), _LOW, full=True),
    Case("sdxl-convs", "conv", tuple(_conv(n, n) for n in (320, 640, 1280))),
    Case("sdxl-outer-convs", "conv", _sdxl_outer_convs(), full=True),
    Case("stack-8x1024x1024", "stack", ((8, 1024, 1024),)),
    Case("stack-8x1024x4096", "stack", ((8, 1024, 4096),), _BOTH, full=True),
    Case("300-vectors-1024", "vector", ((1024,),) * 300),
    Case("lora-32-pairs", "lora", ((16, 4096), (4096, 16)) * 32),
)

# What a GPU is measured by, beside all of the above, and only where it is asked for. The targets
# come first, since its time may be short. Megabytes are of the parameters in bfloat16: far below,
# near and far above what a cache holds.
GPU_CASES = (
    Case("gpu-32mb", "gpu", ((4096, 4096),), _LOW),
    Case("gpu-117mb", "gpu", ((4096, 14336),), _LOW),
    Case("gpu-300x1mb", "gpu", ((512, 1024),) * 300, _LOW),
    Case("gpu-300-vectors", "gpu", ((1024,),) * 300, _LOW),
    Case("gpu-gpt2-124m", "gpu", _gpt2(), _LOW),
    Case("gpu-llama3-8b-layer", "gpu", _llama_layer(), _LOW),
    Case("gpu-1gb", "gpu", ((32768, 16384),), _LOW),
    Case("gpu-1mb", "gpu", ((512, 1024),), _LOW),
)


def names(cases: tuple[Case, ...]) -> list[str]:
    """What ``--case`` takes: groups first, then cases."""
    return [*dict.fromkeys(case.group for case in cases), *(case.name for case in cases)]


def choose(cases: tuple[Case, ...], wanted: list[str] | None, full: bool) -> list[Case]:
    """The cases that were asked for.

    Args:
        cases: All there are.
        wanted: Names of cases, and of groups; None for the daily ones.
        full: Also the big ones, of the groups or of all.
    """
    asked = wanted or names(cases)
    by_name = set(wanted or ())
    return [
        case
        for case in cases
        if case.name in by_name or (case.group in asked and (full or not case.full))
    ]
