"""The CUDA kernels compiled for the host: what tests of them run without a GPU.

The sources are those of csrc/cuda; csrc/cuda/host stands for CUDA. A build is kept under
``build/emulated`` until a source, or a flag, is another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SOURCES = ROOT / "csrc"
_FOLDER = ROOT / "build" / "emulated"
FLAGS_ENVIRONMENT = "FUSED_ADAFACTOR_EMULATED_FLAGS"  # sanitizers, say
_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    # As nvcc is told: a * b + c is one operation only where a formula says so.
    "-ffp-contract=off",
    # What is read as words was written as numbers.
    "-fno-strict-aliasing",
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DFA_EMULATED"),
    *(f"-I{_SOURCES / folder}" for folder in ("cuda/host", "include", "cuda")),
)
_INPUTS = (
    "-x",
    "c++",
    *(str(_SOURCES / "cuda" / name) for name in ("step.cu", "host/emulation.cpp")),
)


def library(*flags: str) -> Path:
    """The library, built unless it has been.

    Args:
        flags: For the compiler, beside those of the environment.
    """
    flags = (*flags, *shlex.split(os.environ.get(FLAGS_ENVIRONMENT, "")))
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *_FLAGS, *flags, *_INPUTS]
    _FOLDER.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    built = _FOLDER / f"libfused_adafactor_cuda_{name}.so"
    with (_FOLDER / f"{name}.lock").open("w") as lock:  # several processes run tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists() or built.stat().st_mtime < _newest_source():
            unfinished = built.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.replace(built)
    return built


def _newest_source() -> float:
    folders = (_SOURCES / "cuda", _SOURCES / "include")
    return max(path.stat().st_mtime for folder in folders for path in folder.rglob("*.*"))
