"""Divergences where the vocabulary is cut over the ranks of a process group: each holds rows of both heads.

Every rank folds its own entries; a MAX and a SUM all-reduce merge them, for a mixture each head's statistics first. The
backward is that of the rank's entries with the merged statistics: dW and db are the rank's own, dX a sum over ranks.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from fastgrpo import backends, divergence, inputs, ops, strategies, vocab_parallel
from fastgrpo.backends import divergence as divergence_fold
from fastgrpo.backends.divergence import beside_peaks, kl_stats
from fastgrpo.backends.pair import PairStats
from fastgrpo.backends.problem import Gradients
from fastgrpo.config import settings_go_in_config
from fastgrpo.divergence import Divergence, PairTensors, TeacherHead
from fastgrpo.head import HeadOptions
from fastgrpo.inputs import IGNORE, Backend, Backward
from fastgrpo.pair_math import move_terms, scale_terms


class Ranks:
    """Of the group, for :func:`fastgrpo.backends.divergence_panels.forward` too."""

    def __init__(self, group):
        self.group = group

    def merge(self, partials, student_first):
        """-> (2, N) peaks, (4, N) sums and (N,) spread of the whole vocabulary, from every rank's (7, N): one MAX and
        one SUM all-reduce."""
        top = partials[:2].clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        moved = self.add_up(torch.stack(beside_peaks(partials, top, student_first)))
        return top, moved[:4], moved[4]

    def add_up(self, x):
        dist.all_reduce(x, group=self.group)
        return x

    def least(self, number, device):
        least = torch.tensor(-number, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MAX, group=self.group)
        return -int(least)


def merge_mixture(problem, backend, ranks):
    """(8, N) :class:`PairStats` of a mixture: what both models' log-sum-exps tell, divergence and center 0."""
    top, sums, spread = ranks.merge(backend.divergence_partials(problem), False)
    return torch.stack(divergence_fold.level_stats(top, sums, spread, False))


def add_sums(stats, sums, ranks):
    """A mixture's divergence and center, (2, N), summed over the ranks, into the statistics."""
    sums = ranks.add_up(sums)
    return torch.stack(PairStats(*stats)._replace(divergence=sums[0], center=sums[1]))


def forward(problem, backend, ranks, strategy):
    """-> (8, N) :class:`PairStats` of the whole vocabulary, and what this rank keeps for the strategy's backward."""
    if strategy is strategies.DivergingFrozen:
        return backend.frozen_divergence_forward(problem, ranks)
    if strategy is strategies.DivergingCertified:
        return certified_forward(problem, backend, ranks)
    if problem.is_mixture:
        stats = merge_mixture(problem, backend, ranks)
        return add_sums(stats, backend.mixture_sums(problem, stats), ranks), ()
    student_first = problem.beta == 1.0
    top, sums, spread = ranks.merge(backend.divergence_partials(problem), student_first)
    return torch.stack(kl_stats(top, sums, spread, student_first)), ()


def certified_forward(problem, backend, ranks):
    """Every rank flags by its own entries alone; what they leave out is told in terms of the whole vocabulary."""
    if problem.is_mixture:
        stats = merge_mixture(problem, backend, ranks)
        sums, rows, witness = backend.certified_partials(problem, stats)
        stats = add_sums(stats, sums, ranks)
        still = torch.ones_like(witness.center)
        witness.settle((still, still, torch.zeros_like(still)), PairStats(*stats).center[rows], still)
    else:
        student_first = problem.beta == 1.0
        partials, rows, witness = backend.certified_partials(problem)
        top, sums, spread = ranks.merge(partials, student_first)
        stats = torch.stack(kl_stats(top, sums, spread, student_first))
        rise, other_rise = (top - partials[:2])[:, rows]
        total, other, tilt, excess = sums[:, rows]
        frame = scale_terms(total, other, tilt, excess, student_first)
        witness.settle(move_terms(rise, other_rise, student_first), *frame)
    squares = torch.zeros_like(stats[0])
    squares[rows] = witness.row_norms().square()
    stats = torch.stack(PairStats(*stats)._replace(norm=ranks.add_up(squares).sqrt()))
    return stats, witness.certificate(rows).tensors


class VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, params, strategy, share = arguments
        tensors = PairTensors(*tensors)
        ctx.set_materialize_grads(False)
        ctx.params, ctx.strategy, ctx.share = params, strategy, share
        problem, backend = tensors.problem(params), backends.load(params.backend)
        with torch.autocast(tensors.hidden.device.type, enabled=False):
            stats, kept = forward(problem, backend, Ranks(share.group), strategy)
            stats = torch.where(tensors.targets == IGNORE, 0.0, stats)
        ctx.save_for_backward(stats, *tensors, *kept)
        entropy = PairStats(*stats).entropy.clone() if params.entropy else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return PairStats(*stats).divergence.clone(), entropy

    @staticmethod
    @ops.once_differentiable
    def backward(ctx, grad, _):
        nothing = [None] * (len(PairTensors._fields) + 3)
        if grad is None:
            return tuple(nothing)
        stats, *rest = ctx.saved_tensors
        count = len(PairTensors._fields)
        problem = PairTensors(*rest[:count]).problem(ctx.params)
        with torch.autocast(stats.device.type, enabled=False):
            needs, backend = Gradients(*ctx.needs_input_grad[:3]), backends.load(ctx.params.backend)
            grads = ctx.strategy.backward(problem, backend, (), stats, rest[count:], grad, None, needs)
        return ctx.share.reduce(grads.hidden, problem.hidden.dtype), grads.weight, grads.bias, *nothing[3:]


@settings_go_in_config
def vocab_parallel_divergence(
    hidden: torch.Tensor,  # (N, D) or (B, T, D), the same on every rank
    weight: torch.Tensor,  # (V_r, D), this rank's rows of the head
    teacher_hidden: torch.Tensor,  # (N, D_t) or (B, T, D_t), the same on every rank
    teacher_weight: torch.Tensor,  # (V_r, D_t), the same entries of the teacher's
    mask: torch.Tensor | None = None,  # (N,) or (B, T), the same on every rank
    *,
    group: dist.ProcessGroup | None,
    reduce_hidden_grad: bool = True,
    beta: float = 1.0,
    bias: torch.Tensor | None = None,  # (V_r,)
    teacher_bias: torch.Tensor | None = None,  # (V_r,)
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    return_entropy: bool = False,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float = 128,
    row_tolerance: float | None = None,
) -> Divergence:
    """:func:`fastgrpo.linear_divergence` over a vocabulary whose entries the ranks of a group hold.

    Every rank calls it with the same hidden states, mask and options, and its own entries of both heads; shards need
    not be equal, and their order does not matter. The forward sends two all-reduces, (2, N) and (5, N), for a mixture
    a third, (2, N), and one, (N,), where the backward is to be certified; where hidden alone wants a gradient the torch
    backend sends them panel by panel of rows, and the panel's height. The backward sends dX in the accumulator's dtype
    where hidden wants a gradient.

    Args:
        group: the torch.distributed process group that the vocabulary is cut over.
        reduce_hidden_grad: as in :func:`fastgrpo.vocab_parallel.vocab_parallel_logprobs`.
        backward, tolerance, row_tolerance: as in ``linear_divergence``, but "auto" asks no rank for its CPU; each rank
            keeps its own entries' error within tolerance / sqrt(ranks). The others: as there.

    Returns:
        ``Divergence(divergence, entropy)`` of the whole vocabulary, the same on every rank; differentiable, once, in
        hidden, weight and bias.

    Raises:
        ValueError, TypeError: a bad argument, named, before anything is sent.
    """
    vocab_parallel.check_group(group)
    options = HeadOptions(
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        backend=backend,
        backward=backward,
        tolerance=tolerance,
        workspace_mb=workspace_mb,
        row_tolerance=row_tolerance,
        return_entropy=return_entropy,
    )
    teacher = TeacherHead(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    targets = divergence.check(hidden, weight, mask, teacher, beta, options)
    hidden_grad = inputs.accumulator_dtype(hidden) if reduce_hidden_grad else None
    sizes = (targets.numel(), math.inf, weight.shape[1])  # shards differ, the decision may not
    params = options.params(hidden, weight, (hidden, weight, bias), sizes, hidden_grad=hidden_grad, shard=True)
    head = weight, bias, None, None
    tolerance = divergence.tolerance_of(params, beta, backward, divergence.wants_gradient(head))
    if tolerance is not None:
        tolerance /= dist.get_world_size(group) ** 0.5
    params = teacher.beside(replace(params, tolerance=tolerance), beta)
    strategy = divergence.choose_strategy(hidden, head, params)
    tensors = divergence.pair_tensors(hidden, weight, targets, teacher, options)
    share = vocab_parallel.Share(group, bool(reduce_hidden_grad))
    value, entropy = VocabParallelDivergence.apply(*tensors, params, strategy, share)
    return Divergence(value.view(targets.shape), None if entropy is None else entropy.view(targets.shape))
