"""The dense backward: tiles of logits are made again, turned into dlogits in a bounded buffer, and fed to two GEMMs.

It goes up a staircase: :class:`fastgrpo.backends.staircase.Staircase` says in which order rows and entries come, and
how many of the rows each panel of entries needs. The exact backward needs all of them everywhere, the certified one
what its certificate kept. The host knows none of these numbers and never waits for them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends import staircase
from fastgrpo.backends.problem import new_gradients, row_scale, sum_entries
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import grids, tiles
from fastgrpo.kernels.arguments import (
    TO_TRITON,
    Selection,
    describable,
    describe,
    has_extras,
    logit_arguments,
    pick_tile,
    taken_arguments,
)
from fastgrpo.kernels.common import (
    LOG2E,
    cap,
    cap_slope,
    count_taken,
    dlogits_tile,
    has_label,
    hide_taken,
    inverse_temperatures,
    load_stats,
    load_taken,
    raw_logits,
    rounded_product,
    selected_rows,
    store_dlogits,
)
from fastgrpo.kernels.grids import slots
from fastgrpo.kernels.panels import Cut, Panels
from fastgrpo.kernels.plan import positions_of
from fastgrpo.kernels.products import (
    Split,
    add_product,
    dbias_kernel,
    dweight_kernel,
    gather_rows,
    scatter,
    slab_rows,
    spans,
    ways_for,
)
from fastgrpo.kernels.row_math import gradient_at_label
from fastgrpo.kernels.tiles import cdiv
from fastgrpo.lora import has_native, mm16


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "chunk", "N", "copied_rows"])
def dlogits_kernel(
    x_ptr,  # (held, D) rows of hidden, gathered
    x_desc,  # of it, and
    w_desc,  # of the weight, or with ids of the chunk's entries; None: by pointers
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    ids_ptr,  # (V,) the entry at each position; None: in their order
    selection,  # Selection of the rows with a gradient; targets are positions
    taken,  # Taken or None
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (5, N) RowStats
    grad_logp_ptr,  # (N,)
    grad_entropy_ptr,  # (N,) or None
    scale_ptr,  # (1,) power of two
    cuts_ptr,  # (chunks + 1,)
    stops_ptr,  # (panels,) rows that need them
    dlogits_ptr,  # out, the chunk's panels
    sums_ptr,  # (tiles, rows of a panel) fp32 out, sums of the rows of each tile; None: not wanted
    first_row,
    last_row,
    first_held,
    chunk,
    N,
    copied_rows,  # that w_desc reads, with ids: the chunk's are the last ones
    logits,  # Logits
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, tile, height, start, stop, first_v, first_w = dlogits_tile(
        cuts_ptr, stops_ptr, ids_ptr, chunk, first_row, last_row, copied_rows, PANEL, BLOCK_N, BLOCK_V, GROUP
    )
    if stop == 0:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    value = raw_logits(
        x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, ids_ptr, rows, start - first_held, stop - 1 - first_held,
        first_v, first_w, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    inv_temperature = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    row_factor = inv_temperature * tl.load(scale_ptr)
    grad_logp = tl.load(grad_logp_ptr + rows, mask=mask_n, other=0.0) * row_factor
    grad_entropy = None
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=mask_n, other=0.0) * row_factor
    logp, peak, offset, other_mass, entropy = load_stats(stats_ptr, N, rows, mask_n)
    at_label = gradient_at_label(grad_logp, grad_entropy, logp, other_mass, entropy)

    below = rounded_product(cap(value, logits), inv_temperature[:, None]) - peak[:, None]
    p = tl.math.exp2(tl.fma(below, LOG2E, -(offset * LOG2E)[:, None]))
    dz = -grad_logp[:, None] * p
    if grad_entropy_ptr is not None:
        dz -= grad_entropy[:, None] * p * (below + (entropy - offset)[:, None])
    slope = cap_slope(value, logits)
    dz *= slope
    local = label - first_v
    offs_v = tl.arange(0, BLOCK_V)
    if has_label(local, BLOCK_V) | (first_v + BLOCK_V > head.V) | (start + BLOCK_N > stop):
        dz = tl.where(offs_v[None, :] == local[:, None], at_label[:, None] * slope, dz)
        dz = tl.where((first_v + offs_v < head.V)[None, :] & mask_n[:, None], dz, 0.0)  # the GEMMs read whole tiles
    if taken is not None:
        count = count_taken(taken, rows, mask_n, first_v)
        upcoming = load_taken(taken, rows, mask_n, count)
        dz, count, upcoming = hide_taken(dz, 0.0, taken, rows, mask_n, count, upcoming, first_v, BLOCK_V)
    store_dlogits(dz, dlogits_ptr, sums_ptr, block, tile, height, PANEL, BLOCK_N, BLOCK_V)


SLABS_SHARE = 0.2  # of the workspace at most


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

    Attributes:
        gathered: of each factor that a GEMM reads rows of, (held, D): those rows, densely; None for the others. All
            rows' stand where their gradient will be written at the end, so that they need no memory of their own.
        row_sums: of each factor whose rows have a gradient, (held, D) fp32. entry_sums: (entries of a chunk, D) fp32,
            or None.
    """

    def __init__(self, problem, factors, plan, tile, described, spread):
        self.problem, self.factors, self.spread = problem, factors, spread
        self.n, vocab, _ = problem.sizes
        self.device, dtype = problem.hidden.device, problem.params.compute_dtype
        # With a frozen head a row chunk is finished before the next: its fp32 sum is a chunk's, not (N, D). Entries in
        # an order of their own are copied chunk by chunk, and that not once more for each chunk of rows.
        self.rows_outside = plan.entries is None and all(f.d_entries is None for f in factors)
        copies = plan.entries is not None and described
        cell = dtype.itemsize + (4 / tile.cols if spread else 0)
        self.splits = [self.splits_of(k, copies, plan.entries is None) for k in range(len(factors))]
        cut = self.cut(cell, copies, described)
        if cut.rows < self.n:
            self.splits = [Split()] * len(factors)
            cut = self.cut(cell, copies, described)
        self.panels = Panels(cut, vocab, dtype, self.device, plan.stops_head, plan.stops_hidden, plan.entries)
        if copies:
            self.panels.copy_entries(problem.weight)
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

    def splits_of(self, k, copies, exact):
        """:class:`Split` of factor k's sum, whose slabs may be a small part of the workspace."""
        depth, tile = self.factors[k].depth, tiles.for_tensor(
            "dhidden", self.problem.params.compute_dtype, self.device, described=copies and k == 0)  # fmt: skip
        ways = ways_for(tile, depth, grids.processor_count(self.device))
        rows = slab_rows(ways, tile)
        if exact or self.factors[k].d_rows is None or 4 * rows * depth > SLABS_SHARE * self.problem.params.workspace:
            return Split()
        return Split(ways, tile.rows, rows)

    def new_sum(self, k, held):
        if self.factors[k].d_rows is None:
            return None
        return self.new(held + self.splits[k].rows, self.factors[k].depth)

    def cut(self, cell, copies, described):
        factors, problem = self.factors, self.problem
        per_row = sum(f.depth * f.rows.element_size() for k, f in enumerate(factors) if self.copies_a_chunk(k))
        if self.rows_outside:
            per_row += sum(4 * f.depth for f in factors if f.d_rows is not None)
        summed = sum(4 * f.depth for f in factors if f.d_entries is not None)
        copied = problem.weight.shape[1] if copies else 0  # each entry takes its width of a panel's rows
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


def backward(problem, stats, grad_logp, grad_entropy, needs):
    """Gradients of hidden, weight and bias, and with LoRA of low and up; never waits for the device.

    Args:
        stats: (5, N) of :func:`fastgrpo.kernels.forward.forward`.
        grad_logp: (N,) float32. grad_entropy: (N,) float32 or None.
        needs: :class:`Gradients` of bools; the result has None where one is False.
    """
    grads = [g.contiguous() for g in (grad_logp, grad_entropy) if g is not None]
    active = (problem.targets != IGNORE) & torch.stack([g != 0 for g in grads]).any(0)
    return climb(problem, stats, grads, active, needs, lambda: staircase.exact(
        active, *compact_rows(active), problem.weight.shape[0]))  # fmt: skip


def climb(problem, stats, grads, active, needs, make_plan, launcher=None):
    out = new_gradients(problem, needs)
    if problem.targets.numel() == 0 or not any(needs):
        for x in out.of_head:
            if x is not None:
                x.zero_()
        return out
    plan = make_plan()
    d_bias = torch.zeros(problem.bias.shape, dtype=torch.float32, device=problem.bias.device) if needs.bias else None
    scale = row_scale(*(torch.where(active, g, 0.0) for g in grads)) if plan.scale is None else plan.scale
    factors = make_factors(problem, scale, out)
    # A row's dlogits add up to 0, so what those made lack of it is what was left out: put back as if spread evenly.
    sums_to_0 = problem.params.softcap is None and not problem.params.shard
    spread = plan.entries is not None and sums_to_0 and any(needs.of_rows)
    launcher = Launcher if launcher is None else launcher
    tile, described = pick_tile(launcher.kernel(problem, grads), problem)
    work = Work(problem, factors, plan, tile, described, spread)
    launch = launcher(problem, stats, grads, plan, scale, work, tile, described)
    launch.gather_all(0, work.n, a_chunk=False)
    rows_in_hand = chunk_in_hand = None
    for first_row, last_row, chunk in work:
        rows = first_row, last_row
        if rows != rows_in_hand:
            launch.gather_all(*rows, a_chunk=True)
            rows_in_hand = rows
        if chunk != chunk_in_hand:
            work.panels.copy_chunk(problem.weight, chunk)
            chunk_in_hand = chunk
        launch.dlogits(*rows, chunk)
        for k, factor in enumerate(factors):
            if factor.d_rows is not None:
                launch.dhidden(k, *rows, chunk)
            if factor.d_entries is not None:
                launch.dweight(k, *rows, chunk)
        if d_bias is not None:
            launch.dbias(d_bias, *rows, chunk)
        if work.rows_outside and chunk == work.panels.chunks - 1:
            launch.scatter_all(*rows)
    if not work.rows_outside:
        launch.scatter_all(0, work.n)
    if d_bias is not None:
        out.bias.copy_(d_bias)
    return out


class Launcher:
    """Launches the backward's kernels over one chunk."""

    def __init__(self, problem, stats, grads, plan, scale, work, tile, described):
        self.problem, self.stats, self.grads, self.plan = problem, stats, grads, plan
        self.scale, self.work, self.tile = scale, work, tile
        self.head, self.logits, self.low_rank = logit_arguments(problem)
        self.compute = TO_TRITON[str(problem.params.compute_dtype)]
        self.selection = Selection(plan.rows, plan.count, self.positions(problem.targets))
        taken = problem.taken
        if taken is not None and plan.entries is not None:
            taken = self.positions(taken).sort(1).values
        self.taken = taken_arguments(taken)
        if work.spread:
            work.panels.sum_rows(tile)
        self.operands = None, None
        if described:
            x, weight = work.gathered[0], work.panels.described(problem.weight, True)
            self.operands = describe(x, tile.rows, tile.depth), describe(weight, tile.cols, tile.depth)
        self.products = [self.dweight_tile(k) for k in range(len(work.factors))]

    def positions(self, targets):
        """Where each target's entry is in the plan's order; what is no entry stays as it is."""
        entries = self.plan.entries
        if entries is None:
            return targets
        if self.plan.positions is not None:
            return positions_of(targets, self.plan.positions)
        positions = torch.empty_like(entries).scatter_(0, entries, torch.arange(len(entries), device=entries.device))
        inside = (targets >= 0) & (targets < len(entries))
        return torch.where(inside, positions[torch.where(inside, targets, 0)], targets)

    def gather_all(self, first_row, last_row, a_chunk):
        """Some rows of each factor that a GEMM reads rows of, into buffers of a chunk or into those of all rows."""
        for k, (factor, out) in enumerate(zip(self.work.factors, self.work.gathered)):
            if self.work.is_read(k) and self.work.copies_a_chunk(k) == a_chunk:
                held = self.work.first_held(first_row, out)
                gather_rows(factor.rows, self.plan.rows, self.plan.count, out, first_row, last_row, held)

    @staticmethod
    def kernel(problem, grads):
        """Whose tile the dlogits take."""
        return "dlogits_full" if len(grads) > 1 or has_extras(problem) else "dlogits"

    def dlogits(self, first_row, last_row, chunk):
        dlogits_kernel[(self.grid(self.tile),)](
            **self.tile_arguments(first_row, last_row, chunk),
            taken=self.taken,
            grad_logp_ptr=self.grads[0],
            grad_entropy_ptr=self.grads[1] if len(self.grads) > 1 else None,
        )

    def tile_arguments(self, first_row, last_row, chunk):
        """What any kernel of dlogits takes, and the launch."""
        problem, work, tile = self.problem, self.work, self.tile
        x, panels = work.gathered[0], work.panels
        n, _, depth = problem.sizes
        return {
            "x_ptr": x,
            "x_desc": self.operands[0],
            "w_desc": self.operands[1],
            "head": self.head,
            "bias_ptr": problem.bias,
            "low_rank": self.low_rank,
            "ids_ptr": panels.ids,
            "selection": self.selection,
            "temperature_ptr": problem.temperature,
            "stats_ptr": self.stats,
            "scale_ptr": self.scale,
            "cuts_ptr": panels.cuts,
            "stops_ptr": panels.stops,
            "dlogits_ptr": panels.dlogits,
            "sums_ptr": panels.sums,
            "first_row": first_row,
            "last_row": last_row,
            "first_held": work.first_held(first_row, x),
            "chunk": chunk,
            "N": n,
            "copied_rows": panels.copied_rows,
            "logits": self.logits,
            "WHOLE_D": depth % tile.depth == 0,
            "COMPUTE": self.compute,
            "PANEL": tiles.WIDTH,
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.cols,
            "BLOCK_D": tile.depth,
            "GROUP": tile.group,
            **tile.options,
        }

    def grid(self, tile):
        """Programs for the most tiles that a chunk can have, in whole groups of row blocks."""
        panels, width = self.work.panels, tiles.WIDTH
        units = min(panels.dlogits.shape[0] // width, panels.rows // width * panels.most)
        groups = cdiv(panels.rows // tile.rows, tile.group)
        spare = tile.group * panels.most * (width // tile.cols)  # a last group that is not full
        return min(units * (width // tile.rows) * (width // tile.cols) + spare, groups * spare)

    def dhidden(self, k, first_row, last_row, chunk):
        work, factor = self.work, self.work.factors[k]
        total = work.row_sums[k]
        add_product(
            work.panels, factor.entries, total, self.plan.count, first_row, last_row, chunk,
            first_held=work.first_held(first_row, total), mean=work.means[k], copied=k == 0,
            ways=work.splits[k].ways,
        )  # fmt: skip

    def dweight_tile(self, k):
        """-> Tile of dlogits times factor k's rows, descriptors of both or None."""
        work, x, dlogits = self.work, self.work.gathered[k], self.work.panels.dlogits
        if work.factors[k].d_entries is None:
            return None
        described = describable(work.device, dlogits.dtype, x)
        wide = described and work.entry_sums[k] is None  # sums that are read leave no room for wide tiles
        tile = tiles.for_tensor("dweight", dlogits.dtype, work.device, wide)
        if not described:
            return tile, None, None
        return tile, describe(dlogits, tile.depth, tile.rows), describe(x, tile.depth, tile.cols)

    def dweight(self, k, first_row, last_row, chunk):
        work, factor, x = self.work, self.work.factors[k], self.work.gathered[k]
        panels, (tile, dlogits_desc, x_desc) = work.panels, self.products[k]
        dweight_kernel[(panels.most * (tiles.WIDTH // tile.rows) * cdiv(factor.depth, tile.cols),)](
            dlogits_ptr=panels.dlogits,
            dlogits_desc=dlogits_desc,
            x_desc=x_desc,
            x_ptr=x,
            ids_ptr=panels.ids,
            cuts_ptr=panels.cuts,
            stops_ptr=panels.stops,
            scale_ptr=factor.entries_scale,
            sum_ptr=work.entry_sums[k],
            dweight_ptr=factor.d_entries,
            first_row=first_row,
            last_row=last_row,
            first_held=work.first_held(first_row, x),
            final=int(last_row == work.n),
            chunk=chunk,
            V=panels.vocab,
            D=factor.depth,
            COMPUTE=self.compute,
            PANEL=tiles.WIDTH,
            BLOCK_V=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_N=tile.depth,
            **tile.options,
        )

    def dbias(self, d_bias, first_row, last_row, chunk):
        panels, block = self.work.panels, 64
        dbias_kernel[(panels.most * (tiles.WIDTH // block),)](
            dlogits_ptr=panels.dlogits,
            ids_ptr=panels.ids,
            cuts_ptr=panels.cuts,
            stops_ptr=panels.stops,
            scale_ptr=self.scale,
            dbias_ptr=d_bias,
            first_row=first_row,
            last_row=last_row,
            chunk=chunk,
            V=panels.vocab,
            PANEL=tiles.WIDTH,
            BLOCK_N=32,
            BLOCK_V=block,
        )

    def scatter_all(self, first_row, last_row):
        """The finished sums of some rows into their gradients, over what was gathered there."""
        for k, (factor, total) in enumerate(zip(self.work.factors, self.work.row_sums)):
            if total is None:
                continue
            held = self.work.first_held(first_row, total)
            scatter(total, self.work.splits[k], self.plan.rows, self.plan.count, factor.rows_scale, factor.d_rows,
                    first_row, last_row, held)  # fmt: skip
