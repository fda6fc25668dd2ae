"""Characters that a tokenizer has no token for and would drop without a word, as the tiny models' do."""

import unicodedata
from collections.abc import Iterable
from typing import Any

SEEN = "LNPS"  # Unicode's letters, numbers, punctuation, symbols: spaces and marks may rightly go
RARE = "\N{TEST TUBE}"  # a tokenizer that takes it, by its bytes or as unknown, takes all


def check_alphabet(tokenizer: Any, texts: Iterable[str | list | None]) -> None:
    """``texts``: prompts, answers or conversations of a dataset.

    Raises:
        ValueError: one has characters that the tokenizer turns into nothing, as ``+`` in a model of digits.
    """
    if ids_of(tokenizer, RARE):
        return
    seen = sorted(
        c for c in set().union(*(part for text in texts for part in spoken(text))) if unicodedata.category(c)[0] in SEEN
    )
    if dropped := "".join(c for c in seen if not ids_of(tokenizer, c)):
        known = "".join(sorted(word for word in tokenizer.get_vocab() if len(word) == 1))
        raise ValueError(
            f"the texts of a dataset must consist of what the tokenizer knows, {known!r}, got {dropped!r}, which it "
            "would drop: take another model or other texts"
        )


def spoken(text):
    """The strings of a text or chat."""
    if isinstance(text, str):
        return [text]
    return [m["content"] for m in text or () if isinstance(m, dict) and isinstance(m.get("content"), str)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
