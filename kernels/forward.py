"""Fused forward: a program owns a block of rows and a run of vocabulary entries; logits stay in fp32 registers."""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import Certificate, cutoff, distrust
from fastgrpo.backends.problem import HeadProblem, RowStats
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import TO_TRITON, Selection, has_extras, logit_arguments, row_strides
from fastgrpo.kernels.combine import DROPPED, combine
from fastgrpo.kernels.common import (
    FLOOR,
    NOTHING,
    cap,
    group_blocks,
    inverse_temperatures,
    low_values,
    raw_logits,
    row_offsets,
    selected_rows,
    store_rows,
    up_values,
)
from fastgrpo.kernels.row_math import rescale


@triton.jit
def label_logits(
    hidden_ptrs,  # (BLOCK_N,)
    stride_d,  # of hidden
    label,  # (BLOCK_N,) int64 ids inside [0, V)
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    rows,  # (BLOCK_N,) int64
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden . weight[label] + low . up[label] + bias[label] of each row, fp32."""
    offs_d = tl.arange(0, BLOCK_D)
    h_ptrs = hidden_ptrs[:, None] + offs_d[None, :] * stride_d
    w_ptrs = head.weight_ptr + label[:, None] * head.stride_v + offs_d[None, :] * tl.cast(head.stride_d, tl.int64)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, head.D, BLOCK_D):
        mask_d = (start + offs_d < head.D)[None, :]
        h = tl.load(h_ptrs, mask=mask_d, other=0.0).to(COMPUTE).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask_d, other=0.0).to(COMPUTE).to(tl.float32)
        acc += tl.sum(h * w, axis=1)
        h_ptrs += BLOCK_D * stride_d
        w_ptrs += BLOCK_D * head.stride_d
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
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    hint_ptr,  # (N,) log-probs near the current ones, or None
    label_ptr,  # (N,) logits of the labels, some of them other ranks' entries; None: all are entries here
    flags_ptr,  # (blocks, V) out: entries some row of the block keeps; None: not certified
    partials_ptr,  # (4, runs, N) out, RowPartials; certified: (5, runs, N)
    N,
    T,
    run,  # entries a program does, a multiple of BLOCK_V
    runs,
    strides,  # RowStrides of hidden
    logits,  # Logits
    log_cutoff,  # an entry is kept where log p reaches it
    ENTROPY: tl.constexpr,
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, this_run = group_blocks(tl.program_id(0), runs, GROUP)
    count = tl.load(selection.count_ptr)
    if block * BLOCK_N >= count:
        return
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < count
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    h_ptrs = hidden_ptr + row_offsets(rows, T, strides)
    inv_temperature = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)

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
            guess = label_logits(h_ptrs, strides.d, known, head, bias_ptr, low_rank, rows, COMPUTE, BLOCK_N, BLOCK_D)
            guess = cap(guess, logits) * inv_temperature
        if hint_ptr is not None:
            hint = tl.load(hint_ptr + rows, mask=mask_n, other=0.0)
            guess -= hint
        threshold = tl.where(guess == guess, guess, 0.0) + log_cutoff
        threshold = tl.where(mask_n, threshold, float("inf"))  # rows that are not there flag nothing
    for first_v in range(this_run * run, tl.minimum(head.V, (this_run + 1) * run), BLOCK_V):
        z = raw_logits(
            h_ptrs, strides.d, head, bias_ptr, low_rank, rows, first_v, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D
        )
        z = cap(z, logits) * inv_temperature[:, None]
        offs_v = first_v + tl.arange(0, BLOCK_V)
        is_label = offs_v[None, :] == label[:, None]
        label_z += tl.sum(tl.where(is_label, z, 0.0), axis=1)
        if flags_ptr is not None:
            hit = (z >= threshold[:, None]) | is_label
            kept = tl.max(hit.to(tl.int32), axis=0)
            flags = flags_ptr + tl.cast(block, tl.int64) * head.V + offs_v
            tl.store(flags, kept.to(tl.uint8), mask=offs_v < head.V)
        z = tl.where(is_label | (offs_v >= head.V)[None, :], NOTHING, z)
        new_peak = tl.maximum(peak, tl.max(z, axis=1), propagate_nan=tl.PropagateNan.ALL)
        below = z - new_peak[:, None]
        e = tl.exp(below)
        old_total, old_spread, decay = rescale(peak, total, spread, new_peak)
        if ENTROPY:
            spread = old_spread - tl.sum(e * below, axis=1)
        total = old_total + tl.sum(e, axis=1)
        peak = new_peak
        if flags_ptr is not None:
            dropped = dropped * decay + tl.sum(tl.where((kept == 0)[None, :], e, 0.0), axis=1)
            if hint_ptr is None:  # the running value serves
                threshold = tl.maximum(threshold, peak + tl.log(total) + log_cutoff)

    out = partials_ptr + this_run.to(tl.int64) * N + offs_n
    step = tl.cast(runs, tl.int64) * N
    store_rows(out, (peak, total, spread, label_z), step, mask_n)
    if flags_ptr is not None:
        tl.store(out + DROPPED * step, dropped, mask=mask_n)


def vocabulary_runs(blocks, entries, block_v, device):
    """-> how many runs to cut the vocabulary into, and the entries of one.

    Enough programs for eight waves, but 16 partial results a row at most, unless that leaves processors without work.
    """
    processors = processor_count(device)
    tiles_v = triton.cdiv(entries, block_v)
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
    dropped = distrust(certificate.dropped, RowStats(*stats).logp[rows], None if hint is None else hint[rows])
    return stats, replace(certificate, dropped=dropped)


def certified_partial_forward(problem: HeadProblem, label, hint):
    """As :func:`fastgrpo.backends.certified.partial_forward`, with true peaks.

    Args:
        label: (N,) float32 logit of each row's label, wherever its entry is.
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
    kinds = DROPPED.value + (flags is not None)
    partials = torch.empty(kinds, runs, n, dtype=torch.float32, device=device)
    head, logits, low_rank = logit_arguments(problem)
    selection = Selection(rows, count, problem.targets)
    forward_kernel[(triton.cdiv(blocks, tile.group) * tile.group * runs,)](
        hidden_ptr=problem.hidden,
        head=head,
        bias_ptr=problem.bias,
        low_rank=low_rank,
        selection=selection,
        temperature_ptr=problem.temperature,
        hint_ptr=hint,
        label_ptr=label,
        flags_ptr=flags,
        partials_ptr=partials,
        N=n,
        T=problem.hidden.shape[1],
        run=run,
        runs=runs,
        strides=row_strides(problem.hidden),
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
    combine(problem, partials, selection, dropped, merged, stats)
