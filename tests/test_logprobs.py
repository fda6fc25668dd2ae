"""linear_logprobs: values and gradients on both backends against the fp64 reference."""

import itertools

import mpmath
import pytest
import torch

from fastgrpo import linear_logprobs, reference
from fastgrpo.backends.dense import combine
from fastgrpo.backends.problem import FLOOR
from fastgrpo.row_math import softplus

import problems
from watchers import Largest

SHAPES = [(1, 1, 3), (5, 1, 8), (1, 100, 16), (33, 1000, 40), (64, 1280, 24), (17, 1408, 33), (40, 129, 64)]
GRADS = ("hidden", "weight", "bias")


def leaves(hidden, weight, bias):
    return problems.with_grad({"hidden": hidden, "weight": weight, "bias": bias}, GRADS)


def run(op, leaf, targets, upstream, **options):
    """-> logprobs, entropy, gradients by name."""
    out = op(leaf["hidden"], leaf["weight"], targets, leaf["bias"], **options)
    total = (out.logprobs * upstream[0]).sum()
    if out.entropy is not None:
        total = total + (out.entropy * upstream[1]).sum()
    total.backward()
    return out.logprobs, out.entropy, {k: v.grad for k, v in leaf.items() if v is not None}


def truth_of(leaf, targets, upstream, **options):
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    double = problems.with_grad({k: None if v is None else v.double() for k, v in leaf.items()}, GRADS)
    return run(reference.linear_logprobs, double, targets, upstream, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "return_entropy": True},
        {"temperature": "tensor", "return_entropy": True},
        {"softcap": 5.0},
    ],
    ids=str,
)
def test_fp32_against_fp64(backend, device, shape, options):
    options = dict(options)
    n, vocab, depth = shape
    hidden, weight, targets, bias = problems.head(
        n, vocab, depth, torch.float32, device, bias=options.pop("bias", False), peak=6.0
    )
    if n > 2:
        targets[1] = -100
        hidden[2] *= 20  # large logits
        weight[:] -= 0.5 * hidden[3] / hidden[3].norm()  # all-negative logits in row 3
    if options.get("temperature") == "tensor":
        options["temperature"] = torch.rand(n, device=device) + 0.5
    upstream = torch.randn(2, n, device=device)
    logp, entropy, grads = run(
        linear_logprobs, leaves(hidden, weight, bias), targets, upstream, backend=backend, **options
    )
    truth = truth_of(leaves(hidden, weight, bias), targets, upstream, **options)
    naive = run(reference.linear_logprobs, leaves(hidden, weight, bias), targets, upstream, **options)
    rounding = 2e-8 * (hidden @ weight.T).abs().amax(1)  # a third of a logit's last digit: an entropy is a mean of them
    for mine, theirs, want, more in zip((logp, entropy), naive, truth, (0.0, rounding if backend == "triton" else 0.0)):
        if want is not None:
            allowed = 2 * (theirs - want).abs() + 1e-6 * (1 + want.abs()) + more
            assert ((mine - want).abs() <= allowed).all(), ((mine - want).abs() / allowed).max()
    for name, want in truth[2].items():
        mine, theirs = (problems.relative_error(g[name], want) for g in (grads, naive[2]))
        assert mine <= 2 * theirs + 2e-6 or want.norm() < 1e-12, (name, mine, theirs)


@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (False, 4.0), (True, None), (True, 4.0)])
def test_gradcheck(bias, softcap):
    for scale, temperature, entropy in itertools.product((1.0, 0.5), (1.0, 0.7, "tensor"), (False, True)):
        hidden, weight, targets, b = problems.head(6, 13, 4, bias=bias)  # every entry is moved, twice
        targets[3] = -100
        hidden, targets = hidden.view(2, 3, 4), targets.view(2, 3)
        t = torch.rand(2, 3, dtype=torch.float64) + 0.5 if temperature == "tensor" else temperature
        inputs = [None if x is None else x.requires_grad_() for x in (hidden, weight, b)]

        def op(h, w, b, targets=targets, t=t, scale=scale, entropy=entropy):
            out = linear_logprobs(
                h, w, targets, b, temperature=t, softcap=softcap, logit_scale=scale, return_entropy=entropy
            )
            return tuple(x for x in out if x is not None)

        assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("peak", [0.0, 12.0])
def test_16_bit_error_budget(backend, device, dtype, peak):
    """At most twice the error of same-dtype torch for every gradient, fp32's own for the log-probs."""
    n, vocab, depth = 48, 1000, 64
    hidden, weight, targets, bias = problems.head(n, vocab, depth, dtype, device, bias=True, peak=peak)
    upstream = torch.randn(2, n, device=device)
    options = {"return_entropy": True}
    logp, entropy, grads = run(
        linear_logprobs, leaves(hidden, weight, bias), targets, upstream, backend=backend, **options
    )
    want_logp, want_entropy, want = truth_of(leaves(hidden, weight, bias), targets, upstream, **options)
    naive_logp, _, naive = run(reference.linear_logprobs, leaves(hidden, weight, bias), targets, upstream, **options)
    assert (logp - want_logp).abs().max() < 1e-5
    assert (entropy - want_entropy).abs().max() < 2e-5
    assert (logp - want_logp).abs().max() < 0.05 * (naive_logp - want_logp).abs().max()
    for name in want:
        mine, theirs = (problems.relative_error(g[name], want[name]) for g in (grads, naive))
        assert mine <= 2 * theirs + 1e-6, (name, mine, theirs)
        assert grads[name].dtype == dtype


@pytest.mark.quick
def test_label_probability_near_one(backend, device):
    """logp = -1e-9 is not 0: log-prob, entropy and each row's gradient keep their relative accuracy."""
    hidden, weight, targets = problems.near_certain(device)

    def stable(h, w):  # the same, in fp64 with the label kept out of the sum
        z = h @ w.T
        label = z.gather(1, targets[:, None])[:, 0]
        others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
        rest = (z - others[:, None]).exp() * torch.sigmoid(others - label)[:, None]
        entropy = rest * (label[:, None] - z + torch.nn.functional.softplus(others - label)[:, None])
        logp = -torch.nn.functional.softplus(others - label)
        entropy = entropy.scatter(1, targets[:, None], 0.0).sum(1) - logp.exp() * logp
        return logp, entropy

    h64 = hidden.double().requires_grad_()
    want = stable(h64, weight.double())
    assert want[0].min() < -1e-3
    assert want[0].max() > -1e-20
    assert (want[0] < 0).all()
    for i, tolerance in ((0, 2e-5), (1, 5e-5)):
        h = hidden.clone().requires_grad_()
        got = linear_logprobs(h, weight, targets, return_entropy=True, backend=backend)
        torch.testing.assert_close(got[i].double(), want[i].detach(), rtol=tolerance, atol=0)
        (mine,) = torch.autograd.grad(got[i].sum(), h)
        (truth,) = torch.autograd.grad(want[i].sum(), h64, retain_graph=True)
        error = (mine - truth).norm(dim=1) / truth.norm(dim=1)
        assert error.max() < 10 * tolerance, (i, error)


def exact_of_gap(gap, dtype):
    """log-prob, the others' mass and the entropy of a label ``-gap`` above two equal others, by mpmath."""
    with mpmath.workdps(60):
        others = mpmath.mpf(gap)
        p, q = 1 / (1 + mpmath.exp(others)), 1 / (1 + mpmath.exp(-others))
        logp = -mpmath.log1p(mpmath.exp(others))
        entropy = -p * logp + q * (mpmath.log1p(mpmath.exp(-others)) + mpmath.log(2))
        return torch.tensor([float(x) for x in (logp, q, entropy)], dtype=dtype)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("dtype", "far", "tolerance"), [(torch.float64, 700, 1e-14), (torch.float32, 80, 1e-6)], ids=str
)
def test_statistics_keep_every_digit(dtype, far, tolerance):
    """Relative error of log-prob, 1 - p and entropy, whichever side of torch.nn.functional.softplus's threshold."""
    two = torch.log(torch.tensor(2.0, dtype=dtype)).item()
    labels = torch.cat((torch.linspace(-40, 40, 401), torch.linspace(-far, far, 101), torch.tensor([20.1, -20.1])))
    labels = labels.to(dtype)
    running = torch.tensor([0.0, 2.0, 0.0], dtype=dtype)[:, None].expand(3, len(labels))  # two logits of 0
    stats = combine(running, labels)
    gaps = (two - labels).tolist()  # as the dtype rounds it
    want = torch.stack([exact_of_gap(gap, dtype) for gap in gaps], 1)
    torch.testing.assert_close(stats[[0, 3, 4]], want, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_statistics_of_infinite_gaps(dtype):
    """A label of no or of all probability, no other column at all, and a NaN that stays one."""
    running = torch.tensor([[0.0, 0, 0, FLOOR], [2, 2, 2, 0], [0, 0, 0, 0]], dtype=dtype)
    labels = torch.tensor([-torch.inf, 1e9, torch.nan, 3.0], dtype=dtype)
    logp, _, _, other_mass, entropy = combine(running, labels)
    assert logp.tolist()[:2] == [-torch.inf, 0.0]
    assert logp[3] == 0
    assert other_mass.tolist()[:2] == [1.0, 0.0]
    torch.testing.assert_close(entropy[:2], torch.tensor([2.0, 1.0], dtype=dtype).log())
    assert entropy[3] == 0
    assert logp[2].isnan()
    assert entropy[2].isnan()
    assert softplus(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], dtype=dtype)).tolist()[:2] == [torch.inf, 0.0]


def test_float64_is_exact_between_the_thresholds():
    """Labels 15 to 35 nats above or below the others: from hidden states to log-probs and entropy, and numerically."""
    gaps = torch.cat((torch.linspace(15, 35, 21), -torch.linspace(15, 35, 21))).double()
    hidden, weight = gaps[:, None], torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    targets = torch.zeros(len(gaps), dtype=torch.int64)
    got = linear_logprobs(hidden, weight, targets, return_entropy=True)
    two = mpmath.log(2)
    want = torch.stack([exact_of_gap(two - mpmath.mpf(gap), torch.float64) for gap in gaps.tolist()], 1)
    torch.testing.assert_close(got.logprobs, want[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(got.entropy, want[2], rtol=1e-14, atol=0)

    def op(h):
        out = linear_logprobs(h, weight, targets, return_entropy=True)
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(op, [hidden.clone().requires_grad_()])


def test_tiny_probability(backend, device):
    hidden, weight, targets, _ = problems.head(4, 130, 8, torch.float32, device)
    hidden = hidden * 40
    targets = (hidden @ weight.T).argmin(1)
    want = reference.linear_logprobs(hidden.double(), weight.double(), targets).logprobs
    got = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    assert want.max() < -69
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_three_dimensions_and_strides(backend, device):
    """(B, T, D) slices, a transposed weight and a strided last axis give what their copies give."""
    hidden, weight, targets, _ = problems.head(30, 130, 24, torch.float32, device)
    storage = torch.randn(3, 11, 24, device=device)
    cut = storage[:, :-1]
    targets = targets.view(3, 10)
    wide = torch.randn(3, 10, 48, device=device)[..., ::2]
    for view in (cut, wide, hidden.view(10, 3, 24).transpose(0, 1)):
        for w in (weight, weight.T.contiguous().T):
            results = []
            for h, ww in ((view, w), (view.contiguous(), w.contiguous())):
                leaf = {"hidden": h.detach().requires_grad_(), "weight": ww.detach().requires_grad_(), "bias": None}
                out = linear_logprobs(leaf["hidden"], leaf["weight"], targets, backend=backend)
                grads = torch.autograd.grad(out.logprobs.square().sum(), (leaf["hidden"], leaf["weight"]))
                assert out.logprobs.shape == (3, 10)
                results.append((out.logprobs, *grads))
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert results[0][1].shape == view.shape


def test_strided_targets_bias_and_temperature(backend, device):
    hidden, weight, targets, bias = problems.head(20, 130, 16, torch.float32, device, bias=True)
    temperature = torch.rand(20, device=device) + 0.5
    want = linear_logprobs(hidden, weight, targets, bias, temperature=temperature, backend=backend).logprobs

    def strided(x):
        return torch.stack((x, x * 0 + 7), 1)[:, 0]

    got = linear_logprobs(
        hidden, weight, strided(targets), strided(bias), temperature=strided(temperature), backend=backend
    ).logprobs
    assert torch.equal(got, want)
    scalar = linear_logprobs(hidden, weight, targets, temperature=torch.tensor(0.7, device=device), backend=backend)
    torch.testing.assert_close(
        scalar.logprobs, linear_logprobs(hidden, weight, targets, temperature=0.7, backend=backend).logprobs
    )
    same = linear_logprobs(hidden, weight, targets[:1].expand(20), bias[:1].expand(130), backend=backend).logprobs
    assert same.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_integer_targets(backend, device, dtype):
    hidden, weight, targets, _ = problems.head(20, 200, 16, torch.float32, device)
    narrow = linear_logprobs(hidden, weight, targets.clamp(max=120).to(dtype), backend=backend)
    wide = linear_logprobs(hidden, weight, targets.clamp(max=120), backend=backend)
    assert torch.equal(narrow.logprobs, wide.logprobs)


@pytest.mark.parametrize("softcap", [30.0, 200.0])
def test_softcap_keeps_fp32_accuracy(backend, device, softcap):
    hidden, weight, targets, _ = problems.head(40, 300, 32, torch.float32, device, peak=8.0)
    got = linear_logprobs(hidden, weight, targets, softcap=softcap, backend=backend).logprobs
    want = reference.linear_logprobs(hidden.double(), weight.double(), targets, softcap=softcap).logprobs
    assert (got - want).abs().max() < 1e-5


def test_upstream_of_an_ignored_row_scales_nothing(backend, device):
    """fp16: the power-of-two scale looks at the rows that take part alone."""
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float16, device)
    targets[3] = -100
    upstream = torch.randn(2, 20, device=device)
    _, _, want = run(linear_logprobs, leaves(hidden, weight, None), targets, upstream, backend=backend)
    upstream[:, 3] = 1e9
    _, _, got = run(linear_logprobs, leaves(hidden, weight, None), targets, upstream, backend=backend)
    assert torch.equal(got["weight"], want["weight"])


@pytest.mark.quick
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_each_combination_of_gradients(backend, device, needs):
    hidden, weight, targets, bias = problems.head(20, 130, 16, torch.float32, device, bias=True)
    full, part = (dict(zip(GRADS, (x.clone() for x in (hidden, weight, bias)))) for _ in range(2))
    for leaf, flags in ((full, (1, 1, 1)), (part, needs)):
        for name, flag in zip(GRADS, flags):
            leaf[name].requires_grad_(bool(flag))
        out = linear_logprobs(leaf["hidden"], leaf["weight"], targets, leaf["bias"], backend=backend)
        out.logprobs.sum().backward()
    for name, flag in zip(GRADS, needs):
        if flag:
            torch.testing.assert_close(part[name].grad, full[name].grad, rtol=1e-5, atol=1e-6)
        else:
            assert part[name].grad is None


@pytest.mark.quick
def test_ignored_rows_never_matter(backend, device):
    """-100 rows give 0 and no gradient, whatever they hold; a zero gradient drops its row."""
    hidden, weight, targets, _ = problems.head(40, 130, 16, torch.float32, device)
    off = torch.arange(40, device=device) % 3 == 0
    targets[off] = -100
    hidden[off] = torch.nan
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(h, w, targets, backend=backend, return_entropy=True)
    upstream = torch.randn(40, device=device)
    upstream[1::3] = 0
    (out.logprobs * upstream).sum().backward()
    assert out.logprobs[off].eq(0).all()
    assert out.entropy[off].eq(0).all()
    assert h.grad[off].eq(0).all()
    assert h.grad[1::3].eq(0).all()
    want = torch.zeros_like(w)
    on = ~off & (upstream != 0)
    leaf = leaves(hidden[on], weight, None)
    run(linear_logprobs, leaf, targets[on], upstream[on][None], backend=backend)
    want = leaf["weight"].grad
    torch.testing.assert_close(w.grad, want, rtol=1e-5, atol=1e-7)


def test_all_ignored_and_no_rows(backend, device):
    _, weight, _, _ = problems.head(1, 130, 16, torch.float32, device)
    for n in (0, 3):
        hidden = torch.randn(n, 16, device=device, requires_grad=True)
        w = weight.clone().requires_grad_()
        out = linear_logprobs(hidden, w, torch.full((n,), -100, device=device), return_entropy=True, backend=backend)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        assert out.logprobs.shape == (n,)
        assert out.logprobs.count_nonzero() == 0
        assert w.grad.count_nonzero() == 0
        assert hidden.grad.count_nonzero() == 0


def test_nan_and_inf_stay_in_their_row(backend, device):
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    clean = linear_logprobs(hidden, weight, targets, return_entropy=True, backend=backend)
    hidden[3, 2], hidden[5, 0] = torch.nan, torch.inf
    h = hidden.requires_grad_()
    dirty = linear_logprobs(h, weight, targets, return_entropy=True, backend=backend)
    keep = torch.ones(20, dtype=torch.bool, device=device)
    keep[[3, 5]] = False
    for a, b in zip(clean, dirty):
        torch.testing.assert_close(a[keep], b[keep], rtol=1e-6, atol=1e-6)
        assert b[3].isnan()
        assert not b[5].isfinite()
    dirty.logprobs.sum().backward()
    assert torch.isfinite(h.grad[keep]).all()
    assert h.grad[3].isnan().all()


def test_bias_of_minus_infinity_removes_a_column(backend, device):
    hidden, weight, targets, bias = problems.head(12, 130, 16, torch.float32, device, bias=True)
    bias[::2] = -torch.inf
    targets = targets // 2 * 2 + 1
    targets[0] = 4  # a removed label
    leaf = leaves(hidden, weight, bias)
    out = linear_logprobs(
        leaf["hidden"], leaf["weight"], targets, leaf["bias"], return_entropy=True, temperature=0.5, backend=backend
    )
    kept = torch.arange(1, 130, 2, device=device)
    want = reference.linear_logprobs(
        hidden.double(), weight[kept].double(), targets // 2, bias[kept].double(), return_entropy=True, temperature=0.5
    )
    assert out.logprobs[0] == -torch.inf
    torch.testing.assert_close(out.logprobs[1:].double(), want.logprobs[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)
    (out.logprobs[1:].sum() + out.entropy.sum()).backward()
    assert all(torch.isfinite(leaf[k].grad).all() for k in GRADS)
    assert leaf["weight"].grad[6::2].abs().max() < 1e-30


def test_bad_target_gives_nan_where_it_cannot_be_seen(backend, device, monkeypatch):
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    targets[4], targets[9] = 130, -1
    logp = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    bad = torch.zeros(20, dtype=torch.bool, device=device)
    bad[[4, 9]] = True
    assert torch.equal(logp.isnan(), bad)


@pytest.mark.parametrize("frozen", [False, True])
def test_workspace_changes_nothing(backend, device, frozen):
    hidden, weight, targets, bias = problems.head(140, 400, 32, torch.float32, device, bias=True)
    upstream = torch.randn(2, 140, device=device)
    results = []
    for size in (64, 0.15, 0.05):  # MiB: one chunk, four, eight
        leaf = leaves(hidden, weight, bias)
        if frozen:
            leaf["weight"].requires_grad_(False)
            leaf["bias"].requires_grad_(False)
        results.append(
            run(linear_logprobs, leaf, targets, upstream, return_entropy=True, backend=backend, workspace_mb=size)
        )
    whole, *parts = results
    for part in parts:
        for a, b in zip(whole[:2], part[:2]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for name in ("hidden",) if frozen else GRADS:
            assert problems.relative_error(part[2][name], whole[2][name]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch"])
def test_no_tensor_beyond_the_workspace(backend, dtype):
    n, vocab, depth = 512, 4096, 16
    hidden, weight, targets, _ = problems.head(n, vocab, depth, dtype)
    leaf = leaves(hidden, weight, None)
    with Largest() as seen:
        out = linear_logprobs(leaf["hidden"], leaf["weight"], targets, return_entropy=True, workspace_mb=1)
        out.logprobs.sum().backward()
    assert seen.numel <= max(2**20 // 4, vocab * depth, n * depth)
    with Largest() as naive:
        reference.linear_logprobs(hidden, weight, targets)
    assert naive.numel == n * vocab


def test_autocast_casts_tiles(backend, device):
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    low = [x.bfloat16() for x in (hidden, weight)]
    want = linear_logprobs(*low, targets, backend=backend).logprobs
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = linear_logprobs(h, w, targets, backend=backend).logprobs
        assert got.dtype == torch.float32
        got.sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert h.grad.dtype == w.grad.dtype == torch.float32
    assert h.grad.abs().sum() > 0


def test_mixed_dtypes_use_the_wider(backend, device):
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    hidden = hidden.bfloat16()
    got = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    want = linear_logprobs(hidden.float(), weight, targets, backend=backend).logprobs
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_deterministic(backend, device):
    hidden, weight, targets, bias = problems.head(50, 500, 32, torch.float32, device, bias=True)
    upstream = torch.randn(2, 50, device=device)
    first, second = (
        run(linear_logprobs, leaves(hidden, weight, bias), targets, upstream, return_entropy=True, backend=backend)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(first[2][k], second[2][k]) for k in GRADS)


def test_small_gradients_survive_fp16(device):
    """g = 1e-7 per token is below fp16's range; the power-of-two scale keeps it."""
    hidden, weight, targets, _ = problems.head(32, 200, 32, torch.float16, device)
    upstream = torch.randn(2, 32, device=device) * 1e-4
    h32 = {"hidden": hidden.float().requires_grad_(), "weight": weight.float().requires_grad_(), "bias": None}
    _, _, want = run(linear_logprobs, h32, targets, upstream, backend="torch")
    _, _, got = run(linear_logprobs, leaves(hidden, weight, None), targets, upstream, backend="triton")
    assert problems.relative_error(got["weight"], want["weight"]) < 5e-3


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_fp16_where_every_token_is_sure(device, backward):
    """Their dlogits, 1 - p, are less than a millionth of the upstream gradient; the others' p far below."""
    hidden, weight, targets, _ = problems.head(32, 200, 32, torch.float16, device, peak=100.0)
    tensors, upstream = leaves(hidden, weight, None), torch.full((2, 32), 2.0**15, device=device)
    _, _, got = run(linear_logprobs, tensors, targets, upstream, backend="triton", backward=backward)
    double = leaves(hidden.double(), weight.double(), None)
    logp, _, want = run(reference.linear_logprobs, double, targets, upstream.double())
    assert 0 < (-logp.expm1()).max() < 1e-6
    for name in ("hidden", "weight"):
        assert problems.relative_error(got[name], want[name]) < (1e-3 if backward == "exact" else 0.01), name


@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize("form", ["temperature", "temperatures", "scale"])
def test_fp16_with_steep_logits(device, backward, form):
    """Derivatives by the raw products that are 10,000 times those by the logits."""
    hidden, weight, targets, _ = problems.head(24, 130, 16, torch.float16, device)
    hidden = hidden * 1e-3
    steep = {"temperature": 1e-4, "temperatures": torch.full((24,), 1e-4, device=device), "scale": 1.0}[form]
    options = {"temperature": steep, "logit_scale": 1e4 if form == "scale" else 1.0}
    tensors, upstream = leaves(hidden, weight, None), torch.full((2, 24), 2.0**-6, device=device)
    _, _, got = run(linear_logprobs, tensors, targets, upstream, backend="triton", backward=backward, **options)
    double = leaves(hidden.double(), weight.double(), None)
    _, _, want = run(reference.linear_logprobs, double, targets, upstream.double(), **options)
    for name in ("hidden", "weight"):
        assert problems.relative_error(got[name], want[name]) < 0.01, name


def test_double_backward_is_an_error(backend, device):
    hidden, weight, targets, _ = problems.head(6, 50, 8, torch.float32, device)
    h = hidden.requires_grad_()
    logp = linear_logprobs(h, weight, targets, backend=backend).logprobs
    for loss in (logp.square().sum(), logp.sum()):
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        assert g.isfinite().all()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(g.sum(), h, allow_unused=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (loss + g.sum()).backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):  # not 0
        torch.autograd.functional.hessian(
            lambda x: linear_logprobs(x, weight, targets, backend=backend).logprobs.sum(), hidden.detach()
        )


def test_entropy_alone_has_a_gradient(backend, device):
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    leaf = leaves(hidden, weight, None)
    linear_logprobs(**leaf, targets=targets, return_entropy=True,
                    backend=backend).entropy.sum().backward()  # fmt: skip
    double = leaves(hidden.double(), weight.double(), None)
    reference.linear_logprobs(double["hidden"], double["weight"], targets, return_entropy=True).entropy.sum().backward()
    for name in ("hidden", "weight"):
        assert problems.relative_error(leaf[name].grad, double[name].grad) < 5e-6


def test_hint_changes_nothing(backend, device):
    hidden, weight, targets, _ = problems.head(20, 130, 16, torch.float32, device)
    plain = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    hinted = linear_logprobs(hidden, weight, targets, old_logprobs=torch.randn(20, device=device), backend=backend)
    assert torch.equal(plain, hinted.logprobs)
