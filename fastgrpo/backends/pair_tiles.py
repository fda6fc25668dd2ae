"""Tiles of two models' logits beside each other, and memory for what is made of them."""

import torch

from fastgrpo.backends.logits import LogitTiles, Reader, RowSource, row_inverse_temperature, transform


def pair_tiles(problem, rows, with_slope=False, multiple=1):
    """The student's :class:`fastgrpo.backends.logits.Tile` of transformed logits and the teacher's beside it.

    Args:
        with_slope: whether the student's softcap's comes too. multiple: of how many rows tiles begin.
    """
    capped = with_slope and problem.params.softcap is not None
    tiles = LogitTiles(problem, rows, problem.tiles_alive + capped + 2, with_slope=capped, multiple=multiple)
    teacher = Teacher(problem, rows, hold=tiles.source.held > 0)
    for tile in tiles:
        tile.z = tile.z[: tile.rows.numel()]
        yield tile, teacher.logits(tile.part, tile.chunk.span)


class Teacher:
    """The teacher's transformed logits of some rows.

    Args:
        rows: (n,); the parts of them are slices. hold: whether they may be held as operands; None: if a quarter of the
            workspace holds them.
    """

    def __init__(self, problem, rows, hold=None):
        self.problem, self.rows = problem.teacher, rows
        self.reader = Reader(problem.teacher)
        self.source = RowSource(self.reader, rows, hold)
        self.span, self.entries, self.buffer = None, None, None

    def logits(self, part, entries):
        """(n, C), overwritten by the next.

        Args:
            entries: a slice of the vocabulary, read once for rows that follow each other, or (C,) ids.
        """
        if self.span is None or entries is not self.span:
            self.span, self.entries = entries, self.reader.entries(entries)
        n, count = len(self.rows[part]), self.entries[0].shape[0]
        room = None if self.reader.own_memory else self.room(n, count)
        z = self.reader.raw_logits(self.source[part], self.entries, room)
        bias = None if self.problem.bias is None else self.problem.bias[entries]
        return transform(self.problem, z, bias, row_inverse_temperature(self.problem, self.rows[part]))[0]

    def room(self, height, count):
        """Memory for a tile, the same for all."""
        if self.buffer is None or self.buffer.numel() < height * count:
            self.buffer = torch.empty(height * count, dtype=self.reader.accumulate, device=self.rows.device)
        return self.buffer[: height * count].view(height, count)


class Scratch:
    """Memory of tiles' terms, kept: fresh pages cost a CPU more than what is written into them."""

    def __init__(self):
        self.held = {}

    def like(self, x, key):
        """Memory of x's shape, by a key of its own."""
        if key not in self.held or self.held[key].numel() < x.numel():
            self.held[key] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
        return self.held[key][: x.numel()].view(x.shape)
