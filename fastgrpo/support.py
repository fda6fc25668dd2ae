"""Sampling-support replay: log-probs and entropy over the token ids that the sampler kept (top-p, top-k, min-p).

A sampler that truncates draws from the renormalised kept set, so that is the distribution whose log-probs make the
importance ratio 1. Only the kept entries of the head are read; the rest of the mathematics is the dense path's, on
tiles one entry wide.
"""

from typing import NamedTuple

import torch

from fastgrpo import inputs
from fastgrpo.backends import dense
from fastgrpo.backends.logits import row_inverse_temperature, transform
from fastgrpo.backends.problem import FLOOR, NOTHING, Gradients, active_rows


class Support(NamedTuple):
    """The kept pairs of a position and an entry, position after position; made by :func:`check_support`."""

    ids: torch.Tensor  # (K,) int64 in [0, V)
    rows: torch.Tensor  # (K,) int64, the position of each
    offsets: torch.Tensor  # (N + 1,) int64
    by_id: torch.Tensor | None  # (K,) int64, the pairs in the order of their ids; None: not asked for
    invalid: torch.Tensor | None  # (N,) bool, positions whose kept set is not one: their results are NaN


def check_support(support, targets, vocab):
    """-> :class:`Support`; raises before anything runs where values can be seen without a sync."""
    if not isinstance(support, (tuple, list)) or len(support) != 2:
        raise ValueError(f"support must be a tuple (token_ids, offsets), got {inputs.kind(support)}")
    given, offsets = support
    inputs.check_tensor("support token_ids", given, targets.device, floating=False)
    inputs.check_tensor("support offsets", offsets, targets.device, floating=False)
    n, k = targets.numel(), given.numel()
    if given.ndim != 1:
        raise ValueError(f"support token_ids must be flat, (K,), got shape {tuple(given.shape)}")
    if offsets.shape != (n + 1,):
        raise ValueError(f"support offsets must have shape ({n + 1},) for {n} targets, got {tuple(offsets.shape)}")
    if k and not n:
        raise ValueError(f"support token_ids must be empty without targets, got {k}")
    offsets, targets = offsets.to(torch.int64), targets.reshape(-1)
    risen = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == k)
    visible = inputs.checks_values(targets.device)
    if visible and not risen:
        raise ValueError(f"support offsets must rise from 0 to K = {k}, got {offsets[:4].tolist()} ... {offsets[-1]}")
    offsets = offsets.clamp(0, k).cummax(0).values  # bad ones must not reach memory that is not ours
    rows = torch.searchsorted(offsets[1:].contiguous(), torch.arange(k, device=given.device), right=True)
    rows = rows.clamp(max=max(n - 1, 0))
    ids = given.to(torch.int64).clamp(0, vocab - 1)
    by_id = ids.argsort(stable=True)
    invalid = (~risen).repeat(n)
    for problem, wrong in faults(given, ids, rows, by_id, targets, vocab):
        wrong &= targets != inputs.IGNORE
        if visible and wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(f"support token_ids {problem}, not so at flattened position {at}, target {targets[at]}")
        invalid |= wrong
    return Support(ids, rows, offsets, by_id, invalid)


def faults(given, ids, rows, by_id, targets, vocab):
    """-> text, (N,) bool: the positions at which it does not hold."""

    def positions(pairs):
        return torch.zeros_like(targets).index_add_(0, rows, pairs.to(targets.dtype))

    yield f"must be in [0, {vocab})", positions(given != ids) > 0
    twice = (ids[by_id].diff() == 0) & (rows[by_id].diff() == 0)  # stable: equal ids are in the order of positions
    yield "must not repeat within a position", positions(torch.zeros_like(ids, dtype=torch.bool).index_copy_(
        0, by_id, torch.nn.functional.pad(twice, (1, 0))[: len(ids)])) > 0  # fmt: skip
    yield "must hold the target of each position", positions(ids == targets[rows]) != 1


def sums(support, values):
    """(K,) -> (N,), in a fixed order."""
    return torch.segment_reduce(values, "sum", offsets=support.offsets, axis=0, unsafe=True)


def forward(problem, support, backend):
    """(5, N) statistics as :meth:`HeadProblem.new_stats`, and the raw logits (K,) for the backward."""
    raw = backend.kept_logits(problem, support)
    targets, rows = problem.targets, support.rows
    z, _ = transform(problem, raw[:, None].clone(), *tile(problem, support))
    z, is_label = z[:, 0], support.ids == targets[rows]
    label = torch.where(support.invalid, torch.nan, sums(support, torch.where(is_label, z, 0.0)))
    others = torch.where(is_label, NOTHING, z)
    peak = torch.segment_reduce(others, "max", offsets=support.offsets, axis=0, unsafe=True, initial=FLOOR)
    below = others - peak[rows]
    e = below.exp()
    stats = dense.combine((peak, sums(support, e), -sums(support, e * below)), label)
    return torch.where(targets == inputs.IGNORE, 0.0, stats), raw


def tile(problem, support):
    """Bias and inverse temperature of each pair, as a tile one entry wide wants them."""
    bias = None if problem.bias is None else problem.bias[support.ids, None]
    return bias, row_inverse_temperature(problem, support.rows)


def backward(problem, support, backend, stats, raw, grad_logp, grad_entropy, needs):
    """Gradients as :func:`fastgrpo.backends.dense_backward.backward`'s."""
    rows = support.rows
    grads = [grad_logp] if grad_entropy is None else [grad_logp, grad_entropy]
    active = active_rows(problem.targets, *grads)
    label = torch.where(support.ids == problem.targets[rows], 0, -1)
    dz = dense.logits_gradient(
        problem, raw[:, None].clone(), tile(problem, support)[0], rows, label, stats[:, rows], *(g[rows] for g in grads)
    )[:, 0]
    dz = torch.where(active[rows], dz, 0.0)  # exactly 0: such a pair is not read at all
    return pair_gradients(problem, support, backend, dz, needs)


def pair_gradients(problem, support, backend, dz, needs, out=None):
    """Gradients that d loss / d raw logits of the pairs alone, dz (K,), make; added to ``out`` where that is given."""
    rows, by_id, vocab = support.rows, support.by_id, problem.weight.shape[0]
    if any(needs.of_head) or needs.bias:
        of_entry = torch.searchsorted(support.ids[by_id], torch.arange(vocab + 1, device=rows.device))
    out = Gradients(None, None) if out is None else out
    of_rows, of_head, d_bias = list(out.of_rows), list(out.of_head), out.bias
    casts = (problem.params.compute_dtype,) * 2, (dz.dtype, problem.params.lora_dtype)
    for k, ((x, w), (cast_x, cast_w)) in enumerate(zip(problem.factors, casts)):
        if needs.of_rows[k]:
            total = None if of_rows[k] is None else of_rows[k].flatten(0, 1)
            d_x = backend.kept_sums(problem, w[None], dz, support.ids, support.offsets, cast_w, x.dtype, total)
            of_rows[k] = d_x.view(x.shape)
        if needs.of_head[k]:
            ordered = dz[by_id], rows[by_id], of_entry
            of_head[k] = backend.kept_sums(problem, x, *ordered, cast_x, w.dtype, of_head[k])
    if needs.bias:
        own = sums(support._replace(offsets=of_entry), dz[by_id])
        d_bias = (own if d_bias is None else own + d_bias).to(problem.bias.dtype)
    return Gradients(of_rows[0], of_head[0], d_bias, of_rows[1], of_head[1])
