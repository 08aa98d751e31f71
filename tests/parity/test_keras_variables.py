"""dialects.keras.Adafactor: Keras' checkpoints and configurations, and ``apply``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fused_adafactor.dialects.keras import Adafactor
from tests import peers, stepping
from tests.parity.keras_pairs import (
    ALL_OPTIONS,
    DTYPES,
    F32,
    F64,
    LR,
    PEER_TOLERANCES,
    STEPS,
    assert_agree,
    assert_follows,
    halving,
    judge_from,
    keras_module,
    own_schedule,
    pair,
    saved,
    some_grads,
    take,
    take_both,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras"),  # Keras with a newer numpy
]


# --- checkpoints ---------------------------------------------------------------------------------


@DTYPES
@ALL_OPTIONS
def test_goes_on_from_kerass_checkpoint(dtype, options):
    original, theirs = pair(stepping.make_params(dtype=dtype), **options)
    take_both(original, theirs, range(5))
    ours = Adafactor([torch.nn.Parameter(p) for p in theirs.params()], **options)
    if not callable(options["learning_rate"]):
        ours.learning_rate = 0.875  # the saved one comes in its place
    ours.load_own_variables(saved(theirs.optimizer))
    assert_agree(ours, theirs, 0.0)
    judge = judge_from(ours, options, dtype)
    take_both(ours, theirs, range(5, STEPS))
    assert_agree(ours, theirs, PEER_TOLERANCES[dtype])
    for step in range(5, STEPS):
        judge.step(some_grads(stepping.params_of(ours), step))
    assert_follows(ours, judge, dtype)


@DTYPES
@ALL_OPTIONS
def test_keras_goes_on_from_our_checkpoint(dtype, options):
    ours = Adafactor(stepping.make_params(dtype=dtype), **options)
    stepping.take_steps(ours, 5)
    theirs = peers.make_peer("keras", stepping.params_of(ours), **options)
    theirs.optimizer.load_own_variables(saved(ours))
    assert_agree(ours, theirs, 0.0)
    take_both(ours, theirs, range(5, STEPS))
    assert_agree(ours, theirs, PEER_TOLERANCES[dtype])


@DTYPES
@ALL_OPTIONS
def test_own_checkpoints_go_on_exactly(dtype, options):
    ours = Adafactor(stepping.make_params(dtype=dtype), **options)
    for step in range(5):
        take(ours, some_grads(stepping.params_of(ours), step, with_none=True))
    by_keras, by_torch = (
        Adafactor(stepping.clone_params(stepping.params_of(ours)), **options) for _ in range(2)
    )
    by_keras.load_own_variables(saved(ours))
    by_torch.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (ours, by_keras, by_torch):
        stepping.take_steps(optimizer, 5, start=5)
    stepping.assert_same_optimizers(by_torch, ours)
    for p, q in zip(stepping.params_of(by_keras), stepping.params_of(ours), strict=True):
        assert stepping.same_bits(p, q)


def test_the_average_of_an_unstepped_parameter_is_the_parameter():
    ours, theirs = pair(stepping.make_params([(3, 4), (5,)], F64), **LR, use_ema=True)
    for step in range(3):
        grads = [some_grads(stepping.params_of(ours), step)[0], None]
        take(ours, grads)
        theirs.step(grads)
    assert_agree(ours, theirs, PEER_TOLERANCES[F64])


def test_bfloat16_resumes_bit_by_bit():
    for options in ({}, {"use_ema": True}, {"gradient_accumulation_steps": 2}):
        ours = Adafactor(stepping.make_params(dtype=torch.bfloat16), 2.0**-4, **options)
        stepping.take_steps(ours, 5)
        by_torch, by_keras = (
            Adafactor(stepping.clone_params(stepping.params_of(ours)), 2.0**-4, **options)
            for _ in range(2)
        )
        by_torch.load_state_dict(copy.deepcopy(ours.state_dict()))
        by_keras.load_own_variables(saved(ours))
        for optimizer in (ours, by_torch, by_keras):
            stepping.take_steps(optimizer, 5, start=5)
        for other in (by_torch, by_keras):
            stepping.assert_same_optimizers(other, ours)


def test_kerass_bfloat16_checkpoint_is_taken():
    ours, theirs = pair(stepping.make_params(dtype=F32, shapes=[(4, 3), (5,)]), **LR)
    take_both(ours, theirs, range(3))
    store = saved(theirs.optimizer)
    ml_dtypes = peers.require_module("ml_dtypes")
    low = {key: a.astype(ml_dtypes.bfloat16) if a.ndim else a for key, a in store.items()}
    ours.load_own_variables(low)
    assert_agree(ours, theirs, 2.0**-8)


@pytest.mark.parametrize("spoil", ["missing", "one_more", "shape", "iteration"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(spoil):
    """Keras warns of the number of variables, and starts anew."""
    ours = Adafactor(stepping.make_params([(4, 3), (5,)]), **LR)
    stepping.take_steps(ours, 2)
    store = saved(ours)
    if spoil == "missing":
        del store["7"]
    elif spoil == "one_more":
        store["8"] = store["7"]
    elif spoil == "shape":
        store["2"] = store["3"]
    else:
        store["0"] = store["3"]
    with stepping.assert_untouched(ours), pytest.raises(ValueError, match=r"saved|state 'r'"):
        ours.load_own_variables(store)


def test_a_loaded_learning_rate_is_every_groups():
    """Keras has one; a function is nobody's number, so it stays."""
    ours, other = (
        Adafactor(
            [
                {"params": [p], "learning_rate": lr}
                for p, lr in zip(stepping.make_params([(3,), (4,), (5,)]), rates, strict=True)
            ]
        )
        for rates in ((0.5, 0.25, 0.125), (1.0, 2.0, own_schedule(halving)))
    )
    schedule = other.param_groups[2]["lr"]
    other.load_own_variables(saved(ours))
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.5, schedule]


def test_factored_weights_have_no_velocity():
    """Keras keeps one in full size, so its Adafactor saves no memory at all."""
    p = torch.nn.Parameter(torch.randn(512, 256))
    ours = Adafactor([p])
    stepping.take_steps(ours, 1)
    assert {key: tuple(v.shape) for key, v in ours.state[p].items()} == {"r": (512,), "c": (256,)}


def test_copies_step_alike_and_keep_the_exclusions():
    options = {"learning_rate": 2.0**-4, "weight_decay": 0.5, "use_ema": True, "name": "mine"}
    ours = Adafactor(stepping.make_params(dtype=F64), **options)
    ours.exclude_from_weight_decay(stepping.params_of(ours)[::2])
    stepping.take_steps(ours, 2)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    loaded = Adafactor(stepping.clone_params(stepping.params_of(ours)), **options)
    loaded.load_state_dict(ours.state_dict())
    stepping.take_steps(ours, 2, start=2)
    for other in (*copies, loaded):
        assert other.name == "mine"
        stepping.take_steps(other, 2, start=2)
        stepping.assert_same_optimizers(other, ours)


# --- configuration -------------------------------------------------------------------------------


@ALL_OPTIONS
def test_configurations_pass_both_ways(options):
    keras = keras_module()
    if callable(options["learning_rate"]):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
        options = {**options, "learning_rate": schedule}
    ours = Adafactor(stepping.make_params([(3,)]), **options, name="mine")
    theirs = keras.optimizers.Adafactor(**options, name="mine")
    assert ours.get_config() == theirs.get_config()
    rebuilt = keras.optimizers.Adafactor.from_config(ours.get_config())
    assert rebuilt.get_config() == theirs.get_config()
    again = Adafactor.from_config(theirs.get_config(), stepping.make_params([(3,)]), seed=7)
    assert again.get_config() == theirs.get_config()
    assert again.param_groups[0]["seed"] == 7
    assert float(again.learning_rate) == float(theirs.learning_rate)


def test_a_function_stays_in_the_configuration():
    ours = Adafactor(stepping.make_params([(3,)]), halving)
    assert ours.get_config()["learning_rate"] is halving


# --- apply ---------------------------------------------------------------------------------------


def test_apply_is_a_step_with_given_gradients():
    ours, stepped = (Adafactor(stepping.make_params(dtype=F64), **LR) for _ in range(2))
    params = stepping.params_of(ours)
    left = [torch.full_like(p, 7.0) if i % 2 else None for i, p in enumerate(params)]
    for p, g in zip(params, left, strict=True):
        p.grad = g
    for step in range(3):
        grads = some_grads(params, step, with_none=True)
        take(stepped, grads)
        # in another order, as arrays
        pairs = [(None if g is None else g.numpy(), p) for g, p in zip(grads, params, strict=True)]
        assert float(ours.apply_gradients(reversed(pairs))) == step + 1
    for p, q in zip(params, stepping.params_of(stepped), strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is g for p, g in zip(params, left, strict=True))
    ours.apply([])  # Keras: a no-op
    assert ours.iterations == 3


def test_apply_casts_to_the_parameter():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    Adafactor([p], 0.5).apply([torch.ones(3, dtype=F64)])
    assert p.dtype is torch.bfloat16
    assert p[0].item() < 1.0


def test_apply_refuses_as_keras_does():
    p, q = stepping.make_params([(3, 4), (5,)])
    ours = Adafactor([p, q])
    stepping.take_steps(ours, 1)
    stranger = torch.nn.Parameter(torch.ones(5))
    with stepping.assert_untouched(ours):
        with pytest.raises(ValueError, match=r"must match `optimizer\.variables` one-to-on"):
            ours.apply([torch.ones(3, 4)])
        with pytest.raises(ValueError, match="No gradients provided for any variable"):
            ours.apply([None, None])
        with pytest.raises(ValueError, match=r"Unknown variable: of shape \(5,\)"):
            ours.apply_gradients([(torch.ones(5), stranger)])
        with pytest.raises(RuntimeError, match="assign a gradient of size"):
            ours.apply([torch.ones(3, 4), torch.ones(6)])


def test_a_step_without_gradients_is_a_no_op():
    ours = Adafactor(stepping.make_params([(3, 4)]), use_ema=True)
    stepping.take_steps(ours, 2)
    ours.zero_grad()
    with stepping.assert_untouched(ours):
        ours.step()


def test_scaled_loss():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    plain = torch.nn.Parameter(w.detach().clone())
    scaled, unscaled = Adafactor([w], loss_scale_factor=1024.0), Adafactor([plain])
    assert scaled.scale_loss(torch.tensor(2.0)) == 2048.0
    assert unscaled.scale_loss(torch.tensor(2.0)) == 2.0
    for _ in range(3):
        for optimizer, p in ((scaled, w), (unscaled, plain)):
            optimizer.zero_grad()
            optimizer.scale_loss(p.square().sum()).backward()
            optimizer.step()
    assert torch.equal(w, plain)


def test_closure_has_gradients():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ours = Adafactor([w], 0.5)

    def closure() -> float:
        ours.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.item()

    assert ours.step(closure) == 5.0
    assert closure() < 5.0
