"""Log-probs and entropy where the vocabulary is cut over the ranks of a process group: each holds rows of the LM head.

Every rank makes the statistics of its own entries; one MAX and one SUM all-reduce merge them. The backward, exact or
certified, is that of its entries with the merged statistics: dW and db are the rank's own, dX is a sum over the ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fastgrpo import backends, inputs, ops, strategies, topk
from fastgrpo.backends import certified
from fastgrpo.backends.dense import combine
from fastgrpo.backends.problem import Gradients, HeadProblem, RowStats
from fastgrpo.config import settings_go_in_config
from fastgrpo.head import HeadOptions
from fastgrpo.inputs import ELSEWHERE, IGNORE, Backend, Backward
from fastgrpo.logprobs import LogProbs, TopKLogProbs, several
from fastgrpo.row_math import rescale


@dataclass(frozen=True)
class Share:
    """How the ranks work together."""

    group: object  # torch.distributed.ProcessGroup
    reduce_hidden_grad: bool

    def reduce(self, d_hidden, dtype):
        """hidden's gradient of all ranks, or the rank's own; None stays."""
        if d_hidden is None or not self.reduce_hidden_grad:
            return d_hidden
        dist.all_reduce(d_hidden, group=self.group)
        return d_hidden.to(dtype)


class OneTarget:
    """What a rank computes where a row has a target: ``given`` is its entry here, (N,), whether any rank has it, and
    the hint, (N,) or None."""

    @staticmethod
    def forward(problem, backend, given, group):
        """-> (N,) log-probs, (5, N) statistics of the whole vocabulary, what the backward wants beside them."""
        entries, known, hint = given
        if problem.params.tolerance is None:
            stats, kept = combine_known(merge(backend.partial_forward(problem), entries, group), entries, known), ()
        else:
            stats, certificate = certified_forward(problem, known, hint, group)
            kept = certificate.tensors
        return RowStats(*stats).logp, stats, kept

    @staticmethod
    def backward(problem, backend, given, stats, kept, grad_logp, grad_entropy, needs, group):
        grad_logp = torch.zeros_like(RowStats(*stats).logp) if grad_logp is None else grad_logp
        strategy = strategies.choose_trained(problem.params)
        return strategy.backward(problem, backend, (), stats, kept, grad_logp, grad_entropy, needs)


class Shard:
    """The entries of this rank, for :mod:`fastgrpo.topk`.

    Args:
        entries: (N, K) which of the entries here they are. vocab: of all ranks.
    """

    def __init__(self, entries, vocab, group):
        self.entries, self.vocab, self.group = entries, vocab, group

    def own(self, ids):
        return self.entries

    def add_up(self, x):
        dist.all_reduce(x, group=self.group)
        return x

    def merge(self, partials):
        return merge(partials, torch.full_like(self.entries[:, 0], ELSEWHERE), self.group)


class SeveralTargets:
    """Where a row has K: ``given`` is their ids, (N, K), which of the entries here they are, (N, K), the whole
    vocabulary's size, 0-dim, and the hint."""

    @staticmethod
    def forward(problem, backend, given, group):
        ids, entries, vocab, hint = given
        stats, kept = topk.forward(problem, ids, backend, hint, Shard(entries, vocab, group))
        return kept[topk.LOGPROBS], stats, kept

    @staticmethod
    def backward(problem, backend, given, stats, kept, grads, grad_entropy, needs, group):
        ids, entries, vocab, _ = given
        grads = torch.zeros_like(kept[topk.LOGPROBS]) if grads is None else grads
        strategy, shard = strategies.choose_trained(problem.params), Shard(entries, vocab, group)
        return topk.backward(problem, ids, backend, strategy, stats, kept, grads, grad_entropy, needs, shard)


class VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, params, share, kind, *given):
        ctx.set_materialize_grads(False)
        problem = HeadProblem(hidden, weight, bias, targets, temperature, params)
        ctx.params, ctx.share, ctx.kind, ctx.given = params, share, kind, len(given)
        with torch.autocast(hidden.device.type, enabled=False):
            logp, stats, kept = kind.forward(problem, backends.load(params.backend), given, share.group)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, stats, *given, *kept)
        return logp.clone(), RowStats(*stats).entropy.clone() if params.entropy else None

    @staticmethod
    @ops.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        *tensors, stats = ctx.saved_tensors[:6]
        none = [None] * (5 + ctx.given)
        if grad_logp is None and grad_entropy is None:
            return None, None, None, *none
        given, kept = ctx.saved_tensors[6 : 6 + ctx.given], ctx.saved_tensors[6 + ctx.given :]
        needs, share = Gradients(*ctx.needs_input_grad[:3]), ctx.share
        with torch.autocast(stats.device.type, enabled=False):
            problem, backend = HeadProblem(*tensors, params=ctx.params), backends.load(ctx.params.backend)
            grads = ctx.kind.backward(problem, backend, given, stats, kept, grad_logp, grad_entropy, needs, share.group)
        return share.reduce(grads.hidden, problem.hidden.dtype), grads.weight, grads.bias, *none


def merge(partials, entries, group):
    """(4, N) peak, sums and label's logit of the whole vocabulary from every rank's: one MAX and one SUM all-reduce.

    Args:
        partials: (4, N) of :meth:`fastgrpo.backends.problem.HeadProblem.new_partials`, of this rank's entries.
        entries: (N,) the label's entry here, IGNORE or ELSEWHERE.
    """
    peak, total, spread, label = partials
    top = peak.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    total, spread, _ = rescale(peak, total, spread, top)
    sums = torch.stack((total, spread, torch.where(entries >= 0, label, 0.0)))
    dist.all_reduce(sums, group=group)
    return torch.cat((top[None], sums))


def combine_known(merged, entries, known):
    """(5, N) statistics, 0 at ignored rows; known: (N,) bool, whether any rank has the label."""
    stats = combine(merged[:3], torch.where(known, merged[3], torch.nan))
    return torch.where(entries == IGNORE, 0.0, stats)


def certified_forward(problem, known, hint, group):
    """-> (5, N) statistics of the whole vocabulary and this rank's own certificate, of its entries.

    The ranks agree on nothing but the statistics: each keeps within its part of the error budget. One more SUM
    all-reduce tells every rank the labels' logits, which place the cutoff.
    """
    backend, entries = backends.load(problem.params.backend), problem.targets
    every_row = torch.arange(entries.numel(), device=entries.device)
    label = torch.where(entries >= 0, certified.label_logits(problem, every_row), 0.0)
    dist.all_reduce(label, group=group)
    partials, certificate = backend.certified_partial_forward(problem, torch.where(known, label, torch.nan), hint)
    merged = merge(partials, entries, group)
    stats = combine_known(merged, entries, known)
    rows = certificate.order
    share = certificate.dropped * torch.exp(partials[0, rows] - merged[0, rows]) / merged[1, rows]
    known_rows = RowStats(*stats[:, rows])
    dropped = share * known_rows.other_mass
    dropped = certified.distrust(dropped, known_rows.logp, None if hint is None else hint[rows])
    certificate = replace(certificate, dropped=dropped)
    if backend.GUESSES_PEAKS:
        repair(problem, known, stats, certificate, certified.find_untrusted(*merged[1:3]) & (entries != IGNORE), group)
    return stats, certificate


def repair(problem, known, stats, certificate, bad, group):
    """In place: rows whose guessed peak was far off go through the plain forward; the same rows on every rank."""
    if bad.any():
        again = replace(problem, targets=torch.where(bad, problem.targets, IGNORE))
        partials = backends.load(problem.params.backend).partial_forward(again)
        plain = combine_known(merge(partials, again.targets, group), again.targets, known)
        stats.copy_(torch.where(bad, plain, stats))
        certificate.dropped[bad[certificate.order]] = torch.inf


@settings_go_in_config
def vocab_parallel_logprobs(
    hidden: torch.Tensor,  # (N, D) or (B, T, D), the same on every rank
    weight: torch.Tensor,  # (V_r, D), this rank's rows of the head
    targets: torch.Tensor,  # (N,) or (B, T), or (N, K) or (B, T, K), the same on every rank
    bias: torch.Tensor | None = None,  # (V_r,)
    *,
    group: dist.ProcessGroup | None,
    shard_sizes: Sequence[int] | None = None,
    reduce_hidden_grad: bool = True,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    old_logprobs: torch.Tensor | None = None,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float = 128,
    row_tolerance: float | None = None,
) -> LogProbs | TopKLogProbs:
    """:func:`fastgrpo.linear_logprobs` over a vocabulary whose entries the ranks of a group hold, in rank order.

    Every rank calls it with the same hidden, targets and options and gets the same result. Beside the statistics' two
    all-reduces, (N,) and (3, N), the forward sends the shards' sizes unless they are given and, where the backward is
    to be certified, the labels' logits, (N,); the backward sends dX in the accumulator's dtype where hidden wants a
    gradient. The gradients that come in must be the same on every rank.

    The certified backward needs no more: each of R ranks keeps its own entries' error within tolerance / sqrt(R), so
    that the whole is within the tolerance whatever rows and entries each of them leaves out.

    Args:
        hidden: (N, D) or (B, T, D), whole: gather a sequence-parallel one before.
        weight: (V_r, D), the rank's rows; shards need not be equal.
        targets: ids of the whole vocabulary; -100 marks a position that is ignored. With an axis more, top-k targets
            as in ``linear_logprobs``: their logits, (N, K), are one SUM all-reduce more, the labels' go with them.
        bias: (V_r,) or None.
        group: the torch.distributed process group that the vocabulary is cut over.
        shard_sizes: V_r of every rank, in rank order; None asks the others, one all-reduce of as many numbers.
        reduce_hidden_grad: True: hidden is replicated, its gradient is summed over the ranks. False: the gradient is
            the rank's own part, for a hidden that was gathered by an operation whose backward sums (Megatron's
            ``gather_from_sequence_parallel_region``) or copied by one.
        temperature, softcap, logit_scale, return_entropy, backend, workspace_mb: as in ``linear_logprobs``.
        old_logprobs, backward, tolerance, row_tolerance: as in ``linear_logprobs``; "auto" looks at N and D alone,
            which are the same on every rank. Each rank sees to the rows of its own dW.

    Returns:
        ``LogProbs(logprobs, entropy)`` of the whole vocabulary, or of top-k targets ``TopKLogProbs(logprobs, entropy,
        rest)``, the same on every rank; differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: a bad argument, named, before anything but the sizes is sent. A rank that raises alone,
        or differs in what requires a gradient, leaves the others waiting, as with any collective.
    """
    check_group(group)
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
        old_logprobs=old_logprobs,
        return_entropy=return_entropy,
    )
    ids = None
    if topk.is_meant(hidden, targets):
        ids, targets, options = topk.check(hidden, weight, targets, options)
    targets = options.check(hidden, weight, targets)
    sizes = (targets.numel(), math.inf, weight.shape[1])  # shards differ, the decision may not
    hidden_grad = inputs.accumulator_dtype(hidden) if reduce_hidden_grad else None
    params = options.params(hidden, weight, (hidden, weight, bias), sizes, hidden_grad=hidden_grad, shard=True)
    if params.tolerance is not None:
        params = replace(params, tolerance=params.tolerance / dist.get_world_size(group) ** 0.5)
    first, vocab = place(weight, group, shard_sizes)
    hint = None if params.tolerance is None else options.flat_hint(hidden)
    flat = targets.reshape(-1)
    entries = own_entries(flat, first, weight.shape[0])
    if ids is None:
        inputs.check_targets(targets, vocab)
        kind, given = OneTarget, (entries, (flat >= 0) & (flat < vocab), hint)
    else:
        topk.check_ids(ids, vocab)
        ids = ids.flatten(0, -2).contiguous()
        size = torch.as_tensor(vocab, device=ids.device)
        kind, given = SeveralTargets, (ids, own_entries(ids, first, weight.shape[0]), size, hint)
        entries = torch.where(flat == IGNORE, IGNORE, ELSEWHERE)
    logprobs, entropy = VocabParallelLogProbs.apply(
        hidden if hidden.ndim == 3 else hidden[None], weight, None if bias is None else bias.contiguous(), entries,
        options.flat_temperature(hidden, targets), params, Share(group, bool(reduce_hidden_grad)), kind, *given,
    )  # fmt: skip
    if ids is not None:
        return several(logprobs, entropy, targets.shape)
    return LogProbs(logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape))


def check_group(group):
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup of this rank, got {type(group).__name__}")


def place(weight, group, shard_sizes):
    """-> the rank's first entry and the size of the whole vocabulary; 0-dim tensors on a device that must not wait."""
    rank, ranks, own = dist.get_rank(group), dist.get_world_size(group), weight.shape[0]
    if shard_sizes is not None:
        sizes = [int(size) for size in shard_sizes]
        if len(sizes) != ranks or sizes[rank] != own:
            raise ValueError(f"shard_sizes must be {ranks} sizes with {own} at rank {rank}, got {sizes}")
        return sum(sizes[:rank]), sum(sizes)
    sizes = torch.zeros(ranks, dtype=torch.int64, device=weight.device)
    sizes[rank] = own
    dist.all_reduce(sizes, group=group)
    if inputs.checks_values(weight.device):
        sizes = sizes.tolist()
        return sum(sizes[:rank]), sum(sizes)
    return sizes[:rank].sum(), sizes.sum()


def own_entries(targets, first, count):
    """(N,) int64: the labels' entries among this rank's ``count``, from entry ``first`` on; IGNORE; or ELSEWHERE."""
    entry = targets - first
    entry = torch.where((entry >= 0) & (entry < count), entry, ELSEWHERE)  # so that none becomes -100 by chance
    return torch.where(targets == IGNORE, IGNORE, entry).contiguous()
