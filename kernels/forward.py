"""Fused forward: a program owns a block of rows and a run of vocabulary columns; logits stay in fp32 registers."""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import Certificate, cutoff, distrust
from fastgrpo.backends.problem import HeadProblem
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import (
    ABSENT,
    FLOOR,
    NOTHING,
    TO_TRITON,
    Logits,
    LowRank,
    Strides,
    cap,
    grouped,
    known_label,
    low_values,
    raw_logits,
    row_offsets,
    row_strides,
    softplus,
    up_values,
)  # fmt: skip

PARTIALS = 5  # max, sum of exp, sum of exp * (max - z), label's logit; certified: sum of exp outside the flags


@triton.jit
def label_logits(
    hidden_ptrs,  # (BLOCK_N,)
    label,  # (BLOCK_N,) int64 ids inside [0, V)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    rows,  # (BLOCK_N,) int64
    D,
    strides,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden . weight[label] + low . up[label] + bias[label] of each row, fp32."""
    offs_d = tl.arange(0, BLOCK_D)
    h_ptrs = hidden_ptrs[:, None] + offs_d[None, :] * strides.hidden_d
    w_ptrs = weight_ptr + label[:, None] * strides.weight_v + offs_d[None, :] * tl.cast(strides.weight_d, tl.int64)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = (start + offs_d < D)[None, :]
        h = tl.load(h_ptrs, mask=mask_d, other=0.0).to(COMPUTE).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask_d, other=0.0).to(COMPUTE).to(tl.float32)
        acc += tl.sum(h * w, axis=1)
        h_ptrs += BLOCK_D * strides.hidden_d
        w_ptrs += BLOCK_D * strides.weight_d
    if low_rank is not None:
        product = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, low_rank.depth, BLOCK_D):
            k = start + offs_d
            low = low_values(low_rank, rows[:, None], k[None, :], COMPUTE)
            up = up_values(low_rank, label[:, None], k[None, :], COMPUTE)
            product += tl.sum(low.to(tl.float32) * up.to(tl.float32), axis=1)
        acc += product * tl.load(low_rank.scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + label).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["N", "T", "run", "runs"])
def forward_kernel(
    hidden_ptr,  # (B, T, D)
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    targets_ptr,  # (N,)
    temperature_ptr,  # (N,) or None
    rows_ptr,  # (N,) rows to do
    count_ptr,  # (1,) how many
    hint_ptr,  # (N,) log-probs near the current ones, or None
    label_ptr,  # (N,) logits of the labels, some of them other ranks' columns; None: all are columns here
    flags_ptr,  # (blocks, V) out: columns some row of the block keeps; None: not certified
    partials_ptr,  # (5, runs, N) out
    N,
    V,
    D,
    T,
    run,  # columns a program does, a multiple of BLOCK_V
    runs,
    strides,  # Strides
    logits,  # Logits
    log_cutoff,  # a column is kept where log p reaches it
    ENTROPY: tl.constexpr,
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, this_run = grouped(tl.program_id(0), runs, GROUP)
    count = tl.load(count_ptr)
    if block * BLOCK_N >= count:
        return
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < count
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    label = known_label(targets_ptr, rows, mask_n, V)
    h_ptrs = hidden_ptr + row_offsets(rows, T, strides.hidden_b, strides.hidden_t)
    inv_temperature = logits.inv_temperature
    if temperature_ptr is not None:
        inv_temperature = (1.0 / tl.load(temperature_ptr + rows, mask=mask_n, other=1.0))[:, None]

    peak = tl.full((BLOCK_N,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    label_z = tl.zeros((BLOCK_N,), tl.float32)
    dropped = tl.zeros((BLOCK_N,), tl.float32)
    threshold = tl.zeros((BLOCK_N,), tl.float32)
    if flags_ptr is not None:
        if label_ptr is not None:
            guess = tl.load(label_ptr + rows, mask=mask_n, other=0.0)
        else:
            known = tl.where(label >= 0, label, 0).to(tl.int64)
            guess = label_logits(
                h_ptrs, known, weight_ptr, bias_ptr, low_rank, rows, D, strides, COMPUTE, BLOCK_N, BLOCK_D
            )
            guess = tl.sum(cap(guess[:, None], logits) * inv_temperature, axis=1)
        if hint_ptr is not None:
            hint = tl.load(hint_ptr + rows, mask=mask_n, other=0.0)
            guess -= hint
        threshold = tl.where(guess == guess, guess, 0.0) + log_cutoff
        threshold = tl.where(mask_n, threshold, float("inf"))  # rows that are not there flag nothing
    for first_v in range(this_run * run, tl.minimum(V, (this_run + 1) * run), BLOCK_V):
        z = raw_logits(
            h_ptrs, weight_ptr, bias_ptr, low_rank, rows, first_v, V, D, strides, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )  # fmt: skip
        z = cap(z, logits) * inv_temperature
        offs_v = first_v + tl.arange(0, BLOCK_V)
        is_label = offs_v[None, :] == label[:, None]
        label_z += tl.sum(tl.where(is_label, z, 0.0), axis=1)
        if flags_ptr is not None:
            hit = (z >= threshold[:, None]) | is_label
            kept = tl.max(hit.to(tl.int32), axis=0)
            flags = flags_ptr + tl.cast(block, tl.int64) * V + offs_v
            tl.store(flags, kept.to(tl.uint8), mask=offs_v < V)
        z = tl.where(is_label | (offs_v >= V)[None, :], NOTHING, z)
        new_peak = tl.maximum(peak, tl.max(z, axis=1), propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp(peak - new_peak)
        below = z - new_peak[:, None]
        e = tl.exp(below)
        if ENTROPY:
            spread = (spread + (new_peak - peak) * total) * decay - tl.sum(e * below, axis=1)
        total = total * decay + tl.sum(e, axis=1)
        peak = new_peak
        if flags_ptr is not None:
            dropped = dropped * decay + tl.sum(tl.where((kept == 0)[None, :], e, 0.0), axis=1)
            if hint_ptr is None:  # the running value serves
                threshold = tl.maximum(threshold, peak + tl.log(total) + log_cutoff)

    out = partials_ptr + this_run.to(tl.int64) * N + offs_n
    step = tl.cast(runs, tl.int64) * N
    tl.store(out, peak, mask=mask_n)
    tl.store(out + step, total, mask=mask_n)
    tl.store(out + 2 * step, spread, mask=mask_n)
    tl.store(out + 3 * step, label_z, mask=mask_n)
    if flags_ptr is not None:
        tl.store(out + 4 * step, dropped, mask=mask_n)


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
    DROPPED: tl.constexpr,  # whether there is a fifth
    RUNS: tl.constexpr,
):
    """What is known with the runs' partial results folded in, RUNS at once."""
    step = tl.cast(runs, tl.int64) * rows
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        part = partials_ptr + run.to(tl.int64)[:, None] * rows + offs[None, :]
        inside = (run < runs)[:, None] & mask[None, :]
        run_peak = tl.load(part, mask=inside, other=FLOOR)
        run_total = tl.load(part + step, mask=inside, other=0.0)
        run_spread = tl.load(part + 2 * step, mask=inside, other=0.0)
        label_z += tl.sum(tl.load(part + 3 * step, mask=inside, other=0.0), axis=0)
        new_peak = tl.maximum(peak, tl.max(run_peak, axis=0), propagate_nan=tl.PropagateNan.ALL)
        old_decay = tl.exp(peak - new_peak)
        run_decay = tl.exp(run_peak - new_peak[None, :])
        spread = (spread + (new_peak - peak) * total) * old_decay
        spread += tl.sum((run_spread + (new_peak[None, :] - run_peak) * run_total) * run_decay, axis=0)
        total = total * old_decay + tl.sum(run_total * run_decay, axis=0)
        if DROPPED:
            run_dropped = tl.load(part + 4 * step, mask=inside, other=0.0)
            dropped = dropped * old_decay + tl.sum(run_dropped * run_decay, axis=0)
        peak = new_peak
    return peak, total, spread, label_z, dropped


@triton.jit(do_not_specialize=["N", "runs"])
def combine_kernel(
    partials_ptr,  # (5, runs, N)
    targets_ptr,  # (N,)
    rows_ptr,  # (N,)
    count_ptr,  # (1,)
    dropped_ptr,  # (N,) out, in the order of rows: probability outside the flags, sum of exp if merged; or None
    merged_ptr,  # (4, N) out: the runs merged but not combined, see HeadProblem.new_partials; None: combine
    stats_ptr,  # (5, N) out: log-prob, peak, log-sum-exp - peak, 1 - p, entropy; None where merged_ptr is given
    N,
    V,
    runs,
    RUNS: tl.constexpr,  # runs merged at once
    BLOCK: tl.constexpr,
):
    count = tl.load(count_ptr)
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= count:
        return
    mask_n = offs_n < count
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    label = known_label(targets_ptr, rows, mask_n, V)
    peak = tl.full((BLOCK,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    label_z = tl.zeros((BLOCK,), tl.float32)
    dropped = tl.zeros((BLOCK,), tl.float32)
    peak, total, spread, label_z, dropped = fold_runs(
        partials_ptr, offs_n, mask_n, N, runs, peak, total, spread, label_z, dropped, dropped_ptr is not None, RUNS
    )

    label_z = tl.where(label_z < ABSENT, -float("inf"), label_z)
    label_z = tl.where(label >= 0, label_z, float("nan"))
    n = tl.cast(N, tl.int64)
    if merged_ptr is not None:
        out = merged_ptr + rows
        tl.store(out, peak, mask=mask_n)
        tl.store(out + n, total, mask=mask_n)
        tl.store(out + 2 * n, spread, mask=mask_n)
        tl.store(out + 3 * n, label_z, mask=mask_n)
        if dropped_ptr is not None:
            tl.store(dropped_ptr + offs_n, dropped, mask=mask_n)
    else:
        log_total = tl.log(total)
        gap = log_total + (peak - label_z)
        logp = -softplus(gap)
        other_mass = tl.sigmoid(gap)
        offset = tl.where(total == 0, label_z - peak, log_total + softplus(-gap))
        rest = tl.where(other_mass > 0, other_mass * (softplus(-gap) + log_total + spread / total), other_mass)
        own = tl.where(logp > -float("inf"), -tl.exp(logp) * logp, 0.0)
        out = stats_ptr + rows
        tl.store(out, logp, mask=mask_n)
        tl.store(out + n, peak, mask=mask_n)
        tl.store(out + 2 * n, offset, mask=mask_n)
        tl.store(out + 3 * n, other_mass, mask=mask_n)
        tl.store(out + 4 * n, own + rest, mask=mask_n)
        if dropped_ptr is not None:
            tl.store(dropped_ptr + offs_n, tl.where(total == 0, 0.0, dropped / total * other_mass), mask=mask_n)


def low_rank_arguments(operands):
    """:class:`LowRank` or None."""
    if operands is None:
        return None
    low, up, scale = operands.low, operands.up, operands.scale
    scale = torch.ones((), device=low.device) if scale is None else scale
    return LowRank(low, up, scale, low.shape[1], up.shape[1], *up.stride())


def logit_arguments(problem):
    """The argument tuples every projection kernel takes."""
    params = problem.params
    inverse = 1.0 if params.temperature is None else 1.0 / params.temperature
    strides = Strides(*row_strides(problem.hidden), *problem.weight.stride())
    return strides, Logits(inverse, params.softcap, params.logit_scale), low_rank_arguments(problem.lora_operands)


def has_extras(problem):
    """Whether a tile of logits needs more than a scalar factor."""
    params = problem.params
    return any(x is not None for x in (problem.bias, params.softcap, problem.temperature, problem.low))


def vocabulary_runs(blocks, columns, block_v, device):
    """-> how many runs to cut the vocabulary into, and the columns of one.

    Enough programs for eight waves, but 16 partial results a row at most, unless that leaves processors without work.
    """
    processors = processor_count(device)
    tiles_v = triton.cdiv(columns, block_v)
    wanted, needed = (triton.cdiv(waves * processors, max(blocks, 1)) for waves in (8, 2))
    runs = min(max(min(wanted, 16), needed), tiles_v)
    return triton.cdiv(tiles_v, triton.cdiv(tiles_v, runs)), triton.cdiv(tiles_v, runs) * block_v


def processor_count(device):
    return 4 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def forward(problem: HeadProblem):
    """(5, N) statistics of every counted row; launches two kernels and never waits for them."""
    stats = problem.new_stats(torch.float32)
    run_forward(problem, *compact_rows(problem.targets != IGNORE), stats=stats)
    return stats


def partial_forward(problem: HeadProblem):
    """(4, N) of :meth:`HeadProblem.new_partials`: what is still to be combined."""
    merged = problem.new_partials(torch.float32)
    run_forward(problem, *compact_rows(problem.targets != IGNORE), merged=merged)
    return merged


def certified_forward(problem: HeadProblem, hint):
    """The statistics and a :class:`fastgrpo.backends.certified.Certificate`; no waiting either.

    Args:
        hint: (N,) float32 log-probs <= 0 near the current ones, or None. Rows are sorted by it.
    """
    stats = problem.new_stats(torch.float32)
    certificate = run_certified(problem, hint, stats=stats)
    rows = certificate.order
    dropped = distrust(certificate.dropped, stats[0, rows], None if hint is None else hint[rows])
    return stats, replace(certificate, dropped=dropped)


def certified_partial_forward(problem: HeadProblem, label, hint):
    """As :func:`fastgrpo.backends.certified.partial_forward`, with true peaks.

    Args:
        label: (N,) float32 logit of each row's label, wherever its column is.
    """
    merged = problem.new_partials(torch.float32)
    return merged, run_certified(problem, hint, label=label, merged=merged)


def run_certified(problem, hint, **arguments):
    n, vocab, _ = problem.sizes
    device = problem.hidden.device
    counted = problem.targets != IGNORE
    _, count = compact_rows(counted)
    # a permutation of all rows, the ignored ones last: the backward looks at every position
    rows = torch.where(counted, 0.0 if hint is None else hint, torch.inf).argsort(stable=True)
    block = forward_tile(problem, certified=True).rows
    flags = torch.zeros(triton.cdiv(n, block), vocab, dtype=torch.uint8, device=device)
    dropped = torch.zeros(n, dtype=torch.float32, device=device)
    run_forward(problem, rows, count, hint, flags, dropped, **arguments)
    return Certificate(rows, flags.view(torch.bool), dropped, block)


def forward_tile(problem, certified):
    name = "forward_certified" if certified else "forward"
    name += "_full" if problem.params.entropy or has_extras(problem) else ""
    return tiles.for_tensor(name, problem.params.compute_dtype, problem.hidden.device)


def run_forward(problem, rows, count, hint=None, flags=None, dropped=None, label=None, merged=None, stats=None):
    """Both kernels, into ``merged`` (4, N) or ``stats`` (5, N)."""
    n, vocab, depth = problem.sizes
    if n == 0:
        return
    device = problem.hidden.device
    tile = forward_tile(problem, certified=flags is not None)
    blocks = triton.cdiv(n, tile.rows)
    runs, run = vocabulary_runs(blocks, vocab, tile.cols, device)
    partials = torch.empty(PARTIALS if flags is not None else PARTIALS - 1, runs, n, dtype=torch.float32, device=device)
    strides, logits, low_rank = logit_arguments(problem)
    forward_kernel[(triton.cdiv(blocks, tile.group) * tile.group * runs,)](
        hidden_ptr=problem.hidden,
        weight_ptr=problem.weight,
        bias_ptr=problem.bias,
        low_rank=low_rank,
        targets_ptr=problem.targets,
        temperature_ptr=problem.temperature,
        rows_ptr=rows,
        count_ptr=count,
        hint_ptr=hint,
        label_ptr=label,
        flags_ptr=flags,
        partials_ptr=partials,
        N=n,
        V=vocab,
        D=depth,
        T=problem.hidden.shape[1],
        run=run,
        runs=runs,
        strides=strides,
        logits=logits,
        log_cutoff=0.0 if flags is None else math.log(cutoff(problem.params.tolerance)),
        ENTROPY=problem.params.entropy,
        WHOLE_D=depth % tile.depth == 0,
        COMPUTE=TO_TRITON[str(problem.params.compute_dtype)],
        BLOCK_N=tile.rows,
        BLOCK_V=tile.cols,
        BLOCK_D=tile.depth,
        GROUP=tile.group,
        **tile.options,
    )
    combine(problem, partials, rows, count, dropped, merged, stats)


def combine(problem, partials, rows, count, dropped=None, merged=None, stats=None):
    """partials (PARTIALS, runs, N) into ``merged`` or ``stats``."""
    n, vocab, _ = problem.sizes
    combine_kernel[(triton.cdiv(n, tiles.COMBINE_BLOCK),)](
        partials_ptr=partials,
        targets_ptr=problem.targets,
        rows_ptr=rows,
        count_ptr=count,
        dropped_ptr=dropped,
        merged_ptr=merged,
        stats_ptr=stats,
        N=n,
        V=vocab,
        runs=partials.shape[1],
        RUNS=tiles.COMBINE_RUNS,
        BLOCK=tiles.COMBINE_BLOCK,
    )
