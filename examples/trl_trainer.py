"""TRL's GRPO trainer on the op: one changed import. python examples/trl_trainer.py [MODEL]

Not named trl.py: a file of that name would be found in the place of the package.
"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig

from fastgrpo.integrations.trl import FastGRPOTrainer as GRPOTrainer  # was: from trl import GRPOTrainer
from fastgrpo.trainer.examples import load_rows

from supervised_start import taught


def digits_in_place(completions, answer, **_):
    return [sum(a == b for a, b in zip(text, right)) / len(right) for text, right in zip(completions, answer)]


def main(path=None, steps=10, output="runs/trl"):
    model, tokenizer = (path, None) if path else taught()  # digits to sort, "3142="
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in load_rows("tiny:sort")]
    config = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=6,
        learning_rate=1e-6 if path else 3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(model, digits_in_place, config, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"reward {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")


if __name__ == "__main__":
    main(*sys.argv[1:2])
