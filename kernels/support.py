"""Sampling-support replay: logits of the kept (position, token) pairs alone, and their gradients.

Memory decides here, not arithmetic: a pair costs one row of the head. No atomics; every sum has a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastgrpo.inputs import IGNORE
from fastgrpo.kernels.arguments import TO_TRITON, row_strides
from fastgrpo.kernels.common import row_offsets
from fastgrpo.kernels.tiles import cdiv

ENTRIES, DEPTH, WARPS = 16, 128, 8  # pairs and values a program reads at once


@triton.jit(do_not_specialize=["entries", "T"])
def kept_logits_kernel(
    rows_ptr,  # (B, T, D)
    head_ptr,  # (V, D)
    index_ptr,  # (K,) position of each entry
    ids_ptr,  # (K,)
    targets_ptr,  # (N,) an ignored position's entries are not read
    out_ptr,  # (K,) fp32, added to
    entries,
    D,
    T,
    strides,  # RowStrides of the rows
    stride_head_v,
    stride_head_d,
    IGNORED: tl.constexpr,
    ROWS: tl.constexpr,  # dtype that the rows are cast to
    HEAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs_e < entries
    index = tl.load(index_ptr + offs_e, mask=inside, other=0)
    mask_e = inside & (tl.load(targets_ptr + index, mask=inside, other=IGNORED) != IGNORED)
    ids = tl.load(ids_ptr + offs_e, mask=mask_e, other=0)
    offs_d = tl.arange(0, BLOCK_D)
    row_ptrs = rows_ptr + row_offsets(index, T, strides)[:, None]
    row_ptrs += offs_d[None, :] * tl.cast(strides.d, tl.int64)
    head_ptrs = head_ptr + ids[:, None] * stride_head_v + offs_d[None, :] * tl.cast(stride_head_d, tl.int64)
    acc = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = mask_e[:, None] & (start + offs_d < D)[None, :]
        x = tl.load(row_ptrs, mask=mask, other=0.0)
        w = tl.load(head_ptrs, mask=mask, other=0.0).to(HEAD).to(tl.float32)
        acc += tl.sum(x.to(ROWS).to(tl.float32) * w, axis=1)
        row_ptrs += BLOCK_D * tl.cast(strides.d, tl.int64)
        head_ptrs += BLOCK_D * tl.cast(stride_head_d, tl.int64)
    acc += tl.load(out_ptr + offs_e, mask=mask_e, other=0.0)
    tl.store(out_ptr + offs_e, acc, mask=mask_e)


@triton.jit(do_not_specialize=["T"])
def kept_sums_kernel(
    source_ptr,  # (B, T, D)
    coefficients_ptr,  # (K,) fp32
    index_ptr,  # (K,) rows of the source
    offsets_ptr,  # (M + 1,) where each output row's entries begin
    out_ptr,  # (M, D)
    D,
    T,
    strides,  # RowStrides of the source
    ADD: tl.constexpr,  # whether to add to what out holds
    CAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[m] = sum of coefficients[e] * source[index[e]] over the entries of m; a coefficient of 0 reads nothing."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    m = (tl.program_id(0) // tiles_d).to(tl.int64)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    begin, last = tl.load(offsets_ptr + m), tl.load(offsets_ptr + m + 1)
    if ADD and begin >= last:
        return
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(begin, last, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        coefficients = tl.load(coefficients_ptr + offs_e, mask=offs_e < last, other=0.0)
        index = tl.load(index_ptr + offs_e, mask=offs_e < last, other=0)
        pointers = source_ptr + row_offsets(index, T, strides)[:, None]
        pointers += offs_d[None, :] * tl.cast(strides.d, tl.int64)
        x = tl.load(pointers, mask=(coefficients != 0)[:, None] & mask_d[None, :], other=0.0)
        acc += tl.sum(coefficients[:, None] * x.to(CAST).to(tl.float32), axis=0)
    if ADD:
        acc += tl.load(out_ptr + m * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def block_depth(depth):
    return min(triton.next_power_of_2(depth), DEPTH)


def kept_logits(problem, support):
    """(K,) raw logits of the kept entries, each one row of hidden times one of the head; 0 where ignored."""
    entries = support.ids.numel()
    out = torch.zeros(entries, dtype=torch.float32, device=problem.hidden.device)
    compute, lora = problem.params.compute_dtype, problem.params.lora_dtype
    casts = [(compute, compute), (torch.float32, lora)]
    for (rows, head), (to_rows, to_head) in zip(problem.factors if entries else (), casts):
        kept_logits_kernel[(cdiv(entries, ENTRIES),)](
            rows_ptr=rows,
            head_ptr=head,
            index_ptr=support.rows,
            ids_ptr=support.ids,
            targets_ptr=problem.targets,
            out_ptr=out,
            entries=entries,
            D=head.shape[1],
            T=rows.shape[1],
            strides=row_strides(rows),
            stride_head_v=head.stride(0),
            stride_head_d=head.stride(1),
            IGNORED=IGNORE,
            ROWS=TO_TRITON[str(to_rows)],
            HEAD=TO_TRITON[str(to_head)],
            BLOCK_E=ENTRIES,
            BLOCK_D=block_depth(head.shape[1]),
            num_warps=WARPS,
        )
    return out


def kept_sums(problem, source, coefficients, index, offsets, cast, dtype, out=None):
    """out[m] = sum of ``coefficients[e] * source[index[e]]`` over offsets[m] <= e < offsets[m + 1], in that order.

    Args:
        source: (B, T, D), any strides, of B * T rows, read as ``cast``. coefficients, index: (K,). offsets: (M + 1,).
        out: (M, D) dense, that the sums are added to, or None.

    Returns:
        (M, D) in ``dtype``, summed in fp32: ``out``. An entry whose coefficient is 0 is not read.
    """
    length, depth = source.shape[1:]
    add = out is not None
    if not add:
        out = torch.empty(offsets.numel() - 1, depth, dtype=dtype, device=source.device)
    block = block_depth(depth)
    programs = out.shape[0] * cdiv(depth, block)
    if programs:
        kept_sums_kernel[(programs,)](
            source_ptr=source,
            coefficients_ptr=coefficients,
            index_ptr=index,
            offsets_ptr=offsets,
            out_ptr=out,
            D=depth,
            T=length,
            strides=row_strides(source),
            ADD=add,
            CAST=TO_TRITON[str(cast)],
            BLOCK_E=ENTRIES,
            BLOCK_D=block,
            num_warps=WARPS,
        )
    return out
