"""``demo``: train a small language model with torch's Adafactor and with ours, and compare.

Both models start from the same weights, see the same batches and advance step by step in turn, so
that noise of the machine hits both alike. The text is the source of Python's standard library:
real, a few megabytes, and there wherever this package runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fused_adafactor import Adafactor, __version__
from fused_adafactor.backends import REQUESTS
from fused_adafactor.cli.progress import ProgressBar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OptimizerFactory = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]

_SCHEMA = 1
_BYTES = 256
_HELDOUT_EVERY = 10  # one file in ten
_END_STEPS = 10  # a train loss "at the end" is the mean over so many steps
_PROMPT = b"def "
_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What is trained, and for how long.

    Attributes:
        steps: Steps of each optimizer.
        seed: Seed of the weights, the batches and the sample.
        device: Where to train.
        lr: lr of the first step, a cap as in torch.optim.Adafactor; it falls linearly to zero.
        d_model: Width of the model.
        layers: Transformer blocks.
        heads: Attention heads of a block.
        context: Bytes that a prediction can see.
        batch: Sequences of a batch.
        corpus_bytes: Most bytes of text to read.
        heldout_batches: Batches of a held-out loss.
        heldout_points: Held-out losses after the first, which is of the untrained model.
        sample_bytes: Bytes to generate at the end.
    """

    steps: int = 400
    seed: int = 0
    device: str = "cpu"
    lr: float = 2e-2
    d_model: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 64
    batch: int = 16
    corpus_bytes: int = 4 << 20
    heldout_batches: int = 8
    heldout_points: int = 10
    sample_bytes: int = 200


FULL_SIZE = DemoConfig()


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


class Block(nn.Module):
    """Causal self-attention and a GELU MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, time, width] to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = self.mlp_in(self.mlp_norm(x))
        out: Tensor = x + self.mlp_out(F.gelu(hidden))
        return out


class ByteTransformer(nn.Module):
    """A decoder-only transformer that predicts the next byte."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_BYTES, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.Sequential(
            *(Block(config.d_model, config.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, _BYTES)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    @override
    def forward(self, text: Tensor) -> Tensor:
        """Map bytes [batch, time] to logits [batch, time, 256]."""
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to train on, and text of other files to judge by."""

    files: int
    train: bytes
    heldout: bytes

    def describe(self) -> dict[str, str | int]:
        """Say which text it is, for the record."""
        return {
            "files": self.files,
            "train_bytes": len(self.train),
            "heldout_bytes": len(self.heldout),
            "sha256": hashlib.sha256(self.train + self.heldout).hexdigest(),
        }


def read_corpus(most_bytes: int) -> Corpus:
    """Read modules of Python's standard library, in the order of their names.

    Raises:
        FileNotFoundError: This Python comes without its sources.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    files = total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.name.startswith(("_sysconfigdata", "sitecustomize")):
            continue  # of the machine, not of Python
        text = path.read_bytes().replace(b"\r\n", b"\n")[: most_bytes - total]
        files += 1
        total += len(text)
        parts[files % _HELDOUT_EVERY == 0].append(text)
        if total == most_bytes:
            break
    if not all(parts):
        raise FileNotFoundError(
            "the demo trains on the source files of Python's standard library, and this Python "
            "comes without them"
        )
    train, heldout = map(b"".join, parts)
    return Corpus(files=files, train=train, heldout=heldout)


class Batches:
    """Random windows of a text, the same ones for the same seed."""

    def __init__(self, text: bytes, config: DemoConfig, seed: int) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._offsets = torch.arange(config.context + 1)
        self._batch = config.batch
        self._device = config.device
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """Draw bytes [batch, context + 1]: what to read, and one to the right, what to predict."""
        starts = torch.randint(
            len(self._text) - len(self._offsets) + 1, (self._batch, 1), generator=self._generator
        )
        return self._text[starts + self._offsets].long().to(self._device)


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
            end_train_loss=statistics.fmean(self.train_loss[-_END_STEPS:]),
            median_optimizer_ms=optimizer_ms,
            optimizer_share=optimizer_ms / statistics.median(self.step_ms),
        )


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
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


@torch.no_grad()
def write_text(model: nn.Module, config: DemoConfig) -> bytes:
    """Let a model go on from a prompt, byte by byte."""
    generator = torch.Generator().manual_seed(config.seed)
    text = list(_PROMPT)
    for _ in range(config.sample_bytes):
        seen = torch.tensor([text[-config.context :]], device=config.device)
        odds = torch.softmax(model(seen)[0, -1].float().cpu() / _TEMPERATURE, dim=0)
        text.append(int(torch.multinomial(odds, 1, generator=generator)))
    return bytes(text)


def printable(text: bytes) -> str:
    """Turn bytes into text that no terminal can take for a command."""
    return "".join(
        chr(byte) if byte == ord("\n") or ord(" ") <= byte <= ord("~") else "?" for byte in text
    )


def summarize(record: DemoRecord) -> str:
    """Say in a few lines what came out."""
    config, runs = record.config, (record.torch, record.ours)
    rows = [
        ("", [run.optimizer for run in runs]),
        (f"train loss, last {_END_STEPS} steps", [f"{run.end_train_loss:.4f}" for run in runs]),
        ("held-out loss, end", [f"{run.heldout_loss[-1]:.4f}" for run in runs]),
        ("optimizer, median", [f"{run.median_optimizer_ms:.2f} ms" for run in runs]),
        ("its share of a step", [f"{run.optimizer_share:.1%}" for run in runs]),
    ]
    return "\n".join(
        [
            f"A byte-level language model of {record.parameters:,} parameters on Python's own "
            f"source, {config.steps} steps on {config.device}. The loss was "
            f"{record.ours.train_loss[0]:.2f} nats per byte at the start.",
            "",
            *(f"{label:<26}{cells[0]:>24}{cells[1]:>20}".rstrip() for label, cells in rows),
            "",
            f"largest difference of the curves   {record.largest_train_difference:.1e} (train), "
            f"{record.largest_heldout_difference:.1e} (held-out)",
            f"optimizer time, torch / ours       {record.time_ratio:.2f}",
            f"ours                               {record.plan}",
            "",
            "What the model has learnt to write:",
            "",
            *(f"    {line}".rstrip() for line in record.sample.splitlines()),
            "",
        ]
    )


def save_plot(record: DemoRecord, path: Path) -> None:
    """Draw the loss curves and the optimizer's step times.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    losses, times = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, record)
    _draw_times(times, record)
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=160)


_TORCH_COLOUR, _OUR_COLOUR = "#f0a35e", "#1f4e79"


def _draw_losses(axes: Axes, record: DemoRecord) -> None:
    steps = range(1, record.config.steps + 1)
    axes.plot(steps, record.torch.train_loss, color=_TORCH_COLOUR, linewidth=4, label="torch")
    axes.plot(steps, record.ours.train_loss, color=_OUR_COLOUR, linewidth=1, label="ours")
    for run, colour, size in ((record.torch, _TORCH_COLOUR, 9), (record.ours, _OUR_COLOUR, 4)):
        axes.plot(
            record.heldout_steps, run.heldout_loss, "o", color=colour, markersize=size, zorder=3
        )
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("Loss: lines on the training text, dots on held-out text", loc="left")
    axes.legend(frameon=False)


def _draw_times(axes: Axes, record: DemoRecord) -> None:
    steps = range(1, record.config.steps + 1)
    for run, colour, name in (
        (record.torch, _TORCH_COLOUR, "torch"),
        (record.ours, _OUR_COLOUR, "ours"),
    ):
        median = run.median_optimizer_ms
        axes.plot(steps, run.optimizer_ms, ".", color=colour, markersize=3, alpha=0.5)
        axes.axhline(median, color=colour, linewidth=2, label=f"{name}: median {median:.2f} ms")
    slowest = max(record.torch.median_optimizer_ms, record.ours.median_optimizer_ms)
    axes.set_ylim(0, 2 * slowest)
    axes.set_ylabel("ms per optimizer step")
    axes.set_title(f"Optimizer time: torch / ours = {record.time_ratio:.2f}", loc="left")
    axes.legend(loc="upper right", edgecolor="none", framealpha=0.9)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the commands."""
    text = "train a small language model with torch's Adafactor and with ours, and compare"
    parser = subparsers.add_parser("demo", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("--steps", type=_positive, default=FULL_SIZE.steps, metavar="N")
    parser.add_argument("--seed", type=int, default=FULL_SIZE.seed, metavar="N")
    parser.add_argument("--device", default=FULL_SIZE.device, help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", choices=REQUESTS, default="auto", help="backend of ours")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="for demo.png and .json",
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    parser.add_argument("--json", action="store_true", help="print the record, not the summary")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        Exit status: 0, or 1 if the training could not be done or has left the numbers.
    """
    config = dataclasses.replace(FULL_SIZE, steps=args.steps, seed=args.seed, device=args.device)

    def make_ours(parameters: Iterator[nn.Parameter]) -> Adafactor:
        return Adafactor(parameters, backend=args.backend)

    try:
        # What can be refused is refused here, in one line; later errors are ours, with a traceback.
        probe = nn.Parameter(torch.zeros(1, device=config.device))
        make_ours(iter([probe])).explain()
        corpus = read_corpus(config.corpus_bytes)
        args.out.mkdir(parents=True, exist_ok=True)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    record = train_both(config, corpus, torch.optim.Adafactor, make_ours)
    as_json = json.dumps(dataclasses.asdict(record), indent=1)
    (args.out / "demo.json").write_text(as_json + "\n", encoding="utf-8")
    print(as_json if args.json else summarize(record))
    print(f"wrote {args.out / 'demo.json'}", file=sys.stderr)
    if not args.no_plot:
        _plot_if_possible(record, args.out / "demo.png")
    return 0 if record.is_finite else 1


def _plot_if_possible(record: DemoRecord, path: Path) -> None:
    try:
        save_plot(record, path)
    except ModuleNotFoundError as error:
        hint = "pip install 'fused-adafactor[plot]'"
        print(f"no picture: {error.name} is not installed; {hint}", file=sys.stderr)
    else:
        print(f"wrote {path}", file=sys.stderr)
