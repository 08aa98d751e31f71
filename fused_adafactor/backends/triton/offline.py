"""Kernels compiled without a GPU: what they take of it, and how wide they read and write.

The compiler is given what a launch would give it. What it made of that is read from its own output:
the resources of the binary that would be loaded, and the accesses of its assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fused_adafactor.backends.triton.calls import calls_as_on
from fused_adafactor.backends.triton.kernel import step
from fused_adafactor.backends.triton.launcher import TritonKernel
from fused_adafactor.backends.triton.variants import Variant
from fused_adafactor.launching import Arguments
from fused_adafactor.ptx import accesses
from fused_adafactor.slabs import ItemKind

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_SWEEPS = (
    ItemKind.CHUNK,
    ItemKind.STATS,
    ItemKind.UPDATE_RMS,
    ItemKind.APPLY,
    ItemKind.ACCUMULATE,
    ItemKind.AVERAGE,
)


class Source(NamedTuple):
    """What a kernel is compiled from; equal sources are the same kernel.

    Attributes:
        variant: What it is compiled for.
        types: Of its arguments before the variant, as Triton writes them.
        options: Name and value of the compiler's options.
    """

    variant: Variant
    types: tuple[str, ...]
    options: tuple[tuple[str, int | bool], ...]

    @property
    def streaming(self) -> bool:
        """Whether it sweeps over arrays that begin at multiples of 16 bytes."""
        return self.variant.ALIGNED and any(self.variant.KINDS[kind] for kind in _SWEEPS)


def source_of(kernel: TritonKernel, arguments: Arguments) -> Source:
    """What a kernel is compiled from for these arguments."""
    return Source(
        kernel.variant,
        types=tuple(_type_of(argument) for argument in arguments),
        options=tuple(kernel.options.items()),
    )


def _type_of(argument: Tensor | int) -> str:
    return f"*{_TYPES[argument.dtype]}" if isinstance(argument, Tensor) else "i32"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        registers: Of a thread.
        shared_bytes: Of a program.
        spill_bytes: Of a thread, in memory instead of registers.
        widest_access_bytes: Of a thread, to global memory in one instruction.
        seconds: That it took; next to none where Triton's cache had it.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    widest_access_bytes: int
    seconds: float


def compile_for(source: Source, target: str) -> Report:
    """Compile a kernel for a target: ``sm_90``, say, or ``gfx942``."""
    gpu = _gpu(target)
    names = step.arg_names[: len(source.types)]
    signature = {**dict(zip(names, source.types, strict=True)), step.arg_names[-1]: "constexpr"}
    # Torch's memory begins at multiples of 16 bytes, and no table has 2 GB ("S", which AMD uses).
    attributes = make_backend(gpu).parse_attr("DS")
    attrs = {(i,): attributes for i, type in enumerate(source.types) if type.startswith("*")}
    ast = ASTSource(step, signature, {step.arg_names[-1]: source.variant}, attrs)
    start = time.perf_counter()
    options = dict(source.options)
    if gpu.backend != "cuda":
        options.pop("maxnreg", None)  # there is no such option
    with calls_as_on(gpu.backend):
        kernel = triton.compile(ast, target=gpu, options=options)
    seconds = time.perf_counter() - start
    read = _nvidia if gpu.backend == "cuda" else _amd
    registers, spill, widest = read(kernel.asm)
    return Report(registers, kernel.metadata.shared, spill, widest, round(seconds, 2))


def _gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def _nvidia(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """Registers, spilled bytes and the widest access of a kernel for NVIDIA."""
    # Of the binary that Triton made: which ptxas it runs, and how, differs between its versions.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, max(accesses(asm["ptx"]), default=0)


def _amd(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """The same for AMD. Its scalars spill into lanes of vector registers, which are counted."""
    text: str = asm["amdgcn"]
    vectors, spill = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    access = re.compile(r"\b(?:global|buffer)_(?:load|store)_(?:(?:dword|b)(?:x?(\d+))?)\b")
    found = (int(size or 1) for size in access.findall(text))
    widest = max((size * 4 if size < 32 else size // 8 for size in found), default=0)
    return vectors, spill, widest
