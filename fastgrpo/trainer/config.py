"""The trainer's config: TRL's names and defaults, every mistake found before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fastgrpo.advantages import Scale
from fastgrpo.checks import (
    Checked,
    Count,
    CountOr0,
    Finite,
    GroupSize,
    NonNegative,
    Share,
    annotations,
    require,
    require_installed,
)
from fastgrpo.config import ELSEWHERE, GRPOLossConfig
from fastgrpo.inputs import Backend, Backward
from fastgrpo.integrations.vllm import VLLMOptions
from fastgrpo.trainer.generate import Sampling
from fastgrpo.trainer.model import ModelOptions

JOB = ("model", "reward_funcs", "train_dataset", "eval_dataset")  # of a YAML file: GRPOTrainer's other arguments
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Part = TypeVar("Part", bound=Checked)
Strategy = Literal["no", "steps", False]  # False: YAML's no


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Sampling, GRPOLossConfig, ModelOptions, VLLMOptions):
    """Settings of :class:`fastgrpo.trainer.GRPOTrainer`; those of sampling, the loss, the model and vLLM are inherited.

    Names and defaults are those of TRL 1.16's ``GRPOConfig`` and ``ModelConfig``. As there, sizes count answers:
    an optimiser step takes ``per_device_train_batch_size * gradient_accumulation_steps`` on each rank, a rollout
    ``per_device_train_batch_size * steps_per_generation`` (None: one optimiser step), ``num_generations`` a prompt,
    used for ``num_iterations`` epochs. How they are cut into micro-batches is up to ``token_budget``. Different or new:

    Args:
        token_budget: tokens of a micro-batch; "auto" finds it: 8192 at first, more while a GPU has room, halved when
            memory runs out.
        share_prompts: the answers of a group go through the model behind one copy of their prompt, packed; "auto":
            where its layers allow it (SDPA, full attention or windows longer than a sequence), else it says why not.
        packing: where prompts are not shared, micro-batches without padding, in blocks of ``position_ids``; "auto":
            where flash-attn is used. Otherwise answers are sorted by length and padded.
        skip_zero_advantages: leave out of the learner what cannot have a gradient.
        recompute_old_logprobs: score a rollout again instead of taking the sampler's log-probs for the policy's; None:
            with vLLM, and in 16 bits where a rollout serves several optimiser steps.
        ref_model_sync_steps, ref_model_mixup_alpha: with ``sync_ref_model`` every that many steps the reference becomes
            ``alpha * policy + (1 - alpha) * reference``; alpha 1 replaces it.
        max_generation_tokens: prompt and answer tokens generated at once.
        eval_pass_threshold: the weighted reward from which an answer counts as right in pass@k.
        resume_from_checkpoint: True: from the newest complete checkpoint in ``output_dir``, or a folder.
        logging_steps: of trackers and console, and the last step; log.jsonl has every step.
        num_completions_to_print: rows of a table of answers; None: 8.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """

    also = JOB
    advice = ELSEWHERE | yaml.safe_load(Path(__file__).with_name("trl_names.yaml").read_text(encoding="utf-8"))

    output_dir: str = "trainer_output"
    run_name: str | None = None
    report_to: Tracker | list[Tracker] = "none"
    seed: CountOr0 = 42
    resume_from_checkpoint: bool | str | None = None
    max_steps: int = -1
    num_train_epochs: NonNegative = 3.0
    shuffle_dataset: bool = True
    chat_template_kwargs: dict | None = None
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    steps_per_generation: Count | None = None
    num_generations: GroupSize = 8
    num_iterations: Count = 1
    token_budget: Count | Literal["auto"] = "auto"
    share_prompts: Literal["auto", True, False] = "auto"
    packing: Literal["auto", True, False] = "auto"
    skip_zero_advantages: bool = True
    recompute_old_logprobs: bool | None = None
    backend: Backend = "auto"
    backward: Backward = "auto"
    max_generation_tokens: Count = 65536
    reward_weights: list[Finite] | None = None
    scale_rewards: Literal[Scale, True, False] = "group"
    mask_truncated_completions: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: Share = 0.6
    ref_model_sync_steps: Count = 512
    eval_strategy: Strategy = "no"
    eval_steps: Count | None = None
    eval_on_start: bool = False
    num_generations_eval: Count | None = None
    eval_pass_threshold: float = 1.0
    logging_steps: Count = 10
    log_completions: bool = False
    num_completions_to_print: Count | None = None
    save_strategy: Strategy = "steps"
    save_steps: Count = 500
    save_total_limit: Count | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        require(
            self.rollout % self.num_generations == 0,
            f"num_generations must divide a rank's rollout of {self.rollout} answers, got {self.num_generations}",
        )
        steps, accumulate = self.steps_per_generation, self.gradient_accumulation_steps
        require(
            steps is None or steps % accumulate == 0,
            f"steps_per_generation must be a multiple of gradient_accumulation_steps {accumulate}, got {steps}",
        )
        require(
            self.max_steps > 0 or self.max_steps == -1, f"max_steps must be > 0 or -1 (epochs), got {self.max_steps}"
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
        for tracker in self.trackers:
            require_installed(tracker, tracker)

    @property
    def trackers(self) -> list[str]:
        return [n for n in ([self.report_to] if isinstance(self.report_to, str) else self.report_to) if n != "none"]

    @property
    def scale(self) -> Scale:
        """What advantages are divided by; TRL has True and False too."""
        if isinstance(self.scale_rewards, bool):
            return "group" if self.scale_rewards else "none"
        return self.scale_rewards

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
