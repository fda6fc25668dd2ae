"""On-policy distillation: the student answers, the teacher says how each next token should have been distributed.

python examples/distill.py [STUDENT TEACHER], two models of one tokenizer; their widths may differ.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo import linear_divergence
from fastgrpo.trainer.examples import load_rows

from supervised_start import PLAIN, taught

BATCH = 64  # prompts a step


def load(student, teacher):
    if student is None:  # two small models that sort digits, made here; the student knows less
        (model, tokenizer), (better, _) = taught(seed=1, steps=30), taught(steps=80)
        return model, better, tokenizer
    if teacher is None:
        sys.exit(__doc__)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    return *models, AutoTokenizer.from_pretrained(student)


def main(student=None, teacher=None, steps=40, beta=1.0):
    model, better, tokenizer = load(student, teacher)
    better.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if student else 3e-4)
    end = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    prompts = [row["prompt"] for row in load_rows("tiny:sort")]  # "3142=", all of one length
    for step in range(steps):
        batch = tokenizer(prompts[step * BATCH : (step + 1) * BATCH], return_tensors="pt").to(model.device)
        start = batch.input_ids.shape[1]
        with torch.no_grad():
            ids = model.eval().generate(**batch, **PLAIN, max_new_tokens=6)
            right = better.get_decoder()(ids).last_hidden_state[:, start - 1 : -1]  # (B, T, D_t)
        answers = ids[:, start:]
        ends = torch.isin(answers, end)
        mask = (ends.cumsum(1) - ends.long() == 0).long()  # up to the first end token, itself included
        hidden = model.train().get_decoder()(ids).last_hidden_state[:, start - 1 : -1]  # (B, T, D)
        heads = model.get_output_embeddings().weight, better.get_output_embeddings().weight
        out = linear_divergence(hidden, heads[0], right, heads[1], mask, beta=beta)  # 1: KL(student || teacher)
        loss = out.divergence.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step + 1}: {loss.item():.4f} nats a token")


if __name__ == "__main__":
    main(*sys.argv[1:3])
