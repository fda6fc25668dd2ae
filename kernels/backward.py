"""Exact backward: a tile of logits is recomputed, turned into dlogits in a bounded buffer, and fed to two GEMMs."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends.problem import new_gradients, plan_tiles, row_scale
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import TO_TRITON, Selection, has_extras, logit_arguments, row_strides
from fastgrpo.kernels.common import (
    cap,
    cap_slope,
    inverse_temperatures,
    load_stats,
    raw_logits,
    selected_rows,
    without_dust,
)
from fastgrpo.kernels.products import (
    add_product,
    copy_tile,
    dbias_kernel,
    dweight_kernel,
    gather_kernel,
    scatter_kernel,
    spans,
)
from fastgrpo.kernels.row_math import gradient_at_label


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "first_v", "last_v", "N"])
def dlogits_kernel(
    x_ptr,  # (held, D) rows of hidden, gathered
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    selection,  # Selection of the rows with a gradient
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (5, N) RowStats
    grad_logp_ptr,  # (N,)
    grad_entropy_ptr,  # (N,) or None
    scale_ptr,  # (1,) power of two
    dlogits_ptr,  # (rows, width) out, of the row and entry chunk in hand; width a multiple of every tile
    first_row,
    last_row,
    first_held,
    first_v,
    last_v,
    width,
    N,
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
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    x_ptrs = x_ptr + (tl.where(mask_n, offs_n, start) - first_held).to(tl.int64) * head.D
    raw = raw_logits(x_ptrs, 1, head, bias_ptr, low_rank, rows, tile_v, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D)

    inv_temperature = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    row_factor = inv_temperature * tl.load(scale_ptr)
    grad_logp = tl.load(grad_logp_ptr + rows, mask=mask_n, other=0.0) * row_factor
    grad_entropy = None
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=mask_n, other=0.0) * row_factor
    logp, peak, offset, other_mass, entropy = load_stats(stats_ptr, N, rows, mask_n)
    at_label = gradient_at_label(grad_logp, grad_entropy, logp, other_mass, entropy)

    log_p = cap(raw, logits) * inv_temperature[:, None] - peak[:, None] - offset[:, None]
    p = tl.exp(log_p)
    dz = -grad_logp[:, None] * p
    if grad_entropy_ptr is not None:
        dz -= grad_entropy[:, None] * p * (log_p + entropy[:, None])
    offs_v = tile_v + tl.arange(0, BLOCK_V)
    dz = tl.where(offs_v[None, :] == label[:, None], at_label[:, None], dz) * cap_slope(raw, logits)
    dz = tl.where((offs_v < last_v)[None, :], dz, 0.0)  # the GEMMs read whole tiles
    local_v = tl.program_id(0) // blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    out = dlogits_ptr + (offs_n - first_row).to(tl.int64)[:, None] * width + local_v[None, :]
    tl.store(out, without_dust(dz).to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None])


class Factor(NamedTuple):
    """One of the products that make the logits: rows times entries, and what its gradients' GEMMs need."""

    rows: torch.Tensor  # (B, T, D), as the GEMMs read them
    entries: torch.Tensor  # (V, D)
    rows_scale: torch.Tensor  # 0-dim, what the sum for its rows is divided by
    entries_scale: torch.Tensor
    d_rows: torch.Tensor | None  # (B, T, D) out
    d_entries: torch.Tensor | None  # (V, D) out

    @property
    def depth(self):
        return self.entries.shape[1]


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
    gradients where entries have gradients too.

    Attributes:
        dlogits: (rows, cols) of the chunk in hand.
        gathered: of each factor that a GEMM reads rows of, (held, D): those rows, densely; None for the others. All
            rows' stand where their gradient will be written at the end, so that they need no memory of their own.
        row_sums: of each factor whose rows have a gradient, (held, D) fp32. entry_sums: (cols, D) fp32, or None.
    """

    def __init__(self, problem, factors):
        n, vocab, _ = problem.sizes
        self.n, self.vocab, self.factors = n, vocab, factors
        self.device = problem.hidden.device
        # With a frozen head a row chunk is finished before the next: its fp32 sum is a chunk's, not (N, D).
        self.rows_outside = all(f.d_entries is None for f in factors)
        plan = self.plan(problem.params)
        self.rows, self.cols = min(plan.rows, n), plan.cols
        self.dlogits = self.new(self.rows, self.cols, problem.params.compute_dtype)
        self.gathered = [self.room_for_rows(k) for k in range(len(factors))]
        held = self.rows if self.rows_outside else n
        self.row_sums = [self.new(held, f.depth) if f.d_rows is not None else None for f in factors]
        apart = self.rows < n  # a chunk of entries is summed over several chunks of rows
        self.entry_sums = [self.new(self.cols, f.depth) if apart and f.d_entries is not None else None for f in factors]

    def new(self, rows, cols, dtype=torch.float32):
        return torch.empty(rows, cols, dtype=dtype, device=self.device)

    def plan(self, params):
        per_row = sum(f.depth * f.rows.element_size() for k, f in enumerate(self.factors) if self.copies_a_chunk(k))
        if self.rows_outside:
            per_row += sum(4 * f.depth for f in self.factors if f.d_rows is not None)
        per_col = sum(4 * f.depth for f in self.factors if f.d_entries is not None)
        plan = functools.partial(
            plan_tiles, self.n, self.vocab, params.workspace, params.compute_dtype.itemsize, per_row,
            multiple=tiles.WIDTH,
        )  # fmt: skip
        whole = plan(0)
        if whole.rows < self.n or whole.cols < min(self.vocab, 1024):  # rows in chunks: dW needs sums of its entries
            return plan(per_col)
        return whole

    def is_read(self, k):
        """Whether a GEMM reads factor k's rows: the logits' the head's, dW's its own."""
        return k == 0 or self.factors[k].d_entries is not None

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
    for first_row, last_row, *entries in chunks:
        rows = first_row, last_row
        if rows != in_hand:
            launch.gather_all(*rows, a_chunk=True)
            in_hand = rows
        launch.dlogits(*rows, *entries)
        for k, factor in enumerate(factors):
            if factor.d_rows is not None:
                launch.dhidden(k, *rows, *entries)
            if factor.d_entries is not None:
                launch.dweight(k, *rows, *entries)
        if d_bias is not None:
            launch.dbias(d_bias, *rows, *entries)
        if chunks.rows_outside and entries[1] == chunks.vocab:
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
        self.head, self.logits, self.low_rank = logit_arguments(problem)
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
        tile = copy_tile(factor.depth)
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
            strides=row_strides(factor.rows),
            BLOCK_N=tile.rows,
            BLOCK_D=tile.cols,
            num_warps=tile.warps,
        )

    def dlogits(self, first_row, last_row, first_v, last_v):
        problem, x = self.problem, self.chunks.gathered[0]
        tile = self.tile("dlogits_full" if len(self.grads) > 1 or has_extras(problem) else "dlogits")
        n, _, depth = problem.sizes
        grid = triton.cdiv(last_row - first_row, tile.rows) * triton.cdiv(last_v - first_v, tile.cols)
        dlogits_kernel[(grid,)](
            x_ptr=x,
            head=self.head,
            bias_ptr=problem.bias,
            low_rank=self.low_rank,
            selection=Selection(self.rows, self.count, problem.targets),
            temperature_ptr=problem.temperature,
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
        add_product(self.chunks.dlogits, self.chunks.factors[k].entries, self.count, total, span, first_held=held)

    def dweight(self, k, first_row, last_row, first_v, last_v):
        factor, x, tile = self.chunks.factors[k], self.chunks.gathered[k], self.tile("dweight")
        dweight_kernel[(triton.cdiv(last_v - first_v, tile.rows) * triton.cdiv(factor.depth, tile.cols),)](
            dlogits_ptr=self.chunks.dlogits,
            x_ptr=x,
            count_ptr=self.count,
            scale_ptr=factor.entries_scale,
            sum_ptr=self.chunks.entry_sums[k],
            dweight_ptr=factor.d_entries,
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
