"""Parameters, gradients and comparisons that the tests of the optimizers share."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SHAPES = (
    (7,),
    (),
    (6, 5),
    (5, 9),
    (1, 9),
    (9, 1),
    (4, 3, 5),
    (4, 6, 3, 2),
    (2, 3, 2, 3, 2),
    (17, 23),
)
# Parity by tolerance: 12 steps and more of the same formulas in another order.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Normal parameters, the same values (rounded to `dtype`) for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(p.to(dtype)) for p in drawn]


def grad_values(params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    """Gradients of one step, in the parameters' dtypes; they depend on step and position only."""
    grads = []
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * (step + 1) + index)
        drawn = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        grads.append((drawn * scale).to(p.dtype))
    return grads


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(
    optimizer: torch.optim.Optimizer, steps: int, start: int = 0, scale: float = 1.0
) -> None:
    """Steps number `start` to `start + steps - 1`, gradients from `grad_values`."""
    params = params_of(optimizer)
    for step in range(start, start + steps):
        for p, g in zip(params, grad_values(params, step, scale), strict=True):
            p.grad = g
        optimizer.step()


def clone_params(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Copies with the same memory layout, without gradients."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# --- memory layouts ------------------------------------------------------------------------------


def contiguous(values: Tensor) -> Tensor:
    return values.clone()


def transposed(values: Tensor) -> Tensor:
    return values.mT.contiguous().mT


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def strided(values: Tensor) -> Tensor:
    """Every other element of a buffer twice as wide."""
    wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
    wide[..., ::2] = values
    return wide[..., ::2]


def misaligned(values: Tensor) -> Tensor:
    """A view that starts one element into its storage."""
    storage = values.new_full((values.numel() + 1,), math.nan)
    storage[1:] = values.reshape(-1)
    return storage[1:].view(values.shape)


def expanded(values: Tensor) -> Tensor:
    """One row for all rows, as the gradient of a sum over a broadcast has it."""
    return values[..., :1, :].expand(values.shape)


def expanded_scalar(values: Tensor) -> Tensor:
    """One number for all elements, as the gradient of a plain sum has it: every stride is 0.

    Of one sign: an average of such gradients would pass through zero everywhere at once, and leave
    nothing that a relative error can be relative to.
    """
    return values.reshape(-1)[0].abs().expand(values.shape)


# How a parameter and its gradient, of four dimensions, lie in memory.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "both_transposed": (transposed, transposed),
    "parameter_transposed": (transposed, contiguous),
    "gradient_transposed": (contiguous, transposed),
    "both_channels_last": (channels_last, channels_last),
    "gradient_channels_last": (contiguous, channels_last),
    "parameter_channels_last": (channels_last, contiguous),
    "channels_last_and_transposed": (channels_last, transposed),
    "parameter_misaligned": (misaligned, contiguous),
    "both_misaligned": (misaligned, misaligned),
    "gradient_misaligned": (contiguous, misaligned),
    "both_strided": (strided, strided),
    "parameter_strided": (strided, contiguous),
    "strided_and_transposed": (strided, transposed),
    "gradient_expanded": (contiguous, expanded),
    "gradient_expanded_scalar": (transposed, expanded_scalar),
}


# --- comparisons ---------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit: NaN equals itself, -0 is not 0."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.device.type == "meta":
        return True
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|difference| over max|reference|; infinite where one of them is not finite."""
    if ours.numel() == 0:
        return 0.0
    a, b = ours.detach().double(), reference.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    difference, size = (a - b).abs().max().item(), b.abs().max().item()
    return difference / size if size else difference


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == reference.shape, what
    error = relative_error(ours, reference)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


def assert_close_optimizers(
    ours: torch.optim.Optimizer, reference: torch.optim.Optimizer, tolerance: float
) -> None:
    """Compare parameters, and every state entry that the reference has."""
    pairs = zip(params_of(ours), params_of(reference), strict=True)
    for index, (p, q) in enumerate(pairs):
        what = f"#{index} of shape {tuple(q.shape)}"
        assert_close(p, q, tolerance, what)
        assert (p in ours.state) == (q in reference.state), what
        for key, value in reference.state.get(q, {}).items():
            mine = torch.as_tensor(ours.state[p][key])
            assert_close(mine, torch.as_tensor(value), tolerance, f"{key} of {what}")


def assert_close_metrics(ours: Any, reference: Any, tolerance: float) -> None:
    """What two optimizers say of each parameter; None must be None."""
    assert list(ours) == list(reference)
    for label, metrics in reference.items():
        for name, mine, theirs in zip(metrics._fields, ours[label], metrics, strict=True):
            same = mine is theirs is None
            assert same or math.isclose(mine, theirs, rel_tol=tolerance), f"{name} of {label}"


def assert_same_values(a: Any, b: Any, where: str = "state_dict") -> None:
    """Two nested values, tensors compared bit by bit."""
    assert type(a) is type(b), f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        assert same_bits(a, b), f"{where}: {a} and {b}"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: keys {list(a)} and {list(b)}"
        for key in a:
            assert_same_values(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_values(x, y, f"{where}[{place}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and state dicts, bit by bit; whichever parameter was stepped first."""
    for index, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        assert same_bits(p, q), f"parameter #{index} of shape {tuple(p.shape)}"
    assert_same_values(*(_in_order(optimizer.state_dict()) for optimizer in (a, b)))


def _in_order(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": dict(sorted(state_dict["state"].items()))}


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all that a step may change, and of the gradients, which it may not."""
    params = params_of(optimizer)
    return {
        "params": [p.detach().clone() for p in params],
        "grads": [None if p.grad is None else p.grad.to_dense().clone() for p in params],
        "owners": [list(map(id, group["params"])) for group in optimizer.param_groups],
        "state": [copy.deepcopy(optimizer.state[p]) if p in optimizer.state else 0 for p in params],
        "groups": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
    }


@contextlib.contextmanager
def assert_untouched(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What runs inside leaves parameters, gradients, state, groups and counters as they are."""
    before = snapshot(optimizer)
    yield
    assert_same_values(snapshot(optimizer), before, "optimizer")
