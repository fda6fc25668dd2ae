"""The bf16 patch of Triton's interpreter, bit for bit against torch."""

import os

import pytest
import torch

interpreter = pytest.importorskip("interpreter")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels in use")


def bits(x):
    return x.view(torch.int16).numpy().view("uint16")


@pytest.mark.quick
def test_rounding_matches_torch():
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32)
    values = torch.cat([patterns.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-45])])
    values = values[~values.isnan()]
    assert (interpreter.narrow(values.numpy()) == bits(values.bfloat16())).all()
    assert (interpreter.widen(bits(values.bfloat16())) == values.bfloat16().float().numpy()).all()
    assert torch.from_numpy(interpreter.widen(interpreter.narrow(torch.tensor([torch.nan]).numpy()))).isnan().all()


def test_kernel_casts_and_dots():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a_ptr, b_ptr, product_ptr, copy_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at = i[:, None] * BLOCK + i[None, :]
        a = tl.load(a_ptr + at)
        tl.store(product_ptr + at, tl.dot(a, tl.load(b_ptr + at)))
        tl.store(copy_ptr + at, (a.to(tl.float32) * 1.001).to(tl.bfloat16))

    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    product, copy = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    kernel[(1,)](a, b, product, copy, BLOCK=16)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, (a.float() * 1.001).bfloat16())
