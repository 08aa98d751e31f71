"""What a kernel is compiled for: dtypes, switches of the rule, layouts, and the sizes of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fused_adafactor.binding import Binding
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import Eps1Rule, GradClipKind, MomentumSite, Nonfinite
from fused_adafactor.slabs import Form, Geometry, ItemKind
from fused_adafactor.tickets import Pieces, Tuning

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int8: tl.int8,  # in blocks
}
_SITES = {MomentumSite.GRAD: 1, MomentumSite.UPDATE: 2, MomentumSite.STEP: 3}


class Variant(NamedTuple):
    """What one launch is compiled for.

    First the traits, which all of its tensors have; then what there is among these tensors, and how
    they are launched; then sizes.

    Attributes:
        MATH: Dtype of every formula.
        PARAM: Of the parameter, and of its compensation.
        GRAD: Of the gradient.
        MOMENT: Of the second moments.
        EXP_AVG: Of the first moment; int8 is that of blocks.
        MOMENTUM: 0 for none, else its site: 1 gradient, 2 update, 3 step.
        AMSGRAD: Whether v is the largest so far.
        MEASURES: Whether RMS(u) is wanted.
        PARAM_RMS: Whether RMS(p) is.
        SKIPS: A tensor whose gradient is not finite is left as it is.
        NORM_CLIPPED: Gradients are clipped by a norm that is known after the first sweep.
        VALUE_CLIP: They are clipped element by element.
        ACCUMULATES: They are averaged over several calls.
        AVERAGES: An EMA of the weights is kept.
        STOCHASTIC: The parameter is rounded with random bits.
        KAHAN: What rounding loses is kept.
        CLAMPS: eps1 clamps v, and is not added to g².
        STRIDED: Elements lie anywhere; otherwise one after the other, as they are numbered.
        LONG: Some of them lie beyond the range of int32.
        ALIGNED: Every line, and every array, begins at a multiple of 16 bytes.
        WHOLE_BLOCKS: Eight neighbours share a Philox block.
        WEIGHS: Whether the identity for Σ u² holds, so that the first sweep takes weighted sums.
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
        LOSSLESS: Largest 1 / sqrt(v) that no g² which counts is lost below.
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
    LINES: bool = False
    UNFACTORED: bool = False
    TINY: bool = False
    CHUNKED: bool = False
    WIDTHS: tuple[int, ...] = ()
    SPANS: tuple[int, ...] = ()
    KINDS: tuple[bool, ...] = ()
    WAITS: bool = False
    JOINED: bool = False
    TILE: int = 0
    CHUNK: int = 0
    FLAT_TILE: int = 0
    APPLY_TILE: int = 0
    TINY_TILE: int = 0
    STAGES: int = 0
    FLAT_STAGES: int = 0
    MERGE_COLS: int = 0
    MERGE_SLABS: int = 32
    VECTOR: int = 1024
    MATRICES: int = 32
    PARTS: int = 32

    @property
    def draws(self) -> bool:
        """Whether anything is rounded with random bits: parameters, or second moments."""
        return self.STOCHASTIC or self.MOMENT is tl.bfloat16


def traits_of(b: Binding, geometry: Geometry) -> Variant:
    """The traits of a tensor; its gradient will be as well aligned as it is."""
    spec, rule = b.planned.spec, b.rule
    clip = rule.grad_clip
    stochastic = rule.rounding is Rounding.STOCHASTIC and spec.param_dtype is torch.bfloat16
    row_major = _row_major(geometry.sizes)
    layouts = {geometry.strides, geometry.grad_strides, geometry.state_strides}
    in_order = layouts == {row_major} and (not stochastic or geometry.logical == row_major)

    def last(strides: tuple[int, ...]) -> int:
        return sum(
            stride * (size - 1) for stride, size in zip(strides, geometry.sizes, strict=True)
        )

    by_16 = in_order and spec.numel % 16 == 0
    if geometry.form is Form.FACTORED:
        by_16 = by_16 and geometry.cols % 16 == 0
    tiny = torch.finfo(spec.math_dtype).tiny
    measures = rule.clip_threshold is not None
    norm_clipped = clip is not None and clip.kind is not GradClipKind.VALUE
    return Variant(
        MATH=_DTYPES[spec.math_dtype],
        PARAM=_DTYPES[spec.param_dtype],
        GRAD=_DTYPES[spec.grad_dtype],
        MOMENT=_DTYPES[rule.moment_dtype(spec.param_dtype)],
        EXP_AVG=_DTYPES[rule.momentum_dtype(spec.param_dtype)],
        MOMENTUM=0 if rule.momentum is None else _SITES[rule.momentum.site],
        AMSGRAD=rule.amsgrad,
        MEASURES=measures,
        PARAM_RMS=rule.measures_param_rms,
        SKIPS=rule.nonfinite is Nonfinite.SKIP,
        NORM_CLIPPED=norm_clipped,
        VALUE_CLIP=clip is not None and clip.kind is GradClipKind.VALUE,
        ACCUMULATES=b.accumulator is not None,
        AVERAGES=b.average is not None,
        STOCHASTIC=stochastic,
        KAHAN=b.compensation is not None,
        CLAMPS=rule.eps1_rule is Eps1Rule.CLAMP,
        STRIDED=not in_order,
        LONG=max(map(last, (row_major, *layouts, geometry.logical))) >= 2**31,
        ALIGNED=by_16 and all(t.data_ptr() % 16 == 0 for t in _arrays(b)),
        WHOLE_BLOCKS=by_16,
        WEIGHS=measures and not rule.amsgrad and not norm_clipped,
        LOSSLESS=math.sqrt(1e-4 / tiny),
    )


def _arrays(b: Binding) -> list[torch.Tensor]:
    owned = (b.param, b.row_var, b.col_var, b.var, b.var_max, b.exp_avg)
    more = (b.compensation, b.average, b.accumulator)
    return [tensor for tensor in (*owned, *more) if tensor is not None]


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _moves_little(traits: Variant) -> bool:
    """Whether a sweep reads nothing but parameters and gradients of 16 bits."""
    short = {tl.bfloat16, tl.float16}
    more = (traits.AMSGRAD, traits.ACCUMULATES, traits.AVERAGES, traits.KAHAN)
    return {traits.PARAM, traits.GRAD} <= short and not traits.MOMENTUM and not any(more)


def variant_of(
    traits: Variant,
    pieces: Sequence[Pieces],
    tuning: Tuning,
    kinds: Sequence[ItemKind],
    *,
    waits: bool,
    joined: bool,
) -> Variant:
    """The variant for tensors that are stepped together."""
    forms = {p.geometry.form for p in pieces}
    # What is moved element by element does not pass through shared memory on its way, and an
    # address for each of them takes registers.
    aligned, half = traits.ALIGNED, tuning.half_stages
    return traits._replace(
        LINES=Form.FACTORED in forms,
        UNFACTORED=Form.UNFACTORED in forms,
        TINY=Form.TINY in forms,
        CHUNKED=any(p.chunks > 1 for p in pieces),
        WIDTHS=tuple(sorted({p.width for p in pieces} - {0})),
        SPANS=tuple(sorted({p.span for p in pieces} - {0})),
        KINDS=tuple(kind in kinds for kind in ItemKind),
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
