"""Logits of a problem, tile by tile: what reads hidden and weight, and the one loop over rows and vocabulary.

Tiles are made in fp32 (fp64 for fp64 input) and overwritten in place; nothing of shape (N, V) is held.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastgrpo import lora
from fastgrpo.backends import products
from fastgrpo.backends.problem import NOTHING, plan_tiles
from fastgrpo.inputs import accumulator_dtype, take_rows

# A tile that stays in a CPU core's share of the cache between the GEMM and the passes over it.
CPU_ROWS, CPU_ENTRIES = 2048, 2048


class Reader:
    """Chunks of hidden and weight, and of LoRA's pair, in the dtype the GEMM wants, cast as they are read."""

    def __init__(self, problem):
        self.problem = problem
        self.accumulate = accumulator_dtype(problem.hidden)
        self.compute = problem.params.compute_dtype
        # On CUDA a 16-bit GEMM can return its fp32 accumulator; elsewhere the operands are widened first, exactly.
        self.native = lora.is_native(problem.hidden, self.compute)
        self.operand = self.compute if self.native else self.accumulate
        self.own_memory = self.native or products.makes_memory(problem.hidden.device, self.operand)
        self.lora = None if problem.low is None else self.lora_operands(problem)

    def lora_operands(self, problem):
        if self.native:
            return problem.lora_operands
        return lora.Operands(problem.low.flatten(0, 1), problem.up, problem.up.shape[1], None, None)

    def cast(self, x):
        return x.to(self.compute).to(self.operand)

    def hidden(self, rows):  # (n,) -> (n, D)
        return self.cast(take_rows(self.problem.hidden, rows))

    def rows(self, index):
        """Each factor's rows: hidden (n, D) and, with LoRA, low (n, depth), see :class:`fastgrpo.lora.Operands`."""
        return [self.hidden(index)] + ([] if self.lora is None else [self.lora.low.index_select(0, index)])

    @property
    def heads(self):
        """Each factor's entries, not cast: weight (V, D) and, with LoRA, up (V, width)."""
        return [self.problem.weight] + ([] if self.lora is None else [self.lora.up])

    def entries(self, span):
        return [self.cast_entries(k, head[span]) for k, head in enumerate(self.heads)]

    def cast_entries(self, factor, x):
        """The head's as operands; LoRA's, which may be wider than the head, are ready or keep their accuracy."""
        if factor == 0 or self.native:
            return self.cast(x)
        return x.to(self.problem.params.lora_dtype).to(self.accumulate)

    def raw_logits(self, rows, entries, out):
        """The sum of the factors' products, (n, C) in the accumulator's dtype; ``out``: where to put it, or None."""
        z = self.mm(rows[0], entries[0].t(), out)
        if self.lora is None:
            return z
        if not self.native:
            return z.addmm_(rows[1], entries[1].t())
        product = lora.mm16(rows[1], entries[1][:, self.lora.columns].t())
        return z.add_(product if self.lora.scale is None else product * self.lora.scale)

    def paired_logits(self, rows, entries):
        """(n,): the raw logit of each row with the entry beside it."""
        z = (rows[0].to(self.accumulate) * entries[0].to(self.accumulate)).sum(1)
        if self.lora is None:
            return z
        up = entries[1][:, self.lora.columns].to(self.accumulate)
        product = (rows[1].to(self.accumulate) * up).sum(1)
        return z + (product if self.lora.scale is None else product * self.lora.scale)

    def gradient_operands(self, rows, entries):
        """-> [(rows, entries)] of each factor, as a gradient's GEMMs read them."""
        pairs = list(zip(rows, entries))
        return pairs[:1] + [tuple(x[:, : self.lora.rank] for x in pair) for pair in pairs[1:]]

    def unscale(self, side, x, factor):
        """In place: a factor's gradient without the power of two of the operand it was made with. side: "low", "up"."""
        return x if x is None or factor == 0 else unscale(x, getattr(self.lora, f"{side}_scale"))

    def mm(self, a, b, out):  # (n, k), (k, m) -> (n, m) in the accumulator's dtype
        if self.native:
            return lora.mm16(a, b)
        return products.mm(a, b, out)

    def add_mm(self, total, a, b):  # total += a @ b
        if self.native:
            total += lora.mm16(a, b)
        else:
            products.add_mm(total, a, b)


def unscale(x, scale):
    """x / scale in place, a copy would be as large as the gradient in fp32; either may be None."""
    return x if x is None or scale is None else x.div_(scale)


def transform(problem, z, bias, inv_temperature, with_slope=False):
    """Logits from the raw product, in place; with_slope: also softcap's derivative, or None where it is 1."""
    slope = None
    if bias is not None:
        z += bias.to(z.dtype)
        z.clamp_(min=NOTHING)  # an entry masked by -inf must not meet 0 * inf
    scale, softcap = problem.params.logit_scale, problem.params.softcap
    if scale != 1.0:
        z *= scale
    if softcap is not None:
        z /= softcap
        if with_slope:
            slope = 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)
        z.tanh_().mul_(softcap)
    if inv_temperature is not None:
        z *= inv_temperature
    return z, slope


def row_inverse_temperature(problem, rows):
    """(n, 1) tensor, a number, or None where the temperature is 1."""
    if problem.temperature is not None:
        return 1.0 / problem.temperature[rows, None]
    return None if problem.params.temperature == 1.0 else 1.0 / problem.params.temperature


def fit_tile(problem, rows, buffers, held=0):
    """-> :class:`Tiling`. buffers: tiles alive at once. held: bytes of the workspace that are taken."""
    vocab, depth = problem.weight.shape[0], problem.depth
    size = 8 if problem.hidden.dtype == torch.float64 else 4
    max_rows, max_entries = (CPU_ROWS, CPU_ENTRIES) if problem.hidden.device.type == "cpu" else (16384, 16384)
    budget, per_row, cell = problem.params.workspace - held, size * depth, size * buffers
    if problem.taken is not None:
        per_row += 32 * problem.taken.shape[1]  # their places, and what stands there
    if lora.is_native(problem.hidden, problem.params.compute_dtype):
        cell, per_row = cell + 2, per_row + 2 * depth  # the tile and its rows once more, in 16 bits
    per_entry = 2 * size * depth
    if products.makes_memory(problem.hidden.device, accumulator_dtype(problem.hidden)):
        cell, per_row, per_entry = cell + size, per_row + size * depth, per_entry + size * depth
    return plan_tiles(min(rows, max_rows), min(vocab, max_entries), budget, cell, per_row, per_entry)


def pairs_at_once(problem):
    """How many pairs of rows, their products and their sums fit half the workspace."""
    return max(problem.params.workspace // (2 * 4 * accumulator_dtype(problem.hidden).itemsize * problem.depth), 1)


@dataclass(frozen=True)
class Chunk:
    """A range of the vocabulary."""

    span: slice
    entries: list  # each factor's as operands: [(C, D)], with LoRA (C, width) too
    bias: torch.Tensor | None  # (C,)


@dataclass
class Tile:
    """Logits of some rows over a chunk. The generator takes z and slope back when it is asked for the next tile."""

    z: torch.Tensor  # (n, C), overwritten by the next tile
    slope: torch.Tensor | None  # (n, C) softcap's derivative; None: not asked for, or 1
    rows: torch.Tensor  # (n,) which rows
    part: slice  # where they stand among the rows of all tiles
    factors: list  # the rows as operands: [(n, D)], with LoRA (n, depth) too
    chunk: Chunk


class LogitTiles:
    """The logits of some rows, all rows of one chunk of the vocabulary after the other.

    Iterating yields each :class:`Tile`; :meth:`chunks` and :meth:`of_chunk` are the two loops apart.

    Args:
        rows: (n,). buffers: how many tiles are alive at once.
        raw: z is the product of the factors alone, not yet transformed.
        with_slope: see :func:`transform`.
        multiple: z is padded to a multiple of so many rows with rows of NOTHING.
    """

    def __init__(self, problem, rows, buffers, raw=False, with_slope=False, multiple=1):
        self.problem, self.rows, self.raw, self.with_slope, self.multiple = problem, rows, raw, with_slope, multiple
        self.reader, n = Reader(problem), rows.numel()
        self.source = RowSource(self.reader, rows)
        shape = fit_tile(problem, n, buffers, self.source.held)
        self.height, self.width = -(-min(shape.rows, n) // multiple) * multiple, shape.cols
        self.buffer = torch.empty(
            0 if self.reader.own_memory else self.height,
            min(self.width, problem.weight.shape[0]),
            dtype=self.reader.accumulate,
            device=rows.device,
        )

    def __iter__(self):
        if self.rows.numel():
            for chunk in self.chunks():
                yield from self.of_chunk(chunk)

    def chunks(self, span=None):
        """Each :class:`Chunk` of a range of the vocabulary; None: of all of it."""
        bias, vocab = self.problem.bias, self.problem.weight.shape[0]
        span = slice(0, vocab) if span is None else span
        for v in range(span.start, span.stop, self.width):
            part = slice(v, min(v + self.width, span.stop))
            yield Chunk(part, self.reader.entries(part), None if bias is None else bias[part])

    def of_chunk(self, chunk):
        for r in range(0, self.rows.numel(), max(self.height, 1)):
            tile = self.make(slice(r, r + self.height), chunk)
            yield tile
            tile.z = tile.slope = tile.factors = None  # the last tile goes before the next one comes

    def make(self, part, chunk):
        rows, factors, slope = self.rows[part], self.source[part], None
        n, count = rows.numel(), chunk.entries[0].shape[0]
        padding = -n % self.multiple
        if self.reader.own_memory:
            padded = [F.pad(x, (0, 0, 0, padding)) for x in factors] if padding else factors
            whole = self.reader.raw_logits(padded, chunk.entries, None)
        else:
            whole = self.buffer[: n + padding, :count]
            self.reader.raw_logits(factors, chunk.entries, whole[:n])
        if not self.raw:
            inverse = row_inverse_temperature(self.problem, rows)
            slope = transform(self.problem, whole[:n], chunk.bias, inverse, self.with_slope)[1]
        if padding:
            whole[n:] = NOTHING
        return Tile(whole, slope, rows, slice(part.start, part.start + n), factors, chunk)


class RowSource:
    """Rows of hidden (and of LoRA's low) as operands, gathered once where a quarter of the workspace holds them.

    Args:
        hold: whether they are, where that was decided elsewhere.
    """

    def __init__(self, reader, rows, hold=None):
        self.reader, self.rows = reader, rows
        self.held = bytes_held(reader, rows.numel()) if hold is None else hold
        self.gathered = reader.rows(rows) if self.held else None

    def __getitem__(self, part):
        if self.gathered is None:
            return self.reader.rows(self.rows[part])
        return [x[part] for x in self.gathered]


def bytes_held(reader, count):
    """What so many rows take as operands; 0: they are not to be held."""
    size = count * reader.operand.itemsize * reader.problem.depth
    return size if size <= reader.problem.params.workspace // 4 else 0
