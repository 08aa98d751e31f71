"""Every test here needs the native library, and steps with one of its instruction sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fused_adafactor.backends import cpp

# Each of them by its number; one that this machine has not is skipped, and says so.
EVERY_ISA = list(cpp.ISAS)


@pytest.fixture(autouse=True)
def _native_library() -> None:
    reason = cpp.missing()
    if reason is not None:
        pytest.skip(f"needs the native library: {reason}")


@pytest.fixture(params=EVERY_ISA)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Steps with one instruction set after the other."""
    library = cpp.library()
    before, wanted = library.fused_adafactor_isa(), cpp.ISAS.index(request.param)
    try:
        if library.fused_adafactor_set_isa(wanted) != wanted:
            pytest.skip(f"needs a machine with {request.param}")
        yield request.param
    finally:
        library.fused_adafactor_set_isa(before)
