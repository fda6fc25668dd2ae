"""Rows that are learnt from as they stand: prompt and completion, a conversation or a text, as sequences of tokens that
say which of them are learnt."""

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fastgrpo.trainer.alphabet import check_alphabet
from fastgrpo.trainer.data import encode, read_rows
from fastgrpo.trainer.learner import Episode

FORMS = "'prompt' and 'completion', 'messages' or 'text'"
LEARNT = ("prompt", "completion", "messages", "text")
CLOSED = {"add_generation_prompt": False, "continue_final_message": False}
OPEN = {"add_generation_prompt": True, "continue_final_message": False}


@dataclass
class Example(Episode):
    """A sequence to learn from. ``importance``: 1 for tokens of the completion that are learnt, 0 for others."""

    truncated: bool = False  # to max_length

    @property
    def tokens(self) -> int:
        return int(self.importance.sum()) if self.counts and self.importance is not None else 0


def load_examples(source: Any, name: str = "train_dataset") -> Any:
    """Rows of text or chat ``prompt`` and ``completion``, of ``messages`` or of ``text``, from where
    :func:`fastgrpo.trainer.data.read_rows` reads.

    Raises:
        ValueError, TypeError: naming what is missing, before a model is loaded.
    """
    source = read_rows(source, name)
    for i, row in enumerate(source):
        if why := what_is_wrong(row):
            raise ValueError(f"{name} must have {FORMS}: {why} at row {i}")
    return source


def what_is_wrong(row):
    """Why a row cannot be learnt from, or None."""
    if not isinstance(row, dict):
        return f"expected a dict, got {row!r:.80}"
    if row.get("messages") is not None:
        return why_no_chat("messages", row["messages"], answered=True)
    if row.get("text") is not None:
        return None if isinstance(row["text"], str) and row["text"] else f"text is {row['text']!r:.80}"
    prompt, completion = row.get("prompt"), row.get("completion")
    if not prompt or not completion:
        return f"got the keys {sorted(row)}"
    if isinstance(completion, str):
        return None if isinstance(prompt, str) else why_no_chat("prompt", prompt)
    if isinstance(prompt, str):
        return f"completion must be text as the prompt is, got {completion!r:.80}"
    return why_no_chat("prompt", prompt) or why_no_chat("completion", completion, answered=True)


def why_no_chat(name, messages, answered=False):
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        return f"{name} must be chat messages, got {messages!r:.80}"
    if answered and all(m["role"] != "assistant" for m in messages):
        return f"{name} has no assistant message"
    return None


def encode_examples(tokenizer: Any, row: dict, template: dict | None = None, max_length: int | None = None) -> list:
    """A row's sequences, of at most ``max_length`` tokens, :class:`Example` s.

    Text: tokens of prompt and completion one behind the other, as sampling puts them, then the end token; also behind
    a chat prompt. Messages: every assistant message (of the completion, where there is one) is learnt behind the prompt
    it would be generated from. They share one sequence as far as the chat template leaves what came before as it was;
    where it drops earlier thoughts, say, a sequence of its own each.

    Raises:
        ValueError: the template of an answered conversation does not begin with that of the question.
    """
    end, template = tokenizer.eos_token_id, dict(template or {})
    if row.get("tools") is not None:
        template["tools"] = row["tools"]
    if row.get("text") is not None and row.get("messages") is None:
        ids = finish(tokenizer(row["text"])["input_ids"], end)
        sequences = [(ids, [False] + [True] * (len(ids) - 1))]
    elif isinstance(row.get("completion"), str):
        prompt = encode(tokenizer, row["prompt"], template)
        answer = finish(tokenizer(row["completion"], add_special_tokens=False)["input_ids"], end)
        sequences = [(prompt + answer, [False] * len(prompt) + [True] * len(answer))]
    else:
        prompt = [] if row.get("messages") is not None else row["prompt"]
        sequences = conversation(tokenizer, prompt + (row.get("messages") or row["completion"]), len(prompt), template)
    examples = [make_example(ids, learnt, max_length) for ids, learnt in sequences]
    return [example for example in examples if example is not None]


def finish(ids, end):
    return ids if ids[-1:] == [end] else ids + [end]


def conversation(tokenizer, messages, first, template):
    """-> [(ids, which are learnt)] of the assistant's messages from number ``first`` on."""
    sequences, end = [], tokenizer.eos_token_id
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= max(first, 1)]
    for i in turns:
        prompt = encode(tokenizer, messages[:i], template | OPEN)
        whole = encode(tokenizer, messages[: i + 1], template | CLOSED)
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                "the chat template writes a prompt and its answer otherwise than the prompt alone, so an answer cannot "
                "be told apart: expected another template, or a 'completion' that is text, at a row of "
                f"{messages[i - 1]!r:.80}"
            )
        answer = whole[len(prompt) :]
        ends = [j for j, token in enumerate(answer) if token == end]
        if ends or i == turns[-1]:
            answer = answer[: ends[-1] + 1] if ends else finish(answer, end)
        before, learnt = sequences.pop() if sequences else (prompt, [])
        if prompt[: len(before)] != before:
            sequences.append((before, learnt))
            learnt = []
        learnt = learnt + [False] * (len(prompt) - len(learnt)) + [True] * len(answer)
        sequences.append((prompt + answer, learnt))
    return sequences


def make_example(ids, learnt, max_length):
    """An :class:`Example`, or None where nothing is left to learn."""
    truncated = max_length is not None and len(ids) > max_length
    ids, learnt = (ids[:max_length], learnt[:max_length]) if truncated else (ids, learnt)
    if not any(learnt[1:]):
        return None
    start = max(learnt.index(True), 1)
    weights = torch.tensor(learnt[start:], dtype=torch.float32)
    return Example(ids[:start], ids[start:], importance=weights, truncated=truncated)


def longest_example(tokenizer, rows, template=None, max_length=None):
    """Tokens of the longest sequence, among the eight rows of most characters; all are looked at for characters that a
    tokenizer would drop."""
    check_alphabet(tokenizer, (row.get(name) for row in rows for name in LEARNT))
    large = heapq.nlargest(8, range(len(rows)), key=lambda i: len(str(rows[i])))
    examples = [e for i in large for e in encode_examples(tokenizer, rows[i], template, max_length)]
    return max((e.length for e in examples), default=0)


def prepare_tokenizer(tokenizer, config):
    """With the chat template and the end token that the config gives; they are saved with the model."""
    if config.chat_template_path is not None:
        path = Path(config.chat_template_path)
        text = path.read_text(encoding="utf-8") if path.is_file() else AutoTokenizer.from_pretrained(path).chat_template
        tokenizer.chat_template = text
    if config.eos_token is not None:
        known = tokenizer.get_vocab()
        if config.eos_token not in known:
            raise ValueError(f"eos_token must be a token of the tokenizer, got {config.eos_token!r}")
        tokenizer.eos_token = config.eos_token
    return tokenizer
