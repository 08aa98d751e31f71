"""The CUDA library compiled for GPUs that are not here: what the compiler makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fused_adafactor import building, ptx
from fused_adafactor.__main__ import main
from fused_adafactor.cli import cuda_library


@pytest.mark.parametrize(
    ("text", "widest"),
    [
        ("ld.global.b32 %r1, [%rd1];", 4),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("@%p1 ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", 16),
        ("ld.global.v8.b32 { %r1 }, [ %rd3 + 0 ];", 32),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;", 8),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("st.shared.v4.b32 [ %r1 ], { %r1, %r2, %r3, %r4 };", 0),
        ("ld.global.gpu.acquire.b32 %r1, [%rd1];", 4),
    ],
)
def test_reads_accesses_of_ptx(text: str, widest: int) -> None:
    assert max(ptx.accesses(text), default=0) == widest


PTX = """
.func sums_declared(.param .b64 a);
.visible .entry kernel(
    .param .align 8 .b8 kernel_param_0[136]
)
{
    ld.param.u64 %rd1, [kernel_param_0];
    ld.global.nc.v2.u32 {%r1, %r2}, [%rd1];
    st.shared.v4.f32 [%r3], {%f1, %f2, %f3, %f4};
}
.func  (.param .b32 func_retval0) sums(
    .param .b64 a
)
{
    ld.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
}
.weak .func nothing(
{
    ld.local.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
}
"""
LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 96 bytes smem
ptxas info    : Function properties for sums
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


def test_tells_the_functions_of_a_kernel_apart() -> None:
    assert ptx.widest_accesses(PTX) == {"sums_declared": 0, "kernel": 8, "sums": 16, "nothing": 0}
    assert list(cuda_library.resources_of(LOG)) == [
        ("first", 40, 96, 0),
        ("sums", 40, 96, 12),
        ("second", 24, 0, 0),
    ]


@pytest.mark.slow
@pytest.mark.skipif(building.nvcc_path() is None, reason="there is no nvcc here")
def test_no_spills_and_wide_accesses(capsys: pytest.CaptureFixture[str]) -> None:
    """It takes a while, so only once: what is asked of the record is asked here too."""
    status = main(["codegen", "--backend", "cuda", "--json", "--target", "sm_90"])
    printed = capsys.readouterr()
    kernels = json.loads(printed.out)["kernels"]
    assert {kernel["target"] for kernel in kernels} == {"sm_90"}
    assert all(0 < kernel["registers"] <= 255 for kernel in kernels)
    streaming = [kernel["kernel"] for kernel in kernels if kernel["streaming"]]
    for sweep in ("sum_lines", "sum_flat", "measure_lines", "apply_lines", "apply_flat"):
        assert any(sweep in name for name in streaming), sweep
    assert status == 0, printed.err


def test_says_that_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "nvcc_path", lambda: None)
    assert main(["codegen", "--backend", "cuda"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err


def test_says_what_the_compiler_does_not_know_and_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" != --list-gpu-arch ] || exec echo compute_90\n'
        '[ "$1" != --version ] || exec echo 1\necho "error: no such thing" >&2\nexit 2\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(["codegen", "--backend", "cuda", "--target", "sm_80"]) == 1
    assert "does not compile for sm_80" in capsys.readouterr().err
    assert main(["codegen", "--backend", "cuda", "--target", "sm_90"]) == 1
    assert "library for sm_90: error: no such thing" in capsys.readouterr().err
    assert main(["codegen", "--backend", "cuda", "--target", "gfx942"]) == 2
    assert "sm_80, sm_90, sm_100, sm_120, got 'gfx942'" in capsys.readouterr().err
