"""Problems with a chosen entropy profile: the published one of RL on language models, flat logits, a real model's."""

import torch

from bench import real
from fastgrpo import reference

PROFILES = ("rl", "flat", *real.TEMPERATURES)
CHUNK = 256  # rows whose logits are held at once
FAVOURED_BELOW, BASE = 0.7, 2.0  # rows under 0.7 nats: a 2-nat distribution and one favourite on top of it


def rl_entropies(n, generator):
    """(n,) target entropies in nats: half under 0.01, 80 % under 0.7, then an exponential tail to 5."""
    draw = {"generator": generator, "device": generator.device}
    u = torch.rand(n, **draw)
    low = 10 ** (-5 + 3 * torch.rand(n, **draw))
    middle = 10 ** (-2 + 1.845 * torch.rand(n, **draw))
    tail = 0.7 - 0.8 * torch.rand(n, **draw).clamp(min=1e-6).log()
    return torch.where(u < 0.5, low, torch.where(u < 0.8, middle, tail)).clamp(max=5.0)


def raise_floor(z):
    """Logits without the far tail, which adds nothing in fp32 but makes a CPU's exp up to 30 times slower."""
    return z.clamp(min=z.amax(-1, keepdim=True) - 80)


def entropy(z):
    """(..., V) logits -> nats"""
    logp = raise_floor(z).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def refine(scale, raw, wanted, steps=5):
    """Newton on log entropy over log scale, row by row: the rows' own entropies become the wanted ones."""
    for _ in range(steps):
        z = raise_floor(raw * scale[:, None])
        logp = z.log_softmax(1)
        p = logp.exp()
        now = -(p * logp).sum(1).clamp(max=-1e-9)
        variance = (p * (z - (p * z).sum(1, keepdim=True)).square()).sum(1)
        step = (wanted.log() - now.log()) / (-variance / now).clamp(max=-1e-3)
        scale = scale * step.clamp(-0.5, 0.5).exp()
    return scale


def favourite_gap(wanted, rest):
    """Logit difference of one token over all others (log-sum-exp, entropy ``rest``) that makes the row's entropy
    ``wanted``: h(p) + (1 - p) rest with p = sigmoid(gap), falling in the gap; by bisection."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 40.0)
    for _ in range(50):
        gap = (low + high) / 2
        p, q = torch.sigmoid(gap), torch.sigmoid(-gap)
        now = p * torch.nn.functional.softplus(-gap) + q * (torch.nn.functional.softplus(gap) + rest)
        low, high = torch.where(now > wanted, gap, low), torch.where(now > wanted, high, gap)
    return (low + high) / 2


def with_favourites(hidden, weight, wanted, generator):
    """Lift one likely token of each peaked row until the row's entropy is the wanted one."""
    favourite = torch.multinomial(raise_floor(hidden @ weight.T).softmax(1), 1, generator=generator)
    direction = weight[favourite[:, 0]]
    for _ in range(3):  # the lift moves the other logits a little
        z = hidden @ weight.T
        others = z.scatter(1, favourite, -1e30)
        gap = z.gather(1, favourite)[:, 0] - raise_floor(others).logsumexp(1)
        lift = favourite_gap(wanted, entropy(others)) - gap
        lift = torch.where(wanted < FAVOURED_BELOW, lift, 0.0) / direction.square().sum(1)
        hidden = hidden + lift[:, None] * direction
    return hidden


def shape_rows(hidden, weight, wanted, generator):
    """(n, 1) factors and (n, D) offsets that give the rows' logits the wanted entropies (n,)."""
    raw = hidden @ weight.T
    base = torch.where(wanted < FAVOURED_BELOW, BASE, wanted)
    scale = refine(3.0 / raw.std(1), raw, base)[:, None]
    return scale, with_favourites(hidden * scale, weight, wanted, generator) - hidden * scale


def sample(hidden, weight, generator, softcap=None):
    """(n, D), (V, D) -> targets drawn from the model (n,) and their log-probs (n,), a chunk of rows at a time."""
    targets = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    logp = torch.empty(len(hidden), device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK):
        z = raise_floor(reference.logits(hidden[rows], weight, softcap=softcap)).log_softmax(1)
        targets[rows] = torch.multinomial(z.exp(), 1, generator=generator)[:, 0]
        logp[rows] = z.gather(1, targets[rows, None])[:, 0]
    return targets, logp


def drift_logprobs(logp, generator, drift):
    """Log-probs of a policy near this one: each off by a normal share ``drift`` of itself."""
    noise = torch.randn(len(logp), generator=generator, device=logp.device)
    return (logp * (1 + drift * noise)).clamp(max=0.0)


def problem(
    n, vocab, depth, profile="rl", dtype=torch.float32, device="cpu", seed=0, drift=0.05, shared=0.4, softcap=None
):
    """hidden (n, D), weight (V, D), targets sampled from the model, old_logprobs near the model's, upstream (n,).

    As in trained models the rows of the weight have a mean, and hidden states have a common direction: ``shared`` is
    its part of the logits' variance, so that frequent tokens are frequent everywhere. shared=0: every row has likely
    entries of its own, the worst case for entries kept per block. profile "rl" or "flat" (unit-variance logits).
    The profile is that of the logits before ``softcap``, which flattens it a little. "real", "real-0.6": see
    :mod:`bench.real`; the sizes must be its model's, and ``advantages`` (8,) come with them.
    """
    if profile in real.TEMPERATURES:
        return real_problem(n, profile, dtype, device, seed, drift)
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=device)

    weight = normal(vocab, depth) / depth**0.5
    weight += 0.3 * normal(1, depth) / depth**0.5
    hidden = shared**0.5 * normal(1, depth) + (1 - shared) ** 0.5 * normal(n, depth)
    wanted = rl_entropies(n, g)
    if profile != "flat":
        for rows in torch.arange(n, device=device).split(CHUNK):
            scale, offset = shape_rows(hidden[rows], weight, wanted[rows], g)
            hidden[rows] = hidden[rows] * scale + offset
    targets, logp = sample(hidden, weight, g, softcap)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": targets,
        "old_logprobs": drift_logprobs(logp, g, drift),
        "upstream": normal(n) / n,
    }


def real_problem(n, profile, dtype, device, seed, drift):
    """The same of a real model's answers, log-probs drifted alike."""
    p, g = real.problem(profile, n, device, seed), torch.Generator(device).manual_seed(seed)
    return {
        "hidden": p["hidden"].to(dtype),
        "weight": p["weight"].to(dtype),
        "targets": p["targets"],
        "old_logprobs": drift_logprobs(p["logprobs"], g, drift),
        "advantages": p["advantages"],
        "upstream": torch.randn(n, generator=g, device=device) / n,
    }
