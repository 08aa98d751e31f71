"""The native libraries: what each is built from, where it is looked for, and the private cache.

Nothing but the standard library is imported, and nothing of the package: ``setup.py`` loads this
file by itself, where torch is not installed. Nothing is built when the package is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = {"cpp": "libfused_adafactor.so", "cuda": "libfused_adafactor_cuda.so"}
_FOLDERS = {"cpp": "cpu", "cuda": "cuda"}  # of the sources

COMPILER_ENVIRONMENT = "CXX"
FLAGS_ENVIRONMENT = "FUSED_ADAFACTOR_CXXFLAGS"  # for the compiler and the linker of C++
ARCHS_ENVIRONMENT = "FUSED_ADAFACTOR_CUDA_ARCHS"  # "90" or "80,90", say
CACHE_ENVIRONMENT = "XDG_CACHE_HOME"

CPP_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    # Contraction to fused multiply-adds is what the kernels are written for; errno and traps only
    # keep the loops from being vectorised.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
CUDA_FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    # Where a * b + c is one operation, a formula says so.
    "-fmad=false",
)
CUDA_ARCHS = (80, 90, 100, 120)

# Seconds that a build waits for another one of the same library.
PATIENCE = 600.0


class CannotBuild(Exception):
    """There is no compiler here, or no sources, or it was told what it does not understand."""


@dataclass(frozen=True)
class Recipe:
    """How a library is built.

    Attributes:
        backend: That it is of.
        compiler: With the arguments of every call.
        objects: Arguments for each object file, by its name.
        link: Arguments that make a library of them.
        at_a_time: Compilers.
        build_id: Of the compiler's version, its arguments and the sources; the library carries it.
    """

    backend: str
    compiler: tuple[str, ...]
    objects: Mapping[str, Sequence[str]]
    link: Sequence[str]
    at_a_time: int
    build_id: str


# --- what a library is built from ----------------------------------------------------------------


def sources() -> Path:
    """The folder of the sources: in the package as it is installed, or beside it in its tree.

    Raises:
        CannotBuild: They are nowhere.
    """
    for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc"):
        if (folder / "include" / "fused_adafactor").is_dir():
            return folder
    raise CannotBuild(f"the sources are neither in {PACKAGE} nor beside it")


def recipe_of(backend: str) -> Recipe:
    """How the library of a backend is built on this machine.

    Raises:
        CannotBuild: There is no compiler for it, or no sources.
    """
    return _cpp_recipe(sources()) if backend == "cpp" else cuda_recipe()


def _cpp_recipe(folder: Path) -> Recipe:
    compiler = shlex.split(os.environ.get(COMPILER_ENVIRONMENT) or "c++")
    if shutil.which(compiler[0]) is None:
        raise CannotBuild(f"there is no C++ compiler {compiler[0]!r} ({COMPILER_ENVIRONMENT})")
    extra = shlex.split(os.environ.get(FLAGS_ENVIRONMENT, ""))
    builds = _instruction_sets()
    flags = [*CPP_FLAGS, f"-I{folder / 'include'}", *(["-DFA_X86"] if len(builds) > 1 else [])]
    kernels = str(folder / "cpu" / "kernels.cpp")
    objects = {
        f"kernels_{name}": [*flags, *extra, "-c", kernels, f"-DFA_ISA={name}", *its]
        for name, its in builds.items()
    }
    for name in ("step", "layouts"):
        objects[name] = [*flags, *extra, "-c", str(folder / "cpu" / f"{name}.cpp")]
    # All side by side: they are most of the time that an installation takes.
    link = ["-shared", "-fopenmp", *extra]
    return _recipe("cpp", compiler, objects, link, len(objects), folder)


def _instruction_sets() -> dict[str, list[str]]:
    """Instruction sets of kernels.cpp, by namespace, with the flags of each."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": []}
    fma = ["-mfma", "-mf16c"]
    return {
        "portable": [],
        "avx2": ["-mavx2", *fma],
        "avx512": [*_AVX512, *fma],
        "avx512bf16": [*_AVX512, "-mavx512bf16", *fma],
    }


def cuda_recipe(archs: Sequence[int] | None = None, extra: Sequence[str] = ()) -> Recipe:
    """How the library for GPUs is built.

    Args:
        archs: What for, oldest first; None for what ``cuda_archs`` says.
        extra: More arguments of nvcc.

    Raises:
        CannotBuild: There is no compiler for it, or no sources.
    """
    folder, nvcc = sources(), nvcc_path()
    if nvcc is None:
        raise CannotBuild("there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    units = sorted((folder / "cuda").glob("*.cu"))
    if not units:
        raise CannotBuild(f"there are no kernels in {folder / 'cuda'}")
    archs = cuda_archs(nvcc) if archs is None else archs
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # PTX of the newest for those that come after it, and of the oldest for all between.
    targets += [
        f"-gencode=arch=compute_{arch},code=compute_{arch}"
        for arch in sorted({archs[0], archs[-1]})
    ]
    cores = os.cpu_count() or 1
    at_a_time = min(cores, len(units))
    flags = [*CUDA_FLAGS, f"-I{folder / 'include'}", f"--threads={max(1, cores // at_a_time)}"]
    objects = {unit.stem: [*targets, *flags, *extra, "-c", str(unit)] for unit in units}
    # Linked with all that it needs of CUDA: it goes with any torch, and loads without a driver.
    link = ["-shared", "-cudart=static", *targets]
    return _recipe("cuda", [str(nvcc)], objects, link, at_a_time, folder)


def nvcc_path() -> Path | None:
    """CUDA's compiler, or None."""
    places = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [Path(place, "bin", "nvcc") for place in places if place]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in found if os.access(path, os.X_OK)), None)


def known_archs(nvcc: Path) -> set[int]:
    """What nvcc compiles for."""
    command = [str(nvcc), "--list-gpu-arch"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(word[8:]) for word in listed.split() if word[8:].isdigit()}


def cuda_archs(nvcc: Path) -> list[int]:
    """What is compiled for: of ``CUDA_ARCHS`` what nvcc knows, or what the environment asks for.

    Raises:
        CannotBuild: It asks for what nvcc does not know, or nvcc knows none.
    """
    known = known_archs(nvcc)
    asked = _asked_archs()
    if not asked:
        archs = [arch for arch in CUDA_ARCHS if arch in known]
        if not archs:
            raise CannotBuild(f"{nvcc} compiles for none of {', '.join(map(str, CUDA_ARCHS))}")
        return archs
    unknown = [word for word in asked if not word.isdigit() or int(word) not in known]
    if unknown:
        raise CannotBuild(
            f"{ARCHS_ENVIRONMENT} must name architectures that {nvcc} compiles for "
            f"({', '.join(map(str, sorted(known)))}), got {unknown[0]!r}"
        )
    return sorted({int(word) for word in asked})


def _asked_archs() -> list[str]:
    """What the environment asks for."""
    return os.environ.get(ARCHS_ENVIRONMENT, "").replace(",", " ").split()


def _recipe(
    backend: str,
    compiler: Sequence[str],
    objects: Mapping[str, Sequence[str]],
    link: Sequence[str],
    at_a_time: int,
    folder: Path,
) -> Recipe:
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version)
    for command in (compiler, *objects.values(), link):
        # Wherever the sources lie, and however many compilers run.
        words = (w.replace(str(folder), "") for w in command if not w.startswith("--threads"))
        digest.update("\0".join(words).encode() + b"\n")
    digest.update(source_hash(backend, folder).encode())
    build_id = digest.hexdigest()[:32]
    if sys.platform == "linux":  # elsewhere it is always built anew
        link = [*link, f"{'-Xlinker=' if backend == 'cuda' else '-Wl,'}--build-id=0x{build_id}"]
    return Recipe(backend, tuple(compiler), objects, link, at_a_time, build_id)


@functools.cache
def source_hash(backend: str, folder: Path) -> str:
    """Of all files that a library is made of: their names and contents."""
    digest = hashlib.sha256()
    for part in (folder / "include" / "fused_adafactor", folder / _FOLDERS[backend]):
        for path in sorted(path for path in part.iterdir() if path.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# --- building ------------------------------------------------------------------------------------


def is_current(recipe: Recipe, library: Path) -> bool:
    """Whether a library is what the recipe would make."""
    try:
        return bytes.fromhex(recipe.build_id) in library.read_bytes()
    except OSError:
        return False


def compile_library(
    recipe: Recipe, library: Path, objects: Path, log: IO[str] | None = None
) -> None:
    """Compile a library, and move it into place whole: who has the old one loaded keeps it.

    Args:
        recipe: How.
        library: To write, or to replace.
        objects: A folder for what is made on the way.
        log: A file for what the compilers say; None for where this process says it.

    Raises:
        OSError: A compiler cannot be started, or a folder cannot be written to.
        subprocess.CalledProcessError: A compiler failed, and has said why.
    """
    for folder in (objects, library.parent):
        folder.mkdir(parents=True, exist_ok=True)
    made = {name: str(objects / f"{name}.o") for name in recipe.objects}
    commands = [
        [*recipe.compiler, *arguments, "-o", made[name]]
        for name, arguments in recipe.objects.items()
    ]
    with ThreadPoolExecutor(recipe.at_a_time) as pool:
        list(pool.map(functools.partial(_run, log=log), commands))
    fresh = library.with_suffix(".new")
    command = [*recipe.compiler, *recipe.link, *made.values(), "-o", str(fresh)]
    _run(command, log)
    fresh.replace(library)


def _run(command: Sequence[str], log: IO[str] | None) -> None:
    subprocess.run(command, check=True, stdout=log, stderr=log)


# --- finding -------------------------------------------------------------------------------------


def find_library(backend: str) -> Path:
    """The library beside the package, or else in the cache.

    Raises:
        FileNotFoundError: It was not built.
        PermissionError: The one in the cache may be somebody else's.
    """
    installed = PACKAGE / LIBRARIES[backend]
    if installed.exists():
        return installed
    try:
        folder = cache_folder(backend)
    except CannotBuild as error:
        raise FileNotFoundError(str(error)) from error
    if backend == "cuda" and not _asked_archs() and not folder.exists():
        # Nobody says which ones, so those that were asked for last when one was built.
        others = folder.parent.glob(f"{folder.name}-*")
        folder = max(others, key=lambda path: path.lstat().st_mtime, default=folder)
    for path in (folder.parent, folder, folder / LIBRARIES[backend]):
        _check_owner(path)
    return folder / LIBRARIES[backend]


def load_library(path: Path, version_call: str, version: int) -> ctypes.CDLL:
    """Load a library that has the version of its interface that is expected.

    Raises:
        OSError: It cannot be loaded.
        RuntimeError: It was built for another version of this package, or is something else.
    """
    library = ctypes.CDLL(str(path))
    try:
        found = library[version_call]()
    except AttributeError as error:
        raise RuntimeError(f"{path.name} has no {version_call}: it is another library") from error
    if found != version:
        raise RuntimeError(f"{path.name} has ABI version {found}, expected {version}; reinstall")
    return library


def cache_folder(backend: str) -> Path:
    """Where the library of a backend is built on demand.

    By machine and sources, so it is never stale, and by the architectures that are asked for, so
    machines with different GPUs may share a home directory.

    Raises:
        CannotBuild: There is no home directory, or there are no sources.
    """
    given = os.environ.get(CACHE_ENVIRONMENT, "")
    if given.startswith("/"):  # others are to be ignored
        root = Path(given)
    else:
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise CannotBuild(f"{error}; set {CACHE_ENVIRONMENT}") from error
    name = f"{backend}-{platform.machine()}-{source_hash(backend, sources())[:16]}"
    if backend == "cuda":
        archs = sorted({int(word) for word in _asked_archs() if word.isdecimal()})
        name = "-".join([name, *map(str, archs)])
    return root / "fused_adafactor" / name


def _check_owner(path: Path) -> None:
    """Refuse what somebody else could have put there: a library that is loaded runs.

    Raises:
        FileNotFoundError: It is not there.
        PermissionError: It is not ours alone, or that cannot be told.
    """
    status = path.lstat()
    if not hasattr(os, "getuid"):  # on Windows
        raise PermissionError(f"nobody can tell whose {path} is, so nothing is loaded from there")
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{path} is not this user's own, so nothing is loaded from there")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError(f"others can write to {path}, so nothing is loaded from there")


# --- building on demand --------------------------------------------------------------------------


def build_into_cache(backend: str, force: bool = False, patience: float = PATIENCE) -> Path:
    """Build the library of a backend into the private cache, unless it is there.

    Args:
        backend: ``cpp`` or ``cuda``.
        force: Build it in any case.
        patience: Seconds to wait for another build of it.

    Returns:
        Where it is.

    Raises:
        CannotBuild: There is no compiler for it, or no sources.
        PermissionError: The cache is somebody else's.
        TimeoutError: Another build of it did not end.
        OSError: The cache cannot be written to.
        subprocess.CalledProcessError: A compiler failed, and has said why.
    """
    recipe = recipe_of(backend)
    folder = cache_folder(backend)
    library = folder / LIBRARIES[backend]
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for private in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        _check_owner(private)
    with _locked(folder / "lock", patience):
        if force or not is_current(recipe, library):
            for old in folder.glob("building-*"):  # of one that was killed
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as objects:
                _build_privately(recipe, library, Path(objects))
    return library


def _build_privately(recipe: Recipe, library: Path, objects: Path) -> None:
    """Compile beside it, so that a build that is cut off leaves the library as it was."""
    made = objects / library.name
    compile_library(recipe, made, objects)
    made.chmod(0o700)
    made.replace(library)


@contextlib.contextmanager
def _locked(path: Path, patience: float) -> Iterator[None]:
    """Hold a lock, which a process that ends, or is killed, gives back.

    Raises:
        TimeoutError: Another process holds it.
    """
    import fcntl

    until = time.monotonic() + patience
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() >= until:
                raise TimeoutError(
                    f"another process has been building for {patience:g} s; it holds {path}"
                )
            time.sleep(0.1)
        yield
