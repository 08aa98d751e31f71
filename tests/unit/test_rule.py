"""What a rule computes by itself."""

import pytest
import torch

from fused_adafactor.rule import WeightAverage


@pytest.mark.parametrize("t", [1.0, 2.0, 300.0])
def test_the_momentum_of_the_average_is_the_same_number_on_a_device(t: float) -> None:
    """In float64: in float32 0.99 is another number."""
    average = WeightAverage(momentum=0.99)
    assert average.momentum_at(t) == (0.0 if t == 1 else 0.99)
    on_device = average.momentum_at(torch.tensor(t, dtype=torch.float64))
    assert isinstance(on_device, torch.Tensor)
    assert on_device.item() == average.momentum_at(t)
