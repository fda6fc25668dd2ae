"""Liger's slot: :class:`FusedLinearGRPOLoss` is called as ``LigerFusedLinearGRPOLoss``, ``apply()`` puts it there.

Constructor, call and return are those of liger-kernel 0.8.5; the loss is :func:`fastgrpo.grpo_loss`.
"""

import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fastgrpo import inputs
from fastgrpo.checks import Below1, Count, Finite, NonNegative, Positive, check_field
from fastgrpo.config import CLIPPED, GRPOLossConfig, Level, LossType
from fastgrpo.inputs import Backend, Backward
from fastgrpo.integrations.known_gradients import call, with_gradients
from fastgrpo.integrations.slots import Slot, fill, renamed
from fastgrpo.logprobs import linear_logprobs
from fastgrpo.lora import unpack_lora
from fastgrpo.loss import GRPOLoss, grpo_loss
from fastgrpo.weights import GLOBALLY_NORMALISED

SHARED = (
    "loss_type",
    "beta",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "use_bias_correction_kl",
    "temperature",
    "max_completion_length",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
)
NAMES = {  # ours, as messages have them: Liger's
    "hidden": "_input",
    "weight": "lin_weight",
    "targets": "selected_token_ids",
    "mask": "attention_mask",
    "old_logprobs": "old_per_token_logps",
    "ref_logprobs": "ref_per_token_logps",
    "sampling_logprobs": "sampling_per_token_logps",
    "importance_weights": "vllm_is_ratio",
    "num_items": "num_items_in_batch",
}
REFERENCE_NAMES = {**NAMES, "hidden": "ref_input", "weight": "ref_weight", "bias": "ref_bias"}


class FusedLinearGRPOLoss(torch.nn.Module):
    """GRPO's loss with the constructor, call and return of liger-kernel 0.8.5's ``LigerFusedLinearGRPOLoss``.

    Equal to Liger's where Liger's is right, to TRL 1.16's formulas elsewhere: luspo, advantages of shape (B, T) with
    ``chunk_size > 1``, NaN in padding, ids outside the vocabulary (a ValueError); and where Liger stops: a sequence's
    ratio with cispo, sapo and vespo.

    Args:
        beta: weight of the KL term, >= 0.
        compiled, chunk_size: of Liger's own loop; accepted, without effect.
        use_ref_model: False: no reference; the KL is 0, as Liger has it.
        epsilon_low, epsilon_high: clip distances; for cispo ``epsilon_high`` is the raw cap, ``epsilon_low`` unused.
        max_completion_length: must be given for dr_grpo.
        loss_type, importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, temperature, delta,
            use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: see
            :class:`fastgrpo.GRPOLossConfig`; the defaults are Liger's: beta 0.04, no bias correction of the KL.
        softcap, logit_scale: of the model's logits, which the reference shares; see :func:`fastgrpo.linear_logprobs`.
        backend, backward, tolerance, workspace_mb: see :func:`fastgrpo.linear_logprobs`.
        grad_in_forward: take the gradients within the call, as Liger does, on which trainers rely that gather a ZeRO-3
            head for the call alone. False: in the backward, where a loss scale reaches them before fp16 rounds them.
        log_entropy: compute the entropy of every counted token, for ``last``.
        objective: any other field of :class:`fastgrpo.GRPOLossConfig`, such as ``entropy_coef`` or ``kl_estimator``.

    Liger's arguments are attributes, read anew by each call. ``last`` is None before the first call, then its
    :class:`fastgrpo.GRPOLoss`, detached: ``last.entropy`` and ``last.logprobs`` (B, T), ``last.metrics``. Without
    ``log_entropy`` tokens that cannot have a gradient (advantage 0, no KL, no entropy term) are skipped: 0 there.

    Raises:
        ValueError: a bad argument, under Liger's name, with what was expected and what came.
        TypeError: an argument that neither Liger nor ``GRPOLossConfig`` has.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: LossType = "dapo",
        max_completion_length: float | None = None,
        importance_sampling_level: Level = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: Backend = "auto",
        backward: Backward = "auto",
        tolerance: float | None = None,
        workspace_mb: float = 128,
        grad_in_forward: bool = True,
        log_entropy: bool = False,
        **objective: Any,
    ) -> None:
        super().__init__()
        self.beta, self.use_ref_model = beta, use_ref_model
        self.compiled, self.chunk_size = compiled, chunk_size
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.importance_sampling_level, self.use_bias_correction_kl = importance_sampling_level, use_bias_correction_kl
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.temperature, self.softcap, self.logit_scale = temperature, softcap, logit_scale
        self.backend, self.backward, self.tolerance, self.workspace_mb = backend, backward, tolerance, workspace_mb
        self.grad_in_forward = grad_in_forward
        self.objective = {"log_entropy": log_entropy, **objective}
        self.last: GRPOLoss | None = None
        self.check()

    def check(self):
        for name in ("compiled", "use_ref_model", "grad_in_forward"):
            check_field(name, getattr(self, name), bool)
        check_field("chunk_size", self.chunk_size, Count)
        check_field("softcap", self.softcap, Positive | None)
        inputs.check_scalar("logit_scale", self.logit_scale, positive=False)
        inputs.check_choice("backend", self.backend, inputs.BACKENDS)
        inputs.check_choice("backward", self.backward, inputs.BACKWARDS)
        check_field("tolerance", self.tolerance, Positive | None)
        check_field("workspace_mb", self.workspace_mb, Positive)
        _ = self.config

    @property
    def config(self) -> GRPOLossConfig:
        """The :class:`fastgrpo.GRPOLossConfig` these attributes say."""
        clips = self.loss_type in CLIPPED
        check_field("epsilon_low", self.epsilon_low, Below1 if clips else Finite)
        check_field("epsilon_high", self.epsilon_high, NonNegative)
        epsilon = {"epsilon": self.epsilon_low} if clips else {}
        config = GRPOLossConfig(**{name: getattr(self, name) for name in SHARED}, **epsilon, **self.objective)
        if config.loss_type == "dr_grpo" and config.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type 'dr_grpo', got None")
        return config

    @property
    def head(self):
        """What the policy's logits and the reference's share."""
        names = ("softcap", "logit_scale", "temperature", "backend", "workspace_mb")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        _input: torch.Tensor,  # (B, T, D); packed: (1, N, D)
        lin_weight: torch.Tensor,  # (V, D)
        selected_token_ids: torch.Tensor,  # (B, T); packed: (1, N)
        attention_mask: torch.Tensor | None,  # like selected_token_ids
        advantages: torch.Tensor,  # (B,) or like selected_token_ids
        bias: torch.Tensor | None = None,  # (V,)
        ref_per_token_logps: torch.Tensor | None = None,  # like selected_token_ids
        old_per_token_logps: torch.Tensor | None = None,  # like selected_token_ids
        ref_input: torch.Tensor | None = None,  # (B, T, D')
        ref_weight: torch.Tensor | None = None,  # (V, D')
        ref_bias: torch.Tensor | None = None,  # (V,)
        vllm_is_ratio: torch.Tensor | None = None,  # (B,), (B, 1) or like selected_token_ids
        num_items_in_batch: float | torch.Tensor | None = None,
        *,
        sampling_per_token_logps: torch.Tensor | None = None,  # like selected_token_ids
        entropy_threshold: float | torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,  # (B + 1,)
        lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # A (r, D), B (V, r), scaling
        support: tuple[torch.Tensor, torch.Tensor] | None = None,  # token_ids (K,), offsets (N + 1,)
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss of a batch of completions and the metrics that trainers log.

        Args:
            _input: the states that predict ``selected_token_ids``.
            lin_weight, bias: the LM head; with ``grad_in_forward`` it need not be whole any more in the backward.
            attention_mask: 0/1, completion mask times tool mask; None: all ids but -100. Elsewhere anything may stand.
            ref_per_token_logps: of the reference; else ``ref_input``, ``ref_weight`` and ``ref_bias`` give them. Both:
                these are used, with a warning, as in Liger.
            old_per_token_logps: of the policy that sampled; None: the current ones, detached (ratio 1).
            vllm_is_ratio: correction of the train/inference mismatch.
            num_items_in_batch: counted tokens of all ranks and accumulation steps, dapo's, cispo's and vespo's
                normaliser once divided by the number of ranks; None: those of this call, summed over the ranks.
            sampling_per_token_logps, entropy_threshold, cu_seqlens, lora, support: see :func:`fastgrpo.grpo_loss`;
                Liger has none of them.

        Returns:
            ``(loss, metrics)``: loss 0-dim, float32 (float64 for float64 input), differentiable once in _input,
            lin_weight, bias and LoRA's A and B; metrics a tuple of 0-dim tensors, means over the counted tokens: the
            KL, there if and only if ``beta`` is not 0, and last the clipped fraction.
        """
        config = self.config
        with renamed(NAMES):
            counted = check_ids(selected_token_ids, attention_mask)
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            # begins as Liger's, so that a filter of that one holds here too
            text = "Both ref_per_token_logps and ref_input are provided: the KL is against ref_per_token_logps"
            warnings.warn(text, stacklevel=1)
        reference = None
        if config.beta > 0 and self.has_reference(ref_per_token_logps, ref_input, ref_weight):
            reference = ref_per_token_logps
            if reference is None:
                ids = selected_token_ids.to(torch.int64).masked_fill(~counted, inputs.IGNORE)
                reference = self.reference_logprobs(ids, ref_input, ref_weight, ref_bias)
        a, b, scaling = unpack_lora(lora)
        with renamed(NAMES):
            loss = partial(
                loss_of_head,
                scaling=scaling,
                support=support,
                targets=selected_token_ids,
                advantages=advantages,
                config=config if reference is not None else replace(config, beta=0.0),
                mask=attention_mask,
                cu_seqlens=cu_seqlens,
                old_logprobs=old_per_token_logps,
                ref_logprobs=reference,
                sampling_logprobs=sampling_per_token_logps,
                importance_weights=vllm_is_ratio,
                num_items=normaliser(config, counted, num_items_in_batch),
                entropy_threshold=entropy_threshold,
                backward=self.backward,
                tolerance=self.tolerance,
                return_logprobs=config.log_entropy,
                **self.head,
            )
            result = (with_gradients if self.grad_in_forward else call)(loss, _input, lin_weight, bias, a, b)
        self.last = GRPOLoss(result.loss.detach(), *result[1:])
        return result.loss, liger_metrics(config, result.metrics)

    def has_reference(self, ref_per_token_logps, ref_input, ref_weight):
        """Whether the KL is against a reference that is given; False: none is wanted."""
        if not self.use_ref_model and ref_per_token_logps is not None:
            raise ValueError(
                f"ref_per_token_logps must be None for use_ref_model=False and beta = {self.beta}, got a tensor: which "
                "of the two is meant?"
            )
        if self.use_ref_model and ref_per_token_logps is None and (ref_input is None or ref_weight is None):
            raise ValueError(
                f"ref_per_token_logps (or ref_input and ref_weight) must be given for use_ref_model=True and beta = "
                f"{self.beta}, got None"
            )
        return self.use_ref_model

    @torch.no_grad()
    def reference_logprobs(self, ids, ref_input, ref_weight, ref_bias):
        with renamed(REFERENCE_NAMES):
            return linear_logprobs(ref_input, ref_weight, ids, ref_bias, **self.head).logprobs


def loss_of_head(hidden, weight, bias, a, b, *, scaling, **arguments):
    return grpo_loss(hidden, weight, bias=bias, lora=None if a is None else (a, b, scaling), **arguments)


def check_ids(ids, mask):
    """-> where tokens count, bool like the ids."""
    inputs.check_tensor("targets", ids, floating=False)
    counted = ids.to(torch.int64) != inputs.IGNORE  # -100 wraps in uint8
    if mask is None:
        return counted
    inputs.check_mask(mask, ids)
    return counted & (mask.reshape(ids.shape) != 0)


def normaliser(config, counted, given):
    """num_items of this rank: a share of the tokens of all ranks, whose gradients are averaged."""
    if given is not None:
        inputs.check_num_items(given)
    if config.loss_type not in GLOBALLY_NORMALISED:
        return None
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if given is None and ranks > 1:
        given = counted.sum(dtype=torch.float32)
        dist.all_reduce(given)
    if isinstance(given, torch.Tensor):
        given = given.to(counted.device, torch.float32).reshape(())
    return None if given is None else given / ranks


def liger_metrics(config, metrics):
    """(KL if beta is not 0, clipped fraction), means over the counted tokens."""
    names = ("kl_sum",) * (config.beta != 0) + ("clip_region_sum",)
    return tuple(metrics[name] / metrics["tokens"].clamp(min=1) for name in names)


def apply() -> ExitStack:
    """Put :class:`FusedLinearGRPOLoss` in the place of ``LigerFusedLinearGRPOLoss``.

    In ``liger_kernel.chunked_loss``, where later imports find it, and in every module that has already imported it
    (TRL <= 1.12, ms-swift, axolotl ...). Objects made before stay as they are, and so do
    ``liger_kernel.chunked_loss.functional`` and Liger's Triton loss on logits. A second call changes nothing.

    Returns:
        an ``ExitStack``: its ``close()``, or the end of a ``with apply():``, puts Liger's class back.

    Raises:
        ImportError: liger-kernel is missing, or its class has another constructor or call than the one tested.
    """
    return fill(SLOT)


SLOT = Slot(
    "LigerFusedLinearGRPOLoss",
    home="liger_kernel.chunked_loss.grpo_loss",
    package="liger_kernel.chunked_loss",
    ours=FusedLinearGRPOLoss,
)
