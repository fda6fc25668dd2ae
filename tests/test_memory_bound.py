"""The memory promised in docs/how-it-works.md, held by branches that only CUDA takes, and how often the host waits.

Beyond inputs and gradients: the workspace, 4 N D for the sum of dX, 64 bytes a token, and where certified N V / 128
(N V / 1024 and 20 bytes an entry on the Triton backend).
"""

import dataclasses
import functools
import gc

import pytest
import torch
from stand_in_cuda import StandInCuda

from bench import profiles
from fastgrpo import linear_divergence, linear_logprobs
from fastgrpo.backends import row_audit
from fastgrpo.backends.problem import Gradients, HeadParams, HeadProblem

from watchers import Live

MIB = 2**20
SLACK = 32 * 1024  # what does not grow: scalars, a column sum, lists of blocks
CASES = [(backward, frozen, lora) for backward in ("exact", "certified") for frozen in (False, True)
         for lora in (False, True)]  # fmt: skip


@functools.cache
def draw_peaked(n, vocab, depth, dtype):
    return profiles.problem(n, vocab, depth, "rl", dtype=dtype)


def bound_memory(n, vocab, depth, workspace, lora_columns=0, summed=True):
    """
    Bytes. lora_columns: of fp32 LoRA's B, whose 16-bit parts cost 6 bytes a value.
    summed: whether dX is a sum of chunks, or kept by the forward.
    """
    return workspace + (4 * n * depth if summed else 0) + 64 * n + n * vocab // 128 + 6 * lora_columns + SLACK


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: filling every buffer with NaN would be most of the time."""


@pytest.mark.parametrize(
    ("backward", "frozen", "lora", "dtype"),
    [(*case, torch.bfloat16) for case in CASES] + [(*case, torch.float32) for case in CASES if not case[2]],
)
def test_torch_backend(backward, frozen, lora, dtype):
    """Its branches on CUDA, with real numbers: 16-bit GEMMs that return fp32, sums of rows, chunks."""
    n, vocab, depth, rank, workspace = 512, 2048, 128, 8, MIB // 2
    p = draw_peaked(n, vocab, depth, dtype)
    with StandInCuda() as cuda:
        names = ("hidden", "weight", "targets", "old_logprobs", "upstream")
        hidden, weight, targets, old, upstream = (cuda.put(p[k]) for k in names)
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        leaves = [hidden] + ([] if frozen else [weight])
        adapter = None
        if lora:
            adapter = cuda.put(torch.randn(rank, depth) / 16), cuda.put(torch.randn(vocab, rank) / 16), 1.0
            leaves += [x.requires_grad_() for x in adapter[:2]]
        with Live() as live:
            out = linear_logprobs(hidden, weight, targets, old_logprobs=old, lora=adapter, backend="torch",
                                  backward=backward, workspace_mb=workspace / MIB)  # fmt: skip
            grads = torch.autograd.grad(out.logprobs, leaves, upstream)
        kept = sum(x.inner.untyped_storage().nbytes() for x in grads)
        assert all(g.inner.isfinite().all() and g.inner.count_nonzero() for g in grads)
    bound = bound_memory(n, vocab, depth, workspace, lora_columns=rank * vocab if lora else 0)
    assert live.peak - kept <= bound, (live.peak - kept) / bound


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_trained_heads_divergence(beta):
    """Its gradient is held from the forward on, and then it is the gradient."""
    n, vocab, depth, workspace = 512, 2048, 128, 4 * MIB
    p = draw_peaked(n, vocab, depth, torch.float32)
    with StandInCuda() as cuda:
        hidden, weight, others = (cuda.put(x) for x in (p["hidden"], p["weight"], p["hidden"] + 0.05))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        upstream = torch.ones_like(p["upstream"])
        with Live() as live:
            out = linear_divergence(
                hidden, weight, others, weight, beta=beta, backend="torch", workspace_mb=workspace / MIB
            )
            held = live.live
            grads = torch.autograd.grad(out.divergence, leaves, cuda.put(upstream))
        kept = sum(x.inner.untyped_storage().nbytes() for x in grads)
        assert all(g.inner.isfinite().all() and g.inner.count_nonzero() for g in grads)
    assert held > 4 * vocab * depth
    assert live.peak - kept <= bound_memory(n, vocab, depth, workspace)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_topk_on_the_torch_backend(backward, dtype):
    """As an ordinary target's, and 80 bytes a target: no (N, K, D), no second dW."""
    n, vocab, depth, k, workspace = 512, 2048, 128, 32, MIB // 2
    p = draw_peaked(n, vocab, depth, dtype)
    with StandInCuda() as cuda:
        hidden, weight = (cuda.put(p[name]).requires_grad_() for name in ("hidden", "weight"))
        ids = cuda.put((p["targets"][:, None] + torch.arange(k)) % vocab)
        with Live() as live:
            out = linear_logprobs(hidden, weight, ids, backend="torch", backward=backward,
                                  workspace_mb=workspace / MIB)  # fmt: skip
            grads = torch.autograd.grad(out.logprobs.sum() + out.rest.sum(), (hidden, weight))
        kept = sum(x.inner.untyped_storage().nbytes() for x in grads)
    bound = bound_memory(n, vocab, depth, workspace) + 80 * n * k
    assert bound < workspace + 4 * n * k * depth
    assert live.peak - kept <= bound, (live.peak - kept) / bound


@pytest.mark.parametrize(("frozen", "lora"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("n", "depth"), [(16384, 1536), (16384, 4096), (65536, 4096), (300, 896), (1, 1536)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_backend_at_real_size(n, depth, dtype, frozen, lora, monkeypatch):
    """What its launchers allocate, on the meta device; nothing is launched and nothing reads a value."""
    report = pytest.importorskip("fastgrpo.kernels.report")
    from fastgrpo.kernels import audit, backward, forward
    from fastgrpo.kernels import certified as certified_kernels
    from fastgrpo.kernels import frozen as frozen_kernels

    vocab, rank, workspace = 151936, 16, 128 * MIB
    monkeypatch.setattr("fastgrpo.lora.has_native", lambda x: True)
    monkeypatch.setattr("fastgrpo.lora.mm16", lambda a, b: torch.empty(len(a), b.shape[1], device="meta"))

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    params = HeadParams(
        temperature=1.0, softcap=None, logit_scale=1.0, compute_dtype=dtype, lora_dtype=torch.float32, entropy=False,
        backend="triton", workspace=workspace,
    )  # fmt: skip
    problem = HeadProblem(
        empty(1, n, depth), empty(vocab, depth), None, empty(n, dtype=torch.int64), None, params,
        empty(1, n, rank, dtype=torch.float32) if lora else None,
        empty(vocab, rank, dtype=torch.float32) if lora else None,
    )  # fmt: skip
    needs = Gradients(True, not frozen, low=lora, up=lora)
    row = empty(n, dtype=torch.float32)
    low_bytes = 4 * n * rank if lora else 0  # the adapter's own sums, and its 16-bit parts beside hidden
    bound = bound_memory(n, vocab, depth, workspace, rank * vocab if lora else 0, not frozen or lora) + 6 * low_bytes
    with report.recording("sm_90", report.Forgetful()):
        if frozen and not lora:  # made in the forward: the directions, which the backward turns into the gradient
            with Live() as live:
                made = frozen_kernels.frozen_forward(problem)
            assert live.peak <= 4 * n * depth + workspace + 64 * n + SLACK, live.peak / (4 * n * depth)
            del made
        audit.samples_on("meta", vocab), row_audit.signs_on("meta", depth, dtype)  # tables that are made once
        with Live() as live:
            stats = forward.forward(problem)
            grads = backward.backward(problem, stats, row, None, needs)
        kept = sum(x.untyped_storage().nbytes() for x in grads if x is not None)
        assert live.peak - kept <= bound, (live.peak - kept) / bound
        with Live() as live:
            tolerances = dataclasses.replace(params, tolerance=0.005, row_tolerance=0.1)
            certified = dataclasses.replace(problem, params=tolerances)
            stats, certificate = forward.certified_forward(certified, row)
            kept += sum(x.untyped_storage().nbytes() for x in certificate.tensors)
            flags = n * vocab // (256 if dtype == torch.float32 else 1024)  # fp32 flags finer blocks
            assert certificate.flags.untyped_storage().nbytes() <= flags + vocab
            del grads
            more = certified_kernels.certified_backward(certified, stats, certificate, row, needs)
        # the order of the entries; with a frozen head too dX is a sum of chunks
        bound = bound_memory(n, vocab, depth, workspace, rank * vocab if lora else 0) + 6 * low_bytes + 20 * vocab
        assert live.peak - kept <= bound, (live.peak - kept) / bound
        assert len(more) == 5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backward", ["exact", "auto", "certified"])
def test_host_waits(backward, frozen, monkeypatch):
    """The Triton backend never waits."""
    report = pytest.importorskip("fastgrpo.kernels.report")
    from fastgrpo import backends
    from fastgrpo.kernels import grids

    monkeypatch.setattr(backends, "choose", lambda backend, hidden: "triton")
    monkeypatch.setattr("fastgrpo.backends.triton_backend.on_device", lambda x: torch.autograd.set_grad_enabled(False))
    monkeypatch.setattr(grids, "processor_count", lambda device: 132)
    p = draw_peaked(1024, 4096, 256, torch.bfloat16)
    with StandInCuda() as cuda, report.recording("sm_90") as launches:
        hidden, weight, targets, upstream = (cuda.put(p[k]) for k in ("hidden", "weight", "targets", "upstream"))
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        leaves = [hidden] + ([] if frozen else [weight])
        for _ in range(2):  # the first call uploads the audit's samples
            cuda.waits.clear()
            out = linear_logprobs(hidden, weight, targets, backward=backward)
            torch.autograd.grad(out.logprobs, leaves, upstream)
    names = [kernel.fn.__name__ for kernel, _ in launches]
    made_in_forward = frozen and backward != "certified"
    first = ["gather_kernel", "label_kernel", "forward_kernel"]
    if made_in_forward:
        first = ["gather_kernel", "masses_kernel", "fold_kernel"]
    elif backward == "certified":  # no hint: the labels' logits order the rows
        first = ["order_kernel", "gather_kernel", "label_kernel", "order_kernel", "gather_kernel", "forward_kernel"]
    assert names[: len(first)] == first
    assert ("order_kernel" in names) == (backward == "certified")
    assert ("directions_kernel" if made_in_forward else "dlogits_kernel") in names
    assert cuda.waits == [], cuda.waits


@pytest.mark.quick
def test_the_counter_counts():
    with Live() as live:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a[10:].view(-1)
        c = torch.ones(500, dtype=torch.float64)
        del c
        gc.collect()
        d = torch.empty(250, dtype=torch.float32)
    assert live.peak == 8000
    assert b.numel() + d.numel() == 1240
    with Live() as live:
        a.add_(1)
    assert live.peak == 0
