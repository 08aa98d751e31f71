"""A progress bar on standard error that a log file can live with. Standard library only.

On a terminal one line is redrawn in place; elsewhere a few plain lines are written.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

_BAR_CELLS = 28
_SECONDS_BETWEEN_DRAWS = 0.1
_PLAIN_LINES = 5
_CYAN, _PLAIN = "\x1b[36m", "\x1b[0m"
_START_OF_CLEARED_LINE = "\r\x1b[2K"


class ProgressBar:
    """Shows how far a loop of known length has come; colourless where ``NO_COLOR`` is set.

    Args:
        total: Number of steps, at least 1.
        label: One or two words in front of the bar.
        stream: Where to write; None for standard error, so that standard output stays clean.
    """

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self._total = total
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = not os.environ.get("NO_COLOR")
        self._done = 0
        self._started = time.monotonic()
        self._drawn = float("-inf")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live and self._done:
            self._write("\n")

    def advance(self, note: str = "") -> None:
        """Count one step, and show it where that is due.

        Args:
            note: A few words behind the bar, such as the loss.
        """
        self._done += 1
        if self._live:
            self._redraw(note)
        elif _lines_due(self._done, self._total) > _lines_due(self._done - 1, self._total):
            self._write(f"{self._label} {self._done}/{self._total}  {note}".rstrip() + "\n")

    def _redraw(self, note: str) -> None:
        now = time.monotonic()
        if now - self._drawn < _SECONDS_BETWEEN_DRAWS and self._done < self._total:
            return
        self._drawn = now
        full = self._done * _BAR_CELLS // self._total
        bar = f"{_CYAN}{'#' * full}{_PLAIN}" if self._colour else "#" * full
        left = (now - self._started) / self._done * (self._total - self._done)
        self._write(
            f"{_START_OF_CLEARED_LINE}{self._label} [{bar}{'.' * (_BAR_CELLS - full)}] "
            f"{self._done}/{self._total}  {left:.0f} s left  {note}"
        )

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _lines_due(done: int, total: int) -> int:
    """How many of the plain lines are due after so many steps."""
    return done * _PLAIN_LINES // total
