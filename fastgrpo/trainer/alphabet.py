"""Characters that a tokenizer has no token for and would drop without a word, as the tiny models' do."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from fastgrpo.checks import UserError

SEEN = "LNPS"  # Unicode's letters, numbers, punctuation, symbols: spaces and marks may rightly go
RARE = "\N{TEST TUBE}"  # a tokenizer that takes it, by its bytes or as unknown, takes all


def check_alphabet(tokenizer: Any, texts: Iterable[str | list | None]) -> None:
    """``texts``: prompts, answers or conversations of a dataset.

    Raises:
        ValueError: one has characters that the tokenizer turns into nothing, as ``+`` in a model of digits.
    """
    if takes_all(tokenizer):
        return
    added = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())) or "(?!)")  # found before all else
    characters = set().union(*(added.sub("", part) for text in texts for part in spoken(text)))
    seen = sorted(filter(is_seen, characters))
    if dropped := "".join(c for c in seen if not ids_of(tokenizer, c)):
        known = "".join(sorted(word for word in tokenizer.get_vocab() if len(word) == 1))
        raise ValueError(
            f"the texts of a dataset must consist of what the tokenizer knows, {known!r}, got {dropped!r}, which it "
            "would drop: take another model or other texts"
        )


def is_seen(character):
    return unicodedata.category(character)[0] in SEEN


def is_mute(text: str | list) -> bool:
    """Whether a text or chat says nothing that a tokenizer must have a token for."""
    return not any(map(is_seen, "".join(spoken(text))))


@contextmanager
def template_mistakes(messages: list) -> Iterator[None]:
    """A chat that its template refuses, as where roles do not take turns, is the user's mistake."""
    try:
        yield
    except TemplateError as error:
        raise UserError(f"the chat template refuses messages of a dataset: {error}, got {messages!r:.200}") from error


def takes_all(tokenizer):
    try:
        return bool(ids_of(tokenizer, RARE))
    except Exception:  # of a tokenizer of whole words that has none for what it does not know: it will say so itself
        return True


def spoken(text):
    """The strings of a text or chat."""
    if isinstance(text, str):
        return [text]
    if not isinstance(text, list):
        return []
    return [m["content"] for m in text if isinstance(m, dict) and isinstance(m.get("content"), str)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
