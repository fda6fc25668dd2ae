"""The gradient of a frozen head: made in the forward, where the logits are, and only scaled in the backward.

With the label kept apart, ``d logp / d hidden = chain (1 - p_y) (s_y W_y - E[s_v W_v])``: E over the other entries, s
softcap's slope. E is summed beside the running softmax, so that forward and backward take two GEMMs. With a tolerance
a block of rows adds, of each tile, either every vocabulary entry or those of p >= cutoff alone; what a row leaves out
is summed as its certificate, and rows that leave out too much are done again by the backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgrpo.backends import certified, certified_backward, dense, dense_backward, grouping, products
from fastgrpo.backends.logits import LogitTiles, Reader, pairs_at_once
from fastgrpo.backends.problem import RowStats, active_rows, new_gradients, sum_entries
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.row_math import direction_factors

# What adding a few entries alone costs whatever their number, in entries; and where oneDNN multiplies. Measured.
ONE_SPAN, ONE_SPAN_ONEDNN = 96, 400
SHARE = 0.7  # of the error budget that the forward spends, before it knows the rows' gradients


class Slopes(NamedTuple):
    """d logp / d hidden of the rows that may have a gradient."""

    rows: torch.Tensor | None  # (n,) int64, rows of the flattened hidden; None: all
    values: torch.Tensor  # (n, D) in the accumulator's dtype
    dropped: torch.Tensor | None  # (n,) probability that a row's value leaves out; None: nothing


def applies(hidden, head, params):
    """Whether hidden alone wants a gradient and the backend makes it in the forward. head: (weight, bias, A, B)."""
    weight, bias, lora_a, _ = head
    trained = any(x is not None and x.requires_grad for x in (weight, bias))
    alone = torch.is_grad_enabled() and hidden.requires_grad and not trained and lora_a is None
    return alone and (params.backend == "torch" or params.tolerance is None)


def forward(problem, hint=None, moving=None):
    """-> statistics as :func:`fastgrpo.backends.dense.forward`'s, :class:`Slopes`.

    Args:
        hint: (N,) as :func:`fastgrpo.backends.certified.forward`'s. moving: (N,) bool, rows whose log-prob may have a
            gradient; None: all. A row that is not and has one all the same costs more time, nothing else.
    """
    if leaves_out(problem):
        rows, label = certified.labelled_rows(problem, hint)
    else:
        rows, label = dense.counted_rows(problem.targets), None
    count = rows.numel()
    if moving is not None:
        order = (~moving[rows]).to(torch.int8).argsort(stable=True)
        rows, label = rows[order], None if label is None else label[order]
        count = int(moving[rows].sum())
    stats, sums = problem.new_stats(accumulator_dtype(problem.hidden)), Sums(problem, rows[:count])
    if label is None:
        dropped = exact_forward(problem, rows, sums, stats)
    else:
        dropped = certified_forward(problem, rows, label, sums, stats, hint)
    return stats, Slopes(rows[:count], sums.values, dropped)


def leaves_out(problem):
    return problem.params.tolerance is not None and not Reader(problem).native


def slopes_like(problem):
    """(shape, dtype) of each of the :class:`Slopes` of :func:`forward`, at the most rows; None of one that is None."""
    n, _, depth = problem.sizes
    accumulate = accumulator_dtype(problem.hidden)
    dropped = ((n,), accumulate) if leaves_out(problem) else None
    return ((n,), torch.int64), ((n, depth), accumulate), dropped


def exact_forward(problem, rows, sums, stats):
    running, label = dense.start_running(problem, rows)
    for tile in LogitTiles(problem, rows, buffers=2 + sums.capped, with_slope=sums.capped):
        local = problem.targets[tile.rows] - tile.chunk.span.start
        weights, decay = dense.fold_tile(tile.z, local, running[:, tile.part], label[tile.part], problem.params.entropy)
        sums.rescale(tile.part.start, decay)
        sums.add(tile.part.start, weights if tile.slope is None else weights.mul_(tile.slope), tile.chunk.entries[0])
        del weights  # they go before the next tile comes
    stats[:, rows] = dense.combine(running, label)
    sums.finish(running[1], stats)


def certified_forward(problem, rows, label, sums, stats, hint):
    """-> (n,) probability left out of each of the rows in ``sums``. label: (n,) their labels' logits."""
    fold = FrozenFold(problem, label, None if hint is None else hint[rows], sums)
    certified.fold_tiles(problem, rows, fold, buffers=2 + sums.capped)
    stats[:, rows] = dense.combine((fold.shift, fold.total, fold.spread), label)
    dropped = fold.certificate(stats[:, rows])
    sums.finish(fold.total, stats)
    certified.repair(problem, stats, rows, dropped, fold)
    return dropped[: len(sums.rows)]


class Sums:
    """Of each row the sum of vocabulary entries' rows of W times shifted exponentials; then d logp / d hidden."""

    def __init__(self, problem, rows):
        self.problem, self.rows, self.reader = problem, rows, Reader(problem)
        self.capped = problem.params.softcap is not None
        self.values = torch.zeros(
            rows.numel(), problem.weight.shape[1], dtype=self.reader.accumulate, device=rows.device
        )

    def here(self, first, count):
        """How many of ``count`` rows from ``first`` on are summed."""
        return min(max(len(self.rows) - first, 0), count)

    def rescale(self, first, decay):
        n = self.here(first, len(decay))
        self.values[first : first + n] *= decay[:n, None]

    def add(self, first, weights, entries):
        """weights: (m, k) of the rows from ``first`` on; entries: (k, D)."""
        n = self.here(first, len(weights))
        if n and weights.shape[1]:
            self.reader.add_mm(self.values[first : first + n], weights[:n].to(self.reader.operand), entries)

    def finish(self, total, stats):
        """total: (n,) the sum of all of a row's exponentials; stats: (5, N)."""
        problem, other_mass = self.problem, RowStats(*stats).other_mass[self.rows]
        at_label, at_others = direction_factors(problem.chain(self.rows), other_mass, total[: len(self.rows)])
        if self.capped:
            at_label = at_label * certified.label_terms(problem, self.rows)[1]
        targets = problem.targets[self.rows]
        ids = torch.where((targets >= 0) & (targets < problem.weight.shape[0]), targets, 0)
        at_once = pairs_at_once(problem)
        for part in (slice(i, i + at_once) for i in range(0, len(ids), at_once)):
            values = self.values[part]
            label = self.reader.cast(problem.weight[ids[part]]).to(values.dtype).mul_(at_label[part, None])
            values.mul_(-at_others[part, None]).add_(label)


class FrozenFold(certified.Fold):
    """Adds what matters of each tile to the sums: all of it, or a block's flagged entries, whichever costs less within
    the error budget, of which every tile has the part that its entries are of the vocabulary."""

    def __init__(self, problem, label, hint, sums):
        super().__init__(problem, label, hint)
        self.sums, self.vocab = sums, problem.weight.shape[0]
        self.overhead = grouping.overhead_rows(label, trained=False)
        self.one_span = ONE_SPAN_ONEDNN if products.makes_memory(label.device, label.dtype) else ONE_SPAN

    def rescale(self, first, decay):
        self.sums.rescale(first, decay)

    def leave_out(self, tile, kept):
        z, slope, r, entries = tile.z, tile.slope, tile.part.start, tile.chunk.entries[0]
        count = -(-self.sums.here(r, len(z)) // self.block)  # blocks with a row that is summed
        if not count:
            return
        whole, sparse = [], []
        for first, last, gathered in self.partition(kept[:count]):
            (sparse if gathered else whole).append(slice(first * self.block, last * self.block))
        flags = [kept[span.start // self.block : span.stop // self.block].any(0) for span in sparse]
        tails = [torch.mv(z[span], (~flag).to(z.dtype)) for span, flag in zip(sparse, flags)]
        affordable = self.affordable(sparse, tails, r, len(z), tile.chunk.span.stop)
        every = sum_entries(entries, z.dtype) if slope is None and any(affordable) else None
        for span, flag, tail, fits in zip(sparse, flags, tails, affordable):
            if not fits:
                whole.append(span)
                continue
            first, ids = r + span.start, flag.nonzero().squeeze(1)
            if every is not None:
                ids = F.pad(ids, (0, 1))  # room for what is left out, as if spread evenly
            piece, own = z[span].index_select(1, ids), entries.index_select(0, ids)
            if slope is not None:
                piece[: len(slope[span])] *= slope[span].index_select(1, ids)
            else:
                piece[:, -1] = tail
                own[-1] = (every - sum_entries(own[:-1], z.dtype)) / max(z.shape[1] - len(own) + 1, 1)
            self.sums.add(first, piece, own)
            self.dropped[first : r + span.stop] += tail[: len(self.dropped) - first]
        for span in merge_spans(whole):
            part = z[span] if slope is None else z[span][: len(slope[span])].mul_(slope[span])
            self.sums.add(r + span.start, part, entries)

    def partition(self, kept):
        """[(first block, last block, whether the flagged entries alone are added)], the cheapest."""
        counts = grouping.level_counts(kept, chunk=kept.shape[1])
        rows = [self.block] * len(kept)
        sizes = [(x + self.one_span).tolist() for x in counts]
        return grouping.best_partition(rows, sizes, self.overhead, kept.shape[1])[0]

    def affordable(self, spans, tails, r, rows, seen):
        """[bool]: those that leave out least, as many as the error budget of the ``seen`` first entries allows."""
        limit = SHARE * self.problem.params.tolerance / certified.cutoff(self.problem.params.tolerance)
        here = slice(r, r + rows)
        allowed = (limit * seen / self.vocab) ** 2 * self.other_mass(here).square().sum()
        budget, costs = allowed - self.dropped[here].square().sum(), []
        for span, tail in zip(spans, tails):
            before = self.dropped[r + span.start : r + span.stop]
            tail = tail[: len(before)]
            costs.append((tail * (tail + 2 * before)).sum())
        budget, *costs = torch.stack([budget, *costs]).tolist()
        fits = [False] * len(costs)
        for k in sorted(range(len(costs)), key=costs.__getitem__):
            budget -= costs[k]
            fits[k] = budget >= 0
        return fits

    def other_mass(self, span):
        """(n,) 1 - p of the label as far as it is known, an underestimate without a hint."""
        if self.hint is not None:
            return -torch.expm1(self.hint[span])
        return torch.nan_to_num(torch.sigmoid(self.shift[span] + self.total[span].log() - self.label[span]))


def merge_spans(spans):
    """Neighbouring slices as one."""
    found = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and found[-1].stop == span.start:
            found[-1] = slice(found[-1].start, span.stop)
        else:
            found.append(span)
    return found


def backward(problem, stats, slopes, grad_logp, needs):
    """Gradients as :func:`fastgrpo.backends.dense_backward.backward`'s."""
    out = new_gradients(problem, needs)
    d_hidden = out.hidden.flatten(0, 1)
    grad, whole = grad_logp, None
    if slopes.rows is not None:  # otherwise nothing is to be decided, nothing waited for
        grad, whole = affordable(problem, stats, slopes, grad_logp)
    at_once = pairs_at_once(problem)
    for part in (slice(i, i + at_once) for i in range(0, len(grad), at_once)):
        g = grad[part, None]
        scaled = torch.where(g != 0, slopes.values[part] * g, 0.0).to(d_hidden.dtype)
        if slopes.rows is None:
            d_hidden[part] = scaled
        else:
            d_hidden.index_copy_(0, slopes.rows[part], scaled)
    if whole is not None and whole.numel():
        dense_backward.add_exact_rows(problem, stats, whole, [grad_logp], out)
    return out


def affordable(problem, stats, slopes, grad_logp):
    """-> (n,) gradients of the rows whose slopes serve, 0 at the others; the rows that the exact backward does."""
    grad = grad_logp[slopes.rows]
    serves = grad != 0
    if problem.params.tolerance is None:
        serves = serves if slopes.dropped is None else serves & (slopes.dropped == 0)  # inf where there was no room
    elif slopes.dropped is not None:
        norms = problem.norms(stats)[slopes.rows]
        serves = certified_backward.within_tolerance(problem, norms, grad, slopes.dropped, serves)
    whole = active_rows(problem.targets, grad_logp)
    whole[slopes.rows] &= ~serves
    return torch.where(serves, grad, 0.0), whole.nonzero().squeeze(1)
