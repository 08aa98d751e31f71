"""The format of 8-bit blocks, against Python's own numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_adafactor.blocks import BLOCK, blocks_of, dequantise, quantise
from tests.blocks import read_lines, round_block, round_lines
from tests.stepping import same_bits

F32, F64 = torch.float32, torch.float64
BOTH = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


def assert_as_the_oracle(lines: Tensor) -> None:
    q, scale = quantise(lines)
    wanted, wanted_scale = round_lines(lines)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(q, wanted)
    read = dequantise(q, scale, lines.dtype)
    assert read.dtype is lines.dtype
    assert torch.equal(read.double().nan_to_num(7e77), read_lines(q, scale).nan_to_num(7e77))


def drawn(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    normal = torch.randn(shape, dtype=F64)
    if kind == "heavy_tailed":
        normal = normal.sign() * normal.abs().exp() ** 8
    if kind == "of_all_sizes":
        normal = normal * 10.0 ** (60 * torch.rand(shape, dtype=F64) - 37)
    return normal.to(dtype)


KINDS = pytest.mark.parametrize("kind", ["normal", "heavy_tailed", "of_all_sizes"])


@BOTH
@KINDS
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 100])
def test_is_the_oracle_whatever_the_length(kind, length, dtype):
    assert_as_the_oracle(drawn(kind, (50, length), dtype))


@BOTH
@KINDS
def test_is_off_by_a_128th_of_the_largest_of_a_block_at_most(kind, dtype):
    """And by half a unit where the range does not cut off."""
    blocks = drawn(kind, (3000, BLOCK), dtype)
    q, scale = quantise(blocks)
    error = (dequantise(q, scale, dtype).double() - blocks.double()).abs()
    largest = blocks.double().abs().amax(-1, keepdim=True)
    assert (error <= (largest / 128).clamp(min=2.0**-134)).all()
    half_unit = 2.0 ** (scale.double() - 127 - 7)
    assert (error <= half_unit)[q.abs() < 127].all()
    assert (error.amax(-1) > largest.squeeze() / 300).any()  # the bound is about what there is


@BOTH
def test_powers_of_two_and_their_neighbours(dtype):
    """Where the exponent changes, at 127.5 units, at every tie, and at both ends of the scale."""
    lines = []
    for exponent in (-149, -140, -133, -128, -127, -126, -125, -7, -1, 0, 1, 6, 100, 126, 127):
        power = torch.tensor(2.0**exponent, dtype=F64)
        for of_it in (1, 127 / 128, 127.5 / 128, 255 / 128, 255.5 / 128, 65 / 64, 1.5):
            top = (power * of_it).to(dtype)
            above, below = (top.nextafter(top.new_tensor(x)) for x in (math.inf, 0.0))
            for largest in (top, above, below):
                ties = (torch.arange(-129, 130) / 128 * power).to(dtype)
                ties = ties[ties.abs() <= largest.abs()][:: 9 if dtype is F64 else 8][:29]
                row = torch.cat([largest.view(1), -largest.view(1), ties])
                lines.append(torch.nn.functional.pad(row, (0, BLOCK - len(row))))
    assert_as_the_oracle(torch.stack(lines).nan_to_num(posinf=3e38, neginf=-3e38))


def test_every_tie_goes_to_the_even_one():
    ties = torch.arange(0, 32) / 64 + 1 / 128
    block = torch.cat([ties[:31], torch.ones(1)])
    q, _ = quantise(block)
    assert q.tolist() == [*(i + i % 2 for i in range(31)), 64]


def test_the_range_is_cut_off_at_127_on_both_sides():
    q, scale = quantise(torch.tensor([255.9 / 128, -255.9 / 128, 254 / 128, -1.0]))
    assert q.tolist() == [127, -127, 127, -64]
    assert scale.tolist() == [127]


def test_float64_beyond_the_scale_is_cut_off():
    q, scale = quantise(torch.tensor([1e300, -1e300, 1.0], dtype=F64))
    assert (q.tolist(), scale.tolist()) == ([127, -127, 0], [254])
    q, scale = quantise(torch.tensor([1e-300, 0.0], dtype=F64))
    assert (q.tolist(), scale.tolist()) == ([0, 0], [0])


@BOTH
def test_zeros_have_the_scale_zero(dtype):
    q, scale = quantise(torch.tensor([0.0, -0.0, 0.0], dtype=dtype))
    assert not q.any()
    assert not scale.any()
    assert same_bits(dequantise(q, scale, dtype), torch.zeros(3, dtype=dtype))


@BOTH
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 39])
def test_poison_makes_its_block_nan_and_no_other(poison, place, dtype):
    line = torch.ones(40, dtype=dtype)
    line[place] = poison
    q, scale = quantise(line)
    block = place // BLOCK
    assert [scale[block], scale[1 - block]] == [255, 127]
    assert not q[block * BLOCK :][:BLOCK].any()
    nan = dequantise(q, scale, dtype).isnan()
    assert nan.tolist() == [i // BLOCK == block for i in range(40)]


@BOTH
def test_every_scale_and_element_is_read_exactly(dtype):
    q = torch.arange(-127, 128, dtype=torch.int8)[:224].expand(256, 224)
    scale = torch.arange(256).to(torch.uint8).unsqueeze(-1).expand(256, 7)
    read = dequantise(q, scale, dtype)
    assert torch.equal(read.double().nan_to_num(7e77), read_lines(q, scale).nan_to_num(7e77))
    assert read[255].isnan().all()


@BOTH
@KINDS
def test_what_has_been_rounded_is_not_changed_by_rounding_it_again(kind, dtype):
    lines = drawn(kind, (500, 45), dtype)
    lines[3, 40], lines[5] = math.nan, 0.0
    once = quantise(lines)
    again = quantise(dequantise(*once, dtype))
    assert all(map(same_bits, once, again))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40), (2, 0, 5), (2, 3, 33)], ids=str)
def test_shapes(shape):
    q, scale = quantise(torch.zeros(shape))
    assert tuple(q.shape) == shape
    assert tuple(scale.shape) == (*shape[:-1], blocks_of(shape[-1]))
    assert dequantise(q, scale, F32).shape == q.shape


def test_an_average_is_off_by_at_most_the_sum_of_its_roundings():
    """The bound of the module's docstring, where roundings have one sign as well."""
    beta1 = 0.9
    for values in (drawn("normal", (200, BLOCK), F64), drawn("heavy_tailed", (200, BLOCK), F64)):
        exact, kept, largest = torch.zeros_like(values), torch.zeros_like(values), 0.0
        for t in range(1, 40):
            exact = beta1 * exact + (1 - beta1) * values
            new = beta1 * kept + (1 - beta1) * values
            largest = torch.maximum(new.abs().amax(-1, keepdim=True), torch.as_tensor(largest))
            kept = dequantise(*quantise(new), F64)
            allowed = (1 - beta1**t) / (1 - beta1) * largest / 128
            assert ((kept - exact).abs() <= allowed * (1 + 1e-12)).all()


def test_the_oracle_is_the_specs_own_example():
    """1.0 is 64 units of 2^-6, at the scale of 2^0."""
    assert round_block([1.0, -0.5, 1 / 64, 1 / 129]) == (127, [64, -32, 1, 0])
