"""The certified backward: only the columns that matter, with a proof of what was left out.

The forward sorts the rows, keeps one flag per (block of rows, column), "some row has p >= cutoff here", and sums for
every row the probability mass outside its block's flagged columns: its certificate. The backward recomputes the flagged
logits of each group of blocks with ordinary GEMMs; rows whose certificate is too large keep all columns. How much a row
leaves out is known; it is put back as if spread evenly over the columns left out, which removes the part of the error
that adds up (the columns share a direction). Bad hints cost time, never correctness.
"""

import math
from dataclasses import dataclass, replace

import torch

from fastgrpo.backends import dense, row_audit
from fastgrpo.backends import plan as planning
from fastgrpo.backends.problem import FLOOR, RowStats, column_sum, new_gradients
from fastgrpo.inputs import IGNORE, accumulator_dtype
from fastgrpo.row_math import rescaled

BLOCK = 128  # rows that share their flags
CUTOFF_PER_TOLERANCE = 2.0**-7  # columns of p >= tolerance * this are flagged
HINT_SLACK = 1.4  # nats by which a hint may fall short: the cutoff is then at most 4 times too high
CROWDED = 0.9  # share of a tile's flags from which on all are set: nothing is left out, nothing has to be summed
TRUSTED = (1e-20, 1e30)  # range of a row's sum of exp in which the guessed shift was good enough


@dataclass(frozen=True)
class Certificate:
    order: torch.Tensor  # (n,) int64, alike rows next to each other; ignored ones left out or last
    flags: torch.Tensor  # (ceil(n / block), V) bool, columns kept
    dropped: torch.Tensor  # (n,) probability outside the flagged columns, of rows in this order
    block: int

    @property
    def tensors(self):
        return self.order, self.flags, self.dropped


def cutoff(tolerance):
    return tolerance * CUTOFF_PER_TOLERANCE


def forward(problem, hint=None):
    """Statistics as :func:`fastgrpo.backends.dense.forward`, and the certificate.

    Args:
        hint: (N,) log-probs <= 0 close to the current ones, or None. It orders the rows and places the cutoff; values
            do not depend on it.
    """
    stats = problem.new_stats(accumulator_dtype(problem.hidden))
    rows = sorted_rows(problem, hint)
    label = label_logits(problem, rows)
    fold = fold_vocabulary(problem, rows, label, hint)
    stats[:, rows] = dense.combine((fold.shift, fold.total, fold.spread), label)
    dropped = fold.certificate(stats[:, rows])
    repair(problem, stats, rows, dropped, fold.total)
    return stats, Certificate(rows, fold.flags, dropped, BLOCK)


def partial_forward(problem, label, hint=None):
    """What :func:`forward` combines, of a vocabulary's columns that other ranks hold the rest of.

    Args:
        label: (N,) logit of each row's label, wherever its column is: with the hint it places the cutoff.

    Returns:
        (4, N) of :meth:`HeadProblem.new_partials`, a guess in the peak's place, and a certificate whose ``dropped`` is
        still to be divided: a sum of exp(z - peak).
    """
    partials = problem.new_partials(accumulator_dtype(problem.hidden))
    rows = sorted_rows(problem, hint)
    fold = fold_vocabulary(problem, rows, label[rows], hint)
    partials[:, rows] = torch.stack((fold.shift, fold.total, fold.spread, label_logits(problem, rows)))
    return partials, Certificate(rows, fold.flags, fold.dropped, BLOCK)


def sorted_rows(problem, hint):
    """The counted rows, alike ones next to each other."""
    rows = dense.counted_rows(problem.targets)
    return rows if hint is None else rows[hint[rows].argsort(stable=True)]


def fold_vocabulary(problem, rows, label, hint):
    """-> the :class:`FlagFold` of all columns; label: (n,) of these rows."""
    fold = FlagFold(problem, label, None if hint is None else hint[rows], problem.targets[rows])
    fold_tiles(problem, rows, fold, buffers=2)
    return fold


def fold_tiles(problem, rows, fold, buffers):
    capped = fold.with_slope and problem.params.softcap is not None
    for z, slope, index, r, v, columns in dense.logit_tiles(problem, rows, buffers, capped, multiple=fold.block):
        fold.tile(z, slope, problem.targets[index] - v, r, v, columns)
        z = slope = None  # the last tile goes before the next one comes


def label_logits(problem, rows):
    """(n,) transformed logit of each row's label; NaN for an id outside the vocabulary."""
    return label_terms(problem, rows)[0]


def label_terms(problem, rows):
    """(2, n): :func:`label_logits`, and softcap's slope there, 1 without one."""
    reader, targets = dense.Reader(problem), problem.targets[rows]
    inside = (targets >= 0) & (targets < problem.weight.shape[0])
    safe = torch.where(inside, targets, 0)
    out = torch.ones(2, rows.numel(), dtype=reader.accumulate, device=rows.device)
    for part in torch.arange(rows.numel(), device=rows.device).split(min(dense.entries_at_once(problem), 1024)):
        z = reader.paired_logits(reader.rows(rows[part]), reader.columns(safe[part]))[:, None]
        bias = None if problem.bias is None else problem.bias[safe[part], None]
        z, slope = dense.transformed(problem, z, bias, dense.row_inverse_temperature(problem, rows[part]), True)
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

    def tile(self, z, slope, local, r, v, columns):
        """z: (blocks * block, C) logits, rows beyond the last one NOTHING; overwritten."""
        n = local.numel()
        part = slice(r, r + n)
        dense.take_label(z[:n], local, torch.empty_like(self.label[part]))
        if self.hint is None:
            self.raise_shift(z[:n], part, first=v == 0)
        z[:n] -= self.shift[part, None]
        kept = z.view(-1, self.block, z.shape[1]).amax(1) >= 0
        if self.problem.params.entropy:
            weighted = dense.exp_(z[:n].clamp_(min=dense.FAR).clone())
            self.spread[part] -= (z[:n] * weighted).sum(1)
        dense.exp_(z)
        self.total[part] += z[:n].sum(1)
        self.leave_out(z, slope, kept, r, v, columns)

    def leave_out(self, z, slope, kept, r, v, columns):
        """kept: (blocks, C) bool, where a block has an exponential of the cutoff or more."""
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
        moved = rescaled(self.shift[part], self.total[part], self.spread[part], shift)
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

    def leave_out(self, z, slope, kept, r, v, columns):
        flags = self.flags[r // BLOCK : r // BLOCK + len(kept), v : v + z.shape[1]]
        if z.device.type == "cpu" and kept.sum() > CROWDED * kept.numel():
            flags.fill_(True)
            return
        flags |= kept
        z.view(len(kept), BLOCK, -1).mul_(~flags[:, None, :])
        sums = z.sum(1)
        self.dropped[r : r + len(z)] += sums[: len(self.dropped) - r]


def keep_labels(flags, targets):
    """The label's column is always kept (column 0 for a label that another rank holds: harmless)."""
    blocks = torch.arange(targets.numel(), device=targets.device) // BLOCK
    flags[blocks, targets.clamp(0, flags.shape[1] - 1)] = True


def distrust(dropped, logp, hint):
    """A hint far below the log-prob it stands for has put the cutoff too high: such a row keeps all columns."""
    return dropped if hint is None else torch.where((logp - hint > HINT_SLACK) & (dropped > 0), torch.inf, dropped)


def untrusted(total):
    return ~((total > TRUSTED[0]) & (total < TRUSTED[1]))


def repair(problem, stats, rows, dropped, total):
    """Rows whose shift was so far off that their sums left the trusted range go through the plain forward."""
    bad = untrusted(total)
    if bad.any():
        targets = torch.full_like(problem.targets, IGNORE)
        targets[rows[bad]] = problem.targets[rows[bad]]
        stats[:, rows[bad]] = dense.forward(replace(problem, targets=targets))[:, rows[bad]]
        dropped[: len(bad)][bad] = torch.inf


def backward(problem, stats, certificate, grad_logp, needs):
    """Gradients as :func:`fastgrpo.backends.dense.backward`'s; the columns kept differ per row."""
    out = new_gradients(problem, needs)
    if not any(needs):
        return out
    plan = make_plan(problem, stats, certificate, grad_logp, needs)
    if not plan.groups:
        dense.add_exact_rows(problem, stats, plan.whole, [grad_logp], out)
        return out
    d_columns = out.of_head
    half = problem.within(problem.params.workspace // 2)
    if any(
        x is not None and x.dtype != stats.dtype for x in d_columns
    ):  # dW needs an fp32 sum of every chunk: all kinds of rows go through the vocabulary together
        quarter = half.within(half.params.workspace // 2)
        work = LeftOut(
            SparseRows(quarter, stats, plan.groups, grad_logp, out), TailRows(quarter, stats, plan, grad_logp)
        )
        dense.add_exact_rows(half, stats, plan.whole, [grad_logp], out, extra=work)
    else:
        dense.add_exact_rows(problem, stats, plan.whole, [grad_logp], out)
        work = LeftOut(SparseRows(half, stats, plan.groups, grad_logp, out), TailRows(half, stats, plan, grad_logp))
        work.add(slice(0, problem.weight.shape[0]), d_columns, out.bias)
    work.finish()
    return out


def make_plan(problem, stats, certificate, grad_logp, needs):
    """:class:`fastgrpo.backends.plan.Plan` of both gradients.

    Rows are left to their flagged columns within the tolerance; then the audit says which of them dW needs whole.
    """
    order, grad = certificate.order, grad_logp[certificate.order]
    active = (grad != 0) & (problem.targets[order] != IGNORE)
    sparse = within_tolerance(problem, RowStats(*stats).other_mass[order], grad, certificate.dropped, active)
    head_needs = any(needs.of_head) or bool(needs.bias)
    overhead = planning.overhead_rows(order.device, head_needs)
    plan = planning.plan_groups(certificate, active, sparse, overhead)
    if not plan.groups or not head_needs or problem.params.row_tolerance >= 1:
        return plan
    tail = row_audit.RowAudit(problem, stats, plan, grad_logp, needs).tail(problem.params.row_tolerance)
    vocab, gemms = problem.weight.shape[0], 2 + any(needs.of_rows)
    plan = plan.with_tails(tail, vocab, gemms)
    cost = plan.cells(vocab, gemms, overhead)
    everything = planning.exact(certificate, active)
    return plan if cost <= planning.WORTHWHILE * everything.cells(vocab, gemms) else everything


def within_tolerance(problem, other_mass, grad, dropped, active):
    """(n,) bool: the active rows that may leave out ``dropped``, those that lose least first.

    While ``sum((g dropped)^2) <= tolerance^2 sum((g (1 - p))^2)``: what a row leaves out has at most the norm ``g
    dropped``, and the label's entry alone is ``g (1 - p)``: the relative Frobenius error of dlogits is at most the
    tolerance.
    """
    norm = torch.where(active, grad * other_mass, 0.0).square().nansum()
    budget = problem.params.tolerance**2 * norm
    return active & planning.within_budget((grad * dropped).square(), budget, active)


class LeftOut:
    """The groups' rows: their kept columns, and for dW the tails of some."""

    def __init__(self, sparse, tails):
        self.sparse, self.tails = sparse, tails

    def add(self, span, d_columns, d_bias):
        self.sparse.add(span, d_columns, d_bias)
        self.tails.add(span, d_columns, d_bias)

    def finish(self):
        self.sparse.finish()


class TailRows:
    """Adds what the plan's tail rows leave out to the head's gradients, a range of columns at a time."""

    def __init__(self, problem, stats, plan, grad_logp):
        self.problem, self.stats, self.grad = problem, stats, grad_logp
        self.groups = [g for g in plan.groups if g.tail.any()]
        self.reader = dense.Reader(problem)
        parts = [g.rows[g.tail] for g in self.groups]
        self.rows = torch.cat(parts) if parts else plan.whole[:0]
        self.bounds = [0]
        for part in parts:
            self.bounds.append(self.bounds[-1] + part.numel())
        self.tile = dense.tiling(problem, self.rows.numel(), buffers=2)
        self.scale = dense.row_scale(grad_logp[self.rows]) if self.reader.native and parts else None
        cells = 0 if self.reader.native else min(self.tile.rows, self.rows.numel()) * self.tile.cols
        self.logits = stats.new_empty(cells)

    def add(self, span, d_columns, d_bias):
        """As :meth:`SparseRows.add`."""
        for v in range(span.start, span.stop if self.groups else span.start, self.tile.cols):
            chunk = slice(v, min(v + self.tile.cols, span.stop))
            inside = slice(chunk.start - span.start, chunk.stop - span.start)
            columns = self.reader.columns(chunk)
            for first in range(0, self.rows.numel(), self.tile.rows):
                totals = [None if x is None else x[inside] for x in (*d_columns, d_bias)]
                self.add_tile(first, chunk, columns, totals)

    def add_tile(self, first, chunk, columns, totals):
        *d_columns, d_bias = totals
        reader, problem = self.reader, self.problem
        rows = self.rows[first : first + self.tile.rows]
        factors, n, k = reader.rows(rows), rows.numel(), columns[0].shape[0]
        z = reader.raw_logits(factors, columns, None if reader.native else self.logits[: n * k].view(n, k))
        bias = None if problem.bias is None else problem.bias[chunk]
        grad = self.grad[rows] if self.scale is None else self.grad[rows] * self.scale
        label = problem.targets[rows] - chunk.start
        dz = dense.logits_gradient(problem, z, bias, rows, label, self.stats[:, rows], grad)
        self.hide_kept(dz, first, chunk)
        if d_bias is not None:
            d_bias += dense.unscaled(dz.sum(0), self.scale)
        if reader.native:
            dz = dz.to(reader.compute)
        for factor, (d_column, (x, _)) in enumerate(zip(d_columns, reader.gradient_operands(factors, columns))):
            if d_column is not None and self.scale is None:
                reader.add_mm(d_column, dz.t(), x)
            elif d_column is not None:
                d_column += reader.unscaled("low", dense.unscaled(reader.mm(dz.t(), x, None), self.scale), factor)

    def hide_kept(self, dz, first, chunk):
        """0 where the row's group keeps the column: that part is the group's."""
        for group, start, stop in zip(self.groups, self.bounds, self.bounds[1:]):
            mine = dz[max(start - first, 0) : max(stop - first, 0)]
            if mine.shape[0]:
                ends = torch.searchsorted(group.columns, torch.tensor([chunk.start, chunk.stop], device=dz.device))
                mine.index_fill_(1, group.columns[slice(*ends.tolist())] - chunk.start, 0.0)


class SparseRows:
    """Adds the groups' part of the gradients ``out``, a range of columns at a time."""

    def __init__(self, problem, stats, groups, grad_logp, out):
        self.problem, self.stats, self.grad = problem, stats, grad_logp
        self.reader = dense.Reader(problem)
        heads, ranks = self.reader.heads, [columns.shape[1] for _, columns in problem.factors]
        # of each factor whose rows have a gradient: the gradient, and the sum of all its columns
        self.sides = [
            (k, d_rows, stats.new_zeros(ranks[k])) for k, d_rows in enumerate(out.of_rows) if d_rows is not None
        ]
        depth = sum(head.shape[1] for head in heads)
        self.groups = [GroupSums(group, stats, depth, self.sides) for group in groups]
        counted = torch.where(problem.targets != IGNORE, grad_logp, 0.0)
        self.scale = dense.row_scale(counted) if self.reader.native else None
        # Fresh memory costs a page fault every 4 KiB, several times the gather itself: each buffer is made once.
        columns = max([g.piece(problem.params.workspace) for g in self.groups], default=0)
        cells = max([g.piece(problem.params.workspace) * g.rows.numel() for g in self.groups], default=0)
        self.kept = [torch.empty(columns, head.shape[1], dtype=head.dtype, device=stats.device) for head in heads]
        self.logits = stats.new_empty(0 if self.reader.native else cells)
        self.products = [stats.new_empty(0 if self.reader.native or d is None else columns, rank)
                         for d, rank in zip(out.of_head, ranks)]  # fmt: skip

    def add(self, span, d_columns, d_bias):
        """d_columns: of each factor (C, D), rows ``span`` of its gradient, d_bias (C,): added to, or None."""
        heads = [head[span] for head in self.reader.heads]
        for k, _, total in self.sides:
            total += column_sum(heads[k][:, : total.numel()], self.stats.dtype)
        for group in self.groups:
            for columns in group.pieces(span, self.problem.params.workspace):
                self.add_piece(group, columns, columns - span.start, heads, d_columns, d_bias)

    def add_piece(self, group, columns, local, heads, d_columns, d_bias):
        problem, reader, rows = self.problem, self.reader, group.rows
        n, k = rows.numel(), columns.numel()
        kept = [reader.cast_columns(factor, torch.index_select(h, 0, local, out=x[:k]))
                for factor, (h, x) in enumerate(zip(heads, self.kept))]  # fmt: skip
        factors = reader.rows(rows)
        z = reader.raw_logits(factors, kept, self.logits[: n * k].view(n, k) if self.logits.numel() else None)
        label = dense.label_positions(columns, problem.targets[rows])
        bias = None if problem.bias is None else problem.bias[columns]
        grad = self.grad[rows] if self.scale is None else self.grad[rows] * self.scale
        dz = dense.logits_gradient(problem, z, bias, rows, label, self.stats[:, rows], grad)
        if d_bias is not None:
            add_rows(d_bias, local, dense.unscaled(dz.sum(0), self.scale))
        if reader.native:
            dz = dz.to(reader.compute)
        operands = reader.gradient_operands(factors, kept)
        for (side, _, _), total, kept_sum in zip(self.sides, group.totals, group.kept_sums):
            kept_sum += operands[side][1].sum(0, dtype=self.stats.dtype)
            reader.add_mm(total, dz, operands[side][1])
        for side, (d_column, product) in enumerate(zip(d_columns, self.products)):
            if d_column is not None:
                gradient = dense.unscaled(reader.mm(dz.t(), operands[side][0], product[:k]), self.scale)
                add_rows(d_column, local, reader.unscaled("low", gradient, side))

    def left_out_of(self, group):
        """(n,) sum of each row's dlogits over the columns left out."""
        inverse = dense.row_inverse_temperature(self.problem, group.rows)
        inverse = inverse[:, 0] if isinstance(inverse, torch.Tensor) else 1.0 if inverse is None else inverse
        grad = self.grad[group.rows] if self.scale is None else self.grad[group.rows] * self.scale
        return -grad * group.dropped * inverse * self.problem.params.logit_scale

    def finish(self):
        """Put back what was left out as if spread evenly over the columns left out, and write dX."""
        vocab = self.problem.weight.shape[0]
        for group in self.groups:
            left_out = vocab - group.columns.numel()
            for (side, d_rows, all_columns), total, kept_sum in zip(self.sides, group.totals, group.kept_sums):
                # Through a softcap, whose slope differs by column, the sum of what was left out is not known.
                if left_out and self.problem.params.softcap is None:
                    total.addr_(self.left_out_of(group), (all_columns - kept_sum) / left_out)
                total = self.reader.unscaled("up", dense.unscaled(total, self.scale), side)
                d_rows.flatten(0, 1).index_copy_(0, group.rows, total.to(d_rows.dtype))


class GroupSums:
    """A :class:`fastgrpo.backends.plan.RowGroup` and its part of dX, under way."""

    def __init__(self, group, stats, depth, sides):
        self.rows, self.columns, self.dropped, self.depth = group.rows, group.columns, group.dropped, depth
        self.totals = [stats.new_zeros(group.rows.numel(), columns.numel()) for _, _, columns in sides]
        self.kept_sums = [torch.zeros_like(columns) for _, _, columns in sides]

    def pieces(self, span, workspace):
        """The group's columns inside the span, in pieces whose gathered rows and logits fit half the workspace."""
        columns = self.columns
        if span.start > 0 or span.stop <= int(columns[-1]):
            bounds = torch.tensor([span.start, span.stop], device=columns.device)
            first, last = torch.searchsorted(columns, bounds).tolist()
            columns = columns[first:last]
        return [c for c in columns.split(self.piece(workspace)) if c.numel()]

    def piece(self, workspace):
        """How many columns at once: gathered, cast and multiplied, and their logits, in half the workspace."""
        cell = self.dropped.element_size() * (3 * self.depth + 2 * self.rows.numel())
        return min(max(workspace // 2 // cell, 16), self.columns.numel())


def add_rows(destination, index, value):
    """destination[index] += value for indices that do not repeat. On a GPU index_add_ would use atomics."""
    if value.device.type == "cpu":
        destination.index_add_(0, index, value)
    else:
        destination.index_copy_(0, index, destination.index_select(0, index) + value)
