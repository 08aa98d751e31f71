"""The tables that a GPU's launch reads, from the host's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_adafactor import fields as f
from fused_adafactor.binding import Binding, Cohort, memory_of, sums_of
from fused_adafactor.blocks import BLOCK
from fused_adafactor.rule import DecayFactor, Eps1Rule, GradClipKind
from fused_adafactor.schedule import Number
from fused_adafactor.slabs import Form, Geometry, whole_of
from fused_adafactor.tickets import Pieces, Scratch
from fused_adafactor.traits import Traits, lossless

MAX_DIMS = 8  # of a tensor, once those that can be are merged
_SPARE_BUFFERS = 4


def tensor_row(
    b: Binding, rule: int, traits: Traits, pieces: Pieces, scratch: Scratch
) -> list[int]:
    """The row of a tensor, but for its counters."""
    row = [0] * f.TENSOR_FIELDS
    geometry, spec = pieces.geometry, b.planned.spec

    def put(field: int, *values: int) -> None:
        row[field : field + len(values)] = values

    put(f.PARAM, b.param.data_ptr())
    for name, tensor in memory_of(b, geometry.swapped).items():
        put(getattr(f, name.upper()), tensor.data_ptr())
    put(f.RULE, rule)
    put(f.PARAM_INDEX, spec.id.index)
    put(f.FORM, geometry.form)
    put(f.BATCH, geometry.batch)
    put(f.ROWS, geometry.rows)
    put(f.COLS, geometry.cols)
    put(f.NUMEL, spec.numel)
    put(f.MATRIX_ROWS, *geometry.matrix)
    put(f.SWAPPED, geometry.swapped)
    put(f.LINES_PER_SLAB, geometry.lines_per_slab)
    put(f.SLABS_PER_MATRIX, geometry.slabs_per_matrix)
    put(f.CHUNK, pieces.chunk)
    put(f.CHUNKS, pieces.chunks)
    put(f.UNITS, pieces.units)
    put(f.WIDTH, pieces.width)
    put(f.SPAN, pieces.span)
    put(f.STRIDE, pieces.stride)
    put(f.PARTS, pieces.parts)
    put(f.PART_LINES, pieces.part_lines)
    put(f.MERGES, pieces.merges)
    put(f.SUMS, scratch.sums)
    put(f.MATRICES, scratch.matrices)
    put(f.PART_SUMS, scratch.part_sums)
    put(f.LINES, scratch.lines)
    put(f.CROSS, scratch.cross)
    put(f.FACTOR, scratch.factor)
    put(f.PARTIAL, scratch.partial)
    put(f.CHUNK_SUMS, scratch.chunk_sums)
    put(f.AFTER, -1)
    put(f.BLOCK_LINE, _block_line(geometry))
    put(f.DIMS, len(geometry.sizes))
    put(f.SIZES, *geometry.sizes)
    put(f.STRIDES, *geometry.strides)
    put(f.GRAD_STRIDES, *geometry.grad_strides)
    put(f.STATE_STRIDES, *geometry.state_strides)
    put(f.LOGICAL, *geometry.logical)
    put(f.PARAM_DTYPE, f.DTYPES[traits.param_dtype])
    put(f.GRAD_DTYPE, f.DTYPES[traits.grad_dtype])
    put(f.MOMENT_DTYPE, f.DTYPES[traits.moment_dtype])
    put(f.EXP_AVG_DTYPE, f.DTYPES[traits.exp_avg_dtype])
    put(f.SWITCHES, switches_of(traits))
    for name, tensor in sums_of(b, geometry.swapped).items():
        put(getattr(f, f"SHARED_{name.upper()}"), tensor.data_ptr())
    put(f.SAYS_UPDATE_SQ, b.says_update_sq)
    whole = whole_of(spec, geometry)
    put(f.WHOLE_NUMEL, spec.whole_numel)
    for name in ("rows", "cols"):
        put(getattr(f, f"WHOLE_{name.upper()}"), getattr(whole, name))
    for name in ("first_row", "first_col", "first_element", "first_matrix"):
        put(getattr(f, name.upper()), getattr(whole, name))
    put(f.STACK_DIMS, len(whole.stack))
    put(f.STACK_SIZES, *(size for size, _ in whole.stack))
    put(f.STACK_STRIDES, *(stride for _, stride in whole.stack))
    return row


def switches_of(traits: Traits) -> int:
    """The traits that are no dtypes, as the bits of one number."""
    by_bit = {
        f.AMSGRAD_SWITCH: traits.amsgrad,
        f.MEASURES_SWITCH: traits.measures,
        f.PARAM_RMS_SWITCH: traits.param_rms,
        f.SKIPS_SWITCH: traits.skips,
        f.NORM_CLIPPED_SWITCH: traits.norm_clipped,
        f.SPLIT_SWITCH: traits.split,
        f.RAW_LINES_SWITCH: traits.raw_lines,
        f.VALUE_CLIP_SWITCH: traits.value_clip,
        f.AVERAGES_SWITCH: traits.averages,
        f.STOCHASTIC_SWITCH: traits.stochastic,
        f.KAHAN_SWITCH: traits.kahan,
        f.CLAMPS_SWITCH: traits.clamps,
        f.STRIDED_SWITCH: traits.strided,
        f.ALIGNED_SWITCH: traits.aligned,
        f.WEIGHS_SWITCH: traits.weighs,
        f.MOMENTUM_SWITCH: traits.momentum,
        f.WHOLE_BLOCKS_SWITCH: traits.whole_blocks,
        f.ACCUMULATES_SWITCH: traits.accumulates,
    }
    return sum(int(value) << bit for bit, value in by_bit.items())


def _block_line(geometry: Geometry) -> int:
    """Elements of a line along which blocks lie: of an unfactored tensor it is any whole blocks."""
    if geometry.form is Form.UNFACTORED:
        return BLOCK
    return geometry.matrix[1] if geometry.form is Form.TINY else geometry.cols


def numbers_row(cohort: Cohort, eps1: float, math_dtype: torch.dtype, idle: bool) -> list[Number]:
    """The numbers of a rule at this step: floats, or 0-d tensors or vectors of the device.

    Args:
        cohort: Of tensors.
        eps1: Theirs.
        math_dtype: Likewise.
        idle: They have no gradients in this call.
    """
    row: list[Number] = [0.0] * f.NUMBERS
    rule, scalars = cohort.rule, cohort.scalars

    def put(field: int, value: Number) -> None:
        row[field] = value

    put(f.BETA2, scalars.beta2)
    put(f.REST2, 1.0 - scalars.beta2)
    put(f.BETA1, scalars.beta1)
    put(f.REST1, 1.0 - scalars.beta1)
    put(f.NUMERATOR_SCALE, scalars.numerator_scale)
    put(f.AMSGRAD_SCALE, scalars.amsgrad_scale)
    clamps = rule.eps1_rule is Eps1Rule.CLAMP
    put(f.EPS1, eps1)
    put(f.ADDED, 0.0 if clamps else eps1)
    put(f.MOST_ROOT, 1.0 / eps1 if clamps else float("inf"))
    put(f.LEAST_NORM, eps1 if clamps else 0.0)
    put(f.EPS2, -1.0 if rule.eps2 is None else rule.eps2)
    put(f.CLIP_THRESHOLD, -1.0 if rule.clip_threshold is None else rule.clip_threshold)
    put(f.RHO, scalars.rho)
    put(f.ACCUMULATION_STEPS, float(rule.accumulation_steps))
    put(f.GRAD_SCALE, cohort.grad_scale)
    put(f.SUM_MOMENTS, float(rule.sums))
    put(f.LOSSLESS, lossless(math_dtype))
    clip, average, decay = rule.grad_clip, rule.weight_average, rule.weight_decay
    if clip is not None and clip.kind is GradClipKind.VALUE:
        put(f.CLIP_VALUE, clip.threshold)
    if average is not None:
        momentum = average.momentum_at(scalars.t)
        put(f.AVERAGE_MOMENTUM, momentum)
        put(f.AVERAGE_REST, 1.0 - momentum)
        if not idle or rule.overwrites_without_grad:
            put(f.OVERWRITE, 1.0 * average.overwrites_at(scalars.t))
    if decay is not None:
        put(f.DECAY_BEFORE_RMS, float(decay.before_rms))
        if decay.factor is DecayFactor.ALPHA:
            put(f.DECAY_OF_ALPHA, decay.coefficient)
        elif decay.factor is DecayFactor.ONE:
            put(f.DECAY, decay.coefficient)
        elif scalars.lr is not None:
            put(f.DECAY, decay.coefficient * scalars.lr)
    return row


def integers_row(cohort: Cohort) -> list[Number]:
    """Seed and step, the key of stochastic rounding."""
    t = cohort.scalars.t
    return [cohort.seed, t if isinstance(t, Tensor) else int(t)]


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on a device now becomes a part of a CUDA graph, and is not done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Sent:
    """Numbers of the host, and a copy of them on a device that is renewed where they changed.

    While a graph is captured, every sending becomes part of the graph, with a buffer of its own
    that nobody writes again: a replay restores what the kernels of that graph have to read. What
    lies on the device is then not known any more, so from then on everything is sent.

    Args:
        count: Of the numbers.
        dtype: float64 or int64.
        device: Where they are read.
        spares: Whether a graph may be captured.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, spares: bool) -> None:
        """Make the copy, and buffers for captures: none can be made during one."""
        self.on_device = torch.zeros(count, dtype=dtype, device=device)
        self._last: object = None
        self._captured: list[Tensor] = []
        self._spares: list[Tensor] = []
        self._keeps_spares = spares and device.type == "cuda"
        self._restock()

    def _restock(self) -> None:
        while self._keeps_spares and len(self._spares) < _SPARE_BUFFERS:
            spare = torch.zeros(self.on_device.shape, dtype=self.on_device.dtype, device="cpu")
            self._spares.append(spare.pin_memory())

    def send(self, numbers: Sequence[float]) -> None:
        """Bring the copy up to date."""
        self._renew(numbers, lambda: numbers)

    def _renew(self, what: object, numbers: Callable[[], Sequence[float]]) -> None:
        """Send numbers, unless they are those of the last time; ``what`` tells them apart."""
        if is_capturing(self.on_device.device):
            self._send_captured(numbers())
        elif what != self._last or self._captured:
            self._restock()
            host = torch.tensor(numbers(), dtype=self.on_device.dtype, device="cpu")
            # Small pageable memory is staged before the call returns: nothing waits for it.
            self.on_device.copy_(host, non_blocking=True)
            self._last = what

    def send_rows(self, rows: Sequence[tuple[Sequence[Number], int]]) -> None:
        """The same for a table: rows, each with how many of it follow each other.

        A number may be a tensor of the device, which the host is not asked for: one value, or a
        vector with one for each time that its row comes.
        """
        host = [([0.0 if isinstance(x, Tensor) else x for x in row], times) for row, times in rows]
        self._renew(host, lambda: [x for row, times in host for x in row * times])
        begin = 0
        for row, times in rows:
            for column, value in enumerate(row):
                if isinstance(value, Tensor):
                    place = self.on_device.view(-1, len(row))[begin : begin + times, column]
                    place.copy_(value, non_blocking=True)
            begin += times

    def _send_captured(self, numbers: Sequence[float]) -> None:
        if not self._spares:
            raise RuntimeError(
                f"no buffer is left to capture step() with, after {_SPARE_BUFFERS} captures in a "
                "row; take a step outside of a graph between them"
            )
        buffer = self._spares.pop()
        buffer.copy_(torch.tensor(numbers, dtype=buffer.dtype, device="cpu"))
        self.on_device.copy_(buffer, non_blocking=True)
        self._captured.append(buffer)
