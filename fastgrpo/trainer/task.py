"""The demo's world: sort four digits. Makes its own tokenizer and a small randomly initialised Qwen2 model."""

import torch

DIGITS, ANSWER = 4, 5  # digits of a prompt; tokens of an answer (the digits and <eos>)
SPECIAL = ("<pad>", "<bos>", "<eos>", "=")
HELD_OUT = 11  # every eleventh prompt is kept from training


def make_tokenizer(vocabulary=32):
    """One token a character: ten digits, four special tokens, then unused ones; of the model's own tokenizer class."""
    from transformers import Qwen2Tokenizer

    words = [*SPECIAL, *map(str, range(10))]
    words += [f"<unused{i}>" for i in range(vocabulary - len(words))]
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", unk_token="<pad>",
    )  # fmt: skip


def make_model(tokenizer):
    """2 layers, width 64, 136k parameters, fp32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


class SortTask:
    """Prompts ``<bos>3141=`` and their answers ``1134<eos>``, as token ids."""

    def __init__(self, tokenizer, device="cpu"):
        self.tokenizer, self.device = tokenizer, device
        self.zero = tokenizer.convert_tokens_to_ids("0")

    def prompts(self, count, generator, held_out=False):
        """-> (count, 6) int64: ``held_out`` draws from the prompts that training never sees."""
        index = torch.randint(0, 10**DIGITS // HELD_OUT, (count,), generator=generator) * HELD_OUT
        if not held_out:
            index += torch.randint(1, HELD_OUT, (count,), generator=generator)
        digits = (index[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1)) % 10
        ends = [self.tokenizer.bos_token_id, self.tokenizer.convert_tokens_to_ids("=")]
        bos, equals = torch.tensor(ends)[:, None, None].expand(2, count, 1)
        return torch.cat((bos, digits + self.zero, equals), 1).to(self.device)

    def answers(self, prompts):
        """(P, 6) -> (P, 5)"""
        eos = prompts.new_full((prompts.shape[0], 1), self.tokenizer.eos_token_id)
        return torch.cat((prompts[:, 1 : 1 + DIGITS].sort(1).values, eos), 1)

    def reward(self, prompts, completions):
        """1.0 for exactly the right answer, else 0.0; (P, 6), (P, T <= 5) -> (P,)"""
        padded = torch.nn.functional.pad(completions, (0, ANSWER - completions.shape[1]), value=-1)
        return (padded == self.answers(prompts)).all(1).float()

    def text(self, ids):
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
