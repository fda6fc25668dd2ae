"""d logp / d hidden made in the forward, and that no GEMM of a gradient reads denormal numbers."""

import pytest
import torch

from fastgrpo import backends, linear_logprobs, reference
from fastgrpo.backends.problem import HeadParams, HeadProblem

import problems
from watchers import Watched

pytest.importorskip("triton")
from fastgrpo.kernels import report, tiles

OPTIONS = [
    {},
    {"bias": True, "temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "return_entropy": True},
    {"temperature": "tensor", "return_entropy": True},
    {"softcap": 5.0, "logit_scale": -2.0},
]
SMALL = 75_000  # bytes: 128 x 128 cells


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def head_problem(hidden, weight, targets, bias=None, *, temperature=1.0, softcap=None, logit_scale=1.0,
                 return_entropy=False, workspace=2**27, compute=None):  # fmt: skip
    each = isinstance(temperature, torch.Tensor)
    params = HeadParams(
        temperature=None if each else temperature, softcap=softcap, logit_scale=logit_scale,
        compute_dtype=compute or hidden.dtype, entropy=return_entropy, backend="triton", workspace=workspace,
    )  # fmt: skip
    hidden = hidden if hidden.ndim == 3 else hidden[None]
    return HeadProblem(hidden, weight, bias, targets.flatten(), temperature.flatten() if each else None, params)


def run_frozen(backend, *tensors, **options):
    """-> stats (5, N), directions (N, D)."""
    problem = head_problem(*tensors, **options)
    stats, slopes = backends.load(backend).frozen_forward(problem, None, None)
    if slopes.rows is None:
        return stats, slopes.values
    return stats, slopes.values.new_zeros(stats.shape[1], problem.weight.shape[1]).index_copy_(0, *slopes[:2])


def autograd(dtype, hidden, weight, targets, bias=None, **options):
    """-> log-probs, entropy, d logp / d hidden (N, D) of the reference in this dtype."""
    cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaf = hidden.detach().to(dtype).requires_grad_()
    out = reference.linear_logprobs(
        leaf, weight.to(dtype), targets, None if bias is None else bias.to(dtype), **{**cast, "return_entropy": True}
    )
    (d_hidden,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    return out.logprobs.detach().flatten(), out.entropy.detach().flatten(), d_hidden.flatten(0, -2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "workspace"),
    [((1, 1, 3), 2**27), ((1, 300, 16), SMALL), ((33, 600, 40), 2**27), ((17, 408, 33), SMALL),
     ((140, 160, 24), SMALL)], ids=str,
)  # fmt: skip
def test_fp32_against_fp64(backend, device, shape, workspace, options):
    """One chunk and several, of columns and of rows."""
    options = dict(options)
    n, vocab, depth = shape
    hidden, weight, targets, bias = problems.head(
        n, vocab, depth, torch.float32, device, bias=options.pop("bias", False), peak=6.0
    )
    if n > 2:
        targets[::5] = -100
        hidden[2] *= 20  # large logits
        weight[:] -= 0.5 * hidden[3] / hidden[3].norm()  # all-negative logits in row 3
    if options.get("temperature") == "tensor":
        options["temperature"] = torch.rand(n, device=device) + 0.5
    tensors = hidden, weight, targets, bias
    stats, directions = run_frozen(backend, *tensors, workspace=workspace, **options)
    forward = backends.load(backend).forward(head_problem(*tensors, **options))
    naive, want = (autograd(dtype, *tensors, **options) for dtype in (torch.float32, torch.float64))
    for mine, theirs, truth in zip((stats[0], stats[4]), naive, want[: 1 + options.get("return_entropy", False)]):
        allowed = 2 * (theirs - truth).abs() + 1e-6 * (1 + truth.abs())
        assert ((mine - truth).abs() <= allowed).all(), ((mine - truth).abs() / allowed).max()
    torch.testing.assert_close(stats[1] + stats[2], forward[1] + forward[2], rtol=2e-6, atol=2e-6)  # log-sum-exp
    torch.testing.assert_close(stats[3], forward[3], rtol=3e-5, atol=0)  # labels' logits, summed in another order
    mine, theirs = (problems.relative_error(d, want[2]) for d in (directions, naive[2]))
    assert mine <= 2 * theirs + 2e-6 or want[2].norm() < 1e-12, (mine, theirs)
    assert directions.shape == (n, depth)
    assert directions.dtype == torch.float32
    assert directions[targets == -100].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("peak", "workspace", "options"),
    [(0.0, 2**27, {}), (0.0, SMALL, OPTIONS[1]), (12.0, SMALL, {})],
    ids=str,
)
def test_16_bit_error_budget(backend, device, dtype, peak, workspace, options):
    """No more error than the exact backward's, and the log-probs of fp32."""
    hidden, weight, targets, bias = problems.head(32, 600, 64, dtype, device, bias=True, peak=peak)
    options = {**options, "bias": bias if options.get("bias") else None}
    bias = options.pop("bias")
    stats, directions = run_frozen(backend, hidden, weight, targets, bias, workspace=workspace, **options)
    want = autograd(torch.float64, hidden, weight, targets, bias, **options)
    assert (stats[0] - want[0]).abs().max() < 1e-5
    leaf = hidden.float().requires_grad_()  # fp32, so that its gradient is not rounded again
    with torch.autocast(device, dtype=dtype):
        out = linear_logprobs(leaf, weight, targets, bias, backend=backend, backward="exact", **options)
        (exact,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    mine, theirs = (problems.relative_error(d, want[2]) for d in (directions, exact))
    assert mine <= theirs + 2e-8, (mine, theirs)  # on a CPU both are exact in 16 bits: rounding of fp32
    assert mine < 2e-3


@pytest.mark.quick
def test_label_probability_near_one(backend, device):
    """Each row's direction keeps its relative accuracy where 1 - p is 1e-24."""
    hidden, weight, targets = problems.near_certain(device)
    stats, directions = run_frozen(backend, hidden, weight, targets, workspace=SMALL)
    leaf = hidden.double().requires_grad_()
    z = leaf @ weight.double().T
    others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
    logp = -torch.nn.functional.softplus(others - z.gather(1, targets[:, None])[:, 0])
    (want,) = torch.autograd.grad(logp.sum(), leaf)
    torch.testing.assert_close(stats[0].double(), logp.detach(), rtol=2e-5, atol=0)
    error = (directions - want).norm(dim=1) / want.norm(dim=1)
    assert want.norm(dim=1).min() < 1e-22
    assert error.max() < 1e-4, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_peaks_that_rise_and_fall(backend, device, dtype):
    """Whichever column holds a row's peak, and however far it is above the others, chunk after chunk."""
    n, vocab, depth, steps = 12, 3600, 16, torch.arange(12.0)
    _, weight, targets, _ = problems.head(n, vocab, depth, torch.float32)
    hidden = torch.zeros(n, depth)
    hidden[:, 1:] = torch.randn(n, depth - 1)
    weight[:, 0] = 0.0
    for first, height in ((0, 0.25), (520, 0.5), (1600, 0.75), (2700, 1.0), (3200, 0.125)):  # rising, then falling
        weight[first : first + 3, 0] = height
    hidden[:, 0] = steps * 16  # nats: 0 to 176
    tensors = [x.to(device, dtype) for x in (hidden, weight)] + [targets.to(device)]
    launched = []

    def look(name, arguments):
        if name == "level_kernel":
            own = arguments["partials_ptr"].flatten()[4 * arguments["tiles_v"] * n :][: arguments["tiles_v"] * n]
            launched.append(bool((own.view(-1, n) != arguments["running_ptr"][4]).any()))

    with report.replaced(lambda kernel: Watched(kernel, look)):
        stats, directions = run_frozen(backend, *tensors, workspace=2 * SMALL)  # chunks of several tiles
    if backend == "triton":
        assert len(launched) > 4
        assert any(launched)
        assert not all(launched)  # most chunks keep the reference they find
    want = autograd(torch.float64, *tensors)
    torch.testing.assert_close(stats[0].double(), want[0], rtol=2e-6, atol=2e-6)
    error = (directions - want[2]).norm(dim=1) / want[2].norm(dim=1)
    assert error.max() < (2e-5 if dtype == torch.float32 else 4e-3), error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_bad_row_stays_alone(backend, device, value):
    hidden, weight, targets, _ = problems.head(20, 300, 16, torch.float32, device)
    stats, directions = run_frozen(backend, hidden, weight, targets, workspace=SMALL)
    targets[4], targets[9] = 300, -1
    targets[[0, 7]] = -100
    hidden[3, 2], hidden[[0, 7]] = value, value
    dirty_stats, dirty = run_frozen(backend, hidden, weight, targets, workspace=SMALL)
    keep = torch.ones(20, dtype=torch.bool, device=device)
    keep[[0, 3, 4, 7, 9]] = False
    torch.testing.assert_close(dirty[keep], directions[keep], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dirty_stats[:, keep], stats[:, keep], rtol=1e-6, atol=1e-6)
    assert not dirty[3].isfinite().any()
    assert dirty[[4, 9]].isnan().all()
    assert dirty_stats[0, [4, 9]].isnan().all()
    assert dirty[[0, 7]].eq(0).all()


def test_bias_of_minus_infinity_removes_a_column(backend, device):
    hidden, weight, targets, bias = problems.head(12, 130, 16, torch.float32, device, bias=True)
    bias[::2] = -torch.inf
    targets = targets // 2 * 2 + 1
    targets[0] = 4  # a removed label
    stats, directions = run_frozen(backend, hidden, weight, targets, bias, temperature=0.5)
    want = autograd(torch.float64, hidden, weight[1::2], targets // 2, bias[1::2], temperature=0.5)
    assert stats[0, 0] == -torch.inf
    torch.testing.assert_close(directions[1:].double(), want[2][1:], rtol=1e-5, atol=1e-5)
    p = (2 * (hidden[0] @ weight[1::2].T + bias[1::2])).softmax(0)
    torch.testing.assert_close(directions[0], 2 * (weight[4] - p @ weight[1::2]), rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_strides_and_widths(backend, device):
    """(B, T, D) of a larger tensor, a transposed weight, and a weight wider than what is computed in."""
    hidden, weight, targets, _ = problems.head(24, 200, 24, torch.bfloat16, device)
    want = run_frozen(backend, hidden, weight, targets)
    larger = torch.full((3, 11, 48), torch.nan, dtype=hidden.dtype, device=device)
    larger[:, :8, ::2] = hidden.view(3, 8, 24)
    wide = weight.float().t().contiguous().t()
    got = run_frozen(backend, larger[:, :8, ::2], wide, targets.view(3, 8), compute=torch.bfloat16)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_nothing_to_do(backend, device):
    for n in (0, 3):
        hidden, weight, targets, _ = problems.head(n, 130, 16, torch.float32, device)
        stats, directions = run_frozen(backend, hidden, weight, torch.full_like(targets, -100))
        assert stats.shape == (5, n)
        assert directions.shape == (n, 16)
        assert stats.count_nonzero() == directions.count_nonzero() == 0


def falling_logits(dtype, device, n=9, vocab=300, depth=16):
    """hidden, weight, targets: each row's logits fall from 0 to -110, those beside the label to denormal numbers."""
    hidden, weight = torch.zeros(n, depth), torch.randn(vocab, depth) / 8
    hidden[:, 0], weight[:, 0] = 1.0, torch.linspace(0.0, -110.0, vocab)
    return hidden.to(device, dtype), weight.to(device, dtype), torch.arange(n, device=device)


def denormals(x):
    """How many values are neither 0 nor normal."""
    return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())


def unpanelled(panels, rows, vocab, width=tiles.WIDTH):
    """(rows, vocab) of one chunk's panels, whose rows fit one panel's."""
    panels = panels[: -(-vocab // width) * width].view(-1, width, width)
    return panels[:, :rows].transpose(0, 1).reshape(rows, -1)[:, :vocab].clone()


def operands_of(run):
    """What the GEMMs of gradients read beside hidden and weight, launch by launch."""
    seen = []

    def look(name, arguments):
        if name in ("dhidden_kernel", "dweight_kernel"):
            seen.append(unpanelled(arguments["dlogits_ptr"], arguments["last_row"], arguments["V"]))

    with report.replaced(lambda kernel: Watched(kernel, look)):
        run()
    return seen


@pytest.mark.parametrize("made_in", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gemms_read_no_denormals(dtype, device, made_in):
    hidden, weight, targets = falling_logits(dtype, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def run():
        if made_in == "forward":
            return run_frozen("triton", hidden.detach(), weight.detach(), targets)
        out = linear_logprobs(hidden, weight, targets, backend="triton", backward="exact")
        return torch.autograd.grad(out.logprobs.sum(), leaves)

    seen = operands_of(run)
    assert len(seen) == (1 if made_in == "forward" else 2)
    for x in seen:
        assert (x == 0).any()
        assert x.count_nonzero() > x.numel() // 10
        # fp16 keeps the few digits it has there
        assert denormals(x) > 0 if dtype == torch.float16 else denormals(x) == 0
