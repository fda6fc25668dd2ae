"""What a model can do with held-out prompts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastgrpo.trainer.metrics import mean


@contextmanager
def apart(trainer: Any) -> Iterator[list[dict]]:
    """Yields this rank's held-out rows; inside, answers are drawn from random numbers that are always the same, and
    afterwards those of training are as they were."""
    accelerator = trainer.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    gpu = [torch.cuda.current_device()] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(gpu):  # by default it touches every GPU of the machine
        torch.manual_seed(trainer.config.seed + rank)
        trainer.sampler.sync(trainer.model)
        trainer.pulse.stage = "evaluation"
        try:
            yield [trainer.eval_rows[i] for i in range(rank, len(trainer.eval_rows), world)]
        finally:
            trainer.pulse.stage = ""


def evaluate(trainer) -> dict[str, float | None]:
    """Greedy and sampled answers to the held-out prompts: mean rewards, and the share of prompts answered rightly at
    once and once in ``num_generations_eval`` samples."""
    config = trainer.config
    k = config.num_generations_eval or config.num_generations
    with apart(trainer) as rows:
        greedy = trainer.meter.columns(trainer.answer(rows, 1, greedy=True))["reward"]
        sampled = trainer.meter.columns(trainer.answer(rows, k))["reward"].view(-1, k)
    right = {"greedy_pass": greedy, "pass@1": sampled, f"pass@{k}": sampled.nan_to_num(-math.inf).amax(1)}
    numbers = {name: (rewards >= config.eval_pass_threshold).float() for name, rewards in right.items()}
    numbers |= {"greedy_reward": greedy, "reward": sampled}
    return {f"eval/{name}": mean(values) for name, values in numbers.items()}
