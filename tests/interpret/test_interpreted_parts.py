"""Parts of distributed parameters, however they are split, against a single process' reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fused_adafactor import launching
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from fused_adafactor.spec import local_of
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, HF, KERAS, OPTAX, TORCH, Dialect
from tests.distributed.ranks import (
    assert_close_part,
    assert_close_parts,
    distribute,
    mesh_of,
    on_ranks,
)
from tests.distributed.test_native import laid_out
from tests.interpret.small import BACKEND, assert_same, results
from tests.kernels.biting import RULES
from tests.kernels.judged import BF16, F32, F64
from tests.stepping import params_of, same_bits

# Which mesh, and how each of its dimensions splits a parameter. As few ranks as there can be: each
# of them is interpreted.
PLACES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "both": ((2, 2), (Shard(0), Shard(1))),
    "stacked_rows": ((2, 2), (Shard(0), Shard(1))),
    "copied_rows": ((2, 2), (Replicate(), Shard(0))),
}
# Uneven parts, and one without elements: matrices, a vector, stacks of tiny ones and of others.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "rows": [(7, 11), (1, 6), (3,), (3, 3, 3), (3, 9, 8)],
    "columns": [(11, 7), (6, 1), (3, 9, 8)],
    "both": [(7, 13), (1, 6), (6, 1)],
    "stacked_rows": [(3, 9, 8), (1, 3, 3)],
    "copied_rows": [(7, 11), (3,)],
}
FORMS = (*LAUNCHES, LAUNCHES[0])


@pytest.fixture(autouse=True)
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads, and the interpreter replaces Triton's functions for all of them."""
    lock = threading.Lock()
    launch = launching.Executor._launch

    def alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            launch(*args, **kwargs)

    monkeypatch.setattr(launching.Executor, "_launch", alone)


def on_ranks_of(place: str, body: Callable[..., None], *args: Any) -> None:
    sizes, _ = PLACES[place]
    on_ranks(torch.Size(sizes).numel())(body)(place, *args)


def pair(
    dialect: Dialect, place: str, values: Sequence[Tensor], backend: str = BACKEND, **options: Any
) -> tuple[Any, Any]:
    """A single process' optimizer by the reference, and a distributed one."""
    sizes, placements = PLACES[place]
    parts = distribute(values, mesh_of(sizes), placements)
    whole = dialect(stepping.clone_params(values), backend="reference", **options)
    return whole, dialect([torch.nn.Parameter(p) for p in parts], backend=backend, **options)


def give(whole: Any, distributed: Any, grads: Sequence[Tensor]) -> None:
    for p, q, g in zip(params_of(whole), params_of(distributed), grads, strict=True):
        assert isinstance(q, DTensor)
        p.grad = g
        q.grad = distribute_tensor(g.clone(), q.device_mesh, q.placements)


def step_both(whole: Any, distributed: Any, steps: int, scale: float = 1.0) -> None:
    for step in range(steps):
        give(whole, distributed, stepping.grad_values(params_of(whole), step, scale))
        whole.step()
        distributed.step()


def assert_close_steps(distributed: Any, whole: Any) -> None:
    """Also of what clipping by RMS(u) may hide: a wrong norm of v."""
    assert_close_parts(distributed, whole, 1e-12)
    stepping.assert_close_metrics(distributed.metrics(), whole.metrics(), 1e-12)


def assert_alike(distributed: Any) -> None:
    """What several ranks have of parameters and state has the same bits on all of them."""
    for param in params_of(distributed):
        for value in (param, *distributed.state[param].values()):
            if not isinstance(value, DTensor):
                continue
            part = value.detach().to_local().contiguous()
            for axis, how in enumerate(value.placements):
                others = [torch.empty_like(part) for _ in range(value.device_mesh.size(axis))]
                if how.is_replicate():
                    dist.all_gather(others, part, group=value.device_mesh.get_group(axis))
                    assert all(same_bits(part, other) for other in others)


def rules_of(place: str) -> list[str]:
    """Those that differ most, where there are four ranks and Triton interprets each of them.

    Stacks that are reshaped are left to the reference.
    """
    stacks = all(len(shape) > 2 for shape in SHAPES[place])
    if BACKEND != "triton" or len(PLACES[place][0]) == 1:
        return [rule for rule, of in RULES.items() if not (stacks and of[0] is ADAFACTOR_PYTORCH)]
    return ["hf", "torch", "keras-everything", "optax-momentum"]


@pytest.mark.parametrize(
    ("place", "rule"), [(place, rule) for place in PLACES for rule in rules_of(place)], ids=str
)
def test_every_rule_is_that_of_a_single_process(
    place: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = list(RULES).index(rule) + list(PLACES).index(place)
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, FORMS[number % len(FORMS)])
    on_ranks_of(place, follow, rule)


def follow(place: str, rule: str) -> None:
    dialect, options = RULES[rule]
    shapes = SHAPES[place]
    if dialect is ADAFACTOR_PYTORCH:  # what it reshapes is left to the reference
        shapes = [s for s in shapes if len(s) < 3]
    eps = {"eps": (1e-1, 1e-3)} if dialect is TORCH else {}
    values = stepping.make_params(shapes, F64)
    whole, distributed = pair(dialect, place, values, **options, **eps)
    step_both(whole, distributed, 2)
    assert_close_steps(distributed, whole)
    assert_alike(distributed)


# Of several slabs, of several parts and chunks, and stacks; at sizes at which none is one ticket.
LARGER: dict[str, list[tuple[int, ...]]] = {
    "rows": [(41, 70), (3, 530), (4, 12, 20), (40, 3, 3), (700,)],
    "columns": [(21, 70), (5, 600), (2, 12, 40)],
    "both": [(24, 140)],
}


@pytest.mark.parametrize("dialect", [HF, TORCH], ids=str)
@pytest.mark.parametrize("place", LARGER)
def test_parts_of_many_pieces(
    place: str, dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[tuple[str, int], Any] = {}
    for form in LAUNCHES if place != "both" else LAUNCHES[:1]:
        monkeypatch.setenv(LAUNCH_ENVIRONMENT, form)
        on_ranks_of(place, follow_larger, dialect, form, found)
    for (form, rank), mine in found.items():
        assert_same(mine, found[LAUNCHES[0], rank])
        assert form in LAUNCHES


def follow_larger(place: str, dialect: Dialect, form: str, found: dict[Any, Any]) -> None:
    """In each form of launch, with the same bits."""
    values = stepping.make_params(LARGER[place], F64)
    eps = {"eps": (1e-1, 1e-3)} if dialect is TORCH else {}
    whole, distributed = pair(dialect, place, values, **eps)
    step_both(whole, distributed, 1)
    assert_close_steps(distributed, whole)
    assert_alike(distributed)
    found[form, dist.get_rank()] = [
        {key: local_of(value) for key, value in entries.items()} for entries in results(distributed)
    ]


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_the_clamp_bites_where_it_does(place: str) -> None:
    on_ranks_of(place, follow_the_clamp)


def follow_the_clamp(place: str) -> None:
    """torch's floor of v is above all elements of some rows, of all, or of none."""
    for scales in ([1.0], [1e-6], [1.0, 1e-9, 1e-2], [1.0, 0.0]):
        rows = torch.tensor(scales * 6, dtype=F64)[:6].unsqueeze(-1)
        values = stepping.make_params([(6, 17), (6, 3)], F64)
        whole, distributed = pair(TORCH, place, values, eps=(1e-3, 1e-3))
        for step in range(2):
            give(whole, distributed, [g * rows for g in stepping.grad_values(values, step)])
            whole.step()
            distributed.step()
        assert_close_steps(distributed, whole)


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_float32_agrees_over_many_steps(place: str) -> None:
    on_ranks_of(place, follow_in_float32)


def follow_in_float32(place: str) -> None:
    """Rows and columns of zeros, at first, have a third sweep look where Σ u² may be lost."""
    for dialect in (HF, TORCH):
        values = stepping.make_params([(9, 11), (2, 9, 8)], F32)
        whole, distributed = pair(dialect, place, values)
        for step in range(5):
            grads = stepping.grad_values(values, step)
            for g in grads if step < 2 else []:
                g[..., ::3, :] = g[..., ::2] = 0.0
            give(whole, distributed, grads)
            whole.step()
            distributed.step()
        assert_close_parts(distributed, whole, 3e-6)


# --- layouts, and other ranks --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_parts_lie_anyhow(place: str) -> None:
    on_ranks_of(place, follow_layouts)


def follow_layouts(place: str) -> None:
    """On each rank in another way: the lines of one are columns, those of the other rows."""
    sizes, placements = PLACES[place]
    values = stepping.make_params([(9, 14), (5, 9, 8)], F64)
    for dialect in (HF, TORCH, OPTAX):
        eps = {"eps": (1e-1, 1e-3)} if dialect is TORCH else {}
        whole = dialect(stepping.clone_params(values), backend="reference", **eps)
        parts = [
            torch.nn.Parameter(laid_out(p, dist.get_rank() % p.dim()))
            for p in distribute(values, mesh_of(sizes), placements)
        ]
        distributed = dialect(parts, backend=BACKEND, **eps)
        for step in range(2):
            give(whole, distributed, stepping.grad_values(values, step))
            for p in parts:
                assert p.grad is not None
                p.grad = laid_out(p.grad, (step + dist.get_rank()) % p.dim())
            whole.step()
            distributed.step()
        assert_close_steps(distributed, whole)


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_a_rank_may_step_by_another_backend(place: str) -> None:
    on_ranks_of(place, follow_with_others)


def follow_with_others(place: str) -> None:
    """Messages follow from the plan alone."""
    backend = (BACKEND, "reference")[dist.get_rank()]
    for dialect, extras in ((HF, {}), (TORCH, {"max_grad_norm": 0.5})):
        values = stepping.make_params(SHAPES[place], F64)
        whole, distributed = pair(dialect, place, values, backend, **extras)
        step_both(whole, distributed, 2)
        assert_close_steps(distributed, whole)


# --- random bits ---------------------------------------------------------------------------------

# Parts that begin anywhere in a block of eight elements, those that begin with one, and stacks.
ROUNDED = [(7, 11), (4, 16), (2, 16, 16), (5, 3, 3), (3, 5, 9, 8)]


@pytest.mark.parametrize("place", ["rows", "columns", "stacked_rows"])
def test_random_bits_are_those_of_a_single_process(place: str) -> None:
    on_ranks_of(place, follow_random_bits)


def follow_random_bits(place: str) -> None:
    """Of parameters, which only decay, as their gradients are zeros; and of second moments."""
    vectors = [(21,), (64,)] if place == "rows" else []
    options: dict[str, Any] = {"scale_parameter": False, "weight_decay": 0.1, "seed": 5}
    values = stepping.make_params([*ROUNDED, *vectors], BF16)
    whole, distributed = pair(HF, place, values, rounding="stochastic", **options)
    give(whole, distributed, [torch.zeros_like(p) for p in values])
    whole.step()
    distributed.step()
    for p, q, start in zip(params_of(distributed), params_of(whole), values, strict=True):
        assert isinstance(p, DTensor)
        assert not torch.equal(q, start)
        assert_close_part(p, q, 0.0, f"parameter of shape {tuple(q.shape)}")
    values = stepping.make_params([*ROUNDED, *vectors], F64)
    if place in ("both", "stacked_rows"):  # rows and columns of what has two dimensions
        refuse_rounded_rows(place, values, {})
        return
    if place == "rows":
        refuse_rounded_rows(place, values, {"max_grad_norm": 0.5})
    whole, distributed = pair(HF, place, values, state_dtype=BF16, seed=5)
    step_both(whole, distributed, 1)
    for p, q in zip(params_of(distributed), params_of(whole), strict=True):
        for key, value in whole.state[q].items():
            mine = distributed.state[p][key]
            if isinstance(mine, DTensor):
                assert mine.dtype is BF16
                assert_close_part(mine, value, 0.0, f"{key} of shape {tuple(q.shape)}")
    assert_alike(distributed)


def refuse_rounded_rows(place: str, values: Sequence[Tensor], options: dict[str, Any]) -> None:
    """Each process would have to round those of all others too."""
    whole, distributed = pair(HF, place, values, state_dtype=BF16, seed=5, **options)
    give(whole, distributed, stepping.grad_values(values, 0))
    reason = f"{BACKEND} backend does not step .* rounded second moments of all rows"
    with pytest.raises(RuntimeError, match=reason):
        distributed.step()


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_moments_of_8_bits_keep_the_blocks_of_a_single_process(place: str) -> None:
    on_ranks_of(place, follow_blocks)


def follow_blocks(place: str) -> None:
    """No part cuts a block of 32: rows are whole, or are cut at a multiple of it."""
    shapes = [(7, 64), (3, 80)] if place == "rows" else [(7, 128), (3, 5, 64)]
    values = stepping.make_params(shapes, F64)
    whole, distributed = pair(HF, place, values, beta1=0.9, momentum_dtype=torch.int8)
    step_both(whole, distributed, 2)
    assert_close_parts(distributed, whole, 1e-12)


# --- between the phases, and around them ---------------------------------------------------------


@pytest.mark.parametrize("place", ["rows", "columns"])
def test_norms_and_what_is_skipped_are_those_of_all_ranks(place: str) -> None:
    on_ranks_of(place, follow_norms)


def follow_norms(place: str) -> None:
    """The NaN is in the part of one rank; the others skip that tensor with it."""
    for extras in ({"max_grad_norm": 0.5}, {"nonfinite": "skip"}, {"capturable": True}):
        values = stepping.make_params([(7, 5), (3, 9, 8)], F64)
        whole, distributed = pair(HF, place, values, beta1=0.9, **extras)
        step_both(whole, distributed, 2)
        assert_close_steps(distributed, whole)
        if "nonfinite" in extras:
            before = params_of(whole)[0].detach().clone()
            grads = stepping.grad_values(values, 2)
            grads[0][0, 0] = torch.nan
            give(whole, distributed, grads)
            whole.step()
            distributed.step()
            assert torch.equal(before, params_of(whole)[0])
            assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("extras", [{"gradient_accumulation_steps": 2}, {"use_ema": True}], ids=str)
def test_gradients_that_only_some_ranks_have(extras: dict[str, Any]) -> None:
    """One on the second rank only, which may have no elements of it; one on neither."""
    on_ranks_of("rows", follow_absent, extras)


def follow_absent(place: str, extras: dict[str, Any]) -> None:
    values = stepping.make_params([(7, 5), (1, 6), (4, 3)], F64)
    whole, distributed = pair(KERAS, place, values, ema_momentum=0.5, **extras)
    for step in range(4):
        grads = stepping.grad_values(values, step)
        give(whole, distributed, grads)
        missing = step % 3
        params_of(whole)[missing].grad = params_of(distributed)[missing].grad = None
        if step != 1:
            index = (missing + 1) % 3
            grads[index][: -(-len(grads[index]) // 2)] = 0.0  # as the first rank has it
            params_of(whole)[index].grad = grads[index]
            if dist.get_rank() == 0:
                params_of(distributed)[index].grad = None
        whole.step()
        distributed.step()
    assert_close_parts(distributed, whole, 1e-12)
