"""``bench``: time a step of ours, its peers and the memory itself, and count what it allocates.

Nothing is timed before it has been compared with float64: where that fails, no time is shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_adafactor import Adafactor, backends
from fused_adafactor.cli.bench.cases import CASES, GPU_CASES, Case, choose, names
from fused_adafactor.cli.bench.device_time import measure_device
from fused_adafactor.cli.bench.features import (
    FEATURES,
    FeatureRecord,
    FeaturesRecord,
    empty_features_record,
    measure_features,
)
from fused_adafactor.cli.bench.measure import time_case
from fused_adafactor.cli.bench.memory import measure_memory
from fused_adafactor.cli.bench.parity import Parity, check_parity
from fused_adafactor.cli.bench.peers import AGAINST, OURS, TORCH_PATHS, Candidate, candidates
from fused_adafactor.cli.bench.plot import save_plots
from fused_adafactor.cli.bench.record import CaseRecord, Record, case_record, empty_record, read
from fused_adafactor.cli.bench.tables import (
    as_text,
    features_as_text,
    markers,
    split_readme,
    write_readme,
)
from fused_adafactor.cli.progress import ProgressBar

_SECONDS = 2.5  # of rounds, per case and dtype
_TICKS = 10  # of the progress bar, per case and dtype


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench`` to the commands."""
    text = "time a step of ours, its peers and the memory itself"
    parser = commands.add_parser("bench", help=text, description=f"{text.capitalize()}.")
    measuring = parser.add_argument_group("what is measured")
    measuring.add_argument(
        "--case",
        action="append",
        choices=names((*CASES, *GPU_CASES)),
        metavar="NAME",
        help=f"only this case or group, repeatable: {', '.join(names((*CASES, *GPU_CASES)))}",
    )
    measuring.add_argument("--full", action="store_true", help="the big cases too: some minutes")
    measuring.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile of torch's too, in cases of few tensors; needs a C++ compiler",
    )
    measuring.add_argument(
        "--detail",
        action="store_true",
        help="host and device time apart and steps in a CUDA graph too, and ours with other "
        "arguments: without the parameter's scale, with clipping by the norm",
    )
    measuring.add_argument(
        "--features",
        action="store_true",
        help="what each feature adds to a bare step, in place of peers: in 4096x4096 unless --case",
    )
    measuring.add_argument(
        "--within",
        type=_positive,
        metavar="S",
        help="start no case after so many seconds, and go on where one fails",
    )
    measuring.add_argument("--backend", choices=backends.REQUESTS, default="auto", help="of ours")
    measuring.add_argument(
        "--against", choices=backends.NAMES, help="ours with this backend too, beside it"
    )
    measuring.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    measuring.add_argument(
        "--seconds",
        type=_positive,
        default=_SECONDS,
        metavar="S",
        help=f"of rounds for each case and dtype, about; {_SECONDS:g} if not given. A peer other "
        "than torch that takes longer for 5 rounds is left out",
    )
    output = parser.add_argument_group("what becomes of it")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    output.add_argument("--plot", type=Path, metavar="DIR", help="draw two pictures there")
    output.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the table between the markers of this file"
    )
    output.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: show this record"
    )
    parser.set_defaults(run=run, refuse=parser.error)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {value:g}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, or read a record, and show it.

    Returns:
        Exit status: 0, or 1 if a parity check failed or what was asked for cannot be done.
    """
    others = (args.source, args.full, args.compile, args.detail, args.plot, args.against)
    if args.features and any(others):
        args.refuse(
            "--features measures ours alone: --case, --seconds, --json and --readme go with it"
        )
    if args.source is not None and (args.case or args.full or args.compile or args.json):
        args.refuse("--from measures nothing: leave out --case, --full, --compile and --json")
    try:
        # What can be refused is refused here, in one line; later errors are ours, with a traceback.
        _check_outputs(args)
        source = None if args.source is None else read(args.source)
        if source is None:
            probe = torch.nn.Parameter(torch.zeros(1, device=args.device))
            Adafactor([probe], backend=args.backend).explain()
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if args.features:
        features = _measure_features(args)
        print(features_as_text(features))
        _put_out(args, features)
        return 0 if all(feature.parity.passed for feature in features.features) else 1
    record = _measure(args) if source is None else source
    print(as_text(record))
    _put_out(args, record)
    return 0 if all(case.parity.passed for case in record.cases) else 1


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise what would only come up when all is measured."""
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.touch()
    if args.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise RuntimeError("matplotlib is not installed; pip install 'fused-adafactor[plot]'")
        args.plot.mkdir(parents=True, exist_ok=True)
    if args.readme is not None:
        split_readme(args.readme, *markers(args.features))


def _put_out(args: argparse.Namespace, record: Record | FeaturesRecord) -> None:
    written = []
    if args.json is not None:
        record.write(args.json)
        written.append(args.json)
    if args.plot is not None and isinstance(record, Record):
        written += save_plots(record, args.plot)
    if args.readme is not None:
        write_readme(args.readme, record)
        written.append(args.readme)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


def _measure_features(args: argparse.Namespace) -> FeaturesRecord:
    device = torch.device(args.device)
    record = empty_features_record(device, args.backend)
    chosen = choose((*GPU_CASES, *CASES), args.case or ["4096x4096"], full=False)
    pairs = [(case, dtype) for case in chosen for dtype in case.dtypes]
    found: list[FeatureRecord] = []
    with ProgressBar(len(pairs) * _TICKS, "measuring") as progress:
        for case, dtype in pairs:
            note = f"{case.name} {str(dtype).removeprefix('torch.')}"
            seconds = args.seconds * len(FEATURES) / 4
            found += measure_features(case, dtype, device, args.backend, seconds)
            for _ in range(_TICKS):
                progress.advance(note)
    return replace(record, features=found)


def _measure(args: argparse.Namespace) -> Record:
    everybody = candidates(args.backend, args.compile, args.detail, args.against)
    absent = {c.name: c.missing for c in everybody if c.missing is not None}
    record = empty_record(torch.device(args.device), args.backend, absent)

    def keep(cases: list[CaseRecord]) -> None:
        """What is measured is measured, whatever ends the run."""
        if args.json is not None:
            replace(record, cases=cases).write(args.json)

    cases = _measure_all(args, [c for c in everybody if c.name not in absent], keep)
    return replace(record, cases=cases)


def _measure_all(
    args: argparse.Namespace,
    contestants: Sequence[Candidate],
    keep: Callable[[list[CaseRecord]], None],
) -> list[CaseRecord]:
    chosen = choose((*GPU_CASES, *CASES) if args.case else CASES, args.case, args.full)
    pairs = [(case, dtype) for case in chosen for dtype in case.dtypes]
    until = math.inf if args.within is None else time.monotonic() + args.within
    records: list[CaseRecord] = []
    with ProgressBar(len(pairs) * _TICKS, "measuring") as progress:
        shown = 0

        def show(ticks: int, note: str) -> None:
            nonlocal shown
            for _ in range(ticks - shown):
                progress.advance(note)
            shown = ticks

        for number, (case, dtype) in enumerate(pairs):
            if time.monotonic() > until:
                break
            note = f"{case.name} {str(dtype).removeprefix('torch.')}"

            def on_progress(share: float, number: int = number, note: str = note) -> None:
                show(number * _TICKS + int(share * _TICKS), note)

            try:
                records.append(_measure_case(case, dtype, args, contestants, on_progress))
            except Exception as error:
                if args.within is None:
                    raise
                traceback.print_exc()
                records.append(_failed(case, dtype, error))
            keep(records)
            on_progress(1.0)  # a failed check has no rounds
    return records


def _measure_case(
    case: Case,
    dtype: torch.dtype,
    args: argparse.Namespace,
    contestants: Sequence[Candidate],
    on_progress: Callable[[float], None],
) -> CaseRecord:
    """Check ours, then time everybody, then count the bytes of ours and torch's."""
    device = torch.device(args.device)
    plan = _plan_in_a_line(case, dtype, args)
    parity = check_parity(case, dtype, device, args.backend)
    if parity.passed and args.detail:
        unscaled = check_parity(case, dtype, device, args.backend, unscaled=True)
        parity = max(parity, unscaled, key=lambda check: check.share)
    if not parity.passed:
        return case_record(case, dtype, plan, parity, times=None, memory=None)
    wrong = None
    if args.against is not None:
        wrong = _wrong(case, dtype, device, args.against)
        if wrong is not None:
            contestants = [c for c in contestants if c.name != AGAINST + args.against]
    times = time_case(case, dtype, device, contestants, args.seconds, on_progress)
    if wrong is not None:
        times.absent[AGAINST + args.against] = wrong
    counted = [c for c in contestants if c.name in (OURS, *TORCH_PATHS)]
    memory = measure_memory(counted, case, dtype, device)
    if not args.detail:
        return case_record(case, dtype, plan, parity, times, memory)
    own = [c for c in contestants if not c.compiled and c.needs is None]
    apart, failed = measure_device(own, case, dtype, device, args.seconds)
    times.absent.update({f"{name}, apart": reason for name, reason in failed.items()})
    return case_record(case, dtype, plan, parity, times, memory, apart)


def _wrong(case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> str | None:
    """Why another backend of ours is not timed, or None."""
    try:
        parity = check_parity(case, dtype, device, backend)
    except Exception as error:
        return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return None if parity.passed else f"parity: error {parity.error}, bound {parity.bound:.1e}"


def _failed(case: Case, dtype: torch.dtype, error: Exception) -> CaseRecord:
    reason = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    parity = Parity(error=None, bound=0.0)
    return case_record(case, dtype, "", parity, times=None, memory=None, failed=reason)


def _plan_in_a_line(case: Case, dtype: torch.dtype, args: argparse.Namespace) -> str:
    params = [
        torch.nn.Parameter(torch.empty(s, dtype=dtype, device=args.device)) for s in case.shapes
    ]
    return Adafactor(params, backend=args.backend).explain().splitlines()[-1]
