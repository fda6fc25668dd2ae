"""``fastgrpo.pair_math`` in Triton's language."""

import triton
import triton.language as tl

from fastgrpo import pair_math as source
from fastgrpo.kernels.common import log1p_unit
from fastgrpo.kernels.rebind import rebind

# Minimax polynomials, each wrong by at most 5e-8 of its value before the arithmetic rounds. What they make of arguments
# beyond their intervals is not taken.


@triton.jit
def expm1_near(x):
    """e^x - 1 for |x| <= 1/2."""
    q = 0.0013997325 + x * 0.00019841192
    q = 0.041665319 + x * (0.0083336346 + x * q)
    return x * (1.0 + x * (0.50000006 + x * (0.16666663 + x * q)))


NEAR = tl.constexpr(source.NEAR)
# of fp32's bits: 2 / 3, those of exponent and sign
TWO_THIRDS, EXPONENT = tl.constexpr(0x3F2AAAAB), tl.constexpr(-(2**23))


@triton.jit
def exp2m1_down(x):
    """2^x - 1 for x <= 0."""
    q = 0.0012907800 + x * 0.00011458057
    q = 0.055498954 + x * (0.0095962761 + x * q)
    q = x * (0.69314718 + x * (0.24022606 + x * q))
    return tl.where(x > -1.0, q, tl.math.exp2(x) - 1.0)


@triton.jit
def log2p1_down(x):
    """log2(1 + x) for -1 < x <= 0: as k + log2(1 + t), |t| <= 1/3, t = x itself near 0."""
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    whole = (bits - TWO_THIRDS) & EXPONENT
    t = tl.where(whole == 0, x, (bits - whole).to(tl.float32, bitcast=True) - 1.0)
    q = 0.20179914 + t * (-0.22222117 + t * 0.20278685)
    q = -0.36078957 + t * (0.28871134 + t * (-0.23678653 + t * q))
    q = 1.4426950 + t * (-0.72134656 + t * (0.48089597 + t * q))
    return whole.to(tl.float32) * 2.0**-23 + t * q


@triton.jit
def split_sides(delta, beta):
    """What ``mixture_logs`` takes; a NaN stays one."""
    side = delta > 0
    return tl.maximum(delta, 0.0), tl.where(side, 0.0, delta), -tl.abs(delta), tl.where(side, beta, 1.0 - beta)


# of mixture_logs, whose delta and logs are in bits here
_functions = rebind(source, log1p=log1p_unit, expm1=expm1_near, log1p_down=log2p1_down, expm1_down=exp2m1_down)
move_peaks = _functions["move_peaks"]
join_sums = _functions["join_sums"]
finish_sums = _functions["finish_sums"]
mixture_logs = _functions["mixture_logs"]
scale_terms = _functions["scale_terms"]
move_terms = _functions["move_terms"]
steepest = _functions["steepest"]
move_moments = _functions["move_moments"]
