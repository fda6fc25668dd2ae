"""The plan of a certified backward that never leaves the device.

The exact backward's kernels run with the rows in one order, the entries in another, and of each tile of entries the
number of leading rows that it needs. Rows that keep everything come first, and so do entries that late rows need: the
work is a staircase of dense tiles. All that the certificate flags is on it, and more, so its guarantee holds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgrpo.backends import row_audit
from fastgrpo.backends.certified_backward import within_tolerance
from fastgrpo.backends.problem import active_rows

TILE = 128  # entries that need the same number of rows
WHOLE, HEAD_ONLY, SPARSE, INACTIVE = range(4)  # kinds of rows, in the order they come in; the second is whole in dW


class Staircase(NamedTuple):
    rows: torch.Tensor  # (N,) int64, all rows by kind, each kind in the certificate's order
    count: torch.Tensor  # (1,) int32, rows with a gradient
    entries: torch.Tensor | None  # (V,) int64 permutation; None: in their order
    stops_hidden: torch.Tensor  # (ceil(V / TILE),) int32, of each tile the leading rows that dX needs; not rising
    stops_head: torch.Tensor  # the same for dW, at least as many; those of dX where no head's gradient is needed
    positions: torch.Tensor | None = None  # (V,) int64, where in ``entries`` each stands; None: not known yet
    scale: torch.Tensor | None = None  # (1,) of problem.row_scale; None: the same


def exact(active, rows, count, vocab):
    """The :class:`Staircase` of one step. rows, count: of :func:`fastgrpo.inputs.compact_rows`, ``active``'s."""
    stops = count.repeat(-(-vocab // TILE))
    return Staircase(rows, count, None, stops, stops)


def make(problem, stats, certificate, grad_logp, needs):
    """The :class:`Staircase` of a certified backward, in a number of operations that depends on shapes alone.

    The first call on a device uploads tables, for which the host waits.

    Args:
        certificate: whose order has all N rows, ignored ones last.
    """
    order, vocab = certificate.order, problem.weight.shape[0]
    trained = any(needs.of_head) or bool(needs.bias)
    kind = sort_out(problem, stats, certificate, grad_logp, needs, trained)
    ends = count_rows(kind, certificate)
    need = rows_needed(certificate, ends, trained)[:vocab]
    need, entries = need.sort(stable=True, descending=True)
    stops = F.pad(need, (0, -vocab % TILE)).view(-1, TILE).amax(1)
    whole_in_head = ends[HEAD_ONLY, -1:]
    return Staircase(
        rows=order[kind.argsort(stable=True)],
        count=ends[SPARSE, -1:],
        entries=entries,
        stops_hidden=stops,
        stops_head=torch.maximum(stops, whole_in_head) if trained else stops,
    )


def sort_out(problem, stats, certificate, grad_logp, needs, trained):
    """(N,) uint8, the kind of each row, in the certificate's order. trained: whether the head has a gradient."""
    order = certificate.order
    grad = grad_logp[order]
    active = active_rows(problem.targets[order], grad)
    sparse = within_tolerance(problem, problem.norms(stats)[order], grad, certificate.dropped, active)
    kind = (sparse.to(torch.uint8) * SPARSE).masked_fill_(~active, INACTIVE)
    if not trained or problem.params.row_tolerance >= 1:
        return kind
    tail = row_audit.tail_on_device(problem, stats, certificate, active, sparse, grad_logp, needs)
    return kind.masked_fill_(tail, HEAD_ONLY)


def count_rows(kind, certificate):
    """(kinds, 1 + blocks) int32: how many rows stand, once ordered by kind, up to the last of a kind in a block or one
    before it. At 0: up to the kind's first row; at the end: up to its last."""
    block, blocks = certificate.block, certificate.flags.shape[0]
    padded = F.pad(kind, (0, blocks * block - kind.numel()), value=INACTIVE)
    kinds = torch.arange(INACTIVE, device=kind.device)[:, None]
    inside = (padded == kinds).view(INACTIVE, blocks, block).sum(2)  # all but the inactive
    ends = inside.flatten().cumsum(0, dtype=torch.int32).view(INACTIVE, blocks)
    firsts = F.pad(ends[:-1, -1:], (0, 0, 1, 0))
    return torch.cat((firsts, ends), 1)


def rows_needed(certificate, ends, trained):
    """(V,) int32: the leading rows that dX needs of each entry. dW needs those, and all rows that are whole in it.

    An entry that a sparse row keeps lies behind all rows that are whole in dW, for dX too.
    """
    kinds = ends[HEAD_ONLY:] if trained else ends[SPARSE:]
    last = certificate.last_keeping(kinds[:, 1:] > kinds[:, :-1])
    sparse = F.pad(ends[SPARSE, 1:], (1, 0))  # 0: kept by none of them
    need = sparse.index_select(0, last[-1])
    ahead = ends[HEAD_ONLY].index_select(0, last[0]) if trained else ends[WHOLE, -1:]
    return torch.maximum(need, ahead)


def cells(staircase, vocab):
    """(3,) share of the cells, (row, entry), that are visited for dlogits, dX and dW."""
    of_hidden, of_head = staircase.stops_hidden, staircase.stops_head
    first = torch.arange(of_hidden.numel(), device=of_hidden.device) * TILE
    stops = torch.stack((torch.maximum(of_hidden, of_head), of_hidden, of_head)).double()
    return stops @ (vocab - first).clamp(max=TILE).double() / (staircase.rows.numel() * vocab)
