"""Builds the native libraries from csrc/: for CPUs with a C++ compiler, for GPUs with CUDA's.

The libraries have plain C interfaces: no header of torch or Python goes into them, so they are
built in an ordinary isolated environment, and one wheel serves every Python and every torch.
Without a compiler the package installs without them, and `python -m fused_adafactor info` says so;
`python -m fused_adafactor build` builds them later, from the sources that are installed with it.
How, and what the environment may ask for, is in fused_adafactor/building.py.

FUSED_ADAFACTOR_BUILD=1 makes a build that fails an error, =0 leaves the libraries out, =cpp or
=cuda builds only that one, or fails. What is there and would come out the same is not built again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# By itself: the package imports torch, which need not be here.
_spec = importlib.util.spec_from_file_location("building", ROOT / "fused_adafactor/building.py")
building = sys.modules["building"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(building)


class BuildNative(build_ext):
    """Build each library beside the package."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Where a library goes; it is loaded by ctypes, so its name is not a module's."""
        *package, backend = ext_name.split(".")
        return str(Path(*package, building.LIBRARIES[backend]))

    def build_extension(self, ext: Extension) -> None:
        """Build it, or go on without it."""
        backend = ext.name.split(".")[-1]
        wanted = os.environ.get("FUSED_ADAFACTOR_BUILD", "auto")
        if wanted not in ("auto", "1", backend):
            return
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        here = building.PACKAGE / library.name
        try:
            recipe = building.recipe_of(backend)
            if building.is_current(recipe, library):
                return
            if building.is_current(recipe, here):  # an editable install builds elsewhere first
                library.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(here, library)
                return
            objects = Path(self.build_temp, backend)
            try:
                building.compile_library(recipe, library, objects)
            except (OSError, subprocess.CalledProcessError):
                # One of other sources that is there must not pass for it.
                for stale in (library, here) if self.editable_mode else (library,):
                    stale.unlink(missing_ok=True)
                raise
        except building.CannotBuild as error:
            # Nobody has nvcc by default, so only who asks for that library has to have it.
            if wanted == backend or (wanted == "1" and backend == "cpp"):
                raise
            print(f"fused_adafactor: no native library for {backend} ({error})")
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted != "auto":
                raise
            print(f"fused_adafactor: no native library for {backend} ({error})")


class WithSources(build_py):
    """The package with the sources of the libraries, for who builds them later."""

    def run(self) -> None:
        """Copy them too; an editable install has them in its tree."""
        super().run()
        if not self.editable_mode:
            there = Path(self.build_lib, "fused_adafactor", "_csrc")
            shutil.rmtree(there, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", there)


class PlatformWheel(bdist_wheel):
    """A wheel of any Python: of this platform with a library in it, of any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """Decide by what was built."""
        _, _, here = super().get_tag()
        names = building.LIBRARIES.values()
        built = any(path.name in names for path in Path(self.bdist_dir).rglob("*.so"))
        return "py3", "none", here if built else "any"


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"fused_adafactor.{backend}", sources=[], optional=True)
            for backend in building.LIBRARIES
        ],
        cmdclass={
            "build_ext": BuildNative,
            "build_py": WithSources,
            "bdist_wheel": PlatformWheel,
        },
    )
