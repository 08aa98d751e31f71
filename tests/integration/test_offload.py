"""CPUOffload, with both sides on the CPU: the obvious slow way is what it is compared with."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, destroy_process_group, init_process_group  # noqa: TID251
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: TID251
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.tensor import distribute_tensor  # noqa: TID251
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adafactor import Adafactor, offload
from fused_adafactor.dialects.hf import Adafactor as HfAdafactor
from fused_adafactor.dialects.keras import Adafactor as KerasAdafactor
from fused_adafactor.offload import CPUOffload
from fused_adafactor.rounding import RoundingKey, round_stochastic
from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, DIALECTS, HF, VARIANTS, Dialect
from tests.stepping import params_of, same_bits

pytestmark = pytest.mark.usefixtures("each_backend")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((7,), (), (6, 5), (1, 9), (0, 4), (4, 6, 3, 2), (17, 23), (40, 60))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches in every step."""
    monkeypatch.setattr(offload, "_BATCH_BYTES", 200)


class SlowWay:
    """Masters stepped by the plain optimizer, and copied to the parameters."""

    def __init__(self, params: Sequence[Tensor], make: Callable[..., Any], **kwargs: Any) -> None:
        self.params = list(params)
        wide = [F64 if p.dtype is F64 else F32 for p in params]
        self.masters = [
            torch.nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(params, wide, strict=True)
        ]
        self.optimizer = make(self.masters, **kwargs)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None]) -> None:
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = None if grad is None else grad.to(master.dtype)
        self.optimizer.step()
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)


def give(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """As a backward pass would, hooks included."""
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            (param * grad).sum().backward()


def masters_of(optimizer: Any) -> list[Tensor]:
    return params_of(optimizer._host)


def offloaded(params: Any, dialect: Dialect = HF, **kwargs: Any) -> CPUOffload:
    if "lr" in kwargs:
        kwargs[dialect.lr_argument] = kwargs.pop("lr")
    return CPUOffload(params, dialect.cls, **{**dialect.plain, **kwargs})


def grads_of(params: Sequence[Tensor], step: int) -> list[Tensor]:
    return stepping.grad_values(params, step)


def take(optimizer: Any, steps: range) -> None:
    params = params_of(optimizer)
    for step in steps:
        give(params, grads_of(params, step))
        optimizer.step()
        optimizer.zero_grad()


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
def test_it_is_the_slow_way_bit_for_bit(
    dialect: Dialect, variant: str, offload_gradients: bool
) -> None:
    options = dict(dialect.variants[variant])
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours = offloaded(params, dialect, offload_gradients=offload_gradients, **options)
    slow = SlowWay(slow_params, dialect, **options)
    for step in range(4):
        grads: list[Tensor | None] = [*grads_of(params, step)]
        grads[step % 3] = None
        give(params, grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
        assert all(map(same_bits, params, slow.params)), f"step {step}"
        assert all(map(same_bits, masters_of(ours), slow.masters)), f"step {step}"
    for param, master in zip(params, slow.masters, strict=True):
        for key, value in slow.optimizer.state[master].items():
            assert same_bits(ours.state[param][key], value), key


@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize("extras", [{"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
def test_what_joins_tensors_is_the_slow_way_too(dtype: torch.dtype, extras: dict[str, Any]) -> None:
    params, slow_params = (stepping.make_params(SHAPES, dtype) for _ in range(2))
    ours, slow = offloaded(params, **extras), SlowWay(slow_params, HF, **extras)
    for step in range(3):
        grads = grads_of(params, step)
        if "nonfinite" in extras:
            grads[step].view(-1)[0] = torch.inf
        give(params, grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
        assert all(map(same_bits, params, slow.params))


@pytest.mark.parametrize("layout", ["both_transposed", "both_channels_last", "both_strided"])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_any_layout(dialect: Dialect, layout: str) -> None:
    lay_out, _ = stepping.LAYOUTS[layout]
    (values,) = stepping.make_params(((2, 4, 6, 5),), BF16)
    params = [torch.nn.Parameter(lay_out(values.detach())) for _ in range(2)]
    strides = params[0].stride()
    ours, slow = offloaded(params[:1], dialect), SlowWay(params[1:], dialect)
    # What master and state are laid out like is the parameter, where that leaves no gaps.
    slow.masters[0].data = masters_of(ours)[0].detach().clone()
    for step in range(3):
        grads = grads_of(params[:1], step)
        give(params[:1], grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
    assert params[0].stride() == strides
    assert same_bits(*params)


def test_stochastic_rounding_is_that_of_the_parameter() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, rounding="stochastic", seed=3)
    for step in range(3):
        take(ours, range(step, step + 1))
        for index, (param, master) in enumerate(zip(params, masters_of(ours), strict=True)):
            wanted = round_stochastic(master.detach(), BF16, RoundingKey(3, index, step + 1))
            assert same_bits(param, wanted)


@pytest.mark.parametrize("master_dtype", [F64, BF16], ids=str)
def test_masters_of_another_dtype(master_dtype: torch.dtype) -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, master_dtype=master_dtype)
    take(ours, range(3))
    for param, master in zip(params, masters_of(ours), strict=True):
        assert master.dtype is master_dtype
        assert same_bits(param, master.detach().to(BF16))


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_gradients", [False, True])
def test_gradients_of_several_passes_add_up(offload_gradients: bool) -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours = offloaded(params, offload_gradients=offload_gradients)
    slow = SlowWay(slow_params, HF)
    for step in range(3):
        for part in range(3):
            for some in (params, slow.params):
                give(some, grads_of(some, 10 * step + part))
        assert all((p.grad is None) == offload_gradients for p in params)
        ours.step()
        ours.zero_grad()
        slow.step([p.grad for p in slow.params])
        slow.optimizer.zero_grad()
        for p in slow.params:
            p.grad = None
        assert all(map(same_bits, params, slow.params))


def test_dropped_gradients_are_dropped_on_the_host() -> None:
    params = stepping.make_params(SHAPES, BF16)
    before = [p.detach().clone() for p in params]
    ours = offloaded(params, offload_gradients=True)
    give(params, grads_of(params, 0))
    ours.zero_grad()
    ours.step()
    assert all(map(same_bits, params, before))
    assert not ours.state


def test_a_step_leaves_no_offloaded_gradient() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, offload_gradients=True)
    give(params, grads_of(params, 0))
    ours.step()
    before = [p.detach().clone() for p in params]
    ours.step()
    assert all(map(same_bits, params, before))


def test_a_gradient_that_was_set_by_hand_is_offloaded_too() -> None:
    params, others = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours, plain = offloaded(params, offload_gradients=True), offloaded(others)
    for some in (params, others):
        for p, g in zip(some, grads_of(some, 0), strict=True):
            p.grad = g
    ours.step()
    plain.step()
    assert all(p.grad is None for p in params)
    assert all(map(same_bits, params, others))


def test_an_optimizer_that_is_gone_takes_no_gradients() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, offload_gradients=True)
    del ours
    gc.collect()
    give(params, grads_of(params, 0))
    assert all(p.grad is not None for p in params)


# --- parameters that somebody else writes --------------------------------------------------------


def test_a_changed_parameter_is_what_counts() -> None:
    """Where it has changed; all other masters keep their bits."""
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params)
    take(ours, range(2))
    masters = [m.detach().clone() for m in masters_of(ours)]
    with torch.no_grad():
        params[-1][3:5].mul_(2.0)
    wanted = masters[-1].clone()
    wanted[3:5] = params[-1].detach()[3:5].float()
    ours.sync_from_parameters()
    assert same_bits(masters_of(ours)[-1], wanted)
    assert not same_bits(wanted[:3], params[-1].detach()[:3].float())
    assert all(map(same_bits, masters_of(ours)[:-1], masters[:-1]))


@pytest.mark.parametrize("how", ["in place", "another tensor", "data and a call"])
def test_changes_are_noticed(how: str) -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours, slow = offloaded(params), SlowWay(slow_params, HF)
    for step in range(4):
        if step == 2:
            for p, master in zip(params, slow.masters, strict=True):
                new = p.detach() * 3 + 1
                master.data.copy_(torch.where(new == p, master, new))  # -0.5 has not changed
                if how == "in place":
                    with torch.no_grad():
                        p.copy_(new)
                elif how == "another tensor":
                    p.data = new
                else:
                    p.data.copy_(new)
                    ours.sync_from_parameters()
        grads = grads_of(params, step)
        give(params, grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
        assert all(map(same_bits, params, slow.params)), f"step {step}"


# --- state dicts and copies ----------------------------------------------------------------------


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("extras", [{}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_resuming_is_exact(dialect: Dialect, extras: dict[str, Any], model_first: bool) -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, dialect, **extras)
    take(ours, range(3))
    saved = through_a_file(ours.state_dict())
    weights = [p.detach().clone() for p in params]

    others = stepping.make_params(SHAPES, BF16, seed=1)
    resumed = offloaded(others, dialect, **extras)
    take(resumed, range(1))  # it has a past of its own
    if not model_first:
        resumed.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    if model_first:
        resumed.load_state_dict(saved)
    for some in (ours, resumed):
        take(some, range(3, 6))
    assert all(map(same_bits, masters_of(ours), masters_of(resumed)))
    stepping.assert_same_optimizers(resumed, ours)


def test_a_state_dict_without_masters_takes_them_from_the_parameters() -> None:
    params = stepping.make_params(SHAPES, BF16)
    plain = HF(params)
    stepping.take_steps(plain, 2)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = offloaded([torch.nn.Parameter(p.detach() * 0) for p in params])
    take(ours, range(1))
    with torch.no_grad():
        for p, other in zip(params_of(ours), others, strict=True):
            p.copy_(other)
    ours.load_state_dict(plain.state_dict())
    slow = SlowWay(others, HF)
    slow.optimizer.load_state_dict(plain.state_dict())
    for step in range(2, 4):
        grads = grads_of(params, step)
        give(params_of(ours), grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
    assert all(map(same_bits, params_of(ours), slow.params))


def test_functions_do_not_enter_a_state_dict() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, ADAFACTOR_PYTORCH, lr=lambda step: 0.1 / step)
    take(ours, range(1))
    ours.load_state_dict(through_a_file(ours.state_dict()))
    assert callable(ours.param_groups[0]["lr"])
    take(ours, range(1, 2))


def test_the_state_dict_of_the_peer_loads() -> None:
    """It knows no extras, which stay as they are."""
    params = stepping.make_params(((6, 5), (7,)))
    peer = torch.optim.Adafactor(params, lr=0.125)
    stepping.take_steps(peer, 2)
    others = stepping.clone_params(params)
    ours = CPUOffload(others, Adafactor, seed=3)
    ours.load_state_dict(peer.state_dict())
    assert ours.param_groups[0]["seed"] == 3
    assert ours.param_groups[0]["lr"] == 0.125
    plain = Adafactor(params)
    plain.load_state_dict(peer.state_dict())
    stepping.take_steps(plain, 2, start=2)
    take(ours, range(2, 4))
    assert all(map(same_bits, params, others))


def test_masters_of_other_parameters_are_not_believed() -> None:
    """Who loads the optimizer and not the model goes on from the model that there is."""
    ours, other = (offloaded(stepping.make_params(SHAPES, BF16, seed)) for seed in range(2))
    for some in (ours, other):
        take(some, range(2))
    ours.load_state_dict(other.state_dict())
    before = [p.detach().clone() for p in params_of(ours)]
    for group in ours.param_groups:
        group["lr"] = 0.0
    take(ours, range(2, 3))
    assert all(map(same_bits, params_of(ours), before))


def test_masters_that_do_not_fit_change_nothing() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params)
    take(ours, range(2))
    wrong = copy.deepcopy(ours.state_dict())
    wrong["state"][6]["master"] = torch.ones(3)
    masters = [m.detach().clone() for m in masters_of(ours)]
    with (
        stepping.assert_untouched(ours),
        pytest.raises(ValueError, match=r"master of parameter #6"),
    ):
        ours.load_state_dict(wrong)
    assert all(map(same_bits, masters_of(ours), masters))


@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_goes_on_like_the_original(copied: Any, steps: int, offload_gradients: bool) -> None:
    ours = offloaded(stepping.make_params(SHAPES, BF16), offload_gradients=offload_gradients)
    take(ours, range(steps))
    other = copied(ours)
    for some in (ours, other):
        take(some, range(steps, steps + 2))
    stepping.assert_same_optimizers(ours, other)
    assert all(map(same_bits, masters_of(ours), masters_of(other)))
    before = [p.detach().clone() for p in params_of(other)]
    take(ours, range(5, 6))
    assert all(map(same_bits, params_of(other), before))


def test_state_that_is_loaded_never_takes_the_dtype_of_the_parameters() -> None:
    """As the base class would have it, on the device too, which may have no room for it."""
    ours = offloaded(stepping.make_params(SHAPES, BF16))
    take(ours, range(1))
    saved = ours.state_dict()
    made: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend(t.dtype for t in [result] if isinstance(t, Tensor))
            return result

    with Watch():
        ours.load_state_dict(saved)
    assert F32 in made
    assert BF16 not in made


def test_get_optimizer_state_dict_steps_nothing() -> None:
    model = torch.nn.Linear(5, 3).to(BF16)
    ours = CPUOffload(
        model.parameters(), HfAdafactor, weight_decay=0.1, lr=1e-2, relative_step=False
    )
    before = [p.detach().clone() for p in model.parameters()]
    saved = get_optimizer_state_dict(model, ours)
    assert all(map(same_bits, model.parameters(), before))
    assert saved["state"]["weight"]["step"] == 0
    assert same_bits(saved["state"]["weight"]["master"], before[0].float())


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_schedulers(dialect: Dialect) -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours, slow = offloaded(params, dialect, lr=0.1), SlowWay(slow_params, dialect, lr=0.1)
    pairs = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, slow.optimizer)]
    for step in range(3):
        grads = grads_of(params, step)
        give(params, grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
        for scheduler in pairs:
            scheduler.step()
    assert pairs[0].get_last_lr() == pairs[1].get_last_lr()
    assert all(map(same_bits, params, slow.params))


def test_a_scheduler_without_a_number_is_refused() -> None:
    ours = CPUOffload(stepping.make_params(), HfAdafactor)
    with pytest.raises(ValueError, match="an lr scheduler needs a number"):
        torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    assert all("initial_lr" not in group for group in ours.param_groups)


def test_groups_have_their_own_settings() -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))

    def groups_of(some: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"params": some[:3], "lr": 0.1}, {"params": some[3:], "weight_decay": 0.1}]

    ours = offloaded(groups_of(params))
    assert [group["lr"] for group in ours.param_groups] == [0.1, 1e-2]
    assert all(a is b for a, b in zip(params_of(ours), params, strict=True))
    slow = SlowWay(slow_params, lambda masters, **_: HF(groups_of(masters)))
    ours.param_groups[1]["lr"] = slow.optimizer.param_groups[1]["lr"] = 0.3
    take(ours, range(1))
    slow.step(grads_of(params, 0))
    assert all(map(same_bits, params, slow.params))


def test_a_group_can_be_added() -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours, slow = offloaded(params[:4]), SlowWay(slow_params, HF)
    ours.add_param_group({"params": params[4:], "lr": 1e-2})
    assert ours.param_groups[1]["clip_threshold"] == 1.0
    take(ours, range(1))
    slow.step(grads_of(params, 0))
    assert all(map(same_bits, params, slow.params))


def test_a_group_that_is_refused_is_not_added() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params[:4], offload_gradients=True)
    with pytest.raises(ValueError, match="lr"):
        ours.add_param_group({"params": params[4:], "lr": -1.0})
    assert len(ours.param_groups) == 1
    take(ours, range(1))
    give(params[4:], grads_of(params[4:], 0))
    assert all(p.grad is not None for p in params[4:])  # which are none of the optimizer's


def test_a_group_whose_masters_cannot_be_rounded_is_not_added() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params[:4], master_dtype=F16)
    with pytest.raises(ValueError, match="rounding='stochastic' is not available"):
        ours.add_param_group({"params": params[4:], "rounding": "stochastic"})
    assert len(ours.param_groups) == len(ours._host.param_groups) == 1
    ours.add_param_group({"params": params[4:]})
    take(ours, range(1))
    assert set(ours.state) == set(params)


def test_a_group_that_nobody_added_is_refused() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params[:4])
    ours.param_groups[0]["params"].append(params[4])
    with pytest.raises(ValueError, match="add_param_group"):
        ours.step()


def test_adding_a_group_leaves_the_others_as_they_are() -> None:
    params = stepping.make_params(SHAPES, BF16)
    lr = torch.tensor(0.125)
    ours = offloaded([{"params": params[:2]}, {"params": params[2:4], "lr": lr}])
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
    take(ours, range(1))
    scheduler.step()
    ours.add_param_group({"params": params[4:], "lr": 0.25})
    assert [float(group["lr"]) for group in ours.param_groups] == [5e-3, 0.0625, 0.25]
    assert ours.param_groups[1]["lr"] is lr  # the user's own tensor
    assert [group["lr"] for group in ours._host.param_groups][::2] == [5e-3, 0.25]


@pytest.mark.parametrize("late", [False, True])
def test_a_group_may_use_the_names_of_the_peer(late: bool) -> None:
    params = stepping.make_params(((6, 5), (7,)), BF16)
    group = {"params": params[1:], "learning_rate": 0.25}
    ours = CPUOffload([params[0]] if late else [{"params": params[:1]}, group], KerasAdafactor)
    if late:
        ours.add_param_group(group)
    assert ours.param_groups[1]["lr"] == 0.25
    assert "learning_rate" not in ours.param_groups[1]
    with pytest.raises(ValueError, match="both lr and learning_rate"):
        ours.add_param_group(
            {"params": stepping.make_params(((3,),)), "lr": 1.0, "learning_rate": 0.25}
        )
    assert len(ours.param_groups) == len(ours._host.param_groups) == 2


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("whole_group", [False, True])
def test_parameters_can_be_taken_out(
    dialect: Dialect, offload_gradients: bool, whole_group: bool
) -> None:
    params, slow_params = (stepping.make_params(SHAPES, BF16) for _ in range(2))

    def groups_of(some: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"params": list(some[:3])}, {"params": list(some[3:])}]

    ours = offloaded(groups_of(params), dialect, offload_gradients=offload_gradients)
    slow = SlowWay(slow_params, lambda masters: dialect(groups_of(masters)))
    for step in range(4):
        if step == 2:
            for optimizer in (ours, slow.optimizer):
                if whole_group:
                    del optimizer.param_groups[0]
                else:
                    optimizer.param_groups[0]["params"].pop(1)
            for p in slow.params:  # what is not stepped any more is not rounded either
                p.grad = None
        grads = grads_of(params, step)
        give(params, grads)
        ours.step()
        ours.zero_grad()
        slow.step(grads)
        assert all(map(same_bits, params, slow.params)), f"step {step}"
    gone = params[:3] if whole_group else params[1:2]
    assert not any(p in ours.state or p in ours._pairs for p in gone)
    kept = set(masters_of(ours))
    assert set(ours._host.state) <= kept
    assert set(ours._host._mirrors) == kept
    ours.load_state_dict(through_a_file(ours.state_dict()))
    # It comes back as any new one.
    ours.add_param_group({"params": gone})
    give(params, grads_of(params, 4))
    ours.step()
    assert set(ours.state) == set(params)


def test_state_that_is_dropped_starts_anew() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params)
    take(ours, range(2))
    masters = [m.detach().clone() for m in masters_of(ours)]
    ours.state = collections.defaultdict(dict)
    copied = copy.deepcopy(ours)
    assert not copied.state
    slow = SlowWay(params, HF)
    for master, value in zip(slow.masters, masters, strict=True):
        master.data.copy_(value)
    for some in (copied, ours):
        take(some, range(2, 3))
    slow.step(grads_of(params, 2))
    assert all(map(same_bits, masters_of(ours), slow.masters))
    assert all(map(same_bits, masters_of(copied), slow.masters))
    assert all(ours.state[p]["step"] == 1 for p in params)
    # One of them alone, too.
    del ours.state[params[0]]
    take(ours, range(3, 4))
    assert [float(ours.state[p]["step"]) for p in params[:2]] == [1.0, 2.0]


def test_a_count_that_is_set_in_one_group_is_shown_in_all() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = CPUOffload([{"params": params[:3]}, {"params": params[3:]}], KerasAdafactor)
    take(ours, range(1))
    ours.param_groups[0]["step"] = torch.tensor(7.0)
    take(ours, range(1, 2))
    assert [float(group["step"]) for group in ours.param_groups] == [8.0, 8.0]


def test_a_group_that_was_replaced_is_completed() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours, other = (offloaded(params, lr=1e-2) for params in (params, stepping.clone_params(params)))
    ours.param_groups[0] = {"params": params}
    for some in (ours, other):
        take(some, range(1))
        with torch.no_grad():
            params_of(some)[-1].add_(1.0)
        some.sync_from_parameters()
    assert ours.param_groups[0]["rounding"] == other.param_groups[0]["rounding"]
    assert all(map(same_bits, masters_of(ours), masters_of(other)))


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_a_call_without_gradients_does_nothing(dialect: Dialect) -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, dialect, use_ema=True)
    take(ours, range(2))
    masters = [m.detach().clone() for m in masters_of(ours)]
    with stepping.assert_untouched(ours):
        for _ in range(2):
            ours.step()
    assert all(map(same_bits, masters_of(ours), masters))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_averages_can_be_swapped_in(offload_gradients: bool, rounding: str) -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(
        params, use_ema=True, ema_momentum=0.5, rounding=rounding,
        offload_gradients=offload_gradients,
    )  # fmt: skip
    take(ours, range(3))
    averages = [ours.state[p]["average"].clone() for p in params]
    masters = [m.detach().clone() for m in masters_of(ours)]
    give(params, grads_of(params, 3))
    ours.finalize_variable_values(params[2:4])
    assert all(map(same_bits, masters_of(ours), [*masters[:2], *averages[2:4], *masters[4:]]))
    ours.finalize_variable_values()
    assert all(map(same_bits, masters_of(ours), averages))
    assert all(map(same_bits, params, [a.to(BF16) for a in averages]))
    ours.sync_from_parameters()
    assert all(map(same_bits, masters_of(ours), averages))
    ours.step()  # the gradients are still there
    assert all(ours.state[p]["step"] == 4 for p in params)
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        ours.finalize_variable_values([torch.ones(3)])


def test_the_norm_of_the_gradients() -> None:
    params = stepping.make_params(SHAPES, F32)
    ours, plain = (
        offloaded(params, max_grad_norm=0.5),
        HF(stepping.clone_params(params), max_grad_norm=0.5),
    )
    assert ours.grad_norm is None
    take(ours, range(1))
    take(plain, range(1))
    assert same_bits(ours.grad_norm, plain.grad_norm)


def test_closures_and_hooks() -> None:
    (param,) = stepping.make_params(((6, 5),), BF16)
    ours = offloaded([param])
    seen: list[str] = []
    ours.register_step_pre_hook(lambda *_: seen.append("before"))
    ours.register_step_post_hook(lambda *_: seen.append("after"))
    ours.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    ours.register_state_dict_post_hook(lambda _, saved: seen.append("saved"))
    ours.register_load_state_dict_pre_hook(lambda _, loaded: seen.append("loading"))
    ours.register_load_state_dict_post_hook(
        lambda o: seen.append(f"loaded {float(o.state[param]['step'])}")
    )

    def closure() -> float:
        ours.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert ours.step(closure) > 0.0
    ours.load_state_dict(ours.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded 1.0"]


def test_names_are_in_messages() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    ours = offloaded(list(embedding.named_parameters()))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse[\s\S]*'weight' \(#0 in group 0\)"):
        ours.step()


@pytest.mark.parametrize("offload_gradients", [False, True])
def test_a_step_that_is_refused_has_stepped_nothing(offload_gradients: bool) -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params, offload_gradients=offload_gradients)
    take(ours, range(2))
    good = ours.state[params[-1]].pop("exp_avg_sq_row")  # of the last batch
    masters = [m.detach().clone() for m in masters_of(ours)]
    before = [p.detach().clone() for p in params]
    give(params, grads_of(params, 2))
    with pytest.raises(ValueError, match="exp_avg_sq_row"):
        ours.step()
    assert all(map(same_bits, masters_of(ours), masters))
    assert all(map(same_bits, params, before))
    ours.state[params[-1]]["exp_avg_sq_row"] = good
    if not offload_gradients:  # what has no gradient any more is not stepped
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None
        ours.step()
        assert all(map(same_bits, params, before))
        for p, g in zip(params, grads, strict=True):
            p.grad = g
    # Put right, it goes on as if nothing had been.
    other = offloaded(stepping.make_params(SHAPES, BF16))
    ours.step()
    take(other, range(3))
    assert all(map(same_bits, params, params_of(other)))


def test_a_count_that_counts_no_steps_is_refused_before_anything_is_stepped() -> None:
    params = stepping.make_params(SHAPES, BF16)
    ours = offloaded(params)
    take(ours, range(3))
    ours.state[params[-1]]["step"].fill_(1.5)
    masters = [m.detach().clone() for m in masters_of(ours)]
    give(params, grads_of(params, 3))
    with stepping.assert_untouched(ours), pytest.raises(ValueError, match="a count of steps"):
        ours.step()
    assert all(map(same_bits, masters_of(ours), masters))


def test_no_gradient_is_used_twice() -> None:
    """Where something breaks in the middle of a step, the next one takes the rest."""
    params, others = (stepping.make_params(SHAPES, BF16) for _ in range(2))
    ours: Any = offloaded(params, offload_gradients=True, use_ema=True)
    other = offloaded(others, use_ema=True)
    take(ours, range(2))
    take(other, range(3))
    give(params, grads_of(params, 2))
    whole, calls = ours._host._step_some, 0

    def broken(some: Sequence[Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        whole(some)

    ours._host._step_some = broken
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    assert {float(ours.state[p]["step"]) for p in params} == {2.0, 3.0}
    ours._host._step_some = whole
    ours.step()
    stepping.assert_same_optimizers(ours, other)


def test_distributed_parameters_are_refused() -> None:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh))
        with pytest.raises(TypeError, match=r"'w' .* is a DTensor[\s\S]*CPUOffloadPolicy"):
            CPUOffload([("w", param)], Adafactor)
    finally:
        destroy_process_group()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), RuntimeError, "complex"),
        (lambda: torch.ones(3, device="meta"), RuntimeError, "'w' .* meta device"),
        (lambda: torch.ones(3, dtype=torch.float8_e5m2), TypeError, "'w' .*has dtype torch.float8"),
    ],
)
def test_parameters_that_cannot_be_offloaded(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        CPUOffload([("w", torch.nn.Parameter(make()))], Adafactor)


def test_arguments_that_make_no_sense() -> None:
    params = stepping.make_params(SHAPES, BF16)
    with pytest.raises(TypeError, match="optimizer_class must be a dialect"):
        CPUOffload(params, torch.optim.Adafactor)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="master_dtype"):
        CPUOffload(params, Adafactor, master_dtype=torch.int8)
    with pytest.raises(ValueError, match="Learning rate"):
        CPUOffload(params, Adafactor, lr=-1.0)
    with pytest.raises(RuntimeError, match="backend='triton' was asked for, but"):
        take(CPUOffload(params, Adafactor, backend="triton"), range(1))


def test_the_amp_protocol() -> None:
    params, slow_params = (stepping.make_params(SHAPES, F16) for _ in range(2))
    ours = offloaded(params, fused=True)
    slow = SlowWay(slow_params, HF)
    assert ours._step_supports_amp_scaling
    for step, found in ((0, 0.0), (1, 1.0), (2, 0.0)):
        grads = grads_of(params, step)
        give(params, [g * 4 for g in grads])
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(found)
        ours.step()
        del ours.grad_scale, ours.found_inf
        ours.zero_grad()
        if not found:
            slow.step(grads)
        assert all(map(same_bits, params, slow.params)), f"step {step}"
    moved = offloaded(params, offload_gradients=True)
    moved.found_inf = torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="GradScaler"):
        moved.step()


def test_a_table_of_the_plan() -> None:
    ours = offloaded(stepping.make_params(SHAPES, BF16))
    assert "17x23" in ours.explain()
    take(ours, range(1))
    assert ours.metrics()["#0"].param_rms is not None


# --- copies that take their time -----------------------------------------------------------------


class LateLane(offload.Lane):
    """A device that copies only when it is waited for: as late as one may."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.log: list[Tensor] = []

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.queue.append((to, source))

    def mark(self) -> Any:
        return LateEvent(self, len(self.log) + len(self.queue))

    def catch_up(self, count: int) -> None:
        with torch.no_grad():
            while self.queue and len(self.log) < count:
                to, source = self.queue.pop(0)
                to.copy_(source)
                self.log.append(source.clone())


class LateEvent:
    def __init__(self, lane: LateLane, count: int) -> None:
        self.lane, self.count = lane, count

    def synchronize(self) -> None:
        self.lane.catch_up(self.count)


@pytest.mark.parametrize("offload_gradients", [False, True])
@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_late_copies_are_waited_for(
    extras: dict[str, Any], offload_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients before they are used, weights before their mirrors are written again."""
    monkeypatch.setattr(offload, "Lane", LateLane)
    shapes = ((7,), (6, 5), (17, 23))
    (idle,) = stepping.make_params(((3,),), BF16)
    params, slow_params = (stepping.make_params(shapes, BF16) for _ in range(2))
    ours: Any = offloaded([*params, idle], offload_gradients=offload_gradients, **extras)
    slow = SlowWay(slow_params, HF, **extras)
    wanted: list[Tensor] = []
    for step in range(4):
        parts = [grads_of(params, 2 * step + part) for part in range(2)]
        for part in parts:
            for p, g in zip(params, part, strict=True):
                p.grad = g.clone() if p.grad is None else p.grad + g
                for hook in (p._post_accumulate_grad_hooks or {}).values():
                    hook(p)
        ours.step()
        for p in params:
            p.grad = None
        slow.step([a + b for a, b in zip(*parts, strict=True)])
        wanted += [p.detach().clone() for p in slow.params]
        # The version that a copy gives a parameter is given when it is asked for.
        for pair in ours._pairs.values():
            pair.note()
    _, back = ours._lanes_of(params[0])
    assert len(back.queue) == len(shapes)  # nobody has waited for the last ones
    back.catch_up(len(wanted))
    # Each value that a parameter ever had was sent, and none twice.
    sent, expected = (
        sorted(v.view(torch.int16).numpy().tobytes() for v in some) for some in (back.log, wanted)
    )
    assert sent == expected
    assert all(map(same_bits, params, slow.params))


def test_averages_wait_for_late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "Lane", LateLane)
    params = stepping.make_params(((6, 5),), BF16)
    ours: Any = offloaded(params, use_ema=True, ema_momentum=0.5, lr=0.1)
    take(ours, range(2))
    stepped = masters_of(ours)[0].detach().to(BF16)
    ours.finalize_variable_values()
    _, back = ours._lanes_of(params[0])
    assert [same_bits(sent, stepped) for sent in back.log] == [False, True]
    back.catch_up(3)
    assert same_bits(params[0], ours.state[params[0]]["average"].to(BF16))
    assert not same_bits(params[0], stepped)


def test_a_steady_step_allocates_nothing_big() -> None:
    params = stepping.make_params(((300, 200), (70_000,)), BF16)
    ours = offloaded(params)
    if "cpp" not in ours.explain():
        pytest.skip("the reference allocates what it likes")
    take(ours, range(3))
    give(params, grads_of(params, 3))
    with torch.profiler.profile(profile_memory=True) as profile:
        ours.step()
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert allocated < 10_000, f"{allocated} bytes; a parameter has 120,000"
