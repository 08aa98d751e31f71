"""The first sweep: sums over the gradient and the parameter."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.calls import sweep
from fused_adafactor.backends.triton.formulas import inverse, inverse_root
from fused_adafactor.backends.triton.memory import (
    clipped,
    columns_of,
    hinted,
    in_scratch,
    lines_of,
    moment_of,
    pointer,
    read,
    read_unclipped,
    sums_of_lines,
)
from fused_adafactor.backends.triton.update import (
    new_factor,
    new_var,
    numerator,
    random_of_factor,
    tiny_factors,
    update_of,
)


@sweep
def sum_chunk(row, rule, grad, scratch, unit, V: tl.constexpr):
    """Σ_j g² of the lines of a slab, over the columns of one chunk."""
    chunks = tl.load(row + f.CHUNKS)
    begin, end, _ = lines_of(row, unit // chunks, V)
    TILE_LINES: tl.constexpr = (V.TILE + V.CHUNK - 1) // V.CHUNK
    first_col, last_col = columns_of(row, unit % chunks)
    first_col = hinted(first_col, V)
    cols = hinted(tl.load(row + f.COLS), V)
    column = tl.arange(0, V.CHUNK)
    col_mask = first_col + column < hinted(last_col, V)
    sums = in_scratch(row, scratch, f.CHUNK_SUMS, V.MATH)
    sums += unit % chunks * tl.load(row + f.ROWS) * tl.load(row + f.BATCH)
    for first in tl.range(begin, end, TILE_LINES, num_stages=V.STAGES):
        line = first + tl.arange(0, TILE_LINES)
        mask = (line < end)[:, None] & col_mask[None, :]
        k = (line * cols + first_col)[:, None] + column[None, :]
        g = clipped(read_unclipped(row, rule, grad, k, mask, V), rule, 1.0, V)
        tl.store(sums + line, tl.sum(g * g, 1), mask=line < end)


@triton.jit
def _sum_of_chunks(row, scratch, line, mask, V: tl.constexpr):
    """Σ_j g² of lines, from those of the chunks of their columns."""
    sums = in_scratch(row, scratch, f.CHUNK_SUMS, V.MATH)
    lines = tl.load(row + f.ROWS) * tl.load(row + f.BATCH)
    total = tl.zeros(line.shape, V.MATH)
    for chunk in range(0, tl.load(row + f.CHUNKS)):
        total += tl.load(sums + chunk * lines + line, mask=mask, other=0.0)
    return total


@sweep
def sum_lines(row, rule, integers, grad, scratch, unit, WIDTH: tl.constexpr, V: tl.constexpr):
    """Sums over a slab of lines of matrices, along them and across; final second moments of lines.

    Where these cannot be known yet, it leaves the sums that they follow from.

    ``WIDTH`` is that of a tile, which holds whole lines, or a chunk of very long ones.
    """
    TILE_LINES: tl.constexpr = (V.TILE + WIDTH - 1) // WIDTH
    STAGES: tl.constexpr = V.STAGES if WIDTH <= V.TILE else V.STAGES - 1  # of larger tiles
    chunks = tl.load(row + f.CHUNKS)
    slab = unit // chunks
    chunk = unit % chunks
    rows = tl.load(row + f.ROWS)
    per_matrix = tl.load(row + f.SLABS_PER_MATRIX)
    cols = hinted(tl.load(row + f.COLS), V)
    begin, end, block = lines_of(row, slab, V)
    first_col, last_col = columns_of(row, chunk)
    first_col = hinted(first_col, V)
    column = tl.arange(0, WIDTH)
    col_mask = first_col + column < hinted(last_col, V)
    lines = sums_of_lines(row, scratch, V)
    old_lines = pointer(tl.load(row + f.LINE_VAR), V.MOMENT, V)
    grad_sq = tl.zeros((TILE_LINES,), tl.float64)
    param_sq = tl.zeros((TILE_LINES,), tl.float64)
    for first_of_block in range(begin, end, block):
        last = tl.minimum(first_of_block + block, end)
        square = tl.zeros((TILE_LINES, WIDTH), V.MATH)
        weighted = tl.zeros((TILE_LINES, WIDTH), V.MATH)
        for first in tl.range(first_of_block, last, TILE_LINES, num_stages=STAGES):
            line = first + tl.arange(0, TILE_LINES)
            line_mask = line < last
            mask = line_mask[:, None] & col_mask[None, :]
            k = (line * cols + first_col)[:, None] + column[None, :]
            # Before registers are full.
            of_whole = moment_of(row, line, False, V)
            random = random_of_factor(row, integers, of_whole, False, V)
            raw = read_unclipped(row, rule, grad, k, mask, V)
            if V.VALUE_CLIP:
                # An Inf must not hide behind the clip.
                grad_sq += tl.sum(raw * raw, 1).to(tl.float64)
            g = clipped(raw, rule, 1.0, V)
            g_sq = g * g
            line_sq = tl.sum(g_sq, 1)
            if not V.VALUE_CLIP:
                grad_sq += line_sq.to(tl.float64)
            if V.CHUNKED:
                if chunks > 1:
                    line_sq = _sum_of_chunks(row, scratch, line, line_mask, V)
            square += g_sq
            if V.RAW_LINES:
                new = line_sq
            else:
                old = tl.load(old_lines + line, mask=line_mask, other=0.0).to(V.MATH)
                new = new_factor(old, line_sq, tl.load(row + f.COLS), random, rule, V)
            if chunk == 0:
                tl.store(lines + line, new, mask=line_mask)
            if V.WEIGHS:
                num, _ = numerator(row, rule, g, k, mask, False, V)
                # A line of zeros has no share in Σ u².
                weight = tl.where(line_mask & (new != 0.0), inverse(new), 0.0)
                weighted = tl.fma(num * num, weight[:, None], weighted)
        if V.PARAM_RMS:
            squares = tl.zeros((TILE_LINES, WIDTH), V.MATH)
            for first in tl.range(first_of_block, last, TILE_LINES, num_stages=STAGES):
                line = first + tl.arange(0, TILE_LINES)
                mask = (line < last)[:, None] & col_mask[None, :]
                k = (line * cols + first_col)[:, None] + column[None, :]
                p = read(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, V)
                squares = tl.fma(p, p, squares)
            param_sq += tl.sum(squares, 1).to(tl.float64)
        at = first_of_block // rows * per_matrix + slab % per_matrix
        partial = in_scratch(row, scratch, f.PARTIAL, V.MATH) + 2 * at * cols + first_col
        tl.store(partial + column, tl.sum(square, 0), mask=col_mask)
        if V.WEIGHS:
            tl.store(partial + cols + column, tl.sum(weighted, 0), mask=col_mask)
    _store_sums(row, scratch, unit, tl.sum(grad_sq, 0), tl.sum(param_sq, 0), 0.0)


@sweep
def sum_flat(row, rule, integers, grad, scratch, unit, TINY: tl.constexpr, V: tl.constexpr):
    """Sums over elements that have no lines: of an unfactored tensor, or of tiny matrices."""
    TILE: tl.constexpr = V.TINY_TILE if TINY else V.FLAT_TILE
    # What a tiny matrix looks at is in the cache.
    STAGES: tl.constexpr = 1 if TINY else V.FLAT_STAGES
    grad_sq = tl.zeros((1, TILE), V.MATH)
    param_sq = tl.zeros((1, TILE), V.MATH)
    update_sq = tl.zeros((1, TILE), V.MATH)
    begin, end, step = elements_of(row, unit, V)
    for first in tl.range(begin, end, step, num_stages=STAGES):
        k = hinted(first, V) + tl.arange(0, TILE)[None, :]
        mask = k < hinted(tl.minimum(first + step, end), V)
        raw = read_unclipped(row, rule, grad, k, mask, V)
        grad_sq = tl.fma(raw, raw, grad_sq)
        if V.MEASURES and not V.NORM_CLIPPED:
            g = clipped(raw, rule, 1.0, V)
            inverse_v, _, _ = flat_factors(
                row, rule, integers, grad, 1.0, g, first, k, mask, TINY, V
            )
            u, _, _ = update_of(row, rule, g, inverse_v, k, mask, TINY, V)
            update_sq = tl.fma(u, u, update_sq)
        if V.PARAM_RMS:
            p = read(row, f.PARAM, f.STRIDES, V.PARAM, k, mask, V)
            param_sq = tl.fma(p, p, param_sq)
    _store_sums(
        row,
        scratch,
        unit,
        tl.sum(tl.sum(grad_sq, 1), 0).to(tl.float64),
        tl.sum(tl.sum(param_sq, 1), 0).to(tl.float64),
        tl.sum(tl.sum(update_sq, 1), 0).to(tl.float64),
    )


@triton.jit
def elements_of(row, slab, V: tl.constexpr):
    """First element of a slab that has no lines, the end, and from tile to tile."""
    begin, end, _ = lines_of(row, slab, V)
    cols = tl.load(row + f.COLS)
    return begin * cols, tl.minimum(end * cols, tl.load(row + f.NUMEL)), tl.load(row + f.STRIDE)


@triton.jit
def flat_factors(
    row, rule, integers, grad, factor, g, first, k, mask, TINY: tl.constexpr, V: tl.constexpr
):
    """1 / sqrt(v) of such elements, and what has to be stored of it: v, or row_var and col_var."""
    if TINY:
        inverse_v, var, col_var = tiny_factors(row, rule, integers, grad, factor, k, mask, V)
    else:
        var = new_var(row, rule, integers, g, first, k, mask, V)
        inverse_v = inverse_root(var)
        col_var = var
    return inverse_v, var, col_var


@triton.jit
def sum_unit(row, rule, integers, grad, scratch, unit, V: tl.constexpr):
    """The sums of a unit, whatever its form."""
    form = tl.load(row + f.FORM)
    if V.LINES:
        if form == f.FACTORED:
            width = tl.load(row + f.WIDTH)
            for i in tl.static_range(len(V.WIDTHS)):
                if width == V.WIDTHS[i]:
                    sum_lines(row, rule, integers, grad, scratch, unit, V.WIDTHS[i], V)
    if V.UNFACTORED:
        if form == f.UNFACTORED:
            sum_flat(row, rule, integers, grad, scratch, unit, False, V)
    if V.TINY:
        if form == f.TINY:
            sum_flat(row, rule, integers, grad, scratch, unit, True, V)


@triton.jit
def _store_sums(row, scratch, unit, grad_sq, param_sq, update_sq):
    sums = in_scratch(row, scratch, f.SUMS, tl.float64) + unit * f.UNIT_SUMS
    tl.store(sums + f.UNIT_GRAD_SQ, grad_sq)
    tl.store(sums + f.UNIT_PARAM_SQ, param_sq)
    tl.store(sums + f.UNIT_UPDATE_SQ, update_sq)
