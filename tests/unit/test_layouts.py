"""What is noted of tensors tells them from all others, whether the library looks or getters do."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import layouts
from fused_adafactor.backends import cpp

LOOKS = ["library", "getters"] if cpp.missing() is None else ["getters"]
Change = Callable[[list[Tensor]], Any]
Entries = dict[str, Any]


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "getters":
        monkeypatch.setattr(layouts, "_interpreter", lambda: None)
    return request.param


def tensors() -> list[Tensor]:
    shapes = ((6, 6), (7,), (4, 3, 5), (), (0, 3), (2, 1, 1, 2, 1, 1, 2, 1, 1, 2))
    made = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for shape in shapes]
    return [*made, torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.int8)]


def data_of(number: int, change: Callable[[Tensor], Tensor]) -> Change:
    def replace(all_of_them: list[Tensor]) -> None:
        all_of_them[number].data = change(all_of_them[number].data)

    return replace


def freed(all_of_them: list[Tensor]) -> None:
    all_of_them[0].untyped_storage().resize_(0)


def swapped(all_of_them: list[Tensor]) -> None:
    torch.utils.swap_tensors(all_of_them[6], torch.zeros(3, dtype=torch.float64))


LAID_OUT = {
    "transposed": data_of(0, Tensor.t),
    "fewer rows": data_of(0, lambda t: t[:2]),
    "rows for columns": data_of(0, lambda t: t.as_strided((2, 3), (6, 1))),
    "another dtype": data_of(0, lambda t: t.view(torch.float16)),
    "one dimension more": data_of(1, lambda t: t[None]),
    "a wider dtype": data_of(3, Tensor.double),
    "many dimensions": data_of(5, lambda t: t.transpose(0, 3).contiguous().transpose(0, 3)),
    "fewer": lambda all_of_them: all_of_them.pop(),
    "more": lambda all_of_them: all_of_them.append(torch.ones(2)),
    "another order": lambda all_of_them: all_of_them.reverse(),
}
MOVED = {
    "elsewhere": data_of(0, Tensor.clone),
    "a little further": data_of(1, lambda t: torch.ones(8).bfloat16()[1:]),
    "freed": freed,
    "swapped": swapped,
    "another tensor of the same memory": lambda all_of_them: all_of_them.__setitem__(
        6, all_of_them[6].detach()
    ),
}


def test_tensors_fit_what_was_noted_of_them(look: str) -> None:
    noted = tensors()
    for itself in (False, True):
        assert layouts.notes_of(noted, itself).fit(noted)
    assert layouts.notes_of(noted, itself=False).fit(tensors())
    assert not layouts.notes_of(noted, itself=True).fit(tensors())
    assert layouts.notes_of([], itself=True).fit([])
    assert not layouts.notes_of([], itself=False).fit(noted)


@pytest.mark.parametrize("change", LAID_OUT)
@pytest.mark.parametrize("itself", [False, True])
def test_another_layout_is_noticed(change: str, itself: bool, look: str) -> None:
    noted = tensors()
    notes = layouts.notes_of(noted, itself)
    LAID_OUT[change](noted)
    assert not notes.fit(noted)


@pytest.mark.parametrize("change", MOVED)
def test_other_memory_is_noticed_of_what_is_to_stay(change: str, look: str) -> None:
    noted = tensors()
    stays, lies = layouts.notes_of(noted, itself=True), layouts.notes_of(noted, itself=False)
    MOVED[change](noted)
    assert not stays.fit(noted)
    assert lies.fit(noted) or change == "freed"


def replaced_by_a_copy(state: dict[Tensor, Any], first: Tensor) -> None:
    state[first]["row"] = state[first]["row"].clone()


def renamed(state: dict[Tensor, Any], first: Tensor) -> None:
    entries = list(state[first].values())
    state[first].clear()
    state[first].update(zip(("step", "line"), entries, strict=True))


STATE_CHANGES: dict[str, Callable[[dict[Tensor, Any], Tensor], Any]] = {
    "an entry replaced": replaced_by_a_copy,
    "the data of an entry": lambda state, first: setattr(
        state[first]["row"], "data", state[first]["row"].clone()
    ),
    "an entry renamed": renamed,
    "an entry more": lambda state, first: state[first].update(more=torch.ones(2)),
    "an entry gone": lambda state, first: state[first].pop("row"),
    "an owner more": lambda state, first: state.update({torch.ones(2): {}}),
    "an owner gone": lambda state, first: state.pop(first),
    "another order": lambda state, first: state.update({first: state.pop(first)}),
    "nothing left": lambda state, first: state.clear(),
}


def state_of() -> tuple[dict[Tensor, Entries], Tensor]:
    first, second = torch.ones(3), torch.ones(3)
    state = {p: {"step": torch.tensor(1.0), "row": torch.ones(3)} for p in (first, second)}
    return state, first


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_change_of_the_state_is_noticed(change: str, look: str) -> None:
    state, first = state_of()
    notes = layouts.notes_of_state(state)
    assert notes.fit(state)
    STATE_CHANGES[change](state, first)
    assert not notes.fit(state)


def test_entries_that_another_mapping_hides_are_noticed(look: str) -> None:
    """What walks through dicts sees nothing in what is none."""
    state, first = state_of()
    state[first] = {}
    notes = layouts.notes_of_state(state)
    state[first] = OrderedDict(more=torch.ones(2))
    assert not notes.fit(state)


def fits(notes: layouts.Notes, things: Any) -> bool:
    try:
        return notes.fit(things)
    except (RuntimeError, TypeError):
        return False


@pytest.mark.parametrize("thing", [torch.eye(3).to_sparse(), 3.0, None], ids=["sparse", "", "none"])
def test_what_has_no_memory_fits_nothing(thing: Any, look: str) -> None:
    assert not fits(layouts.notes_of([torch.zeros(()).expand(3, 3)], itself=False), [thing])
    state, first = state_of()
    notes = layouts.notes_of_state(state)
    state[first]["row"] = thing
    assert not fits(notes, state)
    with pytest.raises((RuntimeError, TypeError)):
        layouts.notes_of_state(state)


@pytest.mark.filterwarnings("ignore:.*quant.*")
def test_what_dlpack_has_no_number_for_is_noted_all_the_same(look: str) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    noted = [torch.ones(2), quantized]
    notes = layouts.notes_of(noted, itself=True)
    assert notes.fit(noted)
    assert not notes.fit([noted[0], quantized.clone()])


def test_only_what_is_to_stay_is_kept_alive(look: str) -> None:
    """What is told by its address must not make room for something else."""
    state, first = state_of()
    mine = [torch.ones(2)]
    gone = [weakref.ref(t) for t in (first, *state[first].values(), mine[0])]
    notes = [layouts.notes_of_state(state), layouts.notes_of(mine, itself=True)]
    passing = [torch.ones(2)]
    passed = weakref.ref(passing[0])
    notes.append(layouts.notes_of(passing, itself=False))
    del state, first, mine, passing
    gc.collect()
    assert passed() is None
    assert all(ref() is not None for ref in gone)
    del notes
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


@pytest.mark.skipif(cpp.missing() is not None, reason=str(cpp.missing()))
def test_the_library_looks_where_it_is_there() -> None:
    noted = layouts.notes_of(tensors(), itself=True), layouts.notes_of_state(state_of()[0])
    assert [type(notes).__name__ for notes in noted] == ["_NotesOfLibrary"] * 2
