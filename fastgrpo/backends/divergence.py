"""Divergences of two models' whole distributions in plain torch: tiles of both logits, folded and differentiated.

A Kullback-Leibler divergence takes one pass over the vocabulary, a mixture's (JSD) a second one, for which both
log-sum-exps must be known. ``fastgrpo/pair_math.py`` has the rows' formulas.
"""

import torch

from fastgrpo.backends import dense
from fastgrpo.backends.certified import BLOCK, Certificate
from fastgrpo.backends.logits import LogitTiles, Reader, RowSource, row_inverse_temperature, transform
from fastgrpo.backends.pair import PairStats, mixture_stats
from fastgrpo.backends.problem import FLOOR, NOTHING, RowStats
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import NEAR, finish_sums, mixture_logs, move_moments, move_peaks, move_terms, scale_terms
from fastgrpo.row_math import rescale

LEAST_PER_TOLERANCE = 0.1  # terms of the rows' mean norm times tolerance * this are flagged
ROUNDING = 8  # units of rounding in sums of squares


def forward(problem):
    """(8, N) :class:`PairStats` of a :class:`fastgrpo.backends.pair.PairProblem`, 0 at rows that do not count."""
    return run_forward(problem, None)


def certified_forward(problem):
    """The statistics and a :class:`fastgrpo.backends.certified.Certificate` of d divergence / d logits.

    ``dropped`` is the norm of what a row leaves out, ``norm`` of the statistics that of all its terms, both for a
    divergence's gradient of 1.
    """
    rows = dense.counted_rows(problem.targets)
    witness = Witness(problem, rows.numel(), rows.device)
    stats = run_forward(problem, witness)
    return stats, witness.certificate(rows)


def run_forward(problem, witness):
    rows, dtype = dense.counted_rows(problem.targets), accumulator_dtype(problem.hidden)
    fold = (
        MixtureFold(problem, know_both(problem, rows), witness)
        if problem.is_mixture
        else KLFold(problem, rows, witness)
    )
    fold_vocabulary(problem, rows, fold, 1 if witness is None else BLOCK)
    stats = torch.zeros(len(PairStats._fields), problem.targets.numel(), dtype=dtype, device=rows.device)
    stats[:, rows] = torch.stack(fold.finish())
    return stats


def divergence_partials(problem):
    """(7, N) both peaks, :func:`move_peaks`'s four sums and the student's spread, of a part of the vocabulary."""
    rows, dtype = dense.counted_rows(problem.targets), accumulator_dtype(problem.hidden)
    fold = KLFold(problem, rows)
    fold_vocabulary(problem, rows, fold)
    partials = torch.zeros(7, problem.targets.numel(), dtype=dtype, device=rows.device)
    partials[:2] = FLOOR
    partials[:, rows] = torch.cat((fold.peaks, fold.sums, fold.spread[None]))
    return partials


def mixture_sums(problem, stats):
    """(2, N) a mixture's divergence and center of a part of the vocabulary. stats: (8, N), of all of it."""
    rows = dense.counted_rows(problem.targets)
    known = PairStats(*stats[:, rows])
    none = torch.zeros_like(known.divergence)
    fold = MixtureFold(problem, known._replace(divergence=none, center=none.clone()))
    fold_vocabulary(problem, rows, fold)
    sums = torch.zeros_like(stats[:2])
    sums[:, rows] = torch.stack((fold.stats.divergence, fold.stats.center))
    return sums


def fold_vocabulary(problem, rows, fold, multiple=1):
    for tile, other in pair_tiles(problem, rows, multiple):
        fold.add(tile, other)


def pair_tiles(problem, rows, multiple):
    """The student's :class:`fastgrpo.backends.logits.Tile` of transformed logits and the teacher's beside it.

    Both are padded to a multiple of so many rows, with NOTHING.
    """
    buffers = problem.tiles_alive + (2 if multiple > 1 else 0)
    tiles, teacher = LogitTiles(problem, rows, buffers, multiple=multiple), Teacher(problem, rows)
    for tile in tiles:
        yield tile, teacher.logits(tile.part, tile.chunk.span, tile.z.shape[0])


class Teacher:
    """The teacher's transformed logits of some rows.

    Args:
        rows: (n,); the parts of them are slices.
    """

    def __init__(self, problem, rows):
        self.problem, self.rows = problem.teacher, rows
        self.reader = Reader(problem.teacher)
        self.source = RowSource(self.reader, rows)
        self.span, self.entries, self.buffer = None, None, None

    def logits(self, part, entries, height=None):
        """(n, C), or padded to (height, C) with NOTHING.

        Args:
            entries: a slice of the vocabulary, read once for rows that follow each other, or (C,) ids.
        """
        if self.span is None or entries is not self.span:
            self.span, self.entries = entries, self.reader.entries(entries)
        n, count = len(self.rows[part]), self.entries[0].shape[0]
        height = n if height is None else height
        if self.reader.native:
            z = self.reader.raw_logits(self.source[part], self.entries, None)
            whole = z if height == n else torch.cat((z, z.new_empty(height - n, count)))
        else:
            whole = self.room(height, count)
            self.reader.raw_logits(self.source[part], self.entries, whole[:n])
        bias = None if self.problem.bias is None else self.problem.bias[entries]
        transform(self.problem, whole[:n], bias, row_inverse_temperature(self.problem, self.rows[part]))
        whole[n:] = NOTHING
        return whole

    def room(self, height, count):
        """Memory for a tile, the same for all."""
        if self.buffer is None or self.buffer.numel() < height * count:
            self.buffer = torch.empty(height * count, dtype=self.reader.accumulate, device=self.rows.device)
        return self.buffer[: height * count].view(height, count)


class Scratch:
    """Memory of tiles' terms, kept: fresh pages cost a CPU more than what is written into them."""

    def __init__(self):
        self.held = {}

    def like(self, x, key, dtype=None):
        """Memory of x's shape, by a key of its own."""
        if key not in self.held or self.held[key].numel() < x.numel():
            self.held[key] = torch.empty(x.numel(), dtype=dtype or x.dtype, device=x.device)
        return self.held[key][: x.numel()].view(x.shape)


def differences(u, v, d, scratch):
    """v - u of exponentials whose logs differ by -d: of d where that is small. Overwrites nothing it is given."""
    near = torch.clamp(d, -NEAR, NEAR, out=scratch.like(u, "near"))
    far = torch.ne(near, d, out=scratch.like(u, "far", torch.bool))
    near.neg_().expm1_().mul_(u)
    apart = torch.sub(v, u, out=scratch.like(u, "apart"))
    return torch.where(far, apart, near, out=near)


class KLFold:
    """Folds tiles into the running sums of :mod:`fastgrpo.pair_math`."""

    def __init__(self, problem, rows, witness=None):
        self.problem, self.student_first, self.witness = problem, problem.beta == 1.0, witness
        self.scratch = Scratch()
        dtype, device = accumulator_dtype(problem.hidden), rows.device
        self.peaks = torch.full((2, rows.numel()), FLOOR, dtype=dtype, device=device)  # first, second
        self.sums = torch.zeros(4, rows.numel(), dtype=dtype, device=device)
        self.spread = torch.zeros(rows.numel(), dtype=dtype, device=device)  # of the student, with an entropy

    def add(self, tile, other):
        """Overwrites both tiles' logits; rows beyond tile.part are padding."""
        part, n = tile.part, tile.rows.numel()
        whole = (tile.z, other) if self.student_first else (other, tile.z)
        u, v = (z[:n] for z in whole)
        rise = self.raise_peaks(part, u, v)
        for z, peak in zip((u, v), self.peaks):
            z -= peak[part, None]
        total, other_total, tilt, excess = (x[part] for x in self.sums)
        if self.problem.params.entropy:
            own = tile.z[:n].clamp(min=dense.FAR)
            self.spread[part] -= (own * dense.exp_(own.clone())).sum(1)
        d = torch.sub(u, v, out=self.scratch.like(u, 0))
        for z in whole:
            dense.exp_(z)
        total += u.sum(1)
        other_total += v.sum(1)
        apart = differences(u, v, d, self.scratch)
        excess += apart.sum(1)
        leant = d.mul_(u)
        tilt += leant.sum(1)
        if self.witness is not None:
            x, motion = leant if self.student_first else apart, move_terms(*rise, self.student_first)
            frame = scale_terms(total, other_total, tilt, excess, self.student_first)
            self.witness.look(tile, x, u, motion, *frame)

    def raise_peaks(self, part, u, v):
        """-> (2, n) by how much."""
        known = self.peaks[:, part]
        high = torch.maximum(known, torch.stack((u.amax(1), v.amax(1))))
        rise = high - known
        partials = torch.cat((known, self.sums[:, part], self.spread[None, part]))
        *sums, self.spread[part] = beside_peaks(partials, high, self.student_first)
        self.sums[:, part] = torch.stack(sums)
        self.peaks[:, part] = high
        return rise

    def finish(self):
        """The rows of :class:`PairStats`."""
        stats = kl_stats(self.peaks, self.sums, self.spread, self.student_first)
        return stats if self.witness is None else stats._replace(norm=self.witness.row_norms())


def beside_peaks(partials, top, student_first):
    """-> the sums and the spread of :func:`divergence_partials` beside peaks (2, ...), none of them lower."""
    peaks, sums, spread, own = partials[:2], partials[2:6], partials[6], 0 if student_first else 1
    spread = rescale(peaks[own], sums[own], spread, top[own])[1]
    return *move_peaks(*sums, *(top - peaks)), spread


def kl_stats(peaks, sums, spread, student_first):
    """:class:`PairStats` of finished sums; spread: of the student."""
    divergence, log_first, turn = finish_sums(*sums)
    if student_first:
        (peak, other_peak), total, offset, gap = peaks, sums[0], log_first, -turn
    else:
        (other_peak, peak), total, offset, gap = peaks, sums[1], log_first + turn, turn
    entropy, none = offset + spread / total, torch.zeros_like(gap)
    center = divergence if student_first else none
    return PairStats(divergence, peak, offset, none, entropy, other_peak, gap, center)


def know_both(problem, rows):
    """:class:`PairStats` of some rows with what a pass of each model alone tells."""
    return mixture_stats(*(RowStats(*dense.forward(p)[:, rows]) for p in (problem.own, problem.teacher)))


class MixtureFold:
    """The generalised JSD. stats: of the rows, both log-sum-exps known."""

    def __init__(self, problem, stats, witness=None):
        self.problem, self.stats, self.witness = problem, stats, witness

    def add(self, tile, other):
        """Overwrites both tiles' logits; rows beyond tile.part are padding."""
        part, beta, n = tile.part, self.problem.beta, tile.rows.numel()
        log_p, delta, log_q = log_ratios(PairStats(*(x[part] for x in self.stats)), tile.z[:n], other[:n])
        log_s, log_t = mixture_logs(delta, beta)
        p = dense.exp_(log_p)
        mine = log_s.mul_(1.0 - beta).mul_(p)
        self.stats.center[part] += mine.sum(1)
        theirs = dense.exp_(log_q).mul_(beta).mul_(log_t)
        self.stats.divergence[part] += theirs.add_(mine).sum(1)
        if self.witness is not None:
            still = torch.ones_like(self.stats.center[part])
            self.witness.look(tile, mine, p, (still, still, 0.0), self.stats.center[part], still)

    def finish(self):
        return self.stats if self.witness is None else self.stats._replace(norm=self.witness.row_norms())


class Witness:
    """Sees every term of every row's gradient, see :mod:`fastgrpo.pair_math`: flags what matters, sums what does not.

    An entry is kept where one of its block's rows has a term that matters beside the rows' mean norm so far.

    Attributes:
        flags: (blocks, V) bool.
    """

    def __init__(self, problem, n, device):
        dtype = accumulator_dtype(problem.hidden)
        self.problem, self.scratch = problem, Scratch()
        self.flags = torch.zeros(-(-n // BLOCK), problem.weight.shape[0], dtype=torch.bool, device=device)
        self.center, self.unit = torch.zeros(n, dtype=dtype, device=device), torch.ones(n, dtype=dtype, device=device)
        self.seen, self.left = torch.zeros(2, 3, n, dtype=dtype, device=device)  # sums of x^2, x y, y^2

    def look(self, tile, x, y, motion, center, unit):
        """x, y: (n, C), overwritten. motion: since these rows' last tile. center, unit: with this tile's entries."""
        part, n, columns = tile.part, *x.shape
        self.center[part], self.unit[part] = center, unit
        for moments in (self.seen, self.left):
            moments[:, part] = torch.stack(move_moments(*moments[:, part], *motion))
        self.seen[:, part] += products(x, y)
        least = least_kept(self.problem, term_norms(self.seen, self.center, self.unit), self.unit.numel()) * unit
        kept = torch.zeros(-(-n // BLOCK) * BLOCK, columns, dtype=torch.bool, device=x.device)
        size = torch.addcmul(x, center[:, None], y, value=-1, out=self.scratch.like(x, "size")).abs_()
        torch.ge(size, least[:, None], out=kept[:n])
        kept = kept.view(-1, BLOCK, columns).any(1)
        first = part.start // BLOCK
        self.flags[first : first + len(kept), tile.chunk.span] |= kept
        left = ~kept
        for z in (x, y):
            for rows, mine in zip(z.split(BLOCK), left):
                rows.mul_(mine)
        self.left[:, part] += products(x, y)

    def certificate(self, rows):
        return Certificate(rows, self.flags, left_out(self.left, self.center, self.unit), BLOCK)

    def row_norms(self):
        return certain_norms(self.seen, self.center, self.unit)


def term_norms(moments, center, unit):
    """(n,) of the terms that the moments, (3, n), are of."""
    xx, xy, yy = moments
    return (xx - 2 * center * xy + center**2 * yy).clamp_(min=0.0).sqrt_() / unit


def least_kept(problem, norms, count):
    """0-dim: terms so large are kept. norms: of ``count`` rows so far, 0 of those that do not count."""
    norms = norms.nan_to_num(nan=0.0, posinf=0.0)  # a bad row must not decide for the others
    return problem.params.tolerance * LEAST_PER_TOLERANCE * (norms.square().sum() / count).sqrt()


def left_out(moments, center, unit):
    """(n,) the norm of what each row leaves out, with what rounding may have hidden."""
    xx, _, yy = moments
    hidden = (ROUNDING * torch.finfo(unit.dtype).eps * (xx + center**2 * yy)).sqrt() / unit
    return term_norms(moments, center, unit) + hidden


def certain_norms(moments, center, unit):
    """(n,) of all terms, less what rounding may have added."""
    slack = 1 - ROUNDING * torch.finfo(unit.dtype).eps
    xx, xy, yy = moments
    return term_norms((xx * slack, xy, yy * slack), center, unit)


def products(x, y):
    """(3, n): sums of x^2, x y, y^2 over the columns."""
    return torch.stack([torch.einsum("nc,nc->n", a, b) for a, b in ((x, x), (x, y), (y, y))])


def log_ratios(known, z, other):
    """-> log p of the student, its difference to the teacher's, and the teacher's: (n, C) each.

    The first and the last over the tiles' memory; none is made of the others, for one may be -1e30. known: of these
    rows.
    """
    z -= known.peak[:, None]
    other -= known.other_peak[:, None]
    delta = torch.sub(z, other).sub_(known.gap[:, None])
    return z.sub_(known.offset[:, None]), delta, other.add_((known.gap - known.offset)[:, None])


def logits_gradient(problem, z, bias, index, other, stats, grad):
    """d loss / d the student's raw logits of one tile, over z's memory.

    With delta = log p_s - log p_t: p_s (delta - KL) for KL(s || t), p_s - p_t for KL(t || s), and for the mixture
    p_s (a - E_s[a]), a = (1 - beta) log(p_s / m).

    Args:
        z: (n, C) raw. other: (n, C) transformed, overwritten. stats: (8, n). grad: (n,) of the divergences.
    """
    inv_temperature = row_inverse_temperature(problem, index)
    chain = problem.params.logit_scale * (1.0 if inv_temperature is None else inv_temperature)
    z, slope = transform(problem, z, bias, inv_temperature, with_slope=True)
    known = PairStats(*stats)
    log_p, delta, log_q = log_ratios(known, z, other)
    if problem.beta == 0.0:
        dz = differences(dense.exp_(log_p), dense.exp_(log_q), delta, Scratch()).neg_()
    else:
        if problem.is_mixture:
            delta = mixture_logs(delta, problem.beta)[0].mul_(1.0 - problem.beta)
        dz = delta.sub_(known.center[:, None]).mul_(dense.exp_(log_p))
    dz = dz.mul_(grad[:, None] * chain)
    dz = z.copy_(dz if slope is None else dz.mul_(slope))
    return dense.without_denormals(dz)


def teacher_of(problem, index, entries):
    """(n, C) the teacher's transformed logits. entries: a slice or (C,) ids."""
    return Teacher(problem, index).logits(slice(0, index.numel()), entries)
