"""Where a run took place: versions, the machine, and the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from fused_adafactor import __version__

_PEERS = ("transformers", "timm", "pytorch_optimizer")
_HERE = Path(__file__).resolve()


def versions() -> dict[str, str | None]:
    """Of what is measured, by distribution; None for what is not installed."""
    return {
        "fused_adafactor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{peer: _version(peer) for peer in _PEERS},
    }


def machine(device: torch.device) -> dict[str, str | int]:
    """System, the device's own name, the instruction set that torch uses, and threads."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def checkout() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this file is part of, and whether it has changes; or None."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if commit is None else bool(changes)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or str(device)


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this file is part of; None if it is in none."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(_HERE.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package can lie in somebody else's checkout, which does not track it.
        ask("ls-files", "--error-unmatch", _HERE.name)
        return ask(*arguments)
    except (OSError, subprocess.CalledProcessError):
        return None
