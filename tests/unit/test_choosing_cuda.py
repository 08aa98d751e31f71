"""When the CUDA backend steps tensors, and what is said where it does not.

With a library that lies: its launches do nothing, and its calls return what they are told to.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adafactor import Adafactor, backends, building, launching
from fused_adafactor.__main__ import main
from fused_adafactor.backends import cuda as backend
from fused_adafactor.dialects.hf import Adafactor as HF
from fused_adafactor.launching import LAUNCH_ENVIRONMENT
from fused_adafactor.spec import TensorId, spec_of
from tests.emulated import library as library_for_the_host
from tests.stepping import same_bits

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SOURCE = r"""
#include <stdlib.h>
#include <string.h>
#include "fused_adafactor/cuda.h"
using fused_adafactor::CudaLaunch;
static int told(const char* name, int otherwise) {
  return getenv(name) ? atoi(getenv(name)) : otherwise;
}
static CudaLaunch seen;
static int32_t count;
extern "C" {
int32_t fused_adafactor_cuda_abi_version() {
  return told("LIE_ABI", fused_adafactor::kCudaAbiVersion);
}
int32_t fused_adafactor_cuda_is_host() { return told("LIE_HOST", 1); }
int32_t fused_adafactor_cuda_threads() { return 64; }
int32_t fused_adafactor_cuda_device(int32_t, int32_t* processors, int32_t* bytes, int32_t* blocks) {
  *processors = 3, *bytes = 0, *blocks = 2;
  return told("LIE_DEVICE", 0);
}
int32_t fused_adafactor_cuda_launch(const CudaLaunch* launch, int32_t, void*) {
  seen = *launch, ++count;
  return count == told("LIE_LAUNCH", -1) ? 700 : 0;
}
const char* fused_adafactor_cuda_error(int32_t code) {
  return code == 700 ? "cudaErrorIllegalAddress: an illegal memory access was encountered"
                     : "cudaErrorNoDevice: no CUDA-capable device is detected";
}
FUSED_ADAFACTOR_EXPORT const CudaLaunch* lie_seen() { return &seen; }
FUSED_ADAFACTOR_EXPORT int32_t lie_count() {
  int32_t so_far = count;
  count = 0;
  return so_far;
}
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("liar")
    (folder / "liar.cpp").write_text(SOURCE)
    include = Path(__file__).parents[2] / "csrc" / "include"
    command = [compiler, "-shared", "-fPIC", "-std=c++17", f"-I{include}", str(folder / "liar.cpp")]
    subprocess.run([*command, "-o", str(folder / "liar.so")], check=True)
    return folder / "liar.so"


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (backends.ENVIRONMENT, *backend.ENVIRONMENTS, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_warned", set())
    backend.library.cache_clear()
    yield
    backend.library.cache_clear()


@pytest.fixture
def machine(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine without Triton, as it is told to be."""

    def has(*, library: bool = True, gpu: bool = True, rocm: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.version, "hip", rocm)
        monkeypatch.setattr(backends.importlib, "import_module", without_triton(gpu))
        monkeypatch.setenv("LIE_HOST", "0")
        backend.library.cache_clear()
        find = building.find_library

        def find_or_not(name: str) -> Path:
            if name != "cuda":
                return find(name)
            if not library:
                raise FileNotFoundError("nowhere")
            return compiled

        monkeypatch.setattr(building, "find_library", find_or_not)

    return has


def without_triton(gpu: bool) -> Callable[[str], Any]:
    importer = backends.importlib.import_module

    def load(name: str) -> Any:
        module = importer(name)
        return NoTriton(gpu) if name.endswith(".triton") else module

    return load


class NoTriton:
    """The Triton backend where Triton is not installed."""

    ENVIRONMENTS = (LAUNCH_ENVIRONMENT,)

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu

    def missing(self) -> str:
        return "triton is not installed"

    def steps_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def refusal(self, device: torch.device) -> None:
        return None


@pytest.fixture
def emulated(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library named, as one that emulates a GPU; nothing has been launched."""
    monkeypatch.setenv(backend.LIBRARY_ENVIRONMENT, str(compiled))
    library = backend.library()
    library.lie_seen.restype = ctypes.POINTER(backend._Launch)
    library.lie_count()
    return library


def params(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


# --- which backend it is -------------------------------------------------------------------------


def test_auto_takes_it_for_tensors_of_a_gpu_without_triton(machine: Callable[..., None]) -> None:
    machine()
    facts = backends.choose("auto", CUDA)
    assert (facts.backend, facts.two_sweep) == ("cuda", True)
    assert facts.why == "auto on cuda: persistent launch, one launch for all tensors"
    assert backends.choose("cuda", CUDA).why == "asked for"


def test_auto_takes_triton_before_it(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(NoTriton, "missing", lambda self: None)
    monkeypatch.setattr(NoTriton, "describe", lambda self: "there", raising=False)
    assert backends.choose("auto", CUDA).backend == "triton"
    assert backends.choose("cuda", CUDA).backend == "cuda"


def test_a_launch_form_that_was_asked_for_is_used(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's is too, but where it is missing this is no reason to refuse."""
    machine()
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, "phases")
    assert backends.choose("auto", CUDA).why == "auto on cuda: phases launch, asked for"
    machine(library=False)
    with pytest.raises(RuntimeError, match=f"{LAUNCH_ENVIRONMENT} asks for the triton backend"):
        backends.choose("auto", CUDA)


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ({"library": False}, "the CUDA library was not built .*python -m fused_adafactor build"),
        ({"gpu": False}, "torch sees no GPU"),
        ({"rocm": "6.4"}, "torch is built for AMD's GPUs"),
    ],
    ids=str,
)
def test_an_explicit_request_is_refused_with_the_reason(
    lacks: dict[str, Any], reason: str, machine: Callable[..., None]
) -> None:
    machine(**lacks)
    for device in (CPU, CUDA):
        with pytest.raises(RuntimeError, match=f"'cuda' was asked for, but {reason}"):
            backends.choose("cuda", device)
    with pytest.warns(RuntimeWarning, match=f"on cuda:0 are stepped by the reference.*{reason}"):
        facts = backends.choose("auto", CUDA)
    assert facts.backend == "reference"
    assert "CUDA" in facts.why or "GPU" in facts.why
    assert backends.choose("auto", CUDA) == facts  # once is enough
    assert backends.choose("reference", CUDA).backend == "reference"


def test_a_device_that_its_kernels_do_not_run_on_is_refused_with_the_name_of_the_call(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setenv("LIE_DEVICE", "100")
    reason = r"fused_adafactor_cuda_device\(0\): cudaErrorNoDevice: no CUDA-capable device"
    with pytest.raises(RuntimeError, match=f"'cuda' was asked for, but {reason}"):
        backends.choose("cuda", CUDA)
    with pytest.warns(RuntimeWarning, match=f"{reason}.*backend='reference' asks for it"):
        facts = backends.choose("auto", CUDA)
    assert facts.backend == "reference"
    assert "cudaErrorNoDevice" in facts.why


def test_another_device_is_asked_as_the_current_one_of_torch(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the library makes it the current one, and goes back to one that nobody may have used."""
    machine()
    seen: list[object] = []

    @contextlib.contextmanager
    def device(other: torch.device) -> Iterator[None]:
        seen.append(other)
        library = backend.library()
        monkeypatch.setattr(library, "fused_adafactor_cuda_device", lambda *_: seen.append("asked"))
        yield
        seen.append("left")

    monkeypatch.setattr(backend, "_check", lambda call, code: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    backend.resources_of(CUDA)
    assert seen == []
    backend.resources_of(torch.device("cuda", 1))
    assert seen == [torch.device("cuda", 1), "asked", "left"]


def test_tensors_of_a_cpu_are_refused_where_nothing_is_emulated(
    machine: Callable[..., None],
) -> None:
    machine()
    with pytest.raises(RuntimeError, match="the cuda backend does not step tensors on cpu"):
        backends.choose("cuda", CPU)
    assert backends.choose("auto", CPU).backend != "cuda"


def test_a_library_that_emulates_steps_tensors_of_a_cpu_only(emulated: ctypes.CDLL) -> None:
    assert backends.choose("cuda", CPU).backend == "cuda"
    assert backends.choose("auto", CPU).why.endswith(", emulated")
    with pytest.raises(RuntimeError, match="the cuda backend does not step tensors on cuda"):
        backends.choose("cuda", CUDA)


def test_a_library_of_another_version_is_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.LIBRARY_ENVIRONMENT, str(compiled))
    monkeypatch.setenv("LIE_ABI", "77")
    with pytest.raises(RuntimeError, match=r"ABI version 77, expected \d+; reinstall"):
        backends.choose("cuda", CPU)


@pytest.mark.parametrize("there", ["nothing", "a text", "another library"])
def test_a_library_that_cannot_be_loaded_is_refused_with_its_name(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.so"
    if there == "a text":
        path.write_text("no library")
    elif there == "another library":
        path.symlink_to(Path(torch.__file__).parent / "lib" / "libc10.so")
    monkeypatch.setenv(backend.LIBRARY_ENVIRONMENT, str(path))
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for, but .*other\.so"):
        backends.choose("cuda", CPU)
    assert backends.choose("auto", CPU).backend != "cuda"


def test_a_library_of_somebody_else_is_refused(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()

    find = building.find_library

    def find_or_not(name: str) -> Path:
        if name != "cuda":
            return find(name)
        raise PermissionError("others can write to it")

    monkeypatch.setattr(building, "find_library", find_or_not)
    with pytest.raises(RuntimeError, match="'cuda' was asked for, but others can write to it"):
        backends.choose("cuda", CUDA)


def test_info_says_how_it_launches(
    emulated: ctypes.CDLL, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")  # for the self check
    assert main(["info"]) == 0
    assert "backend cuda       available: liar.so, persistent launch" in capsys.readouterr().out


# --- what it is given, and what it says -----------------------------------------------------------


@pytest.mark.parametrize("form", ["persistent", "phases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_launch_is_described_as_the_header_says(
    form: str, dtype: torch.dtype, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, form)
    made = params((7, 5), (9,), (300, 400))
    for p in made:
        p.data, p.grad = p.data.to(dtype), p.grad.to(dtype)
    executors = []
    bind = backend.bind
    monkeypatch.setattr(backend, "bind", lambda *a: executors.append(bind(*a)) or executors[-1])
    Adafactor(made, backend="cuda").step()
    (executor,) = executors
    persistent = form == "persistent"
    assert (emulated.lie_count() == 1) == persistent  # all tensors, whatever their traits
    seen = emulated.lie_seen().contents
    assert seen.table == executor.table.data_ptr()
    assert seen.grads == executor.grads.on_device.data_ptr()
    assert seen.counters == executor.counters.data_ptr()
    assert seen.counter_count == executor.counters.numel()
    assert seen.scratch == executor.scratch.data_ptr()
    assert (seen.begin, seen.waits, seen.joined) == (0, int(persistent), 0)
    assert seen.programs == (min(seen.end, 3 * 2) if persistent else seen.end)
    assert seen.math_dtype == (0 if dtype is torch.float32 else 3)


def test_what_was_joined_is_told(emulated: ctypes.CDLL) -> None:
    Adafactor(params((7, 5)), max_grad_norm=1.0, backend="cuda").step()
    assert emulated.lie_count() == 2
    assert emulated.lie_seen().contents.joined == 1


def test_an_error_of_a_launch_names_the_call(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIE_LAUNCH", "1")
    made = params((7, 5))
    optimizer = Adafactor(made, backend="cuda")
    text = "^fused_adafactor_cuda_launch: cudaErrorIllegalAddress: an illegal memory access"
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    assert all(map(same_bits, made, params((7, 5))))


def test_a_device_that_is_lost_is_named_before_anything_is_launched(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = Adafactor(params((7, 5)), backend="cuda")
    optimizer.explain()
    monkeypatch.setenv("LIE_DEVICE", "100")
    with pytest.raises(RuntimeError, match=r"fused_adafactor_cuda_device\(0\): cudaErrorNoDevice"):
        optimizer.step()
    assert emulated.lie_count() == 0


class _NoNewTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.clone), func
        return func(*args, **(kwargs or {}))


def test_a_steady_step_makes_no_tensor(emulated: ctypes.CDLL) -> None:
    """Nor for RMS(p), which is written to the state of this dialect."""
    made = params((7, 5))
    optimizer = HF(made, backend="cuda")
    for _ in range(3):
        optimizer.step()
    with _NoNewTensors():
        optimizer.step()
    assert emulated.lie_count() > 0
    assert "RMS" in optimizer.state[made[0]]


def test_a_first_step_inside_a_capture_is_refused(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables cannot be sent during a capture."""
    monkeypatch.setattr(launching, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take a step of the same kind outside of the graph"):
        HF(params((7, 5)), backend="cuda").step()
    assert emulated.lie_count() == 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirror_is_refused_with_the_reason(mirrored: bool) -> None:
    param = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Adafactor([param])
    rule = optimizer._rule(optimizer.param_groups[0])
    mirror = torch.ones(4, 6) if mirrored else None
    found = backend.obstacle(spec_of(TensorId(0, 0, None), param, param, rule, mirror=mirror))
    assert (found is not None) == mirrored
    assert found is None or "mirror" in found


@pytest.mark.slow
def test_the_self_check_steps_through_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the kernels themselves, emulated, and not with a library that lies."""
    monkeypatch.setenv(backend.LIBRARY_ENVIRONMENT, str(library_for_the_host()))
    assert main(["info"]) == 0
    assert "self check on cpu with cuda: ok" in capsys.readouterr().out
