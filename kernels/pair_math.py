"""``fastgrpo.pair_math`` in Triton's language."""

import triton
import triton.language as tl

from fastgrpo import pair_math as source
from fastgrpo.kernels.common import log1p_unit
from fastgrpo.kernels.rebind import rebind


@triton.jit
def expm1_near(x):
    """e^x - 1 for |x| <= 1/2 to fp32 accuracy."""
    tail = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8)))
    return x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * tail))))


NEAR = tl.constexpr(source.NEAR)


@triton.jit
def expm1_down(x):
    """e^x - 1 for x <= 0."""
    near = x > -NEAR
    return tl.where(near, expm1_near(tl.where(near, x, 0.0)), tl.exp(x) - 1.0)


@triton.jit
def log1p_down(x):
    """log(1 + x) for -1 <= x <= 0."""
    near = x > -NEAR
    return tl.where(near, log1p_unit(tl.where(near, x, 0.0)), tl.log(1.0 + x))


@triton.jit
def split_sides(delta, beta):
    """What ``mixture_logs`` takes."""
    side = delta > 0
    above, below = tl.where(side, delta, 0.0), tl.where(side, 0.0, delta)
    return above, below, below - above, tl.where(side, beta, 1.0 - beta)


_functions = rebind(source, log1p=log1p_unit, expm1=expm1_near, log1p_down=log1p_down, expm1_down=expm1_down)
move_peaks = _functions["move_peaks"]
join_sums = _functions["join_sums"]
finish_sums = _functions["finish_sums"]
mixture_logs = _functions["mixture_logs"]
scale_terms = _functions["scale_terms"]
move_terms = _functions["move_terms"]
move_moments = _functions["move_moments"]
