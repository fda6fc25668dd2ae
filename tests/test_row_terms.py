"""What a tile of dlogits needs of each row: factor * 2^(value * rate - base) against fp64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastgrpo import linear_logprobs, reference
from fastgrpo.backends.problem import RowStats, negligible
from fastgrpo.kernels.arguments import Logits, Selection
from fastgrpo.kernels.row_terms import row_terms

import problems

N, V = 200, 50


def terms_of(device, grad, grad_entropy=None, temperature=None):
    """-> a logit of each row before its temperature, statistics and terms as float64 arrays; not of the last rows."""
    peak = torch.randn(N) * 300
    stats = RowStats(-torch.rand(N), peak, torch.rand(N) * 10, torch.rand(N), torch.rand(N) * 3)
    value = (peak - torch.rand(N) * 20) * (0.7 if temperature is None else temperature)
    order = torch.randperm(N)
    rows, count, targets = order.to(device), torch.tensor([N - 5], device=device), torch.randint(V, (N,), device=device)
    problem = SimpleNamespace(targets=targets, temperature=None if temperature is None else temperature.to(device))
    grads = [g.to(device) for g in (grad, grad_entropy) if g is not None]
    logits = Logits(1 / 0.7, None, None)
    stacked = torch.stack(stats).to(device)
    terms, lean, rate = row_terms(
        problem, Selection(rows, count, targets), stacked, grads, torch.ones((), device=device), V, logits
    )
    assert torch.equal(terms.label_ptr[: N - 5].long(), targets[rows[: N - 5]])
    assert (terms.label_ptr[N - 5 :] == -1).all()
    assert (terms.factor_ptr[N - 5 :] == 0).all()

    def numbers(x):
        return None if x is None else x[: N - 5].cpu().double().numpy()

    def ordered(x):
        return x[order[: N - 5]].double().numpy()

    inverse = np.float32(1 / 0.7) if temperature is None else 1 / ordered(temperature).astype(np.float32)
    return SimpleNamespace(
        value=ordered(value), inverse=inverse.astype(np.float64), order=order,
        rate=(inverse * np.float32(np.log2(np.e))).astype(np.float64) if rate is None else numbers(rate),
        base=numbers(terms.base_ptr), factor=numbers(terms.factor_ptr), at_label=numbers(terms.at_label_ptr),
        lean=numbers(lean), **{name: ordered(x) for name, x in stats._asdict().items()},
    )  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("own", [False, True], ids=["one temperature", "temperatures"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_terms(device, own, with_entropy):
    """Logits of hundreds and one rounded exponent: no digit is lost to what cancels."""
    grad, grad_entropy = torch.randn(N), torch.randn(N) if with_entropy else None
    row = terms_of(device, grad, grad_entropy, torch.rand(N) + 0.5 if own else None)
    g, h = (0 if x is None else x[row.order[: N - 5]].double().numpy() * row.inverse for x in (grad, grad_entropy))
    log_p = row.value * row.inverse - row.peak - row.offset
    exponent = (row.value * row.rate - row.base).astype(np.float32).astype(np.float64)
    factor = row.factor + (row.lean * exponent if with_entropy else 0)
    true = -(g + h * (log_p + row.entropy))
    error = np.abs(factor * np.exp2(exponent) / np.exp(log_p) - true)
    assert error.max() < 4e-6 * np.abs(true).max()  # the rounding of an exponent of 30 alone is 2e-6
    p = np.exp(row.logp)
    at_label = g * row.other_mass - h * p * (row.logp + row.entropy)
    np.testing.assert_allclose(row.at_label, at_label, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_what_exp2_flushes_is_dust(device):
    """Exponents below -126 are those of dlogits below 2^-106, of gradients of any size; none overflows."""
    grad = torch.randn(N) * torch.logspace(-25, 25, N)
    row = terms_of(device, grad)
    dust = np.log2(negligible(torch.float32))
    assert np.abs(np.log2(np.abs(row.factor)) - 126 - dust).max() < 1.01
    tiny = terms_of(device, torch.tensor([0.0, 1e-38, -1e-45, 1e-33]).repeat(N // 4))
    assert np.isfinite(tiny.base).all()
    assert (np.abs(tiny.factor) < 2.0**21).all()
    assert (tiny.at_label == 0).all()
    assert np.isnan(terms_of(device, torch.full((N,), float("nan"))).factor).all()


def test_large_logits_at_a_temperature(device):
    """z = logit / temperature is not rounded on its way: forward and backward mean the same numbers."""
    hidden, weight = torch.randn(24, 32) * 20, torch.randn(V, 32)
    targets, upstream = torch.randint(V, (24,)), torch.randn(24)

    def run(function, dtype, **options):
        x, w = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
        logp = function(x, w, targets.to(device), temperature=0.7, **options).logprobs
        return torch.autograd.grad(logp, (x, w), upstream.to(device, logp.dtype))

    truth, same = run(reference.linear_logprobs, torch.float64), run(reference.linear_logprobs, torch.float32)
    for ours, true, theirs in zip(run(linear_logprobs, torch.float32, backend="triton"), truth, same):
        assert problems.relative_error(ours, true) < 2 * problems.relative_error(theirs, true) + 1e-7
