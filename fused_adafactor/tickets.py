"""How the work on many tensors is ordered for a GPU: units, waves of tensors, tickets of items.

Everything a tensor is cut into follows from that tensor alone. Programs take tickets in order, and
an item waits only for items of lower tickets, or of its own, which come before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fused_adafactor.plan import Phase
from fused_adafactor.slabs import Cut, Form, Geometry, Item, ItemKind, is_whole

GPU_CUT = Cut(
    slab_elements=65_536,
    slab_lines=32,
    most_slabs=256,
    free_line=16_384,
    whole_elements=32_768,
    small_elements=0,
    merge_columns=128,
    aligned_lines=16,
)
# Counters of a launch, and of a tensor before those of its slabs; ``fields.py`` has their names.
LAUNCH_COUNTERS = 2
TENSOR_COUNTERS = 5


@dataclass(frozen=True)
class Tuning:
    """Sizes that a GPU's registers and caches ask for; numbers of elements are powers of 2.

    None of them has been measured on a GPU yet: they are what the byte model and the compiler's
    reports of registers allow.

    Attributes:
        cut: Of a tensor.
        tile: Elements that a program holds in the first sweep, with two sums for each, unless one
            line has more.
        widest: Elements of a line that it can hold. A longer one is summed in chunks.
        chunk: Columns of such a chunk.
        flat_tile: Elements that a program holds in the second sweep, or of no lines.
        tiny_tile: The same of tiny matrices, each of which looks at all of its matrix.
        span: Columns of them, at most.
        narrowest: Columns of a tile, at least.
        wave_bytes: Gradients and parameters between whose two sweeps nothing else is read: with
            the next wave, what an L2 cache holds.
        rms_units: Units of one ticket of the third sweep, where that is seldom needed.
        merges: Parts of one ticket, where a tensor is many small matrices.
        stages: Tiles that are on their way to a program at a time, with the one that it is at. In
            shared memory: those of float32 parameters and gradients are 32 KiB.
        half_stages: The same where these are of 16 bits, and all that is read.
        warps: Of a program.
        programs_per_processor: That a GPU's multiprocessor holds.
    """

    cut: Cut = GPU_CUT
    tile: int = 4096
    widest: int = 8192
    chunk: int = 2048
    flat_tile: int = 4096
    tiny_tile: int = 2048
    span: int = 1024
    narrowest: int = 128
    wave_bytes: int = 8 * 2**20
    rms_units: int = 8
    merges: int = 8
    stages: int = 3
    half_stages: int = 5
    warps: int = 8
    programs_per_processor: int = 1

    def for_math(self, dtype: torch.dtype) -> Tuning:
        """The same for a math dtype: half as many elements of float64 fit."""
        return self if dtype is not torch.float64 else self._halved("tile", "widest", "flat_tile")

    def for_blocks(self) -> Tuning:
        """The same where the first moment is in 8-bit blocks, each of them looked at as a whole."""
        return self._halved("tile", "flat_tile", "tiny_tile")

    def _halved(self, *names: str) -> Tuning:
        return replace(self, **{name: getattr(self, name) // 2 for name in names})


@dataclass(frozen=True)
class Sending:
    """What of the sums of a tensor goes into messages, which other processes add theirs to.

    Attributes:
        across: Sums across the lines of its matrices.
        weighted: Those of num² / line too, of all lines: Σ u² follows from nothing else.
        update_sq: Σ u² after the first segment, in which the tensor is then finalized.
    """

    across: bool
    weighted: bool
    update_sq: bool


@dataclass(frozen=True)
class Pieces:
    """What a tensor is cut into.

    A unit is a slab of lines, or a chunk of the columns of a slab where lines are very long. A part
    is some columns, and some lines, of a matrix whose sums are complete.

    Attributes:
        geometry: Its lines and slabs.
        width: Columns of a tile in the first sweep.
        span: Columns of a tile in the second sweep.
        chunk: Columns of a unit.
        chunks: Units of a slab.
        stride: Elements from tile to tile, where lines are no matrix's.
        parts: Of a matrix.
        part_lines: Lines of a part.
        whole: Stepped by one program.
        third_sweep: Whether Σ u² may take one; ``seldom`` or ``often``, or None.
        sending: Into messages, where it is split over processes; else None.
    """

    geometry: Geometry
    width: int
    span: int
    chunk: int
    chunks: int
    stride: int
    parts: int
    part_lines: int
    whole: bool
    third_sweep: str | None
    sending: Sending | None

    @property
    def units(self) -> int:
        """Of all slabs."""
        return self.geometry.slabs * self.chunks

    @property
    def merges(self) -> int:
        """Parts of all matrices, whose sums are added up over the slabs."""
        return self.geometry.batch * self.parts

    @property
    def partials(self) -> int:
        """Sums across lines: of every slab, and of every matrix of a slab."""
        return self.geometry.batch * self.geometry.slabs_per_matrix

    @property
    def counters(self) -> int:
        """That its items wait for."""
        return TENSOR_COUNTERS + (self.geometry.slabs if self.chunks > 1 else 0)


def pieces_of(
    geometry: Geometry,
    tuning: Tuning,
    *,
    measures: bool,
    amsgrad_or_clamp: bool,
    norm_clipped: bool,
    raw_lines: bool,
    sending: Sending | None = None,
) -> Pieces:
    """Cut a tensor, or a part of one, which may have no elements.

    Args:
        geometry: Its lines and slabs, by the cut of ``tuning``.
        tuning: Sizes, for its math dtype.
        measures: Whether RMS(u) is wanted.
        amsgrad_or_clamp: Whether something acts on each element of 1 / sqrt(v).
        norm_clipped: Whether the gradient is clipped by a norm that is known after the first sweep.
        raw_lines: Whether the first sweep leaves lines as sums of g², without weights.
        sending: Its sums that go into messages, where it is split.
    """
    g = geometry
    lined = g.form is Form.FACTORED
    chunk = max(1, g.cols) if g.cols <= tuning.widest or not lined else tuning.chunk
    chunks = max(1, -(-g.cols // chunk))
    width = max(tuning.narrowest, _power_of_2(chunk)) if lined else 0
    parts = max(1, -(-g.cols // tuning.cut.merge_columns))
    unit = math.lcm(max(1, math.prod(g.matrix)), tuning.cut.aligned_lines)
    third_sweep = None
    if measures and (lined or norm_clipped) and not (sending and sending.weighted):
        often = norm_clipped or amsgrad_or_clamp or (lined and raw_lines)
        third_sweep = "often" if often else "seldom"
    return Pieces(
        geometry=g,
        width=width,
        span=min(width, tuning.span),
        chunk=chunk,
        chunks=chunks,
        stride=tuning.tiny_tile // unit * unit if g.form is Form.TINY else tuning.flat_tile,
        parts=parts if lined else 0,
        part_lines=-(-g.rows // parts),
        whole=is_whole(g, tuning.cut),
        third_sweep=third_sweep,
        sending=sending,
    )


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


@dataclass
class Scratch:
    """Places of a tensor's sums, in bytes from the beginning of the scratch.

    [x] is an array of so many: ``sums`` [units, 4], ``matrices`` [batch, 3] and ``part_sums``
    [batch, parts, 8] are float64; ``lines`` [batch, rows], ``cross`` and ``factor`` [batch, cols],
    ``partial`` [partials, 2, cols] and ``chunk_sums`` [chunks, batch, rows] are in the math dtype.
    """

    sums: int = 0
    matrices: int = 0
    part_sums: int = 0
    lines: int = 0
    cross: int = 0
    factor: int = 0
    partial: int = 0
    chunk_sums: int = 0
    end: int = field(default=0)


def scratch_of(pieces: Pieces, itemsize: int, begin: int) -> Scratch:
    """Lay out the sums of a tensor from ``begin`` on, each array on a cache line of its own."""
    g, s = pieces.geometry, Scratch(end=begin)

    def place(count: int, size: int) -> int:
        start, s.end = s.end, s.end + -(-count * size // 128) * 128
        return start

    s.sums = place(4 * pieces.units, 8)
    if g.form is Form.FACTORED:
        s.matrices = place(3 * g.batch, 8)
        s.part_sums = place(8 * g.batch * pieces.parts, 8)
        s.lines = place(g.batch * g.rows, itemsize)
        s.cross = place(g.batch * g.cols, itemsize)
        s.factor = place(g.batch * g.cols, itemsize)
        s.partial = place(2 * pieces.partials * g.cols, itemsize)
        s.chunk_sums = place(pieces.chunks * g.batch * g.rows if pieces.chunks > 1 else 0, itemsize)
    return s


Ticket = list[Item]

# Kinds in the order of an update. Each is a launch of its own where items do not wait.
FIRST_SWEEP = (ItemKind.CHUNK, ItemKind.STATS)
MEASURED = (ItemKind.MERGE, ItemKind.FINALIZE, ItemKind.UPDATE_RMS, ItemKind.MEASURE)
ORDER = (
    *(*FIRST_SWEEP, ItemKind.SHARE, *MEASURED),
    *(ItemKind.TOTAL, ItemKind.SETTLE, ItemKind.APPLY),
)


def waves_of(sizes: Sequence[int], wave_bytes: int) -> list[list[int]]:
    """Neighbours in groups of up to so many bytes; what is larger is by itself."""
    waves: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if size > room or not waves:
            waves.append([])
            room = wave_bytes
        waves[-1].append(number)
        room -= size
    return waves


def kinds_of(phases: Sequence[Phase], sending: Sending | None) -> tuple[ItemKind, ...]:
    """What the items of a tensor do in these phases, in order.

    A segment that ends with ``STATS`` leaves sums that somebody else adds up. What is split says
    what it knows of Σ u² as soon as no other part of it has anything to do with that.
    """
    kinds: list[ItemKind] = []
    at_once = sending is not None and sending.update_sq
    if Phase.STATS in phases:
        kinds += FIRST_SWEEP
        if Phase.FINALIZE not in phases:
            kinds += [*MEASURED, ItemKind.TOTAL] if at_once else [ItemKind.SHARE, ItemKind.TOTAL]
    if Phase.FINALIZE in phases:
        kinds += [ItemKind.FINALIZE] if at_once else MEASURED
    if Phase.APPLY in phases:
        kinds += [ItemKind.APPLY] if sending is None else [ItemKind.SETTLE, ItemKind.APPLY]
    return tuple(kinds)


def tickets_of(
    pieces: Sequence[Pieces],
    waves: Sequence[Sequence[int]],
    phases: Sequence[Phase],
    tuning: Tuning,
) -> list[Ticket]:
    """Tickets in order, for programs that wait for each other.

    The second sweep of a wave comes after the first sweep of the next one, so that nobody waits for
    sums that are still being taken, and goes backwards, latest read first. A small tensor is one
    ticket.
    """
    items = [_items_of(number, p, phases) for number, p in enumerate(pieces)]
    tickets: list[Ticket] = []
    waiting: Sequence[int] = ()
    for wave in waves:
        tickets += [_one_after_the_other(items[n]) for n in wave if pieces[n].whole]
        large = [number for number in wave if not pieces[number].whole]
        tickets += [t for number in large for t in _first_sweep(items[number], pieces[number])]
        tickets += _second_sweep(items, pieces, waiting, tuning)
        waiting = large
    return tickets + _second_sweep(items, pieces, waiting, tuning)


def launches_of(
    pieces: Sequence[Pieces], phases: Sequence[Phase], tuning: Tuning
) -> Iterator[list[Ticket]]:
    """Tickets launch by launch, for programs that do not wait: small tensors, then by kind."""
    items = [_items_of(number, p, phases) for number, p in enumerate(pieces)]
    yield [_one_after_the_other(items[n]) for n, p in enumerate(pieces) if p.whole]
    large = [number for number, p in enumerate(pieces) if not p.whole]
    for kind in ORDER:
        yield _of_kind(items, pieces, large, kind, tuning)


Items = dict[ItemKind, list[Item]]


def _items_of(number: int, pieces: Pieces, phases: Sequence[Phase]) -> Items:
    """Items of a tensor in these phases, by kind, kinds and items in order."""
    kinds = kinds_of(phases, pieces.sending)
    return {kind: _items(number, pieces, kind) for kind in ORDER if kind in kinds}


def _one_after_the_other(items: Items) -> Ticket:
    return [item for of_kind in items.values() for item in of_kind]


def _items(number: int, pieces: Pieces, kind: ItemKind) -> list[Item]:
    """Items of one kind of one tensor, in order."""
    p = pieces
    count = p.units
    if kind is ItemKind.MERGE:
        count = p.merges
    elif kind is ItemKind.SHARE:
        count = p.merges if p.sending and p.sending.across else 0
    elif kind in (ItemKind.FINALIZE, ItemKind.TOTAL, ItemKind.SETTLE):
        count = 1
    elif kind is ItemKind.CHUNK:
        count = count if p.chunks > 1 else 0
    elif kind is ItemKind.UPDATE_RMS:
        count = count if p.third_sweep else 0
    elif kind is ItemKind.MEASURE:
        count = 1 if p.third_sweep else 0
    units = range(count)
    return [(kind, number, u) for u in (reversed(units) if kind is ItemKind.APPLY else units)]


def _first_sweep(items: Items, pieces: Pieces) -> list[Ticket]:
    """Of one tensor; a unit's chunks are summed well before it is its turn."""
    chunks, stats = (items.get(kind, []) for kind in FIRST_SWEEP)
    ahead = min(len(chunks), 16 * pieces.chunks)
    ordered = chunks[:ahead]
    for place, item in enumerate(stats):
        ordered += chunks[ahead + place : ahead + place + 1]
        ordered.append(item)
    return [[item] for item in ordered]


def _second_sweep(
    items: Sequence[Items], pieces: Sequence[Pieces], numbers: Sequence[int], tuning: Tuning
) -> list[Ticket]:
    kinds = [kind for kind in ORDER if kind not in FIRST_SWEEP]
    return [ticket for kind in kinds for ticket in _of_kind(items, pieces, numbers, kind, tuning)]


def _of_kind(
    items: Sequence[Items],
    pieces: Sequence[Pieces],
    numbers: Sequence[int],
    kind: ItemKind,
    tuning: Tuning,
) -> list[Ticket]:
    """Of many tensors; the second sweep takes the last of them first."""
    tickets: list[Ticket] = []
    for number in reversed(numbers) if kind is ItemKind.APPLY else numbers:
        size = 1
        if kind is ItemKind.UPDATE_RMS and pieces[number].third_sweep == "seldom":
            size = tuning.rms_units
        elif kind in (ItemKind.SHARE, ItemKind.MERGE):
            size = tuning.merges if pieces[number].geometry.slabs_per_matrix == 1 else 1
        mine = items[number].get(kind, [])
        tickets += [mine[i : i + size] for i in range(0, len(mine), size)]
    return tickets
