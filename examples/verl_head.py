"""verl's function of log-probs and entropy, for any width and with a temperature a sample. python examples/verl_head.py

verl itself takes it with VERL_USE_EXTERNAL_MODULES=fastgrpo.integrations.verl_patch in the environment.
"""

import torch

from fastgrpo.integrations.verl import linear_cross_entropy


def main():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 32, 96, generator=generator).requires_grad_()  # (B, T, D)
    weight = (0.2 * torch.randn(1000, 96, generator=generator)).requires_grad_()  # (V, D), or a rank's rows of it
    labels = torch.randint(0, 1000, (4, 32), generator=generator)
    temperature = torch.tensor([0.6, 0.8, 1.0, 1.2])  # a number, one a sample or one a token
    log_probs, entropy = linear_cross_entropy(hidden, weight, labels, temperature, "none")  # then the group, if any
    (-log_probs.mean() - 0.01 * entropy.mean()).backward()
    print(f"log-prob {log_probs.mean().item():.3f}, gradient {hidden.grad.norm().item():.4f}")
    for t, nats in zip(temperature.tolist(), entropy.mean(1).tolist()):
        print(f"temperature {t:.1f}: entropy {nats:.3f} nats")


if __name__ == "__main__":
    main()
