"""Synthetic problems with a chosen entropy profile: the published one of RL on language models, or flat logits."""

import torch


def rl_entropies(n, generator):
    """(n,) target entropies in nats: half under 0.01, 80 % under 0.7, then an exponential tail to 5."""
    u = torch.rand(n, generator=generator)
    low = 10 ** torch.empty(n).uniform_(-5, -2, generator=generator)
    middle = 10 ** torch.empty(n).uniform_(-2, -0.155, generator=generator)
    tail = 0.7 + 0.8 * torch.empty(n).exponential_(generator=generator)
    return torch.where(u < 0.5, low, torch.where(u < 0.8, middle, tail)).clamp(max=5.0)


def refine(scale, raw, wanted, steps=4):
    """Newton on log entropy over log scale, row by row: the rows' own entropies become the wanted ones."""
    for _ in range(steps):
        z = raw * scale[:, None]
        logp = z.log_softmax(1)
        p = logp.exp()
        now = -(p * logp).sum(1).clamp(max=-1e-9)
        variance = (p * (z - (p * z).sum(1, keepdim=True)).square()).sum(1)
        step = (wanted.log() - now.log()) / (-variance / now).clamp(max=-1e-3)
        scale = scale * step.clamp(-0.5, 0.5).exp()
    return scale


def scales_for(entropies, vocab, generator):
    """Logit scales whose typical (geometric mean) entropy is the wanted one, read off a table for this vocabulary."""
    sample = torch.randn(64, vocab, generator=generator)
    grid = torch.logspace(-0.3, 2.0, 60)
    table = torch.stack([entropy(s * sample).clamp(min=1e-9).log().mean() for s in grid])
    order = table.argsort()
    x, y = table[order], grid.log()[order]
    at = torch.searchsorted(x, entropies.log()).clamp(1, len(x) - 1)
    weight = ((entropies.log() - x[at - 1]) / (x[at] - x[at - 1])).clamp(0, 1)
    return torch.lerp(y[at - 1], y[at], weight).exp()


def entropy(z):
    """(..., V) logits -> nats"""
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def problem(n, vocab, depth, profile="rl", dtype=torch.float32, device="cpu", seed=0, drift=0.05):
    """hidden (n, D), weight (V, D), targets sampled from the model, old_logprobs near the model's, advantages (n,).

    The weight has the anisotropy of trained heads: a common direction that every row of it shares.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, depth, generator=g) / depth**0.5
    weight += 0.3 * torch.randn(1, depth, generator=g) / depth**0.5
    hidden = torch.randn(n, depth, generator=g)
    wanted = rl_entropies(n, g)
    scale = torch.ones(n) if profile == "flat" else scales_for(wanted, vocab, g)
    targets = torch.empty(n, dtype=torch.int64)
    logp = torch.empty(n)
    for rows in torch.arange(n).split(256):
        raw = hidden[rows] @ weight.T
        if profile != "flat":
            scale[rows] = refine(scale[rows], raw, wanted[rows])
        hidden[rows] *= scale[rows, None]
        z = (raw * scale[rows, None]).log_softmax(1)
        targets[rows] = torch.multinomial(z.exp(), 1, generator=g)[:, 0]
        logp[rows] = z.gather(1, targets[rows, None])[:, 0]
    old = (logp * (1 + drift * torch.randn(n, generator=g))).clamp(max=0.0)
    upstream = torch.randn(n, generator=g) / n
    move = {"hidden": hidden.to(device, dtype), "weight": weight.to(device, dtype)}
    return {**move, "targets": targets.to(device), "old_logprobs": old.to(device), "upstream": upstream.to(device)}
