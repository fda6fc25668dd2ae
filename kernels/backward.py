"""The dense backward: tiles of logits are made again, turned into dlogits in a bounded buffer, and fed to two GEMMs.

It goes up a staircase: :class:`fastgrpo.backends.staircase.Staircase` says in which order rows and entries come, and
how many of the rows each panel of entries needs. The exact backward needs all of them everywhere, the certified one
what its certificate kept. The host knows none of these numbers and never waits for them.
"""

import functools

import torch
import triton
import triton.language as tl

from fastgrpo.backends import staircase
from fastgrpo.backends.problem import active_rows, new_gradients, row_scale
from fastgrpo.inputs import compact_rows
from fastgrpo.kernels import tiles
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
    cap,
    cap_slope,
    chunk_panels,
    chunk_tiles,
    count_taken,
    dlogits_tile,
    has_label,
    hide_taken,
    load_taken,
    raw_logits,
    store_dlogits,
    without_dust,
)
from fastgrpo.kernels.copies import gather_rows
from fastgrpo.kernels.grids import slots
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.plan import positions_of
from fastgrpo.kernels.products import Product, dbias_kernel, dweight_kernel, scatter
from fastgrpo.kernels.row_terms import rates, row_terms
from fastgrpo.kernels.tiles import cdiv
from fastgrpo.kernels.work import Work, make_factors


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "chunk", "copied_rows"])
def dlogits_kernel(
    x_ptr,  # (held, D) rows of hidden, gathered
    x_desc,  # of it, and
    w_desc,  # of the weight, or with ids of the chunk's entries; None: by pointers
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    ids_ptr,  # (V,) the entry at each position; None: in their order
    rows_ptr,  # (N,) the rows in the order of the work
    taken,  # Taken or None
    terms,  # RowTerms
    lean_ptr,  # (N,) fp32 of row_terms where the entropy has a gradient, or None
    rate_ptr,  # (N,) fp32 of row_terms where rows have their own temperatures, or None
    cuts_ptr,  # (chunks + 1,)
    stops_ptr,  # (panels,) rows that need them
    dlogits_ptr,  # out, the chunk's panels
    sums_ptr,  # (tiles, rows of a panel) fp32 out, sums of the rows of each tile; None: not wanted
    first_row,
    last_row,
    first_held,
    chunk,
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
    first, last, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    total = chunk_tiles(first, last, height, PANEL, BLOCK_N, BLOCK_V)
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        block, tile, start, stop, first_v, first_w = dlogits_tile(
            number, first, last, height, stops_ptr, ids_ptr, first_row, last_row, copied_rows,
            PANEL, BLOCK_N, BLOCK_V, GROUP,
        )  # fmt: skip
        if stop > 0:
            tl.assume(head.D > 0)
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < stop
            rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
            value = raw_logits(
                x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, ids_ptr, rows, start - first_held,
                stop - 1 - first_held, first_v, first_w, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            rate = rates(rate_ptr, offs_n, logits, BLOCK_N)
            base, factor = tl.load(terms.base_ptr + offs_n), tl.load(terms.factor_ptr + offs_n)[:, None]
            exponent = tl.fma(cap(value, logits), rate[:, None], -base[:, None])
            slope = cap_slope(value, logits)
            if lean_ptr is not None:
                factor = tl.fma(tl.load(lean_ptr + offs_n)[:, None], exponent, factor)
            dz = tl.math.exp2(exponent) * factor * slope
            if lean_ptr is not None or logits.softcap is not None:
                dz = without_dust(dz)
            local = tl.load(terms.label_ptr + offs_n) - first_v
            offs_v = tl.arange(0, BLOCK_V)
            if has_label(local, BLOCK_V) | (first_v + BLOCK_V > head.V) | (start + BLOCK_N > stop):
                at_label = tl.load(terms.at_label_ptr + offs_n)
                dz = tl.where(offs_v[None, :] == local[:, None], at_label[:, None] * slope, dz)
                inside = (first_v + offs_v < head.V)[None, :] & mask_n[:, None]
                dz = tl.where(inside, dz, 0.0)  # the GEMMs read whole tiles
            if taken is not None:
                count = count_taken(taken, rows, mask_n, first_v)
                upcoming = load_taken(taken, rows, mask_n, count)
                dz, count, upcoming = hide_taken(dz, 0.0, taken, rows, mask_n, count, upcoming, first_v, BLOCK_V)
            store_dlogits(dz, dlogits_ptr, sums_ptr, block, tile, height, PANEL, BLOCK_N, BLOCK_V)


def backward(problem, stats, grad_logp, grad_entropy, needs, launcher=None):
    """Gradients of hidden, weight and bias, and with LoRA of low and up; never waits for the device.

    Args:
        stats: (5, N) of :func:`fastgrpo.kernels.forward.forward`, or what the launcher reads.
        grad_logp: (N,) float32. grad_entropy: (N,) float32 or None.
        needs: :class:`Gradients` of bools; the result has None where one is False.
        launcher: a subclass of :class:`Launcher`, or None for that one.
    """
    grads = [g.contiguous() for g in (grad_logp, grad_entropy) if g is not None]
    active = active_rows(problem.targets, *grads)
    return climb(problem, stats, grads, active, needs, lambda: staircase.exact(
        active, *compact_rows(active), problem.weight.shape[0]), launcher)  # fmt: skip


def climb(problem, stats, grads, active, needs, make_plan, launcher=None):
    out = new_gradients(problem, needs)
    if problem.targets.numel() == 0 or not any(needs):
        for x in out.of_head:
            if x is not None:
                x.zero_()
        return out
    plan = make_plan()
    d_bias = torch.zeros(problem.bias.shape, dtype=torch.float32, device=problem.bias.device) if needs.bias else None
    scale = plan.scale
    if scale is None:
        scale = row_scale(problem, stats, slice(None), *(torch.where(active, g, 0.0) for g in grads))
    factors = make_factors(problem, scale, out)
    # A row's dlogits add up to 0, so what those made lack of it is what was left out: put back as if spread evenly.
    sums_to_0 = problem.params.softcap is None and not problem.params.shard
    spread = plan.entries is not None and sums_to_0 and any(needs.of_rows)
    launcher = Launcher if launcher is None else launcher
    tile, described = pick_tile(launcher.kernel(problem, grads), problem)
    heads = (problem.weight, *launcher.beside(problem)) if described else ()
    work = Work(problem, factors, plan, tile, heads, spread)
    launch = launcher(problem, stats, grads, plan, scale, work, tile, described, d_bias)
    launch.gather_all(0, work.n, a_chunk=False)
    rows_in_hand = chunk_in_hand = None
    for first_row, last_row, chunk in work:
        rows = first_row, last_row
        if rows != rows_in_hand:
            launch.gather_all(*rows, a_chunk=True)
            rows_in_hand = rows
        if chunk != chunk_in_hand:
            work.panels.copy_chunk(chunk)
            chunk_in_hand = chunk
        launch.dlogits(*rows, chunk)
        for product in launch.products:
            product(first_row=first_row, last_row=last_row, chunk=chunk)
        if work.rows_outside and chunk == work.panels.chunks - 1:
            launch.scatter_all(*rows)
    if not work.rows_outside:
        launch.scatter_all(0, work.n)
    if d_bias is not None:
        out.bias.copy_(d_bias)
    return out


class Launcher:
    """Launches the backward's kernels over one chunk.

    Attributes:
        products: of the chunk's dlogits, each launched by ``(first_row=, last_row=, chunk=)``.
    """

    def __init__(self, problem, stats, grads, plan, scale, work, tile, described, d_bias):
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
            x, weight = work.gathered[0], work.panels.described(problem.weight)
            self.operands = describe(x, tile.rows, tile.depth), describe(weight, tile.cols, tile.depth)
        self.products = list(self.make_products(d_bias))

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
    def beside(problem):
        """Heads whose entries descriptors read beside the problem's own."""
        return ()

    @staticmethod
    def kernel(problem, grads):
        """Whose tile the dlogits take."""
        return "dlogits_full" if len(grads) > 1 or has_extras(problem) else "dlogits"

    @functools.cached_property
    def terms(self):
        """Of all rows, see :func:`row_terms`."""
        return row_terms(self.problem, self.selection, self.stats, self.grads, self.scale, self.head.V, self.logits)

    def dlogits(self, first_row, last_row, chunk):
        held = self.work.first_held(first_row, self.work.gathered[0])
        self.dlogits_launch(first_row=first_row, last_row=last_row, first_held=held, chunk=chunk)

    @functools.cached_property
    def dlogits_launch(self):
        terms, lean, rate = self.terms
        return self.tile_launch(
            dlogits_kernel,
            rows_ptr=self.selection.rows_ptr,
            taken=self.taken,
            terms=terms,
            lean_ptr=lean,
            rate_ptr=rate,
        )

    def tile_launch(self, kernel, **arguments):
        """Of a kernel of dlogits. arguments: beside those that all of them take."""
        return functools.partial(Launch(kernel, **self.tile_arguments(), **arguments), self.grid(self.tile))

    def tile_arguments(self):
        problem, work, tile = self.problem, self.work, self.tile
        x, panels = work.gathered[0], work.panels
        return {
            "x_ptr": x,
            "x_desc": self.operands[0],
            "w_desc": self.operands[1],
            "head": self.head,
            "bias_ptr": problem.bias,
            "low_rank": self.low_rank,
            "ids_ptr": panels.ids,
            "cuts_ptr": panels.cuts,
            "stops_ptr": panels.stops,
            "dlogits_ptr": panels.dlogits,
            "sums_ptr": panels.sums,
            "copied_rows": panels.copied_rows,
            "logits": self.logits,
            "WHOLE_D": x.shape[1] % tile.depth == 0,
            "COMPUTE": self.compute,
            "PANEL": tiles.WIDTH,
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.cols,
            "BLOCK_D": tile.depth,
            "GROUP": tile.group,
            **tile.options,
        }

    def grid(self, tile):
        """Programs that go through a chunk's tiles: twice as many as :func:`slots` has, which some kernels fit, and no
        more, for most chunks can be empty."""
        return min(self.most_tiles(tile), 2 * slots(tile, self.problem.hidden.device))

    def most_tiles(self, tile):
        """That a chunk can have."""
        panels, width = self.work.panels, tiles.WIDTH
        units = min(panels.dlogits.shape[0] // width, panels.rows // width * panels.most)
        return units * (width // tile.rows) * (width // tile.cols)

    def make_products(self, d_bias):
        for k, factor in enumerate(self.work.factors):
            if factor.d_rows is not None:
                yield self.dhidden(k)
            if factor.d_entries is not None:
                yield self.dweight(k)
        if d_bias is not None:
            yield self.dbias(d_bias)

    def dhidden(self, k):
        work, entries, total = self.work, self.work.factors[k].entries, self.work.row_sums[k]
        product = Product(work.panels, entries, total, self.plan.count, mean=work.means[k],
                          split=work.splits[k])  # fmt: skip

        def launch(first_row, last_row, chunk):
            product(first_row, last_row, chunk, work.first_held(first_row, total))

        return launch

    def dweight_tile(self, k):
        """-> Tile of dlogits times factor k's rows, descriptors of both or None."""
        work, x, dlogits = self.work, self.work.gathered[k], self.work.panels.dlogits
        described = describable("dweight", work.device, dlogits.dtype, x)
        wide = described and work.entry_sums[k] is None  # sums that are read leave no room for wide tiles
        tile = tiles.for_tensor("dweight", dlogits.dtype, work.device, wide)
        if not described:
            return tile, None, None
        return tile, describe(dlogits, tile.depth, tile.rows), describe(x, tile.depth, tile.cols)

    def dweight(self, k):
        work, factor, x = self.work, self.work.factors[k], self.work.gathered[k]
        panels, (tile, dlogits_desc, x_desc) = work.panels, self.dweight_tile(k)
        programs = panels.most * (tiles.WIDTH // tile.rows) * cdiv(factor.depth, tile.cols)
        product = Launch(
            dweight_kernel,
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
            V=panels.vocab,
            D=factor.depth,
            COMPUTE=self.compute,
            PANEL=tiles.WIDTH,
            BLOCK_V=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_N=tile.depth,
            **tile.options,
        )

        def launch(first_row, last_row, chunk):
            held, final = work.first_held(first_row, x), int(last_row == work.n)
            product(programs, first_row=first_row, last_row=last_row, first_held=held, final=final, chunk=chunk)

        return launch

    def dbias(self, d_bias):
        panels, block = self.work.panels, 64
        launch = Launch(
            dbias_kernel,
            dlogits_ptr=panels.dlogits,
            ids_ptr=panels.ids,
            cuts_ptr=panels.cuts,
            stops_ptr=panels.stops,
            scale_ptr=self.scale,
            dbias_ptr=d_bias,
            V=panels.vocab,
            PANEL=tiles.WIDTH,
            BLOCK_N=32,
            BLOCK_V=block,
        )
        return functools.partial(launch, panels.most * (tiles.WIDTH // block))

    def scatter_all(self, first_row, last_row):
        """The finished sums of some rows into their gradients, over what was gathered there."""
        for k, (factor, total) in enumerate(zip(self.work.factors, self.work.row_sums)):
            if total is None:
                continue
            held = self.work.first_held(first_row, total)
            scatter(total, self.work.splits[k], self.plan.rows, self.plan.count, factor.rows_scale, factor.d_rows,
                    first_row, last_row, held)  # fmt: skip
