"""Which tensors there are, where they lie and how: noted, and compared with how it is later.

A getter of torch takes as long as a small tensor takes to step, and there are a dozen things to ask
of every one. So where the library of C++ is there, it looks at all of them in one call, through the
functions that torch offers in DLPack's exchange table. Without it, and for what is distributed or
unknown to DLPack, the getters are called.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_adafactor import native
from fused_adafactor.spec import local_of

_PLAIN = {Tensor, torch.nn.Parameter}
_dtype, _layout = map(attrgetter, ("dtype", "layout"))
_EXCHANGE = b"dlpack_exchange_api"
_DLPACK_VERSION = 1  # the major one
_STATE = -1  # in place of a count


class Notes(Protocol):
    """What was noted of tensors, or of a state: a dict of tensors for each parameter."""

    def fit(self, things: Any) -> bool:
        """Whether it is the same now.

        Args:
            things: What there is in place of what was noted. That they are tensors of the same
                types is for the caller to see.

        Raises:
            RuntimeError: There is something whose memory cannot be told.
            TypeError: Likewise.
        """


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have memory of their own; one that is distributed has only parts."""
    return _PLAIN.issuperset(map(type, tensors))


def parts_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of each."""
    return list(tensors) if are_plain(tensors) else list(map(local_of, tensors))


def notes_of(tensors: list[Tensor], itself: bool) -> Notes:
    """Note how tensors are.

    Args:
        tensors: Of any kind.
        itself: Also which they are, and where. They are then kept alive, so that no others can
            take their places.

    Raises:
        RuntimeError: There is something whose memory cannot be told, such as a sparse tensor.
        TypeError: Likewise, such as a number.
    """
    if are_plain(tensors):
        alive = list(tensors) if itself else []
        notes = _notes_of_library(tensors, len(tensors), itself, alive)
        if notes is not None:
            return notes
    return _NotesOfGetters(tensors, itself)


def notes_of_state(state: Mapping[Tensor, Any]) -> Notes:
    """Note which entries a state has, and how they are.

    Raises:
        RuntimeError: There is something whose memory cannot be told.
        TypeError: Likewise, such as a number.
    """
    names, kept = _entries_of(state)
    if are_plain(kept) and isinstance(state, dict):
        # By its address a name is told from another, a dict from another: all are kept alive.
        alive = [*state, *state.values(), *names, *kept]
        notes = _notes_of_library(state, _STATE, True, alive)
        if notes is not None:
            return notes
    return _NotesOfState(state)


# --- one call for all -----------------------------------------------------------------------------


class _Interpreter(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("item", "next", "look")]


class _Look:
    """The functions of the library, and what they call."""

    def __init__(self, library: ctypes.PyDLL, look: int) -> None:
        item, advance = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (ctypes.pythonapi.PyList_GetItem, ctypes.pythonapi.PyDict_Next)
        )
        self.table = _Interpreter(item, advance, look)
        self.note, self.is_as_noted = (
            library.fused_adafactor_note,
            library.fused_adafactor_is_as_noted,
        )
        for function in (self.note, self.is_as_noted):
            function.argtypes = [
                *(ctypes.c_void_p, ctypes.py_object, ctypes.c_int64, ctypes.c_int32),
                *(ctypes.c_void_p, ctypes.c_int64),
            ]
        self.note.restype = ctypes.c_int64
        self.at = ctypes.addressof(self.table)


class _NotesOfLibrary:
    def __init__(
        self, look: _Look, things: object, count: int, itself: bool, alive: Sequence[object]
    ) -> None:
        self._itself, self._alive = itself, alive
        self._look = look
        self._size = look.note(look.at, things, count, itself, None, 0)
        self._numbers = (ctypes.c_int64 * self._size)()
        look.note(look.at, things, count, itself, self._numbers, self._size)

    def fit(self, things: Any) -> bool:
        count = len(things) if isinstance(things, list) else _STATE
        look = self._look
        return bool(
            look.is_as_noted(look.at, things, count, self._itself, self._numbers, self._size)
        )


def _notes_of_library(
    things: object, count: int, itself: bool, alive: Sequence[object]
) -> _NotesOfLibrary | None:
    """Notes, unless there is no library, or a device or dtype that DLPack has no number for."""
    look = _interpreter()
    try:
        return None if look is None else _NotesOfLibrary(look, things, count, itself, alive)
    except RuntimeError:
        return None


@functools.cache
def _interpreter() -> _Look | None:
    """What looks at tensors; None where there is no library, or torch has no such table."""
    table = _exchange_table()
    if table is None:
        return None
    try:
        native.load_library()
        return _Look(ctypes.PyDLL(str(native.library_path())), table)
    except (OSError, RuntimeError):
        return None  # the backend says why, to who asks for it


def _exchange_table() -> int | None:
    """Address of torch's ``dltensor_from_py_object_no_sync``, if it can be called."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    holds_lock: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    if capsule is None or not holds_lock():  # without, lists and dicts may change under the library
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    try:
        table = _ExchangeTable.from_address(pointer(capsule, _EXCHANGE))
    except ValueError:  # a capsule of another kind
        return None
    return table.dltensor_from_object if table.major == _DLPACK_VERSION else None


class _ExchangeTable(ctypes.Structure):
    """``DLPackExchangeAPI`` of dlpack.h."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("major", "minor")),
        *((name, ctypes.c_void_p) for name in ("before", "allocate", "from_object", "to_object")),
        *((name, ctypes.c_void_p) for name in ("dltensor_from_object", "current_stream")),
    ]


# --- getter by getter -----------------------------------------------------------------------------


class _NotesOfGetters:
    def __init__(self, tensors: Sequence[Tensor], itself: bool) -> None:
        self._tensors = list(tensors) if itself else None
        self._facts = _facts(tensors, itself)

    def fit(self, things: Any) -> bool:
        same = self._tensors is None or _are_same(things, self._tensors)
        return same and _facts(things, self._tensors is not None) == self._facts


class _NotesOfState:
    def __init__(self, state: Mapping[Tensor, Any]) -> None:
        self._owners = list(state)
        self._names, self._kept = _entries_of(state)
        self._facts = _facts(self._kept, True)

    def fit(self, things: Any) -> bool:
        names, kept = _entries_of(things)
        same = _are_same(list(things), self._owners) and _are_same(kept, self._kept)
        return same and names == self._names and _facts(kept, True) == self._facts


def _entries_of(state: Mapping[Tensor, Any]) -> tuple[list[list[str]], list[Tensor]]:
    return list(map(list, state.values())), list(
        chain.from_iterable(map(dict.values, state.values()))
    )


def _are_same(objects: Sequence[object], others: Sequence[object]) -> bool:
    return len(objects) == len(others) and all(map(is_, objects, others))


def _facts(tensors: Sequence[Tensor], by_place: bool) -> tuple[object, ...]:
    parts = parts_of(tensors)
    return (
        # Where a tensor is tells on which device.
        list(map(Tensor.data_ptr, parts)) if by_place else None,
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, parts)),
        list(map(_layout, parts)),  # of one kind of sparse tensors strides are told all the same
        list(map(_dtype, tensors)),
        None if are_plain(tensors) else list(map(_distributed, tensors)),
    )


def _distributed(tensor: Tensor) -> tuple[object, ...]:
    """How a tensor is distributed, and over which processes."""
    return getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None)
