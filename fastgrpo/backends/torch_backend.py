"""Plain torch behind the backends' interface."""

import torch

from fastgrpo.backends import certified, dense, dense_backward, divergence, divergence_panels, frozen, kept
from fastgrpo.backends import certified_backward as _certified_backward
from fastgrpo.inputs import accumulator_dtype
from fastgrpo.objective import token_objective

GUESSES_PEAKS = True  # of a certified forward: a sum of exp may leave the trusted range

forward = dense.forward
partial_forward = dense.partial_forward
certified_forward = certified.forward
certified_partial_forward = certified.partial_forward
frozen_forward = frozen.forward
slopes_like = frozen.slopes_like
divergence_forward = divergence.forward
divergence_partials = divergence.divergence_partials
mixture_sums = divergence.mixture_sums
certified_partials = divergence.certified_partials
certified_divergence_forward = divergence.certified_forward
frozen_divergence_forward = divergence_panels.forward
divergence_slopes_like = divergence_panels.slopes_like
trained_divergence_forward = divergence_panels.trained_forward
backward = dense_backward.backward


def certificate_like(problem):
    """(shape, dtype) of each tensor of a certificate, at the most rows."""
    n, vocab, _ = problem.sizes
    blocks = -(-n // certified.BLOCK)
    return ((n,), torch.int64), ((blocks, vocab), torch.bool), ((n,), accumulator_dtype(problem.hidden))


def certified_backward(problem, stats, kept, grad_logp, needs):
    """kept: the tensors of the forward's certificate."""
    certificate = certified.Certificate(*kept, block=certified.BLOCK)
    return _certified_backward.backward(problem, stats, certificate, grad_logp, needs)


counted_rows = dense.counted_rows
kept_logits = kept.kept_logits
kept_sums = kept.kept_sums


def objective(config, logp, old_logp, ref_logp, log_w, log_w_seq, adv, gate):
    """The per-token terms of :func:`fastgrpo.objective.token_objective`, (N,) each."""
    return token_objective(
        logp,
        old_logp,
        ref_logp,
        log_w,
        log_w_seq,
        adv,
        gate,
        config.hyper_parameters,
        config.surrogate,
        config.divergence_mask,
        config.kl_estimator,
        config.kl_correction,
    )
