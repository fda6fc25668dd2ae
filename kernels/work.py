"""What one backward goes through: the products that make the logits, its panels, its rows as the GEMMs read them."""

from typing import NamedTuple

import torch

from fastgrpo.backends.problem import sum_entries
from fastgrpo.kernels import tiles
from fastgrpo.kernels.grids import slots
from fastgrpo.kernels.panels import Cut, Panels
from fastgrpo.kernels.products import NOT_SPLIT, spans, split_for
from fastgrpo.kernels.tiles import cdiv
from fastgrpo.lora import has_native, mm16


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


def mean_entries(entries):
    """(D,) fp32. By a GEMM where it may be: torch's mean takes 128 MiB and more for partial sums."""
    count = entries.shape[0]
    if has_native(entries) and entries.dtype.itemsize == 2:
        return mm16(entries.new_ones(1, count), entries)[0] / count
    return sum_entries(entries, torch.float32) / count


class Work:
    """What one backward goes through: its panels, and its rows as the GEMMs read and write them.

    Args:
        heads: whose entries descriptors read.

    Attributes:
        gathered: of each factor that a GEMM reads rows of, (held, D): those rows, densely; None for the others. All
            rows' stand where their gradient will be written at the end, so that they need no memory of their own.
        copied_heads: whose entries are copied chunk by chunk, in the order of the work.
        row_sums: of each factor whose rows have a gradient, (held, D) fp32. entry_sums: (entries of a chunk, D) fp32,
            or None.
    """

    def __init__(self, problem, factors, plan, tile, heads, spread):
        self.problem, self.factors, self.spread = problem, factors, spread
        self.n, vocab, _ = problem.sizes
        self.device, dtype = problem.hidden.device, problem.params.compute_dtype
        # With a frozen head a row chunk is finished before the next: its fp32 sum is a chunk's, not (N, D). Entries in
        # an order of their own are copied chunk by chunk, and that not once more for each chunk of rows.
        self.rows_outside = plan.entries is None and all(f.d_entries is None for f in factors)
        self.copied_heads, described = heads if plan.entries is not None else (), len(heads) > 0
        cell = dtype.itemsize + (4 / tile.cols if spread else 0)
        self.splits = [self.splits_of(k, plan.entries is None) for k in range(len(factors))]
        cut = self.cut(cell, described)
        if cut.rows < self.n:
            self.splits = [NOT_SPLIT] * len(factors)
            cut = self.cut(cell, described)
        self.panels = Panels(cut, vocab, dtype, self.device, plan.stops_head, plan.stops_hidden, plan.entries)
        if self.copied_heads:
            self.panels.copy_entries(self.copied_heads)
        self.rows = min(cut.rows, self.n)
        self.gathered = [self.room_for_rows(k) for k in range(len(factors))]
        held = self.rows if self.rows_outside else self.n
        self.row_sums = [self.new_sum(k, held) for k in range(len(factors))]
        apart, entries = self.rows < self.n, cut.most * tiles.WIDTH  # entries summed over several chunks of rows
        self.entry_sums = [self.new(entries, f.depth) if apart and f.d_entries is not None else None for f in factors]
        self.means = [None] * len(factors)
        if spread:
            self.means = [None if f.d_rows is None else mean_entries(f.entries) for f in factors]

    def new(self, rows, cols, dtype=torch.float32):
        return torch.empty(rows, cols, dtype=dtype, device=self.device)

    def splits_of(self, k, exact):
        """:class:`Split` of factor k's sum, whose slabs may be a small part of the workspace."""
        depth, dtype = self.factors[k].depth, self.problem.params.compute_dtype
        tile = tiles.for_tensor("dhidden", dtype, self.device, described=k == 0 and self.copied_heads != ())
        if exact or self.factors[k].d_rows is None:
            return NOT_SPLIT
        return split_for(tile, depth, self.device, self.problem.params.workspace)

    def new_sum(self, k, held):
        if self.factors[k].d_rows is None:
            return None
        return self.new(held + self.splits[k].rows, self.factors[k].depth)

    def cut(self, cell, described):
        factors, problem = self.factors, self.problem
        per_row = sum(f.depth * f.rows.element_size() for k, f in enumerate(factors) if self.copies_a_chunk(k))
        if self.rows_outside:
            per_row += sum(4 * f.depth for f in factors if f.d_rows is not None)
        summed = sum(4 * f.depth for f in factors if f.d_entries is not None)
        copied = sum(head.shape[1] for head in self.copied_heads)  # each entry takes its width of a panel's rows
        slabs = sum(4 * split.rows * f.depth for split, f in zip(self.splits, factors))
        tile = tiles.for_tensor("dweight", problem.params.compute_dtype, self.device, described)
        each = [tiles.WIDTH // tile.rows * cdiv(f.depth, tile.cols) for f in factors if f.d_entries is not None]
        waves = (max(each), slots(tile, self.device)) if each else ()
        return Cut(self.n, problem.sizes[1], problem.params.workspace - slabs, cell, per_row, copied, summed, *waves)

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
        """-> first_row, last_row, chunk of entries."""
        rows, chunks = spans(self.n, self.rows), range(self.panels.chunks)
        if self.rows_outside:
            return iter([(*r, chunk) for r in rows for chunk in chunks])
        return iter([(*r, chunk) for chunk in chunks for r in rows])
