"""Token weights: loss = sum(w * l). The reduction of every loss type, written once."""


def token_weights(config, mask, segments, num_items=None):
    """Weight of every token's loss, known before the logits are.

    Args:
        config: the :class:`fastgrpo.GRPOLossConfig`.
        mask: (N,) float, 1 where a token counts.
        segments: the sequences of the flat batch, :class:`fastgrpo.inputs.Segments`.
        num_items: normaliser of dapo, cispo and vespo (tokens, a number or 0-dim tensor); None: ``sum(mask)``.

    Returns:
        (N,) weights, 0 where the mask is 0. Source: the end of TRL 1.16's ``_compute_loss``.
    """
    sequences = max(segments.count, 1)
    if config.loss_type in ("grpo", "sapo"):
        return mask * segments.expand(1.0 / (segments.sum(mask).clamp(min=1.0) * sequences))
    if config.loss_type == "luspo":
        return mask / sequences
    if config.loss_type == "dr_grpo":
        length = segments.padded_length if config.max_completion_length is None else config.max_completion_length
        return mask / (sequences * max(length, 1))
    if config.loss_type == "bnpo" or num_items is None:
        return mask / mask.sum().clamp(min=1.0)
    return mask / (num_items.clamp(min=1.0) if hasattr(num_items, "clamp") else max(num_items, 1.0))
