"""Tensors in tables on their device, and the launches that step them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton import interprets
from fused_adafactor.backends.triton.kernel import step
from fused_adafactor.backends.triton.tables import Sent, integers_row, numbers_row, tensor_row
from fused_adafactor.backends.triton.variants import Variant, traits_of, variant_of
from fused_adafactor.binding import Binding, Cohort, Exchange
from fused_adafactor.metrics import Outcome
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.slabs import Geometry, ItemKind, geometry_of
from fused_adafactor.tickets import (
    LAUNCH_COUNTERS,
    Item,
    Pieces,
    Ticket,
    Tuning,
    kinds_of,
    launches_of,
    pieces_of,
    scratch_of,
    tickets_of,
    waves_of,
)

TUNING = Tuning()
# Executors that a CUDA graph has the addresses of: it may be replayed as long as the process lives.
_captured: set[Executor] = set()
# Waves under way, each with a place in the scratch: the one whose second sweep runs, the one whose
# first sweep does, and one for programs that are ahead of the others.
_PLACES = 3


@dataclass(kw_only=True, eq=False)
class _Group:
    """Tensors that are launched together: they have the same traits."""

    traits: Variant
    numbers: list[int]  # of its tensors
    pieces: list[Pieces]
    waves: list[list[int]]  # by place in the group


@dataclass(kw_only=True, eq=False)
class Launch:
    """Tickets on the device, and the kernel that takes them.

    Attributes:
        tickets: Where the items of each begin, and where those of the last one end.
        items: Kind, tensor and unit of each.
        count: Of tickets.
        programs: That take them.
        variant: What the kernel is compiled for.
    """

    tickets: Tensor
    items: Tensor
    count: int
    programs: int
    variant: Variant
    kernel: Any = None  # once it is compiled

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of its programs."""
        return self.programs, 1, 1

    def compile(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Compile it for these arguments, unless it is compiled, or interpreted."""
        if self.kernel is None and not interprets():
            self.kernel = step.warmup(*arguments, self.variant, grid=self.grid, **options)

    def start(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Launch it on the current stream of the current device."""
        if self.kernel is None:
            step[self.grid](*arguments, self.variant, **options)
        else:
            # Without looking for it in Triton's own cache, which takes longer.
            self.kernel[self.grid](*arguments, self.variant)


class Executor:
    """Steps the tensors that it was made for; see ``backends.Executor``.

    Args:
        bindings: Of one device and one math dtype, none of them empty.
        segments: The phases of an update, as they will be run.
        launch_form: ``persistent`` or ``phases``.
    """

    def __init__(
        self, bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]], launch_form: str
    ) -> None:
        """Cut all tensors, and lay out their sums and counters."""
        spec = bindings[0].planned.spec
        self.device, self.math_dtype = spec.device, spec.math_dtype
        self._refuse_capture()
        self.tuning = TUNING.for_math(self.math_dtype)
        self.waits = launch_form == "persistent"
        self.segments = segments
        self.params = [b.param for b in bindings]
        self.accumulators = [
            (number, b.accumulator)
            for number, b in enumerate(bindings)
            if b.accumulator is not None
        ]
        self.cohorts: list[tuple[Cohort, float]] = []
        rules = self._rules(bindings)
        geometries = [geometry_of(b.planned.spec, self.tuning.cut) for b in bindings]
        traits = [traits_of(b, g) for b, g in zip(bindings, geometries, strict=True)]
        pieces = [self._pieces_of(g, t) for g, t in zip(geometries, traits, strict=True)]
        self.groups = self._groups(bindings, pieces, traits)
        rows = self._rows(bindings, rules, pieces, shares=len(segments) == 1)
        capturable = any(isinstance(c.scalars.t, Tensor) for c, _ in self.cohorts)
        count, device = len(bindings), self.device
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device)
        self.grads = Sent(count, torch.int64, self.device, capturable)
        numbers, integers = (n.value * len(self.cohorts) for n in (f.NUMBERS, f.INTEGERS))
        self.numbers = Sent(numbers, torch.float64, self.device, capturable)
        self.integers = Sent(integers, torch.int64, self.device, capturable)
        self.outcomes = torch.zeros((count, f.OUTCOMES.value), dtype=torch.float64, device=device)
        self.no_factors = torch.ones(count, dtype=self.math_dtype, device=device)
        self.no_skips = torch.zeros(count, dtype=torch.uint8, device=device)
        self.launches: dict[object, list[Launch]] = {}

    def _rules(self, bindings: Sequence[Binding]) -> list[int]:
        """The rule of each tensor: its cohort, with its own eps1."""
        numbers: dict[tuple[int, float], int] = {}
        rules = []
        for b in bindings:
            spec = b.planned.spec
            eps1 = b.rule.eps1_of(spec.param_dtype, spec.math_dtype)
            key = (id(b.cohort), eps1)
            if key not in numbers:
                numbers[key] = len(self.cohorts)
                self.cohorts.append((b.cohort, eps1))
            rules.append(numbers[key])
        return rules

    def _tuning_of(self, traits: Variant) -> Tuning:
        return self.tuning.for_blocks() if traits.EXP_AVG == tl.int8 else self.tuning

    def _pieces_of(self, geometry: Geometry, traits: Variant) -> Pieces:
        return pieces_of(
            geometry,
            self._tuning_of(traits),
            measures=traits.MEASURES,
            amsgrad_or_clamp=traits.AMSGRAD or traits.CLAMPS,
            norm_clipped=traits.NORM_CLIPPED,
        )

    def _groups(
        self, bindings: Sequence[Binding], pieces: Sequence[Pieces], traits: Sequence[Variant]
    ) -> list[_Group]:
        by_traits: dict[Variant, list[int]] = {}
        for number, shared in enumerate(traits):
            by_traits.setdefault(shared, []).append(number)
        groups = []
        for shared, numbers in by_traits.items():
            sizes = [
                bindings[n].planned.spec.numel
                * (bindings[n].param.dtype.itemsize + bindings[n].planned.spec.grad_dtype.itemsize)
                for n in numbers
            ]
            waves = waves_of(sizes, self.tuning.wave_bytes)
            mine = [pieces[n] for n in numbers]
            groups.append(_Group(traits=shared, numbers=numbers, pieces=mine, waves=waves))
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
        for group in self.groups:
            place_sizes = [0] * _PLACES
            for index, wave in enumerate(group.waves):
                size = sum(self._scratch_size(group.pieces[n]) for n in wave)
                place_sizes[index % _PLACES] = max(place_sizes[index % _PLACES], size)
            places = [sum(place_sizes[:i]) for i in range(_PLACES)]
            group_counters = LAUNCH_COUNTERS + len(group.waves)
            for index, wave in enumerate(group.waves):
                at = places[index % _PLACES] if shares and self.waits else end
                for n in wave:
                    number, p = group.numbers[n], group.pieces[n]
                    scratch = scratch_of(p, self.math_dtype.itemsize, at)
                    at = scratch.end
                    row = tensor_row(bindings[number], rules[number], p, scratch)
                    row[f.PROGRESS.value] = group_counters
                    group_counters += p.counters
                    row[f.WAVE.value] = LAUNCH_COUNTERS + index
                    if shares and self.waits and index >= _PLACES:
                        before = group.waves[index - _PLACES]
                        row[f.AFTER.value] = LAUNCH_COUNTERS + index - _PLACES
                        row[f.AFTER_COUNT.value] = sum(group.pieces[m].units for m in before)
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
        with _current(self.device):
            for launch in (
                launch for phases in self.segments for launch in self.launches_of(phases)
            ):
                arguments = self.arguments(launch, self.no_factors, self.no_skips)
                launch.compile(arguments, self.options)

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        """Run phases, in order, of an update."""
        self._launch(self.launches_of(phases), exchange)
        if Phase.APPLY not in phases:
            exchange.grad_sq = self.outcomes[:, f.GRAD_SQ.value].to(self.math_dtype, copy=True)
        elif exchange.wants_param_rms:
            exchange.param_rms = self.outcomes[:, f.PARAM_RMS.value].to(self.math_dtype, copy=True)

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        """Run an activity that has no update."""
        if activity is Activity.DROP:
            self._drop_accumulated(exchange.skip)
        idle = activity in (Activity.AVERAGE, Activity.DROP)
        self._launch(self.launches_of_activity(activity), exchange, idle)

    def outcome(self) -> Outcome:
        """What the last update has found out."""
        fields = (f.PARAM_RMS, f.UPDATE_RMS, f.ALPHA)
        return Outcome(*(self.outcomes[:, field.value] for field in fields))

    def launches_of(self, phases: Sequence[Phase]) -> list[Launch]:
        """What steps the tensors, in order; made when it is first asked for."""
        kinds = kinds_of(phases)
        joined = Phase.STATS not in phases
        if kinds not in self.launches:
            self.launches[kinds] = [
                launch for group in self.groups for launch in self._launches(group, kinds, joined)
            ]
        return self.launches[kinds]

    def launches_of_activity(self, activity: Activity) -> list[Launch]:
        """The same for an activity that has no update."""
        kind = ItemKind.ACCUMULATE if activity is Activity.ACCUMULATE else ItemKind.AVERAGE
        if kind not in self.launches:
            self.launches[kind] = [self._activity_launch(group, kind) for group in self.groups]
        return self.launches[kind]

    def _drop_accumulated(self, skip: Tensor | None) -> None:
        for number, accumulator in self.accumulators:
            if skip is None:
                accumulator.zero_()
            else:
                accumulator.masked_fill_(~skip[number], 0.0)

    def _launches(self, group: _Group, kinds: Sequence[ItemKind], joined: bool) -> list[Launch]:
        if self.waits:
            tickets = [tickets_of(group.pieces, group.waves, kinds, self.tuning)]
        else:
            tickets = list(launches_of(group.pieces, kinds, self.tuning))
        return [self._make(group, t, self.waits, joined) for t in tickets if t]

    def _activity_launch(self, group: _Group, kind: ItemKind) -> Launch:
        tickets: list[Ticket] = [
            [(kind, n, unit)] for n, p in enumerate(group.pieces) for unit in range(p.units)
        ]
        return self._make(group, tickets, waits=False, joined=False)

    def _refuse_capture(self) -> None:
        """Raise where tables cannot be made: nothing can be sent to them and kept."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() is captured in a CUDA graph before it has stepped these tensors in this "
                "way; take a step of the same kind outside of the graph first"
            )

    def _make(self, group: _Group, tickets: list[Ticket], waits: bool, joined: bool) -> Launch:
        self._refuse_capture()
        items: list[Item] = [item for ticket in tickets for item in ticket]
        ends = [0]
        for ticket in tickets:
            ends.append(ends[-1] + len(ticket))
        concerned = {n for _, n, _ in items}
        pieces = [group.pieces[n] for n in sorted(concerned)]
        kinds = sorted({kind for kind, _, _ in items})
        numbered = [(int(kind), group.numbers[n], unit) for kind, n, unit in items]
        return Launch(
            tickets=torch.tensor(ends, dtype=torch.int32, device="cpu").to(self.device),
            items=torch.tensor(numbered, dtype=torch.int32, device="cpu").to(self.device),
            count=len(tickets),
            programs=min(len(tickets), self._programs()) if waits else len(tickets),
            variant=variant_of(
                group.traits,
                pieces,
                self._tuning_of(group.traits),
                kinds,
                waits=waits,
                joined=joined,
            ),
        )

    def _programs(self) -> int:
        """Programs that a persistent launch has."""
        if self.device.type != "cuda":
            return self.tuning.programs_per_processor  # interpreted, one after the other
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return processors * self.tuning.programs_per_processor

    def _launch(self, launches: Sequence[Launch], exchange: Exchange, idle: bool = False) -> None:
        grads = _as_meant(exchange.grads)
        addresses = list(map(Tensor.data_ptr, grads))
        if reduce(or_, addresses, 0) % 16:
            grads = self._aligned(grads)
            addresses = list(map(Tensor.data_ptr, grads))
        factors = self.no_factors if exchange.grad_factor is None else exchange.grad_factor
        skips = self.no_skips if exchange.skip is None else exchange.skip.view(torch.uint8)
        calls = [(launch, self.arguments(launch, factors, skips)) for launch in launches]
        with _current(self.device):
            for launch, arguments in calls:
                launch.compile(arguments, self.options)
            self._send(addresses, idle)
            for launch, arguments in calls:
                launch.start(arguments, self.options)
        self._stay_while_captured()
        # autograd must see that a value which it may have saved is gone.
        torch.autograd.graph.increment_version(self.params)

    def _aligned(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients, with copies of those that must begin at a multiple of 16 bytes and do not.

        Such are views into a buffer. A kernel that reads them as they are would add up in another
        order, and give other bits.
        """
        must = {n for group in self.groups if group.traits.ALIGNED for n in group.numbers}
        return [
            grad.clone() if number in must and grad.data_ptr() % 16 else grad
            for number, grad in enumerate(grads)
        ]

    def _stay_while_captured(self) -> None:
        """Keep the tables for good once a graph has been captured that reads them."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.add(self)

    def arguments(self, launch: Launch, factors: Tensor, skips: Tensor) -> tuple[Tensor | int, ...]:
        """What a kernel is called with, but for its variant."""
        return (
            launch.tickets,
            launch.items,
            self.table,
            self.grads.on_device,
            self.numbers.on_device,
            self.integers.on_device,
            factors,
            skips,
            self.scratch,
            self.outcomes,
            self.counters,
            0,
            launch.count,
            self.counters.numel(),
        )

    @property
    def options(self) -> dict[str, int | bool]:
        """What it is compiled with. a * b + c is one operation only where a formula says so."""
        options: dict[str, int | bool] = {"num_warps": self.tuning.warps, "enable_fp_fusion": False}
        if torch.version.hip is None:
            # All that there are: NVIDIA's assembler would rather spill than hold one program less.
            options["maxnreg"] = 255
        return options

    def _send(self, addresses: Sequence[int], idle: bool) -> None:
        """What is new in this step; ``idle`` where the tensors have no gradients."""
        self.grads.send(addresses or [0] * len(self.params))
        self.numbers.send_mixed([x for cohort in self.cohorts for x in numbers_row(*cohort, idle)])
        if any(group.traits.draws for group in self.groups):
            self.integers.send_mixed(
                [x for cohort, _ in self.cohorts for x in integers_row(cohort)]
            )


def _current(device: torch.device) -> contextlib.AbstractContextManager[None]:
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
