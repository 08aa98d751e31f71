"""Where the sums and counters of tensors lie: apart from those of all that may be under way too."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from fused_adafactor import fields as f
from fused_adafactor import launching
from fused_adafactor.backends import triton as backend
from fused_adafactor.launching import LAUNCH_ENVIRONMENT
from fused_adafactor.tickets import LAUNCH_COUNTERS, scratch_of
from tests.dialects import HF
from tests.interpret.small import MIXED, SMALL, of_triton, use
from tests.kernels.biting import draw
from tests.kernels.judged import BF16, F32, F64, params_in

pytestmark = of_triton

Areas = dict[int, tuple[int, int]]


def bound(monkeypatch: pytest.MonkeyPatch, wave_bytes: int, **extras: Any) -> list[Any]:
    """The executors that step many tensors, of two dtypes of parameters and of float64."""
    use(monkeypatch, replace(SMALL, wave_bytes=wave_bytes))
    made: list[Any] = []
    bind = backend.bind
    monkeypatch.setattr(backend, "bind", lambda *args: made.append(bind(*args)) or made[-1])
    shapes = [*MIXED, (30, 40), (9, 13)]
    params = [p for dtype in (F32, BF16, F64) for p in params_in(shapes, dtype)]
    optimizer = HF(params, backend="triton", **extras)
    for p, g in zip(params, [g for d in (F32, BF16, F64) for g in draw(shapes, 0, d)], strict=True):
        p.grad = g
    monkeypatch.setattr(launching.Executor, "_launch", lambda *_: None)
    optimizer.step()
    assert len(made) == 2
    return made


def areas_of(executor: Any, group: Any) -> Areas:
    """First byte and end of the sums of each tensor of a group."""
    areas = {}
    for number, pieces in zip(group.numbers, group.pieces, strict=True):
        first = int(executor.table[number, f.SUMS])
        areas[number] = (first, scratch_of(pieces, executor.math_dtype.itemsize, first).end)
    return areas


def assert_apart(areas: list[tuple[int, int]]) -> None:
    areas = sorted(areas)
    for (_, end), (start, _) in itertools.pairwise(areas):
        assert end <= start


@pytest.mark.parametrize("wave_bytes", [1, 2000, 20_000, 2**30])
def test_tensors_under_way_do_not_share_a_place(
    wave_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes over a place before all of the wave that held it have been applied."""
    for executor in bound(monkeypatch, wave_bytes):
        for group in executor.groups:
            areas = areas_of(executor, group)
            assert max(end for _, end in areas.values()) <= executor.scratch.numel()
            by_wave = [[group.numbers[n] for n in wave] for wave in group.waves]
            for index, wave in enumerate(by_wave):
                near = by_wave[max(0, index - 2) : index + 1]
                assert_apart([areas[number] for numbers in near for number in numbers])
                rows = executor.table[wave]
                counters = set(rows[:, f.WAVE].tolist())
                assert counters == {LAUNCH_COUNTERS + index}
                after, count = -1, 0
                if index >= 3:
                    after = LAUNCH_COUNTERS + index - 3
                    count = sum(group.pieces[n].units for n in group.waves[index - 3])
                assert set(rows[:, f.AFTER].tolist()) == {after}
                assert set(rows[:, f.AFTER_COUNT].tolist()) == {count}


@pytest.mark.parametrize("extras", [{"clipnorm": 1.0}, {}], ids=str)
def test_sums_that_must_be_kept_are(
    extras: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first sweep of all tensors ends before the second begins, or launches follow."""
    if not extras:
        monkeypatch.setenv(LAUNCH_ENVIRONMENT, "phases")
    for executor in bound(monkeypatch, 2000, **extras):
        areas = [a for group in executor.groups for a in areas_of(executor, group).values()]
        assert_apart(areas)
        assert max(end for _, end in areas) <= executor.scratch.numel()
        assert set(executor.table[:, f.AFTER].tolist()) == {-1}


def test_counters_of_a_launch_are_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for executor in bound(monkeypatch, 2000):
        for group in executor.groups:
            used = [(0, LAUNCH_COUNTERS + len(group.waves))]
            for number, pieces in zip(group.numbers, group.pieces, strict=True):
                first = int(executor.table[number, f.PROGRESS])
                used.append((first, first + pieces.counters))
            assert_apart(used)
            assert max(end for _, end in used) <= executor.counters.numel()


def test_many_waves_need_no_more_scratch_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bounded by what is under way, not by the model."""
    use(monkeypatch, SMALL)
    sizes = []
    for count in (12, 120):
        with monkeypatch.context() as patched:
            made: list[Any] = []
            bind = backend.bind
            patched.setattr(backend, "bind", lambda *args: made.append(bind(*args)) or made[-1])  # noqa: B023
            patched.setattr(launching.Executor, "_launch", lambda *_: None)
            params = params_in([(30, 40)] * count, F32)
            for p in params:
                p.grad = p.detach().clone()
            HF(params, backend="triton").step()
        sizes.append(made[0].scratch.numel())
    assert sizes[0] == sizes[1]
