"""How wide a kernel reads and writes, from the assembly language that NVIDIA's assembler is given.

It takes vectors as they are, so this is what a GPU will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ACCESS = re.compile(r"\b(?:ld|st)((?:[.:]+\w+)+)\s")
_ELSEWHERE = {"shared", "local", "param", "const"}
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[\da-f]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.\S*global")
_FUNCTION = re.compile(r"^(?:\.\w+\s+)*\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", re.MULTILINE)


def accesses(ptx: str) -> Iterator[int]:
    """Bytes of the accesses to global memory, or to addresses that may be of any."""
    for modifiers in _ACCESS.findall(ptx):
        words = re.split(r"[.:]+", modifiers)[1:]
        if not _ELSEWHERE & set(words):
            count = next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1)
            yield count * int(words[-1][1:]) // 8
    for size in _COPY.findall(ptx):
        yield int(size, 0)
    for _ in _BULK.findall(ptx):
        yield 16  # of which a bulk copy takes multiples


def widest_accesses(ptx: str) -> dict[str, int]:
    """By the name of a function, the bytes of its widest access."""
    places = [(match.start(), match[1]) for match in _FUNCTION.finditer(ptx)]
    ends = [start for start, _ in places[1:]] + [len(ptx)]
    widest: dict[str, int] = {}
    for (start, name), end in zip(places, ends, strict=True):
        widest[name] = max(widest.get(name, 0), *accesses(ptx[start:end]), 0)
    return widest
