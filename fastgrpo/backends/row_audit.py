"""Which rows each entry's gradient needs whole, measured on a sample of the vocabulary.

Adam divides each weight's gradient by its own size, so an entry's gradient must be right relative to itself, however
small it is; the certificate's masses bound dX and dW only as wholes. The audit makes the exact gradients of a few
entries and, row by row, what they lose where only the kept entries are visited.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgrpo.backends import dense, products
from fastgrpo.backends.gradient import Gradient
from fastgrpo.backends.logits import Reader, RowSource
from fastgrpo.backends.problem import RowStats

WITHIN = ((1.0, 0.95), (0.2, 0.5))  # (part of the row tolerance, share of the entries whose gradients stay within it)
ENTRIES_PER_AUDITED, AUDITED = 64, (256, 1024)  # one entry in so many is audited; at least and at most
STEPS = 32  # numbers of whole rows that are tried
SKETCH = 256  # numbers that stand for a longer row of hidden on a device: a norm is then off by a 20th, either way


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
    counted, fine = (errors[-1] == errors[-1]).sum(), []
    for part, share in WITHIN:
        over = (errors[1:] > part * tolerance).sum(1)
        fine.append(over <= allowed_over(share, errors.shape[1], vocab) * counted / errors.shape[1])
    return (fine[0] & fine[1]).long().cumprod(0).sum()


class Audit:
    """What an audit reads of a problem.

    Args:
        needs: of which gradients, see :func:`fastgrpo.backends.problem.new_gradients`.
    """

    def __init__(self, problem, stats, needs):
        self.problem, self.stats = problem, stats
        self.reader = Reader(problem)
        self.factors = [k for k, need in enumerate(needs.of_head) if need]  # those whose entries have a gradient
        self.with_bias = bool(needs.bias)

    def read_entries(self, entries):
        """-> each factor's entries as operands, and their bias or None."""
        heads = [self.reader.cast_entries(k, head[entries]) for k, head in enumerate(self.reader.heads)]
        return heads, None if self.problem.bias is None else self.problem.bias[entries]

    def operands(self, factors):
        """Of each gradient what its GEMM multiplies dlogits with: (n, depth). factors: the rows of each."""
        pairs = self.reader.gradient_operands(factors, factors)
        found = [pairs[k][0] for k in self.factors]
        return found + [self.stats.new_ones(len(factors[0]), 1)] * self.with_bias

    def bytes_of_depth(self):
        return self.stats.element_size() * self.problem.depth


class RowAudit(Audit):
    """Audits the groups of a plan.

    Args:
        plan: :class:`fastgrpo.backends.grouping.Plan`. grad_logp: (N,). needs: see :class:`Audit`.
    """

    def __init__(self, problem, stats, plan, grad_logp, needs):
        super().__init__(problem, stats, needs)
        self.plan, self.grad = plan, grad_logp
        self.rows = torch.cat([g.rows for g in plan.groups])
        sizes = torch.tensor([g.rows.numel() for g in plan.groups], device=self.rows.device)
        self.group = torch.arange(len(plan.groups), device=self.rows.device).repeat_interleave(sizes)

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
            operands, part = self.read_operands(self.rows[ranked[first:last]]), dz[first:last]
            self.add_products(exact, part, operands)
            self.add_products(left, part.mul_(left_out[first:last]), operands)
            norms.append(torch.stack([x.norm(dim=1) for x in left], 1))
        whole = torch.stack([x.norm(dim=1) for x in exact], 1)
        errors = torch.where(whole > 0, torch.stack(norms) / whole, 0.0).amax(2)
        return torch.where((whole > 0).any(1), errors, torch.nan)

    def whole_products(self, entries):
        """Of each gradient the entries' part (C, depth) that the plan's whole rows give."""
        products = [x.new_zeros(entries.numel(), x.shape[1]) for x in self.read_operands(self.rows[:1])]
        for rows in self.chunks(self.plan.whole):
            self.add_products(products, self.dlogits(rows, entries), self.read_operands(rows))
        return products

    @staticmethod
    def add_products(totals, dz, operands):
        for total, x in zip(totals, operands):
            products.add_mm(total, dz.t(), x)

    def read_operands(self, rows):
        """:meth:`operands` of some rows in the accumulator's dtype."""
        return [x.to(self.stats.dtype) for x in self.operands(self.reader.rows(rows))]

    def dlogits(self, rows, entries):
        """(n, C) d loss / d logits of some entries."""
        out = self.stats.new_empty(rows.numel(), entries.numel())
        heads, bias = self.read_entries(entries)
        for index, z in zip(self.chunks(rows), self.chunks(out)):
            z.copy_(self.reader.raw_logits(self.reader.rows(index), heads, None))
            label = dense.find_labels(entries, self.problem.apart(index))
            known, whole = self.stats[:, index], slice(0, index.numel())
            Gradient(self.problem, index).of_tile(z, bias, whole, entries, label, known, self.grad[index])
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


def tail_on_device(problem, stats, certificate, active, sparse, grad_logp, needs):
    """As :meth:`RowAudit.tail`, the host not waiting: (N,) bool, of the rows in the certificate's order.

    Args:
        active, sparse: (N,) bool in that order: rows with a gradient, those of them left to their kept entries.
    """
    return DeviceAudit(problem, stats, certificate, active, grad_logp, needs).tail(sparse, problem.params.row_tolerance)


class Samples(NamedTuple):
    """:func:`sample_entries` on a device."""

    entries: torch.Tensor  # (C,)
    place: torch.Tensor  # (V + 2,) where among them each entry stands, or -1; of the entries -1 .. V
    ranking: slice  # of the entries
    audited: slice


@functools.cache
def samples_on(device, vocab):
    """Made once, for the upload makes the host wait. device: its name."""
    ranking, audited = sample_entries(vocab)
    both, first = (ranking, 0) if ranking is audited else (torch.cat((ranking, audited)), len(ranking))
    place = torch.full((vocab + 2,), -1)
    place[both + 1] = torch.arange(len(both))
    return Samples(both.to(device), place.to(device), slice(0, len(ranking)), slice(first, len(both)))


@functools.cache
def signs_on(device, depth, dtype):
    """(depth, SKETCH) of 1 and -1: norms of differences of rows survive the product (Johnson and Lindenstrauss)."""
    signs = torch.randint(2, (depth, SKETCH), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(dtype).to(device)


class DeviceAudit(Audit):
    """Audits all rows, in the certificate's order, in operations whose number and shapes do not depend on their values.

    Args:
        active: (N,) bool, rows with a gradient, in the certificate's order. The others: see :class:`Audit`.
    """

    def __init__(self, problem, stats, certificate, active, grad_logp, needs):
        super().__init__(problem, stats, needs)
        self.certificate, self.rows, vocab = certificate, certificate.order, problem.weight.shape[0]
        self.stats, grad = stats[:, self.rows], grad_logp[self.rows]
        known = RowStats(*self.stats[: len(RowStats._fields)])  # a divergence's statistics begin with them
        # A row that is not finite is whole anyhow, and must not hide what the others lose.
        self.unusable = ~(active & ((grad * (known.peak + known.offset)).abs() < torch.inf))[:, None]
        self.cost = (grad * certificate.dropped).abs()
        grad = grad.masked_fill(self.unusable[:, 0], 0.0)
        self.grad = grad / grad.abs().amax()  # norms are sums of squares
        self.samples = samples_on(str(stats.device), vocab)
        self.labels = self.samples.place[problem.apart(self.rows).clamp(-1, vocab) + 1]
        self.source = RowSource(self.reader, self.rows)
        self.gradient = Gradient(problem, self.rows, hold=self.source.held > 0)
        every = slice(0, self.samples.entries.numel())
        self.made = self.make_dlogits(every) if every.stop <= self.entries_at_once() else None

    def tail(self, sparse, tolerance):
        """(N,) bool: the ``sparse`` rows that dW needs whole for the row tolerance."""
        ranked = (self.cost * self.shares()).masked_fill_(~sparse, torch.inf).argsort(stable=True)
        steps = torch.arange(STEPS + 1, device=ranked.device) * sparse.sum() // STEPS
        last = fewest_whole(self.errors(ranked, steps), tolerance, self.problem.weight.shape[0])
        whole = torch.arange(ranked.numel(), device=ranked.device) >= steps.index_select(0, last[None])
        return torch.empty_like(sparse).scatter_(0, ranked, whole) & sparse

    def shares(self):
        """(N,), see :meth:`RowAudit.shares`."""
        parts = []
        for span in self.pieces(self.samples.ranking, self.entries_at_once()):
            size, kept = self.dlogits(span).abs(), self.keeps(span)[:, None]
            mass = size.sum(0)
            kept = kept.expand(-1, self.certificate.block, -1).flatten(0, 1)[: self.rows.numel()]
            parts.append(size.masked_fill_(kept, 0.0) @ mass.reciprocal_().nan_to_num_(posinf=0.0))
        return functools.reduce(torch.add, parts)

    def errors(self, ranked, steps):
        """(STEPS + 1, A), see :func:`fewest_whole`. steps: (STEPS + 1,) how many of the rows ``ranked`` are left out.

        Each step is given room for as many rows as it could have; they stand there, then rows that add nothing.
        """
        width = -(-ranked.numel() // STEPS)
        rank = steps[:-1, None] + torch.arange(width, device=ranked.device)
        slots = ranked[rank.clamp(max=ranked.numel() - 1)].flatten()
        block, none = slots // self.certificate.block, (rank >= steps[1:, None]).view(-1, 1)
        operands = self.read_operands()
        placed = [x.index_select(0, slots).masked_fill_(none, 0.0) for x in operands]
        per_step = self.stats.element_size() * 3 * STEPS * sum(x.shape[1] for x in operands)
        most = min(self.entries_at_once(), max(self.problem.params.workspace // 2 // per_step, 16))
        parts = []
        for span in self.pieces(self.samples.audited, most):
            dz, kept = self.dlogits(span), self.keeps(span).index_select(0, block)
            left = dz.index_select(0, slots).masked_fill_(kept, 0.0)
            parts.append(relative_errors(dz, operands, left.unflatten(0, (STEPS, width)), placed))
        return join(parts, 1)

    def read_operands(self):
        """:meth:`operands` of all rows in the accumulator's dtype, in short where they are long."""
        parts = [[self.shorten(x) for x in self.operands(self.source[part])] for part in self.row_parts()]
        return [join(x).masked_fill(self.unusable, 0.0) for x in zip(*parts)]

    def shorten(self, x):
        if x.shape[1] > SKETCH:
            return self.reader.mm(x, signs_on(str(x.device), x.shape[1], x.dtype), None)
        return x.to(self.stats.dtype)

    def dlogits(self, span):
        """(N, C) d loss / d logits of some of the samples; not to be overwritten."""
        return self.make_dlogits(span) if self.made is None else self.made[:, span]

    def make_dlogits(self, span):
        (heads, bias), parts = self.read_entries(self.samples.entries[span]), []
        for part in self.row_parts():
            z = self.reader.raw_logits(self.source[part], heads, None)
            place, known, grad = self.labels_in(span)[part], self.stats[:, part], self.grad[part]
            entries = self.samples.entries[span]
            parts.append(self.gradient.of_tile(z, bias, part, entries, place, known, grad))
        return join(parts).masked_fill_(self.unusable, 0.0)

    def labels_in(self, span):
        """(N,) the label's column, or (N, K) of what is taken; negative or beyond the last where not among them."""
        return self.labels - span.start if span.start else self.labels

    def keeps(self, span):
        """(blocks, C) bool of some of the samples."""
        return self.certificate.keeps(self.samples.entries[span])

    def row_parts(self):
        """Slices of the rows whose operands are made at once."""
        count, step = self.rows.numel(), self.rows.numel()
        if self.source.gathered is None:
            copies = 2 if self.reader.native else 8  # of a row, in the accumulator's dtype
            step = max(self.problem.params.workspace // (copies * self.bytes_of_depth()), 16)
        return [slice(r, min(r + step, count)) for r in range(0, count, step)]

    def pieces(self, span, most):
        return [slice(v, min(v + most, span.stop)) for v in range(span.start, span.stop, most)]

    def entries_at_once(self):
        """Samples whose dlogits, copies of them and flags fit the workspace: nothing else is in it yet."""
        copies = self.problem.tiles_alive + (3 if self.problem.params.softcap is None else 5)
        cell = self.stats.element_size() * copies + 2
        most = self.problem.params.workspace // (self.rows.numel() * cell)
        return max(most // 64 * 64, 16)  # GEMMs of ragged width are slow


def relative_errors(dz, operands, left, placed):
    """(STEPS + 1, C) relative error of each entry's gradient, NaN where that is 0; of several gradients the largest.

    Args:
        dz: (N, C). operands: [(N, depth)]. left: (STEPS, n, C) what each step more leaves out. placed: the operands of
            these rows, [(STEPS * n, depth)].
    """
    found = []
    for x, y in zip(operands, placed):
        whole = (dz.t() @ x).norm(dim=1)
        lost = torch.bmm(left.transpose(1, 2), y.unflatten(0, left.shape[:2])).cumsum(0).norm(dim=2)
        found.append(F.pad(lost, (0, 0, 1, 0)) / whole.masked_fill(whole == 0, torch.nan))
    return functools.reduce(torch.fmax, found)


def join(parts, dim=0):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
