"""The trainer with rewards of your own; one cannot score every answer. python examples/custom_reward.py [MODEL]"""

import sys

from fastgrpo.trainer import GRPOConfig, GRPOTrainer
from fastgrpo.trainer.examples import load_rows

from supervised_start import taught


def digits_in_place(completions, answer, **_):
    """The share of digits that stand where they should: partial credit, so that groups differ."""
    return [sum(a == b for a, b in zip(text, right)) / len(right) for text, right in zip(completions, answer)]


async def ascending(completions, **_):
    """1 for digits that never fall, None for an answer without any: it cannot be scored."""
    digits = [[c for c in text if c.isdigit()] for text in completions]
    return [float(d == sorted(d)) if d else None for d in digits]


def main(path=None, steps=10, output="runs/custom-reward"):
    model, tokenizer = (path, None) if path else taught()  # digits to sort, "3142="
    config = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=6,
        learning_rate=1e-6 if path else 3e-4,
        reward_weights=[1.0, 0.2],
        gradient_checkpointing=False,
        save_strategy="no",
    )
    rewards = [digits_in_place, ascending]
    log = GRPOTrainer(model, rewards, load_rows("tiny:sort"), config, processing_class=tokenizer).train()
    for name in ("reward", "rewards/digits_in_place", "rewards/ascending"):
        print(f"{name}: {log[0][name]:.3f} at first, {log[-1][name]:.3f} at last")


if __name__ == "__main__":
    main(*sys.argv[1:2])
