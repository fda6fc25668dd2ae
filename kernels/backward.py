"""Exact backward: a tile of logits is recomputed, turned into dlogits in a bounded buffer, and fed to two GEMMs.

The GEMMs are our own kernels because the number of rows with a gradient is known on the device only: cuBLAS would need
the host to wait for it. No atomics; every sum has a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastgrpo.backends.problem import new_gradients, plan_tiles, row_scale
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import TO_TRITON, Strides, cap, cap_slope, hidden_rows, raw_logits
from fastgrpo.kernels.forward import has_extras, logit_arguments


@triton.jit(do_not_specialize=["first_row", "last_row", "first_v", "last_v", "N", "T"])
def dlogits_kernel(
    hidden_ptr,  # (B, T, D)
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
    first_v,
    last_v,
    width,
    N,
    V,
    T,
    strides,  # Strides
    logits,  # Logits
    D: tl.constexpr,
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
    label = tl.load(targets_ptr + rows, mask=mask_n, other=-1)
    h_ptrs = hidden_rows(hidden_ptr, rows, T, strides)
    raw = raw_logits(
        h_ptrs, weight_ptr, bias_ptr, low_rank, rows, tile_v, V, strides, D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D
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
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None])


@triton.jit(do_not_specialize=["first_row", "last_row", "first_sum", "first_v", "last_v"])
def dhidden_kernel(
    dlogits_ptr,  # (rows, width)
    weight_ptr,  # (V, D)
    rows_ptr,  # (N,)
    count_ptr,  # (1,)
    scale_ptr,  # (1,)
    sum_ptr,  # (rows, D) fp32, the columns before first_v; None when one chunk does it all
    dhidden_ptr,  # (N, D) out, written with the last chunk
    first_row,
    last_row,
    first_sum,  # row of sum_ptr that belongs to first_row
    first_v,
    last_v,
    width,
    V,
    stride_weight_v,
    stride_weight_d,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dhidden[rows] += dlogits @ weight[first_v:last_v]."""
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
    sum_ptrs = sum_ptr
    if sum_ptr is not None:
        sum_ptrs = sum_ptr + (first_sum + local).to(tl.int64)[:, None] * D + offs_d[None, :]
        if first_v > 0:
            acc += tl.load(sum_ptrs, mask=mask, other=0.0)
        tl.store(sum_ptrs, acc, mask=mask & (last_v < V))
    rows = tl.load(rows_ptr + first_row + local, mask=mask_n, other=0)
    out = dhidden_ptr + rows[:, None] * D + offs_d[None, :]
    acc = acc / tl.load(scale_ptr)
    tl.store(out, acc.to(dhidden_ptr.dtype.element_ty), mask=mask & (last_v == V))


@triton.jit(do_not_specialize=["first_row", "last_row", "final", "first_v", "last_v", "T"])
def dweight_kernel(
    dlogits_ptr,  # (rows, width)
    hidden_ptr,  # (B, T, D)
    rows_ptr,  # (N,)
    count_ptr,  # (1,)
    scale_ptr,  # (1,)
    sum_ptr,  # (width, D) fp32, the rows before first_row; None when one chunk does it all
    dweight_ptr,  # (V, D) out, written with the last chunk
    first_row,
    last_row,
    final,  # whether this is the last chunk of rows
    first_v,
    last_v,
    width,
    T,
    strides,  # Strides
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight[first_v:last_v] += dlogits.T @ hidden[rows]."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    local_v = tl.program_id(0) // tiles_d * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_v = local_v < last_v - first_v
    mask_d = offs_d < D
    offs_n = tl.arange(0, BLOCK_N)
    stop = tl.minimum(tl.load(count_ptr), last_row)
    dz_ptrs = dlogits_ptr + local_v[:, None] + offs_n.to(tl.int64)[None, :] * width
    acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    for n in range(first_row, stop, BLOCK_N):
        mask_n = n + offs_n < stop
        rows = tl.load(rows_ptr + n + offs_n, mask=mask_n, other=0)
        h_ptrs = hidden_rows(hidden_ptr, rows, T, strides)[:, None]
        h_ptrs = h_ptrs + offs_d[None, :] * tl.cast(strides.hidden_d, tl.int64)
        h = tl.load(h_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        dz = tl.load(dz_ptrs, mask=mask_n[None, :], other=0.0)
        acc = tl.dot(dz, h.to(COMPUTE), acc, input_precision="ieee")
        dz_ptrs += BLOCK_N * tl.cast(width, tl.int64)
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


class Chunks:
    """The buffers of one backward and the chunks it goes through, sized to the workspace."""

    def __init__(self, problem, needs):
        n, vocab, _ = problem.sizes
        depths = [columns.shape[1] for _, columns in problem.factors]
        rows, columns = (sum(d for d, need in zip(depths, needs[k::3]) if need) for k in (0, 1))
        size = problem.params.compute_dtype.itemsize
        # With a frozen head a row chunk is finished before the next: its fp32 sum is a chunk's, not (N, D).
        self.rows_outside = columns == 0
        budget = problem.params.workspace
        per_row = 4 * rows if self.rows_outside else 0
        whole = plan_tiles(n, vocab, budget, size, per_row, 0, multiple=tiles.WIDTH)
        if whole.rows < n or whole.cols < min(vocab, 1024):  # rows in chunks, then dW needs an fp32 sum of its columns
            whole = plan_tiles(n, vocab, budget, size, per_row, 4 * columns, multiple=tiles.WIDTH)
        self.rows, self.cols = min(whole.rows, n), whole.cols
        device = problem.hidden.device
        self.dlogits = torch.empty(self.rows, self.cols, dtype=problem.params.compute_dtype, device=device)
        one_row_chunk, one_col_chunk = self.rows == n, self.cols >= vocab
        held = self.rows if self.rows_outside else n

        def sums(length, wanted):  # an fp32 sum for each factor, None where it is not wanted
            return [torch.empty(length, d, dtype=torch.float32, device=device) if w else None
                    for d, w in zip(depths, wanted)]  # fmt: skip

        self.row_sums = sums(held, [need and not one_col_chunk for need in needs[0::3]])
        self.column_sums = sums(self.cols, [need and not one_row_chunk for need in needs[1::3]])
        self.n, self.vocab = n, vocab

    def __iter__(self):
        """-> first_row, last_row, first_v, last_v."""
        rows = [(r, min(r + self.rows, self.n)) for r in range(0, self.n, self.rows)]
        cols = [(v, min(v + self.cols, self.vocab)) for v in range(0, self.vocab, self.cols)]
        if self.rows_outside:
            return iter([(*r, *v) for r in rows for v in cols])
        return iter([(*r, *v) for v in cols for r in rows])


def backward(problem, stats, grad_logp, grad_entropy, needs):
    """Gradients of hidden, weight and bias, and with LoRA of low and up; never waits for the device.

    Args:
        stats: (5, N) of :func:`fastgrpo.kernels.forward.forward`.
        grad_logp: (N,) float32. grad_entropy: (N,) float32 or None.
        needs: a bool for each of them; the result has None where it is False.
    """
    out = new_gradients(problem, needs)
    if problem.targets.numel() == 0 or not any(needs):
        for x in out[1::3]:
            if x is not None:
                x.zero_()
        return out
    d_bias = torch.zeros(problem.bias.shape, dtype=torch.float32, device=problem.bias.device) if needs[2] else None
    grads = [g.contiguous() for g in (grad_logp, grad_entropy) if g is not None]
    active = (problem.targets != IGNORE) & torch.stack([g != 0 for g in grads]).any(0)
    rows, count = compact_rows(active)
    chunks = Chunks(problem, needs)
    launch = Launcher(
        problem, stats, grads, rows, count, row_scale(*(torch.where(active, g, 0.0) for g in grads)), chunks
    )
    for chunk in chunks:
        launch.dlogits(*chunk)
        for factor, (d_rows, d_columns) in enumerate(zip(out[0::3], out[1::3])):
            if d_rows is not None:
                launch.dhidden(factor, d_rows, *chunk)
            if d_columns is not None:
                launch.dweight(factor, d_columns, *chunk)
        if d_bias is not None:
            launch.dbias(d_bias, *chunk)
    if d_bias is not None:
        out[2].copy_(d_bias)
    return out


class Launcher:
    """Launches the backward's kernels over one chunk."""

    def __init__(self, problem, stats, grads, rows, count, scale, chunks):
        self.problem, self.stats, self.grads = problem, stats, grads
        self.rows, self.count, self.scale, self.chunks = rows, count, scale, chunks
        operands = problem.lora_operands
        self.strides, self.logits, self.low_rank = logit_arguments(problem)
        # of each factor: its rows (B, T, D) and columns (V, D) as the GEMMs read them, and their gradients' scales
        self.factors = [(problem.hidden, problem.weight, scale, scale)]
        if operands is not None:
            low, up = operands.low[:, : operands.rank], operands.up[:, : operands.rank]
            scales = (scale if s is None else scale * s for s in (operands.up_scale, operands.low_scale))
            self.factors.append((low.unflatten(0, problem.hidden.shape[:2]), up, *scales))
        self.compute = TO_TRITON[str(problem.params.compute_dtype)]

    def tile(self, kernel):
        return tiles.for_tensor(kernel, self.problem.params.compute_dtype, self.problem.hidden.device)

    def dlogits(self, first_row, last_row, first_v, last_v):
        problem = self.problem
        tile = self.tile("dlogits_full" if len(self.grads) > 1 or has_extras(problem) else "dlogits")
        n, vocab, depth = problem.sizes
        grid = triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(last_v - first_v, tile.cols)
        dlogits_kernel[(grid,)](
            hidden_ptr=problem.hidden,
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
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            N=n,
            V=vocab,
            T=problem.hidden.shape[1],
            strides=self.strides,
            logits=self.logits,
            D=depth,
            COMPUTE=self.compute,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.cols,
            BLOCK_D=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def dhidden(self, factor, d_hidden, first_row, last_row, first_v, last_v):
        (_, weight, scale, _), tile = self.factors[factor], self.tile("dhidden")
        vocab, depth = weight.shape
        dhidden_kernel[(triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(depth, tile.cols),)](
            dlogits_ptr=self.chunks.dlogits,
            weight_ptr=weight,
            rows_ptr=self.rows,
            count_ptr=self.count,
            scale_ptr=scale,
            sum_ptr=self.chunks.row_sums[factor],
            dhidden_ptr=d_hidden,
            first_row=first_row,
            last_row=last_row,
            first_sum=0 if self.chunks.rows_outside else first_row,
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            V=vocab,
            stride_weight_v=weight.stride(0),
            stride_weight_d=weight.stride(1),
            D=depth,
            COMPUTE=self.compute,
            BLOCK_N=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_V=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def dweight(self, factor, d_weight, first_row, last_row, first_v, last_v):
        (hidden, weight, _, scale), tile = self.factors[factor], self.tile("dweight")
        depth = weight.shape[1]
        dweight_kernel[(triton.cdiv(last_v - first_v, tile.rows) * triton.cdiv(depth, tile.cols),)](
            dlogits_ptr=self.chunks.dlogits,
            hidden_ptr=hidden,
            rows_ptr=self.rows,
            count_ptr=self.count,
            scale_ptr=scale,
            sum_ptr=self.chunks.column_sums[factor],
            dweight_ptr=d_weight,
            first_row=first_row,
            last_row=last_row,
            final=int(last_row == self.chunks.n),
            first_v=first_v,
            last_v=last_v,
            width=self.chunks.cols,
            T=hidden.shape[1],
            strides=Strides(*hidden.stride(), *weight.stride()),
            D=depth,
            COMPUTE=self.compute,
            BLOCK_V=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_N=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
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
