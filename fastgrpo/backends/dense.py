"""The op's forward in plain torch, exact: any device, any float dtype; and the formulas of a tile.

Forward and backward read the logits by way of :class:`fastgrpo.backends.logits.LogitTiles`.
"""

import math

import torch
import torch.nn.functional as F

from fastgrpo.backends.logits import LogitTiles, row_inverse_temperature, transform
from fastgrpo.backends.problem import NOTHING, RowStats, negligible
from fastgrpo.inputs import IGNORE, accumulator_dtype
from fastgrpo.row_math import gradient_at_label, rescale, row_stats

LOG2_E = math.log2(math.e)
FAR = -1e4  # a log-probability below it is as good as -inf, and finite times 0


def forward(problem):
    """Per-row statistics: see :meth:`HeadProblem.new_stats`."""
    stats = problem.new_stats(accumulator_dtype(problem.hidden))
    rows, running, label = fold_vocabulary(problem)
    stats[:, rows] = combine(running, label)
    return stats


def partial_forward(problem):
    """What :func:`combine` needs, not yet combined: see :meth:`HeadProblem.new_partials`."""
    partials = problem.new_partials(accumulator_dtype(problem.hidden))
    rows, running, label = fold_vocabulary(problem)
    partials[:, rows] = torch.cat((running, label[None]))
    return partials


def start_running(problem, rows):
    """(3, n) running statistics of no entry, (n,) labels' logits, NaN where no entry is the label."""
    running = problem.new_partials(accumulator_dtype(problem.hidden))[:3, rows]
    return running, running.new_full((rows.numel(),), torch.nan)


def fold_vocabulary(problem):
    """-> counted rows (n,); (3, n) peak, sum of exp, sum of exp * (peak - z), all without the label; (n,) its logit."""
    rows = counted_rows(problem.targets)
    running, label = start_running(problem, rows)
    for tile in LogitTiles(problem, rows, buffers=2 if problem.params.entropy else 1):
        local = problem.apart(tile.rows) - tile.chunk.span.start
        fold_tile(tile.z, local, running[:, tile.part], label[tile.part], problem.params.entropy)
    return rows, running, label


def exp_(z, out=None):
    """e^z in place, or in ``out``, 0 where that is :func:`fastgrpo.backends.problem.negligible`.

    On a CPU by exp2, kept from underflow: torch.exp is 4 times slower, or 30 where it underflows.
    """
    out = z if out is None else out
    if z.device.type != "cpu":
        return torch.exp(z, out=out)
    powers = F.threshold_(torch.mul(z, LOG2_E, out=out), math.log2(negligible(z.dtype)), -math.inf)
    return powers.exp2_()


def without_denormals(dz):
    """0 in place of what is negligible, in place: on Intel CPUs a GEMM over denormals is 40 times slower. A GPU's GEMMs
    do not mind."""
    return torch.ops.aten.hardshrink.out(dz, negligible(dz.dtype), out=dz) if dz.device.type == "cpu" else dz


def fold_tile(z, local, running, label, entropy):
    """Fold one tile of logits into the running statistics, the label's own logit kept apart. Overwrites z.

    Returns:
        (n, C) exp(z - peak), 0 at the label; (n,) the factor that what was summed before with the old peak wants.
    """
    take_label(z, local, label)
    peak, total, spread = running
    new_peak = torch.maximum(peak, z.amax(1))
    old_total, old_spread, decay = rescale(peak, total, spread, new_peak)
    z -= new_peak[:, None]
    if entropy:
        weighted = exp_(z.clamp_(min=FAR).clone())
        z *= weighted
        torch.sub(old_spread, z.sum(1), out=spread)
        z = weighted
    else:
        exp_(z)
    torch.add(old_total, z.sum(1), out=total)
    peak.copy_(new_peak)
    return z, decay


def take_label(z, local, label):
    """Move the label's logit out of the tile into ``label``, for the rows whose label is in it; or :func:`hide`."""
    if local.ndim == 2:
        hide(z, local)
        return
    inside = (local >= 0) & (local < z.shape[1])
    index = local.clamp(0, z.shape[1] - 1)[:, None]
    found = z.gather(1, index).squeeze(1)
    label.copy_(torch.where(inside, found, label))
    z.scatter_(1, index, torch.where(inside, NOTHING, found)[:, None])


def hide(z, local):
    """NOTHING in place of the logits that are taken, in place. local: (n, K), any other number where none is."""
    inside = (local >= 0) & (local < z.shape[1])
    place = local.clamp(0, z.shape[1] - 1)
    # The smaller of two that meet: a place outside has become one that may be another's.
    z.scatter_reduce_(1, place, torch.where(inside, NOTHING, z.gather(1, place)), "amin")


def combine(running, label):
    """(5, n) :class:`RowStats` from the running ones, (n,) each, and the labels' logits."""
    return torch.stack(row_stats(*running, label))


def logits_gradient(problem, z, bias, index, local, stats, grad_logp, grad_entropy=None):
    """d loss / d raw logits of one tile, over z's memory: g (onehot - p) - h p (log p + H), chained to the raw product.

    The label's term is made of the statistics. local: (n,) labels in the tile; or (n, K) what is taken, whose is 0.
    """
    z, slope = transform(problem, z, bias, row_inverse_temperature(problem, index), with_slope=True)
    rows, chain = RowStats(*stats), problem.chain(index)
    grad_logp = grad_logp * chain
    if local.ndim == 2:
        hide(z, local)
    z.sub_(rows.peak[:, None]).sub_(rows.offset[:, None])
    if grad_entropy is not None:
        grad_entropy = grad_entropy * chain
    at_label = gradient_at_label(grad_logp, grad_entropy, rows.logp, rows.other_mass, rows.entropy)
    if grad_entropy is None:
        exp_(z).mul_(-grad_logp[:, None])
    else:
        p = exp_(z.clamp_(min=FAR).clone())
        z += rows.entropy[:, None]
        z.mul_(-grad_entropy[:, None]).sub_(grad_logp[:, None]).mul_(p)
    if local.ndim == 1:
        inside = (local >= 0) & (local < z.shape[1])
        place = local.clamp(0, z.shape[1] - 1)[:, None]
        z.scatter_(1, place, torch.where(inside[:, None], at_label[:, None], z.gather(1, place)))
    return without_denormals(z if slope is None else z.mul_(slope))


def find_labels(entries, targets):
    """Where among the rising ``entries`` each label stands, or -1; shaped like the targets."""
    at = torch.searchsorted(entries, targets)
    found = entries[at.clamp(max=entries.numel() - 1)] == targets
    return torch.where(found, at, -1)


def counted_rows(targets):
    """(n,) the rows that are not ignored; the host waits for their number."""
    return (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)
