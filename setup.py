"""Builds the native CPU library from csrc/ where a C++ compiler is found.

The library has a plain C interface: no header of torch or Python goes into it, so it is built in an
ordinary isolated environment, and one wheel serves every Python and every torch.
Without a compiler the package installs without it, and `python -m fused_adafactor info` says so.
FUSED_ADAFACTOR_BUILD=1 makes a failing build an error, =0 leaves the library out.
FUSED_ADAFACTOR_CXXFLAGS are added to the compiler's flags and to the linker's: `make test-asan`
puts its sanitizers there.
"""

import os
import platform
import shlex
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "libfused_adafactor.so"
CPU = Path("csrc/cpu")
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Icsrc/include"),
    # Contraction to fused multiply-adds is what the kernels are written for; errno and traps only
    # keep the loops from being vectorised.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


def builds() -> dict[str, list[str]]:
    """Instruction sets of kernels.cpp, by namespace, with the flags of each."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"portable": []}
    fma = ["-mfma", "-mf16c"]
    return {
        "portable": [],
        "avx2": ["-mavx2", *fma],
        "avx512": [*AVX512, *fma],
        "avx512bf16": [*AVX512, "-mavx512bf16", *fma],
    }


class BuildNative(build_ext):
    """Compile csrc/cpu into one shared library beside the package."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Where the library goes; it is loaded by ctypes, so its name is not a module's."""
        return str(Path(*ext_name.split(".")).parent / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Build it, or go on without it."""
        wanted = os.environ.get("FUSED_ADAFACTOR_BUILD", "auto")
        if wanted == "0":
            return
        try:
            self.compile(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            print(f"fused_adafactor: no native library ({error}); the reference backend remains")

    def compile(self, library: Path) -> None:
        """Run the compiler once for each instruction set, and link."""
        compiler = os.environ.get("CXX", "c++")
        extra = shlex.split(os.environ.get("FUSED_ADAFACTOR_CXXFLAGS", ""))
        objects = Path(self.build_temp)
        for folder in (objects, library.parent):
            folder.mkdir(parents=True, exist_ok=True)
        x86 = ["-DFA_X86"] if len(builds()) > 1 else []
        sources = {
            str(objects / f"kernels_{name}.o"): [
                str(CPU / "kernels.cpp"),
                f"-DFA_ISA={name}",
                *flags,
            ]
            for name, flags in builds().items()
        }
        sources[str(objects / "step.o")] = [str(CPU / "step.cpp")]
        commands = [
            [compiler, *FLAGS, *x86, *extra, "-c", *source, "-o", made]
            for made, source in sources.items()
        ]
        # Side by side: they are most of the time that an installation takes.
        running = [subprocess.Popen(command) for command in commands]
        for process, command in zip(running, commands, strict=True):
            if process.wait() != 0:
                raise subprocess.CalledProcessError(process.returncode, command)
        # Moved into place whole: a process that has the old one loaded keeps it.
        fresh = library.with_suffix(".new")
        link = [compiler, "-shared", "-fopenmp", *extra, *sources, "-o", str(fresh)]
        subprocess.run(link, check=True)
        fresh.replace(library)


class PlatformWheel(bdist_wheel):
    """A wheel of any Python: of this platform with the library in it, of any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """Decide by what was built."""
        _, _, here = super().get_tag()
        built = any(Path(self.bdist_dir).rglob(LIBRARY))
        return "py3", "none", here if built else "any"


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fused_adafactor.library", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
