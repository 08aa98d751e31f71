"""0-d tensors that are read, counted up and written together, in memory and on a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_adafactor.counting import Cells, Clock, number_of

# float16 is in no cell that is read in memory, so torch is asked, as for tensors of a device.
DTYPES = [torch.float32, torch.float64, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def tensors(request: pytest.FixtureRequest) -> list[Tensor]:
    return [torch.tensor(value, dtype=request.param) for value in (3.0, 4.0, 9.0)]


def test_cells_are_read_and_counted_up(tensors: list[Tensor]) -> None:
    cells = Cells(tensors)
    versions = [t._version for t in tensors]
    assert cells.read() == [3.0, 4.0, 9.0]
    cells.advance(None)
    assert list(map(float, tensors)) == [4.0, 5.0, 10.0]
    cells.advance(torch.tensor([True, False, True]))
    assert list(map(float, tensors)) == cells.read() == [5.0, 5.0, 11.0]
    assert all(t._version > before for t, before in zip(tensors, versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cells_are_written(tensors: list[Tensor], dtype: torch.dtype) -> None:
    cells = Cells(tensors)
    for start in (1.0, 7.0):
        versions = [t._version for t in tensors]
        table = torch.arange(start, start + 6, dtype=dtype).view(3, 2)
        cells.write(table[:, 0])
        assert list(map(float, tensors)) == [start, start + 2, start + 4]
        cells.write(table[:, 1].contiguous())
        assert list(map(float, tensors)) == cells.read() == [start + 1, start + 3, start + 5]
        assert all(t._version > before for t, before in zip(tensors, versions, strict=True))


def test_a_clock_of_a_device_has_one_value_for_each_counter() -> None:
    counters = [torch.tensor(value) for value in (3.0, 4.0, 4.0)]
    call = Clock(counters, on_host=False).next_call()
    assert isinstance(call, Tensor)
    assert call.dtype is torch.float64
    assert call.tolist() == [4.0, 5.0, 5.0]
    assert Clock(counters, on_host=True).next_call() is None  # they have parted
    assert Clock(counters[1:], on_host=True).next_call() == 5.0


def test_a_learning_rate_of_the_host_is_a_number_and_one_of_a_device_a_tensor() -> None:
    """A graph that has captured a copy of a host tensor reads it when that is long gone."""
    call = torch.ones((), device="meta")
    for number in (1.0, call):
        assert type(number_of(torch.tensor([0.5]), number)) is float
    lr = number_of(torch.ones((1,), device="meta"), call)
    assert isinstance(lr, Tensor)
    assert (lr.device.type, lr.dtype, lr.shape) == ("meta", torch.float64, ())
