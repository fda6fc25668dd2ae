"""Running sums and statistics of two models' rows of logits at once, written once for torch and Triton.

As :mod:`fastgrpo.row_math`. The models are called first and second: of a Kullback-Leibler divergence the one that the
mean is over, and the other. ``u`` is a logit minus its row's peak, ``d`` the first's u minus the second's. Sums over
the entries: ``total`` e^u_first, ``other`` e^u_second, ``tilt`` d e^u_first, ``excess`` e^u_second - e^u_first. The
excess is summed apart, from terms that are small where the models agree: the totals would cancel to rounding noise.

An entry's gradient, d divergence / d its logit, is ``(x - center * y) / unit``. Of KL(student || teacher) x = d e^u and
y = e^u of the student; of KL(teacher || student) x = e^u_second - e^u_first and y = e^u_first; of a mixture x =
(1 - beta) p_s log(p_s / m) and y = p_s. So x is small where the models agree, and sums of x^2 do not cancel.
"""

import torch

from fastgrpo.torch_tl import tl

# The kernels have their own.
expm1, log1p = torch.expm1, torch.log1p  # of [-1/2, 1/2] and [-1/2, 1]
expm1_down, log1p_down = torch.Tensor.expm1_, torch.Tensor.log1p_  # of [-inf, 0] and [-1, 0]; the kernels' base is 2
NEAR = 0.5  # |d| up to which a difference of exponentials is made of d


def move_peaks(total, other, tilt, excess, rise, other_rise):
    """The sums beside peaks that are higher by ``rise`` and ``other_rise``, both >= 0."""
    decay, other_decay = tl.exp(-rise), tl.exp(-other_rise)
    turn = rise - other_rise
    near = tl.abs(turn) < NEAR
    steady = decay * (excess + expm1(tl.where(near, turn, 0.0)) * other)
    excess = tl.where(near, steady, other * other_decay - total * decay)
    return total * decay, other * other_decay, decay * (tilt - turn * total), excess


def join_sums(
    peak, other_peak, total, other, tilt, excess, more_peak, more_other_peak, more_total, more_other, more_tilt,
    more_excess,
):  # fmt: skip
    """Two rows of peaks and sums as one."""
    high = tl.where(peak > more_peak, peak, more_peak)
    other_high = tl.where(other_peak > more_other_peak, other_peak, more_other_peak)
    total, other, tilt, excess = move_peaks(total, other, tilt, excess, high - peak, other_high - other_peak)
    more_total, more_other, more_tilt, more_excess = move_peaks(
        more_total, more_other, more_tilt, more_excess, high - more_peak, other_high - more_other_peak
    )
    return high, other_high, total + more_total, other + more_other, tilt + more_tilt, excess + more_excess


def finish_sums(total, other, tilt, excess):
    """-> KL(first || second), log of total, log of other over total: of finished sums.

    The log is made of the excess where that is small: KL = tilt / total + log(other / total), whose terms are of first
    order in d and cancel to second.
    """
    part = excess / total
    near = tl.abs(part) < NEAR
    gap = tl.where(near, log1p(tl.where(near, part, 0.0)), tl.log(other / total))
    return tilt / total + gap, tl.log(total), gap


def mixture_logs(above, below, apart, share):
    """-> log(p_s / m), log(m / p_t) with m = (1 - beta) p_s + beta p_t, to the base that delta has.

    Without a difference that cancels: the larger of p_s and p_t is compared with m by log1p. Torch's tensors are
    overwritten.

    Args:
        above, below, apart: of delta = log p_s - log p_t its part above 0, its part below, and -|delta|.
        share: beta where delta > 0, 1 - beta where it is not, at 0 either.
    """
    apart = expm1_down(apart)
    apart *= share
    apart = log1p_down(apart)
    below -= apart
    above += apart
    return below, above


def scale_terms(total, other, tilt, excess, student_first):
    """-> center and unit of a KL's gradient, of the sums so far."""
    if student_first:
        center, unit = tilt / total, total
    else:
        center, unit = excess / total, other
    return center, unit


def steepest(mean, share):
    """At least the largest |d divergence / d logit| of a row where p_s log(p_s / q) is summed, ``share`` times.

    Terms p_s (log(p_s / q) - their mean) add up to 0, and those below it to no more than the mean and the two models'
    total variation, which is sqrt(mean / 2) at most (Pinsker's inequality).

    Args:
        mean: ``share`` times KL(p_s || q); rounding may have left it below 0.
    """
    mean = tl.where(mean > 0, mean, 0.0)
    return mean + tl.sqrt(share * mean * 0.5)


def move_terms(rise, other_rise, student_first):
    """-> lead, trail, lean: beside peaks that are higher by so much x becomes lead * x - lean * y, and y trail * y."""
    trail, turn = tl.exp(-rise), other_rise - rise
    if student_first:
        lead, lean = trail, -trail * turn
    else:
        lead, near = tl.exp(-other_rise), tl.abs(turn) < NEAR
        lean = tl.where(near, lead * expm1(tl.where(near, turn, 0.0)), trail - lead)
    return lead, trail, lean


def move_moments(xx, xy, yy, lead, trail, lean):
    """The sums of x^2, x y and y^2 after :func:`move_terms`'s."""
    square = lead * (lead * xx - 2.0 * lean * xy) + lean * lean * yy
    return square, trail * (lead * xy - lean * yy), trail * trail * yy
