"""A sequence classifier as a reward function."""

from collections.abc import Callable
from typing import Any


def reward_model(
    path: str,
    batch_size: int = 8,
    max_length: int | None = None,
    device: Any = None,
    chat_template_kwargs: dict | None = None,
    **model_options: Any,
) -> Callable[..., list[float]]:
    """A reward function from a sequence classifier with one output, ``AutoModelForSequenceClassification``.

    A chat prompt and its answer go through the classifier's own chat template, texts follow one another. Answers of
    like length share a batch.

    Args:
        path: a folder or hub name, tokenizer included.
        batch_size: answers at once.
        max_length: longer sequences are cut as the tokenizer cuts; None: never.
        device: None: the rank's GPU, or the CPU.
        chat_template_kwargs: keywords of its chat template.
        model_options: of ``from_pretrained``, as in ``dtype="bfloat16"``.

    Returns:
        ``f(prompts, completions, **columns) -> list[float]``, the logits.

    Raises:
        ValueError: it has more than one label.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, **model_options).eval().requires_grad_(False)
    if model.config.num_labels != 1:
        raise ValueError(f"{path} must have one label to be a reward model, got {model.config.num_labels}")

    def encode(prompt, completion):
        cut = {"truncation": max_length is not None, "max_length": max_length}
        if isinstance(completion, str):
            return tokenizer(prompt + completion, **cut)["input_ids"]
        text = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **(chat_template_kwargs or {}))
        return tokenizer(text, add_special_tokens=False, **cut)["input_ids"]  # the template writes its own

    @torch.no_grad()
    def model_reward(prompts, completions, **_):
        # at the first call, not before: each rank's GPU is only then its current one
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        rows = [encode(p, c) for p, c in zip(prompts, completions)]
        order, rewards = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            inputs = pad([rows[i] for i in batch], model, tokenizer)
            rewards |= zip(batch, model(**inputs).logits[:, 0].float().tolist())
        return [rewards[i] for i in range(len(rows))]

    return model_reward


def pad(rows, model, tokenizer):
    """(B, T) inputs, padded on the right. Classifiers on a causal LM look for the last token that is not the padding's:
    without a padding token one is taken that stands in no row, not the end token, which may be that last one."""
    import torch

    used = {token for row in rows for token in row}
    unused = next((token for token in range(model.config.get_text_config().vocab_size) if token not in used), 0)
    fill = unused if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.config.pad_token_id = fill
    width = max(map(len, rows))
    ids = [row + [fill] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
