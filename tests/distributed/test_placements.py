"""Distributed parameters, however they are split, against a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_adafactor import sharding
from tests import stepping
from tests.dialects import (
    ADAFACTOR_PYTORCH,
    BIG_VISION,
    DIALECTS,
    HF,
    KERAS,
    KERAS_EXTRAS,
    OPTAX,
    TORCH,
    Dialect,
)
from tests.distributed.ranks import (
    PLACEMENTS,
    assert_close_part,
    assert_close_parts,
    distribute,
    fitting,
    mesh_of,
    on_every_rank,
)

# Uneven parts, empty ones, stacks, a vector and a matrix that fewer processes have rows of.
SHAPES = [(13, 7), (5,), (4, 6, 5), (3,), (2, 9), (6, 3, 3, 2), (1, 4)]
EVERY_PLACEMENT = pytest.mark.parametrize("placement", PLACEMENTS)


def pair(
    dialect: Dialect, placement: str, dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """A single process' optimizer, a distributed one, and what gives both their gradients."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(sizes)
    shapes = fitting(SHAPES, placements)
    params = stepping.make_params(shapes, dtype)
    if dialect is TORCH:
        kwargs.setdefault("eps", (1e-6, 1e-3))
    whole = dialect(params, **{**kwargs, "backend": "reference"})
    parts = [torch.nn.Parameter(p) for p in distribute(params, mesh, placements)]
    distributed = dialect(parts, **kwargs)

    def give(step: int, scale: float = 1.0) -> None:
        grads = stepping.grad_values(params, step, scale)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        for p, g in zip(parts, distribute(grads, mesh, placements), strict=True):
            p.grad = g

    return whole, distributed, give


def step_both(whole: Any, distributed: Any, give: Any, steps: int = 4) -> None:
    for step in range(steps):
        give(step)
        whole.step()
        distributed.step()


@EVERY_PLACEMENT
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@on_every_rank
def test_every_variant_is_that_of_a_single_process(dialect: Dialect, placement: str) -> None:
    for variant in dialect.variants.values():
        whole, distributed, give = pair(dialect, placement, torch.float64, **variant)
        step_both(whole, distributed, give)
        assert_close_parts(distributed, whole, 1e-12)


@EVERY_PLACEMENT
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@on_every_rank
def test_float32_agrees_over_many_steps(backend: str, placement: str) -> None:
    for dialect in DIALECTS:
        # C++ steps no parts of what is reshaped; auto has it step the rest.
        asked = "auto" if dialect is ADAFACTOR_PYTORCH and backend == "cpp" else backend
        whole, distributed, give = pair(dialect, placement, torch.float32, backend=asked)
        step_both(whole, distributed, give, steps=8)
        assert_close_parts(distributed, whole, 3e-6)


@EVERY_PLACEMENT
@pytest.mark.parametrize(
    "extras",
    [
        *({"max_grad_norm": norm} for norm in (0.5, 1e6)),
        {"nonfinite": "skip"},
        {"capturable": True},
        *KERAS_EXTRAS.values(),
    ],
    ids=str,
)
@on_every_rank
def test_extras_are_those_of_a_single_process(placement: str, extras: dict[str, Any]) -> None:
    for dialect in (HF, KERAS, ADAFACTOR_PYTORCH):
        whole, distributed, give = pair(dialect, placement, torch.float64, **extras)
        step_both(whole, distributed, give)
        assert_close_parts(distributed, whole, 1e-12)
        stepping.assert_close_metrics(distributed.metrics(), whole.metrics(), 1e-12)
        if whole.grad_norm is not None:
            torch.testing.assert_close(distributed.grad_norm, whole.grad_norm, rtol=1e-12, atol=0)


@EVERY_PLACEMENT
@on_every_rank
def test_a_gradient_that_is_not_finite_is_skipped_by_all(placement: str) -> None:
    """The NaN is in the part of one process; all skip that tensor, and the others step."""
    whole, distributed, give = pair(HF, placement, torch.float64, nonfinite="skip")
    step_both(whole, distributed, give, steps=2)
    give(2)
    first, part = (stepping.params_of(optimizer)[0] for optimizer in (whole, distributed))
    first.grad.view(-1)[0] = torch.nan
    part.grad = distribute_tensor(first.grad.clone(), part.device_mesh, part.placements)
    before = first.detach().clone()
    whole.step()
    distributed.step()
    assert torch.equal(first, before)
    assert_close_parts(distributed, whole, 1e-12)


@EVERY_PLACEMENT
@on_every_rank
def test_stochastic_rounding_has_the_bits_of_a_single_process(placement: str) -> None:
    """Keyed by the element's place in the whole; the update is computed alike, near enough."""
    whole, distributed, give = pair(HF, placement, torch.bfloat16, rounding="stochastic", seed=3)
    give(0)
    whole.step()
    distributed.step()
    for p, q in zip(*map(stepping.params_of, (distributed, whole)), strict=True):
        wanted = distribute_tensor(q.detach(), p.device_mesh, p.placements).to_local()
        different = (p.detach().to_local() != wanted).sum()
        assert different <= 0.02 * q.numel(), tuple(q.shape)


@EVERY_PLACEMENT
@on_every_rank
def test_second_moments_are_rounded_with_the_bits_of_a_single_process(placement: str) -> None:
    """bfloat16 ones, keyed by their place in the whole."""
    for dialect in (HF, OPTAX, ADAFACTOR_PYTORCH):
        whole, distributed, give = pair(
            dialect, placement, torch.float64, state_dtype=torch.bfloat16
        )
        give(0)
        whole.step()
        distributed.step()
        for p, q in zip(*map(stepping.params_of, (distributed, whole)), strict=True):
            for key, value in whole.state[q].items():
                mine = distributed.state[p][key]
                if isinstance(mine, DTensor) and key != "exp_avg":
                    assert mine.dtype is torch.bfloat16
                    assert_close_part(mine, value, 0.0, key)


@EVERY_PLACEMENT
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@on_every_rank
def test_the_norm_is_that_of_rounded_moments(backend: str, placement: str) -> None:
    """Also where rows are only known once sums are: split ones, or clipped by a common norm."""
    rounded, clipped = ({}, torch.bfloat16), ({"max_grad_norm": 0.5}, torch.bfloat16)
    others = (({}, torch.float32), ({"clipnorm": 0.5}, torch.bfloat16))
    for dialect, cases in (
        (HF, (rounded, clipped, *others)),
        (TORCH, (rounded, clipped)),
        (OPTAX, (rounded, clipped)),
    ):
        for extras, state_dtype in cases:
            whole, distributed, give = pair(
                dialect,
                placement,
                torch.float64,
                state_dtype=state_dtype,
                backend=backend,
                **extras,
            )
            step_both(whole, distributed, give, steps=2)
            assert_close_parts(distributed, whole, 1e-12)


@on_every_rank
def test_rounded_moments_of_all_rows_are_in_the_same_messages() -> None:
    """One message for rows under a common norm, besides that for Σu²; four where both are split."""
    for placement, most in (("rows", 2), ("rows_and_columns", 4)):
        for state_dtype in (None, torch.bfloat16):
            _, distributed, give = pair(
                HF, placement, torch.float32, state_dtype=state_dtype, max_grad_norm=0.5
            )
            give(0)
            with counted() as calls:
                distributed.step()
            assert len(calls) == most


# --- how many messages ---------------------------------------------------------------------------

# A vector is split where its only dimension is, a stack of matrices at its first.
MOST = {"replicated": 0, "second": 2, "columns_of_some": 2, "one_process_a_row": 2}
MOST |= {"third": 2, "rows_and_columns": 4, "columns_and_rows": 4}


@EVERY_PLACEMENT
@on_every_rank
def test_messages_do_not_grow_with_the_number_of_parameters(placement: str) -> None:
    """One all-reduce where rows are split, two for columns, four for both, none for copies."""
    for dialect in (HF, KERAS, ADAFACTOR_PYTORCH, OPTAX, BIG_VISION):
        _, distributed, give = pair(dialect, placement, torch.float32)
        for step in range(2):
            give(step)
            with counted() as calls:
                distributed.step()
        # To optax and big_vision the largest dimension is that of columns.
        one = 2 if dialect in (OPTAX, BIG_VISION) else 1
        assert len(calls) <= MOST.get(placement, one), dialect


@pytest.mark.parametrize(
    ("dialect", "variant"), [(TORCH, "defaults"), (ADAFACTOR_PYTORCH, "amsgrad")], ids=str
)
@on_every_rank
def test_what_acts_on_elements_needs_one_message_more(dialect: Dialect, variant: str) -> None:
    _, distributed, give = pair(dialect, "rows", torch.float32, **dialect.variants[variant])
    give(0)
    with counted() as calls:
        distributed.step()
    assert len(calls) == 2


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many numbers each all-reduce of this thread takes."""
    calls: list[int] = []
    original, rank = sharding._all_reduce, torch.distributed.get_rank()

    def count(flat: torch.Tensor, group: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            calls.append(flat.numel())
        return original(flat, group)

    with mock.patch.object(sharding, "_all_reduce", count):
        yield calls


# --- what is refused -----------------------------------------------------------------------------


@on_every_rank
def test_sums_that_are_still_to_be_taken_are_refused() -> None:
    mesh = mesh_of((4,))
    partial = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    optimizer = HF([torch.nn.Parameter(partial)])
    param = stepping.params_of(optimizer)[0]
    param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    with pytest.raises(TypeError, match="redistribute it"):
        optimizer.step()


@on_every_rank
def test_a_gradient_that_is_distributed_in_another_way_is_refused() -> None:
    mesh = mesh_of((4,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = HF([param])
    param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    with pytest.raises(TypeError, match="placements"):
        optimizer.step()
    assert not optimizer.state


@on_every_rank
def test_a_gradient_on_another_mesh_is_refused() -> None:
    """The same placements, of other processes: also in a step that was prepared with the same."""
    mesh, turned = mesh_of((4,)), DeviceMesh("cpu", [3, 2, 1, 0])
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = HF([param])
    grad = distribute_tensor(torch.ones(4, 4), turned, [Shard(0)])
    for _ in range(2):
        before = param.detach().to_local().clone()
        param.grad = grad
        with pytest.raises(TypeError, match=r"gradient of parameter #0.*mesh"):
            optimizer.step()
        assert torch.equal(param.to_local(), before)
        param.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        optimizer.step()
    # What only calls them otherwise has the same processes.
    named = DeviceMesh("cpu", [0, 1, 2, 3], mesh_dim_names=("other",))
    param.grad = distribute_tensor(torch.ones(4, 4), named, [Shard(0)])
    optimizer.step()


@on_every_rank
def test_a_whole_moment_of_8_bits_loads_as_numbers() -> None:
    """From one process to several, which have no blocks of 8 bits: as what these stand for."""
    params = stepping.make_params([(13, 7), (5,)])
    whole = HF(params, beta1=0.9, momentum_dtype=torch.int8)
    stepping.take_steps(whole, 2)
    saved = whole.state_dict()
    mesh = mesh_of((4,))
    parts = [torch.nn.Parameter(p) for p in distribute(params, mesh, [Shard(0)])]
    refused = HF(parts, beta1=0.9)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        refused.load_state_dict(saved)
    for group in saved["param_groups"]:
        group["momentum_dtype"] = None
    distributed = HF(parts, beta1=0.9)
    distributed.load_state_dict(saved)
    single = HF(stepping.clone_params(params), beta1=0.9)
    single.load_state_dict(saved)
    for p, q in zip(parts, stepping.params_of(single), strict=True):
        assert_close_part(distributed.state[p]["exp_avg"], single.state[q]["exp_avg"], 0.0, "m")
