"""The backward of divergences: the student's dlogits of both models' logits; all else is the backward of one head."""

import functools

import triton
import triton.language as tl

from fastgrpo.kernels import backward as exact
from fastgrpo.kernels import certified, tiles
from fastgrpo.kernels.arguments import is_described, is_same, row_strides
from fastgrpo.kernels.certified import SampleLauncher
from fastgrpo.kernels.common import (
    NOTHING,
    cap_slope,
    chunk_panels,
    dlogits_tile,
    entry_ids,
    inverse_temperatures,
    pieces_of,
    raw_logits,
    row_offsets,
    selected_rows,
    store_piece,
    store_sums,
    without_dust,
)
from fastgrpo.kernels.pair import load_pair, pair_slopes, pair_tile, teacher_arguments


@triton.jit
def teacher_raw(
    hidden_ptr,  # (B, T, D_t)
    strides,  # RowStrides
    head,  # Head
    w_desc,  # of its weight, tiles of (BLOCK_V, BLOCK_D); None: by pointers
    bias_ptr,  # (V,) or None
    ids_ptr,  # (V,) entry at each position; None: in their order
    rows,  # (BLOCK_N,) int64
    first_v,
    first_w,  # the tile's row of w_desc
    T,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weight.T + bias of the teacher, (BLOCK_N, BLOCK_V) in fp32; anything beyond V."""
    offs_d = tl.arange(0, BLOCK_D)
    entries = entry_ids(ids_ptr, first_v, tl.arange(0, BLOCK_V), head.V)
    x_ptrs = hidden_ptr + row_offsets(rows, T, strides)[:, None]
    x_ptrs = x_ptrs + offs_d[None, :] * tl.cast(strides.d, tl.int64)
    w_ptrs = head.weight_ptr + entries[None, :] * head.stride_v + offs_d[:, None] * head.stride_d
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, head.D, BLOCK_D):
        inside = start + offs_d < head.D
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = w_desc.load([first_w, start]).T if w_desc is not None else tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x.to(COMPUTE), w.to(COMPUTE), acc, input_precision="ieee")
        x_ptrs += BLOCK_D * strides.d
        w_ptrs += BLOCK_D * head.stride_d
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + entries).to(tl.float32)
        acc += tl.where(bias < NOTHING, NOTHING, bias)[None, :]
    return acc


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "chunk", "N", "copied_rows", "T"])
def dlogits_pair_kernel(
    x_ptr,  # (held, D) rows of the student's hidden, gathered
    x_desc,  # of it, and
    w_desc,  # of the weight, or with ids of the chunk's entries; None: by pointers
    head,  # Head of the student
    bias_ptr,  # (V,) or None
    low_rank,  # LowRank or None
    teacher,  # Teacher
    teacher_ptr,  # its hidden states (B, T, D_t)
    teacher_strides,  # RowStrides
    teacher_w_desc,  # see teacher_raw
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
    CUTS: tl.constexpr,  # see pieces_of
    KIND: tl.constexpr,  # see pair_slopes
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
    # one tile a program: for a loop over them sm_80's mixture has no registers left
    block, tile, start, stop, first_v, first_w = dlogits_tile(
        tl.program_id(0), first, last, height, stops_ptr, ids_ptr, first_row, last_row, copied_rows,
        PANEL, BLOCK_N, BLOCK_V, GROUP,
    )  # fmt: skip
    if stop == 0:
        return
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    rows, _ = selected_rows(selection, offs_n, mask_n, head.V)
    raw = raw_logits(
        x_ptr, x_desc, w_desc, head, bias_ptr, low_rank, ids_ptr, rows, start - first_held, stop - 1 - first_held,
        first_v, first_w, WHOLE_D, COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    inverse = inverse_temperatures(temperature_ptr, rows, mask_n, logits, BLOCK_N)
    grad = tl.load(grad_ptr + rows, mask=mask_n, other=0.0) * inverse * tl.load(scale_ptr)
    known = load_pair(stats_ptr, N, rows, mask_n)
    taught = teacher_raw(
        teacher_ptr, teacher_strides, teacher.head, teacher_w_desc, teacher_bias_ptr, ids_ptr, rows, first_v, first_w,
        T, TEACHER_COMPUTE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    raws, taughts = pieces_of(raw, CUTS), pieces_of(taught, CUTS)
    PIECE: tl.constexpr = BLOCK_V // 2**CUTS
    sums = tl.zeros((BLOCK_N,), tl.float32)
    is_edge = (first_v + BLOCK_V > head.V) | (start + BLOCK_N > stop)
    for k in tl.static_range(2**CUTS):
        dz = pair_slopes(raws[k], taughts[k], known, logits, teacher.logits, inverse, beta, KIND)
        dz = without_dust(dz * (grad[:, None] * cap_slope(raws[k], logits)))
        if is_edge:  # the GEMMs read whole tiles
            offs_v = k * PIECE + tl.arange(0, PIECE)
            dz = tl.where((first_v + offs_v < head.V)[None, :] & mask_n[:, None], dz, 0.0)
        store_piece(dz, dlogits_ptr, block, tile * BLOCK_V + k * PIECE, height, PANEL, BLOCK_N, PIECE)
        sums += tl.sum(dz, axis=1)
    if sums_ptr is not None:
        store_sums(sums, sums_ptr, block, tile, height, BLOCK_N)


def backward(problem, stats, grad, needs):
    """As :func:`fastgrpo.kernels.backward.backward`, of divergences. grad: (N,) float32."""
    return exact.backward(problem, stats, grad, None, needs, PairLauncher)


class PairLauncher(exact.Launcher):
    """Launches the backward of divergences."""

    @staticmethod
    def beside(problem):
        own, teacher = problem.heads
        alike = own.params.compute_dtype == teacher.params.compute_dtype  # copies stand side by side
        apart = alike and not is_same(own.weight, teacher.weight)
        return (teacher.weight,) if apart and is_described(pair_tile("dlogits_pair", problem), teacher) else ()

    @staticmethod
    def kernel(problem, grads):
        return pair_tile("dlogits_pair", problem)

    @functools.cached_property
    def teacher(self):
        teacher = self.problem.teacher
        described = is_described(self.kernel(self.problem, self.grads), teacher)
        entries = self.work.panels.described(teacher.weight) if described else None
        return teacher_arguments(self.problem, self.tile, entries)

    def grid(self, tile):
        return self.most_tiles(tile)

    @functools.cached_property
    def dlogits_launch(self):
        problem = self.problem
        return self.tile_launch(
            dlogits_pair_kernel,
            selection=self.selection,
            temperature_ptr=problem.temperature,
            stats_ptr=self.stats,
            scale_ptr=self.scale,
            N=problem.targets.numel(),
            grad_ptr=self.grads[0],
            teacher_ptr=problem.teacher.hidden,
            teacher_strides=row_strides(problem.teacher.hidden),
            T=problem.teacher.hidden.shape[1],
            beta=problem.beta,
            CUTS=tiles.pair_cuts(self.tile),
            KIND=2 if problem.is_mixture else int(problem.beta),
            **self.teacher,
        )


class PairSampleLauncher(SampleLauncher, PairLauncher):
    """Makes the dlogits of an audit's samples."""

    @functools.cached_property
    def teacher(self):
        arguments = teacher_arguments(self.problem, self.tile)
        teacher = arguments["teacher"]
        return arguments | {"teacher": teacher._replace(head=teacher.head._replace(V=self.head.V))}


def certified_backward(problem, stats, certificate, grad, needs):
    """As :func:`fastgrpo.kernels.certified.certified_backward`, of divergences."""
    return certified.certified_backward(problem, stats, certificate, grad, needs, PairLauncher, PairSampleLauncher)
