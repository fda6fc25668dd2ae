"""Gradients of a divergence made in the forward, where both models' logits are: hidden's, and a trained head's.

``d divergence / d logits`` of a row is ``(x - center y) / unit``, see :class:`fastgrpo.backends.witness.Witness`:
the terms x and y are at hand tile by tile, center and unit when the vocabulary is over. So the rows go through it
panel by panel, a panel being what the workspace holds the terms of, and one GEMM more makes dX. A mixture's panel
holds both models' logits first, for its terms want the log-sum-exps: its second pass over the heads is saved too.

A trained head's gradient is a sum over rows, which the forward can only make as if all weighed alike. In a mean they
do, and the backward has nothing but to scale it; where they do not, it makes the head's gradient anew.

With a tolerance, which hidden's gradient alone takes, each block of rows keeps the entries whose terms may matter, and
of these, once all is known, as few columns as the error budget allows, the largest. What a row leaves out is its
certificate, as a norm, and is put back as if spread evenly; rows that leave out too much are done again by the
backward.

Where ranks hold parts of the vocabulary they do the same panels together, for center and unit are of all of it: each
makes its own entries' part of dX, and sees to its own error.
"""

import contextlib
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch

from fastgrpo import lora
from fastgrpo.backends import dense, dense_backward, divergence, frozen
from fastgrpo.backends.certified import BLOCK, CROWDED
from fastgrpo.backends.divergence import KLFold, LevelsFold, MixtureFold, kl_stats
from fastgrpo.backends.frozen import Slopes
from fastgrpo.backends.logits import Chunk, Reader, Tile
from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.pair_tiles import Scratch, pair_tiles
from fastgrpo.backends.problem import sum_entries
from fastgrpo.backends.witness import ROUNDING
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import move_terms, scale_terms

SHARE = 0.6  # of the error budget that the forward spends, before it knows the rows' gradients
SAFE = 0.5  # of the size of a column that the last panel could leave out: below it none is kept to be looked at
LEAST_ROWS, MOST_ROWS = 16, 1024  # of a panel
ROOMIER = 1.5  # how much more of its terms a panel may keep than the one before
ROOM, ROOM_OF_ALL = 0.7, 0.6  # of the workspace for the terms: those that are kept, or all; the rest is for tiles
# Rows of a panel from which on a head's gradient is made in it: each panel goes through the gradient's memory once, and
# a mixture saves twice the products. Measured.
TRAINED_ROWS, TRAINED_ROWS_MIXTURE = 128, 64


class Alone:
    """The one process that has all of the vocabulary."""

    def merge(self, partials, student_first):
        """(7, n) of :func:`fastgrpo.backends.divergence.divergence_partials` of each -> peaks (2, n), sums (4, n) and
        spread (n,) of all."""
        return partials[:2], partials[2:6], partials[6]

    def add_up(self, x):
        """The sum of all processes' tensors; x may be overwritten."""
        return x

    def least(self, number, device):
        """Of all processes' numbers; device: the tensors', which the group can reduce."""
        return number


def applies_to_head(hidden, head, params):
    """Whether a trained head's gradient can be made here too, from every entry, in panels that pay.

    Args:
        head: weight, bias and LoRA's A and B, or None.
    """
    weight, _, lora_a, _ = head
    dtype = accumulator_dtype(hidden)
    native = lora.is_native(hidden, params.compute_dtype)  # whose dlogits are scaled by the gradients
    trained = torch.is_grad_enabled() and hidden.requires_grad and weight.requires_grad and lora_a is None
    # a sum that is wider than the head's gradient would be memory beside it
    if not trained or weight.dtype != dtype or params.backend != "torch" or native:
        return False
    params = replace(params, tolerance=None)
    cells = int(room(params) * params.workspace) // dtype.itemsize
    least = TRAINED_ROWS_MIXTURE if params.is_mixture else TRAINED_ROWS
    return cells >= least * cells_of_row(params, weight.shape[0])


def room(params):
    return ROOM_OF_ALL if params.tolerance is None else ROOM


def held_logits(params, vocab):
    """Cells of a row's logits, and softcap's slopes, that a panel holds between a mixture's passes."""
    return (3 if params.softcap is not None else 2) * vocab if params.is_mixture else 0


def cells_of_row(params, vocab, share=1.0):
    """What a panel needs of a row. share: of its terms, two a cell, those that are kept; all of a mixture's take the
    place of its logits."""
    held, terms = held_logits(params, vocab), 2 * share * vocab
    return max(held, terms) if params.tolerance is None else held + terms


def slopes_like(problem):
    """(shape, dtype) of each tensor of the slopes, at the most rows; those that are given up are told by the last."""
    order, values, _ = frozen.slopes_like(problem)
    return order, values, ((problem.targets.numel(),), values[1])


def trained_forward(problem):
    """As :func:`forward`, and the :class:`HeadSums` of all rows."""
    sums = HeadSums(problem)
    return *forward(problem, head=sums), sums


def forward(problem, ranks=None, head=None):
    """-> (8, N) :class:`PairStats`, :class:`fastgrpo.backends.frozen.Slopes` of the divergence.

    Args:
        ranks: as :class:`Alone`, of those that hold parts of the vocabulary; the statistics are of all of it then, the
            slopes the rank's own. head: :class:`HeadSums` that the rows' part is added to, or None.
    """
    ranks = Alone() if ranks is None else ranks
    rows, dtype = dense.counted_rows(problem.targets), accumulator_dtype(problem.hidden)
    stats = torch.zeros(len(PairStats._fields), problem.targets.numel(), dtype=dtype, device=rows.device)
    values = torch.zeros(rows.numel(), problem.weight.shape[1], dtype=dtype, device=rows.device)
    maker, first = PanelMaker(problem, rows.numel(), ranks), 0
    dropped = torch.zeros_like(values[:, 0])
    while first < rows.numel():
        part = slice(first, min(first + ranks.least(maker.height, rows.device), rows.numel()))
        stats[:, rows[part]], dropped[part] = maker.make(rows[part], values[part], head)
        first = part.stop
    maker.pool.keep()
    return stats, Slopes(rows, values, dropped)


def backward(problem, stats, slopes, sums, grad, needs):
    """Gradients as :func:`fastgrpo.backends.dense_backward.backward`'s; sums: (dW, db) of :class:`HeadSums`, which are
    overwritten, or None where they are gone."""
    of_rows = needs._replace(weight=False, bias=False)
    out = frozen.backward(problem, stats, slopes, grad, of_rows)
    if not (needs.weight or needs.bias):
        return out
    if sums is None or not weigh_alike(slopes, grad):
        for x in sums or ():
            if x is not None:
                x.untyped_storage().resize_(0)  # callers hold it too, and another is to come
        anew = dense_backward.backward(problem, stats, grad, None, needs._replace(hidden=False))
        return out._replace(weight=anew.weight, bias=anew.bias)
    weight, bias = sums
    factor = grad[slopes.rows[0]]
    if needs.weight:
        out = out._replace(weight=weight.mul_(factor))
    if needs.bias:
        out = out._replace(bias=bias.mul_(factor).to(problem.bias.dtype))
    return out


def weigh_alike(slopes, grad):
    """Whether the rows' divergences have one gradient, and none was given up."""
    weights = grad[slopes.rows]
    return weights.numel() > 0 and bool((weights == weights[0]).all() & (slopes.dropped == 0).all())


class HeadSums:
    """A head's gradient while the rows go by, each row's divergence weighing 1.

    Attributes:
        weight: (V, D) in the accumulator's dtype. bias: (V,), or None without one.
    """

    def __init__(self, problem):
        dtype = accumulator_dtype(problem.hidden)
        self.reader, self.hidden, self.chain, self.fresh = Reader(problem), None, None, True
        self.weight = torch.empty(problem.weight.shape, dtype=dtype, device=problem.weight.device)
        self.bias = None if problem.bias is None else self.weight.new_zeros(len(self.weight))

    def start(self, rows, chain):
        """A panel. chain: (n, 1) d logits / d raw logits, softcap's slope aside."""
        self.fresh = self.hidden is None
        self.hidden, self.chain = self.reader.hidden(rows) * chain, chain[:, 0]

    def add(self, piece):
        """A piece of the panel that has every entry of its span; the first of a span overwrites what stands there."""
        terms, total = piece.x.t(), self.weight[piece.span]
        if self.fresh and piece.rows.start == 0:
            self.reader.mm(terms, self.hidden[piece.rows], total)
        else:
            self.reader.add_mm(total, terms, self.hidden[piece.rows])
        if self.bias is not None:
            self.bias[piece.span] += torch.mv(terms, self.chain[piece.rows])


def leaves_out(problem):
    return problem.params.tolerance is not None


class Pool:
    """Memory of the terms, given out piece by piece and taken back at once: fresh pages cost more than the work.

    So a CPU's stays for the next call, as on a GPU, where torch sees to it. No two calls have it at once.
    """

    kept: ClassVar[list] = []  # of the last call

    def __init__(self, cells, dtype, device):
        last = None
        if device.type == "cpu":
            with contextlib.suppress(IndexError):  # were it asked first, another thread could take it meanwhile
                last = Pool.kept.pop()
        fits = last is not None and last.dtype == dtype and cells <= last.numel() <= ROOMIER * cells
        self.whole = last if fits else torch.empty(cells, dtype=dtype, device=device)
        self.memory, self.used = self.whole[:cells], 0

    def keep(self):
        """For the next call."""
        if self.whole.device.type == "cpu" and not self.whole.is_inference():
            Pool.kept[:] = [self.whole]

    def take(self, shape):
        """None where there is no more."""
        first, self.used = self.used, self.used + shape.numel()
        return self.memory[first : self.used].view(shape) if self.used <= self.memory.numel() else None


class PanelMaker:
    """Statistics and gradients of a panel of rows after the other.

    Attributes:
        height: rows of the next panel.
    """

    def __init__(self, problem, rows, ranks):
        workspace, dtype, self.ranks = problem.params.workspace, accumulator_dtype(problem.hidden), ranks
        share, vocab = room(problem.params), problem.weight.shape[0]
        self.problem = problem.within(int((1 - share) * workspace))
        capped = problem.params.softcap is not None
        most = max(rows, LEAST_ROWS) * int(cells_of_row(problem.params, vocab))
        cells = min(int(share * workspace) // dtype.itemsize, most)
        self.pool = Pool(cells, dtype, problem.hidden.device)
        self.spread = leaves_out(problem) and not capped and not problem.params.shard
        self.every = sum_entries(problem.weight, dtype) if self.spread else None
        self.budget, self.height = Budget(problem), self.fit(1.0)

    def fit(self, share):
        """Rows that fit if so many of the terms are kept."""
        rows = int(self.pool.memory.numel() / cells_of_row(self.problem.params, self.problem.weight.shape[0], share))
        multiple = BLOCK if rows >= BLOCK else LEAST_ROWS
        return min(max(rows // multiple * multiple, LEAST_ROWS), MOST_ROWS)

    def make(self, rows, out, head):
        """-> (8, n) statistics, (n,) norms of what is left out. out: (n, D) the gradients, zeros. head:
        :class:`HeadSums` or None."""
        self.pool.used = 0
        terms = Terms(self.problem, rows.numel(), self.pool, self.budget, self.ranks.add_up)
        stats = (self.fold_mixture if self.problem.is_mixture else self.fold)(rows, terms)
        chain = out.new_ones(len(out)).mul_(self.problem.chain(rows))[:, None]
        if head is not None:
            head.start(rows, chain)
        dropped = terms.finish(out, self.every, head)
        out *= chain
        self.height = self.fit(min(ROOMIER * terms.share + 0.02, 1.0))
        return torch.stack(stats._replace(norm=terms.norms)), dropped

    def fold(self, rows, terms):
        """-> :class:`PairStats` of a KL, the norms aside."""
        fold = KLFold(self.problem, rows, terms)
        divergence.fold_vocabulary(self.problem, rows, fold, with_slope=True)
        peaks, sums, spread = self.ranks.merge(fold.partials(), fold.student_first)
        move = move_terms(*(peaks - fold.peaks), fold.student_first)
        terms.settle(move, scale_terms(*sums, fold.student_first))
        return kl_stats(peaks, sums, spread, fold.student_first)

    def fold_mixture(self, rows, terms):
        """-> :class:`PairStats` of a mixture. Its logits are made once and held between its passes, where they fit."""
        cells = rows.numel() * held_logits(self.problem.params, self.problem.weight.shape[0])
        held = [] if cells <= self.pool.memory.numel() else None
        levels = LevelsFold(self.problem, rows)
        for tile, other in self.tiles(rows):
            if held is None:
                levels.add(tile, other)
            else:
                rooms = self.pool.take(tile.z.shape), self.pool.take(other.shape)
                levels.add(tile, other, rooms)
                held.append(self.hold(tile, rooms, levels.peaks[:, tile.part].clone()))
        merged = self.ranks.merge(levels.partials(), levels.student_first)
        known = divergence.level_stats(*merged, levels.student_first)
        if held is not None:
            held.sort(key=lambda pair: -pair[0].chunk.span.start)  # the last is still in the cache
        fold = MixtureFold(self.problem, known, terms)
        for tile, other, beside in ((*pair, None) for pair in self.tiles(rows)) if held is None else held:
            terms.lent = None if held is None or terms.chooses else (other, tile.z)
            fold.add(tile, other, beside)
        total, center = self.ranks.add_up(torch.stack((known.divergence, known.center)))
        terms.settle(None, (center, torch.ones_like(center)))
        return known._replace(divergence=total, center=center)

    def tiles(self, rows):
        return pair_tiles(self.problem, rows, with_slope=True)

    def hold(self, tile, rooms, peaks):
        """What a second pass wants of a pair whose logits stand in the pool's memory, beside the peaks."""
        slope = None if tile.slope is None else self.pool.take(tile.slope.shape).copy_(tile.slope)
        chunk = Chunk(tile.chunk.span, [], None)
        return Tile(rooms[0], slope, tile.rows, tile.part, [], chunk), rooms[1], peaks


class Budget:
    """What the rows may leave out, a row's norm squared on average; it grows with the rows that are done."""

    def __init__(self, problem):
        tolerance = problem.params.tolerance
        self.share = 0.0 if tolerance is None else (SHARE * tolerance * problem.of_tolerance) ** 2
        self.norms, self.spent, self.last = 0.0, 0.0, None

    def least(self, rows, vocab, norm):
        """Of a block of rows the norm squared of a column from which on it may matter.

        Args:
            norm: mean square of the rows' norms so far, for the first panel; the others go by the one before.
        """
        return self.share * norm * rows / vocab if self.last is None else SAFE * self.last

    def choose(self, sizes, norms, gone):
        """Which columns a panel leaves out: those smaller than the number returned.

        Args:
            sizes: (k,) their norms squared. norms: the sum of its rows' norms squared. gone: what is left out already.
        """
        self.norms += norms
        left, high = self.share * self.norms - self.spent - gone, sizes.nan_to_num(nan=0.0).amax().clamp(min=1e-30)
        steps = high * torch.exp2(-torch.arange(0, 60, 0.25, dtype=sizes.dtype, device=sizes.device))
        low, top = 0, len(steps)  # the first step that fits is in [low, top]
        while low < top:
            middle = (low + top) // 2
            fits = float(torch.where(sizes < steps[middle], sizes, 0.0).sum()) <= left
            low, top = (low, middle) if fits else (middle + 1, top)
        least = float(steps[low]) if low < len(steps) else 0.0
        self.spent += gone + float(torch.where(sizes < least, sizes, 0.0).sum())
        self.last = least
        return least


class Piece(NamedTuple):
    """Terms that are kept of a block of rows in a tile."""

    rows: slice  # among the panel's
    span: slice  # of the vocabulary
    ids: torch.Tensor | None  # (k,) int64 in the span; None: all
    x: torch.Tensor  # (m, k)
    y: torch.Tensor  # (m, k)
    tile: int

    def entries(self, problem, chosen):
        """Which rows of the weight. chosen: (k',) of the piece's columns, or None."""
        if self.ids is None and chosen is None:
            return self.span
        return self.span.start + (chosen if self.ids is None else self.ids if chosen is None else self.ids[chosen])


class Terms:
    """Keeps the terms of a panel's rows that may matter: looks as :class:`fastgrpo.backends.witness.Witness`.

    Args:
        rows: how many. pool: :class:`Pool` for them; where that is full, the panel's rows are given up. add_up: of
            :class:`Alone`.

    Attributes:
        norms: (rows,) of what is kept: less than all; once finished.
        chooses: whether only some columns are kept. lent: memory of the next tile's x and y that is the pool's
            already, or None.
    """

    def __init__(self, problem, rows, pool, budget, add_up):
        self.problem, self.pool, self.budget, self.scratch = problem, pool, budget, Scratch()
        self.add_up = add_up
        dtype, device = accumulator_dtype(problem.hidden), problem.hidden.device
        self.pieces, self.full, self.tiles = [], False, 0
        self.moves = torch.zeros(3, 0, rows, dtype=dtype, device=device)  # lead, trail, lean of each tile until now
        self.center = torch.zeros(rows, dtype=dtype, device=device)
        self.unit = torch.ones_like(self.center)
        self.left = torch.zeros(2, rows, dtype=dtype, device=device)  # norms of what is not kept: x, y
        self.seen = torch.zeros(rows, dtype=dtype, device=device)  # of all of it, about
        self.norms, self.slack = None, 1 + ROUNDING * torch.finfo(dtype).eps
        self.chooses, self.lent = leaves_out(problem), None

    def rooms(self, shape):
        """Where x and y can stay, or None twice: of some only columns are kept."""
        if self.lent is None and not (self.chooses or self.full):
            rooms = self.pool.take(shape), self.pool.take(shape)
            self.lent = None if rooms[1] is None else rooms
        return self.lent or (None, None)

    def look(self, tile, x, y, move, frame, later):
        """As :meth:`Witness.look`'s; nothing is expected here."""
        part = tile.part
        if tile.slope is not None:
            for z in (x, y):
                z.mul_(tile.slope[: len(z)])
        self.tiles += part.start == 0
        if not self.problem.is_mixture:
            self.move(part, move)
        span = tile.chunk.span
        if self.chooses:
            self.center[part], self.unit[part] = frame
            if not self.full:
                self.look_closely(part, span, x, y)
        elif self.lent is None:
            self.give_up()
        else:
            self.note(part, span, None, *self.lent)
            self.lent = None

    def move(self, part, move):
        """The peaks have risen: what that makes of the tiles before."""
        if part.start == 0:
            same = self.moves.new_ones(3, 1, self.moves.shape[2])
            same[2] = 0
            self.moves = torch.cat((self.moves, same), 1)
        self.carry(self.moves[:, :-1], part, move)

    def carry(self, moves, part, move):
        lead, trail, lean = move
        leads, trails, leans = moves[:, :, part]
        leans.mul_(lead).addcmul_(lean, trails)
        leads *= lead
        trails *= trail
        left = self.left[:, part]
        left[0].mul_(lead).add_(lean.abs() * left[1])
        left[1] *= trail
        self.seen[part] *= lead

    def settle(self, move, frame):
        """What more entries, looked at elsewhere, make of these: the last center and unit."""
        if not self.problem.is_mixture:
            self.carry(self.moves, slice(None), move)
        self.center, self.unit = frame

    def look_closely(self, part, span, x, y):
        """Keeps the columns where ``x^2 + (center y)^2`` is large in a block: of x and center * y apart, for where
        they cancel now they may not with the last center."""
        unit, center = self.unit[part], self.center[part]
        norm = self.see(part, x, y) if self.budget.last is None else None
        squares = [torch.square(z, out=self.scratch.like(z, key)) for key, z in enumerate((x, y))]
        weights = torch.stack((1 / unit.square(), (center / unit).square()))
        for first in range(0, len(x), BLOCK):
            mine = slice(first, min(first + BLOCK, len(x)))
            rows = slice(part.start + mine.start, part.start + mine.stop)
            least = self.budget.least(len(x[mine]), self.problem.weight.shape[0], norm)
            size = sum(torch.mv(z[mine].t(), w[mine]) for z, w in zip(squares, weights))
            kept = ~(size < least)  # a NaN is kept
            ids = kept.nonzero().squeeze(1)
            if ids.numel() > CROWDED * x.shape[1]:
                self.keep(rows, span, None, x[mine], y[mine])
                continue
            self.keep(rows, span, ids, x[mine], y[mine])
            off = (~kept).to(x.dtype)
            left = torch.stack([torch.mv(z[mine], off) for z in squares]).sqrt_()
            self.left[:, rows] = torch.hypot(self.left[:, rows], left * self.slack)

    def see(self, part, x, y):
        """Mean square of the rows' norms so far."""
        size = torch.addcmul(x, self.center[part, None], y, value=-1, out=self.scratch.like(x, 0))
        self.seen[part] = torch.hypot(self.seen[part], torch.linalg.vector_norm(size, dim=1))
        return (self.seen[part] / self.unit[part]).nan_to_num(nan=0.0, posinf=0.0).square().mean()

    def keep(self, rows, span, ids, x, y):
        shape = x.shape if ids is None else torch.Size((len(x), ids.numel()))
        if self.full or not shape.numel():
            return
        kept = [self.pool.take(shape) for _ in range(2)]
        if kept[1] is None:
            self.give_up()
            return
        for mine, z in zip(kept, (x, y)):
            mine.copy_(z) if ids is None else torch.index_select(z, 1, ids, out=mine)
        self.note(rows, span, ids, *kept)

    def give_up(self):
        self.full, self.pieces = True, []

    def note(self, rows, span, ids, x, y):
        """Terms that stand in memory of their own now."""
        self.pieces.append(Piece(rows, span, ids, x, y, self.tiles - 1))

    @property
    def share(self):
        """Of all terms, those that were kept."""
        cells = self.center.numel() * self.problem.weight.shape[0]
        return 1.0 if self.full or not cells else sum(p.x.numel() for p in self.pieces) / cells

    def finish(self, out, every, head=None):
        """-> (n,) norms of what the rows leave out, inf where they were given up.

        Args:
            out: (n, D) the gradients, zeros. every: (D,) the sum of all entries, if what is left out is put back.
            head: :class:`HeadSums` of the panel, where nothing is left out, or None.
        """
        dropped = (self.left[0] + self.center.abs() * self.left[1]) / self.unit
        if self.full:
            self.norms = self.all_norms()
            return torch.full_like(dropped, torch.inf)
        ahead, behind = self.factors()
        self.pieces.sort(key=lambda piece: -piece.tile)  # the last is still in the cache
        for piece in self.pieces:
            t, rows = piece.tile, piece.rows
            if ahead is not None:
                piece.x.mul_(ahead[t, rows, None])
            piece.x.addcmul_(behind[t, rows, None], piece.y, value=-1)
            dense.without_denormals(piece.x)
        squares, self.norms = dropped.square(), self.all_norms()
        adder = Adder(self.problem, out, every)
        for piece, chosen in zip(self.pieces, self.choose(squares)):
            values = piece.x
            if chosen is not None:
                values = piece.y.flatten()[: len(piece.y) * chosen.numel()].view(len(piece.y), -1)
                torch.index_select(piece.x, 1, chosen, out=values)
                squares[piece.rows] += torch.mv(piece.x.square_(), absent(chosen, piece.x))
            adder.add(piece, values, chosen)
            if head is not None:
                head.add(piece)
        adder.finish()
        return squares.sqrt_()

    def factors(self):
        """-> (tiles, n) of x, None where it is 1, and of -y in a row's gradient."""
        if self.problem.is_mixture:
            return None, self.center.expand(self.tiles, -1)
        leads, trails, leans = self.moves
        return leads / self.unit, (leans + self.center * trails) / self.unit

    def all_norms(self):
        """(n,) of what is kept of each row, on all ranks; 0 without a tolerance, where nobody asks."""
        squares = torch.zeros_like(self.center)
        if self.chooses:
            for piece in self.pieces:
                squares[piece.rows] += row_squares(piece.x)
            squares = self.add_up(squares)
        return squares.sqrt_()

    def choose(self, squares):
        """Of each piece the columns that are kept, or None for all: the largest, as many as the budget wants."""
        if not self.chooses or not self.pieces:
            return [None] * len(self.pieces)
        sizes = [column_sums(torch.square(p.x, out=p.y)) for p in self.pieces]
        norms, gone = (float(x.nan_to_num(nan=0.0, posinf=0.0).sum()) for x in (self.norms.square(), squares))
        least = self.budget.choose(torch.cat(sizes), norms, gone)
        chosen = ((~(size < least)).nonzero().squeeze(1) for size in sizes)
        return [None if ids.numel() > CROWDED * len(size) else ids for ids, size in zip(chosen, sizes)]


def row_squares(x):
    return torch.linalg.vector_norm(x, dim=1).square()


def column_sums(x):
    """(C,): on a CPU torch's sum over the outer axis takes several times as long."""
    return torch.mv(x.t(), x.new_ones(len(x)))


def absent(ids, x):
    """(k,) 1 at the columns of x that are not among the ids, 0 at these."""
    return x.new_ones(x.shape[1]).index_fill_(0, ids, 0.0)


class Adder:
    """Adds terms times entries to the gradients, then what each block of rows leaves out as if spread evenly."""

    def __init__(self, problem, out, every):
        self.problem, self.reader, self.out, self.every = problem, Reader(problem), out, every
        self.sums = {}  # {first row: [rows, row sums, sum of entries, how many]}

    def add(self, piece, values, chosen):
        which = piece.entries(self.problem, chosen)
        for columns in range(0, values.shape[1], self.most):
            part = slice(columns, columns + self.most)
            entries = self.read(which, part)
            self.reader.add_mm(self.out[piece.rows], values[:, part].to(self.reader.operand), entries)
            if self.every is not None:
                self.note(piece.rows, values[:, part], entries)

    @property
    def most(self):
        """Entries that a part of the workspace holds as operands."""
        return max(self.problem.params.workspace // (4 * self.problem.weight.shape[1] * self.out.element_size()), 16)

    def read(self, which, part):
        weight = self.problem.weight
        if isinstance(which, slice):
            return self.reader.cast(weight[which][part])
        return self.reader.cast(weight.index_select(0, which[part]))

    def note(self, rows, values, entries):
        known = self.sums.setdefault(rows.start, [rows, 0.0, 0.0, 0])
        known[1] = known[1] + values.sum(1)
        known[2] = known[2] + sum_entries(entries, self.out.dtype)
        known[3] += len(entries)

    def finish(self):
        """A row's terms add up to 0: those left out are what the kept ones lack."""
        for rows, values, entries, count in self.sums.values():
            left = self.problem.weight.shape[0] - count
            if left:
                self.out[rows].addr_(-values, (self.every - entries) / left)
