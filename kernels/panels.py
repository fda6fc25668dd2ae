"""Where dlogits, or a frozen head's masses, stand between the kernel that makes them and the GEMMs that read them."""

import torch
import triton
import triton.language as tl

from fastgrpo.backends import staircase
from fastgrpo.kernels import tiles
from fastgrpo.kernels.arguments import describable, describe, is_same
from fastgrpo.kernels.copies import entries_gatherer
from fastgrpo.kernels.tiles import cdiv

assert staircase.TILE == tiles.WIDTH  # stops are read by panel
SHARE = 0.3  # of the workspace for what a chunk's entries take beside their panels
FEWEST = 8  # panels of a chunk, where the rows can be cut instead


@triton.jit
def whole_waves(units, each, at_once):
    """How many of ``units``, of ``each`` programs, to launch together: as many waves as are full, where that makes more
    than a tenth of difference to how full they are."""
    waves = units * each // at_once
    whole = waves * at_once // each
    return whole if 10 * units * waves < 9 * whole * (waves + 1) else units


@triton.jit(do_not_specialize=["chunks", "panels", "room", "most", "rows", "copied", "each", "at_once"])
def cut_kernel(
    stops_ptr,  # (panels,) leading rows that each panel's entries need, not rising
    cuts_ptr,  # (chunks + 1,) out: the first panel of each chunk
    chunks,
    panels,
    room,  # rows of panels that the buffer holds
    most,  # panels of a chunk at most
    rows,  # of a panel at most
    copied,  # rows that the copy of a panel's entries takes
    each,  # programs that a panel gives the product over rows
    at_once,
    PANEL: tl.constexpr,
):
    """As many panels a chunk as fit, by the rows that its first one needs, in whole waves of programs; chunks that are
    left over are empty."""
    at = 0
    tl.store(cuts_ptr, at)
    for chunk in range(chunks):
        stop = tl.load(stops_ptr + at, mask=at < panels, other=1)
        height = tl.cdiv(tl.maximum(tl.minimum(stop, rows), 1), PANEL) * PANEL
        fit = tl.maximum(tl.minimum(room // (height + copied), most), 1)
        at += panels - at if fit >= panels - at else whole_waves(fit, each, at_once)
        tl.store(cuts_ptr + chunk + 1, at)


class Cut:
    """How much fits the workspace: host numbers only.

    Attributes:
        rows: of a panel at most. room: rows of panels that the buffer holds, or of them and of the copies of their
            entries. most: panels of a chunk at most. copied: rows of it that such a copy takes, 0 where there is none.
        chunks: of entries, where every panel needs all rows; fewer otherwise. each, at_once: of whole_waves.
    """

    def __init__(self, n, vocab, workspace, cell, per_row, copied, per_entry_in_rows, each=1, at_once=1):
        """Bytes of a cell of a panel, of a row beside it; rows of panels that a copy of a panel's entries takes; bytes
        of an entry more, with rows cut; programs that a panel gives the product over rows, how many run at once."""
        width, self.panels, self.copied = tiles.WIDTH, cdiv(vocab, tiles.WIDTH), copied
        self.rows = cdiv(n, width) * width
        while True:
            spare = workspace - self.rows * per_row
            per_panel = width * per_entry_in_rows if self.rows < n else 0
            self.most = min(max(int(SHARE * spare) // per_panel, 1), self.panels) if per_panel else self.panels
            self.room = int((spare - self.most * per_panel) // (width * cell)) // width * width
            least = min(FEWEST, self.panels)
            if (self.room >= (self.rows + copied) * least and self.most >= least) or self.rows <= width:
                break
            self.rows = cdiv(self.rows // 2, width) * width
        self.room = min(max(self.room, self.rows + copied), (self.rows + copied) * self.panels)
        self.most = min(self.most, self.room // (width + copied))
        self.each, self.at_once = each, at_once
        fit = max(min(self.room // (self.rows + copied), self.most), 1)
        self.chunks = 1 if fit >= self.panels else cdiv(self.panels, whole_waves.fn(fit, each, at_once))


class Panels:
    """The buffer of one backward, and its chunks of entries, which the device cuts by how many rows need them.

    Attributes:
        dlogits: (room, WIDTH). cuts: (chunks + 1,) int32. stops, stops_hidden: (panels,) int32 leading rows that the
            entries need, for anything and for their product with the entries. ids: (V,) the entry at each position, or
            None. sums: fp32 of the rows of dlogits tiles, or None. copies: [(head, copies of its entries)].
    """

    def __init__(self, cut, vocab, dtype, device, stops, stops_hidden=None, ids=None, cuts=None):
        self.rows, self.chunks, self.most, self.vocab, self.ids = cut.rows, cut.chunks, cut.most, vocab, ids
        self.stops, self.stops_hidden = stops, stops if stops_hidden is None else stops_hidden
        rows = cut.room + cdiv(cut.copied, tiles.WIDTH)  # copies begin at whole entries
        self.dlogits = torch.empty(rows, tiles.WIDTH, dtype=dtype, device=device)
        self.sums, self.sums_a_panel, self.copies, self.gathers = None, 1, [], []
        self.copied_rows = 0  # of copies; a chunk's are the last ones
        self.cuts = torch.empty(cut.chunks + 1, dtype=torch.int32, device=device) if cuts is None else cuts
        if cuts is None:
            cut_kernel[(1,)](
                stops_ptr=stops,
                cuts_ptr=self.cuts,
                chunks=cut.chunks,
                panels=cut.panels,
                room=cut.room,
                most=cut.most,
                rows=cut.rows,
                copied=cut.copied,
                each=cut.each,
                at_once=cut.at_once,
                PANEL=tiles.WIDTH,
                num_warps=1,
            )

    def sum_rows(self, tile):
        """Have the sums of dlogits' rows kept, those of tiles of so many columns."""
        self.sums_a_panel = tiles.WIDTH // tile.cols
        count = self.dlogits.shape[0] * self.sums_a_panel
        self.sums = torch.empty(count, dtype=torch.float32, device=self.dlogits.device)

    def copy_entries(self, heads):
        """Have the entries of each chunk copied in the order of ids: tensor descriptors read no scattered rows.

        The copies stand at the end of the buffer, those of several heads side by side, so that a chunk may be of many
        entries or of many rows.
        """
        widths, values = [head.shape[1] for head in heads], self.dlogits.view(-1)
        self.copied_rows = values.numel() // sum(widths)
        copies = values[: self.copied_rows * sum(widths)].view(self.copied_rows, -1).split(widths, 1)
        self.copies = list(zip(heads, copies))
        most = self.most * tiles.WIDTH
        self.gathers = [entries_gatherer(head, self.ids, copy, self.cuts, most) for head, copy in self.copies]

    def copy_chunk(self, chunk):
        for gather in self.gathers:
            gather(chunk=chunk)

    def described(self, entries):
        """What may be read in place of these entries, in the order of ids; None: nothing."""
        if self.ids is None:
            return entries
        return next((copy for head, copy in self.copies if is_same(head, entries)), None)

    def product_tile(self, entries):
        """-> Tile of dlogits times entries, descriptors of both or None."""
        source, dtype, device = self.described(entries), self.dlogits.dtype, self.dlogits.device
        if source is None or not describable("dhidden", device, dtype, source):
            return tiles.for_tensor("dhidden", dtype, device), None, None
        tile = tiles.for_tensor("dhidden", dtype, device, described=True)
        return tile, describe(self.dlogits, tile.rows, tile.depth), describe(source, tile.depth, tile.cols)
