"""LoRA on the head: the low-rank term in the same accumulator, against the reference with a merged weight in fp64."""

import itertools

import pytest
import torch

from fastgrpo import GRPOLossConfig, grpo_loss, linear_logprobs, reference

import problems
from watchers import Largest, NoSync, forbid_lists

NAMES = ("hidden", "weight", "bias", "A", "B")
SCALING = 1.7
SHAPES = [(33, 1000, 40, 3), (17, 1408, 33, 16), (5, 1, 8, 1), (70, 129, 64, 40)]
EVERYTHING = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "return_entropy": True}


def make(n, vocab, depth, rank, dtype=torch.float32, device="cpu", peak=6.0):
    """-> tensors by name, targets (n,)."""
    hidden, weight, targets, bias = problems.head(n, vocab, depth, dtype, device, bias=True, peak=peak)
    g = torch.Generator().manual_seed(1)
    a = torch.randn(rank, depth, generator=g) / depth**0.5
    b = torch.randn(vocab, rank, generator=g) / rank**0.5
    if n > 2:
        targets[1] = -100
    return dict(zip(NAMES, (hidden, weight, bias, a.to(device, dtype), b.to(device, dtype)))), targets


def run(op, tensors, targets, needs=NAMES, **options):
    """-> log-probs, entropy, gradients by name."""
    leaf = problems.with_grad(tensors, needs)
    h, w, bias, a, b = (leaf[k] for k in NAMES)
    out = op(h, w, targets, bias, lora=(a, b, SCALING), **options)
    total = (out.logprobs * torch.arange(1, len(targets) + 1, device=h.device) / len(targets)).sum()
    if out.entropy is not None:
        total = total + (out.entropy * torch.arange(len(targets), 0, -1, device=h.device) / len(targets)).sum()
    total.backward()
    return out.logprobs.detach(), out.entropy, {k: leaf[k].grad for k in needs}


def doubled(tensors):
    return {k: v.double() for k, v in tensors.items()}


@pytest.mark.parametrize(("softcap", "entropy"), list(itertools.product((None, 4.0), (False, True))))
def test_gradcheck(backend, device, softcap, entropy):
    size = (6, 13, 4, 2) if backend == "torch" else (10, 37, 7, 3)  # in full mode every entry is moved, twice
    tensors, targets = make(*size, torch.float64, device)

    def op(function, **options):
        def call(h, w, bias, a, b):
            out = function(
                h, w, targets, bias, lora=(a, b, SCALING), temperature=0.8, softcap=softcap, return_entropy=entropy,
                **options,
            )  # fmt: skip
            return tuple(x for x in out if x is not None)

        return call

    inputs = [tensors[k] for k in NAMES]
    if backend == "torch":
        assert torch.autograd.gradcheck(op(linear_logprobs), [x.requires_grad_() for x in inputs])
    else:
        fast, truth = op(linear_logprobs, backend=backend), op(reference.linear_logprobs)
        problems.gradcheck(fast, truth, inputs, torch.float32, atol=2e-5, rtol=2e-5, fast_mode=True)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_against_fp64(backend, device, shape, options):
    tensors, targets = make(*shape, device=device)
    logp, entropy, grads = run(linear_logprobs, tensors, targets, backend=backend, **options)
    want = run(reference.linear_logprobs, doubled(tensors), targets, **options)
    torch.testing.assert_close(logp.double(), want[0], rtol=2e-6, atol=1e-6)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), want[1], rtol=2e-6, atol=2e-6)
    for name in NAMES:
        error = problems.relative_error(grads[name], want[2][name])
        assert error < 3e-6 or want[2][name].norm() < 1e-9, (name, error)


@pytest.mark.parametrize("backward", ["exact", "certified"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_log_probs_are_exact_and_gradients_as_good_as_gemms(backend, device, dtype, backward):
    tensors, targets = make(150, 1000, 64, 16, dtype, device, peak=12.0)
    logp, _, grads = run(linear_logprobs, tensors, targets, backend=backend, backward=backward)
    want = run(reference.linear_logprobs, doubled(tensors), targets)
    naive = run(reference.linear_logprobs, tensors, targets)
    assert (logp - want[0]).abs().max() < 1e-5
    assert (naive[0] - want[0]).abs().max() > 1e-3  # what a merged 16-bit weight loses
    for name in NAMES:
        mine, theirs = (problems.relative_error(g[name], want[2][name]) for g in (grads, naive[2]))
        assert mine < 2 * theirs, (name, mine, theirs)
        assert grads[name].dtype == dtype


@pytest.mark.parametrize(
    "needs", [("A", "B"), ("A",), ("B",), ("hidden",), ("hidden", "A", "B"), ("weight", "B")], ids=str
)
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_each_combination_of_gradients(backend, device, needs, backward):
    tensors, targets = make(70, 300, 24, 4, device=device)
    options = {"backend": backend, "backward": backward, "tolerance": 1e-4}
    whole = run(linear_logprobs, tensors, targets, backend="torch")[2]
    part = run(linear_logprobs, tensors, targets, needs, **options)[2]
    for name in needs:
        assert problems.relative_error(part[name], whole[name]) < 2e-5


def test_a_frozen_head_is_never_copied():
    tensors, targets = make(256, 8192, 64, 4)
    with Largest() as seen:
        run(linear_logprobs, tensors, targets, ("hidden", "A", "B"), workspace_mb=0.5)
    assert seen.numel < 8192 * 64 / 2


@pytest.mark.quick
def test_an_ignored_row_may_hold_anything(backend, device):
    tensors, targets = make(9, 50, 8, 2, device=device)
    want = run(linear_logprobs, tensors, targets, backend=backend)
    tensors["hidden"][1] = torch.nan
    got = run(linear_logprobs, tensors, targets, backend=backend)
    torch.testing.assert_close(got[0], want[0])
    for name in NAMES:
        torch.testing.assert_close(got[2][name], want[2][name])


@pytest.mark.quick
def test_strides_and_three_dimensions(backend, device):
    tensors, targets = make(12, 50, 8, 3, device=device)
    want = run(linear_logprobs, tensors, targets, backend=backend)
    hidden = tensors["hidden"].view(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    a, b = tensors["A"].t().contiguous().t(), tensors["B"].t().contiguous().t()
    assert not any(x.is_contiguous() for x in (hidden, a, b))
    a.requires_grad_()
    out = linear_logprobs(
        hidden, tensors["weight"], targets.view(3, 4), tensors["bias"], lora=(a, b, SCALING), backend=backend
    )
    torch.testing.assert_close(out.logprobs.flatten(), want[0])
    (out.logprobs.flatten() * torch.arange(1, 13, device=device) / 12).sum().backward()
    torch.testing.assert_close(a.grad, want[2]["A"])


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "entropy_coef": 0.1}], ids=str)
def test_loss(backend, device, settings):
    config = GRPOLossConfig(**settings)
    batch = {k: problems.cast(v, torch.float32, device) for k, v in problems.batch().items()}
    a, b = torch.randn(3, 16, device=device) / 4, torch.randn(53, 3, device=device)
    results = []
    for op, dtype, extra in (
        (grpo_loss, torch.float32, {"backend": backend}),
        (reference.grpo_loss, torch.float64, {}),
    ):
        leaf = problems.with_grad(
            {k: problems.cast(v, dtype, device) for k, v in {**batch, "A": a, "B": b}.items()}, NAMES
        )
        lora = (leaf.pop("A"), leaf.pop("B"), SCALING)
        loss = op(config=config, lora=lora, **leaf, **extra).loss
        loss.backward()
        results.append((loss.detach(), leaf["hidden"].grad, leaf["weight"].grad, lora[0].grad, lora[1].grad))
    for mine, want in zip(*results):
        assert problems.relative_error(mine, want) < 3e-6


def test_zero_b_changes_nothing(backend, device):
    """As LoRA starts: the same log-probs bit for bit, and a gradient for B alone."""
    tensors, targets = make(20, 90, 16, 4, device=device)
    tensors["B"].zero_()
    logp, _, grads = run(linear_logprobs, tensors, targets, backend=backend)
    plain = linear_logprobs(tensors["hidden"], tensors["weight"], targets, tensors["bias"], backend=backend)
    assert torch.equal(logp, plain.logprobs)
    assert grads["A"].count_nonzero() == 0
    assert grads["B"].count_nonzero() > 0


def test_the_host_does_not_wait(device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fastgrpo.inputs.checks_values", lambda device: False)
    tensors, targets = make(20, 90, 16, 4, device=device)
    forbid_lists(monkeypatch)
    with NoSync():
        run(linear_logprobs, tensors, targets, backend="triton", return_entropy=True)


ERRORS = {
    "no tuple": (torch.ones(2, 8), r"lora must be a tuple \(A, B, scaling\), got Tensor"),
    "two": ((torch.ones(2, 8), torch.ones(50, 2)), "lora must be a tuple.*got a tuple of 2"),
    "A": ((torch.ones(2, 9), torch.ones(50, 2), 1.0), r"lora A must be \(r, D\) with D = 8, got shape \(2, 9\)"),
    "rank 0": ((torch.ones(0, 8), torch.ones(50, 0), 1.0), "lora A must be"),
    "B": ((torch.ones(2, 8), torch.ones(2, 50), 1.0), r"lora B must be \(V, r\) = \(50, 2\), got shape \(2, 50\)"),
    "scaling": ((torch.ones(2, 8), torch.ones(50, 2), float("nan")), "lora scaling must be a finite number"),
    "double": ((torch.ones(2, 8).double(), torch.ones(50, 2), 1.0), "lora A and hidden must both be float64"),
    "float8": ((torch.ones(2, 8).to(torch.float8_e4m3fn), torch.ones(50, 2), 1.0), "lora A must be float32.*float8"),
    "int": ((torch.ones(2, 8), torch.ones(50, 2).long(), 1.0), "lora B must be a floating point tensor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    lora, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        linear_logprobs(torch.ones(3, 8), torch.ones(50, 8), torch.arange(3), lora=lora)
    with pytest.raises(TypeError, match=r"lora A must be a torch\.Tensor, got list"):
        linear_logprobs(torch.ones(3, 8), torch.ones(50, 8), torch.arange(3), lora=([[1.0]], torch.ones(50, 2), 1.0))
