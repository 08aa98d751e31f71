"""The one kernel: programs take tickets in order, and each ticket is a run of items."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_adafactor.backends.triton import fields as f
from fused_adafactor.backends.triton.factors import finalize, measure, merge, settle
from fused_adafactor.backends.triton.first_sweep import sum_chunk, sum_unit
from fused_adafactor.backends.triton.messages import share, total
from fused_adafactor.backends.triton.second_sweep import (
    accumulate_slab,
    apply_unit,
    average_slab,
    measure_unit,
)


@triton.jit
def wait_for(counter, value, V: tl.constexpr):
    """Wait until a counter is there; who counts it up holds a lower ticket, and is running."""
    if V.WAITS:
        while tl.atomic_add(counter, 0, sem="acquire") < value:
            pass
    tl.debug_barrier()


@triton.jit
def count_up(counter, V: tl.constexpr):
    """Tell the others that all of this program has stored what they wait for."""
    tl.debug_barrier()
    if V.WAITS:
        tl.atomic_add(counter, 1, sem="release")


@triton.jit
def run_item(
    kind,
    tensor,
    unit,
    table,
    grads,
    numbers,
    integers,
    factors,
    skips,
    scratch,
    outcomes,
    counters,
    V: tl.constexpr,
):
    """One item."""
    row = table + tensor * f.TENSOR_FIELDS
    rule = numbers + tl.load(row + f.RULE) * f.NUMBERS
    key = integers + tl.load(row + f.RULE) * f.INTEGERS
    outcome = outcomes + tensor * f.OUTCOMES
    progress = counters + tl.load(row + f.PROGRESS)
    units = tl.load(row + f.UNITS)
    chunks = tl.load(row + f.CHUNKS)
    grad = tl.load(grads + tensor)
    factor = tl.load(factors + tensor).to(V.MATH)
    if V.KINDS[f.CHUNK_KIND]:
        if kind == f.CHUNK_KIND:
            _wait_for_place(row, counters, V)
            sum_chunk(row, rule, grad, scratch, unit, V)
            count_up(progress + f.CHUNKS_DONE + unit // chunks, V)
    if V.KINDS[f.STATS_KIND]:
        if kind == f.STATS_KIND:
            _wait_for_place(row, counters, V)
            if V.CHUNKED:
                if chunks > 1:
                    wait_for(progress + f.CHUNKS_DONE + unit // chunks, chunks, V)
            sum_unit(row, rule, key, grad, scratch, unit, V)
            count_up(progress + f.STATS_DONE, V)
    if V.KINDS[f.TOTAL_KIND]:
        if kind == f.TOTAL_KIND:
            wait_for(progress + f.STATS_DONE, units, V)
            if V.SPLIT and V.LINES:
                shares = tl.where(tl.load(row + f.SHARED_CROSS_SQ) == 0, 0, tl.load(row + f.MERGES))
                wait_for(progress + f.MERGES_DONE, shares, V)
            total(row, scratch, outcome, V)
    if V.SPLIT and V.LINES and V.KINDS[f.SHARE_KIND]:
        if kind == f.SHARE_KIND:
            wait_for(progress + f.STATS_DONE, units, V)
            share(row, scratch, unit, V)
            count_up(progress + f.MERGES_DONE, V)
    if V.LINES and V.KINDS[f.MERGE_KIND]:
        if kind == f.MERGE_KIND:
            if not V.JOINED:
                wait_for(progress + f.STATS_DONE, units, V)
            merge(row, rule, key, scratch, factor, unit, V)
            count_up(progress + f.MERGES_DONE, V)
    if V.KINDS[f.FINALIZE_KIND]:
        if kind == f.FINALIZE_KIND:
            if not V.JOINED:
                wait_for(progress + f.STATS_DONE, units, V)
            merges = tl.load(row + f.MERGES)
            if V.SPLIT and V.JOINED:  # it was finalized in the first segment, but for its sums
                merges = tl.where(tl.load(row + f.SHARED_UPDATE_SQ) == 0, merges, 0)
            wait_for(progress + f.MERGES_DONE, merges, V)
            measured = finalize(row, rule, scratch, outcome, factor, skips + tensor, V)
            count_up(progress + f.FINALIZED, V)
            if measured > 0:
                count_up(progress + f.MEASURED, V)
    if V.MEASURES and V.KINDS[f.UPDATE_RMS_KIND]:
        if kind == f.UPDATE_RMS_KIND:
            wait_for(progress + f.FINALIZED, 1, V)
            if tl.load(outcome + f.UNKNOWN) > 0:
                measure_unit(row, rule, key, grad, factor, scratch, unit, V)
            count_up(progress + f.RMS_DONE, V)
    if V.MEASURES and V.KINDS[f.MEASURE_KIND]:
        if kind == f.MEASURE_KIND:
            wait_for(progress + f.FINALIZED, 1, V)
            wait_for(progress + f.RMS_DONE, units, V)
            if tl.load(outcome + f.UNKNOWN) > 0:
                measure(row, rule, scratch, outcome, V)
                count_up(progress + f.MEASURED, V)
    if V.KINDS[f.SETTLE_KIND]:
        if kind == f.SETTLE_KIND:
            if V.MEASURES:
                settle(row, rule, outcome, V)
            count_up(progress + f.MEASURED, V)
    if V.KINDS[f.APPLY_KIND]:
        if kind == f.APPLY_KIND:
            wait_for(progress + f.MEASURED, 1, V)
            if tl.load(skips + tensor) == 0:
                apply_unit(row, rule, key, grad, factor, scratch, outcome, unit, V)
            count_up(counters + tl.load(row + f.WAVE), V)
    if V.ACCUMULATES and V.KINDS[f.ACCUMULATE_KIND]:
        if kind == f.ACCUMULATE_KIND:
            if tl.load(skips + tensor) == 0:
                accumulate_slab(row, rule, grad, unit, V)
    if V.AVERAGES and V.KINDS[f.AVERAGE_KIND]:
        if kind == f.AVERAGE_KIND:
            if tl.load(skips + tensor) == 0:
                average_slab(row, rule, unit, V)


@triton.jit
def _wait_for_place(row, counters, V: tl.constexpr):
    """Wait until the wave whose scratch this tensor takes over has been applied."""
    if V.WAITS:
        after = tl.load(row + f.AFTER)
        if after >= 0:
            wait_for(counters + after, tl.load(row + f.AFTER_COUNT), V)


@triton.jit
def run_ticket(
    ticket,
    tickets,
    items,
    table,
    grads,
    numbers,
    integers,
    factors,
    skips,
    scratch,
    outcomes,
    counters,
    V: tl.constexpr,
):
    """The items of a ticket, one after the other."""
    for item in range(tl.load(tickets + ticket), tl.load(tickets + ticket + 1)):
        run_item(
            tl.load(items + 3 * item),
            tl.load(items + 3 * item + 1).to(tl.int64),
            tl.load(items + 3 * item + 2).to(tl.int64),
            table,
            grads,
            numbers,
            integers,
            factors,
            skips,
            scratch,
            outcomes,
            counters,
            V,
        )


@triton.jit(do_not_specialize=["begin", "end", "counter_count"])
def step(
    tickets,
    items,
    table,
    grads,
    numbers,
    integers,
    factors,
    skips,
    scratch,
    outcomes,
    counters,
    begin,
    end,
    counter_count,
    V: tl.constexpr,
):
    """Run the tickets from begin to end.

    Where items wait for each other, programs take tickets from a counter until there are none, and
    the last one to leave sets all counters back, for the next launch. Otherwise every program has
    one ticket.
    """
    if V.WAITS:
        ticket = begin + tl.atomic_add(counters + f.NEXT_TICKET, 1, sem="relaxed")
        while ticket < end:
            tl.debug_barrier()  # all have the ticket before what it lay in is written again
            run_ticket(
                ticket, tickets, items, table, grads, numbers, integers, factors, skips, scratch,
                outcomes, counters, V,
            )  # fmt: skip
            ticket = begin + tl.atomic_add(counters + f.NEXT_TICKET, 1, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(counters + f.PROGRAMS_DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            for first in range(0, counter_count, V.VECTOR):
                place = first + tl.arange(0, V.VECTOR)
                tl.store(
                    counters + place, tl.zeros(place.shape, tl.int32), mask=place < counter_count
                )
    else:
        run_ticket(
            begin + tl.program_id(0), tickets, items, table, grads, numbers, integers, factors,
            skips, scratch, outcomes, counters, V,
        )  # fmt: skip
