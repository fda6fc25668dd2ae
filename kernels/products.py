"""The GEMMs of a gradient, and the rows they read and write: kernels that know of no logits.

They are our own because how many rows need an entry is known on the device only: cuBLAS would need the host to wait
for it. dlogits stand in panels, see :func:`fastgrpo.kernels.common.chunk_panels`; rows are read from dense copies,
entries in place or, where descriptors want them in another order, from a copy of the chunk's. No atomics; every sum has
a fixed order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastgrpo.kernels import grids, tiles
from fastgrpo.kernels.arguments import TO_TRITON
from fastgrpo.kernels.common import chunk_panels, entry_ids
from fastgrpo.kernels.copies import copy_tile
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.tiles import cdiv


@triton.jit
def panels_needed(stops_ptr, first, last, row):
    """The panel after the last of a chunk's that ``row`` needs; stops do not rise."""
    needed = first
    for at in range(first, last, 128):
        offs = at + tl.arange(0, 128)
        stops = tl.load(stops_ptr + offs, mask=offs < last, other=0)
        needed += tl.sum((stops > row).to(tl.int32), axis=0)
    return needed


@triton.jit
def sum_panels(sums_ptr, count, height, offs_n, mask_n, BLOCK_N: tl.constexpr):
    """(BLOCK_N,) sum of some rows of dlogits, from those of its tiles (tiles, height)."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, count, 16):
        tile = first + tl.arange(0, 16)
        at = sums_ptr + tile[:, None] * height + offs_n[None, :]
        total += tl.sum(tl.load(at, mask=(tile < count)[:, None] & mask_n[None, :], other=0.0), axis=0)
    return total


@triton.jit
def sum_so_far(total_ptrs, mask, decay_ptr, at, mask_n, chunk):
    """decay * sum, 0 in the first chunk."""
    total = tl.load(total_ptrs, mask=mask & (chunk > 0), other=0.0)
    if decay_ptr is not None:
        total *= tl.load(decay_ptr + at, mask=mask_n, other=0.0)[:, None]
    return total


# The first rows need the most entries, and in the narrow chunks none but them: they alone give too few programs. So the
# entries of the first block of rows are split up to so many ways, of the second half as many, of the third and the
# fourth a quarter ... What split k > 0 adds up stands in a slab of rows behind the sum; the slabs of splits 2^l ..
# 2^(l + 1) - 1 have as many rows together as that of split 1. Where all rows need all entries, and are few, those of
# every block are split evenly, with a sum of all rows for each split.
MOST_WAYS, LEVELS, MOST_EVENLY = 16, tl.constexpr(4), 32
SLABS_SHARE = 0.2  # of the workspace at most


class Split(NamedTuple):
    """Of a sum of rows, whose entries are split."""

    ways: int = 1  # of the first block of rows, see above; 0: of every block evenly
    block: int = 1  # rows that are split together
    rows: int = 0  # of its slabs
    evenly: int = 1  # ways of every block then


NOT_SPLIT = Split()


def ways_for(tile, depth, programs):
    """How often the first block of rows is split, a power of two: ``programs`` run at once; 1: nothing is split."""
    each = cdiv(depth, tile.cols)
    return max(w for w in (1, 2, 4, 8, MOST_WAYS) if w == 1 or w * each <= programs)


def split_for(tile, depth, device, workspace):
    """:class:`Split` of a staircase's sum of rows, whose slabs may be a small part of the workspace."""
    ways = ways_for(tile, depth, grids.processor_count(device))
    rows = slab_rows(ways, tile)
    return Split(ways, tile.rows, rows) if 4 * rows * depth <= SLABS_SHARE * workspace else NOT_SPLIT


def even_split(tile, n, depth, device, workspace):
    """:class:`Split` of a sum of n rows, all of which need all entries."""
    programs = cdiv(n, tile.rows) * cdiv(depth, tile.cols)
    most = 1 + int(SLABS_SHARE * workspace) // (4 * n * depth)
    ways = grids.even_ways(programs, min(most, MOST_EVENLY), grids.slots(tile, device))
    return Split(0, rows=(ways - 1) * n, evenly=ways)


def slab_rows(ways, tile):
    """Rows behind the sum that hold what is split."""
    return ways // 2 * (ways.bit_length() - 1) * tile.rows


def split_blocks(ways):
    """-> blocks of rows that are split, and blocks of programs they take."""
    return (ways // 2, ways // 2 * ways.bit_length()) if ways > 1 else (0, 0)


@triton.jit
def own_split(number, unsplit, WAYS: tl.constexpr):
    """-> block of rows, split, how many there are, of the ``number``-th block of programs; the longest come first."""
    block, split, splits = number + WAYS // 2, 0, 1
    first, count, blocks = unsplit, WAYS, 0
    for level in tl.static_range(LEVELS):
        if WAYS >> level > 1:
            inside = (number >= first) & (number < first + count)
            split = tl.where(inside, (number - first) % (WAYS >> level), split)
            splits = tl.where(inside, WAYS >> level, splits)
            block = tl.where(inside, blocks + (number - first) // (WAYS >> level), block)
            first += count
            count, blocks = WAYS // 2, 1 << level
    return block, split, splits


@triton.jit
def slab_begin(split, WAYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the rows of split > 0 begin behind the sum."""
    block = 0
    for level in tl.static_range(LEVELS):
        here = level * (WAYS // 2) + (split - (1 << level)) * (WAYS >> (level + 1))
        block = tl.where(split >> level > 0, here, block)
    return block * BLOCK_N


@triton.jit
def held_behind(split, held, WAYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How far behind the sum of the first split that of this one stands, in rows."""
    behind = 0
    if WAYS > 1:
        behind = tl.where(split > 0, held + slab_begin(split, WAYS, BLOCK_N), 0)
    if WAYS == 0:
        behind = split * held
    return behind


@triton.jit
def panels_times_entries(
    dlogits_ptr,
    entries_ptr,
    ids_ptr,
    at_dz,  # row of the panels, as they lie behind each other
    height,
    first_v,
    length,  # entries
    offs_d,  # (BLOCK_D,)
    V,
    D,
    stride_v,
    stride_d,
    COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(BLOCK_N, BLOCK_D) fp32 of :func:`dhidden_kernel`, by pointers."""
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    offs_v = tl.arange(0, BLOCK_V)
    dz_ptrs = dlogits_ptr + tl.cast(at_dz, tl.int64) * PANEL
    dz_ptrs = dz_ptrs + tl.arange(0, BLOCK_N)[:, None] * PANEL + offs_v[None, :]
    to_next_panel = (tl.cast(height, tl.int64) - 1) * PANEL
    w_ptrs = entries_ptr + offs_d[None, :] * tl.cast(stride_d, tl.int64)
    if ids_ptr is None:
        w_ptrs = w_ptrs + (first_v + offs_v).to(tl.int64)[:, None] * stride_v
    for v in range(0, length, BLOCK_V):
        dz = tl.load(dz_ptrs)
        mask_w = (v + offs_v < length)[:, None] & (offs_d < D)[None, :]
        if ids_ptr is not None:
            ids = entry_ids(ids_ptr, first_v + v, offs_v, V)
            w = tl.load(w_ptrs + ids[:, None] * stride_v, mask=mask_w, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=mask_w, other=0.0)
            w_ptrs += BLOCK_V * tl.cast(stride_v, tl.int64)
        acc = tl.dot(dz, w.to(COMPUTE), acc, input_precision="ieee")
        step = tl.where((v + BLOCK_V) % PANEL == 0, to_next_panel, 0) + BLOCK_V
        dz_ptrs += tl.multiple_of(step, 16)
    return acc


@triton.jit(
    do_not_specialize=[
        "first_row", "last_row", "first_held", "chunk", "V", "held", "unsplit", "evenly", "copied_rows",
    ]
)  # fmt: skip
def dhidden_kernel(
    dlogits_ptr,  # panels of the chunk
    dlogits_desc,  # of them as (rows, PANEL), and
    w_desc,  # of the entries, or with ids of the chunk's ones; None: by pointers
    entries_ptr,  # (V, D)
    ids_ptr,  # (V,) the entry at each position; None: in their order
    cuts_ptr,  # (chunks + 1,)
    head_stops_ptr,  # (panels,) rows that panels hold
    stops_ptr,  # (panels,) rows that need them here
    count_ptr,  # (1,)
    rows_ptr,  # (N,) where in sum each row stands; None: in their order
    decay_ptr,  # (N,) fp32, in the rows' order, factor of the sum so far; None: 1
    sums_ptr,  # (tiles, rows of a panel) fp32 sums of the rows of dlogits tiles; or None
    mean_ptr,  # (D,) fp32 mean of the entries, in whose direction goes what a row's dlogits lack of a sum of 0
    sum_ptr,  # (held, D) fp32, the chunks before; nothing in the first
    held,  # rows of the sum before its slabs
    unsplit,  # blocks of rows whose entries are not split
    evenly,  # see Split
    copied_rows,  # that w_desc reads, with ids: the chunk's are the last ones
    first_row,
    last_row,
    first_held,
    chunk,
    V,
    D,
    stride_v,
    stride_d,
    COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    SUMS_A_PANEL: tl.constexpr,
    WAYS: tl.constexpr,  # see Split
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sum = decay * sum + dlogits @ entries of the chunk."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    number, split, splits = tl.program_id(0), 0, 1
    if WAYS == 0:
        number, split, splits = number // evenly, number % evenly, evenly
    block = number // tiles_d
    first_d = number % tiles_d * BLOCK_D
    if WAYS > 1:
        block, split, splits = own_split(block, unsplit, WAYS)
    first, last, height = chunk_panels(cuts_ptr, head_stops_ptr, chunk, first_row, last_row, PANEL)
    if (first == last) & (chunk > 0):  # of most chunks nothing is left: soon seen
        return
    stop = tl.minimum(tl.load(count_ptr), last_row)
    start = first_row + block * BLOCK_N
    if start >= stop:
        return
    needed = panels_needed(stops_ptr, first, last, start)
    if (needed == first) & (chunk > 0):
        return
    local = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = first_row + local < stop
    offs_d = first_d + tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    if rows_ptr is not None:
        place = tl.load(rows_ptr + first_row + local, mask=mask_n, other=0)
        total_ptrs = sum_ptr + place[:, None] * D + offs_d[None, :]
    else:
        row = start - first_held + held_behind(split, held, WAYS, BLOCK_N)
        total_ptrs = sum_ptr + tl.cast(row, tl.int64) * D
        total_ptrs = total_ptrs + tl.arange(0, BLOCK_N)[:, None] * D + offs_d[None, :]
    lacked = needed - first  # panels whose rows' sums are put back
    at_dz = block * BLOCK_N
    if WAYS != 1:
        begin = lacked * split // splits
        needed = lacked * (split + 1) // splits + first
        first = first + begin
        at_dz += begin * height
        lacked = tl.where(split == 0, lacked, 0)
    first_v = first * PANEL
    length = tl.minimum(needed * PANEL, V) - first_v
    if w_desc is not None:  # the sum so far is read first: beside a wide tile there is no room for it
        acc = sum_so_far(total_ptrs, mask, decay_ptr, first_row + local, mask_n, chunk)
        first_w = first_v if ids_ptr is None else copied_rows - (last - first) * PANEL
        for v in range(0, length, BLOCK_V):
            dz = dlogits_desc.load([v // PANEL * height + at_dz, v % PANEL])
            w = w_desc.load([first_w + v, first_d])
            acc = tl.dot(dz, w, acc)
    else:
        acc = panels_times_entries(
            dlogits_ptr, entries_ptr, ids_ptr, at_dz, height, first_v, length, offs_d, V, D, stride_v, stride_d,
            COMPUTE, PANEL, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        acc += sum_so_far(total_ptrs, mask, decay_ptr, first_row + local, mask_n, chunk)
    if mean_ptr is not None:
        lacking = sum_panels(sums_ptr, lacked * SUMS_A_PANEL, height, local, mask_n, BLOCK_N)
        acc -= lacking[:, None] * tl.load(mean_ptr + offs_d, mask=offs_d < D, other=0.0)[None, :]
    tl.store(total_ptrs, acc, mask=mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "held", "evenly", "scale_step"])
def scatter_kernel(
    sum_ptr,  # (held, D) fp32
    held,  # rows of it before its slabs
    rows_ptr,  # (N,) a permutation
    count_ptr,  # (1,)
    scale_ptr,  # (1,) of all rows, or (N,) by position
    scale_step,  # 0 or 1
    out_ptr,  # (N, D) out
    first_row,
    last_row,
    first_held,
    D,
    evenly,  # of the product's Split, and
    WAYS: tl.constexpr,
    SLAB_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[rows] = sum / scale, 0 for rows without a gradient."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    offs_n = first_row + tl.program_id(0) // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < last_row, offs_d < D
    has_gradient = offs_n < tl.minimum(tl.load(count_ptr), last_row)
    sum_ptrs = sum_ptr + (offs_n - first_held).to(tl.int64)[:, None] * D + offs_d[None, :]
    total = tl.load(sum_ptrs, mask=has_gradient[:, None] & mask_d[None, :], other=0.0)
    for split in tl.static_range(1, WAYS):
        rows = 0
        for level in tl.static_range(LEVELS):
            if split >> level == 1:
                rows = (WAYS >> (level + 1)) * SLAB_BLOCK
        at = held + slab_begin(split, WAYS, SLAB_BLOCK) + offs_n
        mask = (has_gradient & (offs_n < rows))[:, None] & mask_d[None, :]
        total += tl.load(sum_ptr + at.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    if WAYS == 0:
        for _ in range(1, evenly):
            sum_ptrs += tl.cast(held, tl.int64) * D
            total += tl.load(sum_ptrs, mask=has_gradient[:, None] & mask_d[None, :], other=0.0)
    total = total / tl.load(scale_ptr + offs_n * scale_step, mask=has_gradient, other=1.0)[:, None]
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    out = out_ptr + rows[:, None] * D + offs_d[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "final", "chunk", "V"])
def dweight_kernel(
    dlogits_ptr,  # panels of the chunk
    dlogits_desc,  # of them as (rows, PANEL), and
    x_desc,  # of the rows; None: by pointers
    x_ptr,  # (held, D) rows gathered
    ids_ptr,  # (V,) the entry at each position; None: in their order
    cuts_ptr,  # (chunks + 1,)
    stops_ptr,  # (panels,) rows that need them
    scale_ptr,  # (1,)
    sum_ptr,  # (entries of a chunk, D) fp32, the rows before first_row; None when one chunk does it all
    dweight_ptr,  # (V, D) out, written with the last chunk of rows
    first_row,
    last_row,
    first_held,
    final,  # whether this is the last chunk of rows
    chunk,
    V,
    D,
    COMPUTE: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight of the chunk's entries += dlogits.T @ x."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    local = tl.program_id(0) // tiles_d * BLOCK_V
    first_d = tl.program_id(0) % tiles_d * BLOCK_D
    first, last, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    panel = local // PANEL
    if first + panel >= last:
        return
    length = tl.minimum(tl.load(stops_ptr + first + panel), last_row) - first_row
    at_x = first_row - first_held
    offs_d = first_d + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    mask = (first * PANEL + local + offs_v < V)[:, None] & (offs_d < D)[None, :]
    if sum_ptr is not None:
        sum_ptrs = sum_ptr + tl.cast(local, tl.int64) * D + offs_v[:, None] * D + offs_d[None, :]
        acc = tl.load(sum_ptrs, mask=mask & (first_row > 0), other=0.0)
    else:
        acc = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    if x_desc is not None:
        for n in range(0, length, BLOCK_N):
            dz = dlogits_desc.load([panel * height + n, local % PANEL])
            x = x_desc.load([at_x + n, first_d])
            acc = tl.dot(dz.T, x, acc)
    else:
        offs_n = tl.arange(0, BLOCK_N)
        dz_ptrs = dlogits_ptr + panel * tl.cast(height, tl.int64) * PANEL
        dz_ptrs = dz_ptrs + tl.multiple_of(local % PANEL, BLOCK_V)
        dz_ptrs = dz_ptrs + tl.arange(0, BLOCK_V)[:, None] + offs_n[None, :] * PANEL
        x_ptrs = x_ptr + (at_x + offs_n).to(tl.int64)[:, None] * D + offs_d[None, :]
        for n in range(0, length, BLOCK_N):
            mask_n = n + offs_n < length
            x = tl.load(x_ptrs, mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)
            dz = tl.load(dz_ptrs, mask=mask_n[None, :], other=0.0)
            acc = tl.dot(dz, x.to(COMPUTE), acc, input_precision="ieee")
            dz_ptrs += BLOCK_N * PANEL
            x_ptrs += BLOCK_N * tl.cast(D, tl.int64)
    if sum_ptr is not None:  # noqa: SIM102
        if final == 0:
            sum_ptrs = sum_ptr + tl.cast(local, tl.int64) * D + offs_v[:, None] * D + offs_d[None, :]
            tl.store(sum_ptrs, acc, mask=mask)
            return
    acc = acc / tl.load(scale_ptr)
    if ids_ptr is not None:
        out = dweight_ptr + entry_ids(ids_ptr, first * PANEL + local, offs_v, V)[:, None] * D + offs_d[None, :]
    else:
        out = dweight_ptr + tl.cast(first * PANEL + local, tl.int64) * D + offs_v[:, None] * D + offs_d[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "last_row", "chunk", "V"])
def dbias_kernel(
    dlogits_ptr,  # panels of the chunk
    ids_ptr,  # (V,) the entry at each position; None: in their order
    cuts_ptr,  # (chunks + 1,)
    stops_ptr,  # (panels,) rows that need them
    scale_ptr,  # (1,)
    dbias_ptr,  # (V,) fp32, added to
    first_row,
    last_row,
    chunk,
    V,
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    local = tl.program_id(0) * BLOCK_V
    first, last, height = chunk_panels(cuts_ptr, stops_ptr, chunk, first_row, last_row, PANEL)
    panel = local // PANEL
    if first + panel >= last:
        return
    length = tl.minimum(tl.load(stops_ptr + first + panel), last_row) - first_row
    offs_n, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    dz_ptrs = dlogits_ptr + panel * tl.cast(height, tl.int64) * PANEL + local % PANEL + offs_v[None, :]
    acc = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for n in range(0, length, BLOCK_N):
        at = dz_ptrs + (n + offs_n)[:, None] * PANEL
        acc += tl.sum(tl.load(at, mask=(n + offs_n < length)[:, None], other=0.0).to(tl.float32), axis=0)
    mask_v = first * PANEL + local + offs_v < V
    out = dbias_ptr + entry_ids(ids_ptr, first * PANEL + local, offs_v, V)
    total = tl.load(out, mask=mask_v, other=0.0) + acc / tl.load(scale_ptr)
    tl.store(out, total, mask=mask_v)


class Product:
    """total = decay * total + dlogits @ entries, a chunk a call: see :func:`dhidden_kernel`.

    Args:
        panels: :class:`fastgrpo.kernels.panels.Panels`.
        split: :class:`Split` of total, at whose end the slabs stand.
    """

    def __init__(self, panels, entries, total, count, rows=None, decay=None, mean=None, split=NOT_SPLIT):
        depth, dlogits, self.most = entries.shape[1], panels.dlogits, panels.rows
        self.tile, dlogits_desc, w_desc = panels.product_tile(entries)
        self.across, (self.split, self.parts) = cdiv(depth, self.tile.cols) * split.evenly, split_blocks(split.ways)
        self.launch = Launch(
            dhidden_kernel,
            dlogits_ptr=dlogits,
            dlogits_desc=dlogits_desc,
            w_desc=w_desc,
            entries_ptr=entries,
            ids_ptr=panels.ids,
            cuts_ptr=panels.cuts,
            head_stops_ptr=panels.stops,
            stops_ptr=panels.stops_hidden,
            count_ptr=count,
            rows_ptr=rows,
            decay_ptr=decay,
            sums_ptr=None if mean is None else panels.sums,
            mean_ptr=mean,
            sum_ptr=total,
            held=len(total) - split.rows,
            copied_rows=panels.copied_rows,
            V=panels.vocab,
            D=depth,
            stride_v=entries.stride(0),
            stride_d=entries.stride(1),
            COMPUTE=TO_TRITON[str(dlogits.dtype)],
            PANEL=tiles.WIDTH,
            SUMS_A_PANEL=panels.sums_a_panel,
            evenly=split.evenly,
            WAYS=split.ways,
            BLOCK_N=self.tile.rows,
            BLOCK_D=self.tile.cols,
            BLOCK_V=self.tile.depth,
            **self.tile.options,
        )

    def __call__(self, first_row, last_row, chunk, first_held=0):
        unsplit = max(cdiv(min(last_row - first_row, self.most), self.tile.rows) - self.split, 0)
        self.launch(
            (unsplit + self.parts) * self.across,
            unsplit=unsplit,
            first_row=first_row,
            last_row=last_row,
            first_held=first_held,
            chunk=chunk,
        )


def scatter(total, split, rows, count, scale, out, first_row, last_row, first_held):
    """out[rows] = total / scale, see :func:`scatter_kernel`; total: with the slabs of a :class:`Split` behind it.

    Args:
        scale: 0-dim or (1,), or of each position its own (N,).
    """
    depth, tile = total.shape[1], copy_tile(total.shape[1])
    scatter_kernel[(cdiv(last_row - first_row, tile.rows) * cdiv(depth, tile.cols),)](
        sum_ptr=total,
        held=len(total) - split.rows,
        rows_ptr=rows,
        count_ptr=count,
        scale_ptr=scale,
        scale_step=int(scale.numel() > 1),
        out_ptr=out,
        first_row=first_row,
        last_row=last_row,
        first_held=first_held,
        D=depth,
        WAYS=split.ways,
        SLAB_BLOCK=split.block,
        evenly=split.evenly,
        BLOCK_N=tile.rows,
        BLOCK_D=tile.cols,
        num_warps=tile.warps,
    )


def spans(total, size):
    """[(first, last)] of the chunks of 0 .. total."""
    return [(first, min(first + size, total)) for first in range(0, total, size)]
