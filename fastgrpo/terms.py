"""The loss of known log-probs: importance ratio, objective, weights, and what autograd is told of them. All O(N)."""

from typing import NamedTuple

import torch

from fastgrpo import backends, ops
from fastgrpo.batch import VESPO_CEILING, VESPO_FLOOR, Batch
from fastgrpo.config import GRPOLossConfig
from fastgrpo.inputs import Segments
from fastgrpo.weights import token_weights


class Terms(NamedTuple):
    """Of a loss; (N,) each but the first."""

    loss: torch.Tensor  # 0-dim
    d_logprobs: torch.Tensor
    d_entropy: torch.Tensor | None
    kl: torch.Tensor
    ratio: torch.Tensor
    low: torch.Tensor  # bool: clipped
    high: torch.Tensor


def evaluate(config, batch, logp, entropy, backend) -> Terms:
    """:class:`Terms` of log-probs (N,) and entropies (N,) or None. backend: its module."""
    old = logp if batch.old is None else batch.old
    log_ratio = logp - old
    lengths = batch.segments.sum(batch.mask).clamp(min=1.0)
    log_w = log_ratio
    if config.importance_sampling_level != "token":
        log_w = batch.segments.expand(batch.segments.sum(log_ratio) / lengths)
    keep = None
    if config.top_entropy_quantile < 1.0:
        keep = high_entropy(entropy, batch.mask, 1.0 - config.top_entropy_quantile, batch.entropy_threshold)
    # the gate: everything that multiplies the policy term but not the KL
    factors = [batch.importance, off_policy_mask(config, batch, logp, old, lengths), keep]
    factors = [f for f in factors if f is not None]
    gate = torch.stack(factors).prod(0) if factors else None
    loss, d_logp, d_log_w, kl, ratio, low, high = backend.objective(
        config, logp, old, batch.ref, log_w, vespo_log_weight(config, batch, log_ratio), batch.advantages, gate
    )
    weights = token_weights(config, batch.mask, batch.segments, batch.num_items)
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
    return Terms(total, d_logprobs, d_entropy, kl, ratio, low, high)


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


def add_divergence(terms, config, batch, divergence):
    """:class:`Terms` with beta times the whole distributions' KL of each token (N,), differentiable, in the loss."""
    weights = token_weights(config, batch.mask, batch.segments, batch.num_items)
    total = torch.where(weights != 0, weights * divergence, 0.0).sum()
    loss, d_logprobs, d_entropy, _, *others = terms  # no _replace: torch 2.8 cannot trace it
    return Terms(loss + config.beta * total, d_logprobs, d_entropy, divergence.detach(), *others)


def metrics(config, batch, entropy, terms):
    """Sums and counts over the measured tokens, which ranks can add; extremes, which they can compare."""
    counted, ratio = batch.measured, terms.ratio
    active = terms.d_logprobs != 0
    if config.takes_full_kl:
        active = active | (batch.mask != 0)
    if terms.d_entropy is not None:
        active = active | (terms.d_entropy != 0)

    def total(x):
        return torch.where(counted, x, 0.0).sum()

    tokens, active_tokens = batch.mask.sum(), active.sum()
    empty = counted.numel() == 0
    result = {
        "kl_sum": total(terms.kl),
        "ratio_sum": total(ratio),
        "ratio_min": ratio.new_tensor(1.0) if empty else torch.where(counted, ratio, torch.inf).amin(),
        "ratio_max": ratio.new_tensor(1.0) if empty else torch.where(counted, ratio, 0.0).amax(),
        "clip_low_sum": total(terms.low.to(ratio.dtype)),
        "clip_high_sum": total(terms.high.to(ratio.dtype)),
        "clip_region_sum": total((terms.low | terms.high).to(ratio.dtype)),
        "tokens": tokens,
        "measured_tokens": counted.sum(),
        "active_tokens": active_tokens,
        "skipped_tokens": tokens - active_tokens,
        "sequences": tokens.new_full((), batch.segments.count),
    }
    if entropy is not None:
        result["entropy_sum"] = total(entropy)
    return result


class Objective(torch.autograd.Function):
    """Attaches a loss whose derivatives are already known to the log-probs and entropies it came from."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss, d_logprobs, d_entropy):
        ctx.save_for_backward(d_logprobs, d_entropy)
        return loss.clone()

    @staticmethod
    @ops.once_differentiable
    def backward(ctx, grad_loss):
        d_logprobs, d_entropy = ctx.saved_tensors
        return grad_loss * d_logprobs, None if d_entropy is None else grad_loss * d_entropy, None, None, None


def objective(config, batch, logprobs, entropy, backend) -> Terms:
    """:func:`evaluate` with a loss that is differentiable in log-probs and entropy. backend: its name."""
    if torch.compiler.is_compiling():
        return objective_in_graph(config, batch, logprobs, entropy, backend)
    with torch.no_grad(), torch.autocast(logprobs.device.type, enabled=False):
        known = None if entropy is None else entropy.detach()
        terms = evaluate(config, batch, logprobs.detach(), known, backends.load(backend))
    return terms._replace(loss=Objective.apply(logprobs, entropy, terms.loss, terms.d_logprobs, terms.d_entropy))


PER_TOKEN = ("mask", "measured", "moving", "advantages", "old", "ref", "sampling", "importance", "log_importance")


@ops.op(
    "grpo_objective",
    "Tensor logprobs, Tensor? entropy, Tensor mask, Tensor measured, Tensor moving, Tensor advantages, Tensor? old, "
    "Tensor? ref, Tensor? sampling, Tensor? importance, Tensor? log_importance, Tensor? num_items, "
    "Tensor? entropy_threshold, SymInt sequences, SymInt? padded_length, Tensor? offsets, Tensor? ids, str backend, "
    + ops.schema(GRPOLossConfig),
    f"({', '.join(f'Tensor {name}' for name in Terms._fields)})",
)
def objective_op(logprobs, entropy, *arguments):
    batch, backend, config = split(arguments)
    batch.check_values(config)  # tracing saw none
    with torch.autocast(logprobs.device.type, enabled=False):
        terms = evaluate(config, batch, logprobs, entropy, backends.load(backend))
    d_entropy = terms.d_logprobs.new_empty(0) if terms.d_entropy is None else terms.d_entropy
    return terms._replace(d_entropy=d_entropy, kl=terms.kl.clone(), ratio=terms.ratio.clone())  # rows of one tensor


def split(arguments):
    """-> :class:`Batch`, the backend's name, the config."""
    given = len(PER_TOKEN) + 7
    *tensors, count, length, offsets, ids, backend = arguments[:given]
    config = ops.rebuild(GRPOLossConfig, *arguments[given:])
    return Batch(*tensors, Segments(count, length, offsets, ids)), backend, config


@objective_op.register_fake
def fake_objective(logprobs, entropy, *arguments):
    _, _, config = split(arguments)
    row = torch.empty_like(logprobs)
    d_entropy = torch.empty_like(row) if config.entropy_coef != 0.0 else row.new_empty(0)
    flags = (torch.empty_like(row, dtype=torch.bool) for _ in range(2))
    return row.new_empty(()), torch.empty_like(row), d_entropy, torch.empty_like(row), torch.empty_like(row), *flags


def setup_context(ctx, inputs, output):
    terms = Terms(*output)
    ctx.mark_non_differentiable(*terms[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(terms.d_logprobs, terms.d_entropy)
    ctx.arguments = len(inputs)


def backward(ctx, grad_loss, *_):
    grads = [None] * ctx.arguments
    if grad_loss is not None:
        d_logprobs, d_entropy = ctx.saved_tensors
        grads[0] = grad_loss * d_logprobs
        grads[1] = grad_loss * d_entropy if d_entropy.numel() else None
    return tuple(grads)


objective_op.register_autograd(backward, setup_context=setup_context)


def objective_in_graph(config, batch, logprobs, entropy, backend):
    def zero_dim(number):
        return number if number is None or isinstance(number, torch.Tensor) else torch.tensor(number)

    segments = batch.segments
    terms = Terms(
        *objective_op(
            logprobs,
            entropy,
            *(getattr(batch, name) for name in PER_TOKEN),
            zero_dim(batch.num_items),
            zero_dim(batch.entropy_threshold),
            segments.count,
            segments.padded_length,
            segments.offsets,
            segments.ids,
            backend,
            *ops.values(config),
        )
    )
    loss, d_logprobs, d_entropy, *others = terms
    return Terms(loss, d_logprobs, d_entropy if config.entropy_coef != 0.0 else None, *others)
