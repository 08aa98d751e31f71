"""With the step counters on a device, a step takes as many operations however many tensors it has.

CPU tensors stand for those of a device: what is dispatched to torch is counted, whichever it is.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fused_adafactor.backends import cpp
from tests import stepping
from tests.dialects import DIALECTS, HF, KERAS, OPTAX, TORCH, Dialect
from tests.stepping import params_of

needs_cpp = pytest.mark.skipif(cpp.missing() is not None, reason=str(cpp.missing()))
# Gradients that are missing, in turn, so that the counters part.
MISSING: list[set[int]] = [set(), {1}, {0, 2}, set(), {1}, set()]


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


def build(dialect: Dialect, count: int, **extras: Any) -> Any:
    return dialect(stepping.make_params([(4, 3), (5,)] * count), capturable=True, **extras)


def operations_of(dialect: Dialect, count: int, **extras: Any) -> Counter[str]:
    """Of a step that is prepared, and whose counters have parted."""
    optimizer = build(dialect, count, backend="cpp", **extras)
    for step in range(3):
        stepping.take_steps(optimizer, 1, start=step)
        if step == 0:
            for p in params_of(optimizer)[1:]:
                p.grad = None
            optimizer.step()
    with Operations() as operations:
        optimizer.step()
    return operations.counted


@needs_cpp
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
@pytest.mark.parametrize(
    "extras", [{}, {"nonfinite": "skip"}, {"max_grad_norm": 1.0}, {"weight_decay": 0.1}], ids=str
)
def test_operations_do_not_grow_with_the_tensors(dialect: Dialect, extras: dict[str, Any]) -> None:
    if "weight_decay" in extras and dialect not in (TORCH, HF, KERAS):
        extras = {}
    few, many = (operations_of(dialect, count, **extras) for count in (2, 20))
    assert few == many


def steps_alike(optimizers: list[Any], missing: list[set[int]]) -> None:
    for step, absent in enumerate(missing):
        for optimizer in optimizers:
            params = params_of(optimizer)
            for number, (p, g) in enumerate(
                zip(params, stepping.grad_values(params, step), strict=True)
            ):
                p.grad = None if number in absent else g
            optimizer.step()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dialect", [TORCH, HF, KERAS, OPTAX], ids=str)
def test_counters_that_have_parted_are_each_followed(dialect: Dialect, backend: str) -> None:
    shapes = [(4, 3), (5,), (3, 4), (2,)]
    on_device, on_host = (
        dialect(stepping.make_params(shapes, torch.float64), backend=backend, capturable=c)
        for c in (True, False)
    )
    steps_alike([on_device, on_host], MISSING)
    stepping.assert_close_optimizers(on_device, on_host, 1e-12)
    (added,) = stepping.make_params([(3, 3)], torch.float64, seed=4)
    for optimizer in (on_device, on_host):
        mine = torch.nn.Parameter(added.detach().clone())
        optimizer.add_param_group({"params": [mine]})
    steps_alike([on_device, on_host], [*MISSING, {4}, set()])
    stepping.assert_close_optimizers(on_device, on_host, 1e-12)


def test_a_table_is_sent_with_a_value_for_each_counter() -> None:
    tables = importlib.import_module("fused_adafactor.tables")
    sent = tables.Sent(9, torch.float64, torch.device("cpu"), spares=False)
    vector, one = torch.tensor([1.0, 2.0]), torch.tensor(7.0)
    for _ in range(2):
        sent.send_rows([([0.5, vector, one], 2), ([3.0, 4.0, one + 1], 1)])
        assert sent.on_device.view(3, 3).tolist() == [[0.5, 1, 7], [0.5, 2, 7], [3, 4, 8]]
        vector += 0
    vector += 10
    sent.send_rows([([0.5, vector, one], 2), ([3.0, 5.0, one + 1], 1)])
    assert sent.on_device.view(3, 3).tolist() == [[0.5, 11, 7], [0.5, 12, 7], [3, 5, 8]]
