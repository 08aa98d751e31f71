"""What every test stands on: a fixed seed, poisoned scratch memory, settings put back."""

import os
from collections.abc import Iterator
from pathlib import Path

# Read when the peers are imported, so set before any test module is.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from fused_adafactor import backends
from tests.poison import poison

SEED = 20180411

# Examples are drawn from the test itself and not from a clock: what passed once passes again.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
# To look for new counterexamples: HYPOTHESIS_PROFILE=explore make test
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_INTERPRETED = Path(__file__).parent / "interpret"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Triton's interpreter has a process of its own: no other test is collected there.

    What Triton is imported as, it stays.
    """
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    is_interpreted = _INTERPRETED in (collection_path, *collection_path.parents)
    if collection_path.is_file() and interprets and not is_interpreted:
        return True
    return None


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before every test, and says with what."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(params=["cpp", "reference"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with every backend as the default of the optimizers that it makes."""
    reason = backends.availability()[request.param]
    if reason is not None:
        pytest.skip(f"needs the {request.param} backend: {reason}")
    monkeypatch.setenv(backends.ENVIRONMENT, request.param)
    return request.param


@pytest.fixture(autouse=True)
def _restore_default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch leaves uninitialised with NaN: reading it before writing it then shows."""
    poison(monkeypatch)
