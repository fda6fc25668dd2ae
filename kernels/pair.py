"""Two heads in one kernel: what the forward and the backward of a divergence share.

Both models' rows are gathered as in the kernels of one head. Only a backward reads the teacher's where they stand: no
GEMM of a gradient needs them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo.kernels.arguments import TO_TRITON, describe, has_extras, logit_arguments
from fastgrpo.kernels.common import LN2, LOG2E, cap, rounded_product
from fastgrpo.kernels.pair_math import NEAR, expm1_near, mixture_logs, split_sides


class Teacher(NamedTuple):
    """The teacher's head and its logits' form."""

    head: object  # Head
    logits: object  # Logits


@triton.jit
def transformed(raw, logits, inverse):
    """Logits, rounded alike in every kernel: what is subtracted from them must cancel."""
    return rounded_product(cap(raw, logits), inverse[:, None])


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
    return tl.where(near, first * expm1_near(-d), second - first)


@triton.jit
def log_mixture(delta, beta):
    """log(p_s / m), log(m / p_t) in bits, see ``mixture_logs``, of delta = log p_s - log p_t."""
    above, below, apart, share = split_sides(delta * LOG2E, beta)
    return mixture_logs(above, below, apart, share)


@triton.jit
def mixture_ratio(delta, beta):
    """(1 - beta) log(p_s / m), in nats, of what :func:`log_mixture` takes."""
    log_s, _minus_log_t = log_mixture(delta, beta)
    return (1.0 - beta) * LN2 * log_s


@triton.jit
def pair_slopes(raw, taught, known, logits, teacher_logits, inverse, beta, KIND: tl.constexpr):
    """d divergence / d the student's logits of a tile of both models' raw ones. known: of :func:`load_pair`.

    KIND: 0: KL(teacher || student), 1: KL(student || teacher), 2: of the mixture.
    """
    peak, offset, other_peak, gap, center = known
    u = transformed(raw, logits, inverse) - peak[:, None]
    v = transformed(taught, teacher_logits, inverse) - other_peak[:, None]
    delta = u - v - gap[:, None]
    p = tl.math.exp2((u - offset[:, None]) * LOG2E)
    if KIND == 0:
        dz = -difference(p, tl.math.exp2((v + (gap - offset)[:, None]) * LOG2E), delta)
    else:
        if KIND == 2:
            delta = mixture_ratio(delta, beta)
        dz = p * (delta - center[:, None])
    return dz


def pair_tile(kernel, problem, certified=False, entropy=False):
    """Whose tile a kernel takes: a mixture's logarithms, flags and options leave room for fewer cells."""
    parts = {"mixture": problem.is_mixture, "certified": certified, "full": entropy or has_extras(problem)}
    return "_".join([kernel, *(name for name, is_so in parts.items() if is_so)])


def teacher_arguments(problem, tile, entries=None):
    """What the kernels take of the teacher. entries: what a descriptor reads of its weight; None: pointers have to."""
    teacher = problem.teacher
    head, logits, _ = logit_arguments(teacher)
    return {
        "teacher": Teacher(head, logits),
        "teacher_w_desc": None if entries is None else describe(entries, tile.cols, tile.depth),
        "teacher_bias_ptr": teacher.bias,
        "TEACHER_COMPUTE": TO_TRITON[str(teacher.params.compute_dtype)],
    }
