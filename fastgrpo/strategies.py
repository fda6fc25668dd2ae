"""The ways from log-probs back to gradients: what each keeps from its forward, and what its backward makes of it.

A strategy has ``forward(problem, backend, given)``, which returns the (5, N) statistics of
:class:`fastgrpo.backends.problem.RowStats` and the tensors to keep, and ``backward(problem, backend, stats, kept,
grad_logp, grad_entropy, needs)``, which returns :class:`fastgrpo.backends.problem.Gradients`. ``grad_entropy`` may be
None.
"""

from typing import NamedTuple

import torch

from fastgrpo import support
from fastgrpo.backends import certified, certified_backward, frozen


class Given(NamedTuple):
    """What a forward may use beside the problem."""

    hint: torch.Tensor | None  # (N,) log-probs near the current ones
    moving: torch.Tensor | None  # (N,) bool, where a log-prob may have a gradient
    support: support.Support | None


class Exact:
    """Every vocabulary entry of every row with a gradient, its logits made again."""

    @staticmethod
    def forward(problem, backend, given):
        return backend.forward(problem), ()

    @staticmethod
    def backward(problem, backend, stats, kept, grad_logp, grad_entropy, needs):
        return backend.backward(problem, stats, grad_logp, grad_entropy, needs)


class Certified:
    """The entries that matter, see :mod:`fastgrpo.backends.certified`; exact where the entropy has a gradient."""

    @staticmethod
    def forward(problem, backend, given):
        stats, certificate = backend.certified_forward(problem, given.hint)
        return stats, certificate.tensors

    @staticmethod
    def backward(problem, backend, stats, kept, grad_logp, grad_entropy, needs):
        if grad_entropy is not None:  # the certificate does not speak of the entropy
            return backend.backward(problem, stats, grad_logp, grad_entropy, needs)
        certificate = certified.Certificate(*kept, block=backend.rows_per_flag(problem))
        return certified_backward.backward(problem, stats, certificate, grad_logp, needs)


class Frozen:
    """Hidden's gradient made in the forward, see :mod:`fastgrpo.backends.frozen`."""

    @staticmethod
    def forward(problem, backend, given):
        return backend.frozen_forward(problem, given.hint, given.moving)

    @staticmethod
    def backward(problem, backend, stats, kept, grad_logp, grad_entropy, needs):
        if grad_entropy is not None:
            return backend.backward(problem, stats, grad_logp, grad_entropy, needs)
        return frozen.backward(problem, stats, frozen.Slopes(*kept), grad_logp, needs)


class Supported:
    """The entries that the sampler kept, see :mod:`fastgrpo.support`."""

    @staticmethod
    def forward(problem, backend, given):
        stats, raw = support.forward(problem, given.support, backend)
        return stats, (raw, *given.support)

    @staticmethod
    def backward(problem, backend, stats, kept, grad_logp, grad_entropy, needs):
        raw, *entries = kept
        entries = support.Support(*entries)
        return support.backward(problem, entries, backend, stats, raw, grad_logp, grad_entropy, needs)


def choose(hidden, head, params, with_support, entropy_grad):
    """The strategy of a call.

    Args:
        head: weight, bias and LoRA's A and B, or None. entropy_grad: whether the entropy may have a gradient.
    """
    if with_support:
        return Supported
    if not entropy_grad and frozen.applies(hidden, head, params):
        return Frozen
    return trained(params)


def trained(params):
    """Of a head that wants a gradient, or a part of one."""
    return Exact if params.tolerance is None else Certified
