"""Optimizers whose steps are compiled by ``codegen``: rules, dtypes and tensors, by readable names.

Nothing is compiled or stepped on a GPU here. An optimizer steps once, with the reference on tensors
of a CPU; the launches of the same tensors are then what a GPU would have been given.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fused_adafactor.joining import joins
from fused_adafactor.launching import LAUNCHES, Executor
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.plan import Activity, Facts, make_plan
from fused_adafactor.slabs import ItemKind
from fused_adafactor.spec import Shard, TensorSpec
from fused_adafactor.summing import Round, after_stats, after_update_rms
from fused_adafactor.tickets import GPU_CUT

if TYPE_CHECKING:
    from fused_adafactor.backends.triton.offline import Source
    from fused_adafactor.backends.triton.variants import Variant

Arguments = Mapping[str, Any]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I8 = torch.int8

NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
ONE = ("sm_90",)  # for what is compiled for one target only

# Of every dialect, the constructor arguments that make another kernel: by name, the defaults first.
RULES: Mapping[str, Mapping[str, Arguments]] = {
    "torch": {
        "defaults": {},
        "bfloat16_state": {"state_dtype": BF16},
        "stochastic": {"rounding": "stochastic"},
        "kahan": {"rounding": "kahan"},
        "global_norm": {"max_grad_norm": 1.0},
    },
    "hf": {
        "defaults": {},
        "no_parameter_scale": {"scale_parameter": False, "relative_step": False, "lr": 1e-3},
        "momentum": {"beta1": 0.9},
        "momentum_skip": {"beta1": 0.9, "nonfinite": "skip"},
        "low_state": {
            "beta1": 0.9,
            "momentum_dtype": I8,
            "state_dtype": BF16,
            "max_grad_norm": 1.0,
        },
        "momentum_of_8_bits": {"beta1": 0.9, "momentum_dtype": I8},
        "clipped_low_state": {"beta1": 0.9, "state_dtype": BF16, "max_grad_norm": 1.0},
    },
    "adafactor_pytorch": {
        "defaults": {},
        "no_momentum": {"beta1": 0.0},
        "amsgrad": {"non_constant_decay": False, "ams_grad": True},
        "momentum_of_8_bits": {"momentum_dtype": I8},
        "unfactored": {"enable_factorization": False},
        "bfloat16_state": {"state_dtype": BF16},
    },
    "keras": {
        "defaults": {},
        "clipnorm": {"clipnorm": 1.0},
        "clipvalue": {"clipvalue": 1.0},
        "average": {"use_ema": True},
        "accumulation": {"gradient_accumulation_steps": 2},
        "accumulated_average": {"gradient_accumulation_steps": 2, "use_ema": True},
    },
    "optax": {
        "defaults": {},
        "momentum": {"momentum": 0.9},
        "bfloat16_momentum": {"momentum": 0.9, "dtype_momentum": BF16},
        "no_clip": {"clipping_threshold": None},
        "no_clip_no_scale": {"clipping_threshold": None, "multiply_by_parameter_scale": False},
    },
    "big_vision": {
        "defaults": {},
        "clip": {"clipping_threshold": 1.0},
        "no_momentum": {"momentum": None},
        "momentum_of_8_bits": {"momentum_dtype": I8},
    },
}
_CLASSES = {"adafactor_pytorch": "AdaFactor"}
_ARGUMENTS: Mapping[str, Arguments] = {"big_vision": {"lr": 1e-3}}  # that have no default

# A matrix of so many elements is too large for one program to step in one go.
_ELEMENTS = 2 * GPU_CUT.whole_elements
_WIDTHS = (128, 256, 512, 1024, 2048, 4096, 8192)

# Tensors that are stepped together, by what a kernel tells apart of them.
TENSORS: Mapping[str, Sequence[tuple[int, ...]]] = {
    # Of a transformer: all that is done to its tensors, in one kernel.
    "model": ((128, 1024), (128, 4096), (4096,)),
    **{f"lines_of_{width}": ((_ELEMENTS // width, width),) for width in _WIDTHS},
    "long_lines": ((16, 12288),),
    "small_lines": ((24, 768),),
    "ragged_lines": ((701, 100),),
    "vectors": ((_ELEMENTS,), (4096,)),
    "ragged_vectors": ((_ELEMENTS + 1,), (77,)),
    "tiny_matrices": ((_ELEMENTS // 16, 4, 4),),
    "transposed_gradients": ((256, 512), (512,)),
}
MODEL = "model"

# How the parameters are split of which these tensors are parts, by dimension: the second half of
# each dimension is here.
SPLITS: Mapping[str, tuple[int, ...]] = {"rows": (0,), "columns": (-1,), "both": (0, -1)}

# For one target only. Blocks of 8 bits lie in tiles of every kind, and where it is the gradient
# that is averaged, the first sweep has them too.
_MORE = (
    *(("torch", "defaults", MODEL, *dtypes) for dtypes in ((F16, F16), (F64, F64))),
    *(("torch", "defaults", MODEL, *dtypes) for dtypes in ((F32, BF16), (BF16, F32))),
    ("adafactor_pytorch", "momentum_of_8_bits", "long_lines", F32, F32),
    ("keras", "accumulation", "tiny_matrices", F32, F32),
    *(
        ("hf", "momentum_of_8_bits", tensors, F32, F32)
        for tensors in ("ragged_lines", "tiny_matrices")
    ),
)
# What becomes of parts: every item, in both forms; second moments and parameters that are rounded
# by the place that they have in the whole, which is in another order than theirs.
_PARTS = (
    *(("torch", "defaults", MODEL, F32, F32, form, "rows") for form in LAUNCHES),
    *(("hf", "defaults", MODEL, BF16, BF16, "persistent", split) for split in SPLITS),
    *(("torch", "stochastic", MODEL, BF16, BF16, "persistent", s) for s in ("rows", "columns")),
    *(("torch", "bfloat16_state", t, BF16, BF16, "persistent", "rows") for t in (MODEL, "vectors")),
    ("hf", "clipped_low_state", MODEL, BF16, BF16, "persistent", "columns"),
    ("hf", "momentum", "long_lines", BF16, BF16, "persistent", "columns"),
    ("adafactor_pytorch", "amsgrad", MODEL, F32, F32, "persistent", "rows"),
    ("adafactor_pytorch", "bfloat16_state", "ragged_vectors", BF16, BF16, "persistent", "rows"),
    ("torch", "bfloat16_state", "tiny_matrices", BF16, BF16, "persistent", "rows"),
)


@dataclass(frozen=True)
class Case:
    """An optimizer of some tensors.

    Attributes:
        dialect: Its dialect.
        rule: Which of the dialect's ``RULES``.
        tensors: Which of ``TENSORS``.
        dtype: Of the parameters.
        grad_dtype: Of their gradients.
        launch_form: ``persistent`` or ``phases``.
        split: Which of ``SPLITS`` the tensors are parts by; None for whole ones.
    """

    dialect: str
    rule: str
    tensors: str
    dtype: torch.dtype
    grad_dtype: torch.dtype
    launch_form: str
    split: str | None = None

    @override
    def __str__(self) -> str:
        """Its name: ``torch/defaults bfloat16 model persistent``, say."""
        dtypes = dict.fromkeys(str(d).removeprefix("torch.") for d in (self.dtype, self.grad_dtype))
        words = [f"{self.dialect}/{self.rule}", "/".join(dtypes), self.tensors, self.launch_form]
        return " ".join([*words, *([] if self.split is None else [f"split:{self.split}"])])

    @property
    def possible(self) -> bool:
        """Whether there is such an optimizer."""
        rounding = self._arguments.get("rounding", "nearest")
        low = (BF16,) if rounding == "stochastic" else (BF16, F16)
        return rounding == "nearest" or self.dtype in low

    @property
    def _arguments(self) -> Arguments:
        return {**_ARGUMENTS.get(self.dialect, {}), **RULES[self.dialect][self.rule]}

    def part_of(self, spec: TensorSpec) -> TensorSpec:
        """A tensor as a part of one that is twice as large in each dimension that is split."""
        if self.split is None:
            return spec
        dims = {dim % len(spec.shape): axis for axis, dim in enumerate(SPLITS[self.split])}
        sizes = list(enumerate(spec.shape))
        whole = tuple(2 * size if dim in dims else size for dim, size in sizes)
        order = sorted(range(len(whole)), key=spec.param_strides.__getitem__, reverse=True)
        shard = Shard(
            whole=whole,
            strides=torch.empty_permuted(whole, order, device="meta").stride(),
            offset=tuple(size if dim in dims else 0 for dim, size in sizes),
            split=tuple((dims[dim],) if dim in dims else () for dim, _ in sizes),
            mesh=None,
        )
        return replace(spec, shard=shard)

    def optimizer(self) -> AdafactorBase:
        """The optimizer, with gradients of its parameters."""
        module = importlib.import_module(f"fused_adafactor.dialects.{self.dialect}")
        name = _CLASSES.get(self.dialect, "Adafactor")
        make: Callable[..., AdafactorBase] = getattr(module, name)
        params = []
        for shape in TENSORS[self.tensors]:
            param = torch.nn.Parameter(torch.ones(shape, dtype=self.dtype, device="cpu"))
            grad = torch.ones(shape, dtype=self.grad_dtype, device="cpu")
            if self.tensors.startswith("transposed"):
                grad = grad.mT.contiguous().mT if grad.dim() > 1 else grad
            param.grad_dtype = None  # any
            param.grad = grad
            params.append(param)
        return make(params, **self._arguments, backend="reference")


def default_cases() -> dict[Case, tuple[str, ...]]:
    """Cases that cover every switch of a kernel at least once, and their targets.

    The defaults of every dialect are for every target, in the form that they are launched in there;
    what one more switch changes is for one target.
    """
    cases: dict[Case, tuple[str, ...]] = {}

    def add(targets: tuple[str, ...], *of_case: Any) -> None:
        case = Case(*of_case)
        cases[case] = (*cases.get(case, ()), *targets)

    for dialect, rules in RULES.items():
        for dtype in (F32, BF16):
            add(NVIDIA, dialect, "defaults", MODEL, dtype, dtype, "persistent")
            add(AMD, dialect, "defaults", MODEL, dtype, dtype, "phases")
        for rule in rules:
            add(ONE, dialect, rule, MODEL, BF16, BF16, "persistent")
    for dtype in (F32, BF16):
        add(NVIDIA, "torch", "defaults", MODEL, dtype, dtype, "phases")
        add(AMD, "torch", "defaults", MODEL, dtype, dtype, "persistent")
    # What holds most on its way to a program: shared memory differs between GPUs.
    for dialect, rule in (("keras", "accumulated_average"), ("adafactor_pytorch", "amsgrad")):
        add(NVIDIA, dialect, rule, MODEL, F32, F32, "persistent")
    for of_case in (*((*case, "persistent") for case in _MORE), *_PARTS):
        add(ONE, *of_case)
    for tensors in TENSORS:
        for form in LAUNCHES:
            add(ONE, "torch", "defaults", tensors, BF16, BF16, form)
    # Random bits, where registers are fullest.
    add(ONE, "torch", "bfloat16_state", "tiny_matrices", BF16, BF16, "persistent")
    return cases


def all_cases() -> dict[Case, tuple[str, ...]]:
    """Every rule with all tensors, every dtype and both launch forms, for every target.

    Of parts those of the default set: they have switches of their own, whatever the rule.
    """
    dtypes = ((F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (BF16, F32))
    cases = (
        Case(dialect, rule, tensors, dtype, grad_dtype, form)
        for dialect, rules in RULES.items()
        for rule in rules
        for tensors in TENSORS
        for dtype, grad_dtype in dtypes
        for form in LAUNCHES
    )
    parts = (case for case in default_cases() if case.split is not None)
    return dict.fromkeys((c for c in (*cases, *parts) if c.possible), (*NVIDIA, *AMD))


def sources_of_case(case: Case) -> Iterator[tuple[str, Source]]:
    """The kernels of a case, with their names."""
    from fused_adafactor.backends.triton.launcher import TritonLauncher
    from fused_adafactor.backends.triton.offline import source_of

    optimizer = case.optimizer()
    optimizer.step()
    assert optimizer._known is not None  # a first step prepares the next
    tasks = optimizer._known.prepared.tasks
    facts = Facts("triton", two_sweep=True, why="compiled only")
    specs = tuple(case.part_of(t.spec) for t in tasks)
    plan = make_plan(specs, facts, joins([t.cohort.rule for t in tasks]))
    rounds = [
        Round((planned.spec, taken(planned)) for planned in plan.tensors)
        for taken in (after_stats, after_update_rms)
    ]
    bindings = [
        optimizer._engine.bind(replace(t, spec=spec), planned, rounds)
        for t, spec, planned in zip(tasks, specs, plan.tensors, strict=True)
    ]
    launcher = TritonLauncher(specs[0], case.launch_form)
    executor = Executor(bindings, plan.segments, launcher)
    launches = [launch for phases in plan.segments for launch in executor.launches_of(phases)]
    rule = tasks[0].cohort.rule
    if rule.accumulation_steps > 1:
        launches += executor.launches_of_activity(Activity.ACCUMULATE)
    if rule.weight_average is not None:
        launches += executor.launches_of_activity(Activity.AVERAGE)
    for launch, _ in launches:
        arguments = executor.arguments(launch, executor.no_factors, executor.no_skips)
        source = source_of(launcher.kernel_of(launch), arguments)
        yield f"{case} {_words(source.variant)}", source


def _words(variant: Variant) -> str:
    """What a kernel of a case does, on which tensors."""
    kinds = [kind for kind in ItemKind if variant.KINDS[kind]]
    update = ItemKind.STATS in kinds and ItemKind.APPLY in kinds
    words = ["update"] if update else ["+".join(kind.name.lower() for kind in kinds)]
    if variant.LINES:
        words.append("lines:" + ",".join(map(str, variant.WIDTHS)))
    flags = {
        "chunks": variant.CHUNKED,
        "flat": variant.UNFACTORED,
        "tiny": variant.TINY,
        "strided": variant.STRIDED,
        "unaligned": not variant.ALIGNED,
    }
    return " ".join([*words, *(word for word, there in flags.items() if there)])
