"""The batch of a loss: checked, then flattened to one value per token."""

from dataclasses import dataclass
from typing import Any

import torch

from fastgrpo import inputs
from fastgrpo.config import GRPOLossConfig
from fastgrpo.inputs import Segments
from fastgrpo.weights import GLOBALLY_NORMALISED

VESPO_FLOOR, VESPO_CEILING = -18.420680743952367, 20.0  # log(1e-8), 20: the clamps of VESPO's log weights


@dataclass(frozen=True)
class LossInputs:
    """What :func:`fastgrpo.grpo_loss` takes beside hidden, the head and its options, as it takes it."""

    targets: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampling_logprobs: torch.Tensor | None = None
    importance_weights: torch.Tensor | None = None
    num_items: float | torch.Tensor | None = None
    entropy_threshold: float | torch.Tensor | None = None

    def check(self, config: GRPOLossConfig) -> Segments:
        """-> the sequences; raises before anything runs."""
        segments = find_segments(self.targets, self.cu_seqlens)
        if self.mask is not None:
            inputs.check_mask(self.mask, self.targets)
        inputs.check_per_sequence("advantages", self.advantages, self.targets, segments.count)
        weights = self.importance_weights
        if weights is not None:
            inputs.check_per_sequence("importance_weights", weights, self.targets, segments.count)
        for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"):
            if (value := getattr(self, name)) is not None:
                inputs.check_per_token(name, value, self.targets)
        if config.estimates_kl and self.ref_logprobs is None:
            raise ValueError(f"ref_logprobs must be given for beta > 0, got None with beta = {config.beta}")
        if config.loss_type == "dr_grpo" and config.max_completion_length is None and segments.padded_length is None:
            raise ValueError("max_completion_length must be set in the config for dr_grpo on packed input, got None")
        if self.num_items is not None:
            inputs.check_num_items(self.num_items)
        threshold = self.entropy_threshold
        if isinstance(threshold, torch.Tensor):
            inputs.check_number("entropy_threshold", threshold)
        elif threshold is not None:
            inputs.check_finite("entropy_threshold", threshold)
        return segments


@dataclass(frozen=True)
class Batch:
    """The flat batch: every tensor (N,) in the accumulator's dtype, cleaned where the mask is 0."""

    mask: torch.Tensor  # 1 where a token counts
    measured: torch.Tensor  # bool: where its log-prob is computed too
    moving: torch.Tensor  # bool: where it may have a gradient
    advantages: torch.Tensor
    old: torch.Tensor | None
    ref: torch.Tensor | None
    sampling: torch.Tensor | None
    importance: torch.Tensor | None  # multiplies the policy term
    log_importance: torch.Tensor | None  # (B,) summed clamped logs, VESPO
    num_items: float | torch.Tensor | None
    entropy_threshold: float | torch.Tensor | None
    segments: Segments

    def check_values(self, config):
        """Values of counted tokens that cannot be meant, where looking at them costs no wait."""
        inputs.check_advantages(self.advantages)
        inputs.check_importance(self.importance, self.log_importance)
        for name, value in (
            ("old_logprobs", self.old),
            ("ref_logprobs", self.ref),
            ("sampling_logprobs", self.sampling),
        ):
            if value is not None:
                inputs.check_logprobs(name, value)
        if self.num_items is not None and config.loss_type in GLOBALLY_NORMALISED:
            inputs.check_some_items(self.num_items, self.mask)


def find_segments(targets, cu_seqlens):
    if cu_seqlens is not None:
        inputs.check_cu_seqlens(cu_seqlens, targets)
        return Segments.packed(cu_seqlens, targets.numel())
    if targets.ndim != 2:
        raise ValueError(
            f"cu_seqlens must be given for flat targets (where does each sequence end?), got None with targets "
            f"of shape {tuple(targets.shape)}"
        )
    return Segments.padded(*targets.shape)


def flatten(given: LossInputs, config: GRPOLossConfig, segments: Segments, dtype: torch.dtype, skip: bool) -> Batch:
    """:class:`Batch` of checked inputs.

    Args:
        dtype: the accumulator's. skip: whether log-probs that cannot have a gradient need not be known.
    """
    targets = given.targets
    counted = targets.reshape(-1) != inputs.IGNORE
    if given.mask is not None:
        counted = counted & (given.mask.reshape(-1) != 0)

    def tokens(value: Any) -> Any:  # a masked position may hold anything, NaN included; 0 keeps it out of every sum
        return None if value is None else torch.where(counted, value.detach().reshape(-1).to(dtype), 0.0)

    def broadcast(value):
        if inputs.is_per_sequence(value, targets, segments.count):
            value = segments.expand(value.detach().reshape(-1))
        return tokens(value)

    importance, log_importance, weights = None, None, given.importance_weights
    if weights is not None and config.loss_type == "vespo":
        logs = weights.detach().reshape(-1).to(dtype).log().clamp(VESPO_FLOOR, VESPO_CEILING)
        once = inputs.is_per_sequence(weights, targets, segments.count)
        if once:  # of a sequence without tokens it may be anything
            log_importance = torch.where(segments.sum(counted.to(dtype)) > 0, logs, 0.0)
        else:
            log_importance = segments.sum(tokens(logs))
    elif weights is not None:
        importance = broadcast(weights)
    advantages, moving = broadcast(given.advantages), counted
    if not config.estimates_kl and config.entropy_coef == 0.0:
        moving = counted & may_have_gradient(config, advantages, segments)
    threshold = inputs.zero_dim(given.entropy_threshold)
    if (config.top_entropy_quantile < 1.0 and threshold is None) or config.takes_full_kl:  # of every token
        skip = False
    measured = moving if skip else counted
    old = tokens(given.old_logprobs)
    return Batch(
        mask=counted.to(dtype),
        measured=measured,
        moving=moving,
        advantages=advantages,
        old=None if old is None else torch.where(measured, old, 0.0),
        ref=tokens(given.ref_logprobs) if config.estimates_kl else None,
        sampling=tokens(given.sampling_logprobs),
        importance=importance,
        log_importance=log_importance,
        num_items=inputs.zero_dim(given.num_items),
        entropy_threshold=threshold,
        segments=segments,
    )


def may_have_gradient(config, advantages, segments):
    """(N,) bool: False where the policy term is 0 whatever the log-probs are, so that they need not be known.

    Where a sequence's tokens share a ratio or a mask, one non-zero advantage makes all of them matter.
    """
    moving = advantages != 0
    shared = config.importance_sampling_level != "token" or config.loss_type == "vespo"
    if shared or config.off_policy_mask_threshold is not None:
        moving = segments.expand(segments.sum(moving.to(advantages.dtype))) > 0
    return moving
