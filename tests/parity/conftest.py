"""Parity is that of every backend: each is compared with the originals and the oracle."""

import pytest


@pytest.fixture(autouse=True)
def _every_test_with_each_backend(each_backend: str) -> None: ...
