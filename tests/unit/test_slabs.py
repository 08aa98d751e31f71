"""Items for the threads of a CPU: each once, none waits for what comes later, all are at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fused_adafactor.factoring import Factoring, View
from fused_adafactor.plan import Phase
from fused_adafactor.slabs import (
    CPU_CUT,
    CPU_CUT_OF_HALVES,
    Cut,
    Form,
    Geometry,
    Item,
    ItemKind,
    geometry_of,
    is_whole,
    items_of,
    merges_of,
    strips_of,
    waves_of,
)
from fused_adafactor.spec import TensorId, TensorSpec

WHOLE_STEP = tuple(Phase)
JOINED = (Phase.FINALIZE, Phase.UPDATE_RMS, Phase.APPLY)


def geometry(shape: tuple[int, ...], view: View = View.LAST_TWO, cut: Cut = CPU_CUT) -> Geometry:
    values = torch.empty(shape, device="meta")
    spec = TensorSpec(
        id=TensorId(0, 0, None),
        shape=shape,
        param_strides=values.stride(),
        grad_strides=values.stride(),
        param_dtype=torch.float32,
        grad_dtype=torch.float32,
        math_dtype=torch.float32,
        device=torch.device("cpu"),
        view=Factoring(view).view_of(shape),
        structure=(),
    )
    return geometry_of(spec, cut)


SHAPES = st.one_of(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 9), st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 400), st.integers(1, 400), st.just(3), st.just(3)),
    st.tuples(st.integers(1, 2_000_000)),
)
MODELS = st.lists(st.builds(geometry, SHAPES), min_size=1, max_size=6)


def places(items: Sequence[Item], kind: ItemKind, number: int) -> list[int]:
    return [place for place, item in enumerate(items) if item[:2] == (kind, number)]


@hypothesis.given(MODELS, st.sampled_from([WHOLE_STEP, JOINED]), st.integers(1, 64))
def test_every_item_once_and_after_what_it_waits_for(
    model: list[Geometry], phases: tuple[Phase, ...], threads: int
) -> None:
    items = list(items_of(model, phases, threads))
    assert max(Counter(items).values()) == 1
    for number, g in enumerate(model):
        if phases == WHOLE_STEP and is_whole(g, CPU_CUT):
            assert [kind for kind, n, _ in items if n == number] == [ItemKind.WHOLE]
            continue
        stats, merges, finalize, rms, measure, apply = (
            places(items, kind, number)
            for kind in (
                *(ItemKind.STATS, ItemKind.MERGE, ItemKind.FINALIZE),
                *(ItemKind.UPDATE_RMS, ItemKind.MEASURE, ItemKind.APPLY),
            )
        )
        strips, _ = strips_of(g, CPU_CUT)
        assert len(stats) == (g.slabs if Phase.STATS in phases else 0)
        assert len(merges) == merges_of(g, CPU_CUT)
        assert (len(finalize), len(rms), len(measure)) == (1, g.slabs, 1)
        assert len(apply) == g.slabs * strips
        in_order = [*stats, *merges, *finalize, *rms, *measure, *apply]
        assert in_order == sorted(in_order)


@hypothesis.given(MODELS, st.integers(1, 64))
def test_waves_are_as_large_as_threads_ask_for_and_no_larger(
    model: list[Geometry], threads: int
) -> None:
    waves = waves_of(model, threads, everything=True)
    swept = [number for wave in waves for number in wave.swept]
    assert swept == [number for number, g in enumerate(model) if not is_whole(g, CPU_CUT)]
    assert sorted([*swept, *(n for wave in waves for n in wave.whole)]) == [*range(len(model))]
    for wave in waves[:-1]:
        *others, _ = slabs = [model[number].slabs for number in wave.swept]
        assert sum(others) < 2 * threads <= sum(slabs)


@hypothesis.given(MODELS, st.integers(1, 64))
def test_sums_of_a_wave_take_over_the_place_of_what_has_been_applied(
    model: list[Geometry], threads: int
) -> None:
    items = list(items_of(model, WHOLE_STEP, threads))
    waves = [wave.swept for wave in waves_of(model, threads, everything=True)]
    for before, wave in zip(waves, waves[2:], strict=False):
        applied = max(places(items, ItemKind.APPLY, before[0]))
        assert applied < min(places(items, ItemKind.STATS, wave[0]))


@hypothesis.given(st.builds(geometry, SHAPES))
def test_strips_are_all_of_a_slab(g: Geometry) -> None:
    strips, lines = strips_of(g, CPU_CUT)
    assert (strips - 1) * lines < g.lines_per_slab <= strips * lines
    if g.form is not Form.FACTORED:  # what is taken anew, or lies anyhow, is taken whole
        assert strips == 1
    elif strips > 1:
        assert lines == 1 or lines * g.cols <= CPU_CUT.slab_elements


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_strips_that_were_held_back_come_before_whatever_waits(threads: int) -> None:
    model = [geometry((5120, 1024)), geometry((300, 300)), geometry((5120, 1024))]
    items = list(items_of(model, WHOLE_STEP, threads))
    kinds = (ItemKind.STATS, ItemKind.FINALIZE, ItemKind.UPDATE_RMS, ItemKind.MEASURE)
    read, finalized, measured, known = (places(items, kind, 2)[-1] for kind in kinds)
    apply = places(items, ItemKind.APPLY, 0)
    for begin, end in ((read, finalized), (finalized, measured), (measured, known)):
        assert sum(begin < place < end for place in apply) == threads
    assert sum(place < read for place in apply) == len(apply) - 3 * threads
    assert [items[place][2] for place in apply] == list(reversed(range(len(apply))))


def test_what_is_read_last_is_applied_first() -> None:
    """In a wave of several tensors, and after all of them have been read for a common norm."""
    model = [geometry((300, 1024)) for _ in range(6)]
    for phases, threads in ((WHOLE_STEP, 16), (JOINED, 2)):
        items = list(items_of(model, phases, threads))
        applied = [number for kind, number, _ in items if kind is ItemKind.APPLY]
        several = len(waves_of(model, threads, everything=True)) > 1
        assert several == (phases == JOINED)
        assert applied == sorted(applied, reverse=True)


@pytest.mark.parametrize("cut", [CPU_CUT, CPU_CUT_OF_HALVES], ids=["wide", "halves"])
def test_sums_are_small_beside_what_they_are_of(cut: Cut) -> None:
    """Two sums of four bytes for each column of a slab, beside its elements."""
    g = geometry((4096, 14_336), cut=cut)
    width = 4 if cut is CPU_CUT else 2
    assert 8 * g.slabs * g.cols < 0.02 * width * g.rows * g.cols


def test_lines_of_nothing_are_one_strip() -> None:
    """Of a part whose columns are all on other processes."""
    g = replace(geometry((200_000, 3)), cols=0, form=Form.FACTORED, lines_per_slab=200_000, slabs=1)
    assert strips_of(g, CPU_CUT) == (1, 200_000)


def test_a_cut_says_what_a_strip_is() -> None:
    g = geometry((4096, 4096))
    assert (g.slabs, g.lines_per_slab) == (32, 128)
    assert strips_of(g, CPU_CUT) == (4, 32)
    assert strips_of(g, replace(CPU_CUT, slab_elements=2**30)) == (1, 128)
