"""A few steps on small tensors, for compute-sanitizer: ``python -m tests.gpu.few_steps``."""

from __future__ import annotations

import os

import torch

from tests.gpu.device import LAUNCH, LAUNCHES, ON_GPU, built, give, grads_on_device
from tests.kernels.judged import BF16, F32
from tests.stepping import params_of

# Tiny, narrow, odd, of one slab and of several, stacked; nothing that takes a checker long.
SHAPES = [(7,), (), (3, 3), (40, 5, 5), (33, 9), (17, 23), (64, 128), (3, 70, 90), (257, 513)]
RUNS = (
    ("torch", F32, {}),
    ("hf", BF16, {"rounding": "stochastic"}),
    ("hf-momentum", BF16, {"rounding": "kahan", "max_grad_norm": 0.5}),
    ("keras-everything", F32, {"nonfinite": "skip"}),
)


def main() -> None:
    """Step everything twice, in both launch forms."""
    for launch in LAUNCHES:
        os.environ[LAUNCH] = launch
        for rule, dtype, extras in RUNS:
            optimizer = built(rule, SHAPES, dtype, **extras)
            for step in range(2):
                give(optimizer, grads_on_device(SHAPES, 2 * step, dtype))
                optimizer.step()
            assert all(p.isfinite().all() for p in params_of(optimizer))
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
