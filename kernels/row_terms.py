"""What a tile of dlogits needs of each row, made once a backward: a tile then reads a few numbers side by side."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.kernels import tiles
from fastgrpo.kernels.common import (
    LOG2E,
    inverse_temperatures,
    load_stats,
    rounded_product,
    selected_rows,
    store_rows,
    without_dust,
)
from fastgrpo.kernels.row_math import gradient_at_label
from fastgrpo.kernels.tiles import cdiv

LN2 = tl.constexpr(math.log(2))
BLOCK = 128


class RowTerms(NamedTuple):
    """Of every row in the order of the work: dlogits = factor * 2^(logit before the temperature * rate - base)."""

    base_ptr: object  # (N,) fp32, as the others in whole panels
    factor_ptr: object
    at_label_ptr: object  # dlogits there
    label_ptr: object  # int32 position of the label, -1 without


@triton.jit
def two_sum(a, b):
    """-> a + b, and what rounding took from it."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


@triton.jit
def log2_mass(peak, offset, inverse, rate):
    """log2 of a row's sum of e^z, as two floats: beside logits z LOG2E that are made as ``value * rate``.

    ``rate`` is a rounded inverse * LOG2E, and a difference of large numbers would show it.
    """
    step = rate / inverse
    step_low = tl.fma(-step, inverse, rate) / inverse
    top = rounded_product(peak, step)
    rest = rounded_product(offset, LOG2E)
    total, lost = two_sum(top, rest)
    lost += tl.fma(peak, step, -top) + peak * step_low + tl.fma(offset, LOG2E, -rest)
    return total, tl.maximum(tl.minimum(lost, 1.0), -1.0)  # of FLOOR anything


@triton.jit
def lift_of(x):
    """-> k and 2^k, where 2^k |x| is about 2^20: exp2 flushes p 2^-k below 2^-126, where p |x| is dust."""
    field = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 20)
    return (147 - field).to(tl.float32), ((274 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "padded"])
def row_terms_kernel(
    selection,  # Selection of the rows with a gradient; targets are positions
    temperature_ptr,  # (N,) or None
    stats_ptr,  # (5, N) RowStats
    grad_logp_ptr,  # (N,)
    grad_entropy_ptr,  # (N,) or None
    scale_ptr,  # (1,) power of two
    label_ptr,  # (padded,) int32 out
    terms_ptr,  # (5, padded) fp32 out: those of RowTerms, then the entropy's lean and the rate where there are such
    N,
    padded,
    V,
    logits,  # Logits
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.load(selection.count_ptr)
    rows, label = selected_rows(selection, offs, mask, V)
    inverse = inverse_temperatures(temperature_ptr, rows, mask, logits, BLOCK)
    row_factor = inverse * tl.load(scale_ptr)
    grad_logp = tl.load(grad_logp_ptr + rows, mask=mask, other=0.0) * row_factor
    grad_entropy = None
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + rows, mask=mask, other=0.0) * row_factor
    logp, peak, offset, other_mass, entropy = load_stats(stats_ptr, N, rows, mask)
    at_label = without_dust(gradient_at_label(grad_logp, grad_entropy, logp, other_mass, entropy))
    rate = inverse * LOG2E
    mass, lost = log2_mass(peak, offset, inverse, rate)
    if grad_entropy_ptr is not None:  # -g p - h p (log p + H), with log p of the same exponent
        base = mass
        unrounded = tl.math.exp2(-lost)
        factor = -(grad_logp + grad_entropy * (entropy - lost * LN2)) * unrounded
        tl.store(terms_ptr + 3 * padded + offs, -(grad_entropy * LN2) * unrounded)
    else:
        lift, scale = lift_of(grad_logp)
        base, more = two_sum(mass, lift)
        factor = -grad_logp * scale * tl.math.exp2(-lost - more)
    store_rows(terms_ptr + offs, (base, factor, at_label), padded, offs < padded)
    tl.store(label_ptr + offs, label)
    if temperature_ptr is not None:
        tl.store(terms_ptr + 4 * padded + offs, rate)


@triton.jit
def rates(rate_ptr, offs, logits, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) inverse temperatures * LOG2E."""
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + offs)
    else:
        rate = tl.full((BLOCK_N,), logits.inv_temperature, tl.float32) * LOG2E
    return rate


def row_terms(problem, selection, stats, grads, scale, vocab, logits):
    """-> :class:`RowTerms`; lean_ptr and rate_ptr of the kernels that read them, each (padded,) or None.

    Args:
        grads: of the log-prob and, or not, of the entropy. vocab: how many positions there are.
    """
    n, device = problem.targets.numel(), problem.targets.device
    padded = cdiv(n, tiles.WIDTH) * tiles.WIDTH
    label = torch.empty(padded, dtype=torch.int32, device=device)
    table = torch.empty(5, padded, dtype=torch.float32, device=device)
    row_terms_kernel[(padded // BLOCK,)](
        selection=selection,
        temperature_ptr=problem.temperature,
        stats_ptr=stats,
        grad_logp_ptr=grads[0],
        grad_entropy_ptr=grads[1] if len(grads) > 1 else None,
        scale_ptr=scale,
        label_ptr=label,
        terms_ptr=table,
        N=n,
        padded=padded,
        V=vocab,
        logits=logits,
        BLOCK=BLOCK,
    )
    terms = RowTerms(table[0], table[1], table[2], label)
    return terms, table[3] if len(grads) > 1 else None, None if problem.temperature is None else table[4]
