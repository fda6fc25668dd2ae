"""The loop: sample groups of answers, score them, learn from them. Read it from ``train`` down."""

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import TrainerState

from fastgrpo import GRPOLossConfig, group_advantages
from fastgrpo.advantages import has_spread
from fastgrpo.checks import UserError
from fastgrpo.trainer import arguments, checkpoint, evaluation
from fastgrpo.trainer import model as models
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.curves import PANELS, plot_curves
from fastgrpo.trainer.data import decode, draw, encode, longest_prompt, score
from fastgrpo.trainer.generate import Sampling, make_sampler
from fastgrpo.trainer.health import Health, Pulse, save_bad_batch
from fastgrpo.trainer.learner import Episode, Learner
from fastgrpo.trainer.logs import SHOWN, RunLog
from fastgrpo.trainer.metrics import WITNESSES, Meter
from fastgrpo.trainer.rewards import Rewards, warn_unscored

STATE = ("step", "used", "position", "resampled")


class GRPOTrainer:
    """GRPO on a transformers causal LM.

    Args:
        model: a folder, hub name or causal LM.
        reward_funcs: one or a list of functions ``f(prompts, completions, **columns) -> list[float | None]`` (None:
            cannot score), or names of shipped rewards; completions are texts, or ``[{"role": "assistant", "content":
            str}]`` for chat prompts; ``completion_ids`` and the dataset's columns come as keyword arguments.
        train_dataset, eval_dataset: a list of dicts, a .jsonl or .json file or a ``datasets`` object with "prompt"
            (text or chat messages) and any other columns.
        config: a :class:`GRPOConfig`, or by TRL's name ``args``. processing_class: the tokenizer; None: the model's.
            peft_config: of PEFT; None: LoRA by the config's ``lora_*`` if ``use_peft``.

    Raises:
        ValueError, TypeError: a bad setting, reward or dataset, before the model is loaded; all of them.
    """

    name, shown, panels = "GRPO", SHOWN, PANELS  # of the log
    learner_class: Any = Learner

    def __init__(
        self,
        model: str | torch.nn.Module,
        reward_funcs: Rewards,
        train_dataset: Any,
        config: GRPOConfig | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        args: Any = None,
    ) -> None:
        call = "GRPOTrainer(model, reward_funcs, train_dataset, config)"
        self.config = config = arguments.choose(GRPOConfig, config, args, call)
        if peft_config is not None or hasattr(model, "peft_config"):
            self.config = config = replace(config, use_peft=True)
        given = arguments.check(config, model, train_dataset, eval_dataset, reward_funcs)
        self.weights = torch.tensor(config.reward_weights or [1.0] * len(given.rewards))
        self.open(given, model, processing_class, peft_config)

    def open(self, given, model, tokenizer, peft_config):
        """What was checked, then tokenizer, model and all that goes with it, at the first step."""
        self.rows, self.eval_rows, self.rewards, self.start_from = given
        config = self.config
        tracking = {"log_with": config.trackers or None, "project_dir": config.output_dir}
        self.accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=config.mixed_precision, **tracking)
        self.tokenizer = models.load_tokenizer(tokenizer, model, config)
        longest = max(self.longest(rows) for rows in (self.rows, self.eval_rows) if rows is not None)
        set_seed(config.seed)
        model = models.load_model(model, config, self.accelerator.device)
        self.reference: Any = None
        self.pulse = Pulse()
        self.setup(model, peft_config, longest)
        # optimiser steps; those taken on the rollout in hand; rows drawn; groups given up for it, over its groups
        self.step = self.used = self.position = self.resampled = 0
        self.rollout = []
        set_seed(config.seed, device_specific=True)

    def longest(self, rows):
        return longest_prompt(self.tokenizer, rows, self.config.chat_template_kwargs)

    def setup(self, model, peft_config, longest):
        """Model, frozen reference, optimiser, schedule, sampler and learner, on this rank's device."""
        config, accelerator = self.config, self.accelerator
        models.check_room(model, longest, config.max_completion_length)
        reference = self.make_reference(model)
        model = self.prepare(model, peft_config)
        if reference is not None:
            self.reference = models.freeze(reference, accelerator)
        self.plan(config.rollout // config.num_generations, config.steps_per_rollout * config.num_iterations)
        self.meter = Meter(accelerator, [*self.rewards], self.weights, config.beta)
        self.health = Health(accelerator.print, not accelerator.is_main_process, config.max_completion_length)
        self.sampler = make_sampler(config, self.tokenizer, self.pulse.tell)
        self.learner = self.learner_class(
            self.model,
            accelerator,
            config.part(GRPOLossConfig),
            budget=config.token_budget,
            packed=models.packs(model, config),
            skip=config.skip_zero_advantages,
            offload=config.activation_offloading,
            backend=config.backend,
            backward=config.backward,
            share_prompts=config.share_prompts,
            longest=longest + config.max_completion_length,
            half=config.half,
        )
        rounded = (
            self.learner.half
            or config.mixed_precision != "no"
            or any(p.dtype != torch.float32 for p in model.parameters())
        )
        differs, asked = config.use_vllm or (rounded and self.uses > 1), config.recompute_old_logprobs
        self.rescore = differs if asked is None else asked

    def make_reference(self, model) -> Any:
        """What the policy is compared with; None: nothing, or the model without its adapter."""
        return copy.deepcopy(model) if self.config.beta > 0 and not self.config.use_peft else None

    def prepare(self, model, peft_config):
        """The model as it is trained, and its optimiser, on this rank's device -> the model without their wrappers."""
        config, accelerator = self.config, self.accelerator
        model = models.make_trainable(model, config, peft_config).train()
        self.model, self.optimizer = accelerator.prepare(model, models.make_optimizer(model, config))
        if config.use_peft and not accelerator.is_fsdp2:
            checkpoint.adapter_only(accelerator)
        return model

    def plan(self, rows, uses):
        """How long the run is. ``rows``: this rank's rows of a rollout; ``uses``: optimiser steps taken on it."""
        self.prompts, self.uses = rows * self.accelerator.num_processes, uses
        rollouts = max(math.ceil(self.config.num_train_epochs * len(self.rows) / self.prompts), 1)
        self.total = self.config.max_steps if self.config.max_steps > 0 else rollouts * uses
        self.schedule = models.make_schedule(self.optimizer, self.config, self.total)

    def train(self) -> list[dict[str, Any]]:
        """Trains to the last step; leaves log.jsonl, curves.png, model/ and checkpoints in ``output_dir``.

        Returns:
            list of the log's rows.
        """
        config, accelerator = self.config, self.accelerator
        if self.start_from is not None:
            self.restore(checkpoint.load(self.start_from, accelerator, self.settings()))
        often = config.logging_steps
        log = RunLog(config.output_dir, self.total, accelerator, self.pulse, often, self.step, self.name, self.shown)
        with log as self.log, self.pulse.beating(log):
            settings = {k: v for k, v in vars(config).items() if isinstance(v, int | float | str)}
            accelerator.init_trackers(config.run_name or "fastgrpo", config=settings)
            if config.eval_on_start and self.step == 0:
                self.log.write(0, self.evaluate())
            while self.step < self.total:
                started = time.perf_counter()
                if not self.rollout:
                    self.rollout, self.used = self.collect(), 0
                    self.show(self.rollout)
                row = self.learn(self.batch())
                self.step, self.used = self.step + 1, self.used + 1
                if self.used == self.uses:
                    self.rollout = []
                row["tokens_per_second"] = row.pop("step_tokens") / (time.perf_counter() - started)
                self.log.write(self.step, row)
                self.after_step()
        return self.finish()

    def after_step(self):
        """What happens every so many steps: reference, evaluation, checkpoint."""
        config = self.config
        if self.reference is not None and config.sync_ref_model and self.step % config.ref_model_sync_steps == 0:
            models.move(self.reference, self.model, config.ref_model_mixup_alpha)
            if self.learner.config.takes_full_kl:
                self.add_reference(self.rollout)  # states belong to the head that moved with them
        last, eval_steps = self.step == self.total, config.eval_steps or config.logging_steps
        if config.eval_strategy == "steps" and (self.step % eval_steps == 0 or last):
            self.log.write(self.step, self.evaluate())
        if config.save_strategy == "steps" and (self.step % config.save_steps == 0 or last):
            self.save()

    def collect(self):
        """A rollout: this rank's episodes, sampled, scored, with advantages and the log-probs the loss will need."""
        config, rank = self.config, self.accelerator.process_index
        self.sampler.sync(self.model)
        episodes = self.sample_groups()
        rewards = torch.tensor(gather_object([e.rewards for e in episodes]))
        warn_unscored(rewards, quiet=not self.accelerator.is_main_process)
        advantages = group_advantages(rewards, config.num_generations, weights=self.weights, **config.advantages)
        for episode, advantage in zip(episodes, advantages[rank * len(episodes) :].tolist()):
            episode.advantage = advantage
        self.add_logprobs(*self.learner.split(episodes))
        return episodes

    def sample_groups(self):
        """The episodes of this rank; a group without spread gives way to one of the next prompts, so many times."""
        config, size, first = self.config, self.config.num_generations, self.position
        groups, dull = {}, [*range(config.rollout // size)]
        for _ in range(config.max_resample_times + 1):
            episodes = self.answer(self.next_rows(len(dull)), size)
            scores = torch.tensor([e.rewards for e in episodes]).view(-1, len(self.weights))
            spread = has_spread(scores, size, config.multi_objective_aggregation, self.weights).tolist()
            for i, slot in enumerate(dull):
                groups[slot] = [replace(e, spread=spread[i]) for e in episodes[i * size : (i + 1) * size]]
            dull = [slot for slot, differs in zip(dull, spread) if not differs]
            if not any(gather_object([len(dull)])):
                break
        self.resampled = (self.position - first) / self.prompts - 1
        return [e for slot in sorted(groups) for e in groups[slot]]

    def next_rows(self, count):
        """``count`` rows for this rank, where others may take other numbers."""
        wanted, rank = gather_object([count]), self.accelerator.process_index
        start, config = self.position + sum(wanted[:rank]), self.config
        self.position += sum(wanted)
        return [self.rows[i] for i in draw(len(self.rows), start, count, config.seed, config.shuffle_dataset)]

    def answer(self, rows, n, greedy=False):
        """-> ``n`` scored episodes a row."""
        config, tokenizer = self.config, self.tokenizer
        prompts = [encode(tokenizer, row["prompt"], config.chat_template_kwargs) for row in rows]
        self.pulse.doing(f"sampling {'greedy ' if greedy else ''}answers to {len(rows)} prompts")
        with self.learner.precision():
            groups = self.sampler.generate(self.model, prompts, config.part(Sampling, num_generations=n), greedy)
        drawn = [(row, ids, c) for row, ids, group in zip(rows, prompts, groups) for c in group]
        texts = [decode(tokenizer, row["prompt"], c.ids) for row, _, c in drawn]
        self.pulse.doing(f"scoring {len(drawn)} answers")
        state = TrainerState(global_step=self.step, max_steps=self.total, epoch=self.position / len(self.rows))
        scores = score(self.rewards, [row for row, *_ in drawn], texts, [c.ids for *_, c in drawn], trainer_state=state)
        return [
            Episode(
                ids,
                c.ids,
                rewards=rewards,
                entropy=c.entropy,
                sampler=torch.tensor(c.logprobs),
                finished=c.finished,
                counts=c.finished or not config.mask_truncated_completions,
            )
            for (_, ids, c), rewards in zip(drawn, scores)
        ]

    def show(self, episodes):
        """A table of some answers; of the last rollout always."""
        if not self.config.log_completions and self.total - self.step > self.uses:
            return
        text, count = self.tokenizer.decode, self.config.num_completions_to_print or 8
        sample = episodes[:: max(len(episodes) // count, 1)][:count]
        rows = [(text(e.prompt_ids), text(e.completion_ids), self.meter.reward(e)) for e in sample]
        self.log.answers(f"answers of the rollout at step {self.step + 1}", rows)

    def add_logprobs(self, episodes, left_out):
        """Of the policy that sampled, where later steps need them, of the reference, and their mismatch with vLLM."""
        config, asked = self.config, episodes + (left_out[::WITNESSES] if self.uses > 1 else [])
        if self.rescore:
            for episode, old in zip(asked, self.learner.score(asked)):
                episode.old = old
                if config.use_vllm and config.vllm_importance_sampling_correction:
                    episode.importance = config.mismatch_weights(old, episode.sampler)
        elif self.uses > 1:
            for episode in asked:
                episode.old = episode.sampler
        self.add_reference(episodes)

    def add_reference(self, episodes):
        """What the KL term needs of the reference, where there is one."""
        if self.config.beta > 0:
            bare = self.accelerator.unwrap_model(self.model)
            with bare.disable_adapter() if self.config.use_peft else nullcontext():
                self.learner.add_reference(episodes, self.reference)

    def batch(self):
        """The episodes of this optimiser step."""
        size = len(self.rollout) // self.config.steps_per_rollout
        start = self.used % self.config.steps_per_rollout * size
        return self.rollout[start : start + size]

    def learn(self, episodes):
        """One optimiser step -> its numbers, read from the device once, before the weights change."""
        accelerator = self.accelerator
        tokens = sum(gather_object([sum(e.tokens for e in self.rollout)]))
        self.pulse.doing(f"learning from {len(episodes)} sequences")
        numbers = self.learner.witness(episodes) if self.uses > 1 else {}
        numbers |= self.learner.gradients(episodes, num_items=tokens / self.config.steps_per_rollout)
        norm: Any = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        numbers["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        row = self.summary(episodes, numbers)
        if self.learner.overflowed(row):
            return self.learn(episodes)  # the same batch, with half the loss scale
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            save_bad_batch(self.config.output_dir, accelerator.process_index, self.step + 1, row, episodes)
        row["learning_rate"] = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.learner.grow()
        return row

    def summary(self, episodes, numbers):
        """The numbers of a step over all ranks."""
        row = self.meter.summary(episodes, numbers)
        self.health.look(row)
        return row | {"resampled": self.resampled}

    def evaluate(self):
        return evaluation.evaluate(self)

    def save(self):
        """A checkpoint of everything that the next step depends on."""
        state = {name: getattr(self, name) for name in STATE} | self.learner.state()
        state |= {"rollout": [vars(e) for e in self.rollout], "schedule": self.schedule.state_dict()}
        reference = self.reference
        state["settings"] = self.settings()
        state["reference"] = reference.state_dict() if reference is not None and self.config.sync_ref_model else None
        folder = Path(self.config.output_dir) / f"checkpoint-{self.step}"
        checkpoint.save(folder, self.accelerator, self.model, self.tokenizer, state, self.config.save_total_limit)

    def settings(self):
        """What a resumed run may have changed, in words."""
        job = {"reward_funcs": [*self.rewards], "train_dataset": f"{len(self.rows)} rows"}
        return {k: repr(v) for k, v in (vars(self.config) | job).items() if k != "resume_from_checkpoint"}

    def restore(self, state):
        vars(self).update({name: state[name] for name in STATE if name in state})
        self.rollout, size = [Episode(**e) for e in state["rollout"]], self.config.rollout
        if len(self.rollout) not in (0, size):
            raise UserError(f"a rollout must have the {len(self.rollout)} answers of the checkpoint's, got {size}")
        self.schedule.load_state_dict(state["schedule"])
        self.learner.restore(state)
        if state["reference"] is not None:
            self.reference.load_state_dict(state["reference"])
        if self.rollout:
            self.add_reference([])  # its head

    def finish(self):
        """The model as ``from_pretrained`` loads it (an adapter alone with LoRA), and a picture of the run."""
        output, accelerator = Path(self.config.output_dir), self.accelerator
        state = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            with checkpoint.replacing(output / "model") as folder:
                accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)
            plot_curves(self.log.rows, output / "curves.png", self.config.run_name or self.name, self.panels)
        for tracker in accelerator.trackers:
            tracker.finish()
        self.log.console.print(f"written: {output}/log.jsonl, curves.png, model/")
        return self.log.rows
