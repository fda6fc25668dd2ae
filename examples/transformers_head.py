"""Log-probs and the loss inside a model's own LM head: nothing else of the model changes.

python examples/transformers_head.py [MODEL]
"""

import sys
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from fastgrpo import GRPOLossConfig, grpo_loss
from fastgrpo.integrations.transformers import fuse_lm_head

from supervised_start import taught


def main(path=None):
    model = AutoModelForCausalLM.from_pretrained(path) if path else taught(steps=1)[0]
    model = fuse_lm_head(model)  # the one line; LoRA, DDP, FSDP2 and torch.compile may come after it
    ids = torch.randint(3, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))

    scores = model(input_ids=ids, labels=ids, fastgrpo=True)  # log-probs and entropies, (B, T - 1); no logits
    logits = model(input_ids=ids).logits.float()  # without the keyword it is the model it was
    usual = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    print(f"largest difference from the logits' own log-probs: {(scores.logprobs - usual).abs().max().item():.1e}")
    print(f"entropy {scores.entropy.mean().item():.3f} nats a token")

    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    loss = partial(grpo_loss, targets=targets, advantages=advantages, config=GRPOLossConfig(loss_type="dr_grpo"))
    result = model(input_ids=ids, fastgrpo=loss)  # any function of hidden, weight and the head's options
    result.loss.backward()
    print(f"gradient of the head {model.get_output_embeddings().weight.grad.norm().item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
