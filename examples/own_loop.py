"""GRPO in a loop of your own: sample, score, one call for the loss. python examples/own_loop.py [MODEL]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo import GRPOLossConfig, group_advantages, grpo_loss

from supervised_start import PLAIN, taught

GROUP, PASSES = 16, 2  # answers to the prompt; optimiser steps on one rollout


def load(path):
    if path is None:  # a small model that sorts digits, made here
        return taught()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def main(path=None, steps=20, prompt="3142=", answer="1234"):
    model, tokenizer = load(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6 if path else 2e-4)
    config = GRPOLossConfig(epsilon_high=0.28)
    given = tokenizer([prompt] * GROUP, return_tensors="pt").to(model.device)
    start, end = given.input_ids.shape[1], torch.tensor(model.generation_config.eos_token_id, device=model.device)
    for step in range(steps):
        model.eval()
        ids = model.generate(**given, **PLAIN, max_new_tokens=16)
        answers = ids[:, start:]
        ends = torch.isin(answers, end)
        mask = (ends.cumsum(1) - ends.long() == 0).long()  # up to the first end token, itself included
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        # the share of right digits: a reward with parts has groups that differ
        rewards = torch.tensor([sum(a == b for a, b in zip(text, answer)) / len(answer) for text in texts])
        advantages = group_advantages(rewards, GROUP).to(ids.device)
        model.train()
        old = None
        for _ in range(PASSES):
            hidden = model.get_decoder()(ids).last_hidden_state[:, start - 1 : -1]  # predict the token after
            head = model.get_output_embeddings().weight
            result = grpo_loss(hidden, head, answers, advantages, config, mask=mask, old_logprobs=old)
            old = result.logprobs if old is None else old  # the ratio of later passes is to these
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        tokens = result.metrics["measured_tokens"]
        means = {name: (result.metrics[f"{name}_sum"] / tokens).item() for name in ("entropy", "ratio", "clip_region")}
        print(f"step {step + 1}: reward {rewards.mean():.3f}", {name: round(x, 4) for name, x in means.items()})


if __name__ == "__main__":
    main(*sys.argv[1:2])
