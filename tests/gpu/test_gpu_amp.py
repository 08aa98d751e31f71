"""torch's GradScaler on the GPU: a fused step unscales and skips by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dialects import DIALECTS, Dialect
from tests.gpu.device import DEVICE, built_of, give, grads_on_device, params_on_device
from tests.kernels.judged import F32
from tests.stepping import params_of, same_bits

SHAPES = [(7,), (3, 3), (17, 23), (150, 200), (257, 513)]

EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)


def built(dialect: Dialect, **extras: Any) -> Any:
    return built_of(dialect, {}, params_on_device(SHAPES, F32), **extras)


def scaled_step(optimizer: Any, scaler: Any, step: int, poison: float | None = None) -> None:
    scaler.scale(torch.ones((), device=DEVICE))  # it starts lazily, with its first loss
    give(optimizer, [g * scaler.get_scale() for g in grads_on_device(SHAPES, step, F32)])
    if poison is not None:
        params_of(optimizer)[1].grad.view(-1)[3] = poison
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("capturable", [False, True])
@EVERY_DIALECT
@pytest.mark.usefixtures("launch")
def test_a_scaled_step_is_the_unscaled_one(dialect: Dialect, capturable: bool) -> None:
    scaled = built(dialect, fused=True, capturable=capturable)
    plain = built(dialect, capturable=True)  # its counter on the device too
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step in range(3):
        scaled_step(scaled, scaler, step)
        give(plain, grads_on_device(SHAPES, step, F32))
        plain.step()
    for p, q in zip(params_of(scaled), params_of(plain), strict=True):
        assert same_bits(p, q)  # the scale is a power of two


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@EVERY_DIALECT
def test_an_overflow_skips_the_step(dialect: Dialect, poison: float) -> None:
    optimizer, other = (built(dialect, fused=True) for _ in range(2))
    scaler, quiet = (torch.amp.GradScaler(DEVICE.type, init_scale=1024.0) for _ in range(2))
    scaled_step(optimizer, scaler, 0)
    scaled_step(other, quiet, 0)
    before = [p.detach().clone() for p in params_of(optimizer)]
    scaled_step(optimizer, scaler, 1, poison)
    assert all(map(same_bits, params_of(optimizer), before))
    assert scaler.get_scale() == 512.0
    # The step did not count.
    scaled_step(optimizer, scaler, 2)
    scaled_step(other, quiet, 2)
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert same_bits(p, q)
