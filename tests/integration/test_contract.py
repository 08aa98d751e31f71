"""The contract of torch.optim.Optimizer, held by every dialect."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from fused_adafactor import Adafactor
from tests import stepping
from tests.dialects import DIALECTS, KERAS, TORCH, Dialect

pytestmark = pytest.mark.parametrize("dialect", DIALECTS, ids=str)

SHAPES = ((6, 5), (7,), (4, 3, 5), ())


def build(dialect: Dialect, **kwargs: Any) -> torch.optim.Optimizer:
    return dialect(stepping.make_params(SHAPES), **kwargs)


def step_count(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> float:
    """Steps that a parameter has taken, wherever the dialect counts them."""
    shared = optimizer.param_groups[0].get("step")
    return float(optimizer.state[param]["step"] if shared is None else shared)


# --- construction --------------------------------------------------------------------------------


def test_state_is_lazy(dialect):
    """Accelerate swaps the parameters after construction, and it never asks for state before."""
    optimizer = build(dialect)
    assert len(optimizer.state) == 0
    assert optimizer.state_dict()["state"] == {}


def test_swapped_parameters_are_the_ones_stepped(dialect):
    optimizer = build(dialect)
    abandoned = stepping.params_of(optimizer)
    fresh = stepping.clone_params(abandoned)
    optimizer.param_groups[0]["params"] = fresh
    other = build(dialect)
    for each in (optimizer, other):
        stepping.take_steps(each, 2)
    stepping.assert_same_optimizers(optimizer, other)
    assert all(map(stepping.same_bits, abandoned, stepping.make_params(SHAPES)))


def test_unknown_arguments_are_named(dialect):
    with pytest.raises(TypeError, match="'momentun'"):
        build(dialect, momentun=0.9)


def test_extras_are_keyword_only_and_in_every_group(dialect):
    optimizer = build(dialect, rounding="kahan", nonfinite="skip", seed=7)
    group = optimizer.param_groups[0]
    assert (group["rounding"], group["nonfinite"], group["seed"]) == ("kahan", "skip", 7)
    assert group["capturable"] is False
    assert group["fused"] is None
    assert group["foreach"] is None


def test_hyperparameters_given_as_text_are_named(dialect):
    error = ValueError if dialect is KERAS else TypeError  # Keras says ValueError itself
    with pytest.raises(error, match=rf"\b(lr|{dialect.lr_argument})\b"):
        build(dialect, lr="0.01")
    with pytest.raises(TypeError, match="max_grad_norm"):
        build(dialect, max_grad_norm="1.0")


def test_differentiable_is_refused_with_a_reason(dialect):
    with pytest.raises(ValueError, match=r"differentiable=True .*in place"):
        build(dialect, differentiable=True)


def test_a_dynamic_subclass_is_the_same_optimizer(dialect):
    """Lightning wraps an optimizer in a class made at run time."""
    wrapped = type("Wrapped", (dialect.cls,), {})
    kwargs = dict(dialect.plain)
    optimizers = [cls(stepping.make_params(SHAPES), **kwargs) for cls in (wrapped, dialect.cls)]
    for optimizer in optimizers:
        stepping.take_steps(optimizer, 2)
    stepping.assert_same_optimizers(*optimizers)


# --- groups --------------------------------------------------------------------------------------


def test_a_group_added_later_starts_its_own_count(dialect):
    optimizer = build(dialect)
    stepping.take_steps(optimizer, 3)
    late = torch.nn.Parameter(torch.ones(3, 4))
    optimizer.add_param_group({"params": late, "lr": 0.25})
    stepping.take_steps(optimizer, 1, start=3)
    assert step_count(optimizer, stepping.params_of(optimizer)[0]) == 4
    assert step_count(optimizer, late) == (4 if dialect.counts_globally else 1)
    assert optimizer.param_groups[1]["lr"] == 0.25
    assert optimizer.param_groups[1]["rounding"] == "nearest"


def test_groups_may_bring_names_flags_and_a_tensor_lr(dialect):
    """torchtitan writes `fused`, `foreach` and a ready `param_names` into each group."""
    params = stepping.make_params([(6, 5), (7,)])
    optimizer = dialect(
        [
            {
                "params": [params[0]],
                "param_names": ["weight"],
                "fused": True,
                "foreach": False,
                "lr": torch.tensor(0.03125),
            }
        ]
    )
    optimizer.add_param_group({"params": [("bias", params[1])], "fused": False, "foreach": True})
    plain = dialect(stepping.make_params([(6, 5), (7,)]))
    plain.param_groups[0]["lr"] = 0.03125
    stepping.take_steps(optimizer, 2)
    stepping.take_steps(plain, 2)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    assert stepping.same_bits(params[0], stepping.params_of(plain)[0])
    assert optimizer._step_supports_amp_scaling


def test_a_refused_group_leaves_no_trace(dialect):
    optimizer = build(dialect)
    late = torch.nn.Parameter(torch.ones(2))
    for wrong in ({"rounding": "up"}, {"nonfinite": "ignore"}, {"seed": -1}):
        with (
            stepping.assert_untouched(optimizer),
            pytest.raises(ValueError, match=next(iter(wrong))),
        ):
            optimizer.add_param_group({"params": late, **wrong})
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([late])


def test_a_hyperparameter_changed_between_steps_is_used(dialect):
    optimizer, other = build(dialect), build(dialect, lr=0.0625)
    optimizer.param_groups[0]["lr"] = 0.0625
    for each in (optimizer, other):
        stepping.take_steps(each, 2)
    for p, q in zip(*map(stepping.params_of, (optimizer, other)), strict=True):
        assert stepping.same_bits(p, q)


# --- the step ------------------------------------------------------------------------------------


def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned(dialect):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = dialect([weight])
    losses = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert (weight != 1).all()
    assert optimizer.step() is None


def test_a_closure_that_raises_changes_nothing(dialect):
    optimizer = build(dialect)
    stepping.take_steps(optimizer, 2)

    def closure() -> torch.Tensor:
        raise ArithmeticError("from the model")

    with stepping.assert_untouched(optimizer), pytest.raises(ArithmeticError, match="the model"):
        optimizer.step(closure)


def test_zero_grad(dialect):
    optimizer = build(dialect)
    stepping.take_steps(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in stepping.params_of(optimizer))
    optimizer.zero_grad()
    assert all(p.grad is None for p in stepping.params_of(optimizer))


def test_parameters_without_gradient_stay_as_they_are(dialect):
    optimizer, other = build(dialect), build(dialect)
    for each in (optimizer, other):
        stepping.take_steps(each, 2)
    params, others = map(stepping.params_of, (optimizer, other))
    for p, g in zip(params, stepping.grad_values(params, 2), strict=True):
        p.grad = g
    params[0].grad = params[3].grad = None
    optimizer.step()
    stepping.take_steps(other, 1, start=2)
    for still, moved in ((0, 1), (3, 2)):
        assert not stepping.same_bits(params[still], others[still])
        assert stepping.same_bits(params[moved], others[moved])
    if not dialect.counts_globally:
        assert step_count(optimizer, params[0]) == 2


def test_tied_weights_are_stepped_once(dialect):
    tied, plain = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    plain.load_state_dict(tied.state_dict())
    model = torch.nn.Sequential(tied, torch.nn.Linear(4, 4, bias=False))
    model[1].weight = tied.weight
    optimizers = dialect(model.parameters()), dialect([plain.weight])
    for weight, optimizer in zip((tied.weight, plain.weight), optimizers, strict=True):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    assert stepping.same_bits(tied.weight, plain.weight)
    assert step_count(optimizers[0], tied.weight) == 1


def test_a_parameter_listed_twice_warns_and_is_stepped_once(dialect):
    once, twice = (stepping.make_params([(6, 5)])[0] for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        doubled = dialect([twice, twice])
    for p, optimizer in ((once, dialect([once])), (twice, doubled)):
        p.grad = stepping.grad_values([p], 0)[0]
        optimizer.step()
    assert stepping.same_bits(once, twice)
    with pytest.raises(ValueError, match="more than one parameter group"):
        dialect([{"params": [once]}, {"params": [once]}])


def test_gradients_are_never_written(dialect):
    optimizer = build(dialect, max_grad_norm=0.5)
    params = stepping.params_of(optimizer)
    for p, g in zip(params, stepping.grad_values(params, 0), strict=True):
        p.grad = g
    grads = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
    optimizer.step()
    for p, (grad, before, version) in zip(params, grads, strict=True):
        assert p.grad is grad
        assert grad._version == version
        assert stepping.same_bits(grad, before)


def test_autograd_sees_that_a_parameter_changed(dialect):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    dialect([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_shows_in_a_profile_under_the_class_name(dialect):
    optimizer = build(dialect)
    with torch.autograd.profiler.profile() as profile:
        stepping.take_steps(optimizer, 1)
    names = [event.name for event in profile.function_events]
    assert names.count(f"Optimizer.step#{dialect.class_name}.step") == 1


# --- schedulers ----------------------------------------------------------------------------------

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_of_torch_set_the_lr_of_each_step(dialect, schedule, as_tensor):
    lr = torch.tensor(0.02, dtype=torch.float64) if as_tensor else 0.02
    optimizer, manual = build(dialect, lr=lr), build(dialect)
    scheduler = schedule(optimizer)
    seen = []
    for step in range(5):
        current = float(optimizer.param_groups[0]["lr"])
        seen.append(current)
        manual.param_groups[0]["lr"] = current
        stepping.take_steps(optimizer, 1, start=step)
        stepping.take_steps(manual, 1, start=step)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert len(set(seen)) > 2
    for p, q in zip(*map(stepping.params_of, (optimizer, manual)), strict=True):
        assert stepping.same_bits(p, q)


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [0, 2])
def test_pickle_and_deepcopy_go_on_as_the_original(dialect, stepped):
    optimizer = build(dialect, rounding="kahan", backend="reference")
    stepping.take_steps(optimizer, stepped)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.backend == "reference"
        stepping.assert_same_optimizers(other, optimizer)
        reference = copy.deepcopy(optimizer)
        for each in (other, reference):
            stepping.take_steps(each, 2, start=stepped)
        stepping.assert_same_optimizers(other, reference)


def test_setstate_of_an_older_version_fills_in_what_is_new(dialect):
    optimizer = build(dialect)
    stepping.take_steps(optimizer, 2)
    old = optimizer.__getstate__()
    del old["backend"]
    for group in old["param_groups"]:
        for flag in ("rounding", "seed", "nonfinite", "capturable", "fused", "differentiable"):
            del group[flag]
    restored = dialect.cls.__new__(dialect.cls)
    restored.__setstate__(old)
    assert restored.backend == "auto"
    assert restored.param_groups[0]["rounding"] == "nearest"
    assert restored.param_groups[0]["capturable"] is False
    stepping.take_steps(restored, 1, start=2)


def test_fixed_points_of_the_table(dialect):
    """The table of dialects is right about what the tests here rely on."""
    optimizer = build(dialect)
    assert ("step" in optimizer.param_groups[0]) is dialect.counts_globally
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert (type(optimizer) is Adafactor) is (dialect is TORCH)


def test_a_parameter_appended_without_a_name_goes_by_its_number(dialect):
    named = [("a", torch.nn.Parameter(torch.ones(3)))]
    optimizer = dialect(named)
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(late)
    late.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="of parameter #1 in group 0"):
        optimizer.step()
