"""The rounding contract: known answers, bit patterns, distribution, independence from chunking.

Oracles here are Python integers, so that they share no arithmetic with the tensors under test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fused_adafactor.rounding import (
    Rounding,
    RoundingKey,
    Stream,
    is_rounding_of,
    philox_4x32,
    random_bits,
    random_bits_range,
    round_kahan,
    round_nearest,
    round_stochastic,
)

KEY = RoundingKey(seed=0x1234_5678_9ABC_DEF0, param_index=7, step=42)

# Counter, key, expected words: the published Philox-4x32-10 vectors (Random123, kat_vectors).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Bits of the float32 value, bits of the bfloat16 result.
SPECIAL_PATTERNS = [
    pytest.param(0x7FFFFFFF, 0x7FFF, id="nan-all-ones"),
    pytest.param(0xFFFFFFFF, 0xFFFF, id="negative-nan-all-ones"),
    pytest.param(0x7F800001, 0x7FC0, id="signalling-nan-low-payload"),
    pytest.param(0xFF80FFFF, 0xFFC0, id="negative-signalling-nan-low-payload"),
    pytest.param(0x7FC00000, 0x7FC0, id="default-nan"),
    pytest.param(0x7FA10000, 0x7FE1, id="signalling-nan-upper-payload"),
    pytest.param(0x7F800000, 0x7F80, id="inf"),
    pytest.param(0xFF800000, 0xFF80, id="negative-inf"),
    pytest.param(0x00000000, 0x0000, id="zero"),
    pytest.param(0x80000000, 0x8000, id="negative-zero"),
    pytest.param(0x00010000, 0x0001, id="smallest-subnormal"),
    pytest.param(0x80010000, 0x8001, id="negative-smallest-subnormal"),
    pytest.param(0x007F0000, 0x007F, id="largest-subnormal"),
    pytest.param(0x7F7F0000, 0x7F7F, id="largest-finite"),
    pytest.param(0xFF7F0000, 0xFF7F, id="negative-largest-finite"),
    pytest.param(0x3F800000, 0x3F80, id="one"),
]


def from_bits32(patterns: list[int] | torch.Tensor) -> torch.Tensor:
    """float32 values of unsigned 32-bit patterns."""
    bits = torch.as_tensor(patterns, dtype=torch.int64)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def bits16(value: torch.Tensor) -> torch.Tensor:
    """Unsigned 16-bit patterns of bfloat16 or float16 values."""
    return value.view(torch.int16).to(torch.int64) & 0xFFFF


def philox_of_python_ints(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def bits_of_python_ints(key: RoundingKey, element: int) -> int:
    block, lane = divmod(element, 8)
    second = block // 2**32 + key.stream * 2**28
    counter = (block % 2**32, second, key.param_index, int(key.step) % 2**32)
    words = philox_of_python_ints(counter, (key.seed % 2**32, key.seed // 2**32))
    return words[lane // 2] // (2**16 if lane % 2 else 1) % 2**16


def nearest_even_of_python_ints(pattern: int, fraction_bits: int, min_exponent: int) -> float:
    """The finite float32 ``pattern`` to nearest even, with whole numbers only.

    ``fraction_bits`` and ``min_exponent`` (of the smallest normal) describe the target format,
    whose largest exponent is ``1 - min_exponent``.
    """
    sign = -1.0 if pattern >> 31 else 1.0
    exponent, fraction = (pattern >> 23) & 0xFF, pattern & 0x7FFFFF
    significand = fraction + (2**23 if exponent else 0)
    unit = max(exponent, 1) - 150
    # The value is significand * 2**unit; the target's spacing there is 2**target_unit.
    target_unit = max(unit + significand.bit_length() - 1, min_exponent) - fraction_bits
    shift = target_unit - unit
    if shift <= 0:
        quotient, target_unit = significand, unit
    else:
        quotient, rest = divmod(significand, 2**shift)
        half = 2 ** (shift - 1)
        quotient += rest > half or (rest == half and quotient % 2 == 1)
    if quotient.bit_length() + target_unit > 2 - min_exponent:
        return sign * float("inf")
    return sign * quotient * 2.0**target_unit


def random_patterns(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**32, (count,), generator=generator, dtype=torch.int64)


class TestRounding:
    @pytest.mark.parametrize("member", list(Rounding))
    def test_parse_takes_members_and_their_values(self, member: Rounding) -> None:
        assert Rounding.parse(member) is member
        assert Rounding.parse(member.value) is member
        assert member == member.value

    def test_parse_lists_the_valid_values(self) -> None:
        with pytest.raises(
            ValueError, match="one of 'nearest', 'stochastic', 'kahan', got 'Nearest'"
        ):
            Rounding.parse("Nearest")


class TestRoundingKey:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("seed", -1),
            ("seed", 2**63),
            ("param_index", -1),
            ("param_index", 2**32),
            ("step", -1),
            ("step", torch.zeros(1)),
        ],
    )
    def test_refuses_what_does_not_fit_its_word(self, field: str, value: object) -> None:
        fields = {"seed": 0, "param_index": 0, "step": 0, field: value}
        with pytest.raises(ValueError, match=f"^{field} must be"):
            RoundingKey(**fields)


class TestPhilox:
    @pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
    def test_known_answers(self, counter, key, expected) -> None:
        assert tuple(int(word) for word in philox_4x32(counter, key)) == expected
        # Tensors of a full and of a broadcast shape take the same way.
        columns = tuple(torch.full((3, 1), c) if i % 2 else c for i, c in enumerate(counter))
        for word, answer in zip(philox_4x32(columns, key), expected, strict=True):
            assert word.dtype == torch.int64
            assert word.tolist() == [[answer]] * 3

    def test_agrees_with_python_integers(self) -> None:
        counters = random_patterns(4 * 500, seed=1).view(4, 500)
        key = (0xDEADBEEF, 0x80000001)
        words = torch.stack(philox_4x32(tuple(counters), key), dim=-1)
        for counter, word in zip(counters.T.tolist(), words.tolist(), strict=True):
            assert tuple(word) == philox_of_python_ints(tuple(counter), key)

    def test_only_low_words_count(self) -> None:
        high = torch.tensor([-1 << 32, 5 << 32])
        words = philox_4x32((high, high, 1 << 40, -1 << 32), (3 << 32, -1 << 32))
        for word, answer in zip(words, KNOWN_ANSWERS[0][2], strict=True):
            assert word.tolist() == [answer, answer]

    @pytest.mark.interpreter
    def test_agrees_with_triton(self, tmp_path: Path) -> None:
        pytest.importorskip("triton")  # not a peer: torch's CUDA builds bring it, others need none
        # TRITON_INTERPRET is read when triton is imported, and a kernel's source must be in a file.
        script = tmp_path / "philox_in_triton.py"
        script.write_text(
            textwrap.dedent("""
            import torch
            import triton
            import triton.language as tl

            @triton.jit
            def kernel(out_ptr, seed, c0, c1, c2, c3):
                offs = tl.arange(0, 16)
                zero = offs * 0
                w0, w1, w2, w3 = tl.philox(
                    seed, (zero + c0) ^ offs, zero + c1, zero + c2, zero + c3
                )
                tl.store(out_ptr + offs, w0.to(tl.int64))
                tl.store(out_ptr + 16 + offs, w1.to(tl.int64))
                tl.store(out_ptr + 32 + offs, w2.to(tl.int64))
                tl.store(out_ptr + 48 + offs, w3.to(tl.int64))

            out = torch.zeros(4, 16, dtype=torch.int64)
            kernel[(1,)](out, 0x123456789ABCDEF0, 0x7FFFFFF8, 0x10000001, 7, 42)
            print(out.tolist())
            """)
        )
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        counter = (torch.arange(16) ^ 0x7FFFFFF8, 0x10000001, 7, 42)
        words = torch.stack(philox_4x32(counter, (0x9ABCDEF0, 0x12345678)))
        assert done.stdout.strip() == str(words.tolist())


class TestRandomBits:
    def test_layout_is_pinned_by_a_published_vector(self) -> None:
        key = RoundingKey(seed=0, param_index=0, step=0)
        expected = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
        assert random_bits(key, torch.arange(8)).tolist() == expected
        assert random_bits_range(key, 8).tolist() == expected

    @pytest.mark.parametrize("stream", Stream)
    @pytest.mark.parametrize("start", [0, 2**31 - 5, 2**32 - 5, 2**35 - 5, 2**40 + 3, 2**63 - 20])
    def test_layout_at_any_index(self, start: int, stream: Stream) -> None:
        key = replace(KEY, stream=stream)
        expected = [bits_of_python_ints(key, e) for e in range(start, start + 19)]
        elements = torch.arange(19) + start
        assert random_bits(key, elements).tolist() == expected
        assert random_bits_range(key, 19, start=start).tolist() == expected

    @pytest.mark.parametrize("start", range(9))
    @pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 17])
    def test_a_range_is_a_slice_of_the_whole(self, start: int, count: int) -> None:
        whole = random_bits_range(KEY, 40)
        assert torch.equal(random_bits_range(KEY, count, start=start), whole[start : start + count])

    def test_any_shape_and_order(self) -> None:
        whole = random_bits_range(KEY, 1001)
        shuffled = torch.randperm(1001, generator=torch.Generator().manual_seed(3)).view(7, 11, 13)
        assert torch.equal(random_bits(KEY, shuffled), whole[shuffled])
        assert random_bits(KEY, torch.tensor(5)).shape == ()
        assert random_bits(KEY, torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)

    def test_every_part_of_the_key_and_counter_counts(self) -> None:
        keys = [
            RoundingKey(seed=0, param_index=0, step=0),
            RoundingKey(seed=1, param_index=0, step=0),
            RoundingKey(seed=1 << 32, param_index=0, step=0),
            RoundingKey(seed=0, param_index=1, step=0),
            RoundingKey(seed=0, param_index=0, step=1),
            RoundingKey(seed=0, param_index=0, step=0, stream=Stream.ROW_VAR),
            RoundingKey(seed=0, param_index=0, step=0, stream=Stream.COL_VAR),
        ]
        streams = [random_bits_range(key, 4096) for key in keys]
        streams += [random_bits_range(keys[0], 4096, start=s) for s in (4096, 1 << 32, 1 << 35)]
        for i, one in enumerate(streams):
            for other in streams[:i]:
                # Independent 16-bit values agree 4096 / 65536 times on average; 6 has p < 1e-10.
                assert int((one == other).sum()) < 6

    def test_an_unfactored_moment_has_the_bits_of_row_var(self) -> None:
        """No tensor has both; the values are the contract with the kernels."""
        assert [int(stream) for stream in Stream] == [0, 1, 2]
        assert Stream.VAR is Stream.ROW_VAR

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
    def test_step_tensor_equals_step_int(self, dtype: torch.dtype) -> None:
        step = 12_345_678  # a float32 holds every count up to 2**24
        as_int = RoundingKey(seed=9, param_index=3, step=step)
        as_tensor = RoundingKey(seed=9, param_index=3, step=torch.tensor(step, dtype=dtype))
        assert torch.equal(random_bits_range(as_int, 33), random_bits_range(as_tensor, 33))
        elements = torch.arange(33)
        assert torch.equal(random_bits(as_int, elements), random_bits(as_tensor, elements))

    def test_all_bits_of_all_lanes_are_fair(self) -> None:
        blocks = 20_000
        bits = random_bits_range(KEY, 8 * blocks).view(blocks, 8, 1) >> torch.arange(16) & 1
        z = (bits.sum(dim=0) - blocks / 2) / (blocks / 4) ** 0.5
        # 128 fair coins; the seed is fixed, 5 sigma says the seed was not lucky (p < 1e-4).
        assert z.abs().max() < 5

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        random_bits_range(KEY, 100)
        random_bits(KEY, torch.arange(10))
        round_stochastic(torch.ones(9), torch.bfloat16, KEY)
        assert torch.equal(torch.get_rng_state(), before)

    def test_nothing_is_read_on_the_host(self) -> None:
        # A meta tensor has no data: whatever reads a value raises.
        key = RoundingKey(seed=1, param_index=2, step=torch.tensor(3.0, device="meta"))
        value = torch.empty(3, 5, device="meta")
        elements = torch.empty(3, 5, dtype=torch.int64, device="meta")
        assert random_bits_range(key, 9, start=3, device="meta").shape == (9,)
        for result in (
            round_stochastic(value, torch.bfloat16, key),
            round_stochastic(value, torch.bfloat16, key, elements),
            round_nearest(value, torch.bfloat16),
            *round_kahan(value, torch.bfloat16),
        ):
            assert result.shape == (3, 5)
            assert result.dtype == torch.bfloat16

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("step_device", ["cpu", "cuda"])
    def test_devices_agree(self, step_device: str) -> None:
        patterns = random_patterns(100_001, seed=5)
        value = from_bits32(patterns)
        on_cpu = round_stochastic(value, torch.bfloat16, KEY)
        step = torch.tensor(float(KEY.step), device=step_device)
        key = RoundingKey(KEY.seed, KEY.param_index, step)
        on_gpu = round_stochastic(value.cuda(), torch.bfloat16, key)
        assert torch.equal(bits16(on_gpu.cpu()), bits16(on_cpu))


class TestRoundNearest:
    @pytest.mark.parametrize(
        ("dtype", "fraction_bits", "min_exponent"),
        [(torch.bfloat16, 7, -126), (torch.float16, 10, -14)],
        ids=["bf16", "fp16"],
    )
    def test_agrees_with_whole_numbers(self, dtype, fraction_bits, min_exponent) -> None:
        patterns = random_patterns(20_000, seed=11)
        # Few random patterns lie in the range of float16, near its ends or on ties.
        in_range = (patterns & 0x80FF_FFFF) | (((patterns >> 24) % 0x24 + 0x2B) << 24)
        ties = patterns & ~((1 << (23 - fraction_bits)) - 1) | (1 << (22 - fraction_bits))
        ends = [0x477FEFFF, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000, 0x33000000, 0x33000001, 0x8000]
        patterns = torch.cat([patterns, in_range, ties, torch.tensor(ends)])
        patterns = patterns[(patterns & 0x7F80_0000) != 0x7F80_0000]
        expected = torch.tensor(
            [
                nearest_even_of_python_ints(p, fraction_bits, min_exponent)
                for p in patterns.tolist()
            ],
            dtype=torch.float64,
        )
        rounded = round_nearest(from_bits32(patterns), dtype)
        assert rounded.dtype == dtype
        # Compared as bits of float64: the sign of zero counts.
        assert torch.equal(rounded.double().view(torch.int64), expected.view(torch.int64))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_special_values(self, dtype: torch.dtype) -> None:
        inf = float("inf")
        value = from_bits32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000])
        rounded = round_nearest(value, dtype)
        assert rounded[:3].isnan().all()
        assert rounded[3:].tolist() == [inf, -inf]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wide_targets_keep_float32(self, dtype: torch.dtype) -> None:
        value = torch.tensor([[1 / 3, -0.0, 1e-45]])
        rounded = round_nearest(value, dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.float().view(torch.int32), value.view(torch.int32))

    def test_float64_goes_through_float32(self) -> None:
        # A hair above the tie between 1 and 1 + 2**-7, the hair below float32's resolution.
        value = torch.tensor(1 + 2**-8 + 2**-40, dtype=torch.float64)
        assert round_nearest(value, torch.bfloat16).item() == 1.0

    def test_refuses_other_dtypes(self) -> None:
        with pytest.raises(ValueError, match=r"^value must be .* got torch.bfloat16"):
            round_nearest(torch.ones(2, dtype=torch.bfloat16), torch.bfloat16)
        with pytest.raises(ValueError, match=r"^dtype must be .* got torch.int8"):
            round_nearest(torch.ones(2), torch.int8)


class TestRoundStochastic:
    @pytest.mark.parametrize(("pattern", "expected"), SPECIAL_PATTERNS)
    def test_special_patterns_are_kept_whatever_the_bits(self, pattern: int, expected: int) -> None:
        value = from_bits32([pattern]).expand(4096)
        assert bits16(round_stochastic(value, torch.bfloat16, KEY)).unique().tolist() == [expected]

    def test_every_bfloat16_is_unchanged(self) -> None:
        value = from_bits32(torch.arange(2**16) << 16)
        rounded = round_stochastic(value, torch.bfloat16, KEY)
        quiet = torch.where(value.isnan(), 0x40, 0)
        assert torch.equal(bits16(rounded), torch.arange(2**16) | quiet)

    def test_exact_rule_on_random_patterns(self) -> None:
        patterns = random_patterns(200_000, seed=13)
        rounded = bits16(round_stochastic(from_bits32(patterns), torch.bfloat16, KEY))
        noise = random_bits_range(KEY, patterns.numel())
        finite = (patterns & 0x7F80_0000) != 0x7F80_0000
        # Sign and magnitude are separate in the pattern: adding moves away from zero on both sides.
        expected = (patterns + noise) >> 16
        assert torch.equal(rounded[finite], expected[finite])
        away = rounded[finite] - (patterns[finite] >> 16)
        assert away.unique().tolist() == [0, 1]
        assert (rounded[finite] >> 15 == patterns[finite] >> 31).all()
        assert round_stochastic(from_bits32(patterns), torch.bfloat16, KEY)[~finite].isnan().all()

    @pytest.mark.parametrize("pattern", [0x3F80FFFF, 0xBFFF0001, 0x00000001, 0x8000FFFF])
    def test_only_the_two_neighbours(self, pattern: int) -> None:
        value = from_bits32([pattern]).expand(400_000)
        seen = bits16(round_stochastic(value, torch.bfloat16, KEY)).unique().tolist()
        assert seen == [pattern >> 16, (pattern >> 16) + 1]

    def test_beyond_the_largest_finite_may_become_inf(self) -> None:
        value = from_bits32([0x7F7F8000, 0xFF7F8000]).expand(1000, 2)
        rounded = round_stochastic(value, torch.bfloat16, KEY)
        assert bits16(rounded[:, 0]).unique().tolist() == [0x7F7F, 0x7F80]
        assert bits16(rounded[:, 1]).unique().tolist() == [0xFF7F, 0xFF80]

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("low", [1 << 8, 0x2000, 0x5555, 0x8000, 0xF000])
    @pytest.mark.parametrize("high", [0x3F80, 0xBFFF, 0x0000, 0x8001])
    def test_unbiased(self, high: int, low: int, seed: int) -> None:
        draws = 100_000
        value = from_bits32([high << 16 | low]).expand(draws)
        key = RoundingKey(seed=seed, param_index=high, step=low)
        ups = int((bits16(round_stochastic(value, torch.bfloat16, key)) - high).sum())
        p = low / 2**16
        # Binomial(draws, p); the keys are fixed, so 4.5 sigma over 80 cases (p < 1e-3) is settled.
        assert abs(ups - draws * p) < 4.5 * (draws * p * (1 - p)) ** 0.5

    def test_mean_of_a_varied_tensor(self) -> None:
        repeats, steps = 100, 20
        value = torch.linspace(-3, 3, 97).expand(repeats, 97)
        total = torch.zeros(97, dtype=torch.float64)
        for step in range(steps):
            rounded = round_stochastic(value, torch.bfloat16, RoundingKey(5, 0, step))
            total += rounded.double().sum(dim=0)
        mean = total / (repeats * steps)
        # One rounding has a deviation of half the spacing at most; the spacing below 4 is 2**-6.
        bound = 5 * 2**-7 / (repeats * steps) ** 0.5
        assert (mean - value[0].double()).abs().max() < bound

    def test_chunks_reproduce_the_whole(self) -> None:
        value = torch.linspace(-1, 1, 30 * 50).view(30, 50)
        index = torch.arange(30 * 50).view(30, 50)
        whole = round_stochastic(value, torch.bfloat16, KEY)
        edges = [0, 1, 8, 20, 30]
        rows = [slice(a, b) for a, b in pairwise(edges)]
        by_rows = [round_stochastic(value[r], torch.bfloat16, KEY, index[r]) for r in rows]
        assert torch.equal(torch.cat(by_rows), whole)
        halves = [
            round_stochastic(h, torch.bfloat16, KEY, i)
            for h, i in zip(value.chunk(3, 1), index.chunk(3, 1), strict=True)
        ]
        assert torch.equal(torch.cat(halves, dim=1), whole)

    def test_large_tensors_follow_the_same_rule(self) -> None:
        count = 2**21 + 11  # more than is rounded at a time
        value = torch.full((count,), 1.005)
        expected = (value.view(torch.int32).to(torch.int64) + random_bits_range(KEY, count)) >> 16
        assert torch.equal(bits16(round_stochastic(value, torch.bfloat16, KEY)), expected)
        backwards = torch.arange(count).flip(0)
        rounded = round_stochastic(value, torch.bfloat16, KEY, backwards)
        assert torch.equal(bits16(rounded), expected.flip(0))

    def test_memory_layout_does_not_count(self) -> None:
        value = torch.linspace(-1, 1, 2 * 3 * 5 * 7).view(2, 3, 5, 7)
        whole = round_stochastic(value, torch.bfloat16, KEY)
        channels_last = value.to(memory_format=torch.channels_last)
        transposed = value.transpose(0, 3).contiguous().transpose(0, 3)
        misaligned = torch.cat([torch.zeros(1), value.flatten()])[1:].view_as(value)
        for same in (channels_last, transposed, misaligned):
            assert torch.equal(round_stochastic(same, torch.bfloat16, KEY), whole)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        rounded = round_stochastic(torch.ones(shape), torch.bfloat16, KEY)
        assert rounded.shape == shape
        assert (rounded == 1).all()

    def test_float64_goes_through_float32(self) -> None:
        value = torch.linspace(-1, 1, 999, dtype=torch.float64)
        from_double = round_stochastic(value, torch.bfloat16, KEY)
        assert torch.equal(from_double, round_stochastic(value.float(), torch.bfloat16, KEY))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wide_targets_are_nearest(self, dtype: torch.dtype) -> None:
        value = torch.linspace(-1, 1, 99, dtype=torch.float64)
        assert torch.equal(round_stochastic(value, dtype, KEY), round_nearest(value, dtype))

    def test_refuses_float16_and_says_what_to_use(self) -> None:
        with pytest.raises(ValueError, match="use 'kahan' or 'nearest'"):
            round_stochastic(torch.ones(2), torch.float16, KEY)

    def test_refuses_elements_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"^elements must be shaped as value, \(2, 3\)"):
            round_stochastic(torch.ones(2, 3), torch.bfloat16, KEY, torch.arange(6))


class TestRoundKahan:
    @pytest.mark.parametrize("math_dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("dtype", "precision"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bf16", "fp16"]
    )
    def test_the_pair_carries_the_next_bits(self, dtype, precision, math_dtype) -> None:
        value = torch.linspace(1, 2, 10_007, dtype=math_dtype)
        rounded, compensation = round_kahan(value, dtype)
        assert rounded.dtype == compensation.dtype == dtype
        assert torch.equal(rounded, round_nearest(value, dtype))
        # In [1, 2) the compensation is 2**-precision at most, and is itself rounded to nearest.
        assert compensation.abs().max() <= 2**-precision
        smallest_step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = max(2 ** -(2 * precision + 1), smallest_step / 2)
        error = value.double() - rounded.double() - compensation.double()
        assert error.abs().max() <= bound

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_no_compensation_where_not_finite(self, dtype: torch.dtype) -> None:
        inf, nan = float("inf"), float("nan")
        value = torch.tensor([[inf, -inf, nan], [3.4e38, -3.4e38, 1.0]])
        rounded, compensation = round_kahan(value, dtype)
        assert not rounded.isfinite()[:, :2].any()
        assert rounded.shape == compensation.shape == value.shape
        assert compensation.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_nothing_to_compensate_in_wide_targets(self, dtype: torch.dtype) -> None:
        value = torch.linspace(-1, 1, 99)
        rounded, compensation = round_kahan(value, dtype)
        assert torch.equal(rounded, value.to(dtype))
        assert not compensation.any()

    def test_float64_math_with_float32_parameters(self) -> None:
        value = torch.linspace(1, 2, 99, dtype=torch.float64)
        rounded, compensation = round_kahan(value, torch.float32)
        error = value - rounded.double() - compensation.double()
        assert error.abs().max() <= 2.0**-49

    def test_tracks_float64_where_nearest_stalls(self) -> None:
        steps = 2000
        update = torch.linspace(1e-5, 4e-4, 64)  # all below half a bfloat16 step at 1, 2**-8
        start = torch.ones(64, dtype=torch.bfloat16)
        nearest, kahan, compensation = start, start, torch.zeros_like(start)
        for _ in range(steps):
            nearest = round_nearest(nearest.float() + update, torch.bfloat16)
            kahan, compensation = round_kahan(
                kahan.float() + compensation.float() + update, torch.bfloat16
            )
        exact = start.double() + steps * update.double()
        assert exact.max() < 2
        assert torch.equal(nearest, start)
        # In [1, 2) each step errs by 2**-17 (the compensation) and 2**-24 (the float32 sum, whose
        # first addition is exact); the parameter alone, by half its own step more.
        bound = steps * (2**-17 + 2**-24)
        error = (kahan.double() + compensation.double() - exact).abs()
        assert error.max() <= bound
        assert (kahan.double() - exact).abs().max() <= bound + 2**-8
        # The worst case supposes that all errors point one way; it must still tell the two apart.
        assert bound < (exact - 1).max() / 10


# --- telling whether something was rounded from something ----------------------------------------


def _awkward_values() -> torch.Tensor:
    """Ties, neighbours of them, subnormals, exact values, of both signs."""
    bits = torch.arange(0, 2**17, 97, dtype=torch.int32)
    starts = (0, 0x00800000 - 2**16, 0x3F800000 - 2**16, 0x7F7E0000)
    values = torch.cat([(bits + start).view(torch.float32) for start in starts])
    return torch.cat([values, -values])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_was_rounded_to_nearest_is_recognised(dtype: torch.dtype) -> None:
    values = _awkward_values()
    rounded = round_nearest(values, dtype)
    for rounding in Rounding:
        assert is_rounding_of(rounded, values, rounding).all()
    wrong = torch.where(rounded == 0, 1.0, rounded * 4).to(dtype)
    changed = wrong.isfinite() & (wrong != rounded)  # Inf is next to the largest number
    for rounding in Rounding:
        assert not is_rounding_of(wrong, values, rounding)[changed].any()


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_what_was_rounded_at_random_is_recognised_and_nothing_further(wide: torch.dtype) -> None:
    values = _awkward_values().to(wide)
    for step in range(20):
        rounded = round_stochastic(values, torch.bfloat16, RoundingKey(1, 0, step))
        assert is_rounding_of(rounded, values, Rounding.STOCHASTIC).all()
    raw = values.to(torch.float32).view(torch.int32)
    for distance in range(-2, 4):
        other = ((raw >> 16) + distance).to(torch.int16).view(torch.bfloat16)
        wanted = (distance == 0) | ((distance == 1) & ((raw & 0xFFFF) != 0))
        # Below zero is a number of the other sign, and NaN is above Inf.
        sane = (other.sign() == values.sign()) & ~other.isnan() & (values != 0)
        found = is_rounding_of(other, values, Rounding.STOCHASTIC)
        assert torch.equal(found[sane], wanted[sane]), distance
