"""dialects.keras.Adafactor against keras.optimizers.Adafactor, and without its bugs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.dialects.keras import Adafactor
from tests import oracle, peers, stepping
from tests.parity.keras_pairs import (
    ALL_OPTIONS,
    DTYPES,
    EXCLUDED,
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
    some_grads,
    take,
    take_both,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:keras"),  # Keras with a newer numpy
]


# --- the same numbers ----------------------------------------------------------------------------


@DTYPES
@ALL_OPTIONS
def test_parameters_and_state_agree(dtype, options):
    ours, theirs = pair(stepping.make_params(dtype=dtype), **options)
    for start in range(0, STEPS, 2):
        take_both(ours, theirs, range(start, start + 2))
        assert_agree(ours, theirs, PEER_TOLERANCES[dtype])


@DTYPES
@ALL_OPTIONS
@pytest.mark.parametrize("with_none", [False, True], ids=["all", "some_none"])
def test_agrees_with_the_oracle(dtype, options, with_none):
    ours = Adafactor(stepping.make_params(dtype=dtype), **options)
    params = stepping.params_of(ours)
    judge = judge_from(ours, options, dtype)
    for step in range(STEPS):
        grads = some_grads(params, step, with_none)
        judge.step(grads)
        take(ours, grads)
        assert_follows(ours, judge, dtype)
    assert float(ours.param_groups[0]["step"]) == STEPS


@pytest.mark.parametrize("options", [{}, {"use_ema": True, "ema_momentum": 0.5}], ids=str)
@pytest.mark.parametrize("accumulation", [None, 2])
def test_missing_gradients_agree(options, accumulation):
    """t is global, the average moves without gradient, what was gathered is lost at an update."""
    ours, theirs = pair(
        stepping.make_params(dtype=F64), **LR, **options, gradient_accumulation_steps=accumulation
    )
    take_both(ours, theirs, range(STEPS), with_none=True)
    assert_agree(ours, theirs, PEER_TOLERANCES[F64])


@DTYPES
def test_exclusion_from_weight_decay_agrees(dtype):
    params = stepping.make_params(dtype=dtype)
    options = {"learning_rate": 2.0**-5, "weight_decay": 0.25}
    mask = [not excluded for excluded in EXCLUDED]
    ours, plain = (Adafactor(stepping.clone_params(params), **options) for _ in range(2))
    ours.exclude_from_weight_decay(
        [p for p, out in zip(stepping.params_of(ours), EXCLUDED, strict=True) if out]
    )
    theirs = peers.make_peer("keras", params, **options, decay_mask=mask)
    judge = oracle.Oracle(oracle.keras_knobs(**options, decay_mask=mask), params, dtype)
    for step in range(STEPS):
        grads = some_grads(params, step)
        for step_it in (theirs.step, judge.step, lambda g: take(ours, g)):
            step_it(grads)
    stepping.take_steps(plain, STEPS)
    assert_agree(ours, theirs, PEER_TOLERANCES[dtype])
    assert_follows(ours, judge, dtype)
    moved = [
        not torch.equal(p, q)
        for p, q in zip(stepping.params_of(ours), stepping.params_of(plain), strict=True)
    ]
    assert moved == EXCLUDED


@DTYPES
def test_finalize_writes_the_average(dtype):
    options = {"learning_rate": 2.0**-5, "use_ema": True, "ema_momentum": 0.75}
    ours, theirs = pair(stepping.make_params(dtype=dtype), **options)
    take_both(ours, theirs, range(STEPS))
    before = stepping.clone_params(stepping.params_of(ours))
    first = stepping.params_of(ours)[0]
    ours.finalize_variable_values([first])
    for index, (p, q) in enumerate(zip(stepping.params_of(ours), before, strict=True)):
        assert torch.equal(p, q) == (index != 0)
    ours.finalize_variable_values()
    theirs.finalize()
    assert_agree(ours, theirs, PEER_TOLERANCES[dtype])


def test_finalize_without_averages_changes_nothing():
    ours = Adafactor(stepping.make_params(), use_ema=True)
    stepping.take_steps(ours, 3)
    ours.param_groups[0]["use_ema"] = False
    with stepping.assert_untouched(ours):
        ours.finalize_variable_values()


@pytest.mark.parametrize("finalize", [False, True])
def test_an_overwritten_parameter_forgets_its_compensation(finalize):
    """Kahan's carry belongs to the value that the average has replaced."""
    every = None if finalize else 3
    params = stepping.make_params([(9, 7)], torch.bfloat16)
    ours = Adafactor(
        params,
        2.0**-7,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=every,
        rounding="kahan",
    )
    stepping.take_steps(ours, 2)
    assert ours.state[params[0]]["kahan"].any()
    stepping.take_steps(ours, 1, start=2)
    if finalize:
        ours.finalize_variable_values()
    assert not ours.state[params[0]]["kahan"].any()
    # The average may be kept in more digits than the parameter has.
    assert torch.equal(params[0], ours.state[params[0]]["average"].to(torch.bfloat16))


def test_groups_share_one_count_and_keep_their_own_options():
    params = stepping.make_params([(6, 5), (7,), (4, 3, 5)], F64)
    own = [{"learning_rate": 2.0**-3}, {"lr": halving, "weight_decay": 0.5}, {"clipvalue": 0.1}]
    groups = [{**g, "params": [p]} for g, p in zip(own, stepping.clone_params(params), strict=True)]
    ours = Adafactor(groups, **LR)
    judges = []
    for group, p in zip(own, params, strict=True):
        group = {"learning_rate": group.pop("lr")} | group if "lr" in group else group
        judges.append(oracle.Oracle(oracle.keras_knobs(**{**LR, **group}), [p]))
    for step in range(STEPS):
        grads = some_grads(params, step)
        take(ours, grads)
        for judge, g in zip(judges, grads, strict=True):
            judge.step([g])
    for p, judge in zip(stepping.params_of(ours), judges, strict=True):
        stepping.assert_close(p, judge.params[0], 1e-12, str(tuple(p.shape)))
    assert len({id(group["step"]) for group in ours.param_groups}) == 1


# --- Keras' golden numbers -----------------------------------------------------------------------


def golden(values: Any, *steps: Any, **options: Any) -> list[Tensor]:
    """A parameter after each of the steps with these gradients."""
    p = torch.nn.Parameter(torch.tensor(values))
    ours = Adafactor([p], **options)
    seen = []
    for grad in steps:
        ours.apply_gradients([(grad, p)])
        seen.append(p.detach().clone())
    return seen


def test_golden_vector():
    after = golden([1.0, 2.0, 3.0, 4.0], [1.0, 6.0, 7.0, 2.0], learning_rate=0.5)[0]
    expected = torch.tensor([-0.3693, 0.6307, 1.6307, 2.6307])
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_golden_matrix():
    after = golden([[1.0, 2.0], [3.0, 4.0]], [[1.0, 6.0], [7.0, 2.0]], learning_rate=0.5)[0]
    expected = torch.tensor([[0.7007, -0.0081], [1.2492, 3.4407]])
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_golden_weight_decay():
    kept, out = (torch.nn.Parameter(torch.tensor(2.0)) for _ in range(2))
    ours = Adafactor([("w", kept), ("exclude", out)], learning_rate=1.0, weight_decay=0.004)
    ours.exclude_from_weight_decay(var_names=["exclude"])
    for _ in range(3):
        ours.apply([torch.tensor(0.0), torch.tensor(0.0)])
    assert kept.item() == pytest.approx(1.9760959, abs=1e-6)
    assert out.item() == 2.0


def test_golden_series():
    wanted = [
        [0.55] * 10,
        [0.3031, 0.3026, 0.3025, *[0.3024] * 7],
        [0.1671, 0.1665, *[0.1663] * 8],
        [0.0923, 0.0916, 0.0915, *[0.0914] * 7],
        [0.0554, 0.0548, *[0.0546] * 5, *[0.0545] * 3],
    ]
    series = golden(
        [1.0] * 10,
        [0.01] * 10,
        *[[i / 10 for i in range(1, 11)]] * 4,
        learning_rate=0.5,
        beta_2_decay=-0.65,
        epsilon_1=1e-15,
        epsilon_2=1e-4,
        clip_threshold=0.9,
        relative_step=False,
    )
    for after, expected in zip(series, wanted, strict=True):
        torch.testing.assert_close(after, torch.tensor(expected), rtol=5e-4, atol=5e-4)


# --- learning rates ------------------------------------------------------------------------------


def test_kinds_of_learning_rate():
    """A function of the iteration, a schedule of Keras, and a function of nothing agree."""
    seen: list[int] = []

    def schedule(iteration: int) -> float:
        seen.append(iteration)
        return halving(iteration)

    params = stepping.make_params(dtype=F64)
    clock = iter(range(STEPS))
    built = [
        Adafactor(stepping.clone_params(params), lr, gradient_accumulation_steps=2)
        for lr in (schedule, own_schedule(halving), lambda: halving(next(clock)))
    ]
    for optimizer in built:
        stepping.take_steps(optimizer, STEPS)
        for p, q in zip(stepping.params_of(optimizer), stepping.params_of(built[0]), strict=True):
            assert torch.equal(p, q)
    assert seen == list(range(STEPS))  # raw calls, from 0, once a call
    assert built[0].iterations == STEPS // 2
    assert built[0].learning_rate == halving(STEPS)


def test_keras_own_schedules():
    schedules = keras_module().optimizers.schedules
    schedule = schedules.PiecewiseConstantDecay([3, 6], [2.0**-4, 2.0**-5, 2.0**-6])
    ours, theirs = pair(stepping.make_params(dtype=F64), learning_rate=2.0**-4)
    ours.learning_rate = schedule
    theirs.optimizer.learning_rate = schedule
    take_both(ours, theirs, range(STEPS))
    assert_agree(ours, theirs, PEER_TOLERANCES[F64])
    assert ours.learning_rate == 2.0**-6


@pytest.mark.parametrize("which", ["excluded", "two_groups"])
def test_a_function_is_called_once_a_group(which):
    calls: list[int] = []

    def lr() -> float:
        calls.append(1)
        return 0.1

    p, q = stepping.make_params([(3, 4), (5,)])
    groups = [{"params": [p]}, {"params": [q]}] if which == "two_groups" else [p, q]
    ours = Adafactor(groups, lr, weight_decay=0.1)
    ours.exclude_from_weight_decay([q])
    stepping.take_steps(ours, 3)
    assert len(calls) == 3 * len(ours.param_groups)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1.0, ValueError, r"-1\.0 for iteration 2; expected a number >= 0"),
        (math.nan, ValueError, "nan for iteration 2; expected a number >= 0"),
        (torch.tensor(-1.0), ValueError, "iteration 2; expected a number >= 0"),
        (torch.ones(2), ValueError, "iteration 2; expected one number"),
        (torch.ones(2).numpy(), TypeError, "iteration 2; expected a number"),
        (torch.tensor(1j), TypeError, "iteration 2; expected a real number"),
        ("0.1", TypeError, "'0.1' for iteration 2; expected a number"),
        (None, TypeError, "None for iteration 2; expected a number"),
        (1j, TypeError, "1j for iteration 2; expected a number"),
        (True, TypeError, "True for iteration 2; expected a number"),
    ],
    # Not the values: a name is to be the same in every process.
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("takes_iteration", [True, False])
def test_what_a_function_returns_is_checked(value, error, text, takes_iteration):
    """Before anything has changed; the other group's function, too, has returned by then."""
    returned = iter([0.1, 0.1])

    def rate(*_: int) -> Any:
        return next(returned, value)

    own = (lambda it: rate(it)) if takes_iteration else (lambda: rate())
    p, q = stepping.make_params([(3, 4), (5,)])
    groups = [{"params": [p], "lr": 0.5}, {"params": [q], "lr": own}]
    ours = Adafactor(groups, weight_decay=0.5, use_ema=True)
    stepping.take_steps(ours, 2)
    with (
        stepping.assert_untouched(ours),
        pytest.raises(error, match=f"(?s)learning_rate returned .*{text}"),
    ):
        ours.step()


@pytest.mark.parametrize(
    "value", [torch.tensor([0.25]), torch.tensor([0.25]).numpy(), 1, math.inf], ids=repr
)
def test_what_a_function_may_return(value):
    number = float(value.item() if hasattr(value, "item") else value)
    ours, given = (
        Adafactor(stepping.make_params(dtype=F64), lr) for lr in (lambda _: value, number)
    )
    for optimizer in (ours, given):
        stepping.take_steps(optimizer, 3)
    for p, q in zip(stepping.params_of(ours), stepping.params_of(given), strict=True):
        assert torch.equal(p, q)


def test_setting_the_learning_rate():
    ours = Adafactor([{"params": [p]} for p in stepping.make_params([(3,), (4,)])], 0.5)
    assert ours.learning_rate == 0.5
    ours.learning_rate = 1
    assert [group["lr"] for group in ours.param_groups] == [1.0, 1.0]
    ours.learning_rate = lambda: 0.25
    assert ours.learning_rate == 0.25
    ours.learning_rate = 0.125  # Keras: AttributeError, a function has no assign()
    assert ours.learning_rate == 0.125
    ours.learning_rate = own_schedule(halving)
    with pytest.raises(TypeError, match="created with a `LearningRateSchedule` object"):
        ours.learning_rate = 0.5
    ours.learning_rate = lambda: 0.25
    with pytest.raises(TypeError, match="learning_rate must be a number, got"):
        ours.learning_rate = "0.5"
    assert ours.learning_rate == 0.25


def test_torch_schedulers_scale_a_number():
    params = stepping.make_params(dtype=F64)
    ours = Adafactor(stepping.clone_params(params), 2.0**-4)
    scheduler = torch.optim.lr_scheduler.StepLR(ours, 3, 0.5)
    judge = oracle.Oracle(oracle.keras_knobs(learning_rate=halving), params)
    for step in range(STEPS):
        grads = some_grads(params, step)
        take(ours, grads)
        scheduler.step()
        judge.step(grads)
    assert_follows(ours, judge, F64)


@pytest.mark.parametrize("lr", [halving, lambda: 0.1], ids=["schedule", "function"])
def test_a_scheduler_of_a_function_is_refused(lr):
    ours = Adafactor(stepping.make_params([(3,)]), lr)
    with pytest.raises(ValueError, match="lr of param group 0 is a function"):
        torch.optim.lr_scheduler.StepLR(ours, 3)


def test_a_schedule_needs_the_count_on_the_host():
    ours = Adafactor(stepping.make_params([(3,)]), halving, capturable=True)
    with pytest.raises(ValueError, match="learning_rate is a Python function of the iteration"):
        stepping.take_steps(ours, 1)


def test_tensor_learning_rate():
    params = stepping.make_params(dtype=F64)
    ours = Adafactor(stepping.clone_params(params), torch.tensor(2.0**-6))
    judge = oracle.Oracle(oracle.keras_knobs(**LR), params)
    for step in range(STEPS):
        grads = some_grads(params, step)
        take(ours, grads)
        judge.step(grads)
    assert_follows(ours, judge, F64)


# --- weight decay --------------------------------------------------------------------------------


def named(*names: str) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.ones(3))) for name in names]


def decayed(optimizer: Adafactor) -> list[bool]:
    """Which parameters a step with zero gradients moves."""
    params = stepping.params_of(optimizer)
    take(optimizer, [torch.zeros_like(p) for p in params])
    return [bool((p != 1.0).any()) for p in params]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bias"], [True, False, True, True]),
        (["norm", "bias"], [True, False, False, True]),
        ("norm", [True, True, False, True]),
        (["^head"], [True, True, True, False]),
        ([], [True, True, True, True]),
        (None, [True, True, True, True]),
    ],
)
def test_exclusion_by_name(names, expected):
    ours = Adafactor(named("a.weight", "a.bias", "norm.weight", "head"), 0.5, weight_decay=0.5)
    ours.exclude_from_weight_decay(var_names=["a"])  # replaced by the next call
    ours.exclude_from_weight_decay(var_names=names)
    assert decayed(ours) == expected


def test_exclusion_by_name_and_by_parameter_over_groups():
    first, second = named("a.weight", "a.bias"), named("b.weight", "b.bias", "b.norm")
    ours = Adafactor([{"params": first}, {"params": second}], 0.5, weight_decay=0.5)
    ours.exclude_from_weight_decay([first[0][1], second[2][1]], ["bias"])
    assert decayed(ours) == [False, False, True, False, False]


def test_exclusion_needs_names_and_an_unstepped_optimizer():
    ours = Adafactor(stepping.make_params([(3,)]))
    with pytest.raises(ValueError, match="named_parameters"):
        ours.exclude_from_weight_decay(var_names=["bias"])
    stepping.take_steps(ours, 1)
    with pytest.raises(ValueError, match="can only be configured before the optimizer is built"):
        ours.exclude_from_weight_decay([])


@pytest.mark.parametrize("change", ["append", "remove"])
def test_exclusion_and_a_group_that_changed_its_length(change):
    ours = Adafactor(
        [{"params": stepping.make_params([(3,)])}, {"params": stepping.make_params([(4,), (5,)])}],
        0.5,
        weight_decay=0.5,
    )
    ours.exclude_from_weight_decay([stepping.params_of(ours)[1]])
    stepping.take_steps(ours, 1)
    params = ours.param_groups[1]["params"]
    if change == "append":
        params += stepping.make_params([(6,)])
    else:
        del params[0]
    for p in params:
        p.grad = torch.ones_like(p)
    found = rf"param group 1 has {len(params)} parameters, but had 2 when exclude_from_weight_decay"
    with stepping.assert_untouched(ours), pytest.raises(ValueError, match=found):
        ours.step()


def test_exclusion_is_of_places():
    """A tensor in another's place is treated as that one; a new group excludes nothing."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    ours = Adafactor(params[:2], 0.5, weight_decay=0.5)
    ours.exclude_from_weight_decay([params[1]])
    ours.param_groups[0]["params"][1] = params[2]
    ours.add_param_group({"params": [params[3]]})
    assert decayed(ours) == [True, False, True]


def test_exclusion_needs_as_many_names_as_parameters():
    ours = Adafactor(named("a", "b"), weight_decay=0.5)
    ours.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="param group 0 has 3 parameters, but 2 names"):
        ours.exclude_from_weight_decay(var_names=["a"])


# --- the peer's bugs -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16], ids=str)
def test_zero_gradients_move_nothing(dtype):
    """Keras in float16: epsilon_1 underflows, and 0 / 0 is NaN."""
    params = stepping.make_params([(3, 4), (5,), (), (2, 3, 4)], dtype=dtype)
    before = stepping.clone_params(params)
    ours = Adafactor(params)
    for _ in range(3):
        take(ours, [torch.zeros_like(p) for p in params])
    assert all(stepping.same_bits(p, q) for p, q in zip(params, before, strict=True))
    take(ours, [torch.ones_like(p) for p in params])
    assert all(bool(p.isfinite().all()) for p in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_count_of_steps_does_not_stall(dtype):
    """Keras counts in the variable's dtype: bfloat16 stops at 256, float16 overflows at 65504."""
    p, q = (torch.nn.Parameter(torch.ones(4, 4, dtype=d)) for d in (dtype, F32))
    for param in (p, q):
        ours = Adafactor([param])
        stepping.take_steps(ours, 1)
        ours.param_groups[0]["step"].fill_(70_000.0)
        param.detach().fill_(1.0)
        stepping.take_steps(ours, 1)
        assert float(ours.param_groups[0]["step"]) == 70_001
        assert all(v.dtype is F32 for v in ours.state[param].values())
    stepping.assert_close(p, q, torch.finfo(dtype).eps, "moved")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_global_norm_that_is_not_finite_makes_all_nan(value):
    ours, theirs = pair(stepping.make_params([(3, 4), (5,)]), **LR, global_clipnorm=1.0)
    grads = [torch.ones(3, 4), torch.full((5,), value)]
    take(ours, grads)
    theirs.step(grads)
    for p, q in zip(stepping.params_of(ours), theirs.params(), strict=True):
        assert bool(q.isnan().all())
        assert bool(p.isnan().all())


def test_a_skipped_step_leaves_averages_and_the_count():
    p, q = stepping.make_params([(3, 4), (5,)])
    ours = Adafactor([p, q], 0.5, use_ema=True, ema_overwrite_frequency=2, nonfinite="skip")
    take(ours, [torch.ones(3, 4), torch.ones(5)])
    p.grad, q.grad = torch.full((3, 4), math.nan), torch.ones(5)
    with stepping.assert_untouched(ours):
        ours.step()


def test_creating_a_distributed_state_dict_counts_nothing():
    from torch.distributed.checkpoint.state_dict import (  # noqa: TID251
        get_optimizer_state_dict,
    )

    model = torch.nn.Linear(4, 3)
    before = stepping.clone_params(model.parameters())
    for lr in (0.5, halving):
        ours = Adafactor(model.parameters(), lr, weight_decay=0.5, use_ema=True)
        get_optimizer_state_dict(model, ours)
        assert ours.iterations == 0
        assert ours.param_groups[0]["lr"] is lr
        for p, q in zip(model.parameters(), before, strict=True):
            assert stepping.same_bits(p, q)


# --- arguments -----------------------------------------------------------------------------------


def test_signature_is_kerass():
    import inspect

    ours = list(inspect.signature(Adafactor).parameters.values())[1:-1]
    theirs = list(inspect.signature(keras_module().optimizers.Adafactor).parameters.values())[:-1]
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1},
        {"learning_rate": "0.1"},
        {"learning_rate": None},
        {"gradient_accumulation_steps": 1},
        {"use_ema": True, "ema_momentum": 1.5},
        {"use_ema": True, "ema_overwrite_frequency": 0.5},
        {"use_ema": True, "ema_overwrite_frequency": -1},
        {"clipnorm": 1.0, "clipvalue": 1.0},
        {"clipvalue": 1.0, "global_clipnorm": 2.0},
    ],
    ids=str,
)
def test_bad_arguments_have_kerass_texts(options):
    texts = []
    for make in (
        lambda: Adafactor(stepping.make_params([(3,)]), **options),
        lambda: keras_module().optimizers.Adafactor(**options),
    ):
        with pytest.raises(ValueError, match=next(reversed(options))) as error:
            make()
        texts.append(str(error.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"learning_rate": -0.1}, ValueError, "learning_rate should be >= 0"),
        ({"learning_rate": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"learning_rate": torch.tensor(-1.0)}, ValueError, "learning_rate should be >= 0"),
        ({"learning_rate": lambda a, b: 0.1}, ValueError, "takes 2 arguments: a, b"),
        ({"beta_2_decay": 0.8}, ValueError, "beta_2_decay should be <= 0"),
        ({"epsilon_1": -1.0}, ValueError, "epsilon_1 should be >= 0"),
        ({"epsilon_1": None}, TypeError, "epsilon_1 must be a number, got None"),
        ({"beta_2_decay": None}, TypeError, "beta_2_decay must be a number, got None"),
        (
            {"use_ema": True, "ema_momentum": None},
            TypeError,
            "ema_momentum must be a number, got None",
        ),
        ({"weight_decay": [0.1]}, TypeError, r"weight_decay must be a number, got \[0\.1\]"),
        ({"clipnorm": [1.0]}, TypeError, r"clipnorm must be a number, got \[1\.0\]"),
        ({"epsilon_2": math.nan}, ValueError, "epsilon_2 should be >= 0"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold should be > 0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay should be >= 0"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a number"),
        ({"loss_scale_factor": 0.0}, ValueError, "loss_scale_factor should be > 0"),
        ({"gradient_accumulation_steps": 2.5}, ValueError, "must be an integer >= 2"),
        ({"clipnorm": 1.0, "max_grad_norm": 1.0}, ValueError, "max_grad_norm excludes clipnorm"),
        ({"decay": 0.1}, TypeError, "unexpected keyword argument 'decay'"),
    ],
    # Not the values: an address in a name differs from process to process.
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_bad_arguments_are_named(options, error, text):
    with pytest.raises(error, match=text):
        Adafactor([torch.nn.Parameter(torch.ones(3))], **options)


def test_an_unused_ema_momentum_is_not_asked_for():
    """Keras neither, so a configuration of Keras may have None."""
    stepping.take_steps(Adafactor(stepping.make_params([(3,)]), ema_momentum=None), 1)


@pytest.mark.parametrize(
    ("own", "error", "text"),
    [
        ({"lr": 0.1, "learning_rate": 0.2}, ValueError, "has both lr and learning_rate"),
        ({"lr": None}, TypeError, "lr must be a number, got None"),
        ({"learning_rate": "0.1"}, TypeError, "lr must be a number, got"),
    ],
    ids=["both", "none", "text"],
)
def test_bad_groups_are_not_added(own, error, text):
    p, q = stepping.make_params([(3,), (4,)])
    ours = Adafactor([p], 0.5)
    with pytest.raises(error, match=text):
        ours.add_param_group({"params": [q], **own})
    assert len(ours.param_groups) == 1


def test_max_grad_norm_is_one_more_way_of_clipping():
    ours = Adafactor(stepping.make_params(dtype=F64), **LR, max_grad_norm=0.5, epsilon_1=1e-6)
    params = stepping.params_of(ours)
    judge = oracle.Oracle(oracle.keras_knobs(**LR, epsilon_1=1e-6), params)
    for step in range(STEPS):
        grads = some_grads(params, step)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        judge.step([g * min(1.0, 0.5 / (norm + 1e-6)) for g in grads])
        take(ours, grads)
    assert_follows(ours, judge, F64)


def test_accumulation_needs_the_count_on_the_host():
    ours = Adafactor(stepping.make_params([(3,)]), gradient_accumulation_steps=2, capturable=True)
    with pytest.raises(ValueError, match="gradient accumulation decides on the host"):
        stepping.take_steps(ours, 1)
