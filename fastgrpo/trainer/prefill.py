"""A group's prompt goes through the model once before its answers are drawn, where transformers' cache allows it."""

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KEYS_AND_VALUES = {DynamicLayer, DynamicSlidingWindowLayer}  # nothing else, as recurrent states, to be repeated


def prefill(
    model: Any,
    ids: torch.Tensor,  # (B, P) prompts, padded on the left
    mask: torch.Tensor,  # (B, P), 0: padding
) -> dict[str, Any]:
    """Keywords of ``model.generate(ids, attention_mask=mask)``: the cache of all but each prompt's last token, computed
    once for all rows of a prompt. Nothing where no two rows are alike, or layers keep more than keys and values."""
    distinct, rows = torch.cat((mask, ids), 1).unique(dim=0, return_inverse=True)
    if len(distinct) == len(ids) or ids.shape[1] == 1:
        return {}
    mask, ids = (x[:, :-1] for x in distinct.chunk(2, 1))
    one = GenerationConfig(max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    out = model.generate(ids, attention_mask=mask, generation_config=one)
    name = "cache" if hasattr(out, "cache") else "past_key_values"  # from transformers 5.24 on, and before
    cache = getattr(out, name, None)
    if type(cache) is not DynamicCache or not {type(layer) for layer in cache.layers} <= KEYS_AND_VALUES:
        return {}
    cache.batch_select_indices(rows)
    return {name: cache}
