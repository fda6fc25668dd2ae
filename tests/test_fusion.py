"""Compilers fuse a product with what is added to it, and GPUs divide to 2 units of the last place; the interpreter does
neither, unless told to. What cancels must not depend on it."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastgrpo import linear_divergence, linear_logprobs, reference

import interpreter
import problems

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a compiler fuses by itself")
N, V, D = 32, 300, 32


@triton.jit
def cancel_kernel(x_ptr, out_ptr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    square = x * x
    if SIDE == 0:
        out = square - 1.0
    elif SIDE == 1:
        out = 1.0 - square
    elif SIDE == 2:
        out = square + -1.0
    else:
        out = tl.fma(x, x, 0.0) - 1.0
    tl.store(out_ptr + tl.arange(0, BLOCK), out)


@pytest.mark.quick
@pytest.mark.parametrize("side", range(4))
def test_products_are_fused(side):
    x = 1 + 2**-12 * torch.arange(1, 17, dtype=torch.float32)
    exact = (x.double() ** 2 - 1).float() * (-1 if side == 1 else 1)
    out = torch.empty_like(x)
    cancel_kernel[(1,)](x, out, SIDE=side, BLOCK=16)
    assert not torch.equal(out, exact)
    with interpreter.fused():
        cancel_kernel[(1,)](x, out, SIDE=side, BLOCK=16)
    assert torch.equal(out, exact) == (side < 3)


def gradients(function, dtype, apart, **options):
    """-> value, dX, dW of logits of hundreds at a temperature; apart: of the teacher, None: no divergence."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D) * 5, torch.randn(V, D)
    extra = [torch.randint(V, (N,))]
    if apart is not None:
        extra = [hidden + apart * torch.randn(N, D), weight + 0.1 * apart * torch.randn(V, D)]
        extra = [x.to(dtype) for x in extra]
    upstream = torch.randn(N)
    x, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    out = function(x, w, *extra, temperature=0.7, **options)
    value = out.logprobs if apart is None else out.divergence
    if options.get("return_entropy"):
        value = value + out.entropy
    return value.detach(), *torch.autograd.grad(value, (x, w), upstream.to(value.dtype))


CASES = {
    "log-probs": (linear_logprobs, None, {}),
    "entropy": (linear_logprobs, None, {"return_entropy": True}),
    "certified": (linear_logprobs, None, {"backward": "certified"}),
    "KL(teacher || student)": (linear_divergence, 0.1, {"beta": 0.0}),
    "JSD": (linear_divergence, 0.1, {"beta": 0.3}),
    "KL(student || teacher)": (linear_divergence, 0.1, {"beta": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_it(case):
    """Against fp64: as near as without, where an fma of a logit less its rounded peak is 15 to 100 times as far."""
    function, apart, options = CASES[case]
    plain = gradients(function, torch.float32, apart, backend="triton", **options)
    with interpreter.fused():
        fused = gradients(function, torch.float32, apart, backend="triton", **options)
    options = {k: v for k, v in options.items() if k != "backward"}
    truth = gradients(getattr(reference, function.__name__), torch.float64, apart, **options)
    for mine, other, true in zip(fused, plain, truth):
        assert true.isfinite().all()
        assert problems.relative_error(mine, true) < 2 * problems.relative_error(other, true) + 1e-7


def rough(self, left, right):
    """A quotient as a GPU may have it."""
    return self.binary_op(left, right, lambda a, b: (a / b * (1 + 2.0**-22)).astype(a.dtype))


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 / 0 of a row without other entries, not taken
def test_temperatures_are_divided_by_exactly(monkeypatch):
    """fp32 log-probs of logits of hundreds, each row at its own temperature: as near to fp64 as by exact quotients."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, D) * 20, torch.randn(V, D), torch.randint(V, (N,))
    temperature = torch.rand(N) + 0.3
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets, temperature=temperature.double())[0]

    def error():
        return (linear_logprobs(hidden, weight, targets, temperature=temperature, backend="triton")[0] - truth).abs()

    exact = error()
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", rough)
    assert error().mean() < 1.5 * exact.mean()
