"""Kernels compiled for GPUs that are not here: what the compiler makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from fused_adafactor.__main__ import main
from fused_adafactor.backends.triton import interprets, offline
from fused_adafactor.cli import codegen
from fused_adafactor.cli.kernel_cases import MODEL, RULES, TENSORS, all_cases, default_cases

if interprets():
    pytest.skip("needs kernels that are compiled, not interpreted", allow_module_level=True)

# Each with much in it. `make codegen` compiles the rest, which takes minutes.
COMPILED = [
    ("torch/defaults bfloat16 model persistent", "sm_90"),
    ("keras/accumulated_average bfloat16 model persistent", "sm_90"),
    ("adafactor_pytorch/amsgrad float32 model persistent", "sm_80"),
    ("torch/defaults float32 model phases", "sm_80"),
    ("torch/defaults bfloat16 long_lines phases", "sm_90"),
    ("torch/defaults bfloat16 tiny_matrices phases", "sm_90"),
    ("torch/bfloat16_state bfloat16 tiny_matrices persistent", "sm_90"),
    ("adafactor_pytorch/bfloat16_state bfloat16 model persistent", "sm_90"),
    ("torch/stochastic bfloat16 model persistent split:rows", "sm_90"),
    ("torch/bfloat16_state bfloat16 tiny_matrices persistent split:rows", "sm_90"),
    ("adafactor_pytorch/defaults bfloat16 model phases", "gfx942"),
    ("torch/defaults bfloat16 small_lines phases", "gfx942"),
]


def work_named(name: str, target: str) -> list[codegen.Work]:
    found = {case: (target,) for case in default_cases() if str(case) == name}
    assert found, f"there is no case {name}"
    return codegen.work_of(found, [target])


@pytest.fixture(scope="module")
def default_work() -> list[codegen.Work]:
    return codegen.work_of(default_cases(), list(codegen.TARGETS["triton"]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), COMPILED, ids=str)
def test_no_spills_and_wide_accesses(name: str, target: str) -> None:
    faults = []
    for work in work_named(name, target):
        kernel = codegen.compile_one(work)
        assert isinstance(kernel, codegen.Kernel), kernel
        faults += [f"{kernel.kernel} {fault}" for fault in kernel.faults()]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_target_does_not_change_what_is_made_for_another() -> None:
    """Sweeps are called on NVIDIA and inlined on AMD, also where one process compiles for both."""
    name = "adafactor_pytorch/defaults bfloat16 model phases"
    (first,) = [work for work in work_named(name, "sm_90") if "apply" in work.name]
    made = []
    for target in ("sm_90", "gfx942", "sm_90"):
        kernel = codegen.compile_one(replace(first, target=target))
        assert isinstance(kernel, codegen.Kernel), kernel
        made.append(replace(kernel, seconds=0.0))
    assert made[0] == made[2]
    assert made[1].spill_bytes == 0


def test_json_is_one_record(capsys: pytest.CaptureFixture[str]) -> None:
    match = "torch/defaults bfloat16 vectors phases"
    status = main(["codegen", "--json", "--match", match, "--target", "sm_90", "--jobs", "1"])
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert len(kernels) == 4  # one for what a program steps in one go, and one for each phase
    for kernel in kernels:
        assert kernel["kernel"].startswith(match)
        assert kernel["target"] == "sm_90"
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared_bytes"] <= codegen.SHARED_BYTES["sm_90"]
    sweeps = [kernel for kernel in kernels if "finalize" not in kernel["kernel"]]
    assert all(kernel["streaming"] for kernel in sweeps)
    assert all(kernel["widest_access_bytes"] >= 16 for kernel in sweeps)
    assert status == int(any(kernel["spill_bytes"] for kernel in kernels))


def test_refuses_a_target_that_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codegen", "--target", "sm_10"]) == 2
    assert "sm_80, sm_90, sm_100, gfx942, got 'sm_10'" in capsys.readouterr().err


def test_says_that_interpreted_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["codegen"]) == 1
    assert "unset it" in capsys.readouterr().err


def test_fails_where_a_kernel_is_not_as_it_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = offline.Report(
        registers=255, shared_bytes=2**20, spill_bytes=8, widest_access_bytes=4, seconds=0.0
    )
    monkeypatch.setattr(offline, "compile_for", lambda source, target: bad)
    match = "torch/defaults bfloat16 vectors persistent"
    assert main(["codegen", "--match", match, "--jobs", "1", "--target", "sm_90"]) == 1
    errors = capsys.readouterr().err
    assert "spills 8 bytes" in errors
    assert "accesses 4 bytes at a time" in errors
    assert "wants 1048576 bytes of shared memory" in errors


def test_every_switch_is_compiled_on_and_off(default_work: list[codegen.Work]) -> None:
    variants = [work.source.variant for work in default_work]
    switches = [name for name, value in variants[0]._asdict().items() if isinstance(value, bool)]
    missed = {n for n in switches if {getattr(v, n) for v in variants} != {False, True}}
    assert missed == {"LONG"}  # no tensor here is that large
    kinds = zip(*(v.KINDS for v in variants), strict=True)
    assert [any(kind) for kind in kinds] == [False, *[True] * 12]  # a CPU's steps a whole tensor
    assert {v.MOMENTUM for v in variants} == {0, 1, 2, 3}
    assert {width for v in variants for width in v.WIDTHS} == {128 << n for n in range(7)}
    assert len({v.PARAM for v in variants}) == len({v.GRAD for v in variants}) == 4


def test_every_dialect_is_compiled_for_every_target() -> None:
    cases = default_cases()
    for target in codegen.TARGETS["triton"]:
        assert {case.dialect for case, targets in cases.items() if target in targets} == set(RULES)


def test_names_tell_kernels_apart(default_work: list[codegen.Work]) -> None:
    pairs = [(work.name, work.target) for work in default_work]
    assert len(pairs) == len(set(pairs))


def test_all_is_more_than_the_default() -> None:
    everything = all_cases()
    assert {case for case in default_cases() if case.possible} <= set(everything)
    assert {case.tensors for case in everything} == set(TENSORS)
    assert MODEL in TENSORS


@pytest.mark.parametrize(
    ("instruction", "widest"),
    [
        ("global_load_dwordx4 v[1:4], v[5:6], off", 16),
        ("buffer_load_dwordx2 v[1:2], v5, s[0:3], 0 offen", 8),
        ("global_store_dword v[1:2], v3, off", 4),
        ("global_store_b128 v[1:2], v[3:6], off", 16),
        ("ds_read_b128 v[1:4], v5", 0),
    ],
)
def test_reads_accesses_of_amd(instruction: str, widest: int) -> None:
    counts = "\n    .private_segment_fixed_size: 12\n    .vgpr_count:     70\n"
    read: Any = offline._amd({"amdgcn": f"  {instruction}\n{counts}"})
    assert read == (70, 12, widest)


def test_what_is_for_one_target_is_compiled_in_the_form_of_that_target() -> None:
    found = {case: its for case, its in default_cases().items() if case.rule == "kahan"}
    for target, form in (("sm_90", "persistent"), ("gfx942", "phases")):
        names = [work.name for work in codegen.work_of(found, [target])]
        assert names
        assert all(f" {form} " in name for name in names)
