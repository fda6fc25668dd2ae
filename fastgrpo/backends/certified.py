"""The certified forward: which entries matter, and what each row leaves out without the others.

The forward sorts the rows, keeps one flag per (block of rows, entry), "some row has p >= cutoff here", and sums for
every row the probability mass outside its block's flagged entries: its certificate. Bad hints cost time, never
correctness. The backward is in :mod:`fastgrpo.backends.certified_backward`.
"""

import math
from dataclasses import dataclass, replace

import torch

from fastgrpo.backends import dense
from fastgrpo.backends.logits import LogitTiles, Reader, pairs_at_once, row_inverse_temperature, transform
from fastgrpo.backends.problem import FLOOR, RowStats
from fastgrpo.inputs import IGNORE, accumulator_dtype
from fastgrpo.row_math import rescale

BLOCK = 128  # rows that share their flags
CUTOFF_PER_TOLERANCE = 2.0**-7  # entries of p >= tolerance * this are flagged
HINT_SLACK = 1.4  # nats by which a hint may fall short: the cutoff is then at most 4 times too high
CROWDED = 0.9  # share of a tile's flags from which on all are set: nothing is left out, nothing has to be summed
TRUSTED = (1e-20, 1e30)  # range of a row's sum of exp in which the guessed shift was good enough


@dataclass(frozen=True)
class Certificate:
    order: torch.Tensor  # (n,) int64, alike rows next to each other; ignored ones left out or last
    # (ceil(n / block), V) bool, entries kept; packed: (ceil(n / block), ceil(V / tile) * tile // 32) int32, column c of
    # tile t in bit c // W of word t * W + c % W, W = tile // 32
    flags: torch.Tensor
    dropped: torch.Tensor  # (n,) probability outside the flagged entries, of rows in this order
    block: int
    tile: int = 0  # entries whose flags share their words; 0: not packed

    @property
    def tensors(self):
        return self.order, self.flags, self.dropped

    def keeps(self, entries):
        """(C,) int64 -> (blocks, C) bool: whether each block keeps the entries."""
        if not self.tile:
            return self.flags.index_select(1, entries)
        words, column = self.tile // 32, entries % self.tile
        at = entries // self.tile * words + column % words
        return (self.flags.index_select(1, at) & bits(column // words)) != 0

    def last_keeping(self, alive):
        """1 + the last block that is alive and keeps the entry, 0 where none is: (K, V) int32.

        Packed flags are read to the end of their last tile: columns beyond V mean nothing.

        Args:
            alive: (K, blocks) bool.
        """
        width = self.flags.shape[1] * (32 if self.tile else 1)
        last = torch.zeros(len(alive), width, dtype=torch.int32, device=alive.device)
        for block, flags in enumerate(self.flags):
            last.masked_fill_(alive[:, block, None] & self.unpack(flags), block + 1)
        return last

    def unpack(self, flags):
        """Of one block: (V,) bool, packed up to the end of the last tile."""
        if not self.tile:
            return flags
        each = bits(torch.arange(32, device=flags.device))
        return ((flags.view(-1, 1, self.tile // 32) & each[:, None]) != 0).flatten()


def bits(index):
    """int32 with the bits ``index`` alone; bit 31 is the sign's."""
    return torch.bitwise_left_shift(torch.ones_like(index, dtype=torch.int32), index.to(torch.int32))


def cutoff(tolerance):
    return tolerance * CUTOFF_PER_TOLERANCE


def forward(problem, hint=None):
    """Statistics as :func:`fastgrpo.backends.dense.forward`, and the certificate.

    Args:
        hint: (N,) log-probs <= 0 close to the current ones, or None. It orders the rows and places the cutoff; values
            do not depend on it.
    """
    stats = problem.new_stats(accumulator_dtype(problem.hidden))
    rows, label = labelled_rows(problem, hint)
    fold = fold_vocabulary(problem, rows, label, hint)
    stats[:, rows] = dense.combine((fold.shift, fold.total, fold.spread), label)
    dropped = fold.certificate(stats[:, rows])
    repair(problem, stats, rows, dropped, fold)
    return stats, Certificate(rows, fold.flags, dropped, BLOCK)


def partial_forward(problem, label, hint=None):
    """What :func:`forward` combines, of a vocabulary's entries that other ranks hold the rest of.

    Args:
        label: (N,) logit of each row's label, wherever its entry is: with the hint it places the cutoff.

    Returns:
        (4, N) of :meth:`HeadProblem.new_partials`, a guess in the peak's place, and a certificate whose ``dropped`` is
        still to be divided: a sum of exp(z - peak).
    """
    partials = problem.new_partials(accumulator_dtype(problem.hidden))
    rows = sorted_rows(problem, label if hint is None else hint)
    fold = fold_vocabulary(problem, rows, label[rows], hint)
    partials[:, rows] = torch.stack((fold.shift, fold.total, fold.spread, label_logits(problem, rows)))
    return partials, Certificate(rows, fold.flags, fold.dropped, BLOCK)


def sorted_rows(problem, keys):
    """The counted rows by rising key, (N,) or None, so that alike ones stand next to each other."""
    rows = dense.counted_rows(problem.targets)
    return rows if keys is None else rows[keys[rows].argsort(stable=True)]


def labelled_rows(problem, hint):
    """-> the counted rows, alike ones next to each other, and their labels' logits, which order them without a hint:
    that of a sure token is high."""
    rows = sorted_rows(problem, hint)
    label = label_logits(problem, rows)
    if hint is not None:
        return rows, label
    order = label.argsort(stable=True)
    return rows[order], label[order]


def fold_vocabulary(problem, rows, label, hint):
    """-> the :class:`FlagFold` of all entries; label: (n,) of these rows."""
    fold = FlagFold(problem, label, None if hint is None else hint[rows], problem.targets[rows])
    fold_tiles(problem, rows, fold, buffers=2)
    return fold


def fold_tiles(problem, rows, fold, buffers):
    capped = fold.with_slope and problem.params.softcap is not None
    for tile in LogitTiles(problem, rows, buffers, with_slope=capped, multiple=fold.block):
        fold.tile(tile, problem.apart(tile.rows) - tile.chunk.span.start)


def label_logits(problem, rows):
    """(n,) transformed logit of each row's label; NaN for an id outside the vocabulary."""
    return label_terms(problem, rows)[0]


def label_terms(problem, rows):
    """(2, n): :func:`label_logits`, and softcap's slope there, 1 without one."""
    reader, targets = Reader(problem), problem.targets[rows]
    inside = (targets >= 0) & (targets < problem.weight.shape[0])
    safe = torch.where(inside, targets, 0)
    out = torch.ones(2, rows.numel(), dtype=reader.accumulate, device=rows.device)
    for part in torch.arange(rows.numel(), device=rows.device).split(min(pairs_at_once(problem), 1024)):
        z = reader.paired_logits(reader.rows(rows[part]), reader.entries(safe[part]))[:, None]
        bias = None if problem.bias is None else problem.bias[safe[part], None]
        z, slope = transform(problem, z, bias, row_inverse_temperature(problem, rows[part]), True)
        out[0, part] = z[:, 0]
        if slope is not None:
            out[1, part] = slope[:, 0]
    out[0] = torch.where(inside, out[0], torch.nan)
    return out


class Fold:
    """Folds tiles of logits, shifted by each row's threshold, into running sums and the mass left out."""

    block = BLOCK  # rows that are decided on together
    with_slope = True  # whether leave_out wants softcap's

    def __init__(self, problem, label, hint):
        self.problem, self.label, self.hint = problem, label, hint
        self.log_cutoff = math.log(cutoff(problem.params.tolerance))
        guess = label if hint is None else label - hint
        self.shift = torch.nan_to_num(guess, nan=0.0, posinf=0.0, neginf=FLOOR) + self.log_cutoff
        self.total, self.spread, self.dropped = torch.zeros(3, label.numel(), dtype=label.dtype, device=label.device)

    def tile(self, tile, local):
        """tile.z: (blocks * block, C), rows beyond the last NOTHING; overwritten. local: (n,) labels in the chunk,
        or (n, K) what is taken."""
        z, part = tile.z[: len(local)], tile.part
        dense.take_label(z, local, torch.empty_like(self.label[part]))
        if self.hint is None:
            self.raise_shift(z, part, first=tile.chunk.span.start == 0)
        z -= self.shift[part, None]
        kept = tile.z.view(-1, self.block, z.shape[1]).amax(1) >= 0
        if self.problem.params.entropy:
            weighted = dense.exp_(z.clamp_(min=dense.FAR).clone())
            self.spread[part] -= (z * weighted).sum(1)
        dense.exp_(tile.z)
        self.total[part] += z.sum(1)
        self.leave_out(tile, kept)

    def leave_out(self, tile, kept):
        """tile.z: the exponentials now. kept: (blocks, C) bool, where a block has one of the cutoff or more."""
        raise NotImplementedError

    def rescale(self, first, decay):
        """What is summed of the rows from ``first`` on is to be multiplied."""

    def certificate(self, stats):
        """(n,) probability that each row leaves out; inf where that is not to be trusted. stats: (5, n)"""
        rows = RowStats(*stats)
        return distrust(self.dropped / self.total * rows.other_mass, rows.logp, self.hint)

    def raise_shift(self, z, part, first):
        """Without a hint the running log-sum-exp serves: raise the shift to it, rescale the sums."""
        known = self.shift[part] + self.total[part].log()
        seen = torch.logaddexp(known, self.label[part].clamp(min=FLOOR))
        if first:
            seen = torch.maximum(seen, z.amax(1))
        shift = torch.fmax(self.shift[part], seen + self.log_cutoff)
        moved = rescale(self.shift[part], self.total[part], self.spread[part], shift)
        self.total[part], self.spread[part], decay = moved
        self.dropped[part] *= decay
        self.rescale(part.start, decay)
        self.shift[part] = shift


class FlagFold(Fold):
    """Keeps the flags and leaves out what is not flagged."""

    with_slope = False

    def __init__(self, problem, label, hint, targets):
        super().__init__(problem, label, hint)
        blocks, vocab = -(-label.numel() // BLOCK), problem.weight.shape[0]
        self.flags = torch.zeros(blocks, vocab, dtype=torch.bool, device=label.device)
        if blocks:
            keep_labels(self.flags, targets)

    def leave_out(self, tile, kept):
        z, first = tile.z, tile.part.start
        flags = self.flags[first // BLOCK : first // BLOCK + len(kept), tile.chunk.span]
        if z.device.type == "cpu" and kept.sum() > CROWDED * kept.numel():
            flags.fill_(True)
            return
        flags |= kept
        z.view(len(kept), BLOCK, -1).mul_(~flags[:, None, :])
        sums = z.sum(1)
        self.dropped[first : first + len(z)] += sums[: len(self.dropped) - first]


def keep_labels(flags, targets):
    """The label's entry is always kept (entry 0 for a label that another rank holds: harmless)."""
    blocks = torch.arange(targets.numel(), device=targets.device) // BLOCK
    flags[blocks, targets.clamp(0, flags.shape[1] - 1)] = True


def distrust(dropped, logp, hint):
    """A hint far below the log-prob it stands for has put the cutoff too high: such a row keeps all entries."""
    return dropped if hint is None else torch.where((logp - hint > HINT_SLACK) & (dropped > 0), torch.inf, dropped)


def find_untrusted(total, spread):
    """Where a sum is out of range, or was on its way here: the spread overflows first and stays NaN."""
    return ~((total > TRUSTED[0]) & (total < TRUSTED[1]) & spread.isfinite())


def repair(problem, stats, rows, dropped, fold):
    """Rows whose shift was so far off that their sums left the trusted range go through the plain forward."""
    bad = find_untrusted(fold.total, fold.spread)
    if bad.any():
        targets = torch.full_like(problem.targets, IGNORE)
        targets[rows[bad]] = problem.targets[rows[bad]]
        stats[:, rows[bad]] = dense.forward(replace(problem, targets=targets))[:, rows[bad]]
        dropped[: len(bad)][bad] = torch.inf
