"""The columns of ``fused_adafactor/fields.py`` as constants that Triton's kernels may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton.language as tl

from fused_adafactor import fields

globals().update(
    {name: tl.constexpr(value) for name, value in vars(fields).items() if isinstance(value, int)}
)

if TYPE_CHECKING:

    def __getattr__(name: str) -> tl.constexpr: ...
