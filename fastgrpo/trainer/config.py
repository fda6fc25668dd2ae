"""The trainer's config: TRL's names and defaults, every mistake found before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fastgrpo.advantages import Aggregation, Estimator, Scale, check_method
from fastgrpo.checks import Checked, Count, CountOr0, Finite, GroupSize, Share, annotations, require
from fastgrpo.config import ELSEWHERE, GRPOLossConfig
from fastgrpo.integrations.vllm import VLLMOptions
from fastgrpo.trainer.generate import Sampling
from fastgrpo.trainer.model import ModelOptions
from fastgrpo.trainer.options import RunOptions

# of a YAML file: GRPOTrainer's other arguments, and what is trained before it
JOB = ("model", "reward_funcs", "train_dataset", "eval_dataset", "sft")
Part = TypeVar("Part", bound=Checked)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Sampling, GRPOLossConfig, ModelOptions, VLLMOptions, RunOptions):
    """Settings of :class:`fastgrpo.trainer.GRPOTrainer`; those of sampling, the loss, the model, vLLM and any run are
    inherited.

    Names and defaults are those of TRL 1.16's ``GRPOConfig`` and ``ModelConfig``. As there, sizes count answers:
    an optimiser step takes ``per_device_train_batch_size * gradient_accumulation_steps`` on each rank, a rollout
    ``per_device_train_batch_size * steps_per_generation``, ``num_generations`` a prompt.

    Args:
        num_generations: answers a prompt, the group that an advantage is relative to.
        steps_per_generation: a rollout is this times ``per_device_train_batch_size`` answers on a rank; None: those of
            one optimiser step.
        num_iterations: epochs over a rollout.
        share_prompts: answers go through the model behind one copy of what they begin with, packed: a group's prompt,
            a conversation's first turns, a system message; "auto": where its layers allow it (SDPA, full attention or
            windows longer than a sequence), else it says why not; then ``packing`` decides.
        skip_zero_advantages: leave out of the learner what cannot have a gradient.
        advantage_estimator: "grpo", "rloo", "reinforce_plus_plus_baseline", "maxrl" or "pass_at_k", see
            :func:`fastgrpo.group_advantages`; all but "grpo" scale on their own.
        pass_at_k: answers of a set, of which the best one counts, with that estimator.
        multi_objective_aggregation: of several rewards: "sum_then_normalize", or "normalize_then_sum" (GDPO).
        max_resample_times: DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): groups whose answers all have the
            same reward give way to groups of the next prompts, up to so many times a rollout (what then has no spread
            is kept); 0: never. Prompts given up count as used, so an epoch has fewer rollouts.
        recompute_old_logprobs: score a rollout again instead of taking the sampler's log-probs for the policy's; None:
            with vLLM, and in 16 bits where a rollout serves several optimiser steps.
        max_generation_tokens: prompt and answer tokens generated at once.
        reward_weights: one for each of ``reward_funcs``, whose weighted sum is the reward; None: 1 each.
        scale_rewards: advantages are divided by the standard deviation of their "group" (or True), of the "batch", or
            by nothing ("none" or False).
        mask_truncated_completions: answers without an end token teach nothing.
        sync_ref_model, ref_model_sync_steps, ref_model_mixup_alpha: every ``ref_model_sync_steps`` steps the reference
            becomes ``alpha * policy + (1 - alpha) * reference``; alpha 1 replaces it.
        num_generations_eval: answers a prompt when evaluating; None: ``num_generations``.
        eval_pass_threshold: the weighted reward from which an answer counts as right in pass@k.

    Raises:
        ValueError: naming the setting, what was expected and what came; several mistakes are listed together.
    """

    also = JOB
    advice = ELSEWHERE | yaml.safe_load(Path(__file__).with_name("trl_names.yaml").read_text(encoding="utf-8"))

    num_generations: GroupSize = 8
    steps_per_generation: Count | None = None
    num_iterations: Count = 1
    share_prompts: Literal["auto", True, False] = "auto"
    skip_zero_advantages: bool = True
    recompute_old_logprobs: bool | None = None
    max_generation_tokens: Count = 65536
    reward_weights: list[Finite] | None = None
    scale_rewards: Literal[Scale, True, False] = "group"
    advantage_estimator: Estimator = "grpo"
    pass_at_k: Count = 4
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    max_resample_times: CountOr0 = 0
    mask_truncated_completions: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: Share = 0.6
    ref_model_sync_steps: Count = 512
    num_generations_eval: Count | None = None
    eval_pass_threshold: Finite = 1.0

    def check_combinations(self) -> None:
        super().check_combinations()
        require(
            self.rollout % self.num_generations == 0,
            f"num_generations must divide a rank's rollout of {self.rollout} answers, got {self.num_generations}",
        )
        check_method(
            **self.advantages,
            group_size=self.num_generations,
            names=("scale_rewards", "advantage_estimator", "multi_objective_aggregation"),
        )
        steps, accumulate = self.steps_per_generation, self.gradient_accumulation_steps
        require(
            steps is None or steps % accumulate == 0,
            f"steps_per_generation must be a multiple of gradient_accumulation_steps {accumulate}, got {steps}",
        )
        if self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type == "vespo":
            require(
                self.vllm_importance_sampling_mode.startswith("token"),
                "vllm_importance_sampling_mode must be 'token_...' with loss_type='vespo', "
                f"got {self.vllm_importance_sampling_mode!r}",
            )
        if self.sync_ref_model:
            require(self.beta > 0, "sync_ref_model needs a reference: beta > 0, got 0")
            require(
                not self.use_peft,
                "sync_ref_model needs a reference of its own, but that of use_peft is the model without its adapter",
            )

    @property
    def scale(self) -> Scale:
        """What advantages are divided by; TRL has True and False too."""
        if isinstance(self.scale_rewards, bool):
            return "group" if self.scale_rewards else "none"
        return self.scale_rewards

    @property
    def advantages(self) -> dict[str, Any]:
        """How :func:`fastgrpo.group_advantages` is called."""
        return {
            "scale": self.scale,
            "estimator": self.advantage_estimator,
            "aggregation": self.multi_objective_aggregation,
            "pass_at_k": self.pass_at_k,
        }

    @property
    def rollout(self) -> int:
        """Answers of a rollout on one rank."""
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps of one epoch over a rollout."""
        return self.rollout // (self.per_device_train_batch_size * self.gradient_accumulation_steps)

    def part(self, cls: type[Part], **changes: Any) -> Part:
        """The settings of one of the classes it is made of."""
        return cls(**{**{name: getattr(self, name) for name in annotations(cls)}, **changes})
