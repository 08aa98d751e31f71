"""Items for the threads of a CPU: each once, none waits for what comes later, and reuse is near."""

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
    Form,
    Geometry,
    Item,
    ItemKind,
    geometry_of,
    is_whole,
    items_of,
    merges_of,
    strips_of,
)
from fused_adafactor.spec import TensorId, TensorSpec

WHOLE_STEP = tuple(Phase)
JOINED = (Phase.FINALIZE, Phase.UPDATE_RMS, Phase.APPLY)


def geometry(shape: tuple[int, ...], view: View = View.LAST_TWO) -> Geometry:
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
    return geometry_of(spec, CPU_CUT)


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
    applied_two_before: list[list[int]] = []
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
        # The sums of a tensor take over the place in the scratch of the one before the last.
        if len(applied_two_before) == 2 and stats:
            assert applied_two_before[0][-1] < stats[0]
        applied_two_before = [*applied_two_before[-1:], apply]


@hypothesis.given(st.builds(geometry, SHAPES))
def test_strips_are_all_of_a_slab(g: Geometry) -> None:
    strips, lines = strips_of(g, CPU_CUT)
    assert (strips - 1) * lines < g.lines_per_slab <= strips * lines
    if g.form is not Form.FACTORED:  # what is taken anew, or lies anyhow, is taken whole
        assert strips == 1
    elif strips > 1:
        assert lines == 1 or lines * g.cols <= CPU_CUT.slab_elements


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_waits_comes_after_a_slab_for_each_thread_and_no_more(threads: int) -> None:
    model = [geometry((5120, 1024)), geometry((5120, 1024))]
    items = list(items_of(model, WHOLE_STEP, threads))
    second = places(items, ItemKind.STATS, 1)
    (finalize,), (measure,) = (
        places(items, kind, 0) for kind in (ItemKind.FINALIZE, ItemKind.MEASURE)
    )
    apply = places(items, ItemKind.APPLY, 0)
    assert sum(place < finalize for place in second) == threads
    assert sum(place < measure for place in second) == 2 * threads
    assert sum(place < apply[-1] for place in second) == 2 * threads
    assert [items[place][2] for place in apply] == list(reversed(range(len(apply))))


def test_lines_of_nothing_are_one_strip() -> None:
    """Of a part whose columns are all on other processes."""
    g = replace(geometry((200_000, 3)), cols=0, form=Form.FACTORED, lines_per_slab=200_000, slabs=1)
    assert strips_of(g, CPU_CUT) == (1, 200_000)


def test_a_cut_says_what_a_strip_is() -> None:
    g = geometry((4096, 4096))
    assert (g.slabs, g.lines_per_slab) == (16, 256)
    assert strips_of(g, CPU_CUT) == (8, 32)
    assert strips_of(g, replace(CPU_CUT, slab_elements=2**30)) == (1, 256)
