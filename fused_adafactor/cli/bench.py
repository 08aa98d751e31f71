"""``bench``: time a step of ours, torch's Adafactor, its fused AdamW, and the memory itself.

Nothing is timed before it has been compared with float64: where that fails, no time is shown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_adafactor import Adafactor, __version__, backends
from fused_adafactor.cli.measure import (
    CASES,
    OURS,
    ROOF,
    TORCH_PATHS,
    TRANSFORMERS,
    YARDSTICK,
    Candidate,
    Case,
    Parity,
    StepTime,
    candidates,
    check_parity,
    time_case,
)
from fused_adafactor.cli.progress import ProgressBar

_SCHEMA = 1
_SECONDS = 2.5  # of rounds, per case and dtype
_TICKS = 10  # of the progress bar, per case and dtype


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """What was found out about a case in a dtype.

    Attributes:
        case: Its name.
        dtype: Of parameters and gradients.
        tensors: How many.
        elements: Of all of them.
        parameter_bytes: Of all of them.
        roof_bytes: What the roof moves: read g, read p, write p.
        plan: Backend and sweeps of ours, in a sentence.
        parity: Ours against float64.
        times: By candidate; None behind a failed parity check.
        ratios: From the medians, None behind a failed check: "torch / ours" with the faster of
            torch's two paths, "transformers / ours" if that is there, "ours / AdamW",
            "ours / roof".
    """

    case: str
    dtype: str
    tensors: int
    elements: int
    parameter_bytes: int
    roof_bytes: int
    plan: str
    parity: Parity
    times: dict[str, StepTime] | None
    ratios: dict[str, float] | None


def measure(
    case: Case,
    dtype: torch.dtype,
    args: argparse.Namespace,
    contestants: Sequence[Candidate],
    on_progress: Callable[[float], None],
) -> CaseRecord:
    """Check ours, then time everybody."""
    device = torch.device(args.device)
    parity = check_parity(case, dtype, device, args.backend)
    times = None
    if parity.passed:
        times = time_case(case, dtype, device, contestants, args.seconds, on_progress)
    parameter_bytes = case.elements * dtype.itemsize
    return CaseRecord(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(case.shapes),
        elements=case.elements,
        parameter_bytes=parameter_bytes,
        roof_bytes=3 * parameter_bytes,
        plan=_plan_in_a_line(case, dtype, args),
        parity=parity,
        times=times,
        ratios=None if times is None else _ratios(times),
    )


def _ratios(times: dict[str, StepTime]) -> dict[str, float]:
    median = {name: step_time.median_ms for name, step_time in times.items()}
    ours = median[OURS]
    ratios = {"torch / ours": min(median[path] for path in TORCH_PATHS) / ours}
    if TRANSFORMERS in median:
        ratios["transformers / ours"] = median[TRANSFORMERS] / ours
    return ratios | {"ours / AdamW": ours / median[YARDSTICK], "ours / roof": ours / median[ROOF]}


def _plan_in_a_line(case: Case, dtype: torch.dtype, args: argparse.Namespace) -> str:
    params = [
        torch.nn.Parameter(torch.empty(s, dtype=dtype, device=args.device)) for s in case.shapes
    ]
    return Adafactor(params, backend=args.backend).explain().splitlines()[-1]


_RATIOS = ("torch / ours", "transformers / ours", "ours / AdamW", "ours / roof")


def as_text(record: dict[str, Any], cases: Sequence[CaseRecord]) -> str:
    """The record for a person."""
    heads = ("case", "dtype", "ms ours", "p20 - p80", *_RATIOS)
    widths = (18, 10, 9, 21, *(len(head) + 2 for head in _RATIOS))
    lines = [_row(heads, widths)]
    for case in cases:
        if case.times is None or case.ratios is None:
            error = "none" if case.parity.error is None else f"{case.parity.error:.1e}"
            lines.append(
                f"{_row((case.case, case.dtype), widths)}  parity FAILED: error {error}, "
                f"bound {case.parity.bound:.1e}; not timed"
            )
            continue
        ours, ratios = case.times[OURS], case.ratios
        cells = (
            f"{ours.median_ms:.3f}",
            f"{ours.p20_ms:.3f} - {ours.p80_ms:.3f}",
            *(f"{ratios[head]:.2f}" if head in ratios else "-" for head in _RATIOS),
        )
        lines.append(_row((case.case, case.dtype, *cells), widths))
    where = record["platform"]
    lines += [
        "",
        f"On {where['device']} with {where['threads']} threads, ours with backend "
        f"{record['backend']}; medians of interleaved rounds.",
        "torch: the faster of its for-loop and foreach. AdamW: torch's, fused.",
        "roof: read g, read p, write p, measured in the same rounds.",
    ]
    lines += [f"not measured: {name}, {reason}" for name, reason in record["absent"].items()]
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = zip(cells, widths, strict=False)
    aligned = [f"{cell:<{w}}" if n < 2 else f"{cell:>{w}}" for n, (cell, w) in enumerate(pairs)]
    return "".join(aligned).rstrip()


def header(args: argparse.Namespace, absent: dict[str, str]) -> dict[str, Any]:
    """Of the record: what ran where. ``cases`` comes behind it."""
    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    request = backends.parse_request(args.backend)
    commit = _git("rev-parse", "HEAD")
    return {
        "schema": _SCHEMA,
        "versions": {
            "fused_adafactor": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": None
            if TRANSFORMERS in absent
            else importlib.metadata.version("transformers"),
        },
        "platform": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
            "threads": torch.get_num_threads(),
        },
        "commit": commit,
        "dirty": None
        if commit is None
        else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "backend_request": request,
        "backend": backends.choose(request, device).backend,
        "absent": absent,
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this file is part of; None if it is in none."""
    here = Path(__file__).resolve()

    def ask(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package can lie in somebody else's checkout, which does not track it.
        ask("ls-files", "--error-unmatch", here.name)
        return ask(*arguments)
    except (OSError, subprocess.CalledProcessError):
        return None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to the commands."""
    text = "time a step of ours, torch's Adafactor, its fused AdamW, and the memory itself"
    parser = commands.add_parser("bench", help=text, description=f"{text.capitalize()}.")
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.name for case in CASES],
        metavar="NAME",
        help=f"only this one, repeatable: {', '.join(case.name for case in CASES)}",
    )
    parser.add_argument("--full", action="store_true", help="the big cases too")
    parser.add_argument("--backend", choices=backends.REQUESTS, default="auto", help="of ours")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=_SECONDS,
        metavar="S",
        help=f"of measuring for each case and dtype, about; {_SECONDS:g} if not given",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table.

    Returns:
        Exit status: 0, or 1 if a parity check failed or nothing could be measured.
    """
    try:
        # What can be refused is refused here, in one line; later errors are ours, with a traceback.
        probe = torch.nn.Parameter(torch.zeros(1, device=args.device))
        Adafactor([probe], backend=args.backend).explain()
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.touch()
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    everybody = candidates(args.backend)
    absent = {c.name: c.missing for c in everybody if c.missing is not None}
    record = header(args, absent)
    cases = _measure_all(args, [c for c in everybody if c.name not in absent])
    print(as_text(record, cases))
    if args.json is not None:
        whole = record | {"cases": [asdict(case) for case in cases]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}", file=sys.stderr)
    return 0 if all(case.parity.passed for case in cases) else 1


def _measure_all(args: argparse.Namespace, contestants: Sequence[Candidate]) -> list[CaseRecord]:
    chosen = [c for c in CASES if (c.name in args.case if args.case else args.full or not c.full)]
    pairs = [(case, dtype) for case in chosen for dtype in case.dtypes]
    records = []
    with ProgressBar(len(pairs) * _TICKS, "measuring") as progress:
        shown = 0

        def show(ticks: int, note: str) -> None:
            nonlocal shown
            for _ in range(ticks - shown):
                progress.advance(note)
            shown = ticks

        for number, (case, dtype) in enumerate(pairs):
            note = f"{case.name} {str(dtype).removeprefix('torch.')}"

            def on_progress(share: float, number: int = number, note: str = note) -> None:
                show(number * _TICKS + int(share * _TICKS), note)

            records.append(measure(case, dtype, args, contestants, on_progress))
            on_progress(1.0)  # a failed check has no rounds
    return records
