"""The op's backward in plain torch, exact: logits made again tile by tile, every vocabulary entry of each row."""

import torch

from fastgrpo.backends.gradient import Gradient
from fastgrpo.backends.logits import LogitTiles, Reader, bytes_held, fit_tile, unscale
from fastgrpo.backends.problem import active_rows, new_gradients, row_scale


def backward(problem, stats, grad_logp, grad_entropy, needs):
    """Gradients of hidden, weight and bias, and with LoRA of low and up.

    Args:
        grad_logp: (N,) incoming gradient of the log-probs. grad_entropy: (N,) or None.
        needs: a bool for each of them; the result has None where it is False.
    """
    grads = [grad_logp] if grad_entropy is None else [grad_logp, grad_entropy]
    out = new_gradients(problem, needs)
    if any(needs):
        rows = active_rows(problem.targets, *grads).nonzero().squeeze(1)
        add_exact_rows(problem, stats, rows, grads, out)
    return out


def add_exact_rows(problem, stats, rows, grads, out):
    """Write the gradients of some rows into ``out``, fresh from :func:`new_gradients`: see :class:`ExactRows`."""
    if not rows.numel():
        for x in out.of_head:
            if x is not None:
                x.zero_()
        return
    for part in split_rows(problem, rows, grads, out):
        exact = ExactRows(problem, stats, part, grads, out)
        for chunk in exact.tiles.chunks():
            exact.write(chunk, exact.accumulate(chunk))
        exact.write_rows()


def split_rows(problem, rows, grads, out):
    """The rows of each pass over the vocabulary: with a frozen head dX is finished a tile's height at a time."""
    if any(x is not None for x in (*out.of_head, out.bias)):
        return [rows]
    held = bytes_held(Reader(problem), rows.numel())
    return rows.split(fit_tile(problem, rows.numel(), count_buffers(problem, grads), held).rows)


def count_buffers(problem, grads):
    """Tiles alive at once while the gradient of one is made."""
    return problem.tiles_alive + (1 if problem.params.softcap or len(grads) > 1 else 0)


class Sum:
    """A gradient and where its terms are added up: in its own memory, or apart where that has a narrower dtype."""

    def __init__(self, gradient, dtype, usable):
        self.gradient, self.dtype = gradient, dtype
        self.apart = gradient is not None and not (usable and gradient.dtype == dtype)

    def start(self, span):
        """Where to add the terms of some of the gradient's rows; None: they are not needed."""
        if self.gradient is None:
            return None
        own = self.gradient[span]
        return torch.zeros_like(own, dtype=self.dtype) if self.apart else own


class ExactRows:
    """The gradients of some rows in one pass over the vocabulary.

    Of each of ``tiles.chunks()`` the rows are to be accumulated and the head's gradients written, at the end the rows'
    own. Where each is summed is settled before the first tile.

    Args:
        rows: (n,) the rows, rising. grads: [(N,)] of the log-probs and, if it has one, of the entropy.
        out: the gradients, fresh from :func:`new_gradients`.
    """

    def __init__(self, problem, stats, rows, grads, out):
        self.problem, self.stats, self.rows, self.grads = problem, stats, rows, grads
        self.tiles = LogitTiles(problem, rows, count_buffers(problem, grads), raw=True)
        self.reader, n = self.tiles.reader, rows.numel()
        self.gradient = Gradient(problem, rows, hold=self.tiles.source.held > 0)
        self.scale = row_scale(problem, stats, rows, *grads) if self.reader.native and n else None
        # A sum that is scaled must be unscaled alone. dW's memory has no value until a first tile has overwritten it.
        overwritten = n > 0 and self.scale is None
        self.head_sums = [Sum(x, stats.dtype, overwritten) for x in out.of_head]
        self.head_sums.append(Sum(out.bias, stats.dtype, self.scale is None))
        flat = [None if x is None else x.flatten(0, 1) for x in out.of_rows]
        self.row_sums = [Sum(x, stats.dtype, x is not None and n == len(x)) for x in flat]
        self.row_totals = [x.start(slice(0, n)) for x in self.row_sums]

    def accumulate(self, chunk):
        """-> the head's sums in the chunk: dW and, with LoRA, dup (C, D), then db (C,), each or None. dX's grow."""
        *d_entries, d_bias = totals = [x.start(chunk.span) for x in self.head_sums]
        for tile in self.tiles.of_chunk(chunk):
            self.add_tile(tile, d_entries, d_bias)
        if self.scale is not None:
            for x in totals:
                unscale(x, self.scale)
            for factor, x in enumerate(d_entries):
                self.reader.unscale("low", x, factor)
        return totals

    def add_tile(self, tile, d_entries, d_bias):
        reader = self.reader
        dz = differentiate(self.gradient, tile, self.stats, self.grads, self.scale)
        if d_bias is not None:
            d_bias += dz.sum(0)
        if reader.native:
            dz = dz.to(reader.compute)
        operands = reader.gradient_operands(tile.factors, tile.chunk.entries)
        for (x, w), d_rows, d_entry in zip(operands, self.row_totals, d_entries):
            if d_rows is not None:
                reader.add_mm(d_rows[tile.part], dz, w)
            if d_entry is not None and tile.part.start == 0 and not reader.native:
                reader.mm(dz.t(), x, d_entry)
            elif d_entry is not None:
                reader.add_mm(d_entry, dz.t(), x)

    def write(self, chunk, totals):
        """totals: what :meth:`accumulate` returned, with whatever was added to it."""
        for x, total in zip(self.head_sums, totals):
            if x.apart:
                x.gradient[chunk.span] = total

    def write_rows(self):
        for factor, (x, total) in enumerate(zip(self.row_sums, self.row_totals)):
            if total is not None and self.scale is not None:
                self.reader.unscale("up", unscale(total, self.scale), factor)
            if x.apart:
                height = max(self.tiles.height, 1)
                for rows, value in zip(self.rows.split(height), total.split(height)):
                    x.gradient.index_copy_(0, rows, value.to(x.gradient.dtype))


def differentiate(gradient, tile, stats, grads, scale):
    """d loss / d raw logits of a raw tile, over its memory, by the :class:`fastgrpo.backends.gradient.Gradient` of the
    tiles' rows. grads: as :class:`ExactRows`'s, times ``scale`` if any."""
    grads = [g[tile.rows] if scale is None else g[tile.rows] * scale for g in grads]
    local = gradient.problem.apart(tile.rows) - tile.chunk.span.start
    return gradient.of_tile(tile.z, tile.chunk.bias, tile.part, tile.chunk.span, local, stats[:, tile.rows], *grads)
