"""A record as pictures: how much faster than torch, and what share of the floor. matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fused_adafactor.cli.bench.peers import OURS, TORCH_PATHS, YARDSTICK
from fused_adafactor.cli.bench.record import OVER_TORCH, CaseRecord, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _TORCH, _PEER = "#1f4e79", "#f0a35e", "0.55"
_MARKERS = "osD^vP*X"


def save_plots(record: Record, folder: Path) -> list[Path]:
    """Draw both pictures into a folder; cases that were not timed are left out.

    Returns:
        The files, or none if nothing was timed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    timed = [case for case in record.cases if case.times is not None]
    if not timed:
        return []
    pictures: dict[str, tuple[str, Callable[[Axes, Sequence[CaseRecord]], None]]] = {
        "speed-up.png": ("Time of a step over ours (in figures: torch's)", _draw_speed_up),
        "share-of-floor.png": ("Share of the memory's speed: floor over time", _draw_share),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(folder / name, record, title, timed, draw) for name, (title, draw) in pictures.items()
    ]


def _save(
    path: Path,
    record: Record,
    title: str,
    cases: Sequence[CaseRecord],
    draw: Callable[[Axes, Sequence[CaseRecord]], None],
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9 + 0.34 * len(cases)), layout="constrained")
    axes = figure.subplots()
    draw(axes, cases)
    axes.set_yticks(range(len(cases)), [f"{case.case}  {case.dtype}" for case in cases])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"{record.platform['device']}, {record.platform['threads']} threads")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160)
    return path


def _draw_speed_up(axes: Axes, cases: Sequence[CaseRecord]) -> None:
    """Bars for torch, which is what ours stands in for, and a mark for every other peer."""
    from matplotlib.ticker import LogLocator

    ratios = [case.ratios or {} for case in cases]
    over_torch = [ratio[OVER_TORCH] for ratio in ratios]
    label = "torch.optim.Adafactor"
    # The axis is logarithmic, and a bar on it begins at 1: as fast as ours.
    axes.barh(
        range(len(cases)),
        [r - 1 for r in over_torch],
        left=1,
        color=_TORCH,
        height=0.6,
        label=label,
    )
    for row, ratio in enumerate(over_torch):
        axes.text(1.01, row, f"{ratio:.1f} ×", transform=axes.get_yaxis_transform(), va="center")
    others = [name for ratio in ratios for name in ratio if _is_a_peer(name)]
    for name, marker in zip(dict.fromkeys(others), _MARKERS, strict=False):
        rows = [row for row, ratio in enumerate(ratios) if name in ratio]
        values = [ratios[row][name] for row in rows]
        peer = name.removesuffix(" / ours")
        axes.plot(values, rows, marker, color=_PEER, markersize=5, alpha=0.8, label=peer)
    axes.axvline(1, color=_OURS, linewidth=2, label="ours")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter("{x:g}")


def _is_a_peer(ratio: str) -> bool:
    return ratio.endswith(" / ours") and ratio != OVER_TORCH


def _draw_share(axes: Axes, cases: Sequence[CaseRecord]) -> None:
    """Bars for ours, marks for torch's faster path and for AdamW."""

    def shares(names: Sequence[str]) -> list[float]:
        found = []
        for case in cases:
            assert case.times is not None
            assert case.floor is not None
            fastest = min(case.times[name].median_ms for name in names)
            found.append(case.floor.median_ms / fastest)
        return found

    rows = range(len(cases))
    axes.barh(rows, shares([OURS]), color=_OURS, height=0.6, label="ours")
    axes.plot(shares(TORCH_PATHS), rows, "o", color=_TORCH, label="torch.optim.Adafactor")
    axes.plot(shares([YARDSTICK]), rows, "D", color=_PEER, markersize=5, label=YARDSTICK)
    axes.axvline(1, color="0.3", linewidth=1, label="floor: read g, read p, write p")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:.0%}")
