"""Divergences of two models' whole distributions in plain torch: tiles of both logits, folded and differentiated.

A Kullback-Leibler divergence takes one pass over the vocabulary, a mixture's (JSD) a second one, for which both
log-sum-exps must be known. ``fastgrpo/pair_math.py`` has the rows' formulas.
"""

import torch

from fastgrpo.backends import dense
from fastgrpo.backends.certified import BLOCK, Certificate
from fastgrpo.backends.logits import LogitTiles, Reader, RowSource, row_inverse_temperature, transform
from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.problem import FLOOR
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import NEAR, finish_sums, move_moments, move_peaks, move_terms, scale_terms
from fastgrpo.row_math import rescale

LEAST_PER_TOLERANCE = 0.1  # terms of the rows' mean norm times tolerance * this are flagged
ROUNDING = 8  # units of rounding in sums of squares
NOISE, NOTHING_SEEN = 9.0, 2.0**-20  # see near_rows


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


def certified_partials(problem, stats=None):
    """Of a part of the vocabulary what :func:`divergence_partials` returns, or with ``stats``, of a mixture,
    :func:`mixture_sums`; and the :class:`Witness` of its entries, of the counted rows.

    ``witness.certificate(rows)`` is right once :meth:`Witness.settle` knows the whole vocabulary's statistics.
    """
    rows = dense.counted_rows(problem.targets)
    witness = Witness(problem, rows.numel(), rows.device)
    if stats is None:
        return divergence_partials(problem, witness), rows, witness
    return mixture_sums(problem, stats, witness), rows, witness


def run_forward(problem, witness):
    rows, dtype = dense.counted_rows(problem.targets), accumulator_dtype(problem.hidden)
    fold = (
        MixtureFold(problem, know_both(problem, rows), witness)
        if problem.is_mixture
        else KLFold(problem, rows, witness)
    )
    fold_vocabulary(problem, rows, fold, multiple=1 if witness is None else BLOCK)
    stats = torch.zeros(len(PairStats._fields), problem.targets.numel(), dtype=dtype, device=rows.device)
    stats[:, rows] = torch.stack(fold.finish())
    return stats


def divergence_partials(problem, witness=None):
    """(7, N) both peaks, :func:`move_peaks`'s four sums and the student's spread, of a part of the vocabulary."""
    rows, dtype = dense.counted_rows(problem.targets), accumulator_dtype(problem.hidden)
    fold = KLFold(problem, rows, witness)
    fold_vocabulary(problem, rows, fold, multiple=1 if witness is None else BLOCK)
    partials = torch.zeros(7, problem.targets.numel(), dtype=dtype, device=rows.device)
    partials[:2] = FLOOR
    partials[:, rows] = torch.cat((fold.peaks, fold.sums, fold.spread[None]))
    return partials


def mixture_sums(problem, stats, witness=None):
    """(2, N) a mixture's divergence and center of a part of the vocabulary. stats: (8, N), of all of it."""
    rows = dense.counted_rows(problem.targets)
    known = PairStats(*stats[:, rows])
    none = torch.zeros_like(known.divergence)
    fold = MixtureFold(problem, known._replace(divergence=none, center=none.clone()), witness)
    fold_vocabulary(problem, rows, fold, multiple=1 if witness is None else BLOCK)
    sums = torch.zeros_like(stats[:2])
    sums[:, rows] = torch.stack((fold.stats.divergence, fold.stats.center))
    return sums


def fold_vocabulary(problem, rows, fold, **options):
    for tile, other in pair_tiles(problem, rows, **options):
        fold.add(tile, other)


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


def near_rows(leant, d, mass, total, scratch):
    """(n,) bool: the rows of a tile whose :func:`differences` rounding would drown, were they made of exponentials.

    That errs by some 1e-7 of ``mass``, where the divergence can be told to 1e-6 of its root (the logits' own rounding).
    It is about half the mean of d^2. On a GPU, where the host would have to wait for it, None: take all rows as near.

    Args:
        leant: (n, C) d e^u. mass: (n,) the tile's sum of e^u. total: (n,) with the tiles before.
    """
    if d.device.type != "cpu":
        return None
    squares = torch.mul(leant, d, out=scratch.like(d, "near")).sum(1)
    return (mass.square() > NOISE * squares * total) & (mass > NOTHING_SEEN * total)


def sum_differences(u, v, d, near, plain, out, scratch):
    """(n,) sums of v - u over the columns, exact to d at the rows that are ``near``, ``plain`` elsewhere.

    Args:
        out: (n, C) v - u, whose near rows are made exact too; or None.
    """
    rows = None if near is None else near.nonzero().squeeze(1)
    if rows is not None and 2 * rows.numel() <= near.numel():
        if rows.numel():
            exact = differences(*(x.index_select(0, rows) for x in (u, v, d)), scratch)
            plain = plain.index_copy(0, rows, exact.sum(1))
            if out is not None:
                out.index_copy_(0, rows, exact)
        return plain
    exact = differences(u, v, d, scratch)
    if out is not None:
        out.copy_(exact)
    return exact.sum(1)


class KLFold:
    """Folds tiles into the running sums of :mod:`fastgrpo.pair_math`.

    Args:
        witness: sees the terms of every row's gradient, see :class:`Witness`; None: nobody.
    """

    def __init__(self, problem, rows, witness=None):
        self.problem, self.student_first, self.witness = problem, problem.beta == 1.0, witness
        self.scratch = Scratch()
        dtype, device = accumulator_dtype(problem.hidden), rows.device
        self.peaks = torch.full((2, rows.numel()), FLOOR, dtype=dtype, device=device)  # first, second
        self.sums = torch.zeros(4, rows.numel(), dtype=dtype, device=device)
        self.spread = torch.zeros(rows.numel(), dtype=dtype, device=device)  # of the student, with an entropy

    def add(self, tile, other):
        """Overwrites both tiles' logits."""
        part = tile.part
        u, v = (tile.z, other) if self.student_first else (other, tile.z)
        rise = self.raise_peaks(part, u, v)
        for z, peak in zip((u, v), self.peaks):
            z -= peak[part, None]
        if self.problem.params.entropy:
            own = tile.z.clamp(min=dense.FAR)
            self.spread[part] -= (own * dense.exp_(own.clone())).sum(1)
        d = torch.sub(u, v, out=self.scratch.like(u, "d"))
        for z in (u, v):
            dense.exp_(z)
        leant = torch.mul(d, u, out=self.scratch.like(u, "leant"))
        sums = self.sums[:, part]
        mass, other_mass = u.sum(1), v.sum(1)
        sums[0] += mass
        sums[1] += other_mass
        sums[2] += leant.sum(1)
        near = near_rows(leant, d, mass, sums[0], self.scratch)
        apart = None
        if self.witness is not None and not self.student_first:
            apart = torch.sub(v, u, out=self.scratch.like(u, "difference"))
        sums[3] += sum_differences(u, v, d, near, other_mass - mass, apart, self.scratch)
        if self.witness is not None:
            motion, frame = move_terms(*rise, self.student_first), scale_terms(*sums, self.student_first)
            self.witness.look(tile, leant if apart is None else apart, u, motion, *frame)

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
    """:class:`PairStats` of some rows with what a pass over both models' logits tells, the divergence aside."""
    levels = KLFold(problem, rows)
    fold_vocabulary(problem, rows, levels)
    return without_divergence(levels.finish())


def without_divergence(stats):
    """What a KL's :class:`PairStats` tell of both models alone."""
    none = torch.zeros_like(stats.divergence)
    return stats._replace(divergence=none, center=none.clone())


def mixture_logs(delta, beta, scratch):
    """As :func:`fastgrpo.pair_math.mixture_logs`, in kept memory: torch's expm1 and log1p are accurate everywhere."""
    fall = torch.abs(delta, out=scratch.like(delta, "fall")).neg_().expm1_()
    weight = beta
    if beta != 0.5:
        weight = torch.sign(delta, out=scratch.like(delta, "weight")).mul_(beta - 0.5).add_(0.5)
    log = fall.mul_(weight).log1p_().neg_()
    above = torch.clamp(delta, min=0.0, out=scratch.like(delta, "above"))
    below = torch.clamp(delta, max=0.0, out=scratch.like(delta, "below"))
    return below.add_(log), torch.sub(log, above, out=above)


class MixtureFold:
    """The generalised JSD. stats: of the rows, both log-sum-exps known."""

    def __init__(self, problem, stats, witness=None):
        self.problem, self.stats, self.witness, self.scratch = problem, stats, witness, Scratch()
        self.mass = torch.zeros_like(stats.divergence)  # of the student's entries so far

    def add(self, tile, other):
        """Overwrites both tiles' logits."""
        part, beta = tile.part, self.problem.beta
        log_p, delta, log_q = log_ratios(PairStats(*(x[part] for x in self.stats)), tile.z, other, self.scratch)
        log_s, log_t = mixture_logs(delta, beta, self.scratch)
        p = dense.exp_(log_p)
        mine = log_s.mul_(1.0 - beta).mul_(p)
        self.stats.center[part] += mine.sum(1)
        theirs = dense.exp_(log_q).mul_(beta).mul_(log_t)
        self.stats.divergence[part] += theirs.add_(mine).sum(1)
        if self.witness is not None:
            self.mass[part] += p.sum(1)
            center = self.stats.center[part] / self.mass[part].clamp(min=dense.negligible(p.dtype))
            still = torch.ones_like(center)
            self.witness.look(tile, mine, p, (still, still, torch.zeros_like(still)), center, still)

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
        part = tile.part
        self.center[part], self.unit[part] = center, unit
        for moments in (self.seen, self.left):
            moments[:, part] = torch.stack(move_moments(*moments[:, part], *motion))
        self.seen[:, part] += products(x, y, self.scratch)
        least = least_kept(self.problem, term_norms(self.seen, self.center, self.unit), self.unit.numel()) * unit
        size = torch.addcmul(x, center[:, None], y, value=-1, out=self.scratch.like(x, "size")).abs_()
        size = torch.maximum(size, torch.abs(x, out=self.scratch.like(x, "mixed")), out=size)  # the center may move
        size.mul_(1 / least[:, None])
        kept = torch.stack([~(part.amax(0) < 1) for part in size.split(BLOCK)])  # a NaN keeps
        first = part.start // BLOCK
        self.flags[first : first + len(kept), tile.chunk.span] |= kept
        left = ~kept
        for z in (x, y):
            for rows, mine in zip(z.split(BLOCK), left):
                rows.mul_(mine)
        self.left[:, part] += products(x, y, self.scratch)

    def settle(self, motion, center, unit):
        """What more entries, looked at elsewhere, make of these."""
        self.seen, self.left = (torch.stack(move_moments(*m, *motion)) for m in (self.seen, self.left))
        self.center, self.unit = center, unit

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


def products(x, y, scratch):
    """(3, n): sums of x^2, x y, y^2 over the columns."""
    mixed = torch.mul(x, y, out=scratch.like(x, "mixed")).sum(1)
    xx, yy = (torch.linalg.vector_norm(z, dim=1).square() for z in (x, y))
    return torch.stack((xx, mixed, yy))


def log_ratios(known, z, other, scratch):
    """-> log p of the student, its difference to the teacher's, and the teacher's: (n, C) each.

    The first and the last over the tiles' memory; none is made of the others, for one may be -1e30. known: of these
    rows.
    """
    z -= known.peak[:, None]
    other -= known.other_peak[:, None]
    delta = torch.sub(z, other, out=scratch.like(z, "delta")).sub_(known.gap[:, None])
    return z.sub_(known.offset[:, None]), delta, other.add_((known.gap - known.offset)[:, None])


def logits_gradient(problem, z, bias, index, other, stats, grad, scratch=None):
    """d loss / d the student's raw logits of one tile, over z's memory.

    With delta = log p_s - log p_t: p_s (delta - KL) for KL(s || t), p_s - p_t for KL(t || s), and for the mixture
    p_s (a - E_s[a]), a = (1 - beta) log(p_s / m).

    Args:
        z: (n, C) raw. other: (n, C) transformed, overwritten. stats: (8, n). grad: (n,) of the divergences.
        scratch: :class:`Scratch` of many tiles, or None.
    """
    inv_temperature = row_inverse_temperature(problem, index)
    chain = problem.params.logit_scale * (1.0 if inv_temperature is None else inv_temperature)
    z, slope = transform(problem, z, bias, inv_temperature, with_slope=True)
    known, scratch = PairStats(*stats), Scratch() if scratch is None else scratch
    log_p, delta, log_q = log_ratios(known, z, other, scratch)
    if problem.beta == 0.0:
        dz = differences(dense.exp_(log_p), dense.exp_(log_q), delta, scratch).neg_()
    else:
        if problem.is_mixture:
            delta = mixture_logs(delta, problem.beta, scratch)[0].mul_(1.0 - problem.beta)
        dz = delta.sub_(known.center[:, None]).mul_(dense.exp_(log_p))
    dz = dz.mul_(grad[:, None] * chain)
    dz = z.copy_(dz if slope is None else dz.mul_(slope))
    return dense.without_denormals(dz)
