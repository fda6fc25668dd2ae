"""Token weights: loss = sum(w * l). The reduction of every loss type, written once."""

from typing import NamedTuple

import torch

from fastgrpo.config import GRPOLossConfig
from fastgrpo.inputs import Segments

REDUCTIONS = {  # over what each loss type's sum of token losses is a mean
    "grpo": "each sequence's tokens, then sequences",
    "sapo": "each sequence's tokens, then sequences",
    "luspo": "sequences",
    "dr_grpo": "sequences of full length",
    "bnpo": "tokens",
    "dapo": "num_items",
    "cispo": "num_items",
    "vespo": "num_items",
}
GLOBALLY_NORMALISED = tuple(name for name, reduction in REDUCTIONS.items() if reduction == "num_items")


def token_weights(
    config: GRPOLossConfig,
    mask: torch.Tensor,  # (N,)
    segments: Segments,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight of every token's loss, known before the logits are.

    Args:
        config: the :class:`fastgrpo.GRPOLossConfig`.
        mask: (N,) float, 1 where a token counts.
        segments: the sequences of the flat batch, :class:`fastgrpo.inputs.Segments`.
        num_items: normaliser of dapo, cispo and vespo (tokens, a number or 0-dim tensor); None: ``sum(mask)``.

    Returns:
        (N,) weights, 0 where the mask is 0. Source: the end of TRL 1.16's ``_compute_loss``.
    """
    sequences, reduction = max(segments.count, 1), REDUCTIONS[config.loss_type]
    if reduction == "each sequence's tokens, then sequences":
        return mask * segments.expand(1.0 / (segments.sum(mask).clamp(min=1.0) * sequences))
    if reduction == "sequences":
        return mask / sequences
    if reduction == "sequences of full length":
        length = segments.padded_length if config.max_completion_length is None else config.max_completion_length
        return mask / (sequences * max(length or 1, 1))
    if reduction == "tokens" or num_items is None:
        return mask / mask.sum().clamp(min=1.0)
    return mask / (num_items.clamp(min=1.0) if isinstance(num_items, torch.Tensor) else max(num_items, 1.0))


class Totals(NamedTuple):
    """What the reductions count in a batch, or in a micro-batch of it."""

    sequences: int
    tokens: int  # counted by the mask
    bonus_tokens: int  # of those, the ones the entropy bonus averages over


def share_of_batch(config: GRPOLossConfig, part: Totals, whole: Totals) -> tuple[float, float]:
    """How a micro-batch's loss is scaled so that the scaled losses of all micro-batches add up to the batch's.

    Sequences that no micro-batch holds (zero advantage, all masked) count in ``whole`` alone. dapo, cispo and vespo are
    given the whole batch's ``num_items`` and need no scale; dr_grpo needs ``max_completion_length``.

    Args:
        config: the :class:`fastgrpo.GRPOLossConfig`.
        part, whole: :class:`Totals` of the micro-batch and of the batch, all ranks together.

    Returns:
        (scale of ``grpo_loss(part, ...)``, the ``entropy_coef`` to call it with): the entropy bonus is always a mean
        over tokens.
    """
    reduction = REDUCTIONS[config.loss_type]
    if reduction == "tokens":
        scale = max(part.tokens, 1) / max(whole.tokens, 1)
    elif reduction == "num_items":
        scale = 1.0
    else:
        scale = part.sequences / max(whole.sequences, 1)
    bonus = max(part.bonus_tokens, 1) / max(whole.bonus_tokens, 1)
    return scale, config.entropy_coef * bonus / scale
