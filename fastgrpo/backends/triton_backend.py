"""The fused kernels of ``fastgrpo.kernels`` behind the backends' interface."""

import contextlib
from dataclasses import replace

import torch

from fastgrpo.backends import frozen
from fastgrpo.backends.pair import PairProblem
from fastgrpo.inputs import IGNORE
from fastgrpo.kernels import backward as _backward
from fastgrpo.kernels import certified as _certified
from fastgrpo.kernels import certified_divergence as _certified_divergence
from fastgrpo.kernels import divergence as _divergence
from fastgrpo.kernels import divergence_backward as _divergence_backward
from fastgrpo.kernels import flags as _flags
from fastgrpo.kernels import forward as _forward
from fastgrpo.kernels import frozen as _frozen
from fastgrpo.kernels import held as _held
from fastgrpo.kernels import objective as _objective
from fastgrpo.kernels import support as _support

GUESSES_PEAKS = False  # of a certified forward


def on_device(x):
    """Kernels launch on the current device: make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward(problem):
    with on_device(problem.hidden):
        return _forward.forward(problem)


def partial_forward(problem):
    with on_device(problem.hidden):
        return _forward.partial_forward(problem)


def certified_forward(problem, hint):
    with on_device(problem.hidden):
        return _forward.certified_forward(problem, hint)


def certified_partial_forward(problem, label, hint):
    with on_device(problem.hidden):
        return _forward.certified_partial_forward(problem, label, hint)


def frozen_forward(problem, hint, moving):
    """Rows that cannot have a gradient go through the plain forward; the hint is not needed."""
    with on_device(problem.hidden):
        if moving is None:
            stats, directions = _frozen.frozen_forward(problem)
            return stats, frozen.Slopes(None, directions, None)
        stats, directions = _frozen.frozen_forward(only(problem, moving))
        return stats + _forward.forward(only(problem, ~moving)), frozen.Slopes(None, directions, None)


def slopes_like(problem):
    """As :func:`fastgrpo.backends.frozen.slopes_like`: every row's stand in their order, nothing is left out."""
    n, _, depth = problem.sizes
    return None, ((n, depth), torch.float32), None


def only(problem, rows):
    """The problem with all other rows ignored, whose statistics are 0 then."""
    return replace(problem, targets=torch.where(rows, problem.targets, IGNORE))


def divergence_forward(problem):
    with on_device(problem.hidden):
        return (_held if problem.params.held_rows(problem.sizes[1]) else _divergence).forward(problem)


def frozen_divergence_forward(problem):
    with on_device(problem.hidden):
        stats, directions = _held.frozen_forward(problem)
    return stats, frozen.Slopes(None, directions, None)


divergence_slopes_like = slopes_like


def certified_divergence_forward(problem, hint=None, labels=None):
    with on_device(problem.hidden):
        return _certified_divergence.certified_forward(problem, hint, labels)


def certified_partials(problem, stats=None):
    with on_device(problem.hidden):
        return _certified_divergence.certified_partials(problem, stats)


def divergence_partials(problem):
    with on_device(problem.hidden):
        return _divergence.divergence_partials(problem)


def mixture_sums(problem, stats):
    with on_device(problem.hidden):
        return _divergence.mixture_sums(problem, stats)


def backward(problem, stats, grad_logp, grad_entropy, needs):
    with on_device(problem.hidden):
        if isinstance(problem, PairProblem):
            return _divergence_backward.backward(problem, stats, grad_logp, needs)
        return _backward.backward(problem, stats, grad_logp, grad_entropy, needs)


def flagging_kernel(problem):
    """The name of the problem's certified forward."""
    return (_divergence.kernel_name if isinstance(problem, PairProblem) else _forward.forward_name)(problem, True)


def certificate_like(problem):
    """(shape, dtype) of each tensor of a certificate."""
    n, (block, words) = problem.targets.numel(), _flags.flag_shape(problem, flagging_kernel(problem))
    return ((n,), torch.int64), ((-(-n // block), words), torch.int32), ((n,), torch.float32)


def certified_backward(problem, stats, kept, grad, needs):
    """kept: the tensors of the forward's certificate."""
    kernels = _divergence_backward if isinstance(problem, PairProblem) else _certified
    with on_device(problem.hidden):
        certificate = _flags.certificate(problem, flagging_kernel(problem), *kept)
        return kernels.certified_backward(problem, stats, certificate, grad, needs)


def counted_rows(targets):
    return None


def kept_logits(problem, support):
    with on_device(problem.hidden):
        return _support.kept_logits(problem, support)


def kept_sums(problem, *arguments):
    with on_device(problem.hidden):
        return _support.kept_sums(problem, *arguments)


def objective(config, logp, *tensors):
    with on_device(logp):
        return _objective.objective(config, logp, *tensors)
