"""Parameters stepped as their gradients arrive are stepped as ``step()`` steps them, bit by bit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_adafactor import in_backward
from tests import stepping
from tests.dialects import DIALECTS, KERAS, KERAS_EXTRAS, OPTAX, TORCH, VARIANTS, Dialect
from tests.integration import test_prepared as prepared
from tests.stepping import params_of

pytestmark = pytest.mark.usefixtures("each_backend")

SHAPES = prepared.SHAPES
# A common norm is of all gradients together.
ALONE = [(d, v) for d, v in VARIANTS if "global_clipnorm" not in d.variants[v]]
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)

described = prepared.described


def build(dialect: Dialect, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return dialect(stepping.make_params(SHAPES, dtype), **kwargs)


def twins(dialect: Dialect, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """An optimizer that steps in the backward pass, and one that does not."""
    inside, whole = (build(dialect, *args, **kwargs) for _ in range(2))
    inside.enable_backward_step()
    return inside, whole


def loss_of(optimizer: Any, step: int, without: Sequence[int] = (), scale: float = 1.0) -> Tensor:
    """A loss whose gradients are ``stepping.grad_values``."""
    params = params_of(optimizer)
    terms = [
        (p * g).sum()
        for number, (p, g) in enumerate(
            zip(params, stepping.grad_values(params, step, scale), strict=True)
        )
        if number not in without
    ]
    return torch.stack(terms[step % len(terms) :] + terms[: step % len(terms)]).sum()


def train(optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        loss_of(optimizer, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_trained_alike(inside: Any, whole: Any, steps: int = 4) -> None:
    for step in range(steps):
        train(inside, 1, step)
        train(whole, 1, step)
        stepping.assert_same_optimizers(inside, whole)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "variant"), ALONE, ids=str)
def test_every_variant_is_stepped_to_the_same_bits(dialect, variant):
    """Also where a parameter has no gradient for once."""
    inside, whole = twins(dialect, **dialect.variants[variant])
    for step in range(7):
        for optimizer in (inside, whole):
            loss_of(optimizer, step, without=[step] if step > 2 else []).backward()
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


@pytest.mark.parametrize("extra", sorted(set(KERAS_EXTRAS) - {"global_clipnorm"}))
@EVERY_DIALECT
def test_every_extra_of_keras_is_that_of_a_whole_step(dialect, extra):
    """Also where a parameter has no gradient for once."""
    inside, whole = twins(dialect, **KERAS_EXTRAS[extra])
    for step in range(7):
        for optimizer in (inside, whole):
            loss_of(optimizer, step, without=[step] if step > 2 else []).backward()
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@EVERY_DIALECT
def test_every_rounding_is_that_of_a_whole_step(dialect, rounding):
    inside, whole = twins(dialect, torch.bfloat16, rounding=rounding, seed=3)
    assert_trained_alike(inside, whole)


@EVERY_DIALECT
def test_capturable_counters_are_followed(dialect):
    assert_trained_alike(*twins(dialect, capturable=True))


def test_nonfinite_gradients_are_skipped_where_each_parameter_counts_its_own_steps():
    inside, whole = twins(TORCH, nonfinite="skip")
    for step in range(4):
        for optimizer in (inside, whole):
            (loss_of(optimizer, step) + params_of(optimizer)[step % 2].sum() * torch.nan).backward()
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)
    assert [float(inside.state[p]["step"]) for p in params_of(inside)][:3] == [2.0, 2.0, 4.0]


@pytest.mark.parametrize("reverses", [False, True])
def test_gradients_that_are_views_are_taken(reverses):
    """Of a sum, which every element shares, and of a transposed matrix."""
    inside, whole = twins(TORCH)
    for _ in range(4):
        for optimizer in (inside, whole):
            terms = [p.mT.tanh().sum() if p.dim() > 1 else p.sum() for p in params_of(optimizer)]
            torch.stack(terms[::-1] if reverses else terms).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph:UserWarning")
def test_a_gradient_with_a_graph_of_its_own_is_taken():
    inside, whole = twins(TORCH)
    for optimizer in (inside, whole):
        loss_of(optimizer, 0).square().backward(create_graph=True)
        optimizer.step()
    stepping.assert_same_optimizers(inside, whole)


# --- models --------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """Its first and last weights are one parameter, and its blocks may be checkpointed."""

    def __init__(self, reenters: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
            for _ in range(3)
        )
        self.head = torch.nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.reenters = reenters

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.reenters is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reenters)
        return torch.nn.functional.cross_entropy(self.head(x[:-1]), tokens[1:])


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 11, (9,), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("reenters", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@EVERY_DIALECT
def test_models_are_trained_to_the_same_bits(dialect, reenters):
    models = [Tied(reenters) for _ in range(2)]
    inside, whole = (dialect(model.named_parameters()) for model in models)
    inside.enable_backward_step(models[0])
    for step in range(4):
        for model, optimizer in zip(models, (inside, whole), strict=True):
            model(tokens_of(step)).backward()
            if optimizer is inside:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


def test_a_parameter_of_several_reentrant_checkpoints_is_refused_by_name():
    layer = torch.nn.Linear(4, 4)
    optimizer = TORCH(layer.named_parameters())
    optimizer.enable_backward_step(layer)
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"'(weight|bias)' .*use_reentrant=False"):
        x.sum().backward()


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_are_in_memory_a_layer_at_a_time(enabled):
    width, depth = 512, 8
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
    params = list(model.parameters())
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for p in params:
        p.register_post_accumulate_grad_hook(count)  # comes before ours
    optimizer = TORCH(params)
    if enabled:
        optimizer.enable_backward_step(model)
    for _ in range(2):
        model(torch.randn(3, width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = params[0].nbytes + params[1].nbytes
    total = depth * layer
    assert len(alive) == 2 * len(params)
    if enabled:
        assert max(alive) < layer + in_backward.BATCH_BYTES < total / 2
    else:
        assert max(alive) == total


def test_threads_that_run_backward_take_turns(monkeypatch):
    count = 4
    inside, whole = (TORCH(stepping.make_params(((64, 64),) * (3 * count))) for _ in range(2))
    inside.enable_backward_step()
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 1)
    stepping_now, step_some = threading.Semaphore(1), in_backward.PartialOptimizer._step_some
    met = []

    def watched(self: Any, params: Sequence[Tensor]) -> None:
        met.append(not stepping_now.acquire(blocking=False))
        time.sleep(1e-3)  # another thread may run
        step_some(self, params)
        stepping_now.release()

    monkeypatch.setattr(in_backward.PartialOptimizer, "_step_some", watched)
    for step in range(3):
        losses = []
        for optimizer in (inside, whole):
            params = params_of(optimizer)
            grads = stepping.grad_values(params, step)
            terms = [(p * g).sum() for p, g in zip(params, grads, strict=True)]
            losses.append([torch.stack(terms[i::count]).sum() for i in range(count)])
        threads = [threading.Thread(target=loss.backward) for loss in losses[0]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for loss in losses[1]:
            loss.backward()
        for optimizer in (inside, whole):
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)
    assert len(met) > 9 * count
    assert not any(met)


# --- batches -------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Numbers of the parameters that are stepped together."""
    taken: list[list[int]] = []
    step_some = in_backward.PartialOptimizer._step_some

    def noted(self: Any, params: Sequence[Tensor]) -> None:
        if params:
            taken.append([id.index for id in self._find(params)])
        step_some(self, params)

    monkeypatch.setattr(in_backward.PartialOptimizer, "_step_some", noted)
    return taken


def test_small_gradients_wait_for_each_other(batches):
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    loss_of(optimizer, 0).backward()
    assert batches == [list(range(len(SHAPES)))]


def test_large_gradients_do_not_wait(batches):
    """They take along what does."""
    shapes = ((700, 700), (3,), (700, 700), (5,))
    optimizer = TORCH(stepping.make_params(shapes))
    optimizer.enable_backward_step()
    x = torch.ones(())
    for p in params_of(optimizer):
        x = (p * x).mean()
    x.backward()  # the last one's gradient comes first
    assert batches == [[2, 3], [0, 1]]


def test_batches_of_a_different_order_are_the_same_step(described):
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    train(optimizer, 1)
    described.clear()
    train(optimizer, 4, start=1)  # loss_of turns the order
    assert described == []


def test_without_a_callback_at_the_end_step_does_what_is_left(monkeypatch):
    engine = types.SimpleNamespace(_execution_engine=object())
    monkeypatch.setattr(in_backward, "Variable", engine)
    inside, whole = twins(TORCH)
    loss_of(inside, 0).backward()
    assert all(p.grad is not None for p in params_of(inside))
    inside.step()
    train(whole, 1)
    stepping.assert_same_optimizers(inside, whole)
    assert all(p.grad is None for p in params_of(inside))


# --- what is around a step -----------------------------------------------------------------------


@EVERY_DIALECT
def test_a_closure_is_run_and_its_loss_returned(dialect):
    inside, whole = twins(dialect)
    for step in range(3):

        def evaluate(optimizer: Any, step: int = step) -> Callable[[], Tensor]:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(optimizer, step)
                loss.backward()
                return loss

            return closure

        assert inside.step(evaluate(inside)) == whole.step(evaluate(whole))
        stepping.assert_same_optimizers(inside, whole)


def test_hooks_of_step_run_once_each():
    calls = []
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, 2)
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("first", ["enabled", "scheduled"])
def test_lr_schedulers_are_followed_without_a_warning(first):
    inside, whole = (build(TORCH, lr=0.5) for _ in range(2))
    if first == "enabled":
        inside.enable_backward_step()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (inside, whole)]
    if first == "scheduled":
        inside.enable_backward_step()
    for step in range(4):
        for optimizer, scheduler in zip((inside, whole), schedulers, strict=True):
            train(optimizer, 1, step)
            scheduler.step()
        stepping.assert_same_optimizers(inside, whole)


@EVERY_DIALECT
def test_gradients_assigned_by_hand_are_left_to_step(dialect):
    inside, whole = twins(dialect)
    for step in range(4):
        for optimizer in (inside, whole):
            loss_of(optimizer, step, without=[1, 3]).backward()
            for number in (1, 3):
                p = params_of(optimizer)[number]
                p.grad = torch.full_like(p, step + 1.0)
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


def test_a_call_of_step_without_gradients_is_none():
    for dialect in (TORCH, KERAS):
        inside, whole = twins(dialect)
        for optimizer in (inside, whole):
            train(optimizer, 2)
            optimizer.step()
        stepping.assert_same_optimizers(inside, whole)


def test_asking_for_gradients_steps_nothing():
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    with stepping.assert_untouched(optimizer):
        torch.autograd.grad(loss_of(optimizer, 0), params_of(optimizer))


# --- parameters that come and go -----------------------------------------------------------------


def test_groups_that_are_added_are_stepped_too():
    inside, whole = twins(TORCH)
    train(inside, 2)
    train(whole, 2)
    for optimizer in (inside, whole):
        optimizer.add_param_group({"params": stepping.make_params(((5, 4),), seed=3), "lr": 0.3})
    loss_of(inside, 2).backward()
    assert all(p.grad is None for p in params_of(inside))
    inside.step()
    train(whole, 1, 2)
    stepping.assert_same_optimizers(inside, whole)


def test_a_parameter_that_thaws_is_stepped_too():
    inside, whole = (build(TORCH) for _ in range(2))
    for optimizer in (inside, whole):
        params_of(optimizer)[0].requires_grad_(False)
    inside.enable_backward_step()
    for step in range(5):
        for optimizer in (inside, whole):
            if step == 2:
                params_of(optimizer)[0].requires_grad_(True)
            loss_of(optimizer, step, without=[0] if step < 2 else []).backward()
            # Its first gradient is left to step(), which sees that there are more to come.
            assert optimizer is whole or step == 2 or params_of(inside)[0].grad is None
            optimizer.step()
            optimizer.zero_grad()
        stepping.assert_same_optimizers(inside, whole)


def test_a_parameter_that_is_taken_out_is_left_alone():
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    train(optimizer, 2)
    gone = optimizer.param_groups[0]["params"].pop(0)
    before = gone.detach().clone()
    for step in range(2):
        (loss_of(optimizer, step) + gone.sum()).backward()
        optimizer.step()
        assert stepping.same_bits(gone.detach(), before)
        assert gone.grad is not None
    handle = optimizer._in_backward
    assert handle is not None
    assert gone not in handle._hooks


# --- leaving it ----------------------------------------------------------------------------------


def test_removal_restores_everything():
    inside, whole = (build(KERAS) for _ in range(2))
    with inside.enable_backward_step() as handle:
        train(inside, 2)
    for _ in range(2):
        loss_of(inside, 2).backward()
        assert all(p.grad is not None for p in params_of(inside))
        inside.zero_grad()
        handle.remove()
    train(whole, 2)
    train(inside, 2, start=2)
    train(whole, 2, start=2)
    stepping.assert_same_optimizers(inside, whole)
    again = inside.enable_backward_step()
    handle.remove()  # of no concern to the other
    loss_of(inside, 4).backward()
    assert all(p.grad is None for p in params_of(inside))
    inside.step()
    again.remove()


@pytest.mark.parametrize("dialect", [TORCH, KERAS], ids=str)
def test_removal_within_a_call_leaves_the_rest_to_step(dialect):
    inside, whole = (build(dialect) for _ in range(2))
    handle = inside.enable_backward_step()
    loss_of(inside, 0, without=[1, 2]).backward()
    handle.remove()
    loss_of(inside, 0, without=[0, 3, 4, 5]).backward()
    inside.step()
    train(whole, 1)
    stepping.assert_same_optimizers(inside, whole)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
@EVERY_DIALECT
def test_a_copy_steps_in_step(dialect, duplicate):
    """Even one that was taken after the backward pass counts the call."""
    inside, whole = twins(dialect)
    train(inside, 2)
    train(whole, 2)
    loss_of(inside, 2).backward()
    other = duplicate(inside)
    train(whole, 1, start=2)
    stepping.assert_same_optimizers(other, whole)
    with stepping.assert_untouched(inside):
        loss_of(other, 3).backward()
        assert all(p.grad is not None for p in params_of(other))
        other.step()
    train(whole, 1, start=3)
    stepping.assert_same_optimizers(other, whole)


@EVERY_DIALECT
def test_state_dicts_pass_both_ways(dialect):
    inside, whole = twins(dialect)
    train(whole, 3)
    with torch.no_grad():
        for p, q in zip(params_of(inside), params_of(whole), strict=True):
            p.copy_(q)
    inside.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(inside, 2, start=3)
    train(whole, 2, start=3)
    stepping.assert_same_optimizers(inside, whole)
    whole.load_state_dict(copy.deepcopy(inside.state_dict()))
    train(inside, 1, start=5)
    train(whole, 1, start=5)
    stepping.assert_same_optimizers(inside, whole)


def test_hooks_do_not_keep_the_optimizer_alive():
    optimizer = build(TORCH)
    params = params_of(optimizer)
    optimizer.enable_backward_step()
    train(optimizer, 2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    before = [p.detach().clone() for p in params]
    torch.stack([p.sum() for p in params]).sum().backward()
    assert all(p.grad is not None for p in params)
    assert all(stepping.same_bits(p.detach(), b) for p, b in zip(params, before, strict=True))


# --- errors --------------------------------------------------------------------------------------


def test_a_second_gradient_is_refused_by_name():
    params = stepping.make_params(SHAPES)
    optimizer = TORCH([(f"layer.{number}", p) for number, p in enumerate(params)])
    optimizer.enable_backward_step()
    loss_of(optimizer, 0).backward()
    before = stepping.snapshot(optimizer)["params"]
    with pytest.raises(RuntimeError, match=r"'layer.\d' .*second gradient.*Call step\(\)"):
        loss_of(optimizer, 1).backward()
    stepping.assert_same_values(stepping.snapshot(optimizer)["params"], before)
    optimizer.zero_grad()
    optimizer.step()
    whole = build(TORCH)
    train(whole, 1)
    train(optimizer, 2, start=1)
    train(whole, 2, start=1)
    for p, q in zip(params, params_of(whole), strict=True):
        assert stepping.same_bits(p, q)


def test_what_a_failed_pass_has_left_is_stepped_or_dropped():
    """Gradients that waited when it failed are gradients like others."""

    def fail(grad: Tensor) -> Tensor:
        raise ArithmeticError

    for drops in (False, True):
        optimizer = build(TORCH)
        optimizer.enable_backward_step()
        first, second = params_of(optimizer)[:2]
        loss = (first * (second * 2).sum()).sum()
        second.register_hook(fail)
        before = first.detach().clone()
        with pytest.raises(ArithmeticError):
            loss.backward()
        assert first.grad is not None
        if drops:
            optimizer.zero_grad()
        optimizer.step()
        assert first.grad is None
        assert stepping.same_bits(first.detach(), before) == drops
        first.sum().backward()  # the next pass is as any other
        assert first.grad is None


def test_a_gradient_that_cannot_be_stepped_fails_by_name_and_can_be_dropped():
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = TORCH(model.named_parameters())
    optimizer.enable_backward_step(model)
    for _ in range(2):
        before = model.weight.detach().clone()
        with pytest.raises(RuntimeError, match="sparse gradients: that of parameter 'weight'"):
            model(torch.tensor([1, 2])).sum().backward()
        assert stepping.same_bits(model.weight.detach(), before)
        optimizer.zero_grad()
    model.sparse = False
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert float(optimizer.state[model.weight]["step"]) == 1.0


def assert_refused(optimizer: Any, error: type[Exception], message: str, *args: Any) -> None:
    with stepping.assert_untouched(optimizer), pytest.raises(error, match=message):
        optimizer.enable_backward_step(*args)
    loss_of(optimizer, 0).backward()
    assert all(p.grad is not None for p in params_of(optimizer) if p.requires_grad)


@pytest.mark.parametrize(
    ("dialect", "argument", "value"),
    [
        *((dialect, "max_grad_norm", 1.0) for dialect in DIALECTS),
        *((dialect, "fused", True) for dialect in DIALECTS),
        *((dialect, "global_clipnorm", 1.0) for dialect in DIALECTS),
        (KERAS, "nonfinite", "skip"),
        (OPTAX, "nonfinite", "skip"),
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused(dialect, argument, value):
    assert_refused(build(dialect, **{argument: value}), ValueError, argument)


def test_what_comes_to_need_all_gradients_is_refused():
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    for argument, value in (("max_grad_norm", 1.0), ("fused", True)):
        group = {"params": stepping.make_params(((2, 2),)), argument: value}
        with stepping.assert_untouched(optimizer), pytest.raises(ValueError, match=argument):
            optimizer.add_param_group(group)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = stepping.snapshot(optimizer)["params"]
    with pytest.raises(ValueError, match="max_grad_norm"):
        loss_of(optimizer, 0).backward()
    stepping.assert_same_values(stepping.snapshot(optimizer)["params"], before)


def test_a_second_handle_is_refused():
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    with pytest.raises(RuntimeError, match="already; call remove"):
        optimizer.enable_backward_step()
    assert_trained_alike(optimizer, build(TORCH))


def test_distributed_data_parallel_is_refused_wherever_it_is():
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        """One that needs no process group."""

        def __init__(self, module: torch.nn.Module) -> None:
            torch.nn.Module.__init__(self)
            self.module = module

    model = Wrapped(torch.nn.Linear(2, 2))
    optimizer = TORCH(model.parameters())
    for given, name in ((model, "^the model"), (torch.nn.Sequential(model), "module '0'")):
        with pytest.raises(RuntimeError, match=f"{name}.*DistributedDataParallel"):
            optimizer.enable_backward_step(given)
        assert optimizer._in_backward is None


def test_a_model_of_other_parameters_is_refused():
    assert_refused(build(TORCH), ValueError, "model has none", torch.nn.Linear(2, 2))


def test_flat_parameters_are_refused_by_name():
    optimizer = build(TORCH)
    params_of(optimizer)[1]._is_flat_param = True
    assert_refused(optimizer, ValueError, "#1 in group 0.*fully_shard")


def test_a_grad_scaler_is_refused_when_it_steps():
    optimizer = build(TORCH)
    optimizer.enable_backward_step()
    optimizer.param_groups[0]["fused"] = True
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with stepping.assert_untouched(optimizer), pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_creating_a_distributed_state_dict_changes_nothing():
    """It calls step() with gradients of zero."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: TID251

    model = Tied()
    optimizer = OPTAX(model.parameters())
    optimizer.enable_backward_step(model)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert all(
        stepping.same_bits(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)
    )
    assert float(optimizer.param_groups[0]["step"]) == 0.0


def test_an_optimizer_that_is_gone_steps_nothing() -> None:
    """The handle and the optimizer hold each other; nobody waits for the garbage collector."""
    gc.disable()
    try:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = TORCH([param])
        optimizer.enable_backward_step()
        del optimizer
        param.sum().backward()
        assert torch.equal(param, torch.ones(3))
        assert param.grad is not None
        other = TORCH([param])
        other.enable_backward_step()
        param.grad = None
        param.sum().backward()
        other.step()
        assert param.grad is None
        assert len(other.state) == 1
    finally:
        gc.enable()


def test_a_parameter_is_stepped_by_one_optimizer() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    first, second = TORCH([param]), TORCH([param])
    handle = first.enable_backward_step()
    with pytest.raises(RuntimeError, match="by another optimizer"):
        second.enable_backward_step()
    handle.remove()
    second.enable_backward_step().remove()
