"""Schedules: values by hand, and the same numbers for a t on the host and a t on a device."""

from __future__ import annotations

import pytest
import torch

from fused_adafactor.schedule import (
    BiasCorrected,
    Constant,
    Custom,
    Linear,
    PowerDecay,
    Schedule,
    StepSize,
    maximum,
    minimum,
)

SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(0.9),
    "power": PowerDecay(0.8),
    "power-offset": PowerDecay(0.8, offset=5),
    "power-cap": PowerDecay(0.8, cap=0.99),
    "bias-corrected": BiasCorrected(0.999),
    "linear": Linear(1e-6),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tensor_t_gives_the_numbers_of_a_float_t(name: str) -> None:
    schedule = SCHEDULES[name]
    for t in (1, 2, 3, 7, 1000, 10**6):
        on_device = schedule(torch.tensor(float(t), dtype=torch.float64))
        assert float(on_device) == pytest.approx(float(schedule(float(t))), rel=1e-15, abs=1e-300)


@pytest.mark.parametrize("smaller", [True, False])
def test_a_number_of_the_host_goes_to_the_device_and_not_the_other_way(smaller: bool) -> None:
    """A tensor without values cannot be copied to the host, as one of a device must not be."""
    host, device = torch.ones(()), torch.ones((), device="meta")
    for pair in ((host, device), (device, host), (2.0, device), (device, 2.0)):
        assert (minimum if smaller else maximum)(*pair).device.type == "meta"


def test_power_decay_forgets_everything_at_the_first_step() -> None:
    assert PowerDecay(0.8)(1.0) == 0.0
    assert PowerDecay(0.8)(2.0) == pytest.approx(1 - 2**-0.8, rel=1e-15)


def test_power_decay_stays_at_zero_until_the_offset_has_passed() -> None:
    schedule = PowerDecay(0.8, offset=3)
    assert [schedule(float(t)) for t in (1, 2, 3, 4)] == [0.0] * 4
    assert schedule(5.0) == PowerDecay(0.8)(2.0)


def test_power_decay_respects_its_cap() -> None:
    assert PowerDecay(0.8, cap=0.999)(1e9) == 0.999


def test_bias_corrected_is_the_decay_of_adams_corrected_average() -> None:
    """The corrected average m_t / (1 - b^t) is itself an average, with this decay."""
    beta, corrected, raw = 0.9, 0.0, 0.0
    for t, value in enumerate((3.0, -1.0, 2.5, 0.5), start=1):
        raw = beta * raw + (1 - beta) * value
        decay = float(BiasCorrected(beta)(float(t)))
        corrected = decay * corrected + (1 - decay) * value
        assert corrected == pytest.approx(raw / (1 - beta**t), rel=1e-12)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["host", "device"])
def test_each_milestone_multiplies_the_step_size_once(as_tensor: bool) -> None:
    step_size = StepSize(Constant(1e-2), inverse_sqrt=True, milestones=(4, 6), factor=0.5)
    expected = {1: 1e-2, 3: 1e-2, 4: 5e-3, 5: 5e-3, 6: 2.5e-3, 100: 2.5e-3, 40_000: 5e-3 / 4}
    for t, value in expected.items():
        number = torch.tensor(float(t), dtype=torch.float64) if as_tensor else float(t)
        assert float(step_size(number, None)) == pytest.approx(value, rel=1e-15)


def test_the_step_size_follows_a_tensor_lr_without_reading_it() -> None:
    lr = torch.tensor(0.25, dtype=torch.float64)
    rho = StepSize(inverse_sqrt=True)(1.0, lr)
    assert isinstance(rho, torch.Tensor)
    assert float(rho) == 0.25


def test_a_missing_lr_is_named() -> None:
    with pytest.raises(ValueError, match="lr is None"):
        StepSize()(1.0, None)


def test_a_python_function_is_called_with_whole_steps() -> None:
    seen = []
    schedule = Custom(lambda t: seen.append(t) or 0.5, "beta2")
    assert schedule(3.0) == 0.5
    assert seen == [3]
    assert type(seen[0]) is int


def test_a_python_function_refuses_a_device_counter() -> None:
    with pytest.raises(ValueError, match="beta2 is a Python function"):
        Custom(lambda t: 0.5, "beta2")(torch.tensor(1.0))
