"""From partial results to statistics: those of a row's tiles or runs of entries become one, then its log-prob."""

import triton
import triton.language as tl

from fastgrpo.backends import certified
from fastgrpo.backends.problem import RowPartials
from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import FLOOR, load_partials, selected_rows, store_rows
from fastgrpo.kernels.row_math import rescale, row_stats
from fastgrpo.kernels.tiles import cdiv

HINT_SLACK = tl.constexpr(certified.HINT_SLACK)
DROPPED = tl.constexpr(len(RowPartials._fields))  # behind them, where certified: sum of exp outside the flags


@triton.jit
def fold_runs(
    partials_ptr,  # (4 or 5, runs, rows)
    offs,  # (BLOCK,) rows of it
    mask,  # (BLOCK,)
    rows,
    runs,
    peak,  # (BLOCK,) this and the others: what is known so far
    total,
    spread,
    label_z,
    dropped,
    CERTIFIED: tl.constexpr,  # whether there is a fifth
    RUNS: tl.constexpr,
):
    """What is known with the runs' partial results folded in, RUNS at once."""
    step = tl.cast(runs, tl.int64) * rows
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        part = partials_ptr + run.to(tl.int64)[:, None] * rows + offs[None, :]
        inside = (run < runs)[:, None] & mask[None, :]
        run_peak, run_total, run_spread, run_label = load_partials(part, step, inside)
        label_z += tl.sum(run_label, axis=0)
        new_peak = tl.maximum(peak, tl.max(run_peak, axis=0), propagate_nan=tl.PropagateNan.ALL)
        total, spread, decay = rescale(peak, total, spread, new_peak)
        run_total, run_spread, run_decay = rescale(run_peak, run_total, run_spread, new_peak[None, :])
        total += tl.sum(run_total, axis=0)
        spread += tl.sum(run_spread, axis=0)
        if CERTIFIED:
            run_dropped = tl.load(part + DROPPED * step, mask=inside, other=0.0)
            dropped = dropped * decay + tl.sum(run_dropped * run_decay, axis=0)
        peak = new_peak
    return peak, total, spread, label_z, dropped


@triton.jit(do_not_specialize=["N", "runs"])
def combine_kernel(
    partials_ptr,  # (4 or 5, runs, N)
    selection,  # Selection
    hint_ptr,  # (N,) that the flags' cutoff was placed by, or None
    dropped_ptr,  # (N,) out, in the order of rows: probability outside the flags, sum of exp if merged; or None
    merged_ptr,  # (4, N) out: RowPartials, the runs merged but not combined; None: combine
    stats_ptr,  # (5, N) out: RowStats; None where merged_ptr is given
    N,
    V,
    runs,
    RUNS: tl.constexpr,  # runs merged at once
    BLOCK: tl.constexpr,
):
    count = tl.load(selection.count_ptr)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= count:
        return
    mask_n = offs_n < count
    rows, label = selected_rows(selection, offs_n, mask_n, V)
    peak = tl.full((BLOCK,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    label_z = tl.zeros((BLOCK,), tl.float32)
    dropped = tl.zeros((BLOCK,), tl.float32)
    peak, total, spread, label_z, dropped = fold_runs(
        partials_ptr, offs_n, mask_n, N, runs, peak, total, spread, label_z, dropped, dropped_ptr is not None, RUNS
    )

    label_z = tl.where(label >= 0, label_z, float("nan"))
    if merged_ptr is not None:
        store_rows(merged_ptr + rows, (peak, total, spread, label_z), N, mask_n)
    else:
        logp, peak, offset, other_mass, entropy = row_stats(peak, total, spread, label_z)
        store_rows(stats_ptr + rows, (logp, peak, offset, other_mass, entropy), N, mask_n)
        dropped = tl.where(total == 0, 0.0, dropped / total * other_mass)
        if hint_ptr is not None:  # see certified.distrust
            astray = logp - tl.load(hint_ptr + rows, mask=mask_n, other=0.0) > HINT_SLACK
            dropped = tl.where(astray & (dropped > 0), float("inf"), dropped)
    if dropped_ptr is not None:
        tl.store(dropped_ptr + offs_n, dropped, mask=mask_n)


def combine(problem, partials, selection, dropped=None, merged=None, stats=None, hint=None):
    """partials (4 or 5, runs, N) into ``merged`` (4, N) or ``stats`` (5, N). hint: (N,) of a certified forward."""
    n, vocab, _ = problem.sizes
    combine_kernel[(cdiv(n, tiles.COMBINE_BLOCK),)](
        partials_ptr=partials,
        selection=selection,
        hint_ptr=hint if stats is not None and dropped is not None else None,
        dropped_ptr=dropped,
        merged_ptr=merged,
        stats_ptr=stats,
        N=n,
        V=vocab,
        runs=partials.shape[1],
        RUNS=tiles.COMBINE_RUNS,
        BLOCK=tiles.COMBINE_BLOCK,
    )
