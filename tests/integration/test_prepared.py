"""A step that is taken as it was prepared is the same as one that was not, whatever has changed.

Each test compares an optimizer with a twin that prepares every step anew, bit by bit.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_adafactor import engine, layouts, preparing
from fused_adafactor.backends import cpp
from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, OPTAX, TORCH, VARIANTS, Dialect
from tests.stepping import params_of

SHAPES = ((6, 6), (7,), (4, 3, 5), (7,), (), (0, 3))
BACKENDS = ["reference", "cpp"] if cpp.missing() is None else ["reference"]
Change = Callable[[Any], None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":  # without the library, getters tell what has changed
        monkeypatch.setattr(layouts, "_interpreter", lambda: None)
    return request.param


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every tensor that a step has looked at the long way."""
    calls: list[Any] = []
    describe = preparing.described
    monkeypatch.setattr(
        preparing, "described", lambda id, *args: (calls.append(id), describe(id, *args))[1]
    )
    return calls


def build(dialect: Dialect, backend: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return dialect(stepping.make_params(SHAPES, dtype), backend=backend, **kwargs)


def forget(optimizer: Any) -> None:
    """Make the next step of an optimizer its first, as far as preparing goes."""
    optimizer._known = None
    optimizer._settled = {}


def assert_steps_alike(kept: Any, fresh: Any, change: Change, steps: int = 3) -> None:
    """Three steps, the change, and as many more; one of the two remembers nothing."""
    for step in range(2 * steps):
        for optimizer in (kept, fresh):
            for p, g in zip(
                params_of(optimizer), stepping.grad_values(params_of(optimizer), step), strict=True
            ):
                p.grad = g
            if step == steps:
                change(optimizer)
        forget(fresh)
        kept.step()
        fresh.step()
        stepping.assert_same_optimizers(kept, fresh)


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_has_the_addresses_of_stays(
    backend: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that was prepared, also when another step has taken its place."""
    optimizer = build(HF, backend, nonfinite="skip")
    stepping.take_steps(optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "is_capturing", lambda device: captured)
        stepping.take_steps(optimizer, 1)
    prepared = weakref.ref(optimizer._known.prepared)
    forget(optimizer)
    stepping.take_steps(optimizer, 1)
    gc.collect()
    assert (prepared() is not None) == captured
    engine._captured.clear()


# --- what a user can do between two steps --------------------------------------------------------


def param_of(optimizer: Any, number: int = 0) -> Tensor:
    return params_of(optimizer)[number]


def state_of(optimizer: Any, number: int = 1) -> dict[str, Any]:
    return optimizer.state[param_of(optimizer, number)]


def nothing(optimizer: Any) -> None:
    pass


def gradient_transposed(optimizer: Any) -> None:
    p = param_of(optimizer)
    p.grad = p.grad.t().contiguous().t()


def gradient_expanded(optimizer: Any) -> None:
    p = param_of(optimizer)
    p.grad = p.grad[:1].expand(p.shape)


def gradient_laid_out_anew_in_place(optimizer: Any) -> None:
    grad = param_of(optimizer).grad
    grad.data = grad.data.t()


def gradient_gone(optimizer: Any) -> None:
    param_of(optimizer).grad = None


def param_moved_to_the_next_group(optimizer: Any) -> None:
    """The order of all parameters stays."""
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def gradients_gone(optimizer: Any) -> None:
    optimizer.zero_grad()


def data_replaced(optimizer: Any) -> None:
    p = param_of(optimizer)
    p.data = p.data.clone() * 2


def data_transposed_where_it_is(optimizer: Any) -> None:
    p = param_of(optimizer)
    p.data = p.data.t()


def dtype_changed(optimizer: Any) -> None:
    p = param_of(optimizer, 1)
    grad, p.grad = p.grad, None
    p.data = p.data.double()
    p.grad = grad.double()
    optimizer.load_state_dict(optimizer.state_dict())


def state_entry_replaced(optimizer: Any) -> None:
    state_of(optimizer)["variance"] = state_of(optimizer)["variance"] * 2


def state_entry_replaced_by_its_data(optimizer: Any) -> None:
    entry = state_of(optimizer)["variance"]
    entry.data = entry.data * 2


def state_entry_written(optimizer: Any) -> None:
    state_of(optimizer)["variance"].mul_(3)


def state_of_one_gone(optimizer: Any) -> None:
    state_of(optimizer).clear()


def state_replaced(optimizer: Any) -> None:
    optimizer.state[param_of(optimizer)] = copy.deepcopy(state_of(optimizer, 0))


def states_exchanged(optimizer: Any) -> None:
    p, q = param_of(optimizer, 1), param_of(optimizer, 3)
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]


def state_gone(optimizer: Any) -> None:
    optimizer.state.clear()


def counters_written(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(40)


def counter_written(optimizer: Any) -> None:
    state_of(optimizer)["step"].fill_(40)


def counter_replaced(optimizer: Any) -> None:
    state_of(optimizer)["step"] = state_of(optimizer)["step"].clone()


def counter_of_another_dtype(optimizer: Any) -> None:
    state_of(optimizer)["step"] = state_of(optimizer)["step"].long()


def counters_shared(optimizer: Any) -> None:
    state_of(optimizer)["step"] = state_of(optimizer, 2)["step"]


def group_value(**values: Any) -> Change:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[0].update(values)

    change.__name__ = "group_" + "_".join(values)
    return change


def params_swapped(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[1], params[3] = params[3], params[1]


def param_replaced(optimizer: Any) -> None:
    old = optimizer.param_groups[0]["params"][0]
    new = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach() * 2)
    new.grad = old.grad
    optimizer.state[new] = optimizer.state.pop(old)


def param_removed(optimizer: Any) -> None:
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0))


def group_replaced(optimizer: Any) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}


def group_added(optimizer: Any) -> None:
    (param,) = stepping.make_params(((3, 4),), seed=1)
    param.grad = torch.ones_like(param)
    optimizer.add_param_group({"params": [param], "lr": 0.5})


def state_dict_loaded(optimizer: Any) -> None:
    loaded = copy.deepcopy(optimizer.state_dict())
    for state in loaded["state"].values():
        state["step"].fill_(1)
    optimizer.load_state_dict(loaded)


CHANGES: list[Change] = [
    nothing,
    gradient_transposed,
    gradient_expanded,
    gradient_laid_out_anew_in_place,
    gradient_gone,
    gradients_gone,
    data_replaced,
    data_transposed_where_it_is,
    dtype_changed,
    state_entry_replaced,
    state_entry_replaced_by_its_data,
    state_entry_written,
    state_of_one_gone,
    state_replaced,
    states_exchanged,
    state_gone,
    counters_written,
    counter_written,
    counter_replaced,
    counter_of_another_dtype,
    counters_shared,
    group_value(lr=0.7),
    group_value(lr=torch.tensor(0.7)),
    group_value(d=1.5),
    group_value(maximize=True),
    group_value(weight_decay=0.5),
    group_value(max_grad_norm=0.1),
    group_value(nonfinite="skip"),
    group_value(capturable=True),
    params_swapped,
    param_replaced,
    param_removed,
    group_replaced,
    group_added,
    state_dict_loaded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_followed(change: Change, backend: str) -> None:
    kept, fresh = (build(TORCH, backend, max_grad_norm=5.0) for _ in range(2))
    assert_steps_alike(kept, fresh, change)


def test_a_pair_that_is_written_in_place_is_followed(backend):
    def smaller(optimizer: Any) -> None:
        optimizer.param_groups[0]["eps"][1] = 1e-5

    kept, fresh = (build(TORCH, backend, eps=[None, 10.0]) for _ in range(2))
    assert_steps_alike(kept, fresh, smaller)


def test_a_gradient_that_moves_is_followed(backend):
    """From one parameter to another that looks the same, so that all gradients do too."""
    kept, fresh = (build(TORCH, backend) for _ in range(2))
    for step in range(4):
        for optimizer in (kept, fresh):
            stepping.take_steps(optimizer, 1, start=step) if step < 2 else None
            first, second = (param_of(optimizer, number) for number in (1, 3))
            for p, grad in ((first, step % 2), (second, 1 - step % 2)):
                p.grad = torch.full_like(p, step + 1.0) if grad else None
            param_of(optimizer, 2).grad = None
        forget(fresh)
        kept.step()
        fresh.step()
        stepping.assert_same_optimizers(kept, fresh)


def test_a_parameter_that_moves_to_another_group_is_followed(backend):
    def build_two() -> Any:
        params = stepping.make_params(SHAPES)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-4, "seed": 1}]
        return TORCH(groups, backend=backend)

    assert_steps_alike(build_two(), build_two(), param_moved_to_the_next_group)


def test_another_dtype_of_the_same_size_is_followed(backend):
    """The same bits at the same address are other numbers."""

    def as_float16(optimizer: Any) -> None:
        p = param_of(optimizer)
        p.data = p.data.view(torch.float16)

    kept, fresh = (build(TORCH, backend, torch.bfloat16) for _ in range(2))
    assert_steps_alike(kept, fresh, as_float16)


@pytest.mark.parametrize("change", [group_value(seed=5), params_swapped], ids=lambda c: c.__name__)
def test_the_key_of_stochastic_rounding_is_followed(change: Change, backend: str) -> None:
    kept, fresh = (build(TORCH, backend, torch.bfloat16, rounding="stochastic") for _ in range(2))
    assert_steps_alike(kept, fresh, change)


@pytest.mark.parametrize(("dialect", "variant"), VARIANTS, ids=str)
def test_every_variant_goes_on_as_it_was_prepared(dialect, variant, backend):
    kept, fresh = (build(dialect, backend, **dialect.variants[variant]) for _ in range(2))
    assert_steps_alike(kept, fresh, gradient_gone)


def test_the_one_counter_of_all_groups_is_followed(backend):
    def written(optimizer: Any) -> None:
        optimizer.param_groups[0]["step"].fill_(40)

    def replaced(optimizer: Any) -> None:
        optimizer.param_groups[0]["step"] = torch.tensor(30.0)

    for change in (written, replaced):
        assert_steps_alike(build(KERAS, backend), build(KERAS, backend), change)


def test_a_mask_of_optax_is_asked_in_every_step(backend):
    decays = [True]

    def mask(name: str | None, param: Tensor) -> bool:
        return decays[0] and param.dim() > 1

    def switch(_: Any) -> None:
        decays[0] = False

    kept, fresh = (
        build(OPTAX, backend, weight_decay_rate=0.1, weight_decay_mask=mask) for _ in range(2)
    )
    assert_steps_alike(kept, fresh, switch)


def test_nonfinite_gradients_part_the_counters(backend):
    """Steps are counted for some parameters and not for others, and go on so."""

    def spoil(optimizer: Any) -> None:
        param_of(optimizer).grad.fill_(torch.nan)

    kept, fresh = (build(TORCH, backend, nonfinite="skip") for _ in range(2))
    assert_steps_alike(kept, fresh, spoil)
    assert [float(kept.state[p]["step"]) for p in params_of(kept)] == [5.0, 6.0, 6.0, 6.0, 6.0, 6.0]


def test_a_parameter_in_the_memory_of_another_has_no_state_yet(backend):
    optimizer = build(TORCH, backend)
    stepping.take_steps(optimizer, 3)
    old = param_of(optimizer)
    new = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach())
    new.grad = old.grad
    optimizer.step()
    assert float(optimizer.state[new]["step"]) == 1.0
    assert float(optimizer.state[old]["step"]) == 3.0


# --- errors --------------------------------------------------------------------------------------


def sparse_gradient(optimizer: Any) -> None:
    p = param_of(optimizer)
    p.grad = p.grad.to_sparse()


def bad_count(optimizer: Any) -> None:
    state_of(optimizer)["step"].fill_(0.5)


def bad_counts(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(torch.nan)


def missing_entry(optimizer: Any) -> None:
    del state_of(optimizer)["variance"]


def renamed_entry(optimizer: Any) -> None:
    """Every value is what it was, and in its place."""
    state = state_of(optimizer)
    values = list(state.items())
    state.clear()
    state.update({"v" if key == "variance" else key: value for key, value in values})


def reshaped_entry(optimizer: Any) -> None:
    """At the same address."""
    state_of(optimizer)["variance"] = state_of(optimizer)["variance"].view(1, 7)


def no_tensor(optimizer: Any) -> None:
    state_of(optimizer)["variance"] = 1.0


def other_shape_of_data(optimizer: Any) -> None:
    """At the same address."""
    p = param_of(optimizer, 2)
    grad, p.grad = p.grad, None
    p.data = p.data.view(3, 4, 5)
    p.grad = grad.view(3, 4, 5)


def fewer_rows(optimizer: Any) -> None:
    """At the same address, with the same strides."""
    p = param_of(optimizer, 2)
    p.data = p.data[:2]


def fewer_rows_of_the_gradient(optimizer: Any) -> None:
    grad = param_of(optimizer, 2).grad
    grad.data = grad.data[:2]


def integers_in_the_gradient(optimizer: Any) -> None:
    grad = param_of(optimizer).grad
    grad.data = grad.data.view(torch.int32)


def negative_lr(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = -1.0


FAULTS = [
    sparse_gradient,
    bad_count,
    bad_counts,
    missing_entry,
    renamed_entry,
    reshaped_entry,
    no_tensor,
    other_shape_of_data,
    fewer_rows,
    fewer_rows_of_the_gradient,
    integers_in_the_gradient,
    negative_lr,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_prepared_step_raises_what_a_first_one_does(fault: Change, backend: str) -> None:
    raised = []
    for remembers in (True, False):
        optimizer = build(TORCH, backend)
        stepping.take_steps(optimizer, 3)
        fault(optimizer)
        if not remembers:
            forget(optimizer)
        with stepping.assert_untouched(optimizer), pytest.raises(Exception) as caught:  # noqa: PT011
            optimizer.step()
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_what_has_not_changed_is_not_described_again(dialect, backend, described):
    """New gradients of the same layout, new values and a new lr are no change."""
    optimizer = build(dialect, backend)
    stepping.take_steps(optimizer, 1)
    described.clear()
    for step in range(1, 4):
        stepping.take_steps(optimizer, 1, start=step)
        optimizer.param_groups[0]["lr"] = 0.1 * step
        with torch.no_grad():
            param_of(optimizer).mul_(2)
    assert described == []
    param_of(optimizer).grad = None
    optimizer.step()
    assert len(described) == len(SHAPES) - 1


# --- memory and copies ---------------------------------------------------------------------------


def test_no_gradient_is_kept_alive(backend):
    optimizer = build(HF, backend, max_grad_norm=1.0)
    stepping.take_steps(optimizer, 3)
    alive = [weakref.ref(p.grad) for p in params_of(optimizer)]
    gc.disable()
    try:
        optimizer.zero_grad()
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_what_a_step_no_longer_concerns_is_let_go_of(backend):
    optimizer = build(TORCH, backend)
    stepping.take_steps(optimizer, 2)
    param = optimizer.param_groups[0]["params"].pop(0)
    alive = [weakref.ref(param), weakref.ref(optimizer.state.pop(param)["row_var"])]
    del param
    gc.disable()
    try:
        optimizer.step()
        assert [ref() for ref in alive] == [None, None]
        gone = weakref.ref(params_of(optimizer)[0])
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_steps_its_own_tensors(duplicate, backend):
    optimizer = build(TORCH, backend)
    stepping.take_steps(optimizer, 3)
    other = duplicate(optimizer)
    assert other._known is None
    with stepping.assert_untouched(optimizer):
        stepping.take_steps(other, 3, start=3)
    for p in params_of(optimizer):
        p.grad = None
    stepping.take_steps(optimizer, 3, start=3)
    stepping.assert_same_optimizers(optimizer, other)
