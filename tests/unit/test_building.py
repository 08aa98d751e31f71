"""Native libraries that are built on demand: what is compiled when, and whose cache is trusted."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fused_adafactor import building
from fused_adafactor.__main__ import main
from fused_adafactor.backends import cuda

ROOT = Path(__file__).parents[2]
# Writes down what it is asked for, and links a file that carries the build id.
COMPILER = r"""#!/usr/bin/env bash
case "$1" in
  --version) echo "a compiler, version ${FAKE_VERSION:-1}"; exit ;;
  --list-gpu-arch) printf 'compute_80\ncompute_90\ncompute_100\n'; exit ;;
esac
echo "$@" >> "$(dirname "$0")/calls"
[ -z "$FAKE_FAILS" ] || { echo "no such thing" >&2; exit 3; }
for last; do :; done
echo "made of $*" > "$last"
id="$(grep -o 'build-id=0x[0-9a-f]*' <<< "$*" | cut -d x -f 2)"
[ -z "$id" ] || printf "$(sed 's/../\\x&/g' <<< "$id")" >> "$last"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a compiler, sources, a package without libraries, and an empty cache."""
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    for path, text in (
        (compiler, COMPILER),
        (tmp_path / "csrc" / "include" / "fused_adafactor" / "fields.h", "// fields"),
        (tmp_path / "csrc" / "cuda" / "step.cu", "// kernel"),
        (tmp_path / "csrc" / "cuda" / "other.cu", "// another"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    compiler.chmod(0o755)
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(building, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv(building.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.delenv(building.ARCHS_ENVIRONMENT, raising=False)
    building.source_hash.cache_clear()
    return tmp_path


@pytest.fixture
def calls(folder: Path) -> Callable[[], list[str]]:
    """What the compiler has been asked for since this was last asked for."""
    log = folder / "cuda" / "bin" / "calls"

    def read() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return read


def build(**options: object) -> Path:
    return building.build_into_cache("cuda", **options)


def test_builds_once_into_a_folder_of_ones_own(calls: Callable[[], list[str]]) -> None:
    with pytest.raises(FileNotFoundError):
        building.find_library("cuda")
    library = build()
    assert building.find_library("cuda") == library
    for path in (library.parent, library.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {path.name for path in library.parent.iterdir()} == {library.name, "lock"}
    assert len(calls()) == 3  # two objects, and the library
    assert build() == library
    assert calls() == []
    assert build(force=True) == library
    assert len(calls()) == 3


def test_builds_again_where_it_would_come_out_different(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build()
    before = library.read_bytes()
    monkeypatch.setenv("FAKE_VERSION", "2")
    calls()
    assert build() == library
    assert len(calls()) == 3
    assert library.read_bytes() != before


def test_libraries_of_several_architectures_lie_side_by_side(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines with different GPUs need them that share a home directory."""
    libraries = {}
    for asked in ("80", "90", "90,80"):
        monkeypatch.setenv(building.ARCHS_ENVIRONMENT, asked)
        libraries[asked] = build()
    assert len(set(libraries.values())) == 3
    calls()
    for asked, library in libraries.items():
        monkeypatch.setenv(building.ARCHS_ENVIRONMENT, asked)
        assert building.find_library("cuda") == build() == library
    assert calls() == []
    monkeypatch.setenv(building.ARCHS_ENVIRONMENT, "80 90")
    assert building.find_library("cuda") == libraries["90,80"]
    monkeypatch.setenv(building.ARCHS_ENVIRONMENT, "100")
    with pytest.raises(FileNotFoundError):
        building.find_library("cuda")
    monkeypatch.delenv(building.ARCHS_ENVIRONMENT)
    os.utime(libraries["90"].parent, (2e9, 2e9))  # nobody says which: the last one
    assert building.find_library("cuda") == libraries["90"]
    everything = build()
    assert building.find_library("cuda") == everything
    assert everything not in libraries.values()


def test_nothing_is_loaded_where_nobody_can_tell_whose_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = build()
    monkeypatch.delattr(os, "getuid")  # as on Windows
    with pytest.raises(PermissionError, match=f"nobody can tell whose {library.parent.parent} is"):
        building.find_library("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(cuda.LIBRARY_ENVIRONMENT, raising=False)
    cuda.library.cache_clear()
    assert "nobody can tell whose" in str(cuda.missing())


def test_other_sources_have_another_place(folder: Path) -> None:
    first = build()
    (folder / "csrc" / "include" / "fused_adafactor" / "fields.h").write_text("// others")
    building.source_hash.cache_clear()
    with pytest.raises(FileNotFoundError):
        building.find_library("cuda")
    assert build() != first


def test_a_build_that_fails_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = build()
    before = library.read_bytes()
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(subprocess.CalledProcessError):
        build(force=True)
    assert "no such thing" in capfd.readouterr().err  # the compiler says so itself
    assert library.read_bytes() == before
    assert {path.name for path in library.parent.iterdir()} == {library.name, "lock"}


def test_what_a_killed_build_left_behind_is_cleared_away() -> None:
    library = build()
    left = library.parent / "building-killed"
    left.mkdir()
    (left / "step.o").touch()
    build(force=True)
    assert not left.exists()


def test_waits_for_another_build_but_not_for_ever() -> None:
    library = build()
    with open(library.parent / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = time.monotonic()
        with pytest.raises(TimeoutError, match=r"another process .* holds .*lock"):
            build(patience=0.3)
        assert 0.3 <= time.monotonic() - before < 5.0
    assert build(patience=0.0) == library


def test_who_is_killed_gives_the_lock_back(folder: Path) -> None:
    library = build()
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX)"
    script += "; print(flush=True); time.sleep(60)"
    lock = str(library.parent / "lock")
    with subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TimeoutError):
            build(patience=0.0)
        other.kill()
    assert build(patience=5.0) == library


@pytest.mark.parametrize("which", ["cache", "folder", "library"])
@pytest.mark.parametrize("wrong", ["owner", "writable", "link"])
def test_nothing_is_loaded_that_others_could_have_put_there(
    which: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build()
    path = {"cache": library.parent.parent, "folder": library.parent, "library": library}[which]
    if wrong == "owner":
        lstat = Path.lstat
        others = os.stat_result((*path.lstat()[:4], os.getuid() + 1, *path.lstat()[5:]))
        monkeypatch.setattr(Path, "lstat", lambda p: others if p == path else lstat(p))
        told = "not this user's own"
    elif wrong == "writable":
        path.chmod(0o777)
        told = "others can write to"
    else:
        moved = path.rename(folder / "elsewhere")
        path.symlink_to(moved)
        told = "not this user's own"
    with pytest.raises(PermissionError, match=told):
        building.find_library("cuda")
    if which != "library":
        with pytest.raises(PermissionError, match=told):
            build(force=True)


def test_what_was_installed_is_taken_before_what_is_in_the_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = build()
    installed = folder / "package" / library.name
    installed.touch()
    assert building.find_library("cuda") == installed
    assert main(["build"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{library}\n"
    assert f"{installed}, which was installed" in printed.err


def test_compiles_for_what_the_compiler_knows_with_ptx_of_both_ends(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    for call in calls():
        built = [word for word in call.split() if "gencode" in word]
        assert built == [  # this one knows no sm_120
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)),
            "-gencode=arch=compute_80,code=compute_80",
            "-gencode=arch=compute_100,code=compute_100",
        ]
    monkeypatch.setenv(building.ARCHS_ENVIRONMENT, "90, 80")
    build()
    for call in calls():
        assert "code=sm_80" in call
        assert "code=compute_90" in call
        assert "100" not in call.partition("build-id")[0]


@pytest.mark.parametrize("asked", ["120", "sm_90", "80,none"])
def test_an_architecture_that_the_compiler_does_not_know_is_refused(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(building.ARCHS_ENVIRONMENT, asked)
    assert main(["build"]) == 1
    assert f"(80, 90, 100), got {asked.split(',')[-1]!r}" in capsys.readouterr().err


def test_says_what_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "nvcc_path", lambda: None)
    assert main(["build"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err
    monkeypatch.setattr(building, "PACKAGE", folder / "nowhere" / "package")
    assert main(["build"]) == 1
    assert "the sources are neither in" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        building.find_library("cuda")


def test_a_compiler_that_fails_makes_the_command_fail(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    assert main(["build"]) == 1
    assert "nvcc failed; what it said is above" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "fails", "status"),
    [("auto", True, 0), ("1", True, 1), ("cpp", True, 1), ("0", True, 0), ("cpp", False, 0)],
)
def test_an_installation_goes_without_a_library_unless_told(
    wanted: str, fails: bool, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of other sources that was there before does not pass for the one that failed."""
    compiler = folder / "cuda" / "bin" / "nvcc"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FUSED_ADAFACTOR_BUILD", wanted)
    if fails:
        monkeypatch.setenv("FAKE_FAILS", "1")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "built")]
    command += ["--build-temp", str(folder / "objects")]
    old = folder / "built" / "fused_adafactor" / building.LIBRARIES["cpp"]
    if wanted != "0":
        old.parent.mkdir(parents=True)
        old.write_text("of other sources")
    process = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == status, process.stderr
    made = {path.name for path in (folder / "built").rglob("*.so")}
    assert made == (set() if fails else {building.LIBRARIES["cpp"]})


def test_an_installation_does_not_build_twice(
    folder: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(folder / "cuda" / "bin" / "nvcc"))
    monkeypatch.setenv("FUSED_ADAFACTOR_BUILD", "cpp")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "built")]
    command += ["--build-temp", str(folder / "objects")]
    counts = []
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True)
        counts.append(len(calls()))
    assert counts[0] >= 2
    assert counts[1] == 0
