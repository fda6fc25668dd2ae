"""The same checks at real size, compiled, on a CUDA device: N * V > 2^31, bounded memory, no waiting.

``python -m pytest tests/gpu`` runs them; they are skipped where there is no GPU.
"""

import contextlib

import pytest
import torch

from bench import profiles
from fastgrpo import GRPOLossConfig, grpo_loss, linear_divergence, linear_logprobs, reference

pytestmark = pytest.mark.gpu
N, V, D = 16384, 152064, 1024  # N * V = 2.5e9
MIB = 2**20


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Real memory: a NaN fill of every buffer would be most of the time."""


@contextlib.contextmanager
def no_waiting():
    """The host must not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def problem(n=N, vocab=V, depth=D, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, depth, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(vocab, depth, generator=g, device="cuda") / depth**0.5).to(dtype)
    targets = torch.randint(0, vocab, (n,), generator=g, device="cuda")
    half = torch.arange(n, device="cuda") % 2 == 0  # every second label at p near 1
    hidden[half] += (18 * weight[targets[half]].float()).to(dtype)
    return hidden, weight, targets


def exact_rows(hidden, weight, targets, rows):
    """fp64 log-probs, entropies and logits gradients of some rows."""
    z = hidden[rows].double() @ weight.double().T
    logp = z.log_softmax(1)
    label = logp.gather(1, targets[rows, None])[:, 0]
    return label, -(logp.exp() * logp).sum(1), torch.nn.functional.one_hot(targets[rows], z.shape[1]) - logp.exp()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_and_gradients(dtype):
    n = N if dtype != torch.float32 else 2048
    hidden, weight, targets = problem(n=n, dtype=dtype)
    targets[5::7] = -100
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(h, w, targets, return_entropy=True, backend="triton")
    upstream = torch.randn(n, device="cuda")
    upstream[::3] = 0
    out.logprobs.backward(upstream)
    rows = torch.tensor([0, 1, 2, 4, 1001, n // 2 + 1, n - 3, n - 2, n - 1], device="cuda")
    rows = rows[targets[rows] >= 0]
    label, entropy, slope = exact_rows(hidden, weight, targets, rows)
    assert (out.logprobs[rows] - label).abs().max() < 1e-5 * (1 + label.abs().max())
    assert (out.entropy[rows] - entropy).abs().max() < 1e-4
    want = upstream[rows, None].double() * (slope @ weight.double())
    error = (h.grad[rows].double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 6e-3), error
    assert h.grad[targets == -100].count_nonzero() == 0
    columns = torch.tensor([0, 7, V // 2, V - 1, int(targets[1])], device="cuda")
    want = weight_gradient(hidden, weight, targets, upstream, columns)
    error = (w.grad[columns].double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 6e-3), error


def weight_gradient(hidden, weight, targets, upstream, columns):
    total = torch.zeros(columns.numel(), hidden.shape[1], dtype=torch.float64, device="cuda")
    for start in range(0, hidden.shape[0], 512):
        rows = torch.arange(start, min(start + 512, hidden.shape[0]), device="cuda")
        rows = rows[(targets[rows] >= 0) & (upstream[rows] != 0)]
        slope = exact_rows(hidden, weight, targets, rows)[2][:, columns]
        total += (slope * upstream[rows, None]).T @ hidden[rows].double()
    return total


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("workspace_mb", [128, 512])
def test_peak_memory_is_bounded(workspace_mb, frozen):
    """<= workspace + 4 N D + 64 bytes a token + N V / 1024 + 20 bytes an entry, plus 16 MiB."""
    hidden, weight, targets = problem()
    h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_logprobs(h, w, targets, backend="triton", workspace_mb=workspace_mb)
    out.logprobs.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = h.numel() * 2 + (0 if frozen else w.numel() * 2)
    bound = workspace_mb * MIB + 4 * N * D + 64 * N + N * V / 1024 + 20 * V + 16 * MIB
    print(f"beyond inputs and gradients: {(peak - gradients) / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB")
    assert peak - gradients <= bound


def loss_arguments(batch=16, length=1024):
    hidden, weight, targets = problem(n=batch * length)
    advantages = torch.randn(batch, device="cuda")
    advantages[::4] = 0
    shape = (batch, length)
    mask = torch.arange(length, device="cuda") < torch.randint(1, length, (batch, 1), device="cuda")
    logp = linear_logprobs(hidden, weight, targets).logprobs.view(shape)
    return {
        "hidden": hidden.view(*shape, D).requires_grad_(), "weight": weight.requires_grad_(),
        "targets": targets.view(shape), "advantages": advantages, "mask": mask,
        "old_logprobs": logp + 0.05 * torch.randn(shape, device="cuda"),
        "ref_logprobs": logp + 0.05 * torch.randn(shape, device="cuda"),
    }  # fmt: skip


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_the_host_never_waits_and_a_graph_captures(backward):
    arguments = loss_arguments()
    config = GRPOLossConfig(beta=0.04, entropy_coef=1e-3 if backward == "exact" else 0.0)

    def step():  # a loss kept would keep a graph, whose nodes remember the stream that they were made on
        loss = grpo_loss(config=config, backward=backward, **arguments).loss
        return loss.detach(), torch.autograd.grad(loss, (arguments["hidden"], arguments["weight"]))

    eager = step()
    with no_waiting():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[1], eager[1]))  # and deterministic


def test_both_backends_agree():
    arguments = loss_arguments(batch=4, length=512)
    config = GRPOLossConfig(beta=0.04, importance_sampling_level="sequence")
    results = []
    for backend in ("triton", "torch"):
        loss = grpo_loss(config=config, backend=backend, **arguments).loss
        results.append((loss, *torch.autograd.grad(loss, (arguments["hidden"], arguments["weight"]))))
    assert abs(results[0][0] - results[1][0]) < 1e-5
    for a, b in zip(results[0][1:], results[1][1:]):
        assert (a.float() - b.float()).norm() < 5e-3 * b.float().norm()


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora(dtype, adapter):
    """Log-probs unrounded beside a 16-bit head, gradients to A and B, within the bound, without waiting."""
    hidden, weight, targets = problem(n=4096, dtype=dtype)
    a = (torch.randn(16, D, device="cuda") / D**0.5).to(adapter).requires_grad_()
    b = (1e-2 * torch.randn(V, 16, device="cuda")).to(adapter).requires_grad_()
    h = hidden.requires_grad_()

    def step():
        logp = linear_logprobs(h, weight, targets, lora=(a, b, 2.0), backend="triton", backward="exact").logprobs
        return logp, torch.autograd.grad(logp.sum(), (h, a, b))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        logp, (d_h, d_a, d_b) = step()
    peak = torch.cuda.max_memory_allocated() - before - 2 * h.numel() - b.numel() * b.element_size()
    assert peak <= 128 * MIB + 64 * 4096 + 16 * 6 * V + 16 * 4 * V + 48 * MIB, peak / MIB
    rows = torch.arange(0, 4096, 512, device="cuda")
    wide = weight.double() + 2.0 * b.detach().double() @ a.detach().double()
    z = (hidden[rows].double() @ wide.T).log_softmax(1)
    want = z.gather(1, targets[rows, None])[:, 0]
    assert (logp[rows] - want).abs().max() < 2e-5 * (1 + want.abs().max())
    slope = torch.nn.functional.one_hot(targets[rows], V) - z.exp()
    assert (d_h[rows].double() - slope @ wide).norm() < 6e-3 * (slope @ wide).norm()
    assert d_a.isfinite().all()
    assert d_b.isfinite().all()
    assert d_a.norm() > 0


def test_sampling_support():
    """A few kept ids a token cost a few columns: against the same rows in float64, and without waiting."""
    hidden, weight, targets = problem()
    offsets = torch.arange(N + 1, device="cuda") * 8
    ids = (targets[:, None] + torch.arange(8, device="cuda") * 1009) % V
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step():
        out = linear_logprobs(h, w, targets, support=(ids.flatten(), offsets), return_entropy=True, backend="triton")
        return out, torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (h, w))

    _, first = step()
    with no_waiting():
        out, grads = step()
    assert all(torch.equal(x, y) for x, y in zip(first, grads))
    rows = torch.arange(0, N, 97, device="cuda")
    z = (weight[ids[rows]].double() * hidden[rows, None].double()).sum(2).log_softmax(1)
    assert (out.logprobs[rows] - z[:, 0]).abs().max() < 1e-4
    assert (out.entropy[rows] + (z.exp() * z).sum(1)).abs().max() < 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("backward", "workspace"), [("exact", 128), ("certified", 128), ("exact", 256)])
def test_divergence(beta, frozen, backward, workspace):
    """From a wider teacher: values and gradients of some rows, within the bound, without waiting, in a graph.

    A mixture's logits are held at 256 MiB.
    """
    n, wide = 8192, D + 512
    hidden, weight, _ = problem(n=n)
    teacher = problem(n=n, depth=wide, seed=1)[:2]
    h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    leaves = (h,) if frozen else (h, w)

    def step():
        out = linear_divergence(
            h, w, *teacher, beta=beta, backend="triton", backward=backward, workspace_mb=workspace
        ).divergence
        return out.detach(), torch.autograd.grad(out.sum(), leaves)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        value, grads = step()
    peak = torch.cuda.max_memory_allocated() - before - sum(2 * x.numel() for x in leaves)
    bound = workspace * MIB + 4 * n * D + 128 * n + n * V / 512 + 40 * V + 16 * MIB
    print(f"beyond inputs and gradients: {peak / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB")
    assert peak <= bound
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip((value, *grads), (captured[0], *captured[1])))
    rows = torch.arange(0, n, 512, device="cuda")
    some = hidden.detach()[rows].double().requires_grad_()
    theirs = teacher[0][rows].double(), teacher[1].double()
    truth = reference.linear_divergence(some, weight.detach().double(), *theirs, beta=beta).divergence
    (want,) = torch.autograd.grad(truth.sum(), some)
    assert (value[rows] - truth).abs().max() < 1e-4 * (1 + truth.abs().max())
    assert (grads[0][rows].double() - want).norm() < 6e-3 * want.norm()


def test_top_k_targets():
    """Sixteen a token: log-probs, the rest's mass, gradients of some rows, without waiting."""
    hidden, weight, targets = problem(n=4096)
    ids = (targets[:, None] + torch.arange(16, device="cuda") * 1009) % V
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step():
        out = linear_logprobs(h, w, ids, backend="triton", backward="exact")
        return out, torch.autograd.grad(out.logprobs.sum() + out.rest.sum(), (h, w))

    _, first = step()
    with no_waiting():
        out, grads = step()
    assert all(torch.equal(x, y) for x, y in zip(first, grads))
    rows = torch.arange(0, 4096, 128, device="cuda")
    some = hidden.detach()[rows].double().requires_grad_()
    logp = (some @ weight.detach().double().T).log_softmax(1)
    taken = logp.gather(1, ids[rows])
    rest = logp.scatter(1, ids[rows], -torch.inf).logsumexp(1)
    (want,) = torch.autograd.grad(taken.sum() + rest.sum(), some)
    assert (out.logprobs[rows] - taken).abs().max() < 2e-5 * (1 + taken.abs().max())
    assert (out.rest[rows] - rest).abs().max() < 1e-4
    assert (grads[0][rows].double() - want).norm() < 6e-3 * want.norm()


@pytest.mark.parametrize("profile", ["rl", "flat"])
def test_certified_backward(profile):
    """bf16 at real size: the certified gradients add less than a quarter of what bf16 GEMMs add anyway."""
    p = profiles.problem(8192, V, D, profile, dtype=torch.bfloat16, device="cuda")
    hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
    upstream, results = p["upstream"] * 100, {}
    for backward in ("exact", "certified"):
        out = linear_logprobs(hidden, weight, p["targets"], old_logprobs=p["old_logprobs"], backward=backward)
        results[backward] = (out.logprobs.detach(), *torch.autograd.grad(out.logprobs, (hidden, weight), upstream))
    plain, certified = (results[k][0] for k in ("exact", "certified"))  # two compilations: FMAs contract differently
    assert (plain - certified).abs().max() <= 2e-6 * (1 + plain.abs().max())
    rows = torch.arange(0, 8192, 64, device="cuda")
    want = upstream[rows, None].double() * (exact_rows(hidden, weight, p["targets"], rows)[2] @ weight.double())
    errors = [(results[k][1][rows].double() - want).norm() / want.norm() for k in ("exact", "certified")]
    print(f"{profile}: dX error exact {errors[0]:.1e}, certified {errors[1]:.1e}")
    assert errors[1] <= 1.25 * errors[0]
    exact, ours = (results[k][2].float() for k in ("exact", "certified"))
    assert (ours - exact).norm() < 5e-3 * exact.norm()


def test_speed_is_printed():
    """Not a bound: forward and forward + backward next to one bare logits GEMM, for bench/results/."""
    hidden, weight, targets = problem(n=8192, depth=2048)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def forward():
        return linear_logprobs(h, w, targets, backend="triton").logprobs

    def both():
        torch.autograd.grad(forward().sum(), (h, w))

    def gemm():
        for rows in hidden.detach().split(2048):
            torch.mm(rows, weight.detach().T)

    times = {f.__name__: milliseconds(f) for f in (gemm, forward, both)}
    device = torch.cuda.get_device_name()
    print(f"{device}, N 8192, V {V}, D 2048, bf16: " + ", ".join(f"{k} {v:.2f} ms" for k, v in times.items()))
    assert all(v > 0 for v in times.values())


def milliseconds(function, repeats=10):
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats
