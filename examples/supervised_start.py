"""Supervised fine-tuning in a loop of your own, by the op's log-probs. python examples/supervised_start.py

The other examples start from the small model that it teaches to sort digits, sometimes.
"""

import torch

from fastgrpo import linear_logprobs
from fastgrpo.trainer.examples import WORLDS, problems, tiny_model

# sampling from the policy itself, whatever a checkpoint's generation config says
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def taught(seed=0, steps=65):
    """A small Qwen2 that gets some answers right, and its tokenizer, in seconds."""
    model, tokenizer = tiny_model("tiny:sort", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(steps):
        rows = problems(WORLDS["sort"], 64, f"{seed}/{step}")  # "3142=" -> "1234", all of one length: no padding
        start = len(tokenizer(rows[0]["prompt"]).input_ids)
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
        ids = torch.tensor(tokenizer(texts).input_ids)
        hidden = model.get_decoder()(ids).last_hidden_state[:, start - 1 : -1]  # a state predicts the token after it
        loss = -linear_logprobs(hidden, model.lm_head.weight, ids[:, start:]).logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 16 == 0 or step == steps - 1:
            print(f"supervised step {step + 1}: {loss.item():.3f} nats a token")
    return model, tokenizer


if __name__ == "__main__":
    taught()
