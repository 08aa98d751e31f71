"""``info``: versions, every backend with the reason why it cannot run, a self check per device."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# One step in float32 against float64: a few roundings of the parameter and of sums over 63 x 65
# elements, each 6e-8.
SELF_CHECK_BOUND = 2e-6


@dataclass(frozen=True)
class SelfCheck:
    """One step on one device, compared with the reference in float64.

    Attributes:
        device: As torch names it.
        backend: The backend that stepped.
        error: Largest difference over all parameters, relative to the largest value.
        passed: Whether the error is within ``SELF_CHECK_BOUND``.
        reason: The exception, where the step raised one.
    """

    device: str
    backend: str
    error: float | None
    passed: bool
    reason: str | None = None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("info", help="versions, backends, self check")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is installed and whether it works.

    Returns:
        0, or 1 if a self check failed.
    """
    report = collect()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if all(check["passed"] for check in report["self_checks"]) else 1


def collect() -> dict[str, Any]:
    """Versions, backends and self checks as one record that JSON can hold."""
    import torch

    from fused_adafactor import __version__, backends
    from fused_adafactor.backends import cpp, cuda

    return {
        "versions": {
            "fused_adafactor": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "platform": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "backends": {
            name: {"available": reason is None, "reason": reason}
            for name, reason in backends.availability().items()
        },
        "native": cpp.facts() if cpp.missing() is None else None,
        "cuda": cuda.facts() if cuda.missing() is None else None,
        "self_checks": [asdict(self_check(device)) for device in _devices()],
    }


def as_text(report: dict[str, Any]) -> str:
    """The record for a person."""
    lines = [f"{name:<16} {version or 'not there'}" for name, version in report["versions"].items()]
    lines += [f"{name:<16} {value}" for name, value in report["platform"].items()]
    lines.append("")
    for name, backend in report["backends"].items():
        lines.append(f"backend {name:<10} {backend['reason'] or 'available'}")
        if name == "cpp" and report["native"] is not None:
            lines[-1] += ": {library}, {isa}, {threads} threads".format(**report["native"])
        if name == "cuda" and report["cuda"] is not None:
            lines[-1] += ": {library}, {launch} launch".format(**report["cuda"])
    lines.append("")
    for check in report["self_checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        detail = check["reason"] or f"largest relative error {check['error']:.1e}"
        lines.append(
            f"self check on {check['device']} with {check['backend']}: {verdict}, {detail}"
        )
    return "\n".join(lines)


def self_check(device: torch.device) -> SelfCheck:
    """Step a matrix and a vector once on a device in float32, and in float64 on the CPU."""
    import torch

    from fused_adafactor import backends

    request = "auto"
    try:
        request = backends.parse_request(request)
        name = backends.choose(request, device).backend
        ours = _stepped(device, torch.float32, request)
    except (RuntimeError, ValueError) as broken:
        return SelfCheck(str(device), request, None, passed=False, reason=str(broken))
    wanted = _stepped(torch.device("cpu"), torch.float64, "reference")
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, wanted, strict=True)
    )
    return SelfCheck(str(device), name, error, passed=error <= SELF_CHECK_BOUND)


def _stepped(device: torch.device, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """The two parameters after one step, as float64 on the CPU."""
    import torch

    from fused_adafactor import Adafactor

    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in ((63, 65), (67,)):
        start, grad = torch.randn(2, *shape, generator=generator).to(device, dtype)
        param = start.clone().requires_grad_()
        param.grad = grad.clone()
        params.append(param)
    Adafactor(params, lr=0.1, backend=backend).step()
    return [param.detach().cpu().double() for param in params]


def _devices() -> list[torch.device]:
    import torch

    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        found += [torch.device(accelerator.type, index) for index in range(count)]
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
