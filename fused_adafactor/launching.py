"""Tensors in tables on a GPU, and the launches that step them; what all backends of GPUs share.

A backend supplies a ``Launcher``: how large the pieces are, which tensors a launch may have, and
the kernel that takes its tickets.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_adafactor import fields as f
from fused_adafactor.binding import Binding, Cohort, Exchange, sums_of
from fused_adafactor.metrics import Outcome
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.slabs import Cut, Geometry, Item, ItemKind, geometry_of
from fused_adafactor.spec import TensorSpec
from fused_adafactor.tables import (
    MAX_DIMS,
    Sent,
    integers_row,
    is_capturing,
    numbers_row,
    tensor_row,
)
from fused_adafactor.tickets import (
    LAUNCH_COUNTERS,
    Pieces,
    Sending,
    Ticket,
    Tuning,
    launches_of,
    pieces_of,
    scratch_of,
    tickets_of,
    waves_of,
)
from fused_adafactor.traits import Traits, traits_of

LAUNCH_ENVIRONMENT = "FUSED_ADAFACTOR_LAUNCH"
LAUNCHES = ("persistent", "phases")
# Waves under way, each with a place in the scratch: the one whose second sweep runs, the one whose
# first sweep does, and one for programs that are ahead of the others.
_PLACES = 3


def launch_form() -> tuple[str, str]:
    """How kernels are launched, ``persistent`` or ``phases``, and why.

    Raises:
        ValueError: FUSED_ADAFACTOR_LAUNCH names neither.
    """
    wanted = os.environ.get(LAUNCH_ENVIRONMENT)
    if wanted:
        if wanted not in LAUNCHES:
            accepted = ", ".join(LAUNCHES)
            raise ValueError(f"{LAUNCH_ENVIRONMENT} must be one of {accepted}, got {wanted!r}")
        return wanted, "asked for"
    if torch.version.hip is not None:
        return "phases", "not measured on AMD yet"
    return "persistent", "one launch for all tensors"


def obstacle(spec: TensorSpec, cut: Cut) -> str | None:
    """Why a tensor that has elements has no row in the table, or None."""
    dims = len(geometry_of(spec, cut).sizes)
    if dims > MAX_DIMS:
        return f"has {dims} dimensions that cannot be merged, more than {MAX_DIMS}"
    if spec.mirror_dtype is not None:
        return "has a mirror, which only the steps of a CPU write"
    return None


class Arguments(NamedTuple):
    """What a kernel is called with: tables and tickets on the device, see ``fields.py``.

    Attributes:
        tickets: Where the items of each begin, and where those of the last one end.
        items: Kind, tensor and unit of each.
        table: Of tensors.
        grads: Addresses of the gradients.
        numbers: Of the rules.
        integers: Of the rules.
        factors: What each gradient is multiplied by, in the math dtype.
        skips: 1 for each tensor of which nothing may be written.
        scratch: Sums.
        outcomes: What a step finds out of each tensor.
        counters: All 0, and left so.
        begin: First ticket.
        end: The one behind the last.
        counter_count: Of the counters.
    """

    tickets: Tensor
    items: Tensor
    table: Tensor
    grads: Tensor
    numbers: Tensor
    integers: Tensor
    factors: Tensor
    skips: Tensor
    scratch: Tensor
    outcomes: Tensor
    counters: Tensor
    begin: int
    end: int
    counter_count: int


class Kernel(Protocol):
    """What takes the tickets of one launch."""

    def compile(self, arguments: Arguments) -> None:
        """Compile it for these arguments, unless it is compiled."""

    def start(self, arguments: Arguments) -> None:
        """Launch it on the current stream of the current device."""


@dataclass(kw_only=True, eq=False)
class Launch:
    """Tickets on the device, and what a kernel may have to know to take them.

    Attributes:
        tickets: Where the items of each begin, and where those of the last one end.
        items: Kind, tensor and unit of each.
        count: Of tickets.
        programs: That take them.
        kinds: Of items.
        traits: Of the tensors.
        pieces: Likewise.
        waits: Whether items wait for each other.
        joined: Whether the first sweep was another launch.
    """

    tickets: Tensor
    items: Tensor
    count: int
    programs: int
    kinds: Sequence[ItemKind]
    traits: Sequence[Traits]
    pieces: Sequence[Pieces]
    waits: bool
    joined: bool


class Launcher(Protocol):
    """What a backend supplies, for tensors of one device and one math dtype.

    Attributes:
        tuning: Sizes, for that math dtype.
        waits: Whether items wait for each other: the persistent form.
        programs: Of a launch whose items do.
    """

    tuning: Tuning
    waits: bool
    programs: int

    def tuning_of(self, traits: Traits) -> Tuning:
        """Sizes for a tensor."""

    def group_of(self, traits: Traits) -> Hashable:
        """Equal for tensors that one launch may have."""

    def kernel_of(self, launch: Launch) -> Kernel:
        """What takes the tickets of a launch."""


@dataclass(kw_only=True, eq=False)
class _Group:
    """Tensors that are launched together."""

    numbers: list[int]  # of its tensors
    pieces: list[Pieces]
    waves: list[list[int]]  # by place in the group


class Executor:
    """Steps the tensors that it was made for; see ``backends.Executor``.

    Args:
        bindings: Of one device and one math dtype, none of them empty.
        segments: The phases of an update, as they will be run.
        launcher: Of the backend.
    """

    def __init__(
        self,
        bindings: Sequence[Binding],
        segments: Sequence[tuple[Phase, ...]],
        launcher: Launcher,
    ) -> None:
        """Cut all tensors, and lay out their sums and counters."""
        spec = bindings[0].planned.spec
        self.device, self.math_dtype = spec.device, spec.math_dtype
        self._refuse_capture()
        self.launcher = launcher
        self.segments = segments
        self.are_split = spec.is_split  # a plan has only such, or none
        self.params = [b.param for b in bindings]
        self.accumulators = [
            (number, b.accumulator)
            for number, b in enumerate(bindings)
            if b.accumulator is not None
        ]
        self.cohorts: list[tuple[Cohort, float]] = []
        rules = self._rules(bindings)
        geometries = [geometry_of(b.planned.spec, launcher.tuning.cut) for b in bindings]
        self.traits = [traits_of(b, g) for b, g in zip(bindings, geometries, strict=True)]
        self.draws = any(traits.draws for traits in self.traits)
        pieces = list(map(self._pieces_of, bindings, geometries, self.traits))
        self.groups = self._groups(bindings, pieces)
        rows = self._rows(bindings, rules, pieces, shares=len(segments) == 1)
        capturable = any(isinstance(c.scalars.t, Tensor) for c, _ in self.cohorts)
        count, device = len(bindings), self.device
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device)
        self.grads = Sent(count, torch.int64, self.device, capturable)
        counts = sum(cohort.counts for cohort, _ in self.cohorts)
        numbers, integers = (n * counts for n in (f.NUMBERS, f.INTEGERS))
        self.numbers = Sent(numbers, torch.float64, self.device, capturable)
        self.integers = Sent(integers, torch.int64, self.device, capturable)
        self.outcomes = torch.zeros((count, f.OUTCOMES), dtype=torch.float64, device=device)
        self.no_factors = torch.ones(count, dtype=self.math_dtype, device=device)
        self.no_skips = torch.zeros(count, dtype=torch.uint8, device=device)
        self.launches: dict[Sequence[Phase] | Activity, list[tuple[Launch, Kernel]]] = {}

    def _rules(self, bindings: Sequence[Binding]) -> list[int]:
        """The row of each tensor's rule: by its cohort, its own eps1, and the counter."""
        numbers: dict[tuple[int, float], int] = {}
        end = 0
        rules = []
        for b in bindings:
            spec = b.planned.spec
            eps1 = b.rule.eps1_of(spec.param_dtype, spec.math_dtype)
            key = (id(b.cohort), eps1)
            if key not in numbers:
                numbers[key] = end
                end += b.cohort.counts
                self.cohorts.append((b.cohort, eps1))
            rules.append(numbers[key] + b.count)
        return rules

    def _pieces_of(self, binding: Binding, geometry: Geometry, traits: Traits) -> Pieces:
        return pieces_of(
            geometry,
            self.launcher.tuning_of(traits),
            measures=traits.measures,
            amsgrad_or_clamp=traits.amsgrad or traits.clamps,
            norm_clipped=traits.norm_clipped,
            raw_lines=traits.raw_lines,
            sending=_sending(binding, geometry),
        )

    def _groups(self, bindings: Sequence[Binding], pieces: Sequence[Pieces]) -> list[_Group]:
        together: dict[Hashable, list[int]] = {}
        for number, traits in enumerate(self.traits):
            together.setdefault(self.launcher.group_of(traits), []).append(number)
        groups = []
        for numbers in together.values():
            sizes = [
                bindings[n].planned.spec.numel
                * (bindings[n].param.dtype.itemsize + bindings[n].planned.spec.grad_dtype.itemsize)
                for n in numbers
            ]
            waves = waves_of(sizes, self.launcher.tuning.wave_bytes)
            mine = [pieces[n] for n in numbers]
            groups.append(_Group(numbers=numbers, pieces=mine, waves=waves))
        return groups

    def _rows(
        self,
        bindings: Sequence[Binding],
        rules: Sequence[int],
        pieces: Sequence[Pieces],
        shares: bool,
    ) -> list[list[int]]:
        """The table; also makes the scratch and the counters.

        Where an update runs in one go, only a few waves are under way at a time and share places in
        the scratch, and so do groups, which follow each other. Otherwise all sums are kept.
        """
        rows: list[list[int]] = [[] for _ in bindings]
        counters = LAUNCH_COUNTERS
        end = 0
        shares = shares and self.launcher.waits
        for group in self.groups:
            place_sizes = [0] * _PLACES
            for index, wave in enumerate(group.waves):
                size = sum(self._scratch_size(group.pieces[n]) for n in wave)
                place_sizes[index % _PLACES] = max(place_sizes[index % _PLACES], size)
            places = [sum(place_sizes[:i]) for i in range(_PLACES)]
            group_counters = LAUNCH_COUNTERS + len(group.waves)
            for index, wave in enumerate(group.waves):
                at = places[index % _PLACES] if shares else end
                for n in wave:
                    number, p = group.numbers[n], group.pieces[n]
                    scratch = scratch_of(p, self.math_dtype.itemsize, at)
                    at = scratch.end
                    row = tensor_row(
                        bindings[number], rules[number], self.traits[number], p, scratch
                    )
                    row[f.PROGRESS] = group_counters
                    group_counters += p.counters
                    row[f.WAVE] = LAUNCH_COUNTERS + index
                    if shares and index >= _PLACES:
                        before = group.waves[index - _PLACES]
                        row[f.AFTER] = LAUNCH_COUNTERS + index - _PLACES
                        row[f.AFTER_COUNT] = sum(group.pieces[m].units for m in before)
                    rows[number] = row
                end = max(end, at)
            counters = max(counters, group_counters)
        self.scratch_bytes = end
        # Averages and accumulators move without any.
        self.scratch = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=self.device)
        return rows

    def _scratch_size(self, pieces: Pieces) -> int:
        return scratch_of(pieces, self.math_dtype.itemsize, 0).end

    def prepare(self) -> None:
        """Make and compile all that an update takes, so that it fails before any of it has run."""
        self.scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
        with current(self.device):
            for phases in self.segments:
                for launch, kernel in self.launches_of(phases):
                    kernel.compile(self.arguments(launch, self.no_factors, self.no_skips))

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        """Run phases, in order, of an update."""
        self._launch(self.launches_of(phases), exchange)
        if Phase.APPLY not in phases:
            if not self.are_split:
                exchange.grad_sq = self.outcomes[:, f.GRAD_SQ].to(self.math_dtype, copy=True)
        elif exchange.wants_param_rms:
            exchange.param_rms = self.outcomes[:, f.PARAM_RMS]

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        """Run an activity that has no update."""
        if activity is Activity.DROP:
            self._drop_accumulated(exchange.skip)
        idle = activity in (Activity.AVERAGE, Activity.DROP)
        self._launch(self.launches_of_activity(activity), exchange, idle)

    def outcome(self) -> Outcome:
        """What the last update has found out."""
        fields = (f.PARAM_RMS, f.UPDATE_RMS, f.ALPHA)
        return Outcome(*(self.outcomes[:, field] for field in fields))

    def launches_of(self, phases: Sequence[Phase]) -> list[tuple[Launch, Kernel]]:
        """What steps the tensors, in order; made when it is first asked for."""
        phases = tuple(phases)
        if phases not in self.launches:
            self.launches[phases] = [
                launch for group in self.groups for launch in self._launches(group, phases)
            ]
        return self.launches[phases]

    def launches_of_activity(self, activity: Activity) -> list[tuple[Launch, Kernel]]:
        """The same for an activity that has no update."""
        kind = ItemKind.ACCUMULATE if activity is Activity.ACCUMULATE else ItemKind.AVERAGE
        if activity not in self.launches:
            tickets = [(group, _each_unit(group.pieces, kind)) for group in self.groups]
            self.launches[activity] = [
                self._make(group, t, waits=False, joined=False) for group, t in tickets if t
            ]
        return self.launches[activity]

    def _drop_accumulated(self, skip: Tensor | None) -> None:
        for number, accumulator in self.accumulators:
            if skip is None:
                accumulator.zero_()
            else:
                accumulator.masked_fill_(~skip[number], 0.0)

    def _launches(self, group: _Group, phases: Sequence[Phase]) -> list[tuple[Launch, Kernel]]:
        waits, tuning = self.launcher.waits, self.launcher.tuning
        joined = Phase.STATS not in phases
        if waits:
            tickets = [tickets_of(group.pieces, group.waves, phases, tuning)]
        else:
            tickets = list(launches_of(group.pieces, phases, tuning))
        return [self._make(group, t, waits, joined) for t in tickets if t]

    def _refuse_capture(self) -> None:
        """Raise where tables cannot be made: nothing can be sent to them and kept."""
        if is_capturing(self.device):
            raise RuntimeError(
                "step() is captured in a CUDA graph before it has stepped these tensors in this "
                "way; take a step of the same kind outside of the graph first"
            )

    def _make(
        self, group: _Group, tickets: list[Ticket], waits: bool, joined: bool
    ) -> tuple[Launch, Kernel]:
        self._refuse_capture()
        items: list[Item] = [item for ticket in tickets for item in ticket]
        ends = [0]
        for ticket in tickets:
            ends.append(ends[-1] + len(ticket))
        concerned = sorted({n for _, n, _ in items})
        numbered = [(int(kind), group.numbers[n], unit) for kind, n, unit in items]
        launch = Launch(
            tickets=torch.tensor(ends, dtype=torch.int32, device="cpu").to(self.device),
            items=torch.tensor(numbered, dtype=torch.int32, device="cpu").to(self.device),
            count=len(tickets),
            programs=min(len(tickets), self.launcher.programs) if waits else len(tickets),
            kinds=sorted({kind for kind, _, _ in items}),
            traits=[self.traits[group.numbers[n]] for n in concerned],
            pieces=[group.pieces[n] for n in concerned],
            waits=waits,
            joined=joined,
        )
        return launch, self.launcher.kernel_of(launch)

    def _launch(
        self,
        launches: Sequence[tuple[Launch, Kernel]],
        exchange: Exchange,
        idle: bool = False,
    ) -> None:
        grads = _as_meant(exchange.grads)
        addresses = list(map(Tensor.data_ptr, grads))
        if reduce(or_, addresses, 0) % 16:
            grads = self._aligned(grads)
            addresses = list(map(Tensor.data_ptr, grads))
        factors = self.no_factors if exchange.grad_factor is None else exchange.grad_factor
        skips = self.no_skips if exchange.skip is None else exchange.skip.view(torch.uint8)
        calls = [(kernel, self.arguments(launch, factors, skips)) for launch, kernel in launches]
        with current(self.device):
            for kernel, arguments in calls:
                kernel.compile(arguments)
            self._send(addresses, idle)
            for kernel, arguments in calls:
                kernel.start(arguments)
        # autograd must see that a value which it may have saved is gone.
        torch.autograd.graph.increment_version(self.params)

    def _aligned(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients, with copies of those that must begin at a multiple of 16 bytes and do not.

        Such are views into a buffer. A kernel that reads them as they are would add up in another
        order, and give other bits.
        """
        return [
            grad.clone() if traits.aligned and grad.data_ptr() % 16 else grad
            for grad, traits in zip(grads, self.traits, strict=True)
        ]

    def arguments(self, launch: Launch, factors: Tensor, skips: Tensor) -> Arguments:
        """What a kernel is called with."""
        return Arguments(
            tickets=launch.tickets,
            items=launch.items,
            table=self.table,
            grads=self.grads.on_device,
            numbers=self.numbers.on_device,
            integers=self.integers.on_device,
            factors=factors,
            skips=skips,
            scratch=self.scratch,
            outcomes=self.outcomes,
            counters=self.counters,
            begin=0,
            end=launch.count,
            counter_count=self.counters.numel(),
        )

    def _send(self, addresses: Sequence[int], idle: bool) -> None:
        """What is new in this step; ``idle`` where the tensors have no gradients."""
        self.grads.send(addresses or [0] * len(self.params))
        self.numbers.send_rows(
            [
                (numbers_row(cohort, eps1, self.math_dtype, idle), cohort.counts)
                for cohort, eps1 in self.cohorts
            ]
        )
        if self.draws:
            self.integers.send_rows(
                [(integers_row(cohort), cohort.counts) for cohort, _ in self.cohorts]
            )


def bind(
    bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]], launcher: Launcher
) -> Executor:
    """Make an executor, and compile what an update takes; see ``backends.Backend``."""
    executor = Executor(bindings, segments, launcher)
    if bindings[0].cohort.activity is Activity.UPDATE:
        executor.prepare()
    return executor


def _sending(b: Binding, geometry: Geometry) -> Sending | None:
    """What of the sums of a tensor goes into messages; None where it is whole."""
    if not b.planned.spec.is_split:
        return None
    sums = sums_of(b, geometry.swapped)
    return Sending(
        across="cross_sq" in sums, weighted="weighted" in sums, update_sq="update_sq" in sums
    )


def _each_unit(pieces: Sequence[Pieces], kind: ItemKind) -> list[Ticket]:
    return [[(kind, n, unit)] for n, p in enumerate(pieces) for unit in range(p.units)]


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a device the current one, which a kernel is launched on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _as_meant(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients without those that are negated when they are read, as autograd makes of conj().

    Only where they lie is looked at: each has the strides that it had, and what is between too.
    """
    if not any(map(Tensor.is_neg, grads)):
        return grads
    return [_memory_of(grad).resolve_neg() if grad.is_neg() else grad for grad in grads]


def _memory_of(tensor: Tensor) -> Tensor:
    """All memory from the first element of a tensor to its last one."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))
