"""The mirror: a new parameter is written twice, the second time as the mirror's dtype has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.backends import cpp
from fused_adafactor.rounding import RoundingKey, round_nearest, round_stochastic
from fused_adafactor.spec import TensorId, spec_of
from tests import stepping
from tests.dialects import HF, KERAS, OPTAX, TORCH, Dialect
from tests.kernels.biting import EVERY_RULE, EVERY_SHAPE, RULES, draw
from tests.kernels.judged import BF16, F16, F32, F64, params_in
from tests.stepping import LAYOUTS, params_of, same_bits

GUARD = 64  # elements before and after a mirror: more than the widest store
DTYPES = [F32, BF16, F16, F64]
SHAPES = [(7,), (), (3, 3), (40, 3, 3), (33, 9), (17, 23), (9, 513), (300, 513), (3, 40, 70)]
# Several items: a matrix, a stack of them, a vector.
SLABBED = [(257, 512), (700, 300), (3, 300, 500), (131_073,), (5000, 31)]


@pytest.fixture(params=[*cpp.ISAS, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ backend with one instruction set after the other, and the reference."""
    if request.param == "reference":
        yield "reference"
        return
    library, wanted = cpp.library(), cpp.ISAS.index(request.param)
    before = library.fused_adafactor_isa()
    try:
        if library.fused_adafactor_set_isa(wanted) != wanted:
            pytest.skip(f"needs a machine with {request.param}")
        yield "cpp"
    finally:
        library.fused_adafactor_set_isa(before)


class Mirrored:
    """An optimizer whose parameters have mirrors, in memory that is NaN all around."""

    def __init__(self, optimizer: Any, dtype: torch.dtype, offset: int = 0) -> None:
        self.optimizer, self.params = optimizer, params_of(optimizer)
        rule = optimizer._rule(optimizer.param_groups[0])
        self.buffers, self.mirrors = [], []
        for p in self.params:
            strides = spec_of(TensorId(0, 0, None), p, p, rule).state_strides
            buffer = torch.full((p.numel() + 2 * GUARD,), math.nan, dtype=dtype)
            self.buffers.append(buffer)
            self.mirrors.append(buffer.as_strided(p.shape, strides, GUARD + offset))
        optimizer._mirrors = dict(zip(self.params, self.mirrors, strict=True))
        self.offset = offset

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad_dtype = None
            p.grad = g
        self.optimizer.step()

    def check(self, rounded: Callable[[int, Tensor, torch.dtype], Tensor] | None = None) -> None:
        """The mirrors are the parameters, rounded, and nothing around them was touched."""
        for index, (p, mirror, buffer) in enumerate(
            zip(self.params, self.mirrors, self.buffers, strict=True)
        ):
            stored = p.detach().to(F64 if p.dtype is F64 else F32)
            wanted = (
                round_nearest(stored, mirror.dtype)
                if rounded is None
                else rounded(index, stored, mirror.dtype)
            )
            assert same_bits(mirror, wanted), f"mirror of #{index}, shape {tuple(p.shape)}"
            begin = GUARD + self.offset
            assert buffer[:begin].isnan().all(), f"before the mirror of #{index}"
            assert buffer[begin + p.numel() :].isnan().all(), f"after the mirror of #{index}"


def mirrored(
    dialect: Dialect, params: list[Tensor], backend: str, dtype: torch.dtype, **options: Any
) -> Mirrored:
    offset = options.pop("offset", 0)
    return Mirrored(dialect(params, backend=backend, **options), dtype, offset)


@EVERY_RULE
@EVERY_SHAPE
def test_every_rule_on_every_shape(rule: str, shapes: list[tuple[int, ...]], backend: str) -> None:
    dialect, options = RULES[rule]
    pair = mirrored(dialect, params_in(shapes, F32), backend, BF16, **options)
    alone = dialect(params_in(shapes, F32), backend=backend, **options)
    for step in range(2):
        grads = draw(shapes, 2 * step, F32)
        pair.step(grads)
        pair.check()
        for p, g in zip(params_of(alone), grads, strict=True):
            p.grad = g
        alone.step()
    # A mirror changes nothing else.
    assert all(map(same_bits, pair.params, params_of(alone)))


@pytest.mark.parametrize("mirror_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "no_factors"])
def test_every_dtype(
    rule: str, dtype: torch.dtype, mirror_dtype: torch.dtype, backend: str
) -> None:
    dialect, options = RULES[rule]
    pair = mirrored(dialect, params_in(SHAPES, dtype), backend, mirror_dtype, **options)
    for step in range(2):
        pair.step(draw(SHAPES, 2 * step, F32))
        pair.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "adafactor_pytorch-amsgrad"])
def test_every_layout(rule: str, layout: str, backend: str) -> None:
    """The mirror begins where a cache line does, or one element further on."""
    dialect, options = RULES[rule]
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (2, 3, 40, 50), (1, 2, 300, 513)]
    for dtype, offset in ((F32, 0), (F32, 1), (BF16, 1)):
        params = params_in(shapes, dtype, lay_param)
        pair = mirrored(dialect, params, backend, BF16, offset=offset, **options)
        for step in range(2):
            pair.step([lay_grad(g) for g in draw(shapes, 2 * step, dtype)])
            pair.check()


def gaps_between_rows(values: Tensor) -> Tensor:
    """As a slice of a wider parameter: its mirror has no gaps."""
    wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), math.nan)
    wide[..., :-3] = values
    return wide[..., :-3]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "adafactor_pytorch-amsgrad"])
def test_a_mirror_is_dense_where_its_parameter_is_not(
    rule: str, dtype: torch.dtype, backend: str
) -> None:
    dialect, options = RULES[rule]
    shapes = [(4, 6, 3, 2), (2, 3, 40, 50), (20, 700), (300, 513), (3, 2, 300)]
    params = params_in(shapes, dtype, gaps_between_rows)
    pair = mirrored(dialect, params, backend, BF16, **options)
    for step in range(2):
        pair.step(draw(shapes, 2 * step, dtype))
        pair.check()
    assert all(mirror.is_contiguous() for mirror in pair.mirrors)


@pytest.mark.parametrize("offset", [0, 1, 31])
@pytest.mark.parametrize("mirror_dtype", [F32, BF16, F16], ids=str)
def test_every_length_of_a_run(mirror_dtype: torch.dtype, offset: int, backend: str) -> None:
    """Whatever is left over before the first and after the last whole cache line."""
    shapes = [(length,) for length in range(120, 320)]
    pair = mirrored(HF, params_in(shapes, F32), backend, mirror_dtype, offset=offset)
    pair.step(draw(shapes, 0, F32))
    pair.check()


@pytest.mark.parametrize("layout", ["both_transposed", "both_channels_last", "both_strided"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_stochastic_rounding_is_that_of_the_parameter(
    options: dict[str, Any], dtype: torch.dtype, layout: str, backend: str
) -> None:
    lay_param, lay_grad = LAYOUTS[layout]
    shapes = [(4, 6, 3, 2), (2, 3, 40, 50), (1, 2, 300, 513)]
    params = params_in(shapes, dtype, lay_param)
    pair = mirrored(OPTAX, params, backend, BF16, rounding="stochastic", seed=5, **options)
    for step in range(2):
        pair.step([lay_grad(g) for g in draw(shapes, 2 * step, F32)])
        pair.check(lambda i, x, dtype, t=step + 1: round_stochastic(x, dtype, RoundingKey(5, i, t)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_kahan_mirrors_the_parameter_as_it_is_stored(dtype: torch.dtype, backend: str) -> None:
    pair = mirrored(HF, params_in(SHAPES, dtype), backend, F16, rounding="kahan")
    for step in range(2):
        pair.step(draw(SHAPES, 2 * step, F32))
        pair.check()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("mirror_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(4096,), (6, 700), (300, 3, 3)], ids=str)
def test_values_that_are_hard_to_round(
    shape: tuple[int, ...], mirror_dtype: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    """Ties and what is next to them, subnormals, and what only just is or is not finite."""
    info = torch.finfo(mirror_dtype)
    below = torch.arange(-8, 9, dtype=F64)
    values = [info.tiny, info.smallest_normal * info.eps, info.smallest_normal * info.eps * 5]
    values += [1.0, 3.5, info.max * 0.99, info.max]
    drawn = torch.cat([v * (1 + info.eps * below / 16) for v in values] + [below * 2.0**-140])
    drawn = torch.cat([drawn, -drawn, torch.tensor([math.inf, -math.inf, 0.0, -0.0])])
    count = math.prod(shape)
    start = drawn.repeat(-(-count // drawn.numel()))[:count].reshape(shape).to(dtype)
    param = torch.nn.Parameter(start.clone())
    pair = mirrored(HF, [param], backend, mirror_dtype, lr=0.0, scale_parameter=False)
    pair.step([torch.ones(shape, dtype=dtype)])
    assert same_bits(param, start)
    pair.check()


def test_a_number_that_is_none_stays_none(backend: str) -> None:
    start = torch.ones(6, 700)
    start[2, 3] = math.nan
    start[3, 600:] = torch.tensor(0x7F800001, dtype=torch.int32).view(F32)  # cut, it would be Inf
    pair = mirrored(HF, [torch.nn.Parameter(start)], backend, BF16, scale_parameter=False)
    pair.step([torch.ones(6, 700)])
    assert torch.equal(pair.mirrors[0].isnan(), start.isnan())


@pytest.mark.parametrize("rule", ["hf", "hf-momentum", "no_factors"])
def test_any_number_of_threads(rule: str, backend: str) -> None:
    dialect, options = RULES[rule]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            pair = mirrored(dialect, params_in(SLABBED, F32), backend, BF16, **options)
            pair.step(draw(SLABBED, 0, F32))
            pair.check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*was written between")
@pytest.mark.parametrize("mirror_dtype", [BF16, F32], ids=str)
def test_a_step_that_is_made_good_is_mirrored(mirror_dtype: torch.dtype, backend: str) -> None:
    """Long enough that RMS(p) is known without a read of p, which is then written unseen."""
    pair = mirrored(TORCH, params_in(SLABBED, F32), backend, mirror_dtype, param_rms="expected")
    for step in range(6):
        if step == 5:
            for p in pair.params:
                p.data[:2] *= 100
        pair.step(draw(SLABBED, step, F32))
        pair.check()


def test_what_is_skipped_keeps_its_mirror(backend: str) -> None:
    pair = mirrored(HF, params_in(SHAPES, F32), backend, BF16, nonfinite="skip")
    grads = draw(SHAPES, 0, F32)
    for g in grads[::2]:
        g.view(-1)[-1] = math.inf
    pair.step(grads)
    for index, mirror in enumerate(pair.mirrors):
        assert mirror.isnan().all() == (index % 2 == 0), f"mirror of #{index}"


def test_without_a_new_parameter_there_is_no_new_mirror(backend: str) -> None:
    """Between two updates of accumulated gradients, and where only an average moves."""
    shapes = [(17, 23), (7,), (3, 3)]
    options = {"gradient_accumulation_steps": 2}
    pair = mirrored(KERAS, params_in(shapes, F32), backend, BF16, **options)
    pair.step(draw(shapes, 0, F32))
    assert all(mirror.isnan().all() for mirror in pair.mirrors)
    pair.step(draw(shapes, 2, F32))
    pair.check()


def test_the_average_that_overwrites_a_parameter_overwrites_its_mirror(backend: str) -> None:
    shapes = [(17, 23), (7,), (3, 3), (300, 513)]
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}
    pair = mirrored(KERAS, params_in(shapes, F32), backend, BF16, **options)
    for step in range(5):
        pair.step(draw(shapes, 2 * step, F32))
        pair.check()
    for mirror in pair.mirrors:
        mirror.fill_(math.nan)
    # The last of the parameters has no gradient in the call that overwrites.
    before = [p.detach().clone() for p in pair.params]
    pair.step([*draw(shapes, 10, F32)[:-1], None])
    assert not torch.equal(before[-1], pair.params[-1])
    pair.check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.new_empty(6, 4), "has shape"),
        (lambda p: p.new_empty(6, 4).T, "has strides"),
        (lambda p: p.new_empty(4, 6, dtype=torch.int16), "has dtype"),
        (lambda p: p.new_empty(4, 6, device="meta"), "must be plain memory"),
        (lambda p: p.new_empty(4, 6, dtype=F16), "whose mirror is float16"),
    ],
)
def test_a_mirror_that_does_not_fit_is_refused(make: Any, message: str, backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(4, 6))
    optimizer: Any = HF([param], backend=backend, rounding="stochastic")
    optimizer._mirrors = {param: make(param.detach())}
    param.grad = torch.ones(4, 6)
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises((TypeError, RuntimeError, ValueError)) as e,
    ):
        optimizer.step()
    assert message in str(e.value)
    assert "parameter #0 in group 0" in str(e.value)


def test_a_mirror_may_move_between_two_steps(backend: str) -> None:
    pair = mirrored(HF, params_in(SHAPES, F32), backend, BF16)
    pair.step(draw(SHAPES, 0, F32))
    old = [mirror.clone() for mirror in pair.mirrors]
    moved = Mirrored(pair.optimizer, F16)
    moved.step(draw(SHAPES, 2, F32))
    moved.check()
    assert all(map(same_bits, pair.mirrors, old))
