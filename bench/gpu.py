"""``make gpu``: everything that only a machine with a GPU can show, in ten minutes of it.

Runs from the tree with the machine's own Python, torch, Triton and pytest; installs nothing and
asks no network. Every part is a process of its own with a time limit, since a kernel that hangs
takes its process with it, and the parts behind it go on. Records, logs and a summary are written to
a folder, named after the device. The exit status is 1 if a part failed; a missed target is none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.targets import Row, as_table, row_of
from fused_adafactor import building, native
from fused_adafactor.backends import cpp, cuda
from fused_adafactor.cli.bench.cases import CASES, GPU_CASES, choose
from fused_adafactor.cli.bench.record import read

ROOT = Path(__file__).resolve().parents[1]
_TAIL = 25  # lines of a log that are shown where a part failed
_RESTARTS = 5  # of the tests, behind one that took its process with it
_TESTS_ENDED = (0, 1, 5)  # exit status of the tests: all passed, some failed, there are none
_DEVICE_LOST = 3  # exit status of the tests, when nothing works on the device any more
_LONGEST_TEST = 150.0  # seconds, compiling included
_PYTEST = (
    *("pytest", "-q", "--confcutdir=tests/gpu", "-p", "no:cacheprovider"),
    *("-o", "addopts=", "-o", "filterwarnings=", "tests/gpu"),
)
# For the first: the targets. For the second: what else is measured, if there is time.
_TARGETS, _EVERYDAY = ("gpu",), ("model", "matrix", "conv", "stack", "vector", "lora")


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: Its name.
        status: passed, failed or skipped.
        seconds: That it took.
        note: In a line.
    """

    part: str
    status: str
    seconds: float = 0.0
    note: str = ""


@dataclass
class Run:
    """One run: what it is about, and what has come of it.

    Attributes:
        device: As torch names it.
        backend: Of ours.
        against: Another one that is tested, and timed beside it, if any.
        out: The folder.
        seconds: For everything.
        shards: Processes that the tests are shared by.
        dry: A little of each part, to see that the command works.
        whole: All parts, so that each keeps to its share of the time.
        started: By the monotonic clock.
        outcomes: In order.
        env: Variables of every process.
    """

    device: str
    backend: str
    against: str | None
    out: Path
    seconds: float
    shards: int
    dry: bool
    whole: bool = True
    started: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        """Those that are tested."""
        return [backend for backend in (self.backend, self.against) if backend is not None]

    @functools.cached_property
    def slug(self) -> str:
        """The device's name, for files."""
        on_cuda = torch.device(self.device).type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_cuda else self.device
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def file(self, part: str, ending: str = "json") -> Path:
        """Where a part writes."""
        return self.out / f"{part}-{self.slug}.{ending}"

    def limit(self, share: float) -> float:
        """Seconds for a part: its share, or what is left; all of that for who is asked for."""
        left = self.started + self.seconds - time.monotonic()
        return min(share * self.seconds, left) if self.whole else left

    def process(
        self, part: str, module: Sequence[str], limit: float, env: Mapping[str, str] | None = None
    ) -> int | None:
        """Run a module of Python, its output in a log; None if it had to be ended."""
        return self.command(part, [sys.executable, "-m", *module], limit, env)

    def command(
        self, part: str, command: Sequence[str], limit: float, env: Mapping[str, str] | None = None
    ) -> int | None:
        """Run a command likewise."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(self.file(part, "log"), "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **self.env, **(env or {})},
                start_new_session=True,
            )
            try:
                return process.wait(max(1.0, limit))
            except BaseException as error:
                # What it has started itself, a compiler say, ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                if isinstance(error, subprocess.TimeoutExpired):
                    return None
                raise

    def tail(self, part: str) -> str:
        """The end of a log."""
        log = self.file(part, "log")
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-_TAIL:])


def status_of(returncode: int | None) -> tuple[str, str]:
    """Of a process that ended with this, and what to say of it."""
    if returncode is None:
        return "failed", "out of time"
    return ("passed", "") if returncode == 0 else ("failed", f"exit status {returncode}")


# --- the parts -----------------------------------------------------------------------------------


def info(run: Run) -> tuple[str, str]:
    """Versions, backends and a first step."""
    status, note = status_of(run.process("info", ["fused_adafactor", "info"], run.limit(0.1)))
    return status, note or f"{run.slug}, torch {torch.__version__}"


def build(run: Run) -> tuple[str, str]:
    """Both libraries, side by side: CUDA's for this device, and C++'s for what it offloads."""
    with ThreadPoolExecutor(1) as threads:
        of_cpp = threads.submit(_build_cpp, run)
        status, note = _build_cuda(run)
    return status, note + of_cpp.result()


def _build_cpp(run: Run) -> str:
    """Into the folder, if there is none; what to say where there is none then."""
    if cpp.missing() is None:
        return ""
    cache = run.out / "library-cpp"
    env = {building.CACHE_ENVIRONMENT: str(cache)}
    command = ["fused_adafactor", "build", "--backend", "cpp"]
    status, note = status_of(run.process("build-cpp", command, run.limit(0.3), env))
    if status != "passed":
        return f"; not for C++ ({note}), so CPUOffload is not tested"
    run.env[native.LIBRARY_ENVIRONMENT] = str(_built(cache, "cpp"))
    return "; for C++"


def _built(cache: Path, backend: str) -> Path:
    """The library of the sources of now, beside those that earlier runs have left there."""
    of_now = building.source_hash(backend, building.sources())[:16]
    (library,) = cache.rglob(f"*{of_now}*/{building.LIBRARIES[backend]}")
    return library


def _build_cuda(run: Run) -> tuple[str, str]:
    """Into the folder; where there is no nvcc, what there is."""
    if "cuda" not in run.backends:
        return "skipped", "nothing here needs the CUDA library"
    if os.environ.get(cuda.LIBRARY_ENVIRONMENT):
        return "passed", f"{cuda.LIBRARY_ENVIRONMENT} names one"
    status, note = "passed", "installed"
    if building.nvcc_path() is not None:
        major, minor = torch.cuda.get_device_capability(run.device)
        cache = run.out / f"library-sm_{major}{minor}"
        env = {
            building.CACHE_ENVIRONMENT: str(cache),
            building.ARCHS_ENVIRONMENT: f"{major}{minor}",
        }
        returncode = run.process("build", ["fused_adafactor", "build"], run.limit(0.3), env)
        status, note = status_of(returncode)
        if status == "passed":
            run.env[cuda.LIBRARY_ENVIRONMENT] = str(_built(cache, "cuda"))
            return status, f"for sm_{major}{minor}"
    elif cuda.missing() is not None:
        status, note = "skipped", f"there is no nvcc, and {cuda.missing()}"
    if status != "passed" and run.against == "cuda":
        run.against = None
    return status, note


def correctness(run: Run) -> tuple[str, str]:
    """``tests/gpu`` in several processes, since compiling keeps a core busy and the GPU idle."""
    limit = run.limit(0.4)
    seed = os.environ.get("FUSED_ADAFACTOR_TEST_SEED") or int.from_bytes(os.urandom(3), "big")
    env = {
        "FUSED_ADAFACTOR_TEST_DEVICE": run.device,
        "FUSED_ADAFACTOR_TEST_SEED": str(seed),
        "FUSED_ADAFACTOR_TEST_UNTIL": str(time.time() + limit),
        "FUSED_ADAFACTOR_TEST_LONGEST": str(min(_LONGEST_TEST, limit)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    shares = [(backend, number) for backend in run.backends for number in range(run.shards)]
    with ThreadPoolExecutor(len(shares)) as threads:
        parts = threads.map(lambda share: _shard(run, *share, env), shares)
        tests = {
            f"{backend}: {test}": entry
            for (backend, _), part in zip(shares, parts, strict=True)
            for test, entry in part.items()
        }
    if not tests:
        print(run.tail(f"correctness-{run.backend}-0"))
    status, note = _verdict(tests)
    return status, f"seed {seed}: {note}"


def _shard(
    run: Run, backend: str, number: int, env: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """A share of the tests, taken up again behind one that took its process with it."""
    part, until = f"correctness-{backend}-{number}", float(env["FUSED_ADAFACTOR_TEST_UNTIL"])
    log = run.file(part, "jsonl")
    mine = {
        **env,
        "FUSED_ADAFACTOR_TEST_BACKEND": backend,
        "FUSED_ADAFACTOR_TEST_LOG": str(log),
        "FUSED_ADAFACTOR_TEST_SHARD": f"{number}/{run.shards}",
    }
    chosen = ["-k", "tiny-hf or average or plain-hf"] if run.dry else []
    for _ in range(1 + _RESTARTS):
        left = until - time.time()
        if left <= 0:
            break
        # A test may be on its way when the time is up.
        returncode = run.process(part, [*_PYTEST, *chosen], left + _LONGEST_TEST / 5, mine)
        unfinished = [test for test, entry in _tests(log).items() if entry["outcome"] == "started"]
        with open(log, "a", encoding="utf-8") as lines:
            for test in unfinished:
                message = f"E the process ended in it: {status_of(returncode)[1]}"
                entry = {"test": test, "outcome": "failed", "message": message}
                lines.write(json.dumps(entry) + "\n")
        if not unfinished and returncode != _DEVICE_LOST:
            if returncode not in _TESTS_ENDED:
                message = f"E {status_of(returncode)[1]}, between two tests"
                return {**_tests(log), part: {"outcome": "failed", "message": message}}
            break
    return _tests(log)


def _tests(log: Path) -> dict[str, dict[str, Any]]:
    """The last word on every test."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {entry["test"]: entry for entry in map(json.loads, lines)}


def _verdict(tests: Mapping[str, dict[str, Any]]) -> tuple[str, str]:
    late = {t for t, entry in tests.items() if "out of time" in entry.get("message", "")[:40]}
    counts = Counter(e["outcome"] for t, e in tests.items() if t not in late)
    failed = [test for test, entry in tests.items() if entry["outcome"] == "failed"]
    note = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    if late:
        note += f", {len(late)} not run for lack of time"
    for test in failed[:12]:
        lines = tests[test].get("message", "").splitlines()
        told = [line for line in lines if line.startswith("E ")] or lines[-1:]
        note += f"\n    {test}: {' '.join(told[:1])[:200]}"
    return ("passed" if counts["passed"] and not failed and not late else "failed"), note


def sanitizer(run: Run) -> tuple[str, str]:
    """compute-sanitizer on a few steps: what is read and written out of bounds, and races."""
    with ThreadPoolExecutor(len(run.backends)) as threads:
        found = list(threads.map(lambda backend: _sanitize(run, backend), run.backends))
    worst = min((status for status, _ in found), key=("failed", "skipped", "passed").index)
    notes = (f"{b}: {note}" for b, (_, note) in zip(run.backends, found, strict=True))
    return worst, "; ".join(notes)


def _sanitizer_path() -> str | None:
    """On PATH, or beside nvcc."""
    nvcc = building.nvcc_path()
    beside = [str(nvcc.parent)] if nvcc is not None else []
    path = os.pathsep.join([os.environ.get("PATH", ""), *beside])
    return shutil.which("compute-sanitizer", path=path)


def _sanitize(run: Run, backend: str) -> tuple[str, str]:
    part = f"sanitizer-{backend}"
    env = {
        "FUSED_ADAFACTOR_TEST_DEVICE": run.device,
        "FUSED_ADAFACTOR_TEST_BACKEND": backend,
        "FUSED_ADAFACTOR_TEST_SEED": "1",
    }
    script = [sys.executable, "-m", "tests.gpu.few_steps"]
    # First by itself: that compiles, which the tool would only slow down.
    status, note = status_of(run.command(part, script, run.limit(0.2), env))
    tool = _sanitizer_path()
    if status == "failed":
        return status, f"without the tool: {note}"
    if tool is None:
        return "skipped", "there is no compute-sanitizer; the steps alone ran"
    # Each tensor in memory of its own, so that what lies next to it is out of bounds.
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    notes = []
    # What torch asks of the driver and is refused is no error of ours.
    memcheck = ["--tool", "memcheck", "--report-api-errors", "no"]
    for check, share, needed in ((memcheck, 0.12, True), (["--tool", "racecheck"], 0.06, False)):
        command = [tool, *check, "--error-exitcode", "9", *script]
        returncode = run.command(part, command, run.limit(share), env)
        notes.append(f"{check[1]}: {status_of(returncode)[1] or 'clean'}")
        if returncode != 0 and (needed or returncode is not None):
            status = "failed"
    return status, ", ".join(notes)


def device(run: Run) -> tuple[str, str]:
    """Copy bandwidth, what the cache keeps, and what a launch costs."""
    options = ["--device", run.device, "--json", str(run.file("device"))]
    options += ["--dry-run"] if run.dry else []
    returncode = run.process("device", ["bench.device", *options], run.limit(0.08))
    status, note = status_of(returncode)
    print(run.tail("device"))
    return status, note or f"copy {_copy_gb_per_s(run):.0f} GB/s"


def _copy_gb_per_s(run: Run) -> float | None:
    try:
        found = json.loads(run.file("device").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return float(found["copy_gb_per_s"])


def _bench(
    run: Run, part: str, cases: Sequence[str], share: float, *options: str, seconds: float
) -> tuple[str, str]:
    limit = run.limit(share)
    if limit < 10 and not run.dry:
        return "skipped", "no time left"
    record = run.file(part)
    command = ["fused_adafactor", "bench", "--device", run.device, "--backend", run.backend]
    command += [option for case in cases for option in ("--case", case)]
    command += ["--seconds", str(seconds), "--json", str(record), *options]
    command += [] if run.against is None else ["--against", run.against]
    # It starts no case when its time is nearly up, and is ended if one takes longer.
    returncode = run.process(part, [*command, "--within", str(0.8 * limit)], limit)
    status, note = status_of(returncode)
    count = len(read(record).cases) if record.exists() and record.stat().st_size else 0
    wanted = sum(len(case.dtypes) for case in choose((*GPU_CASES, *CASES), list(cases), full=False))
    return status, f"{count} of {wanted} cases" + (f", {note}" if note else "")


def targets(run: Run) -> tuple[str, str]:
    """The cases that have targets, in detail."""
    if run.dry:
        return _bench(run, "targets", ["gpu-1mb"], 0.5, "--detail", seconds=0.1)
    return _bench(run, "targets", _TARGETS, 0.36, "--detail", seconds=1.5)


def everyday(run: Run) -> tuple[str, str]:
    """The cases of ``make bench``."""
    if run.dry:
        return _bench(run, "everyday", ["1024x1024"], 0.5, seconds=0.01)
    return _bench(run, "everyday", _EVERYDAY, 0.2, seconds=0.7)


def compiled(run: Run) -> tuple[str, str]:
    """torch.compile of torch's, on one tensor; compiling takes most of it."""
    if run.dry:
        return "skipped", "in a dry run"
    return _bench(run, "compiled", ["gpu-117mb"], 0.15, "--compile", seconds=1.0)


PARTS: dict[str, Callable[[Run], tuple[str, str]]] = {
    part.__name__: part
    for part in (build, info, correctness, device, targets, sanitizer, everyday, compiled)
}


# --- all of it -----------------------------------------------------------------------------------


def rows_of(run: Run) -> list[Row]:
    """Of the cases that have been timed apart, with the bandwidth of this run."""
    record, copy = run.file("targets"), _copy_gb_per_s(run)
    if copy is None or not record.exists() or not record.stat().st_size:
        return []
    return [row_of(case, copy) for case in read(record).cases]


def take(run: Run, name: str) -> None:
    """Run a part, and note what became of it."""
    started = time.monotonic()
    print(f"{name} ...", flush=True)
    if run.limit(1.0) <= 0:
        status, note = "skipped", "no time left"
    else:
        try:
            status, note = PARTS[name](run)
        except Exception as error:  # a part that fails must not keep the others from running
            status, note = "failed", f"{type(error).__name__}: {error}"
    logs = [name, *(f"{name}-{backend}" for backend in run.backends)]
    for log in logs if status == "failed" else ():
        if run.file(log, "log").exists():
            print(run.tail(log), flush=True)
    outcome = Outcome(name, status, round(time.monotonic() - started, 1), note)
    run.outcomes.append(outcome)
    print(f"{name}: {status} in {outcome.seconds:.0f} s, {note}", flush=True)


def finish(run: Run) -> int:
    """Show and write what has come of it; the exit status."""
    rows = rows_of(run)
    summary = {
        "device": run.slug,
        "seconds": round(time.monotonic() - run.started, 1),
        "parts": [asdict(outcome) for outcome in run.outcomes],
        "targets": [row.as_dict() for row in rows],
    }
    run.file("summary").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print()
    for outcome in run.outcomes:
        note = outcome.note.partition("\n")[0]
        print(f"{outcome.part:<12} {outcome.status:<8} {outcome.seconds:6.1f} s  {note}")
    if rows:
        print(f"\n{as_table(rows)}")
        print("ours, unscaled, roof: in a CUDA graph on cold tensors. floor: read g, read p, write")
        print("p at the speed of a copy. torch, AdamW, clip+torch: whole steps.")
        if run.against is not None:
            print(f"against/ours: {run.against} over {run.backend}, likewise in a CUDA graph.")
        print("Records:", run.out)
    return int(any(outcome.status == "failed" for outcome in run.outcomes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts in order."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-output"))
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="only this one, repeatable, in all of the time",
    )
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything")
    parser.add_argument(
        "--shards", type=int, help="processes that share the tests of a backend; default: all cores"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument(
        "--against", default="cuda", help="another one, to test and to time beside it; none"
    )
    parser.add_argument("--dry-run", action="store_true", help="a little of each part")
    args = parser.parse_args(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("gpu: torch finds no GPU; --dry-run --device cpu --backend cpp tries this out")
        return 1
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    whole = args.part is None
    on_gpu = torch.device(args.device).type == "cuda"
    against = args.against if on_gpu and args.against not in (args.backend, "none") else None
    # Compiling kernels is what the tests take their time for, and keeps a core busy.
    shards = args.shards or max(1, (os.cpu_count() or 1) // (1 if against is None else 2))
    run = Run(args.device, args.backend, against, out, args.seconds, shards, args.dry_run, whole)
    chosen = ["build", *args.part] if args.part else list(PARTS)
    for name in chosen:
        for old in (*out.glob(f"{name}-{run.slug}.*"), *out.glob(f"{name}-*-{run.slug}.*")):
            old.unlink()
    for name in PARTS:
        if name in chosen:
            take(run, name)
    return finish(run)


if __name__ == "__main__":
    sys.exit(main())
