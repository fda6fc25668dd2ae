"""The GEMMs of a gradient, and the rows they read and write: kernels that know of no logits.

They are our own because the number of rows with a gradient is known on the device only: cuBLAS would need the host to
wait for it. They read the rows from a dense copy, gathered once, and no kernel of a GEMM's size looks a row up. No
atomics; every sum has a fixed order.
"""

import triton
import triton.language as tl

from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import TO_TRITON
from fastgrpo.kernels.common import row_offsets


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "T"])
def gather_kernel(
    source_ptr,  # (B, T, D)
    rows_ptr,  # (N,) rows in the order they are worked on
    count_ptr,  # (1,) how many have a gradient
    out_ptr,  # (held, D) out
    first_row,
    last_row,
    first_held,  # the row of rows_ptr that out's first one holds
    D,
    T,
    strides,  # RowStrides of the source
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = source[rows], those with a gradient."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    offs_n = first_row + tl.program_id(0) // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < tl.minimum(tl.load(count_ptr), last_row)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    pointers = source_ptr + row_offsets(rows, T, strides)[:, None]
    x = tl.load(pointers + offs_d[None, :] * tl.cast(strides.d, tl.int64), mask=mask)
    tl.store(out_ptr + (offs_n - first_held).to(tl.int64)[:, None] * D + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "first_v", "last_v"])
def dhidden_kernel(
    dlogits_ptr,  # (rows, width)
    weight_ptr,  # (V, D)
    count_ptr,  # (1,)
    rows_ptr,  # (N,) where in sum each row stands; None: in their order
    decay_ptr,  # (N,) fp32, in the rows' order, factor of the sum so far; None: 1
    sum_ptr,  # (held, D) fp32, the entries before first_v; nothing where first_v is 0
    first_row,
    last_row,
    first_held,
    first_v,
    last_v,
    width,
    D,
    stride_weight_v,
    stride_weight_d,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sum = decay * sum + dlogits @ weight[first_v:last_v]."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) // tiles_d
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    stop = tl.minimum(tl.load(count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = first_row + local < stop
    mask_d = offs_d < D
    offs_v = tl.arange(0, BLOCK_V)
    safe = tl.where(mask_n, local, 0).to(tl.int64)
    dz_ptrs = dlogits_ptr + safe[:, None] * width + offs_v[None, :]
    w_ptrs = weight_ptr + tl.cast(first_v, tl.int64) * stride_weight_v
    w_ptrs = w_ptrs + offs_v[:, None] * tl.cast(stride_weight_v, tl.int64)
    w_ptrs = w_ptrs + offs_d[None, :] * tl.cast(stride_weight_d, tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for v in range(0, last_v - first_v, BLOCK_V):
        dz = tl.load(dz_ptrs)
        w = tl.load(w_ptrs, mask=(v + offs_v < last_v - first_v)[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(dz, w.to(COMPUTE), acc, input_precision="ieee")
        dz_ptrs += BLOCK_V
        w_ptrs += BLOCK_V * tl.cast(stride_weight_v, tl.int64)
    mask = mask_n[:, None] & mask_d[None, :]
    place = (first_row - first_held + local).to(tl.int64)
    if rows_ptr is not None:
        place = tl.load(rows_ptr + first_row + local, mask=mask_n, other=0)
    sum_ptrs = sum_ptr + place[:, None] * D + offs_d[None, :]
    if first_v > 0:
        before = tl.load(sum_ptrs, mask=mask, other=0.0)
        if decay_ptr is not None:
            before *= tl.load(decay_ptr + first_row + local, mask=mask_n, other=0.0)[:, None]
        acc += before
    tl.store(sum_ptrs, acc, mask=mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held"])
def scatter_kernel(
    sum_ptr,  # (held, D) fp32
    rows_ptr,  # (N,) a permutation
    count_ptr,  # (1,)
    scale_ptr,  # (1,)
    out_ptr,  # (N, D) out
    first_row,
    last_row,
    first_held,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[rows] = sum / scale, 0 for rows without a gradient."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    offs_n = first_row + tl.program_id(0) // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < last_row, offs_d < D
    has_gradient = offs_n < tl.minimum(tl.load(count_ptr), last_row)
    sum_ptrs = sum_ptr + (offs_n - first_held).to(tl.int64)[:, None] * D + offs_d[None, :]
    total = tl.load(sum_ptrs, mask=has_gradient[:, None] & mask_d[None, :], other=0.0) / tl.load(scale_ptr)
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    out = out_ptr + rows[:, None] * D + offs_d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "final", "first_v", "last_v"])
def dweight_kernel(
    dlogits_ptr,  # (rows, width)
    x_ptr,  # (held, D) rows gathered
    count_ptr,  # (1,)
    scale_ptr,  # (1,)
    sum_ptr,  # (width, D) fp32, the rows before first_row; None when one chunk does it all
    dweight_ptr,  # (V, D) out, written with the last chunk
    first_row,
    last_row,
    first_held,
    final,  # whether this is the last chunk of rows
    first_v,
    last_v,
    width,
    D,
    COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight[first_v:last_v] += dlogits.T @ x."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    local_v = tl.program_id(0) // tiles_d * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_v = local_v < last_v - first_v
    mask_d = offs_d < D
    offs_n = tl.arange(0, BLOCK_N)
    stop = tl.minimum(tl.load(count_ptr), last_row)
    dz_ptrs = dlogits_ptr + local_v[:, None] + offs_n.to(tl.int64)[None, :] * width
    x_ptrs = x_ptr + (first_row - first_held + offs_n).to(tl.int64)[:, None] * D + offs_d[None, :]
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    for n in range(first_row, stop, BLOCK_N):
        mask_n = n + offs_n < stop
        x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        dz = tl.load(dz_ptrs, mask=mask_n[None, :], other=0.0)
        acc = tl.dot(dz, x.to(COMPUTE), acc, input_precision="ieee")
        dz_ptrs += BLOCK_N * tl.cast(width, tl.int64)
        x_ptrs += BLOCK_N * tl.cast(D, tl.int64)
    mask = mask_v[:, None] & mask_d[None, :]
    sum_ptrs = sum_ptr
    if sum_ptr is not None:
        sum_ptrs = sum_ptr + local_v.to(tl.int64)[:, None] * D + offs_d[None, :]
        if first_row > 0:
            acc += tl.load(sum_ptrs, mask=mask, other=0.0)
        tl.store(sum_ptrs, acc, mask=mask & (final == 0))
    out = dweight_ptr + (first_v + local_v).to(tl.int64)[:, None] * D + offs_d[None, :]
    acc = acc / tl.load(scale_ptr)
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=mask & (final != 0))


@triton.jit(do_not_specialize=["first_row", "last_row", "first_v", "last_v"])
def dbias_kernel(
    dlogits_ptr,  # (rows, width)
    count_ptr,  # (1,)
    scale_ptr,  # (1,)
    dbias_ptr,  # (V,) fp32, added to
    first_row,
    last_row,
    first_v,
    last_v,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    local_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = local_v < last_v - first_v
    offs_n = tl.arange(0, BLOCK_N)
    stop = tl.minimum(tl.load(count_ptr), last_row) - first_row
    acc = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for n in range(0, stop, BLOCK_N):
        offs = (n + offs_n).to(tl.int64)[:, None] * width + local_v[None, :]
        dz = tl.load(dlogits_ptr + offs, mask=(n + offs_n < stop)[:, None] & mask_v[None, :], other=0.0)
        acc += tl.sum(dz.to(tl.float32), axis=0)
    out = dbias_ptr + first_v + local_v
    total = tl.load(out, mask=mask_v, other=0.0) + acc / tl.load(scale_ptr)
    tl.store(out, total, mask=mask_v)


def add_product(dlogits, weight, count, total, span, first_held=0, rows=None, decay=None):
    """total = decay * total + dlogits @ weight of a chunk, see :func:`dhidden_kernel`.

    Args:
        dlogits: (rows, width) in the dtype the GEMM computes in. span: first_row, last_row, first_v, last_v.
    """
    first_row, last_row, first_v, last_v = span
    depth, tile = weight.shape[1], tiles.for_tensor("dhidden", dlogits.dtype, dlogits.device)
    dhidden_kernel[(triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(depth, tile.cols),)](
        dlogits_ptr=dlogits,
        weight_ptr=weight,
        count_ptr=count,
        rows_ptr=rows,
        decay_ptr=decay,
        sum_ptr=total,
        first_row=first_row,
        last_row=last_row,
        first_held=first_held,
        first_v=first_v,
        last_v=last_v,
        width=dlogits.shape[1],
        D=depth,
        stride_weight_v=weight.stride(0),
        stride_weight_d=weight.stride(1),
        COMPUTE=TO_TRITON[str(dlogits.dtype)],
        BLOCK_N=tile.rows,
        BLOCK_D=tile.cols,
        BLOCK_V=tile.depth,
        **tile.options,
    )


def copy_tile(depth):
    """Of the kernels that only move rows: narrow ones for a narrow factor."""
    return tiles.COPY._replace(cols=min(tiles.COPY.cols, triton.next_power_of_2(depth)))


def spans(total, size):
    """[(first, last)] of the chunks of 0 .. total."""
    return [(first, min(first + size, total)) for first in range(0, total, size)]
