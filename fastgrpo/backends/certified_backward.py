"""The certified backward: only the entries that matter, with a proof of what was left out.

It recomputes the flagged logits of each group of blocks with ordinary GEMMs; rows whose certificate is too large keep
all entries. How much a row leaves out is known; it is put back as if spread evenly over the entries left out, which
removes the part of the error that adds up (the entries share a direction).
"""

import torch

from fastgrpo.backends import dense, dense_backward, grouping, products, row_audit
from fastgrpo.backends.dense_backward import ExactRows
from fastgrpo.backends.gradient import Gradient
from fastgrpo.backends.logits import LogitTiles, Reader, unscale
from fastgrpo.backends.problem import active_rows, new_gradients, row_scale, sum_entries
from fastgrpo.inputs import IGNORE


def backward(problem, stats, certificate, grad_logp, needs):
    """Gradients as :func:`fastgrpo.backends.dense_backward.backward`'s; the entries kept differ per row."""
    out = new_gradients(problem, needs)
    if not any(needs):
        return out
    plan = make_plan(problem, stats, certificate, grad_logp, needs)
    if not plan.groups:
        dense_backward.add_exact_rows(problem, stats, plan.whole, [grad_logp], out)
        return out
    half, of_entries = problem.within(problem.params.workspace // 2), [*out.of_head, out.bias]
    if all(x is None or x.dtype == stats.dtype for x in of_entries):
        dense_backward.add_exact_rows(problem, stats, plan.whole, [grad_logp], out)
        work = LeftOut(SparseRows(half, stats, plan.groups, grad_logp, out), TailRows(half, stats, plan, grad_logp))
        work.add(slice(0, problem.weight.shape[0]), of_entries)
    else:  # dW or db needs an fp32 sum of every chunk: all kinds of rows go through the vocabulary together
        quarter = half.within(half.params.workspace // 2)
        work = LeftOut(
            SparseRows(quarter, stats, plan.groups, grad_logp, out), TailRows(quarter, stats, plan, grad_logp)
        )
        exact = ExactRows(half, stats, plan.whole, [grad_logp], out)
        for chunk in exact.tiles.chunks():
            totals = exact.accumulate(chunk)
            work.add(chunk.span, totals)
            exact.write(chunk, totals)
        exact.write_rows()
    work.finish()
    return out


def make_plan(problem, stats, certificate, grad_logp, needs):
    """:class:`fastgrpo.backends.grouping.Plan` of both gradients.

    Rows are left to their flagged entries within the tolerance; then the audit says which of them dW needs whole.
    """
    order, grad = certificate.order, grad_logp[certificate.order]
    active = active_rows(problem.targets[order], grad)
    sparse = within_tolerance(problem, problem.norms(stats)[order], grad, certificate.dropped, active)
    head_needs = any(needs.of_head) or bool(needs.bias)
    overhead = grouping.overhead_rows(stats, head_needs)
    plan = grouping.plan_groups(certificate, active, sparse, overhead)
    if not plan.groups or not head_needs or problem.params.row_tolerance >= 1:
        return plan
    tail = row_audit.RowAudit(problem, stats, plan, grad_logp, needs).tail(problem.params.row_tolerance)
    vocab, gemms = problem.weight.shape[0], 2 + any(needs.of_rows)
    plan = plan.with_tails(tail, vocab, gemms)
    cost = plan.cells(vocab, gemms, overhead)
    everything = grouping.exact(certificate, active)
    return plan if cost <= grouping.WORTHWHILE * everything.cells(vocab, gemms) else everything


def within_tolerance(problem, norms, grad, dropped, active):
    """(n,) bool: the active rows that may leave out ``dropped``, those that lose least first.

    While ``sum((g dropped)^2) <= tolerance^2 sum((g norm)^2)``: what a row leaves out has at most the norm ``g
    dropped``, and all of it ``g norm`` at least (of a log-prob ``1 - p``, the label's entry alone): the relative
    Frobenius error of dlogits is at most the tolerance.
    """
    norm = torch.where(active, grad * norms, 0.0).square().nansum()
    budget = (problem.params.tolerance * problem.of_tolerance) ** 2 * norm
    return active & grouping.within_budget((grad * dropped).square(), budget, active)


class LeftOut:
    """The groups' rows: their kept entries, and for dW the tails of some."""

    def __init__(self, sparse, tails):
        self.sparse, self.tails = sparse, tails

    def add(self, span, totals):
        """totals: of the head's gradients, rows ``span`` (C, D) of each factor's and of db (C,): added to, or None."""
        self.sparse.add(span, totals)
        self.tails.add(span, totals)

    def finish(self):
        self.sparse.finish()


class TailRows:
    """Adds what the plan's tail rows leave out to the head's gradients, a chunk at a time."""

    def __init__(self, problem, stats, plan, grad_logp):
        self.problem, self.stats, self.grads = problem, stats, [grad_logp]
        self.groups = [g for g in plan.groups if g.tail.any()]
        parts = [g.rows[g.tail] for g in self.groups]
        rows = torch.cat(parts) if parts else plan.whole[:0]
        self.bounds = [0]
        for part in parts:
            self.bounds.append(self.bounds[-1] + part.numel())
        self.tiles = LogitTiles(problem, rows, buffers=2, raw=True)
        self.reader = self.tiles.reader
        self.gradient = Gradient(problem, rows, hold=self.tiles.source.held > 0)
        self.scale = row_scale(problem, stats, rows, grad_logp) if self.reader.native and parts else None

    def add(self, span, totals):
        """As :meth:`LeftOut.add`."""
        for chunk in self.tiles.chunks(span) if self.groups else ():
            inside = slice(chunk.span.start - span.start, chunk.span.stop - span.start)
            parts = [None if x is None else x[inside] for x in totals]
            for tile in self.tiles.of_chunk(chunk):
                self.add_tile(tile, *parts)

    def add_tile(self, tile, *totals):
        *d_entries, d_bias = totals
        reader = self.reader
        dz = dense_backward.differentiate(self.gradient, tile, self.stats, self.grads, self.scale)
        self.hide_kept(dz, tile.part.start, tile.chunk.span)
        if d_bias is not None:
            d_bias += unscale(dz.sum(0), self.scale)
        if reader.native:
            dz = dz.to(reader.compute)
        operands = reader.gradient_operands(tile.factors, tile.chunk.entries)
        for factor, (d_entry, (x, _)) in enumerate(zip(d_entries, operands)):
            if d_entry is not None and self.scale is None:
                reader.add_mm(d_entry, dz.t(), x)
            elif d_entry is not None:
                d_entry += reader.unscale("low", unscale(reader.mm(dz.t(), x, None), self.scale), factor)

    def hide_kept(self, dz, first, span):
        """0 where the row's group keeps the entry: that part is the group's."""
        for group, start, stop in zip(self.groups, self.bounds, self.bounds[1:]):
            mine = dz[max(start - first, 0) : max(stop - first, 0)]
            if mine.shape[0]:
                ends = torch.searchsorted(group.entries, torch.tensor([span.start, span.stop], device=dz.device))
                mine.index_fill_(1, group.entries[slice(*ends.tolist())] - span.start, 0.0)


class SparseRows:
    """Adds the groups' part of the gradients ``out``, a chunk at a time."""

    def __init__(self, problem, stats, groups, grad_logp, out):
        self.problem, self.stats, self.grad = problem, stats, grad_logp
        self.reader = Reader(problem)
        heads, ranks = self.reader.heads, [entries.shape[1] for _, entries in problem.factors]
        # of each factor whose rows have a gradient: the gradient, and the sum of all its entries
        self.sides = [
            (k, d_rows, stats.new_zeros(ranks[k])) for k, d_rows in enumerate(out.of_rows) if d_rows is not None
        ]
        self.groups = [GroupSums(group, stats, problem, self.sides) for group in groups]
        counted = torch.where(problem.targets != IGNORE, grad_logp, 0.0)
        self.scale = row_scale(problem, stats, slice(None), counted) if self.reader.native else None
        # Fresh memory costs a page fault every 4 KiB, several times the gather itself: each buffer is made once.
        most = max([g.piece(problem.params.workspace) for g in self.groups], default=0)
        cells = max([g.piece(problem.params.workspace) * g.rows.numel() for g in self.groups], default=0)
        self.kept = [torch.empty(most, head.shape[1], dtype=head.dtype, device=stats.device) for head in heads]
        self.logits = stats.new_empty(0 if self.reader.own_memory else cells)
        self.products = [stats.new_empty(0 if self.reader.own_memory or d is None else most, rank)
                         for d, rank in zip(out.of_head, ranks)]  # fmt: skip

    def add(self, span, totals):
        """As :meth:`LeftOut.add`."""
        heads = [head[span] for head in self.reader.heads]
        for k, _, total in self.sides:
            total += sum_entries(heads[k][:, : total.numel()], self.stats.dtype)
        for group in self.groups:
            for entries in group.pieces(span, self.problem.params.workspace):
                self.add_piece(group, entries, entries - span.start, heads, *totals)

    def add_piece(self, group, entries, local, heads, *totals):
        *d_entries, d_bias = totals
        problem, reader, rows = self.problem, self.reader, group.rows
        n, k = rows.numel(), entries.numel()
        kept = [reader.cast_entries(factor, torch.index_select(h, 0, local, out=x[:k]))
                for factor, (h, x) in enumerate(zip(heads, self.kept))]  # fmt: skip
        factors = reader.rows(rows)
        z = reader.raw_logits(factors, kept, self.logits[: n * k].view(n, k) if self.logits.numel() else None)
        label = dense.find_labels(entries, problem.apart(rows))
        bias = None if problem.bias is None else problem.bias[entries]
        grad = self.grad[rows] if self.scale is None else self.grad[rows] * self.scale
        dz = group.gradient.of_tile(z, bias, slice(0, n), entries, label, self.stats[:, rows], grad)
        if group.row_sums is not None:
            group.row_sums += dz.sum(1)
        if d_bias is not None:
            add_rows(d_bias, local, unscale(dz.sum(0), self.scale))
        if reader.native:
            dz = dz.to(reader.compute)
        operands = reader.gradient_operands(factors, kept)
        for (side, _, _), total, kept_sum in zip(self.sides, group.totals, group.kept_sums):
            kept_sum += sum_entries(operands[side][1], self.stats.dtype)
            reader.add_mm(total, dz, operands[side][1])
        for side, (d_entry, product) in enumerate(zip(d_entries, self.products)):
            if d_entry is not None:
                room = None if reader.own_memory else product[:k]
                part = unscale(reader.mm(dz.t(), operands[side][0], room), self.scale)
                add_rows(d_entry, local, reader.unscale("low", part, side))

    def sum_left_out(self, group):
        """(n,) sum of each row's dlogits over the entries left out."""
        if group.row_sums is not None:
            return -group.row_sums
        grad = self.grad[group.rows] if self.scale is None else self.grad[group.rows] * self.scale
        return -grad * group.dropped * self.problem.chain(group.rows)

    def finish(self):
        """Put back what was left out as if spread evenly over the entries left out, and write dX."""
        vocab = self.problem.weight.shape[0]
        for group in self.groups:
            left_out = vocab - group.entries.numel()
            for (side, d_rows, all_entries), total, kept_sum in zip(self.sides, group.totals, group.kept_sums):
                # Through a softcap, whose slope differs by entry, the sum of what was left out is not known; nor on a
                # shard where it is told from what is made.
                if left_out and group.put_back:
                    total.addr_(self.sum_left_out(group), (all_entries - kept_sum) / left_out)
                total = self.reader.unscale("up", unscale(total, self.scale), side)
                d_rows.flatten(0, 1).index_copy_(0, group.rows, total.to(d_rows.dtype))


class GroupSums:
    """A :class:`fastgrpo.backends.grouping.RowGroup` and its part of dX, under way."""

    def __init__(self, group, stats, problem, sides):
        self.rows, self.entries, self.dropped = group.rows, group.entries, group.dropped
        self.gradient = Gradient(problem, group.rows)
        self.depth, self.tiles = problem.depth, problem.tiles_alive
        # A row's dlogits add up to 0: where the sum left out is not known, it is what those made lack.
        self.row_sums = None if problem.knows_left_out else stats.new_zeros(group.rows.numel())
        self.put_back = problem.params.softcap is None and (problem.knows_left_out or not problem.params.shard)
        self.totals = [stats.new_zeros(group.rows.numel(), total.numel()) for _, _, total in sides]
        self.kept_sums = [torch.zeros_like(total) for _, _, total in sides]

    def pieces(self, span, workspace):
        """The group's entries inside the span, in pieces whose gathered rows and logits fit half the workspace."""
        entries = self.entries
        if entries.numel() and (span.start > 0 or span.stop <= int(entries[-1])):
            bounds = torch.tensor([span.start, span.stop], device=entries.device)
            first, last = torch.searchsorted(entries, bounds).tolist()
            entries = entries[first:last]
        return [c for c in entries.split(self.piece(workspace)) if c.numel()]

    def piece(self, workspace):
        """How many entries at once: gathered, cast and multiplied, and their logits, in half the workspace."""
        # of a product, and of dlogits turned round
        copies = products.makes_memory(self.dropped.device, self.dropped.dtype)
        cell = self.dropped.element_size() * ((3 + copies) * self.depth + (1 + copies + self.tiles) * self.rows.numel())
        return min(max(workspace // 2 // cell, 16), self.entries.numel())


def add_rows(destination, index, value):
    """destination[index] += value for indices that do not repeat. On a GPU index_add_ would use atomics."""
    if value.device.type == "cpu":
        destination.index_add_(0, index, value)
    else:
        destination.index_copy_(0, index, destination.index_select(0, index) + value)
