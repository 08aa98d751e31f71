"""A steady step waits for nothing and allocates nothing, on whichever stream and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dialects import HF
from tests.gpu.device import (
    BACKEND,
    DEVICE,
    ON_GPU,
    allocations,
    built,
    give,
    grads_on_device,
    no_waiting,
    occupy,
    params_on_device,
)
from tests.kernels.biting import EVERY_RULE
from tests.kernels.judged import BF16, F32
from tests.stepping import assert_same_optimizers, params_of

SHAPES = [(7,), (), (3, 3), (40, 5, 5), (17, 23), (150, 200), (257, 513), (9, 16, 300), (0, 4)]
EXTRAS = pytest.mark.parametrize(
    "extras",
    [
        {},
        {"capturable": True},
        {"nonfinite": "skip"},
        {"capturable": True, "max_grad_norm": 1.0, "nonfinite": "skip"},
        {"capturable": True, "fused": True},
        {"capturable": True, "state_dtype": BF16},
    ],
    ids=lambda extras: "-".join(extras) or "plain",
)
STEPS_BEFORE = 4  # by then everything is compiled, bound and remembered


def fits(rule: str, extras: dict[str, Any]) -> None:
    if "max_grad_norm" in extras and rule.startswith("keras"):
        pytest.skip("keras takes one kind of clipping")


@EXTRAS
@EVERY_RULE
@pytest.mark.usefixtures("launch")
def test_a_steady_step_waits_for_nothing(rule: str, extras: dict[str, Any]) -> None:
    fits(rule, extras)
    optimizer = built(rule, SHAPES, F32, **extras)
    grads = [grads_on_device(SHAPES, step, F32) for step in range(3)]
    if extras.get("fused"):
        optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    for step in range(STEPS_BEFORE):
        give(optimizer, grads[step % 2])
        optimizer.step()
    with no_waiting():
        for step in range(3):  # the gradients move
            give(optimizer, grads[step])
            optimizer.step()


@EVERY_RULE
def test_a_steady_step_allocates_nothing(rule: str) -> None:
    optimizer = built(rule, SHAPES, BF16)
    give(optimizer, grads_on_device(SHAPES, 0, BF16))
    for _ in range(STEPS_BEFORE):
        optimizer.step()
    before = allocations()
    optimizer.step()
    # A norm that is taken of all tensors between the sweeps is a matter of a few small ones.
    assert allocations() - before <= (20 if rule == "keras-everything" else 0)


@EXTRAS
@pytest.mark.parametrize("rule", ["hf", "torch", "hf-momentum"])
def test_a_step_needs_little_memory_beside_its_tensors(rule: str, extras: dict[str, Any]) -> None:
    """From the second step on: less than a sixteenth of the parameters, and 8 MB."""
    if not ON_GPU:
        pytest.skip("needs the allocator of a GPU")
    shapes = [(4096, 4096), (1024, 8192), *[(512, 1024)] * 50, *[(1024,)] * 50]
    optimizer = built(rule, shapes, BF16, **extras)
    give(optimizer, [torch.randn_like(p) for p in params_of(optimizer)])
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    parameter_bytes = sum(p.nbytes for p in params_of(optimizer))
    assert torch.cuda.max_memory_allocated() - before < parameter_bytes / 16 + 8 * 2**20


@pytest.mark.parametrize("rule", ["hf", "torch", "keras-everything"])
@pytest.mark.usefixtures("launch")
def test_steps_on_a_side_stream_are_in_its_order(rule: str) -> None:
    """It waits for the gradients that the stream writes, and the stream waits for it."""
    aside, plain = (built(rule, SHAPES, F32) for _ in range(2))
    buffers = [torch.full_like(g, float("nan")) for g in grads_on_device(SHAPES, 0, F32)]
    drawn = [grads_on_device(SHAPES, step, F32) for step in range(3)]
    side = torch.cuda.Stream() if ON_GPU else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        give(aside, buffers)
        for grads in drawn:
            occupy()
            for buffer, grad in zip(buffers, grads, strict=True):
                buffer.copy_(grad)
            aside.step()
            for buffer in buffers:
                buffer.fill_(float("nan"))  # too early, if the step does not come before it
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    for grads in drawn:
        give(plain, grads)
        plain.step()
    give(aside, drawn[-1])
    assert_same_optimizers(aside, plain)


def test_one_optimizer_on_two_streams_in_turn() -> None:
    """Scratch memory and tickets of a step are not taken before the last one is done with them."""
    turned, plain = (built("hf", SHAPES, F32) for _ in range(2))
    drawn = [grads_on_device(SHAPES, step, F32) for step in range(3)]
    streams = [torch.cuda.Stream() for _ in range(2)] if ON_GPU else [None, None]
    last = torch.cuda.current_stream() if ON_GPU else None
    for step in range(6):
        stream = streams[step % 2]
        if stream is not None:
            stream.wait_stream(last)
        with torch.cuda.stream(stream):
            give(turned, drawn[step % 3])
            turned.step()
        last = stream
        give(plain, drawn[step % 3])
        plain.step()
    if ON_GPU:
        torch.cuda.synchronize()
    assert_same_optimizers(turned, plain)


@pytest.mark.usefixtures("launch")
def test_a_device_that_is_not_current() -> None:
    if not ON_GPU or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    there = built_on(other)
    here = built_on(torch.device("cuda", 0))
    for step in range(3):
        for optimizer in (there, here):
            home = params_of(optimizer)[0].device
            give(optimizer, [g.to(home) for g in grads_on_device(SHAPES, step, F32)])
            optimizer.step()
    for p, q in zip(params_of(there), params_of(here), strict=True):
        assert torch.equal(p.cpu(), q.cpu())
    assert torch.cuda.current_device() == 0


def built_on(home: torch.device) -> Any:
    params = [torch.nn.Parameter(p.detach().to(home)) for p in params_on_device(SHAPES, F32)]
    return HF(params, backend=BACKEND)
