"""What a model can do with held-out prompts."""

import math

import torch

from fastgrpo.trainer.metrics import mean


def evaluate(trainer) -> dict[str, float | None]:
    """Greedy and sampled answers to the held-out prompts: mean rewards, and the share of prompts answered rightly at
    once and once in ``num_generations_eval`` samples. Leaves the random numbers of training as they were."""
    config, rank, world = trainer.config, trainer.accelerator.process_index, trainer.accelerator.num_processes
    rows = [trainer.eval_rows[i] for i in range(rank, len(trainer.eval_rows), world)]
    k = config.num_generations_eval or config.num_generations
    gpu = [torch.cuda.current_device()] if trainer.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(gpu):  # by default it touches every GPU of the machine
        torch.manual_seed(config.seed + rank)
        trainer.sampler.sync(trainer.model)
        greedy = trainer.meter.columns(trainer.answer(rows, 1, greedy=True))["reward"]
        sampled = trainer.meter.columns(trainer.answer(rows, k))["reward"].view(-1, k)
    right = {"greedy_pass": greedy, "pass@1": sampled, f"pass@{k}": sampled.nan_to_num(-math.inf).amax(1)}
    numbers = {name: (rewards >= config.eval_pass_threshold).float() for name, rewards in right.items()}
    numbers |= {"greedy_reward": greedy, "reward": sampled}
    return {f"eval/{name}": mean(values) for name, values in numbers.items()}
