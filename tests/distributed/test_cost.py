"""What a step sends, counted, against the formula and the table of docs/distributed.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from tests import stepping
from tests.dialects import HF, TORCH, Dialect
from tests.distributed.ranks import distribute, mesh_of, on_every_rank, on_ranks
from tests.distributed.test_placements import counted

DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"

MATRICES = [(1000, 64), (192, 64), (64, 64), (256, 64), (64, 256)]
VECTORS = [(64,), (64,), (192,), (64,), (64,), (64,), (256,), (64,)]
LLAMA_BLOCK = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008), (4096,), (4096,)]
LLAMA_7B = [(32000, 4096), *LLAMA_BLOCK * 32, (4096,), (32000, 4096)]


def numbers(shapes: Sequence[tuple[int, ...]], dim: int, eps1_clamps: bool) -> list[int]:
    """How many numbers each message of a step has, by the formula of the document.

    Args:
        shapes: Of vectors and matrices.
        dim: Which of their dimensions is split.
        eps1_clamps: The torch dialect's rule, by which Σu² needs a sweep of its own.
    """
    first = second = 0
    for shape in shapes:
        if len(shape) == 1:
            first += 4
        elif dim == 1:
            first += shape[0] + 3
            second += 1
        elif eps1_clamps:
            first += shape[1] + 4
            second += 1
        else:
            first += 2 * shape[1] + 4
    return [first, second] if second else [first]


def counted_numbers(dialect: Dialect, shapes: Sequence[tuple[int, ...]], dim: int) -> list[int]:
    values = stepping.make_params(shapes)
    mesh = mesh_of((dist.get_world_size(),))
    params = [torch.nn.Parameter(p) for p in distribute(values, mesh, [Shard(dim)])]
    optimizer = dialect(params)
    for step in range(2):
        grads = stepping.grad_values(values, step)
        for p, g in zip(params, distribute(grads, mesh, [Shard(dim)]), strict=True):
            p.grad = g
        with counted() as calls:
            optimizer.step()
    return calls


@pytest.mark.parametrize("dialect", [HF, TORCH], ids=str)
@on_every_rank
def test_the_formula_is_what_is_sent(dialect: Dialect) -> None:
    for dim, shapes in ((0, MATRICES + VECTORS), (1, MATRICES), (0, VECTORS)):
        wanted = numbers(shapes, dim, dialect is TORCH)
        assert counted_numbers(dialect, shapes, dim) == wanted


def table() -> list[str]:
    """The rows of the document's table, from what is counted."""
    rows: dict[tuple[int, str], str] = {}
    for world in (2, 4, 8):

        def count(world: int = world) -> None:
            for dialect in (HF, TORCH):
                calls = counted_numbers(dialect, MATRICES + VECTORS, 0)
                sent = sum(2 * (world - 1) / world * 4 * call for call in calls)
                cells = [str(dialect), str(world), " + ".join(map(str, calls)), f"{sent:,.0f}"]
                rows[world, str(dialect)] = f"| {' | '.join(cells)} |"

        on_ranks(world)(count)()
    return [rows[key] for key in sorted(rows, key=lambda key: (key[1], key[0]))]


def test_the_table_of_the_document_is_what_is_sent() -> None:
    """On failure: the rows to put there."""
    rows = "\n".join(table())
    assert rows in DOCUMENT.read_text(), rows


@pytest.mark.parametrize("dialect", [HF, TORCH], ids=str)
def test_the_large_model_of_the_document_is_that_of_the_formula(dialect: Dialect) -> None:
    calls = numbers(LLAMA_7B, 0, dialect is TORCH)
    sent = " + ".join(f"{call:,}" for call in calls)
    row = f"| {dialect} | {sent} | {4 * sum(calls) / 1e6:.1f} MB |"
    assert row in DOCUMENT.read_text(), row
