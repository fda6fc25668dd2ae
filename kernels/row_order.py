"""In which order a certified backward takes its rows, and which it may leave to their kept entries.

:mod:`fastgrpo.backends.certified_backward` says what fits the tolerance, in torch; tests hold both equal. Sums go over
fixed blocks in a fixed order, and nothing is atomic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.backends import grouping, staircase
from fastgrpo.inputs import IGNORE
from fastgrpo.kernels.arguments import logit_arguments
from fastgrpo.kernels.common import inverse_temperatures, raw_size, to_room
from fastgrpo.kernels.tiles import cdiv

WHOLE, HEAD_ONLY, SPARSE, INACTIVE = map(tl.constexpr, range(4))
assert (WHOLE.value, HEAD_ONLY.value, SPARSE.value, INACTIVE.value) == (
    staircase.WHOLE, staircase.HEAD_ONLY, staircase.SPARSE, staircase.INACTIVE)  # fmt: skip
ONE = tl.constexpr(grouping.UNITS)
NO_TARGET = tl.constexpr(IGNORE)
LARGEST = tl.constexpr(3e38)  # of a key below inf, in the place of NaN too
ACTIVE, USABLE = tl.constexpr(1), tl.constexpr(2)  # bits of a row's state
ROWS = 64  # of a program that compares each of its rows with all others
OTHERS = 128  # of them at once, one a thread
SORTED = 256  # rows of a program that finds out which of them are within the budget
PIVOTS = 4  # of them at once are compared with all others, one of these a thread
SEARCHERS = 16  # warps of it
WEIGHED = 4096  # rows at once of the one program that adds up all of them
INFINITE = tl.constexpr(0x7F800000)  # inf of :func:`row_ranks`


@triton.jit
def row_keys(keys_ptr, targets_ptr, offs, N):
    """What rows are ordered by, fp32: that of ignored rows is inf, of no other; so is that of rows beyond the last."""
    mask = offs < N
    keys = tl.zeros_like(offs).to(tl.float32)
    if keys_ptr is not None:
        keys = tl.load(keys_ptr + offs, mask=mask, other=0.0)
    if targets_ptr is not None:
        keys = tl.where(keys < LARGEST, keys, LARGEST)
        mask = mask & (tl.load(targets_ptr + offs, mask=mask, other=NO_TARGET) != NO_TARGET)
    return tl.where(mask, keys, float("inf"))


@triton.jit
def row_ranks(keys_ptr, targets_ptr, offs, N):
    """:func:`row_keys` as int32 in the same order: two equal keys have one rank, -0 that of 0."""
    bits = (row_keys(keys_ptr, targets_ptr, offs, N) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["N"])
def order_kernel(
    keys_ptr,  # (N,) fp32; None: all the same
    targets_ptr,  # (N,) where IGNORE stands, the row comes last; None: nowhere
    order_ptr,  # (N,) int64 out: rows by rising key, equal ones as they come
    places_ptr,  # (N,) int32 out: where each row stands there; or None
    count_ptr,  # (1,) int32 out: rows whose key is less than inf
    N,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row counts those before it: N^2 comparisons, which beside N V D multiplications are nothing."""
    start = tl.program_id(0) * BLOCK_N
    offs = start + tl.arange(0, BLOCK_N)
    mine = row_ranks(keys_ptr, targets_ptr, offs, N)
    others = start + tl.arange(0, BLOCK)
    rank = row_ranks(keys_ptr, targets_ptr, others, N)
    earlier = (rank[None, :] == mine[:, None]) & (others[None, :] < offs[:, None])
    before = tl.where(earlier, 1.0, 0.0)  # whole numbers, which add up quicker than integers
    counted = tl.zeros((BLOCK,), tl.int32)
    upcoming = row_ranks(keys_ptr, targets_ptr, tl.arange(0, BLOCK), N)
    for first in range(0, N, BLOCK):
        others = first + tl.arange(0, BLOCK)
        rank, upcoming = upcoming, row_ranks(keys_ptr, targets_ptr, others + BLOCK, N)
        counted += (rank < INFINITE).to(tl.int32)
        rank -= (others < start).to(tl.int32)  # of equal rows an earlier one is less
        before = tl.where(rank[None, :] < mine[:, None], before + 1.0, before)
    place = tl.sum(before.to(tl.int32), axis=1)
    mask = offs < N
    tl.store(order_ptr + place, offs.to(tl.int64), mask=mask)
    if places_ptr is not None:
        tl.store(places_ptr + offs, place, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, tl.sum(counted, axis=0))


@triton.jit
def cost_units(costs_ptr, states_ptr, budget, offs, N):
    """int64 parts of the budget, 0 of rows that are not active; see :func:`grouping.within_budget`."""
    mask = offs < N
    active = (tl.load(states_ptr + offs, mask=mask, other=0) & ACTIVE) != 0
    cost = tl.load(costs_ptr + offs, mask=mask, other=0.0)
    share = cost * cost / budget
    share = tl.where(share < 2.0, share, 2.0)
    return tl.where(active, tl.ceil(share.to(tl.float64) * ONE).to(tl.int64), 0)


@triton.jit(do_not_specialize=["N", "share"], do_not_specialize_on_alignment=["norms_ptr", "largest_ptr"])
def weigh_kernel(
    order_ptr,  # (N,) rows, the certificate's
    targets_ptr,  # (N,)
    grad_ptr,  # (N,)
    norms_ptr,  # (N,) least norm of each row's dlogits for a gradient of 1
    largest_ptr,  # (N,) about the largest of them
    stats_ptr,  # (5, N) RowStats
    temperature_ptr,  # (N,) or None
    dropped_ptr,  # (N,) in order
    costs_ptr,  # (N,) out, in order: norm of what each row drops, at most
    states_ptr,  # (N,) uint8 out, in order
    units_ptr,  # (N,) int64 out, in order: the parts of the budget that these take
    scale_ptr,  # (1,) out, see problem.row_scale
    N,
    share,  # of the sum of squared norms
    logits,  # Logits
    BLOCK: tl.constexpr,
):
    """Of :func:`certified_backward.within_tolerance` what is a sum over all rows, by one program."""
    norms = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < N
        rows = tl.load(order_ptr + offs, mask=mask, other=0)
        grad = tl.load(grad_ptr + rows, mask=mask, other=0.0)
        target = tl.load(targets_ptr + rows, mask=mask, other=NO_TARGET)
        active = (grad != 0) & (target != NO_TARGET)
        norm = grad * tl.load(norms_ptr + rows, mask=mask, other=0.0)
        square = norm * norm
        norms += tl.where(active & (square == square), square, 0.0)
        inverse = inverse_temperatures(temperature_ptr, rows, mask, logits, BLOCK)
        size = tl.abs(grad) * raw_size(tl.load(largest_ptr + rows, mask=mask, other=0.0), inverse, logits)
        largest = tl.maximum(largest, tl.where(active & (size < float("inf")), size, 0.0))
        top = tl.load(stats_ptr + tl.cast(N, tl.int64) + rows, mask=mask, other=0.0)
        top += tl.load(stats_ptr + 2 * tl.cast(N, tl.int64) + rows, mask=mask, other=0.0)
        usable = active & (tl.abs(grad * top) < float("inf"))
        dropped = tl.load(dropped_ptr + offs, mask=mask, other=0.0)
        tl.store(costs_ptr + offs, tl.abs(grad * dropped), mask=mask)
        state = tl.where(active, ACTIVE, 0) | tl.where(usable, USABLE, 0)
        tl.store(states_ptr + offs, state.to(tl.uint8), mask=mask)
    budget = share * tl.sum(norms, axis=0)
    tl.store(scale_ptr, to_room(tl.maximum(tl.max(largest, axis=0), 1e-30)))
    tl.debug_barrier()  # threads read what others have written
    for first in range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(units_ptr + offs, cost_units(costs_ptr, states_ptr, budget, offs, N), mask=offs < N)


@triton.jit(do_not_specialize=["N"])
def sort_out_kernel(
    units_ptr,  # (N,) int64
    states_ptr,  # (N,) uint8
    kinds_ptr,  # (N,) uint8 out: WHOLE, SPARSE or INACTIVE
    N,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """A row is sparse where it and all cheaper ones together stay within the budget.

    So of a program's rows the cheapest ones are; how many is searched for: what PIVOTS of them and all cheaper ones
    take says between which two of these the last sparse one is.
    """
    start = tl.program_id(0) * BLOCK_N
    offs = start + tl.arange(0, BLOCK_N)
    mine = tl.load(units_ptr + offs, mask=offs < N, other=0)
    place = tl.zeros((BLOCK_N, OWN), tl.int32)
    for first in range(0, BLOCK_N, OWN):
        others = start + first + tl.arange(0, OWN)
        units = tl.load(units_ptr + others, mask=others < N, other=0)[None, :]
        earlier = others[None, :] < offs[:, None]
        place += (units < mine[:, None] + earlier.to(tl.int64)).to(tl.int32)
    place = tl.sum(place, axis=1)
    sparse, left = 0, tl.full((), BLOCK_N + 1, tl.int32)  # so many are sparse, and fewer than ``left`` more
    while left > 1:
        step = tl.cdiv(left, PIVOTS + 1)
        pivot = sparse + (tl.arange(0, PIVOTS) + 1) * step - 1
        unit = tl.sum(tl.where(place[None, :] == pivot[:, None], mine[None, :], 0), axis=1)
        spent = tl.zeros((PIVOTS, BLOCK), tl.int64)
        for first in range(0, N, BLOCK):
            others = first + tl.arange(0, BLOCK)
            apart = (others < start) | (others >= start + BLOCK_N)
            units = tl.load(units_ptr + others, mask=(others < N) & apart, other=0)
            rank = units - (others < start).to(tl.int64)  # of equal rows an earlier one is less
            spent = tl.where(rank[None, :] < unit[:, None], spent + units[None, :], spent)
        own = tl.sum(tl.where(place[None, :] <= pivot[:, None], mine[None, :], 0), axis=1)
        fine = (tl.sum(spent, axis=1) + own <= ONE) & (pivot < BLOCK_N)
        sparse += tl.sum(fine.to(tl.int32), axis=0) * step
        left = step
    active = (tl.load(states_ptr + offs, mask=offs < N, other=0) & ACTIVE) != 0
    kind = tl.where(active, tl.where(place < sparse, SPARSE, WHOLE), INACTIVE)
    tl.store(kinds_ptr + offs, kind.to(tl.uint8), mask=offs < N)


class Weights(NamedTuple):
    """What each row would cost, in the certificate's order."""

    costs: torch.Tensor  # (N,) fp32, norm of what it drops, at most
    states: torch.Tensor  # (N,) uint8
    kinds: torch.Tensor  # (N,) uint8: WHOLE, SPARSE or INACTIVE
    scale: torch.Tensor  # (1,) fp32, see problem.row_scale


def order_rows(keys, targets, places=False):
    """Rows by rising key, equal ones as they come, ignored ones last.

    Args:
        keys: (N,) float32, or None. targets: (N,); None: no row is ignored, and no key may be NaN.

    Returns:
        order (N,) int64; places (N,) int32 or None, where each row stands there; count (1,) int32 of keys below inf.
    """
    like = targets if keys is None else keys
    n, device = like.numel(), like.device
    order = torch.empty(n, dtype=torch.int64, device=device)
    place = torch.empty(n, dtype=torch.int32, device=device) if places else None
    count = torch.empty(1, dtype=torch.int32, device=device)
    order_kernel[(max(cdiv(n, ROWS), 1),)](
        keys_ptr=keys,
        targets_ptr=targets,
        order_ptr=order,
        places_ptr=place,
        count_ptr=count,
        N=n,
        BLOCK_N=ROWS,
        BLOCK=OTHERS,
    )
    return order, place, count


def weigh(problem, stats, certificate, grad_logp):
    """:class:`Weights` of all rows: which may be left to their kept entries within the tolerance."""
    n, device = certificate.order.numel(), certificate.order.device
    costs, scale = (torch.empty(k, dtype=torch.float32, device=device) for k in (n, 1))
    units = torch.empty(n, dtype=torch.int64, device=device)
    states = torch.empty(n, dtype=torch.uint8, device=device)
    weigh_kernel[(1,)](
        order_ptr=certificate.order,
        targets_ptr=problem.targets,
        grad_ptr=grad_logp,
        norms_ptr=problem.norms(stats),
        largest_ptr=problem.largest(stats)[0],
        stats_ptr=stats,
        temperature_ptr=problem.temperature,
        dropped_ptr=certificate.dropped,
        costs_ptr=costs,
        states_ptr=states,
        units_ptr=units,
        scale_ptr=scale,
        N=n,
        share=(problem.params.tolerance * problem.of_tolerance) ** 2,
        logits=logit_arguments(problem)[1],
        BLOCK=WEIGHED,
        num_warps=16,
    )
    return Weights(costs, states, sort_out(units, states), scale)


def sort_out(units, states):
    """kinds (N,) uint8: WHOLE, SPARSE or INACTIVE; see the kernel."""
    n, kinds = units.numel(), torch.empty_like(states)
    sort_out_kernel[(cdiv(n, SORTED),)](
        units_ptr=units,
        states_ptr=states,
        kinds_ptr=kinds,
        N=n,
        BLOCK_N=SORTED,
        BLOCK=32 * SEARCHERS,
        OWN=16,
        PIVOTS=PIVOTS,
        num_warps=SEARCHERS,
    )
    return kinds
