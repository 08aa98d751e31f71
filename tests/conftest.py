"""What every test stands on: a fixed seed, poisoned scratch memory, settings put back."""

import functools
import os
from collections.abc import Callable, Iterator

# Read when the peers are imported, so set before any test module is.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from fused_adafactor import backends

SEED = 20180411

# Examples are drawn from the test itself and not from a clock: what passed once passes again.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
# To look for new counterexamples: HYPOTHESIS_PROFILE=explore make test
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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


# torch's own fill of uninitialised memory works in deterministic mode only, and that mode changes
# which kernels run.
_UNINITIALISED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        has_nan = tensor.is_floating_point() or tensor.is_complex()
        if has_nan and tensor.layout is torch.strided:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poison


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch leaves uninitialised with NaN: reading it before writing it then shows."""
    for owner, name in _UNINITIALISED:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
