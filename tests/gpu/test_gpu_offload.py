"""CPUOffload from a GPU: copies beside the GPU's own work, each waited for by who needs it.

The step is that of the C++ backend, on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import offload
from fused_adafactor.backends import cpp
from fused_adafactor.offload import CPUOffload
from tests.dialects import DIALECTS, HF, Dialect
from tests.gpu.device import (
    DEVICE,
    ON_GPU,
    allocations,
    grads_on_device,
    occupy,
    params_on_device,
)
from tests.kernels.judged import BF16
from tests.stepping import params_of, same_bits

SHAPES = [(7,), (), (17, 23), (257, 513), (9, 16, 300), (0, 4), (4096, 512)]
OFFLOADS = pytest.mark.parametrize("offload_gradients", [False, True])


@pytest.fixture(autouse=True)
def _native_library() -> None:
    reason = cpp.missing()
    if reason is not None:
        pytest.skip(f"needs the native library: {reason}")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches in every step."""
    monkeypatch.setattr(offload, "_BATCH_BYTES", 100_000)


def offloaded(params: Any, dialect: Dialect = HF, **kwargs: Any) -> Any:
    return CPUOffload(params, dialect.cls, **{"backend": "cpp", **dialect.plain, **kwargs})


def backward(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    torch.autograd.backward([(p * g).sum() for p, g in zip(params, grads, strict=True)])


class SlowWay:
    """Everything is waited for."""

    def __init__(self, params: Sequence[Tensor], dialect: Dialect = HF, **kwargs: Any) -> None:
        self.params = list(params)
        self.masters = [torch.nn.Parameter(p.detach().cpu().float()) for p in params]
        self.optimizer = dialect(self.masters, backend="cpp", **kwargs)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.cpu().float()
        self.optimizer.step()
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)


@OFFLOADS
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_it_is_the_slow_way_bit_for_bit(dialect: Dialect, offload_gradients: bool) -> None:
    """Gradients come late, and are gone as soon as the step has returned."""
    params, slow_params = (params_on_device(SHAPES, BF16) for _ in range(2))
    ours = offloaded(params, dialect, offload_gradients=offload_gradients)
    slow = SlowWay(slow_params, dialect)
    drawn = [grads_on_device(SHAPES, step % 2, BF16) for step in range(4)]
    seen = []
    for grads in drawn:
        occupy()
        backward(params, grads)
        ours.step()
        left = [p.grad for p in params if p.grad is not None]
        assert (left == []) == offload_gradients
        for grad in left:
            grad.fill_(float("nan"))
        ours.zero_grad()
        seen.append([p.detach().clone() for p in params])  # nobody has waited for anything
    for grads, weights in zip(drawn, seen, strict=True):
        slow.step(grads)
        assert all(map(same_bits, weights, slow.params))


def test_gradients_of_several_passes_add_up_on_the_host() -> None:
    """Memory of a gradient is not used again before it has been copied."""
    params, slow_params = (params_on_device(SHAPES, BF16) for _ in range(2))
    ours, slow = offloaded(params, offload_gradients=True), SlowWay(slow_params)
    for step in range(2):
        parts = [grads_on_device(SHAPES, part, BF16) for part in range(3)]
        occupy()
        for grads in parts:
            backward(params, grads)
            assert all(p.grad is None for p in params)
            for p in params:
                torch.full_like(p, float("nan"))  # likely where the gradient was
        ours.step()
        slow.step([(a + b) + c for a, b, c in zip(*parts, strict=True)])
        assert all(map(same_bits, params, slow.params)), f"step {step}"


@OFFLOADS
def test_on_a_side_stream_it_is_in_its_order(offload_gradients: bool) -> None:
    params, slow_params = (params_on_device(SHAPES, BF16) for _ in range(2))
    ours, slow = offloaded(params, offload_gradients=offload_gradients), SlowWay(slow_params)
    side = torch.cuda.Stream() if ON_GPU else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    drawn = [grads_on_device(SHAPES, step % 2, BF16) for step in range(3)]
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for grads in drawn:
            occupy()
            backward(params, grads)
            ours.step()
            ours.zero_grad()
        weights = [p.detach().clone() for p in params]
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    for grads in drawn:
        slow.step(grads)
    assert all(map(same_bits, weights, slow.params))


@OFFLOADS
def test_a_steady_step_allocates_nothing_on_the_device(offload_gradients: bool) -> None:
    params = params_on_device(SHAPES, BF16)
    ours = offloaded(params, offload_gradients=offload_gradients)
    grads = grads_on_device(SHAPES, 0, BF16)
    for _ in range(3):
        backward(params, grads)
        ours.step()
        ours.zero_grad()
    backward(params, grads)
    before = allocations()
    ours.step()
    assert allocations() == before


def test_the_host_has_the_state_and_pinned_copies() -> None:
    params = params_on_device(SHAPES, BF16)
    ours = offloaded(params)
    backward(params, grads_on_device(SHAPES, 0, BF16))
    ours.step()
    assert all(t.device.type == "cpu" for kept in ours.state.values() for t in kept.values())
    pairs = [pair for pair in ours._pairs.values() if pair.param.numel()]
    assert all(pair.mirror.is_pinned() == ON_GPU for pair in pairs)
    assert all(pair.grad.is_pinned() == ON_GPU for pair in pairs)
    for tensor in ours.state_dict()["state"][2].values():
        assert tensor.device.type == "cpu"


@OFFLOADS
def test_copies_and_state_dicts_go_on_like_the_original(offload_gradients: bool) -> None:
    ours = offloaded(params_on_device(SHAPES, BF16), offload_gradients=offload_gradients)
    fresh = offloaded(params_on_device(SHAPES, BF16), offload_gradients=offload_gradients)

    def take(optimizer: Any, steps: int) -> None:
        for step in range(steps):
            backward(params_of(optimizer), grads_on_device(SHAPES, step, BF16))
            optimizer.step()
            optimizer.zero_grad()

    take(ours, 2)
    copied = copy.deepcopy(ours)
    fresh.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for p, q in zip(params_of(fresh), params_of(ours), strict=True):
            p.copy_(q)
    for optimizer in (ours, copied, fresh):
        take(optimizer, 2)
    for other in (copied, fresh):
        assert all(map(same_bits, params_of(ours), params_of(other)))


def test_a_lr_that_is_on_the_device() -> None:
    params, others = (params_on_device(SHAPES, BF16) for _ in range(2))
    ours = offloaded(params, lr=torch.tensor(0.125, device=DEVICE))
    plain = offloaded(others, lr=0.125)
    for optimizer in (ours, plain):
        backward(params_of(optimizer), grads_on_device(SHAPES, 0, BF16))
        optimizer.step()
    assert all(map(same_bits, params, others))


@pytest.mark.parametrize("poison", [None, float("inf")])
@pytest.mark.parametrize("fused", [None, True])
def test_torchs_grad_scaler(fused: bool | None, poison: float | None) -> None:
    ours = offloaded(params_on_device(SHAPES, torch.float32), fused=fused)
    plain = offloaded(params_on_device(SHAPES, torch.float32))
    before = [p.detach().clone() for p in params_of(ours)]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    scaler.scale(torch.ones((), device=DEVICE))
    for optimizer, scale in ((ours, 1024.0), (plain, 1.0)):
        for p, g in zip(
            params_of(optimizer), grads_on_device(SHAPES, 0, torch.float32), strict=True
        ):
            p.grad = g * scale
    if poison is not None:
        params_of(ours)[2].grad.view(-1)[3] = poison
    scaler.step(ours)
    plain.step()
    wanted = params_of(plain) if poison is None else before
    assert all(map(same_bits, params_of(ours), wanted))
