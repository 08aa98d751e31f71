"""A tensor of more than 2^31 elements, sampled rows of it against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dialects import HF
from tests.gpu.device import BACKEND, DEVICE, ON_GPU
from tests.kernels.judged import BF16, F32, growth, unit

# More elements than an int32 counts, in rows of one tile, of several, and of an odd number.
SHAPES = [(131_073, 16_384), (65_537, 32_769)] if ON_GPU else [(1025, 128), (257, 129)]
ROWS_AT_ONCE = 1024
LR, EPS1, EPS2 = 1e-2, 1e-30, 1e-3


def blocks(tensor: Tensor) -> list[slice]:
    rows = tensor.shape[0]
    return [slice(n, min(n + ROWS_AT_ONCE, rows)) for n in range(0, rows, ROWS_AT_ONCE)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_than_two_to_the_31(shape: tuple[int, int]) -> None:
    """The first step of transformers' rule: its moments are means of this gradient alone."""
    needed = 2.5 * 2 * 2 * shape[0] * shape[1]
    if ON_GPU and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    start = torch.randn(shape, dtype=BF16, device=DEVICE)
    grad = torch.randn(shape, dtype=BF16, device=DEVICE)
    grad *= 10 ** torch.rand(shape[0], 1, device=DEVICE).to(BF16)
    sample = torch.tensor([0, 1, shape[0] // 2, shape[0] - 2, shape[0] - 1], device=DEVICE)
    before = start[sample].double()
    param_sq = sum(start[b].double().square().sum() for b in blocks(start))
    scale = max(EPS2, (param_sq / start.numel()).sqrt().item())

    param = torch.nn.Parameter(start)
    optimizer = HF([param], backend=BACKEND, lr=LR, eps=(EPS1, EPS2))
    param.grad = grad
    optimizer.step()

    row = torch.cat([grad[b].double().square().mean(1) for b in blocks(grad)]) + EPS1
    col = sum(grad[b].double().square().sum(0) for b in blocks(grad)) / shape[0] + EPS1
    row_factor, col_factor = (row / row.mean()).rsqrt(), col.rsqrt()
    update_sq = sum(
        (grad[b].double() * row_factor[b].unsqueeze(1) * col_factor).square().sum()
        for b in blocks(grad)
    )
    clip = max(1.0, (update_sq / grad.numel()).sqrt().item())
    update = grad[sample].double() * row_factor[sample].unsqueeze(1) * col_factor
    wanted = before - LR * scale / clip * update
    allowed = growth(shape) * unit(F32) * (wanted - before).abs()
    allowed += (unit(BF16) + 3 * unit(F32)) * (wanted.abs() + allowed)
    excess = (param.detach()[sample].double() - wanted).abs() / allowed
    assert excess.max().item() <= 1
    state = optimizer.state[param]
    for key, expected in (("exp_avg_sq_row", row), ("exp_avg_sq_col", col)):
        error = (state[key].double() - expected).abs() / expected
        assert error.max().item() <= growth(shape) * unit(F32)
