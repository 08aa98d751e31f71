"""What a kernel is compiled for: dtypes, switches of the rule, layouts, and the sizes of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fused_adafactor.slabs import Form, ItemKind
from fused_adafactor.tickets import Pieces, Tuning
from fused_adafactor.traits import Traits, lossless

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int8: tl.int8,  # in blocks
}


class Variant(NamedTuple):
    """What one launch is compiled for.

    First the traits, which all of its tensors have: see ``traits.Traits``. Then what there is among
    these tensors, and how they are launched; then sizes.

    Attributes:
        LOSSLESS: Largest 1 / sqrt(v) that no g² which counts is lost below.
        LINES: There are matrices.
        UNFACTORED: There are tensors with a second moment for each element.
        TINY: There are tiny matrices.
        CHUNKED: Some lines are summed in chunks.
        WIDTHS: Of tiles in the first sweep.
        SPANS: Of tiles in the second sweep.
        KINDS: For each kind of item, whether there is one.
        WAITS: Whether items wait for each other.
        JOINED: The first sweep was another launch.
        TILE: Elements of a tile in the first sweep.
        CHUNK: Columns of a chunk.
        FLAT_TILE: Elements of a tile in the third sweep, or of no lines.
        APPLY_TILE: Elements of a tile in the second sweep over lines, where nothing is summed.
        TINY_TILE: Elements of a tile of tiny matrices.
        STAGES: Tiles that are on their way to a program at a time.
        FLAT_STAGES: The same of no lines.
        MERGE_COLS: Columns that are merged together.
        MERGE_SLABS: Slabs, likewise.
        VECTOR: Elements of a vector that is summed.
        MATRICES: Matrices that are finalized together.
        PARTS: Parts of them, likewise.
    """

    MATH: Any
    PARAM: Any
    GRAD: Any
    MOMENT: Any
    EXP_AVG: Any
    MOMENTUM: int
    AMSGRAD: bool
    MEASURES: bool
    PARAM_RMS: bool
    SKIPS: bool
    NORM_CLIPPED: bool
    SPLIT: bool
    RAW_LINES: bool
    VALUE_CLIP: bool
    ACCUMULATES: bool
    AVERAGES: bool
    STOCHASTIC: bool
    KAHAN: bool
    CLAMPS: bool
    STRIDED: bool
    LONG: bool
    ALIGNED: bool
    WHOLE_BLOCKS: bool
    WEIGHS: bool
    LOSSLESS: float
    LINES: bool
    UNFACTORED: bool
    TINY: bool
    CHUNKED: bool
    WIDTHS: tuple[int, ...]
    SPANS: tuple[int, ...]
    KINDS: tuple[bool, ...]
    WAITS: bool
    JOINED: bool
    TILE: int
    CHUNK: int
    FLAT_TILE: int
    APPLY_TILE: int
    TINY_TILE: int
    STAGES: int
    FLAT_STAGES: int
    MERGE_COLS: int
    MERGE_SLABS: int = 32
    VECTOR: int = 1024
    MATRICES: int = 32
    PARTS: int = 32


def _moves_little(traits: Traits) -> bool:
    """Whether a sweep reads nothing but parameters and gradients of 16 bits."""
    short = {torch.bfloat16, torch.float16}
    more = (traits.amsgrad, traits.accumulates, traits.averages, traits.kahan)
    return (
        {traits.param_dtype, traits.grad_dtype} <= short and not traits.momentum and not any(more)
    )


def variant_of(
    traits: Traits,
    pieces: Sequence[Pieces],
    tuning: Tuning,
    kinds: Sequence[ItemKind],
    *,
    waits: bool,
    joined: bool,
) -> Variant:
    """The variant for tensors of the same traits that are stepped together."""
    forms = {p.geometry.form for p in pieces}
    # What is moved element by element does not pass through shared memory on its way, and an
    # address for each of them takes registers.
    aligned, half = traits.aligned, tuning.half_stages
    return Variant(
        MATH=_DTYPES[traits.math_dtype],
        PARAM=_DTYPES[traits.param_dtype],
        GRAD=_DTYPES[traits.grad_dtype],
        MOMENT=_DTYPES[traits.moment_dtype],
        EXP_AVG=_DTYPES[traits.exp_avg_dtype],
        MOMENTUM=traits.momentum,
        AMSGRAD=traits.amsgrad,
        MEASURES=traits.measures,
        PARAM_RMS=traits.param_rms,
        SKIPS=traits.skips,
        NORM_CLIPPED=traits.norm_clipped,
        SPLIT=traits.split,
        RAW_LINES=traits.raw_lines,
        VALUE_CLIP=traits.value_clip,
        ACCUMULATES=traits.accumulates,
        AVERAGES=traits.averages,
        STOCHASTIC=traits.stochastic,
        KAHAN=traits.kahan,
        CLAMPS=traits.clamps,
        STRIDED=traits.strided,
        LONG=traits.long,
        ALIGNED=aligned,
        WHOLE_BLOCKS=traits.whole_blocks,
        WEIGHS=traits.weighs,
        LOSSLESS=lossless(traits.math_dtype),
        LINES=Form.FACTORED in forms,
        UNFACTORED=Form.UNFACTORED in forms,
        TINY=Form.TINY in forms,
        CHUNKED=any(p.chunks > 1 for p in pieces),
        WIDTHS=tuple(sorted({p.width for p in pieces} - {0})),
        SPANS=tuple(sorted({p.span for p in pieces} - {0})),
        KINDS=tuple(kind in kinds for kind in sorted(ItemKind)),
        WAITS=waits,
        JOINED=joined,
        TILE=tuning.tile if aligned else tuning.tile // 2,
        CHUNK=tuning.chunk,
        FLAT_TILE=tuning.flat_tile,
        APPLY_TILE=tuning.flat_tile if aligned else tuning.flat_tile // 2,
        TINY_TILE=tuning.tiny_tile,
        STAGES=(half if _moves_little(traits) else tuning.stages) if aligned else 1,
        FLAT_STAGES=tuning.stages if aligned else 1,
        MERGE_COLS=tuning.cut.merge_columns,
    )
