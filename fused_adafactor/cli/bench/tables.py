"""A record as a table: for the terminal, and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fused_adafactor.cli.bench.features import FeaturesRecord, feature_rows, peak_lines
from fused_adafactor.cli.bench.peers import OURS
from fused_adafactor.cli.bench.record import (
    OVER_ADAMW,
    OVER_FLOOR,
    OVER_TORCH,
    CaseRecord,
    Record,
)

README_BEGIN, README_END = "<!-- bench:begin -->", "<!-- bench:end -->"
FEATURES_BEGIN, FEATURES_END = "<!-- features:begin -->", "<!-- features:end -->"
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


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> list[str]:
    """Columns as wide as they must be, the first of them words; a shorter row ends in free text."""
    whole = [heads, *(row for row in rows if len(row) == len(heads))]
    widths = [max(len(row[n]) for row in whole) for n in range(len(heads))]
    for row in rows:
        mine = zip(widths, row[:words], strict=False)
        widths[:words] = [max(width, len(cell)) for width, cell in mine]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:<{w}}" for cell, w in zip(row[:words], widths, strict=False)]
        if len(row) < len(heads):
            return "  ".join([*cells, *row[words:]])
        cells += [f"{cell:>{w}}" for cell, w in zip(row[words:], widths[words:], strict=True)]
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


def features_as_text(record: FeaturesRecord) -> str:
    """What features cost, for a person at a terminal."""
    heads = ("case", "dtype", "feature", "ms", "cost", "by bytes")
    return "\n".join(
        [
            *_aligned(heads, feature_rows(record.features), words=3),
            "",
            *peak_lines(record.features),
            f"{_where(record.run)}; medians of interleaved rounds.",
            "cost: of a call of step() over the bare one's, in which by bytes: what the model of",
            "traffic says. enable_backward_step() is compared with backward() and step().",
        ]
    )


def features_as_markdown(record: FeaturesRecord) -> str:
    """The same for the README: a column of costs for each dtype."""
    dtypes = list(dict.fromkeys(f.dtype for f in record.features))
    cells = {(name, dtype): row for _, dtype, name, *row in feature_rows(record.features)}
    names = list(dict.fromkeys(name for name, _ in cells))
    heads = ["Feature", *(h for d in dtypes for h in (f"{d}: cost", "by bytes"))]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for name in names:
        row = [cells.get((name, dtype), ("", "–", "–")) for dtype in dtypes]
        costs = [cell for ms, cost, model in row for cell in (cost or f"{ms} ms", model)]
        lines.append(f"| `{name}` | " + " | ".join(costs) + " |")
    run = record.run
    commit = "" if run.commit is None else f", commit {run.commit[:10]}"
    changed = ", with uncommitted changes" if run.dirty else ""
    (case, *_) = dict.fromkeys(f.case for f in record.features)
    return "\n".join([*lines, "", f"{case}; {_where(run)}, {run.date} UTC{commit}{changed}."])


def write_readme(path: Path, record: Record | FeaturesRecord) -> None:
    """Put the table between its markers in a file, and change nothing else.

    Raises:
        OSError: It cannot be read or written.
        ValueError: It has not each marker once, in order.
    """
    begin, end = markers(isinstance(record, FeaturesRecord))
    before, after = split_readme(path, begin, end)
    table = (
        features_as_markdown(record) if isinstance(record, FeaturesRecord) else as_markdown(record)
    )
    path.write_bytes(f"{before}{begin}\n\n{table}\n\n{end}{after}".encode())


def markers(of_features: bool) -> tuple[str, str]:
    """Between which a table stands: that of features, or that of cases."""
    return (FEATURES_BEGIN, FEATURES_END) if of_features else (README_BEGIN, README_END)


def split_readme(path: Path, begin: str = README_BEGIN, end: str = README_END) -> tuple[str, str]:
    """What stands before the first marker and behind the second.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has not each marker once, in order.
    """
    text = path.read_bytes().decode()  # line ends as they are
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest or end in before + after:
        raise ValueError(f"{path} must have {begin} and behind it {end}, once each")
    return before, after
