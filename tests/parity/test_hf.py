"""dialects.hf.Adafactor against transformers.optimization.Adafactor, and without its bugs."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch

from fused_adafactor.dialects.hf import Adafactor
from tests import oracle, peers, stepping
from tests.stepping import TOLERANCES

pytestmark = pytest.mark.parity

STEPS = 14
F64 = torch.float64
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)

MANUAL = {"lr": 0.02, "relative_step": False, "scale_parameter": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "warmup": {"warmup_init": True},
    "no_scale": {"scale_parameter": False},
    "warmup_no_scale": {"warmup_init": True, "scale_parameter": False},
    "manual": MANUAL,
    "manual_scaled": {"lr": 0.05, "relative_step": False},
    "zero_lr": {"lr": 0.0, "relative_step": False, "weight_decay": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "momentum": {"beta1": 0.9},
    "momentum_zero": {"beta1": 0.0},
    "momentum_manual": {**MANUAL, "beta1": 0.8, "weight_decay": 0.05},
    "clip_threshold": {"clip_threshold": 0.5},
    "decay_rate": {"decay_rate": -0.5},
    "no_memory": {"decay_rate": 0.0},
    "coarse_eps": {"eps": (1e-2, 0.5)},
    "zero_eps2": {"eps": (1e-30, 0.0)},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def peer_class() -> Any:
    """transformers' class; skips where it is not installed."""
    return type(peers.make_peer("hf", [torch.ones(1)]).optimizer)


def schedule_class() -> Any:
    """transformers' proxy schedule."""
    peers.require_peer("hf")
    from transformers.optimization import AdafactorSchedule

    return AdafactorSchedule


def pair(params: list[torch.nn.Parameter], **options: Any) -> tuple[Any, Any]:
    """Ours and transformers' over copies of the same parameters."""
    ours = Adafactor(stepping.clone_params(params), **copy.deepcopy(options))
    theirs = peer_class()(stepping.clone_params(params), **copy.deepcopy(options))
    return ours, theirs


def step_both(ours: Any, theirs: Any, steps: range, scale: float = 1.0) -> None:
    for optimizer in (ours, theirs):
        stepping.take_steps(optimizer, len(steps), steps.start, scale)


# --- the same numbers ----------------------------------------------------------------------------


@DTYPES
@ALL_OPTIONS
def test_parameters_and_state_agree(dtype, options):
    ours, theirs = pair(stepping.make_params(dtype=dtype), **options)
    for start in range(0, STEPS, 2):
        step_both(ours, theirs, range(start, start + 2))
        stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])
        for mine, their_state in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert set(mine) == set(their_state)


@DTYPES
@ALL_OPTIONS
def test_agrees_with_the_oracle(dtype, options):
    params = stepping.make_params(dtype=dtype)
    ours = Adafactor(params, **options)
    judge = oracle.Oracle(oracle.hf_knobs(**options), params, dtype)
    keys = {
        "exp_avg_sq_row": "row_var",
        "exp_avg_sq_col": "col_var",
        "exp_avg_sq": "var",
        "exp_avg": "exp_avg",
    }
    for step in range(STEPS):
        before = [oracle.rms(p) for p in judge.params]
        judge.step(stepping.grad_values(params, step))
        stepping.take_steps(ours, 1, step)
    for p, expected, wanted, rms in zip(params, judge.params, judge.state, before, strict=True):
        what, state = str(tuple(p.shape)), ours.state[p]
        stepping.assert_close(p, expected, TOLERANCES[dtype], what)
        assert float(state["step"]) == STEPS
        assert float(state["RMS"]) == pytest.approx(rms, rel=TOLERANCES[dtype])
        for key in keys.keys() & state.keys():
            stepping.assert_close(state[key], wanted[keys[key]], TOLERANCES[dtype], key + what)
        assert {keys[key] for key in keys.keys() & state.keys()} == wanted.keys() - {"step"}


@DTYPES
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e4])
def test_gradients_of_any_size_agree(dtype, scale):
    ours, theirs = pair(stepping.make_params(dtype=dtype))
    step_both(ours, theirs, range(STEPS), scale)
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


def test_steps_without_a_gradient_count_per_parameter():
    ours, theirs = pair(stepping.make_params(dtype=F64), beta1=0.9)
    for step in range(STEPS):
        for optimizer in (ours, theirs):
            params = stepping.params_of(optimizer)
            grads = stepping.grad_values(params, step)
            for index, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if (step + index) % 3 == 0 else g
            optimizer.step()
    stepping.assert_close_optimizers(ours, theirs, 1e-12)
    assert len({float(s["step"]) for s in ours.state.values()}) > 1


def test_groups_with_their_own_options():
    params = stepping.make_params([(6, 5), (7,), (4, 3, 5), (3, 4)], F64)
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "relative_step": False},
        {"weight_decay": 0.2, "warmup_init": True},
        {"eps": (1e-3, 1e-1), "beta1": 0.5},
        {"lr": 0.3},  # relative: not used
    ]
    built = []
    for cls in (Adafactor, peer_class()):
        copies = stepping.clone_params(params)
        built.append(cls([{**g, "params": [p]} for g, p in zip(groups, copies, strict=True)]))
    step_both(*built, range(STEPS))
    stepping.assert_close_optimizers(*built, 1e-12)


def test_transposed_and_channels_last_parameters():
    drawn = stepping.make_params([(5, 6), (4, 6, 3, 2)], F64)
    params = [
        torch.nn.Parameter(drawn[0].detach().t()),
        torch.nn.Parameter(drawn[1].detach().to(memory_format=torch.channels_last)),
    ]
    ours, theirs = pair(params)
    step_both(ours, theirs, range(STEPS))
    stepping.assert_close_optimizers(ours, theirs, 1e-12)


def test_a_stale_lr_in_a_relative_group_changes_nothing():
    plain, theirs = pair(stepping.make_params(dtype=F64), weight_decay=0.1)
    for value in (0.7, torch.tensor(0.7)):
        plain.param_groups[0]["lr"] = value
        step_both(plain, theirs, range(3))
    stepping.assert_close_optimizers(plain, theirs, 1e-12)


@DTYPES
def test_transformers_own_test(dtype):
    w = torch.nn.Parameter(torch.tensor([0.1, -0.2, -0.1], dtype=dtype))
    target = torch.tensor([0.4, 0.2, -0.5], dtype=dtype)
    optimizer = Adafactor(
        [w],
        lr=1e-2,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=None,
        weight_decay=0.0,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )
    for _ in range(1000):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(w, target).backward()
        optimizer.step()
    assert (w - target).abs().max() < 1e-2


# --- checkpoints ---------------------------------------------------------------------------------


def resumed(cls: Any, source: Any, **options: Any) -> Any:
    """An optimizer of another class that goes on from the parameters and the state of `source`."""
    target = cls(stepping.clone_params(stepping.params_of(source)), **copy.deepcopy(options))
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    return target


@DTYPES
@ALL_OPTIONS
def test_goes_on_from_the_peers_checkpoint(dtype, options):
    _, theirs = pair(stepping.make_params(dtype=dtype), **options)
    stepping.take_steps(theirs, 5)
    ours = resumed(Adafactor, theirs, **options)
    step_both(ours, theirs, range(5, STEPS))
    stepping.assert_close_optimizers(ours, theirs, TOLERANCES[dtype])


@DTYPES
@ALL_OPTIONS
def test_the_peer_goes_on_from_our_checkpoint(dtype, options):
    ours, _ = pair(stepping.make_params(dtype=dtype), **options)
    stepping.take_steps(ours, 5)
    theirs = resumed(peer_class(), ours, **options)
    step_both(ours, theirs, range(5, STEPS))
    # transformers multiplies 1e-6 by the step, which in our checkpoint is a float32 tensor.
    tolerance = 3e-6 if options.get("warmup_init") else TOLERANCES[dtype]
    stepping.assert_close_optimizers(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "weight_decay": 0.1}], ids=str)
def test_low_precision_resumes_bit_by_bit(dtype, options):
    """Peer: load_state_dict casts the float32 state to the dtype of the parameter."""
    ours = Adafactor(stepping.make_params(dtype=dtype), **options)
    stepping.take_steps(ours, 5)
    again = resumed(Adafactor, ours, **options)
    for optimizer in (ours, again):
        stepping.take_steps(optimizer, 5, start=5)
    stepping.assert_same_optimizers(again, ours)


def test_the_peers_bfloat16_checkpoint_is_loaded_bit_by_bit():
    _, theirs = pair(stepping.make_params(dtype=torch.bfloat16), beta1=0.9)
    stepping.take_steps(theirs, 5)
    ours = resumed(Adafactor, theirs, beta1=0.9)
    for mine, wanted in zip(ours.state.values(), theirs.state.values(), strict=True):
        for key in wanted.keys() - {"step"}:
            assert stepping.same_bits(mine[key], wanted[key]), key
        assert float(mine["step"]) == wanted["step"] == 5


def test_low_precision_keeps_float32_state_and_moves_as_the_peer_does():
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = pair(stepping.make_params(dtype=dtype), **MANUAL, beta1=0.9)
        step_both(ours, theirs, range(STEPS))
        for p, q in zip(stepping.params_of(ours), stepping.params_of(theirs), strict=True):
            assert p.dtype is dtype
            # Both compute in float32 and round once a step; a tie may fall either way.
            stepping.assert_close(p, q, torch.finfo(dtype).eps, str(tuple(p.shape)))
            state = ours.state[p]
            assert all(state[key].dtype is torch.float32 for key in state)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"warmup_init": True}, {"scale_parameter": False}, {"lr": 0.03, "relative_step": False}],
    ids=str,
)
def test_adafactor_schedule_reports_what_the_peers_reports(options):
    pairs = pair(stepping.make_params(dtype=F64), **options)
    schedules = [schedule_class()(optimizer, initial_lr=0.25) for optimizer in pairs]
    assert schedules[0].get_last_lr() == [0.25]
    for step in range(STEPS):
        lrs = []
        for optimizer, schedule in zip(pairs, schedules, strict=True):
            stepping.take_steps(optimizer, 1, step)
            schedule.step()
            lrs.append(float(schedule.get_lr()[0]))
        assert lrs[0] == pytest.approx(lrs[1], rel=1e-12)
    stepping.assert_close_optimizers(*pairs, 1e-12)


def test_adafactor_schedule_before_the_first_step():
    """Peer: KeyError 'step', as soon as there is a gradient."""
    p, q = stepping.make_params([(3, 4), (2,)])
    optimizer = Adafactor([{"params": [p]}, {"params": [q], "warmup_init": True}])
    schedule = schedule_class()(optimizer)
    for param in (p, q):
        param.grad = torch.ones_like(param)
    assert schedule.get_lr() == pytest.approx([1e-3 * 1e-2, 1e-3 * 1e-6])
    assert not schedule.optimizer.state[p]
    optimizer.step()  # the empty entry that the reading has left is not taken for a state
    assert float(optimizer.state[p]["step"]) == 1


def test_adafactor_schedule_that_comes_after_the_gradients():
    p = stepping.make_params([(3, 4)])[0]
    p.grad = torch.ones_like(p)
    schedule = schedule_class()(Adafactor([p]))
    assert schedule.get_last_lr() == pytest.approx([1e-5])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 0.5),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    ],
    ids=["lambda", "step", "cosine"],
)
def test_a_scheduler_of_no_lr_is_refused_by_name(make):
    """Peer: TypeError, None times a number."""
    optimizer = Adafactor(stepping.make_params([(3, 4)]))
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(ValueError, match=r"lr of param group 0 is None.*relative_step=False"),
    ):
        make(optimizer)
    stepping.take_steps(optimizer, 1)
    assert schedule_class()(optimizer).get_last_lr()[0] > 0.0


def test_torch_schedulers_scale_a_given_lr():
    pairs = pair(stepping.make_params(dtype=F64), **MANUAL)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in pairs]
    for step in range(STEPS):
        for optimizer, schedule in zip(pairs, schedules, strict=True):
            stepping.take_steps(optimizer, 1, step)
            schedule.step()
    assert pairs[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.7**STEPS)
    stepping.assert_close_optimizers(*pairs, 1e-12)


def test_tensor_lr():
    options = {**MANUAL, "lr": torch.tensor(0.02, dtype=F64)}
    ours, theirs = pair(stepping.make_params(dtype=F64), **options)
    step_both(ours, theirs, range(STEPS))
    stepping.assert_close_optimizers(ours, theirs, 1e-12)


def test_static_methods_agree_with_the_peers():
    cls, rng = peer_class(), torch.Generator().manual_seed(1)
    for relative, warmup, scaled in ((1, 0, 1), (1, 1, 1), (1, 1, 0), (0, 0, 1), (0, 0, 0)):
        for step, rms in ((1, 0.3), (7, torch.tensor(1e-5)), (40_000, torch.tensor(2.0))):
            group = {
                "lr": 0.03,
                "eps": (1e-30, 1e-3),
                "relative_step": bool(relative),
                "warmup_init": bool(warmup),
                "scale_parameter": bool(scaled),
                "beta1": None,
            }
            state = {"step": step, "RMS": rms}
            expected = pytest.approx(float(cls._get_lr(group, state)), rel=1e-6)
            assert float(Adafactor._get_lr(group, state)) == expected
            state["step"] = torch.tensor(float(step))
            assert float(Adafactor._get_lr(group, state)) == expected
    for shape in ((), (3,), (2, 3), (2, 3, 4)):
        for beta1 in (None, 0.0, 0.9):
            options = ({"beta1": beta1}, torch.Size(shape))
            assert Adafactor._get_options(*options) == cls._get_options(*options)
    x = torch.randn(3, 5, generator=rng)
    assert torch.equal(Adafactor._rms(x), cls._rms(x))


# --- the peer's bugs -----------------------------------------------------------------------------


def test_the_closure_has_gradients():
    """Peer: 'element 0 of tensors does not require grad', the closure runs under no_grad."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Adafactor([w], lr=0.1, relative_step=False)

    def closure() -> float:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 5.0
    assert closure() < 5.0


def test_complex_parameters_are_refused():
    """Peer: taken, and something else is done than one would think."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="Adafactor does not support complex"):
        Adafactor([p]).step()


def test_sparse_gradients_are_refused_with_the_peers_text():
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="Adafactor does not support sparse gradients"):
        Adafactor([p]).step()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_tensors_without_elements_are_counted(shape):
    p = torch.nn.Parameter(torch.empty(shape))
    p.grad = torch.empty(shape)
    optimizer = Adafactor([p], beta1=0.9, weight_decay=0.1)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1
    assert float(optimizer.state[p]["RMS"]) == 0


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_gradients_move_nothing(dtype):
    params = stepping.make_params([(3, 4), (5,), (), (2, 3, 4)], dtype=dtype)
    before = stepping.clone_params(params)
    optimizer = Adafactor(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(stepping.same_bits(p, q) for p, q in zip(params, before, strict=True))
    for p in params:  # and the step after that is finite
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


def test_the_group_lr_does_not_compound():
    """fairseq: group['lr'] is overwritten with the scaled step and scaled again."""
    optimizer = Adafactor(stepping.make_params([(3, 4), (5,)]), lr=0.1, relative_step=False)
    stepping.take_steps(optimizer, 5)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_making_a_distributed_state_dict_changes_nothing():
    """Peer: a step with relative_step ignores lr=0, so the weights decay and the step is 1."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: TID251

    model = torch.nn.Linear(4, 3)
    before = stepping.clone_params(model.parameters())
    optimizer = Adafactor(model.parameters(), weight_decay=0.1)
    saved = get_optimizer_state_dict(model, optimizer)
    assert float(saved["state"]["weight"]["step"]) == 0
    assert saved["state"]["weight"]["exp_avg_sq_row"].shape == (3,)
    assert optimizer.param_groups[0]["lr"] is None
    for p, q in zip(model.parameters(), before, strict=True):
        assert stepping.same_bits(p, q)


def test_a_zero_step_of_a_stepped_optimizer_is_counted():
    """Only a fresh one takes lr = 0 and zero gradients for the making of a state dict."""
    p = stepping.make_params([(3, 4)])[0]
    optimizer = Adafactor([p], lr=0.0, relative_step=False)
    for step, scale in enumerate((1.0, 0.0), start=1):
        p.grad = torch.full_like(p, scale)
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == step


def test_what_is_skipped_keeps_its_rms():
    p, q = stepping.make_params([(3, 4), (5,)])
    optimizer = Adafactor([p, q], nonfinite="skip", scale_parameter=False)
    stepping.take_steps(optimizer, 1)
    kept = optimizer.state[p]["RMS"].clone()
    p.grad, q.grad = torch.full_like(p, math.nan), torch.ones_like(q)
    moved = oracle.rms(q.detach())
    optimizer.step()
    assert stepping.same_bits(optimizer.state[p]["RMS"], kept)
    assert float(optimizer.state[q]["RMS"]) == pytest.approx(moved, rel=1e-6)
    assert [float(optimizer.state[x]["step"]) for x in (p, q)] == [1.0, 2.0]


# --- arguments -----------------------------------------------------------------------------------


def test_signature_is_the_peers():
    import inspect

    ours = list(inspect.signature(Adafactor).parameters.values())[:-1]
    theirs = list(inspect.signature(peer_class()).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


def test_groups_have_the_peers_keys():
    ours, theirs = pair(stepping.make_params([(3,)]))
    assert theirs.param_groups[0].keys() <= ours.param_groups[0].keys()
    assert all(
        ours.param_groups[0][key] == theirs.param_groups[0][key]
        for key in theirs.param_groups[0].keys() - {"params"}
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": 0.1}, ValueError, "Cannot combine manual `lr` and `relative_step=True` options"),
        (
            {"lr": 0.1, "relative_step": False, "warmup_init": True},
            ValueError,
            "`warmup_init=True` requires `relative_step=True`",
        ),
        ({"relative_step": False}, ValueError, "lr is None, but relative_step=False"),
        ({"lr": -1.0, "relative_step": False}, ValueError, "lr should be >= 0"),
        (
            {"lr": torch.ones(2), "relative_step": False},
            ValueError,
            "Tensor lr must be 1-element",
        ),
        ({"lr": "0.1", "relative_step": False}, TypeError, "lr must be a number"),
        ({"eps": (-1.0, 1e-3)}, ValueError, r"eps\[0\] should be >= 0"),
        ({"eps": (None, 1e-3)}, ValueError, r"eps\[0\] should be >= 0"),
        ({"eps": (1e-30, math.nan)}, ValueError, r"eps\[1\] should be >= 0"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold should be > 0"),
        ({"decay_rate": 0.8}, ValueError, "decay_rate should be <= 0"),
        ({"beta1": 1.0}, ValueError, r"beta1 should be None or in \[0, 1\)"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay should be >= 0"),
        ({"betas": (0.9, 0.99)}, TypeError, "unexpected keyword argument 'betas'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        Adafactor([torch.nn.Parameter(torch.ones(3))], **options)


def test_the_peer_raises_the_same_texts():
    params = [torch.nn.Parameter(torch.ones(3))]
    for options in ({"lr": 0.1}, {"lr": 0.1, "relative_step": False, "warmup_init": True}):
        texts = []
        for cls in (Adafactor, peer_class()):
            with pytest.raises(ValueError, match="relative_step") as error:
                cls(params, **options)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


def test_a_missing_lr_is_found_in_every_group():
    p, q = stepping.make_params([(3,), (4,)])
    with pytest.raises(ValueError, match="lr is None"):
        Adafactor([{"params": [p], "lr": 0.1}, {"params": [q]}], relative_step=False)
    optimizer = Adafactor(
        [{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}], relative_step=False
    )
    stepping.take_steps(optimizer, 1)
    optimizer.param_groups[1]["lr"] = None
    with (
        stepping.assert_untouched(optimizer),
        pytest.raises(ValueError, match="lr is None"),
    ):
        optimizer.step()


def test_copies_step_alike():
    import pickle

    optimizer = Adafactor(stepping.make_params(dtype=F64), beta1=0.9)
    stepping.take_steps(optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    stepping.take_steps(optimizer, 2, start=2)
    for other in copies:
        stepping.take_steps(other, 2, start=2)
        stepping.assert_same_optimizers(other, optimizer)
