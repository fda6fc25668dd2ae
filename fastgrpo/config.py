"""Every hyper-parameter of the loss, checked once."""

import math
from dataclasses import dataclass
from numbers import Real

from fastgrpo.objective import HyperParameters

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # loss types built on the clipped surrogate
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3")
DIVERGENCE_MASKS = ("tv", "kl")


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """Objective of :func:`fastgrpo.grpo_loss`. Names and defaults are those of TRL's ``GRPOConfig``.

    Args:
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo" (clipped surrogate, five reductions), "cispo", "sapo",
            "vespo".
        beta: weight of the KL term; above 0 the loss needs ``ref_logprobs``.
        epsilon: lower clip distance: ratios below ``1 - epsilon`` are clipped.
        epsilon_high: upper clip distance, ``None``: ``epsilon``. For cispo the raw cap of the ratio.
        delta: upper bound of the ratio for every token (two-sided clipping), clipped loss types only.
        dual_clip: upper bound of the ratio where the advantage is negative, clipped loss types only.
        importance_sampling_level: "token"; "sequence" (GSPO: one length-normalised ratio per sequence);
            "sequence_token" (GSPO-token: that value, each token's own gradient).
        kl_estimator: "k1" ``logp - ref``, "k2" half its square, "k3" ``exp(ref - logp) - (ref - logp) - 1``.
        use_bias_correction_kl: multiply the KL by the unclamped importance ratio.
        temperature: the sampling temperature the logits are divided by.
        max_completion_length: dr_grpo's length normaliser; ``None``: the padded length (packed input needs a number).
        entropy_coef: the loss loses ``entropy_coef`` times the mean token entropy (nats).
        top_entropy_quantile: share of the tokens, by entropy, that keep their policy term.
        off_policy_mask_threshold: drop sequences of negative advantage whose mean ``sampling - logp`` exceeds this.
        sapo_temperature_pos, sapo_temperature_neg: SAPO's gate temperatures for positive and other advantages.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's gamma weights by sign of the advantage.
        divergence_mask: DPPO: replace the ratio clip by a trust region on the sampled token's probability, "tv"
            (difference) or "kl" (binary KL divergence); ``None``: off.
        divergence_low, divergence_high: DPPO's thresholds for a falling and a rising probability.
        divergence_ratio_cap: DPPO's cap of the detached ratio (cispo keeps ``epsilon_high``).
        log_entropy: also compute the entropy when only the metrics want it.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str = "token"
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    temperature: float = 1.0
    max_completion_length: int | None = None
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    divergence_mask: str | None = None
    divergence_low: float = 0.2
    divergence_high: float = 0.2
    divergence_ratio_cap: float = 20.0
    log_entropy: bool = True

    def __post_init__(self):
        _choice("loss_type", self.loss_type, LOSS_TYPES)
        _choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        _choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.divergence_mask is not None:
            _choice("divergence_mask", self.divergence_mask, DIVERGENCE_MASKS)
        for name, expected, holds in _RANGES:
            _number(name, getattr(self, name), expected, holds, optional=name in _OPTIONAL)
        for name in ("use_bias_correction_kl", "log_entropy"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_combinations()

    def _check_combinations(self):
        for name in ("delta", "dual_clip"):
            if getattr(self, name) is not None and self.surrogate != "clip":
                raise ValueError(
                    f"{name} bounds the clipped surrogate's ratio and means nothing with "
                    f"loss_type={self.loss_type!r}, divergence_mask={self.divergence_mask!r}: expected None, "
                    f"got {getattr(self, name)}"
                )
        if self.divergence_mask is not None and self.loss_type in ("sapo", "vespo"):
            raise ValueError(
                f"divergence_mask replaces a ratio clip, which loss_type={self.loss_type!r} does not have: "
                f"expected None, got {self.divergence_mask!r}"
            )
        if self.max_completion_length is not None and self.max_completion_length != int(self.max_completion_length):
            raise ValueError(f"max_completion_length must be a whole number, got {self.max_completion_length}")

    @property
    def surrogate(self):
        """Which branch of :func:`fastgrpo.objective.surrogate` the loss type takes."""
        if self.loss_type == "cispo" or (self.divergence_mask is not None and self.loss_type in CLIPPED):
            return "capped"
        return "clip" if self.loss_type in CLIPPED else self.loss_type

    @property
    def upper_epsilon(self):
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_entropy(self):
        """Whether the loss itself (not only the metrics) depends on the entropy."""
        return self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0

    @property
    def hyper_parameters(self):
        """The numbers the per-token mathematics uses; absent bounds are infinite."""
        return HyperParameters(
            clip_low=1.0 - float(self.epsilon),
            clip_high=1.0 + float(self.upper_epsilon),
            delta=math.inf if self.delta is None else float(self.delta),
            dual_clip=math.inf if self.dual_clip is None else float(self.dual_clip),
            ratio_cap=float(self.upper_epsilon if self.loss_type == "cispo" else self.divergence_ratio_cap),
            divergence_low=float(self.divergence_low),
            divergence_high=float(self.divergence_high),
            sapo_temperature_pos=float(self.sapo_temperature_pos),
            sapo_temperature_neg=float(self.sapo_temperature_neg),
            vespo_k_pos=float(self.vespo_k_pos),
            vespo_lambda_pos=max(float(self.vespo_lambda_pos), 1e-4),
            vespo_k_neg=float(self.vespo_k_neg),
            vespo_lambda_neg=max(float(self.vespo_lambda_neg), 1e-4),
            beta=float(self.beta),
        )


def _positive(x):
    return x > 0


def _non_negative(x):
    return x >= 0


_OPTIONAL = ("epsilon_high", "delta", "dual_clip", "max_completion_length", "off_policy_mask_threshold")
_RANGES = (
    ("beta", ">= 0", _non_negative),
    ("epsilon", "in [0, 1)", lambda x: 0 <= x < 1),
    ("epsilon_high", ">= 0 or None", _non_negative),
    ("delta", "> 0 or None", _positive),
    ("dual_clip", "> 1 or None", lambda x: x > 1),
    ("temperature", "> 0", _positive),
    ("max_completion_length", ">= 1 or None", lambda x: x >= 1),
    ("entropy_coef", "a finite number", lambda x: True),
    ("top_entropy_quantile", "in [0, 1]", lambda x: 0 <= x <= 1),
    ("off_policy_mask_threshold", "a finite number or None", lambda x: True),
    ("sapo_temperature_pos", "> 0", _positive),
    ("sapo_temperature_neg", "> 0", _positive),
    ("vespo_k_pos", ">= 0", _non_negative),
    ("vespo_lambda_pos", ">= 0", _non_negative),
    ("vespo_k_neg", ">= 0", _non_negative),
    ("vespo_lambda_neg", ">= 0", _non_negative),
    ("divergence_low", ">= 0", _non_negative),
    ("divergence_high", ">= 0", _non_negative),
    ("divergence_ratio_cap", "> 0", _positive),
)


def _choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _number(name, value, expected, holds, optional):
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
