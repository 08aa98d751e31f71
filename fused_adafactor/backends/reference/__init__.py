"""The reference: the update in eager torch, and the specification of every other backend.

No cleverness: one tensor at a time, every formula once, in float64 for float64 tensors and in
float32 otherwise. Equations are numbered as in ``docs/rule.md``; arXiv 1804.04235, Algorithms 4
and 5, is their source. ``phases.py`` is where to begin: it reads from top to bottom as a step goes,
with the equations in ``formulas.py``; the rest is plumbing.

Nothing here reads a value on the host, and only ``apply`` (and ``accumulate`` and ``average``, the
two activities that have no update) writes a parameter or its state.
"""

from __future__ import annotations

from collections.abc import Sequence

from fused_adafactor.backends.reference.executor import Executor
from fused_adafactor.binding import Binding
from fused_adafactor.plan import Phase
from fused_adafactor.spec import TensorSpec


def obstacle(spec: TensorSpec) -> str | None:
    """Why it cannot step a tensor that has elements: there is nothing that it cannot."""
    return None


def bind(bindings: Sequence[Binding], segments: Sequence[tuple[Phase, ...]]) -> Executor:
    """Make an executor for tensors of one device and one math dtype, none of them empty."""
    return Executor(bindings)
