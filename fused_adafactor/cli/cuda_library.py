"""The CUDA library compiled for GPUs that are not here, and what the compiler made of it.

It has a kernel for each math dtype, and every phase of a step is a function of its own in there:
each is told apart. Registers are those of its kernel; the rest is its own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fused_adafactor import building
from fused_adafactor.backends import cuda
from fused_adafactor.cli.codegen import Kernel
from fused_adafactor.cli.progress import ProgressBar
from fused_adafactor.ptx import widest_accesses

# A function that sweeps over tensors whose lines and arrays begin at multiples of 16 bytes, by the
# names that csrc/cuda has for sweeps and for such tensors.
_STREAMING = re.compile(r"\d(?:sum|measure|apply|idle)_[a-z_]+INS_\d+(?:Aligned|Plain)")


def obstacle(targets: Sequence[str]) -> str | None:
    """Why it cannot be compiled for these, or None."""
    nvcc = building.nvcc_path()
    if nvcc is None:
        return "there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
    known = building.known_archs(nvcc)
    unknown = [target for target in targets if _arch(target) not in known]
    return f"{nvcc} does not compile for {unknown[0]}" if unknown else None


def report(targets: Sequence[str], args: argparse.Namespace) -> tuple[list[Kernel], list[str]]:
    """Functions that were compiled, and why others were not."""
    kernels: list[Kernel] = []
    failures = []
    with ProgressBar(len(targets), "compiling") as bar, ThreadPoolExecutor(args.jobs) as threads:
        for target, made in zip(targets, threads.map(_compiled, targets), strict=True):
            if isinstance(made, str):
                failures.append(f"the CUDA library for {target}: {made}")
            else:
                kernels += [k for k in made if args.match in k.kernel]
            bar.advance(target)
    return kernels, failures


def _compiled(target: str) -> list[Kernel] | str:
    """The functions for a target, or why there are none."""
    try:
        return compile_for(target)
    except (OSError, RuntimeError, building.CannotBuild) as error:
        return str(error)


def compile_for(target: str) -> list[Kernel]:
    """Build the library for a target, load it, and tell what its functions take.

    Raises:
        CannotBuild: There are no sources.
        OSError: A compiler cannot be started, or what it made cannot be loaded.
        RuntimeError: A compiler failed; its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects, log = Path(folder, "objects"), Path(folder, "log")
        objects.mkdir()
        recipe = building.cuda_recipe(
            [_arch(target)], ["-Xptxas=-v", "--keep", f"--keep-dir={objects}"]
        )
        library = Path(folder, building.LIBRARIES["cuda"])
        start = time.perf_counter()
        try:
            with open(log, "w", encoding="utf-8") as said:
                building.compile_library(recipe, library, objects, said)
        except subprocess.CalledProcessError as error:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise RuntimeError("\n".join(lines[-5:])) from error
        seconds = round(time.perf_counter() - start, 2)
        cuda.load(library)  # which needs no GPU
        text = log.read_text(encoding="utf-8", errors="replace")
        accesses: dict[str, int] = {}
        for ptx in objects.glob("*.ptx"):
            accesses |= widest_accesses(ptx.read_text(encoding="utf-8"))
    resources = list(resources_of(text))
    names = _demangled([name for name, *_ in resources])
    return [
        Kernel(
            kernel=names[name],
            target=target,
            registers=registers,
            shared_bytes=shared,
            spill_bytes=spilled,
            widest_access_bytes=accesses.get(name, 0),
            streaming=_STREAMING.search(name) is not None,
            seconds=seconds,
        )
        for name, registers, shared, spilled in resources
    ]


def _arch(target: str) -> int:
    return int(target.removeprefix("sm_"))


def resources_of(log: str) -> Iterator[tuple[str, int, int, int]]:
    """Of each function that ptxas tells of: name, registers, shared memory and spilled bytes."""
    registers = shared = 0
    # Of a kernel it says first what itself takes, and then what the functions do that it calls.
    for kernel in re.split(r"Compiling entry function", log)[1:]:
        registers = _number(r"Used (\d+) registers", kernel)
        shared = _number(r"(\d+) bytes smem", kernel)
        told = re.findall(
            r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores",
            kernel,
        )
        for name, _, spilled in told:
            yield name, registers, shared, int(spilled)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """Names as they are written, where there is a tool for it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    text = "\n".join(names)
    written = subprocess.run([tool], input=text, check=True, capture_output=True, text=True).stdout
    short = (line.replace("fused_adafactor::", "") for line in written.splitlines())
    return dict(zip(names, (line.partition("(")[0] for line in short), strict=True))
