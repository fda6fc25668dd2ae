"""In the place of Liger's loss class, as TRL <= 1.12, ms-swift and axolotl make it. python examples/liger_slot.py"""

import torch

from fastgrpo import linear_logprobs
from fastgrpo.integrations.liger import apply


def main():
    with apply():  # or apply() alone, before the trainer is imported
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        grpo = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="luspo", softcap=30.0, log_entropy=True)
    print(f"the class is {type(grpo).__module__}.{type(grpo).__name__}")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 32, 64, generator=generator).requires_grad_()  # (B, T, D)
    head = (0.1 * torch.randn(1000, 64, generator=generator)).requires_grad_()  # (V, D)
    tokens = torch.randint(0, 1000, (4, 32), generator=generator)
    mask = torch.ones(4, 32, dtype=torch.long)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    now = linear_logprobs(hidden, head, tokens, softcap=30.0).logprobs.detach()
    old = now + 0.2 * torch.randn(4, 32, generator=generator)  # of an older policy
    loss, (clip_fraction,) = grpo(hidden, head, tokens, mask, advantages=advantages, old_per_token_logps=old)
    loss.backward()
    print(f"loss {loss.item():.4f}, clipped {clip_fraction.item():.3f}, gradient {head.grad.norm().item():.3f}")
    print(f"beyond Liger's: entropy {grpo.last.entropy.mean().item():.3f} nats a token")


if __name__ == "__main__":
    main()
