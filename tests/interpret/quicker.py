"""Triton's interpreter, three times as fast: it need not replace Triton's builtins in every call.

It does so whenever one jitted function calls another one, by going through all of Triton's names,
which takes longer than the arithmetic. Once is enough until a launch has ended.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

import numpy as np


def patch_once_a_launch() -> None:
    """From now on; nothing happens where Triton has changed and does this in another way."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    replace = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope is None or hasattr(replace, "__wrapped__"):
        return

    @functools.cache
    def seen_by(function: Any) -> list[ModuleType]:
        known = (language, language.core)
        return [v for v in function.__globals__.values() if inspect.ismodule(v) and v in known]

    @functools.wraps(replace)
    def replace_once(function: Any) -> Any:
        if any(language.core.is_builtin(module.load) for module in seen_by(function)):
            return replace(function)
        return scope()

    interpreter._patch_lang = replace_once


def patch_scans_for_the_largest() -> None:
    """Take the largest so far with NumPy, where the interpreter goes from element to element."""
    blocks = importlib.import_module("fused_adafactor.backends.triton.blocks")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    scans = getattr(interpreter, "ScanOps", None)
    generic = getattr(scans, "generic_scan", None)
    if generic is None:
        return

    def scan(self: Any, inputs: Any) -> Any:
        if self.combine_fn is not blocks.larger:
            return generic(self, inputs)
        (values,) = inputs
        largest = np.maximum.accumulate(values.handle.data, axis=self.axis)
        return [self.to_tensor(largest, values.dtype)]

    scans.generic_scan = scan
