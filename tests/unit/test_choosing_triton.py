"""When the Triton backend steps tensors, and what is said where it does not; without Triton."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from typing import Any

import pytest
import torch

from fused_adafactor import Adafactor, backends
from fused_adafactor.backends import cuda
from fused_adafactor.backends import triton as backend
from fused_adafactor.launching import LAUNCH_ENVIRONMENT, LAUNCHES
from fused_adafactor.spec import Sharing, TensorId, spec_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_TRITON = "triton is not installed"
NO_GPU = "torch sees no GPU"


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (backends.ENVIRONMENT, LAUNCH_ENVIRONMENT, backend.INTERPRETER_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine as it is told to be, without the CUDA library."""
    monkeypatch.setattr(cuda, "missing", lambda: "the CUDA library was not built")
    find = importlib.util.find_spec

    def has(*, triton: bool = True, gpu: bool = True, rocm: str | None = None) -> None:
        spec = importlib.machinery.ModuleSpec("triton", None) if triton else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: spec if name == "triton" else find(name)
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.version, "hip", rocm)

    return has


def test_auto_takes_it_for_tensors_of_a_gpu_and_says_how_it_launches(machine: Any) -> None:
    machine()
    facts = backends.choose("auto", CUDA)
    assert (facts.backend, facts.two_sweep) == ("triton", True)
    assert facts.why == "auto on cuda: persistent launch, one launch for all tensors"
    assert backends.choose("triton", CUDA).why == "asked for"


def test_auto_takes_it_for_parts_of_distributed_parameters_too(machine: Any) -> None:
    machine()
    assert backends.choose("auto", CUDA, Sharing.PARTS).backend == "triton"


@pytest.mark.parametrize("sharing", [Sharing.ROUNDED, Sharing.SCATTERED], ids=str)
def test_what_it_does_not_step_of_them_is_refused_by_name(machine: Any, sharing: Sharing) -> None:
    machine()
    with pytest.raises(RuntimeError, match=f"triton backend does not step {sharing.value}"):
        backends.choose("triton", CUDA, sharing)
    with pytest.warns(RuntimeWarning, match=f"triton backend does not step {sharing.value}"):
        assert backends.choose("auto", CUDA, sharing).backend == "reference"


def test_amd_takes_the_other_launch_form_unless_told(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(rocm="6.4")
    assert "phases launch, not measured on AMD yet" in backends.choose("auto", CUDA).why
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, "persistent")
    assert "persistent launch, asked for" in backends.choose("auto", CUDA).why


@pytest.mark.parametrize(
    ("lacks", "reason"), [({"triton": False}, NO_TRITON), ({"gpu": False}, NO_GPU)]
)
def test_an_explicit_request_is_refused_with_the_reason(
    lacks: dict[str, bool], reason: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(**lacks)
    assert reason in str(backends.availability()["triton"])
    for device in (CPU, CUDA):
        with pytest.raises(RuntimeError, match=f"'triton' was asked for, but .*{reason}"):
            backends.choose("triton", device)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match="on cuda are stepped by the reference"):
        facts = backends.choose("auto", CUDA)
    assert facts.backend == "reference"
    assert reason in facts.why


def test_tensors_of_a_cpu_are_refused_where_there_is_a_gpu(machine: Any) -> None:
    machine()
    with pytest.raises(RuntimeError, match="the triton backend does not step tensors on cpu"):
        backends.choose("triton", CPU)
    assert backends.choose("auto", CPU).backend != "triton"


@pytest.mark.parametrize("form", LAUNCHES)
def test_a_launch_form_that_was_asked_for_is_used(
    form: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, form)
    machine()
    assert backends.choose("auto", CUDA).why == f"auto on cuda: {form} launch, asked for"


def test_a_launch_form_asks_for_triton_which_is_then_not_replaced(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, "phases")
    machine(triton=False)
    with pytest.raises(RuntimeError, match=f"{LAUNCH_ENVIRONMENT} asks for .*{NO_TRITON}"):
        backends.choose("auto", CUDA)
    assert backends.choose("auto", CPU).backend != "triton"  # which it has nothing to say about


@pytest.mark.parametrize("request_", ["auto", "triton"])
def test_an_unknown_launch_form_is_refused(
    request_: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_ENVIRONMENT, "presistent")
    machine()
    with pytest.raises(RuntimeError, match="must be one of persistent, phases, got 'presistent'"):
        backends.choose(request_, CUDA)


def test_the_interpreter_steps_tensors_of_a_cpu_only(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.INTERPRETER_ENVIRONMENT, "1")
    machine(gpu=False)
    assert backends.choose("auto", CPU).why.endswith(", interpreted")
    with pytest.raises(RuntimeError, match="the triton backend does not step tensors on cuda"):
        backends.choose("triton", CUDA)
    machine(triton=False, gpu=False)
    assert backends.choose("auto", CPU).backend != "triton"


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirror_is_refused_with_the_reason(mirrored: bool) -> None:
    """What it steps is on the device already; nothing of that is written to the host."""
    param = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = Adafactor([param])
    rule = optimizer._rule(optimizer.param_groups[0])
    mirror = torch.ones(4, 6) if mirrored else None
    found = backend.obstacle(spec_of(TensorId(0, 0, None), param, param, rule, mirror=mirror))
    assert (found is not None) == mirrored
    assert found is None or "mirror" in found
