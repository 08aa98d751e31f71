"""State dicts from one dialect to another: training goes on, nothing is lost, or it is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor.convert import FORMS, convert_state_dict
from tests import peers, stepping

Shape = tuple[int, ...]

LR = 0.01
NAMES = tuple(FORMS)
PAIRS = list(itertools.permutations(NAMES, 2))
ALL_PAIRS = pytest.mark.parametrize(("source", "target"), PAIRS, ids=map("-".join, PAIRS))
ALL_NAMES = pytest.mark.parametrize("name", NAMES)
# Settings under which two dialects are one rule: p - LR max(1e-3, RMS(p)) u, or p - LR u.
SCALED: dict[str, dict[str, Any]] = {
    "torch": {"lr": LR, "eps": (1e-30, 1e-3)},
    "hf": {"lr": LR, "relative_step": False},
    "keras": {"learning_rate": LR},
    "adafactor_pytorch": {
        "lr": lambda t: LR,
        "beta1": 0,
        "beta2": lambda t: 1 - t**-0.8,
        "ams_grad": False,
    },
    "optax": {"learning_rate": LR, "min_dim_size_to_factor": 0},
}
UNSCALED: dict[str, dict[str, Any]] = {
    "hf": {**SCALED["hf"], "scale_parameter": False},
    "adafactor_pytorch": {**SCALED["adafactor_pytorch"], "lr": LR},
    "optax": {**SCALED["optax"], "multiply_by_parameter_scale": False},
    "big_vision": {
        "lr": LR,
        "min_dim_size_to_factor": 0,
        "beta2_cap": 1.0,
        "momentum": None,
        "clipping_threshold": 1.0,
    },
}
# Each dialect in full working order, whatever its rule.
SETTINGS = {**UNSCALED, **SCALED}

VECTORS_AND_MATRICES = [(7,), (), (6, 5), (5, 9), (5, 5), (1, 9), (9, 1), (1, 1)]
LAST_TWO = ("torch", "hf", "keras")
LARGEST_TWO = ("optax", "big_vision")


def shapes_for(source: str, target: str) -> list[Shape]:
    """Shapes that both factor over the same dimensions, or of which all elements are known."""
    shapes: list[Shape] = [*VECTORS_AND_MATRICES, (1, 1, 9), (1, 9, 1), (1, 1, 1)]
    names = {source, target}
    if "adafactor_pytorch" not in names:
        shapes += [(3, 4, 5), (3, 5, 4), (2, 3, 4, 6), (2, 3, 6, 4), (2, 3, 3)]
    if names <= set(LAST_TWO):
        shapes += [(6, 4, 3, 2), (5, 1, 1), (5, 4, 1)]
    if names <= set(LARGEST_TWO):
        shapes += [(6, 4, 3, 2), (5, 4, 1), (2, 5, 2, 5)]
    if names <= {"adafactor_pytorch", *LARGEST_TWO}:
        shapes += [(6, 4, 1, 1), (4, 6, 1, 1), (6, 1, 4), (4, 6, 1)]
    return shapes


def build(
    name: str,
    params: Sequence[Tensor],
    settings: dict[str, Any] | None = None,
) -> Any:
    settings = SETTINGS[name] if settings is None else settings
    return FORMS[name].dialect(params, **settings)  # type: ignore[call-arg,arg-type]


def trained(
    name: str,
    shapes: Sequence[Shape],
    settings: dict[str, Any] | None = None,
    steps: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """An optimizer after some steps."""
    optimizer = build(name, stepping.make_params(shapes, dtype), settings)
    stepping.take_steps(optimizer, steps)
    return optimizer


def convert(optimizer: Any, source: str, target: str, **kwargs: Any) -> dict[str, Any]:
    shapes = [tuple(p.shape) for p in stepping.params_of(optimizer)]
    return convert_state_dict(
        optimizer.state_dict(), source=source, target=target, **{"shapes": shapes, **kwargs}
    )


def continued(
    name: str, optimizer: Any, converted: dict[str, Any], settings: dict[str, Any] | None = None
) -> Any:
    """A new optimizer of a dialect, over copies of the parameters, with the converted state."""
    ours = build(name, stepping.clone_params(stepping.params_of(optimizer)), settings)
    ours.load_state_dict(converted)
    return ours


def second_moments(shape: Shape, index: int, steps: int) -> Tensor:
    """The EMA of g² in full, after some steps with ``stepping.grad_values``."""
    v = torch.zeros(shape, dtype=torch.float64)
    for step in range(steps):
        placeholders = [torch.zeros(0, dtype=torch.float64)] * index
        g = stepping.grad_values([*placeholders, torch.zeros_like(v)], step)[-1]
        beta2 = 1 - (step + 1) ** -0.8
        v = beta2 * v + (1 - beta2) * g**2
    return v


def expected_state(name: str, v: Tensor) -> dict[str, Tensor]:
    """What a dialect keeps of v, written out by hand."""
    layout = FORMS[name].dialect.layout
    if v.ndim < 2:
        return {layout.var: v}
    if name == "adafactor_pytorch":
        matrix = v
        if v.ndim == 3:
            matrix = v.reshape(v.shape[0], -1)
        elif v.ndim == 4:
            matrix = v.reshape(v.shape[0] * v.shape[3], -1)
        return {
            "exp_avg_sq_R": matrix.sum(0, keepdim=True),
            "exp_avg_sq_C": matrix.sum(1, keepdim=True),
        }
    row, col = v.ndim - 2, v.ndim - 1
    if name in LARGEST_TWO:
        by_size = sorted(range(v.ndim), key=lambda d: (v.shape[d], d))
        row, col = by_size[-2:]
    keepdim = name in ("torch", "big_vision")
    return {
        layout.row_var: v.mean(col, keepdim=keepdim),
        layout.col_var: v.mean(row, keepdim=keepdim),
    }


# --- what converts -------------------------------------------------------------------------------


COMMON = [
    pytest.param(source, target, common, id=f"{source}-{target}-{kind}")
    for source, target in PAIRS
    for kind, common in (("scaled", SCALED), ("unscaled", UNSCALED))
    if {source, target} <= common.keys()
]


@pytest.mark.parametrize(("source", "target", "common"), COMMON)
def test_training_goes_on_as_if_it_had_been_the_target_from_the_start(
    source: str, target: str, common: dict[str, dict[str, Any]]
) -> None:
    shapes = shapes_for(source, target)
    before = trained(source, shapes, common[source], steps=3)
    straight = trained(target, shapes, common[target], steps=6)
    like = build(target, stepping.make_params(shapes), common[target]).state_dict()
    converted = convert(before, source, target, like=like)
    after = continued(target, before, converted, common[target])
    stepping.take_steps(after, 3, start=3)
    stepping.assert_close_optimizers(after, straight, 1e-12)


@ALL_PAIRS
def test_moments_are_those_that_the_target_would_have_gathered(source: str, target: str) -> None:
    shapes = shapes_for(source, target)
    before = trained(source, shapes)
    like = build(target, stepping.make_params(shapes)).state_dict()
    converted = convert(before, source, target, like=like)
    for index, shape in enumerate(shapes):
        expected = expected_state(target, second_moments(shape, index, 4))
        state = converted["state"][index]
        counted = state if "step" in state else converted["param_groups"][0]
        assert float(counted["step"]) == 4
        assert state.keys() - {"step"} == expected.keys(), shape
        for key, value in expected.items():
            assert state[key].shape == value.shape
            assert stepping.relative_error(state[key], value) < 1e-12, (shape, key)


@ALL_NAMES
def test_a_second_moment_kept_in_full_converts_to_every_dialect(name: str) -> None:
    shapes = [*shapes_for("torch", "torch"), *shapes_for("optax", "adafactor_pytorch")]
    full = {**SETTINGS["adafactor_pytorch"], "enable_factorization": False}
    before = trained("adafactor_pytorch", shapes, full)
    like = build(name, stepping.make_params(shapes)).state_dict()
    # The entries have the shapes of the parameters, so that nobody has to tell them.
    converted = convert(before, "adafactor_pytorch", name, like=like, shapes=None)
    for index, shape in enumerate(shapes):
        expected = expected_state(name, second_moments(shape, index, 4))
        for key, value in expected.items():
            assert stepping.relative_error(converted["state"][index][key], value) < 1e-12
    stepping.take_steps(continued(name, before, converted), 1)


@ALL_NAMES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_row_or_column_is_the_second_moment_in_full(name: str, dtype: torch.dtype) -> None:
    shapes: list[Shape] = [(1, 9), (9, 1), (1, 1), (1, 9, 1), (9, 1, 1), (1, 1, 9)]
    if name in LAST_TWO:
        shapes += [(4, 9, 1), (4, 1, 9)]
    before = trained(name, shapes, dtype=dtype)
    like = build("optax", stepping.make_params(shapes), {}).state_dict()
    converted = convert(before, name, "optax", like=like)
    for index, shape in enumerate(shapes):
        v = converted["state"][index]["v"]
        expected = second_moments(shape, index, 4)
        assert v.shape == expected.shape
        assert stepping.relative_error(v, expected) < stepping.TOLERANCES[dtype]


@ALL_PAIRS
def test_there_and_back_is_bit_exact_for_lengths_that_are_powers_of_two(
    source: str, target: str
) -> None:
    shapes: list[Shape] = [(8,), (), (8, 16), (16, 8), (4, 4), (1, 8), (8, 1)]
    if "adafactor_pytorch" not in (source, target):
        shapes += [(2, 4, 8), (2, 8, 4)]
    before = trained(source, shapes, dtype=torch.float32)
    likes = [build(n, stepping.make_params(shapes)).state_dict() for n in (target, source)]
    there = convert(before, source, target, like=likes[0])
    back = convert_state_dict(there, source=target, target=source, like=likes[1], shapes=shapes)
    assert_same_state(back, before.state_dict())


def assert_same_state(converted: dict[str, Any], original: dict[str, Any]) -> None:
    """Bit by bit, but for RMS, which every step makes anew, and the type of the step."""
    assert converted["state"].keys() == original["state"].keys()
    for index, state in original["state"].items():
        ours = converted["state"][index]
        assert ours.keys() == state.keys() - {"RMS"}
        for key in ours:
            same = stepping.same_bits if key != "step" else lambda a, b: float(a) == float(b)
            assert same(ours[key], state[key]), (index, key)
    for ours, theirs in zip(converted["param_groups"], original["param_groups"], strict=True):
        assert float(ours.get("step", 0)) == float(theirs.get("step", 0))


@ALL_NAMES
def test_a_dialect_converts_to_itself_without_a_change_and_without_shapes(name: str) -> None:
    shapes = [s for s in stepping.SHAPES if s]
    before = trained(name, shapes, dtype=torch.float32)
    state_dict = before.state_dict()
    assert_same_state(convert_state_dict(state_dict, source=name, target=name), state_dict)


@pytest.mark.parametrize(("source", "target"), [("hf", "optax"), ("optax", "hf")])
def test_first_moments_of_the_step_convert(source: str, target: str) -> None:
    momentum = {
        "hf": {"beta1": 0.9},
        "optax": {"momentum": 0.9, "dtype_momentum": torch.float64},
    }
    settings = {name: {**SCALED[name], **momentum[name]} for name in momentum}
    shapes = shapes_for(source, target)
    before = trained(source, shapes, settings[source])
    like = build(target, stepping.make_params(shapes), settings[target]).state_dict()
    converted = convert(before, source, target, like=like, shapes=None)  # exp_avg tells them
    after = continued(target, before, converted, settings[target])
    stepping.take_steps(after, 5, start=4)
    straight = trained(target, shapes, settings[target], steps=9)
    stepping.assert_close_optimizers(after, straight, 1e-12)


def test_the_first_moment_of_a_reshaped_tensor_takes_the_shape_of_the_parameter() -> None:
    shapes = [(4, 3, 5)]
    before = trained("adafactor_pytorch", shapes, {"non_constant_decay": False})
    full = build(
        "adafactor_pytorch",
        stepping.make_params(shapes, torch.float64),
        {"enable_factorization": False, "non_constant_decay": False},
    )
    stepping.take_steps(full, 4)
    like = build("adafactor_pytorch", stepping.make_params(shapes), {}).state_dict()
    state_dict = full.state_dict()
    del state_dict["state"][0]["exp_avg_sq_hat"]
    converted = convert_state_dict(
        state_dict, source="adafactor_pytorch", target="adafactor_pytorch", like=like
    )
    exp_avg = before.state_dict()["state"][0]["exp_avg"]
    assert stepping.relative_error(converted["state"][0]["exp_avg"], exp_avg) < 1e-12


@ALL_PAIRS
def test_a_parameter_without_state_stays_without(source: str, target: str) -> None:
    optimizer = build(source, stepping.make_params([(4, 6), (3,)]))
    stepping.params_of(optimizer)[1].grad = torch.ones(3)
    optimizer.step()
    like = build(target, stepping.make_params([(4, 6), (3,)])).state_dict()
    assert convert(optimizer, source, target, like=like)["state"].keys() == {1}


@pytest.mark.parametrize("target", ["torch", "keras"])
def test_low_precision_moments_convert_in_float32(target: str) -> None:
    before = trained(
        "adafactor_pytorch",
        [(6, 5)],
        {**SETTINGS["adafactor_pytorch"], "state_dtype": torch.bfloat16},
        dtype=torch.float32,
    )
    state = before.state_dict()["state"][0]
    converted = convert(before, "adafactor_pytorch", target)["state"][0]
    layout = FORMS[target].dialect.layout
    row, col = (converted[key].flatten() for key in (layout.row_var, layout.col_var))
    assert stepping.same_bits(row, state["exp_avg_sq_C"].float().flatten() / 5)
    assert stepping.same_bits(col, state["exp_avg_sq_R"].float().flatten() / 6)


def test_what_kahan_rounding_carries_over_goes_along() -> None:
    settings = {**SCALED["torch"], "rounding": "kahan"}
    before = trained("torch", [(6, 5)], settings, dtype=torch.bfloat16)
    converted = convert(before, "torch", "hf")
    kahan = before.state_dict()["state"][0]["kahan"]
    assert kahan.any()
    assert stepping.same_bits(converted["state"][0]["kahan"], kahan)


# --- the rest of the state dict ------------------------------------------------------------------


def assert_neither_changed_nor_shared(
    state_dict: dict[str, Any], like: dict[str, Any] | None, **kwargs: Any
) -> None:
    inputs = [state_dict] if like is None else [state_dict, like]
    kept = copy.deepcopy(inputs)
    converted = convert_state_dict(state_dict, like=like, **kwargs)
    theirs = {t.data_ptr() for i in inputs for t in tensors_in(i)}
    assert theirs.isdisjoint(t.data_ptr() for t in tensors_in(converted))
    for group in converted["param_groups"]:
        group["params"].append(99)
        group["lr"] = 99
    converted["state"].clear()
    for before, after in zip(kept, inputs, strict=True):
        stepping.assert_same_values(after, before)


@ALL_PAIRS
def test_the_input_is_neither_changed_nor_shared(source: str, target: str) -> None:
    shapes = [(4, 6), (3,)]
    assert_neither_changed_nor_shared(
        trained(source, shapes).state_dict(),
        build(target, stepping.make_params(shapes)).state_dict(),
        source=source,
        target=target,
        shapes=shapes,
    )


@pytest.mark.parametrize(
    ("name", "target", "settings"),
    [
        ("adafactor_pytorch", "adafactor_pytorch", {"non_constant_decay": False}),
        ("keras", "keras", {"use_ema": True, "gradient_accumulation_steps": 3}),
        ("torch", "hf", {"rounding": "kahan"}),
    ],
)
def test_no_entry_is_shared_and_no_group_without_like(
    name: str, target: str, settings: dict[str, Any]
) -> None:
    state_dict = trained(name, [(4, 6), (3,)], settings, dtype=torch.bfloat16).state_dict()
    assert_neither_changed_nor_shared(state_dict, None, source=name, target=target)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return (
        [t for part in parts if not isinstance(part, str) for t in tensors_in(part)]
        if (isinstance(value, dict | list | tuple))
        else []
    )


def named_groups(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    weight, bias = stepping.make_params([(4, 6), (3,)], dtype)
    return [{"params": [("w", weight)]}, {"params": [("b", bias)]}]


@ALL_PAIRS
def test_the_groups_are_those_of_like_but_for_the_step(source: str, target: str) -> None:
    before = build(source, named_groups())
    stepping.take_steps(before, 3)
    like = build(target, named_groups()).state_dict()
    converted = convert(before, source, target, like=like)
    for ours, theirs in zip(converted["param_groups"], like["param_groups"], strict=True):
        assert {**ours, "step": 0} == {**theirs, "step": 0}
        assert float(ours.get("step", 3)) == 3
        assert ("step" in ours) == (target in ("keras", "optax"))


@pytest.mark.parametrize("target", ["torch", "hf", "keras", "optax"])
def test_without_like_there_are_no_hyperparameters(target: str) -> None:
    before = build("big_vision", named_groups(), {"momentum": None})  # unfactored: too small
    stepping.take_steps(before, 3)
    groups = convert_state_dict(before.state_dict(), source="big_vision", target=target)[
        "param_groups"
    ]
    counts = {"step": torch.tensor(3.0)} if target in ("keras", "optax") else {}
    assert groups == [
        {"params": [0], "param_names": ["w"], **counts},
        {"params": [1], "param_names": ["b"], **counts},
    ]


@pytest.mark.parametrize("name", LARGEST_TWO)
def test_a_source_without_hyperparameters_is_as_factored_as_its_state(name: str) -> None:
    before = trained(name, [(4, 6), (3, 3)])
    state_dict = before.state_dict()
    group = state_dict["param_groups"][0]
    state_dict["param_groups"] = [{k: group[k] for k in ("params", "step") if k in group}]
    shapes = [(4, 6), (3, 3)]
    converted = convert_state_dict(state_dict, source=name, target="torch", shapes=shapes)
    assert_same_state(converted, convert(before, name, "torch"))


def test_without_like_an_optimizer_keeps_its_own_hyperparameters() -> None:
    before = trained("torch", [(4, 6)])
    after = continued("hf", before, convert(before, "torch", "hf"), {"clip_threshold": 2.0})
    assert after.param_groups[0]["clip_threshold"] == 2.0
    stepping.take_steps(after, 1)
    assert float(next(iter(after.state.values()))["step"]) == 5


def test_groups_may_be_split_otherwise_in_like() -> None:
    before = trained("torch", [(4, 6), (3,)])
    params = stepping.make_params([(4, 6), (3,)])
    like = build("optax", [{"params": [params[0]]}, {"params": [params[1]]}]).state_dict()
    converted = convert(before, "torch", "optax", like=like)
    assert [group["params"] for group in converted["param_groups"]] == [[0], [1]]
    assert [float(group["step"]) for group in converted["param_groups"]] == [4, 4]


def test_settings_of_like_that_our_dialect_refuses_do_not_matter() -> None:
    before = trained("torch", [(4, 6)])
    like = build("big_vision", stepping.make_params([(4, 6)])).state_dict()
    like["param_groups"][0]["caution"] = True
    assert convert(before, "torch", "big_vision", like=like)["param_groups"][0]["caution"]


# --- steps ---------------------------------------------------------------------------------------


def uneven(name: str) -> Any:
    optimizer = build(name, named_groups())
    stepping.take_steps(optimizer, 2)
    stepping.params_of(optimizer)[1].grad = None
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("target", ["keras", "optax"])
def test_one_count_for_all_needs_all_counts_equal(target: str) -> None:
    like = build(target, stepping.make_params([(4, 6), (3,)])).state_dict()
    with pytest.raises(ValueError, match=r"'w' .* is at step 3, .*'b' .* at step 2"):
        convert(uneven("torch"), "torch", target, like=like)


@pytest.mark.parametrize("source", ["keras", "optax"])
def test_the_one_count_becomes_that_of_every_parameter_with_state(source: str) -> None:
    converted = convert(uneven(source), source, "torch")
    assert [float(converted["state"][index]["step"]) for index in (0, 1)] == [3, 3]


@pytest.mark.parametrize("target", ["keras", "optax"])
def test_the_one_count_needs_no_state(target: str) -> None:
    source = {"keras": "optax", "optax": "keras"}[target]
    state_dict = build(source, named_groups()).state_dict()
    for group in state_dict["param_groups"]:
        group["step"] = torch.tensor(5.0)
    converted = convert_state_dict(state_dict, source=source, target=target)
    assert [float(group["step"]) for group in converted["param_groups"]] == [5, 5]
    none = convert_state_dict(build("hf", named_groups()).state_dict(), source="hf", target=target)
    assert [float(group["step"]) for group in none["param_groups"]] == [0, 0]


@pytest.mark.parametrize("target", ["hf", "adafactor_pytorch"])
@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), torch.tensor(3)], ids=str)
def test_steps_are_ints_where_the_peer_has_ints(target: str, step: Any) -> None:
    state_dict = trained("torch", [(3,)]).state_dict()
    state_dict["state"][0]["step"] = step
    like = build(target, stepping.make_params([(3,)])).state_dict()
    converted = convert_state_dict(state_dict, source="torch", target=target, like=like)
    assert converted["state"][0]["step"] == 3
    assert type(converted["state"][0]["step"]) is int


def test_gradient_accumulation_counts_calls() -> None:
    keras = {"learning_rate": LR, "gradient_accumulation_steps": 3}
    params = stepping.make_params([(4, 6)])
    before = build("keras", params, keras)
    stepping.take_steps(before, 6)
    converted = convert(before, "keras", "torch")
    assert float(converted["state"][0]["step"]) == 2
    like = build("keras", stepping.make_params([(4, 6)]), keras).state_dict()
    back = convert_state_dict(converted, source="torch", target="keras", like=like)
    assert float(back["param_groups"][0]["step"]) == 6

    stepping.take_steps(before, 1)
    message = r"parameter #0 .* middle of an accumulation \(call 1 of 3\)"
    with pytest.raises(ValueError, match=message):
        convert(before, "keras", "torch")
    assert_same_state(convert(before, "keras", "keras", like=like), before.state_dict())


def test_the_average_of_the_weights_stays_within_keras() -> None:
    before = trained("keras", [(4, 6)], {"use_ema": True})
    average = before.state_dict()["state"][0]["average"]
    converted = convert(before, "keras", "keras")
    assert stepping.same_bits(converted["state"][0]["average"], average)
    with pytest.raises(ValueError, match=r"state 'average' of parameter #0 .* Delete 'average'"):
        convert(before, "keras", "torch")


# --- the peers themselves ------------------------------------------------------------------------

PEERS = ["torch", "hf", "big_vision"]
PEER_SETTINGS = {**SETTINGS, "torch": {"lr": LR, "eps": (1e-15, 1e-3)}}


@pytest.mark.parity
@pytest.mark.parametrize("target", PEERS)
@pytest.mark.parametrize("source", NAMES)
def test_a_peer_goes_on_from_our_state(source: str, target: str) -> None:
    shapes = shapes_for(source, target)
    before = trained(source, shapes, PEER_SETTINGS[source], dtype=torch.float32)
    params = stepping.clone_params(stepping.params_of(before))
    peer = peers.make_peer(target, params, **PEER_SETTINGS[target]).optimizer
    peer.load_state_dict(convert(before, source, target, like=peer.state_dict()))
    like = build(target, params, PEER_SETTINGS[target]).state_dict()
    ours = continued(
        target, before, convert(before, source, target, like=like), PEER_SETTINGS[target]
    )
    stepping.take_steps(peer, 3, start=4)
    stepping.take_steps(ours, 3, start=4)
    stepping.assert_close_optimizers(ours, peer, 3e-6)


@pytest.mark.parity
@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", PEERS)
def test_we_go_on_from_the_state_of_a_peer(source: str, target: str) -> None:
    shapes = shapes_for(source, target)
    params = stepping.make_params(shapes)
    peer = peers.make_peer(source, params, **PEER_SETTINGS[source]).optimizer
    stepping.take_steps(peer, 4)
    like = build(target, params).state_dict()
    theirs = convert_state_dict(
        peer.state_dict(), source=source, target=target, like=like, shapes=shapes
    )
    ours = convert(
        trained(source, shapes, PEER_SETTINGS[source], dtype=torch.float32),
        source,
        target,
        like=like,
    )
    for index, state in ours["state"].items():
        assert theirs["state"][index].keys() == state.keys()
        for key, value in state.items():
            value = torch.as_tensor(value)
            error = stepping.relative_error(torch.as_tensor(theirs["state"][index][key]), value)
            assert error < 3e-6, (index, key)
    stepping.take_steps(continued(target, peer, theirs), 1)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "shape"),
    [
        ("torch", "adafactor_pytorch", (3, 4, 5)),
        ("hf", "adafactor_pytorch", (6, 4, 3, 2)),
        ("adafactor_pytorch", "keras", (3, 4, 5)),
        ("adafactor_pytorch", "optax", (3, 4, 5)),
        ("torch", "optax", (6, 4, 3, 2)),
        ("big_vision", "hf", (5, 4, 3)),
        ("optax", "adafactor_pytorch", (6, 4, 3, 2)),
    ],
    ids=str,
)
def test_other_factored_dimensions_are_refused(source: str, target: str, shape: Shape) -> None:
    shapes = [(7,), shape]
    before = trained(source, shapes)
    like = build(target, stepping.make_params(shapes)).state_dict()
    with pytest.raises(ValueError, match=r"parameter #1 .* cannot be converted: .* sees matrices"):
        convert(before, source, target, like=like)
    full = copy.deepcopy(before.state_dict())
    del full["state"][1]  # as the message says
    convert_state_dict(full, source=source, target=target, like=like, shapes=shapes)


@pytest.mark.parametrize(
    ("source", "target", "settings"),
    [
        ("torch", "optax", {}),
        ("torch", "optax", {"min_dim_size_to_factor": 0, "factored": False}),
        ("hf", "big_vision", {"momentum": None}),
        ("optax", "big_vision", {"momentum": None}),
        ("keras", "adafactor_pytorch", {"beta1": 0, "enable_factorization": False}),
    ],
)
def test_factors_do_not_become_elements(source: str, target: str, settings: dict[str, Any]) -> None:
    shapes = [(7,), (1, 9), (5, 4)]
    before = trained(source, shapes)
    like = build(target, stepping.make_params(shapes), settings).state_dict()
    with pytest.raises(ValueError, match=r"parameter #2 .* \(5, 4\) .* keeps it in full .* like="):
        convert(before, source, target, like=like)


def test_without_like_the_settings_are_the_defaults_of_the_constructor() -> None:
    before = trained("torch", [(128, 130), (127, 128)])
    with pytest.raises(ValueError, match=r"parameter #1 .* \(127, 128\) .* keeps it in full"):
        convert(before, "torch", "optax")
    with pytest.raises(ValueError, match=r"parameter #0 .* like="):
        convert(trained("torch", [(7,)]), "torch", "big_vision")


@pytest.mark.parametrize(
    ("source", "settings", "target"),
    [
        ("adafactor_pytorch", {}, "hf"),
        ("adafactor_pytorch", {}, "torch"),
        ("adafactor_pytorch", {}, "big_vision"),
        ("hf", {"beta1": 0.9}, "torch"),
        ("hf", {"beta1": 0.9}, "big_vision"),
        ("hf", {"beta1": 0.9}, "optax"),  # whose default has none
        ("optax", {"momentum": 0.9, "min_dim_size_to_factor": 0}, "keras"),
        ("optax", {"momentum": 0.9, "min_dim_size_to_factor": 0}, "adafactor_pytorch"),
        ("big_vision", {}, "hf"),
    ],
)
def test_a_first_moment_without_a_place_is_refused(
    source: str, settings: dict[str, Any], target: str
) -> None:
    before = build(source, [("w", stepping.make_params([(7,)])[0])], settings)
    stepping.take_steps(before, 2)
    key = FORMS[source].dialect.layout.exp_avg
    with pytest.raises(ValueError, match=rf"{key!r} of parameter 'w' .* Delete {key!r}"):
        convert(before, source, target)
    state_dict = before.state_dict()
    del state_dict["state"][0][key]  # as the message says
    like = build(target, stepping.make_params([(7,)])).state_dict()
    convert_state_dict(state_dict, source=source, target=target, like=like, shapes=[(7,)])


@pytest.mark.parametrize(
    ("target", "settings", "entry"),
    [
        ("hf", {"beta1": 0.9}, "exp_avg"),
        ("adafactor_pytorch", {}, "exp_avg"),
        ("optax", {"momentum": 0.9}, "ema"),
        ("big_vision", {}, "exp_avg"),
        ("adafactor_pytorch", {"beta1": 0, "non_constant_decay": False}, "exp_avg_sq_hat"),
    ],
)
def test_a_moment_that_the_source_lacks_is_refused_unless_it_is_zero(
    target: str, settings: dict[str, Any], entry: str
) -> None:
    before = trained("torch", [(7,)])
    like = build(target, stepping.make_params([(7,)]), settings).state_dict()
    with pytest.raises(ValueError, match=f"{target} needs {entry!r} .* parameter #0 .* step 4"):
        convert(before, "torch", target, like=like)
    state_dict = before.state_dict()
    state_dict["state"][0]["step"] = torch.tensor(0.0)
    state_dict["state"][0]["variance"] = torch.zeros(7, dtype=torch.float64)
    converted = convert_state_dict(state_dict, source="torch", target=target, like=like)
    assert not converted["state"][0][entry].any()
    stepping.take_steps(continued(target, before, converted, settings), 1)


def test_amsgrad_maxima_are_carried_or_refused() -> None:
    settings = {"beta1": 0, "non_constant_decay": False}
    before = trained("adafactor_pytorch", [(4, 6), (7,)], settings)
    kept = convert(before, "adafactor_pytorch", "adafactor_pytorch")
    assert_same_state(kept, before.state_dict())
    with pytest.raises(ValueError, match=r"'exp_avg_sq_hat' of parameter #0 .* Delete"):
        convert(before, "adafactor_pytorch", "torch")
    full = trained("adafactor_pytorch", [(4, 6)], {**settings, "enable_factorization": False})
    with pytest.raises(ValueError, match=r"'exp_avg_sq_hat' of parameter #0 .* maxima"):
        convert(full, "adafactor_pytorch", "adafactor_pytorch", like=before_like(settings))


def before_like(settings: dict[str, Any]) -> dict[str, Any]:
    return build("adafactor_pytorch", stepping.make_params([(4, 6)]), settings).state_dict()


@pytest.mark.parametrize("source", ["optax", "adafactor_pytorch"])
@pytest.mark.parametrize("target", ["torch", "big_vision"])
def test_shapes_are_asked_for_where_the_state_does_not_tell_them(source: str, target: str) -> None:
    before = trained(source, [(7,), (4, 6)])
    like = build(target, stepping.make_params([(7,), (4, 6)])).state_dict()
    with pytest.raises(ValueError, match=r"factors of parameter #1 .* \(4, 6\).*shapes="):
        convert(before, source, target, like=like, shapes=None)


def test_the_first_moment_of_a_reshaped_tensor_does_not_tell_its_shape() -> None:
    before = trained("adafactor_pytorch", [(1, 1, 9)], {})
    full = {"enable_factorization": False}
    like = build("adafactor_pytorch", stepping.make_params([(1, 1, 9)]), full).state_dict()
    with pytest.raises(ValueError, match=r"factors of parameter #0 .* higher rank.*shapes="):
        convert(before, "adafactor_pytorch", "adafactor_pytorch", like=like, shapes=None)
    converted = convert(before, "adafactor_pytorch", "adafactor_pytorch", like=like)
    stepping.take_steps(continued("adafactor_pytorch", before, converted, full), 1)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 3), (7,)], ids=str)
def test_shapes_are_not_asked_for_where_optax_tells_them(shape: Shape) -> None:
    before = trained("optax", [shape])
    assert_same_state(
        convert(before, "optax", "torch", shapes=None), convert(before, "optax", "torch")
    )


Break = Callable[[dict[str, Any]], Any]

BROKEN: dict[str, tuple[Break, str]] = {
    "no state": (lambda sd: sd.pop("state"), "state_dict must have"),
    "state of a stranger": (lambda sd: sd["state"].update({7: {}}), "state for 7"),
    "no row_var": (lambda sd: sd["state"][1].pop("row_var"), "parameter 'b' .* both 'row_var'"),
    "both": (
        lambda sd: sd["state"][1].update(variance=torch.zeros(4, 6)),
        "parameter 'b' .* either 'variance' or both",
    ),
    "no moment": (lambda sd: sd["state"][0].pop("variance"), "parameter 'a' .* either 'variance'"),
    "unknown key": (
        lambda sd: sd["state"][0].update(exp_avg_sq=torch.zeros(7)),
        "'exp_avg_sq' of parameter 'a' .* unknown in torch",
    ),
    "no tensor": (
        lambda sd: sd["state"][0].update(variance=1.0),
        "'variance' of parameter 'a' .* is float",
    ),
    "integers": (
        lambda sd: sd["state"][0].update(variance=torch.zeros(7, dtype=torch.int32)),
        "'variance' of parameter 'a' .*torch.int32",
    ),
    "another shape": (
        lambda sd: sd["state"][1].update(row_var=torch.zeros(4, 2)),
        r"'(row|col)_var' of parameter 'b' .* shape \(",
    ),
    "another rank": (
        lambda sd: sd["state"][1].update(row_var=torch.zeros(4)),
        "parameter 'b'",
    ),
    "no step": (lambda sd: sd["state"][0].pop("step"), "'step' .* parameter 'a'"),
    "negative step": (
        lambda sd: sd["state"][0].update(step=torch.tensor(-1.0)),
        "'step' .* parameter 'a' .* expected a count",
    ),
    "half a step": (lambda sd: sd["state"][0].update(step=1.5), "'step' .* parameter 'a'"),
    "NaN steps": (
        lambda sd: sd["state"][0].update(step=torch.tensor(float("nan"))),
        "'step' .* parameter 'a'",
    ),
    "no count": (lambda sd: sd["state"][0].update(step="3"), "'step' .* parameter 'a'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_state_dict_is_refused_by_parameter_and_entry(case: str) -> None:
    names = zip("ab", stepping.make_params([(7,), (4, 6)]), strict=True)
    before = build("torch", list(names))
    stepping.take_steps(before, 2)
    state_dict = before.state_dict()
    break_it, message = BROKEN[case]
    break_it(state_dict)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, source="torch", target="hf")


@pytest.mark.parametrize("name", ["keras", "optax"])
def test_a_group_without_its_count_is_refused(name: str) -> None:
    state_dict = trained(name, [(7,)]).state_dict()
    del state_dict["param_groups"][0]["step"]
    with pytest.raises(ValueError, match="'step' in the param group of parameter #0"):
        convert_state_dict(state_dict, source=name, target="torch")


@pytest.mark.parametrize("name", ["keras", "optax"])
def test_a_count_below_zero_is_refused(name: str) -> None:
    state_dict = trained(name, [(7,)]).state_dict()
    state_dict["param_groups"][0]["step"] = torch.tensor(-2.0)
    with pytest.raises(ValueError, match=r"'step' in the param group of parameter #0 .* count"):
        convert_state_dict(state_dict, source=name, target="torch")


def test_the_dialect_of_another_state_dict_is_refused() -> None:
    state_dict = trained("torch", [(4, 6)]).state_dict()
    for name in ("hf", "keras", "optax", "big_vision", "adafactor_pytorch"):
        with pytest.raises(ValueError, match=f"parameter #0 .* {name}|group of parameter #0"):
            convert_state_dict(state_dict, source=name, target="torch")


def test_arguments_that_do_not_fit_are_refused() -> None:
    state_dict = build("torch", named_groups()).state_dict()
    other = build("hf", stepping.make_params([(4, 6)])).state_dict()
    renamed = copy.deepcopy(state_dict)
    renamed["param_groups"][0]["param_names"] = ["v"]

    def refused(message: str, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=message):
            convert_state_dict(state_dict, **{"source": "torch", "target": "hf", **kwargs})

    refused("source must be one of torch, hf, .*; got 'transformers'", source="transformers")
    refused("target must be one of", target="adam")
    refused("like has 1 parameters, state_dict has 2", like=other)
    refused("shapes has 1 parameters", shapes=[(4, 6)])
    refused("like must have 'state' and 'param_groups'", like={"state": {}})
    refused("parameter 'w' .* is parameter 'v' .* in like", like=renamed)


def test_shapes_that_do_not_fit_are_refused() -> None:
    before = trained("torch", [(7,), (4, 6)])
    with pytest.raises(
        ValueError, match=r"'row_var' of parameter #1 .* parameter of shape \(6, 4\)"
    ):
        convert(before, "torch", "hf", shapes=[(7,), (6, 4)])
    with pytest.raises(ValueError, match="parameter #1"):
        convert(before, "torch", "hf", shapes=[(7,), (24,)])


@pytest.mark.parametrize(
    ("target", "settings"), [*SETTINGS.items(), ("optax", {}), ("big_vision", {"momentum": None})]
)
def test_moments_of_tensors_without_elements_convert(target: str, settings: dict[str, Any]) -> None:
    shapes = [(0, 5), (5, 0), (0,)]
    before = trained("torch", shapes)
    like = build(target, stepping.make_params(shapes), settings).state_dict()
    converted = convert(before, "torch", target, like=like)
    stepping.take_steps(continued(target, before, converted, settings), 1)
