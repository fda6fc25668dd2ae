"""The kernels' own expm1 and log1p, entry by entry, against fp64: as good where a result is tiny as anywhere."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastgrpo.kernels.pair import log_mixture
from fastgrpo.kernels.pair_math import exp2m1_down, expm1_near, log2p1_down

UNIT = 2**-24  # of fp32's rounding


@triton.jit
def functions_kernel(x_ptr, out_ptr, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if WHICH == 0:
        y = expm1_near(x)
    elif WHICH == 1:
        y = exp2m1_down(x)
    else:
        y = log2p1_down(x)
    tl.store(out_ptr + offs, y)


@triton.jit
def mixture_kernel(delta_ptr, log_s_ptr, log_t_ptr, beta, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    log_s, minus_log_t = log_mixture(tl.load(delta_ptr + offs), beta)
    tl.store(log_s_ptr + offs, log_s)
    tl.store(log_t_ptr + offs, minus_log_t)


def exp2m1(x):
    return torch.expm1(x * math.log(2))


def log2p1(x):
    return torch.log1p(x) / math.log(2)


def tiny_to_large(low, high):
    """fp32 numbers of [low, high]: evenly, and of every size down to 2^-100 of both signs that there are."""
    small = torch.exp2(-100 * torch.rand(2**12, generator=torch.Generator().manual_seed(0)))
    both = torch.cat((small * low, small * high))
    return torch.cat((torch.linspace(low, high, 2**13), both)).float()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("which", "exact", "low", "high", "units"),
    [(0, torch.expm1, -0.5, 0.5, 2.5), (1, exp2m1, -30.0, 0.0, 2.5), (2, log2p1, -0.999, 0.0, 4.5)],
    ids=["expm1", "2^x - 1", "log2(1 + x)"],
)
def test_against_fp64(which, exact, low, high, units, device):
    x = tiny_to_large(low, high).to(device)
    out = torch.empty_like(x)
    functions_kernel[(len(x) // 1024,)](x, out, which, BLOCK=1024)
    truth = exact(x.double().cpu())
    error = (out.cpu().double() - truth).abs()
    assert (error <= units * UNIT * truth.abs()).all(), (error / truth.abs()).nan_to_num(nan=0.0).max() / UNIT


@pytest.mark.quick
@pytest.mark.parametrize("beta", [0.001, 0.3, 0.5, 0.999])
def test_logs_of_a_mixture(beta, device):
    delta = torch.cat((tiny_to_large(-40.0, 40.0), torch.tensor([0.0, 1e30, -1e30] + [math.nan] * 1021))).to(device)
    out = torch.empty(2, len(delta), device=device)
    mixture_kernel[(len(delta) // 1024,)](delta, *out, beta, BLOCK=1024)
    log_s, minus_log_t = out.cpu().double()
    d = delta.cpu().double()
    share = torch.where(d > 0, beta, 1 - beta)
    over_larger = 1 + share * torch.expm1(-d.abs())  # the mixture over the larger of both
    larger = torch.log1p(share * torch.expm1(-d.abs()))
    truth = torch.stack((d.clamp(max=0.0) - larger, d.clamp(min=0.0) + larger)) / math.log(2)
    there = ~d.isnan()
    for got, want in zip((log_s, minus_log_t), truth):
        error = (got - want).abs()[there]
        # the sides' own size, and a share's rounding where little else is left
        bound = 4 * UNIT * (d.abs() + want.abs() + share * -torch.expm1(-d.abs()) / over_larger)[there]
        assert (error <= bound).all(), (error / bound).nan_to_num(nan=0.0).max()
    assert log_s[~there].isnan().all()  # where a logit is NaN, the divergence and the gradient are
