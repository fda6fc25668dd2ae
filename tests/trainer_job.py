"""A small job for the trainer's tests, also run as a script: ``python trainer_job.py OUTPUT key=value ...``."""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastgrpo.trainer import GRPOConfig, GRPOTrainer, examples
from fastgrpo.trainer.learner import Episode

SETTINGS = {
    "max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 6,
    "num_generations": 4, "num_iterations": 2, "max_completion_length": 6, "learning_rate": 1e-3, "save_steps": 1,
    "gradient_checkpointing": False, "use_cpu": True, "seed": 3,
}  # fmt: skip


def digits(completions, **_):
    """Many distinct rewards, so that every group has advantages."""
    return [sum(c.isdigit() for c in text) / 6 + len(text) / 100 for text in completions]


def make_model(tied=False, dropout=0.1, width=32):
    tokenizer = examples.tiny_tokenizer(examples.WORLDS["sort"])
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        attention_dropout=dropout,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer


def make_conversations(seed=0, vocabulary=90):
    """Turns that part later and later, whose tool results do not count: of one prompt, of a longer one that begins with
    the same turns, of a prompt with the same system message; one answer twice."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, vocabulary, (n,), generator=g).tolist()

    system, question, first, result, second = tokens(16), tokens(3), tokens(7), tokens(8), tokens(12)
    tails = [first + result + second + tokens(4), first + result + second + tokens(9), first + result + tokens(3)]
    tails += [tokens(5), tails[0]]
    rows = [(system + question, tail) for tail in tails]
    rows += [
        (system + question + first + result, second + tokens(2)),
        (system + tokens(2), tokens(6)),
        (tokens(4), [9]),
    ]
    episodes = []
    for prompt, ids in rows:
        mask = torch.ones(len(ids), dtype=torch.bool)
        if ids[:15] == first + result:
            mask[7:15] = False
        old = -2 + torch.randn(len(ids), generator=g) * 0.3
        advantage = torch.randn((), generator=g).item()
        episodes.append(Episode(prompt, ids, advantage=advantage, old=old, sampler=old, ref=old + 0.1, mask=mask))
    return episodes


def problems(count):
    return examples.problems(examples.WORLDS["sort"], count, 0)


def make_trainer(output, model=None, rewards=digits, rows=None, eval_rows=None, **settings):
    model, tokenizer = make_model() if model is None else model
    config = GRPOConfig(output_dir=str(output), **{**SETTINGS, **settings})
    rows = problems(10) if rows is None else rows
    return GRPOTrainer(model, rewards, rows, config, eval_dataset=eval_rows, processing_class=tokenizer)


def log_rows(output):
    """The log without what depends on the clock."""
    rows = map(json.loads, (Path(output) / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


if __name__ == "__main__":
    make_trainer(sys.argv[1], **dict(json.loads(x) for x in sys.argv[2:])).train()
