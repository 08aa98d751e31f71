"""Every shape, layout and dtype on every instruction set, one step at a time."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.biting import EVERY_RULE, EVERY_SHAPE, RULES, draw, judged
from tests.kernels.judged import BF16, F16, F32, F64, params_in
from tests.stepping import LAYOUTS

pytestmark = pytest.mark.usefixtures("isa")


@EVERY_RULE
@EVERY_SHAPE
def test_every_rule_on_every_shape(rule: str, shapes: list[tuple[int, ...]]) -> None:
    pair = judged(rule, params_in(shapes, F32))
    for step in range(3):
        pair.step(draw(shapes, step, F32))


@pytest.mark.parametrize("grad_dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("rule", ["hf", "torch", "hf-momentum", "no_factors"])
def test_every_dtype_with_every_gradient(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    shapes = [
        (7,),
        (3, 3),
        (40, 2, 3),
        (18, 3, 2),
        (17, 23),
        (33, 9),
        (9, 513),
        (3, 40, 70),
        (300, 513),
    ]
    pair = judged(rule, params_in(shapes, dtype))
    for step in range(2):
        pair.step(draw(shapes, step, grad_dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_RULE
def test_every_layout(rule: str, layout: str, dtype: torch.dtype) -> None:
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (1, 5, 7, 3), (2, 3, 40, 50), (2, 16, 9, 9), (1, 2, 300, 513)]
    if layout == "gradient_expanded_scalar":
        shapes = shapes[:2]
    params = params_in(shapes, dtype, lay_param)
    before = [(p.stride(), p.data_ptr()) for p in params]
    pair = judged(rule, params)
    for step in range(2):
        grads = [lay_grad(g) for g in draw(shapes, 2 * step, dtype)]
        kept = [g.clone() for g in grads]
        pair.step(grads)
        assert all(map(torch.equal, grads, kept))
    assert [(p.stride(), p.data_ptr()) for p in params] == before


@pytest.mark.parametrize("permutation", [(1, 0, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("rule", ["hf", "torch", "optax-momentum", "no_factors"])
def test_dimensions_in_any_order(rule: str, permutation: tuple[int, ...]) -> None:
    def permuted(values: Tensor) -> Tensor:
        inverse = sorted(range(4), key=lambda d: permutation[d])
        return values.permute(permutation).contiguous().permute(inverse)

    shapes = [(4, 6, 3, 2), (3, 5, 40, 31), (20, 9, 7, 60)]
    pair = judged(rule, params_in(shapes, F32, permuted))
    for step in range(2):
        pair.step([permuted(g) for g in draw(shapes, 2 * step, F32)])


@pytest.mark.parametrize("rule", ["hf", "torch", "adafactor_pytorch-amsgrad", "optax-momentum"])
@pytest.mark.parametrize("shape", [(6, 8, 6), (4, 40, 50), (3, 300, 500), (4, 400, 9)], ids=str)
def test_experts_of_very_different_gradients(rule: str, shape: tuple[int, ...]) -> None:
    """Every element is held to its own size, so a slice at 1e-5 is as exact as its neighbours."""
    pair = judged(rule, params_in([shape], F32))
    for step in range(2):
        (g,) = draw([shape], 2 * step, F32)
        g[::2] *= 1e-5
        pair.step([g])


@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "torch"])
def test_gradients_that_are_negated_when_they_are_read(rule: str) -> None:
    """As the imaginary part of a conjugate is: its memory has the other sign."""
    shapes = [(7,), (17, 23), (300, 513), (3, 3)]
    pair = judged(rule, params_in(shapes, F32))
    for step in range(3):
        grads = draw(shapes, 2 * step, F32)
        if step != 1:
            grads = [torch.complex(g, -g).conj().imag for g in grads]
            assert all(g.is_neg() for g in grads)
        pair.step(grads)


SIZES = st.lists(st.integers(1, 80), min_size=0, max_size=4).map(tuple)


@hypothesis.given(
    shape=SIZES,
    rule=st.sampled_from(list(RULES)),
    dtypes=st.tuples(*[st.sampled_from([F32, BF16, F16, F64])] * 2),
    data=st.data(),
)
@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_shape_in_any_order_with_any_dtypes(
    shape: tuple[int, ...],
    rule: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    data: st.DataObject,
) -> None:
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(2)]

    def laid_out(values: Tensor, order: list[int]) -> Tensor:
        inverse = sorted(range(len(order)), key=lambda d: order[d])
        return values.permute(order).contiguous().permute(inverse)

    pair = judged(rule, params_in([shape], dtypes[0], lambda values: laid_out(values, orders[0])))
    for step in range(2):
        pair.step([laid_out(g, orders[1]) for g in draw([shape], 2 * step, dtypes[1])])
