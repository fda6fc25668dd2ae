"""Dense copies of the rows and entries that the GEMMs read, in the order in which they are worked on."""

import functools

import triton
import triton.language as tl

from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import row_strides
from fastgrpo.kernels.common import row_offsets
from fastgrpo.kernels.launches import Launch
from fastgrpo.kernels.tiles import cdiv


@triton.jit(do_not_specialize=["first_row", "last_row", "first_held", "T", "chunk"])
def gather_kernel(
    source_ptr,  # (B, T, D)
    rows_ptr,  # (N,) rows in the order they are worked on
    count_ptr,  # (1,) how many of them count; None: all
    cuts_ptr,  # (chunks + 1,) panels: the rows of chunk ``chunk``, not those from first_row on; or None
    out_ptr,  # (held, D) out
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
    """out = source[rows], 0 for those that do not count."""
    stop = last_row
    if cuts_ptr is not None:
        first_row = tl.load(cuts_ptr + chunk) * PANEL
        stop = tl.load(cuts_ptr + chunk + 1) * PANEL  # a panel's last rows may lie beyond last_row: they are 0
        first_held = stop - first_held
    tiles_d = tl.cdiv(D, BLOCK_D)
    offs_n = first_row + tl.program_id(0) // tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (offs_n < stop)[:, None] & (offs_d < D)[None, :]
    mask_n = offs_n < tl.minimum(stop, last_row)
    if count_ptr is not None:
        mask_n &= offs_n < tl.load(count_ptr)
    rows = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    pointers = source_ptr + row_offsets(rows, T, strides)[:, None]
    x = tl.load(pointers + offs_d[None, :] * tl.cast(strides.d, tl.int64), mask=inside & mask_n[:, None], other=0.0)
    tl.store(out_ptr + (offs_n - first_held).to(tl.int64)[:, None] * D + offs_d[None, :], x, mask=inside)


def gather_rows(source, rows, count, out, first_row, last_row, first_held):
    """Rows ``rows[first_row:last_row]`` of a (B, T, D) source into out, whose first is ``first_held``."""
    gatherer(source, rows, count, out, None, last_row - first_row, first_row, last_row, first_held)(chunk=0)


def entries_gatherer(entries, ids, out, cuts, most):
    """-> launch(chunk=): a chunk's entries (V, D), ``most`` at most, to the end of out, in the order of ids."""
    return gatherer(entries[None], ids, None, out, cuts, most, 0, ids.numel(), out.shape[0])


def gatherer(source, rows, count, out, cuts, most, first_row, last_row, first_held):
    depth, tile = source.shape[2], copy_tile(source.shape[2])
    launch = Launch(
        gather_kernel,
        source_ptr=source,
        rows_ptr=rows,
        count_ptr=count,
        cuts_ptr=cuts,
        out_ptr=out,
        first_row=first_row,
        last_row=last_row,
        first_held=first_held,
        D=depth,
        T=source.shape[1],
        strides=row_strides(source),
        PANEL=tiles.WIDTH,
        BLOCK_N=tile.rows,
        BLOCK_D=tile.cols,
        num_warps=tile.warps,
    )
    return functools.partial(launch, cdiv(most, tile.rows) * cdiv(depth, tile.cols))


def copy_tile(depth):
    """Of the kernels that only move rows: narrow ones for a narrow factor."""
    return tiles.COPY._replace(cols=min(tiles.COPY.cols, triton.next_power_of_2(depth)))
