"""The oracle: full logits, plain torch, derivatives by autograd alone. Shares no formula with the fast path.

Give it float64 tensors for the truth, the training dtype for what a naive implementation would get.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from fastgrpo.config import GRPOLossConfig
from fastgrpo.divergence import Divergence
from fastgrpo.inputs import Backend, Backward
from fastgrpo.logprobs import LogProbs, TopKLogProbs
from fastgrpo.loss import GRPOLoss


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """``cap(logit_scale * (hidden @ weight.T + bias)) / temperature``, (..., V), upcast to at least float32."""
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, torch.Tensor) and temperature.ndim else temperature)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
    old_logprobs: torch.Tensor | None = None,
    backend: Backend = "auto",
    backward: Backward = "auto",
    tolerance: float | None = None,
    workspace_mb: float | None = None,
    row_tolerance: float | None = None,
) -> LogProbs:
    """Same arguments and result as :func:`fastgrpo.linear_logprobs`; the last six are accepted and not used."""
    if lora is not None:
        a, b, scaling = lora
        weight = weight + scaling * b @ a
    z = logits(hidden, weight, bias, temperature, softcap, logit_scale)
    if support is not None:
        z = z.masked_fill(~mark_kept(support, z.shape), -torch.inf)
    logp = F.log_softmax(z, dim=-1)
    several = targets.ndim == hidden.ndim
    counted = targets != -100
    some, safe = counted.any(-1) if several else counted, targets.where(counted, 0).long()
    picked = logp.gather(-1, safe if several else safe[..., None])
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    entropy = entropy.where(some, 0.0) if return_entropy else None
    if several:
        result: Any = TopKLogProbs(picked.where(counted, 0.0), entropy, outside(z, safe, counted).where(some, 0.0))
        return result
    return LogProbs(picked[..., 0].where(counted, 0.0), entropy)


def outside(z, ids, counted):
    """(...,) log of the mass that the ids (..., K) leave, those that are counted."""
    inside = torch.zeros_like(z).scatter_add_(-1, ids, counted.to(z.dtype)) > 0
    return z.masked_fill(inside, -torch.inf).logsumexp(-1) - z.logsumexp(-1)


def mark_kept(support, shape):
    """(..., V) bool of the token ids kept at each position; all of them where none is listed (an ignored one)."""
    ids, offsets = support
    keep = torch.zeros(shape, dtype=torch.bool, device=ids.device).view(-1, shape[-1])
    for row, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        keep[row, ids[first:last].long()] = True
        keep[row] |= first == last
    return keep.view(shape)


def grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    config: GRPOLossConfig | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
    entropy_threshold: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: Backend = "auto",
    backward: Backward = "auto",
    temperature: float | torch.Tensor | None = None,
    tolerance: float | None = None,
    return_logprobs: bool = True,
    workspace_mb: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
    row_tolerance: float | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
) -> GRPOLoss:
    """Same arguments and loss as :func:`fastgrpo.grpo_loss`, computed sequence by sequence; no metrics."""
    config = config or GRPOLossConfig()
    counted = targets != -100
    if mask is not None:
        counted = counted & (mask.reshape(targets.shape) != 0)
    out = linear_logprobs(
        hidden,
        weight,
        targets.where(counted, -100),
        bias,
        temperature=config.temperature if temperature is None else temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        return_entropy=True,
        lora=lora,
        support=support,
    )
    full_kl = None
    if config.beta and config.kl_estimator == "full" and ref_hidden is not None:
        full_kl = linear_divergence(
            hidden,
            weight,
            ref_hidden,
            weight if ref_weight is None else ref_weight,
            bias=bias,
            teacher_bias=bias if ref_weight is None and ref_bias is None else ref_bias,
            temperature=config.temperature if temperature is None else temperature,
            softcap=softcap,
            teacher_softcap=softcap,
            logit_scale=logit_scale,
            teacher_logit_scale=logit_scale,
            lora=lora,
        ).divergence
    loss = loss_of_logprobs(
        out.logprobs,
        out.entropy,
        counted,
        advantages,
        config,
        cu_seqlens,
        old_logprobs,
        ref_logprobs,
        sampling_logprobs,
        importance_weights,
        num_items,
        entropy_threshold,
        full_kl,
    )
    entropy = None if out.entropy is None else out.entropy.detach()
    return GRPOLoss(loss, out.logprobs.detach(), entropy, {})


def loss_of_logprobs(
    logp,
    entropy,
    counted,
    advantages,
    config,
    cu_seqlens=None,
    old_logprobs=None,
    ref_logprobs=None,
    sampling_logprobs=None,
    importance_weights=None,
    num_items=None,
    entropy_threshold=None,
    full_kl=None,
):
    """The loss of given log-probs and entropies (shaped like targets, differentiable); ``counted`` is bool."""
    shape = logp.shape
    bounds = [i * shape[1] for i in range(shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()

    def split(x) -> list[Any]:  # -> list over sequences of (length,) tensors, or of 0-dim ones for per-sequence input
        if x is None:
            return [None] * (len(bounds) - 1)
        if x.shape not in (shape, (shape.numel(),)) and x.numel() == len(bounds) - 1:
            return list(x.reshape(-1))
        return [x.reshape(-1)[a:b] for a, b in itertools.pairwise(bounds)]

    keep = counted
    if config.top_entropy_quantile < 1.0 and counted.any():
        if entropy_threshold is None:
            entropy_threshold = torch.quantile(entropy[counted].detach(), 1 - config.top_entropy_quantile)
        keep = counted & (entropy.detach() >= entropy_threshold)
    old = logp.detach() if old_logprobs is None else old_logprobs
    columns = logp, old, ref_logprobs, sampling_logprobs, importance_weights, advantages, counted, keep, full_kl
    sequences = zip(*map(split, columns))
    token_losses = [sequence_losses(config, *s) for s in sequences]
    masks = [m.to(logp.dtype) for m in split(counted)]
    loss = reduce(config, token_losses, masks, num_items, shape) if token_losses else logp.sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (entropy * keep).sum() / keep.sum().clamp(min=1)
    return loss


def sequence_losses(config, logp, old, ref, sampling, r_is, adv, counted, keep, full_kl):
    """(length,) token losses of one sequence, differentiable, as TRL 1.16's ``_compute_loss`` writes them."""
    m = counted.to(logp.dtype)
    length = m.sum().clamp(min=1)
    old = old.where(counted, 0.0)
    log_ratio = (logp - old) * m
    log_w = log_ratio
    if config.importance_sampling_level != "token":
        log_w = log_ratio.sum() / length * torch.ones_like(logp)
    if config.importance_sampling_level == "sequence_token":
        log_w = log_w.detach() + logp - logp.detach()
    ratio = log_w.exp()
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high

    if config.loss_type == "vespo":
        loss = -vespo_phi(config, log_ratio, r_is, adv, counted) * adv * logp
    elif config.loss_type == "cispo" or config.divergence_mask is not None:
        cap = high if config.loss_type == "cispo" else config.divergence_ratio_cap
        loss = -ratio.clamp(max=cap).detach() * adv * logp
        if config.divergence_mask is not None:
            loss = loss * trust_region(config, logp.detach(), old, adv)
    elif config.loss_type == "sapo":
        tau = torch.where(adv > 0, torch.full_like(logp, config.sapo_temperature_pos), config.sapo_temperature_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
    else:
        bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
        loss = -torch.min(bounded * adv, ratio.clamp(1 - config.epsilon, 1 + high) * adv)
        if config.dual_clip is not None:
            loss = torch.where(adv < 0, torch.min(loss, -adv * config.dual_clip * torch.ones_like(loss)), loss)

    if config.off_policy_mask_threshold is not None:
        drift = ((old if sampling is None else sampling) - logp.detach()).where(counted, 0.0).nan_to_num(nan=0.0)
        loss = loss * ((adv >= 0) | (drift.sum() / length <= config.off_policy_mask_threshold))
    loss = loss * keep
    if r_is is not None and config.loss_type != "vespo":
        loss = loss * r_is
    if full_kl is not None:
        loss = loss + config.beta * full_kl
    elif config.beta:
        gap = ref.where(counted, 0.0) - logp
        kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[config.kl_estimator]
        loss = loss + config.beta * (kl * ratio if config.use_bias_correction_kl else kl)
    return loss.where(counted, 0.0)


def vespo_phi(config, log_ratio, r_is, adv, counted):
    floor = torch.log(torch.tensor(1e-8, dtype=torch.float64)).item()
    total = log_ratio.detach().clamp(-20, 20).sum()
    if r_is is not None:
        logs = r_is.to(log_ratio.dtype).log().clamp(floor, 20)
        total = total + (logs.where(counted, 0.0).sum() if logs.ndim else logs)
    log_w = total.clamp(floor, 20)
    positive = adv >= 0
    k = torch.where(positive, torch.full_like(log_w, config.vespo_k_pos), config.vespo_k_neg)
    lam = torch.where(positive, torch.full_like(log_w, config.vespo_lambda_pos), config.vespo_lambda_neg)
    lam = lam.clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


def trust_region(config, logp, old, adv):
    """DPPO: 0 where the sampled token's probability has already moved too far the way the advantage pushes."""
    p, q = logp.exp(), old.exp()
    if config.divergence_mask == "tv":
        up, down = p - q > config.divergence_high, q - p > config.divergence_low
    else:
        rest = (1 - q) * ((1 - q) / (1 - p)).log()
        divergence = q * (old - logp) + rest.where(q < 1, 0.0)
        up = (divergence > config.divergence_high) & (p > q)
        down = (divergence > config.divergence_low) & (p < q)
    return ~torch.where(adv > 0, up, down)


def reduce(config, losses, masks, num_items, shape) -> Any:
    """One number from the token losses: the seven reductions of TRL 1.16."""
    count = len(losses)
    tokens: Any = sum(m.sum() for m in masks)
    if config.loss_type in ("grpo", "sapo"):
        return sum((x * m).sum() / m.sum().clamp(min=1) for x, m in zip(losses, masks)) / count
    total = sum((x * m).sum() for x, m in zip(losses, masks))
    if config.loss_type == "luspo":
        return total / count
    if config.loss_type == "dr_grpo":
        return total / (count * (config.max_completion_length or shape[1]))
    if config.loss_type == "bnpo" or num_items is None:
        return total / tokens.clamp(min=1)
    return total / torch.as_tensor(num_items).clamp(min=1)


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    beta: float = 1.0,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    return_entropy: bool = False,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    **_: Any,
) -> Divergence:
    """Same arguments and result as :func:`fastgrpo.linear_divergence`; those it does not name are not used."""
    if lora is not None:
        a, b, scaling = lora
        weight = weight + scaling * b @ a
    lowest = -1e30  # in place of the -inf of an entry that cannot be: 0 times it is 0, and so is its gradient
    log_s = F.log_softmax(logits(hidden, weight, bias, temperature, softcap, logit_scale), dim=-1).clamp(min=lowest)
    z = logits(teacher_hidden.detach(), teacher_weight.detach(), teacher_bias, temperature, teacher_softcap,
               teacher_logit_scale)  # fmt: skip
    log_t = F.log_softmax(z, dim=-1).clamp(min=lowest).detach()

    def kl(first, second):
        return (first.exp() * (first - second)).sum(-1)

    if beta in (0.0, 1.0):
        value = kl(log_s, log_t) if beta == 1.0 else kl(log_t, log_s)
    else:
        mixture = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
        value = beta * kl(log_t, mixture) + (1 - beta) * kl(log_s, mixture)
    entropy = -(log_s.exp() * log_s).sum(-1).detach()
    counted = torch.ones_like(value, dtype=torch.bool) if mask is None else mask.reshape(value.shape) != 0
    return Divergence(value.where(counted, 0.0), entropy.where(counted, 0.0) if return_entropy else None)
