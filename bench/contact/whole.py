"""The device without us, and the op as a whole: time, memory, waits of the host, a CUDA graph."""

import itertools
import subprocess
from collections import Counter

import torch

from bench.contact.device import bare, failure


def versions(contact):
    import triton

    row = {"triton": triton.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    if contact.cuda:
        p = torch.cuda.get_device_properties(0)
        row |= {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "processors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1),
        }
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit",
            "--format=csv,noheader",
        ]
        row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    yield row


def ceilings(contact):
    """What the device does without us: a square GEMM, a copy, the bare product of hidden and head."""
    n = contact.sizes.square
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=contact.device).to(dtype) for _ in range(2))
        ms, best = contact.milliseconds(lambda a=a, b=b: a @ b)
        yield {"what": f"{n}^3 GEMM", "dtype": str(dtype), "ms": ms, "tflops": round(2e-9 * n**3 / best, 1)}
    source = torch.empty(64 * n * n // 16, dtype=torch.uint8, device=contact.device)
    target = torch.empty_like(source)
    ms, best = contact.milliseconds(lambda: target.copy_(source))
    yield {"what": "copy", "ms": ms, "gb_per_s": round(2e-6 * source.numel() / best, 1)}
    for depth in contact.sizes.widths:
        yield {"what": "bare hidden @ weight.T", "D": depth, "N": contact.sizes.tokens, **bare(contact, depth)}


def exact(contact):
    """The exact op at real size: time beside the bare product, peak memory, waits of the host, a CUDA graph."""
    from fastgrpo import linear_logprobs

    for depth, frozen in itertools.product(contact.sizes.widths, (False, True)):
        n, product = contact.sizes.tokens, bare(contact, depth)["ms"]
        hidden, weight, targets = contact.head(n, depth)
        h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
        leaves = (h,) if frozen else (h, w)

        def forward(h=h, w=w, targets=targets):
            return linear_logprobs(h, w, targets, backend="triton", backward="exact").logprobs

        def both(forward=forward, leaves=leaves):
            return torch.autograd.grad(forward().sum(), leaves)

        row = {"D": depth, "N": n, "frozen": frozen, "bare_ms": product}
        yield row | measure(contact, forward, both, h, w, frozen, product)


def measure(contact, forward, both, h, w, frozen, product, workspace_mb=128):
    """Times beside the bare product's milliseconds, whether results repeat, and what only a GPU can show."""
    first = both()
    row = {"forward_ms": contact.milliseconds(forward)[0], "both_ms": contact.milliseconds(both)[0]}
    row["passes"] = round(row["both_ms"] / product, 3)
    row["deterministic"] = all(torch.equal(a, b) for a, b in zip(first, both()))
    return row | (cuda_checks(both, h, w, frozen, first, workspace_mb) if contact.cuda else {})


def cuda_checks(both, h, w, frozen, first, workspace_mb):
    n, depth = h.shape
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before - 2 * h.numel() - (0 if frozen else 2 * w.numel())
    bound = workspace_mb * 2**20 + 4 * n * depth + 64 * n + n * w.shape[0] / 128
    row = {"peak_mib": round(peak / 2**20, 1), "bound_mib": round(bound / 2**20, 1)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
        row["host_waits"] = 0
    except RuntimeError as error:
        row["host_waits"] = str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        graph.replay()
        torch.cuda.synchronize()
        row["graph"] = all(torch.equal(a, b) for a, b in zip(first, captured))
    except Exception as error:
        row["graph"] = failure(error)["error"]
    return row


def certified(contact):
    """The certified backward, whose launches are many: profiled small, then once at full size."""
    from fastgrpo import linear_logprobs

    depth = contact.sizes.widths[len(contact.sizes.widths) // 2]
    for n in (min(2048, contact.sizes.tokens), contact.sizes.large):
        hidden, weight, targets = contact.head(n, depth)
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        old = linear_logprobs(h.detach(), w.detach(), targets, backend="triton").logprobs

        def both(h=h, w=w, targets=targets, old=old):
            logp = linear_logprobs(h, w, targets, old_logprobs=old, backend="triton", backward="certified").logprobs
            return torch.autograd.grad(logp.sum(), (h, w))

        row = {"N": n, "D": depth}
        if n < contact.sizes.large:
            both()
            row |= count_launches(contact, both)
        yield {**row, "ms": round(contact.once(both), 2)}


def count_launches(contact, function):
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if contact.cuda else [])
    with profile(activities=kinds) as p:
        function()
        if contact.cuda:
            torch.cuda.synchronize()
    names = Counter(e.name for e in p.events())
    calls = sum(v for k, v in names.items() if "Launch" in k)
    waits = sum(v for k, v in names.items() if "Synchronize" in k or k == "aten::_local_scalar_dense")
    return {"launches": calls, "waits": waits, "ops": dict(names.most_common(12))}


def loss_step(contact):
    """grpo_loss as a trainer calls it: time, and no waiting."""
    from fastgrpo import GRPOLossConfig, grpo_loss

    batch, depth = 8, contact.sizes.widths[len(contact.sizes.widths) // 2]
    length = contact.sizes.tokens // batch
    hidden, weight, targets = contact.head(batch * length, depth)
    h, w = hidden.view(batch, length, depth).requires_grad_(), weight.requires_grad_()
    advantages = torch.randn(batch, device=contact.device)
    advantages[::2] = 0.0
    old = torch.full((batch, length), -0.7, device=contact.device)

    def step(config=GRPOLossConfig(beta=0.04)):  # noqa: B008
        result = grpo_loss(
            h, w, targets.view(batch, length), advantages, config, old_logprobs=old, ref_logprobs=old, backend="triton"
        )
        return torch.autograd.grad(result.loss, (h, w))

    yield {"N": batch * length, "D": depth, "beta": 0.04, "ms": contact.milliseconds(step)[0]}
