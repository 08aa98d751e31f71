"""Parts of distributed parameters on CUDA: threads stand for processes, the emulation for GPUs.

Numbers of every rule and placement are in ``test_interpreted_parts.py``. Here is what CUDA's ways
through elements, and the contract of all backends, ask for besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from fused_adafactor.rounding import RoundingKey, round_stochastic
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, DIALECTS, HF, KERAS, OPTAX, TORCH, Dialect
from tests.distributed.ranks import (
    PLACEMENTS,
    assert_close_part,
    assert_close_parts,
    distribute,
    fitting,
    mesh_of,
    on_every_rank,
)
from tests.interpret.small import BACKEND, assert_same
from tests.kernels.judged import BF16, F32, F64
from tests.stepping import params_of, same_bits

pytestmark = pytest.mark.skipif(BACKEND != "cuda", reason="of CUDA's kernels")
EVERY_PLACEMENT = pytest.mark.parametrize("placement", PLACEMENTS)

# By the sizes of ``small.py``. Parts whose lines begin at multiples of 16 bytes and others, of
# several slabs and parts, in chunks; uneven and empty ones; stacks, of tiny matrices too; vectors.
SHAPES = [
    *((64, 64), (13, 7), (8, 1088), (4, 24, 64), (4, 6, 5), (3,), (256,), (37,), (2, 9), (1, 3)),
    *((8, 3, 3), (20, 4, 4, 4)),
]
FEW = [(64, 64), (13, 7), (4, 24, 64), (256,), (37,), (2, 9), (8, 3, 3)]


def pair(
    dialect: Dialect,
    placement: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    backend: str = BACKEND,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A single process' optimizer by the reference, and a distributed one."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(sizes)
    shapes = fitting(shapes, placements)
    if dialect is ADAFACTOR_PYTORCH:  # what it reshapes has no parts
        shapes = [shape for shape in shapes if len(shape) <= 2] or [(4,)] * (placement != "third")
    if dialect is TORCH:
        kwargs.setdefault("eps", (1e-6, 1e-3))
    values = stepping.make_params(shapes, dtype)
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, placements)]
    whole = dialect(values or [torch.nn.Parameter(torch.ones(1))], backend="reference", **kwargs)
    distributed = dialect(parts or [torch.nn.Parameter(torch.ones(1))], backend=backend, **kwargs)
    return whole, distributed


def give(whole: Any, distributed: Any, step: int) -> None:
    """The same gradients to both."""
    values, parts = params_of(whole), params_of(distributed)
    for p, q, g in zip(values, parts, stepping.grad_values(values, step), strict=True):
        p.grad = g
        if isinstance(q, DTensor):
            q.grad = distribute_tensor(p.grad.clone(), q.device_mesh, q.placements)
        else:
            q.grad = p.grad.clone()


def step_both(whole: Any, distributed: Any, steps: int) -> None:
    for step in range(steps):
        give(whole, distributed, step)
        whole.step()
        distributed.step()


@EVERY_PLACEMENT
@pytest.mark.parametrize(
    ("dtype", "dialects"), [(F64, [HF, TORCH, OPTAX]), (F32, DIALECTS)], ids=["float64", "float32"]
)
@on_every_rank
def test_they_are_those_of_a_single_process(
    dtype: torch.dtype, dialects: Sequence[Dialect], placement: str
) -> None:
    """In float32 by what takes several neighbours at a time."""
    for dialect in dialects:
        # In bfloat16 it would be rounded up in one and down in the other.
        options = {"momentum_dtype": dtype} if dialect is BIG_VISION else {}
        whole, distributed = pair(dialect, placement, SHAPES, dtype, **options)
        step_both(whole, distributed, 2)
        assert_close_parts(distributed, whole, stepping.TOLERANCES[dtype])


# What moves phases apart, or adds memory of its own, beside what the variants of dialects have.
EXTRAS: list[dict[str, Any]] = [
    *({"max_grad_norm": 0.5}, {"nonfinite": "skip"}, {"clipvalue": 0.5}),
    {"gradient_accumulation_steps": 2, "nonfinite": "skip", "use_ema": True},
]


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("placement", ["rows", "second", "hsdp", "rows_and_columns"])
@pytest.mark.usefixtures("launch")
@on_every_rank
def test_extras_in_both_forms_of_launch(placement: str, extras: dict[str, Any]) -> None:
    for dialect, options in ((HF, {"eps": (1e-3, 1e-3)}), (OPTAX, {})):
        whole, distributed = pair(dialect, placement, FEW, F64, **options, **extras)
        step_both(whole, distributed, 4)
        assert_close_parts(distributed, whole, 1e-12)
        stepping.assert_close_metrics(distributed.metrics(), whole.metrics(), 1e-12)


@pytest.mark.parametrize("placement", ["rows", "second", "third", "rows_and_columns"])
def test_both_forms_of_launch_have_the_same_bits(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[tuple[str, int], list[dict[str, Tensor]]] = {}

    @on_every_rank
    def follow(form: str) -> None:
        whole, distributed = pair(HF, placement, SHAPES, F32)
        for step in range(2):
            give(whole, distributed, step)
            distributed.step()
        found[form, dist.get_rank()] = [
            {"param": local(p), **{k: local(torch.as_tensor(v)) for k, v in entries.items()}}
            for p, entries in distributed.state.items()
        ]

    for form in LAUNCHES:  # the environment is that of all ranks
        monkeypatch.setenv(LAUNCH_ENVIRONMENT, form)
        follow(form)
    for (_, rank), mine in found.items():
        assert_same(mine, found[LAUNCHES[0], rank])


def local(value: Tensor) -> Tensor:
    return value.detach().to_local() if isinstance(value, DTensor) else value.detach()


@pytest.mark.parametrize("placement", ["rows", "second", "rows_and_columns", "hsdp", "third"])
@on_every_rank
def test_processes_may_step_by_different_backends(placement: str) -> None:
    """So messages are those of the reference and of C++, whatever is in them."""
    backend = ("reference", BACKEND, "cpp", BACKEND)[dist.get_rank()]
    for dialect in (HF, TORCH, KERAS, OPTAX):
        for extras in ({}, {"max_grad_norm": 0.5}):
            whole, distributed = pair(dialect, placement, FEW, F64, backend, **extras)
            step_both(whole, distributed, 2)
            assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("placement", ["rows", "second", "hsdp", "rows_and_columns"])
@on_every_rank
def test_rows_and_columns_of_zeros(placement: str) -> None:
    """Where v is so small that a whole tensor would take a third sweep, parts of rows cannot."""
    for dialect in (HF, TORCH):
        whole, distributed = pair(dialect, placement, [(64, 64), (13, 7), (4, 24, 64)], F32)
        for step in range(2):
            give(whole, distributed, step)
            for p in (*params_of(whole), *params_of(distributed)):
                assert p.grad is not None
                keep = torch.ones(p.shape)
                keep[..., 1, :] = keep[..., 3] = 0.0
                if isinstance(p, DTensor):
                    keep = distribute_tensor(keep, p.device_mesh, p.placements)
                p.grad.mul_(keep)
            whole.step()
            distributed.step()
        tolerance = stepping.TOLERANCES[F32]
        assert_close_parts(distributed, whole, tolerance)
        stepping.assert_close_metrics(distributed.metrics(), whole.metrics(), tolerance)


@pytest.fixture(params=range(1, 5))
def _blocks_of_any_speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ADAFACTOR_EMULATED_SEED", str(request.param))
    monkeypatch.setenv("FUSED_ADAFACTOR_EMULATED_PROCESSORS", "4")


@pytest.mark.parametrize("placement", ["rows", "rows_and_columns"])
@pytest.mark.usefixtures("_blocks_of_any_speed")
@on_every_rank
def test_items_wait_for_what_they_need(placement: str) -> None:
    """Blocks stop anywhere, some times for long: sums go into a message when they are complete."""
    for dialect, extras in ((HF, {}), (HF, {"max_grad_norm": 0.5}), (TORCH, {})):
        whole, distributed = pair(dialect, placement, FEW, F64, **extras)
        step_both(whole, distributed, 1)
        assert_close_parts(distributed, whole, 1e-12)


@EVERY_PLACEMENT
@on_every_rank
def test_copies_have_the_same_bits(placement: str) -> None:
    """Of parameters, and of second moments that processes share, also those with empty parts."""
    low = [] if placement in ("rows_and_columns", "columns_and_rows") else [(HF, BF16)]
    for dialect, kept in (*((dialect, None) for dialect in DIALECTS), *low):
        whole, distributed = pair(dialect, placement, FEW, F32, state_dtype=kept)
        for step in range(2):
            give(whole, distributed, step)
            distributed.step()
        for param in params_of(distributed):
            for value in (param, *distributed.state[param].values()):
                if isinstance(value, DTensor):
                    assert_same_copies(value)


def assert_same_copies(value: DTensor) -> None:
    part = local(value).contiguous()
    for axis, how in enumerate(value.placements):
        if how.is_replicate():
            others = [torch.empty_like(part) for _ in range(value.device_mesh.size(axis))]
            dist.all_gather(others, part, group=value.device_mesh.get_group(axis))
            assert all(same_bits(part, other) for other in others)


# --- random bits ---------------------------------------------------------------------------------


def turned(value: DTensor, last: int) -> DTensor:
    """The same numbers, with another dimension of the part contiguous."""
    part = value.to_local().movedim(last, -1).contiguous().movedim(-1, last)
    stride = value.stride()
    return DTensor.from_local(
        part, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=stride
    )


# Blocks of eight that lie in the whole as they do here, that begin elsewhere, that go down columns;
# parts that begin within a block.
RANDOM_SHAPES = [(64, 64), (32, 192), (16, 60), (13, 7), (4, 8, 32), (256,), (100,), (12, 3, 3)]


@pytest.mark.parametrize("placement", ["rows", "second", "third", "rows_twice", "rows_and_columns"])
@pytest.mark.parametrize("last", [-1, 0])
@pytest.mark.parametrize("rule", ["factored", "unfactored"])
@on_every_rank
def test_random_bits_follow_from_the_place_in_the_whole(
    rule: str, last: int, placement: str
) -> None:
    """A step in bfloat16 is a step in float32, rounded as a single process would round it."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(sizes)
    shapes = fitting(RANDOM_SHAPES, placements)
    dialect, options = (HF, {"scale_parameter": False})
    if rule == "unfactored":
        dialect, options = OPTAX, {"min_dim_size_to_factor": 2**20}
        options |= {"multiply_by_parameter_scale": False, "clipping_threshold": None}
    else:
        options |= {"clip_threshold": 1e30}
    start = stepping.make_params(shapes, BF16)
    low, twin = (
        [turned(p, last) for p in distribute([v.to(d) for v in start], mesh, placements)]
        for d in (BF16, F32)
    )
    for values, extras in ((low, {"rounding": "stochastic", "seed": 3}), (twin, {})):
        parts = [torch.nn.Parameter(value) for value in values]
        optimizer = dialect(parts, backend=BACKEND, **options, **extras)
        for p, g in zip(parts, stepping.grad_values([v.float() for v in start], 0), strict=True):
            p.grad_dtype = None
            p.grad = turned(distribute_tensor(g, mesh, placements), last)
        optimizer.step()
        values[:] = [p.detach() for p in parts]
    for number, (mine, exact) in enumerate(zip(low, twin, strict=True)):
        numbers = torch.arange(exact.numel()).reshape(exact.shape)
        places = distribute_tensor(numbers, mesh, placements).to_local().reshape(-1)
        whole = torch.zeros(exact.numel())
        whole[places] = local(exact).reshape(-1)
        wanted = round_stochastic(whole.view(exact.shape), BF16, RoundingKey(3, number, 1))
        assert places.numel() < 8 or (wanted.float().reshape(-1) != whole).any()
        part = wanted.reshape(-1)[places]
        assert same_bits(local(mine).reshape(-1), part), (number, tuple(exact.shape))


@pytest.mark.parametrize("placement", ["second", "third", "hsdp", "rows_twice"])
@on_every_rank
def test_second_moments_are_rounded_with_the_bits_of_a_single_process(placement: str) -> None:
    """bfloat16 ones, keyed by their place in the whole."""
    for dialect, options in (
        (HF, {}),
        *([] if placement != "third" else [(HF, {"max_grad_norm": 0.5})]),
        (OPTAX, {}),
        (OPTAX, {"min_dim_size_to_factor": 2**20}),
    ):
        whole, distributed = pair(
            dialect, placement, RANDOM_SHAPES, F64, state_dtype=BF16, **options
        )
        step_both(whole, distributed, 1)
        for p, q in zip(*map(params_of, (distributed, whole)), strict=True):
            for key, value in whole.state[q].items():
                mine = distributed.state[p][key]
                if isinstance(mine, DTensor):
                    assert mine.dtype is BF16
                    assert_close_part(mine, value, 0.0, f"{key} of {tuple(q.shape)}")
