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


def test_short_operators_are_tritons(monkeypatch):
    """Of every pair of operands the same type, shape and values."""
    import numpy as np
    import triton
    import triton.language as tl

    found = []

    def note(x):
        found.append((str(x.type), x.handle.data.copy()))

    @triton.jit
    def kernel(x_ptr, i_ptr, j_ptr, n):
        offs = tl.arange(0, 8)
        x, i, j = tl.load(x_ptr + offs), tl.load(i_ptr + offs), tl.load(j_ptr + offs[None, :])
        one = tl.load(x_ptr + 3)
        tensors = (x, x[:, None], one, i, j, n, i[:, None])
        for a in tensors:
            for b in (*tensors, -3):
                for c in (a + b, a - b, b - a, a * b, b * a, a < b, a <= b, a > b, a >= b, a == b, a != b):
                    note(c)
                note(tl.where(i > 3, a, b))
                note(tl.where(j > 3, b, a))
            for b in (0.1, -0.0, 0.0, -3.0, x, one):
                for c in (a + b, b - a, a * b, a / b, b / a, a < b):
                    note(c)
        for a in (i, j, n):
            for b in (i, j, 7, n):
                for c in (a // b, a % b, 7 // a, 7 % a, a & b, a | b):
                    note(c)
        note((i > 3) & (x > 0)[:, None] | (j < 5))
        for offset in (i, n, j, 3):
            note(x_ptr + offset)

    kernel.fn.__globals__.update(note=note, tl=tl)
    x = torch.tensor([0.5, -0.0, 0.0, 1.5, torch.nan, torch.inf, -2.0, 1e-40])
    i = torch.tensor([1, -7, 3, 2**31 - 1, 5, -1, 9, 4], dtype=torch.int32)
    arguments = x, i, i.long() * 3 + 1, 5
    results = []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(interpreter, "SHORT", {})
            for name, plain in interpreter.PLAIN.items():
                monkeypatch.setattr(interpreter.TritonSemantic, name, plain)
        found.clear()
        kernel[(1,)](*arguments)
        results.append(list(found))
    for (kind, data), (expected, want) in zip(*results, strict=True):
        assert kind == expected
        assert np.broadcast_to(data, want.shape).tobytes() == want.tobytes(), kind
