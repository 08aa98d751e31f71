"""What the bench measures at toy size: parity, turns, memory, peers. No test is of a time."""

import importlib.util
import itertools
import math
import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fused_adafactor import Adafactor
from fused_adafactor.cli.bench import cases, measure, memory, parity, peers, roofs

CPU = torch.device("cpu")
TINY = cases.Case("tiny", "toy", ((6, 5), (7,)))
OPTIONAL = {c.name for c in peers.candidates("reference") if c.optional}


class Faulty(Adafactor):
    """Ours with an error in the parameters after a step; the oracle, in float64, is left alone."""

    relative_error = 0.0
    from_step = 1

    def step(self, closure: None = None) -> None:
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            if param.dtype != torch.float64 and self.state[param]["step"] >= self.from_step:
                param.data.mul_(1 + self.relative_error)


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.elements < 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_holds(case: cases.Case, dtype: torch.dtype) -> None:
    check = parity.check_parity(case, dtype, CPU, "reference")
    assert check.passed
    # The bound is of the worst rounding of every element, and not far above that.
    assert check.bound < 3 * torch.finfo(dtype).eps + 5e-6


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float32, math.nan)]
)
@pytest.mark.parametrize("from_step", [1, 2])
def test_parity_finds_an_error(
    dtype: torch.dtype, error: float, from_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "relative_error", error)
    monkeypatch.setattr(Faulty, "from_step", from_step)
    monkeypatch.setattr(parity, "Adafactor", Faulty)
    check = parity.check_parity(TINY, dtype, CPU, "reference")
    assert not check.passed
    assert (check.error is None) is math.isnan(error)


class Recorder(torch.optim.SGD):
    """Writes down that it has stepped, and on which memory."""

    def __init__(self, params: Sequence[nn.Parameter], name: str, log: list[str]) -> None:
        super().__init__(params)
        self.name, self.log = name, log

    def step(self, closure: object = None) -> None:
        self.log.append(self.name)


def recorder(name: str, log: list[str], needs: str | None = None) -> peers.Candidate:
    return peers.Candidate(name, lambda params: Recorder(params, name, log), needs)


def broken(name: str, needs: str | None = None) -> peers.Candidate:
    def make(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        raise RuntimeError("out of order\nwith details")

    return peers.Candidate(name, make, needs)


def test_everybody_steps_once_in_each_round() -> None:
    log: list[str] = []
    progress: list[float] = []
    pair = [recorder("a", log), recorder("b", log)]
    times = measure.time_case(TINY, torch.float32, CPU, pair, 1e-9, progress.append)
    rounds = times.steps["a"].rounds
    pairs = list(zip(log[::2], log[1::2], strict=True))
    assert len(pairs) == rounds + 2
    assert {frozenset(pair) for pair in pairs} == {frozenset("ab")}
    assert len(progress) == rounds
    assert progress[-1] == 1
    assert set(times.steps) == {"a", "b", *roofs.ROOFS}


def test_the_slow_sit_out_evenly() -> None:
    turns = list(measure._in_turn({"fast": 12, "slow": 3}))
    assert [number for number, names in enumerate(turns) if "slow" in names] == [3, 7, 11]
    assert all("fast" in names for names in turns)


def test_nobody_always_comes_after_the_same_one() -> None:
    rounds = dict.fromkeys("abc", 60)
    turns = list(measure._in_turn(rounds))
    assert turns == list(measure._in_turn(rounds))
    assert all(names[0] != before[-1] for before, names in itertools.pairwise(turns))
    for first, second in itertools.permutations(rounds, 2):
        followed = sum(names.index(first) + 1 == names.index(second) for names in turns)
        assert 10 < followed < 40, (first, second)


def test_an_optional_peer_that_fails_is_reported() -> None:
    log: list[str] = []
    pair = [recorder("a", log), broken("b", needs="torch")]
    times = measure.time_case(TINY, torch.float32, CPU, pair, 1e-9)
    assert times.absent == {"b": "RuntimeError: out of order"}
    assert "b" not in times.steps


def test_what_must_run_raises() -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        measure.time_case(TINY, torch.float32, CPU, [broken("b")], 1e-9)


def test_only_an_optional_peer_is_left_out_for_being_slow() -> None:
    log: list[str] = []
    pair = [recorder("a", log), recorder("b", log, needs="torch")]
    times = measure.time_case(TINY, torch.float32, CPU, pair, 1e-9)
    assert "exceed 1e-09 s" in times.absent["b"]
    assert "b" not in times.steps
    assert log.count("b") == 2
    assert times.steps["a"].rounds == 5


@pytest.mark.parametrize(("limit", "shared"), [(0, True), (2**40, False)])
def test_large_cases_share_their_tensors(
    limit: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SHARE_GRADS", limit)
    monkeypatch.setattr(measure, "_SHARE_PARAMS", limit)
    tensors = measure._Tensors(TINY, torch.float32, CPU)
    (one, _), (other, _) = tensors.params(), tensors.params()
    assert one.grad is not None
    assert other.grad is not None
    assert (one.data_ptr() == other.data_ptr()) is shared
    assert (one.grad.data_ptr() == other.grad.data_ptr()) is shared
    assert torch.equal(one, other)
    assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("parameter_bytes", [4, 74, 4096])
def test_roofs_move_the_bytes_of_the_case(parameter_bytes: int) -> None:
    """The memory that a step writes is that of the parameters, whatever their dtype."""
    steps = roofs.roofs(parameter_bytes, CPU, shared=False)
    assert set(steps) == set(roofs.ROOFS)
    for step in steps.values():
        written = step()
        assert isinstance(written, Tensor)
        assert parameter_bytes <= written.nbytes < parameter_bytes + 8
        before = written.clone()
        assert step() is written
        assert not torch.equal(written, before)
    assert roofs.floor_bytes(parameter_bytes) == 3 * parameter_bytes


@pytest.mark.parametrize(("limit", "shared"), [(0, True), (2**40, False)])
def test_a_case_has_roofs_of_its_own_bytes(
    limit: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recording(*args: int, **options: bool) -> dict[str, peers.Step]:
        asked.append((args[0], options["shared"]))
        return {}

    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(measure, "roofs", recording)
    monkeypatch.setattr(measure, "_SHARE_PARAMS", limit)
    measure.time_case(TINY, torch.bfloat16, CPU, [recorder("a", [])], 1e-9)
    assert asked == [(74, shared)]


class Allocating(torch.optim.Optimizer):
    """Allocates what the test says: state, something kept beside it, a temporary in every step."""

    def __init__(self, params: Sequence[nn.Parameter], kept: int, temporary: int) -> None:
        super().__init__(params, {})
        self.kept = torch.zeros(kept, dtype=torch.uint8)
        self.temporary = temporary

    def step(self, closure: object = None) -> None:
        for param in self.param_groups[0]["params"]:
            if not self.state[param]:
                self.state[param] = {"moment": torch.zeros_like(param), "name": "no tensor"}
        torch.zeros(self.temporary, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "temporary"), [(0, 0), (1000, 0), (0, 50_000), (1000, 50_000)])
def test_memory_counts_what_is_allocated(kept: int, temporary: int, dtype: torch.dtype) -> None:
    everybody = [
        peers.Candidate("a", lambda params: Allocating(params, kept, temporary)),
        peers.Candidate("b", lambda params: Allocating(params, 0, 0)),
    ]
    found = memory.measure_memory(everybody, TINY, dtype, CPU)
    assert found["a"] == memory.Memory(37 * dtype.itemsize, kept + temporary)
    assert found["b"] == memory.Memory(37 * dtype.itemsize, 0)


def test_memory_is_counted_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    memory.measure_memory(peers.candidates("reference")[:1], TINY, torch.float32, CPU)
    assert capfd.readouterr().err == ""


def test_memory_passes_errors_on() -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        memory.measure_memory([broken("b")], TINY, torch.float32, CPU)


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_a_peer_is_measured_where_it_is_installed(name: str) -> None:
    (candidate,) = (c for c in peers.candidates("reference") if c.name == name)
    if candidate.missing is not None:
        pytest.skip(candidate.missing)
    times = measure.time_case(TINY, torch.float32, CPU, [candidate], 1.0)
    assert times.absent == {}
    assert name in times.steps


@pytest.mark.parity
def test_timm_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    (candidate, _) = (c for c in peers.candidates("reference") if c.needs == "timm")
    if candidate.missing is not None:
        pytest.skip(candidate.missing)
    found = importlib.util.find_spec("timm")
    monkeypatch.setitem(sys.modules, "timm", theirs := types.ModuleType("timm"))
    theirs.__spec__ = found
    assert isinstance(candidate.make([nn.Parameter(torch.ones(2, 2))]), torch.optim.Optimizer)
    assert sys.modules["timm"] is theirs
    assert "timm.optim" not in sys.modules


def test_compiling_is_for_few_tensors() -> None:
    assert peers.COMPILED not in {c.name for c in peers.candidates("reference")}
    (candidate,) = (c for c in peers.candidates("reference", True) if c.compiled)
    many = cases.Case("many", "toy", ((2,),) * 9)
    assert candidate.unfit(TINY) is None
    times = measure.time_case(many, torch.float32, CPU, [candidate], 1e-9)
    assert times.absent == {peers.COMPILED: "compiled for at most 8 tensors"}


def test_a_compiled_candidate_steps_through_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(step: Callable[[], object], fullgraph: bool) -> Callable[[], object]:
        log.append("compiled")
        return step

    log: list[str] = []
    monkeypatch.setattr(torch, "compile", compiler)
    candidate = peers.Candidate("a", lambda params: Recorder(params, "a", log), compiled=True)
    step = candidate.stepper([nn.Parameter(torch.ones(2))])
    assert log == ["compiled", "a"]
    step()
    assert log == ["compiled", "a", "a"]


def test_what_is_compiled_is_torchs() -> None:
    (candidate,) = (c for c in peers.candidates("reference", True) if c.compiled)
    made = candidate.make([nn.Parameter(torch.ones(2))])
    assert type(made) is torch.optim.Adafactor
    assert made.defaults["foreach"] is True


def test_every_case_has_a_name_of_its_own() -> None:
    names = cases.names(cases.CASES)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2-124m", 148, 124_439_808),
        ("t5-base", 257, 222_903_552),
        ("llama3-8b-layer", 9, 218_112_000),
        ("16384x16384", 1, 2**28),
    ],
)
def test_models_have_the_size_that_they_are_known_by(
    name: str, tensors: int, elements: int
) -> None:
    (case,) = (case for case in cases.CASES if case.name == name)
    assert (len(case.shapes), case.elements) == (tensors, elements)


@pytest.mark.parametrize(
    ("wanted", "full", "chosen"),
    [
        (None, False, ["a", "b"]),
        (None, True, ["a", "a-big", "b"]),
        (["one"], False, ["a"]),
        (["one"], True, ["a", "a-big"]),
        (["a-big", "b"], False, ["a-big", "b"]),
    ],
)
def test_cases_are_chosen_by_name_and_by_group(
    wanted: list[str] | None, full: bool, chosen: list[str]
) -> None:
    every = (
        cases.Case("a", "one", ((1,),)),
        cases.Case("a-big", "one", ((1,),), full=True),
        cases.Case("b", "two", ((1,),)),
    )
    assert [case.name for case in cases.choose(every, wanted, full)] == chosen
