"""grpo_loss: check -> flatten -> log-probs -> objective -> weights."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastgrpo import backends, inputs
from fastgrpo.config import GRPOLossConfig, settings_go_in_config
from fastgrpo.head import HeadOptions
from fastgrpo.inputs import Backend, Backward, Segments
from fastgrpo.logprobs import head_logprobs
from fastgrpo.weights import GLOBALLY_NORMALISED, token_weights

VESPO_FLOOR, VESPO_CEILING = -18.420680743952367, 20.0  # log(1e-8), 20: the clamps of VESPO's log weights


class GRPOLoss(NamedTuple):
    """Result of :func:`grpo_loss`."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    metrics: dict[str, torch.Tensor]


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
    segments: Segments


class Objective(torch.autograd.Function):
    """Attaches a loss whose derivatives are already known to the log-probs and entropies it came from."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss, d_logprobs, d_entropy):
        ctx.save_for_backward(d_logprobs, d_entropy)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        d_logprobs, d_entropy = ctx.saved_tensors
        return grad_loss * d_logprobs, None if d_entropy is None else grad_loss * d_entropy, None, None, None


@settings_go_in_config
def grpo_loss(
    hidden: torch.Tensor,  # (B, T, D); packed: (N, D) or (1, N, D)
    weight: torch.Tensor,  # (V, D)
    targets: torch.Tensor,  # (B, T); packed: (N,) or (1, N)
    advantages: torch.Tensor,  # (B,) or like targets
    config: GRPOLossConfig | None = None,
    mask: torch.Tensor | None = None,  # like targets
    cu_seqlens: torch.Tensor | None = None,  # (B + 1,)
    old_logprobs: torch.Tensor | None = None,  # like targets
    ref_logprobs: torch.Tensor | None = None,  # like targets
    sampling_logprobs: torch.Tensor | None = None,  # like targets
    importance_weights: torch.Tensor | None = None,  # (B,), (B, 1) or like targets
    num_items: float | torch.Tensor | None = None,
    entropy_threshold: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: Backend = "auto",
    backward: Backward = "auto",
    temperature: float | torch.Tensor | None = None,
    return_logprobs: bool = True,
    tolerance: float | None = None,
    workspace_mb: float = 128,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
    row_tolerance: float | None = None,
) -> GRPOLoss:
    """The GRPO-family loss of a batch of completions, from hidden states and LM head, never holding their logits.

    Args:
        hidden: (B, T, D), the states that predict ``targets``; with ``cu_seqlens`` (N, D) or (1, N, D).
        weight: (V, D). targets: integer ids; -100 never counts.
        advantages: (B,) or (B, 1), one a sequence, or shaped like ``targets``, one a token. Packed, a flat tensor of N
            values is one a token, also where B happens to equal N: (B, 1) says one a sequence.
        config: a :class:`GRPOLossConfig`; None: its defaults.
        mask: 0/1, completion mask times tool mask; None: all targets but -100.
        cu_seqlens: (B + 1,) integer offsets of packed sequences; must be given for flat input.
        old_logprobs: of the policy that sampled; None: the current ones, detached (ratio 1).
        ref_logprobs: of the reference policy, needed for ``beta > 0``.
        sampling_logprobs: the sampler's own, for the off-policy mask; None: ``old_logprobs``. NaN: unknown.
        importance_weights: correction of the train/inference mismatch, already truncated or masked.
        num_items: normaliser of dapo, cispo and vespo (ignored by the others); a number or 0-dim tensor; None: the
            counted tokens of this call.
        entropy_threshold: for ``top_entropy_quantile`` across ranks; None: the quantile of the given tokens.
        bias, softcap, logit_scale, backend, backward, tolerance, workspace_mb, lora, support, row_tolerance:
            see :func:`linear_logprobs`; the hint of the certified backward is ``old_logprobs``, else
            ``sampling_logprobs``.
        temperature: overrides ``config.temperature``; a number or a float tensor shaped like ``targets``.
        return_logprobs: False: tokens that cannot have a gradient (advantage 0, no KL, no entropy term) skip the
            forward too; loss and gradients are the same, their ``logprobs`` and ``entropy`` are 0.

    Returns:
        ``GRPOLoss``: ``loss`` 0-dim, differentiable in hidden, weight, bias and LoRA's A and B; ``logprobs`` detached,
        like ``targets``, 0 where not counted; ``entropy`` likewise (nats), or None when ``config.log_entropy`` is False
        and the loss does not need it; ``metrics`` 0-dim tensors: sums over the measured tokens (``kl_sum``,
        ``entropy_sum``, ``ratio_sum``, ``clip_low_sum``, ``clip_high_sum``, ``clip_region_sum``), ``ratio_min``,
        ``ratio_max``, and counts: ``tokens`` (the mask's), ``measured_tokens`` (fewer only without
        ``return_logprobs``), ``active_tokens`` (with a gradient), ``skipped_tokens`` (without: no backward GEMM),
        ``sequences``. The call never communicates with other ranks.

    Raises:
        ValueError, TypeError: a bad argument, named, with what was expected and what came, before anything runs. Values
        are looked at on a CPU or with FASTGRPO_DEBUG=1 alone, at counted tokens: log-probs above 0.25 (up to there
        it may be rounding: half a bf16 step of a log-sum-exp under 128), advantages that are not finite, ``num_items``
        of 0 although tokens count.
    """
    config = GRPOLossConfig() if config is None else config
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {type(config).__name__}")
    inputs.check_head(hidden, weight, targets, bias)
    targets = targets.to(torch.int64)
    segments = find_segments(targets, cu_seqlens)
    check_batch(
        targets, segments, config, advantages, mask, old_logprobs, ref_logprobs, sampling_logprobs,
        importance_weights, num_items, entropy_threshold,
    )  # fmt: skip
    num_items, entropy_threshold = inputs.zero_dim(num_items), inputs.zero_dim(entropy_threshold)
    entropy_is_needed = config.top_entropy_quantile < 1.0 and entropy_threshold is None
    batch = flatten(
        hidden, targets, segments, config, advantages, mask, old_logprobs, ref_logprobs, sampling_logprobs,
        importance_weights, skip=not return_logprobs and not entropy_is_needed,
    )  # fmt: skip
    check_values(batch, config, num_items)
    options = HeadOptions(
        bias=bias,
        temperature=config.temperature if temperature is None else temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        lora=lora,
        support=support,
        backend=backend,
        backward="exact" if config.entropy_coef != 0.0 and backward != "certified" else backward,
        tolerance=tolerance,
        workspace_mb=workspace_mb,
        row_tolerance=row_tolerance,
        old_logprobs=sampling_logprobs if old_logprobs is None else old_logprobs,
        return_entropy=config.needs_entropy or config.log_entropy,
        entropy_grad=config.entropy_coef != 0.0,
        moving=batch.moving,
    )
    measured = torch.where(batch.measured.view(targets.shape), targets, inputs.IGNORE)
    out = head_logprobs(hidden, weight, measured, options)
    logprobs = out.logprobs.reshape(-1)
    entropy = None if out.entropy is None else out.entropy.reshape(-1)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, d_logprobs, d_entropy, metrics = evaluate(
            config, batch, logprobs.detach(), None if entropy is None else entropy.detach(), num_items,
            entropy_threshold, backends.load(backends.choose(backend, hidden)),
        )  # fmt: skip
    loss = Objective.apply(logprobs, entropy, loss, d_logprobs, d_entropy)
    return GRPOLoss(loss, out.logprobs.detach(), None if entropy is None else out.entropy.detach(), metrics)


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


def check_batch(
    targets, segments, config, advantages, mask, old_logprobs, ref_logprobs, sampling_logprobs, importance_weights,
    num_items, entropy_threshold,
):  # fmt: skip
    if mask is not None:
        inputs.check_mask(mask, targets)
    inputs.check_per_sequence("advantages", advantages, targets, segments.count)
    if importance_weights is not None:
        inputs.check_per_sequence("importance_weights", importance_weights, targets, segments.count)
        if inputs.checks_values(targets.device) and (importance_weights < 0).any():
            raise ValueError(f"importance_weights must be >= 0, got {importance_weights.min().item()}")
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("sampling_logprobs", sampling_logprobs),
    ):
        if value is not None:
            inputs.check_per_token(name, value, targets)
    if config.beta > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given for beta > 0, got None with beta = {config.beta}")
    if config.loss_type == "dr_grpo" and config.max_completion_length is None and segments.padded_length is None:
        raise ValueError("max_completion_length must be set in the config for dr_grpo on packed input, got None")
    if num_items is not None:
        inputs.check_num_items(num_items)
    if isinstance(entropy_threshold, torch.Tensor) and entropy_threshold.numel() != 1:
        raise ValueError(f"entropy_threshold must hold one number, got shape {tuple(entropy_threshold.shape)}")
    if entropy_threshold is not None and not isinstance(entropy_threshold, torch.Tensor):
        inputs.check_finite("entropy_threshold", entropy_threshold)


def check_values(batch, config, num_items):
    """Values of counted tokens that cannot be meant, where looking at them costs no wait."""
    inputs.check_advantages(batch.advantages)
    for name, value in (
        ("old_logprobs", batch.old),
        ("ref_logprobs", batch.ref),
        ("sampling_logprobs", batch.sampling),
    ):
        if value is not None:
            inputs.check_logprobs(name, value)
    if num_items is not None and config.loss_type in GLOBALLY_NORMALISED:
        inputs.check_some_items(num_items, batch.mask)


def flatten(
    hidden, targets, segments, config, advantages, mask, old_logprobs, ref_logprobs, sampling_logprobs,
    importance_weights, skip,
):  # fmt: skip
    dtype = inputs.accumulator_dtype(hidden)
    counted = targets.reshape(-1) != inputs.IGNORE
    if mask is not None:
        counted = counted & (mask.reshape(-1) != 0)

    def tokens(value):  # a masked position may hold anything, NaN included; 0 keeps it out of every sum
        return None if value is None else torch.where(counted, value.detach().reshape(-1).to(dtype), 0.0)

    def broadcast(value):
        if inputs.is_per_sequence(value, targets, segments.count):
            value = segments.expand(value.detach().reshape(-1))
        return tokens(value)

    importance = log_importance = None
    if importance_weights is not None and config.loss_type == "vespo":
        logs = importance_weights.detach().reshape(-1).to(dtype).log().clamp(VESPO_FLOOR, VESPO_CEILING)
        once = inputs.is_per_sequence(importance_weights, targets, segments.count)
        log_importance = logs if once else segments.sum(tokens(logs))
    elif importance_weights is not None:
        importance = broadcast(importance_weights)
    advantages, moving = broadcast(advantages), counted
    if config.beta == 0 and config.entropy_coef == 0.0:
        moving = counted & may_have_gradient(config, advantages, segments)
    measured = moving if skip else counted
    old = tokens(old_logprobs)
    return Batch(
        mask=counted.to(dtype),
        measured=measured,
        moving=moving,
        advantages=advantages,
        old=None if old is None else torch.where(measured, old, 0.0),
        ref=tokens(ref_logprobs) if config.beta > 0 else None,
        sampling=tokens(None if sampling_logprobs is None else sampling_logprobs),
        importance=importance,
        log_importance=log_importance,
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


def evaluate(config, batch, logp, entropy, num_items, entropy_threshold, backend):
    """-> loss, dloss/dlogp (N,), dloss/dentropy (N,) or None, metrics. Everything here is O(N)."""
    old = logp if batch.old is None else batch.old
    log_ratio = logp - old
    lengths = batch.segments.sum(batch.mask).clamp(min=1.0)
    log_w = log_ratio
    if config.importance_sampling_level != "token":
        log_w = batch.segments.expand(batch.segments.sum(log_ratio) / lengths)
    keep = None
    if config.top_entropy_quantile < 1.0:
        keep = high_entropy(entropy, batch.mask, 1.0 - config.top_entropy_quantile, entropy_threshold)
    # the gate: everything that multiplies the policy term but not the KL
    factors = [batch.importance, off_policy_mask(config, batch, logp, old, lengths), keep]
    factors = [f for f in factors if f is not None]
    gate = torch.stack(factors).prod(0) if factors else None
    loss, d_logp, d_log_w, kl, ratio, low, high = backend.objective(
        config, logp, old, batch.ref, log_w, vespo_log_weight(config, batch, log_ratio), batch.advantages, gate
    )
    weights = token_weights(config, batch.mask, batch.segments, num_items)
    d_logprobs = weights * d_logp
    if config.importance_sampling_level == "sequence":
        d_logprobs = d_logprobs + batch.mask * batch.segments.expand(batch.segments.sum(weights * d_log_w) / lengths)
    else:
        d_logprobs = d_logprobs + weights * d_log_w
    # 0 * inf must not leak from a position that does not count
    total = torch.where(weights != 0, weights * loss, 0.0).sum()
    d_logprobs = torch.where(batch.mask != 0, d_logprobs, 0.0)
    d_entropy = None
    if config.entropy_coef != 0.0:
        bonus = batch.mask if keep is None else batch.mask * keep
        d_entropy = bonus * (-config.entropy_coef / bonus.sum().clamp(min=1.0))
        total = total + (d_entropy * entropy).sum()
    return total, d_logprobs, d_entropy, metrics(batch, entropy, kl, ratio, low, high, d_logprobs, d_entropy)


def off_policy_mask(config, batch, logp, old, lengths):
    """Drops sequences of negative advantage that drifted too far from the sampler (DeepSeek-V3.2, eq. 9), or None."""
    if config.off_policy_mask_threshold is None:
        return None
    sampling = old if batch.sampling is None else batch.sampling
    drift = torch.nan_to_num((sampling - logp) * batch.mask, nan=0.0)  # NaN: the sampler gave no score
    near = batch.segments.expand(batch.segments.sum(drift) / lengths) <= config.off_policy_mask_threshold
    return ((batch.advantages >= 0) | near).to(logp.dtype)


def vespo_log_weight(config, batch, log_ratio):
    """(N,) clamped log of VESPO's sequence weight, or None for the other loss types."""
    if config.loss_type != "vespo":
        return None
    total = batch.segments.sum(log_ratio.clamp(-VESPO_CEILING, VESPO_CEILING))
    if batch.log_importance is not None:
        total = total + batch.log_importance
    return batch.segments.expand(total.clamp(VESPO_FLOOR, VESPO_CEILING))


def high_entropy(entropy, mask, quantile, threshold=None):
    """(N,) 1 where the entropy reaches the quantile of the counted tokens; the host does not wait for their number."""
    if threshold is None:
        ordered = torch.where(mask > 0, entropy, torch.inf).sort().values
        wide = torch.float32 if mask.device.type == "mps" else torch.float64
        position = (quantile * (mask.sum(dtype=wide) - 1)).clamp(min=0.0)
        below = position.floor().long()
        pair = ordered.index_select(0, torch.stack((below, position.ceil().long()))) if ordered.numel() else ordered
        threshold = torch.lerp(*pair, (position - below).to(entropy.dtype)) if ordered.numel() else 0.0
    return ((entropy >= threshold) & (mask > 0)).to(entropy.dtype)


def metrics(batch, entropy, kl, ratio, low, high, d_logprobs, d_entropy):
    """Sums and counts over the measured tokens, which ranks can add; extremes, which they can compare."""
    counted = batch.measured
    active = d_logprobs != 0
    if d_entropy is not None:
        active = active | (d_entropy != 0)

    def total(x):
        return torch.where(counted, x, 0.0).sum()

    tokens, active_tokens = batch.mask.sum(), active.sum()
    empty = counted.numel() == 0
    result = {
        "kl_sum": total(kl),
        "ratio_sum": total(ratio),
        "ratio_min": ratio.new_tensor(1.0) if empty else torch.where(counted, ratio, torch.inf).amin(),
        "ratio_max": ratio.new_tensor(1.0) if empty else torch.where(counted, ratio, 0.0).amax(),
        "clip_low_sum": total(low.to(ratio.dtype)),
        "clip_high_sum": total(high.to(ratio.dtype)),
        "clip_region_sum": total((low | high).to(ratio.dtype)),
        "tokens": tokens,
        "measured_tokens": counted.sum(),
        "active_tokens": active_tokens,
        "skipped_tokens": tokens - active_tokens,
        "sequences": tokens.new_full((), batch.segments.count),
    }
    if entropy is not None:
        result["entropy_sum"] = total(entropy)
    return result
