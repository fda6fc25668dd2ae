"""Top-k targets against full logits in fp64: log-probs, the mass of the rest, and all gradients."""

import itertools

import pytest
import torch

from fastgrpo import LogProbs, grpo_loss, linear_logprobs, reference, topk, vocab_parallel
from fastgrpo.backends import torch_backend

import problems
from watchers import Largest, NoSync, forbid_lists

NAMES = ("hidden", "weight", "bias")
EVERYTHING = {"temperature": "tensor", "softcap": 5.0, "logit_scale": 0.5, "return_entropy": True}


def draw(n, vocab, depth, k, dtype=torch.float32, device="cpu", peak=0.0, scale=1.0):
    """-> tensors by name, ids (n, k): some slots without one, a row of such slots alone."""
    hidden, weight, targets, bias = problems.head(n, vocab, depth, torch.float64, bias=True, peak=peak)
    g = torch.Generator().manual_seed(k)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(n)])
    ids[:, 0] = torch.where((ids == targets[:, None]).any(1), ids[:, 0], targets)
    if n > 4:
        ids[1] = -100
        ids[2, -1] = -100
        ids[3, : k // 2] = -100
    tensors = {"hidden": scale * hidden, "weight": weight, "bias": bias}
    return {name: x.to(device, dtype) for name, x in tensors.items()}, ids.to(device)


def upstream(out):
    """A weighted sum of everything returned."""
    g, total = torch.Generator().manual_seed(9), 0.0
    for x in (out.logprobs, out.rest, out.entropy):
        if x is not None:
            total = total + (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device, x.dtype)).sum()
    return total


def run(op, tensors, ids, temperature=1.0, lora=None, needs=NAMES, **options):
    """-> results, gradients by name."""
    leaf = problems.with_grad(tensors, needs)
    if temperature == "tensor":
        temperature = torch.linspace(0.5, 1.5, ids[..., 0].numel(), device=ids.device).view(ids.shape[:-1])
    adapter = None
    if lora is not None:
        adapter = (*(x.detach().requires_grad_() for x in lora), 0.5)
    out = op(leaf["hidden"], leaf["weight"], ids, leaf["bias"], temperature=temperature, lora=adapter, **options)
    upstream(out).backward()
    grads = {name: leaf[name].grad for name in needs}
    return out, grads | ({} if lora is None else {"A": adapter[0].grad, "B": adapter[1].grad})


def widen(tensors):
    return {name: x.double() for name, x in tensors.items()}


def check(got, want, tolerance, values=None):
    (out, grads), (true, true_grads) = got, want
    for name in ("logprobs", "rest", "entropy"):
        mine, theirs = getattr(out, name), getattr(true, name)
        if theirs is not None:
            values = 8 * tolerance if values is None else values
            torch.testing.assert_close(mine.detach().double(), theirs.detach().double(), rtol=values, atol=values)
    for name, x in true_grads.items():
        error = problems.relative_error(grads[name], x)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(("k", "softcap", "entropy"), list(itertools.product((1, 5), (None, 4.0), (False, True))))
def test_gradcheck(backend, device, k, softcap, entropy):
    if backend == "triton" and (k == 1 or entropy != bool(softcap)):
        pytest.skip("the torch backend has them all")
    n, vocab, depth = (5, 13, 3) if backend == "torch" else (6, 37, 5)
    tensors, ids = draw(n, vocab, depth, k, torch.float64, device)
    a, b = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((2, depth), (vocab, 2)))

    def op(function, **options):
        def call(h, w, bias, a, b):
            out = function(h, w, ids, bias, lora=(a, b, 0.5), temperature=0.8, softcap=softcap, return_entropy=entropy,
                           **options)  # fmt: skip
            return tuple(x for x in out if x is not None)

        return call

    inputs = [*tensors.values(), a, b]
    if backend == "torch":
        assert torch.autograd.gradcheck(op(linear_logprobs), [x.requires_grad_() for x in inputs])
    else:
        fast, truth = op(linear_logprobs, backend=backend), op(reference.linear_logprobs)
        problems.gradcheck(fast, truth, inputs, torch.float32, atol=2e-5, rtol=2e-5, fast_mode=True)


@pytest.mark.parametrize(("k", "peak", "backward", "options"), [
    (1, 0.0, "exact", {}), (1, 12.0, "certified", EVERYTHING), (5, 12.0, "exact", EVERYTHING),
    (5, 0.0, "certified", {}), (64, 0.0, "exact", EVERYTHING), (64, 12.0, "certified", {}),
])  # fmt: skip
def test_fp32_against_fp64(backend, device, k, peak, backward, options):
    """Ragged, flat and peaked; one tile and several, chunks of pairs."""
    tensors, ids = draw(37, 200, 24, k, device=device, peak=peak)
    small = {"workspace_mb": 0.02} if peak else {}
    got = run(linear_logprobs, tensors, ids, backend=backend, backward=backward, tolerance=1e-5, **small, **options)
    check(got, run(reference.linear_logprobs, widen(tensors), ids, **options), 3e-6)


def test_batches_lora_and_hints(backend, device):
    tensors, ids = draw(24, 150, 16, 4, device=device)
    tensors["hidden"], ids = tensors["hidden"].view(3, 8, 16), ids.view(3, 8, 4)
    lora = torch.randn(3, 16, device=device), torch.randn(150, 3, device=device) / 4
    got = run(linear_logprobs, tensors, ids, "tensor", lora, backend=backend, backward="certified", tolerance=1e-5,
              old_logprobs=-torch.rand(ids.shape, device=device))  # fmt: skip
    want = run(reference.linear_logprobs, widen(tensors), ids, "tensor", [x.double() for x in lora])
    assert got[0].logprobs.shape == (3, 8, 4)
    assert got[0].rest.shape == (3, 8)
    check(got, want, 3e-6)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",)], ids=str)
def test_what_is_not_needed(backend, device, needs):
    tensors, ids = draw(20, 90, 16, 4, device=device)
    got = run(linear_logprobs, tensors, ids, needs=needs, backend=backend)
    want = run(reference.linear_logprobs, widen(tensors), ids, needs=needs)
    check(got, want, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(backend, device, dtype):
    tensors, ids = draw(40, 300, 64, 6, dtype, device, scale=2.0)
    got = run(linear_logprobs, tensors, ids, backend=backend)
    want = run(reference.linear_logprobs, widen(tensors), ids)
    naive = run(reference.linear_logprobs, tensors, ids)
    assert (got[0].logprobs - want[0].logprobs).abs().max() < 2e-5
    assert (got[0].rest - want[0].rest).abs().max() < 2e-5
    for name in NAMES:
        mine, theirs = (problems.relative_error(g[1][name], want[1][name]) for g in (got, naive))
        assert mine < 2 * theirs, (name, mine, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_one_target_is_the_plain_op(backend, device, options):
    tensors, ids = draw(33, 130, 16, 1, device=device, peak=9.0)
    (out, grads), want = (
        run(targets_alone(op), tensors, ids, backend=backend, **options) for op in (linear_logprobs, plain)
    )
    torch.testing.assert_close(out[:2], want[0][:2], rtol=1e-6, atol=1e-6)
    for name in NAMES:
        assert problems.relative_error(grads[name], want[1][name]) < 1e-6


def plain(hidden, weight, ids, bias, **options):
    """The ordinary op in the shape of top-k's result."""
    out = linear_logprobs(hidden, weight, ids[:, 0], bias, **options)
    assert out.rest is None
    return out._replace(logprobs=out.logprobs[:, None])


def targets_alone(op):
    """The op without the rest, which reaches every entry."""
    return lambda *tensors, **options: LogProbs(*op(*tensors, **options)[:2])


def nearly_everything(device, dtype, n=40, vocab=300, depth=16, k=6):
    """hidden, weight, ids: k entries hold 1 - R of each row, R from 0.8 down to 1e-11."""
    hidden, weight = torch.randn(n, depth) / 3, torch.randn(vocab, depth)
    weight[:, 0] = 0.0
    weight[:k, 0], hidden[:, 0] = 1.0, torch.linspace(2.0, 30.0, n)
    return hidden.to(device, dtype), weight.to(device, dtype), torch.arange(k, device=device).repeat(n, 1)


def kl(out, teacher):
    """Over the top k and the rest, but for the teacher's entropy."""
    return -(teacher[:, :-1] * out.logprobs).sum() - (teacher[:, -1] * out.rest).sum()


@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("near", [False, True])
def test_a_rest_of_next_to_nothing(backend, device, dtype, backward, near):
    """Relative accuracy of the rest's mass, and gradients as good beside a teacher as far from it."""
    hidden, weight, ids = nearly_everything(device, dtype)
    leaf = [x.requires_grad_() for x in (hidden, weight)]
    true = [x.detach().double().requires_grad_() for x in leaf]
    out = linear_logprobs(*leaf, ids, backend=backend, backward=backward)
    want = reference.linear_logprobs(*true, ids)
    assert want.rest.exp().min() < 1e-10
    torch.testing.assert_close(out.rest.double(), want.rest, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logprobs.double(), want.logprobs, rtol=0, atol=1e-5)
    teacher = torch.rand(len(ids), ids.shape[1] + 1, dtype=torch.float64, device=device)
    teacher = teacher / teacher.sum(1, keepdim=True)
    if near:  # within 5 %: each of 1, 1 - R and R is
        student = torch.cat((want.logprobs, want.rest[:, None]), 1).detach().exp()
        teacher = student * (1 + 0.05 * (2 * teacher - 1))
    grads = torch.autograd.grad(kl(out, teacher.float()), leaf)
    errors = [problems.relative_error(g, t) for g, t in zip(grads, torch.autograd.grad(kl(want, teacher), true))]
    assert max(errors) < (4e-3 if dtype == torch.bfloat16 else 2e-4 if near else 3e-6), errors


@pytest.mark.quick
def test_probabilities_add_up_to_1(backend, device):
    tensors, ids = draw(33, 120, 16, 9, device=device)
    out = linear_logprobs(tensors["hidden"], tensors["weight"], ids, backend=backend)
    counted = (ids != -100).any(1)
    mass = torch.where(ids != -100, out.logprobs.exp(), 0.0).sum(1) + out.rest.exp()
    torch.testing.assert_close(mass[counted], torch.ones_like(mass[counted]))
    assert (out.rest[~counted] == 0).all()
    assert (out.logprobs[ids == -100] == 0).all()


@pytest.mark.parametrize("bias", [None, -torch.inf])
def test_the_whole_vocabulary(backend, device, bias):
    """Nothing is left, or nothing that can be: the rest's log is -inf, and the gradients are those of the targets."""
    n, vocab, held = 7, 40, 40 if bias is None else 36
    hidden, weight, *_ = problems.head(n, vocab, 16, torch.float32, device)
    b = None if bias is None else torch.zeros(vocab, device=device).index_fill_(0, torch.arange(36, 40), bias)
    ids = torch.arange(held, device=device).repeat(n, 1)
    leaf = [x.requires_grad_() for x in (hidden, weight)]
    out = linear_logprobs(*leaf, ids, b, backend=backend, return_entropy=True)
    assert (out.rest == -torch.inf).all()
    grads = torch.autograd.grad(out.logprobs[:, ::3].sum() + out.entropy.sum(), leaf)
    true = [x.detach().double().requires_grad_() for x in leaf]
    p = (true[0] @ true[1][:held].T).log_softmax(1)
    want = torch.autograd.grad(p[:, ::3].sum() - (p.exp() * p).sum(), true)
    torch.testing.assert_close(out.logprobs.double(), p, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, want):
        assert problems.relative_error(mine, theirs) < 2e-6


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_targets_without_any_mass(backend, device, backward):
    """A bias of -inf rules out all targets of some rows: the rest is everything there, in its gradients too."""
    n, vocab = 9, 70
    hidden, weight, *_ = problems.head(n, vocab, 16, torch.float32, device)
    bias = torch.zeros(vocab, device=device).index_fill_(0, torch.arange(8, device=device), -torch.inf)
    ids = torch.arange(3, device=device).repeat(n, 1)
    ids[::2, 1:], ids[4, 2] = torch.tensor([6, 40], device=device), -100  # 40 has some
    leaf = [x.requires_grad_() for x in (hidden, weight)]
    true = [x.detach().double().requires_grad_() for x in leaf]
    results = []
    for tensors, b, op, options in (
        (leaf, bias, linear_logprobs, {"backend": backend, "backward": backward}),
        (true, bias.double(), reference.linear_logprobs, {}),
    ):
        out = op(*tensors, ids, b, return_entropy=True, **options)
        total = (out.rest * torch.linspace(0.5, 2.0, n, device=device)).sum() + out.entropy.sum()
        results.append((out, torch.autograd.grad(total, tensors)))
    (out, grads), (want, true_grads) = results
    for name in ("logprobs", "rest", "entropy"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, true_grads):
        assert problems.relative_error(mine, theirs) < 2e-6


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_a_single_position(backend, device, backward):
    tensors, ids = draw(1, 60, 16, 5, device=device)
    assert topk.make_pairs(ids, 60).rows.is_contiguous()  # kernels know of no stride
    got = run(linear_logprobs, tensors, ids, backend=backend, backward=backward, tolerance=1e-5)
    check(got, run(reference.linear_logprobs, widen(tensors), ids), 3e-6)


def test_slots_without_an_id_are_not_read(backend, device):
    """Nor is a row without any; a NaN there reaches nothing."""
    tensors, ids = draw(12, 80, 16, 5, device=device)
    want = run(linear_logprobs, tensors, ids, backend=backend)
    tensors["hidden"][1] = torch.nan
    got = run(linear_logprobs, tensors, ids, backend=backend)
    assert torch.equal(got[0].logprobs, want[0].logprobs)
    assert all(torch.equal(got[1][name], want[1][name]) for name in NAMES)
    assert (got[1]["hidden"][1] == 0).all()
    none = run(linear_logprobs, tensors, torch.full_like(ids, -100), backend=backend)
    assert (none[0].rest == 0).all()
    assert all((x == 0).all() for x in none[1].values())


def test_the_order_of_a_row_does_not_matter(backend, device):
    tensors, ids = draw(20, 300, 16, 7, device=device)
    order = torch.rand(ids.shape, device=device).argsort(1)
    first, second = (
        linear_logprobs(tensors["hidden"], tensors["weight"], x, backend=backend) for x in (ids, ids.gather(1, order))
    )
    torch.testing.assert_close(first.logprobs.gather(1, order), second.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.rest, second.rest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_certified_leaves_out_what_it_may(device, frozen, monkeypatch):
    """Within the tolerance, and not everything is done."""
    called = []
    plain_backward = torch_backend.certified_backward
    monkeypatch.setattr(torch_backend, "certified_backward", lambda *a: called.append(a) or plain_backward(*a))
    tensors, ids = draw(300, 4000, 32, 5, device=device, peak=30.0)
    needs = NAMES[: 1 if frozen else 3]
    got = run(targets_alone(linear_logprobs), tensors, ids, needs=needs, backend="torch", backward="certified",
              tolerance=0.05)  # fmt: skip
    want = run(targets_alone(reference.linear_logprobs), widen(tensors), ids, needs=needs)
    assert called
    errors = [problems.relative_error(got[1][name], want[1][name]) for name in needs]
    assert 1e-6 < max(errors) < 0.05, errors


def test_autocast(backend, device):
    tensors, ids = draw(30, 200, 32, 4, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = run(linear_logprobs, tensors, ids, backend=backend)
    rounded = {name: x.bfloat16().double() if name != "bias" else x.double() for name, x in tensors.items()}
    want = run(reference.linear_logprobs, rounded, ids)
    torch.testing.assert_close(got[0].rest.double(), want[0].rest, rtol=1e-5, atol=1e-5)
    assert all(problems.relative_error(got[1][name], want[1][name]) < 5e-3 for name in NAMES)


def test_deterministic(backend, device):
    tensors, ids = draw(33, 100, 40, 6, device=device)
    first, second = (run(linear_logprobs, tensors, ids, backend=backend) for _ in range(2))
    assert torch.equal(first[0].rest, second[0].rest)
    assert all(torch.equal(first[1][k], second[1][k]) for k in NAMES)


def test_no_logits_and_no_gathered_rows(backend, device):
    """Nothing of size N V, and of N K D a workspace."""
    n, vocab, depth, k = 64, 512, 32, 32
    tensors, ids = draw(n, vocab, depth, k, device=device)
    with Largest() as seen:
        run(linear_logprobs, tensors, ids, backend=backend, workspace_mb=0.02)
    size = 1 if backend == "torch" else 4  # the interpreter counts in bytes
    assert seen.numel <= size * vocab * depth < size * n * k * depth


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_the_host_does_not_wait(device, backward, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    tensors, ids = draw(20, 90, 16, 5, device=device)
    run(linear_logprobs, tensors, ids, backend="triton", backward=backward)  # uploads what an audit reads
    forbid_lists(monkeypatch)
    with NoSync():
        entropy = backward == "exact"
        run(linear_logprobs, tensors, ids, backend="triton", backward=backward, return_entropy=entropy)


HIDDEN, WEIGHT = torch.ones(3, 8), torch.ones(50, 8)
IDS = torch.arange(6).view(3, 2)
ERRORS = {
    "high": ({"targets": IDS + 45}, r"targets must be in \[0, 50\) or -100"),
    "negative": ({"targets": IDS - 1}, r"targets must be in \[0, 50\) or -100"),
    "twice": ({"targets": torch.tensor([[0, 1], [2, 2], [-100, -100]])}, "targets must not repeat.*position 1"),
    "none": ({"targets": IDS[:, :0]}, r"targets of top-k must have shape \(3, 'K'\), K at least 1, got \(3, 0\)"),
    "rows": ({"targets": IDS[:2]}, r"targets of top-k must have shape \(3, 'K'\), K at least 1, got \(2, 2\)"),
    "floats": ({"targets": IDS.float()}, "targets must be an integer tensor"),
    "support": ({"support": (IDS.flatten(), torch.arange(4) * 2)}, "support must be None with top-k targets"),
    "temperature": ({"temperature": torch.ones(3, 2)}, r"temperature must be a number or a tensor of shape \(3,\)"),
    "old": ({"old_logprobs": torch.zeros(3)}, r"old_logprobs must have the shape of targets, \(3, 2\), got \(3,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changed, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        linear_logprobs(HIDDEN, WEIGHT, **{"targets": IDS, **changed})


def test_who_takes_no_top_k():
    with pytest.raises(ValueError, match="targets must have shape"):
        grpo_loss(HIDDEN[None], WEIGHT, IDS[None], torch.ones(1))
    options = vocab_parallel.HeadOptions()
    with pytest.raises(ValueError, match="targets must have shape"):
        options.check(HIDDEN, WEIGHT, IDS)


@pytest.mark.parametrize("name", ["high", "twice"])
def test_what_only_the_device_sees_is_nan(backend, device, name, monkeypatch):
    """In its row alone, gradients included."""
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    ids = {"high": [[0, 1], [2, 50], [-100, 3]], "twice": [[0, 1], [2, 2], [-100, 3]]}[name]
    hidden, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (3, 50))
    out = linear_logprobs(hidden, weight, torch.tensor(ids, device=device), backend=backend)
    assert out.rest.isnan().tolist() == [False, True, False]
    assert out.logprobs.isnan().any(1).tolist() == [False, True, False]
    (out.logprobs[::2].sum() + out.rest[::2].sum()).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_a_row_without_a_gradient_is_not_read(backend, device, backward):
    """Whatever its hidden state, as with one target a row."""
    tensors, ids = draw(300, 500, 16, 4, device=device)
    tensors["hidden"][7] = torch.inf
    leaf = problems.with_grad(tensors, NAMES)
    out = linear_logprobs(leaf["hidden"], leaf["weight"], ids, leaf["bias"], backend=backend, backward=backward)
    assert out.rest[7].isnan()
    counted = (torch.arange(300, device=device) != 7).to(out.rest.dtype)
    torch.autograd.backward((out.logprobs, out.rest), (counted[:, None].expand_as(out.logprobs), counted))
    assert all(leaf[name].grad.isfinite().all() for name in ("hidden", "weight", "bias"))


@pytest.mark.quick
def test_fp16_entropy_of_rows_that_are_sure(backend, device):
    """The rest's own entropy gradient is not small where the row's is."""
    tensors, _ = draw(24, 300, 32, 3, torch.float16, device, peak=12.0)
    tensors["bias"] = torch.zeros_like(tensors["bias"])
    ids = (tensors["hidden"].float() @ tensors["weight"].float().T).topk(3, 1).indices
    grads = []
    for op, given, options in (
        (linear_logprobs, tensors, {"backend": backend}),
        (reference.linear_logprobs, widen(tensors), {}),
    ):
        leaf = problems.with_grad(given, ("hidden", "weight"))
        out = op(leaf["hidden"], leaf["weight"], ids, return_entropy=True, **options)
        (2.0**8 * out.entropy.sum()).backward()
        grads.append({name: leaf[name].grad for name in ("hidden", "weight")})
    for name, want in grads[1].items():
        assert problems.relative_error(grads[0][name], want) < 1e-3, name
