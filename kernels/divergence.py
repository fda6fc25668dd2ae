"""The forward of divergences: one kernel folds both models' logits, and flags the entries that matter to a gradient.

How a certified forward launches it is in :mod:`fastgrpo.kernels.certified_divergence`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends.divergence import beside_peaks
from fastgrpo.backends.pair import PairStats, mixture_stats
from fastgrpo.backends.problem import RowPartials
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import Selection, describe, is_described
from fastgrpo.kernels.common import (
    FLOOR,
    LN2,
    LOG2E,
    NOTHING,
    group_blocks,
    inverse_temperatures,
    pieces_of,
    raw_logits,
    selected_rows,
    store_rows,
)
from fastgrpo.kernels.flags import block_words, see_terms
from fastgrpo.kernels.forward import Sweep, sum_entries
from fastgrpo.kernels.pair import (
    difference,
    load_pair,
    log_mixture,
    pair_tile,
    teacher_arguments,
    transformed,
)
from fastgrpo.kernels.pair_math import (
    finish_sums,
    join_sums,
    move_moments,
    move_peaks,
    move_terms,
    scale_terms,
)
from fastgrpo.kernels.row_math import rescale
from fastgrpo.kernels.tiles import cdiv

SUMS = tl.constexpr(7)  # of a run: two peaks, total, other, tilt, excess, the student's spread
MIXED = tl.constexpr(2)  # of a mixture's: divergence, center
MOMENTS = 6  # behind them, where certified: of all terms, of those not flagged


@triton.jit
def load_sums(at, step, mask):
    """The sums of some rows of a table, of no entry where masked."""
    peak = tl.load(at, mask=mask, other=FLOOR)
    other_peak = tl.load(at + step, mask=mask, other=FLOOR)
    total = tl.load(at + 2 * step, mask=mask, other=0.0)
    other = tl.load(at + 3 * step, mask=mask, other=0.0)
    tilt = tl.load(at + 4 * step, mask=mask, other=0.0)
    excess = tl.load(at + 5 * step, mask=mask, other=0.0)
    spread = tl.load(at + 6 * step, mask=mask, other=0.0)
    return peak, other_peak, total, other, tilt, excess, spread


@triton.jit
def new_sums(BLOCK: tl.constexpr):
    """Of no entry."""
    floor, none = tl.full((BLOCK,), FLOOR, tl.float32), tl.zeros((BLOCK,), tl.float32)
    return floor, floor, none, none, none, none, none


@triton.jit
def load_moments(at, step, mask):
    """Behind a table's sums: the moments of all terms and of those left out, x^2, x y and y^2 of each."""
    xx = tl.load(at, mask=mask, other=0.0)
    xy = tl.load(at + step, mask=mask, other=0.0)
    yy = tl.load(at + 2 * step, mask=mask, other=0.0)
    left_xx = tl.load(at + 3 * step, mask=mask, other=0.0)
    left_xy = tl.load(at + 4 * step, mask=mask, other=0.0)
    left_yy = tl.load(at + 5 * step, mask=mask, other=0.0)
    return xx, xy, yy, left_xx, left_xy, left_yy


@triton.jit
def new_moments(BLOCK: tl.constexpr):
    """Of no entry."""
    none = tl.zeros((BLOCK,), tl.float32)
    return none, none, none, none, none, none


@triton.jit
def add_moments(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]


@triton.jit
def move_both(moments, rise, other_rise, STUDENT_FIRST: tl.constexpr):
    """A KL's moments beside higher peaks."""
    lead, trail, lean = move_terms(rise, other_rise, STUDENT_FIRST)
    xx, xy, yy = move_moments(moments[0], moments[1], moments[2], lead, trail, lean)
    left_xx, left_xy, left_yy = move_moments(moments[3], moments[4], moments[5], lead, trail, lean)
    return xx, xy, yy, left_xx, left_xy, left_yy


@triton.jit
def frame_so_far(known_at, step, mask, sums, STUDENT_FIRST: tl.constexpr):
    """Center and unit of a KL's terms, of what was known before and of this program's sums, beside its peaks."""
    peak, other_peak, total, other, tilt, excess, _ = sums
    known_peak, known_other_peak, known, known_other, known_tilt, known_excess, _ = load_sums(known_at, step, mask)
    known, known_other, known_tilt, known_excess = move_peaks(
        known, known_other, known_tilt, known_excess, peak - known_peak, other_peak - known_other_peak
    )
    return scale_terms(known + total, known_other + other, known_tilt + tilt, known_excess + excess, STUDENT_FIRST)


@triton.jit
def mixture_tile(student, taught, known, sums, beta, CUTS: tl.constexpr):
    """-> the terms x and y of a tile's pieces, the sums with it: divergence and center. known: of :func:`load_pair`."""
    peak, offset, other_peak, gap, _center = known
    divergence, center = sums
    xs, ys, students, taughts = (), (), pieces_of(student, CUTS), pieces_of(taught, CUTS)
    for k in tl.static_range(2**CUTS):
        u, v = students[k] - peak[:, None], taughts[k] - other_peak[:, None]
        log_s, minus_log_t = log_mixture(u - v - gap[:, None], beta)
        y = tl.math.exp2((u - offset[:, None]) * LOG2E)
        x = (1.0 - beta) * LN2 * log_s * y
        theirs = beta * LN2 * minus_log_t * tl.math.exp2((v + (gap - offset)[:, None]) * LOG2E)
        divergence += tl.sum(x - theirs, axis=1)
        center += tl.sum(x, axis=1)
        xs, ys = xs + (x,), ys + (y,)
    return xs, ys, (divergence, center)


@triton.jit
def raise_peaks(
    first_z, second_z, sums, moments, CERTIFIED: tl.constexpr, STUDENT_FIRST: tl.constexpr, ENTROPY: tl.constexpr
):
    """-> a KL's sums and moments beside the peaks that a tile's logits make."""
    peak, other_peak, total, other, tilt, excess, spread = sums
    high = tl.maximum(peak, tl.max(first_z, axis=1), propagate_nan=tl.PropagateNan.ALL)
    other_high = tl.maximum(other_peak, tl.max(second_z, axis=1), propagate_nan=tl.PropagateNan.ALL)
    rise, other_rise = high - peak, other_high - other_peak
    if ENTROPY:
        own_peak, own, own_high = other_peak, other, other_high
        if STUDENT_FIRST:
            own_peak, own, own_high = peak, total, high
        _own, spread, _decay = rescale(own_peak, own, spread, own_high)
    if CERTIFIED:
        moments = move_both(moments, rise, other_rise, STUDENT_FIRST)
    total, other, tilt, excess = move_peaks(total, other, tilt, excess, rise, other_rise)
    return (high, other_high, total, other, tilt, excess, spread), moments


@triton.jit
def kl_tile(first_z, second_z, sums, CUTS: tl.constexpr, STUDENT_FIRST: tl.constexpr, ENTROPY: tl.constexpr):
    """As :func:`mixture_tile`, of a KL beside its peaks."""
    peak, other_peak, total, other, tilt, excess, spread = sums
    xs, ys, firsts, seconds = (), (), pieces_of(first_z, CUTS), pieces_of(second_z, CUTS)
    for k in tl.static_range(2**CUTS):
        u, v = firsts[k] - peak[:, None], seconds[k] - other_peak[:, None]
        y, f = tl.math.exp2(u * LOG2E), tl.math.exp2(v * LOG2E)
        leant = y * (u - v)
        total += tl.sum(y, axis=1)
        other += tl.sum(f, axis=1)
        tilt += tl.sum(leant, axis=1)
        apart = difference(y, f, u - v)
        excess += tl.sum(apart, axis=1)
        if ENTROPY:
            mine = f * v
            if STUDENT_FIRST:
                mine = y * u
            spread -= tl.sum(mine, axis=1)
        x = apart
        if STUDENT_FIRST:
            x = leant
        xs, ys = xs + (x,), ys + (y,)
    return xs, ys, (peak, other_peak, total, other, tilt, excess, spread)


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "first_entry", "last_entry", "run", "runs"])
def forward_pair_kernel(
    x_ptr,  # (held, D) the chunk's rows of the student's hidden, dense
    x_desc,  # of it, and
    w_desc,  # of the student's weight, see raw_logits; None: by pointers
    head,  # Head of the student
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    teacher,  # Teacher
    teacher_x_ptr,  # its rows, and so on, as the student's
    teacher_x_desc,
    teacher_w_desc,
    teacher_bias_ptr,  # (V,) or None
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (8, N) of a mixture, whose log-sum-exps are known; None: a KL
    flags_ptr,  # (blocks, words of V) int32 out: entries some row of the block keeps; None: not certified
    known_ptr,  # (kinds, N) sums of the entries before the first, by position, where certified
    least_ptr,  # (1,) terms so large are kept, where certified
    partials_ptr,  # (kinds, runs, N) out: 7 or 2 sums, and 6 moments where certified
    N,
    first_row,  # of the chunk, a multiple of BLOCK_N
    last_row,
    first_entry,  # of the leg, a multiple of BLOCK_V
    last_entry,
    run,  # entries a program does, a multiple of BLOCK_V
    runs,
    logits,  # Logits of the student
    beta,
    STUDENT_FIRST: tl.constexpr,
    ENTROPY: tl.constexpr,
    CUTS: tl.constexpr,  # see pieces_of
    FLAGS: tl.constexpr,  # entries that share their words
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    TEACHER_WHOLE_D: tl.constexpr,
    TEACHER_COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, this_run = group_blocks(tl.program_id(0), runs, GROUP)
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, _ = selected_rows(selection, offs_n, mask_n, head.V)
    inverse = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    sums, moments = new_sums(BLOCK_N), new_moments(BLOCK_N)
    if stats_ptr is not None:
        sums = sums[2], sums[3]  # divergence and center
    first = first_entry + this_run * run
    for first_v in range(first, tl.minimum(last_entry, first + run), BLOCK_V):
        raw = raw_logits(
            x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, None, rows, block * BLOCK_N, stop - 1 - first_row, first_v,
            first_v, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        student = transformed(raw, logits, inverse)
        raw = raw_logits(
            teacher_x_ptr, teacher_x_desc, teacher_w_desc, teacher.head, teacher_bias_ptr, None, None, rows,
            block * BLOCK_N, stop - 1 - first_row, first_v, first_v, TEACHER_WHOLE_D, TEACHER_COMPUTE,
            BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        taught = transformed(raw, teacher.logits, inverse)
        if first_v + BLOCK_V > head.V:
            beyond = (first_v + tl.arange(0, BLOCK_V) >= head.V)[None, :]
            student, taught = tl.where(beyond, NOTHING, student), tl.where(beyond, NOTHING, taught)
        if stats_ptr is not None:
            xs, ys, sums = mixture_tile(student, taught, load_pair(stats_ptr, N, rows, mask_n), sums, beta, CUTS)
        else:
            first_z, second_z = taught, student
            if STUDENT_FIRST:
                first_z, second_z = student, taught
            sums, moments = raise_peaks(first_z, second_z, sums, moments, flags_ptr is not None, STUDENT_FIRST, ENTROPY)
            xs, ys, sums = kl_tile(first_z, second_z, sums, CUTS, STUDENT_FIRST, ENTROPY)
        if flags_ptr is not None:
            step, least = tl.cast(N, tl.int64), tl.load(least_ptr)
            mask_n = offs_n < tl.minimum(tl.load(selection.count_ptr), last_row)  # again: registers are short here
            if stats_ptr is not None:
                center, unit = sums[1] + tl.load(known_ptr + offs_n + step, mask=mask_n, other=0.0), 1.0
            else:
                center, unit = frame_so_far(known_ptr + offs_n, step, mask_n, sums, STUDENT_FIRST)
            at_words = flags_ptr + block_words(head.V, start // BLOCK_N, first_v, BLOCK_V)
            least = tl.where(mask_n, least * unit, float("inf"))  # rows that are not there flag nothing
            seen = see_terms(xs, ys, center, least, at_words, CUTS, BLOCK_N, BLOCK_V, FLAGS)
            moments = add_moments(moments, seen)
    out = partials_ptr + this_run.to(tl.int64) * N + offs_n
    step = tl.cast(runs, tl.int64) * N
    store_rows(out, sums, step, mask_n)
    if flags_ptr is not None:
        store_rows(out + len(sums) * step, moments, step, mask_n)


@triton.jit
def join_runs(sums, more, STUDENT_FIRST: tl.constexpr):
    """The sums of two runs of entries as those of one."""
    peak, other_peak, total, other, tilt, excess, spread = sums
    more_peak, more_other_peak, more_total, more_other, more_tilt, more_excess, more_spread = more
    if STUDENT_FIRST:
        own_peak, own, more_own_peak, more_own = peak, total, more_peak, more_total
    else:
        own_peak, own, more_own_peak, more_own = other_peak, other, more_other_peak, more_other
    top = tl.maximum(own_peak, more_own_peak)
    _own, spread, _decay = rescale(own_peak, own, spread, top)
    _own, more_spread, _decay = rescale(more_own_peak, more_own, more_spread, top)
    peak, other_peak, total, other, tilt, excess = join_sums(
        peak, other_peak, total, other, tilt, excess,
        more_peak, more_other_peak, more_total, more_other, more_tilt, more_excess,
    )  # fmt: skip
    return peak, other_peak, total, other, tilt, excess, spread + more_spread


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "runs"])
def combine_pair_kernel(
    partials_ptr,  # (7, runs, N), or 13 kinds where certified
    known_ptr,  # (13, N) by position, what was before and what is then, where certified
    selection,  # Selection
    stats_ptr,  # (8, N) out: PairStats
    first_row,
    last_row,
    N,
    V,
    runs,
    STUDENT_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    start = first_row + tl.program_id(0) * BLOCK
    if start >= stop:
        return
    offs = start + tl.arange(0, BLOCK)
    mask = offs < stop
    rows, _ = selected_rows(selection, offs, mask, V)
    sums, moments = new_sums(BLOCK), new_moments(BLOCK)
    if known_ptr is not None:
        at, step = known_ptr + offs, tl.cast(N, tl.int64)
        sums, moments = load_sums(at, step, mask), load_moments(at + SUMS * step, step, mask)
    step = tl.cast(runs, tl.int64) * N
    for run in range(runs):
        at = partials_ptr + tl.cast(run, tl.int64) * N + offs
        more = load_sums(at, step, mask)
        joined = join_runs(sums, more, STUDENT_FIRST)
        if known_ptr is not None:
            here = load_moments(at + SUMS * step, step, mask)
            moments = move_both(moments, joined[0] - sums[0], joined[1] - sums[1], STUDENT_FIRST)
            here = move_both(here, joined[0] - more[0], joined[1] - more[1], STUDENT_FIRST)
            moments = add_moments(moments, here)
        sums = joined
    if known_ptr is not None:
        at, step = known_ptr + offs, tl.cast(N, tl.int64)
        store_rows(at, sums, step, mask)
        store_rows(at + SUMS * step, moments, step, mask)
    peak, other_peak, total, other, tilt, excess, spread = sums
    divergence, log_first, turn = finish_sums(total, other, tilt, excess)
    none = tl.zeros((BLOCK,), tl.float32)
    if STUDENT_FIRST:
        out = (divergence, peak, log_first, none, log_first + spread / total, other_peak, -turn, divergence)
    else:
        offset = log_first + turn
        out = (divergence, other_peak, offset, none, offset + spread / other, peak, turn, none)
    store_rows(stats_ptr + rows, out, N, mask)


def forward(problem):
    """(8, N) :class:`PairStats` of every counted row; never waits for the device."""
    selection = Selection(*compact_rows(problem.targets != IGNORE), problem.targets)
    if problem.is_mixture:
        stats = know_both(problem)
        set_sums(stats, selection, run_forward(problem, selection, stats).sum(1))
        return stats
    stats = new_stats(problem)
    combine(problem, run_forward(problem, selection, None), selection, stats, (0, problem.targets.numel()))
    return stats


def new_stats(problem):
    n, device = problem.targets.numel(), problem.hidden.device
    return torch.zeros(len(PairStats._fields), n, dtype=torch.float32, device=device)


def know_both(problem):
    """(8, N) of a mixture, of what each model's forward tells; 0 where a row does not count."""
    both = (RowPartials(*sum_entries(head)) for head in (problem.own, problem.teacher))
    return torch.where(problem.targets == IGNORE, 0.0, torch.stack(mixture_stats(*both)))


def set_sums(stats, selection, sums):
    """sums: (2, N) of a mixture, by position."""
    known = PairStats(*stats)
    for row, total in zip((known.divergence, known.center), in_rows(sums, selection, 0.0)):
        row.copy_(total)


def in_rows(values, selection, none):
    """(K, N) by position into the order of the rows; none: what rows that do not count get."""
    inside = torch.arange(values.shape[1], device=values.device) < selection.count_ptr
    return torch.empty_like(values).index_copy_(1, selection.rows_ptr, torch.where(inside, values, none))


def divergence_partials(problem):
    """As :func:`fastgrpo.backends.divergence.divergence_partials`."""
    selection = Selection(*compact_rows(problem.targets != IGNORE), problem.targets)
    partials = run_forward(problem, selection, None)
    top = partials[:2].amax(1)
    moved = beside_peaks(partials, top[:, None], problem.beta == 1.0)
    values = torch.stack((*top, *(x.sum(0) for x in moved)))
    none = torch.zeros_like(values[:, :1])
    none[:2] = FLOOR.value
    return in_rows(values, selection, none)


def mixture_sums(problem, stats):
    """As :func:`fastgrpo.backends.divergence.mixture_sums`."""
    selection = Selection(*compact_rows(problem.targets != IGNORE), problem.targets)
    return in_rows(run_forward(problem, selection, stats).sum(1), selection, 0.0)


def run_forward(problem, selection, stats):
    """-> partials (7, runs, N), with ``stats``, of a mixture, (2, runs, N)."""
    kinds = (SUMS if stats is None else MIXED).value
    if problem.targets.numel() == 0:
        return torch.empty(kinds, 1, 0, dtype=torch.float32, device=problem.hidden.device)
    sweep = PairSweep(problem, kernel_name(problem, certified=False), selection)
    partials = sweep.new_partials(kinds)
    for span in sweep.chunks():
        sweep.fold(span, Leg(0, problem.weight.shape[0], sweep.runs, sweep.run), partials, stats)
    return partials


class Leg(NamedTuple):
    """Entries that one launch folds, in runs of so many."""

    first: int
    last: int
    runs: int
    run: int


class PairSweep(Sweep):
    """A forward's way over rows and vocabulary with the teacher beside it."""

    def __init__(self, problem, kernel, selection):
        self.kernel, teacher = kernel, problem.teacher
        super().__init__(problem, kernel, selection, beside=(teacher.hidden,))
        self.blocks, x = self.grid[0] // self.runs, self.gathered[1]
        described = is_described(kernel, teacher)
        self.teacher = teacher_arguments(problem, self.tile, teacher.weight if described else None) | {
            "teacher_x_ptr": x,
            "teacher_x_desc": describe(x, self.tile.rows, self.tile.depth) if described else None,
            "TEACHER_WHOLE_D": x.shape[1] % self.tile.depth == 0,
        }

    def fold(self, span, leg, partials, stats, flags=None, known=None, least=None):
        """One launch, of the rows of ``span``; what is not given is as the kernel has it."""
        problem = self.problem
        forward_pair_kernel[(self.blocks * leg.runs,)](
            **self.arguments(*span) | {"runs": leg.runs, "run": leg.run},
            stats_ptr=stats,
            flags_ptr=flags,
            known_ptr=known,
            least_ptr=least,
            partials_ptr=partials,
            first_entry=leg.first,
            last_entry=leg.last,
            beta=problem.beta,
            STUDENT_FIRST=problem.beta == 1.0,
            ENTROPY=problem.params.entropy and stats is None,
            CUTS=tiles.pair_cuts(self.tile),
            FLAGS=tiles.flag_columns(self.kernel, self.tile),
            **self.teacher,
        )


def combine(problem, partials, selection, stats, span, known=None):
    """A KL's partials of the rows of ``span`` into ``stats`` (8, N), by way of what is known (13, N), if anything."""
    first_row, last_row = span
    if first_row == last_row:
        return
    combine_pair_kernel[(cdiv(last_row - first_row, tiles.COMBINE_BLOCK),)](
        partials_ptr=partials,
        known_ptr=known,
        selection=selection,
        stats_ptr=stats,
        first_row=first_row,
        last_row=last_row,
        N=problem.targets.numel(),
        V=problem.weight.shape[0],
        runs=partials.shape[1],
        STUDENT_FIRST=problem.beta == 1.0,
        BLOCK=tiles.COMBINE_BLOCK,
    )


def kernel_name(problem, certified):
    """Whose tile the forward takes."""
    entropy = problem.params.entropy and not problem.is_mixture  # a mixture's comes from its own model's forward
    return pair_tile("forward_pair", problem, certified, entropy)
