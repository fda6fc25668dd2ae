"""d logp / d hidden made in the forward, and what the backwards' GEMMs read."""

import pytest
import torch

from fastgrpo import linear_logprobs

from watchers import Watched

pytest.importorskip("triton")
from fastgrpo.kernels import backward, report


def falling(dtype, device, n=9, vocab=300, depth=16):
    """hidden, weight, targets: each row's logits fall from 0 to -110, those beside the label to denormal numbers."""
    hidden, weight = torch.zeros(n, depth), torch.randn(vocab, depth) / 8
    hidden[:, 0], weight[:, 0] = 1.0, torch.linspace(0.0, -110.0, vocab)
    return hidden.to(device, dtype), weight.to(device, dtype), torch.arange(n, device=device)


def denormals(x):
    """How many values are neither 0 nor normal."""
    return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())


def operands_of(run, modules):
    """The first operand of every launch of a gradient's GEMM, as it is read."""
    seen = []

    def look(name, arguments):
        if name in ("dhidden_kernel", "dweight_kernel"):
            rows, cols = (arguments[f"last_{x}"] - arguments[f"first_{x}"] for x in ("row", "v"))
            seen.append(arguments["dlogits_ptr"][:rows, :cols].clone())

    with report.replaced(modules, lambda kernel: Watched(kernel, look)):
        run()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_backward_feeds_no_denormals(dtype, device):
    hidden, weight, targets = falling(dtype, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def run():
        out = linear_logprobs(hidden, weight, targets, backend="triton", backward="exact")
        torch.autograd.grad(out.logprobs.sum(), leaves)

    seen = operands_of(run, (backward,))
    assert len(seen) == 2
    for x in seen:
        assert (x == 0).any()
        assert x.count_nonzero() > x.numel() // 10
        # fp16 keeps the few digits it has there
        assert denormals(x) > 0 if dtype == torch.float16 else denormals(x) == 0
