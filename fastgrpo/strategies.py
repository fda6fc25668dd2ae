"""The ways from log-probs back to gradients: what each keeps from its forward, and what its backward makes of it.

A strategy has ``forward(problem, backend, given)``, which returns the (5, N) statistics of
:class:`fastgrpo.backends.problem.RowStats` and the tensors to keep; ``kept_like(problem, backend, entries)``,
which returns the shapes and dtypes of these, at the most rows that they can have; and ``backward(problem, backend,
entries, stats, kept, grad_logp, grad_entropy, needs)``, which returns :class:`fastgrpo.backends.problem.Gradients`.
``grad_entropy`` may be None. What the call returns is a log-prob a row, unless a strategy has ``logprobs(stats,
kept)`` and its ``shape(rows, entries)``. ``entropy_grad``: whether the entropy that it returns has a gradient.
``hands_over``: how many of the last tensors kept the backward may overwrite; a second one finds None in their place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgrpo import support, topk
from fastgrpo.backends import divergence_panels, frozen
from fastgrpo.inputs import accumulator_dtype


class Given(NamedTuple):
    """What a forward may use beside the problem."""

    hint: torch.Tensor | None  # (N,) log-probs near the current ones
    moving: torch.Tensor | None  # (N,) bool, where a log-prob may have a gradient
    # a :class:`fastgrpo.support.Support`, top-k's ids (N, K), what the hint of a divergence is of (N,), or nothing
    entries: Sequence[torch.Tensor]


class OneTarget:
    """Of every row."""

    entropy_grad = True
    hands_over = 0

    @staticmethod
    def logprobs(stats, kept):
        return stats[0]  # the log-prob, or the divergence

    @staticmethod
    def shape(rows, entries):
        return (rows,)


class Exact(OneTarget):
    """Every vocabulary entry of every row with a gradient, its logits made again."""

    @staticmethod
    def forward(problem, backend, given):
        return backend.forward(problem), ()

    @staticmethod
    def kept_like(problem, backend, entries):
        return ()

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        return backend.backward(problem, stats, grad_logp, grad_entropy, needs)


class Certified(OneTarget):
    """The entries that matter, see :mod:`fastgrpo.backends.certified`; exact where the entropy has a gradient."""

    @staticmethod
    def forward(problem, backend, given):
        stats, certificate = backend.certified_forward(problem, given.hint)
        return stats, certificate.tensors

    @staticmethod
    def kept_like(problem, backend, entries):
        return backend.certificate_like(problem)

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        if grad_entropy is not None:  # the certificate does not speak of the entropy
            return backend.backward(problem, stats, grad_logp, grad_entropy, needs)
        return backend.certified_backward(problem, stats, kept, grad_logp, needs)


class Frozen(OneTarget):
    """Hidden's gradient made in the forward, see :mod:`fastgrpo.backends.frozen`."""

    @staticmethod
    def forward(problem, backend, given):
        return backend.frozen_forward(problem, given.hint, given.moving)

    @staticmethod
    def kept_like(problem, backend, entries):
        return backend.slopes_like(problem)

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        if grad_entropy is not None:
            return backend.backward(problem, stats, grad_logp, grad_entropy, needs)
        return frozen.backward(problem, stats, frozen.Slopes(*kept), grad_logp, needs)


class Supported(OneTarget):
    """The entries that the sampler kept, see :mod:`fastgrpo.support`."""

    @staticmethod
    def forward(problem, backend, given):
        stats, raw = support.forward(problem, support.Support(*given.entries), backend)
        return stats, (raw,)

    @staticmethod
    def kept_like(problem, backend, entries):
        return ((support.Support(*entries).ids.shape, accumulator_dtype(problem.hidden)),)

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        (raw,), entries = kept, support.Support(*entries)
        return support.backward(problem, entries, backend, stats, raw, grad_logp, grad_entropy, needs)


class Diverging(Exact):
    """A divergence of two heads, every entry of every row with a gradient made again."""

    entropy_grad = False

    @staticmethod
    def forward(problem, backend, given):
        return backend.divergence_forward(problem), ()


class DivergingCertified(Certified):
    """A divergence, of whose gradient the entries that matter are made."""

    entropy_grad = False

    @staticmethod
    def forward(problem, backend, given):
        stats, certificate = backend.certified_divergence_forward(problem, given.hint, *given.entries)
        return stats, certificate.tensors


class DivergingFrozen(Frozen):
    """A divergence whose gradient of hidden is made in the forward."""

    entropy_grad = False

    @staticmethod
    def forward(problem, backend, given):
        return backend.frozen_divergence_forward(problem)

    @staticmethod
    def kept_like(problem, backend, entries):
        return backend.divergence_slopes_like(problem)


class DivergingTrained(DivergingFrozen):
    """A divergence whose gradients of hidden and head are made in the forward, see
    :mod:`fastgrpo.backends.divergence_panels`."""

    hands_over = 2

    @staticmethod
    def forward(problem, backend, given):
        stats, slopes, sums = backend.trained_divergence_forward(problem)
        return stats, (*slopes, sums.weight, sums.bias)

    @staticmethod
    def kept_like(problem, backend, entries):
        dtype, bias = accumulator_dtype(problem.hidden), problem.bias
        head = (problem.weight.shape, dtype), None if bias is None else (bias.shape, dtype)
        return *DivergingFrozen.kept_like(problem, backend, entries), *head

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        *slopes, weight, bias = kept
        sums = None if weight is None else (weight, bias)
        return divergence_panels.backward(problem, stats, frozen.Slopes(*slopes), sums, grad_logp, needs)


class TopK:
    """Several targets a row, see :mod:`fastgrpo.topk`; their ids are the one tensor of the entries."""

    entropy_grad = True
    hands_over = 0

    @staticmethod
    def forward(problem, backend, given):
        (ids,) = given.entries
        return topk.forward(problem, ids, backend, given.hint)

    @staticmethod
    def logprobs(stats, kept):
        return kept[topk.LOGPROBS]

    @staticmethod
    def shape(rows, entries):
        return rows, entries[0].shape[1] + 1

    @staticmethod
    def kept_like(problem, backend, entries):
        return topk.kept_like(problem, entries[0], backend)

    @staticmethod
    def backward(problem, backend, entries, stats, kept, grad_logp, grad_entropy, needs):
        of_rest = choose_trained(problem.params)
        return topk.backward(problem, entries[0], backend, of_rest, stats, kept, grad_logp, grad_entropy, needs)


ALL = (Exact, Certified, Frozen, Supported, TopK, Diverging, DivergingCertified, DivergingFrozen, DivergingTrained)


def find(name):
    """The strategy of that name."""
    return {s.__name__: s for s in ALL}[name]


def choose(hidden, head, params, entropy_grad):
    """The strategy of a call with a target a row and every entry.

    Args:
        head: weight, bias and LoRA's A and B, or None. entropy_grad: whether the entropy may have a gradient.
    """
    if not entropy_grad and frozen.applies(hidden, head, params):
        return Frozen
    return choose_trained(params)


def choose_trained(params):
    """Of a head that wants a gradient, or a part of one."""
    return Exact if params.tolerance is None else Certified
