"""The tables of a GPU's launch: Python and C++ know the same columns and records."""

from __future__ import annotations

import ctypes
import re
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_adafactor import fields, tables
from fused_adafactor.backends import cuda
from fused_adafactor.slabs import Form, ItemKind
from fused_adafactor.tickets import LAUNCH_COUNTERS, TENSOR_COUNTERS
from fused_adafactor.traits import Traits

INCLUDE = Path(__file__).parents[2] / "csrc" / "include" / "fused_adafactor"
NUMBERS = {name: value for name, value in vars(fields).items() if isinstance(value, int)}

PLAIN = Traits(
    **dict.fromkeys(
        ("math_dtype", "param_dtype", "grad_dtype", "moment_dtype", "exp_avg_dtype"), torch.float32
    ),
    **{f.name: False for f in fields_of(Traits) if f.type == "bool"},
    momentum=0,
)
SWITCHES = sorted(name for name in NUMBERS if name.endswith("_SWITCH"))


def without_comments(header: str) -> str:
    return re.sub(r"//.*", "", (INCLUDE / header).read_text(encoding="utf-8"))


def constants(text: str) -> dict[str, int]:
    """Of kCamelCase = number, by the names that Python has for them."""
    found = re.findall(r"\bk([A-Z]\w*) = (\d+)", text)
    return {re.sub(r"(?<=.)(?=[A-Z])", "_", name).upper(): int(value) for name, value in found}


def test_the_header_has_the_same_names_and_numbers() -> None:
    assert constants(without_comments("fields.h")) == NUMBERS


def test_dtypes_are_numbered_as_in_the_library_of_the_cpu() -> None:
    (enum,) = re.findall(r"enum Dtype[^{]*\{([^}]*)\}", without_comments("abi.h"))
    names = {torch.int8: "BLOCKS"}
    assert constants(enum) == {
        names.get(dtype, str(dtype).removeprefix("torch.").upper()): number
        for dtype, number in fields.DTYPES.items()
    }


def test_kinds_and_forms_are_those_of_the_items() -> None:
    kinds = {name: value for name, value in NUMBERS.items() if name.endswith("_KIND")}
    assert kinds == {f"{k.name}_KIND": k for k in ItemKind if k is not ItemKind.WHOLE}
    assert [*(Form.UNFACTORED, Form.FACTORED, Form.TINY)] == [
        fields.UNFACTORED,
        fields.FACTORED,
        fields.TINY,
    ]
    assert fields.CHUNKS_DONE == TENSOR_COUNTERS
    assert fields.PROGRAMS_DONE + 1 == LAUNCH_COUNTERS


def test_the_record_of_a_launch_is_that_of_the_header() -> None:
    text = without_comments("cuda.h")
    (body,) = re.findall(r"struct CudaLaunch \{(.*?)\};", text, re.DOTALL)
    wanted = []
    for type, names in re.findall(r"\s*(.+?[\s*])(\w+(?:, \w+)*);", body):
        kind = ctypes.c_void_p if "*" in type else {"int32_t ": ctypes.c_int32}[type]
        wanted += [(name, kind) for name in names.split(", ")]
    assert cuda._Launch._fields_ == wanted
    (version,) = re.findall(r"kCudaAbiVersion = (\d+)", text)
    assert int(version) == cuda.ABI_VERSION


def test_lines_are_cut_as_wide_as_the_kernels_hold_them() -> None:
    text = (INCLUDE.parents[1] / "cuda" / "shared.cuh").read_text(encoding="utf-8")
    (elements,) = re.findall(r"kWidest = (\d+) \* kThreads", text)
    assert int(elements) == cuda._ELEMENTS_OF_A_THREAD


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_has_a_bit_of_its_own(name: str) -> None:
    trait = name.removesuffix("_SWITCH").lower()
    if trait == "momentum":
        for site in range(4):
            there = tables.switches_of(replace(PLAIN, momentum=site))
            assert there >> NUMBERS[name] == site
    else:
        assert tables.switches_of(replace(PLAIN, **{trait: True})) == 1 << NUMBERS[name]
    assert tables.switches_of(PLAIN) == 0
