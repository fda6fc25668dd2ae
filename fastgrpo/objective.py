"""The per-token mathematics of every variant, written once for torch and Triton.

The functions use operators and the names of ``tl`` alone, here :mod:`fastgrpo.torch_tl`'s; ``kernels/objective.py``
rebinds the same code to ``triton.language``. Formulas: TRL 1.16's ``_compute_loss`` for the loss types, Liu et al. 2025
(GSPO), Ye et al. 2020 (dual clip), Schulman's k1/k2/k3, DPPO (arXiv 2602.04879).

Clamps are written with ``where`` so that a NaN log-prob stays a NaN on both sides.
"""

from typing import NamedTuple

from fastgrpo.torch_tl import tl


class HyperParameters(NamedTuple):
    """Numbers of one objective; see ``GRPOLossConfig`` for their meaning."""

    clip_low: float
    clip_high: float
    delta: float
    dual_clip: float
    ratio_cap: float
    divergence_low: float
    divergence_high: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    beta: float


def zero_unless_nan(x):
    """0, but a NaN stays one: a bad log-prob must not end in a clean zero gradient."""
    return tl.where(x == x, tl.zeros_like(x), x)


def exp_residual(x):
    """exp(x) - 1 - x; a series near 0, where the plain form cancels to nothing."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320))))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0 - x)


def one_minus_exp(x):
    """1 - exp(x) for x <= 0, accurate as x -> 0."""
    return -(x + exp_residual(x))


def other_mass(logp):
    """1 - p, in (0, 1]: beyond -40 nothing of p is left in it, and -inf would make NaN."""
    return one_minus_exp(tl.where(logp < -1e-12, tl.where(logp > -40.0, logp, -40.0), -1e-12))


def outside_trust_region(logp, old_logp, adv, hp, DIVERGENCE: tl.constexpr):
    """DPPO's mask: the sampled token's probability has moved too far, in the direction the advantage pushes it."""
    p_old = tl.exp(old_logp)
    moved = tl.exp(logp) - p_old
    if DIVERGENCE == "tv":
        up = moved > hp.divergence_high
        down = moved < -hp.divergence_low
    else:
        q_old = other_mass(old_logp)
        own = tl.where(p_old == 0, tl.zeros_like(p_old), p_old * (old_logp - logp))  # 0 of an old log-prob of -inf
        divergence = own + q_old * tl.log(q_old / other_mass(logp))
        up = (divergence > hp.divergence_high) & (moved > 0)
        down = (divergence > hp.divergence_low) & (moved < 0)
    return tl.where(adv > 0, up, down)


def clipped_surrogate(ratio, adv, hp):
    bounded = tl.where(ratio > hp.delta, hp.delta, ratio)
    clipped = tl.where(ratio < hp.clip_low, hp.clip_low, tl.where(ratio > hp.clip_high, hp.clip_high, ratio))
    first = bounded * adv
    second = clipped * adv
    keeps_first = first <= second
    loss = -tl.where(keeps_first, first, second)
    inside = (ratio >= hp.clip_low) & (ratio <= hp.clip_high)
    flows = (keeps_first & (ratio <= hp.delta)) | ((first > second) & inside)
    dual = (adv < 0) & (loss > -adv * hp.dual_clip)
    loss = tl.where(dual, -adv * hp.dual_clip, loss)
    d_log_w = tl.where(flows & (dual == 0), -ratio * adv, zero_unless_nan(ratio))
    return loss, d_log_w, (bounded < hp.clip_low) & (adv < 0), (bounded > hp.clip_high) & (adv > 0)


def sapo_gate(ratio, temperature):
    """Soft gate (4 / tau) sigmoid(tau (ratio - 1)) and its derivative in the ratio."""
    x = temperature * (ratio - 1.0)
    gate = tl.sigmoid(x)
    return gate * (4.0 / temperature), 4.0 * gate * tl.sigmoid(-x)


def vespo_weight(log_w_seq, k, lam):
    phi = tl.exp(lam + k * log_w_seq - lam * tl.exp(log_w_seq))
    return tl.where(phi == float("inf"), tl.zeros_like(phi), phi)


def surrogate(logp, old_logp, ratio, log_w_seq, adv, hp, KIND: tl.constexpr, DIVERGENCE: tl.constexpr):
    """-> loss, its derivative in logp at a fixed ratio, its derivative in log ratio, clipped low, clipped high."""
    if KIND == "clip":
        loss, d_log_w, low, high = clipped_surrogate(ratio, adv, hp)
        d_logp = tl.zeros_like(ratio)
    elif KIND == "capped":
        weight = tl.where(ratio > hp.ratio_cap, hp.ratio_cap, ratio)
        d_logp = -weight * adv
        low = ratio < -1.0
        high = (ratio > hp.ratio_cap) & (adv > 0)
        if DIVERGENCE is not None:
            outside = outside_trust_region(logp, old_logp, adv, hp, DIVERGENCE)
            d_logp = tl.where(outside, tl.zeros_like(ratio), d_logp)
            low = outside & (adv < 0)
            high = high | (outside & (adv > 0))
        loss = d_logp * logp
        d_log_w = tl.zeros_like(ratio)
    elif KIND == "sapo":
        gate_pos, slope_pos = sapo_gate(ratio, hp.sapo_temperature_pos)
        gate_neg, slope_neg = sapo_gate(ratio, hp.sapo_temperature_neg)
        loss = -tl.where(adv > 0, gate_pos, gate_neg) * adv
        slope = tl.where(adv > 0, slope_pos, slope_neg)
        d_log_w = tl.where(slope == 0, tl.zeros_like(ratio), -slope * adv * ratio)  # a ratio may be inf
        d_logp = tl.zeros_like(ratio)
        low = ratio < -1.0
        high = ratio < -1.0
    else:
        phi_pos = vespo_weight(log_w_seq, hp.vespo_k_pos, hp.vespo_lambda_pos)
        phi_neg = vespo_weight(log_w_seq, hp.vespo_k_neg, hp.vespo_lambda_neg)
        d_logp = -tl.where(adv >= 0, phi_pos, phi_neg) * adv
        loss = d_logp * logp
        d_log_w = tl.zeros_like(ratio)
        low = ratio < -1.0
        high = ratio < -1.0
    return loss, d_logp, d_log_w, low, high


def kl_divergence(logp, ref_logp, ratio, ESTIMATOR: tl.constexpr, CORRECTION: tl.constexpr):
    """-> KL estimate, its derivative in logp at a fixed ratio, its derivative in log ratio.

    A token's own ratio moves with its log-prob: of k3 times it the two derivatives stand in the first, since they are
    as large as exp(gap) each and cancel to gap.
    """
    gap = ref_logp - logp
    if ESTIMATOR == "k1":
        kl = -gap
        d_logp = tl.zeros_like(gap) + 1.0
    elif ESTIMATOR == "k2":
        kl = 0.5 * gap * gap
        d_logp = -gap
    else:
        kl = exp_residual(gap)
        d_logp = -(gap + kl)
    d_log_w = tl.zeros_like(kl)
    if CORRECTION is not None:
        kl = ratio * kl
        if ESTIMATOR == "k3" and CORRECTION == "token":
            d_logp = -ratio * gap
        else:
            d_logp = ratio * d_logp
            d_log_w = kl
    return kl, d_logp, d_log_w


def token_objective(
    logp,  # current log-prob
    old_logp,  # of the policy that sampled
    ref_logp,  # of the reference, or None: no KL term
    log_w,  # log importance ratio: the token's own or its sequence's
    log_w_seq,  # VESPO's clamped sequence log weight, or None
    adv,
    gate,  # multiplies the policy term (importance weight, masks), or None
    hp,
    KIND: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CORRECTION: tl.constexpr,
):
    """-> loss l, dl/dlogp at a fixed ratio, dl/dlog ratio, kl, ratio, clipped low, clipped high."""
    ratio = tl.exp(log_w)
    loss, d_logp, d_log_w, low, high = surrogate(logp, old_logp, ratio, log_w_seq, adv, hp, KIND, DIVERGENCE)
    if gate is not None:
        loss = loss * gate
        d_logp = d_logp * gate
        d_log_w = d_log_w * gate
    if ref_logp is not None:
        kl, kl_logp, kl_log_w = kl_divergence(logp, ref_logp, ratio, ESTIMATOR, CORRECTION)
        loss = loss + hp.beta * kl
        d_logp = d_logp + hp.beta * kl_logp
        d_log_w = d_log_w + hp.beta * kl_log_w
    else:
        kl = tl.zeros_like(loss)
    return loss, d_logp, d_log_w, kl, ratio, low, high
