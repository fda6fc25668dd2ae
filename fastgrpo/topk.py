"""Top-k targets: several entries of each row, their log-probs over the whole vocabulary, and the mass of the rest.

A row's K entries are taken out of its vocabulary, so that the op sees the rest alone: its log-sum-exp, and so the mass
``R = 1 - sum p_k``, knows of no difference that cancels. The K logits come from K rows of the head and join the rest in
closed form. Of ``L_k = z_k - lse`` and ``log R = lse_rest - lse`` the gradients are, with g_k and r coming in and
G = r + sum g_k,

    taken entries   g_k (1 - p_k) - p_k (G - g_k)         pair by pair, in the accumulator's dtype
    the rest        r q_v - G p_v = (r - G R) q_v         q = p / R: the op's own backward, of the rest

whatever the strategy. Both stay small where the student is near a teacher, also in 16 bits.
"""

from dataclasses import replace

import torch

from fastgrpo import inputs
from fastgrpo.backends import certified, dense
from fastgrpo.backends.logits import transform
from fastgrpo.backends.problem import ABSENT, RowPartials, RowStats
from fastgrpo.inputs import IGNORE, NOWHERE, accumulator_dtype
from fastgrpo.row_math import rescale, softplus
from fastgrpo.support import Support, pair_gradients, tile

LOGPROBS = 2  # which of the tensors kept are the log-probs
LARGEST = 1e18  # ratio of a row's own gradient to its rest's, squared still a number


def is_meant(hidden, targets):
    """Whether the targets have an axis more than a position's."""
    tensors = isinstance(hidden, torch.Tensor) and isinstance(targets, torch.Tensor)
    return tensors and hidden.ndim in (2, 3) and targets.ndim == hidden.ndim


def check(hidden, weight, targets, options):
    """-> targets as int64, one of each position's (-100 where there is none), :class:`fastgrpo.head.HeadOptions` of a
    position each; raises before anything runs."""
    inputs.check_tensor("targets", targets, hidden.device, floating=False)
    if targets.shape[:-1] != hidden.shape[:-1] or targets.shape[-1] == 0:
        raise ValueError(
            f"targets of top-k must have shape {(*hidden.shape[:-1], 'K')}, K at least 1, got {tuple(targets.shape)} "
            f"for hidden of shape {tuple(hidden.shape)}"
        )
    if options.support is not None:
        raise ValueError(
            "support must be None with top-k targets, which are normalised over the whole vocabulary, got "
            f"{inputs.kind(options.support)}"
        )
    targets, hint = targets.to(torch.int64), options.old_logprobs
    if hint is not None:
        inputs.check_per_token("old_logprobs", hint, targets)
        hint = hint.detach().view(targets.shape).masked_fill(targets == IGNORE, -torch.inf).amax(-1)
    return targets, targets.amax(-1), replace(options, old_logprobs=hint)


def check_ids(targets, vocab):
    """Ids in range and not twice in a position, where they can be seen without a sync. targets: (..., K) int64."""
    inputs.check_targets(targets, vocab)
    if targets.numel() and inputs.checks_values(targets.device):
        twice = repeats(take_out(targets.flatten(0, -2), vocab))
        if twice.any():
            at = int(twice.nonzero()[0])
            raise ValueError(f"targets must not repeat within a position, not so at flattened position {at}")


def is_valid(ids, vocab):
    return (ids >= 0) & (ids < vocab)


def take_out(ids, vocab):
    """(N, K) int64, :attr:`HeadProblem.taken`'s: rising, NOWHERE where there is none."""
    return torch.where(is_valid(ids, vocab), ids, NOWHERE).sort(1).values


def repeats(taken):
    """(N,) bool, where an id stands twice."""
    return ((taken.diff(dim=1) == 0) & (taken[:, 1:] != NOWHERE)).any(1)


def make_pairs(ids, vocab, with_order=False):
    """:class:`fastgrpo.support.Support` of all (N, K) slots, those without an id reading entry 0 for nothing."""
    n, k = ids.shape
    flat = torch.where(is_valid(ids, vocab), ids, 0).flatten()
    # of one row the expanded numbers would be a view whose stride is 0
    rows = torch.arange(n, device=ids.device)[:, None].expand(n, k).reshape(-1).contiguous()
    offsets = torch.arange(n + 1, device=ids.device) * k
    return Support(flat, rows, offsets, flat.argsort(stable=True) if with_order else None, None)


def finish_logits(problem, pairs, raw):
    """(N, K) -> logits; softcap's slope, or None where it is 1."""
    z, slope = transform(problem, raw.reshape(-1, 1).clone(), *tile(problem, pairs), with_slope=True)
    z = torch.where(z < ABSENT, -torch.inf, z)
    return z.view(raw.shape), None if slope is None else slope.view(raw.shape)


class Whole:
    """A vocabulary whose entries are all here; :class:`fastgrpo.vocab_parallel.Shard` is one that ranks hold."""

    def __init__(self, problem):
        self.vocab = problem.weight.shape[0]

    def own(self, ids):
        """Which entries here the ids are; any that are none where they are elsewhere."""
        return ids

    def add_up(self, x):
        """The sum over all ranks."""
        return x

    def merge(self, partials):
        """(4, N) :class:`RowPartials` of the whole vocabulary, of those of the entries here."""
        return partials


def forward(problem, ids, backend, hint, shard=None):
    """-> (5, N) statistics of each row's most probable target, and what :func:`backward` wants beside them.

    That is (N, K) raw logits, (2, N) peak and offset of the rest's log-sum-exp, (N, K + 1) log-probs and log of the
    rest's mass, and a certificate's tensors. Rows with an id outside the vocabulary, or with one twice, are NaN.

    Args:
        shard: like :class:`Whole`; None: that.
    """
    shard, here = Whole(problem) if shard is None else shard, problem.weight.shape[0]
    own, valid = shard.own(ids), is_valid(ids, shard.vocab)
    pairs = make_pairs(own, here)
    raw = backend.kept_logits(problem, pairs).view(ids.shape)
    z = shard.add_up(torch.where(is_valid(own, here), finish_logits(problem, pairs, raw)[0], 0.0))
    z = torch.where(valid, z, -torch.inf)
    problem = problem.without(take_out(own, here))
    partials, certificate = forward_rest(problem, backend, z.amax(1), hint, shard)
    stats, rest, logp = join(RowPartials(*partials), z)
    wrong = (~valid & (ids != IGNORE)).any(1) | repeats(take_out(ids, shard.vocab))
    stats, rest = stats.masked_fill(wrong, torch.nan), rest.masked_fill(wrong, torch.nan)
    counted = problem.targets != IGNORE
    stats, logp = torch.where(counted, stats, 0.0), logp.masked_fill(wrong[:, None], torch.nan)
    logp = torch.where(torch.cat((ids != IGNORE, counted[:, None]), 1), logp, 0.0)
    if certificate is None:
        return stats, (raw, rest, logp)
    order, near = certificate.order, None if hint is None else hint[certificate.order]
    dropped = certified.distrust(certificate.dropped, stats[0, order], near)
    return stats, (raw, rest, logp, *replace(certificate, dropped=dropped).tensors)


def forward_rest(problem, backend, label, hint, shard):
    """(4, N) :class:`RowPartials` of what is not taken; and a certificate, of its mass, or None where exact.

    Args:
        label: (N,) the largest of the logits that are.
    """
    if problem.params.tolerance is None:
        return shard.merge(backend.partial_forward(problem)), None
    own, certificate = backend.certified_partial_forward(problem, label, hint)
    partials = shard.merge(own)
    merged, fall = RowPartials(*partials), (own[0] - partials[0]).exp()
    total = merged.total
    share = torch.where(total == 0, 0.0, fall / total)
    dropped = certificate.dropped * share[certificate.order]
    if backend.GUESSES_PEAKS:
        bad = certified.find_untrusted(total, merged.spread) & (problem.targets != IGNORE)
        if bad.any():
            again = replace(problem, targets=torch.where(bad, problem.targets, IGNORE))
            partials = torch.where(bad, shard.merge(backend.partial_forward(again)), partials)
            dropped = dropped.masked_fill(bad[certificate.order], torch.inf)
    return partials, replace(certificate, dropped=dropped)


def join(rest, z):
    """-> (5, N) :class:`RowStats` of the largest of each row's K logits; (2, N) peak and offset of the rest's
    log-sum-exp; (N, K + 1) log-probs and log of the rest's mass.

    Args:
        rest: :class:`RowPartials`. z: (N, K), -inf where there is none.
    """
    label, at = z.max(1, keepdim=True)
    others = z.scatter(1, at, -torch.inf)
    top = torch.maximum(rest.peak, others.amax(1))
    total, spread, _ = rescale(rest.peak, rest.total, rest.spread, top)
    below = others - top[:, None]
    e = below.exp()
    spread = spread - torch.where(e == 0, 0.0, e * below).sum(1)
    stats = dense.combine((top, total + e.sum(1), spread), label[:, 0])
    rows, offset = RowStats(*stats), rest.total.log()
    logp = (z - rows.peak[:, None] - rows.offset[:, None]).scatter(1, at, rows.logp[:, None])
    # the taken entries' log-sum-exp minus the rest's; -inf where none of them has any mass
    taken = torch.where(z == -torch.inf, 0.0, (z - label).exp()).sum(1).log()
    gap = label[:, 0] - rest.peak + (taken - offset)
    return stats, torch.stack((rest.peak, offset)), torch.cat((logp, -softplus(gap)[:, None]), 1)


def backward(problem, ids, backend, strategy, stats, kept, grads, grad_entropy, needs, shard=None):
    """Gradients as :func:`fastgrpo.backends.dense_backward.backward`'s.

    Args:
        strategy: that of the rest. grads: (N, K + 1) of the log-probs and of the log of the rest's mass.
        shard: as :func:`forward`'s.
    """
    raw, rest, logp, *certificate = kept
    own = ids if shard is None else shard.own(ids)
    vocab, counted = problem.weight.shape[0], problem.targets != IGNORE
    present = torch.cat((ids != IGNORE, counted[:, None]), 1)
    grads = torch.where(present, grads, 0.0)
    moves = (grads != 0).any(1)
    if grad_entropy is not None:
        moves = moves | (counted & (grad_entropy != 0))
    own_entries = present[:, :-1] & moves[:, None]  # of a row that has no gradient nothing is read, NaN included
    taken = torch.where(own_entries, taken_gradient(RowStats(*stats), logp, grads, grad_entropy, present), 0.0)
    known, *upstream = rest_gradient(RowStats(*stats), rest, logp[:, -1], grads, grad_entropy, taken)
    upstream = [None if g is None else torch.where(moves, g, 0.0) for g in upstream]
    out = strategy.backward(problem.without(take_out(own, vocab)), backend, (), known, certificate, *upstream, needs)
    pairs = make_pairs(own, vocab, with_order=any(needs.of_head) or bool(needs.bias))
    dz = torch.where(own_entries & is_valid(own, vocab), taken * chain(problem, pairs, raw), 0.0)
    return pair_gradients(problem, pairs, backend, dz.flatten(), needs, out)


def taken_gradient(rows, logp, grads, grad_entropy, present):
    """(N, K) d loss / d logits of the taken entries; rows: :class:`RowStats`. A slot without one has any value."""
    own, logp = grads[:, :-1], logp[:, :-1]
    at = torch.where(present[:, :-1], logp, -torch.inf).argmax(1, keepdim=True)
    p = logp.exp()
    # of the most probable one, which may be near 1, without a difference
    other_mass = (1 - p).scatter(1, at, rows.other_mass[:, None])
    others = grads.sum(1, keepdim=True) - own
    others = others.scatter(1, at, grads.scatter(1, at, 0.0).sum(1, keepdim=True))
    d = own * other_mass - p * others
    if grad_entropy is not None:
        d = d - torch.where(p == 0, 0.0, grad_entropy[:, None] * p * (logp + rows.entropy[:, None]))
    return d


def rest_gradient(rows, rest, log_mass, grads, grad_entropy, taken):
    """What the backward of the rest, as a distribution of its own, is given: (5, N) statistics, and the gradients of
    its log-probs and entropy, (N,) each or None.

    In place of a label's mass stands what bounds the error of a certified backward: the norm of a row's gradient
    where it is known, at its taken entries. grad_entropy: (N,) or None. taken: (N, K) their gradients.
    """
    mass, (peak, offset) = log_mass.exp(), rest
    exists = offset > -torch.inf
    upstream = torch.where(exists | offset.isnan(), grads.sum(1) * mass - grads[:, -1], 0.0)
    own = torch.where(upstream == 0, 0.0, taken.norm(dim=1) / upstream.abs()).clamp(max=LARGEST)
    entropy = torch.where(mass == 0, 0.0, rows.entropy + log_mass)
    stats = torch.stack((log_mass, peak, torch.where(offset == -torch.inf, 0.0, offset), own, entropy))
    return stats, upstream, None if grad_entropy is None else grad_entropy * mass


def chain(problem, pairs, raw):
    """d logit / d raw product of each pair: (N, K), or what broadcasts to it."""
    factor = raw.new_ones(len(raw)).mul_(problem.chain(slice(None)))[:, None]
    slope = None if problem.params.softcap is None else finish_logits(problem, pairs, raw)[1]
    return factor if slope is None else factor * slope


def kept_like(problem, ids, backend):
    """((shape, dtype) or None) of each tensor that :func:`forward` keeps, at its largest."""
    (n, k), dtype = ids.shape, accumulator_dtype(problem.hidden)
    own = ((n, k), dtype), ((2, n), dtype), ((n, k + 1), dtype)
    if problem.params.tolerance is None:
        return own
    return *own, *backend.certificate_like(replace(problem, taken=ids))
