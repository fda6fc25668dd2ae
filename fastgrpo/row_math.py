"""What happens to whole rows of logits, written once for torch and Triton: running sums, statistics, gradient factors.

As in ``fastgrpo.objective`` the functions use operators and the names of ``tl`` alone; ``kernels/row_math.py`` rebinds
them. Of a row, without the label: ``peak``, one of the logits or near the largest; ``total``, the sum of exp(z - peak);
``spread``, that of exp(z - peak) * (peak - z).
"""

import torch

from fastgrpo.backends.problem import ABSENT
from fastgrpo.torch_tl import tl

log1p = torch.log1p  # of [0, 1]; the kernels have their own


def move_sums(total, spread, rise, decay):
    """-> total and spread beside a peak that is ``rise`` higher; decay: e^-rise."""
    return total * decay, (spread + rise * total) * decay


def rescale(peak, total, spread, new_peak):
    """-> total and spread beside another peak, and the factor that any sum of exp(z - peak) takes."""
    decay = tl.exp(peak - new_peak)
    total, spread = move_sums(total, spread, new_peak - peak, decay)
    return total, spread, decay


def softplus(x):
    """log(1 + e^x) to the dtype's relative accuracy, also far out and at +-inf; torch's own drops e^-x beyond 20."""
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


def row_stats(peak, total, spread, label):
    """:class:`fastgrpo.backends.problem.RowStats` of finished sums and the label's logit, as a tuple.

    ``gap`` is the others' log-sum-exp minus the label's logit. Nothing is subtracted that cancels as p -> 1.
    """
    label = tl.where(label < ABSENT, -float("inf"), label)
    log_total = tl.log(total)
    own = label - peak
    gap = log_total - own
    logp = -softplus(gap)
    other_mass = tl.sigmoid(gap)
    offset = tl.where(own < log_total, log_total, own) + log1p(tl.exp(-tl.abs(gap)))
    # Zero mass outside the label (V = 1): nothing to add, and log(0) is not to be met.
    rest = tl.where(other_mass > 0, other_mass * (softplus(-gap) + (log_total + spread / total)), other_mass)
    entropy = tl.where(logp > -float("inf"), -tl.exp(logp) * logp, 0.0) + rest
    return logp, peak, offset, other_mass, entropy


def gradient_at_label(grad_logp, grad_entropy, logp, other_mass, entropy):
    """d loss / d the label's logit: g (1 - p) - h p (log p + H), the first from 1 - p itself; grad_entropy: or None."""
    at_label = grad_logp * other_mass
    if grad_entropy is not None:
        p = tl.exp(logp)
        at_label = at_label - tl.where(p == 0, 0.0, grad_entropy * p * (logp + entropy))
    return at_label


def direction_factors(chain, other_mass, total):
    """Of d logp / d hidden: -> the factors of the label's row of W and of the others' sum. chain: d logit / d raw."""
    at_label = chain * other_mass
    return at_label, tl.where(total == 0, 0.0, at_label / total)  # V = 1: there are no others
