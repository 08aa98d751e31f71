"""The C++ backend for CPU tensors: a whole call as one parallel region in a native library.

The library has a plain C interface (csrc/include/fused_adafactor/abi.h), is loaded on first use and
takes its threads from the OpenMP pool that torch has started.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fused_adafactor.binding import Binding, Cohort, Exchange, memory_of, sums_of
from fused_adafactor.fields import DTYPES
from fused_adafactor.metrics import Outcome
from fused_adafactor.native import LIBRARY_ENVIRONMENT, library_path, load_library
from fused_adafactor.plan import Activity, Phase
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import (
    DecayFactor,
    Eps1Rule,
    GradClipKind,
    MomentumSite,
    Nonfinite,
    Rule,
    Scalars,
)
from fused_adafactor.slabs import (
    CPU_CUT,
    CPU_CUT_OF_HALVES,
    Form,
    Geometry,
    Item,
    ItemKind,
    Wave,
    geometry_of,
    is_whole,
    items_between_sums,
    items_of,
    strips_of,
    waves_of,
    whole_of,
)
from fused_adafactor.spec import TensorSpec

ISA_ENVIRONMENT = "FUSED_ADAFACTOR_ISA"
ENVIRONMENTS = (ISA_ENVIRONMENT, LIBRARY_ENVIRONMENT)
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
_MAX_DIMS = 8
_EPS1_RULES = {Eps1Rule.ADD: 0, Eps1Rule.CLAMP: 1}
_SITES = {MomentumSite.GRAD: 1, MomentumSite.UPDATE: 2, MomentumSite.STEP: 3}
_DECAYS = {DecayFactor.ALPHA: 1, DecayFactor.LR: 2, DecayFactor.ONE: 3}
_ROUNDINGS = {Rounding.NEAREST: 0, Rounding.STOCHASTIC: 1, Rounding.KAHAN: 2}


class _Rule(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta2", "beta1")),
        *((name, ctypes.c_double) for name in ("numerator_scale", "amsgrad_scale")),
        *((name, ctypes.c_double) for name in ("eps1", "eps2", "clip_threshold", "rho", "lr")),
        *((name, ctypes.c_double) for name in ("decay_coefficient", "clip_value")),
        *((name, ctypes.c_double) for name in ("average_momentum", "accumulation_steps")),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("eps1_rule", "momentum", "decay_factor")),
        *((name, ctypes.c_int32) for name in ("decay_before_rms", "amsgrad", "sums", "rounding")),
        *((name, ctypes.c_int32) for name in ("overwrite_with_average", "norm_clipped", "skips")),
    ]


class _PartialSums(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_sq", "param_sq", "update_sq", "measured_sq")),
        *((name, ctypes.c_void_p) for name in ("row_var_sum", "row_sq_sum")),
        *((name, ctypes.c_void_p) for name in ("all_row_var", "all_row_sq")),
        *((name, ctypes.c_void_p) for name in ("line_sq", "cross_sq", "weighted")),
    ]


class _ExpectedSums(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("written", "read")),
        *((name, ctypes.c_int32) for name in ("known", "confirmed", "trusted", "surprised")),
    ]


class _WholeParameter(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("numel", "rows", "cols", "first_row", "first_col")),
        ("first_element", ctypes.c_int64),
        *((name, ctypes.c_int64 * _MAX_DIMS) for name in ("stack_sizes", "stack_strides")),
        ("first_matrix", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("stack_ndim", "is_split")),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64 * _MAX_DIMS) for name in ("sizes", "strides", "state_strides")),
        ("logical", ctypes.c_int64 * _MAX_DIMS),
        *((name, ctypes.c_int64) for name in ("numel", "batch", "rows", "cols")),
        *((name, ctypes.c_int64) for name in ("matrix_rows", "matrix_cols")),
        *((name, ctypes.c_int32) for name in ("ndim", "form", "swapped", "skip")),
        *((name, ctypes.c_int32) for name in ("param_dtype", "grad_dtype", "moment_dtype")),
        *((name, ctypes.c_int32) for name in ("exp_avg_dtype", "math_dtype", "param_index")),
        *((name, ctypes.c_int32) for name in ("mirror_dtype", "pad")),
        *((name, ctypes.c_double) for name in ("grad_scale", "grad_factor")),
        *((name, ctypes.c_void_p) for name in ("param", "grad", "line_var", "cross_var", "var")),
        *((name, ctypes.c_void_p) for name in ("var_max", "exp_avg", "exp_avg_scale")),
        *((name, ctypes.c_void_p) for name in ("compensation", "average", "accumulator")),
        ("mirror", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rule", "slabs", "lines_per_slab")),
        *((name, ctypes.c_int64) for name in ("strips", "lines_per_strip")),
        *((name, ctypes.c_int64) for name in ("scratch", "wave")),
        *((name, ctypes.c_int32) for name in ("measures", "measures_param_rms")),
        ("whole", _WholeParameter),
        ("partial", _PartialSums),
        ("expected", _ExpectedSums),
        *((name, ctypes.c_int32) for name in ("says_update_sq", "pad_sums")),
        *((name, ctypes.c_double) for name in ("grad_sq", "param_rms", "alpha", "update_rms")),
        ("update_sq", ctypes.c_double),
    ]


class _Outcome(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("grad_sq", "param_rms", "alpha", "update_rms")]


class _Item(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "tensor", "slab", "pad")]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the native library, once.

    Raises:
        OSError: It is not there or cannot be loaded.
        RuntimeError: It was built for another version of this package.
        ValueError: FUSED_ADAFACTOR_ISA names no instruction set of this machine.
    """
    native = load_library()
    native.fused_adafactor_run.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64),  # items
        *(ctypes.c_void_p, ctypes.c_int64),  # tensors
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),  # gradients, their factors, skips
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),  # rules, scratch, threads
        ctypes.c_void_p,  # outcomes
    ]
    wanted = os.environ.get(ISA_ENVIRONMENT)
    if wanted is not None:
        number = ISAS.index(wanted) if wanted in ISAS else None
        if number is None or native.fused_adafactor_set_isa(number) != number:
            raise ValueError(
                f"{ISA_ENVIRONMENT} must be one of {', '.join(ISAS)} that this machine has, "
                f"got {wanted!r}"
            )
    return native


def missing() -> str | None:
    """Why this backend cannot run, or None."""
    named = os.environ.get(LIBRARY_ENVIRONMENT)
    if named and not Path(named).exists():
        return f"{LIBRARY_ENVIRONMENT} is {named}, which is not there"
    try:
        library()
    except FileNotFoundError:
        return (
            "the native library was not built (no C++ compiler when the package was installed; "
            "where there is one, `python -m fused_adafactor build --backend cpp` does it)"
        )
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def steps_on(device: torch.device) -> bool:
    """Whether tensors of a device can be stepped: those of a CPU."""
    return device.type == "cpu"


def refusal(device: torch.device) -> str | None:
    """Why it cannot run on a device of these, or None: there is only one."""
    return None


def facts() -> dict[str, str | int]:
    """The library, the instruction set that it uses, and the threads that a step takes."""
    return {
        "library": library_path().name,
        "isa": ISAS[library().fused_adafactor_isa()],
        "threads": torch.get_num_threads(),
    }


def describe() -> str:
    """The library and the instruction set that it uses."""
    return "{library}, {isa}".format(**facts())


class _Executor:
    """Tensors in the library's records, which are filled once.

    What is new in a step goes beside them: the rules' numbers, and the addresses of the gradients.
    """

    def __init__(self, bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> None:
        count = len(bindings)
        self.params = [b.param for b in bindings]
        self.ids = [b.planned.spec.id for b in bindings]
        self.are_split = bindings[0].planned.spec.is_split  # a plan has only such, or none
        self.geometries = [_geometry_of(b.planned.spec) for b in bindings]
        self.tensors = (_Tensor * count)()
        # A gradient that is not laid out like its parameter is copied in every step; nothing else.
        self.odd = [
            number for number, b in enumerate(bindings) if not _laid_out_alike(b.planned.spec)
        ]
        self.accumulators = [
            (number, b.accumulator)
            for number, b in enumerate(bindings)
            if b.accumulator is not None
        ]
        self.items: dict[object, ctypes.Array[_Item]] = {}
        self.outcomes = torch.zeros(
            count, len(_Outcome._fields_), dtype=torch.float64, device="cpu"
        )
        self.math_dtype = bindings[0].planned.spec.math_dtype
        rules: dict[tuple[int, float], int] = {}
        count_of_rules = 0
        self.cohorts: list[tuple[Cohort, float]] = []
        for record, b, geometry in zip(self.tensors, bindings, self.geometries, strict=True):
            _fill_geometry(record, b, geometry)
            _fill_memory(record, b, geometry)
            _fill_sums(record, b, geometry)
            eps1 = b.rule.eps1_of(b.planned.spec.param_dtype, b.planned.spec.math_dtype)
            key = (id(b.cohort), eps1)
            if key not in rules:
                rules[key] = count_of_rules
                count_of_rules += b.cohort.counts
                self.cohorts.append((b.cohort, eps1))
            record.rule = rules[key] + b.count
        self.grad_scales = [0.0] * count_of_rules
        self.rules = (_Rule * count_of_rules)()
        self.sums_bytes = [
            _scratch_bytes(g, b) for g, b in zip(self.geometries, bindings, strict=True)
        ]
        self.in_one_go = len(segments) == 1
        self._expect_sums(bindings)
        self.threads = torch.get_num_threads()
        self._divide_scratch()

    def _expect_sums(self, bindings: Sequence[Binding]) -> None:
        """Give large matrices room for ``ExpectedSums``, and remember when torch saw them written.

        One that is stepped in one item is read from memory once anyway. What torch has written is
        read; of what torch does not know, such as a change of ``p.data``, the library finds out.
        Torch counts the writes of a distributed parameter elsewhere, so that is read.
        """
        self.expecting = [
            number
            for number, geometry in enumerate(self.geometries)
            if bindings[number].rule.expects_param_rms
            and self.tensors[number].measures_param_rms
            and bindings[number].planned.spec.shard is None
            and geometry.form is Form.FACTORED
            and not is_whole(geometry, CPU_CUT)
            and not self.params[number].is_inference()  # it has no version
        ]
        self.versions = [-1] * len(self.expecting)
        strips = [self.tensors[n].slabs * self.tensors[n].strips for n in self.expecting]
        self.expected_sums = (ctypes.c_double * (2 * sum(strips)))()
        at = ctypes.addressof(self.expected_sums)
        for number, count in zip(self.expecting, strips, strict=True):
            expected = self.tensors[number].expected
            expected.written, expected.read = at, at + 8 * count
            at += 16 * count

    def _divide_scratch(self) -> None:
        """Two places for the sums of all waves of these threads, as only two of them are under way.

        Where the step has pauses, sums are kept until all have been taken. A tensor that is stepped
        in one go has them in memory of its thread.
        """
        waves = [Wave(whole=(), swept=tuple(range(len(self.tensors))))]
        if self.in_one_go:
            waves = waves_of(self.geometries, self.threads, everything=True)
        second_place = self._place(waves[::2], 0, 0)
        end = self._place(waves[1::2], 1, second_place)
        self.scratch = torch.empty(end, dtype=torch.uint8, device="cpu")

    def _place(self, waves: Sequence[Wave], first: int, begin: int) -> int:
        """Every other wave, from number ``first`` on, in one place; where that ends."""
        ends = [begin]
        for number, wave in enumerate(waves):
            end = begin
            for tensor in wave.swept:
                record = self.tensors[tensor]
                record.scratch, record.wave = end, first + 2 * number
                end += self.sums_bytes[tensor]
            ends.append(end)
        return max(ends)

    def run(self, phases: Sequence[Phase], exchange: Exchange) -> None:
        """Run phases, in order, of an update."""
        threads = torch.get_num_threads()
        if self.in_one_go and threads != self.threads:
            self.threads = threads
            self._divide_scratch()
        key = (threads, *phases)
        if key not in self.items:
            if self.are_split:
                items = items_between_sums(self.geometries, phases)
            else:
                items = items_of(self.geometries, phases, threads)
            self.items[key] = _records_of(items)
        self._execute(self.items[key], exchange, reports=True)
        if Phase.APPLY in phases:
            if exchange.wants_param_rms:
                exchange.param_rms = self.outcomes[:, 1].to(self.math_dtype, copy=True)
        elif not self.are_split:
            exchange.grad_sq = self.outcomes[:, 0].to(self.math_dtype, copy=True)

    def run_activity(self, activity: Activity, exchange: Exchange) -> None:
        """Run an activity that has no update."""
        if activity is Activity.DROP:
            self._drop_accumulated(exchange.skip)
        kind = ItemKind.ACCUMULATE if activity is Activity.ACCUMULATE else ItemKind.AVERAGE
        if kind not in self.items:
            self.items[kind] = _records_of(
                (kind, number, slab)
                for number, geometry in enumerate(self.geometries)
                for slab in range(geometry.slabs)
            )
        idle = activity in (Activity.AVERAGE, Activity.DROP)
        self._execute(self.items[kind], exchange, reports=False, idle=idle)
        self.versions = [-1] * len(self.versions)  # an average may be a parameter's new value

    def outcome(self) -> Outcome:
        """What the last update has found out."""
        _, param_rms, alpha, update_rms = self.outcomes.unbind(dim=1)
        return Outcome(param_rms, update_rms, alpha)

    def _drop_accumulated(self, skip: Tensor | None) -> None:
        for number, accumulator in self.accumulators:
            if skip is None or not skip[number]:
                accumulator.zero_()

    def _execute(
        self, items: ctypes.Array[_Item], exchange: Exchange, reports: bool, idle: bool = False
    ) -> None:
        """Hand items to the library; ``idle`` where the tensors have no gradients."""
        for number, version in zip(self.expecting, self.versions, strict=True):
            if self.params[number]._version != version:
                self.tensors[number].expected.known = 0
        self._send_numbers(idle)
        grads = self._laid_out(exchange.grads)
        pointers = list(map(Tensor.data_ptr, grads)) or [0] * len(self.params)
        if grads and not all(pointers) and any(g.numel() and not g.data_ptr() for g in grads):
            raise RuntimeError("a gradient has no memory: its storage was freed")
        addresses = array("Q", pointers)
        factor, skip = exchange.grad_factor, exchange.skip
        if factor is not None:
            factor = factor.to(torch.float64).contiguous()
        library().fused_adafactor_run(
            items,
            len(items),
            self.tensors,
            len(self.tensors),
            addresses.buffer_info()[0],
            None if factor is None else factor.data_ptr(),
            None if skip is None else skip.data_ptr(),
            self.rules,
            self.scratch.data_ptr(),
            torch.get_num_threads(),
            self.outcomes.data_ptr() if reports else None,
        )
        # autograd must see that a value which it may have saved is gone.
        torch.autograd.graph.increment_version(self.params)
        self.versions = [self.params[number]._version for number in self.expecting]
        self._warn_of_surprises()

    def _warn_of_surprises(self) -> None:
        for number in self.expecting:
            expected = self.tensors[number].expected
            if expected.trusted and expected.surprised:
                expected.surprised = 0
                warnings.warn(
                    f"{self.ids[number]} was written between two steps in a way that torch does "
                    "not count (p.data, a collective, a kernel of its own), under "
                    "param_rms='expected'. The step was corrected, which has rounded the "
                    "parameter once more, at the size of the step from its old RMS. It is read "
                    "now for a hundred steps; use param_rms='read' where this is meant to happen",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _send_numbers(self, idle: bool) -> None:
        """Fill in the rules' numbers of this step."""
        scales = []
        sent = [(cohort, eps1, each) for cohort, eps1 in self.cohorts for each in cohort.on_host()]
        for record, (cohort, eps1, scalars) in zip(self.rules, sent, strict=True):
            scales.append(float(cohort.grad_scale))
            _fill_rule(record, cohort, scalars, eps1)
            if idle and not cohort.rule.overwrites_without_grad:
                record.overwrite_with_average = 0
        if scales != self.grad_scales:
            for tensor in self.tensors:
                tensor.grad_scale = scales[tensor.rule]
            self.grad_scales = scales

    def _laid_out(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients, each in the memory layout of its parameter, and as it is meant."""
        # What autograd gets from the imaginary part of a conjugate is negated when it is read.
        negated = any(map(Tensor.is_neg, grads))
        if not grads or not (self.odd or negated):
            return grads
        grads = list(grads)
        odd = self.odd
        if negated:
            odd = sorted({*odd, *(number for number, grad in enumerate(grads) if grad.is_neg())})
        for number in odd:
            grad, param = grads[number], self.params[number]
            copy = torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device="cpu")
            grads[number] = copy.copy_(grad)
        return grads


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements, or None."""
    dims = len(_geometry_of(spec).sizes)
    if dims > _MAX_DIMS:
        return f"has {dims} dimensions that cannot be merged, more than {_MAX_DIMS}"
    return None


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> _Executor:
    """Make an executor for tensors of one math dtype, none of them empty."""
    return _Executor(bindings, segments)


def _records_of(items: Iterable[Item]) -> ctypes.Array[_Item]:
    records = [_Item(kind, tensor, slab, 0) for kind, tensor, slab in items]
    return (_Item * len(records))(*records)


def _geometry_of(spec: TensorSpec) -> Geometry:
    """Cut a tensor; its gradient comes in its own layout, or is copied into it."""
    halves = spec.param_dtype.itemsize < spec.math_dtype.itemsize
    cut = CPU_CUT_OF_HALVES if halves else CPU_CUT
    return geometry_of(replace(spec, grad_strides=spec.param_strides), cut)


def _laid_out_alike(spec: TensorSpec) -> bool:
    """Whether a gradient has its parameter's strides, where they matter."""
    triples = zip(spec.shape, spec.param_strides, spec.grad_strides, strict=True)
    return all(size == 1 or stride == other for size, stride, other in triples)


def _fill_memory(record: _Tensor, b: Binding, geometry: Geometry) -> None:
    """Pointers to what a tensor owns."""
    record.param = b.param.data_ptr()
    for name, tensor in memory_of(b, geometry.swapped).items():
        setattr(record, name, tensor.data_ptr())


def _fill_sums(record: _Tensor, b: Binding, geometry: Geometry) -> None:
    """Where it is in its parameter, and pointers to its sums over processes."""
    spec, whole = b.planned.spec, whole_of(b.planned.spec, geometry)
    record.whole.numel, record.whole.is_split = spec.whole_numel, spec.is_split
    for name in ("rows", "cols", "first_row", "first_col", "first_element", "first_matrix"):
        setattr(record.whole, name, getattr(whole, name))
    record.whole.stack_ndim = len(whole.stack)
    for number, (size, stride) in enumerate(whole.stack):
        record.whole.stack_sizes[number], record.whole.stack_strides[number] = size, stride
    for name, tensor in sums_of(b, geometry.swapped).items():
        setattr(record.partial, name, tensor.data_ptr())
    record.says_update_sq = b.says_update_sq


def _scratch_bytes(geometry: Geometry, b: Binding) -> int:
    """Bytes of ``Sums`` in csrc/cpu/sums.h."""
    sums = _cache_lines(24 * geometry.slabs)
    if geometry.form is not Form.FACTORED:
        return sums
    size = 8 if b.planned.spec.math_dtype is torch.float64 else 4
    matrix = _cache_lines(64 + size * (geometry.rows + 2 * geometry.cols))
    partial = 0
    if geometry.slabs_per_matrix > 1:
        partial = _cache_lines(2 * size * geometry.slabs * geometry.cols)
    return sums + geometry.batch * matrix + partial


def _cache_lines(size: int) -> int:
    return -(-size // 64) * 64


def _fill_geometry(record: _Tensor, b: Binding, geometry: Geometry) -> None:
    spec = b.planned.spec
    for name in ("sizes", "strides", "state_strides", "logical"):
        getattr(record, name)[: len(geometry.sizes)] = getattr(geometry, name)
    record.numel = spec.numel
    record.batch, record.rows, record.cols = geometry.batch, geometry.rows, geometry.cols
    record.ndim = len(geometry.sizes)
    record.form = geometry.form
    record.matrix_rows, record.matrix_cols = geometry.matrix
    record.swapped = geometry.swapped
    record.param_dtype = DTYPES[spec.param_dtype]
    record.grad_dtype = DTYPES[spec.grad_dtype]
    record.math_dtype = DTYPES[spec.math_dtype]
    record.moment_dtype = DTYPES[b.rule.moment_dtype(spec.param_dtype)]
    record.exp_avg_dtype = DTYPES[b.rule.momentum_dtype(spec.param_dtype)]
    record.param_index = spec.id.index
    record.mirror_dtype = DTYPES[spec.mirror_dtype or spec.param_dtype]
    record.slabs, record.lines_per_slab = geometry.slabs, geometry.lines_per_slab
    record.strips, record.lines_per_strip = strips_of(geometry, CPU_CUT)
    record.measures = b.rule.clip_threshold is not None
    record.measures_param_rms = b.rule.measures_param_rms


def _fill_rule(record: _Rule, cohort: Cohort, scalars: Scalars, eps1: float) -> None:
    rule = cohort.rule
    record.seed, record.step = cohort.seed, int(scalars.t)
    _fill_numbers(record, rule, scalars, eps1)
    clip, average, decay = rule.grad_clip, rule.weight_average, rule.weight_decay
    record.clip_value = -1.0
    if clip is not None:
        if clip.kind is GradClipKind.VALUE:
            record.clip_value = clip.threshold
        else:
            record.norm_clipped = 1
    record.skips = rule.nonfinite is Nonfinite.SKIP
    if average is not None:
        t = float(scalars.t)
        record.average_momentum = float(average.momentum_at(t))
        record.overwrite_with_average = bool(average.overwrites_at(t))
    if decay is not None:
        record.decay_coefficient = decay.coefficient
        record.decay_factor = _DECAYS[decay.factor]
        record.decay_before_rms = decay.before_rms


def _fill_numbers(record: _Rule, rule: Rule, scalars: Scalars, eps1: float) -> None:
    record.beta2, record.beta1 = float(scalars.beta2), float(scalars.beta1)
    record.numerator_scale = float(scalars.numerator_scale)
    record.amsgrad_scale = float(scalars.amsgrad_scale)
    record.eps1 = eps1
    record.eps2 = -1.0 if rule.eps2 is None else rule.eps2
    record.clip_threshold = -1.0 if rule.clip_threshold is None else float(rule.clip_threshold)
    record.rho = float(scalars.rho)
    record.lr = 0.0 if scalars.lr is None else float(scalars.lr)
    record.accumulation_steps = float(rule.accumulation_steps)
    record.eps1_rule = _EPS1_RULES[rule.eps1_rule]
    record.momentum = 0 if rule.momentum is None else _SITES[rule.momentum.site]
    record.amsgrad, record.sums = rule.amsgrad, rule.sums
    record.rounding = _ROUNDINGS[rule.rounding]
