"""The C++ backend against the reference: every rule, layout and dtype, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_adafactor.backends import cpp
from fused_adafactor.dialects.hf import Adafactor as HfAdafactor
from tests import stepping
from tests.dialects import DIALECTS, VARIANTS, Dialect

# Vectors, tiny and stacked matrices, one past a chunk, several slabs, wider than 16,384.
SHAPES = ((7,), (), (0, 4), (6, 5), (1, 9), (9, 1), (4, 6, 3, 2), (17, 513), (2, 16385), (700, 300))
STEPS = 4

# Sums of float32 squares in another order differ by a few roundings of the sum, 6e-8 each; a first
# moment that averages steps of both signs cancels, which magnifies that.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5}


def _run(dialect: Dialect, variant: str, backend: str, dtype: torch.dtype) -> Any:
    params = stepping.make_params(SHAPES, dtype)
    optimizer = dialect(params, **dialect.variants[variant], backend=backend)
    stepping.take_steps(optimizer, STEPS)
    return optimizer


# A bfloat16 momentum buffer turns the last bit of a float32 sum into one of its own.
CASES = [
    (dialect, variant, dtype)
    for dialect, variant in VARIANTS
    for dtype in BOUNDS
    if "low_precision" not in variant and (dialect.name != "big_vision" or dtype is torch.float64)
]


@pytest.mark.parametrize(("dialect", "variant", "dtype"), CASES, ids=str)
def test_agrees_with_the_reference(dialect: Dialect, variant: str, dtype: torch.dtype) -> None:
    ours, reference = (_run(dialect, variant, name, dtype) for name in ("cpp", "reference"))
    pairs = zip(*map(stepping.params_of, (ours, reference)), strict=True)
    for p, q in pairs:
        stepping.assert_close(p, q, BOUNDS[dtype], f"parameter of shape {tuple(p.shape)}")
        for key, value in reference.state[q].items():
            stepping.assert_close(ours.state[p][key], value, BOUNDS[dtype], key)


@pytest.mark.parametrize("layout", stepping.LAYOUTS)
def test_steps_every_layout(layout: str) -> None:
    lay_out_param, lay_out_grad = stepping.LAYOUTS[layout]
    values = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    results = []
    for backend in ("cpp", "reference"):
        param = lay_out_param(values.clone()).detach().requires_grad_()
        optimizer = HfAdafactor([param], backend=backend)
        for step in range(3):
            param.grad = lay_out_grad((values * (step + 1)).cos())
            optimizer.step()
        results.append(param.detach().clone())
    stepping.assert_close(results[0], results[1], 1e-12, layout)


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dialect: Dialect) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            variant = next(iter(dialect.variants))
            results.append(stepping.params_of(_run(dialect, variant, "cpp", torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(stepping.same_bits, results[0], other))


def test_the_number_of_threads_may_change_between_steps() -> None:
    """More threads have larger waves, whose sums need more room."""
    before = torch.get_num_threads()
    runs = []
    try:
        for threads_of_steps in ((1, 1, 1, 1), (1, 4, 2, 7)):
            params = stepping.make_params([(600, 300)] * 9)
            optimizer = HfAdafactor(params, backend="cpp")
            for step, threads in enumerate(threads_of_steps):
                torch.set_num_threads(threads)
                stepping.take_steps(optimizer, 1, start=step)
            runs.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(map(stepping.same_bits, *runs))


def test_a_missing_library_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "missing", lambda: "the native library was not built")
    optimizer = HfAdafactor(stepping.make_params(((3, 4),)), backend="cpp")
    with pytest.raises(RuntimeError, match="was asked for, but the native library was not built"):
        stepping.take_steps(optimizer, 1)


def test_state_that_a_pointer_cannot_describe_is_refused() -> None:
    (param,) = stepping.make_params(((3, 4),))
    optimizer = HfAdafactor([param], backend="cpp")
    stepping.take_steps(optimizer, 1)
    optimizer.state[param]["exp_avg_sq_row"] = optimizer.state[param]["exp_avg_sq_row"].half()
    with pytest.raises(ValueError, match="line_var of parameter #0"):
        stepping.take_steps(optimizer, 1)


def test_autograd_sees_that_the_parameter_changed() -> None:
    (param,) = stepping.make_params(((3, 4),))
    loss = (param * param).sum()
    stepping.take_steps(HfAdafactor([param], backend="cpp"), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Wrapper(Tensor):
    """A tensor that only wraps another one, as quantized ones do: there is no memory behind it."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise NotImplementedError(function)


def no_memory() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


def freed() -> Tensor:
    tensor = torch.ones(3, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("make", [no_memory, freed, lambda: Wrapper(torch.ones(3, 4))])
def test_what_has_no_memory_is_refused_before_anything_is_stepped(make: Any, steps: int) -> None:
    """Never read: that would be a segmentation fault."""
    params = stepping.make_params(((7,), (3, 4)))
    optimizer = HfAdafactor(params, backend="cpp")
    stepping.take_steps(optimizer, steps)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(7)
    params[1].grad = make()
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    assert all(map(stepping.same_bits, params, before))
    assert [float(s["step"]) for s in optimizer.state.values()] in ([], [steps, steps])


def test_a_parameter_that_is_negated_when_it_is_read_is_refused() -> None:
    param = torch.randn(3, 4, dtype=torch.complex64).conj().imag.requires_grad_()
    assert param.is_neg()
    param.grad = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="resolve_neg"):
        HfAdafactor([param], backend="cpp").step()
