"""Divergences of two models' whole distributions in plain torch: tiles of both logits, folded and differentiated.

A Kullback-Leibler divergence takes one pass over the vocabulary, a mixture's (JSD) a second one, for which both
log-sum-exps must be known. ``fastgrpo/pair_math.py`` has the rows' formulas.
"""

import math

import torch

from fastgrpo.backends import certified, dense
from fastgrpo.backends.certified import BLOCK
from fastgrpo.backends.logits import row_inverse_temperature, transform
from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.pair_tiles import Scratch, pair_tiles
from fastgrpo.backends.problem import FLOOR
from fastgrpo.backends.witness import Witness, complete, expect
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import NEAR, finish_sums, mixture_logs, move_peaks, move_terms, scale_terms
from fastgrpo.row_math import rescale

NOISE, NOTHING_SEEN = 9.0, 2.0**-20  # see near_rows


def forward(problem):
    """(8, N) :class:`PairStats` of a :class:`fastgrpo.backends.pair.PairProblem`, 0 at rows that do not count."""
    return run_forward(problem, dense.counted_rows(problem.targets), None)


def certified_forward(problem, hint=None, labels=None):
    """The statistics and a :class:`fastgrpo.backends.certified.Certificate` of d divergence / d logits.

    ``dropped`` is the norm of what a row leaves out, ``norm`` of the statistics that of all its terms, both for a
    divergence's gradient of 1.

    Args:
        hint, labels: (N,) log-probs that the student had of these entries, about; or None:
            see :class:`fastgrpo.backends.witness.Expected`.
    """
    rows = certified.sorted_rows(problem, hint)
    witness = Witness(problem, rows.numel(), rows.device)
    stats = run_forward(problem, rows, witness, expect(problem, rows, hint, labels))
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


def run_forward(problem, rows, witness, expected=None):
    dtype = accumulator_dtype(problem.hidden)
    fold = (
        MixtureFold(problem, know_both(problem, rows), witness)
        if problem.is_mixture
        else KLFold(problem, rows, witness, expected)
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
    partials[:, rows] = fold.partials()
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


def differences(u, v, d, scratch):
    """v - u of exponentials whose logs differ by -d: of d where that is small. Overwrites nothing it is given."""
    near = torch.clamp(d, -NEAR, NEAR, out=scratch.like(u, "near"))
    far = torch.ne(near, d, out=scratch.like(u, "far"))  # 0 or 1: bools and where take four times as long on a CPU
    near.neg_().expm1_().mul_(u)
    apart = torch.sub(v, u, out=scratch.like(u, "apart"))
    return torch.lerp(near, apart, far, out=near)


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


class LevelsFold:
    """Both log-sum-exps, and no divergence: what a mixture's terms want to know.

    Their rounding does not reach it: a mixture moves with one of them by that model's divergence from the mixture times
    as much. So nothing is summed from differences here.
    """

    student_first = True

    def __init__(self, problem, rows):
        self.entropy = problem.params.entropy
        dtype, device = accumulator_dtype(problem.hidden), rows.device
        self.peaks = torch.full((2, rows.numel()), FLOOR, dtype=dtype, device=device)
        self.totals, self.spreads = torch.zeros(2, 2, rows.numel(), dtype=dtype, device=device)

    def add(self, tile, other, rooms=(None, None)):
        """Overwrites both tiles' logits.

        Args:
            rooms: memory where the student's and the teacher's are to stay, as :func:`in_bits` of the peaks so far, or
                None twice.
        """
        part, pair = tile.part, (tile.z, other)
        known, high = self.peaks[:, part], torch.stack([z.amax(1) for z in pair])
        high = torch.maximum(known, high)
        totals, spreads, _ = rescale(known, self.totals[:, part], self.spreads[:, part], high)
        into = [z if room is None else room for z, room in zip(pair, rooms)]
        beside = [torch.sub(z, peak[:, None], out=room) for z, peak, room in zip(pair, high, into)]
        if self.entropy:
            spreads[0] += spread_of(beside[0])
        masses = [torch.exp2(in_bits(z), out=made).sum(1) for z, made in zip(beside, pair)]
        self.peaks[:, part], self.spreads[:, part] = high, spreads
        self.totals[:, part] = totals + torch.stack(masses)

    def partials(self):
        """(7, n) of :func:`divergence_partials`, the student first; no tilt."""
        own, other = self.totals
        return torch.stack((*self.peaks, own, other, torch.zeros_like(own), other - own, self.spreads[0]))

    def finish(self):
        """The rows of :class:`PairStats`, the divergence's aside."""
        return level_stats(self.peaks, self.partials()[2:6], self.spreads[0], self.student_first)


class KLFold:
    """Folds tiles into the running sums of :mod:`fastgrpo.pair_math`.

    Args:
        witness: sees the terms of every row's gradient, see :class:`Witness`; None: nobody. expected: of the rows.
    """

    def __init__(self, problem, rows, witness=None, expected=None):
        self.problem, self.student_first = problem, problem.beta == 1.0
        self.witness, self.expected = witness, expected
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
            self.spread[part] += spread_of(tile.z)
        x, y = rooms_of(self.witness, u)
        d = torch.sub(u, v, out=self.scratch.like(u, "d"))
        u, v = dense.exp_(u, out=y), dense.exp_(v)
        leant = torch.mul(d, u, out=self.room("leant", u, x if self.student_first else None))
        sums = self.sums[:, part]
        mass, other_mass = u.sum(1), v.sum(1)
        sums[0] += mass
        sums[1] += other_mass
        sums[2] += leant.sum(1)
        near = near_rows(leant, d, mass, sums[0], self.scratch)
        apart = None
        if self.witness is not None and not self.student_first:
            apart = torch.sub(v, u, out=self.room("difference", u, x))
        sums[3] += sum_differences(u, v, d, near, other_mass - mass, apart, self.scratch)
        if self.witness is not None:
            motion = move_terms(*rise, self.student_first)
            frames = self.frames(part) if self.witness.chooses else (None, None)
            self.witness.look(tile, leant if apart is None else apart, u, motion, *frames)

    def room(self, key, like, room):
        return self.scratch.like(like, key) if room is None else room

    def frames(self, part):
        """-> center and unit of the rows' terms, of the entries so far; the same as they are to be expected."""
        sums = self.sums[:, part]
        frame = scale_terms(*sums, self.student_first)
        if self.expected is None:
            return frame, frame
        later = complete(self.expected.of(part), self.peaks[:, part], sums, self.student_first)
        return frame, scale_terms(*later, self.student_first)

    def raise_peaks(self, part, u, v):
        """-> (2, n) by how much."""
        known = self.peaks[:, part]
        high = torch.maximum(known, torch.stack((u.amax(1), v.amax(1))))
        rise = high - known
        *sums, self.spread[part] = beside_peaks(self.partials(part), high, self.student_first)
        self.sums[:, part] = torch.stack(sums)
        self.peaks[:, part] = high
        return rise

    def partials(self, part=slice(None)):
        """(7, n) of :func:`divergence_partials`."""
        return torch.cat((self.peaks[:, part], self.sums[:, part], self.spread[None, part]))

    def finish(self):
        """The rows of :class:`PairStats`."""
        stats = kl_stats(self.peaks, self.sums, self.spread, self.student_first)
        return stats if self.witness is None else stats._replace(norm=self.witness.row_norms())


def spread_of(z):
    """(n,) a tile's part of an entropy's sum. z: (n, C) beside the peaks."""
    z = z.clamp(min=dense.FAR)
    return -(z * dense.exp_(z.clone())).sum(1)


def rooms_of(witness, like):
    """-> memory that the witness wants the terms x and y of a tile in, or None twice."""
    return (None, None) if witness is None else witness.rooms(like.shape)


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
    levels = LevelsFold(problem, rows)
    fold_vocabulary(problem, rows, levels)
    return levels.finish()


def level_stats(peaks, sums, spread, student_first):
    """:func:`kl_stats` with what they tell of both models alone: a mixture's divergence and center are summed later."""
    none = torch.zeros_like(spread)
    return kl_stats(peaks, sums, spread, student_first)._replace(divergence=none, center=none.clone())


def split_sides(delta, beta, scratch):
    """What :func:`fastgrpo.pair_math.mixture_logs` takes, over delta and in kept memory: ``where`` takes many times as
    long on a CPU."""
    share = beta
    if beta != 0.5:
        share = torch.sign(delta, out=scratch.like(delta, "share")).mul_(beta - 0.5).add_(0.5)
    above = torch.clamp(delta, min=0.0, out=scratch.like(delta, "above"))
    below = delta.clamp_(max=0.0)
    return above, below, torch.sub(below, above, out=scratch.like(delta, "apart")), share


# Of e^z, z in bits beside its row's peak: that even times its log is negligible, so many bits below that; and how far
# such a z may sink until e^z is denormal.
DEEPER, SINKS = 8, 12


def in_bits(z):
    """z, beside its row's peak, in units of log 2 and no lower than matters: exp2 is quick then. In place."""
    return z.mul_(dense.LOG2_E).clamp_(min=lowest_bits(z.dtype))


def lowest_bits(dtype):
    return math.log2(dense.negligible(dtype)) - DEEPER


class MixtureFold:
    """The generalised JSD. stats: of the rows, both log-sum-exps known."""

    def __init__(self, problem, stats, witness=None):
        self.problem, self.stats, self.witness, self.scratch = problem, stats, witness, Scratch()
        self.mass = torch.zeros_like(stats.divergence)  # of the student's entries so far

    def add(self, tile, other, beside=None):
        """Overwrites both tiles' logits.

        Args:
            beside: (2, n) the student's and the teacher's peaks that both are :func:`in_bits` of already, or None.
        """
        part, beta = tile.part, self.problem.beta
        known = PairStats(*(x[part] for x in self.stats))
        peaks = (known.peak, known.other_peak)
        logs = known.offset, known.offset - known.gap  # of both models' sums, beside the peaks
        if beside is None:
            for z, peak in zip((tile.z, other), peaks):
                in_bits(z.sub_(peak[:, None]))
        else:
            logs = [log + (peak - before) for log, peak, before in zip(logs, peaks, beside)]
        log_p, log_q = (sink(z, log * dense.LOG2_E) for z, log in zip((tile.z, other), logs))
        delta = torch.sub(log_p, log_q, out=self.scratch.like(log_p, "delta")).mul_(math.log(2.0))
        log_s, minus_log_t = mixture_logs(*split_sides(delta, beta, self.scratch))
        x, y = rooms_of(self.witness, delta)
        p, q = torch.exp2(log_p, out=log_p if y is None else y), log_q.exp2_()
        theirs = minus_log_t.mul_(q)  # first: x may be in q's memory
        mine = torch.mul(log_s.mul_(1.0 - beta), p, out=log_s if x is None else x)
        self.stats.center[part] += mine.sum(1)
        self.stats.divergence[part] += torch.sub(mine, theirs, alpha=beta, out=theirs).sum(1)
        if self.witness is not None:
            still = torch.ones_like(known.center)
            frame = self.frame(part, p) if self.witness.chooses else None
            self.witness.look(tile, mine, p, (still, still, torch.zeros_like(still)), frame, frame)

    def frame(self, part, p):
        """-> center and unit of the rows' terms, of the entries so far."""
        self.mass[part] += p.sum(1)
        center = self.stats.center[part] / self.mass[part].clamp(min=dense.negligible(p.dtype))
        return center, torch.ones_like(center)

    def finish(self):
        return self.stats if self.witness is None else self.stats._replace(norm=self.witness.row_norms())


def sink(z, depth):
    """z (n, C) - depth (n,) in place, of :func:`in_bits`: an exp2 of it is not denormal."""
    z -= depth[:, None]
    if z.device.type != "cpu" or (depth > SINKS).any():
        z.clamp_(min=lowest_bits(z.dtype) - SINKS)
    return z


def log_ratios(known, z, other, scratch):
    """-> log p of the student, its difference to the teacher's, and the teacher's: (n, C) each.

    The first and the last over the tiles' memory; none is made of the others, for one may be -1e30. known: of these
    rows.
    """
    z -= known.peak[:, None]
    other -= known.other_peak[:, None]
    delta = torch.sub(z, other, out=scratch.like(z, "delta")).sub_(known.gap[:, None])
    return z.sub_(known.offset[:, None]), delta, other.sub_((known.offset - known.gap)[:, None])


def logits_gradient(problem, z, bias, index, other, stats, grad, scratch=None):
    """d loss / d the student's raw logits of one tile, over z's memory.

    With delta = log p_s - log p_t: p_s (delta - KL) for KL(s || t), p_s - p_t for KL(t || s), and for the mixture
    p_s (a - E_s[a]), a = (1 - beta) log(p_s / m).

    Args:
        z: (n, C) raw. other: (n, C) transformed, overwritten. stats: (8, n). grad: (n,) of the divergences.
        scratch: :class:`Scratch` of many tiles, or None.
    """
    z, slope = transform(problem, z, bias, row_inverse_temperature(problem, index), with_slope=True)
    known, scratch = PairStats(*stats), Scratch() if scratch is None else scratch
    log_p, delta, log_q = log_ratios(known, z, other, scratch)
    if problem.beta == 0.0:
        dz = differences(dense.exp_(log_p), dense.exp_(log_q), delta, scratch).neg_()
    else:
        if problem.is_mixture:
            delta = mixture_logs(*split_sides(delta, problem.beta, scratch))[0].mul_(1.0 - problem.beta)
        dz = delta.sub_(known.center[:, None]).mul_(dense.exp_(log_p))
    dz = dz.mul_((grad * problem.chain(index))[:, None])
    dz = z.copy_(dz if slope is None else dz.mul_(slope))
    return dense.without_denormals(dz)
