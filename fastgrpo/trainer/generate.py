"""Rollouts: answers for a list of prompts, by transformers' ``generate`` or by vLLM behind the same two methods."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from fastgrpo.checks import Checked, Count, CountOr0, Fraction, Positive, Share
from fastgrpo.integrations.transformers import causal_lm
from fastgrpo.integrations.vllm import VLLMSampler
from fastgrpo.trainer.completions import Completion, completion, end_tokens
from fastgrpo.trainer.prefill import prefill


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How answers are drawn, under TRL's names.

    Args:
        num_generations: answers a prompt.
        max_completion_length: tokens of an answer.
        temperature: the logits are divided by it, in sampling and in the loss.
        top_p: draw from the likeliest tokens of this mass.
        top_k: draw from so many tokens; 0: from all.
        min_p: draw from tokens with this share of the likeliest one's probability; None: from all.
        repetition_penalty: divides the logits of tokens that stand already; 1: none.
    """

    num_generations: Count = 1
    max_completion_length: Count = 512
    temperature: Positive = 1.0
    top_p: Share = 1.0
    top_k: CountOr0 = 0
    min_p: Fraction | None = None
    repetition_penalty: Positive = 1.0


class Recorder(LogitsProcessor):
    """Log-probs of the drawn tokens, one step late, and entropies: it holds one step's (B, V), never (B, T, V).

    tell: is given the number of tokens so far, step by step.
    """

    def __init__(self, temperature, tell=lambda count: None):
        self.temperature, self.tell, self.step, self.logprobs, self.entropies = temperature, tell, None, [], []

    def __call__(self, input_ids, scores):
        self.take(input_ids)
        self.step = torch.log_softmax(scores.float() / self.temperature, -1)
        self.entropies.append(torch.special.entr(self.step.exp()).sum(-1, keepdim=True))
        self.tell(len(self.entropies))
        return scores

    def take(self, input_ids):
        if self.step is not None:
            self.logprobs.append(self.step.gather(-1, input_ids[:, -1:]))


@contextmanager
def generating(model):
    """Yields the bare causal LM: in evaluation mode, without the checkpoint's own sampling defaults, and whole under
    FSDP2, so that a token costs no communication and ranks may differ in length. Afterwards the model is as it was."""
    bare = causal_lm(extract_model_from_parallel(model))
    modes = [(module, module.training) for module in model.modules()]
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    defaults, bare.generation_config = bare.generation_config, GenerationConfig()
    try:
        model.eval()
        if shards:
            shards[0].set_reshard_after_forward(False)
            with torch.no_grad():  # gathers everything, through the root
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=bare.device))
        yield bare
    finally:
        for i, shard in enumerate(shards):
            shard.reshard()
            shard.set_reshard_after_forward(i > 0, recurse=False)  # FSDP2's default: all but the root
        for module, mode in modes:
            module.training = mode
        bare.generation_config = defaults


class TransformersSampler:
    """``model.generate`` over left-padded batches of prompts of like length, drawing from torch's generator.

    tell: is given how far it is, in words, token by token.
    """

    def __init__(self, tokenizer, max_batch_tokens=65536, tell=lambda text: None):
        self.tokenizer, self.max_batch_tokens, self.tell = tokenizer, max_batch_tokens, tell

    def sync(self, model) -> None:
        """Nothing to do: it samples from the model itself."""

    def generate(
        self, model, prompts: list[list[int]], sampling: Sampling, greedy: bool = False
    ) -> list[list[Completion]]:
        """-> for each prompt (a list of ids) its ``sampling.num_generations`` completions; ``greedy``: one."""
        n = 1 if greedy else sampling.num_generations
        order = sorted(range(len(prompts) * n), key=lambda row: -len(prompts[row // n]))  # longest first
        ends, results = end_tokens(model, self.tokenizer), {}
        with generating(model) as bare:
            while order:
                size = max(1, self.max_batch_tokens // (len(prompts[order[0] // n]) + sampling.max_completion_length))
                rows, order = order[:size], order[size:]
                self.done = f"{len(results)} of {len(prompts) * n} answers done"
                results |= zip(rows, self.batch(bare, [prompts[row // n] for row in rows], sampling, greedy, ends))
        return [[results[i * n + j] for j in range(n)] for i in range(len(prompts))]

    def batch(self, model, prompts, sampling, greedy, ends):
        """One ``generate`` call -> a completion for each prompt."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        names = () if greedy else ("temperature", "top_p", "top_k", "min_p")
        config = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=not greedy,
            eos_token_id=ends,
            pad_token_id=pad,
            use_cache=True,
            **{name: getattr(sampling, name) for name in names},
        )
        recorder = Recorder(
            sampling.temperature,
            lambda count: self.tell(
                f"{self.done}, {len(prompts)} at token {count} of {sampling.max_completion_length}"
            ),
        )
        # the recorder sees the model's own logits: before the penalty and the truncation
        processors = [recorder, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
        out = model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=processors, **prefill(model, ids, mask)
        )
        recorder.take(out)
        recorded = (torch.cat(columns, 1).tolist() for columns in (recorder.logprobs, recorder.entropies))
        return [completion(ids, logp, ends, h) for ids, logp, h in zip(out[:, width:].tolist(), *recorded)]


def make_sampler(config, tokenizer, tell=lambda text: None):
    """``use_vllm`` and ``vllm_*`` are TRL's; ``max_generation_tokens`` bounds a batch of transformers' generate."""
    if config.use_vllm:
        return VLLMSampler(config, tokenizer)
    return TransformersSampler(tokenizer, config.max_generation_tokens, tell)
