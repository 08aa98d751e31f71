"""What a GPU's kernel tells apart of the tensors that it steps: dtypes, switches, layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_adafactor.binding import Binding
from fused_adafactor.rounding import Rounding
from fused_adafactor.rule import Eps1Rule, GradClipKind, MomentumSite, Nonfinite
from fused_adafactor.slabs import Form, Geometry, whole_of

_SITES = {MomentumSite.GRAD: 1, MomentumSite.UPDATE: 2, MomentumSite.STEP: 3}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Of one tensor; a kernel is compiled for them, or looks them up in the tensor's row.

    Attributes:
        math_dtype: Of every formula.
        param_dtype: Of the parameter, and of its compensation.
        grad_dtype: Of the gradient.
        moment_dtype: Of the second moments.
        exp_avg_dtype: Of the first moment; int8 is that of blocks.
        momentum: 0 for none, else its site: 1 gradient, 2 update, 3 step.
        amsgrad: Whether v is the largest so far.
        measures: Whether RMS(u) is wanted.
        param_rms: Whether RMS(p) is.
        skips: It is left as it is where its gradient is not finite.
        norm_clipped: Its gradient is clipped by a norm that is known after the first sweep.
        split: Other processes have other parts of it.
        raw_lines: The first sweep sums g² along lines, whose second moments come later: it is not
            clipped yet, or other processes have other parts of each line.
        value_clip: It is clipped element by element.
        accumulates: It is averaged over several calls.
        averages: An EMA of the weights is kept.
        stochastic: The parameter is rounded with random bits.
        kahan: What rounding loses is kept.
        clamps: eps1 clamps v, and is not added to g².
        strided: Elements lie anywhere; otherwise one after the other, as they are numbered.
        long: Some of them lie, or are numbered in the parameter, beyond the range of int32.
        aligned: Every line, and every array, begins at a multiple of 16 bytes.
        whole_blocks: Eight neighbours share a Philox block, and in the order in which they lie.
        weighs: Whether the identity for Σ u² holds, so that the first sweep takes weighted sums.
    """

    math_dtype: torch.dtype
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    exp_avg_dtype: torch.dtype
    momentum: int
    amsgrad: bool
    measures: bool
    param_rms: bool
    skips: bool
    norm_clipped: bool
    split: bool
    raw_lines: bool
    value_clip: bool
    accumulates: bool
    averages: bool
    stochastic: bool
    kahan: bool
    clamps: bool
    strided: bool
    long: bool
    aligned: bool
    whole_blocks: bool
    weighs: bool

    @property
    def draws(self) -> bool:
        """Whether anything is rounded with random bits: the parameter, or second moments."""
        return self.stochastic or self.moment_dtype is torch.bfloat16


def traits_of(b: Binding, geometry: Geometry) -> Traits:
    """The traits of a tensor; its gradient will be as well aligned as it is."""
    spec, rule = b.planned.spec, b.rule
    clip = rule.grad_clip
    stochastic = rule.rounding is Rounding.STOCHASTIC and spec.param_dtype is torch.bfloat16
    row_major = _row_major(geometry.sizes)
    layouts = {geometry.strides, geometry.grad_strides, geometry.state_strides}
    numbered = geometry.logical == row_major
    # Where it is split, numbers in the whole parameter are looked up apart from where it lies.
    in_order = layouts == {row_major} and (numbered or spec.is_split or not stochastic)

    def last(strides: tuple[int, ...]) -> int:
        return sum(
            stride * (size - 1) for stride, size in zip(strides, geometry.sizes, strict=True)
        )

    by_16 = in_order and spec.numel % 16 == 0
    if geometry.form is Form.FACTORED:
        by_16 = by_16 and geometry.cols % 16 == 0
    measures = rule.clip_threshold is not None
    norm_clipped = clip is not None and clip.kind is not GradClipKind.VALUE
    raw_lines = norm_clipped or bool(spec.cols_over and not geometry.swapped)
    blocks_lie_alike = numbered and whole_of(spec, geometry).first_element % 8 == 0
    return Traits(
        math_dtype=spec.math_dtype,
        param_dtype=spec.param_dtype,
        grad_dtype=spec.grad_dtype,
        moment_dtype=rule.moment_dtype(spec.param_dtype),
        exp_avg_dtype=rule.momentum_dtype(spec.param_dtype),
        momentum=0 if rule.momentum is None else _SITES[rule.momentum.site],
        amsgrad=rule.amsgrad,
        measures=measures,
        param_rms=rule.measures_param_rms,
        skips=rule.nonfinite is Nonfinite.SKIP,
        norm_clipped=norm_clipped,
        split=spec.is_split,
        raw_lines=raw_lines,
        value_clip=clip is not None and clip.kind is GradClipKind.VALUE,
        accumulates=b.accumulator is not None,
        averages=b.average is not None,
        stochastic=stochastic,
        kahan=b.compensation is not None,
        clamps=rule.eps1_rule is Eps1Rule.CLAMP,
        strided=not in_order,
        long=max(spec.whole_numel - 1, *map(last, layouts)) >= 2**31,
        aligned=by_16 and all(t.data_ptr() % 16 == 0 for t in _arrays(b)),
        whole_blocks=by_16 and (blocks_lie_alike or not spec.is_split),
        weighs=measures and not rule.amsgrad and not raw_lines,
    )


def lossless(math_dtype: torch.dtype) -> float:
    """Largest 1 / sqrt(v) that no g² which counts is lost below."""
    return math.sqrt(1e-4 / torch.finfo(math_dtype).tiny)


def _arrays(b: Binding) -> list[Tensor]:
    owned = (b.param, b.row_var, b.col_var, b.var, b.var_max, b.exp_avg)
    more = (b.compensation, b.average, b.accumulator)
    return [tensor for tensor in (*owned, *more) if tensor is not None]


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
