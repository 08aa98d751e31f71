"""The examples of the README run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_adafactor import Adafactor

_TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
_SECTION = _TEXT.partition("## Around the step")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"\*\*([^*]+)\.\*\*.*?```python\n(.*?)```", _SECTION, re.DOTALL)


def setting() -> dict[str, Any]:
    """What the examples take for granted."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    batches = [torch.randn(4, 6) for _ in range(4)]
    return {
        "torch": torch,
        "Adafactor": Adafactor,
        "model": model,
        "optimizer": Adafactor(model.parameters()),
        "batch": batches[0],
        "batches": batches,
        "loss": lambda outputs: outputs.square().mean(),
        "device": "cpu",
    }


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs_and_trains(name: str, code: str) -> None:
    namespace = setting()
    model, optimizer = namespace["model"], namespace["optimizer"]
    before = [p.detach().clone() for p in model.parameters()]
    namespace["loss"](model(namespace["batch"])).backward()
    if name == "Metrics":
        optimizer.step()
    optimizer.zero_grad()
    if name == "torch.compile":
        code = code.replace("@torch.compile", '@torch.compile(backend="eager")')
        code += "\nfor batch in batches:\n    train(batch)\n"
    exec(compile(code, f"README.md: {name}", "exec"), namespace)
    if name != "State in low precision":  # makes an optimizer only
        moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
        assert all(moved)
