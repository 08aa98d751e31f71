"""RMS(p) without a read of p: the same bits as with one, whoever writes p between two steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import stepping
from tests.dialects import ADAFACTOR_PYTORCH, HF, KERAS, TORCH, Dialect
from tests.kernels.judged import BF16, F32, unit
from tests.stepping import contiguous, same_bits, transposed

# Steps after which sums are trusted: one to have some, and two in which they were right.
WARM = 3
# Slabs with several strips, the last of them short; lines that are columns, and that end in part of
# a vector; longer than a block may be; more than one matrix.
SHAPES = [(700, 300), (257, 2050), (3, 900, 233), (36, 17_001), (4500, 37)]


class Pair:
    """One who may know RMS(p), and one who reads p for it."""

    def __init__(self, dialect: Dialect, params: list[Any], **kwargs: Any) -> None:
        self.params = params
        self.twins = stepping.clone_params(params)
        self.ours = dialect(self.params, backend="cpp", param_rms="expected", **kwargs)
        self.reading = dialect(self.twins, backend="cpp", **kwargs)
        self.steps = 0

    def step(self, grads: list[Tensor] | None = None) -> None:
        if grads is None:
            grads = stepping.grad_values(self.params, self.steps)
        self.steps += 1
        for group in (self.params, self.twins):
            for p, grad in zip(group, grads, strict=True):
                p.grad = grad.clone()
        self.ours.step()
        self.reading.step()

    def warm_up(self) -> None:
        for _ in range(WARM):
            self.step()
        assert not any(trusted(self.ours))
        self.step()
        assert all(trusted(self.ours))
        assert not any(trusted(self.reading))

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.twins]

    def check(self) -> None:
        for group in self.ours.param_groups:
            group["param_rms"] = "read"
        stepping.assert_same_optimizers(self.ours, self.reading)
        for group in self.ours.param_groups:
            group["param_rms"] = "expected"


def trusted(optimizer: Any) -> list[bool]:
    """Of each parameter, whether the last step knew RMS(p) without reading it."""
    (course,) = optimizer._known.prepared.courses.values()
    return [bool(t.expected.trusted) for batch in course.batches for t in batch.executor.tensors]


@pytest.mark.parametrize("dialect", [TORCH, HF, KERAS], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("lay_out", [contiguous, transposed])
def test_steps_have_the_bits_of_those_that_read(
    isa: str, dialect: Dialect, dtype: torch.dtype, lay_out: Any
) -> None:
    params = [torch.nn.Parameter(lay_out(p)) for p in stepping.make_params(SHAPES, dtype)]
    pair = Pair(dialect, params)
    pair.warm_up()
    for _ in range(3):
        pair.step()
    assert all(trusted(pair.ours))
    pair.check()


CLIPS = {"clipvalue": 0.5, "clipnorm": 1.0, "max_grad_norm": 1.0}


@pytest.mark.parametrize("clip", CLIPS)
def test_so_do_steps_that_clip_gradients(clip: str) -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES), weight_decay=0.01, **{clip: CLIPS[clip]})
    pair.warm_up()
    pair.step()
    pair.check()


# What is stored beside the parameter, and rounding that is not to nearest.
FEATURES = {
    "momentum_of_steps": (HF, F32, {"beta1": 0.9}),
    "momentum_of_steps_bf16": (HF, BF16, {"beta1": 0.9, "momentum_dtype": BF16}),
    "momentum_of_steps_int8": (HF, F32, {"beta1": 0.9, "momentum_dtype": torch.int8}),
    "momentum_of_gradients": (ADAFACTOR_PYTORCH, F32, {"lr": None, "ams_grad": False}),
    "momentum_of_gradients_int8": (
        ADAFACTOR_PYTORCH,
        F32,
        {"lr": None, "ams_grad": False, "momentum_dtype": torch.int8},
    ),
    "decay_by_alpha": (HF, F32, {"weight_decay": 0.5}),
    "decay_by_alpha_and_momentum": (HF, F32, {"weight_decay": 0.5, "beta1": 0.9}),
    "average": (KERAS, F32, {"use_ema": True}),
    "kahan": (TORCH, BF16, {"rounding": "kahan"}),
    "stochastic": (TORCH, BF16, {"rounding": "stochastic"}),
}
EVERY_FEATURE = pytest.mark.parametrize("feature", FEATURES)


@EVERY_FEATURE
def test_so_do_steps_that_store_more(isa: str, feature: str) -> None:
    dialect, dtype, options = FEATURES[feature]
    pair = Pair(dialect, stepping.make_params(SHAPES, dtype), **options)
    pair.warm_up()
    pair.step()
    assert all(trusted(pair.ours))
    pair.check()


@EVERY_FEATURE
def test_what_is_made_good_is_all_that_is_stored(isa: str, feature: str) -> None:
    dialect, dtype, options = FEATURES[feature]
    pair = Pair(dialect, stepping.make_params(SHAPES, dtype), **options)
    pair.warm_up()
    for p in pair.everything():
        p.data[-1] *= 16
    with pytest.warns(RuntimeWarning, match="was written between two steps"):
        pair.step()
    assert all(trusted(pair.ours))
    tolerance = 3 * unit(dtype)  # of the first value, of the second, and of the other's
    if feature.startswith("decay"):
        tolerance += 3 * unit(dtype)  # of what p is multiplied by: a quotient of two such numbers
    if feature == "stochastic":
        tolerance += 2 * unit(dtype)  # bits may take a number up in one, and down in the other
    if feature.endswith("int8"):
        tolerance += 1e-2 / 64  # of a step, as blocks of the moment are rounded again
    for p, q in zip(pair.params, pair.twins, strict=True):
        assert not same_bits(p, q)
        stepping.assert_close(p, q, tolerance, f"{tuple(p.shape)}")


def test_an_average_that_takes_over_the_parameter_is_read() -> None:
    pair = Pair(KERAS, stepping.make_params(SHAPES), use_ema=True, ema_overwrite_frequency=3)
    for _ in range(10):
        pair.step()
        pair.check()


def test_what_torch_has_seen_written_is_read() -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES))
    pair.warm_up()
    with torch.no_grad():
        for p in pair.everything():
            p[3:5] *= 1.5
    pair.step()
    assert not any(trusted(pair.ours))
    pair.check()
    pair.step()
    assert all(trusted(pair.ours))
    pair.check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_torch_has_not_seen_is_made_good(
    isa: str, dtype: torch.dtype, weight_decay: float
) -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES, dtype), lr=0.1, weight_decay=weight_decay)
    pair.warm_up()
    for p in pair.everything():
        p.data[-1] *= 100  # of one strip
    with pytest.warns(RuntimeWarning, match="was written between two steps") as warned:
        pair.step()
    assert [f"#{n} in" in str(w.message) for n, w in enumerate(warned)] == [True] * len(SHAPES)
    assert all(trusted(pair.ours))
    for p, q in zip(pair.params, pair.twins, strict=True):
        # Rounded twice where the other is rounded once.
        stepping.assert_close(p, q, 3 * unit(dtype), f"{tuple(p.shape)}")
        assert not same_bits(p, q)  # or there was nothing to be made good
    assert pair.ours.metrics() == pair.reading.metrics()


@pytest.mark.filterwarnings("ignore:.*was written between")
def test_after_a_surprise_the_parameter_is_read_for_long() -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES))
    pair.warm_up()
    for _ in range(6):
        for p, q in zip(pair.params, pair.twins, strict=True):
            p.data.copy_(q.data.mul_(1.25))
        pair.step()
    assert not any(trusted(pair.ours))
    pair.check()


def test_nothing_is_trusted_unless_asked_for() -> None:
    optimizer = TORCH(stepping.make_params(SHAPES), backend="cpp")
    stepping.take_steps(optimizer, WARM + 2)
    assert not any(trusted(optimizer))
    with pytest.raises(ValueError, match="param_rms must be 'read' or 'expected', got True"):
        TORCH(stepping.make_params(SHAPES), param_rms=True)


def test_what_has_shrunk_unseen_is_within_a_rounding_of_the_step_that_was_taken() -> None:
    """Of float32: from an RMS of 1, a step of lr RMS(p) was rounded at the size of p before."""
    pair = Pair(TORCH, stepping.make_params(SHAPES), lr=0.01)
    pair.warm_up()
    for p in pair.everything():
        p.data.mul_(1e-3)
    with pytest.warns(RuntimeWarning, match="was written between two steps"):
        pair.step()
    for p, q in zip(pair.params, pair.twins, strict=True):
        # u is up to some tens where its RMS is 1.
        assert float((p - q).detach().abs().max()) <= 100 * 0.01 * 2 * unit(F32), tuple(p.shape)


def test_a_change_that_leaves_the_sum_alone_needs_nothing() -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES))
    pair.warm_up()
    for p in pair.everything():
        p.data.neg_()
    pair.step()
    pair.step()
    assert all(trusted(pair.ours))
    pair.check()


def test_what_cannot_be_made_good_is_read() -> None:
    """A step from a parameter that was infinite, and is not any more."""
    pair = Pair(TORCH, stepping.make_params(SHAPES))
    pair.warm_up()
    before = [p.detach().clone() for p in pair.everything()]
    with torch.no_grad():
        for p in pair.everything():
            p[0, ..., 0] = torch.inf
    pair.step()
    for p, value in zip(pair.everything(), before, strict=True):
        p.data.copy_(value)
    pair.step()
    assert all(bool(p.isfinite().all()) for p in pair.params)
    pair.check()


@pytest.mark.parametrize("every", [1, 2])
def test_a_skipped_step_leaves_the_sums_as_they_are(every: int) -> None:
    pair = Pair(TORCH, stepping.make_params(SHAPES), nonfinite="skip")
    grads = stepping.grad_values(pair.params, 99)
    for grad in grads[::every]:
        grad[..., 0] = torch.nan
    pair.step(grads)
    pair.warm_up()
    pair.step(grads)
    pair.step()
    # Where only some are skipped, their counters part, and everything is prepared anew.
    assert every == 2 or all(trusted(pair.ours))
    pair.check()


@pytest.mark.filterwarnings("ignore:.*was written between")
def test_bits_of_a_step_that_is_made_good_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            pair = Pair(TORCH, stepping.make_params(SHAPES))
            pair.warm_up()
            for p in pair.everything():
                p.data[1:3] *= 10
            pair.step()
            assert all(trusted(pair.ours))
            runs.append(pair.params)
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, *runs))
