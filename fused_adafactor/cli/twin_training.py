"""Two optimizers train the same model in turn: what the demo measures, without what it prints."""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_adafactor import Adafactor, __version__
from fused_adafactor.cli.language_model import (
    Batches,
    ByteTransformer,
    Corpus,
    DemoConfig,
    printable,
    write_text,
)
from fused_adafactor.cli.progress import ProgressBar

OptimizerFactory = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]

_SCHEMA = 1
_BYTES = 256
END_STEPS = 10  # a train loss "at the end" is the mean over so many steps


@dataclass(frozen=True, kw_only=True)
class Run:
    """One optimizer's training.

    Attributes:
        optimizer: Its name.
        train_loss: Nats per byte, one a step.
        heldout_loss: Nats per byte, at ``DemoRecord.heldout_steps``.
        optimizer_ms: Time of ``optimizer.step()``, one a step.
        step_ms: Time of the whole step: forward, backward and optimizer.
        end_train_loss: Mean over the last steps.
        median_optimizer_ms: Median of ``optimizer_ms``.
        optimizer_share: The same as a share of the median of ``step_ms``.
    """

    optimizer: str
    train_loss: list[float]
    heldout_loss: list[float]
    optimizer_ms: list[float]
    step_ms: list[float]
    end_train_loss: float
    median_optimizer_ms: float
    optimizer_share: float


@dataclass(frozen=True, kw_only=True)
class DemoRecord:
    """Everything that the demo found out.

    Attributes:
        schema: Version of this record.
        environment: Versions, processor and threads.
        config: What was trained.
        corpus: Number of files, bytes and digest of the text.
        parameters: Size of the model.
        heldout_steps: Steps done before each held-out loss.
        torch: The training with torch.optim.Adafactor.
        ours: The training with ours.
        largest_train_difference: Largest distance of the two curves of train losses.
        largest_heldout_difference: The same of held-out losses.
        time_ratio: torch's median optimizer time over ours; over 1 where ours is faster.
        plan: Backend and sweeps of ours, in a sentence.
        sample: Text that the model trained with ours has written.
        seconds: Time of all of it.
    """

    schema: int
    environment: dict[str, str | int]
    config: DemoConfig
    corpus: dict[str, str | int]
    parameters: int
    heldout_steps: list[int]
    torch: Run
    ours: Run
    largest_train_difference: float
    largest_heldout_difference: float
    time_ratio: float
    plan: str
    sample: str
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether no loss has left the numbers."""
        return all(
            math.isfinite(loss)
            for run in (self.torch, self.ours)
            for loss in run.train_loss + run.heldout_loss
        )


@dataclass(kw_only=True)
class Trainee:
    """A model on its way, with its optimizer and what has been measured of them."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_loss: list[float] = field(default_factory=list)
    heldout_loss: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def learn(self, batch: Tensor, lr: float) -> None:
        """Do one step, and keep its loss and its times."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        started = _now(batch.device)
        loss = _loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        before = _now(batch.device)
        self.optimizer.step()
        done = _now(batch.device)
        self.train_loss.append(loss.item())
        self.optimizer_ms.append(1e3 * (done - before))
        self.step_ms.append(1e3 * (done - started))

    @torch.no_grad()
    def judge(self, batches: list[Tensor]) -> None:
        """Keep the mean loss of some batches, learning nothing from them."""
        losses = [_loss(self.model, batch).item() for batch in batches]
        self.heldout_loss.append(statistics.fmean(losses))

    def result(self) -> Run:
        """Sum up."""
        optimizer_ms = statistics.median(self.optimizer_ms)
        return Run(
            optimizer=self.name,
            train_loss=self.train_loss,
            heldout_loss=self.heldout_loss,
            optimizer_ms=self.optimizer_ms,
            step_ms=self.step_ms,
            end_train_loss=statistics.fmean(self.train_loss[-END_STEPS:]),
            median_optimizer_ms=optimizer_ms,
            optimizer_share=optimizer_ms / statistics.median(self.step_ms),
        )


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train_both(
    config: DemoConfig,
    corpus: Corpus,
    make_torch: OptimizerFactory,
    make_ours: OptimizerFactory,
) -> DemoRecord:
    """Train the same model with two optimizers, step by step in turn.

    Args:
        config: What to train.
        corpus: The text.
        make_torch: Makes torch's optimizer from the parameters; lr is set at every step.
        make_ours: Makes ours.

    Returns:
        Losses, times and a sample.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ByteTransformer(config).to(config.device)
    twin = copy.deepcopy(model)
    theirs = Trainee(
        name="torch.optim.Adafactor", model=model, optimizer=make_torch(model.parameters())
    )
    ours = Trainee(name="fused_adafactor", model=twin, optimizer=make_ours(twin.parameters()))
    heldout_steps = _take_turns(config, corpus, theirs, ours)
    torch_run, our_run = theirs.result(), ours.result()
    return DemoRecord(
        schema=_SCHEMA,
        environment=_environment(torch.device(config.device)),
        config=config,
        corpus=corpus.describe(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        heldout_steps=heldout_steps,
        torch=torch_run,
        ours=our_run,
        largest_train_difference=_distance(torch_run.train_loss, our_run.train_loss),
        largest_heldout_difference=_distance(torch_run.heldout_loss, our_run.heldout_loss),
        time_ratio=torch_run.median_optimizer_ms / our_run.median_optimizer_ms,
        plan=_plan_in_a_line(ours.optimizer),
        sample=printable(write_text(ours.model, config)),
        seconds=time.perf_counter() - started,
    )


def _take_turns(config: DemoConfig, corpus: Corpus, theirs: Trainee, ours: Trainee) -> list[int]:
    """Train both; return after how many steps they were judged."""
    batches = Batches(corpus.train, config, config.seed)
    heldout = Batches(corpus.heldout, config, config.seed + 1)
    exam = [heldout.draw() for _ in range(config.heldout_batches)]
    points = range(config.heldout_points + 1)
    judged = sorted({config.steps * point // config.heldout_points for point in points})
    pair = [theirs, ours]
    with ProgressBar(config.steps, "training") as progress:
        for step in range(config.steps):
            if step in judged:
                for trainee in pair:
                    trainee.judge(exam)
            batch = batches.draw()
            for trainee in pair:
                trainee.learn(batch, config.lr * (1 - step / config.steps))
            pair.reverse()  # so that neither always finds the cache as the other left it
            progress.advance(f"loss {theirs.train_loss[-1]:.3f} / {ours.train_loss[-1]:.3f}")
    for trainee in pair:
        trainee.judge(exam)
    return judged


def _distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def _plan_in_a_line(optimizer: torch.optim.Optimizer) -> str:
    """The last line of ``explain()``, which sums the plan up."""
    if not isinstance(optimizer, Adafactor):
        return type(optimizer).__name__
    return optimizer.explain().splitlines()[-1]


def _environment(device: torch.device) -> dict[str, str | int]:
    on_cuda = device.type == "cuda"
    return {
        "fused_adafactor": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "threads": torch.get_num_threads(),
    }
