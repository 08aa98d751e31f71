"""The CUDA backend for GPUs: tickets of ``launching.py`` are taken by kernels of a native library.

The library has a plain C interface (csrc/include/fused_adafactor/cuda.h) and is loaded on first
use. Where ``FUSED_ADAFACTOR_CUDA_LIBRARY`` names a build of the same sources for the host, which
emulates a GPU, its kernels step tensors of a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fused_adafactor import building, launching
from fused_adafactor.binding import Binding
from fused_adafactor.fields import DTYPES
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, Arguments, Launch, current, launch_form
from fused_adafactor.plan import Phase
from fused_adafactor.slabs import ItemKind
from fused_adafactor.spec import TensorSpec
from fused_adafactor.tickets import GPU_CUT, Tuning
from fused_adafactor.traits import Traits

ABI_VERSION = 2
LIBRARY_ENVIRONMENT = "FUSED_ADAFACTOR_CUDA_LIBRARY"  # another build
ENVIRONMENTS = (LIBRARY_ENVIRONMENT, LAUNCH_ENVIRONMENT)
TUNING = Tuning()
_ELEMENTS_OF_A_THREAD = 16  # of a line, at most: kWidest in csrc/cuda/shared.cuh


class _Launch(ctypes.Structure):
    """``CudaLaunch`` of cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tickets", "items", "table", "grads")),
        *((name, ctypes.c_void_p) for name in ("numbers", "integers", "factors", "skips")),
        *((name, ctypes.c_void_p) for name in ("scratch", "outcomes", "counters")),
        *((name, ctypes.c_int32) for name in ("begin", "end", "counter_count", "programs")),
        *((name, ctypes.c_int32) for name in ("waits", "joined", "math_dtype", "stash_bytes")),
        ("keeps", ctypes.c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the native library, once.

    Raises:
        FileNotFoundError: It was not built.
        OSError: It cannot be loaded, or may be somebody else's.
        RuntimeError: It was built for another version of this package.
    """
    return load(_library_path())


def load(path: Path) -> ctypes.CDLL:
    """Load a build of the library; see ``building.load_library``."""
    native = building.load_library(path, "fused_adafactor_cuda_abi_version", ABI_VERSION)
    native.fused_adafactor_cuda_device.argtypes = [
        ctypes.c_int32,
        *(ctypes.POINTER(ctypes.c_int32),) * 3,  # processors, shared bytes, blocks of a processor
    ]
    native.fused_adafactor_cuda_launch.argtypes = [
        *(ctypes.POINTER(_Launch), ctypes.c_int32, ctypes.c_void_p),  # launch, device, stream
    ]
    native.fused_adafactor_cuda_error.restype = ctypes.c_char_p
    return native


def _library_path() -> Path:
    named = os.environ.get(LIBRARY_ENVIRONMENT)
    return Path(named) if named else building.find_library("cuda")


def _check(call: str, code: int) -> None:
    """Raise what a call of the library has returned, unless that is success."""
    if code != 0:
        text = library().fused_adafactor_cuda_error(code).decode(errors="replace")
        raise RuntimeError(f"{call}: {text}")


def missing() -> str | None:
    """Why this backend cannot run, or None."""
    try:
        if torch.version.hip is not None:
            return "torch is built for AMD's GPUs"
        named = os.environ.get(LIBRARY_ENVIRONMENT)
        if named and not Path(named).exists():
            return f"{LIBRARY_ENVIRONMENT} is {named}, which is not there"
        if not is_host() and not torch.cuda.is_available():
            return "torch sees no GPU"
        library()
        launch_form()
    except FileNotFoundError:
        return (
            "the CUDA library was not built (no nvcc when the package was installed; where there "
            "is one, `python -m fused_adafactor build` does it)"
        )
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def is_host() -> bool:
    """Whether the library emulates a GPU: it has been named, since none like that is installed.

    Raises:
        OSError: It cannot be loaded.
        RuntimeError: It was built for another version of this package.
    """
    named = os.environ.get(LIBRARY_ENVIRONMENT)
    return bool(named) and library().fused_adafactor_cuda_is_host() == 1


def steps_on(device: torch.device) -> bool:
    """Whether tensors of a device can be stepped: those of a GPU, or of a CPU where it emulates."""
    try:
        return device.type == ("cpu" if is_host() else "cuda")
    except (OSError, RuntimeError):
        return device.type == "cuda"


def refusal(device: torch.device) -> str | None:
    """Why it cannot run on a device of these, or None: one may be too old for its kernels."""
    try:
        resources_of(device)
    except RuntimeError as error:
        return str(error)
    return None


class Resources(NamedTuple):
    """What a device has for the kernels.

    Attributes:
        processors: That it has.
        stash_bytes: Shared memory of each that gradients may be kept in.
        blocks: That each of them runs at a time.
    """

    processors: int
    stash_bytes: int
    blocks: int


def resources_of(device: torch.device) -> Resources:
    """Ask the library for what a device has.

    Raises:
        RuntimeError: It cannot be had, or its kernels do not run there; with the name of the call.
    """
    found = [ctypes.c_int32() for _ in Resources._fields]
    number = device.index or 0
    # The library goes back to the device that was the current one, which takes hundreds of MB there
    # where nobody has used it yet. torch knows where that is so, and does not.
    on_it: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        on_it = current(torch.device(device.type, number))
    with on_it:
        code = library().fused_adafactor_cuda_device(number, *map(ctypes.byref, found))
    _check(f"fused_adafactor_cuda_device({number})", code)
    return Resources(*(value.value for value in found))


def facts() -> dict[str, str]:
    """The library, and how it launches."""
    form, _ = launch_form()
    return {"library": _library_path().name, "launch": form}


def describe() -> str:
    """How it launches."""
    form, why = launch_form()
    return f"{form} launch, {why}" + (", emulated" if is_host() else "")


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements, or None."""
    return launching.obstacle(spec, GPU_CUT)


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> launching.Executor:
    """Make an executor for tensors of one device and one math dtype, none of them empty."""
    launcher = CudaLauncher(bindings[0].planned.spec, launch_form()[0])
    return launching.bind(bindings, segments, launcher)


class CudaLauncher:
    """See ``launching.Launcher``. One kernel has all rules and dtypes, so a launch has all tensors.

    Args:
        spec: Of one of the tensors: their device and math dtype.
        launch_form: ``persistent`` or ``phases``.
    """

    def __init__(self, spec: TensorSpec, launch_form: str) -> None:
        """Ask the library for what the device has."""
        self.device, self.math_dtype = spec.device, spec.math_dtype
        widest = _ELEMENTS_OF_A_THREAD * library().fused_adafactor_cuda_threads()
        tuning = replace(TUNING, widest=min(TUNING.widest, widest), chunk=min(TUNING.chunk, widest))
        self.tuning = tuning.for_math(spec.math_dtype)
        self.waits = launch_form == "persistent"
        resources = resources_of(self.device)
        self.stash_bytes = resources.stash_bytes
        self.programs = resources.processors * resources.blocks

    def tuning_of(self, traits: Traits) -> Tuning:
        """Sizes for a tensor."""
        return self.tuning

    def group_of(self, traits: Traits) -> Hashable:
        """The same for all."""
        return None

    def kernel_of(self, launch: Launch) -> CudaKernel:
        """What takes the tickets of a launch."""
        return CudaKernel(self, launch)


def _is_plain(traits: Traits) -> bool:
    """Whether gradients may come through a stash: ``Plain`` of csrc/cuda/job.cuh."""
    plain_dtypes = {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    return (
        traits.math_dtype is torch.float32
        and (traits.param_dtype, traits.grad_dtype) in plain_dtypes
        and traits.moment_dtype is not torch.float64
        and traits.aligned
        and not traits.strided
        and traits.momentum == 0
        and not (traits.amsgrad or traits.value_clip or traits.accumulates)
        and not (traits.averages or traits.kahan)
    )


class CudaKernel:
    """See ``launching.Kernel``.

    Args:
        launcher: Its device and math dtype.
        launch: Its form, and the number of its blocks.
    """

    def __init__(self, launcher: CudaLauncher, launch: Launch) -> None:
        """Fill in what is the same in every step."""
        self._device = launcher.device
        self._number = launcher.device.index or 0
        arrive = ItemKind.STATS in launch.kinds and any(map(_is_plain, launch.traits))
        stash_bytes = launcher.stash_bytes if arrive else 0
        self._record = _Launch(
            programs=launch.programs,
            waits=launch.waits,
            joined=launch.joined,
            stash_bytes=stash_bytes,
            # Blocks keep gradients only for what they apply in the same launch.
            keeps=stash_bytes > 0 and launch.waits and ItemKind.APPLY in launch.kinds,
            math_dtype=DTYPES[launcher.math_dtype],
        )

    def compile(self, arguments: Arguments) -> None:
        """Nothing: the library has it compiled."""

    def start(self, arguments: Arguments) -> None:
        """Launch it on the current stream of the current device."""
        record = self._record
        for name, value in arguments._asdict().items():
            setattr(record, name, value if isinstance(value, int) else value.data_ptr())
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        code = library().fused_adafactor_cuda_launch(record, self._number, stream)
        _check("fused_adafactor_cuda_launch", code)
