"""Two heads in one kernel: what the forward and the backward of a divergence share.

The student's rows are gathered as in the kernels of one head; the teacher's, which no GEMM of a gradient reads, are
read where they stand.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo.kernels.arguments import TO_TRITON, describable, describe, logit_arguments, row_strides
from fastgrpo.kernels.common import NOTHING, cap, entry_ids, rounded_product, row_offsets
from fastgrpo.kernels.pair_math import NEAR, expm1_near


class Teacher(NamedTuple):
    """The teacher's side: hidden (B, T, D_t) as it stands, its head and its logits' form."""

    hidden_ptr: object
    strides: object  # RowStrides
    head: object  # Head
    logits: object  # Logits


@triton.jit
def transformed(raw, logits, inverse):
    """Logits, rounded alike in every kernel: what is subtracted from them must cancel."""
    return rounded_product(cap(raw, logits), inverse[:, None])


@triton.jit
def log_of(raw, logits, inverse, first_v, V, BLOCK_V: tl.constexpr):
    """Transformed logits, NOTHING beyond V."""
    z = transformed(raw, logits, inverse)
    return tl.where((first_v + tl.arange(0, BLOCK_V) >= V)[None, :], NOTHING, z)


@triton.jit
def teacher_raw(
    teacher,  # Teacher
    w_desc,  # of its weight, tiles of (BLOCK_V, BLOCK_D); None: by pointers
    bias_ptr,  # (V,) or None
    ids_ptr,  # (V,) entry at each position; None: in their order
    rows,  # (BLOCK_N,) int64
    first_v,
    first_w,  # the tile's row of w_desc
    T,
    WHOLE_D: tl.constexpr,  # whether BLOCK_D divides D
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
        if WHOLE_D:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(start + offs_d < head.D)[None, :], other=0.0)
        if w_desc is not None:
            w = w_desc.load([first_w, start]).T
        elif WHOLE_D:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(start + offs_d < head.D)[:, None], other=0.0)
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


def mixed(name, problem):
    """Whose tile a kernel takes: a mixture's logarithms leave room for fewer cells."""
    return f"{name}_mixture" if problem.is_mixture else name


def teacher_arguments(problem, tile, entries=None):
    """What the kernels take of the teacher. entries: what a descriptor reads of its weight; None: pointers have to."""
    teacher = problem.teacher
    head, logits, _ = logit_arguments(teacher)
    described = entries is not None and describable("dlogits", entries.device, teacher.params.compute_dtype, entries)
    return {
        "teacher": Teacher(teacher.hidden, row_strides(teacher.hidden), head, logits),
        "teacher_w_desc": describe(entries, tile.cols, tile.depth) if described else None,
        "teacher_bias_ptr": teacher.bias,
        "TEACHER_WHOLE_D": teacher.hidden.shape[2] % tile.depth == 0,
        "T": teacher.hidden.shape[1],
        "TEACHER_COMPUTE": TO_TRITON[str(teacher.params.compute_dtype)],
    }
