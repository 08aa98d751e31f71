"""What is tested on which device, and what a GPU needs that a CPU does not.

``FUSED_ADAFACTOR_TEST_DEVICE=cpu FUSED_ADAFACTOR_TEST_BACKEND=cpp`` takes the tests through a CPU,
where a capture is the function itself and nothing has to be waited for: so they are tried out
without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.dialects import TORCH, Dialect
from tests.kernels.biting import RULES, draw, judged
from tests.kernels.judged import Judged, eps_of, params_in
from tests.stepping import contiguous, params_of

Layout = Callable[[Tensor], Tensor]
Shapes = Sequence[tuple[int, ...]]

DEVICE = torch.device(os.environ.get("FUSED_ADAFACTOR_TEST_DEVICE", "cuda"))
BACKEND = os.environ.get("FUSED_ADAFACTOR_TEST_BACKEND", "triton")
# Fresh numbers in every run; the header of the run says which, to take them again.
SEED = int(os.environ.get("FUSED_ADAFACTOR_TEST_SEED", int.from_bytes(os.urandom(3), "big")))
ON_GPU = DEVICE.type == "cuda"
LAUNCH = "FUSED_ADAFACTOR_LAUNCH"
LAUNCHES = ("persistent", "phases")


def missing() -> str | None:
    """Why nothing can be tested here; None if it can."""
    if ON_GPU and not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    return None


def moved(lay_out: Layout = contiguous) -> Layout:
    """Moves values to the device, where they are laid out."""
    return lambda values: lay_out(values.to(DEVICE))


def params_on_device(
    shapes: Shapes, dtype: torch.dtype, lay_out: Layout = contiguous
) -> list[Tensor]:
    return params_in(shapes, dtype, moved(lay_out), seed=SEED)


def grads_on_device(
    shapes: Shapes, step: int, dtype: torch.dtype, lay_out: Layout = contiguous
) -> list[Tensor]:
    return [moved(lay_out)(g) for g in draw(shapes, step, dtype, seed=SEED)]


def judged_on_device(
    rule: str, shapes: Shapes, dtype: torch.dtype, lay_out: Layout = contiguous, **extras: Any
) -> Judged:
    return judged(rule, params_on_device(shapes, dtype, lay_out), backend=BACKEND, **extras)


def built(rule: str, shapes: Shapes, dtype: torch.dtype, **extras: Any) -> Any:
    """An optimizer of a rule; torch's eps1 is that of the dtype."""
    dialect, options = RULES[rule]
    return built_of(dialect, options, params_on_device(shapes, dtype), **extras)


def built_of(
    dialect: Dialect, options: Mapping[str, Any], params: Sequence[Tensor], **extras: Any
) -> Any:
    eps = eps_of(params[0].dtype) if dialect is TORCH else {}
    return dialect(params, **{"backend": BACKEND, **eps, **options, **extras})


def give(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None]) -> None:
    """Set the gradients, in any dtype."""
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad_dtype = None
        p.grad = g


def captured(optimizer: Any) -> Callable[[], object]:
    """A step that was taken down and not taken, to be replayed on the gradients of now."""
    if not ON_GPU:
        grads = [p.grad for p in params_of(optimizer)]

        def step_on_those() -> None:
            give(optimizer, grads)
            optimizer.step()

        return step_on_those
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def allocations() -> int:
    """How many blocks torch's allocator has handed out so far."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"]) if ON_GPU else 0


def occupy(milliseconds: int = 20) -> None:
    """Keep the current stream busy, so that what does not wait for it comes too early."""
    if ON_GPU:
        block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)  # 0.1 ms to fill
        for _ in range(10 * milliseconds):
            block.zero_()
