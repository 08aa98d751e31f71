"""With step counters on the device, tables are filled there: as many operations for any model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests import stepping
from tests.dialects import HF, KERAS, TORCH, Dialect
from tests.integration.test_capturable import MISSING, Operations, steps_alike
from tests.interpret.small import BACKEND
from tests.stepping import params_of

SHAPES = [(7,), (3, 4), (5, 3), (2,)]


@pytest.mark.parametrize("dialect", [TORCH, HF, KERAS], ids=str)
def test_counters_that_have_parted_are_each_followed(dialect: Dialect, launch: str) -> None:
    on_device, on_host = (
        dialect(stepping.make_params(SHAPES), backend=BACKEND, capturable=c, rounding="stochastic")
        for c in (True, False)
    )
    steps_alike([on_device, on_host], MISSING)
    # The numbers of a step are taken by other functions there, so their last bits differ.
    stepping.assert_close_optimizers(on_device, on_host, 2e-6)


def operations_of(count: int) -> Counter[str]:
    optimizer: Any = TORCH(
        stepping.make_params(SHAPES * count),
        backend=BACKEND,
        capturable=True,
        nonfinite="skip",
    )
    stepping.take_steps(optimizer, 1)
    for p in params_of(optimizer)[1:]:
        p.grad = None
    optimizer.step()
    stepping.take_steps(optimizer, 2, start=1)
    with Operations() as operations:
        optimizer.step()
    return operations.counted


def test_operations_do_not_grow_with_the_tensors() -> None:
    few, many = operations_of(1), operations_of(4)
    assert few == many
    assert few["aten.copy_.default"] > 0
