"""Divergences of two models' whole distributions in plain torch: tiles of both logits, folded and differentiated.

A Kullback-Leibler divergence takes one pass over the vocabulary, a mixture's (JSD) a second one, for which both
log-sum-exps must be known. ``fastgrpo/pair_math.py`` has the rows' formulas.
"""

from dataclasses import replace

import torch

from fastgrpo.backends import dense
from fastgrpo.backends.logits import LogitTiles, Reader, RowSource, row_inverse_temperature, transform
from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.problem import FLOOR, RowStats
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import NEAR, finish_sums, mixture_logs, move_peaks


def forward(problem):
    """(8, N) :class:`PairStats` of a :class:`fastgrpo.backends.pair.PairProblem`, 0 at rows that do not count."""
    stats = new_stats(problem)
    rows = dense.counted_rows(problem.targets)
    fold = start_fold(problem, rows)
    for tile, other in pair_tiles(problem, rows):
        fold.add(tile, other)
    stats[:, rows] = torch.stack(fold.finish())
    return stats


def new_stats(problem):
    n, dtype = problem.targets.numel(), accumulator_dtype(problem.hidden)
    return torch.zeros(len(PairStats._fields), n, dtype=dtype, device=problem.hidden.device)


def start_fold(problem, rows):
    return MixtureFold(problem, rows) if problem.is_mixture else KLFold(problem, rows)


def pair_tiles(problem, rows):
    """The student's :class:`fastgrpo.backends.logits.Tile` of transformed logits and the teacher's (n, C) beside it."""
    tiles, teacher = LogitTiles(problem, rows, buffers=problem.tiles_alive), Teacher(problem, rows)
    for tile in tiles:
        yield tile, teacher.logits(tile.part, tile.chunk.span)


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

    def logits(self, part, entries):
        """entries: a slice of the vocabulary, read once for rows that follow each other, or (C,) ids."""
        if self.span is None or entries is not self.span:
            self.span, self.entries = entries, self.reader.entries(entries)
        z = self.reader.raw_logits(self.source[part], self.entries, self.room(part, entries))
        bias = None if self.problem.bias is None else self.problem.bias[entries]
        return transform(self.problem, z, bias, row_inverse_temperature(self.problem, self.rows[part]))[0]

    def room(self, part, entries):
        """Memory for the product, the same for all tiles; None where the GEMM brings its own."""
        if self.reader.native:
            return None
        n, count = len(self.rows[part]), self.entries[0].shape[0]
        if self.buffer is None or self.buffer.numel() < n * count:
            self.buffer = self.source[part][0].new_empty(n * count)
        return self.buffer[: n * count].view(n, count)


class KLFold:
    """Folds tiles into the running sums of :mod:`fastgrpo.pair_math`."""

    def __init__(self, problem, rows):
        self.problem, self.student_first = problem, problem.beta == 1.0
        dtype, device = accumulator_dtype(problem.hidden), rows.device
        self.peaks = torch.full((2, rows.numel()), FLOOR, dtype=dtype, device=device)  # first, second
        self.sums = torch.zeros(4, rows.numel(), dtype=dtype, device=device)
        self.spread = torch.zeros(rows.numel(), dtype=dtype, device=device)  # of the student, with an entropy

    def add(self, tile, other):
        """Overwrites both tiles' logits."""
        part, pair = tile.part, (tile.z, other) if self.student_first else (other, tile.z)
        self.raise_peaks(part, *pair)
        u, v = (z.sub_(peak[part, None]) for z, peak in zip(pair, self.peaks))
        total, other_total, tilt, excess = (x[part] for x in self.sums)
        d = u - v
        far = d.abs() >= NEAR
        if self.problem.params.entropy:
            own = tile.z.clamp(min=dense.FAR)
            self.spread[part] -= (own * dense.exp_(own.clone())).sum(1)
        dense.exp_(u), dense.exp_(v)
        total += u.sum(1)
        other_total += v.sum(1)
        v.sub_(u)
        tilt += (u * d).sum(1)
        near = d.neg_().masked_fill_(far, 0.0).expm1_().mul_(u)
        excess += torch.where(far, v, near).sum(1)

    def raise_peaks(self, part, u, v):
        known = self.peaks[:, part]
        high = torch.maximum(known, torch.stack((u.amax(1), v.amax(1))))
        rise = high - known
        if self.problem.params.entropy:
            mine = 0 if self.student_first else 1
            self.spread[part] = torch.exp(-rise[mine]) * (self.spread[part] + rise[mine] * self.sums[mine, part])
        self.sums[:, part] = torch.stack(move_peaks(*self.sums[:, part], *rise))
        self.peaks[:, part] = high

    def finish(self):
        """The rows of :class:`PairStats`."""
        return kl_stats(self.peaks, self.sums, self.spread, self.student_first)


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


class MixtureFold:
    """The generalised JSD, both log-sum-exps known from a pass of each model alone."""

    def __init__(self, problem, rows):
        self.problem = problem
        own, other = (RowStats(*dense.forward(p)[:, rows]) for p in (problem.own, problem.teacher))
        none = torch.zeros_like(own.peak)
        self.stats = PairStats(
            divergence=none.clone(),
            peak=own.peak,
            offset=own.offset,
            norm=none,
            entropy=own.entropy,
            other_peak=other.peak,
            gap=own.offset - other.offset,
            center=none.clone(),
        )

    def add(self, tile, other):
        """Overwrites both tiles' logits."""
        log_p, delta = log_ratios(PairStats(*(x[tile.part] for x in self.stats)), tile.z, other)
        beta, part = self.problem.beta, tile.part
        log_s, log_t = mixture_logs(delta, beta)
        log_q = torch.sub(log_p, delta, out=delta)
        mine = dense.exp_(log_p).mul_(1.0 - beta).mul_(log_s)
        self.stats.center[part] += mine.sum(1)
        self.stats.divergence[part] += mine.add_(dense.exp_(log_q).mul_(beta).mul_(log_t)).sum(1)

    def finish(self):
        return self.stats


def log_ratios(known, z, other):
    """Over the tiles' memory: log p of the student, and its difference to the teacher's. known: of these rows."""
    z -= known.peak[:, None]
    other -= known.other_peak[:, None]
    delta = torch.sub(z, other, out=other).sub_(known.gap[:, None])
    return z.sub_(known.offset[:, None]), delta


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
    log_p, delta = log_ratios(known, z, other)
    if problem.beta == 0.0:
        far = delta.abs() >= NEAR
        log_q = (log_p - delta).clamp_(min=dense.FAR)
        p, near = dense.exp_(log_p), delta.neg_().masked_fill_(far, 0.0).expm1_().neg_()
        dz = torch.where(far, p - dense.exp_(log_q), near.mul_(p))
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


def solo(problem):
    """The student's and the teacher's problem, each on its own."""
    return problem.own, replace(problem.teacher, targets=problem.targets)
