"""Tickets for a GPU: nobody waits for what comes later, and everything is done exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fused_adafactor.factoring import Factoring, View
from fused_adafactor.plan import Phase
from fused_adafactor.slabs import Form, Item, ItemKind, geometry_of
from fused_adafactor.spec import TensorId, TensorSpec
from fused_adafactor.tickets import (
    GPU_CUT,
    TENSOR_COUNTERS,
    Pieces,
    Sending,
    Ticket,
    Tuning,
    kinds_of,
    launches_of,
    pieces_of,
    scratch_of,
    tickets_of,
    waves_of,
)

# Waves whose sums may lie in the scratch at a time: the first of them has been applied before the
# first sweep of the fourth one begins.
PLACES = 3
SEGMENTS = {
    "whole": tuple(Phase),
    "first": (Phase.STATS,),
    "second": (Phase.FINALIZE, Phase.UPDATE_RMS, Phase.APPLY),
}
PLAIN = {"amsgrad_or_clamp": False, "norm_clipped": False, "raw_lines": False}
SPLIT_SEGMENTS = {
    "stats": (Phase.STATS,),
    "measure": (Phase.FINALIZE, Phase.UPDATE_RMS),
    "apply": (Phase.APPLY,),
}
EVERY_SEGMENT = pytest.mark.parametrize(
    ("phases", "split"),
    [
        *((phases, False) for phases in SEGMENTS.values()),
        *((phases, True) for phases in SPLIT_SEGMENTS.values()),
    ],
    ids=[*SEGMENTS, *SPLIT_SEGMENTS],
)


def spec_of(shape: tuple[int, ...], view: View = View.LAST_TWO, turned: bool = False) -> TensorSpec:
    values = torch.empty(shape, device="meta")
    if turned and len(shape) > 1:
        values = values.mT.contiguous().mT
    factored = Factoring(view).view_of(shape)
    return TensorSpec(
        id=TensorId(0, 0, None),
        shape=shape,
        param_strides=values.stride(),
        grad_strides=values.stride(),
        param_dtype=torch.float32,
        grad_dtype=torch.float32,
        math_dtype=torch.float32,
        device=torch.device("cpu"),
        view=factored,
        structure=(),
    )


TUNINGS = st.builds(
    Tuning,
    cut=st.builds(
        lambda slab, lines, slabs, free, whole: replace(
            GPU_CUT,
            slab_elements=slab,
            slab_lines=lines,
            most_slabs=slabs,
            free_line=free,
            whole_elements=whole,
            merge_columns=16,
        ),
        st.sampled_from([64, 512, 4096]),
        st.integers(1, 9),
        st.integers(1, 9),
        st.sampled_from([1024, 4096]),
        st.sampled_from([0, 64, 1024]),
    ),
    tile=st.sampled_from([32, 256]),
    widest=st.sampled_from([32, 256]),
    chunk=st.sampled_from([16, 32]),
    flat_tile=st.sampled_from([1024, 2048]),
    tiny_tile=st.just(1024),
    span=st.sampled_from([16, 64]),
    narrowest=st.just(16),
    wave_bytes=st.sampled_from([1, 2000, 100_000, 2**30]),
    rms_units=st.integers(1, 4),
    merges=st.integers(1, 4),
)
SPECS = st.builds(
    spec_of,
    st.lists(st.integers(1, 70), max_size=4)
    .map(tuple)
    .filter(lambda shape: _numel(shape) < 40_000),
    st.sampled_from(View),
    st.booleans(),
)
SWITCHES = st.fixed_dictionaries(
    {
        "measures": st.booleans(),
        "amsgrad_or_clamp": st.booleans(),
        "norm_clipped": st.booleans(),
        "raw_lines": st.booleans(),
    }
)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def cut_up(spec: TensorSpec, tuning: Tuning, **switches: Any) -> Pieces:
    return pieces_of(geometry_of(spec, tuning.cut), tuning, **switches)


Model = tuple[list[Pieces], list[list[int]], Tuning]
SENDING = st.one_of(
    st.builds(Sending, across=st.booleans(), weighted=st.booleans(), update_sq=st.just(False)),
    st.just(Sending(across=False, weighted=False, update_sq=True)),
)


@st.composite
def models(draw: st.DrawFn) -> tuple[Model, Model]:
    """Tensors that are stepped together, in pieces and waves: plain ones, and the same split."""
    tuning, switches = draw(TUNINGS), draw(SWITCHES)
    specs = draw(st.lists(SPECS, min_size=1, max_size=7))
    waves = waves_of([8 * spec.numel for spec in specs], tuning.wave_bytes)
    plain = [cut_up(spec, tuning, **switches) for spec in specs]
    split = [cut_up(spec, tuning, sending=draw(SENDING), **switches) for spec in specs]
    return (plain, waves, tuning), (split, waves, tuning)


def needed_by(item: Item, pieces: Sequence[Pieces]) -> Iterator[Item]:
    """What must have been done before an item."""
    kind, number, unit = item
    p = pieces[number]
    stats = [(ItemKind.STATS, number, u) for u in range(p.units)]
    finalize = (ItemKind.FINALIZE, number, 0)
    if kind is ItemKind.STATS and p.chunks > 1:
        first = unit // p.chunks * p.chunks
        yield from ((ItemKind.CHUNK, number, u) for u in range(first, first + p.chunks))
    elif kind in (ItemKind.SHARE, ItemKind.MERGE):
        yield from stats
    elif kind is ItemKind.TOTAL:
        yield from stats
        yield from ((ItemKind.SHARE, number, part) for part in range(shares_of(p)))
    elif kind is ItemKind.FINALIZE:
        yield from stats
        yield from ((ItemKind.MERGE, number, part) for part in range(p.merges))
    elif kind is ItemKind.UPDATE_RMS:
        yield finalize
    elif kind is ItemKind.MEASURE:
        yield finalize
        yield from ((ItemKind.UPDATE_RMS, number, u) for u in range(p.units))
    elif kind is ItemKind.APPLY:
        yield finalize
        if p.third_sweep is not None:
            yield (ItemKind.MEASURE, number, 0)
        if p.sending is not None:
            yield (ItemKind.SETTLE, number, 0)


def shares_of(p: Pieces) -> int:
    return p.merges if p.sending is not None and p.sending.across else 0


def expected(pieces: Sequence[Pieces], phases: Sequence[Phase]) -> Counter[Item]:
    """Every item that the tensors have in these phases."""
    items: Counter[Item] = Counter()
    for number, p in enumerate(pieces):
        counts = {
            ItemKind.SHARE: shares_of(p),
            ItemKind.SETTLE: 1,
            ItemKind.CHUNK: p.units if p.chunks > 1 else 0,
            ItemKind.STATS: p.units,
            ItemKind.TOTAL: 1,
            ItemKind.MERGE: p.geometry.batch * p.parts,
            ItemKind.FINALIZE: 1,
            ItemKind.UPDATE_RMS: p.units if p.third_sweep else 0,
            ItemKind.MEASURE: 1 if p.third_sweep else 0,
            ItemKind.APPLY: p.units,
        }
        kinds = kinds_of(phases, p.sending)
        items.update((kind, number, unit) for kind in kinds for unit in range(counts[kind]))
    return items


def flat(tickets: Sequence[Ticket]) -> list[Item]:
    return [item for ticket in tickets for item in ticket]


@EVERY_SEGMENT
@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_an_item_waits_for_what_comes_before_it_only(
    phases: tuple[Phase, ...], split: bool, model: tuple[Model, Model]
) -> None:
    """In tickets taken in order; so programs, however few, never wait for each other in a ring."""
    pieces, waves, tuning = model[split]
    items = flat(tickets_of(pieces, waves, phases, tuning))
    here = expected(pieces, phases)
    assert Counter(items) == here
    place = {item: at for at, item in enumerate(items)}
    for item in items:
        for before in needed_by(item, pieces):
            if before in here:
                assert place[before] < place[item], (before, item)


@EVERY_SEGMENT
@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_an_item_of_a_launch_needs_earlier_launches_or_its_own_ticket(
    phases: tuple[Phase, ...], split: bool, model: tuple[Model, Model]
) -> None:
    """Where nobody waits, tickets of one launch run in any order."""
    pieces, _, tuning = model[split]
    here = expected(pieces, phases)
    done: set[Item] = set()
    everything: Counter[Item] = Counter()
    for launch in launches_of(pieces, phases, tuning):
        for ticket in launch:
            mine: set[Item] = set()
            for item in ticket:
                needed = {before for before in needed_by(item, pieces) if before in here}
                assert needed <= done | mine, item
                mine.add(item)
        done.update(flat(launch))
        everything.update(flat(launch))
    assert everything == here


@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_the_segments_of_what_is_split_have_each_item_of_an_update_once(
    model: tuple[Model, Model],
) -> None:
    """But for a second FINALIZE of what is finalized before its sums have come."""
    (plain, _, _), (split, waves, tuning) = model
    items: Counter[Item] = Counter()
    for phases in SPLIT_SEGMENTS.values():
        items.update(flat(tickets_of(split, waves, phases, tuning)))
    whole = expected(plain, tuple(Phase))
    for number, p in enumerate(split):
        assert p.sending is not None
        again = 2 if p.sending.update_sq else 1
        assert items.pop((ItemKind.FINALIZE, number, 0)) == again
        assert items.pop((ItemKind.TOTAL, number, 0)) == items.pop((ItemKind.SETTLE, number, 0))
        for kind in (ItemKind.UPDATE_RMS, ItemKind.MEASURE):
            mine = [item for item in whole if item[:2] == (kind, number)]
            if p.sending.weighted:
                assert not any(item in items for item in mine)
                for item in mine:
                    del whole[item]
        del whole[ItemKind.FINALIZE, number, 0]
    for item in [item for item in items if item[0] is ItemKind.SHARE]:
        del items[item]
    assert items == whole


@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_a_place_in_the_scratch_is_free_before_it_is_used_again(
    model: tuple[Model, Model],
) -> None:
    pieces, waves, tuning = model[False]
    items = flat(tickets_of(pieces, waves, tuple(Phase), tuning))
    wave_of = {number: index for index, wave in enumerate(waves) for number in wave}
    applied = [sum(pieces[number].units for number in wave) for wave in waves]
    for kind, number, _ in items:
        wave = wave_of[number]
        if kind is ItemKind.APPLY:
            applied[wave] -= 1
        elif kind in (ItemKind.CHUNK, ItemKind.STATS) and wave >= PLACES:
            assert applied[wave - PLACES] == 0, (kind, number)


@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_the_second_sweep_follows_the_first_one_of_the_next_wave(
    model: tuple[Model, Model],
) -> None:
    """Its sums have long been taken by then, and what it reads is still in a cache."""
    pieces, waves, tuning = model[False]
    items = flat(tickets_of(pieces, waves, tuple(Phase), tuning))
    large = [[n for n in wave if not pieces[n].whole] for wave in waves]
    first = [[at for at, item in enumerate(items) if item[1] in wave] for wave in large]
    for index, wave in enumerate(large):
        swept = [at for at in first[index] if items[at][0] in (ItemKind.CHUNK, ItemKind.STATS)]
        for near, far in ((1, False), (2, True)):
            if not wave or index < near or not large[index - near]:
                continue
            others = [at for at in first[index - near] if items[at][0] is ItemKind.APPLY]
            assert max(others) < min(swept) if far else max(swept) < min(others)


@hypothesis.given(models())
@hypothesis.settings(max_examples=50)
def test_the_second_sweep_goes_back_over_what_was_read_last(
    model: tuple[Model, Model],
) -> None:
    pieces, waves, tuning = model[False]
    applied = [
        (number, unit)
        for kind, number, unit in flat(tickets_of(pieces, waves, (Phase.APPLY,), tuning))
        if kind is ItemKind.APPLY and not pieces[number].whole
    ]
    for wave in waves:
        mine = [(number, unit) for number, unit in applied if number in wave]
        assert mine == sorted(mine, reverse=True)


def test_chunks_are_summed_ahead_of_the_slab_that_needs_them() -> None:
    """Nobody waits for a sum that has just been begun, and none is far from its use."""
    tuning = replace(Tuning(), cut=replace(GPU_CUT, slab_elements=2**19), widest=1024, chunk=512)
    pieces = [cut_up(spec_of((4096, 5000)), tuning, measures=True, **PLAIN)]
    items = flat(tickets_of(pieces, [[0]], (Phase.STATS,), tuning))
    (p,) = pieces
    assert p.chunks == 10
    assert p.geometry.slabs > 20
    place = {item: at for at, item in enumerate(items)}
    for unit in range(16 * p.chunks, p.units):
        between = place[ItemKind.STATS, 0, unit] - place[ItemKind.CHUNK, 0, unit]
        assert 16 * p.chunks <= between <= 64 * p.chunks


@hypothesis.given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_waves_are_neighbours_up_to_a_size(sizes: list[int], wave_bytes: int) -> None:
    waves = waves_of(sizes, wave_bytes)
    assert [number for wave in waves for number in wave] == list(range(len(sizes)))
    for wave in waves:
        assert len(wave) == 1 or sum(sizes[number] for number in wave) <= wave_bytes


# --- pieces --------------------------------------------------------------------------------------


def assert_covered(p: Pieces, tuning: Tuning) -> None:
    """Lines by slabs, columns by chunks, and columns and lines of a matrix by parts."""
    g = p.geometry
    if g.slabs_per_matrix == 1:
        assert (g.slabs - 1) * g.lines_per_slab < g.rows * g.batch <= g.slabs * g.lines_per_slab
        assert g.lines_per_slab % g.rows == 0 or g.batch == 1
    else:
        assert g.slabs == g.batch * g.slabs_per_matrix
        last = (g.slabs_per_matrix - 1) * g.lines_per_slab
        assert last < g.rows <= last + g.lines_per_slab
    assert (p.chunks - 1) * p.chunk < g.cols <= p.chunks * p.chunk
    assert p.counters == TENSOR_COUNTERS + (g.slabs if p.chunks > 1 else 0)
    if g.form is Form.FACTORED:
        assert p.span <= p.width
        assert p.chunk <= p.width <= max(tuning.widest, tuning.narrowest)
        assert (p.parts - 1) * tuning.cut.merge_columns < g.cols
        assert g.cols <= p.parts * tuning.cut.merge_columns
        assert g.rows <= p.parts * p.part_lines
        assert all(size & (size - 1) == 0 for size in (p.width, p.span))
    else:
        assert (p.parts, p.chunks) == (0, 1)
        assert 0 < p.stride <= tuning.flat_tile
    if g.form is Form.TINY:
        # A tile, and a line, hold whole matrices.
        assert p.stride % (g.matrix[0] * g.matrix[1]) == 0
        assert g.cols % (g.matrix[0] * g.matrix[1]) == 0


@hypothesis.given(SPECS, TUNINGS, SWITCHES)
def test_pieces_cover_a_tensor(spec: TensorSpec, tuning: Tuning, switches: dict[str, bool]) -> None:
    assert_covered(cut_up(spec, tuning, **switches), tuning)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.given(
    st.lists(st.integers(1, 3000), max_size=3).map(tuple), st.sampled_from(View), SWITCHES
)
def test_pieces_of_real_sizes_cover_a_tensor(
    dtype: torch.dtype, shape: tuple[int, ...], view: View, switches: dict[str, bool]
) -> None:
    tuning = Tuning().for_math(dtype)
    assert_covered(cut_up(spec_of(shape, view), tuning, **switches), tuning)


@hypothesis.given(SPECS, TUNINGS, SWITCHES, st.sampled_from([4, 8]), st.integers(0, 9))
def test_sums_do_not_overlap(
    spec: TensorSpec, tuning: Tuning, switches: dict[str, bool], itemsize: int, begin: int
) -> None:
    p = cut_up(spec, tuning, **switches)
    g = p.geometry
    s = scratch_of(p, itemsize, 128 * begin)
    areas = [(s.sums, 3 * 8 * p.units)]
    if g.form is Form.FACTORED:
        areas += [
            (s.matrices, 3 * 8 * g.batch),
            (s.part_sums, 8 * 8 * g.batch * p.parts),
            (s.lines, itemsize * g.batch * g.rows),
            (s.cross, itemsize * g.batch * g.cols),
            (s.factor, itemsize * g.batch * g.cols),
            (s.partial, itemsize * 2 * g.batch * g.slabs_per_matrix * g.cols),
            (s.chunk_sums, itemsize * p.chunks * g.batch * g.rows if p.chunks > 1 else 0),
        ]
    areas.sort()
    assert areas[0][0] == 128 * begin
    ends = [start for start, _ in areas[1:]] + [s.end]
    for (start, size), end in zip(areas, ends, strict=True):
        assert start % 128 == 0
        assert start + size <= end


LARGE = st.tuples(st.integers(512, 60_000), st.integers(512, 60_000))


@hypothesis.given(LARGE, st.booleans(), st.sampled_from([(), (4,)]))
def test_sums_of_a_large_matrix_are_a_small_share_of_it(
    matrix: tuple[int, int], turned: bool, stack: tuple[int, ...]
) -> None:
    """Of a bfloat16 parameter and its gradient; and there are few pieces, however large it is."""
    spec = spec_of((*stack, *matrix), turned=turned)
    tuning = Tuning()
    switches = {**PLAIN, "measures": True, "amsgrad_or_clamp": True}
    p = cut_up(spec, tuning, **switches)
    assert scratch_of(p, 4, 0).end <= spec.numel * 4 * 0.1
    assert p.geometry.slabs_per_matrix <= tuning.cut.most_slabs
