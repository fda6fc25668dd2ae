"""Divergences where the vocabulary is cut over the ranks of a process group: each holds rows of both heads.

Every rank folds its own entries; a MAX and a SUM all-reduce merge them, for a mixture each head's statistics first. The
backward is that of the rank's entries with the merged statistics: dW and db are the rank's own, dX a sum over ranks.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fastgrpo import backends, divergence, inputs, vocab_parallel
from fastgrpo.backends.divergence import beside_peaks, kl_stats
from fastgrpo.backends.pair import PairStats, mixture_stats
from fastgrpo.backends.problem import Gradients, RowStats
from fastgrpo.config import settings_go_in_config
from fastgrpo.divergence import Divergence, PairTensors, TeacherHead
from fastgrpo.head import HeadOptions
from fastgrpo.inputs import IGNORE, Backend


def merge_kl(partials, student_first, group):
    """(8, N) :class:`PairStats` of the whole vocabulary from every rank's (7, N) sums."""
    top = partials[:2].clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    moved = torch.stack(beside_peaks(partials, top, student_first))
    dist.all_reduce(moved, group=group)
    return torch.stack(kl_stats(top, moved[:4], moved[4], student_first))


def merge_mixture(problem, backend, group):
    """(8, N) :class:`PairStats` of a mixture: both log-sum-exps, then the sums that want them."""
    known, entries = problem.targets != IGNORE, problem.targets
    if dist.get_rank(group) > 0:  # entry 0 stands in for a label; that of the first rank
        entries = torch.where(known, inputs.ELSEWHERE, entries)
    own, other = (
        RowStats(*vocab_parallel.combine_known(
            vocab_parallel.merge(backend.partial_forward(replace(p, targets=entries)), entries, group), entries, known
        ))
        for p in (problem.own, problem.teacher)
    )  # fmt: skip
    stats = torch.stack(mixture_stats(own, other))
    sums = backend.mixture_sums(problem, stats)
    dist.all_reduce(sums, group=group)
    return torch.stack(PairStats(*stats)._replace(divergence=sums[0], center=sums[1]))


class VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, params, share = arguments
        tensors = PairTensors(*tensors)
        ctx.set_materialize_grads(False)
        ctx.params, ctx.share, ctx.pairing = params, share, tensors.pairing
        problem, backend = tensors.problem(params), backends.load(params.backend)
        with torch.autocast(tensors.hidden.device.type, enabled=False):
            if problem.is_mixture:
                stats = merge_mixture(problem, backend, share.group)
            else:
                stats = merge_kl(backend.divergence_partials(problem), problem.beta == 1.0, share.group)
            stats = torch.where(tensors.targets == IGNORE, 0.0, stats)
        ctx.save_for_backward(stats, *tensors[:-1])
        entropy = PairStats(*stats).entropy.clone() if params.entropy else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return PairStats(*stats).divergence.clone(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        nothing = [None] * (len(PairTensors._fields) + 2)
        if grad is None:
            return tuple(nothing)
        stats, *tensors = ctx.saved_tensors
        problem = PairTensors(*tensors, pairing=ctx.pairing).problem(ctx.params)
        with torch.autocast(stats.device.type, enabled=False):
            needs = Gradients(*ctx.needs_input_grad[:3])
            grads = backends.load(ctx.params.backend).backward(problem, stats, grad, None, needs)
        d_hidden = grads.hidden
        if d_hidden is not None and ctx.share.reduce_hidden_grad:
            dist.all_reduce(d_hidden, group=ctx.share.group)
            d_hidden = d_hidden.to(problem.hidden.dtype)
        return d_hidden, grads.weight, grads.bias, *nothing[3:]


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
    workspace_mb: float = 128,
) -> Divergence:
    """:func:`fastgrpo.linear_divergence` over a vocabulary whose entries the ranks of a group hold.

    Every rank calls it with the same hidden states, mask and options, and its own entries of both heads; shards need
    not be equal, and their order does not matter. The forward sends two all-reduces, (2, N) and (5, N), for a mixture
    five; the backward, which is exact, sends dX in the accumulator's dtype where hidden wants a gradient.

    Args:
        group: the torch.distributed process group that the vocabulary is cut over.
        reduce_hidden_grad: as in :func:`fastgrpo.vocab_parallel.vocab_parallel_logprobs`. The others: as in
            ``linear_divergence``.

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
        backward="exact",
        workspace_mb=workspace_mb,
        return_entropy=return_entropy,
    )
    teacher = TeacherHead(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    targets = divergence.check(hidden, weight, mask, teacher, beta, options)
    hidden_grad = inputs.accumulator_dtype(hidden) if reduce_hidden_grad else None
    params = options.params(hidden, weight, (hidden, weight, bias), hidden_grad=hidden_grad, shard=True)
    tensors = divergence.pair_tensors(hidden, weight, targets, teacher, beta, options, params)
    share = vocab_parallel.Share(group, bool(reduce_hidden_grad))
    value, entropy = VocabParallelDivergence.apply(*tensors, params, share)
    return Divergence(value.view(targets.shape), None if entropy is None else entropy.view(targets.shape))
