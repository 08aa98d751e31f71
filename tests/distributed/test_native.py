"""What is asked of native code besides: parts of any layout and size, copies with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fused_adafactor import backends
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, BIG_VISION, DIALECTS, HF, KERAS, OPTAX, TORCH, Dialect
from tests.distributed.ranks import (
    PLACEMENTS,
    assert_close_parts,
    distribute,
    fitting,
    mesh_of,
    on_every_rank,
    on_ranks,
)

pytestmark = pytest.mark.skipif(
    backends.availability()["cpp"] is not None, reason="needs the C++ backend"
)


def eps_of(dialect: Dialect) -> dict[str, Any]:
    """torch's floor of v at values that it can bite at."""
    return {"eps": (1e-6, 1e-3)} if dialect is TORCH else {}


def pair(
    dialect: Dialect, values: list[Tensor], placement: str, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """A single process' optimizer by the reference, a distributed one by C++, and its mesh."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(sizes)
    whole = dialect(values, **eps_of(dialect), **{**kwargs, "backend": "reference"})
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, placements)]
    return whole, dialect(parts, **eps_of(dialect), **{"backend": "cpp", **kwargs}), mesh


def give(whole: Any, distributed: Any, step: int, rows: Tensor | None = None) -> None:
    """Gradients; times ``rows``, which the first dimension is scaled by."""
    values, parts = stepping.params_of(whole), stepping.params_of(distributed)
    for p, q, g in zip(values, parts, stepping.grad_values(values, step), strict=True):
        p.grad = g if rows is None else g * rows[: len(g)].view(-1, *[1] * (g.dim() - 1))
        q.grad = distribute_tensor(p.grad.clone(), q.device_mesh, q.placements)


@on_every_rank
def test_it_is_what_auto_chooses() -> None:
    params = stepping.make_params([(4, 4)])
    for placements in ([Shard(0)], [Replicate()]):
        parts = [torch.nn.Parameter(p) for p in distribute(params, mesh_of((4,)), placements)]
        optimizer: Any = HF(parts)
        parts[0].grad = torch.ones_like(parts[0])
        assert " cpp " in optimizer.explain()


@pytest.mark.parametrize("placement", ["rows", "second", "rows_and_columns", "hsdp"])
@on_every_rank
def test_parts_of_several_slabs(placement: str) -> None:
    """Their sums are merged before they are sent; also a stack that is split by its first."""
    shapes = [(1100, 520), *([(4, 300, 520)] if placement == "rows" else [])]
    for dialect in (HF, TORCH):
        values = stepping.make_params(shapes, torch.float64)
        whole, distributed, _ = pair(dialect, values, placement)
        for step in range(2):
            give(whole, distributed, step)
            whole.step()
            distributed.step()
        assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("placement", ["rows", "rows_and_columns"])
@on_every_rank
def test_rounded_moments_of_many_rows(placement: str) -> None:
    """More than are rounded in one go, and fewer on the last process."""
    extras = {"state_dtype": torch.bfloat16, "max_grad_norm": 0.5}
    for dialect in (HF, TORCH):
        values = stepping.make_params([(2101, 9)], torch.float64)
        whole, distributed, _ = pair(dialect, values, placement, **extras)
        for step in range(3):
            give(whole, distributed, step)
            whole.step()
            distributed.step()
        assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("placement", ["rows", "second", "rows_and_columns"])
@on_every_rank
def test_the_clamp_bites_where_it_does(placement: str) -> None:
    """torch's floor of v is above all elements of some rows, of all, or of none."""
    scales = [[1.0], [1e-6], [1.0, 1e-3], [1.0, 1e-9, 1e-2], [1.0, 0.0]]
    for scale in scales:
        rows = torch.tensor(scale * 13, dtype=torch.float64)[:13]
        values = stepping.make_params([(13, 17), (3, 13), (8, 5, 6)], torch.float64)
        sizes, placements = PLACEMENTS[placement]
        mesh = mesh_of(sizes)
        parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, placements)]
        whole = TORCH(values, backend="reference", eps=(1e-3, 1e-3))
        distributed = TORCH(parts, backend="cpp", eps=(1e-3, 1e-3))
        for step in range(3):
            give(whole, distributed, step, rows)
            whole.step()
            distributed.step()
        assert_close_parts(distributed, whole, 1e-12)


def laid_out(value: DTensor, last: int, says: int = -1) -> DTensor:
    """The same numbers, with another dimension of the part contiguous.

    All processes have to agree on what it ``says`` of the whole.
    """
    part = value.to_local().movedim(last, -1).contiguous().movedim(-1, last)
    whole = torch.empty(value.shape, device="meta").movedim(says, -1).contiguous()
    return DTensor.from_local(
        part,
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=whole.movedim(-1, says).stride(),
    )


@pytest.mark.parametrize("dialect", [TORCH, HF, OPTAX, BIG_VISION], ids=str)
@on_every_rank
def test_parts_lie_anyhow(dialect: Dialect) -> None:
    """On each process in another way, and gradients in yet another one from step to step.

    Lines are columns where the whole says so, however a part lies.
    """
    rank = dist.get_rank()
    for placement in ("rows", "second", "rows_and_columns"):
        sizes, placements = PLACEMENTS[placement]
        mesh = mesh_of(sizes)
        values = stepping.make_params([(21, 14), (14, 21), (5, 9, 8)], torch.float64)
        whole = dialect(values, backend="reference", **eps_of(dialect))
        parts = [
            torch.nn.Parameter(laid_out(p, (number + rank) % p.dim(), number % p.dim()))
            for number, p in enumerate(distribute(values, mesh, placements))
        ]
        distributed = dialect(parts, backend="cpp", **eps_of(dialect))
        for step in range(4):
            give(whole, distributed, step)
            for p in parts:
                p.grad = laid_out(p.grad, (step // 2 + rank) % p.dim())
            whole.step()
            distributed.step()
        assert_close_parts(distributed, whole, 1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
@on_every_rank
def test_copies_have_the_same_bits(placement: str) -> None:
    """Of parameters, and of second moments that processes share, also those with empty parts."""
    shapes = [(3, 70), (70, 3), (1, 5), (6, 9, 5), (7,)]
    for dialect in DIALECTS:
        shapes_here = fitting(shapes, PLACEMENTS[placement][1])
        # It steps no parts of what is reshaped; auto has the reference do it.
        asked = "auto" if dialect is ADAFACTOR_PYTORCH else "cpp"
        values = stepping.make_params(shapes_here)
        whole, distributed, mesh = pair(dialect, values, placement, nonfinite="skip", backend=asked)
        for step in range(3):
            give(whole, distributed, step)
            distributed.step()
        for param in stepping.params_of(distributed):
            for value in (param, *distributed.state[param].values()):
                if not isinstance(value, DTensor):
                    continue
                part = value.detach().to_local().contiguous()
                for axis, how in enumerate(value.placements):
                    others = [torch.empty_like(part) for _ in range(mesh.size(axis))]
                    if how.is_replicate():
                        dist.all_gather(others, part, group=mesh.get_group(axis))
                        assert all(stepping.same_bits(part, other) for other in others)


@on_every_rank
def test_messages_are_in_the_same_order_whatever_steps_a_rank() -> None:
    """C++ steps only the last of these; ranks without it must not start another message first."""
    mesh = mesh_of((2, 2))
    values = stepping.make_params([(4, 4, 3, 3), (4, 4, 3, 3), (8, 6)])
    ways = ((Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(0), Shard(0)))
    orders = []
    for backend in ("auto", "reference"):
        parts = [
            torch.nn.Parameter(*distribute([value], mesh, way))
            for value, way in zip(values, ways, strict=True)
        ]
        optimizer: Any = ADAFACTOR_PYTORCH(parts, backend=backend)
        for p in parts:
            p.grad = torch.ones_like(p)
        optimizer.step()
        (course,) = optimizer._known.prepared.courses.values()
        orders.append([m.over for batch in course.batches for m in batch.messages[0]])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == [(0, 1), (1,)]


@on_ranks(2)
def test_others_are_at_work_while_a_message_is_under_way() -> None:
    """Plain parameters are read, where a common norm keeps them from being stepped at once."""
    mesh = mesh_of((2,))
    values = stepping.make_params([(6, 5), (4, 3)])
    parts = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(0)])]
    (plain,) = stepping.make_params([(3, 3)])
    optimizer: Any = HF([plain, *parts], max_grad_norm=1.0)
    for p in (plain, *parts):
        p.grad = torch.ones_like(p)
    optimizer.step()
    said: list[str] = []
    (course,) = optimizer._known.prepared.courses.values()
    for batch in course.batches:
        watch(batch, "split" if batch.messages else "plain", said)
    start = optimizer._engine._processes.start

    def watched(message: Any) -> Any:
        said.append("sent")
        wait = start(message)
        return lambda: (said.append("waited"), wait())

    optimizer._engine._processes.start = watched
    optimizer.step()
    stats, finalize, apply = "stats", "finalize+update_rms", "apply"
    assert said == [
        *(f"split {stats}", "sent", f"plain {stats}", "waited"),
        *(f"split {finalize}", "sent", "waited"),
        *(f"split {apply}", f"plain {finalize}+{apply}"),
    ]


@on_ranks(2)
def test_an_error_waits_for_what_is_under_way() -> None:
    """The next step sums up in the same memory."""
    mesh = mesh_of((2,))
    values = stepping.make_params([(6, 5), (3, 3)])
    (part,) = (torch.nn.Parameter(p) for p in distribute(values[:1], mesh, [Shard(0)]))
    plain = values[1]
    optimizer: Any = HF([part, plain], max_grad_norm=1.0, backend="cpp")
    for p in (plain, part):
        p.grad = torch.ones_like(p)
    optimizer.step()
    (course,) = optimizer._known.prepared.courses.values()
    (batch,) = (batch for batch in course.batches if not batch.messages)
    said: list[str] = []
    start, run = optimizer._engine._processes.start, batch.executor.run

    def watched(message: Any) -> Any:
        said.append("sent")
        wait = start(message)
        return lambda: (said.append("waited"), wait())

    def fails(phases: Any, exchange: Any) -> None:
        raise RuntimeError("out of memory")

    optimizer._engine._processes.start, batch.executor.run = watched, fails
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert said == ["sent", "waited"]
    batch.executor.run = run
    optimizer.step()


@on_ranks(2)
def test_a_gradient_that_was_freed_is_refused_before_anything_is_sent() -> None:
    mesh = mesh_of((2,))
    values = stepping.make_params([(6, 5), (3, 3)])
    (part,) = (torch.nn.Parameter(p) for p in distribute(values[:1], mesh, [Shard(0)]))
    optimizer: Any = HF([part, values[1]], max_grad_norm=1.0)
    for p in (values[1], part):
        p.grad = torch.ones_like(p)
    optimizer.step()
    grad = values[1].grad
    assert grad is not None
    grad.untyped_storage().resize_(0)
    optimizer._engine._processes.start = lambda message: pytest.fail("sent")
    with pytest.raises(RuntimeError, match=r"gradient of parameter #1.*storage was freed"):
        optimizer.step()


def watch(batch: Any, name: str, said: list[str]) -> None:
    run = batch.executor.run

    def watched(phases: Any, exchange: Any) -> None:
        said.append(f"{name} {'+'.join(phase.value for phase in phases)}")
        run(phases, exchange)

    batch.executor.run = watched


@pytest.mark.parametrize("dialect", [HF, KERAS], ids=str)
@on_ranks(2)
def test_a_gradient_that_is_still_coming_is_waited_for(dialect: Dialect) -> None:
    """As tensor parallelism leaves it: a tensor without memory of its own."""
    (value,) = stepping.make_params([(6, 4)], torch.float64)
    whole, distributed, mesh = pair_of_rows(dialect, value)
    (param,) = stepping.params_of(distributed)
    give(whole, distributed, 0)
    grad: Any = param.grad
    part = AsyncCollectiveTensor(grad.to_local())
    param.grad = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    whole.step()
    distributed.step()
    assert_close_parts(distributed, whole, 1e-12)


def pair_of_rows(dialect: Dialect, value: Tensor) -> tuple[Any, Any, Any]:
    mesh = mesh_of((2,))
    parts = [torch.nn.Parameter(p) for p in distribute([value], mesh, [Shard(0)])]
    return dialect([value], backend="reference"), dialect(parts, backend="cpp"), mesh


@on_every_rank
def test_copies_are_read_for_their_rms() -> None:
    """Torch counts what is written to a DTensor, not to what is here of it."""
    values = stepping.make_params([(700, 300)])
    whole, distributed, _ = pair(TORCH, values, "replicated", param_rms="expected")
    (param,) = stepping.params_of(distributed)
    for step in range(6):
        give(whole, distributed, step)
        if step == 5:
            with torch.no_grad():
                for p in (*values, param):
                    p.mul_(1e-3)
        whole.step()
        distributed.step()  # a step that is corrected warns, which is an error here
    assert_close_parts(distributed, whole, 1e-5)
