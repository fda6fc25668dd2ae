"""Answers that begin alike go through the model behind one copy of what they have in common.

A row (1, T) is a tree: each :class:`Segment` of it is attended from by itself and by what follows it. The answers of a
group have their prompt in common, the answers of a conversation its first turns, prompts a system message. Position ids
are those of each answer's whole sequence. A layer attends from each segment to those before it and to itself: ordinary
SDPA calls over rows gathered from the layer's queries, keys and values, or one of flash-attn's over their lengths, so
LoRA and checkpointing see nothing. The head then gets each answer's own copy of the states that predict its tokens,
those in common too: each copy has its own advantage, mask and old log-probs.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, chain, count, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastgrpo.integrations.transformers import causal_lm
from fastgrpo.trainer.model import reshard

NAME = "fastgrpo_shared_prompts"  # of the attention function; transformers makes no mask for a name it does not know
VARLEN = "fastgrpo_shared_prompts_varlen"  # where the model's own is flash-attn 2
HALF = (torch.float16, torch.bfloat16)  # what flash-attn takes
STEP = 16  # tokens: fewer in common, beyond a prompt, are not worth another segment
Share = Literal["auto", True, False]


class CannotShare(ValueError):
    """Why a model's attention cannot be given shared prompts."""


class Segment(NamedTuple):
    """Neighbours in a row that the same answers hold."""

    before: torch.Tensor  # (P,) int64, tokens of the row that it follows
    own: torch.Tensor  # (L,)


class Block(NamedTuple):
    """One attention call: rows of similar length, padded on the right, where a causal row sees no padding."""

    queries: torch.Tensor  # (B, L) int64, tokens of the row
    keys: torch.Tensor  # (B, S)
    mask: torch.Tensor | None  # (1 or B, 1, L, S) bool; None: causal


class Lengths(NamedTuple):
    """All segments in one call: their own tokens as they stand in the row, and the keys of each."""

    keys: torch.Tensor  # (S,) int64, tokens of the row
    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Layout:
    """How the tokens of a row attend to each other: as SDPA's calls or as flash-attn's one, whichever is asked for.

    Attributes:
        tokens: of the row. longest: tokens of a prompt with its answer.
        predicts: (N,) int64, the tokens whose states predict the first answer's tokens, the second's ...
    """

    def __init__(self, segments, tokens, predicts, longest, device):
        self.segments, self.tokens, self.longest, self.device = segments, tokens, longest, device
        self.predicts = predicts.to(device)

    @cached_property
    def calls(self) -> tuple[list[Block], torch.Tensor]:
        """The blocks, and (T,) int64 where in their outputs that of each token is."""
        blocks, place = attention_calls(self.segments, self.tokens)
        return [move(block, self.device) for block in blocks], place.to(self.device)

    @cached_property
    def lengths(self) -> Lengths:
        return move(lengths_of(self.segments), self.device)


class Answer(NamedTuple):
    """What a layout needs of an episode."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def read(self):
        """What the model reads: nothing is predicted from an answer's last token."""
        return self.prompt_ids + self.completion_ids[:-1]


class Order(NamedTuple):
    """Answers side by side that begin alike."""

    index: list[int]  # of each in the list that it was made of
    read: list[list[int]]
    common: list[int]  # tokens that each shares with the one before

    @classmethod
    def of(cls, episodes):
        answers = [Answer(e.prompt_ids, e.completion_ids) for e in episodes]
        read = [a.read for a in answers]
        index = sorted(range(len(read)), key=read.__getitem__)
        common = [in_common(answers[i], answers[j], read[i], read[j]) for i, j in pairwise(index)]
        return cls(index, [read[i] for i in index], [0, *common][: len(index)])

    def branches(self, first, last):
        """-> (tokens that answers ``first ... last`` have in common, where those begin that go on otherwise)"""
        common = self.common[first + 1 : last]
        depth = min(common, default=len(self.read[first]))
        return depth, [first, *(first + 1 + i for i, n in enumerate(common) if n == depth), last]


def in_common(a, b, read_a, read_b):
    """Tokens at the beginning of two answers that one copy serves: the prompt, and whole steps beyond it, larger ones
    the further from the start, since a segment copies the keys before it."""
    prompt = len(a.prompt_ids) if a.prompt_ids == b.prompt_ids else 0
    pairs = zip(count(prompt), read_a[prompt:], read_b[prompt:])
    alike = next((i for i, x, y in pairs if x != y), min(len(read_a), len(read_b)))
    return max(prompt, alike - alike % max(STEP, 1 << max(alike.bit_length() - 5, 0)))


def count_tokens(episodes):
    """What a micro-batch takes of the budget."""
    order = Order.of(episodes)
    return sum(map(len, order.read)) - sum(order.common)


def micro_batches(episodes, budget):
    """Lists of at most ``budget`` tokens, first-fit, largest group first; a group over the budget is cut."""
    order, batches = Order.of(episodes), []
    sums = [0, *accumulate(len(read) - n for read, n in zip(order.read, order.common))]

    def size(first, last):
        return sums[last] - sums[first] + order.common[first]

    def cut(first, last):
        """Answers side by side in lists that fit, or of one."""
        if last - first < 2 or size(first, last) <= budget:
            return [(first, last)]
        depth, bounds = order.branches(first, last)
        parts = [part for branch in pairwise(bounds) for part in cut(*branch)]
        return parts if depth == 0 else join(parts)

    def join(parts):
        """Neighbours together, while they fit: they have their beginning in common."""
        joined = parts[:1]
        for first, last in parts[1:]:
            if size(joined[-1][0], last) <= budget:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        return joined

    parts = cut(0, len(episodes)) if episodes else []
    for part in sorted(parts, key=lambda part: -size(*part)):
        batch = next((b for b in batches if b[0] >= size(*part)), None)
        if batch is None:
            batches.append(batch := [budget, []])
        batch[0] -= size(*part)
        batch[1] += [episodes[i] for i in order.index[slice(*part)]]
    return [batch for _, batch in batches]


def lay_out(episodes, device):
    """-> inputs of the model: a row of the episodes' tokens, their positions, and their :class:`Layout`."""
    order, tokens, positions, segments = Order.of(episodes), [], [], []
    paths: list[torch.Tensor] = [torch.empty(0)] * len(episodes)
    todo = [(0, len(episodes), 0, torch.empty(0, dtype=torch.int64))]
    while todo:
        first, last, start, before = todo.pop()
        depth, bounds = order.branches(first, last)
        if depth > start:
            own = torch.arange(len(tokens), len(tokens) + depth - start)
            tokens += order.read[first][start:depth]
            positions += range(start, depth)
            segments.append(Segment(before, own))
            before = torch.cat((before, own))
        if last - first == 1:
            paths[order.index[first]] = before
        else:
            todo += [(*branch, depth, before) for branch in pairwise(bounds)]
    predicts = [path[len(e.prompt_ids) - 1 :][: len(e.completion_ids)] for path, e in zip(paths, episodes)]
    longest = max(len(e.prompt_ids) + len(e.completion_ids) for e in episodes)
    return {
        "input_ids": torch.tensor([tokens], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "shared_prompts": Layout(segments, len(tokens), torch.cat(predicts), longest, device),
    }


def move(group: Any, device):
    return type(group)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in group))


def lengths_of(segments):
    own = [len(segment.own) for segment in segments]
    whole = [len(segment.before) + n for segment, n in zip(segments, own)]
    ends_own, ends_whole = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (own, whole))
    keys = torch.cat([x for segment in segments for x in segment])
    return Lengths(keys, ends_own, ends_whole, max(own), max(whole))


def attention_calls(segments, tokens):
    """-> the blocks, and where in their outputs each of the row's tokens is."""
    alike, place, used = defaultdict(list), torch.empty(tokens, dtype=torch.int64), 0
    for segment in segments:  # lengths of as many bits: padding less than doubles them
        alike[max(len(segment.own).bit_length(), STEP.bit_length()), len(segment.before).bit_length()].append(segment)
    blocks = []
    for group in alike.values():
        queries, real = pad([segment.own for segment in group])
        before, visible = pad([segment.before for segment in group])
        place[queries[real]] = used + real.flatten().nonzero()[:, 0]
        used += queries.numel()
        mask = see(visible, queries.shape[1]) if visible.numel() else None
        blocks.append(Block(queries, torch.cat((before, queries), 1), mask))
    return blocks, place


def pad(rows):
    """-> (B, L) the rows, with the row's first token as padding, and which are real."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def see(visible, length):
    """(1 or B, 1, L, S): all that is visible of what is before, then its own so far."""
    visible = visible[:1] if bool(visible.all()) else visible
    so_far = torch.ones(length, length, dtype=torch.bool).tril().expand(len(visible), 1, -1, -1)
    return torch.cat((visible[:, None, None].expand(-1, 1, length, -1), so_far), -1)


def at_targets(function, layout):
    """What the head calls in the place of ``function``, which gets the states that predict each answer's tokens."""

    def call(hidden, weight, **options):
        return function(hidden.index_select(1, layout.predicts), weight, **options)

    return call


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
    blocks, place = shared_prompts.calls
    outputs = []
    for block in blocks:
        q, k, v = (gather(x, i) for x, i in ((query, block.queries), (key, block.keys), (value, block.keys)))
        out, _ = sdpa_attention_forward(module, q, k, v, block.mask, is_causal=block.mask is None, **options)
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs).index_select(0, place)[None], None


def attend_varlen(
    module,
    query,  # (1, H, T, d)
    key,  # (1, H of keys, T, d)
    value,
    attention_mask,
    shared_prompts: Any = None,  # a Layout
    is_causal=None,
    sliding_window=None,
    dropout=0.0,
    scaling=None,
    **options,
):
    """-> (1, T, H, d), from flash-attn, whose causal mask ends with each segment's last key."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    check_call(module, query, key, attention_mask, shared_prompts, is_causal, sliding_window, options)
    if query.dtype not in HALF:
        raise CannotShare(f"{type(module).__name__} attends in {query.dtype}, and flash-attn in 16 bits")
    keys, *lengths = shared_prompts.lengths
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    more = {"dropout_p": dropout, "softmax_scale": scaling, "softcap": options.get("softcap") or 0.0, "causal": True}
    return flash_attn_varlen_func(q, k.index_select(0, keys), v.index_select(0, keys), *lengths, **more)[None], None


def gather(x, index):
    """(1, H, T, d), (B, L) -> (B, H, L, d)"""
    return x[0].transpose(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def check_call(module, query, key, attention_mask, layout, is_causal, sliding_window, options):
    kind = type(module).__name__
    if layout is None:
        raise CannotShare(f"{kind} is not given the keywords of its model's call")
    if attention_mask is not None or query.shape[:1] + key.shape[2:3] != (1, layout.tokens):
        raise CannotShare(f"{kind} has a mask or keys of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotShare(f"{kind} is not causal")
    if sliding_window is not None and sliding_window < layout.longest:
        raise CannotShare(f"{kind} has a sliding window of {sliding_window} tokens, got {layout.longest}")
    if options.get("position_bias") is not None:
        raise CannotShare(f"{kind} has a bias for every pair of positions")


AttentionInterface.register(NAME, attend)
AttentionInterface.register(VARLEN, attend_varlen)


@contextmanager
def sharing(model):
    """Inside, forward and backward passes attend by the layout they are given; checkpoints call the layers again."""
    configs = [getattr(module, "config", None) for module in causal_lm(model).modules()]
    found = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation_internal) for config in found.values()]
    try:
        for config, name in before:
            config._attn_implementation_internal = VARLEN if name == "flash_attention_2" else NAME
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
    if config._attn_implementation not in ("sdpa", "flash_attention_2"):
        return f"attn_implementation is {config._attn_implementation!r}, not 'sdpa' or 'flash_attention_2'"
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
    prompt, *own = ([token % vocabulary for token in ids] for ids in ([5, 3, 7], [2, 8, 0], [6, 4, 9, 0]))
    answers = [Answer(prompt, ids) for ids in own]
    inputs = lay_out(answers, device)
    rounded = any(p.dtype not in (torch.float32, torch.float64) for p in base.parameters())

    def hidden(states, *_, **__):
        nonlocal rounded
        rounded = rounded or torch.is_autocast_enabled(states.device.type)
        return states[0].float()

    with evaluating(model):
        rows = [torch.tensor([answer.read], device=device) for answer in answers]
        alone = torch.cat([model(input_ids=row, fastgrpo=hidden)[len(prompt) - 1 :] for row in rows])
        with sharing(model):
            together = model(**inputs, fastgrpo=at_targets(hidden, inputs["shared_prompts"]))
    return ((together - alone).norm() / alone.norm()).item(), rounded


@contextmanager
def evaluating(model):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        reshard(model)


@torch.no_grad()
def why_not_packed(model: torch.nn.Module) -> str | None:
    """Why a model's packed sequences are not as if alone, or None: recurrent states, convolutions and masks of the
    model's own may run on over the end of a sequence, and positions too."""
    base = causal_lm(model)
    device, vocabulary = next(base.parameters()).device, base.config.get_text_config().vocab_size
    first, other, last = ([token % vocabulary for token in ids] for ids in ([5, 3, 7, 2], [6, 4, 9, 1], [2, 8, 0, 3]))

    def states(*sequences):
        ids = torch.tensor([[*chain(*sequences)]], device=device)
        positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None].to(device)
        inputs = {"position_ids": positions} if len(sequences) > 1 else {}
        return model(input_ids=ids, **inputs, fastgrpo=lambda states, *_, **__: states[0].float())[-len(last) :]

    with evaluating(model):
        alone, behind, other = states(last), states(first, last), states(other, last)
    seen, differ = (((x - behind).norm() / alone.norm()).item() for x in (other, alone))
    if max(seen, differ / 50) < 1e-3:  # the same shapes round alike; others need not
        return None
    return f"hidden states of a sequence depend on the one before it, by {max(seen, differ):.1g} of their norm"
