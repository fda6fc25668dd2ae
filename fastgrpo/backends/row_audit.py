"""Which rows each entry's gradient needs whole, measured on a sample of the vocabulary.

Adam divides each weight's gradient by its own size, so an entry's gradient must be right relative to itself, however
small it is; the certificate's masses bound dX and dW only as wholes. The audit makes the exact gradients of a few
entries and, row by row, what they lose where only the kept entries are visited.
"""

import functools
import itertools

import torch

from fastgrpo.backends import dense
from fastgrpo.backends.logits import Reader

WITHIN = ((1.0, 0.95), (0.2, 0.5))  # (part of the row tolerance, share of the entries whose gradients stay within it)
ENTRIES_PER_AUDITED, AUDITED = 64, (256, 1024)  # one entry in so many is audited; at least and at most
STEPS = 32  # numbers of whole rows that are tried


@functools.cache
def sample_entries(vocab):
    """Two disjoint, rising samples of [0, vocab), the same on every call: (R,) to rank by, (A,), twice as many, to
    audit: one entry at random in each of R + A equal stretches. A small vocabulary is audited whole."""
    audited = min(max(vocab // ENTRIES_PER_AUDITED, AUDITED[0]), AUDITED[1])
    count = audited + audited // 2
    if vocab <= count:
        every = torch.arange(vocab)
        return every, every
    bounds = torch.arange(count + 1) * vocab // count
    offset = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entries = bounds[:-1] + (offset * bounds.diff()).long()
    ranking = torch.arange(count) % 3 == 1
    return entries[ranking], entries[~ranking]


def allowed_over(share, audited, vocab):
    """How many of the audited entries may lie over a limit that ``share`` of all must keep: one standard error less."""
    error = 0.0 if audited == vocab else (share * (1 - share) / audited) ** 0.5
    return (1 - share - error) * audited


def fewest_whole(errors, tolerance, vocab):
    """-> the last step whose errors, and those of all before it, are small enough: 0-dim int64.

    Args:
        errors: (J + 1, A) relative error of each audited entry's gradient with more and more rows left to their kept
            entries, none at step 0; NaN where the gradient is 0, which counts for nothing.
    """
    counted = (~errors[-1].isnan()).sum()
    fine = torch.ones(errors.shape[0], dtype=torch.bool, device=errors.device)
    for part, share in WITHIN:
        over = (errors > part * tolerance).sum(1)
        fine &= over <= allowed_over(share, errors.shape[1], vocab) * counted / errors.shape[1]
    fine[0] = True
    return fine.long().cumprod(0).sum() - 1


class RowAudit:
    """Audits the groups of a plan.

    Args:
        plan: :class:`fastgrpo.backends.grouping.Plan`. grad_logp: (N,). needs: of which gradients, see
            :func:`fastgrpo.backends.problem.new_gradients`.
    """

    def __init__(self, problem, stats, plan, grad_logp, needs):
        self.problem, self.stats, self.plan, self.grad = problem, stats, plan, grad_logp
        self.reader = Reader(problem)
        self.rows = torch.cat([g.rows for g in plan.groups])
        sizes = torch.tensor([g.rows.numel() for g in plan.groups], device=self.rows.device)
        self.group = torch.arange(len(plan.groups), device=self.rows.device).repeat_interleave(sizes)
        self.factors = [k for k, need in enumerate(needs.of_head) if need]  # those whose entries have a gradient
        self.with_bias = bool(needs.bias)

    def tail(self, tolerance):
        """(n,) bool: of the groups' rows, those that dW needs whole for the row tolerance."""
        vocab = self.problem.weight.shape[0]
        ranking, audited = (x.to(self.rows.device) for x in sample_entries(vocab))
        dropped = torch.cat([g.dropped for g in self.plan.groups])
        cost = (self.grad[self.rows] * dropped).abs()
        # The share is the better rank, but noisy on a sample; |g| dropped is not: their product beats either.
        ranked = (cost * self.shares(ranking)).argsort(stable=True)
        steps = torch.arange(STEPS + 1) * ranked.numel() // STEPS
        last = fewest_whole(self.errors(audited, ranked, steps.tolist()), tolerance, vocab)
        tail = torch.ones_like(ranked, dtype=torch.bool)
        return tail.index_fill_(0, ranked[: int(steps[last])], False)

    def shares(self, entries):
        """(n,) sum over the entries of the part of their absolute mass that each row leaves out."""
        total = torch.zeros(self.rows.numel(), dtype=self.stats.dtype, device=self.rows.device)
        for part in entries.split(self.entries_at_once()):
            mass = sum(self.dlogits(rows, part).abs_().sum(0) for rows in self.chunks(self.plan.whole))
            left = self.dlogits(self.rows, part).abs_()
            mass = mass + left.sum(0)
            left *= ~self.mark_kept(part)[self.group]
            total += left @ torch.where(mass > 0, 1 / mass, 0.0)
        return total

    def errors(self, entries, ranked, steps):
        """(J + 1, A), see :func:`fewest_whole`: at step j the rows ``ranked[: steps[j]]`` are left to kept entries."""
        pieces = [self.errors_of(part, ranked, steps) for part in entries.split(self.entries_at_once())]
        return torch.cat(pieces, 1)

    def errors_of(self, entries, ranked, steps):
        left_out = ~self.mark_kept(entries)[self.group[ranked]]
        dz = self.dlogits(self.rows[ranked], entries)
        exact = self.whole_products(entries)
        left = [torch.zeros_like(x) for x in exact]
        norms = [torch.stack([x.norm(dim=1) for x in left], 1)]
        for first, last in itertools.pairwise(steps):
            operands, part = self.operands(self.rows[ranked[first:last]]), dz[first:last]
            self.add_products(exact, part, operands)
            self.add_products(left, part.mul_(left_out[first:last]), operands)
            norms.append(torch.stack([x.norm(dim=1) for x in left], 1))
        whole = torch.stack([x.norm(dim=1) for x in exact], 1)
        errors = torch.where(whole > 0, torch.stack(norms) / whole, 0.0).amax(2)
        return torch.where((whole > 0).any(1), errors, torch.nan)

    def whole_products(self, entries):
        """Of each gradient the entries' part (C, depth) that the plan's whole rows give."""
        products = [x.new_zeros(entries.numel(), x.shape[1]) for x in self.operands(self.rows[:1])]
        for rows in self.chunks(self.plan.whole):
            self.add_products(products, self.dlogits(rows, entries), self.operands(rows))
        return products

    @staticmethod
    def add_products(totals, dz, operands):
        for total, x in zip(totals, operands):
            total.addmm_(dz.t(), x)

    def operands(self, rows):
        """Of each gradient what its GEMM multiplies dlogits with: (n, depth) in the accumulator's dtype."""
        factors = self.reader.rows(rows)
        pairs = self.reader.gradient_operands(factors, factors)
        found = [pairs[k][0].to(self.stats.dtype) for k in self.factors]
        return found + [self.stats.new_ones(rows.numel(), 1)] * self.with_bias

    def dlogits(self, rows, entries):
        """(n, C) d loss / d logits of some entries."""
        out = self.stats.new_empty(rows.numel(), entries.numel())
        heads = [self.reader.cast_entries(k, head[entries]) for k, head in enumerate(self.reader.heads)]
        bias = None if self.problem.bias is None else self.problem.bias[entries]
        for index, z in zip(self.chunks(rows), self.chunks(out)):
            z.copy_(self.reader.raw_logits(self.reader.rows(index), heads, None))
            label = dense.find_labels(entries, self.problem.targets[index])
            dense.logits_gradient(self.problem, z, bias, index, label, self.stats[:, index], self.grad[index])
        return out

    def mark_kept(self, entries):
        """(groups, C) bool: whether each group keeps the entries."""
        return torch.stack([torch.isin(entries, group.entries) for group in self.plan.groups])

    def chunks(self, x):
        """Rows whose hidden states are gathered at once."""
        return x.split(min(max(self.problem.params.workspace // (16 * self.bytes_of_depth()), 16), 1024))

    def entries_at_once(self):
        """Entries whose dlogits, flags, heads and products fit half the workspace."""
        n, size = self.rows.numel() + 1024, self.stats.element_size()
        return max(self.problem.params.workspace // 2 // (n * (2 * size + 1) + 4 * self.bytes_of_depth()), 16)

    def bytes_of_depth(self):
        return self.stats.element_size() * sum(entries.shape[1] for _, entries in self.problem.factors)
