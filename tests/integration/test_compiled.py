"""A training step that torch.compile compiles: the step of the optimizer is called as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from tests import stepping
from tests.dialects import DIALECTS, KERAS, TORCH, Dialect
from tests.stepping import params_of

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    # The compiler's own: it looks at the loss as it looks at every tensor.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
# What a compiled call of step() counts as; nothing of ours is looked into.
BREAKS = {
    "Unsupported Tensor.backward() call",
    "Skip inlining `torch.compiler.disable()`d function",
    "Skip calling `torch.compiler.disable()`d function",
}
STEPS = 6


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run:
    """A model, its optimizer, and its training loop, which may be compiled."""

    def __init__(self, dialect: Dialect, dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        ).to(dtype)
        self.optimizer: Any = dialect(self.model.parameters(), **kwargs)

    def loss(self, x: Tensor) -> Tensor:
        return self.model(x.to(next(self.model.parameters()).dtype)).square().mean()

    def train(self, x: Tensor) -> Tensor:
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def inputs(step: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(step))


def assert_trained_alike(
    compiled: Run,
    eager: Run,
    train: Callable[[Tensor], Tensor],
    after: Callable[[Run], None] = lambda _: None,
) -> None:
    """From the third step on nothing is compiled any more; only backward and step break graphs."""
    for step in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            frames = counters["frames"]["total"]
            loss = train(inputs(step))
            assert step < 2 or counters["frames"]["total"] == frames
        assert stepping.same_bits(loss, eager.train(inputs(step)))
        for run in (compiled, eager):
            after(run)
        stepping.assert_same_optimizers(compiled.optimizer, eager.optimizer)
    assert {reason.partition("\n")[0] for reason in counters["graph_break"]} <= BREAKS


@EVERY_DIALECT
def test_a_compiled_training_step_is_compiled_once(dialect):
    compiled, eager = Run(dialect), Run(dialect)
    assert_trained_alike(compiled, eager, torch.compile(compiled.train, backend="eager"))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_every_rounding_is_that_of_an_eager_step(rounding):
    compiled, eager = (Run(TORCH, torch.bfloat16, rounding=rounding) for _ in range(2))
    assert_trained_alike(compiled, eager, torch.compile(compiled.train, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_with_inductor_the_step_is_that_of_the_same_gradients():
    """Its gradients are its own, so what is compared is what the step makes of them."""
    compiled, eager = Run(TORCH), Run(TORCH)
    grads: list[Tensor | None] = []

    def note(optimizer: Any, *_: Any) -> None:
        grads.extend(None if p.grad is None else p.grad.clone() for p in params_of(optimizer))

    compiled.optimizer.register_step_pre_hook(note)
    train = torch.compile(compiled.train)
    for step in range(3):
        loss = train(inputs(step))
        stepping.assert_close(loss, eager.loss(inputs(step)).detach(), 1e-5, "loss")
        for p, grad in zip(params_of(eager.optimizer), grads, strict=True):
            p.grad = grad
        grads.clear()
        eager.optimizer.step()
        stepping.assert_same_optimizers(compiled.optimizer, eager.optimizer)


@pytest.mark.parametrize("dialect", [TORCH, KERAS], ids=str)
@pytest.mark.parametrize("compiles", ["train", "step"])
def test_a_scheduler_that_changes_the_lr_in_every_step_compiles_nothing_anew(dialect, compiles):
    runs = [Run(dialect, lr=0.5) for _ in range(2)]
    schedulers = {run: torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in runs}
    compiled, eager = runs
    if compiles == "train":
        train = torch.compile(compiled.train, backend="eager")
    else:
        step = torch.compile(compiled.optimizer.step, backend="eager")
        train = with_step(compiled, step)
    assert_trained_alike(compiled, eager, train, after=lambda run: schedulers[run].step())


def with_step(run: Run, step: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    def train(x: Tensor) -> Tensor:
        loss = run.loss(x)
        loss.backward()
        step()
        run.optimizer.zero_grad()
        return loss

    return train


@EVERY_DIALECT
def test_a_compiled_step_is_called_as_it_is(dialect):
    compiled, eager = Run(dialect), Run(dialect)
    step = torch.compile(compiled.optimizer.step, backend="eager")
    assert_trained_alike(compiled, eager, with_step(compiled, step))
    assert counters["stats"]["unique_graphs"] == 0


def test_a_closure_with_a_compiled_model_is_run():
    compiled, eager = Run(TORCH), Run(TORCH)
    loss = torch.compile(compiled.loss, backend="eager")

    def train(x: Tensor) -> Tensor:
        def closure() -> Tensor:
            compiled.optimizer.zero_grad()
            found = loss(x)
            found.backward()
            return found

        return compiled.optimizer.step(closure)

    assert_trained_alike(compiled, eager, train)
    assert counters["stats"]["unique_graphs"] == 1


@EVERY_DIALECT
@pytest.mark.parametrize("compiles", ["train", "model"])
def test_steps_in_the_backward_pass_are_not_looked_into(dialect, compiles):
    compiled, eager = Run(dialect), Run(dialect)
    if compiles == "model":
        compiled.model = torch.compile(compiled.model, backend="aot_eager")
    compiled.optimizer.enable_backward_step(compiled.model)
    train = compiled.train
    if compiles == "train":
        train = torch.compile(train, backend="aot_eager")
    assert_trained_alike(compiled, eager, train)
    loss = compiled.loss(inputs(0))
    loss.backward()
    assert all(p.grad is None for p in params_of(compiled.optimizer))


def test_one_parameter_is_stepped_as_it_is():
    compiled, eager = Run(TORCH), Run(TORCH)

    def train(x: Tensor) -> Tensor:
        loss = compiled.loss(x)
        loss.backward()
        for p in compiled.model.parameters():
            compiled.optimizer.step_param(p)
        compiled.optimizer.step()
        compiled.optimizer.zero_grad()
        return loss

    assert_trained_alike(compiled, eager, torch.compile(train, backend="eager"))


def test_one_graph_of_all_is_refused_by_torch_and_changes_nothing():
    run = Run(TORCH)
    run.loss(inputs(0)).backward()
    step = torch.compile(run.optimizer.step, backend="eager", fullgraph=True)
    with (
        stepping.assert_untouched(run.optimizer),
        pytest.raises(torch._dynamo.exc.Unsupported, match="native code already"),
    ):
        step()
