"""torch.distributed.checkpoint: saved by some processes, loaded by as many, or by others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, OPTAX, TORCH, Dialect
from tests.distributed.processes import Model, on_processes, shard, train
from tests.distributed.test_processes import part_of, whole_of

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
EACH = pytest.mark.parametrize("dialect", [TORCH, HF, KERAS, OPTAX], ids=str)


def fresh(world: int, dialect: Dialect, **kwargs: Any) -> tuple[Model, Any]:
    model = shard(Model(torch.float32), init_device_mesh("cpu", (world,)))
    return model, dialect(model.parameters(), **kwargs)


def save(model: Any, optimizer: Any, path: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"model": get_model_state_dict(model), "optimizer": state}, checkpoint_id=path)


def load(model: Any, optimizer: Any, path: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    loaded = {"model": get_model_state_dict(model), "optimizer": state}
    dcp.load(loaded, checkpoint_id=path)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)


def values(optimizer: Any) -> dict[str, torch.Tensor]:
    """Parameters, state and common counters, whole."""
    found = {}
    for number, p in enumerate(stepping.params_of(optimizer)):
        found[f"{number}"] = whole_of(p.detach()).clone()
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{number} {key}"] = whole_of(value).clone()
    for group in optimizer.param_groups:
        if "step" in group:
            found["step"] = group["step"].clone()
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert stepping.same_bits(found[key], value), key


@FLAT
@EACH
@on_processes(3)
def test_a_training_goes_on_to_the_bit(tmp_path: Path, dialect: Dialect, flat: bool) -> None:
    model, optimizer = fresh(3, dialect)
    train(model, optimizer, range(3))
    save(model, optimizer, tmp_path / "saved", flat)
    other, resumed = fresh(3, dialect)
    load(other, resumed, tmp_path / "saved", flat)
    assert_equal(values(resumed), values(optimizer))
    for part, both in zip(
        *(map(part_of, stepping.params_of(o)) for o in (optimizer, resumed)), strict=True
    ):
        assert torch.equal(part, both)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(3, 6))
    assert_equal(values(resumed), values(optimizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "flat"), [(TORCH, False), (HF, True), (KERAS, True), (OPTAX, False)], ids=str
)
def test_state_is_exact_on_any_number_of_processes(
    tmp_path: Path, dialect: Dialect, flat: bool
) -> None:
    """Saved by four, by three, by two, by one: each loads what those before it have saved."""
    chain = on_processes(4, 3, 2, 1)(pass_on)
    chain(tmp_path, path=tmp_path, dialect=dialect, flat=flat)


def pass_on(path: Path, dialect: Dialect, flat: bool, world: int) -> None:
    model, optimizer = fresh(world, dialect)
    if world == 4:
        train(model, optimizer, range(3))
    else:
        load(model, optimizer, path / "saved", flat)
        assert_equal(values(optimizer), torch.load(path / "values"))
        # What is loaded can be stepped.
        again, theirs = copy.deepcopy(values(optimizer)), optimizer
        train(model, theirs, range(3, 4))
        assert not torch.equal(values(theirs)["0"], again["0"])
        load(model, optimizer, path / "saved", flat)
    found = values(optimizer)
    save(model, optimizer, path / "saved", flat)
    if dist.get_rank() == 0:
        torch.save(found, path / "values")


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@on_processes(2)
def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(dialect: Dialect) -> None:
    """torch then calls step() with every lr and every gradient set to zero."""
    for variant in dialect.variants.values():
        (model, optimizer), (other, untouched) = (fresh(2, dialect, **variant) for _ in range(2))
        before = values(untouched)
        get_optimizer_state_dict(model, optimizer)
        after = values(optimizer)
        assert {
            key: value for key, value in after.items() if " " not in key
        }.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), key
        for key, value in after.items():
            if key.endswith(" step"):
                assert value == 0
        train(model, optimizer, range(2))
        train(other, untouched, range(2))
        assert_equal(values(optimizer), values(untouched))


@on_processes(2)
def test_a_step_of_a_zero_lr_counts_where_any_process_has_a_gradient() -> None:
    """Rows of zeros on one process only: it must not take the step for torch's question."""
    model, optimizer = fresh(2, TORCH, lr=0.0)
    for p in stepping.params_of(optimizer):
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        model.first.weight.grad.to_local().fill_(1.0)
    optimizer.step()
    assert optimizer.state[model.first.weight]["step"] == 1


@on_processes(2)
def test_a_plain_state_dict_is_of_parts_or_whole() -> None:
    """One of DTensors, of another placement, or of whole tensors: each is loaded as its parts."""
    model, optimizer = fresh(2, HF)
    train(model, optimizer, range(2))
    wanted = values(optimizer)
    plain = optimizer.state_dict()
    whole = copy.deepcopy(plain)
    moved = copy.deepcopy(plain)
    for saved in (whole, moved):
        for state in saved["state"].values():
            for key, value in state.items():
                if isinstance(value, DTensor):
                    state[key] = value.full_tensor() if saved is whole else elsewhere(value)
    for saved in (plain, whole, moved):
        _, other = fresh(2, HF)
        for p, q in zip(*map(stepping.params_of, (other, optimizer)), strict=True):
            p.detach().copy_(q.detach())
        other.load_state_dict(saved)
        assert_equal(values(other), wanted)
        for p, q in zip(*map(stepping.params_of, (other, optimizer)), strict=True):
            for key, value in optimizer.state.get(p if p in optimizer.state else q, {}).items():
                assert part_of(other.state[p][key]).shape == part_of(value).shape


def elsewhere(value: DTensor) -> DTensor:
    """The same, split by another dimension, or not at all."""
    from torch.distributed.tensor import Replicate, Shard

    split = isinstance(value.placements[0], Shard)
    return value.redistribute(placements=[Replicate() if split else Shard(value.ndim - 1)])


@on_processes(2)
def test_state_that_is_whole_is_refused_by_a_step() -> None:
    model, optimizer = fresh(2, HF)
    train(model, optimizer, range(1))
    state = optimizer.state[model.first.weight]
    state["exp_avg_sq_row"] = state["exp_avg_sq_row"].full_tensor()
    with pytest.raises(ValueError, match=r"exp_avg_sq_row.*on this process.*load_state_dict"):
        train(model, optimizer, range(1, 2))
