"""An audit's sums over sampled entries, in Triton: what each row leaves out, and what entries' gradients lose by it.

How :mod:`fastgrpo.kernels.audit` launches them is said there.
"""

import triton
import triton.language as tl

from fastgrpo.backends.row_audit import STEPS
from fastgrpo.kernels.row_order import LARGEST, SPARSE, USABLE

AUDIT_STEPS = tl.constexpr(STEPS)


@triton.jit
def sampled(dlogits_ptr, states_ptr, places, columns, height, mask_n, PANEL: tl.constexpr):
    """(n, C) dlogits of rows of the certificate's order and columns of the chunk, 0 of unusable ones; (n,) usable."""
    usable = mask_n & ((tl.load(states_ptr + places, mask=mask_n, other=0) & USABLE) != 0)
    at = (columns // PANEL).to(tl.int64)[None, :] * height * PANEL + (columns % PANEL)[None, :]
    at += places.to(tl.int64)[:, None] * PANEL
    return tl.load(dlogits_ptr + at, mask=usable[:, None], other=0.0), usable


@triton.jit
def keeps(flags_ptr, blocks, words, ids, mask_n, TILE: tl.constexpr):
    """(n, C) whether blocks of the certificate keep entries; columns as in flags.pack_flags."""
    W: tl.constexpr = TILE // 32
    column = ids % TILE
    at = (ids // TILE * W + column % W)[None, :] + blocks.to(tl.int64)[:, None] * words
    word = tl.load(flags_ptr + at, mask=mask_n[:, None], other=0)
    return ((word >> (column // W)[None, :]) & 1) != 0


@triton.jit
def kept_samples(kept_ptr, blocks, columns, samples, mask_n):
    """(n, C) what :func:`keeps` says of some columns of all samples, read from where it was written."""
    at = kept_ptr + blocks.to(tl.int64)[:, None] * samples + columns[None, :]
    return tl.load(at, mask=mask_n[:, None], other=0) != 0


@triton.jit(do_not_specialize=["N", "height", "blocks"])
def mass_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    ids_ptr,  # (samples,) all samples
    flags_ptr,  # (blocks, words) int32
    masses_ptr,  # (parts, columns) fp32 out: of each column the sum of sizes over a part of the rows
    kept_ptr,  # (blocks, samples) uint8 out: whether each block of the certificate keeps each sample
    columns,
    N,
    height,
    blocks,  # 0: with the chunk before, ``kept`` was written
    words,
    samples,  # whole panels of them
    TILE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Flags are read here once: of each sample they lie in a word of their own, far from those of the others."""
    panels = samples // PANEL
    for tile in range(tl.program_id(0), tl.cdiv(blocks, BLOCK_B) * panels, tl.num_programs(0)):
        sample = tile % panels * PANEL + tl.arange(0, PANEL)
        block = tile // panels * BLOCK_B + tl.arange(0, BLOCK_B)
        kept = keeps(flags_ptr, block, words, tl.load(ids_ptr + sample), block < blocks, TILE)
        at = kept_ptr + block.to(tl.int64)[:, None] * samples + sample[None, :]
        tl.store(at, kept.to(tl.uint8), mask=(block < blocks)[:, None])
    parts = tl.num_programs(0) // (columns // PANEL)
    part, panel = tl.program_id(0) % parts, tl.program_id(0) // parts
    column = panel * PANEL + tl.arange(0, PANEL)
    rows = tl.cdiv(N, parts)
    last = tl.minimum((part + 1) * rows, N)
    total = tl.zeros((PANEL,), tl.float32)
    for first in range(part * rows, last, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        dz, _ = sampled(dlogits_ptr, states_ptr, places, column, height, places < last, PANEL)
        total += tl.sum(tl.abs(dz.to(tl.float32)), axis=0)
    tl.store(masses_ptr + part * columns + column, total)


@triton.jit(do_not_specialize=["N", "height", "count", "parts"])
def share_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    kinds_ptr,  # (N,) uint8
    costs_ptr,  # (N,) fp32
    masses_ptr,  # (parts, columns) fp32
    kept_ptr,  # (blocks, samples) uint8
    shares_ptr,  # (N,) fp32, of the chunks before; out
    keys_ptr,  # (N,) fp32 out, with the last chunk: what the rows are ranked by, inf where they are not
    N,
    height,
    first_column,  # of the chunk's
    columns,
    count,  # samples to rank by
    parts,
    samples,
    CERTIFIED: tl.constexpr,  # rows of a block of the certificate
    PARTS: tl.constexpr,  # at least as many as there are
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each row's sum over the samples of the part of their mass that it leaves out."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = places < N
    total = tl.load(shares_ptr + places, mask=mask_n & (first_column > 0), other=0.0)
    for first in range(0, columns, PANEL):
        column = first + tl.arange(0, PANEL)
        part = tl.arange(0, PARTS)
        at = masses_ptr + part[:, None] * columns + column[None, :]
        mass = tl.sum(tl.load(at, mask=(part < parts)[:, None], other=0.0), axis=0)
        counted = (mass > 0) & (first_column + column < count)
        weight = tl.where(counted, 1.0 / tl.where(counted, mass, 1.0), 0.0)
        dz, _ = sampled(dlogits_ptr, states_ptr, places, column, height, mask_n, PANEL)
        sample = first_column + column
        kept = kept_samples(kept_ptr, places // CERTIFIED, sample, samples, mask_n)
        total += tl.sum(tl.where(kept, 0.0, tl.abs(dz.to(tl.float32)) * weight[None, :]), axis=1)
    tl.store(shares_ptr + places, total, mask=mask_n)
    key = total * tl.load(costs_ptr + places, mask=mask_n, other=0.0)
    key = tl.where(key < LARGEST, key, LARGEST)
    sparse = tl.load(kinds_ptr + places, mask=mask_n, other=0) == SPARSE
    tl.store(keys_ptr + places, tl.where(sparse, key, float("inf")), mask=mask_n)


@triton.jit(do_not_specialize=["N", "height", "columns", "blocks_a"])
def lost_kernel(
    dlogits_ptr,  # panels of the chunk
    states_ptr,  # (N,) uint8
    ranked_ptr,  # (N,) int64 places in the certificate's order, those that lose least first
    count_ptr,  # (1,) rows that are ranked
    x_ptr,  # (N, depth) what the gradient's GEMM multiplies dlogits with, in the certificate's order
    kept_ptr,  # (blocks, samples) uint8
    sums_ptr,  # (2, STEPS, columns, depth) fp32 out: what each step's rows leave out of the entries' gradients, and
    # what as many parts of all rows bring to them
    N,
    height,
    first_column,
    columns,
    blocks_a,
    samples,
    depth,
    stride_x,
    COMPUTE: tl.constexpr,
    CERTIFIED: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0) % (2 * AUDIT_STEPS)
    step = part % AUDIT_STEPS
    block = tl.program_id(0) // (2 * AUDIT_STEPS)
    column = block % blocks_a * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_d = block // blocks_a * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < depth)[None, :]
    count = (tl.load(count_ptr) if part < AUDIT_STEPS else N).to(tl.int64)
    first, last = (count * step // AUDIT_STEPS).to(tl.int32), (count * (step + 1) // AUDIT_STEPS).to(tl.int32)
    total = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    if part < AUDIT_STEPS:
        sample = first_column + column
        for n in range(first, last, BLOCK_N):
            rank = n + tl.arange(0, BLOCK_N)
            mask_n = rank < last
            places = tl.load(ranked_ptr + rank, mask=mask_n, other=0)
            dz, usable = sampled(dlogits_ptr, states_ptr, places, column, height, mask_n, PANEL)
            kept = kept_samples(kept_ptr, places // CERTIFIED, sample, samples, mask_n)
            dz = tl.where(kept, 0.0, dz).to(COMPUTE)
            x = tl.load(x_ptr + places[:, None] * stride_x + offs_d[None, :], mask=usable[:, None] & mask_d, other=0.0)
            total = tl.dot(tl.trans(dz), x.to(COMPUTE), total, input_precision="ieee")
    else:
        for n in range(first, last, BLOCK_N):
            places = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
            dz, usable = sampled(dlogits_ptr, states_ptr, places, column, height, places < last, PANEL)
            x = tl.load(x_ptr + places[:, None] * stride_x + offs_d[None, :], mask=usable[:, None] & mask_d, other=0.0)
            total = tl.dot(tl.trans(dz.to(COMPUTE)), x.to(COMPUTE), total, input_precision="ieee")
    out = (part * tl.cast(columns, tl.int64) + column)[:, None] * depth + offs_d[None, :]
    tl.store(sums_ptr + out, total, mask=mask_d)


@triton.jit(do_not_specialize=["columns", "first_audited", "count", "known"])
def error_kernel(
    sums_ptr,  # (2, STEPS, columns, depth) fp32 of lost_kernel
    errors_ptr,  # (1 + STEPS, audited) fp32, of the gradients before; out, see row_audit.fewest_whole
    columns,  # of the chunk
    first_audited,  # the first of them among the audited
    count,  # audited entries
    audited,  # columns of errors
    known,  # whether gradients came before
    depth,
    BLOCK_D: tl.constexpr,
):
    """Relative errors of an entry's gradients, NaN where these are 0; of several gradients the largest."""
    column = tl.program_id(0)
    steps = tl.arange(0, AUDIT_STEPS)
    lost_ptr = sums_ptr + (steps * tl.cast(columns, tl.int64) + column)[:, None] * depth
    whole_ptr = lost_ptr + AUDIT_STEPS * tl.cast(columns, tl.int64) * depth
    square = tl.zeros((), tl.float32)
    squares = tl.zeros((AUDIT_STEPS,), tl.float32)
    for first in range(0, depth, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        mask = (offs_d < depth)[None, :]
        whole = tl.sum(tl.load(whole_ptr + offs_d[None, :], mask=mask, other=0.0), axis=0)
        lost = tl.cumsum(tl.load(lost_ptr + offs_d[None, :], mask=mask, other=0.0), axis=0)
        square += tl.sum(whole * whole, axis=0)
        squares += tl.sum(lost * lost, axis=1)
    counts = (square > 0) & (first_audited + column < count)
    norm = tl.where(counts, tl.sqrt(square), float("nan"))
    out = errors_ptr + first_audited + column
    before = tl.load(out, mask=known != 0, other=float("nan"))
    tl.store(out, larger_error(0.0 / norm, before))
    out += (1 + steps) * audited
    before = tl.load(out, mask=(steps < AUDIT_STEPS) & (known != 0), other=float("nan"))
    tl.store(out, larger_error(tl.sqrt(squares) / norm, before))


@triton.jit
def larger_error(error, before):
    """Of NaN and a number the number."""
    return tl.where((error > before) | (before != before), error, before)
