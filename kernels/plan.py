"""The plan of a certified backward, made on the device: rows by kind, entries by the rows that need them.

:mod:`fastgrpo.backends.staircase` says what it is, in torch; tests hold both equal. Sums are of integers or go over
fixed blocks in a fixed order, and nothing is atomic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastgrpo.kernels import tiles
from fastgrpo.kernels.row_order import HEAD_ONLY, OTHERS, SPARSE
from fastgrpo.kernels.tiles import cdiv

WORDS = 32  # of flags, of a program that finds out which rows their entries need
SPAN = 32 * WORDS  # its entries
BUCKETS = 16  # of entries that need the same rows: at once
PLACED = 32  # entries of a program that places them
PLACERS = 2  # warps of it
assert SPAN % PLACED == 0


@triton.jit(do_not_specialize=["N", "blocks"])
def count_kinds_kernel(
    kinds_ptr,  # (N,) uint8, in the certificate's order; those whole in dW alone are written
    places_ptr,  # (N,) int32, of an audit: where each row stands in its ranking; or None
    kept_ptr,  # (1,) int32, the first place there whose row dW needs whole
    counts_ptr,  # (4, blocks) int32 out: rows of each kind
    N,
    blocks,
    BLOCK_N: tl.constexpr,  # rows of a block
):
    block = tl.program_id(0)
    offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    kind = tl.load(kinds_ptr + offs, mask=mask, other=0)
    if places_ptr is not None:
        place = tl.load(places_ptr + offs, mask=mask, other=0)
        kind = tl.where((kind == SPARSE) & (place >= tl.load(kept_ptr)), HEAD_ONLY, kind).to(tl.uint8)
        tl.store(kinds_ptr + offs, kind, mask=mask)
    for k in tl.static_range(4):
        tl.store(counts_ptr + k * blocks + block, tl.sum((mask & (kind == k)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["N", "blocks"])
def place_rows_kernel(
    order_ptr,  # (N,) rows, the certificate's
    kinds_ptr,  # (N,) uint8
    counts_ptr,  # (4, blocks) int32
    rows_ptr,  # (N,) int64 out: by kind, each kind in order
    ends_ptr,  # (3, 1 + blocks) int32 out, see staircase.count_rows
    whole_ptr,  # (1,) int32 out: rows that are whole in dW
    active_ptr,  # (1,) int32 out: rows with a gradient
    N,
    blocks,
    BLOCK_N: tl.constexpr,  # rows of a block
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    kind = tl.load(kinds_ptr + offs, mask=mask, other=0)
    rows = tl.load(order_ptr + offs, mask=mask, other=0)
    ahead = 0  # rows of the kinds before
    for k in tl.static_range(4):
        before = tl.zeros((BLOCK,), tl.int32)
        total = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, blocks, BLOCK):
            other = first + tl.arange(0, BLOCK)
            count = tl.load(counts_ptr + k * blocks + other, mask=other < blocks, other=0)
            before += tl.where(other < block, count, 0)
            total += count
        start = ahead + tl.sum(before, axis=0)
        mine = mask & (kind == k)
        here = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(rows_ptr + start + here - 1, rows, mask=mine)
        if k < 3:
            ends = ends_ptr + k * (1 + blocks)
            tl.store(ends + 1 + block, start + tl.sum(mine.to(tl.int32), axis=0))
            if block == 0:
                tl.store(ends, ahead)
        ahead += tl.sum(total, axis=0)
        if k == 1:
            tl.store(whole_ptr, ahead, mask=block == 0)
        if k == 2:
            tl.store(active_ptr, ahead, mask=block == 0)


@triton.jit(do_not_specialize=["blocks", "V"])
def need_kernel(
    flags_ptr,  # (blocks, words) int32, columns as in flags.pack_flags
    ends_ptr,  # (3, 1 + blocks) int32
    needs_ptr,  # (V,) int32 out: leading rows that each entry needs, see staircase.rows_needed
    buckets_ptr,  # (V,) int32 out: these numbered, 0 .. 2 blocks
    counts_ptr,  # (2 blocks + 1, programs) int32 out: a program's entries in each bucket
    blocks,
    words,
    V,
    TRAINED: tl.constexpr,  # whether rows may be whole in dW alone
    TILE: tl.constexpr,  # entries that share their words
    BLOCK_W: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    W: tl.constexpr = TILE // 32
    offs = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = offs < words
    bits = tl.arange(0, 32)
    entries = (offs // W * TILE + offs % W)[:, None] + bits[None, :] * W
    sparse_ends = ends_ptr + SPARSE * (1 + blocks)
    head_ends = ends_ptr + HEAD_ONLY * (1 + blocks)
    last = tl.zeros((BLOCK_W, 32), tl.int32)  # 1 + the last block that keeps the entry for such rows
    last_head = tl.zeros((BLOCK_W, 32), tl.int32)
    for block in range(blocks):
        word = tl.load(flags_ptr + tl.cast(block, tl.int64) * words + offs, mask=inside, other=0)
        kept = ((word[:, None] >> bits[None, :]) & 1) != 0
        alive = tl.load(sparse_ends + block + 1) > tl.load(sparse_ends + block)
        last = tl.where(kept & alive, block + 1, last)
        if TRAINED:
            alive = tl.load(head_ends + block + 1) > tl.load(head_ends + block)
            last_head = tl.where(kept & alive, block + 1, last_head)
    # an entry that a sparse row keeps lies behind all rows that are whole in dW
    need = tl.load(sparse_ends + last, mask=last > 0, other=0)
    need = tl.maximum(need, tl.load(head_ends + last_head if TRAINED else ends_ptr + blocks))
    bucket = tl.where(last > 0, blocks + last, last_head)
    mask = inside[:, None] & (entries < V)
    tl.store(needs_ptr + entries, need, mask=mask)
    tl.store(buckets_ptr + entries, bucket, mask=mask)
    bucket = tl.reshape(tl.where(mask, bucket, -1), (BLOCK_W * 32,))
    for first in range(0, 2 * blocks + 1, BUCKETS):
        number = first + tl.arange(0, BUCKETS)
        count = tl.sum((bucket[:, None] == number[None, :]).to(tl.int32), axis=0)
        at = counts_ptr + number * tl.num_programs(0) + tl.program_id(0)
        tl.store(at, count, mask=number < 2 * blocks + 1)


@triton.jit(do_not_specialize=["buckets", "programs"])
def offsets_kernel(
    counts_ptr,  # (buckets, programs) int32
    offsets_ptr,  # the same, out: where each program's entries of a bucket begin, the highest bucket first
    buckets,
    programs,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    mine = number < buckets
    higher = tl.zeros((BUCKETS, BLOCK), tl.int32)
    for bucket in range((tl.program_id(0) + 1) * BUCKETS, buckets, BUCKETS):
        other = bucket + tl.arange(0, BUCKETS)
        for first in range(0, programs, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            mask = (other < buckets)[:, None] & (offs < programs)[None, :]
            higher += tl.load(counts_ptr + other[:, None] * programs + offs[None, :], mask=mask, other=0)
    total = tl.zeros((BUCKETS, BLOCK), tl.int32)
    for first in range(0, programs, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = mine[:, None] & (offs < programs)[None, :]
        total += tl.load(counts_ptr + number[:, None] * programs + offs[None, :], mask=mask, other=0)
    totals = tl.sum(total, axis=1)
    start = tl.sum(tl.sum(higher, axis=1), axis=0) + tl.sum(totals, axis=0) - tl.cumsum(totals, axis=0)
    for first in range(0, programs, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = mine[:, None] & (offs < programs)[None, :]
        at = number[:, None] * programs + offs[None, :]
        count = tl.load(counts_ptr + at, mask=mask, other=0)
        tl.store(offsets_ptr + at, start[:, None] + tl.cumsum(count, axis=1) - count, mask=mask)
        start += tl.sum(count, axis=1)


@triton.jit(do_not_specialize=["programs", "V"])
def place_entries_kernel(
    buckets_ptr,  # (V,) int32
    needs_ptr,  # (V,) int32
    offsets_ptr,  # (buckets, programs) int32, of spans of entries
    whole_ptr,  # (1,) int32, rows that dW needs of every entry
    entries_ptr,  # (V,) int64 out: by falling need, equal ones as they come
    positions_ptr,  # (V,) int64 out: where each entry stands there
    stops_hidden_ptr,  # (panels,) int32 out
    stops_head_ptr,  # (panels,) int32 out; or None
    programs,
    V,
    PANEL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr,  # entries of a program, of one span
    BLOCK: tl.constexpr,
):
    """Each entry counts those before it in its span that are in the same bucket."""
    start = tl.program_id(0) * BLOCK_V
    span = start // SPAN
    entry = start + tl.arange(0, BLOCK_V)
    mask = entry < V
    bucket = tl.load(buckets_ptr + entry, mask=mask, other=-1)
    rank = tl.zeros((BLOCK_V, BLOCK), tl.float32)  # whole numbers, which add up quicker than integers
    for first in range(span * SPAN, start, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other = tl.load(buckets_ptr + others, mask=others < start, other=-1)
        rank = tl.where(other[None, :] == bucket[:, None], rank + 1.0, rank)
    for first in range(0, BLOCK_V, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other = tl.load(buckets_ptr + start + others, mask=start + others < V, other=-1)
        before = (other[None, :] == bucket[:, None]) & (others[None, :] < tl.arange(0, BLOCK_V)[:, None])
        rank = tl.where(before, rank + 1.0, rank)
    place = tl.sum(rank.to(tl.int32), axis=1)
    place += tl.load(offsets_ptr + bucket * programs + span, mask=mask, other=0)
    tl.store(entries_ptr + place, entry.to(tl.int64), mask=mask)
    tl.store(positions_ptr + entry, place.to(tl.int64), mask=mask)
    need = tl.load(needs_ptr + entry, mask=mask, other=0)
    leads = mask & (place % PANEL == 0)  # of a panel, the first entry needs the most
    tl.store(stops_hidden_ptr + place // PANEL, need, mask=leads)
    if stops_head_ptr is not None:
        tl.store(stops_head_ptr + place // PANEL, tl.maximum(need, tl.load(whole_ptr)), mask=leads)


@triton.jit(do_not_specialize=["count", "V"])
def positions_kernel(
    ids_ptr,  # (count,) int64 entries
    positions_ptr,  # (V,) int64
    out_ptr,  # (count,) int64 out: where they stand; what is no entry stays as it is
    count,
    V,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    ids = tl.load(ids_ptr + offs, mask=mask, other=-1)
    inside = (ids >= 0) & (ids < V)
    at = tl.load(positions_ptr + tl.where(inside, ids, 0), mask=mask & inside, other=0)
    tl.store(out_ptr + offs, tl.where(inside, at, ids), mask=mask)


class Placed(NamedTuple):
    """The rows in the order that they are worked on."""

    rows: torch.Tensor  # (N,) int64, by kind
    count: torch.Tensor  # (1,) int32, rows with a gradient
    whole: torch.Tensor  # (1,) int32, rows that are whole in dW
    ends: torch.Tensor  # (3, 1 + blocks) int32, see staircase.count_rows


def place_rows(certificate, kinds, places, kept):
    """:class:`Placed`; kinds: written where an audit's ranking says so, see the kernel."""
    n, block, device = kinds.numel(), certificate.block, kinds.device
    blocks = certificate.flags.shape[0]
    counts = torch.empty(4, blocks, dtype=torch.int32, device=device)
    count_kinds_kernel[(blocks,)](
        kinds_ptr=kinds,
        places_ptr=places,
        kept_ptr=kept,
        counts_ptr=counts,
        N=n,
        blocks=blocks,
        BLOCK_N=block,
    )
    rows = torch.empty_like(certificate.order)
    ends = torch.empty(3, 1 + blocks, dtype=torch.int32, device=device)
    whole, count = (torch.empty(1, dtype=torch.int32, device=device) for _ in range(2))
    place_rows_kernel[(blocks,)](
        order_ptr=certificate.order,
        kinds_ptr=kinds,
        counts_ptr=counts,
        rows_ptr=rows,
        ends_ptr=ends,
        whole_ptr=whole,
        active_ptr=count,
        N=n,
        blocks=blocks,
        BLOCK_N=block,
        BLOCK=OTHERS,
    )
    return Placed(rows, count, whole, ends)


def place_entries(certificate, placed, vocab, trained):
    """-> entries (V,), where each stands there (V,), the panels' stops for dX and for dW."""
    (blocks, words), device = certificate.flags.shape, placed.rows.device
    buckets, programs, panels = 2 * blocks + 1, cdiv(words, WORDS), cdiv(vocab, tiles.WIDTH)
    needs, bucket = (torch.empty(vocab, dtype=torch.int32, device=device) for _ in range(2))
    counts, offsets = (torch.empty(buckets, programs, dtype=torch.int32, device=device) for _ in range(2))
    need_kernel[(programs,)](
        flags_ptr=certificate.flags,
        ends_ptr=placed.ends,
        needs_ptr=needs,
        buckets_ptr=bucket,
        counts_ptr=counts,
        blocks=blocks,
        words=words,
        V=vocab,
        TRAINED=trained,
        TILE=certificate.tile,
        BLOCK_W=WORDS,
        BUCKETS=BUCKETS,
        num_warps=8,
    )
    offsets_kernel[(cdiv(buckets, BUCKETS),)](
        counts_ptr=counts,
        offsets_ptr=offsets,
        buckets=buckets,
        programs=programs,
        BUCKETS=BUCKETS,
        BLOCK=64,
    )
    entries, positions = (torch.empty(vocab, dtype=torch.int64, device=device) for _ in range(2))
    stops = [torch.empty(panels, dtype=torch.int32, device=device) for _ in range(1 + trained)]
    place_entries_kernel[(cdiv(vocab, PLACED),)](
        buckets_ptr=bucket,
        needs_ptr=needs,
        offsets_ptr=offsets,
        whole_ptr=placed.whole,
        entries_ptr=entries,
        positions_ptr=positions,
        stops_hidden_ptr=stops[0],
        stops_head_ptr=stops[1] if trained else None,
        programs=programs,
        V=vocab,
        PANEL=tiles.WIDTH,
        SPAN=SPAN,
        BLOCK_V=PLACED,
        BLOCK=32 * PLACERS,
        num_warps=PLACERS,
    )
    return entries, positions, stops[0], stops[-1]


def positions_of(ids, positions):
    """Where entries stand, in the shape of ids; what is no entry stays as it is."""
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    positions_kernel[(cdiv(max(ids.numel(), 1), tiles.ROW_BLOCK),)](
        ids_ptr=ids,
        positions_ptr=positions,
        out_ptr=out,
        count=ids.numel(),
        V=positions.numel(),
        BLOCK=tiles.ROW_BLOCK,
    )
    return out
