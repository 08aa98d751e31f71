"""``demo``: train a small language model with torch's Adafactor and with ours, and compare.

Both models start from the same weights, see the same batches and advance step by step in turn, so
that noise of the machine hits both alike. The text is the source of Python's standard library:
real, a few megabytes, and there wherever this package runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fused_adafactor import Adafactor
from fused_adafactor.backends import REQUESTS
from fused_adafactor.cli.language_model import FULL_SIZE, read_corpus
from fused_adafactor.cli.twin_training import END_STEPS, DemoRecord, train_both

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def summarize(record: DemoRecord) -> str:
    """Say in a few lines what came out."""
    config, runs = record.config, (record.torch, record.ours)
    rows = [
        ("", [run.optimizer for run in runs]),
        (f"train loss, last {END_STEPS} steps", [f"{run.end_train_loss:.4f}" for run in runs]),
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
