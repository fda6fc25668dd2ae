"""The answers of a group behind one copy of their prompt: the layout of a row, and the attention over it.

A row (1, T) holds for each group ``prompt[:-1]``, then for each answer ``prompt[-1:] + answer``: the prompt's last
token predicts another token for each answer, so every target has hidden states of its own. Position ids are those of
each answer's whole sequence. A layer attends from each prompt to itself and from each answer to its prompt and itself:
ordinary SDPA calls over rows gathered from the layer's queries, keys and values, so LoRA and checkpointing see nothing.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastgrpo.integrations.transformers import causal_lm
from fastgrpo.trainer.model import reshard

NAME = "fastgrpo_shared_prompts"  # of the attention function; transformers makes no mask for a name it does not know
Share = Literal["auto", True, False]


class CannotShare(ValueError):
    """Why a model's attention cannot be given shared prompts."""


class Piece(NamedTuple):
    """An episode's part of a row, in tokens."""

    prompt: int  # but the last
    own: int  # the prompt's last, and the answer
    shared: bool  # the prompt stands in the row already


class Block(NamedTuple):
    """One attention call: rows of similar length, padded on the right, where a causal row sees no padding."""

    queries: torch.Tensor  # (B, L) int64, tokens of the row
    keys: torch.Tensor  # (B, S)
    mask: torch.Tensor | None  # (1 or B, 1, L, S) bool; None: causal


class Layout(NamedTuple):
    """How the tokens of a row attend to each other."""

    blocks: list[Block]
    place: torch.Tensor  # (T,) int64, where in the blocks' outputs that of each token is
    longest: int  # tokens of a prompt with its answer


def pieces(episodes):
    """What each episode adds to the row."""
    before = [None, *(e.prompt_ids for e in episodes)]
    lengths = [len(e.prompt_ids) - 1 for e in episodes]
    return [Piece(n, e.length - n, e.prompt_ids == prompt) for n, e, prompt in zip(lengths, episodes, before)]


def count_tokens(episodes):
    """What a micro-batch takes of the budget."""
    return sum(piece.own + (0 if piece.shared else piece.prompt) for piece in pieces(episodes))


def micro_batches(episodes, budget):
    """Lists of at most ``budget`` tokens, first-fit, largest group first; a group over the budget is cut."""
    groups, batches = defaultdict(list), []
    for episode in sorted(episodes, key=lambda e: -e.length):
        groups[tuple(episode.prompt_ids)].append(episode)
    parts = [part for group in groups.values() for part in cut(group, budget)]
    for part in sorted(parts, key=count_tokens, reverse=True):
        size = count_tokens(part)
        batch = next((b for b in batches if b[0] >= size), None)
        if batch is None:
            batches.append(batch := [budget, []])
        batch[0] -= size
        batch[1] += part
    return [batch for _, batch in batches]


def cut(group, budget):
    parts, room = [], 0
    for episode in group:
        shared = len(episode.prompt_ids) - 1
        if not parts or room < episode.length - shared:
            parts.append([])
            room = budget - shared
        parts[-1].append(episode)
        room -= episode.length - shared
    return parts


def lay_out(row, device):
    """:class:`Piece` s of a row -> :class:`Layout`"""
    prompts, answers, used, prompt = defaultdict(list), defaultdict(list), 0, (0, 0)
    for piece in row:
        if not piece.shared:
            prompt = (used, piece.prompt)
            prompts[piece.prompt.bit_length()].append((*prompt, used, 0))
            used += piece.prompt
        answers[piece.own.bit_length(), piece.prompt.bit_length()].append((used, piece.own, *prompt))
        used += piece.own
    # lengths of as many bits: padding less than doubles them
    calls = [torch.tensor(spans).T for bits, spans in prompts.items() if bits]
    calls += [torch.tensor(spans).T for spans in answers.values()]
    blocks, place, count = [], torch.empty(used, dtype=torch.int64), 0
    for start, own, prompt_start, prompt_own in calls:
        queries, real = span(start, own)
        place[queries[real]] = count + real.flatten().nonzero()[:, 0]
        count += queries.numel()
        before, visible = span(prompt_start, prompt_own)
        mask = see(visible, queries.shape[1]).to(device) if visible.numel() else None
        blocks.append(Block(queries.to(device), torch.cat((before, queries), 1).to(device), mask))
    return Layout(blocks, place.to(device), max(piece.prompt + piece.own for piece in row))


def span(start, length):
    """-> (B, L) tokens from ``start`` on, the last one again as padding, and which are real."""
    steps = torch.arange(int(length.max()))
    return start[:, None] + steps.minimum((length[:, None] - 1).clamp(min=0)), steps < length[:, None]


def see(visible, length):
    """(1 or B, 1, L, S): all that is visible of the prompt, then the answer so far."""
    visible = visible[:1] if bool(visible.all()) else visible
    so_far = torch.ones(length, length, dtype=torch.bool).tril().expand(len(visible), 1, -1, -1)
    return torch.cat((visible[:, None, None].expand(-1, 1, length, -1), so_far), -1)


def attend(
    module,
    query,  # (1, H, T, d)
    key,  # (1, H of keys, T, d)
    value,
    attention_mask,
    shared_prompts: Any = None,  # a Layout
    is_causal=None,
    sliding_window=None,
    **options,
):
    """-> (1, T, H, d): the function that transformers calls in each layer."""
    check_call(module, query, key, attention_mask, shared_prompts, is_causal, sliding_window, options)
    outputs = []
    for block in shared_prompts.blocks:
        q, k, v = (gather(x, i) for x, i in ((query, block.queries), (key, block.keys), (value, block.keys)))
        out, _ = sdpa_attention_forward(module, q, k, v, block.mask, is_causal=block.mask is None, **options)
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs).index_select(0, shared_prompts.place)[None], None


def gather(x, index):
    """(1, H, T, d), (B, L) -> (B, H, L, d)"""
    return x[0].transpose(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def check_call(module, query, key, attention_mask, layout, is_causal, sliding_window, options):
    kind = type(module).__name__
    if layout is None:
        raise CannotShare(f"{kind} is not given the keywords of its model's call")
    if attention_mask is not None or query.shape[:1] + key.shape[2:3] != (1, len(layout.place)):
        raise CannotShare(f"{kind} has a mask or keys of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotShare(f"{kind} is not causal")
    if sliding_window is not None and sliding_window < layout.longest:
        raise CannotShare(f"{kind} has a sliding window of {sliding_window} tokens, got {layout.longest}")
    if options.get("position_bias") is not None:
        raise CannotShare(f"{kind} has a bias for every pair of positions")


AttentionInterface.register(NAME, attend)


@contextmanager
def sharing(model):
    """Inside, forward and backward passes attend by the layout they are given; checkpoints call the layers again."""
    configs = [getattr(module, "config", None) for module in causal_lm(model).modules()]
    found = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in found.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def decide(setting: Share, model: torch.nn.Module, longest: int, say: Callable[[str], None] = print) -> bool:
    """Whether a model shares prompts in sequences of ``longest`` tokens; "auto" says why it does not.

    Raises:
        ValueError: the setting is True and the model cannot.
    """
    why = None if setting is False else why_not(model, longest)
    if why is not None and setting is True:
        raise ValueError(f"share_prompts must be False or 'auto', got True: {why}")
    if why is not None:
        say(f"share_prompts: off, because {why}")
    return setting is not False and why is None


def why_not(model, longest):
    """Why a model cannot share prompts, or None."""
    base = causal_lm(model)
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # without them a window is every layer's
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if config._attn_implementation != "sdpa":
        return f"attn_implementation is {config._attn_implementation!r}, not 'sdpa'"
    if not base._can_set_attn_implementation():
        return f"{type(base).__name__} does not use transformers' attention interface"
    if odd := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        return f"it has layers of {' and '.join(odd)}"
    if window is not None and window < longest:
        return f"its sliding window of {window} tokens is shorter than {longest}, the longest prompt and answer"
    try:
        difference, rounded = probe(model, base)
    except CannotShare as error:
        return str(error)
    if difference < (0.05 if rounded else 1e-3):
        return None
    return f"hidden states behind a shared prompt differ from those of whole rows by {difference:.1g} of their norm"


@torch.no_grad()
def probe(model, base):
    """How two short answers' hidden states differ between rows of their own and one behind a shared prompt: layers may
    look past their attention, or at other positions. -> (relative difference, whether 16 bits or fewer are in it)"""
    device, vocabulary = next(base.parameters()).device, base.config.get_text_config().vocab_size
    a, b = (torch.tensor([[5, 3, 7, *own]], device=device) % vocabulary for own in ([2, 8], [6, 4, 9]))
    row = [Piece(2, 3, False), Piece(2, 4, True)]
    options = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4, 5]], device=device),
        "shared_prompts": lay_out(row, device),
    }
    rounded = any(p.dtype not in (torch.float32, torch.float64) for p in base.parameters())

    def hidden(states, *_, **__):
        nonlocal rounded
        rounded = rounded or torch.is_autocast_enabled(states.device.type)
        return states[0].float()

    training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=ids, fastgrpo=hidden)[2:] for ids in (a, b)])
        with sharing(model):
            together = model(input_ids=torch.cat((a, b[:, 2:]), 1), fastgrpo=hidden, **options)[2:]
    finally:
        model.train(training)
        reshard(model)
    return ((together - alone).norm() / alone.norm()).item(), rounded
