"""Who is timed: ours, the Adafactors that people use instead, and AdamW as a yardstick.

Each is set up for torch's rule where it can be: a fixed lr, times the parameter's scale where the
peer has that, and no momentum.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fused_adafactor import Adafactor
from fused_adafactor.cli.bench.cases import Case
from fused_adafactor.dialects import hf

Params = list[nn.Parameter]
Step = Callable[[], object]

OURS = "fused_adafactor"
TORCH_PATHS = ("torch.optim.Adafactor for-loop", "torch.optim.Adafactor foreach")
YARDSTICK = "torch.optim.AdamW fused"
COMPILED = "torch.compile of torch.optim.Adafactor"
UNSCALED = "fused_adafactor.dialects.hf unscaled"
AGAINST = "fused_adafactor.on "  # and the name of another backend
CLIPPED, TORCH_CLIPPED = "fused_adafactor.max_grad_norm", "clip_grad_norm_ + torch.optim.foreach"

# Above every norm, so that gradients that all share are multiplied by 1, which takes as long.
_MAX_NORM = 1e12
_LR = 1e-3  # so small that hundreds of steps on one gradient leave ordinary numbers
# Every tensor adds its operations to the graph, and compiling takes longer than in proportion.
_MOST_COMPILED_TENSORS = 8


@dataclass(frozen=True)
class Candidate:
    """An optimizer to time.

    Attributes:
        name: For the record.
        make: Makes it from the parameters.
        needs: A distribution that may not be installed, imported by ``make`` only.
        compiled: Its step is compiled first.
        variant: It is ours, or torch's, with other arguments than the one that is compared.
        clips: Gradients are clipped by their common norm before its step.
        capturable: Makes one that steps inside a CUDA graph, if it can do so.
    """

    name: str
    make: Callable[[Params], torch.optim.Optimizer]
    needs: str | None = None
    compiled: bool = False
    variant: bool = False
    clips: bool = False
    capturable: Callable[[Params], torch.optim.Optimizer] | None = None

    @property
    def optional(self) -> bool:
        """Where it fails or takes too long, that is reported and the others are timed."""
        return self.needs is not None or self.compiled or self.variant

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"

    def unfit(self, case: Case) -> str | None:
        """Why it does not step this case; None if it does."""
        if self.compiled and len(case.shapes) > _MOST_COMPILED_TENSORS:
            return f"compiled for at most {_MOST_COMPILED_TENSORS} tensors"
        return None

    def stepper(self, params: Params) -> Step:
        """Make the optimizer, and return what does a step of it."""
        optimizer = self.make(params)
        if not self.clips:
            return _compile(optimizer) if self.compiled else optimizer.step

        def clip_and_step() -> None:
            nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
            optimizer.step()

        return clip_and_step


def candidates(
    backend: str, compiled: bool = False, variants: bool = False, against: str | None = None
) -> tuple[Candidate, ...]:
    """Everything that is timed.

    Args:
        backend: Of ours.
        compiled: torch.compile of torch's too.
        variants: Ours without the parameter's scale and with clipping too, and torch's with it.
        against: Another backend of ours.
    """
    for_loop, foreach = TORCH_PATHS

    def ours(params: Params, on: str = backend, **options: Any) -> torch.optim.Optimizer:
        return Adafactor(params, lr=_LR, backend=on, **options)

    def adamw(params: Params, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=_LR, fused=True, **options)

    everybody: tuple[Candidate, ...] = (
        Candidate(OURS, ours, capturable=partial(ours, capturable=True)),
        Candidate(for_loop, lambda p: torch.optim.Adafactor(p, lr=_LR, foreach=False)),
        Candidate(foreach, lambda p: torch.optim.Adafactor(p, lr=_LR, foreach=True)),
        Candidate(YARDSTICK, adamw, capturable=partial(adamw, capturable=True)),
        Candidate("transformers.Adafactor", _transformers, needs="transformers"),
        Candidate("pytorch_optimizer.AdaFactor", _pytorch_optimizer, needs="pytorch_optimizer"),
        Candidate("timm.optim.Adafactor", _timm, needs="timm"),
        Candidate("timm.optim.AdafactorBigVision", _timm_big_vision, needs="timm"),
    )
    (of_torch,) = (c for c in everybody if c.name == foreach)
    if variants:
        everybody += (
            *_variants(backend),
            replace(of_torch, name=TORCH_CLIPPED, variant=True, clips=True),
        )
    if compiled:
        everybody += (replace(of_torch, name=COMPILED, compiled=True),)
    if against is not None:
        other = partial(ours, on=against)
        capturable = partial(other, capturable=True)
        everybody += (Candidate(f"{AGAINST}{against}", other, variant=True, capturable=capturable),)
    return everybody


def _variants(backend: str) -> tuple[Candidate, ...]:
    def unscaled(params: Params, **options: Any) -> torch.optim.Optimizer:
        options |= {"relative_step": False, "scale_parameter": False}
        return hf.Adafactor(params, lr=_LR, backend=backend, **options)

    def clipped(params: Params, **options: Any) -> torch.optim.Optimizer:
        return Adafactor(params, lr=_LR, backend=backend, max_grad_norm=_MAX_NORM, **options)

    return tuple(
        Candidate(name, make, variant=True, capturable=partial(make, capturable=True))
        for name, make in ((UNSCALED, unscaled), (CLIPPED, clipped))
    )


def _transformers(params: Params) -> torch.optim.Optimizer:
    make = importlib.import_module("transformers.optimization").Adafactor
    return _optimizer(make(params, lr=_LR, relative_step=False, scale_parameter=True))


def _pytorch_optimizer(params: Params) -> torch.optim.Optimizer:
    make = importlib.import_module("pytorch_optimizer").AdaFactor
    options = {"betas": (None, 0.999), "relative_step": False, "scale_parameter": True}
    return _optimizer(make(params, lr=_LR, **options))


def _timm(params: Params) -> torch.optim.Optimizer:
    """Without the parameter's scale, which it leaves out where an lr is given."""
    return _optimizer(_import_from_timm("adafactor").Adafactor(params, lr=_LR))


def _timm_big_vision(params: Params) -> torch.optim.Optimizer:
    make = _import_from_timm("adafactor_bv").AdafactorBigVision
    return _optimizer(make(params, lr=_LR, momentum=None))


def _optimizer(made: Any) -> torch.optim.Optimizer:
    assert isinstance(made, torch.optim.Optimizer)
    return made


def _import_from_timm(module: str) -> types.ModuleType:
    """A module of ``timm.optim``, without timm's models and the torchvision that they need."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = next(iter(spec.submodule_search_locations))
    packages = {"timm": root, "timm.optim": os.path.join(root, "optim")}
    with _put_back("timm"):
        for name, path in packages.items():
            sys.modules[name] = package = types.ModuleType(name)
            package.__path__ = [path]
        return importlib.import_module(f"timm.optim.{module}")


@contextlib.contextmanager
def _put_back(package: str) -> Iterator[None]:
    """Take a package out of the imported modules, and leave them as they were."""

    def take_out() -> dict[str, types.ModuleType]:
        found = [n for n in sys.modules if n == package or n.startswith(package + ".")]
        return {name: sys.modules.pop(name) for name in found}

    before = take_out()
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)


def _compile(optimizer: torch.optim.Optimizer) -> Step:
    """As PyTorch's tutorial on compiled optimizers has it: a function that calls ``step``.

    torch's Adafactor reads its step count from a tensor, which would end the graph at once; so
    this is captured, as the compiler then proposes. What it has to say of itself while compiling
    is no news to who asked for it.
    """
    compiled = torch.compile(lambda: optimizer.step(), fullgraph=False)
    with _silence(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled()
    return compiled


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without warnings, neither Python's nor logged ones."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
