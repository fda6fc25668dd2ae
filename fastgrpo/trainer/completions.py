"""What every sampler gives: an answer, cut behind the token that ends it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel


@dataclass
class Completion:
    """One answer."""

    ids: list[int]  # up to and with the end token
    logprobs: list[float]  # nats: the sampler's own at ``temperature``, over the whole vocabulary
    finished: bool  # by an end token, not by length
    entropy: float = 0.0  # nats: of the distributions behind ``logprobs``, summed


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: the generation config's (one or a list) and the tokenizer's."""
    ids = extract_model_from_parallel(model).generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def completion(
    ids: list[int], logprobs: list[float], ends: Sequence[int], entropies: list[float] | None = None
) -> Completion:
    """An answer cut behind its first end token; without ``entropies`` they are estimated by what was drawn, -log p."""
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    known = [0.0 if math.isnan(x) else -x for x in logprobs] if entropies is None else entropies
    return Completion(ids[:stop], logprobs[:stop], stop is not None, sum(known[:stop]))
