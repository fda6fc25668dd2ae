"""``fastgrpo demo``: a small language model learns to sort four digits by GRPO, through our loss."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastgrpo import GRPOLossConfig, group_advantages, grpo_loss, linear_logprobs
from fastgrpo.trainer.logs import RunLog, answer_table, plot_curves
from fastgrpo.trainer.task import ANSWER, SortTask, make_model, make_tokenizer

PANELS = {"reward": "reward (exact answers)", "entropy": "entropy (nats a token)", "clip_fraction": "clip fraction"}


@dataclass(frozen=True)
class DemoConfig:
    """The demo's numbers. Smaller groups or a higher rate collapse its entropy."""

    steps: int = 200
    supervised_steps: int = 80
    supervised_batch: int = 64
    supervised_learning_rate: float = 1e-3
    prompts: int = 32  # a step
    group_size: int = 8
    steps_per_generation: int = 2  # optimiser steps on the answers of one rollout
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    backward: str = "auto"
    vocabulary: int = 32
    output: str = "runs/demo"

    def __post_init__(self):
        for name in ("steps", "prompts", "group_size", "steps_per_generation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.vocabulary < 32:
            raise ValueError(f"vocabulary must be >= 32, got {self.vocabulary}")


@dataclass
class Rollout:
    """Sampled answers, group by group."""

    prompts: torch.Tensor  # (B, 6)
    completions: torch.Tensor  # (B, 5), padded behind <eos>
    mask: torch.Tensor  # (B, 5), 1 up to and with <eos>
    logprobs: torch.Tensor  # (B, 5), the sampler's own
    rewards: torch.Tensor  # (B,)

    def part(self, index):
        return Rollout(*(x[index] for x in vars(self).values()))


@torch.no_grad()
def generate(model, task, prompts, sample=True):
    """Answers to (B, 6) prompts, with the sampler's log-probs."""
    tokenizer = task.tokenizer
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=ANSWER, do_sample=sample,
        pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_logits=True,
        **({"top_k": 0} if sample else {}),
    )  # fmt: skip
    completions = out.sequences[:, prompts.shape[1] :]
    logp = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    done = (completions == tokenizer.eos_token_id).long()
    mask = (done.cumsum(1) - done == 0).long()
    return Rollout(prompts, completions, mask, logp * mask, task.reward(prompts, completions))


def hidden_states(model, prompts, completions):
    """(B, T, D): the states that predict each completion token."""
    ids = torch.cat((prompts, completions), 1)
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return states[:, prompts.shape[1] - 1 : -1]


def supervised(model, task, config, generator):
    """Warm start: a few steps towards the right answers, so that some samples earn a reward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.supervised_learning_rate, betas=(0.9, 0.95))
    for _ in range(config.supervised_steps):
        prompts = task.prompts(config.supervised_batch, generator)
        answers = task.answers(prompts)
        states = hidden_states(model, prompts, answers)
        loss = -linear_logprobs(states, model.lm_head.weight, answers, backend=config.backend).logprobs.mean()
        update(model, optimizer, loss, config.max_grad_norm)


def update(model, optimizer, loss, max_grad_norm):
    """-> gradient norm before clipping."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def grpo_steps(model, task, config, loss_config, generator):
    """The loop: sample groups, score them, take optimiser steps. Yields one row of numbers a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    batch = config.prompts * config.group_size
    step = 0
    while step < config.steps:
        prompts = task.prompts(config.prompts * config.steps_per_generation, generator)
        rollout = generate(model, task, prompts.repeat_interleave(config.group_size, 0))
        advantages = group_advantages(rollout.rewards, config.group_size)
        for start in range(0, rollout.rewards.numel(), batch):
            part, part_advantages = rollout.part(slice(start, start + batch)), advantages[start : start + batch]
            result = grpo_loss(
                hidden_states(model, part.prompts, part.completions), model.lm_head.weight, part.completions,
                part_advantages, loss_config, mask=part.mask, old_logprobs=part.logprobs, backend=config.backend,
                backward=config.backward,
            )  # fmt: skip
            norm = update(model, optimizer, result.loss, config.max_grad_norm)
            yield row(part, result, norm)
            step += 1
            if step == config.steps:
                return


def row(part, result, norm):
    """The numbers of one step, read from the device once."""
    m = result.metrics
    tokens = m["tokens"].clamp(min=1)
    values = {
        "reward": part.rewards.mean(),
        "loss": result.loss.detach(),
        "entropy": m["entropy_sum"] / tokens,
        "clip_fraction": m["clip_region_sum"] / tokens,
        "ratio_max": m["ratio_max"],
        "skipped": m["skipped_tokens"] / tokens,
        "length": tokens / part.mask.shape[0],
        "grad_norm": norm,
    }
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist()))


def exact(model, task, prompts, sample):
    """Share of right answers, and their texts."""
    rollout = generate(model, task, prompts, sample)
    return rollout.rewards.mean().item(), [task.text(x) for x in rollout.completions]


def save(model, tokenizer, path):
    """A folder that ``from_pretrained`` loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    logging.enable_progress_bar()


def run(config=None):
    """Train, show, and leave log.jsonl, curves.png and checkpoint/ in ``config.output``.

    Returns:
        dict with the exact-answer shares before and after on held-out prompts ("greedy", "sampled"), the reward of
        the first and last ten steps, and the paths written.
    """
    config = config or DemoConfig()
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    tokenizer = make_tokenizer(config.vocabulary)
    task, model = SortTask(tokenizer, device), make_model(tokenizer).to(device)
    loss_config = GRPOLossConfig(epsilon=0.2, epsilon_high=0.28)
    with RunLog(output / "log.jsonl", config.steps, "GRPO", ("reward", "entropy", "clip_fraction")) as log:
        log.console.print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}; supervised start ..."
        )
        supervised(model, task, config, generator)
        held_out = task.prompts(512, torch.Generator().manual_seed(1), held_out=True)
        before = {s: exact(model, task, held_out, s == "sampled") for s in ("greedy", "sampled")}
        for numbers in grpo_steps(model, task, config, loss_config, generator):
            log.step(numbers)
    after = {s: exact(model, task, held_out, s == "sampled") for s in ("greedy", "sampled")}
    texts = zip(held_out[:8], before["sampled"][1], after["sampled"][1])
    rows = [(task.text(p).removesuffix("="), task.text(task.answers(p[None])[0]), b, a) for p, b, a in texts]
    log.console.print(answer_table("Held-out prompts, sampled answers", rows))
    rewards = [r["reward"] for r in log.rows]
    result = {
        "before": {k: v[0] for k, v in before.items()}, "after": {k: v[0] for k, v in after.items()},
        "first_reward": sum(rewards[:10]) / len(rewards[:10]), "last_reward": sum(rewards[-10:]) / len(rewards[-10:]),
        "seconds": log.rows[-1]["seconds"],
    }  # fmt: skip
    plot_curves(log.rows, output / "curves.png", PANELS, "GRPO on sorting four digits")
    save(model, tokenizer, output / "checkpoint")
    log.console.print(
        f"exact answers, held out: sampled {result['before']['sampled']:.2f} -> {result['after']['sampled']:.2f}, "
        f"greedy {result['before']['greedy']:.2f} -> {result['after']['greedy']:.2f} "
        f"({len(rewards)} steps, {result['seconds']:.0f} s)\nwritten: {output}/log.jsonl, curves.png, checkpoint/"
    )
    return result
