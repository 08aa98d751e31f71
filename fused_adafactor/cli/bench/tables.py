"""A record as a table: for the terminal, and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fused_adafactor.cli.bench.peers import OURS
from fused_adafactor.cli.bench.record import (
    OVER_ADAMW,
    OVER_FLOOR,
    OVER_TORCH,
    CaseRecord,
    Record,
)

README_BEGIN, README_END = "<!-- bench:begin -->", "<!-- bench:end -->"
_RATIOS = (OVER_TORCH, OVER_ADAMW, OVER_FLOOR)


def as_text(record: Record) -> str:
    """The record for a person at a terminal."""
    heads = ("case", "dtype", "ms ours", "p20 - p80", *_RATIOS, "state", "peak")
    lines = _aligned(heads, [_text_row(case) for case in record.cases])
    lines += _peer_lines(record)
    lines += _device_lines(record)
    lines += [
        "",
        f"{_where(record)}; medians of interleaved rounds.",
        "torch: the faster of its for-loop and foreach. AdamW: torch's, fused. floor: read g, read",
        "p, write p, at the memory's speed in the same rounds. state, and peak above parameters,",
        "gradients and state: bytes over those of the parameters.",
    ]
    lines += [f"not measured: {name}: {reason}" for name, reason in record.absent.items()]
    lines += [
        f"not measured in {case.case} {case.dtype}: {name}: {reason}"
        for case in record.cases
        for name, reason in case.absent.items()
    ]
    return "\n".join(lines)


def _text_row(case: CaseRecord) -> tuple[str, ...]:
    if case.times is None or case.ratios is None:
        return (case.case, case.dtype, _failure(case))
    ours = case.times[OURS]
    return (
        case.case,
        case.dtype,
        f"{ours.median_ms:.3f}",
        f"{ours.p20_ms:.3f} - {ours.p80_ms:.3f}",
        *(f"{case.ratios[ratio]:.2f}" for ratio in _RATIOS),
        *_memory_cells(case),
    )


def _peer_lines(record: Record) -> list[str]:
    """How much longer the other peers take; nothing if there is none."""
    every = [ratio for case in record.cases for ratio in case.ratios or {}]
    names = [ratio for ratio in dict.fromkeys(every) if ratio not in _RATIOS]
    if not names:
        return []
    rows = [
        (
            case.case,
            case.dtype,
            *(f"{case.ratios[n]:.2f}" if n in case.ratios else "-" for n in names),
        )
        for case in record.cases
        if case.ratios is not None
    ]
    modules, classes = zip(
        *(name.removesuffix(" / ours").rsplit(".", 1) for name in names), strict=True
    )
    heads = ("", "", *(f".{name}" for name in classes))
    return ["", "Time over ours:", *_aligned(("case", "dtype", *modules), [heads, *rows])]


def _device_lines(record: Record) -> list[str]:
    """Host and device time of ours, apart; nothing where they were not asked for."""
    rows = [
        (case.case, case.dtype, *(_ms(t) for t in (ours.host_ms, ours.device_ms, ours.graph_ms)))
        for case in record.cases
        if case.device_times is not None and (ours := case.device_times.get(OURS)) is not None
    ]
    if not rows:
        return []
    heads = ("case", "dtype", "host", "device", "in a graph")
    return ["", "Ours, host and device apart, ms:", *_aligned(heads, rows)]


def _ms(time: float | None) -> str:
    return "-" if time is None else f"{time:.4f}"


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; a row that is shorter ends in free text."""
    whole = [heads, *(row for row in rows if len(row) == len(heads))]
    widths = [max(len(row[n]) for row in whole) for n in range(len(heads))]
    for row in rows:
        widths[:2] = [max(width, len(cell)) for width, cell in zip(widths, row[:2], strict=False)]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:<{w}}" for cell, w in zip(row[:2], widths, strict=False)]
        if len(row) < len(heads):
            return "  ".join([*cells, *row[2:]])
        cells += [f"{cell:>{w}}" for cell, w in zip(row[2:], widths[2:], strict=True)]
        return "  ".join(cells).rstrip()

    return [line(heads), *(line(row) for row in rows)]


def _failure(case: CaseRecord) -> str:
    if case.failed is not None:
        return f"FAILED: {case.failed}"
    error = "none" if case.parity.error is None else f"{case.parity.error:.1e}"
    return f"parity FAILED: error {error}, bound {case.parity.bound:.1e}; not timed"


def _memory_cells(case: CaseRecord) -> tuple[str, str]:
    """State, and the peak above it, over the bytes of the parameters."""
    if case.memory is None:
        return "-", "-"
    ours = case.memory[OURS]
    return (
        f"{ours.state_bytes / case.parameter_bytes:.2%}",
        f"{ours.peak_bytes / case.parameter_bytes:.2%}",
    )


def _where(record: Record) -> str:
    where, versions = record.platform, record.versions
    return (
        f"{where['device']}, {where['threads']} threads ({where['cpu_capability']}), "
        f"torch {versions['torch']}, ours with backend {record.backend}"
    )


def as_markdown(record: Record) -> str:
    """The record for the README: a table, and a line that says where it is from."""
    heads = (
        *("Case", "Dtype", "ms", "Faster than torch", "Time / fused AdamW", "Time / floor"),
        *("State", "Peak memory"),
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
    for case in record.cases:
        cells: tuple[str, ...] = (case.case, case.dtype, _failure(case), *("",) * 5)
        if case.times is not None and case.ratios is not None:
            over_torch, over_adamw, over_floor = (case.ratios[ratio] for ratio in _RATIOS)
            cells = (
                *(case.case, case.dtype, _three_digits(case.times[OURS].median_ms)),
                *(f"{over_torch:.2f} ×", f"{over_adamw:.2f}", f"{over_floor:.2f}"),
                *_memory_cells(case),
            )
        lines.append("| " + " | ".join(cells) + " |")
    commit = "" if record.commit is None else f", commit {record.commit[:10]}"
    changed = ", with uncommitted changes" if record.dirty else ""
    return "\n".join([*lines, "", f"{_where(record)}, {record.date} UTC{commit}{changed}."])


def _three_digits(ms: float) -> str:
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f}"


def write_readme(path: Path, record: Record) -> None:
    """Put the table between the markers of a file, and change nothing else.

    Raises:
        OSError: It cannot be read or written.
        ValueError: It has not each marker once, in order.
    """
    before, after = split_readme(path)
    text = f"{before}{README_BEGIN}\n\n{as_markdown(record)}\n\n{README_END}{after}"
    path.write_bytes(text.encode())


def split_readme(path: Path) -> tuple[str, str]:
    """What stands before the first marker and behind the second.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has not each marker once, in order.
    """
    text = path.read_bytes().decode()  # line ends as they are
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not begin or not end or README_BEGIN in rest or README_END in before + after:
        raise ValueError(f"{path} must have {README_BEGIN} and behind it {README_END}, once each")
    return before, after
