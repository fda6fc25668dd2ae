"""Divergences of two heads: one kernel folds both models' logits, one makes the student's dlogits of them.

The student's rows are gathered as in the forward of one head; the teacher's, which no GEMM of a gradient reads, are
read where they stand.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends import staircase
from fastgrpo.backends.divergence import beside_peaks
from fastgrpo.backends.pair import PairStats, mixture_stats
from fastgrpo.backends.problem import RowStats
from fastgrpo.inputs import IGNORE, compact_rows
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import (
    TO_TRITON,
    Selection,
    logit_arguments,
    row_strides,
)
from fastgrpo.kernels.backward import Launcher, climb
from fastgrpo.kernels.common import (
    FLOOR,
    LOG2E,
    NOTHING,
    cap,
    cap_slope,
    chunk_panels,
    entry_ids,
    group_blocks,
    inverse_temperatures,
    panel_pointers,
    raw_logits,
    row_offsets,
    selected_rows,
    store_rows,
    without_dust,
)
from fastgrpo.kernels.forward import Sweep
from fastgrpo.kernels.forward import forward as forward_alone
from fastgrpo.kernels.pair_math import NEAR, expm1_near, finish_sums, join_sums, mixture_logs, move_peaks
from fastgrpo.kernels.tiles import cdiv

SUMS = 7  # of a run: two peaks, total, other, tilt, excess, the student's spread
MIXED = 2  # of a mixture's: divergence, center


class Teacher(NamedTuple):
    """The teacher's side: hidden (B, T, D_t) as it stands, its head and its logits' form."""

    hidden_ptr: object
    strides: object  # RowStrides
    head: object  # Head
    logits: object  # Logits


@triton.jit
def log_of(raw, logits, inverse, first_v, V, BLOCK_V: tl.constexpr):
    """Transformed logits, NOTHING beyond V."""
    z = cap(raw, logits) * inverse[:, None]
    return tl.where((first_v + tl.arange(0, BLOCK_V) >= V)[None, :], NOTHING, z)


@triton.jit
def teacher_raw(
    teacher,  # Teacher
    bias_ptr,  # (V,) or None
    ids_ptr,  # (V,) entry at each position; None: in their order
    rows,  # (BLOCK_N,) int64
    first_v,
    T,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T + bias of the teacher, (BLOCK_N, BLOCK_V) in fp32; anything beyond V."""
    head = teacher.head
    offs_d = tl.arange(0, BLOCK_D)
    entries = entry_ids(ids_ptr, first_v, tl.arange(0, BLOCK_V), head.V)
    x_ptrs = teacher.hidden_ptr + row_offsets(rows, T, teacher.strides)[:, None]
    x_ptrs = x_ptrs + offs_d[None, :] * tl.cast(teacher.strides.d, tl.int64)
    w_ptrs = head.weight_ptr + entries[None, :] * head.stride_v + offs_d[:, None] * head.stride_d
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, head.D, BLOCK_D):
        inside = start + offs_d < head.D
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
        x_ptrs += BLOCK_D * teacher.strides.d
        w_ptrs += BLOCK_D * head.stride_d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + entries).to(tl.float32)
        acc += tl.where(bias < NOTHING, NOTHING, bias)[None, :]
    return acc


@triton.jit
def load_pair(stats_ptr, N, rows, mask):
    """Of some rows what a tile of :class:`PairStats` needs, 0 where masked."""
    at, step = stats_ptr + rows, tl.cast(N, tl.int64)
    peak = tl.load(at + step, mask=mask, other=0.0)
    offset = tl.load(at + 2 * step, mask=mask, other=0.0)
    other_peak = tl.load(at + 5 * step, mask=mask, other=0.0)
    gap = tl.load(at + 6 * step, mask=mask, other=0.0)
    center = tl.load(at + 7 * step, mask=mask, other=0.0)
    return peak, offset, other_peak, gap, center


@triton.jit
def difference(first, second, d):
    """e^second - e^first of exponents that differ by -d: first, second are the exponentials."""
    near = tl.abs(d) < NEAR
    return tl.where(near, first * expm1_near(tl.where(near, -d, 0.0)), second - first)


@triton.jit(do_not_specialize=["N", "T", "first_row", "last_row", "run", "runs"])
def forward_pair_kernel(
    x_ptr,  # (held, D) the chunk's rows of the student's hidden, dense
    x_desc,  # of it, and
    w_desc,  # of the student's weight, see raw_logits; None: by pointers
    head,  # Head of the student
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    teacher,  # Teacher
    teacher_bias_ptr,  # (V,) or None
    selection,  # Selection
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (8, N) of a mixture, whose log-sum-exps are known; None: a KL
    partials_ptr,  # (7 or 2, runs, N) out
    N,
    T,
    first_row,  # of the chunk, a multiple of BLOCK_N
    last_row,
    run,  # entries a program does, a multiple of BLOCK_V
    runs,
    logits,  # Logits of the student
    beta,
    STUDENT_FIRST: tl.constexpr,
    ENTROPY: tl.constexpr,
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
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
    peak = tl.full((BLOCK_N,), FLOOR, tl.float32)
    other_peak = tl.full((BLOCK_N,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # of a mixture: the divergence
    other = tl.zeros((BLOCK_N,), tl.float32)  # and the center
    tilt = tl.zeros((BLOCK_N,), tl.float32)
    excess = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    for first_v in range(this_run * run, tl.minimum(head.V, (this_run + 1) * run), BLOCK_V):
        raw = raw_logits(
            x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, None, rows, block * BLOCK_N, stop - 1 - first_row, first_v,
            first_v, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        student = log_of(raw, logits, inverse, first_v, head.V, BLOCK_V)
        raw = teacher_raw(teacher, teacher_bias_ptr, None, rows, first_v, T, TEACHER_COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D)
        taught = log_of(raw, teacher.logits, inverse, first_v, head.V, BLOCK_V)
        if stats_ptr is not None:
            known_peak, offset, known_other, gap, _center = load_pair(stats_ptr, N, rows, mask_n)
            u, v = student - known_peak[:, None], taught - known_other[:, None]
            log_s, log_t = mixture_logs(u - v - gap[:, None], beta)
            mine = (1.0 - beta) * tl.math.exp2((u - offset[:, None]) * LOG2E) * log_s
            theirs = beta * tl.math.exp2((v + (gap - offset)[:, None]) * LOG2E) * log_t
            total += tl.sum(mine + theirs, axis=1)
            other += tl.sum(mine, axis=1)
        else:
            first, second = taught, student
            if STUDENT_FIRST:
                first, second = student, taught
            high = tl.maximum(peak, tl.max(first, axis=1), propagate_nan=tl.PropagateNan.ALL)
            other_high = tl.maximum(other_peak, tl.max(second, axis=1), propagate_nan=tl.PropagateNan.ALL)
            if ENTROPY:
                rise, own = other_high - other_peak, other
                if STUDENT_FIRST:
                    rise, own = high - peak, total
                spread = tl.exp(-rise) * (spread + rise * own)
            total, other, tilt, excess = move_peaks(total, other, tilt, excess, high - peak, other_high - other_peak)
            peak, other_peak = high, other_high
            u, v = first - peak[:, None], second - other_peak[:, None]
            e, f = tl.math.exp2(u * LOG2E), tl.math.exp2(v * LOG2E)
            total += tl.sum(e, axis=1)
            other += tl.sum(f, axis=1)
            tilt += tl.sum(e * (u - v), axis=1)
            excess += tl.sum(difference(e, f, u - v), axis=1)
            if ENTROPY:
                own = f * v
                if STUDENT_FIRST:
                    own = e * u
                spread -= tl.sum(own, axis=1)
    out = partials_ptr + this_run.to(tl.int64) * N + offs_n
    step = tl.cast(runs, tl.int64) * N
    if stats_ptr is not None:
        store_rows(out, (total, other), step, mask_n)
    else:
        store_rows(out, (peak, other_peak, total, other, tilt, excess, spread), step, mask_n)


@triton.jit(do_not_specialize=["N", "runs"])
def combine_pair_kernel(
    partials_ptr,  # (7, runs, N)
    selection,  # Selection
    stats_ptr,  # (8, N) out: PairStats
    N,
    V,
    runs,
    STUDENT_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.load(selection.count_ptr)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= count:
        return
    mask = offs < count
    rows, _ = selected_rows(selection, offs, mask, V)
    peak = tl.full((BLOCK,), FLOOR, tl.float32)
    other_peak = tl.full((BLOCK,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    tilt = tl.zeros((BLOCK,), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    step = tl.cast(runs, tl.int64) * N
    for run in range(runs):
        at = partials_ptr + tl.cast(run, tl.int64) * N + offs
        more_peak = tl.load(at, mask=mask, other=FLOOR)
        more_other_peak = tl.load(at + step, mask=mask, other=FLOOR)
        more_total = tl.load(at + 2 * step, mask=mask, other=0.0)
        more_other = tl.load(at + 3 * step, mask=mask, other=0.0)
        more_tilt = tl.load(at + 4 * step, mask=mask, other=0.0)
        more_excess = tl.load(at + 5 * step, mask=mask, other=0.0)
        more_spread = tl.load(at + 6 * step, mask=mask, other=0.0)
        if STUDENT_FIRST:
            own, high, more_own, more_high = total, peak, more_total, more_peak
        else:
            own, high, more_own, more_high = other, other_peak, more_other, more_other_peak
        top = tl.maximum(high, more_high)
        spread = tl.exp(high - top) * (spread + (top - high) * own)
        spread += tl.exp(more_high - top) * (more_spread + (top - more_high) * more_own)
        peak, other_peak, total, other, tilt, excess = join_sums(
            peak, other_peak, total, other, tilt, excess,
            more_peak, more_other_peak, more_total, more_other, more_tilt, more_excess,
        )  # fmt: skip
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
    n, device = problem.targets.numel(), problem.hidden.device
    stats = torch.zeros(len(PairStats._fields), n, dtype=torch.float32, device=device)
    if n == 0:
        return stats
    selection = Selection(*compact_rows(problem.targets != IGNORE), problem.targets)
    if problem.is_mixture:
        stats = torch.stack(mixture_stats(*(RowStats(*forward_alone(p)) for p in (problem.own, problem.teacher))))
    partials = run_forward(problem, selection, stats if problem.is_mixture else None)
    if problem.is_mixture:
        known = PairStats(*stats)
        for row, total in zip((known.divergence, known.center), in_rows(partials.sum(1), selection, 0.0)):
            row.copy_(total)
        return stats
    combine_pair_kernel[(cdiv(n, tiles.COMBINE_BLOCK),)](
        partials_ptr=partials,
        selection=selection,
        stats_ptr=stats,
        N=n,
        V=problem.weight.shape[0],
        runs=partials.shape[1],
        STUDENT_FIRST=problem.beta == 1.0,
        BLOCK=tiles.COMBINE_BLOCK,
    )
    return stats


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
    n, kinds = problem.targets.numel(), SUMS if stats is None else MIXED
    if n == 0:
        return torch.empty(kinds, 1, 0, dtype=torch.float32, device=problem.hidden.device)
    sweep = Sweep(problem, mixed("forward_pair", problem), selection)
    partials = sweep.new_partials(kinds)
    teacher, others = teacher_arguments(problem)
    for first_row, last_row in sweep.chunks():
        forward_pair_kernel[sweep.grid](
            **sweep.arguments(first_row, last_row),
            teacher=teacher,
            stats_ptr=stats,
            partials_ptr=partials,
            beta=problem.beta,
            STUDENT_FIRST=problem.beta == 1.0,
            ENTROPY=problem.params.entropy and stats is None,
            **others,
        )
    return partials


def mixed(name, problem):
    """Whose tile a kernel takes: a mixture's logarithms leave room for fewer cells."""
    return f"{name}_mixture" if problem.is_mixture else name


def teacher_arguments(problem):
    """-> :class:`Teacher`, what the kernels take beside it."""
    teacher = problem.teacher
    head, logits, _ = logit_arguments(teacher)
    both = Teacher(teacher.hidden, row_strides(teacher.hidden), head, logits)
    return both, {
        "teacher_bias_ptr": teacher.bias,
        "T": teacher.hidden.shape[1],
        "TEACHER_COMPUTE": TO_TRITON[str(teacher.params.compute_dtype)],
    }


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "chunk", "N", "copied_rows", "T"])
def dlogits_pair_kernel(
    x_ptr,  # (held, D) rows of the student's hidden, gathered
    x_desc,  # of it, and
    w_desc,  # of the weight, or with ids of the chunk's entries; None: by pointers
    head,  # Head of the student
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    teacher,  # Teacher
    teacher_bias_ptr,  # (V,) or None
    ids_ptr,  # (V,) the entry at each position; None: in their order
    selection,  # Selection of the rows with a gradient
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (8, N) PairStats
    grad_ptr,  # (N,)
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
    T,
    logits,  # Logits of the student
    beta,
    KIND: tl.constexpr,  # 0: KL(teacher || student), 1: KL(student || teacher), 2: of the mixture
    WHOLE_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    TEACHER_COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    first, last, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    across = (last - first) * (PANEL // BLOCK_V)
    block, tile = group_blocks(tl.program_id(0), tl.maximum(across, 1), GROUP)
    if block * BLOCK_N >= height:
        return
    local_v = tile * BLOCK_V
    panel = local_v // PANEL
    stop = tl.minimum(tl.load(stops_ptr + first + panel), last_row)
    if first_row + block * BLOCK_N // PANEL * PANEL >= stop:  # the GEMMs read PANELs of rows
        return
    start = first_row + block * BLOCK_N
    first_v = first * PANEL + local_v
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, _ = selected_rows(selection, offs_n, mask_n, head.V)
    taught = teacher_raw(
        teacher, teacher_bias_ptr, ids_ptr, rows, first_v, T, TEACHER_COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D
    )
    first_w = first_v if ids_ptr is None else copied_rows - (last - first) * PANEL + local_v
    raw = raw_logits(
        x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, ids_ptr, rows, start - first_held, stop - 1 - first_held,
        first_v, first_w, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    inverse = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    grad = tl.load(grad_ptr + rows, mask=mask_n, other=0.0) * inverse * tl.load(scale_ptr)
    peak, offset, other_peak, gap, center = load_pair(stats_ptr, N, rows, mask_n)
    u = cap(raw, logits) * inverse[:, None] - peak[:, None]
    v = cap(taught, teacher.logits) * inverse[:, None] - other_peak[:, None]
    delta = u - v - gap[:, None]
    p = tl.math.exp2((u - offset[:, None]) * LOG2E)
    if KIND == 0:
        dz = -difference(p, tl.math.exp2((v + (gap - offset)[:, None]) * LOG2E), delta)
    else:
        if KIND == 2:
            log_s, _log_t = mixture_logs(delta, beta)
            delta = (1.0 - beta) * log_s
        dz = p * (delta - center[:, None])
    dz *= grad[:, None] * cap_slope(raw, logits)
    offs_v = tl.arange(0, BLOCK_V)
    dz = tl.where((first_v + offs_v < head.V)[None, :] & mask_n[:, None], dz, 0.0)  # the GEMMs read whole tiles
    dz = without_dust(dz)
    if sums_ptr is not None:
        tl.store(sums_ptr + tile * height + block * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(dz, axis=1))
    out = panel_pointers(dlogits_ptr, height, block * BLOCK_N, local_v, PANEL, BLOCK_N, BLOCK_V)
    tl.store(out, dz.to(dlogits_ptr.dtype.element_ty))


def backward(problem, stats, grad, needs):
    """As :func:`fastgrpo.kernels.backward.backward`, of divergences. grad: (N,) float32."""
    grad = grad.contiguous()
    active = (problem.targets != IGNORE) & (grad != 0)
    return climb(problem, stats, [grad], active, needs, lambda: staircase.exact(
        active, *compact_rows(active), problem.weight.shape[0]), PairLauncher)  # fmt: skip


class PairLauncher(Launcher):
    """Launches the backward of divergences."""

    @staticmethod
    def kernel(problem, grads):
        return mixed("dlogits_pair", problem)

    @functools.cached_property
    def teacher(self):
        return teacher_arguments(self.problem)

    def dlogits(self, first_row, last_row, chunk):
        problem = self.problem
        teacher, others = self.teacher
        dlogits_pair_kernel[(self.grid(self.tile),)](
            **self.tile_arguments(first_row, last_row, chunk),
            teacher=teacher,
            grad_ptr=self.grads[0],
            beta=problem.beta,
            KIND=2 if problem.is_mixture else int(problem.beta),
            **others,
        )
