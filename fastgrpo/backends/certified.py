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

from fastgrpo.backends import torch_backend as dense
from fastgrpo.backends.problem import FLOOR, NOTHING, column_sum, new_gradients
from fastgrpo.inputs import IGNORE, accumulator_dtype

BLOCK = 128  # rows that share their flags
CUTOFF_PER_TOLERANCE = 2.0**-7  # columns of p >= tolerance * this are flagged
MOSTLY_FLAT = 0.5  # share of rows over the tolerance from which on the exact path is cheaper
# What one more kept column of a group costs beside its GEMM (gather, scatter), in rows of GEMM; measured.
OVERHEAD_ROWS = {"cpu": 48, "cuda": 256}
LEVELS = 4  # groups of up to 2^LEVELS blocks
HINT_SLACK = 1.4  # nats by which a hint may fall short: the cutoff is then at most 4 times too high
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
    """Statistics as :func:`fastgrpo.backends.torch_backend.forward`, and the certificate.

    Args:
        hint: (N,) log-probs <= 0 close to the current ones, or None. It orders the rows and places the cutoff; values
            do not depend on it.
    """
    stats = problem.new_stats(accumulator_dtype(problem.hidden))
    rows = sorted_rows(problem, hint)
    label = label_logits(problem, rows)
    fold = fold_vocabulary(problem, rows, label, hint)
    stats[:, rows] = dense.combine((fold.shift, fold.total, fold.spread), label)
    dropped = distrust(fold.dropped / fold.total * stats[3, rows], stats[0, rows], None if hint is None else hint[rows])
    return repair(problem, stats, Certificate(rows, fold.flags, dropped, BLOCK), fold.total)


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
    """-> the :class:`Fold` of all columns; label: (n,) of these rows."""
    reader = dense.Reader(problem)
    n, (_, vocab, _) = rows.numel(), problem.sizes
    flags = torch.zeros(-(-n // BLOCK), vocab, dtype=torch.bool, device=label.device)
    fold = Fold(problem, label, None if hint is None else hint[rows], flags)
    if n == 0:
        return fold
    keep_labels(flags, problem.targets[rows])
    tile = dense.tiling(problem, n, buffers=2)
    height = -(-tile.rows // BLOCK) * BLOCK
    buffer = label.new_empty(min(height, flags.shape[0] * BLOCK), min(tile.cols, vocab))
    for v in range(0, vocab, tile.cols):
        columns = reader.columns(slice(v, v + tile.cols))
        bias = None if problem.bias is None else problem.bias[v : v + tile.cols]
        for r in range(0, n, height):
            index = rows[r : r + height]
            whole = buffer[: -(-index.numel() // BLOCK) * BLOCK, : columns[0].shape[0]]
            z = whole[: index.numel()]
            product = reader.raw_logits(reader.rows(index), columns, z)
            if product is not z:
                z.copy_(product)
            del product
            dense.transformed(problem, z, bias, dense.row_inverse_temperature(problem, index))
            whole[index.numel() :] = NOTHING
            fold.tile(whole, problem.targets[index] - v, r, v)
    return fold


def label_logits(problem, rows):
    """(n,) transformed logit of each row's label; NaN for an id outside the vocabulary."""
    reader = dense.Reader(problem)
    targets = problem.targets[rows]
    inside = (targets >= 0) & (targets < problem.weight.shape[0])
    safe = torch.where(inside, targets, 0)
    out = torch.empty(rows.numel(), dtype=reader.accumulate, device=rows.device)
    for part in torch.arange(rows.numel(), device=rows.device).split(min(dense.entries_at_once(problem), 1024)):
        z = reader.paired_logits(reader.rows(rows[part]), reader.columns(safe[part]))[:, None]
        bias = None if problem.bias is None else problem.bias[safe[part], None]
        out[part] = dense.transformed(problem, z, bias, dense.row_inverse_temperature(problem, rows[part]))[0][:, 0]
    return torch.where(inside, out, torch.nan)


class Fold:
    """Folds tiles of logits, shifted by each row's threshold, into running sums, flags and dropped mass."""

    def __init__(self, problem, label, hint, flags):
        self.log_cutoff = math.log(cutoff(problem.params.tolerance))
        self.entropy, self.flags, self.label = problem.params.entropy, flags, label
        guess = label if hint is None else label - hint
        self.guided = hint is not None
        self.shift = torch.nan_to_num(guess, nan=0.0, posinf=0.0, neginf=FLOOR) + self.log_cutoff
        self.total, self.spread, self.dropped = torch.zeros(3, label.numel(), dtype=label.dtype, device=label.device)

    def tile(self, z, local, r, v):
        """z: (blocks * BLOCK, C) logits, rows beyond the last one NOTHING; overwritten."""
        n, blocks = local.numel(), z.shape[0] // BLOCK
        part = slice(r, r + n)
        dense.take_label(z[:n], local, torch.empty_like(self.label[part]))
        if not self.guided:
            self.raise_shift(z[:n], part, first=v == 0)
        z[:n] -= self.shift[part, None]
        grouped = z.view(blocks, BLOCK, -1)
        kept = self.flags[r // BLOCK : r // BLOCK + blocks, v : v + z.shape[1]]
        kept |= grouped.amax(1) >= 0
        if self.entropy:
            weighted = dense.exp_(z[:n].clamp_(min=dense.FAR).clone())
            self.spread[part] -= (z[:n] * weighted).sum(1)
        dense.exp_(z)
        self.total[part] += z[:n].sum(1)
        grouped.mul_(~kept[:, None, :])
        self.dropped[part] += z[:n].sum(1)

    def raise_shift(self, z, part, first):
        """Without a hint the running log-sum-exp serves: raise the shift to it, rescale the sums."""
        known = self.shift[part] + self.total[part].log()
        seen = torch.logaddexp(known, self.label[part].clamp(min=FLOOR))
        if first:
            seen = torch.maximum(seen, z.amax(1))
        shift = torch.fmax(self.shift[part], seen + self.log_cutoff)
        step = shift - self.shift[part]
        decay = torch.exp(-step)
        self.spread[part] = (self.spread[part] + step * self.total[part]) * decay
        self.total[part] *= decay
        self.dropped[part] *= decay
        self.shift[part] = shift


def keep_labels(flags, targets):
    """The label's column is always kept (column 0 for a label that another rank holds: harmless)."""
    blocks = torch.arange(targets.numel(), device=targets.device) // BLOCK
    flags[blocks, targets.clamp(0, flags.shape[1] - 1)] = True


def distrust(dropped, logp, hint):
    """A hint far below the log-prob it stands for has put the cutoff too high: such a row keeps all columns."""
    return dropped if hint is None else torch.where(logp - hint > HINT_SLACK, torch.inf, dropped)


def untrusted(total):
    return ~((total > TRUSTED[0]) & (total < TRUSTED[1]))


def repair(problem, stats, certificate, total):
    """Rows whose shift was so far off that their sums left the trusted range go through the plain forward."""
    bad = untrusted(total)
    if bad.any():
        rows = certificate.order[bad]
        targets = torch.full_like(problem.targets, IGNORE)
        targets[rows] = problem.targets[rows]
        stats[:, rows] = dense.forward(replace(problem, targets=targets))[:, rows]
        certificate.dropped[bad] = torch.inf
    return stats, certificate


def backward(problem, stats, certificate, grad_logp, needs):
    """Gradients as :func:`fastgrpo.backends.torch_backend.backward`'s; the columns kept differ per row.

    Rows are left to their flagged columns, those that lose least first, while
    ``sum((g dropped)^2) <= tolerance^2 sum((g (1 - p))^2)``: what a row leaves out has at most the norm ``g dropped``,
    and the label's entry alone is ``g (1 - p)``: the relative Frobenius error of dlogits is at most the tolerance.
    """
    out = new_gradients(problem, needs)
    if not any(needs):
        return out
    order, grad = certificate.order, grad_logp[certificate.order]
    active = (grad != 0) & (problem.targets[order] != IGNORE)
    norm = torch.where(active, grad * stats[3, order], 0.0).square().nansum()
    sparse = active & within_budget((grad * certificate.dropped).square(), problem.params.tolerance**2 * norm, active)
    groups, whole = plan_groups(problem, certificate, active, sparse)
    kept = order[whole].sort().values
    if not groups:
        dense.add_exact_rows(problem, stats, kept, [grad_logp], out)
        return out
    d_columns = out[1::3]
    if any(
        x is not None and x.dtype != stats.dtype for x in d_columns
    ):  # dW needs an fp32 sum of every chunk: both kinds of rows go through the vocabulary together
        half = replace(problem, params=replace(problem.params, workspace=problem.params.workspace // 2))
        work = SparseRows(half, stats, groups, grad_logp, out)
        dense.add_exact_rows(half, stats, kept, [grad_logp], out, extra=work)
    else:
        dense.add_exact_rows(problem, stats, kept, [grad_logp], out)
        work = SparseRows(problem, stats, groups, grad_logp, out)
        work.add(slice(0, problem.weight.shape[0]), d_columns, out[2])
    work.finish()
    return out


def within_budget(costs, budget, active):
    """(n,) bool: the cheapest active rows whose costs together stay within the budget; a NaN never does.

    Summed as integers, so that the choice is the same on every run on every device.
    """
    one = 2**40
    share = torch.nan_to_num(costs / budget, nan=2.0, posinf=2.0).clamp(max=2.0)
    units = torch.where(active, (share.double() * one).ceil().to(torch.int64), 0)
    ranked, order = units.sort(stable=True)
    return torch.zeros_like(active).scatter_(0, order, ranked.cumsum(0) <= one)


def plan_groups(problem, certificate, active, sparse):
    """-> [(rows, columns, their dropped mass)] of each group; (n,) bool, the positions that keep all columns.

    Neighbouring blocks share a group where the union of their columns costs less than their own, and keep all columns
    where that costs less; the best partition of aligned runs of 1, 2, 4, ... blocks is found on the host from counts
    that are copied once.
    """
    flags = certificate.flags
    blocks, vocab = flags.shape
    per_block = torch.nn.functional.pad(sparse, (0, blocks * certificate.block - sparse.numel()))
    per_block = per_block.view(blocks, certificate.block).sum(1)
    counts = level_counts(flags * (per_block > 0)[:, None] if flags.device.type == "cpu" else flags)
    numbers = torch.cat([active.sum()[None], per_block, *counts]).tolist()
    n_active, rows = numbers[0], numbers[1 : 1 + blocks]
    sizes, at = [], 1 + blocks
    for level in counts:
        sizes.append(numbers[at : at + level.numel()])
        at += level.numel()
    overhead = OVERHEAD_ROWS.get(flags.device.type, 256)
    runs, cost = best_partition(rows, sizes, overhead, vocab)
    n_dense = n_active - sum(rows)
    if n_dense > MOSTLY_FLAT * n_active or cost + n_dense * vocab > 0.9 * n_active * vocab:
        return [], active
    whole, groups = active & ~sparse, []
    for first, last, gathered in runs:
        span = slice(first * certificate.block, last * certificate.block)
        if not gathered:
            whole[span] = active[span]
        elif sum(rows[first:last]):
            positions = span.start + sparse[span].nonzero().squeeze(1)
            columns = flags[first:last].any(0).nonzero().squeeze(1)
            groups.append((certificate.order[positions], columns, certificate.dropped[positions]))
    return groups, whole


def level_counts(flags, chunk=16384):
    """Kept columns of every aligned run of 2^k blocks: [(ceil(blocks / 2^k),)] for k = 0 .. LEVELS."""
    totals = None
    for part in flags.split(chunk, 1):
        counts = []
        for _ in range(LEVELS + 1):
            counts.append(part.sum(1))
            if part.shape[0] % 2:
                part = torch.nn.functional.pad(part, (0, 0, 0, 1))
            part = part[0::2] | part[1::2]
        totals = counts if totals is None else [a + b for a, b in zip(totals, counts)]
    return totals


def best_partition(rows, sizes, overhead, vocab):
    """-> [(first block, last block, whether its columns are gathered)], cost in cells.

    ``sizes[k][i]``: columns of blocks [i 2^k, (i + 1) 2^k). Gathering costs (rows + overhead) * columns.
    """
    best = []
    for level, columns_of in enumerate(sizes):
        width, merged = 2**level, []
        for i, columns in enumerate(columns_of):
            first, last = i * width, min((i + 1) * width, len(rows))
            members = sum(rows[first:last])
            gathered, whole = (members + overhead) * columns if members else 0, members * vocab
            own = ([(first, last, gathered <= whole)], min(gathered, whole))
            children = best[2 * i : 2 * i + 2]
            apart = sum(c[1] for c in children) if children else math.inf
            merged.append(own if own[1] < apart else ([run for c in children for run in c[0]], apart))
        best = merged
    return [run for runs, _ in best for run in runs], sum(cost for _, cost in best)


class SparseRows:
    """Adds the groups' part of the gradients ``out``, a range of columns at a time."""

    def __init__(self, problem, stats, groups, grad_logp, out):
        self.problem, self.stats, self.grad = problem, stats, grad_logp
        self.reader = dense.Reader(problem)
        heads, ranks = self.reader.heads, [columns.shape[1] for _, columns in problem.factors]
        # of each factor whose rows have a gradient: the gradient, and the sum of all its columns
        self.sides = [
            (k, d_rows, stats.new_zeros(ranks[k])) for k, d_rows in enumerate(out[0::3]) if d_rows is not None
        ]
        depth = sum(head.shape[1] for head in heads)
        self.groups = [Group(*group, stats, depth, self.sides) for group in groups]
        counted = torch.where(problem.targets != IGNORE, grad_logp, 0.0)
        self.scale = dense.row_scale(counted) if self.reader.native else None
        # Fresh memory costs a page fault every 4 KiB, several times the gather itself: each buffer is made once.
        columns = max([g.piece(problem.params.workspace) for g in self.groups], default=0)
        cells = max([g.piece(problem.params.workspace) * g.rows.numel() for g in self.groups], default=0)
        self.kept = [torch.empty(columns, head.shape[1], dtype=head.dtype, device=stats.device) for head in heads]
        self.logits = stats.new_empty(0 if self.reader.native else cells)
        self.products = [stats.new_empty(0 if self.reader.native or d is None else columns, rank)
                         for d, rank in zip(out[1::3], ranks)]  # fmt: skip

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
        label = torch.searchsorted(columns, problem.targets[rows])
        found = columns[label.clamp(max=columns.numel() - 1)] == problem.targets[rows]
        bias = None if problem.bias is None else problem.bias[columns]
        grad = self.grad[rows] if self.scale is None else self.grad[rows] * self.scale
        dz = dense.logits_gradient(problem, z, bias, rows, torch.where(found, label, -1), self.stats[:, rows], grad)
        if d_bias is not None:
            add_rows(d_bias, local, self.unscaled(dz.sum(0)))
        if reader.native:
            dz = dz.to(reader.compute)
        operands = reader.gradient_operands(factors, kept)
        for (side, _, _), total, kept_sum in zip(self.sides, group.totals, group.kept_sums):
            kept_sum += operands[side][1].sum(0, dtype=self.stats.dtype)
            reader.add_mm(total, dz, operands[side][1])
        for side, (d_column, product) in enumerate(zip(d_columns, self.products)):
            if d_column is not None:
                gradient = self.unscaled(reader.mm(dz.t(), operands[side][0], product[:k]))
                add_rows(d_column, local, reader.unscaled("low", gradient, side))

    def unscaled(self, x):
        return x if self.scale is None else x.div_(self.scale)

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
                total = self.reader.unscaled("up", self.unscaled(total), side)
                d_rows.flatten(0, 1).index_copy_(0, group.rows, total.to(d_rows.dtype))


class Group:
    def __init__(self, rows, columns, dropped, stats, depth, sides):
        self.rows, self.columns, self.dropped, self.depth = rows, columns, dropped, depth
        self.totals = [stats.new_zeros(rows.numel(), columns.numel()) for _, _, columns in sides]
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
