"""A mixture's logits made once and held: of a panel of rows at a time, both models', between its passes.

What a mixture adds of an entry wants both log-sum-exps, so that its forward goes over the logits twice, and its dlogits
want the sum over all entries, a third time. Making them again costs two products each time; held in fp32, they are read
at the memory's speed. A panel needs as many rows that the heads are not read too often: see ``PairParams.held_rows``.
Where hidden alone wants a gradient, it is made of the same panels in the forward.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastgrpo.backends import staircase
from fastgrpo.backends.pair import held_width
from fastgrpo.backends.problem import RowPartials
from fastgrpo.inputs import ELSEWHERE, IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import Held, Selection, describable
from fastgrpo.kernels.combine import fold_runs
from fastgrpo.kernels.common import (
    FLOOR,
    NOTHING,
    cap_slope,
    chunk_panels,
    dlogits_tile,
    inverse_temperatures,
    load_held,
    raw_size,
    selected_rows,
    store_piece,
    store_rows,
    to_room,
    without_dust,
)
from fastgrpo.kernels.divergence import MIXED, mixture_tile, new_stats, set_sums
from fastgrpo.kernels.forward import Sweep, fold_entries, forward_name
from fastgrpo.kernels.grids import vocabulary_runs
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.pair import load_pair, pair_slopes, transformed
from fastgrpo.kernels.pair_math import steepest
from fastgrpo.kernels.panels import Cut, Panels
from fastgrpo.kernels.products import Product, even_split, scatter
from fastgrpo.kernels.tiles import cdiv


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "rows_held", "runs", "teacher_runs"])
def levels_kernel(
    partials_ptr,  # (4, runs, rows) RowPartials of the student's runs of entries, of the panel's rows
    teacher_partials_ptr,  # (4, teacher_runs, rows)
    selection,  # Selection
    stats_ptr,  # (8, N) out: PairStats, but for the divergence and its center
    N,
    V,
    first_row,
    last_row,
    rows_held,
    runs,
    teacher_runs,
    RUNS: tl.constexpr,  # runs merged at once
    BLOCK: tl.constexpr,
):
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    local = tl.program_id(0) * BLOCK
    if first_row + local >= stop:
        return
    offs = local + tl.arange(0, BLOCK)
    mask = first_row + offs < stop
    rows, _ = selected_rows(selection, first_row + offs, mask, V)
    floor, none = tl.full((BLOCK,), FLOOR, tl.float32), tl.zeros((BLOCK,), tl.float32)
    peak, total, spread, _, _ = fold_runs(
        partials_ptr, offs, mask, rows_held, runs, floor, none, none, none, none, False, RUNS
    )
    other_peak, other, _, _, _ = fold_runs(
        teacher_partials_ptr, offs, mask, rows_held, teacher_runs, floor, none, none, none, none, False, RUNS
    )
    offset = tl.log(total)
    known = (peak, offset, none, offset + spread / total, other_peak, offset - tl.log(other))
    store_rows(stats_ptr + tl.cast(N, tl.int64) + rows, known, N, mask)


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "run", "runs"])
def held_sums_kernel(
    held,  # Held of the student's rows of the panel
    taught,  # of the teacher's
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (8, N) PairStats, both log-sum-exps known
    partials_ptr,  # (2, runs, rows) out: divergence and center
    N,
    V,
    first_row,
    last_row,
    run,  # entries a program does, a multiple of BLOCK_V
    runs,
    logits,  # Logits of the student
    teacher_logits,
    beta,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    block, this_run = tl.program_id(0) // runs, tl.program_id(0) % runs
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, _ = selected_rows(selection, offs_n, mask_n, V)
    inverse = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    known = load_pair(stats_ptr, N, rows, mask_n)
    sums = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first_v in range(this_run * run, tl.minimum(V, (this_run + 1) * run), BLOCK_V):
        raw = load_held(held, block * BLOCK_N, first_v, PANEL, BLOCK_N, BLOCK_V)
        teacher_raw = load_held(taught, block * BLOCK_N, first_v, PANEL, BLOCK_N, BLOCK_V)
        student, teacher = transformed(raw, logits, inverse), transformed(teacher_raw, teacher_logits, inverse)
        if first_v + BLOCK_V > V:
            beyond = (first_v + tl.arange(0, BLOCK_V) >= V)[None, :]
            student, teacher = tl.where(beyond, NOTHING, student), tl.where(beyond, NOTHING, teacher)
        _xs, _ys, sums = mixture_tile(student, teacher, known, sums, beta, 0)
    out = partials_ptr + this_run * held.rows + offs_n - first_row
    store_rows(out, sums, runs * held.rows, mask_n)


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "chunk"])
def held_dlogits_kernel(
    held,  # as the kernel before
    taught,
    selection,
    temperature_ptr,
    stats_ptr,
    sums_ptr,  # (2, N) by position: divergence and center
    scale_ptr,  # (N,) by position out: the power of two that each row's stand beside
    cuts_ptr,  # (chunks + 1,)
    stops_ptr,  # (panels,) rows that need them
    dlogits_ptr,  # out, the chunk's panels, of gradients of 1
    N,
    V,
    first_row,
    last_row,
    chunk,
    logits,
    teacher_logits,
    beta,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    first, last, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    block, tile, start, stop, first_v, _ = dlogits_tile(
        tl.program_id(0), first, last, height, stops_ptr, None, first_row, last_row, 0, PANEL, BLOCK_N, BLOCK_V, 1
    )
    if stop == 0:
        return
    offs_n, offs_v = start + tl.arange(0, BLOCK_N), first_v + tl.arange(0, BLOCK_V)
    mask_n = offs_n < stop
    rows, _ = selected_rows(selection, offs_n, mask_n, V)
    raw = load_held(held, block * BLOCK_N, first_v, PANEL, BLOCK_N, BLOCK_V)
    teacher_raw = load_held(taught, block * BLOCK_N, first_v, PANEL, BLOCK_N, BLOCK_V)
    inverse = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    peak, offset, other_peak, gap, _ = load_pair(stats_ptr, N, rows, mask_n)
    center = tl.load(sums_ptr + tl.cast(N, tl.int64) + offs_n, mask=mask_n, other=0.0)
    known = peak, offset, other_peak, gap, center
    dz = pair_slopes(raw, teacher_raw, known, logits, teacher_logits, inverse, beta, 2)
    scale = to_room(raw_size(steepest(center, 1.0 - beta), inverse, logits))
    if first_v == 0:
        tl.store(scale_ptr + offs_n, scale, mask=mask_n)
    dz = without_dust(dz * ((inverse * scale)[:, None] * cap_slope(raw, logits)))
    dz = tl.where((offs_v < V)[None, :] & mask_n[:, None], dz, 0.0)  # the GEMMs read whole tiles
    store_piece(dz, dlogits_ptr, block, tile * BLOCK_V, height, PANEL, BLOCK_N, BLOCK_V)


def forward(problem):
    """As :func:`fastgrpo.kernels.divergence.forward`, of a mixture."""
    return run_forward(problem, None)


def frozen_forward(problem):
    """The statistics, and (N, D) float32 d divergence / d hidden, 0 in rows that do not count; no host wait."""
    n, _, depth = problem.sizes
    directions = torch.empty(n, depth, dtype=torch.float32, device=problem.hidden.device)
    return run_forward(problem, directions), directions


def run_forward(problem, directions):
    stats = new_stats(problem)
    if not problem.targets.numel():
        return stats
    counted = problem.targets != IGNORE
    rows, count = compact_rows(counted)
    panel = problem.params.held_rows(problem.sizes[1])
    gradient = None
    if directions is not None:
        plan = staircase.exact(counted, rows, count, problem.sizes[1])
        gradient = Gradient(problem, plan, panel, directions)
        panel = gradient.rows
    held = Pass(problem, Selection(rows, count, torch.where(counted, ELSEWHERE, IGNORE)), panel, stats)
    for span in held.panels():
        if gradient is not None:
            gradient.make(held, span)
    set_sums(stats, held.selection, held.sums)
    return stats


def tile_name(head):
    """Whose tile a forward takes: beside options what is held leaves room for fewer columns, as flags do."""
    name = forward_name(head, certified=False)
    return name if name == "forward" else forward_name(head, certified=True)


class Pass:
    """The logits of one panel of rows after the other, and what is summed of them.

    Args:
        selection: without labels. rows: of a panel.

    Attributes:
        sums: (2, N) by position: divergence and center.
    """

    def __init__(self, problem, selection, rows, stats):
        self.problem, self.selection, self.stats = problem, selection, stats
        n, vocab, _ = problem.sizes
        heads = [replace(head, targets=selection.targets_ptr) for head in (problem.own, problem.teacher)]
        self.sweeps = [Sweep(head, tile_name(head), selection, rows=rows) for head in heads]
        rows = cdiv(min(rows, n), tiles.WIDTH) * tiles.WIDTH
        self.tile = tiles.for_held(stats.device)
        self.blocks = cdiv(rows, self.tile.rows)
        self.runs, self.run = vocabulary_runs(self.blocks, vocab, self.tile, stats.device)
        self.logits = [Held(self.new(rows * held_width(vocab)), rows) for _ in heads]
        self.levels = [self.new(len(RowPartials._fields), sweep.runs, rows) for sweep in self.sweeps]
        self.partials, self.sums = self.new(MIXED.value, self.runs, rows), self.new(MIXED.value, n)
        self.no_label = torch.zeros(n, dtype=torch.float32, device=stats.device)
        self.fold_levels, self.fold_sums = self.make_levels(), self.make_sums()

    def new(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.stats.device)

    def panels(self):
        """-> (first row, last row) of each, when its logits are held and its sums made."""
        for span, _ in zip(*(sweep.chunks() for sweep in self.sweeps), strict=True):
            for sweep, partials, held in zip(self.sweeps, self.levels, self.logits):
                fold_entries(sweep, span, self.no_label, partials, held=held)
            first_row, last_row = span
            self.fold_levels(cdiv(last_row - first_row, tiles.COMBINE_BLOCK), first_row=first_row, last_row=last_row)
            self.fold_sums(self.blocks * self.runs, first_row=first_row, last_row=last_row)
            torch.sum(self.partials[:, :, : last_row - first_row], 1, out=self.sums[:, first_row:last_row])
            yield span

    def make_levels(self):
        own, teacher = self.levels
        return Launch(
            levels_kernel,
            partials_ptr=own,
            teacher_partials_ptr=teacher,
            selection=self.selection,
            stats_ptr=self.stats,
            N=self.stats.shape[1],
            V=self.problem.sizes[1],
            rows_held=own.shape[2],
            runs=own.shape[1],
            teacher_runs=teacher.shape[1],
            RUNS=tiles.COMBINE_RUNS,
            BLOCK=tiles.COMBINE_BLOCK,
        )

    def make_sums(self):
        return Launch(held_sums_kernel, **self.arguments(), partials_ptr=self.partials, run=self.run, runs=self.runs)

    def arguments(self):
        """What both kernels that read the logits take."""
        problem, (own, taught) = self.problem, self.logits
        return {
            "held": own,
            "taught": taught,
            "selection": self.selection,
            "temperature_ptr": problem.temperature,
            "stats_ptr": self.stats,
            "N": self.stats.shape[1],
            "V": problem.sizes[1],
            "logits": self.sweeps[0].logits,
            "teacher_logits": self.sweeps[1].logits,
            "beta": problem.beta,
            "PANEL": tiles.WIDTH,
            "BLOCK_N": self.tile.rows,
            "BLOCK_V": self.tile.cols,
            **self.tile.options,
        }


class Gradient:
    """Hidden's of a divergence, of gradients of 1: dlogits of a panel's rows, chunk by chunk, times the weight.

    Args:
        rows: of a panel at most. directions: (N, D) float32 out.

    Attributes:
        rows: of a panel, which the workspace has room for.
    """

    def __init__(self, problem, plan, rows, directions):
        self.problem, self.plan, self.directions = problem, plan, directions
        n, vocab, depth = problem.sizes
        dtype, device, workspace = problem.params.compute_dtype, problem.hidden.device, problem.params.workspace
        rows = min(rows, cdiv(n, tiles.WIDTH) * tiles.WIDTH)
        described = describable("dhidden", device, dtype, problem.weight)
        tile = tiles.for_tensor("dhidden", dtype, device, described)
        self.split = even_split(tile, rows, depth, device, workspace)
        a_row = 4 * depth + sum(h.shape[2] * h.element_size() for h in (problem.hidden, problem.teacher.hidden))
        spare = workspace - 8 * rows * held_width(vocab) - 4 * self.split.rows * depth
        cut = Cut(rows, vocab, spare, dtype.itemsize, a_row, 0, 0)
        self.rows = cut.rows
        self.panels = Panels(cut, vocab, dtype, device, plan.stops_head)
        self.total = torch.empty(self.rows + self.split.rows, depth, dtype=torch.float32, device=device)
        self.product = Product(self.panels, problem.weight, self.total, plan.count, split=self.split)
        self.scales = torch.empty(n, dtype=torch.float32, device=device)
        self.launch = None

    def make(self, held, span):
        """Of the rows of ``span``, which are held."""
        first_row, last_row = span
        if self.launch is None:
            self.launch = self.make_launch(held)
        tall = self.rows // held.tile.rows * (tiles.WIDTH // held.tile.cols)
        for chunk in range(self.panels.chunks):
            self.launch(tall * self.panels.most, first_row=first_row, last_row=last_row, chunk=chunk)
            self.product(first_row, last_row, chunk, first_held=first_row)
        scatter(self.total, self.split, self.plan.rows, self.plan.count, self.scales, self.directions, *span, first_row)

    def make_launch(self, held):
        panels = self.panels
        return Launch(
            held_dlogits_kernel,
            **held.arguments(),
            sums_ptr=held.sums,
            scale_ptr=self.scales,
            cuts_ptr=panels.cuts,
            stops_ptr=panels.stops,
            dlogits_ptr=panels.dlogits,
        )
