"""LoRA on a real model with word problems. python examples/real_model.py MODEL [key=value ...]

On a 16 GB card a model of 1.5B weights takes minutes for some steps; on a CPU take one of 135M or less. The command
`fastgrpo train arithmetic --model MODEL` is the same job as a preset.
"""

import sys

import torch
import yaml

from fastgrpo.trainer import GRPOConfig, GRPOTrainer

SETTINGS = {
    "output_dir": "runs/real-model",
    "max_steps": 20,
    "per_device_train_batch_size": 16,  # answers; token_budget decides how many are on the card at once
    "num_generations": 8,
    "max_completion_length": 128,
    "epsilon_high": 0.28,
    "learning_rate": 1e-5,
    "use_peft": True,
    "lora_target_modules": "all-linear",
    "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    "gradient_checkpointing": True,
    "log_completions": True,
    "save_steps": 10,
    "save_total_limit": 2,
}


def main(model, *words):
    """Chat prompts with instructions, 4096 of them; the last number of an answer counts, its form a fifth as much."""
    given = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in words)}
    config = GRPOConfig(**{**SETTINGS, "reward_weights": [1.0, 0.2], **given})
    trainer = GRPOTrainer(model, ["numeric_answer", "think_format"], "world:arithmetic", config)
    log = trainer.train()
    print(f"reward {log[0]['reward']:.3f} at first, {log[-1]['reward']:.3f} at last")
    print(f"the adapter: {config.output_dir}/model")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
