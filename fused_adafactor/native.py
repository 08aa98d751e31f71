"""The library of C++: which one it is, and that it is ours.

Whoever calls it loads it, and does so when it is first called.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fused_adafactor import building

ABI_VERSION = 10
LIBRARY_ENVIRONMENT = "FUSED_ADAFACTOR_LIBRARY"  # another build, as that of `make test-asan`


def library_path() -> Path:
    """Where it is.

    Raises:
        FileNotFoundError: It was not built.
        PermissionError: The one in the cache may be somebody else's.
    """
    named = os.environ.get(LIBRARY_ENVIRONMENT)
    return Path(named) if named else building.find_library("cpp")


def load_library() -> ctypes.CDLL:
    """Load it, if it is of this version.

    Raises:
        OSError: It is not there or cannot be loaded.
        RuntimeError: It was built for another version of this package.
    """
    return building.load_library(library_path(), "fused_adafactor_abi_version", ABI_VERSION)
