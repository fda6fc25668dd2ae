"""Exact backward: a tile of logits is recomputed, turned into dlogits in a bounded buffer, and fed to two GEMMs.

The GEMMs are our own kernels because the number of rows with a gradient is known on the device only: cuBLAS would need
the host to wait for it. They read the rows from a dense copy, gathered once, and no kernel of a GEMM's size looks a row
up. No atomics; every sum has a fixed order.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends.problem import new_gradients, plan_tiles, row_scale
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import (
    TO_TRITON,
    Strides,
    cap,
    cap_slope,
    known_label,
    raw_logits,
    row_offsets,
    row_strides,
    without_dust,
)
from fastgrpo.kernels.forward import has_extras, logit_arguments


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
    stride_source_b,
    stride_source_t,
    stride_source_d,
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
    pointers = source_ptr + row_offsets(rows, T, stride_source_b, stride_source_t)[:, None]
    x = tl.load(pointers + offs_d[None, :] * tl.cast(stride_source_d, tl.int64), mask=mask)
    tl.store(out_ptr + (offs_n - first_held).to(tl.int64)[:, None] * D + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "first_v", "last_v", "N"])
def dlogits_kernel(
    x_ptr,  # (held, D) rows of hidden, gathered
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    targets_ptr,  # (N,)
    temperature_ptr,  # (N,) or None
    rows_ptr,  # (N,) rows with a gradient
    count_ptr,  # (1,) how many
    stats_ptr,  # (5, N)
    grad_logp_ptr,  # (N,)
    grad_entropy_ptr,  # (N,) or None
    scale_ptr,  # (1,) power of two
    dlogits_ptr,  # (rows, width) out, of the row and column chunk in hand; width a multiple of every tile
    first_row,
    last_row,
    first_held,
    first_v,
    last_v,
    width,
    N,
    V,
    D,
    strides,  # Strides of x and weight
    logits,  # Logits
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(last_row - first_row, BLOCK_N)
    block = tl.program_id(0) % blocks
    tile_v = first_v + tl.program_id(0) // blocks * BLOCK_V
    stop = tl.minimum(tl.load(count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    label = known_label(targets_ptr, rows, mask_n, V)
    x_ptrs = x_ptr + (tl.where(mask_n, offs_n, start) - first_held).to(tl.int64) * D
    raw = raw_logits(
        x_ptrs, weight_ptr, bias_ptr, low_rank, rows, tile_v, V, D, strides, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D
    )

    inv_temperature = tl.zeros((BLOCK_N,), tl.float32) + logits.inv_temperature
    if temperature_ptr is not None:
        inv_temperature = 1.0 / tl.load(temperature_ptr + rows, mask=mask_n, other=1.0)
    row_factor = inv_temperature * tl.load(scale_ptr)
    grad_logp = tl.load(grad_logp_ptr + rows, mask=mask_n, other=0.0) * row_factor
    n = tl.cast(N, tl.int64)
    peak = tl.load(stats_ptr + n + rows, mask=mask_n, other=0.0)
    offset = tl.load(stats_ptr + 2 * n + rows, mask=mask_n, other=0.0)
    at_label = grad_logp * tl.load(stats_ptr + 3 * n + rows, mask=mask_n, other=0.0)

    log_p = cap(raw, logits) * inv_temperature[:, None] - peak[:, None] - offset[:, None]
    p = tl.exp(log_p)
    dz = -grad_logp[:, None] * p
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=mask_n, other=0.0) * row_factor
        entropy = tl.load(stats_ptr + 4 * n + rows, mask=mask_n, other=0.0)
        logp = tl.load(stats_ptr + rows, mask=mask_n, other=0.0)
        dz -= grad_entropy[:, None] * p * (log_p + entropy[:, None])
        p_label = tl.exp(logp)
        at_label -= tl.where(p_label == 0, 0.0, grad_entropy * p_label * (logp + entropy))
    offs_v = tile_v + tl.arange(0, BLOCK_V)
    dz = tl.where(offs_v[None, :] == label[:, None], at_label[:, None], dz) * cap_slope(raw, logits)
    dz = tl.where((offs_v < last_v)[None, :], dz, 0.0)  # the GEMMs read whole tiles
    local_v = tl.program_id(0) // blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    out = dlogits_ptr + (offs_n - first_row).to(tl.int64)[:, None] * width + local_v[None, :]
    tl.store(out, without_dust(dz).to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None])


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "first_v", "last_v"])
def dhidden_kernel(
    dlogits_ptr,  # (rows, width)
    weight_ptr,  # (V, D)
    count_ptr,  # (1,)
    rows_ptr,  # (N,) where in sum each row stands; None: in their order
    decay_ptr,  # (N,) fp32, in the rows' order, factor of the sum so far; None: 1
    sum_ptr,  # (held, D) fp32, the columns before first_v; nothing where first_v is 0
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


class Factor(NamedTuple):
    """One of the products that make the logits: rows times columns, and what its gradients' GEMMs need."""

    rows: torch.Tensor  # (B, T, D), as the GEMMs read them
    columns: torch.Tensor  # (V, D)
    rows_scale: torch.Tensor  # 0-dim, what the sum for its rows is divided by
    columns_scale: torch.Tensor
    d_rows: torch.Tensor | None  # (B, T, D) out
    d_columns: torch.Tensor | None  # (V, D) out

    @property
    def depth(self):
        return self.columns.shape[1]


def make_factors(problem, scale, out):
    """[:class:`Factor`] of the head and, with LoRA, of its pair."""
    factors = [Factor(problem.hidden, problem.weight, scale, scale, out.hidden, out.weight)]
    operands = problem.lora_operands
    if operands is not None:
        low, up = operands.low[:, : operands.rank], operands.up[:, : operands.rank]
        scales = (scale if s is None else scale * s for s in (operands.up_scale, operands.low_scale))
        factors.append(Factor(low.unflatten(0, problem.hidden.shape[:2]), up, *scales, out.low, out.up))
    return factors


class Chunks:
    """The chunks one backward goes through, and its buffers: sized to the workspace, plus the fp32 sum of all rows'
    gradients where columns have gradients too.

    Attributes:
        dlogits: (rows, cols) of the chunk in hand.
        gathered: of each factor that a GEMM reads rows of, (held, D): those rows, densely; None for the others. All
            rows' stand where their gradient will be written at the end, so that they need no memory of their own.
        row_sums: of each factor whose rows have a gradient, (held, D) fp32. column_sums: (cols, D) fp32, or None.
    """

    def __init__(self, problem, factors):
        n, vocab, _ = problem.sizes
        self.n, self.vocab, self.factors = n, vocab, factors
        self.device = problem.hidden.device
        # With a frozen head a row chunk is finished before the next: its fp32 sum is a chunk's, not (N, D).
        self.rows_outside = all(f.d_columns is None for f in factors)
        plan = self.plan(problem.params)
        self.rows, self.cols = min(plan.rows, n), plan.cols
        self.dlogits = self.new(self.rows, self.cols, problem.params.compute_dtype)
        self.gathered = [self.room_for_rows(k) for k in range(len(factors))]
        held = self.rows if self.rows_outside else n
        self.row_sums = [self.new(held, f.depth) if f.d_rows is not None else None for f in factors]
        apart = self.rows < n  # a chunk of columns is summed over several chunks of rows
        self.column_sums = [
            self.new(self.cols, f.depth) if apart and f.d_columns is not None else None for f in factors
        ]

    def new(self, rows, cols, dtype=torch.float32):
        return torch.empty(rows, cols, dtype=dtype, device=self.device)

    def plan(self, params):
        per_row = sum(f.depth * f.rows.element_size() for k, f in enumerate(self.factors) if self.copies_a_chunk(k))
        if self.rows_outside:
            per_row += sum(4 * f.depth for f in self.factors if f.d_rows is not None)
        per_col = sum(4 * f.depth for f in self.factors if f.d_columns is not None)
        plan = functools.partial(
            plan_tiles, self.n, self.vocab, params.workspace, params.compute_dtype.itemsize, per_row,
            multiple=tiles.WIDTH,
        )  # fmt: skip
        whole = plan(0)
        if whole.rows < self.n or whole.cols < min(self.vocab, 1024):  # rows in chunks: dW needs sums of its columns
            return plan(per_col)
        return whole

    def is_read(self, k):
        """Whether a GEMM reads factor k's rows: the logits' the head's, dW's its own."""
        return k == 0 or self.factors[k].d_columns is not None

    def copies_a_chunk(self, k):
        return self.is_read(k) and (self.rows_outside or self.factors[k].d_rows is None)

    def room_for_rows(self, k):
        factor = self.factors[k]
        if not self.is_read(k):
            return None
        if self.copies_a_chunk(k):
            return self.new(self.rows, factor.depth, factor.rows.dtype)
        return factor.d_rows.view(-1).view(factor.rows.dtype)[: self.n * factor.depth].view(self.n, factor.depth)

    def first_held(self, first_row, buffer):
        """The row that a buffer of ``gathered`` or ``row_sums`` begins with, while first_row's chunk is in hand."""
        return first_row if buffer.shape[0] < self.n else 0

    def __iter__(self):
        """-> first_row, last_row, first_v, last_v."""
        rows, cols = spans(self.n, self.rows), spans(self.vocab, self.cols)
        if self.rows_outside:
            return iter([(*r, *v) for r in rows for v in cols])
        return iter([(*r, *v) for v in cols for r in rows])


def spans(total, size):
    """[(first, last)] of the chunks of 0 .. total."""
    return [(first, min(first + size, total)) for first in range(0, total, size)]


def backward(problem, stats, grad_logp, grad_entropy, needs):
    """Gradients of hidden, weight and bias, and with LoRA of low and up; never waits for the device.

    Args:
        stats: (5, N) of :func:`fastgrpo.kernels.forward.forward`.
        grad_logp: (N,) float32. grad_entropy: (N,) float32 or None.
        needs: :class:`Gradients` of bools; the result has None where one is False.
    """
    out = new_gradients(problem, needs)
    if problem.targets.numel() == 0 or not any(needs):
        for x in out.of_head:
            if x is not None:
                x.zero_()
        return out
    d_bias = torch.zeros(problem.bias.shape, dtype=torch.float32, device=problem.bias.device) if needs.bias else None
    grads = [g.contiguous() for g in (grad_logp, grad_entropy) if g is not None]
    active = (problem.targets != IGNORE) & torch.stack([g != 0 for g in grads]).any(0)
    scale = row_scale(*(torch.where(active, g, 0.0) for g in grads))
    factors = make_factors(problem, scale, out)
    chunks = Chunks(problem, factors)
    launch = Launcher(problem, stats, grads, *compact_rows(active), scale, chunks)
    launch.gather_all(0, chunks.n, a_chunk=False)
    in_hand = None
    for first_row, last_row, *columns in chunks:
        rows = first_row, last_row
        if rows != in_hand:
            launch.gather_all(*rows, a_chunk=True)
            in_hand = rows
        launch.dlogits(*rows, *columns)
        for k, factor in enumerate(factors):
            if factor.d_rows is not None:
                launch.dhidden(k, *rows, *columns)
            if factor.d_columns is not None:
                launch.dweight(k, *rows, *columns)
        if d_bias is not None:
            launch.dbias(d_bias, *rows, *columns)
        if chunks.rows_outside and columns[1] == chunks.vocab:
            launch.scatter_all(*rows)
    if not chunks.rows_outside:
        launch.scatter_all(0, chunks.n)
    if d_bias is not None:
        out.bias.copy_(d_bias)
    return out


class Launcher:
    """Launches the backward's kernels over one chunk."""

    def __init__(self, problem, stats, grads, rows, count, scale, chunks):
        self.problem, self.stats, self.grads = problem, stats, grads
        self.rows, self.count, self.scale, self.chunks = rows, count, scale, chunks
        self.strides, self.logits, self.low_rank = logit_arguments(problem)
        self.compute = TO_TRITON[str(problem.params.compute_dtype)]

    def tile(self, kernel):
        return tiles.for_tensor(kernel, self.problem.params.compute_dtype, self.problem.hidden.device)

    def gather_all(self, first_row, last_row, a_chunk):
        """Some rows of each factor that a GEMM reads rows of, into buffers of a chunk or into those of all rows."""
        for k in range(len(self.chunks.factors)):
            if self.chunks.is_read(k) and self.chunks.copies_a_chunk(k) == a_chunk:
                self.gather(k, first_row, last_row)

    def gather(self, k, first_row, last_row):
        factor, out = self.chunks.factors[k], self.chunks.gathered[k]
        tile, (stride_b, stride_t, stride_d) = copy_tile(factor.depth), row_strides(factor.rows)
        gather_kernel[(triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(factor.depth, tile.cols),)](
            source_ptr=factor.rows,
            rows_ptr=self.rows,
            count_ptr=self.count,
            out_ptr=out,
            first_row=first_row,
            last_row=last_row,
            first_held=self.chunks.first_held(first_row, out),
            D=factor.depth,
            T=factor.rows.shape[1],
            stride_source_b=stride_b,
            stride_source_t=stride_t,
            stride_source_d=stride_d,
            BLOCK_N=tile.rows,
            BLOCK_D=tile.cols,
            num_warps=tile.warps,
        )

    def dlogits(self, first_row, last_row, first_v, last_v):
        problem, x = self.problem, self.chunks.gathered[0]
        tile = self.tile("dlogits_full" if len(self.grads) > 1 or has_extras(problem) else "dlogits")
        n, vocab, depth = problem.sizes
        grid = triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(last_v - first_v, tile.cols)
        dlogits_kernel[(grid,)](
            x_ptr=x,
            weight_ptr=problem.weight,
            bias_ptr=problem.bias,
            low_rank=self.low_rank,
            targets_ptr=problem.targets,
            temperature_ptr=problem.temperature,
            rows_ptr=self.rows,
            count_ptr=self.count,
            stats_ptr=self.stats,
            grad_logp_ptr=self.grads[0],
            grad_entropy_ptr=self.grads[1] if len(self.grads) > 1 else None,
            scale_ptr=self.scale,
            dlogits_ptr=self.chunks.dlogits,
            first_row=first_row,
            last_row=last_row,
            first_held=self.chunks.first_held(first_row, x),
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            N=n,
            V=vocab,
            D=depth,
            strides=Strides(0, depth, 1, *problem.weight.stride()),
            logits=self.logits,
            WHOLE_D=depth % tile.depth == 0,
            COMPUTE=self.compute,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.cols,
            BLOCK_D=tile.depth,
            **tile.options,
        )

    def dhidden(self, k, first_row, last_row, first_v, last_v):
        total = self.chunks.row_sums[k]
        held = self.chunks.first_held(first_row, total)
        span = first_row, last_row, first_v, last_v
        add_product(self.chunks.dlogits, self.chunks.factors[k].columns, self.count, total, span, first_held=held)

    def dweight(self, k, first_row, last_row, first_v, last_v):
        factor, x, tile = self.chunks.factors[k], self.chunks.gathered[k], self.tile("dweight")
        dweight_kernel[(triton.cdiv(last_v - first_v, tile.rows) * triton.cdiv(factor.depth, tile.cols),)](
            dlogits_ptr=self.chunks.dlogits,
            x_ptr=x,
            count_ptr=self.count,
            scale_ptr=factor.columns_scale,
            sum_ptr=self.chunks.column_sums[k],
            dweight_ptr=factor.d_columns,
            first_row=first_row,
            last_row=last_row,
            first_held=self.chunks.first_held(first_row, x),
            final=int(last_row == self.chunks.n),
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            D=factor.depth,
            COMPUTE=self.compute,
            BLOCK_V=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_N=tile.depth,
            **tile.options,
        )

    def dbias(self, d_bias, first_row, last_row, first_v, last_v):
        block = 64
        dbias_kernel[(triton.cdiv(last_v - first_v, block),)](
            dlogits_ptr=self.chunks.dlogits,
            count_ptr=self.count,
            scale_ptr=self.scale,
            dbias_ptr=d_bias,
            first_row=first_row,
            last_row=last_row,
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            BLOCK_N=32,
            BLOCK_V=block,
        )

    def scatter_all(self, first_row, last_row):
        """The finished sums of some rows into their gradients, over what was gathered there."""
        for factor, total in zip(self.chunks.factors, self.chunks.row_sums):
            if total is None:
                continue
            tile = copy_tile(factor.depth)
            scatter_kernel[(triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(factor.depth, tile.cols),)](
                sum_ptr=total,
                rows_ptr=self.rows,
                count_ptr=self.count,
                scale_ptr=factor.rows_scale,
                out_ptr=factor.d_rows,
                first_row=first_row,
                last_row=last_row,
                first_held=self.chunks.first_held(first_row, total),
                D=factor.depth,
                BLOCK_N=tile.rows,
                BLOCK_D=tile.cols,
                num_warps=tile.warps,
            )


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
