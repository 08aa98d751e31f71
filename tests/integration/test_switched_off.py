"""Options that are changed between two steps, and what is left behind of what was there before."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, TORCH

pytestmark = pytest.mark.usefixtures("each_backend")

SHAPES = ((6, 5), (7,))


def test_accumulation_that_is_switched_off_leaves_nothing_in_the_next_gradient() -> None:
    optimizer, other = (HF(stepping.make_params(SHAPES, torch.float64)) for _ in range(2))
    stepping.take_steps(optimizer, 1)
    stepping.take_steps(other, 1)
    optimizer.param_groups[0]["gradient_accumulation_steps"] = 3
    for p in stepping.params_of(optimizer):
        p.grad = torch.full_like(p, 1e3)
    optimizer.step()  # call 2 of 3: only gathers
    optimizer.param_groups[0]["gradient_accumulation_steps"] = None
    for own in (*optimizer.state.values(), *other.state.values()):
        own["step"].fill_(2.0)
    for each in (optimizer, other):
        stepping.take_steps(each, 1, start=1)
    for p, q in zip(*map(stepping.params_of, (optimizer, other)), strict=True):
        assert stepping.same_bits(p, q)


def test_a_compensation_is_not_used_once_rounding_is_to_nearest() -> None:
    optimizer = HF(stepping.make_params(SHAPES, torch.bfloat16), rounding="kahan")
    stepping.take_steps(optimizer, 2)
    optimizer.param_groups[0]["rounding"] = "nearest"
    kept = [own["kahan"].clone() for own in optimizer.state.values()]
    other = HF(stepping.clone_params(stepping.params_of(optimizer)))
    other.load_state_dict(
        {
            **optimizer.state_dict(),
            "state": {
                n: {k: v for k, v in own.items() if k != "kahan"}
                for n, own in optimizer.state_dict()["state"].items()
            },
        }
    )
    for each in (optimizer, other):
        stepping.take_steps(each, 1, start=2)
    for p, q in zip(*map(stepping.params_of, (optimizer, other)), strict=True):
        assert stepping.same_bits(p, q)
    for own, before in zip(optimizer.state.values(), kept, strict=True):
        assert torch.equal(own["kahan"], before)


def test_a_first_moment_stays_as_it_is_while_it_is_switched_off() -> None:
    optimizer = HF(stepping.make_params(SHAPES), beta1=0.9)
    stepping.take_steps(optimizer, 2)
    before = [own["exp_avg"].clone() for own in optimizer.state.values()]
    optimizer.param_groups[0]["beta1"] = None
    stepping.take_steps(optimizer, 1, start=2)
    for own, moment in zip(optimizer.state.values(), before, strict=True):
        assert torch.equal(own["exp_avg"], moment)


def test_the_norm_is_forgotten_once_nobody_asks_for_it() -> None:
    optimizer = HF(stepping.make_params(SHAPES), max_grad_norm=1.0)
    stepping.take_steps(optimizer, 1)
    assert optimizer.grad_norm is not None
    optimizer.param_groups[0]["max_grad_norm"] = None
    stepping.take_steps(optimizer, 1, start=1)
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("partly", [False, True])
def test_loading_lets_go_of_the_old_state(partly: bool) -> None:
    optimizer = HF(stepping.make_params(SHAPES), beta1=0.9)
    stepping.take_steps(optimizer, 1)
    if partly:
        for p in stepping.params_of(optimizer):
            optimizer.step_param(p)
    old = [weakref.ref(own["exp_avg"]) for own in optimizer.state.values()]
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    assert optimizer.metrics() == {}


def test_metrics_follow_the_parameter_not_its_place() -> None:
    params = stepping.make_params([(3,), (3,), (3,)], torch.float64)
    optimizer = TORCH(params)
    for number, p in enumerate(params):
        p.data.fill_(number + 1.0)
        p.grad = torch.ones_like(p)
        optimizer.step_param(p)
    optimizer.step()
    optimizer.param_groups[0]["params"] = params[1:]
    found = optimizer.metrics()
    assert [round(found[label].param_rms) for label in ("#0", "#1")] == [2, 3]


def test_a_state_that_was_only_looked_at_is_not_made() -> None:
    """optimizer.state[p] leaves an empty entry."""
    params = stepping.make_params(SHAPES)
    optimizer = TORCH(params, use_ema=True)
    assert optimizer.state[params[1]] == {}
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert optimizer.state[params[1]] == {}


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if not d.counts_globally], ids=str)
def test_calls_without_a_gradient_overwrite_nothing(dialect: Any) -> None:
    """The average is due at every second update of a parameter, not at calls in between."""
    optimizer, other = (
        dialect(
            stepping.make_params(SHAPES, torch.float64),
            use_ema=True,
            ema_momentum=0.9,
            ema_overwrite_frequency=4,
        )
        for _ in range(2)
    )
    for each in (optimizer, other):
        stepping.take_steps(each, 3)
    param = stepping.params_of(optimizer)[0]
    before = param.detach().clone()
    for p in stepping.params_of(optimizer):
        p.grad = None
    stepping.params_of(optimizer)[1].grad = torch.zeros(7, dtype=torch.float64)
    optimizer.step()
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("key", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_a_threshold_that_is_no_number_is_refused(key: str) -> None:
    for dialect in (HF, KERAS):
        with pytest.raises(ValueError, match=f"{key} must be a number or None"):
            dialect(stepping.make_params(SHAPES), **{key: float("nan")})


@pytest.mark.parametrize("k", [2, 3])
def test_a_peers_count_is_one_of_updates(k: int) -> None:
    """And ours, with accumulation, one of calls: the next update is the peer's next step."""
    theirs = torch.optim.Adafactor(stepping.make_params(SHAPES, torch.float64))
    stepping.take_steps(theirs, 3)
    ours = TORCH(stepping.clone_params(stepping.params_of(theirs)), gradient_accumulation_steps=k)
    ours.load_state_dict(theirs.state_dict())
    assert {float(own["step"]) for own in ours.state.values()} == {3.0 * k}
    grads = stepping.grad_values(stepping.params_of(theirs), 3)
    for _ in range(k):
        for p, g in zip(stepping.params_of(ours), grads, strict=True):
            p.grad = g.clone()
        ours.step()
    stepping.take_steps(theirs, 1, start=3)
    for p, q in zip(*map(stepping.params_of, (ours, theirs)), strict=True):
        stepping.assert_close(p, q, 1e-12, "parameter")
    again = TORCH(stepping.make_params(SHAPES, torch.float64), gradient_accumulation_steps=k)
    again.load_state_dict(ours.state_dict())
    assert {float(own["step"]) for own in again.state.values()} == {4.0 * k}


def test_a_call_without_a_gradient_has_the_dtype_of_what_it_moves() -> None:
    """The average of a float32 parameter with float64 gradients is float64."""
    param = torch.nn.Parameter(torch.ones(6, 5))
    param.grad_dtype = None
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = HF([param, other], use_ema=True)
    param.grad = torch.ones(6, 5, dtype=torch.float64)
    other.grad = torch.ones(3)
    optimizer.step()
    param.grad = None
    optimizer.step()
    assert optimizer.state[param]["average"].dtype is torch.float64
