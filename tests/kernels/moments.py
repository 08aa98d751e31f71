"""Second moments in bfloat16: rounded with the random bits of their keys, by every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adafactor.rounding import RoundingKey, Stream, round_stochastic
from tests.dialects import TORCH
from tests.kernels.biting import RULES, draw
from tests.kernels.judged import BF16, F32, eps_of
from tests.stepping import params_of, same_bits

MOMENTS = {"row_var": Stream.ROW_VAR, "col_var": Stream.COL_VAR, "var": Stream.VAR}
# Those that keep a factor's values in the order of its key: they factor the last two dimensions, or
# none.
ROUNDED_RULES = ("hf", "torch", "hf-momentum", "keras-everything", "no_factors")


def moments_of(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """The second moments that a parameter has, by glossary name."""
    keys = {name: optimizer.layout.key(name) for name in MOMENTS}
    state = optimizer.state[param]
    return {name: state[key] for name, key in keys.items() if key in state}


def _built(rule: str, params: Sequence[Tensor], **extras: Any) -> Any:
    dialect, options = RULES[rule]
    eps = eps_of(params[0].dtype) if dialect is TORCH else {}
    return dialect(params, seed=5, **options, **eps, **extras)


def _twins_of(params: Sequence[Tensor]) -> list[Tensor]:
    """Copies in the same layouts, whatever lies between their elements."""
    twins = []
    for p in params:
        twin = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
        twins.append(torch.nn.Parameter(twin.copy_(p.detach())))
    return twins


def _step(optimizer: Any, step: int) -> None:
    params = params_of(optimizer)
    grads = draw([tuple(p.shape) for p in params], step, params[0].dtype)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device).copy_(g)
    optimizer.step()


def assert_moments_rounded_by_their_keys(
    rule: str, params: Sequence[Tensor], backend: str, **extras: Any
) -> None:
    """A float32 twin, stepped by the same backend from the same moments, has what is rounded."""
    low = _built(rule, params, backend=backend, state_dtype=BF16, **extras)
    twin = _built(rule, _twins_of(params), backend=backend, state_dtype=F32, **extras)
    for step in range(2):
        for optimizer in (low, twin):
            _step(optimizer, 2 * step)
        for index, (p, q) in enumerate(zip(params_of(low), params_of(twin), strict=True)):
            kept = moments_of(low, p)
            assert kept
            for name, value in moments_of(twin, q).items():
                key = RoundingKey(5, index, step + 1, MOMENTS[name])
                expected = round_stochastic(value.cpu(), BF16, key)
                assert same_bits(kept[name].cpu(), expected), (step, name, tuple(p.shape))
                value.copy_(kept[name])


def assert_moments_of_the_reference(
    rule: str, params: Sequence[Tensor], backend: str, **extras: Any
) -> None:
    """The reference has the same bits, from the same start.

    In float64: sums in another order differ by 2**-50 of themselves, and a last bit of bfloat16
    turns on that once in 2**40 times.
    """
    ours = _built(rule, params, backend=backend, state_dtype=BF16, **extras)
    judge = _built(rule, _twins_of(params), backend="reference", state_dtype=BF16, **extras)
    for step in range(2):
        for optimizer in (ours, judge):
            _step(optimizer, 2 * step)
        for p, q in zip(params_of(ours), params_of(judge), strict=True):
            kept = moments_of(ours, p)
            assert kept
            for name, expected in moments_of(judge, q).items():
                assert same_bits(kept[name], expected), (step, name, tuple(p.shape))
