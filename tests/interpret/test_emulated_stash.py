"""What CUDA's blocks keep in shared memory between the sweeps: no bit is another one for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import fields as f
from fused_adafactor.backends import cuda
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from fused_adafactor.tickets import Tuning
from tests import emulated
from tests.interpret.small import BACKEND, SMALL, assert_same, built, judged, results, use
from tests.interpret.small import run as run_rule
from tests.kernels.biting import draw
from tests.kernels.judged import BF16, F32, params_in
from tests.stepping import params_of

pytestmark = pytest.mark.skipif(BACKEND != "cuda", reason="of CUDA's stash")

# Aligned: of several slabs in several waves, wide ones, a stack, chunks, one that is one ticket;
# and others between them, which are not.
SHAPES = [
    *((48, 64), (9, 13), (64, 96), (10, 512), (2, 40, 32), (4, 528), (3, 3), (8, 16), (96, 16)),
    *((48, 64), (37,), (40, 256)),
]
# Slabs of many rounds, the last one of each not whole; lines of which a thread has one run of
# neighbours, and two; chunks.
LONG = replace(
    SMALL,
    cut=replace(SMALL.cut, slab_elements=6000, slab_lines=8),
    widest=1024,
    chunk=512,
    wave_bytes=2**18,
)
LONG_SHAPES = [(300, 64), (9, 13), (70, 256), (44, 528), (27, 1024), (21, 2048), (150, 128)]

# A wave of each: units of every other one are kept, and those of the third wave after it, which
# are not, write over their marks.
MANY_WAVES = [(16, 64), (16, 33)] * 8
SEEDS = range(1, 9)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Units whose gradients were kept, of each launch with both sweeps: by the marks they left."""
    kept: list[int] = []
    start = cuda.CudaKernel.start

    def start_and_count(self: Any, arguments: Any) -> None:
        start(self, arguments)
        if not self._record.keeps:
            return
        marks = 0
        for row in arguments.table:
            sums = arguments.scratch[int(row[f.SUMS]) :].view(torch.float64)
            units = int(row[f.UNITS])
            of_units = sums[: units * f.UNIT_SUMS].view(units, -1)
            marks += int((of_units[:, f.UNIT_HELD] > 0).sum())
        kept.append(marks)

    monkeypatch.setattr(cuda.CudaKernel, "start", start_and_count)
    return kept


def stash_of(monkeypatch: pytest.MonkeyPatch, size: int, processors: int = 2) -> None:
    """So many bytes of a stash, on so many processors of two blocks each."""
    initialise = cuda.CudaLauncher.__init__

    def patched(self: Any, *args: Any) -> None:
        initialise(self, *args)
        self.stash_bytes = size

    monkeypatch.setattr(cuda.CudaLauncher, "__init__", patched)
    monkeypatch.setenv("FUSED_ADAFACTOR_EMULATED_PROCESSORS", str(processors))


def run(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[dict[str, Tensor]]:
    extras: dict[str, Any] = {"rounding": "stochastic", "seed": 3} if dtype is BF16 else {}
    optimizer = built("hf", params_in(shapes, dtype), **extras)
    for step in range(2):
        for p, g in zip(params_of(optimizer), draw(shapes, step, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return results(optimizer)


WAVES = [1, 20_000, 2**30]


@pytest.mark.parametrize("wave_bytes", WAVES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_kept_changes_no_bit(
    dtype: torch.dtype, wave_bytes: int, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, room for some lines of a unit, for units of several waves, for everything."""
    use(monkeypatch, replace(SMALL, wave_bytes=wave_bytes))
    runs = []
    for size in (0, 14 * 1024, 24 * 1024, 200 * 1024):
        with monkeypatch.context() as patch:
            stash_of(patch, size)
            runs.append(run(dtype))
    for other in runs[1:]:
        assert_same(runs[0], other)
    if wave_bytes == 2**30:  # one place in the scratch for each, so every mark is still there
        assert len(held) == 6
        assert 0 < held[0] < held[-1]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_slabs_of_many_rounds(
    dtype: torch.dtype, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that stay, and those that make room for others."""
    use(monkeypatch, LONG)
    runs = []
    for size in (0, 13 * 1024, 20 * 1024, 200 * 1024):
        with monkeypatch.context() as patch:
            stash_of(patch, size)
            runs.append(run(dtype, LONG_SHAPES))
    for other in runs[1:]:
        assert_same(runs[0], other)
    assert 0 < held[0] < held[-1]
    pair = judged("hf", params_in(LONG_SHAPES, dtype))
    pair.step(draw(LONG_SHAPES, 0, dtype))


@pytest.mark.parametrize("processors", [1, 2, 4])
def test_any_number_of_blocks_keeps_what_it_may(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks take turns here; one that waited for what another keeps would wait for ever."""
    runs = []
    for size, blocks in ((0, 1), (40 * 1024, processors)):
        for wave_bytes in WAVES:
            with monkeypatch.context() as patch:
                use(patch, replace(SMALL, wave_bytes=wave_bytes))
                stash_of(patch, size, blocks)
                runs.append(run(F32, SHAPES * 3))
    for other in runs[1:]:
        assert_same(runs[0], other)


def test_blocks_of_any_speed_apply_each_unit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who passes by a unit that another keeps may read its mark late: it must still be there."""
    use(monkeypatch, replace(SMALL, wave_bytes=1))
    stash_of(monkeypatch, 0, 1)
    steady = run(F32, MANY_WAVES)
    stash_of(monkeypatch, 40 * 1024, 4)
    for seed in SEEDS:
        monkeypatch.setenv("FUSED_ADAFACTOR_EMULATED_SEED", str(seed))
        assert_same(steady, run(F32, MANY_WAVES))


def test_copies_that_threads_make_themselves_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on sm_80, which has no bulk copies."""
    use(monkeypatch, LONG)
    stash_of(monkeypatch, 32 * 1024)
    runs = [run(BF16, LONG_SHAPES)]
    library = emulated.library("-DFA_EMULATED_SM80")
    monkeypatch.setenv(cuda.LIBRARY_ENVIRONMENT, str(library))
    cuda.library.cache_clear()
    runs.append(run(BF16, LONG_SHAPES))
    assert_same(*runs)


# By the sizes of a GPU: lines of every number of threads and warps, of one run of neighbours and of
# two, and chunks; matrices that are no multiple of anything, or tiny; a stack, and vectors.
LARGE_SHAPES = [
    *((600, 1024), (130, 4096), (70, 4112), (129, 2064), (2000, 16), (64, 128), (9, 16, 304)),
    *((257, 513), (1000, 8), (17, 23), (40, 5, 5), (3, 3), (65_537,)),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_blocks_of_as_many_threads_as_on_a_gpu(
    dtype: torch.dtype, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Tuning())
    monkeypatch.setenv(cuda.LIBRARY_ENVIRONMENT, str(emulated.library("-DFA_EMULATED_THREADS=256")))
    cuda.library.cache_clear()
    runs = []
    for launch in LAUNCHES:
        with monkeypatch.context() as patch:
            patch.setenv(LAUNCH_ENVIRONMENT, launch)
            stash_of(patch, 96 * 1024, 3)
            runs.append(run(dtype, LARGE_SHAPES))
    assert_same(*runs)
    assert min(held) > 0
    pair = judged("hf", params_in(LARGE_SHAPES, dtype))
    pair.step(draw(LARGE_SHAPES, 0, dtype))


@pytest.mark.parametrize(
    ("rule", "shape", "dtype", "takes"),
    [
        *(("hf", (16, 64), F32, True), ("torch", (16, 64), BF16, True)),
        *(("hf", (9, 13), F32, False), ("hf", (16, 64), torch.float16, False)),
        *(("hf-momentum", (16, 64), F32, False), ("keras-everything", (16, 64), F32, False)),
        ("adafactor_pytorch-amsgrad", (16, 64), F32, False),
    ],
    ids=str,
)
def test_no_shared_memory_is_taken_where_nothing_is_ever_kept(
    rule: str, shape: tuple[int, ...], dtype: torch.dtype, takes: bool, held: list[int]
) -> None:
    run_rule(rule, [shape], dtype, steps=1)
    assert len(held) == takes


@pytest.mark.parametrize("extras", [{"max_grad_norm": 0.5}, {}], ids=["paused", "phases"])
def test_gradients_arrive_so_where_none_may_stay(
    extras: dict[str, Any], held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two launches with a pause between them, and of one for each phase, the first reads."""
    if not extras:
        monkeypatch.setenv(LAUNCH_ENVIRONMENT, "phases")
    runs = []
    for size in (0, 200 * 1024):
        with monkeypatch.context() as patch:
            stash_of(patch, size)
            runs.append(run_rule("hf", SHAPES, BF16, **extras))
    assert_same(*runs)
    assert not held


@pytest.mark.parametrize("extras", [{"nonfinite": "skip"}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("rule", ["hf", "torch"])
def test_steps_with_a_stash_are_the_reference_s(
    rule: str, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third sweep reads what is kept from memory; a skipped tensor is not written from it."""
    stash_of(monkeypatch, 40 * 1024)
    pair = judged(rule, params_in(SHAPES, F32), **extras)
    for step in range(2):
        grads = draw(SHAPES, 2 * step, F32)
        if "nonfinite" in extras and step:
            grads[0][3, 5] = torch.inf
            before = params_of(pair.ours)[0].detach().clone()
        pair.step(grads)
    if "nonfinite" in extras:
        assert torch.equal(params_of(pair.ours)[0], before)
