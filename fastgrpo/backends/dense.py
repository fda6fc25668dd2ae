"""The op's forward in plain torch, exact: any device, any float dtype; and the formulas of a tile.

Forward and backward read the logits by way of :class:`fastgrpo.backends.logits.LogitTiles`.
"""

import math

import torch
import torch.nn.functional as F

from fastgrpo.backends.logits import LogitTiles, row_inverse_temperature, transform
from fastgrpo.backends.problem import ABSENT, NOTHING, RowStats
from fastgrpo.inputs import IGNORE, accumulator_dtype

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
        local = problem.targets[tile.rows] - tile.chunk.span.start
        fold_tile(tile.z, local, running[:, tile.part], label[tile.part], problem.params.entropy)
    return rows, running, label


def exp_(z):
    """e^z in place, 0 where that is less than :func:`negligible`.

    On a CPU by exp2, kept from underflow: torch.exp is 4 times slower, or 30 where it underflows.
    """
    if z.device.type != "cpu":
        return z.exp_()
    return F.threshold_(z.mul_(LOG2_E), math.log2(negligible(z.dtype)), -math.inf).exp2_()


def negligible(dtype):
    """What cannot matter beside anything else, and times a hidden state or a weight is not yet a denormal number: on
    Intel CPUs a GEMM over denormals is 40 times slower."""
    return 2.0**20 * torch.finfo(dtype).tiny


def without_denormals(dz):
    """0 in place of what is :func:`negligible`, in place; a GPU's GEMMs do not mind."""
    return torch.ops.aten.hardshrink.out(dz, negligible(dz.dtype), out=dz) if dz.device.type == "cpu" else dz


def fold_tile(z, local, running, label, entropy):
    """Fold one tile of logits into the running statistics, the label's own logit kept apart. Overwrites z.

    Returns:
        (n, C) exp(z - peak), 0 at the label; (n,) the factor that what was summed before with the old peak wants.
    """
    take_label(z, local, label)
    peak, total, spread = running
    new_peak = torch.maximum(peak, z.amax(1))
    step = new_peak - peak
    decay = torch.exp(-step)
    z -= new_peak[:, None]
    if entropy:
        weighted = exp_(z.clamp_(min=FAR).clone())
        z *= weighted
        spread.add_(step * total).mul_(decay).sub_(z.sum(1))
        z = weighted
    else:
        exp_(z)
    total.mul_(decay).add_(z.sum(1))
    peak.copy_(new_peak)
    return z, decay


def take_label(z, local, label):
    """Move the label's logit out of the tile into ``label``, for the rows whose label is in it."""
    inside = (local >= 0) & (local < z.shape[1])
    index = local.clamp(0, z.shape[1] - 1)[:, None]
    found = z.gather(1, index).squeeze(1)
    label.copy_(torch.where(inside, found, label))
    z.scatter_(1, index, torch.where(inside, NOTHING, found)[:, None])


def softplus(x):
    """log(1 + e^x) to the dtype's relative accuracy, also far out and at +-inf; torch's own drops e^-x beyond 20."""
    return x.clamp(min=0.0) + torch.log1p(torch.exp(-x.abs()))


def combine(running, label):
    """(5, n) :class:`RowStats` from the running ones; ``gap`` is the others' log-sum-exp minus the label's logit."""
    peak, total, spread = running
    label = torch.where(label < ABSENT, -torch.inf, label)
    log_total = torch.log(total)
    gap = log_total + (peak - label)
    logp, other_mass = -softplus(gap), torch.sigmoid(gap)
    other_entropy = log_total + spread / total
    # Zero mass outside the label (V = 1): nothing to add, and log(0) is not to be met.
    rest = torch.where(other_mass > 0, other_mass * (softplus(-gap) + other_entropy), other_mass)
    entropy = torch.where(logp > -torch.inf, -torch.exp(logp) * logp, 0.0) + rest
    offset = torch.logaddexp(log_total, label - peak)
    return torch.stack(RowStats(logp, peak, offset, other_mass, entropy))


def logits_gradient(problem, z, bias, index, local, stats, grad_logp, grad_entropy=None):
    """d loss / d raw logits of one tile, over z's memory: g (onehot - p) - h p (log p + H), chained to the raw product.

    The label's term is g (1 - p) from the statistics, which does not cancel as p -> 1.
    """
    inv_temperature = row_inverse_temperature(problem, index)
    chain = problem.params.logit_scale * (1.0 if inv_temperature is None else inv_temperature)
    z, slope = transform(problem, z, bias, inv_temperature, with_slope=True)
    rows = RowStats(*stats)
    z.sub_(rows.peak[:, None]).sub_(rows.offset[:, None])
    at_label = grad_logp * rows.other_mass
    if grad_entropy is None:
        exp_(z).mul_(-grad_logp[:, None] * chain)
    else:
        p_label = torch.exp(rows.logp)
        at_label = at_label - torch.where(p_label == 0, 0.0, grad_entropy * p_label * (rows.logp + rows.entropy))
        p = exp_(z.clamp_(min=FAR).clone())
        z += rows.entropy[:, None]
        z.mul_(-grad_entropy[:, None]).sub_(grad_logp[:, None]).mul_(p).mul_(chain)
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1)[:, None]
    z.scatter_(1, column, torch.where(inside[:, None], at_label[:, None] * chain, z.gather(1, column)))
    return without_denormals(z if slope is None else z.mul_(slope))


def find_labels(entries, targets):
    """(n,) where among the rising ``entries`` each label stands, or -1."""
    at = torch.searchsorted(entries, targets)
    found = entries[at.clamp(max=entries.numel() - 1)] == targets
    return torch.where(found, at, -1)


def counted_rows(targets):
    """(n,) the rows that are not ignored; the host waits for their number."""
    return (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)
