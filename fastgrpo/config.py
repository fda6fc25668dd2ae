"""Every hyper-parameter of the loss, checked once."""

import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, ParamSpec, TypeVar, get_args

from fastgrpo.checks import Above1, Below1, Checked, Finite, Fraction, From1, NonNegative, Positive, require
from fastgrpo.inputs import kind
from fastgrpo.objective import HyperParameters

ClippedLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]  # loss types built on the clipped surrogate
LossType = Literal[ClippedLoss, "cispo", "sapo", "vespo"]
Level = Literal["token", "sequence", "sequence_token"]
Sampled = Literal["k1", "k2", "k3"]  # of the sampled token alone
Estimator = Literal[Sampled, "full"]
TrustRegion = Literal["tv", "kl"]
CLIPPED, LOSS_TYPES = get_args(ClippedLoss), get_args(LossType)
IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, DIVERGENCE_MASKS = map(get_args, (Level, Sampled, TrustRegion))

ELSEWHERE = {  # names of other libraries, and what is meant
    "kl_coef": "say beta",
    "kl_loss_coef": "say beta",
    "clip_eps": "say epsilon",
    "clip_range": "say epsilon",
    "clip_ratio": "say epsilon",
    "epsilon_low": "say epsilon",
    "clip_ratio_low": "say epsilon",
    "clip_ratio_high": "say epsilon_high",
    "clip_ratio_c": "say dual_clip",
    "entropy_coeff": "say entropy_coef",
    "loss_type=gspo": "GSPO is importance_sampling_level='sequence', with any loss_type",
    "loss_type=gspo_token": "GSPO-token is importance_sampling_level='sequence_token', with any loss_type",
    "importance_sampling_level=gspo": "GSPO is 'sequence'",
}


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig(Checked):
    """Objective of :func:`fastgrpo.grpo_loss`. Names and defaults are those of TRL's ``GRPOConfig``.

    Args:
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo" (clipped surrogate, five reductions), "cispo", "sapo",
            "vespo".
        beta: weight of the KL term; above 0 the loss needs ``ref_logprobs``, or ``ref_hidden`` for "full".
        epsilon: lower clip distance: ratios below ``1 - epsilon`` are clipped.
        epsilon_high: upper clip distance, ``None``: ``epsilon``. For cispo the raw cap of the ratio.
        delta: upper bound of the ratio for every token (two-sided clipping), clipped loss types only.
        dual_clip: upper bound of the ratio where the advantage is negative, clipped loss types only.
        importance_sampling_level: "token"; "sequence" (GSPO: one length-normalised ratio per sequence);
            "sequence_token" (GSPO-token: that value, each token's own gradient).
        kl_estimator: "k1" ``logp - ref``, "k2" half its square, "k3" ``exp(ref - logp) - (ref - logp) - 1``, each of
            the sampled token; "full": KL(policy || reference) of the whole distribution at each token, exactly.
        use_bias_correction_kl: multiply the KL by the unclamped importance ratio. Not "full", which is the policy's
            own mean already.
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

    advice = types.MappingProxyType(ELSEWHERE)

    loss_type: LossType = "dapo"
    beta: NonNegative = 0.0
    epsilon: Below1 = 0.2
    epsilon_high: NonNegative | None = None
    delta: Positive | None = None
    dual_clip: Above1 | None = None
    importance_sampling_level: Level = "token"
    kl_estimator: Estimator = "k3"
    use_bias_correction_kl: bool = True
    temperature: Positive = 1.0
    max_completion_length: From1 | None = None
    entropy_coef: Finite = 0.0
    top_entropy_quantile: Fraction = 1.0
    off_policy_mask_threshold: Finite | None = None
    sapo_temperature_pos: Positive = 1.0
    sapo_temperature_neg: Positive = 1.05
    vespo_k_pos: NonNegative = 2.0
    vespo_lambda_pos: NonNegative = 3.0
    vespo_k_neg: NonNegative = 3.0
    vespo_lambda_neg: NonNegative = 2.0
    divergence_mask: TrustRegion | None = None
    divergence_low: NonNegative = 0.2
    divergence_high: NonNegative = 0.2
    divergence_ratio_cap: Positive = 20.0
    log_entropy: bool = True

    def check_combinations(self) -> None:
        super().check_combinations()
        loss, mask, length = self.loss_type, self.divergence_mask, self.max_completion_length
        for name in ("delta", "dual_clip"):
            value = getattr(self, name)
            require(
                value is None or self.surrogate == "clip",
                f"{name} bounds the clipped surrogate's ratio and means nothing with loss_type={loss!r}, "
                f"divergence_mask={mask!r}: expected None, got {value}",
            )
        require(
            mask is None or loss not in ("sapo", "vespo"),
            f"divergence_mask replaces a ratio clip, which loss_type={loss!r} has not: expected None, got {mask!r}",
        )
        require(
            length is None or length == int(length),
            f"max_completion_length must be a whole number, got {length}",
        )

    @property
    def surrogate(self) -> str:
        """Which branch of :func:`fastgrpo.objective.surrogate` the loss type takes."""
        if self.loss_type == "cispo" or (self.divergence_mask is not None and self.loss_type in CLIPPED):
            return "capped"
        return "clip" if self.loss_type in CLIPPED else self.loss_type

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss itself (not only the metrics) depends on the entropy."""
        return self.entropy_coef != 0.0 or self.top_entropy_quantile < 1.0

    @property
    def estimates_kl(self) -> bool:
        """Whether a KL term is made of the sampled token's log-probs."""
        return self.beta > 0 and self.kl_estimator != "full"

    @property
    def takes_full_kl(self) -> bool:
        """Whether a KL term is made of whole distributions."""
        return self.beta > 0 and self.kl_estimator == "full"

    @property
    def kl_correction(self) -> str | None:
        """Whose importance ratio multiplies a KL estimate: the "sequence"'s, as a whole, or each "token"'s own."""
        if not self.use_bias_correction_kl:
            return None
        return "sequence" if self.importance_sampling_level == "sequence" else "token"

    @property
    def hyper_parameters(self) -> HyperParameters:
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


P = ParamSpec("P")
R = TypeVar("R")


def settings_go_in_config(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a keyword that is a field of :class:`GRPOLossConfig` gets a TypeError that says where it belongs."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        if strange := {name: value for name, value in keywords.items() if name not in known}:
            refuse_settings(function.__name__, known, strange)
        return function(*arguments, **keywords)

    return call


def refuse_settings(function, known, strange):
    """Raises if one of the keywords is the config's, another library's name of one, or nearly an argument's; Python
    refuses any other."""
    for name in strange.keys() & ELSEWHERE.keys():
        raise TypeError(f"{function} has no argument {name}: {ELSEWHERE[name]}, a field of GRPOLossConfig")
    names = [f.name for f in fields(GRPOLossConfig) if f.name in strange]
    if names:
        settings = ", ".join(f"{name}={kind(strange[name])}" for name in names)
        raise TypeError(
            f"{', '.join(names)} {'is a field' if len(names) == 1 else 'are fields'} of GRPOLossConfig: "
            + (f"pass config=GRPOLossConfig({settings})" if "config" in known else f"of grpo_loss, not of {function}")
        )
    for name in strange:
        for close in difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            raise TypeError(f"{function} has no argument {name}: did you mean {close}?")
