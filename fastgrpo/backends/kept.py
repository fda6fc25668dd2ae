"""The torch backend's part of fastgrpo/support.py: products and sums of the pairs (row, entry) that a sampler kept."""

import torch

from fastgrpo.backends.logits import Reader, pairs_at_once
from fastgrpo.inputs import IGNORE, take_rows


def kept_logits(problem, support):
    """(K,) raw logits of the kept pairs, each one row of hidden times one of the head; 0 where ignored."""
    reader = Reader(problem)
    out = torch.zeros(support.ids.shape, dtype=reader.accumulate, device=problem.hidden.device)
    pairs = (problem.targets[support.rows] != IGNORE).nonzero().squeeze(1)
    for part in pairs.split(pairs_at_once(problem)):
        out[part] = reader.paired_logits(reader.rows(support.rows[part]), reader.entries(support.ids[part]))
    return out


def kept_sums(problem, source, coefficients, index, offsets, cast, dtype, out=None):
    """out[m] = sum of ``coefficients[e] * source[index[e]]`` over offsets[m] <= e < offsets[m + 1], in that order.

    Args:
        source: (B, T, D), any strides, of B * T rows, read as ``cast``. coefficients, index: (K,). offsets: (M + 1,).
        out: (M, D) that the sums are added to, or None.

    Returns:
        (M, D) in ``dtype``, summed in the accumulator's: ``out``. A pair whose coefficient is 0 is not read.
    """
    if out is None:
        out = torch.zeros(offsets.numel() - 1, source.shape[2], dtype=dtype, device=source.device)
    pairs = (coefficients != 0).nonzero().squeeze(1)
    if not pairs.numel():
        return out
    owner = torch.searchsorted(offsets[1:].contiguous(), pairs, right=True)
    begun = None  # an owner whose pairs began in the last chunk, and its sum so far, not yet rounded
    for part, mine in zip(*(x.split(pairs_at_once(problem)) for x in (pairs, owner))):
        rows = take_rows(source, index[part]).to(cast)
        products = rows.to(coefficients.dtype) * coefficients[part, None]
        owners, counts = torch.unique_consecutive(mine, return_counts=True)
        total = torch.segment_reduce(products, "sum", lengths=counts, axis=0, unsafe=True)
        before = out.index_select(0, owners).to(total.dtype)
        if begun is not None:
            before[0] = torch.where(owners[0] == begun[0], begun[1], before[0])
        total += before
        out.index_copy_(0, owners, total.to(out.dtype))
        begun = owners[-1], total[-1]
    return out
