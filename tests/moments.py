"""First moments in 8 bits: each step against a twin whose moment is not rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adafactor.factoring import MatrixView
from tests.blocks import lines_of, read_lines, round_lines, scales_of
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, HF, OPTAX, Dialect
from tests.stepping import assert_close, params_of, same_bits

# A first moment on each of its sites, of every dialect that has one; no weight decay, so that all
# that a parameter moves by is the moment.
RULES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "hf": (HF, {"beta1": 0.9}),
    "adafactor_pytorch": (ADAFACTOR_PYTORCH, {}),
    "amsgrad": (ADAFACTOR_PYTORCH, {"non_constant_decay": False}),
    "unfactored": (ADAFACTOR_PYTORCH, {"enable_factorization": False}),
    "optax": (OPTAX, {"momentum": 0.9}),
    "big_vision": (BIG_VISION, {"clipping_threshold": 0.5}),
}

# Of every form: tiny, narrow, small, of several slabs and of none; rows of less than a block, of
# whole blocks, of some and a rest.
SHAPES = [
    *[(7,), (), (77,), (3, 3), (40, 5, 5), (1, 40), (40, 1), (33, 9), (17, 32), (20, 70)],
    *[(4, 3, 45), (3, 40, 3, 3), (2, 3, 2, 3, 2), (64, 64)],
]


def view_of(optimizer: Any, param: Tensor) -> MatrixView | None:
    """The matrices that a parameter of the first group is seen as."""
    return optimizer._rule(optimizer.param_groups[0]).factoring.view_of(tuple(param.shape))


def lies_along_columns(optimizer: Any, param: Tensor) -> bool:
    """Whether blocks do, by the shape of their scales."""
    view, scale = view_of(optimizer, param), scale_of(optimizer, param)
    if view is None:
        return False
    *batch, rows, cols = view.matrices
    ways = {(*batch, rows, -(-cols // 32)): False, (*batch, -(-rows // 32), cols): True}
    return ways[tuple(scale.shape)]


def exp_avg_of(optimizer: Any, param: Tensor) -> Tensor:
    return optimizer.state[param][optimizer.layout.exp_avg]


def scale_of(optimizer: Any, param: Tensor) -> Tensor:
    return optimizer.state[param][optimizer.layout.exp_avg_scale]


def read(optimizer: Any, param: Tensor) -> Tensor:
    """A first moment in blocks as float64, full."""
    q, scale = exp_avg_of(optimizer, param), scale_of(optimizer, param)
    where = view_of(optimizer, param), lies_along_columns(optimizer, param)
    lines = read_lines(lines_of(q, *where), scales_of(scale, *where))
    places = lines_of(torch.arange(q.numel()).reshape(q.shape), *where)
    values = torch.zeros(q.numel(), dtype=torch.float64)
    values[places.reshape(-1)] = lines.reshape(-1)
    return values.reshape(q.shape)


def unrounded(dialect: Dialect, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by which a first moment is kept in the math dtype of its parameter."""
    math_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    own = {"optax": "dtype_momentum", "big_vision": "momentum_dtype"}
    return {own[dialect.name]: math_dtype} if dialect.name in own else {}


class Twins:
    """An optimizer with its first moment in 8 bits, and one that keeps it as it is computed.

    Before each step the second one takes over all values. It goes through the same formulas, so
    what it then has is what the first one had to round, to the last bit.

    Args:
        rule: One of ``RULES``.
        params: Parameters; moved by the first optimizer.
        backend: Of both; None for the default.
        tolerance: How far they may be apart in what is not the first moment, relatively: other
            tiles add up in another order.
        extras: Of both.
    """

    def __init__(
        self,
        rule: str,
        params: Sequence[Tensor],
        backend: str | None = None,
        tolerance: float = 0.0,
        **extras: Any,
    ) -> None:
        self.tolerance = tolerance
        dialect, options = RULES[rule]
        options = {**options, **extras, **({} if backend is None else {"backend": backend})}
        copies = [torch.nn.Parameter(torch.empty_like(p).copy_(p)) for p in params]
        for p, copy in zip(params, copies, strict=True):
            copy.data = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.detach())
        self.ours = dialect(params, **options, momentum_dtype=torch.int8)
        self.exact = dialect(copies, **options, **unrounded(dialect, params[0].dtype))
        self.site = self.ours._rule(self.ours.param_groups[0]).momentum.site.value

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step of both with these gradients, compared."""
        pairs = list(zip(params_of(self.ours), params_of(self.exact), strict=True))
        layout = self.ours.layout
        before = [p.detach().clone() for p, _ in pairs]
        for (p, q), grad in zip(pairs, grads, strict=True):
            with torch.no_grad():
                q.copy_(p)
            for key, value in self.ours.state.get(p, {}).items():
                if key == layout.exp_avg:
                    self.exact.state[q][key].copy_(read(self.ours, p))
                elif key != layout.exp_avg_scale:
                    self.exact.state[q][key].copy_(value)
            p.grad, q.grad = grad, grad.clone()
        self.ours.step()
        self.exact.step()
        for (p, q), old in zip(pairs, before, strict=True):
            self._compare(p, q, old)

    def _compare(self, p: Tensor, q: Tensor, old: Tensor) -> None:
        what = f"{tuple(p.shape)} {p.dtype} {p.stride()}"
        where = view_of(self.ours, p), lies_along_columns(self.ours, p)
        unrounded = exp_avg_of(self.exact, q)
        wanted, wanted_scale = round_lines(lines_of(unrounded, *where))
        assert torch.equal(scales_of(scale_of(self.ours, p), *where), wanted_scale), what
        assert torch.equal(lines_of(exp_avg_of(self.ours, p), *where), wanted), what
        for key, value in self.exact.state[q].items():
            if key not in (self.ours.layout.exp_avg, self.ours.layout.compensation):
                if self.tolerance:
                    assert_close(self.ours.state[p][key], value, self.tolerance, f"{key} {what}")
                else:
                    assert same_bits(self.ours.state[p][key], value), (key, what)
        if p.dtype is torch.float64 and unrounded.shape == p.shape:
            moved, moved_exactly = p.detach() - old, q.detach() - old
            self._compare_moves(moved, moved_exactly, read(self.ours, p), unrounded, old, what)

    def _compare_moves(
        self, moved: Tensor, exactly: Tensor, kept: Tensor, unrounded: Tensor, p: Tensor, what: str
    ) -> None:
        """What is used is what is stored: a parameter moves in proportion to that."""
        moves = (kept.abs() > unrounded.abs().max() / 64) & (exactly != 0)
        if not moves.any():
            return
        ratio = (moved * unrounded)[moves] / (exactly * kept)[moves]
        size = (p.abs().max() * 2.0**-52 / exactly[moves].abs()).max()
        if self.site != "grad":  # there clipping is by what has been rounded
            assert ((ratio - 1).abs() <= 1e-12 + 4 * size).all(), what
        assert ratio.max() - ratio.min() <= (1e-12 + 8 * size) * ratio.max(), what


def laid_out(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, lay_out: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Parameters in a memory layout, those of two dimensions and more."""
    params = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(index)
        values = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        values = lay_out(values) if len(shape) > 1 else values
        params.append(torch.nn.Parameter(values.detach()))
    return params


def grads_for(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Gradients laid out as their parameters, elements of several sizes, one row of zeros."""
    grads = []
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * (step + 1) + index)
        drawn = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        drawn = drawn * 10 ** (3 * torch.rand(p.shape, dtype=torch.float64, generator=generator))
        if p.dim() > 1 and step == 1:
            drawn[0] = 0.0
        grad = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
        grads.append(grad.copy_(drawn))
    return grads
