"""The oracle against the real peers: before it judges our code, it is judged itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle, peers
from tests.oracle import Knobs, Oracle

pytestmark = pytest.mark.parity

SHAPES = [
    (7,),
    (),
    (6, 5),
    (5, 9),
    (1, 9),
    (9, 1),
    (4, 3, 5),
    (4, 6, 3, 2),
    (2, 3, 2, 3, 2),
    (17, 23),
]
STEPS = 14
KERAS_F64 = 1e-7
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One configuration of one peer: constructor arguments, and how close the oracle must come."""

    peer: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F64
    tolerance: float = 1e-12
    some_grads_none: bool = False

    def __str__(self) -> str:
        return f"{self.peer}-{self.name}-{str(self.dtype).removeprefix('torch.')}"


KNOBS: dict[str, Callable[..., Knobs]] = {
    "torch": oracle.torch_knobs,
    "torch_foreach": oracle.torch_knobs,
    "hf": oracle.hf_knobs,
    "keras": oracle.keras_knobs,
    "optax": oracle.optax_knobs,
    "big_vision": oracle.big_vision_knobs,
    "pytorch_optimizer": oracle.pytorch_optimizer_knobs,
}


def halving(count: int) -> float:
    """A schedule whose values float32 holds exactly: Keras keeps learning rates in float32."""
    return 2.0 ** -(4 + count // 3)


TORCH_KWARGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "large_lr_is_capped": {"lr": 0.9},
    "weight_decay": {"lr": 0.03, "weight_decay": 0.1},
    "eps_of_the_paper": {"eps": (1e-30, 1e-3)},
    "coarse_eps": {"eps": (1e-2, 0.5)},
    "clip_threshold": {"d": 1.5, "beta2_decay": -0.5},
    "maximize": {"maximize": True, "weight_decay": 0.01},
}
TORCH_CASES = [
    Case(peer, name, kwargs, **numbers)
    for peer in ("torch", "torch_foreach")
    for name, kwargs in TORCH_KWARGS.items()
    for numbers in ({}, {"dtype": F32, "tolerance": 2e-6})
]
HF_CASES = [
    Case("hf", "defaults"),
    Case("hf", "defaults", dtype=F32, tolerance=2e-6),
    Case("hf", "weight_decay", {"weight_decay": 0.1}),
    Case("hf", "warmup", {"warmup_init": True}),
    Case("hf", "manual", {"lr": 0.01, "scale_parameter": False, "relative_step": False}),
    Case(
        "hf",
        "manual_scaled_momentum",
        {"lr": 0.03, "relative_step": False, "beta1": 0.9, "weight_decay": 0.05},
    ),
    Case("hf", "momentum", {"beta1": 0.8, "clip_threshold": 0.7, "decay_rate": -0.6}),
    Case("hf", "large_eps", {"eps": (1e-4, 1e-1)}),
]
KERAS_KWARGS: dict[str, dict[str, Any]] = {
    "defaults": {"learning_rate": 2.0**-10},
    "relative_step_off": {"learning_rate": 2.0**-6, "relative_step": False},
    "weight_decay": {"learning_rate": 2.0**-5, "weight_decay": 0.125},
    "weight_decay_excluded": {
        "learning_rate": 2.0**-5,
        "weight_decay": 0.125,
        "decay_mask": [i % 2 == 0 for i in range(len(SHAPES))],
    },
    "own_numbers": {
        "learning_rate": 2.0**-6,
        "beta_2_decay": -0.625,
        "epsilon_1": 2.0**-13,
        "epsilon_2": 2.0,
        "clip_threshold": 0.75,
    },
    "schedule": {"learning_rate": halving, "weight_decay": 0.25},
    "clipnorm": {"learning_rate": 2.0**-6, "clipnorm": 0.5},
    "clipvalue": {"learning_rate": 2.0**-6, "clipvalue": 2.0**-7},
    "global_clipnorm": {"learning_rate": 2.0**-6, "global_clipnorm": 0.5},
    "loss_scale": {"learning_rate": 2.0**-6, "loss_scale_factor": 1024.0, "epsilon_1": 2.0**-20},
    "accumulation": {
        "learning_rate": halving,
        "gradient_accumulation_steps": 3,
        "global_clipnorm": 0.5,
        "weight_decay": 0.25,
    },
    "ema": {"learning_rate": 2.0**-5, "use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite": {
        "learning_rate": 2.0**-5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
    },
    "ema_accumulation": {
        "learning_rate": 2.0**-5,
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
    },
}
KERAS_CASES = [
    Case("keras", name, kwargs, dtype, tolerance)
    for name, kwargs in KERAS_KWARGS.items()
    # On torch, Keras takes the mean of a float64 tensor, and reads its own scalars, in float32.
    for dtype, tolerance in ((F32, 3e-6), (F64, KERAS_F64))
]
OPTAX_KWARGS: dict[str, dict[str, Any]] = {
    "defaults": {"learning_rate": 0.01},
    "factored": {"learning_rate": 0.01, "min_dim_size_to_factor": 1},
    "min_dim_5": {"learning_rate": 0.01, "min_dim_size_to_factor": 5},
    "not_factored": {"learning_rate": 0.01, "factored": False},
    "not_scaled": {
        "learning_rate": 0.02,
        "min_dim_size_to_factor": 2,
        "multiply_by_parameter_scale": False,
    },
    "momentum_and_decay": {
        "learning_rate": 0.02,
        "min_dim_size_to_factor": 2,
        "momentum": 0.9,
        "weight_decay_rate": 0.01,
    },
    "decay_mask": {
        "learning_rate": 0.02,
        "min_dim_size_to_factor": 2,
        "weight_decay_rate": 0.01,
        "weight_decay_mask": [i % 2 == 0 for i in range(len(SHAPES))],
    },
    "no_clipping": {
        "learning_rate": 0.005,
        "min_dim_size_to_factor": 2,
        "clipping_threshold": None,
    },
    "decay_offset": {
        "learning_rate": 0.02,
        "min_dim_size_to_factor": 2,
        "decay_rate": 0.6,
        "decay_offset": -3,
    },
    "schedule": {"learning_rate": halving, "min_dim_size_to_factor": 2, "eps": 1e-4},
}
OPTAX_CASES = [
    Case("optax", name, kwargs, F32, tolerance=3e-6) for name, kwargs in OPTAX_KWARGS.items()
] + [
    # 64-bit JAX still computes optax' decay rate in float32.
    Case("optax", "factored", OPTAX_KWARGS["factored"], tolerance=3e-8)
]
BIG_VISION_KWARGS: dict[str, dict[str, Any]] = {
    "no_momentum": {"lr": 0.01, "momentum": None},
    "momentum": {"lr": 0.01},
    "min_dim_2": {"lr": 0.01, "min_dim_size_to_factor": 2},
    "min_dim_5": {"lr": 0.01, "min_dim_size_to_factor": 5, "clipping_threshold": 0.8},
    "weight_decay": {"lr": 0.02, "min_dim_size_to_factor": 2, "weight_decay": 0.1},
    "weight_decay_unscaled": {
        "lr": 0.02,
        "min_dim_size_to_factor": 2,
        "weight_decay": 0.01,
        "unscaled_wd": True,
    },
    "offset_and_cap": {
        "lr": 0.01,
        "min_dim_size_to_factor": 2,
        "decay_offset": 4,
        "beta2_cap": 0.7,
        "eps": 1e-5,
    },
    "caution": {"lr": 0.01, "min_dim_size_to_factor": 2, "caution": True},
}
BIG_VISION_CASES = [
    Case("big_vision", name + suffix, {"momentum_dtype": buffer} | kwargs, dtype, tolerance)
    for name, kwargs in BIG_VISION_KWARGS.items()
    for suffix, dtype, buffer, tolerance in (
        ("", F64, F64, 1e-12),
        ("", F32, F32, 2e-6),
        # What lies between two bfloat16 neighbours falls either way: one ulp of a buffer near one.
        ("_bf16_buffer", F32, BF16, 2**-8 * 0.02),
    )
    if not (name == "caution" and buffer == BF16)
]
PYTORCH_OPTIMIZER_CASES = [
    Case("pytorch_optimizer", f"{name}{suffix}", {"momentum_dtype": F64, "foreach": foreach} | kw)
    for suffix, foreach in (("", False), ("_foreach", True))
    for name, kw in {
        "defaults": {},
        "no_momentum": {"betas": (None, 0.999)},
        "weight_decay": {"weight_decay": 0.1},
        "fixed_decay": {"weight_decay": 0.01, "fixed_decay": True},
        "cap": {"betas": (0.8, 0.6), "clip_threshold": 0.7, "decay_rate": -0.5},
        "manual": {"lr": 0.01, "relative_step": False, "scale_parameter": False},
        "warmup": {"warmup_init": True},
        "maximize": {"maximize": True},
    }.items()
]
NONE_CASES = [
    Case(peer, f"some_grads_none{suffix}", kwargs, tolerance=tolerance, some_grads_none=True)
    for peer, suffix, kwargs, tolerance in (
        ("torch", "", {}, 1e-12),
        ("torch_foreach", "", {}, 1e-12),
        ("hf", "", {"beta1": 0.9}, 1e-12),
        ("big_vision", "", {"lr": 0.01, "momentum_dtype": F64}, 1e-12),
        ("pytorch_optimizer", "", {"momentum_dtype": F64}, 1e-12),
        ("keras", "", KERAS_KWARGS["global_clipnorm"], KERAS_F64),
        ("keras", "_ema_accumulation", KERAS_KWARGS["ema_accumulation"], KERAS_F64),
    )
]
CASES = [
    *TORCH_CASES,
    *HF_CASES,
    *KERAS_CASES,
    *OPTAX_CASES,
    *BIG_VISION_CASES,
    *PYTORCH_OPTIMIZER_CASES,
    *NONE_CASES,
]


def make_params(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """One tensor a shape, every element at least 0.5 from zero: no error by cancellation."""
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=rng, dtype=F64) for shape in SHAPES]
    return [(x + torch.where(x < 0, -0.5, 0.5)).to(dtype) for x in drawn]


def make_grads(
    dtype: torch.dtype, step: int, some_none: bool = False, seed: int = 0
) -> list[Tensor | None]:
    """Gradients whose scale changes by six decades from step to step and by two from row to row."""
    rng = torch.Generator().manual_seed(1000 * seed + step + 1)
    grads: list[Tensor | None] = []
    for i, shape in enumerate(SHAPES):
        g = torch.randn(shape, generator=rng, dtype=F64)
        if len(shape) > 1:
            g = g * 10 ** (2 * torch.rand((*shape[:-1], 1), generator=rng, dtype=F64))
            if step == 5:
                g[..., 0, :] = 0.0
        g = g * 10 ** (6 * torch.rand((), generator=rng, dtype=F64) - 5)
        grads.append(None if some_none and (step + i) % 3 == 1 else g.to(dtype))
    return grads


def max_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """max |actual - expected| / max |expected|, the worst over the tensors."""
    errors = [
        float((a.double() - e).abs().max() / e.abs().max())
        for a, e in zip(actual, expected, strict=True)
    ]
    # Python's max drops a NaN that does not come first.
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def as_param(case: Case) -> Any:
    # JAX compiles every operation for every shape, once.
    return pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case.peer == "optax"))


@pytest.mark.parametrize("case", [as_param(case) for case in CASES])
def test_every_step_agrees(case: Case) -> None:
    params = make_params(case.dtype)
    peer = peers.make_peer(case.peer, params, **case.kwargs)
    judge = Oracle(KNOBS[case.peer](**case.kwargs), params, case.dtype)
    for step in range(STEPS):
        grads = make_grads(case.dtype, step, case.some_grads_none)
        peer.step(grads)
        judge.step(grads)
        error = max_error(peer.params(), judge.params)
        assert error <= case.tolerance, f"step {step + 1}"


def test_keras_finalize_writes_the_average() -> None:
    kwargs = KERAS_KWARGS["ema"]
    params = make_params(F64)
    peer = peers.make_peer("keras", params, **kwargs)
    judge = Oracle(oracle.keras_knobs(**kwargs), params)
    for step in range(STEPS):
        peer.step(make_grads(F64, step))
        judge.step(make_grads(F64, step))
    before = [p.clone() for p in judge.params]
    peer.finalize()
    judge.finalize()
    assert max_error(peer.params(), judge.params) <= KERAS_F64
    assert max_error(before, judge.params) > 1e-3


@pytest.mark.parametrize("peer_name", ["torch", "hf"])
def test_statistics_agree(peer_name: str) -> None:
    params = make_params(F64)
    peer = peers.make_peer(peer_name, params)
    judge = Oracle(KNOBS[peer_name](), params)
    for step in range(STEPS):
        peer.step(make_grads(F64, step))
        judge.step(make_grads(F64, step))
    rows, cols, whole = {
        "torch": ("row_var", "col_var", "variance"),
        "hf": ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
    }[peer_name]
    for theirs, ours in zip(peer.optimizer.state.values(), judge.state, strict=True):
        assert int(theirs["step"]) == ours["step"] == STEPS
        if "var" in ours:
            pairs = [(theirs[whole], ours["var"])]
        else:
            pairs = [(theirs[rows], ours["row_var"]), (theirs[cols], ours["col_var"])]
        for a, e in pairs:
            torch.testing.assert_close(a.reshape(e.shape), e, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("peer_name", "kwargs"),
    [
        ("torch", {"lr": 0.02, "weight_decay": 0.1}),
        ("hf", {"lr": 0.02, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1}),
        ("big_vision", {"lr": 0.02, "weight_decay": 0.1, "corrected_weight_decay": True}),
        (
            "big_vision",
            {"lr": 0.02, "weight_decay": 0.1, "corrected_weight_decay": True, "unscaled_wd": True},
        ),
    ],
    ids=["torch", "hf", "big_vision_corrected", "big_vision_corrected_unscaled"],
)
def test_a_scheduler_may_set_lr(peer_name: str, kwargs: dict[str, Any]) -> None:
    if peer_name == "big_vision":
        kwargs = kwargs | {"momentum_dtype": F64}
    params = make_params(F64)
    peer = peers.make_peer(peer_name, params, **kwargs)
    judge = Oracle(KNOBS[peer_name](**kwargs), params)
    for step in range(STEPS):
        lr = 0.02 / (1 + step)
        peer.optimizer.param_groups[0]["lr"] = lr
        judge.knobs = replace(judge.knobs, lr=lr)
        peer.step(make_grads(F64, step))
        judge.step(make_grads(F64, step))
        assert max_error(peer.params(), judge.params) <= 1e-12, f"step {step + 1}"


def test_max_grad_norm_is_torch_clip_grad_norm() -> None:
    params = make_params(F64)
    peer = peers.make_peer("torch", params)
    judge = Oracle(replace(oracle.torch_knobs(), max_grad_norm=0.5), params)
    for step in range(STEPS):
        grads = make_grads(F64, step, some_none=True)
        leaves = [torch.nn.Parameter(p) for p in params]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = None if g is None else g.clone()
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        peer.step([leaf.grad for leaf in leaves])
        judge.step(grads)
        assert max_error(peer.params(), judge.params) <= 1e-12


def test_keras_golden_vector() -> None:
    judge = Oracle(oracle.keras_knobs(learning_rate=0.5), [torch.tensor([1.0, 2.0, 3.0, 4.0])])
    judge.step([torch.tensor([1.0, 6.0, 7.0, 2.0])])
    expected = torch.tensor([-0.3693, 0.6307, 1.6307, 2.6307], dtype=F64)
    torch.testing.assert_close(judge.params[0], expected, rtol=1e-4, atol=1e-4)


def test_keras_golden_matrix() -> None:
    judge = Oracle(oracle.keras_knobs(learning_rate=0.5), [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    judge.step([torch.tensor([[1.0, 6.0], [7.0, 2.0]])])
    expected = torch.tensor([[0.7007, -0.0081], [1.2492, 3.4407]], dtype=F64)
    torch.testing.assert_close(judge.params[0], expected, rtol=1e-4, atol=1e-4)


def test_keras_golden_weight_decay() -> None:
    knobs = oracle.keras_knobs(learning_rate=1.0, weight_decay=0.004, decay_mask=[True, False])
    judge = Oracle(knobs, [torch.tensor(2.0), torch.tensor(2.0)])
    for _ in range(3):
        judge.step([torch.tensor(0.0), torch.tensor(0.0)])
    assert float(judge.params[0]) == pytest.approx(1.9760959, abs=1e-6)
    assert float(judge.params[1]) == 2.0


def test_keras_golden_series() -> None:
    knobs = oracle.keras_knobs(
        learning_rate=0.5,
        beta_2_decay=-0.65,
        epsilon_1=1e-15,
        epsilon_2=1e-4,
        clip_threshold=0.9,
        relative_step=False,
    )
    golden = [
        [0.55] * 10,
        [0.3031, 0.3026, 0.3025, *[0.3024] * 7],
        [0.1671, 0.1665, *[0.1663] * 8],
        [0.0923, 0.0916, 0.0915, *[0.0914] * 7],
        [0.0554, 0.0548, *[0.0546] * 5, *[0.0545] * 3],
    ]
    judge = Oracle(knobs, [torch.ones(10)])
    judge.step([torch.full((10,), 0.01)])
    for expected in golden:
        actual = judge.params[0]
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=5e-4, atol=5e-4)
        judge.step([torch.arange(1, 11, dtype=F64) / 10])


@pytest.mark.parametrize(
    ("clip", "row", "col"),
    [(None, 0.9574349, 0.6169143), (1.0, 0.478811, 0.13829)],
    ids=["plain", "global_norm_clipped"],
)
def test_t5x_golden_factored(clip: float | None, row: float, col: float) -> None:
    knobs = oracle.optax_knobs(learning_rate=0.1, min_dim_size_to_factor=0)
    judge = Oracle(replace(knobs, global_clipnorm=clip), [torch.ones(3, 2)])
    judge.calls = 1
    judge.state[0]["row_var"].fill_(0.9)
    judge.state[0]["col_var"].fill_(0.1)
    judge.step([torch.ones(3, 2)])
    state = judge.state[0]
    torch.testing.assert_close(judge.params[0], torch.full((3, 2), 0.9, dtype=F64))
    torch.testing.assert_close(
        state["row_var"], torch.full((2,), row, dtype=F64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        state["col_var"], torch.full((3,), col, dtype=F64), rtol=1e-6, atol=0
    )


def test_t5x_golden_unfactored_with_momentum() -> None:
    knobs = oracle.optax_knobs(learning_rate=0.1, min_dim_size_to_factor=32, momentum=0.0)
    judge = Oracle(knobs, [torch.ones(3, 2)])
    judge.calls = 1
    judge.state[0]["var"].fill_(0.5)
    judge.step([torch.ones(3, 2)])
    state = judge.state[0]
    torch.testing.assert_close(judge.params[0], torch.full((3, 2), 0.9, dtype=F64))
    torch.testing.assert_close(
        state["var"], torch.full((3, 2), 0.787174, dtype=F64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(state["exp_avg"], torch.full((3, 2), 0.1, dtype=F64))


@pytest.mark.parametrize(
    "knobs",
    [
        oracle.torch_knobs(),
        oracle.torch_knobs(eps=(1e-30, 1e-3)),
        oracle.torch_knobs(eps=(1e-300, 1e-3)),
        oracle.torch_knobs(eps=(0.0, 1e-3)),
        oracle.hf_knobs(),
        oracle.keras_knobs(),
        oracle.adafactor_pytorch_knobs(),
        oracle.adafactor_pytorch_knobs(non_constant_decay=False),
        oracle.optax_knobs(min_dim_size_to_factor=0),
        oracle.big_vision_knobs(min_dim_size_to_factor=0),
    ],
    ids=[
        "torch",
        "torch_paper_eps",
        "torch_underflowing_eps",
        "torch_no_eps",
        "hf",
        "keras",
        "adafactor_pytorch",
        "adafactor_pytorch_amsgrad",
        "optax",
        "big_vision",
    ],
)
def test_zero_gradients_move_nothing(knobs: Knobs) -> None:
    params = [torch.ones(3, 4), torch.ones(5), torch.ones(2, 2, 2)]
    judge = Oracle(knobs, params, F32)
    one_row = [torch.zeros_like(p) for p in params]
    one_row[0][1] = 1e-3
    judge.step([torch.zeros_like(p) for p in params])
    judge.step(one_row)
    assert all(bool(p.isfinite().all()) for p in judge.params)
    assert float(judge.params[0][0, 0]) == float(judge.params[1][0]) == 1.0
    assert float(judge.params[0][1, 0]) < 1.0


def test_nan_in_a_gradient_reaches_the_parameter() -> None:
    judge = Oracle(oracle.torch_knobs(), [torch.ones(2, 2), torch.ones(2, 2)])
    judge.step([torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), torch.ones(2, 2)])
    assert bool(judge.params[0].isnan().any())
    assert bool(judge.params[1].isfinite().all())


def test_empty_tensors_count_the_step_only() -> None:
    judge = Oracle(oracle.torch_knobs(), [torch.ones(0), torch.ones(0, 4), torch.ones(3, 0)])
    judge.step([torch.ones(0), torch.ones(0, 4), None])
    assert [s["step"] for s in judge.state] == [1, 1, 0]
    assert judge.state[1]["col_var"].eq(0).all()


def test_eps1_of_none_belongs_to_each_tensor() -> None:
    judge = Oracle(oracle.torch_knobs(), [torch.ones(4)] * 2, [BF16, F32])
    judge.step([torch.full((4,), 1e-3)] * 2)
    moved = [1.0 - float(p[0]) for p in judge.params]
    # g = 1e-3 is below bfloat16's 2^-7 and far above float32's 2^-23.
    assert moved == pytest.approx([1e-2 * 1e-3 / 2**-7, 1e-2])


def test_decay_offset_never_precedes_the_first_step() -> None:
    beta2 = oracle.optax_knobs(decay_offset=3).beta2
    assert [beta2(t) for t in (1, 3, 4, 5)] == [0.0, 0.0, 0.0, 1.0 - 2**-0.8]


def test_lr_decay_factor_multiplies_the_step() -> None:
    knobs = oracle.adafactor_pytorch_knobs(lr_decay_step=[3, 5], lr_decay_factor=0.1)
    rates = [knobs.rho(t, knobs.lr) for t in (1, 2, 3, 4, 5, 40_000)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 5e-5])


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((4, 3, 5), "last2", (4, 3, 5)),
        ((4, 3, 5), "largest2", (3, 4, 5)),
        ((4, 6, 3, 2), "largest2", (3, 2, 4, 6)),
        ((4, 3, 5), "reshape2d", (4, 15)),
        ((4, 6, 3, 2), "reshape2d", (8, 18)),
        ((2, 3, 2, 3, 2), "reshape2d", (4, 18)),
    ],
)
def test_view_round_trip(shape: tuple[int, ...], kind: str, expected: tuple[int, ...]) -> None:
    view = oracle.View(shape, kind, min_dim=0)
    x = torch.arange(math.prod(shape), dtype=F64).reshape(shape)
    assert view.canonical(x).shape == expected
    assert torch.equal(view.original(view.canonical(x)), x)
