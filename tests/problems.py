"""Inputs for the tests: ragged shapes, planted large logits, masked rows."""

import functools

import torch

OLDEST_TORCH = torch.__version__.startswith("2.8.")  # that is supported


def head(n, vocab, depth, dtype=torch.float64, device="cpu", seed=0, bias=False, peak=0.0):
    """hidden (n, D), weight (V, D), targets (n,), bias; ``peak``: how many nats each label stands out."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, depth, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, depth, generator=g, dtype=torch.float64) / depth**0.5
    targets = torch.randint(0, vocab, (n,), generator=g)
    if n and peak:
        hidden += peak * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    b = torch.randn(vocab, generator=g, dtype=torch.float64) if bias else None
    return [None if x is None else x.to(device, dtype if x.is_floating_point() else x.dtype) for x in
            (hidden, weight, targets, b)]  # fmt: skip


@functools.lru_cache(maxsize=32)
def drawn_once(*sizes, **options):
    from bench import profiles  # which the ranks' jobs do not find

    return profiles.problem(*sizes, **options)


def drawn(*sizes, **options):
    """As :func:`bench.profiles.problem`, which looks for the rows' entropies anew each time."""
    return {name: x.clone() for name, x in drawn_once(*sizes, **options).items()}


def near_certain(device):
    """hidden (6, D), weight (V, D), targets (6,): 1 - p of the labels from 1e-2 down to 1e-24."""
    vocab, depth, gaps = 300, 24, torch.tensor([10.0, 15.0, 20.0, 25.0, 30.0, 60.0])
    targets = torch.arange(6) * 50
    weight, hidden = torch.randn(vocab, depth) / 4, torch.randn(6, depth)
    weight[:, :6], hidden[:, :6] = 0.0, torch.diag(gaps)  # an axis of its own for each label
    weight[targets, range(6)] = 1.0
    return hidden.to(device), weight.to(device), targets.to(device)


def batch(
    batch_size=4, length=7, vocab=53, depth=16, dtype=torch.float64, device="cpu", seed=0, token_advantages=False
):
    """Keyword arguments of grpo_loss with everything optional given: padded, ragged, one empty sequence."""
    g = torch.Generator().manual_seed(seed + 1)
    n = batch_size * length
    hidden, weight, targets, bias = head(n, vocab, depth, seed=seed, bias=True)

    def noise(scale):
        return scale * torch.randn(n, generator=g, dtype=torch.float64)

    logp = (hidden @ weight.T + bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    lengths = torch.randint(1, length + 1, (batch_size,), generator=g)
    lengths[1] = 0
    mask = (torch.arange(length) < lengths[:, None]).long()
    mask[0, 0] = 0  # a tool token
    shape = (batch_size, length) if token_advantages else (batch_size,)
    advantages = torch.randn(shape, generator=g, dtype=torch.float64)
    advantages[-1] = 0.0
    values = {
        "hidden": hidden.view(batch_size, length, depth),
        "weight": weight,
        "targets": targets.view(batch_size, length),
        "advantages": advantages,
        "mask": mask,
        "old_logprobs": (logp + noise(0.4)).view(batch_size, length),
        "ref_logprobs": (logp + noise(0.3)).view(batch_size, length),
        "sampling_logprobs": (logp + noise(0.4)).view(batch_size, length),
        "importance_weights": torch.rand(batch_size, length, generator=g, dtype=torch.float64) + 0.5,
        "num_items": 17,
        "bias": bias,
    }
    return {k: cast(v, dtype, device) for k, v in values.items()}


def cast(value, dtype, device="cpu"):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def pack(arguments):
    """The same batch without its padding: flat (N, ...) tensors and cu_seqlens (also of the tail after each mask)."""
    mask = arguments["mask"]
    lengths = [int(m.nonzero().max()) + 1 if m.any() else 0 for m in mask]
    keep = torch.arange(mask.shape[1], device=mask.device) < torch.tensor(lengths, device=mask.device)[:, None]
    flat = {
        k: v[keep] if isinstance(v, torch.Tensor) and v.shape[:2] == mask.shape else v for k, v in arguments.items()
    }
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(mask.device, torch.int32)
    return {**flat, "cu_seqlens": offsets}


def relative_error(x, truth):
    return float((x.double().cpu() - truth.double().cpu()).norm() / truth.double().cpu().norm().clamp(min=1e-300))


def with_grad(arguments, names=("hidden", "weight", "bias")):
    """Fresh leaves for the named tensors."""
    return {k: v.detach().clone().requires_grad_() if k in names and v is not None else v
            for k, v in arguments.items()}  # fmt: skip


def gradcheck(fast, truth, inputs, dtype, **tolerances):
    """torch's gradcheck of ``fast``'s gradients, computed in ``dtype``, against differences of ``truth`` in fp64.

    Both take the inputs and return a tuple of tensors. So a backend without fp64 is held to numerical derivatives too.
    """

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            with torch.no_grad():
                return truth(*tensors)

        @staticmethod
        def backward(ctx, *upstream):
            leaf = [x.detach().to(dtype).requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                outputs = fast(*leaf)
            grads = torch.autograd.grad(outputs, leaf, [g.to(x.dtype) for g, x in zip(upstream, outputs)])
            return tuple(g.double() for g in grads)

    leaves = [x.detach().double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(Checked.apply, leaves, **tolerances)
