"""Which rows and entries the certified backward visits: decisions only, made from counts and masses.

dX and dW may keep different rows whole. A :class:`RowGroup` keeps the same entries for both; its ``tail`` rows are
whole in dW alone, which then also gets the entries the group leaves out.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fastgrpo.backends import products

MOSTLY_FLAT = 0.5  # share of rows over the tolerance from which on the exact path is cheaper
WORTHWHILE = 0.9  # part of the exact path's GEMMs up to which leaving entries out pays
# What one more kept entry of a group costs beside its GEMMs, in rows of them: read for dX alone; read and written for
# dW too. Measured.
OVERHEAD_ROWS = {"cpu": (48, 256), "oneDNN": (200, 512), "cuda": (256, 256)}
UNITS = 2**40  # integers that a budget is counted in
LEVELS = 4  # groups of up to 2^LEVELS blocks


@dataclass(frozen=True)
class RowGroup:
    """Rows that keep the same entries."""

    rows: torch.Tensor  # (n,) int64
    entries: torch.Tensor  # (k,) int64, rising
    dropped: torch.Tensor  # (n,) each row's probability outside the entries
    tail: torch.Tensor  # (n,) bool: dW gets the entries left out too


@dataclass(frozen=True)
class Plan:
    groups: list  # of RowGroup
    whole: torch.Tensor  # (m,) int64, rising: rows that keep all entries

    def with_tails(self, tail, vocab, gemms):
        """The plan whose rows ``tail`` are whole in dW.

        A row that is whole in dW costs ``gemms`` GEMMs over the group's entries and 2 over all of them, recomputed
        logits and dW; where ``gemms`` over all entries are cheaper, it becomes whole in both.

        Args:
            tail: (n,) bool, of the groups' rows one after the other. gemms: 2 or 3, of dX, dW and the logits.
        """
        groups, whole = [], [self.whole]
        for group, chosen in zip(self.groups, tail.split([g.rows.numel() for g in self.groups])):
            if gemms * vocab < gemms * group.entries.numel() + 2 * vocab:
                whole.append(group.rows[chosen])
                stay = ~chosen
                group = RowGroup(group.rows[stay], group.entries, group.dropped[stay], group.tail[stay])
            else:
                group = replace(group, tail=chosen)
            if group.rows.numel():
                groups.append(group)
        return Plan(groups, torch.cat(whole).sort().values)

    def cells(self, vocab, gemms, overhead=0):
        """What the plan visits, in cells times GEMMs."""
        kept = sum((g.rows.numel() + overhead) * g.entries.numel() for g in self.groups)
        tails = sum(int(g.tail.sum()) for g in self.groups)
        return gemms * (kept + self.whole.numel() * vocab) + 2 * tails * vocab


def within_budget(costs, budget, active):
    """(n,) bool: the cheapest active rows whose costs together stay within the budget; a NaN never does.

    Summed as integers, so that the choice is the same on every run on every device.
    """
    share = torch.nan_to_num(costs / budget, nan=2.0, posinf=2.0).clamp(max=2.0)
    units = torch.where(active, (share.double() * UNITS).ceil().to(torch.int64), 0)
    ranked, order = units.sort(stable=True)
    return torch.zeros_like(active).scatter_(0, order, ranked.cumsum(0) <= UNITS)


def overhead_rows(x, trained):
    """x: a tensor like those that are multiplied."""
    multiplier = "oneDNN" if products.makes_memory(x.device, x.dtype) else x.device.type
    return OVERHEAD_ROWS.get(multiplier, OVERHEAD_ROWS["cuda"])[trained]


def plan_groups(certificate, active, sparse, overhead):
    """:class:`Plan` of the certificate's rows: ``sparse`` ones in groups where that pays, the other active ones whole.

    Neighbouring blocks share a group where the union of their entries costs less than their own, and keep all entries
    where that costs less; the best partition of aligned runs of 1, 2, 4, ... blocks is found on the host from counts
    that are copied once.

    Args:
        active, sparse: (n,) bool, of the rows in the certificate's order. overhead: see :func:`overhead_rows`.
    """
    flags, order = certificate.flags, certificate.order
    blocks, vocab = flags.shape
    per_block = F.pad(sparse, (0, blocks * certificate.block - sparse.numel()))
    per_block = per_block.view(blocks, certificate.block).sum(1)
    counts = level_counts(flags * (per_block > 0)[:, None] if flags.device.type == "cpu" else flags)
    numbers = torch.cat([active.sum()[None], per_block, *counts]).tolist()
    n_active, rows = numbers[0], numbers[1 : 1 + blocks]
    sizes, at = [], 1 + blocks
    for level in counts:
        sizes.append(numbers[at : at + level.numel()])
        at += level.numel()
    runs, cost = best_partition(rows, sizes, overhead, vocab)
    n_dense = n_active - sum(rows)
    if n_dense > MOSTLY_FLAT * n_active or cost + n_dense * vocab > WORTHWHILE * n_active * vocab:
        return exact(certificate, active)
    whole, groups = active & ~sparse, []
    for first, last, gathered in runs:
        span = slice(first * certificate.block, last * certificate.block)
        if not gathered:
            whole[span] = active[span]
        elif sum(rows[first:last]):
            positions = span.start + sparse[span].nonzero().squeeze(1)
            entries = flags[first:last].any(0).nonzero().squeeze(1)
            none = torch.zeros_like(positions, dtype=torch.bool)
            groups.append(RowGroup(order[positions], entries, certificate.dropped[positions], none))
    return Plan(groups, order[whole].sort().values)


def exact(certificate, active):
    """:class:`Plan` that leaves nothing out."""
    return Plan([], certificate.order[active].sort().values)


def level_counts(flags, chunk=16384):
    """Kept entries of every aligned run of 2^k blocks: [(ceil(blocks / 2^k),)] for k = 0 .. LEVELS."""
    totals = None
    for part in flags.split(chunk, 1):
        counts = []
        for _ in range(LEVELS + 1):
            counts.append(part.sum(1))
            if part.shape[0] % 2:
                part = F.pad(part, (0, 0, 0, 1))
            part = part[0::2] | part[1::2]
        totals = counts if totals is None else [a + b for a, b in zip(totals, counts)]
    return totals


def best_partition(rows, sizes, overhead, vocab):
    """-> [(first block, last block, whether its entries are gathered)], cost in cells.

    ``sizes[k][i]``: entries of blocks [i 2^k, (i + 1) 2^k). Gathering costs (rows + overhead) * entries.
    """
    best = []
    for level, entries_of in enumerate(sizes):
        width, merged = 2**level, []
        for i, entries in enumerate(entries_of):
            first, last = i * width, min((i + 1) * width, len(rows))
            members = sum(rows[first:last])
            gathered, whole = (members + overhead) * entries if members else 0, members * vocab
            own = ([(first, last, gathered <= whole)], min(gathered, whole))
            children = best[2 * i : 2 * i + 2]
            apart = sum(c[1] for c in children) if children else math.inf
            merged.append(own if own[1] < apart else ([run for c in children for run in c[0]], apart))
        best = merged
    return [run for runs, _ in best for run in runs], sum(cost for _, cost in best)
