"""Whole distributions: divergences from a teacher and top-k targets, against float64, timed, and without waiting."""

import itertools

import torch

from bench.contact.device import attempt, bare, draw, largest, padded, relative
from bench.contact.whole import measure

BETAS = {0.0: "forward KL", 1.0: "reverse KL", 0.5: "JSD"}


def distribution_cases():
    """-> function, dtype, its keywords"""
    options = [
        {},
        {"frozen": True},
        {"bias": True, "softcap": 30.0, "lora": True, "temperatures": True},
        {"backward": "certified"},
        {"backward": "certified", "frozen": True},
    ]
    for dtype, beta, option in itertools.product((torch.bfloat16, torch.float32), BETAS, options):
        yield compare_divergence, dtype, {"beta": beta, **option}
        if beta == 0.5 and "backward" not in option:  # logits that are not held; several panels of those that are
            for workspace in (4, 12):
                yield compare_divergence, dtype, {"beta": beta, "workspace_mb": workspace, **option}
    for dtype, k, softcap in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1, 16), (None, 30.0)):
        yield compare_topk, dtype, {"k": k, "softcap": softcap}


def distributions(contact, shard=0, shards=1):
    """Every variant against float64 over full logits on the same inputs."""
    cases = list(distribution_cases())[:: 1 if contact.cuda else 11]
    for compare, dtype, options in cases[shard::shards]:
        shape = (300, 5000, 256) if contact.cuda else (8, 300, 64)
        row = {"what": compare.__name__, "dtype": str(dtype), **options}
        yield {**row, **attempt(compare, contact, dtype, shape, **options)}


def compare_divergence(
    contact,
    dtype,
    shape,
    beta,
    frozen=False,
    bias=False,
    lora=False,
    temperatures=False,
    softcap=None,
    entropy=True,
    wider=32,
    apart=False,
    **keywords,
):
    """-> errors of a divergence from a teacher that is so much wider, and whether each is within its limit.

    apart: heads whose rows descriptors cannot read.
    """
    from fastgrpo import linear_divergence, reference

    n, vocab, depth = shape
    hidden, weight, targets = contact.head(n, depth, dtype, vocab)
    random = draw(dtype, torch.Generator(contact.device).manual_seed(3))
    teacher = random(n, depth + wider), random(vocab, depth + wider) / depth**0.5
    teacher[0][::2] += 9 * teacher[1][targets[::2]]
    leaves = {"hidden": hidden, "weight": weight, "bias": random(vocab) if bias else None}
    if lora:
        leaves |= {"A": random(8, depth, dtype=torch.float32), "B": 0.1 * random(vocab, 8, dtype=torch.float32)}
    mask = torch.arange(n, device=contact.device) % 7 != 5
    options = {"beta": beta, "softcap": softcap}
    if temperatures:
        options["temperature"] = 1.0 + torch.arange(n, device=contact.device) / n
    upstream = random(n, dtype=torch.float32)

    def run(function, dtype=None, **extra):
        mine = {
            k: x.to(dtype or x.dtype, copy=True).requires_grad_(not (frozen and k in ("weight", "bias")))
            for k, x in leaves.items()
            if x is not None
        }
        theirs = [x.to(dtype or x.dtype) for x in teacher]
        pair = (mine["A"], mine["B"], 2.0) if lora else None
        own, other = (padded(x) if apart else x for x in (mine["weight"], theirs[1]))
        heads = mine["hidden"], own, theirs[0], other, mask
        out = function(*heads, bias=mine.get("bias"), lora=pair, return_entropy=entropy, **options, **extra)
        (out.divergence * upstream).sum().backward()
        return out, {k: x.grad for k, x in mine.items() if x.requires_grad}

    truth, wanted = run(reference.linear_divergence, torch.float64)
    out, grads = run(linear_divergence, backend="triton", **({"backward": "exact"} | keywords))
    told = ("divergence", "entropy") if entropy else ("divergence",)
    errors = {k: largest(getattr(out, k), getattr(truth, k)) for k in told}
    errors |= {k: relative(grads[k], wanted[k]) for k in grads}
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    limit = limit if keywords.get("backward", "exact") == "exact" else max(limit, 2e-3)
    return {
        "errors": errors,
        "ok": all(errors[k] <= (1e-4 if k in told else limit) for k in errors),
    }


def compare_topk(contact, dtype, shape, k, softcap):
    """-> errors of the log-probs of k targets a token and of the rest's, and of their gradients."""
    from fastgrpo import linear_logprobs

    n, vocab, depth = shape
    hidden, weight, targets = contact.head(n, depth, dtype, vocab)
    random = draw(dtype, torch.Generator(contact.device).manual_seed(3))
    ids = (targets[:, None] + torch.arange(k, device=contact.device) * 17) % vocab
    up, up_rest = random(n, k, dtype=torch.float32), random(n, dtype=torch.float32)

    def plain(h, w):
        z = h @ w.T
        logp = (softcap * torch.tanh(z / softcap) if softcap else z).log_softmax(1)
        others = logp.masked_fill(torch.zeros_like(logp, dtype=torch.bool).scatter_(1, ids, True), -torch.inf)
        return logp.gather(1, ids), others.logsumexp(1)

    def ours(h, w):
        out = linear_logprobs(h, w, ids, softcap=softcap, backend="triton", backward="exact")
        return out.logprobs, out.rest

    def run(function, dtype):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        logp, rest = function(h, w)
        return logp, rest, *torch.autograd.grad((logp * up).sum() + (rest * up_rest).sum(), (h, w))

    truth, got = run(plain, torch.float64), run(ours, dtype)
    errors = {name: largest(a, b) for name, a, b in zip(("logprobs", "rest"), got, truth)}
    errors |= {name: relative(a, b) for name, a, b in zip(("hidden", "weight"), got[2:], truth[2:])}
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    near = {"logprobs": 3e-5, "rest": 3e-5}
    return {"errors": errors, "ok": all(errors[k] <= near.get(k, limit) for k in errors)}


def divergence(contact):
    """A divergence at real size: time beside the bare product of one model, peak memory, waits, a CUDA graph."""
    from fastgrpo import linear_divergence

    depth, n = contact.sizes.widths[len(contact.sizes.widths) // 2], contact.sizes.tokens
    product = bare(contact, depth)["ms"]
    hidden, weight, _ = contact.head(n, depth)
    teacher = [x.detach() for x in contact.head(n, depth, seed=1)[:2]]
    cases = [(beta, frozen, 128) for beta, frozen in itertools.product(BETAS, (False, True))]
    cases += [(0.5, frozen, workspace) for frozen in (False, True) for workspace in (256, 1024)]
    for beta, frozen, workspace in cases[:: 1 if contact.cuda else 5]:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        leaves = (h,) if frozen else (h, w)

        def forward(h=h, w=w, beta=beta, workspace=workspace):
            return linear_divergence(h, w, *teacher, beta=beta, backend="triton", workspace_mb=workspace).divergence

        def both(forward=forward, leaves=leaves):
            return torch.autograd.grad(forward().sum(), leaves)

        row = {"what": BETAS[beta], "D": depth, "N": n, "frozen": frozen, "workspace_mb": workspace,
               "bare_ms": product}  # fmt: skip
        yield row | measure(contact, forward, both, h, w, frozen, product, workspace)
