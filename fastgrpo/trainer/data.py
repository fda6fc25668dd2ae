"""Prompts: where they come from, their order, their tokens; and what reward functions say of the answers."""

import heapq
from pathlib import Path
from typing import Any

import torch

from fastgrpo.trainer import examples
from fastgrpo.trainer.alphabet import check_alphabet, is_mute, template_mistakes
from fastgrpo.trainer.rewards import call_reward


def read_rows(source: Any, name: str = "train_dataset") -> Any:
    """The rows of a list, a .jsonl or .json file, a world or a ``datasets`` object.

    Raises:
        ValueError, TypeError: naming what is missing, before a model is loaded.
    """
    if isinstance(source, str) and source.startswith(("world:", "tiny:")):
        return examples.load_rows(source)
    if isinstance(source, str | Path):
        source = examples.read_json(Path(source), name)
    if isinstance(source, dict) or not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise TypeError(f"{name} must have a length and rows by number, got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError(f"{name} must hold at least one row, got none")
    return source


def load_rows(source: Any, name: str = "train_dataset") -> Any:
    """Rows ``{"prompt": text or chat, column: value ...}``, as :func:`read_rows`."""
    source = read_rows(source, name)
    for i, row in enumerate(select_prompts(source)):
        if not isinstance(row, dict) or (isinstance(source, list) and row.keys() != source[0].keys()):
            raise ValueError(f"{name} must hold dicts with the same keys, got {row!r} at row {i}")
        prompt = row.get("prompt")
        chat = isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
        if not prompt or not (isinstance(prompt, str) or chat):
            got = repr(prompt) if "prompt" in row else f"the keys {list(row)}"
            raise ValueError(f"{name} must have a 'prompt', text or chat messages, got {got} at row {i}")
    return source


def select_prompts(rows):
    """Prompts without the other columns, where those can stay unread."""
    return rows.select_columns("prompt") if "prompt" in getattr(rows, "column_names", ()) else rows


def draw(size, position, count, seed, shuffle=True):
    """Row numbers ``position ... position + count`` of an endless stream: a new order every epoch, no other state."""
    rows = []
    while len(rows) < count:
        epoch, start = divmod(position + len(rows), size)
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(size, generator=generator).tolist() if shuffle else range(size)
        rows += order[start : start + count - len(rows)]
    return rows


def encode(tokenizer: Any, prompt: str | list, template: dict | None = None) -> list[int]:
    """Token ids of a prompt, text or chat."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if "chat_template" not in (template or {}) and getattr(tokenizer, "chat_template", "") is None:
        raise ValueError(f"train_dataset has chat prompts, but tokenizer {tokenizer.name_or_path!r} no chat_template")
    begun = prompt[-1]["role"] == "assistant"  # the answer goes on from there
    options = {"add_generation_prompt": not begun, "continue_final_message": begun, **(template or {})}
    with template_mistakes(prompt):
        return tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, **options)["input_ids"]


def longest_prompt(tokenizer, rows, template=None):
    """Tokens of the longest prompt, among the eight of most characters; all are looked at for characters that a
    tokenizer would drop, and for having a token to answer to."""
    check_alphabet(tokenizer, (row["prompt"] for row in select_prompts(rows)))
    prompts = heapq.nlargest(8, (row["prompt"] for row in select_prompts(rows)), key=lambda prompt: len(str(prompt)))
    prompts += filter(is_mute, (row["prompt"] for row in select_prompts(rows)))
    lengths = [len(encode(tokenizer, prompt, template)) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"a dataset's prompts must have tokens, got {prompts[lengths.index(0)]!r}, which has none")
    return max(lengths)


def decode(tokenizer, prompt, ids):
    """An answer as reward functions get it: text, or one assistant message to a chat."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def score(functions, rows, completions, completion_ids, **more):
    """What each reward function gives each answer: B lists of R floats, NaN where it cannot score (None)."""
    if not rows:
        return []
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"} | {
        "prompts": [row["prompt"] for row in rows],
        "completions": completions,
        **more,
        "completion_ids": completion_ids,
    }
    scores = [call_reward(name, function, columns, len(rows)) for name, function in functions.items()]
    return [[values[i] for values in scores] for i in range(len(rows))]
