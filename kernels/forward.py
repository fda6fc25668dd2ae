"""Fused forward: a program owns a block of rows and a run of vocabulary entries; logits stay in fp32 registers."""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastgrpo.backends.certified import cutoff
from fastgrpo.backends.problem import HeadProblem
from fastgrpo.inputs import ELSEWHERE, IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import (
    TO_TRITON,
    Selection,
    describe,
    has_extras,
    logit_arguments,
    pick_tile,
    taken_arguments,
)
from fastgrpo.kernels.combine import DROPPED, combine
from fastgrpo.kernels.common import (
    FLOOR,
    LOG2E,
    NOTHING,
    cap,
    count_taken,
    group_blocks,
    hide_taken,
    hold,
    in_parts,
    inverse_temperatures,
    load_taken,
    low_values,
    next_from,
    raw_logits,
    rounded_product,
    selected_rows,
    store_rows,
    sum_parts,
    up_values,
)
from fastgrpo.kernels.copies import gather_rows
from fastgrpo.kernels.flags import block_words, certificate, label_flags, new_flags, pack_flags, sum_unflagged
from fastgrpo.kernels.grids import vocabulary_runs
from fastgrpo.kernels.products import spans
from fastgrpo.kernels.row_math import move_sums
from fastgrpo.kernels.row_order import order_rows
from fastgrpo.kernels.tiles import cdiv


@triton.jit(do_not_specialize=["first_row", "last_row"])
def label_kernel(
    x_ptr,  # (held, D) the chunk's rows of hidden, dense
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    label_ptr,  # (N,) out, of the rows whose label is an entry
    first_row,
    last_row,
    logits,  # Logits
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each label's logit, fp32: by multiply-adds, which round less than tensor cores, and once."""
    start = first_row + tl.program_id(0) * BLOCK_N
    stop = tl.minimum(tl.load(selection.count_ptr), last_row)
    if start >= stop:
        return
    offs_n, offs_d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_n = offs_n < stop
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    inside = mask_n & (label >= 0)
    entries = tl.where(inside, label, 0).to(tl.int64)
    x_ptrs = x_ptr + tl.where(mask_n, offs_n - first_row, 0).to(tl.int64)[:, None] * head.D + offs_d[None, :]
    w_ptrs = head.weight_ptr + entries[:, None] * head.stride_v + offs_d[None, :] * tl.cast(head.stride_d, tl.int64)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start_d in range(0, head.D, BLOCK_D):
        mask = inside[:, None] & (start_d + offs_d < head.D)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(COMPUTE).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask, other=0.0).to(COMPUTE).to(tl.float32)
        acc += tl.sum(x * w, axis=1)
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D * head.stride_d
    if low_rank is not None:
        product = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start_d in range(0, low_rank.depth, BLOCK_D):
            k = start_d + offs_d
            low = low_values(low_rank, rows[:, None], k[None, :], COMPUTE)
            up = up_values(low_rank, entries[:, None], k[None, :], COMPUTE)
            product += tl.sum(low.to(tl.float32) * up.to(tl.float32), axis=1)
        acc += product * tl.load(low_rank.scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + entries).to(tl.float32)
    z = cap(acc, logits) * inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    tl.store(label_ptr + rows, z, mask=inside)


@triton.jit
def add_tile(value, peak, total, spread, unit, ENTROPY: tl.constexpr, PARTS: tl.constexpr):
    """-> the tile's exponentials in parts; peak, total and spread with the tile; what older sums are multiplied by.

    All sums are beside 2^base, base = round(peak * unit * LOG2E), see :func:`join_parts`: one fma an exponent.
    """
    values = in_parts(value, PARTS)
    rate = (unit * LOG2E)[:, None]
    new_peak = tl.maximum(peak, tl.max(tl.max(values, axis=1), axis=2), propagate_nan=tl.PropagateNan.ALL)
    base = rounded_product(new_peak, rate)
    e = tl.math.exp2(tl.fma(values, rate[:, :, None, None], -base[:, None, :, None]))
    decay = tl.math.exp2(rounded_product(peak, rate) - base)
    total, moved = move_sums(total, spread, (new_peak - peak) * unit[:, None], decay)
    if ENTROPY:
        spread = moved - sum_parts(e * (values - new_peak[:, None, :, None])) * unit[:, None]
    return e, new_peak, total + sum_parts(e), spread, decay


@triton.jit
def join_parts(peak, unit):
    """-> (n,) largest logit of a row, rounded, and (n, PARTS) factors that bring its parts' sums beside it.

    What base's rounding and the logit's own took from the sums is put back: they are of exact products value * unit.
    """
    rate = (unit * LOG2E)[:, None]
    top = tl.max(peak, axis=1)
    z = rounded_product(top, unit)
    lost = tl.fma(peak, rate, -rounded_product(peak, rate)) - (tl.fma(top, unit, -z) * LOG2E)[:, None]
    lost = tl.maximum(tl.minimum(lost, 1.0), -1.0)  # of FLOOR anything
    return z, tl.math.exp2((peak - top[:, None]) * rate - lost)


@triton.jit
def sums_of_parts(peak, total, spread, dropped, unit, ENTROPY: tl.constexpr):
    """(n,) each: the largest logit of a row and its sums beside it, of those of its parts."""
    top, factor = join_parts(peak, unit)
    if ENTROPY:
        spread = (spread + tl.fma(-peak, unit[:, None], top[:, None]) * total) * factor
    return top, tl.sum(total * factor, axis=1), tl.sum(spread, axis=1), tl.sum(dropped * factor, axis=1)


@triton.jit
def first_threshold(label_ptr, hint_ptr, rows, mask_n, unit, log_cutoff):
    """(n,) the value from which on a row keeps an entry, of what its label's logit and the hint tell."""
    guess = tl.load(label_ptr + rows, mask=mask_n, other=0.0)
    if hint_ptr is not None:
        guess -= tl.load(hint_ptr + rows, mask=mask_n, other=0.0)
    threshold = (tl.where(guess == guess, guess, 0.0) + log_cutoff) / unit
    return tl.where(mask_n, threshold, float("inf"))  # rows that are not there flag nothing


@triton.jit
def raised_threshold(threshold, peak, total, unit, log_cutoff):
    """The same, with the entries so far."""
    top, factor = join_parts(peak, unit)
    return tl.maximum(threshold, (top + tl.log(tl.sum(total * factor, axis=1)) + log_cutoff) / unit)


@triton.jit(do_not_specialize=["N", "first_row", "last_row", "run", "runs"])
def forward_kernel(
    x_ptr,  # (held, D) the chunk's rows of hidden, dense
    x_desc,  # of it, and
    w_desc,  # of the weight, see raw_logits; None: by pointers
    head,  # Head
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    selection,  # Selection
    taken,  # Taken or None
    temperature_ptr,  # (N,) or None
    hint_ptr,  # (N,) log-probs near the current ones, or None
    label_ptr,  # (N,) logits of the labels, some of them other ranks' entries
    flags_ptr,  # (blocks, words of V) int32 out: entries some row of the block keeps; None: not certified
    held,  # Held of the raw logits, out; None: they are not held
    partials_ptr,  # (4, runs, N) out, RowPartials; certified: (5, runs, N); with held those of its rows alone
    N,
    first_row,  # of the chunk, a multiple of BLOCK_N
    last_row,
    run,  # entries a program does, a multiple of BLOCK_V
    runs,
    logits,  # Logits
    log_cutoff,  # an entry is kept where log p reaches it
    ENTROPY: tl.constexpr,
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile's columns, see tiles.column_parts
    FLAGS: tl.constexpr,  # columns that share their words of flags
    PANEL: tl.constexpr,  # columns of logits that are held together
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
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    at_x = block * BLOCK_N
    # z = value * unit: what a tile's rows share is multiplied after their differences are taken
    unit = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)

    peak = tl.full((BLOCK_N, PARTS), FLOOR, tl.float32)  # of the values, in each part of the columns
    total = tl.zeros((BLOCK_N, PARTS), tl.float32)  # this and the others as add_tile has them
    spread = tl.zeros((BLOCK_N, PARTS), tl.float32)
    dropped = tl.zeros((BLOCK_N, PARTS), tl.float32)
    threshold = tl.zeros((BLOCK_N,), tl.float32)
    W: tl.constexpr = BLOCK_V // 32
    next_label = next_from(label, this_run * run)
    if taken is not None:
        count = count_taken(taken, rows, mask_n, this_run * run)
        upcoming = load_taken(taken, rows, mask_n, count)
    if flags_ptr is not None:
        threshold = first_threshold(label_ptr, hint_ptr, rows, mask_n, unit, log_cutoff)
    for first_v in range(this_run * run, tl.minimum(head.V, (this_run + 1) * run), BLOCK_V):
        value = raw_logits(
            x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, None, rows, at_x, stop - 1 - first_row, first_v, first_v,
            WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if held is not None:
            hold(value, held, at_x, first_v, PANEL, BLOCK_N, BLOCK_V)
        value = cap(value, logits)
        if taken is not None:
            value, count, upcoming = hide_taken(value, NOTHING, taken, rows, mask_n, count, upcoming, first_v, BLOCK_V)
        local, offs_v = label - first_v, tl.arange(0, BLOCK_V)
        if flags_ptr is not None:
            words = pack_flags(value >= threshold[:, None], BLOCK_N, BLOCK_V, PARTS, FLAGS)
        if (next_label < first_v + BLOCK_V) | (first_v + BLOCK_V > head.V):
            next_label = next_from(label, first_v + BLOCK_V)
            is_label = offs_v[None, :] == local[:, None]
            if flags_ptr is not None:
                words |= label_flags(local, BLOCK_V, FLAGS)
            value = tl.where(is_label | (first_v + offs_v >= head.V)[None, :], NOTHING, value)
        if flags_ptr is not None:
            at_words = block_words(head.V, start // BLOCK_N, first_v, BLOCK_V)
            tl.store(flags_ptr + at_words + tl.arange(0, W), words)
        e, peak, total, spread, decay = add_tile(value, peak, total, spread, unit, ENTROPY, PARTS)
        if flags_ptr is not None:
            dropped = dropped * decay + sum_unflagged(e, words, FLAGS)
            if hint_ptr is None:  # the running value serves, made anew where it may have doubled
                done = (first_v - this_run * run) // BLOCK_V
                for _ in range(((done & (done + 1)) == 0).to(tl.int32)):  # an `if`, which AMD's compiler does not take
                    threshold = raised_threshold(threshold, peak, total, unit, log_cutoff)

    out, width = partials_ptr + offs_n, N
    if held is not None:
        out, width = out - first_row, held.rows
    out, step = out + this_run.to(tl.int64) * width, tl.cast(runs, tl.int64) * width
    # read again: within the loop every register counts
    rows, label = selected_rows(selection, offs_n, mask_n, head.V)
    label_z = tl.load(label_ptr + rows, mask=mask_n, other=0.0)
    mine = (label >= this_run * run) & (label < (this_run + 1) * run)
    top, total, spread, dropped = sums_of_parts(peak, total, spread, dropped, unit, ENTROPY)
    store_rows(out, (top, total, spread, tl.where(mine, label_z, 0.0)), step, mask_n)
    if flags_ptr is not None:
        tl.store(out + DROPPED * step, dropped, mask=mask_n)


def label_logits(problem: HeadProblem, rows, count, labels):
    """(N,) float32 transformed logits of entries, one a row; NaN where ``labels`` (N,) has none, anything beyond the
    first ``count`` of the rows."""
    label = torch.full(problem.targets.shape, torch.nan, dtype=torch.float32, device=problem.hidden.device)
    if label.numel():
        sweep = Sweep(problem, forward_name(problem, certified=False), Selection(rows, count, labels))
        for span in sweep.chunks():
            sweep.find_labels(*span, label)
    return label


def forward(problem: HeadProblem):
    """(5, N) statistics of every counted row; never waits for the device."""
    stats = problem.new_stats(torch.float32)
    run_forward(problem, *compact_rows(problem.targets != IGNORE), stats=stats)
    return stats


def partial_forward(problem: HeadProblem):
    """(4, N) of :meth:`HeadProblem.new_partials`: what is still to be combined."""
    merged = problem.new_partials(torch.float32)
    run_forward(problem, *compact_rows(problem.targets != IGNORE), merged=merged)
    return merged


def sum_entries(problem: HeadProblem):
    """As :func:`partial_forward`, of all entries: no row has a label."""
    targets = torch.where(problem.targets == IGNORE, IGNORE, ELSEWHERE)
    merged, label = problem.new_partials(torch.float32), torch.zeros_like(targets, dtype=torch.float32)
    run_forward(replace(problem, targets=targets), *compact_rows(targets != IGNORE), label=label, merged=merged)
    return merged


def certified_forward(problem: HeadProblem, hint):
    """The statistics and a :class:`fastgrpo.backends.certified.Certificate`; no waiting either.

    Args:
        hint: (N,) float32 log-probs <= 0 near the current ones, or None. Rows are sorted by it, or by their labels'
            logits: that of a sure token is high.
    """
    stats = problem.new_stats(torch.float32)
    return stats, run_certified(problem, hint, stats=stats)


def certified_partial_forward(problem: HeadProblem, label, hint):
    """As :func:`fastgrpo.backends.certified.partial_forward`, with true peaks.

    Args:
        label: (N,) float32 logit of each row's label, wherever its entry is.
    """
    merged = problem.new_partials(torch.float32)
    return merged, run_certified(problem, hint, label=label, merged=merged)


def run_certified(problem, hint, label=None, **arguments):
    n = problem.targets.numel()
    device = problem.hidden.device
    if hint is None and label is None and problem.taken is None:
        as_they_come, _, count = order_rows(None, problem.targets)
        label = label_logits(problem, as_they_come, count, problem.targets)
    # a permutation of all rows, the ignored ones last: the backward looks at every position
    rows, _, count = order_rows(label if hint is None else hint, problem.targets)
    name = forward_name(problem, certified=True)
    flags, dropped = new_flags(problem, name), torch.zeros(n, dtype=torch.float32, device=device)
    run_forward(problem, rows, count, hint, flags, dropped, label, **arguments)
    return certificate(problem, name, rows, flags, dropped)


def forward_name(problem, certified):
    name = "forward_certified" if certified else "forward"
    crowded = certified and problem.taken is not None
    return name + "_full" if problem.params.entropy or crowded or has_extras(problem) else name


class Sweep:
    """A forward's way over rows and vocabulary: rows are gathered, as many as the workspace holds, and a program does
    a block of them over a run of entries.

    Args:
        beside: hidden states (B, T, D) of other models whose rows come along. rows: of a chunk at most; None: as many
            as the workspace holds.

    Attributes:
        x: (held, D) the chunk's rows. gathered: these and those beside them. head, logits, low_rank: of
        :func:`logit_arguments`. grid: of the launch.
    """

    def __init__(self, problem, kernel, selection, beside=(), rows=None):
        self.problem, self.selection = problem, selection
        n, vocab, _ = problem.sizes
        hidden = problem.hidden
        self.hiddens = (hidden, *beside)
        self.tile, self.described = pick_tile(kernel, problem)
        if rows is not None:  # which come in whole WIDTHs, whatever tiles were measured
            self.tile = self.tile._replace(rows=min(self.tile.rows, tiles.WIDTH))
        self.flagged = tiles.flag_columns(kernel, self.tile)
        self.parts = tiles.column_parts(self.tile, problem.tile_dtype.itemsize, hidden.device)
        a_row = sum(x.shape[2] * x.element_size() for x in self.hiddens)
        rows = problem.params.workspace // a_row if rows is None else rows
        held = min(max(rows // self.tile.rows, 1) * self.tile.rows, n)
        self.gathered = [x.new_empty(held, x.shape[2]) for x in self.hiddens]
        self.x = self.gathered[0]
        blocks = cdiv(held, self.tile.rows)
        self.runs, self.run = vocabulary_runs(blocks, vocab, self.tile, hidden.device)
        self.grid = (cdiv(blocks, self.tile.group) * self.tile.group * self.runs,)
        self.head, self.logits, self.low_rank = logit_arguments(problem)

    def new_partials(self, kinds):
        """(kinds, runs, N) of fp32, not initialised."""
        n = self.problem.targets.numel()
        return torch.empty(kinds, self.runs, n, dtype=torch.float32, device=self.x.device)

    def chunks(self):
        """-> first_row, last_row, whose rows are in x then."""
        for first_row, last_row in spans(self.problem.targets.numel(), self.x.shape[0]):
            rows, count = self.selection.rows_ptr, self.selection.count_ptr
            for hidden, x in zip(self.hiddens, self.gathered):
                gather_rows(hidden, rows, count, x, first_row, last_row, first_row)
            yield first_row, last_row

    def find_labels(self, first_row, last_row, label):
        """label: (N,) out, the logits of the rows' labels, where these are entries."""
        label_kernel[(cdiv(last_row - first_row, tiles.LABELS.rows),)](
            x_ptr=self.x,
            head=self.head,
            bias_ptr=self.problem.bias,
            low_rank=self.low_rank,
            selection=self.selection,
            temperature_ptr=self.problem.temperature,
            label_ptr=label,
            first_row=first_row,
            last_row=last_row,
            logits=self.logits,
            COMPUTE=TO_TRITON[str(self.problem.params.compute_dtype)],
            BLOCK_N=tiles.LABELS.rows,
            BLOCK_D=tiles.LABELS.cols,
            num_warps=tiles.LABELS.warps,
        )

    def arguments(self, first_row, last_row):
        """What any kernel of a forward takes, and the launch."""
        problem, tile = self.problem, self.tile
        n, _, depth = problem.sizes
        return {
            "x_ptr": self.x,
            "x_desc": describe(self.x, tile.rows, tile.depth) if self.described else None,
            "w_desc": describe(problem.weight, tile.cols, tile.depth) if self.described else None,
            "head": self.head,
            "bias_ptr": problem.bias,
            "low_rank": self.low_rank,
            "selection": self.selection,
            "temperature_ptr": problem.temperature,
            "N": n,
            "first_row": first_row,
            "last_row": last_row,
            "run": self.run,
            "runs": self.runs,
            "logits": self.logits,
            "WHOLE_D": depth % tile.depth == 0,
            "COMPUTE": TO_TRITON[str(problem.params.compute_dtype)],
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.cols,
            "BLOCK_D": tile.depth,
            "GROUP": tile.group,
            **tile.options,
        }


def run_forward(problem, rows, count, hint=None, flags=None, dropped=None, label=None, merged=None, stats=None):
    """The kernels, into ``merged`` (4, N) or ``stats`` (5, N): rows are gathered, as many as the workspace holds, and
    go over the vocabulary."""
    n, hidden = problem.targets.numel(), problem.hidden
    if n == 0:
        return
    selection, taken = Selection(rows, count, problem.targets), taken_arguments(problem.taken)
    sweep = Sweep(problem, forward_name(problem, certified=flags is not None), selection)
    partials = sweep.new_partials(DROPPED.value + (flags is not None))
    known = label is not None or problem.taken is not None  # or there is none
    label = torch.zeros(n, dtype=torch.float32, device=hidden.device) if label is None else label
    for first_row, last_row in sweep.chunks():
        if not known:
            sweep.find_labels(first_row, last_row, label)
        fold_entries(sweep, (first_row, last_row), label, partials, taken, hint, flags)
    combine(problem, partials, selection, dropped, merged, stats, hint)


def fold_entries(sweep, span, label, partials, taken=None, hint=None, flags=None, held=None):
    """One launch over all entries, of the rows of ``span``; held: :class:`Held` of their raw logits, or None."""
    params = sweep.problem.params
    forward_kernel[sweep.grid](
        **sweep.arguments(*span),
        taken=taken,
        hint_ptr=hint,
        label_ptr=label,
        flags_ptr=flags,
        held=held,
        partials_ptr=partials,
        log_cutoff=0.0 if flags is None else math.log(cutoff(params.tolerance)),
        ENTROPY=params.entropy,
        PARTS=sweep.parts,
        FLAGS=sweep.flagged,
        PANEL=tiles.WIDTH,
    )
