"""Dense copies of the rows and entries that the GEMMs read, in the order in which they are worked on."""

import functools

import triton
import triton.language as tl

from fastgrpo.kernels import grids, tiles
from fastgrpo.kernels.arguments import row_strides
from fastgrpo.kernels.common import row_offsets
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.tiles import cdiv

PROGRAMS = 8  # a processor, that go through all tiles


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "T", "chunk"])
def gather_kernel(
    source_ptr,  # (B, T, D); with T None (T, D)
    rows_ptr,  # (N,) rows in the order they are worked on
    count_ptr,  # (1,) how many of them count; None: all
    cuts_ptr,  # (chunks + 1,) panels: the rows of chunk ``chunk``, not those from first_row on; or None
    out_ptr,  # (held, D) out, its rows
    out_stride,  # so far apart
    first_row,
    last_row,
    first_held,  # the row that out's first one holds; with cuts the rows of out, whose last ones are written
    chunk,
    D,
    T,
    strides,  # RowStrides of the source
    PANEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = source[rows], 0 for those that do not count; a program takes every so many-th tile."""
    stop = last_row
    if cuts_ptr is not None:
        first_row = tl.load(cuts_ptr + chunk) * PANEL
        stop = tl.load(cuts_ptr + chunk + 1) * PANEL  # a panel's last rows may lie beyond last_row: they are 0
        first_held = stop - first_held
    last = tl.minimum(stop, last_row)
    if count_ptr is not None:
        last = tl.minimum(last, tl.load(count_ptr))
    tiles_d = tl.cdiv(D, BLOCK_D)
    for tile in range(tl.program_id(0), tl.cdiv(stop - first_row, BLOCK_N) * tiles_d, tl.num_programs(0)):
        offs_n = first_row + tile // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_d = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_n, mask_d = offs_n < last, (offs_d < D)[None, :]
        rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
        if T is None:
            pointers = source_ptr + (rows * strides.t)[:, None]
        else:
            pointers = source_ptr + row_offsets(rows, T, strides)[:, None]
        pointers += offs_d[None, :] * tl.cast(strides.d, tl.int64)
        x = tl.load(pointers, mask=mask_n[:, None] & mask_d, other=0.0)
        out = out_ptr + (offs_n - first_held).to(tl.int64)[:, None] * out_stride + offs_d[None, :]
        tl.store(out, x, mask=(offs_n < stop)[:, None] & mask_d)


def gather_rows(source, rows, count, out, first_row, last_row, first_held):
    """Rows ``rows[first_row:last_row]`` of a (B, T, D) source into out, whose first is ``first_held``."""
    gatherer(source, rows, count, out, None, last_row - first_row, first_row, last_row, first_held)(chunk=0)


def entries_gatherer(entries, ids, out, cuts, most):
    """-> launch(chunk=): a chunk's entries (V, D), ``most`` at most, to the end of out, in the order of ids."""
    return gatherer(entries[None], ids, None, out, cuts, most, 0, ids.numel(), out.shape[0])


def gatherer(source, rows, count, out, cuts, most, first_row, last_row, first_held):
    depth, by_cuts = source.shape[2], cuts is not None
    tile = copy_tile(depth)
    launch = Launch(
        gather_kernel,
        source_ptr=source,
        rows_ptr=rows,
        count_ptr=count,
        cuts_ptr=cuts,
        out_ptr=out,
        out_stride=out.stride(0),
        first_row=first_row,
        last_row=last_row,
        first_held=first_held,
        D=depth,
        T=None if by_cuts else source.shape[1],
        strides=row_strides(source),
        PANEL=tiles.WIDTH,
        BLOCK_N=tile.rows,
        BLOCK_D=tile.cols,
        num_warps=tile.warps,
    )
    at_once = PROGRAMS * grids.processor_count(source.device)  # what a chunk has is often a tenth of ``most``
    return functools.partial(launch, min(cdiv(most, tile.rows) * cdiv(depth, tile.cols), at_once))


def copy_tile(depth):
    """Of the kernels that only move rows: narrow ones for a narrow factor."""
    return tiles.COPY._replace(cols=min(tiles.COPY.cols, triton.next_power_of_2(depth)))
