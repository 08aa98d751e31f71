"""Parameters that were flattened to be distributed: refused, or stepped as vectors on request."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.dialects.torch import Adafactor
from tests import stepping
from tests.dialects import DIALECTS, HF, Dialect
from tests.distributed.processes import Model, backward, on_processes

# What FSDP1 sets, and what DeepSpeed sets on a model's parameters and on its partitions of them.
MARKS = {"_is_flat_param": "FSDP1", "_fsdp_flattened": "FSDP1"}
MARKS |= {"ds_shape": "ZeRO-3", "ds_id": "ZeRO-3"}


def assert_refused(optimizer: Any, text: str) -> None:
    with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=text):
        optimizer.step()
    with pytest.raises(ValueError, match=text):
        optimizer.explain()


@pytest.mark.parametrize("mark", MARKS)
def test_marked_parameters_are_refused_by_name(mark: str) -> None:
    params: list[Tensor] = stepping.make_params([(3, 2), (6,)])
    optimizer: Any = HF(params)
    setattr(params[1], mark, True)
    for p in params:
        p.grad = torch.ones_like(p)
    assert_refused(optimizer, f"#1 in group 0.*{MARKS[mark]}.*fully_shard.*flat_parameters=")
    with pytest.raises(ValueError, match=MARKS[mark]):
        optimizer.enable_backward_step()
    delattr(params[1], mark)
    optimizer.step()


def partitioned(dialect: Dialect, **kwargs: Any) -> tuple[Any, Tensor]:
    """As DeepSpeed's ZeRO-1 and ZeRO-2 leave an optimizer: one vector for all parameters."""
    values = stepping.make_params([(4, 3), (6,), (2, 5)])
    optimizer = dialect(values, **kwargs)
    flat = torch.nn.Parameter(torch.cat([v.detach().flatten() for v in values]))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = stepping.grad_values([flat], 0)[0]
    return optimizer, flat


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_matrices_that_became_one_vector_are_refused_or_unfactored(dialect: Dialect) -> None:
    optimizer, _ = partitioned(dialect)
    assert_refused(optimizer, "param group 0.*one vector of 28.*flat_parameters='unfactored'")
    taken, flat = partitioned(dialect, flat_parameters="unfactored")
    plain = torch.nn.Parameter(flat.detach().clone())
    plain.grad = flat.grad
    twin = dialect([plain])
    for _ in range(2):
        taken.step()
        twin.step()
    assert torch.equal(flat, plain)


def test_a_group_may_lose_its_matrices() -> None:
    """What is left was there from the start; and a vector alone is a vector."""
    matrix, vector = stepping.make_params([(4, 3), (6,)])
    optimizer = HF([matrix, vector])
    optimizer.param_groups[0]["params"] = [vector]
    vector.grad = torch.ones_like(vector)
    optimizer.step()
    (alone,) = stepping.make_params([(6,)])
    alone.grad = torch.ones_like(alone)
    HF([alone]).step()


def test_the_argument_is_checked() -> None:
    with pytest.raises(ValueError, match="flat_parameters must be 'refuse' or 'unfactored'"):
        Adafactor(stepping.make_params([(2,)]), flat_parameters=True)  # type: ignore[arg-type]


@on_processes(2)
def test_fsdp1_is_refused_or_unfactored() -> None:
    """Each rank's part is stepped as a vector of its own."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        model = Model(torch.float32).requires_grad_()
        sharded = FullyShardedDataParallel(
            copy.deepcopy(model), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        backward(sharded, 0)
        assert_refused(Adafactor(sharded.parameters()), "FSDP1")
        optimizer = Adafactor(sharded.parameters(), lr=0.1, flat_parameters="unfactored")
        parts = [p for p in sharded.parameters() if p.grad is not None]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in parts]
        for p, q in zip(parts, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        Adafactor(twins, lr=0.1).step()
        for p, q in zip(parts, twins, strict=True):
            assert p.dim() == 1
            assert torch.equal(p, q)
