"""Forward of a head that takes no gradient: beside the statistics each row's d logp / d hidden, in two GEMMs.

d logp / d hidden = chain (1 - p_y) (s_y W_y - E[s_v W_v]), s softcap's slope, E over v != y with p renormalised without
the label. So nothing cancels as p_y -> 1, and a backward only multiplies rows by the gradient of their log-prob.

A chunk of entries at a time: a kernel writes each tile's masses exp(z - reference) s and statistics, a second folds the
statistics into those so far, a third brings tiles that have a reference of their own to their row's, and the GEMM of
the exact backward adds masses @ W. A last kernel makes the directions of the sums, in place.
"""

import torch
import triton
import triton.language as tl

from fastgrpo.backends.problem import RowPartials
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import TO_TRITON, Selection, describe, has_extras, logit_arguments, pick_tile
from fastgrpo.kernels.combine import combine, fold_runs
from fastgrpo.kernels.common import (
    FLOOR,
    LOG2E,
    NOTHING,
    cap,
    chunk_panels,
    group_blocks,
    has_label,
    inverse_temperatures,
    known_label,
    load_partials,
    load_stats,
    panel_pointers,
    raw_logits,
    rounded_product,
    selected_rows,
    softcap_slope,
    store_rows,
    without_dust,
)
from fastgrpo.kernels.copies import copy_tile, gather_rows
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.panels import Cut, Panels
from fastgrpo.kernels.products import Product, spans
from fastgrpo.kernels.row_math import direction_factors
from fastgrpo.kernels.tiles import cdiv

# Of a tile RowPartials, the reference of its masses and the label's slope; "running" the same of all entries so far,
# with the reference of their sums.
PARTIALS = len(RowPartials._fields) + 2
REFERENCE, SLOPE = map(tl.constexpr, range(PARTIALS - 2, PARTIALS))
# A row's reference is LOWER nats below its peak so far, and a tile takes its own where its peak is more than HEADROOM
# above that: masses then lie within fp16's range, and after the first chunks nearly all have the row's reference.
LOWER, HEADROOM = tl.constexpr(6.0), tl.constexpr(10.0)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_v", "tiles_v", "chunk"])
def masses_kernel(
    x_ptr,  # (rows, D) the chunk's rows of hidden, dense
    x_desc,  # of it, and
    w_desc,  # of the weight; None: by pointers
    head,  # Head
    bias_ptr,  # (V,) or None
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    running_ptr,  # (PARTIALS, N), its first row: the peak of the entries before first_v
    cuts_ptr,  # (chunks + 1,) panels
    stops_ptr,  # (panels,) rows that need them: all
    masses_ptr,  # panels out, exp(z - reference) times softcap's slope, 0 at the label
    partials_ptr,  # (PARTIALS, tiles_v, last_row - first_row) out
    first_row,
    last_row,
    first_v,
    tiles_v,  # of the chunk
    chunk,
    logits,  # Logits
    ENTROPY: tl.constexpr,
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, tile = group_blocks(tl.program_id(0), tiles_v, GROUP)
    start = first_row + block * BLOCK_N
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    if start >= stop:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    inv_temperature = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    tile_v = first_v + tile * BLOCK_V
    raw = raw_logits(
        x_ptr, x_desc, w_desc, head, bias_ptr, None, None, rows, block * BLOCK_N, stop - 1 - first_row, tile_v, tile_v,
        WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip

    z = rounded_product(cap(raw, logits), inv_temperature[:, None])
    offs_v = tile_v + tl.arange(0, BLOCK_V)
    label_z = tl.zeros((BLOCK_N,), tl.float32)
    if has_label(label - tile_v, BLOCK_V) | (tile_v + BLOCK_V > head.V):
        is_label = offs_v[None, :] == label[:, None]
        label_z = tl.sum(tl.where(is_label, z, 0.0), axis=1)
        z = tl.where(is_label | (offs_v >= head.V)[None, :], NOTHING, z)
    peak = tl.max(z, axis=1)
    row_reference = tl.load(running_ptr + offs_n, mask=mask_n, other=0.0) - LOWER
    reference = tl.where(peak <= row_reference + HEADROOM, row_reference, peak - LOWER)
    # the sums are kept below their true peak, as the forward's are, so that they lose no digit
    peak = tl.maximum(peak, row_reference, propagate_nan=tl.PropagateNan.ALL)
    to_peak = tl.exp(reference - peak)
    e = tl.math.exp2((z - reference[:, None]) * LOG2E)
    total = tl.sum(e, axis=1) * to_peak
    spread = tl.zeros((BLOCK_N,), tl.float32)
    if ENTROPY:
        spread = tl.sum(e * (peak[:, None] - z), axis=1) * to_peak
    out = partials_ptr + tl.cast(tile, tl.int64) * (last_row - first_row) + (offs_n - first_row)
    step = tl.cast(tiles_v, tl.int64) * (last_row - first_row)
    store_rows(out, (peak, total, spread, label_z, reference), step, mask_n)
    slope = softcap_slope(raw, logits)
    if logits.softcap is not None:
        at_label = tl.sum(tl.where(offs_v[None, :] == label[:, None], slope, 0.0), axis=1)
        tl.store(out + SLOPE * step, at_label, mask=mask_n)
    _, _, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    at = panel_pointers(masses_ptr, height, block * BLOCK_N, tile * BLOCK_V, PANEL, BLOCK_N, BLOCK_V)
    tl.store(at, without_dust(e * slope).to(masses_ptr.dtype.element_ty))  # rows that are not there are not read


@triton.jit(do_not_specialize=["first_row", "last_row", "N", "tiles_v"])
def fold_kernel(
    partials_ptr,  # (PARTIALS, tiles_v, last_row - first_row)
    running_ptr,  # (PARTIALS, N), changed
    decay_ptr,  # (N,) out: from the sums' old reference to the new
    count_ptr,  # (1,)
    first_row,
    last_row,
    N,
    tiles_v,
    logits,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tiles' statistics into the rows', and the reference that the chunk's masses are to have."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stop = tl.minimum(tl.load(count_ptr), last_row) - first_row
    if tl.program_id(0) * BLOCK >= stop:
        return
    mask = offs < stop
    at, n = running_ptr + first_row + offs, tl.cast(N, tl.int64)
    peak, total, spread, label_z = load_partials(at, n, mask)
    peak, total, spread, label_z, _ = fold_runs(
        partials_ptr, offs, mask, last_row - first_row, tiles_v, peak, total, spread, label_z, total, False, RUNS
    )
    reference = tl.full((BLOCK,), FLOOR, tl.float32)
    slope = tl.load(at + SLOPE * n, mask=mask, other=0.0)
    step = tl.cast(tiles_v, tl.int64) * (last_row - first_row)
    for first in range(0, tiles_v, RUNS):
        tile = first + tl.arange(0, RUNS)
        part = partials_ptr + REFERENCE * step + tile.to(tl.int64)[:, None] * (last_row - first_row) + offs[None, :]
        inside = (tile < tiles_v)[:, None] & mask[None, :]
        reference = tl.maximum(reference, tl.max(tl.load(part, mask=inside, other=FLOOR), axis=0))
        if logits.softcap is not None:
            slopes = tl.load(part + (SLOPE - REFERENCE) * step, mask=inside, other=0.0)
            slope += tl.sum(slopes, axis=0)
    old_reference = tl.load(at + REFERENCE * n, mask=mask, other=0.0)
    tl.store(decay_ptr + first_row + offs, tl.exp(old_reference - reference), mask=mask)
    store_rows(at, (peak, total, spread, label_z, reference, slope), n, mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "N", "tiles_v", "chunk"])
def level_kernel(
    masses_ptr,  # panels, changed
    partials_ptr,  # (PARTIALS, tiles_v, last_row - first_row)
    running_ptr,  # (PARTIALS, N)
    count_ptr,  # (1,)
    cuts_ptr,  # (chunks + 1,) panels
    stops_ptr,  # (panels,)
    first_row,
    last_row,
    N,
    tiles_v,
    chunk,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,  # entries of a tile
):
    """Every tile's masses to their rows' reference."""
    blocks = tl.cdiv(last_row - first_row, BLOCK_N)
    tile = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < tl.minimum(tl.load(count_ptr), last_row) - first_row
    step = tl.cast(tiles_v, tl.int64) * (last_row - first_row)
    own = partials_ptr + REFERENCE * step + tl.cast(tile, tl.int64) * (last_row - first_row) + offs
    common = running_ptr + REFERENCE * tl.cast(N, tl.int64) + first_row + offs
    factor = tl.exp(tl.load(own, mask=mask, other=0.0) - tl.load(common, mask=mask, other=0.0))
    if tl.max((factor != 1.0).to(tl.int32), axis=0) == 0:
        return
    _, _, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    row = tl.program_id(0) % blocks * BLOCK_N
    at = panel_pointers(masses_ptr, height, row, tile * BLOCK_V, PANEL, BLOCK_N, BLOCK_V)
    masses = tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32) * factor[:, None]
    tl.store(at, without_dust(masses).to(masses_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["N"])
def directions_kernel(
    head,  # Head
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    running_ptr,  # (PARTIALS, N)
    stats_ptr,  # (5, N) RowStats
    directions_ptr,  # (N, D) sums of masses times rows of the weight; out: d logp / d hidden, 0 for ignored rows
    N,
    logits,  # Logits
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(head.D, BLOCK_D)
    offs_n = tl.program_id(0) // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.cast(N, tl.int64)
    counted = offs_n < tl.load(selection.count_ptr)
    rows = tl.load(selection.rows_ptr + offs_n, mask=offs_n < N, other=0)
    label = known_label(selection.targets_ptr, rows, counted, head.V)
    label = tl.where(label >= 0, label, 0).to(tl.int64)  # of a bad target: other_mass is NaN
    chain = inverse_temperatures(temperature_ptr, rows, counted, logits, BLOCK_N)
    if logits.logit_scale is not None:
        chain *= logits.logit_scale
    _, _, _, other_mass, _ = load_stats(stats_ptr, N, rows, counted)
    at = running_ptr + offs_n
    peak, total, _, _ = load_partials(at, n, counted)
    at_label, at_others = direction_factors(chain, other_mass, total)
    at_others *= tl.exp(tl.load(at + REFERENCE * n, mask=counted, other=FLOOR) - peak)
    if logits.softcap is not None:
        at_label *= tl.load(at + SLOPE * n, mask=counted, other=0.0)
    mask = counted[:, None] & (offs_d < head.D)[None, :]
    w_ptrs = head.weight_ptr + label[:, None] * head.stride_v + offs_d[None, :] * tl.cast(head.stride_d, tl.int64)
    direction = tl.load(w_ptrs, mask=mask, other=0.0).to(COMPUTE).to(tl.float32) * at_label[:, None]
    out = directions_ptr + rows[:, None] * head.D + offs_d[None, :]
    direction -= tl.load(out, mask=mask, other=0.0) * at_others[:, None]
    tl.store(out, tl.where(mask, direction, 0.0), mask=(offs_n < N)[:, None] & (offs_d < head.D)[None, :])


def frozen_forward(problem):
    """Of a head without LoRA: the statistics of :func:`fastgrpo.kernels.forward.forward`, and d logp / d hidden.

    Never waits for the device. Holds the workspace and 28 bytes a row beyond its results.

    Returns:
        (5, N) and (N, D) float32: 0 in ignored rows, NaN in those of a target outside the vocabulary.
    """
    n, vocab, depth = problem.sizes
    stats = problem.new_stats(torch.float32)
    directions = torch.empty(n, depth, dtype=torch.float32, device=problem.hidden.device)
    if n == 0:
        return stats, directions
    launch = Launcher(problem, *compact_rows(problem.targets != IGNORE), directions)
    for rows in spans(n, launch.panels.rows):
        gather_rows(problem.hidden, launch.selection.rows_ptr, launch.selection.count_ptr, launch.x, *rows, rows[0])
        for chunk, entries in enumerate(spans(vocab, launch.width)):
            launch.masses(*rows, *entries, chunk)
            launch.fold(*rows, *entries)
            launch.level(*rows, *entries, chunk)
            launch.product(*rows, chunk)
    combine(problem, launch.running[:, None], launch.selection, stats=stats)
    launch.directions(stats, directions)
    return stats, directions


class Launcher:
    """Launches the kernels over one chunk, which it has the buffers of."""

    def __init__(self, problem, rows, count, directions):
        self.problem, self.selection = problem, Selection(rows, count, problem.targets)
        self.head, self.logits, _ = logit_arguments(problem)
        dtype, device = problem.params.compute_dtype, problem.hidden.device
        full = problem.params.entropy or has_extras(problem)
        self.tile, self.described = pick_tile("masses_full" if full else "masses", problem)
        n, vocab, depth = problem.sizes
        cell = dtype.itemsize + 4 * PARTIALS / self.tile.cols
        cut = Cut(n, vocab, problem.params.workspace, cell, depth * problem.hidden.element_size(), 0, 0)
        # All rows need all entries: the host may cut them, and give each tile's statistics a place.
        panels = cdiv(cut.panels, cut.chunks)
        self.width = panels * tiles.WIDTH
        cuts = (torch.arange(cut.chunks + 1, dtype=torch.int32, device=device) * panels).clamp_(max=cut.panels)
        stops = count.to(torch.int32).expand(cut.panels).contiguous()
        self.panels = Panels(cut, vocab, dtype, device, stops, cuts=cuts)
        held = min(cut.rows, n)
        self.x = torch.empty(held, depth, dtype=problem.hidden.dtype, device=device)
        fp32 = {"dtype": torch.float32, "device": device}
        self.partials = torch.empty(PARTIALS * self.tiles_v(0, min(self.width, vocab)) * held, **fp32)
        self.running = torch.zeros(PARTIALS, n, **fp32)
        RowPartials(*self.running[: REFERENCE.value]).peak.fill_(FLOOR.value)
        self.running[REFERENCE.value].fill_(FLOOR.value)
        self.decay = torch.empty(n, **fp32)
        self.product = Product(self.panels, problem.weight, directions, count, rows=rows, decay=self.decay)
        self.masses_launch, self.fold_launch = self.make_masses(), self.make_fold()
        self.level_launch = self.make_level()

    def tiles_v(self, first_v, last_v):
        """Of whole panels: dhidden's steps may be longer than a tile."""
        return cdiv(last_v - first_v, tiles.WIDTH) * (tiles.WIDTH // self.tile.cols)

    def masses(self, first_row, last_row, first_v, last_v, chunk):
        blocks = cdiv(cdiv(last_row - first_row, self.tile.rows), self.tile.group) * self.tile.group
        tiles_v = self.tiles_v(first_v, last_v)
        self.masses_launch(
            blocks * tiles_v, first_row=first_row, last_row=last_row, first_v=first_v, tiles_v=tiles_v, chunk=chunk
        )

    def make_masses(self):
        problem, tile, panels = self.problem, self.tile, self.panels
        return Launch(
            masses_kernel,
            x_ptr=self.x,
            x_desc=describe(self.x, tile.rows, tile.depth) if self.described else None,
            w_desc=describe(problem.weight, tile.cols, tile.depth) if self.described else None,
            head=self.head,
            bias_ptr=problem.bias,
            selection=self.selection,
            temperature_ptr=problem.temperature,
            running_ptr=self.running,
            cuts_ptr=panels.cuts,
            stops_ptr=panels.stops,
            masses_ptr=panels.dlogits,
            partials_ptr=self.partials,
            logits=self.logits,
            ENTROPY=problem.params.entropy,
            WHOLE_D=problem.hidden.shape[2] % tile.depth == 0,
            COMPUTE=TO_TRITON[str(problem.params.compute_dtype)],
            PANEL=tiles.WIDTH,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.cols,
            BLOCK_D=tile.depth,
            GROUP=tile.group,
            **tile.options,
        )

    def fold(self, first_row, last_row, first_v, last_v):
        blocks, tiles_v = cdiv(last_row - first_row, tiles.COMBINE_BLOCK), self.tiles_v(first_v, last_v)
        self.fold_launch(blocks, first_row=first_row, last_row=last_row, tiles_v=tiles_v)

    def make_fold(self):
        return Launch(
            fold_kernel,
            partials_ptr=self.partials,
            running_ptr=self.running,
            decay_ptr=self.decay,
            count_ptr=self.selection.count_ptr,
            N=self.problem.targets.numel(),
            logits=self.logits,
            RUNS=tiles.COMBINE_RUNS,
            BLOCK=tiles.COMBINE_BLOCK,
        )

    def level(self, first_row, last_row, first_v, last_v, chunk):
        blocks, tiles_v = cdiv(last_row - first_row, tiles.LEVEL_ROWS), self.tiles_v(first_v, last_v)
        self.level_launch(blocks * tiles_v, first_row=first_row, last_row=last_row, tiles_v=tiles_v, chunk=chunk)

    def make_level(self):
        return Launch(
            level_kernel,
            masses_ptr=self.panels.dlogits,
            partials_ptr=self.partials,
            running_ptr=self.running,
            count_ptr=self.selection.count_ptr,
            cuts_ptr=self.panels.cuts,
            stops_ptr=self.panels.stops,
            N=self.problem.targets.numel(),
            PANEL=tiles.WIDTH,
            BLOCK_N=tiles.LEVEL_ROWS,
            BLOCK_V=self.tile.cols,
        )

    def directions(self, stats, directions):
        n, _, depth = self.problem.sizes
        tile = copy_tile(depth)
        directions_kernel[(cdiv(n, tile.rows) * cdiv(depth, tile.cols),)](
            head=self.head,
            selection=self.selection,
            temperature_ptr=self.problem.temperature,
            running_ptr=self.running,
            stats_ptr=stats,
            directions_ptr=directions,
            N=n,
            logits=self.logits,
            COMPUTE=TO_TRITON[str(self.problem.params.compute_dtype)],
            BLOCK_N=tile.rows,
            BLOCK_D=tile.cols,
            num_warps=tile.warps,
        )
