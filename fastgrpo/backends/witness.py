"""What matters of a divergence's gradient: flags of entries, norms of rows and of what they leave out.

``fastgrpo/pair_math.py`` has the terms' formulas.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from fastgrpo.backends import certified
from fastgrpo.backends.certified import BLOCK, Certificate
from fastgrpo.backends.pair_tiles import Scratch
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.pair_math import move_moments

LEAST_PER_TOLERANCE = 0.1  # terms of the rows' mean norm times tolerance * this are flagged
ROUNDING = 8  # units of rounding in sums of squares
FARTHEST = 30.0  # logs of ratios that a hint may tell: their exponentials' squares stay finite


class Expected(NamedTuple):
    """What is known of rows beforehand, (n,) each, NaN where nothing is: from a token that the student drew. What is to
    be kept is told by it, and no result depends on it."""

    level: torch.Tensor  # the student's log-sum-exp
    label: torch.Tensor  # its logit of the token
    other: torch.Tensor  # the teacher's

    def of(self, part):
        return Expected(*(x[part] for x in self))


def expect(problem, rows, hint, labels):
    """:class:`Expected` of some rows, or None; a mixture's log-sum-exps are known anyway."""
    if labels is None or problem.is_mixture:
        return None
    labelled = [replace(head, targets=labels) for head in (problem.own, problem.teacher)]
    label, other = (certified.label_logits(head, rows) for head in labelled)
    return Expected(label - hint[rows], label, other)


def complete(expected, peaks, sums, student_first):
    """-> (4, n) the sums that are to be expected in the end, beside these peaks: what the student's still lacks stands,
    as far as one can tell, at the token that it drew, for in the mean over such tokens it does."""
    level, *labels = expected
    own, labels = (0, labels) if student_first else (1, labels[::-1])
    lacks = torch.exp((level - peaks[own]).clamp(max=FARTHEST)) - sums[own]
    turn = labels[0] - peaks[0] - (labels[1] - peaks[1])
    lacks = torch.where((lacks > 0) & turn.isfinite(), lacks, 0.0)
    turn = turn.nan_to_num(nan=0.0).clamp(-FARTHEST, FARTHEST)
    first, second = (lacks, lacks * torch.exp(-turn)) if student_first else (lacks * torch.exp(turn), lacks)
    return sums + torch.stack((first, second, first * turn, second - first))


class Witness:
    """Sees every term of every row's gradient, see :mod:`fastgrpo.pair_math`: flags what matters, sums what does not.

    An entry is kept where one of its block's rows has a term that matters beside the rows' mean norm so far.

    Attributes:
        flags: (blocks, V) bool.
        chooses: whether entries are left out, for which it wants to know center and unit so far.
    """

    chooses = True

    def __init__(self, problem, n, device):
        dtype = accumulator_dtype(problem.hidden)
        self.problem, self.scratch = problem, Scratch()
        self.flags = torch.zeros(-(-n // BLOCK), problem.weight.shape[0], dtype=torch.bool, device=device)
        self.center, self.unit = torch.zeros(n, dtype=dtype, device=device), torch.ones(n, dtype=dtype, device=device)
        self.scale = torch.ones_like(self.unit)  # the unit that is to be expected
        self.seen, self.left = torch.zeros(2, 3, n, dtype=dtype, device=device)  # sums of x^2, x y, y^2

    def rooms(self, shape):
        """None twice: the terms may stand anywhere."""
        return None, None

    def look(self, tile, x, y, motion, frame, later):
        """x, y: (n, C), overwritten. motion: since these rows' last tile. frame: center and unit with this tile's
        entries. later: the same as they are to be expected in the end, which decides what is kept."""
        part, (center, unit) = tile.part, later
        self.center[part], self.unit[part] = frame
        for moments in (self.seen, self.left):
            moments[:, part] = torch.stack(move_moments(*moments[:, part], *motion))
        self.seen[:, part] += products(x, y, self.scratch)
        self.scale[part] = unit
        least = least_kept(self.problem, term_norms(self.seen, self.center, self.scale), self.scale.numel()) * unit
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
