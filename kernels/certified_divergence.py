"""The certified forward of divergences: which entries matter to a row's gradient, and what it leaves out without them.

What matters is known only beside a row's sums. The vocabulary is therefore gone over in legs, each with what the legs
before have summed; the first ones are short. The certificate holds whatever is flagged.
"""

import torch

from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.witness import Expected, certain_norms, complete, least_kept, left_out, term_norms
from fastgrpo.kernels.arguments import Selection
from fastgrpo.kernels.divergence import (
    FLOOR,
    MIXED,
    MOMENTS,
    SUMS,
    Leg,
    PairSweep,
    combine,
    in_rows,
    kernel_name,
    know_both,
    new_stats,
    set_sums,
)
from fastgrpo.kernels.flags import certificate, new_flags
from fastgrpo.kernels.forward import label_logits
from fastgrpo.kernels.grids import vocabulary_runs
from fastgrpo.kernels.row_order import order_rows
from fastgrpo.kernels.tiles import cdiv
from fastgrpo.pair_math import move_moments, scale_terms

LEGS = 8  # a leg is as long as all before it, but no longer than such a part of the vocabulary
FIRST_LEG = 64  # nor the first longer than such a part


def certified_forward(problem, hint=None, labels=None):
    """As :func:`fastgrpo.backends.divergence.certified_forward`; never waits for the device."""
    stats = know_both(problem) if problem.is_mixture else new_stats(problem)
    witness = run_forward(problem, stats, hint, labels)
    if problem.is_mixture:
        set_sums(stats, witness.selection, witness.known[: witness.sums])
    norms = in_rows(witness.row_norms()[None], witness.selection, 0.0)
    PairStats(*stats).norm.copy_(norms[0])
    return stats, witness.certificate(witness.selection.rows_ptr)


def certified_partials(problem, stats=None):
    """As :func:`fastgrpo.backends.divergence.certified_partials`; its rows are all, those that do not count last."""
    witness = run_forward(problem, new_stats(problem) if stats is None else stats)
    sums = in_rows(witness.known[: witness.sums], witness.selection, witness.nothing)
    return sums, witness.selection.rows_ptr, witness


def run_forward(problem, stats, hint=None, labels=None):
    """-> :class:`Witness` of all entries. stats: (8, N), of a mixture both log-sum-exps; of a KL out."""
    # flat rows first: they keep the most entries
    rows, _, count = order_rows(-PairStats(*stats).offset if problem.is_mixture else hint, problem.targets)
    witness, n = Witness(problem, Selection(rows, count, problem.targets), stats), problem.targets.numel()
    if n == 0:
        return witness
    if labels is not None and not problem.is_mixture:
        label, other = (label_logits(head, rows, count, labels) for head in (problem.own, problem.teacher))
        witness.expected = Expected(*(x[rows] for x in (label - hint, label, other)))
    sweep = PairSweep(problem, kernel_name(problem, certified=True), witness.selection)
    legs, kinds = cut_legs(sweep), len(witness.known)
    room = torch.empty(kinds * max(leg.runs for leg in legs) * n, dtype=torch.float32, device=stats.device)
    known_stats = stats if problem.is_mixture else None
    for span in sweep.chunks():
        for leg in legs:
            partials = room[: kinds * leg.runs * n].view(kinds, leg.runs, n)
            if leg.first:
                witness.raise_least(span)
            sweep.fold(span, leg, partials, known_stats, witness.flags, witness.later(), witness.least)
            witness.fold(partials, span)
    return witness


def cut_legs(sweep):
    """[:class:`Leg`] of a certified forward."""
    vocab, cols = sweep.problem.weight.shape[0], sweep.tile.cols
    count, first, legs = cdiv(vocab, cols), 0, []
    while first < count:
        size = max(min(first, cdiv(count, LEGS)), cdiv(count, FIRST_LEG))
        last = count if count - first < 3 * size // 2 else first + size
        entries = min(last * cols, vocab) - first * cols
        runs = vocabulary_runs(cdiv(sweep.x.shape[0], sweep.tile.rows), entries, sweep.tile, sweep.x.device)
        legs.append(Leg(first * cols, first * cols + entries, *runs))
        first = last
    return legs


class Witness:
    """What a certified forward knows of its rows while it goes over the vocabulary, by position.

    Attributes:
        flags: (blocks, words) int32. known: (kinds, N) sums and moments so far. least: (1,), see
        :func:`fastgrpo.backends.witness.least_kept`; 0, all is kept, before anything is known. nothing: (kinds, 1)
        sums of no entry. expected: :class:`fastgrpo.backends.witness.Expected` of all positions, or None.
    """

    def __init__(self, problem, selection, stats):
        self.problem, self.selection, self.stats = problem, selection, stats
        self.flags = new_flags(problem, kernel_name(problem, certified=True))
        self.sums = (MIXED if problem.is_mixture else SUMS).value
        self.nothing = stats.new_zeros(self.sums, 1)
        if not problem.is_mixture:
            self.nothing[:2] = FLOOR.value
        self.known = stats.new_zeros(self.sums + MOMENTS, stats.shape[1])
        self.known[: self.sums] = self.nothing
        self.least, self.settled, self.expected = stats.new_zeros(1), None, None

    def frame(self):
        """Center and unit of each row's terms, of what is known."""
        return self.frame_of(self.known) if self.settled is None else self.settled

    def frame_of(self, sums):
        if self.problem.is_mixture:
            return sums[1], torch.ones_like(sums[1])
        return scale_terms(*sums[2:6], self.problem.beta == 1.0)

    def later(self):
        """(kinds, N): what is known, its sums as they are to be expected in the end."""
        if self.expected is None:
            return self.known
        sums = self.known.clone()
        sums[2:6] = complete(self.expected, sums[:2], sums[2:6], self.problem.beta == 1.0)
        return sums

    @property
    def center(self):
        return self.frame()[0]

    def moments(self):
        """(2, 3, N): of all terms, of those not flagged."""
        return self.known[self.sums :].view(2, 3, -1)

    def inside(self):
        """(N,) bool: positions of rows that count."""
        return torch.arange(self.known.shape[1], device=self.known.device) < self.selection.count_ptr

    def fold(self, partials, span):
        """partials: (kinds, runs, N) of one leg, of the rows of ``span``."""
        if self.problem.is_mixture:
            here = slice(*span)
            self.known[:, here] += torch.where(self.inside()[here], partials[:, :, here].sum(1), 0.0)
        else:
            combine(self.problem, partials, self.selection, self.stats, span, self.known)

    def raise_least(self, span):
        """Of the rows of ``span``."""
        here, center, unit = slice(*span), self.frame()[0], self.frame_of(self.later())[1]
        norms = term_norms(self.moments()[0, :, here], center[here], unit[here])
        count = self.inside()[here].sum().clamp(min=1)
        self.least = least_kept(self.problem, norms, count)[None]

    def settle(self, motion, center, unit):
        """As :meth:`fastgrpo.backends.witness.Witness.settle`'s."""
        for moments in self.moments():
            moments.copy_(torch.stack(move_moments(*moments, *motion)))
        self.settled = center, unit

    def row_norms(self):
        return certain_norms(self.moments()[0], *self.frame())

    def certificate(self, rows):
        dropped = torch.where(self.inside(), left_out(self.moments()[1], *self.frame()), 0.0)
        return certificate(self.problem, kernel_name(self.problem, certified=True), rows, self.flags, dropped)
