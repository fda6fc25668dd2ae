"""grpo_loss: check -> flatten -> log-probs -> objective -> weights."""

from dataclasses import replace
from typing import NamedTuple

import torch

from fastgrpo import backends, inputs
from fastgrpo.batch import LossInputs, flatten
from fastgrpo.config import GRPOLossConfig, settings_go_in_config
from fastgrpo.divergence import TeacherHead, head_divergence
from fastgrpo.head import HeadOptions
from fastgrpo.inputs import Backend, Backward
from fastgrpo.logprobs import LogProbs, head_logprobs
from fastgrpo.terms import add_divergence, metrics, objective

DEFAULTS = GRPOLossConfig()


class GRPOLoss(NamedTuple):
    """Result of :func:`grpo_loss`."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    metrics: dict[str, torch.Tensor]


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
    ref_hidden: torch.Tensor | None = None,  # hidden's shape but for D
    ref_weight: torch.Tensor | None = None,  # (V, D_ref)
    ref_bias: torch.Tensor | None = None,  # (V,)
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
        ref_logprobs: of the reference policy, needed for ``beta > 0`` but with ``kl_estimator="full"``.
        sampling_logprobs: the sampler's own, for the off-policy mask; None: ``old_logprobs``. NaN: unknown.
        importance_weights: correction of the train/inference mismatch, already truncated or masked.
        num_items: normaliser of dapo, cispo and vespo (ignored by the others); a number or 0-dim tensor; None: the
            counted tokens of this call.
        entropy_threshold: for ``top_entropy_quantile`` across ranks; None: the quantile of the given tokens.
        bias, softcap, logit_scale, backend, backward, tolerance, workspace_mb, lora, support, row_tolerance:
            see :func:`linear_logprobs`; the hint of the certified backward is ``old_logprobs``, else
            ``sampling_logprobs``.
        temperature: overrides ``config.temperature``; a number or a float tensor shaped like ``targets``.
        ref_hidden, ref_weight, ref_bias: for ``kl_estimator="full"``: the reference's hidden states at the same
            positions and its head; None: ``weight`` and ``bias`` themselves, without ``lora`` (right where these are
            frozen). Softcap, scale and temperature are the policy's. Costs a pass over the vocabulary for each of the
            two models beside the log-probs' own; see :func:`fastgrpo.linear_divergence`, whose hint is the same.
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
    config = DEFAULTS if config is None else config
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {type(config).__name__}")
    inputs.check_head(hidden, weight, targets, bias)
    targets = targets.to(torch.int64)
    given = LossInputs(
        targets=targets,
        advantages=advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        importance_weights=importance_weights,
        num_items=num_items,
        entropy_threshold=entropy_threshold,
    )
    reference = find_reference(config, weight, bias, softcap, logit_scale, ref_hidden, ref_weight, ref_bias, support)
    segments = given.check(config)
    if reference is not None:
        reference.check(hidden, weight, "ref")
    batch = flatten(given, config, segments, inputs.accumulator_dtype(hidden), skip=not return_logprobs)
    batch.check_values(config)
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
    terms = objective(config, batch, logprobs, entropy, backends.choose(backend, hidden))
    if reference is not None:
        alone = replace(options, support=None, return_entropy=False, entropy_grad=None, moving=None, backward=backward)
        labels = None if alone.old_logprobs is None else targets
        kl = head_divergence(hidden, weight, batch.mask, reference, 1.0, alone, labels)
        terms = add_divergence(terms, config, batch, kl.divergence.reshape(-1))
    out = LogProbs(out.logprobs.detach(), None if out.entropy is None else out.entropy.detach())
    return GRPOLoss(terms.loss, *out, metrics(config, batch, None if entropy is None else entropy.detach(), terms))


def find_reference(config, weight, bias, softcap, logit_scale, ref_hidden, ref_weight, ref_bias, support):
    """The reference's head where the whole distributions' KL is wanted, else None."""
    if config.kl_estimator != "full":
        for name, value in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} is read with kl_estimator='full' alone, got it with {config.kl_estimator!r}")
        return None
    if not config.takes_full_kl:
        return None
    if ref_hidden is None:
        raise ValueError("ref_hidden must be given for beta > 0 with kl_estimator='full', got None")
    if support is not None:
        raise ValueError("kl_estimator='full' is of the whole vocabulary, got support, which leaves some of it out")
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
    return TeacherHead(ref_hidden, ref_weight, ref_bias, softcap, logit_scale)
