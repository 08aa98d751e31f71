"""``codegen``: compile kernels for GPUs that are not here, and tell what the compiler made of them.

A kernel that spills registers to memory, reads or writes too narrowly, or wants more shared memory
than there is, is found on any machine, before it is slow on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fused_adafactor.cli.progress import ProgressBar

if TYPE_CHECKING:
    from fused_adafactor.backends.triton.offline import Source
    from fused_adafactor.cli.kernel_cases import Case


# By target, the largest shared memory of a program: CUDA's programming guide, CDNA 3's ISA.
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = {
    "triton": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "cuda": ("sm_80", "sm_90", "sm_100", "sm_120"),
}
WIDE = 16  # bytes: the widest access that all of them have


@dataclass(frozen=True)
class Kernel:
    """A kernel of Triton's for a target, or a function of the CUDA library's kernels.

    Attributes:
        kernel: Its name; of the first case that it was found in.
        target: ``sm_90``, say.
        registers: Of a thread.
        shared_bytes: Of a program.
        spill_bytes: Of a thread.
        widest_access_bytes: Of a thread.
        streaming: Whether it sweeps over arrays that begin at multiples of 16 bytes.
        seconds: That the compiler took.
    """

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    widest_access_bytes: int
    streaming: bool
    seconds: float

    def faults(self) -> Iterator[str]:
        """What is wrong with it."""
        if self.spill_bytes:
            yield f"spills {self.spill_bytes} bytes"
        if self.streaming and self.widest_access_bytes < WIDE and self.target.startswith("sm_"):
            yield f"accesses {self.widest_access_bytes} bytes at a time"
        if self.shared_bytes > SHARED_BYTES[self.target]:
            yield f"wants {self.shared_bytes} bytes of shared memory"


@dataclass(frozen=True)
class Work:
    """What is to be compiled."""

    name: str
    source: Source
    target: str


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    text = "compile kernels for GPUs that are not here, and check what comes out"
    parser = commands.add_parser("codegen", help=text, description=f"{text.capitalize()}.")
    parser.add_argument("--backend", choices=tuple(TARGETS), default="triton")
    parser.add_argument(
        "--target",
        nargs="+",
        metavar="GPU",
        help="sm_80, sm_90, sm_100, gfx942 (Triton), sm_120 (CUDA); default: all",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every combination of Triton's; takes hours, and not minutes",
    )
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="only those with this text in their names"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilers at a time"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile the kernels.

    Returns:
        0, or 1 if a kernel is not as it should be, or none can be compiled.
    """
    known = TARGETS[args.backend]
    targets = args.target or list(known)
    unknown = [target for target in targets if target not in known]
    if unknown:
        accepted = ", ".join(known)
        print(f"codegen: --target must be of {accepted}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    if args.backend == "cuda":
        from fused_adafactor.cli.cuda_library import obstacle, report

        reason, make = obstacle(targets), report
    else:
        reason, make = _obstacle(), _report_of_triton
    if reason is not None:
        print(f"codegen: {reason}", file=sys.stderr)
        return 1
    kernels, failures = make(targets, args)
    failures += [f"{k.kernel} for {k.target} {fault}" for k in kernels for fault in k.faults()]
    record = {"kernels": [asdict(kernel) for kernel in kernels]}
    print(json.dumps(record, indent=1) if args.json else as_text(kernels))
    for failure in failures:
        print(f"codegen: {failure}", file=sys.stderr)
    return 1 if failures or not kernels else 0


def _report_of_triton(
    targets: Sequence[str], args: argparse.Namespace
) -> tuple[list[Kernel], list[str]]:
    """Kernels that were compiled, and why others were not."""
    from fused_adafactor.cli.kernel_cases import all_cases, default_cases

    cases = all_cases() if args.all else default_cases()
    chosen = {case: its for case, its in cases.items() if args.match in str(case)}
    work = work_of(chosen, targets)
    kernels, failures = [], []
    with ProgressBar(max(1, len(work)), "compiling") as bar:
        for what, made in zip(work, compiled(work, args.jobs), strict=True):
            if isinstance(made, Kernel):
                kernels.append(made)
            else:
                failures.append(f"{what.name} for {what.target}: {made}")
            bar.advance(what.target)
    return kernels, failures


def _obstacle() -> str | None:
    """Why nothing of Triton's can be compiled, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    from fused_adafactor.backends.triton import INTERPRETER_ENVIRONMENT, interprets

    if interprets():
        return f"{INTERPRETER_ENVIRONMENT}=1 has kernels interpreted; unset it to compile them"
    return None


def work_of(cases: Mapping[Case, Sequence[str]], targets: Sequence[str]) -> list[Work]:
    """The kernels of cases, each once, for those of their targets that are wanted.

    Cases of one target are for the first one where that is not wanted, in the form that kernels are
    launched in there.
    """
    from fused_adafactor.cli.kernel_cases import AMD, ONE, sources_of_case

    work: dict[tuple[Source, str], Work] = {}
    for case, its_targets in cases.items():
        chosen = [target for target in targets if target in its_targets]
        if not chosen and its_targets == ONE:
            chosen = [targets[0]]
            if targets[0] in AMD:
                case = replace(case, launch_form="phases")
        for name, source in sources_of_case(case) if chosen else ():
            for target in chosen:
                work.setdefault((source, target), Work(name, source, target))
    return list(work.values())


def compiled(work: Sequence[Work], jobs: int) -> Iterator[Kernel | str]:
    """Compile, in order: kernels, or why there is none."""
    if jobs <= 1 or len(work) <= 1:
        yield from map(compile_one, work)
        return
    # New processes: a fork would inherit torch's threads, and Triton's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=context) as pool:
        yield from pool.map(compile_one, work)


def compile_one(work: Work) -> Kernel | str:
    """Compile a kernel; what the compiler prints about an error goes where errors go."""
    from fused_adafactor.backends.triton.offline import compile_for

    try:
        with contextlib.redirect_stdout(sys.stderr):
            report = compile_for(work.source, work.target)
    except Exception as error:
        return f"cannot be compiled: {_cause(error)}"
    return Kernel(
        kernel=work.name,
        target=work.target,
        streaming=work.source.streaming,
        **asdict(report),
    )


def _cause(error: BaseException) -> str:
    """The last line of what went wrong innermost; Triton wraps it for every function around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def as_text(kernels: Iterable[Kernel]) -> str:
    """A table."""
    columns = ("target", "registers", "shared", "spilled", "widest", "seconds", "kernel")
    rows = [columns] + [
        (
            k.target,
            str(k.registers),
            str(k.shared_bytes),
            str(k.spill_bytes),
            str(k.widest_access_bytes) + ("" if k.streaming else " -"),
            f"{k.seconds:.1f}",
            k.kernel,
        )
        for k in kernels
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) - 1)]
    lines = (
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )
    return "\n".join(lines)
