"""Every variant of the op and of the objective against float64 over full logits."""

import itertools

import torch

from bench.contact.device import attempt, draw, largest, relative


def correct_cases():
    """-> name, dtype, shape (n, vocab, depth), keywords of :func:`compare`."""
    shapes = [(300, 5000, 256), (1, 1000, 128), (257, 4999, 250), (64, 5008, 272)]
    options = [
        {},
        {"frozen": True},
        {"bias": True, "softcap": 30.0, "temperatures": True},
        {"entropy": True},
        {"lora": True},
        {"lora": True, "bias": True, "softcap": 30.0, "entropy": True, "temperatures": True},
        {"backward": "certified"},
        {"backward": "certified", "hint": True},
        {"backward": "certified", "hint": True, "bias": True, "softcap": 30.0, "lora": True},
        {"workspace_mb": 1},
        {"support": True},
    ]
    for dtype, option in itertools.product((torch.bfloat16, torch.float16, torch.float32), options):
        yield dtype, shapes[0], option
    for shape in shapes[1:]:
        yield torch.bfloat16, shape, {}
        yield torch.bfloat16, shape, {"backward": "certified", "hint": True}


def correct(contact, shard=0, shards=1):
    """Every variant of the op, then of the objective, against float64 over full logits on the same inputs."""
    cases = list(correct_cases())[:: 1 if contact.cuda else 16]
    for dtype, shape, options in cases[shard::shards]:
        shape = shape if contact.cuda else (8, 300, 64)
        yield {"dtype": str(dtype), "shape": shape, **options, **attempt(compare, contact, dtype, shape, **options)}
    for settings in list(objectives())[shard::shards] if contact.cuda else [{"beta": 0.04}]:
        yield {"objective": settings, **attempt(compare_loss, contact, settings)}


def objectives():
    from fastgrpo.config import CLIPPED, DIVERGENCE_MASKS, IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, LOSS_TYPES

    for loss_type, level in itertools.product(LOSS_TYPES, IMPORTANCE_SAMPLING_LEVELS):
        yield {"loss_type": loss_type, "importance_sampling_level": level}
    for estimator, corrected in itertools.product(KL_ESTIMATORS, (True, False)):
        yield {"beta": 0.1, "kl_estimator": estimator, "use_bias_correction_kl": corrected}
    yield {"beta": 0.1, "kl_estimator": "full"}
    for loss_type, mask in itertools.product((CLIPPED[0], "cispo"), DIVERGENCE_MASKS):
        yield {"loss_type": loss_type, "divergence_mask": mask}
    yield {"entropy_coef": 0.01, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.1}


def compare(
    contact,
    dtype,
    shape,
    frozen=False,
    bias=False,
    temperatures=False,
    lora=False,
    hint=False,
    entropy=False,
    support=False,
    **keywords,
):
    """-> errors of the op, and whether each is within its limit."""
    from fastgrpo import linear_logprobs, reference

    n, vocab, depth = shape
    hidden, weight, targets = contact.head(n, depth, dtype, vocab)
    targets[5::7] = -100
    g = torch.Generator(contact.device).manual_seed(1)
    random = draw(dtype, g)
    leaves = {"hidden": hidden, "weight": weight, "bias": random(vocab) if bias else None}
    if lora:
        leaves |= {"A": random(8, depth, dtype=torch.float32), "B": 0.1 * random(vocab, 8, dtype=torch.float32)}
    options = {"softcap": keywords.pop("softcap", None), "return_entropy": entropy}
    if temperatures:
        options["temperature"] = 0.5 + torch.rand(n, generator=g, device=contact.device)
    if support:
        ids = (targets.clamp(min=0)[:, None] + torch.arange(8, device=contact.device) * 17) % vocab
        options["support"] = (ids.flatten(), 8 * torch.arange(n + 1, device=contact.device))
    upstream = random(n, dtype=torch.float32)

    def run(function, dtype=None, **extra):
        mine = {
            k: x.to(dtype or x.dtype, copy=True).requires_grad_(not (frozen and k in ("weight", "bias")))
            for k, x in leaves.items()
            if x is not None
        }
        pair = (mine["A"], mine["B"], 2.0) if lora else None
        out = function(mine["hidden"], mine["weight"], targets, mine.get("bias"), lora=pair, **options, **extra)
        total = (out.logprobs * upstream).sum() + (out.entropy.sum() if entropy else 0.0)
        total.backward()
        return out, {k: x.grad for k, x in mine.items() if x.requires_grad}

    truth, wanted = run(reference.linear_logprobs, torch.float64)
    if hint:
        keywords["old_logprobs"] = truth.logprobs.detach().float()
    out, grads = run(linear_logprobs, backend="triton", **({"backward": "exact"} | keywords))
    errors = {"logprobs": largest(out.logprobs, truth.logprobs)}
    if entropy:
        errors["entropy"] = largest(out.entropy, truth.entropy)
    errors |= {k: relative(grads[k], wanted[k]) for k in grads}
    near = {"logprobs": 2e-5, "entropy": 1e-4}
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    if keywords.get("backward") == "certified":
        limit = max(limit, 2e-3)
    return {"errors": errors, "ok": all(errors[k] <= near.get(k, limit) for k in errors)}


def compare_loss(contact, settings, batch=4, length=48, vocab=2000, depth=64):
    from fastgrpo import GRPOLossConfig, grpo_loss, linear_logprobs, reference

    hidden, weight, targets = contact.head(batch * length, depth, torch.float32, vocab)
    shape = (batch, length)
    g = torch.Generator(contact.device).manual_seed(2)
    logp = linear_logprobs(hidden, weight, targets, backend="torch").logprobs.view(shape)
    noise = [0.2 * torch.randn(shape, generator=g, device=contact.device) for _ in range(3)]
    old, ref, sampling = ((logp + x).clamp(max=0.0) for x in noise)
    arguments = {
        "advantages": torch.randn(batch, generator=g, device=contact.device),
        "old_logprobs": old,
        "ref_logprobs": ref,
        "sampling_logprobs": sampling,
        "mask": torch.arange(length, device=contact.device) < torch.tensor([[48], [1], [30], [7]]).to(contact.device),
        "importance_weights": 0.5 + torch.rand(shape, generator=g, device=contact.device),
    }
    config = GRPOLossConfig(**settings)
    if config.kl_estimator == "full":
        arguments |= {"ref_hidden": 0.9 * hidden.view(*shape, depth), "ref_weight": weight}

    def run(function, dtype, **extra):
        h, w = (x.to(dtype).clone().requires_grad_() for x in (hidden.view(*shape, depth), weight))
        cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in arguments.items()}
        loss = function(h, w, targets.view(shape), config=config, **cast, **extra).loss
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    truth = run(reference.grpo_loss, torch.float64)
    ours = run(grpo_loss, torch.float32, backend="triton", backward="exact")
    errors = {"loss": largest(ours[0], truth[0])}
    errors |= {k: relative(a, b) for k, a, b in zip(("hidden", "weight"), ours[1:], truth[1:])}
    return {"errors": errors, "ok": max(errors.values()) < 2e-4}


def large(contact):
    """N V beyond 2^31, against float64 on some rows."""
    from fastgrpo import linear_logprobs

    n, depth = contact.sizes.large, contact.sizes.widths[0]
    hidden, weight, targets = contact.head(n, depth)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(h, w, targets, backend="triton", backward="exact").logprobs
    out.sum().backward()
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device=contact.device)
    with torch.no_grad():
        logp = (hidden[rows].double() @ weight.double().T).log_softmax(1)
        slope = torch.nn.functional.one_hot(targets[rows], weight.shape[0]) - logp.exp()
        want = slope @ weight.double()
        errors = {
            "logprobs": largest(out[rows], logp.gather(1, targets[rows, None])[:, 0]),
            "hidden": relative(h.grad[rows], want),
        }
    yield {
        "N": n,
        "NV": n * weight.shape[0],
        "errors": errors,
        "ok": errors["logprobs"] < 2e-5 and errors["hidden"] < 1e-2 and bool(w.grad.isfinite().all()),
    }
